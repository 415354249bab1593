import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.training import autoencoder_loss as loss


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_pixel_distance():
    x = np.zeros((2, 2, 2, 3), np.float32)
    y = np.stack([np.full((2, 2, 3), 0.5), np.full((2, 2, 3), -3)]).astype(np.float32)
    np.testing.assert_array_equal(loss.pixel_distance(x, y, "l1"), [0.5, 3])
    np.testing.assert_array_equal(loss.pixel_distance(x, y, "l2"), [0.25, 9])


def test_codebook_loss_moves_latents_and_codes_apart():
    z, codes = arrays((2, 3, 3, 4), (2, 3, 3, 4))
    value = loss.codebook_loss(z, codes)
    squares = np.square(z - codes).mean((1, 2, 3))
    np.testing.assert_allclose(value, 1.25 * squares, rtol=1e-6)
    total = lambda z, codes: loss.codebook_loss(z, codes).sum()
    to_z, to_codes = jax.grad(total, (0, 1))(z, codes)
    np.testing.assert_allclose(to_z, 2 * (z - codes) / 36, rtol=1e-5)
    np.testing.assert_allclose(to_codes, 0.25 * 2 * (codes - z) / 36, rtol=1e-5)


def test_hinge_loss():
    # A margin of 1 on either side is enough.
    sure = jnp.full((1, 1, 1, 1), 2.0)
    assert loss.hinge_loss(sure, -sure) == 0
    assert loss.hinge_loss(0 * sure, 0 * sure) == 1
    assert loss.hinge_loss(-sure, sure) == 3
    assert loss.generator_loss(sure) == -2


@pytest.mark.parametrize(
    ("reconstruction", "generator", "expected"),
    [
        (3.0, 1.5 - 1e-4, 1.0),
        (0.0, 1.0, 0.0),
        (10.0, 0.0, 5000.0),
        (1.0, 9999.9999, 5e-5),
    ],
)
def test_adaptive_weight(reconstruction, generator, expected):
    value = loss.adaptive_weight(jnp.array(reconstruction), jnp.array(generator), 0.5)
    np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.parity
def test_codebook_loss_as_diffusers():
    torch = pytest.importorskip("torch")
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    quantizer = vae.VectorQuantizer(16, 4, beta=0.25, legacy=True)
    (z,) = arrays((2, 3, 3, 4))
    theirs = torch.tensor(z).permute(0, 3, 1, 2).requires_grad_(True)
    quantized, expected, _ = quantizer(theirs)
    expected.backward()
    codes = quantized.detach().permute(0, 2, 3, 1).numpy()
    ours = lambda z: loss.codebook_loss(z, codes).mean()
    value, gradient = jax.value_and_grad(ours)(z)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    their_gradient = theirs.grad.permute(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, their_gradient, rtol=1e-5, atol=1e-8)
