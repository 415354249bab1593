"""The list of buckets is the one that the community's trainers use."""

import pytest
from hypothesis import given, strategies

from sdjax.data.buckets import bucket_sizes, nearest_size
from sdjax.errors import SdjaxError

# For 512 and 64: worked out by hand, ⌊512²/w/64⌋·64 for w = 256, 320, ..., 1024, and
# the transposes.
HALF = [(256, 1024), (256, 960), (256, 896), (256, 832), (320, 768), (320, 704)]
MIDDLE = [(384, 640), (448, 576)]


def test_the_list_for_512():
    upright = {*HALF, *MIDDLE}
    expected = upright | {(h, w) for w, h in upright} | {(512, 512)}
    assert set(bucket_sizes(512, 64)) == expected


@given(strategies.sampled_from([(256, 32), (512, 64), (768, 64), (1024, 64), (64, 8)]))
def test_sizes_keep_the_area_and_come_in_pairs(case):
    resolution, step = case
    sizes = bucket_sizes(resolution, step)
    assert len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert resolution**2 * 0.75 < width * height <= resolution**2
        assert (height, width) in sizes


@given(strategies.integers(1, 5000), strategies.integers(1, 5000))
def test_the_nearest_ratio_is_chosen(width, height):
    sizes = bucket_sizes(512, 64)
    chosen = nearest_size(sizes, (width, height))
    best = min(abs(w / h - width / height) for w, h in sizes)
    assert abs(chosen[0] / chosen[1] - width / height) == best
    assert nearest_size(sizes, sizes[3]) == sizes[3]


@pytest.mark.parametrize("resolution,step", [(500, 64), (64, 64), (512, 0)])
def test_steps_that_do_not_fit_are_refused(resolution, step):
    with pytest.raises(SdjaxError, match=f"resolution {resolution} and bucket_step"):
        bucket_sizes(resolution, step)
