"""Write the unlabeled tiles for pretraining the small student `mini`: synthetic H&E and real sections.

Synthetic tiles come from the generator of the embedded cohort. Stain, focus, magnification and compression are drawn
per section, from wider ranges than those of a cohort, so that users' cohorts are covered. All tiles are uint8
(N, 112, 112, 3), downsampled from about 224 px at 0.5 um per pixel.

    python pretraining/corpus.py --out corpus --real ../shared/real/her2st
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageFilter

from peka_lite.data.mini.tiles import draw_section, draw_stain
from peka_lite.data.mini.tissue import DOMAINS, STEP, TILE, draw_domains, draw_outline

SIDE = 112  # pixels of a stored tile, the input size of `mini`
SPOTS = (60, 160)  # range of section sizes: about 0.8 tile areas of tissue per spot
TRAINING, VALIDATION = 0, 1
# numpy hashes the 32-bit words of the seed followed by those of the spawn key. The streams of `write_mini_cohort` end
# with the small index of a child, those of the corpus with this word, so no seed of a cohort gives a stream of the
# corpus. A prefix would not be enough: a longer seed could contain it.
LAST_WORD = 0x50455441


def make_stream(seed: int, kind: int, section: int) -> np.random.SeedSequence:
    """Return the seed sequence of a section, distinct from those of cohorts and of other kinds and sections."""
    return np.random.SeedSequence(seed, spawn_key=(kind, section, LAST_WORD))


def draw_scan(rng) -> dict:
    """Draw the stain and scan parameters of a section, from wider ranges than those of cohorts."""
    stain = draw_stain(rng)
    vectors = (stain["vectors"] + rng.normal(0, 0.08, (2, 3))).clip(0.02)  # (2 stains, 3 colors)
    stain["vectors"] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    stain["strength"] = stain["strength"] * np.exp(rng.normal(0, 0.3, 2))
    stain["white"] = np.minimum(stain["white"] + rng.normal(0, 5) + rng.normal(0, 4, 3), 254)
    return {
        "stain": stain,
        "tone": float(np.exp(rng.normal(0, 0.15))),  # exponent of the pixel values
        "scale": float(rng.uniform(0.85, 1.15)),  # side of the tile's source square, in tiles
        "coarse": float(rng.choice([1.0, rng.uniform(1.0, 1.6)])),  # size of a scanner pixel, in section pixels
        "blur": float(rng.choice([0.0, rng.uniform(0.3, 1.2)])),  # standard deviation, pixels
        "quality": int(rng.integers(40, 96)) if rng.random() < 0.6 else None,  # of the JPEG
    }


def draw_plain_scan(rng) -> dict:
    """Draw the stain of a cohort's patient, with a perfect scan."""
    return {"stain": draw_stain(rng), "tone": 1.0, "scale": 1.0, "coarse": 1.0, "blur": 0.0, "quality": None}


