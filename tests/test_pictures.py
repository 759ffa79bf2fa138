"""The picture grid of `benchmarks.pictures`."""

import subprocess
import sys
from pathlib import Path

from benchmarks.pictures import draw, predict
from stpm_plugin import STPM

ROOT = Path(__file__).parents[1]


def test_a_row_for_each_case_and_a_column_for_each_model(trained, demo_root):
    """Two surest, two least sure and two good images; image, truth, and two maps."""
    drawn = next(demo_root.glob("plate-*"))
    cases = predict(STPM, trained[2], drawn)
    assert len(cases) == len(list(drawn.glob("test/*/*.png")))
    assert sum(case["bad"] for case in cases) == len(list(drawn.glob("ground_truth/*/*.png")))
    figure = draw({"one": cases, "other": cases})
    assert len(figure.axes) == 6 * 4
    surest = max((case for case in cases if case["bad"]), key=lambda case: case["score"])
    assert figure.axes[2].get_xlabel() == f"{surest['score']:.2f}"


def test_no_checkpoint_is_one_sentence(demo_root, tmp_path):
    drawn = next(demo_root.glob("plate-*"))
    command = [sys.executable, "-m", "benchmarks.pictures", str(drawn), "--checkpoints", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"{tmp_path} holds no MODEL-{drawn.name}-seed-0.ckpt")
