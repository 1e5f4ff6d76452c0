from .cohort import write_mini_cohort as write_mini_cohort
