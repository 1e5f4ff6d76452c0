from .custom import read_backbone as read_backbone, register_backbone as register_backbone
from .embed import default_device as default_device, embed_tiles as embed_tiles
from .load import (
    ConvStem as ConvStem,
    build_network as build_network,
    compute_dtype as compute_dtype,
    extract_features as extract_features,
    load_backbone as load_backbone,
    preprocess as preprocess,
)
from .registry import BACKBONES as BACKBONES, Backbone as Backbone
