"""Bone equals the equation and the reference; all adapters start without effect and can be merged."""

import warnings

import numpy as np
import peft
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from tiny import TINY
from torch import nn

from peka_lite.adapters import BoneLinear, adapt, adapted_share, adapter_state, lora_rank_like_bone, merge
from peka_lite.adapters._choices import METHODS
from peka_lite.adapters.adapt import load_adapter_state, orthogonal_term
from peka_lite.backbones import BACKBONES, build_network, load_backbone
from peka_lite.backbones.registry import check_block_size

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")

CASES = ["in64_out192_r16", "in64_out192_r32", "in96_out96_r16", "in96_out96_r32", "in64_out64_r16", "in64_out64_r32"]
TRAINABLE = [m for m in METHODS if m != "none"]


def tiny(seed=0):
    return load_backbone(TINY, weights="random", seed=seed)


def adapted(method, seed=0, r=16, **options):
    return adapt(tiny(), method, r=r, seed=seed, total_steps=10 if method == "adalora" else None, **options)


def perturb(model, seed=0, size=0.05):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=draw))
    return model


def images(n=3):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def outputs(model):
    return model.eval()(images()).numpy()


@pytest.fixture(params=CASES)
def case(request, golden):
    return {k: torch.from_numpy(v) for k, v in np.load(golden / "bone" / f"bone_{request.param}.npz").items() if v.ndim}


def golden_layer(case, block):
    base = nn.Linear(case["weight"].shape[1], case["weight"].shape[0])
    with torch.no_grad():
        base.weight.copy_(case["weight"])
        base.bias.copy_(case["bias"])
        layer = BoneLinear(base, r=block.shape[-1])
        layer.block.copy_(block)
    return layer


def test_bone_output_equals_the_reference(case):
    y = golden_layer(case, case["block"])(case["x"])
    np.testing.assert_allclose(y.detach(), case["y"], rtol=0, atol=1e-5)


