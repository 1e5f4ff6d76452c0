"""Received runs, sweeps and models are untrusted: no file outside their folder is read, all their text is escaped."""

import ast
import csv
import io
import json
import os
import re
import signal
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from markdown_it import MarkdownIt
from run_folders import complete_summary, write_run_folder, write_sweep_file
from test_model import GENES, probe, write_folder

import peka_lite as pk
from peka_lite._core.names import (
    escape_control,
    escape_html,
    escape_markdown,
    fenced_code,
    inline_code,
    short_name,
    write_spreadsheet_csv,
)
from peka_lite._core.progress import logger, show_messages
from peka_lite._core.untrusted_files import file_inside, read_json_inside
from peka_lite.cli.doctor import Check, report
from peka_lite.cli.main import main
from peka_lite.cli.options import parser
from peka_lite.experiments._model_card import model_card
from peka_lite.experiments._sweep_folder import read_sweep_folder
from peka_lite.experiments._unfinished import remake_command
from peka_lite.experiments.folder import RunFolder, write_metrics
from peka_lite.experiments.model import load_trained
from peka_lite.experiments.sweeps._board import Board
from peka_lite.probe.files import save_probes
from peka_lite.reports.runs import read_runs

NASTY = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<b", "</td><svg/onload=alert(1)>", "<!-- x", "]]>",
    "[x](javascript:alert(1))", "![x](http://e.org/x.png)", "<JavaScript:alert(1)>", "[a]: javascript:alert(1)", "[^1]",
    "x\n# Heading", "# Heading", "x\n===", "===", "---", "- x", "+ x", "1. x", "1) x", "> x", "~~~", "***", "___x___",
    "x\n\n```python\nimport os\n```", "```", "a`b``c", "`", "    indented", "\tindented",
    "{eval}`1+1`", "{{ secret }}", ":::{raw} html", "```{code-cell}", "(target)=", "%comment", "+++",
    "$$x$$", r"\(x\)", r"\begin{x}", r"\<b>", "\\", "&lt;script&gt;", "java&#115;cript:", "|a|b|", "a|b",
    "=cmd|' /C calc'!A0", "-2+3+cmd|' /C calc'!A0", "@SUM(1)", "\t=1", "a;=1", 'x,"=1', "\uff1d1",
    "\x1b]0;title\x07", "\x1b[2Kx", "\u202egnp.exe", "a\rb", "a\u2028b", "a\x85b", "a\x00b", "\udcff",
)  # fmt: skip
ESCAPES = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SECRET = "SECRET-of-the-user"


