"""Students of each category and seed, and their distances on whole data sets: what `heads.py` chooses from.

    python -m benchmarks.students KEPT DIR/screw DIR/bottle --teacher FILE --recipe default --seeds 0 1 2

Each is a fit by the plugin through anomalib's Engine. KEPT gets, for each, the distances at each level on the held-out
good images and on the test images, with masks and labels (some megabytes, for no commit); a student that is there is
not trained again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from torch import Tensor
from torch.nn import functional as F

from benchmarks.environment import environment
from stpm_plugin import STPM
from stpm_plugin.model.matching import distances

SIZE = (256, 256)
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "4 passes": {"epochs": 4},
    "16 passes": {"epochs": 16},
    "a fifth held out": {"holdout": 0.2},
    "all positions": {"hard_share": 1.0},
    "lite0": {"backbone": "tf_efficientnet_lite0.in1k"},
}


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", type=Path, help="folder of what is kept")
    parser.add_argument("categories", nargs="+", type=Path, help="folders in MVTec AD's layout")
    parser.add_argument("--teacher", required=True, help="weights of the recipe's backbone: a file, or lite0")
    parser.add_argument("--recipe", choices=RECIPES, default="default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    args.kept.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for category in args.categories:
            file = args.kept / f"{args.recipe}, {category.name}, {seed}.pt"
            if not file.exists():
                student = train(category.resolve(), args.teacher, seed, RECIPES[args.recipe])
                torch.save({"recipe": args.recipe, **student}, file)
                print(file.stem, json.dumps(student["run"]), flush=True)


def train(category: Path, teacher: str, seed: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """Fit once, and look at the good images held out and at the test images."""
    data = MVTecAD(root=category.parent, category=category.name, num_workers=1, val_split_mode="none")
    model = STPM(teacher_weights=teacher, seed=seed, **recipe)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
        )
        begin = time.perf_counter()
        engine.fit(model, datamodule=data)
    run = {"seconds": round(time.perf_counter() - begin), "held_out_score": model.selection.chosen.score}
    run |= {"steps": engine.trainer.global_step, **environment("python -m benchmarks.students")}
    held = model.data_record.held_out
    masks = [F.interpolate(item.gt_mask[None, None].float(), SIZE)[0, 0] > 0 for item in data.test_data]
    return {
        "category": category.name,
        "seed": seed,
        "run": run,
        "good": levels(model, (data.train_data[place].image for place in held)),
        "test": levels(model, (item.image for item in data.test_data)),
        "masks": torch.stack(masks),
        "labels": torch.stack([item.gt_label.reshape(()) for item in data.test_data]).bool(),
        "names": [f"{Path(p).parent.name}/{Path(p).name}" for p in data.test_data.samples.image_path],
        "holdout": model.holdout,
        "strides": model.model.teacher.strides,
    }


@torch.inference_mode()
def levels(model: STPM, images: Iterable[Tensor]) -> list[Tensor]:
    """Each level's distances (N, H_l, W_l), float32, of images (3, H, W) in [0, 1]."""
    model.eval()
    found = []
    for image in images:
        network_input = model.transform(image[None])
        found.append(distances(model.model.teach(network_input), model.model.study(network_input)))
    return [torch.cat(level) for level in zip(*found, strict=True)]


if __name__ == "__main__":
    main()
