"""Latency, throughput, size and accuracy of STPM and others in OpenVINO.

    python -m benchmarks.inference_speed light    --root DIR --work WORK --teacher FILE  # time in turns, network only
    python -m benchmarks.inference_speed accuracy --root DIR --work WORK --teacher FILE  # on the official test split
    python -m benchmarks.inference_speed table                                           # from what is kept

DIR is MVTec AD's folder, FILE weights of torchvision's ResNet-18. WORK keeps the trained and exported models: what is
there is not trained again; `--passes 1` is enough for times. Rows are kept in `results/inference_speed.json`; some are
of variants and of measurements that were made once. Start-up and files: `scoring_speed.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC
from anomalib.models import Padim, Patchcore, Stfpm
from rich.progress import track
from torch.nn import functional as F

from benchmarks.environment import environment, keep, markdown, rows
from benchmarks.training_speed import BACKBONES, use_hub
from stpm_plugin import STPM

RESULT = Path(__file__).parent / "results" / "inference_speed.json"
SIZE = (256, 256)
ROUNDS, TIMED = 5, 40  # calls of a variant in a round, after a fifth as many untimed
STUDENTS = {  # exported file, precision of what is not INT8
    "float32": ("float32", "f32"),
    "bfloat16": ("float32", "bf16"),
    "INT8": ("INT8", "f32"),
    "INT8, rest bfloat16": ("INT8", "bf16"),
}
OTHERS = {  # passes of Stfpm's 100 for a time; a tenth of PatchCore's usual coreset
    "stfpm": (Stfpm, {}, 2),
    "padim": (Padim, {"backbone": "resnet18", "layers": ["layer1", "layer2", "layer3"]}, 1),
    "patchcore": (Patchcore, {"backbone": "resnet18", "coreset_sampling_ratio": 0.01}, 1),
}
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")


def main() -> None:
    """Run one part, then tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["light", "accuracy", "table"])
    parser.add_argument("--root", type=Path, help="MVTec AD's folder")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--work", type=Path, help="folder of the trained and exported models")
    parser.add_argument("--teacher", type=Path, help="weights of torchvision's ResNet-18")
    parser.add_argument("--passes", type=int, help="of STPM; by default those of its recipe")
    parser.add_argument("--results", type=Path, default=RESULT, help="file of what is kept")
    args = parser.parse_args()
    if args.part != "table":
        data = MVTecAD(root=args.root, category=args.category, num_workers=0, train_batch_size=8, eval_batch_size=8)
        row = {"category": args.category, "passes": args.passes}
        if args.part == "light":
            key, row = "light", row | timed(variants(exported(args, data, SIZE)), data)
        else:
            key, row = f"accuracy, {args.category}", row | accuracy(variants(exported(args, data, None)), data)
        where = environment(f"python -m benchmarks.inference_speed {args.part}")
        keep(args.results, key, row | {"openvino": ov.__version__.split("-")[0]} | where)
    print(table(rows(args.results)))


def exported(args: argparse.Namespace, data: MVTecAD, size: tuple[int, int] | None) -> dict[str, Path]:
    """Train and export what WORK lacks; STPM for images of a size, or of any. Returns the files by their names."""
    use_hub(args.teacher, args.work)
    files: dict[str, Path] = {}
    for name, backbone in BACKBONES.items():
        folder = args.work / args.category / name
        checkpoint = folder / "model.ckpt"
        if not checkpoint.exists():
            weights = str(args.teacher) if name == "resnet18" else name
            length = {"epochs": args.passes, "steps": None} if args.passes else {}
            student = STPM(backbone=backbone, teacher_weights=weights, seed=0, visualizer=False, **length)
            engine = Engine(accelerator="cpu", logger=False, default_root_dir=folder)
            engine.fit(student, datamodule=data)
            engine.trainer.save_checkpoint(checkpoint)
        for kind, compression in (("float32", None), ("INT8", "int8_ptq")):
            target = folder / f"{kind}, {'any size' if size is None else size[0]}"
            if not any(target.rglob("model*.xml")):
                student = STPM.load_from_checkpoint(checkpoint, map_location="cpu").eval()
                student.to_openvino(target, input_size=size, compression_type=compression, datamodule=data)
            files[f"{name}, {kind}"] = next(target.rglob("model*.xml"))
    for name, (model_class, arguments, passes) in OTHERS.items():
        folder = args.work / args.category / name
        if not any(folder.rglob("model.xml")):
            model = model_class(**arguments)
            engine = Engine(max_epochs=passes, accelerator="cpu", logger=False, default_root_dir=folder / "fit")
            engine.fit(model, datamodule=data)
            model.to_openvino(folder)
        files[name] = next(folder.rglob("model.xml"))
    return files


def variants(files: dict[str, Path]) -> dict[str, tuple[Path, str]]:
    """Name each way to run a model: its file, and the precision; bfloat16 where the processor has it."""
    there = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    found = {}
    for backbone in BACKBONES:
        for kind, (file, precision) in STUDENTS.items():
            if precision == "f32" or there:
                found[f"{backbone}, {kind}"] = files[f"{backbone}, {file}"], precision
    for name in OTHERS:
        found[name] = files[name], "f32"
        if there:
            found[f"{name}, bfloat16"] = files[name], "bf16"
    return found


