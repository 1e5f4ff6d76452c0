"""Generator, folds and probe together: only visible genes of the default mini cohort are predicted."""

import pytest

import peka_lite as pk


@pytest.fixture(scope="module")
def scores():
    """Return the mean PCC of each fold, for visible and invisible genes."""
    data = pk.open_cohort("mini")
    with pytest.warns(UserWarning, match="random weights"):
        student = pk.load_backbone("mini", weights="random")
    features = pk.embed_tiles(student, data.tiles)
    folds = pk.folds(data, by="patient", n_splits=6)
    kind = data.adata.var["kind"].astype(str)
    scores = {}
    for name in ("visible", "invisible"):
        genes = kind.index[kind == name]
        table = pk.cross_validate(features, pk.data.expression_targets(data.adata, genes), folds, genes=genes)
        scores[name] = table.groupby("fold")["pcc"].mean()
    return scores


@pytest.mark.filterwarnings("ignore:.*allow")
def test_invisible_genes_are_not_predicted(scores):
    assert scores["invisible"].abs().max() < 0.05


def test_visible_genes_are_predicted(scores):
    assert scores["visible"].min() > 0
    assert scores["visible"].mean() > 0.2
