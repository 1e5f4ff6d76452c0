"""Code and pages keep to the field's words: none of `vocabulary.txt` outside the listed exceptions.

`python tests/test_words.py [PATH ...]` prints each hit with its line, of all files or of those below the paths.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "vocabulary.txt"
EXCEPTIONS = ROOT / "tests" / "vocabulary_exceptions.txt"
CODE = (".py", ".pyi")
PAGES = (".md", ".ipynb")


def read_vocabulary():
    """Return (scope, word, replacement) for each line of the word list."""
    lines = (line for line in TABLE.read_text("utf-8").splitlines() if line.strip() and not line.startswith("#"))
    return [tuple(part.strip() for part in re.split(r"\s{2,}", line.strip(), maxsplit=2)) for line in lines]


def read_exceptions():
    """Return (path, words) for each line: the words that a path may use, ``*`` for all."""
    lines = (line.partition("#")[0].strip() for line in EXCEPTIONS.read_text("utf-8").splitlines())
    return {path: set(words.split(", ")) for path, _, words in (line.partition(": ") for line in lines if line)}


def tracked(*paths):
    """Return the files of the project below the paths that this test reads."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *paths],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = (ROOT / name for name in listed.stdout.splitlines())
    skipped = ("benchmarks/results/", "CHANGELOG.md", "tests/vocabulary")
    return sorted(
        p for p in files
        if p.suffix in CODE + PAGES and p.is_file() and not str(p.relative_to(ROOT)).startswith(skipped)
        and p.name != Path(__file__).name
    )  # fmt: skip


def names_in(tree):
    """Yield (line, name) of what a module's code names itself: functions, classes, arguments and variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def texts_in(source):
    """Yield (line, text) of comments and strings, one physical line at a time."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            for i, text in enumerate(token.string.split("\n")):
                yield token.start[0] + i, text


def of_file(path):
    """Return (names, texts) of a file, each a list of (line or cell, text)."""
    source = path.read_text("utf-8")
    if path.suffix in CODE:
        return list(names_in(ast.parse(source))), list(texts_in(source))
    if path.suffix == ".md":
        return [], list(enumerate(source.splitlines(), 1))
    names, texts = [], []
    for i, cell in enumerate(json.loads(source)["cells"]):
        text = "".join(cell["source"])
        texts += [(f"cell {i}", line) for line in text.splitlines()]
        if cell["cell_type"] == "code":
            code = re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", text)  # IPython's own lines
            names += [(f"cell {i}", name) for _, name in names_in(ast.parse(code))]
    return names, texts


def parts(name):
    """Return a name as words: `is_taught`, `TaughtStudent` -> ``is taught``, ``taught student``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).replace("_", " ").lower()
    return words.replace("held out", "heldout")  # of cross-validation


def find(path, vocabulary):
    """Yield (line, word, replacement, where it stands) for each use of a word of the list in a file."""
    names, texts = of_file(path)
    for scope, word, use in vocabulary:
        if scope == "code" and path.suffix not in CODE:
            continue
        whole = re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])", re.I)
        for line, name in names:
            if scope == "name" and name.startswith("test_"):
                continue  # the name of a test is a sentence
            if whole.search(parts(name)):
                yield line, word, use, name
        if scope != "name":
            yield from ((line, word, use, text.strip()) for line, text in texts if whole.search(text.replace("_", " ")))


def hits(*paths):
    """Return path -> hits, but for the exceptions."""
    vocabulary, exceptions = read_vocabulary(), read_exceptions()
    out = {}
    for path in tracked(*paths):
        name = str(path.relative_to(ROOT))
        allowed = exceptions.get(name, set())
        if "*" not in allowed:
            found = [hit for hit in find(path, vocabulary) if hit[1] not in allowed]
            if found:
                out[name] = found
    return out


def test_code_and_pages_use_the_words_of_the_field():
    lines = [
        f"{path}:{line}: {word!r} ({use}): {text[:100]}"
        for path, found in hits().items()
        for line, word, use, text in found
    ]
    assert not lines, "\n".join(lines)


def test_exceptions_are_needed():
    vocabulary = read_vocabulary()
    for name, words in read_exceptions().items():
        used = {word for _, word, *_ in find(ROOT / name, vocabulary)}
        assert used, f"{name} is plain now: take it out of {EXCEPTIONS.name}"
        assert words == {"*"} or words <= used, f"{name} no longer uses {words - used}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("taught = 1", {"taught"}),
        ("def f(*, is_own): pass", {"own"}),
        ("def test_own_rows_are_used(): pass", set()),
        ("def test_a_taught_student(): pass", {"taught"}),
        ("class JudgeOfRows: pass", {"judge"}),
        ("# it was told so", {"told"}),
        ('raise ValueError("nobody asked")', {"nobody"}),
        ('"""A lesson.\n\nLearned by heart.\n"""', {"lesson", "by heart", "learned by heart"}),
        ('x = f"{y} of the colour"', {"colour"}),
        ("its_own_copy = 'own'  # of its own", {"own"}),
        ("teacher = untold = train('a')", set()),
    ],
)
def test_a_word_is_found_where_it_stands(tmp_path, source, words):
    path = tmp_path / "a.py"
    path.write_text(source)
    assert {word for _, word, *_ in find(path, read_vocabulary())} == words


if __name__ == "__main__":
    for path, found in hits(*sys.argv[1:]).items():
        for line, word, use, text in sorted(found, key=lambda hit: str(hit[0]).zfill(6)):
            print(f"{path}:{line}: {word} -> {use} | {text[:110]}")
