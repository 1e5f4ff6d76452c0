"""Check grids: combinations, exclusions, limits and unique folder names."""

import re

import pytest
from hypothesis import given, settings, strategies as st

from peka_lite.experiments import expand, unique_names
from peka_lite.experiments.sweeps import _grids as grids
from peka_lite.experiments.sweeps._grids import count_points, point_name

VALUES = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3), st.integers(1, 3), st.integers(1, 3))
def test_axes_are_combined(grid, n_zipped, n_listed):
    zipped = [{"x": list(range(n_zipped)), "y": list(range(10, 10 + n_zipped))}]
    listed = [{"z": k} for k in range(n_listed)]
    points = expand(grid=grid, zipped=zipped, listed=listed)
    size = n_zipped * n_listed
    for values in grid.values():
        size *= len(values)
    assert len({tuple(sorted(p.items())) for p in points}) == len(points) == size
    assert all(p["y"] == p["x"] + 10 for p in points)
    assert all(p[name] in grid[name] for p in points for name in grid)


def test_exclusions_match_all_parameters_and_any_listed_value():
    grid = {"method": ["none", "bone"], "seed": [0, 1, 2]}
    points = expand(grid=grid, exclude=[{"method": "none", "seed": [1, 2]}])
    assert [(p["method"], p["seed"]) for p in points] == [("none", 0), ("bone", 0), ("bone", 1), ("bone", 2)]


def test_exclusion_does_not_match_points_without_the_parameter():
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
def test_invalid_axes_are_refused(axes, words):
    with pytest.raises(ValueError, match=words):
        expand(**axes)


THOUSAND = list(range(1000))


@pytest.mark.parametrize(
    ("axes", "count"),
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
def test_too_many_points_are_refused_without_creating_them(monkeypatch, axes, count):
    monkeypatch.setattr(grids, "product", None)
    for function in (count_points, expand):
        with pytest.raises(ValueError, match=f"^{re.escape(count)} points before exclusions are more than"):
            function(**axes)


def test_hundred_thousand_points_have_unique_names():
    grid = {"a": THOUSAND[:100], "b": THOUSAND}
    assert count_points(grid=grid) == len(expand(grid=grid)) == 100_000
    alike = [{"text": f"{'x' * 200}{k}"} for k in range(100_000)]  # long names are cut and get a hash
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
def test_too_large_points_are_refused_without_creating_them(monkeypatch, axes):
    monkeypatch.setattr(grids, "product", None)
    with pytest.raises(
        ValueError, match=r"values and exclusions of [\d,]+ points have [\d,]+ characters, more than"
    ) as error:
        expand(**axes)
    assert len(str(error.value)) < 300


def test_one_long_value_is_accepted():
    assert expand(grid={"a": ["x" * 10**7], "b": [1, 2]}) == [{"a": "x" * 10**7, "b": 1}, {"a": "x" * 10**7, "b": 2}]
    assert count_points(grid={"a": [1, 2]}, fixed={"b": "x" * 10**7}) == 2
    with pytest.raises(ValueError, match="more than 4,300 digits"):
        count_points(grid={"a": [16**10_000]})


def test_names_are_safe_folder_names():
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


def test_equal_names_get_a_hash():
    points = [{"weights": "/a/w.bin"}, {"weights": "/b/w.bin"}, {"weights": "W.bin"}, {"weights": "other.bin"}]
    names = unique_names(points)
    assert len({name.casefold() for name in names}) == 4
    assert names[3] == "weights=other.bin"
    assert unique_names([{"a": 1}, {"a": "1"}, {"a": 2}])[2] == "a=2"
