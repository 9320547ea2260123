"""Evolution strategies for any JAX model, unmodified: the whole algorithm, as pure functions.

    noise  = low_rank(sigma=0.1, rank=1)
    losses = jax.jit(evaluate(loss, noise))             # (params, seeds, batch) -> losses [pairs, 2]
    seeds  = pair_seeds(seed=0, step=t, pairs=2048)     # uint32 [pairs, 2]
    shaped = shape(losses(params, seeds, batch))        # a small integer a pair, and one scale
    grads  = estimate(noise)(params, seeds, shaped)     # a pytree like params

Read the modules in this order: `seeds`, `units`, `leaves`, `noise`, `population`, `shaping`, `gradient`. The other four
make low-rank noise cheap: `signs` draws and packs ±1; `perturbed`, `rules` and `interpreter` run a model on W + abᵀ
without adding the two up.

The method: evolution strategies (Rechenberg 1973; Salimans et al. 2017) with noise of low rank (Sarkar et al. 2025).
"""

from esjax.core.gradient import estimate, value_and_grad, weigh
from esjax.core.interpreter import AddedUp
from esjax.core.noise import Layout, Noise, full, low_rank
from esjax.core.population import evaluate, explain
from esjax.core.seeds import pair_seeds
from esjax.core.shaping import Shaped, shape
from esjax.core.units import in_units, initial_units

__all__ = [
    "AddedUp",
    "Layout",
    "Noise",
    "Shaped",
    "estimate",
    "evaluate",
    "explain",
    "full",
    "in_units",
    "initial_units",
    "low_rank",
    "pair_seeds",
    "shape",
    "value_and_grad",
    "weigh",
]
