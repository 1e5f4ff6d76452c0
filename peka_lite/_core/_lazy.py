"""Import the values of a mapping when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

DTYPES = ("torch:float32", "torch:float16", "torch:bfloat16")

#: Layers that the options of a backbone's row may name.
LAYER_TYPES = tuple(
    f"{module}:{name}"
    for module, names in {
        "timm.layers": "SwiGLUPacked SwiGLU Mlp GluMlp GatedMlp ConvMlp GlobalResponseNormMlp GELU GELUTanh QuickGELU "
        "Swish Mish HardSwish HardMish PReLU Sigmoid Tanh LayerNorm LayerNormFp32 LayerNorm2d RmsNorm RmsNormFp32 "
        "RmsNorm2d SimpleNorm SimpleNormFp32 GroupNorm GroupNorm1 BatchNormAct2d PatchEmbed Attention AttentionRope "
        "BlurPool2d AvgPool2dSame",
        "torch.nn": "SiLU GELU ReLU ReLU6 LeakyReLU ELU Mish Hardswish Sigmoid Tanh Identity LayerNorm RMSNorm "
        "BatchNorm2d",
        "peka_lite.backbones": "ConvStem",
    }.items()
    for name in names.split()
)

_NAMED = frozenset({*DTYPES, *LAYER_TYPES})


class LazyMapping(Mapping):
    """Map keys to values, and import objects that a value names when it is read.

    Only names in `DTYPES` and `LAYER_TYPES` are imported; other text is returned as it is. Reading keys needs neither
    PyTorch nor timm.
    """

    def __init__(self, values: Mapping[str, object]):
        self._values = dict(values)

    def __getitem__(self, key: str):
        value = self._values[key]
        if not (isinstance(value, str) and value in _NAMED):
            return value
        module, name = value.split(":")
        return getattr(import_module(module), name)

    def __contains__(self, key) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"LazyMapping({self._values})"
