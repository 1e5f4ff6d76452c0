"""Reports of sweeps: averaged seeds, separate settings, paired differences and tidy files."""

import json
import os

import numpy as np
import pandas as pd
import pytest
from run_folders import GENES, draw_fold, training_summary, write_run_folder, write_sweep_file

from peka_lite.evaluation import bootstrap_difference, bootstrap_interval
from peka_lite.experiments import read_sweep_folder
from peka_lite.reports import (
    average_seeds,
    difference_table,
    effects_figure,
    effects_table,
    metrics_table,
    points_table,
    protocol_table,
    read_runs,
    row_label,
    seed_sd,
    split_by_settings,
    sweep_figure,
    write_report,
)
from peka_lite.reports._settings import TRAINED, is_untrained, run_settings
from peka_lite.reports.points import setting_columns
from peka_lite.reports.runs import require_shared


def point_name(settings):
    return ",".join(f"{k}={v}" for k, v in settings.items()) or "base"


@pytest.fixture
def write_sweep(tmp_path):
    """Return a function that writes a sweep folder of run points, without those in `unfinished`."""

    def write(points, *, name="sweep", unfinished=(), log=None, **fixed):
        for k, point in enumerate(points):
            if point_name(point) not in unfinished:
                write_run_folder(tmp_path / name / point_name(point), **({"noise": 0.5 + k / 20} | fixed | point))
        settings = {point_name(point): {k: v for k, v in point.items() if k != "noise"} for point in points}
        return write_sweep_file(tmp_path / name, settings, title="Seeds and taus", log=log)

    return write


def write_seeds(write_run, method, noise, seeds=(0, 1, 2), **settings):
    return [write_run(f"{method},seed={s}", method=method, noise=noise, seed=s, **settings) for s in seeds]


def methods_and_taus():
    return [{"method": m, "tau": t} for m in ("none", "lora", "bone") for t in (1.0, 2.0)]


def test_unfinished_points_and_logs_of_a_sweep_are_not_read(write_sweep):
    points = [{"method": m, "seed": s} for m in ("none", "bone") for s in (0, 1)]
    folder = write_sweep(points, unfinished=("method=bone,seed=1",), log={"method=bone,seed=1": {"state": "failed"}})
    write_run_folder(folder / "method=bone,seed=1.partial", method="bone", seed=1)
    write_run_folder(folder / "log" / "old", method="bone", seed=3)
    write_run_folder(folder / "method=lora", method="lora")  # not a point of this sweep
    runs = read_runs([folder])
    assert [(run.points, run.varied) for run in runs] == [((point_name(p),), p) for p in points[:3]]


def write_notebook_sweep(tmp_path):
    folder = tmp_path / "book"
    for tau in (1.0, 2.0):
        results = folder / f"tau={tau}" / "results"
        write_run_folder(results / "deep" / "frozen", noise=1.5)
        write_run_folder(results / "bone", method="bone", tau=tau, noise=tau / 3)
        (results / "trained").mkdir()  # a trained model: neither a run nor a notebook's summary
        (results / "trained" / "config.yml").write_text("{}")
        (results / "trained" / "summary.json").write_text(json.dumps(training_summary()))
        scalars = {"accuracy": tau / 10, "best": "Bone", "valid": True, "curve": [1, 2], "missing": None}
        (folder / f"tau={tau}" / "summary.json").write_text(json.dumps(scalars))
    return write_sweep_file(folder, {f"tau={t}": {"tau": t} for t in (1.0, 2.0)}, notebook="05_evaluation.ipynb")


def test_runs_of_notebook_points_are_read_at_any_depth_and_once(tmp_path):
    folder = write_notebook_sweep(tmp_path)
    runs = {
        run.name + ("" if run.config["method"] == "none" else str(run.config["tau"])): run
        for run in read_runs([folder])
    }
    assert sorted(runs) == ["bone1.0", "bone2.0", "frozen"]
    assert runs["frozen"].points == ("tau=1.0", "tau=2.0")
    assert runs["frozen"].varied == {}  # its points differ in tau
    assert runs["bone2.0"].varied == {"tau": 2.0}
    table = points_table(list(runs.values()), sweeps=[read_sweep_folder(folder)])
    assert dict(zip(table["run"], table["point"], strict=True))["frozen"] == "tau=1.0; tau=2.0"
    assert len(table) == 5
    summaries = table[table["label"].isna()].set_index("point")
    assert summaries["accuracy"].to_dict() == {"tau=1.0": 0.1, "tau=2.0": 0.2}
    assert summaries["tau"].to_dict() == {"tau=1.0": 1.0, "tau=2.0": 2.0}
    assert summaries[["best", "valid"]].to_numpy().tolist() == [["Bone", True]] * 2
    assert "curve" not in table


