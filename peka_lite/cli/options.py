"""Define the commands of `peka-lite`, their options and their help texts."""

from __future__ import annotations

import argparse
import dataclasses

from peka_lite import __version__
from peka_lite._core.names import escape_control

_HELP = {
    "cohort": "'mini' (synthetic, embedded), a folder in HEST-1k's layout, or a fetched cohort",
    "slides": "comma-separated slide ids; all by default",
    "patients": "CSV file with columns id,patient; it overrides the cohort's own patients",
    "protocol": "paper (its released code's folds), hest or strict; sets split, normalization, alpha, rows of each fit",
    "features": "student, frozen+student, projector, or a control: teacher, color, coordinates, depth",
    "teacher": "pca, scfoundation or scfoundation-mini (small, in the package)",
    "teacher_checkpoint": "scFoundation's models.ckpt; the fetched one by default",
    "teacher_genes": "scFoundation's gene list; the one beside the checkpoint or the fetched one by default",
    "teacher_mapping": "HGNC's complete set, for Ensembl ids and aliases",
    "backbone": "mini, uni, h-optimus-0, ... (see the book), or the YAML file of a custom one",
    "method": "none, bone, lora, adalora or miss",
    "split": "patient (by default), slide or spot",
    "weights": "hub (the published ones; those of mini are in the package), a weights file, or random",
    "r": "block size or rank; the backbone's by default",
    "layers": "attention layer that gets adapters: qkv or proj",
    "label_method": "knn-leiden or kmeans",
    "resolution": "resolution of the Leiden clustering (1.0)",
    "n_clusters": "number of k-means clusters (100)",
    "kd_space": "embedding (the paper) or logits (the authors' code)",
    "tau": "temperature of the distillation loss",
    "kd_weight": "weight of the distillation loss",
    "ce_weight": "weight of the pseudo-label loss",
    "epochs": "passes over the training tiles",
    "batch_size": "tiles per step",
    "lr": "Adam's learning rate",
    "augment": "mirror and rotate the tiles at random",
    "micro_batch": "tiles at once on a device, for less memory; the whole batch by default",
    "recompute": "recompute activations for their gradients: far less memory, a third more time",
    "compile": "use torch.compile where it works",
    "shuffle_teacher": "control: train each tile with another spot's expression",
    "train_share": "share of the training spots to use (0 to 1)",
    "normalization": "log1p-cp10k (by default) or log1p",
    "n_genes": "how many highly variable genes are predicted",
    "alpha": "probe's regularization strength: hest (HEST-bench's formula, by default), inner (on folds) or a number",
    "n_splits": "number of folds",
    "seed": "seed of every random choice",
    "min_genes": "drop spots with fewer expressed genes",
    "max_mito": "drop spots with a larger mitochondrial share of counts (0 to 1); none by default",
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
    """Build the command-line parser; only ``"run"`` and ``"train"`` get the options of `RunConfig`.

    PyTorch is not imported for the others, which must work in a broken install.
    """
    top = _Parser("peka-lite", description="Train a pathology model to predict gene expression.")
    top.add_argument("--version", action="version", version=f"peka-lite {__version__}")
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, title: str, **options) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=title, allow_abbrev=False, **options)

    run = add("run", "run one experiment, from a cohort to a PCC table and maps", formatter_class=_Formatter)
    run.add_argument("--no-maps", dest="maps", action="store_false", help="draw no maps")
    train = add("train", "train one student and its probe, and save the model", formatter_class=_Formatter)
    train.add_argument("--fold", type=int, help="hold out the test spots of this fold; none by default", metavar="N")
    for experiment in (run, train):
        if experiment.prog.endswith(f" {command}"):
            _add_settings(experiment)
        experiment.add_argument("--out", required=True, help="folder to create", metavar="DIR")

    embed = add("embed", "write a student's features of every spot of a cohort")
    embed.add_argument("--cohort", required=True, help=_HELP["cohort"], metavar="VALUE")
    embed.add_argument("--slides", type=_slide_ids, help=_HELP["slides"], metavar="VALUE")
    embed.add_argument("--backbone", help="a frozen student, where no --model is given", metavar="NAME")
    embed.add_argument("--min-genes", type=int, default=200, help=_HELP["min_genes"] + " (200)", metavar="N")
    predict = add("predict", "predict genes over a whole-slide image, or at the spots of a HEST slide")
    predict.add_argument("slide", help="image file, or id of a slide of --cohort", metavar="SLIDE")
    predict.add_argument("--cohort", help="cohort of a slide id; the run's by default", metavar="VALUE")
    predict.add_argument("--mpp", type=float, help="microns per pixel, if the file does not have them", metavar="UM")
    predict.add_argument("--min-tissue", type=float, default=0.5, help="smallest share of tissue in a tile (0.5)",
                         metavar="SHARE")  # fmt: skip
    by_default = {
        embed: "the one trained on all spots, else fold 0",
        predict: "the one that held out the slide, else as `embed`",
    }
    for user in (embed, predict):
        user.add_argument("--model", required=user is predict, help="folder of `run` or `train`", metavar="RUN")
        user.add_argument(
            "--fold", type=int, help=f"fold whose model is used; by default {by_default[user]}", metavar="N"
        )
        user.add_argument("--weights", help="source of the frozen weights: hub, a file, or random", metavar="VALUE")
        user.add_argument("--batch-size", type=int, default=64, help="tiles at once (64)", metavar="N")
        user.add_argument("--device", help=_HELP["device"], metavar="VALUE")
        user.add_argument("--out", required=True, help=".h5ad file to write", metavar="FILE")

    picture = add("map", "draw one predicted gene beside the H&E")
    picture.add_argument("predictions", help=".h5ad file that `predict` wrote", metavar="FILE")
    picture.add_argument(
        "--gene",
        metavar="NAME",
        help="gene to draw; by default the best predicted of those that vary on this slide, or else the most variable",
    )
    picture.add_argument("--out", required=True, help="picture to write: .png, .svg or .pdf", metavar="FILE")

    add_slide = add("add", "add a user's slide, with counts, to a cohort's folder")
    add_slide.add_argument("counts", help="Space Ranger's outs folder, or an .h5ad of counts", metavar="OUTS")
    add_slide.add_argument("--image", required=True, help="the full-resolution image of the slide", metavar="FILE")
    add_slide.add_argument("--cohort", required=True, help="folder to add it to, created if missing", metavar="DIR")
    add_slide.add_argument("--id", required=True, dest="slide_id", help="the slide's name in it", metavar="NAME")
    add_slide.add_argument("--patient", help="patient of the tissue; unknown by default", metavar="NAME")
    help_mpp = "microns per pixel, or visium to derive them from the spots; by default read from the file"
    add_slide.add_argument("--mpp", type=_mpp, help=help_mpp, metavar="UM")
    add_slide.add_argument("--technology", default="Visium", help="Visium by default", metavar="NAME")

    export = add("export", "write merged weights that timm loads, with a model card")
    export.add_argument("model", help="folder of `run` or `train`", metavar="RUN")
    export.add_argument(
        "--fold",
        type=int,
        help="fold whose model is used; by default the one trained on all spots, else fold 0",
        metavar="N",
    )
    export.add_argument("--weights", help="source of the frozen weights: hub, a file, or random", metavar="VALUE")
    export.add_argument("--out", required=True, help="folder to create", metavar="DIR")

    sweep = add("sweep", "execute many runs from one file, and tabulate the results")
    sweep.add_argument(
        "sweep", nargs="?", help="YAML file, or name of a ready sweep; lists those if omitted", metavar="SWEEP"
    )
    sweep.add_argument("--out", help="the sweep's folder (sweeps/NAME); its report is in it", metavar="DIR")
    sweep.add_argument("-p", dest="fixed", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                       help="set a parameter of every point, overriding the file")  # fmt: skip
    sweep.add_argument("--workers", type=int, help="points at once; by default limited by GPUs or cores", metavar="N")
    sweep.add_argument("--scheduler", help="a Dask scheduler, to use its workers", metavar="ADDRESS")
    sweep.add_argument("--retry", type=int, default=0, help="further attempts for failed points (0)", metavar="N")
    sweep.add_argument("--dry-run", action="store_true", help="print what would run, and how long it took last time")
    tables = add("report", "write tables and figures from run folders, with the paper's values beside them")
    tables.add_argument("runs", nargs="+", help="run folders, or folders of run folders", metavar="RUN")
    tables.add_argument("--out", default="report", help="folder to create (report)", metavar="DIR")
    get = add("fetch", "download a cohort, a checkpoint or a gene list")
    get.add_argument("name", nargs="?", help="what to fetch; lists all names if omitted", metavar="NAME")
    get.add_argument("--root", help="folder to put it in; the cache by default", metavar="DIR")
    check = add("doctor", "check this machine: one line per subject, with a fix")
    check.add_argument("--offline", action="store_true", help="do not check gated models on the hub")
    return top


def _add_settings(experiment: argparse.ArgumentParser) -> None:
    from peka_lite.experiments.config import RunConfig

    for field in dataclasses.fields(RunConfig):
        kind = _slide_ids if field.name == "slides" else _TYPES.get(field.type, str)
        flag = f"--{field.name.replace('_', '-')}"
        if field.type == "bool":
            experiment.add_argument(flag, action="store_true", help=_HELP[field.name])
            continue
        experiment.add_argument(flag, type=kind, default=field.default, help=_HELP[field.name], metavar="VALUE")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        super().error(escape_control(message))  # the message repeats the arguments, which may be file names


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, True) else super()._get_help_string(action)


def _mpp(text: str) -> float | str:
    return text if text == "visium" else float(text)


def _slide_ids(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
