"""Define the commands of `peka-lite`, their options and their help texts."""

from __future__ import annotations

import argparse
from types import NoneType

from peka_lite import __version__
from peka_lite._core.names import did_you_mean, escape_control

_RUN = {"metavar": "RUN", "help": "folder of `run` or `train`"}
_DEVICE = {"metavar": "DEVICE", "help": "cpu, cuda, cuda:1, ...; a GPU where there is one by default"}
_WEIGHTS = {"metavar": "WEIGHTS", "help": "source of the frozen weights: hub, a file, or random; the run's by default"}
_BATCH = {"type": int, "default": 64, "metavar": "N", "help": "tiles at once (64)"}
_FIRST = "the one trained on all spots, else that of fold 0"


def parser(*, command: str | None = None) -> argparse.ArgumentParser:
    """Build the command-line parser; only ``"run"`` and ``"train"`` get the options of `RunConfig`.

    PyTorch is not imported for the others, which must work in a broken install.
    """
    top = _Parser("peka-lite", description="Train a pathology model to predict gene expression.")
    top.add_argument("--version", action="version", version=f"peka-lite {__version__}")
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, title: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=title, description=f"{title[0].upper()}{title[1:]}.", allow_abbrev=False,
            epilog=f"example: peka-lite {name} {example}",
        )  # fmt: skip

    run = add("run", "run one experiment, from a cohort to a table of scores and maps",
              "--cohort breast --backbone uni --protocol strict --out runs/bone")  # fmt: skip
    run.add_argument("--no-maps", dest="maps", action="store_false", help="draw no maps")
    train = add("train", "train one student and its probe without scoring, and save the model",
                "--cohort breast --backbone uni --out models/breast")  # fmt: skip
    train.add_argument("--fold", type=int, help="hold out the test spots of this fold; none by default", metavar="N")
    for experiment in (run, train):
        experiment.add_argument("--out", required=True, help="folder to create", metavar="DIR")
        if experiment.prog.endswith(f" {command}"):
            _add_settings(experiment)

    embed = add("embed", "write a student's features of every spot of a cohort",
                "--cohort breast --model runs/bone --out breast.h5ad")  # fmt: skip
    embed.add_argument("--cohort", required=True, help="mini, a folder in HEST-1k's layout, or a fetched cohort",
                       metavar="COHORT")  # fmt: skip
    embed.add_argument("--slides", type=_slide_ids, help="slide ids, comma-separated; all by default", metavar="ID,ID")
    embed.add_argument("--backbone", help="a frozen student, where no --model is given", metavar="NAME")
    embed.add_argument("--min-genes", type=int, default=200, help="drop spots with fewer expressed genes (200)",
                       metavar="N")  # fmt: skip
    predict = add("predict", "predict genes over a whole-slide image, or at the spots of a HEST slide",
                  "slide.svs --model runs/bone --out genes.h5ad")  # fmt: skip
    predict.add_argument("slide", help="image file, or id of a slide of --cohort", metavar="SLIDE")
    predict.add_argument("--cohort", help="cohort of a slide id; the run's by default", metavar="COHORT")
    predict.add_argument("--mpp", type=float, help="microns per pixel, if the file does not have them", metavar="UM")
    predict.add_argument("--min-tissue", type=float, default=0.5, help="smallest share of tissue in a tile (0.5)",
                         metavar="SHARE")  # fmt: skip
    for user, fold in ((embed, _FIRST), (predict, f"the one that held out the slide, else {_FIRST}")):
        user.add_argument("--model", required=user is predict, **_RUN)
        user.add_argument("--fold", type=int, help=f"fold whose model is used; by default {fold}", metavar="N")
        user.add_argument("--weights", **_WEIGHTS)
        user.add_argument("--batch-size", **_BATCH)
        user.add_argument("--device", **_DEVICE)
        user.add_argument("--out", required=True, help=".h5ad file to write", metavar="FILE")

    picture = add("map", "draw one predicted gene beside the H&E", "genes.h5ad --gene KRT8 --out KRT8.png")
    picture.add_argument("predictions", help=".h5ad file that `predict` wrote", metavar="FILE")
    picture.add_argument(
        "--gene",
        metavar="NAME",
        help="gene to draw; by default the best predicted of those that vary on this slide, or else the most variable",
    )
    picture.add_argument("--out", required=True, help="picture to write: .png, .svg or .pdf", metavar="FILE")

    add_slide = add("add", "add a slide with counts to a cohort's folder",
                    "outs --image slide.tif --cohort own --id S1 --patient P1")  # fmt: skip
    add_slide.add_argument("counts", help="Space Ranger's outs folder, or an .h5ad of counts", metavar="OUTS")
    add_slide.add_argument("--image", required=True, help="the full-resolution image of the slide", metavar="FILE")
    add_slide.add_argument("--cohort", required=True, help="folder to add it to, created if missing", metavar="DIR")
    add_slide.add_argument("--id", required=True, dest="slide_id", help="the slide's name in it", metavar="NAME")
    add_slide.add_argument("--patient", help="patient of the tissue; unknown by default", metavar="NAME")
    help_mpp = "microns per pixel, or visium to derive them from the spots; by default read from the file"
    add_slide.add_argument("--mpp", type=_mpp, help=help_mpp, metavar="UM")
    add_slide.add_argument("--technology", default="Visium", help="Visium by default", metavar="NAME")

    export = add("export", "write merged weights that timm loads, with a model card", "runs/bone --out exported")
    export.add_argument("model", **_RUN)
    export.add_argument("--fold", type=int, help=f"fold whose model is used; by default {_FIRST}", metavar="N")
    export.add_argument("--weights", **_WEIGHTS)
    export.add_argument("--out", required=True, help="folder to create", metavar="DIR")

    sweep = add("sweep", "execute many runs from one file, and tabulate the results", "quick --workers 2")
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
    tables = add("report", "write tables and figures from run folders, with the paper's values beside them",
                 "runs/* --out report")  # fmt: skip
    tables.add_argument("runs", nargs="+", help="run folders, or folders of run folders", metavar="RUN")
    tables.add_argument("--out", default="report", help="folder to create (report)", metavar="DIR")
    get = add("fetch", "download a cohort, a checkpoint or a gene list", "breast")
    get.add_argument("name", nargs="?", help="what to fetch; lists all names if omitted", metavar="NAME")
    get.add_argument("--root", help="folder to put it in; the cache by default", metavar="DIR")
    cache = add("cache", "list the cached embeddings, labels and students, or remove unused ones", "--prune 30")
    cache.add_argument("--prune", type=float, help="remove what was not used for this many days", metavar="DAYS")
    check = add("doctor", "check this machine: one line per subject, with a fix", "--offline")
    check.add_argument("--offline", action="store_true", help="do not check gated models on the hub")
    return top


