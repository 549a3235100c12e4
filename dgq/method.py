"""What dgq asks of a quantization method. A file of the method's room answers; `dgq.methods` lists them.

Nothing but the entries of `METHODS` knows a method's name: a recipe's checks and label, calibration and its estimate,
the header, loading, reports, measurement and benchmarks look it up here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Calls = Sequence[dict[str, Any]]  # a network's, as keyword arguments


@dataclass(frozen=True)
class LayerFacts:
    """One quantized layer of a checkpoint, as reports tell of it.

    Attributes:
        kind: "linear", "pointwise", "conv2d", or "attention" where its operands are quantized.
        shape: of the weight, (N, C) or (N, C, kh, kw); () for attention.
        wbits: bits of the weight, 0 for attention; abits: of the activations, 0 where they stay float.
        channels: how input channels are handled, in a word or two.
        owner: the float layer that it stands for, or is a part of.
        prefix: what the names of its tensors begin with.
    """

    kind: str
    shape: tuple[int, ...]
    wbits: int
    abits: int
    channels: str
    owner: str
    prefix: str


@dataclass(frozen=True)
class LayerCost:
    """One layer before its calibration.

    Attributes:
        module: the float layer.
        macs: multiply-accumulates of a row (token or pixel) of its output; outputs: values of such a row.
        parameters: of the float layer that are stored otherwise; stored_bytes: what takes their place.
        learned_steps: gradient steps on its weight; learned_rows: rows of its output in all of them.
        seconds: of its calibration on this machine beside the network's own calls, given the rows of those replayed in
            `Cost.passes`.
    """

    module: nn.Module
    macs: int
    outputs: int
    parameters: int
    stored_bytes: int
    learned_steps: int = 0
    learned_rows: int = 0
    seconds: Callable[[int], float] = lambda rows: 0.0


@dataclass(frozen=True)
class Cost:
    """What a calibration of a network takes.

    Attributes:
        layers: by name; kept: {name: reason} of layers that stay float.
        statistics_bytes: peak of what is kept of the replayed calls.
        gathered_bytes: peak of it while calls are replayed, where the network is not needed for the rest, and a mapped
            file is let go of; None where it is.
        passes: names of the layers that each replay of the calls is for, of at most as many as the user says; it ends
            where the last of them is reached.
        whole: the same of replays of every recorded call.
        rows: {layer: rows (tokens or pixels, of all samples) that it computes in the call}, in the order in which it
            does, of a method that has run the call; empty of others.
    """

    layers: Mapping[str, LayerCost]
    kept: Mapping[str, str]
    statistics_bytes: int = 0
    gathered_bytes: int | None = None
    passes: Sequence[Sequence[str]] = ()
    whole: Sequence[Sequence[str]] = ()
    rows: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a calibration hands to its method.

    Attributes:
        network: the float model's; becomes the quantized one.
        recorded: its calls, by prompt and step; calls: those of them to replay.
        recipe: `recipe.Recipe`.
        budget: bytes for statistics held at one time.
        progress: told of stages.
        store: called with the name and the result of everything finished that a later run may take from `done`.
        done: such results of an earlier run.
    """

    network: nn.Module
    recorded: Sequence[Calls]
    calls: Calls
    recipe: Any
    budget: int
    progress: Callable[[str, int, int, str], None]
    store: Callable[[str, Any], None]
    done: Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """What a method made of a network; all of it goes into the header.

    Attributes:
        layers: plans of integer layers (`recipe.LayerPlan`); attention: of logarithmic attention.
        table: whatever else its skeleton is built from.
        facts: for the header's `calibration`.
    """

    layers: dict[str, Any] = field(default_factory=dict)
    attention: Any = None
    table: Any = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A quantization method. A recipe is a `recipe.Recipe`, a header a `checkpoint.header.Header`.

    Attributes:
        name: a recipe's, and the table's in a header.
        help: for `dgq calibrate --help`.
        calibrate: quantizes a network in place.
        skeleton: skeleton(network, header) turns a float network (usually on the meta device) into the empty quantized
            one. Raises a DgqError where the header's plans are not of this network.
        layers: the quantized layers of a header, in the model's order.
        rounded_input: rounded_input(layer, x): the float values that a quantized layer makes of its input.
        cost: cost(network, recipe, budget, call), with a float network on any device, bytes for statistics, and a call
            of the network there (keyword arguments), or None where its layers are reached in the order of its modules.
        label: short name of a recipe, without its bits.
        check: raises a DgqError for options that the method does not take.
        plans: plans of the layers, or of whatever else is finished at one time, whose results an interrupted run may
            have stored. Raises a DgqError where the recipe does not fit the network.
        pack: pack(result): a finished result as tensors, and the rest of it as JSON, for a file.
        unpack: unpack(plan, tensors, rest): its inverse. May raise anything where they are damaged or of another plan.
        read_table: the table of a header from its JSON; None where the method has none. A table has `to_dict`, or is
            JSON.
        words: words(recipe, attention): its "rounding" and "attention" as `dgq inspect` says it.
        simulated: it runs in float, and is never faster than the float model.
        choices: the values that options of a recipe may have, where not all of them; the first takes the place of a
            default that is not among them.
        unread: options of a recipe that mean nothing to the method: none but the default can be asked for.
        reads_calls: whether it needs recorded calls of the network; without them a calibration draws no pictures but
            those that it compares.
        prompts: calibration prompts where nobody says how many.
        by_step: whether what it learns belongs to single steps of the sampler: recorded pictures then have all of them.
    """

    name: str
    help: str
    calibrate: Callable[[Work], Made]
    skeleton: Callable[[nn.Module, Any], None]
    layers: Callable[[Any], dict[str, LayerFacts]]
    rounded_input: Callable[[Any, Tensor], Tensor]
    cost: Callable[[nn.Module, Any, int, dict[str, Any] | None], Cost]
    label: Callable[[Any], str]
    check: Callable[[Any], None] = lambda recipe: None
    plans: Callable[[nn.Module, Any], dict[str, Any]] = lambda network, recipe: {}
    pack: Callable[[Any], tuple[dict[str, Tensor], dict[str, Any]]] = lambda result: (result, {})
    unpack: Callable[[Any, dict[str, Tensor], dict[str, Any]], Any] = lambda plan, tensors, rest: tensors
    read_table: Callable[[Any], Any] | None = None
    words: Callable[[Any, Any], dict[str, str]] = lambda recipe, attention: {
        "rounding": "nearest",
        "attention": "float",
    }
    simulated: bool = False
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    reads_calls: bool = True
    prompts: int = 96
    by_step: bool = False

    def refusal(self, option: str, value: Any) -> str | None:
        """Why an option of a recipe cannot be asked for with a value; None where it can."""
        if option in self.unread:
            return f"the {self.name} recipe has no {option}"
        allowed = self.choices.get(option, (value,))
        known = " or ".join(map(repr, allowed))
        return None if value in allowed else f"the {self.name} recipe has {option} {known}, not {value!r}"


METHODS: dict[str, Method] = {}
