"""Write the model card of a trained student: use, data, protocol, scores and license."""

from __future__ import annotations

import keyword
import math
from pathlib import Path

import pandas as pd

from peka_lite import __version__
from peka_lite._core._yaml import yaml_text
from peka_lite._core.names import escape_control, escape_markdown, fenced_code
from peka_lite.backbones._packaged import PREFIX
from peka_lite.backbones.custom import LAYER_TYPES, row_fields
from peka_lite.backbones.load import timm_pooling
from peka_lite.backbones.registry import Backbone
from peka_lite.data.download import read_manifest
from peka_lite.experiments.model import TrainedModel

TAGS = ["timm", "pathology", "histology", "spatial-transcriptomics", "gene-expression", "peka"]
TEST_UNITS = {
    "patient": "whole patients",
    "slide": "whole slides, several of which may be of one patient",
    "spot": "single spots, whose neighbors on the same slide were trained on: scores on a new slide will be lower",
}
POOLING = {
    "token": "the class token",
    "avg": "the mean of the patch tokens, or of the feature map",
    "token+avg": "the class token, then the mean of the patch tokens",
    "network": "that of the timm model",
}
OTHER_LICENSE = "Read it before you share weights derived from them."
LICENSES = {
    "CC-BY-NC-ND-4.0": "They may be used for non-commercial purposes with attribution. Adapted material may not be "
    "shared, and these merged weights are adapted material: do not share this folder unless the owner allows it.",
    "GPL-3.0": "Weights derived from them must be shared under the same license.",
    "AGPL-3.0": "Weights derived from them must be shared, or offered over a network, under the same license.",
    "Apache-2.0": "Modified weights may be shared with the license, the notices and a statement of the changes.",
    "BSD-3-Clause": "Modified weights may be shared with the copyright notice and the license.",
}


def model_card(trained: TrainedModel, metrics: pd.DataFrame | None = None) -> str:
    """Return the model card (Markdown with YAML front matter) of a trained model; `metrics` is its ``metrics.csv``.

    Text of the run is escaped for Markdown, and values in the Python code are literals.

    Raises
    ------
    ValueError
        For a value of the run of another type, such as a seed that is not a number.
    """
    spec, method = trained.student.spec, escape_markdown(trained.config.method)
    adapted = "" if trained.config.method == "none" else f", adapted to gene expression with {method}"
    parts = [
        f"---\n{yaml_text(_front_matter(trained))}---",
        f"# {escape_markdown(spec.name)}{adapted}",
        f"A pathology image model ({escape_markdown(spec.arch)}) and a linear probe that predicts {len(trained.genes)} "
        f"genes ({escape_markdown(trained.normalization)}) from an H&E tile, trained with peka_lite after PEKA "
        "(arXiv:2504.07061). "
        + ("The adapters are merged into the weights." if adapted else "The image model is the parent, unchanged."),
        f"## Use\n\nTiles are RGB, uint8, and cover as many micrometers as those of the cohort (HEST-1k: 112). They "
        f"are resized to {_whole(spec.input_size)} x {spec.input_size} pixels, scaled to 0 to 1 and normalized with "
        f"mean {_three(spec.mean)} and standard deviation {_three(spec.std)}. Pooling: {POOLING[spec.pooling]}.",
        f"{fenced_code(usage(trained), 'python')}\n\nGenes: {', '.join(map(escape_markdown, trained.genes))}.",
        f"## Data\n\n{_data(trained)}",
        f"## Protocol\n\n{_protocol(trained)}",
        f"## Scores\n\n{_scores(trained, metrics)}",
        f"## License\n\n{_license(trained)}",
        "## Limits\n\nFor research only, not for diagnosis or treatment. Predictions are estimates from the image and "
        "do not replace a measurement. Performance on other organs, stains and scanners is unknown.",
        f"## Versions\n\n{_versions(trained)}",
    ]
    return "\n\n".join(parts) + "\n"


