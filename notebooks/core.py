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
# # The core: your model, your loss, no backward pass
#
# `esjax.value_and_grad` replaces `jax.value_and_grad`. Here both train the same language model, written in plain flax,
# with the same optimizer on the same text. Evolution strategies in this form are by Salimans et al. (2017), low-rank
# noise by Sarkar et al. (2025); `docs/papers.md` has links.
#
# Install with `pip install -e '.[notebook,shakespeare]'` in a checkout. It takes about three minutes on two cores.

# %%
# %matplotlib inline
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import esjax
from esjax.data.corpus import load_corpus
from esjax.data.packing import pack_stream

# %% tags=["parameters"]
SECONDS = 60
PAIRS = 1024
TEXT = "builtin:shakespeare"

# %% [markdown]
# The model is an embedding, a GRU (Cho et al. 2014) and a head of two layers. The loss is the cross entropy of a window
# of 32 characters. Neither depends on esjax.

# %%
corpus = load_corpus(esjax.DataConfig(text=TEXT))
tokens = jnp.asarray(corpus.stream(), jnp.int32)
vocabulary = corpus.vocabulary.size


class Language(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        states = nn.RNN(nn.GRUCell(32))(nn.Embed(vocabulary, 32)(tokens)[None])[0]
        return nn.Dense(vocabulary)(nn.relu(nn.Dense(64)(states)))


model = Language()


def loss(params, window):
    logits = model.apply(params, window[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[1:]).mean()


params = model.init(jax.random.key(0), tokens[:32])
jax.tree.map(jnp.shape, params)["params"]

# %% [markdown]
# ## Cost of a member
#
# `low_rank` perturbs each matrix by a product of two random vectors, which is not added to the matrix. `explain` lists
# the operations of the loss that do need the sum; here there are none.

# %%
units = esjax.initial_units(params)
noise = esjax.low_rank(sigma=0.2, units=units)
esjax.explain(loss, noise, params, tokens[:33])

# %% [markdown]
# ## One step, function by function
#
# `pair_seeds` makes a seed for each pair. `evaluate` grows the noise from the seeds and scores both members of each
# pair. `shape` turns the losses into a small integer for each pair. `estimate` sums the noise, weighted by these
# integers.

# %%
windows = tokens[jnp.arange(PAIRS)[:, None] * 7 + jnp.arange(33)]
seeds = esjax.pair_seeds(seed=0, step=0, pairs=PAIRS)
losses = jax.jit(esjax.evaluate(loss, noise))(params, seeds, windows)
shaped = esjax.shape(losses)
gradient = jax.jit(esjax.estimate(noise))(params, seeds, shaped)

exact = jax.grad(lambda params: jax.vmap(loss, (None, 0))(params, windows).mean())(params)
cosine = optax.tree.vdot(gradient, exact) / optax.tree.norm(gradient) / optax.tree.norm(exact)
print(
    f"losses {losses.shape}, weights of eight pairs {shaped.weights[:8]}, cosine with the exact gradient {cosine:.2f}"
)

# %% [markdown]
# ## Two trainings
#
# Both use the same loop. Evolution strategies score 1,024 windows in a step, each with two members; backpropagation
# uses 64 windows. `in_units` scales the step of the optimizer (Adam, Kingma & Ba 2015) by the unit of each leaf.


# %%
def train(value_and_grad, examples, learning_rate):
    optimizer = esjax.in_units(optax.adam(lambda step: learning_rate * (1 + step / 100) ** -0.5), units)

    @jax.jit
    def step(params, state, seed):
        starts = jax.random.randint(jax.random.key(seed), (examples, 1), 0, len(tokens) - 33)
        value, gradient = value_and_grad(params, seed, tokens[starts + jnp.arange(33)])
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    trained, state, curve = params, optimizer.init(params), []
    trained, state, _ = step(trained, state, 0)  # compiled here
    started, number = time.perf_counter(), 1
    while (seconds := time.perf_counter() - started) < SECONDS:
        trained, state, value = step(trained, state, number)
        curve.append((seconds, float(value)))
        number += 1
    return trained, curve


def backpropagation(params, seed, windows):
    return jax.value_and_grad(lambda params: jax.vmap(loss, (None, 0))(params, windows).mean())(params)


by_evolution, evolution_curve = train(esjax.value_and_grad(loss, noise, PAIRS), PAIRS, 0.1)
by_backpropagation, backpropagation_curve = train(backpropagation, 64, 0.03)

# %%
figure, axes = plt.subplots(figsize=(7, 3.5))
for label, curve in (("evolution strategies", evolution_curve), ("backpropagation", backpropagation_curve)):
    seconds, values = (jnp.asarray(column) for column in zip(*curve, strict=True))
    smooth = jnp.convolve(values, jnp.ones(15) / 15, mode="valid") if len(values) > 30 else values
    axes.plot(seconds[-len(smooth) :], smooth, label=label)
axes.set(xlabel="seconds", ylabel="nats a character", title="The same flax model, two gradients")
axes.legend()
figure

# %% [markdown]
# Where a gradient exists, backpropagation learns much faster. Evolution strategies need only forward passes, store no
# activations, work with rewards that have no gradient, and run on hosts that exchange only seeds and losses.

# %%
held_out = jnp.asarray(pack_stream(corpus.held_out), jnp.int32)
held_out = held_out[: len(held_out) // 33 * 33].reshape(-1, 33)
measure = jax.jit(lambda params: jax.vmap(loss, (None, 0))(params, held_out).mean())
{
    "first weights": round(float(measure(params)), 3),
    "evolution strategies": round(float(measure(by_evolution)), 3),
    "backpropagation": round(float(measure(by_backpropagation)), 3),
}
