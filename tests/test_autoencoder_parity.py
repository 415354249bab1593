"""Steps of autoencoder training against torch: losses, gradients, parameters."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import torch
from torch_first_stage import PatchGAN, losses, random_lpips
from torch_params import randomise, to_params, torch_autoencoder

from sdjax.config import AutoencoderConfig, ModelConfig
from sdjax.training.autoencoder import init_state, make_train_step, posterior_noise
from sdjax.training.autoencoder_gradient import autoencoder_gradients
from sdjax.training.config import (
    AutoencoderLossConfig,
    OptimizerConfig,
    TrainConfig,
)
from sdjax.weights.lpips_file import read_lpips

pytestmark = [pytest.mark.parity, pytest.mark.slow]

STEPS = 3
CONFIG = TrainConfig(
    task="autoencoder",
    model=ModelConfig(
        vae=AutoencoderConfig(
            block_out_channels=(16, 32),
            layers_per_block=1,
            attention_levels=(False, False),
            norm_num_groups=4,
        )
    ),
    autoencoder=AutoencoderLossConfig(
        kl_weight=1e-2,
        perceptual_weight=0.7,
        perceptual_path="given",
        discriminator_weight=0.8,
        discriminator_start=1,
        discriminator_layers=2,
    ),
    optimizer=OptimizerConfig(
        learning_rate=1e-4, b1=0.5, b2=0.9, weight_decay=0.0, clip_norm=None
    ),
    ema_decay=0.3,
    steps=STEPS,
)
KEY = jax.random.key(7)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def with_loss(config=CONFIG, **changes):
    changed = dataclasses.replace(config.autoencoder, **changes)
    return dataclasses.replace(config, autoencoder=changed)


def to_torch(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def noise(step, config=CONFIG):
    return posterior_noise(KEY, step, PIXELS.shape, config)


def close(ours, theirs, tolerance):
    """Leaf by leaf, relative to the leaf's norm."""
    pairs = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    for (path, a), b in pairs:
        name = jax.tree_util.keystr(path)
        # Scores move by the same for all keys: this gradient is rounding alone.
        if "['to_k']['bias']" not in name:
            error = np.linalg.norm(np.asarray(a) - np.asarray(b))
            assert error <= tolerance * np.linalg.norm(b), name


class Reference:
    """The same training in torch."""

    def __init__(self, config):
        self.config = config
        self.vae = torch_autoencoder(config.model.vae).train()
        self.discriminator = randomise(PatchGAN(2), seed=1).train()
        self.lpips = random_lpips()
        adam = lambda m: torch.optim.Adam(m.parameters(), 1e-4, (0.5, 0.9), 1e-8)
        self.optimizers = adam(self.vae), adam(self.discriminator)

    def gradients(self, step):
        settings = self.config.autoencoder
        gate = float(step >= settings.discriminator_start)
        has_lpips = settings.perceptual_path is not None
        images = to_torch(PIXELS).float() / 127.5 - 1
        total, hinge, weight = losses(
            self.vae,
            self.discriminator if settings.discriminator_weight else None,
            self.lpips if has_lpips else None,
            images,
            to_torch(noise(step)),
            settings,
            gate,
        )
        for module, loss in ((self.vae, total), (self.discriminator, hinge)):
            if loss is not None:
                parameters = list(module.parameters())
                found = torch.autograd.grad(loss, parameters, retain_graph=True)
                for p, g in zip(parameters, found, strict=True):
                    p.grad = g
        return total, hinge, weight

    def step(self, number):
        found = self.gradients(number)
        for optimizer in self.optimizers:
            optimizer.step()
        return [x.item() for x in found]

    def params(self):
        vae, discriminator = to_params(self.vae), to_params(self.discriminator)
        trees = {"vae": vae, "discriminator": discriminator}
        return jax.tree.map(np.array, trees)

    def gradient_trees(self):
        kept = {id(p): p.data for m in self.modules() for p in m.parameters()}
        for module in self.modules():
            for p in module.parameters():
                p.data = p.grad
        trees = self.params()
        for module in self.modules():
            for p in module.parameters():
                p.data = kept[id(p)]
        return trees

    def modules(self):
        return self.vae, self.discriminator


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    file = tmp_path_factory.mktemp("lpips") / "lpips.pth"
    torch.save(random_lpips().state_dict(), file)
    return read_lpips(file)


