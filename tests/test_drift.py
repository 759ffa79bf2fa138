"""Scores that leave the held-out ones, and thresholds that are set anew on an exported model."""

import json
from pathlib import Path

import cv2
import numpy as np
import openvino as ov
import pytest
from conftest import rows, run
from scipy import stats

from stpm_plugin.commands.entry import main as stpm
from stpm_plugin.deployment.drift import WINDOW, Drift, describe, shifts
from stpm_plugin.deployment.report.contents import contents_of
from stpm_plugin.deployment.scorer import Scorer
from stpm_plugin.false_alarms import limit

KEPT = Path(__file__).parents[1] / "benchmarks/results/false_alarms.json"


def test_the_gaps_are_those_of_kolmogorov_and_smirnov():
    rng = np.random.default_rng(0)
    reference, sample = rng.lognormal(size=40), rng.lognormal(0.3, size=30)
    higher, lower = shifts(reference, sample)
    assert higher == pytest.approx(stats.ks_2samp(sample, reference, "less").statistic)
    assert lower == pytest.approx(stats.ks_2samp(sample, reference, "greater").statistic)


def test_a_change_is_noticed_in_one_window_and_defects_are_none():
    rng = np.random.default_rng(0)
    held_out = np.sort(rng.lognormal(-2, 0.2, 40))
    good = rng.lognormal(-2, 0.2, 10 * WINDOW)
    drift = Drift(held_out)
    assert not any(drift.add(value) for value in good)
    with_defects = good.copy()
    with_defects[::10] *= 3  # a tenth of the parts
    assert not any(drift.add(value) for value in with_defects)
    said = [drift.add(1.5 * value) for value in good[:WINDOW]]
    assert said[:-1] == [None] * (WINDOW - 1)
    assert f"the last {WINDOW} images score above the 40 held-out good ones" in said[-1]
    assert "score below" in [drift.add(0.6 * value) for value in good[:WINDOW]][-1]
    assert not Drift(held_out[:5]).ready


@pytest.mark.parametrize("category", sorted({row["category"] for row in json.loads(KEPT.read_text()).values()}))
def test_good_test_images_of_real_parts_are_no_change(category):
    """Raw scores of good images that a kept run held out, beside those of the official test split."""
    (row,) = (row for row in json.loads(KEPT.read_text()).values() if row["category"] == category)
    held_out, good, rng = np.sort(row["held_out_scores"]), row["test_scores"], np.random.default_rng(0)
    warned = [describe(held_out, rng.choice(good, WINDOW)) is not None for _ in range(400)]
    assert np.mean(warned) <= 0.02
    assert describe(held_out, 1.5 * rng.choice(good, WINDOW)) is not None


def test_the_command_warns(exported, demo_root, tmp_path, capsys, monkeypatch):
    scorer = Scorer(exported)
    monkeypatch.setattr("stpm_plugin.commands.scoring.Drift", lambda _: Drift([0.01 * n for n in range(20)]))
    folder = tmp_path / "many"
    folder.mkdir()
    source = next(demo_root.glob("*/test/good/000.png"))
    for number in range(WINDOW):
        (folder / f"{number}.png").symlink_to(source)
    assert stpm(["score", str(exported), str(folder), "--csv", str(tmp_path / "s.csv")]) == 0
    said = capsys.readouterr().err
    assert f"warning: the last {WINDOW} images score above" in said
    assert "the lighting, the camera or the product has changed" in said
    assert len(scorer.verdict.held_out_scores) == 2  # what the model itself holds, too few to tell


@pytest.fixture
def good(demo_root, tmp_path) -> str:
    """A folder of good images that trained nothing: mirrored ones."""
    folder = tmp_path / "later/good"
    folder.mkdir(parents=True)
    for path in demo_root.glob("*/train/good/*"):
        cv2.imwrite(str(folder / path.name), cv2.imread(str(path))[:, ::-1])
    return str(folder)