def test_report_of_a_sweep_without_run_folders_has_points_and_no_figure(tmp_path):
    folder = tmp_path / "book"
    for k in (1, 2):
        (folder / f"k={k}").mkdir(parents=True)
        (folder / f"k={k}" / "summary.json").write_text(json.dumps({"share": k / 4, "name": "x", "ok": k > 1}))
    log = {"k=1": {"state": "done", "seconds": 4.5}}
    write_sweep_file(folder, {f"k={k}": {"k": k} for k in (1, 2, 3)}, notebook="03.ipynb", title="Labels", log=log)
    written = {path.name for path in write_report([folder], folder / "report")}
    assert written == {"points.csv", "points.parquet", "report.md"}
    table = pd.read_parquet(folder / "report" / "points.parquet")
    assert table.pop("seconds").tolist() == pytest.approx([4.5, np.nan], nan_ok=True)
    assert table.to_dict("list") == {
        "point": ["k=1", "k=2"], "k": [1, 2], "share": [0.25, 0.5], "name": ["x", "x"], "ok": [False, True]
    }  # fmt: skip
    page = (folder / "report" / "report.md").read_text()
    assert page.startswith("# Labels\n\n2 of 3 points finished; missing: `k=3`.\n")


def test_report_of_a_sweep_without_finished_points_names_the_missing_ones(tmp_path):
    folder = write_sweep_file(tmp_path / "s", {"tau=1": {"tau": 1}})
    assert read_runs([folder]) == []
    write_report([folder], tmp_path / "out")
    assert "0 of 1 points finished; missing: `tau=1`." in (tmp_path / "out" / "report.md").read_text()


def test_error_for_an_invalid_sweep_file_or_summary_names_it(tmp_path):
    (tmp_path / "s").mkdir()
    for text in ("grid: {tau: [1]}", "- 1", "a: [", "title: t\nnotebook: null\nvaried: [a]\npoints: [1]"):
        (tmp_path / "s" / "sweep.yml").write_text(text)
        with pytest.raises(ValueError, match=r"s/sweep\.yml does not name title, notebook, varied and points"):
            read_runs([tmp_path / "s"])
    folder = write_sweep_file(tmp_path / "b", {"k=1": {"k": 1}}, notebook="03.ipynb")
    (folder / "k=1").mkdir()
    (folder / "k=1" / "summary.json").write_text("[1")
    assert read_sweep_folder(folder).missing == {
        "k=1": "failed: summary.json is truncated or not a mapping with entries"
    }
    (folder / "k=1" / "summary.json").write_text('{"a": 1}')
    (folder / "k=1" / "deep.partial").mkdir()  # as `peka-lite sweep` sees it
    assert read_sweep_folder(folder).missing == {"k=1": "failed: deep.partial is unfinished"}


def test_mean_over_seeds_equals_the_mean_of_its_seeds(write_run):
    folders = [*write_seeds(write_run, "bone", 0.5), write_run("frozen", noise=1.0)]
    runs = read_runs(folders)
    merged, single = average_seeds(runs)
    assert single is runs[3]
    assert merged.seeds == (0, 1, 2)
    assert merged.name == "bone (3 seeds)"
    for target in ("log1p-cp10k", "log1p"):
        values = [run.score(normalization=target)["pcc"] for run in runs[:3]]
        assert merged.score(normalization=target)["pcc"] == pytest.approx(np.mean(values))
        assert merged.score("slides", normalization=target)["pcc"] == pytest.approx(
            np.mean([run.score("slides", normalization=target)["pcc"] for run in runs[:3]])
        )
        assert seed_sd(merged, normalization=target) == pytest.approx(np.std(values, ddof=1))
    assert np.isnan(seed_sd(single))
    assert merged.score()["n_units"] == 3  # patients, not patients times seeds
    assert merged.summary["mean_pcc"] == merged.score()["pcc"]


