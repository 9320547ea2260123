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
# # A first run
#
# A recurrent network learns to write Shakespeare, letter by letter, without backpropagation: each step scores a few
# thousand randomly perturbed copies of the weights, in pairs +ε and -ε, and moves the weights towards the better ones
# (Salimans et al. 2017).
#
# Install with `pip install -e '.[notebook,shakespeare]'` in a checkout. It takes about two minutes on two cores.

# %%
# %matplotlib inline
import esjax

esjax.prepare_devices()  # one device per core; before anything else uses JAX

from IPython.display import clear_output, display

# %% [markdown]
# All settings have names, types and bounds; a wrong name or value is an error at once.

# %% tags=["parameters"]
SECONDS = 60
TEXT = "builtin:shakespeare"

# %%
config = esjax.Config(seconds=SECONDS, evaluate_time=2.0, data=esjax.DataConfig(text=TEXT))
run = esjax.train(config)
run

# %% [markdown]
# A run is an object to iterate over, one step at a time. You can interrupt the cell: the run stops after the current
# step, and running the cell again continues.
#
# The dashed lines are n-gram models of the same text. A network below the unigram line has learned more than the
# frequency of each letter; below the bigram line, more than the frequency of each pair of letters.

# %%
for info in run:
    if info.held_out is not None:
        clear_output(wait=True)
        display(run.plot(over="seconds", smoothing=20))

# %% [markdown]
# The run now holds a trained model, which generates text and can be scored on the held-out documents.

# %%
for written in run.generate("ROMEO\n", count=2, temperature=0.8, max_tokens=200, seed=1):
    print("ROMEO\n" + written.text, end="\n\n")

# %%
run.evaluate()

# %% [markdown]
# Information about the last step:

# %%
run.last
