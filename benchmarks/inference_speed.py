"""Time of STPM and others in OpenVINO, of the networks alone and from files to scores; accuracy of exports.

    python -m benchmarks.inference_speed light --root DIR --work WORK --teacher FILE     # networks alone, in turns
    python -m benchmarks.inference_speed files    --model MODEL.xml --images DIR/screw   # PNG and JPEG, 1 to 12 MP
    python -m benchmarks.inference_speed start-up --model MODEL.xml --images DIR/screw   # to the first score
    python -m benchmarks.inference_speed accuracy --model MODEL.xml --images DIR/screw   # of one export
    python -m benchmarks.inference_speed table                                           # from what is kept

`light`: DIR is MVTec AD's folder, FILE weights of torchvision's ResNet-18. WORK keeps the trained and exported models:
what is there is not trained again; `--passes 1` is enough for times. `files` and `start-up` compare `stpm score` with
anomalib's OpenVINOInferencer in a loop, in turns, each in a process of its own. Models for images at their own size
(`stpm train --recipe native`) are timed in the same way; `--results` keeps their rows apart. Rows are kept in
`results/inference_speed.json` and `results/scoring.json`, with those of measurements that were made once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import openvino as ov
import torch
from anomalib.data import MVTecAD
from anomalib.metrics import AUPRO, AUROC
from rich.progress import track
from torch.nn import functional as F

from benchmarks.environment import METRICS, Row, environment, fit, keep, markdown, parser, rows, spread, summary
from benchmarks.training_speed import BACKBONES, rival, use_hub
from stpm_plugin import STPM
from stpm_plugin.decoding import decode
from stpm_plugin.deployment.images import images_below
from stpm_plugin.deployment.scorer import Precision, Scorer

SIZE = (256, 256)
ROUNDS, TIMED = 5, 40  # calls of a variant in a round, after a fifth as many untimed
RIVALS = {"padim": "anomalib PaDiM", "patchcore": "anomalib PatchCore"}
SIDES = {"1 MP": (1024, 24), "4 MP": (2048, 16), "12 MP": (3464, 10)}  # pixels along a side, images
TURNS = 3  # of scoring files
SCORE = """
import pathlib, resource, sys, tempfile, time
from stpm_plugin.commands.entry import main
model, folder, *options = sys.argv[1:]
files = sorted(str(file) for file in pathlib.Path(folder).iterdir())
def score(images):
    with tempfile.TemporaryDirectory() as place:
        if main(["score", model, *images, "--csv", f"{place}/scores.csv", *options]):
            raise SystemExit(1)
def loop(images):
    for image in images:
        inferencer.predict(image)
if options == ["loop"]:
    from anomalib.deploy import OpenVINOInferencer
    inferencer, score = OpenVINOInferencer(model, config={"INFERENCE_PRECISION_HINT": "f32"}), loop
def seconds(images):
    wall, cpu = time.perf_counter(), time.process_time()
    score(images)
    return time.perf_counter() - wall, time.process_time() - cpu
