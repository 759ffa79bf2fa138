"""Write a report as one HTML file that opens from disk: Jinja2 fills it in, and its own script moves the threshold.

The one plot is a histogram whose bars change with the threshold's colours, so it is drawn as plain SVG: plotting
libraries would add 1 to 4 MB of script to each page.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.request import pathname2url

import jinja2

from ...writing import write_whole
from ..table import cell, video_of
from .contents import GOOD, UNLABELLED, Contents


def write(target: Path, contents: Contents, pictures: Sequence[str], title: str) -> None:
    """Write the page.

    Raises:
        STPMError: It cannot be written.
    """
    content = page(contents, pictures, title, target.parent.resolve()).encode()
    write_whole(target, content, "choose another file with --out")


def page(contents: Contents, pictures: Sequence[str], title: str, folder: Path) -> str:
    """The page as HTML, with links relative to its folder."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        model=str(contents.model),
        date=datetime.datetime.now(tz=datetime.timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M"),
        contents=contents,
        basis=contents.verdict.basis,
        data=as_script(data_of(contents, pictures, folder)),
    )


def data_of(contents: Contents, pictures: Sequence[str], folder: Path) -> dict[str, Any]:
    """What the page's script reads."""
    verdict, scale = contents.verdict, contents.verdict.image
    held_out = verdict.held_out_scores
    kinds = sorted({shown.kind for shown in contents.images}, key=lambda kind: (kind not in (GOOD, UNLABELLED), kind))
    relative = scale.low is None or scale.high is None
    return {
        "kinds": kinds,
        "good": kinds.index(GOOD) if GOOD in kinds else -1,
        "unlabelled": kinds.index(UNLABELLED) if UNLABELLED in kinds else -1,
        "kind": [kinds.index(shown.kind) for shown in contents.images],
        "score": [shown.score for shown in contents.images],
        "raw": [shown.raw for shown in contents.images],
        "path": [cell(shown.path) for shown in contents.images],
        "link": [link_to(video_of(shown.path), folder) for shown in contents.images],
        "picture": list(pictures),
        "heldOut": [float(value) for value in (scale.normalize(held_out) if verdict.normalize else held_out)],
        "limit": contents.limit,
        "scale": {
            "normalizes": verdict.normalize,
            "relative": relative,
            "threshold": scale.threshold,
            "range": 0 if relative or not verdict.normalize else (scale.high or 0) - (scale.low or 0),
        },
        "model": str(contents.model),
    }


def link_to(path: str, folder: Path) -> str:
    """A link from a folder to a file, relative where both are on one drive."""
    try:
        return pathname2url(os.path.relpath(path, folder))
    except ValueError:
        return Path(path).as_uri()


def as_script(data: dict[str, Any]) -> str:
    """Data as JSON in which no file name can end the script."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
