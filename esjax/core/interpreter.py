"""Runs an unmodified JAX function on arguments of which some are of type `PerturbedArray`.

The function is traced with plain arrays, and its operations are applied one by one: those with a perturbed input by the
rules of `esjax.core.rules`, all others unchanged. This happens while JAX traces, so it costs nothing at run time.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from esjax.core.perturbed import PerturbedArray, is_perturbed
from esjax.core.rules import RULES
from esjax.core.signs import PackedSigns, unpacked

_INLINED = {
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "pjit",
    "remat",
    "remat2",
}
"""Operations that only wrap a function; the operations of that function are run in their place."""


class AddedUp(NamedTuple):
    """An operation without a rule, for which a perturbed array was added up.

    Attributes:
        operation: Name of the JAX primitive.
        leaf: Path of the leaf in the parameters.
        shape: Shape of the array that was added up.
    """

    operation: str
    leaf: str
    shape: tuple[int, ...]


def interpret(function: Callable[..., Any], added_up: list[AddedUp] | None = None) -> Callable[..., Any]:
    """Make a function that takes perturbed arrays in place of arrays.

    Args:
        function: Any function of pytrees that JAX can trace.
        added_up: List that receives an entry for each array that is added up because an operation has no rule.

    Returns:
        A function of the same arguments that returns plain arrays.
    """

    def interpreted(*arguments: Any) -> Any:
        leaves, treedef = jax.tree.flatten(arguments, is_leaf=is_perturbed)
        if not any(map(is_perturbed, leaves)):
            return function(*arguments)
        plain = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_perturbed(leaf) else leaf for leaf in leaves]
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*jax.tree.unflatten(treedef, plain))
        results = _Run([] if added_up is None else added_up).closed(closed, leaves)
        results = [result.added_up() if is_perturbed(result) else jnp.asarray(result) for result in results]
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return interpreted


class _Run:
    """One pass over the operations of a function (a jaxpr)."""

    def __init__(self, added_up: list[AddedUp]) -> None:
        self._added_up = added_up

    def closed(self, closed: Any, inputs: Sequence[Any]) -> list[Any]:
        consts = [jnp.asarray(const) if isinstance(const, np.ndarray) else const for const in closed.consts]
        return self.jaxpr(closed.jaxpr, [*consts, *inputs])

    def jaxpr(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
        values: dict[Any, Any] = dict(zip(_inputs(jaxpr), inputs, strict=True))

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, jex.Literal) else values[variable]

        for equation in jaxpr.eqns:
            outputs = self._operation(equation, [read(variable) for variable in equation.invars])
            values.update(zip(equation.outvars, outputs, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _operation(self, equation: Any, inputs: list[Any]) -> Sequence[Any]:
        primitive, params = equation.primitive, equation.params
        if any(map(is_perturbed, inputs)):
            name = primitive.name
            if name in _INLINED:
                inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
                return self.closed(inner, inputs) if hasattr(inner, "consts") else self.jaxpr(inner, inputs)
            if name in _LOOPS:
                return _LOOPS[name](self, inputs, **params)
            rule = RULES.get(name)
            with jax.numpy_dtype_promotion("standard"):  # factors are float32; parameters may not be
                found = NotImplemented if rule is None else rule(*inputs, **params)
            if found is not NotImplemented:
                return found if primitive.multiple_results else [found]
            inputs = self.plain(name, inputs)
        outputs = primitive.bind(*inputs, **primitive.get_bind_params(params))
        return outputs if primitive.multiple_results else [outputs]

    def plain(self, operation: str, values: Sequence[Any]) -> list[Any]:
        """Add up the perturbed arrays among the values and record the operation."""
        for value in values:
            if is_perturbed(value) and value.left is not None:
                self._added_up.append(AddedUp(operation, value.leaf, tuple(value.shape)))
        return [value.added_up() if is_perturbed(value) else value for value in values]

    def scan(
        self, inputs: list[Any], *, jaxpr: Any, length: int, reverse: bool, unroll: int, **params: Any
    ) -> list[Any]:
        if "num_consts" in params:
            consts, carried = params["num_consts"], params["num_carry"]
        else:  # JAX 0.11 and newer
            consts, carried, _ = (len(group) for group in params["ft_in"].update(inputs).unpack())
        constants, start, slices = inputs[:consts], inputs[consts : consts + carried], inputs[consts + carried :]
        same = _passed_on(jaxpr.jaxpr, consts, carried)
        start = [value if i in same else self.plain("scan", [value])[0] for i, value in enumerate(start)]
        moving = [value for i, value in enumerate(start) if i not in same]

        def body(moving: list[Any], at: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
            number, plain = at[0], iter(at[1])
            here = [_slice_of(value, number) if is_perturbed(value) else next(plain) for value in slices]
            outputs = self.closed(jaxpr, [*constants, *_merged(start, same, moving), *here])
            after, results = outputs[:carried], self.plain("scan", outputs[carried:])
            return self.plain("scan", [value for i, value in enumerate(after) if i not in same]), results

        # As inputs of the loop, factors would be copied first: `jax.vmap` puts the axis of members behind theirs.
        plain = [value for value in slices if not is_perturbed(value)]
        numbers = jnp.arange(length, dtype=jnp.int32)
        moving, results = lax.scan(body, moving, (numbers, plain), length=length, reverse=reverse, unroll=unroll)
        return [*_merged(start, same, moving), *results]

    def while_loop(
        self,
        inputs: list[Any],
        *,
        cond_nconsts: int,
        cond_jaxpr: Any,
        body_nconsts: int,
        body_jaxpr: Any,
        **_: Any,
    ) -> list[Any]:
        of_condition, rest = inputs[:cond_nconsts], inputs[cond_nconsts:]
        constants, start = rest[:body_nconsts], rest[body_nconsts:]
        same = _passed_on(body_jaxpr.jaxpr, body_nconsts, len(start))
        start = [value if i in same else self.plain("while", [value])[0] for i, value in enumerate(start)]

        def condition(moving: list[Any]) -> Any:
            return self.closed(cond_jaxpr, [*of_condition, *_merged(start, same, moving)])[0]

        def body(moving: list[Any]) -> list[Any]:
            after = self.closed(body_jaxpr, [*constants, *_merged(start, same, moving)])
            return self.plain("while", [value for i, value in enumerate(after) if i not in same])

        moving = lax.while_loop(condition, body, [value for i, value in enumerate(start) if i not in same])
        return _merged(start, same, moving)

    def cond(self, inputs: list[Any], *, branches: Sequence[Any], **_: Any) -> list[Any]:
        index, *operands = inputs

        def make(branch: Any) -> Callable[[], list[Any]]:
            return lambda: self.plain("cond", self.closed(branch, operands))

        return lax.switch(index, [make(branch) for branch in branches])


_LOOPS: dict[str, Callable[..., list[Any]]] = {"cond": _Run.cond, "scan": _Run.scan, "while": _Run.while_loop}


def _inputs(jaxpr: Any) -> list[Any]:
    return [*jaxpr.constvars, *jaxpr.invars]


def _passed_on(body: Any, constants: int, carried: int) -> set[int]:
    """Return which carried values a loop never changes: these may stay perturbed."""
    before, after = body.invars[constants : constants + carried], body.outvars[:carried]
    return {i for i, (one, two) in enumerate(zip(before, after, strict=True)) if one is two}


def _merged(start: Sequence[Any], same: set[int], moving: Sequence[Any]) -> list[Any]:
    rest = iter(moving)
    return [value if i in same else next(rest) for i, value in enumerate(start)]


def _slice_of(value: PerturbedArray, number: Any) -> PerturbedArray:
    """Return the slice of a perturbed array at a place of the first axis, as a loop over that axis takes it."""

    def take(part: Any) -> Any:
        if part is None or not part.shape:  # nothing is added to the base; or one step for all slices
            return part
        if part.shape[0] == 1:
            return lax.squeeze(unpacked(part), [0])
        if isinstance(part, PackedSigns):
            return lax.squeeze(part.row(number), [0])
        return lax.dynamic_index_in_dim(part, number, keepdims=False)

    return replace(value, base=take(value.base), left=take(value.left), right=take(value.right), step=take(value.step))
