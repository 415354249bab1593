"""Any source into a dataset of tensorflow-datasets: ArrayRecord shards.

Features: "image" (a file of three 8-bit channels), "caption", "key", and "label", -1
where there is none. tensorflow-datasets writes and reads them without TensorFlow.
"""

import io
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from sdjax.data.pictures import decode, is_plain
from sdjax.data.sample import Source
from sdjax.data.whole_folder import new_folder
from sdjax.errors import SdjaxError

NAME = "pictures"
SHARD_SIZE = 10_000


class Written(NamedTuple):
    """What became of a source's samples.

    Attributes:
        samples: how many were written.
        skipped: shard, key and reason of those that were not.
    """

    samples: int
    skipped: list[tuple[str, str, str]]


def write_shards(
    source: Source,
    path: str | os.PathLike[str],
    *,
    shard_size: int = SHARD_SIZE,
    report: Callable[[int], object] = lambda _: None,
) -> Written:
    """Writes all samples of `source`, in its order, to a new folder.

    Pictures are decoded to see that they can be; JPEG and PNG files of three 8-bit
    channels are written as they are, the others as `decode` shows them, as PNG.

    Args:
        source: of pictures.
        path: of the folder; must not exist, or be empty.
        shard_size: samples of a shard.
        report: is told how many samples are done.

    Raises:
        SdjaxError: if something is there already, `source` is a cache, or none of its
            samples can be read.
    """
    if source.settings:
        raise SdjaxError(f"{source.path} is a cache, and holds no pictures")
    with new_folder(path) as folder:
        written = _write(source, str(folder), shard_size, report)
    return written


def _write(
    source: Source, folder: str, shard_size: int, report: Callable[[int], object]
) -> Written:
    writer = tfds.core.SequentialWriter(
        _describe(folder), shard_size, overwrite=False, file_format="array_record"
    )
    writer.initialize_splits(["train"])
    skipped: list[tuple[str, str, str]] = []
    threads = max(1, min(16, os.cpu_count() or 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    # The same order on every machine, since the threads' results come in turn.
    examples = grain.MapDataset.range(len(source)).map(lambda i: _example(source, i))
    for done, example in enumerate(examples.to_iter_dataset(options), start=1):
        if isinstance(example, tuple):
            skipped.append(example)
        else:
            writer.add_examples({"train": [example]})
        report(done)
    if len(skipped) == len(source):
        shard, _, reason = skipped[0]
        raise SdjaxError(f"nothing in {source.path} can be read: {shard}: {reason}")
    writer.close_all()
    return Written(len(source) - len(skipped), skipped)


def _describe(folder: str) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "caption": tfds.features.Text(),
            "key": tfds.features.Text(),
            "label": tfds.features.Scalar(np.int64),
        }
    )
    identity = tfds.core.DatasetIdentity(
        name=NAME,
        version=tfds.core.Version("1.0.0"),
        data_dir=folder,
        module_name="sdjax",
    )
    return tfds.core.DatasetInfo(
        builder=identity, features=features, disable_shuffling=True
    )


def _example(source: Source, index: int) -> dict[str, Any] | tuple[str, str, str]:
    try:
        sample = source[index]
        image = decode(sample.image, sample.key).image
    except SdjaxError as error:
        return (*source.locate(index), str(error))
    data = sample.image
    if not is_plain(data):
        file = io.BytesIO()
        image.save(file, "PNG")
        data = file.getvalue()
    return {
        "image": data,
        "caption": sample.caption,
        "key": sample.key,
        "label": -1 if sample.label is None else sample.label,
    }
