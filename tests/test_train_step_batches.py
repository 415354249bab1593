"""What a step draws, and the kinds of batch it learns from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SDXL
from training_cases import BARE, SMALL, make_batch, random_params, train_config

from sdjax.config import ClassEmbedderConfig
from sdjax.errors import SdjaxError
from sdjax.models import Autoencoder, CLIPTextEncoder
from sdjax.program import SampleConfig, SampleInputs, encode_text
from sdjax.training.accumulation import mean_gradients, split_rows
from sdjax.training.conditioning import condition
from sdjax.training.diffusion import (
    diffusion_loss,
    draw,
    init_state,
    make_train_step,
)

KEY = jax.random.key(7)
QUICKLY = {"xla_backend_optimization_level": 0}
quick_draw = jax.jit(draw, static_argnums=2, compiler_options=QUICKLY)
CLASSES = dataclasses.replace(
    SMALL,
    text_encoder=None,
    class_embedder=ClassEmbedderConfig(num_classes=11, width=16),
)


def test_accumulated_gradients_are_those_of_the_whole():
    x = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
    rows = {"x": x, "y": (x**2).sum(axis=1)}
    loss_of = lambda p, rows: jnp.square(rows["x"] @ p - rows["y"]).mean()
    p = jnp.array([0.3, -1.0, 2.0])
    error = x @ p - rows["y"]
    for parts in (1, 3, 12):
        loss, gradient = jax.jit(mean_gradients, static_argnums=(0, 3))(
            loss_of, p, rows, parts
        )
        np.testing.assert_allclose(loss, (error**2).mean(), rtol=1e-5)
        expected = 2 * (error[:, None] * x).mean(axis=0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    split = split_rows(np.arange(6), 3)
    np.testing.assert_array_equal(split, [[0, 3], [1, 4], [2, 5]])


def test_what_is_drawn_and_from_which_keys():
    config = train_config(BARE, offset_noise=0.5, input_perturbation=0.1)
    draws = quick_draw(KEY, make_batch(size=500), config)
    stream = lambda i: jax.random.fold_in(KEY, i)
    normal = lambda i, *shape: jax.random.normal(stream(i), shape)
    t = jax.random.randint(stream(0), (500,), 0, 1000)
    np.testing.assert_array_equal(draws.t, t)
    eps = normal(1, 500, 8, 8, 4) + 0.5 * normal(3, 500, 1, 1, 4)
    np.testing.assert_allclose(draws.eps, eps, atol=1e-5)
    np.testing.assert_allclose(draws.posterior, normal(2, 500, 8, 8, 4), atol=1e-5)
    np.testing.assert_allclose(draws.perturbation, normal(4, 500, 8, 8, 4), atol=1e-5)
    # Between channel means the offset's variance is 0.25, the noise's own 1/64.
    means = np.asarray(draws.eps).mean(axis=(1, 2))
    np.testing.assert_allclose(means.var(), 0.25 + 1 / 64, rtol=0.1)


def test_options_that_are_off_draw_nothing_and_move_nothing():
    batch = make_batch()
    off = quick_draw(KEY, batch, train_config(SMALL))
    on = quick_draw(
        KEY, batch, train_config(SMALL, offset_noise=0.1, input_perturbation=0.1)
    )
    assert off.perturbation is None and off.unlabelled is None
    np.testing.assert_array_equal(off.t, on.t)
    np.testing.assert_array_equal(off.posterior, on.posterior)


def loss_of(config, batch, params):
    draws = quick_draw(KEY, batch, config)
    apply = jax.jit(
        lambda *args: diffusion_loss(*args, config), compiler_options=QUICKLY
    )
    unet = {"unet": params["unet"]}
    rest = {name: tree for name, tree in params.items() if name != "unet"}
    return float(apply(unet, rest, batch, draws))


@pytest.mark.slow
def test_cached_moments_and_states_give_the_loss_of_pictures_and_tokens():
    config, params, batch = (
        train_config(SMALL),
        random_params(SMALL),
        make_batch("image"),
    )
    expected = loss_of(config, batch, params)
    tower = CLIPTextEncoder(SMALL.text_encoder)
    tokens = batch["tokens"]["text_encoder"]
    out = jax.jit(tower.apply)({"params": params["text_encoder"]}, tokens)
    images = batch["image"] / np.float32(127.5) - 1
    encode = jax.jit(lambda p, x: Autoencoder(SMALL.vae).apply(p, x, method="encode"))
    moments = jnp.concatenate(encode({"params": params["vae"]}, images), axis=-1)
    cached = {"moments": np.asarray(moments), "context": np.asarray(out.states)}
    unet_alone = {"unet": params["unet"]}
    np.testing.assert_allclose(loss_of(config, cached, unet_alone), expected, rtol=1e-6)


def test_sdxl_is_conditioned_as_it_is_when_sampling():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 512, (2, 9)).astype(np.int32)
    tokens = {"text_encoder": ids, "text_encoder_2": ids[::-1]}
    size = np.array([[64, 64, 0, 0, 64, 64], [90, 70, 3, 0, 64, 48]], np.float32)
    inputs = SampleInputs(*(None,) * 9, size=size)._replace(tokens=tokens)
    program = SampleConfig(model=SDXL, height=64, width=64)
    params = random_params(SDXL)
    expected, _ = jax.jit(lambda p: encode_text(p, inputs, program))(params)
    config = train_config(SDXL)
    batch = {"tokens": tokens, "size": size}
    got = jax.jit(lambda p: condition(p, batch, None, config))(params)
    np.testing.assert_array_equal(got.context, expected.context)
    np.testing.assert_array_equal(got.vector, expected.vector)
    cached = {"context": got.context, "pooled": got.vector[:, :16], "size": size}
    again = condition({}, cached, None, config)
    np.testing.assert_allclose(again.vector, expected.vector, atol=1e-6)


def test_dropped_labels_become_the_last_class():
    config = train_config(CLASSES, label_dropout=0.25)
    batch = make_batch(text=None, size=2000)
    batch["label"] = np.arange(2000, dtype=np.int32) % 10
    unlabelled = quick_draw(KEY, batch, config).unlabelled
    assert abs(float(unlabelled.mean()) - 0.25) < 0.04
    params = random_params(CLASSES)
    got = condition(params, batch, unlabelled, config).context
    table = np.asarray(params["class_embedder"]["embedding"]["embedding"])
    labels = np.where(unlabelled, 10, batch["label"])
    np.testing.assert_array_equal(got[:, 0], table[labels])
    state = init_state(config, params)
    assert set(state.params) == {"unet", "class_embedder"}
    assert set(state.frozen) == {"vae"}


def test_what_learns_becomes_float32_and_shares_nothing_with_the_average():
    half = jax.tree.map(lambda x: x.astype(np.float16), random_params(SMALL))
    state = init_state(train_config(SMALL, train_text_encoder=True), half)
    assert set(state.params) == {"unet", "text_encoder"}
    leaves = jax.tree.leaves((state.params, state.ema))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.frozen)} == {
        jnp.dtype(jnp.float16)
    }


def without(batch, name):
    return {key: value for key, value in batch.items() if key != name}


REFUSED = [
    (SMALL, {}, lambda b: without(b, "tokens"), "conditioned on text"),
    (SMALL, {}, lambda b: without(b, "moments"), "needs 'image' or 'moments'"),
    (SMALL, {}, lambda b: b | {"moments": b["moments"][..., :4]}, "have 4 channels"),
    (SMALL, {"accumulation": 3}, lambda b: b, "accumulation is 3, but a batch of 4"),
    (SMALL, {}, lambda b: {"image": np.zeros((4, 16, 16, 3))} | without(b, "moments"),
     "must be uint8"),
    (SMALL, {}, lambda b: {"image": np.zeros((4, 16, 15, 3), np.uint8)}
     | without(b, "moments"), "are 16×15, but the autoencoder divides sides by 2"),
    (SMALL, {"train_text_encoder": True},
     lambda b: make_batch(text="context"), "does not learn"),
    (CLASSES, {}, lambda b: b, "conditioned on classes"),
    (SDXL, {}, lambda b: b, "conditioned on image sizes"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "changes", "edit", "message"), REFUSED)
def test_batches_that_do_not_fit_are_refused(model, changes, edit, message):
    config = train_config(model, **changes)

    def first_step(params, batch):
        return make_train_step(config)(init_state(config, params), batch, KEY)

    with pytest.raises(SdjaxError, match=message):
        jax.eval_shape(first_step, random_params(model), edit(make_batch()))


def test_a_component_that_should_learn_is_missed_by_name():
    config = train_config(SMALL, train_text_encoder=True)
    params = without(random_params(SMALL), "text_encoder")
    with pytest.raises(SdjaxError, match="no 'text_encoder', which is to learn"):
        init_state(config, params)
