"""Samplers on training times, variance preserving: DDPM, DDIM, PNDM, LCM and TCD.

Here x = αx0 + σε, and a step from one level to the next keeps x0 and ε:
x' = α'x0 + σ'ε. The previous time is T // N earlier, as in diffusers, even where the
times are spaced otherwise.
"""

import numpy as np

from sdjax.diffusion.grid import Grid, Node
from sdjax.diffusion.table import (
    H1,
    H2,
    H3,
    H4,
    H5,
    D,
    Row,
    Rows,
    Vector,
    X,
    Z,
    preconditioning,
)
from sdjax.errors import SdjaxError


def ddim(grid: Grid, eta: float = 0.0) -> Rows:
    """DDIM; Song et al. 2021, eq. 12 and 16, arXiv:2010.02502.

    Args:
        grid: a `time_grid`.
        eta: share of the noise of DDPM, in [0, 1].
    """
    for i, now in enumerate(grid.nodes[:-1]):
        after = grid.at_time(now.t - grid.stride)
        noise = eta * _posterior_sigma(now, after)
        direction = max(after.sigma**2 - noise**2, 0.0) ** 0.5
        x = after.alpha * D + direction * _epsilon(now) + noise * Z
        yield Row(i, now, after, x)


def ddim_inverse(grid: Grid) -> Rows:
    """DDIM backwards, from an image to its noise, as in diffusers.

    The network is told the later time; x is taken to be at the earlier one. Takes a
    `time_grid`, whose nodes it visits from the last to the first.
    """
    for i, after in enumerate(grid.nodes[-2::-1]):
        now = grid.at_time(after.t - grid.stride)._replace(t=after.t)
        yield Row(i, now, after, after.alpha * D + after.sigma * _epsilon(now))


def ddpm(grid: Grid) -> Rows:
    """Ancestral sampling with the smaller variance; Ho et al. 2020, arXiv:2006.11239.

    Equations 6 and 7, between times of the `time_grid` that follow each other.
    """
    for i, now, after in grid.steps:
        alpha_bar, previous = now.alpha**2, after.alpha**2
        beta = 1 - alpha_bar / previous
        mean = (
            after.alpha * beta * D + now.alpha / after.alpha * (1 - previous) * X
        ) / (1 - alpha_bar)
        yield Row(i, now, after, mean + _posterior_sigma(now, after) * Z)


def plms(grid: Grid) -> Rows:
    """Pseudo linear multistep; Liu et al. 2022, algorithm 2, arXiv:2202.09778.

    The first step is the pseudo improved Euler of CompVis: to the second time and, with
    the mean of both outputs, there again. History: h1 … h3 are the last raw outputs,
    newest first, h4 is the first x. Takes a `time_grid`.
    """
    times = [node.t for node in grid.nodes[:-1]]
    for k, t in enumerate(times[:1] + times[1:2] + times[1:]):
        now, after = grid.at_time(t), grid.at_time(t - grid.stride)
        raw = _output(grid, now)
        if k == 1:
            start = grid.at_time(t + grid.stride)
            x = _transfer(grid, start, now, (raw + H1) / 2, H4)
            yield Row(0, now, now, x)
            continue
        blend = _adams_bashforth(raw, order=min(max(k, 1), 4))
        x = _transfer(grid, now, after, blend, X)
        yield Row(max(k - 1, 0), now, after, x, raw, H1, H2, X if k == 0 else None)


def pndm_prk(grid: Grid) -> Rows:
    """PNDM with three pseudo Runge–Kutta steps first; Liu et al. 2022, algorithm 1.

    arXiv:2202.09778. Takes a `time_grid`. History as in `plms`, and the sum of
    a step's outputs in h5.

    Raises:
        SdjaxError: on fewer than four steps.
    """
    times = [node.t for node in grid.nodes[:-1]]
    if len(times) < 4:
        raise SdjaxError(
            f"pndm_prk needs 4 steps or more to start with Runge–Kutta, not "
            f"{len(times)}; plms takes any number"
        )
    for i in range(3):
        yield from _runge_kutta_step(grid, i, times[i], times[i + 1])
    for i, t in enumerate(times[3:], start=3):
        now, after = grid.at_time(t), grid.at_time(t - grid.stride)
        raw = _output(grid, now)
        x = _transfer(grid, now, after, _adams_bashforth(raw, order=4), X)
        yield Row(i, now, after, x, raw, H1, H2)


