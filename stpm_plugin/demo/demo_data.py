"""Demo images drawn on the spot: a machined part on a bench, good or with one defect and its exact mask."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from anomalib.data import AnomalibDataModule, MVTecADDataset
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from PIL import Image, ImageDraw, ImageFilter
from torchvision.transforms.v2 import Transform

from ..register import publish

SIDE = 256  # pixels of an image, by default
DRAW = 2  # drawn at twice the size and reduced, so that edges are smooth, up to images of LARGE pixels
LARGE = 1024
VERSION = 1  # raise when the drawing changes, so that old images are not taken for new ones


class DemoData(AnomalibDataModule):
    """A small industrial scene in MVTec AD's layout, drawn once on disk, the same for the same seed.

    Good images vary in pose, light, grain and sensor noise. Defects are scratches, dents, stains, plugged holes and
    foreign chips of many sizes; each mask marks exactly the pixels that the defect changed.

    Args:
        root: Folder for the images; drawn when missing.
        train_images: Good images to train on.
        test_images: Images of each test kind: good ones, and each of the five defects.
        image_side: Height and width of the images, pixels.
        defect_pixels: Smallest and largest extent of the defects, pixels; ``None`` for extents that grow with the
            images. If it is set, there are no plugged holes, since their size is the part's.
        train_batch_size: Images in a training batch.
        eval_batch_size: Images in a validation or test batch.
        num_workers: Processes that read images; 0 reads them in the main process.
        train_augmentations: As in anomalib.
        val_augmentations: As in anomalib.
        test_augmentations: As in anomalib.
        augmentations: As in anomalib.
        val_split_mode: As in anomalib; by default a part of the test images, so that thresholds are not set on the
            images that are tested.
        val_split_ratio: Share of the test images that goes to validation.
        seed: Seed of the drawing and of the split.
    """

    seed: int  # never ``None``, unlike anomalib's

    def __init__(
        self,
        root: Path | str = "./datasets/stpm_demo",
        train_images: int = 80,
        test_images: int = 10,
        image_side: int = SIDE,
        defect_pixels: tuple[int, int] | None = None,
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_TEST,
        val_split_ratio: float = 0.4,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=TestSplitMode.FROM_DIR,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.root = Path(root)
        self.train_images, self.test_images = train_images, test_images
        self.image_side, self.defect_pixels = image_side, defect_pixels
        self.category = f"plate-v{VERSION}-{train_images}-{test_images}-{seed}"
        if image_side != SIDE or defect_pixels:
            self.category += "-" + "-".join(str(number) for number in (image_side, *(defect_pixels or ())))

    def prepare_data(self) -> None:
        """Draw the images, unless they are there."""
        folder = self.root / self.category
        if folder.is_dir():
            return
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        draw(unfinished, self.train_images, self.test_images, self.seed, self.image_side, self.defect_pixels)
        unfinished.rename(folder)

    def _setup(self, _stage: str | None = None) -> None:
        self.prepare_data()  # anomalib's pipelines and export call setup alone
        self.train_data = MVTecADDataset(root=self.root, category=self.category, split=Split.TRAIN)
        self.test_data = MVTecADDataset(root=self.root, category=self.category, split=Split.TEST)


def draw(
    folder: Path,
    train_images: int,
    test_images: int,
    seed: int,
    image_side: int = SIDE,
    defect_pixels: tuple[int, int] | None = None,
) -> None:
    """Draw a data set in MVTec AD's layout.

    Args:
        folder: Where ``train``, ``test`` and ``ground_truth`` go.
        train_images: Good images in ``train/good``.
        test_images: Images of each kind in ``test``.
        seed: The same seed draws the same images.
        image_side: Height and width of the images, pixels.
        defect_pixels: As in :class:`DemoData`.
    """
    defects = [kind for kind in DEFECTS if defect_pixels is None or kind != "plugged_hole"]
    for part, count, kinds in (("train", train_images, ["good"]), ("test", test_images, ["good", *defects])):
        for kind in kinds:
            (folder / part / kind).mkdir(parents=True)
            if kind != "good":
                (folder / "ground_truth" / kind).mkdir(parents=True)
            for index in range(count):
                rng = np.random.default_rng([seed, part == "test", [*DEFECTS, "good"].index(kind), index])
                image, mask = scene(rng, kind, image_side, defect_pixels)
                Image.fromarray(image).save(folder / part / kind / f"{index:03}.png")
                if kind != "good":
                    Image.fromarray(mask).save(folder / "ground_truth" / kind / f"{index:03}_mask.png")


def scene(
    rng: np.random.Generator,
    kind: str = "good",
    image_side: int = SIDE,
    defect_pixels: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image.

    Args:
        rng: Source of pose, light, grain, noise and defect.
        kind: ``good`` or a name in ``DEFECTS``.
        image_side: Height and width of the image, pixels: S.
        defect_pixels: As in :class:`DemoData`.

    Returns:
        Image (S, S, 3), uint8, and mask (S, S), uint8, 255 where the defect changed the image.
    """
    times = DRAW if image_side < LARGE else 1
    side = image_side * times
    angle, scale = rng.uniform(-15, 15), rng.uniform(0.92, 1.05)
    shift = rng.uniform(-14, 14, 2) * side / SIDE
    part = _plate(rng, side)
    extent = None
    if defect_pixels is not None and kind != "good":
        extent = times * np.exp(rng.uniform(*np.log(defect_pixels)))  # as many small ones as large ones
    changed = part if kind == "good" else DEFECTS[kind](part.copy(), rng, extent)
    layers = [
        _place(layer, angle, scale, shift, image_side) for layer in ([part] if changed is part else [part, changed])
    ]
    bench = _grain(rng, side, 40, 40) * 6 + rng.uniform(58, 74)
    light = _light(rng, image_side)
    noise = rng.normal(0, rng.uniform(1.0, 2.5), (image_side, image_side, 3))
    tint = np.array([1.0, 1.0, 1.0]) + rng.uniform(-0.03, 0.03, 3)
    shaded = [_shade(layer, bench, light, tint) for layer in layers]
    clean, image = shaded[0], shaded[-1]
    mask = (np.abs(image - clean).max(axis=2) > 6).astype(np.uint8) * 255
    return np.clip(image + noise, 0, 255).astype(np.uint8), mask


