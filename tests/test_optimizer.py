"""AdamW against its definition in float64, and the learning rate by its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.training.config import OptimizerConfig
from sdjax.training.optimizer import learning_rate, make_optimizer, updates_done
from sdjax.training.state import update_ema


def test_warm_up_then_constant():
    rate = learning_rate(OptimizerConfig(learning_rate=0.1, warmup_steps=4), 100)
    got = [float(rate(n)) for n in (0, 1, 2, 3, 4, 50, 1000)]
    np.testing.assert_allclose(got, [0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_warm_up_then_down(schedule):
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=10, schedule=schedule, final_share=0.2
    )
    rate = learning_rate(config, 30)
    for n in (0, 5, 10, 11, 20, 29, 30, 40):
        u = min(max(n - 10, 0) / 20, 1)
        fall = {"linear": 1 - u, "cosine": (1 + np.cos(np.pi * u)) / 2}[schedule]
        expected = 0.1 * min(n / 10, 1) * (0.2 + 0.8 * fall)
        np.testing.assert_allclose(float(rate(n)), expected, rtol=1e-5, atol=1e-9)


def adamw(p, gradients, rates, config):
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    m = v = np.zeros_like(p)
    for n, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m = config.b1 * m + (1 - config.b1) * g
        v = config.b2 * v + (1 - config.b2) * g**2
        m_hat, v_hat = m / (1 - config.b1**n), v / (1 - config.b2**n)
        change = m_hat / (np.sqrt(v_hat) + config.epsilon) + config.weight_decay * p
        p = p - rate * change
    return p


@pytest.mark.parametrize("text_rate", [None, 0.03])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_updates(text_rate, clip_norm):
    config = OptimizerConfig(
        learning_rate=0.1,
        warmup_steps=2,
        text_encoder_learning_rate=text_rate,
        b2=0.99,
        weight_decay=0.1,
        clip_norm=clip_norm,
    )
    rng = np.random.default_rng(0)
    draw = lambda: {name: rng.standard_normal(5) for name in ("unet", "text_encoder")}
    start, gradients = draw(), [draw() for _ in range(4)]
    single = lambda tree: jax.tree.map(lambda x: {"w": jnp.float32(x)}, tree)
    optimizer, params = make_optimizer(config, 10), single(start)
    state = optimizer.init(params)
    for n, gradient in enumerate(gradients):
        assert updates_done(state) == n
        updates, state = optimizer.update(single(gradient), state, params)
        params = optax.apply_updates(params, updates)
    for gradient in gradients:  # the norm is that of both components together
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        for g in gradient.values():
            g *= min(1, clip_norm / norm) if clip_norm else 1
    rates = np.array([0, 0.05, 0.1, 0.1])
    own = rates if text_rate is None else rates * text_rate / 0.1
    for name, rate in {"unet": rates, "text_encoder": own}.items():
        expected = adamw(start[name], [g[name] for g in gradients], rate, config)
        np.testing.assert_allclose(params[name]["w"], expected, rtol=2e-5, atol=1e-6)


def test_the_average_of_a_constant_step_by_step():
    # From 0 towards 1, what is missing after N updates is the product of the decays.
    ema, missing = {"w": jnp.zeros(())}, 1.0
    for n in range(1, 200):
        ema = update_ema(ema, {"w": jnp.ones(())}, jnp.int32(n), 0.9)
        missing *= min(0.9, (1 + n) / (10 + n))
        np.testing.assert_allclose(1 - ema["w"], missing, rtol=1e-3, atol=1e-6)


def test_muon_turns_kernels_into_orthogonal_steps_and_leaves_the_rest_to_adam():
    """All singular values of a kernel's step are about equal; its RMS is 0.2 · rate."""
    config = OptimizerConfig(
        name="muon", learning_rate=0.01, weight_decay=0.0, clip_norm=None
    )
    draw = np.random.default_rng(0).standard_normal
    grads = {
        "kernel": jnp.asarray(draw((3, 3, 8, 16)), jnp.float32),
        "embedding": jnp.asarray(draw((5, 4)), jnp.float32),
    }
    params = jax.tree.map(jnp.ones_like, grads)
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    kernel = np.asarray(updates["kernel"]).reshape(72, 16)
    values = np.linalg.svd(kernel, compute_uv=False)
    assert values.max() / values.min() < 2  # that of the gradient itself is above 2.5
    assert np.sqrt(np.square(kernel).mean()) == pytest.approx(0.2 * 0.01, rel=0.3)
    # It goes down: against the gradient.
    assert np.vdot(kernel, np.asarray(grads["kernel"]).reshape(72, 16)) < 0
    # Adam's first step with Nesterov's momentum (Dozat 2016): β1(1 − β1)/(1 − β1²) + 1.
    signs = -0.01 * np.sign(np.asarray(grads["embedding"]))
    expected = signs * (0.9 * 0.1 / 0.19 + 1)
    np.testing.assert_allclose(updates["embedding"], expected, rtol=1e-4)
