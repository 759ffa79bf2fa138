"""The words that name how a model is run."""

from typing import Literal

Hint = Literal["latency", "throughput"]
Precision = Literal["f32", "bf16", "f16"]
