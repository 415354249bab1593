"""Pictures that cannot be read are skipped, counted and named; the others are read."""

import json
import logging
import random
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from pictures import encode, picture, pixels, tar
from PIL import Image

from sdjax import data
from sdjax.data.pictures import decode
from sdjax.errors import SdjaxError


def chunk(name: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png(width: int, height: int, *chunks: bytes, depth: int = 8) -> bytes:
    """A PNG that says it has so many grey pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")]
    )


def zeros(count: int) -> bytes:
    return chunk(b"IDAT", zlib.compress(bytes(count)))


def flipped(data: bytes, start: int, seed: int = 0) -> bytes:
    """The file with every byte from `start` on drawn anew."""
    noise = random.Random(seed).randbytes(len(data) - start)
    return data[:start] + noise


def bad_pictures() -> dict[str, bytes]:
    """Files that no picture can be made of."""
    files = {name: picture(1, name) for name in ("PNG", "JPEG", "WEBP", "GIF", "TIFF")}
    files["BMP"], files["PPM"] = picture(1, "BMP"), picture(1, "PPM")
    bad = {f"half of a {name}": file[: len(file) // 2] for name, file in files.items()}
    bad |= {f"20 bytes of a {name}": file[:20] for name, file in files.items()}
    large = encode(Image.fromarray(pixels(1, height=200, width=200)))
    floats = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    integers = Image.fromarray(np.full((8, 8), -5, np.int32))
    return bad | {
        "nothing": b"",
        "one byte": b"\x89",
        "zeros": bytes(1000),
        "noise": random.Random(0).randbytes(1000),
        "text": b"404 Not Found",
        "a web page": b"<!DOCTYPE html><html><body>gone</body></html>",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "an archive": b"PK\x03\x04" + bytes(100),
        "a PNG of noise": flipped(large, 60),
        "a PNG of nothing": png(8, 8),
        "a PNG of no pixels": png(0, 8, zeros(9)),
        "a PNG of 9 bits": png(8, 8, zeros(200), depth=9),
        "a PNG with a wrong checksum": large[:45] + b"\0\0\0\0" + large[49:],
        "a bomb of a billion pixels": png(40_000, 30_000, zeros(10**6)),
        "a bomb of the largest sides": png(2**31 - 1, 2**31 - 1, zeros(100)),
        "a bomb of a long line": png(10**9, 1, zeros(10**6)),
        "a bomb above the limit": png(10_000, 9_000, zeros(10**6)),
        "a bomb in a text": png(
            8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))), zeros(72)
        ),
        "a GIF of no frames": b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b";",
        "a JPEG without a picture": b"\xff\xd8\xff\xd9",
        "a TIFF of floats": encode(floats, "TIFF"),
        "a TIFF below zero": encode(integers, "TIFF"),
        "a TIFF in a circle": b"II*\0"
        + struct.pack("<I", 8)
        + struct.pack("<HI", 0, 8),
        "a WEBP of a wrong size": b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(40),
    }


BAD = bad_pictures()


def test_there_are_enough_bad_pictures():
    assert len(BAD) >= 30


@pytest.mark.parametrize("kind", BAD)
def test_bad_pictures_are_named_in_bounded_memory(kind):
    tracemalloc.start()
    with pytest.raises(SdjaxError, match=r"^some/key\b") as caught:
        decode(BAD[kind], "some/key")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    assert peak < 2**24


def test_our_limit_speaks_where_pillow_only_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SdjaxError, match="10000×9000 pixels are more than"):
            decode(BAD["a bomb above the limit"], "a")


def test_bombs_take_no_memory_outside_of_python_either(tmp_path):
    """In a process of its own, whose peak is not of other tests."""
    names = [name for name in BAD if "bomb" in name or "TIFF" in name]
    for number, name in enumerate(names):
        (tmp_path / f"{number}").write_bytes(BAD[name])
    script = """
import pathlib, resource, sys
from sdjax.data.pictures import decode
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for place in pathlib.Path(sys.argv[1]).iterdir():
    try:
        decode(place.read_bytes(), "a")
    except ValueError:
        continue
    sys.exit(f"{place} was read")
print(peak() - before)
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000  # KiB


def test_random_damage_gives_a_picture_or_the_error():
    """What is in a file never raises anything else."""
    read = 0
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = picture(2, format)
        for seed in range(40):
            draws = random.Random(seed)
            damaged = bytearray(whole)
            for _ in range(draws.randrange(1, 8)):
                damaged[draws.randrange(len(damaged))] = draws.randrange(256)
            try:
                image = decode(bytes(damaged), "a").image
            except SdjaxError:
                continue
            assert image.mode == "RGB"
            read += 1
    assert read > 20


def mixed(folder) -> list[str]:
    """A shard of the bad pictures among good ones; returns the bad ones' keys."""
    members, names = [], []
    for number, file in enumerate(BAD.values()):
        members += [
            (f"good{number}.png", picture(number)),
            (f"bad{number}.jpg", file),
            (f"bad{number}.txt", b"a caption"),
        ]
        names.append(f"bad{number}")
    (folder / "a.tar").write_bytes(tar(members))
    return names


def test_the_rest_of_a_shard_is_read_and_a_restart_agrees(
    tmp_path, monkeypatch, caplog
):
    bad = mixed(tmp_path)
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    options = {"batch_size": 5, "resolution": 16, "seed": 0, "max_bad_share": 0.6}
    source = data.open_source(tmp_path / "a.tar")
    with (
        caplog.at_level(logging.WARNING),
        data.open_reader(source, **options) as reader,
    ):
        keys, states = [], []
        while len(keys) < 2 * len(BAD):
            keys += next(reader).keys
            states.append(json.dumps(reader.get_state()))
        skipped = reader.skipped
    assert sorted(keys[: len(BAD)]) == sorted(f"good{n}" for n in range(len(BAD)))
    assert skipped.keys() == {str(tmp_path / "a.tar")}
    assert sorted(skipped[str(tmp_path / "a.tar")]) == sorted(bad)
    assert all(f"skipped {name} of" in caplog.text for name in bad)
    assert not list(working.iterdir())
    for step in (2, 7, 11):
        with data.open_reader(source, **options) as other:
            other.set_state(json.loads(states[step]))
            assert next(other).keys == keys[5 * step + 5 : 5 * step + 10]
            assert json.dumps(other.get_state()) == states[step + 1]


def test_too_many_bad_pictures_stop_the_run_and_name_the_shards(tmp_path):
    for shard, broken in (("a", 0), ("b", 2), ("c", 7)):
        members = [
            (f"{shard}{n}.png", b"" if n < broken else picture(n)) for n in range(100)
        ]
        (tmp_path / f"{shard}.tar").write_bytes(tar(members))
    options = {"batch_size": 4, "resolution": 8, "seed": 0}
    source = data.open_source(tmp_path)
    with data.open_reader(source, max_bad_share=0.01, **options) as reader:
        with pytest.raises(SdjaxError, match=r"c\.tar \(\d\)") as caught:
            for _ in range(80):
                next(reader)
        assert "a.tar" not in str(caught.value)
        with pytest.raises(SdjaxError, match="cannot be read"):
            next(reader)  # and again
    with data.open_reader(source, max_bad_share=0.05, **options) as reader:
        for _ in range(150):
            next(reader)
        assert sum(map(len, reader.skipped.values())) == 9
        assert sum(reader.get_state()["bad"].values()) >= 16


def test_where_nothing_can_be_read_the_run_stops(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar([("a.png", b"x"), ("b.png", b"y")]))
    options = {"batch_size": 1, "resolution": 8, "seed": 0, "max_bad_share": 1.0}
    with (
        data.open_reader(data.open_source(tmp_path), **options) as reader,
        pytest.raises(SdjaxError, match="2 of the first 2 samples"),
    ):
        next(reader)


def test_good_files_of_the_corpus_are_good():
    """The corpus is bad for what it says, not for how it is made."""
    assert decode(png(8, 8, zeros(72)), "a").size == (8, 8)
