"""Students of each category and seed, and their distances on whole data sets: what `heads.py` chooses from.

    python -m benchmarks.students KEPT DIR/screw DIR/bottle --teacher FILE --recipe default --seeds 0 1 2
    python -m benchmarks.students KEPT DIR/screw DIR/bottle --teacher FILE --mixed --seeds 0    # one of all categories
    python -m benchmarks.students KEPT DIR/screw DIR/bottle --teacher FILE --share 10         # of a tenth of the images

Each is a fit by the plugin through anomalib's Engine. KEPT gets, for each, the distances at each level on the held-out
good images and on the test images, with masks and labels (some megabytes, for no commit); a student that is there is
not trained again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from torch import Tensor
from torch.nn import functional as F

from benchmarks.environment import environment
from stpm_plugin import STPM
from stpm_plugin.model.matching import distances

SIZE = (256, 256)
PAPERS_FILE = Path(__file__).parents[1] / "configs/paper.yaml"
PAPER = {
    name: value
    for name, value in yaml.safe_load(PAPERS_FILE.read_text())["model"]["init_args"].items()
    if name not in ("seed", "evaluator")
}
LITE0 = {"backbone": "tf_efficientnet_lite0.in1k"}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "4 passes": {"epochs": 4},
    "16 passes": {"epochs": 16, "steps": (600, 5000)},  # beyond the default's most
    "a fifth held out": {"holdout": 0.2},
    "all positions": {"hard_share": 1.0},
    "paper": PAPER,
    "lite0": LITE0,
    "lite0 16 passes": LITE0 | {"epochs": 16, "steps": (600, 5000)},
    "lite0 all positions": LITE0 | {"hard_share": 1.0},
    "lite0 lower rate": LITE0 | {"lr": 0.4},
    "lite0 four levels": LITE0 | {"layers": [1, 2, 3, 4]},  # strides 4 to 32
}


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", type=Path, help="folder of what is kept")
    parser.add_argument("categories", nargs="+", type=Path, help="folders in MVTec AD's layout")
    parser.add_argument("--teacher", required=True, help="weights of the recipe's backbone: a file, or lite0")
    parser.add_argument("--recipe", choices=RECIPES, default="default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--mixed", action="store_true", help="one student of all categories, instead of one of each")
    images.add_argument("--share", type=int, default=100, help="of the training images, per cent")
    args = parser.parse_args()
    args.kept.mkdir(parents=True, exist_ok=True)
    groups = [args.categories] if args.mixed else [[category] for category in args.categories]
    name = f"{args.recipe} mixed" if args.mixed else args.recipe
    if args.share < 100:
        name += f" {args.share} %"
    for seed in args.seeds:
        for group in groups:
            files = [args.kept / f"{name}, {category.name}, {seed}.pt" for category in group]
            if all(file.exists() for file in files):
                continue
            with tempfile.TemporaryDirectory() as folder:
                if args.mixed:
                    root = mixed(group, Path(folder))
                else:
                    category = group[0].resolve()
                    root = subset(category, args.share, seed, Path(folder)) / category.name
                model, run = train(root, args.teacher, seed, RECIPES[args.recipe])
                held = [data_of(root).train_data[place].image for place in model.data_record.held_out]
            good = levels(model, held)
            for category, file in zip(group, files, strict=True):
                seen = {"good": good, **look(model, category.resolve())}
                torch.save({"recipe": name, "seed": seed, "run": run, "holdout": model.holdout, **seen}, file)
                print(file.stem, json.dumps(run), flush=True)


def mixed(categories: list[Path], folder: Path) -> Path:
    """A category whose training images are those of all, and whose test images are the first one's."""
    root = folder / "mixed"
    shutil.copytree(categories[0] / "test", root / "test")
    shutil.copytree(categories[0] / "ground_truth", root / "ground_truth")
    (root / "train/good").mkdir(parents=True)
    for category in categories:
        for image in sorted((category / "train/good").iterdir()):
            shutil.copy(image, root / "train/good" / f"{category.name} {image.name}")
    return root


def subset(source: Path, share: int, seed: int, folder: Path) -> Path:
    """Copy a category with a random share of its normal training images; returns the root."""
    if share == 100:
        return source.parent
    root = folder / f"{source.name}-{share}-{seed}"
    target = root / source.name
    if not target.exists():
        files = sorted((source / "train/good").iterdir())
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
        (target / "train/good").mkdir(parents=True)
        for index in order[: max(3, round(len(files) * share / 100))]:
            shutil.copyfile(files[index], target / "train/good" / files[index].name)
        for part in ("test", "ground_truth"):  # no links: anomalib lists no file that leaves the root
            shutil.copytree(source / part, target / part, copy_function=shutil.copyfile)
    return root


def data_of(category: Path) -> MVTecAD:
    """A category's images, at hand."""
    data = MVTecAD(root=category.parent, category=category.name, num_workers=1, val_split_mode="none")
    data.prepare_data()
    data.setup()
    return data


def train(category: Path, teacher: str, seed: int, recipe: dict[str, Any]) -> tuple[STPM, dict[str, Any]]:
    """Fit once; returns the model, and how it went."""
    data = data_of(category)
    model = STPM(teacher_weights=teacher, seed=seed, **recipe)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder,
            accelerator="auto",
            logger=False,
            enable_progress_bar=False,
        )
        begin = time.perf_counter()
        engine.fit(model, datamodule=data)
    run = {"seconds": round(time.perf_counter() - begin), "held_out_score": model.selection.chosen.score}
    run["aligned"] = model.model.usual_places is not None
    return model, run | {"steps": engine.trainer.global_step, **environment("python -m benchmarks.students")}


def look(model: STPM, category: Path) -> dict[str, Any]:
    """What a student makes of a category's test images."""
    data = data_of(category)
    masks = [F.interpolate(item.gt_mask[None, None].float(), SIZE)[0, 0] > 0 for item in data.test_data]
    return {
        "category": category.name,
        "test": levels(model, (item.image for item in data.test_data)),
        "masks": torch.stack(masks),
        "labels": torch.stack([item.gt_label.reshape(()) for item in data.test_data]).bool(),
        "names": [f"{Path(p).parent.name}/{Path(p).name}" for p in data.test_data.samples.image_path],
        "strides": model.model.teacher.strides,
    }


@torch.inference_mode()
def levels(model: STPM, images: Iterable[Tensor]) -> list[Tensor]:
    """Each level's distances (N, H_l, W_l), float32, of images (3, H, W) in [0, 1]."""
    model.eval()
    found = []
    for image in images:
        network_input = model.transform(image[None].to(model.device))
        found.append(distances(model.model.teach(network_input), model.model.study(network_input)))
    return [torch.cat(level).cpu() for level in zip(*found, strict=True)]


if __name__ == "__main__":
    main()
