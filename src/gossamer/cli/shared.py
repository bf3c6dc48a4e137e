"""What the verbs have in common: options, tables, JSON."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import click

from gossamer.errors import UsageError

if TYPE_CHECKING:
    from gossamer.adapter import Adapter

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout and nothing else.")
force_option = click.option("--force-base", is_flag=True, help="Use the adapter though it was made for another base.")

dtype_option = click.option("--dtype", default="auto", show_default=True, help="auto, bf16, fp16 or fp32.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")


class ListedWeights(click.Command):
    """Takes `--weights 0.7 0.3`: every weight after the option is one of its values."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the option's name before each of its values, as click wants it."""
        spread: list[str] = []
        listing = False
        for word in args:
            listing = word == "--weights" or (listing and _is_weight(word))
            if word != "--weights":
                spread.append(f"--weights={word}" if listing else word)
        return super().parse_args(ctx, spread)


class WeightType(click.ParamType):
    """A number, or numbers by module: `PATTERN=NUMBER;PATTERN=NUMBER`."""

    name = "weight"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | dict[str, float]:
        """0.7, or {"self_attn": 1.0, ".*": 0.2}."""
        try:
            return _weight(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor PATTERN=NUMBER;PATTERN=NUMBER", param, ctx)


def _weight(word: str) -> float | dict[str, float]:
    if "=" not in word:
        return float(word)
    pairs = [part.rpartition("=") for part in word.split(";")]
    return {pattern: float(number) for pattern, _, number in pairs}


def _is_weight(word: str) -> bool:
    try:
        _weight(word)
    except ValueError:
        return False
    return not word.startswith("--")


_BASE = "Catalog name, Hugging Face id, folder or .gguf file"
_loading = (
    click.option("--quant", help="Hold linear weights as nf4, nf4-single, fp4, fp4-single or int8."),
    dtype_option,
    device_option,
)


def base_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every verb that loads a base: --base, --quant, --dtype, --device."""
    return _with(function, click.option("--base", required=True, metavar="B", help=f"{_BASE}."), *_loading)


def adapter_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Those of a verb that loads a base with an adapter, which may name the base."""
    about = f"{_BASE}; without it the one that the adapter's run names."
    named = click.option("--base", metavar="B", help=about, callback=_base_or_adapter)
    folder = "An adapter folder, or a run folder that holds one."
    return _with(function, named, *_loading, click.option("--adapter", metavar="DIR", help=folder, is_eager=True))


def _base_or_adapter(context: click.Context, option: click.Parameter, base: str | None) -> str | None:
    if base is None and not context.params.get("adapter"):
        raise click.MissingParameter(ctx=context, param=option)
    return base


def _with(function: Callable[..., Any], *options: Callable[..., Any]) -> Callable[..., Any]:
    return functools.reduce(lambda inner, option: option(inner), reversed(options), function)


class BaseWithAdapter(NamedTuple):
    """A base with the adapter that stands on it.

    Attributes:
        digest: of the adapter; "" without one. base: as it was named.
    """

    model: Any
    tokenizer: Any
    digest: str
    base: str


def load_with_adapter(
    base: str | None, adapter: str | None, quant: str | None, dtype: str, device: str, force_base: bool
) -> BaseWithAdapter:
    """A base, alone or with an adapter on it; without a name, the base that the adapter was trained on.

    The tokenizer is the base's, with the chat template that lies beside the adapter, where there is one.

    Raises: UsageError where nothing names a base; what loading and attaching raise.
    """
    from gossamer.adapter import Adapter
    from gossamer.attachment import attach
    from gossamer.files.places import adapter_of
    from gossamer.models import load_base
    from gossamer.serving.chat_format import tokenizer_for

    if not adapter:
        return BaseWithAdapter(*load_base(base or "", quant=quant, dtype=dtype, device=device), "", base or "")
    folder = adapter_of(adapter)
    value = Adapter.load(folder)
    base = base or _base_of(folder, value)
    if not base:
        raise UsageError("the adapter does not say what its base is", where=str(adapter), hint="name it with --base")
    model, tokenizer = load_base(base, quant=quant, dtype=dtype, device=device)
    attach(model, value, force_base=force_base)
    return BaseWithAdapter(model, tokenizer_for(folder, model, tokenizer), value.digest, base)


def _base_of(folder: Path, adapter: Adapter) -> str:
    """What an adapter's run trained it on, or its own config says; "" where neither does."""
    from gossamer.attachment.remarks import base_name
    from gossamer.files.card import report_of

    report = report_of(folder.parent) if folder.name == "adapter" else None
    return str((report or {}).get("base") or base_name(adapter.foreign.get("base_model_name_or_path")))


def emit(value: Any) -> None:
    """Print a JSON value on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False))


def present(value: Any, as_json: bool, *lines: str) -> None:
    """Print a result on stdout: the value for machines, or its lines for people; empty ones are left out."""
    if as_json:
        emit(value)
    else:
        click.echo("\n".join(line for line in lines if line))


def warn(text: str) -> None:
    """Print on stderr, red on a terminal."""
    click.secho(text, err=True, fg="red" if wants_colour(sys.stderr) else None)


def wants_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal whose owner has not asked for none (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")
