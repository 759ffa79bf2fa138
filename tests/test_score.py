"""Scoring with an exported model, beside anomalib's own predictions of the same images."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from anomalib.data import PredictDataset
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from conftest import NUMBERED, loaded, rows, run
from PIL import Image

from stpm_plugin.commands.entry import main as stpm
from stpm_plugin.decoding import decode, jpeg_size
from stpm_plugin.deployment.heatmaps import overlay
from stpm_plugin.deployment.images import find_images, read_images
from stpm_plugin.deployment.report.contents import contents_of, heatmap_of
from stpm_plugin.errors import STPMError


def as_read(image, name):
    return image


KINDS = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "rotated", "animated", "clear", "palette", "deep"]


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_training(tmp_path, kind):
    """anomalib's reader, by which training sees images, and the one here, for each kind of file that both take."""
    slope = np.add.outer(np.arange(48), 2 * np.arange(64)).astype(np.uint8)
    image = Image.fromarray(np.stack([slope, slope[::-1], slope[:, ::-1]], -1))
    path, options = tmp_path / ("image.jpg" if kind in ("CMYK", "rotated") else "image.png"), {}
    if kind == "rotated":
        options["exif"] = image.getexif()
        options["exif"][274] = 6  # the camera was turned by a right angle
    elif kind == "animated":
        options |= {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    elif kind == "clear":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    elif kind == "palette":
        image, options = image.quantize(16), {"transparency": 3}
    elif kind != "deep":
        image = image.convert(kind)
    if kind == "deep":  # Pillow writes no colours of 16 bits
        cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 65536, (9, 7, 3), np.uint16))
    else:
        image.save(path, **options)
    expected = np.asarray(read_image(path)) * 255
    (_, read), *_ = read_images([str(path)], pytest.fail, as_read)
    np.testing.assert_allclose(read[:, :, ::-1], expected, atol=1)  # CMYK is rounded in another way


@pytest.mark.parametrize("batch", [1, 3])
def test_scores_equal_the_engines(trained, exported, numbered_images, tmp_path, batch):
    table = tmp_path / "scores.csv"
    command = [str(exported), str(numbered_images), "--csv", str(table), "--batch", str(batch)]
    assert stpm(["score", *command]) == 0
    found = {row["path"]: row for row in rows(table)}
    assert [*found] == [str(numbered_images / f"frame {number}.png") for number in (7, 8, 9, 10, 11)]
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    for prediction in engine.predict(loaded(trained), dataset=PredictDataset(numbered_images), ckpt_path=trained):
        row = found[prediction.image_path[0]]
        assert float(row["score"]) == pytest.approx(prediction.pred_score.item(), rel=1e-3, abs=1e-4)
        assert row["label"] == ["normal", "anomalous"][int(prediction.pred_label)]
        assert 0 < float(row["latency_ms"]) < 60_000


