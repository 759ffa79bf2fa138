"""Thresholds from good images' scores: numbers worked out by hand, and shares that are kept."""

import math

import numpy as np
import pytest

from stpm_plugin.false_alarms import SPREAD, WORTH, found, images_needed, limit


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
    """Logarithms 0 and 2: mean 1, squares 2, with 4 times 0.04 over 5; t of five degrees at 0.75 is 0.72669."""
    known = limit(np.exp([0.0, 2.0]), 0.75)
    assert known.value == pytest.approx(max(math.exp(1 + 0.72669 * math.sqrt(2.16 / 5 * 1.5)), math.exp(2)), rel=1e-5)
    close = limit(np.exp([0.9, 1.1]), 0.75)  # squares 0.02
    assert close.value == pytest.approx(math.exp(1 + 0.72669 * math.sqrt(0.18 / 5 * 1.5)), rel=1e-5)
    assert (known.expected, known.exact) == (0.25, False)
    assert known.high == pytest.approx(1 - 0.05**0.5)  # of two images none is above
    assert limit(np.array([1.0]), 0.995).value == pytest.approx(math.exp(4.60409 * 0.2 * math.sqrt(2)), rel=1e-5)


def test_two_images_set_no_threshold_out_of_this_world():
    """Scores that differ by a half, as two images of a run did: less than ten times the higher one."""
    assert limit(np.array([0.1, 0.15]), 0.995).value < 1


def test_no_held_out_image_is_above_an_extrapolated_threshold():
    scores = np.array([1.0] * 30 + [50.0])
    assert limit(scores, 0.99).value >= 50


@pytest.mark.parametrize("count", [3, 16, 250])
def test_later_images_exceed_the_threshold_as_often_as_asked(count):
    """Log-normal scores of spreads as they are known beforehand: exact for any n, by the rank or by the interval."""
    random = np.random.default_rng(count)
    shares = []
    for _ in range(4000):
        spread = SPREAD * math.sqrt(WORTH / random.chisquare(WORTH))
        scores = np.exp(random.normal(-2.7, spread, count + 50))
        shares.append((scores[count:] > limit(scores[:count], 0.99).value).mean())
    assert np.mean(shares) == pytest.approx(0.01, abs=0.003)


def test_found_is_clopper_and_pearson():
    """None of 20 above: the upper 95 % bound is 1 - 0.05^(1/20); all above mirrors it."""
    none, every = found(np.zeros(20), 0.5), found(np.ones(20), 0.5)
    assert (none.expected, none.low, none.high) == (0, 0, pytest.approx(1 - 0.05 ** (1 / 20)))
    assert (every.expected, every.low, every.high) == (1, pytest.approx(0.05 ** (1 / 20)), 1)
