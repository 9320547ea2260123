"""Notebooks run from top to bottom, and are the same in both of their forms."""

import time
from pathlib import Path

import jupytext
import nbformat
import pytest
from conftest import PROGRAMS
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


SMALL = {
    "comparing_runs": "SECONDS = 0.3\nPOPULATION = 16",
    "core": "SECONDS = 0.5\nPAIRS = 16",
    "es_from_scratch": "REPEATS = 20\nCOUNTS = [16]",
    "first_run": "SECONDS = 1",
    "own_model_and_reward": "SECONDS = 0.6\nPOPULATION = 32",
    "rewards": "TEXT_STEPS = 5\nSTEPS = 3\nPOPULATION = 32",
    "workers": "SECONDS = 1.0\n"
    "SETTINGS = ['--es.population-size', '16', '--es.chunk-pairs', '4', '--model.hidden-size', '4']",
}
"""Parameters of each notebook that make it quick; all of them get a text of their own."""

SHOWN = {
    "comparing_runs": ["es.sigma 1.0: finished"],
    "core": ["[]", "cosine with the exact gradient", "'evolution strategies': "],
    "es_from_scratch": [],
    "first_run": ["ROMEO", "nats_per_token"],
    "own_model_and_reward": ["right before: ", "the run's own reward, right"],
    "rewards": ["prompts: (", "step   3: valid "],
    "workers": ["ada ready", "grace ready", "{'coordinator': 0, 'ada': 0, 'grace': 0}", "digests agree"],
}
"""What each notebook prints."""

PICTURES = {
    "comparing_runs": 2,
    "core": 1,
    "es_from_scratch": 5,
    "first_run": 1,
    "own_model_and_reward": 2,
    "rewards": 1,
    "workers": 1,
}
"""How many each notebook draws at least."""


EVERY_TIME = {"first_run"}
"""Notebooks that run with the tests of every change; all of them run at night."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=() if path.stem in EVERY_TIME else pytest.mark.nightly)
        for path in sorted(NOTEBOOKS.glob("*.py"))
    ],
)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same programs are compiled by several processes.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", PROGRAMS)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"{SMALL[name]}\nTEXT = {str(text)!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    for expected in SHOWN[name]:
        assert expected in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= PICTURES[name]


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
    if info.step == 1:  # an interruption of this loop's own lines is theirs
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
