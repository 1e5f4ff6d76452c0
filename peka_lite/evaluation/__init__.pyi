from .ceiling import ceiling_of as ceiling_of, estimated_ceiling as estimated_ceiling, noise_ceiling as noise_ceiling
from .controls import colour_texture as colour_texture, coordinates as coordinates, depth as depth
from .evaluate import evaluate as evaluate, row_ids as row_ids
from .folds import folds as folds
from .leaks import LeakError as LeakError
from .protocols import ALPHAS as ALPHAS, PROTOCOLS as PROTOCOLS, Protocol as Protocol
from .scores import (
    by_slide as by_slide,
    difference as difference,
    interval as interval,
    pooled as pooled,
    summarize as summarize,
)
