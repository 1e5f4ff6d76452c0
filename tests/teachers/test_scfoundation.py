"""scFoundation: reference values, checkpoints of any size, and independence of batches."""

import copy
import json
import logging
import os
import pickle
import re
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy import sparse

from peka_lite._core.device import PRECISION, compute_dtype, default_device
from peka_lite.teachers import ScFoundation, _checkpoint as checkpoint
from peka_lite.teachers._encoder import Encoder, pool_tokens
from peka_lite.teachers.scfoundation import MAX_TOKENS

GENES = [f"G{i}" for i in range(30)]


def make_adata(counts, genes=None, **obs):
    X = counts if sparse.issparse(counts) else sparse.csr_matrix(np.asarray(counts, dtype=np.float32))
    genes = GENES[: X.shape[1]] if genes is None else list(genes)
    obs = pd.DataFrame(obs, index=[f"spot{i}" for i in range(X.shape[0])])
    return ad.AnnData(X, obs=obs, var=pd.DataFrame(index=genes))


def random_counts(n_spots, n_genes=30, seed=0, rate=1.5):
    counts = np.random.default_rng(seed).poisson(rate, (n_spots, n_genes))
    counts[:, 0] += 2
    return counts


def make_model(genes=GENES, **options):
    return ScFoundation.random(genes, **({"hidden_dim": 8, "depth": 1, "heads": 2} | options))


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))


# --- reference -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(golden):
    """Folder of reference values."""
    return golden / "scfoundation"


def memoize(model):
    """Cache the encoder's outputs by its arguments."""
    forward, outputs = model.encoder.forward, {}

    def memoized(*args):
        key = tuple(arg.numpy().tobytes() for arg in args)
        if key not in outputs:
            outputs[key] = forward(*args)
        return outputs[key]

    model.encoder.forward = memoized
    return model


@pytest.fixture(scope="module")
def model(reference):
    return memoize(ScFoundation.from_checkpoint(reference / "toy_models_ckpt.pt"))


@pytest.fixture(scope="module")
def cells(reference):
    """Raw counts of 12 cells with 4 to 8,807 tokens."""
    genes = json.loads((reference / "gene_names.json").read_text())
    return make_adata(sparse.load_npz(reference / "cells_csr.npz").tocsr(), genes)


@pytest.fixture(scope="module")
def totals(cells):
    return np.asarray(cells.X.astype(np.float64).sum(1))  # (N, 1)


@pytest.fixture(scope="module")
def logged(cells, totals):
    """The same cells, log-normalized."""
    return make_adata(cells.X.astype(np.float64).multiply(1e4 / totals).tocsr().log1p(), cells.var_names)


