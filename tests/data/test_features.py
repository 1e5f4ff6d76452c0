"""Features made elsewhere are joined to spots by barcode or position, and files that do not fit are refused."""

import logging

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import peka_lite as pk

D = 5


@pytest.fixture(scope="module")
def cohort(mini_cohort):
    return mini_cohort


@pytest.fixture(scope="module")
def one(cohort):
    """Return the cohort's first slide as a cohort."""
    return cohort.select(cohort.rows_of(cohort.slides[0].id), reason="of other slides")


@pytest.fixture
def X(cohort):
    return np.random.default_rng(0).normal(size=(len(cohort), D)).astype(np.float32)


def barcodes_of(cohort):
    return cohort.obs["barcode"].to_list()


def centers_of(cohort):
    return np.concatenate([slide.adata.obsm["spatial"][:, :2] for slide in cohort.slides])


def write_h5(path, *, attributes=None, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
        for name, value in (attributes or {}).items():
            file["coords"].attrs[name] = value
    return path


def write_npy(path, X, barcodes):
    np.save(path, X)
    path.with_suffix(".barcodes.txt").write_text("".join(f"{barcode}\n" for barcode in barcodes))
    return path


def write_h5ad(path, X, barcodes, slides=None, **obsm):
    obs = pd.DataFrame({"slide": slides} if slides is not None else {}, index=[str(i) for i in range(len(barcodes))])
    obs["barcode"] = list(barcodes)
    ad.AnnData(X, obs=obs, obsm=obsm).write_h5ad(path)
    return path


def write_folder(folder, cohort, X, end):
    """Write one file per slide, its rows in reverse."""
    for slide in cohort.slides:
        rows = cohort.rows_of(slide.id)[::-1]
        barcodes = cohort.obs["barcode"].to_numpy()[rows].tolist()
        path = folder / f"{slide.id}{end}"
        if end == ".h5":
            write_h5(path, embeddings=X[rows], barcodes=np.array(barcodes, dtype="S")[:, None])
        elif end == ".h5ad":
            write_h5ad(path, X[rows], barcodes)
        else:
            write_npy(path, X[rows], barcodes)
    return folder


@pytest.mark.parametrize("end", [".h5", ".h5ad", ".npy"])
def test_a_folder_with_one_file_per_slide_is_joined_by_barcode(tmp_path, cohort, X, end, caplog):
    caplog.set_level(logging.INFO, "peka_lite")
    same, read = pk.data.read_features(write_folder(tmp_path, cohort, X, end), cohort)
    assert same is cohort
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, X)
    assert len(caplog.messages) == len(cohort.slides)
    assert f"{cohort.slides[0].n_spots} spots joined by barcode" in caplog.messages[0]


def test_what_embed_writes_is_read_for_all_slides(tmp_path, cohort):
    written = pk.experiments.write_features(cohort, tmp_path / "features.h5ad", pk.load_backbone("mini"))
    reverse = cohort.select(np.arange(len(cohort)) % 2 == 0, reason="odd")
    same, read = pk.data.read_features(tmp_path / "features.h5ad", reverse)
    assert same is reverse
    np.testing.assert_array_equal(read, written.X[::2])


def test_an_entry_of_obsm_is_read(tmp_path, cohort, X):
    slides = cohort.obs["slide"].to_list()
    path = write_h5ad(tmp_path / "all.h5ad", np.zeros((len(X), 1), "f4"), barcodes_of(cohort), slides, uni=X)
    np.testing.assert_array_equal(pk.data.read_features(path, cohort, key="uni")[1], X)


def test_names_of_rows_are_barcodes_without_a_column(tmp_path, one, X):
    ad.AnnData(X[: len(one)], obs=pd.DataFrame(index=barcodes_of(one))).write_h5ad(tmp_path / "own.h5ad")
    np.testing.assert_array_equal(pk.data.read_features(tmp_path / "own.h5ad", one)[1], X[: len(one)])


