"""Read and write files of fitted PCA-ridge probes and their genes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from peka_lite import __version__
from peka_lite._core._tensor_files import (
    check_record,
    is_finite,
    is_whole_number,
    read_record,
    read_tensors,
    require_name,
    write_tensors,
)
from peka_lite._core._yaml import is_line
from peka_lite.probe.pca_ridge import PCARidge

TENSORS = ("coef", "mean", "scale", "intercept")
OPTIONS = ("n_components", "alpha", "standardize", "fit_intercept")
_FLAG = (lambda value: type(value) is bool, "true or false")
_RECORD = {
    "normalization": (is_line, "text of one line"),
    "fingerprint": (lambda value: value is None or is_line(value), "text of one line or null"),
    "probes": (lambda value: isinstance(value, dict) and 0 < len(value) <= 10_000, "a mapping of probes"),
    "version": (is_line, "text of one line"),
}
_PROBE = {
    "genes": (
        lambda value: isinstance(value, list) and {*map(type, value)} == {str} and len(set(value)) == len(value),
        "a list of names, each once",
    ),
    "options": (lambda value: isinstance(value, dict), "a mapping"),
}
_OPTIONS = {
    "n_components": (lambda value: value is None or is_whole_number(value), "a whole number above 0 or null"),
    "alpha": (lambda value: value == "hest" or (is_finite(value) and value >= 0), "'hest' or a number of at least 0"),
    "standardize": _FLAG,
    "fit_intercept": _FLAG,
    "width": (is_whole_number, "a whole number above 0"),
}


@dataclass(frozen=True)
class Probes:
    """Content of a probe file.

    Attributes
    ----------
    probes
        Name -> (fitted `PCARidge`, its genes in column order). Files of older versions have no ``range_``.
    normalization
        Normalization of the predicted values.
    fingerprint
        `backbone_fingerprint` of the student of the features, or None.
    """

    probes: dict[str, tuple[PCARidge, tuple[str, ...]]]
    normalization: str
    fingerprint: str | None


def save_probes(
    path: str | os.PathLike,
    probes: Mapping[str, tuple[PCARidge, Sequence[str]]],
    *,
    normalization: str,
    fingerprint: str | None = None,
) -> None:
    """Write fitted probes to a safetensors file in float64; only a probe file is overwritten.

    Parameters
    ----------
    probes
        Name (``"all"``, or ``"fold0"``, ...) -> (probe, genes in column order); solver ``"exact"`` only.
    normalization
        Normalization of the targets they were fitted on.
    fingerprint
        `backbone_fingerprint` of the student, taken before merging; used to reject features of other weights.

    Raises
    ------
    ValueError
        For another solver, a probe that is not fitted, or a wrong number of genes.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> X = np.random.default_rng(0).normal(size=(40, 5))
    >>> probe = pk.probe.PCARidge(5).fit(X, X[:, :2])
    >>> pk.probe.save_probes("probe.safetensors", {"all": (probe, ["ACTB", "KRT8"])}, normalization="log1p")
    >>> loaded, genes = pk.probe.load_probes("probe.safetensors").probes["all"]
    >>> genes, np.array_equal(loaded.predict(X), probe.predict(X))
    (('ACTB', 'KRT8'), True)
    """
    tensors, entries = {}, {}
    for name, (probe, genes) in probes.items():
        require_name(name)
        if probe.solver != "exact":
            raise ValueError(f"probe {name!r} has solver {probe.solver!r}; only 'exact' can be saved")
        if not hasattr(probe, "coef_"):
            raise ValueError(f"probe {name!r} is not fitted")
        genes = [str(g) for g in genes]
        if len(genes) != probe.coef_.shape[1] or len(set(genes)) != len(genes):
            raise ValueError(
                f"probe {name!r} predicts {probe.coef_.shape[1]} genes, not these {len(genes)} (each once)"
            )
        for part in TENSORS:
            values = np.array(getattr(probe, f"{part}_"), dtype=np.float64, order="C")
            tensors[f"{name}.{part}"] = torch.from_numpy(values)
        if hasattr(probe, "range_"):
            tensors[f"{name}.range"] = torch.from_numpy(np.array(probe.range_, dtype=np.float64, order="C"))
        options = {option: getattr(probe, option) for option in OPTIONS} | {"width": int(probe.n_components_)}
        entries[name] = {"genes": genes, "options": options}
    record = {"normalization": normalization, "fingerprint": fingerprint, "probes": entries, "version": __version__}
    write_tensors(path, tensors, record, kind="probe")


def load_probes(path: str | os.PathLike) -> Probes:
    """Read a file of `save_probes`; predictions are bit-identical to those of the saved probes.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        For a truncated file, or one not written by `save_probes`.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> X = np.random.default_rng(0).normal(size=(40, 5))
    >>> probe = pk.probe.PCARidge(n_components=3).fit(X, X[:, :1])
    >>> pk.probe.save_probes("probe.safetensors", {"fold0": (probe, ["KRT8"])}, normalization="log1p-cp10k")
    >>> file = pk.probe.load_probes("probe.safetensors")
    >>> file.normalization, list(file.probes), file.probes["fold0"][0].n_components
    ('log1p-cp10k', ['fold0'], 3)
    """
    record, probes = read_record(path, kind="probe"), {}
    check_record(path, record, _RECORD, whose="a probe's")
    for name, entry in record["probes"].items():
        check_record(path, entry, _PROBE, whose="a probe's")
        check_record(path, entry["options"], _OPTIONS, whose="a probe's")
        tensors, n = read_tensors(path, name), len(entry["genes"])
        d = len(tensors["mean"]) if "mean" in tensors and tensors["mean"].ndim == 1 else 0
        shapes = {"coef": (d, n), "mean": (d,), "scale": (d,), "intercept": (n,), "range": (2, n)}
        fits = tensors.keys() - {"range"} == {*TENSORS} and all(tuple(t.shape) == shapes[k] for k, t in tensors.items())
        if not fits or any(values.dtype != torch.float64 for values in tensors.values()):
            raise ValueError(f"{path}: the tensors of {name!r} do not fit its {n} genes; save it again")
        width = entry["options"].pop("width")
        probe = PCARidge(**entry["options"])
        probe.n_components_ = width
        for part, values in tensors.items():  # files of older versions have no range
            setattr(probe, f"{part}_", values.numpy())
        probes[name] = (probe, tuple(entry["genes"]))
    return Probes(probes, record["normalization"], record["fingerprint"])
