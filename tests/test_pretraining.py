"""Scripts that pretrain `mini`: a corpus separate from all cohorts, and weights for `load_backbone`."""

import csv
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from skimage.color import rgb_from_hed

from peka_lite.backbones import load_backbone
from peka_lite.data import write_mini_cohort
from peka_lite.data.mini.tissue import DOMAINS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretraining"))  # scripts, beside the package

import corpus
import descriptors
import objectives
import student
import views

SPOTS = (20, 25)  # small sections are quick to draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a corpus of two training, two held-out and one real section."""
    root = tmp_path_factory.mktemp("pretraining")
    (root / "hest" / "patches").mkdir(parents=True)
    tiles = np.random.default_rng(0).integers(0, 256, (5, 224, 224, 3), dtype=np.uint8)
    with h5py.File(root / "hest" / "patches" / "REAL.h5", "w") as file:
        file["img"] = tiles
    sizes = ["--synthetic", "2", "--validation", "2", "--tiles", "20", "--processes", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "SPOTS", SPOTS)
        corpus.main(["--out", str(root / "corpus"), *sizes, "--real", str(root / "hest"), "--sections", "REAL"])
        yield root / "corpus"


@pytest.fixture
def run(folder, tmp_path):
    """Return a function that trains for some steps and returns the weights file."""

    def run(*options, steps, out="mini.safetensors"):
        arguments = ["--corpus", str(folder), "--batch", "4", "--steps", str(steps), "--out", str(tmp_path / out)]
        student.main([*arguments, *map(str, options)])
        return tmp_path / out

    return run


def test_corpus_is_complete_and_reproducible(folder):
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["REAL.npy", "corpus.json", "synthetic.npy", "validation.npy", "validation_mixture.npy",
                     "validation_section.npy"]  # fmt: skip
    tiles = np.load(folder / "synthetic.npy")
    assert tiles.shape == (40, 112, 112, 3)
    assert tiles.dtype == np.uint8
    again, _ = corpus.draw_tiles(0, corpus.TRAINING, 1, 20)
    np.testing.assert_array_equal(tiles[20:], again)
    assert np.load(folder / "REAL.npy").shape == (5, 112, 112, 3)
    assert np.load(folder / "validation_section.npy").tolist() == [0] * 20 + [1] * 20


def test_validation_tiles_have_their_domain_mixtures(folder):
    tiles, mixture = np.load(folder / "validation.npy"), np.load(folder / "validation_mixture.npy")
    assert mixture.shape == (40, len(DOMAINS))
    np.testing.assert_allclose(mixture.sum(1), 1, atol=1e-6)
    again, same = corpus.draw_tiles(0, corpus.VALIDATION, 0, 20)
    np.testing.assert_array_equal(tiles[:20], again)
    np.testing.assert_array_equal(mixture[:20], same)
    # Fat is nearly white, tumor is full of nuclei: brightness checks that tiles and mixtures match.
    brightness = tiles.reshape(40, -1).mean(1)
    fat, tumor = (mixture[:, DOMAINS.index(name)] for name in ("fat", "tumor"))
    assert np.corrcoef(brightness, fat - tumor)[0, 1] > 0.5


def test_cohort_and_corpus_use_separate_random_streams(tmp_path, monkeypatch):
    used, default_rng = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: used.append(seed) or default_rng(seed))
    write_mini_cohort(tmp_path / "mini", seed=5, n_patients=1, n_slides=1, spots_per_slide=(20, 20))
    assert len(used) > 10
    assert all(s.spawn_key[-1] < 100 for s in used)
    kinds = (corpus.TRAINING, corpus.VALIDATION)
    ours = [corpus.make_stream(seed, kind, section) for seed in (0, 5) for kind in kinds for section in range(3)]
    assert all(s.spawn_key[-1] == corpus.LAST_WORD and 100 < corpus.LAST_WORD < 2**32 for s in ours)
    assert len({tuple(s.generate_state(4)) for s in ours}) == len(ours)


def test_longer_seed_can_replace_the_start_of_a_spawn_key():
    # Hence the word that separates the corpus is the last one.
    front, long = np.random.SeedSequence(7, spawn_key=(99, 0, 3)), np.random.SeedSequence(7 + (99 << 128))
    np.testing.assert_array_equal(front.generate_state(4), long.spawn(1)[0].spawn(4)[3].generate_state(4))


