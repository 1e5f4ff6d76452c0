"""scfoundation-mini: read by the published model's road, small, deterministic, and it has learnt something."""

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
from peka_lite.teachers._checkpoint import read_encoder
from peka_lite.teachers.load import load_teacher
from peka_lite.teachers.scfoundation import ScFoundation

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "pretraining"))  # scripts, beside the package

import teacher as pretraining

FILE = resources.files("peka_lite.teachers").joinpath("weights/scfoundation_mini.ckpt")


@pytest.fixture(scope="module")
def mini():
    return load_teacher("scfoundation-mini")


@pytest.fixture(scope="module")
def spots():
    """A few spots of a cohort that nobody trained on, beside the domains' true shares."""
    counts, mixture = pretraining.draw_cohort(np.random.SeedSequence(11), n_slides=2, n_spots=45)
    var = _mini_genes.draw_genes(np.random.default_rng(0))[0]
    obs = pd.DataFrame(index=[f"spot{i}" for i in range(len(counts))])
    adata = ad.AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs, pd.DataFrame(index=var.index))
    return adata, mixture


def test_the_vocabulary_is_the_mini_cohorts_genes(mini, mini_cohort):
    assert list(mini.genes) == list(mini_cohort.slides[0].adata.var_names)
    assert mini.coverage(mini_cohort.adata) == 1


def test_the_file_is_small_and_of_the_published_layout():
    assert Path(str(FILE)).stat().st_size < 4 * 2**20
    entry = torch.load(str(FILE), weights_only=True)["cell"]
    assert {tensor.dtype for tensor in entry["state_dict"].values()} == {torch.float16}
    assert read_encoder(Path(str(FILE)), key="cell").config.n_genes == 1500


def test_the_mini_cohort_is_embedded_alike_twice(mini, mini_cohort):
    adata = mini_cohort.adata[:20]
    once = mini.embed(adata, device="cpu")
    assert (once.shape, once.dtype) == ((20, 4 * mini.encoder.config.hidden_dim), np.float32)
    assert np.isfinite(once).all()
    np.testing.assert_array_equal(load_teacher("scfoundation-mini").embed(adata, device="cpu"), once)


def explained(teacher, adata, mixture) -> float:
    """R2 of the domains' shares, told from the embedding of another patient."""
    E, half = teacher.embed(adata, device="cpu"), len(mixture) // 2
    probe = PCARidge(None, 100.0, fit_intercept=True).fit(E[:half], mixture[:half])
    return r2_score(mixture[half:], probe.predict(E[half:]))


def test_domains_are_told_apart_far_better_than_by_random_weights(mini, spots):
    c = mini.encoder.config
    untaught = ScFoundation.random(mini.genes, hidden_dim=c.hidden_dim, depth=c.depth, heads=c.heads)
    assert explained(mini, *spots) > explained(untaught, *spots) + 0.2


def test_unknown_genes_are_one_clear_error(mini, spots):
    adata = spots[0].copy()
    adata.var_names = [f"Gm{i}" for i in range(adata.n_vars)]
    with pytest.raises(ValueError, match=r"only 0% of the data's expressed genes are in the vocabulary.*Gm0"):
        mini.embed(adata)


def test_a_file_given_beside_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"takes precision and mapping, not checkpoint"):
        load_teacher("scfoundation-mini", checkpoint="x.ckpt")
    with pytest.raises(ValueError, match=r"teacher_checkpoint belongs to teacher 'scfoundation', not"):
        RunConfig(teacher="scfoundation-mini", teacher_checkpoint=str(tmp_path))


def test_a_run_takes_it_by_name(mini, mini_root):
    config = RunConfig(cohort=str(mini_root), teacher="scfoundation-mini", weights="random")
    assert config.load_teacher().fingerprint == mini.fingerprint


def test_the_script_writes_a_checkpoint_that_loads(tmp_path, mini, capsys):
    out, log = tmp_path / "small.ckpt", tmp_path / "log.csv"
    pretraining.main(["--steps", "5", "--cohorts", "1", "--out", str(out), "--log", str(log), "--seed", "3"])
    made = ScFoundation.from_checkpoint(out, genes=mini.genes)
    assert made.encoder.config == mini.encoder.config
    assert made.fingerprint != mini.fingerprint
    with log.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["5"]
    assert all(np.isfinite(float(rows[0][name])) for name in ("loss", "held_out_loss"))
    assert re.search("held_out_loss", capsys.readouterr().out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "small.ckpt"]


def test_masked_values_do_not_reach_the_encoder():
    """What a masked gene holds changes neither the prediction of it nor that of others."""
    counts = np.random.default_rng(0).poisson(2, (3, 1500)).astype(np.uint16)
    corpus = counts, np.zeros_like(counts), np.full(1500, 1 / 1500)
    values, masked, depths, genes, _ = pretraining.make_batch(np.random.default_rng(1), corpus, np.arange(3), 100)
    torch.manual_seed(0)
    model = pretraining.MaskedModel(pretraining.EncoderConfig(8, 1, 2, 1502, 5, 1.0, 102, 103))
    told = model(values, masked, depths, genes)
    torch.testing.assert_close(model(torch.where(masked, values + 1, values), masked, depths, genes), told)
    assert not torch.allclose(model(torch.where(masked, values, values + 1), masked, depths, genes), told)
