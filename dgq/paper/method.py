"""The paper recipe as the rest of dgq asks for it (`dgq.method`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import DgqError
from ..family import family_of
from ..method import Cost, LayerCost, LayerFacts, Made, Method, Work
from ..recipe import Recipe
from .adaround import (
    BATCH,
    EXPECTED_CALLS,
    block_costs,
    block_plans,
    kept_calls,
    learn_rounding,
    pack,
    passes,
    unpack,
    working_bytes,
)
from .calibration import build_paper_skeleton, calibrate_paper, quantizable_layers
from .layers import image_to_pixels_last, pixels_last_to_image
from .plan import PaperAttentionPlan, PaperPlan, PaperTable


def _calibrate(work: Work) -> Made:
    recipe, weights = work.recipe, None
    if recipe.rounding == "adaround":
        weights = learn_rounding(
            work.network,
            work.calls,
            block_plans(work.network, recipe.wbits),
            recipe.iterations,
            budget=work.budget,
            progress=work.progress,
            store=work.store,
            done=work.done,
        )
    table = calibrate_paper(
        work.network,
        work.recorded,
        wbits=recipe.wbits,
        abits=recipe.abits,
        groups=recipe.groups,
        weights=weights,
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
    plans, layers = _plans(network, recipe), {}
    steps, rows, held, replayed = recipe.iterations or 0, dict[str, int](), 0, []
    if plans:
        assert call is not None
        blocks = block_costs(network, call, plans)
        for names in passes(blocks, EXPECTED_CALLS, budget):
            replayed.append([layer for name in names for layer in plans[name].shapes])
            together = sum(blocks[name].held * kept_calls(blocks[name], EXPECTED_CALLS) for name in names)
            held = max(held, together + max(working_bytes(blocks[name], plans[name]) for name in names))
        for block in blocks.values():
            rows |= {name: steps * BATCH * count // block.samples for name, count in block.rows.items()}
    for name, module in quantizable_layers(network).items():
        n, k = module.weight.shape[0], module.weight[0].numel()
        bias = 0 if module.bias is None else n
        stored = n * ((k + 1) // 2 if recipe.wbits == 4 else k) + 8 * n + 2 * bias
        layers[name] = LayerCost(module, n * k, n, n * k + bias, stored, steps, rows.get(name, 0))
    family = family_of(network)
    weighted = (name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    kept = {name: why for name in weighted if (why := family.kept(name))}
    return Cost(layers, kept, held, passes=replayed, whole=[list(layers)])


def _plans(network: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """What is learned block by block; layers that are not are stored when all are done."""
    family = family_of(network)
    if not family.start_token:
        raise DgqError(
            f"the paper recipe sets a start token apart, and the {family.title} reads none", "use --recipe integer"
        )
    return dict(block_plans(network, recipe.wbits)) if recipe.rounding == "adaround" else {}


def _label(recipe: Recipe) -> str:
    learned = " adaround" if recipe.rounding == "adaround" else ""
    return f"paper G={recipe.groups}{learned}"


def _check(recipe: Recipe) -> None:
    if recipe.overrides:
        raise DgqError("the paper recipe quantizes every layer alike and takes no overrides")


def _words(recipe: Recipe, attention: Any) -> dict[str, str]:
    learned = f", {recipe.iterations} iterations" if recipe.rounding == "adaround" else ""
    steps = "equal steps" if recipe.groups == 1 else "log2, whole octaves"
    return {"rounding": recipe.rounding + learned, "attention": f"{steps}, {recipe.abits} bits (simulated)"}


PAPER = Method(
    "paper",
    "published, simulated",
    _calibrate,
    _skeleton,
    _layers,
    _rounded_input,
    _cost,
    _label,
    check=_check,
    plans=_plans,
    pack=pack,
    unpack=unpack,
    read_table=PaperTable.from_dict,
    words=_words,
    simulated=True,
    prompts=64,  # as published
    by_step=True,
    choices={"rounding": ("nearest", "adaround")},
    unread=("channels", "attention", "weight_group"),
)
