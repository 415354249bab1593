"""Compiles the whole sampling program for a Cloud TPU, on a machine without one.

    JAX_PLATFORMS=cpu python scripts/compile_for_tpu.py sd15 v5e:2x2

Needs the `tpu` extra. Prints compile time, memory per core, FLOPs and bytes, the sum
of the compiler's own cycle estimates, and the collectives, of which there are none.
"""

import argparse
import json
import os
import re
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("SDJAX_CACHE_DIR", "")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from sdjax import parallel, pipeline, presets, runner
from sdjax.config import ModelConfig
from sdjax.model import Model
from sdjax.models import abstract_params
from sdjax.text import byte_vocabulary

MODELS = {
    "sd15": presets.SD15,
    "sd2": presets.SD2,
    "sdxl": presets.SDXL_BASE,
}
COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def compile_for(
    config: ModelConfig, topology: str, *, samples_per_device: int = 1
) -> jax.stages.Compiled:
    """Compiles `sdjax.generate`'s program in bfloat16 for every core of a topology."""
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices
    mesh = parallel.make_mesh(devices)
    files = {"tokenizer": byte_vocabulary(), "tokenizer_2": byte_vocabulary()}
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
        ),
        abstract_params(config),
    )
    inputs, settings = pipeline.prepare(
        "a photograph of an astronaut riding a horse",
        model=Model(config, params, files, "abstract"),
        num_images_per_prompt=samples_per_device * len(devices),
        dtype="bfloat16",
    )
    lowered = runner.run_program.lower(
        params, inputs, np.int32(0), config=settings, mesh=mesh, platform=None
    )
    return lowered.compile()


def report(compiled: jax.stages.Compiled) -> dict[str, object]:
    """What the executable costs on one device; loop bodies are counted once."""
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis()
    cycles = [int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    return {
        "arguments_GB": memory.argument_size_in_bytes / 1e9,
        "temporaries_GB": memory.temp_size_in_bytes / 1e9,
        "output_GB": memory.output_size_in_bytes / 1e9,
        "TFLOP": cost["flops"] / 1e12,
        "bytes_accessed_GB": cost["bytes accessed"] / 1e9,
        "estimated_cycles_M": sum(cycles) / 1e6,
        "collectives": sorted(COLLECTIVE.findall(text)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("topology", help="as v5e:2x2 or v6e:2x2")
    parser.add_argument("--samples-per-device", type=int, default=1)
    arguments = parser.parse_args()
    start = time.perf_counter()
    compiled = compile_for(
        MODELS[arguments.model],
        arguments.topology,
        samples_per_device=arguments.samples_per_device,
    )
    seconds = time.perf_counter() - start
    print(json.dumps({"compile_seconds": seconds} | report(compiled), indent=2))


if __name__ == "__main__":
    main()