def test_unreadable_files_lose_nothing(exported, numbered_images, tmp_path, monkeypatch, capsys):
    """One is empty, one cut off, and one vanishes once the folder was listed."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in numbered_images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "frame 9.png").write_bytes(b"")
    (folder / "frame 10.png").write_bytes((numbered_images / "frame 10.png").read_bytes()[:50])
    listed = find_images([str(folder)])
    monkeypatch.setattr("stpm_plugin.commands.scoring.find_images", lambda _: listed)
    (folder / "frame 8.png").unlink()
    table = tmp_path / "scores.csv"
    assert stpm(["score", str(exported), str(folder), "--csv", str(table)]) == 2
    said = capsys.readouterr().err
    for number in (8, 9, 10):
        assert f"{folder / f'frame {number}.png'} cannot be read as an image" in said
    assert [Path(row["path"]).name for row in rows(table)] == [f"frame {number}.png" for number in (7, 11)]


def test_an_image_of_another_size_than_the_mask_loses_no_other(exported, numbered_images, tmp_path, capsys):
    folder, table = tmp_path / "images", tmp_path / "s.csv"
    folder.mkdir()
    for name in ("a", "c"):
        shutil.copy(numbered_images / "frame 7.png", folder / f"{name}.png")
    height, width = decode(str(folder / "a.png")).shape[:2]
    Image.new("RGB", (9, 7)).save(folder / "b.png")
    Image.new("L", (width, height)).save(tmp_path / "mask.png")
    command = ["score", str(exported), str(folder), "--csv", str(table), "--ignore", str(tmp_path / "mask.png")]
    for _ in range(2):
        assert stpm(command) == 2
        said = capsys.readouterr().err
        assert f"{folder / 'b.png'} has 7 x 9 pixels and the mask" in said
        assert "they must be equal. No row was written." in said
        assert [Path(row["path"]).name for row in rows(table)] == ["a.png", "c.png"]


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "clear.tif", "apart.png"])
def test_an_image_that_training_reads_otherwise_is_refused(tmp_path, name):
    still, frames = Image.new("RGB", (9, 7), "red"), [Image.new("RGB", (9, 7), colour) for colour in ("blue", "green")]
    if name.startswith("deep"):
        Image.fromarray(np.full((9, 7), 40_000, np.uint16)).save(tmp_path / name)
    elif name == "clear.tif":
        Image.new("RGBA", (9, 7), (200, 100, 50, 100)).save(tmp_path / name)
    else:
        still.save(tmp_path / name, save_all=True, append_images=frames, default_image=True)
    refused = []
    assert not [*read_images([str(tmp_path / name)], refused.append, as_read)]
    assert refused == [str(tmp_path / name)]


def test_bytes_of_a_jpeg_that_spell_a_chunk_of_a_png_are_pixels(tmp_path):
    Image.new("RGB", (9, 7), "red").save(tmp_path / "x.jpg", comment=b"acTL")
    assert [*read_images([str(tmp_path / "x.jpg")], pytest.fail, as_read)]


@pytest.mark.parametrize(
    ("size", "factor"), [((383, 400), 1), ((384, 400), 2), ((400, 1600), 2), ((768, 769), 4), ((1537, 1536), 8)]
)
def test_a_reduced_jpeg_keeps_three_pixels_for_one(tmp_path, size, factor):
    slope = np.add.outer(np.arange(size[0]), np.arange(size[1])) // 16
    for options in ({"quality": 95}, {"progressive": True, "comment": b"\xff\xc0" * 50}):
        Image.fromarray(slope.astype(np.uint8)).convert("RGB").save(tmp_path / "x.jpg", **options)
        assert jpeg_size((tmp_path / "x.jpg").read_bytes()) == size
        image = decode(str(tmp_path / "x.jpg"), (64, 64))
        assert image.shape == (-(-size[0] // factor), -(-size[1] // factor), 3)
        expected = slope[factor // 2 :: factor, factor // 2 :: factor]
        height, width = expected.shape
        np.testing.assert_allclose(image[:height, :width, 0], expected, atol=2)


def test_only_large_jpegs_are_reduced(tmp_path):
    image = Image.effect_noise((640, 640), 50).convert("RGB")
    for name, network in [("x.png", (64, 64)), ("x.jpg", (108, 108))]:
        image.save(tmp_path / name)
        path = str(tmp_path / name)
        assert jpeg_size((tmp_path / name).read_bytes()) == (None if name == "x.png" else (640, 640))
        np.testing.assert_array_equal(decode(path, network), decode(path))


def test_reduced_decoding_is_a_setting_of_its_rows(exported, tmp_path, capsys):
    image = Image.effect_noise((640, 640), 50).convert("RGB")
    image.save(tmp_path / "x.jpg")
    command = ["score", str(exported), str(tmp_path / "x.jpg"), "--csv", str(tmp_path / "s.csv")]
    assert stpm([*command, "--reduced-decode"]) == 0
    (row,) = rows(tmp_path / "s.csv")
    assert row["settings"] == "CPU f32, decode reduced"
    assert stpm(command) == 1
    assert "contains scores from other settings (CPU f32, decode reduced; these are" in capsys.readouterr().err
    assert stpm([*command, "--restart"]) == 0
    (plain,) = rows(tmp_path / "s.csv")
    assert float(row["raw"]) != float(plain["raw"])
    assert float(row["raw"]) == pytest.approx(float(plain["raw"]), rel=0.1)
    assert stpm([*command, "--reduced-decode", "--json"]) == 1
    assert "omit --json, --heatmaps and --ignore" in capsys.readouterr().err


def test_a_heat_map_that_is_not_written_is_said(exported, numbered_images, tmp_path, capsys):
    (tmp_path / "m").write_text("a file where the folder should be")
    command = [str(exported), str(numbered_images), "--csv", str(tmp_path / "s.csv"), "--heatmaps", str(tmp_path / "m")]
    assert stpm(["score", *command]) == 1
    assert "frame 7.png.heatmap.jpg cannot be written" in capsys.readouterr().err
    assert rows(tmp_path / "s.csv") == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no /dev/full")
@pytest.mark.parametrize("watch", [[], ["--watch"]])
@pytest.mark.parametrize("output", ["closed", "full"])
def test_errors_of_the_output_are_not_the_tables(output, watch, exported, numbered_images, tmp_path):
    command = [sys.executable, "-m", "stpm_plugin.commands", "score", str(exported), str(numbered_images), "--json"]
    end, pipe = os.pipe()
    os.close(end)
    with os.fdopen(pipe, "w") as closed, Path("/dev/full").open("w") as full:
        out = closed if output == "closed" else full
        command += ["--csv", str(tmp_path / "s.csv"), *watch]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "trying again" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Broken pipe" not in done.stderr
    said = f"standard output: No space left on device; fix this, then run the command again to resume {tmp_path}"
    assert (said in done.stderr) == (output == "full")


def test_images_on_two_drives_need_no_common_folder(exported, numbered_images, tmp_path, monkeypatch):
    def apart(_):
        msg = "Paths don't have the same drive"
        raise ValueError(msg)

    monkeypatch.setattr("stpm_plugin.commands.scoring.os.path.commonpath", apart)
    image = numbered_images / "frame 7.png"
    command = ["score", str(exported), str(image), "--csv", str(tmp_path / "s.csv")]
    assert stpm([*command, "--heatmaps", str(tmp_path / "maps")]) == 0
    assert (tmp_path / "maps" / image.relative_to(image.anchor)).with_name(f"{image.name}.heatmap.jpg").is_file()


def test_heatmaps_lie_as_the_images_do_and_are_no_input(exported, numbered_images, tmp_path):
    images, table = tmp_path / "in ü", tmp_path / "Tafel 検査.csv"
    for number, folder in [(7, "a"), (9, "b")]:
        (images / folder).mkdir(parents=True)
        (images / folder / "x.png").write_bytes((numbered_images / f"frame {number}.png").read_bytes())
    assert stpm(["score", str(exported), str(images), "--csv", str(table)]) == 0
    first = table.read_bytes()
    command = [str(exported), str(images), "--csv", str(table), "--heatmaps", str(images / "maps ß")]
    for _ in range(2):  # asked for later, they are drawn; they lie among the images and are not scored
        assert stpm(["score", *command]) == 0
        drawn = [cv2.imread(str(images / f"maps ß/{folder}/x.png.heatmap.jpg")).shape[:2] for folder in "ab"]
        assert drawn == [NUMBERED[0], NUMBERED[2]]
    assert table.read_bytes() == first


def test_a_good_images_picture_is_the_image_and_a_bad_one_is_tinted_and_outlined():
    image = np.full((4, 4, 3), 100, np.uint8)
    assert (overlay(image, np.full((4, 4), 0.1, np.float32), 0.2) == 100).all()  # half the threshold
    laid = overlay(image, np.array([[0.0, 0.0, 0.0, 0.4]] * 4, np.float32), 0.2)
    assert (laid[:, :2] == 100).all()
    assert (laid[:, 3] == 255).all()  # the outline of a region one pixel wide
    bright = cv2.applyColorMap(np.array([[191]], np.uint8), cv2.COLORMAP_INFERNO)[0, 0]
    wide = overlay(np.full((9, 9, 3), 100, np.uint8), np.full((9, 9), 0.3, np.float32), 0.2)  # 1.5 thresholds
    np.testing.assert_allclose(wide[4, 4], 40 + 0.6 * bright, atol=1)


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("f10.png", "f2.png", "f1.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.rsplit("/", 1)[1] for path in find_images([str(tmp_path)])] == ["f1.jpg", "f2.png", "f10.png"]
    with pytest.raises(STPMError, match="no image found at"):
        find_images([str(tmp_path / "*.bmp")])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.xml", "{images}"], "missing.xml does not exist"),
        (["{broken}", "{images}"], "cannot be read"),
        (["{model}", "{images}", "--csv", "{broken}"], "is not a CSV of scores"),
        (["{model}", "{images}", "--csv", "/dev/null"], "is not a regular file"),
        (["{model}", "{images}", "--sensitivity", "1"], "sensitivity=1.0 must be between 0 and 1"),
        (["{model}", "{images}", "--threshold", "-1"], "threshold=-1.0 must be above 0"),
        (["{model}", "{images}", "--batch", "0"], "batch=0 must be at least 1"),
        (["{model}", "{images}", "--ignore", "{broken}"], "cannot be read as an image"),
        (["{model}", "{images}", "--ignore", "{seam}"], "seam.png leaves no pixel at 64 x 64: ignore less."),
        (["{model}", "{cut}"], "cut.avi ends after 12 of 20 frames: copy it again."),
        (["{model}", "{images}/**.png"], "**.png"),  # no pattern until Python 3.13, and then one of no image
        (["{model}", "{model}", "--watch"], "--watch takes folders"),
        (["{model}", "{images}", "--device", "TOASTER"], "device TOASTER cannot run"),
        (["{model}", "nowhere"], "no image found at nowhere"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, exported, numbered_images, tmp_path, capsys):
    broken = tmp_path / "broken.xml"
    broken.write_text("<net>\n")
    seam = np.full((1000, 1000), 255, np.uint8)
    seam[500:505] = 0
    cv2.imwrite(str(tmp_path / "seam.png"), seam)
    places = {"model": exported, "images": numbered_images, "broken": broken, "seam": tmp_path / "seam.png"}
    places["cut"] = cut_video(tmp_path / "cut.avi")
    code = stpm(["score", *(argument.format(**places) for argument in arguments)])
    *before, said = (line for line in capsys.readouterr().err.splitlines() if "scored" not in line)
    assert code == (2 if before else 1)  # of the video that was cut 12 frames have rows
    assert words in (said if code == 1 else before[-1])
    assert len(before) < 3
    assert "Traceback" not in said


def cut_video(file: Path) -> Path:
    """A video of twenty frames, of which twelve are left."""
    generator = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 64))
    for _ in range(20):
        writer.write(generator.integers(0, 255, (64, 64, 3), np.uint8))
    writer.release()
    file.write_bytes(file.read_bytes()[: int(0.6 * file.stat().st_size)])
    return file


def test_a_heat_map_of_another_image_or_verdict_is_not_taken(exported, numbered_images, tmp_path):
    """Of two folders, which draw to one place, and of a threshold that has moved since."""
    for lot, source in (("one", "frame 7.png"), ("two", "frame 8.png")):
        (tmp_path / lot).mkdir()
        shutil.copy(numbered_images / source, tmp_path / lot / "a.png")
    maps, table = tmp_path / "maps", tmp_path / "s.csv"
    drawn = maps / "a.png.heatmap.jpg"
    pictures = []
    for lot, *more in (["one"], ["one"], ["two"], ["one"], ["one", "--restart", "--threshold", "3"]):
        line = ["score", str(exported), str(tmp_path / lot), "--csv", str(table), "--heatmaps", str(maps), *more]
        assert stpm(line) == 0
        pictures.append((drawn.read_bytes(), drawn.stat().st_mtime_ns))
        mine = {Path(one.path).parent.name: heatmap_of(one, maps) for one in contents_of(table, exported).images}
        assert mine[lot] == drawn
        assert [folder for folder in mine.values() if folder] == [drawn]
    assert pictures[0] == pictures[1]  # not drawn again
    assert pictures[3][0] == pictures[0][0]
    assert len({content for content, _ in pictures}) == 3


def test_a_folder_that_cannot_be_listed_is_named(exported, numbered_images, tmp_path, monkeypatch, capsys):
    images = Path(shutil.copytree(numbered_images, tmp_path / "images"))
    (images / "closed").mkdir()
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert stpm(["score", str(exported), str(images)]) == 1
    assert (
        capsys.readouterr().err
        == f"{images / 'closed'}: Permission denied; fix this, then run the command again to resume.\n"
    )


@pytest.mark.parametrize(("suffix", "left"), [(".xml", "half"), (".xml", "empty"), (".bin", "half"), (".bin", "gone")])
def test_a_model_that_is_not_whole_is_one_sentence(suffix, left, exported, numbered_images, tmp_path, capsys):
    """What an export that was killed, or a broken copy, leaves."""
    model = Path(shutil.copytree(exported.parent, tmp_path / "copy")) / exported.name
    cut = model.with_suffix(suffix)
    if left == "gone":
        cut.unlink()
    else:
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2 if left == "half" else 0])
    assert stpm(["score", str(model), str(numbered_images)]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"the model {model} cannot be read (")
    assert said.endswith("export it again with `anomalib export`.")
    assert "\n" not in said


def test_scoring_needs_neither_torch_nor_anomalib(exported, numbered_images, tmp_path):
    names = ["torch", "anomalib", "lightning", "timm", "rich", "psutil", "scipy", "watchfiles"]
    absent = f"import sys; sys.modules.update(dict.fromkeys({names}));"
    code = f"{absent} from stpm_plugin.commands.entry import main; sys.exit(main(['score', *sys.argv[1:]]))"
    run("-c", code, str(exported), str(numbered_images), "--csv", str(tmp_path / "scores.csv"))
    assert len(rows(tmp_path / "scores.csv")) == len(NUMBERED)
    assert "usage: stpm score" in run("-m", "stpm_plugin.commands", "score", "--help")
    assert sys.modules["torch"]
