"""What happens when something breaks: each fault is provoked on the drawn demo data, in fresh processes.

    python -m benchmarks.reliability                  # all, about half an hour on two cores
    python -m benchmarks.reliability "full disk"      # those whose names hold these words; other rows are kept

`results/reliability.json` and `reliability.md` say what was tried, what the user sees and what was lost. Full and
read-only disks are real ones, mounted in a name space of the child's own (`unshare`); where that is not allowed, the
row says so.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import cv2
import numpy as np
import psutil
import torch
from anomalib.data.utils import read_image
from PIL import Image

from benchmarks.environment import environment
from stpm_plugin.deployment.images import read_images

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "tests/cifar10_teacher.safetensors"
RESULT = ROOT / "benchmarks" / "results" / "reliability.json"
NETWORK = ("--model", "STPM", "--model.backbone", "resnet18")
SMALL = (*NETWORK, "--model.teacher_weights", str(TEACHER), "--model.image_size", "[64,64]", "--model.seed", "0")
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")
ANOMALIB, SCORE = ("-m", "stpm_plugin"), ("-m", "stpm_plugin.commands", "score")
TIMEOUT = 1200  # seconds
SAME = 2e-3  # of scores, by routes that decode, resize and compute in different libraries
RIGHT, SENTENCE, LOGGED, HOST = "right", "one sentence", "a sentence, then the host's trace", "the host's words"
DEFECT, UNTRIED = "DEFECT", "not tried"


class Row(NamedTuple):
    """What a fault led to: the line that the user sees last, what the check after it found, and whether it is well."""

    sees: str
    lost: str
    verdict: str


class Ended(NamedTuple):
    """A process that has ended: its exit code and all that it printed."""

    code: int
    output: str

    def row(self, lost: str, well: bool) -> Row:
        """Judge: a run that goes on or refuses in one sentence is well if ``well``, which the check after it says."""
        lines = [line.strip() for line in self.output.replace("\r", "\n").splitlines() if line.strip()] or ["nothing"]
        refused, logged = ([line for line in lines if word in line] for word in ("STPMError: ", " STPM: the "))
        if self.code == 0:
            return Row(lines[-1], lost, RIGHT if well else DEFECT)
        traced = "Traceback" in self.output
        kind = SENTENCE if refused or not traced else LOGGED if logged else HOST
        return Row((refused or logged or lines)[-1], lost, kind if well else DEFECT)


FAULTS: dict[str, Callable[[Path], Row]] = {}


def fault(name: str) -> Callable:
    """Register a fault under its name; its function gets a folder of its own."""

    def register(function: Callable[[Path], Row]) -> Callable[[Path], Row]:
        FAULTS[name] = function
        return function

    return register


# Processes


def start(*command: str | Path, cwd: Path, mount: str = "") -> subprocess.Popen:
    """Start Python with arguments, in a group of its own.

    Args:
        command: Arguments of Python.
        cwd: Working directory; the file ``output`` in it takes all that is printed.
        mount: Shell command that mounts something for this process alone. What it leaves in the folder ``disk`` is
            copied to ``kept``, since a mount of its own ends with it.
    """
    whole = [sys.executable, *map(str, command)]
    if mount:
        shell = (
            f'{mount} || exit 99; "$@"; code=$?; kill %1 2>&-; rm -f disk/filled; cp -a disk/. kept 2>&-; exit $code'
        )
        whole = ["unshare", "--map-root-user", "--mount", "sh", "-c", shell, "sh", *whole]
    for folder in ("disk", "kept"):
        (cwd / folder).mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with (cwd / "output").open("wb") as output:
        return subprocess.Popen(
            whole,
            cwd=cwd,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "400", "TQDM_DISABLE": "1"},
        )


def end(process: subprocess.Popen, cwd: Path) -> Ended:
    """Wait for a process."""
    try:
        return Ended(process.wait(TIMEOUT), (cwd / "output").read_text(errors="replace"))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def run(*command: str | Path, cwd: Path, mount: str = "") -> Ended:
    """Run Python with arguments to its end."""
    return end(start(*command, cwd=cwd, mount=mount), cwd)


def expect(done: Ended) -> None:
    """Stop where a run without faults has failed."""
    if done.code:
        raise SystemExit(done.output[-4000:])


def when(process: subprocess.Popen, happened: Callable[[], object]) -> None:
    """Wait for something to happen while a process runs."""
    begun = time.monotonic()
    while process.poll() is None and not happened():
        if time.monotonic() - begun > TIMEOUT:
            raise TimeoutError
        time.sleep(0.002)


def stop(process: subprocess.Popen, how: signal.Signals, cwd: Path) -> Ended:
    """Send a signal to a process and its children, and wait."""
    if process.poll() is None:
        os.killpg(process.pid, how)
    return end(process, cwd)


def tmpfs(kibibytes: int) -> str:
    """A disk with so much room."""
    return f"mount -t tmpfs -o size={kibibytes}k none disk"


def read_only(folder: str) -> str:
    """A folder that nobody can write, root neither."""
    return f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}"


CAN_MOUNT = not subprocess.run(
    ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"],  # noqa: S607
    check=False,
    capture_output=True,
).returncode


# What the faults share: data, a trained model, its export


class Whole(NamedTuple):
    """A run without faults."""

    data: Path
    checkpoint: Path
    model: Path

    @property
    def images(self) -> Path:
        """Folder of good test images."""
        return next(self.data.glob("*/test/good"))


WHOLE: dict[str, Whole] = {}


def whole() -> Whole:
    """The run without faults, made at the first call."""
    return WHOLE["run"]


def make_whole(folder: Path) -> None:
    """Train and export without faults."""
    folder.mkdir()
    WHOLE["run"] = Whole(folder / "demo", folder / "model.ckpt", folder / "export/weights/openvino/model.xml")
    done = run(*fit(epochs=2), cwd=folder)
    expect(done)
    shutil.copy(next(folder.glob("results/**/model.ckpt")), folder / "model.ckpt")
    done = run(*export(), "--export_root", "export", cwd=folder)
    expect(done)


def demo(images: int = 10, root: Path | None = None) -> tuple[str, ...]:
    """Arguments that name the drawn data."""
    root = root or whole().data
    sizes = (f"--data.train_images={images}", "--data.test_images=2", "--data.val_split_mode=none")
    return ("--data", "stpm_plugin.DemoData", f"--data.root={root}", *sizes)


def fit(*more: str, epochs: int = 1, images: int = 10, root: Path | None = None) -> tuple[str, ...]:
    """Arguments that train."""
    return (*ANOMALIB, "fit", *SMALL, *demo(images, root), *QUIET, f"--trainer.max_epochs={epochs}", *more)


def export(checkpoint: Path | None = None) -> tuple[str, ...]:
    """Arguments that export."""
    chosen = checkpoint or whole().checkpoint
    return (*ANOMALIB, "export", *NETWORK, "--export_type", "openvino", "--ckpt_path", str(chosen))


def predict(checkpoint: Path, data: Path | None = None) -> tuple[str, ...]:
    """Arguments that predict."""
    images = str(data or whole().images)
    return (*ANOMALIB, "predict", *NETWORK, "--data", images, *QUIET, "--ckpt_path", str(checkpoint))


def score(images: Path | str, table: str = "scores.csv", model: Path | None = None) -> tuple[str, ...]:
    """Arguments that score."""
    return (*SCORE, str(model or whole().model), str(images), "--csv", table)


def rows(table: Path) -> list[list[str]]:
    """A CSV's paths, scores, raw scores and labels; times differ from run to run."""
    with table.open(newline="", encoding="utf-8") as file:
        return [row[:4] for row in csv.reader(file)]


