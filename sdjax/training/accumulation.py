"""A batch worked on in parts, one after another, in the memory that one part takes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from sdjax.errors import SdjaxError
from sdjax.typing import Params

LossOf = Callable[[Params, Any], Float[Array, ""]]


def mean_gradients(
    loss_of: LossOf, params: Params, rows: PyTree[Any], parts: int
) -> tuple[Float[Array, ""], Params]:
    """The mean loss over a batch and its gradient, taken in equal parts.

    Args:
        loss_of: (params, some of the rows) to the mean loss over those rows.
        params: what the gradient is taken with respect to.
        rows: everything that a batch has a row of, first axis B.
        parts: how many; divides B. 1: the whole batch at once.

    Raises:
        SdjaxError: if B is no multiple of `parts`.
    """
    gradient_of = jax.value_and_grad(loss_of)
    if parts == 1:
        return gradient_of(params, rows)

    def add(total: tuple, part: Any) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, gradient_of(params, part)), None

    nothing = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, nothing, split_rows(rows, parts))
    loss, gradients = jax.tree.map(lambda x: x / parts, total)
    return loss, gradients


def split_rows(rows: PyTree[Any], parts: int) -> PyTree[Any]:
    """Splits the first axis: [B, …] to [parts, B / parts, …].

    Part i holds the rows i, i + parts, …: where a batch is spread over devices, so is
    each part of it.

    Raises:
        SdjaxError: if B is no multiple of `parts`.
    """

    def split(x: Array) -> Array:
        B, *rest = x.shape
        if parts < 1 or B % parts:
            raise SdjaxError(
                f"optimizer.accumulation is {parts}, but a batch of {B} has to divide "
                "into as many equal parts"
            )
        return x.reshape(B // parts, parts, *rest).swapaxes(0, 1)  # [parts, B/parts, …]

    return jax.tree.map(split, rows)
