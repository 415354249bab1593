"""Pictures, folders and archives for the tests of sdjax.data."""

import io
import tarfile

import numpy as np
from PIL import Image


def pixels(seed: int, height: int = 24, width: int = 20) -> np.ndarray:
    """A smooth random picture, so that JPEG and resizing keep it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def encode(image: Image.Image | np.ndarray, format: str = "PNG", **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(seed: int, format: str = "PNG", **sides) -> bytes:
    return encode(pixels(seed, **sides), format)


def tar(members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of files; a member may also be a TarInfo, with its data."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    """Members as img2dataset writes them."""
    members = []
    for number in range(first, first + count):
        key = f"{number:09d}"
        members += [
            (f"{key}.png", picture(number)),
            (f"{key}.txt", f"caption {number}".encode()),
            (f"{key}.json", b'{"key": "%s", "status": "success"}' % key.encode()),
        ]
    return members


def write_tars(folder, counts=(5, 4, 4)) -> None:
    """Shards of samples, numbered through."""
    first = 0
    for number, count in enumerate(counts):
        (folder / f"{number:05d}.tar").write_bytes(tar(samples(first, count)))
        first += count
