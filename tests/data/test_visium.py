"""Custom slides: tiles are cut at their spots, invalid input raises an error, failed writes leave nothing behind."""

import gzip
import json
import re

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from scipy import sparse

import peka_lite as pk
from peka_lite.data import HestFormatError, SlideError, add_slide, read_counts, spot_distance, visium

SIDE = 700  # um, side of the image


def picture(mpp):
    """Return an image whose colors encode the position: red grows to the right, green downwards."""
    n = round(SIDE / mpp)
    position = (np.arange(n) + 0.5) * mpp / SIDE
    x, y = np.broadcast_arrays(position[None, :], position[:, None])
    return np.rint(255 * np.stack([x, y, 0.5 + 0 * x], axis=-1)).astype(np.uint8)


def save(path, image, *, mpp=None, tile=(256, 256)):
    options = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
    tifffile.imwrite(path, image, photometric="rgb", tile=tile, compression="zlib", metadata=None, **options)
    return path


def sample(mpp, *, first=100.0, genes=8, side=5):
    """Return counts on Visium's grid as readers do: centers in pixels, float64, x first."""
    row, col = np.mgrid[:side, : 2 * side]
    row, col = (a[(row + col) % 2 == 0] for a in (row, col))
    um = np.column_stack([first + 50 * col, first + 50 * np.sqrt(3) * row])  # (N, 2)
    n = len(um)
    X = sparse.csr_matrix(np.random.default_rng(0).poisson(3, (n, genes)))  # int64
    obs = pd.DataFrame({"in_tissue": 1, "array_row": row, "array_col": col}, index=[f"SPOT{i}-1" for i in range(n)])
    return ad.AnnData(X, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(genes)]), obsm={"spatial": um / mpp})


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return save(tmp_path_factory.mktemp("image") / "full.tif", picture(0.5), mpp=0.5)


@pytest.mark.parametrize("mpp", [0.5, 0.25, 0.3712])
def test_tiles_are_centered_on_their_spots(tmp_path, mpp):
    counts = sample(mpp)
    slide = add_slide(tmp_path / "c", "S1", counts, save(tmp_path / "a.tif", picture(mpp), mpp=mpp), patient="P 1")
    assert slide.dropped == {}
    assert list(slide.adata.obs_names) == list(counts.obs_names)
    tiles = slide.tiles[:]
    assert tiles.shape == (counts.n_obs, 224, 224, 3)
    um = counts.obsm["spatial"] * mpp  # (N, 2)
    np.testing.assert_allclose(tiles[..., :2].mean((1, 2)), 255 * um / SIDE, atol=0.5)
    # A tile spans 112 um.
    span = tiles[:, :, -1, 0].mean(1) - tiles[:, :, 0, 0].mean(1)
    np.testing.assert_allclose(span, 255 * 111.5 / SIDE, atol=1)
    with h5py.File(tmp_path / "c" / "patches" / "S1.h5") as file:
        np.testing.assert_allclose(file["coords"][:], counts.obsm["spatial"] - 56 / mpp, atol=0.51)
        assert file["img"].attrs["pixel_size"] == pytest.approx(mpp, rel=1e-4)


