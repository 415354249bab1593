"""The one program: what compiles it, what decides an image, what it composes with."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SD1, SDXL, tiny_model

import sdjax
from sdjax import parallel, runner

COMPILED = "/jax/core/compile/backend_compile_duration"
_counts: list[int] = []


def _count(event: str, _duration: float, **_: object) -> None:
    if event == COMPILED and _counts:
        _counts[-1] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


@contextlib.contextmanager
def compilations():
    """Counts XLA's compilations through JAX's own monitoring events."""
    _counts.append(0)
    result = []
    yield result
    result.append(_counts.pop())


def assert_close(got, want, tolerance=1e-5):
    assert np.max(np.abs(got - want)) <= tolerance * np.max(np.abs(want))


@pytest.mark.parametrize("config", [SD1, SDXL], ids=["sd1", "sdxl"])
def test_one_compilation_for_every_change_that_is_an_input(config):
    model = tiny_model(config)
    jax.clear_caches()
    drawn = []
    with compilations() as count:
        for change in [
            {},
            {"prompt": "another, much longer prompt"},
            {"negative_prompt": "blurry"},
            {"negative_prompt": ""},
            {"seed": 2**63 + 5},
            {"guidance_scale": 1.0},
            {"guidance_scale": 12},
            {"guidance_rescale": 0.7},
            {"num_inference_steps": 10},
            {"num_inference_steps": 20},
            {"num_inference_steps": 50},
            {"sampler": "ddim", "eta": 0.0},
            {"sampler": "ddim", "eta": 0.5},
            {"sampler": "ddim", "eta": 1.0},
            {"sampler": "euler_a"},
            {"sampler": "heun"},
            {"sampler": "dpmpp_2m_karras"},
            {"image_indices": [7]},
        ]:
            arguments = {"prompt": "a fox", "num_inference_steps": 2, **change}
            drawn.append(sdjax.generate(model=model, **arguments))
    assert count == [1]
    assert not np.array_equal(drawn[0], drawn[1])


def test_the_counter_counts():
    with compilations() as count:
        jax.jit(lambda x: x * 3.25)(jnp.ones(3)).block_until_ready()
    assert count[0] >= 1


def draw(prompts, **arguments):
    arguments = {"num_inference_steps": 3, "sampler": "euler_a", **arguments}
    return sdjax.generate(
        prompts, model=tiny_model(), output_type="latent", seed=3, **arguments
    )


def test_a_batch_is_its_images_alone():
    prompts = [f"prompt {i}" for i in range(8)]
    together = draw(prompts)
    for i, prompt in enumerate(prompts):
        alone = draw(prompt, image_indices=[i])
        assert_close(alone[0], together[i])


def test_order_of_prompts_does_not_matter():
    prompts = [f"prompt {i}" for i in range(8)]
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    shuffled = draw([prompts[i] for i in order], image_indices=order)
    assert_close(shuffled, draw(prompts)[order])


@pytest.mark.parametrize("batch", [8, pytest.param(16, marks=pytest.mark.slow), 5])
def test_eight_devices_draw_what_one_draws(batch):
    prompts = [f"prompt {i}" for i in range(batch)]
    one = draw(prompts, mesh=parallel.make_mesh(jax.devices()[:1]))
    eight = draw(prompts, mesh=parallel.make_mesh(jax.devices()))
    assert_close(eight, one)


def test_several_images_per_prompt_are_rows_of_the_prompt():
    both = draw(["a", "b"], num_images_per_prompt=2)
    second = draw("b", num_images_per_prompt=2, image_indices=[2, 3])
    assert_close(both[2:], second)


def test_a_typed_key_is_its_seed():
    by_key = sdjax.generate("a", model=tiny_model(), key=jax.random.key(5), **SHORT)
    by_seed = sdjax.generate("a", model=tiny_model(), seed=5, **SHORT)
    np.testing.assert_array_equal(by_key, by_seed)


SHORT = {"num_inference_steps": 2, "output_type": "latent"}


def prepare(**arguments):
    model = tiny_model()
    inputs, config = sdjax.prepare(
        ["a", "b"], model=model, num_inference_steps=2, **arguments
    )
    return model.params, inputs, config


def test_sample_works_under_grad():
    params, inputs, config = prepare(pad=False, output_type="latent", sampler="ddim")
    x = jax.random.normal(jax.random.key(0), (2, *config.latent_shape))

    @jax.jit
    def loss(x, scale):
        changed = inputs._replace(latents=x, guidance_scale=scale)
        return jnp.sum(sdjax.sample(params, changed, config=config) ** 2)

    scale = jnp.array([7.5, 7.5])
    slope = jax.grad(loss)(x, scale)
    direction = jax.random.normal(jax.random.key(1), x.shape)
    direction /= jnp.linalg.norm(direction)
    step = 1e-2
    change = loss(x + step * direction, scale) - loss(x - step * direction, scale)
    np.testing.assert_allclose(
        jnp.vdot(slope, direction), change / (2 * step), rtol=2e-2
    )


def test_sample_works_under_vmap():
    params, inputs, config = prepare(output_type="latent")
    scales = jnp.array([1.0, 4.0, 7.5])

    def at(scale):
        changed = inputs._replace(guidance_scale=jnp.full((2,), scale))
        return sdjax.sample(params, changed, config=config)

    mapped = jax.jit(jax.vmap(at))(scales)
    for row, scale in zip(mapped, scales, strict=True):
        assert_close(row, jax.jit(at)(scale))


def test_sample_works_under_pmap():
    params, inputs, config = prepare(output_type="latent")
    indices = np.arange(8, dtype=np.int32).reshape(4, 2)

    def at(indices):
        changed = inputs._replace(image_indices=indices)
        return sdjax.sample(params, changed, config=config)

    mapped = jax.pmap(at)(indices)
    plain = jax.jit(at)
    for row, pair in zip(mapped, indices, strict=True):
        assert_close(row, plain(pair))


def test_guidance_of_one_is_no_guidance():
    without = sdjax.generate("a", model=tiny_model(), guidance_scale=None, **SHORT)
    one = sdjax.generate("a", model=tiny_model(), guidance_scale=1.0, **SHORT)
    assert_close(one, without)


def test_bfloat16_draws_nearly_the_same():
    full = sdjax.generate("a", model=tiny_model(), **SHORT)
    half = sdjax.generate("a", model=tiny_model(), dtype="bfloat16", **SHORT)
    assert half.dtype == np.float32
    assert np.max(np.abs(full - half)) < 0.1 * np.max(np.abs(full))


def test_a_mesh_of_one_device_is_the_one_used():
    device = jax.devices()[3]
    mesh = parallel.make_mesh([device])
    inputs, config = sdjax.prepare("a", model=tiny_model(), num_inference_steps=1)
    images = runner.run_program(
        tiny_model().replicated(mesh),
        inputs,
        np.int32(0),
        config=config,
        mesh=mesh,
        platform=None,
    )
    assert images.devices() == {device}


def test_a_mesh_of_two_axes_draws_the_same():
    mesh = parallel.make_mesh(jax.devices(), fsdp=2)
    assert_close(draw(["a", "b", "c"], mesh=mesh), draw(["a", "b", "c"]))


def test_a_mesh_without_a_data_axis_is_refused():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    with pytest.raises(sdjax.SdjaxError, match="needs one named 'data'"):
        draw("a", mesh=mesh)


def test_generate_inside_jit_says_what_to_use():
    with pytest.raises(sdjax.SdjaxError, match="prepare outside"):
        jax.jit(lambda x: draw("a", latents=x))(jnp.zeros((1, 8, 8, 4)))