def test_error_for_an_unknown_real_section_names_it(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"HER2_X1\.h5: no such section; .* has none"):
        corpus.read_section(tmp_path, "HER2_X1")
    with pytest.raises(SystemExit, match=r"^student\.py: .* has no section 'HER2_X1'; known: REAL$"):
        student.main(["--corpus", str(folder), "--out", str(tmp_path / "x"), "--sections", "HER2_X1"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("target", objectives.TARGETS)
def test_loss_of_the_masked_autoencoder_decreases(folder, target):
    torch.manual_seed(0)
    tiles = torch.from_numpy(np.load(folder / "synthetic.npy")[:6])
    with pytest.warns(UserWarning, match="random weights"):
        model = load_backbone("mini", weights="random")
    objective = objectives.MAE(model.train(), target=target)
    optimizer, losses = student.make_optimizer(objective, 1e-3), []
    for _ in range(12):
        losses.append(objective.loss(tiles))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


@pytest.mark.parametrize("name", ["mae", "dino", "ibot"])
def test_gradients_reach_the_first_layer_and_not_the_average(folder, name):
    tiles = torch.from_numpy(np.load(folder / "synthetic.npy")[:4])
    with pytest.warns(UserWarning, match="random weights"):
        objective = objectives.make_objective(name, load_backbone("mini", weights="random").train())
    objective.loss(tiles).backward()
    for layer in ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"):
        assert objective.learner["backbone"].get_parameter(layer).grad.abs().max() > 0
    assert not any(p.requires_grad for p in objective.average.parameters())


@pytest.mark.parametrize("objective", ["mae", "dino", "ibot"])
def test_weights_of_every_objective_load(run, tmp_path, objective):
    log = tmp_path / "log.csv"
    file = run("--objective", objective, "--sections", "REAL", "--log", log, steps=2)
    assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    with safe_open(file, "pt") as stored:
        assert stored.metadata()["objective"] == objective
        assert str(tmp_path) not in str(stored.metadata())
    model = load_backbone("mini", weights=file)
    with pytest.warns(UserWarning, match="random weights"):
        start = load_backbone("mini", weights="random", seed=0)
    assert not torch.equal(model.patch_embed.proj.weight, start.patch_embed.proj.weight.half().float())
    rows = list(csv.DictReader(log.open()))
    assert [(row["step"], row["tiles"]) for row in rows] == [("1", "4"), ("2", "8")]
    assert np.isfinite([float(row["loss"]) for row in rows]).all()
    assert np.isfinite(float(rows[-1]["validation_r2"]))
    assert not list(tmp_path.glob(".*"))
    assert file.stat().st_mode == log.stat().st_mode  # usual file permissions


def test_weights_are_reproducible_from_steps_and_seed(run):
    first, again, other = (
        load_file(run("--seed", seed, steps=2, out=out)) for seed, out in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["patch_embed.proj.weight"], other["patch_embed.proj.weight"])


def test_training_continues_from_initial_weights(run):
    stage1 = run(steps=2, out="stage1.safetensors")
    unchanged = run("--init", stage1, "--lr", 0, "--seed", 3, steps=2)
    before, after = load_file(stage1), load_file(unchanged)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_batches_have_the_share_of_real_tiles():
    synthetic, real = np.zeros((9, 2, 2, 3), np.uint8), [np.full((3, 2, 2, 3), i, np.uint8) for i in (1, 2)]
    rng = np.random.default_rng(0)
    kinds = student.draw_batch(rng, synthetic, real, 40, 0.25)[:, 0, 0, 0].bincount(minlength=3).tolist()
    assert kinds[0] == 30
    assert min(kinds[1:]) > 0
    assert not student.draw_batch(rng, synthetic, [], 40, 0.25).any()


def test_encode_matches_the_student(folder):
    with pytest.warns(UserWarning, match="random weights"):
        model = load_backbone("mini", weights="random")
    images = torch.rand(2, 3, 112, 112)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.spec.mean, model.spec.std))
    with torch.no_grad():
        tokens = objectives.encode(model, objectives.patchify(images, model.spec), objectives.embed_positions(model))
        torch.testing.assert_close(tokens, model.forward_features((images - mean) / std)[:, 1:], rtol=0, atol=1e-4)


def test_view_of_a_whole_tile_is_a_rotated_or_flipped_copy(folder):
    torch.manual_seed(0)
    tile = torch.from_numpy(np.load(folder / "synthetic.npy")[0])
    views = (draw_views(tile, 40, stain=0.0) * 255).permute(0, 2, 3, 1)  # (40, 112, 112, 3)
    copies = [torch.rot90(t, k) for t in (tile, tile.flip(0)) for k in range(4)]
    distance = torch.stack([(views - copy).abs().amax((1, 2, 3)) for copy in copies], 1)  # (40, 8)
    assert distance.amin(1).max() < 0.01
    assert set(distance.argmin(1).tolist()) == set(range(8))


