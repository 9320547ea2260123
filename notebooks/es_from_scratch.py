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
# How can losses alone say where the gradient points? First with two weights, where everything can be seen, then with a
# matrix. Noise comes from `esjax.core`; the rest is written out here first, and then left to the library.
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
REPEATS = 400  # estimates from which a spread is taken
COUNTS = [4, 16, 64, 256, 1024, 4096]  # pairs of which cosines are taken

# %% [markdown]
# ## A loss of two weights
#
# A neuron `tanh(w₀ x + w₁)` is to fit some points. Each point is a piece of data with a loss of its own; the loss is
# their mean.

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
# `w - σ ε`. `pair_seeds` names the pairs of a step, and `full` grows an ε from each name: a number for each weight.
# Noise is normal in this picture: ±1, the default, knows but four directions in two dimensions.
#
# The difference of the two losses, divided by 2σ, is the slope along ε. The mean of slope times ε is an estimate of the
# gradient.

# %%
SIGMA, PAIRS = 0.4, 12
noise = full(SIGMA, gaussian=True, units=1.0)  # units scale the noise of each leaf; here there is but one
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
# On the left are twelve pairs around the weights. Of each pair the better member is filled; the line is the thicker the
# more the two differ. The sum of the noise, each weighed by that slope, is nearly the exact gradient. On the right both
# are followed downhill.

# %%
grid = np.meshgrid(np.linspace(-2, 3, 80), np.linspace(-2, 2, 80))
heights = jax.jit(jax.vmap(loss))(np.stack(grid, -1).reshape(-1, 2).astype(np.float32)).reshape(80, 80)
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharex=True, sharey=True)
for axes in (left, right):
    axes.contourf(*grid, heights, levels=25, cmap="Greys", alpha=0.55)
    axes.plot(1.5, -0.5, "*", color="black", ms=10)  # what the points come from
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
# The library does the same in three functions. `evaluate` scores both members of every pair, `shape` makes a small
# integer of each pair's difference, and one scale for all, and `estimate` grows the noise once more from the seeds and
# sums it with these integers. So only seeds and integers need to travel between machines, and a sum of integers is the
# same in any order. The estimate differs from the one above by the rounding alone.

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
# One does not score all data in a step: each pair sees a piece of its own, one point here. Some pieces are harder than
# others, and a member on a hard piece looks bad whatever its noise is. The two members of a pair see the *same* piece,
# so that how hard it is cancels in their difference.
#
# Each dot is an estimate from 64 losses. All three clouds have the gradient (green) near their middle.


# %%
def on_points(step, sigma, pairs, shared):
    """Score pairs on one point each, or each member on a point of its own."""
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
# The difference of a pair is the slope of a chord, not of a tangent. A large sigma therefore misses what is bent: that
# is *bias*, and more pairs do not help. A small sigma costs nothing while both members see the same data. If they
# do not, or if the loss itself is random, what is random in it is divided by a small sigma: that is *noise*. More pairs
# do help against noise.

# %%
sigmas = np.geomspace(0.02, 2, 13)


@jax.jit
@jax.vmap
def blurred(sigma):
    """Take the mean over all normal noise, as an integral: what infinitely many pairs would say."""
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
# A full perturbation of a matrix has a number for each weight, and each member multiplies by a matrix of its own. One
# of rank 1 is `a bᵀ`: it takes a row and a column of numbers. And it need never be added to the matrix:
# `x (W + σ a bᵀ) = x W + σ (x·a) bᵀ`, so that all members share the product with `W`. `evaluate` does so for any loss:
# it follows the operations of the loss and puts this rule in the place of each product with a perturbed matrix.

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
# Does it point as well? A layer of 24 by 24 weights is to do what another layer does. We compare estimates with the
# exact gradient, by the cosine of the angle between them, now with the default noise of ±1. With `n` pairs and `d`
# weights about `√(n / (n + d))` is to be expected, of either kind: `ε` has the same variance in each direction.
#
# `value_and_grad` is `pair_seeds`, `evaluate`, `shape` and `estimate` one after another. It takes the place of
# `jax.value_and_grad`.

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
# So rank 1 points as well for a fraction of the noise, and its members are cheap. What training does beyond this is
# little: differences are divided by their standard deviation before they are rounded (`zscore` in `shape`), and Adam
# takes the estimate. `esjax tune RUN` measures this cosine for a model and a text of yours.
