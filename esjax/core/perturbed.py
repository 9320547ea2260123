"""An array kept as a sum, base + Σ_r left_r * right_r, that is not added up (Sarkar et al. 2025, section 4).

`left` varies along some axes of the array and `right` along the others. So a product with the array is one product with
the base, which the whole population shares, and two thin ones. `esjax.core.rules` lists the operations that keep an
array in this form.
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

    A factor has the axes of the base and one more, the rank. Along each axis of the base it has that axis's size, or
    size 1 where it does not vary. So transposing, slicing and reshaping work alike on all three parts.

    Attributes:
        base: The unperturbed array, [*shape]. If its type is narrower than `dtype`, products round to it.
        left: Left factors, [*shape or 1, rank]. None: nothing is added to the base.
        right: Right factors, [*shape or 1, rank].
        step: Factor of `right`: sigma, unit and sign; broadcasts with `right`. None: 1.
        dtype: Type of the whole array.
        leaf: Path of the leaf that the array comes from.
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
        """Return both factors unpacked; the right one is multiplied by the step."""
        left, right = self.plain_factors()
        return left, right if self.step is None else right * self.step

    def plain_factors(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Return both factors unpacked, without the step."""
        assert self.left is not None
        assert self.right is not None
        return unpacked(self.left), unpacked(self.right)

    def with_parts(self, base: Array, left: Array, right: Array) -> "PerturbedArray":
        """Return a perturbed array of other, unpacked parts, with the same type and leaf."""
        return PerturbedArray(base, left, right, None, self.dtype, self.leaf)

    def added_up(self) -> Array:
        """Return the plain array, of type `dtype`."""
        base = self.base.astype(self.dtype)
        if self.left is None:
            return base
        with jax.numpy_dtype_promotion("standard"):  # factors are float32; the base may not be
            left, right = self.factors()
            return (base + jnp.sum(left * right, axis=-1)).astype(self.dtype)


def is_perturbed(value: Any) -> bool:
    """Return whether a value is a `PerturbedArray`."""
    return isinstance(value, PerturbedArray)
