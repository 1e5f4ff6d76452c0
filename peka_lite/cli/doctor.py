"""Check whether this machine can run peka_lite: one line per subject, with a fix for each problem."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from peka_lite._core.names import escape_control

TORCH, PEFT = (2, 6), (0, 18)  # oldest versions that pyproject.toml allows
PEFT_NAMES = ("AdaLoraConfig", "AdaLoraModel", "LoraConfig", "MissConfig", "inject_adapter_in_model")
GATES_S = 10  # timeout for all gated repositories together

_LOCK = "`pip install -r requirements.lock` in a checkout, or `make test`: both install compatible versions"
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True)
class Check:
    """Store the result for one subject, in one line; `fix` is None if and only if the status is ``"ok"``.

    Status ``"note"`` is for what the embedded cohort does not need, ``"fail"`` for what must be fixed first.
    """

    name: str
    status: Literal["ok", "note", "fail"]
    line: str
    fix: str | None = None


def doctor(*, online: bool = True) -> list[Check]:
    """Check this machine for what peka_lite needs, one `Check` per subject, in a fixed order.

    Nothing is raised: a subject that cannot be checked is a ``"fail"`` with the reason. A token is never shown.

    Parameters
    ----------
    online
        Check on the Hugging Face hub which gated repositories the token can read, for at most `GATES_S` seconds.
    """
    subjects = {
        "python": _python, "torch": _torch, "gpu": _gpu, "precision": _precision, "peft": _peft, "disk": _disk,
        "token": _token, "gates": lambda: _gates(online=online), "artifacts": _artifacts,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report is shorter
        return [_run_check(name, look) for name, look in subjects.items()]


def report(checks: Iterable[Check]) -> str:
    """Return checks as `peka-lite doctor` prints them: one line each, its fix indented below."""
    return "\n".join(
        f"{check.status:<6}{check.name:<12}{escape_control(check.line)}"
        + (f"\n      fix: {escape_control(check.fix)}" if check.fix else "")
        for check in checks
    )


def _run_check(name: str, look: Callable[[], tuple]) -> Check:
    try:
        return Check(name, *look())
    except Exception as error:
        # The error of an invalid header quotes the token.
        why = type(error).__name__ if name in ("token", "gates") else _describe(error)
        return Check(name, "fail", f"could not be checked ({why})", "fix this error, then run the command again")


def _describe(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _python():
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return "ok", version
    fix = "install one of them, then `make test PYTHON=python3.12`"
    return "fail", f"{version}; peka_lite needs 3.11, 3.12 or 3.13", fix


def _torch():
    try:
        import torch
        import torchvision
    except Exception as error:  # a torchvision of another torch raises RuntimeError
        return "fail", f"torch and torchvision do not import together ({_describe(error)})", _LOCK
    pair = f"{torch.__version__}, torchvision {torchvision.__version__}"
    if _release(torch.__version__) < TORCH:
        return "fail", f"{pair}; peka_lite needs torch {'.'.join(map(str, TORCH))} or newer", _LOCK
    return "ok", pair


def _gpu():
    import torch

    if not torch.cuda.is_available():
        return _no_gpu(torch)
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    counted = Counter(f"{c.name} (sm_{c.major}{c.minor}, {c.total_memory / 2**30:.0f} GiB)" for c in cards)
    names = ", ".join(f"{n} x {card}" if n > 1 else card for card, n in counted.items())
    built = torch.cuda.get_arch_list()
    lacking = sorted({(c.major, c.minor) for c in cards if not _runs_on((c.major, c.minor), built)})
    if not lacking:
        return "ok", f"{names}; torch has its kernels"
    without = ", ".join(f"sm_{major}{minor}" for major, minor in lacking)
    fix = f"install a torch built for {without}: https://pytorch.org/get-started/locally"
    if lacking == [(7, 0)]:
        fix = "`pip install -r requirements.lock`: its torch 2.10.0 is the last default build with V100 (sm_70) kernels"
    return "fail", f"{names}; torch has no kernels for {without}, only for {' '.join(built)}", fix


def _no_gpu(torch):
    if not (listed := _count_driver_gpus()):
        why = "no GPU: training runs on the CPU; fine for the mini cohort"
        return "note", why, "for other cohorts use a machine with an NVIDIA GPU and its driver"
    driver = f"the driver lists {listed} NVIDIA GPU{'s' if listed > 1 else ''}"
    if torch.version.cuda is None:
        return "fail", f"{driver}, but torch {torch.__version__} is built without CUDA", _LOCK
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        why = f"{driver}, but torch finds none under CUDA_VISIBLE_DEVICES={visible!r}: training runs on the CPU"
        return "note", why, "unset CUDA_VISIBLE_DEVICES"
    fix = f"update the driver to one for CUDA {torch.version.cuda}, or install a torch built for an older CUDA"
    return "fail", f"{driver}, but torch, built for CUDA {torch.version.cuda}, can use none", fix


def _count_driver_gpus() -> int:
    # Login nodes have nvidia-smi but no GPU, so that it must be run.
    if (program := shutil.which("nvidia-smi")) is None:
        return 0
    listing = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=10).stdout
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def _runs_on(capability: tuple[int, int], built: Iterable[str]) -> bool:
    # CUDA's rule: a binary runs on its major architecture from its minor version on, PTX on any newer architecture;
    # with an "a" (sm_90a) both run on that one only.
    for kind, major, minor, only in re.findall(r"\b(sm|compute)_(\d+)(\d)(a?)\b", " ".join(built)):
        target = (int(major), int(minor))
        older = target < capability and (kind == "compute" or target[0] == capability[0])
        if target == capability or (older and not only):
            return True
    return False


def _precision():
    from peka_lite._core.device import compute_dtype, default_device

    device = default_device()
    name = str(compute_dtype(device)).removeprefix("torch.")
    if device == "cpu":
        return "ok", f"{name} on the CPU; bfloat16 is used on GPUs only"
    return "ok", f"{name} on the GPU" + ("; bfloat16 starts at compute capability 8.0" if name == "float16" else "")


def _peft():
    try:
        import peft
    except Exception as error:  # a build for another torch or transformers can raise any error
        return "fail", f"does not import ({_describe(error)})", _LOCK
    if _release(peft.__version__) < PEFT:
        return "fail", f"{peft.__version__}; peka_lite needs {'.'.join(map(str, PEFT))} or newer", _LOCK
    if missing := [name for name in PEFT_NAMES if not hasattr(peft, name)]:
        return "fail", f"{peft.__version__} lacks {', '.join(missing)}", _LOCK
    return "ok", f"{peft.__version__}, with LoRA, AdaLoRA and MiSS"


def _disk():
    from peka_lite._core.cache import cache_dir

    cache = cache_dir().absolute()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e9
    line = f"{free:.1f} GB free in {there}, for cohorts, weights and a teacher's embeddings"
    if free >= 20:
        return "ok", line
    fix = "free some space, or set PEKA_LITE_CACHE to a folder on a larger disk; 20 GB are comfortable"
    return "note" if free >= 5 else "fail", line, fix


def _token():
    from huggingface_hub import get_token

    if get_token():
        return "ok", "a Hugging Face token is set (not shown)"
    return "note", "no Hugging Face token: nothing gated can be fetched", _LOG_IN


def _gates(*, online: bool):
    from huggingface_hub import get_token

    from peka_lite.data._choices import ACCESS
    from peka_lite.data.download import read_manifest

    artifacts = [artifact for artifact in read_manifest().values() if artifact.repo and artifact.gate]
    gated = {
        (a.repo, a.repo_type): f"{a.gate} ({ACCESS.get(a.access, 'how long that takes is unknown')})" for a in artifacts
    }
    if not get_token():
        pages = ", ".join(gated.values())
        return "note", f"{len(gated)} gated repositories, none open without token", f"apply on {pages}; then {_LOG_IN}"
    if not online:
        return "note", f"{len(gated)} gated repositories, not checked", "run `peka-lite doctor` without --offline"
    answers: dict[str, list] = {}
    for repository, answer in _check_gates(gated).items():
        answers.setdefault(answer, []).append(repository)
    line = "; ".join(f"{answer}: {', '.join(repo for repo, _ in these)}" for answer, these in answers.items())
    if "token refused" in answers:
        return "fail", line, f"this token is not valid: {_LOG_IN}"
    if "closed" in answers:
        pages = ", ".join(gated[repository] for repository in answers["closed"])
        return "note", line, f"apply on {pages}; a fine-grained token must also be allowed to read gated repositories"
    return ("note", line, "go online, then run this again") if answers.keys() - {"open"} else ("ok", line)


def _check_gates(repositories: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    from huggingface_hub import auth_check
    from huggingface_hub.errors import GatedRepoError

    answers = {}

    def check(repo: str, kind: str) -> None:
        try:
            auth_check(repo, repo_type=kind)
            answers[repo, kind] = "open"
        except GatedRepoError:
            answers[repo, kind] = "closed"
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            answer = {401: "token refused", 403: "closed", 404: "closed"}.get(status)
            answers[repo, kind] = answer or f"could not be checked ({type(error).__name__})"

    # Daemon threads: auth_check has no timeout, and a request that hangs must not delay the exit.
    threads = [threading.Thread(target=check, args=repository, daemon=True) for repository in repositories]
    for thread in threads:
        thread.start()
    until = time.monotonic() + GATES_S
    for thread in threads:
        thread.join(max(0, until - time.monotonic()))
    return {repository: answers.get(repository, f"no answer within {GATES_S} s") for repository in repositories}


def _artifacts():
    from peka_lite._core.cache import cache_dir
    from peka_lite.backbones._packaged import find_packaged
    from peka_lite.backbones.registry import BACKBONES
    from peka_lite.data._fetch import PARTIAL
    from peka_lite.data.download import find_fetched, read_manifest

    names = list(read_manifest())
    fetched = [name for name in names if find_fetched(name) is not None]
    line = f"{len(fetched)} of {len(names)} fetched: {', '.join(fetched) or 'the default pages need none'}"
    line += f"; in the package: {', '.join(row.name for row in BACKBONES.values() if find_packaged(row))}"
    if begun := sorted(folder.parent.name for folder in cache_dir().glob(f"*/*/{PARTIAL}")):
        return "note", f"{line}; incomplete: {', '.join(begun)}", f"`peka-lite fetch {begun[0]}` resumes it"
    if not fetched:
        return "note", line, "`peka-lite fetch NAME`; without a name it lists all"
    return "ok", line


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
