"""Reports: a column has values of one protocol, and published values are separate from ours."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from run_folders import draw_fold

from peka_lite.cli.main import main
from peka_lite.probe import r2, rmse
from peka_lite.reports import (
    describe_comparability,
    difference_table,
    figure2,
    leak_figure,
    leak_table,
    protocol_table,
    read_published,
    read_runs,
    row_label,
    score_table,
    table1,
    table2,
    write_report,
)
from peka_lite.reports.page import format_markdown


def split_cells(markdown):
    """Split a Markdown table into lines of cells."""
    return [[c.strip() for c in line.strip("|").split(" | ")] for line in markdown.strip().splitlines()]


def test_published_values_match_the_paper():
    table = read_published().set_index(["table", "cohort", "backbone", "method"])["pcc"]
    assert table.groupby("table").size().to_dict() == {1: 20, 2: 32}
    assert table.index.is_unique
    assert table[1, "lung", "resnet50", "none"] == 0.696
    assert table[1, "kidney", "ctranspath", "none"] == 0.410
    assert table[1, "breast", "", "PEKA (best)"] == 0.698
    assert table[2, "liver", "uni", "adalora"] == 0.608
    assert table[2, "lung", "h-optimus-0", "lora"] == 0.738
    frozen = table.xs("none", level="method").drop(["resnet50", "ctranspath"], level="backbone")
    assert frozen[1].to_dict() == frozen[2].to_dict()  # both tables show these values


def test_both_liver_values_of_peka_are_shown_and_explained(write_run):
    runs = read_runs([write_run("a")])
    one, two = table1(runs), table2(runs)
    assert one.loc["PEKA (best)", "liver, published"] == 0.654
    assert two.loc[("H-optimus-0", "Bone (PEKA)"), "liver, published"] == 0.640
    for table in (one, two):
        assert "0.654" in table.attrs["note"]
        assert "0.640" in table.attrs["note"]


def test_runs_are_read_from_their_folders_or_the_parent_folder(write_run):
    first, second = write_run("a"), write_run("b", method="bone")
    (first.parent / "notes").mkdir()
    by_name = read_runs([first, second])
    from_parent = read_runs([first.parent])
    assert [r.name for r in by_name] == [r.name for r in from_parent] == ["a", "b"]
    assert by_name[1].config["method"] == "bone"
    assert len(by_name[0].moments) == 2 * 3 * 3


@pytest.mark.parametrize("missing", ["config.yml", "summary.json", "slides.parquet"])
def test_error_for_an_unfinished_run_names_the_missing_file(write_run, missing):
    write_run("a", method="bone")
    folder = write_run("b")
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"b: no finished run here \({missing} missing\)"):
        read_runs([folder])
    for given in ([folder.parent], [folder.parent / "a", folder]):
        with pytest.warns(UserWarning, match=rf"skipped: \S+b: no finished run here \({missing} missing\)"):
            assert [run.name for run in read_runs(given)] == ["a"]


def damage(folder, how):
    """Change a finished run into what a killed process, a full disk or another tool leaves."""
    if how in ("partial", "hidden"):
        return folder.rename(folder.with_name({"partial": "b.partial", "hidden": ".b.77.partial"}[how]))
    for name in {"empty": ("config.yml", "summary.json", "slides.parquet"), "stats": ("summary.json",)}.get(how, ()):
        (folder / name).unlink()
    if how == "link":
        return folder.rename(folder.parent.parent / "c.partial").symlink_to(folder) or folder
    if how in ("summary.json", "slides.parquet", "config.yml"):
        (folder / how).write_bytes((folder / how).read_bytes()[: 30 if how != "config.yml" else 9] + b"\xff")
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("partial", r"b\.partial: no finished run here, it was stopped .*finish it with `peka-lite run .*--out \S+/b`"),
        ("hidden", r"\.b\.77\.partial: no finished run here, it was stopped"),
        ("stats", r"b: no finished run here \(summary\.json missing\): remove the folder and give `peka-lite run"),
        ("summary.json", r"b/summary.json is truncated or damaged .* run `peka-lite run"),
        ("slides.parquet", r"b/slides\.parquet: .*; repeat the run"),
        ("config.yml", r"b/config\.yml is truncated or damaged .* run `peka-lite run"),
        ("empty", None),
    ],
)
def test_report_skips_unfinished_runs_with_a_warning(write_run, tmp_path, capsys, how, message):
    runs = write_run("a").parent
    damage(write_run("b", method="bone"), how)
    (runs / ".DS_Store").write_text("")
    (runs / "dead").symlink_to(tmp_path / "gone")
    assert main(["report", str(runs), "--out", str(tmp_path / "out")]) == 0
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("plan: ")]
    assert len(err) == (message is not None)
    if message:
        assert re.search(rf"^peka-lite: skipped: \S*{message}", err[0])
    assert pd.read_csv(tmp_path / "out" / "points.csv")["run"].tolist() == ["a"]


def test_report_of_unfinished_runs_only_fails_with_the_command_to_finish_them(write_run, tmp_path, capsys):
    runs = damage(write_run("b", method="bone"), "partial").parent
    for given in ([runs], [runs / "b.partial"], [runs / "b"], [runs, runs.parent / "runs" / "b.partial"]):
        assert main(["report", *map(str, given), "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "stopped before its end" in line
        assert "--method bone" not in line  # the default
        assert f"--out {runs / 'b'}`" in line
    assert not (tmp_path / "out").exists()


def test_files_matched_by_a_shell_pattern_are_skipped(write_run, tmp_path):
    runs = write_run("a").parent
    (runs / "notes.txt").write_text("")
    with pytest.warns(UserWarning, match=r"notes\.txt: no finished run here, it is a file"):
        assert len(read_runs(sorted(runs.iterdir()))) == 1


def test_warning_for_a_training_without_scores(write_run):
    write_run("a")
    folder = write_run("b", method="lora")
    (folder / "slides.parquet").unlink()
    (folder / "metrics.csv").unlink()
    (folder / "probe.safetensors").write_text("")
    with pytest.warns(
        UserWarning, match=r"a training is not scored: score its settings with `peka-lite run .*--method lora"
    ):
        assert len(read_runs([folder.parent])) == 1


def test_folder_without_runs_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.yml, summary\.json, slides\.parquet missing"):
        read_runs([tmp_path])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_runs([tmp_path / "absent"])
    with pytest.raises(ValueError, match="at least one run"):
        read_runs([])


def test_summary_that_is_truncated_or_of_an_older_version_raises(write_run):
    folder = write_run("a")
    summary = json.loads((folder / "summary.json").read_text())
    del summary["ceiling"]
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"a/summary\.json: ceiling is missing"):
        read_runs([folder])
    (folder / "summary.json").write_text('{"protocol": ')
    with pytest.raises(ValueError, match=r"a/summary\.json is truncated or damaged"):
        read_runs([folder])


def test_same_run_twice_raises_even_on_another_device(write_run):
    first, second = write_run("a"), write_run("b", device="cpu")
    with pytest.raises(ValueError, match="are the same run"):
        read_runs([first, second])
    with pytest.raises(ValueError, match="are the same run"):
        read_runs([first, first.parent / "a"])


def test_rows_are_labeled_and_sorted_from_controls_to_the_teacher(write_run):
    kinds = [
        ("teacher", "none", False, "teacher (upper line)"),
        ("projector", "bone", False, "Bone, projector"),
        ("frozen+student", "bone", False, "[frozen, Bone]"),
        ("student", "miss", False, "MiSS"),
        ("student", "adalora", False, "AdaLoRA"),
        ("student", "lora", False, "LoRA"),
        ("student", "bone", False, "Bone"),
        ("student", "none", False, "frozen"),
        ("frozen+student", "bone", True, "[frozen, Bone], shuffled teacher"),
        ("student", "bone", True, "Bone, shuffled teacher"),
        ("depth", "none", False, "total count"),
        ("coordinates", "none", False, "coordinates"),
        ("color", "none", False, "color and texture"),
    ]
    runs = read_runs(
        [
            write_run(f"r{i}", features=f, method=m, shuffle_teacher=s, noise=1 + i / 10)
            for i, (f, m, s, _) in enumerate(kinds)
        ]
    )
    assert [row_label(run) for run in runs] == [kind[-1] for kind in kinds]
    assert protocol_table(runs).index.tolist() == [kind[-1] for kind in kinds][::-1]


def test_fold_values_and_shares_of_the_ceiling_match_numpy(write_run):
    runs = read_runs([write_run("a", noise=0.7, ceiling=0.9), write_run("b", method="bone", noise=0.4, ceiling=0.9)])
    for target in ("log1p-cp10k", "log1p"):
        table = protocol_table(runs, normalization=target)
        for row, noise in (("frozen", 0.7), ("Bone", 0.4)):
            by_fold = []
            for fold in range(3):
                Y, P = draw_fold(target, fold, noise=noise)
                by_fold.append(np.mean([np.corrcoef(Y[:, g], P[:, g])[0, 1] for g in range(3)]))
            assert table.loc[row, ["fold 0", "fold 1", "fold 2"]].tolist() == pytest.approx(by_fold)
            assert table.loc[row, "PCC"] == pytest.approx(np.mean(by_fold))
            assert table.loc[row, "PCC, by slides"] == pytest.approx(np.mean(by_fold))  # each fold is one slide
            assert table.loc[row, "share of ceiling"] == pytest.approx(np.mean(by_fold) / 0.9)
            assert table.loc[row, "low"] < table.loc[row, "PCC"] < table.loc[row, "high"]


def test_protocol_table_title_names_split_and_units_of_intervals(write_run):
    table = protocol_table(read_runs([write_run("a", split="slide", one_patient=True)]))
    assert table.attrs["title"] == (
        "strict protocol · mini (synthetic) · mini with random weights · one patient, sections held out · "
        "log1p-cp10k targets · intervals over 3 slides and 3 genes"
    )
    other = protocol_table(read_runs([write_run("b", protocol="hest")]), normalization="log1p-cp10k")
    assert "patients held out · log1p-cp10k targets · intervals over 3 patients" in other.attrs["title"]
    assert "The protocol's targets are log1p" in other.attrs["note"]
    assert "random spots held out" in protocol_table(read_runs([write_run("c", protocol="paper")])).attrs["title"]


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"protocol": "hest"}, "protocol"),
        ({"protocol": "paper"}, "protocol"),
        ({"data": "d1"}, "data_fingerprint"),
        ({"split": "slide"}, "split"),
        ({"backbone": "uni"}, "backbone"),
        ({"weights": "hub"}, "weights"),
        ({"seed": 1}, "seed"),
        ({"train_share": 0.5}, "train_share"),
    ],
)
def test_error_for_runs_that_cannot_share_a_column_names_the_field(write_run, other, field):
    runs = read_runs([write_run("a"), write_run("b", method="bone", **other)])
    for table in (protocol_table, difference_table):
        with pytest.raises(ValueError, match=f"a and b differ in {field} "):
            table(runs)


def test_weights_with_equal_names_and_different_content_raise(write_run):
    folders = [write_run("a", weights="hub"), write_run("b", weights="hub", method="bone")]
    for folder, fingerprint in zip(folders, ("f0", "f1"), strict=True):
        summary = json.loads((folder / "summary.json").read_text()) | {"backbone_fingerprint": fingerprint}
        (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"a and b differ in backbone_fingerprint \(f0 and f1\)"):
        protocol_table(read_runs(folders))


def test_epochs_and_teacher_must_match_for_trained_students_but_not_for_frozen(write_run):
    frozen = write_run("a", epochs=50, teacher="scfoundation")
    bone = write_run("b", method="bone")
    assert len(protocol_table(read_runs([frozen, bone]))) == 2
    for k, other in enumerate(({"epochs": 6}, {"teacher": "scfoundation"})):
        runs = read_runs([frozen, bone, write_run(f"c{k}", method="lora", **other)])
        with pytest.raises(ValueError, match=f"differ in {next(iter(other))}"):
            protocol_table(runs)


def test_error_for_two_runs_of_one_row_names_the_setting(write_run):
    runs = read_runs([write_run("a", method="bone"), write_run("b", method="bone", lr=1e-3)])
    with pytest.raises(ValueError, match="both be the row 'Bone'; they differ in lr:"):
        protocol_table(runs)


def test_controls_share_a_table_with_any_backbone(write_run):
    runs = read_runs([write_run("a", backbone="uni", weights="hub"), write_run("b", features="color", noise=2.0)])
    table = protocol_table(runs)
    assert table.index.tolist() == ["color and texture", "frozen"]
    assert "· UNI ·" in table.attrs["title"]


def add_other_scores(folder, **values):
    """Add the scores beyond PCC to a run folder, as `run` writes them."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    summary["other_scores"] = {m: {"r2": 0.1, "rmse": 0.2, "spearman": 0.3} | values for m in summary["scores"]}
    path.write_text(json.dumps(summary))