def test_seeds_do_not_count_as_patients(write_run):
    """Three copies of one seed give the same interval as one."""
    one = read_runs(write_seeds(write_run, "bone", 0.5, seeds=(0,)))[0]
    copies = [one.moments.assign(fold=[f"{s}:{f}" for f in one.moments["fold"]]) for s in range(3)]
    moments = [m[m["normalization"] == "log1p"] for m in (one.moments, pd.concat(copies))]
    single, triple = (bootstrap_interval(m, n_boot=400) for m in moments)
    assert triple["ci_low"] == pytest.approx(single["ci_low"])
    merged = average_seeds(read_runs([one.folder, *write_seeds(write_run, "bone", 0.5, seeds=(1, 2))]))[0]
    assert {fold.split(":")[0] for fold in merged.moments["fold"]} == {"0", "1", "2"}
    assert merged.moments.groupby("normalization")["fold"].nunique().tolist() == [9, 9]


def test_ceilings_and_seconds_are_means_over_seeds(write_run):
    folders = [write_run(f"r{s}", method="bone", seed=s, ceiling=0.7 + s / 10) for s in (0, 1)]
    for k, folder in enumerate(folders):
        summary = json.loads((folder / "summary.json").read_text()) | {"seconds": 10.0 + 4 * k}
        (folder / "summary.json").write_text(json.dumps(summary))
    merged = average_seeds(read_runs(folders))[0]
    assert merged.summary["ceiling"]["log1p"] == {"pcc": pytest.approx(0.75), "basis": "known"}
    assert merged.summary["seconds"] == 12.0
    assert merged.name == "r0 (2 seeds)"


def test_differences_of_means_over_seeds_are_paired(write_run):
    runs = average_seeds(read_runs([*write_seeds(write_run, "none", 1.2), *write_seeds(write_run, "bone", 0.5)]))
    table = difference_table(runs)
    by_seed = [b.score()["pcc"] - f.score()["pcc"] for f, b in zip(*(run.parts for run in runs), strict=True)]
    assert table.loc["Bone", "difference"] == pytest.approx(np.mean(by_seed))
    assert table.loc["Bone", "low"] < table.loc["Bone", "difference"]
    scores = protocol_table(runs)
    assert scores.loc["Bone", ["seed 0", "seed 1", "seed 2"]].tolist() == [p.score()["pcc"] for p in runs[1].parts]
    assert "mean over 3 seeds" in scores.attrs["title"]
    assert not any(column.startswith("fold") for column in scores)


def test_runs_of_other_seeds_are_not_paired_and_noted(write_run):
    folders = [*write_seeds(write_run, "none", 1.2, seeds=(0,)), *write_seeds(write_run, "bone", 0.5)]
    runs = average_seeds(read_runs(folders))
    table = difference_table(runs)
    assert table["difference"].isna().all()
    assert "Missing for Bone: other seeds than frozen." in table.attrs["note"]
    assert "Fewer seeds: frozen." in protocol_table(runs).attrs["note"]
    folders = [*write_seeds(write_run, "lora", 1.2, seeds=(3, 4)), *(r.folder for r in runs[1].parts)]
    others = average_seeds(read_runs(folders))
    with pytest.raises(ValueError, match=r"differ in seed \(0\+1\+2 and 3\+4\)"):
        require_shared(others[::-1])


def test_training_settings_are_those_that_decide_a_student():
    assert {"r", "tau", "teacher_genes", "epochs", "micro_batch"} <= set(TRAINED)
    assert not set(TRAINED) & {
        "backbone",
        "weights",
        "seed",
        "method",
        "shuffle_teacher",
        "alpha",
        "n_splits",
        "device",
    }


def test_frozen_students_and_controls_join_every_group_and_form_none(write_run):
    folders = [write_run("f", tau=9.0, epochs=50, noise=1.5), write_run("c", features="color", noise=2.0)]
    folders += [write_run(f"{m}{t}", method=m, tau=t, noise=0.5 + t / 10) for t in (1.0, 2.0) for m in ("lora", "bone")]
    folders += [write_run("miss", method="miss", tau=2.0)]
    reference, others, reference_settings = split_by_settings(average_seeds(read_runs(folders)))
    assert [run.name for run in reference] == ["f", "c", "lora2.0", "bone2.0", "miss"]  # the larger group
    assert [run.name for run in others] == ["lora1.0", "bone1.0"]
    assert reference_settings == {"mini": {"tau": 2.0}}
    assert "tau" not in run_settings(reference[0])
    teachers = [write_run(f"t{k}", features="teacher", teacher=k) for k in ("pca", "scfoundation")]
    reference, others, _ = split_by_settings(average_seeds(read_runs(teachers)))  # a teacher run depends on its teacher
    assert ([r.name for r in reference], [r.name for r in others]) == (["tpca"], ["tscfoundation"])


