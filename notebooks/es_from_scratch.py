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
# # Evolution strategies from scratch
#
# This notebook estimates a gradient from losses alone: first for two weights, where everything can be drawn, then for a
# matrix. Noise comes from `esjax.core`; the rest is first written out, and then done by the library.
#
# The method is by Rechenberg (1973) and, with random directions in pairs, Spall (1992) and Salimans et al. (2017);
# low-rank noise is by Sarkar et al. (2025). `docs/papers.md` has links.
#
# Install with `pip install -e '.[notebook]'` in a checkout. It takes about a minute.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from esjax.core import estimate, evaluate, full, low_rank, pair_seeds, shape, value_and_grad

BLUE, ORANGE, GREEN = "#3b7dd8", "#e0752d", "#2f9e6e"

# %% tags=["parameters"]
REPEATS = 400  # estimates for each spread
COUNTS = [4, 16, 64, 256, 1024, 4096]  # numbers of pairs for which cosines are measured

# %% [markdown]
# ## A loss of two weights
#
# A neuron `tanh(w₀ x + w₁)` has to fit some points. Each point has a loss; the loss of the weights is the mean over the
# points.

# %%
random = np.random.default_rng(0)
x = random.normal(size=512).astype(np.float32)
y = jnp.asarray(np.tanh(1.5 * x - 0.5) + 0.3 * random.normal(size=512), jnp.float32)
x = jnp.asarray(x)


def loss(w, points=slice(None)):
    return jnp.mean((jnp.tanh(w[0] * x[points] + w[1]) - y[points]) ** 2)


w = jnp.array([-0.5, 0.7])
gradient = jax.jit(jax.grad(loss))
exact = gradient(w)

# %% [markdown]
# Each pair has its own perturbation ε, with entries of mean 0 and variance 1, and its two members are at `w + σ ε` and
# `w - σ ε`. `pair_seeds` makes a seed for each pair of a step, and `full` grows ε from a seed, a number for each
# weight. Noise is normal in this picture: with ±1, the default, there are only four directions in two dimensions.
#
# The difference of the two losses, divided by 2σ, is the slope along ε. The mean of slope times ε is an estimate of the
# gradient.

# %%
SIGMA, PAIRS = 0.4, 12
noise = full(SIGMA, gaussian=True, units=1.0)  # units scale the noise of each leaf; here there is only one
layout = noise.lay_out(w)


def grow(step, pairs):
    """Grow ε of each pair of a step, [pairs, 2]."""
    return jax.vmap(lambda seed: layout.epsilon(seed, w))(pair_seeds(0, step, pairs))


@jax.jit
def one_step(w, step):
    """Score both members of each pair, and average ε by the slope."""
    epsilon, score = grow(step, PAIRS), jax.vmap(loss)
    slope = (score(w + SIGMA * epsilon) - score(w - SIGMA * epsilon)) / (2 * SIGMA)
    return slope @ epsilon / PAIRS, slope


epsilon = jax.jit(grow, static_argnums=1)(5, PAIRS)
guess, slope = one_step(w, 5)

# %% [markdown]
# On the left are twelve pairs around the weights. The better member of each pair is filled; a thicker line is a larger
# difference of the losses. The mean of the noise, weighted by the slopes, is close to the exact gradient. On the right,
# gradient descent follows both.

# %%
grid = np.meshgrid(np.linspace(-2, 3, 80), np.linspace(-2, 2, 80))
heights = jax.jit(jax.vmap(loss))(np.stack(grid, -1).reshape(-1, 2).astype(np.float32)).reshape(80, 80)
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharex=True, sharey=True)
for axes in (left, right):
    axes.contourf(*grid, heights, levels=25, cmap="Greys", alpha=0.55)
    axes.plot(1.5, -0.5, "*", color="black", ms=10)  # the weights that made the points
    axes.set(xlabel="w₀", ylabel="w₁")
around, ahead = np.asarray(w), SIGMA * np.asarray(epsilon)
plus, minus = around + ahead, around - ahead
for k, size in enumerate(np.abs(slope)):
    better, worse = (minus, plus) if slope[k] > 0 else (plus, minus)
    left.plot(*np.stack([better[k], worse[k]]).T, color=BLUE, lw=0.5 + 2.5 * size, alpha=0.6)
    left.plot(*better[k], "o", color=BLUE, ms=5)
    left.plot(*worse[k], "o", color=BLUE, ms=5, mfc="white")
for vector, color, name in ((exact, GREEN, "exact gradient, downhill"), (guess, ORANGE, "estimate of 12 pairs")):
    arrow = {"angles": "xy", "scale_units": "xy", "scale": 0.8, "width": 0.009, "zorder": 3}
    left.quiver(*w, *-vector, color=color, label=name, **arrow)
left.legend(loc="lower right")