def test_bone_gradients_equal_the_reference(case):
    layer, x = golden_layer(case, case["block"]), case["x"].clone().requires_grad_()
    (layer(x) * case["grad_out"]).sum().backward()
    np.testing.assert_allclose(layer.block.grad, case["grad_block"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(x.grad, case["grad_x"], rtol=0, atol=1e-5)


def test_bone_merged_weight_equals_the_reference(case):
    merged = golden_layer(case, case["block"]).merged_weight()
    np.testing.assert_allclose(merged.detach(), case["merged_weight"], rtol=0, atol=1e-6)


def test_bone_zero_start_equals_the_reference(case):
    layer = golden_layer(case, torch.zeros_like(case["block"]))
    np.testing.assert_allclose(layer(case["x"]).detach(), case["y_zero_block"], rtol=0, atol=1e-5)


def test_bone_starts_as_its_base_bit_for_bit():
    base = nn.Linear(32, 96)
    x = torch.randn(5, 32)
    assert torch.equal(BoneLinear(base, r=16)(x), base(x))


@settings(max_examples=20, deadline=None)
@given(
    r=st.integers(1, 6),
    bands=st.integers(1, 4),
    columns=st.integers(1, 4),
    bias=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_bone_equals_a_double_loop_over_tiles(r, bands, columns, bias, seed):
    rng = np.random.default_rng(seed)
    base = nn.Linear(columns * r, bands * r, bias=bias, dtype=torch.float64)
    layer = BoneLinear(base, r=r).double()
    with torch.no_grad():
        layer.block.copy_(torch.from_numpy(rng.normal(size=(bands, r, r))))
    W, B = base.weight.numpy(), layer.block.detach().numpy()
    expected = np.empty_like(W)
    for g in range(bands):
        for c in range(columns):
            at = np.s_[g * r : (g + 1) * r, c * r : (c + 1) * r]
            expected[at] = W[at] + W[at] @ B[g] + B[g]
    x = rng.normal(size=(3, columns * r))
    y = x @ expected.T + (base.bias.numpy() if bias else 0)
    np.testing.assert_allclose(layer(torch.from_numpy(x)).detach(), y, atol=1e-12)


def test_bone_trains_its_block_and_nothing_else():
    layer = BoneLinear(nn.Linear(32, 96), r=16)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters() if p.requires_grad} == {"block": (6, 16, 16)}


@pytest.mark.parametrize(("shape", "r"), [((64, 192), 48), ((48, 64), 48), ((64, 96), 64), ((64, 64), 0)])
def test_block_size_must_divide_both_sides(shape, r):
    with pytest.raises(ValueError, match=rf"r={r} must divide in_features={shape[0]} and out_features={shape[1]}"):
        BoneLinear(nn.Linear(*shape), r=r)


def test_error_for_the_block_size_lists_all_that_fit():
    with pytest.raises(ValueError, match=r"these would: 1, 2, 4, 8, 16, 32$"):
        BoneLinear(nn.Linear(64, 96), r=5)


@pytest.mark.parametrize("name", ["uni", "h-optimus-0", "uni2-h", "h0-mini", "virchow2", "gigapath", "mini"])
def test_default_block_size_fits_each_student(name):
    check_block_size(BACKBONES[name], BACKBONES[name].bone_r)


@pytest.mark.parametrize("name", [name for name, spec in BACKBONES.items() if spec.bone_r])
def test_check_block_size_uses_the_widths_of_the_student(name):
    with torch.device("meta"):
        model = build_network(BACKBONES[name])
    layers = [module for path, module in model.named_modules() if path.endswith("attn.qkv")]
    r = layers[0].in_features - 1
    with pytest.raises(ValueError, match=f"^r={r} must divide") as error:
        check_block_size(BACKBONES[name], r)
    for layer in layers:
        with pytest.raises(ValueError, match="must divide") as other:
            BoneLinear(layer, r=r)
        assert str(error.value) == str(other.value)


def test_check_block_size_needs_no_weights():
    with pytest.raises(ValueError, match="r=100 must divide in_features=1024 and out_features=3072"):
        check_block_size(BACKBONES["uni"], 100)


@pytest.mark.parametrize("name", ["uni", "h-optimus-0"])
def test_bone_adapts_four_to_seven_percent_of_the_papers_students(name):
    with torch.device("meta"):
        model = adapt(build_network(BACKBONES[name]), "bone", r=BACKBONES[name].bone_r)
    assert 0.04 < adapted_share(model) < 0.07


@pytest.mark.parametrize("method", TRAINABLE)
def test_every_qkv_layer_is_adapted_and_no_other(method):
    model = adapted(method)
    assert model.adapter.layers == ("blocks.0.attn.qkv", "blocks.1.attn.qkv")
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.rpartition(".attn.qkv.")[0] for n in trainable} == {"blocks.0", "blocks.1"}


@pytest.mark.parametrize("method", TRAINABLE)
def test_targets_selects_another_attention_layer(method):
    assert adapted(method, targets="proj").adapter.layers == ("blocks.0.attn.proj", "blocks.1.attn.proj")


def test_method_none_freezes_everything():
    model = adapted("none")
    assert not any(p.requires_grad for p in model.parameters())
    assert adapted_share(model) == 0


@pytest.mark.parametrize("method", TRAINABLE)
def test_adapted_student_first_has_unchanged_outputs(method):
    np.testing.assert_allclose(outputs(adapted(method)), outputs(tiny()), atol=1e-6)


@pytest.mark.parametrize("method", TRAINABLE)
def test_trained_adapters_change_the_outputs(method):
    assert np.abs(outputs(perturb(adapted(method))) - outputs(tiny())).max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_merge_gives_a_plain_timm_model_with_the_same_outputs(method):
    model = perturb(adapted(method))
    before = outputs(model)
    merged = merge(model)
    np.testing.assert_allclose(outputs(merged), before, atol=1e-5)
    plain = build_network(TINY).eval()
    plain.load_state_dict(merged.state_dict(), strict=True)
    np.testing.assert_allclose(outputs(plain), before, atol=1e-5)


@pytest.mark.parametrize("method", TRAINABLE)
def test_merge_changes_the_adapted_weights_only(method):
    merged, plain = merge(perturb(adapted(method))).state_dict(), tiny().state_dict()
    changed = {k for k in plain if not torch.equal(plain[k], merged[k])}
    assert changed == {"blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"}


@pytest.mark.parametrize("method", TRAINABLE)
def test_merged_student_can_be_adapted_again(method):
    model = merge(perturb(adapted(method)))
    before = outputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns about remains of an earlier adapter
        adapt(model, "lora", r=4)
    np.testing.assert_allclose(outputs(model), before, atol=1e-6)


def test_merging_twice_is_rejected():
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(merge(adapted("bone")))


@pytest.mark.parametrize("method", METHODS)
def test_second_adapter_is_rejected(method):
    with pytest.raises(ValueError, match=f"already has adapter '{method}'"):
        adapt(adapted(method), "bone", r=16)


@pytest.mark.parametrize("method", TRAINABLE)
@pytest.mark.parametrize("name", ["resnet50", "ctranspath"])
def test_convolutional_and_windowed_students_support_only_none(name, method):
    with torch.device("meta"):
        model = build_network(BACKBONES[name])
    model.spec = BACKBONES[name]
    with pytest.raises(ValueError, match=f"{name} supports only method 'none'"):
        adapt(model, method, r=16, total_steps=10)
    assert adapted_share(adapt(model, "none")) == 0


def test_model_without_the_target_layer_is_rejected():
    with pytest.raises(ValueError, match=r"attn\.q_proj"):
        adapt(tiny(), "bone", r=16, targets="q_proj")


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'dora'.*none, bone, lora, adalora, miss"):
        adapt(tiny(), "dora")


def test_adalora_needs_the_number_of_steps():
    with pytest.raises(ValueError, match="adalora needs total_steps"):
        adapt(tiny(), "adalora", r=4)


def test_adalora_needs_a_rank_that_can_be_halved():
    with pytest.raises(ValueError, match="r must be at least 2, not 1"):
        adapted("adalora", r=1)


def test_rejected_adapter_does_not_change_the_student():
    model = tiny()
    with pytest.raises(ValueError, match="r=7 must divide"):
        adapt(model, "bone", r=7)
    assert model.state_dict().keys() == tiny().state_dict().keys()
    assert adapt(model, "bone", r=16).adapter.method == "bone"


@pytest.mark.parametrize("method", TRAINABLE)
def test_load_adapter_state_restores_the_student(method):
    trained = perturb(adapted(method, seed=1))
    loaded = load_adapter_state(adapted(method, seed=2), adapter_state(trained))
    assert np.array_equal(outputs(loaded), outputs(trained))


@pytest.mark.parametrize("method", TRAINABLE)
def test_adapter_state_has_all_adapter_tensors_and_no_others(method):
    model = adapted(method)
    saved = adapter_state(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable <= saved.keys()
    assert saved.keys() - trainable == {n for n, _ in model.named_parameters() if "ranknum" in n}


def test_adapter_state_returns_copies():
    model = adapted("bone")
    saved = adapter_state(model)
    perturb(model)
    assert all(not v.any() for v in saved.values())


def test_adapters_of_another_method_are_rejected():
    with pytest.raises(ValueError, match="adapt with the same method"):
        load_adapter_state(adapted("bone"), adapter_state(adapted("lora")))


def test_adapters_of_another_block_size_are_rejected():
    with pytest.raises(ValueError, match=r"is \(9, 16, 16\) in the file, \(6, 24, 24\) in the model"):
        load_adapter_state(adapted("bone", r=24), adapter_state(adapted("bone", r=16)))


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_initial_weights_depend_on_the_seed(method):
    first, again, other = (adapter_state(adapted(method, seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("method", METHODS)
def test_adapt_does_not_change_the_global_random_state(method):
    model = tiny()
    before = torch.get_rng_state()
    adapt(model, method, r=16, total_steps=10)
    assert torch.equal(before, torch.get_rng_state())


def test_adalora_prunes_to_half_its_starting_rank():
    config = adapted("adalora", r=12).adapter.tuner.peft_config["default"]
    assert (config.init_r, config.target_r, config.total_step) == (12, 6, 10)


@pytest.mark.parametrize(("into", "out", "r"), [(1024, 3072, 256), (1536, 4608, 256), (192, 576, 32)])
def test_lora_rank_like_bone_has_at_most_bones_parameters(into, out, r):
    rank = lora_rank_like_bone(into, out, r)
    assert rank * (into + out) <= out * r < (rank + 1) * (into + out)


def test_orthogonal_term_equals_pefts_formula():
    model = perturb(adapted("adalora", r=4))

    class Loss(nn.Module):  # peft adds its regularizer to a model output's .loss
        def __init__(self):
            super().__init__()
            self.vit = timm.create_model(TINY.arch, num_classes=0, **TINY.options)

        def forward(self):
            return type("Output", (), {"loss": torch.zeros(())})()

    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=r".*attn\.qkv", orth_reg_weight=1.0)
    reference = peft.AdaLoraModel(Loss(), {"default": config}, "default")
    state = adapter_state(model)
    reference.model.vit.load_state_dict(state, strict=False)
    assert orthogonal_term(model).item() == pytest.approx(reference().loss.item(), rel=1e-6)


# Bone's product has a custom backward pass, compared with plain autograd.


def random_layer(into=12, out=18, r=6, *, bias=True, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layer = BoneLinear(nn.Linear(into, out, bias=bias), r=r).to(dtype)
    with torch.no_grad():
        layer.block.normal_(std=0.3)
    return layer


def plain_bone(layer, x, block):
    """Return the layer's output computed by plain autograd."""
    W, r = layer.base.weight.to(block.dtype), layer.r
    tiles = W.view(len(block), r, -1, r)
    update = torch.einsum("gict,gtj->gicj", tiles, block) + block[:, :, None, :]
    return nn.functional.linear(x, (tiles + update).reshape(W.shape), layer.base.bias)


@pytest.fixture(autouse=True)
def _restore_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 12), (2, 3, 12), (12,)])
def test_bone_gradients_equal_finite_differences(shape, bias):
    layer = random_layer(bias=bias, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def output(x, block):
        return torch.func.functional_call(layer, {"block": block}, (x,))

    assert torch.autograd.gradcheck(output, (x, layer.block))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)])
