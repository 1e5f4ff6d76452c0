"""The doctor: one line a subject, a fix exactly where something is amiss, and never an exception or a token."""

import ast
import importlib
import inspect
import os
import sys
import threading
import tomllib
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_token

from peka_lite.cli.doctor import PEFT, PEFT_NAMES, TORCH, Check, doctor, report
from peka_lite.data.download import read_manifest

adapters = importlib.import_module("peka_lite.adapters.adapt")

SUBJECTS = ("python", "torch", "gpu", "precision", "peft", "disk", "token", "gates", "artifacts")
SECRET = "hf_" + "s" * 34
DEFAULT_BUILD = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")  # of torch 2.10.0


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine without GPU, driver, token, fetched artifacts or network, and with room on its disk."""
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDA_VISIBLE_DEVICES", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.auth_check", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100e9))
    put_in(monkeypatch)


def put_in(monkeypatch, *cards, built=DEFAULT_BUILD):
    """Put (name, capability) cards into the machine."""
    cards = [SimpleNamespace(name=name, major=c[0], minor=c[1], total_memory=16 * 2**30) for name, c in cards]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: cards[i])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (cards[0].major, cards[0].minor))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))


def install_driver(tmp_path, *lines):
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)


def log_in(monkeypatch, answer=lambda repo, repo_type: None):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: SECRET)
    monkeypatch.setattr("huggingface_hub.auth_check", answer)


def look_at(subject, *, online=True):
    checks = doctor(online=online)
    assert tuple(check.name for check in checks) == SUBJECTS
    for check in checks:
        assert check.status in ("ok", "note", "fail")
        assert (check.fix is None) == (check.status == "ok")
        assert "\n" not in check.line + (check.fix or "")
    assert SECRET not in report(checks)
    return checks[SUBJECTS.index(subject)]


def hub_error(cls, status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return cls(f"Illegal header value b'Bearer {SECRET}'", response=response)


# --- report ------------------------------------------------------------------------------------------------------


def test_a_report_is_a_line_a_check_with_its_fix_below():
    checks = [Check("python", "ok", "3.11.9"), Check("gpu", "note", "no GPU", "find one")]
    assert report(checks) == "ok    python      3.11.9\nnote  gpu         no GPU\n      fix: find one"


def test_a_machine_without_gpu_token_or_network_fails_in_nothing():
    assert look_at("python").status == "ok"
    assert {c.name: c.status for c in doctor() if c.status != "ok"} == dict.fromkeys(
        ("gpu", "token", "gates", "artifacts"), "note"
    )


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_check_that_breaks_is_a_check_that_says_why(monkeypatch, subject):
    def broken(**_):
        raise RuntimeError("the device fell off\nits bus")

    monkeypatch.setattr(f"peka_lite.cli.doctor._{subject}", broken)
    check = look_at(subject)
    assert check.status == "fail"
    assert "RuntimeError" in check.line


# --- versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "fail")]
)
def test_python_is_3_11_to_3_13(monkeypatch, version, status):
    monkeypatch.setattr("peka_lite.cli.doctor.sys", SimpleNamespace(version_info=version))
    check = look_at("python")
    assert check.status == status
    assert check.line.startswith(".".join(map(str, version)))


def test_the_versions_asked_for_are_those_of_pyproject():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {f"torch>={TORCH[0]}.{TORCH[1]}", f"peft>={PEFT[0]}.{PEFT[1]}"} <= set(project["dependencies"])
    assert project["requires-python"] == ">=3.11,<3.14"


def test_the_names_asked_of_peft_are_those_the_adapters_import():
    nodes = ast.walk(ast.parse(inspect.getsource(adapters)))
    used = [alias.name for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "peft"
            for alias in node.names]  # fmt: skip
    assert sorted(used) == sorted(PEFT_NAMES)


@pytest.mark.parametrize(("version", "status"), [("2.5.1", "fail"), ("2.6.0+cpu", "ok"), ("2.10.0+cu128", "ok")])
def test_torch_is_2_6_or_newer(monkeypatch, version, status):
    monkeypatch.setattr(torch, "__version__", version)
    check = look_at("torch")
    assert check.status == status
    assert version in check.line


def test_a_torchvision_of_another_torch_is_named_with_the_lock(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    check = look_at("torch")
    assert check.status == "fail"
    assert "torchvision::nms does not exist" in check.line
    assert "requirements.lock" in check.fix


@pytest.mark.parametrize(("version", "status"), [("0.17.1", "fail"), ("0.18.0", "ok"), ("1.0", "ok")])
def test_peft_is_0_18_or_newer(monkeypatch, version, status):
    monkeypatch.setattr(peft, "__version__", version)
    assert look_at("peft").status == status


def test_a_peft_without_miss_fails_by_name(monkeypatch):
    monkeypatch.delattr(peft, "MissConfig")
    check = look_at("peft")
    assert check.status == "fail"
    assert "lacks MissConfig" in check.line


@pytest.mark.parametrize("package", ["peft", "torchvision"])
def test_a_package_that_is_not_there_fails_by_name(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    check = look_at("torch" if package == "torchvision" else package)
    assert check.status == "fail"
    assert f"import of {package}" in check.line


# --- GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 0), DEFAULT_BUILD, True),
        ((8, 6), ("sm_80",), True),
        ((8, 0), ("sm_86",), False),
        ((8, 9), DEFAULT_BUILD, True),
        ((12, 1), DEFAULT_BUILD, True),
        ((12, 0), ("sm_100",), False),
        ((12, 0), ("sm_90", "compute_90"), True),
        ((7, 5), ("compute_80",), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_90a", "compute_90a"), False),
        ((6, 1), DEFAULT_BUILD, False),
    ],
)
def test_a_card_needs_a_binary_of_its_major_architecture_or_older_ptx(monkeypatch, capability, built, runs):
    put_in(monkeypatch, ("Card", capability), built=built)
    check = look_at("gpu")
    assert check.status == ("ok" if runs else "fail")
    assert f"Card (sm_{capability[0]}{capability[1]}, 16 GiB)" in check.line
    assert runs or f"sm_{capability[0]}{capability[1]}" in check.fix


def test_a_v100_without_kernels_is_sent_to_the_torch_of_the_lock(monkeypatch):
    put_in(monkeypatch, ("Tesla V100", (7, 0)), built=("sm_75", "sm_80"))
    fix = look_at("gpu").fix
    assert "torch 2.10.0" in fix
    lock = (Path(__file__).parents[2] / "requirements.lock").read_text()
    assert "\ntorch==2.10.0 " in lock


def test_every_card_is_named_and_one_without_kernels_is_enough_to_fail(monkeypatch):
    put_in(monkeypatch, ("A100", (8, 0)), ("A100", (8, 0)), ("GTX 1080", (6, 1)))
    check = look_at("gpu")
    assert check.status == "fail"
    assert "2 x A100 (sm_80, 16 GiB), GTX 1080 (sm_61, 16 GiB); torch has no kernels for sm_61, only" in check.line


def test_a_driver_that_lists_no_card_is_no_gpu(tmp_path):
    install_driver(tmp_path, "No devices found.")
    check = look_at("gpu")
    assert (check.status, "no GPU" in check.line) == ("note", True)


@pytest.mark.parametrize(
    ("cuda", "visible", "status", "line", "fix"),
    [
        (None, None, "fail", "built without CUDA", "requirements.lock"),
        ("12.8", None, "fail", "CUDA 12.8, can use none", "driver to one for CUDA 12.8"),
        ("12.8", "", "note", "CUDA_VISIBLE_DEVICES=''", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_card_that_torch_does_not_see_is_told_from_no_card(monkeypatch, tmp_path, cuda, visible, status, line, fix):
    install_driver(tmp_path, "GPU 0: Tesla T4 (UUID: GPU-0)")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check = look_at("gpu")
    assert check.status == status
    assert line in check.line
    assert fix in check.fix


@pytest.mark.parametrize(
    ("cards", "dtype"),
    [
        ([], "float32"),
        ([("T4", (7, 5))], "float16"),
        ([("A100", (8, 0))], "bfloat16"),
        ([("H100", (9, 0))], "bfloat16"),
    ],
)
def test_precision_is_what_runs_compute_in(monkeypatch, cards, dtype):
    put_in(monkeypatch, *cards)
    assert look_at("precision").line.startswith(f"{dtype} on the {'GPU' if cards else 'CPU'}")


# --- disk and artifacts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "status"), [(4.9, "fail"), (5, "note"), (19.9, "note"), (20, "ok")])
def test_free_space_is_asked_of_the_nearest_folder_that_exists(monkeypatch, tmp_path, free, status):
    asked = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=free * 1e9))
    check = look_at("disk")
    assert asked == [tmp_path]
    assert check.status == status
    assert check.line.startswith(f"{free:.1f} GB free in {tmp_path}")


def test_fetched_artifacts_are_listed(monkeypatch):
    monkeypatch.setattr(
        "peka_lite.data.download.find_fetched", lambda name: Path("/x") if name in ("breast", "hgnc") else None
    )
    check = look_at("artifacts")
    assert check.status == "ok"
    assert check.line == f"2 of {len(read_manifest())} fetched: breast, hgnc; in the package: mini"


def test_a_download_that_broke_off_is_named_with_the_command_that_ends_it(tmp_path):
    from peka_lite.data._fetch import PARTIAL

    (tmp_path / "cache" / "models" / "scfoundation" / PARTIAL / "commit").mkdir(parents=True)
    check = look_at("artifacts")
    assert check.status == "note"
    assert "broken off: scfoundation" in check.line
    assert "peka-lite fetch scfoundation" in check.fix


def test_a_spoiled_record_of_a_fetch_is_named(tmp_path):
    (tmp_path / "cache" / "models" / "scfoundation").mkdir(parents=True)
    (tmp_path / "cache" / "models" / "scfoundation" / "fetched.json").write_text("{")
    check = look_at("artifacts")
    assert check.status == "fail"
    assert "scfoundation/fetched.json: not valid JSON" in check.line


# --- token and gates ---------------------------------------------------------------------------------------------

GATED = {(a.repo, a.repo_type): a.gate for a in read_manifest().values() if a.gate}


def test_a_token_in_the_environment_is_found_and_not_shown(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", get_token)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert look_at("token", online=False).status == "ok"
    assert os.environ["HF_TOKEN"] == SECRET


def test_without_a_token_every_page_to_ask_on_is_named_and_nobody_is_asked():
    assert "hf auth login" in look_at("token").fix
    check = look_at("gates")
    assert check.status == "note"
    assert check.line.startswith(f"{len(GATED)} gated repositories")
    assert all(page in check.fix for page in GATED.values())
    assert f"{GATED['bioptimus/H0-mini', 'model']} (it is granted by hand, which may take days)" in check.fix
    assert f"{GATED['MahmoodLab/hest', 'dataset']} (it opens at once after asking)" in check.fix


@pytest.mark.parametrize("subject", ["token", "gates"])
def test_an_error_that_quotes_the_token_does_not_show_it(monkeypatch, subject):
    def quote():
        raise ValueError(f"Illegal header value b'Bearer {SECRET}'")

    monkeypatch.setattr("huggingface_hub.get_token", quote)
    check = look_at(subject)
    assert check.status == "fail"
    assert "ValueError" in check.line


def test_offline_no_gate_is_asked_about(monkeypatch):
    log_in(monkeypatch, answer=lambda *_, **__: pytest.fail("the hub was asked"))
    check = look_at("gates", online=False)
    assert check.status == "note"
    assert "not asked" in check.line


def test_gates_open_to_the_token_are_fine_and_each_repository_is_asked_about_once(monkeypatch):
    asked = []
    log_in(monkeypatch, answer=lambda repo, *, repo_type: asked.append((repo, repo_type)))
    check = look_at("gates")
    assert check.status == "ok"
    assert sorted(asked) == sorted(GATED)
    assert ("MahmoodLab/hest", "dataset") in asked
    assert check.line == "open: " + ", ".join(repo for repo, _ in GATED)


@pytest.mark.parametrize(
    "error",
    [hub_error(GatedRepoError, 403), hub_error(RepositoryNotFoundError, 404), hub_error(HfHubHTTPError, 403)],
    ids=["gated", "not found", "fine-grained token"],
)
def test_a_closed_gate_is_named_with_its_page_and_no_other(monkeypatch, error):
    def answer(repo, *, repo_type):
        if repo == "MahmoodLab/UNI":
            raise error

    log_in(monkeypatch, answer=answer)
    check = look_at("gates")
    assert check.status == "note"
    assert "closed: MahmoodLab/UNI" in check.line.split("; ")
    assert GATED["MahmoodLab/UNI", "model"] in check.fix
    assert GATED["MahmoodLab/hest", "dataset"] not in check.fix


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (hub_error(HfHubHTTPError, 401), "fail", "token refused: "),
        (hub_error(HfHubHTTPError, 503), "note", "could not be asked (HfHubHTTPError): "),
        (ConnectionError(SECRET), "note", "could not be asked (ConnectionError): "),
    ],
)
def test_a_refused_token_is_told_from_a_hub_out_of_reach(monkeypatch, error, status, line):
    def answer(repo, *, repo_type):
        raise error

    log_in(monkeypatch, answer=answer)
    check = look_at("gates")
    assert check.status == status
    assert check.line == line + ", ".join(repo for repo, _ in GATED)


def test_a_hub_that_hangs_holds_up_neither_the_report_nor_the_exit(monkeypatch):
    release, asked_by = threading.Event(), []

    def answer(repo, *, repo_type):
        asked_by.append(threading.current_thread())
        release.wait(60)

    log_in(monkeypatch, answer=answer)
    monkeypatch.setattr("peka_lite.cli.doctor.GATES_S", 0.05)
    try:
        check = look_at("gates")
    finally:
        release.set()
    assert check.status == "note"
    assert check.line.startswith("no answer within 0.05 s: ")
    assert all(thread.daemon for thread in asked_by)
