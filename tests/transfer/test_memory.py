"""Saving memory changes neither outputs nor gradients; a model that cannot be compiled is trained uncompiled."""

import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peka_lite.adapters import BoneLinear, adapt
from peka_lite.backbones import Backbone, load_backbone
from peka_lite.backbones.registry import IMAGENET
from peka_lite.transfer.memory import checkpoint_blocks, compile_if_possible, frozen_dtype

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")

TINY = Backbone(
    "tiny", "vit_tiny_patch16_224", None, 48, *IMAGENET, "BSD-3-Clause", input_size=32, pooling="avg", bone_r=16,
    options={"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 2, "global_pool": "avg", "init_values": 0.1},
)  # fmt: skip
CNN = Backbone("cnn", "resnet18", None, 512, *IMAGENET, "BSD-3-Clause", input_size=32, pooling="avg", bone_r=None)


def student(method="bone", *, dropout=0.3):
    """Return a tiny student with perturbed adapters, in training mode as in `fit`."""
    model = adapt(load_backbone(TINY, weights="random"), method, r=16, dropout=dropout, total_steps=10)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
    for name in model.adapter.layers:
        model.get_submodule(name).train()
    return model


def images(n=4):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def weights(model):
    return {n: v.clone() for n, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def step(model, *, dtype=torch.float32):
    """Run a step with dropout from a fixed seed; return output, gradients by name and bytes saved by autograd."""
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        with (
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        ):
            y = model(images())
        y.float().square().sum().backward()
    n_bytes = sum(tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in parameters)
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, n_bytes


# frozen weights -------------------------------------------------------------------------------------------------------


def test_only_frozen_linear_and_convolution_weights_are_cast():
    model = student("lora")
    products = {
        f"{name}.{p}" for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
        for p, value in m.named_parameters(recurse=False) if not value.requires_grad
    }  # fmt: skip
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.base_layer.weight", "blocks.2.mlp.fc2.bias"} <= products
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    with frozen_dtype(model, torch.bfloat16):
        for name, p in model.named_parameters():
            assert p.dtype == (torch.bfloat16 if name in products else torch.float32), name
            assert (p.data_ptr() != before[name]) == (name in products), name


@pytest.mark.parametrize("method", ["none", "bone", "lora"])
def test_weights_are_restored_bit_for_bit(method):
    model = student(method)
    before, ids = weights(model), [id(p) for p in model.parameters()]
    with frozen_dtype(model, torch.bfloat16):
        assert not same(weights(model), before)
    assert same(weights(model), before)
    assert [id(p) for p in model.parameters()] == ids  # the optimizer refers to them


@pytest.mark.parametrize("stop", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_weights_are_restored_after_an_exception(stop):
    model = student()
    before = weights(model)
    with pytest.raises(type(stop)), frozen_dtype(model, torch.bfloat16):
        raise stop
    assert same(weights(model), before)


def test_trained_weights_are_not_reset():
    model = student()
    before = weights(model)
    with frozen_dtype(model, torch.bfloat16):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        step(model, dtype=torch.bfloat16)
        optimizer.step()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad} != set()


def test_casting_to_the_same_dtype_changes_nothing():
    model = student()
    before = [p.data_ptr() for p in model.parameters()]
    with frozen_dtype(model, torch.float32):
        assert [p.data_ptr() for p in model.parameters()] == before


@pytest.mark.parametrize("method", ["none", "bone", "lora"])
def test_outputs_and_gradients_equal_plain_autocast_bit_for_bit(method):
    model = student(method)
    for p in model.parameters():
        p.requires_grad_(p.requires_grad or p is model.pos_embed)  # "none" needs a parameter with a gradient
    y, grads, n_bytes = step(model, dtype=torch.bfloat16)
    assert not torch.equal(y, step(model)[0])  # autocast has an effect
    with frozen_dtype(model, torch.bfloat16):
        y_cast, grads_cast, n_bytes_cast = step(model, dtype=torch.bfloat16)
    assert torch.equal(y_cast, y)
    assert same(grads_cast, grads)
    assert n_bytes_cast < n_bytes


# recomputed blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["bone", "lora", "adalora", "miss"])
def test_recomputed_gradients_are_bit_identical_with_dropout(method, dtype):
    model = student(method)
    y, grads, n_bytes = step(model, dtype=dtype)
    with checkpoint_blocks(model):
        y_again, grads_again, n_bytes_again = step(model, dtype=dtype)
    assert torch.equal(y_again, y)
    assert same(grads_again, grads)
    assert len(grads) > 0
    assert n_bytes_again < n_bytes / 10  # these hooks do not see the inputs of blocks


def test_dropout_changes_the_output():
    assert not torch.equal(step(student("lora"))[0], step(student("lora", dropout=0.0))[0])


def test_every_block_is_recomputed_once_and_not_after_exit():
    model, runs = student(), []
    for i, block in enumerate(model.blocks):
        block.norm1.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    with checkpoint_blocks(model):
        step(model)
    assert runs == [0, 1, 2, 2, 1, 0]
    runs.clear()
    step(model)
    assert runs == [0, 1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_blocks_are_restored(fails):
    model = student()
    before = [set(block.__dict__) for block in model.blocks]
    try:
        with checkpoint_blocks(model):
            assert all("forward" in block.__dict__ for block in model.blocks)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [set(block.__dict__) for block in model.blocks] == before


def test_student_without_blocks_is_rejected():
    with (
        pytest.raises(ValueError, match="ResNet has no transformer blocks to recompute"),
        checkpoint_blocks(load_backbone(CNN, weights="random")),
    ):
        pass


# compilation ----------------------------------------------------------------------------------------------------------


def failing(error):
    def compile(model, **_):
        def run(*args):
            model(*args).float().sum().backward()  # gradients that must be cleared
            raise error

        return run

    return compile


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("\n  Failed to find C compiler.\nSet CC."), r"\(RuntimeError:   Failed to find C compiler\.\)"),
        (AssertionError(), r"\(AssertionError: \)"),
    ],
)
def test_failing_compiler_warns_and_training_continues(monkeypatch, error, message):
    model = student()
    monkeypatch.setattr(torch, "compile", failing(error))
    before, random = weights(model), torch.get_rng_state()
    with pytest.warns(UserWarning, match=rf"torch\.compile failed {message}; training continues without it"):
        network = compile_if_possible(model, lambda network: network(images()).sum())
    assert network is model
    assert all(p.grad is None for p in model.parameters())
    assert same(weights(model), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_unsupported_compilation_warns_and_training_continues(monkeypatch):
    def refuse(model, **_):
        raise RuntimeError("torch.compile is not supported on Python 3.99")

    model = student()
    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(UserWarning, match="not supported on Python"):
        assert compile_if_possible(model, lambda network: network(images()).sum()) is model


def test_keyboard_interrupt_is_not_treated_as_a_compiler_error(monkeypatch):
    monkeypatch.setattr(torch, "compile", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        compile_if_possible(student(), lambda network: network(images()).sum())


def test_working_compiler_is_used_and_its_trial_leaves_no_gradients(monkeypatch):
    model = student()
    monkeypatch.setattr(torch, "compile", lambda model, **_: nn.Sequential(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = compile_if_possible(model, lambda network: network(images()).sum())
    assert list(network.children()) == [model]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is absent: torch.compile has no C++ compiler for the CPU")
def test_compiled_network_trains_like_the_plain_one(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Shorten compilation: plain loops, no test of vector instructions, no precompiled headers.
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor, "compile_threads", 1)
    monkeypatch.setattr(inductor, "cpp_cache_precompile_headers", False)
    monkeypatch.setattr(inductor.cpp, "vec_isa_ok", False)
    x, target = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 4
    losses = {}
    for kind in ("plain", "compiled"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(BoneLinear(nn.Linear(8, 16), r=4), nn.GELU(), nn.Linear(16, 4))
        network, before = model, torch.get_rng_state()
        if kind == "compiled":
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="torch.compile failed")
                network = compile_if_possible(model, lambda network: F.cross_entropy(network(x), target))
            assert isinstance(network, torch._dynamo.OptimizedModule)
            assert all(p.grad is None for p in model.parameters())
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses[kind] = []
        for _ in range(10):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(network(x), target)
            loss.backward()
            optimizer.step()
            losses[kind].append(loss.item())
        assert torch.equal(torch.get_rng_state(), before)
    assert losses["plain"][-1] < 0.8 * losses["plain"][0]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-4)
    torch._dynamo.reset()
