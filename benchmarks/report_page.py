"""What a report of many images asks of a browser: size, time to the first picture, answer to the slider, memory.

    python -m benchmarks.report_page FOLDER --images 5000

FOLDER holds images; they are repeated, each time a little darker, so that no two pictures are equal. Needs a Chromium
and playwright. Scores are drawn; they do not matter here.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
from playwright.sync_api import Browser, sync_playwright

from benchmarks.environment import environment
from stpm_plugin.deployment.images import find_images
from stpm_plugin.deployment.report.contents import QUALITY, SIDE, Contents, Shown
from stpm_plugin.deployment.report.page import write
from stpm_plugin.deployment.verdict import Scale, Verdict

RESULTS = Path(__file__).parent / "results"
MOVES = 40  # of the slider


def main() -> None:
    """Make a page, open it in a headless browser, and keep what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="images")
    parser.add_argument("--images", type=int, default=5000, help="on the page (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="times the page is opened (default %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "report.html")
        contents, drawn = many(args.folder, args.images)
        started = time.perf_counter()
        write(target, contents, drawn, "many")
        found = {
            "images": args.images,
            "mebibytes": round(target.stat().st_size / 2**20, 1),
            "seconds_to_write": round(time.perf_counter() - started, 2),
        }
        with sync_playwright() as running:
            browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            rounds, version = [opened(browser, target) for _ in range(args.rounds)], browser.version
            browser.close()
    for name in rounds[0]:
        values = [one[name] for one in rounds]
        found[name] = {"mean": round(float(np.mean(values)), 1), "std": round(float(np.std(values, ddof=1)), 1)}
    found["rounds"] = args.rounds
    command = f"python -m benchmarks.report_page FOLDER --images {args.images} --rounds {args.rounds}"
    args.results.mkdir(parents=True, exist_ok=True)
    made = {**found, **environment(command), "browser": version}
    (args.results / "report_page.json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def many(folder: str, count: int) -> tuple[Contents, list[str]]:
    """Contents of ``count`` images, and their pictures."""
    paths = find_images([folder])
    small = []
    for path in paths:
        image = cv2.imread(path)
        factor = SIDE / max(image.shape[:2])
        small.append(cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA))
    generator = np.random.default_rng(0)
    raw = np.sort(generator.lognormal(0, 0.7, count))[::-1]
    verdict = Verdict("held-out good images", Scale(2.0), Scale(2.0), held_out_scores=tuple(sorted(raw[-200:])))
    scores = verdict.image.normalize(raw)
    shown = [
        Shown(f"/line/{'good' if index % 5 else 'dent'}/{index}.png", float(scores[index]), float(raw[index]),
              "good" if index % 5 else "dent")
        for index in range(count)
    ]  # fmt: skip
    drawn = []
    for index in range(count):
        picture = cv2.convertScaleAbs(small[index % len(small)], alpha=1 - index / count / 2)
        jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
        drawn.append(base64.b64encode(jpeg.tobytes()).decode())
    return Contents(Path("model.xml"), verdict, shown, 0, 0, unknown=False), drawn


def opened(browser: Browser, target: Path) -> dict[str, float]:
    """Open the page, wait for its first picture, move the slider, scroll, and look at the memory."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    started = time.perf_counter()
    page.goto(target.as_uri(), wait_until="commit")
    page.wait_for_function("document.images.length && document.images[0].naturalWidth > 0")
    first = 1000 * (time.perf_counter() - started)
    moves = page.evaluate(
        """async moves => {
          const slider = document.getElementById("slider"), spent = [];
          for (let move = 0; move < moves; move++) {
            const started = performance.now();
            slider.value = (move + 1) / (moves + 2);
            slider.dispatchEvent(new Event("input"));
            await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
            spent.push(performance.now() - started);
          }
          return spent;
        }""",
        MOVES,
    )
    for _ in range(20):
        page.mouse.wheel(0, 3000)
        page.wait_for_timeout(50)
    shown = page.locator("figure").count()
    processes = psutil.Process().children(recursive=True)
    renderers = [each for each in processes if "--type=renderer" in " ".join(each.cmdline())]
    memory = max(each.memory_info().rss for each in renderers) / 2**20
    page.close()
    return {
        "milliseconds_to_first_picture": first,
        "milliseconds_a_move_median": float(np.median(moves)),
        "milliseconds_a_move_highest": float(np.max(moves)),
        "pictures_after_scrolling": shown,
        "mebibytes_of_the_page": memory,
    }


if __name__ == "__main__":
    main()
