"""Pictures a second that one core reads, decodes and brings to a size.

    python scripts/measure_data.py PATH [--resolution 256 512] [--samples 1000]

PATH is anything that `sdjax.data.open_source` reads. Each stage is measured alone, in
one thread, by the processor's time and not by the clock, so that other work on the
machine does not count.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from sdjax import data
from sdjax.data.pictures import decode
from sdjax.data.prepare import Preparation


def rate(work: Callable[[int], object], indices: np.ndarray) -> float:
    """Calls a second of this thread's processor time."""
    start = time.thread_time()
    for index in indices:
        work(int(index))
    return len(indices) / (time.thread_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--resolution", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    start = time.perf_counter()
    source = data.open_source(args.path)
    seconds = time.perf_counter() - start
    print(f"{len(source)} samples, opened in {seconds:.2f} s")
    draws = np.random.default_rng(0).permutation(len(source))
    indices = np.resize(draws, args.samples)
    kept = [source[int(index)] for index in indices[:100]]
    megabytes = sum(len(sample.image) for sample in kept) / len(kept) / 1e6
    pixels = np.mean([np.prod(decode(s.image, s.key).size) for s in kept]) / 1e6
    print(f"a picture has {megabytes:.3f} MB, {pixels:.3f} million pixels")
    print(f"read                  {rate(source.__getitem__, indices):8.0f} pictures/s")
    decoded = rate(lambda i: decode(source[i].image, "a"), indices)
    print(f"read, decode          {decoded:8.0f} pictures/s")
    for resolution in args.resolution:
        prepare = Preparation(
            resolution=resolution, seed=0, crop="random", flip=0.5, shift=4
        )

        def work(index: int, prepare: Preparation = prepare) -> object:
            return prepare(source[index], {}, epoch=0, index=index)

        print(f"read, decode, to {resolution:4d} {rate(work, indices):8.0f} pictures/s")


if __name__ == "__main__":
    main()
