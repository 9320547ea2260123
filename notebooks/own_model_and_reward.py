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
# # Your own model and reward
#
# Evolution strategies need no gradient, so any number can serve as a reward. Here a network learns to answer `3+4=`,
# and gets a reward if the answer is right.
#
# Install with `pip install -e '.[notebook]'` in a checkout. It takes about two minutes on two cores.

# %%
# %matplotlib inline
import esjax

esjax.prepare_devices()  # one device per core; before anything else uses JAX

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from esjax.data.tokens import STOP

# %% tags=["parameters"]
SECONDS = 60
POPULATION = 1024

# %% [markdown]
# ## The text
#
# The text holds all sums of two digits, one in each line. A line is a document and ends in `STOP`.

# %%
text = Path(tempfile.mkdtemp(prefix="esjax-sums-")) / "sums.txt"
text.write_text("".join(f"{a}+{b}={a + b}\n" for a in range(10) for b in range(10)))
config = esjax.Config(
    seconds=SECONDS,
    data=esjax.DataConfig(text=str(text), documents="line", held_out=0, burn_in=0, window=14, batch_size=8),
    es=esjax.EsConfig(population_size=POPULATION, sigma=0.1),
)

# %% [markdown]
# ## A model
#
# A model is four functions for one sequence: first parameters, first state, prediction, next state. This one is not
# recurrent: its state is the embeddings of the last six tokens, and a network with one hidden layer reads them.
#
# The functions are plain `jax.numpy`. Still, matrices are not copied for each member: a member adds two vectors for
# each matrix, and the population shares the products with the matrix itself. `unit` is the size of a typical entry of
# each leaf, so that one sigma suits all leaves; without it, units follow from the first parameters.

# %%
MEMORY, WIDTH, HIDDEN = 6, 12, 64


def last_tokens(vocab_size: int) -> esjax.Model:
    unit = {
        "embedding": 1.0,
        "nothing": 1.0,
        "inner": (MEMORY * WIDTH) ** -0.5,
        "bias": 0.3,
        "output": HIDDEN**-0.5,
    }

    def init(key):
        embedding_key, inner_key, output_key = jax.random.split(key, 3)
        return {
            "embedding": jax.random.normal(embedding_key, (vocab_size, WIDTH)),
            "nothing": jnp.zeros(WIDTH),
            "inner": 1.4 * unit["inner"] * jax.random.normal(inner_key, (MEMORY * WIDTH, HIDDEN)),
            "bias": jnp.zeros(HIDDEN),
            "output": 0.1 * unit["output"] * jax.random.normal(output_key, (HIDDEN, vocab_size)),
        }

    def initial_state(params):
        return jnp.tile(params["nothing"], (MEMORY, 1))

    def predict(params, state):
        hidden = jax.nn.relu(state.reshape(-1) @ params["inner"] + params["bias"])
        return hidden @ params["output"]

    def consume(params, state, token):
        return jnp.concatenate([state[1:], params["embedding"][token][None]])

    return esjax.Model(init, initial_state, predict, consume, unit=unit)


# %% [markdown]
# ## A reward
#
# A reward is a function `(member, tokens, key) -> number`. `member` is the model with the weights of one member;
# `tokens` is a window of the text; `key` is a random key, the same for both members of a pair.
#
# A window begins anywhere in the text, so its first whole sum comes after the first `STOP`.


# %%
def find_sum(tokens):
    start = jnp.argmax(tokens == STOP) + 1
    question = jax.lax.dynamic_slice(tokens, (start,), (4,))
    answer = jax.lax.dynamic_slice(tokens, (start + 4,), (3,))
    is_part = jnp.cumsum(answer == STOP) - (answer == STOP) == 0  # up to the first STOP
    return question, jnp.where(is_part, answer, STOP), is_part


def right(member, tokens, key):
    question, answer, _ = find_sum(tokens)
    written = member.generate(member.read(question), 3)
    return jnp.all(written == answer).astype(jnp.float32)


# %% [markdown]
# ## Only right or wrong
#
# The first network answers every sum wrong, and so do nearly all of its perturbed copies. So most rewards are equal,
# and the network first learns one number that answers a few sums. If all rewards of a step are equal, the run prints a
# line and makes no update.


# %%
def accuracy(run):
    sums = {f"{a}+{b}=": str(a + b) for a in range(10) for b in range(10)}
    written = {asked: run.generate(asked, temperature=0.0, max_tokens=3)[0].text for asked in sums}
    return written, sum(written[asked] == answer for asked, answer in sums.items())


def follow(run):
    curve = []
    for info in run:
        if info.step % 50 == 0 or info.step == 1:
            curve.append((info.seconds, accuracy(run)[1]))
    return np.array(curve)


plain = esjax.train(
    esjax.config.settings.replace(config, seconds=SECONDS / 3), model=last_tokens, reward=right, tell=print
)
alone = follow(plain)
print(f"right after {plain.step:,} steps: {accuracy(plain)[1]} of 100")

# %% [markdown]
# ## With a hint
#
# Here a tenth of the log probability of the right answer is added, so a nearly right answer gets a higher reward than
# one that is far off.


# %%
def right_with_hint(member, tokens, key):
    question, answer, is_part = find_sum(tokens)
    nats = member.nats(answer, member.read(question))
    return right(member, tokens, key) - 0.1 * jnp.sum(jnp.where(is_part, nats, 0.0))


run = esjax.train(config, model=last_tokens, reward=right_with_hint)
print(f"right before: {accuracy(run)[1]} of 100")
hinted = follow(run)
written, count = accuracy(run)
print(f"right after {run.step:,} steps: {count} of 100")

# %%
figure, (left, middle) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
left.plot(*hinted.T, "o-", ms=3, color="#3b7dd8", label="right, and a hint")
left.plot(*alone.T, "o-", ms=3, color="#e0752d", label="right alone")
left.set(xlabel="seconds", ylabel="right answers of 100", ylim=(-3, 103), title="while it trains")
left.legend(loc="center right", frameon=False)
left.grid(alpha=0.25)
for a in range(10):
    for b in range(10):
        answer = written[f"{a}+{b}="]
        is_right = answer == str(a + b)
        middle.add_patch(plt.Rectangle((b - 0.5, a - 0.5), 1, 1, color="#d6ecdf" if is_right else "#f7cdbb"))
        middle.text(b, a, answer, ha="center", va="center", fontsize=9)
middle.set(xlim=(-0.5, 9.5), ylim=(9.5, -0.5), xticks=range(10), yticks=range(10), xlabel="b", ylabel="a")
middle.set(aspect="equal", title="what it answers to a+b=")
plt.show()

# %% [markdown]
# `run.plot()` draws the run's own metrics, at any time. The loss is minus the reward.

# %%
run.plot(over="seconds", smoothing=20)

# %% [markdown]
# A run folder (`esjax.train(..., out="runs/sums")`) records the names of the custom model and reward. `esjax.resume`
# needs both again, and `esjax.load` needs the model. See `docs/extending.md`.
