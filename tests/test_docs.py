"""Each command of the README and of docs/ runs, on the drawn data, but for those that say what they need."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import openvino as ov
import pytest
import torch
import warm
import yaml
from conftest import TEACHER, TINY

from stpm_plugin.commands.entry import main as stpm

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
INSTALLS = "pip "  # the README's first screen: tried on a fresh machine, the second of the two by CI
TESTED_ELSEWHERE = ("--trainer.strategy ddp", "--ray local", "AUTOLOAD=0 python")  # and each takes long
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks that need no more than this machine has."""
    lines = [line for block in BLOCK.findall(page.read_text()) for line in block.splitlines()]
    lines = [line for line in lines if "# needs" not in line and not line.startswith(INSTALLS)]
    return [line.split("  #")[0].strip() for line in lines if not any(option in line for option in TESTED_ELSEWHERE)]


#: Each once, whatever the number of pages that name it.
COMMANDS = {line: page.stem for page in reversed(PAGES) for line in reversed(commands(page))}


@pytest.fixture
def place(demo_root: Path, trained, exported: Path, tmp_path: Path) -> dict[str, str]:
    """A working directory with what the pages name, and what their placeholders stand for."""
    drawn = next(demo_root.glob("plate-*"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/screw").symlink_to(drawn)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/good").symlink_to(drawn / "train/good")
    (tmp_path / "parts/bad").symlink_to(drawn / "test/dent")
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "kept")
    return {
        "DIR": "data",
        "parts": "parts",
        "CKPT": str(trained),
        "MODEL.xml": str(exported),
        "IMAGES": str(drawn / "test/good"),
        "FILE": str(TEACHER),
    }


def prepare(line: str, place: dict[str, str], demo_root: Path) -> None:
    """Do what the page's lines before this one did."""
    if "-c my.yaml" in line:
        shutil.copy(ROOT / "configs/folder.yaml", "my.yaml")
    if "report scores.csv" in line:
        options = ["--csv", "scores.csv", "--heatmaps", "maps"]
        assert stpm(["score", place["MODEL.xml"], place["IMAGES"], *options]) == 0
    if "report results" in line:
        run = Path("results/STPM/parts/latest")
        shutil.copytree(Path(place["MODEL.xml"]).parent, run / "weights/openvino")
        data = {"class_path": "stpm_plugin.DemoData", "init_args": {"root": str(demo_root), **TINY}}
        (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: f"{COMMANDS[line]}: {line}")
def test_a_command_of_the_pages_runs(line: str, place: dict[str, str], demo_root: Path) -> None:
    """As a reader would type it, but for one pass and a teacher that is at hand."""
    prepare(line, place, demo_root)
    command = re.sub(r"(?<![\w.-])(DIR|CKPT|MODEL\.xml|IMAGES|FILE)(?![\w.])", lambda m: place[m[1]], line)
    if re.search(r"anomalib (train|fit) ", command) and "--model.help" not in command:
        epochs = "--trainer.max_epochs 4" if "ckpt" in command else "--trainer.max_epochs 1"  # the checkpoint has 3
        command = re.sub(r"--trainer.max_epochs \d+", "", command) + f" {epochs} --trainer.enable_progress_bar false"
        command += "" if "ckpt" in command or "teacher_weights" in command else f" --model.teacher_weights {TEACHER}"
        command += "" if "ckpt" in command else " --model.image_size [64,64]"
    if "anomalib " in command and ("--data MVTecAD" in command or " -c " in command):
        command += " --data.num_workers 0"  # by anomalib's default eight processes for each reading of ten images
    if command.startswith("stpm train"):
        size = "crop_size 32" if "native" in command else "image_size [64,64]"
        command += f" --trainer.max_epochs 1 --model.init_args.{size}"
        command += "" if "--teacher" in command else f" --teacher {TEACHER}"
    exports = command.startswith("stpm train") or "yaml" in command
    if " train " in line and exports and ("--name" not in command or "--bad" in command):
        command += " --trainer.callbacks=[]"  # one of them does
    if "accuracy run" in command:
        command += " --passes 1"
    if "benchmarks." in command:
        command += f" --results {'kept' if command.endswith('table') else 'results'}"
    code, output = warm.run(command) or in_a_shell(command)
    assert code == 0, f"{command}\n{output[-3000:]}"


def in_a_shell(command: str) -> tuple[int, str]:
    """Run a line that sets variables."""
    bin_first = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=600, env=os.environ | bin_first, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_the_messages_that_are_explained_exist() -> None:
    """Each that the page on what goes wrong quotes, where `...` stands for names and numbers."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    cells = re.findall(r"^\| (`.*?`) \| ", page, re.MULTILINE)
    quoted = [text for cell in cells for text in re.findall("`(.+?)`", cell)]
    ours = "\n".join(text for file in ROOT.glob("stpm_plugin/**/*.py") for text in texts(ast.parse(file.read_text())))
    assert len(quoted) > 60
    for text in quoted:
        assert re.search(".*".join(map(re.escape, text.split("..."))), ours), text


def texts(node: ast.AST) -> list[str]:
    """The strings in some code, a line each; a string with values is one, with `...` in their place."""
    if isinstance(node, ast.Constant):
        return [node.value.replace("\n", " ")] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        return ["".join(map(str, parts)).replace("\n", " ")]
    return [text for child in ast.iter_child_nodes(node) for text in texts(child)]


def test_the_formats_name_every_field(trained: Path, exported: Path) -> None:
    """All that a checkpoint and an exported model hold; what only some exports hold is `set_by` and `reaches`."""
    page = (ROOT / "docs/formats.md").read_text()
    first = {
        name for cell in re.findall(r"^\| (`.*?`) \| ", page, re.MULTILINE) for name in re.findall("`(.+?)`", cell)
    }
    state = torch.load(trained, weights_only=True)["state_dict"]["_extra_state"]
    model = ov.Core().read_model(exported)
    verdict = json.loads(model.get_rt_info(["stpm", "verdict"]).astype(str))
    stored = set(re.findall(r"<(\w+) value", exported.read_text().split("<stpm>")[1]))
    assert first == {*state, *verdict, *stored, "set_by", "reaches"}
    formats = [model.get_rt_info(["stpm", "format"]).astype(int), state["format"]]
    assert formats == [int(number) for number in re.findall(r"^\| `format` \| (\d+) \|", page, re.MULTILINE)]


def test_links_lead_somewhere() -> None:
    """Links of all pages to files of the repository."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
