"""What is trained, and how: the method by its fields, sizes, types, and what they cost a number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gossamer.errors import UsageError, nearest

if TYPE_CHECKING:
    from gossamer.methods import TargetedMethod

WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
QUANTS = ("nf4", "nf4-single", "fp4", "fp4-single", "int8")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
_KNOWN: dict[str, tuple[Any, ...]] = {
    "dtype": tuple(WIDTHS), "adapter_dtype": tuple(WIDTHS), "optimizer": OPTIMIZERS, "path": ("gossamer", "peft"),
    "checkpointing": (True, False, "auto"), "quant": (None, *QUANTS),
}  # fmt: skip
BLOCK = 64
"""Weights that share a scale in 4 bits."""
SCALES = 256
"""Scales, or optimiser moments, that share a scale of their own."""
SMALL = 4096
"""Tensors below this many numbers keep 32-bit moments in bitsandbytes' 8-bit optimisers."""


def packed(rows: int, weights: int, quant: str) -> int:
    """Bytes of one quantised matrix: codes and scales.

    nf4 and fp4 4 + 8/64 + 32/(64 * 256) = 4.127 bits; -single 4 + 32/64 = 4.5 bits; int8 8 bits and 4 bytes a row.
    """
    if quant == "int8":
        return weights + 4 * rows
    blocks = -(-weights // BLOCK)
    scales = 4 * blocks if quant.endswith("-single") else blocks + 4 * -(-blocks // SCALES) + 4
    return -(-weights // 2) + scales


def moments(numbers: int, width: int, optimizer: str) -> int:
    """Bytes of AdamW's two moments of one tensor: two numbers of its type, or two bytes and a scale a block."""
    if optimizer == "adamw" or numbers < SMALL:
        return 2 * numbers * width
    return 2 * (numbers + 4 * -(-numbers // SCALES))


@dataclass(frozen=True)
class TrainingSetting:
    """A training step, but for the model and what is trained; see `plan` for what each means."""

    sequence: int = 1024
    batch: int = 1
    accumulation: int = 1
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    quant: str | None = None
    optimizer: str = "adamw"
    checkpointing: bool | str = False
    supervised: float = 1.0
    padded: bool | None = None
    path: str = "gossamer"
    fused: bool = True

    def __post_init__(self) -> None:
        for name in ("dtype", "adapter_dtype"):
            object.__setattr__(self, name, _SHORT.get(getattr(self, name), getattr(self, name)))
        if self.quant == "none":
            object.__setattr__(self, "quant", None)
        for name in ("sequence", "batch", "accumulation"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name} is a whole number from 1", got=repr(value))
        if not 0 < self.supervised <= 1:
            raise UsageError("supervised is the share of tokens with a label", got=repr(self.supervised))
        for name, known in _KNOWN.items():
            if (value := getattr(self, name)) not in known:
                choices = [str(one) for one in known if one is not None]
                hint = nearest(str(value), choices)
                raise UsageError(f"{name} is not known", got=repr(value), expected=", ".join(choices), hint=hint)

    @property
    def tokens(self) -> int:
        """N, of one batch, padding included."""
        return self.batch * self.sequence

    @property
    def labelled(self) -> int:
        """Positions that meet the head; the first token of a row has nothing before it."""
        if self.path == "peft":
            return self.tokens
        return max(1, round(self.batch * (self.sequence - 1) * self.supervised))

    @property
    def masked(self) -> bool:
        """Whether rows differ in length, so that attention needs a mask."""
        return self.path == "peft" and self.batch > 1 if self.padded is None else self.padded

    @property
    def width(self) -> int:
        """Bytes of a number of the base."""
        return WIDTHS[self.dtype]

    @property
    def adapter_width(self) -> int:
        """Bytes of a trained number."""
        return WIDTHS[self.adapter_dtype]


_TITLES = {"full": "full fine-tuning", "lora": "LoRA", "dora": "DoRA"}


@dataclass(frozen=True)
class Tuning:
    """A method and what was said of its fields, as JSON."""

    name: str = "lora"
    said: str = "{}"

    @classmethod
    def of(cls, method: Any) -> Tuning:
        """From a name, a mapping, a spec of `gossamer.methods`, or nothing. Raises `SpecError` for what is none."""
        if method is None or isinstance(method, Tuning):
            return method or cls()
        if isinstance(method, str | Mapping):
            given = {"name": method} if isinstance(method, str) else dict(method)
            found = cls(str(given.pop("name", "lora")), json.dumps(given, sort_keys=True))
            if not found.plain:
                found.spec()  # what is wrong with it is said now
            return found
        usual = type(method)().to_dict()
        given = {key: value for key, value in method.to_dict().items() if value != usual.get(key, method)}
        return cls(method.name, json.dumps(given, sort_keys=True))

    def spec(self) -> TargetedMethod:
        """The method itself."""
        from gossamer.methods import method_from_dict

        return method_from_dict({"name": self.name} | self.given)

    @cached_property
    def given(self) -> dict[str, Any]:
        """What was said of its fields."""
        return json.loads(self.said)

    @property
    def r(self) -> int:
        """Rank, of a method that has one."""
        return self.given.get("r", 8)

    @property
    def targets(self) -> str | list[str]:
        """What `target_modules` says."""
        return self.given.get("target_modules", "all-linear")

    @property
    def plain(self) -> bool:
        """Whether it is full fine-tuning, or LoRA of a rank at all linear modules or at query and value."""
        if self.name == "full":
            return not self.given
        usual = self.targets in ("all-linear", ["q_proj", "v_proj"]) and type(self.r) is int and self.r > 0
        return self.name == "lora" and usual and {*self.given} <= {"r", "target_modules"}

    def __str__(self) -> str:
        title = _TITLES.get(self.name, self.name)
        if self.name == "full":
            return title
        rank = f" r={self.r}" if self.name in ("lora", "dora") else ""
        return f"{title}{rank} on {self.targets if isinstance(self.targets, str) else ', '.join(self.targets)}"