@pytest.fixture(autouse=True)
def _no_hang():
    """Fail a test that hangs, for example on a pipe."""

    def stop(*_):
        raise AssertionError("the test hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def outside(tmp_path):
    """Return a private folder, which nothing received may reveal."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "notes.txt").write_text(SECRET)
    return folder


def read_all(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file()).decode(errors="replace")


@pytest.mark.parametrize(
    "name", ["../private/notes.txt", "/etc/hostname", "..", ".", "", "a/b", "a\\b", "a\0b", 5, None]
)
def test_a_name_that_is_a_path_is_refused(tmp_path, outside, name):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="is not a plain name"):
        file_inside(tmp_path / "run", name)


def test_only_regular_files_inside_are_read(tmp_path, outside):
    run = tmp_path / "run"
    run.mkdir()
    (run / "real.csv").write_text("12345")
    (run / "inside").symlink_to("real.csv")
    (tmp_path / "given").symlink_to(run)  # a link given by the user
    assert file_inside(tmp_path / "given", "inside").read_text() == "12345"
    (run / "out").symlink_to(outside / "notes.txt")
    (run / "folder").symlink_to(outside)
    (run / "circle").symlink_to("circle")
    (run / "gone").symlink_to("nowhere")
    os.mkfifo(run / "pipe")
    (run / "device").symlink_to("/dev/zero")
    for names, message in (
        (("out",), "leads out of"), (("folder", "notes.txt"), "leads out of"), (("device",), "leads out of"),
        (("pipe",), "not a regular file"), (("circle",), "is a broken link"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            file_inside(run, *names)
    for name in ("gone", "missing", "x" * 300):
        with pytest.raises(FileNotFoundError):
            file_inside(run, name)
    with pytest.raises(ValueError, match="5 bytes, more than are read"):
        file_inside(run, "real.csv", largest=4)


def test_a_model_in_the_hubs_cache_is_read_through_its_links(tmp_path, outside):
    repository = tmp_path / "models--owner--name"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "0f").write_text("{}")
    (repository / "blobs" / "ff").symlink_to(outside / "notes.txt")
    for name, blob in (("config.yml", "0f"), ("notes", "ff")):
        (repository / "snapshots" / "abc" / name).symlink_to(f"../../blobs/{blob}")
    assert file_inside(repository / "snapshots" / "abc", "config.yml").read_text() == "{}"
    with pytest.raises(ValueError, match="leads out of"):
        file_inside(repository / "snapshots" / "abc", "notes")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * 40 + "]" * 40, "9" * 5000, "9" * 30, json.dumps("x" * 10_000), "{", "\xff"]
)
def test_a_record_with_invalid_json_is_refused(tmp_path, text):
    (tmp_path / "summary.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"summary\.json is not valid JSON"):
        read_json_inside(tmp_path, "summary.json")


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("notebook", [None, "03.ipynb"])
def test_a_point_name_that_is_a_path_is_refused(tmp_path, outside, notebook, absolute, capsys):
    write_run_folder(outside / "run", cohort=SECRET)
    name = str(outside / "run") if absolute else "../private/run"
    folder = write_sweep_file(tmp_path / "sweep", {name: {"tau": 1}}, notebook=notebook)
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "sweep.yml" in error
    assert "not a plain name" in error
    assert not (tmp_path / "out").exists()


def test_a_point_or_a_run_that_is_a_link_out_of_the_folder_is_not_read(tmp_path, outside):
    write_run_folder(outside / "run", cohort=SECRET)
    sweep = write_sweep_file(tmp_path / "sweep", {"tau=1": {"tau": 1}})
    (sweep / "tau=1").symlink_to(outside / "run")
    with pytest.raises(ValueError, match="leads out of"):
        pk.write_report([sweep], tmp_path / "out")
    runs = tmp_path / "runs"
    write_run_folder(runs / "inner")
    (runs / "other").symlink_to(outside / "run")
    (runs / "again").symlink_to("inner")
    with pytest.raises(ValueError, match="are the same run"):
        read_runs([runs])  # a link inside is followed
    (runs / "again").unlink()
    with pytest.warns(UserWarning, match="leads out of"):
        assert [run.name for run in read_runs([runs])] == ["inner"]
    assert [run.name for run in read_runs([runs / "other"])] == ["run"]  # a link given by the user is followed


@pytest.mark.parametrize("name", ["config.yml", "summary.json", "slides.parquet", "metrics.csv"])
def test_a_file_of_a_run_that_is_a_link_out_of_it_is_not_read(tmp_path, outside, name):
    good = write_run_folder(tmp_path / "runs" / "good")
    bad = write_run_folder(tmp_path / "runs" / "bad", method="bone")
    pd.read_csv(bad / "metrics.csv").assign(gene=SECRET).to_csv(bad / "metrics.csv", index=False)
    os.replace(bad / name, outside / name)
    (bad / name).symlink_to(outside / name)
    with pytest.warns(UserWarning, match=rf"skipped: .*bad.*{re.escape(name)} is a link that leads out of"):
        pk.write_report([good.parent], tmp_path / "out")
    assert SECRET not in read_all(tmp_path / "out")
    assert [run.name for run in read_runs([good])] == ["good"]


def test_links_in_a_sweeps_log_or_a_notebooks_output_are_not_read(tmp_path, outside):
    (outside / "log.json").write_text(json.dumps({"state": "failed", "last_line": SECRET}))
    (outside / "summary.json").write_text(json.dumps({"accuracy": SECRET}))
    folder = write_sweep_file(tmp_path / "sweep", {"k=1": {"k": 1}, "k=2": {"k": 2}}, notebook="03.ipynb")
    (folder / "log" / "k=1.json").symlink_to(outside / "log.json")
    with pytest.raises(ValueError, match="leads out of"):
        read_sweep_folder(folder)
    (folder / "log" / "k=1.json").unlink()
    os.mkfifo(folder / "log" / "k=1.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_sweep_folder(folder)
    (folder / "log" / "k=1.json").unlink()
    (folder / "k=2" / "deep").mkdir(parents=True)
    (folder / "k=2" / "deep" / "summary.json").symlink_to(outside / "summary.json")
    with pytest.raises(ValueError, match="leads out of"):
        pk.write_report([folder], tmp_path / "out")
    (folder / "k=2" / "deep" / "summary.json").unlink()
    (folder / "k=2" / "true.json").write_text(json.dumps({"accuracy": 0.5}))
    (folder / "k=2" / "deep" / "summary.json").symlink_to("../true.json")  # a link inside is followed
    pk.write_report([folder], tmp_path / "out")
    assert pd.read_csv(tmp_path / "out" / "points.csv")["accuracy"].tolist() == [0.5]


def test_links_among_a_models_files_are_refused(tmp_path, outside):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(complete_summary()))
    (outside / "config.yml").write_text("method: none\n")
    (folder / "config.yml").symlink_to(outside / "config.yml")
    with pytest.raises(ValueError, match=r"config\.yml is a link that leads out of"):
        RunFolder.open(folder)
    (folder / "config.yml").unlink()
    (folder / "config.yml").write_text("method: none\n")
    (folder / "backbone.yml").symlink_to(outside / "notes.txt")
    with pytest.raises(ValueError, match=r"backbone\.yml is a link that leads out of"):
        RunFolder.open(folder)
    (folder / "backbone.yml").unlink()
    (folder / "probe.safetensors").symlink_to(outside / "notes.txt")
    with pytest.raises(ValueError, match=r"probe\.safetensors is a link that leads out of"):
        load_trained(folder)
    (folder / "summary.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="truncated or damaged"):
        RunFolder.open(folder)


def test_a_command_to_finish_a_run_is_quoted_and_reads_no_other_file(tmp_path, outside):
    work = tmp_path / "run.partial"
    (work / "scratch").mkdir(parents=True)
    (work / "config.yml").write_text(yaml.safe_dump({"cohort": "--out=/x; rm -r y", "weights": "a'b"}))
    (work / "scratch" / "command").symlink_to(outside / "notes.txt")
    command = remake_command(work)
    assert SECRET not in command
    assert command.startswith("""peka-lite run --cohort='--out=/x; rm -r y' --weights 'a'"'"'b' --out """)
    (work / "scratch" / "command").unlink()
    (work / "scratch" / "command").write_text("train; rm -r y")
    assert remake_command(work).startswith("peka-lite run ")
    (work / "config.yml").write_text("slides: [1, {a: b}]\nprotocol: [x]\n")
    assert " OPTIONS " in remake_command(work)


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol", "../x"), ("protocol", ["paper"]), ("method", "x"), ("features", 5), ("split", None), ("unit", "n"),
        ("normalization", "counts"), ("scores", []), ("scores", {"log1p": 5}), ("ceiling", {"log1p": {"pcc": "1"}}),
        ("slides", "S1"), ("slides", [1]), ("synthetic", "no"), ("backbone", None), ("data_fingerprint", {}),
        ("seconds", "1"),
    ],
)  # fmt: skip
def test_the_error_for_a_summary_value_of_wrong_type_names_it(tmp_path, field, value):
    run = write_run_folder(tmp_path / "run")
    change_json(run / "summary.json", lambda summary: summary.update({field: value}))
    with pytest.raises(ValueError, match=rf"run/summary\.json: {field}"):
        read_runs([run])


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", "0), x()#"), ("seed", 1.5), ("seed", True), ("cohort", 3), ("weights", None), ("slides", "S1"),
     ("train_share", "x"), ("tau", {"a": 1}), ("layers", [[1]]), (5, 1)],
)  # fmt: skip
def test_the_error_for_a_setting_of_wrong_type_names_it(tmp_path, field, value):
    run = write_run_folder(tmp_path / "run")
    config = yaml.safe_load((run / "config.yml").read_text()) | {field: value}
    (run / "config.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=rf"run/config\.yml: .*{field}"):
        read_runs([run])


def test_only_known_columns_of_moments_are_read_and_their_size_is_limited(tmp_path):
    run = write_run_folder(tmp_path / "run")
    path = run / "slides.parquet"
    whole = pd.read_parquet(path)
    pd.testing.assert_frame_equal(read_runs([run])[0].moments, whole[list(read_runs([run])[0].moments)])
    whole.assign(extra=SECRET).to_parquet(path)
    assert "extra" not in read_runs([run])[0].moments
    rows = 2**20 + 1
    columns = {
        name: pa.array(np.zeros(rows, column.dtype)) for name, column in whole.items() if column.dtype.kind in "if"
    }
    words = {"slide": "S", "patient": "P", "gene": "x" * 5000, "normalization": "log1p"}
    columns |= {k: pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [word]) for k, word in words.items()}
    table = pa.table(columns)
    for change, message in (
        (lambda: pq.write_table(table, path), "cannot hold the 1,048,577 rows"),
        (lambda: pq.write_table(table.slice(0, 2**20), path), "names in column gene are too long"),
        (lambda: whole.to_parquet(path, compression="zstd"), "compression or encoding"),
        (lambda: pq.write_table(pa.Table.from_pandas(whole), path, use_dictionary=False,
                                column_encoding={"gene": "DELTA_BYTE_ARRAY"}), "compression or encoding"),
        (lambda: whole.drop(columns="gene").to_parquet(path), "column gene"),
        (lambda: whole.assign(fold="0").to_parquet(path), "column fold"),
        (lambda: whole.assign(cov=[["a"]] * len(whole)).to_parquet(path), "column cov"),
        (lambda: whole.assign(gene=None).astype({"gene": "string"}).to_parquet(path), "column gene has missing values"),
        (lambda: whole[whole["normalization"] == "log1p"].to_parquet(path), "no row has normalization log1p-cp10k"),
        (lambda: path.write_bytes(b"PAR1" + b"x" * 100 + b"PAR1"), "slides.parquet"),
    ):  # fmt: skip
        change()
        with pytest.raises(ValueError, match=message):
            read_runs([run])


def test_only_known_columns_and_numbers_of_metrics_are_read(tmp_path):
    run = RunFolder.open(write_run_folder(tmp_path / "run"))
    path, first = run.path / "metrics.csv", "method,backbone,split,protocol,features,normalization,n_train,n_test,"
    row = "none,mini,patient,custom,student,log1p,9,9,"
    path.write_text(f"{first}fold,gene,pcc,notes\n{row}0,NA,0.5,{SECRET}\n{row}1,=x,,y\n")
    table = run.metrics()
    assert list(table) == [*first.split(",")[:-1], "fold", "gene", "pcc"]
    assert table["gene"].tolist() == ["NA", "=x"]
    assert table["pcc"].tolist() == pytest.approx([0.5, np.nan], nan_ok=True)
    for text in (
        "fold,gene,pcc\n0,a,=1+1\n", "fold,gene,pcc\nx,a,1\n", "fold,gene,pcc\n99999999999999999999,a,1\n", "", "\n",
        "a,b\n1,2\n", "fold,gene,gene\n0,a,b\n", "c," * 10**6 + "fold,gene\n", "fold,gene\n0,\xff\n", f"{SECRET}\nx\n",
    ):  # fmt: skip
        path.write_text(text, "latin-1")
        with pytest.raises(ValueError, match=r"metrics\.csv is not a table of results") as caught:
            run.metrics()
        assert SECRET not in str(caught.value)


class Page(HTMLParser):
    """Collect the tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_comment(self, data):
        self.tags.append("comment")


def render(text):
    """Return Markdown as HTML, with raw HTML, tables and strikethrough enabled."""
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)