@pytest.mark.parametrize("dtype", ["f2", "f8", "i4"])
def test_other_numbers_become_float32(tmp_path, one, dtype):
    values = np.arange(len(one) * D).reshape(-1, D).astype(dtype)
    path = write_h5(tmp_path / "a.h5", features=values[None], barcode=barcodes_of(one))
    read = pk.data.read_features(path, one)[1]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values)


def test_rows_of_other_spots_are_ignored(tmp_path, one, X):
    values = np.vstack([X[:1], X[: len(one)]])
    path = write_npy(tmp_path / "a.npy", values, ["elsewhere", *barcodes_of(one)])
    np.testing.assert_array_equal(pk.data.read_features(path, one)[1], X[: len(one)])


def test_missing_spots_are_named(tmp_path, cohort, X):
    folder = write_folder(tmp_path, cohort, X, ".npy")
    slide = cohort.slides[1]
    names = slide.adata.obs_names.tolist()
    write_npy(folder / f"{slide.id}.npy", X[: len(names) - 4], names[4:])
    expected = (
        rf"{slide.id}\.npy: no features for 4 of {len(names)} spots of {slide.id} \({', '.join(names[:3])}, \.\.\.\)"
    )
    with pytest.raises(ValueError, match=expected):
        pk.data.read_features(folder, cohort)


def test_a_slide_that_the_table_lacks_is_named(tmp_path, cohort, X):
    slides = cohort.obs["slide"].replace(cohort.slides[2].id, "OTHER").to_list()
    path = write_h5ad(tmp_path / "all.h5ad", X, barcodes_of(cohort), slides)
    with pytest.raises(ValueError, match=rf"no features for (\d+) of \1 spots of {cohort.slides[2].id} .* are none"):
        pk.data.read_features(path, cohort)


def test_a_barcode_with_two_rows_is_refused(tmp_path, one, X):
    barcodes = barcodes_of(one)
    path = write_h5(tmp_path / "a.h5", embeddings=X[: len(one) + 1], barcodes=[*barcodes, barcodes[3]])
    with pytest.raises(ValueError, match=rf"a\.h5: barcodes of MINI1 come twice \({barcodes[3]}\)"):
        pk.data.read_features(path, one)


def test_slides_without_a_file_and_with_two_are_refused(tmp_path, cohort, X):
    folder = write_folder(tmp_path, cohort, X, ".h5")
    last = cohort.slides[-1].id
    (folder / f"{last}.h5").rename(folder / "else.h5")
    with pytest.raises(FileNotFoundError, match=rf"no file for 1 of {len(cohort.slides)} slides \({last}\)"):
        pk.data.read_features(folder, cohort)
    (folder / "else.h5").rename(folder / f"{last}.h5")
    write_npy(folder / f"{last}.npy", X, barcodes_of(cohort))
    with pytest.raises(ValueError, match=rf"has {last}\.h5 and {last}\.npy; keep one file per slide"):
        pk.data.read_features(folder, cohort)


def test_slides_with_other_widths_are_refused(tmp_path, cohort, X):
    folder = write_folder(tmp_path, cohort, X, ".npy")
    slide = cohort.slides[1]
    write_npy(folder / f"{slide.id}.npy", np.ones((slide.n_spots, D + 1)), slide.adata.obs_names)
    with pytest.raises(ValueError, match=rf"{slide.id}\.npy: has 6 features per row, {cohort.slides[0].id} has 5"):
        pk.data.read_features(folder, cohort)


