"""Distances between a picture and its reconstruction."""

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import correlate1d

Pictures = UInt8[np.ndarray, "n h w c"]

_RADIUS, _SIGMA = 5, 1.5
_K1, _K2 = 0.01, 0.03


def psnr(a: Pictures, b: Pictures) -> Float[np.ndarray, " n"]:
    """Peak signal to noise ratio of each pair in dB: 10 log10(255² / MSE)."""
    error = np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def ssim(a: Pictures, b: Pictures) -> Float[np.ndarray, " n"]:
    """Structural similarity of each pair, the mean over channels and windows.

    Wang et al. 2004, eq. 13: windows of 11×11, Gaussian with σ = 1.5, wholly inside
    the picture; K1 = 0.01, K2 = 0.03. Both sides must be at least 11 pixels.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _window(x), _window(y)
    var_x = _window(x * x) - mean_x**2
    var_y = _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(axis=(1, 2, 3))


def _window(x: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n h' w' c"]:
    """The weighted mean over each window that lies inside."""
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    x = correlate1d(correlate1d(x, weights, axis=1), weights, axis=2)
    return x[:, _RADIUS:-_RADIUS, _RADIUS:-_RADIUS]
