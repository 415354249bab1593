"""Samplers in variance-exploding units: Euler, Heun, LMS, DPM2, DPM++ 2S a and SDE.

Here x = x0 + σε and d = (x − D)/σ is the slope of the probability-flow ODE dx/dσ;
Karras et al. 2022, eq. 4, arXiv:2206.00364. They follow the schedulers of
diffusers, except `dpmpp_2s_a`, which follows k-diffusion. All take a `sigma_grid`.
"""

import numpy as np

from sdjax.diffusion.grid import Grid, Node
from sdjax.diffusion.table import H1, H2, H3, D, Row, Rows, Vector, X, Z, exploding

LMS_ORDER = 4


@exploding
def euler(grid: Grid) -> Rows:
    """Euler's method; equals DDIM with η = 0."""
    for i, now, after in grid.steps:
        yield Row(i, now, after, X + _slope(now) * (after.level - now.level))


@exploding
def euler_a(grid: Grid, eta: float = 1.0) -> Rows:
    """Euler's method to a lower level, then noise up to the next one."""
    for i, now, after in grid.steps:
        down, up = _ancestral(now.level, after.level, eta)
        yield Row(i, now, after, X + _slope(now) * (down - now.level) + up * Z)


@exploding
def heun(grid: Grid) -> Rows:
    """Heun's method; Karras et al. 2022, algorithm 1. The last step is Euler's."""
    for i, now, after in grid.steps:
        change = after.level - now.level
        slope = _slope(now)
        yield Row(i, now, after, X + slope * change, h1=X, h2=slope)
        if after.level > 0:
            yield Row(i, after, after, H1 + (H2 + _slope(after)) / 2 * change)


@exploding
def lms(grid: Grid) -> Rows:
    """Linear multistep of order four, exact for slopes cubic in σ."""
    levels = [node.level for node in grid.nodes]
    for i, now, after in grid.steps:
        slopes = (_slope(now), H1, H2, H3)[: min(i + 1, LMS_ORDER)]
        past = levels[i::-1][: len(slopes)]
        weights = _lagrange_integrals(past, after.level)
        x = X + sum((w * d for w, d in zip(weights, slopes, strict=True)), 0 * X)
        yield Row(i, now, after, x, _slope(now), H1, H2)


@exploding
def dpm2(grid: Grid) -> Rows:
    """Midpoint method in log σ; DPM-Solver-2 of Lu et al. 2022, arXiv:2206.00927."""
    for i, now, after in grid.steps:
        yield from _midpoint_step(grid, i, now, after, after.level, 0.0)


@exploding
def dpm2_a(grid: Grid, eta: float = 1.0) -> Rows:
    """The same to a lower level, then noise up to the next one."""
    for i, now, after in grid.steps:
        yield from _midpoint_step(
            grid, i, now, after, *_ancestral(now.level, after.level, eta)
        )


def _midpoint_step(
    grid: Grid, step: int, now: Node, after: Node, down: float, up: float
) -> Rows:
    """Goes down by the slope found halfway, and up by noise."""
    if down == 0:
        yield Row(step, now, after, X - _slope(now) * now.level + up * Z)
        return
    middle = grid.at_level((now.level * down) ** 0.5)
    yield Row(step, now, middle, X + _slope(now) * (middle.level - now.level), h1=X)
    x = H1 + _slope(middle) * (down - now.level) + up * Z
    yield Row(step, middle, after, x)


@exploding
def dpmpp_2s_a(grid: Grid, eta: float = 1.0) -> Rows:
    """DPM-Solver++(2S) to a lower level, then noise; Lu et al. 2022, arXiv:2211.01095.

    Algorithm 1 with the middle of the step in log σ, as in k-diffusion.
    """
    for i, now, after in grid.steps:
        down, up = _ancestral(now.level, after.level, eta)
        if down == 0:
            yield Row(i, now, after, D + up * Z)
            continue
        middle = grid.at_level((now.level * down) ** 0.5)
        yield Row(i, now, middle, _exponential(X, now.level, middle.level), h1=X)
        yield Row(i, middle, after, _exponential(H1, now.level, down) + up * Z)


@exploding
def dpmpp_sde(grid: Grid) -> Rows:
    """DPM-Solver++ for the SDE, in single steps of two evaluations, r = ½.

    The two noises of a step are increments of one Brownian motion in σ: from σ to the
    middle, and from σ to the end, which contains the first. h2 keeps the first.
    """
    for i, now, after in grid.steps:
        if after.level == 0:
            yield Row(i, now, after, D)
            continue
        middle = grid.at_level((now.level * after.level) ** 0.5)
        down, up = _ancestral(now.level, middle.level, 1.0)
        x = _exponential(X, now.level, down) + up * Z
        yield Row(i, now, middle, x, h1=X, h2=Z)
        first, second = now.level - middle.level, middle.level - after.level
        noise = (first**0.5 * H2 + second**0.5 * Z) / (first + second) ** 0.5
        down, up = _ancestral(now.level, after.level, 1.0)
        yield Row(i, middle, after, _exponential(H1, now.level, down) + up * noise)


def _slope(node: Node) -> Vector:
    """dx/dσ at the node, given x and D."""
    return (X - D) / node.level


def _exponential(x: Vector, now: float, after: float) -> Vector:
    """Solves the ODE from level to level as if D were constant."""
    return after / now * x + (1 - after / now) * D


def _ancestral(now: float, after: float, eta: float) -> tuple[float, float]:
    """Splits a step into a lower level and the noise that leads back up to `after`.

    Song et al. 2021, eq. 16, in these units: with η = 1 the noise is that of DDPM.
    """
    up = min(after, eta * after * max(1 - (after / now) ** 2, 0.0) ** 0.5)
    return (after**2 - up**2) ** 0.5, up


def _lagrange_integrals(past: list[float], end: float) -> np.ndarray:
    """∫ of each Lagrange polynomial through `past`, from its first point to `end`."""
    points, weights = np.polynomial.legendre.leggauss(LMS_ORDER)
    half = (end - past[0]) / 2
    sigma = past[0] + half * (points + 1)
    polynomials = [
        np.prod([(sigma - b) / (a - b) for b in past if b != a], axis=0) for a in past
    ]
    return np.array([half * np.sum(weights * p) for p in polynomials])
