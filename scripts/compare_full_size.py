"""SD 1.5 at its full size: sdjax against diffusers, random weights, float32.

    python scripts/compare_full_size.py --tokenizer FOLDER [--workdir DIR]

Needs the `parity` extra, 12 GiB of memory and 4 GB of disk. diffusers writes a folder
of 859,520,964 U-Net parameters; the command line draws a 512×512 picture from it,
twice (the second time from the compilation cache); then both draw four steps from the
same noise, each in a process of its own, and the latents are compared.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

PROMPT = "a photograph of an astronaut riding a horse"
STEPS = 4
TOLERANCE = 1e-3


def write_model(folder: pathlib.Path, tokenizer: str) -> None:
    import torch
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    assert unet.num_parameters() == 859_520_964
    channels = (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )
    schedule = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def noise() -> np.ndarray:
    draws = np.random.default_rng(0).standard_normal((1, 64, 64, 4))
    return draws.astype(np.float32)


def draw_with_diffusers(folder: pathlib.Path, output: pathlib.Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    latents = torch.from_numpy(noise().transpose(0, 3, 1, 2).copy())
    start = time.perf_counter()
    with torch.no_grad():
        result = pipe(
            PROMPT, latents=latents, num_inference_steps=STEPS, output_type="latent"
        )
    print_measures(drawing_seconds=time.perf_counter() - start)
    np.save(output, result.images.numpy().transpose(0, 2, 3, 1))


def draw_with_sdjax(folder: pathlib.Path, output: pathlib.Path) -> None:
    import sdjax

    start = time.perf_counter()
    model = sdjax.load(folder)
    loading = time.perf_counter() - start
    settings = {"num_inference_steps": STEPS, "output_type": "latent"}
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        latents = sdjax.generate(PROMPT, model=model, latents=noise(), **settings)
        seconds.append(time.perf_counter() - start)
    print_measures(
        loading_seconds=loading,
        compiling_seconds=seconds[0] - seconds[1],
        drawing_seconds=seconds[1],
    )
    np.save(output, latents)


def print_measures(**measures: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(measures | {"peak_GiB": round(peak, 2)}))


def run(*command: str, cache: pathlib.Path) -> None:
    start = time.perf_counter()
    environment = os.environ | {"SDJAX_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds, peak = time.perf_counter() - start, usage.ru_maxrss / 2**20
    print(
        f"  {seconds:.1f} s, peak {peak:.2f} GiB: {' '.join(command[-4:])}", flush=True
    )
    if status:
        sys.exit(f"failed: {' '.join(command)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tokenizer", required=True, help="folder with CLIP's vocab.json"
    )
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--only", choices=["write", "diffusers", "sdjax"])
    arguments = parser.parse_args()
    folder = arguments.workdir or pathlib.Path(tempfile.mkdtemp())
    model = folder / "model"
    parts = {
        "write": lambda: write_model(model, arguments.tokenizer),
        "diffusers": lambda: draw_with_diffusers(model, folder / "diffusers.npy"),
        "sdjax": lambda: draw_with_sdjax(model, folder / "sdjax.npy"),
    }
    if arguments.only:
        parts[arguments.only]()
        return
    again = (sys.executable, __file__, "--workdir", str(folder))
    again += ("--tokenizer", arguments.tokenizer)
    cache = folder / "cache"
    if not model.exists():
        run(*again, "--only", "write", cache=cache)
    generate = (sys.executable, "-m", "sdjax", "generate", PROMPT, "-m", str(model))
    for name in ("first.png", "second.png"):
        run(*generate, "--steps", "4", "-o", str(folder / name), cache=cache)
    run(*again, "--only", "diffusers", cache=cache)
    run(*again, "--only", "sdjax", cache=cache)
    want, got = np.load(folder / "diffusers.npy"), np.load(folder / "sdjax.npy")
    error = np.max(np.abs(got - want)) / np.max(np.abs(want))
    print(f"latents after {STEPS} steps differ by {error:.2e} of the largest value")
    if not error <= TOLERANCE:
        sys.exit(f"more than {TOLERANCE}")


if __name__ == "__main__":
    main()