def extract_text(html):
    texts = []
    page = HTMLParser()
    page.handle_data = texts.append
    page.feed(html)
    return "".join(texts)


@pytest.mark.parametrize("name", NASTY)
def test_a_name_is_escaped_in_markdown(name):
    escaped, words = escape_markdown(name), escape_control(" ".join(name.splitlines())).strip()
    for around, tags in (("{}", ["p"]), ("# {}", ["h1"]), ("- {}", ["ul", "li"]), ("a {} b", ["p"]), ("{}: x", ["p"])):
        html = render(around.format(escaped))
        assert Page(html).tags == tags
        assert words in extract_text(html)
    table = render(f"| {escaped} | x |\n| --- | --- |\n| y | {escaped} |\n")
    assert Page(table).tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert extract_text(table).count(words) == 2
    assert not re.search(r"(?<!\\)(?:\\\\)*[{$]", escaped)  # no role, directive, substitution or formula
    assert not ESCAPES.search(escaped)


@pytest.mark.parametrize("name", NASTY)
def test_a_name_is_escaped_in_markdown_code(name):
    html = render(f"missing: {inline_code(name)} (x)")
    assert Page(html).tags == ["p", "code"]
    assert escape_control(name) in extract_text(html)
    html = render(f"{fenced_code(f'x = 1  # {name}', 'python')}\n\nend")
    assert Page(html).tags == ["pre", "code", "p"]


