"""Where the members of a tar archive lie, from its headers alone.

Nothing is extracted: a member's name is a label and never a path. The walk is our own,
over headers that `tarfile` parses, so that no size that an archive claims decides how
much is read (`tarfile` itself reads extended headers of any size into memory).
"""

import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from sdjax.errors import SdjaxError

BLOCK = 512
MAX_NAME = 4096
"""Bytes of a member's name."""
MAX_EXTENDED = 2**20
"""Bytes of an extended header."""
MAX_MEMBERS = 10_000_000

_LINKS_AND_DEVICES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
}
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NEXT_NAME = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_PASSED = (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.DIRTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)


class Member(NamedTuple):
    """A file in an archive; `flaw` says why it must not be used, if so."""

    name: str
    offset: int
    size: int
    flaw: str | None = None


class _Extended(NamedTuple):
    """What extended headers say of the member that follows them."""

    name: bytes | None = None
    size: int | None = None
    sparse: bool = False
    flaw: str | None = None


def members(path: str) -> Iterator[Member]:
    """Walks an archive; what its end, or damage, cuts off comes last, with a flaw.

    Raises:
        SdjaxError: if the file cannot be opened or is no plain tar archive.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise SdjaxError(f"cannot open {path}: {error.strerror}") from None
    try:
        _check_kind(path, os.pread(file, 8, 0))
        end = os.fstat(file).st_size
        for count, member in enumerate(_walk(file, end)):
            if count == MAX_MEMBERS:
                yield Member("", 0, 0, f"more than {MAX_MEMBERS} members")
                return
            yield member
    finally:
        os.close(file)


def _check_kind(path: str, head: bytes) -> None:
    kinds = {
        b"\x1f\x8b": "gzip",
        b"BZh": "bzip2",
        b"\xfd7zXZ": "xz",
        b"(\xb5/\xfd": "zstd",
    }
    for magic, kind in kinds.items():
        if head.startswith(magic):
            raise SdjaxError(
                f"{path} is compressed with {kind}, so that its members cannot be read "
                "one by one: decompress it to a plain .tar first"
            )


def _walk(file: int, end: int) -> Iterator[Member]:
    position, extended = 0, _Extended()
    while position < end:
        try:
            header = tarfile.TarInfo.frombuf(
                os.pread(file, BLOCK, position), "utf-8", "surrogateescape"
            )
        except tarfile.HeaderError as error:
            if not _is_zero(file, position):
                yield Member("", position, 0, f"damaged at byte {position}: {error}")
            return
        position = _after_sparse_map(file, position + BLOCK, header)
        if header.type in _NEXT_NAME + _PASSED:
            size = header.size
            if header.type in _NEXT_NAME:
                extended = _read_extended(file, position, header, extended)
            if position + size > end:
                yield Member("", position, 0, f"cut off in a header of {size} bytes")
        else:
            size = header.size if extended.size is None else extended.size
            if header.type != tarfile.DIRTYPE:
                yield _member(header, extended, position, size, end)
            extended = _Extended()
        if size > 0 and header.type not in _WITHOUT_DATA:
            position += -(-size // BLOCK) * BLOCK


def _is_zero(file: int, position: int) -> bool:
    return os.pread(file, BLOCK, position) == bytes(BLOCK)


def _after_sparse_map(file: int, position: int, header: tarfile.TarInfo) -> int:
    """An old GNU sparse file's map may go on in blocks of its own."""
    if header.type != tarfile.GNUTYPE_SPARSE:
        return position
    more = os.pread(file, BLOCK, position - BLOCK)[482:483]
    while more not in (b"", b"\0"):
        more = os.pread(file, BLOCK, position)[504:505]
        position += BLOCK
    return position


def _member(
    header: tarfile.TarInfo, extended: _Extended, position: int, size: int, end: int
) -> Member:
    raw = extended.name or header.name.encode("utf-8", "surrogateescape")
    name = raw[:MAX_NAME].decode("utf-8", "replace")
    flaw = extended.flaw or _flaw(raw, header.type, extended.sparse)
    if size < 0:
        flaw = f"its size is {size}"
    elif position + size > end and flaw is None:
        flaw = f"cut off: {size} bytes claimed, {max(0, end - position)} there"
    return Member(name, position, size, flaw)


def _flaw(name: bytes, type: bytes, sparse: bool) -> str | None:
    if sparse or type not in _REGULAR:
        return _LINKS_AND_DEVICES.get(type, "a sparse file" if sparse else "no file")
    if len(name) > MAX_NAME:
        return f"its name has {len(name)} bytes"
    parts = name.replace(b"\\", b"/").split(b"/")
    if name.startswith((b"/", b"\\")) or parts[0][1:2] == b":":
        return "its name is an absolute path"
    if b".." in parts:
        return "its name leaves the archive"
    try:
        name.decode()
    except UnicodeDecodeError:
        return "its name is not UTF-8"
    return "its name holds a zero byte" if b"\0" in name else None


def _read_extended(
    file: int, position: int, header: tarfile.TarInfo, before: _Extended
) -> _Extended:
    if not 0 <= header.size <= MAX_EXTENDED:
        return before._replace(flaw=f"an extended header of {header.size} bytes")
    payload = os.pread(file, header.size, position)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return before._replace(name=payload.split(b"\0", 1)[0])
    try:
        records = _pax_records(payload)
        size = int(records[b"size"]) if b"size" in records else before.size
    except ValueError:
        return before._replace(flaw="a damaged extended header")
    sparse = any(key.startswith(b"GNU.sparse") for key in records)
    name = records.get(b"path", before.name)
    return before._replace(name=name, size=size, sparse=sparse)


def _pax_records(payload: bytes) -> dict[bytes, bytes]:
    """Reads lines of "LENGTH KEY=VALUE", where LENGTH counts the whole line."""
    records, start = {}, 0
    while start < len(payload) and payload[start] != 0:
        digits = payload[start : start + 20].split(b" ", 1)[0]
        length = int(digits)
        line = payload[start : start + length]
        if length <= len(digits) + 1 or len(line) < length:
            raise ValueError("length of a record")
        key, _, value = line[len(digits) + 1 : -1].partition(b"=")
        records[key] = value
        start += length
    return records
