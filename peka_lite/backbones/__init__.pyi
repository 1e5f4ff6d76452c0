from .embed import default_device as default_device, embed_tiles as embed_tiles
from .load import (
    ConvStem as ConvStem,
    build as build,
    compute_dtype as compute_dtype,
    load_backbone as load_backbone,
    pooled as pooled,
    precision_for as precision_for,
    preprocess as preprocess,
)
from .own import read_backbone as read_backbone, register_backbone as register_backbone
from .registry import (
    BACKBONES as BACKBONES,
    Backbone as Backbone,
    check_block_size as check_block_size,
    check_divides as check_divides,
)
