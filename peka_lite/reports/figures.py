"""Figures of a report: effect of leakage, and the PCC over genes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from peka_lite._core.names import disable_mathtext
from peka_lite.evaluation.scores import pool_scores
from peka_lite.reports.runs import PROTOCOLS, SPLITS, TARGETS, Run, require_shared, row_label, split_panels, table_title
from peka_lite.reports.tables import leak_table

MARKERS = "osD^vPX<>*hp"
MONO = {"family": "monospace", "size": 8}
LEAKS = {
    "paper": "student and genes\nsaw the test spots",
    "hest": "genes selected\non all rows",
    "strict": "training rows\nonly",
}


def leak_figure(runs: Sequence[Run]) -> Figure:
    """Draw the PCC on the same data under each protocol, one panel per kind of targets.

    Whiskers are 95% intervals. The table below each panel gives the PCC lost from one protocol to the next. Data and
    errors are those of `leak_table`.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI1", "MINI3"], "n_splits": 2, "n_genes": 10}
    >>> for protocol in ("paper", "hest"):
    ...     config = pk.RunConfig(features="coordinates", protocol=protocol, **small)
    ...     _ = pk.load_or_run(config, f"leak_{protocol}", maps=False)
    >>> figure = pk.reports.leak_figure(pk.reports.read_runs(["leak_paper", "leak_hest"]))
    >>> [ax.get_title() for ax in figure.axes[:2]]
    ['log1p-cp10k targets', 'log1p targets']
    >>> [text.get_text().splitlines()[:2] for text in figure.axes[0].get_xticklabels()]
    [['paper', 'random spots held out'], ['hest', 'patients held out']]
    """
    import seaborn as sns

    table = leak_table(runs)
    shown = [p for p in PROTOCOLS if p in table and table[p].notna().any()]
    split = {run.summary["protocol"]: run.summary["split"] for run in runs}
    names = table.index.unique("features")
    steps = list(pairwise(shown))
    header = f"{'PCC lost from':<28}" + "".join(f"{f'{a} to {b}':>16}" for a, b in steps)
    colors = sns.color_palette("colorblind", 8)
    heights = (3.6, 0.3 + 0.2 * len(names))
    size = (6.6 * len(TARGETS), sum(heights) + 1.6)
    fig, axes = plt.subplots(2, len(TARGETS), figsize=size, sharey="row", height_ratios=heights, layout="constrained")
    for ax, below, target in zip(*axes, TARGETS, strict=True):
        ax.plot([], [], " ", label=header)
        for k, name in enumerate(names):
            row = table.loc[(target, name)]
            pcc, low, high = (row[[p + end for p in shown]].to_numpy(float) for end in ("", " low", " high"))
            costs = "".join(f"{row[a] - row[b]:>+16.3f}" if row[[a, b]].notna().all() else " " * 16 for a, b in steps)
            ax.errorbar(
                np.arange(len(shown)) + (k - (len(names) - 1) / 2) * min(0.09, 0.6 / len(names)), pcc,
                yerr=np.nan_to_num(np.stack([pcc - low, high - pcc])), marker=MARKERS[k % len(MARKERS)],
                color=colors[k % 8], linestyle="-" if k < 8 else "--", linewidth=1.3, elinewidth=0.9, capsize=2,
                label=f"{name:<28}{costs}",
            )  # fmt: skip
        ax.axhline(0, color="black", linewidth=0.8)
        ax.grid(axis="y", color="0.9")
        ax.set(title=f"{target} targets", xlim=(-0.5, len(shown) - 0.5))
        ax.set_xticks(range(len(shown)), [f"{p}\n{SPLITS[split[p]]}\n{LEAKS[p]}" for p in shown], fontsize=9)
        below.set_axis_off()
        below.legend(*ax.get_legend_handles_labels(), loc="upper center", frameon=False, prop=MONO)
    axes[0, 0].set_ylabel("mean PCC on held-out spots, pooled")
    whiskers = "" if table.filter(like=" low").isna().all(axis=None) else "; whiskers: 95% intervals"
    subtitle = table.attrs["title"].split(" · ", 1)[1]
    fig.suptitle(f"Effect of leakage: the same data under each protocol{whiskers}\n{subtitle}")
    return disable_mathtext(fig)


def figure2(runs: Sequence[Run]) -> Figure:
    """Draw the distribution of PCC over genes, one box per row and one panel per cohort (and backbone).

    Takes runs of one protocol. A gene's PCC, on the protocol's targets, is its mean over the folds that predicted it.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> for features in ("coordinates", "depth"):
    ...     _ = pk.load_or_run(pk.RunConfig(features=features, **small), features, maps=False)
    >>> figure = pk.reports.figure2(pk.reports.read_runs(["coordinates", "depth"]))
    >>> figure.axes[0].get_title()
    'mini MINI3 (synthetic) · one patient, random spots held out · log1p-cp10k targets'
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['coordinates', 'total count']
    """
    import seaborn as sns

    if len(protocols := {run.summary["protocol"] for run in runs}) != 1:
        raise ValueError(f"figure2 takes runs of one protocol, not of {', '.join(sorted(protocols)) or 'none'}")
    grouped = {name: require_shared(group) for name, group in split_panels(runs).items()}
    heights = [1.1 + 0.42 * len(group) for group in grouped.values()]
    fig, axes = plt.subplots(
        len(grouped), 1, figsize=(8.5, 0.7 + sum(heights)), height_ratios=heights, sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, group in zip(axes.flat, grouped.values(), strict=True):
        normalization = group[0].summary["normalization"]
        parts = []
        for run in group:
            scores = pool_scores(run.moments[run.moments["normalization"] == normalization])
            genes = scores.groupby("gene")["pcc"].mean()
            parts.append(pd.DataFrame({"features": row_label(run), "pcc": genes.dropna().to_numpy()}))
        tidy = pd.concat(parts)
        rows = {"x": "pcc", "y": "features", "order": [row_label(run) for run in group], "ax": ax}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # seaborn passes a deprecated argument to matplotlib
            sns.boxplot(tidy, **rows, color="0.9", width=0.6, linewidth=0.9, showfliers=False)
        sns.stripplot(tidy, **rows, color=sns.color_palette("colorblind")[0], size=3, alpha=0.7, jitter=0.2)
        ax.axvline(0, color="black", linewidth=0.8)
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
        head, rest = table_title(group, normalization=normalization).split(" · ", 1)[1].rsplit(" · ", 2)[:2]
        ax.set_title(f"{head} · {rest}", fontsize=10)
        ax.set(ylabel="", xlabel="")
    axes[-1, 0].set_xlabel("PCC of a gene on held-out spots (mean over the folds that predicted it)")
    fig.suptitle(f"PCC over genes · {protocols.pop()} protocol")
    return disable_mathtext(fig)
