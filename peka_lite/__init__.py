"""peka_lite: teach a pathology foundation model to predict gene expression from H&E.

The rooms, in the order data walks through them: `hest`, `expression`, `splits`, `teachers`, `pseudolabels`,
`backbones`, `adapters`, `transfer`, `sums`, `probe`, `evaluation`, `maps`; `run` is one experiment from start to end,
`train` its first half, `predict` what it is good for, `sweep` many runs from one file.
"""

import os
from importlib import import_module

# Threads of OpenMP that wait for work should sleep, not spin: on shared cores training then takes less than half the
# time. It is read when PyTorch is loaded, which happens after this line, and not where the user has decided.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

__version__ = "0.1.0"

# Public name -> the room it lives in. Rooms are imported on first use, so that `import peka_lite` stays light.
_ROOMS = {
    "hest": ("Cohort", "HestFormatError", "Slide", "read_cohort", "read_slide"),
    "tiles": ("TileStore",),
    "mini": ("write_mini_cohort",),
    "_mini_genes": ("noise_ceiling",),
    "expression": ("align_genes", "normalize", "qc", "targets", "top_hvg"),
    "splits": ("folds",),
    "own_slides": ("add_slide", "spot_distance"),
    "space_ranger": ("read_counts",),
    "manifest": ("fetch", "located", "read_manifest"),
    "cohorts": ("cohort_root", "open_cohort"),
    "teachers": ("embed_cohort", "load_teacher"),
    "teachers.scfoundation": ("ScFoundation",),
    "teachers.tokens": ("tokenize",),
    "pseudolabels": ("PseudoLabeler",),
    "registry": ("BACKBONES", "Backbone"),
    "backbone_files": ("read_backbone", "register_backbone"),
    "backbones": ("embed_tiles", "load_backbone"),
    "devices": ("compute_dtype", "default_device"),
    "adapters": ("BoneLinear", "adapt", "adapted_share", "merge"),
    "adapter_files": ("backbone_fingerprint", "load_adapter", "read_adapter_info", "save_adapter"),
    "probe_files": ("load_probes", "save_probes"),
    "costs": ("Cost", "student_cost"),
    "transfer": ("TransferModel", "fit", "transfer_loss"),
    "scores": ("difference", "interval", "pearson", "pooled", "summarize"),
    "probe": ("PCARidge", "cross_validate"),
    "provenance": ("LeakError", "row_ids"),
    "protocols": ("PROTOCOLS", "Protocol"),
    "ceiling": ("ceiling_of", "estimated_ceiling"),
    "students": ("Student",),
    "evaluation": ("evaluate",),
    "style": ("use_style",),
    "maps": ("expression_map", "gene_bars", "local_pcc", "pcc_map", "predicted_map"),
    "viewer": ("slide_viewer",),
    "config": ("RunConfig", "check_field"),
    "results": ("fingerprint",),
    "run": ("load_or_run", "load_run", "run_name"),
    "teaching": ("train",),
    "trained": ("TrainedModel", "load_trained"),
    "features": ("write_features",),
    "wsi": ("SlideError", "WholeSlide", "open_slide"),
    "tissue": ("find_tissue", "tissue_tiles"),
    "predict": ("predict_slide", "predict_spots"),
    "applied": ("predict_from",),
    "sharing": ("export",),
    "report_runs": ("label", "read_runs"),
    "report_tables": ("difference_table", "leak_table", "protocol_table"),
    "paper_tables": ("comparability", "published", "table1", "table2"),
    "report": ("write_report",),
    "report_figures": ("figure2", "leak_figure"),
    "report_points": ("metrics_table", "points_table"),
    "report_settings": ("by_settings", "over_seeds", "sd_over_seeds", "seed_scores"),
    "report_sweeps": ("SweepFolder", "read_sweep_folder"),
    "report_effects": ("effects_table",),
    "report_sweep_figures": ("effects_figure", "sweep_figure"),
    "sweep": ("Point", "Sweep", "read_sweep", "ready_sweeps"),
    "sweep_points": ("plan", "sweep_states"),
    "sweep_run": ("run_sweep",),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name in _HOME:
        return getattr(import_module(f"peka_lite.{_HOME[name]}"), name)
    if name in _ROOMS:
        return import_module(f"peka_lite.{name}")
    raise AttributeError(f"module 'peka_lite' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOME, *_ROOMS})
