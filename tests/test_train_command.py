"""`stpm train`: the folders that it refuses, the images that it sets aside, and the checkpoint of a stopped run."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from stpm_plugin.commands import train
from stpm_plugin.commands.config import packaged
from stpm_plugin.commands.entry import main as stpm
from stpm_plugin.commands.train import Train, good_images, names_test, refuse_within, settings_of_test

FILES = [
    *(f"{folder}/{number}.png" for folder in ("plain", "whole/good", "ran", "drawn") for number in range(3)),
    *(f"{folder}/0.png" for folder in ("bad/dent", "mixed", "mixed/dent", "loose", "loose/good", "tested/good")),
    "plain/masks/0.png",
    "drawn/maps/0.png.heatmap.jpg",
    "shown/dent/0.png",
    "shown/dent/0.png.heatmap.jpg",
    "mask.png",
]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A working directory with good layouts and wrong ones."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((4, 4), np.uint8))
    (tmp_path / "ran/results/STPM").mkdir(parents=True)
    (tmp_path / "link").symlink_to("plain")
    (tmp_path / "linked.png").symlink_to("plain/0.png")
    (tmp_path / "plain/mask.png").symlink_to("../mask.png")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "plain --bad mixed",
            "--bad mixed contains both loose images, such as 0.png, and the folder dent: move the loose",
        ),
        (
            "plain --bad loose",
            "--bad loose contains both loose images, such as 0.png, and the folder good: move the loose",
        ),
        (
            "plain --bad bad --masks mixed",
            "--masks mixed contains both loose images, such as 0.png, and the folder dent",
        ),
        ("plain --bad tested", "--bad tested contains no images except those in its folder good."),
        ("whole --bad whole", "whole/good, so good images would count as bad: pass a folder of bad images only."),
        ("plain --bad link", "holds link, whose images would count as good"),
        ("plain --ignore plain/0.png", "--ignore plain/0.png lies below "),
        ("plain --ignore plain/mask.png", "where every image counts as good: move it out of that folder."),
        ("plain --ignore linked.png", "--ignore linked.png lies below "),
        ("plain --bad bad --masks plain/masks", "--masks plain/masks lies below "),
        ("plain --results plain/runs/new", "counts as good: choose a folder outside with --results."),
        ("link --results plain/runs/new", "--results plain/runs/new lies below "),
        ("ran", "ran/results lies among the good images, and its pictures would count as good: move it."),
        ("drawn", "0.png.heatmap.jpg, which would count as images: move them to another folder."),
        ("plain --bad shown", "shown contains heat maps, such as shown/dent/0.png.heatmap.jpg, which would count as"),
    ],
)
def test_what_would_count_as_another_kind_of_image_is_refused(line, words, folders, capsys):
    assert stpm(["train", *line.split()]) == 1
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "\n" not in said


def test_folders_that_lie_apart_are_accepted(folders, monkeypatch):
    good = good_images(Path("whole"), Path("bad"))
    assert good == folders / "whole/good"
    refuse_within(good, Path("whole/results"), Path("whole/masks"), Path("mask.png"))
    assert settings_of_test(Path("bad"), None) == {"abnormal_dir": [folders / "bad/dent"]}
    assert settings_of_test(Path("plain/masks"), None) == {"abnormal_dir": [folders / "plain/masks"]}
    monkeypatch.chdir(good)
    refuse_within(good_images(Path(), None), Path(".."), None, None)


def test_paths_of_windows_reach_anomalib_whole():
    folders = [r"C:\data\bad\new", r"C:\data\bad\dent"]
    assert yaml.safe_load(train._as_yaml(folders)) == folders
    assert yaml.safe_load(train._as_yaml(folders[0])) == folders[0]


def test_good_images_are_set_aside_only_where_a_test_or_a_validation_set_needs_them():
    for name in ("folder", "native"):
        settings = yaml.safe_load(packaged(name).read_text())
        assert not names_test(settings, ["--data.init_args.normal_dir=parts"])
        for option in (
            "--data.init_args.abnormal_dir=bad",
            "--data.val_split_mode",
            "--data.init_args.test_split_ratio",
        ):
            assert names_test(settings, [option, "x"])
    settings["data"]["init_args"]["normal_test_dir"] = "others"
    assert names_test(settings, [])
    assert names_test({"data": {"init_args": {"abnormal_dir": None}}}, [])  # anomalib splits it off the test's


def test_a_stopped_training_names_its_own_checkpoint_alone(folders, monkeypatch, capsys):
    runs = folders / "results/STPM/plain"

    def stopped(run: str | None) -> str:
        def stop(*given, **options) -> None:
            if run is not None:
                (runs / run / "weights/lightning").mkdir(parents=True)
                (runs / run / "weights/lightning/model.ckpt").touch()
                (runs / "latest").unlink(missing_ok=True)
                (runs / "latest").symlink_to(run)
            raise KeyboardInterrupt

        monkeypatch.setattr(train, "run_recipe", stop)
        assert Train(Path("plain")).run() == train.STOPPED
        return capsys.readouterr().err.strip()

    assert stopped(None) == "stopped."
    assert stopped("v0").endswith("plain/v0/weights/lightning/model.ckpt to resume.")
    assert stopped(None) == "stopped."  # and not the checkpoint of v0
    assert stopped("v1").endswith("plain/v1/weights/lightning/model.ckpt to resume.")
