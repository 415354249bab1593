"""`sdjax cache`, `shards` and `evaluate`, as a user types them."""

import json

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from tiny import tiny_model

import sdjax
from sdjax import data
from sdjax.cli.main import main
from sdjax.models import Autoencoder, CLIPTextEncoder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model and five pictures with captions; the current folder."""
    monkeypatch.chdir(tmp_path)
    sdjax.save(tiny_model(), "model")
    noise = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        pixels = noise.integers(0, 256, (64, 64, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text(f"picture {i}")
    return tmp_path


def test_a_cache_holds_what_the_networks_give(place, capsys):
    argv = ["cache", "pictures", "cached", "-m", "model", "--text", "--no-progress"]
    assert main([*argv, "--batch-size", "4"]) == 0
    assert capsys.readouterr().out == "cached\n"
    model, source = sdjax.load("model"), data.open_source("cached")
    assert len(source) == 5
    for i in range(5):
        sample = source[i]
        pixels = np.asarray(PIL.Image.open(f"pictures/{i}.png"))
        posterior = Autoencoder(model.config.vae).apply(
            {"params": model.params["vae"]},
            jnp.asarray(pixels[None], jnp.float32) / 127.5 - 1,
            method="encode",
        )
        wanted = np.concatenate([posterior.mean, posterior.logvar], axis=-1)[0]
        np.testing.assert_allclose(sample.arrays["moments"], wanted, atol=1e-4)
        ids = model.tokenizers["text_encoder"]([f"picture {i}"]).ids
        encoder = CLIPTextEncoder(model.config.text_encoder)
        states = encoder.apply({"params": model.params["text_encoder"]}, ids).states
        np.testing.assert_allclose(sample.arrays["context"], states[0], atol=1e-4)


def test_shards_hold_the_same_pictures(place, capsys):
    assert main(["shards", "pictures", "shards", "--no-progress"]) == 0
    assert capsys.readouterr().out == "shards\n"
    before, after = data.open_source("pictures"), data.open_source("shards")
    captions = sorted(before[i].caption for i in range(5))
    assert sorted(after[i].caption for i in range(len(after))) == captions
    assert main(["shards", "pictures", "shards"]) == 2
    assert "shards exists already" in capsys.readouterr().err


def test_evaluate_writes_a_report_and_the_pictures(place, capsys):
    argv = ["evaluate", "pictures", "-m", "model", "--steps", "1", "--json"]
    argv += ["--images-per-caption", "2", "--batch-size", "4", "-o", "report"]
    assert main([*argv, "--no-progress"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert json.loads((place / "report/report.json").read_text()) == told
    assert (told["captions"], told["images_per_caption"]) == (5, 2)
    assert 0 <= told["top1"] <= told["top5"] <= 1 and told["candidates"] == 5
    with PIL.Image.open(place / "report/drawn.png") as sheet:
        assert sheet.size == (3 * 66 - 2, 5 * 66 - 2)  # true, drawn, drawn
    assert (place / "report/reconstructed.png").exists()
    assert main(argv) == 2
    assert "report exists already" in capsys.readouterr().err
    assert main(["evaluate", "nowhere", "-m", "model"]) == 2
    assert "nowhere is not there" in capsys.readouterr().err
