"""The paper's tables, and ours beside them, with what forbids a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import pandas as pd

from peka_lite.reports.runs import BACKBONES, COHORTS, METHODS, PROTOCOLS, Run, group_runs, require_shared

PAPER = "PEKA, arXiv:2504.07061"
FOLDS = (
    "The paper says 5-fold cross-validation and not of what; protocol paper has the folds of its released code (KFold "
    "with shuffle over spots), and the published values may have come from other code."
)
LIVER = (
    "The paper's tables give PEKA on liver as 0.654 (Table 1) and 0.640 (Table 2, H-optimus-0); both are kept. Table 1 "
    "names no backbone for PEKA: its other values are those of H-optimus-0 in Table 2, and 0.654 is that of UNI."
)


def read_published() -> pd.DataFrame:
    """Return the paper's mean PCCs (PEKA, arXiv:2504.07061): table (1, 2), cohort, backbone, method, pcc.

    The paper says 5-fold cross-validation and not of what; its released code holds out random spots, and the values may
    have come from other code.
    PEKA is method ``"bone"`` in Table 2. Table 1 names no backbone for it: method ``"PEKA (best)"``, backbone empty.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.reports.read_published().query("table == 2 and cohort == 'breast' and backbone == 'uni'")
        table  cohort backbone   method    pcc
    20      2  breast      uni     none  0.617
    21      2  breast      uni     lora  0.668
    22      2  breast      uni  adalora  0.643
    23      2  breast      uni     bone  0.688
    """
    with resources.files("peka_lite.reports").joinpath("published.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, keep_default_na=False)


def table1(runs: Sequence[Run]) -> pd.DataFrame:
    """Put frozen backbones and the best Bone student beside the paper's Table 1; runs of one protocol.

    Ours is the pooled mean PCC on the protocol's own targets. A cohort that is not the paper's has no published column.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(**small), "student", maps=False)
    >>> table = pk.reports.table1(pk.reports.read_runs(["student"]))
    >>> list(table)
    ['breast, published', 'kidney, published', 'liver, published', 'lung, published', 'mini MINI3, ours (custom)']
    >>> list(table.index)
    ['ResNet-50', 'CTransPath', 'UNI', 'H-optimus-0', 'mini', 'PEKA (best)']
    >>> table.loc["mini"].round(2).tolist()
    [nan, nan, nan, nan, 0.07]
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
    theirs = read_published().query("table == 1")
    theirs = theirs.assign(row=theirs["backbone"].where(theirs["backbone"] != "", theirs["method"]))
    table = _beside(theirs.pivot(index="row", columns="cohort", values="pcc"), ours, protocol)
    rows = [*BACKBONES, *sorted(set(table.index) - {*BACKBONES, "PEKA (best)"}), "PEKA (best)"]
    table = table.loc[rows].rename(index=BACKBONES).rename_axis("features")
    note = f"{describe_comparability(runs)} {FOLDS} {LIVER}"
    if best:
        note += f" Our PEKA (best) is chosen by the very score it shows ({'; '.join(best)})."
    table.attrs = {"title": f"Table 1 · {protocol} protocol beside published values ({PAPER})", "note": note}
    return table


def table2(runs: Sequence[Run]) -> pd.DataFrame:
    """Put every backbone and method beside the paper's Table 2; otherwise as `table1`.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(**small), "student", maps=False)
    >>> table = pk.reports.table2(pk.reports.read_runs(["student"]))
    >>> table["breast, published"]["UNI"].to_dict()
    {'frozen': 0.617, 'Bone (PEKA)': 0.688, 'LoRA': 0.668, 'AdaLoRA': 0.643}
    >>> table.loc[("mini", "frozen")].dropna().round(2).to_dict()
    {'mini MINI3, ours (custom)': 0.07}
    """
    protocol, by_cohort = _one_protocol(runs, "Table 2")
    ours = {
        cohort: {
            (run.backbone, run.summary["method"]): run.score()["pcc"]
            for run in here
            if run.summary["features"] == "student" and not run.summary["shuffled"]
        }
        for cohort, here in by_cohort.items()
    }
    theirs = read_published().query("table == 2").pivot(index=["backbone", "method"], columns="cohort", values="pcc")
    table = _beside(theirs, ours, protocol)
    backbones = [*BACKBONES, *sorted(set(table.index.get_level_values(0)) - set(BACKBONES))]
    rows = [(b, m) for b in backbones for m in METHODS if (b, m) in table.index]
    table = table.loc[rows].rename(index=BACKBONES, level=0)
    table = table.rename(index=METHODS | {"bone": "Bone (PEKA)"}, level=1)
    note = f"{describe_comparability(runs)} {FOLDS} {LIVER}"
    table.attrs = {"title": f"Table 2 · {protocol} protocol beside published values ({PAPER})", "note": note}
    return table


def describe_comparability(runs: Sequence[Run]) -> str:
    """Say in one sentence why these runs' values may not be compared with published ones, naming what differs.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(**small), "student", maps=False)
    >>> for part in pk.reports.describe_comparability(pk.reports.read_runs(["student"])).split("; "):
    ...     print(part)
    Published and our values may not be compared: the protocol is custom and not paper
    cohort mini MINI3 (synthetic) is not in the paper
    backbone mini is not in the paper.
    """
    students = [run for run in runs if run.backbone]
    taught = [run for run in students if run.summary["method"] != "none"]

    def names(values):
        return ", ".join(sorted(set(values)))

    differs = []
    if other := names(run.summary["protocol"] for run in runs if run.summary["protocol"] != "paper"):
        differs.append(f"the protocol is {other} and not paper")
    if other := names(run.named_cohort for run in runs if run.cohort not in COHORTS):
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


def _one_protocol(runs: Sequence[Run], what: str) -> tuple[str, dict[str, list[Run]]]:
    by_protocol = group_runs(runs, lambda run: run.summary["protocol"], order=PROTOCOLS)
    if len(by_protocol) != 1:
        raise ValueError(f"{what} takes runs of one protocol, not of {', '.join(by_protocol) or 'none'}")
    by_cohort = group_runs(runs, lambda run: run.cohort, order=COHORTS)
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
