"""The notebook runs from the first cell to the last, and is committed without outputs."""

from __future__ import annotations

import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from tests.acceptance.command import REPOSITORY

NOTEBOOK = REPOSITORY / "notebooks/quickstart.ipynb"


def test_outputs_are_cleared():
    """Outputs of a run are not committed."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert [cell for cell in cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)] == []


@pytest.mark.filterwarnings("default")  # of Jupyter's own libraries
def test_every_cell_runs(tmp_path, monkeypatch):
    """In a separate kernel, next to a copy of the demo files; it shows images and a table."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    shutil.copytree(REPOSITORY / "manifests", tmp_path / "manifests")
    (tmp_path / "notebooks").mkdir()
    book = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        book, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    )
    client.execute()
    kinds = {kind for cell in book.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())}
    assert {"image/png", "text/html"} <= kinds
