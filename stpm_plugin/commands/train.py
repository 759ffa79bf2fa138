"""`stpm train`: from a folder of good images to a model with a threshold."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..decoding import read_ignored
from ..deployment.images import HEATMAP, images_below
from ..errors import STPMError
from .config import packaged
from .export import CHECKPOINT, EXPORTED, checkpoint_of
from .running import anomalib, logged
from .score import STOPPED
from .terminal import Quiet, in_words

if TYPE_CHECKING:
    from anomalib.cli.cli import AnomalibCLI

FEWEST = 3  # good images: one is held out, and the student needs two in a step
NO_TEST = "--data.init_args.test_split_mode=none"
OF_TEST = re.compile(r"--data\.(init_args\.)?(abnormal_dir|normal_test_dir|test_split|val_split)")
DEFECTS = {"bad", "defect", "defective", "defects", "ng", "nok", "not_good", "anomaly", "anomalous", "ground_truth"}


@dataclass
class Train:
    """Train on a folder of good images, and set the threshold from some of them that are held out.

    Prints the threshold, what set it, the false alarms to expect, and the paths of the checkpoint and the exported
    model. With --bad the model is tested too, on the bad images and on good images that it does not train on: those in
    BAD/good if that folder exists, else a fifth of the good images. Without --bad no image is set aside for a test.

    Options that begin with --model., --data. or --trainer. go to `anomalib train`, such as
    --model.init_args.image_size "[384,384]".

    Args:
        folder: Good images: a folder of them, or one with a subfolder `good`. All images below it count as good, so
            keep masks, heat maps and RESULTS elsewhere.
        bad: Folder of images with defects, or of one folder for each kind of defect, not both; used only for the test.
        masks: Folder of the defects' masks, with the same layout and names as BAD.
        name: Name of the product, and of its folder below RESULTS; by default FOLDER's name.
        results: Folder for runs; each gets a folder of its own.
        teacher: The teacher's weights, a .safetensors or .pth file; `lite0` for EfficientNet-Lite0, a lighter network
            whose ImageNet weights are installed; by default timm's weights of ResNet-18 from the hub.
        recipe: Settings to train by: `folder`; `native` for large images with small defects (docs/large-images.md);
            or a YAML file, such as `stpm config` writes.
        ignore: Mask, an image file of the images' size: its white parts, such as a bench around the part, are neither
            trained on nor scored. The model keeps it; `stpm score --ignore` can ignore more.
        resume: Checkpoint of an interrupted training to resume.
    """

    folder: Path
    bad: Path | None = None
    masks: Path | None = None
    name: str | None = None
    results: Path = Path("results")
    teacher: str | None = None
    recipe: str = "folder"
    ignore: Path | None = None
    resume: Path | None = None
    passed_on: list[str] = field(default_factory=list, init=False)

    def run(self) -> int:
        """Train; returns 0."""
        good = good_images(self.folder, self.bad)
        refuse_within(good, self.results, self.masks, self.ignore)
        for folder in filter(None, (good, self.bad, self.masks, self.results)):
            if not str(folder.absolute()).isascii():
                msg = f"anomalib cannot read paths with non-ASCII letters, and {folder.absolute()} has some: rename it."
                raise STPMError(msg)
        name = named_after(self.folder) if self.name is None else self.name
        if Path(name).name != name or name in ("", ".", ".."):
            msg = f"--name {name} is not the name of a folder: choose one without slashes."
            raise STPMError(msg)
        options = {"name": name, "root": good.parent, "normal_dir": good.name, **settings_of_test(self.bad, self.masks)}
        arguments = [f"--data.init_args.{key}={_as_yaml(value)}" for key, value in options.items()]
        if self.teacher is not None:
            arguments.append(f"--model.init_args.teacher_weights={self.teacher}")
        if self.teacher == "lite0":
            from ..model.packaged_weights import BACKBONE

            arguments.append(f"--model.init_args.backbone={BACKBONE}")
        if self.ignore is not None:
            read_ignored(self.ignore)
            arguments.append(f"--model.init_args.ignore={self.ignore.absolute()}")
        if self.resume is not None:
            arguments.append(f"--ckpt_path={checkpoint_of(self.resume).absolute()}")
        left = self.results / "STPM" / name / "latest" / CHECKPOINT
        before = _state(left)
        try:
            run_recipe(self.recipe, name, self.results, [*arguments, *self.passed_on], test=self.bad is not None)
        except KeyboardInterrupt:
            made = _state(left) != before  # else it is the run before's, or there is none
            print(f"stopped; add --resume {left.resolve()} to resume." if made else "stopped.", file=sys.stderr)
            return STOPPED
        return 0


def run_recipe(recipe: str, name: str, results: Path, arguments: list[str], test: bool) -> Path:
    """Train, and test if there is something to test, by a YAML of settings.

    Args:
        recipe: Name of a packaged config, or a file.
        name: The run's name in messages.
        results: Folder for runs.
        arguments: More options of `anomalib train`.
        test: Whether to test.

    Returns:
        The run's folder.

    Raises:
        STPMError: It failed, in a sentence.
    """
    file = Path(recipe) if Path(recipe).suffix else packaged(recipe)
    if not file.is_file():
        msg = f"--recipe {recipe} is neither `folder`, `native` nor a YAML file: `stpm config folder` writes one."
        raise STPMError(msg)
    if results.exists() and not results.is_dir():
        msg = f"--results {results} is a file: pass a folder."
        raise STPMError(msg)
    settings = require_stpm(file)
    unused = not (test or names_test(settings, arguments))  # else anomalib sets good images aside for it
    given = [f"--default_root_dir={results}", *([NO_TEST] if unused else []), *arguments]
    log, started = results / f"{name}.log", time.monotonic()

    def work(terminal: Quiet) -> Path:
        made = anomalib(["fit", "-c", str(file), *given], terminal)
        folder = Path(made.engine.trainer.default_root_dir)
        if test:
            terminal.say("testing ...")
            made.engine.test(made.model, datamodule=made.datamodule)
        terminal.say(f"trained in {in_words(time.monotonic() - started)} {account(made, test)}")
        terminal.say(where(folder, tested=not unused))
        return folder

    folder = logged(log, "the training", work)
    shutil.move(log, folder / "train.log")
    return folder


def require_stpm(recipe: Path) -> dict[str, Any]:
    """A recipe's settings; one that trains another model is refused, which `anomalib train` is for.

    Raises:
        STPMError: It does, or it is no YAML.
    """
    try:
        settings: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        trained = settings["model"]["class_path"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        msg = f"--recipe {recipe} is not a YAML of settings with model and data: `stpm config folder` writes one."
        raise STPMError(msg) from None
    if trained.rpartition(".")[2] != "STPM":
        msg = f"--recipe {recipe} trains {trained}, but this command only STPM: use `anomalib train -c {recipe}`."
        raise STPMError(msg)
    return settings


def names_test(settings: dict[str, Any], arguments: list[str]) -> bool:
    """Whether a recipe or more options name test images, or a validation set that may be split off them.

    Other data sets than anomalib's ``Folder`` bring test images of their own.
    """
    data = settings.get("data")
    known = data if isinstance(data, dict) else {}
    if any(OF_TEST.match(each) for each in arguments) or str(known.get("class_path")).rpartition(".")[2] != "Folder":
        return True
    given = known.get("init_args") or {}
    return bool(given.get("abnormal_dir") or given.get("normal_test_dir")) or given.get("val_split_mode") != "none"


def good_images(folder: Path, bad: Path | None) -> Path:
    """The folder of good images that was meant, absolute.

    Raises:
        STPMError: There is none, or it holds others too.
    """
    if not folder.is_dir():
        msg = f"{folder} {'is a file' if folder.exists() else 'does not exist'}: pass a folder of good images."
        raise STPMError(msg)
    if (folder / "train" / "good").is_dir():
        test = folder / "test"
        more = f" --bad {test}" if test.is_dir() else ""
        msg = f"{folder} has the layout of MVTec AD: run `stpm train {folder / 'train' / 'good'}{more}`."
        raise STPMError(msg)
    good = (folder / "good" if (folder / "good").is_dir() else folder).absolute()
    odd = sorted(each.name for each in good.iterdir() if each.is_dir() and each.name.lower() in DEFECTS)
    if bad is not None and _within(bad, good):
        odd = [str(bad)]
    if odd:
        msg = f"{good} holds {odd[0]}, whose images would count as good: put the good images in a folder {good}/good."
        raise STPMError(msg)
    if bad is not None and _within(good, bad):
        msg = f"--bad {bad} contains {good}, so good images would count as bad: pass a folder of bad images only."
        raise STPMError(msg)
    count = len(images_below(good))
    if count < FEWEST:
        msg = f"{good} contains {count} images, but training needs at least {FEWEST}: pass a folder of good images."
        raise STPMError(msg)
    return good


def refuse_within(good: Path, results: Path, masks: Path | None, ignore: Path | None) -> None:
    """Refuse what lies below the folder of good images and is none: anomalib trains on all images below it.

    Raises:
        STPMError: A mask, a folder of masks, results or heat maps lie there.
    """
    for option, path, remedy in (
        ("--ignore", ignore, "move it out of that folder"),
        ("--masks", masks, "move it out of that folder"),
        ("--results", results, "choose a folder outside with --results"),
    ):
        if path is not None and _within(path, good):
            msg = f"{option} {path} lies below {good}, where every image counts as good: {remedy}."
            raise STPMError(msg)
    if (good / "results" / "STPM").is_dir():
        msg = f"{good / 'results'} lies among the good images, and its pictures would count as good: move it."
        raise STPMError(msg)
    refuse_heatmaps(good)


def refuse_heatmaps(folder: Path) -> None:
    """Refuse a folder with heat maps of `stpm score`, which anomalib would read as images.

    Raises:
        STPMError: It holds some.
    """
    drawn = next(folder.rglob(f"*{HEATMAP}"), None)
    if drawn is not None:
        msg = f"{folder} contains heat maps, such as {drawn}, which would count as images: move them to another folder."
        raise STPMError(msg)


def _within(path: Path, folder: Path) -> bool:
    """Whether a path, which need not exist, is a folder or lies below it, by its own name or where it links to."""
    places = [path.resolve(), *([path.parent.resolve() / path.name] if path.is_symlink() else [])]
    return any(folder.resolve() in (each, *each.parents) for each in places)


def settings_of_test(bad: Path | None, masks: Path | None) -> dict[str, object]:
    """The settings of the test.

    Raises:
        STPMError: A folder is missing or empty, or masks are given without images.
    """
    if bad is None:
        if masks is not None:
            msg = "--masks are the masks of bad images: pass --bad too."
            raise STPMError(msg)
        return {}
    kinds = kinds_below(bad, "--bad")
    found: dict[str, object] = {"abnormal_dir": kinds}
    if (bad / "good").is_dir():
        found["normal_test_dir"] = (bad / "good").absolute()
    if masks is not None:
        of_kind = kinds_below(masks, "--masks")
        names, of_masks = ([each.name for each in folders] for folders in (kinds, of_kind))
        if len(names) != len(of_masks) or (len(names) > 1 and names != of_masks):
            msg = (
                f"{bad} holds the kinds {', '.join(names)}, but {masks} holds {', '.join(of_masks)}: give each kind of "
                "defect a folder of masks with the same name."
            )
            raise STPMError(msg)
        found["mask_dir"] = of_kind
    return found


def kinds_below(folder: Path, option: str) -> list[Path]:
    """The folders of each kind of defects, or the folder itself; absolute.

    Raises:
        STPMError: It is not a folder, has no images of a kind, or has both loose images and folders of them.
    """
    if not folder.is_dir():
        msg = f"{option} {folder} {'is a file' if folder.exists() else 'does not exist'}: pass a folder."
        raise STPMError(msg)
    refuse_heatmaps(folder)
    loose = [image for image in images_below(folder.absolute()) if Path(image).parent == folder.resolve()]
    below = [each for each in sorted(folder.absolute().iterdir()) if each.is_dir() and images_below(each)]
    if loose and below:
        msg = (
            f"{option} {folder} contains both loose images, such as {Path(loose[0]).name}, and the folder "
            f"{below[0].name}: move the loose images to a folder of their own."
        )
        raise STPMError(msg)
    kinds = [folder.absolute()] if loose else [each for each in below if each.name != "good"]
    if not kinds:
        msg = f"{option} {folder} contains no images{' except those in its folder good' if below else ''}."
        raise STPMError(msg)
    return kinds


def named_after(folder: Path) -> str:
    """A product's name: its folder's, or that of the folder above where that says nothing."""
    path = folder.resolve()
    dull = {"good", "train", "ok", "images"}
    return next((part for part in reversed(path.parts) if part not in dull), path.name)


def account(made: AnomalibCLI, test: bool) -> str:
    """The result of a training: its images, its threshold, and its metrics in the test."""
    model = made.model
    record = model.data_record
    said = f"on {len(record.digests) - len(record.held_out)} good images; {len(record.held_out)} were held out."
    said += f"\n{model.post_processor.report()}" if hasattr(model.post_processor, "report") else ""
    metrics = made.engine.trainer.callback_metrics
    measured = [
        f"{name.replace('_', ' ').removesuffix('Score')} {float(value):.3f}"
        for name, value in metrics.items()
        if name.startswith(("image_", "pixel_"))
    ]
    if test and measured:
        said += f"\ntested: {', '.join(measured)}"
    return said


def where(folder: Path, tested: bool) -> str:
    """The paths of what a run left, and what to do next; `stpm report` needs test images."""
    exported = folder / EXPORTED
    said = f"model: {folder / CHECKPOINT}"
    if exported.is_file():
        report = f"stpm report {folder}, or " if tested else ""
        said += f"\nexported: {exported}"
        said += f"\nnext: {report}stpm score {exported} IMAGES --csv scores.csv --heatmaps maps"
    return said


def _state(file: Path) -> tuple[Path, int] | None:
    """A file's path without links and when it was written, to see whether another has taken its place."""
    return (file.resolve(), file.stat().st_mtime_ns) if file.is_file() else None


def _as_yaml(value: object) -> str:
    """A value as an option of jsonargparse's takes it; JSON is YAML, and escapes the backslashes of Windows."""
    return json.dumps([str(each) for each in value]) if isinstance(value, list) else str(value)