@pytest.mark.parametrize("name", NASTY)
def test_a_name_is_escaped_in_html_and_on_a_terminal(name):
    page = Page(f"<td title='{escape_html(name)}' alt=\"{escape_html(name)}\">{escape_html(name)}</td>")
    assert page.tags == ["td"]
    assert dict(page.attributes) == {"title": escape_control(name), "alt": escape_control(name)}
    assert not ESCAPES.search(escape_control(name))
    assert "\n" not in escape_control(name)
    escape_control(name).encode("utf-8")  # lone surrogates are escaped too
    assert len(short_name(name * 100, longest=40)) == 40


def test_escaping_does_not_change_plain_names():
    assert escape_control("a\x1b[2K\u202e\udcff\n") == "a\\x1b[2K\\u202e\\udcff\\n"
    plain = "Größe 大 \N{DNA DOUBLE HELIX} e\u0301 a\u00a0b\u202f\\ HLA-DRB1*15:01"
    assert escape_control(plain) == plain
    for name in ("MINI3", "train_share=0.25, lr=1e-05", "-0.5", "MINI3 (synthetic)", "log1p-cp10k", "a > b: 50%"):
        assert escape_markdown(name) == name


def find_formulas(text):
    """Return the cells that a spreadsheet would run as formulas, for any separator."""
    formulas = []
    for sign in (",", ";", "\t"):
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=sign):
            cells = [cell.lstrip(' "') for cell in row]
            formulas += [
                c for c in cells if c[:1] in tuple("=+-@\t\r\uff1d") and not re.fullmatch(r"[-+]?[\d.e-]+(,.*)?", c)
            ]
    return formulas


