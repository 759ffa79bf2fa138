import numpy as np
import pytest
from conftest import TINY

from stpm_plugin import DemoData
from stpm_plugin.demo.demo_data import DEFECTS, scene


def test_same_seed_same_image():
    first, again, other = (scene(np.random.default_rng(seed), "stain")[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("kind", DEFECTS)
def test_defects_have_masks_of_a_sensible_size(kind):
    for seed in range(3):
        defective, mask = scene(np.random.default_rng(seed), kind)
        assert defective.shape == (256, 256, 3)
        assert set(np.unique(mask)) == {0, 255}
        assert 20 < (mask > 0).sum() < 8000


def test_good_images_have_an_empty_mask():
    assert scene(np.random.default_rng(0))[1].max() == 0


def test_mvtec_layout_drawn_once(tmp_path):
    datamodule = DemoData(root=tmp_path, **TINY)
    datamodule.prepare_data()
    datamodule.setup()
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(drawn) == TINY["train_images"] + TINY["test_images"] * (1 + 2 * len(DEFECTS))
    assert len(datamodule.train_data) == TINY["train_images"]
    assert datamodule.train_data.samples.label_index.eq(0).all()
    again = DemoData(root=tmp_path, **TINY)
    again.prepare_data()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == drawn


def test_interrupted_drawing_is_done_again(tmp_path):
    datamodule = DemoData(root=tmp_path, **TINY)
    left = tmp_path / f"{datamodule.category}.unfinished" / "train/good"
    left.mkdir(parents=True)
    (left / "000.png").write_bytes(b"half")
    datamodule.prepare_data()
    assert not left.exists()
    assert len([*tmp_path.rglob("train/good/*.png")]) == TINY["train_images"]
