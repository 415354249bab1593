"""Malformed safetensors files: each is refused in one line, or is read as it says."""

import json
import struct

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sdjax.errors import SdjaxError
from sdjax.weights.files import open_file
from sdjax.weights.safetensors_file import open_safetensors


def pack(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(dtype="F32", shape=(2,), offsets=(0, 8), **extra):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **extra}}


def two(first, second):
    return {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in (("a", first), ("b", second))
    }


EIGHT = bytes(8)
GOOD = pack(one(), EIGHT)
MALFORMED = {
    "empty": b"",
    "one byte": b"\0",
    "seven bytes": bytes(7),
    "length only": struct.pack("<Q", 10),
    "zero length": bytes(8),
    "zero length and data": bytes(64),
    "length past the end": pack(one(), EIGHT, 10_000),
    "length of 2^63": pack(one(), EIGHT, 2**63),
    "length of 2^64-1": pack(one(), EIGHT, 2**64 - 1),
    "length of 100 GB": pack(one(), EIGHT, 10**11),
    "length too short": pack(one(), EIGHT, 20),
    "length one too long": pack(one(), EIGHT, len(json.dumps(one())) + 1),
    "big-endian length": struct.pack(">Q", 60) + GOOD[8:],
    "not JSON": pack(b"{not json}", EIGHT),
    "binary": bytes(range(256)) * 4,
    "a list": pack([], EIGHT),
    "a number": pack(b"7"),
    "null": pack(b"null"),
    "text": pack(b'"a"'),
    "trailing comma": pack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},}'),
    "two objects": pack(b"{}{}"),
    "space before": pack(b" {}"),
    "not UTF-8": pack(b'{"\xff\xfe":1}', EIGHT),
    "UTF-16": pack(json.dumps(one()).encode("utf-16"), EIGHT),
    "deeply nested": pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a huge number": pack(b'{"a":' + b"9" * 10_000 + b"}"),
    "infinity": pack(b'{"a":Infinity}'),
    "duplicate keys": pack(
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        b'"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
        EIGHT,
    ),
    "duplicate dtype": pack(
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', EIGHT
    ),
    "entry is null": pack({"a": None}, EIGHT),
    "entry is a list": pack({"a": [1]}, EIGHT),
    "no dtype": pack({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "no shape": pack({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
    "no offsets": pack({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "unknown dtype": pack(one("F33"), EIGHT),
    "dtype in lower case": pack(one("f32"), EIGHT),
    "dtype is a number": pack(one(32), EIGHT),
    "dtype is a list": pack(one(["F32"]), EIGHT),
    "wrong dtype": pack(one("F16"), EIGHT),
    "wider dtype": pack(one("F64"), EIGHT),
    "negative shape": pack(one(shape=[-2]), EIGHT),
    "two negative shapes": pack(one(shape=[-1, -2]), EIGHT),
    "fractional shape": pack(one(shape=[2.0]), EIGHT),
    "true as a shape": pack(one("F64", shape=[True]), EIGHT),
    "shape is text": pack(one(shape="2"), EIGHT),
    "shape is a number": pack(one(shape=2), EIGHT),
    "shape of text": pack(one(shape=["2"]), EIGHT),
    "shape overflows 64 bits": pack(one(shape=[2**33, 2**33]), EIGHT),
    "shape overflows to 8": pack(one("U8", shape=[2**32, 2**32, 8]), EIGHT),
    "empty but huge": pack(one(shape=[0, 2**62], offsets=[0, 0])),
    "too many axes": pack(one("F64", shape=[1] * 100), EIGHT),
    "one offset": pack(one(offsets=[0]), EIGHT),
    "three offsets": pack(one(offsets=[0, 4, 8]), EIGHT),
    "negative offset": pack(one(offsets=[-8, 0]), EIGHT),
    "reversed offsets": pack(one(offsets=[8, 0]), EIGHT),
    "offsets past the end": pack(one(offsets=[8, 16]), EIGHT),
    "huge offsets": pack(one(offsets=[2**63, 2**63 + 8]), EIGHT),
    "fractional offsets": pack(one(offsets=[0.0, 8.0]), EIGHT),
    "overlap": pack(two((0, 6), (2, 8)), EIGHT),
    "the same bytes twice": pack(two((0, 8), (0, 8)), EIGHT),
    "a hole": pack(two((0, 2), (6, 8)), EIGHT),
    "a hole in front": pack(one("F32", [1], [4, 8]), EIGHT),
    "data after the end": pack(one(), EIGHT + b"x"),
    "data without tensors": pack({}, EIGHT),
    "data too short": pack(one(), EIGHT[:-1]),
    "no data": pack(one()),
    "metadata is a list": pack({"__metadata__": [], **one()}, EIGHT)[:0]
    + pack({"__metadata__": ["pt"], **one()}, EIGHT),
    "metadata of numbers": pack({"__metadata__": {"format": 1}, **one()}, EIGHT),
    "metadata nested": pack({"__metadata__": {"format": {}}, **one()}, EIGHT),
    "a newline in a name": pack({"a\nb": {"dtype": "F32"}}, EIGHT),
    "a very long name": pack({"a" * 100_000: {"dtype": "F32"}}, EIGHT),
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "an HTML page": b"<!DOCTYPE html><html><body>404 not found</body></html>" * 4,
    "gzip": b"\x1f\x8b\x08\x00" + bytes(60),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(60),
}


def refused(read, file):
    with pytest.raises(SdjaxError) as caught:
        read(file)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert str(file) in message


def test_there_are_enough():
    assert len(MALFORMED) >= 40


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(tmp_path, name):
    file = tmp_path / "model.safetensors"
    file.write_bytes(MALFORMED[name])
    refused(open_file, file)


def test_the_good_one_is_good(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(GOOD)
    assert open_file(file).tensors["a"].read().tolist() == [0, 0]


def test_no_file_at_all(tmp_path):
    refused(open_file, tmp_path)
    refused(open_file, tmp_path / "absent.safetensors")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(open_file, tmp_path / "loop")


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(GOOD)
    tensor = open_safetensors(file).tensors["a"]
    file.write_bytes(GOOD[:-1])
    with pytest.raises(SdjaxError, match="truncated"):
        tensor.read()


def mutate(whole, rng):
    """Truncated, or with some bytes changed, mostly in the header."""
    kind = rng.integers(4)
    if kind == 0:
        return whole[: rng.integers(len(whole))]
    changed = bytearray(whole)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(rng.integers(1, 4)):
        place = rng.integers(len(whole) if kind == 1 else header)
        changed[place] = rng.integers(256) if kind < 3 else rng.choice(list(b"0123,]}"))
    return bytes(changed)


def test_two_thousand_mutated_files(tmp_path):
    """Each is refused, or every tensor in it is as safetensors' own reader says."""
    rng = np.random.default_rng(0)
    arrays = {
        f"block.{i}.weight": rng.standard_normal((i + 1, 3)).astype(dtype)
        for i, dtype in enumerate(["f4", "f2", "f8", "f4", "i8"])
    }
    whole, file = save(arrays, {"format": "pt"}), tmp_path / "model.safetensors"
    loaded = 0
    for _ in range(2000):
        file.write_bytes(mutate(whole, rng))
        try:
            got = open_file(file).tensors
        except SdjaxError as error:
            assert "\n" not in str(error)
            continue
        loaded += 1
        shapes = {key: tensor.read().shape for key, tensor in got.items()}
        try:
            with safe_open(file, "np") as other:
                assert shapes == {k: other.get_tensor(k).shape for k in other.keys()}
        except SafetensorError:
            pytest.fail(f"we read what safetensors refuses: {file.read_bytes()!r}")
    assert 100 < loaded < 1900