def test_no_cell_of_a_reports_csv_is_a_formula(tmp_path):
    names = [name for name in NASTY if name] + ["-0.5", "+1", "1e-5", "HLA-A"]
    table = pd.DataFrame(
        {
            "name": names,
            "=head": names,
            "pcc": -0.5,
            "mixed": pd.Series([-2.5, None] * len(names), dtype=object)[: len(names)],
        }
    )
    table.index = pd.Index(names, name="row")
    write_spreadsheet_csv(table, tmp_path / "a.csv", index=True)
    text = (tmp_path / "a.csv").read_text("utf-8")
    assert find_formulas(text) == []
    assert len(text.splitlines()) == len(names) + 1
    back = pd.read_csv(tmp_path / "a.csv", keep_default_na=False, na_values={"mixed": [""]})
    assert back["mixed"].dropna().unique().tolist() == [-2.5]
    assert (back["pcc"] == -0.5).all()
    assert back["name"].tolist()[-4:] == ["-0.5", "+1", "1e-5", "HLA-A"]
    assert back["name"].tolist()[NASTY.index("@SUM(1)")] == "'@SUM(1)"
    assert "'=head" in back


@pytest.fixture
def nasty_sweep(tmp_path):
    """Return a sweep in which every text from the sender is code in some format."""
    folder, name = tmp_path / "sweep", iter(NASTY * 9)

    def take(n=1):
        return "".join(next(name).replace("\x00", "").replace("\udcff", "") for _ in range(n))

    def take_line(n):
        return re.sub(ESCAPES, "", take(n).replace("\n", " "))

    points = {}
    for k, method in enumerate(("none", "bone", "bone", "bone")):
        point = f"<img src=x onerror=alert({k})>=`{k}`\x1b[2K\u202e|\n# {k}"
        # Settings are checked, so that free text is only in paths, slides and patients.
        settings = {"cohort": take_line(12) if k else "mini", "weights": take_line(3), "patients": take_line(4)}
        settings |= {"tau": 1.0 + k, "slides": [take(6), take(6)]}
        run = write_run_folder(folder / point, method=method, data=take(2), **settings)
        change_json(run / "summary.json", lambda summary: summary["ceiling"]["log1p"].update(basis=take_line(9)))
        genes = [n for n in NASTY if "\udcff" not in n and "\x00" not in n]
        table = pd.read_csv(run / "metrics.csv").iloc[[0] * len(genes)].assign(gene=genes, pcc=-0.5)
        write_metrics(table, run / "metrics.csv")
        points[point] = {"tau": settings["tau"], "=1+1": take(2)}
    points["`; `# x\n# y"] = {"tau": "<b>"}
    log = {"`; `# x\n# y": {"state": "failed", "last_line": "x) [y](javascript:z)\n# Failed <script>"}}
    return write_sweep_file(folder, points, title="T\n# Second <script>alert(1)</script>", log=log)


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:.*constrained_layout")
def test_a_report_escapes_nasty_names(nasty_sweep, tmp_path, capsys):
    assert main(["report", str(nasty_sweep), "--out", str(tmp_path / "out")]) == 0
    assert not ESCAPES.search("".join(capsys.readouterr()))
    out = tmp_path / "out"
    pages = {path.name: path.read_text("utf-8") for path in out.glob("*.md")}
    assert {"report.md", "table1.md"} <= set(pages)
    for text in pages.values():
        assert not ESCAPES.search(text)
        page = Page(render(text))
        assert {*page.tags} <= {"h1", "h2", "h3", "p", "code", "img", "table", "thead", "tbody", "tr", "th", "td", "hr"}
        assert {key for key, _ in page.attributes} <= {"src", "alt"}
        pictures = [value for key, value in page.attributes if key == "src"]
        assert all(re.fullmatch(r"[\w.%-]+\.png", picture) for picture in pictures)
    heads = [line for line in pages["report.md"].splitlines() if line.startswith("# ")]
    assert heads == [r"# T # Second \<script>alert(1)\</script>"]
    tables = list(out.glob("*.csv"))
    assert len(tables) > 4
    for path in tables:
        assert find_formulas(path.read_text("utf-8")) == []
        assert not ESCAPES.search(path.read_text("utf-8"))
    genes = pd.read_parquet(out / "metrics.parquet")["gene"]
    assert {"=cmd|' /C calc'!A0", "\x1b[2Kx", "<b"} <= {*genes}  # not escaped: parquet is data
    assert not [path for path in tmp_path.iterdir() if path.name not in ("sweep", "out")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("models") / "run", features="frozen+student")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_trained(folder, fold=1, device="cpu")


