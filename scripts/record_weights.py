"""Records the keys and shapes of diffusers' and transformers' modules.

    python scripts/record_weights.py

Writes tests/recorded/torch_keys.json.gz, for tests on machines without torch. The
modules are made on torch's meta device, from the configs that sdjax writes.
"""

import gzip
import json
import pathlib

import diffusers
import torch
import transformers

from sdjax import presets
from sdjax.weights.folder_write import folder_files, write_text_encoder

NAMES = ("SD15", "SD2", "SDXL_BASE", "SDXL_REFINER", "X4_UPSCALER")
TARGET = pathlib.Path(__file__).parent.parent / "tests/recorded/torch_keys.json.gz"


def modules(config):
    files = folder_files(config, {})
    for name, cls in (
        ("unet", diffusers.UNet2DConditionModel),
        ("vae", diffusers.AutoencoderKL),
    ):
        data = files[f"{name}/config.json"]
        yield name, cls(**{k: v for k, v in data.items() if not k.startswith("_")})
    for name, tower in config.text_encoders.items():
        data = write_text_encoder(tower)
        cls = getattr(transformers, data.pop("architectures")[0])
        yield name, cls(transformers.CLIPTextConfig(**data))


def main():
    result = {}
    for name in NAMES:
        with torch.device("meta"):
            made = dict(modules(getattr(presets, name)))
        result[name] = {
            component: {
                key.removeprefix("text_model."): list(value.shape)
                for key, value in module.state_dict().items()
            }
            for component, module in made.items()
        }
    text = json.dumps(result, separators=(",", ":"), sort_keys=True).encode()
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_bytes(gzip.compress(text, mtime=0))


if __name__ == "__main__":
    main()
