"""Tables and figures from run folders; protocols never share a column."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path

import pandas as pd
import yaml

from peka_lite.scores import difference

PROTOCOLS = ("paper", "hest", "strict", "custom")
TARGETS = ("log1p-cp10k", "log1p")
PAPER = "PEKA, arXiv:2504.07061"
COHORTS = ("breast", "kidney", "liver", "lung")
BACKBONES = {"resnet50": "ResNet-50", "ctranspath": "CTransPath", "uni": "UNI", "h-optimus-0": "H-optimus-0"}
METHODS = {"none": "frozen", "bone": "Bone", "lora": "LoRA", "adalora": "AdaLoRA", "miss": "MiSS"}
CONTROLS = {"colour": "colour and texture", "coordinates": "coordinates", "depth": "total count"}
HELD_OUT = {"patient": "patients held out", "slide": "sections held out", "spot": "random spots held out"}
CAUTION = {
    "paper": "Random spots are held out, and a taught student saw the whole cohort, test spots included: these "
    "values say nothing of a new patient.",
    "hest": "A taught student saw training rows only; genes are chosen on all rows, as HEST-bench does.",
    "strict": "Student, clusters, genes, PCA and penalty were made from training rows only.",
    "custom": "No named protocol: config.yml of each run says what was held out and how.",
}
LIVER = (
    "The paper's tables give PEKA on liver as 0.654 (Table 1) and 0.640 (Table 2, H-optimus-0); both are kept. Table 1 "
    "names no backbone for PEKA: its other values are those of H-optimus-0 in Table 2, and 0.654 is that of UNI."
)
_FIELDS = (
    "protocol", "method", "features", "shuffled", "backbone", "cohort", "split", "normalization", "scores", "ceiling",
    "unit", "one_patient", "synthetic", "slides", "data_fingerprint",
)  # fmt: skip
_ELSEWHERE = ("cohort", "slides", "patients", "device")  # settings that the data's fingerprint stands for, or no number


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished run as reports need it: folder name, `config.yml`, `summary.json` and `slides.parquet`."""

    name: str
    config: dict
    summary: dict
    moments: pd.DataFrame

    def score(self, how: str = "pooled", *, normalization: str | None = None) -> dict:
        """Return pcc, ci_low, ci_high and per_fold; of the protocol's own targets by default."""
        return self.summary["scores"][normalization or self.summary["normalization"]][how]

    @property
    def cohort(self) -> str:
        """Cohort for titles and columns; a name of the paper's only for the whole cohort of that name."""
        given, slides = self.config["cohort"], self.config.get("slides")
        name = Path(given).name
        if slides:
            name += f" {', '.join(slides)}" if len(slides) <= 4 else f" ({len(slides)} slides)"
        return f"{name} (folder)" if name in COHORTS and given != name else name

    @property
    def backbone(self) -> str | None:
        """The student's; None for controls, which read none."""
        return self.summary["backbone"] if self.summary["features"] in ("student", "frozen+student") else None


def published() -> pd.DataFrame:
    """Return the paper's mean PCCs (PEKA, arXiv:2504.07061): table (1, 2), cohort, backbone, method, pcc.

    PEKA is method ``"bone"`` in Table 2. Table 1 names no backbone for it: method ``"PEKA (best)"``, backbone empty.
    """
    with resources.files("peka_lite").joinpath("data/published.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, keep_default_na=False)


def read_runs(folders: Iterable[str | os.PathLike]) -> list[Run]:
    """Read finished runs, given their folders or folders that hold them (one level).

    Raises
    ------
    FileNotFoundError
        For a folder that holds no finished run, or an unfinished one; the message names what is missing.
    ValueError
        For a run made by an older version, and for two runs with the same settings.
    """
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give one that `peka-lite run` made, or one of those")
        inside = [] if _is_run(folder) else sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path))
        found += inside or [folder]
    if not found:
        raise ValueError("a report needs at least one run folder")
    runs, seen = [], {}
    for folder in found:
        run = _read(folder)
        settings = {k: v for k, v in run.config.items() if k not in _ELSEWHERE}
        key = json.dumps([settings, run.summary["data_fingerprint"]], sort_keys=True)
        if key in seen:
            raise ValueError(f"{seen[key]} and {folder} are one run twice (same settings, same data); leave one out")
        seen[key] = folder
        runs.append(run)
    return runs


