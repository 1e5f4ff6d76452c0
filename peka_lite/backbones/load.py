"""Load pathology image models (students) by name and extract features."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path

import psutil
import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from peka_lite._core._file_kinds import file_kind
from peka_lite._core._lazy import LazyMapping
from peka_lite._core._torch_files import OPTIONS, read_torch_file
from peka_lite._core.device import compute_dtype
from peka_lite._core.hashing import sha256
from peka_lite._core.names import did_you_mean
from peka_lite.backbones._packaged import describe_file, find_packaged
from peka_lite.backbones.custom import PACKAGED_NAMES, check_architecture, get_backbone
from peka_lite.backbones.registry import BACKBONES, Backbone, hub_page
from peka_lite.data._choices import explain_gate
from peka_lite.data.download import find_fetched, is_published, read_manifest

MAX_WEIGHTS = 20_000_000_000  # timm's largest network has 7e9
MAX_PATCHES = 65_536  # of a tile: 1,024 pixels in patches of 4


class ConvStem(nn.Module):
    """Convolutional patch embedding of CTransPath (Wang et al. 2022, doi:10.1016/j.media.2022.102559).

    Two 3x3 convolutions of stride 2 and a 1x1 convolution in place of Swin's 4x4 patch projection;
    (B, 3, H, W) to (B, H/4, W/4, embed_dim).

    Examples
    --------
    >>> import torch
    >>> import peka_lite as pk
    >>> pk.backbones.ConvStem(img_size=32, patch_size=4, embed_dim=16)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 8, 8, 16])
    """

    def __init__(self, img_size=224, patch_size=4, in_chans=3, embed_dim=96, norm_layer=None, **_):
        super().__init__()
        side = img_size if isinstance(img_size, int) else img_size[0]
        self.grid_size = (side // patch_size, side // patch_size)
        self.num_patches = self.grid_size[0] ** 2
        layers, width = [], in_chans
        for out in (embed_dim // 8, embed_dim // 4):
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        self.proj = nn.Sequential(*layers, nn.Conv2d(width, embed_dim, 1))
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x):
        """Embed patches, channels last."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def load_backbone(
    name: str | os.PathLike | Backbone, *, weights: str | os.PathLike = "hub", seed: int = 0, device: str | None = None
) -> nn.Module:
    """Load a student as a timm model in eval mode, with its registry row in ``model.spec``.

    Parameters
    ----------
    name
        A key of `BACKBONES`, a custom `Backbone` row, or a YAML file of one (`read_backbone`).
    weights
        ``"hub"``: the published weights, from the package for ``"mini"``, else from the cache of `fetch`, else from the
        hub. A path: a local ``.bin``, ``.pth`` or ``.safetensors`` file. ``"random"``: random weights from `seed`, for
        tests and tutorials, with a warning.
    device
        Device of the model. None: the CPU.

    Returns
    -------
    torch.nn.Module
        Model with float32 weights. ``model.weights_origin`` records their source and, for a file of the package, the
        first digits of its SHA-256.

    Raises
    ------
    ValueError
        For an unknown name, a row without published weights, or a file that does not fit the architecture.
    PermissionError
        For gated weights without access. The message names the page to request it.
    ConnectionError
        If the hub cannot be reached.
    FileNotFoundError
        For a missing file, local or in the package, or a hub repository without weights.

    Examples
    --------
    >>> import torch
    >>> import peka_lite as pk
    >>> student = pk.load_backbone("mini")
    >>> student.spec.input_size, sum(weights.numel() for weights in student.parameters())
    (112, 2827008)
    >>> tuple(student(torch.zeros(1, 3, 112, 112)).shape)
    (1, 192)
    """
    spec = get_backbone(name)
    weights = str(weights)
    meta_model = build_on_meta(spec)  # before allocating memory and before downloading
    if weights == "random":
        _check_memory(meta_model, spec)
        warnings.warn(f"{spec.name} starts from random weights (seed {seed}); use it for tests only", stacklevel=2)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU only, where weights are initialized
            model = build_network(spec)
        origin = f"random, seed {seed}"
    else:
        path, origin = _find_published(spec) if weights == "hub" else (Path(weights), f"file {Path(weights).name}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such weights file for {spec.name}; give a file, 'hub' or 'random'")
        state = _read_weights(meta_model, spec, path)
        _load(meta_model, state, spec, path)
        model = build_network(spec)
        _load(model, state, spec, path)
    model.spec, model.weights_origin = spec, origin
    return model.eval().to(device or "cpu")


