"""Checkpoints against diffusers, transformers and torch, which wrote or read them."""

import dataclasses
import json

import checkpoints
import numpy as np
import pytest
from checkpoints import ALL, SD1, SDXL, draw
from safetensors.numpy import load_file, save_file

from sdjax import presets, weights
from sdjax.text.byte_vocabulary import byte_vocabulary
from sdjax.weights import layout
from sdjax.weights.folder_write import folder_config, folder_files, write_text_encoder

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
single = pytest.importorskip("diffusers.loaders.single_file_utils")

PRESETS = ["SD15", "SD15_INPAINTING", "SD2", "SD2_UNCLIP_H", "X4_UPSCALER"]
PRESETS += ["SDXL_BASE", "SDXL_REFINER", "LCM_SD15", "SD2_DEPTH"]
PIPELINES = ["sd1", "sd2", "sdxl", "refiner", "lcm", "f16"]


def torch_modules(config):
    """The modules that diffusers and transformers make of our config files."""
    files = folder_files(config, {})
    clean = {
        name: {k: v for k, v in data.items() if not k.startswith("_")}
        for name, data in files.items()
    }
    modules = {
        "unet": diffusers.UNet2DConditionModel(**clean["unet/config.json"]),
        "vae": diffusers.AutoencoderKL(**clean["vae/config.json"]),
    }
    for name, tower in config.text_encoders.items():
        data = write_text_encoder(tower)
        cls = getattr(transformers, data.pop("architectures")[0])
        modules[name] = cls(transformers.CLIPTextConfig(**data))
    return modules


def state(module):
    return {k.removeprefix("text_model."): v for k, v in module.state_dict().items()}


@pytest.mark.parametrize("name", PRESETS)
def test_keys_and_shapes_of_the_published_models(name):
    config = folder_config(getattr(presets, name))
    with torch.device("meta"):
        modules = torch_modules(config)
    for component, entries in layout.tables(config).items():
        found = {k: tuple(v.shape) for k, v in state(modules[component]).items()}
        assert found == {entry.key: entry.shape for entry in entries}


@pytest.mark.parametrize("name", PRESETS)
def test_diffusers_converts_our_single_file_keys(name):
    """diffusers' own converters map them onto its modules, one to one."""
    config = folder_config(getattr(presets, name))
    files = folder_files(config, {})
    tables = layout.tables(config)
    original = {
        layout.original_prefix(config, c) + e.original: e.original_shape
        for c, entries in tables.items()
        for e in entries
    }
    # One number per tensor stands for its values: the converters only move them.
    tensors = {k: torch.empty(s, device="meta") for k, s in original.items()}
    unet = single.convert_ldm_unet_checkpoint(
        dict(tensors), {"class_embed_type": None, **files["unet/config.json"]}
    )
    vae = single.convert_ldm_vae_checkpoint(dict(tensors), files["vae/config.json"])
    if config.unet.guidance_dim:  # which diffusers' converter does not know
        unet["time_embedding.cond_proj.weight"] = torch.empty(
            (config.unet.block_out_channels[0], 256), device="meta"
        )
    for got, component in ((unet, "unet"), (vae, "vae")):
        shapes = {key: tuple(value.shape) for key, value in got.items()}
        assert shapes == {e.key: e.shape for e in tables[component]}


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "refiner", "f16", "x4"])
def test_diffusers_finds_the_same_values_in_our_single_file(tmp_path, name):
    config = ALL[name]
    params = draw(config)
    weights.write(tmp_path / "m", config, params, {}, format="single-file")
    weights.write(tmp_path / "folder", config, params, {}, format="diffusers")
    tensors = {k: torch.from_numpy(v) for k, v in load_file(tmp_path / "m").items()}
    files = folder_files(config, {})
    got = {
        "unet": single.convert_ldm_unet_checkpoint(
            dict(tensors), {"class_embed_type": None, **files["unet/config.json"]}
        )
    }
    if name != "f16":  # diffusers converts no attention at levels
        vae = single.convert_ldm_vae_checkpoint(dict(tensors), files["vae/config.json"])
        got["vae"] = vae
    for component in config.text_encoders:
        got[component] = convert_text(config, component, tensors)
    for component, converted in got.items():
        stem = "model" if "text" in component else "diffusion_pytorch_model"
        wanted = load_file(tmp_path / "folder" / component / f"{stem}.safetensors")
        assert converted.keys() == wanted.keys()
        for key, array in wanted.items():
            np.testing.assert_array_equal(converted[key].numpy(), array)