def test_bone_gradients_equal_plain_autograd(shape, needed, bias):
    layer, x = random_layer(bias=bias), torch.randn(shape).requires_grad_(needed)
    grad = torch.randn(*shape[:-1], 18)
    inputs = [layer.block, x] if needed else [layer.block]
    actual = torch.autograd.grad(layer(x), inputs, grad)
    expected = torch.autograd.grad(plain_bone(layer, x, layer.block), inputs, grad)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bone_gradients_are_correct_for_a_strided_part_of_a_batch():
    layer, x = random_layer(), torch.randn(2, 5, 12)
    actual, expected = (
        torch.autograd.grad(y.transpose(0, 1)[1:4, :, ::2].square().sum(), layer.block)[0]
        for y in (layer(x), plain_bone(layer, x, layer.block))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_frozen_block_has_no_gradient_but_the_input_has(monkeypatch):
    layer, x = random_layer(), torch.randn(4, 12, requires_grad=True)
    layer.block.requires_grad_(False)
    monkeypatch.setattr(torch, "bmm", None)  # used for the block's gradient only
    layer(x).sum().backward()
    assert layer.block.grad is None
    torch.testing.assert_close(x.grad, layer.merged_weight().sum(0).expand(4, -1), rtol=1e-5, atol=1e-5)


def test_bone_under_autocast_has_half_outputs_and_float32_gradients():
    layer, x = random_layer(64, 64, r=16), torch.randn(7, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert (layer.block.grad.dtype, x.grad.dtype) == (torch.float32, torch.float32)
    block = layer.block.detach().clone().requires_grad_()
    plain_bone(layer, x.detach(), block).square().sum().backward()
    torch.testing.assert_close(layer.block.grad, block.grad, rtol=0.02, atol=0.02 * block.grad.abs().max().item())


def saved_bytes(run, *, known=()):
    """Return bytes of the tensors that autograd saves during `run`, and of those not in `known`."""
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        run().sum()
    size = {at: tensor.untyped_storage().nbytes() for at, tensor in saved.items()}
    pointers = {tensor.data_ptr() for tensor in known}
    return sum(size.values()), sum(n for at, n in size.items() if at not in pointers)


def test_bone_saves_only_its_input_and_the_merged_weight():
    layer, x = random_layer(32, 96, r=16), torch.randn(5, 32, requires_grad=True)
    W = layer.base.weight
    assert saved_bytes(lambda: layer(x), known=(W, layer.block, x)) == (
        4 * (2 * 96 * 32 + 6 * 16 * 16 + 5 * 32),
        4 * 96 * 32,
    )


def test_bone_under_autocast_saves_no_float32_copy_unlike_plain_autograd():
    layer, x = random_layer(32, 96, r=16), torch.randn(5, 32, requires_grad=True)
    layer.base.to(torch.bfloat16)  # as in `frozen_dtype`
    known = (layer.base.weight, layer.block)
    with torch.autocast("cpu", torch.bfloat16):
        _, bone = saved_bytes(lambda: layer(x), known=known)
        _, plain = saved_bytes(lambda: plain_bone(layer, x, layer.block), known=known)
    assert bone == 2 * (96 * 32 + 5 * 32)
    assert bone < plain


def test_bone_can_be_recomputed():
    layer, x = random_layer(), torch.randn(4, 12, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), (layer.block, x))
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), (layer.block, x)), plain, strict=True):
        assert torch.equal(a, b)


def test_second_derivative_of_bone_is_rejected():
    layer, x = random_layer(), torch.randn(4, 12, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