def test_other_scores_stand_beside_pcc_and_old_runs_have_a_dash_for_ranks(write_run, tmp_path):
    old, new = write_run("old"), write_run("new", method="bone", noise=0.7)
    add_other_scores(new)
    summary = json.loads((old / "summary.json").read_text())
    del summary["other_scores"]  # as in version 0.1
    (old / "summary.json").write_text(json.dumps(summary))
    runs = read_runs([old, new])
    table = score_table(runs)
    assert table["PCC"].equals(protocol_table(runs)["PCC"])
    for label, noise in (("frozen", 1.0), ("Bone", 0.7)):
        pairs = [draw_fold("log1p-cp10k", fold, noise=noise) for fold in range(3)]
        assert table.loc[label, "R2"] == pytest.approx(np.mean([r2(Y, P) for Y, P in pairs]))
        assert table.loc[label, "RMSE"] == pytest.approx(np.mean([rmse(Y, P) for Y, P in pairs]))
    assert table["Spearman"].tolist() == [pytest.approx(np.nan, nan_ok=True), 0.3]
    assert "no intercept" not in table.attrs["note"]
    assert "no intercept" in score_table(read_runs([write_run("h", protocol="hest")])).attrs["note"]
    write_report([old, new], tmp_path / "out")
    frozen, bone = split_cells((tmp_path / "out" / "scores_mini_strict.md").read_text().split("\n\n")[1])[2:]
    assert (frozen[0], frozen[-1]) == ("frozen", "–")
    assert (bone[0], bone[-1]) == ("Bone", "0.300")
    stored = pd.read_csv(tmp_path / "out" / "scores_mini_strict.csv").set_index(["targets", "features"])
    assert stored.loc["log1p-cp10k", "R2"].to_numpy() == pytest.approx(table["R2"].to_numpy())
    assert stored["Spearman"].isna().tolist() == [True, False] * 2


