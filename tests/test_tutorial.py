"""The notebook of docs/, run as a reader would, on fewer images and in one pass."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs/tutorial.ipynb"


def printed(notebook) -> str:
    """All that the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def pairs(text: str) -> list[tuple[float, float]]:
    """Scores of the exported model and of the Engine, of each image."""
    return [(float(a), float(b)) for a, b in re.findall(r"(\d\.\d+) \(in anomalib (\d\.\d+)\)", text)]


def test_the_notebook_runs_and_its_routes_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exported model gives the Engine's scores."""
    monkeypatch.setenv("TUTORIAL_EPOCHS", "1")
    monkeypatch.setenv("TUTORIAL_IMAGES", "20")
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = pairs(printed(notebook))
    assert len(found) == 6
    assert all(abs(one - other) <= 0.0015 for one, other in found)  # both are rounded to three digits


def test_the_committed_outputs_are_of_a_whole_run() -> None:
    """They are small, and hold scores that agree, pictures and no error."""
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds
    assert kinds.count("display_data") >= 2
    assert len(pairs(printed(notebook))) == 6
    assert NOTEBOOK.stat().st_size < 500_000
