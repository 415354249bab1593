"""What is kept between processes, and who may write to it."""

import pathlib

import pytest

from sdjax import cache


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE_DIR", str(tmp_path / "cache"))


def counting(answers):
    remaining = iter(answers)
    return lambda: next(remaining)


def test_an_answer_is_remembered_until_a_file_changes(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "a").write_bytes(b"1")
    compute = counting(["first", "second", "third"])
    ask = lambda: cache.remembered(str(model), "what", compute)
    assert [ask(), ask()] == ["first", "first"]
    (model / "a").write_bytes(b"22")
    assert [ask(), ask()] == ["second", "second"]
    (model / "b").write_bytes(b"")
    assert ask() == "third"


def test_another_question_has_another_answer(tmp_path):
    compute = counting(["first", "second"])
    assert cache.remembered(str(tmp_path), "a", compute) == "first"
    assert cache.remembered(str(tmp_path), "b", compute) == "second"


def test_without_a_cache_every_answer_is_computed(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE_DIR", "")
    compute = counting(["first", "second"])
    ask = lambda: cache.remembered(str(tmp_path), "what", compute)
    assert [ask(), ask()] == ["first", "second"]


def test_a_folder_that_others_can_write_is_not_used(tmp_path):
    folder = tmp_path / "cache" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="chmod 700"):
        assert cache.private_folder("compiled") is None


def test_a_cache_that_cannot_be_made_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SDJAX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="Not a directory"):
        assert cache.private_folder("compiled") is None


def test_the_folder_is_private():
    folder = cache.private_folder("compiled")
    assert isinstance(folder, pathlib.Path)
    assert folder.stat().st_mode & 0o777 == 0o700