def label(run: Run) -> str:
    """Return a run's row name: ``"frozen"``, ``"Bone"``, ``"[frozen, Bone]"``, ``"coordinates"``, ..."""
    features, method = run.summary["features"], METHODS[run.summary["method"]]
    if features in CONTROLS:
        return CONTROLS[features]
    if features == "teacher":
        return "teacher (upper line)"
    name = f"[frozen, {method}]" if features == "frozen+student" else method
    return f"{name}, shuffled teacher" if run.summary["shuffled"] else name


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Sort runs as rows: controls, shuffled teachers, frozen, methods, concatenations, the teacher last."""

    def place(run):
        features, shuffled = run.summary["features"], run.summary["shuffled"]
        method = list(METHODS).index(run.summary["method"])
        if features in CONTROLS:
            return 0, 0, list(CONTROLS).index(features)
        return 4 if features == "teacher" else 1 if shuffled else 2, features == "frozen+student", method

    return sorted(runs, key=place)


def protocol_table(runs: Sequence[Run], *, normalization: str | None = None) -> pd.DataFrame:
    """Put runs of one protocol, cohort and backbone under each other.

    Parameters
    ----------
    normalization
        Which targets; the protocol's own by default.

    Returns
    -------
    pandas.DataFrame
        One row a run (`label`): mean PCC pooled over a fold's test spots and its interval, the same by slides, the
        pooled PCC's share of the ceiling that counting noise sets, and the pooled PCC of each fold. ``attrs`` holds
        title and note.

    Raises
    ------
    ValueError
        If runs differ in what would make a column mean two things; the message names it.
    """
    runs = require_shared(runs)
    own = runs[0].summary["normalization"]
    normalization = normalization or own
    rows = []
    for run in runs:
        pooled, slides = (run.score(how, normalization=normalization) for how in ("pooled", "slides"))
        row = _scores("PCC", pooled, slides)
        row["share of ceiling"] = pooled["pcc"] / run.summary["ceiling"][normalization]["pcc"]
        rows.append(row | {f"fold {i}": pcc for i, pcc in enumerate(pooled["per_fold"])})
    table = pd.DataFrame(rows, index=pd.Index([label(run) for run in runs], name="features"))
    basis = runs[0].summary["ceiling"][normalization]["basis"]
    note = f"{CAUTION[runs[0].summary['protocol']]} Mean PCC over genes, then over folds (pooled) or slides; "
    note += f"95% intervals. Ceiling: {'known from the simulation' if basis == 'known' else 'from ' + basis}."
    if normalization != own:
        note += f" The protocol's own targets are {own}; its genes were chosen for those."
    table.attrs = {"title": title(runs, normalization=normalization), "note": note}
    return table


def difference_table(
    runs: Sequence[Run], *, reference: str = "frozen", normalization: str | None = None
) -> pd.DataFrame:
    """Subtract the reference's mean PCC from every other run's, paired by patient (or slide) and gene.

    Parameters and errors are those of `protocol_table`; `reference` is a row's `label`. Columns: difference of the
    pooled PCC and its 95% interval, and the same by slides.
    """
    runs = require_shared(runs)
    named = {label(run): run for run in runs}
    if reference not in named or len(named) == 1:
        raise ValueError(f"no differences to {reference!r}: the runs are {', '.join(named)}")
    normalization = normalization or runs[0].summary["normalization"]
    moments = {k: run.moments[run.moments["normalization"] == normalization] for k, run in named.items()}
    against, rows = moments.pop(reference), []
    for here in moments.values():
        rows.append(_scores("difference", *(difference(here, against, how=how) for how in ("pooled", "slides"))))
    table = pd.DataFrame(rows, index=pd.Index(list(moments), name=f"minus {reference}"))
    note = "Differences of the mean PCC, paired; 95% intervals, each for itself and not for all rows together."
    table.attrs = {"title": f"minus {reference} · {title(runs, normalization=normalization)}", "note": note}
    return table


def leak_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Put the same data under paper, hest and strict protocol side by side, a column each, with what each step costs.

    Returns
    -------
    pandas.DataFrame
        One row per targets and `label`: pooled mean PCC by protocol, the cost of either step (positive where PCC is
        lost), then the intervals. NaN where no run is.

    Raises
    ------
    ValueError
        With fewer than two of these protocols, or runs that differ in data, backbone, epochs and the like.
    """
    have = [p for p in PROTOCOLS if any(run.summary["protocol"] == p for run in runs)]
    if len(have) < 2 or "custom" in have:
        raise ValueError(f"what leaks cost takes runs of at least two of paper, hest and strict, not {', '.join(have)}")
    runs = require_shared(runs, across_protocols=True)
    who = "patients" if any(run.summary["split"] == "patient" for run in runs) else "sections"
    rows = {}
    for target in TARGETS:
        for run in runs:
            score, name = run.score(normalization=target), run.summary["protocol"]
            row = rows.setdefault((target, label(run)), {})
            row |= {name: score["pcc"], f"{name} low": score["ci_low"], f"{name} high": score["ci_high"]}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index = pd.MultiIndex.from_tuples(rows, names=["targets", "features"])
    table = table.reindex(columns=[f"{p}{end}" for end in ("", " low", " high") for p in PROTOCOLS[:3]])
    table.insert(3, f"cost of holding {who} out", table["paper"] - table["hest"])
    table.insert(4, "cost of the rest", table["hest"] - table["strict"])
    table.attrs["title"] = f"one protocol a column, never one for another · {_where(runs)} · pooled PCC"
    table.attrs["note"] = (
        f"From paper to hest {who} are held out from student and probe, and the penalty changes; from hest to strict "
        "genes and penalty are chosen on training rows too, and a better penalty can make that cost negative. "
        "Protocols score different genes and folds: a cost is a difference of two means, without a paired interval."
    )
    return table


