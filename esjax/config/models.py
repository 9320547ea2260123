"""The settings of every architecture, and the function that builds it.

To add one, write the function in a file of `esjax/models/`, and here a class with its settings, which `ModelConfig` and
`__all__` name. The command line, sweeps, `esjax.NAME` and the docs find it from there.
"""

from __future__ import annotations

from typing import ClassVar, get_args

from esjax.config.section import Section, check, check_positive

__all__ = [
    "GruConfig",
    "LlamaConfig",
    "LruConfig",
    "LstmConfig",
    "MinGruConfig",
    "RnnConfig",
    "Rwkv7Config",
    "TransformerConfig",
]


class _Architecture(Section, tag_field="name"):
    """A group of settings that chooses the model; its tag is the name of the model.

    Attributes:
        built_by: "module:function"; the function takes the number of token ids and the settings, by their names, and
            returns the model. A text, since `--help` must not import JAX.
    """

    built_by: ClassVar[str]


class RnnConfig(_Architecture, tag="rnn"):
    """A multiplicative recurrent network (related to Sutskever et al. 2011): several layers update one state."""

    built_by: ClassVar = "esjax.models.rnn:rnn"

    hidden_size: int = 32
    """Width of the state."""

    n_layers: int = 1
    """Updates of the state for each token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden_size", "n_layers")


class GruConfig(_Architecture, tag="gru"):
    """Gated recurrent units (Cho et al. 2014) with a hidden layer before the prediction."""

    built_by: ClassVar = "esjax.models.gru:gru"

    hidden_size: int = 32
    """Width of the state."""

    head_size: int = 64
    """Width of the hidden layer between the states and the prediction."""

    n_layers: int = 1
    """Number of layers; each reads the new state of the layer below."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden_size", "head_size", "n_layers")


class LstmConfig(_Architecture, tag="lstm"):
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with a hidden layer before the prediction."""

    built_by: ClassVar = "esjax.models.lstm:lstm"

    hidden_size: int = 32
    """Width of the cells, and of the output, of a layer."""

    head_size: int = 64
    """Width of the hidden layer between the outputs and the prediction."""

    n_layers: int = 1
    """Number of layers; each reads the new output of the layer below."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden_size", "head_size", "n_layers")


class MinGruConfig(_Architecture, tag="mingru"):
    """Gated elementwise layers (related to minGRU: Feng et al. 2024) whose first gates see the last few tokens."""

    built_by: ClassVar = "esjax.models.mingru:mingru"

    hidden_size: int = 32
    """Width of the state of a layer."""

    head_size: int = 96
    """Width of the hidden layer between the states and the prediction."""

    n_layers: int = 1
    """Number of gated layers; each reads the new state of the layer below."""

    gate_tokens: int = 2
    """Number of tokens that the gates of the first layer see; 3 learn more with noise on activations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden_size", "head_size", "n_layers", "gate_tokens")


class LruConfig(_Architecture, tag="lru"):
    """Gated linear recurrent units (related to Hawk: De et al. 2024) in residual blocks, with gated MLPs between."""

    built_by: ClassVar = "esjax.models.lru:lru"

    hidden_size: int = 32
    """Width of the residual stream and of the state of a layer."""

    mlp_size: int = 64
    """Width of the hidden layer of the MLPs."""

    n_layers: int = 2
    """Number of layers."""

    gate_tokens: int = 3
    """Number of tokens that the first layer sees at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden_size", "mlp_size", "n_layers", "gate_tokens")


class LlamaConfig(_Architecture, tag="llama"):
    """A transformer (Touvron et al. 2023), as of many pretrained models: rotary embedding, grouped-query attention."""

    built_by: ClassVar = "esjax.models.llama:llama"

    hidden_size: int = 64
    """Width of the state of a token."""

    mlp_size: int = 176
    """Width of the hidden layer after the attention."""

    n_layers: int = 2
    """Number of layers."""

    n_heads: int = 4
    """Attention heads; hidden_size / n_heads, the width of a head, must be an even number."""

    n_kv_heads: int = 2
    """Heads of keys and values; divides n_heads."""

    context: int = 256
    """Most tokens that attention reaches back to, the current one included."""

    rope_theta: float = 10000.0
    """Base of the wavelengths of the rotary embedding."""

    norm_eps: float = 1e-5
    """Added to the mean square in the norms."""

    tied: bool = True
    """Whether the embedding is the output layer, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden_size", "mlp_size", "n_layers", "n_heads", "n_kv_heads", "context", "rope_theta")
        check_positive(self, "norm_eps")
        _check_heads(self.hidden_size, self.n_heads)
        check(
            self.n_heads % self.n_kv_heads == 0,
            f"n_kv_heads must divide n_heads, got {self.n_kv_heads} for {self.n_heads}",
        )


class TransformerConfig(_Architecture, tag="transformer"):
    """A decoder to train from scratch (Vaswani et al. 2017, with the parts of llama): rotary embedding, gated MLPs."""

    built_by: ClassVar = "esjax.models.transformer:transformer"

    hidden_size: int = 64
    """Width of the state of a token."""

    mlp_size: int = 128
    """Width of the hidden layer of the MLPs."""

    n_layers: int = 2
    """Number of layers."""

    n_heads: int = 4
    """Attention heads; hidden_size / n_heads, the width of a head, must be an even number."""

    context: int = 256
    """Most tokens that attention reaches back to, the current one included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden_size", "mlp_size", "n_layers", "n_heads", "context")
        _check_heads(self.hidden_size, self.n_heads)


class Rwkv7Config(_Architecture, tag="rwkv7"):
    """RWKV-7 (Peng et al. 2025): a recurrent network with a matrix as state, which the delta rule changes."""

    built_by: ClassVar = "esjax.models.rwkv7:rwkv7"

    hidden_size: int = 32
    """Width of the residual stream."""

    head_size: int = 16
    """Width of a head; divides hidden_size."""

    mlp_size: int = 64
    """Width of the hidden layer of the MLPs."""

    n_layers: int = 2
    """Number of layers."""

    gate_size: int = 8
    """Width of the products that make the gates: what is kept, replaced, taken from the first layer, and shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden_size", "head_size", "mlp_size", "n_layers", "gate_size")
        check(
            self.hidden_size % self.head_size == 0,
            f"head_size must divide hidden_size, got {self.head_size} for {self.hidden_size}",
        )


def _check_heads(hidden_size: int, n_heads: int) -> None:
    check(
        hidden_size % n_heads == 0 and hidden_size // n_heads % 2 == 0,
        f"hidden_size / n_heads must be an even number, got {hidden_size} / {n_heads}",
    )


ModelConfig = (
    RnnConfig | GruConfig | LstmConfig | MinGruConfig | LruConfig | TransformerConfig | LlamaConfig | Rwkv7Config
)
"""The settings of any architecture of this package."""

MODELS: dict[str, type[ModelConfig]] = {str(kind.__struct_config__.tag): kind for kind in get_args(ModelConfig)}
"""These groups of settings, by the name of the model."""
