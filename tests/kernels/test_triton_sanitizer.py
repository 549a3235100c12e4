"""Triton-Sanitizer over the kernels: it proves symbolically that no address lies outside a tensor.

Optional: it needs triton-viz, whose 3.0 works with Triton 3.6 and not with 3.9 (`make sanitize`). It stops at what it
does not know: loops whose ends are loaded or divided (shift classes, splits), `tl.split` (gated outputs),
and int4 unpacking. `test_triton_bounds.py` covers those by poison.
"""

import pytest
import torch

from dgq_kernels.conv2d import triton as conv_kernels
from dgq_kernels.linear import triton as linear_kernels
from dgq_kernels.linear.tiles import Config, Tiling
from dgq_kernels.log_attention import triton as attention_kernels
from dgq_kernels.quantize_activation import triton as quantize_kernels

try:
    import triton_viz
    from triton_viz.clients import Sanitizer
except (ImportError, AttributeError, OSError):  # not there, or not for this Triton
    pytest.skip("triton-viz is missing, or does not fit this Triton release", allow_module_level=True)

pytestmark = pytest.mark.slow
TILE = Tiling(Config(16, 16, 32, 4, 1))
M, K, N = 6, 70, 10


@pytest.fixture
def watch(monkeypatch):
    """Put a kernel of a module under the sanitizer, which exits on the first address out of bounds."""

    def put(module, *names):
        for name in names:
            watched = triton_viz.trace(client=Sanitizer(abort_on_error=True))(getattr(module, name))
            monkeypatch.setattr(module, name, watched)

    return put


def epilogue(rows=M):
    return torch.ones(rows), torch.zeros(rows, dtype=torch.int32)


def outputs():
    return torch.ones(N), torch.zeros(N, dtype=torch.int32), torch.zeros(N)


def linear(weight, tiling=TILE):
    codes = torch.zeros(M, K, dtype=torch.int8)
    return linear_kernels.linear_int8(
        codes, *epilogue(), weight, *outputs(), torch.float32, [K], torch.zeros(M, N), tiling=tiling
    )


def test_linear_int8(watch):
    watch(linear_kernels, "linear_int8_kernel")
    linear(torch.zeros(N, K, dtype=torch.int8))


def test_the_sanitizer_sees_a_missing_row(watch):
    watch(linear_kernels, "linear_int8_kernel")
    codes = torch.zeros(M, K, dtype=torch.int8)
    scale, zero_point = epilogue()
    with pytest.raises(SystemExit):
        linear_kernels.linear_int8(
            codes,
            scale[:-1].clone(),
            zero_point,
            torch.zeros(N, K, dtype=torch.int8),
            *outputs(),
            torch.float32,
            [K],
            tiling=TILE,
        )


@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d(watch, stride):
    watch(conv_kernels, "conv2d_int8_kernel")
    image = torch.zeros(2, 6, 5, 7, dtype=torch.int8).permute(0, 3, 1, 2)
    weight = torch.zeros(N, 3, 3, 7, dtype=torch.int8).permute(0, 3, 1, 2)
    conv_kernels.conv2d(image, *epilogue(2), weight, *outputs(), stride, torch.float32, [7], tiling=TILE)


def test_quantize_rows(watch):
    watch(quantize_kernels, "quantize_rows_kernel")
    quantize_kernels.quantize_rows(torch.zeros(M, 43), 8, None)


@pytest.mark.parametrize("start", [False, True])
def test_log_attention(watch, start):
    watch(attention_kernels, "log_attention_kernel")
    q, k, v = (torch.ones(1, 2, n, 40) for n in (13, 70, 70))
    attention_kernels.log_attention(q, k, v, 1.0, 8, 4, start, 8, 8)


def test_log_attention_running(watch):
    watch(attention_kernels, "running_kernel")
    q, k, v = (torch.ones(1, 2, n, 40) for n in (13, 70, 70))
    attention_kernels.log_attention_running(q, k, v, 1.0, 8, 4, 32)


def test_quantize_samples(watch):
    watch(quantize_kernels, "sample_range_kernel", "quantize_samples_kernel")
    quantize_kernels.quantize_samples(torch.zeros(2, 5, 6, 43).permute(0, 3, 1, 2), 8, None, 1, None)
