"""Batches without end, in an order that a restart takes up where it was."""

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from sdjax.data.background import Background
from sdjax.data.order import Order
from sdjax.data.prepare import Preparation, check_preparation
from sdjax.data.sample import Source
from sdjax.data.stream import Bad, Load, Position, Ready, batches
from sdjax.errors import SdjaxError

Tokenize = Callable[[list[str]], Mapping[str, np.ndarray]]

_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Arrays of `batch_size` rows on the host, and what the samples are called."""

    arrays: dict[str, Any]
    keys: list[str]


class Reader:
    """An endless iterator of `Batch`; made by `open_reader`.

    Attributes:
        skipped: shard -> keys of the samples that this process could not read.
    """

    def __init__(
        self,
        load: Load,
        *,
        num_workers: int,
        max_bad_share: float,
        prefetch: int,
        tokenize: Tokenize | None,
    ):
        self.skipped: dict[str, list[str]] = {}
        self._load = load
        self._num_workers = num_workers
        self._max_bad_share = max_bad_share
        self._prefetch = prefetch
        self._tokenize = tokenize
        self._position = Position()
        self._worker: Background[Ready] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            SdjaxError: if too many samples cannot be read.
        """
        if self._worker is None:
            # Without this reader in it, so that the thread does not keep it alive.
            iterate = functools.partial(
                batches,
                self._load,
                self._position,
                num_workers=self._num_workers,
                max_bad_share=self._max_bad_share,
            )
            self._worker = Background(iterate, self._prefetch)
            weakref.finalize(self, self._worker.close)
        rows, skipped, self._position = self._worker.get()
        for bad in skipped:
            self._note(bad)
        names = rows[0].arrays
        arrays: dict[str, Any] = {
            name: np.stack([row.arrays[name] for row in rows]) for name in names
        }
        # Here and not in the thread: tokenizers cannot be used by two at a time, and
        # the caller has other uses for his.
        if self._tokenize is not None and "context" not in arrays:
            arrays["tokens"] = dict(self._tokenize([row.caption for row in rows]))
        return Batch(arrays, [row.key for row in rows])

    def _note(self, bad: Bad) -> None:
        known = self.skipped.setdefault(bad.shard, [])
        if bad.key not in known:
            known.append(bad.key)
            _log.warning("skipped %s of %s: %s", bad.key, bad.shard, bad.reason)

    def get_state(self) -> dict[str, Any]:
        """Where the reader stands, after the last batch handed out; fit for JSON."""
        return {
            "position": self._position.reads,
            "waiting": list(self._position.waiting),
            "bad": dict(self._position.bad),
            **self._identity(),
        }

    def _identity(self) -> dict[str, int]:
        """What a position means depends on these."""
        order = self._load.order
        return {
            "samples": order.length,
            "seed": order.seed,
            "rows": order.rows,
            "host_index": order.host_index,
            "host_count": order.host_count,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where another reader of the same data stood.

        Raises:
            SdjaxError: if the state belongs to other data, or to another batch size,
                seed or number of hosts.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise SdjaxError(
                    f"the saved position in the data is of {name} "
                    f"{state.get(name)!r:.40}, but {self._load.source.path} is read "
                    f"with {name} {value}"
                )
        self.close()
        self._position = Position(
            int(state["position"]), list(state["waiting"]), dict(state["bad"])
        )

    def close(self) -> None:
        """Stops the thread and the worker processes; the next batch starts them."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_reader(
    source: Source,
    *,
    batch_size: int,
    resolution: int,
    seed: int,
    tokenize: Tokenize | None = None,
    bucket_step: int | None = None,
    crop: Literal["center", "random"] = "center",
    shift: int = 0,
    flip: float = 0.0,
    caption_dropout: float = 0.1,
    caption_templates: tuple[str, ...] = ("{}",),
    num_workers: int = 0,
    max_bad_share: float = 0.01,
    sizes: bool = False,
    host_index: int = 0,
    host_count: int = 1,
    prefetch: int = 4,
) -> Reader:
    """Opens a source as batches without end.

    Every sample comes once an epoch, over all hosts together; an epoch that does not
    fill a batch goes on in the next epoch's, and with buckets a sample may wait for
    others of its shape. A sample that cannot be read is skipped, logged by name and
    counted.

    Args:
        source: of pictures, or a cache of what networks made of them.
        batch_size: rows of a batch, over all hosts; each gets `1 / host_count` of it.
        resolution: side in pixels; with buckets, the area is its square.
        seed: of the order and of all that is drawn for a sample.
        tokenize: captions -> text tower -> ids [B, L]; None: no "tokens" in batches.
        bucket_step: sides are multiples of it, and a batch has one shape; None:
            squares.
        crop: which part remains of a picture that is not of the wanted shape.
        shift: pixels by which a picture is moved at random, white moving in.
        flip: probability of mirroring left and right.
        caption_dropout: probability that a caption is replaced by the empty one.
        caption_templates: one is drawn for each caption, which takes the place of {}.
        num_workers: processes that read and decode; 0: threads of this one.
        max_bad_share: share of samples that may be unreadable, judged from the
            hundredth on.
        sizes: whether batches have SDXL's "size": height and width as stored, top and
            left of the crop, height and width now.
        host_index: number of this host, from 0.
        host_count: hosts that share the data.
        prefetch: batches that are made ready ahead of the user.

    Raises:
        SdjaxError: if an argument is out of its range.
    """
    if host_count < 1 or not 0 <= host_index < host_count:
        raise SdjaxError(f"host {host_index} of {host_count}: count from 0")
    if batch_size < 1 or batch_size % host_count:
        raise SdjaxError(f"batch_size {batch_size} is not divisible by {host_count}")
    prepare = Preparation(
        resolution=resolution,
        seed=seed,
        bucket_step=bucket_step,
        crop=crop,
        shift=shift,
        flip=flip,
        caption_dropout=caption_dropout,
        caption_templates=tuple(caption_templates),
        sizes=sizes,
    )
    check_preparation(prepare, source)
    if bucket_step is not None and host_count > 1:
        raise SdjaxError(
            "bucket_step works on one host only: several would read batches of "
            "different shapes at one step"
        )
    if num_workers < 0 or not 0 <= max_bad_share <= 1:
        raise SdjaxError(
            f"num_workers {num_workers} must be 0 or more, max_bad_share "
            f"{max_bad_share} from 0 to 1"
        )
    rows = batch_size // host_count
    order = Order(len(source), seed, rows, host_index, host_count)
    return Reader(
        Load(source, order, prepare),
        num_workers=num_workers,
        max_bad_share=max_bad_share,
        prefetch=prefetch,
        tokenize=tokenize,
    )
