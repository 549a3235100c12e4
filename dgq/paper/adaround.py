"""Weight rounding learned block by block, as the DGQ paper takes it over: AdaRound (arXiv 2004.10568) on the blocks of
BRECQ (arXiv 2102.05426)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.func import functional_call

from dgq.errors import DgqError
from dgq.paper.calibration import quantizable_layers
from dgq.paper.quantizers import QuantizedWeight, weight_grid
from dgq.progress import Progress
from dgq.replay import Enough, put_together, replay, take_apart

# What is reconstructed as a whole; a layer outside of them is a block of its own.
BLOCKS = (ResnetBlock2D, BasicTransformerBlock)

# As published: the rectified sigmoid's ends, the regulariser's weight and its exponents, the share of the steps before
# it sets in, and Adam's learning rate, which fewer steps raise.
ZETA, GAMMA = 1.1, -0.1
REGULARISER = 0.01
FIRST_BETA, LAST_BETA = 20.0, 2.0
WARM_UP = 0.2
LEARNING_RATE, PUBLISHED_ITERATIONS = 1e-3, 20_000

# Samples of a gradient step.
BATCH = 8

# Replayed calls that an estimate counts with: as many as `dgq calibrate` replays.
EXPECTED_CALLS = 160

# Of a block's inputs and outputs, at most; a block of large ones learns from fewer calls. Not `dgq calibrate --memory`,
# on which results would depend.
HELD_BYTES = 2**30

# float32 values for each learned weight: the variable, its gradient and Adam's two moments, the two ends of its code,
# its rounded value, and what the gradient is made from.
VALUES_PER_WEIGHT = 14


Learned = dict[str, QuantizedWeight]  # by layer


@dataclass(frozen=True)
class BlockPlan:
    """What is learned at one time: the weights' shapes by the layers' names, and their bits."""

    shapes: dict[str, tuple[int, ...]]
    bits: int


def block_plans(network: nn.Module, bits: int) -> dict[str, BlockPlan]:
    """The reconstruction blocks of a float network, by name: residual and transformer blocks, and every quantized layer
    outside of them, by its own name."""
    roots = [name for name, module in network.named_modules() if isinstance(module, BLOCKS)]
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, module in quantizable_layers(network).items():
        root = next((root for root in roots if name.startswith(f"{root}.")), name)
        shapes.setdefault(root, {})[name] = tuple(module.weight.shape)
    return {name: BlockPlan(own, bits) for name, own in shapes.items()}


@dataclass
class BlockCost:
    """One block in one call of its network.

    Attributes:
        held: bytes of its inputs and its output.
        activations: bytes of its modules' outputs.
        rows: of its quantized layers' outputs (tokens or pixels of all samples), by name.
        samples: of the call.
    """

    held: int = 0
    activations: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    samples: int = 1


def block_costs(network: nn.Module, call: dict[str, Any], plans: Mapping[str, BlockPlan]) -> dict[str, BlockCost]:
    """What blocks take, in the order in which a call (keyword arguments) reaches their ends; on the meta device too."""
    costs = {name: BlockCost() for name in plans}
    order: list[str] = []

    def at_end(name: str) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            order.append(name)
            costs[name].held = sum(tensor.nbytes for tensor in (*take_apart((args, kwargs))[1], output))
            costs[name].samples = len(output)

        return note

    def inside(name: str, part: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                costs[name].activations += output.nbytes
                if part in plans[name].shapes:
                    costs[name].rows[part] = output.numel() // plans[name].shapes[part][0]

        return note

    handles = []
    for name in plans:
        block = network.get_submodule(name)
        handles.append(block.register_forward_hook(at_end(name), with_kwargs=True))
        for part, module in block.named_modules(prefix=name):
            if not list(module.children()):
                handles.append(module.register_forward_hook(inside(name, part)))
    replay(network, [call], handles, lambda done, total: None)
    if missing := sorted(plans.keys() - set(order)):
        raise DgqError(f"{missing[0]}: never ran during calibration")
    return {name: costs[name] for name in dict.fromkeys(order)}


def kept_calls(cost: BlockCost, calls: int) -> int:
    """Of so many replayed calls, those that a block learns from."""
    return max(1, min(calls, HELD_BYTES // cost.held))


def passes(costs: Mapping[str, BlockCost], calls: int, budget: int) -> list[list[str]]:
    """Blocks, in their order, whose inputs and outputs are held at one time: within `budget` bytes, or one block's."""
    groups: list[list[str]] = []
    room = 0
    for name, cost in costs.items():
        size = cost.held * kept_calls(cost, calls)
        if not groups or size > room:
            groups.append([])
            room = budget
        groups[-1].append(name)
        room -= size
    return groups