def many(folder: Path, count: int = 1500) -> Path:
    """A folder of many images, the same few over and over."""
    source = next(whole().data.glob("*/train/good"))
    files = sorted(source.iterdir())
    (folder / "many").mkdir()
    for number in range(count):
        os.link(files[number % len(files)], folder / "many" / f"{number}.png")
    return folder / "many"


def loads(checkpoint: Path) -> bool:
    """Whether a checkpoint is whole."""
    try:
        return "state_dict" in torch.load(checkpoint, weights_only=True, map_location="cpu")
    except Exception:
        return False


def files(folder: Path, pattern: str = "*") -> str:
    """Names and sizes below a folder."""
    found = [p for p in sorted(folder.rglob(pattern)) if p.is_file()]
    return ", ".join(f"{p.name} ({p.stat().st_size} bytes)" for p in found) or "no file"


# Killed and stopped


@fault("kill -9 while training, then `fit --ckpt_path`")
def _(folder: Path) -> Row:
    process = start(*fit(epochs=500), cwd=folder)
    when(process, lambda: list(folder.glob("results/**/model.ckpt")))
    time.sleep(2)
    stop(process, signal.SIGKILL, folder)
    checkpoint = next(folder.glob("results/**/model.ckpt"))
    before = torch.load(checkpoint, weights_only=True)
    done = run(*fit("--ckpt_path", str(checkpoint), epochs=before["epoch"] + 3), cwd=folder)
    newest = max(folder.glob("results/**/model.ckpt"), key=os.path.getmtime)
    steps = [one["global_step"] for one in (before, torch.load(newest, weights_only=True))]
    stray = [p.name for p in folder.glob("results/**/lightning/*") if p.suffix != ".ckpt"]
    lost = f"the epoch under way; goes on from step {steps[0]} to {steps[1]}; stray files: {stray}"
    return Row("Killed", lost, RIGHT if done.code == 0 and steps[1] > steps[0] else DEFECT)


