"""Exponential multistep integrators in λ = log α/σ: DPM-Solver, UniPC and DEIS.

x' = (σ'/σ)x + α'(1 − e^{−h})D + …, h = λ' − λ, with the higher orders from the
predictions before; Lu et al. 2022, arXiv:2211.01095. All take a `lambda_grid`, or any
grid without repeated levels. History: the last predictions, newest first.
"""

from typing import Literal

import numpy as np

from sdjax.diffusion.grid import Grid, Node
from sdjax.diffusion.tableau import H1, H2, H3, H4, D, Row, Rows, Vector, X, Z

SHORT = 15
"""Below this many steps the last ones are of lower order, for stability."""


def dpm_solver(
    grid: Grid,
    *,
    kind: Literal["data", "noise", "sde"] = "data",
    order: int = 2,
    heun: bool = False,
) -> Rows:
    """DPM-Solver multistep, as in diffusers.

    Args:
        grid: the levels; "noise" needs one that ends above σ = 0.
        kind: "data" is DPM-Solver++ (integrates x0), "noise" is DPM-Solver (integrates
            ε), "sde" is DPM-Solver++ for the SDE.
        order: 1 to 3.
        heun: whether order two is of Heun's kind, not the midpoint's.
    """
    logs = _logs(grid)
    for i, now, after in _steps(grid):
        used = _order(grid, i, order, zero_end=True)
        past = np.diff(logs[max(i - 2, 0) : i + 1])[::-1][: used - 1]
        model = (X - now.alpha * D) / now.sigma if kind == "noise" else D
        differences = _differences(model, past)
        base, unit, h = _exponential(kind, now, after)
        x = base + unit * (model - X * 0)
        x = x + _higher_orders(kind, unit, h, past, differences, heun)
        yield Row(i, now, after, x, model, H1)


def _exponential(kind: str, now: Node, after: Node) -> tuple[Vector, float, float]:
    """The first-order step: base + unit·model, and the (signed) step it integrates."""
    q = after.level / now.level  # e^{-h}; 0 at the end
    h = -np.log(q) if q > 0 else np.inf
    if kind == "noise":
        return after.alpha / now.alpha * X, -after.sigma * (1 / q - 1), h
    scale = after.sigma / now.sigma
    if kind == "data":
        return scale * X, after.alpha * (1 - q), -h
    noise = after.sigma * (1 - q**2) ** 0.5
    return scale * q * X + noise * Z, after.alpha * (1 - q**2), -2 * h
