"""Low-bit operations: each in a folder of its own with a plain-torch reference, a CPU and a Triton implementation.

The references are the definitions (docs/method.md); integer results of every backend equal them bit for bit.
"""

from .conv2d import conv2d, conv2d_int4, conv2d_prepacked, upsample_conv2d, upsample_conv2d_int4
from .linear import linear_float_groups, linear_int4, linear_int8, linear_prepacked
from .log_attention import (
    log_attention,
    log_attention_base2,
    log_attention_eager,
    log_attention_pays,
    log_attention_running,
)
from .quantize_activation import (
    geglu_quantize_rows,
    group_norm_quantize_rows,
    group_norm_quantize_samples,
    layer_norm_quantize_rows,
    quantize_rows,
    quantize_samples,
    quantize_wide_samples,
    silu_quantize_rows,
)
from .scaled_product import scaled_conv2d, scaled_linear, unscaled_product, unscaled_product_input

__all__ = [
    "conv2d",
    "conv2d_int4",
    "conv2d_prepacked",
    "geglu_quantize_rows",
    "group_norm_quantize_rows",
    "group_norm_quantize_samples",
    "layer_norm_quantize_rows",
    "linear_float_groups",
    "linear_int4",
    "linear_int8",
    "linear_prepacked",
    "log_attention",
    "log_attention_base2",
    "log_attention_eager",
    "log_attention_pays",
    "log_attention_running",
    "quantize_rows",
    "quantize_samples",
    "quantize_wide_samples",
    "scaled_conv2d",
    "scaled_linear",
    "silu_quantize_rows",
    "unscaled_product",
    "unscaled_product_input",
    "upsample_conv2d",
    "upsample_conv2d_int4",
]
