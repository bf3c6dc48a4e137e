"""A model as a plain transformers folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as noise

from gossamer.attachment import attached
from gossamer.errors import StateError
from gossamer.files.atomic import new_folder


def write_model_folder(model: PreTrainedModel, tokenizer: Any, folder: str | Path) -> Path:
    """Write config, safetensors weights and tokenizer to a new `folder`, as `from_pretrained` reads them.

    Args:
        model: with nothing attached; tied weights are written once.
        tokenizer: or None for a model without one.
        folder: must not exist.

    Raises `StateError` when the folder exists, `DiskError` when the disk refuses; then there is no folder.
    """
    with new_folder(folder) as new:
        save_into(model, tokenizer, new)
    return Path(folder)


def save_into(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer into an existing folder. Raises `StateError` while adapters are attached."""
    if attached(model):
        raise StateError(
            "adapters are attached, and a plain model folder cannot hold them",
            got=", ".join(attached(model)),
            hint="merge(model, keep=False) folds them in for good; capture(model, name).save(folder) keeps them apart",
        )
    forget_quantisation(model)
    with without_bars():
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def forget_quantisation(model: PreTrainedModel) -> None:
    """Drop what a GGUF file leaves on a model whose weights are plain again; with it transformers refuses to save."""
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config"), (model, "quantization_method")):
        if name in vars(owner):
            delattr(owner, name)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal: whoever called shows progress in their own way."""
    shown = noise.is_progress_bar_enabled()
    noise.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            noise.enable_progress_bar()
