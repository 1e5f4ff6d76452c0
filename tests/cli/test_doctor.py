"""Check a machine with one line per subject, a fix for each problem, and never an exception or a token."""

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
    """Simulate a machine with a free disk, but without GPU, driver, token, fetched artifacts or network."""
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDA_VISIBLE_DEVICES", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.auth_check", lambda *_, **__: pytest.fail("the hub was called"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100e9))
    install_gpus(monkeypatch)


def install_gpus(monkeypatch, *cards, built=DEFAULT_BUILD):
    """Simulate GPUs, each (name, capability), and the architectures of torch's build."""
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


def run_check(subject, *, online=True):
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


def test_report_has_a_line_per_check_with_its_fix_below():
    checks = [Check("python", "ok", "3.11.9"), Check("gpu", "note", "no GPU", "find one")]
    assert report(checks) == "ok    python      3.11.9\nnote  gpu         no GPU\n      fix: find one"


def test_machine_without_gpu_token_or_network_has_no_failures():
    assert run_check("python").status == "ok"
    assert {c.name: c.status for c in doctor() if c.status != "ok"} == dict.fromkeys(
        ("gpu", "token", "gates", "artifacts"), "note"
    )


@pytest.mark.parametrize("subject", SUBJECTS)
def test_error_in_a_check_is_reported(monkeypatch, subject):
    def broken(**_):
        raise RuntimeError("the device fell off\nits bus")

    monkeypatch.setattr(f"peka_lite.cli.doctor._{subject}", broken)
    check = run_check(subject)
    assert check.status == "fail"
    assert "RuntimeError" in check.line


# --- versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 9), "ok"), ((3, 14, 0), "fail")]
)
def test_python_is_3_11_to_3_13(monkeypatch, version, status):
    monkeypatch.setattr("peka_lite.cli.doctor.sys", SimpleNamespace(version_info=version))
    check = run_check("python")
    assert check.status == status
    assert check.line.startswith(".".join(map(str, version)))


def test_oldest_versions_are_those_of_pyproject():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {f"torch>={TORCH[0]}.{TORCH[1]}", f"peft>={PEFT[0]}.{PEFT[1]}"} <= set(project["dependencies"])
    assert project["requires-python"] == ">=3.11,<3.14"


def test_peft_names_are_those_the_adapters_import():
    nodes = ast.walk(ast.parse(inspect.getsource(adapters)))
    used = [alias.name for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "peft"
            for alias in node.names]  # fmt: skip
    assert sorted(used) == sorted(PEFT_NAMES)


@pytest.mark.parametrize(("version", "status"), [("2.5.1", "fail"), ("2.6.0+cpu", "ok"), ("2.10.0+cu128", "ok")])
def test_torch_is_2_6_or_newer(monkeypatch, version, status):
    monkeypatch.setattr(torch, "__version__", version)
    check = run_check("torch")
    assert check.status == status
    assert version in check.line