def usage(trained: TrainedModel) -> str:
    """Return Python code that loads an exported folder with timm and predicts; it runs in that folder."""
    spec, config, out = trained.student.spec, trained.config, "model(x)"
    imports, options = _options(spec)
    built_in = {"network", timm_pooling(trained.student)}
    if spec.pooling == "token+avg" or (hasattr(trained.student, "num_prefix_tokens") and spec.pooling not in built_in):
        parts = {"token": "t[:, 0]", "avg": "t[:, model.num_prefix_tokens :].mean(1)"}
        norm = "model.fc_norm" if hasattr(trained.student, "fc_norm") else ""
        out = ", ".join(f"{norm}({parts[part]})" for part in spec.pooling.split("+"))
        out = f"torch.cat([{out.replace('t[', '(t := model.forward_features(x))[', 1)}], -1)"
    frozen, both = "", "features(tiles)"
    if trained.frozen is not None:
        weights = config.weights if config.weights in ("hub", "random") else "FILE"
        imports.append("from peka_lite import embed_tiles, load_backbone")
        frozen = (
            "\n# The probe also uses the parent's features, before those of this model.\n"
            f"parent = load_backbone({str(spec.name)!r}, weights={weights!r}, seed={_whole(config.seed)})\n"
        )
        both = "np.hstack([embed_tiles(parent, tiles), features(tiles)])"
    return f"""import numpy as np
import timm
import torch
from safetensors.numpy import load_file
{"".join(f"{line}{chr(10)}" for line in imports)}
model = timm.create_model(
    {str(spec.arch)!r}, num_classes=0, checkpoint_path="model.safetensors"{options}
).eval()
probe = {{k.split(".")[1]: v for k, v in load_file("probe.safetensors").items()}}
mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ({_three(spec.mean)}, {_three(spec.std)}))
{frozen}

@torch.inference_mode()
def features(tiles):  # uint8 (n, height, width, 3) -> float32 (n, {_whole(spec.dim)})
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    size = ({_whole(spec.input_size)}, {spec.input_size})
    x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    x = (x - mean) / std
    return {out}.numpy()


def predict(tiles):  # -> float64 (n, {len(trained.genes)}), genes as listed below
    X = {both}
    return (X - probe["mean"]) / probe["scale"] @ probe["coef"] + probe["intercept"]
"""


def _options(spec: Backbone) -> tuple[list[str], str]:
    """Return a backbone's options as code: the import lines of its layers, and keyword arguments."""
    imports, arguments = [], ""
    for key, value in row_fields(spec).get("options", {}).items():
        if not key.isidentifier() or keyword.iskeyword(key):
            raise ValueError(f"backbone {spec.name!r} has an option {key!r}, which is not a valid argument name")
        if isinstance(value, str) and value in LAYER_TYPES:
            imports.append(f"import {value.split(':')[0]}")
            code = value.replace(":", ".")
        else:
            code = _literal(value)
        arguments += f", {key}={code}"
    return sorted(set(imports)), arguments


def _front_matter(trained: TrainedModel) -> dict:
    spec, front = trained.student.spec, {}
    packaged = spec.source is None or spec.source.startswith(PREFIX)
    if packaged or not starts_random(trained):
        front["license"] = escape_control(spec.license.lower())  # the Hub's license ids are lower-case
    if not packaged and not starts_random(trained) and not spec.source.startswith("datasets/"):
        front["base_model"] = escape_control(spec.source)
    entry = read_manifest().artifacts.get(trained.config.cohort)
    if entry is not None and entry.repo_type == "dataset":
        front["datasets"] = [entry.repo]
    return front | {"library_name": "timm", "pipeline_tag": "image-feature-extraction", "tags": TAGS}


def _data(trained: TrainedModel) -> str:
    summary, entry = trained.summary, read_manifest().artifacts.get(trained.config.cohort)
    slides = _get_field(summary, "slides", list)
    lines = [
        f"- Cohort: {escape_markdown(Path(trained.config.cohort).name)}"
        + (f", {entry.title} ({entry.license})" if entry else "")
    ]
    if summary.get("synthetic"):
        lines.append("- **Synthetic: drawn by a program. This model was not trained on real tissue.**")
    lines += [
        f"- Slides ({len(slides)}): {', '.join(map(escape_markdown, slides))}",
        f"- Spots: {escape_markdown(summary.get('n_spots', 'not recorded'))}",
        f"- Fingerprint of the data: {escape_markdown(summary.get('data_fingerprint', 'not recorded'))}",
    ]
    return "\n".join(lines)


def _protocol(trained: TrainedModel) -> str:
    protocol = trained.config.resolve_protocol()
    if trained.fold is None:
        return "Nothing was held out: the model was trained on the whole cohort."
    lines = [f"Protocol {escape_markdown(repr(protocol.name))}. Held out: {TEST_UNITS[protocol.split]}."]
    if trained.config.method != "none":
        rows = "all spots, including those held out" if protocol.student == "all" else "training spots only"
        lines.append(f"Teacher, pseudo-labels and student were fitted on {rows}.")
    lines.append(f"The genes were selected on {'all spots' if protocol.genes == 'all' else 'training spots only'}.")
    lines.append(f"This is the model of fold {trained.fold}.")
    return " ".join(lines)


