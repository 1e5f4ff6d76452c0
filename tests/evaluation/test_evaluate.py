"""Leakage of every step is detected from the recorded row ids."""

import dataclasses
from importlib import import_module

import anndata as ad
import numpy as np
import pytest
from scipy import sparse
from scipy.stats import spearmanr

from peka_lite._core.hashing import row_ids
from peka_lite.data import Cohort, expression_targets, top_hvg
from peka_lite.evaluation import ALPHAS, PROTOCOLS, FittedFeatures, LeakError, evaluate, folds
from peka_lite.experiments import RunConfig, features as features_module, run, targets
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
    return X.astype(np.float32)


def strict(cohort, splits, X, **options):
    return evaluate(cohort, splits, X, protocol=STRICT, n_genes=20, **options)


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
    X = np.random.default_rng(0).normal(size=(len(cohort), 5))
    with pytest.raises(LeakError, match="same counts as training spots"):
        strict(cohort, folds(cohort, "patient", 4), X)


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

    embeddings, real = [], targets.embed_cohort
    monkeypatch.setattr(targets, "embed_cohort", lambda *a, **k: embeddings.append(real(*a, **k)) or embeddings[-1])
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
    real, all_tiles = features_module.fit, mini_cohort.tiles
    trained = lambda model, tiles, *a, **k: real(model, all_tiles[: len(tiles)], *a, **k)  # noqa: E731
    monkeypatch.setattr(features_module, "fit", trained)
    with pytest.raises(LeakError, match="the student learned from"):
        run(small(mini_root), tmp_path / "out")


def test_features_fitted_on_the_inner_test_rows_are_rejected(mini_cohort, splits, frozen):
    """They are fitted without the outer fold only, so they must not be used to choose alpha."""
    ids = mini_cohort.tiles.ids

    def fit(rows):
        return FittedFeatures(frozen, {"student": ids[splits[0][0]]})

    with pytest.raises(LeakError, match="inner fold of 0 and 1: the student learned from"):
        strict(mini_cohort, splits, fit)


@pytest.mark.parametrize("kind", ["counts", "all genes", "tiles"])
def test_declared_rows_are_checked_by_fold(mini_cohort, splits, frozen, kind):
    """A fit on a fold's training rows leaks where these are held out; rows of a protocol for all spots do not."""
    ids = {
        "counts": row_ids(mini_cohort.adata.X),
        "all genes": np.concatenate([row_ids(slide.adata.X) for slide in mini_cohort.slides]),
        "tiles": mini_cohort.tiles.ids,
    }[kind]
    train, test = splits[0]
    hest = PROTOCOLS["hest"]
    with pytest.raises(LeakError, match=rf"fold 1: the features learned from {len(splits[1][1])} of {len(train)} rows"):
        evaluate(mini_cohort, splits, frozen, protocol=hest, learned_from=ids[train])
    with pytest.raises(LeakError, match=r"fold 0: the encoder learned from 1 of 1 rows"):
        evaluate(mini_cohort, splits, frozen, protocol=hest, learned_from={"encoder": ids[test[:1]]})
    paper = evaluate(
        mini_cohort, folds(mini_cohort, "spot", 3), frozen, protocol=PROTOCOLS["paper"], n_genes=5, learned_from=ids
    )
    assert paper.learned_from == "declared"


def test_rows_excluded_from_training_may_not_be_learned_from(mini_cohort, splits, frozen):
    use = np.arange(len(mini_cohort)) % 2 == 0
    X, options = frozen, {"protocol": PROTOCOLS["hest"], "n_genes": 5, "train_mask": use}
    ids, given = mini_cohort.tiles.ids, []

    def fit(rows):
        given.append(rows)
        return FittedFeatures(X, {"student": ids[rows]})

    assert evaluate(mini_cohort, splits, fit, **options).learned_from == "recorded by each fit"
    for rows, (train, _) in zip(given, splits, strict=True):
        assert rows.dtype == np.int64
        assert rows.tolist() == train[use[train]].tolist()
    with pytest.raises(LeakError, match="fold 0: the student learned from"):
        evaluate(mini_cohort, splits, lambda rows: FittedFeatures(X, {"student": ids[rows - 1]}), **options)


