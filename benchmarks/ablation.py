"""What was tried to find more than the paper does: each candidate alone, on one category, in minutes.

    python -m benchmarks.ablation run DIR/bottle --teacher FILE --hard-share 0.2    # train one student, try all heads
    python -m benchmarks.ablation table                                            # from what is kept

The hard share was developed on bottle and KolektorSDD and confirmed on screw. This is the plugin's model and loss in a
loop of its own, a little faster than `anomalib train`; figures of the plugin itself are `accuracy.py`'s. Rows are
kept in `results/ablation.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.data import MVTecAD
from anomalib.metrics import AUPRO, AUROC
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur, normalize, resize

from benchmarks.environment import environment
from stpm_plugin.model.features import FeaturePyramid
from stpm_plugin.model.matching import MIN_RELATIVE_DISTANCE, distances, image_score, matching_loss
from stpm_plugin.model.network import STPMModel
from stpm_plugin.model.pre_processing import IMAGENET_MEAN, IMAGENET_STD
from stpm_plugin.model.teacher_weights import load_teacher
from stpm_plugin.training.data import split

RESULT = Path(__file__).parent / "results" / "ablation.json"
USUAL = {  # of a student; the plugin's defaults may have come from here since
    "seed": 0,
    "batch": 2,
    "lr": 1.6,
    "passes": 15,
    "hard_share": 1.0,
    "weight_decay": 1e-4,
    "holdout_share": 0.2,
    "padding": "zeros",
    "corrupted": 0.0,
    "exact_statistics": False,
    "turned": False,
    "student": "resnet18.tv_in1k",
    "size": 256,
}
SIZE = (256, 256)  # of the anomaly maps
LAYERS = ("layer1", "layer2", "layer3")
HELP = {
    "weight_decay": "of SGD, on all weights",
    "holdout_share": "of the good training images; a twentieth is nearly all of them for training",
    "padding": "of the convolutions of both networks: zeros, reflect or replicate",
    "corrupted": "share of images that the student sees corrupted",
    "exact_statistics": "compute BatchNorm's statistics over all images at the end",
    "turned": "turn by right angles and mirror what is trained on, at random",
    "student": "timm model with as many channels in each layer as the teacher: resnet10t has half its blocks",
    "size": "height and width of the images, pixels; the maps are of 256",
}
MOST = USUAL | {"passes": 12, "hard_share": 0.2, "holdout_share": 0.05}  # of the students whose heads were compared
Levels = list[Tensor]


def main() -> None:
    """Run one student, or tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "table"])
    parser.add_argument("category", nargs="?", type=Path, help="folder in MVTec AD's layout")
    parser.add_argument("--teacher", type=Path, help="weights of torchvision's ResNet-18")
    for name, value in USUAL.items():
        option = f"--{name.replace('_', '-')}"
        kind = {"action": "store_true"} if value is False else {"type": type(value), "default": value}
        parser.add_argument(option, **kind, help=HELP.get(name))
    args = parser.parse_args()
    if args.part == "run":
        settings = {name: vars(args)[name] for name in USUAL}
        command = f"python -m benchmarks.ablation run {args.category.name}"
        for name, value in settings.items():
            command += "" if value is False else f" --{name.replace('_', '-')} {value}".removesuffix(" True")
        row = {"category": args.category.name, **settings, **run(args), **environment(command)}
        RESULT.write_text(json.dumps([*rows(), row], indent=1))
    table()