def test_added_slides_have_hests_layout_and_load_as_a_cohort(tmp_path, image):
    counts = sample(0.5)
    counts.layers["other"] = counts.X.copy()
    add_slide(tmp_path, "B", counts, image, patient="P2")
    add_slide(tmp_path, "A", counts, image, patient=" P1 ", metadata={"organ": "Breast"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metadata", "patches", "st"]
    cohort = pk.read_cohort(tmp_path)
    assert [(s.id, s.patient) for s in cohort.slides] == [("A", "P1"), ("B", "P2")]
    st = ad.read_h5ad(tmp_path / "st" / "A.h5ad")
    assert (st.X.dtype, st.X.format) == (np.float32, "csr")
    assert not set(st.layers) - {None}  # newer anndata lists X among the layers as None
    assert (st.X.toarray() == counts.X.toarray()).all()
    assert list(st.obs) == ["in_tissue", "array_row", "array_col"]
    metadata = json.loads((tmp_path / "metadata" / "A.json").read_text())
    assert metadata["organ"] == "Breast"
    assert metadata["inter_spot_dist"] == pytest.approx(100, rel=1e-3)
    assert metadata["pixel_size_um_embedded"] == pytest.approx(0.5, rel=1e-3)
    assert counts.X.dtype == np.int64  # the input is unchanged
    library = st.uns["spatial"]["ST"]
    scale = library["scalefactors"]["tissue_downscaled_fullres_scalef"]
    small = library["images"]["downscaled_fullres"]
    assert max(small.shape) == 1000
    x, y = (st.obsm["spatial"] * scale).astype(int).T
    np.testing.assert_allclose(small[y, x, :2], 255 * st.obsm["spatial"] * 0.5 / SIDE, atol=2)
    assert library["scalefactors"]["spot_diameter_fullres"] == pytest.approx(110, rel=1e-3)
    fig = pk.expression_map(st, np.arange(st.n_obs), np.arange(st.n_obs), gene="G0")
    assert len(fig.axes) >= 3


def test_dropped_counts_spots_off_tissue_and_without_tile(tmp_path, image):
    counts = sample(0.5, first=20)  # the first column and row are within 56 um of the edge
    counts.obs.loc[counts.obs_names[-3:], "in_tissue"] = 0
    um = counts.obsm["spatial"][:-3] * 0.5
    slide = add_slide(tmp_path, "S", counts, image)
    n_edge = int((um < 56).any(1).sum())
    assert n_edge > 3
    assert slide.dropped == {"spots without a tile": n_edge, "spots off the tissue": 3}
    assert slide.n_spots == counts.n_obs - 3 - n_edge
    assert slide.patient is None


@pytest.mark.parametrize("kind", ["png", "jpg", "strips.tif", "no-tags.tif"])
def test_plain_images_give_the_same_tiles(tmp_path, kind, image):
    pixels, path = picture(0.5), tmp_path / f"plain.{kind}"
    if kind == "png":
        Image.fromarray(pixels).save(path, dpi=(50800, 50800))
    elif kind == "jpg":
        Image.fromarray(pixels).save(path, quality=95)
    else:
        save(path, pixels, tile=None, mpp=0.5 if kind == "strips.tif" else None)
    options = {"mpp": 0.5} if kind in ("jpg", "no-tags.tif") else {}
    plain = add_slide(tmp_path / "c", "plain", sample(0.5), path, **options)
    tiled = add_slide(tmp_path / "c", "tiled", sample(0.5), image)
    difference = np.abs(plain.tiles[:].astype(int) - tiled.tiles[:])
    assert difference.max() <= (6 if kind == "jpg" else 1)


def test_mpp_visium_derives_resolution_from_spots(tmp_path):
    path = save(tmp_path / "a.tif", picture(0.4))
    counts = sample(0.4)
    with pytest.raises(SlideError, match=r"a\.tif: the file has no resolution metadata\. .*'visium' derives them"):
        add_slide(tmp_path / "c", "S", counts, path)
    assert not (tmp_path / "c").exists()
    counts.obsm["spatial"] = counts.obsm["spatial"].round()
    by_spots = add_slide(tmp_path / "c", "S", counts, path, mpp="visium")
    assert by_spots.metadata["pixel_size_um"] == pytest.approx(0.4, rel=3e-3)
    assert by_spots.metadata["pixel_size_um_embedded"] is None
    with pytest.raises(ValueError, match="mpp must be microns per pixel, 'visium' or None, not 'auto'"):
        add_slide(tmp_path / "c", "T", counts, path, mpp="auto")
    with pytest.raises(ValueError, match="needs two spots"):
        add_slide(tmp_path / "c", "T", counts[:1], path, mpp="visium")


def test_spot_distance_is_robust_to_gaps_and_rounding():
    centers = sample(0.5).obsm["spatial"].round()
    keep = np.random.default_rng(0).random(len(centers)) < 0.6
    assert spot_distance(centers[keep]) == pytest.approx(200, rel=0.005)


def corrupt(counts, how):
    counts = counts.copy()
    if how == "normalized":
        counts.layers["counts"] = counts.X.copy()
        counts.X = counts.X.astype(float) / 3
    elif how == "negative":
        counts.X = counts.X - 5 * sparse.csr_matrix(np.ones(counts.shape))
    elif how == "no spatial":
        del counts.obsm["spatial"]
    elif how == "nan":
        counts.obsm["spatial"][0] = np.nan
    elif how == "twice":
        counts.obs_names = ["SAME-1", "SAME-1", *counts.obs_names[2:]]
    elif how == "off":
        counts.obs["in_tissue"] = 0
    elif how == "beyond":
        counts.obsm["spatial"] = counts.obsm["spatial"] * 4
    elif how == "too close":
        counts.obsm["spatial"] = 700 + counts.obsm["spatial"] / 4
    elif how == "edge":
        counts = counts[:2]
        counts.obsm["spatial"][:] = [[10.0, 10.0], [210.0, 10.0]]
    return counts


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("normalized", r"counts of S: X holds non-integer counts.*neither normalized.*layers\['counts'\]"),
        ("negative", "X holds negative counts"),
        ("no spatial", r"obsm\['spatial'\] is missing.*squidpy.read.visium"),
        ("nan", "missing, not finite"),
        ("twice", "'SAME-1' is duplicated in obs_names"),
        ("off", "no spot is on the tissue"),
        ("beyond", r"centers are outside full\.tif, 1400 x 1400 px.*the input image of Space Ranger"),
        ("too close", r"spots are 25 um apart at 0\.5 um/px, Visium's 100 um.*'visium' as mpp derives 2 um/px"),
        ("edge", r"full\.tif: none of 2 tiles"),
    ],
)
def test_invalid_counts_raise_and_write_nothing(tmp_path, image, how, words):
    with pytest.raises(HestFormatError, match=words):
        add_slide(tmp_path / "new", "S", corrupt(sample(0.5), how), image)
    assert not (tmp_path / "new").exists()


