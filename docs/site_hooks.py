"""Hooks of the documentation site: pages and figures from `benchmarks/`, and links that leave `docs/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = "../benchmarks/results/"


def on_files(files: Files, config: Any) -> Files:
    """Add the tables, figures and raw rows of the results to the site."""
    for path in sorted((ROOT / RESULTS.removeprefix("../")).iterdir()):
        if path.suffix in (".md", ".png", ".json", ".csv"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to those places."""
    markdown = markdown.replace(f"]({RESULTS}", "](results/").replace("](../benchmarks/", "](benchmarks/")
    return markdown.replace("](../README.md", "](index.md")
