"""YAML of received files: what is read, what is refused, and that it is refused before it costs anything."""

import pytest

from peka_lite._core._yaml import LARGEST, parse_yaml, read_yaml, yaml_text


@pytest.mark.parametrize(
    "value",
    [
        {"text": "1e-4", "number": 1e-4, "day": "2026-01-01", "none": None, "yes": True, "word": "yes", "l": [1, "é"]},
        {"shared": (slides := ["A", "B"]), "again": slides},
    ],
)  # fmt: skip
def test_what_is_written_is_read(value):
    assert parse_yaml(yaml_text(value)) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{a: &a [1], b: *a}", "line 1 has an anchor or alias"),
        ("a: 1\n<<: *b", "line 2 has an anchor or alias"),
        ("a: &only 1", "anchor or alias"),
        ("a: !!python/object/apply:os.system [true]", "line 1 has a tag"),
        ("a: !mine 1", "has a tag"),
        ("a: !!binary aGk=", "has a tag"),
        ("a: 1\na: 2", "'a' is there twice"),
        ("? [a]\n: 1", "a key must be one plain value"),
        ("{? {a: 1} : 1}", "a key must be one plain value"),
        ("[" * 40 + "]" * 40, "nested more than 32 levels deep"),
        ("[" * 200_000, "no YAML"),
        ("- " * 200_000 + "a", "nested more than 32 levels"),
        ("\n".join(" " * i + f"k{i}:" for i in range(2000)), "nested more than 32 levels"),
        ("a: " + "1" * 5000, "no YAML"),
        ("a: [", "no YAML"),
        ("a: \x00", "no YAML"),
    ],
)
def test_what_is_refused(text, why, tmp_path):
    (tmp_path / "received.yml").write_text(text)
    with pytest.raises(ValueError, match=rf"received\.yml: .*{why}"):
        read_yaml(tmp_path / "received.yml")


def test_a_bomb_of_aliases_is_refused_before_it_is_built():
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(ValueError, match="anchor or alias"):
        parse_yaml("\n".join(lines))


def test_a_file_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "large.yml"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(ValueError, match=r"large\.yml: .* bytes are more than"):
        read_yaml(path)


def test_values_without_end_are_refused_before_they_are_built(tmp_path, monkeypatch):
    monkeypatch.setattr("peka_lite._core._yaml.MOST", 1000)
    (tmp_path / "many.yml").write_text("a: [" + "1," * 1000 + "1]")
    with pytest.raises(ValueError, match=r"many\.yml: it holds more than 1,000 values"):
        read_yaml(tmp_path / "many.yml")


def test_bytes_that_are_no_text_name_the_file(tmp_path):
    (tmp_path / "x.yml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"x\.yml: .*utf-8"):
        read_yaml(tmp_path / "x.yml")
