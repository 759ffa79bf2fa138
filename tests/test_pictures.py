"""The picture grid of `benchmarks.pictures`."""

import sys

import pytest

from benchmarks.pictures import draw, main, predict
from stpm_plugin import STPM


def test_a_row_for_each_case_and_a_column_for_each_model(trained, demo_root):
    """Two surest, two least sure and two good images; image, truth, and two maps."""
    drawn = next(demo_root.glob("plate-*"))
    cases = predict(STPM, trained, drawn)
    assert len(cases) == len(list(drawn.glob("test/*/*.png")))
    assert sum(case["bad"] for case in cases) == len(list(drawn.glob("ground_truth/*/*.png")))
    figure = draw({"one": cases, "other": cases})
    assert len(figure.axes) == 6 * 4
    surest = max((case for case in cases if case["bad"]), key=lambda case: case["score"])
    assert figure.axes[2].get_xlabel() == f"{surest['score']:.2f}"


def test_no_checkpoint_is_one_sentence(demo_root, tmp_path, monkeypatch):
    drawn = next(demo_root.glob("plate-*"))
    monkeypatch.setattr(sys, "argv", ["pictures", str(drawn), "--checkpoints", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value).startswith(f"{tmp_path} holds no MODEL-{drawn.name}-seed-0.ckpt")
