"""Stable Diffusion in JAX: one call, one compiled program."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdjax.errors import SdjaxError
    from sdjax.model import Model, load, save
    from sdjax.pipeline import generate, prepare
    from sdjax.program import SampleConfig, SampleInputs, sample

__version__ = "0.1.0"

__all__ = [
    "Model",
    "SampleConfig",
    "SampleInputs",
    "SdjaxError",
    "generate",
    "load",
    "prepare",
    "sample",
    "save",
]

_HOME = {
    "Model": "model",
    "SampleConfig": "program",
    "SampleInputs": "program",
    "SdjaxError": "errors",
    "generate": "pipeline",
    "load": "model",
    "prepare": "pipeline",
    "sample": "program",
    "save": "model",
}


def __getattr__(name: str):  # imports JAX on first use, so that --help need not
    if name not in _HOME:
        raise AttributeError(f"module 'sdjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sdjax.{_HOME[name]}"), name)
