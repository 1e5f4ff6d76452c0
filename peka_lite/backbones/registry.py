"""What can be asked for by name, and what decides whether a name or a number fits; plain data, quick to import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from peka_lite._core.device import PRECISION
from peka_lite._core.lazy import LazyMapping

if TYPE_CHECKING:
    import torch


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
        Hub repository of the published weights, ``"datasets/..."`` for a file of a dataset's repository,
        ``"package/FILE"`` for a file in ``peka_lite/backbones/weights``; None where there is none.
    revision
        Hub revision; None takes the repository's default branch.
    dim
        Width D_s of the pooled output.
    mean, std
        Pixel statistics (RGB, 0 to 1) the weights were trained with.
    input_size
        Side in pixels; tiles of another size are resized on the device.
    pooling
        What stands for a tile: ``"token"``, the class token; ``"avg"``, the mean of the patch tokens, or of a network
        without tokens that of its feature map; ``"token+avg"``, both, one behind the other; ``"network"``, what timm's
        network gives by itself.
    bone_r
        Default block size for Bone; None where only method ``"none"`` is accepted.
    precision
        Compute type by device.
    license, gate
        License of the weights; page to ask for access, None where nobody has to.
    access
        How it is granted there: ``"automatic"``, ``"manual"`` or ``"institution"``; None where that is not known.

    Notes
    -----
    Where a published number was made in another way than ours: the authors of ``"gigapath"`` resize a tile to 256
    pixels and crop the middle 224, here all of the tile is shown; HEST-bench takes ``"resnet50"`` after its third block
    (1,024 numbers), here it is whole (2,048). ``"ctranspath"`` is the encoder that CHIEF published (AGPL-3.0; its
    README and CTransPath's add: for non-commercial academic purposes).

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
    """Return a hub repository's page."""
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
             options=LazyMapping({**_VIT_G, **_SWIGLU, "reg_tokens": 4, "mlp_ratio": 5.3375, "dynamic_img_size": True})),
    Backbone("gigapath", "vit_giant_patch14_dinov2", "prov-gigapath/prov-gigapath", 1536, *IMAGENET, "Apache-2.0",
             hub_page("prov-gigapath/prov-gigapath"), access="manual", pooling="token",
             options={**_VIT_G, "patch_size": 16, "mlp_ratio": 5.33334}),
    Backbone("mini", "vit_tiny_patch16_224", "package/mini_student.safetensors", 192, *BIOPTIMUS, "BSD-3-Clause",
             input_size=112, pooling="avg", bone_r=32, options={"img_size": 112, "depth": 6, "global_pool": "avg"}),
)  # fmt: skip
_BACKBONES = {row.name: row for row in _ROWS}  # `register_backbone` adds to it
#: The students that can be asked for by name, name -> `Backbone`; `register_backbone` adds one.
BACKBONES: Mapping[str, Backbone] = MappingProxyType(_BACKBONES)


def check_block_size(spec: Backbone, r: int) -> None:
    """Raise the ValueError that Bone would raise for a row of `BACKBONES`, without building it."""
    width = spec.dim // 2 if spec.pooling == "token+avg" else spec.dim  # of a token
    check_divides(r, width, 3 * width)


def check_divides(r: int, in_features: int, out_features: int) -> None:
    """Refuse a block size that does not divide both sides of a layer; the ValueError lists those that do."""
    if r < 1 or in_features % r or out_features % r:
        fits = [d for d in range(1, 1025) if math.gcd(in_features, out_features) % d == 0]
        raise ValueError(
            f"r={r} must divide in_features={in_features} and out_features={out_features}; "
            f"these would: {', '.join(map(str, fits))}"
        )
