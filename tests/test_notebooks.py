"""Notebooks run from top to bottom, and are the same in both of their forms."""

import time
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
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


def test_interrupting_a_cell_stops_cleanly_with_a_checkpoint(tmp_path: Path) -> None:
    """A real kernel, interrupted as the notebook's stop button does it, while it trains without a limit."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    first_step = tmp_path / "first_step"
    cell = f"""
import esjax, pathlib
config = esjax.Config(data=esjax.DataConfig(text={str(text)!r}), es=esjax.EsConfig(population_size=16))
run = esjax.train(config, {str(tmp_path / "run")!r})
for info in run:
    pathlib.Path({str(first_step)!r}).touch()
print("stopped after step", run.step)
"""
    manager, client = start_new_kernel()
    try:
        request = client.execute(cell)
        deadline = time.monotonic() + 120
        while not first_step.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)
        assert reply["parent_header"]["msg_id"] == request
        assert reply["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert list((tmp_path / "run" / "checkpoints").glob("*/seal.json"))


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.py")), ids=lambda path: path.stem)
def test_both_forms_of_a_notebook_hold_the_same_cells(path: Path) -> None:
    text = jupytext.read(path)
    paired = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [cell.source for cell in text.cells] == [cell.source for cell in paired.cells]
