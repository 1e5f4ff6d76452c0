"""Leaks are planted here, and refused by what was recorded, not by what is claimed."""

import numpy as np
import pytest

import peka_lite.evaluation.evaluate as room
import peka_lite.experiments._teacher_labels as lessons
import peka_lite.experiments.cache as students
from peka_lite._core.hashing import row_ids
from peka_lite.data.expression import expression_targets, top_hvg
from peka_lite.data.hest import Cohort
from peka_lite.evaluation.evaluate import evaluate
from peka_lite.evaluation.folds import folds
from peka_lite.evaluation.leaks import LeakError
from peka_lite.evaluation.protocols import ALPHAS, PROTOCOLS
from peka_lite.evaluation.scores import pool_pcc
from peka_lite.experiments.cache import Student
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.run import run
from peka_lite.probe.moments import CellSums
from peka_lite.teachers.pca import PCATeacher
from peka_lite.teachers.pseudolabels import PseudoLabeler

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
    """Features that know a little about expression, and learned from nothing."""
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


def test_a_patient_on_both_sides_is_refused(mini_cohort, splits, frozen):
    (_, test), *others = splits
    moved = test[:3]
    mixed = [(np.setdiff1d(np.arange(len(mini_cohort)), test[3:]), test[3:])]
    mixed += [(np.setdiff1d(a, moved), np.append(b, moved)) if k == 0 else (a, b) for k, (a, b) in enumerate(others)]
    with pytest.raises(LeakError, match="on both sides"):
        strict(mini_cohort, mixed, frozen)


def test_one_section_under_two_patients_is_refused(mini_cohort):
    import dataclasses

    first = mini_cohort.slides[0]
    twin = dataclasses.replace(first, id="COPY", patient="somebody else")
    cohort = Cohort((*mini_cohort.slides, twin))
    student = Student(np.random.default_rng(0).normal(size=(len(cohort), 5)), {}, None, {}, None)
    with pytest.raises(LeakError, match="very counts of training spots"):
        strict(cohort, folds(cohort, "patient", 4), lambda left_out: student)


def test_genes_chosen_on_all_rows_are_refused(mini_cohort, splits, frozen, monkeypatch):
    monkeypatch.setattr(room, "top_hvg", lambda adata, *, rows, **k: top_hvg(adata, rows=None, **k))
    with pytest.raises(LeakError, match="fold 0: the choice of genes learned from"):
        strict(mini_cohort, splits, frozen)
    evaluate(mini_cohort, splits, frozen, protocol=PROTOCOLS["hest"], n_genes=20)  # which promises no such thing


def test_pca_and_ridge_on_all_rows_are_refused(mini_cohort, splits, frozen, monkeypatch):
    real = CellSums.over
    monkeypatch.setattr(CellSums, "over", lambda self, cells: real(self, self.cells))
    with pytest.raises(LeakError, match="PCA and ridge learned from"):
        strict(mini_cohort, splits, frozen)


def test_clusters_of_all_rows_are_refused(mini_root, mini_cohort, tmp_path, monkeypatch, fresh_cache):
    class Everyone(PseudoLabeler):
        def fit(self, E):
            super().fit(everything[-1])
            self.labels_ = self.labels_[: len(E)]
            return self

    everything, real = [], lessons.embed_cohort
    monkeypatch.setattr(lessons, "embed_cohort", lambda *a, **k: everything.append(real(*a, **k)) or everything[-1])
    monkeypatch.setattr(RunConfig, "labeler", lambda self: Everyone(resolution=0.5))
    with pytest.raises(LeakError, match="the clusters learned from"):
        run(small(mini_root), tmp_path / "out")


def test_a_teacher_of_all_rows_is_refused(mini_root, mini_cohort, tmp_path, monkeypatch, fresh_cache):
    real = PCATeacher.fit
    monkeypatch.setattr(PCATeacher, "fit", lambda self, adata: real(self, [s.adata for s in mini_cohort.slides]))
    with pytest.raises(LeakError, match="the teacher learned from"):
        run(small(mini_root), tmp_path / "out")
    with pytest.raises(LeakError, match="the teacher learned from"):
        run(small(mini_root, method="none", features="teacher", protocol=None, split="patient"), tmp_path / "out2")


