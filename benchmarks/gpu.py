"""Fit and inference on a GPU: STPM by both recipes and both backbones, beside Stfpm, PaDiM and PatchCore.

    python -m benchmarks.gpu --root DIR --category bottle --teacher FILE

Each model is fitted once through anomalib's Engine, after a fit of one pass that warms the GPU up; all have the same
weights of torchvision's ResNet-18 but for lite0, and read the images in this process. Of Stfpm's hundred passes, each
like the others, it makes twenty. Then each network is timed on images that lie on the GPU, at batch 1 and 32:
eager, in bfloat16, as a CUDA graph, compiled. Rows are written to `results/gpu.json`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import Padim, Patchcore, Stfpm
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.accuracy import LITE0
from benchmarks.environment import environment, keep
from benchmarks.training_speed import CONFIGS, use_hub
from stpm_plugin import STPM
from stpm_plugin.model.matching import matching_loss

RESULT = Path(__file__).parent / "results" / "gpu.json"
BATCHES = (1, 32)
WARM, TIMED = 10, 100
SIZE = (256, 256)
CHAIN = ("layer1", "layer2", "layer3")
PAPER = {
    name: value
    for name, value in yaml.safe_load((CONFIGS / "paper.yaml").read_text())["model"]["init_args"].items()
    if name not in ("seed", "evaluator")
}


def main() -> None:
    """Fit and time all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of categories in MVTec AD's layout")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--teacher", required=True, help="weights of torchvision's ResNet-18")
    parser.add_argument("--only", nargs="+", help="of the models")
    args = parser.parse_args()
    fit(STPM(teacher_weights=args.teacher, epochs=1, steps=None), args, None)  # warms up
    with tempfile.TemporaryDirectory() as folder:
        use_hub(Path(args.teacher), Path(folder))
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Fit each model, and time its network."""
    for name, (make, passes) in models(args.teacher).items():
        if args.only is None or name in args.only:
            torch.manual_seed(0)
            model = make()
            row = fit(model, args, passes)
            save(f"{name}, fit", row | {"category": args.category})
            for key, timed in inference(model.model.cuda().eval(), isinstance(model, STPM)):
                save(f"{name}, inference, {key}", timed)
            if isinstance(model, STPM):
                save(f"{name}, step", step(model))
            del model
            gc.collect()


def models(teacher: str) -> dict[str, tuple[Callable[[], Any], int | None]]:
    """How each is made, and its passes; ``None`` for its own."""
    plain: dict[str, Any] = {"evaluator": False, "visualizer": False}
    resnet: dict[str, Any] = {"backbone": "resnet18", **plain}
    stpm: dict[str, Any] = {"seed": 0, **plain}
    light = PAPER | LITE0 | {"layers": None}
    return {
        "STPM": (lambda: STPM(teacher_weights=teacher, **stpm), None),
        "STPM, lite0": (lambda: STPM(**LITE0, **stpm), None),
        "STPM, paper": (lambda: STPM(teacher_weights=teacher, **PAPER, **stpm), None),
        "STPM, lite0, paper": (lambda: STPM(**light, **stpm), None),
        "anomalib PaDiM": (lambda: Padim(layers=list(CHAIN), **resnet), 1),
        "anomalib PatchCore": (lambda: Patchcore(coreset_sampling_ratio=0.01, **resnet), 1),
        "anomalib Stfpm, 20 of 100 passes": (lambda: Stfpm(**resnet), 20),
    }


def save(key: str, row: dict[str, Any]) -> None:
    """Keep a row, and print it."""
    keep(RESULT, key, row | environment("python -m benchmarks.gpu"))
    print(key, json.dumps(row), flush=True)


def fit(model: Any, args: argparse.Namespace, passes: int | None) -> dict[str, Any]:
    """Fit once."""
    data = MVTecAD(root=args.root, category=args.category, num_workers=0)
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        length = {} if passes is None else {"max_epochs": passes}
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "default_root_dir": folder}
        engine = Engine(accelerator="gpu", devices=1, limit_val_batches=1, **quiet, **length)
        begin = time.perf_counter()
        engine.fit(model, datamodule=data)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"fit_seconds": round(seconds, 1), "steps": engine.trainer.global_step, "gpu_memory_gib": round(peak, 2)}


def inference(network: nn.Module, whole: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Time a network (B, 3, H, W) -> scores and maps; ``whole`` with all ways, else eager alone."""
    half = copy.deepcopy(network)
    ways: dict[str, Callable[[Tensor], Any]] = {"eager": network}
    if whole:
        half.teacher.bfloat16()
        half.student.bfloat16()
        ways["eager, bfloat16"] = lambda images: half(images.bfloat16())
        ways["CUDA graph"], ways["CUDA graph, bfloat16"] = network, ways["eager, bfloat16"]
    for batch in BATCHES:
        images = torch.randn(batch, 3, *SIZE, device="cuda").to(memory_format=torch.channels_last)
        for name, call in ways.items():
            with torch.no_grad():
                again = replayed(call, images) if name.startswith("CUDA graph") else functools.partial(call, images)
                row = timed(again)
                if name.startswith("eager"):
                    row["kernels_ms"] = kernels(again)
            yield f"{name}, batch {batch}", row | {"images_per_second": round(1000 * batch / row["p50_ms"])}
    if whole:
        images = torch.randn(1, 3, *SIZE, device="cuda").to(memory_format=torch.channels_last)
        begin = time.perf_counter()
        with torch.no_grad():
            call = torch.compile(network, mode="reduce-overhead")
            call(images)
            seconds = round(time.perf_counter() - begin, 1)
            yield "torch.compile, batch 1", timed(lambda: call(images)) | {"seconds_to_compile": seconds}


def replayed(call: Callable[[Tensor], Any], images: Tensor) -> Callable[[], Any]:
    """Record a call as a CUDA graph; returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(images)
    return graph.replay


def step(model: STPM) -> dict[str, Any]:
    """Time a training step, its teacher's features at hand, at the model's batch."""
    size = model.batch_size or 32
    network = model.model.cuda()
    network.student.train()
    images = torch.rand(size, 3, *SIZE, device="cuda")
    with torch.no_grad():
        teacher = [level.half() for level in network.teach(images)]
    optimizer = torch.optim.SGD(network.student.parameters(), lr=1e-4, momentum=model.momentum)

    def one() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            student = network.study(images)
        matching_loss(teacher, student, model.hard_share).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"batch": size, **timed(one), "kernels_ms": kernels(one)}


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a call, the GPU's work included."""
    for _ in range(WARM):
        call()
    torch.cuda.synchronize()
    found = []
    for _ in range(TIMED):
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - begin))
    ordered = sorted(found)
    return {"p50_ms": round(median(found), 3), "p95_ms": round(ordered[int(0.95 * TIMED)], 3), "calls": TIMED}


def kernels(call: Callable[[], Any], count: int = 10) -> float:
    """Milliseconds of a call in which a kernel runs: far below its time where launching them is what takes long."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    return round(sum(event.self_device_time_total for event in seen.key_averages()) / 1000 / count, 3)


if __name__ == "__main__":
    main()
