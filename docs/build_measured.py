"""What a method does on the toys, measured by attaching it: the tables of the method pages come from here alone."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

import gossamer as gs
from gossamer.methods import METHODS
from gossamer.models import tiny, tiny_inputs

TOYS = ("llama", "mixtral", "gpt2", "bert", "t5", "vit")
"""A decoder with grouped heads, one with experts, one with fused projections and biases, an encoder, both, an image."""

ROUNDING = 1e-4
"""Merged and unmerged outputs may differ by this share of the largest output."""


@dataclass(frozen=True)
class Measured:
    """One method on one toy.

    Attributes:
        toy: its name.
        refusal: why the method cannot stand there; then nothing else is known.
        places: last names of the modules it stands at, each once, in the model's order.
        modules, trainable, share: as the report of `attach` has them.
        file_bytes: of `adapter_model.safetensors`; `file_type`: the config's peft_type.
        file_tensors: name, dtype and shape of the tensors of the first module, and of those of no module.
        unchanged: whether the output is the base's, bit for bit, before training.
        merge_refusal: why it cannot be merged; "" where it was, with the same outputs, and unmerged bit for bit.
    """

    toy: str
    refusal: str = ""
    places: tuple[str, ...] = ()
    modules: int = 0
    trainable: int = 0
    share: float = 0.0
    file_bytes: int = 0
    file_type: str = ""
    file_tensors: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    unchanged: bool = True
    merge_refusal: str = ""


@cache
def toy(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """A seeded toy, its inputs, the logits it gives and a copy of its weights."""
    model, inputs = tiny(name), tiny_inputs(name)
    return model, inputs, _logits(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}


@cache
def measured(method: str, name: str) -> Measured:
    """Attach the method with its defaults to a toy, save it, merge it, unmerge it, take it off.

    Raises `RuntimeError` when a merge changes the output, or when a bit of the base is not given back.
    """
    model, inputs, before, weights = toy(name)
    try:
        report = gs.attach(model, METHODS[method]())
    except gs.GossamerError as error:
        return Measured(name, refusal=_words(error))
    try:
        unchanged = torch.equal(_logits(model, inputs), before)
        _shake(model)
        kind, size, tensors = _file(model, [site.path for site in report.sites])
        refusal = _merge_refusal(model, inputs)
    finally:
        gs.detach(model)
    after = model.state_dict()
    if any(not torch.equal(after[key], value) for key, value in weights.items()):
        raise RuntimeError(f"{method} on {name}: the base is not what it was")
    places = tuple(dict.fromkeys(site.path.rpartition(".")[2] for site in report.sites))
    return Measured(
        name,
        places=places,
        modules=len(report.sites),
        trainable=report.trainable,
        share=report.share,
        file_bytes=size,
        file_type=kind,
        file_tensors=tensors,
        unchanged=unchanged,
        merge_refusal=refusal,
    )


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Move every trainable number, as training would."""
    generator = torch.Generator().manual_seed(0)
    for parameter in gs.trainable_parameters(model).values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def _merge_refusal(model: nn.Module, inputs: dict[str, Tensor]) -> str:
    """Merge and unmerge; the words of the refusal, or nothing."""
    beside = _logits(model, inputs)
    try:
        gs.merge(model)
    except gs.GossamerError as error:
        return _words(error)
    difference = (_logits(model, inputs) - beside).abs().max() / beside.abs().max()
    if difference > ROUNDING:
        raise RuntimeError(f"merged and unmerged outputs differ by {difference:.1e} of the largest")
    gs.unmerge(model)
    return ""


def _file(model: nn.Module, paths: list[str]) -> tuple[str, int, tuple[tuple[str, str, tuple[int, ...]], ...]]:
    """The type, the bytes and some tensors of the folder that `save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        saved = gs.capture(model).save(Path(folder) / "adapter")
        kind = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
        weights = saved / "adapter_model.safetensors"
        with safe_open(weights, "pt") as file:
            found = {name: file.get_slice(name) for name in sorted(file.keys())}
            tensors = tuple(
                (name, str(part.get_dtype()), tuple(part.get_shape()))
                for name, part in found.items()
                if _belongs(name, paths[0]) or not any(_belongs(name, path) for path in paths)
            )
        return kind, weights.stat().st_size, tensors


def _belongs(name: str, path: str) -> bool:
    """Whether a tensor's name in a file is that of a module's."""
    return bool(path) and f".{path}." in f".{name}"


def _words(error: gs.GossamerError) -> str:
    """What an error says went wrong, what would have been right, and what to do instead."""
    parts = error.parts()
    expected = {"expected": f"expected: {parts['expected']}"} if "expected" in parts else {}
    return "; ".join((parts | expected)[key] for key in ("what", "expected", "hint") if key in parts)
