"""Fit and inference on a GPU: STPM by both recipes and both backbones, next to Stfpm, PaDiM and PatchCore.

    python -m benchmarks.gpu --root DIR --category bottle --teacher FILE

Each model is fitted once through anomalib's Engine, after a fit of one pass that warms the GPU up; all have the same
weights of torchvision's ResNet-18 except lite0, and read the images in this process. Stfpm makes twenty of its hundred
passes, since all are alike. Then each network is timed on images in the GPU's memory, at batch 1 and 32: eager, in
bfloat16, as a CUDA graph, compiled. Rows are written to `results/gpu.json`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from anomalib.data import MVTecAD
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.accuracy import LITE0
from benchmarks.environment import Row, environment, fit, keep, parser, summary
from benchmarks.training_speed import CONFIGS, rival, use_hub
from stpm_plugin import STPM
from stpm_plugin.model.matching import matching_loss

BATCHES = (1, 32)
WARM, TIMED = 10, 100
SIZE = (256, 256)
PAPER = yaml.safe_load((CONFIGS / "paper.yaml").read_text())["model"]["init_args"]
RECIPES: dict[str, Row] = {
    "STPM": {},
    "STPM, lite0": LITE0,
    "STPM, paper": PAPER,
    "STPM, lite0, paper": PAPER | LITE0 | {"layers": None},
}
PASSES = {"anomalib PaDiM": 1, "anomalib PatchCore": 1, "anomalib Stfpm, 20 of 100 passes": 20}
PLAIN = {"evaluator": False, "visualizer": False}


def main() -> None:
    """Fit each model, and time its network."""
    options = parser(__doc__, [], "--root", "--category", "--teacher")
    options.add_argument("--only", nargs="+", choices=[*RECIPES, *PASSES], default=[*RECIPES, *PASSES])
    args = options.parse_args()

    def save(key: str, row: Row) -> None:
        keep(args.results / "gpu.json", key, row | environment("python -m benchmarks.gpu"))

    with tempfile.TemporaryDirectory() as folder:
        use_hub(args.teacher, Path(folder))
        fitted(STPM(teacher_weights=str(args.teacher), epochs=1, steps=None), args)  # warms up
        for name in args.only:
            torch.manual_seed(0)
            if name in RECIPES:
                model = STPM(**{"teacher_weights": str(args.teacher)} | RECIPES[name] | {"seed": 0} | PLAIN)
            else:
                model = rival(name.split(",")[0], **PLAIN)
            length = {"max_epochs": PASSES[name]} if name in PASSES else {}
            save(f"{name}, fit", fitted(model, args, **length) | {"category": args.category})
            for key, timed in inference(model.model.cuda().eval(), name in RECIPES):
                save(f"{name}, inference, {key}", timed)
            if name in RECIPES:
                save(f"{name}, step", step(model))
            del model
            gc.collect()


def fitted(model: Any, args: argparse.Namespace, **length: int) -> Row:
    """Fit once."""
    data = MVTecAD(root=args.root, category=args.category, num_workers=0)
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        engine, seconds = fit(model, data, folder, accelerator="gpu", devices=1, limit_val_batches=1, **length)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"fit_seconds": round(seconds, 1), "steps": engine.trainer.global_step, "gpu_memory_gib": round(peak, 2)}


@torch.no_grad()
def inference(network: nn.Module, whole: bool) -> Iterator[tuple[str, Row]]:
    """Time a network (B, 3, H, W) -> scores and maps; ``whole`` in all ways, else only eager."""
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
            again = replayed(call, images) if name.startswith("CUDA graph") else functools.partial(call, images)
            row = timed(again) | ({"kernels_ms": kernels(again)} if name.startswith("eager") else {})
            yield f"{name}, batch {batch}", row | {"images_per_second": round(1000 * batch / row["p50_ms"])}
    if whole:
        call = functools.partial(torch.compile(network, mode="reduce-overhead"), images[:1])
        begin = time.perf_counter()
        call()
        seconds = round(time.perf_counter() - begin, 1)
        yield "torch.compile, batch 1", timed(call) | {"seconds_to_compile": seconds}


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


def step(model: STPM) -> Row:
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
    found = []
    for _ in range(WARM + TIMED):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - begin))
    return summary(found[WARM:], 3)


def kernels(call: Callable[[], Any], count: int = 10) -> float:
    """Milliseconds of a call in which a kernel runs: far below the call's time if launching kernels takes long."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    return round(sum(event.self_device_time_total for event in seen.key_averages()) / 1000 / count, 3)


if __name__ == "__main__":
    main()
