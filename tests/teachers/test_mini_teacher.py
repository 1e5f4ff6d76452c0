"""scfoundation-mini is loaded like the published model, small, deterministic, and better than random weights."""

import csv
import re
import sys
from importlib import resources
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.metrics import r2_score

from peka_lite.data.mini import counts as _mini_genes
from peka_lite.experiments.config import RunConfig
from peka_lite.probe.pca_ridge import PCARidge
from peka_lite.teachers import ScFoundation, load_teacher
from peka_lite.teachers._checkpoint import read_encoder

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "pretraining"))  # scripts outside the package

import teacher as pretraining

FILE = resources.files("peka_lite.teachers").joinpath("weights/scfoundation_mini.ckpt")


@pytest.fixture(scope="module")
def mini():
    return load_teacher("scfoundation-mini")


@pytest.fixture(scope="module")
def spots():
    """A few spots of a held-out cohort, and the true shares of the domains."""
    counts, mixture = pretraining.draw_cohort(np.random.SeedSequence(11), n_slides=2, n_spots=45)
    var = _mini_genes.draw_genes(np.random.default_rng(0))[0]
    obs = pd.DataFrame(index=[f"spot{i}" for i in range(len(counts))])
    adata = ad.AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs, pd.DataFrame(index=var.index))
    return adata, mixture


def test_vocabulary_is_the_genes_of_the_mini_cohort(mini, mini_cohort):
    assert list(mini.genes) == list(mini_cohort.slides[0].adata.var_names)
    assert mini.coverage(mini_cohort.adata) == 1


def test_file_is_small_and_in_the_published_layout():
    assert Path(str(FILE)).stat().st_size < 4 * 2**20
    entry = torch.load(str(FILE), weights_only=True)["cell"]
    assert {tensor.dtype for tensor in entry["state_dict"].values()} == {torch.float16}
    assert read_encoder(Path(str(FILE)), key="cell").config.n_genes == 1500


def test_embedding_is_deterministic(mini, mini_cohort):
    adata = mini_cohort.adata[:20]
    once = mini.embed(adata, device="cpu")
    assert (once.shape, once.dtype) == ((20, 4 * mini.encoder.config.hidden_dim), np.float32)
    assert np.isfinite(once).all()
    np.testing.assert_array_equal(load_teacher("scfoundation-mini").embed(adata, device="cpu"), once)


def compute_r2(teacher, adata, mixture) -> float:
    """Return R2 of the domains' shares, predicted by a probe fitted on another patient."""
    E, half = teacher.embed(adata, device="cpu"), len(mixture) // 2
    probe = PCARidge(None, 100.0, fit_intercept=True).fit(E[:half], mixture[:half])
    return r2_score(mixture[half:], probe.predict(E[half:]))


def test_domains_are_predicted_better_than_by_random_weights(mini, spots):
    c = mini.encoder.config
    untrained = ScFoundation.random(mini.genes, hidden_dim=c.hidden_dim, depth=c.depth, heads=c.heads)
    assert compute_r2(mini, *spots) > compute_r2(untrained, *spots) + 0.2


def test_unknown_genes_raise_one_clear_error(mini, spots):
    adata = spots[0].copy()
    adata.var_names = [f"Gm{i}" for i in range(adata.n_vars)]
    with pytest.raises(ValueError, match=r"only 0% of the data's expressed genes are in the vocabulary.*Gm0"):
        mini.embed(adata)


def test_checkpoint_option_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"takes precision and mapping, not checkpoint"):
        load_teacher("scfoundation-mini", checkpoint="x.ckpt")
    with pytest.raises(ValueError, match=r"teacher_checkpoint belongs to teacher 'scfoundation', not"):
        RunConfig(teacher="scfoundation-mini", teacher_checkpoint=str(tmp_path))


def test_run_loads_it_by_name(mini, mini_root):
    config = RunConfig(cohort=str(mini_root), teacher="scfoundation-mini", weights="random")
    assert config.load_teacher().fingerprint == mini.fingerprint


def test_pretraining_script_writes_a_loadable_checkpoint(tmp_path, mini, capsys):
    out, log = tmp_path / "small.ckpt", tmp_path / "log.csv"
    pretraining.main(["--steps", "5", "--cohorts", "1", "--out", str(out), "--log", str(log), "--seed", "3"])
    teacher = ScFoundation.from_checkpoint(out, genes=mini.genes)
    assert teacher.encoder.config == mini.encoder.config
    assert teacher.fingerprint != mini.fingerprint
    with log.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["5"]
    assert all(np.isfinite(float(rows[0][name])) for name in ("loss", "held_out_loss"))
    assert re.search("held_out_loss", capsys.readouterr().out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "small.ckpt"]


def test_masked_values_do_not_reach_the_encoder():
    """Predictions do not depend on the values of masked genes."""
    counts = np.random.default_rng(0).poisson(2, (3, 1500)).astype(np.uint16)
    corpus = counts, np.zeros_like(counts), np.full(1500, 1 / 1500)
    values, masked, depths, genes, _ = pretraining.make_batch(np.random.default_rng(1), corpus, np.arange(3), 100)
    torch.manual_seed(0)
    model = pretraining.MaskedModel(pretraining.EncoderConfig(8, 1, 2, 1502, 5, 1.0, 102, 103))
    predicted = model(values, masked, depths, genes)
    torch.testing.assert_close(model(torch.where(masked, values + 1, values), masked, depths, genes), predicted)
    assert not torch.allclose(model(torch.where(masked, values, values + 1), masked, depths, genes), predicted)
