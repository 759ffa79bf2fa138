"""Scoring over a Ray cluster of two nodes on this machine."""

import csv
import os
import signal
import threading
import time

import psutil
import pytest
from conftest import run

from stpm_plugin.commands import score

pytest.importorskip("ray", reason="the extra `cluster` is not installed")


@pytest.fixture
def address():
    """Address of a head without processors and two nodes with two each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=100_000_000)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


def kill_a_worker(killed: list[int], table) -> None:
    """Kill the first process that runs an actor, once rows are there."""
    while not (table.exists() and len(table.read_text().splitlines()) > 8):
        time.sleep(0.02)
    for process in psutil.process_iter(["cmdline"]):
        if "MapWorker" in " ".join(process.info["cmdline"] or []):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
            return


def test_a_lost_workers_images_are_scored_again(address, exported, numbered_images, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    originals = sorted(numbered_images.iterdir())
    for number in range(200):
        (folder / f"{number}.png").symlink_to(originals[number % len(originals)])
    (folder / "55.png").unlink()
    (folder / "55.png").write_bytes(b"no image")
    plain, spread = tmp_path / "plain.csv", tmp_path / "spread.csv"
    assert score.main([str(exported), str(folder), "--csv", str(plain), "--precision", "f32"]) == 2
    killed = []
    killer = threading.Thread(target=kill_a_worker, args=(killed, spread), daemon=True)
    killer.start()
    command = [str(exported), str(folder), "--csv", str(spread), "--precision", "f32", "--ray", address]
    assert "55.png cannot be read" in run("-m", "stpm_plugin.score", *command, check=False)
    assert killed
    one, other = ([row[:3] for row in csv.reader(table.open(newline=""))] for table in (plain, spread))
    assert [row[0] for row in one] == [row[0] for row in other]
    assert [row[2] for row in one] == [row[2] for row in other]
    for here, there in zip(one[1:], other[1:], strict=True):
        assert float(here[1]) == pytest.approx(float(there[1]), rel=1e-3, abs=1e-4)
