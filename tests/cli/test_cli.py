"""Run the command line, and report invalid input by one line."""

import subprocess
import sys

import pytest

from peka_lite.cli.main import main
from peka_lite.experiments import RunConfig


def test_run_prints_one_line_and_creates_the_folder(mini_root, tmp_path, capsys):
    out = tmp_path / "out"
    status = main(
        ["run", "--cohort", str(mini_root), "--method", "none", "--slides", "MINI1,MINI2",
         "--n-splits", "3", "--n-genes", "10", "--out", str(out)]
    )  # fmt: skip
    assert status == 0
    printed = capsys.readouterr()
    assert "mean PCC" in printed.out
    assert (
        "peka-lite: 2 patients for 3 folds: each patient is one fold" in printed.err.splitlines()
    )  # without a source location
    assert (out / "summary.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cohort", "nowhere"], "no such cohort folder"),
        (["--weights", "nowhere.bin"], "no such weights file"),
        (["--r", "7"], "must divide"),
        (["--method", "dora"], "unknown method"),
        (["--slides", "MISSING"], "no slide MISSING"),
    ],
)
def test_bad_input_is_one_line_and_status_2(mini_root, tmp_path, capsys, options, message):
    assert main(["run", "--cohort", str(mini_root), *options, "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err.strip()
    assert message in shown
    assert "\n" not in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv", [["run", "--methd", "bone", "--out", "x"], ["run"], ["sweeep"], ["run", "--epochs", "many"]]
)
def test_unknown_options_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "--taw", "3", "--out", "x"], "unrecognized arguments: --taw; did you mean '--tau'?"),
        (["run", "--ouy", "x"], "unrecognized arguments: --ouy; did you mean '--out'?"),
        (["embed", "--cohrt=mini"], "unrecognized arguments: --cohrt; did you mean '--cohort'?"),
        (["fetch", "breast", "kidney"], "unrecognized arguments: kidney"),
    ],
)
def test_misspelt_option_gets_the_nearest_named(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_groups_settings_with_a_sentence_and_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = capsys.readouterr().out
    assert "VALUE" not in shown
    assert "example: peka-lite run --cohort" in shown
    assert [shown.index(f"\n{kind} (") for kind in ("data", "student", "probe", "memory")] == sorted(
        shown.index(f"\n{kind} (") for kind in ("data", "student", "probe", "memory")
    )


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in RunConfig.model_fields)


def test_fetch_lists_all_artifacts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path))
    assert main(["fetch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["breast", "kidney", "liver", "lung", "scfoundation"]


def test_fetch_prints_the_path(tmp_path, monkeypatch, capsys):
    from peka_lite.data import download

    monkeypatch.setattr(download, "fetch", lambda name, *, root: tmp_path / name)
    assert main(["fetch", "breast"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "breast")


def test_unknown_artifact_is_one_line_and_status_2(capsys):
    assert main(["fetch", "unknown"]) == 2
    assert "nothing called 'unknown'" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("note", 0), ("fail", 1)])
def test_doctor_status_is_that_of_the_worst_check(monkeypatch, capsys, status, code):
    from peka_lite.cli import doctor

    monkeypatch.setattr(doctor, "doctor", lambda *, online: [doctor.Check("python", status, f"online {online}", None)])
    assert main(["doctor", "--offline"]) == code
    assert "online False" in capsys.readouterr().out


def test_doctor_runs_with_a_broken_torchvision(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from peka_lite.cli.main import main; "
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main(['doctor', '--offline']))"], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "fail  torch" in done.stdout


def test_import_stays_light():
    code = "import sys, peka_lite; print([m for m in ('torch', 'scanpy', 'squidpy', 'timm') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_every_public_name_exists():
    import peka_lite

    assert all(getattr(peka_lite, name) is not None for name in peka_lite.__all__)
    with pytest.raises(AttributeError, match="attribute nothing"):
        _ = peka_lite.nothing


def test_sweep_lists_ready_sweeps_and_bad_input_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "ablations", "quick", "table1", "table2",
    ]  # fmt: skip
    for options, words in (
        (["qiuck"], "qiuck: no such sweep"),
        (["quick", "-p", "ephocs", "3"], "given: unknown setting 'ephocs'; did you mean 'epochs'?"),
        (["quick", "--workers", "0"], "workers must be at least 1, not 0"),
        (["quick", "--retry", "-1"], "retry must be at least 0, not -1"),
        (["quick", "--workers", "2", "--scheduler", "tcp://127.0.0.1:9"], "give one of the two"),
    ):
        assert main(["sweep", *options]) == 2
        printed = capsys.readouterr().err
        assert words in printed
        assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert main(["sweep", "quick", "--dry-run", "-p", "epochs", "1"]) == 0
    assert "6 points in sweeps/quick: 0 done, 6 to run" in capsys.readouterr().out