def test_pitch_is_checked_for_visium_only(tmp_path, image):
    slide = add_slide(tmp_path, "S", corrupt(sample(0.5), "too close"), image, technology="Xenium", spot_um=20)
    assert slide.metadata["st_technology"] == "Xenium"
    assert slide.metadata["pixel_size_um_estimated"] is None


def test_existing_slide_is_not_overwritten(tmp_path, image):
    add_slide(tmp_path, "S", sample(0.5), image)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match=r"S\.h5 is there already; choose another id"):
        add_slide(tmp_path, "S", sample(0.5), image)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_slide_id_must_be_a_file_name(tmp_path, image, name):
    with pytest.raises(ValueError, match="is not a slide id"):
        add_slide(tmp_path, name, sample(0.5), image)


def test_embedded_cohort_cannot_be_extended(mini_root, image):
    for root in (mini_root, "mini"):
        with pytest.raises(ValueError, match="embedded cohort"):
            add_slide(root, "S", sample(0.5), image)


@pytest.mark.parametrize("step", ["tiles", "h5ad", "move"])
def test_failed_write_leaves_no_files(tmp_path, image, monkeypatch, step):
    def fail(*_, **__):
        raise OSError("disk full")

    add_slide(tmp_path / "c", "OLD", sample(0.5), image)
    before = sorted((tmp_path / "c").rglob("*"))
    if step == "tiles":
        monkeypatch.setattr(visium.WholeSlide, "read_around", fail)
    elif step == "h5ad":
        monkeypatch.setattr(visium, "write_h5ad", fail)
    else:
        done, replace = [], visium.os.replace
        monkeypatch.setattr(
            visium.os, "replace", lambda a, b: fail() if len(done) == 2 else (done.append(b), replace(a, b))
        )
    for folder in ("c", "new"):
        with pytest.raises(OSError, match="disk full"):
            add_slide(tmp_path / folder, "S", sample(0.5), image)
        if step == "move":
            done.clear()
    assert sorted((tmp_path / "c").rglob("*")) == before
    assert not (tmp_path / "new").exists()


