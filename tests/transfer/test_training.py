"""Training gives the same result in micro-batches and processes, resumes after a kill, and explains its errors."""

import importlib
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, task

from peka_lite._core.hashing import row_ids
from peka_lite.adapters.adapt import adapt
from peka_lite.backbones.load import load_backbone, preprocess
from peka_lite.transfer import _checkpoint
from peka_lite.transfer._choices import KD_SPACES
from peka_lite.transfer.fit import fit, split_epoch
from peka_lite.transfer.model import NotFinite, TransferModel

transfer = importlib.import_module("peka_lite.transfer.fit")  # the package offers the function

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")

HALF = replace(TINY, precision={"cpu": torch.bfloat16})  # a GPU's compute dtype, on the CPU
BATCH = 8
COLUMNS = ["epoch", "loss", "kd", "ce", "accuracy"]  # of the history, without times


TASK = task()


def student(method="bone", *, spec=TINY, kd_space="embedding", dropout=0.0, steps=9, seed=0):
    backbone = load_backbone(spec, weights="random", seed=0)
    adapt(backbone, method, r=16, dropout=dropout, total_steps=steps if method == "adalora" else None)
    return TransferModel(backbone, teacher_dim=6, n_classes=3, hidden=16, kd_space=kd_space, seed=seed)


def train(model, data=TASK, **options):
    options = {"epochs": 1, "batch_size": BATCH, "lr": 1e-3, "device": "cpu"} | options
    return fit(model, *data, **options)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def differing(a, b):
    assert a.keys() == b.keys()
    return [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])]


class Descent(torch.optim.SGD):
    """SGD in place of Adam, which amplifies rounding errors; records the gradients of every step."""

    def __init__(self, params, *, lr, fused):
        super().__init__(params, lr=lr)
        self.gradients = []
        Descent.last = self

    def step(self, closure=None):
        self.gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return super().step(closure)


@pytest.fixture
def descent(monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", Descent)


def assert_same_training(a, b, gradients, expected):
    assert len(gradients) == len(expected) > 0
    for step, pair in enumerate(zip(gradients, expected, strict=True)):
        for g, e in zip(*pair, strict=True):
            torch.testing.assert_close(g, e, rtol=2e-4, atol=2e-6, msg=lambda m, step=step: f"step {step}: {m}")
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-5, atol=1e-6, msg=lambda m, k=k: f"{k}: {m}")


def test_the_loop_itself_asks_for_the_loss(monkeypatch):
    callers = []

    def spy(*args, loss=transfer.transfer_loss, **options):
        callers.append(sys._getframe(1).f_code)
        return loss(*args, **options)

    monkeypatch.setattr(transfer, "transfer_loss", spy)
    train(student(), micro_batch=3)
    assert callers == [fit.__code__] * 8  # a reader finds the loss in the loop


# micro-batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bone", "adalora"])
@pytest.mark.parametrize("n", [20, 17])  # a last batch of 4, and one of a single tile
def test_micro_batches_of_any_size_give_the_gradient_of_the_batch(descent, method, n):
    data = task(n)
    whole = student(method)
    history, expected = train(whole, data, epochs=2, lr=0.05), Descent.last.gradients
    for piece in (1, 3, 5, BATCH):
        cut = student(method)
        result = train(cut, data, epochs=2, lr=0.05, micro_batch=piece)
        assert_same_training(weights(cut), weights(whole), Descent.last.gradients, expected)
        np.testing.assert_allclose(result[COLUMNS], history[COLUMNS], rtol=1e-5, atol=1e-6)


