from ._effects import effects_table as effects_table
from ._settings import (
    average_seeds as average_seeds,
    seed_scores as seed_scores,
    seed_sd as seed_sd,
    split_by_settings as split_by_settings,
)
from ._sweep_figures import effects_figure as effects_figure, sweep_figure as sweep_figure
from .figures import figure2 as figure2, leak_figure as leak_figure
from .page import write_report as write_report
from .paper_tables import (
    describe_comparability as describe_comparability,
    read_published as read_published,
    table1 as table1,
    table2 as table2,
)
from .points import metrics_table as metrics_table, points_table as points_table
from .runs import read_runs as read_runs, row_label as row_label
from .tables import (
    difference_table as difference_table,
    leak_table as leak_table,
    protocol_table as protocol_table,
    score_table as score_table,
)
