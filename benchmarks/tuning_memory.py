"""Memory of a tuning step on Stable Diffusion v1.4's UNet, predicted: the sizes of all tensors while fake ones run it.

    python benchmarks/tuning_memory.py

`dgq tune` on packed integers beside a LoRA of rank 4 on the float model, with gradient checkpointing and without, one
picture of 512 pixels, bfloat16. No arithmetic is done, so no allocator's slack, no workspace of a kernel and no other
part of the pipeline is in the figures.
"""

from __future__ import annotations

import argparse
import json
import weakref
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgq.architectures import ARCHITECTURES, call
from dgq.integer.fused_unet import fuse
from dgq.integer.plan import plan_layers
from dgq.integer.skeleton import build_skeleton
from dgq.recipe import Recipe
from dgq.tuning.forward import Experts, differentiable
from dgq.tuning.layout import Layout

DEVICE = torch.device("cpu")


class Peak(TorchDispatchMode):
    """Bytes of the storages that operators make and that live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                self._count(leaf.untyped_storage(), before)
        return result

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        if key in before or key in self.known:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: Any) -> None:
            self.now -= size
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, gone)


class Lora(nn.Module):
    """A linear layer beside which a product of rank 4 is trained in float32, computed in the input's dtype. (peft's own
    layers do not take fake tensors.)"""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (
            nn.Parameter(torch.zeros(shape)) for shape in ((4, base.in_features), (base.out_features, 4))
        )

    def forward(self, x: Tensor) -> Tensor:
        """As of the linear layer."""
        low: Tensor = x @ self.down.to(x.dtype).t()
        result: Tensor = self.base(x) + low @ self.up.to(x.dtype).t()
        return result


def step(unet: Any, parameters: list[torch.nn.Parameter], experts: Experts | None, checkpointing: bool) -> None:
    """Forward, backward and update, as `dgq tune` does them."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    arguments = call(unet, 1, DEVICE)
    arguments = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in arguments.items()
    }
    if experts is None:
        unet(**arguments).sample.float().square().mean().backward()
    else:
        with differentiable(unet, experts):
            experts.choose([500])
            unet(**arguments).sample.float().square().mean().backward()
    optimizer.step()


def measure(system: str, wbits: int, checkpointing: bool) -> dict[str, Any]:
    """Bytes of the loaded UNet and of the step's peak."""
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        unet: Any = UNet2DConditionModel.from_config(ARCHITECTURES["sd-v1.4"].config).eval()
        torch.set_default_dtype(torch.float32)
        experts = None
        if system == "dgq":
            build_skeleton(unet, {layer.name: layer.plan for layer in plan_layers(unet, Recipe(wbits=wbits))[0]})
            fuse(unet)
        unet.requires_grad_(False)
        if system == "dgq":
            experts = Experts(Layout.of(unet, True), 2, 1000, DEVICE)
            parameters = experts.vectors
        else:
            for module in list(unet.modules()):
                if hasattr(module, "to_q"):
                    for name in ("to_q", "to_k", "to_v"):
                        setattr(module, name, Lora(getattr(module, name)))
                    module.to_out[0] = Lora(module.to_out[0])
            parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        held = sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))
        with Peak() as tracker:
            step(unet, parameters, experts, checkpointing)
    return {
        "system": system, "wbits": wbits if system == "dgq" else 16, "checkpointing": checkpointing,
        "trained": sum(parameter.numel() for parameter in parameters), "unet_mib": held / 2**20,
        "above_unet_mib": tracker.peak / 2**20,
    }  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for checkpointing in (True, False):
        for system, wbits in (("dgq", 4), ("dgq", 8), ("lora", 0)):
            print(json.dumps(measure(system, wbits, checkpointing)), flush=True)


if __name__ == "__main__":
    main()
