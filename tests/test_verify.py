import shutil

import pytest
import torch
from conftest import exported_in, loaded, six_frames

from stpm_plugin.commands import verify
from stpm_plugin.commands.entry import main as stpm


@pytest.fixture(scope="module")
def models(once, trained, exported):
    """The trained model's checkpoint, its OpenVINO file, and that of a student with negated weights, same teacher.

    The first and the last lie in a folder whose name has spaces and other alphabets.
    """

    def fill(folder):
        other = loaded(shutil.copy(trained, folder / "m ö.ckpt"))
        for parameter in other.model.student.parameters():
            parameter.data.mul_(-1)
        other.to_openvino(folder)

    folder = once("Prüfung 検査 é", fill)
    return folder / "m ö.ckpt", exported, exported_in(folder)


def test_a_right_model_agrees_and_a_wrong_one_does_not(models, demo_root, capsys):
    checkpoint, right, wrong = map(str, models)
    images = str(next(demo_root.glob("*/test")))
    assert stpm(["verify", checkpoint, right, images]) == 0
    said = capsys.readouterr().out
    assert "f32: scores differ by " in said
    assert "equal labels 100.0%" in said
    assert " ms an image" in said
    assert "checkpoint and export agree" in said
    assert stpm(["verify", checkpoint, wrong, images, "--precision", "f32"]) == 1
    said = capsys.readouterr().out
    assert "NOT safe" in said
    assert "do NOT agree" in said


def test_the_frames_of_a_video_are_compared(models, tmp_path, capsys):
    assert stpm(["verify", str(models[0]), str(models[1]), str(six_frames(tmp_path)), "--precision", "f32"]) == 0
    said = capsys.readouterr().out
    assert "6 images, " in said
    assert "equal labels 100.0%" in said


def test_images_that_trained_the_model_do_not_count_for_auroc(models, demo_root, capsys):
    checkpoint, right, _ = map(str, models)
    drawn = str(next(demo_root.glob("plate-*/train")))
    assert stpm(["verify", checkpoint, right, drawn, "--precision", "f32"]) == 0
    said = capsys.readouterr().out
    assert "8 of them trained the model: they are compared, but do not count for AUROC" in said
    assert "image AUROC" not in said


def test_images_that_were_not_compared_are_no_success(models, demo_root, tmp_path, capsys):
    checkpoint, right, _ = map(str, models)
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [str(next(demo_root.glob("*/test/good/*"))), str(tmp_path / "broken.png")]
    assert stpm(["verify", checkpoint, right, *images]) == 2
    assert "broken.png cannot be read" in capsys.readouterr().err


def test_a_score_that_is_not_a_number_disagrees(models, demo_root, monkeypatch, capsys):
    monkeypatch.setattr(verify, "tensor", lambda image: torch.full((1, 3, 64, 64), torch.nan))
    assert stpm(["verify", str(models[0]), str(models[1]), str(next(demo_root.glob("*/test/good")))]) == 1
    assert "NOT safe" in capsys.readouterr().out


def test_missing_checkpoint_is_one_sentence(models, tmp_path, capsys):
    assert stpm(["verify", "missing.ckpt", str(models[1]), str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip() == "the checkpoint missing.ckpt does not exist."
