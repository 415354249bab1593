"""The safetensors format: eight bytes of header length, JSON header, raw data.

Read with every claim of the header checked against the file, and written as a stream,
one tensor in memory at a time. Format: github.com/huggingface/safetensors.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np

from sdjax.errors import SdjaxError
from sdjax.weights.tensors import Tensor, TensorFile, check_shape

MAX_HEADER = 100_000_000

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Outgoing(NamedTuple):
    """A tensor to be written; `make` is called once, when its turn comes."""

    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_safetensors(file: Path) -> TensorFile:
    """Reads the header of a safetensors file and checks all of it.

    Raises:
        SdjaxError: if the header is malformed, or its tensors do not fill the rest of
            the file exactly, without holes or overlaps.
    """
    header, start, size = _read_header(file)
    metadata = header.pop("__metadata__", None) or {}
    if not _is_text_map(metadata):
        raise SdjaxError(f"{file}: __metadata__ must map text to text")
    spans, tensors = [], {}
    for key, info in header.items():
        tensor, end = _tensor(file, key, info, start)
        tensors[key] = tensor
        spans.append((tensor.offset, end, key))
    at = start
    for begin, end, key in sorted(spans):
        if begin != at:
            raise SdjaxError(
                f"{file}: tensor {key!r:.120} begins at byte {begin - start} of the "
                f"data, the one before it ends at {at - start}"
            )
        at = end
    if at != size:
        raise SdjaxError(f"{file} has {size} bytes, its header describes {at}")
    return TensorFile(tensors, metadata)


def write_safetensors(
    stream: IO[bytes], tensors: Iterable[Outgoing], metadata: dict[str, str]
) -> None:
    """Writes tensors one after another; memory: one tensor."""
    # Widest first keeps every tensor aligned to its own element size.
    ordered = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.key))
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for tensor in ordered:
        header[tensor.key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
    for tensor in ordered:
        array = np.ascontiguousarray(tensor.make(), dtype=tensor.dtype)
        stream.write(array.reshape(-1).view(np.uint8).data)


def _read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header, the offset of the data and the size of the file."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < 8:
                raise SdjaxError(f"{file} has {size} bytes: no safetensors header")
            length = int.from_bytes(stream.read(8), "little")
            if length > min(MAX_HEADER, size - 8):
                raise SdjaxError(
                    f"{file}: the header claims {length} bytes, the file has {size}"
                )
            text = stream.read(length)
    except OSError as error:
        raise SdjaxError(f"cannot read {file}: {error.strerror}") from None
    if not text.startswith(b"{"):
        raise SdjaxError(f"{file}: the safetensors header is not a JSON object")
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise SdjaxError(
            f"{file}: the safetensors header is not valid JSON: {reason:.150}"
        ) from None
    return header, 8 + length, size


def _tensor(file: Path, key: str, info: Any, start: int) -> tuple[Tensor, int]:
    """One header entry as a tensor, and where it ends in the file."""
    name = f"{file}: tensor {key!r:.120}"
    if not isinstance(info, dict):
        raise SdjaxError(f"{name} is not described by a JSON object")
    dtype = info.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SdjaxError(f"{name} has the unknown dtype {dtype!r:.80}")
    shape, offsets = info.get("shape"), info.get("data_offsets")
    if not _is_sizes(shape):
        raise SdjaxError(f"{name} has the shape {shape!r:.80}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise SdjaxError(f"{name} has the data_offsets {offsets!r:.80}")
    check_shape(file, key, tuple(shape))
    begin, end = offsets
    tensor = Tensor(file, start + begin, DTYPES[dtype], tuple(shape))
    if end - begin != tensor.nbytes:
        raise SdjaxError(
            f"{name} has {end - begin} bytes, its dtype and shape need {tensor.nbytes}"
        )
    return tensor, start + end


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of non-negative integers."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
