"""Losses equal the equations, the backbone stays frozen, and a resumed training equals an uninterrupted one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.special import log_softmax
from tiny import TINY, task

from peka_lite.adapters import adapt, adapter_state
from peka_lite.adapters._choices import METHODS
from peka_lite.backbones import Backbone, load_backbone, preprocess
from peka_lite.backbones.registry import IMAGENET
from peka_lite.transfer import TransferModel, fit, transfer_loss
from peka_lite.transfer._choices import KD_SPACES

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")

CNN = Backbone("cnn", "resnet18", None, 512, *IMAGENET, "BSD-3-Clause", input_size=32, pooling="avg", bone_r=None)
EPOCHS, BATCH = 4, 8


TASK = task()
STEPS = -(-len(TASK[2]) // BATCH)


def student(method="bone", *, kd_space="embedding", spec=TINY, r=16, weights_seed=0, seed=0):
    backbone = load_backbone(spec, weights="random", seed=weights_seed)
    adapt(backbone, method, r=r, dropout=0.3, total_steps=EPOCHS * STEPS if method == "adalora" else None)
    return TransferModel(backbone, teacher_dim=6, n_classes=3, hidden=16, kd_space=kd_space, seed=seed)


def train(model, data=TASK, **options):
    options = {"epochs": 1, "batch_size": BATCH, "lr": 1e-3, "device": "cpu"} | options
    return fit(model, *data, **options)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def differing(a, b):
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])]


class Interrupting:
    """Tiles that can be read `reads` times before a KeyboardInterrupt."""

    def __init__(self, tiles, reads):
        self.tiles, self.reads, self.rows = tiles, reads, []

    def __len__(self):
        return len(self.tiles)

    def __getitem__(self, rows):
        self.reads -= 1
        if self.reads < 0:
            raise KeyboardInterrupt
        self.rows.extend(rows)
        return self.tiles[rows]


def loss_by_hand(S, T, logits, labels, tau, kd_weight, ce_weight):
    s, t = log_softmax(S / tau, axis=1), log_softmax(T / tau, axis=1)
    kd = (np.exp(t) * (t - s)).sum(1).mean()
    ce = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean()
    return kd_weight * kd + ce_weight * ce, kd, ce


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 9),
    dim=st.integers(1, 12),
    classes=st.integers(2, 6),
    tau=st.floats(0.5, 8),
    kd_weight=st.floats(0, 2),
    ce_weight=st.floats(0, 2),
    seed=st.integers(0, 2**31 - 1),
)
def test_loss_equals_the_equations(n, dim, classes, tau, kd_weight, ce_weight, seed):
    rng = np.random.default_rng(seed)
    S, T, logits = (2 * rng.normal(size=(n, d)).astype(np.float32) for d in (dim, dim, classes))
    labels = rng.integers(0, classes, n)
    losses = transfer_loss(
        *map(torch.from_numpy, (S, T, logits, labels)), tau=tau, kd_weight=kd_weight, ce_weight=ce_weight
    )
    expected = loss_by_hand(*(a.astype(np.float64) for a in (S, T, logits)), labels, tau, kd_weight, ce_weight)
    np.testing.assert_allclose([v.item() for v in losses], expected, rtol=1e-5, atol=1e-6)


def test_default_weights_and_temperature_are_the_papers():
    S, T, logits, labels = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    default = transfer_loss(S, T, logits, labels)
    assert default[0] == transfer_loss(S, T, logits, labels, tau=2.0, kd_weight=0.5, ce_weight=0.5)[0]


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 6), dim=st.integers(2, 8), shift=st.floats(-5, 5), seed=st.integers(0, 2**31 - 1))
def test_distillation_loss_is_zero_only_if_student_equals_teacher(n, dim, shift, seed):
    rng = torch.Generator().manual_seed(seed)
    T, logits, labels = torch.randn(n, dim, generator=rng), torch.zeros(n, 2), torch.zeros(n, dtype=torch.long)
    assert abs(transfer_loss(T, T, logits, labels)[1].item()) < 1e-6
    assert abs(transfer_loss(T + shift, T, logits, labels)[1].item()) < 1e-5  # softmax is invariant to a shift
    other = T.clone()
    other[0, 0] += 1
    assert transfer_loss(other, T, logits, labels)[1].item() > 1e-4


def test_loss_of_half_precision_inputs_is_float32():
    args = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 3)
    half = transfer_loss(*(a.bfloat16() for a in args), torch.tensor([0, 1, 2, 0]))
    assert {v.dtype for v in half} == {torch.float32}


@pytest.mark.parametrize("kd_space", KD_SPACES)
def test_history_reports_the_loss_of_the_right_rows_in_the_right_space(kd_space):
    model = student(kd_space=kd_space)
    (row,) = train(model, lr=0.0, tau=3.0, kd_weight=0.7, ce_weight=0.2).to_dict("records")
    tiles, T, labels = TASK
    with torch.no_grad():
        features = model.backbone(preprocess(torch.from_numpy(tiles), TINY))
        z, T = model.projector(features), torch.from_numpy(T)
        if kd_space == "embedding":
            S, logits = z, model.classifier(features)
        else:
            S, T, logits = model.classifier(z), model.classifier(T), model.classifier(z)
    total, kd, ce = loss_by_hand(S.numpy(), T.numpy(), logits.numpy(), labels, 3.0, 0.7, 0.2)
    assert [row["loss"], row["kd"], row["ce"]] == pytest.approx([total, kd, ce], rel=1e-4)
    assert row["accuracy"] == pytest.approx((logits.argmax(1).numpy() == labels).mean())


def test_history_has_one_row_per_epoch():
    history = train(student(), epochs=3)
    assert list(history) == ["epoch", "loss", "kd", "ce", "accuracy", "seconds", "waiting"]
    assert history["epoch"].tolist() == [0, 1, 2]


def test_every_epoch_reads_every_row_once_in_a_new_order():
    recorder = Interrupting(TASK[0], 2 * STEPS)
    train(student(), (recorder, *TASK[1:]), epochs=2)
    n = len(TASK[0])
    first, second = recorder.rows[:n], recorder.rows[n:]
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second


@pytest.mark.parametrize("kd_space", KD_SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_training_solves_a_simple_task(method, kd_space):
    history = train(student(method, kd_space=kd_space), epochs=12, lr=3e-3)
    assert history["loss"].iloc[-1] < 0.7 * history["loss"].iloc[0]
    assert history["accuracy"].iloc[-1] > 0.8


@pytest.mark.parametrize("kd_space", KD_SPACES)
def test_training_with_distillation_only_approaches_the_teacher(kd_space):
    history = train(student(kd_space=kd_space), epochs=12, lr=3e-3, kd_weight=1.0, ce_weight=0.0)
    assert history["kd"].iloc[-1] < 0.2 * history["kd"].iloc[0]


def test_teacher_head_predicts_the_clusters_and_is_frozen_before_training():
    model = student(kd_space="logits")
    _, T, labels = TASK
    train(model, lr=0.0)
    head = weights(model.classifier)
    assert (model.classifier(torch.from_numpy(T)).argmax(1).numpy() == labels).mean() > 0.8
    train(model, lr=1e-2)
    assert differing(head, weights(model.classifier)) == []


@pytest.mark.parametrize("kd_space", KD_SPACES)
@pytest.mark.parametrize(
    ("method", "spec"), [(m, TINY) for m in METHODS] + [("none", CNN)], ids=[*METHODS, "none-with-batch-norm"]
)
def test_frozen_backbone_is_unchanged_and_has_no_gradients(method, spec, kd_space):
    model = student(method, kd_space=kd_space, spec=spec)
    before, adapters = weights(model.backbone), adapter_state(model.backbone)
    train(model, epochs=2, lr=1e-2)
    trainable = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert trainable <= adapters.keys()
    assert set(differing(before, weights(model.backbone))) == trainable
    assert all(p.grad is None for n, p in model.backbone.named_parameters() if n not in trainable)


@pytest.mark.parametrize("kd_space", KD_SPACES)
@pytest.mark.parametrize("method", ["none", "bone", "lora", "adalora"])
def test_optimizer_has_state_for_trained_parameters_only(method, kd_space, monkeypatch):
    optimizers = []

    class Recorded(torch.optim.Adam):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            optimizers.append(self)

    monkeypatch.setattr(torch.optim, "Adam", Recorded)
    model = student(method, kd_space=kd_space)
    train(model)
    names = {id(p): n for n, p in model.named_parameters()}
    with_state = {names[id(p)] for p in optimizers[-1].state}
    adapters = {f"backbone.{n}" for n in adapter_state(model.backbone) if "ranknum" not in n}
    learned = ("projector", "classifier") if kd_space == "embedding" else ("projector",)
    assert with_state == adapters | {n for n in names.values() if n.startswith(learned)}


@pytest.mark.parametrize("method", ["none", "bone", "lora"])
def test_only_adapters_are_in_training_mode(method):
    model = student(method, spec=replace(TINY, options={**TINY.options, "drop_path_rate": 0.5}))
    seen = set()
    model.backbone.register_forward_pre_hook(
        lambda module, _: seen.update(n for n, m in module.named_modules() if m.training and "attn.qkv" not in n)
    )
    dropouts = [m for n, m in model.backbone.named_modules() if "attn.qkv" in n and isinstance(m, torch.nn.Dropout)]
    for m in dropouts:
        m.register_forward_pre_hook(lambda module, _: seen.add(f"dropout {module.training}"))
    train(model)
    assert seen == ({"dropout True"} if method == "lora" else set())


def test_model_is_in_eval_mode_after_training():
    model = student("lora")
    train(model)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("method", ["bone", "lora"])
def test_same_seed_gives_the_same_weights(method):
    first, again, other = student(method), student(method), student(method)
    train(first, seed=1)
    train(again, seed=1)
    train(other, seed=2)
    assert differing(weights(first), weights(again)) == []
    assert len(differing(weights(first), weights(other))) > 0


def test_model_seed_initializes_projector_and_classifier():
    assert differing(weights(student(seed=1)), weights(student(seed=1))) == []
    assert differing(weights(student(seed=1)), weights(student(seed=2))) == [
        f"{part}.{p}" for part in ("projector.0", "projector.2", "classifier") for p in ("weight", "bias")
    ]


@pytest.mark.parametrize("kd_space", KD_SPACES)
def test_global_random_state_is_not_changed(kd_space):
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the global state
    train(student("lora", kd_space=kd_space))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_numpy, np.random.get_state()[1])  # noqa: NPY002


def test_result_does_not_depend_on_the_global_random_state():
    first, second = student("lora"), student("lora")
    train(first)
    torch.manual_seed(99)
    train(second)
    assert differing(weights(first), weights(second)) == []


@pytest.mark.parametrize("kd_space", KD_SPACES)
@pytest.mark.parametrize("method", ["bone", "lora", "adalora"])
def test_interrupted_training_is_bit_identical_to_an_uninterrupted_one(tmp_path, method, kd_space):
    whole, interrupted, resumed = (student(method, kd_space=kd_space) for _ in range(3))
    uninterrupted = train(whole, epochs=EPOCHS)
    file = tmp_path / "c.pt"
    tiles, *rest = TASK
    with pytest.raises(KeyboardInterrupt):  # in the middle of the third epoch
        train(interrupted, (Interrupting(tiles, 2 * STEPS + 1), *rest), epochs=EPOCHS, checkpoint=file)
    recorder = Interrupting(tiles, 2 * STEPS)
    history = train(resumed, (recorder, *rest), epochs=EPOCHS, checkpoint=file, resume=True)
    assert recorder.reads == 0  # the first two epochs were not run again
    assert differing(weights(whole), weights(resumed)) == []
    columns = ["epoch", "loss", "kd", "ce", "accuracy"]
    assert history[columns].equals(uninterrupted[columns])


@pytest.mark.parametrize("kd_space", KD_SPACES)
def test_training_can_continue_in_the_same_model(tmp_path, kd_space):
    whole, stepwise = student(kd_space=kd_space), student(kd_space=kd_space)
    train(whole, epochs=3)
    for epochs in (1, 2, 3):
        train(stepwise, epochs=epochs, checkpoint=tmp_path / "c.pt", resume=True)
    assert differing(weights(whole), weights(stepwise)) == []


@pytest.mark.parametrize("kd_space", KD_SPACES)
def test_resumed_training_does_not_depend_on_initial_weights(tmp_path, kd_space):
    whole, resumed = student(kd_space=kd_space, seed=0), student(kd_space=kd_space, seed=5)
    train(whole, epochs=2)
    train(student(kd_space=kd_space, seed=0), epochs=1, checkpoint=tmp_path / "c.pt")
    train(resumed, epochs=2, checkpoint=tmp_path / "c.pt", resume=True)
    assert differing(weights(whole), weights(resumed)) == []


def test_finished_checkpoint_is_loaded_without_training(tmp_path):
    trained, loaded = student(), student()
    history = train(trained, epochs=2, checkpoint=tmp_path / "c.pt")
    again = train(loaded, (Interrupting(TASK[0], 0), *TASK[1:]), epochs=2, checkpoint=tmp_path / "c.pt", resume=True)
    assert differing(weights(trained), weights(loaded)) == []
    assert again.equals(history)


def test_checkpoint_with_more_epochs_is_rejected(tmp_path):
    train(student(), epochs=2, checkpoint=tmp_path / "c.pt")
    with pytest.raises(ValueError, match="has 2 epochs, more than 1"):
        train(student(), epochs=1, checkpoint=tmp_path / "c.pt", resume=True)


def test_without_resume_a_checkpoint_is_overwritten(tmp_path):
    train(student(), checkpoint=tmp_path / "c.pt", lr=1e-2)
    fresh = student()
    train(fresh)
    again = student()
    assert len(train(again, checkpoint=tmp_path / "c.pt")) == 1
    assert differing(weights(fresh), weights(again)) == []


@pytest.mark.parametrize("stop", [OSError("no space left"), KeyboardInterrupt()])
def test_checkpoint_is_written_atomically(tmp_path, monkeypatch, stop):
    file = tmp_path / "c.pt"
    train(student(), checkpoint=file)
    before = file.read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(type(stop)):
            train(student(), epochs=2, checkpoint=file, resume=True)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    assert len(train(student(), epochs=2, checkpoint=file, resume=True)) == 2


def test_checkpoint_can_be_loaded_with_weights_only(tmp_path):
    train(student("adalora"), checkpoint=tmp_path / "c.pt")
    assert torch.load(tmp_path / "c.pt", weights_only=True)["settings"]["method"] == "adalora"


def changed_data(part):
    tiles, teacher, labels = TASK
    if part == "teacher":
        return tiles, np.where(np.arange(6) == 2, np.float32(0), teacher), labels
    return tiles, teacher, np.where(np.arange(len(labels)) == 2, 0, labels)


@pytest.mark.parametrize(
    ("field", "other", "options"),
    [
        ("batch_size", {}, {"batch_size": 5}),
        ("lr", {}, {"lr": 2e-3}),
        ("tau", {}, {"tau": 1.0}),
        ("kd_weight", {}, {"kd_weight": 0.4}),
        ("ce_weight", {}, {"ce_weight": 0.4}),
        ("seed", {}, {"seed": 3}),
        ("data", {}, {"data": changed_data("teacher")}),
        ("data", {}, {"data": changed_data("labels")}),
        ("method", {"method": "lora"}, {}),
        ("r", {"r": 8}, {}),
        ("kd_space", {"kd_space": "logits"}, {}),
        ("weights", {"weights_seed": 5}, {}),
        ("backbone", {"spec": replace(TINY, name="other")}, {}),
    ],
)
def test_resume_with_another_setting_is_rejected_with_its_name(tmp_path, field, other, options):
    train(student(), checkpoint=tmp_path / "c.pt")
    model = student(**other)
    before = weights(model.backbone)
    with pytest.raises(ValueError, match=rf"c\.pt was written with {field}="):
        train(model, checkpoint=tmp_path / "c.pt", resume=True, **options)
    assert differing(before, weights(model.backbone)) == []


def test_non_finite_loss_stops_with_epoch_and_step(tmp_path):
    tiles, teacher, labels = TASK
    order = np.random.default_rng((0, 0)).permutation(len(labels))
    teacher = teacher.copy()
    teacher[order[BATCH + 1]] = np.nan  # a row of the second step
    with pytest.raises(FloatingPointError, match="loss is nan at epoch 0, step 1"):
        train(student(), (tiles, teacher, labels), checkpoint=tmp_path / "c.pt")
    assert list(tmp_path.iterdir()) == []


def test_diverging_training_names_the_learning_rate():
    with pytest.raises(FloatingPointError, match=r"epoch \d, step \d; try a lower lr than 1e\+30"):
        train(student(), epochs=3, lr=1e30)


def test_adalora_ranks_shrink_to_their_target(tmp_path):
    model = student("adalora", r=8)
    ranks = []
    for epochs in range(1, EPOCHS + 1):
        train(model, epochs=epochs, checkpoint=tmp_path / "c.pt", resume=True)
        pattern = torch.load(tmp_path / "c.pt", weights_only=True)["rank_pattern"]
        ranks.append(sum(map(sum, pattern.values())))
    assert 2 * 8 >= ranks[0] > ranks[1] > ranks[-1] == 2 * 4
    alive = sum(int((v != 0).sum()) for n, v in model.state_dict().items() if "lora_E" in n)
    assert alive == 2 * 4


def test_adalora_adds_its_regularizer_to_the_loss():
    (row,) = train(student("adalora"), lr=0.0).to_dict("records")
    assert row["loss"] > 0.5 * row["kd"] + 0.5 * row["ce"] + 0.1


@pytest.mark.parametrize("short", [0, 1, 2])
def test_different_numbers_of_rows_are_rejected(short):
    data = [part[:-1] if i == short else part for i, part in enumerate(TASK)]
    with pytest.raises(ValueError, match="give one of each per row"):
        train(student(), data)


@pytest.mark.parametrize("kd_space", KD_SPACES)
@pytest.mark.parametrize("width", [1, 5])
def test_teacher_of_another_width_is_rejected(width, kd_space):
    tiles, teacher, labels = TASK
    with pytest.raises(ValueError, match=rf"teacher is \(20, {width}\), the projector's width is 6"):
        train(student(kd_space=kd_space), (tiles, teacher[:, :width], labels))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classifier_are_rejected(label):
    tiles, teacher, labels = TASK
    with pytest.raises(ValueError, match="labels are"):
        train(student(), (tiles, teacher, np.where(labels == 1, label, labels)))


@pytest.mark.parametrize("option", ["epochs", "batch_size", "tau"])
def test_zero_is_rejected_for_positive_options(option):
    with pytest.raises(ValueError, match="must be above 0"):
        train(student(), **{option: 0})


def test_unknown_kd_space_lists_the_known_ones():
    with pytest.raises(ValueError, match="'pixels'; known: embedding, logits"):
        student(kd_space="pixels")


def test_network_that_is_not_an_adapted_student_is_rejected():
    with pytest.raises(ValueError, match=r"Sequential is not from load_backbone; .*register_backbone"):
        TransferModel(torch.nn.Sequential(), teacher_dim=6, n_classes=3)
    plain = TransferModel(load_backbone(TINY, weights="random"), teacher_dim=6, n_classes=3)
    with pytest.raises(ValueError, match="has no adapter: adapt it first"):
        train(plain)
