import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.config import AutoencoderConfig, ModelConfig
from sdjax.errors import SdjaxError
from sdjax.models import Autoencoder
from sdjax.models.discriminator import init_discriminator
from sdjax.models.lpips import abstract_lpips
from sdjax.training.autoencoder import (
    _optimizer,
    init_state,
    make_train_step,
    posterior_noise,
)
from sdjax.training.autoencoder_gradient import autoencoder_gradients
from sdjax.training.config import (
    AutoencoderLossConfig,
    OptimizerConfig,
    TrainConfig,
)
from sdjax.training.scaling_factor import measure_scaling_factor, with_scaling_factor

CONFIG = TrainConfig(
    task="autoencoder",
    model=ModelConfig(
        vae=AutoencoderConfig(
            block_out_channels=(8, 8),
            layers_per_block=1,
            attention_levels=(False, False),
            norm_num_groups=4,
        )
    ),
    autoencoder=AutoencoderLossConfig(discriminator_start=1, discriminator_layers=1),
    optimizer=OptimizerConfig(learning_rate=1e-3, b1=0.5, b2=0.9, weight_decay=0),
)
KEY = jax.random.key(3)
BATCH = {"image": np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)}


def changed(config=CONFIG, **parts):
    """The config with fields of its parts changed."""
    new = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in parts.items()
    }
    return dataclasses.replace(config, **new)


def vae_params(config=CONFIG):
    module = Autoencoder(config.model.vae)
    shapes = jax.eval_shape(module.init, KEY, jnp.zeros((1, 4, 4, 3)))["params"]
    return draw(shapes)


def draw(shapes):
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        values = rng.standard_normal(shape.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return values * np.prod(shape.shape[:-1]) ** -0.5
        return 0.1 * values + (path[-1].key == "scale")

    return jax.tree.map_with_path(leaf, shapes)


def gradients(config, frozen=None):
    params = {
        "vae": vae_params(config),
        "discriminator": init_discriminator(0, num_layers=1),
    }
    images = np.float32(BATCH["image"]) / np.float32(127.5) - 1
    noise = posterior_noise(KEY, jnp.int32(0), images.shape, config)
    apply = lambda params, frozen: autoencoder_gradients(
        params, frozen, images, noise, step=jnp.int32(1), config=config
    )
    return jax.jit(apply)(params, frozen or {})


def assert_near(ours, theirs, tolerance):
    """Leaf by leaf, against the largest leaf of the tree: sums cancel in some."""
    scale = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(theirs))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * scale


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture(scope="module")
def step():
    return jax.jit(make_train_step(CONFIG))


def test_the_discriminator_waits_for_its_start(step):
    before = init_state(CONFIG, {"vae": vae_params()})
    assert set(before.params) == {"vae", "discriminator"} and not before.frozen
    first, metrics = step(before, BATCH, KEY)
    assert metrics["adversarial"] == metrics["discriminator_loss"] == 0
    assert equal(first.params["discriminator"], before.params["discriminator"])
    assert not equal(first.params["vae"], before.params["vae"])
    second, metrics = step(first, BATCH, KEY)
    assert abs(metrics["adversarial"]) > 0 and metrics["discriminator_loss"] > 0
    assert not equal(second.params["discriminator"], first.params["discriminator"])
    assert int(second.step) == 2 and metrics["finite"] == 1
    assert metrics["learning_rate"] == np.float32(1e-3)
    assert step._cache_size() == 1


def test_what_is_not_finite_changes_nothing(step):
    vae = vae_params()
    vae["encoder"]["conv_in"]["bias"] = np.full(8, np.nan, np.float32)
    before = init_state(CONFIG, {"vae": vae})
    after, metrics = step(before, BATCH, KEY)
    assert metrics["finite"] == 0 and int(after.step) == 1
    leaves = zip(jax.tree.leaves(after[1:]), jax.tree.leaves(before[1:]), strict=True)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in leaves)


def test_each_network_is_clipped_alone():
    optimizer = _optimizer(changed(optimizer={"clip_norm": 1.0, "epsilon": 1.0}))
    params = {"vae": {"kernel": jnp.ones(4)}, "discriminator": {"kernel": jnp.ones(4)}}
    state = optimizer.init(params)
    huge = params | {"vae": {"kernel": jnp.full(4, 1e6)}}
    alone, _ = optimizer.update(params, state, params)
    beside, _ = optimizer.update(huge, state, params)
    assert equal(alone, beside)  # all are longer than 1 and point the same way
    # Gradients of length 1: 0.5 each, and Adam's step is g / (|g| + ε).
    step = -CONFIG.optimizer.learning_rate * 0.5 / 1.5
    np.testing.assert_allclose(alone["discriminator"]["kernel"], np.full(4, step), 1e-5)


