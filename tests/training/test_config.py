"""Configs: what a YAML file and its flags say, and everything that is wrong with them at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.errors import SpecError
from gossamer.methods import METHODS, LoRA
from gossamer.peers import OURS
from gossamer.quant import FORMATS
from gossamer.training import LoopConfig, RunConfig, TrainConfig
from gossamer.training.config import DataFiles

GOOD = """\
base: smollm2-135m
method: {name: lora, r: 8, alpha: 16, target_modules: all-linear}
task: sft
data: {train: reviews/train.jsonl, eval: reviews/eval.jsonl}
train: {epochs: 1, batch_size: 8, lr: auto, seed: 0}
output: runs/demo
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def faults_of(path: Path, *flags: str) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        RunConfig.read(path, flags)
    return caught.value.faults


def test_the_design_s_example(tmp_path: Path) -> None:
    config = RunConfig.read(write(tmp_path, GOOD))
    assert config.method == LoRA(r=8, alpha=16.0)
    assert config == TrainConfig(
        base="smollm2-135m", method=LoRA(r=8, alpha=16.0),
        data={"train": "reviews/train.jsonl", "eval": "reviews/eval.jsonl"},
        epochs=1, batch_size=8, lr="auto", seed=0, task="sft", output="runs/demo",
    )  # fmt: skip
    assert config.train == LoopConfig(epochs=1, batch_size=8, lr="auto", seed=0)


@pytest.mark.parametrize(
    "flags", [[], ["--train.warmup", "10", "--train.clip", "null", "--method.rank_pattern", "{q_proj: 4}"]]
)
def test_the_resolved_config_reloads_to_the_same_value(tmp_path: Path, flags: list[str]) -> None:
    config = RunConfig.read(write(tmp_path, GOOD), flags)
    again = RunConfig.read(write(tmp_path, config.to_yaml()))
    assert again == config
    assert again.to_yaml() == config.to_yaml()


def test_flags_override_the_file(tmp_path: Path) -> None:
    flags = [
        "--train.lr",
        "2e-4",
        "--method.r=16",
        "--data.eval",
        "null",
        "--train.max-steps",
        "5",
        "--method.target_modules",
        "[q_proj]",
    ]
    config = RunConfig.read(write(tmp_path, GOOD), flags)
    assert config.train.lr == 2e-4
    assert config.train.max_steps == 5
    assert config.data.eval is None
    assert config.method == LoRA(r=16, alpha=16.0, target_modules=("q_proj",))


def test_all_faults_at_once_with_their_places(tmp_path: Path) -> None:
    text = """\
bse: smollm2-135m
method: {name: lora, rr: 8, alpha: 16}
task: stf
data: reviews.jsonl
train:
  epoch: 1
  batch_size: 0
  lr: fast
output: runs/x
"""
    path = write(tmp_path, text)
    faults = "\n".join(faults_of(path, "--train.seed", "-1", "--train.shedule", "cosine"))
    for place, words in [
        (f"{path}:1:1", "did you mean 'base'"),
        (f"{path}:2:22", "rr: unknown key"),
        (f"{path}:3:1", "'sft' or 'classify'"),
        (f"{path}:6:3", "did you mean 'epochs'"),
        (f"{path}:7:3", "greater than or equal to 1"),
        (f"{path}:8:3", "a number above 0, or auto"),
        ("--train.seed", "greater than or equal to 0"),
        ("--train.shedule", "did you mean 'schedule'"),
    ]:
        assert any(line.startswith(f"{place}: ") and words in line for line in faults.splitlines()), (
            place,
            words,
            faults,
        )
    assert "base: required, but missing" in faults


