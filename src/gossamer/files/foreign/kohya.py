"""kohya and ComfyUI: `lora_unet_<path with underscores>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

Where a dot was and where an underscore, the name does not say: a file of ours says it in its metadata, another one is
read against the modules of the base. The names are diffusers' own for a UNet and for CLIP's text encoders alone: what
ComfyUI, sd-scripts and diffusers look for in a transformer's file (Flux, SD3) are other names, of other modules, whose
queries, keys and values are one matrix, so such a file would be loaded by nobody.
"""

import json
from collections.abc import Mapping

import torch

from gossamer.errors import AdapterFileError, UnsupportedError
from gossamer.files.folder import json_object
from gossamer.files.foreign.diffusers import component_of
from gossamer.files.foreign.factors import Factors
from gossamer.files.foreign.format import BaseFacts, ForeignFile, ForeignFormat, needed

PATHS = "gossamer.paths"
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
"""Parts of a pipeline that the tools read under the names that are written here."""
_ELSEWHERE = (
    "lora_unet_double_blocks_",
    "lora_unet_single_blocks_",
    "lora_unet_joint_blocks_",
    "lora_transformer_",
    "lora_te3_",
)
"""How names of modules begin that are other modules here: of Flux and SD3."""


def _decode(file: ForeignFile, base: BaseFacts | None) -> dict[str, Factors]:
    if PATHS in file.facts:
        paths = json_object(file.facts[PATHS], f"{file.where}: {PATHS}")
    else:
        modules = needed(base, "kohya", "its names do not say where the dots were").modules
        paths = {flat: module for module in modules for flat in _flat_names(module)}
    found: dict[str, Factors] = {}
    for name, (down, up) in file.pairs.items():
        if PATHS not in file.facts and name not in paths and name.startswith(_ELSEWHERE):
            raise UnsupportedError(
                "a kohya file of a transformer, whose modules have other names than the base's",
                where=f"{file.where}: {name}",
                expected=", ".join(PREFIXES),
                hint="load it in diffusers, which knows these names, and save it there",
            )
        if not isinstance(paths.get(name), str):
            raise AdapterFileError("a name that is no module's", where=f"{file.where}: {name}")
        found[paths[name]] = Factors(down, up, file.alphas.get(name, float(down.shape[0])))
    if len(found) != len(file.pairs):
        raise AdapterFileError("two names for one module", where=file.where)
    return found


def _encode(factors: Mapping[str, Factors], base: BaseFacts | None) -> ForeignFile:
    for name in factors:
        if component_of(name) not in PREFIXES:
            raise UnsupportedError(
                "kohya's format names these modules in a way of its own, which is not covered",
                where=name,
                got=component_of(name),
                expected=", ".join(PREFIXES),
                hint="diffusers (--to diffusers), which ComfyUI reads too, and peft have a place for them",
            )
    second = any(component_of(name) == "text_encoder_2" for name in factors)
    paths = {_flat(name, second): name for name in factors}
    if len(paths) != len(factors):
        raise AdapterFileError("two modules of one name without dots", got=f"{len(factors)} modules")
    inexact = [name for name, one in factors.items() if float(torch.tensor(one.alpha)) != one.alpha]
    return ForeignFile(
        {flat: (factors[name].down, factors[name].up) for flat, name in paths.items()},
        {flat: factors[name].alpha for flat, name in paths.items()},
        {PATHS: json.dumps(paths, sort_keys=True)},
        lost=(f"the last digits of {len(inexact)} alphas (float32 in the file)",) if inexact else (),
    )


def _flat(name: str, second: bool = False) -> str:
    """A module's name in the file; with a second text encoder the first is numbered too."""
    part = component_of(name)
    prefix = "lora_te1" if second and part == "text_encoder" else PREFIXES[part]
    return f"{prefix}_{name.partition('.')[2].replace('.', '_')}"


def _flat_names(module: str) -> list[str]:
    if module.partition(".")[0] in PREFIXES:
        return [_flat(module), _flat(module, second=True)]
    return [f"lora_unet_{module.replace('.', '_')}"]


KOHYA = ForeignFormat("kohya", (".lora_down.weight", ".lora_up.weight"), _decode, _encode, alphas=True)
