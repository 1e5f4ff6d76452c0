"""Teachers embed each spot on its own, from all genes of its slide, in the order of the rows."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from peka_lite.expression import normalize
from peka_lite.hest import Cohort, Slide
from peka_lite.splits import folds
from peka_lite.teachers import TEACHERS, embed_cohort, load_teacher
from peka_lite.tiles import TileStore

GENES = [f"G{i}" for i in range(40)]


def make_adata(n=60, genes=GENES, seed=0):
    """Spots on a line of changing expression."""
    rng = np.random.default_rng(seed)
    place = rng.random((n, 1))
    rates = np.exp(1 + 2 * place * np.sin(np.arange(len(genes))))
    obs = pd.DataFrame(index=[f"spot{i}" for i in range(n)])
    return ad.AnnData(
        sparse.csr_matrix(rng.poisson(rates), dtype=np.float32), obs=obs, var=pd.DataFrame(index=list(genes))
    )


def small_teacher(**options):
    return load_teacher("pca", **({"n_components": 5, "n_genes": 20} | options))


@pytest.fixture(scope="module")
def fitted():
    return small_teacher().fit(make_adata())


@pytest.fixture(scope="module")
def cohort():
    """Two slides that share 30 genes; each has ten more of its own."""
    slides = (make_adata(30, [*GENES[:30], *"abcdefghij"], 1), make_adata(25, [*"klmnopqrst", *GENES[:30][::-1]], 2))
    return Cohort(
        tuple(
            Slide(f"S{i}", a, TileStore([], np.zeros(a.n_obs), np.arange(a.n_obs)), f"P{i}", {}, {})
            for i, a in enumerate(slides)
        )
    )


def test_an_unknown_teacher_is_refused_beside_those_that_are_known():
    with pytest.raises(ValueError, match=rf"unknown teacher 'nobody'; known: {', '.join(TEACHERS)}"):
        load_teacher("nobody")


def test_options_reach_the_teacher():
    assert repr(small_teacher(seed=3)) == "PCATeacher(n_components=5, n_genes=20, seed=3)"


def test_an_embedding_is_float32_of_the_width_asked_for(fitted):
    E = fitted.embed(make_adata(7, seed=4))
    assert (E.dtype, E.shape) == (np.float32, (7, 5))


def test_an_embedding_is_the_projection_of_normalised_genes(fitted):
    adata = make_adata(9, seed=4)
    X = normalize(adata)[:, adata.var_names.get_indexer(fitted.genes_)].toarray()
    by_hand = (X - fitted.pca_.mean_) @ fitted.pca_.components_.T / fitted.scale_
    np.testing.assert_allclose(fitted.embed(adata), by_hand, atol=1e-5)


def test_training_scores_have_unit_spread(fitted):
    assert fitted.embed(make_adata()).std() == pytest.approx(1, abs=1e-5)


def test_distances_keep_the_proportions_of_the_components(fitted):
    spread = fitted.embed(make_adata()).std(axis=0)
    np.testing.assert_allclose(
        spread / spread[0],
        np.sqrt(fitted.pca_.explained_variance_ratio_ / fitted.pca_.explained_variance_ratio_[0]),
        rtol=1e-4,
    )


@given(rows=st.permutations(range(20)))
@settings(max_examples=10, deadline=None)
def test_row_i_is_spot_i(fitted, rows):
    adata = make_adata(20, seed=5)
    np.testing.assert_allclose(fitted.embed(adata[rows]), fitted.embed(adata)[rows], atol=1e-6)


@given(batch=st.integers(1, 30))
@settings(max_examples=10, deadline=None)
def test_batches_do_not_change_the_embedding(fitted, batch):
    adata = make_adata(23, seed=5)
    np.testing.assert_allclose(fitted.embed(adata, batch_size=batch), fitted.embed(adata), atol=1e-6)


def test_the_order_of_genes_does_not_matter(fitted):
    adata = make_adata(20, seed=5)
    np.testing.assert_allclose(fitted.embed(adata[:, GENES[::-1]]), fitted.embed(adata), atol=1e-5)


def test_embedding_leaves_the_counts_alone(fitted):
    adata = make_adata(10, seed=5)
    before = adata.X.toarray()
    fitted.embed(adata)
    np.testing.assert_array_equal(adata.X.toarray(), before)


def test_a_cohort_is_embedded_slide_by_slide_in_row_order(cohort):
    teacher = small_teacher().fit(cohort.by_slide(np.arange(len(cohort))))
    E = embed_cohort(teacher, cohort)
    assert E.shape == (55, 5)
    for slide in cohort.slides:
        np.testing.assert_array_equal(E[cohort.rows_of(slide.id)], teacher.embed(slide.adata))
    np.testing.assert_allclose(embed_cohort(teacher, cohort, batch_size=7), E, atol=1e-6)


def test_each_slide_is_normalised_over_all_its_own_genes(cohort):
    teacher = small_teacher().fit(cohort.by_slide(np.arange(len(cohort))))
    own = cohort.slides[0].adata
    shared = own[:, cohort.genes].copy()
    assert set(teacher.genes_) <= set(cohort.genes)
    assert np.abs(teacher.embed(own) - teacher.embed(shared)).max() > 0.01


def test_fitting_one_slide_in_a_list_is_fitting_it(fitted):
    np.testing.assert_array_equal(small_teacher().fit([make_adata()]).embed(make_adata()), fitted.embed(make_adata()))


def test_training_mean_comes_from_each_slides_own_genes(cohort):
    slides = cohort.by_slide(np.arange(len(cohort)))
    teacher = small_teacher().fit(slides)
    normal = [normalize(a)[:, a.var_names.get_indexer(teacher.genes_)].toarray() for a in slides]
    np.testing.assert_allclose(teacher.pca_.mean_, np.concatenate(normal).mean(0), rtol=1e-5)


def test_held_out_rows_have_no_say(mini_cohort):
    train, test = folds(mini_cohort, "spot", 3)[0]
    changed = tuple(s.select(np.arange(s.n_spots), reason="") for s in mini_cohort.slides)
    changed = Cohort(changed)
    for slide in changed.slides:
        held_out = np.isin(changed.rows_of(slide.id), test)
        X = slide.adata.X.toarray()
        X[held_out] = np.random.default_rng(0).permuted(X[held_out], axis=1)
        slide.adata.X = sparse.csr_matrix(X)
    one, other = (small_teacher().fit(c.by_slide(train)) for c in (mini_cohort, changed))
    assert one.genes_.tolist() == other.genes_.tolist()
    a, b = embed_cohort(one, mini_cohort), embed_cohort(other, changed)
    np.testing.assert_array_equal(a[train], b[train])
    assert not np.allclose(a[test], b[test])


def test_the_same_data_and_seed_give_the_same_embedding(fitted):
    np.testing.assert_array_equal(small_teacher().fit(make_adata()).embed(make_adata()), fitted.embed(make_adata()))


def test_the_first_component_finds_a_planted_gradient():
    rng = np.random.default_rng(0)
    place = np.linspace(0, 1, 80)
    rates = np.full((80, 40), 20.0)
    rates[:, :10] *= np.exp(2 * place)[:, None]
    rates[:, 10:20] *= np.exp(-2 * place)[:, None]
    adata = make_adata(80)
    adata.X = sparse.csr_matrix(rng.poisson(rates), dtype=np.float32)
    E = small_teacher().fit(adata).embed(adata)
    assert abs(np.corrcoef(E[:, 0], place)[0, 1]) > 0.95


def test_a_missing_gene_counts_as_its_training_mean(fitted):
    adata = make_adata(12, seed=6)
    missing = fitted.genes_[:4]
    without = adata[:, ~adata.var_names.isin(missing)].copy()
    X = normalize(without)
    by_hand = np.tile(fitted.pca_.mean_, (12, 1))
    for j, gene in enumerate(fitted.genes_):
        if gene not in missing:
            by_hand[:, j] = X[:, without.var_names.get_loc(gene)].toarray().ravel()
    by_hand = (by_hand - fitted.pca_.mean_) @ fitted.pca_.components_.T / fitted.scale_
    np.testing.assert_allclose(fitted.embed(without), by_hand, atol=1e-5)


def test_fewer_than_half_of_the_genes_is_an_error(fitted):
    enough, too_few = fitted.genes_[:10], fitted.genes_[:9]
    assert fitted.embed(make_adata(5)[:, enough]).shape == (5, 5)
    with pytest.raises(ValueError, match=r"only 45% of the teacher's 20 genes.*at least half"):
        fitted.embed(make_adata(5)[:, too_few])


@pytest.mark.parametrize(("n", "options", "width"), [(4, {}, 3), (60, {"n_components": 45, "n_genes": 60}, 40)])
def test_a_capped_width_warns(n, options, width):
    with pytest.warns(UserWarning, match=rf"{n} spots x \d+ genes allow {width} components"):
        teacher = small_teacher(**options).fit(make_adata(n))
    assert teacher.embed(make_adata(8)).shape == (8, width)


def test_an_unfitted_teacher_is_refused():
    with pytest.raises(RuntimeError, match=r"not fitted; call fit"):
        small_teacher().embed(make_adata())


@pytest.mark.parametrize("options", [{"n_components": 1}, {"n_components": 30, "n_genes": 20}])
def test_impossible_widths_are_refused(options):
    with pytest.raises(ValueError, match="n_genes >= n_components >= 2"):
        small_teacher(**options)
