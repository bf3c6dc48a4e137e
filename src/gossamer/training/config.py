"""The settings of a run: the loop's (`LoopConfig`), where its rows come from (`DataFiles`), all of it (`RunConfig`).

A config is checked once, when it is made, so that nothing heavy starts on a wrong one. A file's faults and those of the
flags that override it are reported together, each with its line or its flag.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    InstanceOf,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML, YAMLError

from gossamer.catalog.catalog import data_file
from gossamer.data.formats import Rows, read_data
from gossamer.errors import SpecError, UsageError
from gossamer.methods import LoRA, TargetedMethod, method_from_dict
from gossamer.spec import Lines, Spec, StrictBool, StrictFloat, StrictInt, StrictStr, nested, read_yaml, write_yaml
from gossamer.training.tasks import DEFAULT, Task, task_of

AtLeastOne = Annotated[StrictInt, Field(ge=1)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _as_day(value: Any) -> Any:
    """YAML reads a bare 2026-12-31 as a date."""
    try:
        return date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise PydanticCustomError("date", "must be a day such as 2026-12-31") from None


def _positive_or_auto(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and value > 0):
        return value
    raise PydanticCustomError("learning_rate", "must be a number above 0, or auto")


def _as_task(value: Any) -> Any:
    try:
        return task_of(value)
    except SpecError as error:
        fault = "; ".join(error.faults)
    except UsageError as error:
        fault = f"must be {error.expected}" + (f"; {error.hint}" if error.hint else "")
    raise PydanticCustomError("task", "{fault}", {"fault": fault})


def _as_switch(value: Any) -> Any:
    """Many YAML readers take a bare `on` for true."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


File = Annotated[StrictStr, Field(min_length=1), BeforeValidator(_as_text)]
Switch = Annotated[Literal["off", "on", "auto"], BeforeValidator(_as_switch)]
TaskByName = Annotated[InstanceOf[Task], BeforeValidator(_as_task), PlainSerializer(Task.named)]
LearningRate = Annotated[StrictFloat | Literal["auto"], BeforeValidator(_positive_or_auto)]


RowSource = Annotated[
    File | InstanceOf[Rows],
    PlainSerializer(lambda source: source.source if isinstance(source, Rows) else source, return_type=str),
    WithJsonSchema({"type": "string", "minLength": 1}),
]


