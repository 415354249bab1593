"""torch.save files (.ckpt, .bin, .pt): the zip format and the one before it.

The pickle inside is read as data by `pickle_data`; the tensors are left in the file,
each a place in it. Zip members must be stored, not compressed, as torch writes them:
so no size in the file exceeds the file's own.
"""

import io
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from sdjax.errors import SdjaxError
from sdjax.weights.pickle_data import Global, StorageRef, TensorRef, read_pickle
from sdjax.weights.tensors import Tensor, TensorFile, check_shape

STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("<i1"),
    "ByteStorage": np.dtype("<u1"),
    "BoolStorage": np.dtype(np.bool_),
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

Records = dict[str, tuple[int, int]]
"""Storage key -> offset in the file and number of bytes."""


def open_torch(file: Path) -> TensorFile:
    """Opens a torch.save file; runs nothing in it and reads no tensor yet.

    Raises:
        SdjaxError: if it is malformed, or holds anything but tensors and plain data.
    """
    try:
        with open(file, "rb") as stream:
            is_zip = stream.read(2) == b"PK"
            stream.seek(0)
            value, records = (_open_zip if is_zip else _open_legacy)(stream, file)
    except OSError as error:
        raise SdjaxError(f"cannot read {file}: {error.strerror or error}") from None
    except struct.error as error:
        raise SdjaxError(f"{file} is a damaged torch file: {error}") from None
    step = value.get("global_step") if isinstance(value, dict) else None
    for _ in range(4):
        if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
            value = value["state_dict"]
    if not isinstance(value, dict):
        raise SdjaxError(f"{file} holds a {type(value).__name__}, not a state dict")
    tensors = {
        key: _place(file, key, item, records)
        for key, item in value.items()
        if isinstance(item, TensorRef) and isinstance(key, str)
    }
    return TensorFile(tensors, global_step=step if type(step) is int else None)


def _open_zip(stream: IO[bytes], file: Path) -> tuple[Any, Records]:
    size = os.fstat(stream.fileno()).st_size
    try:
        with zipfile.ZipFile(stream) as archive:
            members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise SdjaxError(f"{file} is a damaged torch file: {error}") from None
    pickles = [n for n in members if n == "data.pkl" or n.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise SdjaxError(f"{file} is a zip archive without one data.pkl: no checkpoint")
    root = pickles[0].removesuffix("data.pkl")
    places = {
        name.removeprefix(root): _member(stream, file, info, size)
        for name, info in members.items()
        if name.startswith(root)
    }
    offset, count = places.get("byteorder", (0, 0))
    stream.seek(offset)
    if stream.read(count) == b"big":
        raise SdjaxError(f"{file} is big-endian; save it again on a common machine")
    offset, count = places["data.pkl"]
    stream.seek(offset)
    value = read_pickle(io.BytesIO(stream.read(count)), file, _storage)
    prefix = "data/"
    records = {
        name.removeprefix(prefix): place
        for name, place in places.items()
        if name.startswith(prefix)
    }
    return value, records


def _member(
    stream: IO[bytes], file: Path, info: zipfile.ZipInfo, size: int
) -> tuple[int, int]:
    """Where a stored zip member's bytes lie."""
    encrypted = info.flag_bits & 1
    if info.compress_type != zipfile.ZIP_STORED or encrypted:
        raise SdjaxError(f"{file}: member {info.filename!r:.80} is compressed")
    stream.seek(info.header_offset)
    header = stream.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise SdjaxError(f"{file}: member {info.filename!r:.80} has no local header")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    offset = info.header_offset + 30 + name_length + extra_length
    if offset + info.file_size > size:
        raise SdjaxError(f"{file}: member {info.filename!r:.80} ends after the file")
    return offset, info.file_size


class _Bounded:
    """A file that never reads more than it holds, whatever length is claimed."""

    def __init__(self, stream: IO[bytes]):
        self.stream = stream
        self.size = os.fstat(stream.fileno()).st_size

    def read(self, count: int = -1, /) -> bytes:
        left = max(0, self.size - self.stream.tell())
        return self.stream.read(left if count < 0 else min(count, left))

    def readline(self) -> bytes:
        return self.stream.readline()

    def tell(self) -> int:
        return self.stream.tell()


def _open_legacy(stream: IO[bytes], file: Path) -> tuple[Any, Records]:
    """Before torch 1.6: magic, version, system, object, storage keys, storages."""
    bounded = _Bounded(stream)
    if read_pickle(bounded, file) != LEGACY_MAGIC:
        raise SdjaxError(f"{file} is neither safetensors nor a torch checkpoint")
    if read_pickle(bounded, file) != LEGACY_PROTOCOL:
        raise SdjaxError(f"{file}: unknown version of the old torch format")
    system = read_pickle(bounded, file)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise SdjaxError(f"{file} is big-endian; save it again on a common machine")
    widths: dict[str, int] = {}

    def storage(identifier: Any) -> StorageRef:
        found = _storage(identifier)
        widths[found.key] = STORAGES[found.kind].itemsize
        return found

    value = read_pickle(bounded, file, storage)
    keys = read_pickle(bounded, file)
    if not isinstance(keys, list) or not all(key in widths for key in keys):
        raise SdjaxError(f"{file}: the list of storages does not fit the tensors")
    records: Records = {}
    for key in keys:
        (numel,) = struct.unpack("<q", stream.read(8))
        records[key] = stream.tell(), numel * widths[key]
        if numel < 0 or sum(records[key]) > bounded.size:
            raise SdjaxError(f"{file} is truncated: storage {key!r:.80} ends after it")
        stream.seek(sum(records[key]))
    return value, records


def _storage(identifier: Any) -> StorageRef:
    """The storage of a persistent id ('storage', type, key, device, numel[, view])."""
    if not isinstance(identifier, tuple) or len(identifier) not in (5, 6):
        raise ValueError("a persistent id that is no storage")
    what, kind, key, _, numel, *view = identifier
    known = isinstance(kind, Global) and kind.module == "torch" and kind.name
    if what != "storage" or known not in STORAGES or not isinstance(key, str):
        raise ValueError("a persistent id that is no storage")
    start = 0
    if view and view[0] is not None:
        _, start, numel = view[0]
    if not all(type(n) is int and n >= 0 for n in (start, numel)):
        raise ValueError("a storage of negative or odd length")
    return StorageRef(kind.name, key, numel, start)


def _place(file: Path, key: str, tensor: TensorRef, records: Records) -> Tensor:
    """A tensor's place in the file, checked against its storage's length."""
    check_shape(file, key, tensor.size)
    storage, dtype = tensor.storage, STORAGES[tensor.storage.kind]
    if storage.key not in records:
        raise SdjaxError(f"{file}: tensor {key!r:.120} lacks its storage")
    base, count = records[storage.key]
    pairs = list(zip(tensor.size, tensor.stride, strict=True))
    elements = math.prod(tensor.size)
    last = tensor.offset + sum((n - 1) * stride for n, stride in pairs if n)
    held = min(storage.numel, count // dtype.itemsize - storage.start)
    # Stride 0 repeats elements: a small file could claim an array of any size.
    if elements > held or (elements and last >= held):
        raise SdjaxError(
            f"{file}: tensor {key!r:.120} reaches past its storage of {held} elements"
        )
    offset = base + (storage.start + tensor.offset) * dtype.itemsize
    row_major, step = True, 1
    for length, stride in reversed(pairs):
        row_major = row_major and (stride == step or length == 1)
        step *= length
    strides = None if row_major else tensor.stride
    return Tensor(file, offset, dtype, tensor.size, strides)
