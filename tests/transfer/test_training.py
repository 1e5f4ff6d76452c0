"""Training: pieces and processes change nothing, a killed run goes on, and what stops one is named."""

import importlib
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
from peka_lite.backbones.load import load_backbone
from peka_lite.transfer import _checkpoint, _training as training
from peka_lite.transfer._training import Epochs
from peka_lite.transfer.fit import fit
from peka_lite.transfer.model import NotFinite, TransferModel

transfer = importlib.import_module("peka_lite.transfer.fit")  # the module: its package offers the function

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")

HALF = replace(TINY, precision={"cpu": torch.bfloat16})  # a GPU's compute type, on the CPU
BATCH = 8
COLUMNS = ["epoch", "loss", "kd", "ce", "accuracy"]  # of the history, without its times


TASK = task()


def student(method="bone", *, spec=TINY, kd_space="embedding", dropout=0.0, steps=9, seed=0):
    backbone = load_backbone(spec, weights="random", seed=0)
    adapt(backbone, method, r=16, dropout=dropout, total_steps=steps if method == "adalora" else None)
    return TransferModel(backbone, teacher_dim=6, n_classes=3, hidden=16, kd_space=kd_space, seed=seed)


def teach(model, data=TASK, **options):
    options = {"epochs": 1, "batch_size": BATCH, "lr": 1e-3, "device": "cpu"} | options
    return fit(model, *data, **options)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def differing(a, b):
    assert a.keys() == b.keys()
    return [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])]


class Descent(torch.optim.SGD):
    """Adam's place taken by plain descent, which does not blow rounding up; remembers every step's gradients."""

    def __init__(self, learn, *, lr, fused):
        super().__init__(learn, lr=lr)
        self.gradients = []
        Descent.last = self

    def step(self, closure=None):
        self.gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return super().step(closure)


@pytest.fixture
def descent(monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", Descent)


def assert_same_course(a, b, gradients, expected):
    assert len(gradients) == len(expected) > 0
    for step, (got, want) in enumerate(zip(gradients, expected, strict=True)):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=2e-4, atol=2e-6, msg=lambda m, step=step: f"step {step}: {m}")
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-5, atol=1e-6, msg=lambda m, k=k: f"{k}: {m}")


# pieces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bone", "adalora"])
@pytest.mark.parametrize("n", [20, 17])  # a last batch of 4, and one of a single tile
def test_pieces_of_any_size_give_the_gradient_of_the_whole_batch(descent, method, n):
    data = task(n)
    whole = student(method)
    history, expected = teach(whole, data, epochs=2, lr=0.05), Descent.last.gradients
    for piece in (1, 3, 5, BATCH):
        cut = student(method)
        got = teach(cut, data, epochs=2, lr=0.05, micro_batch=piece)
        assert_same_course(weights(cut), weights(whole), Descent.last.gradients, expected)
        np.testing.assert_allclose(got[COLUMNS], history[COLUMNS], rtol=1e-5, atol=1e-6)


