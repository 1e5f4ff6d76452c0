"""Write any name of a gene, slide or patient unchanged to files, figures, pages and tables."""

import shutil

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from run_folders import write_run_folder

import peka_lite as pk
from peka_lite._core.names import escape_markdown, unique_file_name
from peka_lite.experiments import RunFolder
from peka_lite.experiments.folder import write_metrics
from peka_lite.maps.draw import draw_maps
from peka_lite.maps.tissue import save_predicted_map

ODD = (
    "NA", "nan", "None", "null", "", "inf", "1e5", "007", "TRUE", "-x", "..", "../x", "a/b", "a\\b", "C:\\x", "a:b?*",
    r"$\frac{$", "$", "_x_", "{0}", "%s", "<b>", "</script>", "|", "`*`", "a, b", '"', "pcc", "PCC", "fold", 
    "__proto__",
    "x" * 300, "\N{DNA DOUBLE HELIX}", "a\rb", "a\nb", "actb", "ACTB", "{{data}}", " ",
)  # fmt: skip
FATAL = ("a/b", "../x", r"$\frac{$", "x" * 300, "pcc", "NA", "")  # for names of files, and for titles


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def odd_cohort(mini_root, tmp_path_factory):
    """Write the small synthetic cohort with odd names of its most variable genes, slides and patients."""
    root = tmp_path_factory.mktemp("odd")
    slides = {"MINI1": "NA", "MINI2": "007", "MINI3": "$^$ <b>"}
    genes = pk.data.top_hvg(pk.read_cohort(mini_root, list(slides)).adata, n=len(ODD))
    for old, new in slides.items():
        for kind, end in (("st", ".h5ad"), ("patches", ".h5"), ("metadata", ".json")):
            (root / kind).mkdir(exist_ok=True)
            shutil.copy(mini_root / kind / f"{old}{end}", root / kind / f"{new}{end}")
        adata = ad.read_h5ad(root / "st" / f"{new}.h5ad")
        adata.var_names = adata.var_names.to_series().replace(dict(zip(genes, ODD, strict=True))).tolist()
        adata.write_h5ad(root / "st" / f"{new}.h5ad")
    (root / "patients.csv").write_text("id,patient\nNA,NA\n007,007\n$^$ <b>,null\n")
    return root


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_unchanged_in_runs_reports_and_predictions(odd_cohort, tiny_backbone, isolated_cache, tmp_path):
    config = pk.RunConfig(
        cohort=str(odd_cohort), patients=str(odd_cohort / "patients.csv"), backbone="tiny", weights="random",
        method="none", n_splits=3, n_genes=len(ODD), min_genes=1, device="cpu",
    )  # fmt: skip
    pk.run(config, tmp_path / "odd")
    _, table, summary, predictions = pk.load_run(tmp_path / "odd")
    assert len(set(table["gene"]) & set(ODD)) > 30
    assert set(table["gene"]) == set(predictions.var_names)
    assert set(predictions.obs["slide"]) == set(summary["slides"]) == {"NA", "007", "$^$ <b>"}
    assert set(predictions.obs["patient"]) == {"NA", "007", "null"}
    for row in table.itertuples():
        predicted = predictions[(predictions.obs["fold"] == row.fold).to_numpy(), row.gene]
        pair = predicted.X.ravel(), predicted.layers["measured"].ravel()
        if np.isfinite(row.pcc):
            assert row.pcc == pytest.approx(np.corrcoef(*pair)[0, 1], abs=1e-3)
    maps = sorted(path.name for path in (tmp_path / "odd" / "maps").iterdir())
    assert len(maps) == 6
    assert sum(name.endswith("_pcc.png") for name in maps) == 3

    files = pk.write_report([tmp_path / "odd"], tmp_path / "report")
    metrics = pd.read_parquet(tmp_path / "report" / "metrics.parquet")
    assert metrics["gene"].tolist() == table["gene"].tolist()
    assert {path.suffix for path in files} == {".csv", ".md", ".parquet", ".png"}

    model = pk.load_trained(tmp_path / "odd", fold=1, device="cpu")
    pcc = table[table["fold"] == 1].set_index("gene")["pcc"]
    np.testing.assert_array_equal(model.gene_pcc, pcc[list(model.genes)])
    out = tmp_path / "007.h5ad"
    predicted = pk.predict_from(tmp_path / "odd", "007", out, device="cpu")
    fold = int(predicted.uns["peka_lite"]["model"]["fold"].removeprefix("fold"))  # the fold with this slide held out
    pcc = table[table["fold"] == fold].set_index("gene")["pcc"]
    np.testing.assert_array_equal(predicted.var["pcc"], pcc[list(predicted.var_names)])
    from_run = predictions[(predictions.obs["slide"] == "007").to_numpy()]
    np.testing.assert_allclose(predicted.X, from_run[:, predicted.var_names].X, atol=1e-4)
    save_predicted_map(out, tmp_path / "map.png", gene=next(g for g in model.genes if g in ODD))
    assert pk.experiments.export(tmp_path / "odd", tmp_path / "card", fold=1).is_dir()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_maps_are_drawn_for_any_gene_name(mini_cohort, tmp_path):
    slide = mini_cohort.slides[0].select(np.arange(15), reason="enough")  # too few for a map of the local PCC
    cohort = pk.data.Cohort((slide,))
    Y = np.random.default_rng(0).random((15, 1), dtype=np.float32)
    for k, gene in enumerate(FATAL):
        predictions = ad.AnnData(Y, cohort.obs.set_index(slide.adata.obs_names), pd.DataFrame(index=[gene]))
        predictions.layers["measured"] = Y
        draw_maps(cohort, predictions, pd.DataFrame({"gene": [gene], "pcc": [0.5]}), tmp_path / str(k))
        (picture,) = (tmp_path / str(k)).iterdir()
        assert picture.name.startswith("MINI1_")
        assert picture.name != "MINI1_pcc.png"
        assert picture.stat().st_size > 10_000