def table1(runs: Sequence[Run]) -> pd.DataFrame:
    """Put frozen backbones and the best Bone student beside the paper's Table 1; runs of one protocol.

    Ours is the pooled mean PCC on the protocol's own targets. A cohort that is not the paper's has no published column.
    """
    protocol, by_cohort = _one_protocol(runs, "Table 1")
    ours, best = {}, []
    for cohort, here in by_cohort.items():
        plain = [run for run in here if run.summary["features"] == "student" and not run.summary["shuffled"]]
        column = {run.backbone: run.score()["pcc"] for run in plain if run.summary["method"] == "none"}
        if bone := [run for run in plain if run.summary["method"] == "bone"]:
            top = max(bone, key=lambda run: run.score()["pcc"])
            column["PEKA (best)"] = top.score()["pcc"]
            best.append(f"{cohort}: {BACKBONES.get(top.backbone, top.backbone)}, the best of {len(bone)}")
        ours[cohort] = column
    theirs = published().query("table == 1")
    theirs = theirs.assign(row=theirs["backbone"].where(theirs["backbone"] != "", theirs["method"]))
    table = _beside(theirs.pivot(index="row", columns="cohort", values="pcc"), ours, protocol)
    rows = [*BACKBONES, *sorted(set(table.index) - {*BACKBONES, "PEKA (best)"}), "PEKA (best)"]
    table = table.loc[rows].rename(index=BACKBONES).rename_axis("features")
    note = f"{comparability(runs)} {LIVER}"
    if best:
        note += f" Our PEKA (best) is chosen by the very score it shows ({'; '.join(best)})."
    table.attrs = {"title": f"Table 1 · {protocol} protocol beside published values ({PAPER})", "note": note}
    return table