def changed(model, *, config=None, summary=None, spec=None, genes=None):
    """Return a copy of the model with other, unchecked values in its record."""
    student = type("Student", (), {})()
    student.spec = replace(model.student.spec, **(spec or {}))
    student.weights_origin = (spec or {}).get("license", model.student.weights_origin)
    student.num_prefix_tokens, student.global_pool = 1, "token"
    settings = object.__new__(type(model.config))
    for name, value in (model.config.as_dict() | (config or {})).items():
        object.__setattr__(settings, name, value)
    return replace(
        model, student=student, config=settings, summary=model.summary | (summary or {}), genes=genes or model.genes
    )


def find_calls(card):
    """Return the names that the Python code of a card calls."""
    (code,) = re.findall(r"^```+python\n(.*?)^```+$", card, re.DOTALL | re.MULTILINE)
    calls = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [call.attr if isinstance(call, ast.Attribute) else call.id for call in calls]


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ("config", "seed", "0) or __import__('os').system('x'"), ("config", "seed", 1.5), ("config", "seed", True),
        ("config", "seed", None), ("spec", "dim", "1\nimport os"), ("spec", "input_size", "1), os.system('x'"),
        ("spec", "mean", ("os.system('x')", 0.5, 0.5)), ("spec", "std", (float("nan"), 0.5, 0.5)),
        ("spec", "options", {"x=os.system('x'), y": 1}), ("spec", "options", {"class": 1}),
        ("spec", "options", {"x": float("inf")}), ("spec", "options", {"x": [{}]}),
        ("summary", "mean_pcc", "x"), ("summary", "ci_low", None), ("summary", "mean_pcc_per_fold", ["x"]),
        ("summary", "mean_pcc_per_fold", "ab"), ("summary", "versions", ["torch"]), ("summary", "slides", "S1"),
    ],
)  # fmt: skip
def test_a_card_with_values_that_are_not_literals_is_refused(model, where, field, value):
    with pytest.raises(ValueError, match=r"expected .*, not |must be a \w+, not |not a valid argument name"):
        model_card(changed(model, **{where: {field: value}}))


