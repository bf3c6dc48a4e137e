"""The folder of a run: who may write there, the files that grow, and what a finished run leaves in it.

config.yaml  metrics.jsonl  report.json  report.html  adapter/  checkpoints/step-N/
"""

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
from gossamer.training.tasks import Figures
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from gossamer.errors import CheckpointError, DiskError, GossamerError, StateError
from gossamer.files.atomic import write_text
from gossamer.spec import read_yaml
from gossamer.data import clock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

class RunFolder:
    """The places in a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.report = (
            path / name for name in ("config.yaml", "metrics.jsonl", "report.json")
        )
        self.adapter, self.checkpoints = path / "adapter", path / "checkpoints"

    def began(self) -> str:
        """The day that the chat templates of the run are told: the one in its config.yaml, or today."""
        try:
            fields = read_yaml(self.config)[0] if self.config.exists() else {}
        except GossamerError:  # a run that goes on writes it anew
            fields = {}
        data = fields.get("data")
        return str((data.get("date") if isinstance(data, Mapping) else None) or clock.today())

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl. Raises `DiskError`."""
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise DiskError("writing failed", where=str(self.metrics), got=error.strerror or str(error)) from error

    def forget_after(self, step: int) -> None:
        """Drop the lines of metrics.jsonl that a resumed run is about to write again, and one that was cut short."""
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if 0 <= _step_of(line) <= step]
            write_text(self.metrics, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> int:
    """The step of a line of metrics.jsonl; -1 for a line that was not written to its end."""
    try:
        record = json.loads(line)
    except ValueError:
        return -1
    return record.get("step", -1) if isinstance(record, dict) else -1


def refuse_output(output: str | Path, *, resume: bool = False) -> Path:
    """The folder of a run that may begin there, or be resumed there; nothing is made. Raises what `open_run` raises."""
    path = Path(output)
    if resume:
        run = RunFolder(path)
        if not path.is_dir() or not (run.config.exists() or run.checkpoints.is_dir() or not any(path.iterdir())):
            raise CheckpointError(
                "there is no run to resume",
                where=str(path),
                expected="a folder with config.yaml or checkpoints/",
                hint="start it without resume",
            )
    elif path.exists() and not path.is_dir():
        raise StateError("the output is a file, not a folder", where=str(path))
    elif path.is_dir() and any(path.iterdir()):
        raise StateError(
            "the output folder is not empty", where=str(path), hint="resume the run in it, or choose another folder"
        )
    return path


@contextmanager
def open_run(output: str | Path, *, resume: bool = False) -> Iterator[RunFolder]:
    """A run folder that nobody else writes to for the length of a block.

    Raises:
        StateError: the folder holds something and `resume` is off, or another process writes there.
        CheckpointError: there is nothing to resume.
        DiskError: it cannot be made.
    """
    path = refuse_output(output, resume=resume)
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError("cannot make the run folder", where=str(path), got=error.strerror or str(error)) from error
    with _locked(path):
        if not resume:
            refuse_output(path)  # another process may have written there meanwhile
        try:
            yield RunFolder(path)
        finally:
            if created and not any(path.iterdir()):  # refused before anything was written
                path.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder itself; the system lets go of it when this process ends, however that happens."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError("another process is training in this folder", where=str(path)) from None
        yield
    finally:
        os.close(handle)


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
