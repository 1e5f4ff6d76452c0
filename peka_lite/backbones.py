"""Students: pathology image models by name, one registry row a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import SwiGLUPacked
from torch import nn
from tqdm.auto import tqdm

from peka_lite.batches import Batches
from peka_lite.devices import PRECISION, compute_dtype, default_device
from peka_lite.manifest import located

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))


@dataclass(frozen=True)
class Backbone:
    """What is needed to load one student and to feed it tiles.

    Attributes
    ----------
    name, arch
        Our name, and the timm architecture it is built from with `options`.
    source
        Hub repository of the published weights; None where there is none.
    revision
        Hub revision; None takes the repository's default branch.
    dim
        Width D_s of the pooled output.
    mean, std
        Pixel statistics (RGB, 0 to 1) the weights were trained with.
    input_size
        Side in pixels; tiles of another size are resized on the device.
    pooling
        ``"token"`` (class token), ``"avg"`` (as timm pools) or ``"token+avg"`` (class token, then mean patch token).
    bone_r
        Default block size for Bone; None where only method ``"none"`` is accepted.
    precision
        Compute type by device.
    licence, gate
        Licence of the weights; page to ask for access, None where nobody has to.
    """

    name: str
    arch: str
    source: str | None
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str
    gate: str | None = None
    revision: str | None = None
    input_size: int = 224
    pooling: str = "token"
    bone_r: int | None = 256
    precision: Mapping[str, torch.dtype] = field(default_factory=lambda: PRECISION)
    options: Mapping[str, object] = field(default_factory=dict)


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


_VIT_G = {"img_size": 224, "init_values": 1e-5}
_SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
_CC_NC = "CC-BY-NC-ND-4.0"
_CTRANSPATH = "datasets/MahmoodLab/hest-bench/fm_v1/ctranspath/CHIEF_CTransPath.pth"


def _page(repo: str) -> str:
    return f"https://huggingface.co/{repo}"


_ROWS = (
    Backbone("resnet50", "resnet50.tv_in1k", "timm/resnet50.tv_in1k", 2048, *IMAGENET, "BSD-3-Clause",
             pooling="avg", bone_r=None),
    Backbone("ctranspath", "swin_tiny_patch4_window7_224", _CTRANSPATH, 768, *IMAGENET, "GPL-3.0",
             pooling="avg", bone_r=None, options={"embed_layer": ConvStem}),
    Backbone("uni", "vit_large_patch16_224", "MahmoodLab/UNI", 1024, *IMAGENET, _CC_NC, _page("MahmoodLab/UNI"),
             options={"init_values": 1e-5, "dynamic_img_size": True}),
    Backbone("h-optimus-0", "vit_giant_patch14_reg4_dinov2", "bioptimus/H-optimus-0", 1536, *BIOPTIMUS, "Apache-2.0",
             _page("bioptimus/H-optimus-0"), options=_VIT_G),
    Backbone("uni2-h", "vit_giant_patch14_224", "MahmoodLab/UNI2-h", 1536, *IMAGENET, _CC_NC,
             _page("MahmoodLab/UNI2-h"),
             options={**_VIT_G, **_SWIGLU, "depth": 24, "num_heads": 24, "embed_dim": 1536, "mlp_ratio": 2.66667 * 2,
                      "no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True}),
    Backbone("h0-mini", "vit_base_patch14_reg4_dinov2", "bioptimus/H0-mini", 768, *BIOPTIMUS, _CC_NC,
             _page("bioptimus/H0-mini"), bone_r=128,
             options={**_VIT_G, **_SWIGLU, "mlp_ratio": 2.66667 * 2, "global_pool": "token"}),
    Backbone("h-optimus-1", "vit_giant_patch14_reg4_dinov2", "bioptimus/H-optimus-1", 1536, *BIOPTIMUS, _CC_NC,
             _page("bioptimus/H-optimus-1"), options=_VIT_G),
    Backbone("virchow2", "vit_huge_patch14_224", "paige-ai/Virchow2", 2560, *IMAGENET, _CC_NC,
             _page("paige-ai/Virchow2"), pooling="token+avg",
             options={**_VIT_G, **_SWIGLU, "reg_tokens": 4, "mlp_ratio": 5.3375, "dynamic_img_size": True}),
    Backbone("gigapath", "vit_giant_patch14_dinov2", "prov-gigapath/prov-gigapath", 1536, *IMAGENET, "Apache-2.0",
             _page("prov-gigapath/prov-gigapath"), options={**_VIT_G, "patch_size": 16, "mlp_ratio": 5.33334}),
    Backbone("mini", "vit_tiny_patch16_224", None, 192, *BIOPTIMUS, "BSD-3-Clause", input_size=112,
             pooling="avg", bone_r=32, options={"img_size": 112, "depth": 6, "global_pool": "avg"}),
)  # fmt: skip
BACKBONES: Mapping[str, Backbone] = MappingProxyType({row.name: row for row in _ROWS})


def load_backbone(
    name: str | Backbone, *, weights: str | os.PathLike = "hub", seed: int = 0, device: str | None = None
) -> nn.Module:
    """Load a student as a plain timm model in eval mode, its registry row at ``model.spec``.

    Parameters
    ----------
    name
        A key of `BACKBONES`, or a `Backbone` row of your own.
    weights
        ``"hub"``: the published weights, those that `fetch` put in the cache or else the hub's; a path: a local
        ``.bin``, ``.pth`` or ``.safetensors`` file of them;
        ``"random"``: a random start from `seed`, for tests and teaching, with a warning that says so.
    device
        Where the model goes; None keeps it on the CPU.

    Returns
    -------
    torch.nn.Module
        ``model.weights_origin`` records which of the three it was.

    Raises
    ------
    ValueError
        For an unknown name, a row without published weights, or a file that does not fit the architecture.
    PermissionError
        For gated weights without access; the message names the page to ask on.
    ConnectionError
        For a hub that cannot be reached.
    FileNotFoundError
        For a local file that is not there, or a hub repository that holds no weights file.
    """
    spec = _row(name)
    weights = str(weights)
    if weights == "random":
        warnings.warn(
            f"{spec.name} starts from random weights (seed {seed}): a model to test with, not to judge by", stacklevel=2
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: weights start there
            model = build(spec)
        origin = f"random, seed {seed}"
    else:
        path = _from_hub(spec) if weights == "hub" else Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such weights file for {spec.name}; give a file, 'hub' or 'random'")
        model = build(spec)
        _load_file(model, spec, path)
        origin = f"hub {spec.source}" if weights == "hub" else f"file {path.name}"
    model.spec, model.weights_origin = spec, origin
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


def _row(name: str | Backbone) -> Backbone:
    if isinstance(name, Backbone):
        return name
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")
    return BACKBONES[name]


def build(spec: Backbone) -> nn.Module:
    """Build a student's architecture with timm's random start and no classifier."""
    return timm.create_model(spec.arch, pretrained=False, num_classes=0, **spec.options)


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
                page = spec.gate or _page(f"datasets/{repo}" if kind == "dataset" else repo)
                raise PermissionError(
                    f"{spec.name} is gated: ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN"
                ) from error
            raise _unreachable(spec, repo, error) from error
    if isinstance(missing, LocalEntryNotFoundError):
        raise _unreachable(spec, repo, missing) from missing
    raise FileNotFoundError(f"{repo} on the hub holds none of {', '.join(files)}") from missing


def _unreachable(spec: Backbone, repo: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"{spec.name} could not be fetched from the hub ({type(error).__name__}); go online, or pass "
        f"weights=FILE with a copy of {repo}"
    )


def _load_file(model: nn.Module, spec: Backbone, path: Path) -> None:
    try:
        state = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as weights ({type(error).__name__}: {error})") from error
    state = state.get("model", state)
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
