"""The Python in README and docs runs, made small."""

import ast
import re
from pathlib import Path

import jax
import pytest

import esjax
from esjax.config.models import MODELS

ROOT = Path(__file__).parents[1]

SMALL = {
    "esjax.prepare_devices()": "",  # these tests have started JAX already
    "esjax.Config(steps=300": "esjax.Config(steps=2, data=esjax.DataConfig(text='text.txt')",
    "length=16": "length=4",
    "esjax.Config(seconds=60)": "esjax.Config(steps=2, data=esjax.DataConfig(text='text.txt'))",
}


@pytest.mark.usefixtures("lenient_promotion")
@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/api.md",
        "docs/extending.md",
        "docs/own_code.md",
        "docs/rewards.md",
        "docs/sweeps.md",
        "docs/start.md",
        "docs/watching.md",
    ],
)
def test_the_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    code = "\n".join(blocks)
    for long, small in SMALL.items():
        code = code.replace(long, small)
    assert "steps=2" in code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"{n} to be, or not to be: that is the question" for n in range(300))
    )
    exec(compile(code, name, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("name", esjax.__all__)
def test_every_public_name_is_described(name: str) -> None:
    """Settings in their tables, all else in the reference, where it is at home."""
    home = getattr(esjax, name).__module__
    tables = (ROOT / "docs/_ext/settings_tables.py").read_text()
    if home in ("esjax.config.settings", "esjax.config.reward"):
        assert f"config.{name}," in tables
    elif home == "esjax.config.models":
        assert getattr(esjax, name) in MODELS.values()
        assert "for name, kind in MODELS.items()" in tables
    else:
        assert re.search(rf"^\.\. auto\w+:: esjax\.{name}$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)


def test_what_completion_offers_are_the_public_names_and_keywords() -> None:
    """Reference: `__all__`, and the keywords that the pages use; by the library behind IPython's completion."""
    jedi = pytest.importorskip("jedi")
    assert {*dir(esjax)} == {*esjax.__all__, "__version__"}
    for name in esjax.__all__:
        assert getattr(esjax, name).__name__ == name

    def complete(code: str) -> set[str]:
        return {found.name for found in jedi.Interpreter(code, [{"esjax": esjax}]).complete()}

    assert complete("esjax.") == {*dir(esjax)}
    for kind in ("Trainer", "LoadedRun"):
        assert "temperature=" in complete(f"esjax.{kind}.generate(self, tem")
        assert "beams=" in complete(f"esjax.{kind}.search(self, be")
        assert "smoothing=" in complete(f"esjax.{kind}.plot(self, smo")
    assert "sigma=" in complete("esjax.EsConfig(sig")


def test_sphinx_takes_no_part_of_a_sentence_for_the_type_of_a_result() -> None:
    """Napoleon reads what stands before a colon in the first line of Returns as a type."""
    for path in sorted((ROOT / "esjax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for line in re.findall(r"^(?:Returns|Yields):\n(.*)$", ast.get_docstring(node) or "", re.MULTILINE):
                    assert ":" not in re.sub(r"`[^`]*`", "", line), f"{path}: {line.strip()}"


def test_the_two_weights_of_how_it_works_are_found() -> None:
    """The page's own assertion: the loss is nearly gone."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/how.md").read_text(), re.MULTILINE | re.DOTALL)
    assert "assert loss(theta) <" in code
    with jax.numpy_rank_promotion("allow"):
        exec(compile(code, "docs/how.md", "exec"), {"__name__": "page"})


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:esjax|experiments|notebooks|docs)/[\w/.]*)`|\]\((docs/[\w.]+)\)", text):
        assert (ROOT / (name[0] or name[1])).exists(), name
