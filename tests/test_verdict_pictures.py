"""The pictures of a test: calm where the map is low, tinted and outlined where it is high, with the verdict on them."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import ImageItem

from stpm_plugin.errors import STPMError
from stpm_plugin.pictures import caption, overlay
from stpm_plugin.training.verdict_pictures import LONGEST, TRUE, draw, write


def item(folder: Path, level: float, **more) -> ImageItem:
    """An item whose left half of the map has a level."""
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    cv2.imwrite(str(folder / "x.png"), image)
    anomaly_map = torch.zeros(1, 60, 80)
    anomaly_map[..., :40] = level
    known = {"anomaly_map": anomaly_map, "pred_score": torch.tensor(level), "pred_label": torch.tensor(level > 0.5)}
    return ImageItem(image=torch.zeros(3, 60, 80), image_path=str(folder / "x.png"), **known, **more)


@pytest.mark.parametrize(("level", "word"), [(0.2, "0.200 normal"), (0.9, "0.900 anomalous")])
def test_a_picture_is_the_image_and_its_heat_map_with_the_verdict(level, word, tmp_path):
    made = item(tmp_path, level)
    image = cv2.imread(str(tmp_path / "x.png"))
    expected = overlay(image, made.anomaly_map.numpy(), 0.5)
    assert (expected == image).all() == (level < 0.5)  # a good image stays as it is
    caption(expected, word)
    assert (draw(made, 0.5) == np.hstack([image, expected])).all()


def test_a_true_mask_is_outlined_on_the_image_alone(tmp_path):
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[20:40, 20:40] = True
    plain, marked = draw(item(tmp_path, 0.2), 0.5), draw(item(tmp_path, 0.2, gt_mask=mask), 0.5)
    changed = (plain != marked).any(2)
    assert changed[20:40, 20:40].sum() == pytest.approx(4 * 19, abs=4)
    assert not changed[:, 80:].any()
    assert (marked[20, 20] == TRUE).all()


def test_a_large_image_makes_a_small_picture(tmp_path):
    made = item(tmp_path, 0.2)
    cv2.imwrite(made.image_path, np.zeros((1500, 2000, 3), np.uint8))
    assert draw(made, 0.5).shape == (LONGEST * 3 // 4, 2 * LONGEST, 3)


def test_a_picture_is_written_as_it_is_or_its_file_is_named(tmp_path):
    picture, target = draw(item(tmp_path, 0.9), 0.5), tmp_path / "prüfung.png"
    write(picture, target)
    assert (cv2.imdecode(np.frombuffer(target.read_bytes(), np.uint8), cv2.IMREAD_COLOR) == picture).all()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(STPMError, match=r"folder.png cannot be written .*: make room, or set output_dir"):
        write(picture, tmp_path / "folder.png")
