from ._space_ranger import read_counts as read_counts
from .cohorts import cohort_root as cohort_root, hash_cohort as hash_cohort, open_cohort as open_cohort
from .download import fetch as fetch, find_fetched as find_fetched, read_manifest as read_manifest
from .expression import (
    align_genes as align_genes,
    expression_targets as expression_targets,
    normalize as normalize,
    qc as qc,
    top_hvg as top_hvg,
)
from .features import read_features as read_features
from .hest import (
    Cohort as Cohort,
    HestFormatError as HestFormatError,
    Slide as Slide,
    read_cohort as read_cohort,
    read_slide as read_slide,
    tissue_window as tissue_window,
)
from .mini.cohort import write_mini_cohort as write_mini_cohort
from .tiles import TileStore as TileStore
from .tissue import find_tissue as find_tissue, tissue_tiles as tissue_tiles
from .visium import add_slide as add_slide, spot_distance as spot_distance
from .wsi import SlideError as SlideError, WholeSlide as WholeSlide, open_slide as open_slide
