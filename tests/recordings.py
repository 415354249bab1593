"""Reads tests/recorded: what other programs computed, for tests without them."""

import json
from pathlib import Path

import numpy as np

from sdjax.config import from_json


def load(name, cls):
    """Gives the configuration, {"params": tree} and the other arrays of a recording."""
    data = dict(np.load(Path(__file__).parent / "recorded" / f"{name}.npz"))
    config = from_json(json.loads(str(data.pop("config"))), cls)
    tree = {}
    for key in [key for key in data if key.startswith("params/")]:
        *parents, leaf = key.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = data.pop(key).astype(np.float32)
    return config, tree, data


def assert_close(ours, theirs, tolerance=1e-5):
    """Compares with the largest value as the scale."""
    assert ours.shape == theirs.shape
    theirs = np.asarray(theirs)
    error = np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max()
    assert error < tolerance
