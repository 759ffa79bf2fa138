import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from PIL import Image

from stpm_plugin import STPM, STPMPostProcessor
from stpm_plugin.commands import explain
from stpm_plugin.commands.entry import main as stpm


def test_pictures_of_images_scores_and_training(trained, demo_root, tmp_path, capsys):
    checkpoint = str(trained)
    images = str(next(demo_root.glob("*/test")))
    assert stpm(["explain", checkpoint, images, "--out", "there", "--most", "3"]) == 0
    names = sorted(path.name for path in (tmp_path / "there").iterdir())
    assert names[-2:] == ["scores.png", "training.png"]
    assert [name[:3] for name in names[:-2]] == ["00-", "01-", "02-"]
    assert all(Image.open(tmp_path / "there" / name).width > 500 for name in names)
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert stpm(["explain", checkpoint, "broken.png", "--out", "there"]) == 1
    assert f"there contains panels of an earlier run, such as {names[0]}" in capsys.readouterr().err
    assert stpm(["explain", checkpoint, "broken.png", "--out", "elsewhere"]) == 2
    assert stpm(["explain", "missing.ckpt", images]) == 1


def test_images_that_trained_the_model_are_told_apart(trained, demo_root, tmp_path, capsys):
    drawn = str(next(demo_root.glob("plate-*")))
    assert stpm(["explain", str(trained), f"{drawn}/train", f"{drawn}/test/dent", "--out", "there", "--most", "1"]) == 0
    assert "8 of the images trained the model" in capsys.readouterr().out


def test_levels_multiply_to_the_map(trained, demo_root):
    model = STPM.load_from_checkpoint(trained).eval()
    path = next(demo_root.glob("*/test/dent/*.png"))
    image = cv2.imread(str(path))
    levels = [torch.from_numpy(level) for level in explain.look(model, str(path), image).levels]
    with torch.inference_mode():
        exact = model.model(model.pre_processor(explain.tensor(image))).anomaly_map[0, 0]
    torch.testing.assert_close(torch.stack(levels).prod(0).pow(1 / len(levels)), exact)


def test_a_checkpoint_keeps_the_curve(trained):
    kept = torch.load(trained, weights_only=True)["stpm"]
    assert len(kept["scores"]) == 3
    assert kept["scores"][kept["epoch"]] == min(kept["scores"]) == kept["score"]


def test_limits_are_those_of_the_labels():
    good = torch.tensor([0.1, 0.2, 0.3])
    scores, maps = torch.linspace(0.01, 1, 100), torch.linspace(0.01, 1, 100).reshape(-1, 1, 1, 1)
    for options in ({}, {"image_sensitivity": 0.7, "pixel_sensitivity": 0.2}):
        for normalizes in (True, False):
            judge = STPMPostProcessor(0.9, enable_normalization=normalizes, **options)
            judge.set_from_normal_images(good, 2 * good)
            made, limits = judge(InferenceBatch(pred_score=scores, anomaly_map=maps)), explain.limits_of(judge)
            assert ((made.pred_score > limits.image) == made.pred_label).all()
            assert ((made.anomaly_map > limits.pixel) == made.pred_mask).all()
    assert explain.limits_of(PostProcessor(image_sensitivity=0.25)) == (0.75, 0.5)
    assert explain.limits_of(STPMPostProcessor(enable_normalization=False)) == (None, None)  # not trained
    assert explain.limits_of(PostProcessor(enable_thresholding=False)) == explain.limits_of(None) == (None, None)


def test_line_and_contour_are_at_the_limits():
    axis = explain.draw_scores([0.1, 0.9], ["good", "dent"], 0.3).axes[0]
    assert [line.get_xdata()[0] for line in axis.lines] == [0.3]
    assert not explain.draw_scores([0.1], ["good"], None).axes[0].lines
    anomaly_map = np.linspace(0, 0.4, 64).reshape(8, 8)
    seen = explain.Seen(Path("a/x.png"), np.zeros((8, 8, 3)), [anomaly_map], anomaly_map, 0.4, True)
    contours = [explain.draw_image(seen, ["layer1"], limit).axes[-1].collections for limit in (0.2, 0.5, None)]
    assert [len(each) for each in contours] == [1, 0, 0]
    assert contours[0][0].levels == [0.2]


@pytest.mark.parametrize(
    ("scores", "chosen", "score", "epochs"),
    [
        ([0.3, 0.1, 0.2], 1, 0.1, [0, 1, 2]),
        ([0.3, 0.1, 0.2], 8, 0.1, [7, 8, 9]),  # the choice started over in epoch 7
        ([math.nan, 0.1], 5, 0.1, [4, 5]),
    ],
)
def test_epochs_are_counted_from_the_chosen_one(scores, chosen, score, epochs):
    curve, mark = explain.draw_training(scores, chosen, score).axes[0].lines
    assert [*curve.get_xdata()] == epochs
    assert [*mark.get_xdata()] == [chosen]
    assert [*mark.get_ydata()] == [score]