def write_outs(folder, counts):
    """Write Space Ranger's outs folder (version 2): HDF5 counts, positions, scale factors and two images."""
    (folder / "spatial").mkdir(parents=True)
    X = sparse.csc_matrix(counts.X.T)
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        file.attrs["library_ids"], file.attrs["chemistry_description"] = [b"lib"], "Spatial 3' v1"
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array(counts.obs_names, dtype="S")
        matrix["data"], matrix["indices"], matrix["indptr"] = X.data.astype(np.int32), X.indices, X.indptr
        matrix["shape"] = np.array(X.shape)
        names = np.array(counts.var_names, dtype="S")
        features = matrix.create_group("features")
        features["id"], features["name"] = names, names
        features["feature_type"] = np.array([b"Gene Expression"] * len(names))
        features["genome"] = np.array([b"GRCh38"] * len(names))
        features["_all_tag_keys"] = np.array([b"genome"])
    positions = counts.obs.assign(
        pxl_row_in_fullres=counts.obsm["spatial"][:, 1], pxl_col_in_fullres=counts.obsm["spatial"][:, 0]
    )
    positions.rename_axis("barcode").to_csv(folder / "spatial" / "tissue_positions.csv")
    factors = {"tissue_hires_scalef": 0.1, "tissue_lowres_scalef": 0.05, "spot_diameter_fullres": 130.0}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
    for name in ("hires", "lowres"):
        Image.fromarray(picture(5.0)).save(folder / "spatial" / f"tissue_{name}_image.png")
    return folder


def test_outs_folder_and_h5ad_give_the_same_slide(tmp_path, image):
    counts = sample(0.5)
    outs = write_outs(tmp_path / "run" / "outs", counts)
    counts.write_h5ad(tmp_path / "counts.h5ad")
    slides = [
        add_slide(tmp_path / "c", f"S{i}", read_counts(path), image)
        for i, path in enumerate([outs, outs.parent, tmp_path / "counts.h5ad"])
    ]
    for slide in slides:
        np.testing.assert_allclose(slide.adata.obsm["spatial"], counts.obsm["spatial"])
        assert (slide.tiles[:] == slides[0].tiles[:]).all()
        assert (slide.adata.X.toarray() == counts.X.toarray()).all()
    with pytest.raises(FileNotFoundError, match=re.escape("neither an .h5ad file nor Space Ranger's outs folder")):
        read_counts(tmp_path / "c")


def test_positions_written_by_pandas_are_read(tmp_path):
    counts = sample(0.5)
    counts.obs.loc[counts.obs_names[-3:], "in_tissue"] = 0
    counts.obs["in_tissue"] = counts.obs["in_tissue"].astype(bool)  # True and False in the table
    read = read_counts(write_outs(tmp_path / "outs", counts))
    assert (read.obs["in_tissue"] == counts.obs["in_tissue"]).all()


def edit(outs, how):
    """Change Space Ranger's folder to another version's, or remove files and fields that are optional."""
    h5 = outs / "filtered_feature_bc_matrix.h5"
    with h5py.File(h5, "a") as file:
        features = file["matrix/features"]
        if how == "no attributes":
            for name in list(file.attrs):
                del file.attrs[name]
        elif how == "no optional fields":
            for name in ("feature_type", "genome", "_all_tag_keys"):
                del features[name]
        elif how == "other fields":
            features.create_group("target_sets")["probes"] = np.arange(3)
            features["pattern"] = np.array([b""] * 8)
        elif how == "antibodies":
            matrix = file["matrix"]
            kinds = np.array([b"Gene Expression"] * 4 + [b"Antibody Capture"] * 4)
            del features["feature_type"]
            features["feature_type"] = kinds
            assert matrix["shape"][0] == len(kinds)
    if how == "no pictures":
        for path in (outs / "spatial").iterdir():
            if path.suffix != ".csv":
                path.unlink()
    elif how == "no header":
        table = outs / "spatial" / "tissue_positions.csv"
        (outs / "spatial" / "tissue_positions_list.csv").write_text(table.read_text().partition("\n")[2])
        table.unlink()
    elif how == "matrix market":
        from scipy.io import mmwrite

        counts = read_counts(outs)
        folder = outs / "filtered_feature_bc_matrix"
        folder.mkdir()
        h5.unlink()
        with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
            mmwrite(file, counts.X.T)
        tables = {"barcodes": counts.obs_names, "features": [f"{g}\t{g}\tGene Expression" for g in counts.var_names]}
        for name, lines in tables.items():
            with gzip.open(folder / f"{name}.tsv.gz", "wt") as file:
                file.write("\n".join(lines) + "\n")