def test_titles_show_gene_names_literally(mini_cohort):
    slide = mini_cohort.slides[0]
    values = np.random.default_rng(0).random(slide.n_spots)
    figure = pk.expression_map(slide.adata, values, values, gene=r"$\frac{$")
    figure.canvas.draw()
    title = figure.axes[0].title
    assert (title.get_text(), title.get_parse_math()) == (r"$\frac{$: measured", False)
    figure = pk.expression_map(slide.adata, values, values, gene="x" * 300)
    assert figure.axes[0].get_title() == "x" * 39 + "…: measured"


@pytest.mark.parametrize("strings", [False, True])
def test_metrics_are_read_with_their_names(tmp_path, strings):
    run = RunFolder.open(write_run_folder(tmp_path / "run"))
    pcc = np.linspace(0, 1, len(ODD))
    pcc[1] = np.nan
    table = run.metrics().iloc[[0] * len(ODD)].assign(backbone="007", gene=list(ODD), pcc=pcc)
    with pd.option_context("future.infer_string", strings):
        write_metrics(table, run.path / "metrics.csv")
        back = run.metrics()
    assert back["gene"].tolist() == list(ODD)
    assert back["backbone"].tolist() == ["007"] * len(ODD)
    np.testing.assert_allclose(back["pcc"], pcc, rtol=1e-14)
    assert back[["fold", "n_train"]].dtypes.astype(str).tolist() == ["int64", "int64"]


def test_file_names_are_plain_and_unique():
    given = {}
    names = [unique_file_name(f"S1_{gene}", given, of=gene) for gene in ODD]
    assert len({name.casefold() for name in names}) == len(ODD)
    for name in names:
        assert len(name.encode()) <= 160
        assert not set('/\\:*?"<>|\r\n\0') & set(name)
    assert unique_file_name("S1_ACTB", {}) == "S1_ACTB"
    assert unique_file_name("S1_ACTB", given, of="ACTB") == names[ODD.index("ACTB")]


def test_markdown_shows_names_unchanged():
    assert escape_markdown("a|b\n<i>`x`*") == r"a\|b \<i>\`x\`\*"
