"""Steps that were followed before, so that a plan of a model whose numbers are known needs no torch.

A step of LoRA or of full fine-tuning was followed on a Llama and on an OPT whose every width is a number of its own, so
that the size of each tensor says which widths it is a product of. What is kept of a stretch is its net bytes and its
highest levels, as sums of such products; a level that another one exceeds in every product is left out:

    bytes = sum over products of  coefficient * widths        e.g. 2 "N f" + 8 "N"

Products are of B rows, T tokens, N = B T, M labelled tokens, C columns or R rows of logits at once, h, q, k, f and V
widths, H heads, d of a head, and r the rank. `bench/profiles.py` makes the file and a test makes parts of it again.
"""

import json
from collections.abc import Mapping
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any

from gossamer.kernels.chunks import CHUNK, columns_at_once
from gossamer.planning.setting import TrainingSetting, Tuning, packed
from gossamer.planning.shape import ModelShape
from gossamer.planning.timeline import StepProfile, Stretch, Trained

FILE = Path(__file__).with_name("profiles.json")
_STORED = {
    None: "none",
    "nf4": "double",
    "fp4": "double",
    "nf4-single": "single",
    "fp4-single": "single",
    "int8": "int8",
}

Bytes = Mapping[str, float]
"""Product of widths -> coefficient."""


@cache
def profiles() -> dict[str, list[Any]]:
    """Key -> stretches: name, whether it is of all inner layers, net, tops and gradients."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def key_of(family: str, tuning: Tuning, setting: TrainingSetting) -> str:
    """What the steps are kept by."""
    what = "full" if tuning.name == "full" else "all" if tuning.targets == "all-linear" else "qv"
    marks = [family, what, setting.path, _STORED[setting.quant]]
    return " ".join([*marks, "again" if setting.checkpointing else "once", "padded" if setting.masked else "packed"])


def widths(shape: ModelShape, tuning: Tuning, setting: TrainingSetting) -> dict[str, int]:
    """What the products are of."""
    columns = min(shape.vocabulary, columns_at_once(setting.labelled, shape.vocabulary))
    return {
        "B": setting.batch, "T": setting.sequence, "N": setting.tokens, "M": setting.labelled, "C": columns,
        "R": min(setting.labelled, max(1, CHUNK // shape.vocabulary)),
        "h": shape.hidden, "q": shape.queries, "k": shape.keys, "f": shape.intermediate, "V": shape.vocabulary,
        "H": shape.heads, "d": shape.head_dim, "P": shape.positions + 2, "r": tuning.r,
    }  # fmt: skip


def known_profile(shape: ModelShape, tuning: Tuning, setting: TrainingSetting) -> StepProfile | None:
    """The step of a model whose numbers were given by hand, if it was followed before."""
    usual = setting.width == 2 and setting.adapter_dtype == "float32" and setting.fused and shape.layers > 2
    found = profiles().get(key_of(shape.family, tuning, setting)) if tuning.plain and usual else None
    if found is None:
        return None
    sizes, inner = widths(shape, tuning, setting), shape.layers - 2

    def count(given: Bytes) -> int:
        return ceil(sum(number * prod(sizes[one] for one in product.split()) for product, number in given.items()))

    stretches = []
    for name, repeated, net, tops, gradients in found:
        top = max(map(count, tops), default=0)
        stretches.append(Stretch(name, inner if repeated else 1, (top, count(net) - top), (count(gradients),)))
    weights, rebuilt = shape.total * setting.width, 0
    if setting.quant:
        dense = shape.layers * sum(one.weights for one in shape.linears)
        codes = shape.layers * sum(packed(one.outer, one.weights, setting.quant) for one in shape.linears)
        weights += codes - dense * setting.width
        rebuilt = max(one.weights for one in shape.linears) * setting.width
    if tuning.name == "full":
        in_place = setting.path == "peft"
        trained = (Trained(shape.total, setting.width if in_place else 4, 1),)
        beside = 0 if in_place else 4 * shape.total
    else:
        ends = tuple("." + one for one in tuning.targets) if tuning.targets != "all-linear" else ("",)
        targets = [one for one in shape.linears if one.path.endswith(ends)]
        trained = tuple(Trained(tuning.r * size, 4, shape.layers) for one in targets for size in (one.inner, one.outer))
        beside = sum(one.numbers * one.width * one.times for one in trained)
    return StepProfile(weights, beside, rebuilt, trained, tuple(stretches))
