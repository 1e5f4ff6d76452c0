"""Figures of many runs: PCC by setting, and the effect of each change of settings."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peka_lite._core.names import disable_mathtext
from peka_lite.reports._settings import OF_PROTOCOL, ROW, TRAINED, format_settings, is_untrained
from peka_lite.reports.figures import MARKERS
from peka_lite.reports.points import describe_distinction, setting_columns
from peka_lite.reports.runs import BACKBONES, CONTROLS, METHODS, PROTOCOLS

_GAP = 0.7  # between rows, in row heights


def sweep_figure(points: pd.DataFrame) -> Figure:
    """Draw the mean PCC of every run with its 95% interval, one panel for each protocol and cohort.

    Rows are settings, markers are runs. If exactly one setting is numeric with at least three values, it becomes the
    horizontal axis, and runs with equal other settings are joined. Frozen students and controls do not depend on
    training settings and are drawn as horizontal lines.

    Parameters
    ----------
    points
        From `points_table`, or read from the points file of `write_report`.

    Raises
    ------
    ValueError
        If no row is a run.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> for features in ("coordinates", "depth"):
    ...     _ = pk.load_or_run(pk.RunConfig(features=features, **small), features, maps=False)
    >>> figure = pk.reports.sweep_figure(pk.reports.points_table(pk.reports.read_runs(["coordinates", "depth"])))
    >>> figure.axes[0].get_title()
    'custom protocol · mini MINI3 (synthetic)'
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['coordinates', 'total count']
    """
    names = [name for name in setting_columns(points) if name not in (*ROW, "seed")] if "label" in points else []
    runs = points[points["label"].notna() & points["protocol"].notna()] if "label" in points else points.iloc[:0]
    if runs.empty:
        raise ValueError("points has no row of a run, so there is no PCC to draw")
    runs = runs.sort_values("protocol", key=lambda column: column.map(PROTOCOLS.index), kind="stable")
    grouped = [group for _, group in runs.groupby(["protocol", "cohort"], sort=False)]
    axis = _find_numeric_axis(grouped, names)
    if axis:
        panels = [_tabulate_lines(group, axis, names) for group in grouped]
        heights = [4.4 + 0.16 * panel["label"].nunique() for panel in panels]
    else:
        panels = [_tabulate_rows(group, names) for group in grouped]
        heights = [_panel_height(panel) for panel in panels]
    style = _Style(pd.concat(panels)["label"])
    fig, axes = plt.subplots(
        len(panels), 1, figsize=(9, sum(heights) + 1.0), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for ax, panel, source in zip(axes.flat, panels, grouped, strict=True):
        _draw_lines(ax, panel, axis, style) if axis else _draw_rows(ax, panel, style)
        base = panel.attrs.get("base")
        below = "\n" + textwrap.fill(f"base: {base}", 76) if base else ""
        title = f"{source['protocol'].iloc[0]} protocol · {source['cohort'].iloc[0]}{below}"
        ax.set_title(title, fontsize=8.5 if base else 10)
    direction = "vertical" if axis else "horizontal"
    seeds = ""
    if runs.get("seed", pd.Series()).nunique() > 1:
        seeds = ", seeds side by side" + (", line: their mean" if axis else "")
    fig.suptitle(f"Mean PCC on held-out spots, one marker per run{seeds}; {direction} bars: 95% intervals", fontsize=11)
    if not axis:
        axes[-1, 0].set_xlabel("mean PCC, pooled over a fold's test spots")
        ends = np.array([ax.get_xlim() for ax in axes.flat])
        plt.setp(axes.flat, xlim=(ends[:, 0].min(), ends[:, 1].max()))
    return disable_mathtext(fig)


def effects_figure(table: pd.DataFrame) -> Figure:
    """Draw the effect of each change of settings, one row each, with paired 95% intervals around a zero line.

    The PCC itself is drawn if no run can be paired with the reference. `table` is from `effects_table`.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"features": "coordinates", "method": "none", "slides": ["MINI3"], "n_splits": 2, "n_genes": 10}
    >>> for share in (1.0, 0.25):
    ...     config = pk.RunConfig(train_share=share, protocol="paper", **small)
    ...     _ = pk.load_or_run(config, f"spots_{share:.0%}", maps=False)
    >>> reference, others, settings = pk.reports.split_by_settings(pk.reports.read_runs(["spots_100%", "spots_25%"]))
    >>> figure = pk.reports.effects_figure(pk.reports.effects_table(others, reference))
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()], figure.axes[0].get_xlabel()
    (['train_share=0.25'], 'PCC minus that of the reference settings, same features (right: better)')
    """
    paired = table["difference"].notna().any()
    columns = ["difference", "difference low", "difference high"] if paired else ["PCC", "low", "high"]
    panel = table[[*columns, "note"]].set_axis(["x", "low", "high", "note"], axis=1)
    panel = panel.assign(row=table.index.get_level_values("settings"), label=table.index.get_level_values("features"))
    style = _Style(panel["label"])
    fig, ax = plt.subplots(figsize=(9, _panel_height(panel) + 1.2), layout="constrained")
    _draw_rows(ax, panel, style)
    if paired:
        ax.axvline(0, color="black", linewidth=0.9)
        for y, note in zip(_row_positions(panel), panel["note"], strict=True):
            if note:
                ax.annotate(note.split(":")[0], (0, y), (4, 0), textcoords="offset points", va="center", fontsize=7)
        ax.set_xlabel("PCC minus that of the reference settings, same features (right: better)")
    else:
        ax.set_xlabel("mean PCC (no run can be paired with the reference settings)")
    title = "Effect of each change of settings: difference in PCC" if paired else "PCC by changed setting"
    subtitle = table.attrs["title"].split(" · ", 1)[1], f"reference: {table.attrs['reference']}"
    subtitle = "\n".join(textwrap.fill(part, 110) for part in subtitle)
    fig.suptitle(f"{title}; bars: {'paired ' if paired else ''}95% intervals\n{subtitle}", fontsize=10)
    return disable_mathtext(fig)


class _Style:
    """One color and marker per label, shared by all panels; labels are in the order of tables."""

    def __init__(self, labels: pd.Series):
        import seaborn as sns

        labels = sorted(labels.unique(), key=_label_order)
        self.palette = dict(zip(labels, sns.color_palette("colorblind", len(labels)), strict=True))
        self.markers = {name: MARKERS[k % len(MARKERS)] for k, name in enumerate(labels)}


def _label_order(label: str) -> tuple:
    """Return a label's sort key: controls, shuffled teachers, frozen, methods, concatenations, the teacher."""
    name = label.split(" · ")[0]
    if name in CONTROLS.values():
        return 0, list(CONTROLS.values()).index(name)
    if "shuffled" in name:
        return 1, name
    known = list(METHODS.values())
    return (2, known.index(name)) if name in known else (3 if name.startswith("[") else 4, name)


