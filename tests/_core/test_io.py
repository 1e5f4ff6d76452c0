"""Report a full disk by one message and status 2, without crashes, tracebacks or partial files."""

import errno
import os
import subprocess
import sys
import textwrap

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from peka_lite._core.io import (
    DiskFull,
    as_full_disk,
    open_new_file,
    report_full_disk,
    require_space,
    save_array,
    write_file_atomically,
    write_h5ad,
)
from peka_lite.cli.main import main
from peka_lite.data.tiles import TileStore


def child(tmp_path, code, limit, *, before=""):
    """Run code in a process with files of at most `limit` bytes; return (status, stdout, stderr).

    The process writes no bytecode (`-B`): Python 3.11 would cut the `.pyc` of whatever it imports first at the limit.
    """
    limited = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    # The folder for temporary files is found by a write, so it is asked for before the limit.
    first = "import resource, sys, tempfile\nfrom pathlib import Path\ntempfile.gettempdir()\n"
    code = first + textwrap.dedent(before) + limited + textwrap.dedent(code)
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def spots(n=60, genes=50):
    obs = pd.DataFrame({"slide": ["a", "b"] * (n // 2)}, index=[f"s{i}" for i in range(n)])
    X = np.random.default_rng(0).random((n, genes), dtype=np.float32)
    return ad.AnnData(X, obs=obs, uns={"of": {"run": "x"}}, obsm={"spatial": np.zeros((n, 2))})


# HDF5 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_hdf5_survives_a_full_disk_at_any_position(tmp_path, compression):
    code = f"""
    import contextlib, os
    from test_io import spots
    from peka_lite._core.io import DiskFull, write_h5ad
    adata, path = spots(), Path("a.h5ad")
    write_h5ad(adata, path, compression={compression!r})
    size, seen = path.stat().st_size, []
    for limit in range(0, size + 3000, 2500):
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                write_h5ad(adata, path, compression={compression!r})
            except DiskFull as error:
                assert "a.h5ad: files may not grow that large" in str(error), error
                assert not path.exists()
                sys.exit(2)
            sys.exit(0)
        seen.append((limit, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    assert [status for _, status in seen] == [2 if limit < size else 0 for limit, _ in seen], (size, seen)
    print("tried", len(seen))
    """
    tests = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-B", "-c", "import resource, sys\nfrom pathlib import Path\n" + textwrap.dedent(code)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path_with(tests)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert int(done.stdout.split()[1]) > 10


def path_with(folder):
    return os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])


def test_patches_file_on_a_full_disk_stops_early(tmp_path):
    code = """
    import numpy as np
    from peka_lite._core.io import DiskFull
    from peka_lite.data._format import write_tiles
    rng, cut = np.random.default_rng(0), []
    def tiles():
        for i in range(200):  # HDF5 buffers 8 MB before it writes
            cut.append(i)
            yield rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
    try:
        write_tiles(Path("t.h5"), tiles(), [f"b{i}" for i in range(200)], np.zeros((200, 2)), attributes={}, of="S1.h5")
    except DiskFull as error:
        print(error)
    assert not Path("t.h5").exists()
    assert len(cut) < 100, cut
    """
    status, out, err = child(tmp_path, code, 800_000)
    assert (status, err) == (0, "")
    assert out.startswith("S1.h5: files may not grow that large here, at least ")


def test_h5ad_equals_that_of_anndata(tmp_path):
    adata = spots()
    adata.X = sparse.csr_matrix(np.rint(adata.X))
    adata.copy().write_h5ad(tmp_path / "anndata.h5ad", compression="gzip")
    write_h5ad(adata, tmp_path / "ours.h5ad", compression="gzip")
    seen = []
    for name in ("anndata", "ours"):
        with h5py.File(tmp_path / f"{name}.h5ad") as file:
            parts = [("/", sorted(file.attrs.items()))]
            file.visititems(
                lambda key, part, parts=parts: parts.append(
                    (key, sorted(map(str, part.attrs.items())), getattr(part, "dtype", None), str(part))
                )
            )
            seen.append([(key, str(attrs), *rest) for key, attrs, *rest in parts])
    assert seen[0] == seen[1]
    assert (ad.read_h5ad(tmp_path / "ours.h5ad").X != adata.X).nnz == 0


# memory maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_memory_map_without_blocks_is_refused_before_writing(tmp_path, monkeypatch, code):
    from peka_lite._core._stream import open_partial

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(DiskFull, match=r"rows\.npy: .* at least 200\.1 kB needed, .* free; ") as caught:
        open_partial(tmp_path / "work", shape=(1000, 50), key="k")
    assert caught.value.errno == code
    assert not (tmp_path / "work").exists()


def test_memory_map_has_allocated_blocks(tmp_path):
    from peka_lite._core._stream import open_partial

    rows, done = open_partial(tmp_path / "work", shape=(1000, 500), key="k")
    assert (tmp_path / "work" / "rows.npy").stat().st_blocks * 512 >= rows.nbytes
    assert not done.any()
    rows[3], done[3] = 1, True
    rows.flush()
    again, done = open_partial(tmp_path / "work", shape=(1000, 500), key="k")
    assert np.flatnonzero(done).tolist() == [3]
    assert (again[3] == 1).all()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, None])
