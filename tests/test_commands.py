"""The command `stpm`: its help, its mistakes, and the way from a folder of good images to a report."""

import dataclasses
import functools
import logging
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import cv2
import numpy as np
import pytest
import timm
import yaml
from anomalib.engine import Engine
from anomalib.models import Stfpm
from conftest import TEACHER, command, rows, run

from stpm_plugin import __version__
from stpm_plugin.commands import entry, report
from stpm_plugin.commands.config import packaged
from stpm_plugin.commands.entry import main as stpm
from stpm_plugin.commands.export import datamodule_of
from stpm_plugin.commands.running import anomalib, logged
from stpm_plugin.commands.terminal import Progress, in_words
from stpm_plugin.commands.train import good_images, named_after, settings_of_test
from stpm_plugin.errors import STPMError

ROOT = Path(__file__).parents[1]
SMALL = ["--model.init_args.image_size=[64,64]", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
LITTLE = ["--teacher", str(TEACHER), *SMALL]


@pytest.fixture(scope="module")
def place(once, demo_root: Path) -> Path:
    """A folder as a newcomer has it: good images, bad ones by their kinds, junk."""

    def fill(folder: Path) -> None:
        drawn = next(demo_root.glob("plate-*"))
        shutil.copytree(drawn / "train/good", folder / "parts")
        for kind in ("good", "dent", "chip"):
            shutil.copytree(drawn / "test" / kind, folder / "bad" / kind)
        (folder / "parts/notes.txt").write_text("junk")

    return once("place", fill)


@pytest.fixture(scope="module")
def trained_run(once, place: Path) -> tuple[Path, str]:
    """The folder of a run of `stpm train`, and what the command said."""

    def train(folder: Path) -> None:
        said = command("stpm", "train", "parts", "--bad", "bad", "--name", "plates", *LITTLE, cwd=place)
        (folder / "said").write_text(said)

    return place / "results/STPM/plates/latest", (once("said", train) / "said").read_text()


# Help


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_each_option_is_explained(name):
    shown = entry.parser_of(name).format_help()
    for field in dataclasses.fields(entry.class_of(name)):
        literal = get_args(field.type) or field.name == "name"
        assert not field.init or literal or field.name.replace("_", "-") in shown.replace("_", "-")
    assert "<class" not in shown
    assert entry.COMMANDS[name][1] in general_help()


@functools.cache
def general_help() -> str:
    """What `stpm --help` prints, without line breaks within a sentence."""
    return run("-m", "stpm_plugin.commands", "--help").replace("\n" + 24 * " ", " ")


def test_version_and_the_old_forms(exported, numbered_images, tmp_path):
    assert run("-m", "stpm_plugin.commands", "--version").strip() == f"stpm {__version__}"
    assert run("-m", "stpm_plugin", "--version").strip() == f"stpm_plugin {__version__}"
    assert "demo|train|score|report" in run("-m", "stpm_plugin", "--help")
    table = str(tmp_path / "s.csv")
    said = run("-m", "stpm_plugin.score", str(exported), str(numbered_images), "--csv", table)
    assert said.startswith("`python -m stpm_plugin.score` is now `stpm score`")
    assert len(rows(tmp_path / "s.csv")) == 5


def test_what_is_typed_counts_more_than_the_file_of_options(tmp_path):
    (tmp_path / "line.yaml").write_text("threshold: 5\nbatch: 2\n")
    for file in (["--config-file", "line.yaml"], ["--config-file=line.yaml"]):
        for line in (["--threshold", "3", *file], [*file, "--threshold", "3"]):
            made = entry.parse(["score", "model.xml", "parts", *line])
            assert (made.threshold, made.batch, made.images) == (3, 2, ["parts"])


def test_a_missing_package_is_named(exported):
    code = "import sys; sys.modules['scipy'] = None; from stpm_plugin.commands.entry import main; sys.exit(main(sys.argv[1:]))"
    said = run("-c", code, "threshold", str(exported), "--good", ".", "--out", "new.xml", check=False)
    assert "scipy is missing, and this command needs it: install it with pip." in said
    assert "Traceback" not in said


def test_help_needs_neither_torch_nor_anomalib_nor_openvino():
    names = ["torch", "anomalib", "lightning", "timm", "openvino", "cv2", "numpy"]
    absent = f"import sys; sys.modules.update(dict.fromkeys({names}));"
    code = f"{absent} from stpm_plugin.commands.entry import main; sys.exit(main(sys.argv[1:]))"
    assert "usage: stpm score" in run("-c", code, "score", "--help")


# Mistakes


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nope", "nope is not a command; the commands are demo, train, score, report,"),
        ("score", "is missing. See `stpm score --help`."),
        ("score model.xml images --nope 3", "there is no option --nope. See `stpm score --help`."),
        ("score model.xml images --batch x", "--batch: Expected a int. Got value: x."),
        ("score model.xml images --csv a --csv b", "--csv is given twice."),
        ("score model.xml images --csv=a --csv=b", "--csv is given twice."),
        ("config nope", "Got value: nope"),
    ],
)
def test_a_wrong_line_is_one_sentence(line, words, capsys):
    assert stpm(line.split()) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("score missing.xml parts", "the model missing.xml does not exist: pass the .xml file"),
        ("score model.ckpt parts", "model.ckpt is not an exported model: pass the .xml file"),
        ("score model.ckpt images --watch --ray local", "--watch runs on one machine"),
        ("train missing", "missing does not exist: pass a folder of good images."),
        ("train model.ckpt", "model.ckpt is a file: pass a folder of good images."),
        ("train empty", "contains 0 images, but training needs at least 3"),
        ("train junk", "contains 0 images"),
        ("train mvtec", "mvtec has the layout of MVTec AD: run `stpm train mvtec/train/good --bad mvtec/test`."),
        ("train mixed", "mixed holds bad, whose images would count as good"),
        ("train parts --bad parts/some", "holds parts/some, whose images would count as good"),
        (
            "train parts --name ../x",
            "--name ../x is not the name of a folder: choose one without slashes.",
        ),
        ("train parts --results ünter", "anomalib cannot read paths with non-ASCII letters, and "),
        ("train parts --results model.ckpt", "--results model.ckpt is a file: pass a folder."),
        ("train parts --resume missing", "missing does not exist: pass the folder of a run"),
        ("train parts --masks empty", "--masks are the masks of bad images: pass --bad too."),
        ("train parts --bad missing", "--bad missing does not exist: pass a folder."),
        ("train parts --bad empty", "--bad empty contains no images."),
        ("train parts --recipe nope", "--recipe nope is neither `folder`, `native` nor a YAML file"),
        ("train parts --recipe padim.yaml", "padim.yaml trains anomalib.models.Padim, but this command only STPM"),
        ("train parts --recipe table.yaml", "table.yaml is not a YAML of settings with model and data"),
        ("export missing", "missing does not exist: pass the folder of a run or its .ckpt file."),
        ("export empty", "empty contains no weights/lightning/model.ckpt"),
        ("export junk/notes.txt", "junk/notes.txt is not a checkpoint"),
        ("export model.ckpt --int8", "model.ckpt does not record which good images trained it: pass their folder"),
        ("export model.ckpt --int8 --compression fp16", "--int8 and --compression fp16 contradict each other"),
        ("export model.ckpt --good parts", "--good is only for --compression int8 or int8_acq (--int8)"),
        ("export model.ckpt --int8 --max-drop 0.1", "--max-drop is only for --compression int8_acq"),
        ("report empty", "empty/config.yaml is missing: pass a run's folder"),
        (
            "report empty --heatmaps empty",
            "--heatmaps is only for a CSV: omit it, because the heat maps of empty are drawn",
        ),
        ("report table.csv", "table.csv identifies its model only by a hash"),
        ("report missing.csv --model model.ckpt", "missing.csv does not exist: pass a CSV that `stpm score` wrote."),
        ("report model.ckpt --model model.ckpt", "is not a CSV of scores"),
        ("config demo --out model.ckpt", "model.ckpt exists: remove it, or choose another file with --out."),
        ("explain missing.ckpt parts", "the checkpoint missing.ckpt does not exist."),
    ],
)
def test_a_mistake_is_one_sentence(line, words, place, tmp_path, capsys):
    for name in ("empty", "junk", "mvtec/train/good", "mvtec/test", "mixed/bad"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "junk/notes.txt").write_text("no image")
    (tmp_path / "model.ckpt").write_text("no checkpoint")
    (tmp_path / "table.csv").write_text("path,score")
    (tmp_path / "table.yaml").write_text("path,score")
    (tmp_path / "padim.yaml").write_text("model: {class_path: anomalib.models.Padim}")
    shutil.copytree(place / "parts", tmp_path / "parts")
    shutil.copytree(place / "bad/dent", tmp_path / "parts/some")
    assert stpm(line.split()) == 1
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "\n" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "the weights of resnet18.tv_in1k could not be fetched from timm's hub"),
        ([*LITTLE, "--trainer.logger", "CSVLogger"], "save_dir"),
        ([*LITTLE, "--model.init_args.layers", "[conv9]"], "has no layer 'conv9'; it has act1 (0), layer1 (1)"),
        (
            ["--teacher", "lite0", "--model.init_args.layers", "[layer1]", *SMALL],
            "no layer 'layer1'; it has blocks.0 (0)",
        ),
        ([*LITTLE, "--model.init_args.nope", "3"], "nope"),
        (["--teacher", "nope.pth"], "'nope.pth' is not a file"),
    ],
)
def test_a_training_that_fails_says_why_in_a_line(more, words, place, tmp_path):
    said = command("stpm", "train", str(place / "parts"), *more, check=False, cwd=tmp_path)
    lines = said.splitlines()
    assert words in lines[-1], said
    assert len(lines) == 2  # the other one says that anomalib is being started
    assert "Traceback" in (tmp_path / "results/parts.log").read_text() or "error:" in said


