"""Notice when scores leave those of the held-out good images: the lighting, the camera or the product has changed.

Each window of recent scores is compared with the held-out ones by the one-sided two-sample Kolmogorov-Smirnov tests
(Smirnov 1939), whose limiting distribution is exp(-2 d^2 n m / (n + m)). Defective parts raise scores too: if a share
of the parts is defective, it lowers the distribution function by at most that share, which is allowed for. Only a
change lowers scores. False warnings, and how soon a change is noticed: `benchmarks/results/scoring.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

WINDOW = 30  # images: with ten held-out ones a window of this size can be told apart, and a shift is noticed soon
FEWEST = 10  # held-out images
LEVEL = 0.001  # share of false warnings among windows: once in 30,000 images
DEFECTIVE = 0.1  # share of defective parts that does not count as a change; a line with more would be changed anyway


class Drift:
    """Collects raw image scores and tests each window of them.

    Args:
        held_out: Raw image scores of the held-out good images, ascending.

    Attributes:
        ready: Whether there are enough of them.
    """

    def __init__(self, held_out: Sequence[float]) -> None:
        self.held_out = np.asarray(held_out)
        self.ready = len(self.held_out) >= FEWEST
        self.recent: list[float] = []

    def add(self, raw: float) -> str | None:
        """Count an image's raw score; returns a sentence when a window is full and has left the held-out scores."""
        if not self.ready or math.isnan(raw):
            return None
        self.recent.append(raw)
        if len(self.recent) < WINDOW:
            return None
        window, self.recent = np.array(self.recent), []
        return describe(self.held_out, window)


def describe(held_out: np.ndarray, window: np.ndarray) -> str | None:
    """Say whether a window of scores (m,) has left the held-out ones (n,); ``None`` if not."""
    higher, lower = shifts(held_out, window)
    critical = math.sqrt(math.log(2 / LEVEL) * (1 / len(held_out) + 1 / len(window)) / 2)
    if higher - DEFECTIVE <= critical and lower <= critical:
        return None
    direction = "above" if higher - DEFECTIVE > lower else "below"
    return (
        f"the last {len(window)} images score {direction} the {len(held_out)} held-out good ones (medians "
        f"{np.median(window):.3g} and {np.median(held_out):.3g}; Kolmogorov-Smirnov test, one false warning in "
        f"{1 / LEVEL:.0f} windows): the lighting, the camera or the product has changed"
        + (f", or more than {DEFECTIVE:.0%} of the parts are defective." if direction == "above" else ".")
    )


def shifts(reference: np.ndarray, sample: np.ndarray) -> tuple[float, float]:
    """How far a sample lies above and below a reference: the largest gaps of their distribution functions."""
    values = np.concatenate([reference, sample])
    first, second = (np.searchsorted(np.sort(one), values, side="right") / len(one) for one in (reference, sample))
    return float((first - second).max()), float((second - first).max())