def _find_numeric_axis(groups: Sequence[pd.DataFrame], names: Sequence[str]) -> str | None:
    """Return the only numeric setting with at least three values in every group, if most lines have three points."""
    common = set()
    for group in groups:
        trained = group[~group["label"].map(is_untrained)]
        axes = []
        for name in names:
            column = (trained if name in TRAINED else group)[name]
            numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
            if numeric and column.notna().all() and column.nunique() >= 3:
                axes.append(name)
        if len(axes) != 1:
            return None
        n_values = _tabulate_lines(group, axes[0], names).groupby("label")["x"].nunique()
        if (n_values >= 3).mean() < 0.5 or len(n_values) > 12:
            return None
        common.add(axes[0])
    return common.pop() if len(common) == 1 else None


def _tabulate_lines(runs: pd.DataFrame, axis: str, names: Sequence[str]) -> pd.DataFrame:
    """Return x, pcc, low, high, label (with the other settings) and seed of a line plot."""
    rest = [name for name in names if name != axis and name not in OF_PROTOCOL and runs[name].nunique(dropna=False) > 1]
    several = runs["backbone"].dropna().nunique() > 1
    parts, values = [], sorted(runs[axis].dropna().unique())
    for _, run in runs.iterrows():
        untrained = is_untrained(run["label"])
        labels = [run["label"]] + (
            [BACKBONES.get(run["backbone"], run["backbone"])] if several and run["backbone"] else []
        )
        settings = {k: run[k] for k in rest if not (untrained and k in TRAINED)}
        labels += [format_settings(settings)] if settings else []
        for x in values if untrained and axis in TRAINED else [run[axis]]:
            parts.append((x, run["mean_pcc"], run["ci_low"], run["ci_high"], " · ".join(labels), run.get("seed")))
    table = pd.DataFrame(parts, columns=["x", "pcc", "low", "high", "label", "seed"])
    return table.drop_duplicates(ignore_index=True)


