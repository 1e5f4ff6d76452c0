"""Students: pathology image models by name, from weights to features."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm.auto import tqdm

from peka_lite._file_kinds import file_kind
from peka_lite._packaged import origin, packaged
from peka_lite._torch_files import OPTIONS, read_torch_file
from peka_lite.backbone_files import backbone_row
from peka_lite.batches import Batches
from peka_lite.devices import compute_dtype, default_device
from peka_lite.manifest import located, read_manifest
from peka_lite.registry import BACKBONES, IMAGENET, Backbone, Late, closed_gate, page_of

__all__ = [
    "BACKBONES", "IMAGENET", "Backbone", "ConvStem", "build", "embed_tiles", "load_backbone", "pooled", "precision_for",
    "preprocess",
]  # fmt: skip


class ConvStem(nn.Module):
    """Convolutional patch embedding of CTransPath (Wang et al. 2022, doi:10.1016/j.media.2022.102559).

    Two 3x3 convolutions of stride 2 and a 1x1 convolution in place of Swin's 4x4 patch projection;
    (B, 3, H, W) to (B, H/4, W/4, embed_dim).
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
    """Load a student as a plain timm model in eval mode, its registry row at ``model.spec``.

    Parameters
    ----------
    name
        A key of `BACKBONES`, a `Backbone` row of your own, or a YAML file of one (`read_backbone`).
    weights
        ``"hub"``: the published weights, those inside the package for ``"mini"``, those that `fetch` put in the
        cache, or else the hub's; a path: a local ``.bin``, ``.pth`` or ``.safetensors`` file of them;
        ``"random"``: a random start from `seed`, for tests and teaching, with a warning that says so.
    device
        Where the model goes; None keeps it on the CPU.

    Returns
    -------
    torch.nn.Module
        Float32 weights, whatever the file holds. ``model.weights_origin`` records which of the three it was and, for
        a file of the package, the first digits of its SHA-256.

    Raises
    ------
    ValueError
        For an unknown name, a row without published weights, or a file that does not fit the architecture.
    PermissionError
        For gated weights without access; the message names the page to ask on.
    ConnectionError
        For a hub that cannot be reached.
    FileNotFoundError
        For a file that is not there, one's own or the package's, or a hub repository that holds no weights file.

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
    spec = backbone_row(name)
    weights = str(weights)
    if weights == "random":
        warnings.warn(
            f"{spec.name} starts from random weights (seed {seed}): a model to test with, not to judge by", stacklevel=2
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: weights start there
            model = build(spec)
        came = f"random, seed {seed}"
    else:
        path, came = _published(spec) if weights == "hub" else (Path(weights), f"file {Path(weights).name}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such weights file for {spec.name}; give a file, 'hub' or 'random'")
        model = build(spec)
        _load_file(model, spec, path)
    model.spec, model.weights_origin = spec, came
    return model.eval().to(device or "cpu")


def precision_for(spec: Backbone, device: str | torch.device) -> torch.dtype:
    """Return the compute type of a student on a device, from its registry row."""
    return compute_dtype(device, precision=spec.precision)


def preprocess(tiles: torch.Tensor, spec: Backbone) -> torch.Tensor:
    """Turn uint8 tiles (B, H, W, 3) into normalised float32 (B, 3, input_size, input_size) on their device."""
    x = tiles.permute(0, 3, 1, 2).float().div_(255)
    if x.shape[-1] != spec.input_size or x.shape[-2] != spec.input_size:
        x = F.interpolate(x, (spec.input_size, spec.input_size), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    return (x - mean) / std


def pooled(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return a student's pooled output (B, D_s) for normalised images (B, 3, H, W)."""
    if model.spec.pooling != "token+avg":
        return model(x)
    tokens = model.forward_features(x)  # (B, prefix + patches, width)
    return torch.cat([tokens[:, 0], tokens[:, model.num_prefix_tokens :].mean(1)], dim=-1)


