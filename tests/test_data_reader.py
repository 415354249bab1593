"""Batches: once an epoch, the same after a restart, and bad samples left out."""

import collections
import json
import threading
import time

import numpy as np
import pytest
from pictures import picture, pixels, samples, tar, write_tars

from sdjax import data
from sdjax.errors import SdjaxError

OPTIONS = {
    "resolution": 16,
    "seed": 5,
    "crop": "random",
    "shift": 2,
    "flip": 0.5,
    "caption_dropout": 0.3,
    "caption_templates": ("{}", "a picture of {}"),
}


def tokenize(captions: list[str]) -> dict[str, np.ndarray]:
    """Characters, padded with zeros."""
    rows = [[*caption.encode()[:40], *[0] * 40][:40] for caption in captions]
    return {"text_encoder": np.array(rows, np.int32)}


def open_reader(folder, **options) -> data.Reader:
    wanted = {"batch_size": 4, "tokenize": tokenize} | OPTIONS | options
    return data.open_reader(data.open_source(folder), **wanted)


def take(reader: data.Reader, count: int) -> list[data.Batch]:
    return [next(reader) for _ in range(count)]


def assert_same(ours: data.Batch, theirs: data.Batch) -> None:
    assert ours.keys == theirs.keys
    assert ours.arrays.keys() == theirs.arrays.keys()
    for name in ours.arrays:
        np.testing.assert_equal(ours.arrays[name], theirs.arrays[name])