def _tabulate_rows(runs: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return x, low, high, label, row (settings as text) and seed of a panel of rows, sorted."""
    rows, base = describe_distinction(runs, [name for name in names if name not in OF_PROTOCOL])
    table = runs[["mean_pcc", "ci_low", "ci_high", "label"]].set_axis(["x", "low", "high", "label"], axis=1)
    table = table.assign(row=rows, seed=runs.get("seed", 0)).drop_duplicates(ignore_index=True)
    known = sorted(dict.fromkeys(rows), key=lambda row: _label_order(row) if row in set(runs["label"]) else (-1, ""))
    order = {"row": table["row"].map(known.index), "label": table["label"].map(_label_order), "seed": table["seed"]}
    table = table.loc[pd.DataFrame(order).sort_values(["row", "label", "seed"], kind="stable").index]
    table.attrs = {"base": base}
    return table


def _row_positions(panel: pd.DataFrame) -> np.ndarray:
    """Return the y position of each run's marker, from the top, with a gap between rows."""
    order = {row: k for k, row in enumerate(dict.fromkeys(panel["row"]))}
    by = np.argsort([order[row] for row in panel["row"]], kind="stable")
    rows = panel["row"].map(order).to_numpy()[by]
    positions = np.empty(len(panel))
    positions[by] = np.arange(len(panel)) + _GAP * rows
    return positions


def _panel_height(panel: pd.DataFrame) -> float:
    return 0.9 + 0.17 * (len(panel) + _GAP * panel["row"].nunique())


def _draw_rows(ax: Axes, panel: pd.DataFrame, style: _Style) -> None:
    import seaborn as sns

    panel = panel.assign(y=_row_positions(panel))
    middle = panel.groupby("row", sort=False)["y"].agg(["mean", "min", "max"])
    for k, (_, row) in enumerate(middle.iterrows()):
        if k % 2:
            ax.axhspan(row["min"] - (1 + _GAP) / 2, row["max"] + (1 + _GAP) / 2, color="0.95", linewidth=0, zorder=0)
    shown = [name for name in style.palette if name in set(panel["label"])]
    named = len(middle) == len(shown) and set(middle.index) == set(shown)  # rows are the labels: no legend
    ax.hlines(panel["y"], panel["low"], panel["high"], colors=panel["label"].map(style.palette), linewidth=1.4)
    sns.scatterplot(
        panel, x="x", y="y", hue="label", style="label", hue_order=shown, style_order=shown, palette=style.palette,
        markers=style.markers, s=42, edgecolor="0.2", linewidth=0.5, ax=ax, legend=not named and "full", zorder=3,
    )  # fmt: skip
    if legend := ax.get_legend():
        sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title=None, frameon=False, fontsize=8)
        legend.set_in_layout(True)
    ax.set_yticks(middle["mean"], [textwrap.fill(row, 46) for row in middle.index], fontsize=8)
    ax.set(ylim=(panel["y"].max() + 1, panel["y"].min() - 1), xlabel="", ylabel="")
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    sns.despine(ax=ax)


def _draw_lines(ax: Axes, panel: pd.DataFrame, axis: str, style: _Style) -> None:
    import seaborn as sns

    shown = [name for name in style.palette if name in set(panel["label"])]
    low, high = panel["x"].min(), panel["x"].max()
    logarithmic = low > 0 and high / low >= 8
    # Shift bars of equal x by a hundredth of the axis each.
    side = {key: k for k, key in enumerate(dict.fromkeys(zip(panel["label"], panel["seed"], strict=True)))}
    step = np.array([side[key] for key in zip(panel["label"], panel["seed"], strict=True)]) - (len(side) - 1) / 2
    width = 0.01 * (np.log(high / low) if logarithmic else high - low)
    moved = panel.assign(x=panel["x"] * np.exp(step * width) if logarithmic else panel["x"] + step * width)
    sns.lineplot(
        panel.assign(at=panel["x"]), x="at", y="pcc", hue="label", style="label", hue_order=shown, style_order=shown,
        palette=style.palette, estimator="mean", errorbar=None, linewidth=1.2, ax=ax, legend=False,
    )  # fmt: skip
    sns.scatterplot(
        moved, x="x", y="pcc", hue="label", style="label", hue_order=shown, style_order=shown, palette=style.palette,
        markers=style.markers, s=42, edgecolor="0.2", linewidth=0.5, ax=ax, zorder=3,
    )  # fmt: skip
    ax.vlines(moved["x"], moved["low"], moved["high"], colors=moved["label"].map(style.palette), linewidth=1.2)
    if logarithmic:
        ax.set_xscale("log")
    ax.set_xticks(sorted(panel["x"].unique()), [f"{x:g}" for x in sorted(panel["x"].unique())])
    ax.minorticks_off()
    ax.set(xlabel=axis, ylabel="mean PCC, pooled")
    ax.grid(axis="y", color="0.9")
    sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title=None, frameon=False, fontsize=8)
    sns.despine(ax=ax)