def test_torchvision_of_another_torch_is_reported_with_the_lock_file(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    check = run_check("torch")
    assert check.status == "fail"
    assert "torchvision::nms does not exist" in check.line
    assert "requirements.lock" in check.fix


@pytest.mark.parametrize(("version", "status"), [("0.17.1", "fail"), ("0.18.0", "ok"), ("1.0", "ok")])
def test_peft_is_0_18_or_newer(monkeypatch, version, status):
    monkeypatch.setattr(peft, "__version__", version)
    assert run_check("peft").status == status


def test_peft_without_miss_fails(monkeypatch):
    monkeypatch.delattr(peft, "MissConfig")
    check = run_check("peft")
    assert check.status == "fail"
    assert "lacks MissConfig" in check.line


@pytest.mark.parametrize("package", ["peft", "torchvision"])
def test_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    check = run_check("torch" if package == "torchvision" else package)
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
def test_gpu_needs_a_binary_of_its_major_architecture_or_older_ptx(monkeypatch, capability, built, runs):
    install_gpus(monkeypatch, ("Card", capability), built=built)
    check = run_check("gpu")
    assert check.status == ("ok" if runs else "fail")
    assert f"Card (sm_{capability[0]}{capability[1]}, 16 GiB)" in check.line
    assert runs or f"sm_{capability[0]}{capability[1]}" in check.fix


def test_v100_without_kernels_gets_the_torch_of_the_lock_file(monkeypatch):
    install_gpus(monkeypatch, ("Tesla V100", (7, 0)), built=("sm_75", "sm_80"))
    fix = run_check("gpu").fix
    assert "torch 2.10.0" in fix
    lock = (Path(__file__).parents[2] / "requirements.lock").read_text()
    assert "\ntorch==2.10.0 " in lock


def test_one_gpu_without_kernels_fails_and_all_are_named(monkeypatch):
    install_gpus(monkeypatch, ("A100", (8, 0)), ("A100", (8, 0)), ("GTX 1080", (6, 1)))
    check = run_check("gpu")
    assert check.status == "fail"
    assert "2 x A100 (sm_80, 16 GiB), GTX 1080 (sm_61, 16 GiB); torch has no kernels for sm_61, only" in check.line


def test_driver_that_lists_no_card_is_no_gpu(tmp_path):
    install_driver(tmp_path, "No devices found.")
    check = run_check("gpu")
    assert (check.status, "no GPU" in check.line) == ("note", True)


@pytest.mark.parametrize(
    ("cuda", "visible", "status", "line", "fix"),
    [
        (None, None, "fail", "built without CUDA", "requirements.lock"),
        ("12.8", None, "fail", "CUDA 12.8, can use none", "driver to one for CUDA 12.8"),
        ("12.8", "", "note", "CUDA_VISIBLE_DEVICES=''", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpu_missed_by_torch_differs_from_no_gpu(monkeypatch, tmp_path, cuda, visible, status, line, fix):
    install_driver(tmp_path, "GPU 0: Tesla T4 (UUID: GPU-0)")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check = run_check("gpu")
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
def test_precision_is_that_of_runs(monkeypatch, cards, dtype):
    install_gpus(monkeypatch, *cards)
    assert run_check("precision").line.startswith(f"{dtype} on the {'GPU' if cards else 'CPU'}")


# --- disk and artifacts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "status"), [(4.9, "fail"), (5, "note"), (19.9, "note"), (20, "ok")])
def test_free_space_is_that_of_the_nearest_existing_folder(monkeypatch, tmp_path, free, status):
    paths = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: paths.append(path) or SimpleNamespace(free=free * 1e9))
    check = run_check("disk")
    assert paths == [tmp_path]
    assert check.status == status
    assert check.line.startswith(f"{free:.1f} GB free in {tmp_path}")


def test_fetched_artifacts_are_listed(monkeypatch):
    monkeypatch.setattr(
        "peka_lite.data.download.find_fetched", lambda name: Path("/x") if name in ("breast", "hgnc") else None
    )
    check = run_check("artifacts")
    assert check.status == "ok"
    assert check.line == f"2 of {len(read_manifest())} fetched: breast, hgnc; in the package: mini"


def test_incomplete_download_is_named_with_the_command_to_resume(tmp_path):
    from peka_lite.data._fetch import PARTIAL

    (tmp_path / "cache" / "models" / "scfoundation" / PARTIAL / "commit").mkdir(parents=True)
    check = run_check("artifacts")
    assert check.status == "note"
    assert "incomplete: scfoundation" in check.line
    assert "peka-lite fetch scfoundation" in check.fix


def test_malformed_record_of_a_fetch_is_named(tmp_path):
    (tmp_path / "cache" / "models" / "scfoundation").mkdir(parents=True)
    (tmp_path / "cache" / "models" / "scfoundation" / "fetched.json").write_text("{")
    check = run_check("artifacts")
    assert check.status == "fail"
    assert "scfoundation/fetched.json: not valid JSON" in check.line


# --- token and gates ---------------------------------------------------------------------------------------------

GATED = {(a.repo, a.repo_type): a.gate for a in read_manifest().values() if a.gate}


def test_token_in_the_environment_is_not_shown(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", get_token)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert run_check("token", online=False).status == "ok"
    assert os.environ["HF_TOKEN"] == SECRET


def test_without_a_token_every_access_page_is_named():
    assert "hf auth login" in run_check("token").fix
    check = run_check("gates")
    assert check.status == "note"
    assert check.line.startswith(f"{len(GATED)} gated repositories")
    assert all(page in check.fix for page in GATED.values())
    assert f"{GATED['bioptimus/H0-mini', 'model']} (access is granted by hand, which may take days)" in check.fix
    assert f"{GATED['MahmoodLab/hest', 'dataset']} (access is granted at once)" in check.fix


@pytest.mark.parametrize("subject", ["token", "gates"])
def test_token_in_an_error_is_not_shown(monkeypatch, subject):
    def quote():
        raise ValueError(f"Illegal header value b'Bearer {SECRET}'")

    monkeypatch.setattr("huggingface_hub.get_token", quote)
    check = run_check(subject)
    assert check.status == "fail"
    assert "ValueError" in check.line


def test_no_gate_is_checked_offline(monkeypatch):
    log_in(monkeypatch, answer=lambda *_, **__: pytest.fail("the hub was called"))
    check = run_check("gates", online=False)
    assert check.status == "note"
    assert "not checked" in check.line


def test_open_gates_are_ok_and_each_repository_is_checked_once(monkeypatch):
    checked = []
    log_in(monkeypatch, answer=lambda repo, *, repo_type: checked.append((repo, repo_type)))
    check = run_check("gates")
    assert check.status == "ok"
    assert sorted(checked) == sorted(GATED)
    assert ("MahmoodLab/hest", "dataset") in checked
    assert check.line == "open: " + ", ".join(repo for repo, _ in GATED)


@pytest.mark.parametrize(
    "error",
    [hub_error(GatedRepoError, 403), hub_error(RepositoryNotFoundError, 404), hub_error(HfHubHTTPError, 403)],
    ids=["gated", "not found", "fine-grained token"],
)
def test_closed_gate_is_named_with_its_page(monkeypatch, error):
    def answer(repo, *, repo_type):
        if repo == "MahmoodLab/UNI":
            raise error

    log_in(monkeypatch, answer=answer)
    check = run_check("gates")
    assert check.status == "note"
    assert "closed: MahmoodLab/UNI" in check.line.split("; ")
    assert GATED["MahmoodLab/UNI", "model"] in check.fix
    assert GATED["MahmoodLab/hest", "dataset"] not in check.fix


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (hub_error(HfHubHTTPError, 401), "fail", "token refused: "),
        (hub_error(HfHubHTTPError, 503), "note", "could not be checked (HfHubHTTPError): "),
        (ConnectionError(SECRET), "note", "could not be checked (ConnectionError): "),
    ],
)
def test_refused_token_differs_from_an_unreachable_hub(monkeypatch, error, status, line):
    def answer(repo, *, repo_type):
        raise error

    log_in(monkeypatch, answer=answer)
    check = run_check("gates")
    assert check.status == status
    assert check.line == line + ", ".join(repo for repo, _ in GATED)


def test_hanging_hub_delays_neither_the_report_nor_the_exit(monkeypatch):
    release, threads = threading.Event(), []

    def answer(repo, *, repo_type):
        threads.append(threading.current_thread())
        release.wait(60)

    log_in(monkeypatch, answer=answer)
    monkeypatch.setattr("peka_lite.cli.doctor.GATES_S", 0.05)
    try:
        check = run_check("gates")
    finally:
        release.set()
    assert check.status == "note"
    assert check.line.startswith("no answer within 0.05 s: ")
    assert all(thread.daemon for thread in threads)
