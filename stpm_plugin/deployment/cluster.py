"""Score over a Ray cluster: one compiled model per node, each reading its own images.

Each node needs `pip install 'stpm-plugin[cluster]'` and the images under the same paths. A lost worker is restarted
if a node has room, and its images are scored again.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import STPMError
from .scorer import Scorer
from .worker import Row, Worker

IMAGES = 16  # per block: what a worker gets at a time, and what is scored again if it is lost


class Cluster:
    """Workers on all nodes of a Ray cluster.

    Args:
        address: As in ``ray.init``: ``auto`` for the cluster of this node, ``local`` for one of its own.
        settings: Arguments of :class:`~stpm_plugin.deployment.scorer.Scorer`, the model first.
        heatmaps: Folder for the heat maps, on a disk that all nodes share; ``None`` draws none.
        root: Common parent of all images.

    Raises:
        STPMError: Ray is not installed, the cluster cannot be reached, or the model cannot be used.
    """

    def __init__(self, address: str, settings: tuple[Any, ...], heatmaps: Path | None, root: Path) -> None:
        try:
            import ray.data
        except ImportError:
            msg = "--ray needs Ray: pip install 'stpm-plugin[cluster]'."
            raise STPMError(msg) from None
        Scorer(*settings)  # a bad model raises here, not in a worker
        try:
            ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            msg = f"no Ray cluster answers at {address!r} ({error}): start one with `ray start --head`, or --ray local."
            raise STPMError(msg) from None
        model, *rest = settings
        files = [Path(model), Path(model).with_suffix(".bin")]
        self.arguments = {
            "files": ray.put({file.name: file.read_bytes() for file in files if file.is_file()}),
            "settings": (Path(model).name, *rest),
            "heatmaps": heatmaps and heatmaps.absolute(),
            "root": root,
        }
        self.nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())

    def rows(self, paths: Iterable[str], unreadable: Callable[[str], None]) -> Iterator[Row]:
        """Yield one row per readable image, in order; ``unreadable`` is called with the path of each other file."""
        import ray.data

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        items = [{"path": str(Path(path).absolute()), "name": path} for path in paths]
        if not items:
            return
        blocks = ray.data.from_items(items, override_num_blocks=-(-len(items) // IMAGES))
        scored = blocks.map_batches(
            Actor,
            fn_constructor_kwargs=self.arguments,
            batch_size=None,
            num_cpus=1,
            scheduling_strategy="SPREAD",
            compute=ray.data.ActorPoolStrategy(size=max(self.nodes, 1)),
        )
        for row in scored.iter_rows():
            if row["readable"]:
                yield row["name"], row["score"], row["label"], row["latency"]
            else:
                unreadable(row["name"])


class Actor:
    """A worker as Ray Data calls it; the model's files are sent with it."""

    def __init__(self, files: Any, settings: tuple[Any, ...], heatmaps: Path | None, root: Path) -> None:
        import ray

        with tempfile.TemporaryDirectory() as folder:
            for name, content in ray.get(files).items():
                Path(folder, name).write_bytes(content)
            model, *rest = settings
            self.worker = Worker(Scorer(Path(folder, model), *rest), heatmaps, root)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Score a block of paths: one row per path, in order."""
        found = {row[0]: row for row in self.worker.rows(batch["path"], lambda _: None)}
        rows = [found.get(path, ("", float("nan"), "", float("nan"))) for path in batch["path"]]
        return {
            "name": list(batch["name"]),
            "readable": [path in found for path in batch["path"]],
            "score": [row[1] for row in rows],
            "label": [row[2] for row in rows],
            "latency": [row[3] for row in rows],
        }
