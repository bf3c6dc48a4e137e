"""How a model is trained: sizes, types, and what they cost a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gossamer.errors import UsageError, nearest

WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
QUANTS = ("nf4", "nf4-single", "fp4", "fp4-single", "int8")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
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
        _one_of("dtype", self.dtype, tuple(WIDTHS))
        _one_of("adapter_dtype", self.adapter_dtype, tuple(WIDTHS))
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("path", self.path, ("gossamer", "peft"))
        _one_of("checkpointing", self.checkpointing, (True, False, "auto"))
        if self.quant is not None:
            _one_of("quant", self.quant, QUANTS)

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


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        choices = [str(one) for one in known]
        raise UsageError(
            f"{name} is not known", got=repr(value), expected=", ".join(choices), hint=nearest(str(value), choices)
        )
