from .ceiling import (
    estimate_ceiling as estimate_ceiling,
    expression_ceiling as expression_ceiling,
    noise_ceiling as noise_ceiling,
)
from .controls import (
    color_features as color_features,
    coordinate_features as coordinate_features,
    depth_features as depth_features,
)
from .evaluate import evaluate as evaluate, row_ids as row_ids
from .folds import folds as folds
from .leaks import LeakError as LeakError
from .protocols import ALPHAS as ALPHAS, PROTOCOLS as PROTOCOLS, Protocol as Protocol
from .scores import (
    bootstrap_difference as bootstrap_difference,
    bootstrap_interval as bootstrap_interval,
    pcc_by_slide as pcc_by_slide,
    pool_pcc as pool_pcc,
    summarize as summarize,
)
