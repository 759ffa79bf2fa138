"""The paper's questions, each answered by real runs, a table and a figure.

    python -m benchmarks.questions QUESTION --data DIR/screw DIR/bottle --teacher FILE  # or all, which needs hours
    python -m benchmarks.questions figures                                              # from what is kept

Questions are `match` (does a student match?), `scales` (do several levels help?), `teachers` (what does a teacher
carry?) and `fewshot` (how many images are enough?). Data are folders in MVTec AD's layout. Each run is the real
`anomalib train` in a fresh process; rows are written as they come to `results/questions.json`, and what has a row is
not run again. `teachers` takes more teachers, weights of a ResNet-18, by `--teachers FILE`, named after what they were
trained on (`mnist.safetensors`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from anomalib.metrics import AUPRO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from skimage.measure import label
from torch import Tensor
from torch.nn import functional as F

from benchmarks.environment import Row, environment, keep, parser, rows
from benchmarks.training_speed import part_of, train
from stpm_plugin.model.features import FeaturePyramid
from stpm_plugin.model.matching import distances

NAME = "benchmarks.questions"  # also where it runs as a script
CIFAR10 = Path(__file__).parents[1] / "tests/cifar10_teacher.safetensors"
QUESTIONS = ("match", "scales", "teachers", "fewshot")
LAYERS = ("layer1", "layer2", "layer3")
SUBSETS = [layers for count in (1, 2, 3) for layers in itertools.combinations(LAYERS, count)]
TEACHERS = ("imagenet", "cifar10", "cifar100", "cifar10_shuffled", "mnist", "svhn", "random")
SHARES = {5: 5, 10: 5, 20: 1, 50: 1, 100: 1}  # per cent of the normal training images: seeds
LOOKS = [1, 2, 3, 5, 8, 12, 25, 50, 75, 100]  # passes after which distances are counted
GROUPS = ("training", "held out", "test, normal", "test, anomalous")
THIRDS = ("small", "middle", "large")
EDGES = torch.logspace(-4, 0.31, 121)  # of distances, up to 2


class SizedAUPRO(AUPRO):
    """PRO of the defects with an area in [low, high), shares of the image; pixels of other defects do not count."""

    def __init__(self, low: float = 0.0, high: float = 1.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.low, self.high = low, high

    def update(self, batch: Any, *args: Any, **kwargs: Any) -> None:
        """Clear the other defects from the masks, and the map there, so that they are no false alarms either."""
        masks, maps = batch.gt_mask.bool().clone(), batch.anomaly_map.clone()
        for mask, found in zip(masks, maps, strict=True):
            for where, area in regions(mask):
                if not self.low <= area < self.high:
                    mask[where], found.view(mask.shape)[where] = False, 0
        super().update(batch.__class__(image=batch.image, gt_mask=masks, anomaly_map=maps), *args, **kwargs)


def regions(mask: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Yield each connected defect of a mask (H, W), and its share of the image."""
    numbered = torch.from_numpy(label(mask.cpu().numpy())).to(mask.device)
    for number in range(1, int(numbered.max()) + 1):
        where = numbered == number
        yield where, where.float().mean().item()


