"""The noise levels and preconditioning of EDM; Karras et al. 2022, arXiv:2206.00364."""

import functools

import numpy as np

from sdjax.diffusion.grid import CLEAN, Grid, Node, node_at_level
from sdjax.diffusion.schedule import karras_levels
from sdjax.diffusion.table import Precondition


def edm_grid(num_steps: int, *, first: float = 80.0, last: float = 0.002) -> Grid:
    """Levels σ from `first` to `last`, then 0; the network is told ¼ ln σ."""
    levels = karras_levels(first, last, num_steps)
    return Grid(
        nodes=(*(node_at_level(s, np.log(s) / 4) for s in levels), CLEAN),
        num_steps=num_steps,
        alpha_bar=np.empty(0),
        prediction_type="sample",
    )


def edm_precondition(sigma_data: float = 0.5) -> Precondition:
    """c_in, c_skip and c_out of table 1, for x divided by √(σ² + 1)."""
    return functools.partial(_coefficients, sigma_data)


def _coefficients(sigma_data: float, node: Node) -> tuple[float, float, float]:
    variance = node.level**2 + sigma_data**2
    c_in = 1 / variance**0.5
    c_skip = sigma_data**2 / variance
    c_out = node.level * sigma_data / variance**0.5
    return c_in / node.alpha, c_skip / node.alpha, c_out