@pytest.mark.parametrize("values", [{"spearman": None}, {"r2": "0.1"}, {"rmse": [1]}])
def test_invalid_other_scores_are_named(write_run, values):
    folder = write_run("a")
    add_other_scores(folder, **values)
    with pytest.raises(ValueError, match=r"summary\.json: other_scores"):
        read_runs([folder])


def test_differences_are_paired_to_the_reference(write_run):
    runs = read_runs(
        [write_run("a", noise=2.0), write_run("b", method="bone", noise=0.5), write_run("c", features="depth")]
    )
    scores, table = protocol_table(runs)["PCC"], difference_table(runs)
    assert table.index.tolist() == ["total count", "Bone"]
    assert table.loc["Bone", "difference"] == pytest.approx(scores["Bone"] - scores["frozen"])
    assert table.loc["Bone", "low"] < table.loc["Bone", "difference"] < table.loc["Bone", "high"]
    assert table.attrs["title"].startswith("minus frozen · strict protocol")
    reverse = difference_table(runs, reference="Bone")
    assert reverse.loc["frozen", "difference, by slides"] == pytest.approx(-table.loc["Bone", "difference, by slides"])
    with pytest.raises(ValueError, match="differences to 'LoRA' need that run"):
        difference_table(runs, reference="LoRA")