@pytest.fixture
def shards(tmp_path):
    write_tars(tmp_path)  # 13 samples
    return tmp_path


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_every_sample_comes_once_an_epoch(shards, hosts):
    epochs, rows = 4, 4 // hosts
    keys: list[list[str]] = []
    for host in range(hosts):
        with open_reader(shards, host_index=host, host_count=hosts) as reader:
            batches = take(reader, 13 * epochs // 4)
        shapes = {batch.arrays["image"].shape for batch in batches}
        assert shapes == {(rows, 16, 16, 3)}
        keys.append([batch.keys for batch in batches])
    together = [
        key for step in zip(*keys, strict=True) for part in step for key in part
    ]
    orders = [tuple(together[start : start + 13]) for start in range(0, 52, 13)]
    assert all(set(order) == {f"{n:09d}" for n in range(13)} for order in orders)
    assert len(set(orders)) == epochs  # each is shuffled anew
    with open_reader(shards) as reader:
        alone = [key for batch in take(reader, 13) for key in batch.keys]
    assert together == alone  # the batch does not depend on the number of hosts


def test_a_restart_goes_on_at_every_step(shards):
    with open_reader(shards) as reader:
        batches, states = [], [json.dumps(reader.get_state())]
        for _ in range(12):
            batches.append(next(reader))
            states.append(json.dumps(reader.get_state()))
    for step, state in enumerate(states[:-1]):
        with open_reader(shards) as other:
            other.set_state(json.loads(state))
            assert json.dumps(other.get_state()) == state
            assert_same(next(other), batches[step])
            assert json.dumps(other.get_state()) == states[step + 1]
    with open_reader(shards) as other:
        other.set_state(json.loads(states[3]))
        for batch in batches[3:]:
            assert_same(next(other), batch)


def test_a_used_reader_can_be_set_back(shards):
    with open_reader(shards) as reader:
        start = reader.get_state()
        first = take(reader, 5)
        reader.set_state(start)
        for batch in first:
            assert_same(next(reader), batch)


def test_draws_depend_on_seed_epoch_and_sample_alone(shards):
    def by_key(**options) -> dict[str, np.ndarray]:
        with open_reader(shards, **options) as reader:
            return {
                key: image
                for batch in take(reader, 13 // options.get("batch_size", 4))
                for key, image in zip(batch.keys, batch.arrays["image"], strict=True)
            }

    one, other = by_key(batch_size=1), by_key(batch_size=13)
    assert one.keys() == other.keys()
    assert all((one[key] == other[key]).all() for key in one)
    reseeded = by_key(batch_size=13, seed=6)
    assert sum((one[key] == reseeded[key]).all() for key in one) < 3


def test_neighbouring_seeds_share_no_epoch(shards):
    def epochs(seed: int) -> set[tuple[str, ...]]:
        with open_reader(shards, batch_size=13, seed=seed) as reader:
            return {tuple(batch.keys) for batch in take(reader, 6)}

    assert not epochs(0) & epochs(1)


def test_batches_hold_what_was_asked_for(shards):
    plain = {"crop": "center", "shift": 0, "flip": 0.0, "caption_dropout": 0.0}
    templates = {"caption_templates": ("<{}>",)}
    with open_reader(shards, **plain, **templates, sizes=True) as reader:
        batch = next(reader)
    image, tokens = batch.arrays["image"], batch.arrays["tokens"]["text_encoder"]
    assert image.dtype == np.uint8 and tokens.dtype == np.int32
    for row, key in enumerate(batch.keys):
        whole = pixels(int(key))  # 24 high, 20 wide; 16 / 20 of it are 19 by 16
        assert abs(image[row].mean() - whole[2:22].mean()) < 6
        text = bytes(tokens[row][tokens[row] > 0].tolist()).decode()
        assert text == f"<caption {int(key)}>"
    expected = np.tile([24, 20, 2, 0, 16, 16], (4, 1))
    np.testing.assert_array_equal(batch.arrays["size"], expected)


def test_shares_of_dropout_flip_and_templates(shards):
    with open_reader(shards, batch_size=13, caption_dropout=0.25) as reader:
        batches = take(reader, 30)
    texts = [
        bytes(row[row > 0].tolist()).decode()
        for batch in batches
        for row in batch.arrays["tokens"]["text_encoder"]
    ]
    kinds = collections.Counter(text[:1] for text in texts)
    assert set(kinds) == {"", "c", "a"}
    # Four deviations of a binomial of 390.
    assert abs(kinds[""] - 390 * 0.25) < 4 * np.sqrt(390 * 0.25 * 0.75)
    assert abs(kinds["a"] - kinds["c"]) < 4 * np.sqrt(390 * 0.75)
    with open_reader(shards, batch_size=13, shift=0, crop="center") as reader:
        seen = collections.defaultdict(set)
        for batch in take(reader, 12):
            for key, image in zip(batch.keys, batch.arrays["image"], strict=True):
                seen[key].add(image.tobytes())
    assert {len(kinds) for kinds in seen.values()} == {2}  # as it is and mirrored


@pytest.mark.slow
def test_workers_change_nothing(shards):
    bad = [("bad.png", b"no picture"), *samples(13, 3)]
    (shards / "00009.tar").write_bytes(tar(bad))
    alone = open_reader(shards, max_bad_share=1.0)
    helped = open_reader(shards, max_bad_share=1.0, num_workers=2)
    with alone, helped:
        for _ in range(12):
            assert_same(next(alone), next(helped))
            assert alone.get_state() == helped.get_state()
        state = alone.get_state()
        assert alone.skipped == helped.skipped == {str(shards / "00009.tar"): ["bad"]}
    with open_reader(shards, max_bad_share=1.0, num_workers=3) as other, alone:
        other.set_state(state)
        assert_same(next(other), next(alone))


def test_closing_ends_every_thread(shards):
    before = threading.active_count()
    with open_reader(shards) as reader:
        take(reader, 3)
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)  # Grain tells its threads to end, and does not wait
    assert threading.active_count() <= before


def test_buckets_make_batches_of_one_shape_and_lose_nothing(tmp_path):
    sides = [(16, 64), (64, 16), (40, 40)]
    members = [
        (f"{n}.png", picture(n, height=sides[n % 3][0], width=sides[n % 3][1]))
        for n in range(12)
    ]
    (tmp_path / "a.tar").write_bytes(tar(members))
    options = {"resolution": 32, "bucket_step": 8, "shift": 0}
    with open_reader(tmp_path, **options) as reader:
        batches, states = [], []
        for _ in range(15):
            batches.append(next(reader))
            states.append(json.dumps(reader.get_state()))
    shapes = {batch.arrays["image"].shape for batch in batches}
    assert shapes == {(4, 16, 64, 3), (4, 64, 16, 3), (4, 32, 32, 3)}
    counts = collections.Counter(key for batch in batches for key in batch.keys)
    waiting = collections.Counter()
    read = json.loads(states[-1])["position"]
    assert len(json.loads(states[-1])["waiting"]) == read - 60
    assert sum((counts + waiting).values()) == 60
    assert all(abs(counts[str(n)] - read / 12) <= 2 for n in range(12))
    for step in range(14):
        with open_reader(tmp_path, **options) as other:
            other.set_state(json.loads(states[step]))
            assert_same(next(other), batches[step + 1])
            assert json.dumps(other.get_state()) == states[step + 1]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 3, "host_count": 2}, "batch_size 3 is not divisible by 2"),
        ({"host_index": 2, "host_count": 2}, "host 2 of 2"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"caption_dropout": -0.1}, "caption_dropout is -0.1"),
        ({"caption_templates": ("a",)}, "each must have a {}"),
        ({"crop": "left"}, "crop is 'left'"),
        ({"resolution": 0}, "resolution is 0"),
        ({"shift": 16}, "shift 16"),
        ({"bucket_step": 5}, "resolution 16 and bucket_step 5"),
        ({"bucket_step": 4, "host_count": 2}, "one host only"),
        ({"num_workers": -1}, "num_workers -1"),
        ({"max_bad_share": 2}, "max_bad_share 2"),
    ],
)
def test_arguments_out_of_range_are_named(shards, options, message):
    with pytest.raises(SdjaxError, match=message):
        open_reader(shards, **options)


@pytest.mark.parametrize("change", [{"seed": 6}, {"batch_size": 2}])
def test_the_state_of_another_run_is_refused(shards, change):
    with open_reader(shards) as reader:
        state = reader.get_state()
    with (
        open_reader(shards, **change) as other,
        pytest.raises(SdjaxError, match=r"position in the data is of (seed|rows)"),
    ):
        other.set_state(state)
