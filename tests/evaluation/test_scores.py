"""Scores are computed from moments; intervals resample patients and genes, not spots."""

import numpy as np
import pandas as pd
import pytest

from peka_lite.evaluation import bootstrap_difference, bootstrap_interval, mean_scores, pool_scores, scores_by_slide
from peka_lite.evaluation.scores import slide_moments
from peka_lite.probe import pearson, r2, rmse, spearman


def run(signal=0.5, *, seed=0, patients=6, slides=1, spots=40, genes=12, shift=0.0, effect=0.0, noise_seed=1):
    """Return moments of one normalization with a fold per patient; `effect` is the sd of patients' signal."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(noise_seed)
    tables, raw = [], {}
    for f in range(patients):
        Y = rng.normal(size=(slides * spots, genes)) + 5
        strength = signal + effect * rng.normal()
        P = strength * (Y - 5) + other.normal(size=Y.shape) + shift
        names = np.repeat([f"s{f}{k}" for k in range(slides)], spots)
        table = slide_moments(Y, P, slides=names, patients=np.repeat(f"p{f}", len(Y)), genes=range(genes))
        tables.append(table.assign(normalization="x", fold=f))
        raw[f] = (Y, P)
    return pd.concat(tables, ignore_index=True), raw


@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_pooled_and_slide_scores_equal_those_of_the_rows(shift):
    moments, raw = run(slides=3, shift=shift)
    pooled = pool_scores(moments).set_index(["fold", "gene"])
    within = scores_by_slide(moments).set_index(["slide", "gene"])
    for f, (Y, P) in raw.items():
        for name, score in {"pcc": pearson, "r2": r2, "rmse": rmse, "spearman": spearman}.items():
            if name in pooled:
                np.testing.assert_allclose(pooled[name][f], score(Y, P), rtol=1e-10, atol=1e-12)
            expected = score(Y[40:80], P[40:80])
            np.testing.assert_allclose(within[name][f"s{f}1"], expected, rtol=1e-10, atol=1e-12)


def test_predictions_far_from_zero_with_little_variance_are_accurate():
    moments, raw = run(slides=2, shift=1e6)
    Y, P = raw[0]
    np.testing.assert_allclose(pool_scores(moments).query("fold == 0")["pcc"], pearson(Y, P), atol=1e-6)
    assert np.isfinite(pool_scores(moments)["pcc"]).all()


def test_constant_predictions_give_nan():
    Y = np.random.default_rng(0).normal(size=(20, 2))
    P = np.stack([np.full(20, 0.1 + 0.2), Y[:, 1]], axis=1)
    table = slide_moments(Y, P, slides=["a"] * 20, patients=["p"] * 20, genes=["g", "h"])
    table = table.assign(normalization="x", fold=0)
    assert pool_scores(table)["pcc"].isna().tolist() == [True, False]
    assert scores_by_slide(table)["pcc"].isna().tolist() == [True, False]
    assert bootstrap_interval(table)["pcc"] == pytest.approx(1.0)


@pytest.mark.parametrize("side", ["measured", "predicted"])
def test_constants_have_no_score_however_their_means_are_rounded(side):
    pair = np.full((60, 1), 0.1 + 0.2), np.random.default_rng(0).normal(size=(60, 1))
    Y, P = pair if side == "measured" else pair[::-1]
    names = np.repeat(["a", "b", "c"], [7, 23, 30])
    table = slide_moments(Y, P, slides=names, patients=names, genes=["g"]).assign(normalization="x", fold=0)
    for scores in (pool_scores(table), scores_by_slide(table)):
        assert scores["pcc"].isna().all()
        assert scores["r2"].isna().all() == (side == "measured")
        assert np.isfinite(scores["rmse"]).all()
    assert scores["spearman"].isna().all()


def test_mean_scores_are_over_genes_then_folds_of_each_normalization():
    table = pd.DataFrame({"normalization": ["x"] * 3 + ["y"], "fold": [0, 0, 1, 0], "r2": [0.0, 1, 2, 5]})
    means = mean_scores(table.assign(rmse=table["r2"] + 1, spearman=[np.nan, 0.5, 0.1, np.nan]))
    assert means["x"] == pytest.approx({"r2": 1.25, "rmse": 2.25, "spearman": 0.3})
    assert means["y"] == pytest.approx({"r2": 5, "rmse": 6, "spearman": np.nan}, nan_ok=True)


def test_mean_is_over_genes_then_folds_or_slides():
    moments, raw = run(slides=2)
    score = bootstrap_interval(moments)
    per_fold = [pearson(*raw[f]).mean() for f in raw]
    assert score["per_fold"] == pytest.approx(per_fold)
    assert score["pcc"] == pytest.approx(np.mean(per_fold))
    assert bootstrap_interval(moments, how="slides")["pcc"] == pytest.approx(scores_by_slide(moments)["pcc"].mean())
    assert (score["unit"], score["n_units"]) == ("patient", 6)


def test_more_spots_of_the_same_patients_do_not_narrow_the_interval():
    def width(moments):
        score = bootstrap_interval(moments)
        return score["ci_high"] - score["ci_low"]

    few, _ = run(effect=0.4, spots=300)
    many, _ = run(effect=0.4, spots=3000)
    patients, _ = run(effect=0.4, spots=300, patients=24)
    assert width(many) > 0.6 * width(few)
    assert width(patients) < 0.6 * width(few)


def test_intervals_have_their_nominal_coverage():
    """Simulate cohorts with patient effects: the true mean is inside about 95 of 100 intervals."""
    intervals = []
    for seed in range(150):
        moments, _ = run(effect=0.3, seed=seed, noise_seed=1000 + seed, patients=6, spots=60, genes=4)
        score = bootstrap_interval(moments, n_boot=300, seed=seed)
        intervals.append((score["pcc"], score["ci_low"], score["ci_high"]))
    mean = np.mean([t[0] for t in intervals])
    coverage = np.mean([low <= mean <= high for _, low, high in intervals])
    assert 0.9 < coverage < 1


def test_unit_is_the_slide_for_one_patient():
    moments, _ = run()
    one = moments.assign(patient="p0")
    assert bootstrap_interval(one)["unit"] == "slide"
    assert bootstrap_interval(moments.assign(patient="unknown"))["unit"] == "slide"
    alone = bootstrap_interval(moments[moments["fold"] == 0])
    assert alone["n_units"] == 1
    assert np.isnan(alone["ci_low"])
    assert np.isfinite(alone["pcc"])


def test_unit_is_the_patient_for_random_spot_folds():
    """With random spots every patient is in every fold, but the units are still the patients."""
    moments, _ = run(slides=1)
    parts = [moments.assign(fold=k, patient=moments["patient"], slide=moments["slide"]) for k in range(5)]
    score = bootstrap_interval(pd.concat(parts, ignore_index=True))
    assert (score["unit"], score["n_units"], len(score["per_fold"])) == ("patient", 6, 5)


def test_paired_difference_has_a_narrower_interval_than_the_scores():
    a, _ = run(0.6, effect=0.3)
    b, _ = run(0.5, effect=0.3)
    difference, score = bootstrap_difference(a, b), bootstrap_interval(a)
    assert difference["pcc"] == pytest.approx(score["pcc"] - bootstrap_interval(b)["pcc"])
    assert difference["ci_low"] > 0
    assert difference["ci_high"] - difference["ci_low"] < 0.5 * (score["ci_high"] - score["ci_low"])
    back = bootstrap_difference(b, a)
    assert (back["pcc"], back["ci_low"]) == (pytest.approx(-difference["pcc"]), pytest.approx(-difference["ci_high"]))


def test_unpaired_moments_are_rejected():
    a, _ = run()
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap_difference(a, run(seed=5)[0])  # other measured values
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap_difference(a, a[a["gene"] != 3])
    with pytest.raises(ValueError, match="one normalization"):
        bootstrap_interval(pd.concat([a, a.assign(normalization="y")]))
    with pytest.raises(ValueError, match="unknown how 'spots'"):
        bootstrap_interval(a, how="spots")


def test_interval_depends_on_the_seed():
    a, _ = run()
    assert bootstrap_interval(a, seed=3) == bootstrap_interval(a, seed=3)
    assert bootstrap_interval(a, seed=3) != bootstrap_interval(a, seed=4)
