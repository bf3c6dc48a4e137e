"""What a run does to fit into memory, and what it says when that was not enough.

Gradient checkpointing keeps the input of each block alone and runs the block a second time in the backward: activations
shrink from everything inside L blocks to L inputs and the inside of one, for one more forward of the blocks.

Source: Chen et al. 2016, arXiv:1604.06174, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gossamer.errors import ResourceError, UnsupportedError, UsageError
from gossamer.methods.virtual_tokens import VirtualTokensLayer
from gossamer.models.device import free_bytes, ran_out
from gossamer.quant import FORMATS, QuantizedLinear
from gossamer.quant.formats import QuantFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gossamer.training.config import RunConfig

MARGIN = 1.1
"""The plan may be a tenth under what a step really takes."""
_FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
"""What transformers' blocks look at: whether to run again in the backward, and the function that sees to it."""


@dataclass(frozen=True)
class MemoryPolicy:
    """Whether a run uses gradient checkpointing, the line that says why, and what would make it take less."""

    checkpointing: bool
    rule: str
    hint: str = field(default="", compare=False)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what torch says when memory runs out, which differs by device, into `ResourceError`."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            raise ResourceError("out of memory", got=str(error).partition("\n")[0], hint=self.hint) from error


def agreed(memories: Sequence[MemoryPolicy]) -> MemoryPolicy:
    """What runs on one model do together: checkpointing, which changes no result, as soon as one of them needs it."""
    return next((one for one in memories if one.checkpointing), memories[0])


def decide(model: PreTrainedModel, config: RunConfig, part: tuple[int, int]) -> MemoryPolicy:
    """Whether to use gradient checkpointing for parts of (rows, tokens a row). Raises `UnsupportedError`."""
    on, rule = _decided(model, config, part)
    return MemoryPolicy(on, rule, _thriftier(model, on, part))


def _decided(model: PreTrainedModel, config: RunConfig, part: tuple[int, int]) -> tuple[bool, str]:
    chosen, obstacle = config.train.checkpointing, _obstacle(model)
    if chosen == "on" and obstacle:
        raise UnsupportedError(
            "gradient checkpointing cannot be used here", got=obstacle, hint="train.checkpointing: auto leaves it off"
        )
    if chosen != "auto":
        return chosen == "on", f"checkpointing {chosen}"
    if obstacle:
        return False, f"checkpointing auto: off, {obstacle}"
    if any(getattr(module, _FLAG, False) for module in model.modules()):
        return True, "checkpointing auto: on, as the model came with it"
    free = free_bytes(next(model.parameters()).device)
    if free is None:
        return False, "checkpointing auto: off, the free memory of this device is not known"
    try:
        needed = planned_bytes(model, config, part)
    except UsageError as error:  # the plan knows fewer models, methods and patterns than can be trained
        return False, f"checkpointing auto: off, without a plan of this run ({error.what})"
    room = free + sum(one.nbytes for one in chain(model.parameters(), model.buffers()))  # the plan counts the model too
    on = MARGIN * needed > room
    step = f"{part[0]:,} x {part[1]:,} tokens without it take {_gib(needed)} of {_gib(room)}"
    return on, f"checkpointing auto: {'on' if on else 'off'}, {step}"


def planned_bytes(model: PreTrainedModel, config: RunConfig, part: tuple[int, int]) -> int:
    """What the plan says that a step without checkpointing takes at its peak, model and all.

    Raises: UsageError for a model, a method or modules that the plan does not know.
    """
    from gossamer.planning import plan

    rows, tokens = part
    found = plan(
        model.config.to_dict(),
        config.method,
        quant=stored_as(model),
        sequence=tokens,
        batch=rows,
        dtype=str(model.dtype).removeprefix("torch."),
        checkpointing=False,
    )
    return found.peak


def stored_as(model: nn.Module) -> str | None:
    """The `quant` that a model's weights are held in; None where they are plain numbers."""
    packed = (module for module in model.modules() if isinstance(module, QuantizedLinear) and module.is_packed)
    first = next((QuantFormat(one.table, one.nested_absmax is not None) for one in packed), None)
    return next((name for name, form in FORMATS.items() if form == first), None)


@contextmanager
def checkpointing(model: nn.Module, on: bool) -> Iterator[None]:
    """Turn gradient checkpointing on or off for a block, and give it back as it was.

    Not reentrant, so inputs need not ask for gradients: transformers' own switch would make the embeddings do so, and
    the backward would go on below the first adapter. Random numbers are drawn once and used both times.
    """
    places = [module for module in model.modules() if hasattr(module, _FLAG)]
    before = [{name: vars(one)[name] for name in (_FLAG, _FUNCTION) if name in vars(one)} for one in places]
    function = partial(checkpoint, use_reentrant=False)
    try:
        for place in places:
            vars(place).update({_FLAG: on, _FUNCTION: function})
        yield
    finally:
        for place, kept in zip(places, before, strict=True):
            for name in (_FLAG, _FUNCTION):
                vars(place).pop(name, None)
            vars(place).update(kept)


def _obstacle(model: nn.Module) -> str:
    """Why blocks cannot run again in the backward, or nothing."""
    if any(isinstance(module, VirtualTokensLayer) for module in model.modules()):
        return "it switches off the key-value cache, where virtual tokens are"
    if not (
        getattr(model, "supports_gradient_checkpointing", False)
        and any(hasattr(module, _FLAG) for module in model.modules())
    ):
        return f"{type(model).__name__} does not support it"
    return ""


def _thriftier(model: nn.Module, checkpointed: bool, part: tuple[int, int]) -> str:
    """What to change so that a step takes less; what is in force already, or cannot be, is not named."""
    rows, tokens = part
    changes = [] if checkpointed or _obstacle(model) else ["train.checkpointing: on"]
    if rows > 1:
        changes.append(f"train.micro_batch_tokens: {rows // 2 * tokens}, which makes the same steps in smaller parts")
    anew = [*(["quant: nf4"] if stored_as(model) is None else []), f"train.max_length below {tokens}"]
    return "; or ".join([*changes, f"in a new run {' or '.join(anew)}"])


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"