def test_another_models_checkpoint_is_one_sentence(demo, tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda *args, **options: create(*args, **{**options, "pretrained": False}))
    model = Stfpm(backbone="resnet18", layers=["layer1"])
    bounds = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1}
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False, **bounds)
    engine.fit(model, datamodule=demo)
    said = command("stpm", "export", engine.best_model_path, check=False, cwd=tmp_path)
    assert len(said.splitlines()) == 1
    assert "the checkpoint holds a model other than STPM" in said


# From a folder to a report


def test_a_training_is_quiet_and_ends_with_its_threshold(trained_run):
    folder, said = trained_run
    assert "on 8 good images; 2 were held out." in said
    assert re.search(r"image threshold \S+ from the held-out good images; expected false alarms 0.50%", said)
    assert "tested: image AUROC " in said
    for line in ("model: ", "exported: ", "next: stpm report "):
        assert line in said
    assert len(said.splitlines()) < 12
    assert "INFO" not in said
    assert "Initializing STPM model" in (folder / "train.log").read_text()
    assert (folder / "weights/openvino/model.xml").is_file()
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]["name"] == "plates"
    pictures = sorted(path.parent.name for path in folder.glob("images/*/*.png"))
    assert pictures == ["chip", "chip", "dent", "dent", "good", "good"]


