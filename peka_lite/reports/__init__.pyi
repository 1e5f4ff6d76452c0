from ._effects import effects_table as effects_table
from ._settings import (
    by_settings as by_settings,
    over_seeds as over_seeds,
    sd_over_seeds as sd_over_seeds,
    seed_scores as seed_scores,
)
from ._sweep_figures import effects_figure as effects_figure, sweep_figure as sweep_figure
from .figures import figure2 as figure2, leak_figure as leak_figure
from .page import write_report as write_report
from .paper import comparability as comparability, published as published, table1 as table1, table2 as table2
from .points import metrics_table as metrics_table, points_table as points_table
from .runs import label as label, read_runs as read_runs
from .tables import difference_table as difference_table, leak_table as leak_table, protocol_table as protocol_table
