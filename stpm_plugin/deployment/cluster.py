"""Score over a Ray cluster: one compiled model per node, each reading its own images.

Each node needs this package, `pip install 'ray[data]'` and the images under the same paths. A lost worker is restarted
if a node has room, and its images are scored again.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import STPMError
from .exported_model import files_of
from .images import VIDEOS
from .refusals import Refused
from .regions import Region
from .scorer import Scored, Scorer
from .worker import Worker

IMAGES = 16  # per block: what a worker gets at a time, and what is scored again if it is lost


class Cluster:
    """Workers on all nodes of a Ray cluster.

    Args:
        address: As in ``ray.init``: ``auto`` for the cluster of this node, ``local`` for one of its own.
        options: Arguments of :class:`~stpm_plugin.deployment.scorer.Scorer`.
        heatmaps: Folder for the heat maps, on a disk that all nodes share; ``None`` draws none.
        root: Common parent of all images.
        regions: Whether anomalous regions are wanted.

    Attributes:
        scorer: The model, as it runs on this node.

    Raises:
        STPMError: Ray is not installed, the cluster cannot be reached, or the model cannot be used.
    """

    def __init__(
        self, address: str, options: dict[str, Any], heatmaps: Path | None, root: Path, regions: bool = False
    ) -> None:
        try:
            import ray.data
        except ImportError:
            msg = "--ray needs Ray: pip install 'ray[data]'."
            raise STPMError(msg) from None
        self.scorer = Scorer(**options)  # a bad model raises here, not in a worker
        try:
            ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            msg = f"no Ray cluster answers at {address!r} ({error}): run `ray start --head`, or use --ray local."
            raise STPMError(msg) from None
        sent = [*files_of(Path(options["model"])), *([Path(options["ignore"])] if options.get("ignore") else [])]
        self.arguments = {
            "files": ray.put({file.name: file.read_bytes() for file in sent}),
            "options": options,
            "heatmaps": heatmaps and heatmaps.absolute(),
            "root": root,
            "regions": regions,
        }
        self.nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())

    def rows(
        self,
        paths: Iterable[str],
        unreadable: Callable[[str], None],
        refused: Refused,
        skip: Callable[[str], bool] | None = None,
    ) -> Iterator[Scored]:
        """Yield one verdict per image that can be scored, in order; arguments as for ``Worker.rows``.

        Raises:
            STPMError: One of the files is a video.
        """
        del skip
        import ray.data

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        items = []
        for path in paths:
            if Path(path).suffix.lower() in VIDEOS:
                msg = f"{path} is a video, which only one node can read: score it without --ray."
                raise STPMError(msg)
            items.append({"path": json.dumps(path)})  # as ASCII: a name may hold bytes that are no text
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
            path = json.loads(row["path"])
            if row["verdict"]:
                made = Scored(path, *json.loads(row["verdict"]))
                yield made._replace(regions=tuple(Region(*region) for region in made.regions))
            elif row["refused"]:
                refused(path, json.loads(row["refused"]))
            else:
                unreadable(path)


class Actor:
    """A worker as Ray Data calls it; the model's files are sent with it."""

    def __init__(
        self, files: Any, options: dict[str, Any], heatmaps: Path | None, root: Path, regions: bool = False
    ) -> None:
        import ray

        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps mapped files
            for name, content in ray.get(files).items():
                Path(folder, name).write_bytes(content)
            here = {name: Path(folder, Path(options[name]).name) for name in ("model", "ignore") if options.get(name)}
            self.worker = Worker(Scorer(**{**options, **here}), heatmaps, root, regions)
        self.worker.scorer.ignore = options.get("ignore")  # messages name the user's file

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Score a block of paths: per path its verdict and why it was refused, as text, in order.

        Both are empty for a file that cannot be read.
        """
        paths = [json.loads(path) for path in batch["path"]]
        why: dict[str, str] = {}
        rows = self.worker.rows(paths, lambda _: None, lambda path, text: why.update({path: json.dumps(text)}))
        found = {row.path: json.dumps(row[1:7]) for row in rows}
        return {
            "path": list(batch["path"]),
            "verdict": [found.get(path, "") for path in paths],
            "refused": [why.get(path, "") for path in paths],
        }
