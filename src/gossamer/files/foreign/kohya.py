"""kohya and ComfyUI: `lora_unet_<path with underscores>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

Where a dot was and where an underscore, the name does not say: a file of ours says it in its metadata, another one is
read against the modules of the base. The names are diffusers' own for a UNet and for CLIP's text encoders alone: what
ComfyUI, sd-scripts and diffusers look for in a transformer's file (Flux, SD3) are other names, of other modules, whose
queries, keys and values are one matrix, so such a file would be loaded by nobody.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.files.foreign.changes import Change, Changes
from gossamer.files.foreign.diffusers import alpha_in, component_of
from gossamer.files.foreign.format import (
    Base,
    Format,
    json_object,
    needed,
    paired,
    read_safetensors,
    refuse_rest,
    write_safetensors,
)

PATHS = "gossamer.paths"
ENDINGS = (".lora_down.weight", ".lora_up.weight")
PREFIXES = {
    "unet": "lora_unet",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
}
"""Parts of a pipeline that the tools read under the names that are written here."""


_ELSEWHERE = (
    "lora_unet_double_blocks_",
    "lora_unet_single_blocks_",
    "lora_unet_joint_blocks_",
    "lora_transformer_",
    "lora_te3_",
)
"""How names of modules begin that are other modules here: of Flux and SD3."""


class Kohya(Format):
    """kohya's and ComfyUI's layout."""

    name = "kohya"
    reader = "ComfyUI, sd-scripts"

    def detects(self, path: Path) -> bool:
        """See `Format`."""
        if not (path.is_file() and path.suffix == ".safetensors"):
            return False
        return any(name.endswith(ENDINGS) for name in read_safetensors(path)[0])

    def read(self, path: Path, base: Base | None) -> Changes:
        """See `Format`."""
        tensors, metadata = read_safetensors(path)
        pairs, rest = paired(tensors, ENDINGS, path)
        alphas = {name.removesuffix(".alpha"): rest.pop(name) for name in [*rest] if name.endswith(".alpha")}
        refuse_rest(rest | {name: one for name, one in alphas.items() if name not in pairs}, path, self.name)
        if PATHS in metadata:
            paths = json_object(metadata[PATHS], f"{path}: {PATHS}")
        else:
            modules = needed(base, self.name, "its names do not say where the dots were").modules
            paths = {flat: module for module in modules for flat in _flat_names(module)}
            unknown = next((name for name in pairs if name not in paths), None)
            if unknown is not None and unknown.startswith(_ELSEWHERE):
                raise UnsupportedError(
                    "a kohya file of a transformer, whose modules have other names than the base's",
                    where=f"{path}: {unknown}",
                    expected=", ".join(PREFIXES),
                    hint="load it in diffusers, which knows these names, and save it there",
                )
        found: Changes = {}
        for name, (down, up) in pairs.items():
            if not isinstance(paths.get(name), str):
                raise AdapterFileError("a name that is no module's", where=f"{path}: {name}")
            alpha = alpha_in(alphas[name], path, name) if name in alphas else float(down.shape[0])
            found[paths[name]] = Change(down, up, alpha)
        if len(found) != len(pairs):
            raise AdapterFileError("two names for one module", where=str(path))
        return found

    def write(self, changes: Changes, path: Path, base: Base | None) -> list[str]:
        """See `Format`."""
        for name in changes:
            if component_of(name) not in PREFIXES:
                raise UnsupportedError(
                    "kohya's format names these modules in a way of its own, which is not covered",
                    where=name,
                    got=component_of(name),
                    expected=", ".join(PREFIXES),
                    hint="diffusers (--to diffusers), which ComfyUI reads too, and peft have a place for them",
                )
        second = any(component_of(name) == "text_encoder_2" for name in changes)
        paths = {_flat(name, second): name for name in changes}
        if len(paths) != len(changes):
            raise AdapterFileError("two modules of one name without dots", where=str(path))
        tensors = {}
        for flat, name in paths.items():
            one = changes[name]
            tensors |= {flat + ENDINGS[0]: one.down, flat + ENDINGS[1]: one.up}
            tensors[f"{flat}.alpha"] = torch.tensor(one.alpha, dtype=torch.float32)
        write_safetensors(path, tensors, {"format": "pt", PATHS: json.dumps(paths, sort_keys=True)})
        inexact = [name for name, one in changes.items() if float(torch.tensor(one.alpha)) != one.alpha]
        return [f"the last digits of {len(inexact)} alphas (float32 in the file)"] if inexact else []


def _flat(name: str, second: bool = False) -> str:
    """A module's name in the file; with a second text encoder the first is numbered too."""
    part = component_of(name)
    prefix = "lora_te1" if second and part == "text_encoder" else PREFIXES[part]
    return f"{prefix}_{name.partition('.')[2].replace('.', '_')}"


def _flat_names(module: str) -> list[str]:
    if module.partition(".")[0] in PREFIXES:
        return [_flat(module), _flat(module, second=True)]
    return [f"lora_unet_{module.replace('.', '_')}"]
