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


def test_collectives_are_found_in_a_program_that_has_them():
    lines = """
    %a = (f32[8]{0}, f32[16]{0}) all-gather-start(%x), dimensions={0}
    %b = f32[16]{0} all-gather-done(%a)
    ROOT %c = (bf16[4]{0}, bf16[4]{0}) all-reduce(%y, %z), to_apply=%add
    %d = f32[4]{0} fusion(%all-reduce.1), kind=kLoop
    """
    sys.path.insert(0, str(ROOT / "scripts"))
    import compile_for_tpu

    assert compile_for_tpu.COLLECTIVE.findall(lines) == ["all-gather", "all-reduce"]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("model", ["SD1", "SDXL"])
def test_compiles_without_collectives(model, topology):
    command = [sys.executable, "-c", SCRIPT, model, topology]  # libtpu: once a process
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
