"""The diffusion step against torch: loss, gradients, AdamW, warm-up, clipping, EMA.

The reference is diffusers and transformers in float64 with torch's optimizer; noise
and times are drawn here as docs/training.md says, and handed to it.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import torch
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from torch_params import (
    to_params,
    torch_autoencoder,
    torch_text_encoder,
    torch_unet,
)
from training_cases import TEXT, UNET, VAE, make_batch, train_config

from sdjax.training.diffusion import (
    diffusion_loss,
    draw,
    init_state,
    make_train_step,
)

pytestmark = pytest.mark.parity

KEY = jax.random.key(3)
STEP = 4  # whose times have a signal-to-noise ratio on both sides of 5
CASES = {
    "epsilon": {},
    "v": {"prediction_type": "v_prediction"},
    "x0": {"prediction_type": "sample"},
    "epsilon_l1": {"loss": "l1"},
    "v_huber": {"prediction_type": "v_prediction", "loss": "huber", "huber_c": 0.1},
    "epsilon_min_snr": {"min_snr_gamma": 5.0},
    "v_min_snr_zero_snr": {
        "prediction_type": "v_prediction",
        "min_snr_gamma": 5.0,
        "zero_snr": True,
    },
    "x0_min_snr": {"prediction_type": "sample", "min_snr_gamma": 5.0},
    "epsilon_offset": {"offset_noise": 0.1, "input_perturbation": 0.2},
}


def tensor(x):
    return torch.tensor(np.asarray(x, np.float64))


def nchw(x):
    return tensor(x).permute(0, 3, 1, 2)


class Reference:
    """The same model in torch, float64, and its loss as diffusers' example has it."""

    def __init__(self, config):
        self.config = config
        self.unet = torch_unet(UNET).double()
        self.text_encoder = torch_text_encoder(TEXT).double()
        self.vae = torch_autoencoder(VAE).double().requires_grad_(False)
        schedule = config.model.schedule
        self.scheduler = diffusers.DDPMScheduler(
            prediction_type=schedule.prediction_type
        )
        ends = schedule.beta_start**0.5, schedule.beta_end**0.5
        betas = torch.linspace(*ends, 1000, dtype=torch.float64) ** 2
        if schedule.rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        self.scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)

    def params(self):
        names = ("unet", "text_encoder", "vae")
        return {name: to_params(getattr(self, name)) for name in names}

    def gradients(self, names):
        trees = {}
        for name in names:
            holder = copy.deepcopy(getattr(self, name))
            for p, q in zip(
                holder.parameters(), getattr(self, name).parameters(), strict=True
            ):
                p.data = torch.zeros_like(q) if q.grad is None else q.grad
            trees[name] = to_params(holder)
        return trees

    def context(self, batch):
        if "context" in batch:
            return tensor(batch["context"])
        ids = torch.tensor(batch["tokens"]["text_encoder"])
        return self.text_encoder(ids).last_hidden_state

    def latents(self, batch, noise):
        if "image" in batch:
            posterior = self.vae.encode(nchw(batch["image"]) / 127.5 - 1).latent_dist
            mean, std = posterior.mean, posterior.std
        else:
            mean, logvar = nchw(batch["moments"]).chunk(2, dim=1)
            std = torch.exp(0.5 * logvar)
        return self.config.model.vae.scaling_factor * (mean + std * noise)

    def loss(self, batch, step):
        settings = self.config.diffusion
        t, normal = draws_by_hand(step, len(next(iter(batch.values()))))
        noise = normal(1) + settings.offset_noise * normal(3)[:, :, :1, :1]
        x0 = self.latents(batch, normal(2))
        given = noise + settings.input_perturbation * normal(4)
        x_t = self.scheduler.add_noise(x0, given, t)
        prediction = self.unet(x_t, t, self.context(batch)).sample
        kind = self.config.model.schedule.prediction_type
        target = {"epsilon": noise, "sample": x0}.get(kind)
        if target is None:
            target = self.scheduler.get_velocity(x0, noise, t)
        d = prediction - target
        c = settings.huber_c
        each = {"l2": d**2, "l1": d.abs(), "huber": (d**2 + c**2).sqrt() - c}
        losses = each[settings.loss].mean(dim=(1, 2, 3))
        if settings.min_snr_gamma is not None:
            snr = compute_snr(self.scheduler, t)
            weight = snr.clamp(max=settings.min_snr_gamma)
            divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
            losses = losses * weight / divisor
        return losses.mean()