def _plate(rng: np.random.Generator, side: int) -> Image.Image:
    """A brushed metal plate with five holes and a label: RGBA, transparent around the part."""
    brushed = _grain(rng, side, 3, 60) * 14 + 150
    pixels = np.repeat(brushed[:, :, None], 3, axis=2) * np.array([1.0, 0.98, 0.94])
    plate = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert("RGBA")
    pen = ImageDraw.Draw(plate)
    for x, y in HOLES:
        _disc(pen, x * side, y * side, 0.045 * side, (52, 50, 48, 255))
        _disc(pen, x * side, y * side, 0.033 * side, (24, 24, 26, 255))
    pen.rounded_rectangle([0.38 * side, 0.6 * side, 0.62 * side, 0.72 * side], 0.02 * side, fill=(176, 160, 104, 255))
    pen.rectangle([0.42 * side, 0.645 * side, 0.58 * side, 0.675 * side], fill=(96, 88, 66, 255))
    shape = Image.new("L", (side, side), 0)
    ImageDraw.Draw(shape).rounded_rectangle([0.16 * side, 0.2 * side, 0.84 * side, 0.8 * side], 0.06 * side, fill=255)
    plate.putalpha(shape)
    return plate


HOLES = ((0.25, 0.3), (0.75, 0.3), (0.25, 0.7), (0.75, 0.7), (0.5, 0.42))  # centres, shares of the drawing's side


def _spot(rng: np.random.Generator, side: int) -> tuple[float, float]:
    """A position on the plate, away from its rim."""
    return rng.uniform(0.24, 0.76) * side, rng.uniform(0.28, 0.72) * side


def _extent(rng: np.random.Generator, low: float, high: float, side: int, stated: float | None) -> float:
    """A defect's extent in the drawing: the one that is stated, or one between two shares of the side."""
    return rng.uniform(low, high) * side if stated is None else stated