def test_a_file_without_slides_is_refused_for_several(tmp_path, cohort, X):
    path = write_h5(tmp_path / "a.h5", embeddings=X, barcodes=barcodes_of(cohort))
    with pytest.raises(ValueError, match=r"a\.h5: does not say which of 4 slides"):
        pk.data.read_features(path, cohort)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"embeddings": None, "tokens": np.ones(3)},
            r"has the datasets barcodes, tokens; .*'embeddings' or 'features'",
        ),
        ({"barcodes": None}, "has the datasets embeddings; .*'barcodes' or 'coords'"),
        ({"embeddings": lambda X: X[:, 0]}, r"embeddings is float32 \(\d+,\); features must be numbers \(n, D\)"),
        ({"embeddings": lambda X: X[:, None]}, r"embeddings is float32 \(\d+, 1, 5\)"),
        ({"embeddings": lambda X: X[:, :0]}, r"embeddings is float32 \(\d+, 0\)"),
        ({"embeddings": lambda X: X.astype("S4")}, r"embeddings is \|S4"),
        ({"embeddings": lambda X: X.astype("c8")}, "'/embeddings' holds neither numbers nor text"),
        (
            {"embeddings": lambda X: X * np.where(np.arange(len(X)) < 2, np.nan, 1)[:, None]},
            "embeddings is not finite in 2 of",
        ),
        ({"embeddings": lambda X: X.astype(float) + 1e300}, "embeddings is not finite in"),
        ({"embeddings": lambda X: X[1:]}, r"(\d+) barcodes for \d+ rows of features"),
        ({"barcodes": lambda names: np.array([b"\xff" * 3] * len(names))}, "cannot be read .*utf-8"),
    ],
)
def test_h5_files_that_do_not_fit_are_refused(tmp_path, one, X, change, message):
    datasets = {"embeddings": X[: len(one)], "barcodes": barcodes_of(one)}
    for name, value in change.items():
        datasets[name] = value(datasets[name]) if callable(value) else value
    path = write_h5(tmp_path / "a.h5", **{name: values for name, values in datasets.items() if values is not None})
    with pytest.raises(ValueError, match=rf"a\.h5: {message}"):
        pk.data.read_features(path, one)


def test_h5ad_files_that_do_not_fit_are_refused(tmp_path, one, X):
    counts = sparse.csr_matrix(np.ones((len(one), 3), "f4"))
    path = write_h5ad(tmp_path / "a.h5ad", counts, barcodes_of(one), uni=X[: len(one)])
    with pytest.raises(ValueError, match=r"a\.h5ad: needs obs, and a dense array in X; key= .* obsm, which has uni"):
        pk.data.read_features(path, one)
    with pytest.raises(ValueError, match=r"dense array in obsm\['conch'\]; .* which has uni"):
        pk.data.read_features(path, one, key="conch")
    with pytest.raises(ValueError, match=r"a\.npy: key names an entry of obsm"):
        pk.data.read_features(write_npy(tmp_path / "a.npy", X, barcodes_of(one)), one, key="uni")


