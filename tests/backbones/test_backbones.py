"""Students by name: every row builds, weights come from the given source, tiles are embedded in order."""

import pickle
import re
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import save_file

from peka_lite.backbones import (
    BACKBONES,
    Backbone,
    build_network,
    embed_tiles,
    extract_features,
    load as backbones,
    load_backbone,
    preprocess,
)
from peka_lite.backbones.load import precision_for
from peka_lite.backbones.registry import IMAGENET

# huggingface_hub before 1.0 has the base class only.
MissingFileError = getattr(huggingface_hub.errors, "RemoteEntryNotFoundError", EntryNotFoundError)

NAMES = ["resnet50", "ctranspath", "uni", "h-optimus-0", "uni2-h", "h0-mini", "h-optimus-1", "virchow2", "gigapath"]
NAMES += ["mini"]
GATED = [n for n in NAMES if n not in ("resnet50", "ctranspath", "mini")]
TINY = Backbone(
    "tiny", "vit_tiny_patch16_224", "us/tiny", 48, *IMAGENET, "BSD-3-Clause", "https://huggingface.co/us/tiny",
    input_size=32, pooling="avg", bone_r=16,
    options={"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2, "global_pool": "avg"},
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


def random_model(spec=TINY, seed=0):
    return load_backbone(spec, weights="random", seed=seed)


def tiles(n=7, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def have_equal_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def set_hub(monkeypatch, answer):
    """Replace downloads from the hub by `answer(repo, file)` and return the list of calls."""
    calls = []

    def download(repo, file, **options):
        calls.append((options["repo_type"], repo, file))
        result = answer(repo, file)
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls


def make_error(kind):
    return kind("refused", response=SimpleNamespace(headers={}, request=None, status_code=403))


def test_registry_lists_the_students_in_order():
    assert list(BACKBONES) == NAMES
    assert all(name == row.name for name, row in BACKBONES.items())


@pytest.mark.parametrize("name", NAMES)
def test_each_row_builds_and_outputs_its_width(name):
    spec = BACKBONES[name]
    with torch.device("meta"):
        model = build_network(spec).eval()
        model.spec = spec
        out = extract_features(model, torch.zeros(2, 3, spec.input_size, spec.input_size))
    assert out.shape == (2, spec.dim)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet50", 23.5), ("uni", 303.4), ("h-optimus-0", 1134.8), ("uni2-h", 681.4), ("h0-mini", 85.7),
     ("h-optimus-1", 1134.8), ("virchow2", 631.2), ("gigapath", 1135.0)],
)  # fmt: skip
def test_each_published_row_has_the_parameter_count_of_its_model(name, millions):
    with torch.device("meta"):
        model = build_network(BACKBONES[name])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("name", GATED)
def test_each_gated_row_names_the_page_of_its_repository(name):
    assert BACKBONES[name].gate == f"https://huggingface.co/{BACKBONES[name].source}"


def test_registry_is_read_only():
    with pytest.raises(TypeError):
        BACKBONES["uni"] = TINY


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'unl'.*resnet50.*mini"):
        load_backbone("unl", weights="random")


def test_random_weights_warn_and_are_recorded():
    with pytest.warns(UserWarning, match=r"tiny starts from random weights \(seed 4\)"):
        model = load_backbone(TINY, weights="random", seed=4)
    assert model.weights_origin == "random, seed 4"
    assert model.spec is TINY
    assert not model.training


def test_same_seed_same_weights():
    assert have_equal_weights(random_model(seed=1), random_model(seed=1))
    assert not have_equal_weights(random_model(seed=1), random_model(seed=2))


def test_random_weights_do_not_change_the_global_random_state():
    before = torch.get_rng_state()
    random_model(seed=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hub_weights_are_fetched_in_either_format(tmp_path, monkeypatch, file):
    source = random_model(seed=3)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    calls = set_hub(monkeypatch, lambda repo, name: tmp_path / name if name == file else make_error(MissingFileError))
    model = load_backbone(TINY)
    assert have_equal_weights(model, source)
    assert model.weights_origin == "hub us/tiny"
    assert calls[-1] == ("model", "us/tiny", file)


def test_network_with_another_input_size_than_its_row_is_rejected():
    with pytest.raises(ValueError, match="takes 32 x 32 pixels, but its row has input_size 64"):
        load_backbone(replace(TINY, input_size=64, options={**TINY.options, "img_size": 32}), weights="random")


def test_cached_weights_are_not_downloaded_again(tmp_path, monkeypatch):
    save_file(random_model(seed=3).state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(backbones, "BACKBONES", {"tiny": TINY})
    monkeypatch.setattr(backbones, "PACKAGED_NAMES", {"tiny"})
    monkeypatch.setattr(
        backbones, "find_fetched", lambda name: tmp_path / "model.safetensors" if name == "tiny" else None
    )
    calls = set_hub(monkeypatch, lambda *_: make_error(GatedRepoError))
    assert have_equal_weights(load_backbone(TINY), random_model(seed=3))
    assert not calls


def test_offline_with_only_the_second_format_in_the_cache_still_loads(tmp_path, monkeypatch):
    torch.save(random_model(seed=3).state_dict(), tmp_path / "pytorch_model.bin")
    set_hub(
        monkeypatch, lambda _, name: tmp_path / name if name.endswith(".bin") else LocalEntryNotFoundError("offline")
    )
    assert have_equal_weights(load_backbone(TINY), random_model(seed=3))


def test_row_may_name_a_file_in_a_dataset_repository(monkeypatch):
    calls = set_hub(monkeypatch, lambda *_: make_error(GatedRepoError))
    with pytest.raises(PermissionError, match=re.escape("huggingface.co/datasets/MahmoodLab/hest-bench")):
        load_backbone("ctranspath")
    assert calls == [("dataset", "MahmoodLab/hest-bench", "fm_v1/ctranspath/CHIEF_CTransPath.pth")]


@pytest.mark.parametrize("name", GATED)
def test_gated_weights_without_access_name_the_request_page_in_one_sentence(monkeypatch, name):
    set_hub(monkeypatch, lambda *_: make_error(GatedRepoError))
    with pytest.raises(PermissionError) as caught:
        load_backbone(name)
    message = str(caught.value)
    assert message.startswith(f"{name} is gated: ask for access at {BACKBONES[name].gate}, then")
    assert ("granted by hand" in message) == (name in ("h0-mini", "h-optimus-1", "gigapath"))
    assert ("granted at once" in message) == (name == "h-optimus-0")
    assert ("institutional e-mail" in message) == (name in ("uni", "uni2-h"))
    assert "\n" not in message
    assert ". " not in message


@pytest.mark.parametrize(
    "error", [OfflineModeIsEnabled("off"), ConnectionError("no route"), LocalEntryNotFoundError("no route, no cache")]
)
def test_unreachable_hub_error_suggests_going_online_or_a_file(monkeypatch, error):
    set_hub(monkeypatch, lambda *_: error)
    with pytest.raises(ConnectionError, match=r"tiny could not be fetched.*weights=FILE with a copy of us/tiny"):
        load_backbone(TINY)


def test_repository_without_weights_lists_the_missing_files(monkeypatch):
    calls = set_hub(monkeypatch, lambda *_: make_error(MissingFileError))
    with pytest.raises(FileNotFoundError, match=r"us/tiny.*model\.safetensors, pytorch_model\.bin"):
        load_backbone(TINY)
    assert len(calls) == 2


def test_row_without_published_weights_does_not_load_random_ones():
    with pytest.raises(ValueError, match="no weights are published for tiny; pass weights='random' or a file"):
        load_backbone(replace(TINY, source=None))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin"])
def test_local_file_round_trip(tmp_path, name):
    source = random_model(seed=5)
    save = save_file if name.endswith("safetensors") else torch.save
    save(source.state_dict(), tmp_path / name)
    model = load_backbone(TINY, weights=tmp_path / name)
    assert have_equal_weights(model, source)
    assert model.weights_origin == f"file {name}"


def test_classifier_in_a_file_is_dropped(tmp_path):
    source = random_model()
    torch.save(
        source.state_dict() | {"head.weight": torch.zeros(5, 48), "head.bias": torch.zeros(5)}, tmp_path / "w.pth"
    )
    assert have_equal_weights(load_backbone(TINY, weights=tmp_path / "w.pth"), source)


def test_file_of_another_architecture_is_rejected_by_name(tmp_path):
    torch.save(random_model(replace(TINY, options={**TINY.options, "depth": 3})).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(ValueError, match=r"deep\.pth: these weights do not fit tiny \(vit_tiny_patch16_224\)"):
        load_backbone(TINY, weights=tmp_path / "deep.pth")


def test_missing_tensor_in_a_file_is_named(tmp_path):
    state = random_model().state_dict()
    del state["fc_norm.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"fc_norm\.bias"):
        load_backbone(TINY, weights=tmp_path / "w.pth")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such weights file for tiny"):
        load_backbone(TINY, weights=tmp_path / "nowhere.pth")


def test_broken_file_is_named(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"half a header")
    with pytest.raises(ValueError, match=r"cut\.safetensors: cannot be read as weights"):
        load_backbone(TINY, weights=tmp_path / "cut.safetensors")


class Intruder:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickle_with_code_is_rejected_and_not_run(tmp_path):
    torch.save({"norm.bias": Intruder(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth: refused, for reading it would run code that it names: io\.open"):
        load_backbone(TINY, weights=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Intruder(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()  # the file above would have run code


@pytest.fixture(scope="module")
def ctranspath():
    model = load_backbone("ctranspath", weights="random", seed=1)
    for module in model.modules():  # statistics that differ from the defaults
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def original_layout(model):
    """Name a Swin's tensors as timm 0.5.4 did: the previous stage downsamples, buffers and classifier are stored."""
    state = {
        re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", k): v
        for k, v in model.state_dict().items()
    }
    for stage, depth in enumerate((2, 2, 6, 2)):
        for block in range(depth):
            at = f"layers.{stage}.blocks.{block}"
            state[f"{at}.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
            if block % 2 and stage < 3:
                state[f"{at}.attn_mask"] = torch.zeros(4 ** (3 - stage), 49, 49)
    return state | {"head.weight": torch.zeros(1000, 768), "head.bias": torch.zeros(1000)}


def test_ctranspath_in_its_original_layout_has_the_same_outputs(tmp_path, ctranspath):
    state = original_layout(ctranspath)
    assert "layers.0.downsample.reduction.weight" in state
    assert "layers.3.downsample.reduction.weight" not in state
    torch.save({"model": state}, tmp_path / "ctranspath.pth")
    loaded = load_backbone("ctranspath", weights=tmp_path / "ctranspath.pth")
    x = tiles(2, 224)
    assert np.array_equal(embed_tiles(loaded, x, device="cpu"), embed_tiles(ctranspath, x, device="cpu"))


def test_ctranspath_in_timms_layout_loads(tmp_path, ctranspath):
    torch.save(ctranspath.state_dict(), tmp_path / "timm.pth")
    assert have_equal_weights(load_backbone("ctranspath", weights=tmp_path / "timm.pth"), ctranspath)


def test_ctranspath_starts_with_convolutions(ctranspath):
    kernels = [m.kernel_size for m in ctranspath.patch_embed.modules() if isinstance(m, torch.nn.Conv2d)]
    assert kernels == [(3, 3), (3, 3), (1, 1)]


def test_pixels_are_normalized_with_the_statistics_of_the_row():
    white = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    x = preprocess(white, TINY)
    assert x.shape == (1, 3, 32, 32)
    expected = [(1 - m) / s for m, s in zip(TINY.mean, TINY.std, strict=True)]
    np.testing.assert_allclose(x.mean((0, 2, 3)), expected, rtol=1e-5)


def test_channels_and_rows_keep_their_order():
    batch = torch.from_numpy(tiles(2))
    x = preprocess(batch, TINY)
    pixel = batch[1, 5, 9].double() / 255
    np.testing.assert_allclose(x[1, :, 5, 9], (pixel - torch.tensor(TINY.mean)) / torch.tensor(TINY.std), rtol=1e-5)


def test_large_tiles_are_resized_with_antialiasing():
    spec = replace(TINY, mean=(0, 0, 0), std=(1, 1, 1), input_size=16)
    batch = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    batch[:, ::4] = 240  # every fourth line, lost without antialiasing
    inner = preprocess(batch, spec)[:, :, 2:-2, 2:-2]
    np.testing.assert_allclose(inner, 60 / 255, atol=0.01)


def test_mini_resizes_tiles_to_its_input_size():
    model = random_model(BACKBONES["mini"])
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    out = embed_tiles(model, tiles(3, 224), device="cpu")
    assert out.shape == (3, 192)
    assert shapes == [(3, 3, 112, 112)]


def test_embeddings_are_float32_and_finite():
    out = embed_tiles(random_model(), tiles(), device="cpu")
    assert out.dtype == np.float32
    assert np.isfinite(out).all()


def test_embeddings_follow_the_order_of_the_tiles():
    model, x = random_model(), tiles()
    order = np.random.default_rng(1).permutation(len(x))
    np.testing.assert_allclose(
        embed_tiles(model, x[order], device="cpu"), embed_tiles(model, x, device="cpu")[order], atol=1e-5
    )
    assert np.abs(np.diff(embed_tiles(model, x, device="cpu"), axis=0)).max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_embeddings_do_not_depend_on_the_batch_size(batch_size):
    model, x = random_model(), tiles()
    whole = embed_tiles(model, x, device="cpu")
    np.testing.assert_allclose(embed_tiles(model, x, batch_size=batch_size, device="cpu"), whole, atol=1e-5)


def test_embeddings_of_a_tile_store_equal_those_of_its_array(mini_cohort):
    model, rows = random_model(BACKBONES["mini"]), [5, 0, 63]
    store = mini_cohort.tiles.select(rows)
    np.testing.assert_array_equal(
        embed_tiles(model, store, device="cpu"), embed_tiles(model, mini_cohort.tiles[rows], device="cpu")
    )


def test_model_in_training_mode_embeds_in_eval_mode():
    spec = replace(TINY, options={**TINY.options, "proj_drop_rate": 0.5})
    model = random_model(spec)
    first = embed_tiles(model, tiles(), device="cpu")
    np.testing.assert_array_equal(embed_tiles(model.train(), tiles(), device="cpu"), first)


SMALL = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2}
TOKENS = {  # architecture, options, number of prefix tokens
    "vit": ("vit_tiny_patch16_224", SMALL, 1),
    "vit, registers": ("vit_tiny_patch16_224", SMALL | {"reg_tokens": 4}, 5),
    "vit, average": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg", "reg_tokens": 2}, 3),
    "vit, average of all": (
        "vit_tiny_patch16_224",
        SMALL | {"global_pool": "avg", "reg_tokens": 2, "pool_include_prefix": True},
        3,
    ),
    "vit, no pooling": ("vit_tiny_patch16_224", SMALL | {"global_pool": ""}, 1),
    "deit": ("deit_tiny_distilled_patch16_224", SMALL, 2),
    "eva": ("eva_giant_patch14_224", SMALL | {"patch_size": 16}, 1),
    "eva, token": ("eva_giant_patch14_224", SMALL | {"patch_size": 16, "global_pool": "token"}, 1),
    "beit": ("beit_base_patch16_224", SMALL, 1),
    "beit, token": ("beit_base_patch16_224", SMALL | {"global_pool": "token"}, 1),
}


@pytest.mark.parametrize("pooling", ["token", "avg", "token+avg"])
@pytest.mark.parametrize("kind", TOKENS)
def test_pooling_equals_a_computation_by_hand(kind, pooling):
    arch, options, n_prefix = TOKENS[kind]
    spec = replace(TINY, arch=arch, dim=96 if "+" in pooling else 48, pooling=pooling, options=options)
    model = random_model(spec)
    for name, p in model.named_parameters():  # norms that change their input
        if "norm" in name:
            torch.nn.init.normal_(p, mean=1.0, generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad():
        tokens = model.forward_features(preprocess(torch.from_numpy(tiles()), spec))
        assert tokens.shape == (7, n_prefix + 4, 48)
        norm = model.fc_norm if "fc_norm" in dict(model.named_modules()) else torch.nn.Identity()
        by_hand = {"token": norm(tokens[:, 0]), "avg": norm(tokens[:, n_prefix:].mean(1))}
    assert (by_hand["token"] - by_hand["avg"]).abs().max() > 1e-2
    expected = np.concatenate([by_hand[part].numpy() for part in pooling.split("+")], axis=1)
    np.testing.assert_allclose(embed_tiles(model, tiles(), device="cpu"), expected, atol=1e-5)


def test_network_uses_timms_pooling_unless_its_row_sets_another():
    spec = Backbone("siglip", "vit_base_patch16_siglip_224", None, 48, *IMAGENET, "Apache-2.0", input_size=32,
                    options=SMALL)  # fmt: skip
    assert spec.pooling == "network"
    model = random_model(spec)
    attended = model(preprocess(torch.from_numpy(tiles()), spec)).detach()
    np.testing.assert_allclose(embed_tiles(model, tiles(), device="cpu"), attended, atol=1e-5)
    mean = embed_tiles(random_model(replace(spec, pooling="avg")), tiles(), device="cpu")
    assert np.abs(mean - attended.numpy()).max() > 1e-2


SWIN = {"img_size": 64, "depths": [1, 1], "embed_dim": 24, "num_heads": [1, 2], "window_size": 4}


@pytest.mark.parametrize(
    ("arch", "options", "dim"),
    [("resnet18", {}, 512), ("swin_tiny_patch4_window7_224", SWIN, 48), ("mobilenetv3_small_050", {}, 1024)],
)
def test_network_without_tokens_averages_its_feature_map_and_has_no_class_token(arch, options, dim):
    spec = replace(TINY, arch=arch, options=options, dim=dim, input_size=64)
    model = random_model(spec)
    out = embed_tiles(model, tiles(2, 64), device="cpu")
    if arch != "mobilenetv3_small_050":  # it has a layer after pooling
        with torch.no_grad():
            cells = model.forward_features(preprocess(torch.from_numpy(tiles(2, 64)), spec))
        mean = cells.mean((2, 3) if arch == "resnet18" else (1, 2))
        np.testing.assert_allclose(out, mean, atol=1e-5)
    np.testing.assert_array_equal(embed_tiles(random_model(replace(spec, pooling="network")), tiles(2, 64)), out)
    for pooling in ("token", "token+avg"):
        words = rf"pooling is '{re.escape(pooling)}', but {arch} has no class token; use 'avg'"
        with pytest.raises(ValueError, match=words):
            random_model(replace(spec, pooling=pooling))


@pytest.mark.parametrize(
    ("arch", "options", "pooling", "words"),
    [
        ("resnet18", {"global_pool": "max"}, "avg", "resnet18 pools by 'max'; use 'network'"),
        ("vit_tiny_patch16_224", SMALL | {"reg_tokens": 4, "class_token": False, "global_pool": "avg"}, "token",
         "has no class token; use 'avg'"),  # its first token is a register
        ("vit_base_patch16_siglip_224", SMALL, "token+avg", "has no class token; use 'avg'"),
        ("deit_tiny_distilled_patch16_224", SMALL | {"global_pool": "avg"}, "avg", "timm cannot build 'deit_tiny_dist"),
    ],
)  # fmt: skip
def test_unsupported_pooling_is_rejected_with_a_supported_one(arch, options, pooling, words):
    with pytest.raises(ValueError, match=words):
        random_model(replace(TINY, arch=arch, options=options, dim=48, pooling=pooling))


def test_compute_type_depends_on_row_and_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    capability = (7, 0)
    assert precision_for(TINY, "cuda") is torch.float16
    capability = (8, 0)
    assert precision_for(TINY, "cuda") is torch.bfloat16
    assert precision_for(TINY, "cpu") is torch.float32


def test_out_of_memory_error_names_the_option(monkeypatch):
    model = load_backbone("mini", weights="random")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(MemoryError, match=r"16 tiles of mini at once; use --batch-size 8"):
        embed_tiles(model, np.zeros((20, 224, 224, 3), np.uint8), batch_size=16, device="cpu")


# any network -------------------------------------------------------------------------------------------------------


class Colors(torch.nn.Module):
    """A network without weights that returns the mean of each channel and stores its input."""

    def forward(self, x):
        self.seen = x
        return x.mean((2, 3))


def test_any_module_embeds_tiles_with_imagenet_statistics_without_resizing():
    net, x = Colors(), tiles(5, 20)
    out = embed_tiles(net, x, device="cpu")
    assert (out.shape, out.dtype) == ((5, 3), np.float32)
    np.testing.assert_allclose(out, (x.mean((1, 2)) / 255 - IMAGENET[0]) / IMAGENET[1], atol=1e-5)
    assert net.seen.shape == (5, 3, 20, 20)
    wide = embed_tiles(net, x[:, :10], device="cpu")
    np.testing.assert_allclose(wide, (x[:, :10].mean((1, 2)) / 255 - IMAGENET[0]) / IMAGENET[1], atol=1e-5)


def test_any_module_accepts_mean_std_and_input_size():
    net, x = Colors(), np.full((2, 20, 20, 3), 51, dtype=np.uint8)
    given = {"mean": [0.1, 0.2, 0.5], "std": np.array([0.5, 0.1, 1.0]), "input_size": 8}
    out = embed_tiles(net, x, device="cpu", **given)
    np.testing.assert_allclose(out, [[0.2, 0.0, -0.3]] * 2, atol=1e-5)
    assert net.seen.shape == (2, 3, 8, 8)


def test_arguments_override_the_row_of_a_student():
    model = random_model()
    default = embed_tiles(model, tiles(), device="cpu")
    same = embed_tiles(model, tiles(), mean=TINY.mean, std=TINY.std, input_size=32, device="cpu")
    np.testing.assert_array_equal(same, default)
    half = (0.5, 0.5, 0.5)
    other = random_model(replace(TINY, mean=half, std=half))
    got = embed_tiles(model, tiles(), mean=half, std=half, device="cpu")
    np.testing.assert_array_equal(got, embed_tiles(other, tiles(), device="cpu"))
    assert np.abs(got - default).max() > 1e-3


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
def test_module_computes_in_the_dtype_of_its_weights(kind):
    net = torch.nn.Sequential(Colors(), torch.nn.Linear(3, 4, dtype=kind))
    out = embed_tiles(net, tiles(), device="cpu")
    assert net[0].seen.dtype == kind
    np.testing.assert_allclose(out, embed_tiles(net.float(), tiles(), device="cpu"), atol=0.05)
    assert out.dtype == np.float32


def test_student_in_data_parallel_is_unwrapped():
    model = random_model()
    wrapped = torch.nn.DataParallel(model)
    np.testing.assert_array_equal(
        embed_tiles(wrapped, tiles(), device="cpu"), embed_tiles(model, tiles(), device="cpu")
    )
    net = torch.nn.DataParallel(torch.nn.Sequential(Colors()))
    np.testing.assert_array_equal(embed_tiles(net, tiles(), device="cpu"), embed_tiles(Colors(), tiles(), device="cpu"))


def test_embedding_restores_the_mode_of_every_module():
    net = torch.nn.Sequential(Colors(), torch.nn.Dropout(0.9), torch.nn.BatchNorm1d(3)).train()
    net[2].eval()
    out = embed_tiles(net, tiles(), device="cpu")
    np.testing.assert_allclose(out, embed_tiles(net[0], tiles(), device="cpu"), rtol=1e-4)  # nothing dropped
    assert [m.training for m in net] == [True, True, False]
    assert net.training
    with pytest.raises(ValueError, match="whole numbers"):
        embed_tiles(net, tiles().astype(float), device="cpu")
    assert net.training
    assert net[2].num_batches_tracked == 0
    net(torch.ones(2, 3, 4, 4)).sum().backward()  # no stored tensor is an inference tensor


@pytest.mark.parametrize(
    "source",
    [
        lambda x, _: list(x),
        lambda x, _: x.astype(np.int64),
        lambda x, _: x[:, ::-1, ::-1],
        lambda x, path: np.lib.format.open_memmap(path, "w+", x.dtype, x.shape),
    ],
)
def test_tiles_may_be_lists_arrays_views_or_memory_maps(tmp_path, source):
    x = source(tiles(), tmp_path / "x.npy")
    expected = np.asarray(x).mean((1, 2)) / 255
    out = embed_tiles(Colors(), x, mean=(0, 0, 0), std=(1, 1, 1), batch_size=3, device="cpu")
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("net", "x", "options", "words"),
    [
        (torch.nn.Identity(), tiles(), {}, r"returns \(7, 3, 32, 32\) for 7 tiles, not one row of D features per tile"),
        (torch.nn.Flatten(0), tiles(), {}, r"Flatten returns \(21504,\) for 7 tiles"),
        (Colors(), tiles(1)[0], {}, r"tiles must be RGB of shape \(n, H, W, 3\), not \(32, 32, 3\)"),
        (Colors(), tiles().transpose(0, 3, 1, 2), {}, r"tiles must be RGB.*not \(7, 3, 32, 32\)"),
        (Colors(), np.zeros((2, 8, 8, 4), np.uint8), {}, r"tiles must be RGB.*not \(2, 8, 8, 4\)"),
        (Colors(), tiles() / 255, {}, r"whole numbers from 0 to 255 \(uint8\), not these float64; .*\(255 \* tiles\)"),
        (Colors(), tiles().astype(np.uint16) * 257, {}, "not these uint16"),
        (Colors(), tiles() > 99, {}, "not these bool"),
        (Colors(), tiles(0), {}, "there are no tiles, so the number of features of Colors is unknown"),
        (Colors(), tiles(), {"mean": 0.5}, "mean must be three numbers"),
        (Colors(), tiles(), {"mean": (123.7, 116.3, 103.5)}, "mean must be on a scale of 0 to 1.*divide by 255"),
        (Colors(), tiles(), {"std": (0.5, 0, 0.5)}, "std must be on a scale"),
        (Colors(), tiles(), {"input_size": (3, 224, 224)}, r"side of a square in pixels.*not \(3, 224, 224\)"),
        (lambda x: x, tiles(), {}, "the network must be an nn.Module from"),
    ],
)  # fmt: skip
def test_invalid_input_raises_a_one_line_error(net, x, options, words):
    with pytest.raises(ValueError, match=words) as error:
        embed_tiles(net, x, device="cpu", **options)
    assert "\n" not in str(error.value)


def test_student_with_another_output_width_than_its_row_is_rejected():
    model = random_model(replace(TINY, options=TINY.options | {"global_pool": ""}, pooling="network"))
    with pytest.raises(ValueError, match=r"tiny returns \(7, 5, 48\) for 7 tiles, not one row of 48 features"):
        embed_tiles(model, tiles(), device="cpu")
    assert embed_tiles(random_model(), tiles(0), device="cpu").shape == (0, 48)
