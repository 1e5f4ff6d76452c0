"""Check features in a file: values, the cohort's order and the recorded origin."""

import anndata as ad
import numpy as np
import pytest
import torch

from peka_lite.backbones import embed_tiles, load_backbone
from peka_lite.experiments import write_features

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


def test_features_and_coordinates_follow_the_cohorts_order(mini_cohort, tmp_path):
    student = load_backbone("mini", weights="random")
    write_features(mini_cohort, tmp_path / "f.h5ad", student, source={"method": "none"}, device="cpu")
    adata = ad.read_h5ad(tmp_path / "f.h5ad")
    assert np.array_equal(adata.X, embed_tiles(student, mini_cohort.tiles, device="cpu"))
    assert list(adata.obs_names) == list(mini_cohort.adata.obs_names)
    assert list(adata.obs["slide"]) == list(mini_cohort.obs["slide"])
    first = mini_cohort.slides[0]
    assert np.array_equal(adata.obsm["spatial"][: first.n_spots], first.adata.obsm["spatial"][:, :2])
    record = adata.uns["peka_lite"]
    assert (record["backbone"], record["weights"], record["method"]) == ("mini", "random, seed 0", "none")
    assert list(tmp_path.iterdir()) == [tmp_path / "f.h5ad"]


def test_features_of_a_custom_network_record_its_preprocessing(mini_cohort, tmp_path):
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "input_size": 64}
    write_features(mini_cohort, tmp_path / "f.h5ad", net, **half, device="cpu")
    adata = ad.read_h5ad(tmp_path / "f.h5ad")
    assert np.array_equal(adata.X, embed_tiles(net, mini_cohort.tiles, **half, device="cpu"))
    record = adata.uns["peka_lite"]
    assert (record["backbone"], record["weights"]) == ("Sequential", "a network in memory")
    assert [list(record[name]) for name in half] == [[0.5] * 3, [0.5] * 3, [64]]


def test_output_must_end_in_h5ad(mini_cohort, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.h5ad"):
        write_features(mini_cohort, tmp_path / "f.csv", None)


def test_failed_write_leaves_no_file(mini_cohort, tmp_path, monkeypatch):
    def fail(adata, path, **_):
        path.write_bytes(b"partial")
        raise OSError("no space left")

    monkeypatch.setattr("peka_lite.experiments._embed.write_h5ad", fail)
    with pytest.raises(OSError, match="no space"):
        write_features(mini_cohort, tmp_path / "f.h5ad", load_backbone("mini", weights="random"), device="cpu")
    assert list(tmp_path.iterdir()) == []
