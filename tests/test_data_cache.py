"""What networks make of samples is written once, and read as they would make it."""

import json

import numpy as np
import pytest
from pictures import picture, samples, tar, write_tars

from sdjax import data
from sdjax.errors import SdjaxError


def encode_images(images: np.ndarray) -> np.ndarray:
    assert images.dtype == np.uint8 and len(images) == 4
    return np.repeat(images[:, ::8, ::8, :1] / np.float32(255), 8, axis=-1)


def encode_captions(captions: list[str]) -> dict[str, np.ndarray]:
    assert len(captions) == 4
    lengths = np.array([len(caption) for caption in captions], np.float32)
    context = np.tile(lengths[:, None, None], (1, 3, 5))
    return {"context": context, "pooled": -context[:, 0, :2]}


SETTINGS = {
    "encode_images": encode_images,
    "encode_captions": encode_captions,
    "resolution": 16,
    "made_with": "a model",
    "batch_size": 4,
    "shard_size": 5,
}


@pytest.fixture
def tars(tmp_path):
    (tmp_path / "tars").mkdir()
    write_tars(tmp_path / "tars")
    return data.open_source(tmp_path / "tars")


def by_key(reader: data.Reader, batches: int) -> dict[str, dict[str, np.ndarray]]:
    rows = {}
    for _ in range(batches):
        arrays, keys = next(reader)
        for row, key in enumerate(keys):
            rows[key] = {name: value[row] for name, value in arrays.items()}
    return rows


def test_a_cache_gives_what_the_networks_give(tars, tmp_path):
    done = []
    path = tmp_path / "cache"
    written = data.write_cache(tars, path, **SETTINGS, report=done.append)
    assert written == (13, []) and done == [5, 10, 13]
    cache = data.open_source(path)
    options = {"batch_size": 13, "resolution": 16, "seed": 0, "sizes": True}
    options |= {"caption_dropout": 0.0}
    with (
        data.open_reader(tars, **options) as direct,
        data.open_reader(cache, **options, tokenize=None) as cached,
    ):
        pictures, made = by_key(direct, 1), by_key(cached, 1)
    assert pictures.keys() == made.keys()
    for key, arrays in made.items():
        image = np.repeat(pictures[key]["image"][None], 4, 0)
        caption = encode_captions([f"caption {int(key)}"] * 4)
        np.testing.assert_array_equal(arrays["moments"], encode_images(image)[0])
        np.testing.assert_array_equal(arrays["context"], caption["context"][0])
        np.testing.assert_array_equal(arrays["pooled"], caption["pooled"][0])
        np.testing.assert_array_equal(arrays["size"], pictures[key]["size"])
        assert "image" not in arrays and arrays["moments"].dtype == np.float32


def test_dropped_captions_have_the_states_of_the_empty_one(tars, tmp_path):
    data.write_cache(tars, tmp_path / "cache", **SETTINGS)
    options = {"batch_size": 13, "resolution": 16, "seed": 0, "caption_dropout": 0.5}
    with data.open_reader(data.open_source(tmp_path / "cache"), **options) as reader:
        batches = [next(reader).arrays for _ in range(20)]
    dropped = np.concatenate([b["context"][:, 0, 0] == 0 for b in batches])
    assert abs(dropped.mean() - 0.5) < 4 * 0.5 / np.sqrt(260)
    for batch in batches:
        np.testing.assert_array_equal(batch["pooled"], -batch["context"][:, 0, :2])


def test_without_text_states_captions_are_tokens_still(tars, tmp_path):
    settings = SETTINGS | {"encode_captions": None}
    data.write_cache(tars, tmp_path / "cache", **settings)
    seen = []

    def tokenize(captions: list[str]) -> dict[str, np.ndarray]:
        seen.extend(captions)
        return {"text_encoder": np.zeros((len(captions), 2), np.int32)}

    cache = data.open_source(tmp_path / "cache")
    options = {"batch_size": 13, "resolution": 16, "seed": 0, "caption_dropout": 0.0}
    templates = {"caption_templates": ("a {}",)}
    with data.open_reader(cache, tokenize=tokenize, **options, **templates) as reader:
        batch = next(reader)
    assert set(batch.arrays) == {"moments", "tokens"}
    assert seen == [f"a caption {int(key)}" for key in batch.keys]


