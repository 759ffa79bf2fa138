"""Latency and accuracy of STPM and others in OpenVINO.

    python -m benchmarks.inference_speed light    --root DIR --work WORK --teacher FILE  # time in turns, network only
    python -m benchmarks.inference_speed accuracy --root DIR --work WORK --teacher FILE  # on the official test split
    python -m benchmarks.inference_speed table                                           # from what is kept

DIR is MVTec AD's folder, FILE weights of torchvision's ResNet-18. WORK keeps the trained and exported models: what is
there is not trained again; `--passes 1` is enough for times. Rows are kept in `results/inference_speed.json`; some are
of variants and of measurements that were made once. Images a second: OpenVINO's `benchmark_app -m MODEL.xml -hint
throughput`. Start-up and files: `scoring_speed.py`.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from anomalib.data import MVTecAD
from anomalib.metrics import AUPRO, AUROC
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from benchmarks.environment import METRICS, Row, environment, fit, keep, markdown, parser, rows, summary
from benchmarks.large_images import Case, judged
from benchmarks.training_speed import BACKBONES, rival, use_hub
from stpm_plugin import STPM

SIZE = (256, 256)
ROUNDS, TIMED = 5, 40  # calls of a variant in a round, after a fifth as many untimed
STUDENTS = {  # exported file, precision of what is not INT8
    "float32": ("float32", "f32"),
    "bfloat16": ("float32", "bf16"),
    "INT8": ("INT8", "f32"),
    "INT8, rest bfloat16": ("INT8", "bf16"),
}
OTHERS = {"padim": "anomalib PaDiM", "patchcore": "anomalib PatchCore"}
Variants = dict[str, tuple[Path, str]]  # a file, and the precision to run it in


def main() -> None:
    """Run one part, then tabulate."""
    options = parser(__doc__, ["light", "accuracy", "table"], "--root", "--category", "--teacher")
    options.add_argument("--work", type=Path, help="folder of the trained and exported models")
    options.add_argument("--passes", type=int, help="of STPM; by default those of its recipe")
    args = options.parse_args()
    file = args.results / "inference_speed.json"
    if args.part != "table":
        data = MVTecAD(root=args.root, category=args.category, num_workers=0, train_batch_size=8, eval_batch_size=8)
        data.setup()
        light = args.part == "light"
        models = variants(exported(args, data, SIZE if light else None))
        row = {"category": args.category, "passes": args.passes} | (timed if light else accuracy)(models, data)
        row |= {"openvino": ov.__version__.split("-")[0]} | environment(
            f"python -m benchmarks.inference_speed {args.part}"
        )
        keep(file, "light" if light else f"accuracy, {args.category}", row)
    print(table(rows(file)))


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
            fit(student, data, folder, accelerator="cpu")[0].trainer.save_checkpoint(checkpoint)
        for kind, compression in (("float32", None), ("INT8", "int8_ptq")):
            target = folder / f"{kind}, {'any size' if size is None else size[0]}"
            if not any(target.rglob("model*.xml")):
                student = STPM.load_from_checkpoint(checkpoint, map_location="cpu").eval()
                student.to_openvino(target, input_size=size, compression_type=compression, datamodule=data)
            files[f"{name}, {kind}"] = next(target.rglob("model*.xml"))
    for name, known in OTHERS.items():
        folder = args.work / args.category / name
        if not any(folder.rglob("model.xml")):
            model = rival(known)
            fit(model, data, folder / "fit", accelerator="cpu", max_epochs=1)
            model.to_openvino(folder)
        files[name] = next(folder.rglob("model.xml"))
    return files


def variants(files: dict[str, Path]) -> Variants:
    """Name each way to run a model: its file, and the precision; bfloat16 where the processor has it."""
    found = {
        f"{backbone}, {kind}": (files[f"{backbone}, {file}"], precision)
        for backbone in BACKBONES
        for kind, (file, precision) in STUDENTS.items()
    }
    for name in OTHERS:
        found |= {name: (files[name], "f32"), f"{name}, bfloat16": (files[name], "bf16")}
    there = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {name: way for name, way in found.items() if there or way[1] == "f32"}


def images_a_call(model: ov.Model) -> int:
    """Images that a model wants at a time: PatchCore's export by anomalib takes two and no other number."""
    batch = model.input(0).partial_shape[0]
    return batch.get_length() if batch.is_static else 1


def timed(models: Variants, data: MVTecAD) -> Row:
    """Time the networks alone on a test image of their own size, one at a time in turns."""
    image = F.interpolate(data.test_data[0].image[None].float(), SIZE, mode="area").numpy()
    calls, milliseconds = {}, defaultdict(list)
    for name, (file, precision) in models.items():
        model = ov.Core().read_model(file)
        model.reshape([images_a_call(model), 3, *SIZE])
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
    return {"variants": {name: summary(found) for name, found in milliseconds.items()}}


def accuracy(models: Variants, data: MVTecAD) -> Row:
    """Metrics of each variant on the test images, and the share of STPM's labels that are its float32 export's."""
    found: Row = {}
    labels: dict[str, list[bool]] = defaultdict(list)

    def cases(name: str, call: ov.CompiledModel, count: int) -> Iterator[Case]:
        for item in track(data.test_data, name):
            answer = call(np.repeat(item.image[None].float().numpy(), count, 0))
            labels[name].append(bool(answer["pred_label"].flat[0]))
            score, anomaly_map = (torch.tensor(answer[key][:1]).float() for key in ("pred_score", "anomaly_map"))
            anomaly_map = anomaly_map.reshape(1, *anomaly_map.shape[-2:])
            mask: Tensor = F.interpolate(item.gt_mask[None, None].float(), anomaly_map.shape[-2:], mode="nearest")[0]
            yield Case(score.reshape(1), anomaly_map, item.gt_label.reshape(1), mask.bool())

    for name, (file, precision) in models.items():
        model = ov.Core().read_model(file)
        call = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        fields = [["pred_score", "gt_label"], ["anomaly_map", "gt_mask"], ["anomaly_map", "gt_mask"]]
        metrics = [metric(fields=one) for metric, one in zip((AUROC, AUROC, AUPRO), fields, strict=True)]
        found[name] = judged(cases(name, call, images_a_call(model)), dict(zip(METRICS, metrics, strict=True)))
        if exact := labels.get(f"{name.split(', ')[0]}, float32"):
            found[name]["equal_labels"] = round(float(np.equal(labels[name], exact).mean()), 4)
    return found


def table(kept: dict[str, Row]) -> str:
    """A table of each row of times and of accuracy that is kept."""
    tables = []
    for key, row in kept.items():
        found = row.get("variants") or (row if key.startswith("accuracy") else {})
        found = {name: values for name, values in found.items() if isinstance(values, dict) and name != "versions"}
        columns = [*dict.fromkeys(name for values in found.values() for name in values if name != "medians_ms")]
        if found:
            lines = [[name, *(values.get(column, "") for column in columns)] for name, values in found.items()]
            tables.append(f"{key}, {row['date']}, {row['machine']}:\n\n{markdown([['', *columns], *lines])}\n")
    return "\n".join(tables)


if __name__ == "__main__":
    main()
