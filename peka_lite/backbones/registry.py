"""Registry of pathology image models, as plain data that imports without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from peka_lite._core._lazy import LazyMapping
from peka_lite._core.device import PRECISION

if TYPE_CHECKING:
    import torch


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BIOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))


@dataclass(frozen=True)
class Backbone:
    """Settings to load a student and to preprocess its tiles.

    Attributes
    ----------
    name, arch
        Name in this package, and the timm architecture, which is built with `options`.
    source
        Hub repository of the published weights, ``"datasets/..."`` for a file in a dataset repository,
        ``"package/FILE"`` for a file in ``peka_lite/backbones/weights``; None if there are none.
    revision
        Hub revision. None: the default branch.
    dim
        Width D_s of the pooled output.
    mean, std
        Pixel statistics (RGB, 0 to 1) used in pretraining.
    input_size
        Side in pixels. Tiles of another size are resized on the device.
    pooling
        ``"token"``: the class token. ``"avg"``: the mean of the patch tokens, or of the feature map if the network has
        no tokens. ``"token+avg"``: both, concatenated. ``"network"``: the output of timm's network.
    bone_r
        Default block size for Bone. None: only method ``"none"`` is accepted.
    precision
        Compute type per device.
    license, gate
        License of the weights; page to request access, None if access is open.
    access
        How access is granted: ``"automatic"``, ``"manual"`` or ``"institution"``; None if unknown.

    Notes
    -----
    Differences to published results: the authors of ``"gigapath"`` resize a tile to 256 pixels and crop the center 224,
    while this package uses the whole tile. HEST-bench uses ``"resnet50"`` up to its third block (1,024 features), this
    package the whole network (2,048). ``"ctranspath"`` is the encoder published with CHIEF (AGPL-3.0; its README and
    that of CTransPath add: for non-commercial academic purposes).

    Examples
    --------
    >>> import peka_lite as pk
    >>> uni = pk.backbones.BACKBONES["uni"]
    >>> uni.dim, uni.pooling, uni.bone_r, uni.license
    (1024, 'token', 256, 'CC-BY-NC-ND-4.0')
    >>> names = "resnet50", "uni", "mini"
    >>> [name for name in names if pk.backbones.BACKBONES[name].gate is None]  # no access request needed
    ['resnet50', 'mini']
    """

    name: str
    arch: str
    source: str | None
    dim: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    license: str
    gate: str | None = None
    revision: str | None = None
    input_size: int = 224
    pooling: str = "network"
    bone_r: int | None = 256
    precision: Mapping[str, torch.dtype] = field(default_factory=lambda: PRECISION)
    options: Mapping[str, object] = field(default_factory=dict)
    access: str | None = None


_VIT_G = {"img_size": 224, "init_values": 1e-5}
_SWIGLU = {"mlp_layer": "timm.layers:SwiGLUPacked", "act_layer": "torch.nn:SiLU"}
_CC_NC = "CC-BY-NC-ND-4.0"
_CTRANSPATH = "datasets/MahmoodLab/hest-bench/fm_v1/ctranspath/CHIEF_CTransPath.pth"


def hub_page(repo: str) -> str:
    """Return the URL of a hub repository."""
    return f"https://huggingface.co/{repo}"


_ROWS = (
    Backbone("resnet50", "resnet50.tv_in1k", "timm/resnet50.tv_in1k", 2048, *IMAGENET, "BSD-3-Clause",
             pooling="avg", bone_r=None),
    Backbone("ctranspath", "swin_tiny_patch4_window7_224", _CTRANSPATH, 768, *IMAGENET, "AGPL-3.0",
             pooling="avg", bone_r=None, options=LazyMapping({"embed_layer": "peka_lite.backbones:ConvStem"})),
    Backbone("uni", "vit_large_patch16_224", "MahmoodLab/UNI", 1024, *IMAGENET, _CC_NC, hub_page("MahmoodLab/UNI"),
             access="institution", pooling="token", options={"init_values": 1e-5, "dynamic_img_size": True}),
    Backbone("h-optimus-0", "vit_giant_patch14_reg4_dinov2", "bioptimus/H-optimus-0", 1536, *BIOPTIMUS, "Apache-2.0",
             hub_page("bioptimus/H-optimus-0"), access="automatic", pooling="token", options=_VIT_G),
    Backbone("uni2-h", "vit_giant_patch14_224", "MahmoodLab/UNI2-h", 1536, *IMAGENET, _CC_NC,
             hub_page("MahmoodLab/UNI2-h"), access="institution", pooling="token",
             options=LazyMapping({**_VIT_G, **_SWIGLU, "depth": 24, "num_heads": 24, "embed_dim": 1536,
                           "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8,
                           "dynamic_img_size": True})),
    Backbone("h0-mini", "vit_base_patch14_reg4_dinov2", "bioptimus/H0-mini", 768, *BIOPTIMUS, _CC_NC,
             hub_page("bioptimus/H0-mini"), access="manual", pooling="token", bone_r=128,
             options=LazyMapping({**_VIT_G, **_SWIGLU, "mlp_ratio": 2.66667 * 2, "global_pool": "token"})),
    Backbone("h-optimus-1", "vit_giant_patch14_reg4_dinov2", "bioptimus/H-optimus-1", 1536, *BIOPTIMUS, _CC_NC,
             hub_page("bioptimus/H-optimus-1"), access="manual", pooling="token", options=_VIT_G),
    Backbone("virchow2", "vit_huge_patch14_224", "paige-ai/Virchow2", 2560, *IMAGENET, _CC_NC,
             hub_page("paige-ai/Virchow2"), pooling="token+avg",
             options=LazyMapping({**_VIT_G, **_SWIGLU, "reg_tokens": 4, "mlp_ratio": 5.3375,
                           "dynamic_img_size": True})),
    Backbone("gigapath", "vit_giant_patch14_dinov2", "prov-gigapath/prov-gigapath", 1536, *IMAGENET, "Apache-2.0",
             hub_page("prov-gigapath/prov-gigapath"), access="manual", pooling="token",
             options={**_VIT_G, "patch_size": 16, "mlp_ratio": 5.33334}),
    Backbone("mini", "vit_tiny_patch16_224", "package/mini_student.safetensors", 192, *BIOPTIMUS, "BSD-3-Clause",
             input_size=112, pooling="avg", bone_r=32, options={"img_size": 112, "depth": 6, "global_pool": "avg"}),
)  # fmt: skip
_BACKBONES = {row.name: row for row in _ROWS}  # `register_backbone` adds to it
#: Registered students, name -> `Backbone`. `register_backbone` adds one.
BACKBONES: Mapping[str, Backbone] = MappingProxyType(_BACKBONES)


def check_block_size(spec: Backbone, r: int) -> None:
    """Check Bone's block size for a registry row, without building the network."""
    width = spec.dim // 2 if spec.pooling == "token+avg" else spec.dim  # of a token
    check_divides(r, width, 3 * width)


def check_divides(r: int, in_features: int, out_features: int) -> None:
    """Check that a block size divides both dimensions of a layer. The ValueError lists valid sizes."""
    if r < 1 or in_features % r or out_features % r:
        fits = [d for d in range(1, 1025) if math.gcd(in_features, out_features) % d == 0]
        raise ValueError(
            f"r={r} must divide in_features={in_features} and out_features={out_features}; "
            f"these would: {', '.join(map(str, fits))}"
        )
