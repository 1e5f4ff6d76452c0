"""Adapters act on every kind of attention, and a training in which some would not stops and names the layers."""

from dataclasses import replace
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from test_training import HALF, SIXTEEN, teach
from tiny import TINY

from peka_lite._core._processes import Processes
from peka_lite.adapters._gradients import GradientCheck
from peka_lite.adapters.adapt import adapt, adapter_state, merge
from peka_lite.backbones.load import load_backbone
from peka_lite.transfer.model import TransferModel

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")

SMALL = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2, "global_pool": "avg"}
ROWS = {
    "vit": replace(TINY, options=SMALL | {"depth": 6}),
    "eva": replace(TINY, arch="eva_giant_patch14_224", options=SMALL | {"patch_size": 16}),
    "beit": replace(TINY, arch="beit_base_patch16_224", options=SMALL),
}
THROUGH_PEFT = ["lora", "adalora", "miss"]
METHODS = ["bone", *THROUGH_PEFT]


def student(method, kind="vit", *, bypassed=(), spec=None, steps=90):
    """A student to train; the attention of the `bypassed` blocks reads ``qkv.weight`` itself."""
    backbone = adapt(load_backbone(spec or ROWS[kind], weights="random"), method, r=16, total_steps=steps)
    for block in bypassed:
        bypass(backbone.blocks[block].attn)
    return TransferModel(backbone, teacher_dim=6, n_classes=3, hidden=16)


def bypass(attention):
    def forward(self, x, **_):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).flatten(2))

    attention.forward = MethodType(forward, attention)


def still(model, before):
    """Return the adapted layers of which no tensor has changed."""
    after = adapter_state(model.backbone)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    return [layer for layer in model.backbone.adapter.layers if not any(name.startswith(layer) for name in moved)]


def learns(model, **options):
    before = adapter_state(model.backbone)
    teach(model, **options)
    return still(model, before) == []


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_learns_in_every_layer_of_every_attention(kind, method):
    model = student(method, kind)
    x = torch.randn(2, 3, 32, 32)
    plain = load_backbone(ROWS[kind], weights="random")
    torch.testing.assert_close(model.backbone(x), plain(x))  # adapters start as nothing
    assert learns(model)
    adapted = model.backbone(x)
    assert not torch.allclose(adapted, plain(x))
    torch.testing.assert_close(merge(model.backbone)(x), adapted)