class DataFiles(Spec):
    """Where the rows come from."""

    train: RowSource
    """A .jsonl, .json, .csv or .parquet file; from Python also rows or records in memory, or a `datasets.Dataset`."""
    eval: RowSource | None = None
    """Held-out rows, looked at before and after training; None evaluates nothing."""
    format: StrictStr | None = None
    """messages, sharegpt, alpaca, prompt-completion or text; found by the columns when None."""
    chat_template: StrictBool = True
    """Whether chats go through the tokenizer's own template, if it has one."""
    date: Annotated[StrictStr, BeforeValidator(_as_day)] | None = None
    """The day that a chat template is told which writes today's date; the day the run began when None."""

    @model_validator(mode="before")
    @classmethod
    def _read_what_is_in_memory(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        return {
            name: read_data(value, format=fields.get("format"))
            if name in ("train", "eval") and _holds(value)
            else value
            for name, value in fields.items()
        }

    def read(self) -> tuple[Rows, Rows | None]:
        """The rows to learn from, and the held-out ones. Raises `DataError`."""
        return self._rows(self.train), None if self.eval is None else self._rows(self.eval)

    def _rows(self, source: str | Rows) -> Rows:
        """A file's place may also be one in a fetched entry of the catalog: `reviews/train.jsonl`."""
        return source if isinstance(source, Rows) else read_data(data_file(source), format=self.format)


def _holds(value: Any) -> bool:
    """Whether it is rows, and not where they are."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Rows | Spec)


def _as_files(value: Any) -> Any:
    return {"train": value} if isinstance(value, str | os.PathLike | Rows) or _holds(value) else value


Data = Annotated[DataFiles, BeforeValidator(_as_files, json_schema_input_type=str | DataFiles)]


class LoopConfig(Spec):
    """The settings of the training loop."""

    epochs: AtLeastOne | None = None
    """Passes over the data. None means one, or as many as `max_steps` needs."""
    max_steps: AtLeastOne | None = None
    """Stop after this many optimiser steps, if `epochs` has not ended the run before."""
    batch_size: AtLeastOne = 8
    """Rows that go through the model at once."""
    accumulation: AtLeastOne = 1
    """Batches whose gradients make one step; the loss is the mean over all their supervised tokens."""
    batch_tokens: AtLeastOne | None = None
    """Fill each batch with rows up to so many tokens, whatever their number; None counts rows."""
    packing: StrictBool = True
    """Put the rows of a batch one after another instead of padding them, where the model is known to keep them apart;
    the maths is the same. What all rows of a batch begin with is computed once."""
    micro_batch_tokens: AtLeastOne = 8192
    """Tokens that go through the model at once; a larger batch is split into parts that make the same step."""
    checkpointing: Switch = "auto"
    """Gradient checkpointing: blocks run again in the backward instead of keeping what is inside them. auto turns it on
    only when the plan says that a step would not fit into the device's free memory."""
    shard: Literal["none", "machine", "all"] = "none"
    """Of several processes: keep the base whole in each, or spread its weights over those of a machine, or over all."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """adamw keeps its moments in float32; the others, from bitsandbytes and for CUDA alone, in 8 bits, and paged in
    memory that can leave the card. Without CUDA a run uses adamw, and says so."""
    lr: LearningRate = "auto"
    """Peak learning rate, or auto: `5e-4 * (2000 / hidden size) ** p` for LoRA, and for another method as
    many times that as its page says."""
    lr_ratio: Annotated[StrictFloat, Field(gt=0)] = 1.0
    """LoRA+: learning rate of B over that of A; 1 is plain LoRA, 16 what the paper found to serve hard tasks."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes from its peak to zero."""
    warmup: Annotated[StrictFloat, Field(ge=0)] = 0.03
    """Steps on which the learning rate rises to its peak: below 1 a share of all steps, from 1 on a number of them."""
    weight_decay: Annotated[StrictFloat, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay, towards no change: factors are pulled to zero, scales such as IA3's to one, and
    parameters that are trained whole to the base's own values."""
    clip: Annotated[StrictFloat, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; None leaves it as it is."""
    seed: Seed = 0
    """Of the batches' order and of dropout."""
    max_length: Annotated[StrictInt, Field(ge=2)] = 1024
    """Longest row in tokens."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What becomes of longer rows; truncate leaves out a chat's earliest turns, or takes from the left of a prompt,
    and never shortens an answer."""
    eval_every: AtLeastOne | None = None
    """Steps between evaluations during training, besides the ones before and after it."""
    patience: AtLeastOne | None = None
    """Stop once so many evaluations in a row were no better than the best, by held-out loss, and end with the factors
    of the best; None trains to the end."""
    eval_batch_size: AtLeastOne = 16
    """Rows that are evaluated at once."""
    checkpoint_every: AtLeastOne = 100
    """Steps between checkpoints."""
    keep_checkpoints: AtLeastOne = 2
    """How many of the newest checkpoints stay on disk."""
    log_every: AtLeastOne = 1
    """Steps between lines of metrics.jsonl."""

    @field_validator("warmup")
    @classmethod
    def _warmup_ends(cls, warmup: float, info: ValidationInfo) -> float:
        steps = info.data.get("max_steps")
        if warmup >= 1 and steps is not None and warmup >= steps:
            raise PydanticCustomError("contradiction", "the warm-up takes all of the max_steps")
        if warmup > 1 and warmup != int(warmup):
            raise PydanticCustomError("warmup", "must be a share below 1 or a whole number of steps")
        return warmup

    @field_validator("patience")
    @classmethod
    def _patience_looks(cls, patience: int | None, info: ValidationInfo) -> int | None:
        if patience is not None and info.data.get("eval_every") is None:
            raise PydanticCustomError("contradiction", "patience needs eval_every, how often to look")
        return patience


def _as_method(value: Any, info: ValidationInfo) -> Any:
    """A mapping with a name becomes the method that it names; its faults join the others."""
    if isinstance(value, TargetedMethod):
        return value
    if not isinstance(value, Mapping):
        raise PydanticCustomError("method", "must be a mapping such as {{name: lora, r: 8}}")
    try:
        return method_from_dict(value, lines=(info.context or {}).get("lines"), at=("method",))
    except SpecError as error:
        raise nested(error) from None


class RunConfig(Spec):
    """A whole run, as a YAML file describes it; without a base, what `train` needs besides a model.

    From Python the loop's settings may stand among the others, and the class is `TrainConfig` too:
    `TrainConfig(data="sql.jsonl", lr=1e-3, output="runs/sql")`.
    """

    base: File | None = None
    """Catalog name, Hugging Face id, folder or .gguf file; a file must name it. None takes base, dtype, quant, device
    and method of the model that is given to `train`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base; adapters are float32 always."""
    quant: Literal["nf4", "nf4-single", "fp4", "fp4-single", "int8"] | None = None
    """How the frozen linear weights are held: 4-bit NormalFloat or 4-bit floats, with their scales quantised too or not
    (single), or 8-bit integers; None as they come."""
    device: Annotated[StrictStr, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """auto, cpu, mps, cuda or cuda:N."""
    method: Annotated[TargetedMethod, BeforeValidator(_as_method, json_schema_input_type=dict[str, Any])] = LoRA()
    """What is trained; see docs/methods."""
    task: TaskByName = DEFAULT
    """What is learned and measured: sft, classify, or a mapping of a name and options."""
    data: Data
    """A file to train on, or `{train: file, eval: file}`."""
    train: LoopConfig = LoopConfig()
    """The loop."""
    output: File
    """The run folder; it must be new or empty, unless a run is resumed."""

    if TYPE_CHECKING:

        def __init__(self, *, data: Any, output: str | os.PathLike[str], **settings: Any) -> None:
            """What `given` takes."""

    else:

        def __getattr__(self, name: str) -> Any:
            """The loop's settings, read as they may be given: `config.lr` is `config.train.lr`."""
            return getattr(self.train, name) if name in LoopConfig.model_fields else super().__getattr__(name)

    @classmethod
    def given(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Keywords that are the loop's settings belong into `train`."""
        loop = {name: fields[name] for name in fields if name in LoopConfig.model_fields}
        if not loop:
            return fields
        train = fields.get("train", {})
        train = (
            train if isinstance(train, Mapping) else {name: getattr(train, name) for name in LoopConfig.model_fields}
        )
        return {name: value for name, value in fields.items() if name not in loop} | {"train": {**train, **loop}}

    @field_validator("train")
    @classmethod
    def _data_to_evaluate(cls, train: LoopConfig, info: ValidationInfo) -> LoopConfig:
        if train.eval_every is not None and "data" in info.data and info.data["data"].eval is None:
            raise PydanticCustomError("contradiction", "eval_every is set, but data has no eval file")
        return train

    @field_serializer("method")
    def _named(self, method: TargetedMethod) -> dict[str, Any]:
        return method.to_dict()

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
        """Read a YAML file and the flags that override it.

        Args:
            path: the file.
            overrides: flags as a shell gives them: `["--train.lr", "2e-4", "--method.r=16"]`; values are YAML.

        Raises `SpecError` with all faults at once, each with `file:line:column` or its flag.
        """
        return Draft.read(path, overrides).config()

    def named_base(self) -> str:
        """The base. Raises `UsageError` where none is named."""
        if self.base is None:
            raise UsageError("the config names no base", hint="base: a catalog name, an id, a folder or a .gguf file")
        return self.base

    def on_day(self, day: str | None) -> RunConfig:
        """The config with the day that the chat template writes, if any, so that a resumed run writes it again."""
        return self if day is None else self.model_copy(update={"data": self.data.model_copy(update={"date": day})})

    def to_yaml(self) -> str:
        """YAML text of every setting, defaults included; `read` gives the same value back."""
        return write_yaml(self.to_dict())


TrainConfig = RunConfig

SPLITS_ON_RESUME = frozenset({"micro_batch_tokens", "packing", "eval_batch_size"})
"""Settings that say how a step goes through the model: a resumed run may have others, and then ends the same but for
rounding. All others that are free leave every bit as it is."""
FREE_ON_RESUME = SPLITS_ON_RESUME | {
    "output", "data", "checkpointing", "shard", "log_every", "checkpoint_every", "keep_checkpoints"
}  # fmt: skip
"""Settings that a resumed run may change. What was read from `data` counts by its content; `eval_every` is free too
where there is no patience, which ends the run by what was seen then."""
FIXED_ON_RESUME = frozenset({
    "epochs", "max_steps", "batch_size", "accumulation", "batch_tokens", "optimizer", "lr", "lr_ratio", "schedule",
    "warmup", "weight_decay", "clip", "seed", "max_length", "overlong", "eval_every", "patience", "task",
})  # fmt: skip
"""Settings with another value of which it would be another run."""


@dataclass(frozen=True)
class Draft:
    """A config file with what overrides it, not validated yet: variants are made of it."""

    path: str
    fields: Mapping[str, Any]
    lines: Lines
    """Where each key stands: in the file, at a flag, or wherever else it was put from."""
    faults: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Draft:
        """Read a YAML file and flags; see `RunConfig.read`. Raises `SpecError` for what is not YAML."""
        fields, lines = read_yaml(path)
        flags, faults = _parse_flags(overrides)
        draft = cls(str(path), fields, lines, tuple(faults))
        for keys, value in flags.items():
            draft = draft.put(keys, value, f"--{'.'.join(keys)}")
        return draft

    def put(self, keys: tuple[str, ...], value: Any, place: str) -> Draft:
        """The draft with one key's value changed; faults about it will name `place`."""
        fields, faults = deepcopy({**self.fields}), self.faults
        inner: Any = fields
        for depth, key in enumerate(keys[:-1], start=1):
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                fault = f"{place}: {'.'.join(keys[:depth])} is {inner!r} in the file, not a mapping"
                return replace(self, faults=(*faults, fault))
        inner[keys[-1]] = value
        return replace(self, fields=fields, lines=self.lines.put(keys, place))

    def config(self) -> RunConfig:
        """The config. Raises `SpecError` with all faults at once, those of the flags among them."""
        base = (
            [] if self.fields.get("base") is not None else [f"{self.lines.at(('base',))}: base: required, but missing"]
        )
        faults = [*self.faults, *base]
        try:
            config = RunConfig.from_dict(self.fields, where=self.path, lines=self.lines)
        except SpecError as error:
            raise SpecError(f"{self.path} is not valid", faults=[*faults, *error.faults]) from None
        if faults:
            raise SpecError("flags that cannot be used" if not base else f"{self.path} is not valid", faults=faults)
        return config


def _parse_flags(arguments: Sequence[str]) -> tuple[dict[tuple[str, ...], Any], list[str]]:
    """`["--a.b", "1", "--c=2"]` -> {("a", "b"): 1, ("c",): 2}, and what could not be read."""
    flags: dict[tuple[str, ...], Any] = {}
    faults: list[str] = []
    waiting = list(arguments)
    while waiting:
        flag, equals, text = waiting.pop(0).partition("=")
        if not flag.startswith("--") or not flag[2:]:
            faults.append(f"{flag}: not a flag; expected one such as --train.lr 2e-4")
            continue
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                faults.append(f"{flag}: has no value")
                continue
            text = waiting.pop(0)
        try:
            flags[tuple(flag[2:].replace("-", "_").split("."))] = YAML(typ="safe", pure=True).load(text)
        except YAMLError:
            faults.append(f"{flag}: {text!r} is not a YAML value")
    return flags, faults