def assert_reference(E, reference, name):
    expected = np.load(reference / "outputs.npz")[name]
    assert (E.shape, E.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(E, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", ["all", "max"])
@pytest.mark.parametrize("resolution", ["t4", "f1", "a5", "f1.5"])
def test_single_cells_equal_the_reference(reference, model, cells, resolution, pool):
    assert_reference(model.embed(cells, resolution=resolution, pool=pool), reference, f"sc_F_{resolution}_{pool}")


@pytest.mark.parametrize("pool", ["all", "max"])
def test_bulk_equals_the_reference(reference, model, cells, logged, pool):
    assert_reference(model.embed(cells, input_type="bulk", pool=pool), reference, f"bulk_F_{pool}")
    E = model.embed(logged, input_type="bulk", pre_normalized="T", pool=pool)
    assert_reference(E, reference, f"bulk_T_{pool}")


def test_bulk_depends_on_the_other_rows_as_in_the_reference(reference, model, cells):
    first = make_adata(cells.X[:5].astype(np.float64), cells.var_names)
    assert_reference(model.embed(first, input_type="bulk"), reference, "bulk_F_all_first5cells_f64input")


def test_float64_counts_equal_the_reference(reference, model, cells):
    double = make_adata(cells.X.astype(np.float64), cells.var_names)
    assert_reference(model.embed(double), reference, "sc_F_t4_all_f64input")
    assert_reference(model.embed(double, input_type="bulk"), reference, "bulk_F_all_f64input")


def test_log_normalized_cells_equal_the_reference(reference, model, logged):
    assert_reference(model.embed(logged, pre_normalized="T"), reference, "sc_T_t4_all")


def test_raw_totals_in_obs_equal_the_reference(reference, model, logged, totals):
    adata = make_adata(logged.X, logged.var_names, total_counts=totals.ravel())
    E = model.embed(adata, pre_normalized="A", resolution="f1")
    assert_reference(E, reference, "sc_A_f1_all")


def test_raw_totals_in_the_last_column_equal_the_reference(reference, model, logged, totals):
    wide = make_adata(sparse.hstack([logged.X, sparse.csr_matrix(totals)]).tocsr(), [*logged.var_names, "total"])
    E = model.embed(wide, pre_normalized="A", resolution="f1")
    assert_reference(E, reference, "sc_A_f1_all")


def test_entry_for_read_depth_equals_the_reference(reference, cells):
    genes = json.loads((reference / "gene_names.json").read_text())
    rde = ScFoundation.from_checkpoint(reference / "toy_models_ckpt.pt", key="rde", genes=genes)
    assert_reference(rde.embed(cells, resolution="a5"), reference, "rde_sc_F_a5_all")


@pytest.mark.parametrize("resolution", ["t4", "f1"])
def test_shuffled_gene_subset_with_unknown_genes_equals_the_reference(reference, model, resolution):
    part = np.load(reference / "subset_input.npz", allow_pickle=True)
    adata = make_adata(part["counts"], part["gene_names"].astype(str))
    assert_reference(model.embed(adata, resolution=resolution), reference, f"subset_sc_F_{resolution}_all")
    expressed = adata.var_names[np.asarray(adata.X.sum(0)).ravel() > 0]
    assert model.coverage(adata) == pytest.approx(expressed.isin(model.genes).mean())


def test_more_columns_than_the_vocabulary_equal_the_reference(reference, model, cells):
    rng, rows = np.random.default_rng(0), [0, 1, 9, 10, 11]
    wide = sparse.hstack([cells.X[rows], sparse.csr_matrix(rng.poisson(5, (len(rows), 400)))]).tocsc()
    names, order = np.array([*cells.var_names, *(f"EXTRA{i}" for i in range(400))]), rng.permutation(wide.shape[1])
    E = model.embed(make_adata(wide[:, order].tocsr(), names[order]))
    np.testing.assert_allclose(E, np.load(reference / "outputs.npz")["sc_F_t4_all"][rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("row", [9, 10, 11])
def test_every_stage_equals_the_reference(reference, model, row):
    stages, encoder = np.load(reference / "stages.npz"), model.encoder
    values, positions = (torch.from_numpy(stages[f"c{row}_{name}"])[None] for name in ("values", "positions"))
    stage, layers = {"bin_weights": encoder.token_emb.weights(values)}, encoder.encoder["transformer_encoder"]

    def record(name, *, is_input=False):
        return lambda _, args, out: stage.update({name: args[0] if is_input else out})

    hooks = [
        encoder.token_emb.register_forward_hook(record("token_emb")),
        layers[0].register_forward_hook(record("encoder_in", is_input=True)),
        *(layer.register_forward_hook(record(f"layer{k}")) for k, layer in enumerate(layers)),
    ]
    stage["encoder_out"] = Encoder.forward(encoder, values, positions, torch.tensor([values.shape[1]]))
    for hook in hooks:
        hook.remove()
    for name in ("bin_weights", "token_emb", "encoder_in", "layer0", "layer1", "encoder_out"):
        np.testing.assert_allclose(stage[name][0], stages[f"c{row}_{name}"], atol=1e-5, rtol=0, err_msg=name)


def test_token_vectors_of_a_long_cell_equal_the_reference(reference, model):
    stages = np.load(reference / "stages.npz")
    values, positions = (torch.from_numpy(stages[f"c0_{name}"])[None] for name in ("values", "positions"))
    vectors = model.encoder(values, positions, torch.tensor([763]))
    np.testing.assert_allclose(vectors[0], stages["c0_encoder_out"], atol=1e-5, rtol=0)


# --- network -------------------------------------------------------------------------------------------------------


def test_mask_and_padding_values_have_separate_vectors():
    bins = make_model().encoder.token_emb
    values = torch.tensor([[102.0, 5, 103, 101.5]])
    mixed = bins.weights(values) @ bins.emb.weight
    expected = torch.stack([bins.emb_mask.weight[0], mixed[0, 1], bins.emb_pad.weight[0], mixed[0, 3]])
    torch.testing.assert_close(bins(values)[0], expected)


def test_padding_does_not_affect_the_output():
    encoder, rng = make_model(depth=2).encoder, torch.Generator().manual_seed(0)
    values, positions = torch.rand((3, 9), generator=rng) + 0.1, torch.arange(9).repeat(3, 1)
    lengths, other_values, other_positions = torch.tensor([4, 9, 6]), values.clone(), positions.clone()
    for i, n in enumerate(lengths):
        other_values[i, n:], other_positions[i, n:] = 103, 20
    for how in ("all", "max"):
        torch.testing.assert_close(
            pool_tokens(encoder(other_values, other_positions, lengths), lengths, how=how),
            pool_tokens(encoder(values, positions, lengths), lengths, how=how),
        )


def test_pooling_equals_a_computation_by_hand():
    # genes (1, -2) and (3, -8), then T and S, then padding higher than all
    x = torch.tensor([[[1.0, -2], [3, -8], [5, -1], [4, 7], [99, 99]]])
    assert pool_tokens(x, torch.tensor([4])).tolist() == [[4, 7, 5, -1, 3, -2, 2, -5]]
    assert pool_tokens(x, torch.tensor([4]), how="max").tolist() == [[5, 7]]
    # one gene, and padding lower than all
    assert pool_tokens(x[:, [0, 2, 3, 1]], torch.tensor([3])).tolist() == [[4, 7, 5, -1, 1, -2, 1, -2]]
    assert pool_tokens(-x, torch.tensor([4]), how="max").tolist() == [[-1, 8]]


def test_unknown_pooling_is_rejected():
    with pytest.raises(ValueError, match=r"unknown pool 'mean'; known: all, max"):
        make_model().embed(make_adata(random_counts(2)), pool="mean")
    with pytest.raises(ValueError, match=r"unknown pool 'mean'; known: all, max"):
        pool_tokens(torch.ones(1, 3, 2), torch.tensor([3]), how="mean")


# --- checkpoints ---------------------------------------------------------------------------------------------------


def make_entry(*, n_genes=30, hidden_dim=16, depth=2, heads=4, bins=7, alpha=0.5, mask=102, seed=0):
    """Return an entry in the published layout: config and random weights, including some unused for embedding."""
    d, rng = hidden_dim, torch.Generator().manual_seed(seed)
    shapes = {
        "token_emb.mlp.weight": (bins, 1), "token_emb.mlp.bias": (bins,), "token_emb.mlp2.weight": (bins, bins),
        "token_emb.mlp2.bias": (bins,), "token_emb.emb.weight": (bins, d), "token_emb.emb_mask.weight": (1, d),
        "token_emb.emb_pad.weight": (1, d), "pos_emb.weight": (n_genes + 3, d), "norm.weight": (5,),
        "encoder.norm.weight": (d,), "encoder.norm.bias": (d,), "decoder.norm.weight": (5,), "to_final.bias": (1,),
    }  # fmt: skip
    for k in range(depth):
        shapes |= {
            f"encoder.transformer_encoder.{k}.{name}": shape
            for name, shape in {
                "self_attn.in_proj_weight": (3 * d, d), "self_attn.in_proj_bias": (3 * d,),
                "self_attn.out_proj.weight": (d, d), "self_attn.out_proj.bias": (d,),
                "linear1.weight": (4 * d, d), "linear1.bias": (4 * d,), "linear2.weight": (d, 4 * d),
                "linear2.bias": (d,), "norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,),
                "norm2.bias": (d,),
            }.items()
        }  # fmt: skip
    state = {f"model.{name}": 0.5 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    encoder = {"hidden_dim": d, "depth": depth, "heads": heads, "module_type": "transformer", "norm_first": False}
    sizes = {"seq_len": n_genes + 2, "bin_num": 3, "mask_token_id": mask, "pad_token_id": mask + 1}
    network = {"encoder": encoder, "decoder": {"module_type": "performer", "hidden_dim": 5}, "n_class": 9} | sizes
    config = {
        "model": "mae_autobin",
        "model_config": {"mae_autobin": network, "other": {"encoder": {}}},
        "dataset_config": {"rnaseq": {"bin_num": bins, "bin_alpha": alpha}},  # these take precedence
    }
    return {"config": config, "state_dict": state}


def write_checkpoint(path, entry=None, *, key="cell", **options):
    torch.save({"gene": {}, key: make_entry() if entry is None else entry}, path, **options)
    return path


def read_teacher(path, genes=GENES, **options):
    return ScFoundation.from_checkpoint(path, genes=genes, **options)


def embed_with_torch(entry, counts, *, depth, heads, alpha, resolution=4.0, mask=None):
    """Compute embeddings with PyTorch's own transformer from an entry's weights, spot by spot."""
    w = {name.removeprefix("model."): tensor for name, tensor in entry["state_dict"].items()}
    n_genes, d = w["pos_emb.weight"].shape[0] - 3, w["pos_emb.weight"].shape[1]
    layers = []
    for k in range(depth):
        layer = torch.nn.TransformerEncoderLayer(d, heads, 4 * d, dropout=0.0, batch_first=True).eval()
        prefix = f"encoder.transformer_encoder.{k}."
        layer.load_state_dict({n.removeprefix(prefix): t for n, t in w.items() if n.startswith(prefix)})
        layers.append(layer)
    rows = []
    for row in counts:
        genes = np.flatnonzero(row)
        values = [*np.log1p(row[genes] / row.sum() * 1e4), resolution, np.log10(row.sum())]
        values = torch.tensor(values, dtype=torch.float32)[:, None]
        h = F.leaky_relu(values @ w["token_emb.mlp.weight"].T + w["token_emb.mlp.bias"], 0.1)
        weights = (alpha * h + h @ w["token_emb.mlp2.weight"].T + w["token_emb.mlp2.bias"]).softmax(-1)
        x = weights @ w["token_emb.emb.weight"]
        if mask is not None:
            x[-2] = w[mask][0]
        x = (x + w["pos_emb.weight"][[*genes, n_genes, n_genes + 1]])[None]
        for layer in layers:
            x = layer(x)
        x = F.layer_norm(x, (d,), w["encoder.norm.weight"], w["encoder.norm.bias"])[0]
        rows.append(torch.cat([x[-1], x[-2], x[:-2].amax(0), x[:-2].mean(0)]))
    return torch.stack(rows).detach().numpy()


@pytest.mark.parametrize(
    ("n_genes", "hidden_dim", "depth", "heads", "bins", "alpha"),
    [(30, 16, 2, 4, 7, 0.5), (12, 8, 1, 1, 100, 1.0), (30, 24, 3, 6, 2, 0.0), (5, 12, 4, 12, 11, 2.5)],
)
def test_sizes_come_from_the_checkpoint(tmp_path, n_genes, hidden_dim, depth, heads, bins, alpha):
    sizes = {"depth": depth, "heads": heads, "alpha": alpha}
    entry, counts = make_entry(n_genes=n_genes, hidden_dim=hidden_dim, bins=bins, **sizes), random_counts(6, n_genes)
    teacher = read_teacher(write_checkpoint(tmp_path / "models.ckpt", entry), GENES[:n_genes])
    E = teacher.embed(make_adata(counts))
    assert E.shape == (6, 4 * hidden_dim)
    np.testing.assert_allclose(E, embed_with_torch(entry, counts, **sizes), atol=1e-5)


@pytest.mark.parametrize(("resolution", "name"), [("t6", "emb_mask"), ("t7", "emb_pad")])
def test_mask_and_padding_values_come_from_the_checkpoint(tmp_path, resolution, name):
    entry, counts = make_entry(mask=6), random_counts(3)
    E = read_teacher(write_checkpoint(tmp_path / "models.ckpt", entry)).embed(make_adata(counts), resolution=resolution)
    expected = embed_with_torch(entry, counts, depth=2, heads=4, alpha=0.5, mask=f"token_emb.{name}.weight")
    np.testing.assert_allclose(E, expected, atol=1e-5)


def test_each_entry_has_its_weights(tmp_path):
    entries = {key: make_entry(seed=i) for i, key in enumerate(("cell", "gene", "rde"))}
    torch.save(entries, tmp_path / "models.ckpt")
    counts = random_counts(3)
    for key in ("cell", "rde"):
        E = read_teacher(tmp_path / "models.ckpt", key=key).embed(make_adata(counts))
        np.testing.assert_allclose(E, embed_with_torch(entries[key], counts, depth=2, heads=4, alpha=0.5), atol=1e-5)


def test_checkpoint_in_the_format_before_torch_1_6_is_read(tmp_path):
    new, old = (
        write_checkpoint(tmp_path / f"{zipped}.ckpt", _use_new_zipfile_serialization=zipped) for zipped in (True, False)
    )
    assert old.read_bytes()[:2] != b"PK"
    assert read_teacher(old).fingerprint == read_teacher(new).fingerprint


def test_weights_in_half_precision_become_float32(tmp_path):
    entry = make_entry()
    entry["state_dict"] = {name: tensor.bfloat16() for name, tensor in entry["state_dict"].items()}
    encoder = read_teacher(write_checkpoint(tmp_path / "models.ckpt", entry)).encoder
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32}


def test_loaded_teacher_does_not_need_its_file(tmp_path):
    path = write_checkpoint(tmp_path / "models.ckpt")
    teacher, adata = read_teacher(path), make_adata(random_counts(3))
    before = teacher.embed(adata)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    np.testing.assert_array_equal(teacher.embed(adata), before)


@pytest.mark.parametrize("zipped", [True, False])
def test_file_with_code_is_rejected_and_not_run(tmp_path, zipped):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    entry = make_entry() | {"bomb": Bomb()}
    path = write_checkpoint(tmp_path / "models.ckpt", entry, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"models\.ckpt: refused, for reading it would run code"):
        read_teacher(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # the file does run code
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_is_rejected_by_name(tmp_path, zipped):
    path = write_checkpoint(tmp_path / "models.ckpt", _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for n in [*range(60), *np.linspace(60, len(whole) - 1, 60, dtype=int)]:
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"models\.ckpt: (cannot be read|refused)"):
            read_teacher(path)


def test_missing_file_error_names_the_fetch_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt: checkpoint not found.*peka-lite fetch scfoundation"):
        read_teacher(tmp_path / "none.ckpt")


def test_missing_entry_error_lists_the_entries(tmp_path):
    path = write_checkpoint(tmp_path / "models.ckpt", key="rde")
    with pytest.raises(ValueError, match=r"models\.ckpt: no entry 'cell'; it has gene, rde"):
        read_teacher(path)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"cell": None}, {"cell": {"config": {}}}])
def test_file_with_other_content_is_rejected_by_name(tmp_path, content):
    torch.save(content, tmp_path / "models.ckpt")
    with pytest.raises(ValueError, match=r"models\.ckpt: .*entry 'cell'"):
        read_teacher(tmp_path / "models.ckpt")


def delete(*path):
    def change(entry):
        for name in path[:-1]:
            entry = entry[name]
        del entry[path[-1]]

    return change


def update_encoder(**values):
    return lambda entry: entry["config"]["model_config"]["mae_autobin"]["encoder"].update(values)


def set_tensor(name, shape):
    return lambda entry: entry["state_dict"].update({f"model.{name}": torch.zeros(shape)})


NETWORK, DATA = ("config", "model_config", "mae_autobin"), ("config", "dataset_config", "rnaseq")
BROKEN = [
    *((delete("config", name), f"'{name}' is missing") for name in ("model", "model_config", "dataset_config")),
    *((delete(*NETWORK, name), name) for name in ("encoder", "seq_len", "mask_token_id", "pad_token_id")),
    *((delete(*NETWORK, "encoder", name), name) for name in ("hidden_dim", "depth", "heads", "module_type")),
    (delete(*DATA, "bin_alpha"), "'bin_alpha' is missing"),
    (delete(*DATA, "bin_num"), "size mismatch"),  # the network's config has another
    (delete("state_dict", "model.pos_emb.weight"), r"pos_emb\.weight"),
    (delete("state_dict", "model.encoder.transformer_encoder.1.norm2.bias"), r"1\.norm2\.bias"),
    (set_tensor("pos_emb.weight", (32, 16)), r"pos_emb\.weight"),
    (set_tensor("encoder.norm.bias", (15,)), r"encoder\.norm\.bias"),
    (set_tensor("encoder.transformer_encoder.2.norm1.bias", (16,)), r"2\.norm1\.bias"),
    (update_encoder(depth=3), r"transformer_encoder\.2"),
    (update_encoder(hidden_dim=8), "size mismatch"),
    (update_encoder(heads=5), "heads"),
    (update_encoder(module_type="performer"), "'performer'.*is not supported"),
    (update_encoder(norm_first=True), "norm_first=True is not supported"),
]


@pytest.mark.parametrize(("change", "named"), BROKEN)
def test_invalid_entry_is_rejected_by_name(tmp_path, change, named):
    entry = make_entry()
    change(entry)
    with pytest.raises(ValueError, match=rf"(?s)models\.ckpt: entry 'cell' holds no scFoundation model: .*{named}"):
        read_teacher(write_checkpoint(tmp_path / "models.ckpt", entry))


# --- the gene list of a checkpoint ---------------------------------------------------------------------------------

TSV = "\n".join(["gene_name\tindex", *(f"{gene}\t{i}" for i, gene in enumerate(GENES))])


@pytest.mark.parametrize(
    ("name", "text"), [("OS_scRNA_gene_index.19264.tsv", TSV), ("gene_names.json", json.dumps(GENES))]
)
def test_gene_list_next_to_a_checkpoint_is_used(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    teacher = ScFoundation.from_checkpoint(write_checkpoint(tmp_path / "models.ckpt"))
    assert teacher.genes.tolist() == GENES


def test_gene_list_in_the_cache_is_the_fallback(tmp_path, monkeypatch):
    cached = {"scfoundation-genes": tmp_path / "elsewhere.tsv"}
    monkeypatch.setattr(checkpoint, "find_fetched", cached.get)
    cached["scfoundation-genes"].write_text(TSV)
    path = write_checkpoint(tmp_path / "models.ckpt")
    assert ScFoundation.from_checkpoint(path).genes.tolist() == GENES
    (tmp_path / "gene_names.json").write_text(json.dumps(GENES[::-1]))
    assert ScFoundation.from_checkpoint(path).genes.tolist() == GENES[::-1]


def test_missing_gene_list_error_names_the_fetch_command(tmp_path):
    path = write_checkpoint(tmp_path / "models.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no gene list next to.*models\.ckpt.*fetch scfoundation-genes"):
        ScFoundation.from_checkpoint(path)


@pytest.mark.parametrize("n", [29, 31])
def test_gene_list_of_another_length_is_rejected(tmp_path, n):
    with pytest.raises(ValueError, match=f"has 30 genes, but the gene list has {n}"):
        read_teacher(write_checkpoint(tmp_path / "models.ckpt"), [f"G{i}" for i in range(n)])


# --- fingerprints and random weights -------------------------------------------------------------------------------


def test_weights_depend_on_the_seed():
    assert make_model(seed=3).fingerprint == make_model(seed=3).fingerprint
    assert make_model(seed=3).fingerprint != make_model(seed=4).fingerprint


def test_random_weights_do_not_change_the_global_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make_model(seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_distinguish_spots():
    E = make_model(hidden_dim=64, heads=4).embed(make_adata(random_counts(5)))
    assert E.shape == (5, 256)
    assert E.std(axis=0).max() > 0.01


def test_fingerprint_depends_on_weights_sizes_genes_and_mapping(tmp_path):
    entries = [make_entry(), make_entry(), make_entry(heads=2), make_entry(alpha=0.75), make_entry(mask=90)]
    entries[1]["state_dict"]["model.encoder.norm.bias"][3] += 1e-3
    paths = [write_checkpoint(tmp_path / f"{i}.ckpt", entry) for i, entry in enumerate(entries)]
    fingerprints = [read_teacher(path).fingerprint for path in paths]
    fingerprints.append(read_teacher(paths[0], [*GENES[1::-1], *GENES[2:]]).fingerprint)
    fingerprints.append(read_teacher(paths[0], mapping={"A": "G1"}).fingerprint)
    fingerprints.append(read_teacher(paths[0], mapping={"A": "G2"}).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints)
    assert read_teacher(paths[0]).fingerprint == fingerprints[0]


# --- batches -------------------------------------------------------------------------------------------------------

LONG = [f"L{i}" for i in range(2500)]


@pytest.fixture(scope="module")
def long_model():
    return make_model(LONG)


@pytest.fixture(scope="module")
def spots():
    """14 spots of 3 to 2,402 tokens, in no order of length."""
    rng, lengths = np.random.default_rng(0), [1, 300, 2, 2400, 40, 1, 1200, 8, 500, 41, 3, 40, 90, 700]
    counts = np.zeros((len(lengths), len(LONG)))
    for row, n in zip(counts, lengths, strict=True):
        row[rng.choice(len(LONG), n, replace=False)] = rng.poisson(2, n) + 2
    return make_adata(counts, LONG)


@pytest.fixture(scope="module")
def one_by_one(long_model, spots):
    return np.concatenate([long_model.embed(spots[[i]]) for i in range(spots.n_obs)])


@given(batch=st.none() | st.integers(1, 14), most=st.none() | st.integers(1, 9000), rows=st.permutations(range(14)))
@settings(max_examples=12, deadline=None)
def test_embeddings_do_not_depend_on_batches(long_model, spots, one_by_one, batch, most, rows):
    E = long_model.embed(spots[rows], batch_size=batch, max_tokens=most)
    np.testing.assert_allclose(E, one_by_one[rows], atol=1e-5)


def test_one_spot_returns_a_matrix():
    model, one = make_model(), make_adata(random_counts(1))
    assert model.embed(one).shape == (1, 32)
    assert model.embed(one, pool="max").shape == (1, 8)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_counts_may_be_dense_or_sparse_and_are_not_changed(kind):
    counts, model = random_counts(4), make_model()
    adata = make_adata(counts)
    adata.X = kind(counts.astype(np.float64))
    np.testing.assert_allclose(model.embed(adata), model.embed(make_adata(counts)), atol=1e-6)
    np.testing.assert_array_equal(adata.to_df().to_numpy(), counts)


@given(order=st.permutations(range(len(GENES))), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_column_order_and_unexpressed_unknown_genes_do_not_matter(order, seed):
    counts, model = random_counts(4, seed=seed), make_model()
    wide = np.hstack([counts[:, order], np.zeros((4, 20))])
    E = model.embed(make_adata(wide, [*np.array(GENES)[order], *(f"UNKNOWN{i}" for i in range(20))]))
    np.testing.assert_allclose(E, model.embed(make_adata(counts)), atol=1e-6)


def test_expressed_unknown_genes_do_not_count_in_the_totals():
    counts, model = random_counts(4), make_model()
    wide = make_adata(np.hstack([counts, counts[:, :5] * 9]), [*GENES, *"abcde"])
    np.testing.assert_array_equal(model.embed(wide), model.embed(make_adata(counts)))


def record_shapes(model):
    """Return a list to which the shapes (B, L) of later batches are added, and the hook that adds them."""
    shapes = []
    return shapes, model.encoder.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))


@pytest.mark.parametrize("most", [1, 100, 1000, 3000, 100_000])
def test_no_batch_exceeds_max_tokens_unless_it_is_one_spot(long_model, spots, most):
    shapes, hook = record_shapes(long_model)
    long_model.embed(spots, max_tokens=most)
    hook.remove()
    assert all(b * n <= most or b == 1 for b, n in shapes)
    assert sum(b for b, _ in shapes) == spots.n_obs
    assert len(shapes) < spots.n_obs or most <= 100
    assert len(shapes) == 1 or most < 100_000


@pytest.mark.parametrize("size", [1, 3, 5])
def test_no_batch_exceeds_batch_size(long_model, spots, size):
    shapes, hook = record_shapes(long_model)
    long_model.embed(spots, batch_size=size, max_tokens=100_000)
    hook.remove()
    assert [b for b, _ in shapes] == [size] * (14 // size) + [14 % size] * (14 % size > 0)


def test_default_max_tokens_depends_on_the_device():
    model, wide = make_model(), make_adata(np.ones((400, 30)) * 2)
    shapes, hook = record_shapes(model)
    model.embed(wide, device="cpu")
    hook.remove()
    assert shapes[0] == (MAX_TOKENS["cpu"] // 32, 32)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -1}, {"max_tokens": 0}, {"max_tokens": -5}])
def test_non_positive_batch_sizes_are_rejected(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        make_model().embed(make_adata(random_counts(2)), **options)


def test_spots_that_cannot_be_embedded_are_named():
    counts = random_counts(4)
    counts[1], counts[3] = 0, 0
    with pytest.raises(ValueError, match=r"2 spots express no gene of the vocabulary \(spot1, spot3\)"):
        make_model().embed(make_adata(counts))
    counts[1, 2] = counts[3, 4] = 1
    with pytest.raises(ValueError, match=r"2 spots have a source depth S.*\(spot1, spot3\)"):
        make_model().embed(make_adata(counts))
    counts[1, 2] = counts[3, 4] = 9
    with pytest.raises(ValueError, match=r"2 spots have a target depth T.*'f0.1'.*\(spot1, spot3\)"):
        make_model().embed(make_adata(counts), resolution="f0.1")
    with pytest.raises(ValueError, match=r"4 spots have a target depth T.*'t0'.*\(spot0, spot1, spot2, spot3\)"):
        make_model().embed(make_adata(counts), resolution="t0")


def test_flag_a_without_raw_totals_is_rejected():
    logs = np.log1p(random_counts(3)) / 2
    with pytest.raises(ValueError, match=r"needs raw totals in obs\['total_counts'\] or in the last column"):
        make_model().embed(make_adata(logs), pre_normalized="A")


def test_last_column_of_raw_totals_is_not_a_gene():
    adata = make_adata([[1.5, 2.5, 90], [0.5, 1.5, 20]], ["G0", "UNKNOWN", "total"])
    assert make_model().tokens(adata, pre_normalized="A").lengths.tolist() == [3, 3]


# --- memory --------------------------------------------------------------------------------------------------------


def limit_memory(model, monkeypatch, limit, error):
    """Make the encoder raise `error` above a number of tokens, and return the list of shapes of its calls."""
    forward, shapes = model.encoder.forward, []

    def forward_within(values, positions, lengths):
        shapes.append(tuple(values.shape))
        assert len(shapes) < 100, "the same batch is repeated"
        if values.numel() > limit:
            raise error
        return forward(values, positions, lengths)

    monkeypatch.setattr(model.encoder, "forward", forward_within)
    return shapes


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_batches_are_halved_when_memory_runs_out(long_model, spots, one_by_one, monkeypatch, error):
    shapes = limit_memory(long_model, monkeypatch, 5000, error)
    np.testing.assert_allclose(long_model.embed(spots, max_tokens=100_000), one_by_one, atol=1e-5)
    assert [b for b, _ in shapes[:4]] == [14, 7, 3, 1]
    assert all(b * n <= 5000 for b, n in shapes[3:])
    assert sum(b for b, _ in shapes[3:]) == spots.n_obs


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_spot_that_does_not_fit_raises(long_model, spots, monkeypatch, error):
    limit_memory(long_model, monkeypatch, 2000, error)
    with pytest.raises(MemoryError, match=r"a spot of 2402 tokens does not fit on cpu"):
        long_model.embed(spots)


def test_other_errors_are_not_treated_as_out_of_memory(long_model, spots, monkeypatch):
    shapes = limit_memory(long_model, monkeypatch, 0, RuntimeError("cuBLAS failed"))
    with pytest.raises(RuntimeError, match="cuBLAS failed"):
        long_model.embed(spots)
    assert len(shapes) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_embeddings_raise_and_leave_no_file(tmp_path, monkeypatch, value):
    model = make_model()
    forward = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda *args: forward(*args).index_fill(2, torch.tensor([3]), value))
    with pytest.raises(FloatingPointError, match=r"on cpu are not finite"):
        model.embed(make_adata(random_counts(3)), out=tmp_path / "E.npy")
    assert not (tmp_path / "E.npy").exists()


def test_overflow_in_half_precision_falls_back_to_float32(monkeypatch):
    model, adata = make_model(precision=HALF), make_adata(random_counts(3))
    encoder_on = ScFoundation._encoder_on

    def overflowing(self, device, dtype):
        if dtype == torch.float32:
            return encoder_on(self, device, dtype)
        return lambda values, positions, lengths: torch.full((*values.shape, 8), torch.inf)

    monkeypatch.setattr(ScFoundation, "_encoder_on", overflowing)
    with pytest.warns(UserWarning, match=r"bfloat16 overflows on cpu: continuing in float32"):
        E = model.embed(adata)
    np.testing.assert_allclose(E, make_model().embed(adata), atol=1e-6)


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_other_out_of_memory_messages_are_recognized(long_model, spots, monkeypatch, words):
    limit_memory(long_model, monkeypatch, 5000, RuntimeError(words))
    assert np.isfinite(long_model.embed(spots, max_tokens=20_000)).all()


@pytest.mark.parametrize("total", [[4.5, 3.2], ["many", "few"]])
def test_totals_that_are_not_counts_are_rejected(total):
    adata = make_adata(np.log1p([[1, 2], [3, 1]]), ["G0", "G1"])
    adata.obs["total_counts"] = total
    with pytest.raises(ValueError, match=r"total_counts.*whole numbers"):
        make_model().tokens(adata, pre_normalized="A")


def test_backed_data_equal_data_in_memory(tmp_path):
    adata = make_adata(random_counts(3))
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    np.testing.assert_array_equal(make_model().embed(backed), make_model().embed(adata))


def test_data_without_expression_are_rejected():
    with pytest.raises(ValueError, match="X is missing"):
        make_model().embed(ad.AnnData(obs=pd.DataFrame(index=["a"]), var=pd.DataFrame(index=["G0"])))


def test_teacher_can_be_pickled():
    model = pickle.loads(pickle.dumps(make_model(precision=HALF)))
    assert model.fingerprint == make_model().fingerprint


# --- precision -----------------------------------------------------------------------------------------------------

HALF = {"cpu": torch.bfloat16, "cuda<8.0": torch.float16, "cuda>=8.0": torch.bfloat16}


def test_half_precision_is_close_and_returns_float32():
    full, half = (make_model(hidden_dim=16, depth=2, precision=p) for p in (PRECISION, HALF))
    adata = make_adata(random_counts(5))
    E, expected = half.embed(adata), full.embed(adata)
    assert E.dtype == np.float32
    assert 0 < np.linalg.norm(E - expected) / np.linalg.norm(expected) < 0.05
    np.testing.assert_array_equal(half.embed(adata), E)
    assert half.cache_key(adata) != full.cache_key(adata)


def test_half_precision_does_not_change_the_teachers_weights():
    half = make_model(precision=HALF)
    half.embed(make_adata(random_counts(2)))
    assert {tensor.dtype for tensor in half.encoder.state_dict().values()} == {torch.float32}
    assert half.fingerprint == make_model().fingerprint


def test_only_matrices_are_in_half_precision():
    encoder = make_model(depth=2).encoder.halve(torch.bfloat16)
    halved = {n for n, tensor in encoder.state_dict().items() if tensor.dtype == torch.bfloat16}
    assert halved == {
        f"encoder.transformer_encoder.{k}.{part}"
        for k in range(2)
        for part in (
            *("self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight"),
            *("self_attn.out_proj.bias", "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"),
        )
    }
    summed = []
    for layer in encoder.encoder["transformer_encoder"]:
        for norm in (layer.norm1, layer.norm2):
            norm.register_forward_hook(lambda _, args, out: summed.extend([args[0].dtype, out.dtype]))
    out = encoder(torch.ones(1, 4), torch.arange(4)[None], torch.tensor([4]))
    assert {*summed, out.dtype} == {torch.float32}
    assert len(summed) == 8


def test_residual_stream_is_not_rounded():
    full = make_model(depth=2).encoder
    for layer in full.encoder["transformer_encoder"]:
        for part in (layer.self_attn.out_proj, layer.linear2):  # zero residuals
            part.weight.zero_()
            part.bias.zero_()
    half, tokens = (
        copy.deepcopy(full).halve(torch.bfloat16),
        (torch.ones(1, 4), torch.arange(4)[None], torch.tensor([4])),
    )
    torch.testing.assert_close(half(*tokens), full(*tokens))


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        *(((7, minor), torch.float16) for minor in (0, 5)),
        *((pair, torch.bfloat16) for pair in ((8, 0), (8, 6), (9, 0), (10, 0))),
    ],
)
def test_gpu_computes_in_the_half_precision_it_supports(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert compute_dtype("cuda") == compute_dtype(torch.device("cuda", 0)) == dtype
    full = dict.fromkeys(PRECISION, torch.float32)
    assert compute_dtype("cuda", precision=full) == torch.float32


def test_cpu_computes_in_float32():
    assert compute_dtype("cpu") == compute_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(("there", "name"), [(True, "cuda"), (False, "cpu")])
def test_gpu_is_the_default_device_if_available(monkeypatch, there, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert default_device() == name


# --- messages ------------------------------------------------------------------------------------------------------


def test_progress_prints_coverage_and_spots_per_second(capsys, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="peka_lite")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    adata = make_adata(random_counts(6)[:, :4], [*GENES[:3], "UNKNOWN"])
    make_model().embed(adata, progress=True, batch_size=2)
    shown = capsys.readouterr().err
    assert caplog.messages == ["75% of the expressed genes are in the vocabulary"]
    assert "6/6" in shown
    assert re.search(r"\d ?spots?/s", shown)


def test_nothing_is_printed_without_progress(capsys):
    make_model().embed(make_adata(random_counts(6)))
    assert capsys.readouterr() == ("", "")


def test_repr_describes_the_teacher(tmp_path):
    assert repr(read_teacher(write_checkpoint(tmp_path / "models.ckpt"))) == (
        "ScFoundation(models.ckpt, cell: 2 layers, width 16, 30 genes)"
    )
    assert repr(make_model(seed=3)) == "ScFoundation(random weights, seed 3: 1 layers, width 8, 30 genes)"


def test_fit_does_nothing():
    model = make_model()
    assert model.fit(make_adata(random_counts(2))) is model
    assert model.fingerprint == make_model().fingerprint
