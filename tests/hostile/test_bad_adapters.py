"""Damaged adapters: refused with one of our errors, or harmless to the last bit; never silently another model."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer as gs
from gossamer.errors import AdapterFileError, GossamerError, UnsupportedError
from gossamer.methods import METHODS, TargetedMethod
from tests.adapters import as_peft_writes, tokens, trained
from tests.conformance.oracle import Toys
from tests.hostile import mutants
from tests.hostile.mutants import CONFIG, NUMERIC, OURS, STRUCTURAL, WEIGHTS, WRONG_FIELDS

MUTANTS = 200
"""Of each kind of adapter; ten times as many in the slow test."""


@pytest.fixture(scope="module")
def sound(toy: Toys, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter as we write it, and the same as PEFT would: without our file."""
    root = tmp_path_factory.mktemp("sound")
    value = trained(toy("llama"), gs.LoRA(r=2, alpha=4.0, target_modules=("q_proj", "v_proj")))
    ours, foreign = value.save(root / "ours"), value.save(root / "foreign")
    as_peft_writes(foreign)
    return {"ours": ours, "foreign": foreign}


class Model:
    """A toy and what the sound adapter makes of it."""

    def __init__(self, toy: Toys, folder: Path, name: str = "llama") -> None:
        self.bare = toy(name)
        self.expected = self.outcome(folder)

    @torch.no_grad()
    def outcome(self, folder: Path) -> torch.Tensor:
        """Logits with the adapter of a folder attached; the model is bare again afterwards."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*PEFT's defaults are taken")
            value = gs.Adapter.load(folder)
        gs.attach(self.bare, value)
        try:
            return self.bare(tokens(1, 5)).logits
        finally:
            gs.detach(self.bare)


@pytest.fixture(scope="module")
def model(toy: Toys, sound: dict[str, Path]) -> Model:
    return Model(toy, sound["ours"])


def verdict(model: Model, folder: Path) -> str:
    """ "refused", "harmless", "told" (a warning says what was assumed), or what went wrong."""
    try:
        logits = model.outcome(folder)
    except UserWarning:
        return "told"
    except GossamerError as error:
        return "refused" if error.exit_code in (2, 3) else f"exit code {error.exit_code}: {error.what}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "harmless" if torch.equal(logits, model.expected) else "ANOTHER MODEL"


def judge(count: int, kind: str, sound: dict[str, Path], model: Model, folder: Path, least: float = 0.9) -> None:
    """Every mutator in turn, each time with other draws; at least that part of them must have been refused."""
    mutators = STRUCTURAL + (NUMERIC if kind == "ours" else ())
    wrong, refused = [], 0
    for seed in range(count):
        shutil.copytree(sound[kind], folder, dirs_exist_ok=True)
        done = mutators[seed % len(mutators)](folder, random.Random(f"{kind} {seed}"))
        found = verdict(model, folder)
        refused += found == "refused"
        if found not in ("refused", "harmless", "told"):
            wrong.append(f"{seed} {done}: {found}")
    assert not wrong, "\n".join(wrong)
    assert refused > least * count, "the mutators do damage"


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_mutants(kind: str, sound: dict[str, Path], model: Model, tmp_path: Path):
    judge(MUTANTS, kind, sound, model, tmp_path / "mutant")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_many_mutants(kind: str, sound: dict[str, Path], model: Model, tmp_path: Path):
    judge(10 * MUTANTS, kind, sound, model, tmp_path / "mutant")


LAYOUTS: dict[str, tuple[str, TargetedMethod]] = {
    "dora": ("llama", gs.DoRA(r=2, target_modules=("q_proj", "v_proj"), modules_to_save=("norm",))),
    "a start": ("llama", gs.LoRA(r=2, start="pissa", target_modules=("q_proj", "v_proj"))),
    "embedding": ("llama", gs.LoRA(r=2, target_modules=("embed_tokens", "q_proj"))),
    "tokens": ("llama", gs.LoRA(r=2, target_modules=("q_proj",), trainable_tokens=(1, 2, 3))),
    "experts": ("mixtral", gs.LoRA(r=2, target_modules=("q_proj",), target_parameters=("gate_up_proj", "down_proj"))),
    "ia3": ("llama", METHODS["ia3"](target_modules=("v_proj", "down_proj"))),
    "vera": ("llama", METHODS["vera"](r=3, target_modules=("q_proj", "v_proj"))),
    "norms": ("llama", METHODS["norm"]()),
    "prefix": ("llama", METHODS["prefix"](num_virtual_tokens=3)),
    "houlsby": ("llama", METHODS["houlsby"](bottleneck=3)),
}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [(layout, kind) for layout in LAYOUTS for kind in ("ours", "foreign") if (layout, kind) != ("houlsby", "foreign")],
)
def test_mutants_of_every_layout(layout: str, kind: str, toy: Toys, tmp_path: Path):
    name, spec = LAYOUTS[layout]
    folder = trained(toy(name), spec).save(tmp_path / "sound")
    model = Model(toy, folder, name)
    if kind == "foreign":
        as_peft_writes(folder)
        model.expected = model.outcome(folder)
    judge(MUTANTS // 4, kind, {kind: folder}, model, tmp_path / "mutant", least=0.6)


@pytest.mark.parametrize("kind", ["ours", "foreign"])
@pytest.mark.parametrize(("key", "value"), [(key, value) for key in WRONG_FIELDS for value in WRONG_FIELDS[key]])
def test_every_wrong_field(key: str, value: Any, kind: str, sound: dict[str, Path], model: Model, tmp_path: Path):
    folder = Path(shutil.copytree(sound[kind], tmp_path / "mutant"))
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {key: value}))
    assert verdict(model, folder) == "refused"


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, OURS])
def test_truncated_anywhere(file: str, sound: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(sound["ours"], tmp_path / "mutant"))
    data = (folder / file).read_bytes().rstrip() if file != WEIGHTS else (folder / file).read_bytes()
    positions = {*range(64), *range(64, len(data), max(1, len(data) // 150)), len(data) - 1}
    for kept in sorted(positions):
        (folder / file).write_bytes(data[:kept])
        with pytest.raises(AdapterFileError):
            gs.Adapter.load(folder)


def test_every_flipped_bit_of_the_numbers_is_seen(sound: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(sound["ours"], tmp_path / "mutant"))
    data = (folder / WEIGHTS).read_bytes()
    start, draw = mutants.header_size(data), random.Random(0)
    for position in {start, len(data) - 1, *(draw.randrange(start, len(data)) for _ in range(200))}:
        bit = draw.randrange(8)
        mutants.flip(folder / WEIGHTS, position, bit)
        with pytest.raises(AdapterFileError, match=r"finite numbers|not the ones that were written"):
            gs.Adapter.load(folder)
        mutants.flip(folder / WEIGHTS, position, bit)
    gs.Adapter.load(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alfa": 64}, "did you mean 'lora_alpha'"),
        ({"use_rslora": "yes"}, "use_rslora='yes'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"r": 3}, "rank 3"),
        ({"r": "8"}, "r: Input should be a valid integer"),
    ],
)
def test_the_message_names_file_and_field(change: dict[str, Any], text: str, sound: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(sound["foreign"], tmp_path / "mutant"))
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(GossamerError) as caught:
        gs.Adapter.load(folder)
    assert text in str(caught.value)
    assert str(folder) in caught.value.where


def test_a_config_changed_by_hand_is_seen(sound: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(sound["ours"], tmp_path / "mutant"))
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": 64}))
    with pytest.raises(AdapterFileError, match="lora_alpha=64") as caught:
        gs.Adapter.load(folder)
    assert OURS in caught.value.hint


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_opened(sound: dict[str, Path], tmp_path: Path):
    folder, canary = Path(shutil.copytree(sound["foreign"], tmp_path / "mutant")), tmp_path / "canary"
    payload = pickle.dumps(Canary(canary))
    (folder / "adapter_model.bin").write_bytes(payload)
    gs.Adapter.load(folder)  # beside safetensors it is ignored
    (folder / WEIGHTS).write_bytes(payload)
    with pytest.raises(AdapterFileError):
        gs.Adapter.load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UnsupportedError, match="pickle"):
        gs.Adapter.load(folder)
    assert not canary.exists()
    pickle.loads(payload)
    assert canary.exists(), "the canary sings"


class Blocked(BaseException):
    """Not an OSError, which a reader might handle."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `Blocked` when the block takes longer."""

    def stop(*_: object) -> None:
        raise Blocked

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, OURS])
def test_a_pipe_does_not_block(file: str, sound: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(sound["ours"], tmp_path / "mutant"))
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(AdapterFileError), within(1):
        gs.Adapter.load(folder)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_links(file: str, sound: dict[str, Path], tmp_path: Path):
    """The hub's cache is made of links, so links to files are followed; broken and circular ones are refused."""
    folder, blob = Path(shutil.copytree(sound["ours"], tmp_path / "mutant")), tmp_path / "blob"
    (folder / file).rename(blob)
    (folder / file).symlink_to(blob)
    gs.Adapter.load(folder)
    blob.unlink()
    with pytest.raises(AdapterFileError):
        gs.Adapter.load(folder)
    (folder / file).unlink()
    (folder / file).symlink_to(folder / file)
    with pytest.raises(AdapterFileError):
        gs.Adapter.load(folder)
    (folder / file).unlink()
    (folder / file).mkdir()
    with pytest.raises(AdapterFileError):
        gs.Adapter.load(folder)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "..\n", "absent/../absent"])
def test_strange_folders(name: str, tmp_path: Path):
    with pytest.raises(GossamerError):
        gs.Adapter.load(f"{tmp_path}/{name}")


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F4", "F8_E8M0", "U16", "BOOL", "X9"])
def test_number_formats_that_no_adapter_has(kind: str, sound: dict[str, Path], model: Model, tmp_path: Path):
    folder = Path(shutil.copytree(sound["foreign"], tmp_path / "mutant"))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    header = json.dumps({name: {"dtype": kind, "shape": [2, 64], "data_offsets": [0, 128]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(128))
    assert verdict(model, folder) == "refused"


def test_what_fits_no_module_of_this_model_is_named(sound: dict[str, Path], toy: Toys):
    with pytest.raises(GossamerError) as caught:
        gs.attach(toy("gpt2"), gs.Adapter.load(sound["foreign"]))
    assert caught.value.exit_code in (2, 3)
    assert "q_proj" in str(caught.value)