def draw_views(tile, n, **options):
    return views.random_view(tile.expand(n, -1, -1, -1), area=(1.0, 1.0), **options)


def test_stain_jitter_changes_tissue_and_not_background(folder):
    torch.manual_seed(0)
    images = torch.full((6, 3, 4, 4), 255.0)
    images[:, :, :2] = torch.tensor([120.0, 60.0, 140.0])[:, None, None]
    torch.testing.assert_close(views.restain(images, 1e-9), images, rtol=0, atol=0.01)
    jittered = views.restain(images, 0.2)
    torch.testing.assert_close(jittered[:, :, 2:], images[:, :, 2:], rtol=0, atol=0.01)
    assert (jittered[:, :, :2].mean((2, 3)).std(0) > 3).all()


def test_stain_jitter_keeps_the_direction_of_a_pure_stain():
    torch.manual_seed(0)
    dye = torch.from_numpy(rgb_from_hed[0]).float()  # hematoxylin
    images = (256 * (-dye).exp() - 1)[None, :, None, None].expand(5, 3, 2, 2)
    density = -((views.restain(images, 0.3) + 1) / 256).log()[:, :, 0, 0]  # (5, 3)
    strength = density[:, :1] / dye[0]
    torch.testing.assert_close(density, strength * dye, rtol=1e-3, atol=1e-3)
    assert strength.std() > 0.05


def test_validation_predicts_other_sections():
    rng = np.random.default_rng(0)
    section, mixture = np.repeat(np.arange(8), 30), rng.random((240, 3))
    assert student.ridge_r2(mixture @ rng.normal(size=(3, 10)), mixture, section) > 0.99
    mixture = mixture * 0.1 + rng.random((8, 3))[section]  # features that only identify the section
    assert student.ridge_r2(np.eye(8)[section] + 0.01 * rng.normal(size=(240, 8)), mixture, section) < 0.1


def test_descriptors_respond_to_stain_and_direction():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 32, 32) * 0.1 + 0.8
    dark = images.clone()
    dark[0, :, :16, :16] *= 0.4  # one patch of the first image
    darkened, plain = descriptors.describe(dark), descriptors.describe(images)
    assert darkened.shape == (4, 4, descriptors.N_DESCRIPTORS)
    torch.testing.assert_close(darkened.mean((0, 1)), torch.zeros(descriptors.N_DESCRIPTORS), rtol=0, atol=1e-4)
    first = slice(0, 2 * len(descriptors.LEVELS))  # shares of pixels above a density
    assert darkened[0, 0, first].max() > 3
    assert plain[0, 0, first].abs().max() < 3
    stripes = torch.ones(2, 3, 32, 32)
    stripes[0, :, ::4] = 0.5  # horizontal in the first image, vertical in the second
    stripes[1, ..., ::4] = 0.5
    horizontal, vertical = descriptors.describe(stripes)[:, 0]
    at = 2 * len(descriptors.LEVELS) + 6  # after shares and densities: direction in four quarters
    assert (horizontal[at : at + 4] * vertical[at : at + 4] < 0).all()


def test_summary_loss_trains_the_pooled_features(folder):
    tiles = torch.from_numpy(np.load(folder / "synthetic.npy")[:6])
    losses = []
    for summary in (False, True):
        with pytest.warns(UserWarning, match="random weights"):
            model = load_backbone("mini", weights="random").train()
        objective = objectives.make_objective("mae", model, summary=summary)
        torch.manual_seed(0)
        losses.append(objective.loss(tiles))
        losses[-1].backward()
        assert (model.fc_norm.weight.grad is not None) == summary
    assert losses[1] > losses[0]


def test_training_can_stop_early(run, tmp_path):
    run("--stop", 0.5, "--log", tmp_path / "log.csv", steps=4)
    assert [row["step"] for row in csv.DictReader((tmp_path / "log.csv").open())] == ["1", "2"]


def test_contradicting_options_raise(folder, tmp_path, capsys):
    for options, message in ((("--summary", "--objective", "dino"), "--summary needs"), (("--stop", "2"), "a share")):
        with pytest.raises(SystemExit):
            student.parse(["--corpus", str(folder), "--out", str(tmp_path / "x"), *options])
        assert message in capsys.readouterr().err
