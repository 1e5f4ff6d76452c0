"""Leakage of every step is detected from the recorded row ids."""

import dataclasses
from importlib import import_module

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from peka_lite._core.hashing import row_ids
from peka_lite.data import Cohort, expression_targets, top_hvg
from peka_lite.evaluation import ALPHAS, PROTOCOLS, LeakError, evaluate, folds, pool_pcc
from peka_lite.experiments import FeatureSource, RunConfig, Student, _teacher_labels, cache, run
from peka_lite.probe import PCARidge, pearson
from peka_lite.probe.moments import CellSums
from peka_lite.teachers import PCATeacher, PseudoLabeler

evaluate_module = import_module("peka_lite.evaluation.evaluate")  # the package offers the function

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*random weights", "ignore:.*each patient is one fold", "ignore:.*allow"),
    pytest.mark.usefixtures("tiny_backbone"),
]
STRICT = PROTOCOLS["strict"]


@pytest.fixture
def splits(mini_cohort):
    return folds(mini_cohort, "patient", 3)


@pytest.fixture
def frozen(mini_cohort):
    """Features correlated with expression, not fitted on any row."""
    genes = mini_cohort.genes[:40]
    X = expression_targets(mini_cohort.adata, genes) + np.random.default_rng(0).normal(size=(len(mini_cohort), 40))
    student = Student(X.astype(np.float32), {}, None, {}, None)
    return lambda left_out: student


def strict(cohort, splits, features, **options):
    return evaluate(cohort, splits, features, protocol=STRICT, n_genes=20, **options)


def small(root, **changes):
    settings = {"cohort": str(root), "backbone": "tiny", "weights": "random", "protocol": "strict", "epochs": 1}
    return RunConfig(**(settings | {"n_splits": 3, "n_genes": 20, "resolution": 0.5} | changes))


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))


def test_patient_in_training_and_test_is_rejected(mini_cohort, splits, frozen):
    (_, test), *others = splits
    moved = test[:3]
    mixed = [(np.setdiff1d(np.arange(len(mini_cohort)), test[3:]), test[3:])]
    mixed += [(np.setdiff1d(a, moved), np.append(b, moved)) if k == 0 else (a, b) for k, (a, b) in enumerate(others)]
    with pytest.raises(LeakError, match="in both training and test"):
        strict(mini_cohort, mixed, frozen)


def test_section_under_two_patients_is_rejected(mini_cohort):
    first = mini_cohort.slides[0]
    twin = dataclasses.replace(first, id="COPY", patient="other")
    cohort = Cohort((*mini_cohort.slides, twin))
    student = Student(np.random.default_rng(0).normal(size=(len(cohort), 5)), {}, None, {}, None)
    with pytest.raises(LeakError, match="same counts as training spots"):
        strict(cohort, folds(cohort, "patient", 4), lambda left_out: student)


def test_genes_chosen_on_all_rows_are_rejected(mini_cohort, splits, frozen, monkeypatch):
    monkeypatch.setattr(evaluate_module, "top_hvg", lambda adata, *, rows, **k: top_hvg(adata, rows=None, **k))
    with pytest.raises(LeakError, match="fold 0: the choice of genes learned from"):
        strict(mini_cohort, splits, frozen)
    evaluate(mini_cohort, splits, frozen, protocol=PROTOCOLS["hest"], n_genes=20)  # chooses genes on all rows


def test_pca_and_ridge_on_all_rows_are_rejected(mini_cohort, splits, frozen, monkeypatch):
    real = CellSums.over
    monkeypatch.setattr(CellSums, "over", lambda self, cells: real(self, self.cells))
    with pytest.raises(LeakError, match="PCA and ridge learned from"):
        strict(mini_cohort, splits, frozen)


def test_clusters_of_all_rows_are_rejected(mini_root, mini_cohort, tmp_path, monkeypatch, fresh_cache):
    class LeakyLabeler(PseudoLabeler):
        def fit(self, E):
            super().fit(embeddings[-1])
            self.labels_ = self.labels_[: len(E)]
            return self

    embeddings, real = [], _teacher_labels.embed_cohort
    monkeypatch.setattr(
        _teacher_labels, "embed_cohort", lambda *a, **k: embeddings.append(real(*a, **k)) or embeddings[-1]
    )
    monkeypatch.setattr(RunConfig, "make_labeler", lambda self: LeakyLabeler(resolution=0.5))
    with pytest.raises(LeakError, match="the clusters learned from"):
        run(small(mini_root), tmp_path / "out")


def test_teacher_fitted_on_all_rows_is_rejected(mini_root, mini_cohort, tmp_path, monkeypatch, fresh_cache):
    real = PCATeacher.fit
    monkeypatch.setattr(PCATeacher, "fit", lambda self, adata: real(self, [s.adata for s in mini_cohort.slides]))
    with pytest.raises(LeakError, match="the teacher learned from"):
        run(small(mini_root), tmp_path / "out")
    with pytest.raises(LeakError, match="the teacher learned from"):
        run(small(mini_root, method="none", features="teacher", protocol=None, split="patient"), tmp_path / "out2")


