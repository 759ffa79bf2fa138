"""Latency, throughput, accuracy and size of STPM and others as they are deployed.

    python -m benchmarks.inference_speed models --root DIR --work WORK --checkpoints DIR --teacher FILE
    python -m benchmarks.inference_speed network --root DIR --work WORK    # network only, in turns, and start-up
    python -m benchmarks.inference_speed accuracy --root DIR --work WORK   # of each on the official test split
    python -m benchmarks.inference_speed files --root DIR --work WORK      # 1024 x 1024 PNGs to scores; memory
    python -m benchmarks.inference_speed bound --work WORK                 # where INT8's time goes, beside the peak
    python -m benchmarks.inference_speed light --root DIR --work WORK --teacher FILE   # both backbones, and others
    python -m benchmarks.inference_speed plot                              # redraw and tabulate what is kept

Rows are written to `results/inference_speed.json` as they come. WORK keeps the exported models. STPM's checkpoints are
those of `benchmarks.accuracy run --checkpoints`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import openvino as ov
import psutil
import torch
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC
from anomalib.models import AnomalibModule, Padim, Patchcore, Stfpm
from huggingface_hub import constants
from rich.progress import track
from torch.nn import functional as F

from benchmarks.environment import environment
from benchmarks.training_speed import hub
from stpm_plugin import STPM

RESULT = Path(__file__).parent / "results" / "inference_speed.json"
CATEGORIES = ("screw", "bottle")
SIZE = (256, 256)
ROUNDS, TIMED = 5, 40  # calls of a variant in a round, after a fifth as many untimed
FLOAT32, BFLOAT16 = ({"INFERENCE_PRECISION_HINT": name} for name in ("f32", "bf16"))
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {  # exported file, OpenVINO's options
    "eager": ("", {}),
    "eager, channels-last": ("", {}),
    "ONNX Runtime": ("stpm/weights/onnx/model.onnx", {}),
    "OpenVINO FP32": ("stpm/weights/openvino/model.xml", FLOAT32),
    "OpenVINO FP32, plain head": ("stpm-plain/weights/openvino/model.xml", FLOAT32),
    "OpenVINO bf16": ("stpm/weights/openvino/model.xml", BFLOAT16),
    "OpenVINO FP16 file, bf16": ("stpm-fp16/weights/openvino/model_fp16.xml", BFLOAT16),
    "OpenVINO INT8, rest float32": ("stpm-int8/weights/openvino/model_int8_ptq.xml", FLOAT32),
    "OpenVINO INT8, rest bf16": ("stpm-int8/weights/openvino/model_int8_ptq.xml", BFLOAT16),
    "OpenVINO INT8 as anomalib does it": ("stpm-plain-int8/weights/openvino/model.xml", {}),
    "anomalib Stfpm after 2 passes, OpenVINO": ("stfpm/weights/openvino/model.xml", {}),
    "anomalib PaDiM, OpenVINO": ("padim/weights/openvino/model.xml", {}),
    "anomalib PatchCore, coreset 0.1 %, OpenVINO": ("patchcore/weights/openvino/model.xml", {}),
}
OTHERS = {  # their accuracy as trained here: two passes of Stfpm; a hundredth of PatchCore's usual memory bank
    "stfpm": (Stfpm, {}, 2),
    "padim": (Padim, {"backbone": "resnet18", "layers": ["layer1", "layer2", "layer3"]}, 1),
    "patchcore": (Patchcore, {"backbone": "resnet18", "coreset_sampling_ratio": 0.001}, 1),
}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["models", "network", "accuracy", "files", "bound", "light", "plot"])
    parser.add_argument("--root", type=Path, help="MVTec AD's folder")
    parser.add_argument("--work", type=Path, help="folder of the exported models")
    parser.add_argument("--teacher", type=Path, help="weights of torchvision's ResNet-18")
    parser.add_argument("--checkpoints", type=Path, help="folder of STPM-CATEGORY-seed-N.ckpt")
    parser.add_argument("--seed", type=int, default=0, help="which of the checkpoints")
    args = parser.parse_args()
    if args.part == "models":
        for category in CATEGORIES:
            export(args, category)
            export_others(args, category)
    elif args.part == "network":
        save("network", network(args.work / "screw-fixed", datamodule(args.root, "screw")))
        save("start-up", start_up(args.work / "screw", next((args.root / "screw/test/good").glob("*.png"))))
    elif args.part == "accuracy":
        for category in CATEGORIES:
            save(f"accuracy, {category}, seed {args.seed}", accuracy(args, category))
    elif args.part == "files":
        files(args)
    elif args.part == "bound":
        save("bound", bound(args.work / "screw-fixed" / VARIANTS["OpenVINO INT8, rest bf16"][0]))
    elif args.part == "light":
        save("light", light(args))
    report(rows())


def rows() -> dict[str, Any]:
    """Return what is kept."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else {}


