"""No patient or slide is in both training and test of a fold, and every row is tested once."""

import re
import warnings
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from peka_lite.data import Cohort, Slide, TileStore, read_cohort
from peka_lite.evaluation import PROTOCOLS, LeakError, Protocol, folds
from peka_lite.evaluation.evaluate import LeakChecker
from peka_lite.evaluation.folds import protocol_folds


def make_cohort(*layout):
    """Build slides of (patient, number of spots) without counts or tiles."""
    slides = []
    for i, (patient, n) in enumerate(layout):
        adata = ad.AnnData(obs=pd.DataFrame(index=[f"spot{j}" for j in range(n)]))
        slides.append(Slide(f"S{i}", adata, TileStore([], np.zeros(n), np.arange(n)), patient, {}, {}))
    return Cohort(tuple(slides))


def quiet_folds(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return folds(*args, **options)


def same(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


layouts = st.lists(st.tuples(st.sampled_from("ABCDEFG"), st.integers(1, 12)), min_size=2, max_size=9)
LAYOUT = [("A", 5), ("B", 3), ("A", 4), ("C", 9), ("D", 2), ("E", 6), ("F", 1)]


@pytest.mark.parametrize("by", ["patient", "slide", "spot"])
@given(layout=layouts, n_splits=st.integers(2, 6), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_every_row_is_tested_once_and_no_group_is_split(by, layout, n_splits, seed):
    cohort = make_cohort(*layout)
    groups = np.arange(len(cohort)) if by == "spot" else cohort.obs[by].to_numpy()
    n_groups = len(set(groups))
    if n_groups < (n_splits if by == "spot" else 2):
        with pytest.raises(ValueError, match=r"cannot make|none to hold out"):
            folds(cohort, by, n_splits, seed)
        return
    splits = quiet_folds(cohort, by, n_splits, seed)
    assert len(splits) == min(n_splits, n_groups)
    assert sorted(np.concatenate([test for _, test in splits])) == list(range(len(cohort)))
    for train, test in splits:
        assert train.dtype == test.dtype == np.int64
        assert sorted([*train, *test]) == list(range(len(cohort)))
        assert not set(groups[train]) & set(groups[test])


def test_default_split_is_by_patient():
    cohort = make_cohort(*LAYOUT)
    assert same(folds(cohort), folds(cohort, "patient", 5, 0))


def test_patient_split_keeps_slides_of_one_patient_together():
    cohort = make_cohort(*LAYOUT)
    tested = [set(cohort.obs["slide"][test]) for _, test in folds(cohort, "patient")]
    assert all(("S0" in slides) == ("S2" in slides) for slides in tested)


def test_slide_split_can_divide_the_slides_of_one_patient():
    cohort = make_cohort(("A", 3), ("A", 3))
    (train, test), _ = folds(cohort, "slide", 2)
    assert set(cohort.obs["patient"][train]) == set(cohort.obs["patient"][test]) == {"A"}


def test_spot_split_divides_a_slide_at_random_in_equal_parts():
    splits = folds(make_cohort(("A", 50)), "spot", 5)
    assert [len(test) for _, test in splits] == [10] * 5
    assert all(np.ptp(test) > 15 for _, test in splits)


def test_rows_are_ascending():
    for by in ("patient", "slide", "spot"):
        for rows in (r for fold in folds(make_cohort(*LAYOUT), by) for r in fold):
            assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize(("by", "n_groups"), [("patient", 3), ("slide", 4)])
def test_fewer_groups_than_folds_give_one_fold_per_group_and_a_warning(by, n_groups):
    cohort = make_cohort(("A", 3), ("B", 3), ("A", 3), ("C", 2))
    with pytest.warns(UserWarning, match=rf"{n_groups} {by}s for 5 folds: each {by} is one fold"):
        splits = folds(cohort, by, 5)
    assert [cohort.obs[by][test].nunique() for _, test in splits] == [1] * n_groups


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("by", ["patient", "slide", "spot"])
def test_enough_groups_give_no_warning(by):
    assert len(folds(make_cohort(*LAYOUT), by, 5)) == 5


@pytest.mark.parametrize(("by", "layout"), [("patient", [("A", 9), ("A", 9)]), ("slide", [("A", 9)])])
def test_cohort_with_one_group_is_rejected(by, layout):
    with pytest.raises(ValueError, match=rf"has one {by}.*none to hold out"):
        folds(make_cohort(*layout), by)


def test_fewer_spots_than_folds_are_rejected():
    with pytest.raises(ValueError, match="3 spots cannot make 5 folds"):
        folds(make_cohort(("A", 3)), "spot")


def test_patient_split_rejects_unknown_patients():
    with pytest.raises(ValueError, match=r"no patient is known for S1, S3.*patients=.*split by slide"):
        folds(make_cohort(("A", 3), (None, 3), ("B", 3), (None, 3)), "patient")


@pytest.mark.parametrize("by", ["slide", "spot"])
def test_other_splits_accept_unknown_patients(by):
    assert len(folds(make_cohort(("A", 3), (None, 3)), by, 2)) == 2


STRICT, HEST, PAPER = (PROTOCOLS[name] for name in ("strict", "hest", "paper"))
INNER = Protocol(name="custom", split="patient", alpha="inner")
CUSTOM = Protocol(name="custom", split="patient")


@pytest.mark.parametrize(
    ("layout", "protocol", "n_splits", "message"),
    [
        ([("A", 9), ("B", 9)], STRICT, 5,
         "needs at least 3 folds, and 2 patients make 2: give slides of more patients, or --protocol hest, or "
         "--alpha NUMBER without --protocol"),
        ([("A", 9), ("A", 9)], STRICT, 5,
         "has one patient .A. and none to hold out: give slides of more patients, or --protocol hest with "
         "--split slide"),
        ([("A", 9)], STRICT, 5, "give slides of more patients, or --protocol paper, which scores neighbors"),
        ([("A", 9), ("B", 9), ("C", 9)], STRICT, 2, "--n-splits is 2: give --n-splits 3, or --protocol hest"),
        ([(None, 9), ("B", 9)], STRICT, 5, "no patient is known for S0, .*give --patients FILE.csv .*or --protocol pa"),
        ([("A", 9)], HEST, 5, "give slides of more patients, or --protocol paper"),
        ([("A", 9), ("A", 9)], HEST, 5, "or --protocol hest with --split slide"),
        ([("A", 9), ("B", 9)], replace(HEST, split="slide"), 5, "sections instead needs .*or --protocol hest"),
        ([("A", 9), ("A", 9)], replace(STRICT, split="slide"), 5, "2 slides make 2: .*hest with --split slide"),
        ([("A", 9)], PAPER, 10, "9 spots cannot make 10 folds: give --n-splits 9"),
        ([("A", 9), ("B", 9)], INNER, 5, "2 patients make 2: .*--alpha hest or a number"),
        ([("A", 9), ("A", 9)], CUSTOM, 5, "has one patient .*or --split slide, which does not test new patients"),
        ([("A", 9)], CUSTOM, 5, "has one patient .*or --split spot, which scores neighbors of training spots"),
        ([(None, 9), (None, 9)], CUSTOM, 5, "no patient is known for S0, S1.*--patients FILE.csv .*or --split slide"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*is one fold")
def test_error_of_protocol_folds_names_settings_that_work(layout, protocol, n_splits, message):
    cohort = make_cohort(*layout)
    with pytest.raises(ValueError, match=message) as caught:
        protocol_folds(cohort, protocol, n_splits, 0)
    assert isinstance(caught.value, LeakError) == ("sections instead" in message)
    tried = 0
    for fix in str(caught.value).rpartition(": give ")[2].split(", or "):
        chosen = protocol
        if name := re.match(r"--protocol (\w+)", fix):
            chosen = PROTOCOLS[name[1]]
        if fix.startswith("--alpha"):
            chosen = replace(CUSTOM, split=protocol.split, alpha=10.0)
        if by := re.search(r"--split (\w+)", fix):
            chosen = replace(chosen, split=by[1])
        n_folds = re.match(r"--n-splits (\d+)", fix)
        if chosen is protocol and not n_folds:
            assert re.match("slides of more patients|--patients", fix)
            continue
        splits = protocol_folds(cohort, chosen, int(n_folds[1]) if n_folds else n_splits, 0)
        LeakChecker(cohort_with_counts(cohort), splits, chosen)  # raises no error
        tried += 1
    assert tried


def cohort_with_counts(cohort):
    """Return the same slides with counts that differ between all spots."""
    rng = np.random.default_rng(0)
    slides = []
    for slide in cohort.slides:
        counts = ad.AnnData(rng.poisson(50, (slide.n_spots, 40)).astype(np.float32), obs=slide.adata.obs)
        counts.var_names = [f"G{g}" for g in range(40)]
        slides.append(replace(slide, adata=counts))
    return Cohort(tuple(slides))


@pytest.mark.parametrize("by", ["patient", "slide", "spot"])
def test_folds_depend_on_the_seed(by):
    cohort = make_cohort(*LAYOUT)
    assert same(folds(cohort, by, 3, seed=1), folds(cohort, by, 3, seed=1))
    assert any(not same(folds(cohort, by, 3, seed=1), folds(cohort, by, 3, seed=s)) for s in (2, 3, 4))


def test_unknown_split_is_rejected():
    with pytest.raises(ValueError, match=r"unknown split 'organ'; known: patient, slide, spot"):
        folds(make_cohort(*LAYOUT), "organ")


@pytest.mark.parametrize("n_splits", [1, 0, -2])
def test_fewer_than_two_folds_are_rejected(n_splits):
    with pytest.raises(ValueError, match="at least 2"):
        folds(make_cohort(*LAYOUT), n_splits=n_splits)


def test_each_mini_patient_is_one_fold(mini_cohort):
    splits = folds(mini_cohort, "patient", 3)
    assert sorted(p for _, test in splits for p in mini_cohort.obs["patient"][test].unique()) == [
        "Mini patient 1",
        "Mini patient 2",
        "Mini patient 3",
    ]


def test_real_sections_of_one_patient_can_be_split_by_slide_only(her2st):
    cohort = read_cohort(her2st, ["HER2_C2", "HER2_C3"])
    with pytest.raises(ValueError, match=r"one patient \(Patient C\)"):
        folds(cohort, "patient")
    assert sorted(len(test) for _, test in folds(cohort, "slide", 2)) == [180, 187]
