"""Train a pathology foundation model to predict gene expression from H&E (PEKA, arXiv:2504.07061).

One package per step of the paper, in its order: `data`, `teachers`, `backbones`, `adapters`, `transfer`, `probe`,
`evaluation`, `maps`; `experiments` runs them all, `reports` compares runs. The most used functions are here too.
"""

import os
from typing import TYPE_CHECKING

import lazy_loader

# Waiting OpenMP threads should sleep, not spin: on shared cores training then takes less than half the time. PyTorch
# reads this when it is loaded, which happens later. Settings of the user are not changed.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

__version__ = "0.2.0"

if TYPE_CHECKING:  # for editors and type checkers; `lazy_loader` imports the same names on first use
    from .adapters import adapt as adapt, merge as merge
    from .backbones import embed_tiles as embed_tiles, load_backbone as load_backbone
    from .data import fetch as fetch, open_cohort as open_cohort, read_cohort as read_cohort
    from .evaluation import evaluate as evaluate, folds as folds
    from .experiments import (
        RunConfig as RunConfig,
        load_or_run as load_or_run,
        load_run as load_run,
        load_trained as load_trained,
        predict_from as predict_from,
        run as run,
        train as train,
    )
    from .maps import expression_map as expression_map, slide_viewer as slide_viewer
    from .probe import cross_validate as cross_validate
    from .reports import write_report as write_report
    from .teachers import PseudoLabeler as PseudoLabeler, embed_cohort as embed_cohort, load_teacher as load_teacher
    from .transfer import fit as fit

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    ["adapters", "backbones", "data", "evaluation", "experiments", "maps", "probe", "reports", "teachers", "transfer"],
    {
        "adapters": ["adapt", "merge"],
        "backbones": ["embed_tiles", "load_backbone"],
        "data": ["fetch", "open_cohort", "read_cohort"],
        "evaluation": ["evaluate", "folds"],
        "experiments": ["RunConfig", "load_or_run", "load_run", "load_trained", "predict_from", "run", "train"],
        "maps": ["expression_map", "slide_viewer"],
        "probe": ["cross_validate"],
        "reports": ["write_report"],
        "teachers": ["PseudoLabeler", "embed_cohort", "load_teacher"],
        "transfer": ["fit"],
    },
)
