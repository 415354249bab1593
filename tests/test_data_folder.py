"""Folders of pictures and captions, as people have them."""

import logging
import pickle

import pytest
from pictures import picture

from sdjax import data
from sdjax.data.sample import BadSampleError
from sdjax.errors import SdjaxError


def captions(source: data.Source) -> dict[str, str]:
    read = [source[index] for index in range(len(source))]
    return {sample.key: sample.caption for sample in read}


def write_pictures(folder, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))


def test_captions_lie_beside_pictures(tmp_path, caplog):
    write_pictures(
        tmp_path, "b.png", "a.PNG", "deep/in/c.png", "d.e.png", ".hidden.png"
    )
    (tmp_path / "a.txt").write_text("\ufeffa cat\n", encoding="utf-8")
    (tmp_path / "deep/in/c.txt").write_text("ein Bär", encoding="utf-8")
    (tmp_path / "d.e.txt").write_text("dots")
    (tmp_path / "notes.md").write_text("no picture")
    with caplog.at_level(logging.WARNING):
        source = data.open_source(tmp_path)
    assert captions(source) == {
        "a.PNG": "a cat",
        "b.png": "",
        "d.e.png": "dots",
        "deep/in/c.png": "ein Bär",
    }
    assert "1 of 4 pictures have no caption" in caplog.text and "b.png" in caplog.text
    assert source[1].image == picture(0) and source[1].label is None
    assert captions(pickle.loads(pickle.dumps(source))) == captions(source)


@pytest.mark.parametrize(
    "table,content",
    [
        (
            "metadata.jsonl",
            '{"file_name": "x/a.png", "text": "one, two", "label": 4}\n\n',
        ),
        (
            "captions.jsonl",
            '{"file_name": "x/a.png", "caption": "one, two", "label": 4}',
        ),
        ("metadata.csv", 'file_name,text,label\nx/a.png,"one, two",4\n'),
        ("captions.csv", 'label,caption,file_name\n4,"one, two",x/a.png\n'),
    ],
)
def test_captions_come_from_a_table(tmp_path, table, content):
    write_pictures(tmp_path, "x/a.png", "x/b.png", "c.png")
    (tmp_path / "x/a.txt").write_text("the table has precedence")
    (tmp_path / "x/b.txt").write_text("beside")
    (tmp_path / table).write_text(content)
    source = data.open_source(tmp_path)
    assert captions(source) == {"c.png": "", "x/a.png": "one, two", "x/b.png": "beside"}
    assert source[1].label == 4


def test_subfolders_are_classes(tmp_path, caplog):
    write_pictures(tmp_path, "dog/1.png", "cat/1.png", "cat/2.png", "eel/1.png")
    source = data.open_source(tmp_path)
    labels = {source[i].key: source[i].label for i in range(4)}
    assert labels == {"cat/1.png": 0, "cat/2.png": 0, "dog/1.png": 1, "eel/1.png": 2}
    assert not caplog.records
    with data.open_reader(source, batch_size=4, resolution=8, seed=0) as reader:
        batch = next(reader)
    assert batch.arrays["label"].tolist() == [labels[key] for key in batch.keys]


def test_a_picture_that_is_not_there_is_named(tmp_path):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,gone\na.png,here\n")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    write_pictures(tmp_path, "c.png")
    source = data.open_source(tmp_path)
    assert source.locate(1) == (str(tmp_path), "b.png")
    with pytest.raises(BadSampleError, match=r"^b\.png is not there"):
        source[1]
    with pytest.raises(BadSampleError, match=r"^c\.png: its caption is not UTF-8"):
        source[2]


@pytest.mark.parametrize(
    "table,content,message",
    [
        (
            "metadata.jsonl",
            '{"file_name": "../a.png", "text": ""}',
            "leaves the folder",
        ),
        ("metadata.jsonl", '{"file_name": "/a.png", "text": ""}', "leaves the folder"),
        ("metadata.jsonl", '{"text": "a"}', "must have file_name and text"),
        ("metadata.jsonl", '["a.png"]', "must have file_name and text"),
        ("metadata.jsonl", "{", "metadata.jsonl is not JSON"),
        ("metadata.jsonl", "[" * 100_000, "metadata.jsonl is not JSON"),
        ("metadata.csv", "a,b\n1,2\n", "must have file_name and text"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", "cannot read .*csv"),
        ("metadata.csv", "file_name,text,label\na.png,b,cat\n", "label 'cat' of a.png"),
    ],
)
def test_tables_that_are_wrong_are_refused(tmp_path, table, content, message):
    write_pictures(tmp_path, "a.png")
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / table).write_bytes(raw)
    with pytest.raises(SdjaxError, match=message):
        data.open_source(tmp_path)


def test_what_is_at_the_path_is_said(tmp_path):
    with pytest.raises(SdjaxError, match="is empty: name a folder"):
        data.open_source("")
    with pytest.raises(SdjaxError, match="nowhere is not there"):
        data.open_source(tmp_path / "nowhere")
    with pytest.raises(SdjaxError, match=r"holds no pictures: expected \.tar"):
        data.open_source(tmp_path)
    (tmp_path / "a.png").write_bytes(picture(0))
    with pytest.raises(SdjaxError, match=r"is a file, but no \.tar"):
        data.open_source(tmp_path / "a.png")
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(SdjaxError, match="is no dataset of tensorflow-datasets"):
        data.open_source(tmp_path)
