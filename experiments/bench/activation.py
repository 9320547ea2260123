"""Member-tokens a second of a step with noise on activations, against a plain forward pass of as many tokens.

The forward pass uses the fastest of several batch sizes. Only the noisy copies of the state count as members.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from bench.measure import Candidate, alternate, fastest, spread
from bench.ours import VOCAB, member_tokens, random_tokens, replica_of, step
from bench.report import Report, Row
from bench.rivals import forward
from bench.settings import Activation
from esjax.config.models import GruConfig
from esjax.config.settings import Config, EsConfig, replace
from esjax.devices.mesh import local_mesh
from esjax.models import build_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(settings: Activation) -> Report:
    """Measure every width."""
    rows = [measure(hidden, settings) for hidden in settings.widths]
    return Report(rows, partial(plot, rows))


def measure(hidden: int, settings: Activation) -> Row:
    """Measure one width."""
    es = EsConfig(space="activation", population_size=settings.population)
    config = Config(es=es, model=GruConfig(hidden_size=hidden, head_size=max(64, hidden)))
    exact = replace(config, es=replace(es, output_layer="exact"))
    mesh, data = local_mesh(), config.data
    model = build_model(config.model, VOCAB)
    params = model.init(jax.random.key(0))
    tokens = jnp.asarray(random_tokens((settings.population, data.burn_in + data.window)), jnp.int32)
    work = member_tokens(config)
    passes = {
        str(at_once): Candidate(partial(jax.jit(forward(model, mesh, data.burn_in, at_once)), params, tokens), work)
        for at_once in settings.at_once
    }
    chosen = fastest(passes)
    candidates = {
        "forward": passes[chosen],
        "step": step(config, replica_of(config, mesh)),
        "exact": step(exact, replica_of(exact, mesh)),
    }
    rates = alternate(candidates, settings.rounds)
    return {
        "hidden": hidden,
        **{f"{name} M/s": float(np.median(values)) / 1e6 for name, values in rates.items()},
        "step ÷ forward": spread(rates["step"] / rates["forward"]),
        "step, exact logits ÷ forward": spread(rates["exact"] / rates["forward"]),
        "forward at once": int(chosen),
    }


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw both ratios."""
    axes = figure.add_subplot()
    for name in ("step ÷ forward", "step, exact logits ÷ forward"):
        axes.plot([row["hidden"] for row in rows], [row[name].median for row in rows], "o-", label=name)
    axes.set(xlabel="hidden", xscale="log", ylim=(0, None))
    axes.legend()
