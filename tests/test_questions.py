"""Each of the paper's questions, asked of the drawn data in little, through the real command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch, MVTecAD
from conftest import command, fit

from benchmarks.environment import rows
from benchmarks.question_figures import ALL, separation
from benchmarks.questions import QUESTIONS, Distances, SizedAUPRO, jobs, name_of, subset

ROOT = Path(__file__).parents[1]
LITTLE = ("--size", "64", "--passes", "1")
ASK = ("python", "-m", "benchmarks.questions")


def test_figures_of_all_questions_are_drawn_from_what_is_kept(tmp_path: Path) -> None:
    """Without training, and without a change of the rows."""
    shutil.copy(ROOT / "benchmarks/results/questions.json", tmp_path)
    before = (tmp_path / "questions.json").read_text()
    assert {row["question"] for row in json.loads(before).values()} > set(QUESTIONS)  # one more was asked once
    command(*ASK, "figures", "--results", str(tmp_path), cwd=ROOT)
    found = sorted(figure.stem for figure in tmp_path.glob("*.png"))
    assert found == sorted(f"questions_{question}" for question in QUESTIONS)
    assert (tmp_path / "questions.json").read_text() == before


def test_a_question_runs_what_it_lacks_and_keeps_its_rows(demo_root: Path, tmp_path: Path) -> None:
    """A training of the one teacher of two that has no row, and then none."""
    (source,) = demo_root.glob("plate-*")
    options = SimpleNamespace(data=[source], teacher=None, size=64, passes=1)
    asked = {name_of(job): job for job in jobs("teachers", options, ["cifar10", "random"])}
    (first, job), (second, _) = asked.items()
    known = job | {"data": None, "question": "teachers", "metrics": dict.fromkeys(ALL, 0.5), "seconds": 1}
    file = tmp_path / "questions.json"
    file.write_text(json.dumps({first: known}))
    ask = (*ASK, "teachers", "--data", str(source), *LITTLE, "--results", str(tmp_path))
    command(*ask, cwd=ROOT)
    kept = rows(file)
    assert [*kept] == [first, second]
    assert kept[first] == json.loads(json.dumps(known))
    assert {"versions", "date", "command", "metrics"} <= kept[second].keys()
    assert kept[second]["teacher"] == "random"
    before = file.read_text()
    command(*ask, cwd=ROOT)
    assert file.read_text() == before


def test_distances_are_looked_at_before_and_after_passes(demo, tmp_path: Path) -> None:
    """The callback of `match`: a student's distances fall, and shares add up to one."""
    fit(demo, tmp_path, 8, layers=None, trainer={"callbacks": [Distances(str(tmp_path / "looks.json"), [8], most=3)]})
    before, after = json.loads((tmp_path / "looks.json").read_text())
    assert (before["passes"], after["passes"]) == (0, 8)
    shares = [torch.tensor(look["shares"]) for look in (before, after)]  # (groups, levels + 1, bins)
    assert shares[0].shape == (4, 4, 120)
    assert torch.allclose(shares[1][0].sum(-1), torch.ones(4), atol=1e-3)
    mean_bin = [(share[0] * torch.arange(120)).sum(-1) for share in shares]
    assert (mean_bin[1] < mean_bin[0]).all()


def test_a_share_of_a_category_is_one_that_anomalib_lists(demo_root: Path, tmp_path: Path) -> None:
    """Half of the normal training images, and the whole test set with its masks."""
    source = next(path for path in demo_root.iterdir() if path.is_dir())
    whole = MVTecAD(demo_root, source.name)
    half = MVTecAD(subset(source, 50, 0, tmp_path), source.name)
    for datamodule in (whole, half):
        datamodule.setup()
    assert len(half.train_data) == max(3, len(whole.train_data) // 2)
    assert len(half.test_data) == len(whole.test_data)


def test_pro_of_one_size_sees_no_other_defect() -> None:
    """A small defect that is found and a large one that is not: PRO 1 of the small, far less of the large."""
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, 2:4, 2:4] = mask[0, 10:26, 10:26] = True
    found = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) / 2
    found[0, 0, 2:4, 2:4] = 1
    batch = ImageBatch(image=torch.zeros(1, 3, 32, 32), gt_mask=mask, anomaly_map=found[:, 0])
    small, large = (
        SizedAUPRO(low, high, fields=["anomaly_map", "gt_mask"]) for low, high in [(0.0, 0.01), (0.01, 2.0)]
    )
    for metric in (small, large):
        metric.update(batch)
    assert small.compute() == pytest.approx(1, abs=1e-3)
    assert large.compute() < 0.5


def test_separation_is_the_area_under_the_curve() -> None:
    """Two bins by hand: 3/4 of the anomalous pixels above half of the normal ones, ties for the rest."""
    assert separation([0.5, 0.5], [0.25, 0.75]) == pytest.approx(0.625)
    assert separation([1.0, 0.0], [0.0, 1.0]) == 1