def test_a_student_taught_on_test_spots_is_refused(mini_root, mini_cohort, tmp_path, monkeypatch, fresh_cache):
    real = students.fit
    everyone = mini_cohort.tiles
    monkeypatch.setattr(students, "fit", lambda model, tiles, *a, **k: real(model, everyone[: len(tiles)], *a, **k))
    with pytest.raises(LeakError, match="the student learned from"):
        run(small(mini_root), tmp_path / "out")


def test_an_inner_student_that_saw_the_inner_test_rows_is_refused(mini_root, tmp_path, monkeypatch, fresh_cache):
    """The student of the outer fold is honest about that fold, yet may not choose its penalty."""
    from peka_lite.experiments.features import FeatureSource

    real = FeatureSource._rows
    monkeypatch.setattr(FeatureSource, "_rows", lambda self, left_out: real(self, left_out[:1]))
    with pytest.raises(LeakError, match=r"inner fold of 0 and 1: the (teacher|clusters|student) learned from"):
        run(small(mini_root), tmp_path / "out")


def test_a_lie_about_the_rows_does_not_help(mini_cohort, splits):
    """Nobody is asked for rows: a record made from all embeddings is recognized, whatever its maker meant."""
    E = np.random.default_rng(0).normal(size=(len(mini_cohort), 5)).astype(np.float32)
    labeler = PseudoLabeler("kmeans", n_clusters=4).fit(E)
    student = Student(E, {"clusters": labeler.fitted_on_}, row_ids(E), {}, None)
    with pytest.raises(LeakError, match="the clusters learned from"):
        strict(mini_cohort, splits, lambda left_out: student)


def test_test_rows_decide_nothing(mini_cohort, splits, frozen):
    """Spoil one patient's counts: the fold that holds him out keeps genes, penalty and predictions; others do not."""
    before = strict(mini_cohort, splits, frozen)
    rng = np.random.default_rng(1)
    spoiled = [s for s in mini_cohort.slides]
    _, test = splits[1]
    victims = set(mini_cohort.obs.loc[test, "slide"])
    import dataclasses

    import anndata as ad
    from scipy import sparse

    for k, slide in enumerate(spoiled):
        if slide.id in victims:
            noise = sparse.csr_matrix(rng.poisson(2, slide.adata.shape).astype(np.float32))
            adata = ad.AnnData(noise, obs=slide.adata.obs, var=slide.adata.var, obsm=dict(slide.adata.obsm))
            spoiled[k] = dataclasses.replace(slide, adata=adata)
    after = strict(Cohort(tuple(spoiled)), splits, frozen)
    m = "log1p-cp10k"
    assert before.alphas[m][1] == after.alphas[m][1]
    assert before.predicted[1][1] == after.predicted[1][1]
    np.testing.assert_allclose(before.predicted[1][3], after.predicted[1][3], rtol=1e-6, atol=1e-9)
    assert before.predicted[0][1] != after.predicted[0][1]


def test_the_chosen_penalty_is_the_best_of_the_inner_folds(mini_cohort, splits, frozen):
    """Against a plain search by refitting, in scikit-learn's terms."""
    from peka_lite.probe.metrics import pearson
    from peka_lite.probe.pca_ridge import PCARidge

    done, X = strict(mini_cohort, splits, frozen), frozen(()).features
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
        assert done.alphas["log1p-cp10k"][i] == ALPHAS[int(scores.argmax())]


def test_spots_that_may_not_teach_are_still_scored(mini_cohort, splits, frozen):
    use = np.arange(len(mini_cohort)) % 2 == 0
    done = strict(mini_cohort, splits, frozen, taught_by=use)
    scored = done.moments[done.moments["normalization"] == "log1p"].drop_duplicates(["fold", "slide"])
    assert scored["n"].sum() == len(mini_cohort)
    whole = strict(mini_cohort, splits, frozen)
    assert not np.allclose(done.predicted[0][3][:, 0], whole.predicted[0][3][:, 0])


def test_moments_agree_with_predictions(mini_cohort, splits, frozen):
    done = strict(mini_cohort, splits, frozen)
    table = pool_pcc(done.moments).set_index(["normalization", "fold", "gene"])["pcc"]
    _, genes, measured, guess = done.predicted[2]
    expected = np.corrcoef(measured[:, 4], guess[:, 4])[0, 1]
    assert table["log1p-cp10k", 2, genes[4]] == pytest.approx(expected, abs=1e-9)
