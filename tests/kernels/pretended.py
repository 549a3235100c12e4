"""Every operator on a pretended CUDA device of compute capability 9.0: Triton specialises and compiles each launch as a
GPU's first call would have it (arguments that are 1, aligned or absent, the pointers' types), and nothing runs.

    python tests/kernels/pretended.py operators embedded [again sd-v1.4 sdxl-turbo]

A process of its own, as Triton must not have been imported for its interpreter. Prints a JSON object a line: a kernel
with its registers, spilled bytes and shared memory, or an error; the last line counts the launches. "sd-v1.4" takes
minutes. Of a network's config.json launches are counted, and nothing is compiled.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import sys
import threading
import time
import unittest.mock
from pathlib import Path

import torch

os.environ.pop("TRITON_INTERPRET", None)
sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
from pretend import CURRENT, MOST_STACK, pretend
from triton.runtime import JITFunction, driver

import dgq_kernels
from dgq import architectures, recipe
from dgq.bench import worker
from dgq.checkpoint.apply import apply_header
from dgq.checkpoint.header import Header
from dgq.integer import attention
from dgq.integer.plan import plan_layers
from dgq.integer.shared_input import prepare_all, project
from dgq.pictures import embedded
from dgq.tuning.forward import Experts, differentiable
from dgq.tuning.layout import Layout
from dgq_kernels import async_wgmma, launch, packing
from dgq_kernels.quantize_activation import triton as quantizers

log_attention = importlib.import_module("dgq_kernels.log_attention")  # the package has the operator by that name
LAUNCHES: list[tuple] = []


def say(**facts):
    print(json.dumps(facts), flush=True)


@contextlib.contextmanager
def current(device):
    """`torch.cuda.device` of pretended devices."""
    before, CURRENT[0] = CURRENT[0], device.index
    try:
        yield
    finally:
        CURRENT[0] = before


class OnDevice1(torch.Tensor):
    """A tensor that says it lies on the second CUDA device."""

    is_cuda = True
    device = torch.device("cuda", 1)


def compiled(kernel, registers, stack, shared):
    say(kernel=kernel, registers=registers, spilled=stack if stack > MOST_STACK else 0, shared=shared)


def calls():
    """(operator, arguments): edges that no step of a model has, and a few products and norms of SD v1.4."""
    g = torch.Generator().manual_seed(0)
    half, single = torch.float16, torch.float32

    def floats(*size, dtype=half):
        return torch.randn(*size, generator=g).to(dtype)

    def unaligned(x):
        """x where no address is a multiple of 16 bytes."""
        return torch.cat((x.new_empty(1), x.flatten()))[1:].view(x.shape)

    def order(channels):
        return torch.randperm(channels, generator=g).to(torch.int32)

    for rows, channels, dtype in ((1, 1, half), (5, 42, torch.bfloat16), (5, 64, single)):
        x, gain = floats(rows, channels, dtype=dtype), floats(channels, dtype=dtype)
        every = gain.float(), order(channels)
        yield "quantize_rows", (x, 8, None)
        yield "quantize_rows", (x, 8, *every)
        yield "silu_quantize_rows", (x, 8, None, None)
        yield "geglu_quantize_rows", (floats(rows, 2 * channels, dtype=dtype), 8, *every)
        yield "layer_norm_quantize_rows", (x, None, None, 1e-5, 8, None, None)
        yield "layer_norm_quantize_rows", (x, gain, gain, 1e-5, 8, *every)
    yield "quantize_rows", (floats(5, 64), 8, None)
    yield "quantize_rows", (unaligned(floats(5, 64)), 8, None)
    yield "quantize_rows", (floats(1, 9000), 8, None)
    for rows, channels, block, dtype in ((1, 16, 16, half), (5, 192, 64, torch.bfloat16), (8192, 1280, 256, single)):
        x, gain = floats(rows, channels, dtype=dtype), floats(channels, dtype=dtype)
        yield "quantize_rows", (x, 8, None, None, block)
        yield "silu_quantize_rows", (x, 8, gain.float(), None, block)
        yield "geglu_quantize_rows", (floats(rows, 2 * channels, dtype=dtype), 8, gain.float(), None, block)
        yield "layer_norm_quantize_rows", (x, gain, gain, 1e-5, 8, gain.float(), None, block)
        x = floats(2, channels, 8, 8, dtype=dtype)
        yield "quantize_samples", (x, 8, gain.float(), 1, None, block)
        yield "group_norm_quantize_rows", (x, 2, gain, gain, 1e-5, 8, gain.float(), None, block)
        yield "group_norm_quantize_samples", (x, 2, gain, gain, 1e-5, True, 8, None, 1, None, x[:, :, 0, 0], block)
    yield "quantize_rows", (unaligned(floats(5, 64)), 8, None, None, 64)
    yield "quantize_rows", (floats(1, 10240), 8, None, None, 256)
    # one pixel, one group, one channel, groups of one channel
    for size, groups, dtype in (
        ((1, 1, 1, 1), 1, half),
        ((1, 32, 1, 1), 1, torch.bfloat16),
        ((2, 32, 4, 3), 32, single),
    ):
        x, gain, shift = floats(*size, dtype=dtype), floats(size[1], dtype=dtype), floats(*size[:2], dtype=dtype)
        every = gain.float(), order(size[1])
        yield "quantize_samples", (x, 8, None, 1, None)
        yield "quantize_samples", (x, 8, every[0], 0, every[1])
        yield "group_norm_quantize_rows", (x, groups, None, None, 1e-5, 8, None, None)
        yield "group_norm_quantize_rows", (x, groups, gain, gain, 1e-5, 8, *every)
        yield "group_norm_quantize_samples", (x, groups, None, None, 1e-5, False, 8, None, 1, None, None)
        yield "group_norm_quantize_samples", (x, groups, gain, gain, 1e-5, True, 8, every[0], 0, every[1], shift)
    yield "group_norm_quantize_samples", (floats(2, 320, 64, 64), 32, *[floats(320)] * 2, 1e-5, True, 8, None, 1, None)

    def epilogue(rows, weight):
        n = len(weight)
        return (
            (torch.ones(rows), torch.zeros(rows, dtype=torch.int32)),
            (torch.ones(n), weight.sum(1, dtype=torch.int32)),
        )

    def int4(weight, group):
        packed = packing.pack_int4(weight, group)
        groups = packed.shape[1] * 2 // group
        return packed, packing.pack_subscales(torch.ones(len(weight), groups, dtype=torch.uint8))

    # one row, one channel in, one channel out; SD v1.4's time embedding and a feed-forward layer
    for m, k, n in ((1, 1, 2), (5, 1, 1), (1, 320, 1280), (8192, 320, 2560)):
        codes, weight = torch.zeros(m, k, dtype=torch.int8), torch.zeros(n, k, dtype=torch.int8)
        rows, channels = epilogue(m, weight)
        for dtype, bias, residual, gated, ends in (
            (half, None, None, n > 1, [k]),
            *([(single, floats(n), floats(m, n, dtype=single), False, [k // 2, k])] if m < 8192 else []),
        ):
            group, more = 64 if gated else 32, (residual, gated)
            yield "linear_int8", (codes, *rows, weight, *channels, bias, dtype, ends, *more)
            yield "linear_int4", (codes, *rows, *int4(weight, group), *channels, bias, dtype, group, *more)
    codes, weight = torch.zeros(1, 40, dtype=torch.int8), torch.zeros(6, 40, dtype=torch.int8)
    for ends in ([40], [10, 40]):
        rows, channels = epilogue(len(ends), weight)
        sums = channels[1].expand(len(ends), 6).contiguous()
        yield "linear_float_groups", (codes, *rows, weight, channels[0], sums, None, half, ends)

    # one pixel, one channel; strides; SD v1.4's middle block
    for b, c, n, size, kernel, stride in (
        (1, 1, 1, 1, 1, 1),
        (1, 32, 6, 1, 3, 1),
        (2, 40, 6, 4, 3, 2),
        (2, 1280, 1280, 8, 3, 1),
    ):
        edge = size + 2 * (kernel // 2)
        codes = torch.zeros(b, c, edge, edge, dtype=torch.int8).contiguous(memory_format=torch.channels_last)
        weight = torch.zeros(n, kernel**2 * c, dtype=torch.int8)
        rows, channels = epilogue(b, weight)
        image = weight.view(n, kernel, kernel, c).permute(0, 3, 1, 2)
        out = (edge - kernel) // stride + 1
        for residual in (None, floats(b, n, out, out)):
            ends = [c] if residual is None or c == 1 else [c // 2, c]
            bias = None if residual is None else floats(n)
            yield "conv2d", (codes, *rows, image, *channels, bias, stride, half, ends, residual)
            yield (
                "conv2d_int4",
                (
                    codes,
                    *rows,
                    *int4(weight, 32),
                    *channels,
                    bias,
                    kernel,
                    stride,
                    half,
                    32,
                    residual,
                ),
            )

    # an upsampler of one channel and pixel, an odd one, a decoder's
    for b, c, n, height, width, dtype in ((1, 1, 1, 1, 1, half), (2, 40, 6, 3, 5, single), (1, 512, 512, 64, 64, half)):
        codes = torch.zeros(2 * b, height + 2, width + 2, c, dtype=torch.int8).permute(0, 3, 1, 2)
        weight = torch.zeros(4 * n, 4 * c, dtype=torch.int8)
        rows, channels = epilogue(2 * b, weight)
        image = weight.view(4 * n, 2, 2, c).permute(0, 3, 1, 2)
        for wide in (True, False):
            yield "upsample_conv2d", (codes, *rows, image, *channels, floats(4 * n), dtype, wide)
        yield "upsample_conv2d_int4", (codes, *rows, *int4(weight, 32), *channels, floats(4 * n), dtype, 32)

    # one row, channel and pixel; groups that cross from tap to tap; tiles of a middle block and of a feed-forward layer
    for size, n, window, dtype in (
        ((1, 1, 1, 1), 1, (1, 1, 0), half),
        ((1, 1, 5, 40), 6, (1, 1, 0), torch.bfloat16),
        ((2, 4, 4, 4), 320, (3, 1, 1), torch.bfloat16),
        ((2, 6, 5, 64), 32, (3, 2, 1), single),
        ((4, 8, 8, 1280), 1280, (3, 1, 1), torch.bfloat16),
        ((1, 1, 4096, 320), 2560, (1, 1, 0), torch.bfloat16),
    ):
        kernel, stride, padding = window
        weight = torch.zeros(n, kernel**2 * size[3], dtype=torch.int8)
        pixels = [(length + 2 * padding - kernel) // stride + 1 for length in size[1:3]]
        for stored in ((weight, None, 0), *((*int4(weight, group), group) for group in packing.GROUP_SIZES)):
            yield "unscaled_product", (floats(*size, dtype=dtype), *stored, *window)
            yield "unscaled_product_input", (floats(size[0], *pixels, n, dtype=dtype), *stored, list(size), *window)

    for rows, keys, width, dtype in ((1, 1, 64, half), (1, 2, 32, torch.bfloat16), (5, 7, 16, single)):
        q, k, v = (floats(1, 2, n, width, dtype=dtype) for n in (rows, keys, keys))
        for start in (False, True)[:keys]:
            yield "log_attention", (q, k, v, 0.25, 8, 4, start)
            yield "log_attention_base2", (q, k, v, 0.25, 8, start)
        yield "log_attention_running", (q, k, v, 0.25, 8, 4)
    x = floats(1, 8, 4096, 40)
    yield "log_attention", (x, x, x, 0.25, 8, 4, False)


def operators():
    for name, arguments in calls():
        attempt(name, getattr(dgq_kernels, name), *arguments)


def attempt(name, run, *arguments):
    try:
        run(*arguments)
    except Exception as error:
        sizes = [list(x.shape) if isinstance(x, torch.Tensor) else x for x in arguments]
        say(error=f"{type(error).__name__}: {str(error).strip()[-300:]}", call=f"{name} {sizes}")


def again():
    """After `operators`: launches that are found by their arguments are those that Triton itself makes of them."""

    def form(x):
        return (x.dtype, x.shape, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x

    def launches(name, arguments):
        begin = len(LAUNCHES)
        getattr(dgq_kernels, name)(*arguments)
        return [(function, list(map(form, given))) for _, _, function, given in LAUNCHES[begin:]]

    for name, arguments in calls():
        with unittest.mock.patch.object(JITFunction, "run", side_effect=AssertionError(f"{name} is not known")):
            found = launches(name, arguments)
        with unittest.mock.patch.dict(launch._known, clear=True):
            say(again=name, launches=len(found), same=found == launches(name, arguments))


def apart():
    """Launches say that they may overlap, and with DGQ_PDL=0 that they may not."""
    name, arguments = next(calls())
    for launch.DEPENDENT in (True, False, True):
        begin = len(LAUNCHES)
        for _ in range(2):  # by Triton, and as it is known
            getattr(dgq_kernels, name)(*arguments)
        say(dependent=launch.DEPENDENT, launched=[given[-1] for *_, given in LAUNCHES[begin:]])


def in_flight():
    """With DGQ_ASYNC_WGMMA=1 the products of int8 weights are other kernels, of the same arguments."""
    for name, arguments in calls():
        classes = [len(x) for x in arguments if isinstance(x, list)]
        if name in ("linear_int8", "conv2d") and classes == [1]:
            begin = len(LAUNCHES)
            for async_wgmma.ASKED in (False, True, False):
                getattr(dgq_kernels, name)(*arguments)
            kernels = [(function, len(given)) for _, _, function, given in LAUNCHES[begin:]]
            say(in_flight=name, kernels=[kernels.index(one) for one in kernels])


def threads():
    """A thread that comes while another one loads a kernel launches it when it is there."""
    active, loading = driver.active, threading.Event()
    load = active.load_binary

    def slowly(*arguments):
        loading.set()
        time.sleep(0.3)  # as the driver, without the interpreter's lock
        return load(*arguments)

    name, arguments = next(calls())
    begin, run = len(LAUNCHES), functools.partial(getattr(dgq_kernels, name), *arguments)
    launch._known.clear()
    for kernel in {kernel for kernel in vars(quantizers).values() if isinstance(kernel, JITFunction)}:
        kernel.device_caches.clear()
    with unittest.mock.patch.object(active, "load_binary", slowly):
        first = threading.Thread(target=run)
        first.start()
        loading.wait()
        run()
        first.join()
    say(threads=[function is not None for _, _, function, _ in LAUNCHES[begin:]])


def second_device():
    """Every operator launches where its tensors are, and leaves the device that was current."""
    with contextlib.ExitStack() as stack:
        for name in ("empty", "tensor"):  # there is no such device to make a tensor on
            really = getattr(torch, name)
            anywhere = functools.partial(lambda really, *args, device=None, **kwargs: really(*args, **kwargs), really)
            stack.enter_context(unittest.mock.patch.object(torch, name, anywhere))
        for name, arguments in dict(calls()).items():
            begin = len(LAUNCHES)
            placed = [x.as_subclass(OnDevice1) if isinstance(x, torch.Tensor) else x for x in arguments]
            attempt(name, getattr(dgq_kernels, name), *placed)
            say(operator=name, devices=sorted({device for _, device, *_ in LAUNCHES[begin:]}), left=CURRENT[0])


def embedded_architecture():
    return architectures.architecture(str(embedded.FOLDER / "unet" / "config.json"))


def quantized(which, wbits, dtype):
    """A whole UNet with integer layers of no values in particular, and the arguments of a call."""
    unet, plan = architectures.skeleton(which.config), attention.AttentionPlan.for_activations(8)
    found, _ = plan_layers(unet, recipe.Recipe(wbits=wbits, rounding="nearest", channels="none"))
    plans = {one.name: one.plan for one in found}
    apply_header(unet, Header(recipe.Recipe(), plans, plan, dgq_version="0"))
    prepare_all(unet.to_empty(device="cpu").requires_grad_(False).to(dtype), torch.device("cpu"))
    call = architectures.call(unet, which.batch, torch.device("cpu"), tokens=which.tokens)
    return unet, {key: worker.cast(value, dtype, torch.device("cpu")) for key, value in call.items()}


def step(name, dtypes=(torch.float16,)):
    """A step of a whole quantized UNet, its float operators on the CPU, on rubbish."""
    which = architectures.ARCHITECTURES.get(name) or embedded_architecture()
    for wbits, dtype in ((wbits, dtype) for wbits in (8, 4) for dtype in dtypes):
        gc.collect()  # the network before
        unet, call = quantized(which, wbits, dtype)
        for log_attention.FORCED in (False, True):
            attempt(f"{name} W{wbits}A8", functools.partial(unet, **call))


def count(name):
    """How often a step of a quantized UNet launches a kernel, in a graph, which is given the projections of the text;
    none is compiled."""
    which = architectures.architecture(name)
    forgetful = unittest.mock.MagicMock(get=lambda key: None)
    with unittest.mock.patch.object(JITFunction, "run") as run, unittest.mock.patch.object(launch, "_known", forgetful):
        for wbits in (8, 4):
            unet, call = quantized(which, wbits, torch.float16)
            text = call["encoder_hidden_states"]
            readers = attention.text_readers(unet, text)
            made = [project([module.to_k, module.to_v], text) for module in readers]
            for log_attention.FORCED in (False, True):
                run.reset_mock()
                with attention.given(readers, text, made):
                    unet(**call)
                say(name=name, wbits=wbits, log_attention=log_attention.FORCED, counted=run.call_count)


@torch.enable_grad()
def tuning():
    """A step of tuning the embedded model, forwards and backwards, on rubbish."""
    which = embedded_architecture()
    for wbits, dtype in ((4, torch.bfloat16), (8, torch.bfloat16), (4, torch.float32)):
        unet, call = quantized(which, wbits, dtype)
        experts = Experts(Layout.of(unet, True), 2, 1000, torch.device("cpu"))
        with differentiable(unet, experts):
            experts.choose([700] * which.batch)
            attempt(f"tuning W{wbits}", lambda unet=unet, call=call: unet(**call).sample.float().mean().backward())


def main(parts):
    pretend(compiled, lambda *facts: LAUNCHES.append(facts))
    torch.cuda.device, torch.cuda.current_device = current, lambda: CURRENT[0]
    with torch.no_grad():
        for part in parts:
            if part in ("operators", "again", "apart", "in_flight", "threads", "second_device", "tuning"):
                globals()[part]()
            elif part.endswith(".json"):
                count(part)
            else:
                step(part, (torch.float16, torch.float32) if part == "embedded" else (torch.float16,))
    say(launches=len(LAUNCHES))


if __name__ == "__main__":
    main(sys.argv[1:])
