"""What happens on full and read-only disks and in long runs, on the drawn demo data.

    python -m benchmarks.reliability run                  # all, about half an hour on two cores
    python -m benchmarks.reliability run "full disk"      # faults whose names hold these words; other rows are kept
    python -m benchmarks.reliability table                # write the table again

`results/reliability.json` and `reliability.md` say what was tried, what the user sees and what was lost. The disks are
real ones, mounted in a name space of the child's own (`unshare`). Faults that need no disk of their own and no minutes
are tests, and so are kinds of images (`tests/test_score.py`); their rows stay as they were measured, those of images by
the command as of commit 951a4ce.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks.environment import environment, fit, markdown, parser, rows
from stpm_plugin import STPM, DemoData

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "tests/cifar10_teacher.safetensors"
RIGHT, SENTENCE, HOST, DEFECT = "right", "one sentence", "the host's words", "DEFECT"

# Arguments of Python, in a fault's own folder. Beside it is `whole`: data, a checkpoint and an export without faults.
IMAGES, MANY = "../whole/images", "../whole/many"
NETWORK = ("--model=STPM", "--model.backbone=resnet18")
SMALL = (*NETWORK, f"--model.teacher_weights={TEACHER}", "--model.image_size=[64,64]", "--model.seed=0")
DATA = ("--data=stpm_plugin.DemoData", "--data.root=../whole/demo", "--data.train_images=10", "--data.test_images=2")
CPU = ("--data.val_split_mode=none", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
FIT = ("-m", "stpm_plugin", "fit", *SMALL, *DATA, *CPU)
EXPORT = ("-m", "stpm_plugin", "export", *NETWORK, "--export_type=openvino", "--ckpt_path=../whole/model.ckpt")
SCORE = ("-m", "stpm_plugin.commands", "score", "../whole/weights/openvino/model.xml")
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
    """Train and export without faults, and lay out images, the same few over and over."""
    model = STPM(backbone="resnet18", teacher_weights=str(TEACHER), image_size=(64, 64), seed=0)
    data = DemoData(folder / "demo", train_images=10, test_images=2, val_split_mode="none")
    engine, _ = fit(model, data, folder, accelerator="cpu", max_epochs=2)
    shutil.copy(engine.best_model_path, folder / "model.ckpt")
    model.to_openvino(folder)
    images = sorted(shutil.copytree(next(folder.glob("demo/*/train/good")), folder / "images").iterdir())
    (folder / "many").mkdir()
    for number in range(50_000):
        os.link(images[number % len(images)], folder / f"many/{number}.png")


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
    said = [line.strip() for line in done.output.splitlines() if "training continues without it" in line]
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


FAULTS: dict[str, tuple[Any, ...]] = {  # what provokes it, and with which arguments after its folder
    "full disk: cache": (no_cache, TMPFS.format(200)),
    "full disk: first checkpoint": (no_checkpoint, TMPFS.format(30_000)),
    "full disk: later checkpoint": (no_checkpoint, TMPFS.format(150_000) + FILLS),
    "full disk: later checkpoint, TMPDIR on the same disk": (
        no_checkpoint,
        TMPFS.format(150_000) + ' && export TMPDIR="$PWD/disk"' + FILLS,
    ),
    "full disk: export": (refused, TMPFS.format(10_000), *EXPORT, "--export_root=disk"),
    "full disk: CSV": (refused, TMPFS.format(4), *SCORE, MANY, "--csv=disk/scores.csv"),
    "full disk: heat maps": (refused, TMPFS.format(8), *SCORE, IMAGES, "--heatmaps=disk"),
    "read-only working directory: training": (refused, READ_ONLY_HERE, *FIT, ONCE),
    "read-only working directory: `score`": (refused, READ_ONLY_HERE, *SCORE, IMAGES),
    "read-only cache_dir": (no_cache, READ_ONLY.format("disk")),
    "soak: 50,000 images scored": (soak, *SCORE, MANY),
    "soak: 300 passes of training": (soak, *FIT, LONG),
    "soak: 300 passes of training, nothing kept, two workers": (
        soak,
        *(*FIT, LONG, "--model.cache=off", "--data.num_workers=2"),
    ),
}


def clean(text: str, *folders: Path) -> str:
    """Shorten a line and take the folders of this machine out of it."""
    for folder in (*folders, ROOT, sys.prefix, tempfile.gettempdir()):
        text = text.replace(str(folder), "...")
    return " ".join(text.split())[:400]


def write(kept: dict, file: Path) -> None:
    """Write both files."""
    file.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    runs = [
        f"`{run['command']}`, {run['date']}, {', '.join(map(' '.join, run['versions'].items()))}, {run['machine']}"
        for run in kept["environments"]
    ]
    faults, images = ([[name, *row.values()] for name, row in kept[part].items()] for part in ("faults", "images"))
    parts = [
        "; later in parts: ".join(runs) + ".",
        markdown([["fault", "the user sees last", "lost, left", "verdict"], *faults]),
        f"`{RIGHT}`: it goes on, or nothing was to be said. `{SENTENCE}`: refused in one sentence. `{HOST}`: anomalib, "
        f"Lightning or torch stops before the plugin is asked, with a trace. `{DEFECT}`: neither; in brackets, whose.",
        "An image through training, `predict` and `score`: its score by the same trained model, or what is said.",
        markdown([["image", "training", "`anomalib predict`", "`score`", "pixels apart, of 255", "verdict"], *images]),
    ]
    file.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    """Provoke the faults and write the table."""
    options = parser(__doc__, ["run", "table"])
    options.add_argument("names", nargs="*", help="words in faults' names; by default all")
    args = options.parse_args()
    file = args.results / "reliability.json"
    kept = rows(file) or {"faults": {}, "images": {}, "environments": []}
    if args.part == "run":
        os.environ.update(HF_HUB_OFFLINE="1", COLUMNS="400", TQDM_DISABLE="1")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        here = environment("python -m benchmarks.reliability run")
        kept["environments"] = [*(one for one in kept["environments"] if one != here), here]
        with tempfile.TemporaryDirectory(prefix="reliability ") as name:
            root = Path(name)
            make_whole(root / "whole")
            for number, (fault, (provoke, *arguments)) in enumerate(FAULTS.items()):
                if not args.names or any(word in fault for word in args.names):
                    (folder := root / str(number)).mkdir()
                    row = {key: clean(text, folder, root) for key, text in provoke(folder, *arguments).items()}
                    kept["faults"][fault] = row
                    print(fault, *row.values(), sep="\n    ", flush=True)
                    write(kept, file)
    write(kept, file)


if __name__ == "__main__":
    main()