def _runge_kutta_step(grid: Grid, step: int, t: float, t_after: float) -> Rows:
    """Four evaluations from `t`: there, twice halfway, and at `t_after`."""
    half = grid.stride // 2
    now, middle = grid.at_time(t), grid.at_time(t_after + half)
    first, after = grid.at_time(t - half), grid.at_time(t_after)
    raw, raw_middle, raw_after = (_output(grid, n) for n in (now, middle, after))
    x = _transfer(grid, now, first, raw, X)
    yield Row(step, now, first, x, raw, H1, H2, X, raw / 6)
    x = _transfer(grid, now, middle, raw_middle, H4)
    yield Row(step, middle, middle, x, h5=H5 + raw_middle / 3)
    x = _transfer(grid, now, after, raw_middle, H4)
    yield Row(step, middle, after, x, h5=H5 + raw_middle / 3)
    x = _transfer(grid, now, after, H5 + raw_after / 6, H4)
    yield Row(step, after, after, x)


def lcm(grid: Grid) -> Rows:
    """Multistep consistency sampling; Luo et al. 2023, arXiv:2310.04378.

    Song et al. 2023, algorithm 1, arXiv:2303.01469, with the boundary condition of
    diffusers: σ_data = ½ and times scaled by 10. Takes a `distilled_grid`.
    """
    for i, now, after in grid.steps:
        time = 10 * now.t
        clean = (0.25 * X + time * np.sqrt(time**2 + 0.25) * D) / (time**2 + 0.25)
        yield Row(i, now, after, after.alpha * clean + after.sigma * Z)


def tcd(grid: Grid, eta: float = 0.3) -> Rows:
    """Trajectory consistency sampling; Zheng et al. 2024, arXiv:2402.19159.

    Args:
        grid: a `distilled_grid`.
        eta: γ of the paper, the stochasticity, in [0, 1].
    """
    for i, now, after in grid.steps:
        target = grid.at_time(after.t) if i < len(grid.nodes) - 2 else grid.at_time(0)
        middle = grid.at_time(np.floor((1 - eta) * target.t))
        ratio = target.alpha / middle.alpha
        x = ratio * (middle.alpha * D + middle.sigma * _epsilon(now))
        yield Row(i, now, target, x + max(1 - ratio**2, 0.0) ** 0.5 * Z)


def _epsilon(node: Node) -> Vector:
    """The noise ε in x = αx0 + σε, given x and D."""
    return (X - node.alpha * D) / node.sigma


def _posterior_sigma(now: Node, after: Node) -> float:
    """Standard deviation of x' given x and x0; Ho et al. 2020, eq. 7."""
    ratio = (now.alpha / after.alpha) ** 2
    return after.sigma / now.sigma * (1 - ratio) ** 0.5


def _output(grid: Grid, node: Node) -> Vector:
    """What the network gave, ε or v or x0, recovered from D and x."""
    _, c_skip, c_out = preconditioning(grid.prediction_type, node)
    return (D - c_skip * X) / c_out


def _transfer(grid: Grid, now: Node, after: Node, raw: Vector, x: Vector) -> Vector:
    """Takes `x` from one level to another along a (blended) raw output.

    Liu et al. 2022, eq. 11, which is the DDIM step.
    """
    _, c_skip, c_out = preconditioning(grid.prediction_type, now)
    x0 = c_skip * x + c_out * raw
    return after.alpha * x0 + after.sigma * (x - now.alpha * x0) / now.sigma


def _adams_bashforth(raw: Vector, order: int) -> Vector:
    """Extrapolates the outputs `raw`, h1, h2, h3 by half a step."""
    weights = {
        1: (1.0,),
        2: (3 / 2, -1 / 2),
        3: (23 / 12, -16 / 12, 5 / 12),
        4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    }[order]
    outputs = (raw, H1, H2, H3)
    return sum((w * o for w, o in zip(weights, outputs, strict=False)), 0 * raw)