def _scores(trained: TrainedModel, metrics: pd.DataFrame | None) -> str:
    summary = trained.summary
    if summary.get("mean_pcc") is None:
        reason = "nothing was held out" if trained.fold is None else "the held-out spots were not scored"
        return f"There are none: {reason}, so the accuracy of this model is unknown."
    lines = ["| Fold | Training spots | Test spots | Mean PCC over genes |", "|---|---|---|---|"]
    for fold, pcc in enumerate(_get_field(summary, "mean_pcc_per_fold", list)):
        rows = metrics[metrics["fold"] == fold] if metrics is not None else ()
        sizes = [str(rows[c].iloc[0]) if len(rows) and c in rows else "" for c in ("n_train", "n_test")]
        mark = " (this model)" if fold == trained.fold else ""
        lines.append(f"| {fold}{mark} | {' | '.join(map(escape_markdown, sizes))} | {_number(pcc):.3f} |")
    low, high, mean = (_number(summary.get(name)) for name in ("ci_low", "ci_high", "mean_pcc"))
    unit = escape_markdown(summary.get("unit"))
    known = math.isfinite(low) and math.isfinite(high)
    interval = f"95% interval {low:.3f} to {high:.3f}" if known else f"no interval: there is one {unit}"
    lines.append(f"| all | | | {mean:.3f} ({interval}) |")
    kind = escape_markdown(trained.config.normalization)
    return "\n".join(lines) + (
        f"\n\nPCC: Pearson correlation of predicted and measured {kind} expression over a fold's test spots. The "
        "confidence interval is Student's t times a bootstrap standard error, which resamples "
        f"{unit}s and genes."
    )


def _license(trained: TrainedModel) -> str:
    spec = trained.student.spec
    if starts_random(trained):
        return (
            "There are no parent weights: the image model started from "
            f"{escape_markdown(trained.student.weights_origin)}. No license is inherited. Use it for tests only."
        )
    terms = LICENSES.get(spec.license, OTHER_LICENSE)
    text = (
        f"Parent weights: {escape_markdown(trained.student.weights_origin)}, {escape_markdown(spec.license)}. {terms}"
    )
    if spec.name == "ctranspath":
        text += " The authors' README adds that they are for non-commercial academic purposes."
    if spec.gate:
        text += f" Access to them is granted at {escape_markdown(spec.gate)}, on terms that bind the user."
    if "-ND" in spec.license:
        text = "> [!WARNING]\n> " + text
    if trained.config.teacher == "scfoundation" and trained.config.method != "none":
        license = read_manifest()["scfoundation"].license
        text += f"\n\nIts teacher was scFoundation, whose weights are under the {license}."
    return text + "\n\nThe license of the data above may have further terms."


def _versions(trained: TrainedModel) -> str:
    versions = _get_field(trained.summary, "versions", dict).items()
    lines = [f"- Trained with: {escape_markdown(', '.join(f'{name} {v}' for name, v in versions)) or 'not recorded'}"]
    lines += [f"- Exported with: peka_lite {__version__}", f"- Fingerprint of the model: {trained.fingerprint}"]
    return "\n".join(lines)


def _get_field(summary: dict, name: str, kind: type):
    """Return a list or mapping of a summary; an empty one if it is missing."""
    if not isinstance(value := summary.get(name) or kind(), kind):
        raise ValueError(f"{name} in summary.json must be a {kind.__name__}, not {escape_control(value)!r}")
    return value


def _whole(value: object) -> str:
    """Return a whole number as Python code."""
    if type(value) is not int:
        raise ValueError(f"expected a whole number, not {escape_control(value)!r}")
    return _literal(value)


def _three(values: object) -> str:
    """Return three numbers as Python code."""
    return f"({', '.join(_literal(_number(value)) for value in values)})"


def _literal(value: bool | int | float | str | list | None) -> str:
    """Return a plain value as Python code."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if not isinstance(value, bool | int | float | str | None):
        raise ValueError(f"expected a bool, number, text, list or None, not {escape_control(value)!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, not {value}")
    return repr(value)


def _number(value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, not {escape_control(value)!r}")
    return value


def starts_random(trained: TrainedModel) -> bool:
    """Return whether the student started from random weights."""
    return trained.config.weights == "random"
