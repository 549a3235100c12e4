"""The API of AUTOMATIC1111's web UI, as far as its clients need it to draw from text.

A client sends every setting that the web UI has. What would change a picture and is not there is refused; what says
nothing (false, 0, "", an empty list) or belongs to what is off is not.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from fastapi import APIRouter, Body, Request, Response
from pydantic import BaseModel, ConfigDict

from ..errors import DgqError
from .answers import Integer, Real, draw, problem, reply
from .drawing import Drawer

# What has no effect while the features are off that it belongs to, or tells samplers that no model here has.
WITHOUT_EFFECT = re.compile(
    "(hr|s|firstphase|seed_resize_from|do_not_save)_.*|denoising_strength|subseed|eta|script_args|send_images"
    "|override_settings_restore_afterwards|disable_extra_networks|force_task_id"
)


class Txt2ImgRequest(BaseModel):
    """A request for pictures."""

    model_config = ConfigDict(extra="allow")

    prompt: str = ""
    negative_prompt: str | None = None
    seed: Integer | None = -1
    steps: Integer | None = None
    cfg_scale: Real | None = None
    width: Integer | None = None
    height: Integer | None = None
    batch_size: Integer | None = 1
    n_iter: Integer | None = 1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    override_settings: dict[str, Any] | None = None


def _returned(wanted: Txt2ImgRequest) -> dict[str, Any]:
    """What an answer repeats of a request, those settings included that have no effect.

    Raises:
        DgqError: JSON has no place for some of it.
    """
    try:
        data = wanted.model_dump()
        json.dumps(data, allow_nan=False)
    except ValueError:  # Python's parser takes NaN, and 1e999 for infinity
        raise DgqError("a setting holds a number that is not finite") from None
    return data


def router(drawer: Drawer) -> APIRouter:
    """The routes below /sdapi/v1."""
    routes = APIRouter(prefix="/sdapi/v1")
    checkpoint = {"sd_model_checkpoint": drawer.id}

    def check_options(options: dict[str, Any]) -> None:
        for name, value in options.items():
            if checkpoint.get(name) != value:
                raise DgqError(f"the option {name} cannot be {value!r} here", f"the model is {drawer.id!r}")

    @routes.get("/sd-models")
    async def models() -> Response:
        name = {"title": drawer.id, "model_name": drawer.id, "filename": drawer.id}
        return reply([{**name, "hash": None, "sha256": None, "config": None}])

    @routes.get("/samplers")
    async def samplers() -> Response:
        return reply([{"name": name, "aliases": [name.lower()], "options": {}} for name in drawer.samplers])

    @routes.get("/options")
    async def options() -> Response:
        return reply({**checkpoint, "samples_format": "png", "grid_save": False, "samples_save": False})

    @routes.post("/options")
    async def set_options(wanted: dict[str, Any] = Body()) -> Response:  # noqa: B008 (FastAPI's way)
        check_options(wanted)
        return reply(None)

    @routes.get("/progress")
    async def progress() -> Response:
        job = drawer.current
        share = job.share if job else 0.0
        state = {
            "skipped": False,
            "interrupted": bool(job and job.stopped),
            "stopping_generation": False,
            "job": "txt2img" if job else "",
            "job_count": job.order.count if job else 0,
            "job_no": job.number if job else 0,
            "job_timestamp": "0",
            "sampling_step": job.step if job else 0,
            "sampling_steps": job.steps if job else 0,
        }
        left = (job.left if job else None) or 0.0
        return reply({"progress": share, "eta_relative": left, "state": state, "current_image": None, "textinfo": None})

    @routes.post("/interrupt")
    async def interrupt() -> Response:
        drawer.interrupt()
        return reply({})

    @routes.post("/txt2img")
    async def txt2img(request: Request, wanted: Txt2ImgRequest) -> Response:
        named = [name for name in (wanted.sampler_name, wanted.sampler_index) if name and name.lower() != "automatic"]
        levels = (wanted.scheduler or "automatic").lower()
        if levels not in ("automatic", "karras"):
            raise DgqError(f"the scheduler {wanted.scheduler!r} is not there", "leave it automatic, or Karras")
        sampler = named[0] if named else None
        if levels == "karras" and not (sampler or "").lower().endswith(" karras"):
            sampler = f"{sampler or drawer.sampler} Karras"
        if sampler is not None and sampler.lower() not in [name.lower() for name in drawer.samplers]:
            message = f"the sampler {sampler!r} is not there: this model draws with {', '.join(drawer.samplers)}"
            return problem(request.url.path, 404, message, "Sampler not found")
        for name, value in (wanted.model_extra or {}).items():
            if value and not WITHOUT_EFFECT.fullmatch(name):
                raise DgqError(f"{name} {value!r} is not supported here")
        check_options(wanted.override_settings or {})
        parameters = _returned(wanted)
        repeats, size = (1 if value is None else value for value in (wanted.n_iter, wanted.batch_size))
        if repeats < 1 or size < 1:
            raise DgqError(f"{repeats} x {size} pictures are none")
        order = drawer.order(
            wanted.prompt,
            count=repeats * size,
            seed=None if wanted.seed == -1 else wanted.seed,
            steps=wanted.steps,
            guidance=wanted.cfg_scale,
            sampler=sampler,
            negative=wanted.negative_prompt or "",
            width=wanted.width,
            height=wanted.height,
        )
        pictures = await draw(request, drawer, order)
        settings, seeds = order.settings, [picture.seed for picture in pictures]
        info = {
            "prompt": order.prompt,
            "all_prompts": [order.prompt] * len(pictures),
            "negative_prompt": settings.negative,
            "all_negative_prompts": [settings.negative] * len(pictures),
            "seed": seeds[0],
            "all_seeds": seeds,
            "width": settings.width,
            "height": settings.height,
            "sampler_name": settings.sampler or drawer.sampler,
            "cfg_scale": settings.guidance,
            "steps": settings.steps,
            "batch_size": size,
            "sd_model_name": drawer.id,
            "infotexts": [picture.parameters for picture in pictures],
            "index_of_first_image": 0,
        }
        images = [base64.b64encode(picture.png).decode() for picture in pictures]
        return reply({"images": images, "parameters": parameters, "info": json.dumps(info)})

    return routes
