"""The mini cohort has HEST's layout, the same bytes for the same seed, and the documented statistics."""

import hashlib
import json
import os
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import stats

from peka_lite.data import write_mini_cohort
from peka_lite.data.mini import cohort as mini, counts as mini_counts
from peka_lite.evaluation import noise_ceiling

SMALL = {"n_patients": 3, "n_slides": 4, "spots_per_slide": (40, 60)}
NAMES = ("MINI1", "MINI2", "MINI3", "MINI4")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_mini_cohort(tmp_path_factory.mktemp("mini") / "cohort", **SMALL)


@pytest.fixture(scope="module")
def slides(root):
    return {name: ad.read_h5ad(root / "st" / f"{name}.h5ad") for name in NAMES}


def read_patches(root, name):
    with h5py.File(root / "patches" / f"{name}.h5") as file:
        field = "barcodes" if "barcodes" in file else "barcode"
        return [code.decode() for code in file[field][:, 0]], file["coords"][:], file["img"][:]


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def many_slides():
    """Draw thirty slides without their images, for statistics over slides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini, "draw_section", lambda rng, labels, stain: np.zeros((320, 320, 3), np.uint8))
        seeds = np.random.SeedSequence(5)
        var, profiles = mini_counts.draw_genes(np.random.default_rng(seeds.spawn(1)[0]))
        return [
            mini._draw_slide(var, mini._draw_patient(profiles, of_patient), (100, 140), of_slide)[0]
            for of_patient, of_slide in zip(seeds.spawn(30), seeds.spawn(30), strict=True)
        ]


def test_layout_of_the_cohort(root):
    expected = {f"{folder}/{name}{end}" for folder, end in mini.FILES.items() for name in NAMES}
    assert set(digests(root)) == {*expected, "mini.json"}
    patients = [json.loads((root / "metadata" / f"{name}.json").read_text())["patient"] for name in NAMES]
    assert patients == ["Mini patient 1", "Mini patient 2", "Mini patient 3", "Mini patient 1"]


@pytest.mark.parametrize("name", NAMES)
def test_layout_of_the_h5ad(slides, name):
    slide = slides[name]
    n_spots = slide.n_obs
    assert 40 <= n_spots <= 60
    assert slide.X.format == "csr"
    assert slide.X.dtype == np.float32
    assert {"in_tissue", "array_row", "array_col", "domain"} <= set(slide.obs)
    assert slide.obs_names.is_unique
    assert slide.obs_names.str.fullmatch("[ACGT]{16}-1").all()
    np.testing.assert_array_equal(slide.obsm["spatial"][:, 0], slide.obs["pxl_col_in_fullres"])
    np.testing.assert_array_equal(slide.obsm["spatial"][:, 1], slide.obs["pxl_row_in_fullres"])
    assert list(slide.obs["domain"]) == list(slide.obsm["mixture"].idxmax(axis=1))
    np.testing.assert_allclose(slide.obsm["mixture"].sum(axis=1), 1, atol=1e-5)
    assert slide.layers["rate"].shape == slide.shape
    spatial = slide.uns["spatial"]["ST"]
    assert spatial["images"]["downscaled_fullres"].dtype == np.uint8
    assert max(spatial["images"]["downscaled_fullres"].shape) <= 1000
    assert spatial["scalefactors"]["spot_diameter_fullres"] == 110


@pytest.mark.parametrize("name", NAMES)
def test_spots_lie_on_a_visium_grid(slides, name):
    obs = slides[name].obs
    assert ((obs.array_row + obs.array_col) % 2 == 0).all()
    assert obs.array_row.between(0, 77).all()
    assert obs.array_col.between(0, 127).all()
    position = slides[name].obsm["spatial"] * 0.5  # um
    distance = np.linalg.norm(position[:, None] - position[None], axis=2) + 1e6 * np.eye(len(position))
    # 100 um to the nearest spot, up to rounding to whole pixels.
    np.testing.assert_allclose(distance.min(1), 100, atol=1)


@pytest.mark.parametrize("name", NAMES)
def test_layout_of_the_patches(root, slides, name):
    slide = slides[name]
    codes, coords, tiles = read_patches(root, name)
    assert tiles.shape == (slide.n_obs - mini.N_WITHOUT_TILE, 224, 224, 3)
    assert tiles.dtype == np.uint8
    assert set(codes) < set(slide.obs_names)
    assert codes != [code for code in slide.obs_names if code in set(codes)]  # not in the order of the h5ad
    np.testing.assert_array_equal(coords + 112, slide[codes].obsm["spatial"])
    with h5py.File(root / "patches" / f"{name}.h5") as file:
        for field in ("img", "coords"):
            assert file[field].attrs["patch_size_src"] == file[field].attrs["patch_size_target"] == 224
            assert file[field].attrs["downsample"] == 1.0
            assert file[field].attrs["pixel_size"] == 0.5
        assert file["img"].chunks == (1, 224, 224, 3)
        assert file["img"].compression == "gzip"


def test_both_spellings_of_barcode_occur(root):
    fields = set()
    for name in NAMES:
        with h5py.File(root / "patches" / f"{name}.h5") as file:
            fields |= set(file) & {"barcode", "barcodes"}
    assert fields == {"barcode", "barcodes"}


@pytest.mark.parametrize("name", NAMES)
def test_metadata_state_that_the_slide_is_synthetic(root, slides, name):
    metadata = json.loads((root / "metadata" / f"{name}.json").read_text())
    assert metadata["synthetic"] is True
    assert "ynthetic" in metadata["note"]
    assert metadata["id"] == name
    assert metadata["spots_under_tissue"] == slides[name].n_obs
    assert metadata["nb_genes"] == slides[name].n_vars
    assert metadata["pixel_size_um_estimated"] == 0.5
    image = slides[name].uns["spatial"]["ST"]
    scale = image["scalefactors"]["tissue_downscaled_fullres_scalef"]
    height, width = image["images"]["downscaled_fullres"].shape[:2]
    assert 0 <= metadata["fullres_px_height"] - height / scale < 1 / scale
    assert 0 <= metadata["fullres_px_width"] - width / scale < 1 / scale


@pytest.mark.parametrize("name", NAMES)
def test_tiles_match_the_small_image(root, slides, name):
    _, coords, tiles = read_patches(root, name)
    spatial = slides[name].uns["spatial"]["ST"]
    scale = spatial["scalefactors"]["tissue_downscaled_fullres_scalef"]
    from_tile, from_image = [], []
    for (x, y), tile in zip(coords, tiles, strict=True):
        rows, columns = (slice(round(start * scale), round((start + 224) * scale)) for start in (y, x))
        from_tile.append(tile.mean((0, 1)))
        from_image.append(spatial["images"]["downscaled_fullres"][rows, columns].mean((0, 1)))
    np.testing.assert_allclose(from_tile, from_image, atol=3)  # gray levels; the crop is off by half a pixel
    assert np.std(from_tile, axis=0).min() > 6  # tiles differ by more than that, so a mix-up would show


def test_tiles_show_their_domain(root, slides):
    """Dense nuclei absorb red light and fat does not: the tiles of each slide must show the difference."""
    for name, slide in slides.items():
        codes, _, tiles = read_patches(root, name)
        mixture = slide[codes].obsm["mixture"]
        darkness = 255 - tiles[..., 0].mean((1, 2))
        cellular = mixture["tumor"] + mixture["immune"] - mixture["fat"]
        assert np.corrcoef(darkness, cellular)[0, 1] > 0.6


def test_same_seed_gives_the_same_bytes(root, tmp_path):
    assert digests(write_mini_cohort(tmp_path / "again", **SMALL)) == digests(root)


def test_another_seed_gives_other_files(root, tmp_path):
    other, first = digests(write_mini_cohort(tmp_path / "other", seed=1, **SMALL)), digests(root)
    assert other.keys() == first.keys()
    same = [name for name in first if first[name] == other[name] and not name.startswith("metadata")]
    assert same == []


def test_a_complete_cohort_is_not_written_again(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_mini_cohort(str(root), **SMALL) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_folder_with_a_cohort_of_other_options_is_refused(root):
    with pytest.raises(FileExistsError, match="not the complete mini cohort"):
        write_mini_cohort(root, seed=3, **SMALL)


def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(FileExistsError, match="not the complete mini cohort"):
        write_mini_cohort(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_incomplete_cohort_is_refused(tmp_path):
    options = {"n_patients": 1, "n_slides": 1, "spots_per_slide": (20, 20)}
    root = tmp_path / "cohort"
    root.mkdir()  # an empty folder is allowed
    write_mini_cohort(root, **options)
    (root / "patches" / "MINI1.h5").unlink()
    with pytest.raises(FileExistsError, match="not the complete mini cohort"):
        write_mini_cohort(root, **options)


def test_a_failure_leaves_no_files(tmp_path, monkeypatch):
    calls = []
    write = mini._write_slide

    def fail_at_the_second(*args):
        calls.append(args[1])
        if len(calls) == 2:
            raise OSError("disk full")
        write(*args)

    monkeypatch.setattr(mini, "_write_slide", fail_at_the_second)
    with pytest.raises(OSError, match="disk full"):
        write_mini_cohort(tmp_path / "cohort", **SMALL)
    assert calls == ["MINI1", "MINI2"]
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_writers_uses_the_other_ones_cohort(tmp_path, monkeypatch):
    small, root = {"n_patients": 1, "n_slides": 1, "spots_per_slide": (20, 20)}, tmp_path / "cohort"
    first, replace = write_mini_cohort(tmp_path / "first", **small), os.replace

    def replace_late(draft, to):
        os.rename(first, to)
        replace(draft, to)

    monkeypatch.setattr(mini.os, "replace", replace_late)
    inode = (first / "mini.json").stat().st_ino
    assert write_mini_cohort(root, **small) == root
    assert (root / "mini.json").stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [root]


def test_two_writers_may_start_from_one_empty_folder(tmp_path, monkeypatch):
    small, rmdir = {"n_patients": 1, "n_slides": 1, "spots_per_slide": (20, 20)}, Path.rmdir
    (tmp_path / "cohort").mkdir()

    def remove_twice(path):
        rmdir(path)  # by the other writer
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", remove_twice)
    assert (write_mini_cohort(tmp_path / "cohort", **small) / "mini.json").is_file()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seed": -1}, ValueError),
        ({"seed": 0.5}, TypeError),
        ({"n_patients": 0}, ValueError),
        ({"n_patients": 9}, ValueError),
        ({"spots_per_slide": (10, 30)}, ValueError),
        ({"spots_per_slide": (60, 40)}, ValueError),
        ({"spots_per_slide": (40, 2000)}, ValueError),
    ],
)
def test_bad_options_are_refused(tmp_path, options, error):
    with pytest.raises(error):
        write_mini_cohort(tmp_path / "cohort", **options)
    assert list(tmp_path.iterdir()) == []


def test_genes_of_each_kind(slides):
    var = slides["MINI1"].var
    assert var.kind.value_counts().to_dict() == {"noise": 1000, "visible": 300, "invisible": 200}
    assert var.index.is_unique
    assert var.index.str.startswith("MT-").sum() == 13
    assert {"EPCAM", "COL1A1", "CD3D", "KRT5", "ADIPOQ", "CA9"} <= set(var.index[var.kind == "visible"])
    for slide in slides.values():
        assert slide.var.equals(var)


def test_counts_are_integers_and_every_spot_expresses_enough_genes(slides):
    for slide in slides.values():
        assert (slide.X.data == np.rint(slide.X.data)).all()
        assert slide.X.data.min() >= 1
        assert ((slide.X > 0).sum(1) > 250).all()
        assert 2000 < np.median(np.asarray(slide.X.sum(1))) < 6000


def test_counts_are_as_spread_as_in_real_sections(many_slides):
    """Compare with the 1,345 shared genes of real breast sections (mini_counts.py): 0.49, 0.66, -1.16 and 0.87."""
    counts = [slide.X.toarray() for slide in many_slides]
    assert 0.35 < np.mean([(x == 0).mean() for x in counts]) < 0.55
    assert 0.45 < np.mean([x.sum(1).std() / x.sum(1).mean() for x in counts]) < 0.75
    low, high = np.quantile(np.log10(np.concatenate(counts).mean(0)), [0.05, 0.95])
    assert -1.2 < low < -0.6
    assert 0.7 < high < 1.1


def test_counts_are_negative_binomial_around_the_rate(slides):
    """Squared residuals over the variance have mean 1; with about 250,000 of them the error is below 0.01."""
    ratio, poisson_ratio, total = [], [], []
    for slide in slides.values():
        rate, counts = slide.layers["rate"].astype(float), slide.X.toarray()
        squared = (counts - rate) ** 2
        ratio.append(squared / (rate + slide.var["dispersion"].to_numpy() * rate**2))
        poisson_ratio.append(squared / rate)
        total.append(counts.sum() / rate.sum())
    np.testing.assert_allclose(total, 1, atol=0.01)
    assert abs(np.concatenate(ratio).mean() - 1) < 0.04
    assert np.concatenate(poisson_ratio).mean() > 1.2  # a Poisson distribution would fail


def test_each_kind_has_the_same_share_of_every_spot(slides):
    for slide in slides.values():
        rate = slide.layers["rate"].astype(float)
        for kind, share in mini_counts.SHARE.items():
            block = rate[:, slide.var.kind == kind].sum(1) / rate.sum(1)
            np.testing.assert_allclose(block, share, rtol=1e-5)


def test_noise_genes_have_a_constant_share(slides):
    for slide in slides.values():
        rate = slide.layers["rate"][:, slide.var.kind == "noise"] / slide.layers["rate"].sum(1, keepdims=True)
        np.testing.assert_allclose(rate, rate[:1].repeat(len(rate), 0), rtol=1e-4)


def correlations(slides, value):
    """Return the correlation of each column of `value(slide)` with each domain, (n_slides, n_columns, n_domains)."""
    coefficients = []
    for slide in slides:
        left, right = np.asarray(value(slide)), np.asarray(slide.obsm["mixture"])
        both = np.corrcoef(left, right, rowvar=False)
        coefficients.append(both[: left.shape[1], left.shape[1] :])
    return np.array(coefficients)


@pytest.mark.parametrize(
    "value",
    [lambda slide: np.log(slide.layers["rate"].sum(1, keepdims=True)), lambda slide: slide.obsm["niche"]],
    ids=["depth", "niche"],
)
def test_depth_and_niches_do_not_follow_the_domains(many_slides, value):
    """Test the mean over 30 independent slides, since smooth maps correlate by chance within a slide.

    With four columns and six domains there are 24 t statistics; |t| < 4 fails one independent cohort in about 100.
    """
    t = stats.ttest_1samp(correlations(many_slides, value), 0, axis=0).statistic
    assert np.abs(t).max() < 4


def test_rates_of_visible_genes_follow_the_domains(many_slides):
    """The statistic of the test above detects a true correlation."""
    correlation = correlations(many_slides, lambda s: np.log(s[:, ["EPCAM", "COL1A1"]].layers["rate"]))
    assert np.abs(stats.ttest_1samp(correlation, 0, axis=0).statistic).max() > 8


def test_domains_and_niches_all_occur(many_slides):
    for slide in many_slides:
        assert {"tumor", "stroma"} <= set(slide.obs["domain"])
    for name in ("tumor", "stroma", "immune", "gland", "fat", "necrosis"):
        assert sum(name in set(slide.obs["domain"]) for slide in many_slides) >= 27
    assert min(slide.obsm["niche"].to_numpy().max(0).min() for slide in many_slides) > 0.5


def test_invisible_genes_are_smooth_in_space(slides):
    """Niches of neighboring spots differ less than those of two random spots."""
    for slide in slides.values():
        niche, place = slide.obsm["niche"].to_numpy(), slide.obsm["spatial"]
        distance = np.linalg.norm(place[:, None] - place[None], axis=2)
        change = np.abs(niche[:, None] - niche[None]).sum(2)
        near, far = change[(distance > 0) & (distance < 210)].mean(), change[distance > 600].mean()
        assert near < 0.8 * far


def test_noise_ceiling_is_the_correlation_of_rate_and_counts(slides):
    slide = slides["MINI1"]
    ceiling = noise_ceiling(slide)
    counts, rate = slide.X.toarray(), slide.layers["rate"]
    gene = slide.var_names.get_loc("EPCAM")
    counted, true = (np.log1p(1e4 * values[:, gene] / values.sum(1)) for values in (counts, rate))
    assert ceiling["EPCAM"] == pytest.approx(np.corrcoef(counted, true)[0, 1], abs=1e-4)
    assert ceiling[slide.var.kind == "visible"].mean() > 0.6
    assert ceiling[slide.var.kind == "invisible"].mean() > 0.6
    assert ceiling[slide.var.kind == "noise"].isna().all()