def test_origin_of_the_features_is_shown_with_the_scores(mini_cohort, splits, frozen):
    options = {"protocol": PROTOCOLS["hest"], "n_genes": 5}
    origins = {
        "not declared": evaluate(mini_cohort, splits, frozen, **options),
        "declared and checked": evaluate(mini_cohort, splits, frozen, learned_from={"encoder": None}, **options),
        "recorded by each fit": evaluate(mini_cohort, splits, FittedFeatures(frozen, {}), **options),
    }
    plain = origins["not declared"]
    scores = plain.scores[plain.scores["normalization"] == "log1p"]
    means = "PCC {pcc:.3f}, R2 {r2:.3f}, RMSE {rmse:.3f}".format(**scores[["pcc", "r2", "rmse"]].mean())
    for origin, result in origins.items():
        assert result.learned_from == origin
        assert f"protocol: hest, targets: log1p, {means}, " in repr(result)
        assert f"features learned from: {origin}" in repr(result)
        assert f"<td>{origin}</td>" in result._repr_html_()
        assert result.scores.equals(plain.scores)
    some = evaluate(mini_cohort, splits, lambda rows: frozen if 0 in rows else FittedFeatures(frozen, {}), **options)
    assert some.learned_from == "not declared"


def test_function_is_called_with_the_rows_without_each_pair_of_folds(mini_cohort, splits, frozen):
    given = []
    strict(mini_cohort, splits, lambda rows: given.append(rows) or frozen)
    held_out = [{*np.setdiff1d(np.arange(len(mini_cohort)), rows)} for rows in given]
    tests = [{*test} for _, test in splits]
    assert [a | b for a in tests for b in tests if tests.index(a) < tests.index(b)] == held_out[:3]
    assert held_out[3:] == tests
    given.clear()
    everything = folds(mini_cohort, "spot", 3)
    evaluate(mini_cohort, everything, lambda rows: given.append(rows) or frozen, protocol=PROTOCOLS["paper"])
    assert {len(rows) for rows in given} == {len(mini_cohort)}  # the protocol trains on all spots


@pytest.mark.parametrize("returns", ["array", "function of it", "FittedFeatures", "copies"])
def test_sums_are_computed_once_for_the_same_object(mini_cohort, splits, frozen, monkeypatch, returns):
    real, calls = evaluate_module.gather, []
    monkeypatch.setattr(evaluate_module, "gather", lambda *a, **k: calls.append(a) or real(*a, **k))
    fitted = FittedFeatures(frozen, {})
    X = {
        "array": frozen, "function of it": lambda rows: frozen, "FittedFeatures": lambda rows: fitted,
        "copies": lambda rows: frozen.copy(),  # may have the address of the last one
    }[returns]  # fmt: skip
    result = strict(mini_cohort, splits, X)
    assert len(calls) == (6 if returns == "copies" else 1)
    assert result.scores.equals(strict(mini_cohort, splits, frozen).scores)


def test_features_that_differ_by_fold_are_not_mixed(mini_cohort, splits, frozen):
    """Each fold gets its own features, though arrays of the same shape follow each other in memory."""
    noise = np.random.default_rng(1).normal(size=frozen.shape).astype(np.float32)
    first = len(splits[0][0])
    mixed = evaluate(
        mini_cohort, splits, lambda rows: frozen + noise * (rows.tolist() == splits[0][0].tolist()),
        protocol=PROTOCOLS["hest"],
    )  # fmt: skip
    whole = [evaluate(mini_cohort, splits, X, protocol=PROTOCOLS["hest"]).scores for X in (frozen + noise, frozen)]
    assert first < len(mini_cohort)
    for fold in range(3):
        expected = whole[fold > 0].query("fold == @fold").reset_index(drop=True)
        assert mixed.scores.query("fold == @fold").reset_index(drop=True).equals(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X: X[:-1], "rows and 40 columns for"),
        (lambda X: X[:, :0], "and 0 columns for"),
        (lambda X: X[:, 0], "features are a 2-D array of real numbers"),
        (lambda X: X.astype(str), "features are a 2-D array of real numbers"),
        (lambda X: X > 0, "features are a 2-D array of real numbers .* not bool"),
        (lambda X: X + 1j, "not complex"),
        (lambda X: None, "features are a 2-D array"),
        (lambda X: np.where(np.arange(len(X))[:, None] == 7, np.nan, X), "NaN or infinite .* row 7, column 0"),
        (lambda X: np.where(np.arange(X.shape[1]) == 3, np.inf, X), "NaN or infinite .* row 0, column 3"),
        (lambda X: FittedFeatures(X[:-1], {}), "rows and 40 columns for"),
        (lambda X: FittedFeatures(X, {}, np.zeros(3, np.uint64)), "embedding_ids has 3 rows for"),
    ],
)
def test_invalid_features_are_rejected_before_any_work(mini_cohort, splits, frozen, monkeypatch, change, message):
    X = change(frozen)
    with pytest.raises(ValueError, match=message):
        strict(mini_cohort, splits, lambda rows: X)
    monkeypatch.setattr(evaluate_module, "LeakChecker", None)
    with pytest.raises(ValueError, match=message):
        strict(mini_cohort, splits, X)


