"""The singular values of what an adapter does to each weight, where its tensors alone say it.

    delta = scaling * (B A - B0 A0)        LoRA with any start; (out, in), never formed

Of other methods the change depends on the base's own weight (DoRA, IA3, a cut of shared projections, parameters that
are trained whole) or is none of a weight (bottlenecks, virtual tokens): of these nothing is said, rather than what B A
would be.
"""

import torch
from torch import Tensor

from gossamer.adapter import Adapter
from gossamer.errors import UnsupportedError
from gossamer.methods.lora import LoRA
from gossamer.methods.pairs import pairs_at


def spectra(adapter: Adapter) -> dict[str, Tensor]:
    """Path of each changed matrix -> singular values of its change, largest first, at least float32.

    A stack of experts has one entry an expert, `<path>.<expert>`. What is a rounding error of the product is zero.
    Cost: O(r^2 (in + out)) a matrix.
    """
    found: dict[str, Tensor] = {}
    spec = adapter.spec
    if not isinstance(spec, LoRA):
        return found
    for path, slots in adapter.tensors.items():
        try:
            pairs = pairs_at(spec, path, slots)
        except UnsupportedError:  # a convolution with groups is no one matrix
            continue
        for place, stored in pairs.items():
            pair = stored.pair.folded()
            values = pair.svd()[1]
            size = torch.linalg.matrix_norm(pair.lora_A) * torch.linalg.matrix_norm(pair.lora_B)
            values = torch.where(values > 8 * torch.finfo(values.dtype).eps * size[:, None], values, 0.0)
            stacked = len(values) > 1
            found |= {f"{place}.{index}" if stacked else place: each for index, each in enumerate(values)}
    return found
