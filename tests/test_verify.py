import pytest
from anomalib.engine import Engine

from stpm_plugin import STPM
from stpm_plugin.commands import verify


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The trained model's checkpoint, its OpenVINO file, and that of a student with negated weights, same teacher."""
    model, _, checkpoint = trained
    folder = tmp_path_factory.mktemp("verify")
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False)
    right = engine.export(model, "openvino", export_root=folder / "right", ckpt_path=checkpoint)
    other = STPM.load_from_checkpoint(checkpoint)
    for parameter in other.model.student.parameters():
        parameter.data.mul_(-1)
    wrong = engine.export(other, "openvino", export_root=folder / "wrong")
    return checkpoint, right, wrong


def test_a_right_model_agrees_and_a_wrong_one_does_not(exported, demo_root, capsys):
    checkpoint, right, wrong = map(str, exported)
    images = str(next(demo_root.glob("*/test")))
    assert verify.main([checkpoint, right, images]) == 0
    said = capsys.readouterr().out
    assert "equal labels: 100.0%" in said
    assert "the two agree" in said
    assert verify.main([checkpoint, wrong, images]) == 1
    assert "do NOT agree" in capsys.readouterr().out


def test_missing_checkpoint_is_one_sentence(exported, tmp_path, capsys):
    assert verify.main(["missing.ckpt", str(exported[1]), str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip() == "the checkpoint missing.ckpt does not exist."
