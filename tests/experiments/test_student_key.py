"""No setting of a student is forgotten in its cache key, and no file or array is stored or read twice."""

import importlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import peka_lite._core.hashing as hashing
from peka_lite._core.cache import KINDS, cached, list_cache, prune_cache
from peka_lite.backbones import load_backbone
from peka_lite.cli.main import main
from peka_lite.experiments import Features, RunConfig, features, load_or_run, run
from peka_lite.experiments.settings import SETTINGS, settings_deciding
from peka_lite.teachers import ScFoundation

fit_module = importlib.import_module("peka_lite.transfer.fit")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*random weights", "ignore:.*each patient is one fold", "ignore:.*allow"),
    pytest.mark.usefixtures("tiny_backbone"),
]
SMALL = {"backbone": "tiny", "weights": "random", "epochs": 1, "n_genes": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Recorded:
    """Stand for a config, and record the settings that are read."""

    def __init__(self, config):
        self._config, self.read = config, set()

    def __getattr__(self, name):
        if name in SETTINGS:
            self.read.add(name)
        value = getattr(type(self._config), name, None)
        if isinstance(value, property):  # as of the recorded settings
            return value.fget(self)
        if callable(value):
            return lambda *a: value(self, *a)
        return getattr(self._config, name)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"method": "adalora", "augment": True, "shuffle_teacher": True},
        {"label_method": "kmeans", "n_clusters": 3, "kd_space": "logits"},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_that_reaches_a_student_decides_it(mini_cohort, tmp_path, monkeypatch, settings):
    config = RunConfig(**SMALL | settings)
    built = Features(config, mini_cohort, device="cpu")
    built.config = recorded = Recorded(config)
    recorded.load_teacher(), recorded.make_labeler()
    monkeypatch.setattr(features, "fit", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    tmp_path.joinpath("work").mkdir()
    with pytest.raises(KeyboardInterrupt):  # all arguments of `fit` have been read
        built._make_student(np.arange(40), tmp_path / "work")
    assert {"seed", "method", "layers", "tau", "lr", "epochs", "kd_space", "teacher", "label_method"} <= recorded.read
    forgotten = recorded.read - set(settings_deciding("student", "memory"))
    assert not forgotten, f"{forgotten} reach a student: set decides='student' in the table of settings"


OTHER = {
    "backbone": "mini", "weights": "FILE", "method": "lora", "r": 8, "layers": "proj", "teacher": "scfoundation-mini",
    "label_method": "kmeans", "resolution": 0.7, "n_clusters": 3, "kd_space": "logits", "tau": 1.0, "kd_weight": 0.1,
    "ce_weight": 0.1, "epochs": 2, "batch_size": 8, "lr": 1e-3, "augment": True, "shuffle_teacher": True, "seed": 1,
    "teacher_checkpoint": "FILE", "teacher_genes": "FILE", "teacher_mapping": "FILE",
}  # fmt: skip


@pytest.mark.parametrize("name", settings_deciding("student"))
def test_each_setting_of_a_student_changes_its_cache_key(mini_cohort, tmp_path, monkeypatch, name):
    teacher = ScFoundation.random(mini_cohort.genes, hidden_dim=8, depth=1)
    base, changed = dict(SMALL), OTHER[name]
    if name == "n_clusters":
        base |= {"label_method": "kmeans"}
    if name.startswith("teacher_"):
        base |= {"teacher": "scfoundation", "teacher_checkpoint": str(tmp_path / "other")}
        monkeypatch.setattr(RunConfig, "load_teacher", lambda self: teacher)
    if changed == "FILE":
        changed = str(tmp_path / "file")
        save_file(load_backbone("tiny", weights="random", seed=3).state_dict(), changed)
    keys = [
        Features(RunConfig(**base | settings), mini_cohort, device="cpu").folder(np.arange(40))
        for settings in ({}, {name: changed}, {})
    ]
    assert keys[0] == keys[2] != keys[1]


def test_settings_of_memory_and_probe_share_a_student(mini_cohort):
    changes = ({}, {"micro_batch": 4}, {"recompute": True}, {"n_genes": 9}, {"alpha": 3.0}, {"features": "projector"})
    built = [Features(RunConfig(**SMALL | change), mini_cohort, device="cpu") for change in changes]
    assert len({each.folder(np.arange(40)) for each in built}) == 1
    assert len({each.folder(np.arange(k)) for each in built for k in (39, 40)}) == 2  # other rows, another student


def test_seed_and_files_named_like_a_setting_change_no_frozen_student(mini_cohort, tmp_path, monkeypatch):
    def folder(rows=None, **settings):
        return Features(RunConfig(**settings), mini_cohort, device="cpu").folder(rows)

    assert folder(method="none", seed=0) == folder(method="none", seed=1)  # published weights
    assert folder(**SMALL, method="none", seed=0) != folder(**SMALL, method="none", seed=1)  # random ones
    before = folder(np.arange(9))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bone").write_text("x")
    assert folder(np.arange(9)) == before


def test_weights_of_the_hub_are_keyed_by_their_commit(mini_cohort, tmp_path, monkeypatch):
    folders = []
    for commit in ("a" * 40, "b" * 40):
        file = tmp_path / "snapshots" / commit / "model.safetensors"
        file.parent.mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, file)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, file=file, **k: str(file))
        config = RunConfig(backbone="uni", method="none")
        folders.append(Features(config, mini_cohort, device="cpu").folder(None))
    assert folders[0] != folders[1]


