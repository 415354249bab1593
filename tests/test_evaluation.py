"""Retrieval, PSNR and SSIM, against closed forms and the definitions written out."""

import numpy as np
import PIL.Image
import pytest
from tiny import tiny_model

from sdjax import evaluation
from sdjax.evaluation import psnr, ranks, report, ssim


def pictures(count, side=64, seed=0):
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (count, 8, 8, 3), np.uint8)
    return small.repeat(side // 8, axis=1).repeat(side // 8, axis=2)


def test_psnr_of_a_known_error():
    a = np.full((2, 16, 16, 3), 100, np.uint8)
    b = a.copy()
    b[0] += 10
    values = psnr(a, b)
    assert values[0] == pytest.approx(20 * np.log10(255 / 10))
    assert values[1] == np.inf


def test_ssim_is_its_definition():
    generator = np.random.default_rng(0)
    a = generator.integers(0, 256, (1, 14, 13, 1), np.uint8)
    b = np.clip(a + generator.integers(-40, 40, a.shape), 0, 255).astype(np.uint8)
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / 4.5)
    weights /= weights.sum()
    values = []
    for top in range(4):
        for left in range(3):
            x = a[0, top : top + 11, left : left + 11, 0].astype(float)
            y = b[0, top : top + 11, left : left + 11, 0].astype(float)
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx = (weights * (x - mx) ** 2).sum()
            vy = (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            c1, c2 = 6.5025, 58.5225
            top_half = (2 * mx * my + c1) * (2 * cov + c2)
            values.append(top_half / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(a, b)[0] == pytest.approx(np.mean(values), rel=1e-10)
    assert ssim(a, a)[0] == pytest.approx(1)


def test_ranks_count_the_nearer_candidates():
    candidates = np.stack(
        [np.full((32, 32, 3), level, np.uint8) for level in (0, 50, 100, 200)]
    )
    drawn = np.full((4, 64, 64, 3), 60, np.uint8)
    assert ranks(drawn, candidates, np.arange(4)).tolist() == [2, 0, 1, 3]


def test_equal_candidates_do_not_count_against_each_other():
    candidates = pictures(5)
    candidates[3] = candidates[1]
    assert ranks(candidates, candidates, np.arange(5)).tolist() == [0] * 5


@pytest.fixture
def dataset(tmp_path):
    for i, picture in enumerate(pictures(6, side=16)):
        PIL.Image.fromarray(picture).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    return tmp_path


def test_evaluate_finds_what_is_drawn(dataset, monkeypatch):
    """A stand-in draws the true picture of every caption but that of number 2."""
    truth = pictures(6, side=16)
    asked = []

    def draw(prompts, *, image_indices, **_):
        asked.extend(image_indices)
        numbers = [int(prompt.split()[1]) for prompt in prompts]
        return truth[[5 if n == 2 else n for n in numbers]]

    monkeypatch.setattr(report, "generate", draw)
    found = evaluation.evaluate(
        tiny_model(), dataset, images_per_caption=2, batch_size=5, progress=False
    )
    assert found.captions == [f"picture {i}" for i in range(6)]
    assert found.drawn.shape == (6, 2, 16, 16, 3)
    assert found.top(1) == pytest.approx(5 / 6)
    assert found.summary()["per_caption"]["picture 2"] == 0
    assert asked == list(range(15))  # every picture has noise of its own
    assert found.psnr.shape == (6,)


def test_a_limit_draws_captions_at_random(dataset, monkeypatch):
    draw = lambda prompts, **_: np.zeros((len(prompts), 16, 16, 3), np.uint8)
    monkeypatch.setattr(report, "generate", draw)
    options = {"limit": 3, "among": [dataset], "batch_size": 4, "progress": False}
    first, second = (
        evaluation.evaluate(tiny_model(), dataset, seed=seed, **options)
        for seed in (0, 1)
    )
    assert len(first.captions) == 3 and first.candidates == 12
    assert first.captions != second.captions
