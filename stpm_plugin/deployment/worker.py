"""What one process does: read images, score them, draw their heat maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np

from ..errors import STPMError
from .images import read_images
from .scorer import Scorer

Row = tuple[str, float, str, float]  # path, score, label, latency in milliseconds


class Worker:
    """Reads images, scores them and draws their heat maps, in one process.

    Args:
        scorer: The model.
        heatmaps: Folder for the heat maps; ``None`` draws none.
        root: Common parent of all images; a heat map's path in ``heatmaps`` is its image's path below it.
    """

    def __init__(self, scorer: Scorer, heatmaps: Path | None, root: Path) -> None:
        cv2.setNumThreads(1)  # the cores are the model's and the decoders'
        set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # OpenCV moved it
        set_log_level(0)  # silent: the command names broken files at the end
        self.scorer, self.heatmaps, self.root = scorer, heatmaps, root

    def rows(self, paths: Iterable[str], unreadable: Callable[[str], None]) -> Iterator[Row]:
        """Yield one row per readable image, in the order of the paths.

        Args:
            paths: Image files.
            unreadable: Called with the path of each file that cannot be read as training reads it.
        """
        for scored in self.scorer.score(read_images(paths, unreadable), self.heatmaps is not None):
            if self.heatmaps and scored.image is not None and scored.anomaly_map is not None:
                target = self.heatmaps / Path(scored.path).absolute().relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                laid = overlay(scored.image, scored.anomaly_map)
                if not cv2.imwrite(str(target.with_name(target.name + ".jpg")), laid):
                    msg = f"{target}.jpg cannot be written: make room, or give --heatmaps another folder."
                    raise STPMError(msg)
            yield scored.path, scored.score, scored.label, 1000 * scored.latency


def overlay(image: np.ndarray, anomaly_map: np.ndarray) -> np.ndarray:
    """Lay an anomaly map (h, w) in [0, 1] over its image (H, W, 3), BGR, uint8, as colours from black to yellow."""
    values = cv2.resize(np.clip(anomaly_map, 0, 1) * 255, image.shape[1::-1]).astype(np.uint8)
    return cv2.addWeighted(image, 0.4, cv2.applyColorMap(values, cv2.COLORMAP_INFERNO), 0.6, 0)
