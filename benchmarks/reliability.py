"""What happens on full and read-only disks, in long runs and with odd images, on the drawn demo data.

    python -m benchmarks.reliability                  # all, about half an hour on two cores
    python -m benchmarks.reliability "full disk"      # faults whose names hold these words; other rows are kept
    python -m benchmarks.reliability images           # kinds of images
    python -m benchmarks.reliability table            # write the table again

`results/reliability.json` and `reliability.md` say what was tried, what the user sees and what was lost. The disks are
real ones, mounted in a name space of the child's own (`unshare`). Faults that need no disk of their own and no minutes
are tests; their rows stay as they were measured.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import psutil
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from PIL import Image

from benchmarks.environment import environment
from stpm_plugin import STPM, DemoData
from stpm_plugin.commands.entry import main as stpm
from stpm_plugin.deployment.images import read_images

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "tests/cifar10_teacher.safetensors"
RESULT = ROOT / "benchmarks/results/reliability.json"
SAME = 5e-4  # of scores, by routes that decode, resize and compute in different libraries
RIGHT, SENTENCE, HOST, DEFECT = "right", "one sentence", "the host's words", "DEFECT"

# Arguments of Python, in a fault's own folder. Beside it is `whole`: data, a checkpoint and an export without faults.
MODEL, IMAGES = "weights/openvino/model.xml", "../whole/images"
NETWORK = ("--model=STPM", "--model.backbone=resnet18")
SMALL = (*NETWORK, f"--model.teacher_weights={TEACHER}", "--model.image_size=[64,64]", "--model.seed=0")
DATA = ("--data=stpm_plugin.DemoData", "--data.root=../whole/demo", "--data.train_images=10", "--data.test_images=2")
CPU = ("--data.val_split_mode=none", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
FIT = ("-m", "stpm_plugin", "fit", *SMALL, *DATA, *CPU)
EXPORT = ("-m", "stpm_plugin", "export", *NETWORK, "--export_type=openvino", "--ckpt_path=../whole/model.ckpt")
SCORE = ("-m", "stpm_plugin.commands", "score", f"../whole/{MODEL}")
SETTINGS = {"backbone": "resnet18", "teacher_weights": str(TEACHER), "image_size": (64, 64), "seed": 0}
ENGINE = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
ONCE, LONG = "--trainer.max_epochs=1", "--trainer.max_epochs=300"


class Ended(NamedTuple):
    """A process that has ended: its exit code, all that it printed, and twice a second its MiB and open files."""

    code: int
    output: str
    looks: list[tuple[float, int]]

    def row(self, lost: str, well: bool) -> dict[str, str]:
        """What the user sees last, what the check after it found, and whether it is well, which ``well`` says."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()] or ["nothing"]
        refused = [line for line in lines if self.code and "STPMError: " in line]
        verdict = RIGHT if self.code == 0 else SENTENCE if refused or "Traceback" not in self.output else HOST
        return {"sees": (refused or lines)[-1], "lost": lost, "verdict": verdict if well else DEFECT}


def run(*command: str | Path, cwd: Path, mount: str = "") -> Ended:
    """Run Python with arguments to its end.

    ``mount`` is a shell command that mounts something for this process alone. What is then in the folder ``disk`` is
    copied to ``kept``, since a mount of its own ends with the process.
    """
    line = [sys.executable, *map(str, command)]
    if mount:
        after = "kill %1 2>&-; rm -f disk/filled; cp -a disk/. kept 2>&-"
        shell = f'{mount} || exit 99; "$@"; code=$?; {after}; exit $code'
        line = ["unshare", "--map-root-user", "--mount", "sh", "-c", shell, "sh", *line]
    for folder in ("disk", "kept"):
        (cwd / folder).mkdir(exist_ok=True)
    with (cwd / "output").open("wb") as output:
        process, looks = psutil.Popen(line, cwd=cwd, stdout=output, stderr=subprocess.STDOUT), []
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            looks.append((process.memory_info().rss / 2**20, process.num_fds()))
        time.sleep(0.5)
    return Ended(process.returncode, (cwd / "output").read_text(errors="replace"), looks)


def make_whole(folder: Path) -> None:
    """Train and export without faults."""
    trains, model = Engine(default_root_dir=folder, max_epochs=2, **ENGINE), STPM(**SETTINGS)
    trains.fit(model, datamodule=DemoData(folder / "demo", train_images=10, test_images=2, val_split_mode="none"))
    shutil.copy(trains.best_model_path, folder / "model.ckpt")
    model.to_openvino(folder)
    shutil.copytree(next(folder.glob("demo/*/train/good")), folder / "images")


