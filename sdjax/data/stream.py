"""The stream of samples: read in parallel, put into batches one after another.

Grain reads and decodes in threads or worker processes. What may depend on the order of
samples (skipping, buckets, batches) happens here, in one thread, so that the number of
workers changes nothing.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import grain
from absl import flags

from sdjax.data.order import Order
from sdjax.data.prepare import Preparation, Row
from sdjax.data.sample import Source
from sdjax.errors import SdjaxError

LEAST_SEEN = 100
"""Samples before the share of bad ones is judged."""


class Bad(NamedTuple):
    """A sample that could not be read."""

    shard: str
    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Load:
    """Reads and prepares the sample at a position; this runs in the workers."""

    source: Source
    order: Order
    prepare: Preparation

    def __call__(self, position: int) -> Row | Bad:
        """The sample of the host's read number `position`."""
        epoch, index = self.order[position]
        try:
            sample = self.source[index]
            return self.prepare(sample, self.source.empty, epoch=epoch, index=index)
        except SdjaxError as error:
            return Bad(*self.source.locate(index), str(error))


@dataclasses.dataclass
class Position:
    """Where the stream stands after some batch.

    Attributes:
        reads: samples that this host has read.
        waiting: the reads that wait for others of their shape.
        bad: shard -> how many samples of it could not be read.
    """

    reads: int = 0
    waiting: list[int] = dataclasses.field(default_factory=list)
    bad: dict[str, int] = dataclasses.field(default_factory=dict)

    def copy(self) -> "Position":
        """One that does not change with this one."""
        return Position(self.reads, list(self.waiting), dict(self.bad))


class Ready(NamedTuple):
    """A batch, what was skipped on the way to it, and the position then."""

    rows: list[Row]
    skipped: list[Bad]
    position: Position


def batches(
    load: Load, start: Position, *, num_workers: int, max_bad_share: float
) -> Iterator[Ready]:
    """Batches without end, from where `start` stands.

    Raises:
        SdjaxError: if more than `max_bad_share` of the samples cannot be read.
    """
    position = start.copy()
    groups: dict[str, list[tuple[int, Row]]] = {}
    for place in position.waiting:
        row = load(place)
        if isinstance(row, Row):
            groups.setdefault(row.group, []).append((place, row))
    skipped: list[Bad] = []
    for row in _elements(load, position.reads, num_workers):
        place = position.reads
        position.reads += 1
        if isinstance(row, Bad):
            skipped.append(row)
            position.bad[row.shard] = position.bad.get(row.shard, 0) + 1
            _judge(position, load, max_bad_share)
            continue
        group = groups.setdefault(row.group, [])
        group.append((place, row))
        if len(group) == load.order.rows:
            del groups[row.group]
            position.waiting = [p for held in groups.values() for p, _ in held]
            yield Ready([row for _, row in group], skipped, position.copy())
            skipped = []


def _judge(position: Position, load: Load, max_bad_share: float) -> None:
    bad = sum(position.bad.values())
    all_bad = bad == position.reads and bad >= load.order.length
    if bad > max_bad_share * max(position.reads, LEAST_SEEN) or all_bad:
        worst = sorted(position.bad.items(), key=lambda item: (-item[1], item[0]))
        shards = ", ".join(f"{shard} ({count})" for shard, count in worst[:5])
        more = f" and {len(worst) - 5} more shards" if len(worst) > 5 else ""
        raise SdjaxError(
            f"{bad} of the first {position.reads} samples of {load.source.path} cannot "
            f"be read, more than max_bad_share {max_bad_share:g} allows; they are in "
            f"{shards}{more}"
        )


def _elements(load: Load, start: int, num_workers: int) -> Iterator[Row | Bad]:
    positions = grain.MapDataset.range(start, sys.maxsize)
    threads = max(1, min(16, os.cpu_count() or 1))
    if num_workers:
        threads = 2
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = positions.map(load).to_iter_dataset(options)
    if num_workers:
        # Grain reads absl's flags, which only absl's own programs parse.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=4
            )
        )
    elements = iter(dataset)
    try:
        yield from elements
    finally:
        elements.close()