def test_bone_acts_the_same_whether_its_layer_is_called_or_its_weight_is_read():
    called, read = student("bone"), student("bone", bypassed=range(6))
    assert learns(called)
    assert learns(read)
    for a, b in zip(called.parameters(), read.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", THROUGH_PEFT)
def test_one_bypassed_layer_among_six_is_named_alone(method):
    model = student(method, bypassed=[4])
    words = rf"^{method} learns nothing in blocks\.4\.attn\.qkv: .*the first 3 steps; .*'proj', or use method 'bone'"
    with pytest.raises(ValueError, match=words):
        teach(model, epochs=9)


@pytest.mark.parametrize("spec", [HALF, SIXTEEN], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("method", THROUGH_PEFT)
def test_in_half_precision_and_pieces_bypassed_layers_are_named_too(method, spec):
    model = student(method, spec=spec, bypassed=[0, 1])
    with pytest.raises(ValueError, match=r"learns nothing in blocks\.0\.attn\.qkv, blocks\.1\.attn\.qkv: "):
        teach(model, epochs=9, micro_batch=3)


def test_of_many_layers_some_are_named():
    with pytest.raises(ValueError, match=r"in blocks\.0\.attn\.qkv, .*blocks\.3\.attn\.qkv, \.\.\. \(6 layers\): "):
        teach(student("lora", bypassed=range(6)))


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_whose_output_goes_nowhere_is_named(method):
    model = student(method)
    model.backbone.blocks[5].forward = lambda x, **_: x
    with pytest.raises(ValueError, match=r"in blocks\.5\.attn\.qkv: .*does not use what the layer gives") as stop:
        teach(model)
    assert ("reads the layer's weight itself" in str(stop.value)) == (method != "bone")  # Bone's may be read


@pytest.mark.parametrize("gradient", [0.0, torch.nan, torch.inf])
def test_a_gradient_that_is_zero_or_not_finite_is_none(gradient):
    model = student("lora")
    check = GradientCheck(model, scaled=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for p in model.backbone.blocks[2].attn.qkv.parameters():
        p.grad = torch.full_like(p, gradient)
    check.look()
    check.look()
    with pytest.raises(ValueError, match=r"lora learns nothing in blocks\.2\.attn\.qkv: "):
        check.look()


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("method", THROUGH_PEFT)
def test_trainings_of_one_and_two_steps_are_judged_before_their_end_is_kept(tmp_path, method, epochs):
    assert learns(student(method), epochs=epochs, batch_size=20)
    for _ in range(2):  # what a first attempt leaves does not let the second through
        with pytest.raises(ValueError, match="the only step" if epochs == 1 else "the (only|first 2) steps?"):
            teach(
                student(method, bypassed=[1]), epochs=epochs, batch_size=20, checkpoint=tmp_path / "c.pt", resume=True
            )
    assert (tmp_path / "c.pt").is_file() == (epochs > 1)


@pytest.mark.parametrize("method", THROUGH_PEFT)
def test_a_resumed_training_is_judged(tmp_path, method):
    teach(student(method), epochs=2, checkpoint=tmp_path / "c.pt")
    resumed = student(method)
    teach(resumed, epochs=3, checkpoint=tmp_path / "c.pt", resume=True)
    with pytest.raises(ValueError, match=r"in blocks\.3\.attn\.qkv: "):
        teach(student(method, bypassed=[3]), epochs=4, checkpoint=tmp_path / "c.pt", resume=True)


def test_steps_that_scaling_leaves_out_do_not_count(monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kw: scaler(*args, init_scale=2.0**40, **kw))
    checks = []

    class Check(GradientCheck):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            checks.append(self)

    monkeypatch.setattr("peka_lite.transfer._training.GradientCheck", Check)
    teach(student("lora", spec=SIXTEEN, bypassed=[0]), epochs=1)  # three steps, none of them taken
    assert checks[0].steps == 0
    with pytest.raises(ValueError, match=r"in blocks\.0\.attn\.qkv: .* in the first 3 steps"):
        teach(student("lora", spec=SIXTEEN, bypassed=[0]), epochs=20)
    assert learns(student("adalora", spec=SIXTEEN), epochs=12)


def test_once_every_layer_has_had_a_gradient_nothing_is_looked_at():
    model = student("bone")
    check = GradientCheck(model, scaled=False)
    z, logits = model(torch.randn(4, 3, 32, 32))
    (z.square().mean() + logits.square().mean()).backward()
    check.look()
    assert check.steps == 1
    check.look()
    assert check.steps == 1


def test_a_gradient_that_only_another_process_had_counts(monkeypatch):
    def summed(self, parameters):
        for p in parameters:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad

    model = student("lora", bypassed=[1])
    monkeypatch.setattr(Processes, "add_gradients", summed)
    assert learns(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_loss_is_no_fault_of_the_layers(method):
    with pytest.raises(ValueError, match=r"the loss had no gradient in the first 3 steps.*kd_weight or ce_weight"):
        teach(student(method), kd_weight=0.0, ce_weight=0.0)
    assert learns(student(method), kd_weight=0.0)
    assert learns(student(method), ce_weight=0.0)


def test_a_student_without_adapters_trains_its_projector():
    model = student("none")
    before = [p.clone() for p in model.projector.parameters()]
    assert len(teach(model)) == 1
    assert all(not torch.equal(a, b) for a, b in zip(before, model.projector.parameters(), strict=True))
