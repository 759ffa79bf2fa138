"""The CSV of verdicts: what a row belongs to, and what becomes of the file."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import psutil
import pytest
from conftest import rows, run, six_frames

from stpm_plugin.commands.entry import main as stpm
from stpm_plugin.deployment.scorer import Scored
from stpm_plugin.deployment.table import COLUMNS, Table, stamp
from stpm_plugin.errors import STPMError

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals, limits and locks")


@pytest.fixture
def images(numbered_images, tmp_path) -> Path:
    """A folder of images of the test's own."""
    return Path(shutil.copytree(numbered_images, tmp_path / "images"))


def names(table: Path) -> list[str]:
    return [Path(row["path"]).name for row in rows(table)]


def test_a_half_done_table_is_resumed(exported, images, tmp_path, capsys):
    whole, half = tmp_path / "whole.csv", tmp_path / "half.csv"
    assert stpm(["score", str(exported), str(images), "--csv", str(whole)]) == 0
    half.write_bytes(whole.read_bytes()[:-20])  # the last row is cut off
    kept = rows(half)[:4]
    assert stpm(["score", str(exported), str(images), "--csv", str(half)]) == 0
    assert rows(half)[:4] == kept
    assert [row["raw"] for row in rows(half)] == [row["raw"] for row in rows(whole)]
    before = half.read_bytes()
    capsys.readouterr()
    assert stpm(["score", str(exported), str(images), "--csv", str(half)]) == 0
    assert half.read_bytes() == before
    first, _ = capsys.readouterr().err.splitlines()  # then how many are anomalous
    assert first == "all images are scored already."


def test_an_image_that_changed_is_scored_again_and_one_that_is_gone_leaves(exported, images, tmp_path, capsys):
    table = tmp_path / "s.csv"
    stpm(["score", str(exported), str(images), "--csv", str(table)])
    before = {row["path"]: row for row in rows(table)}
    latest, gone = images / "frame 7.png", images / "frame 8.png"
    shutil.copyfile(images / "frame 11.png", latest)
    gone.unlink()
    stpm(["score", str(exported), str(images), "--csv", str(table)])
    after = {row["path"]: row for row in rows(table)}
    assert str(gone) not in after
    assert after[str(latest)]["raw"] == before[str(images / "frame 11.png")]["raw"] != before[str(latest)]["raw"]
    assert all(after[path] == before[path] for path in after if path != str(latest))
    assert "2 images have changed or are gone" in capsys.readouterr().err


def test_the_same_bytes_at_another_time_are_another_image(exported, images, tmp_path):
    table = tmp_path / "s.csv"
    stpm(["score", str(exported), str(images), "--csv", str(table)])
    os.utime(images / "frame 9.png", ns=(0, 10**18 + 1))
    stpm(["score", str(exported), str(images), "--csv", str(table)])
    assert rows(table)[-1]["modified"] == "1000000000.000000001"
    assert len(rows(table)) == 5


@pytest.mark.parametrize("option", ["model", "settings"])
def test_rows_of_another_model_or_other_settings_are_refused(option, exported, images, tmp_path, capsys):
    table = tmp_path / "s.csv"
    stpm(["score", str(exported), str(images), "--csv", str(table)])
    before = table.read_bytes()
    command = [str(exported), str(images), "--csv", str(table)]
    if option == "settings":
        command += ["--sensitivity", "0.7"]
    else:
        command[0] = str(shutil.copy(exported, tmp_path / "other.xml"))
        weights = bytearray(exported.with_suffix(".bin").read_bytes())
        weights[-1] ^= 1
        (tmp_path / "other.bin").write_bytes(weights)
    assert stpm(["score", *command]) == 1
    said = capsys.readouterr().err
    others = "another model (" if option == "model" else "other settings (CPU f32; these are"
    assert f"contains scores from {others}" in said
    assert "--restart" in said
    assert table.read_bytes() == before
    assert stpm(["score", *command, "--restart"]) == 0
    assert len(rows(table)) == 5


HEADER = ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1}', "is not a CSV of scores"),
        (b"id,price\r\n1,2\r\n3,4", "is not a CSV of scores"),
        (b"PK\x03\x04\x00\x00\xff", "is not a CSV of scores"),
        (b"\n\nnotes", "is not a CSV of scores"),
        (b"path,score,label,latency_ms\r\n/a.png,0.5,normal,1\r\n", "is of version 0.1.0"),
        (HEADER.encode()[:-3], "is not a CSV of scores"),
    ],
)
def test_a_file_of_something_else_stays_as_it_is(content, words, exported, images, tmp_path, capsys):
    table = tmp_path / "theirs"
    table.write_bytes(content)
    for more in ([], ["--restart"]):
        assert stpm(["score", str(exported), str(images), "--csv", str(table), *more]) == 1
        assert words in capsys.readouterr().err
        assert table.read_bytes() == content


