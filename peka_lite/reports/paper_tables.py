"""Tables 1 and 2 of the paper with our values beside them, and the reasons against a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import pandas as pd

from peka_lite.reports.runs import BACKBONES, COHORTS, METHODS, PROTOCOLS, Run, group_runs, require_shared

PAPER = "PEKA, arXiv:2504.07061"
FOLDS = (
    "The paper reports 5-fold cross-validation and does not state what the folds split; protocol paper has the folds "
    "of its released code (KFold with shuffle over spots), and the published values may have come from other code."
)
LIVER = (
    "The paper's tables give PEKA on liver as 0.654 (Table 1) and 0.640 (Table 2, H-optimus-0); we show both. Table 1 "
    "names no backbone for PEKA: its other values are those of H-optimus-0 in Table 2, and 0.654 is that of UNI."
)


def read_published() -> pd.DataFrame:
    """Return the mean PCCs of the paper (PEKA, arXiv:2504.07061): table (1, 2), cohort, backbone, method, pcc.

    The paper reports 5-fold cross-validation and does not state what the folds split. Its released code holds out
    random spots, and the values may have come from other code. PEKA is method ``"bone"`` in Table 2. Table 1 names no
    backbone for it: method ``"PEKA (best)"``, backbone empty.

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
    """Show frozen backbones and the best Bone student beside the paper's Table 1, for runs of one protocol.

    Our values are pooled mean PCCs on the protocol's targets. Cohorts not in the paper have no published column.

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
    protocol, by_cohort = _group_one_protocol(runs, "Table 1")
    ours, best = {}, []
    for cohort, group in by_cohort.items():
        plain = [run for run in group if run.summary["features"] == "student" and not run.summary["shuffled"]]
        column = {run.backbone: run.score()["pcc"] for run in plain if run.summary["method"] == "none"}
        if bone := [run for run in plain if run.summary["method"] == "bone"]:
            top = max(bone, key=lambda run: run.score()["pcc"])
            column["PEKA (best)"] = top.score()["pcc"]
            best.append(f"{cohort}: {BACKBONES.get(top.backbone, top.backbone)}, the best of {len(bone)}")
        ours[cohort] = column
    published = read_published().query("table == 1")
    published = published.assign(row=published["backbone"].where(published["backbone"] != "", published["method"]))
    table = _join_values(published.pivot(index="row", columns="cohort", values="pcc"), ours, protocol)
    rows = [*BACKBONES, *sorted(set(table.index) - {*BACKBONES, "PEKA (best)"}), "PEKA (best)"]
    table = table.loc[rows].rename(index=BACKBONES).rename_axis("features")
    note = f"{describe_comparability(runs)} {FOLDS} {LIVER}"
    if best:
        note += f" Our PEKA (best) is selected by the score shown here ({'; '.join(best)})."
    table.attrs = {"title": f"Table 1 · {protocol} protocol beside published values ({PAPER})", "note": note}
    return table


def table2(runs: Sequence[Run]) -> pd.DataFrame:
    """Show every backbone and method beside the paper's Table 2; otherwise as `table1`.

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
    protocol, by_cohort = _group_one_protocol(runs, "Table 2")
    ours = {
        cohort: {
            (run.backbone, run.summary["method"]): run.score()["pcc"]
            for run in group
            if run.summary["features"] == "student" and not run.summary["shuffled"]
        }
        for cohort, group in by_cohort.items()
    }
    published = read_published().query("table == 2")
    published = published.pivot(index=["backbone", "method"], columns="cohort", values="pcc")
    table = _join_values(published, ours, protocol)
    backbones = [*BACKBONES, *sorted(set(table.index.get_level_values(0)) - set(BACKBONES))]
    rows = [(b, m) for b in backbones for m in METHODS if (b, m) in table.index]
    table = table.loc[rows].rename(index=BACKBONES, level=0)
    table = table.rename(index=METHODS | {"bone": "Bone (PEKA)"}, level=1)
    note = f"{describe_comparability(runs)} {FOLDS} {LIVER}"
    table.attrs = {"title": f"Table 2 · {protocol} protocol beside published values ({PAPER})", "note": note}
    return table


def describe_comparability(runs: Sequence[Run]) -> str:
    """Describe in one sentence what keeps the runs from being compared with published values.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(**small), "student", maps=False)
    >>> for part in pk.reports.describe_comparability(pk.reports.read_runs(["student"])).split("; "):
    ...     print(part)
    Our values are not comparable with the published ones: the protocol is custom and not paper
    cohort mini MINI3 (synthetic) is not in the paper
    backbone mini is not in the paper.
    """
    students = [run for run in runs if run.backbone]
    trained = [run for run in students if run.summary["method"] != "none"]

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
        differs.append(f"weights come from a user-supplied file ({other})")
    if other := names(run.config["teacher"] for run in trained if run.config["teacher"] != "scfoundation"):
        differs.append(f"the teacher is {other} and not scFoundation")
    if any(run.config.get("train_share", 1) < 1 for run in runs):
        differs.append("only a share of the training spots was used")
    if differs:
        return f"Our values are not comparable with the published ones: {'; '.join(differs)}."
    return (
        "Protocol, cohorts, weights and teacher have the paper's names; whether samples, folds and settings are the "
        "same is not documented, so compare our values and the published ones with caution."
    )


def _group_one_protocol(runs: Sequence[Run], name: str) -> tuple[str, dict[str, list[Run]]]:
    by_protocol = group_runs(runs, lambda run: run.summary["protocol"], order=PROTOCOLS)
    if len(by_protocol) != 1:
        raise ValueError(f"{name} takes runs of one protocol, not of {', '.join(by_protocol) or 'none'}")
    by_cohort = group_runs(runs, lambda run: run.cohort, order=COHORTS)
    return next(iter(by_protocol)), {k: require_shared(group, backbones=True) for k, group in by_cohort.items()}


def _join_values(published: pd.DataFrame, ours: dict[str, dict], protocol: str) -> pd.DataFrame:
    """Join published values and ours, with one column of each per cohort."""
    columns = {}
    for cohort in dict.fromkeys([*COHORTS, *ours]):
        if cohort in published:
            columns[f"{cohort}, published"] = published[cohort].to_dict()
        if ours.get(cohort):
            columns[f"{cohort}, ours ({protocol})"] = ours[cohort]
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    table = pd.DataFrame({name: [column.get(row, float("nan")) for row in rows] for name, column in columns.items()})
    index = published.index
    table.index = pd.MultiIndex.from_tuples(rows, names=index.names) if index.nlevels > 1 else list(rows)
    return table
