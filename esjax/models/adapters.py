"""Adapters: unmodified modules of flax and equinox as language models of a run.

Each adapter takes a function that builds a module, and returns a value for `esjax.train(model=...)`. The module maps
the token ids of one sequence, int32 [length], to logits, float [length, vocabulary]; row i predicts the token after
token i. The module must be causal and must not use random numbers, as dropout does.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from esjax.core.leaves import leaf_names
from esjax.errors import EsjaxError
from esjax.models.model import Model, ModelFactory, Params
from esjax.models.sequence import sequence_model


def linen_model(
    build: Callable[[int], Any],
    *,
    context: int,
    embeddings: tuple[str, ...] = (),
    output_layer: str = "",
    stacked: tuple[str, ...] = (),
) -> ModelFactory:
    """Adapt a module of flax.linen.

    Args:
        build: `(vocab_size) -> module`.
        context: Most tokens that the module reads, at least 1. Generation always passes this number.
        embeddings: See `Model.embeddings`; a path is such as "params/Embed_0/embedding".
        output_layer: See `Model.output_layer`; a path is such as "params/Dense_1".
        stacked: See `Model.stacked`; a path is such as "params/blocks".

    Returns:
        `(vocab_size) -> model`. The model's `init` raises EsjaxError if the module has variables besides parameters.
    """

    def factory(vocab_size: int) -> Model:
        module = build(vocab_size)

        def init(key: Key[Array, ""]) -> Params:
            variables = module.init(key, jnp.zeros(context, jnp.int32))
            if set(variables) != {"params"}:
                raise EsjaxError(
                    f"the module has the variables {', '.join(sorted(variables))}; only params can be trained, so "
                    "leave out what keeps other state, such as batch statistics"
                )
            return dict(variables)

        return sequence_model(
            init, module.apply, context, embeddings=embeddings, output_layer=output_layer, stacked=stacked
        )

    return _called_like(build, factory)


def nnx_model(
    build: Callable[[int, Any], Any],
    *,
    context: int,
    embeddings: tuple[str, ...] = (),
    output_layer: str = "",
    stacked: tuple[str, ...] = (),
) -> ModelFactory:
    """Adapt a module of flax.nnx. Variables of type `nnx.Param` are trained.

    Args:
        build: `(vocab_size, rngs) -> module`.
        context: Most tokens that the module reads, at least 1. Generation always passes this number.
        embeddings: See `Model.embeddings`; a path is such as "params/Embed_0/embedding".
        output_layer: See `Model.output_layer`; a path is such as "params/Dense_1".
        stacked: See `Model.stacked`; a path is such as "params/blocks".

    Returns:
        `(vocab_size) -> model`.
    """

    def factory(vocab_size: int) -> Model:
        from flax import nnx

        graph, like, rest = nnx.split(build(vocab_size, nnx.Rngs(0)), nnx.Param, ...)

        def first(key: Key[Array, ""]) -> Any:
            return nnx.split(build(vocab_size, nnx.Rngs(key)), nnx.Param, ...)[1]

        model = _module_model(like, first, lambda weights: nnx.merge(graph, weights, rest), context)
        return model._replace(embeddings=embeddings, output_layer=output_layer, stacked=stacked)

    return _called_like(build, factory)


def equinox_model(
    build: Callable[[int, Any], Any],
    *,
    context: int,
    embeddings: tuple[str, ...] = (),
    output_layer: str = "",
    stacked: tuple[str, ...] = (),
) -> ModelFactory:
    """Adapt a module of equinox. Arrays of floating type are trained.

    Args:
        build: `(vocab_size, key) -> module`.
        context: Most tokens that the module reads, at least 1. Generation always passes this number.
        embeddings: See `Model.embeddings`; a path is such as "params/Embed_0/embedding".
        output_layer: See `Model.output_layer`; a path is such as "params/Dense_1".
        stacked: See `Model.stacked`; a path is such as "params/blocks".

    Returns:
        `(vocab_size) -> model`.
    """

    def factory(vocab_size: int) -> Model:
        import equinox

        like, rest = equinox.partition(build(vocab_size, jax.random.key(0)), equinox.is_inexact_array)

        def first(key: Key[Array, ""]) -> Any:
            return equinox.filter(build(vocab_size, key), equinox.is_inexact_array)

        model = _module_model(like, first, lambda weights: equinox.combine(weights, rest), context)
        return model._replace(embeddings=embeddings, output_layer=output_layer, stacked=stacked)

    return _called_like(build, factory)


def _module_model(
    like: Any, first: Callable[[Key[Array, ""]], Any], rebuild: Callable[[Any], Any], context: int
) -> Model:
    """Make a model of a module that is a pytree.

    Args:
        like: Weights with the structure of the module's.
        first: Draws the initial weights.
        rebuild: Makes the module from weights.
        context: See `linen_model`.
    """
    names = _Names(like)

    def logits(params: Params, tokens: Array) -> Array:
        return rebuild(names.from_dict(params))(tokens)

    return sequence_model(lambda key: names.to_dict(first(key)), logits, context)


class _Names:
    """Converts parameters between a library's pytree and the nested dicts of files and checkpoints."""

    def __init__(self, like: Any) -> None:
        named, self._treedef = jax.tree_util.tree_flatten_with_path(like)
        self._paths = [leaf_names(path) for path, _ in named]

    def to_dict(self, tree: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for path, leaf in zip(self._paths, jax.tree.leaves(tree), strict=True):
            inner = result
            for name in path[:-1]:
                inner = inner.setdefault(name, {})
            inner[path[-1]] = leaf
        return result

    def from_dict(self, params: dict[str, Any]) -> Any:
        leaves = []
        for path in self._paths:
            inner: Any = params
            for name in path:
                inner = inner[name]
            leaves.append(inner)
        return jax.tree.unflatten(self._treedef, leaves)


def _called_like(build: Callable[..., Any], factory: ModelFactory) -> ModelFactory:
    """Give a factory the name of the function that it wraps: run folders record it."""
    factory.__qualname__ = getattr(build, "__qualname__", type(build).__qualname__)
    return factory
