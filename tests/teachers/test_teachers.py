"""Teachers embed each spot independently, from all genes of its slide, in row order."""

import dataclasses
import json
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import sparse

from peka_lite._core.locks import partial_path
from peka_lite.data.expression import normalize
from peka_lite.data.hest import Cohort, Slide
from peka_lite.data.tiles import TileStore
from peka_lite.evaluation import folds
from peka_lite.teachers import ScFoundation, embed_cohort, load as teachers, load_teacher
from peka_lite.teachers.load import TEACHERS

GENES = [f"G{i}" for i in range(40)]


def make_adata(n=60, genes=GENES, seed=0):
    """Return spots along a gradient of expression."""
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
    """Two slides that share 30 genes, each with ten more genes."""
    slides = (make_adata(30, [*GENES[:30], *"abcdefghij"], 1), make_adata(25, [*"klmnopqrst", *GENES[:30][::-1]], 2))
    return Cohort(
        tuple(
            Slide(f"S{i}", a, TileStore([], np.zeros(a.n_obs), np.arange(a.n_obs)), f"P{i}", {}, {})
            for i, a in enumerate(slides)
        )
    )


def test_unknown_teacher_is_rejected_with_the_known_ones():
    with pytest.raises(ValueError, match=rf"unknown teacher 'unknown'; known: {', '.join(TEACHERS)}"):
        load_teacher("unknown")


def test_options_reach_the_teacher():
    assert repr(small_teacher(seed=3)) == "PCATeacher(n_components=5, n_genes=20, seed=3)"


def test_embedding_is_float32_with_n_components_columns(fitted):
    E = fitted.embed(make_adata(7, seed=4))
    assert (E.dtype, E.shape) == (np.float32, (7, 5))


def test_embedding_is_the_projection_of_normalized_genes(fitted):
    adata = make_adata(9, seed=4)
    X = normalize(adata)[:, adata.var_names.get_indexer(fitted.genes_)].toarray()
    by_hand = (X - fitted.pca_.mean_) @ fitted.pca_.components_.T / fitted.scale_
    np.testing.assert_allclose(fitted.embed(adata), by_hand, atol=1e-5)


def test_training_scores_have_unit_standard_deviation(fitted):
    assert fitted.embed(make_adata()).std() == pytest.approx(1, abs=1e-5)


def test_components_keep_their_relative_variances(fitted):
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


def test_order_of_genes_does_not_matter(fitted):
    adata = make_adata(20, seed=5)
    np.testing.assert_allclose(fitted.embed(adata[:, GENES[::-1]]), fitted.embed(adata), atol=1e-5)


def test_embedding_does_not_change_the_counts(fitted):
    adata = make_adata(10, seed=5)
    before = adata.X.toarray()
    fitted.embed(adata)
    np.testing.assert_array_equal(adata.X.toarray(), before)


def test_cohort_is_embedded_slide_by_slide_in_row_order(cohort):
    teacher = small_teacher().fit(cohort.by_slide(np.arange(len(cohort))))
    E = embed_cohort(teacher, cohort)
    assert E.shape == (55, 5)
    for slide in cohort.slides:
        np.testing.assert_array_equal(E[cohort.rows_of(slide.id)], teacher.embed(slide.adata))
    np.testing.assert_allclose(embed_cohort(teacher, cohort, batch_size=7), E, atol=1e-6)


def test_each_slide_is_normalized_over_all_its_genes(cohort):
    teacher = small_teacher().fit(cohort.by_slide(np.arange(len(cohort))))
    full = cohort.slides[0].adata
    shared = full[:, cohort.genes].copy()
    assert set(teacher.genes_) <= set(cohort.genes)
    assert np.abs(teacher.embed(full) - teacher.embed(shared)).max() > 0.01


def test_list_of_one_slide_fits_like_the_slide(fitted):
    np.testing.assert_array_equal(small_teacher().fit([make_adata()]).embed(make_adata()), fitted.embed(make_adata()))


def test_training_mean_uses_all_genes_of_each_slide(cohort):
    slides = cohort.by_slide(np.arange(len(cohort)))
    teacher = small_teacher().fit(slides)
    normal = [normalize(a)[:, a.var_names.get_indexer(teacher.genes_)].toarray() for a in slides]
    np.testing.assert_allclose(teacher.pca_.mean_, np.concatenate(normal).mean(0), rtol=1e-5)


