"""The settings of every architecture, and the function that builds it.

To add one, write the function in a file of `esjax/models/`, and here a class with its settings, which `ModelConfig` and
`__all__` name. The command line, sweeps, `esjax.NAME` and the docs find it from there.
"""

from __future__ import annotations

from typing import ClassVar, get_args

from esjax.config.section import Section, check_positive

__all__ = ["GruConfig", "MinGruConfig", "RnnConfig"]


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
    """A gated recurrent unit (Cho et al. 2014) with a hidden layer before the prediction."""

    built_by: ClassVar = "esjax.models.gru:gru"

    hidden_size: int = 32
    """Width of the state."""

    head_size: int = 64
    """Width of the hidden layer between the state and the prediction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden_size", "head_size")


class MinGruConfig(_Architecture, tag="mingru"):
    """Gated elementwise layers (related to minGRU: Feng et al. 2024) whose first gates see the last few tokens."""

    built_by: ClassVar = "esjax.models.mingru:mingru"

    hidden_size: int = 32
    """Width of the state of a layer."""

    head_size: int = 64
    """Width of the hidden layer between the states and the prediction."""

    n_layers: int = 1
    """Number of gated layers; each reads the new state of the layer below."""

    gate_tokens: int = 3
    """Number of tokens that the gates of the first layer see."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden_size", "head_size", "n_layers", "gate_tokens")


ModelConfig = RnnConfig | GruConfig | MinGruConfig
"""The settings of any architecture of this package."""

MODELS: dict[str, type[ModelConfig]] = {str(kind.__struct_config__.tag): kind for kind in get_args(ModelConfig)}
"""These groups of settings, by the name of the model."""
