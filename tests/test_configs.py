"""Every file in configs/: it builds, of the published size, and its step traces."""

import ast
import dataclasses
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import abstract_params
from sdjax.training import autoencoder, diffusion
from sdjax.training.config import TrainConfig
from sdjax.training.overrides import config_from_json, config_to_json
from sdjax.weights import layout
from sdjax.weights.limits import check_limits

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
# Counted on the reference models; "vae" with its codebook.
COUNTS = {
    "sd15_finetune": {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
    },
    "sd2_mlperf": {
        "unet": 865_910_724,
        "vae": 83_653_863,
        "text_encoder": 340_387_840,
    },
    "emoji_autoencoder": {"vae": 2_827_571},
    "emoji": {"unet": 10_675_872, "vae": 2_827_571, "text_encoder": 1_240_960},
    "ldm_kl_f4": {"vae": 55_312_063},
    "ldm_kl_f8": {"vae": 83_653_863},
    "ldm_kl_f16": {"vae": 69_610_963},
    "ldm_vq_f4": {"vae": 55_322_782},
    "ldm_vq_f8": {"vae": 67_717_295},
    "ldm4_unconditional": {"unet": 274_056_163, "vae": 55_322_782},
    "ldm4_class_conditional": {
        "unet": 400_920_579,
        "vae": 55_322_782,
        "class_embedder": 512_512,
    },
}


def get_config(name) -> TrainConfig:
    return runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]()


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_the_folder_has_these():
    others = {"finetune"}  # has a page, and a test that follows it
    assert {path.stem for path in FOLDER.glob("*.py")} - others == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    config = get_config(name)
    wanted = COUNTS[name]
    tables = layout.tables(config.model)  # tracing the networks would be slow
    counts = {name: sum(math.prod(e.shape) for e in tables[name]) for name in wanted}
    assert counts == wanted
    if config.task == "diffusion":
        check_limits(config.model, name)
        every = {"unet", "vae", *config.model.text_encoders}
        assert every | set(wanted) == set(wanted)


@pytest.mark.parametrize("name", COUNTS)
def test_config_survives_json_and_can_be_hashed(name):
    config = get_config(name)
    assert config_from_json(config_to_json(config)) == config
    assert hash(config) == hash(get_config(name))


@pytest.mark.parametrize("name", COUNTS)
def test_header(name):
    text = (FOLDER / f"{name}.py").read_text()
    header = ast.get_docstring(ast.parse(text))
    assert f"sdjax train configs/{name}.py" in header
    assert "Hardware: " in header and "What to expect: " in header


def test_learning_rates():
    rates = {name: get_config(name).optimizer.learning_rate for name in COUNTS}
    assert rates["sd15_finetune"] == 5e-6
    assert rates["sd2_mlperf"] == 2048 * 1.25e-7
    assert rates["ldm4_class_conditional"] == 1e-4
    assert rates["ldm4_unconditional"] == pytest.approx(9.6e-5)  # the paper's table 12


def batch_of(config):
    """The shapes of one batch."""
    B, side = config.data.batch_size, config.data.resolution
    model, z = config.model, config.model.vae.latent_channels
    batch = {"image": jax.ShapeDtypeStruct((B, side, side, 3), np.uint8)}
    if config.data.cache is not None:
        size = side // model.vae.downsample_factor
        moments = jax.ShapeDtypeStruct((B, size, size, 2 * z), np.float32)
        batch = {"moments": moments}
    if model.text_encoders and config.task == "diffusion":
        batch["tokens"] = {
            tower: jax.ShapeDtypeStruct((B, of.max_length), np.int32)
            for tower, of in model.text_encoders.items()
        }
    if model.class_embedder is not None:
        batch["label"] = jax.ShapeDtypeStruct((B,), np.int32)
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_whole_step_has_the_right_shapes(name):
    config = get_config(name)
    if name == "sd2_mlperf":  # its moments come from a cache of the user's
        data = dataclasses.replace(config.data, cache="moments")
        config = dataclasses.replace(config, data=data)
    phase = autoencoder if config.task == "autoencoder" else diffusion
    step = phase.make_train_step(config)

    def run(params, batch, key):
        state = phase.init_state(config, params)
        return state, *step(state, batch, key)

    params = abstract_params(config.model, set(COUNTS[name]))
    assert {component: count(tree) for component, tree in params.items()} == COUNTS[
        name
    ]
    key = jax.eval_shape(lambda: jax.random.key(0))
    before, after, metrics = jax.eval_shape(run, params, batch_of(config), key)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(after) == shapes(before)
    assert (after.ema is None) == (config.ema_decay is None)
    for name in ("loss", "grad_norm", "learning_rate", "finite"):
        assert (metrics[name].shape, metrics[name].dtype) == ((), jnp.float32)
