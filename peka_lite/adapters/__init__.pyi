from .adapt import (
    adapt as adapt,
    adapted_share as adapted_share,
    adapter_state as adapter_state,
    lora_rank_like_bone as lora_rank_like_bone,
    merge as merge,
)
from .bone import BoneLinear as BoneLinear
from .files import (
    backbone_fingerprint as backbone_fingerprint,
    load_adapter as load_adapter,
    read_adapter_info as read_adapter_info,
    save_adapter as save_adapter,
)
