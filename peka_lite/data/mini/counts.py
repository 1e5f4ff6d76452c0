"""Draw the genes, expression rates and counts of the mini cohort.

Within each kind of gene, rates are mixture x profile. Every row of a mixture and of a profile sums to 1, so a kind has
the same expected share of the counts at every spot.

The numbers follow four real breast sections (``benchmarks/mini_counts.py``) except for the patterns: those of visible
and invisible genes are stronger, so that a small cohort suffices, and noise genes have none, unlike real ones.
"""

from importlib import resources

import numpy as np
import pandas as pd
from scipy.special import softmax

from peka_lite.data.mini.tissue import DOMAINS, smooth_noise

NICHES = ("interferon", "stress", "cycle", "sterol")
NICHE_BIAS = (1.0, 0.0, -0.5, -0.5)  # some niches are rarer, as some tissue domains are
SHARE = {"visible": 0.32, "invisible": 0.14, "noise": 0.54}  # fraction of a spot's counts
MEDIAN_DEPTH = 3300  # counts per spot


def draw_genes(rng):
    """Draw what is the same in every patient: a table of genes and, by kind, profiles (n_programmes, n_genes)."""
    programme, rows = None, []
    for line in resources.files("peka_lite.data.mini").joinpath("genes.txt").read_text("utf-8").splitlines():
        if line.startswith("#"):
            programme = line[1:].strip()
        else:
            rows += [(symbol, programme) for symbol in line.split()]
    # Sorted, so that the order of the columns does not reveal the kinds.
    var = pd.DataFrame(sorted(rows), columns=["gene", "programme"]).set_index("gene")
    of_domain, of_niche = var.programme.isin(DOMAINS), var.programme.isin(NICHES)
    var.insert(0, "kind", np.select([of_domain, of_niche], ["visible", "invisible"], "noise"))
    var["dispersion"] = 0.08 * np.exp(rng.normal(0, 0.3, len(var)))  # variance = mean + dispersion * mean**2

    base = np.exp(rng.normal(0, 1.1, len(var)))
    base *= var.programme.map({"mitochondrial": 15.0, "ribosomal": 2.5}).fillna(1.0).to_numpy()
    # Fold change of a marker in its programme, from weak to strong.
    contrast = np.exp(rng.uniform(np.log(4), np.log(30), len(var)))
    profiles = {}
    for kind, programmes in (("visible", DOMAINS), ("invisible", NICHES), ("noise", ("all",))):
        where = (var.kind == kind).to_numpy()
        is_marker = np.array(programmes)[:, None] == var.programme.to_numpy()[where]
        profiles[kind] = base[where] * np.where(is_marker, contrast[where], 1.0)  # (n_programmes, n_genes of the kind)
    return var, profiles


def draw_patient_profiles(rng, profiles):
    """Draw a small shift of every gene for one patient, and scale each row of the profiles to sum to 1."""
    shifted = {}
    for kind, profile in profiles.items():
        profile = profile * np.exp(rng.normal(0, 0.2, profile.shape[1]))
        shifted[kind] = profile / profile.sum(1, keepdims=True)
    return shifted


def draw_niches(rng, shape, cell):
    """Draw the hidden mixture that drives the invisible genes, float64 (n_spots, n_niches), rows sum to 1.

    `cell` holds rows and columns of the spots on the domain map. `rng` serves nothing else: niches ignore the tissue.
    """
    fields = np.stack([smooth_noise(rng, shape, 11)[cell] for _ in NICHES], 1)
    return softmax(3.5 * fields + NICHE_BIAS, axis=1)


def draw_depth(rng, shape, cell):
    """Draw each spot's expected counts, float64 (n_spots,), from a smooth field and lognormal noise, not the tissue."""
    scatter = rng.normal(0, 0.2, len(cell[0]))
    return MEDIAN_DEPTH * np.exp(0.5 * smooth_noise(rng, shape, 22)[cell] + scatter)


def draw_counts(rng, var, profiles, mixtures, depth):
    """Draw counts, and return them with their expected values; both float32 (n_spots, n_genes).

    By kind, `profiles` are (n_programmes, n_genes of the kind) and `mixtures` (n_spots, n_programmes); `depth`
    (n_spots,) are the expected counts per spot.
    """
    rate = np.empty((len(depth), len(var)))
    for kind, share in SHARE.items():
        rate[:, var.kind == kind] = share * depth[:, None] * (mixtures[kind] @ profiles[kind])
    dispersion = var["dispersion"].to_numpy()
    # Poisson counts with gamma-distributed rates are negative binomial.
    counts = rng.poisson(rng.gamma(1 / dispersion, rate * dispersion))
    return counts.astype(np.float32), rate.astype(np.float32)