def test_a_strict_run_reads_and_hashes_a_weights_file_once(mini_root, tmp_path, monkeypatch):
    weights, read, hashed = tmp_path / "tiny.safetensors", [], []
    save_file(load_backbone("tiny", weights="random", seed=3).state_dict(), weights)
    monkeypatch.setattr(features, "load_backbone", lambda *a, **k: read.append(1) or load_backbone(*a, **k))
    real = hashing.hashlib.file_digest
    monkeypatch.setattr(hashing.hashlib, "file_digest", lambda file, name: hashed.append(file.name) or real(file, name))
    config = RunConfig(
        **SMALL | {"cohort": str(mini_root), "weights": str(weights), "protocol": "strict", "n_splits": 3}
    )
    run(config, tmp_path / "out", maps=False)
    assert len(list((tmp_path / "cache" / "students").glob("*/record.json"))) == 6
    assert len(read) == 1
    assert [str(name) for name in hashed].count(str(weights)) == 1


def test_no_array_is_stored_twice(mini_root, mini_cohort, tmp_path, cache, monkeypatch):
    teacher = ScFoundation.random(mini_cohort.genes, hidden_dim=8, depth=1)
    monkeypatch.setattr(RunConfig, "load_teacher", lambda self: teacher)
    run(RunConfig(**SMALL | {"cohort": str(mini_root), "n_splits": 2}), tmp_path / "out", maps=False)
    arrays = [path.read_bytes() for path in cache.rglob("*.npy") if path.stat().st_size > 1000]
    assert len(arrays) >= len(mini_cohort.slides) + 2
    assert len(set(arrays)) == len(arrays)
    stored = sum(len(np.load(path)) for path in (cache / "embeddings").rglob("E.npy"))
    assert stored == len(mini_cohort)


def test_at_most_five_functions_are_between_the_call_and_the_loss(mini_root, tmp_path, monkeypatch):
    import traceback

    import peka_lite

    home, stacks = str(peka_lite.__path__[0]), []
    real = fit_module.transfer_loss

    def record(*args, **options):
        stacks.append([f.name for f in traceback.extract_stack() if f.filename.startswith(home)])
        return real(*args, **options)

    monkeypatch.setattr(fit_module, "transfer_loss", record)
    load_or_run(RunConfig(**SMALL | {"cohort": str(mini_root), "n_splits": 2}), tmp_path / "out", maps=False)
    assert stacks[0] == ["load_or_run", "run", "cached", "_make_student", "fit"]
    assert max(map(len, stacks)) <= 5


def test_result_is_made_once_and_pruned_when_unused(tmp_path, cache, capsys):
    calls = []

    def make(work):
        calls.append(1)
        (work / "labels.npy").write_bytes(b"x" * 2000)
        return {"n": 3}

    folders = [cached("labels", {"a": 1}, make, name="one") for _ in range(2)]
    assert folders[0] == folders[1]
    assert len(calls) == 1
    assert json.loads((folders[0] / "record.json").read_text()) == {"n": 3}
    assert cached("labels", {"a": 2}, make) != folders[0]
    assert list_cache()["kind"].tolist() == ["labels"] * 2
    assert set(KINDS) == {"embeddings", "labels", "students"}
    assert len(prune_cache(days=1)) == 0
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "2 results, 4.0 kB" in shown
    assert folders[0].name in shown
    assert main(["cache", "--prune", "0"]) == 0
    assert "2 results, 4.0 kB removed" in capsys.readouterr().out
    assert list_cache().empty
    assert not list((cache / "labels").iterdir())
