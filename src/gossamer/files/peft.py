"""Adapter folders: PEFT's two files, and `gossamer.json` beside them, which PEFT ignores.

    adapter_config.json          PEFT's config
    adapter_model.safetensors    base_model.model.<path>.lora_A.weight ..., metadata "format": "pt" and our seal
    gossamer.json                our spec, the sha256 digest of spec and tensors, the base's fingerprint, provenance

Reading is strict: every tensor must be understood, every slot filled, every number finite, and the digest and the seal
(`gossamer.files.seal`), where there are any, must hold. Only safetensors and JSON are ever opened. What the names and
keys mean is one small file a PEFT type, in `gossamer.files.layouts`.
"""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.adapter import Adapter, Tensors
from gossamer.errors import AdapterFileError, SpecError, StateError
from gossamer.files.atomic import new_folder, write_bytes, write_json
from gossamer.files.folder import CONFIG, OURS, WEIGHTS, missing_hint, read_json, read_tensors
from gossamer.files.layouts import layout_for, layout_of, reading
from gossamer.files.layouts.writing import config_of, encode
from gossamer.files.seal import check_base, check_tensors, read_seal, same_config, sealed_file, unordered
from gossamer.methods import method_from_dict
from gossamer.methods.peft import PeftLayout

FORMAT = 1
Content = tuple[bytes, dict[str, Any], dict[str, Any]]
"""The weights' file, PEFT's config, and our description."""


# Reading -------------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder; see `Adapter.load`."""
    config = read_json(folder / CONFIG, missing=missing_hint(folder))
    config_at, weights_at = str(folder / CONFIG), str(folder / WEIGHTS)
    layout = layout_of(config, config_at)
    reading.check_keys(layout, config, config_at)
    stored, found = read_tensors(folder)
    ours = read_json(folder / OURS) if (folder / OURS).exists() else None
    seal = read_seal(found, weights_at)
    if ours is None:
        check_tensors(stored, seal, weights_at)
        if not same_config(config, seal):
            warnings.warn(f"{config_at}: not what it said when these tensors were written; it is taken", stacklevel=2)
    tensors = reading.sorted_out(layout, stored, config, weights_at)
    if ours is None:
        config, tensors = reading.renewed(layout, config, tensors, weights_at)
    if layout.complete or ours is None:
        spec = reading.spec_of(layout, config, tensors, config_at)
        reading.check(layout, tensors, spec, weights_at)
        if ours is None:
            tensors = reading.restored(layout, spec, tensors)
            return _not_idle(Adapter(spec, tensors, seal.get("base"), foreign=config), folder, seal)
    check_base(ours.get("base"), seal, str(folder / OURS))
    return _verified(ours, config, layout, tensors, folder)


def _not_idle(adapter: Adapter, folder: Path, seal: Mapping[str, Any]) -> Adapter:
    """Somebody else's adapter; a warning where it is one that changes nothing. Of our own, `attach` says so."""
    if not seal and adapter.idle_paths and set(adapter.idle_paths) == {path for path in adapter.paths if path}:
        warnings.warn(f"{folder}: this adapter changes nothing, at every module its change is zero", stacklevel=3)
    return adapter


def _verified(
    ours: Mapping[str, Any], config: Mapping[str, Any], layout: PeftLayout, tensors: Tensors, folder: Path
) -> Adapter:
    """The adapter as `gossamer.json` describes it, if config and tensors are still the ones it was written with."""
    where = str(folder / OURS)
    if ours.get("format") != FORMAT:
        raise AdapterFileError("an unknown format", where=where, got=repr(ours.get("format")), expected=str(FORMAT))
    expected, base, provenance = str(ours.get("digest")), ours.get("base"), ours.get("provenance")
    if not (isinstance(base, dict | None) and isinstance(provenance, dict) and isinstance(ours.get("spec"), dict)):
        raise AdapterFileError("not a gossamer.json", where=where, expected="spec, base and provenance as objects")
    try:
        spec = method_from_dict(ours["spec"], where=where)
    except (TypeError, SpecError) as error:
        raise AdapterFileError("not a gossamer.json", where=where, got=str(error)) from None
    if layout_for(spec).peft_type != layout.peft_type:
        raise _changed(folder, {"peft_type": layout_for(spec).peft_type}, config)
    adapter = Adapter(spec, reading.restored(layout, spec, tensors), base, provenance, config)
    written = config_of(adapter, str(folder / CONFIG))
    changed = {key: written[key] for key in written if unordered(written[key]) != unordered(config.get(key))}
    if changed:
        raise _changed(folder, changed, config)
    if adapter.digest != expected:
        raise AdapterFileError(
            "the tensors are not the ones that were written",
            where=str(folder / WEIGHTS),
            got=adapter.digest,
            expected=expected,
        )
    return adapter


def _changed(folder: Path, written: Mapping[str, Any], config: Mapping[str, Any]) -> AdapterFileError:
    return AdapterFileError(
        "the config was changed after the adapter was written",
        where=str(folder / CONFIG),
        got=", ".join(f"{key}={config.get(key)!r}" for key in written),
        expected=", ".join(f"{key}={value!r}" for key, value in written.items()),
        hint=f"if the change is meant, delete {OURS}",
    )


# Writing -------------------------------------------------------------------------------------------------------------


def write_adapter(adapter: Adapter, folder: Path) -> Path:
    """Write an adapter folder whole or not at all; other files in an adapter folder that is replaced are kept."""
    if folder.exists() and not (folder.is_dir() and ((folder / CONFIG).exists() or not any(folder.iterdir()))):
        raise StateError(
            "this folder is not an adapter's, so it is not written to", where=str(folder), hint="choose a new folder"
        )
    content = _content(adapter, folder)
    with new_folder(folder, replace=True) as fresh:
        for entry in folder.iterdir() if folder.exists() else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, fresh / entry.name, symlinks=True)
            elif entry.name not in (CONFIG, WEIGHTS, OURS):
                shutil.copy2(entry, fresh / entry.name, follow_symlinks=False)
        _write(content, fresh)
    return folder


def write_beside(adapter: Adapter, folder: Path) -> Path:
    """Write an adapter's files among others. Each is replaced whole; the digest tells a mixture of two adapters."""
    _write(_content(adapter, folder), folder)
    return folder


def _write(content: Content, folder: Path) -> None:
    weights, config, description = content
    write_bytes(folder / WEIGHTS, weights)
    write_json(folder / CONFIG, config)
    write_json(folder / OURS, description)


def _content(adapter: Adapter, folder: Path) -> Content:
    """What the three files hold."""
    from gossamer import __version__

    config, tensors = encode(adapter, str(folder))
    description = {
        "format": FORMAT,
        "gossamer": __version__,
        "digest": adapter.digest,
        "spec": adapter.spec.to_dict(),
        "base": adapter.base,
        "provenance": dict(adapter.provenance),
    }
    return sealed_file(adapter, config, tensors), config, description
