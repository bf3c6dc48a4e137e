"""What does merging cost: into files of any size, into the real model's folder, and in memory?

Into files: a synthetic sharded base in bfloat16 (GOSSAMER_MERGE_GB, 8 by default; twice that is needed on the disk) is
merged with an adapter of rank 16 at every linear module, in a process whose peak memory is read at its end. The files
are copied beside it, flushed to the same disk, and both start with the base's pages dropped from the system's cache.

The real model: the folder that Gossamer writes against the one PEFT's merge_and_unload and save_pretrained write, from
folder to folder, in float32 and in bfloat16, each reading what it needs; and merge and unmerge in memory. Before
anything is timed, what is written is held against the sum in float64.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import gossamer as gs
from bench.common import Row, interleaved, report
from gossamer.files.shards import INDEX, Outline, write_shard
from gossamer.models import write_model_folder
from gossamer.models.mapped import mapped_model

BASE, RANK, ROUNDS = "smollm2-135m", 8, 5
GIGABYTES = float(os.environ.get("GOSSAMER_MERGE_GB", "8"))
SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8}
LAYER = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
"""Bytes of the matrices of a layer."""
SHARD = 2 << 30
IN_A_PROCESS = """
import json, sys, time, torch, transformers, gossamer as gs
from gossamer.merging import into_base
start = time.perf_counter()
done = gs.merge_into_base(*sys.argv[1:4], check="samples")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([time.perf_counter() - start, int(peak.split()[1]) * 1024, done["files"], done["rounding"]]))
"""


def measure() -> list[Row]:
    """Everything, one after the other."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("GOSSAMER_MERGE_DIR")) as scratch:
        return [*large(Path(scratch), GIGABYTES), *real(Path(scratch))]


def large(scratch: Path, gigabytes: float, sizes: dict[str, int] | None = None, rounds: int = 3) -> list[Row]:
    """The synthetic base: merged, and copied."""
    base = synthetic(scratch / "large", gigabytes, sizes or SIZES)
    adapter = drawn(mapped_model(base).model, rank=16).save(scratch / "large adapter")
    nbytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    found: dict[str, list[list[float]]] = {"copied": [], "merged": []}
    for turn in range(rounds):
        for name in ("copied", "merged") if turn % 2 == 0 else ("merged", "copied"):
            dropped(base)
            output = scratch / "written"
            found[name].append(copied(base, output) if name == "copied" else merged(adapter, base, output))
            if name == "merged":
                held_against_float64(adapter, base, output)
            shutil.rmtree(output)
    shutil.rmtree(base)
    usual = {name: statistics.median(one[0] for one in turns) for name, turns in found.items()}
    return [
        {
            "what": f"a base of {nbytes / 1e9:.1f} GB in {int(found['merged'][0][2])} files",
            "contender": name,
            "s": ", ".join(f"{one[0]:.1f}" for one in sorted(turns)),
            "MB/s": round(nbytes / usual[name] / 1e6),
            "of copying": round(usual["copied"] / usual[name], 2),
            "peak MB": round(max(one[1] for one in turns) / 1e6) if name == "merged" else None,
        }
        for name, turns in found.items()
    ]


def synthetic(folder: Path, gigabytes: float, sizes: dict[str, int]) -> Path:
    """A Llama of random numbers in several files, written without ever being whole in memory."""
    heads = {"num_attention_heads": 32, "tie_word_embeddings": True, "dtype": "bfloat16"}
    fixed = 2 * sizes["vocab_size"] * sizes["hidden_size"]
    layers = max(1, round((gigabytes * 1e9 - fixed) / LAYER)) if sizes is SIZES else 3
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir()
    config.save_pretrained(folder)
    shards: list[dict[str, Any]] = [{}]
    for name, parameter in model.named_parameters():
        if sum(torch.Size(shape).numel() * 2 for _, shape in shards[-1].values()) > min(SHARD, gigabytes * 1e9 / 3):
            shards.append({})
        shards[-1][name] = (torch.bfloat16, tuple(parameter.shape))
    noise = torch.randn(1 << 22).mul(0.02).bfloat16()
    weight_map = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        with open(folder / file, "wb") as opened:
            write_shard(
                opened, Outline(tensors, {"format": "pt"}), (_noise(noise, shape) for _, shape in tensors.values())
            )
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    os.sync()
    return folder


def _noise(noise: torch.Tensor, shape: tuple[int, ...]) -> Any:
    left = torch.Size(shape).numel()
    while left:
        piece = noise[: min(left, len(noise))]
        left -= len(piece)
        yield piece


def drawn(model: Any, rank: int) -> gs.Adapter:
    """An adapter of random factors at every linear module."""
    gs.attach(model, gs.LoRA(r=rank))
    for number, parameter in enumerate(gs.trainable_parameters(model).values()):
        parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(number))
    adapter = gs.capture(model)
    gs.detach(model)
    return adapter