exactly, estimated = [w], [w]
for step in range(60):
    exactly.append(exactly[-1] - 0.3 * gradient(exactly[-1]))
    estimated.append(estimated[-1] - 0.3 * one_step(estimated[-1], step)[0])
right.plot(*np.stack(exactly).T, "o-", ms=3, lw=1, color=GREEN, label="exact gradient")
right.plot(*np.stack(estimated).T, "o-", ms=3, lw=1, color=ORANGE, label="evolution strategies, 12 pairs a step")
right.legend(loc="lower right")
plt.show()

# %% [markdown]
# The library does the same in three functions. `evaluate` scores both members of every pair. `shape` turns the
# difference of each pair into a small integer, with one scale for all. `estimate` grows the noise again from the seeds
# and sums it, weighted by these integers. So machines exchange only seeds and integers, and a sum of integers is the
# same in any order. The estimate differs from the one above only by rounding.

# %%
seeds = pair_seeds(0, 5, PAIRS)
losses = jax.jit(evaluate(lambda w, _: loss(w), noise, batch_axis=None))(w, seeds, None)
shaped = shape(losses, "raw", sigma=SIGMA)
print("exact gradient   ", exact)
print("written out      ", guess)
print("of the library   ", jax.jit(estimate(noise))(w, seeds, shaped))
print("integers of pairs", shaped.weights)

# %% [markdown]
# ## Why pairs
#
# A step does not score all data: each pair is scored on a part of the data, here on one point. Some points are harder
# than others, and a member on a hard point has a high loss whatever its noise is. Both members of a pair are scored on
# the *same* point, so its difficulty cancels in their difference.
#
# Each dot is an estimate from 64 losses. All three clouds have the gradient (green) near their middle.


# %%
def on_points(step, sigma, pairs, shared):
    """Score each pair on one point, or each member on a separate point."""
    epsilon = grow(step, pairs)
    points = jax.random.randint(jax.random.fold_in(jax.random.key(2), step), (2, pairs), 0, len(x))
    points = points.at[1].set(points[0]) if shared else points
    score = jax.vmap(loss)
    return epsilon, score(w + sigma * epsilon, points[0]), score(w - sigma * epsilon, points[1])


def pairs_estimate(step, sigma=0.4, pairs=32, shared=True):
    epsilon, plus, minus = on_points(step, sigma, pairs, shared)
    return (plus - minus) / (2 * sigma) @ epsilon / pairs


def single_estimate(step, sigma=0.4, members=64, centered=False):
    epsilon, plus, _ = on_points(step, sigma, members, shared=True)
    return (plus - centered * plus.mean()) / sigma @ epsilon / members


def cloud(make, **settings):
    return np.asarray(jax.jit(jax.vmap(lambda step: make(step, **settings)))(jnp.arange(REPEATS)))


clouds = {
    "64 members alone": cloud(single_estimate),
    "64 alone, mean loss taken off": cloud(single_estimate, centered=True),
    "32 pairs": cloud(pairs_estimate),
}
figure, panels = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained", sharex=True, sharey=True)
for axes, (name, dots) in zip(panels, clouds.items(), strict=True):
    axes.plot(*dots.T, ".", ms=4, color=BLUE, alpha=0.5)
    axes.quiver(0, 0, *exact, angles="xy", scale_units="xy", scale=1, color=GREEN, width=0.014, zorder=3)
    axes.set(title=f"{name}\nvariance {dots.var(axis=0).sum():.3f}", xlabel="along w₀", aspect="equal")
    axes.grid(alpha=0.25)
panels[0].set_ylabel("along w₁")
plt.show()

# %% [markdown]
# ## What sigma does
#
# The difference of a pair is the slope of a chord, not of a tangent. So with a large sigma the curvature of the loss
# causes an error: the *bias*, which more pairs do not reduce. A small sigma costs nothing while both members see the
# same data. If they see different data, or the loss itself is random, the random part is divided by the small sigma:
# this is *noise*, which more pairs do reduce.

# %%
sigmas = np.geomspace(0.02, 2, 13)


