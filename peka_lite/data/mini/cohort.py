"""Write the embedded default cohort: small, synthetic, and in HEST-1k's file layout.

Every slide has a map of tissue domains. The map is drawn as H&E and also sets the rates of the *visible* genes, so
these can be predicted from the tiles. *Invisible* genes follow hidden niches, smooth in space but independent of the
map, so tiles carry no information on them. *Noise* genes have no spatial pattern. Each kind has the same expected share
of the counts at every spot, so dividing by the total transfers no signal between kinds.
"""

import contextlib
import json
import operator
import os
import shutil
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from peka_lite._core.io import write_file, write_h5ad
from peka_lite._core.progress import progress_bar
from peka_lite.data._choices import MINI_FORMAT
from peka_lite.data._format import write_tiles
from peka_lite.data.mini import counts as genes
from peka_lite.data.mini.tiles import draw_section, draw_stain
from peka_lite.data.mini.tissue import (
    DOMAINS,
    PITCH_UM,
    PIXEL_UM,
    SPOT_UM,
    STEP,
    TILE,
    draw_domains,
    draw_outline,
    mix_domains,
)

N_WITHOUT_TILE = 2  # spots per slide without a tile, as at the edge of a real scan
FILES = {"st": ".h5ad", "patches": ".h5", "metadata": ".json"}


def write_mini_cohort(root, *, seed=0, n_patients=6, n_slides=8, spots_per_slide=(150, 250)):
    """Write the synthetic cohort as ``st/{id}.h5ad``, ``patches/{id}.h5`` and ``metadata/{id}.json``.

    The same seed, options and library versions give the same bytes. The write is atomic. Nothing is done if `root`
    already holds that cohort.

    Parameters
    ----------
    root : str or os.PathLike
        Folder of the cohort: missing, empty, or with the same cohort.
    seed : int
        0 or more.
    n_patients, n_slides : int
        Slide i is of patient i modulo `n_patients`; `n_slides` must not be below `n_patients`.
    spots_per_slide : (int, int)
        Smallest and largest number of spots of a slide, inclusive, within 20 to 1000.

    Returns
    -------
    pathlib.Path
        `root`.

    Raises
    ------
    TypeError, ValueError
        If a number is not an integer, or out of range.
    FileExistsError
        If `root` holds something else.

    Examples
    --------
    >>> import peka_lite as pk
    >>> root = pk.data.write_mini_cohort("cohort", seed=1, n_patients=1, n_slides=1, spots_per_slide=(30, 30))
    >>> sorted(path.name for path in root.iterdir())
    ['metadata', 'mini.json', 'patches', 'st']
    >>> pk.read_cohort(root).slides[0]
    Slide MINI1: 28 spots x 1500 genes, Mini patient 1; dropped 2 spots without a tile
    """
    seed, n_patients, n_slides = (operator.index(value) for value in (seed, n_patients, n_slides))
    low, high = (operator.index(value) for value in spots_per_slide)
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if not 1 <= n_patients <= n_slides:
        raise ValueError(f"need 1 <= n_patients <= n_slides, got {n_patients} patients and {n_slides} slides")
    if not 20 <= low <= high <= 1000:
        raise ValueError(f"spots_per_slide must satisfy 20 <= low <= high <= 1000, got {(low, high)}")
    root = Path(root)
    options = {"format": MINI_FORMAT, "seed": seed, "n_patients": n_patients, "n_slides": n_slides}
    record = json.dumps(options | {"spots_per_slide": [low, high]}, indent=1) + "\n"
    if _is_complete(root, record, n_slides):
        return root

    root.parent.mkdir(parents=True, exist_ok=True)
    # Beside root: a rename is atomic only within one file system.
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        draft.chmod(0o755)  # mkdtemp creates it with 0o700
        for folder in FILES:
            (draft / folder).mkdir()
        of_genes, of_patients, of_slides = np.random.SeedSequence(seed).spawn(3)
        var, profiles = genes.draw_genes(np.random.default_rng(of_genes))
        patients = [_draw_patient(profiles, stream) for stream in of_patients.spawn(n_patients)]
        streams = of_slides.spawn(n_slides)
        bar = progress_bar(streams, desc="draw the synthetic cohort", unit=" slides", enabled=None)
        for index, stream in enumerate(bar):
            number = index % n_patients
            of_slide, of_files = stream.spawn(2)
            slide, section, corners = _draw_slide(var, patients[number], (low, high), of_slide)
            order = np.random.default_rng(of_files).permutation(slide.n_obs)
            _write_slide(draft, f"MINI{index + 1}", number + 1, slide, section, corners, order)
        write_file(draft / "mini.json", record.encode())
        try:
            with contextlib.suppress(FileNotFoundError):
                root.rmdir()  # only if it is empty
            os.replace(draft, root)
        except OSError:
            if not _is_complete(root, record, n_slides):  # another process may have written the same cohort first
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # moved already on success
    return root


