"""Figures of many runs: their PCC by setting, and what each change of settings is worth."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peka_lite._core.names import disable_mathtext
from peka_lite.reports._settings import OF_PROTOCOL, ROW, TRAINED, UNTRAINED, format_settings
from peka_lite.reports.figures import MARKERS
from peka_lite.reports.points import describe_distinction, setting_columns
from peka_lite.reports.runs import BACKBONES, CONTROLS, METHODS, PROTOCOLS

_GAP = 0.7  # of a row's height, between rows


def sweep_figure(points: pd.DataFrame) -> Figure:
    """Draw the mean PCC of every run with its 95% interval, one panel for each protocol and cohort.

    Rows are settings, a marker is a run. Where one setting alone is a number of at least three values, it is the
    horizontal axis, and runs of the same other settings are joined; frozen students and controls, which do not feel
    a setting of teaching, are drawn level.

    Parameters
    ----------
    points
        From `points_table`, or read from the file that `write_report` made of it.

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
        raise ValueError("no row of these points is a run: there is no PCC to draw")
    runs = runs.sort_values("protocol", key=lambda column: column.map(PROTOCOLS.index), kind="stable")
    grouped = [here for _, here in runs.groupby(["protocol", "cohort"], sort=False)]
    axis = _numeric_axis(grouped, names)
    if axis:
        panels = [_series(here, axis, names) for here in grouped]
        heights = [4.4 + 0.16 * here["label"].nunique() for here in panels]
    else:
        panels = [_settled(here, names) for here in grouped]
        heights = [_height(here) for here in panels]
    style = _Style(pd.concat(panels)["label"])
    fig, axes = plt.subplots(
        len(panels), 1, figsize=(9, sum(heights) + 1.0), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for ax, here, source in zip(axes.flat, panels, grouped, strict=True):
        _draw_lines(ax, here, axis, style) if axis else _draw_rows(ax, here, style)
        base = here.attrs.get("base")
        below = "\n" + textwrap.fill(f"base: {base}", 76) if base else ""
        title = f"{source['protocol'].iloc[0]} protocol · {source['cohort'].iloc[0]}{below}"
        ax.set_title(title, fontsize=8.5 if base else 10)
    along = "vertical" if axis else "horizontal"
    seeds = ""
    if runs.get("seed", pd.Series()).nunique() > 1:
        seeds = ", seeds beside each other" + (", their mean a line" if axis else "")
    fig.suptitle(f"Mean PCC on held-out spots, a marker a run{seeds}; {along} bars: 95% intervals", fontsize=11)
    if not axis:
        axes[-1, 0].set_xlabel("mean PCC, pooled over a fold's test spots")
        ends = np.array([ax.get_xlim() for ax in axes.flat])
        plt.setp(axes.flat, xlim=(ends[:, 0].min(), ends[:, 1].max()))
    return disable_mathtext(fig)


def effects_figure(table: pd.DataFrame) -> Figure:
    """Draw what each change of settings is worth, a row a change, with paired 95% intervals about a zero line.

    Where no run can be paired with the reference, the PCC is drawn. Data are those of `effects_table`.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"features": "coordinates", "method": "none", "slides": ["MINI3"], "n_splits": 2, "n_genes": 10}
    >>> for share in (1.0, 0.25):
    ...     config = pk.RunConfig(train_share=share, protocol="paper", **small)
    ...     _ = pk.load_or_run(config, f"spots_{share:.0%}", maps=False)
    >>> reference, others, told = pk.reports.split_by_settings(pk.reports.read_runs(["spots_100%", "spots_25%"]))
    >>> figure = pk.reports.effects_figure(pk.reports.effects_table(others, reference))
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()], figure.axes[0].get_xlabel()
    (['train_share=0.25'], 'PCC minus that of the reference settings, same features (right: better)')
    """
    paired = table["difference"].notna().any()
    columns = ["difference", "difference low", "difference high"] if paired else ["PCC", "low", "high"]
    here = table[[*columns, "note"]].set_axis(["x", "low", "high", "note"], axis=1)
    here = here.assign(row=table.index.get_level_values("settings"), label=table.index.get_level_values("features"))
    style = _Style(here["label"])
    fig, ax = plt.subplots(figsize=(9, _height(here) + 1.2), layout="constrained")
    _draw_rows(ax, here, style)
    if paired:
        ax.axvline(0, color="black", linewidth=0.9)
        for y, note in zip(_places(here), here["note"], strict=True):
            if note:
                ax.annotate(note.split(":")[0], (0, y), (4, 0), textcoords="offset points", va="center", fontsize=7)
        ax.set_xlabel("PCC minus that of the reference settings, same features (right: better)")
    else:
        ax.set_xlabel("mean PCC (no run can be paired with the reference settings)")
    what = "What each change of settings is worth: difference in PCC" if paired else "PCC by changed setting"
    told = table.attrs["title"].split(" · ", 1)[1], f"reference: {table.attrs['reference']}"
    where = "\n".join(textwrap.fill(part, 110) for part in told)
    fig.suptitle(f"{what}; bars: {'paired ' if paired else ''}95% intervals\n{where}", fontsize=10)
    return disable_mathtext(fig)


class _Style:
    """One color and marker for each label, the same in every panel; labels in the order of tables."""

    def __init__(self, labels: pd.Series):
        import seaborn as sns

        labels = sorted(labels.unique(), key=_place)
        self.palette = dict(zip(labels, sns.color_palette("colorblind", len(labels)), strict=True))
        self.markers = {name: MARKERS[k % len(MARKERS)] for k, name in enumerate(labels)}


def _place(label: str) -> tuple:
    """Return a label's place: controls, shuffled teachers, frozen, methods, concatenations, the teacher."""
    name = label.split(" · ")[0]
    if name in CONTROLS.values():
        return 0, list(CONTROLS.values()).index(name)
    if "shuffled" in name:
        return 1, name
    known = list(METHODS.values())
    return (2, known.index(name)) if name in known else (3 if name.startswith("[") else 4, name)


def _numeric_axis(panels: Sequence[pd.DataFrame], names: Sequence[str]) -> str | None:
    """Return the one setting that is a number of three or more values in every panel, if most runs lie along it."""
    found = set()
    for here in panels:
        felt = here[~here["label"].isin(UNTRAINED)]
        axes = []
        for name in names:
            column = (felt if name in TRAINED else here)[name]
            number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
            if number and column.notna().all() and column.nunique() >= 3:
                axes.append(name)
        if len(axes) != 1:
            return None
        series = _series(here, axes[0], names).groupby("label")["x"].nunique()
        if (series >= 3).mean() < 0.5 or len(series) > 12:
            return None
        found.add(axes[0])
    return found.pop() if len(found) == 1 else None


def _series(here: pd.DataFrame, axis: str, names: Sequence[str]) -> pd.DataFrame:
    """Return x, pcc, low, high and label (with the other settings) of a line plot."""
    rest = [name for name in names if name != axis and name not in OF_PROTOCOL and here[name].nunique(dropna=False) > 1]
    several = here["backbone"].dropna().nunique() > 1
    parts, values = [], sorted(here[axis].dropna().unique())
    for _, run in here.iterrows():
        untaught = run["label"] in UNTRAINED
        words = [run["label"]] + (
            [BACKBONES.get(run["backbone"], run["backbone"])] if several and run["backbone"] else []
        )
        felt = {k: run[k] for k in rest if not (untaught and k in TRAINED)}
        words += [format_settings(felt)] if felt else []
        for x in values if untaught and axis in TRAINED else [run[axis]]:
            parts.append((x, run["mean_pcc"], run["ci_low"], run["ci_high"], " · ".join(words), run.get("seed")))
    table = pd.DataFrame(parts, columns=["x", "pcc", "low", "high", "label", "seed"])
    return table.drop_duplicates(ignore_index=True)


def _settled(here: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return x, low, high, row (settings in words) and label of a panel of rows, in order."""
    rows, base = describe_distinction(here, [name for name in names if name not in OF_PROTOCOL])
    table = here[["mean_pcc", "ci_low", "ci_high", "label"]].set_axis(["x", "low", "high", "label"], axis=1)
    table = table.assign(row=rows, seed=here.get("seed", 0)).drop_duplicates(ignore_index=True)
    known = sorted(dict.fromkeys(rows), key=lambda row: _place(row) if row in set(here["label"]) else (-1, ""))
    order = {"row": table["row"].map(known.index), "label": table["label"].map(_place), "seed": table["seed"]}
    table = table.loc[pd.DataFrame(order).sort_values(["row", "label", "seed"], kind="stable").index]
    table.attrs = {"base": base}
    return table


def _places(here: pd.DataFrame) -> np.ndarray:
    """Return where each run's marker lies, top down: runs of a row beside each other, rows apart."""
    order = {row: k for k, row in enumerate(dict.fromkeys(here["row"]))}
    by = np.argsort([order[row] for row in here["row"]], kind="stable")
    rows = here["row"].map(order).to_numpy()[by]
    places = np.empty(len(here))
    places[by] = np.arange(len(here)) + _GAP * rows
    return places


def _height(here: pd.DataFrame) -> float:
    return 0.9 + 0.17 * (len(here) + _GAP * here["row"].nunique())


def _draw_rows(ax: Axes, here: pd.DataFrame, style: _Style) -> None:
    import seaborn as sns

    here = here.assign(y=_places(here))
    middle = here.groupby("row", sort=False)["y"].agg(["mean", "min", "max"])
    for k, (_, row) in enumerate(middle.iterrows()):
        if k % 2:
            ax.axhspan(row["min"] - (1 + _GAP) / 2, row["max"] + (1 + _GAP) / 2, color="0.95", linewidth=0, zorder=0)
    shown = [name for name in style.palette if name in set(here["label"])]
    named = len(middle) == len(shown) and set(middle.index) == set(shown)  # rows say what colors would
    ax.hlines(here["y"], here["low"], here["high"], colors=here["label"].map(style.palette), linewidth=1.4)
    sns.scatterplot(
        here, x="x", y="y", hue="label", style="label", hue_order=shown, style_order=shown, palette=style.palette,
        markers=style.markers, s=42, edgecolor="0.2", linewidth=0.5, ax=ax, legend=not named and "full", zorder=3,
    )  # fmt: skip
    if legend := ax.get_legend():
        sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title=None, frameon=False, fontsize=8)
        legend.set_in_layout(True)
    ax.set_yticks(middle["mean"], [textwrap.fill(row, 46) for row in middle.index], fontsize=8)
    ax.set(ylim=(here["y"].max() + 1, here["y"].min() - 1), xlabel="", ylabel="")
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    sns.despine(ax=ax)


def _draw_lines(ax: Axes, here: pd.DataFrame, axis: str, style: _Style) -> None:
    import seaborn as sns

    shown = [name for name in style.palette if name in set(here["label"])]
    low, high = here["x"].min(), here["x"].max()
    logarithmic = low > 0 and high / low >= 8
    # Bars of one x lie beside each other, a hundredth of the axis apart.
    side = {key: k for k, key in enumerate(dict.fromkeys(zip(here["label"], here["seed"], strict=True)))}
    step = np.array([side[key] for key in zip(here["label"], here["seed"], strict=True)]) - (len(side) - 1) / 2
    reach = 0.01 * (np.log(high / low) if logarithmic else high - low)
    moved = here.assign(x=here["x"] * np.exp(step * reach) if logarithmic else here["x"] + step * reach)
    sns.lineplot(
        here.assign(at=here["x"]), x="at", y="pcc", hue="label", style="label", hue_order=shown, style_order=shown,
        palette=style.palette, estimator="mean", errorbar=None, linewidth=1.2, ax=ax, legend=False,
    )  # fmt: skip
    sns.scatterplot(
        moved, x="x", y="pcc", hue="label", style="label", hue_order=shown, style_order=shown, palette=style.palette,
        markers=style.markers, s=42, edgecolor="0.2", linewidth=0.5, ax=ax, zorder=3,
    )  # fmt: skip
    ax.vlines(moved["x"], moved["low"], moved["high"], colors=moved["label"].map(style.palette), linewidth=1.2)
    if logarithmic:
        ax.set_xscale("log")
    ax.set_xticks(sorted(here["x"].unique()), [f"{x:g}" for x in sorted(here["x"].unique())])
    ax.minorticks_off()
    ax.set(xlabel=axis, ylabel="mean PCC, pooled")
    ax.grid(axis="y", color="0.9")
    sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title=None, frameon=False, fontsize=8)
    sns.despine(ax=ax)
