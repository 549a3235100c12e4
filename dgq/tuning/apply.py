"""Tuned scales in a loaded pipeline: put on, mixed, taken off; nothing is packed anew.

The output scales take the place of the checkpoint's, the input scales are folded into what the input is multiplied by
before it is quantized. Which expert's they are follows the timestep of each call of the UNet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DgqError
from ..integer.plan import input_owners
from ..integer.shared_input import rescale_joined
from .file import Description, Tuned, content_hash, read
from .forward import expert_of
from .layout import Layout, integer_layers

_ATTRIBUTE = "_dgq_tuned"  # of a UNet


class _Applied:
    """The tuned scales of one UNet."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.layers = integer_layers(unet)
        self.owners = input_owners(unet, self.layers)
        self.content = content_hash(unet)
        self.files: dict[str, Tuned] = {}
        self.strengths: dict[str, float] = {}
        self.state: tuple[Any, ...] | None = None  # experts and device of the scales that the layers have
        self.made: dict[tuple[Any, ...], dict[str, tuple[Tensor, Tensor | None]]] = {}
        self.hook = unet.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        active = {name: self.files[name].about for name, strength in self.strengths.items() if strength}
        experts: tuple[int, ...] = (0,) * len(active)
        if any(about.experts > 1 for about in active.values()):
            t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
            experts = tuple(expert_of(t, about.experts, about.timesteps) for about in active.values())
        self.use(experts, sample.device)

    def use(self, experts: tuple[int, ...], device: torch.device) -> None:
        """Give the layers the scales of these experts, one of each active file."""
        if self.state == (experts, device):
            return
        if not experts:
            for layer in self.layers.values():
                layer.clear_scales()
        else:
            key = (experts, device)
            if key not in self.made:
                self.made[key] = self._make(experts, device)
            for name, scales in self.made[key].items():
                self.layers[name].set_scales(*scales)
        rescale_joined(self.layers.values())
        self.state = (experts, device)

    def _make(self, experts: tuple[int, ...], device: torch.device) -> dict[str, tuple[Tensor, Tensor | None]]:
        """{layer: (weight_scale, inv_divisor)}: strengths times changes, added up over the files."""
        changes: dict[str, Tensor] = {}
        active = [name for name, strength in self.strengths.items() if strength]
        for name, expert in zip(active, experts, strict=True):
            tuned, strength = self.files[name], self.strengths[name]
            layout = Layout.of(self.unet, tuned.about.input_scales)
            for part, change in layout.split(tuned.vectors[expert].to(device) * strength).items():
                changes[part] = changes[part] + change if part in changes else change
        inputs = {part.removesuffix(".in"): 1 + change for part, change in changes.items() if part.endswith(".in")}
        made: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name, layer in self.layers.items():
            scale = layer.weight_scale.detach().to(device) * (1 + changes[f"{name}.out"])
            divisor = inputs.get(self.owners[name])
            if layer.plan.channels != "none":
                own = layer.inv_divisor.detach().to(device)
                divisor = own if divisor is None else divisor * own
            made[name] = scale, divisor
        return made

    def forget(self) -> None:
        """Take the scales off; the next call makes them anew."""
        self.state = None
        self.made = {}
        for layer in self.layers.values():
            layer.clear_scales()
        rescale_joined(self.layers.values())


def _applied(pipe: Any) -> _Applied | None:
    """What is on a pipeline."""
    found: _Applied | None = getattr(getattr(pipe, "unet", None), _ATTRIBUTE, None)
    return found


def load_tuned(pipe: Any, file: str | os.PathLike[str], strength: float = 1.0, name: str | None = None) -> Description:
    """Draw with tuned scales, in addition to those that are loaded already.

    Args:
        pipe: a pipeline of the checkpoint that they were tuned on.
        file: of `dgq tune`.
        strength: of the changes; 0 draws what the checkpoint draws, bit for bit.
        name: what `set_tuned` and `unload_tuned` call it; the file's name without its ending where left out.

    Returns:
        What the file says of itself.

    Raises:
        DgqError: it cannot be read or is damaged, or belongs to another checkpoint; the name is taken; the pipeline has
            no UNet, or no integer layers; the strength is not finite.
    """
    path = Path(file)
    name = path.stem if name is None else name
    if getattr(pipe, "unet", None) is None:
        raise DgqError(f"{file}: tuned scales are a UNet's, and this pipeline has none")
    applied = _applied(pipe)
    if applied is not None and name in applied.files:
        raise DgqError(f"{file}: tuned scales of the name {name!r} are loaded already", "unload them, or give a name")
    _check_strength(name, strength)
    tuned = read(path, pipe.unet, None if applied is None else applied.content)
    attach(pipe, name, tuned, strength)
    return tuned.about


def attach(pipe: Any, name: str, tuned: Tuned, strength: float = 1.0) -> None:
    """`load_tuned` of scales that are no file, under a name that is free."""
    applied = _applied(pipe)
    if applied is None:
        applied = _Applied(pipe.unet)
        setattr(pipe.unet, _ATTRIBUTE, applied)
    applied.files[name] = tuned
    applied.strengths[name] = strength
    applied.forget()


def set_tuned(pipe: Any, strengths: Mapping[str, float]) -> None:
    """Change the strengths of loaded scales; those that are not named keep theirs.

    Raises:
        DgqError: none of that name is loaded, or a strength is not finite.
    """
    applied = _applied(pipe)
    for name, strength in strengths.items():
        if applied is None or name not in applied.files:
            loaded = ", ".join(applied.files) if applied else "none"
            raise DgqError(f"no tuned scales of the name {name!r} are loaded", f"loaded: {loaded}")
        _check_strength(name, strength)
    if applied is not None:
        applied.strengths.update(strengths)
        applied.forget()


def unload_tuned(pipe: Any, name: str | None = None) -> None:
    """Take tuned scales off, all of them where no name is given: the pipeline draws what it drew before.

    Raises:
        DgqError: none of that name is loaded.
    """
    applied = _applied(pipe)
    if name is not None and (applied is None or name not in applied.files):
        raise DgqError(f"no tuned scales of the name {name!r} are loaded")
    if applied is None:
        return
    applied.forget()
    for one in [name] if name is not None else list(applied.files):
        del applied.files[one], applied.strengths[one]
    if not applied.files:
        applied.hook.remove()
        delattr(pipe.unet, _ATTRIBUTE)


def _check_strength(name: str, strength: float) -> None:
    if not -100 <= strength <= 100:
        raise DgqError(f"strength {strength} of {name!r} is not a number from -100 to 100")
