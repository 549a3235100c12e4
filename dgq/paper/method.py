"""The paper recipe as the rest of dgq asks for it (`dgq.method`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import DgqError
from ..family import family_of
from ..method import Cost, LayerCost, LayerFacts, Made, Method, Work
from ..recipe import Recipe
from .calibration import build_paper_skeleton, calibrate_paper, quantizable_layers
from .layers import image_to_pixels_last, pixels_last_to_image
from .plan import PaperAttentionPlan, PaperPlan, PaperTable


def _calibrate(work: Work) -> Made:
    recipe = work.recipe
    table = calibrate_paper(
        work.network,
        work.recorded,
        wbits=recipe.wbits,
        abits=recipe.abits,
        groups=recipe.groups,
        progress=lambda stage, i, total: work.progress(stage, i, total, ""),
    )
    return Made(table=PaperTable.from_dict(table))


def _skeleton(network: nn.Module, header: Any) -> None:
    build_paper_skeleton(network, header.table.to_dict())


def _layers(header: Any) -> dict[str, LayerFacts]:
    return {name: _facts(name, plan) for name, plan in header.table.layers.items()}


def _facts(name: str, plan: PaperPlan) -> LayerFacts:
    if isinstance(plan, PaperAttentionPlan):
        groups = " ".join(f"{part[0]}:{one.axis}x{one.groups}" for part, one in plan.parts.items())
        # only its processor is quantized; its projections are layers of their own
        return LayerFacts("attention", (), 0, plan.abits, groups, name, f"{name}.processor")
    groups = f"{plan.input.axis}x{plan.input.groups}"
    return LayerFacts(plan.kind, plan.shape, plan.wbits, plan.abits, groups, name, name)


def _rounded_input(layer: Any, x: Tensor) -> Tensor:
    if x.dim() != 4:
        rounded: Tensor = layer.input(x)
        return rounded
    return pixels_last_to_image(layer.input(image_to_pixels_last(x)), x.shape[-2:])


def _cost(network: nn.Module, recipe: Recipe, budget: int, call: dict[str, Any] | None) -> Cost:
    """Ranges are small, and searched in no time that counts."""
    _plans(network, recipe)
    layers = {}
    for name, module in quantizable_layers(network).items():
        n, k = module.weight.shape[0], module.weight[0].numel()
        bias = 0 if module.bias is None else n
        stored = n * ((k + 1) // 2 if recipe.wbits == 4 else k) + 8 * n + 2 * bias
        layers[name] = LayerCost(module, n * k, n, n * k + bias, stored)
    family = family_of(network)
    weighted = (name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    kept = {name: why for name in weighted if (why := family.kept(name))}
    return Cost(layers, kept, passes=[list(layers)], whole=True)


def _plans(network: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """No layer is stored before all are done; here the network is looked at."""
    family = family_of(network)
    if not family.start_token:
        raise DgqError(
            f"the paper recipe sets a start token apart, and the {family.title} reads none", "use --recipe integer"
        )
    return {}


def _check(recipe: Recipe) -> None:
    if recipe.overrides:
        raise DgqError("the paper recipe quantizes every layer alike and takes no overrides")


def _words(recipe: Recipe, attention: Any) -> dict[str, str]:
    return {"rounding": "nearest", "attention": f"log2, {recipe.abits} bits, whole octaves (simulated)"}


PAPER = Method(
    "paper",
    "published, simulated",
    _calibrate,
    _skeleton,
    _layers,
    _rounded_input,
    _cost,
    lambda recipe: f"paper G={recipe.groups}",
    check=_check,
    plans=_plans,
    read_table=PaperTable.from_dict,
    words=_words,
    simulated=True,
    unread=("rounding", "channels", "attention", "weight_group"),
)
