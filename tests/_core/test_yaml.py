"""Read YAML of received files, and refuse expensive input before it is parsed."""

import pytest

from peka_lite._core._yaml import LARGEST, parse_yaml, read_yaml, yaml_text


@pytest.mark.parametrize(
    "value",
    [
        {"text": "1e-4", "number": 1e-4, "day": "2026-01-01", "none": None, "yes": True, "word": "yes", "l": [1, "é"]},
        {"shared": (slides := ["A", "B"]), "again": slides},
    ],
)  # fmt: skip
def test_written_yaml_is_read_unchanged(value):
    assert parse_yaml(yaml_text(value)) == value


@pytest.mark.parametrize(
    ("text", "message"),
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
        ("[" * 200_000, "invalid YAML"),
        ("- " * 200_000 + "a", "nested more than 32 levels"),
        ("\n".join(" " * i + f"k{i}:" for i in range(2000)), "nested more than 32 levels"),
        ("a: " + "1" * 5000, "invalid YAML"),
        ("a: [", "invalid YAML"),
        ("a: \x00", "invalid YAML"),
    ],
)
def test_unsupported_yaml_is_refused(text, message, tmp_path):
    (tmp_path / "received.yml").write_text(text)
    with pytest.raises(ValueError, match=rf"received\.yml: .*{message}"):
        read_yaml(tmp_path / "received.yml")


def test_expanding_aliases_are_refused_before_parsing():
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(ValueError, match="anchor or alias"):
        parse_yaml("\n".join(lines))


def test_too_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "large.yml"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(ValueError, match=r"large\.yml: .* bytes, more than"):
        read_yaml(path)


def test_too_many_values_are_refused_before_parsing(tmp_path, monkeypatch):
    monkeypatch.setattr("peka_lite._core._yaml.MOST", 1000)
    (tmp_path / "many.yml").write_text("a: [" + "1," * 1000 + "1]")
    with pytest.raises(ValueError, match=r"many\.yml: it holds more than 1,000 values"):
        read_yaml(tmp_path / "many.yml")


def test_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "x.yml").write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"x\.yml: .*utf-8"):
        read_yaml(tmp_path / "x.yml")
