"""Exponential multistep integrators in λ = log α/σ: DPM-Solver, UniPC and DEIS.

A step of h = λ' − λ is x' = (σ'/σ)x + α'(1 − e^{−h})D, and more terms where earlier
predictions tell how D changes; Lu et al. 2022, arXiv:2211.01095. All take a
`lambda_grid`, or any grid whose levels do not repeat. They follow diffusers, except
DPM-Solver with `k_diffusion` set.
"""

import numpy as np
from numpy.polynomial import Polynomial

from sdjax.diffusion.grid import Grid, Node
from sdjax.diffusion.table import H1, H2, H3, H4, D, Row, Rows, Vector, X, Z

SHORT = 15
"""Below this many steps, diffusers ends with lower orders, for stability."""


def dpm_solver(
    grid: Grid,
    eta: float = 0.0,
    *,
    order: int = 2,
    heun: bool = False,
    epsilon: bool = False,
    k_diffusion: bool = False,
) -> Rows:
    """DPM-Solver multistep. History: the last two predictions, newest first.

    DPM-Solver++, Lu et al. 2022, arXiv:2211.01095, algorithm 2; with η for the SDE.

    Args:
        grid: the levels.
        eta: share of the noise of the SDE, in [0, 1].
        order: 1, 2 or 3. The last converges with order two only: diffusers and
            k-diffusion give the second difference half its weight, and so does this.
        heun: whether steps of order two are of Heun's kind, not the midpoint's.
        epsilon: integrates ε, not x0 (DPM-Solver, arXiv:2206.00927, where η must be 0
            and the grid must end above σ = 0).
        k_diffusion: keeps the order until the last step.
    """
    for i, now, after in grid.steps:
        used = _order(grid, i, order, lower=not k_diffusion)
        q = after.level / now.level  # e^{-h}
        h = -np.log(q) if q > 0 else np.inf
        if epsilon:
            model, scale, unit, z = _epsilon(now), after.alpha / now.alpha, 1 / q - 1, h
            amount, noise = after.sigma, 0.0
        else:
            model, scale = D, after.sigma / now.sigma * q**eta
            amount, noise = after.alpha, after.sigma * (1 - q ** (2 * eta)) ** 0.5
            unit, z = q ** (1 + eta) - 1, -(1 + eta) * h
        change = unit * model
        if used == 2 and not heun:
            change = change + unit / 2 * _divided(grid, i, model, used)[0]
        elif used > 1:
            first, second = _divided(grid, i, model, used)
            change = change + (unit / z - 1) * first
            change = change + ((unit - z) / z**2 - 0.5) * second
        yield Row(i, now, after, scale * X - amount * change + noise * Z, model, H1)


def _divided(grid: Grid, i: int, model: Vector, order: int) -> tuple[Vector, Vector]:
    """First derivative and second difference of the predictions, with this h as 1."""
    logs = [-np.log(node.level) for node in grid.nodes[max(i - 2, 0) : i + 2]]
    *past, h = np.diff(logs)
    newest = (model - H1) / (past[-1] / h)
    if order == 2:
        return newest, 0 * D
    before = (H1 - H2) / (past[-2] / h)
    second = (newest - before) / ((past[-1] + past[-2]) / h)
    return newest + past[-1] / h * second, second


def unipc(grid: Grid, *, order: int = 2) -> Rows:
    """UniPC with B(h) = e^{−h} − 1; Zhao et al. 2023, arXiv:2302.04867, appendix.

    Each evaluation first corrects the x it was made at, then predicts the next. h1 is
    the corrected x, h2 … h4 the last predictions.
    """
    used = 1
    corrected = X
    for i, now, after in grid.steps:
        if i > 0:
            corrected = _unified(grid, i - 1, H1, (H2, H3, H4)[:used], new=D)
        used = min(order, len(grid.nodes) - 1 - i, i + 1)
        x = _unified(grid, i, corrected, (D, H2, H3)[:used])
        yield Row(i, now, after, x, corrected, D, H2, H3)


def _unified(
    grid: Grid, i: int, x: Vector, models: tuple[Vector, ...], new: Vector | None = None
) -> Vector:
    """The step i of UniPC from `x`: the corrector where `new` is given, at its end."""
    now, after = grid.nodes[i], grid.nodes[i + 1]
    unit = after.level / now.level - 1  # e^{-h} - 1
    x = after.sigma / now.sigma * x - after.alpha * unit * models[0]
    size = len(models) - (new is None)
    if size == 0:
        return x
    logs = [-np.log(node.level) for node in grid.nodes[: i + 2]]
    h = logs[i + 1] - logs[i]
    ratios = np.array([(logs[i - k] - logs[i]) / h for k in range(1, len(models))])
    changes = [
        (model - models[0]) / ratio
        for model, ratio in zip(models[1:], ratios, strict=True)
    ]
    if new is not None:
        ratios = np.append(ratios, 1.0)
        changes.append(new - models[0])
    weights = [0.5] if size == 1 else _unified_weights(ratios, h)
    blend = sum((w * c for w, c in zip(weights, changes, strict=True)), 0 * x)
    return x - after.alpha * unit * blend


def _unified_weights(ratios: np.ndarray, h: float) -> np.ndarray:
    """Solves for the weights that make the step exact on polynomials; theorem 3.1."""
    moments = []
    phi, factorial = np.expm1(-h) / -h - 1, 1
    for k in range(1, len(ratios) + 1):
        moments.append(phi * factorial / np.expm1(-h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return np.linalg.solve(np.vander(ratios, increasing=True).T, moments)


def deis(grid: Grid, *, order: int = 2) -> Rows:
    """DEIS in log ρ, ρ = σ/α; Zhang & Chen 2023, eq. 15, arXiv:2204.13902.

    ε is interpolated over log ρ and integrated over ρ. The grid must end above σ = 0.
    History: the last two ε, newest first.
    """
    for i, now, after in grid.steps:
        used = _order(grid, i, order)
        past = [node.level for node in grid.nodes[i::-1][:used]]
        weights = _log_lagrange_integrals(np.array(past), after.level)
        epsilons = (_epsilon(now), H1, H2)
        change = sum((w * e for w, e in zip(weights, epsilons, strict=False)), 0 * X)
        x = after.alpha * (X / now.alpha + change)
        yield Row(i, now, after, x, epsilons[0], H1)


def _log_lagrange_integrals(past: np.ndarray, end: float) -> list[float]:
    """∫ dρ, from the first of `past` to `end`, of Lagrange polynomials in log ρ."""
    points = np.log(past / past[0])
    last = np.log(end / past[0])
    integrals = []
    for j, point in enumerate(points):
        others = np.delete(points, j)
        basis = Polynomial.fromroots(others) if len(others) else Polynomial([1.0])
        basis = basis / np.prod(point - others)
        # ∫ eᵘ p(u) du = eᵘ (p − p' + p'') for p of degree two.
        inner = basis - basis.deriv() + basis.deriv(2)
        integrals.append(past[0] * (np.exp(last) * inner(last) - inner(0.0)))
    return integrals


def _epsilon(node: Node) -> Vector:
    """The noise ε in x = αx0 + σε, given x and D."""
    return (X - node.alpha * D) / node.sigma


def _order(grid: Grid, i: int, order: int, lower: bool = True) -> int:
    """The order of step i: limited by the steps made, and towards the end."""
    left = len(grid.nodes) - 1 - i
    if left == 1 and grid.nodes[-1].level in (0, grid.nodes[-2].level):
        return 1
    if lower and grid.num_steps < SHORT:
        order = min(order, left)
    return min(order, i + 1)
