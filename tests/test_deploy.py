"""The recipes parse, and the commands, times and lines that pages name are those of the code."""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import esjax.cli
from esjax.hosts import executor, join
from esjax.hosts.coordination.coordinator import LAST_ROUND
from esjax.hosts.protocol import wire

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PAGES = [ROOT / "docs" / name for name in ("hosts.md", "runbook.md", "deploy.md")]
SCRIPTS = sorted([*DEPLOY.rglob("*.sh"), *DEPLOY.rglob("*.sbatch")])
MANIFESTS = sorted(DEPLOY.rglob("*.yaml"))

RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
"""Where every line that the coordinator prints is explained."""

SPEAKERS = [
    "coordination/admission",
    "coordination/coordinator",
    "coordination/steps",
    "coordination/audits",
    "coordination/inspector",
    "protocol/actions",
    "server_loop",
    "transport/keys",
    "transport/server",
    "transport/client",
    "transport/flood_guard",
]
SAYING = {"tell", "_tell", "Tell", "_refuse", "_refused"}


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def manifests() -> Iterator[dict[str, Any]]:
    for path in MANIFESTS:
        yield from yaml.safe_load_all(path.read_text())


def commands_in_shell(text: str) -> Iterator[list[str]]:
    """Find the arguments of every `esjax` in shell text; what a variable holds does not matter."""
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        line = re.sub(r"^\s*#.*", "", line)
        line = re.sub(r'"?\$(?:\{\w+\[@\]\}|@)"?', "", line)
        line = re.sub(r"\$\(\(.*?\)\)+|\$\([^()]*\)", "1", line)
        line = re.sub(r'"\$esjax"', "esjax", line)
        line = re.sub(r"\$(?:\w+|\{[^}]*\})", "1", line)
        line = re.sub(r"\d?[<>]&?\s*[^\s;|&)]*", "", line)
        for found in re.finditer(r"(?<![\w./-])esjax (?=[a-z])", line):
            lexer = shlex.shlex(line[found.end() :], posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
            end = next((i for i, word in enumerate(words) if set(word) <= set("();<>|&")), len(words))
            yield words[:end]


def commands_in_page(text: str) -> Iterator[list[str]]:
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from commands_in_shell(block)
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        if re.search(r"(?:^|\s)esjax \S+ ", code):  # with its name alone a command is spoken of, not called
            yield from commands_in_shell(code)


def commands_in_manifest(value: Any) -> Iterator[list[str]]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from commands_in_manifest(inner)
    elif isinstance(value, list) and value and value[0] == "esjax":
        yield value[1:]
    elif isinstance(value, list):
        for inner in value:
            yield from commands_in_manifest(inner)
    elif isinstance(value, str):
        yield from commands_in_shell(value)


def commands() -> Iterator[tuple[str, list[str]]]:
    for path in PAGES:
        yield from ((path.name, command) for command in commands_in_page(path.read_text()))
    for path in SCRIPTS:
        yield from ((path.name, command) for command in commands_in_shell(path.read_text()))
    for manifest in manifests():
        yield from ((manifest["kind"], command) for command in commands_in_manifest(manifest))


def runs(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Tell whether the command line would run these words; nothing is run."""
    reached = []
    for command in esjax.cli.COMMANDS.values():
        monkeypatch.setattr(command, "run", lambda self, console: reached.append(self))
    try:
        esjax.cli.main(words)
    except SystemExit:
        return False
    return len(reached) == 1


def test_every_recipe_is_found() -> None:
    assert names(SCRIPTS) == ["deploy/slurm/join.sbatch", "deploy/slurm/train.sbatch", "deploy/ssh/train.sh"]
    assert sorted(manifest["kind"] for manifest in manifests()) == ["Deployment", "Service", "StatefulSet"]


def test_commands_are_found() -> None:
    shell = """
        esjax token new "$keys" "$name" --address "$url" >/dev/null
        exec esjax serve "${folder[@]}" --bind "tcp://0.0.0.0:$port" "$@" 9>&- &
        if srun esjax join "$(cat "$run.address")" \\
            --lifetime "$((left - 60))"; then break; fi
        # esjax in a remark
        esjax status tcp://a:1; esjax replay b
    """
    assert list(commands_in_shell(shell)) == [
        ["token", "new", "1", "1", "--address", "1"],
        ["serve", "--bind", "tcp://0.0.0.0:1"],
        ["join", "1", "--lifetime", "1"],
        ["status", "tcp://a:1"],
        ["replay", "b"],
    ]
    found = [name for name, _ in commands()]
    assert set(found) == {"hosts.md", "runbook.md", "deploy.md", *(path.name for path in SCRIPTS)} | {
        "StatefulSet",
        "Deployment",
    }
    assert len(found) > 35


@pytest.mark.parametrize(("name", "words"), [pytest.param(*found, id=" ".join(found[1])[:60]) for found in commands()])
def test_a_command_parses(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs(words, monkeypatch), f"{name}: esjax {shlex.join(words)}"


@pytest.mark.parametrize("words", [["serve", "--no-such-option", "1"], ["join"], ["no-such-command"]])
def test_a_wrong_command_does_not(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not runs(words, monkeypatch)


@pytest.mark.parametrize("name", names(SCRIPTS))
def test_a_script_is_bash(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / name], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", ROOT / name], check=True)


def test_manifests_fit_together() -> None:
    service, stateful = (next(m for m in manifests() if m["kind"] == kind) for kind in ("Service", "StatefulSet"))
    deployment = next(m for m in manifests() if m["kind"] == "Deployment")
    for owner in (stateful, deployment):
        assert owner["spec"]["selector"]["matchLabels"] == owner["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == stateful["spec"]["template"]["metadata"]["labels"]
    assert service["metadata"]["name"] == stateful["spec"]["serviceName"]
    ports = [port["port"] for port in service["spec"]["ports"]]
    (coordinator,) = stateful["spec"]["template"]["spec"]["containers"]
    (worker,) = deployment["spec"]["template"]["spec"]["containers"]
    assert ports == [port["containerPort"] for port in coordinator["ports"]]
    assert ports[1] == ports[0] + 1  # broadcasts are at the next port
    assert coordinator["args"][0].count(f"--bind tcp://0.0.0.0:{ports[0]}") == 2
    assert f"tcp://{service['metadata']['name']}:{ports[0]} " in worker["args"][0]


def test_everything_has_time_to_stop() -> None:
    grace = {
        manifest["kind"]: manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        for manifest in manifests()
        if "template" in manifest["spec"]
    }
    assert grace["StatefulSet"] > LAST_ROUND
    assert grace["Deployment"] > join.FAREWELL + executor.CLOSE
    signal = re.search(r"--signal=B:TERM@(\d+)", (DEPLOY / "slurm" / "train.sbatch").read_text())
    assert signal
    assert int(signal[1]) > LAST_ROUND


def test_what_the_image_copies_is_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    let_through = re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert sorted(copied) == sorted(let_through)
    for name in copied:
        assert (ROOT / name).exists(), name


def test_the_runbook_has_the_times_of_the_code() -> None:
    rows = re.findall(r"^\|.*\| ([\d.]+)(?: s)? \| `(\w+)` \| `([\w/.]+)` \|$", RUNBOOK, re.MULTILINE)
    assert len(rows) > 20
    for value, name, file in rows:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert getattr(module, name) == float(value), f"{name} in {file}"


def fixed_part(text: ast.expr) -> str:
    """Return a fixed part of a text."""
    parts = [node.value for node in ast.walk(text) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return next((part for part in parts if len(part) > 11), max(parts, key=len, default="")).strip(" :;,.")


def sayings(path: Path) -> Iterator[str]:
    """Find a fixed part of each line and each objection, and the names under which refusals are counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in SAYING:
            yield from map(fixed_part, node.args[:1])
        if isinstance(node, ast.FunctionDef) and node.name == "objection":
            values = [part.value for part in ast.walk(node) if isinstance(part, ast.Return | ast.Assign)]
            yield from (fixed_part(value) for value in values if isinstance(value, ast.JoinedStr | ast.Constant))
        match node:
            case ast.Subscript(value=ast.Attribute(attr="counters"), slice=ast.Constant(value=str(counter))):
                yield counter
            case ast.Call(func=ast.Name(id="Objection"), args=[_, ast.Constant(value=str(counter)), *_]):
                yield counter


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_the_runbook_has_every_line(speaker: str) -> None:
    said = [line for line in sayings(ROOT / "esjax" / "hosts" / f"{speaker}.py") if len(line) > 4]
    assert said
    for line in said:
        assert re.split(r"[;:']", line)[0] in RUNBOOK, line


def test_the_runbook_has_every_state() -> None:
    for state in (*get_args(wire.Phase), "straggling", "silent", "lost", "put aside"):
        assert re.search(rf"^\| {state} \|", RUNBOOK, re.MULTILINE), state


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for file, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", path.read_text()):
        page = path.parent / file if file else path
        assert page.exists(), file
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor
