"""Weights in 4 and 8 bits: the formats, the reference that defines them, and the module that holds them."""

from gossamer.quant.backend import bitsandbytes, dequantize, quantize
from gossamer.quant.formats import FORMATS, Packed, QuantFormat, packed_bytes
from gossamer.quant.linear import (
    QuantizedLinear,
    format_of,
    quantizable,
    quantize_model,
    quantized,
    sampled,
    sampled_places,
)

__all__ = [
    "FORMATS",
    "QuantFormat",
    "Packed",
    "QuantizedLinear",
    "bitsandbytes",
    "dequantize",
    "format_of",
    "packed_bytes",
    "quantizable",
    "quantize",
    "quantize_model",
    "quantized",
    "sampled",
    "sampled_places",
]