def rows() -> list[dict[str, Any]]:
    """Return what is kept."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else []


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train a student; returns its held-out score and what each head finds in the test images."""
    torch.manual_seed(args.seed)
    data = MVTecAD(root=args.category.absolute().parent, category=args.category.name, num_workers=0)
    data.setup()
    parts = split(len(data.train_data), args.holdout_share, args.seed)
    model = STPMModel("resnet18.tv_in1k", LAYERS)
    if args.student != USUAL["student"]:
        model.student = FeaturePyramid(args.student, LAYERS).to(memory_format=torch.channels_last)
    load_teacher(model.teacher, "resnet18.tv_in1k", str(args.teacher))
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and args.padding != "zeros":
            module.padding_mode = args.padding
            module._reversed_padding_repeated_twice = [side for side in reversed(module.padding) for _ in range(2)]
    images = torch.cat([image(data.train_data[place].image, args.size) for place in parts.train])
    kept = [torch.cat(level) for level in zip(*[model.teach(one) for one in images.split(8)], strict=True)]
    begin, student, steps = time.perf_counter(), model.student, args.passes * (len(images) // args.batch)
    sgd = torch.optim.SGD(student.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, args.lr, total_steps=steps, cycle_momentum=False)
    student.train()
    for _ in range(args.passes):
        order = torch.randperm(len(images))[: len(images) // args.batch * args.batch]
        for places in order.split(args.batch):
            seen, teacher = images[places], [level[places] for level in kept]
            if args.turned:
                seen = turn(seen)
                teacher = model.teach(seen)
            elif args.corrupted:
                seen = corrupt(seen, args.corrupted)
            with torch.autocast("cpu", torch.bfloat16):
                features = student(seen.to(memory_format=torch.channels_last))
            loss = matching_loss(teacher, features, args.hard_share)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            cycle.step()
    if args.exact_statistics:
        settle(student, images)
    student.eval()
    found = {"seconds": round(time.perf_counter() - begin)}
    good = levels(model, (data.train_data[place].image for place in parts.holdout), args.size)
    found["holdout"] = round(float(product(good).pow(3).mean().pow(1 / 3)), 4)
    masks = torch.stack([F.interpolate(item.gt_mask[None, None].float(), SIZE)[0, 0] > 0 for item in data.test_data])
    labels = torch.stack([item.gt_label.reshape(()) for item in data.test_data]).bool()
    test = levels(model, (item.image for item in data.test_data), args.size)
    found["heads"] = {name: measure(*head(test, good), masks, labels) for name, head in heads().items()}
    print(json.dumps(found, indent=1))
    return found


@torch.no_grad()
def settle(student: nn.Module, images: Tensor) -> None:
    """Replace BatchNorm's running statistics by their means over images (N, 3, H, W)."""
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches that follow
    for batch in images.split(16):
        student(batch.to(memory_format=torch.channels_last))


def image(pixels: Tensor, size: int) -> Tensor:
    """Resize and normalise an image (3, H, W) as the plugin does."""
    return normalize(resize(pixels[None], [size, size], antialias=True), list(IMAGENET_MEAN), list(IMAGENET_STD))


def turn(images: Tensor) -> Tensor:
    """Turn and mirror each image (B, 3, H, H) into one of its eight positions."""
    turned = [one.rot90(int(torch.randint(4, ())), (1, 2)) for one in images]
    return torch.stack([one.flip(2) if torch.rand(()) < 0.5 else one for one in turned])


def corrupt(images: Tensor, share: float) -> Tensor:
    """Lay blobs of coloured noise over some images (B, 3, H, W): the teacher's features stay those of clean ones."""
    images = images.clone()
    for place in torch.nonzero(torch.rand(len(images)) < share).flatten():
        coarse, fine = (2 ** int(torch.randint(low, high, ())) for low, high in ((2, 6), (2, 8)))
        blob = F.interpolate(torch.randn(1, 1, coarse, coarse), SIZE, mode="bicubic")[0]
        blob = (blob > blob.quantile(1 - 0.15 * torch.rand(()) - 0.01)) * (0.3 + 0.7 * torch.rand(()))
        noise = F.interpolate(1.5 * torch.randn(1, 3, fine, fine), SIZE, mode="bilinear")[0]
        images[place] = images[place] * (1 - blob) + noise * blob
    return images


@torch.no_grad()
def levels(model: STPMModel, images: Iterator[Tensor], size: int) -> Levels:
    """Return each level's distances (N, 1, H_l, W_l)."""
    found = [
        [level[:, None] for level in distances(model.teach(x), model.study(x))]
        for x in (image(one, size) for one in images)
    ]
    return [torch.cat(level) for level in zip(*found, strict=True)]


def product(distances: Levels, weights: tuple[float, ...] = (1, 1, 1)) -> Tensor:
    """Weighted geometric mean of the levels, (N, 1, 256, 256)."""
    logs = [F.interpolate(level, SIZE, mode="bilinear").clamp(min=1e-9).log() for level in distances]
    return (sum(w * log for w, log in zip(weights, logs, strict=True)) / sum(weights)).exp()


def rooted(distances: Levels, root: int) -> Tensor:
    """Geometric mean of the levels whose roots are upsampled instead of themselves; many for their logarithms."""
    parts = [F.interpolate(level.pow(1 / root), SIZE, mode="bilinear").pow(root / 3) for level in distances]
    return parts[0] * parts[1] * parts[2]


def power_mean(
    test: Levels, good: Levels, power: float, weights: tuple[float, ...] = (1, 1, 1), upsampled: float = 1
) -> Tensor:
    """Power mean of the levels over their held-out means, upsampled as another power; towards 0 the geometric mean."""
    relative = ((t / g.mean()).clamp(min=MIN_RELATIVE_DISTANCE) for t, g in zip(test, good, strict=True))
    parts = [F.interpolate(level.pow(upsampled), SIZE, mode="bilinear").pow(power / upsampled) for level in relative]
    return (sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)).pow(1 / power)


def heads() -> dict[str, Callable[[Levels, Levels], tuple[Tensor, Tensor]]]:
    """Ways from test and held-out levels to anomaly maps (N, 1, 256, 256) and image scores (N,)."""

    def scored(maps: Tensor, share: float = 0.0) -> tuple[Tensor, Tensor]:
        return maps, image_score(maps, share, 4)

    def cropped(maps: Tensor, margin: int) -> tuple[Tensor, Tensor]:
        return maps, image_score(maps[..., margin:-margin, margin:-margin], 0, 4)

    def by_position(test: Levels, good: Levels) -> Tensor:
        return product(test) / gaussian_blur(product(good).mean(0, keepdim=True), [65, 65], [8.0, 8.0])

    tried = {"geometric mean, maximum": lambda test, _: scored(product(test))}
    for share in (0.0003, 0.001, 0.003, 0.01):
        tried[f"score: highest {share:.2%}"] = lambda test, _, share=share: scored(product(test), share)
    for weights in ((1, 2, 2), (1, 1, 2), (2, 2, 1)):
        tried[f"level weights {weights}"] = lambda test, _, weights=weights: scored(product(test, weights))
    for sigma in (2.0, 4.0):
        size = [int(8 * sigma) + 1] * 2
        tried[f"smoothing, sigma {sigma:g}"] = lambda test, _, sigma=sigma, size=size: scored(
            gaussian_blur(product(test), size, [sigma, sigma])
        )
    tried["score without a margin of 8"] = lambda test, _: cropped(product(test), 8)
    tried["over held-out mean by position"] = lambda test, good: scored(by_position(test, good))
    for root in (3, 30):
        tried[f"roots upsampled, {root}th"] = lambda test, _, root=root: scored(rooted(test, root), 0.003)
    for power in (1.0, -0.5, -1.0):
        tried[f"power mean over held-out means, {power:g}"] = lambda test, good, power=power: scored(
            power_mean(test, good, power), 0.003
        )
    for weights, root in itertools.product([(1, 1, 1), (1, 2, 2), (1, 3, 2)], [1, 2]):
        name = f"harmonic mean, weights {weights}, upsampled as powers of -{root}"
        how = {"power": -1, "weights": weights, "upsampled": -root}
        tried[name] = lambda test, good, how=how: scored(power_mean(test, good, **how), 0.003)
    return tried


def measure(maps: Tensor, scores: Tensor, masks: Tensor, labels: Tensor) -> list[float]:
    """Image AUROC, pixel AUROC and PRO."""
    batch = SimpleNamespace(pred_score=scores, gt_label=labels, anomaly_map=maps[:, 0] / maps.max(), gt_mask=masks)
    metrics = [AUROC(fields=["pred_score", "gt_label"])]
    metrics += [metric(fields=["anomaly_map", "gt_mask"]) for metric in (AUROC, AUPRO)]
    for metric in metrics:
        metric.update(batch)
    return [round(metric.compute().item(), 4) for metric in metrics]


def table() -> None:
    """Write Markdown of what is kept: students first, then heads."""
    named = ["category", *USUAL, "held-out score", "s", "image AUROC", "pixel AUROC", "PRO"]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in named) + " |", "|---" * len(named) + "|"]
    for row in rows():
        cells = [row["category"], *({**USUAL, **row}[name] for name in USUAL), row["holdout"], row["seconds"]]
        lines.append("| " + " | ".join(map(str, [*cells, *row["heads"]["score: highest 0.30%"]])) + " |")
    lines.append(
        "\nHeads, of the same students (image AUROC / pixel AUROC / PRO); 12 passes, hard share 0.2, a twentieth held "
        "out, where nothing else is said:\n"
    )
    shown = [{**USUAL, **row} for row in rows() if "power mean over held-out means, -1" in row["heads"]]
    students = [
        ", ".join([row["category"], *(f"{k.replace('_', ' ')} {row[k]}" for k in MOST if row[k] != MOST[k])])
        for row in shown
    ]
    lines += [f"| head | {' | '.join(students)} |", "|---" * (len(shown) + 1) + "|"]
    for name in heads():
        cells = [" / ".join(f"{value:.4f}" for value in row["heads"].get(name, [])) for row in shown]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    RESULT.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
