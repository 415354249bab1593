"""The sampling loop: one program for all tables, and what it composes with."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from sdjax.config import ScheduleConfig
from sdjax.diffusion import (
    given_noise,
    initial_noise,
    keyed_noise,
    make_denoiser,
    sample,
    tableau,
)
from sdjax.typing import Conditioning

SD = ScheduleConfig()
SHAPE = (4, 3, 2)
KEYS = jax.random.split(jax.random.key(7), 5)
COMPILED = "/jax/core/compile/backend_compile_duration"
_counts: list[int] = []


def _count(event: str, _duration: float, **_: object) -> None:
    if event == COMPILED and _counts:
        _counts[-1] += 1


@pytest.fixture(autouse=True, scope="module")
def _listen():
    jax.monitoring.register_event_duration_secs_listener(_count)


@contextlib.contextmanager
def compilations():
    _counts.append(0)
    result = []
    yield result
    result.append(_counts.pop())


def network(x, t, conditioning):
    return jnp.tanh(x) + 0.1 * jnp.cos(t / 100)[:, None, None, None]


DENOISE = make_denoiser(network, Conditioning())


def draw(table, keys=KEYS, **arguments):
    x = initial_noise(keys, SHAPE)
    return sample(DENOISE, x, table, keyed_noise(keys, SHAPE), **arguments)


def test_one_program_runs_every_table():
    run = jax.jit(draw)
    tables = [
        tableau(SD, "ddim", 10),
        tableau(SD, "ddim", 10, eta=1.0),
        tableau(SD, "ddim", 50, strength=0.3),
        tableau(SD, "plms", 20),
        tableau(SD, "heun_karras", 20),
        tableau(SD, "dpmpp_sde", 7),
        tableau(SD, "unipc", 1000),
    ]
    drawn = []
    with compilations() as count:
        for table in tables:
            drawn.append(np.asarray(run(table, KEYS)))
    assert count == [1]
    assert len({x.tobytes() for x in drawn}) == len(tables)


@pytest.mark.parametrize("name", ["ddim", "euler_a", "unipc"])
def test_padding_changes_nothing(name):
    padded, exact = (tableau(SD, name, 9, pad=pad) for pad in (True, False))
    np.testing.assert_allclose(
        jax.jit(draw)(padded), jax.jit(draw)(exact), rtol=1e-6, atol=1e-6
    )


def test_an_exact_table_can_be_differentiated():
    table = tableau(SD, "dpmpp_2m_sde", 4, pad=False)
    noise = keyed_noise(KEYS, SHAPE)

    @jax.jit
    def loss(x):
        return jnp.sum(sample(DENOISE, x, table, noise) ** 2)

    x = initial_noise(KEYS, SHAPE)
    direction = initial_noise(KEYS[::-1], SHAPE)
    step = 1e-2
    change = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    slope = jax.jit(jax.grad(loss))(x)
    np.testing.assert_allclose(jnp.vdot(slope, direction), change, rtol=5e-3)


def test_noise_is_the_same_in_any_batch():
    together = initial_noise(KEYS, SHAPE), keyed_noise(KEYS, SHAPE)(jnp.int32(3))
    for i in (0, 3, 4):
        key = KEYS[i : i + 1]
        alone = initial_noise(key, SHAPE), keyed_noise(key, SHAPE)(jnp.int32(3))
        for one, many in zip(alone, together, strict=True):
            assert np.asarray(one[0]).tobytes() == np.asarray(many[i]).tobytes()
    assert not np.array_equal(*together)


def test_images_do_not_depend_on_their_batch():
    table = tableau(SD, "euler_a", 6)
    together = jax.jit(draw)(table)
    for i in range(5):
        alone = jax.jit(draw)(table, KEYS[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-5, atol=1e-6)


def test_each_row_draws_noise_of_its_own():
    table = tableau(SD, "ddpm", 5, pad=False)
    values = jnp.stack([keyed_noise(KEYS, SHAPE)(jnp.int32(k)) for k in range(5)])
    x = initial_noise(KEYS, SHAPE)
    by_hand = sample(DENOISE, x, table, given_noise(values))
    np.testing.assert_allclose(draw(table), by_hand, rtol=1e-6, atol=1e-6)


def test_rows_without_noise_draw_none():
    def noise(k):
        jax.debug.callback(drawn.append, k)
        return jnp.zeros((5, *SHAPE))

    drawn = []
    table = tableau(SD, "dpmpp_sde", 3)
    jax.block_until_ready(sample(DENOISE, initial_noise(KEYS, SHAPE), table, noise))
    jax.effects_barrier()
    assert sorted(map(int, drawn)) == [0, 1, 2, 3]  # the last of five draws none


def test_it_maps():
    table = tableau(SD, "heun", 5)
    scales = jnp.array([0.5, 1.0, 1.5])

    def at(scale):
        return draw(table._replace(init_scale=table.init_scale * scale))

    for mapped, scale in zip(jax.jit(jax.vmap(at))(scales), scales, strict=True):
        np.testing.assert_allclose(mapped, jax.jit(at)(scale), rtol=1e-5, atol=1e-6)


def test_shards_draw_what_one_device_draws():
    keys = jax.random.split(jax.random.key(1), 8)
    table = tableau(SD, "euler_a", 5)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), auto, devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec("data")
    run = functools.partial(draw, table)
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_allclose(sharded(keys), jax.jit(run)(keys), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pad", [True, False])
def test_every_row_is_told_and_can_be_the_last(pad):
    table = tableau(SD, "heun", 6, pad=pad)
    told = []

    def on_step(row, step, last):
        def host(row, step):
            told.append((int(row), int(step)))
            return np.bool_(row >= last)

        return io_callback(
            host, jax.ShapeDtypeStruct((), bool), row, step, ordered=True
        )

    whole = draw(table, on_step=functools.partial(on_step, last=99))
    jax.block_until_ready(whole)
    jax.effects_barrier()
    assert [row for row, _ in told] == list(range(11))
    assert [step for _, step in told] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    np.testing.assert_allclose(whole, jax.jit(draw)(table), rtol=1e-5, atol=1e-6)
    told.clear()
    jax.block_until_ready(draw(table, on_step=functools.partial(on_step, last=4)))
    jax.effects_barrier()
    assert len(told) == 5


def test_an_image_is_the_start_where_it_is_given():
    table = tableau(SD, "ddim", 10, strength=0.5)
    assert table.num_rows == 5
    x, x0 = initial_noise(KEYS, SHAPE), jnp.ones((5, *SHAPE))
    start = []

    def spy(x, level):
        start.append(x)
        return DENOISE(x, level)

    table = tableau(SD, "ddim", 10, strength=0.1, pad=False)
    with jax.disable_jit():
        sample(spy, x, table, keyed_noise(KEYS, SHAPE), x0=x0)
    alpha_bar = table.start_alpha**2
    expected = np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * x
    np.testing.assert_allclose(start[0], expected, rtol=1e-5, atol=1e-6)


def test_the_state_is_float32_whatever_is_given():
    table = tableau(SD, "ddim", 2)
    x = initial_noise(KEYS, SHAPE).astype(jnp.bfloat16)
    assert sample(DENOISE, x, table, keyed_noise(KEYS, SHAPE)).dtype == jnp.float32


def test_noise_is_the_same_with_64_bit_types_on():
    keys = jax.random.split(jax.random.key(0), 2)
    usual = initial_noise(keys, (2, 2, 1))
    with jax.enable_x64(True):
        wide = initial_noise(keys, (2, 2, 1))
    assert np.asarray(wide).tobytes() == np.asarray(usual).tobytes()
