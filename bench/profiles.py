"""Make planning/profiles.json: steps of a Llama and an OPT whose tensors' sizes tell what they are made of.

Every width is a prime times powers of two that no other has, so a size is one product of widths times a fraction whose
denominator is a power of two, and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cache
from itertools import combinations_with_replacement
from math import prod
from typing import Any

from gossamer.planning.fake import described
from gossamer.planning.profiles import FILE, key_of, widths
from gossamer.planning.setting import TrainingSetting, Tuning
from gossamer.planning.shape import KNOWN, ModelShape
from gossamer.planning.step import followed
from gossamer.planning.timeline import Stretch

FAMILIES = {"llama": True, "opt": False}
_SETTING: dict[str, Any] = {"sequence": 16 * 41, "batch": 29, "supervised": 18_964 / (29 * 655)}
_TUNINGS = {"all": {"r": 37}, "qv": {"r": 37, "target_modules": ["q_proj", "v_proj"]}, "full": {"name": "full"}}

_POWERS = {2**power for power in range(13)}


def shape_of(family: str) -> ModelShape:
    """The model that is followed."""
    gated = FAMILIES[family]
    own: dict[str, Any] = {"kv_heads": 13, "head_dim": 2 * 47} if gated else {}
    positions = 2**5 * 31 - 2
    return ModelShape(
        family, 4, 91 * 2**12 * 19, 91, 2**12 * 23, 2**14 * 17, gated=gated, positions=positions, tied=not gated, **own
    )


def questions() -> Iterator[tuple[str, Tuning, TrainingSetting]]:
    """All that is kept: what is asked for most."""
    for again in (False, True):
        yield from _asked("llama", "all", again)
        yield from _asked("llama", "full", again)
        yield from _asked("llama", "full", again, path="peft")
        yield from _asked("llama", "all", again, quant="nf4")
        for family, what in (("opt", "all"), ("opt", "qv"), ("llama", "qv")):
            yield from _asked(family, what, again)
        yield from _asked("llama", "all", again, quant="int8")
        yield from _asked("llama", "all", again, path="peft")
        for quant in (None, "nf4"):
            yield from _asked("llama", "all", again, quant=quant, padded=True)


def _asked(family: str, what: str, again: bool, **given: Any) -> Iterator[tuple[str, Tuning, TrainingSetting]]:
    setting = TrainingSetting(**{**_SETTING, "padded": False, "checkpointing": again, **given})
    yield family, Tuning.of(_TUNINGS[what]), setting


def made(family: str, tuning: Tuning, setting: TrainingSetting) -> list[Any]:
    """The stretches of one step as products of widths."""
    shape = shape_of(family)
    step = followed(described(shape.config()), tuning.spec(), setting, bool(setting.checkpointing))
    products = _products(widths(shape, tuning, setting))
    return [_stretch(one, products, family) for one in step.stretches]


def _stretch(one: Stretch, products: Mapping[str, int], family: str) -> list[Any]:
    level: dict[str, Fraction] = {}
    tops: list[dict[str, Fraction]] = []
    for size in one.sizes:
        level = _added(level, size, products)
        if size > 0 and level not in tops:
            tops.append(level)
    gradients: dict[str, Fraction] = {}
    for size in one.gradients:
        gradients = _added(gradients, size, products)
    return [one.name, one.repeat > 1, _numbers(level), [*map(_numbers, _highest(tops, family))], _numbers(gradients)]


def _added(level: Mapping[str, Fraction], size: int, products: Mapping[str, int]) -> dict[str, Fraction]:
    product, number = _decoded(abs(size), products)
    return {**level, product: level.get(product, Fraction(0)) + (number if size > 0 else -number)}


def _products(values: Mapping[str, int]) -> dict[str, int]:
    """Every product of up to three widths; of rows and tokens their own product alone."""
    names = [one for one in values if one != "B"]
    return {
        " ".join(group): prod(values[one] for one in group)
        for count in range(4)
        for group in combinations_with_replacement(names, count)
    }


def _decoded(size: int, products: Mapping[str, int]) -> tuple[str, Fraction]:
    """The product that a size is of, and its coefficient: the simplest one, and of the fewest widths."""
    found = []
    for product, value in products.items():
        number = Fraction(size, value)
        above, below = number.numerator, number.denominator
        if below in _POWERS and above <= 64 and above // (above & -above) in (1, 3, 5):
            found.append((below, product.count(" "), above, product))
    if not found and size < 2**14:
        return "", Fraction(size)
    if not found:  # labels with a place more in each row
        near = [(product, Fraction(4 * round(size / value / 4))) for product, value in products.items() if size > value]
        near = [
            (abs(size / float(number * products[product]) - 1), product, number)
            for product, number in near
            if 0 < number <= 16
        ]
        error, product, number = min(near)
        if error < 0.005:
            return product, number
        raise ValueError(f"{size:,} bytes are no product of widths")
    below, _, above, product = min(found)
    return product, Fraction(above, below)


def _highest(tops: list[dict[str, Fraction]], family: str) -> list[dict[str, Fraction]]:
    """The levels that are the highest of a stretch in some step of a known model."""
    kept = []
    for sizes in _samples(family):
        values = [
            float(sum(float(number) * prod(sizes[one] for one in product.split()) for product, number in top.items()))
            for top in tops
        ]
        kept += [values.index(max(values))] if values else []
    return [tops[place] for place in sorted({*kept})]


@cache
def _samples(family: str) -> list[dict[str, int]]:
    sizes = [(1, 64), (1, 256), (4, 512), (1, 2048), (6, 2048), (1, 8192), (16, 1024), (2, 32_768)]
    shapes = [one for one in KNOWN.values() if one.family == family]
    settings = [TrainingSetting(tokens, rows, supervised=share) for rows, tokens in sizes for share in (0.1, 1.0)]
    return [widths(shape, Tuning.of({"r": r}), one) for shape in shapes for one in settings for r in (4, 16, 64, 512)]


def _numbers(level: Mapping[str, Fraction]) -> dict[str, float]:
    whole = {product: float(number) for product, number in sorted(level.items()) if number}
    return {product: int(number) if number == int(number) else number for product, number in whole.items()}


def _write(found: Mapping[str, Any]) -> None:
    lines = (f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in sorted(found.items()))
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if only and FILE.exists() else {}
    for family, tuning, setting in questions():
        key = key_of(family, tuning, setting)
        if key.startswith(only):
            found[key] = made(family, tuning, setting)
            print(key, len(json.dumps(found[key])), flush=True)
            _write(found)
