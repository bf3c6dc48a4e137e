"""Write a plain model with adapters folded in: `W' = W + sum_i w_i scaling_i B_i A_i`, in float32, rounded once."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.adapter import Adapter
from gossamer.attachment import base_fingerprint, merge, unmerge
from gossamer.errors import BaseMismatchError, StateError, UsageError
from gossamer.files.atomic import new_folder
from gossamer.files.folder import read_json
from gossamer.files.shards import INDEX
from gossamer.merging.companions import Companions, held
from gossamer.merging.losses import losses
from gossamer.merging.streamed import NOTE, change_of, copy_rest, merge_streamed, outlined, stand, streamable
from gossamer.merging.vocabulary import own_vocabulary, room_for_vocabulary, rows_of
from gossamer.models import load_base, make_dense
from gossamer.models.locate import locate
from gossamer.models.mapped import Mapped, mapped_model
from gossamer.models.quantizer import packed_modules
from gossamer.models.scrutiny import read_config
from gossamer.models.write import save_into
from gossamer.planning.devices import this_machine
from gossamer.progress import Progress

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
CHECKS = ("auto", "outputs", "samples")


def merge_into_base(
    adapters: str | Path | Sequence[str | Path],
    base: str | Path,
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    undo: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    quant: str | None = None,
    requantize: bool = False,
    force_base: bool = False,
    check: str = "auto",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merge adapter folders into a base and write a transformers folder with a tokenizer, whole or not at all.

    Long because it is the one door: each argument is explained here and used once.

        W' = W + sum_i w_i scaling_i B_i A_i

    A folder of safetensors is merged file by file in the memory of one module, and goes on where it was interrupted.
    What cannot be streamed (a GGUF file, a quantised base, experts that the model stacks) is loaded. A base that is
    quantised is rebuilt, merged in float32 and written dense, because 4 bits do not hold the change: `choices` says
    what each way of storing it loses. Tokenizer, chat template and settings are the base's, unless an adapter's folder
    holds its own; `notes` says what of them was taken. An adapter's own embedding and head may have more rows than the
    base's, and unties them where the base uses one weight for both.

    Args:
        adapters: an adapter folder, or several.
        base: catalog name, Hugging Face id, folder or .gguf file.
        output: a folder that does not exist yet.
        weights: a number for each adapter; 1 each without it.
        undo: take away what a merge has added. `base` is a merged folder, and the result is the model before, within
            the rounding of both; refused for methods that are no sum.
        dtype: what is written; "auto" is what the weights are stored in (float32 for a GGUF file or a quantised base).
        device: where the model is loaded for what is not streamed, and for the check.
        quant: merge into the base as it is when quantised so (the base that a QLoRA adapter was trained on).
        requantize: write the merged weights in the base's own 4 or 8 bits all the same.
        force_base: merge although an adapter says it was made for another base.
        check: "outputs" compares the written model's outputs with the base's with the adapters beside it; "samples"
            reads 64 numbers of every changed weight again; "auto" does the first where the model fits a quarter of
            this machine's memory in float32. Samples are always looked at where the merge is streamed.
        dry_run: only say what would be written: "modules", "files" and "bytes" where the merge would be streamed.
        progress: who watches; see `gossamer.progress`.

    Returns:
        {"output", "modules", "dtype", "streamed", "seconds", "choices", "notes"}, and where outputs were compared
        "max_error", the largest difference over a fixed sample of tokens, and "max_logit", the largest output. Of a
        streamed merge also "files", "continued" (how many of them an interrupted merge had finished), "bytes", and
        "rounding": what rounding to the dtype takes from the change, relative to it, estimated from the samples.
        `choices`, of a quantised base: storage -> {"of_weight", "of_change"}, what rounding to it takes from the
        merged weights.

    Raises:
        StateError: output exists. BaseMismatchError, AdapterFileError, BaseFileError: files that do not fit.
            AdapterFileError also for a tokenizer with more tokens than the merged model has rows.
        UsageError: weights that are not one for each adapter; adapters with different tokenizers or settings;
            requantize on a base that is not quantised.
        SharedWeightError, NonFiniteError, UnsupportedError: a merge that is refused; nothing is left then.
        DiskError: no space; what was finished stays beside `output`, to be continued.
    """
    output, start = Path(output), time.monotonic()
    if output.exists():
        raise StateError("the output folder exists already", where=str(output), hint="choose a new folder")
    if dtype not in ("auto", *_DTYPES) or check not in CHECKS:
        raise UsageError("unknown dtype or check", got=f"{dtype}, {check}", expected=", ".join(("auto", *_DTYPES)))
    folders = [Path(one) for one in ([adapters] if isinstance(adapters, str | Path) else adapters)]
    values = _weighted(folders, weights)
    folder = locate(base)
    companions = Companions.of(folder, [] if undo else folders)
    if undo:
        values = [(adapter, -weight) for adapter, weight in reversed(values)]
        force_base = _made_of(folder, values, force_base)
    scaled = [weight * adapter for adapter, weight in values]
    done: dict[str, Any] = {"output": str(output), "choices": {}, "notes": [*companions.notes]}
    if undo and any(map(held, folders)):
        done["notes"].append("tokenizer and settings stay those of the merged folder, which may be the adapter's")
    mapped = _mapped(folder, quant, requantize)
    mapped = None if mapped and own_vocabulary(mapped.model, scaled) else mapped
    groups = change_of(mapped, scaled, force_base=force_base) if mapped else []
    streams = mapped is not None and streamable(mapped, groups)
    if dry_run:
        done |= {"streamed": streams}
        return done | (outlined(mapped, groups, _DTYPES.get(dtype)) if mapped and streams else {})
    if mapped and streams:
        companions.require_rows(rows_of(mapped.model))
        note = _note(mapped, values, dtype)
        done |= merge_streamed(mapped, groups, output, note, _DTYPES.get(dtype), progress, companions)
        done |= {"streamed": True, "dtype": _dtype_of(output)}
        if check == "outputs" or (check == "auto" and _fits(mapped)):
            done |= _compared(scaled, base, output, device, force_base)
    else:
        found = _in_memory(scaled, folder, output, dtype, device, quant, requantize, force_base, companions)
        done |= found | {"notes": done["notes"] + found["notes"]}
    return done | {"seconds": time.monotonic() - start}