@pytest.mark.parametrize("name", NASTY)
def test_a_card_escapes_nasty_names(model, name):
    def write_card(name):
        config = {"cohort": f"x{name}", "method": "bone", "normalization": f"y{name}", "weights": "hub"}
        summary = {"slides": [name, name], "data_fingerprint": name, "n_spots": name, "unit": name}
        summary |= {"versions": {name: name, "torch": name}}
        spec = {"name": name, "arch": name, "license": name, "gate": name, "source": name}
        spec["options"] = {"x": name, "y": [1, None]}
        card = model_card(changed(model, config=config, summary=summary, spec=spec, genes=(name, "B")))
        front, _, body = card.removeprefix("---\n").partition("\n---\n")
        return card, yaml.safe_load(front), Page(render(body))

    (card, front, page), (plain, plain_front, plain_page) = write_card(name), write_card("plain")
    assert not ESCAPES.search(card)
    assert front.keys() == plain_front.keys()
    assert front["base_model"] == escape_control(name)
    assert find_calls(card) == find_calls(plain)
    assert (page.tags, page.attributes) == (plain_page.tags, plain_page.attributes)


def test_a_seed_that_is_code_is_not_exported(tmp_path, capsys):
    folder = write_folder(tmp_path / "run", method="none", features="frozen+student", weights="hub")
    save_probes(folder / "probe.safetensors", {"fold0": (probe(384, 0), GENES)}, normalization="log1p-cp10k")
    settings = yaml.safe_load((folder / "config.yml").read_text())
    (folder / "config.yml").write_text(yaml.safe_dump(settings | {"seed": "0); __import__('os').system('x') #"}))
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "peka-lite: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a\x1b]0;t\x07b", "a\x1b[2K\rb", "a\u202eb", "a\npeka-lite: all is well", "a\x9b2Jb"])
def test_control_characters_in_names_are_escaped_on_a_terminal(tmp_path, name, capsys):
    from peka_lite.experiments.sweeps.read import Point, Sweep

    folder = tmp_path / name
    folder.mkdir()
    assert main(["report", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert escape_control(name) in err
    run = write_run_folder(folder / "run", method="none")
    (folder / "bad").mkdir()
    (folder / "bad" / "config.yml").write_text("x")
    assert main(["report", str(folder), "--out", str(folder / "out")]) == 0  # with a warning
    with show_messages():
        logger.info(f"plan: {name}")
    with pytest.raises(SystemExit):
        parser(command="report").parse_args(["report", "x", f"--{name}".replace(" ", "_")])
    point = Point(name, {"a": name}, {})
    sweep = Sweep(name="s", title=name, file=run, notebook=None, memory=1.0, points=(point,))
    states = pd.DataFrame(
        {"state": "failed", "seconds": 1.0, "last_line": name, "older": False, "cached": False}, index=[name]
    )
    board = Board(sweep, states)
    board.start()
    board.event({"point": name, "worker": name})
    board.console.print(board._table())
    board.ended(name, name)
    board.console.print(board._table())
    board.end(states)
    print(report([Check("disk", "note", name, name)]))
    more_out, more_err = capsys.readouterr()
    printed = out + err + more_out + more_err
    assert not ESCAPES.search(printed)
    assert printed.count(escape_control(name)) > 8
    assert not any(line.startswith("peka-lite: all is well") for line in printed.splitlines())


def test_control_characters_in_warnings_are_escaped_on_a_terminal(monkeypatch, capsys):
    def report(**_):
        warnings.warn("columns \x1b[2K of\nyours", FutureWarning, stacklevel=1)
        warnings.warn("slide \x1b[2K\nx", stacklevel=1)
        return 0

    monkeypatch.setattr("peka_lite.cli.main._report", report)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(
            warnings, "showwarning", lambda message, kind, *_, **__: print(f"{kind.__name__}: {message}")
        )
        assert main(["report", "x"]) == 0
    out, err = capsys.readouterr()
    assert out == "FutureWarning: columns \\x1b[2K of\nyours\n"
    assert err == "peka-lite: slide \\x1b[2K\\nx\n"


def test_names_are_escaped_in_a_cohorts_html():
    from peka_lite.data._html import render_cohort

    data = SimpleNamespace(n_vars=2)
    slides = [
        SimpleNamespace(id=name, patient=name, metadata={"organ": name}, n_spots=1, adata=data, dropped={name: 1})
        for name in NASTY
    ]
    cohort = type("Cohort", (), {"__len__": lambda self: 0})()
    cohort.slides, cohort.genes, cohort.left_out = slides, (), {name: name for name in NASTY}
    html = render_cohort(cohort)
    page = Page(html)
    assert {*page.tags} == {"div", "strong", "table", "tr", "th", "td", "ul", "li"}
    assert page.attributes == []
    assert not ESCAPES.search(html)
