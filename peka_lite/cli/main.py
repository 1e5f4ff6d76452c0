"""Run the `peka-lite` command: parse its options, call the library and print results."""

from __future__ import annotations

import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

from peka_lite._core._signals import exit_on_signals
from peka_lite._core.io import as_full_disk
from peka_lite._core.names import escape_control, short_name
from peka_lite._core.progress import show_messages, stage
from peka_lite.cli.options import parser

LONGEST = 4000  # characters of a message; a received name may be longer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; invalid input is one line on stderr and status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = vars(parser(command=next(iter(argv), None)).parse_args(argv))
    name = options.pop("command")
    command = {
        "run": _run, "train": _train, "embed": _embed, "predict": _predict, "map": _map, "add": _add,
        "export": _export, "sweep": _sweep,
        "report": _report, "fetch": _fetch, "cache": _cache, "doctor": _doctor,
    }[name]  # fmt: skip
    with exit_on_signals():
        try:
            with warnings.catch_warnings(), show_messages(), stage(name):
                _shorten_warnings()
                status = command(**options)
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, so that a full disk is reported
                return status
        except KeyboardInterrupt as stop:
            _print_error("stopped; finished parts are stored, and the same command resumes")
            return 128 + getattr(stop, "number", signal.SIGINT)
        except Exception as error:
            full = as_full_disk(error)
            if full is None and not isinstance(error, ValueError | OSError | FloatingPointError | MemoryError):
                raise
            _print_error(full or error)
            return 2


def _print_error(message: object) -> None:
    with suppress(OSError):  # the terminal was closed
        print(f"peka-lite: {short_name(str(message).strip(), longest=LONGEST)}", file=sys.stderr, flush=True)


def _shorten_warnings() -> None:
    """Print each `UserWarning` as one line, without its source location; others are unchanged."""
    show = warnings.showwarning

    def show_short(message, category, *place, **options):
        if category is UserWarning:
            print(f"peka-lite: {escape_control(message)}", file=sys.stderr)
        else:
            plain = escape_control(message, lines=True)
            show(message if plain == str(message) else plain, category, *place, **options)

    warnings.showwarning = show_short


def _echo(*lines: object) -> None:
    """Print lines of a result, with control characters escaped, since names may be received."""
    for line in lines:
        print(escape_control(line))


def _run(*, out: str, maps: bool, **options) -> int:
    from peka_lite.experiments.config import RunConfig

    config = RunConfig(**options)
    config.check()  # before PyTorch is imported, so that a wrong setting is refused at once
    from peka_lite.experiments.run import run

    summary = run(config, out, maps=maps, progress=True)
    if not summary:  # not the first process
        return 0
    _echo(
        f"{summary['method']}, {_describe_features(summary)}, "
        f"protocol {summary['protocol']}, {summary['split']} split, {summary['n_folds']} folds: "
        f"mean PCC {summary['mean_pcc']:.3f} "
        f"[{summary['ci_low']:.3f}, {summary['ci_high']:.3f}], {summary['n_nan']} undefined; {out}"
    )
    return 0


def _describe_features(summary: dict) -> str:
    if summary["features"] == "file":
        return f"{summary['weights']}, learned from: {summary['learned_from']}"
    return f"features {summary['features']}, on {summary['backbone']} ({summary['weights']})"


def _train(*, out: str, fold: int | None, **options) -> int:
    from peka_lite.experiments.config import RunConfig

    config = RunConfig(**options)
    config.check()
    from peka_lite.experiments.run import train

    summary = train(config, out, fold=fold, progress=True)
    if summary:
        how = "frozen" if config.method == "none" else f"adapted by {config.method}, epochs: {config.epochs}"
        drawn = " (synthetic: drawn tissue)" if summary["synthetic"] else ""
        _echo(
            f"{out}: {config.backbone} ({summary['weights']}), {how}, {summary['adapted_share']:.1%} of its weights; "
            f"{summary['n_train']} of {summary['n_spots']} spots of {config.cohort}{drawn}",
            f"next: peka-lite predict SLIDE --model {shlex.quote(out)} --out genes.h5ad; "
            "`peka-lite run` measures how well it predicts",
        )
    return 0