@torch.inference_mode()
def embed_tiles(
    model: nn.Module, tiles, *, batch_size: int = 64, device: str | None = None, progress: bool = False
) -> np.ndarray:
    """Embed tiles with a student, in the tiles' order.

    Parameters
    ----------
    model
        From `load_backbone`, adapted or merged.
    tiles
        Anything that slices to uint8 (n, H, W, 3): a `TileStore`, an array, a memory map.
    batch_size
        Tiles at once.
    device
        None: the GPU where there is one. The model is moved there.

    Returns
    -------
    numpy.ndarray
        (N, D_s) float32.

    Examples
    --------
    >>> import peka_lite as pk
    >>> tiles = pk.open_cohort("mini", slides=["MINI1"]).tiles
    >>> pk.embed_tiles(pk.load_backbone("mini"), tiles[:8]).shape
    (8, 192)
    """
    device = torch.device(device or default_device())
    model.eval().to(device)
    dtype, n = precision_for(model.spec, device), len(tiles)
    out = np.empty((n, model.spec.dim), dtype=np.float32)
    rows = [slice(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
    batches = tqdm(Batches(tiles, rows, device=device), desc="embed tiles", disable=not progress, leave=False)
    done = None  # fetched one batch late, so that the GPU has the next to work on meanwhile
    for at, batch in zip(rows, batches, strict=True):
        try:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                features = pooled(model, preprocess(batch, model.spec)).float()
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"{device} ran out of memory embedding {len(batch)} tiles of {model.spec.name} at once; "
                f"--batch-size {max(1, batch_size // 2)} of `embed` and `predict` (batch_size=) takes about half"
            ) from error
        if done is not None:
            out[done[0]] = done[1].cpu().numpy()
        done = at, features
    if done is not None:
        out[done[0]] = done[1].cpu().numpy()
    return out


def build(spec: Backbone) -> nn.Module:
    """Build a student's architecture with timm's random start and no classifier; ValueError where it does not fit."""
    try:
        model = timm.create_model(spec.arch, pretrained=False, num_classes=0, **Late(spec.options))
    except (RuntimeError, TypeError) as error:  # no such architecture, or an option that it does not take
        raise ValueError(f"backbone {spec.name!r}: timm cannot build {spec.arch!r} ({error})") from None
    width = model.num_features * (2 if spec.pooling == "token+avg" else 1)
    if width != spec.dim:
        raise ValueError(f"backbone {spec.name!r}: {spec.arch} gives {width} features, its row says dim {spec.dim}")
    return model


def _published(spec: Backbone) -> tuple[Path, str]:
    """Return the file of a row's published weights, and where it comes from in words."""
    if (path := packaged(spec)) is not None:
        return path, origin(path)
    return _from_hub(spec), f"hub {spec.source}"


def _from_hub(spec: Backbone) -> Path:
    if spec.source is None:
        raise ValueError(f"no weights are published for {spec.name}; pass weights='random' or a file")
    if BACKBONES.get(spec.name) == spec and (fetched := located(spec.name)):
        return fetched
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if spec.source.startswith("datasets/"):
        _, owner, repo, file = spec.source.split("/", 3)
        kind, repo, files = "dataset", f"{owner}/{repo}", (file,)
    else:
        kind, repo, files = "model", spec.source, ("model.safetensors", "pytorch_model.bin")
    missing = None
    for file in files:
        try:
            return Path(hf_hub_download(repo, file, repo_type=kind, revision=spec.revision))
        except EntryNotFoundError as error:  # not in the repository; or offline, and not in the cache
            missing = error
        except (HfHubHTTPError, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, GatedRepoError | RepositoryNotFoundError) or status in (401, 403):
                page = spec.gate or page_of(f"datasets/{repo}" if kind == "dataset" else repo)
                raise PermissionError(closed_gate(spec.name, page, spec.access)) from error
            raise _unreachable(spec, repo, error) from error
    if isinstance(missing, LocalEntryNotFoundError):
        raise _unreachable(spec, repo, missing) from missing
    raise FileNotFoundError(f"{repo} on the hub holds none of {', '.join(files)}") from missing


def _unreachable(spec: Backbone, repo: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"{spec.name} could not be fetched from the hub ({type(error).__name__}); go online, or pass "
        f"weights=FILE with a copy of {repo}"
    )


def _read_weights(spec: Backbone, path: Path) -> dict[str, torch.Tensor]:
    if file_kind(path)[0] == "safetensors":  # whatever its name ends in
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read as weights ({error}); it is truncated: fetch it again") from None
    else:
        known = spec.name if spec.name in read_manifest() else None
        published = f"take the published file ({spec.source}), or " if spec.source else ""
        instead = f"{published}save the model's state_dict() where it was made"
        state = read_torch_file(path, what="weights", instead=instead, artifact=known, also=OPTIONS)
    for key in ("state_dict", "model"):  # of training scripts
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, no tensors by name; save the model's state_dict()")
    return timm.models.clean_state_dict(state)


def _load_file(model: nn.Module, spec: Backbone, path: Path) -> None:
    state = _read_weights(spec, path)
    if spec.name == "ctranspath":
        from timm.models.swin_transformer import checkpoint_filter_fn

        stem = {k: v for k, v in state.items() if k.startswith("patch_embed.")}
        state = checkpoint_filter_fn({k: v for k, v in state.items() if k not in stem}, model) | stem
    # Classifier heads are not used, here as in timm's num_classes=0.
    state = {k: v for k, v in state.items() if not k.startswith(("head.", "fc."))}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path}: these weights do not fit {spec.name} ({spec.arch}). {str(error)[:400]}") from None
