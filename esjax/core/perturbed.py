"""A perturbed array that is never added up: base + Σ_r left_r * right_r (Sarkar et al. 2025, section 4).

`left` varies along some axes of the array and `right` along others, so a product with the array costs one product with
the base, which the whole population shares, and two thin ones. `esjax.core.rules` has the operations that keep it so.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esjax.core.signs import PackedSigns, unpacked


@partial(jax.tree_util.register_dataclass, data_fields=["base", "left", "right", "step"], meta_fields=["dtype", "leaf"])
@dataclass(frozen=True)
class PerturbedArray:
    """The array `base + Σ_r left[..., r] * right[..., r] * step`, of the shape of `base`.

    A factor has the axes of the base and one more, the rank; along an axis of the base it has that axis's size, or
    size 1 where it does not vary. So transposing, slicing and reshaping the array is the same for all three parts.

    Attributes:
        base: The unperturbed array, [*shape]. Its type may be narrower than `dtype`: products are then taken in it.
        left: Factors, [*shape or 1, rank]. None: nothing is added to the base.
        right: Factors, [*shape or 1, rank].
        step: What `right` is multiplied with, sign included; broadcasts with it.
        dtype: Type of the array to those who use it.
        leaf: Path of the leaf it comes from.
    """

    base: Array
    left: Float[Array, "..."] | PackedSigns | None
    right: Float[Array, "..."] | PackedSigns | None
    step: Float[Array, "..."] | None
    dtype: Any = field(default=jnp.float32)
    leaf: str = field(default="")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.base.shape

    def factors(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Return both factors written out, the step in the right one."""
        left, right = self.plain_factors()
        return left, right if self.step is None else right * self.step

    def plain_factors(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Return both factors written out, without the step."""
        assert self.left is not None
        assert self.right is not None
        return unpacked(self.left), unpacked(self.right)

    def with_parts(self, base: Array, left: Array, right: Array) -> "PerturbedArray":
        """Return the perturbed array of other parts, written out, of the same leaf."""
        return PerturbedArray(base, left, right, None, self.dtype, self.leaf)

    def added_up(self) -> Array:
        """Return the plain array, of type `dtype`."""
        base = self.base.astype(self.dtype)
        if self.left is None:
            return base
        with jax.numpy_dtype_promotion("standard"):  # of factors and base, which may be of another type
            left, right = self.factors()
            return (base + jnp.sum(left * right, axis=-1)).astype(self.dtype)


def is_perturbed(value: Any) -> bool:
    """Return whether a value is a `PerturbedArray`."""
    return isinstance(value, PerturbedArray)