def convert_text(config, component, tensors):
    prefix = layout.original_prefix(config, component)
    if layout.text_layout(config, component) == "clip":
        return single.convert_ldm_clip_checkpoint(
            {k: v for k, v in tensors.items() if k.startswith(prefix)}
        )
    tower = config.text_encoders[component]
    model = torch_modules(folder_config(config))[component]
    # diffusers reads the width off the projection, square in published models.
    kept = {k: v for k, v in tensors.items() if not k.endswith("text_projection")}
    result = single.convert_open_clip_checkpoint(model, kept, prefix)
    if tower.projection_dim is not None:
        projection = tensors[f"{prefix}text_projection"]
        result["text_projection.weight"] = projection.T.contiguous()
    return result


def make_pipeline(config, seed=0):
    torch.manual_seed(seed)
    modules = torch_modules(config)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(
        folder_files(config, {})["scheduler/scheduler_config.json"]
    )
    parts = {"scheduler": scheduler, "tokenizer": None, **modules}
    if config.text_encoder_2 is None:
        return diffusers.StableDiffusionPipeline(
            **parts,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    parts = {"text_encoder": None, "tokenizer_2": None, **parts}
    if config.aesthetic_score:
        return diffusers.StableDiffusionXLImg2ImgPipeline(
            **parts, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False
        )
    return diffusers.StableDiffusionXLPipeline(**parts)


def assert_same_as_torch(params, pipeline):
    """Every tensor of the pipeline is there, by the rule of `from_leaf`."""
    for component, tree in params.items():
        leaves = checkpoints.flat(tree)
        wanted = state(getattr(pipeline, component))
        assert len(leaves) == len(wanted)
        for key, tensor in wanted.items():
            leaf = torch_leaf(key, tensor.float().numpy())
            match = [v for path, v in leaves.items() if dotted(path) == dotted_key(key)]
            np.testing.assert_array_equal(match[0].astype(np.float32), leaf)


def dotted(path):
    """A path without what distinguishes our names from torch's."""
    return ".".join(path[:-1]).replace("_", "."), path[-1] == "bias"


def dotted_key(key):
    parent, _, leaf = key.rpartition(".")
    return parent.replace("_", "."), leaf == "bias"


def torch_leaf(key, array):
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    is_table = key.endswith(("token_embedding.weight", "position_embedding.weight"))
    return array if is_table or array.ndim == 1 else array.T


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"safe_serialization": False},
        {"variant": "fp16"},
        {"max_shard_size": "200KB"},
    ],
    ids=["safetensors", "bin", "variant", "shards"],
)
def test_folders_that_diffusers_writes(tmp_path, name, options):
    if name == "lcm" and options:
        pytest.skip("as sd1")
    config = ALL[name]
    pipeline = make_pipeline(config)
    if "variant" in options:
        pipeline = pipeline.to(torch.float16)
    pipeline.save_pretrained(tmp_path / "model", **options)
    got = weights.read(tmp_path / "model", variant=options.get("variant"))
    assert_same_as_torch(got.params, pipeline)
    for field in ("unet", "vae", "text_encoder", "text_encoder_2"):
        wanted = getattr(config, field)
        assert getattr(got.config, field) == wanted
    assert got.config.aesthetic_score == config.aesthetic_score
    assert got.config.zero_empty_negative == config.zero_empty_negative


@pytest.mark.parametrize("name", ["sd1", "sd2_whole", "sdxl", "refiner"])
def test_folders_that_diffusers_reads(tmp_path, name):
    config = ALL[name]
    weights.write(tmp_path / "model", config, draw(config), {}, format="diffusers")
    # diffusers wants to be told when a model comes without its tokenizer.
    absent = {} if config.text_encoder_2 else {"tokenizer": None}
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model", **absent)
    names = {"sdxl": "StableDiffusionXLPipeline", "sd1": "StableDiffusionPipeline"}
    assert type(loaded).__name__ == names.get(name, type(loaded).__name__)
    assert_same_as_torch(weights.read(tmp_path / "model").params, loaded)


