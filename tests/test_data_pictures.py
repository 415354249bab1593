"""Pictures of every kind come out as RGB, upright, on white, in the wanted size."""

import numpy as np
import pytest
from pictures import encode, pixels
from PIL import Image, ImageOps, features

from sdjax.data import pictures
from sdjax.data.pictures import decode, fit, is_plain, shift
from sdjax.errors import SdjaxError

WHITE = (255, 255, 255)


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(decode(data, "a").image)


def test_lossless_formats_give_their_pixels():
    image = pixels(0)
    for format in ("PNG", "BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(decoded(encode(image, format)), image)
    np.testing.assert_array_equal(decoded(encode(image, "WEBP", lossless=True)), image)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_give_about_their_pixels(format):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = pixels(1)
    error = decoded(encode(image, format, quality=95)).astype(float) - image
    assert np.abs(error).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation):
    # What each orientation means, from the EXIF standard: where row 0, column 0 are.
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    image = pixels(2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = decode(encode(image, exif=exif), "a")
    np.testing.assert_array_equal(np.asarray(result.image), undo(image))
    assert result.size == result.image.size


def transparent_kinds() -> dict[str, bytes]:
    """Pictures of one colour whose left half is transparent."""
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:, 2:] = (0, 0, 0, 255)
    full = Image.fromarray(rgba)
    palette = Image.fromarray(np.repeat([[0, 0, 1, 1]], 4, 0).astype(np.uint8), "P")
    palette.putpalette([9, 9, 9, 0, 0, 0])
    grey = Image.fromarray(np.repeat([[7, 7, 0, 0]], 4, 0).astype(np.uint8))
    colour = grey.convert("RGB")
    bits = Image.fromarray(rgba[..., 3] == 0)
    return {
        "RGBA": encode(full),
        "LA": encode(full.convert("LA")),
        "P": encode(palette, transparency=0),
        "GIF": encode(palette, "GIF", transparency=0),
        "L with a transparent value": encode(grey, transparency=7),
        "RGB with a transparent value": encode(colour, transparency=(7, 7, 7)),
        "WEBP": encode(full, "WEBP", lossless=True),
        "1": encode(bits),  # white and black, and nothing transparent
    }


@pytest.mark.parametrize("kind", transparent_kinds())
def test_transparency_becomes_white(kind):
    result = decoded(transparent_kinds()[kind])
    assert (result[:, :2] == 255).all()
    assert (result[:, 2:] == 0).all()


def test_half_transparent_pixels_are_blended():
    rgba = np.full((2, 2, 4), (200, 100, 0, 51), np.uint8)
    expected = 255 + (np.array([200, 100, 0]) - 255) * 51 / 255
    np.testing.assert_allclose(decoded(encode(rgba))[0, 0], expected, atol=1)


def test_sixteen_bits_are_scaled_and_not_cut_off():
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    for format in ("PNG", "TIFF"):
        result = decoded(encode(Image.fromarray(values), format))
        np.testing.assert_array_equal(result[..., 0], np.round(values / 257))


def test_cmyk_becomes_rgb():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for format in ("JPEG", "TIFF"):
        red = decoded(encode(cmyk, format)).reshape(-1, 3).mean(0)
        assert red[0] > 220 and red[1] < 40 and red[2] < 40


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_counts(format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decoded(data)[0, 0], (255, 0, 0))
    assert not is_plain(data)


def test_a_large_jpeg_may_come_out_smaller_but_not_too_small():
    image = pixels(3, height=400, width=1200)
    result = decode(encode(image, "JPEG", quality=95), "a", shortest=48)
    assert result.size == (1200, 400)
    assert result.image.size == (300, 100)
    small = np.asarray(result.image.resize((12, 4), Image.Resampling.BOX))
    direct = np.asarray(Image.fromarray(image).resize((12, 4), Image.Resampling.BOX))
    assert np.abs(small.astype(float) - direct).mean() < 3


def test_plain_files_are_told_from_others():
    image = pixels(4)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert is_plain(encode(image)) and is_plain(encode(image, "JPEG"))
    assert not is_plain(encode(image, "WEBP"))
    assert not is_plain(encode(image, exif=exif))
    assert not any(map(is_plain, transparent_kinds().values()))
    assert not is_plain(encode(Image.new("CMYK", (4, 4)), "JPEG"))


@pytest.mark.parametrize("place", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("size", [(16, 16), (20, 10), (8, 24)])
def test_fit_equals_resizing_and_cropping(size, place):
    image = Image.fromarray(pixels(5, height=90, width=60))
    result = fit(image, size, place)
    scale = max(size[0] / 60, size[1] / 90)
    whole = image.resize(
        (round(60 * scale), round(90 * scale)), Image.Resampling.BICUBIC
    )
    top, left = result.corner
    cropped = whole.crop((left, top, left + size[0], top + size[1]))
    difference = np.asarray(result.image).astype(float) - np.asarray(cropped)
    # At the border of the crop, bicubic sees what is beyond it or does not.
    assert np.abs(difference)[1:-1, 1:-1].max() <= 8
    expected = ImageOps.fit(image, size, Image.Resampling.BICUBIC, 0, place)
    np.testing.assert_array_equal(result.image, expected)


def test_extreme_shapes_do_not_blow_up():
    assert fit(Image.new("RGB", (1, 60_000)), (32, 32)).image.size == (32, 32)


@pytest.mark.parametrize("right,down", [(0, 0), (3, 0), (-2, 5), (4, -1)])
def test_shift_moves_white_in(right, down):
    image = pixels(6)
    result = shift(image, right, down)
    expected = np.full_like(image, 255)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            if 0 <= y + down < image.shape[0] and 0 <= x + right < image.shape[1]:
                expected[y + down, x + right] = image[y, x]
    np.testing.assert_array_equal(result, expected)


def test_more_pixels_than_the_limit_are_not_decoded(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    with pytest.raises(SdjaxError, match=r"^a\.png: 20×24 pixels are more than 100$"):
        decode(encode(pixels(0)), "a.png")
    monkeypatch.setattr(pictures, "MAX_BYTES", 10)
    with pytest.raises(SdjaxError, match="bytes are more than 10"):
        decode(encode(pixels(0)), "a.png")