@fault("kill -9 in the first pass, cache on disk")
def _(folder: Path) -> Row:
    parts = next(whole().data.glob("*/train/good"))
    (folder / "parts/good").mkdir(parents=True)
    for file in parts.iterdir():
        shutil.copy(file, folder / "parts/good")
    os.mkfifo(folder / "parts/good/005.png.waits.png")  # reading it never ends
    data = ("--data", "Folder", "--data.name=p", "--data.root=parts", "--data.normal_dir=good")
    quick = ("--data.num_workers=0", "--data.val_split_mode=none", "--data.test_split_mode=none")
    cache = ("--model.cache=disk", "--model.cache_dir=cache", "--model.holdout=0")
    process = start(*ANOMALIB, "fit", *SMALL, *data, *quick, *cache, *QUIET, cwd=folder)
    when(process, lambda: "keeping" in (folder / "output").read_text(errors="replace"))
    time.sleep(2)
    ended = stop(process, signal.SIGKILL, folder)
    left = list((folder / "cache").iterdir())
    return Row("Killed", f"the pass; {len(left)} cache files left", RIGHT if ended.code == -9 and not left else DEFECT)


@fault("kill -9 in the export")
def _(folder: Path) -> Row:
    found = []
    for place, name in enumerate(("model.bin", "model.xml")):
        root = folder / f"export{place}"
        process = start(*export(), "--export_root", root, cwd=folder)
        when(process, lambda root=root, name=name: list(root.rglob(name)))
        stop(process, signal.SIGKILL, folder)
        model = root / "weights/openvino/model.xml"
        found.append((files(root), run(*score(whole().images, f"{place}.csv", model), cwd=folder)))
    texts = [f"left: {left}; `score` says: {done.row('', True).sees}" for left, done in found]
    well = all(done.code == 0 or "Traceback" not in done.output for _, done in found)
    return Row("Killed", "; ".join(texts), SENTENCE if well else DEFECT)


@fault("kill -9 in `score`, then the same command")
def _(folder: Path) -> Row:
    return _score_again(folder, signal.SIGKILL)


@fault("Ctrl-C in `score`, then the same command")
def _(folder: Path) -> Row:
    return _score_again(folder, signal.SIGINT)


def _score_again(folder: Path, how: signal.Signals) -> Row:
    images = many(folder)
    process = start(*score(images), cwd=folder)
    when(process, lambda: (folder / "scores.csv").exists() and len((folder / "scores.csv").read_bytes()) > 5000)
    ended = stop(process, how, folder)
    half = len(rows(folder / "scores.csv"))
    again = run(*score(images), cwd=folder)
    run(*score(images, "whole.csv"), cwd=folder)
    same = rows(folder / "scores.csv") == rows(folder / "whole.csv")
    row = ended.row(f"{half - 1} of 1500 rows were there; then the same CSV as without: {same}", same)
    done = same and again.code == 0
    return row._replace(
        sees="Killed" if how == signal.SIGKILL else row.sees,
        verdict=DEFECT if not done else RIGHT if how == signal.SIGKILL else row.verdict,
    )


@fault("Ctrl-C while training, then `fit --ckpt_path`")
def _(folder: Path) -> Row:
    process = start(*fit(epochs=500), cwd=folder)
    when(process, lambda: list(folder.glob("results/**/model.ckpt")))
    time.sleep(1)
    ended = stop(process, signal.SIGINT, folder)
    checkpoint = next(folder.glob("results/**/model.ckpt"))
    before = torch.load(checkpoint, weights_only=True)["epoch"] + 1
    again = run(*fit("--ckpt_path", str(checkpoint), epochs=before + 1), cwd=folder)
    return ended.row(f"the epoch under way; goes on from {before} passes: {again.code == 0}", again.code == 0)


# Full disks, and those that cannot be written


@fault("full disk: cache")
def _(folder: Path) -> Row:
    cache = ("--model.cache=disk", "--model.cache_dir=disk")
    done = run(*fit(*cache), cwd=folder, mount=tmpfs(200))
    said = next((line for line in done.output.splitlines() if "finds no room" in line), "nothing")
    trained = bool(list(folder.glob("results/**/model.ckpt")))
    return Row(said.strip(), f"the cache; trained: {trained}", RIGHT if trained and said != "nothing" else DEFECT)