def precision_for(spec: Backbone, device: str | torch.device) -> torch.dtype:
    """Return the compute type of a student's registry row for a device."""
    return compute_dtype(device, precision=spec.precision)


def preprocess(tiles: torch.Tensor, spec: Backbone) -> torch.Tensor:
    """Convert uint8 tiles (B, H, W, 3) to normalized float32 (B, 3, input_size, input_size) on the same device."""
    return normalize_pixels(tiles, mean=spec.mean, std=spec.std, input_size=spec.input_size)


def normalize_pixels(tiles: torch.Tensor, *, mean: tuple, std: tuple, input_size: int | None) -> torch.Tensor:
    """Convert uint8 tiles (B, H, W, 3) to normalized float32 (B, 3, H', W'), resized unless `input_size` is None."""
    x = tiles.permute(0, 3, 1, 2).float().div_(255)
    if input_size is not None and x.shape[-2:] != (input_size, input_size):
        x = F.interpolate(x, (input_size, input_size), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (mean, std))
    return (x - mean) / std


def extract_features(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return features (B, D_s) of normalized images (B, 3, H, W), pooled as in the student's registry row.

    The output of a network without such a row is returned unchanged.

    Examples
    --------
    >>> import torch
    >>> import peka_lite as pk
    >>> model = pk.load_backbone("mini")
    >>> images = pk.backbones.preprocess(torch.zeros(2, 224, 224, 3, dtype=torch.uint8), model.spec)
    >>> images.shape, pk.backbones.extract_features(model, images).shape
    (torch.Size([2, 3, 112, 112]), torch.Size([2, 192]))
    """
    spec = get_registry_row(model)
    pooling = "network" if spec is None else spec.pooling
    if pooling in ("network", timm_pooling(model)) or not hasattr(model, "num_prefix_tokens"):
        return model(x)
    tokens = model.forward_features(x)  # (B, prefix + patches, width)
    if tokens.ndim != 3:
        raise ValueError(f"{type(model).__name__} returns no token sequence to pool by {pooling!r}; use 'network'")
    norm = getattr(model, "fc_norm", nn.Identity())  # if timm has fc_norm, the tokens are not normalized yet
    parts = {"token": lambda: tokens[:, 0], "avg": lambda: tokens[:, model.num_prefix_tokens :].mean(1)}
    return torch.cat([norm(parts[part]()) for part in pooling.split("+")], dim=-1)


def timm_pooling(model: nn.Module) -> str:
    """Return how a timm network pools its output: ``"token"``, ``"avg"`` or another name, empty if it does not pool."""
    if hasattr(model, "dist_token"):  # DeiT
        return "mean of class and distillation token"
    if getattr(model, "pool_include_prefix", False):
        return "mean of all tokens"
    pool = getattr(model, "global_pool", None) or getattr(getattr(model, "head", None), "global_pool", "")
    return pool if isinstance(pool, str) else getattr(pool, "pool_type", "")


def get_registry_row(model: nn.Module) -> Backbone | None:
    """Return the registry row of a student, or None for another network."""
    spec = getattr(model, "spec", None)
    return spec if isinstance(spec, Backbone) else None


def build_network(spec: Backbone) -> nn.Module:
    """Build a student's architecture with random weights and no classifier. ValueError if its row does not fit."""
    try:
        check_architecture(spec.arch)
        if not timm.is_model(spec.arch):
            raise ValueError(f"unknown architecture{did_you_mean(spec.arch, timm.list_models())}")
        model = timm.create_model(spec.arch, pretrained=False, num_classes=0, **LazyMapping(spec.options))
    except Exception as error:  # unsuitable options raise different errors in each of timm's networks
        reason = f"{error}" if str(error) else type(error).__name__
        raise ValueError(f"backbone {spec.name!r}: timm cannot build {spec.arch!r} ({reason})") from None
    _check_pooling(model, spec)
    width, head = model.num_features, getattr(model, "head_hidden_size", None)  # some have a layer after pooling
    if spec.pooling == "token+avg":
        width, head = 2 * width, None
    if spec.dim not in (width, head):
        raise ValueError(f"backbone {spec.name!r}: {spec.arch} has {width} features, but its row has dim {spec.dim}")
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if size is not None and getattr(patches, "strict_img_size", False) and set(size) != {spec.input_size}:
        raise ValueError(
            f"backbone {spec.name!r}: {spec.arch} takes {' x '.join(map(str, size))} pixels, but its row has "
            f"input_size {spec.input_size}; give options: img_size the same value, or dynamic_img_size: true"
        )
    return model


def build_on_meta(spec: Backbone) -> nn.Module:
    """Build a student's architecture on the meta device, without memory for weights, and check its size.

    Raises
    ------
    ValueError
        As `build_network`, and for more than `MAX_WEIGHTS` weights or `MAX_PATCHES` patches per tile.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_network(spec)
    if (n := _count_weights(model)) > MAX_WEIGHTS:
        raise ValueError(
            f"backbone {spec.name!r}: {n:,} weights are more than the limit of {MAX_WEIGHTS:,}; lower depth, embed_dim "
            "or img_size in its row"
        )
    side = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    rows, columns = (spec.input_size // s for s in side) if isinstance(side, tuple) else (1, 1)
    if rows * columns > MAX_PATCHES:
        raise ValueError(
            f"backbone {spec.name!r}: {rows * columns:,} patches per tile are more than the limit of {MAX_PATCHES:,}; "
            "lower input_size or raise patch_size in its row"
        )
    return model


def _count_weights(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))


def _check_memory(meta_model: nn.Module, spec: Backbone) -> None:
    """Check that random weights fit in memory. Published weights are as large as their file."""
    needs, has = 4 * _count_weights(meta_model), psutil.virtual_memory().total
    if needs > has:
        raise ValueError(
            f"backbone {spec.name!r}: random weights take {needs / 2**30:,.0f} GiB of memory, this machine has "
            f"{has / 2**30:,.0f}; lower depth or embed_dim in its row"
        )


def _check_pooling(model: nn.Module, spec: Backbone) -> None:
    """Check that the network supports its row's pooling, and suggest one that it supports."""
    tokens, default = hasattr(model, "num_prefix_tokens"), timm_pooling(model)
    has_class = getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None)
    if "token" in spec.pooling and not (has_class if tokens else default == spec.pooling):
        why, fix = "has no class token", "avg" if tokens or default in ("", "avg") else "network"
    elif spec.pooling == "avg" and not tokens and default not in ("", "avg"):
        why, fix = f"pools by {default!r}", "network"
    else:
        return
    raise ValueError(f"backbone {spec.name!r}: pooling is {spec.pooling!r}, but {spec.arch} {why}; use {fix!r}")


