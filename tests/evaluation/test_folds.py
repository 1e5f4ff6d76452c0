"""Who is held out: no patient or slide stands on both sides, and every row is tested once."""

import re
import warnings
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from peka_lite.data.hest import Cohort, Slide, read_cohort
from peka_lite.data.tiles import TileStore
from peka_lite.evaluation.evaluate import LeakChecker
from peka_lite.evaluation.folds import folds, protocol_folds
from peka_lite.evaluation.leaks import LeakError
from peka_lite.evaluation.protocols import PROTOCOLS, Protocol


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
PEOPLE = [("A", 5), ("B", 3), ("A", 4), ("C", 9), ("D", 2), ("E", 6), ("F", 1)]


@pytest.mark.parametrize("by", ["patient", "slide", "spot"])
@given(layout=layouts, n_splits=st.integers(2, 6), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_every_row_is_tested_once_and_no_group_crosses(by, layout, n_splits, seed):
    cohort = make_cohort(*layout)
    groups = np.arange(len(cohort)) if by == "spot" else cohort.obs[by].to_numpy()
    n_groups = len(set(groups))
    if n_groups < (n_splits if by == "spot" else 2):
        with pytest.raises(ValueError, match=r"cannot make|none to hold out"):
            folds(cohort, by, n_splits, seed)
        return
    made = quiet_folds(cohort, by, n_splits, seed)
    assert len(made) == min(n_splits, n_groups)
    assert sorted(np.concatenate([test for _, test in made])) == list(range(len(cohort)))
    for train, test in made:
        assert train.dtype == test.dtype == np.int64
        assert sorted([*train, *test]) == list(range(len(cohort)))
        assert not set(groups[train]) & set(groups[test])


def test_patients_are_held_out_unless_told_otherwise():
    cohort = make_cohort(*PEOPLE)
    assert same(folds(cohort), folds(cohort, "patient", 5, 0))


def test_two_slides_of_one_patient_are_held_out_together():
    cohort = make_cohort(*PEOPLE)
    held_out = [set(cohort.obs["slide"][test]) for _, test in folds(cohort, "patient")]
    assert all(("S0" in slides) == ("S2" in slides) for slides in held_out)


def test_slides_of_one_patient_can_stand_on_both_sides_of_a_slide_split():
    cohort = make_cohort(("A", 3), ("A", 3))
    (train, test), _ = folds(cohort, "slide", 2)
    assert set(cohort.obs["patient"][train]) == set(cohort.obs["patient"][test]) == {"A"}


def test_a_spot_split_mixes_spots_of_a_slide_in_equal_parts():
    made = folds(make_cohort(("A", 50)), "spot", 5)
    assert [len(test) for _, test in made] == [10] * 5
    assert all(np.ptp(test) > 15 for _, test in made)


def test_rows_ascend():
    for by in ("patient", "slide", "spot"):
        for rows in (r for fold in folds(make_cohort(*PEOPLE), by) for r in fold):
            assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize(("by", "n_groups"), [("patient", 3), ("slide", 4)])
def test_fewer_groups_than_folds_gives_a_fold_a_group_and_says_so(by, n_groups):
    cohort = make_cohort(("A", 3), ("B", 3), ("A", 3), ("C", 2))
    with pytest.warns(UserWarning, match=rf"{n_groups} {by}s for 5 folds: each {by} is one fold"):
        made = folds(cohort, by, 5)
    assert [cohort.obs[by][test].nunique() for _, test in made] == [1] * n_groups


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("by", ["patient", "slide", "spot"])
def test_enough_groups_give_no_warning(by):
    assert len(folds(make_cohort(*PEOPLE), by, 5)) == 5


@pytest.mark.parametrize(("by", "layout"), [("patient", [("A", 9), ("A", 9)]), ("slide", [("A", 9)])])
def test_one_group_cannot_be_held_out(by, layout):
    with pytest.raises(ValueError, match=rf"holds one {by}.*none to hold out"):
        folds(make_cohort(*layout), by)


def test_fewer_spots_than_folds_are_refused():
    with pytest.raises(ValueError, match="3 spots cannot make 5 folds"):
        folds(make_cohort(("A", 3)), "spot")


def test_an_unknown_patient_is_never_guessed():
    with pytest.raises(ValueError, match=r"no patient is known for S1, S3.*patients=.*split by slide"):
        folds(make_cohort(("A", 3), (None, 3), ("B", 3), (None, 3)), "patient")


@pytest.mark.parametrize("by", ["slide", "spot"])
def test_an_unknown_patient_does_not_matter_to_other_splits(by):
    assert len(folds(make_cohort(("A", 3), (None, 3)), by, 2)) == 2


STRICT, HEST, PAPER = (PROTOCOLS[name] for name in ("strict", "hest", "paper"))
INNER = Protocol(name="custom", split="patient", alpha="inner")
OWN = Protocol(name="custom", split="patient")


@pytest.mark.parametrize(
    ("layout", "protocol", "n_splits", "said"),
    [
        ([("A", 9), ("B", 9)], STRICT, 5,
         "needs at least 3 folds, and 2 patients make 2: give slides of more patients, or --protocol hest, or "
         "--alpha NUMBER without --protocol"),
        ([("A", 9), ("A", 9)], STRICT, 5,
         "holds one patient .A., there is none to hold out: give slides of more patients, or --protocol hest with "
         "--split slide"),
        ([("A", 9)], STRICT, 5, "give slides of more patients, or --protocol paper, which scores neighbors"),
        ([("A", 9), ("B", 9), ("C", 9)], STRICT, 2, "--n-splits asks for 2: give --n-splits 3, or --protocol hest"),
        ([(None, 9), ("B", 9)], STRICT, 5, "no patient is known for S0, .*give --patients FILE.csv .*or --protocol pa"),
        ([("A", 9)], HEST, 5, "give slides of more patients, or --protocol paper"),
        ([("A", 9), ("A", 9)], HEST, 5, "or --protocol hest with --split slide"),
        ([("A", 9), ("B", 9)], replace(HEST, split="slide"), 5, "sections may stand for them .*or --protocol hest"),
        ([("A", 9), ("A", 9)], replace(STRICT, split="slide"), 5, "2 slides make 2: .*hest with --split slide"),
        ([("A", 9)], PAPER, 10, "9 spots cannot make 10 folds: give --n-splits 9"),
        ([("A", 9), ("B", 9)], INNER, 5, "2 patients make 2: .*--alpha hest or a number"),
        ([("A", 9), ("A", 9)], OWN, 5, "holds one patient .*or --split slide, which tells nothing about a new patient"),
        ([("A", 9)], OWN, 5, "holds one patient .*or --split spot, which scores neighbors of training spots"),
        ([(None, 9), (None, 9)], OWN, 5, "no patient is known for S0, S1.*--patients FILE.csv .*or --split slide"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*is one fold")
def test_what_cannot_be_split_names_settings_that_can(layout, protocol, n_splits, said):
    cohort = make_cohort(*layout)
    with pytest.raises(ValueError, match=said) as caught:
        protocol_folds(cohort, protocol, n_splits, 0)
    assert isinstance(caught.value, LeakError) == ("sections may stand" in said)
    tried = 0
    for way in str(caught.value).rpartition(": give ")[2].split(", or "):
        chosen = protocol
        if name := re.match(r"--protocol (\w+)", way):
            chosen = PROTOCOLS[name[1]]
        if way.startswith("--alpha"):
            chosen = replace(OWN, split=protocol.split, alpha=10.0)
        if by := re.search(r"--split (\w+)", way):
            chosen = replace(chosen, split=by[1])
        wanted = re.match(r"--n-splits (\d+)", way)
        if chosen is protocol and not wanted:
            assert re.match("slides of more patients|--patients", way)
            continue
        made = protocol_folds(cohort, chosen, int(wanted[1]) if wanted else n_splits, 0)
        LeakChecker(cohort_with_counts(cohort), made, chosen)  # the protocol itself has nothing against it
        tried += 1
    assert tried


def cohort_with_counts(cohort):
    """The same slides with counts that no two spots share."""
    rng = np.random.default_rng(0)
    slides = []
    for slide in cohort.slides:
        counts = ad.AnnData(rng.poisson(50, (slide.n_spots, 40)).astype(np.float32), obs=slide.adata.obs)
        counts.var_names = [f"G{g}" for g in range(40)]
        slides.append(replace(slide, adata=counts))
    return Cohort(tuple(slides))


@pytest.mark.parametrize("by", ["patient", "slide", "spot"])
def test_the_seed_decides_the_folds(by):
    cohort = make_cohort(*PEOPLE)
    assert same(folds(cohort, by, 3, seed=1), folds(cohort, by, 3, seed=1))
    assert any(not same(folds(cohort, by, 3, seed=1), folds(cohort, by, 3, seed=s)) for s in (2, 3, 4))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"unknown split 'organ'; known: patient, slide, spot"):
        folds(make_cohort(*PEOPLE), "organ")


@pytest.mark.parametrize("n_splits", [1, 0, -2])
def test_fewer_than_two_folds_are_refused(n_splits):
    with pytest.raises(ValueError, match="at least 2"):
        folds(make_cohort(*PEOPLE), n_splits=n_splits)


def test_mini_patients_are_held_out_one_by_one(mini_cohort):
    made = folds(mini_cohort, "patient", 3)
    assert sorted(p for _, test in made for p in mini_cohort.obs["patient"][test].unique()) == [
        "Mini patient 1",
        "Mini patient 2",
        "Mini patient 3",
    ]


def test_real_sections_of_one_patient_refuse_a_patient_split_but_allow_slides(her2st):
    cohort = read_cohort(her2st, ["HER2_C2", "HER2_C3"])
    with pytest.raises(ValueError, match=r"one patient \(Patient C\)"):
        folds(cohort, "patient")
    assert sorted(len(test) for _, test in folds(cohort, "slide", 2)) == [180, 187]
