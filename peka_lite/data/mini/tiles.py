"""Draw the RGB image of one synthetic H&E section from its map of tissue domains.

The whole section is drawn on one canvas at 0.5 um per pixel and the tiles are cut from it afterwards, so that
neighboring tiles agree where they overlap, as on a real slide. Two float32 canvases hold the amount of hematoxylin
and of eosin of every pixel and are converted to colors at the end.
"""

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.special import expit, ndtr

from peka_lite.data.mini.tissue import DOMAINS, PIXEL_UM, STEP, smooth_noise

# Optical density in red, green and blue, between the published matrix and what sections of breast cancer show.
HEMATOXYLIN, EOSIN = (0.71, 0.62, 0.32), (0.24, 0.88, 0.36)

# Diffuse stain of each domain, before nuclei and fibers are drawn: (hematoxylin, eosin).
GROUND = {
    "tumor": (0.24, 0.34),
    "stroma": (0.12, 0.32),
    "immune": (0.20, 0.24),
    "gland": (0.10, 0.32),
    "fat": (0.00, 0.02),
    "necrosis": (0.14, 0.46),
}

# Nuclei: length and width (um), their relative spread, irregularity of the outline, hematoxylin, coarseness.
NUCLEI = {
    "tumor": (9.5, 7.5, 0.24, 0.16, 1.30, 0.40),
    "lymphocyte": (6.2, 5.6, 0.10, 0.07, 1.60, 0.30),
    "fibroblast": (12.0, 3.4, 0.24, 0.12, 1.25, 0.20),
    "epithelium": (8.5, 6.0, 0.12, 0.07, 1.20, 0.30),
    "adipocyte": (9.0, 2.4, 0.15, 0.05, 1.30, 0.15),
    "debris": (2.6, 2.2, 0.40, 0.20, 1.60, 0.20),
}

# Cells per mm2 of each domain; a tile is 0.0125 mm2. `_draw_glands` and `_draw_fat` place the other nuclei.
DENSITY = {
    "tumor": {"tumor": 8500, "stroma": 60, "necrosis": 300},
    "lymphocyte": {"tumor": 400, "stroma": 500, "immune": 14000, "gland": 400, "fat": 20, "necrosis": 350},
    "fibroblast": {"tumor": 250, "stroma": 2800, "immune": 400, "gland": 1800},
    "debris": {"necrosis": 5500, "tumor": 60},
}

N_ANGLES, N_VARIANTS, STAMP = 16, 6, 47  # nuclei are drawn once into a bank of stamps, then placed many times
PERIOD = 512  # side of the periodic textures, pixels


def draw_section(rng, labels, stain):
    """Draw a section, uint8 (rows * STEP, columns * STEP, 3), from its map of tissue domains and a patient's stain.

    `labels` (rows, columns) int8 index DOMAINS, -1 off the tissue.
    """
    angle, across, along = _draw_fibers(rng, labels)
    holes = _draw_holes(rng, labels)
    hematoxylin, eosin = _paint_ground(rng, labels, across, along, holes)
    banks = {name: _draw_nuclei(rng, *spec) for name, spec in NUCLEI.items()}
    _draw_cells(rng, labels, holes, angle, hematoxylin, banks)
    _draw_fat(rng, labels, hematoxylin, eosin, banks["adipocyte"])
    _draw_glands(rng, labels, hematoxylin, eosin, banks["epithelium"])
    return _convert_to_rgb(hematoxylin, eosin, stain)


def draw_stain(rng):
    """Draw one patient's stain and scanner: density vectors, strengths, white point, gamma, and blur in pixels."""
    vectors = np.array([HEMATOXYLIN, EOSIN]) + rng.normal(0, 0.03, (2, 3))
    return {
        "vectors": vectors / np.linalg.norm(vectors, axis=1, keepdims=True),  # (2 stains, 3 colors)
        "strength": np.array([1.9, 1.15]) * np.exp(rng.normal(0, 0.18, 2)),
        "white": np.array([237.0, 227.0, 236.0]) + rng.normal(0, 5, 3),
        "gamma": float(np.exp(rng.normal(0, 0.06))),
        "blur": float(np.exp(rng.normal(0.1, 0.25))),
    }


def _map_domains(labels, value):
    """Return the map of values that {domain: value} gives, float32 of the shape of the labels."""
    table = np.array([value.get(name, 0) for name in DOMAINS] + [0], np.float32)  # last: off the tissue
    return table[labels]