def test_a_stopped_call_goes_on_where_it_was(tars, tmp_path):
    path, calls = tmp_path / "cache", []

    def dying(images: np.ndarray) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 4:  # in the second shard
            raise KeyboardInterrupt
        return encode_images(images)

    with pytest.raises(KeyboardInterrupt):
        data.write_cache(tars, path, **SETTINGS | {"encode_images": dying})
    with pytest.raises(SdjaxError, match="cache that is not whole"):
        data.open_source(path)
    with pytest.raises(SdjaxError, match=r"begun with other data.* plan\.json"):
        data.write_cache(tars, path, **SETTINGS | {"made_with": "another model"})
    data.write_cache(tars, path, **SETTINGS | {"encode_images": dying})
    assert len(calls) == 4 + 2 + 1  # shards of 5, 5 and 3 in batches of 4
    data.write_cache(tars, tmp_path / "at once", **SETTINGS)
    one, other = (data.open_source(p) for p in (path, tmp_path / "at once"))
    for index in range(13):
        assert one[index].key == other[index].key
        np.testing.assert_equal(dict(one[index].arrays), dict(other[index].arrays))
    assert not list(path.glob(".*"))


def test_bad_samples_are_left_out_and_shapes_may_differ(tmp_path):
    members = [("bad.png", b"x"), *samples(0, 3)]
    members += [("wide.png", picture(3, height=16, width=64)), ("wide.cls", b"2")]
    (tmp_path / "a.tar").write_bytes(tar(members))
    source = data.open_source(tmp_path / "a.tar")
    settings = SETTINGS | {"resolution": 32, "bucket_step": 8, "shard_size": 1}
    count, skipped = data.write_cache(source, tmp_path / "cache", **settings)
    assert count == 4 and [one[1] for one in skipped] == ["bad"]
    cache = data.open_source(tmp_path / "cache")
    shapes = {cache[i].key: cache[i].arrays["moments"].shape for i in range(4)}
    assert shapes.pop("wide") == (2, 8, 8)
    assert set(shapes.values()) <= {(4, 4, 8), (5, 3, 8), (4, 3, 8), (5, 4, 8)}
    assert {cache[i].key: cache[i].label for i in range(4)}["wide"] == 2


@pytest.mark.parametrize(
    "options",
    [
        {"flip": 0.5},
        {"crop": "random"},
        {"shift": 1},
        {"resolution": 8},
        {"caption_templates": ("a {}",)},
    ],
)
def test_what_a_cache_has_settled_cannot_be_asked_for(tars, tmp_path, options):
    data.write_cache(tars, tmp_path / "cache", **SETTINGS)
    cache = data.open_source(tmp_path / "cache")
    wanted = {"batch_size": 4, "resolution": 16, "seed": 0} | options
    name = next(iter(options))
    with pytest.raises(SdjaxError, match=f"^{name} is .* cache .* was written with"):
        data.open_reader(cache, **wanted)


def test_a_cache_is_not_written_over_anything(tars, tmp_path):
    with pytest.raises(SdjaxError, match="exists already"):
        data.write_cache(tars, tmp_path / "tars", **SETTINGS)
    data.write_cache(tars, tmp_path / "cache", **SETTINGS)
    cache = data.open_source(tmp_path / "cache")
    for write in (data.write_shards, lambda s, p: data.write_cache(s, p, **SETTINGS)):
        with pytest.raises(SdjaxError, match="is a cache"):
            write(cache, tmp_path / "again")


def test_damage_to_a_cache_is_named(tars, tmp_path):
    path = tmp_path / "cache"
    data.write_cache(tars, path, **SETTINGS)
    done = json.loads((path / "cache.json").read_text())
    (path / "cache.json").write_text(json.dumps(done | {"count": 14}))
    with pytest.raises(SdjaxError, match="has 13 samples, but says 14"):
        data.open_source(path)
    (path / "cache.json").write_text(json.dumps(done | {"shards": 4}))
    with pytest.raises(SdjaxError, match=r"cache .* is damaged"):
        data.open_source(path)
    (path / "cache.json").write_text("{")
    with pytest.raises(SdjaxError, match=r"cache .* is damaged"):
        data.open_source(path)
