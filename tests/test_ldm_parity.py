"""VQ autoencoders and U-Nets without context against diffusers, tiny and random."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import torch
from checkpoints import SD1, TOKENIZERS, draw
from torch_params import to_params, torch_plain_unet, torch_vq

from sdjax import weights
from sdjax.config import AutoencoderConfig, UNetConfig
from sdjax.models import Autoencoder, UNet
from sdjax.typing import Conditioning

pytestmark = pytest.mark.parity

VQ = AutoencoderConfig(
    latent_channels=3,
    block_out_channels=(32, 32, 64),
    layers_per_block=1,
    attention_levels=(False,) * 3,
    codebook_size=50,
)
VQS = {
    "f4": VQ,
    "f4_noattn": dataclasses.replace(VQ, mid_attention=False, norm_num_groups=16),
    "f8": dataclasses.replace(
        VQ,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 64),
        attention_levels=(False, False, False, True),
    ),
}
PLAIN = UNetConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 64, 96),
    transformer_depth=(0, 1, 1),
    plain_attention=True,
    num_heads=(1, 2, 3),
    cross_attention_only=(False,) * 3,
)
UNETS = {
    "plain": PLAIN,
    "groups": dataclasses.replace(PLAIN, norm_num_groups=16, layers_per_block=1),
    "scale_shift": dataclasses.replace(PLAIN, scale_shift_norm=True),
    "resampling": dataclasses.replace(
        PLAIN, scale_shift_norm=True, resnet_resampling=True
    ),
    "bare_middle": dataclasses.replace(
        PLAIN, transformer_depth=(0, 0, 0), mid_transformer_depth=0
    ),
}


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error < tolerance


@pytest.mark.parametrize("name", VQS)
def test_vq_autoencoder(name):
    config = VQS[name]
    reference, module = torch_vq(config), Autoencoder(config)
    params = {"params": to_params(reference)}
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 48, 32, 3)).astype(np.float32)
    run = lambda method, x, **given: module.apply(params, x, method=method, **given)
    with torch.no_grad():
        z = reference.encode(nchw(images)).latents
        snapped, _, (_, _, indices) = reference.quantize(z)
        decoded = reference.decode(z).sample
        unsnapped = reference.decode(z, force_not_quantize=True).sample
    posterior = run("encode", images)
    assert_close(posterior.mean, nhwc(z))
    # Certain: sampling it adds nothing at all.
    sampled = posterior.sample(jax.random.key(0))
    np.testing.assert_array_equal(sampled, posterior.mean)
    codes = run("nearest_codes", nhwc(z))
    np.testing.assert_array_equal(codes.indices, indices.reshape(codes.indices.shape))
    assert len(np.unique(codes.indices)) > 10
    assert_close(codes.latents, nhwc(snapped))
    assert_close(codes.codes, nhwc(snapped))
    assert_close(run("decode", nhwc(z)), nhwc(decoded))
    assert_close(run("decode", nhwc(z), snap=False), nhwc(unsnapped))
    difference = np.abs(nhwc(decoded - unsnapped)).max() / np.abs(nhwc(decoded)).max()
    assert difference > 0.01


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_diffusers_reads_the_folder_of_a_vq_model(tmp_path):
    config = dataclasses.replace(SD1, vae=VQS["f4_noattn"])
    params = draw(config)
    weights.write(tmp_path / "model", config, params, TOKENIZERS, format="diffusers")
    theirs, report = diffusers.VQModel.from_pretrained(
        tmp_path / "model" / "vae", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    z = np.random.default_rng(0).standard_normal((1, 4, 6, 3), np.float32)
    with torch.no_grad():
        expected = theirs.decode(nchw(z)).sample
    ours = Autoencoder(config.vae).apply({"params": params["vae"]}, z, method="decode")
    assert_close(ours, nhwc(expected))
    assert theirs.config.scaling_factor == config.vae.scaling_factor


def test_gradients_of_the_vq_loss():
    config = VQS["f4"]
    reference, module = torch_vq(config), Autoencoder(config)
    params = to_params(reference)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 8, 6, 3), np.float32)
    weights = rng.standard_normal((2, 8, 6, 3), np.float32)
    leaf = nchw(z).requires_grad_()
    latents, theirs, _ = reference.quantize(leaf)
    ((latents * nchw(weights)).mean() + theirs).backward()

    def loss(book, z):
        tree = {"params": params | {"quantize": {"embedding": {"embedding": book}}}}
        codes = module.apply(tree, z, method="nearest_codes")
        still = jax.lax.stop_gradient
        q = ((still(codes.codes) - z) ** 2).mean()
        q += 0.25 * ((codes.codes - still(z)) ** 2).mean()
        return (codes.latents * weights).mean() + q

    book = params["quantize"]["embedding"]["embedding"]
    by_book, by_z = jax.grad(loss, (0, 1))(book, z)
    assert_close(by_z, nhwc(leaf.grad))
    assert_close(by_book, reference.quantize.embedding.weight.grad.numpy())


@pytest.mark.parametrize("name", UNETS)
def test_unet_without_context(name):
    config = UNETS[name]
    reference = torch_plain_unet(config)
    params = {"params": to_params(reference)}
    rng = np.random.default_rng(0)
    t = np.array([981.0, 3.5], np.float32)
    x = rng.standard_normal((2, 16, 8, 3), np.float32)
    with torch.no_grad():
        expected = reference(nchw(x), torch.tensor(t)).sample
    out = jax.jit(UNet(config).apply)(params, x, t, Conditioning())
    assert_close(out, nhwc(expected))