def _draw_fibers(rng, labels):
    """Draw the course of connective tissue fibers: direction (radians), and position across and along in pixels."""
    rows, columns = (axis.astype(np.float32) * STEP for axis in np.indices(labels.shape))
    heading = rng.uniform(0, np.pi)
    # Fibers follow the contour lines of this height; the noise bends them.
    across = np.cos(heading) * rows + np.sin(heading) * columns
    across += 70 * smooth_noise(rng, labels.shape, 9) + 12 * smooth_noise(rng, labels.shape, 3)
    along = np.cos(heading) * columns - np.sin(heading) * rows
    slope_rows, slope_columns = np.gradient(across)
    return np.arctan2(slope_rows, slope_columns) + np.pi / 2, across, along


def _paint_ground(rng, labels, across, along, holes):
    """Draw all but cells: cytoplasm, collagen, debris and gaps beside tumor nests; hematoxylin and eosin by pixel."""
    shape, canvas = labels.shape, (PERIOD, PERIOD)
    coarse, fine = smooth_noise(rng, canvas, (5.0, 60.0)), smooth_noise(rng, canvas, (1.3, 30.0))
    fiber = 0.11 * np.tanh(1.5 * coarse) + 0.05 * fine  # (across, along)
    slit = 0.7 * expit(6 * (-1.7 - coarse))
    cloud, speckle = smooth_noise(rng, canvas, 9.0), smooth_noise(rng, canvas, 1.4)

    connective = _map_domains(labels, {"stroma": 1, "gland": 1})
    bundles = connective * (0.8 + 0.35 * smooth_noise(rng, shape, 5)).clip(0.2)
    loose = 0.55 * connective * (smooth_noise(rng, shape, 3) > 1.0)  # pale patches between the bundles
    # Fixation shrinks tumor nests away from the stroma, which leaves white gaps.
    tumor = ndimage.gaussian_filter(_map_domains(labels, {"tumor": 1}), 0.8)
    stroma = ndimage.gaussian_filter(_map_domains(labels, {"stroma": 1}), 1.2)
    gap = 4 * tumor * (1 - tumor) * np.minimum(5 * stroma, 1) * (smooth_noise(rng, shape, 4) > 0.3)
    layers = np.stack([
        _map_domains(labels, {name: ground[0] for name, ground in GROUND.items()}),
        _map_domains(labels, {name: ground[1] for name, ground in GROUND.items()}),
        _map_domains(labels, {"tumor": 0.10, "stroma": 0.07, "immune": 0.10, "gland": 0.05, "necrosis": 0.15}),
        _map_domains(labels, {"tumor": 0.02, "stroma": 0.01, "immune": 0.02, "necrosis": 0.09}),
        bundles, loose, np.maximum(gap, holes), across, along,
    ]).astype(np.float32)  # (9, rows, columns)  # fmt: skip
    layers = ndimage.gaussian_filter(layers, (0, 0.7, 0.7))  # smooths the edges of the map's cells
    layers = np.pad(layers, ((0, 0), (1, 1), (1, 1)), mode="edge")

    hematoxylin = np.empty((shape[0] * STEP, shape[1] * STEP), np.float32)
    eosin = np.empty_like(hematoxylin)
    repeats = -(-hematoxylin.shape[1] // PERIOD)
    cloud, speckle = (np.tile(texture, repeats)[:, : hematoxylin.shape[1]] for texture in (cloud, speckle))
    for row in range(shape[0]):  # strips that fit the processor's cache are several times faster
        strip = np.arange(row * STEP, (row + 1) * STEP)
        h, e, cloudy, grainy, bundle, pale, white, u, v = _enlarge(layers[:, row : row + 3])
        grain = cloudy * cloud[strip % PERIOD] + grainy * speckle[strip % PERIOD]
        where = u.astype(np.int32) % PERIOD, v.astype(np.int32) % PERIOD
        e = (e + grain + bundle * fiber[where]) * (1 - bundle * slit[where]) * (1 - pale)
        glass = 1 - np.clip(5 * white - 2.2, 0, 0.95)
        eosin[strip] = np.maximum(e, 0) * glass
        hematoxylin[strip] = np.maximum(h + 0.7 * grain, 0) * glass
    return hematoxylin, eosin


def _enlarge(layers):
    """Enlarge maps STEP times by linear interpolation, without the outermost cells."""
    share = ((np.arange(STEP) + 0.5) / STEP).astype(np.float32)
    low, high = layers[:, :-1, None], layers[:, 1:, None]
    layers = (low + (high - low) * share[:, None]).reshape(len(layers), -1, layers.shape[2])
    layers = layers[:, STEP // 2 : -STEP // 2]
    low, high = layers[:, :, :-1, None], layers[:, :, 1:, None]
    return (low + (high - low) * share).reshape(*layers.shape[:2], -1)[:, :, STEP // 2 : -STEP // 2]


def _draw_fat(rng, labels, hematoxylin, eosin, bank):
    """Draw fat as large empty vacuoles, with thin membranes halfway between neighboring cell centers."""
    is_fat = labels == DOMAINS.index("fat")
    if not is_fat.any():
        return
    centers = _draw_lattice(rng, eosin.shape, spacing=115, jitter=0.3)
    half = STEP // 2  # half resolution suffices: membranes are several pixels thick
    pixels = np.argwhere(np.repeat(np.repeat(is_fat, half, 0), half, 1))
    distance, nearest = cKDTree(centers).query(pixels * 2.0, k=3)  # (n_pixels, 3)
    gap = distance[:, 1] - distance[:, 0]
    # The second term thickens the corners where three cells meet, which rounds the vacuoles.
    wall = np.exp(-((gap / 4.5) ** 2)) + np.exp(-(((distance[:, 2] - distance[:, 0]) / 13) ** 2))
    soft = ndimage.map_coordinates(is_fat.astype(np.float32), (pixels.T * 2 + 1) / STEP - 0.5, order=1)
    wall = (0.4 * np.minimum(wall, 1.2) * soft).astype(np.float32)  # fades out towards other tissue
    rows, columns = pixels.T * 2
    for i, j in np.ndindex(2, 2):
        eosin[rows + i, columns + j] += wall

    # A few flat nuclei are pressed against the membranes and lie along them.
    on_wall = np.flatnonzero(gap < 2)
    chosen = rng.choice(on_wall, min(len(on_wall), len(pixels) // 2500), replace=False)
    rows, columns = (centers[nearest[chosen, 1]] - centers[nearest[chosen, 0]]).T
    _place(rng, hematoxylin, pixels[chosen] * 2, bank, np.arctan2(rows, columns) + np.pi / 2)


def _draw_holes(rng, labels):
    """Draw small holes in solid tissue, float32 of the labels' shape: 1 where there is glass."""
    share = _map_domains(labels, {"tumor": 0.09, "stroma": 0.04, "immune": 0.05, "necrosis": 0.03})
    return (ndtr(-smooth_noise(rng, labels.shape, 1.3)) < share).astype(np.float32)


def _draw_lattice(rng, shape, spacing, jitter):
    """Draw points on a jittered lattice: random, but never much closer than the spacing."""
    grid = np.stack(np.meshgrid(*(np.arange(0.0, side, spacing) for side in shape), indexing="ij"), -1)
    grid[1::2, :, 1] += spacing / 2  # shift every other row, to avoid straight columns
    points = grid.reshape(-1, 2) + rng.uniform(-jitter, jitter, (grid.size // 2, 2)) * spacing
    return np.clip(points, 0, np.array(shape) - 1)  # (n_points, 2), row and column in pixels


def _find_map_cells(points, labels):
    """Return the row and column of the domain map under each canvas point."""
    return tuple(np.clip(points // STEP, 0, np.array(labels.shape) - 1).astype(int).T)


def _draw_nuclei(rng, length, width, spread, irregular, density, coarse):
    """Draw a bank of nuclei, (N_ANGLES, N_VARIANTS, STAMP, STAMP) of hematoxylin."""
    y, x = np.indices((STAMP, STAMP), dtype=np.float32) - STAMP // 2
    texture = np.tanh(smooth_noise(rng, (PERIOD, PERIOD), 1.5))
    bank = np.empty((N_ANGLES, N_VARIANTS, STAMP, STAMP), np.float32)
    for a, v in np.ndindex(N_ANGLES, N_VARIANTS):
        turn = np.pi * a / N_ANGLES
        scale = np.exp(rng.normal(0, spread, 2) - 0.03) / (2 * PIXEL_UM)
        u = (x * np.cos(turn) + y * np.sin(turn)) / (length * scale[0])
        w = (y * np.cos(turn) - x * np.sin(turn)) / (width * (scale[0] + scale[1]) / 2)
        radius, theta = np.hypot(u, w), np.arctan2(w, u)
        for k in (2, 3, 4):
            radius *= 1 + rng.normal(0, irregular / k) * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
        softness = 1.1 / (width * scale[0])
        body = expit((1 - radius) / (softness / 3))
        row, column = rng.integers(0, PERIOD - STAMP, 2)
        chromatin = 1 + coarse * 0.6 * texture[row : row + STAMP, column : column + STAMP]
        rim = 1 - coarse * 0.55 * np.exp(-((radius / 0.75) ** 2))  # open chromatin is paler in the middle
        bank[a, v] = density * np.exp(rng.normal(0, 0.15)) * body * chromatin * rim
    return bank


def _place(rng, hematoxylin, points, bank, turn):
    """Draw nuclei of one type, turned by about `turn` radians; where two overlap the darker one shows."""
    angles = np.round((turn + rng.normal(0, 0.15, len(points))) / np.pi * N_ANGLES).astype(int) % N_ANGLES
    variants = rng.integers(0, N_VARIANTS, len(points))
    reach = STAMP // 2
    height, width = hematoxylin.shape
    points = points.astype(int)
    inside = ((points >= reach) & (points < np.array([height, width]) - reach)).all(1)
    for row, column, a, v in np.column_stack([points, angles, variants])[inside].tolist():
        window = hematoxylin[row - reach : row + reach + 1, column - reach : column + reach + 1]
        np.maximum(window, bank[a, v], out=window)


def _draw_cells(rng, labels, holes, angle, hematoxylin, banks):
    """Draw every free cell type at its density in each domain, in clumps and not over holes."""
    for name, density in DENSITY.items():
        densest = max(density.values())
        points = _draw_lattice(rng, hematoxylin.shape, 1000 / PIXEL_UM / np.sqrt(densest), jitter=0.42)
        # Jittered by half a map cell, or the borders of the domains would look square.
        cell = _find_map_cells(points + rng.uniform(-STEP / 2, STEP / 2, points.shape), labels)
        clumps = np.exp(0.3 * smooth_noise(rng, labels.shape, 4) + 0.5 * smooth_noise(rng, labels.shape, 1.5) - 0.17)
        crowding = clumps * (1 - holes) * _map_domains(labels, density) / densest
        keep = rng.random(len(points)) < crowding[cell]
        points, cell = points[keep], tuple(axis[keep] for axis in cell)
        turn = angle[cell] if name == "fibroblast" else rng.uniform(0, np.pi, len(points))
        _place(rng, hematoxylin, points, banks[name], turn)


def _draw_glands(rng, labels, hematoxylin, eosin, bank):
    """Draw glands: an empty lumen, a belt of pink cytoplasm and a ring of nuclei in it."""
    centers = _draw_lattice(rng, labels.shape, spacing=150 / STEP, jitter=0.22) * STEP
    centers = centers[labels[_find_map_cells(centers, labels)] == DOMAINS.index("gland")]
    reach = 80
    y, x = np.indices((2 * reach + 1, 2 * reach + 1), dtype=np.float32) - reach
    for row, column in centers.astype(int).tolist():
        if not (reach <= row < eosin.shape[0] - reach and reach <= column < eosin.shape[1] - reach):
            continue
        lumen, belt = rng.uniform(16, 34), rng.uniform(24, 30)  # pixels
        k = np.arange(2, 5)
        wobble, phase = rng.normal(0, 0.16, 3) / k * 2, rng.uniform(0, 2 * np.pi, 3)

        def outline(theta, k=k, wobble=wobble, phase=phase):
            return 1 + (wobble * np.cos(theta[..., None] * k + phase)).sum(-1)

        radius = np.hypot(y, x) / outline(np.arctan2(y, x)).astype(np.float32)
        empty = expit((lumen - radius) / 1.2)
        whole = expit((lumen + belt - radius) / 1.5)
        window = np.s_[row - reach : row + reach + 1, column - reach : column + reach + 1]
        eosin[window] = (eosin[window] * (1 - whole) + 0.42 * whole) * (1 - 0.95 * empty)
        hematoxylin[window] = (hematoxylin[window] * (1 - whole) + 0.14 * whole) * (1 - 0.98 * empty)
        for layer, spacing in ((0.42, 14), (0.8, 16)):  # luminal cells, then the outer row
            distance = lumen + belt * layer
            theta = np.arange(0, 2 * np.pi, spacing / distance) + rng.uniform(0, 2 * np.pi)
            theta += rng.normal(0, 0.06, len(theta))
            far = distance * outline(theta) + rng.normal(0, 1.2, len(theta))
            points = np.stack([row + far * np.sin(theta), column + far * np.cos(theta)], 1)
            _place(rng, hematoxylin, points, bank, theta if layer < 0.6 else theta + np.pi / 2)


def _convert_to_rgb(hematoxylin, eosin, stain):
    """Return the RGB image of two stains in optical density, uint8 (height, width, 3)."""
    for canvas in (hematoxylin, eosin):  # blur of the microscope
        ndimage.gaussian_filter(canvas, stain["blur"], output=canvas, truncate=3)
    dyes = (stain["gamma"] * stain["strength"][:, None] * stain["vectors"]).astype(np.float32)  # (2, 3)
    white = stain["white"].astype(np.float32)
    rgb = np.empty((*eosin.shape, 3), np.uint8)
    for h, e, out in zip(hematoxylin, eosin, rgb, strict=True):  # by row, to stay in the processor's cache
        e = e * (1 - 0.45 * np.minimum(h, 1))  # nuclei hold little eosin
        out[:] = np.rint(white * np.exp(-(h[:, None] * dyes[0] + e[:, None] * dyes[1])))
    return rgb