def test_a_threshold_is_set_anew_by_the_rule_and_every_host_takes_it(exported, good, tmp_path, capsys):
    new = tmp_path / "new.xml"
    assert stpm(["threshold", str(exported), "--good", good, "--false-alarms", "0.1", "--out", str(new)]) == 0
    said = capsys.readouterr().out
    table = tmp_path / "s.csv"
    assert stpm(["score", str(new), good, "--csv", str(table)]) == 0
    raw = np.array([float(row["raw"]) for row in rows(table)])
    scorer = Scorer(new)
    assert scorer.verdict.image.threshold == pytest.approx(limit(raw, 0.9).value, rel=1e-5)
    assert f"image threshold {limit(raw, 0.9).value:.4g}; expected false alarms" in said
    assert stpm(["threshold", str(new)]) == 0
    assert said.splitlines()[0].partition("; ")[2] in capsys.readouterr().out  # not what the same images exceed it by
    assert scorer.verdict.basis == "new good images"
    assert scorer.digest != Scorer(exported).digest
    graph = ov.compile_model(new, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for one, row in zip(scorer.score([row["path"] for row in rows(table)], maps=True), rows(table), strict=True):
        pixels = one.image[:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32) / 255
        assert graph(pixels)["pred_score"].item() == pytest.approx(float(row["score"]), abs=1e-4)
        assert graph(pixels)["pred_label"].item() == (row["label"] == "anomalous")
        assert float(row["score"]) == pytest.approx(one.raw / (one.raw + scorer.verdict.image.threshold), abs=1e-5)


def test_images_that_set_a_threshold_anew_do_not_count_in_a_report(exported, good, demo_root, tmp_path):
    trained, later = next(demo_root.glob("*/train")), sorted(map(str, Path(good).iterdir()))
    model, table = exported, tmp_path / "s.csv"
    ways = [["--good", *later[:4]], ["--good", *later[4:]], ["--sensitivity", "0.6"]]
    for number, (way, counting) in enumerate(zip(ways, [later[4:], later[:4], later[:4]], strict=True)):
        model, before = tmp_path / f"{number}.xml", model
        assert stpm(["threshold", str(before), *way, "--out", str(model)]) == 0
        assert stpm(["score", str(model), str(trained), good, "--csv", str(table), "--restart"]) == 0
        found = contents_of(table, model)
        assert sorted(shown.path for shown in found.images) == counting
        assert (found.trained, found.held_out) == (8, 2 + len(later) - len(counting))  # those that chose the epoch too


def test_a_threshold_takes_good_readable_images_and_shows_itself(exported, good, demo_root, tmp_path, capsys):
    assert stpm(["threshold", str(exported)]) == 0
    assert "pixel threshold" in capsys.readouterr().out
    moved = tmp_path / "moved.xml"
    assert stpm(["threshold", str(exported), "--value", "0.7", "--out", str(moved)]) == 0
    assert Scorer(moved).verdict.image.raw_limit == pytest.approx(0.7)
    assert stpm(["threshold", str(exported), "--sensitivity", "0.6", "--out", str(moved)]) == 0
    assert Scorer(moved).verdict == Scorer(exported, sensitivity=0.6).verdict
    (tmp_path / "x.png").write_bytes(b"no image")
    (tmp_path / "folder").mkdir()
    before = sorted(exported.parent.iterdir())
    for arguments, words in [
        (["--good", "x.png"], "x.png cannot be read as an image"),
        (["--good", good, "--false-alarms", "1"], "--false-alarms 1.0 must be between 0 and 1"),
        (["--good", str(next(demo_root.glob("*/train/good")))], "of the 10 images trained the model"),
        (["--good", good, "--value", "1"], "--good and --value each set the threshold: pass only one"),
        (["--false-alarms", "0.1"], "--false-alarms needs good images"),
        (["--good", good, "--out", "new"], "--out new must be the model's .xml file, such as new.xml"),
        (["--out", "new.xml"], "--out needs a threshold to write: pass --good, --value or --sensitivity"),
        (["--value", "1", "--device", "GPU"], "--device is used only with --good"),
        (["--value", "1", "--out", "new.onnx"], "--out new.onnx must be the model's .xml file, such as new.xml"),
        (["--value", "1", "--out", "folder"], "--out folder must be the model's .xml file, such as folder/model.xml"),
    ]:
        assert stpm(["threshold", str(exported), *arguments]) == 1
        assert words in capsys.readouterr().err
    assert sorted(exported.parent.iterdir()) == before


def test_a_threshold_needs_neither_torch_nor_anomalib(exported, good, tmp_path):
    code = "import sys; from stpm_plugin.commands.entry import main; print(main(['threshold', *sys.argv[1:]]), "
    code += "[name for name in ('torch', 'anomalib', 'lightning', 'timm') if name in sys.modules])"
    assert run("-c", code, str(exported), "--good", good, "--out", str(tmp_path / "new.xml")).strip().endswith("0 []")
