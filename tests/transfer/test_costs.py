"""Estimated operations and memory equal manual sums and autograd; out-of-memory errors name options that help."""

import re
from dataclasses import replace

import pytest
import torch

from peka_lite.adapters import adapt
from peka_lite.backbones import BACKBONES, load_backbone
from peka_lite.transfer import Cost, student_cost
from peka_lite.transfer.costs import explain_out_of_memory
from peka_lite.transfer.memory import frozen_dtype

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")

# width, depth, hidden width, patch, block size of Bone
SHAPES = {"mini": (192, 6, 768, 16, 32), "uni": (1024, 24, 4096, 16, 256)}
EXAMPLE = Cost(
    forward=10, backward=7, step_forward=100, step_backward=30, weights=1000, adapters=160, stored=50,
    stored_recomputed=20, step_stored=400,
)  # fmt: skip


def by_hand(name):
    """Return operations of the patch embedding, a block's linear layers and its attention product, and the depth."""
    d, depth, hidden, patch, _ = SHAPES[name]
    patches = (BACKBONES[name].input_size // patch) ** 2
    tokens = patches + 1
    embed = 2 * patches * d * 3 * patch**2
    linear = {"qkv": 2 * tokens * 3 * d * d, "proj": 2 * tokens * d * d, "mlp": 2 * 2 * tokens * d * hidden}
    product = 2 * tokens * tokens * d  # all heads: q k', and the same for weights v
    return embed, linear, product, depth


@pytest.mark.parametrize("name", SHAPES)
def test_forward_operations_equal_the_manual_sum(name):
    embed, linear, product, depth = by_hand(name)
    assert student_cost(name, "none").forward == embed + depth * (sum(linear.values()) + 2 * product)


@pytest.mark.parametrize("name", SHAPES)
def test_backward_operations_exclude_frozen_weights(name):
    _, linear, product, depth = by_hand(name)
    # Attention: scores recomputed, and gradients of scores, values, queries and keys. The gradient of a merged weight
    # adds one product; the first block's input needs no gradient.
    expected = depth * (sum(linear.values()) + 5 * product + linear["qkv"]) - linear["qkv"]
    cost = student_cost(name, "bone")
    assert cost.backward == expected
    assert cost.backward < 1.5 * cost.forward  # twice for full fine-tuning


@pytest.mark.parametrize("name", SHAPES)
def test_step_merges_every_weight_once_for_any_batch(name):
    d, depth, _, _, r = SHAPES[name]
    cost = student_cost(name, "bone")
    assert cost.step_forward == cost.step_backward == depth * 2 * 3 * d * d * r
    assert cost.step_stored == depth * 3 * d * d * 2


def test_without_adapters_there_is_no_backward_pass():
    cost = student_cost("mini", "none")
    assert {
        cost.backward,
        cost.step_backward,
        cost.stored,
        cost.stored_recomputed,
        cost.step_stored,
        cost.adapters,
    } == {0}
    assert student_cost("resnet50", "none").forward > 8e9  # 4.1e9 multiply-adds


def test_weights_and_adapters_are_counted_in_bytes():
    model = adapt(load_backbone("mini", weights="random"), "bone", r=32)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for half, size in ((True, 2), (False, 4)):
        cost = student_cost("mini", "bone", half=half)
        assert cost.weights == size * model.adapter.n_base
        assert cost.adapters == 4 * 4 * trainable  # weights, gradients, two moments


def saved_bytes(method, tiles, *, half):
    """Return bytes of the tensors that autograd saves in a CPU step, without weights."""
    model = adapt(load_backbone("mini", weights="random"), method, r=32, total_steps=10)
    for name in model.adapter.layers:
        model.get_submodule(name).train()  # with dropout, as in training
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    dtype = torch.bfloat16 if half else torch.float32
    with frozen_dtype(model, dtype), torch.autocast("cpu", dtype, enabled=half):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            model(torch.zeros(tiles, 3, 112, 112))
    return sum(tensor.untyped_storage().nbytes() for at, tensor in saved.items() if at not in weights)


@pytest.mark.parametrize(("method", "half"), [("bone", False), ("bone", True), ("lora", True), ("miss", False)])
def test_saved_bytes_equal_those_of_autograd(method, half):
    cost = student_cost("mini", method, r=32, half=half)
    for tiles in (1, 3):
        assert cost.step_stored + tiles * cost.stored == pytest.approx(saved_bytes(method, tiles, half=half), rel=1e-4)


def test_recompute_saves_one_block_and_all_block_inputs():
    cost = student_cost("mini", half=False)
    assert cost.stored_recomputed == pytest.approx(6 * 50 * 192 * 4 + cost.stored / 6, abs=1)
    assert cost.stored_recomputed < cost.stored / 3


def test_recompute_saves_less_for_another_architecture():
    cost = student_cost("h0-mini")
    assert 0 < cost.stored_recomputed < cost.stored / 4


def test_memory_is_the_sum_of_weights_adapters_and_saved_tensors():
    assert EXAMPLE.memory(4) == 1000 + 160 + 400 + 4 * 50
    assert EXAMPLE.memory(4, recompute=True) == 1000 + 160 + 4 * 20


def test_operations_are_the_sum_of_a_step():
    assert EXAMPLE.operations(4) == 4 * 10 + 100 + 4 * 7 + 30
    assert EXAMPLE.operations(4, recompute=True) == 2 * (4 * 10 + 100) + 4 * 7 + 30


# out of memory --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mini():
    return adapt(load_backbone("mini", weights="random"), "bone", r=32)


def advice(model, tiles, *, recompute=False):
    return str(explain_out_of_memory(model, torch.device("cpu"), tiles=tiles, recompute=recompute))


def numbers(message):
    return [float(n) for n in re.findall(r"about ([\d.]+) GiB", message)]


def test_memory_error_has_decreasing_estimates(mini):
    message = advice(mini, 10_000)
    assert isinstance(explain_out_of_memory(mini, torch.device("cpu"), tiles=4, recompute=False), MemoryError)
    assert message.startswith("cpu ran out of memory at 10000 tiles at once (about ")
    whole, half, recomputed = numbers(message)
    assert whole > half > recomputed > 0
    cost = student_cost("mini", half=False)
    expected = [cost.memory(10_000), cost.memory(5_000), cost.memory(10_000, recompute=True)]
    assert [whole, half, recomputed] == pytest.approx([n / 2**30 for n in expected], abs=0.05)
    assert "--micro-batch 5000" in message


def test_recompute_is_not_suggested_if_it_is_on(mini):
    message = advice(mini, 10_000, recompute=True)
    assert "--recompute" not in message
    whole, half = numbers(message)
    assert whole > half


def test_smaller_micro_batch_is_not_suggested_for_one_tile(mini):
    assert "--micro-batch" not in advice(mini, 1)
    assert "--recompute" in advice(mini, 1)
    assert advice(mini, 1, recompute=True).endswith("use a GPU with more memory, or a smaller backbone")


def test_recompute_is_not_suggested_without_blocks():
    model = adapt(load_backbone("resnet50", weights="random"), "none")
    assert "--micro-batch 4" in advice(model, 8)
    assert "--recompute" not in advice(model, 8)


def test_custom_backbone_has_no_estimates(mini):
    mini.spec = replace(mini.spec, name="custom")
    assert advice(mini, 8) == (
        "cpu ran out of memory at 8 tiles at once; --micro-batch 4 gives the same results; "
        "--recompute does too, in a third more time"
    )


def test_suggested_options_exist_on_the_command_line(mini, capsys):
    from peka_lite.cli.main import main

    with pytest.raises(SystemExit):
        main(["run", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z-]+", advice(mini, 8))) <= known
