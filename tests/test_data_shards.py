"""Any source becomes ArrayRecord shards that tensorflow-datasets reads too."""

import argparse
import logging

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pictures import encode, picture, pixels, tar, write_tars
from PIL import Image

from sdjax import data
from sdjax.cli import shards as command
from sdjax.data.pictures import decode
from sdjax.errors import SdjaxError


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """tensorflow-datasets says at each decoding that it would like OpenCV."""
    caplog.set_level(logging.ERROR, "absl")


def kinds() -> dict[str, bytes]:
    """Pictures of which some cannot be decoded in the same way by everybody."""
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = np.dstack([pixels(5), np.full((24, 20), 90, np.uint8)])
    return {
        "jpeg": picture(0, "JPEG"),
        "png": picture(1),
        "turned": encode(pixels(2), "JPEG", exif=exif),
        "webp": picture(3, "WEBP"),
        "cmyk": encode(Image.fromarray(pixels(4)).convert("CMYK"), "JPEG"),
        "transparent": encode(rgba),
        "grey": encode(Image.fromarray(pixels(6)[..., 0])),
        "deep": encode(Image.fromarray(pixels(7)[..., 0].astype(np.uint16) * 257)),
        "bits": encode(Image.fromarray(pixels(8)[..., 0] > 128)),
    }


def test_shards_read_as_their_source_by_us_and_by_tensorflow_datasets(tmp_path):
    members = [(f"{name}.jpg", file) for name, file in kinds().items()]
    members += [("png.txt", "naïve 猫".encode()), ("png.cls", b"3")]
    (tmp_path / "a.tar").write_bytes(tar(members))
    source = data.open_source(tmp_path / "a.tar")
    done = []
    written = data.write_shards(
        source, tmp_path / "out", shard_size=4, report=done.append
    )
    assert written == (9, []) and done[-1] == 9
    again = data.open_source(tmp_path / "out")
    plain = tfds.builder_from_directory(str(tmp_path / "out")).as_data_source("train")
    assert len(again) == len(plain) == len(source) == 9
    for index in range(9):
        ours, theirs, first = again[index], plain[index], source[index]
        assert (ours.key, ours.caption, ours.label) == (*first[:2], first.label)
        assert theirs["caption"].decode() == first.caption
        expected = decode(first.image, "a").image
        np.testing.assert_array_equal(decode(ours.image, "a").image, expected)
        np.testing.assert_array_equal(theirs["image"], expected)
        if first.key in ("jpeg", "png"):
            assert ours.image == first.image
    assert again.locate(8)[0].endswith("pictures-train.array_record-00002")


def test_a_reader_gives_the_same_from_tars_and_from_shards(tmp_path):
    (tmp_path / "tars").mkdir()
    write_tars(tmp_path / "tars")
    tars = data.open_source(tmp_path / "tars")
    data.write_shards(tars, tmp_path / "out")
    options = {"batch_size": 5, "resolution": 16, "seed": 1, "flip": 0.5}
    with (
        data.open_reader(tars, **options) as one,
        data.open_reader(data.open_source(tmp_path / "out"), **options) as other,
    ):
        for _ in range(6):
            ours, theirs = next(one), next(other)
            assert ours.keys == theirs.keys
            np.testing.assert_array_equal(ours.arrays["image"], theirs.arrays["image"])


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path):
    write_tars(tmp_path, (2,))
    source = data.open_source(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    for place in (tmp_path / "full", tmp_path / "full" / "a"):
        with pytest.raises(SdjaxError, match="exists already; nothing is overwritten"):
            data.write_shards(source, place)
    with pytest.raises(SdjaxError, match="none is not there"):
        data.write_shards(source, tmp_path / "none" / "out")

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        data.write_shards(source, tmp_path / "out", report=stop)
    (tmp_path / "00000.tar").write_bytes(tar([("a.png", b"x")]))
    with pytest.raises(SdjaxError, match=r"nothing in .* can be read"):
        data.write_shards(data.open_source(tmp_path), tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_says_what_it_skipped(tmp_path, capsys):
    members = [("a.png", picture(0)), ("b.png", b"x"), ("c.png", picture(1))]
    (tmp_path / "a.tar").write_bytes(tar(members))
    (tmp_path / "empty").mkdir()
    args = argparse.Namespace(
        source=str(tmp_path), destination=str(tmp_path / "empty"), no_progress=True
    )
    command.run(args)
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'empty'}\n"
    assert f"skipped in {tmp_path / 'a.tar'}: b cannot be read" in err
    assert "1 of 3 skipped" in err
    assert len(data.open_source(tmp_path / "empty")) == 2


def test_a_damaged_shard_names_itself(tmp_path):
    write_tars(tmp_path, (30,))
    data.write_shards(data.open_source(tmp_path), tmp_path / "out", shard_size=10)
    shard = tmp_path / "out" / "pictures-train.array_record-00001"
    whole = bytearray(shard.read_bytes())
    whole[2000:6000] = bytes(4000)
    shard.write_bytes(whole)
    source = data.open_source(tmp_path / "out")
    options = {"batch_size": 5, "resolution": 8, "seed": 0, "max_bad_share": 0.9}
    with data.open_reader(source, **options) as reader:
        keys = {key for _ in range(12) for key in next(reader).keys}
    others = {f"{n:09d}" for n in (*range(10), *range(20, 30))}
    assert others <= keys
    assert list(reader.skipped) == [str(shard)]


def test_datasets_of_other_kinds_are_refused(tmp_path):
    write_tars(tmp_path, (2,))
    data.write_shards(data.open_source(tmp_path), tmp_path / "out")
    info = tmp_path / "out" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(SdjaxError, match="only ArrayRecord files"):
        data.open_source(tmp_path / "out")