def test_forward_passes_have_at_most_micro_batch_tiles():
    model, seen = student(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    train(model, micro_batch=3)
    assert seen == [3, 3, 2, 3, 3, 2, 3, 1]


def test_gradients_of_an_earlier_use_do_not_enter_a_training():
    clean, used = student(), student()
    for parameter in used.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    train(clean), train(used)
    assert differing(weights(clean), weights(used)) == []


def test_micro_batch_larger_than_the_batch_is_the_batch():
    whole, cut = student(), student()
    train(whole)
    train(cut, micro_batch=100)
    assert differing(weights(whole), weights(cut)) == []


def test_micro_batch_of_zero_is_rejected():
    with pytest.raises(ValueError, match="micro_batch must be above 0, not 0"):
        train(student(), micro_batch=0)


@pytest.mark.parametrize("method", ["bone", "lora"])
def test_recompute_gives_the_same_weights(method):
    plain, again = student(method, dropout=0.3), student(method, dropout=0.3)
    train(plain, epochs=2)
    train(again, epochs=2, recompute=True)
    assert differing(weights(plain), weights(again)) == []
    assert not any("forward" in block.__dict__ for block in again.backbone.blocks)


def test_compiled_network_is_used_for_full_pieces_only(monkeypatch):
    taken = []

    def compile(model, **_):
        def run(x):
            taken.append(len(x))
            return model(x)

        return run

    plain, compiled = student(), student()
    train(plain, micro_batch=3)
    monkeypatch.setattr(torch, "compile", compile)
    train(compiled, micro_batch=3, compile=True)
    assert taken == [3] + [3, 3] * 2 + [3]  # first the trial
    assert differing(weights(plain), weights(compiled)) == []


# processes ---------------------------------------------------------------------------------------------------------


def shared(out):
    """Train in a process of the test, with a last batch of one tile and a checkpoint after each epoch."""
    written, save, adam = [], transfer.save_checkpoint, torch.optim.Adam

    def recorded(path, *rest):
        written.append(path.name)
        save(path, *rest)

    torch.optim.Adam, transfer.save_checkpoint = Descent, recorded
    try:
        model = student()
        history = train(model, task(17), epochs=2, lr=0.05, checkpoint=out / "c.pt")
    finally:
        torch.optim.Adam, transfer.save_checkpoint = adam, save
    return {
        "weights": weights(model), "gradients": Descent.last.gradients, "history": history[COLUMNS].to_numpy(),
        "learned_from": model.backbone.adapter.fitted_on, "waiting": history["waiting"].to_numpy(), "written": written,
    }  # fmt: skip


TOGETHER = """
import sys
import time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import os
import torch
torch.set_num_threads(1)
import test_training
out = Path(sys.argv[2])
torch.save(test_training.shared(out), out / f"rank{os.environ['RANK']}.result")
"""


def child_env(**more):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | more


def test_two_processes_give_the_training_of_one(tmp_path):
    one, two, script = tmp_path / "one", tmp_path / "two", tmp_path / "together.py"
    two.mkdir()
    script.write_text(TOGETHER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script,
         Path(__file__).parent, two],
        env=child_env(ACCELERATE_USE_CPU="true"), capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    expected = shared(one)
    ranks = [torch.load(two / f"rank{rank}.result", weights_only=False) for rank in (0, 1)]
    assert [result["written"] for result in ranks] == [expected["written"], []] == [["c.pt", "c.pt"], []]
    for result in ranks:
        assert_same_training(result["weights"], expected["weights"], result["gradients"], expected["gradients"])
        np.testing.assert_allclose(result["history"], expected["history"], rtol=1e-5, atol=1e-6)
        assert np.array_equal(result["learned_from"], row_ids(task(17)[0]))
        assert ((result["waiting"] >= 0) & (result["waiting"] <= 1)).all()
    assert differing(ranks[0]["weights"], ranks[1]["weights"]) == []  # bit-identical
    assert sorted(p.name for p in two.iterdir()) == ["c.pt", "rank0.result", "rank1.result"]


@pytest.mark.parametrize(("n", "count"), [(20, 2), (17, 2), (17, 3), (1, 4), (19, 8)])
@pytest.mark.parametrize("piece", [1, 3, 8])
def test_processes_share_every_batch_and_step_together(n, count, piece):
    order, steps = np.random.default_rng(0).permutation(n), -(-n // BATCH)
    parts = [split_epoch(order, batch_size=BATCH, piece=piece, rank=rank, count=count) for rank in range(count)]
    assert [len(part) for part in parts] == [steps] * count
    assert {len(rows) for part in parts for pieces in part for rows in pieces} <= set(range(1, piece + 1))
    for step in range(steps):
        seen = [row for part in parts for rows in part[step] for row in rows]
        assert sorted(seen) == sorted(order[step * BATCH : (step + 1) * BATCH])


# killed ------------------------------------------------------------------------------------------------------------

KILLS, EPOCHS = 10, 8


def train_until_killed(out, death, within):
    """Train in a process that kills itself at its `death`-th event, or its `death`-th while writing if `within`."""
    events = {"left": death}
    save, replace_file = torch.save, os.replace

    def count_event(writing):
        if death is not None and (writing or not within):
            events["left"] -= 1
            if events["left"] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def slowly(state, file):
        save(state, whole := io.BytesIO())
        data = whole.getvalue()
        for at in range(0, len(data), len(data) // 6 + 1):
            count_event(True)
            file.write(data[at : at + len(data) // 6 + 1])
        count_event(True)

    def replacing(a, b):
        replace_file(a, b)
        count_event(False)

    class Tiles:
        def __len__(self):
            return len(TASK[0])

        def __getitem__(self, rows):
            count_event(False)
            return TASK[0][rows]

    _checkpoint.torch.save, _checkpoint.os.replace = slowly, replacing
    model = student("lora", dropout=0.3)
    model.projector.register_forward_hook(lambda *_: count_event(False))
    history = train(model, (Tiles(), *TASK[1:]), epochs=EPOCHS, checkpoint=out / "c.pt", resume=True)
    save({"weights": weights(model), "history": history[COLUMNS].to_numpy(), "ids": model.backbone.adapter.fitted_on},
         out / "end")  # fmt: skip


def supervise(root):
    """Fork trainings one after another, before PyTorch starts threads; print how each ended and after which epoch."""
    import peft  # noqa: F401 - else imported in every fork
    import torch._dynamo

    rng = np.random.default_rng(5)

    def fork(out, death=None, within=False):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                train_until_killed(out, death, within)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    (root / "whole").mkdir()
    (root / "broken").mkdir()
    print("whole", fork(root / "whole"))
    for kill in range(KILLS):
        # Every second kill is during a write. Some are before the end of the first epoch.
        status = fork(root / "broken", int(rng.integers(0, 14)), within=kill % 2 == 0)
        file = root / "broken" / "c.pt"
        epochs = len(torch.load(file, weights_only=True)["history"]) if file.is_file() else 0
        print("killed", status, epochs, len(list((root / "broken").glob(".*.partial"))))
    print("last", fork(root / "broken"))


def test_training_killed_ten_times_is_bit_identical_to_an_uninterrupted_one(tmp_path):
    code = (
        "import sys, pathlib, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1]); import test_training; "
    )
    code += "test_training.supervise(pathlib.Path(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", code, Path(__file__).parent, tmp_path],
        env=child_env(), capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["whole", "0"]
    assert lines[-1] == ["last", "0"], done.stderr[-3000:]
    killed = [tuple(map(int, line[1:])) for line in lines[1:-1]]
    assert [status for status, _, _ in killed] == [-signal.SIGKILL] * KILLS
    epochs = [at for _, at, _ in killed]
    assert epochs == sorted(epochs)  # no finished epoch is lost
    assert 0 < epochs[-1] < EPOCHS
    assert max(partials for _, _, partials in killed) == 1  # some were killed while writing; the next run cleaned up
    whole, broken = (torch.load(tmp_path / run / "end", weights_only=False) for run in ("whole", "broken"))
    assert differing(whole["weights"], broken["weights"]) == []
    assert np.array_equal(whole["history"], broken["history"])
    assert np.array_equal(whole["ids"], broken["ids"])
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == ["c.pt", "end"]


def test_only_partial_files_of_killed_runs_are_removed(tmp_path):
    other = [tmp_path / name for name in (".d.pt.7.partial", ".c.pt.partial.txt", "c.pt.7.partial")]
    stale = [tmp_path / f".c.pt.{pid}.partial" for pid in (1, 99999)]
    for file in other + stale:
        file.write_bytes(b"half")
    train(student(), checkpoint=tmp_path / "c.pt")
    assert sorted(tmp_path.iterdir()) == sorted([*other, tmp_path / "c.pt"])


# not finite --------------------------------------------------------------------------------------------------------


def spoiled(rows, *, after=0):
    """Return a student whose projections of some rows of the task are NaN, after a number of tiles."""
    model, images, seen = student(), preprocess(torch.from_numpy(TASK[0][rows]), TINY), 0

    def spoil(_, args, output):
        nonlocal seen
        z, logits = output
        bad = (args[0][:, None] == images[None]).flatten(2).all(2).any(1) & (seen >= after)
        seen += len(z)
        return torch.where(bad[:, None], torch.nan, z), logits

    model.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("step", [0, 1, 2])  # the last batch is short and checked after the epoch
def test_nan_loss_names_the_tiles_and_the_previous_checkpoint_is_valid(tmp_path, step, micro_batch):
    order = np.random.default_rng((0, 1)).permutation(len(TASK[2]))
    rows = order[step * BATCH : (step + 1) * BATCH][[2, 0]]  # in one piece for both sizes
    with pytest.raises(NotFinite, match=rf"loss is nan at epoch 1, step {step}; try a lower lr than 0\.001") as stop:
        train(spoiled(rows, after=len(order)), epochs=3, checkpoint=tmp_path / "c.pt", micro_batch=micro_batch)
    assert stop.value.rows == sorted(rows)
    size = {None: [8, 8, 4], 3: [3, 3, 3]}[micro_batch][step]
    assert str(stop.value).endswith(f"2 of its {size} tiles, rows {min(rows)}, {max(rows)}")
    whole, resumed = student(), student()
    assert len(torch.load(tmp_path / "c.pt", weights_only=True)["history"]) == 1
    train(resumed, epochs=2, checkpoint=tmp_path / "c.pt", resume=True, micro_batch=micro_batch)
    train(whole, epochs=2, micro_batch=micro_batch)
    assert differing(weights(whole), weights(resumed)) == []


def test_all_tiles_are_named_if_all_losses_are_not_finite():
    with pytest.raises(NotFinite) as stop:
        train(student(), epochs=3, lr=1e30)
    assert len(stop.value.rows) in (BATCH, 4)
    assert stop.value.rows == sorted(stop.value.rows)


def test_message_names_eight_rows_and_the_error_has_all():
    with pytest.raises(NotFinite, match=r"20 of its 20 tiles, rows 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.$") as stop:
        train(spoiled(list(range(20))), batch_size=20)
    assert stop.value.rows == list(range(20))


# augmentation ---------------------------------------------------------------------------------------------------------


def test_augmentation_depends_on_the_seed_and_is_off_by_default():
    models = {name: student() for name in ("plain", "off", "on", "again", "other")}
    train(models["plain"], epochs=2)
    train(models["off"], epochs=2, augment=False)
    train(models["on"], epochs=2, augment=True)
    train(models["again"], epochs=2, augment=True)
    train(models["other"], epochs=2, augment=True, seed=1)
    result = {name: weights(model) for name, model in models.items()}
    assert differing(result["plain"], result["off"]) == []
    assert differing(result["on"], result["again"]) == []
    assert len(differing(result["on"], result["off"])) > 0
    assert len(differing(result["on"], result["other"])) > 0


def test_augmentation_differs_between_epochs(monkeypatch):
    seen = []

    def spy(tiles, turns, turn=transfer.flip_tiles):
        seen.append((row_ids(tiles.numpy()), turns))
        return turn(tiles, turns)

    monkeypatch.setattr(transfer, "flip_tiles", spy)
    train(student(), epochs=2, augment=True)
    by_tile = []
    for epoch in (seen[:3], seen[3:]):
        ids, turns = map(np.concatenate, zip(*epoch, strict=True))
        assert set(turns.tolist()) <= set(range(8))
        assert len(set(turns.tolist())) > 3
        by_tile.append(turns[np.argsort(ids)])
    assert (by_tile[0] != by_tile[1]).sum() > 10


def test_augmentation_does_not_depend_on_micro_batches(descent):
    whole, cut = student(), student()
    train(whole, augment=True, lr=0.05)
    expected = Descent.last.gradients
    train(cut, augment=True, lr=0.05, micro_batch=3)
    assert_same_training(weights(cut), weights(whole), Descent.last.gradients, expected)


def test_row_ids_are_those_of_the_original_tiles():
    model = student()
    train(model, augment=True)
    assert np.array_equal(model.backbone.adapter.fitted_on, row_ids(TASK[0]))


# half precision, memory, waiting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_out_of_memory_error_names_options_that_help(monkeypatch, recompute):
    model = student(spec=HALF)
    before = weights(model)

    def forward(x):
        assert model.backbone.patch_embed.proj.weight.dtype == torch.bfloat16
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(model.backbone, "forward", forward)
        with pytest.raises(MemoryError, match=r"cpu ran out of memory at 6 tiles at once; --micro-batch 3 ") as stop:
            train(model, micro_batch=6, recompute=recompute)
    assert ("--recompute" in str(stop.value)) != recompute
    assert isinstance(stop.value.__cause__, torch.OutOfMemoryError)
    assert differing(before, weights(model)) == []
    train(model)  # training still works


@pytest.mark.parametrize("kd_space", KD_SPACES)
def test_half_precision_trains_float32_weights_and_does_not_change_frozen_ones(tmp_path, kd_space):
    model = student(spec=HALF, kd_space=kd_space)
    before = weights(model.backbone)
    train(model, epochs=2, checkpoint=tmp_path / "c.pt")
    params = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert set(differing(before, weights(model.backbone))) == params != set()
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("kd_space", ["embedding", "logits"])
def test_half_precision_checkpoint_equals_the_model(tmp_path, kd_space):
    whole, resumed = student(spec=HALF, kd_space=kd_space), student(spec=HALF, kd_space=kd_space)
    train(whole, epochs=1, checkpoint=tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)["weights"]
    assert differing(saved, {k: v for k, v in weights(whole).items() if k in saved}) == []
    train(resumed, epochs=1, checkpoint=tmp_path / "c.pt", resume=True)
    assert differing(weights(whole), weights(resumed)) == []


def test_waiting_is_a_share_of_the_time():
    class Slow:
        def __len__(self):
            return len(TASK[0])

        def __getitem__(self, rows):
            time.sleep(0.02)
            return TASK[0][rows]

    quick, slow = train(student(), epochs=2), train(student(), (Slow(), *TASK[1:]), epochs=2)
    for history in (quick, slow):
        assert history["waiting"].between(0, 1).all()
    assert (slow["waiting"] * slow["seconds"] > 0.01).all()


# --- float16, as on a V100 ------------------------------------------------------------------------------------------

SIXTEEN = replace(TINY, precision={"cpu": torch.float16})


@pytest.mark.parametrize("method", ["bone", "lora", "adalora"])
def test_float16_with_gradient_scaling_trains_like_float32(method):
    whole = train(student(method, steps=9), epochs=3)
    half = train(student(method, steps=9, spec=SIXTEEN), epochs=3)
    np.testing.assert_allclose(half["loss"], whole["loss"], rtol=0.02)
    assert half["loss"].iloc[-1] < half["loss"].iloc[0]


def test_overflowing_step_is_skipped_and_ranks_stay_finite(monkeypatch):
    """The initial scale overflows float16 and is reduced until gradients are finite."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kw: scaler(*args, init_scale=2.0**40, **kw))
    model = student("adalora", steps=90, spec=SIXTEEN)
    before = weights(model)
    assert np.isfinite(train(model, epochs=1)["loss"]).all()
    assert differing(before, weights(model)) == []
    train(model, epochs=12)
    assert differing(before, weights(model)) != []
    ranks = model.backbone.adapter.tuner.rankallocator
    assert all(torch.isfinite(value).all() for value in ranks.exp_avg_ipt.values())
    assert all(torch.isfinite(p).all() for p in model.parameters())