def dropped(folder: Path) -> None:
    """Let the system forget the pages of these files, so that they are read from the disk."""
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(base: Path, output: Path) -> list[float]:
    """Seconds to copy a folder and flush it to the disk."""
    start = time.perf_counter()
    output.mkdir()
    for file in base.iterdir():
        shutil.copyfile(file, output / file.name)
        with open(output / file.name, "rb+") as opened:
            os.fsync(opened.fileno())
    return [time.perf_counter() - start, 0.0]


def merged(adapter: Path, base: Path, output: Path) -> list[float]:
    """Seconds, peak bytes and files of a merge in a process of its own."""
    words = [sys.executable, "-c", IN_A_PROCESS, str(adapter), str(base), str(output)]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def held_against_float64(adapter: Path, base: Path, output: Path, rounding: float = 0.5001) -> None:
    """Rows of every merged weight are the sum in float64, rounded once (or as often as said)."""
    value, old, new = gs.Adapter.load(adapter), mapped_model(base), mapped_model(output)
    for path in value.paths:
        rows = torch.tensor([0, 7, -1])
        slots, spec = value.tensors[path], cast(gs.LoRA, value.spec)
        delta = spec.scaling_at(path) * slots["lora_B"][rows].double() @ slots["lora_A"].double()
        before, after = (cast(Any, one.model.get_submodule(path)).weight[rows] for one in (old, new))
        exact = before.double() + delta
        step = torch.finfo(after.dtype).eps * exact.abs().clamp(min=1e-30).log2().floor().exp2()
        assert ((after.double() - exact).abs() <= rounding * step + 1e-7).all(), path


def real(scratch: Path) -> list[Row]:
    """The real model against PEFT: from folder to folder, and in memory."""
    rows: list[Row] = []
    for dtype in ("float32", "bfloat16"):
        base = scratch / dtype
        model, tokenizer = gs.load_base(BASE, dtype=dtype)
        write_model_folder(model, tokenizer, base)
        adapter = drawn(model, RANK).save(scratch / f"{dtype} adapter")
        rows += from_folder_to_folder(base, adapter, scratch, dtype)
        if dtype == "float32":
            rows += in_memory(base, adapter)
    return rows


def from_folder_to_folder(base: Path, adapter: Path, scratch: Path, dtype: str, rounds: int = ROUNDS) -> list[Row]:
    """Both read the folders and write a new one."""
    output = scratch / "merged"

    def theirs() -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        merged: Any = peft.PeftModel.from_pretrained(model, adapter)
        merged.merge_and_unload().save_pretrained(output)

    def ours(check: str) -> None:
        gs.merge_into_base(adapter, base, output, check=check)

    def fresh(call: Any) -> Any:
        def run() -> None:
            shutil.rmtree(output, ignore_errors=True)
            call()

        return run

    contenders = {
        "PEFT": fresh(theirs),
        "Gossamer, samples read again": fresh(lambda: ours("samples")),
        "Gossamer, outputs compared": fresh(lambda: ours("outputs")),
    }
    for name, call in contenders.items():
        call()
        held_against_float64(adapter, base, output, rounding=0.5001 if name != "PEFT" else 1.5)
    times = interleaved(contenders, rounds=rounds, warmup=0)
    return [
        {"what": f"{BASE}, {dtype}, folder to folder", "contender": name, **_row(time)}
        | {"times PEFT": round(times["PEFT"].median / time.median, 2)}
        for name, time in times.items()
    ]


def in_memory(base: Path, adapter: Path) -> list[Row]:
    """Merge and unmerge of a model that is there."""
    model, _ = gs.load_base(base, dtype="float32")
    gs.attach(model, gs.Adapter.load(adapter))
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    other: Any = peft.PeftModel.from_pretrained(plain, adapter)

    def theirs() -> None:
        other.merge_adapter()
        other.unmerge_adapter()

    def ours() -> None:
        gs.merge(model)
        gs.unmerge(model)

    path = gs.Adapter.load(adapter).paths[0]
    gs.merge(model)
    other.merge_adapter()
    torch.testing.assert_close(model.get_submodule(path).weight, plain.get_submodule(path).base_layer.weight)
    gs.unmerge(model)
    other.unmerge_adapter()
    times = interleaved({"PEFT": theirs, "Gossamer": ours}, rounds=ROUNDS)
    return [
        {"what": f"{BASE}, float32, merge and unmerge in memory", "contender": name, **_row(time)}
        | {"times PEFT": round(times["PEFT"].median / time.median, 2)}
        for name, time in times.items()
    ]


def _row(time: Any) -> dict[str, str]:
    return {"s": f"{time.median:.2f} ({time.min:.2f} to {time.max:.2f})"}


if __name__ == "__main__":
    report("merge", "What does merging cost?", measure)
