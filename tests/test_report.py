"""The report's page: what counts on it, and its numbers in a real browser."""

import dataclasses
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import rows

from stpm_plugin.commands.entry import main as stpm
from stpm_plugin.deployment.report.contents import GOOD, Contents, Shown, beside, by_folder, contents_of, pictures
from stpm_plugin.deployment.report.page import as_script, data_of, link_to, write
from stpm_plugin.deployment.settings import in_words, options_in
from stpm_plugin.deployment.verdict import Scale, Verdict

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def scored(exported: Path, demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table of all drawn images, and their heat maps."""
    folder = tmp_path_factory.mktemp("scored")
    images = str(next(demo_root.glob("plate-*")))
    sources = [f"{images}/train", f"{images}/test"]
    table, maps = str(folder / "scores.csv"), str(folder / "maps")
    assert stpm(["score", str(exported), *sources, "--csv", table, "--heatmaps", maps]) == 0
    return folder


def test_images_that_the_model_knows_do_not_count(scored, exported):
    found = contents_of(scored / "scores.csv", exported)
    assert (found.trained, found.held_out, found.unknown) == (8, 2, False)
    assert len(found.images) == len(rows(scored / "scores.csv")) - 10
    assert not any("train" in Path(shown.path).parts for shown in found.images)
    assert sum(shown.kind == GOOD for shown in found.images) == 2
    assert [*found.images] == sorted(found.images, key=lambda shown: -shown.score)
    labels = {row["path"]: row["label"] == "anomalous" for row in rows(scored / "scores.csv")}
    assert all((shown.score > found.limit) == labels[shown.path] for shown in found.images)


def test_another_models_table_is_refused(scored, exported, tmp_path, capsys):
    moved = str(tmp_path / "moved.xml")
    assert stpm(["threshold", str(exported), "--sensitivity", "0.6", "--out", moved]) == 0
    assert stpm(["report", str(scored / "scores.csv"), "--model", moved]) == 1
    assert "was written by the model" in capsys.readouterr().err


def test_a_moved_threshold_is_the_tables(exported, numbered_images, tmp_path):
    for more, limit in ((["--sensitivity", "0.7"], 0.3), (["--threshold", "0.123456789"], 0.5)):
        table = tmp_path / f"{more[0]}.csv"
        assert stpm(["score", str(exported), str(numbered_images), "--csv", str(table), *more]) == 0
        found = contents_of(table, exported)
        assert found.limit == pytest.approx(limit)
        if more[0] == "--threshold":
            assert found.verdict.image.threshold == 0.123456789


def test_words_of_settings_are_read_back():
    assert options_in(in_words("CPU", "f32", 0.1 + 0.2, None, None)) == {"threshold": 0.1 + 0.2}
    assert options_in(in_words("GPU", "bf16", None, 0.7, None)) == {"sensitivity": 0.7}
    assert options_in(in_words("CPU", "f32", None, None, None)) == {}


def test_a_rounded_score_stays_on_its_side():
    assert beside(0.5, "anomalous", 0.5) > 0.5
    assert beside(0.5000001, "normal", 0.5) <= 0.5
    assert beside(0.7, "anomalous", 0.5) == 0.7


def test_kinds_need_a_folder_of_good_images():
    assert by_folder(["a/good/1.png", "a/dent/2.png"]) == {"a/good/1.png": "good", "a/dent/2.png": "dent"}
    assert set(by_folder(["a/today/1.png", "a/dent/2.png"]).values()) == {"images"}


def made_up(folder: Path, name: str = "x", number: int = 400) -> tuple[Contents, np.ndarray, np.ndarray]:
    """Contents of images that need not exist; also their raw scores and whether they have defects."""
    generator = np.random.default_rng(0)
    bad = np.arange(number) % 3 == 0
    raw = generator.lognormal(np.where(bad, 1.0, -1.0), 0.8)
    verdict = Verdict("held-out good images", Scale(1.0), Scale(1.0), held_out_scores=tuple(sorted(raw[~bad][:50])))
    score = verdict.image.normalize(raw).astype(float)
    kinds = np.where(bad, np.where(np.arange(number) % 2 == 0, "dent", "chip"), GOOD)
    shown = [
        Shown(f"{folder}/{k}/{name} {i}.png", s, r, str(k))
        for i, (s, r, k) in enumerate(zip(score, raw, kinds, strict=True))
    ]
    shown.sort(key=lambda one: -one.score)
    return Contents(Path("my model.xml"), verdict, shown, 0, 0, False), raw, bad


def test_thresholds_without_a_range_and_frames_without_a_picture_make_a_page(tmp_path, monkeypatch):
    """As with enable_normalization=False; a frame's video is not read as an image."""
    contents, *_ = made_up(tmp_path)
    scale = Scale(1.0, float("nan"), float("nan"))
    verdict = dataclasses.replace(contents.verdict, image=scale, pixel=scale, normalize=False)
    data = data_of(dataclasses.replace(contents, verdict=verdict), [""] * 400, tmp_path)
    assert json.loads(as_script(data))["scale"] == {
        "normalizes": False, "relative": False, "threshold": 1.0, "range": 0,
    }  # fmt: skip
    monkeypatch.setattr("stpm_plugin.deployment.report.contents.decode", lambda _: pytest.fail("read"))
    assert pictures([Shown("line.avi#3", 0.5, 1.0, GOOD)], None, lambda: None) == [""]


def test_no_name_of_a_file_ends_the_data(tmp_path):
    contents, _, _ = made_up(tmp_path, "</script><b onload=1>&\u2028\"'")
    data = data_of(contents, [""] * 400, tmp_path)
    text = as_script(data)
    assert "<" not in text
    assert json.loads(text) == data
    assert link_to(str(tmp_path / "a b#?.png"), tmp_path) == "a%20b%23%3F.png"


def test_pictures_are_heat_maps_where_there_are_any(scored, exported):
    found = contents_of(scored / "scores.csv", exported)
    steps: list[int] = []
    drawn, plain = (pictures(found.images, maps, lambda: steps.append(1)) for maps in (scored / "maps", None))
    assert len(steps) == 2 * len(found.images)
    assert all(drawn)
    assert all(one != other for one, other in zip(drawn, plain, strict=True))
    gone = [found.images[0]._replace(path="/gone.png"), found.images[0]._replace(current=False)]
    assert pictures(gone, None, lambda: None) == ["", ""]


def test_an_image_that_has_changed_is_not_shown_with_its_old_score(exported, numbered_images, tmp_path, capsys):
    shutil.copytree(numbered_images, tmp_path / "line")
    assert stpm(["score", str(exported), "line"]) == 0
    shutil.copy(tmp_path / "line/frame 7.png", tmp_path / "line/frame 9.png")
    (tmp_path / "line/frame 8.png").unlink()
    assert contents_of(Path("scores.csv"), exported).stale == 2
    assert stpm(["report", "scores.csv", "--model", str(exported)]) == 0
    assert "warning: 2 images have changed or are gone since they were scored" in capsys.readouterr().err
    assert "shown without a picture: 2." in Path("report.html").read_text()


@pytest.fixture
def browser():
    """A headless Chromium."""
    if BROWSER is None:
        pytest.skip("there is no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_the_sliders_numbers_equal_numpys(browser, tmp_path):
    contents, raw, bad = made_up(tmp_path)
    write(tmp_path / "report.html", contents, [""] * 400, "made up")
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    slider = page.locator("#slider")
    for limit in (0.5, 0.31, 0.05, 0.77):
        slider.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", limit)
        page.wait_for_timeout(100)
        limit = float(slider.input_value())  # as the browser rounds it
        above = contents.verdict.image.normalize(raw).astype(float) > limit
        shown = {name: int(page.locator(f"#{name}").inner_text()) for name in
                 ("good-normal", "good-anomalous", "bad-normal", "bad-anomalous")}  # fmt: skip
        assert [*shown.values()] == [
            (~above & ~bad).sum(),
            (above & ~bad).sum(),
            (~above & bad).sum(),
            (above & bad).sum(),
        ]
        alarms = float(page.locator("#false-alarms").inner_text().rstrip(" %"))
        assert alarms == pytest.approx(100 * above[~bad].mean(), abs=0.06)
        held = np.asarray(contents.verdict.image.normalize(contents.verdict.held_out_scores), float)
        assert page.locator("#held-out").inner_text() == f"{100 * (held > limit).mean():.1f} %"
        kinds = {
            row.split("\t")[0]: int(row.split("\t")[2]) for row in page.locator("#kinds").inner_text().splitlines()
        }
        assert sum(kinds.values()) == above.sum()
        assert float(page.locator("#rawlimit").input_value()) == pytest.approx(limit / (1 - limit), rel=1e-4)
        assert page.locator("figure.anomalous").count() == min(60, above.sum())
    page.select_option("#show", "missed")
    page.wait_for_timeout(100)
    assert page.locator("#count").inner_text() == f"{(~above & bad).sum()} of 400"
    page.fill("#rawlimit", "2.5")
    page.wait_for_timeout(100)
    assert 'stpm threshold "my model.xml" --value 2.5' in page.locator("#apply").inner_text()
    assert page.locator("#bad-normal").inner_text() == str(((raw <= 2.5) & bad).sum())
    page.click("#reset")
    page.wait_for_timeout(100)
    assert page.locator("#apply").inner_text() == ""
    assert page.locator("#good-anomalous").inner_text() == str(((raw > 1) & ~bad).sum())
    assert not errors


def test_a_page_fits_a_telephone_and_asks_no_network(browser, scored, exported):
    line = ["report", str(scored / "scores.csv"), "--model", str(exported), "--heatmaps", str(scored / "maps")]
    assert stpm(line) == 0
    context = browser.new_context(viewport={"width": 400, "height": 800}, color_scheme="dark", offline=True)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url.partition(":")[0]))
    page.goto((scored / "report.html").as_uri())
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert set(asked) <= {"file", "data"}
    assert page.locator("figure img").count() == len(rows(scored / "scores.csv")) - 10
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in dark[4:-1].split(",")) < 150
    link = page.locator("figure a").first.get_attribute("href")
    assert cv2.imread(str((scored / link).resolve())) is not None