def test_good_images_alone_give_no_metrics_but_a_threshold(trained_run, place, tmp_path):
    """Twice, and as another product than the run before: each has a folder of its own."""
    for version in ("v0", "v1"):
        said = command("stpm", "train", "parts", *LITTLE, "--trainer.callbacks=[]", cwd=place)
        assert "image threshold" in said
        assert "AUROC" not in said
        assert "on 8 good images; 2 were held out." in said  # all ten
        made = place / "results/STPM/parts" / version
        assert (made / "weights/lightning/model.ckpt").is_file()
    assert report.test_images(made / "config.yaml", SimpleNamespace(say=print)) == {}
    assert trained_run[0].resolve().name == "v0"
    config = str(ROOT / "configs/folder.yaml")
    data = [f"--data.init_args.root={place}", "--data.init_args.normal_dir=parts", "--trainer.callbacks=[]"]
    teacher = f"--model.init_args.teacher_weights={TEACHER}"
    said = command("anomalib", "train", "-c", config, teacher, *data, *SMALL, cwd=tmp_path)
    assert "AUROC and F1 need both kinds" in " ".join(said.split())
    assert "image_AUROC" not in said


def test_an_export_is_quiet_and_knows_the_images_that_trained(trained_run, place):
    folder, _ = trained_run
    said = command("stpm", "export", str(folder), "--compression", "fp16", cwd=place)
    assert re.fullmatch(r"exported: \S+model_fp16.xml \(\d+\.\d MiB\)", said.strip())
    from stpm_plugin import STPM

    record = STPM.load_from_checkpoint(folder / "weights/lightning/model.ckpt").data_record
    settings = yaml.safe_load((folder / "config.yaml").read_text())["data"]
    for images in (settings, place / "parts"):
        data = datamodule_of(images)
        data.setup()
        assert {Path(path).name for path in data.train_data.samples.image_path} >= {Path(n).name for n in record.names}


def test_the_packages_warnings_reach_the_terminal(tmp_path, monkeypatch, capfd):
    class Warns:
        def __init__(self, arguments) -> None:
            warnings.warn("STPM: the disk is full.", stacklevel=1)
            warnings.warn(f"another library's, of {arguments}", stacklevel=1)

    monkeypatch.setattr("anomalib.cli.cli.AnomalibCLI", Warns)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logged(tmp_path / "the.log", "it", lambda terminal: anomalib(["fit"], terminal))
    logging.captureWarnings(False)
    assert capfd.readouterr().err.splitlines() == [
        "starting anomalib (takes a few seconds) ...",
        "warning: the disk is full.",
    ]


