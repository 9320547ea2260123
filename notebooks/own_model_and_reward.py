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
# Evolution strategies need no gradient, so a network can be trained for whatever can be counted. Here it learns to
# answer `3+4=`, and is rewarded when what it writes is right.
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
# All sums of two digits, a line each. A line is a document, and ends in `STOP`.

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
# Four functions for one sequence: first parameters, first state, prediction, next state. This one is not recurrent at
# all: its state is the embeddings of the last six tokens, and a network with one hidden layer reads them.
#
# They are plain `jax.numpy`. A member's matrices are nevertheless not copied: it differs by two vectors a matrix, and
# the population shares the products with the rest. `unit` is the size of a typical entry of each leaf, so that one
# sigma fits all of them; without it, units come from the first weights.

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
# `(member, tokens, key) -> number`. The member is the model with one member's weights; the tokens are a window of the
# text; the key is the same for both members of a pair, for rewards that draw something.
#
# The window begins anywhere, so the first whole sum in it comes after the first `STOP`.


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
# ## Right or wrong alone
#
# A first network is wrong everywhere, and so are nearly all of its perturbed copies: there is hardly anything to choose
# by, and what is found first is a number that answers a few sums. A step in which nothing can be told apart is told.


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
# A tenth of the log probability of the right answer sets what is nearly right apart from what is far off.


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
# `run.plot()` draws what the run itself followed, at any time. A reward counts as a loss with its sign turned.

# %%
run.plot(over="seconds", smoothing=20)

# %% [markdown]
# What was given is named in the run folder, if there is one (`esjax.train(..., out="runs/sums")`): `esjax.resume` wants
# the same model and reward again, and `esjax.load` the model. More in `docs/extending.md`.
