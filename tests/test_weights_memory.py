"""Peak host memory of reading: at most 1.3 times the model."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import SD1, draw

from sdjax import weights

# The kernel's own count: getrusage would start at the peak of the parent process.
SCRIPT = """
import re, sys
import jax, numpy as np, orbax.checkpoint
from sdjax import weights

jax.block_until_ready(jax.device_put(np.zeros(8, np.float32)))
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

# What the imports and the runtime take is there before any model.
before = kilobytes("VmRSS")
got = weights.read(sys.argv[1])
after = kilobytes("VmHWM")
size = sum(leaf.nbytes for leaf in jax.tree.leaves(got.params))
print((after - before) * 1024 / size, size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' /proc")
@pytest.mark.parametrize("form", ["diffusers", "single-file", "orbax"])
def test_peak_memory_of_reading(tmp_path, form):
    unet = dataclasses.replace(
        SD1.unet, block_out_channels=(320, 640), layers_per_block=2
    )
    tower = dataclasses.replace(
        SD1.text_encoder, num_layers=24, width=256, mlp_dim=2048
    )
    config = dataclasses.replace(
        SD1, unet=dataclasses.replace(unet, context_dim=256), text_encoder=tower
    )
    params = draw(config, np.float32)
    weights.write(tmp_path / "model", config, params, {}, format=form)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "model"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    ratio, size = map(float, done.stdout.split())
    assert size > 2.5e8
    # Below 1, it would not have measured the model.
    assert 0.95 < ratio < 1.3
