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
        seconds: of its calibration on this machine beside the network's own calls, given the rows of all replayed ones.
    """

    module: nn.Module
    macs: int
    outputs: int
    parameters: int
    stored_bytes: int
    seconds: Callable[[int], float] = lambda rows: 0.0


@dataclass(frozen=True)
class Cost:
    """What a calibration of a network takes.

    Attributes:
        layers: by name; kept: {name: reason} of layers that stay float.
        statistics_bytes: peak of what is kept of the replayed calls.
        gathered_bytes: peak of it while calls are replayed, where the network is not needed for the rest, and a mapped
            file is let go of; None where it is.
        passes: names of the layers that each replay of the calls is for; it ends where the last of them is reached.
        whole: whether every recorded call is replayed, or at most as many as the user says.
    """

    layers: Mapping[str, LayerCost]
    kept: Mapping[str, str]
    statistics_bytes: int = 0
    gathered_bytes: int | None = None
    passes: Sequence[Sequence[str]] = ()
    whole: bool = False


@dataclass(frozen=True)
class Work:
    """What a calibration hands to its method.

    Attributes:
        network: the float model's; becomes the quantized one.
        recorded: its calls, by prompt and step; calls: those of them to replay.
        recipe: `recipe.Recipe`.
        budget: bytes for statistics held at one time.
        progress: told of stages.
        store: called with the name and the result of every finished layer that a later run may take from `done`.
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
        plans: plans of the layers whose results an interrupted run may have stored. Raises a DgqError where the recipe
            does not fit the network.
        read_table: the table of a header from its JSON; None where the method has none. A table has `to_dict`, or is
            JSON.
        words: words(recipe, attention): its "rounding" and "attention" as `dgq inspect` says it.
        simulated: it runs in float, and is never faster than the float model.
        fixed: options of a recipe that the method settles: their values take the place of the defaults, and no others
            can be asked for.
        unread: options of a recipe that mean nothing to the method: none but the default can be asked for.
        reads_calls: whether it needs recorded calls of the network; without them a calibration draws no pictures but
            those that it compares.
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
    read_table: Callable[[Any], Any] | None = None
    words: Callable[[Any, Any], dict[str, str]] = lambda recipe, attention: {
        "rounding": "nearest",
        "attention": "float",
    }
    simulated: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    reads_calls: bool = True


METHODS: dict[str, Method] = {}
