"""What one process does: read images, score them, draw their heat maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2

from . import heatmaps
from .refusals import Refused
from .scorer import Scored, Scorer
from .table import stamp


class Worker:
    """Reads images, scores them and draws their heat maps, in one process.

    Args:
        scorer: The model.
        heatmaps: Folder for the heat maps; ``None`` draws none.
        root: Common parent of all images; a heat map's path in ``heatmaps`` is its image's path below it.
        regions: Whether anomalous regions are wanted.
    """

    def __init__(self, scorer: Scorer, heatmaps: Path | None, root: Path, regions: bool = False) -> None:
        cv2.setNumThreads(1)  # the cores are the model's and the decoders'
        set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # OpenCV moved it
        set_log_level(0)  # silent: the command names broken files at the end
        self.scorer, self.heatmaps, self.root, self.regions = scorer, heatmaps, root, regions

    def rows(
        self,
        paths: Iterable[str],
        unreadable: Callable[[str], None],
        refused: Refused,
        skip: Callable[[str], bool] | None = None,
    ) -> Iterator[Scored]:
        """Yield one verdict per image that can be scored, in the order of the paths, without image and map.

        Args:
            paths: Image files, and videos.
            unreadable: Called with the path of each file that cannot be read as training reads it.
            refused: Called with the path of each image that cannot be scored, and why, as for ``Scorer.score``.
            skip: Whether to leave out a video frame, by its name.
        """
        maps = self.regions or self.heatmaps is not None
        for scored in self.scorer.score(paths, maps, unreadable, skip, refused):
            if self.heatmaps is not None:
                picture = heatmaps.draw(scored, self.scorer.pixel_limit)
                owner = heatmaps.mark(scored.path, stamp(scored.path), self.scorer.digest, self.scorer.settings)
                heatmaps.write(picture, heatmaps.file_of(scored.path, self.heatmaps, self.root), owner)
            yield scored._replace(image=None, anomaly_map=None)
