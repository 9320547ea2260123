"""Evaluation of unmodified models of flax and equinox, against a plain forward pass of as many tokens.

Each uses the fastest of several numbers of pairs at a time. The table also lists the operations for which a low-rank
member's matrix was added up, and the largest difference from the losses of members with added-up weights.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt32

from bench.framework_models import MODELS, Made
from bench.measure import Candidate, alternate, fastest, spread
from bench.ours import random_tokens
from bench.report import Report, Row, print_row
from bench.rivals import spread_out
from bench.settings import Frameworks
from esjax.core import Noise, evaluate, explain, initial_units, low_rank, pair_seeds
from esjax.core.noise import Params
from esjax.devices.mesh import local_mesh

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGMA = 0.1

COMPARED = 64
"""Pairs whose losses are compared with those of members with added-up weights."""

Loss = Callable[[Params, Int[Array, " length"]], Float[Array, ""]]


def run(settings: Frameworks) -> Report:
    """Measure every model."""
    rows = [print_row(measure(name, settings)) for name in settings.models]
    notes = [
        "M/s are millions of member-tokens a second; the difference is the largest, in nats, between losses and those "
        f"of members whose weights are added up, of {min(COMPARED, settings.pairs)} pairs."
    ]
    return Report(rows, partial(plot, rows), notes)


def measure(name: str, settings: Frameworks) -> Row:
    """Measure one model."""
    made, mesh = MODELS[name](settings.window), local_mesh()
    params, loss = made.params, mean_nats(made)
    noise = low_rank(SIGMA, units=initial_units(params), **made.noise)
    seeds = pair_seeds(0, 0, settings.pairs)
    tokens = jnp.asarray(random_tokens((settings.pairs, settings.window + 1)), jnp.int32)
    of_members, work = jnp.repeat(tokens, 2, axis=0), 2 * settings.pairs * settings.window

    def forward(params: Params, tokens: Array, at_once: int) -> Array:
        return spread_out(mesh, partial(loss, params), tokens, at_once)

    ways: dict[str, dict[str, Candidate]] = {"evaluation": {}, "forward": {}}
    for pairs in settings.at_once:
        losses = jax.jit(evaluate(loss, noise, mesh=mesh, chunk_pairs=pairs))
        ways["evaluation"][str(pairs)] = Candidate(partial(losses, params, seeds, tokens), work)
        pass_ = jax.jit(partial(forward, at_once=2 * pairs))
        ways["forward"][str(pairs)] = Candidate(partial(pass_, params, of_members), work)
    chosen = {way: fastest(candidates) for way, candidates in ways.items()}
    rates = alternate({way: ways[way][pairs] for way, pairs in chosen.items()}, settings.rounds)
    added_up = explain(loss, noise, params, tokens[0])
    return {
        "model": name,
        "weights": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "evaluation M/s": float(np.median(rates["evaluation"])) / 1e6,
        "forward M/s": float(np.median(rates["forward"])) / 1e6,
        "evaluation ÷ forward": spread(rates["evaluation"] / rates["forward"]),
        **{f"{way}, pairs at once": int(pairs) for way, pairs in chosen.items()},
        "added up": ", ".join(f"{leaf} for {operation}" for operation, leaf, _ in added_up) or "nothing",
        "difference": largest_difference(loss, noise, params, seeds[:COMPARED], tokens[:COMPARED]),
    }


def mean_nats(made: Made) -> Loss:
    """Make the loss of a model on one sequence, whose first token is only read."""

    def loss(params: Params, tokens: Int[Array, " length"]) -> Float[Array, ""]:
        logits = made.logits(params, tokens[:-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()

    return loss


def largest_difference(
    loss: Loss, noise: Noise, params: Params, seeds: UInt32[Array, "pairs 2"], tokens: Int[Array, "pairs length"]
) -> float:
    """Return the largest difference from the losses of members with added-up weights."""
    layout = noise.lay_out(params)

    def added_up(seed: Array, tokens: Array) -> Array:
        epsilon = layout.epsilon(seed, params)

        def score(sign: float) -> Array:
            return loss(
                jax.tree.map(lambda w, unit, e: w + sign * SIGMA * unit * e, params, noise.units, epsilon), tokens
            )

        return jnp.stack([score(1.0), score(-1.0)])

    found = jax.jit(evaluate(loss, noise))(params, seeds, tokens)
    return float(jnp.max(jnp.abs(found - jax.jit(jax.vmap(added_up))(seeds, tokens))))


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the ratios."""
    axes = figure.add_subplot()
    ratios = [row["evaluation ÷ forward"] for row in rows]
    axes.barh([row["model"] for row in rows], [ratio.median for ratio in ratios])
    low, high = ([abs(getattr(ratio, end) - ratio.median) for ratio in ratios] for end in ("low", "high"))
    axes.errorbar([ratio.median for ratio in ratios], range(len(rows)), xerr=[low, high], fmt="none", color="black")
    axes.invert_yaxis()
    axes.set(xlabel="evaluation ÷ forward")