def many(folder: Path, count: int) -> Path:
    """A folder of many images, the same few over and over."""
    images = sorted((folder / IMAGES).iterdir())
    (folder / "many").mkdir()
    for number in range(count):
        os.link(images[number % len(images)], folder / "many" / f"{number}.png")
    return folder / "many"


# Disks that are full or cannot be written

TMPFS = "mount -t tmpfs -o size={}k none disk"
READ_ONLY = "mount --bind {0} {0} && mount -o remount,bind,ro {0}"  # root cannot write there either
READ_ONLY_HERE = READ_ONLY.format(".") + ' && cd "$PWD"'
FILLS = (  # the disk, once the first checkpoint is there
    " && { (until find disk -name '*.ckpt' | grep -q .; do sleep .1; done; "
    "while sleep .01; do cat /dev/zero >> disk/filled; done) >&- 2>&- & }"
)


def refused(folder: Path, mount: str, *command: str | Path) -> dict[str, str]:
    """A command stops; what it leaves on the disk is listed."""
    done = run(*command, cwd=folder, mount=mount)
    left = [f"{path.name} ({path.stat().st_size} bytes)" for path in sorted(folder.glob("kept/**/*")) if path.is_file()]
    return done.row(f"left: {', '.join(left) or 'no file'}", done.code != 0)


def no_cache(folder: Path, mount: str) -> dict[str, str]:
    """Training warns and goes on without its cache."""
    done = run(*FIT, ONCE, "--model.cache=disk", "--model.cache_dir=disk", cwd=folder, mount=mount)
    said = [line.strip() for line in done.output.splitlines() if "training goes on without it" in line]
    trained = bool(list(folder.glob("results/**/model.ckpt")))
    verdict = RIGHT if said and trained else DEFECT
    return {"sees": (said or ["nothing"])[-1], "lost": f"the cache; trained: {trained}", "verdict": verdict}


def no_checkpoint(folder: Path, mount: str) -> dict[str, str]:
    """Training stops, and each checkpoint that is left is whole."""
    row = refused(folder, mount, *FIT, LONG, "--default_root_dir=disk")
    whole = [zipfile.is_zipfile(path) for path in folder.glob("kept/**/*.ckpt")]
    return row | {"lost": f"{row['lost']}; whole: {whole}", "verdict": row["verdict"] if all(whole) else DEFECT}


def soak(folder: Path, *command: str | Path) -> dict[str, str]:
    """Watch a process's memory and open files: from a third of its time on, neither may grow."""
    done = run(*command, cwd=folder)
    thirds = np.array_split(done.looks, 3)
    memory, handles = ([round(float(np.median(third[:, which]))) for third in thirds] for which in (0, 1))
    lost = f"memory in the thirds of the run, medians, in MiB: {memory}; open files: {handles}"
    return done.row(lost, done.code == 0 and memory[2] <= 1.05 * memory[1] and handles[2] <= handles[1])


FAULTS: dict[str, Callable[[Path], dict[str, str]]] = {
    "full disk: cache": lambda folder: no_cache(folder, TMPFS.format(200)),
    "full disk: first checkpoint": lambda folder: no_checkpoint(folder, TMPFS.format(30_000)),
    "full disk: later checkpoint": lambda folder: no_checkpoint(folder, TMPFS.format(150_000) + FILLS),
    "full disk: later checkpoint, TMPDIR on the same disk": lambda folder: no_checkpoint(
        folder, TMPFS.format(150_000) + ' && export TMPDIR="$PWD/disk"' + FILLS
    ),
    "full disk: export": lambda folder: refused(folder, TMPFS.format(10_000), *EXPORT, "--export_root=disk"),
    "full disk: CSV": lambda folder: refused(
        folder, TMPFS.format(4), *SCORE, many(folder, 300), "--csv=disk/scores.csv"
    ),
    "full disk: heat maps": lambda folder: refused(folder, TMPFS.format(8), *SCORE, IMAGES, "--heatmaps=disk"),
    "read-only working directory: training": lambda folder: refused(folder, READ_ONLY_HERE, *FIT, ONCE),
    "read-only working directory: `score`": lambda folder: refused(folder, READ_ONLY_HERE, *SCORE, IMAGES),
    "read-only cache_dir": lambda folder: no_cache(folder, READ_ONLY.format("disk")),
    "soak: 50,000 images scored": lambda folder: soak(folder, *SCORE, many(folder, 50_000)),
    "soak: 300 passes of training": lambda folder: soak(folder, *FIT, LONG),
    "soak: 300 passes of training, nothing kept, two workers": lambda folder: soak(
        folder, *FIT, LONG, "--model.cache=off", "--data.num_workers=2"
    ),
}


