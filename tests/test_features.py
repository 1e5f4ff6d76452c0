"""Features in a file: the student's own, in the cohort's order, with where they come from."""

import anndata as ad
import numpy as np
import pytest

from peka_lite.backbones import embed_tiles, load_backbone
from peka_lite.features import write_features

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


def test_every_spot_has_its_features_and_its_place(mini_cohort, tmp_path):
    student = load_backbone("mini", weights="random")
    write_features(mini_cohort, tmp_path / "f.h5ad", student, source={"method": "none"}, device="cpu")
    adata = ad.read_h5ad(tmp_path / "f.h5ad")
    assert np.array_equal(adata.X, embed_tiles(student, mini_cohort.tiles, device="cpu"))
    assert list(adata.obs_names) == list(mini_cohort.adata.obs_names)
    assert list(adata.obs["slide"]) == list(mini_cohort.obs["slide"])
    first = mini_cohort.slides[0]
    assert np.array_equal(adata.obsm["spatial"][: first.n_spots], first.adata.obsm["spatial"][:, :2])
    said = adata.uns["peka_lite"]
    assert (said["backbone"], said["weights"], said["method"]) == ("mini", "random, seed 0", "none")
    assert list(tmp_path.iterdir()) == [tmp_path / "f.h5ad"]


def test_another_ending_is_refused_before_any_work(mini_cohort, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.h5ad"):
        write_features(mini_cohort, tmp_path / "f.csv", None)


def test_nothing_half_written_stays(mini_cohort, tmp_path, monkeypatch):
    def fail(self, path, *_, **__):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(ad.AnnData, "write_h5ad", fail)
    with pytest.raises(OSError, match="no space"):
        write_features(mini_cohort, tmp_path / "f.h5ad", load_backbone("mini", weights="random"), device="cpu")
    assert list(tmp_path.iterdir()) == []