def test_reference_of_equal_groups_is_the_one_with_fewest_differences(write_run):
    base = {"method": "bone", "augment": False, "tau": 2.0, "kd_space": "embedding"}
    changes = [{"augment": True}, {"kd_space": "logits"}, {}, {"tau": 4.0}]
    runs = read_runs([write_run(f"r{k}", noise=1 + k / 10, **base | change) for k, change in enumerate(changes)])
    reference, others, reference_settings = split_by_settings(average_seeds(runs))
    assert [run.name for run in reference] == ["r2"]
    assert reference_settings["mini"] == {"augment": False, "tau": 2.0, "kd_space": "embedding"}
    table = effects_table(others, reference)
    assert table.index.get_level_values("settings").tolist() == ["augment=true", "kd_space=logits", "tau=4"]


def test_methods_backbones_and_cohorts_may_differ_in_settings_within_a_group(write_run):
    """Cohorts may differ in n_splits, methods in lr, and backbones in r and weights."""
    folders = [write_run("a", method="bone", lr=1e-4), write_run("b", method="lora", lr=1e-3)]
    folders += [write_run("c", method="bone", backbone="uni", weights="hub", r=256)]
    folders += [write_run("d", method="bone", cohort="lung", n_splits=2, data="d2")]
    folders += [write_run("e", protocol="paper", method="bone")]
    reference, others, reference_settings = split_by_settings(average_seeds(read_runs(folders)))
    assert len(reference) == 5
    assert others == []
    assert reference_settings == {"mini": {}, "lung": {}}


def test_protocol_settings_split_runs_of_one_protocol_only(write_run):
    folders = [write_run(f"{m}{a}", method=m, protocol="custom", alpha=a) for m, a in (("bone", 1.0), ("lora", 7.0))]
    runs = read_runs([*folders, write_run("h", protocol="hest")])
    reference, others, reference_settings = split_by_settings(average_seeds(runs))
    assert [run.name for run in reference] == ["bone1.0", "h"]
    assert [run.name for run in others] == ["lora7.0"]
    assert reference_settings == {"mini": {"alpha": 1.0}}


def test_runs_that_differ_in_unused_settings_are_one_row(write_run, tmp_path):
    folders = [write_run(f"f{t}", tau=t, noise=1.5) for t in (1.0, 2.0)]
    folders += [write_run(f"b{t}", method="bone", tau=t, noise=t / 3) for t in (1.0, 2.0)]
    write_report(folders, tmp_path / "out")
    assert pd.read_csv(tmp_path / "out" / "protocol_mini_strict.csv")["features"].tolist() == ["frozen", "Bone"] * 2
    assert len(pd.read_csv(tmp_path / "out" / "points.csv")) == 4


def test_effects_are_paired_differences_to_the_same_reference_row(write_run):
    folders = [write_run("f", noise=1.5)]
    folders += [write_run(f"{m}{t}", method=m, tau=t, noise=t / 3) for t in (1.0, 4.0) for m in ("bone", "lora")]
    folders += [write_run("few", method="bone", tau=1.0, n_splits=2), write_run("miss", method="miss", tau=4.0)]
    runs = {run.name: run for run in read_runs(folders)}
    reference, others, reference_settings = split_by_settings(average_seeds(list(runs.values())))
    assert reference_settings["mini"] == {"tau": 4.0, "n_splits": 3}
    table = effects_table(others, reference)
    moments = [runs[k].moments.query("normalization == 'log1p-cp10k'") for k in ("bone1.0", "bone4.0")]
    expected = bootstrap_difference(*moments)
    row = table.loc[("tau=1", "Bone")]
    assert row[["difference", "difference low", "difference high"]].tolist() == [
        expected[k] for k in ("pcc", "ci_low", "ci_high")
    ]
    assert row["PCC"] == runs["bone1.0"].score()["pcc"]
    few = table.loc[("n_splits=2, tau=1", "Bone")]
    assert np.isnan(few["difference"])
    assert few["note"] == "not paired: other folds, slides, spots or genes"
    assert "sd over seeds" not in table
    only = effects_table([runs["miss"]], [runs["bone1.0"]]).iloc[0]
    assert np.isnan(only["difference"])
    assert only["note"] == "the reference settings have no such row"
    with pytest.raises(ValueError, match="runs of one protocol and cohort"):
        effects_table(others, average_seeds(read_runs([write_run("p", protocol="paper")])))


