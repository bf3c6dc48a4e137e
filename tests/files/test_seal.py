"""Nothing of a saved folder changes unseen: each byte and each field, with our own file beside PEFT's and without."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gossamer as gs
from gossamer.errors import AdapterFileError, BaseMismatchError, GossamerError
from tests.adapters import as_peft_writes, trained
from tests.conformance.oracle import Toys

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "gossamer.json"
SPEC = gs.LoRA(r=2, alpha=6.0, target_modules=("q_proj",), modules_to_save=("model.norm",), alpha_pattern={"0.+": 3.0})


@pytest.fixture(scope="module")
def sound(toy: Toys, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter as it is written, and one that lost its `gossamer.json`."""
    value = trained(toy("llama"), SPEC)
    root = tmp_path_factory.mktemp("sound")
    whole, bare = value.save(root / "whole"), value.save(root / "bare")
    (bare / OURS).unlink()
    return {"whole": whole, "bare": bare}


def outcome(folder: Path) -> tuple[Any, ...] | None:
    """What a folder loads as, to the bit; None where it is refused, or something is said of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            value = gs.Adapter.load(folder)
        except (GossamerError, UserWarning):
            return None
    scalings = [value.spec.scaling_at(path) for path in value.paths]  # pyright: ignore[reportAttributeAccessIssue]
    bits = {name: tensor.numpy().tobytes() for name, tensor in value.named_tensors().items()}
    return value.spec.to_dict(), scalings, bits, value.base


def unseen(folder: Path, copy: Path, changes: Iterator[tuple[str, Callable[[Path], Any]]]) -> list[str]:
    """Names of the changes after which the folder loads in silence as something else."""
    before, wrong, count = outcome(folder), [], 0
    assert before is not None
    for name, change in changes:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        change(copy)
        count += 1
        after = outcome(copy)
        if after is not None and (after[:-1] != before[:-1] or after[-1] not in (before[-1], None)):
            wrong.append(name)  # a bit in the seal's own name leaves the same adapter, which no longer says its base
    assert count > 20
    return wrong


def flips(folder: Path, header: bool) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """One bit of every few bytes of the weights' file."""
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for place in range(0, end, 7) if header else range(end, len(data), 19):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8

        yield f"byte {place}", lambda copy, flipped=flipped: (copy / WEIGHTS).write_bytes(flipped)


def others(value: Any) -> list[Any]:
    """Values like this one, and unlike it."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int | float):
        return [value + 1, -value, None, str(value)]
    if isinstance(value, str):
        return [value + "x", value[:-1], "", None]
    if isinstance(value, list):
        return [value[1:], [*value, "v_proj"], None]
    if isinstance(value, dict):
        return [{}, None, *({**value, key: other} for key in value for other in others(value[key]))]
    return [1, "x", ["v_proj"], {"x": 1}]


def fields(folder: Path, file: str) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """Every key of a JSON file taken away, or with other values."""
    content = json.loads((folder / file).read_text())
    for key, value in content.items():
        without = {name: content[name] for name in content if name != key}
        for changed in (without, *(content | {key: other} for other in others(value))):
            text = json.dumps(changed)
            yield f"{file}: {key} {changed.get(key, 'gone')!r}", lambda copy, text=text: (copy / file).write_text(text)


@pytest.mark.parametrize("kind", ["whole", "bare"])
@pytest.mark.parametrize("header", [True, False], ids=["header", "numbers"])
def test_a_flipped_bit(kind: str, header: bool, sound: dict[str, Path], tmp_path: Path):
    assert unseen(sound[kind], tmp_path / "copy", flips(sound[kind], header)) == []


@pytest.mark.parametrize(("kind", "file"), [("whole", CONFIG), ("whole", OURS), ("bare", CONFIG)])
def test_a_changed_field(kind: str, file: str, sound: dict[str, Path], tmp_path: Path):
    assert unseen(sound[kind], tmp_path / "copy", fields(sound[kind], file)) == []


@pytest.mark.parametrize("base", [None, {}, {"architecture": "Other"}, "gone"])
def test_another_base_in_our_file_is_refused(base: Any, sound: dict[str, Path], tmp_path: Path):
    shutil.copytree(sound["whole"], tmp_path / "copy")
    ours = json.loads((tmp_path / "copy" / OURS).read_text()) | {"base": base}
    if base == "gone":
        del ours["base"]
    (tmp_path / "copy" / OURS).write_text(json.dumps(ours))
    with pytest.raises(AdapterFileError, match="another base"):
        gs.Adapter.load(tmp_path / "copy")


def test_a_description_of_another_adapter_is_refused(sound: dict[str, Path], toy: Toys, tmp_path: Path):
    other = trained(toy("llama"), SPEC, seed=1).save(tmp_path / "other")
    shutil.copytree(sound["whole"], tmp_path / "copy")
    shutil.copy(other / OURS, tmp_path / "copy" / OURS)
    with pytest.raises(AdapterFileError, match="not the ones that were written"):
        gs.Adapter.load(tmp_path / "copy")


def test_without_its_description_an_adapter_still_knows_its_base(sound: dict[str, Path], toy: Toys):
    other = toy("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with pytest.raises(BaseMismatchError):
        gs.attach(other, gs.Adapter.load(sound["bare"]))


def test_a_config_that_was_changed_is_said_and_taken(sound: dict[str, Path], tmp_path: Path):
    shutil.copytree(sound["bare"], tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / CONFIG).read_text())
    (tmp_path / "copy" / CONFIG).write_text(json.dumps(config | {"lora_alpha": 60, "task_type": "CAUSAL_LM"}))
    with pytest.warns(UserWarning, match="not what it said"):
        assert gs.Adapter.load(tmp_path / "copy").spec.alpha == 60  # pyright: ignore[reportAttributeAccessIssue]


def test_a_file_from_before_there_were_seals(sound: dict[str, Path], tmp_path: Path):
    """The digest still holds spec and tensors; of the base it has nothing but `gossamer.json`'s own word."""
    shutil.copytree(sound["whole"], tmp_path / "copy")
    save_file(load_file(tmp_path / "copy" / WEIGHTS), tmp_path / "copy" / WEIGHTS, {"format": "pt"})
    assert gs.Adapter.load(tmp_path / "copy") == gs.Adapter.load(sound["whole"])
    as_peft_writes(tmp_path / "copy")
    assert gs.Adapter.load(tmp_path / "copy").base is None


def test_a_name_that_stands_twice_in_the_weights_is_refused(sound: dict[str, Path], tmp_path: Path):
    shutil.copytree(sound["bare"], tmp_path / "copy")
    data = (tmp_path / "copy" / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    name = next(name for name in header if name != "__metadata__")
    text = (json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}").encode()
    (tmp_path / "copy" / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(AdapterFileError):
        gs.Adapter.load(tmp_path / "copy")