def test_without_a_discriminator_there_is_none():
    config = changed(autoencoder={"discriminator_weight": 0.0})
    state = init_state(config, {"vae": vae_params(), "unet": {}})
    assert set(state.params) == set(state.ema) == {"vae"} and not state.frozen


@pytest.mark.parametrize(
    ("parts", "batch", "message"),
    [
        ({"accumulation": 3}, BATCH, "accumulation is 3, but a batch of 8"),
        ({}, {"image": BATCH["image"][:, :, :13]}, "must be a multiple of 2"),
        ({}, {"moments": 0}, "needs 'image', and has moments"),
        ({}, {"image": np.float32(BATCH["image"])}, "float32, but must be uint8"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(parts, batch, message):
    config = changed(optimizer=parts)
    state = init_state(config, {"vae": vae_params()})
    with pytest.raises(SdjaxError, match=message):
        jax.eval_shape(make_train_step(config), state, batch, KEY)


def test_perceptual_loss_wants_colours():
    vae = dataclasses.replace(CONFIG.model.vae, in_channels=1)
    config = changed(model={"vae": vae}, autoencoder={"perceptual_path": "x"})
    with pytest.raises(SdjaxError, match=r"vae\.in_channels is 1"):
        init_state(config, {"vae": {}})


def test_scaling_factor():
    images = BATCH["image"]
    batches = [{"image": images}, {"image": images // 2}, {"image": 255 - images // 8}]
    params = vae_params()
    factor = measure_scaling_factor({"vae": params}, batches, CONFIG)
    module = Autoencoder(CONFIG.model.vae)
    encode = jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))
    latents = []
    for i, batch in enumerate(batches):
        posterior = encode(np.float32(batch["image"]) / np.float32(127.5) - 1)
        key = jax.random.fold_in(jax.random.key(CONFIG.seed), i)
        latents.append(np.ravel(posterior.sample(key)))
    expected = 1 / np.concatenate(latents).std(dtype=np.float64)
    np.testing.assert_allclose(factor, expected, rtol=1e-5)
    new = with_scaling_factor(CONFIG, factor)
    assert new.model.vae.scaling_factor == factor
    assert with_scaling_factor(new, CONFIG.model.vae.scaling_factor) == CONFIG
    with pytest.raises(SdjaxError, match="at least one batch"):
        measure_scaling_factor({"vae": params}, [], CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_accumulation_and_remat_change_nothing(reduction):
    lpips = {"lpips": draw(abstract_lpips())}
    whole = changed(autoencoder={"reduction": reduction})
    expected, metrics = gradients(whole, lpips)
    parts = changed(whole, optimizer={"accumulation": 4})
    parts = dataclasses.replace(parts, remat=True)
    found, others = gradients(parts, lpips)
    for name in metrics:
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-4, atol=1e-5)
    assert_near(found["vae"], expected["vae"], 1e-5)
    assert_near(found["discriminator"], expected["discriminator"], 1e-5)


@pytest.mark.slow
def test_bfloat16_is_near():
    expected, metrics = gradients(CONFIG)
    half, others = gradients(dataclasses.replace(CONFIG, dtype="bfloat16"))
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=0.02)
    assert_near(half["vae"], expected["vae"], 0.1)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half))


@pytest.mark.slow
def test_a_sharded_batch_is_the_whole_batch(step):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda tree, *axes: jax.device_put(
        tree, jax.NamedSharding(mesh, jax.P(*axes))
    )
    alone, spread = (init_state(CONFIG, {"vae": vae_params()}) for _ in range(2))
    spread = place(spread)
    for _ in range(2):
        alone, expected = step(alone, BATCH, KEY)
        spread, metrics = step(spread, place(BATCH, "data"), KEY)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-3, atol=1e-5)
    assert_near(spread.params, alone.params, 1e-4)


@pytest.mark.slow
def test_a_vq_autoencoder_learns_its_codebook_too():
    vae = dataclasses.replace(CONFIG.model.vae, codebook_size=16)
    config = changed(
        model={"vae": vae},
        autoencoder={"reduction": "mean", "discriminator_weight": 0.0},
    )
    state = init_state(config, {"vae": vae_params(config)})
    step = jax.jit(make_train_step(config))
    losses = []
    for _ in range(30):
        before = state
        state, metrics = step(state, BATCH, KEY)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    moved = jax.tree.map(np.array_equal, state.params["vae"], before.params["vae"])
    assert not moved["quantize"]["embedding"]["embedding"]
