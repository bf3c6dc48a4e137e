"""The same base and adapters served by vLLM, where one machine or one GPU is not enough.

Nothing of vLLM is imported: its adapters are checked by what vLLM 0.32 accepts, its command and environment are written
out, and it is started where it is installed.
"""

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.adapter import Adapter
from gossamer.errors import GossamerError, UnsupportedError, UsageError
from gossamer.methods import LoRA
from gossamer.serving.chat_format import ChatFormats, chat_files
from gossamer.serving.folder import Folder, FolderContents, check_names

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest rank of a server is one of these; every slot is as large."""
HEADS = ("classifier", "score")
ENVIRONMENT = "GOSSAMER_VLLM"
"""Names a virtual environment that has vLLM, when this one has not."""


@dataclass(frozen=True)
class Compatibility:
    """Whether vLLM takes an adapter.

    Attributes:
        reason: why not; "" where it does. remedy: what would make it fit, as far as anything would.
        rank: its largest. modules: last parts of the paths that it changes.
    """

    name: str
    path: Path
    reason: str = ""
    remedy: str = ""
    rank: int = 0
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A command and what has to stand in its environment."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " \\\n  ".join([*settings, shlex.join(self.arguments[:3]), *_pairs(self.arguments[3:])])


def check(path: Path, name: str = "", tokenizer: Any = None) -> Compatibility:
    """What vLLM 0.32 says of an adapter folder, known by its own name where no other is given.

    Args:
        tokenizer: the base's, which vLLM uses for all its adapters; what differs of the adapter's own is a reason.
    """
    name = name or path.name
    try:
        adapter = Adapter.load(path)
    except GossamerError as error:
        reason, remedy = f"it cannot be read: {error.what}", "see `gossamer doctor` and the error's page"
        return Compatibility(name, path, reason, remedy)
    rank = max((held["lora_B"].shape[1] for held in adapter.tensors.values() if "lora_B" in held), default=0)
    remedy = f"gossamer merge {path} --base ... --output DIR, and serve DIR as a base of its own"
    reason = _of_the_method(adapter)
    if not reason and rank > RANKS[-1]:
        reason = f"its rank is {rank:,}, and vLLM takes {RANKS[-1]} at most"
        remedy = f"gossamer resize {path} --rank {RANKS[-1]} --output DIR"
    if reason := reason or _own_chats(path, tokenizer):
        return Compatibility(name, path, reason, remedy)
    modules = tuple(sorted({one.rpartition(".")[2] for one, held in adapter.tensors.items() if "lora_A" in held}))
    return Compatibility(name, path, rank=rank, modules=modules)


def _of_the_method(adapter: Adapter) -> str:
    """What of its method vLLM does not take; "" where it takes it."""
    spec = adapter.spec
    if type(spec) is not LoRA:
        return f"vLLM knows LoRA, and this is {spec.name}"
    faults = {
        "trained biases": spec.bias != "none",
        f"a start that changes the base ({spec.start})": spec.start not in ("gaussian", "kaiming"),
        "rows of an embedding": bool(spec.trainable_tokens),
        "factors on stacked parameters": bool(spec.target_parameters),
        "whole modules that are no head": any(one not in HEADS for one in spec.modules_to_save),
    }
    slots = {slot for held in adapter.tensors.values() for slot in held} - {"lora_A", "lora_B"}
    found = [reason for reason, there in faults.items() if there]
    found = found or (sorted(slots) if slots - {"weight", "bias"} else [])
    return f"vLLM takes no {', '.join(found)}" if found else ""


def _own_chats(path: Path, tokenizer: Any) -> str:
    """What of an adapter's own tokenizer, template and ends vLLM would not use; "" where they are the base's."""
    try:
        own = ChatFormats(tokenizer).of(path)
    except GossamerError as error:
        return f"vLLM reads texts with the base's tokenizer: {error.what}"
    differing = {"chat template": own.template, "special tokens": own.tokens, "end of an answer": own.ends}
    if named := [what for what, there in differing.items() if there]:
        return f"vLLM takes the base's {', '.join(named)}, and this one has its own"
    return ""


def command(
    base: Path,
    verdicts: Sequence[Compatibility],
    *,
    name: str = "base",
    host: str = "127.0.0.1",
    port: int = 8000,
    python: str = sys.executable,
    cuda: bool = True,
    slots: int = 32,
    options: Sequence[str] = (),
) -> Launch:
    """How vLLM is started for a base folder and the adapters that it takes.

    Args:
        slots: adapters that may run in one batch.
        cuda: whether there is a GPU; else the settings of the CPU build are written.
        options: of vLLM's own, as they are.
    """
    taken = [one for one in verdicts if not one.reason]
    arguments = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", name]
    arguments += ["--host", host, "--port", str(port)]
    if taken:
        rank = next(one for one in RANKS if one >= max(one.rank for one in taken))
        modules = sorted({module for one in taken for module in one.modules})
        arguments += ["--enable-lora", "--max-loras", str(min(slots, len(taken))), "--max-lora-rank", str(rank)]
        arguments += ["--max-cpu-loras", str(max(2 * slots, len(taken)))]
        arguments += ["--lora-target-modules", *modules]
        arguments += ["--lora-modules", *(f"{one.name}={one.path.resolve()}" for one in taken)]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    if not cuda:
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}
        library = Path(python).parent.parent / "lib" / "libiomp5.so"
        if library.is_file():
            environment |= {"LD_PRELOAD": str(library)}
    return Launch((*arguments, *options), environment)


def serve(
    base: str,
    adapters: Path | None,
    host: str,
    port: int,
    dry_run: bool = False,
    *,
    name: str = "base",
    options: Sequence[str] = (),
    say: Any = print,
) -> None:
    """Say which adapters vLLM takes, write its command with more `options` of its own, and become it.

    Raises: UnsupportedError where vLLM is not installed; UsageError for a host that is not this machine, as vLLM's one
        key knows no tenants.
    """
    import torch

    from gossamer.models.locate import locate
    from gossamer.serving.api.server import check_host

    check_host(host, "VLLM_API_KEY" in os.environ)
    named = Folder(adapters).found() if adapters else FolderContents({}, {})
    place = locate(base)
    tokenizer = _tokenizer(place) if any(map(chat_files, named.adapters.values())) else None
    verdicts = [check(path, called, tokenizer) for called, path in named.adapters.items()]
    verdicts += [Compatibility(called, Path(), error.what, error.hint) for called, error in named.refused.items()]
    check_names(name, named.adapters)
    for one in verdicts:
        say(f"{one.name}: {'taken' if not one.reason else one.reason}")
        if one.remedy:
            say(f"  instead: {one.remedy}")
    python = interpreter()
    where = {"host": host, "port": port, "python": python or "python", "cuda": torch.cuda.is_available()}
    made = command(place, verdicts, name=name, options=options, **where)
    say(str(made))
    if dry_run:
        return
    if python is None:
        hint = f"pip install vllm, or name an environment that has it in {ENVIRONMENT}"
        raise UnsupportedError("vLLM is not installed here", hint=hint)
    os.execve(python, made.arguments, {**os.environ, **made.environment})


def interpreter() -> str | None:
    """A Python that has vLLM: of the environment that GOSSAMER_VLLM names, or this one. Raises `UsageError`."""
    if place := os.environ.get(ENVIRONMENT):
        python = Path(place) / "bin" / "python"
        if not python.is_file():
            raise UsageError("no virtual environment", where=ENVIRONMENT, got=place, expected=str(python))
        return str(python)
    return sys.executable if importlib.util.find_spec("vllm") else None


def _tokenizer(base: Path) -> Any:
    from gossamer.models.load import as_base_error, read_tokenizer

    with as_base_error(base):
        return read_tokenizer(base.parent, gguf_file=base.name) if base.is_file() else read_tokenizer(base)


def _pairs(words: Sequence[str]) -> list[str]:
    """A line for each option with what belongs to it."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return lines