def table2(runs: Sequence[Run]) -> pd.DataFrame:
    """Put every backbone and method beside the paper's Table 2; otherwise as `table1`."""
    protocol, by_cohort = _one_protocol(runs, "Table 2")
    ours = {
        cohort: {
            (run.backbone, run.summary["method"]): run.score()["pcc"]
            for run in here
            if run.summary["features"] == "student" and not run.summary["shuffled"]
        }
        for cohort, here in by_cohort.items()
    }
    theirs = published().query("table == 2").pivot(index=["backbone", "method"], columns="cohort", values="pcc")
    table = _beside(theirs, ours, protocol)
    backbones = [*BACKBONES, *sorted(set(table.index.get_level_values(0)) - set(BACKBONES))]
    rows = [(b, m) for b in backbones for m in METHODS if (b, m) in table.index]
    table = table.loc[rows].rename(index=BACKBONES, level=0)
    table = table.rename(index=METHODS | {"bone": "Bone (PEKA)"}, level=1)
    note = f"{comparability(runs)} {LIVER}"
    table.attrs = {"title": f"Table 2 · {protocol} protocol beside published values ({PAPER})", "note": note}
    return table


def comparability(runs: Sequence[Run]) -> str:
    """Say in one sentence why these runs' values may not be compared with published ones, naming what differs."""
    students = [run for run in runs if run.backbone]
    taught = [run for run in students if run.summary["method"] != "none"]

    def names(values):
        return ", ".join(sorted(set(values)))

    differs = []
    if other := names(run.summary["protocol"] for run in runs if run.summary["protocol"] != "paper"):
        differs.append(f"the protocol is {other} and not the paper's")
    if other := names(run.cohort + _synthetic(run) for run in runs if run.cohort not in COHORTS):
        differs.append(f"cohort {other} is not in the paper")
    if other := names(run.backbone for run in students if run.backbone not in BACKBONES):
        differs.append(f"backbone {other} is not in the paper")
    if other := names(run.backbone for run in students if run.config["weights"] == "random"):
        differs.append(f"weights are random ({other})")
    if other := names(run.backbone for run in students if run.config["weights"] not in ("random", "hub")):
        differs.append(f"weights come from a file of one's own ({other})")
    if other := names(run.config["teacher"] for run in taught if run.config["teacher"] != "scfoundation"):
        differs.append(f"the teacher is {other} and not scFoundation")
    if any(run.config.get("train_share", 1) < 1 for run in runs):
        differs.append("only a share of the training spots was used")
    if differs:
        return f"Published and our values may not be compared: {'; '.join(differs)}."
    return (
        "Protocol, cohorts, weights and teacher have the paper's names; whether samples, folds and settings are the "
        "very same is not on record, so published and our values may be compared with caution only."
    )