def _is_complete(root, record, n_slides):
    """Return whether `root` holds exactly the cohort of this ``mini.json``; raise if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    files = [root / folder / f"MINI{i + 1}{end}" for folder, end in FILES.items() for i in range(n_slides)]
    stored = root / "mini.json"
    if all(file.is_file() for file in [stored, *files]) and stored.read_text(encoding="utf-8") == record:
        return True
    options = json.loads(record)
    raise FileExistsError(f"{root} exists and is not the complete mini cohort {options}; remove it or choose another")


def _draw_patient(profiles, stream):
    """Draw the stain, depth and gene shifts of a patient from independent random streams."""
    stain, depth, shift = (np.random.default_rng(child) for child in stream.spawn(3))
    return {
        "stain": draw_stain(stain),
        "depth": np.exp(depth.normal(0, 0.1)),
        "profiles": genes.draw_patient_profiles(shift, profiles),
    }


def _draw_slide(var, patient, spots_per_slide, stream):
    """Draw one slide: AnnData with the ground truth, the image (h, w, 3), and the corners (x, y) of its tiles."""
    outline, domains, drawing, niches, depth, counts, names = map(np.random.default_rng, stream.spawn(7))
    n_spots = int(outline.integers(*spots_per_slide, endpoint=True))
    obs, tissue = draw_outline(outline, n_spots)
    labels = draw_domains(domains, tissue)
    section = draw_section(drawing, labels, patient["stain"])

    xy = obs[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()  # (n_spots, 2)
    corners = xy.astype(np.int64) - TILE // 2
    cell = tuple((xy[:, ::-1] // STEP).astype(int).T)
    mixture = mix_domains(labels, corners)
    niche = genes.draw_niches(niches, labels.shape, cell)
    mixtures = {"visible": mixture, "invisible": niche, "noise": np.ones((n_spots, 1))}
    total = patient["depth"] * genes.draw_depth(depth, labels.shape, cell)
    drawn, rate = genes.draw_counts(counts, var, patient["profiles"], mixtures, total)

    codes = names.choice(4**16, n_spots, replace=False)  # unique
    letters = np.array(list("ACGT"))[codes[:, None] >> np.arange(0, 32, 2) & 3]  # (n_spots, 16)
    obs.index = ["".join(row) + "-1" for row in letters]
    obs["domain"] = pd.Categorical.from_codes(mixture.argmax(1), categories=list(DOMAINS))
    slide = ad.AnnData(
        X=sparse.csr_matrix(drawn),
        obs=obs,
        var=var.copy(),
        obsm={
            "spatial": xy,
            "mixture": pd.DataFrame(mixture.astype(np.float32), index=obs.index, columns=list(DOMAINS)),
            "niche": pd.DataFrame(niche.astype(np.float32), index=obs.index, columns=list(genes.NICHES)),
        },
        layers={"rate": rate},
        uns={"spatial": {"ST": _downscale(section)}},
    )
    return slide, section, corners


def _downscale(section):
    """Return ``uns["spatial"]["ST"]``: the section downscaled to at most 1000 pixels a side, and its scale."""
    factor = -(-max(section.shape) // 1000)  # an integer, so that the scale is exact
    height, width = (side // factor for side in section.shape[:2])
    trimmed = section[: height * factor, : width * factor]
    # Rows first and in integers: much faster than one mean over both axes.
    sums = trimmed.reshape(height, factor, -1, 3).sum(1, dtype=np.uint16)
    sums = sums.reshape(height, width, factor, 3).sum(2)
    return {
        "images": {"downscaled_fullres": np.rint(sums / factor**2).astype(np.uint8)},
        "scalefactors": {"spot_diameter_fullres": SPOT_UM / PIXEL_UM, "tissue_downscaled_fullres_scalef": 1 / factor},
    }


def _write_slide(root, name, number, slide, section, corners, order):
    """Write the three files of one slide of patient `number`, with the tiles in `order`."""
    write_h5ad(slide, root / "st" / f"{name}.h5ad", compression="gzip")

    chosen = order[N_WITHOUT_TILE:]
    tiles = (section[y : y + TILE, x : x + TILE] for x, y in corners[chosen])
    attributes = {"patch_size_src": TILE, "patch_size_target": TILE, "downsample": 1.0, "pixel_size": PIXEL_UM}
    write_tiles(
        root / "patches" / f"{name}.h5", tiles, slide.obs_names[chosen], corners[chosen], attributes=attributes,
        field="barcodes" if name == "MINI2" else "barcode",  # HEST-1k has both
    )  # fmt: skip

    metadata = {
        "dataset_title": "peka_lite mini cohort (synthetic)",
        "id": name,
        "synthetic": True,
        "note": "Synthetic data: the image and the counts were both drawn by a computer. No patient exists.",
        "organ": "Breast",
        "tissue": "Breast",
        "disease_state": "Cancer",
        "disease_comment": "Synthetic",
        "oncotree_code": None,
        "species": "Homo sapiens",
        "patient": f"Mini patient {number}",
        "st_technology": "Visium",
        "preservation_method": None,
        "license": "CC0",
        "pixel_size_um_embedded": PIXEL_UM,
        "pixel_size_um_estimated": PIXEL_UM,
        "magnification": "20x",
        "fullres_px_width": section.shape[1],
        "fullres_px_height": section.shape[0],
        "spots_under_tissue": slide.n_obs,
        "spot_diameter": SPOT_UM,
        "inter_spot_dist": PITCH_UM,
        "nb_genes": slide.n_vars,
    }
    write_file(root / "metadata" / f"{name}.json", (json.dumps(metadata, indent=1) + "\n").encode())
