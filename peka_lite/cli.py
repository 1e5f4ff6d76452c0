"""The `peka-lite` command: parses, calls, prints."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from peka_lite import __version__

_HELP = {
    "cohort": "'mini' (synthetic, embedded) or a folder in HEST-1k's layout",
    "slides": "comma-separated slide ids; all by default",
    "patients": "CSV file with columns id,patient, where the metadata has none",
    "teacher": "pca",
    "backbone": "mini, uni, h-optimus-0, ... (see the book)",
    "method": "none, bone, lora, adalora or miss",
    "split": "patient, slide or spot",
    "weights": "hub, a weights file, or random",
    "r": "block size or rank; the backbone's own by default",
    "label_method": "knn-leiden or kmeans",
    "resolution": "of knn-leiden (1.0)",
    "n_clusters": "of kmeans (100)",
    "kd_space": "embedding (the paper) or logits (the authors' code)",
    "tau": "temperature of the distillation loss",
    "kd_weight": "weight of the distillation loss",
    "ce_weight": "weight of the pseudo-label loss",
    "epochs": "passes over the training tiles",
    "batch_size": "tiles a step",
    "lr": "Adam's learning rate",
    "normalization": "log1p-cp10k or log1p",
    "n_genes": "how many highly variable genes are predicted",
    "alpha": "the probe's ridge penalty: hest (HEST-bench's formula) or a number",
    "n_splits": "folds",
    "seed": "of every random choice",
    "min_genes": "fewest expressed genes of a spot",
    "max_mito": "largest mitochondrial share of a spot's counts (0 to 1)",
    "device": "cpu, cuda, cuda:1, ...; a GPU where there is one by default",
}
_TYPES = {
    "int": int,
    "float": float,
    "int | None": int,
    "float | None": float,
    "str | float": lambda v: v if v == "hest" else float(v),
}


def parser() -> argparse.ArgumentParser:
    """Build the command-line parser; the options of `run` are the fields of `RunConfig`."""
    from peka_lite.config import RunConfig

    top = argparse.ArgumentParser("peka-lite", description="Teach a pathology model to predict gene expression.")
    top.add_argument("--version", action="version", version=f"peka-lite {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="one experiment, from a cohort to a PCC table and maps",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(RunConfig):
        kind = _slide_ids if field.name == "slides" else _TYPES.get(field.type, str)
        flag = f"--{field.name.replace('_', '-')}"
        run.add_argument(flag, type=kind, default=field.default, help=_HELP[field.name], metavar="VALUE")
    run.add_argument("--out", required=True, help="folder to make", metavar="DIR")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. Bad input is one line on stderr and status 2."""
    options = vars(parser().parse_args(argv))
    options.pop("command")
    out = options.pop("out")
    from peka_lite.run import RunConfig, run

    try:
        summary = run(RunConfig(**options), out, progress=sys.stderr.isatty())
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"peka-lite: {error}", file=sys.stderr)
        return 2
    print(
        f"{summary['method']} on {summary['backbone']} ({summary['weights']}), {summary['split']} split, "
        f"{summary['n_folds']} folds: mean PCC {summary['mean_pcc']:.3f} "
        f"[{summary['ci_low']:.3f}, {summary['ci_high']:.3f}], {summary['n_nan']} undefined; {out}"
    )
    return 0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def _slide_ids(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    raise SystemExit(main())