seconds(files[:1])
for several, one in zip(seconds(files), seconds(files[:1])):
    print(1000 * (several - one) / (len(files) - 1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
INFER = "import sys; from anomalib.deploy import OpenVINOInferencer as I; I(sys.argv[1]).predict(sys.argv[2])"


def main() -> None:
    """Run one part, then tabulate."""
    options = parser(__doc__, ["light", "files", "start-up", "accuracy", "table"], "--root", "--category", "--teacher")
    options.add_argument("--work", type=Path, help="folder of the trained and exported models")
    options.add_argument("--passes", type=int, help="of STPM; by default those of its recipe")
    options.add_argument("--model", type=Path, help="exported model")
    options.add_argument("--images", type=Path, help="folder in MVTec AD's layout")
    options.add_argument("--precision", choices=["f32", "bf16"], default="f32", help="of what is not INT8")
    args = options.parse_args()
    networks, scores = args.results / "inference_speed.json", args.results / "scoring.json"
    where = {"openvino": ov.__version__.split("-")[0], "opencv": cv2.__version__}
    where |= environment(f"python -m benchmarks.inference_speed {args.part}")
    if args.part == "light":
        keep(networks, "light", light(args) | where)
    elif args.part == "accuracy":
        key = f"accuracy, {args.images.name}, {args.model.stem}, {args.precision}"
        keep(networks, key, accuracy(args.model, args.images, args.precision) | where)
    elif args.part != "table":
        originals = images_below(args.images.resolve() / "test")
        measured = (files if args.part == "files" else start_up)(str(args.model.resolve()), originals)
        for key, row in measured.items():
            keep(scores, key, row | where)
    print(score_table(rows(scores)))


def light(args: argparse.Namespace) -> Row:
    """Time the networks alone on a test image of their own size, one at a time in turns."""
    data = MVTecAD(root=args.root, category=args.category, num_workers=0, train_batch_size=8, eval_batch_size=8)
    data.setup()
    image = F.interpolate(data.test_data[0].image[None].float(), SIZE, mode="area").numpy()
    calls, milliseconds = {}, defaultdict(list)
    for name, (file, precision) in exported(args, data).items():
        model = ov.Core().read_model(file)
        batch = model.input(0).partial_shape[0]  # PatchCore's export by anomalib takes two images and no other number
        model.reshape([batch.get_length() if batch.is_static else 1, 3, *SIZE])
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        calls[name] = ov.compile_model(model, "CPU", options)
    for _ in track(range(ROUNDS), "rounds"):
        for name, call in calls.items():
            images = np.repeat(image, count := call.input(0).shape[0], 0)
            for number in range(-TIMED // 5, TIMED):
                start = time.perf_counter()
                call(images)
                if number >= 0:
                    milliseconds[name].append(1000 * (time.perf_counter() - start) / count)
    variants = {name: summary(found) for name, found in milliseconds.items()}
    return {"category": args.category, "passes": args.passes, "variants": variants}


def exported(args: argparse.Namespace, data: MVTecAD) -> dict[str, tuple[Path, str]]:
    """Train and export what WORK lacks; returns each way to run a model: its file, and the precision.

    Precisions are those of what is not INT8; bfloat16 only where the processor has it.
    """
    use_hub(args.teacher, args.work)
    ways: dict[str, tuple[Path, str]] = {}
    for name, backbone in BACKBONES.items():
        folder = args.work / args.category / name
        checkpoint = folder / "model.ckpt"
        if not checkpoint.exists():
            weights = str(args.teacher) if name == "resnet18" else name
            length = {"epochs": args.passes, "steps": None} if args.passes else {}
            student = STPM(backbone=backbone, teacher_weights=weights, seed=0, visualizer=False, **length)
            fit(student, data, folder, accelerator="cpu")[0].trainer.save_checkpoint(checkpoint)
        for kind, compression in (("float32", None), ("INT8", "int8_ptq")):
            target = folder / f"{kind}, {SIZE[0]}"
            if not any(target.rglob("model*.xml")):
                student = STPM.load_from_checkpoint(checkpoint, map_location="cpu").eval()
                student.to_openvino(target, input_size=SIZE, compression_type=compression, datamodule=data)
            ways[f"{name}, {kind}"] = next(target.rglob("model*.xml")), "f32"
    for name, known in RIVALS.items():
        folder = args.work / args.category / name
        if not any(folder.rglob("model.xml")):
            model = rival(known)
            fit(model, data, folder / "fit", accelerator="cpu", max_epochs=1)
            model.to_openvino(folder)
        ways[name] = next(folder.rglob("model.xml")), "f32"
    there = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ways | ({f"{name}, bfloat16": (file, "bf16") for name, (file, _) in ways.items()} if there else {})


def accuracy(model: Path, category: Path, precision: Precision) -> Row:
    """Metrics of an export's verdicts on a category's test images; masks take the maps' size."""
    data = MVTecAD(root=category.resolve().parent, category=category.name, num_workers=0)
    data.setup()
    fields = [["pred_score", "gt_label"], *[["anomaly_map", "gt_mask"]] * 2]
    metrics = [metric(fields=one) for metric, one in zip((AUROC, AUROC, AUPRO), fields, strict=True)]
    scorer = Scorer(model, precision=precision)
    for item in track(data.test_data, model.stem):
        (made,) = scorer.score([item.image_path], maps=True)
        seen = torch.from_numpy(made.anomaly_map)[None]
        mask = F.interpolate(item.gt_mask.reshape(1, 1, *item.gt_mask.shape[-2:]).float(), seen.shape[-2:])[0].bool()
        given = {"pred_score": torch.tensor([made.score]), "gt_label": item.gt_label.reshape(1)}
        for metric in metrics:
            metric.update(SimpleNamespace(image=None, anomaly_map=seen, gt_mask=mask, **given))
    return {name: round(float(metric.compute()), 4) for name, metric in zip(METRICS, metrics, strict=True)}


def python(*arguments: str) -> str:
    """Run Python in a folder of its own, with this version of the package; returns what it prints."""
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", *arguments]
        return subprocess.run(command, env=where, cwd=folder, capture_output=True, text=True, check=True).stdout


def photograph(path: str, side: int) -> np.ndarray:
    """A test image at another size, with a camera's noise of two grey levels, without which it is too smooth."""
    rng = np.random.default_rng(side)
    image = cv2.resize(decode(path), (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + rng.normal(0, 2, image.shape), 0, 255).round().astype(np.uint8)


def files(model: str, originals: list[str]) -> dict[str, Row]:
    """Milliseconds per image from files to scores, start-up left out, in turns; and of all cores' time."""
    found: dict[str, Row] = {}
    for name, (side, count) in SIDES.items():
        for kind, quality in (("png", []), ("jpg", [cv2.IMWRITE_JPEG_QUALITY, 95])):
            ways = {"score": [], "OpenVINOInferencer in a loop": ["loop"]}
            if kind == "jpg":
                ways["score, reduced decode"] = ["--reduced-decode"]
            with tempfile.TemporaryDirectory() as folder:
                taken = originals[:: max(1, len(originals) // (count + 1))][: count + 1]
                for number, path in enumerate(taken):
                    cv2.imwrite(f"{folder}/{number}.{kind}", photograph(path, side), quality)
                spent: dict[str, list[list[float]]] = defaultdict(list)  # of each round, by the clock and of the cores
                peaks: dict[str, float] = {}
                for _ in range(TURNS):
                    for way, options in ways.items():
                        said = python("-c", SCORE, model, folder, *options).split()[-3:]
                        *milliseconds, peaks[way] = (round(float(figure), 1) for figure in said)
                        spent[way].append(milliseconds)
            found[f"files, {name}, {kind}"] = {"milliseconds": spent, "images": len(taken) - 1, "peak_mib": peaks}
    return found


def start_up(model: str, originals: list[str]) -> dict[str, Row]:
    """Seconds from a fresh process to the first score; the first of each only fills the disk's cache."""
    ways = {"score": ["-m", "stpm_plugin.commands", "score"], "OpenVINOInferencer": ["-c", INFER]}
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(TURNS + 1):
        for way, arguments in ways.items():
            begin = time.perf_counter()
            python(*arguments, model, originals[0])
            if turn:
                seconds[way].append(round(time.perf_counter() - begin, 2))
    return {"start-up": {"seconds": seconds}}


def score_table(kept: dict[str, Row]) -> str:
    """Mean and deviation of the rounds, by the clock; of all cores' time."""
    timed = {key.removeprefix("files, "): row["milliseconds"] for key, row in kept.items() if key.startswith("files")}
    ways = sorted({way for row in timed.values() for way in row})
    lines = [["ms an image", *ways]]
    for key, row in timed.items():
        cells = ["; ".join(spread(part, 0) for part in zip(*row.get(way, []), strict=True)) for way in ways]
        lines.append([key, *cells])
    return markdown(lines)


if __name__ == "__main__":
    main()
