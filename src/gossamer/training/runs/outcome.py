"""What a finished run leaves: the adapter, report.json and report.html."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gossamer import __version__
from gossamer.adapter import Adapter
from gossamer.attachment import active, attached, capture
from gossamer.attachment.walk import CONTAINER
from gossamer.errors import ArtefactError, DiskError, StateError
from gossamer.files.atomic import sha256_file, write_json
from gossamer.methods import spectra as changes
from gossamer.quant import QuantizedLinear
from gossamer.training.config import RunConfig
from gossamer.training.dataset import EncodedDataset
from gossamer.training.memory import stored_as
from gossamer.training.runs.report import write_report
from gossamer.training.runs.folder import RunFolder
from gossamer.training.tasks import Figures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what report.json says, and the adapter."""

    output: Path
    report: dict[str, Any]
    adapter: Adapter


def write_outcome(
    folder: RunFolder,
    config: RunConfig,
    model: nn.Module,
    adapter: Adapter,
    dataset: EncodedDataset,
    before: Figures | None,
    after: Figures | None,
    figures: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> Run:
    """Save the adapter with its provenance, a tokenizer that is not the base's, the report, and the page made of it.

    Raises `DiskError`.
    """
    origin = {
        "created_by": f"gossamer {__version__}",
        "operation": "train",
        "base": config.base,
        "task": config.task.named(),
        "data": dataset.identity,
        "steps": figures["step"],
    }
    adapter = replace(adapter, provenance=origin)
    file = adapter.save(folder.adapter) / "adapter_model.safetensors"
    keep_tokenizer(tokenizer, folder.adapter)
    trainable = sum(tensor.numel() for tensor in adapter.named_tensors().values())
    memory, kind = peak_memory(next(model.parameters()).device)
    report = {
        "base": config.base,
        "method": adapter.spec.to_dict(),
        "task": config.task.named(),
        "trainable_params": trainable,
        "total_params": _parameter_count(model),
        "quant": stored_as(model),
        "eval_before": before and before.to_dict(predictions=False),
        "eval_after": after and after.to_dict(predictions=False),
        "examples": _examples(dataset, before, after),
        "peak_memory_bytes": memory,
        "peak_memory_kind": kind,
        "tokens_per_second": figures["tokens"] / max(figures["training_seconds"], 1e-9),
        "adapter_bytes": file.stat().st_size,
        "adapter_sha256": sha256_file(file),
        "adapter_digest": adapter.digest,
        "base_fingerprint": dict(adapter.base or {}),
        "data": dataset.identity,
        "rows": len(dataset.examples),
        **{name: value for name, value in figures.items() if name != "step"},
        "gossamer": __version__,
        "torch": torch.__version__,
    }
    write_json(folder.report, report)
    write_report(folder.path, spectra=spectra(adapter))
    return Run(folder.path, report, adapter)


def read_outcome(folder: RunFolder, adapter: Adapter) -> Run | None:
    """What a finished run of this very adapter left, if all of it is there; the page is what is written last."""
    if not (folder.path / "report.html").exists():
        return None
    try:
        report, kept = json.loads(folder.report.read_text(encoding="utf-8")), Adapter.load(folder.adapter)
    except (OSError, ValueError, ArtefactError):
        return None
    same = kept == adapter and isinstance(report, dict) and report.get("adapter_digest") == adapter.digest
    return Run(folder.path, report, kept) if same else None


def run_config(model: nn.Module, name: str, config: RunConfig) -> RunConfig:
    """The whole config of a run of one adapter, wherever it was started from.

    Raises: StateError when the config names another method than the adapter's own.
    """
    method = capture(model, name).spec
    if config.base is not None:
        if config.method != method:
            raise StateError(
                "the attached adapter is not of the config's method",
                got=str(method.to_dict()),
                expected=str(config.method.to_dict()),
            )
        return config
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    parameter = next(model.parameters())
    dtype = {torch.float32: "float32", torch.bfloat16: "bfloat16"}.get(parameter.dtype, "auto")
    where = {"quant": stored_as(model), "device": str(parameter.device)}
    return config.replace(base=base, dtype=dtype, method=method, **where)


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Write a tokenizer's files into an adapter folder, as PEFT's users do, unless its source holds the same.

    New tokens mean nothing without it. Returns whether it was written. Raises `DiskError`.
    """
    source = str(getattr(tokenizer, "name_or_path", "") or "")
    try:
        kept = _vocabulary(type(tokenizer).from_pretrained(source, local_files_only=True)) if source else None
    except (OSError, ValueError):
        kept = None
    if kept == _vocabulary(tokenizer):
        return False
    try:
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise DiskError("cannot keep the tokenizer", where=str(folder), got=error.strerror or str(error)) from error
    return True


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
    return tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template


def _parameter_count(model: nn.Module) -> int:
    """Numbers in the model and in the adapters that run, those that are packed among them."""
    packed = (module for module in model.modules() if isinstance(module, QuantizedLinear) and module.is_packed)
    resting = {f"{CONTAINER}.{name}" for name in {*attached(model)} - {*active(model)}}
    plain = sum(
        parameter.numel()
        for path, parameter in model.named_parameters()
        if resting.isdisjoint(map(".".join, pairwise(path.split("."))))
    )
    return plain + sum(module.out_features * module.in_features for module in packed)


def _examples(
    dataset: EncodedDataset, before: Figures | None, after: Figures | None
) -> list[dict[str, str]]:
    """A few held-out rows with the answers before and after."""
    then, now = ({one.where: one.predicted for one in found.predictions} if found else {} for found in (before, after))
    return [
        {"where": at, "prompt": row.question, "expected": row.label, "before": then[at], "after": now[at]}
        for row in dataset.held_out
        if (at := row.where) in then
    ]


def spectra(adapter: Adapter) -> dict[str, list[float]]:
    """Singular values of each weight change that the adapter alone tells, largest first."""
    return {path: values.tolist() for path, values in changes.spectra(adapter).items()}


def peak_memory(device: torch.device) -> tuple[int | None, str]:
    """The most memory in use so far, in bytes or None where the system does not say, and what was measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated on the CUDA device"
    try:
        import resource
    except ImportError:  # Windows keeps no such account
        return None, "not known on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "resident set of the whole process"