def _add_settings(experiment: argparse.ArgumentParser) -> None:
    """Add one option per setting, in groups by what it decides."""
    from peka_lite.experiments.settings import DECIDES, SETTINGS

    groups = {kind: experiment.add_argument_group(f"{kind} ({text})") for kind, text in DECIDES.items()}
    for name, row in SETTINGS.items():
        group, flag = groups[row.decides], f"--{name.replace('_', '-')}"
        text = row.help.replace("%", "%%")
        if bool in row.kinds:
            group.add_argument(flag, action="store_true", help=text)
            continue
        if row.choices:
            text += f" ({', '.join(row.choices)})"
        if row.default is not None:
            text += f"; {row.default} by default"
        metavar = row.metavar or name.upper().split("_")[-1]
        group.add_argument(flag, type=_converter(row), default=row.default, help=text, metavar=metavar)


def _converter(row):
    """Return a function from an option's text to a value that `RunConfig` takes."""
    kinds = [kind for kind in row.kinds if kind is not NoneType]
    if kinds == [tuple]:
        return _slide_ids
    return _text_or_number if kinds == [str, float] else kinds[0]


def _text_or_number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


class _Parser(argparse.ArgumentParser):
    given: tuple[str, ...] = ()

    def error(self, message):
        known = self._option_string_actions
        unknown = [name for arg in self.given if (name := arg.partition("=")[0]).startswith("--") and name not in known]
        if unknown:  # rather than an option that is missing because its name was misspelt
            message = f"unrecognized arguments: {unknown[0]}{did_you_mean(unknown[0], known)}"
        super().error(escape_control(message))  # the message repeats the arguments, which may be file names

    def parse_known_args(self, args=None, namespace=None):
        self.given = tuple(args or ())
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._subparsers._group_actions[0].choices[options.command].error(
                f"unrecognized arguments: {' '.join(unknown)}"
            )
        return options


def _mpp(text: str) -> float | str:
    return text if text == "visium" else float(text)


def _slide_ids(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
