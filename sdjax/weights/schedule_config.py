"""scheduler_config.json <-> ScheduleConfig.

diffusers' scheduler classes have different defaults for the same keys; a key that the
file lacks has the default of the class that it names.
"""

from pathlib import Path
from typing import Any, NamedTuple

from sdjax.config import ScheduleConfig
from sdjax.weights.json_file import Fields, read_json


class Scheduler(NamedTuple):
    """A scheduler class of diffusers: our sampler and the class' own defaults."""

    sampler: str | None
    betas: tuple[float, float, str] = (0.0001, 0.02, "linear")
    clip_sample: bool = False


_K_BETAS = (0.00085, 0.012, "linear")
_LATENT_BETAS = (0.00085, 0.012, "scaled_linear")
SCHEDULERS = {
    "DDIMScheduler": Scheduler("ddim", clip_sample=True),
    "DDPMScheduler": Scheduler("ddpm", clip_sample=True),
    "PNDMScheduler": Scheduler("plms"),
    "EulerDiscreteScheduler": Scheduler("euler"),
    "EulerAncestralDiscreteScheduler": Scheduler("euler_a"),
    "HeunDiscreteScheduler": Scheduler("heun", _K_BETAS),
    "LMSDiscreteScheduler": Scheduler("lms"),
    "KDPM2DiscreteScheduler": Scheduler("dpm2", _K_BETAS),
    "KDPM2AncestralDiscreteScheduler": Scheduler("dpm2_a", _K_BETAS),
    "DPMSolverMultistepScheduler": Scheduler("dpmpp_2m"),
    "DPMSolverSDEScheduler": Scheduler("dpmpp_sde", _K_BETAS),
    "UniPCMultistepScheduler": Scheduler("unipc"),
    "DEISMultistepScheduler": Scheduler("deis"),
    "LCMScheduler": Scheduler("lcm", _LATENT_BETAS),
    "TCDScheduler": Scheduler("tcd", _LATENT_BETAS),
}
_OTHER = Scheduler(None)
_PNDM = "PNDMScheduler"
_MULTISTEP = "DPMSolverMultistepScheduler"
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_SPACINGS = ("leading", "trailing", "linspace")
_SUFFIXES = {"_karras": "use_karras_sigmas", "_exponential": "use_exponential_sigmas"}


def read_schedule(file: Path) -> ScheduleConfig:
    """Reads scheduler_config.json.

    Raises:
        SdjaxError: if a value is of the wrong type or names an unknown schedule.
    """
    return schedule_from(Fields(read_json(file), file))


def schedule_from(fields: Fields) -> ScheduleConfig:
    """The schedule that a scheduler's config describes."""
    data = fields.data
    name = data.get("_class_name")
    scheduler = SCHEDULERS.get(name, _OTHER) if isinstance(name, str) else _OTHER
    start, end, kind = scheduler.betas
    spacing = data.get("timestep_spacing")
    offset = data.get("steps_offset")
    if offset is not None and (type(offset) is not int or not 0 <= offset < 1000):
        raise fields.wrong("steps_offset", "an integer from 0")
    final = data.get("set_alpha_to_one")
    return ScheduleConfig(
        num_train_timesteps=fields.integer("num_train_timesteps", 1000, most=10**6),
        beta_start=fields.number("beta_start", start),
        beta_end=fields.number("beta_end", end),
        beta_schedule=fields.choice("beta_schedule", _BETA_SCHEDULES, kind),
        trained_betas=_betas(fields),
        prediction_type=fields.choice("prediction_type", _PREDICTIONS, "epsilon"),
        rescale_betas_zero_snr=fields.flag("rescale_betas_zero_snr"),
        sampler=_sampler(fields, scheduler, name),
        timestep_spacing=None
        if spacing is None
        else fields.choice("timestep_spacing", _SPACINGS, "leading"),
        steps_offset=offset,
        set_alpha_to_one=None if final is None else fields.flag("set_alpha_to_one"),
        clip_sample=fields.flag("clip_sample", scheduler.clip_sample),
        clip_sample_range=fields.number("clip_sample_range", 1.0),
    )


def _betas(fields: Fields) -> tuple[float, ...] | None:
    betas = fields.data.get("trained_betas")
    if betas is None:
        return None
    if not isinstance(betas, list) or not all(
        type(beta) in (int, float) and 0 <= beta <= 1 for beta in betas
    ):
        raise fields.wrong("trained_betas", "a list of numbers from 0 to 1")
    return tuple(map(float, betas))


def _sampler(fields: Fields, scheduler: Scheduler, name: Any) -> str | None:
    """Our name for what the file asks for; None where we have no such sampler."""
    sampler, data = scheduler.sampler, fields.data
    if sampler is None:
        return None
    if name == _PNDM and not data.get("skip_prk_steps"):
        return None
    if name == _MULTISTEP:
        kinds = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}
        kind = data.get("algorithm_type") or "dpmsolver++"
        if not isinstance(kind, str) or kind not in kinds:
            return None
        if data.get("solver_order") not in (None, 2):
            return None
        sampler = kinds[kind]
    for suffix, key in _SUFFIXES.items():
        if data.get(key):
            return sampler + suffix
    return sampler


def write_schedule(schedule: ScheduleConfig, default: str) -> dict[str, Any]:
    """A scheduler_config.json that `read_schedule` and diffusers read alike.

    Args:
        schedule: what to write; keys that are None are left out.
        default: the class to name where the schedule's sampler has none in diffusers.
    """
    sampler = schedule.sampler or ""
    keys: dict[str, Any] = {}
    for suffix, key in _SUFFIXES.items():
        if sampler.endswith(suffix):
            sampler, keys[key] = sampler.removesuffix(suffix), True
    if sampler == "dpmpp_2m_sde":
        sampler, keys["algorithm_type"] = "dpmpp_2m", "sde-dpmsolver++"
    names = {scheduler.sampler: name for name, scheduler in SCHEDULERS.items()}
    if sampler not in names:
        keys = {}
    name = names.get(sampler, default)
    if name == _PNDM:
        keys["skip_prk_steps"] = True
    # Not every class knows every key: those that say nothing new are left out.
    clips = SCHEDULERS.get(name, _OTHER).clip_sample
    optional = {
        "timestep_spacing": schedule.timestep_spacing,
        "steps_offset": schedule.steps_offset,
        "set_alpha_to_one": schedule.set_alpha_to_one,
        "rescale_betas_zero_snr": schedule.rescale_betas_zero_snr or None,
        "clip_sample": None if schedule.clip_sample == clips else schedule.clip_sample,
        "clip_sample_range": None
        if schedule.clip_sample_range == 1.0
        else schedule.clip_sample_range,
    }
    return {
        "_class_name": name,
        "_diffusers_version": "0.42.1",
        "num_train_timesteps": schedule.num_train_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "trained_betas": schedule.trained_betas,
        "prediction_type": schedule.prediction_type,
        **{key: value for key, value in optional.items() if value is not None},
        **keys,
    }