def write_three_protocols(write_run, **settings):
    noise = {"paper": 0.3, "hest": 0.8, "strict": 1.0}
    for p in noise:
        write_run(f"f-{p}", protocol=p, noise=noise[p] + 0.2, **settings)
        folder = write_run(f"b-{p}", protocol=p, method="bone", noise=noise[p], **settings)
    return folder.parent


def test_costs_are_differences_of_neighboring_protocols(write_run):
    runs = read_runs([write_three_protocols(write_run)])
    table = leak_table(runs)
    assert table.columns[:5].tolist() == [
        "paper", "hest", "strict", "cost of holding patients out", "cost of the rest",
    ]  # fmt: skip
    score = {(r.summary["protocol"], row_label(r)): r.score(normalization="log1p")["pcc"] for r in runs}
    row = table.loc[("log1p", "Bone")]
    assert row["paper"] == score["paper", "Bone"]
    assert row["cost of holding patients out"] == pytest.approx(score["paper", "Bone"] - score["hest", "Bone"])
    assert row["cost of the rest"] == pytest.approx(score["hest", "Bone"] - score["strict", "Bone"])
    assert row["hest low"] < row["hest"] < row["hest high"]
    assert table.loc["log1p"].index.tolist() == table.loc["log1p-cp10k"].index.tolist() == ["frozen", "Bone"]


