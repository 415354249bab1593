import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.errors import SdjaxError
from sdjax.models.discriminator import (
    BatchNorm,
    PatchDiscriminator,
    init_discriminator,
)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_size_and_initial_values():
    params = init_discriminator(0)
    # 3·64·16 + 64; 64·128·16 + 256; 128·256·16 + 512; 256·512·16 + 1024; 512·16 + 1
    assert count(params) == 3136 + 131_328 + 524_800 + 2_098_176 + 8193
    assert abs(params["main_8"]["kernel"].std() - 0.02) < 1e-4
    assert abs(params["main_9"]["scale"].mean() - 1) < 4 * 0.02 / 512**0.5
    assert abs(params["main_9"]["scale"].std() - 0.02) < 4 * 0.02 / 1024**0.5
    assert not params["main_9"]["bias"].any()
    assert "bias" not in params["main_8"] and "bias" in params["main_11"]
    two = init_discriminator(0, num_layers=2, image_channels=1)
    assert two["main_0"]["kernel"].shape == (4, 4, 1, 64)
    assert set(two) == {f"main_{i}" for i in (0, 2, 3, 5, 6, 8)}


@pytest.mark.parametrize(("num_layers", "side"), [(3, 24), (3, 64), (2, 12)])
def test_patches(num_layers, side):
    module = PatchDiscriminator(num_layers)
    images = jax.ShapeDtypeStruct((1, side, side + 8, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    logits, _ = jax.eval_shape(module.init_with_output, key, images)
    rows, columns = (n // 2**num_layers for n in (side, side + 8))
    assert logits.shape == (1, rows - 2, columns - 2, 1) or num_layers == 2


def test_pictures_too_small_for_a_patch_are_refused():
    images = jax.ShapeDtypeStruct((1, 64, 16, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with pytest.raises(SdjaxError, match="at least 24 pixels a side, not 64×16"):
        jax.eval_shape(PatchDiscriminator().init, key, images)


def test_batch_norm_gives_mean_and_deviation_of_its_parameters():
    x = 3 + 5 * np.random.default_rng(0).standard_normal((4, 6, 5, 3), np.float32)
    params = {"scale": np.array([1, 2, 3.0]), "bias": np.array([0, -1, 4.0])}
    y = BatchNorm().apply({"params": params}, x)
    np.testing.assert_allclose(y.mean((0, 1, 2)), params["bias"], atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), params["scale"], rtol=1e-5)


def test_statistics_are_of_the_whole_batch_on_several_devices():
    params = {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)}
    x = np.random.default_rng(0).standard_normal((8, 4, 4, 3), np.float32)
    x *= np.arange(1, 9, dtype=np.float32).reshape(8, 1, 1, 1)
    apply = jax.jit(lambda x: BatchNorm().apply({"params": params}, x))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.NamedSharding(mesh, jax.P("data"))
    y = apply(jax.device_put(x, spread))
    assert len(y.sharding.device_set) == 8
    np.testing.assert_allclose(y, apply(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("num_layers", [2, 3])
def test_as_torch(num_layers):
    torch = pytest.importorskip("torch")
    from torch_first_stage import PatchGAN
    from torch_params import randomise, to_params

    theirs = randomise(PatchGAN(num_layers)).train()
    module = PatchDiscriminator(num_layers)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 40, 3)).astype(np.float32)
    params = to_params(theirs)
    grad = jax.grad(lambda p: jnp.square(module.apply({"params": p}, x)).mean())
    logits = theirs(torch.tensor(x).permute(0, 3, 1, 2))
    logits.square().mean().backward()
    for p in theirs.parameters():
        p.data = p.grad
    ours = module.apply({"params": params}, x)[..., 0]
    np.testing.assert_allclose(ours, logits.detach()[:, 0], rtol=1e-4, atol=1e-5)
    expected = jax.tree.leaves_with_path(to_params(theirs))
    for (path, g), (_, e) in zip(
        jax.tree.leaves_with_path(jax.jit(grad)(params)), expected, strict=True
    ):
        assert jnp.linalg.norm(g - e) <= 1e-4 * jnp.linalg.norm(e), path
