"""Saving images: whole or not at all, and numbered ones over nothing."""

import contextlib
import errno
import os
import resource
import stat

import pytest
from test_recipe import IMAGE, RECIPE

from sdjax.errors import SdjaxError
from sdjax.recipe import check_writable, read_recipe, save_numbered_png, save_png


def test_numbered_files_never_replace(tmp_path):
    (tmp_path / "00007.png").write_bytes(b"kept")
    (tmp_path / "sdjax-0-00001.png").write_bytes(b"other series")
    (tmp_path / "x00090.png").write_bytes(b"no number")
    paths = [save_numbered_png(tmp_path, IMAGE, RECIPE) for _ in range(2)]
    paths.append(save_numbered_png(tmp_path, IMAGE, RECIPE, prefix="sdjax-0-"))
    names = [path.name for path in paths]
    assert names == ["00008.png", "00009.png", "sdjax-0-00002.png"]
    assert (tmp_path / "00007.png").read_bytes() == b"kept"
    assert len(os.listdir(tmp_path)) == 6


@pytest.mark.parametrize("links", [True, False])
def test_numbered_file_that_appears_meanwhile(tmp_path, monkeypatch, links):
    def no_link(source, target):
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    (tmp_path / "00000.png").write_bytes(b"kept")
    monkeypatch.setattr("sdjax.recipe._next_number", lambda folder, prefix: 0)
    assert save_numbered_png(tmp_path, IMAGE, RECIPE).name == "00001.png"
    assert (tmp_path / "00000.png").read_bytes() == b"kept"
    assert sorted(os.listdir(tmp_path)) == ["00000.png", "00001.png"]
    assert read_recipe(tmp_path / "00001.png") == RECIPE


def test_a_named_file_is_replaced_whole(tmp_path):
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    (tmp_path / "link.png").symlink_to(target)
    save_png(tmp_path / "link.png", IMAGE, RECIPE)
    assert read_recipe(target) == RECIPE
    assert (tmp_path / "link.png").is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def small_disk():
    """Lets no file grow past 500 bytes: the write really stops in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def saves(folder):
    yield lambda: save_png(folder / "a.png", IMAGE, RECIPE)
    yield lambda: save_numbered_png(folder, IMAGE, RECIPE)


def test_a_write_that_stops_leaves_no_half_png(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    for save in saves(tmp_path):
        with pytest.raises(SdjaxError, match=r"cannot write .*: File too large"):
            with small_disk():
                save()
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"


def test_a_full_disk_leaves_no_half_png(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for save in saves(tmp_path):
        with pytest.raises(SdjaxError, match=r"cannot write .*: No space left"):
            save()
    assert os.listdir(tmp_path) == []


def test_ctrl_c_leaves_no_half_png(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    for save in saves(tmp_path):
        with pytest.raises(KeyboardInterrupt):
            save()
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for folder in (tmp_path / "none", tmp_path / "file"):
        for save in (*saves(folder), lambda folder=folder: check_writable(folder)):
            with pytest.raises(SdjaxError, match=f"cannot write {folder}"):
                save()
    with pytest.raises(SdjaxError, match="Is a directory"):
        save_png(tmp_path / "folder.png", IMAGE, RECIPE)
    with pytest.raises(SdjaxError, match="File name too long"):
        save_png(tmp_path / ("x" * 300 + ".png"), IMAGE, RECIPE)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    for save in (*saves(tmp_path), lambda: check_writable(tmp_path)):
        with pytest.raises(SdjaxError, match="Permission denied"):
            save()


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "image", [IMAGE / 255, IMAGE[..., 0], IMAGE[None], IMAGE[..., :2]]
)
def test_images_are_uint8_rgb(tmp_path, image):
    with pytest.raises(SdjaxError, match=r"uint8 \[height, width, 3\]"):
        save_png(tmp_path / "a.png", image, RECIPE)
