"""The folder that a camera writes to, through the command in a process of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import rows
from PIL import Image

from stpm_plugin.commands.entry import main as stpm
from stpm_plugin.deployment.images import images_below
from stpm_plugin.deployment.watch import arrivals
from stpm_plugin.errors import STPMError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows cannot send a process these signals")
DEADLINE = 60  # seconds


@contextmanager
def watching(exported, folder, table, *more, stop=signal.SIGINT):
    """The command, watching; yields its process and stops it at the end."""
    command = [
        sys.executable,
        "-m",
        "stpm_plugin.commands",
        "score",
        str(exported),
        str(folder),
        "--watch",
        "--csv",
        str(table),
    ]
    process = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.send_signal(stop)
        process.said = process.communicate(timeout=DEADLINE)[1]


def wait_for(table: Path, count: int) -> list[str]:
    """Wait until a table has so many rows; returns the names."""
    end = time.monotonic() + DEADLINE
    while not table.exists() or len(rows(table)) < count:
        assert time.monotonic() < end, f"{len(rows(table)) if table.exists() else 'no'} rows of {count}"
        time.sleep(0.05)
    return [Path(row["path"]).name for row in rows(table)]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "line").mkdir()
    return tmp_path / "line"


def test_what_a_camera_drops_is_scored_once_and_whole(exported, numbered_images, folder, tmp_path):
    table, source = tmp_path / "s.csv", (numbered_images / "frame 9.png").read_bytes()
    shutil.copy(numbered_images / "frame 7.png", folder / "early.png")
    (folder / "notes.txt").write_text("no image")
    with watching(exported, folder, table, "--heatmaps", str(folder / "maps")) as process:
        assert wait_for(table, 1) == ["early.png"]
        with (folder / "slow.png").open("wb") as slow:
            slow.write(source[: len(source) // 2])
            slow.flush()
            time.sleep(2)  # it rests, half written
            assert len(rows(table)) == 1
            slow.write(source[len(source) // 2 :])
        (folder / "sub").mkdir()
        shutil.copy(numbered_images / "frame 8.png", folder / "sub/later.png")
        assert set(wait_for(table, 3)) == {"early.png", "slow.png", "later.png"}
        shutil.copy(numbered_images / "frame 11.png", folder / "early.png")  # the camera overwrites its image
        assert wait_for(table, 4)[-1] == "early.png"
        time.sleep(1.5)
        assert len(rows(table)) == 4
    assert process.returncode == 0
    assert f"4 anomalous, {table}" in process.said
    first, last = (row for row in rows(table) if row["path"].endswith("early.png"))
    assert (first["bytes"], first["modified"]) != (last["bytes"], last["modified"])
    assert (folder / "maps/sub/later.png.heatmap.jpg").is_file()
    assert "Traceback" not in process.said


def test_a_killed_watch_loses_none_and_repeats_none(exported, numbered_images, folder, tmp_path):
    table = tmp_path / "s.csv"
    for number in range(40):
        os.link(numbered_images / "frame 7.png", folder / f"{number}.png")
    with watching(exported, folder, table, stop=signal.SIGKILL):
        wait_for(table, 3)
    for number in range(40, 50):
        os.link(numbered_images / "frame 7.png", folder / f"{number}.png")
    with watching(exported, folder, table):
        found = wait_for(table, 50)
    assert sorted(found) == sorted(f"{number}.png" for number in range(50))


def test_a_refused_image_does_not_stop_the_others(exported, numbered_images, folder, tmp_path):
    """It is named once; a good image in its place is scored."""
    table, mask = tmp_path / "s.csv", tmp_path / "mask.png"
    Image.new("RGB", (9, 7)).save(folder / "a.png")
    shutil.copy(numbered_images / "frame 7.png", folder / "b.png")
    with Image.open(folder / "b.png") as image:
        Image.new("L", image.size).save(mask)
    with watching(exported, folder, table, "--ignore", str(mask)) as process:
        assert wait_for(table, 1) == ["b.png"]
        shutil.copy(folder / "b.png", folder / "c.png")
        assert wait_for(table, 2) == ["b.png", "c.png"]
        time.sleep(2)
    assert process.returncode == 2
    assert process.said.count(f"{folder / 'a.png'} has 7 x 9 pixels and the mask") == 1
    assert "trying again" not in process.said
    with watching(exported, folder, table, "--ignore", str(mask)) as process:
        assert "a.png has 7 x 9 pixels" in next(line for line in process.stderr if "a.png" in line)
        shutil.copy(folder / "b.png", folder / "a.png")
        assert wait_for(table, 3)[-1] == "a.png"
    assert process.returncode == 0


def test_a_folder_that_goes_while_it_is_listed_is_reported_once(numbered_images, folder, monkeypatch):
    shutil.copy(numbered_images / "frame 7.png", folder)
    failures, said = [FileNotFoundError(2, "No such file or directory", "gone")] * 2, []

    def listed(path):
        if failures:
            raise failures.pop()
        return images_below(path)

    def looks(*_, **__):
        while True:
            time.sleep(0.1)
            yield set()

    monkeypatch.setattr("stpm_plugin.deployment.watch.images_below", listed)
    monkeypatch.setattr("watchfiles.watch", looks)
    found = next(arrivals([str(folder)], lambda _: False, pytest.fail, said.append))
    assert [Path(path).name for path in found] == ["frame 7.png"]
    assert [str(error) for error in said] == ["[Errno 2] No such file or directory: 'gone'"]


def test_a_link_that_is_switched_ends_the_watch(folder, tmp_path, monkeypatch):
    link = tmp_path / "today"
    link.symlink_to(folder)

    def watch(*_, **__):
        yield set()
        link.unlink()
        link.symlink_to(tmp_path)
        yield set()

    monkeypatch.setattr("watchfiles.watch", watch)
    monkeypatch.setattr("stpm_plugin.deployment.watch.UNTOLD", 0)
    with pytest.raises(STPMError, match=f"{link} now leads to {tmp_path} instead of {folder}: start --watch again"):
        next(arrivals([str(link)], lambda _: True, print, print))


def test_a_file_that_vanishes_before_it_is_scored_is_named_once(exported, folder, tmp_path, monkeypatch, capsys):
    def found(*_):
        yield [str(folder / "a.png")]
        yield [str(folder / "a.png")]
        raise KeyboardInterrupt

    monkeypatch.setattr("stpm_plugin.commands.scoring.arrivals", found)
    assert stpm(["score", str(exported), str(folder), "--watch", "--csv", str(tmp_path / "s.csv")]) == 2
    assert capsys.readouterr().err.count(f"{folder / 'a.png'} cannot be read") == 1


FULL = """
import os, sys
from pathlib import Path
from stpm_plugin.commands import scoring
from stpm_plugin.commands.entry import main
scoring.AGAIN = 0.2
write = os.write
def full(file, line):
    if len(line) > 60 and not Path(sys.argv[-1]).exists():
        raise OSError(28, "No space left on device")
    return write(file, line)
os.write = full
sys.exit(main(["score", *sys.argv[1:-1]]))
"""


def test_a_full_disk_is_waited_for(exported, numbered_images, folder, tmp_path):
    table, room = tmp_path / "s.csv", tmp_path / "room"
    for number in (7, 8, 9):
        shutil.copy(numbered_images / f"frame {number}.png", folder)
    command = [sys.executable, "-c", FULL, str(exported), str(folder), "--watch", "--csv", str(table), str(room)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = iter(process.stderr.readline, "")
    assert any("No space left on device; trying again" in line for line in lines)
    assert rows(table) == []
    room.touch()
    assert sorted(wait_for(table, 3)) == ["frame 7.png", "frame 8.png", "frame 9.png"]
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == 0