def test_free_space_is_checked_if_blocks_cannot_be_allocated(tmp_path, monkeypatch, code):
    from types import SimpleNamespace

    from peka_lite._core.io import new_array

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    new_array(tmp_path / "a.npy", (10, 10), np.float32)
    assert np.load(tmp_path / "a.npy").shape == (10, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000, total=10**9))
    with pytest.raises(DiskFull, match=r"b\.npy: no space left on its disk, at least 4\.0 kB needed, 1\.0 kB free"):
        new_array(tmp_path / "b.npy", (1000,), np.float32)
    assert not (tmp_path / "b.npy").exists()


def test_tiles_on_a_full_disk_leave_no_file(mini_cohort, tmp_path):
    code = f"""
    from peka_lite._core.io import DiskFull
    from peka_lite.data.hest import read_cohort
    try:
        read_cohort({str(mini_cohort.slides[0].tiles.paths[0].parents[1])!r}).tiles.to_memmap("tiles.npy")
    except DiskFull as error:
        print(error)
    assert not list(Path().iterdir())
    """
    folder = tmp_path / "empty"
    folder.mkdir()
    status, out, err = child(folder, code, 500_000)
    assert (status, err) == (0, "")
    assert out.startswith("tiles.npy: files may not grow that large here, at least ")
    stored = mini_cohort.tiles.to_memmap(tmp_path / "tiles.npy")
    assert isinstance(stored, TileStore)
    assert (np.load(tmp_path / "tiles.npy", mmap_mode="r")[-1] == mini_cohort.tiles[-1]).all()


# other writers ----------------------------------------------------------------------------------------------------

OTHERS = {
    "npy": "save_array(path, np.random.rand(100_000))",
    "bytes": "write_file_atomically(path, bytes(800_000))",
    "checkpoint": "layer = torch.nn.Linear(400, 500)\n"
    "    layer.backbone = SimpleNamespace(adapter=SimpleNamespace(tuner=None))\n"
    "    adam, scaler = torch.optim.AdamW(layer.parameters()), torch.amp.GradScaler(enabled=False)\n"
    "    save_checkpoint(path, layer, adam, scaler, {}, [])",
    "npz": "with open_new_file(path) as file: np.savez(file, a=np.random.rand(100_000))",
    "safetensors": "write_tensors(path, {'all.a': torch.rand(200_000)}, {}, kind='k')",
    "figure": "figure = plt.figure(); figure.figimage(np.random.rand(600, 600))\n"
    "    write_file_atomically(path, figure_bytes(figure, dpi=200))",
}


@pytest.mark.parametrize("limit", [0, 1000, 50_000])
def test_no_writer_leaves_a_partial_file(tmp_path, limit):
    cases = "".join(f"\ndef of_{name}(path):\n    {code}\ncases.append(of_{name})\n" for name, code in OTHERS.items())
    before = "import matplotlib; matplotlib.use('agg'); import matplotlib.pyplot as plt\nimport numpy as np, torch\n"
    before += "from types import SimpleNamespace\nfrom peka_lite.transfer._checkpoint import save_checkpoint\n"
    before += "from peka_lite._core.io import *\nfrom peka_lite._core.io import DiskFull, figure_bytes\n"
    before += f"from peka_lite._core._tensor_files import write_tensors\ncases = []\n{cases}\n"
    code = """
    for case in cases:
        try:
            case(Path("out"))
        except DiskFull as error:
            print(case.__name__, error)
        assert not list(Path().iterdir()), case
    """
    status, out, err = child(tmp_path, code, limit, before=before)
    assert (status, err) == (0, "")
    assert [line.split(": files may not grow that large here, ")[0] for line in out.splitlines()] == [
        f"of_{name} out" for name in OTHERS
    ]