def test_effects_of_means_over_other_seeds_have_a_note(write_run):
    folders = write_seeds(write_run, "bone", 0.5, tau=1.0) + write_seeds(write_run, "lora", 0.5, tau=1.0)
    folders += [write_run(f"x{s}", method="bone", seed=s, tau=2.0, noise=0.8) for s in (0, 1)]
    table = effects_table(*split_by_settings(average_seeds(read_runs(folders)))[1::-1])
    assert table.loc[("tau=2", "Bone"), "note"] == "not paired: seeds 0, 1, the reference's 0, 1, 2"
    assert table.loc[("tau=2", "Bone"), "sd over seeds"] > 0


def test_points_table_has_varying_settings_and_scores(write_run):
    folders = [write_run("a", r=None, alpha="hest", protocol="custom"), write_run("c", protocol="hest", noise=0.4)]
    folders += [write_run("b", method="bone", r=32, lr=1e-3, noise=0.5, alpha=1.0, protocol="custom", device="cpu")]
    runs = read_runs(folders)
    table = points_table(runs)
    assert setting_columns(table) == ["split", "method", "r", "lr", "normalization", "alpha"]
    assert table["alpha"].tolist() == ["hest", "hest", "1"]
    assert table["r"].tolist() == ["null", "null", "32"]
    assert table["lr"].tolist() == [1e-4, 1e-4, 1e-3]
    assert table["run"].tolist() == ["a", "c", "b"]
    score, slides = runs[1].score(), runs[1].score("slides")
    expected = [*(s[k] for s in (score, slides) for k in ("pcc", "ci_low", "ci_high")), score["pcc"] / 0.8]
    assert table.loc[1, "mean_pcc":"share_of_ceiling"].tolist() == pytest.approx(expected)
    assert table["label"].tolist() == ["frozen", "frozen", "Bone"]


def test_metrics_table_has_every_fold_and_gene_with_settings(write_sweep, tmp_path):
    folder = write_sweep(methods_and_taus())
    runs = read_runs([folder])
    path = folder / "method=bone,tau=2.0" / "metrics.csv"
    pd.read_csv(path).head(2).assign(fold=0, pcc=[0.1, 0.2], n_train=7).to_csv(path, index=False)
    runs = read_runs([folder])
    table = metrics_table(runs, sweeps=[read_sweep_folder(folder)])
    assert list(table)[:4] == ["point", "run", "method", "tau"]
    one = table[table["point"] == "method=lora,tau=2.0"]
    assert len(one) == 3 * len(GENES)
    Y, P = draw_fold("log1p-cp10k", 1, noise=0.65)
    measured = one.set_index(["fold", "gene"]).loc[(1, "G2"), "pcc"]
    assert measured == pytest.approx(np.corrcoef(Y[:, 1], P[:, 1])[0, 1])
    two = table[table["point"] == "method=bone,tau=2.0"]
    assert two[["tau", "pcc", "n_train"]].to_numpy().tolist() == [[2.0, 0.1, 7.0], [2.0, 0.2, 7.0]]


def test_report_of_a_sweep_begins_with_the_number_of_finished_points(write_sweep):
    points = [{"method": m, "tau": t, "seed": s} for m in ("none", "bone") for t in (1.0, 2.0) for s in (0, 1)]
    unfinished = ("method=bone,tau=2.0,seed=1", "method=bone,tau=2.0,seed=0", "method=none,tau=2.0,seed=1")
    log = {unfinished[0]: {"state": "failed", "seconds": 3.0, "last_line": "ValueError: no such teacher"}}
    folder = write_sweep(points, unfinished=unfinished, log=log)
    (folder / f"{unfinished[1]}.partial").mkdir()
    written = write_report([folder], folder / "report")
    page = (folder / "report" / "report.md").read_text()
    assert page.startswith(
        "# Seeds and taus\n\n5 of 8 points finished; missing: `method=none,tau=2.0,seed=1`; unfinished: "
        "`method=bone,tau=2.0,seed=0`; failed: `method=bone,tau=2.0,seed=1` (ValueError: no such teacher).\n"
    )
    assert "mean over 2 seeds" in page
    assert {"points.csv", "points.parquet", "metrics.csv", "metrics.parquet", "points.png"} <= {p.name for p in written}
    for name in ("points", "metrics"):
        csv, parquet = (
            pd.read_csv(folder / "report" / f"{name}.csv"),
            pd.read_parquet(folder / "report" / f"{name}.parquet"),
        )
        assert list(csv) == list(parquet)
        assert len(csv) == len(parquet) > 4
    assert read_runs([folder])[0].points == ("method=none,tau=1.0,seed=0",)  # the report folder is not a point


