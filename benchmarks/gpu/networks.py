"""UNets of random weights for the report, and the calls of dgq's operators in their steps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from session import RECIPES, Session, label
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dgq.architectures import ARCHITECTURES, DEFAULT_NETWORK, Architecture, architecture, call, skeleton
from dgq.bench.worker import cast
from dgq.integer.attention import AttentionPlan, use_log_attention
from dgq.integer.on_the_fly import packed, plan_without_data, rounded
from dgq.integer.plan import Layer
from dgq.integer.shared_input import prepare_all
from dgq.integer.skeleton import fuse, place
from dgq.pictures import embedded
from dgq.recipe import Recipe

Step = Callable[[], Tensor]

TINY = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "cross_attention_dim": 32,
    "attention_head_dim": [2, 4],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 1,
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "norm_num_groups": 4,
}


def networks(session: Session) -> dict[str, Architecture]:
    """What a report measures."""
    if session.kind == "cpu":
        return {"tiny": Architecture(TINY, 2, DEFAULT_NETWORK)}
    return {name: ARCHITECTURES[name] for name in session.names}


def chosen(session: Session) -> dict[str, Architecture]:
    """Those of which `--only` names a recipe at least; ends the process where there are none."""
    known = networks(session)
    return {name: known[name] for name in session.chosen()}


def embedded_network() -> Architecture:
    """The embedded model's."""
    return dataclasses.replace(architecture(str(embedded.FOLDER / "unet" / "config.json")), tokens=24)


def plans_of(unet: nn.Module, wbits: int, channels: str = "none") -> list[Layer]:
    """The layers of a UNet, W`wbits`A8, rounded to nearest; `channels` "rotate" turns every layer that can be."""
    return plan_without_data(unet, Recipe(wbits=wbits, rounding="nearest", channels=channels), ())


def float_unet(session: Session, which: Architecture, dtype: torch.dtype) -> nn.Module:
    """A channels-last UNet of weights like `architectures.random_weights`', but drawn on the device."""
    unet = skeleton(which.config).to_empty(device=session.device).requires_grad_(False)
    generator = torch.Generator(session.device).manual_seed(0)
    for name, weight in unet.named_parameters():
        drawn = torch.full(weight.shape, float(name.endswith("weight")), device=session.device)
        if weight.dim() > 1:
            drawn.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        weight.data = drawn.to(dtype)
    return unet.eval().to(memory_format=torch.channels_last)


def quantized(session: Session, which: Architecture, wbits: int, channels: str = "none") -> nn.Module:
    """The same UNet by the integer recipe, as `dgq bench --arch` has it, or with every layer rotated."""
    unet, made = float_unet(session, which, session.half), {}
    for one in plans_of(unet, wbits, channels):
        made[one.name] = packed(one, rounded(one, one.module.weight.detach().float()), one.module.bias)
    place(unet, made)
    fuse(unet)
    use_log_attention(unet, AttentionPlan.for_activations(8))
    prepare_all(unet, session.device)
    return unet


def step_of(session: Session, unet: nn.Module, which: Architecture, dtype: torch.dtype | None = None) -> Step:
    """A call of the UNet without arguments, at its default size."""
    named = call(unet, which.batch, session.device, tokens=which.tokens)
    inputs = {key: cast(value, dtype or session.half, session.device) for key, value in named.items()}
    return lambda: unet(**inputs, return_dict=False)[0]


def quantized_steps(session: Session) -> Iterator[tuple[str, Step]]:
    """(label, step) of every quantized network, one in memory at a time."""
    for (name, which), recipe in itertools.product(chosen(session).items(), RECIPES):
        title = f"{name} {label(*recipe)}"
        if session.wants(title):
            yield title, step_of(session, quantized(session, which, *recipe), which)
            session.forget()


class Op(NamedTuple):
    """A kind of call of an operator: what it was called with, as text and in fact, and how many times in a step."""

    name: str
    text: str
    function: Any
    arguments: tuple[Any, ...]
    times: int


def own_ops(step: Step) -> list[Op]:
    """dgq's operators in a step, each kind of call once."""
    found: dict[tuple[str, str], list[Any]] = {}

    def text(value: Any) -> str:
        return f"{str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, Tensor) else str(value)

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "dgq":
                every = (*args, *(kwargs or {}).values())
                key = (str(function).split(".")[1], " ".join(map(text, every)))
                found.setdefault(key, [function, every, 0])[2] += 1
            return function(*args, **(kwargs or {}))

    with Recorded():
        step()
    return [Op(*key, *entry) for key, entry in found.items()]
