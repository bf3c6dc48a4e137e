"""A model as a plain transformers folder, whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as noise

from gossamer.attachment import attached, base_fingerprint
from gossamer.attachment.walk import FINGERPRINT
from gossamer.errors import StateError
from gossamer.files.atomic import new_folder
from gossamer.models.quantizer import make_dense, stored_config


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
    make_dense(model)  # what a merge has folded for good
    stored = stored_config(model)
    if stored is not None:
        model.config.quantization_config = stored
        setattr(model.config, FINGERPRINT, base_fingerprint(model))
    try:
        with without_bars():
            model.save_pretrained(folder)
    finally:
        forget_quantisation(model)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def forget_quantisation(model: PreTrainedModel) -> None:
    """Drop what a quantised file leaves on a model: its modules say what they are, and transformers refuses to save."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    for part in model.modules():
        config = getattr(part, "config", None)
        for name in ("quantization_config", "_is_quantized") if isinstance(part, PreTrainedModel) else ():
            vars(config).pop(name, None)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal; verbs show their own."""
    shown = noise.is_progress_bar_enabled()
    noise.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            noise.enable_progress_bar()