def test_commands_from_training_to_a_map_of_an_added_slide(mini_cohort, mini_root, isolated_cache, tmp_path, capsys):
    import anndata as ad
    import numpy as np
    import tifffile

    source = mini_cohort.slides[3]
    centers = np.asarray(source.adata.obsm["spatial"], dtype=int)
    image = np.full((*(centers.max(0) + 224)[::-1], 3), 245, dtype=np.uint8)
    for (x, y), tile in zip(centers, source.tiles, strict=True):
        image[y - 112 : y + 112, x - 112 : x + 112] = tile
    tifffile.imwrite(tmp_path / "scan.tif", image, photometric="rgb", tile=(256, 256))
    counts = ad.AnnData(source.adata.X, obs=source.adata.obs, var=source.adata.var)
    counts.obsm["spatial"] = centers.astype(float)
    half = source.n_spots // 2
    counts[:half].write_h5ad(tmp_path / "A.h5ad")
    counts[half:].write_h5ad(tmp_path / "B.h5ad")

    def call(text):
        status = main([part.replace("@", f"{tmp_path}/") for part in text.split()])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return printed.out

    call(f"train --cohort {mini_root} --slides MINI2,MINI3 --method none --n-genes 10 --out @first")
    call("predict @scan.tif --model @first --mpp 0.5 --out @genes.h5ad")
    assert call("map @genes.h5ad --out @map.png").startswith(f"{tmp_path / 'map.png'}: ")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    add = f"--image {tmp_path}/scan.tif --cohort {tmp_path}/own --mpp visium"
    printed = call(f"add @A.h5ad --id A --patient P {add}")
    assert f"Slide A: {half} spots" in printed
    assert f"next: add a slide of another patient, then `peka-lite run --cohort {tmp_path}/own" in printed
    # One patient: only sections or spots can be held out; the message names the split.
    run = f"run --cohort {tmp_path}/own --method none --n-splits 2 --n-genes 5 --no-maps --out {tmp_path}/run"
    for ids, other in ((("A",), "spot"), (("A", "B"), "slide")):
        if "B" in ids:
            call(f"add @B.h5ad --id B --patient P {add}")
        assert main(run.split()) == 2
        assert f"--split {other}" in capsys.readouterr().err
    assert "mean PCC" in call(f"{run} --split slide")
    for bad, words in (
        ("map @genes.h5ad --gene NOPE --out @m.png", "gene 'NOPE' is not predicted; there are"),
        ("map @genes.h5ad --out @m.doc", "give a name that ends in .png, .svg or .pdf"),
        ("map @scan.tif --out @m.png", "not a predictions file"),
        ("add @nowhere --image @scan.tif --cohort @own --id C", "no such file or folder; give an .h5ad file"),
        ("add @A.h5ad --image @scan.tif --cohort @own --id A", "A.h5 is there already"),
    ):
        assert main([part.replace("@", f"{tmp_path}/") for part in bad.split()]) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("m.*"))