def _find_published(spec: Backbone) -> tuple[Path, str]:
    """Return the file of a row's published weights, and its source as text."""
    if (path := find_packaged(spec)) is not None:
        return path, describe_file(path)
    return _download(spec), f"hub {spec.source}"


def identify_weights(spec: Backbone, weights: str | os.PathLike) -> str:
    """Return what identifies a student's frozen weights in the key of a cached result.

    That is the commit for a file in the hub's cache (fetched if it is missing), the SHA-256 of any other file, and
    ``"random"``, where the seed is part of the key.
    """
    if weights == "random":
        return weights
    path = _find_published(spec)[0] if weights == "hub" else Path(weights)
    if weights == "hub" and path.parent.parent.name == "snapshots":
        return f"hub {spec.source}@{path.parent.name}/{path.name}"
    return f"sha256 {sha256(path)}"


def find_cached_weights(spec: Backbone) -> Path | None:
    """Return a row's published weights in the hub's cache on this machine, or None."""
    from huggingface_hub import try_to_load_from_cache

    kind, repo, files = _parse_source(spec)
    paths = (try_to_load_from_cache(repo, file, revision=spec.revision, repo_type=kind) for file in files)
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def _parse_source(spec: Backbone) -> tuple[str, str, tuple[str, ...]]:
    """Return the type and name of a row's hub repository, and possible names of its weights file."""
    if spec.source.startswith("datasets/"):
        _, owner, repo, file = spec.source.split("/", 3)
        return "dataset", f"{owner}/{repo}", (file,)
    return "model", spec.source, ("model.safetensors", "pytorch_model.bin")


