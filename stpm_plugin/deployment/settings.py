"""The words that name how a model is run, and which of them decide a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import STPMError

if TYPE_CHECKING:
    import openvino as ov  # `stpm --help` needs none of it

Hint = Literal["latency", "throughput"]
Precision = Literal["f32", "bf16", "f16"]


def check(hint: str, precision: str, batch: int, threads: int | None) -> None:
    """Refuse settings that no model takes.

    Raises:
        STPMError: One is out of range; names it.
    """
    for name, value, known in (("hint", hint, get_args(Hint)), ("precision", precision, get_args(Precision))):
        if value not in known:
            msg = f"{name}={value} must be one of {', '.join(known)}."
            raise STPMError(msg)
    for name, count in (("batch", batch), ("threads", threads)):
        if count is not None and count < 1:
            msg = f"{name}={count} must be at least 1."
            raise STPMError(msg)


def precisions(core: ov.Core, device: str) -> list[Precision]:
    """The precisions that a device computes in natively, f32 first."""
    offered = core.get_property(device, "OPTIMIZATION_CAPABILITIES") if device in core.available_devices else []
    faster: list[tuple[Precision, str]] = [("bf16", "BF16"), ("f16", "FP16")]
    return ["f32", *(name for name, flag in faster if flag in offered)]


def require_precision(core: ov.Core, device: str, precision: Precision) -> None:
    """Refuse a precision that a device, if the name stands for one, would silently compute in float32.

    Raises:
        STPMError: It is one.
    """
    known = precisions(core, device)
    if device in core.available_devices and precision not in known:
        msg = f"precision={precision}: {device} computes only in {', '.join(known)}: use one of these."
        raise STPMError(msg)


def in_words(
    device: str,
    precision: str,
    threshold: float | None,
    sensitivity: float | None,
    ignored: str | None,
    reduced_decode: bool = False,
) -> str:
    """The options that decide a verdict, ``ignored`` by its hash: rows of equal words and of one model compare."""
    words = [f"{device} {precision}"]
    words += [] if threshold is None else [f"threshold {float(threshold)!r}"]
    words += [] if sensitivity is None else [f"sensitivity {float(sensitivity)!r}"]
    words += [] if ignored is None else [f"ignore {ignored[:8]}"]
    words += ["decode reduced"] if reduced_decode else []
    return ", ".join(words)


def options_in(words: str) -> dict[str, float]:
    """The threshold or the sensitivity in words that :func:`in_words` gave."""
    pairs = (part.split(" ") for part in words.split(", ")[1:])
    return {name: float(value) for name, value in pairs if name in ("threshold", "sensitivity")}


def for_device(hint: Hint, precision: Precision, threads: int | None) -> dict[str, Any]:
    """The options of OpenVINO's ``compile_model``."""
    number = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    return {"PERFORMANCE_HINT": hint.upper(), "INFERENCE_PRECISION_HINT": precision, **number}