def test_an_unknown_method_suggests_the_nearest_and_hides_no_other_fault(tmp_path: Path) -> None:
    faults = "\n".join(faults_of(write(tmp_path, GOOD.replace("name: lora", "name: lra").replace("epochs", "epoks"))))
    assert "did you mean 'lora'" in faults
    assert "did you mean 'epochs'" in faults


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.lr"], "--train.lr: has no value"),
        (["--train.lr", "--train.seed", "1"], "--train.lr: has no value"),
        (["train.lr", "1"], "train.lr: not a flag"),
        (["--train.lr", "[1"], "not a YAML value"),
        (["--base.name", "x"], "--base.name: base is 'smollm2-135m' in the file, not a mapping"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be_read(tmp_path: Path, flags: list[str], words: str) -> None:
    assert any(words in fault for fault in faults_of(write(tmp_path, GOOD), *flags))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_steps": 10, "warmup": 10.0}, "takes all of the max_steps"),
        ({"warmup": 2.5}, "whole number of steps"),
        ({"eval_every": 5}, "no eval file"),
        ({"lr": float("nan")}, "a number above 0"),
        ({"lr": True}, "a number above 0"),
        ({"epochs": 1.5}, "valid integer"),
        ({"clip": 0.0}, "greater than 0"),
    ],
)
def test_contradictions_and_ranges(fields: dict, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        TrainConfig(data="rows.jsonl", output="runs/x", **fields)


def test_eval_every_needs_eval_data_in_a_file_too(tmp_path: Path) -> None:
    text = GOOD.replace(", eval: reviews/eval.jsonl", "").replace("seed: 0", "eval_every: 3")
    path = write(tmp_path, text)
    assert faults_of(path)[0].startswith(f"{path}:5:1: train: eval_every is set, but data has no eval file")


@pytest.mark.parametrize("word", ["on", "off", "auto", "true", "false"])
def test_a_switch_is_a_word_or_what_yaml_makes_of_it(tmp_path: Path, word: str) -> None:
    config = RunConfig.read(write(tmp_path, GOOD.replace("seed: 0", f"checkpointing: {word}")))
    assert config.train.checkpointing == {"true": "on", "false": "off"}.get(word, word)
    assert RunConfig.read(write(tmp_path, config.to_yaml())) == config


def test_every_way_to_hold_the_base_can_be_asked_for() -> None:
    for quant in (None, *FORMATS):
        assert RunConfig(base="b", data="d", output="o", quant=quant).quant == quant
    with pytest.raises(SpecError, match="nf4-single"):
        RunConfig(base="b", data="d", output="o", quant="nf5")


def test_the_loop_s_settings_are_read_where_they_are_given() -> None:
    config = TrainConfig(data="a.jsonl", output="runs/a", lr=1e-3, batch_size=4)
    assert (config.lr, config.batch_size, config.seed) == (config.train.lr, 4, 0) == (1e-3, 4, 0)
    with pytest.raises(AttributeError, match="learning_rate"):
        _ = config.learning_rate


def test_a_path_alone_is_training_data() -> None:
    config = TrainConfig(data=Path("a") / "rows.jsonl", output=Path("runs") / "x")
    assert (config.data.train, config.data.eval, config.output) == ("a/rows.jsonl", None, "runs/x")
    assert (config.base, config.train) == (None, LoopConfig())
    changed = config.replace(lr=1e-3, seed=3)
    assert changed.replace(seed=0) == config.replace(train=LoopConfig(lr=1e-3))
    assert RunConfig.from_dict(changed.to_dict()) == changed


# Other tools' names ---------------------------------------------------------------------------------------------------


def _accepts(setting: str) -> bool:
    """Whether a run's config has a place by this name, and takes the value that may stand behind it."""
    place, _, value = setting.partition(": ")
    outer, _, inner = place.rpartition(".")
    spec = {"": RunConfig, "train": LoopConfig, "data": DataFiles, "method": LoRA}[outer]
    if (outer, inner) == ("method", "name"):
        return not value or value in METHODS
    if value and inner in spec.model_fields:
        fields = {inner: value} if outer else {"base": "b", "data": "d", "output": "o", inner: value}
        spec.from_dict(fields)
    return inner in spec.model_fields


@pytest.mark.parametrize("peer", OURS)
def test_a_key_of_another_tool_leads_to_ours(peer: str) -> None:
    """Wherever it is written in the config; and what it leads to exists."""
    ours, rooms = OURS[peer], {"": RunConfig, "train": LoopConfig, "data": DataFiles, "method": LoRA}
    assert _accepts(ours)
    for room, spec in rooms.items():
        if peer in spec.model_fields:
            continue
        there = {room: {peer: 1}} if room else {peer: 1}
        with pytest.raises(SpecError) as caught:
            RunConfig.from_dict({"base": "b", "data": {"train": "d"}, "output": "o"} | there)
        own = ours.rpartition(".")[2]
        hints = [fault for fault in caught.value.faults if f"{peer}: unknown key" in fault]
        assert hints
        assert all(f"did you mean {ours!r}?" in one or f"did you mean {own!r}?" in one for one in hints)


@pytest.mark.parametrize("name", [*LoopConfig.model_fields, *sorted({*DataFiles.model_fields} - {"train"})])
def test_a_setting_on_the_wrong_level_is_led_to_its_own(name: str) -> None:
    room = "train" if name in LoopConfig.model_fields else "data"
    with pytest.raises(SpecError) as caught:
        RunConfig.from_dict({"base": "b", "data": "d", "output": "o", name: 1})
    assert f"{name}: unknown key; did you mean '{room}.{name}'?" in caught.value.faults


def test_a_key_of_another_tool_is_not_taken_for_one_spelt_alike() -> None:
    """A spec that has no place for it gives no hint at all."""
    with pytest.raises(SpecError) as caught:
        LoRA(learning_rate=1e-4)  # pyright: ignore[reportCallIssue]
    assert caught.value.faults == ("learning_rate: unknown key",)