def test_npy_files_that_do_not_fit_are_refused(tmp_path, one, X):
    path = tmp_path / "a.npy"
    np.save(path, X[: len(one)])
    with pytest.raises(ValueError, match=r"a\.barcodes\.txt: is missing"):
        pk.data.read_features(path, one)
    write_npy(path, X[: len(one)], barcodes_of(one)[1:])
    with pytest.raises(ValueError, match=rf"{len(one) - 1} barcodes for {len(one)} rows"):
        pk.data.read_features(path, one)
    np.save(path, np.array([{"pickled": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy: cannot be read as \.npy"):
        pk.data.read_features(path, one)
    np.savez(tmp_path / "b", X=X)
    (tmp_path / "b.npz").rename(path)
    with pytest.raises(ValueError, match=r"a\.npy: "):
        pk.data.read_features(path, one)


@pytest.mark.parametrize("end", [".h5", ".h5ad", ".npy"])
def test_truncated_files_are_refused(tmp_path, one, X, end):
    path = write_folder(tmp_path, one, X, end) / f"{one.slides[0].id}{end}"
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"MINI1\{end}: cannot be read"):
            pk.data.read_features(path, one)


def test_other_paths_are_refused(tmp_path, one):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        pk.data.read_features(tmp_path / "nowhere", one)
    (tmp_path / "a.pt").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"a\.pt: features are read from \.h5, \.h5ad, \.npy"):
        pk.data.read_features(tmp_path / "a.pt", one)


def tile_grid(cohort, size, *, shift=(0, 0), step=None):
    """Return upper left corners (n, 2) of a grid of tiles over all spots of a one-slide cohort."""
    centers, step = centers_of(cohort), step or size
    axes = (np.arange(low - size, high + size, step) for low, high in zip(centers.min(0), centers.max(0), strict=True))
    return np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2) + np.asarray(shift)


def expect_rows(corners, size, cohort):
    """Return the row of the tile nearest to each spot along both axes, and the distance, by comparing all pairs."""
    away = np.abs((corners + size / 2)[None] - centers_of(cohort)[:, None]).max(-1)
    return away.argmin(1), away.min(1)


@pytest.mark.parametrize(
    "attributes",
    [
        {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20},
        {"patch_size": 256, "level0_magnification": 40, "target_magnification": 20, "patch_size_level0": "None"},
        {"patch_size": 128, "patch_level": 1, "downsample": (4.0, 4.0)},
        {"patch_size": 512, "patch_level": 0, "downsample": 1.0},
        {"patch_size": 512},
        {"patch_size": 128, "patch_level": 1},  # not enough: from the distance between tiles
        {},
    ],
)
@pytest.mark.parametrize("shift", [(3, 7), (103, -41)])
def test_a_spot_gets_the_tile_that_contains_it(tmp_path, one, attributes, shift, caplog):
    caplog.set_level(logging.INFO, "peka_lite")
    corners = np.vstack([tile_grid(one, 512, shift=shift), [[-9000, -9000]]]).astype(np.int64)  # the last one is apart
    X = np.random.default_rng(1).normal(size=(len(corners), D)).astype("f2")
    path = write_h5(tmp_path / "MINI1.h5", features=X[None], coords=corners, attributes=attributes)
    same, read = pk.data.read_features(path, one)
    rows, away = expect_rows(corners, 512, one)
    assert same is one
    assert away.max() <= 256
    np.testing.assert_array_equal(read, X[rows].astype("f4"))
    distance = np.linalg.norm((corners + 256)[rows] - centers_of(one), axis=1)
    um = f"at most {distance.max():.1f} px ({distance.max() / 2:.1f} um)"
    assert (
        f"{len(one)} of {len(one)} spots of MINI1 (100.0%) lie in a tile, {np.median(distance):.1f} px" in caplog.text
    )
    assert um in caplog.text
    guessed = "coords do not give the size of tiles: taken as their distance, 512 px" in caplog.text
    assert guessed == (attributes.get("downsample") is None and attributes.get("patch_size", 128) == 128)


def test_the_nearest_of_overlapping_tiles_is_taken(tmp_path, one):
    corners = tile_grid(one, 400, step=150)
    X = np.arange(len(corners) * 2.0).reshape(-1, 2)
    path = write_h5(tmp_path / "a.h5", features=X, coords=corners, attributes={"patch_size_level0": 400})
    np.testing.assert_array_equal(pk.data.read_features(path, one)[1], X[expect_rows(corners, 400, one)[0]])


@pytest.mark.parametrize(("offset", "n_left"), [(112, 20), (112.5, 19)])
def test_a_spot_on_the_edge_of_a_tile_is_in_it(tmp_path, one, offset, n_left):
    one = one.select(np.arange(20), reason="others")
    corners = np.round(centers_of(one)) - 112
    one.slides[0].adata.obsm["spatial"] = corners + 112
    corners[0] += np.array([offset, -offset])
    path = write_h5(tmp_path / "a.h5", features=np.eye(20), coords=corners, attributes={"patch_size_level0": 224})
    rest, X = pk.data.read_features(path, one)
    assert len(rest) == len(X) == n_left
    assert (rest is one) == (n_left == 20)
    np.testing.assert_array_equal(X, np.eye(20)[20 - n_left :])


@pytest.mark.parametrize(("n_tiles", "accepted"), [(18, True), (17, False)])
def test_nine_tenths_of_the_spots_of_a_slide_need_a_tile(tmp_path, one, n_tiles, accepted):
    one = one.select(np.arange(20), reason="others")
    corners = (centers_of(one) - 30)[::-1][:n_tiles]
    path = write_h5(tmp_path / "a.h5", features=np.eye(20)[:n_tiles], coords=corners, attributes={"patch_size": 60})
    if not accepted:
        with pytest.raises(ValueError, match=r"a\.h5: only 17 of 20 spots of MINI1 \(85\.0%\) lie in a tile of 60 px"):
            pk.data.read_features(path, one)
        return
    rest, X = pk.data.read_features(path, one)
    assert rest.obs["barcode"].tolist() == barcodes_of(one)[2:]
    assert rest.slides[0].dropped["outside every tile with features"] == 2
    np.testing.assert_array_equal(X, np.eye(20, dtype="f4")[:18][::-1])


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (lambda c: c[1:], r"coords are float64 \(\d+, 2\) for \d+ rows"),
        (lambda c: c[:, :1], r"coords are float64 \(\d+, 1\)"),
        (lambda c: np.where(np.arange(len(c))[:, None] == 1, np.inf, c), "coords are .*must be finite corners"),
        (lambda c: c.astype("S9"), r"coords are \|S9"),
        (lambda c: np.vstack([c[1:], c[1]]), "1 coords are those of another row"),
        (lambda c: c / 4, r"only 0 of .* \(0\.0%\) lie in a tile .*pixels of the image"),
    ],
)
def test_positions_that_do_not_fit_are_refused(tmp_path, one, coords, message):
    corners = centers_of(one) - 112 + 1e4
    one = one.select(np.arange(len(one)), reason="")
    one.slides[0].adata.obsm["spatial"] = corners + 112
    path = write_h5(
        tmp_path / "a.h5", features=np.eye(len(one)), coords=coords(corners), attributes={"patch_size": 224}
    )
    with pytest.raises(ValueError, match=rf"a\.h5: {message}"):
        pk.data.read_features(path, one)


