# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Several workers
#
# A coordinator and two workers, each a separate process, train one model. Here all of them run on this machine; the
# same command starts workers on other machines. See `docs/hosts.md`.
#
# Install with `pip install -e '.[notebook,shakespeare]'` in a checkout. It takes about a minute on two cores.

# %%
# %matplotlib inline
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import esjax
from esjax.hosts.status import fetch_status

# %% tags=["parameters"]
SECONDS = 20.0
TEXT = "builtin:shakespeare"
SETTINGS = ["--es.population-size", "1024", "--es.chunk-pairs", "16"]

# %%
folder = Path(tempfile.mkdtemp(prefix="esjax-workers-"))
run = folder / "run"


def start(name, *words):
    """Start `esjax ...` with one device; its output goes to a file."""
    with (folder / f"{name}.log").open("w") as log:
        command = [sys.executable, "-m", "esjax", *words]
        one_device = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=one_device)


def address_of(coordinator):
    """Wait for the line with the address to join."""
    while "esjax join " not in (printed := (folder / "coordinator.log").read_text()):
        if coordinator.poll() is not None:
            raise RuntimeError(printed)
        time.sleep(0.05)
    return printed.split("esjax join ")[1].split()[0]


def show(status):
    loss = "no loss yet" if status.loss is None else f"loss {status.loss:.3f}"
    print(f"step {status.step:>5,}  {loss}", end="")
    for host in sorted(status.hosts, key=lambda host: host.name):
        rate = f" {host.members_per_second:,.0f} members/s" if host.state == "ready" else ""
        print(f"  {host.name} {host.state}{rate}", end="")
    print()


def watch(address, seconds):
    """Print the status ten times."""
    for _ in range(10):
        time.sleep(seconds / 10)
        show(fetch_status(address))


# %% [markdown]
# The coordinator listens on a free port of this machine. Workers get the settings, the text and the weights from it. In
# the middle of the run, one worker leaves; the other one continues with all pairs. At the end, all processes are
# stopped, also after an error.

# %%
processes = {}
try:
    chosen = ["--evaluate-time", str(SECONDS / 8), "--data.text", TEXT]
    coordinator = start("coordinator", "serve", "--out", str(run), "--bind", "tcp://127.0.0.1:0", *chosen, *SETTINGS)
    processes["coordinator"] = coordinator
    address = address_of(coordinator)
    for name in ("ada", "grace"):
        processes[name] = start(name, "join", address, "--name", name, "--patience", "30")
    while [host.state for host in fetch_status(address).hosts] != ["ready", "ready"]:
        if any(process.poll() is not None for process in processes.values()):
            raise RuntimeError(f"a process has ended; see its output in {folder}")
        time.sleep(0.2)
    watch(address, SECONDS / 2)
    print("grace leaves")
    processes["grace"].terminate()
    processes["grace"].wait(30)
    watch(address, SECONDS / 2)
    coordinator.terminate()  # it saves a last checkpoint
    coordinator.wait(60)
finally:
    for process in processes.values():
        if process.poll() is None:
            process.terminate()
    for process in processes.values():
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
print({name: process.returncode for name, process in processes.items()})

# %% [markdown]
# The run folder is an ordinary one: `plot` draws it, and the model generates text.

# %%
esjax.plot(run, over="seconds", smoothing=20)

# %%
for written in esjax.load(run).generate("ROMEO\n", count=3, temperature=0.7, max_tokens=200, seed=1):
    print("ROMEO\n" + written.text, end="\n\n")

# %% [markdown]
# The result does not depend on which worker scored which pairs. The ledger holds all updates, and replaying them gives
# the same weights.

# %%
print(esjax.replay(run).summary())

# %% [markdown]
# The same from the command line: `esjax serve`, `esjax join ADDRESS`, `esjax status ADDRESS`. `esjax train --workers 2`
# does all of it.
