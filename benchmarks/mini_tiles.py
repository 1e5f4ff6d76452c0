"""Compare the simulated H&E tiles of the mini cohort with those of HER2-positive breast sections.

    python benchmarks/mini_tiles.py HER2ST [--out benchmarks/results/DATE_mini_tiles.csv] [--montage FILE.png]

HER2ST is a folder of the sections HER2_C2 to HER2_C5 in HEST-1k's layout. They were scanned at about 0.69 um per
pixel and enlarged, so all tiles are measured at 1 um per pixel.
"""

import argparse
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from skimage.color import hed_from_rgb
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.measure import regionprops
from skimage.segmentation import watershed

from peka_lite.data.hest import read_cohort
from peka_lite.data.mini.cohort import write_mini_cohort

REAL = ("HER2_C2", "HER2_C3", "HER2_C4", "HER2_C5")
COLORS = ("red", "green", "blue")
TILES = 60  # of each slide
SQUARE = 0.112**2  # mm2 of a tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real", type=Path, help="folder with the real sections")
    parser.add_argument("--mini", type=Path, help="an existing mini cohort; by default, one is simulated")
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{date.today()}_mini_tiles.csv"))
    parser.add_argument("--montage", type=Path, help="also draw 30 tiles of each, side by side")
    args = parser.parse_args()
    missing = [name for name in REAL if not (args.real / "patches" / f"{name}.h5").is_file()]
    if missing:
        sys.exit(f"{args.real}: no patches of {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        mini = read_cohort(args.mini or write_mini_cohort(Path(folder) / "mini"))
        real = read_cohort(args.real, ids=list(REAL))
        rng = np.random.default_rng(0)
        tiles = {k: [sample_tiles(s, rng) for s in v.slides] for k, v in (("mini", mini), ("real", real))}
    table = compare(tiles)
    print(table.round(3).to_string())
    if args.montage:
        draw_montage(tiles, args.montage)
    table.to_csv(args.out)


def sample_tiles(slide, rng) -> np.ndarray:
    """Sample tiles of a slide and average them to 1 um per pixel, (TILES, 112, 112, 3) float32."""
    rows = np.sort(rng.choice(slide.n_spots, min(TILES, slide.n_spots), replace=False))
    tiles = np.asarray(slide.tiles[rows], dtype=np.float32)
    return tiles.reshape(len(tiles), 112, 2, 112, 2, 3).mean((2, 4))


def compare(tiles: dict[str, list[np.ndarray]]) -> pd.DataFrame:
    """Return median, lowest and highest value of each statistic over slides."""
    columns = {}
    for kind, slides in tiles.items():
        by_slide = pd.DataFrame([describe(slide) for slide in slides])
        columns[kind] = by_slide.median()
        columns[f"{kind}_lowest"], columns[f"{kind}_highest"] = by_slide.min(), by_slide.max()
    return pd.DataFrame(columns).rename_axis("statistic")


def describe(tiles: np.ndarray) -> dict[str, float]:
    """Compute the statistics of a slide's tiles (n, 112, 112, 3)."""
    density = -np.log((tiles + 1) / 256)
    h, e = np.moveaxis(density @ hed_from_rgb[:, :2].astype(np.float32), -1, 0)  # (n, 112, 112)
    gray = tiles.mean(-1)
    cells = [segment_nuclei(tile) for tile in h]
    areas = np.concatenate([areas for areas in cells if len(areas)])
    means, spreads = tiles.mean((1, 2)), tiles.std((1, 2))  # (n, 3)
    result = {f"mean {c}": v for c, v in zip(COLORS, means.mean(0), strict=True)}
    result |= {f"SD over tiles, {c}": v for c, v in zip(COLORS, means.std(0), strict=True)}
    result |= {f"SD within a tile, {c}": v for c, v in zip(COLORS, spreads.mean(0), strict=True)}
    for name, stain in (("haematoxylin", h), ("eosin", e)):
        for q in (10, 50, 95):
            result[f"{name} OD, {q}th percentile"] = np.percentile(stain, q)
    first, second = estimate_stains(density.reshape(-1, 3))
    result |= {f"stain 1 {c}": v for c, v in zip(COLORS, first, strict=True)}
    result |= {f"stain 2 {c}": v for c, v in zip(COLORS, second, strict=True)}
    result |= {
        "bright share": (tiles.min(-1) > 215).mean(),
        "nuclei per mm2": np.median([len(c) for c in cells]) / SQUARE,
        "nuclei per mm2, SD over tiles": np.std([len(c) for c in cells]) / SQUARE,
        "nuclear area, um2, median": np.median(areas),
        "nuclear area, um2, 90th percentile": np.percentile(areas, 90),
        "gray gradient per um": np.hypot(*np.gradient(gray, axis=(1, 2))).mean(),
    }
    result |= {f"gray correlation at {lag} um": correlate_lagged(gray, lag) for lag in (2, 4, 8, 16, 32)}
    return result


def segment_nuclei(h: np.ndarray) -> np.ndarray:
    """Segment nuclei in a hematoxylin image (112, 112) at 1 um per pixel; return areas in um2."""
    smooth = ndimage.gaussian_filter(h, 1.0)
    mask = smooth > max(threshold_otsu(smooth), 0.12)
    mask = ndimage.binary_opening(mask)
    if not mask.any():
        return np.empty(0)
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 0.7)
    peaks = peak_local_max(distance, min_distance=3, labels=ndimage.label(mask)[0], exclude_border=False)
    seeds = np.zeros(h.shape, int)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    areas = np.array([region.area for region in regionprops(watershed(-distance, seeds, mask=mask))])
    return areas[areas >= 8]


def estimate_stains(density: np.ndarray) -> np.ndarray:
    """Estimate two stain directions (2, 3) of optical densities (n, 3), hematoxylin first (Macenko et al. 2009)."""
    density = density[(density > 0.15).all(1)]
    _, vectors = np.linalg.eigh(np.cov(density.T))
    plane = vectors[:, [2, 1]] * np.where(vectors[:, [2, 1]].sum(0) < 0, -1, 1)
    angle = np.arctan2(*(density @ plane)[:, ::-1].T)
    ends = np.percentile(angle, [1, 99])
    pair = (plane @ np.stack([np.cos(ends), np.sin(ends)])).T  # (2, 3)
    return pair[np.argsort(-pair[:, 0])]


def correlate_lagged(gray: np.ndarray, lag: int) -> float:
    """Return the correlation of pixels `lag` um apart within a tile."""
    x = gray - gray.mean((1, 2), keepdims=True)
    return float(((x[:, lag:] * x[:, :-lag]).mean() + (x[:, :, lag:] * x[:, :, :-lag]).mean()) / 2 / (x**2).mean())


def draw_montage(tiles: dict[str, list[np.ndarray]], path: Path) -> None:
    """Draw 30 tiles of each cohort, mini on the left."""
    from skimage.io import imsave

    halves = []
    for slides in tiles.values():
        selected = np.concatenate([slide[: -(-30 // len(slides))] for slide in slides])[:30]
        rows = selected.reshape(6, 5, 112, 112, 3).transpose(0, 2, 1, 3, 4)
        halves.append(rows.reshape(6 * 112, 5 * 112, 3))
    gap = np.zeros((6 * 112, 16, 3))
    imsave(path, np.rint(np.concatenate([halves[0], gap, halves[1]], 1)).astype(np.uint8), check_contrast=False)


if __name__ == "__main__":
    main()
