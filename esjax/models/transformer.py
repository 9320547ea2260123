"""A decoder to train from scratch: the network of `esjax.models.llama`, with few settings.

Each head has a key of its own, and the output layer is not the embedding, so it can have its exact gradient and noise
on rows of the embedding that a window does not read can be left out.
"""

from esjax.models.llama import llama
from esjax.models.model import Model

THETA = 10_000.0
"""Base of the wavelengths of the rotary embedding (Su et al. 2021, section 3.2.2)."""

NORM_EPS = 1e-5
"""ε of the norms."""


def transformer(vocab_size: int, hidden_size: int, mlp_size: int, n_layers: int, n_heads: int, context: int) -> Model:
    """Build the network; the arguments are those of `esjax.models.llama.llama`."""
    return llama(
        vocab_size,
        hidden_size=hidden_size,
        mlp_size=mlp_size,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        context=context,
        rope_theta=THETA,
        norm_eps=NORM_EPS,
        tied=False,
    )