VARIANTS = [
    "no attributes",
    "no optional fields",
    "other fields",
    "antibodies",
    "no pictures",
    "no header",
    "matrix market",
]


@pytest.mark.parametrize("how", VARIANTS)
def test_outs_folder_is_read_without_optional_parts(tmp_path, how):
    counts = sample(0.5)
    outs = write_outs(tmp_path / "outs", counts)
    edit(outs, how)
    read = read_counts(outs)
    expected = counts[:, :4] if how == "antibodies" else counts
    assert (list(read.obs_names), list(read.var_names)) == (list(expected.obs_names), list(expected.var_names))
    assert (read.X.toarray() == expected.X.toarray()).all()
    np.testing.assert_allclose(read.obsm["spatial"], counts.obsm["spatial"])
    pd.testing.assert_frame_equal(read.obs, counts.obs, check_dtype=False, check_names=False)


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("no matrix", FileNotFoundError, r"filtered_feature_bc_matrix\.h5: no such file"),
        ("no positions", FileNotFoundError, r"tissue_positions\.csv: no such file, nor tissue_positions_list\.csv"),
        ("not hdf5", HestFormatError, r"filtered_feature_bc_matrix\.h5: cannot be read as Space Ranger's matrix"),
        ("no genes", HestFormatError, r"filtered_feature_bc_matrix\.h5: contains no feature of type Gene Expression"),
        ("other slide", HestFormatError, r"no position for 25 of 25 barcodes, such as SPOT0-1\. .*one run"),
        ("other table", HestFormatError, r"tissue_positions\.csv: is not a table of positions"),
    ],
)
def test_invalid_outs_folder_raises(tmp_path, how, error, words):
    outs = write_outs(tmp_path / "outs", sample(0.5))
    h5, table = outs / "filtered_feature_bc_matrix.h5", outs / "spatial" / "tissue_positions.csv"
    if how == "no matrix":
        h5.unlink()
    elif how == "no positions":
        table.unlink()
    elif how == "not hdf5":
        h5.write_text("<html>")
    elif how == "no genes":
        with h5py.File(h5, "a") as file:
            file["matrix/features/feature_type"][:] = b"Custom"
    elif how == "other slide":
        table.write_text(table.read_text().replace("SPOT", "OTHER"))
    else:
        table.write_text("id,patient\nS1,Ann\n")
    with pytest.raises(error, match=words):
        read_counts(outs)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("SPOT0-1,1,0,0,inf,4", "the position of 'SPOT0-1' is not finite"),
        ("SPOT0-1,1,0,0,nan,4", "the position of 'SPOT0-1' is not finite"),
        ("SPOT0-1,1,0,0,1,4\nSPOT0-1,1,0,0,2,4", "'SPOT0-1' occurs more than once"),
        ("SPOT0-1,1,0,0,1,four", "is not a table of positions"),
        ("", "is not a table of positions"),
        ("," * 20_000, "first line has more than 10,000 characters"),
    ],
)
def test_invalid_positions_raise(tmp_path, line, words):
    outs = write_outs(tmp_path / "outs", sample(0.5))
    (outs / "spatial/tissue_positions.csv").write_text(line)
    with pytest.raises(
        HestFormatError, match=rf"tissue_positions\.csv: is not a table of positions \(.*{words}|{words}"
    ):
        read_counts(outs)


