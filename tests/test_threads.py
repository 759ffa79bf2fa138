"""Training takes the processors that other work leaves."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import fit
from lightning.pytorch.callbacks import Callback

from stpm_plugin.training.threads import free_processors


@pytest.mark.parametrize(
    ("used", "threads", "free"),
    [
        (0.4, 2, 2),  # both ran all the time
        (0.27, 2, 1),  # one shared its processor
        (3.01, 16, 15),
        (0.02, 4, 1),  # a container's quota of a tenth
        (0.41, 2, 2),  # no clock is exact
        (0.3, 2, 1),  # one spun while it waited for the other, which shared its processor
        (3.1, 16, 15),
    ],
)
def test_free_processors_by_hand(used, threads, free):
    assert free_processors(used, 0.2, threads) == free


class Threads(Callback):
    """Notes the threads that read the images, and those of each step."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def on_fit_start(self, *args) -> None:
        del args
        self.seen.add(torch.get_num_threads())

    def on_train_batch_end(self, *args) -> None:
        del args
        self.seen.add(torch.get_num_threads())


@pytest.fixture
def two_threads_on_one_processor():
    """Two threads, of which another has the processor whenever one runs."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system binds no process to a processor")
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(allowed)})
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("fixed", "trains_on"), [(False, 1), (True, 2)])
def test_threads_without_a_processor_rest(
    fixed, trains_on, two_threads_on_one_processor, demo, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    if not fixed:
        monkeypatch.delenv("OMP_NUM_THREADS")
    watch = Threads()
    with caplog.at_level("INFO"):
        fit(demo, tmp_path, 1, trainer={"callbacks": [watch]})
    assert watch.seen == {trains_on}
    assert ("training on 1 of 2 threads" in caplog.text) is not fixed
    assert torch.get_num_threads() == 2  # as before