def timed(models: dict[str, tuple[Path, str]], data: MVTecAD) -> dict[str, Any]:
    """Time the networks alone on a test image of their own size: one at a time in turns, then as many as go."""
    data.setup()
    image = F.interpolate(data.test_data[0].image[None].float(), SIZE, mode="area").numpy()
    calls = {name: compiled(*model, "LATENCY") for name, model in models.items()}
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in track(range(ROUNDS), "rounds"):
        for name, call in calls.items():
            images = np.repeat(image, count := call.input(0).shape[0], 0)
            for number in range(-TIMED // 5, TIMED):
                start = time.perf_counter()
                call(images)
                if number >= 0:
                    seconds[name].append(1000 * (time.perf_counter() - start) / count)
    found: dict[str, dict[str, float]] = {}
    for name, (file, precision) in models.items():
        milliseconds = seconds[name]
        found[name] = {
            "p50_ms": round(median(milliseconds), 2),
            "p95_ms": round(float(np.percentile(milliseconds, 95)), 2),
            "mean_ms": round(mean(milliseconds), 2),
            "sd_ms": round(stdev(milliseconds), 2),
            "images_a_call": calls[name].input(0).shape[0],
            "images_per_second": round(throughput(compiled(file, precision, "THROUGHPUT"), image), 1),
            "megabytes": round((file.stat().st_size + file.with_suffix(".bin").stat().st_size) / 1e6, 1),
        }
        print(name, json.dumps(found[name]), flush=True)
    return {"variants": found, "calls": ROUNDS * TIMED}


def compiled(path: Path, precision: str, hint: str) -> ov.CompiledModel:
    """Compile a model for one image of the network's size."""
    model = ov.Core().read_model(path)
    model.reshape([images_a_call(model), 3, *SIZE])
    return ov.compile_model(model, "CPU", {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": precision})


def images_a_call(model: ov.Model) -> int:
    """Images that a model wants at a time: PatchCore's export by anomalib takes two and no other number."""
    batch = model.input(0).partial_shape[0]
    return batch.get_length() if batch.is_static else 1


def throughput(model: ov.CompiledModel, image: np.ndarray, seconds: float = 6.0) -> float:
    """Return images a second with as many requests at a time as OpenVINO advises."""
    count = model.input(0).shape[0]
    queue, done = ov.AsyncInferQueue(model), 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        queue.start_async({0: np.repeat(image, count, 0)})
        done += count
    queue.wait_all()
    return done / (time.perf_counter() - start)


def accuracy(models: dict[str, tuple[Path, str]], data: MVTecAD) -> dict[str, Any]:
    """Metrics of each variant on the test images, and the share of STPM's labels that are its float32 export's."""
    data.setup()
    found: dict[str, dict[str, float]] = {}
    labels: dict[str, list[bool]] = defaultdict(list)
    for name, (file, precision) in models.items():
        if name.startswith("stfpm"):  # of too few passes
            continue
        model = ov.Core().read_model(file)
        call, count = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision}), images_a_call(model)
        fields = [["pred_score", "gt_label"], ["anomaly_map", "gt_mask"], ["anomaly_map", "gt_mask"]]
        metrics = [metric(fields=one) for metric, one in zip((AUROC, AUROC, AUPRO), fields, strict=True)]
        for item in track(data.test_data, name):
            answer = call(np.repeat(item.image[None].float().numpy(), count, 0))
            score, anomaly_map = (torch.tensor(answer[key][:1]).float() for key in ("pred_score", "anomaly_map"))
            anomaly_map = anomaly_map.reshape(1, *anomaly_map.shape[-2:])
            mask = F.interpolate(item.gt_mask[None, None].float(), anomaly_map.shape[-2:], mode="nearest")[0].bool()
            batch = SimpleNamespace(
                pred_score=score.reshape(1), gt_label=item.gt_label.reshape(1), anomaly_map=anomaly_map, gt_mask=mask
            )
            for metric in metrics:
                metric.update(batch)
            labels[name].append(bool(answer["pred_label"].flat[0]))
        found[name] = {key: round(metric.compute().item(), 4) for key, metric in zip(METRICS, metrics, strict=True)}
        exact = labels.get(f"{name.split(', ')[0]}, float32")
        if exact:
            found[name]["equal_labels"] = round(float(np.equal(labels[name], exact).mean()), 4)
    return found


def table(kept: dict[str, Any]) -> str:
    """A table of each row of times and of accuracy that is kept."""
    tables = []
    for key, row in kept.items():
        found = row.get("variants") or (row if key.startswith("accuracy") else {})
        found = {name: values for name, values in found.items() if isinstance(values, dict) and name != "versions"}
        columns = list(
            dict.fromkeys(column for values in found.values() for column in values if column != "medians_ms")
        )
        if found:
            lines = [[name, *(values.get(column, "") for column in columns)] for name, values in found.items()]
            tables.append(f"{key}, {row['date']}, {row['machine']}:\n\n{markdown([['', *columns], *lines])}\n")
    return "\n".join(tables)


if __name__ == "__main__":
    main()