def test_student_trained_on_test_spots_is_rejected(mini_root, mini_cohort, tmp_path, monkeypatch, fresh_cache):
    real, all_tiles = cache.fit, mini_cohort.tiles
    monkeypatch.setattr(cache, "fit", lambda model, tiles, *a, **k: real(model, all_tiles[: len(tiles)], *a, **k))
    with pytest.raises(LeakError, match="the student learned from"):
        run(small(mini_root), tmp_path / "out")


def test_inner_student_fitted_on_the_inner_test_rows_is_rejected(mini_root, tmp_path, monkeypatch, fresh_cache):
    """The student is fitted without the outer fold only, so it must not be used to choose alpha."""
    real = FeatureSource._rows
    monkeypatch.setattr(FeatureSource, "_rows", lambda self, left_out: real(self, left_out[:1]))
    with pytest.raises(LeakError, match=r"inner fold of 0 and 1: the (teacher|clusters|student) learned from"):
        run(small(mini_root), tmp_path / "out")


def test_leakage_is_detected_from_row_ids(mini_cohort, splits):
    """Row ids of all embeddings are detected, whatever rows the features claim to use."""
    E = np.random.default_rng(0).normal(size=(len(mini_cohort), 5)).astype(np.float32)
    labeler = PseudoLabeler("kmeans", n_clusters=4).fit(E)
    student = Student(E, {"clusters": labeler.fitted_on_}, row_ids(E), {}, None)
    with pytest.raises(LeakError, match="the clusters learned from"):
        strict(mini_cohort, splits, lambda left_out: student)


def test_test_rows_have_no_influence(mini_cohort, splits, frozen):
    """Corrupt one patient's counts: genes, alpha and predictions do not change where the patient is held out."""
    before = strict(mini_cohort, splits, frozen)
    rng = np.random.default_rng(1)
    slides = list(mini_cohort.slides)
    _, test = splits[1]
    corrupted = set(mini_cohort.obs.loc[test, "slide"])
    for k, slide in enumerate(slides):
        if slide.id in corrupted:
            noise = sparse.csr_matrix(rng.poisson(2, slide.adata.shape).astype(np.float32))
            adata = ad.AnnData(noise, obs=slide.adata.obs, var=slide.adata.var, obsm=dict(slide.adata.obsm))
            slides[k] = dataclasses.replace(slide, adata=adata)
    after = strict(Cohort(tuple(slides)), splits, frozen)
    m = "log1p-cp10k"
    assert before.alphas[m][1] == after.alphas[m][1]
    assert before.predicted[1][1] == after.predicted[1][1]
    np.testing.assert_allclose(before.predicted[1][3], after.predicted[1][3], rtol=1e-6, atol=1e-9)
    assert before.predicted[0][1] != after.predicted[0][1]


def test_chosen_alpha_is_the_best_of_the_inner_folds(mini_cohort, splits, frozen):
    """Compare with a search that refits the probe on rows."""
    result, X = strict(mini_cohort, splits, frozen), frozen(()).features
    for i, (train, _) in enumerate(splits):
        genes = top_hvg(mini_cohort.adata, n=20, rows=train)
        Y = expression_targets(mini_cohort.adata, genes)
        scores = np.zeros(len(ALPHAS))
        for j, (_, inner) in enumerate(splits):
            if j != i:
                rows = np.setdiff1d(train, inner)
                for k, alpha in enumerate(ALPHAS):
                    P = PCARidge(256, alpha).fit(X[rows], Y[rows]).predict(X[inner])
                    scores[k] += np.nanmean(pearson(Y[inner], P))
        assert result.alphas["log1p-cp10k"][i] == ALPHAS[int(scores.argmax())]


def test_spots_excluded_from_training_are_scored(mini_cohort, splits, frozen):
    use = np.arange(len(mini_cohort)) % 2 == 0
    result = strict(mini_cohort, splits, frozen, train_mask=use)
    scored = result.moments[result.moments["normalization"] == "log1p"].drop_duplicates(["fold", "slide"])
    assert scored["n"].sum() == len(mini_cohort)
    whole = strict(mini_cohort, splits, frozen)
    assert not np.allclose(result.predicted[0][3][:, 0], whole.predicted[0][3][:, 0])


def test_moments_agree_with_predictions(mini_cohort, splits, frozen):
    result = strict(mini_cohort, splits, frozen)
    table = pool_pcc(result.moments).set_index(["normalization", "fold", "gene"])["pcc"]
    _, genes, measured, predicted = result.predicted[2]
    expected = np.corrcoef(measured[:, 4], predicted[:, 4])[0, 1]
    assert table["log1p-cp10k", 2, genes[4]] == pytest.approx(expected, abs=1e-9)
