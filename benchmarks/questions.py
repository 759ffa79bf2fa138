"""The paper's questions, each answered by real runs, a table and a figure.

    python -m benchmarks.questions match      --data DIR/screw DIR/bottle --teacher FILE   # does a student match?
    python -m benchmarks.questions scales     --data DIR/screw DIR/bottle --teacher FILE   # do several levels help?
    python -m benchmarks.questions teachers   --data DIR/screw DIR/bottle --teacher FILE   # what does a teacher carry?
    python -m benchmarks.questions fewshot    --data DIR/screw --teacher FILE              # how many images are enough?
    python -m benchmarks.questions throughput --teacher FILE                               # what does a pixel cost?
    python -m benchmarks.questions all        --data DIR/screw DIR/bottle --teacher FILE
    python -m benchmarks.questions figures                                                 # from what is kept

Data are folders in MVTec AD's layout, or `demo`, the package's drawings. Each run is the real `anomalib train` in a
fresh process; rows are written as they come to `results/questions.json`, and what has a row is not run again, so that
`all` goes on where it was stopped. Equal runs of different questions are one row. `teachers` looks for more teachers,
made by `pretrain_teacher.py`, in `--teachers DIR`, named after what they were trained on (`mnist.safetensors`).
The rows that are kept are of the defaults of their date: power -1/4 and the finest level at full weight.
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
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from skimage.measure import label
from torch import Tensor
from torch.nn import functional as F

from benchmarks.environment import environment
from benchmarks.students import subset
from benchmarks.training_speed import train
from stpm_plugin import STPM
from stpm_plugin.model.features import FeaturePyramid
from stpm_plugin.model.matching import distances

RESULTS = Path(__file__).parent / "results"
CIFAR10 = Path(__file__).parents[1] / "tests/cifar10_teacher.safetensors"
QUESTIONS = ("match", "scales", "teachers", "fewshot", "throughput")
LAYERS = ("layer1", "layer2", "layer3")
SUBSETS = [list(subset) for count in (1, 2, 3) for subset in itertools.combinations(LAYERS, count)]
TEACHERS = ("imagenet", "cifar10", "cifar100", "cifar10_shuffled", "mnist", "svhn", "random")
SHARES = {5: 5, 10: 5, 20: 1, 50: 1, 100: 1}  # per cent of the normal training images: seeds
PASSES = 12  # over all images, whatever the defaults are, so that rows stay comparable; equal steps: PASSES / share
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

    Args:
        path: JSON file to write.
        passes: Numbers of passes after which to look.
        most: Images of a group, spread evenly over it.
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
        test = range(len(data.test_data))
        wanted = [(data.train_data, trained), (data.train_data, held), (data.test_data, test)]
        model.eval()
        counts = torch.zeros(len(GROUPS), len(pl_module.model.teacher.layers) + 1, len(EDGES) - 1)
        for group, (images, places) in enumerate(wanted):
            for place in places[:: -(-len(places) // self.most)]:
                item = images[place]
                x = pl_module.pre_processor.transform(item.image[None].to(pl_module.device))
                maps = torch.cat(
                    [
                        F.interpolate(level[None], x.shape[-2:], mode="bilinear")
                        for level in distances(model.teach(x), model.study(x))
                    ]
                )[:, 0].cpu()
                maps = torch.cat([maps, maps.clamp(min=1e-12).log().mean(0, keepdim=True).exp()])
                bad = torch.zeros(x.shape[-2:], dtype=torch.bool)
                if group == 2 and item.gt_mask is not None:
                    bad = F.interpolate(item.gt_mask[None, None].float(), x.shape[-2:])[0, 0] > 0
                for level, values in enumerate(maps):
                    counts[group, level] += histogram(values[~bad])
                    counts[3, level] += histogram(values[bad])
        model.train()
        shares = (counts / counts.sum(-1, keepdim=True).clamp(min=1)).tolist()
        rounded = [[[round(share, 5) for share in level] for level in group] for group in shares]
        self.rows.append({"passes": passes, "shares": rounded})
        self.path.write_text(json.dumps(self.rows))


def histogram(values: Tensor) -> Tensor:
    """Count values (N,) between the edges; what lies outside counts in the first or the last bin."""
    return torch.histogram(values.clamp(EDGES[0], EDGES[-1]), EDGES).hist


def main() -> None:
    """Run what a question still lacks, then tabulate and draw all that is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=[*QUESTIONS, "all", "figures"])
    parser.add_argument("--data", nargs="+", default=["demo"], help="folders in MVTec AD's layout, or demo")
    parser.add_argument("--teacher", type=Path, help="weights of torchvision's ResNet-18; one of CIFAR-10, for a trial")
    parser.add_argument("--teachers", type=Path, default=Path("teachers"), help="folder of other teachers' weights")
    parser.add_argument("--models", nargs="+", default=["STPM", "anomalib PaDiM", "anomalib PatchCore"])
    parser.add_argument("--levels", nargs="+", default=["+".join(subset) for subset in SUBSETS], help="of `scales`")
    parser.add_argument("--shares", nargs="+", type=int, default=list(SHARES), help="of the images, per cent")
    parser.add_argument("--names", nargs="+", default=list(TEACHERS), help="of the teachers")
    parser.add_argument("--passes", type=int, default=PASSES, help="over all images; another number for a trial")
    parser.add_argument("--size", type=int, default=256, help="of the images, pixels")
    parser.add_argument("--most", type=int, default=40, help="images of a group that `match` looks at")
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 384, 512, 1024], help="of `throughput`, pixels")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of what is kept")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    if args.question != "figures":
        with tempfile.TemporaryDirectory() as folder:
            for question in QUESTIONS if args.question == "all" else [args.question]:
                answer(question, args, Path(folder))
    from benchmarks.question_figures import draw

    draw(rows(args.results), args.results)


