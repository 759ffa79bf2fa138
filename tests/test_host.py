"""STPM through the real host, in fresh processes."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import MODEL, TEACHER, TINY, anomalib, run

CONFIGS = Path(__file__).parents[1] / "configs"
ONE_EPOCH = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
SMALL = ["--model.backbone", "resnet18", "--model.teacher_weights", str(TEACHER), "--model.image_size", "[64,64]"]


KEPT_OUT = shutil.ignore_patterns("*.safetensors", "__pycache__")


def data(root: Path) -> list[str]:
    return ["--data", "stpm_plugin.DemoData", "--data.root", str(root), *(f"--data.{k}={v}" for k, v in TINY.items())]


def test_importing_the_package_or_torch_imports_no_anomalib():
    code = "import sys; import {}; print([m for m in ('anomalib', 'lightning', 'torch') if m in sys.modules])"
    assert run("-c", code.format("stpm_plugin")).strip() == "[]"
    assert run("-c", code.format("torch")).strip() == "['torch']"


IN_PYTHON = """
import {first}
from anomalib.models import get_model, list_models
import anomalib.models
kwargs = {{"backbone": "resnet18"}}
for name in ("STPM", "stpm", {{"class_path": "STPM"}}, {{"class_path": "anomalib.models.STPM"}}):
    assert type(get_model(name, **kwargs)).__module__ == "stpm_plugin.training.lightning_model", name
assert "stpm" in {{name.replace("_", "") for name in list_models()}}
from stpm_plugin import STPM, STPMModel
assert anomalib.models.STPM is STPM
from anomalib.pipelines.tiled_ensemble.components.utils import NormalizationStage
from anomalib.pipelines.tiled_ensemble.components.utils.helper_functions import get_ensemble_model
assert type(get_ensemble_model({{"class_path": "STPM"}}, 128, NormalizationStage.IMAGE)) is STPM
print("known")
"""


@pytest.mark.parametrize("first", ["torch", "stpm_plugin.training.lightning_model"])  # anomalib imports torch first
def test_known_in_python_whatever_is_imported_first(first):
    output = run("-c", IN_PYTHON.format(first=first))
    assert "known" in output
    assert "could not register" not in output


def test_switched_off_by_the_environment():
    output = run("-c", IN_PYTHON.format(first="torch"), env={"STPM_PLUGIN_AUTOLOAD": "0"}, check=False)
    assert "UnknownModelError" in output


def test_a_broken_plugin_breaks_neither_torch_nor_anomalib(tmp_path):
    broken = tmp_path / "stpm_plugin"
    shutil.copytree(Path(__file__).parents[1] / "stpm_plugin", broken, ignore=KEPT_OUT)
    (broken / "training/lightning_model.py").write_text("raise OSError('half removed')")
    output = run("-c", "import anomalib.models; print('alive')", env={"PYTHONPATH": str(tmp_path)})
    assert "alive" in output
    assert "half removed" in output
    assert "STPM_PLUGIN_AUTOLOAD=0" in output


HOST = "from stpm_plugin.register import autoload; autoload(); import anomalib.models; print('alive')"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("wrapt.py", "raise ModuleNotFoundError('no wrapt')", "no wrapt"),
        ("stpm_plugin/training/lightning_model.py", None, "No module named 'stpm_plugin.training.lightning_model'"),
        ("stpm_plugin/training/lightning_model.py", "class STPM(", "SyntaxError"),
        ("stpm_plugin/training/lightning_model.py", "from anomalib.models import AnomalibModule", "ImportError"),
        ("stpm_plugin/demo/demo_data.py", "1 / 0", "ZeroDivisionError"),
        ("anomalib/models/__init__.py", "def get_model(): ...", "ModuleNotFoundError"),  # of another version
    ],
)
def test_no_broken_installation_stops_its_host(file, content, said, tmp_path):
    """Not even where warnings are errors; where they are not, the test above shows it."""
    (tmp_path / "anomalib/models").mkdir(parents=True)  # a host of empty modules, which imports no torch
    for name in ("__init__.py", "models/video.py"):
        (tmp_path / "anomalib" / name).touch()
    (tmp_path / "anomalib/models/__init__.py").write_text("get_model = None")
    shutil.copytree(Path(__file__).parents[1] / "stpm_plugin", tmp_path / "stpm_plugin", ignore=KEPT_OUT)
    if not file.startswith("anomalib"):
        (tmp_path / "stpm_plugin/training/lightning_model.py").write_text("")
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    output = run("-W", "error", "-c", HOST, env={"PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": ""})
    assert "alive" in output
    assert said in output
    assert "STPM_PLUGIN_AUTOLOAD=0" in output


@pytest.fixture(scope="module")
def commanded(once, demo_root) -> Path:
    """Folder of a run of `anomalib train --model STPM`."""

    def train(folder: Path) -> None:
        assert "image_AUROC" in anomalib("train", "--model", "STPM", *SMALL, *data(demo_root), *ONE_EPOCH, cwd=folder)

    return next(once("commanded", train).glob("results/STPM/DemoData/*/v0"))


def test_saved_config_names_the_package_and_repeats_the_run(commanded, tmp_path):
    saved = commanded / "config.yaml"
    config = yaml.safe_load(saved.read_text())
    assert config["model"]["class_path"] == "stpm_plugin.STPM"
    config["model"]["init_args"]["seed"] = 3
    for name in ("a", "b"):
        (tmp_path / "saved.yaml").write_text(
            yaml.safe_dump(
                {**config, "default_root_dir": name, "trainer": {**config["trainer"], "default_root_dir": None}}
            )
        )
        anomalib("fit" if name == "a" else "train", "-c", "saved.yaml", cwd=tmp_path)
    first, second = (torch.load(next(tmp_path.glob(f"{name}/**/model.ckpt")), weights_only=True) for name in "ab")
    assert all(
        torch.equal(tensor, second["state_dict"][key])
        for key, tensor in first["state_dict"].items()
        if "student" in key
    )


def test_validate_from_a_checkpoint_without_hub(commanded, demo_root, tmp_path):
    """`test`, `predict` and the other exports: the pages' commands, and the routes."""
    output = anomalib(
        "validate", "--model", "stpm_plugin.STPM", "--model.backbone", "resnet18", "--model.image_size", "[64,64]",
        *data(demo_root), "--ckpt_path", str(commanded / "weights/lightning/model.ckpt"),
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", cwd=tmp_path,
    )  # fmt: skip
    assert "Traceback" not in output


