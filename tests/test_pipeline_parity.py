"""Whole pictures: sdjax against diffusers' pipelines, small random models, float32."""

import functools
import json
import pathlib
import warnings

import numpy as np
import pytest

import sdjax
from sdjax import runner
from sdjax.text.byte_vocabulary import byte_vocabulary

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

STEPS = 6
SD1_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "plms": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
DISTILLED = {"lcm": ("LCMScheduler", {}), "tcd": ("TCDScheduler", {})}
GUIDANCE = {"none": (1.0, 0.0), "7.5": (7.5, 0.0), "rescaled": (7.5, 0.7)}


def text_config(**changes):
    return transformers.CLIPTextConfig(
        **{
            "vocab_size": 514,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "hidden_act": "quick_gelu",
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
            "projection_dim": 32,
            **changes,
        }
    )


def unet(**changes):
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            **changes,
        }
    )


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.18215,
    )


def tokenizer(folder, pad_token):
    folder.mkdir()
    for name, data in byte_vocabulary().items():
        (folder / name).write_bytes(data)
    return transformers.CLIPTokenizer.from_pretrained(folder, pad_token=pad_token)


def sd1(folder, **changes):
    return diffusers.StableDiffusionPipeline(
        unet=unet(**changes),
        vae=vae(),
        text_encoder=transformers.CLIPTextModel(text_config()),
        tokenizer=tokenizer(folder / "t", "<|endoftext|>"),
        scheduler=diffusers.PNDMScheduler.from_config(SD1_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd2(folder):
    schedule = SD1_SCHEDULE | {"prediction_type": "v_prediction"}
    return diffusers.StableDiffusionPipeline(
        unet=unet(
            block_out_channels=(64, 128),
            attention_head_dim=(1, 2),  # heads of size 64
            use_linear_projection=True,
            upcast_attention=True,
        ),
        vae=vae(),
        text_encoder=transformers.CLIPTextModel(
            text_config(hidden_act="gelu", pad_token_id=0)
        ),
        tokenizer=tokenizer(folder / "t", "!"),
        scheduler=diffusers.DDIMScheduler.from_config(schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(folder):
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=48 + 6 * 256,
            cross_attention_dim=32 + 32,
        ),
        vae=vae(),
        text_encoder=transformers.CLIPTextModel(text_config()),
        text_encoder_2=transformers.CLIPTextModelWithProjection(
            text_config(hidden_act="gelu", projection_dim=48, pad_token_id=0)
        ),
        tokenizer=tokenizer(folder / "t", "<|endoftext|>"),
        tokenizer_2=tokenizer(folder / "t2", "!"),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(SD1_SCHEDULE),
        add_watermarker=False,
    )


def lcm(folder):
    return sd1(folder, time_cond_proj_dim=256)


FAMILIES = ("sd1", "sd2", "sdxl")
BUILDERS = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "lcm": lcm}


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """A pipeline, and the model that sdjax loads from the folder it writes."""
    return _pair(request.param, tmp_path_factory.mktemp(request.param))


def _pair(family, folder):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = BUILDERS[family](folder)
        pipe.save_pretrained(folder / "model")
    # Published files hold these keys alone; diffusers writes its defaults besides.
    path = pathlib.Path(folder / "model/scheduler/scheduler_config.json")
    kept = set(SD1_SCHEDULE) | {"prediction_type", "_class_name"}
    config = {k: v for k, v in json.loads(path.read_text()).items() if k in kept}
    path.write_text(json.dumps(config))
    pipe.set_progress_bar_config(disable=True)
    return pipe, config, sdjax.load(folder / "model")


def noise(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(x, -1, -3).copy())


def reference(pipe, config, sampler, latents, extra, **arguments):
    """diffusers' latents and images, NHWC, with its random draws handed in."""
    name, changes = (SCHEDULERS | DISTILLED)[sampler]
    pipe.scheduler = getattr(diffusers, name).from_config(config | changes)
    draws = iter(to_torch(extra))
    module = __import__(type(pipe.scheduler).__module__, fromlist=["_"])
    patch = pytest.MonkeyPatch()
    patch.setattr(
        module, "randn_tensor", lambda *a, **k: next(draws).clone(), raising=False
    )
    kept = {}

    def keep(pipe, step, time, tensors):
        kept["latents"] = tensors["latents"]
        return tensors

    with torch.no_grad():
        images = pipe(
            latents=to_torch(latents),
            num_inference_steps=STEPS,
            output_type="np",
            callback_on_step_end=keep,
            **arguments,
        ).images
    patch.undo()
    return np.moveaxis(kept["latents"].numpy(), 1, -1), images


@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=["square", "wide"])
@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_latents_and_images(pair, size, subtests):
    pipe, config, model = pair
    prompts, negatives = ["a red fox", "Two Blue foxes!"], ["blurry", "ugly, bad"]
    height, width = size
    shape = (2, height // 8, width // 8, 4)
    latents, extra = noise(shape, 1), noise((2 * STEPS, *shape), 2)
    for sampler in SCHEDULERS:
        for name, (scale, rescale) in GUIDANCE.items():
            arguments = {
                "prompt": prompts,
                "negative_prompt": negatives,
                "height": height,
                "width": width,
                "guidance_scale": scale,
                "guidance_rescale": rescale,
            }
            with subtests.test(sampler=sampler, guidance=name):
                want_latents, want_images = reference(
                    pipe, config, sampler, latents, extra, **arguments
                )
                prepare = functools.partial(
                    sdjax.prepare,
                    model=model,
                    sampler=sampler,
                    num_inference_steps=STEPS,
                    latents=latents,
                    **arguments,
                )
                got = draw(model, prepare, extra, "latent")
                scale_of = np.max(np.abs(want_latents))
                assert np.max(np.abs(got - want_latents)) <= 1e-4 * scale_of
                got = draw(model, prepare, extra, "float")
                assert np.max(np.abs(got - want_images)) <= 1 / 255


def draw(model, prepare, extra, output_type):
    inputs, config = prepare(output_type=output_type)
    rows = inputs.tableau.step.shape[0]
    padded = np.zeros((rows, *extra.shape[1:]), np.float32)
    padded[: len(extra)] = extra
    return runner.run(model, inputs._replace(noise=padded), config)


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_a_network_that_takes_the_guidance_scale(sampler, tmp_path):
    pipe, config, model = _pair("lcm", tmp_path)
    shape = (2, 8, 8, 4)
    latents, extra = noise(shape, 1), noise((STEPS, *shape), 2)
    arguments = {
        "prompt": ["a red fox", "Two Blue foxes!"],
        "height": 64,
        "width": 64,
        "guidance_scale": 5.0,
    }
    # The pipeline would hand 0 to the scheduler, whose own default is ours.
    eta = {"eta": 0.3} if sampler == "tcd" else {}
    want, _ = reference(pipe, config, sampler, latents, extra, **arguments, **eta)
    prepare = functools.partial(
        sdjax.prepare,
        model=model,
        sampler=sampler,
        num_inference_steps=STEPS,
        latents=latents,
        **arguments,
    )
    got = draw(model, prepare, extra, "latent")
    assert np.max(np.abs(got - want)) <= 1e-4 * np.max(np.abs(want))


@pytest.mark.parametrize("pair", ["sdxl"], indirect=True)
def test_sdxl_without_a_negative_prompt_is_guided_by_zeros(pair):
    pipe, config, model = pair
    latents = noise((1, 8, 8, 4), 1)
    arguments = {
        "prompt": "a red fox",
        "height": 64,
        "width": 64,
        "guidance_scale": 5.0,
    }
    want, _ = reference(pipe, config, "euler", latents, latents[None], **arguments)
    got = sdjax.generate(
        model=model,
        sampler="euler",
        num_inference_steps=STEPS,
        latents=latents,
        output_type="latent",
        **arguments,
    )
    assert np.max(np.abs(got - want)) <= 1e-4 * np.max(np.abs(want))


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_a_scheduler_config_that_diffusers_puts_right(pair, tmp_path):
    pipe, _, _ = pair
    folder = tmp_path / "model"
    pipe.scheduler = diffusers.DDIMScheduler()  # steps_offset 0, clip_sample true
    pipe.save_pretrained(folder)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    latents = noise((1, 8, 8, 4), 1)
    want = loaded(
        "a fox",
        latents=to_torch(latents),
        num_inference_steps=STEPS,
        output_type="latent",
        height=64,
        width=64,
    ).images.numpy()
    got = sdjax.generate(
        "a fox",
        model=sdjax.load(folder),
        latents=latents,
        num_inference_steps=STEPS,
        output_type="latent",
        height=64,
        width=64,
    )
    want = np.moveaxis(want, 1, -1)
    assert np.max(np.abs(got - want)) <= 1e-4 * np.max(np.abs(want))


@pytest.mark.parametrize("skip", [1, 2])
@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_clip_skip(pair, skip):
    pipe, config, model = pair
    latents = noise((1, 8, 8, 4), 1)
    arguments = {"height": 64, "width": 64, "guidance_scale": 7.5}
    if model.config.text_encoder_2 is None:
        text = skipped_states(pipe, "a fox", skip)
    else:
        text = {"prompt": "a fox", "clip_skip": skip, "negative_prompt": ""}
    want, _ = reference(
        pipe, config, "ddim", latents, latents[None], **arguments, **text
    )
    got = sdjax.generate(
        "a fox",
        model=model,
        sampler="ddim",
        num_inference_steps=STEPS,
        latents=latents,
        output_type="latent",
        negative_prompt="",
        clip_skip=skip,
        **arguments,
    )
    assert np.max(np.abs(got - want)) <= 1e-4 * np.max(np.abs(want))


def skipped_states(pipe, prompt, skip):
    """What diffusers computes; its own code for it does not run on transformers 5."""
    tower = pipe.text_encoder

    def encode(text, skip):
        ids = pipe.tokenizer(text, padding="max_length", max_length=77)["input_ids"]
        with torch.no_grad():
            out = tower(torch.tensor([ids]), output_hidden_states=True)
            return tower.final_layer_norm(out.hidden_states[-(skip + 1)])

    return {
        "prompt_embeds": encode(prompt, skip),
        "negative_prompt_embeds": encode("", 0),
    }
