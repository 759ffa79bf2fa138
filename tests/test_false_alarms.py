"""Thresholds from good images' scores: numbers worked out by hand, and shares that are kept."""

import math

import numpy as np
import pytest

from stpm_plugin.false_alarms import found, images_needed, limit


@pytest.mark.parametrize(("quantile", "images"), [(0.5, 1), (0.9, 9), (0.95, 19), (0.99, 99), (0.995, 199)])
def test_images_that_a_quantile_takes(quantile, images):
    """The highest of n scores is exceeded with a probability of 1 / (n + 1)."""
    assert images_needed(quantile) == images
    assert limit(np.arange(1.0, images + 1), quantile).value == images
    assert limit(np.arange(1.0, images + 1), quantile).expected == pytest.approx(1 / (images + 1))
    assert not limit(np.arange(1.0, images), quantile).exact if images > 1 else True


def test_a_rank_by_hand():
    """0.8 of 9 scores: the 8th, exceeded by 2 of 10; given the scores, the share is Beta(2, 8)."""
    known = limit(np.array([9.0, 1, 2, 3, 4, 5, 6, 7, 8]), 0.8)
    assert (known.value, known.expected, known.images, known.exact) == (8.0, pytest.approx(0.2), 9, True)
    for end, below in ((known.low, 0.05), (known.high, 0.95)):  # P(Beta(2, 8) <= x) = 1 - (1-x)^9 - 9x(1-x)^8
        assert 1 - (1 - end) ** 9 - 9 * end * (1 - end) ** 8 == pytest.approx(below)


def test_few_images_by_hand():
    """Logarithms 0 and 2: mean 1, deviation sqrt 2; Student's t with one degree of freedom at 0.75 is 1."""
    known = limit(np.exp([0.0, 2.0]), 0.75)
    assert known.value == pytest.approx(math.exp(1 + math.sqrt(1.5) * math.sqrt(2)))
    assert (known.expected, known.exact) == (0.25, False)
    assert known.high == pytest.approx(1 - 0.05**0.5)  # of two images none is above
    assert limit(np.array([3.0]), 0.995).value == 6.0


def test_no_held_out_image_is_above_an_extrapolated_threshold():
    scores = np.array([1.0] * 30 + [50.0])
    assert limit(scores, 0.99).value >= 50


@pytest.mark.parametrize("count", [3, 16, 250])
def test_later_images_exceed_the_threshold_as_often_as_asked(count):
    """Log-normal scores: exact for any n, by the rank or by the prediction interval."""
    random = np.random.default_rng(count)
    shares = []
    for _ in range(2000):
        scores = np.exp(random.normal(-2.7, 0.15, count + 50))
        shares.append((scores[count:] > limit(scores[:count], 0.99).value).mean())
    assert np.mean(shares) == pytest.approx(0.01, abs=0.003)


def test_found_is_clopper_and_pearson():
    """None of 20 above: the upper 95 % bound is 1 - 0.05^(1/20); all above mirrors it."""
    none, every = found(np.zeros(20), 0.5), found(np.ones(20), 0.5)
    assert (none.expected, none.low, none.high) == (0, 0, pytest.approx(1 - 0.05 ** (1 / 20)))
    assert (every.expected, every.low, every.high) == (1, pytest.approx(0.05 ** (1 / 20)), 1)
