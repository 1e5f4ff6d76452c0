"""Generator, folds and probe together: only visible genes of the default mini cohort are predicted."""

import pytest

import peka_lite as pk


@pytest.fixture(scope="module")
def intervals():
    data = pk.open_cohort("mini")
    with pytest.warns(UserWarning, match="random weights"):
        student = pk.load_backbone("mini", weights="random")
    features = pk.embed_tiles(student, data.tiles)
    folds = pk.folds(data, by="patient", n_splits=6)
    kind = data.adata.var["kind"].astype(str)
    summaries = {}
    for name in ("visible", "invisible"):
        genes = kind.index[kind == name]
        table = pk.cross_validate(features, pk.data.expression_targets(data.adata, genes), folds, genes=genes)
        summaries[name] = pk.evaluation.summarize(table)
    return summaries


@pytest.mark.filterwarnings("ignore:.*allow")
def test_invisible_genes_are_not_predicted(intervals):
    assert intervals["invisible"]["ci_low"] < 0 < intervals["invisible"]["ci_high"]


def test_visible_genes_are_predicted(intervals):
    assert intervals["visible"]["ci_low"] > 0
    assert intervals["visible"]["mean_pcc"] > 0.2