def _weighted(folders: Sequence[Path], weights: Sequence[float] | None) -> list[tuple[Adapter, float]]:
    given = [1.0] * len(folders) if weights is None else [*weights]
    if len(given) != len(folders) or not folders:
        raise UsageError("one weight for each adapter", got=f"{len(given)} weights, {len(folders)} adapters")
    return [(Adapter.load(folder), weight) for folder, weight in zip(folders, given, strict=True)]


def _mapped(folder: Path, quant: str | None, requantize: bool) -> Mapped | None:
    """The base as views of its files; None where it has to be loaded."""
    if quant or requantize or folder.suffix == ".gguf" or read_config(folder).get("quantization_config") is not None:
        return None
    return mapped_model(folder)


def _note(mapped: Mapped, values: Sequence[tuple[Adapter, float]], dtype: str) -> dict[str, Any]:
    merged = [{"sha256": adapter.digest, "weight": weight} for adapter, weight in values]
    return {"format": 1, "base": base_fingerprint(mapped.model), "merged": merged, "dtype": dtype}


def _made_of(folder: Path, values: Sequence[tuple[Adapter, float]], force_base: bool) -> bool:
    """Whether a folder says that exactly these adapters were merged into it. Raises `BaseMismatchError`."""
    noted = read_json(folder / NOTE).get("merged") if (folder / NOTE).is_file() else None
    wanted = [{"sha256": adapter.digest, "weight": -weight} for adapter, weight in reversed(values)]
    if noted != wanted and not force_base:
        raise BaseMismatchError(
            "this folder does not say that it was made by merging these adapters",
            where=str(folder / NOTE),
            got=str(noted),
            expected=str(wanted),
            hint="force_base=True (--force-base) subtracts them all the same",
        )
    return True


def _fits(mapped: Mapped) -> bool:
    """Whether the model in float32 takes no more than a quarter of the memory."""
    return 4 * sum(parameter.numel() for parameter in mapped.model.parameters()) <= this_machine().memory // 4


def _dtype_of(folder: Path) -> str:
    return str(mapped_model(folder).model.dtype).removeprefix("torch.")


def _compared(
    adapters: Sequence[Adapter], base: str | Path, output: Path, device: str, force_base: bool
) -> dict[str, float]:
    """The written model beside the base with its adapters, one after the other in memory."""
    model, _ = load_base(base, device=device)
    stand(model, adapters, force_base=force_base)
    before = _sampled_output(model)
    del model
    written = _sampled_output(load_base(output, device=device)[0])
    return {"max_error": (written - before).abs().max().item(), "max_logit": before.abs().max().item()}


def _in_memory(
    adapters: Sequence[Adapter],
    base: Path,
    output: Path,
    dtype: str,
    device: str,
    quant: str | None,
    requantize: bool,
    force_base: bool,
    companions: Companions,
) -> dict[str, Any]:
    model, tokenizer = load_base(base, dtype=dtype, device=device, quant=quant)
    stored = packed_modules(model)
    if requantize and not stored:
        raise UsageError("only what was quantised can be quantised again", where=str(base), hint="--quant nf4")
    if stored:  # the merge is done in float32, whatever it is stored as in the end
        model.float()
    with room_for_vocabulary(model, adapters) as notes:
        done: dict[str, Any] = {
            "streamed": False,
            "modules": len(stand(model, adapters, force_base=force_base)),
            "notes": notes,
        }
    companions.require_rows(rows_of(model))
    before = _sampled_output(model)
    done["choices"] = _fold(model, requantize)
    if stored:
        _settle(model, _DTYPES.get(dtype, torch.float32), requantize)
    done["max_error"] = (_sampled_output(model) - before).abs().max().item()
    done["max_logit"] = before.abs().max().item()
    with new_folder(output) as fresh:
        save_into(model, tokenizer if base.is_file() else None, fresh)
        if base.is_dir():
            copy_rest(base, fresh, but=("config.json", INDEX))
        companions.write(fresh)
    return done | {"dtype": str(model.dtype).removeprefix("torch.")}


def _settle(model: nn.Module, dtype: torch.dtype, requantize: bool) -> None:
    """Give a model whose base was quantised the form it is written in."""
    if not requantize:
        make_dense(model, dtype)
    model.to(dtype)


def _fold(model: nn.Module, requantize: bool) -> dict[str, dict[str, float]]:
    """Fold the adapters in for good; what each storage of the merged weights would lose, if they were quantised."""
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