def test_a_folder_with_its_tokenizer_needs_nothing_else(tmp_path):
    tower = dataclasses.replace(
        SD1.text_encoder, vocab_size=514, eos_token_id=513, pad_token_id=513
    )
    config = dataclasses.replace(SD1, text_encoder=tower)
    tokenizers = {"tokenizer": byte_vocabulary()}
    place = tmp_path / "model"
    weights.write(place, config, draw(config), tokenizers, format="diffusers")
    loaded = diffusers.DiffusionPipeline.from_pretrained(place)
    assert loaded.tokenizer("a")["input_ids"][0] == 512
    got = weights.read(place)
    assert got.config == config and got.tokenizers == tokenizers
    loaded.save_pretrained(tmp_path / "again")
    again = weights.read(tmp_path / "again")
    assert again.config.text_encoder == tower
    checkpoints.assert_same(again.params, got.params)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_ckpt_files_of_torch(tmp_path, legacy, dtype):
    config, params = SD1, draw(SD1, np.float32)
    tensors = {
        key: torch.from_numpy(np.array(array)).to(getattr(torch, dtype))
        for key, array in checkpoints.original_tensors(config, params).items()
    }
    conv = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    tensors[conv] = tensors[conv].contiguous(memory_format=torch.channels_last)
    whole = {
        "epoch": 3,
        "global_step": 470_000,
        "state_dict": {**tensors, "betas": torch.zeros(1000)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
        "hyper_parameters": {"lr": np.float64(1e-4), "dtype": torch.float16},
    }
    file = tmp_path / "model.ckpt"
    torch.save(whole, file, _use_new_zipfile_serialization=not legacy)
    got = weights.read(file)
    wanted = {k: v.float().numpy() for k, v in tensors.items()}
    back = checkpoints.original_tensors(got.config, got.params)
    assert back.keys() == wanted.keys()
    for key, array in wanted.items():
        # JAX without x64 keeps float64 as float32.
        np.testing.assert_array_equal(back[key].astype(np.float32), array)


def test_parameters_of_modules_in_a_bin_file(tmp_path):
    weights.write(tmp_path / "m", SD1, draw(SD1), {}, format="diffusers")
    file = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {
        key: torch.nn.Parameter(torch.from_numpy(array))
        for key, array in load_file(file).items()
    }
    file.unlink()
    torch.save(tensors, file.with_suffix(".bin"))
    checkpoints.assert_same(weights.read(tmp_path / "m").params, draw(SD1))


def test_old_clip_config_with_a_text_half(tmp_path):
    weights.write(tmp_path / "m", SD1, draw(SD1), {}, format="diffusers")
    file = tmp_path / "m" / "text_encoder" / "config.json"
    old = {"model_type": "clip", "text_config": json.loads(file.read_text())}
    file.write_text(json.dumps(old))
    assert weights.read(tmp_path / "m").config == SD1


@pytest.mark.parametrize("sampler", [
    "ddim", "ddpm", "plms", "euler", "euler_a", "heun", "lms", "dpm2", "dpm2_a",
    "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "dpmpp_2m_sde_exponential",
    "unipc", "deis", "lcm", "tcd", "euler_karras",
])  # fmt: skip
def test_scheduler_files(tmp_path, sampler):
    schedule = dataclasses.replace(SDXL.schedule, sampler=sampler)
    schedule = dataclasses.replace(schedule, timestep_spacing="trailing")
    if sampler == "heun":
        schedule = dataclasses.replace(schedule, beta_schedule="linear")
    config = dataclasses.replace(SD1, schedule=schedule)
    weights.write(tmp_path / "m", config, draw(SD1), {}, format="diffusers")
    assert weights.read(tmp_path / "m").config.schedule == schedule
    data = json.loads((tmp_path / "m/scheduler/scheduler_config.json").read_text())
    # diffusers writes what it understood; we understand the same in that.
    made = getattr(diffusers, data["_class_name"]).from_config(data)
    made.save_pretrained(tmp_path / "m" / "scheduler")
    got = weights.read(tmp_path / "m").config.schedule
    keys = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "sampler")
    for key in (*keys, "timestep_spacing", "clip_sample"):
        assert getattr(got, key) == getattr(schedule, key), key


def test_safetensors_reads_what_we_write(tmp_path):
    params = draw(SD1, np.float16)
    weights.write(tmp_path / "m", SD1, params, {}, format="single-file")
    ours = load_file(tmp_path / "m")
    for key, array in checkpoints.original_tensors(SD1, params).items():
        assert ours[key].tobytes() == array.tobytes()
    save_file(ours, tmp_path / "again")
    checkpoints.assert_same(weights.read(tmp_path / "again").params, params)