def write_report(folders: Iterable[str | os.PathLike], out: str | os.PathLike) -> list[Path]:
    """Write every table (CSV and Markdown) and figure that the runs allow, and ``report.md`` which binds them.

    Parameters
    ----------
    folders
        As for `read_runs`.
    out
        Folder to make; it appears when the report is complete. Table 1, Table 2 and Figure 2 carry the protocol in
        their file names where there are several.

    Returns
    -------
    list of pathlib.Path
        The files written.

    Raises
    ------
    FileExistsError
        If `out` is there already.
    """
    import matplotlib.pyplot as plt

    from peka_lite.report_figures import figure2, leak_figure

    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; name another folder or remove it")
    runs = read_runs(folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        work = Path(scratch) / out.name
        work.mkdir()
        page = ["# Report", _run_list(runs)]

        def put(name: str, tables: dict[str, pd.DataFrame]) -> None:
            _write_tables(work / _file_name(name), tables)
            page.append((work / f"{_file_name(name)}.md").read_text("utf-8"))

        def draw(name: str, figure) -> None:
            figure.savefig(work / f"{_file_name(name)}.png", dpi=120)
            plt.close(figure)
            page.append(f"![{name}]({_file_name(name)}.png)")

        by_protocol = _split(runs, lambda run: run.summary["protocol"], order=PROTOCOLS)
        for protocol, here in by_protocol.items():
            end = f"_{protocol}" if len(by_protocol) > 1 else ""
            page.append(f"## {protocol.capitalize()} protocol")
            put(f"table1{end}", {"": table1(here)})
            put(f"table2{end}", {"": table2(here)})
            draw(f"figure2{end}", figure2(here))
            for cohort, together in panels(here).items():
                name = f"{cohort}_{protocol}"
                targets = _targets(together)
                put(f"protocol_{name}", {m: protocol_table(together, normalization=m) for m in targets})
                if "frozen" in (rows := [label(run) for run in together]) and len(rows) > 1:
                    put(f"differences_{name}", {m: difference_table(together, normalization=m) for m in targets})
                else:
                    page.append(f"No differences for {cohort}: they need a frozen student and another row.")
        page.append("## What leaks are worth")
        named = [run for run in runs if run.summary["protocol"] != "custom"]
        for cohort, together in panels(named).items():
            if len({run.summary["protocol"] for run in together}) < 2:
                page.append(f"{cohort}: one protocol only, so there is nothing to set side by side.")
                continue
            put(f"leak_{cohort}", {"": leak_table(together)})
            draw(f"leak_{cohort}", leak_figure(together))
        (work / "report.md").write_text("\n\n".join(part.strip() for part in page) + "\n", "utf-8")
        written = sorted(path.name for path in work.iterdir())
        os.replace(work, out)
    return [out / name for name in written]


def markdown(table: pd.DataFrame) -> str:
    """Return a table as GitHub's Markdown: three decimals, empty where there is no value."""
    flat = table.reset_index() if any(table.index.names) else table
    lines = [[str(column).strip() for column in flat], ["---"] * flat.shape[1]]
    lines += [[_cell(value) for value in row] for row in flat.itertuples(index=False)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def require_shared(runs: Sequence[Run], *, across_protocols: bool = False, backbones: bool = False) -> list[Run]:
    """Return runs in row order, refusing those that may not stand in one column.

    With `across_protocols` they may differ in what a protocol sets, with `backbones` in the student's weights.
    """
    if not runs:
        raise ValueError("a table needs at least one run")
    students = [run for run in runs if run.backbone]
    taught = [run for run in students if run.summary["method"] != "none"]
    of_protocol = () if across_protocols else ("protocol", "split", "normalization", "alpha")
    checks = [
        (field, runs) for field in ("data_fingerprint", *of_protocol, "n_splits", "seed", "n_genes", "train_share")
    ]
    checks += [(field, students) for field in (() if backbones else ("backbone", "weights"))]
    checks += [(field, taught) for field in ("epochs", "teacher")]
    for field, group in checks:
        values = [(run.summary | run.config).get(field) for run in group]
        for run, value in zip(group, values, strict=True):
            if value != values[0]:
                raise ValueError(
                    f"{group[0].name} and {run.name} differ in {field} ({values[0]} and {value}): they may not share a "
                    "column; report them apart"
                )
    rows = {}
    for run in runs:
        other = rows.setdefault((label(run), run.backbone, run.summary["protocol"]), run)
        if other is not run:
            fields = [k for k in run.config if k not in _ELSEWHERE and run.config[k] != other.config.get(k)]
            raise ValueError(
                f"{other.name} and {run.name} would both be the row {label(run)!r}; they differ in "
                f"{', '.join(fields)}: report them apart"
            )
    return in_order(runs)


def title(runs: Sequence[Run], *, normalization: str) -> str:
    """Return what a table of one protocol holds, in words: protocol, cohort, who is held out, targets, intervals."""
    summary, moments = runs[0].summary, runs[0].moments
    moments = moments[moments["normalization"] == normalization]
    held_out = HELD_OUT[summary["split"]]
    if summary["one_patient"]:
        held_out = f"one patient, {held_out}"
    n, unit = moments[summary["unit"]].nunique(), summary["unit"]
    over = f"intervals over {n} {unit}s and {moments['gene'].nunique()} genes" if n > 1 else f"no intervals: one {unit}"
    return f"{summary['protocol']} protocol · {_where(runs)} · {held_out} · {normalization} targets · {over}"


def panels(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by cohort and, where there are several, backbone; controls read no student and join each."""
    groups = {}
    for cohort, here in _split(runs, lambda run: run.cohort).items():
        backbones = sorted({run.backbone for run in here} - {None})
        for backbone in backbones if len(backbones) > 1 else [None]:
            name = cohort if backbone is None else f"{cohort}, {BACKBONES.get(backbone, backbone)}"
            groups[name] = [run for run in here if backbone is None or run.backbone in (None, backbone)]
    return groups


def _is_run(folder: Path) -> bool:
    return (folder / "summary.json").is_file() or (folder / "config.yml").is_file()


def _read(folder: Path) -> Run:
    if missing := [f for f in ("config.yml", "summary.json", "slides.parquet") if not (folder / f).is_file()]:
        raise FileNotFoundError(
            f"{folder}: no finished run here ({', '.join(missing)} missing); finish it with `peka-lite run`, or leave "
            "the folder out"
        )
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        config = yaml.safe_load((folder / "config.yml").read_text("utf-8"))
        moments = pd.read_parquet(folder / "slides.parquet")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{folder}: a file of this run cannot be read ({error}); run it anew") from None
    if missing := [field for field in _FIELDS if field not in summary]:
        raise ValueError(f"{folder / 'summary.json'}: no {', '.join(missing)}; an older version made it, run it anew")
    return Run(folder.resolve().name, config, summary, moments)


def _split(runs: Iterable[Run], key: Callable, *, order: Sequence[str] = ()) -> dict[str, list[Run]]:
    groups = {name: [] for name in order}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return {name: group for name, group in groups.items() if group}


def _one_protocol(runs: Sequence[Run], what: str) -> tuple[str, dict[str, list[Run]]]:
    by_protocol = _split(runs, lambda run: run.summary["protocol"], order=PROTOCOLS)
    if len(by_protocol) != 1:
        raise ValueError(f"{what} takes runs of one protocol, not of {', '.join(by_protocol) or 'none'}")
    by_cohort = _split(runs, lambda run: run.cohort, order=COHORTS)
    return next(iter(by_protocol)), {k: require_shared(here, backbones=True) for k, here in by_cohort.items()}


def _beside(theirs: pd.DataFrame, ours: dict[str, dict], protocol: str) -> pd.DataFrame:
    """Join published values and ours, a column each for every cohort."""
    columns = {}
    for cohort in dict.fromkeys([*COHORTS, *ours]):
        if cohort in theirs:
            columns[f"{cohort}, published"] = theirs[cohort].to_dict()
        if ours.get(cohort):
            columns[f"{cohort}, ours ({protocol})"] = ours[cohort]
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    table = pd.DataFrame({name: [column.get(row, float("nan")) for row in rows] for name, column in columns.items()})
    table.index = pd.MultiIndex.from_tuples(rows, names=theirs.index.names) if theirs.index.nlevels > 1 else list(rows)
    return table


def _where(runs: Sequence[Run]) -> str:
    """Cohort and student, in words."""
    words = runs[0].cohort + _synthetic(runs[0])
    if student := next((run for run in runs if run.backbone), None):
        words += f" · {BACKBONES.get(student.backbone, student.backbone)}"
        words += " with random weights" if student.config["weights"] == "random" else ""
    share = runs[0].config.get("train_share", 1)
    return words if share == 1 else f"{words} · {share:.0%} of the training spots"


def _synthetic(run: Run) -> str:
    return " (synthetic)" if run.summary["synthetic"] else ""


def _scores(name: str, pooled: dict, slides: dict) -> dict:
    columns = {"": pooled, ", by slides": slides}
    keys = {name: "pcc", "low": "ci_low", "high": "ci_high"}
    return {word + end: score[key] for end, score in columns.items() for word, key in keys.items()}


def _targets(runs: Sequence[Run]) -> list[str]:
    own = runs[0].summary["normalization"]
    return [own, *(m for m in TARGETS if m != own)]


def _write_tables(path: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Write one CSV (with a column of targets where there are several tables) and one Markdown file."""
    whole = pd.concat(tables, names=["targets"]) if len(tables) > 1 else next(iter(tables.values()))
    whole.to_csv(path.with_name(path.name + ".csv"))
    texts = [f"### {t.attrs['title']}\n\n{markdown(t)}\n{t.attrs['note']}\n" for t in tables.values()]
    path.with_name(path.name + ".md").write_text("\n".join(texts), "utf-8")


def _run_list(runs: Sequence[Run]) -> str:
    rows = [
        {"run": run.name, "protocol": run.summary["protocol"], "cohort": run.cohort + _synthetic(run),
         "student": run.backbone or "", "row": label(run)}
        for run in runs
    ]  # fmt: skip
    return markdown(pd.DataFrame(rows))


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.3f}"
    return str(value)