def test_leak_table_needs_two_protocols_of_the_same_data_and_epochs(write_run):
    strict = write_run("a", method="bone")
    with pytest.raises(ValueError, match="at least two of paper, hest and strict, not strict"):
        leak_table(read_runs([strict]))
    for k, other in enumerate(({"data": "d1"}, {"epochs": 6}, {"backbone": "uni"})):
        runs = read_runs([strict, write_run(f"b{k}", protocol="hest", method="bone", **other)])
        with pytest.raises(ValueError, match="cannot share a column"):
            leak_table(runs)
    with pytest.raises(ValueError, match="not strict, custom"):
        leak_table(read_runs([strict, write_run("c", protocol="custom", method="bone")]))


def test_missing_protocol_has_an_empty_column_and_one_patient_is_split_by_section(write_run):
    runs = [write_run(p, protocol=p, one_patient=True, **({} if p == "paper" else {"split": "slide"}))
            for p in ("paper", "strict")]  # fmt: skip
    table = leak_table(read_runs(runs))
    assert table["hest"].isna().all()
    assert table["cost of holding sections out"].isna().all()


def test_tables_with_published_values_take_one_protocol_and_name_it(write_run):
    runs = read_runs([write_three_protocols(write_run)])
    for function in (table1, table2, figure2):
        with pytest.raises(ValueError, match="runs of one protocol, not of"):
            function(runs)
    strict = [run for run in runs if run.summary["protocol"] == "strict"]
    table = table1(strict)
    assert "strict protocol" in table.attrs["title"]
    assert [c for c in table if "ours" in c] == ["mini, ours (strict)"]
    assert [c for c in table if "published" in c] == [f"{c}, published" for c in ("breast", "kidney", "liver", "lung")]


def test_published_values_and_ours_have_separate_columns(write_run):
    uni = {"cohort": "breast", "backbone": "uni", "weights": "hub"}
    folders = [write_run("a", noise=1.5, **uni), write_run("b", method="bone", noise=0.9, **uni)]
    folders += [write_run("c", method="bone", noise=0.4, cohort="breast"), write_run("d", method="lora", **uni)]
    folders += [write_run("e", method="bone", features="frozen+student", noise=0.1, **uni)]
    folders += [write_run("f", method="bone", shuffle_teacher=True, noise=0.2, **uni)]
    runs = {run.name: run for run in read_runs(folders)}
    one, two = table1(list(runs.values())), table2(list(runs.values()))
    ours = one["breast, ours (strict)"].dropna().to_dict()
    assert ours == {"UNI": runs["a"].score()["pcc"], "PEKA (best)": runs["c"].score()["pcc"]}
    assert "breast: mini, the best of 2" in one.attrs["note"]
    assert one.loc["UNI", "breast, published"] == 0.617
    assert two.loc[("UNI", "LoRA")].tolist()[:2] == [0.668, runs["d"].score()["pcc"]]
    assert two.loc[("UNI", "Bone (PEKA)"), "breast, ours (strict)"] == runs["b"].score()["pcc"]
    assert np.isnan(two.loc[("mini", "Bone (PEKA)"), "breast, published"])


def test_part_or_copy_of_a_paper_cohort_has_another_name(write_run, tmp_path):
    part = write_run("a", cohort="breast", slides=["S1", "S2"], data="d1")
    folder = write_run("b", cohort=str(tmp_path / "breast"), data="d2")
    whole = write_run("c", cohort="breast")
    names = [run.cohort for run in read_runs([part, folder, whole])]
    assert names == ["breast S1, S2", "breast (folder)", "breast"]


def test_comparability_names_exactly_the_differences(write_run):
    text = describe_comparability(read_runs([write_run("a"), write_run("b", method="bone")]))
    assert text == (
        "Our values are not comparable with the published ones: the protocol is strict and not paper; cohort mini "
        "(synthetic) is not in the paper; backbone mini is not in the paper; weights are random (mini); the teacher "
        "is pca and not scFoundation."
    )
    paper = {"protocol": "paper", "cohort": "breast", "backbone": "uni", "weights": "hub", "teacher": "scfoundation"}
    assert "caution" in describe_comparability(read_runs([write_run("c", method="bone", **paper)]))
    other_teacher = {**paper, "teacher": "pca"}
    text = describe_comparability(read_runs([write_run("d", method="bone", **other_teacher)]))
    assert text == "Our values are not comparable with the published ones: the teacher is pca and not scFoundation."
    assert "teacher" not in describe_comparability(read_runs([write_run("e", **other_teacher, train_share=0.5)]))
    assert "share" in describe_comparability(read_runs([write_run("f", **other_teacher, train_share=0.5, seed=1)]))


