"""Scores follow from moments; intervals resample people and genes, never spots."""

import numpy as np
import pandas as pd
import pytest

from peka_lite.evaluation.scores import bootstrap_difference, bootstrap_interval, pcc_by_slide, pool_pcc, slide_moments
from peka_lite.probe.metrics import pearson


def run(signal=0.5, *, seed=0, patients=6, slides=1, spots=40, genes=12, shift=0.0, effect=0.0, noise_seed=1):
    """Moments of one normalization, a fold a patient; patients differ in how well they are predicted by `effect`."""
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


def test_pooled_and_by_slide_are_the_correlations_of_the_rows():
    moments, raw = run(slides=3)
    found = pool_pcc(moments).set_index(["fold", "gene"])["pcc"]
    within = pcc_by_slide(moments).set_index(["slide", "gene"])["pcc"]
    for f, (Y, P) in raw.items():
        np.testing.assert_allclose(found[f], pearson(Y, P), atol=1e-12)
        np.testing.assert_allclose(within[f"s{f}1"], pearson(Y[40:80], P[40:80]), atol=1e-12)


def test_predictions_far_from_zero_that_hardly_vary_keep_their_digits():
    moments, raw = run(slides=2, shift=1e6)
    Y, P = raw[0]
    np.testing.assert_allclose(pool_pcc(moments).query("fold == 0")["pcc"], pearson(Y, P), atol=1e-6)
    assert np.isfinite(pool_pcc(moments)["pcc"]).all()


def test_constant_predictions_have_no_score():
    Y = np.random.default_rng(0).normal(size=(20, 2))
    P = np.stack([np.full(20, 0.1 + 0.2), Y[:, 1]], axis=1)
    table = slide_moments(Y, P, slides=["a"] * 20, patients=["p"] * 20, genes=["g", "h"])
    table = table.assign(normalization="x", fold=0)
    assert pool_pcc(table)["pcc"].isna().tolist() == [True, False]
    assert pcc_by_slide(table)["pcc"].isna().tolist() == [True, False]
    assert bootstrap_interval(table)["pcc"] == pytest.approx(1.0)


def test_the_mean_is_over_genes_then_folds_or_slides():
    moments, raw = run(slides=2)
    score = bootstrap_interval(moments)
    per_fold = [pearson(*raw[f]).mean() for f in raw]
    assert score["per_fold"] == pytest.approx(per_fold)
    assert score["pcc"] == pytest.approx(np.mean(per_fold))
    assert bootstrap_interval(moments, how="slides")["pcc"] == pytest.approx(pcc_by_slide(moments)["pcc"].mean())
    assert (score["unit"], score["n_units"]) == ("patient", 6)


def test_more_spots_of_the_same_people_do_not_narrow_the_interval():
    def width(moments):
        score = bootstrap_interval(moments)
        return score["ci_high"] - score["ci_low"]

    few, _ = run(effect=0.4, spots=300)
    many, _ = run(effect=0.4, spots=3000)
    people, _ = run(effect=0.4, spots=300, patients=24)
    assert width(many) > 0.6 * width(few)
    assert width(people) < 0.6 * width(few)


def test_intervals_cover_what_they_promise():
    """Over simulated cohorts whose patients differ: the true mean lies inside in about 95 of 100."""
    truth, hits = [], 0
    for seed in range(150):
        moments, _ = run(effect=0.3, seed=seed, noise_seed=1000 + seed, patients=6, spots=60, genes=4)
        score = bootstrap_interval(moments, n_boot=300, seed=seed)
        truth.append((score["pcc"], score["ci_low"], score["ci_high"]))
    mean = np.mean([t[0] for t in truth])
    hits = np.mean([low <= mean <= high for _, low, high in truth])
    assert 0.9 < hits < 1


def test_one_patient_is_judged_by_slides_and_says_so():
    moments, _ = run()
    one = moments.assign(patient="p0")
    assert bootstrap_interval(one)["unit"] == "slide"
    assert bootstrap_interval(moments.assign(patient="unknown"))["unit"] == "slide"
    alone = bootstrap_interval(moments[moments["fold"] == 0])
    assert alone["n_units"] == 1
    assert np.isnan(alone["ci_low"])
    assert np.isfinite(alone["pcc"])


def test_random_spot_folds_are_judged_by_patients_all_the_same():
    """Under random spots every patient is in every fold; the units stay the patients."""
    moments, _ = run(slides=1)
    parts = [moments.assign(fold=k, patient=moments["patient"], slide=moments["slide"]) for k in range(5)]
    score = bootstrap_interval(pd.concat(parts, ignore_index=True))
    assert (score["unit"], score["n_units"], len(score["per_fold"])) == ("patient", 6, 5)


def test_a_paired_difference_is_steadier_than_its_scores():
    a, _ = run(0.6, effect=0.3)
    b, _ = run(0.5, effect=0.3)
    gap, score = bootstrap_difference(a, b), bootstrap_interval(a)
    assert gap["pcc"] == pytest.approx(score["pcc"] - bootstrap_interval(b)["pcc"])
    assert gap["ci_low"] > 0
    assert gap["ci_high"] - gap["ci_low"] < 0.5 * (score["ci_high"] - score["ci_low"])
    back = bootstrap_difference(b, a)
    assert (back["pcc"], back["ci_low"]) == (pytest.approx(-gap["pcc"]), pytest.approx(-gap["ci_high"]))


def test_what_cannot_be_paired_is_refused():
    a, _ = run()
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap_difference(a, run(seed=5)[0])  # other measured values
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap_difference(a, a[a["gene"] != 3])
    with pytest.raises(ValueError, match="one normalization"):
        bootstrap_interval(pd.concat([a, a.assign(normalization="y")]))
    with pytest.raises(ValueError, match="unknown way 'spots'"):
        bootstrap_interval(a, how="spots")


def test_the_same_seed_gives_the_same_interval():
    a, _ = run()
    assert bootstrap_interval(a, seed=3) == bootstrap_interval(a, seed=3)
    assert bootstrap_interval(a, seed=3) != bootstrap_interval(a, seed=4)
