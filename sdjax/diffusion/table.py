"""Samplers as tables of coefficients, like the Butcher tableaux of Runge–Kutta methods.

Every sampler here is linear in its state, the denoised prediction D and the noise z,
with coefficients that depend on the noise levels alone. So a sampler is a generator of
rows, written on the basis vectors `X, H1 … H5, D, Z` as in its paper, and runs on the
host in float64; one loop on the device runs any table (`sdjax.diffusion.loop`). A row
evaluates the network once and makes the next state

    S' = A · [S; D; z],   S = [x, h1, …, h5],   D = c_skip·x + c_out·F(c_in·x, t),

where x is variance preserving, x = αx0 + σε, α² + σ² = 1, as Stable Diffusion sees it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, ParamSpec

import numpy as np
from jaxtyping import Array, Float, Int

from sdjax.config import PredictionType
from sdjax.diffusion.grid import Grid, Node
from sdjax.errors import SdjaxError

SLOTS = 6
"""Slots of the state: x and five of history."""

COLUMNS = SLOTS + 2
"""What a row combines: the slots, the denoised prediction and the noise."""

MIN_ROWS = 1024
"""Padded tables have this many rows, or the next power of two that is enough."""

Values = np.ndarray | Array
"""NumPy's where a table is made, traced where it is run."""

Vector = Float[np.ndarray, "columns"]
X, H1, H2, H3, H4, H5, D, Z = np.eye(COLUMNS)

P = ParamSpec("P")


class Row(NamedTuple):
    """One evaluation of the network and the update after it.

    Attributes:
        step: which of the N sampling steps it belongs to.
        at: the level of x at which the network is evaluated.
        to: the level of the x that the row makes.
        x: the next x, on the basis vectors.
        h1, h2, h3, h4, h5: the next history; None: as it was.
    """

    step: int
    at: Node
    to: Node
    x: Vector
    h1: Vector | None = None
    h2: Vector | None = None
    h3: Vector | None = None
    h4: Vector | None = None
    h5: Vector | None = None


Rows = Iterator[Row]


class Tableau(NamedTuple):
    """A sampler at given noise levels; float32, an input of the compiled program.

    Attributes:
        level: the `Level` of each row: t, c_in, c_skip and c_out.
        update: the matrices A.
        alpha: of x after each row.
        sigma: of x after each row.
        step: the sampling step that each row belongs to.
        init_scale: what unit-variance noise is multiplied by to be the first x.
        start_alpha: of the first x, for x = start_alpha·x0 + start_sigma·ε.
        start_sigma: of the first x.
        num_rows: how many of the K rows there are; None: all, none is padding.
    """

    level: Float[Values, "k 4"]
    update: Float[Values, "k slots columns"]
    alpha: Float[Values, " k"]
    sigma: Float[Values, " k"]
    step: Int[Values, " k"]
    init_scale: Float[Values, ""]
    start_alpha: Float[Values, ""]
    start_sigma: Float[Values, ""]
    num_rows: Int[Values, ""] | None


Precondition = Callable[[Node], tuple[float, float, float]]
"""Gives c_in, c_skip and c_out at a node."""


def preconditioning(
    prediction_type: PredictionType, node: Node
) -> tuple[float, float, float]:
    """The c_in, c_skip and c_out that make x0 of ε, v or x0 itself.

    Salimans & Ho 2022, appendix D, arXiv:2202.00512.

    Raises:
        SdjaxError: where ε says nothing about x0, since there is no signal.
    """
    if prediction_type == "sample":
        return 1.0, 0.0, 1.0
    if prediction_type == "v_prediction":
        return 1.0, node.alpha, -node.sigma
    if node.alpha == 0:
        raise SdjaxError(
            f"prediction_type 'epsilon' cannot be sampled from t = {node.t:g}, where "
            "rescale_betas_zero_snr leaves no signal: the model must predict "
            "'v_prediction' or 'sample'"
        )
    return 1.0, 1 / node.alpha, -node.sigma / node.alpha


def exploding(sampler: Callable[P, Rows]) -> Callable[P, Rows]:
    """Lets a sampler be written for x/α = x0 + (σ/α)ε, in variance-exploding units."""

    @functools.wraps(sampler)
    def preserving(*args: P.args, **kwargs: P.kwargs) -> Rows:
        for row in sampler(*args, **kwargs):
            scale = np.ones(COLUMNS)
            scale[0] = 1 / row.at.alpha
            history = [None if h is None else h * scale for h in row[4:]]
            yield Row(row.step, row.at, row.to, row.x * scale * row.to.alpha, *history)

    return preserving


def assemble(
    rows: Iterable[Row],
    grid: Grid,
    *,
    precondition: Precondition | None = None,
    pad: bool = True,
) -> Tableau:
    """Turns the rows of a sampler into its table.

    Args:
        rows: what the sampler yields.
        grid: the levels it was given.
        precondition: c_in, c_skip and c_out; None: by the grid's prediction type.
        pad: to `MIN_ROWS` rows or the next power of two, so that tables of all lengths
            have one shape; otherwise the loop over the table can be differentiated.
    """
    if precondition is None:
        precondition = functools.partial(preconditioning, grid.prediction_type)
    rows = list(rows)
    num_rows = _padded(len(rows)) if pad else len(rows)
    level = np.zeros((num_rows, 4), np.float32)
    update = np.tile(np.eye(SLOTS, COLUMNS, dtype=np.float32), (num_rows, 1, 1))
    after = np.zeros((2, num_rows), np.float32)
    step = np.zeros(num_rows, np.int32)
    for k, row in enumerate(rows):
        level[k] = row.at.t, *precondition(row.at)
        for slot, vector in enumerate(row[3:]):
            if vector is not None:
                update[k, slot] = vector
        after[:, k] = row.to.alpha, row.to.sigma
        step[k] = row.step
    return Tableau(
        level=level,
        update=update,
        alpha=after[0],
        sigma=after[1],
        step=step,
        init_scale=np.asarray(grid.init_scale, np.float32),
        start_alpha=np.asarray(grid.nodes[0].alpha, np.float32),
        start_sigma=np.asarray(grid.nodes[0].sigma, np.float32),
        num_rows=np.asarray(len(rows), np.int32) if pad else None,
    )


def _padded(num_rows: int) -> int:
    return max(MIN_ROWS, 1 << (num_rows - 1).bit_length())