def test_test_rows_do_not_affect_the_fit(mini_cohort):
    train, test = folds(mini_cohort, "spot", 3)[0]
    changed = tuple(s.select(np.arange(s.n_spots), reason="") for s in mini_cohort.slides)
    changed = Cohort(changed)
    for slide in changed.slides:
        is_test = np.isin(changed.rows_of(slide.id), test)
        X = slide.adata.X.toarray()
        X[is_test] = np.random.default_rng(0).permuted(X[is_test], axis=1)
        slide.adata.X = sparse.csr_matrix(X)
    one, other = (small_teacher().fit(c.by_slide(train)) for c in (mini_cohort, changed))
    assert one.genes_.tolist() == other.genes_.tolist()
    a, b = embed_cohort(one, mini_cohort), embed_cohort(other, changed)
    np.testing.assert_array_equal(a[train], b[train])
    assert not np.allclose(a[test], b[test])


def test_same_data_and_seed_give_the_same_embedding(fitted):
    np.testing.assert_array_equal(small_teacher().fit(make_adata()).embed(make_adata()), fitted.embed(make_adata()))


def test_first_component_recovers_a_planted_gradient():
    rng = np.random.default_rng(0)
    place = np.linspace(0, 1, 80)
    rates = np.full((80, 40), 20.0)
    rates[:, :10] *= np.exp(2 * place)[:, None]
    rates[:, 10:20] *= np.exp(-2 * place)[:, None]
    adata = make_adata(80)
    adata.X = sparse.csr_matrix(rng.poisson(rates), dtype=np.float32)
    E = small_teacher().fit(adata).embed(adata)
    assert abs(np.corrcoef(E[:, 0], place)[0, 1]) > 0.95


def test_missing_gene_is_set_to_its_training_mean(fitted):
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


def test_fewer_than_half_of_the_genes_raise(fitted):
    enough, too_few = fitted.genes_[:10], fitted.genes_[:9]
    assert fitted.embed(make_adata(5)[:, enough]).shape == (5, 5)
    with pytest.raises(ValueError, match=r"only 45% of the teacher's 20 genes.*at least half"):
        fitted.embed(make_adata(5)[:, too_few])


@pytest.mark.parametrize(("n", "options", "width"), [(4, {}, 3), (60, {"n_components": 45, "n_genes": 60}, 40)])
def test_capped_width_warns(n, options, width):
    with pytest.warns(UserWarning, match=rf"{n} spots x \d+ genes allow {width} components"):
        teacher = small_teacher(**options).fit(make_adata(n))
    assert teacher.embed(make_adata(8)).shape == (8, width)


def test_unfitted_teacher_raises():
    with pytest.raises(RuntimeError, match=r"not fitted; call fit"):
        small_teacher().embed(make_adata())


@pytest.mark.parametrize("options", [{"n_components": 1}, {"n_components": 30, "n_genes": 20}])
def test_invalid_widths_are_rejected(options):
    with pytest.raises(ValueError, match="n_genes >= n_components >= 2"):
        small_teacher(**options)


# --- a pretrained teacher ------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder."""
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pretrained(seed=0, **options):
    encoder = ScFoundation.random(GENES, hidden_dim=8, depth=1, heads=2, seed=seed).encoder
    return ScFoundation(encoder, GENES, origin="test", **options)


def with_second_slide(cohort, change):
    """Return the cohort with a changed AnnData in its second slide."""
    first, second = cohort.slides
    return Cohort((first, dataclasses.replace(second, adata=change(second.adata.copy()))))


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def published(cache, tmp_path):
    """A small checkpoint in the published layout, with its gene list."""
    state = {f"model.{name}": tensor for name, tensor in pretrained().encoder.state_dict().items()}
    network = {
        "encoder": {"hidden_dim": 8, "depth": 1, "heads": 2, "module_type": "transformer"},
        **{"seq_len": 42, "bin_num": 100, "bin_alpha": 1.0, "mask_token_id": 102, "pad_token_id": 103},
    }
    config = {"model": "mae", "model_config": {"mae": network}, "dataset_config": {"rnaseq": {}}}
    torch.save({"rde": {"config": config, "state_dict": state}}, tmp_path / "models.ckpt")
    (tmp_path / "gene_names.json").write_text(json.dumps(GENES))
    return tmp_path / "models.ckpt"


def test_scfoundation_is_loaded_from_a_file_with_its_options(published):
    teacher = load_teacher("scfoundation", checkpoint=published, key="rde", mapping={"OLD": "G1"})
    assert repr(teacher) == "ScFoundation(models.ckpt, rde: 1 layers, width 8, 40 genes)"
    assert teacher.mapping == {"OLD": "G1"}
    np.testing.assert_array_equal(teacher.embed(make_adata(5)), pretrained().embed(make_adata(5)))


def test_scfoundation_is_loaded_from_the_cache_by_default(published, monkeypatch):
    monkeypatch.setattr(teachers, "find_fetched", {"scfoundation": published}.get)
    given = load_teacher("scfoundation", key="rde", checkpoint=published)
    assert load_teacher("scfoundation", key="rde").fingerprint == given.fingerprint


def test_missing_scfoundation_error_names_the_fetch_command(cache):
    with pytest.raises(FileNotFoundError, match=r"not in the cache: run `peka-lite fetch scfoundation`"):
        load_teacher("scfoundation")