def _embed(*, cohort, slides, min_genes, backbone, model, fold, weights, batch_size, device, out) -> int:
    from peka_lite.backbones.load import load_backbone
    from peka_lite.data.cohorts import open_cohort
    from peka_lite.experiments._embed import write_features
    from peka_lite.experiments.model import load_trained

    if (model is None) == (backbone is None):
        raise ValueError("give either --model, a folder of `run` or `train`, or --backbone for a frozen student")
    if model is None and fold is not None:
        raise ValueError("--fold names a model of --model; a frozen student has none")
    if model is not None:
        trained = load_trained(model, fold=fold, weights=weights, device=device)
        student, source = trained.student, trained.describe()
    else:
        student, source = load_backbone(backbone, weights=weights or "hub"), {}
    spots = open_cohort(cohort, slides=slides, min_genes=min_genes)
    options = {"batch_size": batch_size, "device": device, "progress": True}
    features = write_features(spots, out, student, source=source, **options)
    _echo(f"{features.n_obs} spots, {features.n_vars} features; {out}")
    return 0


def _predict(*, slide: str, model: str, out: str, **options) -> int:
    from peka_lite.experiments._predict_from import predict_from
    from peka_lite.probe._target_ranges import describe_outside

    predicted = predict_from(model, slide, out, progress=True, **options)
    settings = predicted.uns["peka_lite"]
    where, fold = "spots", settings["model"]["fold"]
    if "min_tissue" in settings:  # an image, not a slide with spots
        um, share = settings["tile_px"] * settings["tile_mpp"], settings["min_tissue"]
        mpp = settings["mpp"].mean()
        where = f"tiles of {um:g} um, each at least {share:.0%} tissue, from pixels of {mpp:.3g} um"
    model = settings["model"]["folder"] + ("" if fold == "all" else f", {fold}")
    _echo(f"{out}: {predicted.n_vars} genes at {predicted.n_obs} {where}, by model {model}")
    _echo(describe_outside(predicted))
    return 0


def _map(*, predictions: str, gene: str | None, out: str) -> int:
    from peka_lite.maps.tissue import save_predicted_map

    drawn, remarks = save_predicted_map(predictions, out, gene=gene)
    _echo(f"{out}: {drawn}; use --gene for another gene of {predictions}", *remarks)
    return 0


def _add(*, counts: str, image: str, cohort: str, slide_id: str, **options) -> int:
    from peka_lite.data._space_ranger import read_counts
    from peka_lite.data.visium import add_slide, describe_next_step

    _echo(add_slide(cohort, slide_id, read_counts(counts), image, progress=True, **options))
    _echo(describe_next_step(cohort))
    return 0


def _export(*, model: str, out: str, fold: int | None, weights: str | None) -> int:
    from peka_lite.experiments.export import export

    _echo(export(model, out, fold=fold, weights=weights))
    return 0


def _sweep(*, sweep: str | None, out: str | None, fixed: list, dry_run: bool, **options) -> int:
    from peka_lite.experiments.sweeps.read import read_sweep, read_value, ready_sweeps

    if sweep is None:
        for name, title in ready_sweeps().items():
            _echo(f"{name:<12}{title}")
        return 0
    if len({name for name, _ in fixed}) < len(fixed):
        raise ValueError("-p: a parameter is given twice")
    definition = read_sweep(sweep, fixed={name: read_value(text) for name, text in fixed})
    out = out or f"sweeps/{definition.name}"
    if dry_run:
        from peka_lite.experiments.sweeps.points import plan_sweep

        _echo(*plan_sweep(definition, out).split("\n"))
        return 0
    from peka_lite.experiments.sweeps.run import run_sweep
    from peka_lite.reports.page import write_report

    states = run_sweep(definition, out, **options)
    if (states["state"] == "done").any():
        write_report([out], f"{out}/report", replace=True)
        _echo(f"{out}/report/report.md")
    return int((states["state"] != "done").any())


def _fetch(*, name: str | None, root: str | None) -> int:
    from peka_lite.data.download import fetch, find_fetched, read_manifest

    if name is None:
        for entry in read_manifest().values():
            _echo(f"{entry.name:<20}{entry.kind:<12}{'fetched' if find_fetched(entry.name) else '':<9}{entry.title}")
        return 0
    _echo(fetch(name, root=root))
    return 0


def _cache(*, prune: float | None) -> int:
    from peka_lite._core.cache import list_cache, prune_cache
    from peka_lite._core.io import format_size

    results = list_cache() if prune is None else prune_cache(days=prune)
    for row in results.itertuples():
        _echo(f"{row.kind:<12}{format_size(row.bytes):>10}  used {row.days:4.0f} days ago  {row.name}")
    _echo(f"{len(results)} results, {format_size(results['bytes'].sum())}{'' if prune is None else ' removed'}")
    return 0


def _doctor(*, offline: bool) -> int:
    from peka_lite.cli.doctor import doctor, report

    checks = doctor(online=not offline)
    _echo(*report(checks).split("\n"))
    return int(any(check.status == "fail" for check in checks))


def _report(*, runs: list[str], out: str) -> int:
    from peka_lite.reports.page import write_report

    write_report(runs, out)
    _echo(f"{out}/report.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
