"""A float network turned into the empty quantized one that a header describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..errors import DgqError
from ..integer.plan import geometry, quantizable
from ..integer.skeleton import build_skeleton, fuse
from ..recipe import LayerPlan

if TYPE_CHECKING:
    from .header import Header


def apply_header(network: nn.Module, header: Header, file: Path | None = None) -> None:
    """Turn a float network (usually on the meta device) into the empty quantized model a header describes.

    Args:
        network: is changed.
        header: from `file`.
        file: for the message of an error.

    Raises:
        DgqError: a planned layer is none of the model's, or not of its kind and sizes.
    """
    try:
        if header.paper is not None:
            from ..paper.calibration import build_paper_skeleton

            build_paper_skeleton(network, header.paper)
            return
        check_plans(network, header.layers)
    except DgqError as error:
        where = f"{file}: quantization_config" if file else "quantization_config"
        raise DgqError(f"{where}: {error.message}", error.hint) from None
    build_skeleton(network, header.layers)
    fuse(network)
    if header.attention is not None:
        from ..integer.attention import use_log_attention

        use_log_attention(network, header.attention)


def check_plans(network: nn.Module, plans: dict[str, LayerPlan]) -> None:
    """Hold plans against the float model: layers, their kinds, sizes and biases, and the parts of split ones.

    Raises:
        DgqError: the first plan that is not of this model.
    """
    modules, skipped = quantizable(network)
    parts: dict[str, list[int]] = {}  # of split layers: where the parts so far end
    for name, plan in plans.items():
        owner = plan.owner(name)
        if owner not in modules:
            why = f"cannot be quantized ({skipped[owner]})" if owner in skipped else "is none of the model's"
            raise DgqError(f"layer {name!r} {why}")
        expected = geometry(modules[owner])
        if plan.columns:
            ends = parts.setdefault(owner, [])
            start = ends[-1] if ends else 0
            if name != f"{owner}.{len(ends)}" or plan.columns[0] != start or owner in plans:
                raise DgqError(f"layer {name!r}: columns {plan.columns} do not follow {start}")
            ends.append(plan.columns[1])
            expected |= {"kind": "pointwise", "in_features": plan.in_features, "bias": expected["bias"] and not start}
        for key, value in expected.items():
            if getattr(plan, key) != value:
                found = f"{key} is {getattr(plan, key)}, {value} in the model"
                raise DgqError(f"layer {name!r}: {found}")
    for owner, ends in parts.items():
        whole = geometry(modules[owner])
        if whole["kind"] != "pointwise" or ends[-1] != whole["in_features"]:
            what = f"the {whole['in_features']} input channels of a {whole['kind']} layer"
            raise DgqError(f"layer {owner!r}: parts that end at {ends} are not {what}")
