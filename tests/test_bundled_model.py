"""The model that comes with the package: it draws what it is asked for."""

import numpy as np
import pytest

import sdjax
from sdjax.model import ASSETS, BUNDLED

COLORS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 90, 255)}


def test_it_is_small_enough_to_travel():
    files = [path for path in (ASSETS / BUNDLED).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30_000_000


def test_its_name_finds_it_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sdjax.load("emoji").config == sdjax.load(ASSETS / BUNDLED).config
    (tmp_path / "emoji").mkdir()  # what the user has here comes first
    with pytest.raises(sdjax.SdjaxError, match="emoji"):
        sdjax.load("emoji")


@pytest.mark.slow
def test_without_a_model_it_is_the_one_that_draws():
    """Hearts fill the middle of the picture in the color that was asked for."""
    prompts = [f"{color} heart" for color in COLORS]
    images = sdjax.generate(prompts, num_images_per_prompt=2, progress=False)
    assert images.shape == (6, 64, 64, 3) and images.dtype == np.uint8
    middle = images[:, 24:40, 24:40].mean(axis=(1, 2))
    corner = images[:, :4, :4].mean(axis=(1, 2, 3))
    assert (corner > 240).all()
    palette = np.array(list(COLORS.values()))
    distances = np.square(middle[:, None] - palette[None]).sum(axis=2)
    assert distances.argmin(axis=1).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_diffusers_draws_the_same_with_it():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        ASSETS / BUNDLED, torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 32), np.float32)
    wanted = pipeline(
        "a slice of pizza",
        num_inference_steps=10,
        guidance_scale=1.5,
        height=64,
        width=64,
        latents=torch.tensor(noise).permute(0, 3, 1, 2),
        output_type="np",
    ).images
    found = sdjax.generate(
        "a slice of pizza",
        num_inference_steps=10,
        latents=noise,
        output_type="float",
        dtype="float32",
        progress=False,
    )
    np.testing.assert_allclose(found, wanted, atol=1 / 255)
