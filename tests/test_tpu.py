"""The whole program compiles for TPUs that are not there."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs the tpu extra"
    ),
]

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = """
import sys
sys.path[:0] = ["scripts", "tests"]
import compile_for_tpu, tiny
compiled = compile_for_tpu.compile_for(getattr(tiny, sys.argv[1]), sys.argv[2])
print(compile_for_tpu.report(compiled)["collectives"])
"""


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("model", ["SD1", "SDXL"])
def test_compiles_without_collectives(model, topology):
    command = [sys.executable, "-c", SCRIPT, model, topology]  # libtpu: once a process
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