def rows(results: Path) -> dict[str, dict[str, Any]]:
    """Return what is kept."""
    file = results / "questions.json"
    return json.loads(file.read_text()) if file.exists() else {}


def save(results: Path, key: str, row: dict[str, Any]) -> None:
    """Keep a row, on a line of its own."""
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in {**rows(results), key: row}.items())
    (results / "questions.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def answer(question: str, args: argparse.Namespace, folder: Path) -> None:
    """Run what the question lacks."""
    if question == "throughput":
        if question not in rows(args.results):
            save(args.results, question, throughput(args.sizes) | environment("python -m benchmarks.questions"))
        return
    wanted = {name_of(job): job for job in jobs(question, args, folder)}
    kept = {key for key, row in rows(args.results).items() if "why" not in row}  # what was missing may be there now
    wanted = {key: job for key, job in wanted.items() if key not in kept}
    for key, job in track(wanted.items(), f"{question}: {len(wanted)} runs"):
        print(key, flush=True)
        run, weights, why = settings(job, args, folder), job.pop("weights"), job.pop("missing", "")
        del job["data"]  # a path of this machine
        if why:
            save(args.results, key, {"question": question, **job, "why": why})
            continue
        begin = time.time()
        row = train(run, weights, folder)
        if question == "match":
            row["looks"] = json.loads((folder / "distances.json").read_text())
        row["teacher_accuracy"] = accuracy_of(job["teacher"], weights)
        row |= {"seconds": round(time.time() - begin), **environment(f"python -m benchmarks.questions {question}")}
        save(args.results, key, {"question": question, **job, **row})


def name_of(job: dict[str, Any]) -> str:
    """Name a run by what it is, so that equal runs of two questions are one."""
    words = [job["model"], job["category"], f"seed {job['seed']}", f"{job['share']} %", f"{job['passes']} passes"]
    words += ["+".join(job["layers"]), job["teacher"], f"{job['size']} pixels"]
    return ", ".join(words) + (", distances" if job.get("distances") else "")


def jobs(question: str, args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a question's runs."""
    for path in args.data:
        base = {"model": "STPM", "data": path, "category": Path(path).name, "seed": 0, "share": 100}
        base |= {"passes": args.passes, "layers": LAYERS, "teacher": "imagenet", "size": args.size}
        base["weights"] = (args.teacher or CIFAR10).resolve()
        if args.teacher is None:
            base["teacher"] = "cifar10"
        if question == "match":
            yield base | {"distances": True}
            yield base | {"distances": True, "model": "STPM, paper", "passes": round(args.passes * 100 / PASSES)}
        elif question == "scales":
            yield from (base | {"layers": levels.split("+")} for levels in args.levels)
        elif question == "teachers":
            for name in args.names:
                weights, why = teacher(name, base["weights"], args.teachers, folder)
                yield base | {"teacher": name, "weights": weights, **({"missing": why} if why else {})}
        else:
            for share in args.shares:
                for seed in range(SHARES.get(share, 1)):
                    part = base | {"share": share, "seed": seed}
                    for model in args.models:
                        yield part | {"model": model, "passes": args.passes if model == "STPM" else 1}
                    if "STPM" in args.models:
                        yield part | {"passes": round(args.passes * 100 / share)}


def teacher(name: str, imagenet: Path, folder: Path, scratch: Path) -> tuple[Path, str]:
    """Find a teacher's weights; returns where they are and, if they are nowhere, why."""
    if name == "imagenet":
        return imagenet, "" if imagenet != CIFAR10 else "no ImageNet weights were given"
    if name == "cifar10":
        return CIFAR10, ""
    if name == "random":
        file = scratch / "random.safetensors"
        torch.manual_seed(0)
        save_file(FeaturePyramid("resnet18", LAYERS).net.state_dict(), file)
        return file, ""
    file = folder / f"{name}.safetensors"
    data = name.replace("_shuffled", " --shuffle-labels")
    how = f"not made: python -m benchmarks.pretrain_teacher --data {data} --root data --out {file}"
    return file.resolve(), "" if file.exists() else how


def accuracy_of(name: str, weights: Path) -> float | None:
    """Share of its own test images that a teacher classifies right; nothing where nobody measured it."""
    if name == "imagenet":
        return 0.6976  # quoted: torchvision's resnet18, IMAGENET1K_V1, of the 50,000 validation images
    with safe_open(weights, "pt") as file:
        accuracy = (file.metadata() or {}).get("test_accuracy")
    return float(accuracy) if accuracy else None


def settings(job: dict[str, Any], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Say a run in the words of :func:`benchmarks.training_speed.train`."""
    run = {"model": job["model"], "category": job["category"], "seed": job["seed"], "size": job["size"]}
    if job["data"] == "demo":
        share = round(20 * job["share"] / 100)
        arguments = {"root": str(folder / "demo"), "train_images": share, "test_images": 2, "seed": job["seed"]}
        run["data"] = {"class_path": "stpm_plugin.DemoData", "init_args": arguments}
        run["root"] = arguments["root"]
        areas = [0.001, 0.01]
    else:
        source = Path(job["data"]).resolve()
        run["root"] = str(subset(source, job["share"], job["seed"], folder))
        areas = thirds(source)
    run["epochs"] = job["passes"]
    if job["model"].startswith("STPM"):
        run["arguments"] = {"layers": list(job["layers"])}
    bounds = [0.0, *areas, 2.0]
    run["metrics"] = [
        {
            "class_path": "benchmarks.questions.SizedAUPRO",
            "init_args": {
                "fields": ["anomaly_map", "gt_mask"],
                "prefix": f"{third}_",
                "strict": False,
                "low": low,
                "high": high,
            },
        }
        for third, low, high in zip(THIRDS, bounds, bounds[1:], strict=False)
    ]
    if job.get("distances"):
        looks = sorted({1, 2, 3, 5, 8, 12, 25, 50, 75, args.passes, job["passes"]})
        arguments = {"path": str(folder / "distances.json"), "passes": looks, "most": args.most}
        run["callbacks"] = [{"class_path": "benchmarks.questions.Distances", "init_args": arguments}]
    return run


def thirds(source: Path) -> list[float]:
    """Areas, shares of the image, between the small, the middle and the large third of a category's defects."""
    from anomalib.data.utils import read_mask

    masks = (read_mask(path, as_tensor=True) for path in sorted((source / "ground_truth").rglob("*.png")))
    areas = [area for mask in masks for _, area in regions(mask.squeeze().bool())]
    return [round(cut, 6) for cut in statistics.quantiles(areas, n=3)]


@torch.inference_mode()
def throughput(sizes: list[int]) -> dict[str, Any]:
    """Time one forward pass, image to score, at several sizes in turns; milliseconds; with any weights, it is equal."""
    model = STPM(backbone="resnet18").eval().model
    images = {size: torch.randn(1, 3, size, size).to(memory_format=torch.channels_last) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(11):
        for size, image in images.items():
            begin = time.perf_counter()
            model(image)
            if turn:  # the first only warms up
                times[size].append(round(1000 * (time.perf_counter() - begin), 2))
    return {"question": "throughput", "milliseconds": times}


if __name__ == "__main__":
    main()
