"""From held-out good images' scores to a threshold, and to the share of false alarms that it leads to.

Scores of held-out good images and of later ones are exchangeable as long as the line does not change. The k-th lowest
of n such scores is then exceeded by the next one with a probability of (n + 1 - k) / (n + 1), whatever the scores'
distribution, and given these n scores the share of false alarms follows a Beta(n + 1 - k, k) distribution (Vovk,
"Conditional validity of inductive conformal predictors", ACML 2012; Angelopoulos and Bates, arXiv 2107.07511, section
3.2). That needs about 1 / (1 - quantile) images. With fewer the scores' tail is extrapolated: logarithms of good
images' scores are assumed to be normal, and the threshold is the upper end of the prediction interval for the next one.
What is known of their spread beforehand counts as :data:`WORTH` images (scaled inverse chi-squared, Gelman et al.,
Bayesian Data Analysis, 3rd edition, section 3.3), since two or three scores alone say next to nothing of it.
`benchmarks/false_alarms.py` compares asked and found shares.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.9  # of intervals: both ends are one-sided 95 % bounds
TINY = 1e-12  # scores of 0 have no logarithm
SPREAD = 0.2  # deviation of the logarithms; of held-out images of six categories it is .09 to .30, .15 on average
WORTH = 4  # degrees of freedom of SPREAD: it dominates with two images, and hardly matters with thirty


class Limit(NamedTuple):
    """A threshold and what is known of its false alarms.

    Attributes:
        value: The threshold, on the scale of the scores; scores above it are anomalous.
        expected: Expected share of good images above it, in [0, 1].
        low: Lower end of the interval of that share.
        high: Upper end.
        images: Number of held-out good images n.
        exact: Whether ``expected`` holds for any distribution; if not, it assumes log-normal scores. The interval
            never does.
    """

    value: float
    expected: float
    low: float
    high: float
    images: int
    exact: bool


def images_needed(quantile: float) -> int:
    """Number of good images from which a quantile of their scores is a threshold without assumptions."""
    return math.ceil(round(quantile / (1 - quantile), 9))


def limit(scores: np.ndarray, quantile: float) -> Limit:
    """Choose the threshold that a share of ``quantile`` of good images should stay below.

    Args:
        scores: Finite scores (n,) of good images that did not train the model, n at least 1.
        quantile: In (0, 1).
    """
    scores = np.sort(np.asarray(scores, np.float64))
    count = len(scores)
    if count >= images_needed(quantile):
        rank = min(count, math.ceil(round(quantile * (count + 1), 9)))
        return Limit(float(scores[rank - 1]), *_alarms_at_rank(rank, count), count, exact=True)
    value = max(_log_normal_limit(scores, quantile), float(scores[-1]))
    return Limit(value, 1 - quantile, 0.0, _alarms_at_rank(count, count)[2], count, exact=False)


def found(scores: np.ndarray, threshold: float) -> Limit:
    """What the scores (n,) of good images say of a threshold that was chosen without them (Clopper and Pearson)."""
    count, above = len(scores), int((np.asarray(scores) > threshold).sum())
    tail = (1 - CONFIDENCE) / 2
    low = float(stats.beta.ppf(tail, above, count - above + 1)) if above else 0.0
    high = float(stats.beta.ppf(1 - tail, above + 1, count - above)) if above < count else 1.0
    return Limit(threshold, above / count, low, high, count, exact=True)


def in_words(alarms: Limit, quantile: float | None = None) -> str:
    """Say what is known of a threshold's false alarms, and whether the quantile that set it needs more images."""
    said = f"expected false alarms {alarms.expected:.2%} (90 % interval {alarms.low:.2%} to {alarms.high:.2%}"
    if alarms.exact or quantile is None:
        return f"{said}, by {alarms.images} held-out good images)."
    return (
        f"{said}). {alarms.images} held-out good images are too few for a quantile of {quantile:g}, which needs "
        f"{images_needed(quantile)}: the threshold assumes log-normal scores. Add good images to be sure."
    )


def _alarms_at_rank(rank: int, count: int) -> tuple[float, float, float]:
    """Expected share of scores above the ``rank``-th lowest of ``count``, and its interval."""
    above, tail = count + 1 - rank, (1 - CONFIDENCE) / 2
    low, high = (float(stats.beta.ppf(end, above, rank)) for end in (tail, 1 - tail))
    return above / (count + 1), low, high


def _log_normal_limit(scores: np.ndarray, quantile: float) -> float:
    """Upper end of the prediction interval for the next of log-normal scores."""
    logs = np.log(np.maximum(scores, TINY))
    count, freedom = len(logs), WORTH + len(logs) - 1
    variance = (WORTH * SPREAD**2 + ((logs - logs.mean()) ** 2).sum()) / freedom
    return float(np.exp(logs.mean() + stats.t.ppf(quantile, freedom) * math.sqrt(variance * (1 + 1 / count))))
