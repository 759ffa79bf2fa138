"""Where the time of a training step goes, and what its convolutions take alone, in bfloat16, at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stpm_plugin.model.matching import matching_loss
from stpm_plugin.model.network import STPMModel
from stpm_plugin.training.lightning_model import native_bf16

REPEATS = 20


def shares() -> dict[str, Any]:
    """Measure steps of ResNet-18 at 256 x 256 with batches of 2, 4 and 32; milliseconds, medians of 20."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {f"batch {size}": step(size, device) for size in (2, 4, 32)} | {"device": device.type}


def step(batch: int, device: torch.device) -> dict[str, float]:
    """Time the parts of a training step on ``batch`` images."""
    torch.manual_seed(0)
    model = STPMModel("resnet18").to(device)
    student = model.student
    optimizer = torch.optim.SGD(student.parameters(), lr=0.4, momentum=0.9, weight_decay=1e-4)
    images = torch.rand(batch, 3, 256, 256, device=device)
    teacher = [level.half() for level in model.teach(images)]
    seen: list[tuple[nn.Conv2d, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(
            lambda module, given, made: seen.append((module, given[0].detach(), made.detach()))
        )
        for module in student.modules()
        if isinstance(module, nn.Conv2d)
    ]

    def forward() -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device)):
            return student(images)

    forward()
    for hook in hooks:
        hook.remove()
    features = forward()
    times = {
        "student forward": median(forward, device),
        "loss": median(lambda: matching_loss(teacher, features), device),
    }

    def whole() -> None:
        optimizer.zero_grad()
        matching_loss(teacher, forward()).backward()
        optimizer.step()

    times["whole step"] = median(whole, device)
    times["optimizer"] = median(optimizer.step, device)
    times["backward"] = times["whole step"] - times["student forward"] - times["loss"] - times["optimizer"]
    alone, operations = 0.0, 0
    for number, (module, given, made) in enumerate(seen):
        weight = module.weight.detach().to(made.dtype)
        given = given.to(made.dtype).contiguous(memory_format=torch.channels_last)
        rest = (module.stride, module.padding, module.dilation, False, [0, 0], module.groups)
        wanted = (number > 0, True, False)  # the images need no gradient
        alone += median(torch.ops.aten.convolution, device, given, weight, None, *rest)
        alone += median(torch.ops.aten.convolution_backward, device, made, given, weight, None, *rest, wanted)
        operations += 2 * made.numel() * weight[0].numel() * (1 + sum(wanted))
    times["convolutions alone"] = alone
    times["TFLOP/s of the convolutions alone"] = operations / alone / 1e9
    times["TFLOP/s of the whole step"] = operations / times["whole step"] / 1e9
    started = time.perf_counter()
    student.compile()
    whole()
    times["compilation, seconds"] = time.perf_counter() - started
    times["whole step compiled"] = median(whole, device)
    return {name: round(value, 3) for name, value in times.items()}


def median(act: Callable[..., Any], device: torch.device, *arguments: Any) -> float:
    """Return the median time of an act with these arguments, milliseconds."""
    times = []
    for _ in range(REPEATS + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        act(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times[2:])[REPEATS // 2]
