"""Write a plain model with an adapter folded in: `W' = W + scaling * B A`, in float32, rounded once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.adapter import Adapter
from gossamer.attachment import attach, merge
from gossamer.errors import StateError
from gossamer.models import load_base, write_model_folder

_NAME = "merged"


def merge_into_base(
    adapter: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    force_base: bool = False,
) -> dict[str, Any]:
    """Merge an adapter folder into a base and write a transformers folder with its tokenizer, whole or not at all.

    Args:
        adapter: an adapter folder.
        base: catalog name, Hugging Face id, folder or .gguf file.
        output: a folder that does not exist yet.
        dtype, device: how the base is loaded, and so how the result is stored; see `load_base`.
        force_base: merge although the adapter says it was made for another base.

    Returns:
        {"output", "modules", "dtype", "max_error", "max_logit", "seconds"}: `max_error` is the largest difference
        between the merged model's output and the base's with the adapter beside it, over a fixed sample of tokens;
        `max_logit` the largest output, to compare it with.

    Raises:
        StateError: output exists. BaseMismatchError, AdapterFileError, BaseFileError: files that do not fit.
        SharedWeightError, NonFiniteError: a merge that is refused; nothing is written then.
    """
    output = Path(output)
    if output.exists():
        raise StateError("the output folder exists already", where=str(output), hint="choose a new folder")
    start = time.monotonic()
    value = Adapter.load(adapter)
    model, tokenizer = load_base(base, dtype=dtype, device=device)
    report = attach(model, value, _NAME, force_base=force_base)
    before = _sampled_output(model)
    merge(model, keep=False)
    after = _sampled_output(model)
    write_model_folder(model, tokenizer, output)
    return {
        "output": str(output),
        "modules": len(report.sites),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_error": (after - before).abs().max().item(),
        "max_logit": before.abs().max().item(),
        "seconds": time.monotonic() - start,
    }


@torch.inference_mode()
def _sampled_output(model: nn.Module) -> Tensor:
    """Output for 64 fixed tokens spread over the vocabulary, float32."""
    size = getattr(model, "config").get_text_config().vocab_size  # noqa: B009
    tokens = torch.arange(64, device=next(model.parameters()).device)[None] * (size // 64 or 1) % size
    return model(input_ids=tokens).logits.float()
