"""Draw the spot grid, the tissue outline and the map of domains of one synthetic slide."""

import numpy as np
import pandas as pd
from scipy import fft, ndimage

DOMAINS = ("tumor", "stroma", "immune", "gland", "fat", "necrosis")
# Share of the tissue's area, before each slide's random shift.
AREA = {"tumor": 0.25, "stroma": 0.21, "immune": 0.14, "gland": 0.14, "fat": 0.13, "necrosis": 0.13}

PIXEL_UM = 0.5
TILE = 224  # pixels
STEP = 16  # pixels per side of one cell of the domain map, 8 um
PITCH_UM, SPOT_UM = 100.0, 55.0  # Visium


def smooth_noise(rng, shape, sigma):
    """Draw periodic noise of mean 0 and standard deviation 1, smoothed over `sigma` array elements; float32."""
    spectrum = fft.rfft2(rng.standard_normal(shape, dtype=np.float32))
    noise = fft.irfft2(ndimage.fourier_gaussian(spectrum, sigma, n=shape[1]), shape)
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def draw_outline(rng, n_spots):
    """Draw a tissue outline; return the positions of `n_spots` in it, and the tissue on the grid of the domain map."""
    order = np.arange(2, 6)
    swing, phase = rng.uniform(0.1, 0.32, 4) / order, rng.uniform(0, 2 * np.pi, 4)

    def reach(x, y):  # distance from the center, in units of the outline's radius in that direction
        return np.hypot(x, y) / (1 + (swing * np.cos(np.arctan2(y, x)[..., None] * order + phase)).sum(-1))

    side = int(1.3 * np.sqrt(n_spots)) + 3
    row, col = np.mgrid[-side : side + 1, -2 * side : 2 * side + 1]
    row, col = (axis[(row + col) % 2 == 0] for axis in (row, col))  # Visium: odd columns on odd rows only
    x, y = col * PITCH_UM / 2, row * PITCH_UM * np.sqrt(3) / 2
    distance = reach(x, y)
    inside = np.sort(np.argsort(distance, kind="stable")[:n_spots])
    row, col, x, y = (axis[inside] for axis in (row, col, x, y))

    margin = 1.6 * PITCH_UM  # every tile is well inside the image
    left, top = x.min() - margin, y.min() - margin  # um
    step_um = STEP * PIXEL_UM
    cells = [int(np.ceil(extent / step_um)) for extent in (y.max() - top + margin, x.max() - left + margin)]
    cell_y, cell_x = (np.indices(cells) + 0.5) * step_um
    # The tissue ends just outside the outermost spots, so that their tiles show some bare glass.
    tissue = reach(cell_x + left, cell_y + top) <= distance[inside].max() + 0.35 * PITCH_UM
    obs = pd.DataFrame(
        {
            "in_tissue": True,
            "array_row": row - row.min() + row.min() % 2 + 4,
            "array_col": col - col.min() + col.min() % 2 + 6,
            "pxl_row_in_fullres": np.rint((y - top) / PIXEL_UM),
            "pxl_col_in_fullres": np.rint((x - left) / PIXEL_UM),
        }
    )
    return obs, tissue


def draw_domains(rng, tissue):
    """Draw the domains of the tissue, int8 of the same shape, -1 off the tissue."""
    shares = np.array([AREA[name] for name in DOMAINS]) * np.exp(rng.normal(0, 0.25, len(DOMAINS)))
    left = dict(zip(DOMAINS, np.rint(shares / shares.sum() * tissue.sum()).astype(int), strict=True))  # cells
    nests = smooth_noise(rng, tissue.shape, 19) + 0.3 * smooth_noise(rng, tissue.shape, 4)
    labels = np.where(tissue, np.int8(DOMAINS.index("stroma")), np.int8(-1))

    def assign(name, score, n_cells, among):
        cut = np.sort(score[among])[-n_cells]
        labels[among & (score >= cut)] = DOMAINS.index(name)
        return score - cut

    # Necrosis is deep in the tumor, immune cells are along its border, fat is away from it.
    depth = assign("tumor", nests, left["tumor"] + left["necrosis"], tissue)
    rules = [("necrosis", 9, depth), ("immune", 8, -np.abs(depth)), ("fat", 14, -depth), ("gland", 12, 0)]
    for name, sigma, pull in rules:
        score = smooth_noise(rng, tissue.shape, sigma) + 0.15 * smooth_noise(rng, tissue.shape, 3)
        score += 0.8 * pull
        assign(name, score, left[name], labels == DOMAINS.index("tumor" if name == "necrosis" else "stroma"))
    return labels


def mix_domains(labels, corners):
    """Return the share of each domain in the tissue of each spot's tile, float64 (n_spots, n_domains)."""
    side = TILE // STEP
    mixture = np.empty((len(corners), len(DOMAINS)))
    for spot, (column, row) in enumerate(np.rint(corners / STEP).astype(int)):
        window = labels[row : row + side, column : column + side]
        mixture[spot] = np.bincount(window[window >= 0], minlength=len(DOMAINS))
    return mixture / mixture.sum(1, keepdims=True)
