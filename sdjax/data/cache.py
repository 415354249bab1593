"""What frozen networks make of pictures and captions, written once and read again.

A cache is a folder: `plan.json` (what it is of), shards of records with an index file
each, `empty.safetensors` (text states of the empty caption) and, when all is there,
`cache.json`. A run that was stopped goes on at the shard it was at.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float, UInt8
from safetensors import numpy as safetensors

from sdjax.data.cache_source import DONE, EMPTY, PLAN, pack, shard_name
from sdjax.data.prepare import Preparation, Row, check_preparation
from sdjax.data.sample import Source
from sdjax.data.shards import Written
from sdjax.errors import SdjaxError

SHARD_SIZE = 1024

EncodeImages = Callable[
    [UInt8[np.ndarray, "b height width 3"]], Float[np.ndarray, "b h w c"]
]
EncodeCaptions = Callable[[list[str]], Mapping[str, np.ndarray]]


class _Encoders(NamedTuple):
    images: EncodeImages
    captions: EncodeCaptions | None


def write_cache(
    source: Source,
    path: str | os.PathLike[str],
    *,
    encode_images: EncodeImages,
    encode_captions: EncodeCaptions | None = None,
    resolution: int,
    made_with: str,
    bucket_step: int | None = None,
    batch_size: int = 16,
    shard_size: int = SHARD_SIZE,
    report: Callable[[int], object] = lambda _: None,
) -> Written:
    """Encodes all samples of `source` to a folder, which `open_source` reads.

    Pictures are cropped in their middle and not mirrored.

    Args:
        source: of pictures.
        path: of the folder: new, empty, or one that a stopped call left.
        encode_images: pixels, always of `batch_size` rows -> "moments".
        encode_captions: captions, always `batch_size` -> "context" [B, L, D] and
            whatever else there is of a text; None: captions are kept as they are.
        resolution: as of `open_reader`.
        made_with: names the networks, so that a call that goes on does so with the
            same.
        bucket_step: as of `open_reader`.
        batch_size: of the encoding.
        shard_size: samples of a shard.
        report: is told how many samples are done.

    Raises:
        SdjaxError: if something else is there already, or none of the samples can be
            read.
    """
    prepare = Preparation(
        resolution=resolution, seed=0, bucket_step=bucket_step, sizes=True
    )
    if source.settings:
        raise SdjaxError(f"{source.path} is a cache already")
    check_preparation(prepare, source)
    templates = {"caption_templates": ["{}"]} if encode_captions else {}
    plan = {
        "samples": len(source),
        "shard_size": shard_size,
        "made_with": made_with,
        "settings": {
            "resolution": resolution,
            "bucket_step": bucket_step,
            "crop": "center",
            "shift": 0,
            "flip": 0.0,
            **templates,
        },
    }
    folder = Path(path)
    _begin(folder, plan)
    encoders = _Encoders(encode_images, encode_captions)
    for number, start in enumerate(range(0, len(source), shard_size)):
        indices = range(start, min(start + shard_size, len(source)))
        if not (folder / shard_name(number)).exists():
            rows = _read(source, prepare, indices)
            _write_shard(folder, number, rows, encoders, batch_size)
        report(indices.stop)
    return _finish(folder, plan, source, encoders, batch_size)


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    text = json.dumps(plan, indent=2)
    try:
        folder.mkdir(exist_ok=True)
        if (folder / PLAN).exists():
            if json.loads((folder / PLAN).read_text()) != json.loads(text):
                raise SdjaxError(
                    f"{folder} was begun with other data, networks or settings, see "
                    f"its {PLAN}: choose another folder"
                )
        elif any(folder.iterdir()):
            raise SdjaxError(f"{folder} exists already; nothing is overwritten")
        else:
            _put(folder / PLAN, text.encode())
    except OSError as error:
        raise SdjaxError(f"cannot write {folder}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise SdjaxError(f"{folder / PLAN} is damaged: {error}") from None


def _put(place: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    draft = place.with_name(f".{place.name}.tmp")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(place)


_Skipped = tuple[str, str, str]


def _read(
    source: Source, prepare: Preparation, indices: range
) -> Iterator[Row | _Skipped]:
    def load(index: int) -> Row | _Skipped:
        try:
            return prepare(source[index], {}, epoch=0, index=index)
        except SdjaxError as error:
            return (*source.locate(index), str(error))

    threads = max(1, min(16, os.cpu_count() or 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    rows = grain.MapDataset.range(indices.start, indices.stop).map(load)
    yield from rows.to_iter_dataset(options)


def _write_shard(
    folder: Path,
    number: int,
    rows: Iterator[Row | _Skipped],
    encoders: _Encoders,
    batch_size: int,
) -> None:
    place = folder / shard_name(number)
    draft = place.with_name(f".{place.name}.tmp")
    writer = ArrayRecordWriter(str(draft), "group_size:1")
    skipped: list[_Skipped] = []
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not isinstance(row, Row):
            skipped.append(row)
            continue
        group = groups.setdefault(row.group, [])
        group.append(row)
        if len(group) == batch_size:
            _encode(writer, groups.pop(row.group), encoders, batch_size)
    for group in groups.values():
        _encode(writer, group, encoders, batch_size)
    writer.close()
    _put(place.with_suffix(".json"), json.dumps(skipped).encode())
    draft.replace(place)  # last: its name says that the shard is whole


def _encode(writer: Any, rows: list[Row], encoders: _Encoders, batch_size: int) -> None:
    # Always as many rows, so that the networks are compiled for one shape.
    padded = rows + [rows[0]] * (batch_size - len(rows))
    made = {"moments": encoders.images(np.stack([r.arrays["image"] for r in padded]))}
    if encoders.captions is not None:
        made |= encoders.captions([row.caption for row in padded])
    for number, row in enumerate(rows):
        kept = {k: v for k, v in row.arrays.items() if k != "image"}
        states = {k: np.asarray(v[number], np.float32) for k, v in made.items()}
        writer.write(pack(row.key, row.caption, kept | states))


def _finish(
    folder: Path,
    plan: dict[str, Any],
    source: Source,
    encoders: _Encoders,
    batch_size: int,
) -> Written:
    shards = -(-plan["samples"] // plan["shard_size"])
    skipped: list[_Skipped] = []
    for number in range(shards):
        index = (folder / shard_name(number)).with_suffix(".json")
        skipped += [tuple(one) for one in json.loads(index.read_text())]
    count = plan["samples"] - len(skipped)
    if not count:
        raise SdjaxError(f"nothing in {source.path} can be read: {skipped[0][2]}")
    if encoders.captions is not None:
        states = encoders.captions([""] * batch_size)
        empty = {k: np.asarray(v[0], np.float32).copy() for k, v in states.items()}
        _put(folder / EMPTY, safetensors.save(empty))
    done = {"shards": shards, "count": count, "skipped": len(skipped)}
    _put(folder / DONE, json.dumps(done, indent=2).encode())
    return Written(count, skipped)