def shrink(image: Image.Image) -> np.ndarray:
    """Downsample an image to uint8 (112, 112, 3), with the filter of `preprocess`."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def scan_tile(pixels: np.ndarray, scan: dict) -> np.ndarray:
    """Convert a square of a section to a tile, uint8 (112, 112, 3)."""
    image = Image.fromarray(pixels)
    if scan["blur"]:
        image = image.filter(ImageFilter.GaussianBlur(scan["blur"]))
    if scan["coarse"] != 1:
        image = image.resize([round(side / scan["coarse"]) for side in image.size], Image.Resampling.BILINEAR)
    if scan["tone"] != 1:
        image = image.point([round(255 * (value / 255) ** scan["tone"]) for value in range(256)] * 3)
    if scan["quality"]:
        image.save(file := io.BytesIO(), "JPEG", quality=scan["quality"])
        image = Image.open(file)
    return shrink(image)


def draw_tiles(seed: int, kind: int, section: int, n_tiles: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one section and cut tiles at random positions of its tissue.

    Returns
    -------
    tiles : numpy.ndarray
        uint8 (n_tiles, 112, 112, 3).
    mixture : numpy.ndarray
        float32 (n_tiles, n_domains), share of each domain in the tissue of a tile.
    """
    rng = np.random.default_rng(make_stream(seed, kind, section))
    scan = draw_scan(rng) if kind == TRAINING else draw_plain_scan(rng)
    _, tissue = draw_outline(rng, int(rng.integers(*SPOTS, endpoint=True)))
    labels = draw_domains(rng, tissue)
    image = draw_section(rng, labels, scan["stain"])

    side = round(TILE * scan["scale"])
    cells = np.argwhere(labels >= 0)
    centers = cells[rng.integers(len(cells), size=n_tiles)] * STEP + rng.integers(STEP, size=(n_tiles, 2))
    corners = np.clip(centers - side // 2, 0, np.array(image.shape[:2]) - side)  # (n_tiles, 2), row and column
    inner = (np.arange(28) * side + side // 2) // 28  # pixels of a tile at which domains are sampled
    tiles, mixture = np.empty((n_tiles, SIDE, SIDE, 3), np.uint8), np.empty((n_tiles, len(DOMAINS)), np.float32)
    for i, (row, column) in enumerate(corners.tolist()):
        tiles[i] = scan_tile(image[row : row + side, column : column + side], scan)
        window = labels[np.ix_((row + inner) // STEP, (column + inner) // STEP)]
        mixture[i] = np.bincount(window[window >= 0], minlength=len(DOMAINS))
    return tiles, mixture / mixture.sum(1, keepdims=True)


def read_section(root: Path, name: str) -> np.ndarray:
    """Read the tiles of a real section in HEST-1k's layout, uint8 (n_spots, 112, 112, 3)."""
    path = root / "patches" / f"{name}.h5"
    if not path.is_file():
        known = sorted(file.stem for file in root.glob("patches/*.h5"))
        raise FileNotFoundError(f"{path}: no such section; {root} has {', '.join(known) or 'none'}")
    with h5py.File(path) as file:
        return np.stack([shrink(Image.fromarray(tile)) for tile in file["img"]])


@contextlib.contextmanager
def write_atomically(path: Path):
    """Yield a temporary path that is renamed to `path` on success and deleted on error."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}.npy")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one .npy file atomically."""
    with write_atomically(path) as draft:
        np.save(draft, array)


def _fill_section(path: Path, seed: int, kind: int, n_tiles: int, section: int) -> np.ndarray:
    """Write the tiles of a section to its rows of the .npy file; return their mixtures."""
    tiles, mixture = draw_tiles(seed, kind, section, n_tiles)
    file = np.load(path, mmap_mode="r+")
    file[section * n_tiles : (section + 1) * n_tiles] = tiles
    return mixture


def write_synthetic(path: Path, *, seed: int, kind: int, sections: int, tiles: int, processes: int = 2) -> np.ndarray:
    """Write `tiles` tiles of each of `sections` synthetic sections to a .npy file; return their domain mixtures."""
    with write_atomically(path) as draft:
        shape = (sections * tiles, SIDE, SIDE, 3)
        np.lib.format.open_memmap(draft, mode="w+", dtype=np.uint8, shape=shape).flush()
        fill = partial(_fill_section, draft, seed, kind, tiles)
        if processes == 1:
            return np.concatenate([fill(section) for section in range(sections)])
        with ProcessPoolExecutor(processes) as pool:
            return np.concatenate(list(pool.map(fill, range(sections))))


def main(arguments: list[str] | None = None) -> None:
    """Write ``synthetic.npy``, ``validation*.npy`` and one ``{section}.npy`` for each real section."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--synthetic", type=int, default=240, help="synthetic training sections")
    parser.add_argument("--validation", type=int, default=16, help="held-out synthetic sections, drawn like a cohort")
    parser.add_argument("--tiles", type=int, default=100, help="of each synthetic section")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--real", type=Path, help="folder of real sections in HEST-1k's layout")
    parser.add_argument("--sections", nargs="+", default=[f"HER2_C{i}" for i in range(2, 6)], help="of --real")
    options = parser.parse_args(arguments)

    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    for name in options.sections if options.real else []:
        write_array(options.out / f"{name}.npy", read_section(options.real, name))
    shared = {"seed": options.seed, "tiles": options.tiles, "processes": options.processes}
    mixture = write_synthetic(
        options.out / "validation.npy", kind=VALIDATION, sections=options.validation, **shared
    )  # (sections * tiles, n_domains)
    write_array(options.out / "validation_mixture.npy", mixture)
    write_array(options.out / "validation_section.npy", np.repeat(np.arange(options.validation), options.tiles))
    write_synthetic(options.out / "synthetic.npy", kind=TRAINING, sections=options.synthetic, **shared)
    record = {name: value for name, value in vars(options).items() if name not in ("out", "real", "processes")}
    (options.out / "corpus.json").write_text(json.dumps(record | {"real": bool(options.real)}, indent=1) + "\n")
    print(f"{options.out}: {options.synthetic * options.tiles} synthetic tiles, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"corpus.py: {error}") from None
