"""Memory of a tuning step on Stable Diffusion v1.4's UNet, predicted: the sizes of all tensors while fake ones run it.

    python benchmarks/tuning_memory.py

`dgq tune` on packed integers beside a LoRA of rank 4 on the float model, one picture of 512 pixels, bfloat16: without
gradient checkpointing, with diffusers' (as LoRAs are trained) and with the finer one of `dgq tune`. No arithmetic is
done, so no allocator's slack, no workspace of a kernel and no other part of the pipeline is in the figures.
"""

from __future__ import annotations

import argparse
import json
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgq.architectures import ARCHITECTURES, call
from dgq.integer.plan import plan_layers
from dgq.integer.skeleton import build_skeleton, fuse
from dgq.recipe import Recipe
from dgq.tuning.forward import Experts, differentiable
from dgq.tuning.layout import Layout
from dgq.tuning.recompute import lean

DEVICE = torch.device("cpu")


class Peak(TorchDispatchMode):
    """Bytes of the storages that operators make and that live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}
        self.live: dict[int, tuple[int, str]] = {}
        self.at_peak: dict[int, tuple[int, str]] = {}
        self.before: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                self._count(leaf.untyped_storage(), before, f"{function} {list(leaf.shape)}")
        return result

    def _count(self, storage: torch.UntypedStorage, before: set[int], name: str) -> None:
        key = storage._cdata
        if key in before or key in self.known:
            return
        size = storage.nbytes()
        self.now += size
        self.live[key] = size, name
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.live)

        def gone(_: Any) -> None:
            self.now -= size
            self.known.pop(key, None)
            self.live.pop(key, None)

        self.known[key] = weakref.ref(storage, gone)

    def forward_done(self) -> None:
        """The forward pass has ended: what lives now is kept for the backward pass."""
        self.before = dict(self.live)

    @property
    def kept_bytes(self) -> int:
        """Bytes at the peak that the forward pass left."""
        return sum(size for key, (size, _) in self.at_peak.items() if self.before.get(key) == self.at_peak[key])

    def largest(self, count: int) -> list[str]:
        """What the peak consists of, by operator and shape."""
        sums: dict[str, list[float]] = {}
        for size, name in self.at_peak.values():
            found = sums.setdefault(name, [0, 0])
            found[0] += size / 2**20
            found[1] += 1
        ordered = sorted(sums.items(), key=lambda item: -item[1][0])
        return [f"{mib:.1f} MiB in {number}: {name}" for name, (mib, number) in ordered[:count]]


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


def step(
    unet: Any, parameters: list[torch.nn.Parameter], experts: Experts | None, checkpointing: str, tracker: Peak
) -> None:
    """Forward, backward and update, as `dgq tune` does them."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    if checkpointing == "diffusers":
        unet.enable_gradient_checkpointing()
    arguments = call(unet, 1, DEVICE)
    arguments = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in arguments.items()
    }
    with ExitStack() as stack:
        if experts is not None:
            stack.enter_context(differentiable(unet, experts, checkpointing == "dgq"))
            experts.choose([500])
        elif checkpointing == "dgq":
            stack.enter_context(lean(unet, True))
        loss = unet(**arguments).sample.float().square().mean()
        tracker.forward_done()
        loss.backward()
    optimizer.step()


def measure(system: str, wbits: int, checkpointing: str, largest: int = 0) -> dict[str, Any]:
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
            step(unet, parameters, experts, checkpointing, tracker)
    return {
        "system": system,
        "wbits": wbits if system == "dgq" else 16,
        "checkpointing": checkpointing,
        "trained": sum(parameter.numel() for parameter in parameters),
        "unet_mib": held / 2**20,
        "above_unet_mib": tracker.peak / 2**20,
        "of_that_kept_mib": tracker.kept_bytes / 2**20,
        **({"largest": tracker.largest(largest)} if largest else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=0, help="tell so many of the things that the peak consists of")
    largest = parser.parse_args().largest
    for system, wbits, checkpointing in (
        ("dgq", 4, "dgq"),
        ("dgq", 8, "dgq"),
        ("lora", 0, "diffusers"),
        ("lora", 0, "dgq"),
        ("dgq", 4, "none"),
        ("lora", 0, "none"),
    ):
        print(json.dumps(measure(system, wbits, checkpointing, largest), indent=1 if largest else None), flush=True)


if __name__ == "__main__":
    main()
