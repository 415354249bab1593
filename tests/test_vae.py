import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recordings import assert_close, load

from sdjax import presets
from sdjax.config import AutoencoderConfig
from sdjax.models import Autoencoder, Posterior


@pytest.fixture(scope="module")
def recorded():
    return load("models_vae", AutoencoderConfig)


def encoder(config, dtype=jnp.float32):
    module = Autoencoder(config, dtype)
    return jax.jit(lambda v, x: module.apply(v, x, method="encode"))


def decoder(config, dtype=jnp.float32):
    module = Autoencoder(config, dtype)
    return jax.jit(lambda v, z: module.apply(v, z, method="decode"))


def test_recorded(recorded):
    config, variables, data = recorded
    posterior = encoder(config)(variables, data["images"])
    assert_close(posterior.mean, data["mean"])
    assert_close(posterior.logvar, data["logvar"])
    assert_close(decoder(config)(variables, data["mean"]), data["decoded"])


@pytest.mark.slow
def test_bfloat16_is_near(recorded):
    config, variables, data = recorded
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), variables)
    posterior = encoder(config, jnp.bfloat16)(variables, data["images"])
    assert posterior.mean.dtype == jnp.float32
    assert_close(posterior.mean, data["mean"], 0.05)
    images = decoder(config, jnp.bfloat16)(variables, data["mean"])
    assert images.dtype == jnp.float32
    assert_close(images, data["decoded"], 0.05)


@pytest.mark.slow
def test_call_is_the_reconstruction_and_jit_is_eager(recorded):
    config, variables, data = recorded
    out = Autoencoder(config).apply(variables, data["images"])
    assert_close(out, data["decoded"])


@pytest.mark.slow
def test_gradient_is_finite_and_reaches_every_parameter(recorded):
    config, variables, data = recorded
    module = Autoencoder(config)

    def loss(variables):
        posterior = module.apply(variables, data["images"], method="encode")
        latents = posterior.sample(jax.random.key(0))
        images = module.apply(variables, latents, method="decode")
        return jnp.square(images - data["images"]).mean() + posterior.kl().mean()

    for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(variables)):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_posterior():
    rng = np.random.default_rng(0)
    mean = rng.standard_normal((1, 60, 50, 2), np.float32)
    logvar = np.full(mean.shape, 2 * np.log(0.3), np.float32)
    posterior = Posterior(mean, logvar)
    z = (posterior.sample(jax.random.key(0)) - mean) / 0.3
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    np.testing.assert_array_equal(posterior.mode(), mean)
    # Of N(m, s) from N(0, 1): −ln s + (s² + m² − 1) / 2.
    terms = -np.log(0.3) + (0.3**2 + mean.astype(np.float64) ** 2 - 1) / 2
    np.testing.assert_allclose(posterior.kl(), [terms.sum()], rtol=1e-5)


def test_logvar_is_clipped(recorded):
    config, variables, data = recorded
    bias = np.full(8, 1000.0, np.float32)
    params = variables["params"]
    params = params | {"quant_conv": params["quant_conv"] | {"bias": bias}}
    posterior = encoder(config)({"params": params}, data["images"])
    assert posterior.logvar.max() == 20
    params = params | {"quant_conv": params["quant_conv"] | {"bias": -bias}}
    posterior = encoder(config)({"params": params}, data["images"])
    assert posterior.logvar.min() == -30


@pytest.mark.parametrize("name", ["KL_F4", "KL_F8", "KL_F16", "KL_F32"])
def test_sizes(name):
    config = dataclasses.replace(getattr(presets, name), layers_per_block=1)
    module, f = Autoencoder(config), config.downsample_factor
    assert f == int(name[4:])
    images = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    encode = lambda key, x: module.init_with_output(key, x, method="encode")[0]
    posterior = jax.eval_shape(encode, key, images)
    assert posterior.mean.shape == (1, 64 // f, 96 // f, config.latent_channels)
    decode = lambda key, x: module.init_with_output(key, x, method="decode")[0]
    assert jax.eval_shape(decode, key, posterior.mean).shape == images.shape
