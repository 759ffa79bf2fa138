import cv2
import torch
from PIL import Image

from stpm_plugin import STPM
from stpm_plugin.commands import explain
from stpm_plugin.commands.entry import main as stpm


def test_pictures_of_images_scores_and_training(trained, demo_root, tmp_path):
    checkpoint = str(trained)
    images = str(next(demo_root.glob("*/test")))
    assert stpm(["explain", checkpoint, images, "--out", "there", "--most", "3"]) == 0
    names = sorted(path.name for path in (tmp_path / "there").iterdir())
    assert names[-2:] == ["scores.png", "training.png"]
    assert [name[:3] for name in names[:-2]] == ["00-", "01-", "02-"]
    assert all(Image.open(tmp_path / "there" / name).width > 500 for name in names)
    (tmp_path / "there/broken.png").write_bytes(b"no image")
    assert stpm(["explain", checkpoint, "there/broken.png", "--out", "there"]) == 2
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