# Kinds of images


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """The bytes of an image's file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def kinds(rgb: Image.Image) -> dict[str, tuple[str, bytes]]:
    """An image as files of each kind: their suffixes and contents."""
    pixels, grey = np.asarray(rgb).astype(np.uint16), np.asarray(rgb.convert("L")).astype(np.uint16)
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint16)
    deep = Image.fromarray(grey * 256 + noise[:, :, 0])
    clear = rgb.copy()
    clear.putalpha(Image.linear_gradient("L"))
    turned = Image.Exif()
    turned[0x0112] = 6
    animated = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    png, jpeg = encoded(rgb), encoded(rgb, "JPEG", quality=95)
    return {
        "RGB PNG": ("png", png),
        "RGB JPEG": ("jpg", jpeg),
        "16-bit grey PNG": ("png", encoded(deep)),
        "16-bit grey TIFF": ("tif", encoded(deep, "TIFF")),
        "16-bit colour PNG": ("png", cv2.imencode(".png", pixels[:, :, ::-1] * 256 + noise)[1].tobytes()),
        "1-bit PNG": ("png", encoded(rgb.convert("1"))),
        "grey PNG": ("png", encoded(rgb.convert("L"))),
        "palette PNG": ("png", encoded(rgb.quantize(64))),
        "palette PNG, one colour transparent": ("png", encoded(rgb.quantize(64), transparency=3)),
        "RGBA PNG": ("png", encoded(clear)),
        "RGBA TIFF": ("tif", encoded(clear, "TIFF")),
        "CMYK JPEG": ("jpg", encoded(rgb.convert("CMYK"), "JPEG", quality=95)),
        "JPEG with EXIF rotation": ("jpg", encoded(rgb.resize((256, 128)), "JPEG", quality=95, exif=turned)),
        "animated PNG": ("png", encoded(rgb, **animated)),
        "animated PNG, still image apart": ("png", encoded(rgb, default_image=True, **animated)),
        "animated GIF": ("gif", encoded(rgb, "GIF", **animated)),
        "1 x 1": ("png", encoded(rgb.resize((1, 1)))),
        "20,000 x 64": ("png", encoded(rgb.resize((20_000, 64)))),
        "0 bytes": ("png", b""),
        "half a JPEG": ("jpg", jpeg[: len(jpeg) // 2]),
        "half a PNG": ("png", png[:20_000]),
    }


def by_training(path: Path, whole: Path) -> float | str:
    """Train with the image among good ones; the score is of the pixels that training got."""
    parts = path.parent / "parts"
    shutil.copytree(whole / "images", parts / "good")
    shutil.copy(path, parts / "good")
    data = Folder("p", "good", root=parts, val_split_mode="none", test_split_mode="none", num_workers=0)
    Engine(default_root_dir=path.parent, max_epochs=1, **ENGINE).fit(STPM(**SETTINGS), datamodule=data)
    odd = [*data.train_data.samples.image_path.str.contains(path.name)]
    if not any(odd):
        return "not listed, no word"
    model = STPM.load_from_checkpoint(whole / "model.ckpt").eval()
    return float(model(data.train_data[odd.index(True)].image[None]).pred_score)


def by_predict(path: Path, whole: Path) -> float:
    """Predict as `anomalib predict` does."""
    predicts, model = Engine(default_root_dir=path.parent, **ENGINE), STPM(backbone="resnet18")
    return float(predicts.predict(model, data_path=path, ckpt_path=whole / "model.ckpt")[0].pred_score)


def by_score(path: Path, whole: Path) -> float | str:
    """Score with `stpm score`."""
    table, said = path.parent / "scores.csv", io.StringIO()
    with contextlib.redirect_stderr(said):
        stpm(["score", str(whole / MODEL), str(path), f"--csv={table}"])
    row = next(csv.DictReader(table.read_text().splitlines()), None) if table.exists() else None
    return float(row["score"]) if row else next(line for line in said.getvalue().splitlines() if str(path) in line)


ROUTES = {"training": by_training, "predict": by_predict, "score": by_score}


def difference(path: Path) -> int | None:
    """Largest difference of a pixel, of 255, as anomalib and as `score` read it; nothing where either does not."""
    try:
        (_, ours), theirs = next(read_images([str(path)], str, lambda image, _: image)), read_image(path) * 255
        return int(np.abs(ours[:, :, ::-1] - theirs.round()).max())
    except (OSError, StopIteration):
        return None


def judged(said: dict[str, float | str], apart: int | None) -> str:
    """Whether it is well what the routes said; scores are equal if all three read the same pixels."""
    numbers = [value for value in said.values() if not isinstance(value, str)]
    texts = {route: value for route, value in said.items() if isinstance(value, str)}
    equal = not numbers or max(numbers) - min(numbers) <= SAME
    if numbers and texts.keys() == {"score"} and equal:
        return f"{SENTENCE} by `score`, which reads it otherwise; training and predict: {RIGHT}"
    if numbers and (texts or not equal or apart is None or apart > 1):
        return f"{DEFECT}: the routes differ"
    if texts and "STPMError" not in str(texts["predict"]):
        return f"{SENTENCE}; predict: {HOST}"
    return SENTENCE if texts else RIGHT


def try_kinds(folder: Path) -> dict[str, dict[str, str]]:
    """Take an image of each kind through the three routes, by one trained model."""
    whole, table = folder.parent / "whole", {}
    unseen = Image.open(min(whole.glob("demo/*/test/good/*.png")))
    for number, (name, (suffix, content)) in enumerate(kinds(unseen).items()):
        path = folder / str(number) / f"odd.{suffix}"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        said: dict[str, float | str] = {}
        for route, score in ROUTES.items():
            try:
                said[route] = score(path, whole)
            except Exception as error:
                said[route] = f"{type(error).__name__}: {error}"
        apart = difference(path)
        shown = {route: clean(one, folder) if isinstance(one, str) else f"{one:.4f}" for route, one in said.items()}
        table[name] = {**shown, "pixels": "" if apart is None else str(apart), "verdict": judged(said, apart)}
        print(name, *table[name].values(), sep="\n    ", flush=True)
    return table


# The table


def clean(text: str, *folders: Path) -> str:
    """Shorten a line and take the folders of this machine out of it."""
    for folder in (*folders, ROOT, sys.prefix, tempfile.gettempdir()):
        text = text.replace(str(folder), "...")
    return " ".join(text.split())[:400]


def write(kept: dict) -> None:
    """Write both files."""
    RESULT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    runs = [
        f"`{run['command']}`, {run['date']}, {', '.join(map(' '.join, run['versions'].items()))}, {run['machine']}"
        for run in kept["environments"]
    ]
    lines = [
        "; later in parts: ".join(runs) + ".",
        "",
        "| fault | the user sees last | lost, left | verdict |",
        "|---|---|---|---|",
        *map(line_of, kept["faults"].items()),
        "",
        f"`{RIGHT}`: it goes on, or nothing was to be said. `{SENTENCE}`: refused in one sentence. `{HOST}`: anomalib, "
        f"Lightning or torch stops before the plugin is asked, with a trace. `{DEFECT}`: neither; in brackets, whose.",
        "",
        "An image through training, `predict` and `score`: its score by the same trained model, or what is said.",
        "",
        "| image | training | `anomalib predict` | `score` | pixels apart, of 255 | verdict |",
        "|---|---|---|---|---|---|",
        *map(line_of, kept["images"].items()),
    ]
    RESULT.with_suffix(".md").write_text("\n".join(lines) + "\n")


def line_of(named: tuple[str, dict[str, str]]) -> str:
    """A row as a line of Markdown."""
    cells = [text.replace("|", "\\|").replace("<", "&lt;") for text in (named[0], *named[1].values())]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Provoke the faults and write the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.reliability", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="words in faults' names, `images` or `table`; by default all")
    chosen = parser.parse_args().names
    kept = json.loads(RESULT.read_text())
    if chosen == ["table"]:
        write(kept)
        return
    os.environ.update(HF_HUB_OFFLINE="1", COLUMNS="400", TQDM_DISABLE="1")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    here = environment("python -m benchmarks.reliability")
    kept["environments"] = [*(one for one in kept["environments"] if one != here), here]
    with tempfile.TemporaryDirectory(prefix="reliability ") as name:
        root = Path(name)
        make_whole(root / "whole")
        for number, (fault, provoke) in enumerate(FAULTS.items()):
            if chosen and not any(word in fault for word in chosen if word != "images"):
                continue
            folder = root / str(number)
            folder.mkdir()
            kept["faults"][fault] = {key: clean(text, folder, root) for key, text in provoke(folder).items()}
            print(fault, *kept["faults"][fault].values(), sep="\n    ", flush=True)
            write(kept)
        if not chosen or "images" in chosen:
            kept["images"] = try_kinds(root / "images")
    write(kept)


if __name__ == "__main__":
    main()
