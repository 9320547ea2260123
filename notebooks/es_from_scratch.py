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
# matrix. The noise is that of `esjax.noise`; the rest is written out here.
#
# Install with `pip install -e '.[notebook]'` in a checkout. It takes about a minute.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import esjax
from esjax.noise import PERTURBATIONS, make_space, pair_seeds, stream_seed

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
# `make_space` says how members differ from the weights. `sample` grows noise from seeds, `perturb` makes a member,
# `weigh` sums the noise again. It asks the model only for the unit of each weight, which is 1 here. Noise is
# normal in this picture: ±1, the default, knows but four directions in two dimensions.

# %%
unitless = esjax.Model(init=None, initial_state=None, predict=None, consume=None)


def space_of(weights, sigma, **settings):
    return make_space(unitless, weights, **{"space": "full", "noise": "gaussian", "rank": 1, "sigma": sigma} | settings)


def seeds_of(step, pairs):
    return pair_seeds(stream_seed(0, PERTURBATIONS), step, jnp.arange(pairs))


def estimate(space, sigma, loss, weights, seeds):
    """Score both members of each pair, and sum their noise by the difference."""
    noise = space.sample(seeds)  # the pairs are the last axis

    def score(sign):
        return jax.vmap(lambda one: loss(space.perturb(weights, one, sign)), in_axes=-1)(noise)

    difference = (score(1.0) - score(-1.0)) / (2 * sigma)  # slope along ε
    return space.mean(space.weigh(noise, difference), 1 / len(seeds)), difference


SIGMA, PAIRS = 0.4, 12
space = space_of(w, SIGMA)
noise = jax.jit(lambda step: space.sample(seeds_of(step, PAIRS)))(5)
one_step = jax.jit(lambda w, step: estimate(space, SIGMA, loss, w, seeds_of(step, PAIRS)))
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
around, ahead = np.asarray(w)[:, None], SIGMA * np.asarray(noise)
plus, minus = around + ahead, around - ahead
for k, size in enumerate(np.abs(slope)):
    better, worse = (minus, plus) if slope[k] > 0 else (plus, minus)
    left.plot(*np.stack([better[:, k], worse[:, k]]).T, color=BLUE, lw=0.5 + 2.5 * size, alpha=0.6)
    left.plot(*better[:, k], "o", color=BLUE, ms=5)
    left.plot(*worse[:, k], "o", color=BLUE, ms=5, mfc="white")
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
    noise = space_of(w, sigma).sample(seeds_of(step, pairs))
    points = jax.random.randint(jax.random.fold_in(jax.random.key(2), step), (2, pairs), 0, len(x))
    points = points.at[1].set(points[0]) if shared else points

    def score(sign, points):
        return jax.vmap(lambda one, point: loss(space_of(w, sigma).perturb(w, one, sign), point), (-1, 0))(
            noise, points
        )

    return noise, score(1.0, points[0]), score(-1.0, points[1])


def pairs_estimate(step, sigma=0.4, pairs=32, shared=True):
    noise, plus, minus = on_points(step, sigma, pairs, shared)
    return noise @ ((plus - minus) / (2 * sigma)) / pairs


def single_estimate(step, sigma=0.4, members=64, centered=False):
    noise, plus, _ = on_points(step, sigma, members, shared=True)
    return noise @ ((plus - centered * plus.mean()) / sigma) / members


def cloud(estimate, **settings):
    return np.asarray(jax.jit(jax.vmap(lambda step: estimate(step, **settings)))(jnp.arange(REPEATS)))


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
    noise = jnp.stack(jnp.meshgrid(nodes, nodes)).reshape(2, -1)
    slopes = jax.vmap(lambda one: loss(w + sigma * one) - loss(w - sigma * one), in_axes=-1)(noise) / (2 * sigma)
    shares = jnp.outer(shares, shares).ravel() / shares.sum() ** 2
    return noise @ (shares * slopes)


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
# `x (W + σ a bᵀ) = x W + σ (x·a) bᵀ`, so that all members share the product with `W`.

# %%
widths = 2 ** np.arange(4, 13)
plt.figure(figsize=(8, 4), layout="constrained")
for kind, color in (("full", BLUE), ("low_rank", ORANGE)):
    numbers = [space_of(jax.ShapeDtypeStruct((n, n), jnp.float32), 0.1, space=kind).numbers for n in widths]
    plt.loglog(widths, numbers, "o-", base=2, color=color, label=f"{kind}, {numbers[-1]:,} at width {widths[-1]:,}")
plt.xlabel("width of the matrix")
plt.ylabel("numbers of noise a pair")
plt.legend()
plt.grid(alpha=0.25)
plt.show()

# %% [markdown]
# Does it point as well? A layer of 24 by 24 weights is to do what another layer does. We compare estimates with the
# exact gradient, by the cosine of the angle between them, now with the default noise of ±1. With `n` pairs and `d`
# weights about `√(n / (n + d))` is to be expected, of either kind: `ε` has the same variance in each direction.

# %%
inputs, target, weights = (
    jnp.asarray(random.normal(size=shape) / 24**0.5, jnp.float32) for shape in ((64, 24), (24, 24), (24, 24))
)


def layer_loss(weights):
    return jnp.mean((jnp.tanh(inputs @ weights) - jnp.tanh(inputs @ target)) ** 2)


counts = np.array(COUNTS)
layer_gradient = jax.jit(jax.grad(layer_loss))(weights).ravel()


@partial(jax.jit, static_argnums=(1, 2))
def cosines_of(steps, kind, pairs):
    return jax.lax.map(lambda step: cosine(step, kind, pairs), steps)


def cosine(step, kind, pairs):
    chosen = space_of(weights, 0.02, space=kind, noise="rademacher")
    found = estimate(chosen, 0.02, layer_loss, weights, seeds_of(step, pairs))[0].ravel()
    return found @ layer_gradient / jnp.linalg.norm(found) / jnp.linalg.norm(layer_gradient)


plt.figure(figsize=(8, 4.5), layout="constrained")
for kind, color, aside in (("full", BLUE, 0.95), ("low_rank", ORANGE, 1.05)):
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
        label="full" if kind == "full" else "rank 1",
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
# little: the slopes become small integers (`esjax.fitness`), and Adam takes the estimate (`esjax.es`). `esjax tune RUN`
# measures this cosine for a model and a text of yours.
