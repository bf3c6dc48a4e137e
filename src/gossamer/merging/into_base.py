"""Write a plain model with an adapter folded in: `W' = W + scaling * B A`, in float32, rounded once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.adapter import Adapter
from gossamer.attachment import attach, merge, unmerge
from gossamer.errors import StateError, UsageError
from gossamer.merging.losses import losses
from gossamer.models import load_base, make_dense, write_model_folder
from gossamer.models.quantizer import packed_modules

_NAME = "merged"
_DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16}


def merge_into_base(
    adapter: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quant: str | None = None,
    requantize: bool = False,
    force_base: bool = False,
) -> dict[str, Any]:
    """Merge an adapter folder into a base and write a transformers folder with its tokenizer, whole or not at all.

    A base that is quantised is rebuilt, merged in float32 and written dense, because 4 bits do not hold the change:
    `choices` says what each way of storing it loses.

    Args:
        adapter: an adapter folder.
        base: catalog name, Hugging Face id, folder or .gguf file.
        output: a folder that does not exist yet.
        dtype, device: how the base is loaded, and so how the result is stored; see `load_base`. Of a quantised base
            "auto" is float32.
        quant: merge into the base as it is when quantised so (the base that a QLoRA adapter was trained on).
        requantize: write the merged weights in the base's own 4 or 8 bits all the same.
        force_base: merge although the adapter says it was made for another base.

    Returns:
        {"output", "modules", "dtype", "max_error", "max_logit", "seconds", "choices"}: `max_error` is the largest
        difference between the written model's output and the base's with the adapter beside it, over a fixed sample of
        tokens; `max_logit` the largest output, to compare it with; `choices`, of a quantised base: storage ->
        {"of_weight", "of_change"}, what rounding to it takes from the merged weights, relative to them and to the
        adapter's change of them (Frobenius norms over all modules).

    Raises:
        StateError: output exists. BaseMismatchError, AdapterFileError, BaseFileError: files that do not fit.
        UsageError: requantize on a base that is not quantised.
        SharedWeightError, NonFiniteError: a merge that is refused; nothing is written then.
    """
    output = Path(output)
    if output.exists():
        raise StateError("the output folder exists already", where=str(output), hint="choose a new folder")
    start = time.monotonic()
    value = Adapter.load(adapter)
    model, tokenizer = load_base(base, dtype=dtype, device=device, quant=quant)
    stored = packed_modules(model)
    if requantize and not stored:
        raise UsageError("only what was quantised can be quantised again", where=str(base), hint="--quant nf4")
    if stored:  # the merge is done in float32, whatever it is stored as in the end
        model.float()
    done: dict[str, Any] = {"output": str(output)}
    done["modules"] = len(attach(model, value, _NAME, force_base=force_base).sites)
    before = _sampled_output(model)
    done["choices"] = _fold(model, requantize)
    if stored:
        _settle(model, _DTYPES.get(dtype, torch.float32), requantize)
    done["max_error"] = (_sampled_output(model) - before).abs().max().item()
    done["max_logit"] = before.abs().max().item()
    write_model_folder(model, tokenizer, output)
    return done | {"dtype": str(model.dtype).removeprefix("torch."), "seconds": time.monotonic() - start}


def _settle(model: nn.Module, dtype: torch.dtype, requantize: bool) -> None:
    """Give a model whose base was quantised the form it is written in."""
    if not requantize:
        make_dense(model, dtype)
    model.to(dtype)


def _fold(model: nn.Module, requantize: bool) -> dict[str, dict[str, float]]:
    """Fold the adapter in for good; what each storage of the merged weights would lose, if they were quantised."""
    merge(model)
    changed = [one for one in packed_modules(model).values() if not one.runs_packed]
    choices = losses((one.dequantized(), one.weight) for one in changed)
    formats = [one.format for one in changed]
    unmerge(model)
    merge(model, keep=False)
    for module, form in zip(changed, formats, strict=True):
        if requantize:
            module.pack(form)
    return choices


@torch.inference_mode()
def _sampled_output(model: nn.Module) -> Tensor:
    """Output for 64 fixed tokens spread over the vocabulary, float32."""
    size = getattr(model, "config").get_text_config().vocab_size  # noqa: B009
    tokens = torch.arange(64, device=next(model.parameters()).device)[None] * (size // 64 or 1) % size
    return model(input_ids=tokens).logits.float()