@fault("full disk: first checkpoint")
def _(folder: Path) -> Row:
    return _full_checkpoint(folder, tmpfs(30_000))


FILLED = (
    "until find disk -name '*.ckpt' | grep -q .; do sleep .1; done; "
    "while sleep .01; do cat /dev/zero >> disk/filled; done"
)


@fault("full disk: later checkpoint")
def _(folder: Path) -> Row:
    return _full_checkpoint(folder, f"{tmpfs(150_000)} && {{ ({FILLED}) >&- 2>&- & }}")


@fault("full disk: later checkpoint, TMPDIR on the same disk")
def _(folder: Path) -> Row:
    return _full_checkpoint(folder, f"{tmpfs(150_000)} && export TMPDIR=$PWD/disk && {{ ({FILLED}) >&- 2>&- & }}")


def _full_checkpoint(folder: Path, mount: str) -> Row:
    done = run(*fit("--default_root_dir=disk", epochs=300), cwd=folder, mount=mount)
    left = list((folder / "kept").rglob("*.ckpt"))
    row = done.row(f"left: {files(folder / 'kept', '*.ckpt')}; whole: {[loads(path) for path in left]}", done.code != 0)
    return row if all(map(loads, left)) else row._replace(verdict=f"{DEFECT} (Lightning writes over it); {row.verdict}")


@fault("full disk: export")
def _(folder: Path) -> Row:
    done = run(*export(), "--export_root=disk", cwd=folder, mount=tmpfs(10_000))
    left = list((folder / "kept").rglob("*.xml"))
    again = run(*score(whole().images, model=left[0]), cwd=folder) if left else None
    lost = f"left: {files(folder / 'kept')}" + (f"; `score` says {again.row('', True).sees!r}" if again else "")
    return done.row(lost, done.code != 0 and (again is None or again.code == 1))


@fault("full disk: CSV")
def _(folder: Path) -> Row:
    images = many(folder, 300)
    done = run(*score(images, "disk/scores.csv"), cwd=folder, mount=tmpfs(4))
    shutil.copy(folder / "kept/scores.csv", folder / "scores.csv")
    half = len(rows(folder / "scores.csv"))
    run(*score(images), cwd=folder)
    run(*score(images, "whole.csv"), cwd=folder)
    same = rows(folder / "scores.csv") == rows(folder / "whole.csv")
    named = "scores.csv" in done.output
    return done.row(
        f"{half - 1} of 300 rows were there; copied to a disk with room, the same command made the same CSV: {same}",
        done.code == 1 and same and named,
    )


@fault("full disk: heat maps")
def _(folder: Path) -> Row:
    done = run(*score(whole().images), "--heatmaps", "disk", cwd=folder, mount=tmpfs(8))
    return done.row(f"left: {files(folder / 'kept')}", done.code != 0)


@fault("read-only working directory: training")
def _(folder: Path) -> Row:
    (folder / "disk").mkdir()
    done = run(*fit(), cwd=folder, mount=f"{read_only('.')} && cd '{folder}'")
    return done.row("nothing was there", done.code != 0)


@fault("read-only working directory: `score`")
def _(folder: Path) -> Row:
    done = run(*score(whole().images), cwd=folder, mount=f"{read_only('.')} && cd '{folder}'")
    return done.row("nothing was there", done.code == 1)


@fault("read-only cache_dir")
def _(folder: Path) -> Row:
    cache = ("--model.cache=disk", "--model.cache_dir=disk")
    done = run(*fit(*cache), cwd=folder, mount=read_only("disk"))
    said = next((line for line in done.output.splitlines() if "training goes on without" in line), "nothing")
    trained = bool(list(folder.glob("results/**/model.ckpt")))
    return Row(said.strip(), f"the cache; trained: {trained}", RIGHT if trained and said != "nothing" else DEFECT)


# Broken and hostile files


def _broken_checkpoint(folder: Path) -> Path:
    path = folder / "broken.ckpt"
    content = whole().checkpoint.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@fault("half a checkpoint: predict")
def _(folder: Path) -> Row:
    done = run(*predict(_broken_checkpoint(folder)), cwd=folder)
    return done.row("nothing", done.code != 0)


@fault("half a checkpoint: export")
def _(folder: Path) -> Row:
    done = run(*export(_broken_checkpoint(folder)), "--export_root=out", cwd=folder)
    return done.row(files(folder / "out") + " exported", done.code != 0)


@fault("half a checkpoint: verify")
def _(folder: Path) -> Row:
    command = ("-m", "stpm_plugin.commands", "verify", _broken_checkpoint(folder), whole().model, whole().images)
    done = run(*command, cwd=folder)
    return done.row("nothing", done.code == 1)


