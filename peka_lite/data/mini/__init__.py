"""Synthetic cohort with tissue, tiles and counts drawn from one seed."""
