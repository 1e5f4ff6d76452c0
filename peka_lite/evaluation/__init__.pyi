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
from .evaluate import Evaluation as Evaluation, evaluate as evaluate
from .folds import folds as folds
from .leaks import FittedFeatures as FittedFeatures, LeakError as LeakError, row_ids as row_ids
from .protocols import ALPHAS as ALPHAS, PROTOCOLS as PROTOCOLS, Protocol as Protocol
from .scores import (
    bootstrap_difference as bootstrap_difference,
    bootstrap_interval as bootstrap_interval,
    mean_scores as mean_scores,
    pool_scores as pool_scores,
    scores_by_slide as scores_by_slide,
)
