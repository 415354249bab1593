"""Which sample comes when: a fresh shuffle for each epoch, split over the hosts.

The stream of all epochs is cut into batches, and a batch into one run of rows for each
host; so a sample is read once an epoch whatever the number of hosts, batches go on
over the end of an epoch, and the global batch is the same for any number of hosts.
"""

import dataclasses
import functools
from typing import Any

import grain
import numpy as np


@dataclasses.dataclass(frozen=True)
class Order:
    """The samples that one host reads.

    Attributes:
        length: samples of the source.
        rows: of a batch, on one host.
    """

    length: int
    seed: int
    rows: int
    host_index: int = 0
    host_count: int = 1

    @functools.cached_property
    def _shuffled(self) -> Any:
        # Grain's seed of epoch e is seed + e: neighbouring seeds would share epochs.
        mixed = int(np.random.SeedSequence([0, self.seed]).generate_state(1)[0])
        return grain.MapDataset.range(self.length).shuffle(seed=mixed)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Epoch and sample of this host's read number `position`."""
        batch, row = divmod(position, self.rows)
        place = (batch * self.host_count + self.host_index) * self.rows + row
        return place // self.length, self._shuffled[place]