def test_no_more_tiles_than_a_piece_are_on_the_device_at_once():
    model, seen = student(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    teach(model, micro_batch=3)
    assert seen == [3, 3, 2, 3, 3, 2, 3, 1]


def test_a_piece_larger_than_the_batch_is_the_batch():
    whole, cut = student(), student()
    teach(whole)
    teach(cut, micro_batch=100)
    assert differing(weights(whole), weights(cut)) == []


def test_a_piece_of_nothing_is_refused():
    with pytest.raises(ValueError, match="micro_batch must be above 0, not 0"):
        teach(student(), micro_batch=0)


@pytest.mark.parametrize("method", ["bone", "lora"])
def test_recomputing_changes_no_weight(method):
    plain, again = student(method, dropout=0.3), student(method, dropout=0.3)
    teach(plain, epochs=2)
    teach(again, epochs=2, recompute=True)
    assert differing(weights(plain), weights(again)) == []
    assert not any("forward" in block.__dict__ for block in again.backbone.blocks)


def test_a_compiled_network_takes_whole_pieces_and_the_plain_one_the_rest(monkeypatch):
    taken = []

    def compile(model, **_):
        def run(x):
            taken.append(len(x))
            return model(x)

        return run

    plain, compiled = student(), student()
    teach(plain, micro_batch=3)
    monkeypatch.setattr(torch, "compile", compile)
    teach(compiled, micro_batch=3, compile=True)
    assert taken == [3] + [3, 3] * 2 + [3]  # the trial first
    assert differing(weights(plain), weights(compiled)) == []


# processes ---------------------------------------------------------------------------------------------------------


def shared(out):
    """What every process of a test does: the last batch is a single tile, and each epoch ends in a checkpoint."""
    wrote, save, adam = [], transfer.save_checkpoint, torch.optim.Adam

    def recorded(path, *rest):
        wrote.append(path.name)
        save(path, *rest)

    torch.optim.Adam, transfer.save_checkpoint = Descent, recorded
    try:
        model = student()
        history = teach(model, task(17), epochs=2, lr=0.05, checkpoint=out / "c.pt")
    finally:
        torch.optim.Adam, transfer.save_checkpoint = adam, save
    return {
        "weights": weights(model), "gradients": Descent.last.gradients, "history": history[COLUMNS].to_numpy(),
        "learned_from": model.backbone.adapter.fitted_on, "waiting": history["waiting"].to_numpy(), "wrote": wrote,
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
torch.save(test_training.shared(out), out / f"rank{os.environ['RANK']}.got")
"""


def child_env(**more):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | more


def test_two_processes_learn_what_one_does(tmp_path):
    one, two, script = tmp_path / "one", tmp_path / "two", tmp_path / "together.py"
    two.mkdir()
    script.write_text(TOGETHER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script,
         Path(__file__).parent, two],
        env=child_env(ACCELERATE_USE_CPU="true"), capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    want = shared(one)
    ranks = [torch.load(two / f"rank{rank}.got", weights_only=False) for rank in (0, 1)]
    assert [got["wrote"] for got in ranks] == [want["wrote"], []] == [["c.pt", "c.pt"], []]
    for got in ranks:
        assert_same_course(got["weights"], want["weights"], got["gradients"], want["gradients"])
        np.testing.assert_allclose(got["history"], want["history"], rtol=1e-5, atol=1e-6)
        assert np.array_equal(got["learned_from"], row_ids(task(17)[0]))
        assert ((got["waiting"] >= 0) & (got["waiting"] <= 1)).all()
    assert differing(ranks[0]["weights"], ranks[1]["weights"]) == []  # the two did not drift apart by a bit
    assert sorted(p.name for p in two.iterdir()) == ["c.pt", "rank0.got", "rank1.got"]


@pytest.mark.parametrize(("n", "count"), [(20, 2), (17, 2), (17, 3), (1, 4), (19, 8)])
@pytest.mark.parametrize("piece", [1, 3, 8])
def test_processes_share_every_batch_and_step_together(n, count, piece):
    class Part:
        """What `_pieces` looks at."""

        batch_size = BATCH

    order, steps = np.random.default_rng(0).permutation(n), -(-n // BATCH)
    parts = []
    for rank in range(count):
        part = Part()
        part.piece, part.processes = piece, type("Processes", (), {"rank": rank, "count": count})
        parts.append(Epochs._pieces(part, order))
    assert [sum(last for _, _, last in pieces) for pieces in parts] == [steps] * count
    shares = np.zeros((count, steps))
    seen = [[] for _ in range(steps)]
    for rank, pieces in enumerate(parts):
        step = 0
        for rows, in_batch, last in pieces:
            assert len(rows) <= piece
            seen[step].extend(rows)
            shares[rank, step] += len(rows) / in_batch
            step += last
    for step in range(steps):
        assert sorted(seen[step]) == sorted(order[step * BATCH : (step + 1) * BATCH])
    np.testing.assert_allclose(shares.sum(0), 1)


# killed ------------------------------------------------------------------------------------------------------------

LIVES, LONG = 10, 8  # kills, and epochs


def mortal(out, death, within):
    """Learn in a process that kills itself at its `death`-th moment, of any or of those `within` a checkpoint."""
    moments = {"left": death}
    save, replace_file = torch.save, os.replace

    def moment(writing):
        if death is not None and (writing or not within):
            moments["left"] -= 1
            if moments["left"] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def slowly(state, path):
        save(state, whole := Path(f"{path}.whole"))
        data = whole.read_bytes()
        whole.unlink()
        with open(path, "wb") as file:
            for at in range(0, len(data), len(data) // 6 + 1):
                moment(True)
                file.write(data[at : at + len(data) // 6 + 1])
                file.flush()
        moment(True)

    def replacing(a, b):
        replace_file(a, b)
        moment(False)

    class Tiles:
        def __len__(self):
            return len(TASK[0])

        def __getitem__(self, rows):
            moment(False)
            return TASK[0][rows]

    _checkpoint.torch.save, _checkpoint.os.replace = slowly, replacing
    model = student("lora", dropout=0.3)
    model.projector.register_forward_hook(lambda *_: moment(False))
    history = teach(model, (Tiles(), *TASK[1:]), epochs=LONG, checkpoint=out / "c.pt", resume=True)
    save({"weights": weights(model), "history": history[COLUMNS].to_numpy(), "ids": model.backbone.adapter.fitted_on},
         out / "end")  # fmt: skip


def supervise(root):
    """Fork a life after another, each from before PyTorch has started a thread; prints how each ended, and where."""
    import peft  # noqa: F401 - what every life would import again
    import torch._dynamo

    rng = np.random.default_rng(5)

    def live(out, death=None, within=False):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                mortal(out, death, within)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    (root / "whole").mkdir()
    (root / "broken").mkdir()
    print("whole", live(root / "whole"))
    for life in range(LIVES):
        # Every other life ends within a write. Some end before their first epoch does.
        ended = live(root / "broken", int(rng.integers(0, 14)), within=life % 2 == 0)
        file = root / "broken" / "c.pt"
        epochs = len(torch.load(file, weights_only=True)["history"]) if file.is_file() else 0
        print("life", ended, epochs, len(list((root / "broken").glob(".*.partial"))))
    print("last", live(root / "broken"))


def test_a_run_killed_ten_times_ends_bitwise_as_an_unbroken_one(tmp_path):
    code = (
        "import sys, pathlib, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1]); import test_training; "
    )
    code += "test_training.supervise(pathlib.Path(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", code, Path(__file__).parent, tmp_path],
        env=child_env(), capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line.split() for line in done.stdout.splitlines()]
    assert said[0] == ["whole", "0"]
    assert said[-1] == ["last", "0"], done.stderr[-3000:]
    lives = [tuple(map(int, line[1:])) for line in said[1:-1]]
    assert [ended for ended, _, _ in lives] == [-signal.SIGKILL] * LIVES
    epochs = [at for _, at, _ in lives]
    assert epochs == sorted(epochs)  # nothing learned is lost
    assert 0 < epochs[-1] < LONG
    assert max(partials for _, _, partials in lives) == 1  # they did die while they wrote, and the next one cleaned up
    whole, broken = (torch.load(tmp_path / run / "end", weights_only=False) for run in ("whole", "broken"))
    assert differing(whole["weights"], broken["weights"]) == []
    assert np.array_equal(whole["history"], broken["history"])
    assert np.array_equal(whole["ids"], broken["ids"])
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == ["c.pt", "end"]


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    other = [tmp_path / name for name in (".d.pt.7.partial", ".c.pt.partial.txt", "c.pt.7.partial")]
    stale = [tmp_path / f".c.pt.{pid}.partial" for pid in (1, 99999)]
    for file in other + stale:
        file.write_bytes(b"half")
    teach(student(), checkpoint=tmp_path / "c.pt")
    assert sorted(tmp_path.iterdir()) == sorted([*other, tmp_path / "c.pt"])


# not finite --------------------------------------------------------------------------------------------------------


def planted(monkeypatch, epoch, rows):
    """Make the teacher of some rows no number from an epoch on."""
    run = Epochs.run

    def broken(self, at, bar):
        if at == epoch:
            self.T = self.T.clone()
            self.T[rows] = torch.nan
        return run(self, at, bar)

    monkeypatch.setattr(Epochs, "run", broken)


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("step", [0, 1, 2])  # the last is a short batch, and its answer comes after the epoch
def test_a_loss_that_is_no_number_names_the_planted_tiles_and_the_epoch_before_is_kept(
    tmp_path, monkeypatch, step, micro_batch
):
    order = np.random.default_rng((0, 1)).permutation(len(TASK[2]))
    rows = order[step * BATCH : (step + 1) * BATCH][[2, 0]]  # of one piece, whichever way it is cut
    with monkeypatch.context() as patch:
        planted(patch, 1, rows)
        with pytest.raises(
            NotFinite, match=rf"loss is nan at epoch 1, step {step}; try a lower lr than 0\.001"
        ) as stop:
            teach(student(), epochs=3, checkpoint=tmp_path / "c.pt", micro_batch=micro_batch)
    assert stop.value.rows == sorted(rows)
    size = {None: [8, 8, 4], 3: [3, 3, 3]}[micro_batch][step]
    assert str(stop.value).endswith(f"2 of its {size} tiles, rows {min(rows)}, {max(rows)}")
    whole, resumed = student(), student()
    assert len(torch.load(tmp_path / "c.pt", weights_only=True)["history"]) == 1
    teach(resumed, epochs=2, checkpoint=tmp_path / "c.pt", resume=True, micro_batch=micro_batch)
    teach(whole, epochs=2, micro_batch=micro_batch)
    assert differing(weights(whole), weights(resumed)) == []


def test_where_every_tiles_loss_is_none_all_of_the_piece_are_named():
    with pytest.raises(NotFinite) as stop:
        teach(student(), epochs=3, lr=1e30)
    assert len(stop.value.rows) in (BATCH, 4)
    assert stop.value.rows == sorted(stop.value.rows)


def test_many_rows_are_shown_in_part_and_kept_in_full(monkeypatch):
    planted(monkeypatch, 0, list(range(20)))
    with pytest.raises(NotFinite, match=r"20 of its 20 tiles, rows 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.$") as stop:
        teach(student(), batch_size=20)
    assert stop.value.rows == list(range(20))


# turns -------------------------------------------------------------------------------------------------------------


def test_turns_follow_the_seed_and_are_off_by_default():
    models = {name: student() for name in ("plain", "off", "on", "again", "other")}
    teach(models["plain"], epochs=2)
    teach(models["off"], epochs=2, augment=False)
    teach(models["on"], epochs=2, augment=True)
    teach(models["again"], epochs=2, augment=True)
    teach(models["other"], epochs=2, augment=True, seed=1)
    got = {name: weights(model) for name, model in models.items()}
    assert differing(got["plain"], got["off"]) == []
    assert differing(got["on"], got["again"]) == []
    assert len(differing(got["on"], got["off"])) > 0
    assert len(differing(got["on"], got["other"])) > 0


def test_every_epoch_turns_its_tiles_in_a_way_of_its_own(monkeypatch):
    seen = []

    def spy(tiles, turns, turn=training.flip_tiles):
        seen.append((row_ids(tiles.numpy()), turns))
        return turn(tiles, turns)

    monkeypatch.setattr(training, "flip_tiles", spy)
    teach(student(), epochs=2, augment=True)
    by_tile = []
    for epoch in (seen[:3], seen[3:]):
        ids, turns = map(np.concatenate, zip(*epoch, strict=True))
        assert set(turns.tolist()) <= set(range(8))
        assert len(set(turns.tolist())) > 3
        by_tile.append(turns[np.argsort(ids)])
    assert (by_tile[0] != by_tile[1]).sum() > 10


def test_turns_do_not_depend_on_pieces(descent):
    whole, cut = student(), student()
    teach(whole, augment=True, lr=0.05)
    expected = Descent.last.gradients
    teach(cut, augment=True, lr=0.05, micro_batch=3)
    assert_same_course(weights(cut), weights(whole), Descent.last.gradients, expected)


def test_a_tile_is_named_as_it_lies_not_as_it_is_turned():
    model = student()
    teach(model, augment=True)
    assert np.array_equal(model.backbone.adapter.fitted_on, row_ids(TASK[0]))


# half precision, memory, waiting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_that_does_not_suffice_names_what_would(monkeypatch, recompute):
    model = student(spec=HALF)
    before = weights(model)

    def forward(x):
        assert model.backbone.patch_embed.proj.weight.dtype == torch.bfloat16
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(model.backbone, "forward", forward)
        with pytest.raises(MemoryError, match=r"cpu ran out of memory at 6 tiles at once; --micro-batch 3 ") as stop:
            teach(model, micro_batch=6, recompute=recompute)
    assert ("--recompute" in str(stop.value)) != recompute
    assert isinstance(stop.value.__cause__, torch.OutOfMemoryError)
    assert differing(before, weights(model)) == []
    teach(model)  # and it can be taught after all


@pytest.mark.parametrize("kd_space", transfer.KD_SPACES)
def test_in_half_precision_what_learns_is_single_and_what_does_not_stays_bit_equal(tmp_path, kd_space):
    model = student(spec=HALF, kd_space=kd_space)
    before = weights(model.backbone)
    teach(model, epochs=2, checkpoint=tmp_path / "c.pt")
    learn = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert set(differing(before, weights(model.backbone))) == learn != set()
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("kd_space", ["embedding", "logits"])
def test_in_half_precision_a_checkpoint_holds_what_the_model_has(tmp_path, kd_space):
    whole, resumed = student(spec=HALF, kd_space=kd_space), student(spec=HALF, kd_space=kd_space)
    teach(whole, epochs=1, checkpoint=tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)["weights"]
    assert differing(saved, {k: v for k, v in weights(whole).items() if k in saved}) == []
    teach(resumed, epochs=1, checkpoint=tmp_path / "c.pt", resume=True)
    assert differing(weights(whole), weights(resumed)) == []


def test_the_share_of_time_spent_waiting_is_a_share():
    class Slow:
        def __len__(self):
            return len(TASK[0])

        def __getitem__(self, rows):
            time.sleep(0.02)
            return TASK[0][rows]

    quick, slow = teach(student(), epochs=2), teach(student(), (Slow(), *TASK[1:]), epochs=2)
    for history in (quick, slow):
        assert history["waiting"].between(0, 1).all()
    assert (slow["waiting"] * slow["seconds"] > 0.01).all()


# --- float16, as on a V100 ------------------------------------------------------------------------------------------

SIXTEEN = replace(TINY, precision={"cpu": torch.float16})


@pytest.mark.parametrize("method", ["bone", "lora", "adalora"])
def test_float16_with_gradient_scaling_learns_as_float32(method):
    whole = teach(student(method, steps=9), epochs=3)
    half = teach(student(method, steps=9, spec=SIXTEEN), epochs=3)
    np.testing.assert_allclose(half["loss"], whole["loss"], rtol=0.02)
    assert half["loss"].iloc[-1] < half["loss"].iloc[0]


def test_a_step_that_overflows_is_left_out_and_ranks_stay_numbers(monkeypatch):
    """A scale that float16 cannot hold, as at the start of a training: it falls until gradients fit."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kw: scaler(*args, init_scale=2.0**40, **kw))
    model = student("adalora", steps=90, spec=SIXTEEN)
    before = weights(model)
    assert np.isfinite(teach(model, epochs=1)["loss"]).all()
    assert differing(before, weights(model)) == []
    teach(model, epochs=12)
    assert differing(before, weights(model)) != []
    ranks = model.backbone.adapter.tuner.rankallocator
    assert all(torch.isfinite(value).all() for value in ranks.exp_avg_ipt.values())
    assert all(torch.isfinite(p).all() for p in model.parameters())
