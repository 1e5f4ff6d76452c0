"""Slides and cohorts in HEST-1k's layout: joined on the barcode, with errors that name the file, field and fix."""

import base64
import io
import json
import os

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse

from peka_lite.data import Cohort, HestFormatError, read_cohort, read_slide
from peka_lite.evaluation import folds
from peka_lite.teachers import embed_cohort, load_teacher

SPOTS = ("AA", "BB", "CC", "DD")


def write_slide(root, name="S1", *, spots=SPOTS, tiles=None, genes=6, key="barcode", X=None, meta=None):
    """Write a slide with tiles that are filled with the first letter of their barcode."""
    for folder in ("st", "patches", "metadata"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    genes = [f"G{i}" for i in range(genes)] if isinstance(genes, int) else list(genes)
    if X is None:
        X = sparse.csr_matrix(np.arange(len(spots) * len(genes), dtype=np.float32).reshape(len(spots), len(genes)))
    adata = ad.AnnData(X, obs=pd.DataFrame(index=list(spots)), var=pd.DataFrame(index=genes))
    adata.obsm["spatial"] = np.arange(2.0 * len(spots)).reshape(len(spots), 2)
    adata.write_h5ad(root / "st" / f"{name}.h5ad")
    tiles = list(spots if tiles is None else tiles)
    with h5py.File(root / "patches" / f"{name}.h5", "w") as file:
        img = np.zeros((len(tiles), 224, 224, 3), np.uint8) + letters(tiles)[:, None, None, None]
        file.create_dataset("img", data=img, compression="gzip", compression_opts=1)
        file[key] = np.array(tiles, dtype="S8").reshape(-1, 1)
        file["coords"] = np.zeros((len(tiles), 2), int)
    meta = {"patient": "Patient 1", "dataset_title": "Study", "organ": "Breast"} | (meta or {})
    (root / "metadata" / f"{name}.json").write_text(json.dumps(meta))
    return root


def letters(barcodes):
    return np.array([ord(b[0]) for b in barcodes], np.uint8)


def edit_patches(root, **datasets):
    """Replace datasets of S1's patches; None removes one."""
    with h5py.File(root / "patches" / "S1.h5", "a") as file:
        for name, values in datasets.items():
            del file[name]
            if values is not None:
                file[name] = values


def edit_spots(root, change):
    adata = ad.read_h5ad(root / "st" / "S1.h5ad")
    change(adata)
    adata.write_h5ad(root / "st" / "S1.h5ad")


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


# --- one slide ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["barcode", "barcodes"])
@pytest.mark.parametrize(
    ("tiles", "joined", "dropped"),
    [
        (SPOTS, SPOTS, {}),
        (SPOTS[::-1], SPOTS, {}),
        (("DD", "BB"), ("BB", "DD"), {"spots without a tile": 2}),
        (("ZZ", "DD", "CC", "BB", "AA"), SPOTS, {"tiles without a spot": 1}),
        (("ZZ", "CC", "AA", "YY"), ("AA", "CC"), {"spots without a tile": 2, "tiles without a spot": 2}),
    ],
)
def test_tiles_are_joined_to_spots_on_the_barcode_in_spot_order(tmp_path, key, tiles, joined, dropped):
    slide = read_slide(write_slide(tmp_path, tiles=tiles, key=key), "S1")
    assert tuple(slide.adata.obs_names) == joined
    assert slide.tiles[:][:, 0, 0, 0].tolist() == letters(joined).tolist()
    assert slide.dropped == dropped


def test_counts_and_coordinates_follow_their_barcode(tmp_path):
    slide = read_slide(write_slide(tmp_path, tiles=("DD", "BB")), "S1")
    np.testing.assert_array_equal(slide.adata.X.toarray(), np.arange(24).reshape(4, 6)[[1, 3]])
    np.testing.assert_array_equal(slide.adata.obsm["spatial"], [[2, 3], [6, 7]])


@pytest.mark.parametrize("as_type", [np.asarray, sparse.csc_matrix, sparse.csr_matrix])
@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_counts_of_any_storage_become_csr_float32(tmp_path, as_type, dtype):
    X = np.array([[0, 3], [1, 0], [2, 2], [0, 7]], dtype)
    read = read_slide(write_slide(tmp_path, X=as_type(X), genes=2), "S1").adata.X
    assert (read.format, read.dtype) == ("csr", np.float32)
    np.testing.assert_array_equal(read.toarray(), X)


def test_two_genes_with_one_symbol_stay_two_columns(tmp_path):
    with pytest.warns(UserWarning, match="not unique"):
        write_slide(tmp_path, genes=("TBCE", "ACTB", "TBCE"))
    slide = read_slide(tmp_path, "S1")
    assert slide.adata.var_names.is_unique
    assert slide.adata.n_vars == 3


def test_reading_a_slide_reads_no_tile(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a tile was read")

    monkeypatch.setattr("peka_lite.data.tiles.TileStore.__getitem__", refuse)
    assert read_cohort(write_slide(tmp_path)).tiles.shape == (4, 224, 224, 3)


@pytest.mark.parametrize("patient", [None, "", "   ", float("nan")])
def test_a_blank_patient_is_unknown(tmp_path, patient):
    assert read_slide(write_slide(tmp_path, meta={"patient": patient}), "S1").patient is None


@pytest.mark.parametrize(("written", "patient"), [("Ann\\ud800", "Ann\ufffd"), ("A\\u0000B", "A\ufffdB"), ("é", "é")])
def test_a_patient_name_can_be_encoded_in_any_file(tmp_path, written, patient):
    write_slide(tmp_path)
    (tmp_path / "metadata/S1.json").write_text(f'{{"patient": "{written}", "organ": ["\\ud800"]}}')
    slide = read_slide(tmp_path, "S1")
    assert (slide.patient, slide.metadata["organ"]) == (patient, ["\ufffd"])
    slide._repr_html_().encode("utf-8")


@pytest.mark.parametrize("title", [["A"], {"a": 1}, 7, None, float("nan")])
def test_patients_of_two_studies_differ_for_titles_of_any_type(tmp_path, title):
    for name, study in {"S1": title, "S2": "other"}.items():
        write_slide(tmp_path, name, meta={"patient": "P", "dataset_title": study})
    assert [s.patient for s in read_cohort(tmp_path).slides] == [f"P ({title})", "P (other)"]


def test_a_slide_name_that_is_not_utf8_is_refused(tmp_path):
    write_slide(tmp_path)
    for folder, end in (("st", "h5ad"), ("patches", "h5"), ("metadata", "json")):
        os.rename(tmp_path / folder / f"S1.{end}", os.fsencode(tmp_path / folder) + b"/S\xff." + end.encode())
    with pytest.raises(HestFormatError, match=r"st: file name 'S\\udcff' is not UTF-8\. Rename"):
        read_cohort(tmp_path)


def test_a_huge_patients_file_is_refused_unread(two):
    with (two / "huge.csv").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(HestFormatError, match=r"huge\.csv: has 1,099,511,627,776 bytes"):
        read_cohort(two, patients=two / "huge.csv")


def test_the_patient_is_unknown_without_a_patient_field(tmp_path):
    write_slide(tmp_path)
    (tmp_path / "metadata" / "S1.json").write_text("{}")
    assert read_slide(tmp_path, "S1").patient is None


def test_selecting_spots_selects_their_tiles_and_counts_dropped_spots(tmp_path):
    slide = read_slide(write_slide(tmp_path, tiles=SPOTS[:3]), "S1").select([0, 2], reason="blurred")
    assert slide.tiles[:][:, 0, 0, 0].tolist() == letters(slide.adata.obs_names).tolist() == letters("AC").tolist()
    assert slide.dropped == {"spots without a tile": 1, "blurred": 1}
    assert slide.select([True, False], reason="blurred").dropped["blurred"] == 2


def test_a_slides_repr_counts_spots_genes_and_dropped_spots(tmp_path):
    text = repr(read_slide(write_slide(tmp_path, tiles=SPOTS[:3]), "S1"))
    assert text == "Slide S1: 3 spots x 6 genes, Patient 1; dropped 1 spots without a tile"


def test_a_slides_html_has_thumbnail_tile_and_facts(mini_cohort):
    slide = mini_cohort.slides[0]
    html = slide._repr_html_()
    pngs = [part.split('"')[0] for part in html.split("base64,")[1:]]
    sizes = [Image.open(io.BytesIO(base64.b64decode(png))).size for png in pngs]
    assert len(sizes) == 2
    assert sizes[1] == (224, 224)
    for fact in (slide.id, str(slide.n_spots), str(slide.adata.n_vars), slide.patient, "Synthetic data"):
        assert fact in html


def test_a_slides_html_without_thumbnail(tmp_path):
    html = read_slide(write_slide(tmp_path), "S1")._repr_html_()
    assert html.count("<img") == 1
    assert "Synthetic" not in html


def test_names_from_files_are_escaped_in_html(tmp_path):
    cohort = read_cohort(write_slide(tmp_path, meta={"patient": "<script>", "organ": "<script>"}))
    assert "<script>" not in cohort._repr_html_() + cohort.slides[0]._repr_html_()


# --- malformed files -----------------------------------------------------------------------------------------------


def set_counts(value):
    def change(adata):
        adata.X = adata.X.astype(np.float32)
        adata.X.data[3] = value

    return lambda root: edit_spots(root, change)


def set_spatial(values):
    return lambda root: edit_spots(root, lambda adata: adata.obsm.update(spatial=values))


def drop_counts(adata):
    adata.X = None


def rename_spots(adata):
    adata.obs_names = ["AA", "BB", "AA", "DD"]


BAD = {
    "no h5ad": (lambda r: (r / "st/S1.h5ad").unlink(), "st/S1.h5ad", "missing.*HEST-1k"),
    "no patches": (lambda r: (r / "patches/S1.h5").unlink(), "patches/S1.h5", "missing.*HEST-1k"),
    "no metadata": (lambda r: (r / "metadata/S1.json").unlink(), "metadata/S1.json", "missing.*HEST-1k"),
    "no img": (lambda r: edit_patches(r, img=None), "patches/S1.h5", "'img'.*img, barcode"),
    "no barcode": (lambda r: edit_patches(r, barcode=None), "patches/S1.h5", "'barcode'.*join"),
    "tile barcode twice": (
        lambda r: edit_patches(r, barcode=np.array([b"AA", b"BB", b"AA", b"DD"])),
        "patches/S1.h5",
        "'AA'.*unique",
    ),
    "too few barcodes": (
        lambda r: edit_patches(r, barcode=np.array([b"AA", b"BB"])),
        "patches/S1.h5",
        "2 barcodes for 4 tiles.*one barcode per tile",
    ),
    "no overlap": (
        lambda r: edit_patches(r, barcode=np.array([b"AA-1", b"BB-1", b"CC-1", b"DD-1"])),
        "patches/S1.h5",
        "no barcode is shared.*'AA-1'.*'AA'.*spell",
    ),
    "no tile": (
        lambda r: edit_patches(r, img=np.zeros((0, 224, 224, 3), np.uint8), barcode=np.zeros((0, 1), "S2")),
        "patches/S1.h5",
        "no tile",
    ),
    "no spot": (
        lambda r: ad.read_h5ad(r / "st/S1.h5ad")[:0].copy().write_h5ad(r / "st/S1.h5ad"),
        "st/S1.h5ad",
        "no spot",
    ),
    "img is a group": (
        lambda r: (edit_patches(r, img=None), h5py.File(r / "patches/S1.h5", "a").create_group("img").file.close()),
        "patches/S1.h5",
        "'img' is missing.*img, barcode",
    ),
    "small tiles": (
        lambda r: edit_patches(r, img=np.zeros((4, 64, 64, 3), np.uint8)),
        "patches/S1.h5",
        r"img.*64.*uint8 \(N, 224, 224, 3\)",
    ),
    "one tile": (
        lambda r: edit_patches(r, img=np.zeros((224, 224, 3), np.uint8)),
        "patches/S1.h5",
        r"img.*uint8 \(N, 224, 224, 3\)",
    ),
    "float tiles": (
        lambda r: edit_patches(r, img=np.zeros((4, 224, 224, 3), np.float32)),
        "patches/S1.h5",
        "img is float32.*uint8",
    ),
    "spot barcode twice": (lambda r: edit_spots(r, rename_spots), "st/S1.h5ad", "'AA'.*obs_names.*unique"),
    "no counts": (lambda r: edit_spots(r, drop_counts), "st/S1.h5ad", "X is missing.*raw counts"),
    "negative": (set_counts(-1), "st/S1.h5ad", "X holds negative.*raw counts"),
    "nan": (set_counts(np.nan), "st/S1.h5ad", "X holds NaN.*raw counts"),
    "infinite": (set_counts(np.inf), "st/S1.h5ad", "X holds NaN or infinite.*raw counts"),
    "normalized": (set_counts(0.5), "st/S1.h5ad", "X holds non-integer.*raw counts"),
    "no coordinates": (lambda r: edit_spots(r, lambda a: a.obsm.clear()), "st/S1.h5ad", "obsm.'spatial'.*pixel"),
    "nan coordinates": (set_spatial(np.full((4, 2), np.nan)), "st/S1.h5ad", "obsm.'spatial'.*pixel"),
    "one coordinate": (set_spatial(np.ones((4, 1))), "st/S1.h5ad", "obsm.'spatial'.*pixel"),
    "half an h5ad": (lambda r: cut(r / "st/S1.h5ad"), "st/S1.h5ad", "cannot be read.*again"),
    "half of patches": (lambda r: cut(r / "patches/S1.h5"), "patches/S1.h5", "cannot be read.*again"),
    "empty patches": (lambda r: cut(r / "patches/S1.h5", 0), "patches/S1.h5", "cannot be read.*again"),
    "not an h5ad": (lambda r: (r / "st/S1.h5ad").write_text("<html>"), "st/S1.h5ad", "cannot be read.*again"),
    "half of metadata": (lambda r: cut(r / "metadata/S1.json"), "metadata/S1.json", "JSON.*again"),
    "metadata is a list": (
        lambda r: (r / "metadata/S1.json").write_text("[]"),
        "metadata/S1.json",
        "list.*one JSON object",
    ),
    "metadata is deep": (
        lambda r: (r / "metadata/S1.json").write_text('{"a":' + "[" * 100_000),
        "metadata/S1.json",
        "JSON.*nested too deeply.*again",
    ),
    "a number is long": (
        lambda r: (r / "metadata/S1.json").write_text('{"a": ' + "1" * 5000 + "}"),
        "metadata/S1.json",
        "JSON.*4300 digits.*again",
    ),
    "metadata is huge": (
        lambda r: os.truncate(r / "metadata/S1.json", 2**40),
        "metadata/S1.json",
        "1,099,511,627,776 bytes, more than are read",
    ),
    "metadata is binary": (lambda r: (r / "metadata/S1.json").write_bytes(b"\xff\xfe"), "metadata/S1.json", "JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_file_field_and_fix(tmp_path, case):
    damage, file, message = BAD[case]
    damage(write_slide(tmp_path))
    with pytest.raises(HestFormatError, match=f"(?s)^{tmp_path}/{file}: .*{message}"):
        read_slide(tmp_path, "S1")


def test_a_format_error_is_a_value_error():
    assert issubclass(HestFormatError, ValueError)


# --- a cohort ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """Return a cohort folder with two slides of one study that share genes B and C."""
    write_slide(tmp_path, "S1", spots=("AA", "BB", "CC"), tiles=("CC", "AA"), genes=("A", "B", "C"))
    return write_slide(tmp_path, "S2", spots=("DD", "AA"), genes=("C", "D", "B"), meta={"patient": "Patient 2"})


def test_cohort_rows_are_concatenated_slides(two):
    cohort = read_cohort(two)
    assert len(cohort) == 4
    assert cohort.obs.to_numpy().tolist() == [
        ["S1", "Patient 1", "AA"],
        ["S1", "Patient 1", "CC"],
        ["S2", "Patient 2", "DD"],
        ["S2", "Patient 2", "AA"],
    ]


def test_cohort_tiles_counts_and_obs_have_the_same_row_order(two):
    cohort = read_cohort(two)
    assert cohort.tiles[:][:, 0, 0, 0].tolist() == letters(cohort.obs["barcode"]).tolist()
    assert cohort.adata.obs_names.tolist() == ["S1/AA", "S1/CC", "S2/DD", "S2/AA"]
    assert cohort.adata.obs[["slide", "patient", "barcode"]].to_numpy().tolist() == cohort.obs.to_numpy().tolist()


def test_cohort_counts_have_the_shared_genes_in_the_order_of_the_first_slide(two):
    cohort = read_cohort(two)
    assert cohort.genes.tolist() == cohort.adata.var_names.tolist() == ["B", "C"]
    assert (cohort.adata.X.format, cohort.adata.X.dtype) == ("csr", np.float32)
    np.testing.assert_array_equal(cohort.adata.X.toarray(), [[1, 2], [7, 8], [2, 0], [5, 3]])


def test_by_slide_has_all_genes_of_each_slide(two):
    cohort = read_cohort(two)
    assert [s.adata.var_names.tolist() for s in cohort.slides] == [["A", "B", "C"], ["C", "D", "B"]]
    assert [part.var_names.tolist() for part in cohort.by_slide([0, 3])] == [["A", "B", "C"], ["C", "D", "B"]]


def test_by_slide_has_only_the_given_rows(two):
    cohort = read_cohort(two)
    assert [part.obs_names.tolist() for part in cohort.by_slide([1, 2])] == [["CC"], ["DD"]]
    assert [part.obs_names.tolist() for part in cohort.by_slide([False, False, True, True])] == [["DD", "AA"]]


def test_rows_of_a_slide(two):
    cohort = read_cohort(two)
    assert cohort.rows_of("S2").tolist() == [2, 3]
    with pytest.raises(KeyError, match=r"S9.*S1, S2"):
        cohort.rows_of("S9")


def test_slides_are_read_in_the_given_order(two):
    assert [s.id for s in read_cohort(two).slides] == ["S1", "S2"]
    assert [s.id for s in read_cohort(two, ["S2", "S1"]).slides] == ["S2", "S1"]
    assert [s.id for s in read_cohort(two, ["S2"]).slides] == ["S2"]


def test_selecting_cohort_rows_applies_to_tiles_obs_and_dropped(two):
    cohort = read_cohort(two).select([0, 2, 3], reason="blurred")
    assert cohort.tiles[:][:, 0, 0, 0].tolist() == letters(cohort.obs["barcode"]).tolist() == letters("ADA").tolist()
    assert [s.dropped for s in cohort.slides] == [{"spots without a tile": 1, "blurred": 1}, {}]


def test_a_slide_without_selected_spots_is_left_out(two):
    cohort = read_cohort(two).select([0, 1], reason="blurred")
    assert [s.id for s in cohort.slides] == ["S1"]
    assert cohort.left_out == {"S2": "blurred"}


def test_dropping_every_spot_is_refused(two):
    with pytest.raises(ValueError, match=r"no spot is left.*blurred"):
        read_cohort(two).select([], reason="blurred")


def test_slides_without_a_shared_gene_are_refused(tmp_path):
    write_slide(tmp_path, "S1", genes=("ENSG1", "ENSG2"))
    write_slide(tmp_path, "S2", genes=("ACTB", "TP53"))
    with pytest.raises(HestFormatError, match=r"share no gene naming \(S1: ENSG1, ENSG2; S2: ACTB, TP53\)\. Give"):
        read_cohort(tmp_path)


def test_a_folder_without_slides_is_refused(tmp_path):
    with pytest.raises(HestFormatError, match=r"no \.h5ad file.*st, patches and metadata"):
        read_cohort(tmp_path)


def test_a_missing_slide_is_reported_with_the_available_ones(two):
    with pytest.raises(HestFormatError, match=r"no slide S7.*S1, S2"):
        read_cohort(two, ["S1", "S7"])


def test_a_slide_given_twice_is_refused(two):
    with pytest.raises(ValueError, match="more than once: S1"):
        read_cohort(two, ["S1", "S1"])


@pytest.fixture
def with_panel(tmp_path):
    write_slide(tmp_path, "S1", genes=40)
    write_slide(tmp_path, "S2", genes=38)
    return write_slide(tmp_path, "XENIUM", genes=5)


def test_a_targeted_panel_is_left_out_with_a_warning(with_panel):
    with pytest.warns(UserWarning, match=r"left out XENIUM: targeted panel of 5 genes.*keep_targeted"):
        cohort = read_cohort(with_panel)
    assert [s.id for s in cohort.slides] == ["S1", "S2"]
    assert list(cohort.left_out) == ["XENIUM"]
    assert len(cohort.genes) == 38


def test_keep_targeted_keeps_a_targeted_panel(with_panel, recwarn):
    cohort = read_cohort(with_panel, keep_targeted=True)
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]  # libraries may warn too
    assert len(cohort.slides) == 3
    assert len(cohort.genes) == 5


def test_a_cohorts_repr_and_html_list_slides_and_left_out_ones(with_panel):
    with pytest.warns(UserWarning, match="XENIUM"):
        cohort = read_cohort(with_panel)
    for text in (repr(cohort), cohort._repr_html_()):
        assert "2 slides, 8 spots, 38 shared genes" in text
        assert "left out XENIUM: targeted panel of 5 genes" in text


# --- gene naming ---------------------------------------------------------------------------------------------------

HUMAN = tuple(f"GENE{i}" for i in range(40))
MOUSE = tuple(f"Gene{i}" for i in range(40))
ENSEMBL = tuple(f"ENSG{i:011}" for i in range(40))


def write_named(root, *, columns=None, **slides):
    """Write slides with the given genes, the index of the gene as count, and `columns` of var by slide."""
    for name, genes in slides.items():
        X = np.tile(np.arange(len(genes)), (2, 1))
        write_slide(root, name, spots=("AA", "BB"), genes=genes, X=X, meta={"patient": name})
        if columns and name in columns:
            path = root / "st" / f"{name}.h5ad"
            adata = ad.read_h5ad(path)
            adata.var = adata.var.assign(**columns[name])
            adata.write_h5ad(path)
    return root


@pytest.mark.parametrize("order", [("A", "B", "C"), ("C", "B", "A"), ("B", "C", "A")])
@pytest.mark.parametrize(
    "other", [MOUSE, ENSEMBL, tuple(n.lower() for n in HUMAN), HUMAN[:15] + MOUSE[15:], MOUSE[:12]]
)
def test_a_slide_with_other_gene_names_is_left_out_in_any_order(tmp_path, order, other):
    root = write_named(tmp_path, A=HUMAN[:38], B=HUMAN[1:], C=other)
    unknown = [n for n in other if n not in HUMAN][:3]
    missing = [n for n in HUMAN[:38] if n not in other][:3]
    message = f"left out C: gene names differ \\({', '.join(unknown)}\\).*other slides' \\({', '.join(missing)}\\)"
    with pytest.warns(UserWarning, match=message):
        cohort = read_cohort(root, order)
    assert [s.id for s in cohort.slides] == [i for i in order if i != "C"]
    assert list(cohort.left_out) == ["C"]
    assert set(cohort.genes) == set(HUMAN[1:38])


@pytest.mark.parametrize(
    "slides",
    [
        {"A": HUMAN, "B": MOUSE},
        {"A": HUMAN, "B": MOUSE, "C": ENSEMBL},
        {"A": HUMAN, "B": HUMAN, "C": MOUSE, "D": MOUSE},
        {"A": HUMAN, "B": MOUSE, "C": HUMAN[:5]},  # the panel is left out, then only A is left
    ],
)
@pytest.mark.filterwarnings("ignore:left out")
def test_a_cohort_with_one_slide_left_by_gene_naming_is_refused(tmp_path, slides):
    root = write_named(tmp_path, **slides)
    for order in (sorted(slides), sorted(slides, reverse=True)):
        with pytest.raises(HestFormatError, match=r"Give all slides the same names in var_names.*--slides"):
            read_cohort(root, order)


@pytest.mark.filterwarnings("error")
def test_panels_within_the_whole_transcriptome_are_kept(tmp_path):
    controls = tuple(f"{kind}_{i}" for kind in ("BLANK", "NegControlProbe", "antisense") for i in range(5))
    root = write_named(tmp_path, A=HUMAN, B=HUMAN[:10] + controls, C=HUMAN[5:12])
    assert read_cohort(root, keep_targeted=True).genes.tolist() == list(HUMAN[5:10])


@pytest.mark.parametrize(
    ("spelled", "columns", "source"),
    [
        ([f"GRCh38_{n}" for n in HUMAN] + [f"mm10___{n}" for n in MOUSE], {}, "var_names"),
        ([f"{n} " for n in HUMAN], {}, "var_names"),
        (ENSEMBL, {"gene_ids": ENSEMBL, "gene_name": HUMAN}, "'gene_name'"),
        (ENSEMBL, {"feature_name": pd.Categorical([None, *HUMAN[1:]])}, "'feature_name'"),
    ],
)
def test_genes_are_renamed_if_the_file_has_the_other_slides_names(tmp_path, spelled, columns, source):
    root = write_named(tmp_path, A=HUMAN[:39], B=HUMAN[::-1], C=spelled, columns={"C": columns})
    with pytest.warns(UserWarning, match=f"C: genes renamed to .*{source}"):
        cohort = read_cohort(root, ["C", "A", "B"])
    assert [s.id for s in cohort.slides] == ["C", "A", "B"]
    counts = pd.DataFrame(cohort.adata.X.toarray(), cohort.obs["slide"], cohort.adata.var_names)
    assert set(counts) >= set(HUMAN[1:39])
    assert counts.loc["C", "GENE7"].tolist() == counts.loc["A", "GENE7"].tolist() == [7, 7]
    assert counts.loc["B", "GENE7"].tolist() == [32, 32]


@pytest.mark.parametrize("order", [("A", "B"), ("B", "A")])
def test_two_slides_are_renamed_to_names_of_both(tmp_path, order):
    versioned = [f"{n}.{i % 7 + 1}" for i, n in enumerate(ENSEMBL)]
    for k, (b, columns, genes) in enumerate(
        [
            (ENSEMBL, {"A": {"gene_ids": ENSEMBL}, "B": {"symbol": HUMAN}}, HUMAN),  # symbols are preferred
            (versioned, {"A": {"gene_ids": ENSEMBL}}, versioned),
        ]
    ):
        root = write_named(tmp_path / str(k), A=HUMAN, B=b, columns=columns)
        with pytest.warns(UserWarning, match="genes renamed to"):
            assert set(read_cohort(root, order).genes) == set(genes)


def test_slides_linked_through_a_third_warn_of_few_shared_genes(tmp_path):
    root = write_named(tmp_path, A=(*HUMAN, "ERCC"), B=(*MOUSE, "ERCC"), C=(*HUMAN, *MOUSE, "ERCC"))
    with pytest.warns(UserWarning, match=r"slides share 1 genes, but A has 41: read fewer slides \(ids, --slides\)"):
        assert read_cohort(root).genes.tolist() == ["ERCC"]


# --- patients ------------------------------------------------------------------------------------------------------


def write_csv(root, text, encoding="utf-8"):
    (root / "patients.csv").write_text(text, encoding=encoding)
    return root / "patients.csv"


def patients_of(root, **options):
    return [s.patient for s in read_cohort(root, **options).slides]


def test_patients_can_be_a_mapping(two):
    assert patients_of(two, patients={"S2": "Ann"}) == ["Patient 1", "Ann"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_patients_can_be_a_csv_file(two, encoding):
    path = write_csv(two, "id,organ,patient\nS1,Breast, Bo \nS2,Breast,Ann\n", encoding)
    assert patients_of(two, patients=path) == ["Bo", "Ann"]
    assert patients_of(two, patients=str(path)) == ["Bo", "Ann"]


@pytest.mark.parametrize("blank", ["", " ", None, float("nan")])
def test_a_blank_in_the_mapping_keeps_the_metadata(two, blank):
    assert patients_of(two, patients={"S1": blank, "S2": "Ann"}) == ["Patient 1", "Ann"]


def test_a_blank_in_the_csv_keeps_the_metadata(two):
    assert patients_of(two, patients=write_csv(two, "id,patient\nS1,\nS2,Ann\n")) == ["Patient 1", "Ann"]


@pytest.mark.parametrize("text", ["", "id,patient\n", "slide,person\nS1,Ann\n"])
def test_a_csv_with_other_columns_is_refused(two, text):
    with pytest.raises(HestFormatError, match=r"patients\.csv: columns id and patient.*one line per slide"):
        read_cohort(two, patients=write_csv(two, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!DOCTYPE html>\n<title>Log in</title>\n", r"columns id and patient are missing \(it is a web .*'Log in'"),
        ("id,patient\nS1,Ann\nS2," + "x" * 200_000 + "\n", r"line 3 is not valid CSV"),
    ],
    ids=["a web page", "a huge field"],
)
def test_the_error_for_an_invalid_csv_describes_it(two, text, words):
    with pytest.raises(HestFormatError, match=rf"patients\.csv: {words}"):
        read_cohort(two, patients=write_csv(two, text))


def test_a_missing_csv_is_refused(two):
    with pytest.raises(HestFormatError, match=r"absent\.csv: file is missing.*columns"):
        read_cohort(two, patients=two / "absent.csv")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("id;patient\nS1;Bo\nS2;Ann, née Lee\n", "utf-8-sig"),
        ("patient\tid\nBo\tS1\nAnn, née Lee\tS2\n", "utf-16"),
        (' ID , Patient ,\n\n S1 ,Bo,\n,,\nS2,"Ann, née Lee"\n', "utf-8"),
        ('id,patient\r\nS1,Bo\r\nS2,"Ann, née Lee"\r\nS1,Bo\r\n', "utf-8"),
    ],
)
def test_csv_dialects_of_spreadsheets_are_read(two, text, encoding):
    assert patients_of(two, patients=write_csv(two, text, encoding)) == ["Bo", "Ann, née Lee"]
    assert patients_of(two, patients=two / "patients.csv", ids=["S2"]) == ["Ann, née Lee"]


@pytest.mark.parametrize("name", ["NA", "nan", "None", "null", "01", "1.0", "True"])
def test_a_patient_may_have_any_name(two, name):
    assert patients_of(two, patients=write_csv(two, f"id,patient\nS1,{name}\nS2,Ann\n")) == [name, "Ann"]


@pytest.mark.parametrize("name", ["01", "NA"])
def test_a_slide_may_have_any_name(tmp_path, name):
    write_slide(tmp_path, name)
    assert patients_of(tmp_path, patients=write_csv(tmp_path, f"id,patient\n{name},Ann\n")) == ["Ann"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("S1,Ann\nS2,Bo\nS1,Cid\n", r"lines 2 and 4 give two patients for S1: Ann and Cid\. Keep"),
        ("S1,Ann\n\nS1,\n", r"lines 2 and 4 give two patients for S1: Ann and blank"),
        ("S1,\nS1,Ann\n", r"lines 2 and 3 give two patients for S1: blank and Ann"),
        ("S1,Ann\nS3,Bo\n", r"line 3 names slide 'S3', which is not in the cohort\. Did you mean S[12]\?"),
        ("S1,Ann\n1,Bo\n", r"line 3 names slide '1', .*S1"),
        ("S1,Ann\nTENX13,\n", r"line 3 names slide 'TENX13', .*The cohort has S1, S2"),
        ("S1,Ann\n,Bo\n", r"line 3 names patient 'Bo' but no slide"),
        ("S1,Lee, Ann\n", r"line 2 has 3 fields, the header 2.*quotes"),
        ("S1;Ann\n", r"line 2 names slide 'S1;Ann'"),
    ],
)
def test_the_error_for_an_invalid_row_names_its_line(two, rows, words):
    with pytest.raises(HestFormatError, match=rf"patients\.csv: {words}"):
        read_cohort(two, patients=write_csv(two, "id,patient\n" + rows))


def test_a_binary_patients_file_is_refused(two):
    (two / "patients.csv").write_bytes(b"PK\x03\x04\xe9\xff")
    with pytest.raises(HestFormatError, match=r"patients\.csv: not UTF-8 text .*Save the table as CSV"):
        read_cohort(two, patients=two / "patients.csv")


def test_a_list_of_patients_in_metadata_becomes_one_name(tmp_path):
    write_slide(tmp_path, "S1", meta={"patient": ["A", "B"]})
    assert patients_of(tmp_path) == ["['A', 'B']"]


def test_patient_1_of_two_studies_is_two_people(two):
    write_slide(two, "S3", genes=("B", "C"), meta={"dataset_title": "Other"})
    cohort = read_cohort(two)
    assert cohort.obs["patient"].nunique() == 3
    assert [s.patient for s in cohort.slides] == ["Patient 1 (Study)", "Patient 2 (Study)", "Patient 1 (Other)"]


@pytest.mark.parametrize("blank", ["", None])
def test_a_blank_in_the_mapping_does_not_merge_patients_of_two_studies(two, blank):
    write_slide(two, "S3", genes=("B", "C"), meta={"dataset_title": "Other"})
    one, _, other = patients_of(two, patients={"S1": blank, "S3": blank})
    assert one != other


def test_blocks_in_two_studies_get_the_given_patient(two):
    write_slide(two, "S3", genes=("B", "C"), meta={"dataset_title": "Other"})
    assert patients_of(two, patients={"S1": "Ann", "S3": "Ann"})[::2] == ["Ann", "Ann"]


def test_unknown_patients_stay_unknown_across_studies(tmp_path):
    write_slide(tmp_path, "S1", meta={"patient": None})
    write_slide(tmp_path, "S2", meta={"patient": "", "dataset_title": "Other"})
    cohort = read_cohort(tmp_path)
    assert cohort.obs["patient"].isna().all()


# --- synthetic and real cohorts --------------------------------------------------------------------------------------


def test_the_mini_cohort_counts_its_spots_without_a_tile(mini_cohort):
    assert all(s.dropped["spots without a tile"] == 2 for s in mini_cohort.slides)


def test_mini_tiles_match_their_barcodes(mini_root, mini_cohort):
    for row in (0, len(mini_cohort) // 2, len(mini_cohort) - 1):
        slide, barcode = mini_cohort.obs.loc[row, ["slide", "barcode"]]
        np.testing.assert_array_equal(mini_cohort.tiles[row], read_tile(mini_root, slide, barcode))


def read_tile(root, slide, barcode):
    with h5py.File(root / "patches" / f"{slide}.h5") as file:
        codes = file["barcode" if "barcode" in file else "barcodes"][:].ravel().tolist()
        return file["img"][codes.index(barcode.encode())]


@pytest.fixture(scope="module")
def real(her2st):
    return read_cohort(her2st, ["HER2_C2", "HER2_C3", "HER2_C4", "HER2_C5"])


def test_real_slides_have_the_spots_and_genes_their_readme_states(real):
    assert [(s.n_spots, s.adata.n_vars) for s in real.slides] == [
        (187, 15706),
        (180, 15821),
        (184, 15842),
        (181, 15721),
    ]
    assert not any(s.dropped for s in real.slides)


def test_real_slides_have_the_median_counts_their_readme_states(real):
    medians = [np.median(np.asarray(s.adata.X.sum(1))) for s in real.slides]
    np.testing.assert_allclose(medians, [8508, 9549, 10190, 10015], atol=1)


def test_real_slides_are_of_one_patient(real):
    assert {s.patient for s in real.slides} == {"Patient C"}


@pytest.mark.parametrize("row", [0, 186, 187, 400, 731])
def test_a_real_tile_matches_its_barcode(real, her2st, row):
    slide, barcode = real.obs.loc[row, ["slide", "barcode"]]
    np.testing.assert_array_equal(real.tiles[row], read_tile(her2st, slide, barcode))


@pytest.mark.parametrize("row", [0, 400, 731])
def test_real_counts_of_shared_genes_match_the_file(real, her2st, row):
    slide, barcode = real.obs.loc[row, ["slide", "barcode"]]
    file = ad.read_h5ad(her2st / "st" / f"{slide}.h5ad")
    np.testing.assert_array_equal(real.adata.X[row].toarray(), file[barcode, real.genes.tolist()].X.toarray())


def test_real_slides_share_fewer_genes_than_each_has(real):
    names = [set(s.adata.var_names) for s in real.slides]
    assert set(real.genes) == set.intersection(*names)
    assert all(len(real.genes) < len(n) for n in names)


def test_a_teacher_embeds_every_real_spot_and_two_patients_are_split(her2st):
    cohort = read_cohort(her2st, ["HER2_A1", "HER2_C2"])
    assert isinstance(cohort, Cohort)
    train, test = folds(cohort, "patient", n_splits=2)[0]
    assert len(set(cohort.obs["patient"][test])) == 1
    teacher = load_teacher("pca", n_components=8, n_genes=200).fit(cohort.by_slide(train))
    assert embed_cohort(teacher, cohort).shape == (346 + 187, 8)


def test_a_real_slides_html_has_two_images(real):
    assert real.slides[0]._repr_html_().count("<img") == 2


def test_a_given_patient_merges_with_the_same_name_in_metadata(tmp_path):
    for slide_id, title in (("S1", "Study"), ("S2", "Study"), ("S3", "Other")):
        write_slide(tmp_path, slide_id, meta={"patient": "Patient 1", "dataset_title": title})
    cohort = read_cohort(tmp_path, patients={"S1": "Patient 1"})
    assert cohort.slides[0].patient == cohort.slides[1].patient


def test_a_patients_mapping_of_other_slides_is_refused(tmp_path):
    write_slide(tmp_path, "S1")
    with pytest.raises(ValueError, match="patients names none of the slides"):
        read_cohort(tmp_path, patients={"TYPO": "Patient 1"})
