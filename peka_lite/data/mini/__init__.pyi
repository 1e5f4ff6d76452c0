from .cohort import write_mini_cohort as write_mini_cohort
from .counts import (
    draw_counts as draw_counts,
    draw_depth as draw_depth,
    draw_genes as draw_genes,
    draw_niches as draw_niches,
    draw_patient_profiles as draw_patient_profiles,
)
from .tiles import draw_section as draw_section, draw_stain as draw_stain
from .tissue import (
    DOMAINS as DOMAINS,
    STEP as STEP,
    TILE as TILE,
    draw_domains as draw_domains,
    draw_outline as draw_outline,
    mix_domains as mix_domains,
)