HEAD = b"%%MatrixMarket matrix coordinate integer general\n"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("matrix.mtx.gz", HEAD + b"9999999999 25 3\n1 1 1\n", r"is declared as \[9999999999, 25, 3\], with 8 features"),
        ("matrix.mtx.gz", HEAD + b"8 25 9999999999\n1 1 1\n", "declares 9,999,999,999 counts"),
        ("matrix.mtx.gz", HEAD.replace(b"coordinate", b"array") + b"8 25\n", "is not a matrix of counts"),
        pytest.param(
            "matrix.mtx.gz", HEAD + b"8 25 3\n" + b"1 1 1\n" * 2**23, "decompresses to more bytes", id="too many"
        ),
        ("matrix.mtx.gz", HEAD + b"8 25 3\n1 x 1\n", "cannot be read as MatrixMarket"),
        pytest.param("features.tsv.gz", b"a\n" * 2**26 + b"a", "unpacks to more than is read", id="too long"),
        pytest.param("barcodes.tsv.gz", b"a\t" * 2**20, "is not a table", id="one line"),
        pytest.param("features.tsv.gz", b"a\n" * (2**21 + 2), "has more than 2,097,152 lines", id="many lines"),
        ("features.tsv.gz", b"a\n" * 8, "has 1 columns"),
    ],
)
def test_oversized_mtx_folder_raises(tmp_path, name, text, words):
    outs = write_outs(tmp_path / "outs", sample(0.5))
    edit(outs, "matrix market")
    (outs / "filtered_feature_bc_matrix" / name).write_bytes(gzip.compress(text))
    with pytest.raises(HestFormatError, match=rf"{re.escape(name)}: .*{words}"):
        read_counts(outs)


def test_truncated_or_uncompressed_gzip_raises(tmp_path):
    outs = write_outs(tmp_path / "outs", sample(0.5))
    edit(outs, "matrix market")
    path = outs / "filtered_feature_bc_matrix" / "matrix.mtx.gz"
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"no gzip"):
        path.write_bytes(data)
        with pytest.raises(HestFormatError, match=r"matrix\.mtx\.gz: cannot be read"):
            read_counts(outs)


def test_next_step_counts_slides_and_patients(tmp_path):
    root = tmp_path / "my slides"
    (root / "metadata").mkdir(parents=True)
    steps = []
    for i, patient in enumerate(["P1", "P1", "P2", None]):
        (root / "metadata" / f"S{i}.json").write_text(json.dumps({"patient": patient}))
        steps.append(visium.describe_next_step(root))
    run = f"peka-lite run --cohort '{root}' --method none --n-splits 2 --out 'runs/my slides'"
    assert steps[0].startswith(f"{root} has 1 slide of 1 patient; next: add a slide of another patient, then `{run}`")
    assert steps[1] == (
        f"{root} has 2 slides of 1 patient; next: add a slide of another patient, then `{run}`; "
        "`peka-lite train` takes one patient"
    )
    assert steps[2].endswith(f"has 3 slides of 2 patients; next: add more, or `{run}`")
    assert steps[3].endswith(
        "has 4 slides of 2 patients, 1 with no patient named; next: name the patients in a file with the columns "
        f"id,patient, then `{run} --patients FILE.csv`"
    )


def test_next_step_of_one_slide_of_unknown_patient(tmp_path):
    (tmp_path / "metadata").mkdir()
    steps = []
    for i in range(2):
        (tmp_path / "metadata" / f"S{i}.json").write_text(json.dumps({"patient": None}))
        steps.append(visium.describe_next_step(tmp_path))
    assert "has 1 slide, 1 with no patient named; next: add a slide of another patient, then `peka-lite run" in steps[0]
    assert "has 2 slides, 2 with no patient named; next: name the patients" in steps[1]


def test_image_without_colors_raises(tmp_path):
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((300, 300), np.uint16), photometric="minisblack")
    with pytest.raises(SlideError, match=r"deep\.tif: its pixels are of mode I;16, not 8-bit colors"):
        add_slide(tmp_path / "c", "S", sample(0.5), tmp_path / "deep.tif", mpp=0.5)