def test_existing_file_is_unchanged_on_a_full_disk(tmp_path, monkeypatch):
    write_file_atomically(tmp_path / "a", b"old")

    def fail(path, content):
        with open(path, "wb") as file:
            file.write(content[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", fail)
    with pytest.raises(
        DiskFull, match=rf"{tmp_path}/a: no space left on its disk, at least 3 B needed, .* free; free some"
    ):
        write_file_atomically(tmp_path / "a", b"new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("Can't decrement id ref count (file write failed: errno = 122, error message = 'Disk quota')"),
    ],
)
def test_full_disk_errors_of_libraries_are_recognized(tmp_path, error):
    with (
        pytest.raises(DiskFull, match=r"x: no space left .*; free some space there") as caught,
        report_full_disk(tmp_path / "x"),
    ):
        raise error
    assert caught.value.__cause__ is error


def test_other_errors_are_unchanged(tmp_path):
    with pytest.raises(PermissionError, match="no"), report_full_disk(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "no")
    assert as_full_disk(ValueError("28 genes")) is None


def test_free_space_of_a_missing_path_is_that_of_its_folder(tmp_path):
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(DiskFull, match=r"not/yet: no space left on its disk, at least 10000000000.0 GB needed, "):
        require_space(tmp_path / "not" / "yet", 10**19)


def test_disk_with_unknown_free_space_is_tried(tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0, total=0))
    save_array(tmp_path / "a.npy", np.ones(5))
    assert np.load(tmp_path / "a.npy").sum() == 5


def test_other_error_in_a_new_file_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), open_new_file(tmp_path / "a") as file:
        file.write(b"half" * (1 // 0))
    assert list(tmp_path.iterdir()) == []


# the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a disk of some kB, to test without `ulimit -f` and monkeypatches."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kb):
        command = ["mount", "-t", "tmpfs", "-o", f"size={kb}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"no disk can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.parametrize("kb", [40, 1500, 2600])
def test_add_on_a_full_disk_is_reported_and_leaves_nothing(tmp_path, small_disk, kb):
    from PIL import Image

    rng = np.random.default_rng(0)
    pixels = rng.integers(120, 220, (1500, 1500, 3), dtype=np.uint8)
    pixels[..., 1] //= 2
    Image.fromarray(pixels).save(tmp_path / "scan.png")
    x, y = np.meshgrid(np.arange(5) * 200 + 300, np.arange(5) * 200 + 300)
    counts = ad.AnnData(rng.poisson(2, (25, 30)).astype(np.float32))
    counts.obs_names, counts.var_names = [f"b{i}" for i in range(25)], [f"G{i}" for i in range(30)]
    counts.obsm["spatial"] = np.column_stack([x.ravel(), y.ravel()])
    counts.write_h5ad(tmp_path / "counts.h5ad")
    disk = small_disk(kb)
    command = ["add", tmp_path / "counts.h5ad", "--image", tmp_path / "scan.png", "--mpp", "0.5"]
    command += ["--cohort", disk / "cohort", "--id", "S1"]
    done = subprocess.run(
        [sys.executable, "-m", "peka_lite", *map(str, command)], capture_output=True, text=True, timeout=120
    )
    messages = [line for line in done.stderr.splitlines() if line.startswith("peka-lite: ")]
    assert done.returncode == 2, done.stderr
    assert messages == [done.stderr.splitlines()[-1]]
    assert messages[0].startswith(f"peka-lite: {disk}/cohort/patches/S1.h5: no space left on its disk, at least ")
    assert list(disk.iterdir()) == []


def test_train_with_a_full_cache_disk_is_reported(tmp_path, small_disk, mini_root):
    disk = small_disk(80)  # the features of three slides take about 110 kB
    command = ["train", "--cohort", mini_root, "--method", "none", "--device", "cpu", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "peka_lite", *map(str, command)], capture_output=True, text=True, timeout=240,
        env=os.environ | {"PEKA_LITE_CACHE": str(disk / "cache")},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "features.npy: no space left on its disk, at least" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("out*"))
    assert not list(disk.rglob("features.npy"))


def test_full_disk_in_any_command_is_status_2(capsys, monkeypatch):
    import peka_lite.cli.main as cli

    def fail(**_):
        raise RuntimeError("PytorchStreamWriter failed") from OSError(errno.ENOSPC, "No space left", "w.pt")

    monkeypatch.setattr(cli, "_report", fail)
    assert main(["report", "x", "--out", "y"]) == 2
    assert capsys.readouterr().err.startswith("peka-lite: w.pt: no space left on its disk, ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_of_stdout_is_reported():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "peka_lite", "fetch"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert "no space left on its disk" in done.stderr
    assert done.returncode != 0