def working_bytes(cost: BlockCost, plan: BlockPlan) -> int:
    """What the gradient steps of a block hold, about: of each activation also its gradient."""
    weights = sum(map(math.prod, plan.shapes.values()))
    return 4 * VALUES_PER_WEIGHT * weights + 2 * BATCH * cost.activations // cost.samples


class Samples:
    """What a block read and made in calls of its network, sample by sample."""

    def __init__(self) -> None:
        self.form: Any = None
        self.inputs: list[list[Tensor]] = []  # by call: the tensors among its arguments, (B, ...)
        self.outputs: list[Tensor] = []

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Keep copies: what a call makes may be changed in place later."""
        self.form, tensors = take_apart((args, kwargs))
        self.inputs.append([tensor.detach().clone() for tensor in tensors])
        self.outputs.append(output.detach().clone())

    def __len__(self) -> int:
        return sum(map(len, self.outputs))

    def batch(self, picked: Iterable[int]) -> tuple[Any, Any, Tensor]:
        """Positional and keyword arguments of the samples of these numbers, and the output for them."""
        places = [(call, row) for call, output in enumerate(self.outputs) for row in range(len(output))]
        chosen = [places[i] for i in picked]
        tensors = [torch.stack([self.inputs[call][i][row] for call, row in chosen]) for i in range(len(self.inputs[0]))]
        args, kwargs = put_together(self.form, tensors)
        return args, kwargs, torch.stack([self.outputs[call][row] for call, row in chosen])


def record_blocks(
    network: nn.Module,
    calls: Sequence[dict[str, Any]],
    costs: Mapping[str, BlockCost],
    told: Callable[[int, int], None],
) -> dict[str, Samples]:
    """What the blocks of these costs, in their order, read and make in calls spread evenly over those given; each call
    ends with the last block."""
    found = {name: Samples() for name in costs}
    total, wanted = len(calls), dict[str, set[int]]()
    for name, cost in costs.items():
        count = kept_calls(cost, total)
        wanted[name] = {i * total // count for i in range(count)}
    needed = sorted(set().union(*wanted.values()))
    *_, last = costs
    at = 0

    def count_up(done: int, total: int) -> None:
        nonlocal at
        at = done
        told(done, total)

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if needed[at] in wanted[name]:
                found[name].note(args, kwargs, output)
            if name == last:
                raise Enough

        return note

    handles = [network.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in costs]
    replay(network, [calls[i] for i in needed], handles, count_up)
    return found


def learn_rounding(
    network: nn.Module,
    calls: Sequence[dict[str, Any]],
    plans: Mapping[str, BlockPlan],
    iterations: int,
    *,
    budget: int,
    progress: Progress,
    store: Callable[[str, Learned], None],
    done: Mapping[str, Learned],
) -> Learned:
    """Learn for every weight whether it is rounded up or down, one reconstruction block after the other.

    A block's inputs and the outputs that it is to keep are the float network's: so no block waits for another, and an
    interrupted run goes on with any of them. Activations are float. The network is left as it is.

    Args:
        network: float, in eval mode.
        calls: keyword arguments of its calls, to replay.
        plans: its `block_plans`.
        iterations: gradient steps a block.
        budget: bytes of recorded inputs and outputs held at one time; one block's are, whatever they take.
        progress: told of "statistics" (replayed calls) and "learn" (gradient steps of all blocks).
        store: called with a block's name and its layers' weights.
        done: what an earlier run stored.

    Returns:
        the weights of all layers.

    Raises:
        DgqError: a block never ran; a weight or what a block makes is not finite.
    """
    learned = dict(done)
    rest = {name: plan for name, plan in plans.items() if name not in done}
    costs = block_costs(network, calls[0], rest) if rest else {}
    for names in passes(costs, len(calls), budget):
        group = {name: costs[name] for name in names}
        found = record_blocks(network, calls, group, lambda i, of: progress("statistics", i, of, ""))
        for name in names:
            before, total = len(learned) * iterations, len(plans) * iterations

            def told(i: int, name: str = name, before: int = before, total: int = total) -> None:
                progress("learn", before + i, total, name)

            learned[name] = learn_block(network, name, plans[name], found.pop(name), iterations, told)
            store(name, learned[name])
    return {layer: weight for weights in learned.values() for layer, weight in weights.items()}


def learn_block(
    network: nn.Module,
    name: str,
    plan: BlockPlan,
    samples: Samples,
    iterations: int,
    told: Callable[[int], None] = lambda i: None,
) -> Learned:
    """Learn the rounding of one block's weights, on the scales and zero points of the range search.

    W / s + z becomes its floor and h(V) in 0 .. 1 above it. V is learned by the squared error of the block's output
    (summed over its channels, in the mean of samples and pixels or tokens) and by a regulariser that sends h to 0 or 1;
    then h is rounded.

    Args:
        network: float; name: of the block in it.
        plan: of the block.
        samples: what it reads and makes.
        iterations: gradient steps.
        told: called with the number of steps done.

    Raises:
        DgqError: a weight or an output is not finite.
    """
    block, top = network.get_submodule(name), 2**plan.bits - 1
    if not all(output.isfinite().all() for output in samples.outputs):
        raise DgqError(f"{name}: its output is not finite", hint="it overflowed: calibrate in float32")
    grids, floors, steps, starts = [], [], [], []
    for layer in plan.shapes:
        weight = network.get_submodule(layer).get_parameter("weight").detach().float()
        if not weight.isfinite().all():
            raise DgqError(f"{layer}: the weight holds NaN or infinity")
        scale, zero_point = weight_grid(weight, plan.bits)
        rows = weight.flatten(1) / scale[:, None]
        code = rows.floor() + zero_point[:, None]
        movable = (code >= 0) & (code < top)  # codes are clamped: beyond their ends up and down are the same
        code.clamp_(0, top)
        grids.append((code, movable, scale, zero_point))
        floors.append(((code - zero_point[:, None]) * scale[:, None]).flatten())
        steps.append((movable * scale[:, None]).flatten())
        starts.append((rows - rows.floor()).flatten())
    low, step = torch.cat(floors), torch.cat(steps)
    variable = -torch.log((ZETA - GAMMA) / (torch.cat(starts) - GAMMA) - 1)
    del floors, steps, starts
    inner = {layer: f"{layer.removeprefix(name)}.weight".removeprefix(".") for layer in plan.shapes}
    sizes = [math.prod(shape) for shape in plan.shapes.values()]
    optimizer = torch.optim.Adam([variable], lr=LEARNING_RATE * max(1.0, PUBLISHED_ITERATIONS / iterations))
    generator = torch.Generator().manual_seed(0)
    warm = int(WARM_UP * iterations)
    for i in range(iterations):
        args, kwargs, target = samples.batch(torch.randperm(len(samples), generator=generator)[:BATCH].tolist())
        with torch.enable_grad():
            variable.requires_grad_()
            h = (torch.sigmoid(variable) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
            parts = torch.addcmul(low, h, step).split(sizes)
            weights = {inner[layer]: part.view(plan.shapes[layer]) for layer, part in zip(inner, parts, strict=True)}
            error = functional_call(block, weights, tuple(args), kwargs) - target
            loss = error.square().sum() / (error.numel() // error.shape[1 if error.ndim == 4 else -1])
            if i >= warm:
                beta = FIRST_BETA + (LAST_BETA - FIRST_BETA) * (i - warm) / (iterations - warm)
                loss = loss + REGULARISER * (1 - (2 * h - 1).abs().pow(beta)).sum()
            (variable.grad,) = torch.autograd.grad(loss, variable)
        optimizer.step()
        told(i + 1)
    up = (variable.detach() >= 0).split(sizes)  # h >= 1/2
    return {
        layer: ((code + movable * one.view_as(code)).to(torch.uint8).view(plan.shapes[layer]), scale, zero_point)
        for (layer, one, (code, movable, scale, zero_point)) in zip(plan.shapes, up, grids, strict=True)
    }


_PARTS = ("codes", "scale", "zero_point")


def pack(weights: Learned) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A block's weights as a file has them; see `method.Method`."""
    parts = {layer: zip(_PARTS, weight, strict=True) for layer, weight in weights.items()}
    return {f"{layer}.{part}": tensor for layer, own in parts.items() for part, tensor in own}, {}


def unpack(plan: BlockPlan, tensors: dict[str, Tensor], rest: dict[str, Any]) -> Learned:
    """Inverse of `pack`.

    Raises:
        DgqError: they are none of the block's.
    """
    weights: Learned = {}
    for layer, shape in plan.shapes.items():
        codes, scale, zero_point = (tensors.pop(f"{layer}.{part}") for part in _PARTS)
        of_rows = all(one.shape == shape[:1] and one.dtype == torch.float32 for one in (scale, zero_point))
        if codes.shape != shape or codes.dtype != torch.uint8 or int(codes.max()) >= 2**plan.bits or not of_rows:
            raise DgqError(f"{layer} is another layer")
        weights[layer] = codes, scale, zero_point
    if tensors or rest:
        raise DgqError("it is another block")
    return weights
