"""Whether a drawn picture is nearer to the one it should show than to all others."""

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

SIDE = 32
"""Pictures are compared at this size."""

Pictures = UInt8[np.ndarray, "n h w 3"]


def ranks(
    drawn: Pictures, candidates: Pictures, truth: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """How many candidates are strictly nearer to each drawn picture than its own.

    0 is the best: the true picture is the nearest (top-1); below 5 is top-5. The
    distance is L2 over RGB at 32×32. Candidates that equal the true one do not count
    against it.

    Args:
        drawn: pictures to judge.
        candidates: pictures to choose from, of any one size.
        truth: the candidate that each drawn picture should show.
    """
    points = _points(candidates)
    squares = np.square(points).sum(axis=1)
    result = np.empty(len(drawn), np.int64)
    for i, point in enumerate(_points(drawn)):
        distances = squares - 2 * points @ point
        own = distances[truth[i]]
        # float64 sums differ in their last digits for equal pictures.
        result[i] = np.count_nonzero(distances < own - 1e-6 * abs(own) - 1e-6)
    return result


def _points(pictures: Pictures) -> Float[np.ndarray, "n d"]:
    small = [
        np.asarray(Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BOX))
        for p in pictures
    ]
    return np.stack(small).reshape(len(small), -1).astype(np.float64) / 255
