"""CUDA devices that are pretended: tensors that say they are on cuda:N, compute on the CPU, and refuse to meet others.

torch's fake tensors know devices too, but hold no values, and a calibration asks for values all the time: is this
finite, which channels are outliers, do these layers share their codes. A pretended tensor keeps a CPU tensor and runs
each operator on it, after the check that CUDA would make: tensors of one operator are on one device, numbers (tensors
without dimensions) aside. An own operator must also say of its result what its fake form says, which runs on torch's
fake tensors of that device.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dgq_kernels.codes import centred

aten = torch.ops.aten
ASKED: set[tuple] = set()  # by `check_fake`
CPU = torch.device("cpu")
# These take tensors of two devices on CUDA as well.
MAY_MIX = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}


class Placed(torch.Tensor):
    """A tensor that says it is on a CUDA device. To torch's own C++ code it is on the CPU."""

    held: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: torch.Tensor, place: torch.device) -> Placed:
        assert type(held) is torch.Tensor
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device="cpu"
        )
        self.held, self.place = held, place
        return self

    @property
    def device(self) -> torch.device:
        return self.place

    is_cuda = True

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype)
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = device or self.place, dtype or self.dtype
        if (device, dtype) == (self.place, self.dtype) and memory_format is None:
            return self
        return aten._to_copy(self, device=device, dtype=dtype, memory_format=memory_format or torch.preserve_format)

    def cpu(self):
        return self.to("cpu")

    def new_tensor(self, data, **options):
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.place, **options})

    def numpy(self):
        raise TypeError(f"a tensor on {self.place} has no numpy form")

    def tolist(self):
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"Placed({self.held!r}, {self.place})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: only within Pretended")


def padded(sequences, batch_first=False, padding_value=0.0, padding_side="right"):
    """`pad_sequence` on the device of the first; torch's own makes its result in C++."""
    assert batch_first
    assert padding_side == "right"
    size = (len(sequences), max(map(len, sequences)), *sequences[0].shape[1:])
    made = torch.full(size, padding_value, dtype=sequences[0].dtype, device=sequences[0].device)
    for i, sequence in enumerate(sequences):
        made[i, : len(sequence)] = sequence
    return made


class _Indexed(TorchFunctionMode):
    """Reads "cuda" as "cuda:0": to find the current device torch's own code would ask the driver."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def indexed(x):
            if isinstance(x, str | torch.device) and str(x) == "cuda":
                return torch.device("cuda", 0)
            return x

        kwargs = kwargs or {}
        if func is torch._C._nn.pad_sequence:
            return padded(*args, **kwargs)
        if func is torch.Tensor.to or "device" in kwargs:
            args, kwargs = tuple(map(indexed, args)), {key: indexed(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


class Pretended(TorchDispatchMode):
    """While it is on there are CUDA devices. `ran` counts the operators that ran on each."""

    # torch then leaves CUDA's own initialisation out
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[tuple[torch._ops.OpOverload, torch.device]] = Counter()

    def __enter__(self):
        before = torch._C._only_lift_cpu_tensors(), torch.__future__.get_overwrite_module_params_on_conversion()
        self._before = before
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor moves to a device by an operator
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # modules change a tensor's class
        self._indexed = _Indexed()
        self._indexed.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._indexed.__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(self._before[1])
        torch._C._set_only_lift_cpu_tensors(self._before[0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        if Placed not in types and (asked is None or asked.type != "cuda"):
            return func(*args, **kwargs)
        operands: dict[int, Placed] = {}
        devices: set[torch.device] = set()

        def held(x):
            if isinstance(x, Placed):
                operands[id(x.held)] = x
                devices.add(x.place)
                return x.held
            if isinstance(x, torch.Tensor) and x.dim():
                devices.add(x.device)
            return [held(one) for one in x] if isinstance(x, list | tuple) else x

        plain = [held(x) for x in args]
        named = {name: held(x) for name, x in kwargs.items()}
        if len(devices) > 1 and func not in MAY_MIX:
            raise RuntimeError(f"{func}: tensors on {' and '.join(sorted(map(str, devices)))}")
        place = args[0].device if func in MAY_MIX else next((x.place for x in operands.values()), CPU)
        if asked is not None and (func is aten._to_copy.default or not operands):
            place = asked
        if place.type == "cuda" and "device" in named:
            named["device"] = CPU
        result = func(*plain, **named)
        if place.type != "cuda":
            return result
        self.ran[func, place] += 1
        if func.namespace == "dgq":
            if isinstance(result, tuple) and result[0].dtype == torch.uint8:
                result = (centred(result[0]), *result[1:])  # in the form that CUDA's have
            check_fake(func, args, kwargs, result, place)

        def placed(x):  # an operand that was changed in place stays itself
            if isinstance(x, torch.Tensor):
                return operands[id(x)] if id(x) in operands else Placed(x, place)
            return type(x)(map(placed, x)) if isinstance(x, list | tuple) else x

        return placed(result)


def check_fake(func, args, kwargs, result, device):
    """Ask that an operator's fake form says of shape, dtype, layout and device what the operator returned. It knows
    nothing else of its tensors: what was asked once is not asked again."""

    def form(x):
        return (x.device, x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else (type(x), x)

    asked = (func, *map(form, tree_leaves((args, kwargs))), device, *map(form, tree_leaves(result)))
    if asked in ASKED:
        return
    fake = FakeTensorMode()

    def faked(x):
        if not isinstance(x, torch.Tensor):
            return x
        meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return FakeTensor(fake, meta, x.device)

    fake_args, fake_kwargs = tree_map(faked, (args, kwargs))
    with fake:
        said = func(*fake_args, **fake_kwargs)
    for x, real in zip(tree_leaves(said), tree_leaves(result), strict=True):
        told = (x.device, x.dtype, x.shape, x.stride())
        assert told == (device, real.dtype, real.shape, real.stride()), f"{func}: {told}"
    ASKED.add(asked)