def _download(spec: Backbone) -> Path:
    if spec.source is None:
        raise ValueError(f"no weights are published for {spec.name}; pass weights='random' or a file")
    if spec.name in PACKAGED_NAMES and BACKBONES[spec.name] == spec and (fetched := find_fetched(spec.name)):
        return fetched
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    kind, repo, files = _parse_source(spec)
    missing = None
    for file in files:
        try:
            return Path(hf_hub_download(repo, file, repo_type=kind, revision=spec.revision))
        except EntryNotFoundError as error:  # not in the repository, or offline and not in the cache
            missing = error
        except (HfHubHTTPError, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, GatedRepoError | RepositoryNotFoundError) or status in (401, 403):
                page = spec.gate or hub_page(f"datasets/{repo}" if kind == "dataset" else repo)
                raise PermissionError(explain_gate(spec.name, page, spec.access)) from error
            raise _make_connection_error(spec, repo, error) from error
    if isinstance(missing, LocalEntryNotFoundError):
        raise _make_connection_error(spec, repo, missing) from missing
    raise FileNotFoundError(f"{repo} on the hub has none of {', '.join(files)}") from missing


def _make_connection_error(spec: Backbone, repo: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"{spec.name} could not be fetched from the hub ({type(error).__name__}); go online, or pass "
        f"weights=FILE with a copy of {repo}"
    )


def _read_weights(meta_model: nn.Module, spec: Backbone, path: Path) -> dict[str, torch.Tensor]:
    """Read a file's tensors, named as in timm's network."""
    if file_kind(path)[0] == "safetensors":  # whatever its suffix
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read as weights ({error}); it is truncated: fetch it again") from None
    else:
        published = partial(is_published, spec.name) if spec.name in read_manifest() else None
        source = f"take the published file ({spec.source}), or " if spec.source else ""
        instead = f"{source}save the model's state_dict() where it was made"
        state = read_torch_file(path, kind="weights", instead=instead, published=published, also=OPTIONS)
    for key in ("state_dict", "model"):  # keys of training scripts
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path}: has a {type(state).__name__}, no tensors by name; save the model's state_dict()")
    if others := [name for name, t in state.items() if not (isinstance(name, str) and isinstance(t, torch.Tensor))]:
        raise ValueError(f"{path}: {str(others[0])[:80]!r} is not a named tensor; save only the model's state_dict()")
    state = timm.models.clean_state_dict(state)
    if spec.name == "ctranspath" and "layers.0.downsample.reduction.weight" in state:  # the authors' layout, not timm's
        from timm.models.swin_transformer import checkpoint_filter_fn

        stem = {k: v for k, v in state.items() if k.startswith("patch_embed.")}
        state = checkpoint_filter_fn({k: v for k, v in state.items() if k not in stem}, meta_model) | stem
    # Classifier heads are dropped, as by timm's num_classes=0.
    return {k: v for k, v in state.items() if not k.startswith(("head.", "fc."))}


def _load(model: nn.Module, state: dict[str, torch.Tensor], spec: Backbone, path: Path) -> None:
    """Copy tensors into a model. On the meta device only names and shapes are compared."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
            model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: these weights do not fit {spec.name} ({spec.arch}). {str(error)[:400]}") from None