def test_export_from_a_checkpoint(commanded, tmp_path):
    """To torch; to OpenVINO, in float and in INT8, by the README's commands, in test_docs.py."""
    anomalib(
        "export", "--model", "STPM", "--model.backbone", "resnet18", "--export_type", "torch",
        "--ckpt_path", str(commanded / "weights/lightning/model.ckpt"), "--export_root", "out", cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "out/weights/torch/model.pt").is_file()


def test_yaml_with_the_short_class_path_and_module_run_without_autoload(demo_root, tmp_path):
    """The long class path: the saved config's test."""
    config = {
        "model": {"class_path": "STPM", "init_args": {**MODEL, "image_size": [64, 64]}},
        "data": {"class_path": "stpm_plugin.DemoData", "init_args": {"root": str(demo_root), **TINY}},
    }
    Path("run.yaml").write_text(json.dumps(config))
    run("-m", "stpm_plugin", "fit", "-c", "run.yaml", *ONE_EPOCH, env={"STPM_PLUGIN_AUTOLOAD": "0"}, cwd=tmp_path)
    assert list(tmp_path.glob("results/**/model.ckpt"))


def test_unreachable_hub_is_one_sentence(demo_root, tmp_path):
    output = anomalib("fit", "--model", "STPM", *data(demo_root), *ONE_EPOCH, check=False, cwd=tmp_path)
    assert "fetching the teacher's weights" in output
    assert "STPMError: the weights of resnet18.tv_in1k could not be fetched" in output
    assert "During handling" not in output


def hub(folder: Path) -> dict[str, str]:
    """A hub client's cache that holds random weights of a ResNet-18, so that anomalib's models start offline."""
    import timm
    from safetensors.torch import save_file

    for name in ("a1_in1k", "tv_in1k"):
        snapshot = folder / f"hub/models--timm--resnet18.{name}/snapshots/0"
        snapshot.mkdir(parents=True)
        save_file(timm.create_model("resnet18").state_dict(), snapshot / "model.safetensors")
        refs = snapshot.parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text("0")
    return {"HF_HOME": str(folder)}


def test_benchmark_beside_a_model_of_anomalibs(demo_root, tmp_path):
    config = yaml.safe_load((CONFIGS / "benchmark.yaml").read_text())
    models = config["benchmark"]["model"]["class_path"]
    assert models["grid"] == ["STPM", "Stfpm", "Padim", "Patchcore"]
    models["grid"] = ["STPM", "Padim"]  # a model takes a quarter of a minute
    config["benchmark"]["data"] = {"class_path": "stpm_plugin.DemoData", "init_args": {"root": str(demo_root), **TINY}}
    Path("benchmark.yaml").write_text(yaml.safe_dump(config))
    output = anomalib(
        "benchmark",
        "--config",
        "benchmark.yaml",
        env={"PL_TRAINER_MAX_EPOCHS": "1", **hub(tmp_path / "home")},
        cwd=tmp_path,
    )
    assert list(tmp_path.glob("runs/**/results.csv")), output[-4000:]
    rows = pd.read_csv(next(tmp_path.glob("runs/**/results.csv")))
    assert [*rows["model.class_path"]] == models["grid"], output[-2000:]
    real = rows.iloc[0]
    assert 0 <= real.image_AUROC <= 1
    assert 0 <= real.pixel_AUROC <= 1
    assert real.fit_duration > 0
