"""Inputs of the toys: seeded arguments for one forward pass with a loss, one function for each kind of model."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

Inputs = dict[str, Tensor]
Draw = Callable[[int, Generator], Inputs]

LABELS = 3
LENGTH = 9
IMAGE, CHANNELS = 16, 3
MELS, FRAMES = 16, 32

_LARGEST_ID = 249


def _ids(rows: int, generator: Generator) -> Tensor:
    """Token ids (rows, LENGTH) in 0..249. Every row ends with the largest one, because CLIP reads a text there."""
    ids = torch.randint(0, _LARGEST_ID, (rows, LENGTH), generator=generator)
    ids[:, -1] = _LARGEST_ID
    return ids


def _classes(rows: int, generator: Generator) -> Tensor:
    return torch.randint(0, LABELS, (rows,), generator=generator)


def _image(rows: int, generator: Generator) -> Tensor:
    return torch.randn(rows, CHANNELS, IMAGE, IMAGE, generator=generator)


def text(rows: int, generator: Generator) -> Inputs:
    """Token ids that are their own labels: for decoders, which shift them, and for masked language models."""
    ids = _ids(rows, generator)
    return {"input_ids": ids, "labels": ids.clone()}


def text_to_text(rows: int, generator: Generator) -> Inputs:
    """One text to read and another one to write."""
    return {"input_ids": _ids(rows, generator), "labels": _ids(rows, generator)}


def classified_text(rows: int, generator: Generator) -> Inputs:
    """A text and the class of each row."""
    return {"input_ids": _ids(rows, generator), "labels": _classes(rows, generator)}


def classified_image(rows: int, generator: Generator) -> Inputs:
    """An image and the class of each row."""
    return {"pixel_values": _image(rows, generator), "labels": _classes(rows, generator)}


def image_and_text(rows: int, generator: Generator) -> Inputs:
    """An image and the text that belongs to it; the other rows are its negatives."""
    ids, image = _ids(rows, generator), _image(rows, generator)
    return {"input_ids": ids, "pixel_values": image, "return_loss": torch.tensor(True)}


def speech_to_text(rows: int, generator: Generator) -> Inputs:
    """A spectrogram (rows, MELS, FRAMES) and the text to write."""
    return {"input_features": torch.randn(rows, MELS, FRAMES, generator=generator), "labels": _ids(rows, generator)}
