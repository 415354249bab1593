import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sdjax.errors import SdjaxError
from sdjax.models.lpips import LPIPS, abstract_lpips, unit_length
from sdjax.weights.lpips_file import read_lpips

VGG16 = 14_714_688  # of its convolutions
LINEAR = 64 + 128 + 256 + 512 + 512


@pytest.fixture(scope="module")
def tensors():
    """Weights in torch's layout, under torchvision's and lpips's names."""
    rng = np.random.default_rng(0)
    result = {}
    for name, leaves in abstract_lpips().items():
        is_linear = name.startswith("lin")
        key = f"{name}.model.1" if is_linear else name.replace("_", ".")
        height, width, in_, out = leaves["kernel"].shape
        kernel = rng.standard_normal((out, in_, height, width), np.float32)
        kernel *= (2 / (height * width * in_)) ** 0.5
        result[f"{key}.weight"] = np.abs(kernel) if is_linear else kernel
        if "bias" in leaves:
            result[f"{key}.bias"] = rng.standard_normal(out, np.float32) / 20
    return result


@pytest.fixture(scope="module")
def params(tensors, tmp_path_factory):
    file = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(tensors, file)
    return read_lpips(file)


def test_size(params):
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    assert sum(sizes) == VGG16 + LINEAR
    assert len(sizes) == 13 * 2 + 5


def test_a_distance(params):
    rng = np.random.default_rng(1)
    x, y = rng.uniform(-1, 1, (2, 2, 16, 24, 3)).astype(np.float32)
    distance = jax.jit(lambda x, y: LPIPS().apply({"params": params}, x, y))
    there, back = distance(x, y), distance(y, x)
    np.testing.assert_allclose(there, back, rtol=1e-5)
    near = distance(x, x + 0.01 * (y - x))
    assert (near < 0.1 * there).all() and (near > 0).all()
    assert (distance(x, x) < 1e-9 * there).all()


def test_the_gradient_is_finite_where_all_features_are_off():
    off = jnp.zeros((1, 2, 2, 4))
    gradient = jax.grad(lambda x: jnp.square(unit_length(x) - 1).sum())(off)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(unit_length(off + 3), np.full(off.shape, 0.5))


def test_small_pictures_are_refused(params):
    x = np.zeros((1, 16, 8, 3), np.float32)
    with pytest.raises(SdjaxError, match="at least 16 pixels a side, not 16×8"):
        LPIPS().apply({"params": params}, x, x)


def slices(tensors):
    """The names of an original-layout checkpoint: VGG16 in five slices."""
    first = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3}
    prefix = "first_stage_model.loss.perceptual_loss."
    for key, array in tensors.items():
        match = re.fullmatch(r"features\.(\d+)(\..*)", key)
        if match:
            i = int(match[1])
            number = first.get(i, 4 if i < 24 else 5)
            key = f"net.slice{number}.{match[1]}{match[2]}"
        yield prefix + key, array


def equal(a, b):
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_other_layouts_give_the_same(tensors, params, tmp_path):
    other = {"first_stage_model.encoder.conv_in.weight": np.zeros((2, 2), np.float32)}
    save_file(dict(slices(tensors)) | other, tmp_path / "model.safetensors")
    equal(read_lpips(tmp_path / "model.safetensors"), params)
    folder = tmp_path / "two"
    folder.mkdir()
    linear = {k: v for k, v in tensors.items() if k.startswith("lin")}
    twice = {k.replace("lin", "lins."): v for k, v in linear.items()}
    vgg = {k: v for k, v in tensors.items() if k not in linear}
    vgg["classifier.0.weight"] = np.zeros((4, 4), np.float32)
    save_file(linear | twice, folder / "vgg.safetensors")
    save_file(vgg, folder / "vgg16.safetensors")
    (folder / "notes.txt").write_text("not weights")
    equal(read_lpips(folder), params)


def test_what_is_wrong_is_said(tensors, tmp_path):
    file = tmp_path / "lpips.safetensors"

    def complaint(changed):
        save_file(changed, file)
        with pytest.raises(SdjaxError) as caught:
            read_lpips(file)
        return str(caught.value)

    vgg = {k: v for k, v in tensors.items() if not k.startswith("lin")}
    assert "lacks lin0 of lpips's linear layers" in complaint(vgg)
    linear = {k: v for k, v in tensors.items() if k.startswith("lin")}
    assert "lacks features.0 of VGG16" in complaint(linear)
    short = tensors | {"lin2.model.1.weight": np.zeros((1, 255, 1, 1), np.float32)}
    assert "lin2 has the shape (1, 255, 1, 1)" in complaint(short)
    bad = np.full((1, 256, 1, 1), np.nan, np.float32)
    assert "lin2 is NaN" in complaint(tensors | {"lin2.model.1.weight": bad})
    (tmp_path / "empty").mkdir()
    with pytest.raises(SdjaxError, match=r"has no file that ends in \.pth"):
        read_lpips(tmp_path / "empty")


@pytest.mark.parity
def test_as_torch(tmp_path):
    torch = pytest.importorskip("torch")
    from torch_first_stage import random_lpips

    theirs = random_lpips()
    torch.save(theirs.state_dict(), tmp_path / "lpips.pth")
    params = read_lpips(tmp_path / "lpips.pth")
    rng = np.random.default_rng(1)
    x, y = rng.uniform(-1, 1, (2, 2, 32, 48, 3)).astype(np.float32)
    tx, ty = (torch.tensor(a).permute(0, 3, 1, 2) for a in (x, y))
    ty.requires_grad_(True)
    expected = theirs(tx, ty)
    expected.sum().backward()

    def ours(y):
        d = LPIPS().apply({"params": params}, x, y)
        return d.sum(), d

    gradient, d = jax.jit(jax.grad(ours, has_aux=True))(y)
    np.testing.assert_allclose(d, expected.detach(), rtol=2e-6)
    expected = ty.grad.permute(0, 2, 3, 1).numpy()
    assert np.linalg.norm(gradient - expected) < 1e-4 * np.linalg.norm(expected)
