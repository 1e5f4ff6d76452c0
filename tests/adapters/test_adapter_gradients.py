"""Adapters are trained in every attention layer; a training without adapter gradients stops and names the layers."""

import importlib
from dataclasses import replace
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from test_training import HALF, SIXTEEN, train
from tiny import TINY

from peka_lite._core._processes import Processes
from peka_lite.adapters import adapt, adapter_state, merge
from peka_lite.adapters._gradients import GradientCheck
from peka_lite.backbones import load_backbone
from peka_lite.transfer import TransferModel

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
    """Return a student whose attention in the `bypassed` blocks reads ``qkv.weight`` directly."""
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


def unchanged_layers(model, before):
    """Return the adapted layers without a changed tensor."""
    after = adapter_state(model.backbone)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return [layer for layer in model.backbone.adapter.layers if not any(name.startswith(layer) for name in changed)]


def trains_all_layers(model, **options):
    before = adapter_state(model.backbone)
    train(model, **options)
    return unchanged_layers(model, before) == []


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_train_in_every_layer_of_every_attention_type(kind, method):
    model = student(method, kind)
    x = torch.randn(2, 3, 32, 32)
    plain = load_backbone(ROWS[kind], weights="random")
    torch.testing.assert_close(model.backbone(x), plain(x))  # adapters start without effect
    assert trains_all_layers(model)
    adapted = model.backbone(x)
    assert not torch.allclose(adapted, plain(x))
    torch.testing.assert_close(merge(model.backbone)(x), adapted)


def test_bone_gives_the_same_training_if_its_weight_is_read_directly():
    called, read = student("bone"), student("bone", bypassed=range(6))
    assert trains_all_layers(called)
    assert trains_all_layers(read)
    for a, b in zip(called.parameters(), read.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", THROUGH_PEFT)
def test_only_the_bypassed_layer_is_named(method):
    model = student(method, bypassed=[4])
    message = rf"^{method} does not train blocks\.4\.attn\.qkv: .*the first 3 steps; .*'proj', or use method 'bone'"
    with pytest.raises(ValueError, match=message):
        train(model, epochs=9)


@pytest.mark.parametrize("spec", [HALF, SIXTEEN], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("method", THROUGH_PEFT)
def test_bypassed_layers_are_named_in_half_precision_and_micro_batches(method, spec):
    model = student(method, spec=spec, bypassed=[0, 1])
    with pytest.raises(ValueError, match=r"does not train blocks\.0\.attn\.qkv, blocks\.1\.attn\.qkv: "):
        train(model, epochs=9, micro_batch=3)


def test_message_names_four_of_many_layers():
    with pytest.raises(ValueError, match=r"train blocks\.0\.attn\.qkv, .*blocks\.3\.attn\.qkv, \.\.\. \(6 layers\): "):
        train(student("lora", bypassed=range(6)))


@pytest.mark.parametrize("method", METHODS)
def test_layer_with_unused_output_is_named(method):
    model = student(method)
    model.backbone.blocks[5].forward = lambda x, **_: x
    with pytest.raises(ValueError, match=r"train blocks\.5\.attn\.qkv: .*does not use the layer's output") as stop:
        train(model)
    assert ("reads the layer's weight directly" in str(stop.value)) == (method != "bone")  # Bone adapts the weight too


@pytest.mark.parametrize("gradient", [0.0, torch.nan, torch.inf])
def test_zero_or_non_finite_gradients_do_not_count(gradient):
    model = student("lora")
    check = GradientCheck(model, scaled=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for p in model.backbone.blocks[2].attn.qkv.parameters():
        p.grad = torch.full_like(p, gradient)
    check.check_step()
    check.check_step()
    with pytest.raises(ValueError, match=r"lora does not train blocks\.2\.attn\.qkv: "):
        check.check_step()


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("method", THROUGH_PEFT)
def test_trainings_of_one_or_two_steps_are_checked_before_the_last_checkpoint(tmp_path, method, epochs):
    assert trains_all_layers(student(method), epochs=epochs, batch_size=20)
    for _ in range(2):  # the first checkpoint does not let a resumed run pass
        with pytest.raises(ValueError, match="the only step" if epochs == 1 else "the (only|first 2) steps?"):
            train(
                student(method, bypassed=[1]), epochs=epochs, batch_size=20, checkpoint=tmp_path / "c.pt", resume=True
            )
    assert (tmp_path / "c.pt").is_file() == (epochs > 1)


@pytest.mark.parametrize("method", THROUGH_PEFT)
def test_resumed_training_is_checked(tmp_path, method):
    train(student(method), epochs=2, checkpoint=tmp_path / "c.pt")
    resumed = student(method)
    train(resumed, epochs=3, checkpoint=tmp_path / "c.pt", resume=True)
    with pytest.raises(ValueError, match=r"train blocks\.3\.attn\.qkv: "):
        train(student(method, bypassed=[3]), epochs=4, checkpoint=tmp_path / "c.pt", resume=True)


def test_steps_skipped_by_gradient_scaling_do_not_count(monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kw: scaler(*args, init_scale=2.0**40, **kw))
    checks = []

    class Check(GradientCheck):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            checks.append(self)

    monkeypatch.setattr(importlib.import_module("peka_lite.transfer.fit"), "GradientCheck", Check)
    train(student("lora", spec=SIXTEEN, bypassed=[0]), epochs=1)  # three steps, all skipped
    assert checks[0].steps == 0
    with pytest.raises(ValueError, match=r"train blocks\.0\.attn\.qkv: .* in the first 3 steps"):
        train(student("lora", spec=SIXTEEN, bypassed=[0]), epochs=20)
    assert trains_all_layers(student("adalora", spec=SIXTEEN), epochs=12)


def test_checking_stops_once_every_layer_had_a_gradient():
    model = student("bone")
    check = GradientCheck(model, scaled=False)
    z, logits = model(torch.randn(4, 3, 32, 32))
    (z.square().mean() + logits.square().mean()).backward()
    check.check_step()
    assert check.steps == 1
    check.check_step()
    assert check.steps == 1


def test_gradients_of_other_processes_count(monkeypatch):
    def summed(self, parameters):
        for p in parameters:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad

    model = student("lora", bypassed=[1])
    monkeypatch.setattr(Processes, "add_gradients", summed)
    assert trains_all_layers(model)


@pytest.mark.parametrize("method", METHODS)
def test_constant_loss_has_a_separate_message(method):
    with pytest.raises(ValueError, match=r"the loss had no gradient in the first 3 steps.*kd_weight or ce_weight"):
        train(student(method), kd_weight=0.0, ce_weight=0.0)
    assert trains_all_layers(student(method), kd_weight=0.0)
    assert trains_all_layers(student(method), ce_weight=0.0)


def test_student_without_adapters_trains_its_projector():
    model = student("none")
    before = [p.clone() for p in model.projector.parameters()]
    assert len(train(model)) == 1
    assert all(not torch.equal(a, b) for a, b in zip(before, model.projector.parameters(), strict=True))
