"""Checkpoints: whole or not at all, and damage is named and passed over."""

import os
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.errors import SdjaxError
from sdjax.training.checkpoint import Checkpoints, named_leaves, refill
from sdjax.training.manifest import MANIFEST

TREE = {
    "params": {"conv_in": {"kernel": jnp.arange(6.0).reshape(2, 3)}},
    "opt_state": (jnp.int32(3), None, [jnp.array([True, False])]),
    "ema": jnp.array([1.5, -jnp.inf], jnp.bfloat16),
}


def save(folder, *steps, **options):
    with Checkpoints(folder, **{"keep": 9, **options}) as checkpoints:
        for step in steps:
            tree = jax.tree.map(lambda leaf, step=step: leaf + leaf.dtype.type(0), TREE)
            checkpoints.save(step, tree, {"step": step, "position": [1, {"a": "ü"}]})
        checkpoints.wait()
        return checkpoints.steps()


def restore(folder):
    with Checkpoints(folder, keep=9) as checkpoints:
        return checkpoints.restore()


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_saved_comes_back(tmp_path):
    assert restore(tmp_path) is None
    save(tmp_path, 7)
    restored = restore(tmp_path)
    assert restored.step == 7
    assert restored.run == {"step": 7, "position": [1, {"a": "ü"}]}
    again = refill(TREE, restored.arrays, "here")
    assert jax.tree.structure(again) == jax.tree.structure(TREE)
    wanted = named_leaves(TREE)
    for name, found in named_leaves(again).items():
        assert wanted[name].dtype == found.dtype
        assert np.asarray(wanted[name]).tobytes() == found.tobytes()


def test_the_newest_are_kept_and_the_multiples(tmp_path):
    assert save(tmp_path / "a", 1, 2, 3, 4, 5, keep=2) == [4, 5]
    assert save(tmp_path / "b", 1, 2, 3, 4, 5, keep=1, keep_every_steps=2) == [2, 4, 5]
    names = [path.name for path in (tmp_path / "a").iterdir()]
    assert sorted(names) == ["00000004", "00000005"]


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"x": jnp.zeros(100_000)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, tree, {})
        for _ in range(50):
            tree = add(tree)
    np.testing.assert_array_equal(restore(tmp_path).arrays["x"], 0)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_any_damaged_file_is_named_and_the_step_before_restored(tmp_path, damage):
    save(tmp_path / "once", 1, 2)
    for number, file in enumerate(files_of(tmp_path / "once" / "00000002")):
        folder = tmp_path / str(number)
        os.system(f"cp -r {tmp_path / 'once'} {folder}")
        victim = folder / file.relative_to(tmp_path / "once")
        data = bytearray(victim.read_bytes())
        if damage == "flipped":
            data[len(data) // 2] ^= 1
            victim.write_bytes(data)
        elif damage == "truncated":
            victim.write_bytes(data[:-1])
        else:
            victim.unlink()
        with pytest.warns(UserWarning, match="goes on from step 1") as caught:
            assert restore(folder).step == 1
        assert str(victim) in str(caught[0].message)
        assert sorted(os.listdir(folder)) == ["00000001", "damaged-00000002"]
        assert save(folder, 2) == [1, 2]


def test_nothing_but_damage_is_an_error(tmp_path):
    save(tmp_path, 1, 2)
    for step in ("00000001", "00000002"):
        (tmp_path / step / MANIFEST).write_bytes(b"{")
    with pytest.raises(SdjaxError, match=r"00000002.*00000001"):
        restore(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["00000001", "00000002"]


def test_what_killed_saves_leave_is_removed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".2.tmp" / "state").mkdir(parents=True)
    (tmp_path / ".1.old").mkdir()
    assert restore(tmp_path).step == 1
    assert os.listdir(tmp_path) == ["00000001"]


def test_a_full_disk_stops_and_keeps_what_was_there(tmp_path):
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoints = Checkpoints(tmp_path, keep=1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        noise = np.random.default_rng(0).standard_normal(100_000)
        checkpoints.save(2, {"x": noise}, {})
        with pytest.raises(SdjaxError, match=r"2.*disk is full.*1 is the last"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        checkpoints.__exit__(None)
    assert os.listdir(tmp_path) == ["00000001"]
    assert restore(tmp_path).step == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays: arrays.pop("ema"), "lacks 'ema'"),
        (lambda arrays: arrays.update(more=np.zeros(1)), "unknown array 'more'"),
        (lambda arrays: arrays.update(ema=np.zeros(3)), r"ema is float64 \(3,\)"),
    ],
)
def test_a_state_of_another_shape_is_refused(change, said):
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(TREE).items()}
    change(arrays)
    with pytest.raises(SdjaxError, match=said):
        refill(TREE, arrays, "here")