def test_the_doctor_says_what_is_missing_and_what_would_help(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**28))
    assert stpm(["doctor", "--results", str(tmp_path / "runs")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("  Python ") and f"stpm-plugin {metadata.version('stpm-plugin')}" in line for line in lines
    )
    assert any(line.startswith("! the hub cannot be reached") and "--teacher lite0" in line for line in lines)
    assert "  the light teacher's weights are installed: `stpm train --teacher lite0`" in lines
    assert any(line.startswith("! 0.2 GiB free on the disk of ") for line in lines)


def test_the_doctor_needs_neither_torch_nor_psutil():
    absent = dict.fromkeys(("torch", "anomalib", "lightning", "timm", "psutil", "rich", "scipy"))
    code = (
        f"import sys; sys.modules |= {absent}; from stpm_plugin.commands.entry import main; sys.exit(main(['doctor']))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (1, "")
    for name, module in (("the processor", "psutil"), ("training", "torch"), ("the teacher's weights", "timm")):
        assert f"! {name} cannot be checked: {module} cannot be imported" in made.stdout
    assert "  score computes in float32" in made.stdout


def test_a_worn_out_run_folder_is_named(trained_run, tmp_path, capsys):
    shutil.copytree(trained_run[0], tmp_path / "moved")
    (tmp_path / "moved/weights/openvino/model.xml").unlink()
    assert stpm(["report", "moved"]) == 1
    assert "model.xml is missing: `stpm export moved` writes it" in capsys.readouterr().err


# Parts


@pytest.mark.parametrize(
    ("folder", "name"), [("bottle/train/good", "bottle"), ("parts", "parts"), ("/a/ok/images", "a")]
)
def test_a_product_is_named_after_its_folder(folder, name):
    assert named_after(Path(folder)) == name


def test_what_a_folder_holds_is_understood(place, tmp_path):
    (tmp_path / "masks/dent").mkdir(parents=True)
    (tmp_path / "masks/chip").mkdir()
    assert good_images(place / "parts", None) == place / "parts"
    with pytest.raises(STPMError, match=r"--masks .* contains no images"):
        settings_of_test(place / "bad", tmp_path / "masks")
    for kind in ("dent", "chip"):
        cv2.imwrite(str(tmp_path / f"masks/{kind}/000.png"), np.zeros((4, 4), np.uint8))
    found = settings_of_test(place / "bad", tmp_path / "masks")
    assert [path.name for path in found["abnormal_dir"]] == ["chip", "dent"]
    assert [path.name for path in found["mask_dir"]] == ["chip", "dent"]
    assert found["normal_test_dir"] == place / "bad/good"


def test_the_packaged_settings_are_in_the_wheel(tmp_path, capsys):
    assert stpm(["config", "folder"]) == 0
    assert (
        Path("folder.yaml").read_text() == (ROOT / "configs/folder.yaml").read_text() == packaged("folder").read_text()
    )
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {f"stpm_plugin/configs/{path.name}" for path in ROOT.glob("configs/*.yaml")} <= names
    assert "stpm_plugin/deployment/report/page.html" in names


def test_all_but_the_commands_own_words_goes_to_the_log(tmp_path):
    code = """
import os, subprocess, sys, warnings
from pathlib import Path
from stpm_plugin.commands.terminal import quiet
try:
    with quiet(Path("the.log")) as terminal:
        print("printed"); os.write(2, b"written\\n"); subprocess.run(["echo", "by a child"]); warnings.warn("warned")
        terminal.say("said")
        raise RuntimeError("failed")
except RuntimeError:
    print("back")
"""
    assert run("-c", code).split() == ["back", "said"]
    log = Path("the.log").read_text()
    for word in ("printed", "written", "by a child", "warned", "Traceback", "failed"):
        assert word in log


def test_progress_is_rewritten_on_a_terminal_and_seldom_in_a_file():
    class Terminal:
        def __init__(self, tty: bool):
            self.tty, self.text = tty, ""

        def isatty(self):
            return self.tty

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    for tty in (True, False):
        stream = Terminal(tty)
        line = Progress(4, "steps", stream)
        for _ in range(4):
            line.step()
        line.end()
        assert stream.text.count("\r") == (2 if tty else 0)
        assert stream.text.splitlines()[-1].strip("\x1b[K").split(",")[0].endswith("4/4 steps")
    assert [in_words(seconds) for seconds in (5, 240, 9000)] == ["5 s", "4.0 min", "2.5 h"]
