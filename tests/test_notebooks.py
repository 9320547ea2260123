"""Notebooks run from top to bottom, and are the same in both of their forms."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def test_the_first_run_runs(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    notebook = jupytext.read(NOTEBOOKS / "first_run.py")
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"SECONDS = 1\nTEXT = {str(text)!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("ROMEO" in output.get("text", "") for output in outputs)
    assert any("nats_per_token" in output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.py")), ids=lambda path: path.stem)
def test_both_forms_of_a_notebook_hold_the_same_cells(path: Path) -> None:
    text = jupytext.read(path)
    paired = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [cell.source for cell in text.cells] == [cell.source for cell in paired.cells]
