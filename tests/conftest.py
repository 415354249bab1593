"""Settings that hold for every test: the CPU, as eight devices, no cache."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("SDJAX_CACHE_DIR", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_jax():
    """Silent broadcasting of ranks hides mistakes in shapes."""
    with jax.numpy_rank_promotion("raise"):
        yield