def test_unknown_option_of_scfoundation_is_rejected(published):
    with pytest.raises(TypeError, match="n_components"):
        load_teacher("scfoundation", checkpoint=published, n_components=5)


def test_pretrained_embeddings_are_cached_in_one_file_per_slide(cohort, cache):
    teacher = pretrained()
    E = embed_cohort(teacher, cohort)
    assert [name.split("_")[0] for name in listed(cache / "embeddings")] == ["S0", "S1"]
    assert (E.shape, E.dtype) == ((55, 32), np.float32)
    for slide in cohort.slides:
        np.testing.assert_array_equal(E[cohort.rows_of(slide.id)], teacher.embed(slide.adata))
    for path in (cache / "embeddings").iterdir():
        np.testing.assert_array_equal(np.load(path / "E.npy"), E[cohort.rows_of(path.name.split("_")[0])])


def test_cached_embeddings_are_not_recomputed(cohort, cache, monkeypatch):
    teacher = pretrained()
    E = embed_cohort(teacher, cohort)
    monkeypatch.setattr(teacher.encoder, "forward", None)  # fails if called
    np.testing.assert_array_equal(embed_cohort(teacher, cohort, batch_size=3), E)
    monkeypatch.undo()
    monkeypatch.setenv("PEKA_LITE_CACHE", str(cache / "other"))
    np.testing.assert_array_equal(embed_cohort(pretrained(), cohort), E)
    assert listed(cache / "other" / "embeddings") == listed(cache / "embeddings")


def one_count_more(adata):
    adata.X.data[3] += 1
    return adata


def other_order(adata):
    return adata[[1, 0, *range(2, adata.n_obs)]].copy()


def other_barcodes(adata):
    adata.obs_names = [*adata.obs_names[1::-1], *adata.obs_names[2:]]
    return adata


def other_genes(adata):
    adata.var_names = [*adata.var_names[1::-1], *adata.var_names[2:]]
    return adata


@pytest.mark.parametrize("change", [one_count_more, other_order, other_barcodes, other_genes])
def test_changed_slide_gets_a_new_file(cohort, cache, change):
    teacher, other = pretrained(), with_second_slide(cohort, change)
    embed_cohort(teacher, cohort)
    before = set(listed(cache / "embeddings"))
    np.testing.assert_array_equal(embed_cohort(teacher, other)[30:], teacher.embed(other.slides[1].adata))
    assert [name.split("_")[0] for name in set(listed(cache / "embeddings")) - before] == ["S1"]
    assert before <= set(listed(cache / "embeddings"))


@pytest.mark.parametrize(("seed", "mapping"), [(1, {}), (0, {"a": "G35", "k": "G36"})])
def test_another_teacher_gets_new_files(cohort, cache, seed, mapping):
    embed_cohort(pretrained(), cohort)
    other = pretrained(seed, mapping=mapping)
    E = embed_cohort(other, cohort)
    assert len(listed(cache / "embeddings")) == 4
    np.testing.assert_array_equal(E, np.concatenate([other.embed(s.adata) for s in cohort.slides]))


def test_embeddings_of_a_fitted_teacher_are_not_cached(cohort, cache):
    teacher = small_teacher().fit(cohort.by_slide(np.arange(len(cohort))))
    embed_cohort(teacher, cohort)
    assert not cache.exists()


def test_stopped_cohort_resumes(cohort, cache, monkeypatch):
    teacher, batch_sizes = pretrained(), []
    forward = teacher.encoder.forward

    def until_the_second_slide(values, positions, lengths):
        if sum(batch_sizes) == 40:
            raise KeyboardInterrupt
        batch_sizes.append(len(values))
        return forward(values, positions, lengths)

    with monkeypatch.context() as stopped:
        stopped.setattr(teacher.encoder, "forward", until_the_second_slide)
        with pytest.raises(KeyboardInterrupt):
            embed_cohort(teacher, cohort, batch_size=10)
    first, second = sorted((cache / "embeddings").iterdir())
    assert second == partial_path(second.with_name(second.name.split(".")[0]), locked=True)
    assert (first / "E.npy").is_file()
    remaining = []
    teacher.encoder.register_forward_pre_hook(lambda _, args: remaining.append(len(args[0])))
    E = embed_cohort(teacher, cohort)
    assert sum(remaining) == 15
    np.testing.assert_allclose(E, np.concatenate([teacher.embed(s.adata) for s in cohort.slides]), atol=1e-5)


def test_progress_of_a_cohort_is_printed(cohort, cache, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    embed_cohort(pretrained(), cohort, progress=True)
    assert capsys.readouterr().err.count("spots") >= 2
    embed_cohort(pretrained(), cohort)
    assert capsys.readouterr().err == ""
