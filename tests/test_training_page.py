"""docs/training.md does what it says: its program runs as it stands."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest
from training_cases import SMALL, TEXT, random_params

import sdjax
from sdjax.text.byte_vocabulary import byte_vocabulary

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "training.md"


@pytest.mark.slow
def test_the_program_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tower = dataclasses.replace(TEXT, vocab_size=514, eos_token_id=513, max_length=20)
    tower = dataclasses.replace(tower, pad_token_id=513)
    config = dataclasses.replace(SMALL, text_encoder=tower)
    files = {"tokenizer": byte_vocabulary()}
    params = random_params(config)
    sdjax.save(sdjax.Model(config, params, files, "made"), "my-model")
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3))
    np.save("pictures.npy", pictures.astype(np.uint8))

    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(program, str(PAGE), "exec"), {"__name__": "page"})

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("'finite': 1.0" in line for line in lines)
    trained = sdjax.load("my-model-trained").params
    name = ("mid_block", "resnets_0", "conv1", "kernel")
    before, after = params["unet"], trained["unet"]
    for part in name:
        before, after = before[part], after[part]
    assert 0 < np.abs(np.asarray(after) - before).max() < 1e-3
    kept, given = (p["vae"]["encoder"]["conv_in"]["kernel"] for p in (trained, params))
    np.testing.assert_array_equal(kept, given.astype(np.float32))
