"""Files of pictures into RGB pixels of the wanted size, whatever is in them."""

import io
import struct
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from sdjax.errors import SdjaxError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Others are not opened: some of Pillow's run programs."""

EXTENSIONS = frozenset(".jpg .jpeg .png .webp .gif .bmp .tif .tiff .ppm .avif".split())

MAX_PIXELS = 80_000_000
"""Below Pillow's own bound, so that ours is the one that speaks."""

MAX_BYTES = 128 * 2**20
"""Of a picture's file."""

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)

Pixels = UInt8[np.ndarray, "h w 3"]


class Decoded(NamedTuple):
    """A picture in RGB, and the (width, height) that it was stored with, upright."""

    image: Image.Image
    size: tuple[int, int]


def decode(data: bytes, name: str, *, shortest: int | None = None) -> Decoded:
    """Decodes a picture: upright, 8 bit, RGB, on white where it is transparent.

    Of an animation the first frame counts; of CMYK, Pillow's plain conversion; 16-bit
    values are divided by 257. Colour profiles are not applied.

    Args:
        data: the file.
        name: of the picture, for messages.
        shortest: a JPEG may come out smaller, at 1/2, 1/4 or 1/8 of its sides, as long
            as the shorter one keeps twice this length: a large photograph is decoded
            several times faster so, before it is made small anyway.

    Raises:
        SdjaxError: if it cannot be read or is beyond `MAX_PIXELS` or `MAX_BYTES`.
    """
    if len(data) > MAX_BYTES:
        raise SdjaxError(f"{name}: {len(data)} bytes are more than {MAX_BYTES}")
    try:
        return _decode(data, name, shortest)
    except SdjaxError:
        raise
    except MemoryError:
        raise SdjaxError(f"{name}: not enough memory to decode it") from None
    # What Pillow raises at broken files is not documented; besides these, its
    # DecompressionBombError is an Exception of its own.
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        SyntaxError,
        EOFError,
        RuntimeError,
        AssertionError,
        struct.error,
        Warning,
        Image.DecompressionBombError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SdjaxError(f"{name} cannot be read as a picture: {reason:.200}") from None


def _decode(data: bytes, name: str, shortest: int | None) -> Decoded:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise SdjaxError(
                f"{name}: {width}×{height} pixels are more than {MAX_PIXELS}"
            )
        turned = image.getexif().get(_ORIENTATION) in _SIDEWAYS
        if shortest is not None:
            _draft(image, 2 * shortest)
        image.load()
        upright = ImageOps.exif_transpose(image)
    size = (height, width) if turned else (width, height)
    return Decoded(_to_rgb(upright, name), size)


def _draft(image: Image.Image, least: int) -> None:
    """Tells the JPEG decoder how small it may decode; other formats do not care."""
    scale = min(1, least / max(1, min(image.size)))
    image.draft(None, (round(image.width * scale), round(image.height * scale)))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_integers(image, name)
    if image.mode == "F":
        raise SdjaxError(f"{name}: pixels are floating point, whose range is unknown")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _from_integers(image: Image.Image, name: str) -> Image.Image:
    """Pillow's own conversion of 16-bit grey cuts off at 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise SdjaxError(f"{name}: pixels are integers beyond 16 bits")
    grey = np.round(values / 257.0).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def is_plain(data: bytes) -> bool:
    """Whether any decoder makes of a JPEG or PNG what `decode` makes of it.

    Such are those of three 8-bit channels, upright and opaque. The file is one that
    `decode` could read.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.format not in ("JPEG", "PNG") or image.mode != "RGB":
            return False
        # To Pillow, a PNG of 16 bits is "RGB" as well; byte 24 is its bit depth.
        deep = image.format == "PNG" and data[24] != 8
        upright = image.getexif().get(_ORIENTATION, 1) == 1
        still = not getattr(image, "is_animated", False)
        return upright and still and not deep and not image.has_transparency_data


class Fitted(NamedTuple):
    """A picture brought to a size.

    Attributes:
        corner: (top, left) of what remains, in pixels of the picture after it was
            resized and before it was cropped, as SDXL's size vector wants it.
    """

    image: Image.Image
    corner: tuple[int, int]


def fit(
    image: Image.Image, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
) -> Fitted:
    """Resizes so that `size` is covered (bicubic), and crops what stands out.

    Args:
        image: RGB.
        size: (width, height) in pixels.
        place: where the crop lies between left and right, top and bottom, 0 to 1.
    """
    width, height = size
    scale = max(width / image.width, height / image.height)
    left = round((image.width * scale - width) * place[0])
    top = round((image.height * scale - height) * place[1])
    if image.size == size:
        return Fitted(image, (0, 0))
    fitted = ImageOps.fit(image, size, Image.Resampling.BICUBIC, 0.0, place)
    return Fitted(fitted, (top, left))


def shift(pixels: Pixels, right: int, down: int) -> Pixels:
    """Moves a picture by so many pixels, white moving in."""
    height, width = pixels.shape[:2]
    wide, high = abs(right), abs(down)
    frame = np.pad(pixels, ((high,) * 2, (wide,) * 2, (0, 0)), constant_values=255)
    top, left = high - down, wide - right
    return frame[top : top + height, left : left + width]