def test_declarations_without_row_ids_are_rejected(mini_cohort, splits, frozen):
    for wrong in (splits[0][0], {"encoder": [1, 2]}, mini_cohort.tiles.ids[:4].reshape(2, 2)):
        with pytest.raises(ValueError, match=r"no row ids for '(features|encoder)': give the uint64 array of"):
            strict(mini_cohort, splits, frozen, learned_from=wrong)
    with pytest.raises(ValueError, match="leave out learned_from"):
        strict(mini_cohort, splits, FittedFeatures(frozen, {}), learned_from={})


def test_folds_and_mask_must_fit_the_cohort(mini_cohort, splits, frozen):
    (train, test), *others = splits
    with pytest.raises(ValueError, match="training rows of fold 0 are not all rows outside"):
        strict(mini_cohort, [(train[1:], test), *others], frozen)
    for mask in (np.ones(len(mini_cohort), dtype=int), np.ones(3, dtype=bool)):
        with pytest.raises(ValueError, match="train_mask is one bool for each of the"):
            strict(mini_cohort, splits, frozen, train_mask=mask)


def test_rows_are_hashed_once_for_a_cohort(mini_cohort, splits, frozen, monkeypatch):
    cohort, hashed = Cohort(mini_cohort.slides), []
    real = import_module("peka_lite.data.hest").row_ids
    monkeypatch.setattr("peka_lite.data.hest.row_ids", lambda rows: hashed.append(rows.shape) or real(rows))
    for _ in range(2):
        evaluate(cohort, splits, frozen, protocol=PROTOCOLS["hest"], n_genes=5)
    assert hashed == [cohort.adata.shape]


def test_saved_probe_says_that_it_has_an_intercept(mini_cohort, splits, frozen):
    """Also where the protocol scores without one: the saved probe predicts in the genes' units."""
    result = evaluate(mini_cohort, splits, frozen, protocol=PROTOCOLS["hest"], n_genes=5)
    test, genes, _, P = result.predicted[1]
    probe, _ = result.probes[1]
    train = splits[1][0]
    means = expression_targets(mini_cohort.adata, genes, method="log1p")[train].mean(0, dtype=float)
    assert probe.fit_intercept
    np.testing.assert_allclose(probe.predict(frozen[test]), P + means, rtol=1e-6)


def test_leakage_is_detected_from_row_ids(mini_cohort, splits):
    """Row ids of all embeddings are detected, whatever rows the features claim to use."""
    E = np.random.default_rng(0).normal(size=(len(mini_cohort), 5)).astype(np.float32)
    labeler = PseudoLabeler("kmeans", n_clusters=4).fit(E)
    X = FittedFeatures(E, {"clusters": labeler.fitted_on_}, row_ids(E))
    with pytest.raises(LeakError, match="the clusters learned from"):
        strict(mini_cohort, splits, lambda rows: X)


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
    result, X = strict(mini_cohort, splits, frozen), frozen
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


def test_scores_agree_with_predictions(mini_cohort, splits, frozen):
    result = strict(mini_cohort, splits, frozen)
    assert list(result.scores) == ["normalization", "fold", "gene", "pcc", "r2", "rmse", "spearman"]
    table = result.scores.set_index(["normalization", "fold", "gene"])
    for fold, (_, genes, measured, predicted) in result.predicted.items():
        y, p, row = measured[:, 4].astype(float), predicted[:, 4], table.loc[("log1p-cp10k", fold, genes[4])]
        assert row["pcc"] == pytest.approx(np.corrcoef(y, p)[0, 1], abs=1e-9)
        assert row["r2"] == pytest.approx(1 - ((y - p) ** 2).mean() / y.var(), abs=1e-9)
        assert row["rmse"] == pytest.approx(np.sqrt(((y - p) ** 2).mean()), abs=1e-9)
        assert row["spearman"] == pytest.approx(spearmanr(y, p).statistic, abs=1e-9)
