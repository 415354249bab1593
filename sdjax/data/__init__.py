"""Pictures and captions from disk, as batches for training."""

from sdjax.data.cache import write_cache
from sdjax.data.reader import Batch, Reader, open_reader
from sdjax.data.sample import BadSampleError, Sample, Source
from sdjax.data.shards import Written, write_shards
from sdjax.data.source import open_source
from sdjax.data.whole_folder import check_new_folder

__all__ = [
    "BadSampleError",
    "Batch",
    "Reader",
    "Sample",
    "Source",
    "Written",
    "check_new_folder",
    "open_reader",
    "open_source",
    "write_cache",
    "write_shards",
]
