"""What a report shows: each image's score, kind and picture, and the threshold that judged it."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import openvino as ov

from ...decoding import decode
from ...errors import STPMError
from ...training.data_record import SHORT, identify
from ..exported_model import HELD_OUT, SET_BY, TRAINED, digest, files_of, images_of, read_model
from ..heatmaps import belongs, drive_of, mark
from ..images import DECODERS, HEATMAP
from ..settings import options_in
from ..table import Stamp, read_rows, stamp, video_of
from ..verdict import Scale, Verdict, changed, read_verdict

GOOD, UNLABELLED = "good", "images"  # kinds of good images, and of images without a known kind
SIDE, QUALITY = 160, 75  # of the pictures, pixels and JPEG's percentage: 5,000 take about 25 MB


class Shown(NamedTuple):
    """An image of a report.

    Attributes:
        path: Its file, or VIDEO#N.
        score: Normalised score; above the limit if and only if the table calls it anomalous.
        raw: Raw score.
        kind: ``good``, the name of its defects, or ``images`` where nothing is known.
        current: Whether its file is still the one that was scored.
        owner: The mark of its heat map.
    """

    path: str
    score: float
    raw: float
    kind: str
    current: bool = True
    owner: bytes = b""


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that a report shows.

    Attributes:
        model: The exported model that scored the images.
        verdict: Its verdict, with what the table's options changed.
        images: Those that count, the highest score first.
        trained: Number of images that are left out because they trained the model.
        held_out: Number of images that are left out because they chose its weights or set its thresholds.
        unknown: Whether the model does not say which images trained it.
    """

    model: Path
    verdict: Verdict
    images: list[Shown]
    trained: int
    held_out: int
    unknown: bool

    @property
    def stale(self) -> int:
        """Number of images whose files have changed or are gone since they were scored."""
        return sum(not shown.current for shown in self.images)

    @property
    def limit(self) -> float:
        """Scores above it are anomalous."""
        return limit_of(self.verdict.image, self.verdict.normalize)


def limit_of(scale: Scale, normalize: bool) -> float:
    """The threshold on the scale of the table's scores."""
    return float(scale.limit) if normalize else scale.raw_limit


def contents_of(table: Path, model: Path, kinds: Mapping[str, str] | None = None) -> Contents:
    """Read a table and the model that wrote it.

    Args:
        table: The CSV.
        model: The exported model.
        kinds: Kind of each image by its path; ``None`` takes the folders' names, if one is named ``good``.

    Raises:
        STPMError: The file is not a table, is empty or belongs to another model; or the model describes no verdict.
    """
    rows = read_rows(table)
    if not rows:
        msg = f"{table} contains no scores yet: score images first."
        raise STPMError(msg)
    network = read_model(ov.Core(), model)
    verdict = read_verdict(network, model)
    found, owners = digest(files_of(model)), {(row[8], row[9]) for row in rows}
    if verdict is None or math.isnan(verdict.image.threshold):
        msg = f"{model} describes no threshold: export its checkpoint again with `stpm export`."
        raise STPMError(msg)
    if {owner for owner, _ in owners} != {found}:
        msg = f"{table} was written by the model {rows[0][8]}, and {model} is {found}: pass the one that wrote it."
        raise STPMError(msg)
    options = options_in(rows[0][9])
    judged = changed(verdict, model, options.get("threshold"), options.get("sensitivity"), None) or verdict
    if kinds is None:
        kinds = by_folder([row[0] for row in rows])
    trained, held_out = images_of(network, TRAINED), images_of(network, HELD_OUT) | images_of(network, SET_BY)
    roles = roles_of([row[0] for row in rows], trained, held_out)
    limit = limit_of(judged.image, judged.normalize)
    images = [
        Shown(
            row[0],
            beside(float(row[1]), row[3], limit),
            float(row[2] or row[1]),
            kinds.get(row[0], UNLABELLED),
            stamp(row[0]) == Stamp(row[6], row[7]),
            mark(row[0], Stamp(row[6], row[7]), row[8], row[9]),
        )
        for row, role in zip(rows, roles, strict=True)
        if not role
    ]
    counts = Counter(roles)
    images.sort(key=lambda shown: (-shown.score, shown.path))
    return Contents(model, judged, images, counts[TRAINED], counts[HELD_OUT], not trained)


def by_folder(paths: Iterable[str]) -> dict[str, str]:
    """Kinds by the folders' names, if one is named ``good``; otherwise all are unlabelled."""
    folders = {path: Path(video_of(path)).parent.name for path in paths}
    known = GOOD in folders.values()
    return {path: folder if known else UNLABELLED for path, folder in folders.items()}


def roles_of(paths: Sequence[str], trained: frozenset[str], held_out: frozenset[str]) -> list[str]:
    """What each image was to the model: :data:`TRAINED`, :data:`HELD_OUT`, or nothing (an empty string)."""
    if not trained and not held_out:
        return [""] * len(paths)
    images = [path for path in paths if video_of(path) == path]  # training reads no videos
    _, _, digests = identify([Path(path) for path in images])
    known = {path: found[:SHORT] for path, found in zip(images, digests, strict=True)}
    found = [known.get(path, "") for path in paths]
    return [TRAINED if one in trained else HELD_OUT if one in held_out else "" for one in found]


def beside(score: float, label: str, limit: float) -> float:
    """A score as the table rounded it, on the side of the limit that its label says."""
    if (score > limit) == (label == "anomalous") or not label:
        return score
    return float(np.nextafter(limit, math.inf)) if label == "anomalous" else limit


def pictures(images: Sequence[Shown], heatmaps: Path | None, step: Callable[[], None]) -> list[str]:
    """A small picture of each image, its heat map if there is one, as base64 of a JPEG; empty where it is not current.

    Args:
        images: The images.
        heatmaps: Folder that `stpm score --heatmaps` wrote.
        step: Called after each.
    """

    def made(shown: Shown) -> str:
        if not shown.current:
            return ""
        drawn = heatmap_of(shown, heatmaps)
        if drawn is None and video_of(shown.path) != shown.path:
            return ""  # a frame has a picture only as a heat map
        picture = decode(str(drawn or video_of(shown.path)))  # not cv2.imread, which cannot open all of Windows' paths
        if picture is None:
            return ""
        factor = min(1.0, SIDE / max(picture.shape[:2]))
        size = [max(1, round(factor * length)) for length in picture.shape[1::-1]]
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        return base64.b64encode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()).decode()

    found = []
    with ThreadPoolExecutor(DECODERS) as pool:
        for one in pool.map(made, images):
            found.append(one)
            step()
    return found


def heatmap_of(shown: Shown, folder: Path | None) -> Path | None:
    """An image's own heat map in a folder that is laid out as the scored folders; ``None`` if there is none."""
    if folder is None:
        return None
    whole = Path(shown.path)
    parts = [*filter(None, [drive_of(whole)]), *whole.parts[1:]]
    tails = (folder.joinpath(*parts[at:-1], parts[-1] + HEATMAP) for at in range(len(parts)))
    return next((tail for tail in tails if belongs(tail, shown.owner)), None)
