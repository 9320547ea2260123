"""The algorithm on one page: it runs, it learns, and it needs the core alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import esjax.core

PROGRAM = Path(__file__).parents[2] / "experiments" / "minimal.py"


def test_it_learns_a_text_and_writes(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log\n" * 60)
    done = subprocess.run([sys.executable, PROGRAM, text, "2"], capture_output=True, text=True, timeout=180, check=True)
    first = float(re.findall(r"held-out (\d\.\d+)", done.stdout)[0])
    last = float(re.findall(r"held-out (\d\.\d+) nats", done.stdout)[0])
    assert last < first  # after one step, and after ten or more
    assert len(done.stdout.partition("a sample:\n")[2]) >= 200


def test_it_is_one_page_and_imports_nothing_but_the_core() -> None:
    code = PROGRAM.read_text()
    assert len(code.splitlines()) <= 150
    tree = ast.parse(code)
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported | modules if name and name.startswith("esjax")} == {"esjax"}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "esjax"
    }
    assert used <= set(esjax.core.__all__)