@fault("half an IR: .xml, .bin, no .bin")
def _(folder: Path) -> Row:
    said, well = [], True
    for cut in (".xml", ".bin", "no .bin"):
        for suffix in (".xml", ".bin"):
            content = whole().model.with_suffix(suffix).read_bytes()
            (folder / f"m{suffix}").write_bytes(content[: len(content) // 2] if suffix == cut else content)
        if cut == "no .bin":
            (folder / "m.bin").unlink()
        done = run(*score(whole().images, model=folder / "m.xml"), cwd=folder)
        said.append(done.row("", True).sees)
        well = well and done.code == 1 and "Traceback" not in done.output
    return Row(" / ".join(said), "nothing", SENTENCE if well else DEFECT)


class Bomb:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        """Call ``open``."""
        return open, (str(self.trace), "w")


def _bomb(folder: Path, name: str, *command: str | Path) -> Row:
    content = torch.load(whole().checkpoint, weights_only=True) if name.endswith("ckpt") else {}
    torch.save({**content, "bomb": Bomb(folder / "exploded")}, folder / name)
    done = run(*command, cwd=folder)
    ran = (folder / "exploded").exists()
    return done.row(f"nothing; the code in it ran: {ran}", done.code != 0 and not ran)


@fault("code in a .pth teacher: fit")
def _(folder: Path) -> Row:
    return _bomb(folder, "bomb.pth", *fit("--model.teacher_weights=bomb.pth"))


@fault("code in a checkpoint: fit")
def _(folder: Path) -> Row:
    return _bomb(folder, "bomb.ckpt", *fit("--ckpt_path", str(folder / "bomb.ckpt"), epochs=3))


@fault("code in a checkpoint: predict")
def _(folder: Path) -> Row:
    return _bomb(folder, "bomb.ckpt", *predict(folder / "bomb.ckpt"))


@fault("code in a checkpoint: export")
def _(folder: Path) -> Row:
    return _bomb(folder, "bomb.ckpt", *export(folder / "bomb.ckpt"), "--export_root=out")


@fault("code in a checkpoint: verify")
def _(folder: Path) -> Row:
    command = ("-m", "stpm_plugin.commands", "verify", folder / "bomb.ckpt", whole().model, whole().images)
    return _bomb(folder, "bomb.ckpt", *command)


# Files that vanish, odd paths


@fault("an image vanishes while augmented training reads")
def _(folder: Path) -> Row:
    shutil.copytree(whole().data, folder / "demo")
    flips = "--data.train_augmentations=torchvision.transforms.v2.RandomHorizontalFlip"
    process = start(*fit(flips, epochs=500, root=folder / "demo"), cwd=folder)
    when(process, lambda: list(folder.glob("results/**/model.ckpt")))
    next(folder.glob("demo/*/train/good")).joinpath("003.png").unlink()
    ended = end(process, folder)
    kept = [loads(path) for path in folder.glob("results/**/*.ckpt")]
    return ended.row(f"the epoch under way; checkpoints whole: {kept}", ended.code != 0 and kept == [True])


@fault("an image vanishes while `score` reads")
def _(folder: Path) -> Row:
    images = many(folder)
    process = start(*score(images), cwd=folder)
    when(process, lambda: (folder / "scores.csv").exists() and len((folder / "scores.csv").read_bytes()) > 500)
    (images / "1490.png").unlink()
    ended = end(process, folder)
    count = len(rows(folder / "scores.csv")) - 1
    return ended.row(f"its row alone: {count} of 1499", ended.code == 2 and count == 1499)


@fault("spaces and other alphabets in the paths of cache, checkpoint, export, images, CSV and heat maps")
def _(folder: Path) -> Row:
    place = folder / "Prüfung 検査 é"
    place.mkdir()
    shutil.copytree(whole().data, place / "Daten ñ")
    shutil.copy(whole().checkpoint, place / "m ö.ckpt")
    commands = [
        fit("--model.cache=disk", "--model.cache_dir=Ort ü"),
        (*export(place / "m ö.ckpt"), "--export_root", "Ausgabe ß"),
        (*score(place / "Daten ñ", "Tafel ä.csv", place / "Ausgabe ß/weights/openvino/model.xml"), "--heatmaps=Bilder"),
    ]
    ended = [run(*command, cwd=place) for command in commands]
    maps, images = (
        len(list((place / name).rglob(f"*.{end}"))) for name, end in (("Bilder", "jpg"), ("Daten ñ", "png"))
    )
    lost = f"fit, export, score end with {[done.code for done in ended]}; {maps} heat maps of {images} images"
    bad = next((done for done in ended if done.code), ended[-1])
    return bad.row(lost, not bad.code and maps == images)


@fault("spaces and other alphabets in the path of anomalib's data")
def _(folder: Path) -> Row:
    shutil.copytree(whole().images, folder / "Prüfung 検査 é")
    return run(*predict(whole().checkpoint, folder / "Prüfung 検査 é"), cwd=folder).row("nothing", True)


# Installations that are broken


BROKEN = {  # what is wrong: the file in the way, what it holds, and nothing for a file that is gone
    "wrapt is missing": ("wrapt.py", "raise ModuleNotFoundError(\"No module named 'wrapt'\")"),
    "a module of the plugin is gone": ("stpm_plugin/model/features.py", None),
    "a module of the plugin is cut off": ("stpm_plugin/training/lightning_model.py", "class STPM("),
    "anomalib is another version": ("anomalib/models/__init__.py", "def get_model(): ..."),
    "anomalib is missing": ("anomalib.py", "raise ModuleNotFoundError(\"No module named 'anomalib'\")"),
}


def broken_installation(folder: Path, file: str, content: str | None) -> Row:
    """Import torch and anomalib's models beside a broken installation."""
    shutil.copytree(ROOT / "stpm_plugin", folder / "stpm_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    place = folder / file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    if content is not None:
        for package in list(Path(file).parents)[:-1]:
            (folder / package / "__init__.py").touch()
        place.write_text(content)
    host = "anomalib.models" if "anomalib.py" not in file else "torch"  # there is none left
    done = run("-c", f"import torch; print('torch works'); import {host}; print('the host works')", cwd=folder)
    said = [line for line in done.output.splitlines() if "could not register" in line] or ["nothing"]
    if done.code or "the host works" not in done.output:
        return Row(said[-1], done.output[-300:], DEFECT)
    return Row(said[-1], f"STPM alone; {host} works", RIGHT)


for name, (file, content) in BROKEN.items():
    fault(f"broken installation: {name}")(functools.partial(broken_installation, file=file, content=content))


# Long runs


def soak(folder: Path, what: str, *command: str | Path) -> Row:
    """Watch a process's memory and open files: from a third of its time on, neither may grow."""
    process = start(*command, cwd=folder)
    watched, looks = psutil.Process(process.pid), []
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            looks.append((watched.memory_info().rss / 2**20, watched.num_fds()))
        time.sleep(0.5)
    ended = end(process, folder)
    thirds = [looks[len(looks) * part // 3 : len(looks) * (part + 1) // 3] for part in range(3)]
    memory, handles = ([median(look[which] for look in third) for third in thirds] for which in (0, 1))
    flat = memory[2] <= 1.05 * memory[1] and handles[2] <= handles[1]
    told = " / ".join(f"{one:.0f}" for one in memory), " / ".join(f"{one:.0f}" for one in handles)
    lost = f"{what}; memory in the thirds of the run, medians: {told[0]} MiB, open files: {told[1]}"
    return ended.row(lost, ended.code == 0 and flat)


@fault("soak: 50,000 images scored")
def _(folder: Path) -> Row:
    row = soak(folder, "50,000 rows", *score(many(folder, 50_000)))
    count = len(rows(folder / "scores.csv")) - 1
    return row if count == 50_000 else row._replace(lost=f"{count} rows of 50,000", verdict=DEFECT)


@fault("soak: 300 passes of training")
def _(folder: Path) -> Row:
    return soak(folder, "300 passes", *fit(epochs=300))


@fault("soak: 300 passes of training, nothing kept, two workers")
def _(folder: Path) -> Row:
    return soak(folder, "300 passes", *fit("--model.cache=off", "--data.num_workers=2", epochs=300))


# Kinds of images


def kinds(folder: Path) -> dict[str, Path]:
    """Write one image of each kind."""
    rgb = Image.open(sorted(whole().images.iterdir())[0]).convert("RGB")
    grey = np.asarray(rgb.convert("L")).astype(np.uint16)
    noise = np.random.default_rng(0).integers(0, 256, (*grey.shape, 3), np.uint16)
    clear = rgb.copy()
    clear.putalpha(Image.linear_gradient("L"))
    turned = Image.Exif()
    turned[0x0112] = 6
    others = [rgb.rotate(90), rgb.rotate(180)]
    colours = np.asarray(rgb)[:, :, ::-1].astype(np.uint16) * 256 + noise
    whole_jpeg = _encoded(rgb, "JPEG", quality=95)
    made = {
        "RGB PNG": ("png", _encoded(rgb, "PNG")),
        "RGB JPEG": ("jpg", whole_jpeg),
        "16-bit grey PNG": ("png", _encoded(Image.fromarray(grey * 256 + noise[:, :, 0]), "PNG")),
        "16-bit grey TIFF": ("tif", _encoded(Image.fromarray(grey * 256 + noise[:, :, 0]), "TIFF")),
        "16-bit colour PNG": ("png", cv2.imencode(".png", colours)[1].tobytes()),
        "1-bit PNG": ("png", _encoded(rgb.convert("1"), "PNG")),
        "grey PNG": ("png", _encoded(rgb.convert("L"), "PNG")),
        "palette PNG": ("png", _encoded(rgb.quantize(64), "PNG")),
        "palette PNG, one colour transparent": ("png", _encoded(rgb.quantize(64), "PNG", transparency=3)),
        "RGBA PNG": ("png", _encoded(clear, "PNG")),
        "RGBA TIFF": ("tif", _encoded(clear, "TIFF")),
        "CMYK JPEG": ("jpg", _encoded(rgb.convert("CMYK"), "JPEG", quality=95)),
        "JPEG with EXIF rotation": ("jpg", _encoded(rgb.resize((256, 128)), "JPEG", quality=95, exif=turned)),
        "animated PNG": ("png", _encoded(rgb, "PNG", save_all=True, append_images=others)),
        "animated PNG, still image apart": (
            "png",
            _encoded(rgb, "PNG", save_all=True, append_images=others, default_image=True),
        ),
        "animated GIF": ("gif", _encoded(rgb, "GIF", save_all=True, append_images=others)),
        "1 x 1": ("png", _encoded(rgb.resize((1, 1)), "PNG")),
        "20,000 x 64": ("png", _encoded(rgb.resize((20_000, 64)), "PNG")),
        "0 bytes": ("png", b""),
        "half a JPEG": ("jpg", whole_jpeg[: len(whole_jpeg) // 2]),
        "half a PNG": ("png", _encoded(rgb, "PNG")[:20_000]),
    }
    paths = {}
    for number, (name, (suffix, content)) in enumerate(made.items()):
        (folder / f"{number}").mkdir()
        paths[name] = folder / f"{number}" / f"odd.{suffix}"
        paths[name].write_bytes(content)
    return paths


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


TRAINING_ROUTE = (
    f"TEACHER = {str(TEACHER)!r}"
    + """
import json, shutil, sys, torch
from pathlib import Path
from anomalib.data import Folder
from anomalib.engine import Engine
from stpm_plugin import STPM
checkpoint, good, kinds = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
arguments = dict(backbone="resnet18", teacher_weights=TEACHER, image_size=(64, 64), seed=0)
trained = STPM.load_from_checkpoint(checkpoint).eval()
said = {}
for name, path in kinds.items():
    parts = Path("parts", path.split("/")[-2]); shutil.copytree(good, parts / "good"); shutil.copy(path, parts / "good")
    try:
        data = Folder("p", "good", root=parts, val_split_mode="none", test_split_mode="none", num_workers=0)
        engine = Engine(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=False)
        engine.fit(STPM(**arguments), datamodule=data)
        samples = data.train_data.samples
        odd = [*samples.image_path.str.contains("odd")]
        image = data.train_data[odd.index(True)].image[None] if any(odd) else None
        said[name] = "not listed, no word" if image is None else float(trained(image).pred_score)
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
Path("said.json").write_text(json.dumps(said))
"""
)
PREDICT_ROUTE = """
import json, sys
from pathlib import Path
from anomalib.engine import Engine
from stpm_plugin import STPM
checkpoint, _, kinds = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
said = {}
for name, path in kinds.items():
    try:
        engine = Engine(accelerator="cpu", enable_progress_bar=False, logger=False)
        made = engine.predict(STPM(backbone="resnet18"), data_path=path, ckpt_path=checkpoint)
        said[name] = float(made[0].pred_score)
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
Path("said.json").write_text(json.dumps(said))
"""


def try_kinds(folder: Path) -> dict[str, dict[str, str]]:
    """Take each kind of image through training, `anomalib predict` and `score`.

    The three scores of an image come from one trained model, so they are equal if the three read the same pixels.
    """
    paths = kinds(folder)
    named = json.dumps({name: str(path) for name, path in paths.items()})
    routes: dict[str, dict[str, float | str]] = {}
    for route, code in (("training", TRAINING_ROUTE), ("predict", PREDICT_ROUTE)):
        place = folder / route
        place.mkdir()
        good = next(whole().data.glob("*/train/good"))
        done = run("-c", code, whole().checkpoint, good, named, cwd=place)
        expect(done)
        routes[route] = json.loads((place / "said.json").read_text())
    routes["score"] = {}
    for name, path in paths.items():
        done = run(*score(path, f"{path.parent.name}.csv"), cwd=folder)
        table = folder / f"{path.parent.name}.csv"
        found = rows(table)[1:] if table.exists() else []
        routes["score"][name] = float(found[0][1]) if found else done.row("", True).sees
    return {
        name: judged({route: said[name] for route, said in routes.items()}, difference(path), str(folder))
        for name, path in paths.items()
    }


def difference(path: Path) -> int | None:
    """Largest difference of a pixel, of 255, as anomalib and as `score` read it; nothing where either does not."""
    try:
        (_, ours), theirs = next(read_images([str(path)], str, lambda image, _: image)), read_image(path) * 255
        return int(np.abs(ours[:, :, ::-1] - theirs.round()).max())
    except (OSError, StopIteration):
        return None


def judged(said: dict[str, float | str], apart: int | None, folder: str) -> dict[str, str]:
    """One image's row: what each route said, how far pixels are apart, and whether that is well."""
    numbers = [value for value in said.values() if not isinstance(value, str)]
    texts = {route: value for route, value in said.items() if isinstance(value, str)}
    if numbers and texts.keys() == {"score"} and max(numbers) - min(numbers) <= SAME:
        verdict = f"{SENTENCE} by `score`, which reads it otherwise; training and predict: {RIGHT}"
    elif numbers and (texts or max(numbers) - min(numbers) > SAME or apart is None or apart > 1):
        verdict = f"{DEFECT}: the routes differ"
    elif texts and "STPMError" not in texts["predict"]:
        verdict = f"{SENTENCE}; predict: {HOST}"
    else:
        verdict = SENTENCE if texts else RIGHT
    shown = {r: clean(v, folder) if isinstance(v, str) else f"{v:.4f}" for r, v in said.items()}
    return {**shown, "pixels": "" if apart is None else str(apart), "verdict": verdict}


# The table


def clean(text: str, *folders: str) -> str:
    """Shorten a line and take the folders of this machine out of it."""
    for folder in sorted({*folders, str(ROOT), sys.prefix, tempfile.gettempdir()}, key=len, reverse=True):
        text = text.replace(folder, "...")
    return " ".join(text.split())[:400]


def write(kept: dict) -> None:
    """Write both files."""
    RESULT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    heads = [
        f"`{head['command']}`, {head['date']}, {', '.join(map(' '.join, head['versions'].items()))}, {head['machine']}"
        for head in kept["environments"]
    ]
    lines = ["; later in parts: ".join(heads) + ".", ""]
    lines += ["| fault | the user sees last | lost, left | verdict |", "|---|---|---|---|"]
    for name, row in ((name, kept["faults"][name]) for name in FAULTS if name in kept["faults"]):
        lines.append("| " + " | ".join(_cell(text) for text in (name, *row.values())) + " |")
    lines += [
        "",
        f"`{RIGHT}`: it goes on, or nothing was to be said. `{SENTENCE}`: refused in one sentence. `{HOST}`: anomalib, "
        f"Lightning or torch stops before the plugin is asked, with a trace. `{DEFECT}`: neither; in brackets, whose.",
        "",
        "An image through training, `predict` and `score`: its score by the same trained model, or what is said.",
        "",
        "| image | training | `anomalib predict` | `score` | pixels apart, of 255 | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in kept["images"].items():
        lines.append("| " + " | ".join(_cell(text) for text in (name, *row.values())) + " |")
    RESULT.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Provoke the faults and write the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.reliability", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "names", nargs="*", help="words in the names of faults, or `images` for their kinds; all by default"
    )
    chosen = parser.parse_args().names
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {"faults": {}, "images": {}}
    here = environment("python -m benchmarks.reliability")
    kept["environments"] = [*(one for one in kept.get("environments", []) if chosen and one != here), here]
    with tempfile.TemporaryDirectory(prefix="reliability ") as name:
        root = Path(name)
        make_whole(root / "whole")
        for number, (name, provoke) in enumerate(FAULTS.items()):
            if chosen and not any(word in name for word in chosen if word != "images"):
                continue
            folder = root / str(number)
            folder.mkdir()
            mounted = "disk:" in name or "read-only" in name
            row = provoke(folder) if CAN_MOUNT or not mounted else Row("", "mounting is not allowed here", UNTRIED)
            kept["faults"][name] = {key: clean(text, str(folder), str(root)) for key, text in row._asdict().items()}
            print(name, *kept["faults"][name].values(), sep="\n    ", flush=True)
            write(kept)
            shutil.rmtree(folder)
        if not chosen or "images" in chosen:
            (root / "images").mkdir()
            kept["images"] = try_kinds(root / "images")
            for name, row in kept["images"].items():
                print(name, *row.values(), sep="\n    ", flush=True)
            write(kept)


if __name__ == "__main__":
    main()