def test_an_empty_file_a_blank_line_and_a_damaged_row_are_no_obstacle(exported, images, tmp_path):
    table = tmp_path / "s.csv"
    table.touch()
    assert stpm(["score", str(exported), str(images), "--csv", str(table)]) == 0
    lines = table.read_bytes().splitlines(keepends=True)
    table.write_bytes(b"".join([b"\xef\xbb\xbf" + lines[0], lines[1], b"\r\n", b"/cut,0.5\r\n", *lines[2:]]))
    assert stpm(["score", str(exported), str(images), "--csv", str(table)]) == 0
    assert table.read_bytes() == b"".join(lines)


def test_one_image_by_two_spellings_is_one(exported, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(images)
    sources = ["images", str(images / "frame 7.png"), "./images/../images/*.png", "link"]
    assert stpm(["score", str(exported), *sources]) == 0
    assert names(tmp_path / "scores.csv") == [f"frame {number}.png" for number in (7, 8, 9, 10, 11)]


def test_names_that_are_no_text(exported, images, tmp_path):
    source = (images / "frame 7.png").read_bytes()
    shutil.rmtree(images)
    images.mkdir()
    for name in (b"\xff.png", "ä ,\"'.png".encode(), b"=1+1.png", b"two\nlines.png"):
        with open(os.fsencode(images) + b"/" + name, "wb") as file:  # noqa: PTH123  # a name of bytes
            file.write(source)
    table = tmp_path / "s.csv"
    command = ("-m", "stpm_plugin.commands", "score", str(exported), str(images), "--csv", str(table), "--json")
    for _ in range(2):  # the second finds every row
        said = run(*command, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
        assert sorted(names(table)) == sorted(["=1+1.png", "\\xff.png", "ä ,\"'.png", "two\\nlines.png"])
    assert "4 scored" in said or "of 4 anomalous" in said
    assert all(row["path"].startswith("/") for row in rows(table))  # no cell is a formula


@posix
def test_two_processes_write_no_table_together(exported, images, tmp_path, capsys):
    table = tmp_path / "s.csv"
    with Table(table, "model", "settings"):
        assert stpm(["score", str(exported), str(images), "--csv", str(table)]) == 1
    assert "is being written by another process" in capsys.readouterr().err


@posix
def test_a_table_that_another_process_made_meanwhile_is_refused(tmp_path, monkeypatch):
    """Else this process would replace it, and the other one's rows would go to a file without a name."""
    fcntl = pytest.importorskip("fcntl")
    path, lock = tmp_path / "s.csv", fcntl.flock

    def late(file, how):
        other = tmp_path / "other.csv"
        other.write_bytes(b"")
        other.replace(path)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(STPMError, match=r"s\.csv is being written by another process"):
        Table(path, "model", "settings")
    assert path.read_bytes() == b""


@posix
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(file, how):
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_RDWR  # NFS locks only files that may be written
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(STPMError, match=r"cannot be locked \(No locks available\): choose a file on a local disk"):
        Table(tmp_path / "s.csv", "model", "settings")


def test_no_open_table_is_replaced_on_windows(tmp_path, monkeypatch):
    """Windows has no `fcntl`, and refuses to replace an open file."""
    monkeypatch.setattr("stpm_plugin.deployment.table.fcntl", None)
    replace, path = Path.replace, tmp_path / "s.csv"

    def strict(source, target):
        if str(target) in [file.path for file in psutil.Process().open_files()]:
            raise PermissionError(13, "Permission denied")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", strict)
    for model in ("old", "new"):
        with Table(path, model, "settings", restart=True) as table:
            table.append(Scored("a.png", 0.25, 0.5, "normal", None, 0.001), None)
    assert [row["model"] for row in rows(path)] == ["new"]


def test_a_full_disk_leaves_whole_rows(images, tmp_path, monkeypatch):
    one = Scored(str(images / "frame 7.png"), 0.25, 0.5, "normal", None, 0.001)
    write = os.write
    with Table(tmp_path / "s.csv", "model", "settings") as table:
        table.append(one, stamp(one.path))
        before = (tmp_path / "s.csv").read_bytes()

        def full(file, line):
            if len(line) > 20:
                return write(file, line[:20])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            table.append(one._replace(path=str(images / "frame 8.png")), None)
        assert (tmp_path / "s.csv").read_bytes() == before
        monkeypatch.setattr(os, "write", write)
        table.append(one._replace(path=str(images / "frame 8.png")), None)
    assert names(tmp_path / "s.csv") == ["frame 7.png", "frame 8.png"]


LIMITED = """
import resource, sys
from stpm_plugin.commands.entry import main
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
sys.exit(main(["score", *sys.argv[1:]]))
"""


@posix
def test_the_command_says_that_there_is_no_room_and_resumes(exported, images, tmp_path):
    """A limit of 500 bytes a file, in place of a full disk."""
    table = tmp_path / "s.csv"
    said = run("-c", LIMITED, str(exported), str(images), "--csv", str(table), check=False)
    assert "fix this, then run the command again to resume" in said
    assert "Traceback" not in said
    assert 0 < len(rows(table)) < 5
    before = table.read_bytes()
    assert stpm(["score", str(exported), str(images), "--csv", str(table)]) == 0
    assert table.read_bytes().startswith(before)
    assert len(set(names(table))) == len(rows(table)) == 5


@posix
@pytest.mark.parametrize("sent", ["SIGINT", "SIGKILL"])
def test_a_stopped_command_leaves_whole_rows_and_is_resumed(sent, exported, numbered_images, tmp_path):
    many, table = tmp_path / "many", tmp_path / "s.csv"
    many.mkdir()
    for number in range(300):
        os.link(numbered_images / "frame 7.png", many / f"{number}.png")
    command = [sys.executable, "-m", "stpm_plugin.commands", "score", str(exported), str(many), "--csv", str(table)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (table.exists() and len(table.read_bytes().splitlines()) > 5):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.Signals[sent])
    said = process.communicate(timeout=60)[1]
    if sent == "SIGINT":
        assert process.returncode == 130
        assert "stopped; run the command again to resume" in said
        assert "Traceback" not in said
    before = table.read_bytes()
    assert len(rows(table)) < 300
    assert stpm(["score", str(exported), str(many), "--csv", str(table)]) == 0
    assert table.read_bytes().startswith(before[: before.rindex(b"\n")])
    assert names(table) == [f"{number}.png" for number in range(300)]
    assert not list(tmp_path.glob(".s.csv*"))


def test_json_lines_hold_regions_and_the_exit_code_tells(exported, demo_root, tmp_path, capsys):
    images = str(next(demo_root.glob("*/test")))
    command = [str(exported), images, "--csv", str(tmp_path / "s.csv"), "--json", "--fail-on-anomaly"]
    code = stpm(["score", *command, "--sensitivity", "0.99"])
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == len(rows(tmp_path / "s.csv"))
    anomalous = sum(one["label"] == "anomalous" for one in found)
    assert anomalous > 0
    assert code == 3
    assert f"{anomalous} of {len(found)} anomalous, {tmp_path / 's.csv'}" in err
    for one in found:
        height, width = cv2.imread(one["path"]).shape[:2]
        for region in one["regions"]:
            assert 0 <= region["x"] < region["x"] + region["w"] <= width
            assert 0 <= region["y"] < region["y"] + region["h"] <= height
            assert 0 < region["area"] <= region["w"] * region["h"]
    assert stpm(["score", *command, "--restart", "--threshold", "2"]) == 0


def test_a_video_is_scored_by_frames_and_resumed(exported, numbered_images, tmp_path):
    video, table = six_frames(tmp_path), tmp_path / "s.csv"
    assert stpm(["score", str(exported), str(video), "--csv", str(table)]) == 0
    whole = table.read_bytes()
    assert names(table) == [f"line.avi#{number}" for number in range(6)]
    assert len({row["raw"] for row in rows(table)}) > 1
    lines = whole.splitlines(keepends=True)
    table.write_bytes(b"".join(lines[:4]))
    assert stpm(["score", str(exported), str(video), "--csv", str(table)]) == 0
    assert [row["raw"] for row in rows(table)] == [line.split(b",")[2].decode() for line in lines[1:]]
    before = table.read_bytes()
    assert stpm(["score", str(exported), str(video), "--csv", str(table), "--heatmaps", str(tmp_path / "maps")]) == 0
    assert len(list((tmp_path / "maps").iterdir())) == 6  # of frames that have rows already
    assert table.read_bytes() == before


def test_a_damaged_table_is_one_sentence(tmp_path):
    (tmp_path / "s.csv").write_bytes(f"{HEADER}\r\n".encode() + b"/a" * 100_000 + b",1\r\n")
    with pytest.raises(STPMError, match=r"s.csv is damaged \(field larger than"):
        Table(tmp_path / "s.csv", "mine", "x")


def test_a_table_that_is_refused_is_not_touched(tmp_path):
    (tmp_path / "s.csv").write_text(f"{HEADER}\r\n/a.png,1,1,,,1,1,1.0,other,x\r\n/cut")
    before = (tmp_path / "s.csv").read_bytes()
    with pytest.raises(STPMError, match=r"contains scores from another model \(other; this one is"):
        Table(tmp_path / "s.csv", "mine", "x")
    assert (tmp_path / "s.csv").read_bytes() == before