def test_markdown_is_well_formed():
    table = pd.DataFrame({"PCC": [0.12345, np.nan], "a|b": ["x", "y|z"]}, index=pd.Index(["one", "two"], name="row"))
    assert format_markdown(table) == (
        "| row | PCC | a\\|b |\n| --- | --- | --- |\n| one | 0.123 | x |\n| two |  | y\\|z |\n"
    )


def test_report_writes_all_tables_and_figures_and_shows_them_in_report_md(write_run, tmp_path):
    runs, out = write_three_protocols(write_run), tmp_path / "deep" / "report"
    written = write_report([runs], out)
    assert sorted(out.iterdir()) == written
    names = {path.name for path in written}
    for protocol in ("paper", "hest", "strict"):
        for stem in ("table1", "table2", "protocol_mini", "scores_mini", "differences_mini"):
            assert {f"{stem}_{protocol}.csv", f"{stem}_{protocol}.md"} <= names
        assert f"figure2_{protocol}.png" in names
    assert {"leak_mini.csv", "leak_mini.md", "leak_mini.png", "report.md"} <= names
    page = (out / "report.md").read_text()
    for path in written:
        if path.suffix == ".png":
            assert path.stat().st_size > 5000
            assert f"({path.name})" in page
        if path.suffix == ".md" and path.name != "report.md":
            assert path.read_text().strip() in page
            for block in path.read_text().split("\n\n"):
                if block.startswith("|"):
                    assert len({len(line) for line in split_cells(block)}) == 1
    stacked = pd.read_csv(out / "protocol_mini_strict.csv").set_index(["targets", "features"])
    assert stacked.index.tolist() == [(t, r) for t in ("log1p-cp10k", "log1p") for r in ("frozen", "Bone")]
    strict = [run for run in read_runs([runs]) if run.summary["protocol"] == "strict"]
    assert stacked.loc[("log1p", "Bone"), "PCC"] == pytest.approx(
        protocol_table(strict, normalization="log1p").loc["Bone", "PCC"]
    )


def test_report_of_one_protocol_omits_it_in_file_names_and_names_missing_parts(write_run, tmp_path):
    names = {path.name for path in write_report([write_run("a")], tmp_path / "out")}
    assert {"table1.csv", "table1.md", "table2.csv", "table2.md", "figure2.png"} <= names
    assert not any(name.startswith(("leak", "differences")) for name in names)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "No differences for mini" in page
    assert "one protocol only" in page


def test_each_backbone_of_a_cohort_has_a_table_with_the_controls(write_run, tmp_path):
    folders = [write_run("a"), write_run("b", backbone="uni", weights="hub"), write_run("c", features="color")]
    names = {path.name for path in write_report(folders, tmp_path / "out")}
    assert {"protocol_mini-UNI_strict.csv", "protocol_mini-mini_strict.csv"} <= names
    rows = pd.read_csv(tmp_path / "out" / "protocol_mini-UNI_strict.csv")["features"]
    assert rows.tolist() == ["color and texture", "frozen"] * 2


def test_failed_report_leaves_no_files_and_existing_folder_is_unchanged(write_run, tmp_path, monkeypatch):
    run, out = write_run("a"), tmp_path / "out"
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("peka_lite.reports.figures.figure2", lambda runs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report([run], out)
    assert sorted(tmp_path.iterdir()) == before
    out.mkdir()
    with pytest.raises(FileExistsError, match="out is there already"):
        write_report([run], out)
    assert list(out.iterdir()) == []


def test_figures_show_every_row_and_protocol(write_run):
    runs = read_runs([write_three_protocols(write_run)])
    figure = leak_figure(runs)
    assert [ax.get_title() for ax in figure.axes[:2]] == ["log1p-cp10k targets", "log1p targets"]
    shown = leak_table(runs).loc[("log1p", "Bone")]
    legend = [text.get_text() for text in figure.axes[3].get_legend().get_texts()]
    assert [text.split()[0] for text in legend] == ["PCC", "frozen", "Bone"]
    assert legend[2].split()[1:] == [f"{shown[c]:+.3f}" for c in ("cost of holding patients out", "cost of the rest")]
    line = figure.axes[1].containers[1].lines[0]
    assert line.get_ydata().tolist() == pytest.approx(shown[["paper", "hest", "strict"]].tolist())
    strict = figure2([run for run in runs if run.summary["protocol"] == "strict"])
    assert [t.get_text() for t in strict.axes[0].get_yticklabels()] == ["frozen", "Bone"]
    assert "strict protocol" in strict.get_suptitle()