def save(key: str, row: dict[str, Any]) -> None:
    """Keep a row."""
    where = environment("python -m benchmarks.inference_speed") | {"openvino": ov.__version__.split("-")[0]}
    RESULT.write_text(json.dumps({**rows(), key: row | where}, indent=1))
    print(key, json.dumps(row), flush=True)


def datamodule(root: Path, category: str) -> MVTecAD:
    """Return a category, read in this process."""
    return MVTecAD(root=root, category=category, num_workers=0, train_batch_size=8, eval_batch_size=8)


def checkpoint(args: argparse.Namespace, category: str) -> Path:
    """Return STPM's checkpoint of a category."""
    return args.checkpoints / f"STPM-{category}-seed-{args.seed}.ckpt"


def export(args: argparse.Namespace, category: str) -> None:
    """Export all models of a category, for images of any size and, for timing, of the network's own."""
    data = datamodule(args.root, category)
    for name, size in [(category, None), (f"{category}-fixed", SIZE)]:
        folder = args.work / name
        stpm = STPM.load_from_checkpoint(checkpoint(args, category), map_location="cpu").eval()
        stpm.to_onnx(folder / "stpm", input_size=size)
        stpm.to_openvino(folder / "stpm", input_size=size)
        for target, compression in [("stpm-fp16", "fp16"), ("stpm-int8", "int8_ptq")]:
            stpm.to_openvino(folder / target, input_size=size, compression_type=compression, datamodule=data)
        torch.save(stpm.state_dict(), folder / "stpm.pt")
        stpm.model.score_area = 0  # the map's maximum
        stpm.to_openvino(folder / "stpm-plain", input_size=size)
    stpm = STPM.load_from_checkpoint(checkpoint(args, category), map_location="cpu").eval()
    plain = args.work / category / "stpm-plain-int8"
    AnomalibModule.to_openvino(stpm, plain, compression_type="int8_ptq", datamodule=data)


def export_others(args: argparse.Namespace, category: str) -> None:
    """Train anomalib's models on a category with the same weights, and export them as anomalib does."""
    constants.HF_HUB_CACHE = f"{hub(args.teacher, args.work)['HF_HOME']}/hub"
    for name, (model_class, arguments, epochs) in OTHERS.items():
        target = args.work / category / name
        if not target.exists():
            model, data = model_class(**arguments), datamodule(args.root, category)
            Engine(max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=target).fit(model, data)
            model.to_openvino(target)


def fixed(path: Path) -> ov.Model:
    """Read a model for one image of the network's size."""
    fixed_path = path if path.exists() else Path(str(path).replace("-fixed", ""))
    model = ov.Core().read_model(fixed_path)
    model.reshape([images_a_call(model), 3, *SIZE])
    return model


def images_a_call(model: ov.Model) -> int:
    """Images that a model wants at a time: PatchCore's export by anomalib takes two and no other number."""
    batch = model.input(0).partial_shape[0]
    return batch.get_length() if batch.is_static else 1


