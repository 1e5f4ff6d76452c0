"""The `peka-lite` command: parses, calls, prints."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from peka_lite import __version__

_HELP = {
    "cohort": "'mini' (synthetic, embedded), a folder in HEST-1k's layout, or a fetched cohort",
    "slides": "comma-separated slide ids; all by default",
    "patients": "CSV file with columns id,patient, where nothing else names them",
    "protocol": "paper, hest or strict: sets split, normalization, alpha and what sees which rows",
    "features": "student, frozen+student, or a control: teacher, colour, coordinates, depth",
    "teacher": "pca or scfoundation",
    "teacher_checkpoint": "scFoundation's models.ckpt; the fetched one by default",
    "teacher_genes": "its gene list; the one beside the checkpoint or the fetched one by default",
    "teacher_mapping": "HGNC's complete set, for Ensembl ids and aliases",
    "backbone": "mini, uni, h-optimus-0, ... (see the book)",
    "method": "none, bone, lora, adalora or miss",
    "split": "patient (by default), slide or spot",
    "weights": "hub, a weights file, or random",
    "r": "block size or rank; the backbone's own by default",
    "layers": "attention layer that gets adapters: qkv or proj",
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
    "shuffle_teacher": "control: teach each tile with another spot's expression",
    "train_share": "share of the training spots to use (0 to 1)",
    "normalization": "log1p-cp10k (by default) or log1p",
    "n_genes": "how many highly variable genes are predicted",
    "alpha": "the probe's ridge penalty: hest (HEST-bench's formula, by default), inner (on inner folds) or a number",
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
    "str | float | None": lambda v: v if v in ("hest", "inner") else float(v),
}


def parser(*, command: str | None = None) -> argparse.ArgumentParser:
    """Build the command-line parser; only for ``"run"`` with the options of `run`, which are `RunConfig`'s fields.

    The others must do where an install is broken, so PyTorch is not imported for them.
    """
    top = argparse.ArgumentParser("peka-lite", description="Teach a pathology model to predict gene expression.")
    top.add_argument("--version", action="version", version=f"peka-lite {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="one experiment, from a cohort to a PCC table and maps",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    if command == "run":
        from peka_lite.config import RunConfig

        for field in dataclasses.fields(RunConfig):
            kind = _slide_ids if field.name == "slides" else _TYPES.get(field.type, str)
            flag = f"--{field.name.replace('_', '-')}"
            if field.type == "bool":
                run.add_argument(flag, action="store_true", help=_HELP[field.name])
                continue
            run.add_argument(flag, type=kind, default=field.default, help=_HELP[field.name], metavar="VALUE")
    run.add_argument("--no-maps", dest="maps", action="store_false", help="draw no maps")
    run.add_argument("--out", required=True, help="folder to make", metavar="DIR")
    get = commands.add_parser("fetch", help="get a cohort, a checkpoint or a gene list", allow_abbrev=False)
    get.add_argument("name", nargs="?", help="what to fetch; without a name, what there is", metavar="NAME")
    get.add_argument("--root", help="folder to put it in; the cache by default", metavar="DIR")
    check = commands.add_parser("doctor", help="check this machine, one line and one fix each", allow_abbrev=False)
    tables = commands.add_parser(
        "report", help="tables and figures from run folders, the paper's values beside them", allow_abbrev=False
    )
    tables.add_argument("runs", nargs="+", help="run folders, or folders of run folders", metavar="RUN")
    tables.add_argument("--out", default="report", help="folder to make (report)", metavar="DIR")
    check.add_argument("--offline", action="store_true", help="do not ask the hub about gated models")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. Bad input is one line on stderr and status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = vars(parser(command=next(iter(argv), None)).parse_args(argv))
    command = {"run": _run, "fetch": _fetch, "doctor": _doctor, "report": _report}[options.pop("command")]
    try:
        return command(**options)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"peka-lite: {error}", file=sys.stderr)
        return 2


def _run(*, out: str, maps: bool, **options) -> int:
    from peka_lite.run import RunConfig, run

    summary = run(RunConfig(**options), out, maps=maps, progress=sys.stderr.isatty())
    print(
        f"{summary['method']}, features {summary['features']}, on {summary['backbone']} ({summary['weights']}), "
        f"protocol {summary['protocol']}, {summary['split']} split, {summary['n_folds']} folds: "
        f"mean PCC {summary['mean_pcc']:.3f} "
        f"[{summary['ci_low']:.3f}, {summary['ci_high']:.3f}], {summary['n_nan']} undefined; {out}"
    )
    return 0


def _fetch(*, name: str | None, root: str | None) -> int:
    from peka_lite.manifest import fetch, located, read_manifest

    if name is None:
        for entry in read_manifest().values():
            print(f"{entry.name:<20}{entry.kind:<12}{'fetched' if located(entry.name) else '':<9}{entry.title}")
        return 0
    print(fetch(name, root=root))
    return 0


def _doctor(*, offline: bool) -> int:
    from peka_lite.doctor import doctor, report

    checks = doctor(online=not offline)
    print(report(checks))
    return int(any(check.status == "fail" for check in checks))


def _report(*, runs: list[str], out: str) -> int:
    from peka_lite.report import write_report

    write_report(runs, out)
    print(f"{out}/report.md")
    return 0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def _slide_ids(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    raise SystemExit(main())
