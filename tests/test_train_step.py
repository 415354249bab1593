"""What a step promises besides its arithmetic: parts, average, gate, compilation."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from training_cases import BARE, make_batch, random_params, train_config

from sdjax.parallel import make_mesh, replicate
from sdjax.training.diffusion import init_state, make_train_step

KEY = jax.random.key(7)
QUICKLY = {"xla_backend_optimization_level": 0}  # compiles in a third of the time
PLAIN = {"learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.2}


def bare_batch(seed=0):
    return make_batch(text=None, size=8, seed=seed)


@functools.cache
def config(**changes):
    return train_config(BARE, **PLAIN, **changes)


@functools.cache
def step(**changes):
    """A compiled step that donates its state; changes are of the config."""
    train_step = make_train_step(config(**changes))
    return jax.jit(train_step, donate_argnums=0, compiler_options=QUICKLY)


def start(**changes):
    return init_state(config(**changes), random_params(BARE))


def on_host(tree):
    return jax.tree.map(np.array, tree)


def assert_close(a, b, rtol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=rtol * np.abs(b).max() + 1e-12
        ),
        a,
        b,
    )


def test_ten_steps_compile_once_and_free_what_they_are_given():
    state = first = start()
    for n in range(10):
        state, metrics = step()(state, bare_batch(n), KEY)
        assert metrics["finite"] == 1
    assert step()._cache_size() == 1
    assert int(state.step) == 10
    leaves = jax.tree.leaves((first.params, first.opt_state, first.ema))
    assert all(leaf.is_deleted() for leaf in leaves)


def test_a_step_follows_from_state_batch_and_key_alone():
    results = [on_host(step()(start(), bare_batch(), key)) for key in (KEY, KEY)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    _, other = step()(start(), bare_batch(), jax.random.key(8))
    assert other["loss"] != results[0][1]["loss"]


def test_the_average_in_closed_form():
    state, seen = start(), []
    seen.append(on_host(state.params))
    for n in range(4):
        state, _ = step()(state, bare_batch(n), KEY)
        seen.append(on_host(state.params))
    expected = seen[0]
    for n, params in enumerate(seen[1:], 1):
        decay = min(0.2, (1 + n) / (10 + n))
        mix = lambda e, p, decay=decay: decay * e + (1 - decay) * p
        expected = jax.tree.map(mix, expected, params)
    assert_close(on_host(state.ema), expected, 1e-6)


def test_a_batch_that_is_not_finite_leaves_all_but_the_count():
    state, _ = step()(start(), bare_batch(), KEY)
    before = on_host(state)
    bad = bare_batch(1)
    bad["moments"][3, 2, 1, 0] = np.nan
    state, metrics = step()(state, bad, KEY)
    assert metrics["finite"] == 0 and not np.isfinite(metrics["loss"])
    after = on_host(state)
    assert after.step == before.step + 1
    jax.tree.map(
        np.testing.assert_array_equal,
        after._replace(step=0),
        before._replace(step=0),
    )
    # The next update is the second: it has the second learning rate, not the third.
    _, metrics = step()(state, bare_batch(2), KEY)
    np.testing.assert_allclose(metrics["learning_rate"], 0.5e-2, rtol=1e-6)


@pytest.mark.slow
def test_accumulation_changes_nothing():
    changes = {"accumulation": 4, "offset_noise": 0.1, "min_snr_gamma": 5.0}
    whole = changes | {"accumulation": 1}
    (a, got), (b, expected) = (
        on_host(step(**c)(start(**c), bare_batch(), KEY)) for c in (changes, whole)
    )
    np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(got["grad_norm"], expected["grad_norm"], rtol=1e-5)
    # Adam's first moment is a tenth of the gradient.
    moments = [state.opt_state[1][0].mu for state in (a, b)]
    assert_close(*moments, 1e-4)


@pytest.mark.slow
def test_over_eight_devices_it_is_the_step_of_the_whole_batch():
    mesh = make_mesh()
    assert mesh.shape["data"] == 8
    over_devices = NamedSharding(mesh, PartitionSpec("data"))
    batch = jax.device_put(bare_batch(), over_devices)
    state, metrics = step()(replicate(start(), mesh), batch, KEY)
    single, expected = step()(start(), bare_batch(), KEY)
    assert_close(on_host(metrics), on_host(expected), 1e-5)
    assert_close(on_host(state.opt_state), on_host(single.opt_state), 1e-4)


def traced(**changes):
    """The program of a step, as text."""
    begin = functools.partial(init_state, config(**changes))
    state = jax.eval_shape(begin, random_params(BARE))
    return str(
        jax.make_jaxpr(make_train_step(config(**changes)))(state, bare_batch(), KEY)
    )


def test_the_dtype_of_the_networks():
    programs = [traced(dtype=name) for name in ("float32", "bfloat16")]
    convolutions = [
        [line for line in program.splitlines() if "conv_general_dilated[" in line]
        for program in programs
    ]
    assert all(lines for lines in convolutions)
    assert all("f32[" in line for line in convolutions[0])
    assert all("bf16[" in line for line in convolutions[1])
    assert "precision=(Precision.HIGHEST" in programs[0]


def test_rematerialisation_is_asked_for():
    counts = [traced(remat=on).count("remat") for on in (False, True)]
    assert counts[0] == 0 < counts[1]
