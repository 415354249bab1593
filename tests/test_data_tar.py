"""Tar shards are read where they lie, and hostile ones do no harm."""

import io
import logging
import pickle
import tarfile
import tracemalloc

import pytest
from pictures import picture, samples, tar, write_tars

from sdjax import data
from sdjax.data.sample import BadSampleError
from sdjax.errors import SdjaxError

GOOD = samples(0, 3)


def info(name: str, **fields) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def header(name: bytes, size: bytes, type: bytes = b"0", magic=b"ustar\x0000") -> bytes:
    """A header with any size field and a right checksum."""
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[148:156] = b" " * 8
    block[156:157] = type
    block[257 : 257 + len(magic)] = magic
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def after(*blocks: bytes) -> bytes:
    """An archive that has blocks before the good samples."""
    return b"".join(blocks) + tar(GOOD)


def block(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


LONG = b"x" * 5000 + b".png\0"
PAX = b"16 path=../a.png\n"


def hostile() -> dict[str, bytes]:
    """Archives that hold the good samples, after or around something bad."""
    link = {"linkname": "/etc/passwd"}
    payload = picture(99)
    pairs = {
        "traversal": ("../../outside.png", payload),
        "traversal inside": ("a/../../outside.png", payload),
        "traversal of another system": ("..\\outside.png", payload),
        "absolute": ("/tmp/outside.png", payload),
        "drive": ("C:/outside.png", payload),
        "symbolic link": (info("a.png", type=tarfile.SYMTYPE, **link), b""),
        "hard link": (info("a.png", type=tarfile.LNKTYPE, **link), b""),
        "device": (info("a.png", type=tarfile.CHRTYPE), b""),
        "block device": (info("a.png", type=tarfile.BLKTYPE), b""),
        "pipe": (info("a.png", type=tarfile.FIFOTYPE), b""),
        "same key twice": ("000000000.png", payload),
        "caption alone": ("lonely.txt", b"nobody"),
        "caption of megabytes": ("000000000.json", bytes(2**20 + 1)),
        "name not UTF-8": ("a\udcff.png", payload),
    }
    archives = {kind: tar([*GOOD, pair]) for kind, pair in pairs.items()}
    whole = tar(GOOD)
    return archives | {
        "truncated": tar([*GOOD, ("a.png", bytes(9000))])[:-14_000],
        "truncated in a header": whole[: _end(whole)]
        + header(b"a.png", octal(0))[:100],
        "no end": whole.rstrip(b"\0") + bytes(512),
        "rubbish at the end": whole[: _end(whole)] + b"rubbish!" * 100,
        "size beyond the end": tar(GOOD)[: _end(whole)]
        + header(b"a.png", octal(8 * 2**30 - 1)),
        "size of exabytes": whole[: _end(whole)]
        + header(b"a.png", b"\x80" + (2**62).to_bytes(11, "big")),
        "size below zero": after(header(b"a.png", b"\xff" * 11 + b"\x00")),
        "size that is no number": whole[: _end(whole)] + header(b"a.png", b"99zz"),
        "long name of gigabytes": whole[: _end(whole)]
        + header(b"././@LongLink", octal(4 * 2**30), b"L"),
        "long name": after(
            header(b"././@LongLink", octal(len(LONG)), b"L"),
            block(LONG),
            header(b"a.png", octal(0)),
        ),
        "pax header of gigabytes": whole[: _end(whole)]
        + header(b"pax", octal(4 * 2**30), b"x"),
        "pax header that leaves": after(
            header(b"pax", octal(len(PAX)), b"x"), block(PAX), header(b"a", octal(0))
        ),
        "pax header that is damaged": after(
            header(b"pax", octal(8), b"x"),
            block(b"99 path="),
            header(b"a.png", octal(0)),
        ),
        "sparse file": after(header(b"a.png", octal(0), b"S", b"ustar  \0")),
        "sparse file by pax": after(
            header(b"pax", octal(22), b"x"),
            block(b"22 GNU.sparse.major=1\n"),
            header(b"a.png", octal(0)),
        ),
    }


def _end(archive: bytes) -> int:
    """Where the members end and the closing zeros begin."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        opened.getmembers()
        return opened.offset


@pytest.mark.parametrize("kind", hostile())
def test_hostile_archives_give_the_rest_and_touch_nothing(
    kind, tmp_path, monkeypatch, caplog
):
    working = tmp_path / "working" / "directory"
    working.mkdir(parents=True)
    monkeypatch.chdir(working)
    shard = tmp_path / "shard.tar"
    shard.write_bytes(hostile()[kind])
    before = sorted(tmp_path.rglob("*"))
    tracemalloc.start()
    source = data.open_source(shard)
    read = [source[index] for index in range(len(source))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [s.key for s in read if s.key.isdigit()] == [f"{n:09d}" for n in range(3)]
    assert [s.caption for s in read][:3] == [f"caption {n}" for n in range(3)]
    assert all(s.image == picture(n) for n, s in enumerate(read))
    assert len(read) == 3
    assert sorted(tmp_path.rglob("*")) == before
    assert peak < 2**24
    if kind not in ("caption alone", "no end"):
        assert str(shard) in caplog.text and "1 members ignored" in caplog.text


def test_there_are_enough_hostile_archives():
    assert len(hostile()) >= 20


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_archives_are_refused(tmp_path, mode):
    place = tmp_path / "a.tar"
    with tarfile.open(place, mode) as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(SdjaxError, match=r"a\.tar is compressed .* decompress it"):
        data.open_source(tmp_path)


def test_many_members_take_bounded_memory(tmp_path):
    place = tmp_path / "many.tar"
    place.write_bytes(tar(GOOD)[:-10_240] + header(b"a.png", octal(0)) * 3000)
    tracemalloc.start()
    source = data.open_source(place)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == 4
    assert peak < 2**19


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_are_read(tmp_path, format):
    names = ["ü" * 100, "a/b" * 60, "日本語.with.dots"]
    members = [(f"{name}.png", picture(n)) for n, name in enumerate(names)]
    (tmp_path / "a.tar").write_bytes(tar(members, format))
    source = data.open_source(tmp_path)
    assert [source[i].image for i in range(3)] == [picture(i) for i in range(3)]
    assert source[0].key == names[0]
    assert source[2].key == "日本語"


def test_captions_come_from_text_or_json_and_labels_from_either(tmp_path):
    members = [
        ("a.jpg", picture(0, "JPEG")),
        ("a.txt", "\ufeffgrün\n".encode()),
        ("a.json", b'{"caption": "other", "label": 3}'),
        ("b.PNG", picture(1)),
        ("b.json", b'{"caption": "of json"}'),
        ("b.cls", b"7\n"),
        ("c.webp", picture(2, "WEBP")),
        ("d.png", picture(3)),
        ("d.json", b'{"caption": null}'),
    ]
    (tmp_path / "a.tar").write_bytes(tar(members))
    source = data.open_source(tmp_path / "a.tar")
    read = [source[index] for index in range(4)]
    assert [sample.caption for sample in read] == ["grün", "of json", "", ""]
    assert [sample.label for sample in read] == [3, 7, None, None]


@pytest.mark.parametrize(
    "extra,reason",
    [
        (("a.txt", b"caf\xe9"), "caption is not UTF-8"),
        (("a.json", b"{"), "json cannot be read"),
        (("a.json", b"[" * 100_000), "json cannot be read"),
        (("a.json", b'{"caption": 3}'), "its caption is 3"),
        (("a.cls", b"cat"), "class is b'cat'"),
    ],
)
def test_what_belongs_to_a_picture_and_is_broken_is_named(tmp_path, extra, reason):
    (tmp_path / "a.tar").write_bytes(tar([("a.png", picture(0)), extra]))
    source = data.open_source(tmp_path)
    with pytest.raises(BadSampleError, match=f"^a: .*{reason}"):
        source[0]


def test_shards_are_one_sequence_and_can_be_sent_to_workers(tmp_path):
    write_tars(tmp_path, (5, 1, 4))
    source = data.open_source(tmp_path)
    first = [source[index] for index in range(len(source))]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[index] for index in range(len(copy))] == first
    assert [sample.key for sample in first] == [f"{n:09d}" for n in range(10)]
    assert source.locate(5) == (str(tmp_path / "00001.tar"), "000000005")


def test_an_archive_that_vanishes_names_itself(tmp_path, caplog):
    write_tars(tmp_path, (2,))
    with caplog.at_level(logging.WARNING):
        source = data.open_source(tmp_path)
    assert not caplog.records
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(BadSampleError, match="000000001: No such file"):
        source[1]


def test_archives_without_pictures_are_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar([("a.txt", b"b")]))
    with pytest.raises(SdjaxError, match="holds no pictures"):
        data.open_source(tmp_path)