def callers(folder: Path) -> dict[str, Callable[[np.ndarray], Any]]:
    """Load each variant as a function of one image (1, 3, 256, 256)."""
    import onnxruntime

    def eager(channels_last: bool) -> Callable[[np.ndarray], Any]:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = STPM(backbone="resnet18").eval()
        model.model.load_state_dict(
            {name.removeprefix("model."): t for name, t in torch.load(folder / "stpm.pt").items() if "model." in name}
        )
        model.model.to(memory_format=layout)

        def call(image: np.ndarray) -> Any:
            with torch.inference_mode():
                return model.model(torch.from_numpy(image).contiguous(memory_format=layout))

        return call

    found: dict[str, Callable[[np.ndarray], Any]] = {}
    for name, (file, options) in VARIANTS.items():
        if not file:
            found[name] = eager("channels-last" in name)
        elif file.endswith(".onnx"):
            session = onnxruntime.InferenceSession(folder / file)
            found[name] = lambda image, session=session: session.run(None, {"input": image})
        else:
            try:
                model = fixed(folder / file)
                compiled = ov.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **options})
                count = model.input(0).shape[0]
                found[name] = lambda image, run=compiled, count=count: run(np.repeat(image, count, 0))
            except RuntimeError as error:
                print(f"{name} cannot be compiled: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
    return found


def network(folder: Path, data: AnomalibDataModule) -> dict[str, Any]:
    """Time the networks alone on images of their own size: one at a time in turns, then as many as go."""
    data.setup()
    images = [
        F.interpolate(data.test_data[place].image[None].float(), SIZE, mode="area").numpy()
        for place in range(0, len(data.test_data), 10)
    ]
    seconds: dict[str, list[list[float]]] = defaultdict(list)
    calls = callers(folder)
    for _ in track(range(ROUNDS), "rounds"):
        for name, call in calls.items():
            for place in range(TIMED // 5):
                call(images[place % len(images)])
            timed = []
            for place in range(TIMED):
                start = time.perf_counter()
                call(images[place % len(images)])
                timed.append(time.perf_counter() - start)
            seconds[name].append(timed)
    found: dict[str, Any] = {}
    for name, timed in seconds.items():
        flat = 1000 * np.array([second for one in timed for second in one])
        found[name] = {f"p{q}_ms": round(float(np.percentile(flat, q)), 2) for q in (50, 95, 99)}
        found[name]["medians_ms"] = [round(1000 * median(one), 2) for one in timed]
        file, options = VARIANTS[name]
        if file.endswith(".xml"):
            model = fixed(folder / file)
            found[name]["images_a_call"] = model.input(0).shape[0]
            found[name]["images_per_second"] = round(throughput(model, options, images), 1)
            path = folder / file if (folder / file).exists() else Path(str(folder / file).replace("-fixed", ""))
            found[name]["megabytes"] = round((path.stat().st_size + path.with_suffix(".bin").stat().st_size) / 1e6, 1)
    return {"variants": found, "calls": ROUNDS * TIMED}


def light(args: argparse.Namespace) -> dict[str, Any]:
    """Time both backbones, in float and INT8, PaDiM and PatchCore in turns, after a pass over bottle's images."""
    calls, data = {}, datamodule(args.root, "bottle")
    options = {"PERFORMANCE_HINT": "LATENCY", **FLOAT32}
    backbones = {"resnet18": ("resnet18.tv_in1k", str(args.teacher)), "lite0": ("tf_efficientnet_lite0.in1k", "lite0")}
    for name, (backbone, teacher) in backbones.items():
        model = STPM(backbone=backbone, teacher_weights=teacher, epochs=1, steps=None, seed=0, visualizer=False)
        engine = Engine(accelerator="cpu", logger=False, default_root_dir=args.work / name, enable_progress_bar=False)
        engine.fit(model, datamodule=data)
        for kind, compression in (("float32", None), ("INT8", "int8_ptq")):
            path = model.to_openvino(args.work / name, input_size=SIZE, compression_type=compression, datamodule=data)
            calls[f"{name}, {kind}"] = ov.compile_model(fixed(path), "CPU", options)
    constants.HF_HUB_CACHE = f"{hub(args.teacher, args.work)['HF_HOME']}/hub"
    for name, (model_class, arguments, passes) in OTHERS.items():
        if name != "stfpm":  # the same networks as STPM's
            model = model_class(**arguments | ({"coreset_sampling_ratio": 0.01} if name == "patchcore" else {}))
            engine = Engine(max_epochs=passes, accelerator="cpu", logger=False, default_root_dir=args.work / name)
            engine.fit(model, data)
            calls[name] = ov.compile_model(fixed(model.to_openvino(args.work / name)), "CPU", options)
    image = data.test_data[0].image[None].float()
    pixels = F.interpolate(image, SIZE, mode="area").numpy()
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            for timed in range(-TIMED // 5, TIMED):
                start = time.perf_counter()
                count = call.input(0).shape[0]  # two for PatchCore
                call(np.repeat(pixels, count, 0))
                if timed >= 0:
                    seconds[name].append(1000 * (time.perf_counter() - start) / count)
    return {
        "variants": {
            name: {"p50_ms": round(median(found), 2), "mean_ms": round(mean(found), 2), "sd_ms": round(stdev(found), 2)}
            for name, found in seconds.items()
        },
        "calls": ROUNDS * TIMED,
    }


def throughput(model: ov.Model, options: dict[str, str], images: list[np.ndarray], seconds: float = 6.0) -> float:
    """Return images a second with as many requests at a time as OpenVINO advises."""
    compiled = ov.compile_model(model, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT", **options})
    count = model.input(0).shape[0]
    images = [np.repeat(image, count, 0) for image in images]
    requests = [
        compiled.create_infer_request() for _ in range(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
    ]
    for request in requests:
        request.start_async({0: images[0]})
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        request = requests[done % len(requests)]
        request.wait()
        request.start_async({0: images[done % len(images)]})
        done += 1
    elapsed = time.perf_counter() - start
    for request in requests:
        request.wait()
    return done * count / elapsed


def start_up(folder: Path, image: Path) -> dict[str, Any]:
    """Seconds from a fresh process to the first score, with `score` and with anomalib's inferencer."""
    model = folder / VARIANTS["OpenVINO FP32"][0]
    load = f"from anomalib.deploy import OpenVINOInferencer as I; I({str(model)!r}).predict({str(image)!r})"
    commands = {
        "stpm_plugin.score": ["-m", "stpm_plugin.commands", "score", str(model), str(image)],
        "OpenVINOInferencer": ["-c", load],
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(4):
        for name, command in commands.items():
            with TemporaryDirectory() as empty:
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, *command], check=True, cwd=empty, capture_output=True,
                    env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                )  # fmt: skip
                seconds[name].append(round(time.perf_counter() - start, 2))
    return {name: found[1:] for name, found in seconds.items()}  # the first of each fills the disk's cache


def accuracy(args: argparse.Namespace, category: str) -> dict[str, Any]:
    """Image AUROC, pixel AUROC and PRO of each variant on the test images, and the share of labels that are FP32's."""
    data = datamodule(args.root, category)
    data.setup()
    folder, found, labels = args.work / category, {}, {}
    for name, (file, options) in VARIANTS.items():
        if not file.endswith(".xml") or not (folder / file).exists():
            continue
        try:
            model = ov.Core().read_model(folder / file)
            compiled = ov.compile_model(model, "CPU", options)
        except RuntimeError as error:
            found[name] = {"error": str(error).strip().splitlines()[-1]}
            continue
        metrics = [AUROC(fields=["pred_score", "gt_label"])]
        metrics += [metric(fields=["anomaly_map", "gt_mask"]) for metric in (AUROC, AUPRO)]
        labels[name], scores = [], []
        for item in track(data.test_data, f"{category}, {name}"):
            answer = compiled(np.repeat(item.image[None].float().numpy(), images_a_call(model), 0))
            made = {name: answer[name][:1] for name in ("pred_score", "pred_label", "anomaly_map")}
            anomaly_map = (
                torch.from_numpy(made["anomaly_map"].copy()).float().reshape(1, *made["anomaly_map"].shape[-2:])
            )
            mask = F.interpolate(item.gt_mask[None, None].float(), anomaly_map.shape[-2:], mode="nearest")[0]
            score = torch.from_numpy(made["pred_score"].copy()).float().reshape(1)
            batch = SimpleNamespace(
                pred_score=score, gt_label=item.gt_label.reshape(1), anomaly_map=anomaly_map, gt_mask=mask.bool()
            )
            for metric in metrics:
                metric.update(batch)
            scores.append(score.item())
            labels[name].append(bool(np.asarray(made["pred_label"]).item()))
        names = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")
        found[name] = {key: round(metric.compute().item(), 4) for key, metric in zip(names, metrics, strict=True)}
        if file.startswith("stpm"):
            same = [a == b for a, b in zip(labels[name], labels["OpenVINO FP32"], strict=True)]
            found[name]["equal_labels"] = round(mean(same), 4)
            found[name]["scores"] = [round(score, 5) for score in scores]
    exact = np.array(found["OpenVINO FP32"]["scores"])
    for row in found.values():
        if "scores" in row:
            row["largest_score_difference"] = round(float(np.abs(np.array(row.pop("scores")) - exact).max()), 4)
    return found


def files(args: argparse.Namespace) -> None:
    """Score 1024 x 1024 PNGs with `score` and with anomalib's inferencer in a loop, in turns; then 10,000 of them."""
    from anomalib.deploy import OpenVINOInferencer

    with TemporaryDirectory() as name:
        folder = Path(name)
        originals = sorted((args.root / "screw/test").rglob("*.png"))[::2]
        for number, path in enumerate(originals):
            cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(cv2.imread(str(path)), (1024, 1024)))
        paths = sorted(folder.glob("*.png"))
        os.chdir(folder)  # anomalib's inferencer leaves a cache in the working directory
        models = {
            "FP32": (args.work / "screw" / VARIANTS["OpenVINO FP32"][0], "f32"),
            "bf16": (args.work / "screw" / VARIANTS["OpenVINO bf16"][0], "bf16"),
            "INT8": (args.work / "screw" / VARIANTS["OpenVINO INT8, rest bf16"][0], "bf16"),
        }
        rates: dict[str, list[float]] = defaultdict(list)
        for _ in range(3):
            for name, (model, precision) in models.items():
                start = time.perf_counter()
                scored(model, paths, folder / "scores.csv", ["--precision", precision])
                rates[f"stpm_plugin.score, {name}"].append(len(paths) / (time.perf_counter() - start))
                inferencer = OpenVINOInferencer(model, config={"INFERENCE_PRECISION_HINT": precision})
                start = time.perf_counter()
                for path in paths:
                    inferencer.predict(path)
                rates[f"OpenVINOInferencer in a loop, {name}"].append(len(paths) / (time.perf_counter() - start))
        save(
            "files",
            {"images": len(paths), "images_per_second": {k: [round(v, 2) for v in r] for k, r in rates.items()}},
        )
        many = folder / "many"
        many.mkdir()
        for number in range(10_000):
            (many / f"{number}.png").symlink_to(originals[number % len(originals)].resolve())
        (many / "5000.png").unlink()
        (many / "5000.png").write_bytes(b"no image")
        save("memory", resident(models["INT8"][0], many, folder / "many.csv"))


def scored(model: Path, images: Iterable[Path], table: Path, options: list[str]) -> None:
    """Run `score` in this process on a new table."""
    from stpm_plugin.commands.score import main as score

    table.unlink(missing_ok=True)
    score([str(model), *map(str, images), "--csv", str(table), *options])


def resident(model: Path, images: Path, table: Path) -> dict[str, Any]:
    """Follow the memory of `score` in a process of its own over a folder."""
    command = [sys.executable, "-m", "stpm_plugin.commands", "score", str(model), str(images), "--csv", str(table)]
    start = time.perf_counter()
    environment_of = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment_of) as process:
        known, sizes = psutil.Process(process.pid), []
        while process.poll() is None:
            time.sleep(5)
            try:
                done = sum(1 for _ in table.open()) - 1 if table.exists() else 0
                sizes.append([done, round(known.memory_info().rss / 2**20)])
            except psutil.NoSuchProcess:
                break
    count = sum(1 for _ in table.open()) - 1
    seconds = time.perf_counter() - start
    return {"rows": count, "seconds": round(seconds, 1), "exit_code": process.returncode, "rows_and_mebibytes": sizes}


def bound(path: Path) -> dict[str, Any]:
    """Where the INT8 network's time goes, and its operations a second beside those of a bare stack of convolutions."""
    import nncf

    compiled = ov.compile_model(fixed(path), "CPU", {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True, **BFLOAT16})
    request = compiled.create_infer_request()
    totals: dict[str, float] = defaultdict(float)
    for _ in range(50):
        request.infer({0: np.random.default_rng(0).random((1, 3, *SIZE), np.float32)})
        for part in request.get_profiling_info():
            totals[f"{part.node_type} {part.exec_type}"] += part.real_time.total_seconds() * 1000 / 50
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    width, pixels, layers = 256, 64, 8
    stack = torch.nn.Sequential(*[torch.nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(layers)])
    image = torch.rand(1, width, pixels, pixels)
    best = nncf.quantize(
        ov.convert_model(stack, example_input=image, input=list(image.shape)), nncf.Dataset([image.numpy()])
    )
    run = ov.compile_model(best, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        run(image.numpy())
        seconds.append(time.perf_counter() - start)
    return {
        "milliseconds": {name: round(value, 3) for name, value in islice(ordered, 15)},
        "sum_ms": round(sum(totals.values()), 2),
        "network_operations_per_second": round(operations(fixed(path)) / (sum(totals.values()) / 1000) / 1e12, 3),
        "network_tera_operations": round(operations(fixed(path)) / 1e12, 5),
        "best_tera_operations_per_second": round(2 * layers * width**2 * 9 * pixels**2 / min(seconds) / 1e12, 3),
    }


def operations(model: ov.Model) -> float:
    """Multiplications and additions of a model's convolutions."""
    total = 0.0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convolution":
            total += 2 * np.prod(list(node.input_value(1).get_shape())) * np.prod(list(node.output(0).get_shape())[2:])
    return total


def report(kept: dict[str, Any]) -> None:
    """Print the table, and draw accuracy over latency."""
    timed = kept.get("network", {}).get("variants", {})
    tests = {category: [v for k, v in kept.items() if k.startswith(f"accuracy, {category}")] for category in CATEGORIES}
    for name in VARIANTS:
        cells = [
            f"{timed.get(name, {}).get(key, '')}"
            for key in ("p50_ms", "p95_ms", "p99_ms", "images_per_second", "megabytes")
        ]
        for category in CATEGORIES:
            for metric in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO", "equal_labels"):
                values = [row[name][metric] for row in tests[category] if metric in row.get(name, {})]
                deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.4f}{deviation}" if values else "")
        print(f"{name} | " + " | ".join(cells))
    if timed and all(tests.values()):
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharex=True)
        for axis, metric in zip(axes, ("image_AUROC", "pixel_AUROC"), strict=True):
            for name, row in timed.items():
                values = [r[name][metric] for r in tests["screw"] if metric in r.get(name, {})]
                if values:
                    axis.plot(row["p50_ms"], mean(values), "o" if "anomalib" not in name else "^", label=name)
            axis.set(
                xlabel="milliseconds an image (median, network only)",
                ylabel=f"screw, {metric.replace('_', ' ')}",
            )
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=6)
        figure.savefig(RESULT.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