@jax.jit
@jax.vmap
def blurred(sigma):
    """Integrate over all normal noise: the estimate of infinitely many pairs."""
    nodes, shares = (jnp.asarray(part, jnp.float32) for part in np.polynomial.hermite_e.hermegauss(40))
    epsilon = jnp.stack(jnp.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    slopes = jax.vmap(lambda one: loss(w + sigma * one) - loss(w - sigma * one))(epsilon) / (2 * sigma)
    shares = jnp.outer(shares, shares).ravel() / shares.sum() ** 2
    return (shares * slopes) @ epsilon


def spread(shared):
    steps = jnp.arange(REPEATS)
    many = jax.vmap(lambda sigma: jax.vmap(lambda step: pairs_estimate(step, sigma, shared=shared))(steps))
    return np.sqrt(np.asarray(jax.jit(many)(jnp.asarray(sigmas))).var(axis=1).sum(axis=-1))


plt.figure(figsize=(8, 4.5), layout="constrained")
plt.loglog(sigmas, np.linalg.norm(blurred(jnp.asarray(sigmas)) - exact, axis=1), "o-", color=GREEN, label="bias")
plt.loglog(sigmas, spread(True), "o-", color=BLUE, label="noise of 32 pairs, the same point for both members")
plt.loglog(sigmas, spread(False), "o-", color=ORANGE, label="noise of 32 pairs, a point for each member")
plt.axhline(jnp.linalg.norm(exact), ls="--", color="gray", lw=1)
plt.text(sigmas[-1], jnp.linalg.norm(exact) * 1.05, "size of the gradient", color="gray", ha="right", va="bottom")
plt.xlabel("sigma")
plt.ylabel("error of the estimate")
plt.legend()
plt.grid(alpha=0.25)
plt.show()

# %% [markdown]
# ## Why low rank
#
# A full perturbation of a matrix has a number for each weight, and each member multiplies by a different matrix. A
# perturbation of rank 1 is `a bᵀ`: a column and a row of numbers. It is not added to the matrix:
# `x (W + σ a bᵀ) = x W + σ (x·a) bᵀ`, so all members share the product with `W` (Sarkar et al. 2025, section 4).
# `evaluate` does this for any loss: while it traces the loss, it applies this rule to each product with a perturbed
# matrix.

# %%
KINDS = {"full": (full, BLUE), "rank 1": (low_rank, ORANGE)}
widths = 2 ** np.arange(4, 13)
plt.figure(figsize=(8, 4), layout="constrained")
for name, (kind, color) in KINDS.items():
    numbers = [kind(SIGMA).lay_out(jax.ShapeDtypeStruct((n, n), jnp.float32)).numbers for n in widths]
    plt.loglog(widths, numbers, "o-", base=2, color=color, label=f"{name}, {numbers[-1]:,} at width {widths[-1]:,}")
plt.xlabel("width of the matrix")
plt.ylabel("numbers of noise a pair")
plt.legend()
plt.grid(alpha=0.25)
plt.show()

# %% [markdown]
# Is its estimate as good? A layer of 24 by 24 weights learns to imitate another layer. We measure the cosine of the
# angle between an estimate and the exact gradient, now with the default noise of ±1. With `n` pairs and `d` weights,
# the expected cosine is about `√(n / (n + d))` for both kinds, since `ε` has the same variance in each direction.
#
# `value_and_grad` calls `pair_seeds`, `evaluate`, `shape` and `estimate`. It replaces `jax.value_and_grad`.

# %%
inputs, target, weights = (
    jnp.asarray(random.normal(size=shape) / 24**0.5, jnp.float32) for shape in ((64, 24), (24, 24), (24, 24))
)


def layer_loss(weights, _=None):
    return jnp.mean((jnp.tanh(inputs @ weights) - jnp.tanh(inputs @ target)) ** 2)


counts = np.array(COUNTS)
layer_gradient = jax.jit(jax.grad(layer_loss))(weights).ravel()


@partial(jax.jit, static_argnums=(1, 2))
def cosines_of(steps, kind, pairs):
    estimated = value_and_grad(layer_loss, kind(0.02, units=1.0), pairs, shaping="raw", batch_axis=None)

    def cosine(step):
        found = estimated(weights, step)[1].ravel()
        return found @ layer_gradient / jnp.linalg.norm(found) / jnp.linalg.norm(layer_gradient)

    return jax.lax.map(cosine, steps)


plt.figure(figsize=(8, 4.5), layout="constrained")
for (name, (kind, color)), aside in zip(KINDS.items(), (0.95, 1.05), strict=True):
    cosines = []
    for count in counts:
        repeats = jnp.arange(max(4, REPEATS // count))
        cosines.append(np.asarray(cosines_of(repeats, kind, count)))
    plt.errorbar(
        counts * aside,
        [one.mean() for one in cosines],
        [one.std() for one in cosines],
        fmt="o",
        color=color,
        capsize=3,
        label=name,
    )
expected = np.geomspace(counts[0], counts[-1], 100)
plt.plot(expected, np.sqrt(expected / (expected + weights.size)), "--", color="gray", label="√(n / (n + d))")
plt.xscale("log")
plt.xlabel("pairs")
plt.ylabel("cosine with the exact gradient")
plt.legend()
plt.grid(alpha=0.25)
plt.show()

# %% [markdown]
# So rank 1 gives an equally good direction with a fraction of the random numbers, and its members are cheap. Training
# adds little to this: differences are divided by their standard deviation before rounding (`zscore` in `shape`), and
# Adam uses the estimate. `esjax tune RUN` measures this cosine for your model and text.
