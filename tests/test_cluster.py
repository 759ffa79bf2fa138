"""Scoring over a Ray cluster of two nodes on this machine."""

import importlib.util
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import rows, run
from PIL import Image

from stpm_plugin.commands.entry import main as stpm

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="the extra `cluster` is not installed")

CLUSTER = """
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
cluster.wait_for_nodes()
print("address", cluster.address, flush=True)
input()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def address():
    """Address of a head without processors and two nodes with one each.

    They are started by a process of their own: where Ray is imported, children that later tests fork can crash.
    """
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield next(line.split()[1] for line in process.stdout if line.startswith("address "))
        process.communicate("\n", timeout=120)


def kill_a_worker(killed: list[int], table) -> None:
    """Kill the first process that runs an actor, once rows are there."""
    while not (table.exists() and len(table.read_text().splitlines()) > 8):
        time.sleep(0.02)
    for process in psutil.process_iter(["cmdline"]):
        if "MapWorker" in " ".join(process.info["cmdline"] or []):
            process.kill()
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
    assert stpm(["score", str(exported), str(folder), "--csv", str(plain)]) == 2
    killed = []
    killer = threading.Thread(target=kill_a_worker, args=(killed, spread), daemon=True)
    killer.start()
    command = [str(exported), str(folder), "--csv", str(spread), "--ray", address, "--json"]
    said = run("-m", "stpm_plugin.commands", "score", *command, check=False)
    assert "55.png cannot be read" in said
    assert said.count('"regions": [') == 199
    assert killed
    one, other = rows(plain), rows(spread)
    for name in ("path", "label", "bytes", "modified", "model", "settings"):
        assert [row[name] for row in one] == [row[name] for row in other]
    for here, there in zip(one, other, strict=True):
        assert float(here["score"]) == pytest.approx(float(there["score"]), rel=1e-3, abs=1e-4)


def test_a_refused_image_is_named_and_the_others_are_scored(address, exported, numbered_images, tmp_path):
    mask, table = tmp_path / "mask.png", tmp_path / "s.csv"
    with Image.open(numbered_images / "frame 7.png") as image:
        Image.new("L", image.size).save(mask)
    command = [str(exported), str(numbered_images), "--ignore", str(mask), "--csv"]
    assert stpm(["score", *command, str(tmp_path / "here.csv")]) == 2
    said = run("-m", "stpm_plugin.commands", "score", *command, str(table), "--ray", address, check=False)
    assert f"pixels and the mask {mask} has" in said
    assert [row["path"] for row in rows(table)] == [row["path"] for row in rows(tmp_path / "here.csv")] != []


def test_weights_beside_an_onnx_file_are_sent_along(address, exported_to_onnx, numbered_images, tmp_path):
    import onnx

    external = tmp_path / "external.onnx"
    onnx.save_model(
        onnx.load(exported_to_onnx),
        external,
        save_as_external_data=True,
        location="external.onnx.data",
        size_threshold=0,
    )
    command = ["score", str(external), str(numbered_images), "--csv"]
    assert stpm([*command, str(tmp_path / "here.csv")]) == 0
    run("-m", "stpm_plugin.commands", *command, str(tmp_path / "there.csv"), "--ray", address)
    here, there = rows(tmp_path / "here.csv"), rows(tmp_path / "there.csv")
    assert [(row["path"], row["score"]) for row in here] == [(row["path"], row["score"]) for row in there]