def draws_by_hand(step, B):
    """Times, and a function from a stream's number to its noise, as documented."""
    key = jax.random.fold_in(KEY, step)
    t = jax.random.randint(jax.random.fold_in(key, 0), (B,), 0, 1000)

    def normal(stream):
        shape = (B, 1, 1, 4) if stream == 3 else (B, 8, 8, 4)
        return nchw(jax.random.normal(jax.random.fold_in(key, stream), shape))

    return torch.tensor(np.asarray(t)).long(), normal


def relative_errors(ours, theirs):
    """By leaf, |a − b| / |b| in 2-norms, and each leaf's share of the whole norm."""
    leaves = jax.tree.leaves_with_path(theirs)
    mine = dict(jax.tree.leaves_with_path(ours))
    assert len(mine) == len(leaves)
    whole = np.sqrt(sum(np.sum(np.square(b, dtype=np.float64)) for _, b in leaves))
    errors = {}
    for path, b in leaves:
        a, b = np.asarray(mine[path], np.float64), np.asarray(b, np.float64)
        norm = np.linalg.norm(b)
        errors[jax.tree_util.keystr(path)] = (
            np.linalg.norm(a - b) / max(norm, 1e-300),
            norm / whole,
        )
    return errors


def assert_same(ours, theirs, tolerance):
    """Every leaf to `tolerance` of its own norm; zero in exact arithmetic: near it."""
    for path, (error, share) in relative_errors(ours, theirs).items():
        if share < 1e-9:
            assert "k_proj" in path, path  # a softmax does not see its keys' bias
            assert error * share < 1e-6, path
        else:
            assert error < tolerance, (path, error)


def assert_loss_and_gradients_equal(config, batch, names):
    reference = Reference(config)
    expected = reference.loss(batch, step=STEP)
    expected.backward()
    everything = reference.params()
    params = {name: everything[name] for name in names}
    draws = draw(jax.random.fold_in(KEY, STEP), batch, config)
    loss_of = jax.jit(
        jax.value_and_grad(lambda p, *rest: diffusion_loss(p, *rest, config))
    )
    loss, gradients = loss_of(params, everything, batch, draws)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    assert_same(gradients, reference.gradients(names), 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name):
    batch = make_batch(text="context")
    assert_loss_and_gradients_equal(train_config(**CASES[name]), batch, ["unet"])


def test_from_pictures_and_tokens_with_the_text_encoder_trained():
    config = train_config(train_text_encoder=True)
    names = ["unet", "text_encoder"]
    assert_loss_and_gradients_equal(config, make_batch("image"), names)


def lit_ema(average, module, decay, n):
    """Does what LitEma of latent-diffusion does at its n-th call, from 1."""
    decay = min(decay, (1 + n) / (10 + n))
    with torch.no_grad():
        for shadow, p in zip(average.parameters(), module.parameters(), strict=True):
            shadow.sub_((1 - decay) * (shadow - p))


@pytest.mark.parametrize("trains_text", [False, True])
def test_three_updates(trains_text):
    own = {"train_text_encoder": True, "text_encoder_learning_rate": 3e-4}
    config = train_config(
        prediction_type="v_prediction",
        learning_rate=1e-3,
        warmup_steps=2,
        clip_norm=0.05,
        weight_decay=0.1,
        epsilon=1e-6,
        ema_decay=0.25,
        **(own if trains_text else {}),
    )
    names = ["unet", "text_encoder"] if trains_text else ["unet"]
    reference = Reference(config)
    modules = [getattr(reference, name) for name in names]
    averages = Reference(config)
    rates = [1e-3, 3e-4]
    optimizer = torch.optim.AdamW(
        [
            {"params": module.parameters(), "lr": rate}
            for module, rate in zip(modules, rates, strict=False)
        ],
        eps=1e-6,
        weight_decay=0.1,
    )
    warm_up = lambda n: min(n / 2, 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    state = init_state(config, reference.params())
    step = jax.jit(make_train_step(config), donate_argnums=0)
    for n in range(3):
        batch = make_batch(seed=n)
        expected = reference.loss(batch, step=n)
        optimizer.zero_grad()
        expected.backward()
        learned = [p for module in modules for p in module.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(learned, 0.05)
        optimizer.step()
        schedule.step()
        for name, module in zip(names, modules, strict=True):
            lit_ema(getattr(averages, name), module, 0.25, n + 1)
        state, metrics = step(state, batch, KEY)
        assert norm > 0.05 and metrics["finite"] == 1
        np.testing.assert_allclose(metrics["loss"], expected.item(), rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["learning_rate"], 1e-3 * warm_up(n))
    final, average = reference.params(), averages.params()
    assert_same(state.params, {name: final[name] for name in names}, 1e-5)
    assert_same(state.ema, {name: average[name] for name in names}, 1e-5)
    assert jnp.array_equal(state.step, 3)
