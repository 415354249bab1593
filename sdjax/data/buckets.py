"""Aspect-ratio buckets: the sizes that pictures are brought to, of about one area.

The list is that of the community's trainers: for each width, a multiple of the step,
the largest height that keeps the area, and its transpose.
"""

from sdjax.errors import SdjaxError

Size = tuple[int, int]
"""(width, height) in pixels."""


def bucket_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """All sizes with sides from half to twice `resolution`, multiples of `step`.

    Raises:
        SdjaxError: if `resolution` is no multiple of `step`, or less than twice it.
    """
    if step < 1 or resolution % step or resolution < 2 * step:
        raise SdjaxError(
            f"resolution {resolution} and bucket_step {step} do not fit: resolution "
            "must be a multiple of bucket_step, at least twice it"
        )
    shortest = -(-resolution // (2 * step)) * step
    longest = 2 * resolution
    sizes = {(resolution, resolution)}
    for width in range(shortest, longest + 1, step):
        height = min(longest, resolution**2 // width // step * step)
        if height >= shortest:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def nearest_size(sizes: tuple[Size, ...], size: Size) -> Size:
    """The size itself, if it is one of `sizes`, else that of the nearest ratio w/h."""
    if size in sizes:
        return size
    ratio = size[0] / size[1]
    return min(sizes, key=lambda one: (abs(one[0] / one[1] - ratio), one))
