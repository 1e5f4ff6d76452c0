"""Grids: every combination once, nothing that is excluded, and folder names that differ."""

import re

import pytest
from hypothesis import given, settings, strategies as st

from peka_lite.experiments.sweeps import _grids as grids
from peka_lite.experiments.sweeps._grids import count_points, expand, point_name, unique_names

VALUES = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3), st.integers(1, 3), st.integers(1, 3))
def test_axes_multiply(grid, n_zipped, n_listed):
    zipped = [{"x": list(range(n_zipped)), "y": list(range(10, 10 + n_zipped))}]
    listed = [{"z": k} for k in range(n_listed)]
    points = expand(grid=grid, zipped=zipped, listed=listed)
    size = n_zipped * n_listed
    for values in grid.values():
        size *= len(values)
    assert len({tuple(sorted(p.items())) for p in points}) == len(points) == size
    assert all(p["y"] == p["x"] + 10 for p in points)
    assert all(p[name] in grid[name] for p in points for name in grid)


def test_exclusions_match_all_of_their_parameters_and_any_of_a_list():
    grid = {"method": ["none", "bone"], "seed": [0, 1, 2]}
    points = expand(grid=grid, exclude=[{"method": "none", "seed": [1, 2]}])
    assert [(p["method"], p["seed"]) for p in points] == [("none", 0), ("bone", 0), ("bone", 1), ("bone", 2)]


def test_an_exclusion_of_a_point_that_does_not_set_the_parameter_leaves_it():
    points = expand(listed=[{}, {"tau": 4}, {"tau": None}], exclude=[{"tau": None}])
    assert points == [{}, {"tau": 4}]


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"grid": {"seed": 3}}, "seed: give a list"),
        ({"grid": {"method": "bone"}}, "method: give a list"),
        ({"grid": {"seed": []}}, "at least one value"),
        ({"zipped": [{"a": [1, 2], "b": [1]}]}, "a has 2, b has 1"),
        ({"grid": {"a": [1]}, "listed": [{"a": 2}]}, "a: set by two"),
        ({"zipped": [{"a": [1]}, {"a": [2]}]}, "a: set by two"),
        ({"grid": {"a": [1]}, "exclude": [{"a": 2}]}, "matches no point"),
        ({"grid": {"a": [1]}, "exclude": [{"a": 1}]}, "no point is left"),
    ],
)
def test_axes_that_make_no_sense_are_refused(axes, words):
    with pytest.raises(ValueError, match=words):
        expand(**axes)


THOUSAND = list(range(1000))


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        ({"grid": {"a": [0] * 100_001}}, "100,001"),
        ({"grid": {"a": THOUSAND, "b": THOUSAND, "c": THOUSAND[:2]}}, "2,000,000"),
        ({"grid": {name: THOUSAND for name in "abc"}, "exclude": [{"a": THOUSAND[1:]}]}, "1,000,000,000"),
        ({"grid": {f"p{k}": [0, 1] for k in range(20_000)}}, "more than 10^18"),
        ({"zipped": [{"a": THOUSAND, "b": THOUSAND}, {"c": THOUSAND}]}, "1,000,000"),
        ({"listed": [{"a": 1}] * 100_001}, "100,001"),
        ({"grid": {"a": THOUSAND}, "zipped": [{"b": [1, 2]}], "listed": [{}] * 51}, "102,000"),
    ],
)
def test_too_many_points_are_counted_and_refused_without_making_one(monkeypatch, axes, told):
    monkeypatch.setattr(grids, "product", None)
    for what in (count_points, expand):
        with pytest.raises(ValueError, match=f"^{re.escape(told)} points, before any is excluded, are more than"):
            what(**axes)


def test_a_hundred_thousand_points_are_made_and_named_apart():
    grid = {"a": THOUSAND[:100], "b": THOUSAND}
    assert count_points(grid=grid) == len(expand(grid=grid)) == 100_000
    alike = [{"text": f"{'x' * 200}{k}"} for k in range(100_000)]  # whose names are cut, and differ by a hash
    names = unique_names(alike)
    assert len({name.casefold() for name in names}) == 100_000
    assert max(map(len, names)) < 200


@pytest.mark.parametrize(
    "axes",
    [
        {"grid": {"a": THOUSAND, "b": ["x" * 10**6]}},
        {"grid": {"a": THOUSAND, "b": [[["x" * 10**6]], 1]}},
        {"zipped": [{"a": ["x" * 10**7] * 6}], "grid": {"b": THOUSAND[:100]}},
        {"listed": [{f"p{k}": 0 for k in range(10_000)}, {}], "grid": {"b": THOUSAND * 50}},
        {"grid": {"a": THOUSAND * 10}, "exclude": [{"a": k} for k in range(10_000)]},
        {"grid": {"a": THOUSAND}, "exclude": [{"a": list(range(10**6))}]},
    ],
)
def test_points_that_are_large_together_are_refused_without_making_one(monkeypatch, axes):
    monkeypatch.setattr(grids, "product", None)
    with pytest.raises(ValueError, match=r"points set or are compared with [\d,]+ letters in all, more than") as found:
        expand(**axes)
    assert len(str(found.value)) < 300


def test_one_long_value_is_a_value():
    assert expand(grid={"a": ["x" * 10**7], "b": [1, 2]}) == [{"a": "x" * 10**7, "b": 1}, {"a": "x" * 10**7, "b": 2}]
    assert count_points(grid={"a": [1, 2]}, fixed={"b": "x" * 10**7}) == 2
    with pytest.raises(ValueError, match="more than 4,300 digits"):
        count_points(grid={"a": [16**10_000]})


def test_names_are_safe_for_a_folder_and_a_file_counts_by_its_name():
    assert point_name({"weights": "/data/my weights/uni v1.bin", "augment": True}) == "weights=uni-v1.bin,augment=true"
    assert "/" not in point_name({"cohort": "a/b", "note": "x/../y"})
    assert point_name({}) == "base"
    assert len(point_name({f"parameter_{k}": "value" * 3 for k in range(20)})) == 120
    assert len(point_name({"note": "学" * 110}).encode()) <= 120
    assert point_name({"x": "q.partial"}) == "x=q-partial"
    assert point_name({"x": "q.PARTIAL"}) == "x=q-partial"
    for value in ("..", ".", "/", "../..", "log", "report", "sweep.yml", "\n", "\x1b[31m", "a\0b", "C:\\x", ""):
        name = point_name({"x": value})
        assert name.startswith("x=")
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzC013=.-+"), name


def test_names_that_would_agree_differ():
    points = [{"weights": "/a/w.bin"}, {"weights": "/b/w.bin"}, {"weights": "W.bin"}, {"weights": "other.bin"}]
    names = unique_names(points)
    assert len({name.casefold() for name in names}) == 4
    assert names[3] == "weights=other.bin"
    assert unique_names([{"a": 1}, {"a": "1"}, {"a": 2}])[2] == "a=2"