def test_one_tile_without_a_size_is_refused(tmp_path, one):
    path = write_h5(tmp_path / "a.h5", features=np.ones((1, D)), coords=[[0, 0]])
    with pytest.raises(ValueError, match=r"a\.h5: coords do not give the size of tiles; set .*patch_size_level0"):
        pk.data.read_features(path, one)


def test_real_tiles_are_joined_by_position_as_by_barcode(tmp_path, her2st, caplog):
    caplog.set_level(logging.INFO, "peka_lite")
    ids = ["HER2_C2", "HER2_C3", "HER2_A1"]
    cohort = pk.open_cohort(her2st, slides=ids, min_genes=0)
    for name in ("barcode", "place"):
        (tmp_path / name).mkdir()
    for slide in ids:
        with h5py.File(her2st / "patches" / f"{slide}.h5") as file:
            tiles = {"features": file["img"][:].mean((1, 2)), "coords": file["coords"][:]}
            size, barcodes = file["coords"].attrs["patch_size_src"], file["barcode"][:]
        write_h5(tmp_path / "barcode" / f"{slide}.h5", embeddings=tiles["features"], barcodes=barcodes)
        write_h5(tmp_path / "place" / f"{slide}.h5", **tiles, attributes={"patch_size_src": size})
    by_barcode, X = pk.data.read_features(tmp_path / "barcode", cohort)
    by_place, same = pk.data.read_features(tmp_path / "place", cohort)
    assert by_barcode is by_place is cohort
    assert X.shape == (len(cohort), 3)
    np.testing.assert_array_equal(X, same)
    assert [float(text.split("lie in a tile, ")[1].split(" px")[0]) < 1 for text in caplog.messages[3:]] == [True] * 3