def test_report_of_several_settings_has_tables_and_effects(write_sweep):
    folder = write_sweep([{**p, "protocol": k} for k in ("paper", "strict") for p in methods_and_taus()])
    written = {path.name for path in write_report([folder], folder / "report")}
    for protocol in ("paper", "strict"):
        assert {f"effects_mini_{protocol}.{end}" for end in ("csv", "md", "png")} <= written
        effects = pd.read_csv(folder / "report" / f"effects_mini_{protocol}.csv")
        assert effects["settings"].tolist() == ["tau=2", "tau=2"]
        assert effects["features"].tolist() == ["Bone", "LoRA"]
    page = (folder / "report" / "report.md").read_text()
    assert "Reference settings: tau=1. All tables" in page
    assert page.index("![points]") < page.index("## Effects of settings") < page.index("## Paper protocol")
    assert "leak_mini.png" in written


def test_report_of_two_sweeps_and_a_run(write_sweep, write_run, tmp_path):
    one = write_sweep([{"method": "bone"}], name="one")
    two = write_sweep([{"method": "bone"}, {"method": "none"}], name="two")  # the first run is also in `one`
    write_report([one, two, write_run("lora", method="lora")], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert page.startswith("# Report\n\nSeeds and taus: 1 of 1 points finished.\n\nSeeds and taus: 2 of 2")
    assert pd.read_csv(tmp_path / "out" / "points.csv")["run"].tolist() == ["method=bone", "method=none", "lora"]


def test_replace_requires_a_report_and_failure_leaves_the_old_one(write_run, tmp_path, monkeypatch):
    out, run = tmp_path / "out", write_run("a")
    write_report([run], out)
    with pytest.raises(FileExistsError, match="is there already"):
        write_report([run], out)
    (out / "old.csv").write_text("")
    other = write_run("b", method="bone")
    with monkeypatch.context() as patch:
        patch.setattr("peka_lite.reports.figures.figure2", lambda runs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_report([other], out, replace=True)
    assert "| a |" in (out / "report.md").read_text()
    write_report([other], out, replace=True)
    assert "| b |" in (out / "report.md").read_text()
    assert not (out / "old.csv").exists()
    (out / "notes").mkdir()
    with pytest.raises(FileExistsError, match=r"has files of no report \(notes\)"):
        write_report([run], out, replace=True)
    with pytest.raises(FileExistsError, match="is not a report"):
        write_report([run], run, replace=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "runs"]


def test_old_report_is_restored_if_the_new_one_cannot_be_moved(write_run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_report([write_run("a")], out)
    replace = os.replace

    def fail(source, target):
        if target == out and source.name != "old":
            raise OSError("no space")
        replace(source, target)

    monkeypatch.setattr("peka_lite.reports.page.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_report([write_run("b", method="bone")], out, replace=True)
    assert "| a |" in (out / "report.md").read_text()


def read_markers(ax):
    """Return the markers of a panel, (n, 2), and their intervals, (n, 2, 2)."""
    from matplotlib.collections import LineCollection, PathCollection

    spots = np.concatenate([c.get_offsets() for c in ax.collections if isinstance(c, PathCollection)])
    bars = [bar for c in ax.collections if isinstance(c, LineCollection) for bar in c.get_segments() if len(bar)]
    return spots[~np.isnan(np.ma.filled(spots, np.nan)).any(1)], np.array(bars)


def test_sweep_figure_has_a_panel_per_protocol_and_a_marker_per_run(write_sweep):
    points = [{**p, "protocol": k, "seed": s} for k in ("strict", "paper") for p in methods_and_taus() for s in (0, 1)]
    table = points_table(read_runs([write_sweep(points)]))
    figure = sweep_figure(table)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["paper protocol · mini (synthetic)", "strict protocol · mini (synthetic)"]
    strict = table[table["protocol"] == "strict"]
    assert [t.get_text() for t in figure.axes[1].get_yticklabels()] == ["tau=1", "tau=2", "frozen"]
    spots, bars = read_markers(figure.axes[1])
    assert sorted(spots[:, 0]) == pytest.approx(sorted(strict["mean_pcc"]))
    assert sorted(bars[:, 0, 0]) == pytest.approx(sorted(strict["ci_low"]))
    assert sorted(bars[:, 1, 0]) == pytest.approx(sorted(strict["ci_high"]))
    assert "95% intervals" in figure.get_suptitle()
    assert "seeds side by side" in figure.get_suptitle()
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert legend == ["frozen", "Bone", "LoRA"]


def test_numeric_setting_of_three_values_is_the_axis_and_frozen_students_are_constant(write_sweep):
    points = [{"method": "none"}, *({"method": m, "tau": t} for m in ("bone", "lora") for t in (1.0, 2.0, 4.0))]
    figure = sweep_figure(points_table(read_runs([write_sweep(points, noise=0.7)])))
    ax = figure.axes[0]
    assert ax.get_xlabel() == "tau"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "4"]
    lines = [line.get_xydata() for line in ax.lines if len(line.get_xdata())]
    assert [line[:, 0].tolist() for line in lines] == [[1, 2, 4]] * 3
    assert np.ptp(lines[0][:, 1]) == 0
    assert len(read_markers(ax)[0]) == 9


def test_sweep_figure_of_many_changes_labels_only_changes_and_grows(write_run):
    base = {"method": "bone", "tau": 2.0, "r": None, "augment": False, "kd_space": "embedding"}
    changes = [{}, {"tau": 1.0}, {"tau": 4.0}, {"r": 64}, {"augment": True}, {"kd_space": "logits"}]
    changes += [{"lr": k / 1000} for k in range(1, 35)]
    folders = [write_run(f"r{k}", noise=0.5, **({"lr": 1e-4} | base | change)) for k, change in enumerate(changes)]
    table = points_table(read_runs(folders))
    figure = sweep_figure(table)
    rows = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert rows[:6] == ["base", "tau=1", "tau=4", "r=64", "augment=true", "kd_space=logits"]
    assert len(rows) == 40
    assert figure.get_figheight() > 10
    assert "base: " in figure.axes[0].get_title()
    with pytest.raises(ValueError, match="points has no row of a run"):
        sweep_figure(table.iloc[:0])


def test_effects_figure_has_a_row_per_change_a_zero_line_and_marks_unpaired_runs(write_run):
    changes = [{"tau": 2.0}, {"tau": 4.0}, {"tau": 8.0}, {"tau": 2.0, "n_splits": 2}]
    folders = [
        write_run(f"{m}{k}", method=m, noise=1 + k / 5, **c) for k, c in enumerate(changes) for m in ("bone", "lora")
    ]
    reference, others, _ = split_by_settings(average_seeds(read_runs(folders)))
    table = effects_table(others, reference)
    figure = effects_figure(table)
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["tau=4", "tau=8", "n_splits=2"]
    spots, bars = read_markers(ax)
    drawn = table.dropna(subset="difference")
    assert sorted(spots[:, 0]) == pytest.approx(sorted(drawn["difference"]))
    assert sorted(bars[:, 0, 0]) == pytest.approx(sorted(drawn["difference low"]))
    assert [list(line.get_xdata()) for line in ax.lines if len(line.get_xdata())] == [[0, 0]]
    assert [text.get_text() for text in ax.texts] == ["not paired"] * 2
    assert "Effect of each change of settings" in figure.get_suptitle()
    assert "strict protocol" in figure.get_suptitle()
    assert "reference: tau=2" in figure.get_suptitle()
    unpaired = effects_figure(table[table["difference"].isna()])
    assert unpaired.axes[0].get_xlabel().startswith("mean PCC (no run can be paired")


def test_untrained_labels_match_row_labels(write_run):
    kinds = ["student", "color", "coordinates", "depth", "teacher"]
    runs = read_runs([write_run(kind, features=kind) for kind in kinds])
    assert all(is_untrained(row_label(run)) for run in runs)
    assert not is_untrained(row_label(read_runs([write_run("bone", method="bone")])[0]))
