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
# # Comparing runs
#
# Three runs that differ in sigma, in one plot. Every run writes its settings and metrics to its folder, and plots read
# only these folders.
#
# Install with `pip install -e '.[notebook,shakespeare]'` in a checkout. It takes about a minute on two cores.

# %%
# %matplotlib inline
import esjax

esjax.prepare_devices()  # one device per core; before anything else uses JAX

import tempfile

import matplotlib.pyplot as plt

from esjax.runs.reader import differing, find_runs, read_runs

# %% tags=["parameters"]
SECONDS = 10.0
TEXT = "builtin:shakespeare"
POPULATION = 1024

# %% [markdown]
# A sweep trains a run for each combination of values, one after another. Here its folder is temporary; with a permanent
# folder, an interrupted sweep can be continued.

# %%
folder = tempfile.mkdtemp(prefix="esjax-sweep-")
config = esjax.Config(
    seconds=SECONDS,
    evaluate_time=SECONDS / 10,
    data=esjax.DataConfig(text=TEXT),
    es=esjax.EsConfig(population_size=POPULATION),
)
sweep = esjax.sweep({"es.sigma": [0.02, 0.2, 1.0]}, config, out=folder, tell=print)
for outcome in sweep:
    print(f"  held-out loss {outcome.held_out:.3f} after {outcome.step:,} steps")

# %% [markdown]
# `esjax.plot` takes run folders, or folders of run folders. It also works during training.

# %%
esjax.plot(folder, over="seconds", smoothing=20)

# %% [markdown]
# `differing` lists the settings in which runs differ, which is useful for older runs.

# %%
runs = read_runs(find_runs(folder))
names = differing(runs)
for run in sorted(runs, key=lambda run: run.last("held_out") or float("inf")):
    settings = ", ".join(f"{name} {run.settings[name]}" for name in names)
    print(f"{settings}: {run.state}, {run.step:,} steps, held-out loss {run.last('held_out'):.3f}")

# %% [markdown]
# The metrics are NumPy arrays with a number for each step, one array for each name in `esjax.StepInfo`. So you can plot
# them yourself.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for run in runs:
    label = f"sigma {run.settings['es.sigma']}"
    left.plot(run.metrics["step"], run.metrics["update_norm"], lw=1, label=label)
    right.plot(run.metrics["step"], run.metrics["member_tokens_per_second"] / 1e6, lw=1, label=label)
left.set(xlabel="step", ylabel="size of the update", yscale="log")
right.set(xlabel="step", ylabel="millions of member-characters a second", ylim=(0, None))
left.legend()
plt.show()

# %% [markdown]
# `esjax.report(folder, out="report.html")` writes a report, a page in one file that can be sent to others.
# `esjax dashboard FOLDER` serves a live page. See `docs/comparing.md`.