class Distances(Callback):
    """Keeps histograms of each level's distances over training, of training, held-out and test pixels.

    It looks after some ``passes``, at ``most`` images of a group, and writes a JSON file.
    """

    def __init__(self, path: str, passes: list[int], most: int = 40) -> None:
        self.path, self.passes, self.most, self.rows = Path(path), passes, most, []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before the first pass."""
        self.look(trainer, pl_module, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look after some passes."""
        if trainer.current_epoch + 1 in self.passes:
            self.look(trainer, pl_module, trainer.current_epoch + 1)

    @torch.no_grad()
    def look(self, trainer: Trainer, pl_module: LightningModule, passes: int) -> None:
        """Count distances by group and level; the last is the paper's map, the geometric mean of the levels."""
        data, model = trainer.datamodule, pl_module.model
        held = pl_module.data_record.held_out
        trained = sorted(set(range(len(data.train_data))) - set(held))
        wanted = [(data.train_data, trained), (data.train_data, held), (data.test_data, range(len(data.test_data)))]
        counts = torch.zeros(len(GROUPS), len(model.teacher.layers) + 1, len(EDGES) - 1)
        model.eval()
        for group, (images, places) in enumerate(wanted):
            for place in places[:: -(-len(places) // self.most)]:
                item = images[place]
                x = pl_module.pre_processor.transform(item.image[None].to(pl_module.device))
                size = x.shape[-2:]
                levels = [level[None].cpu() for level in distances(model.teach(x), model.study(x))]
                maps = torch.cat([F.interpolate(level, size, mode="bilinear")[:, 0] for level in levels])
                maps = torch.cat([maps, maps.clamp(min=1e-12).log().mean(0, keepdim=True).exp()])
                bad = torch.zeros(size, dtype=torch.bool)
                if group == 2 and item.gt_mask is not None:
                    bad = F.interpolate(item.gt_mask[None, None].float(), size)[0, 0] > 0
                for level, values in enumerate(maps.clamp(EDGES[0], EDGES[-1])):
                    counts[group, level] += torch.histogram(values[~bad], EDGES).hist
                    counts[3, level] += torch.histogram(values[bad], EDGES).hist
        model.train()
        shares = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
        self.rows.append({"passes": passes, "shares": shares.round(decimals=5).tolist()})
        self.path.write_text(json.dumps(self.rows))


def main() -> None:
    """Run what a question still lacks, then tabulate and draw all that is kept."""
    options = parser(__doc__, [*QUESTIONS, "all", "figures"], "--teacher")
    options.add_argument("--data", nargs="*", type=Path, default=[], help="folders in MVTec AD's layout")
    options.add_argument("--teachers", nargs="*", type=Path, default=[], help="files of other teachers' weights")
    options.add_argument("--passes", type=int, help="of STPM, for a trial; by default its own")
    options.add_argument("--size", type=int, default=256, help="of the images, pixels")
    args = options.parse_args()
    file = args.results / "questions.json"
    chosen = {"all": QUESTIONS, "figures": ()}.get(args.part, (args.part,))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = {"cifar10": CIFAR10, "random": folder / "random.safetensors"}
        weights |= {path.stem: path for path in args.teachers} | ({"imagenet": args.teacher} if args.teacher else {})
        torch.manual_seed(0)
        save_file(FeaturePyramid("resnet18", LAYERS).net.state_dict(), weights["random"])
        for question in chosen:
            for job in jobs(question, args, [*weights]):
                key, begin = name_of(job), time.time()
                if "metrics" in rows(file).get(key, {}):
                    continue
                row = train(settings(job, args, folder), weights[job["teacher"]].resolve(), folder)
                if question == "match":
                    row["looks"] = json.loads((folder / "distances.json").read_text())
                del job["data"]  # a path of this machine
                row |= {"seconds": round(time.time() - begin)} | environment(f"python -m {NAME} {question}")
                keep(file, key, {"question": question, **job, **row})
    from benchmarks.question_figures import draw

    draw(rows(file), args.results)


def name_of(job: Row) -> str:
    """Name a run by what it is, so that equal runs of two questions are one."""
    words = [job["model"], job["category"], f"seed {job['seed']}", f"{job['share']} %"]
    words += [f"{job['passes']} passes"] if job["passes"] else []
    words += ["+".join(job["layers"]), job["teacher"], f"{job['size']} pixels"]
    return ", ".join(words) + (", distances" if job.get("distances") else "")


def jobs(question: str, args: argparse.Namespace, teachers: list[str]) -> Iterator[Row]:
    """Yield a question's runs."""
    for path in args.data:
        base = {"model": "STPM", "data": path.resolve(), "category": path.name, "seed": 0, "share": 100}
        base |= {"teacher": "imagenet" if args.teacher else "cifar10", "size": args.size}
        base |= {"passes": args.passes, "layers": LAYERS}
        if question == "match":
            yield base | {"distances": True}
            yield base | {"distances": True, "model": "STPM, paper"}
        elif question == "scales":
            yield from (base | {"layers": layers} for layers in SUBSETS)
        elif question == "teachers":
            yield from (base | {"teacher": name} for name in teachers)
        else:
            for share, seed in ((share, seed) for share, seeds in SHARES.items() for seed in range(seeds)):
                part = base | {"share": share, "seed": seed}
                yield part
                yield from (part | {"model": f"anomalib {name}", "passes": 1} for name in ("PaDiM", "PatchCore"))


def settings(job: Row, args: argparse.Namespace, folder: Path) -> Row:
    """Describe a run by the arguments of :func:`benchmarks.training_speed.train`."""
    run = {name: job[name] for name in ("model", "category", "seed", "size")} | {"epochs": job["passes"]}
    run["root"], areas = str(subset(job["data"], job["share"], job["seed"], folder)), thirds(job["data"])
    if job["model"].startswith("STPM"):
        run["arguments"] = {"layers": list(job["layers"])}
    common = {"fields": ["anomaly_map", "gt_mask"], "strict": False}
    run["metrics"] = [
        {"class_path": f"{NAME}.SizedAUPRO", "init_args": {**common, "prefix": f"{third}_", "low": low, "high": high}}
        for third, low, high in zip(THIRDS, [0.0, *areas], [*areas, 2.0], strict=True)
    ]
    if job.get("distances"):
        arguments = {"path": str(folder / "distances.json"), "passes": LOOKS}
        run["callbacks"] = [{"class_path": f"{NAME}.Distances", "init_args": arguments}]
    return run


def subset(source: Path, share: int, seed: int, folder: Path) -> Path:
    """Copy a category with a random share of its normal training images; returns the root."""
    if share == 100:
        return source.parent
    root = folder / f"{source.name}-{share}-{seed}"
    if not root.exists():
        names = sorted(path.name for path in (source / "train/good").iterdir())
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = order[: max(3, round(len(names) * share / 100))]
        part_of(source, root / source.name, [names[index] for index in chosen])
    return root


def thirds(source: Path) -> list[float]:
    """Areas, shares of the image, between the small, the middle and the large third of a category's defects."""
    from anomalib.data.utils import read_mask

    masks = (read_mask(path, as_tensor=True) for path in sorted((source / "ground_truth").rglob("*.png")))
    areas = [area for mask in masks for _, area in regions(mask.squeeze().bool())]
    return [round(cut, 6) for cut in statistics.quantiles(areas, n=3)]


if __name__ == "__main__":
    main()
