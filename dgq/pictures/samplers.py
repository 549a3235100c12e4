"""Samplers by the names that A1111's web UI has for them: diffusers' schedulers, made from a model's own one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import DgqError
from .components import quiet

KARRAS, FLOW = "use_karras_sigmas", "use_flow_sigmas"
_OWN_LEVELS = {KARRAS: False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_LATENTS = {"clip_sample": False, "thresholding": False}  # made for pixels, and on where a configuration says nothing
_SOLVER = {"solver_order": 2, "algorithm_type": "dpmsolver++"}

# Name -> diffusers' class, and what its configuration has in place of the model's. What knows Karras' noise levels has
# a second name with them.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", _LATENTS),
    "DDPM": ("DDPMScheduler", _LATENTS),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", _SOLVER),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {**_SOLVER, "algorithm_type": "sde-dpmsolver++"}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
# What a network was trained with: a scheduler that does not know these would draw something else.
TRAINED_WITH = ("prediction_type", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", FLOW)


def config_of(pipe: Any) -> dict[str, Any]:
    """The configuration of a pipeline's scheduler, as its file has it."""
    return {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}


def own_name(config: Mapping[str, Any]) -> str:
    """What the sampler of a scheduler's configuration is called where none is chosen."""
    return str(config["_class_name"]).removesuffix("Scheduler")


def available(config: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Samplers of a model, by name: a class of diffusers, and what its configuration has in place of the model's.

    Args:
        config: of the model's own scheduler, whose sampler comes first.
    """
    import diffusers

    own = config["_class_name"]
    known = {own, *getattr(getattr(diffusers, own, None), "_compatibles", ())}
    found: dict[str, tuple[str, dict[str, Any]]] = {own_name(config): (own, {})}
    for name, (kind, changes) in SAMPLERS.items():
        if kind not in known:
            continue
        takes = inspect.signature(getattr(diffusers, kind).__init__).parameters
        if any(config.get(setting) and setting not in takes for setting in TRAINED_WITH):
            continue
        if config.get(FLOW) and name == "DEIS":  # it takes that, and does not arrive (diffusers 0.42)
            continue
        changes = {setting: value for setting, value in {**_OWN_LEVELS, **changes}.items() if setting in takes}
        found.setdefault(name, (kind, changes))
        if KARRAS in takes and not config.get(FLOW):
            found[f"{name} Karras"] = kind, {**changes, KARRAS: True}
    return found


def chosen(config: Mapping[str, Any], name: str) -> str:
    """A sampler's name as `available` has it; letters' case is nobody's concern.

    Raises:
        DgqError: the model has none of that name.
    """
    names = available(config)
    for known in names:
        if known.lower() == name.strip().lower():
            return known
    raise DgqError(f"the sampler {name!r} is not there", f"this model's: {', '.join(names)}")


@contextmanager
def drawing_with(pipe: Any, name: str | None) -> Iterator[None]:
    """Within it a pipeline draws with a sampler of `available`; None: with its own."""
    own, config = pipe.scheduler, config_of(pipe)
    if name is None or name == own_name(config):
        yield
        return
    import diffusers

    kind, changes = available(config)[chosen(config, name)]
    with quiet("diffusers"):  # of settings that only the own one has
        pipe.scheduler = getattr(diffusers, kind).from_config(own.config, **changes)
    try:
        yield
    finally:
        pipe.scheduler = own