def gradients_of(config):
    return jax.jit(
        lambda params, frozen, images, noise, step: autoencoder_gradients(
            params, frozen, images, noise, step=step, config=config
        )
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pixel": "l2", "reduction": "mean"},
        {"discriminator_weight": 0.0, "perceptual_path": None},
    ],
    ids=["whole", "mean", "plain"],
)
def test_losses_and_gradients(changes, lpips):
    config = with_loss(**changes)
    reference = Reference(config)
    total, hinge, weight = reference.gradients(1)
    images = np.float32(PIXELS) / np.float32(127.5) - 1
    params = reference.params()
    if not config.autoencoder.discriminator_weight:
        del params["discriminator"]
    frozen = {"lpips": lpips} if config.autoencoder.perceptual_path else {}
    with jax.default_matmul_precision("highest"):
        ours, metrics = gradients_of(config)(params, frozen, images, noise(1), 1)
    np.testing.assert_allclose(metrics["loss"], total.item(), rtol=1e-6)
    if hinge is not None:
        found = metrics["discriminator_loss"], metrics["adaptive_weight"]
        np.testing.assert_allclose(found, [hinge.item(), weight.item()], rtol=1e-5)
        close(ours, reference.gradient_trees(), 1e-4)
    else:
        for p in reference.discriminator.parameters():
            p.grad = torch.zeros_like(p)
        close(ours["vae"], reference.gradient_trees()["vae"], 1e-4)


def test_three_steps(lpips):
    reference = Reference(CONFIG)
    params = reference.params()
    state = init_state(CONFIG, params | {"lpips": lpips})
    step = jax.jit(make_train_step(CONFIG))
    average = params
    for n in range(STEPS):
        state, metrics = step(state, {"image": PIXELS}, KEY)
        total, hinge, weight = reference.step(n)
        np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
        np.testing.assert_allclose(metrics["discriminator_loss"], hinge, rtol=1e-5)
        np.testing.assert_allclose(metrics["adaptive_weight"], weight, rtol=1e-4)
        share = 1 - min(0.3, (2 + n) / (11 + n))
        mix = lambda e, p, share=share: e + share * (p - e)
        average = jax.tree.map(mix, average, reference.params())
        assert metrics["finite"] == 1 and int(state.step) == n + 1
    close(state.params, reference.params(), 1e-5)
    close(state.ema, average, 1e-5)
    moved = state.params["discriminator"]["main_0"]["kernel"]
    assert not np.allclose(moved, params["discriminator"]["main_0"]["kernel"], 1e-5)


def test_vq_against_diffusers():
    vae = dataclasses.replace(CONFIG.model.vae, codebook_size=12)
    config = dataclasses.replace(CONFIG, model=ModelConfig(vae=vae))
    config = with_loss(
        config,
        reduction="mean",
        perceptual_path=None,
        discriminator_weight=0.0,
        codebook_weight=0.6,
    )
    theirs = diffusers.VQModel(
        block_out_channels=vae.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
    )
    theirs = randomise(theirs).train()
    theirs.quantize.legacy = True
    x = to_torch(PIXELS).float() / 127.5 - 1
    z, loss, _ = theirs.quantize(theirs.quant_conv(theirs.encoder(x)))
    out = theirs.decoder(theirs.post_quant_conv(z))
    total = (x - out).abs().mean() + 0.6 * loss
    total.backward()

    def tree():
        params = to_params(theirs)
        book = theirs.quantize.embedding.weight.numpy(force=True).copy()
        params["quantize"] = {"embedding": {"embedding": book}}
        return {"vae": jax.tree.map(np.array, params)}

    params = tree()
    for p in theirs.parameters():
        p.data = p.grad
    images = np.float32(PIXELS) / np.float32(127.5) - 1
    with jax.default_matmul_precision("highest"):
        found = gradients_of(config)(params, {}, images, noise(0), 0)
    np.testing.assert_allclose(found[1]["loss"], total.item(), rtol=1e-6)
    np.testing.assert_allclose(found[1]["codebook"], loss.item(), rtol=1e-5)
    close(found[0], tree(), 1e-4)