def _scratch(part: Image.Image, rng: np.random.Generator, extent: float | None) -> Image.Image:
    x, y = _spot(rng, part.width)
    turn, length = rng.uniform(0, np.pi), _extent(rng, 0.06, 0.3, part.width, extent)
    bends = np.cumsum(np.column_stack([np.full(6, length / 5), rng.normal(0, length / 40, 6)]), axis=0)
    cos, sin = np.cos(turn), np.sin(turn)
    line = [(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in bends - bends.mean(axis=0)]
    tone = int(rng.choice([70, 225]))
    return _keep_shape(part, lambda pen: pen.line(line, fill=(tone, tone, tone, 255), width=int(rng.integers(3, 6))))


def _dent(part: Image.Image, rng: np.random.Generator, extent: float | None) -> Image.Image:
    x, y = _spot(rng, part.width)
    radius = _extent(rng, 0.03, 0.12, part.width, extent) / 2

    def strokes(pen: ImageDraw.ImageDraw) -> None:
        _disc(pen, x, y, radius, (118, 116, 112, 255))
        _disc(pen, x - radius / 4, y - radius / 4, radius * 0.7, (190, 188, 182, 255))

    return _keep_shape(part, strokes)


def _stain(part: Image.Image, rng: np.random.Generator, extent: float | None) -> Image.Image:
    x, y = _spot(rng, part.width)
    radius = _extent(rng, 0.04, 0.16, part.width, extent) / 2
    blobs = [
        (x + rng.normal(0, radius / 2), y + rng.normal(0, radius / 2), radius * rng.uniform(0.4, 0.8)) for _ in range(6)
    ]
    color = (int(rng.integers(95, 125)), int(rng.integers(75, 95)), int(rng.integers(45, 65)), 255)

    def strokes(pen: ImageDraw.ImageDraw) -> None:
        for blob in blobs:
            _disc(pen, *blob, color)

    return _keep_shape(part, strokes)


def _plugged_hole(part: Image.Image, rng: np.random.Generator, extent: float | None) -> Image.Image:
    del extent
    x, y = HOLES[rng.integers(len(HOLES))]
    tone = int(rng.integers(150, 200))
    return _keep_shape(
        part, lambda pen: _disc(pen, x * part.width, y * part.width, 0.036 * part.width, (tone, tone, tone, 255))
    )


def _chip(part: Image.Image, rng: np.random.Generator, extent: float | None) -> Image.Image:
    x, y = _spot(rng, part.width)
    radius = _extent(rng, 0.044, 0.1, part.width, extent) / 2
    turns = np.sort(rng.uniform(0, 2 * np.pi, 5))
    corners = [(x + radius * np.cos(turn), y + radius * np.sin(turn)) for turn in turns]
    color = (*rng.choice([(172, 120, 70), (60, 70, 66), (205, 205, 198)]).tolist(), 255)
    return _keep_shape(part, lambda pen: pen.polygon(corners, fill=color))


DEFECTS: dict[str, Callable[[Image.Image, np.random.Generator, float | None], Image.Image]] = {
    "scratch": _scratch,
    "dent": _dent,
    "stain": _stain,
    "plugged_hole": _plugged_hole,
    "chip": _chip,
}


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, color: tuple[int, ...]) -> None:
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)


def _keep_shape(part: Image.Image, strokes: Callable[[ImageDraw.ImageDraw], object]) -> Image.Image:
    """Draw on a part without changing where it is transparent."""
    shape = part.getchannel("A")
    strokes(ImageDraw.Draw(part))
    part.putalpha(shape)
    return part


def _grain(rng: np.random.Generator, side: int, height: float, width: float) -> np.ndarray:
    """Smooth noise of unit deviation (side, side), whose grains are ``height`` by ``width`` pixels."""
    coarse = rng.normal(size=(round(side / height), round(side / width))).astype(np.float32)
    values = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    return (values - values.mean()) / values.std()


def _light(rng: np.random.Generator, side: int) -> np.ndarray:
    """A soft lamp's brightness (side, side), about 1."""
    y, x = np.mgrid[0:side, 0:side] / side
    center_x, center_y = rng.uniform(0, 1, 2)
    lamp = np.exp(-((x - center_x) ** 2 + (y - center_y) ** 2) / 0.8)
    return rng.uniform(0.75, 0.9) + rng.uniform(0.2, 0.35) * lamp


def _place(part: Image.Image, angle: float, scale: float, shift: np.ndarray, side: int) -> Image.Image:
    """Turn, scale and move a part, and reduce it to the image's size."""
    center = part.width / 2
    turned = part.rotate(angle, Image.Resampling.BICUBIC, translate=tuple(shift.astype(int)))
    half = min(center, center / scale)
    if scale < 1:  # a smaller part: widen the canvas, the new rim is transparent
        margin = round(center / scale - center)
        canvas = Image.new("RGBA", (part.width + 2 * margin, part.height + 2 * margin))
        canvas.paste(turned, (margin, margin))
        return canvas.resize((side, side), Image.Resampling.BILINEAR)
    box = (center - half, center - half, center + half, center + half)
    return turned.resize((side, side), Image.Resampling.BILINEAR, box=box)


def _shade(part: Image.Image, bench: np.ndarray, light: np.ndarray, tint: np.ndarray) -> np.ndarray:
    """Lay a part with its shadow on the bench, under the lamp: (S, S, 3), float, in [0, 255]."""
    pixels = np.asarray(part, dtype=np.float64)
    alpha = pixels[:, :, 3:] / 255
    blurred = Image.fromarray(pixels[:, :, 3].astype(np.uint8)).filter(ImageFilter.GaussianBlur(4 * part.width / SIDE))
    shadow = 1 - 0.5 * np.roll(np.asarray(blurred, dtype=np.float64), round(3 * part.width / SIDE), axis=(0, 1)) / 255
    ground = np.asarray(Image.fromarray(bench.astype(np.float32)).resize(part.size)) * shadow
    return (pixels[:, :, :3] * alpha + ground[:, :, None] * (1 - alpha)) * light[:, :, None] * tint


publish(DemoData, "anomalib.data")
