"""Configs: `--set` by field type, files that give them, and how two differ."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdjax.config import TextEncoderConfig
from sdjax.errors import SdjaxError
from sdjax.training.check import check_config
from sdjax.training.config import DataConfig, TrainConfig
from sdjax.training.overrides import (
    config_from_json,
    config_to_json,
    differences,
    load_config,
    override,
)
from sdjax.training.workdir import Workdir, opened, record_config, record_versions

CONFIG = TrainConfig(data=DataConfig(path="somewhere"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps=1_000", 1000),
        ("steps=1e3", 1000),
        ("data.flip=.5", 0.5),
        ("data.path=a=b, c", "a=b, c"),
        ("ema_decay=None", None),
        ("ema_decay=0.5", 0.5),
        ("remat=TRUE", True),
        ("dtype=bfloat16", "bfloat16"),
        ("init_from=none", None),
        ("model.unet.block_out_channels=32,64", (32, 64)),
        ("model.unet.cross_attention_only=true, 0", (True, False)),
        ("samples.prompts=['a, b', \"c\"]", ("a, b", "c")),
        ("samples.prompts=a cat, a dog", ("a cat", "a dog")),
        ("samples.prompts=", ()),
        ("model.schedule.trained_betas=(0.1, 0.2)", (0.1, 0.2)),
        ("model.text_encoder=none", None),
        ("model.text_encoder.width=5", 5),
        ("data.resolution=none", None),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(setting, value):
    found = override(CONFIG, [setting])
    for name in setting.split("=")[0].split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stepz=3", "did you mean steps"),
        ("learning_rate=3", "did you mean optimizer.learning_rate"),
        ("data.batchsize=3", "did you mean data.batch_size"),
        ("model.text_encoder.widht=3", "did you mean model.text_encoder.width"),
        ("data.foo=3", "it can be data.path, "),
        ("steps=1.5", "must be a whole number"),
        ("steps=many", "must be a whole number"),
        ("data.flip=nan", "must be a finite number"),
        ("remat=maybe", "must be true or false"),
        ("dtype=float16", "it can be float32, bfloat16"),
        ("model=3", "fields of its own"),
        ("data.path.x=3", "with no fields"),
        ("samples.prompts=['a", "no tuple"),
        ("steps", "a field and its value"),
        ("ema_decay=no", "must be a finite number"),
    ],
)
def test_what_is_wrong_is_said(setting, said):
    with pytest.raises(SdjaxError, match=said) as caught:
        override(CONFIG, [setting])
    assert setting.split("=")[0] in str(caught.value)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**40), 2**40))
def test_numbers_survive(real, whole):
    config = override(CONFIG, [f"data.flip={real!r}", f"steps={whole}"])
    assert (config.data.flip, config.steps) == (real, whole)


def test_a_config_file_is_run(tmp_path):
    file = tmp_path / "mine.py"
    text = "from sdjax.training.config import TrainConfig\n"
    file.write_text(text + "def get_config():\n    return TrainConfig(steps=7)\n")
    assert load_config(str(file)) == TrainConfig(steps=7)
    for source, said in [
        ("", "no function get_config"),
        ("get_config = lambda: 3", "gives 3"),
        ("import nothing_there", "fails with ModuleNotFoundError"),
    ]:
        file.write_text(source)
        with pytest.raises(SdjaxError, match=said):
            load_config(str(file))
    with pytest.raises(SdjaxError, match="No such file"):
        load_config(str(tmp_path / "other.py"))


def test_json_and_back():
    config = override(CONFIG, ["model.text_encoder_2=none", "samples.prompts=a,b"])
    assert config_from_json(config_to_json(config)) == config
    towers = dataclasses.replace(config.model, text_encoder_2=TextEncoderConfig())
    other = dataclasses.replace(config, model=towers, steps=5)
    found = differences(config_to_json(config), config_to_json(other))
    assert ("steps", 1000, 5) in found
    assert ("model.text_encoder_2.width", None, 768) in found


def test_a_folder_keeps_its_config(tmp_path):
    with opened(tmp_path / "run") as place:
        record_config(place, CONFIG)
        longer = override(CONFIG, ["steps=9", "samples.prompts=a", "on_nan=skip"])
        record_config(place, longer)
        wrong = override(longer, ["data.batch_size=2", "optimizer.b1=0.5"])
        with pytest.raises(SdjaxError, match=r"b1 was 0\.9 and is now 0\.5") as caught:
            record_config(place, wrong)
        assert "data.batch_size was 16 and is now 2" in str(caught.value)
        assert "steps" not in str(caught.value)
        record_versions(place, 3)
        assert '"step": 3' in (place.path / "versions.jsonl").read_text()
        with pytest.raises(SdjaxError, match="another process trains"):
            with opened(tmp_path / "run"):
                pass
    with opened(tmp_path / "run") as place:
        (place.path / "config.json").write_text("{")
        with pytest.raises(SdjaxError, match=r"config\.json is damaged"):
            record_config(place, CONFIG)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SdjaxError, match="cannot train in"):
        with opened(tmp_path / "file"):
            pass
    assert Workdir(tmp_path).model == tmp_path / "model"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("steps=0", "steps is 0, but must be 1 or more"),
        ("data.batch_size=-1", "data.batch_size is -1"),
        ("checkpoints.every_minutes=0", "every_minutes is 0.0, but must be more"),
        ("ema_decay=1", "ema_decay is 1.0"),
        ("seed=-1", "seed is -1"),
        ("optimizer.accumulation=3", "accumulation 3 does not divide"),
        ("data.path=", "data.path is empty"),
    ],
)
def test_numbers_out_of_range_are_refused(setting, said):
    check_config(CONFIG)
    with pytest.raises(SdjaxError, match=said):
        check_config(override(CONFIG, [setting]))
