"""The verb `gossamer plan`."""

from typing import Any

import click
from click.core import ParameterSource

from gossamer.cli.shared import emit, json_option

_NUMBERS = ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocabulary", "intermediate")
_SWITCH = {"on": True, "off": False, "auto": "auto"}


@click.command("plan")
@click.argument("config", required=False, metavar="CONFIG_OR_ID")
@click.option("--method", default="lora", show_default=True, help="lora, dora or full.")
@click.option("--r", "rank", type=int, default=16, show_default=True, help="Rank of the adapters.")
@click.option("--target", default="all-linear", show_default=True, help="Module names, with commas between them.")
@click.option("--quant", help="nf4, nf4-single, fp4 or int8: how the base's linear modules are stored.")
@click.option("--sequence", type=int, default=1024, show_default=True, help="Tokens of a row.")
@click.option("--batch", type=int, default=1, show_default=True, help="Rows that go through the model at once.")
@click.option("--accumulation", type=int, default=1, show_default=True, help="Batches that make one step.")
@click.option("--dtype", default="bf16", show_default=True, help="Of the base: bf16, fp16 or fp32.")
@click.option("--adapter-dtype", default="fp32", show_default=True, help="Of what is trained.")
@click.option("--optimizer", default="adamw", show_default=True, help="adamw, adamw8bit or paged_adamw8bit.")
@click.option("--checkpointing", type=click.Choice([*_SWITCH]), default="off", show_default=True)
@click.option("--supervised", type=float, default=1.0, show_default=True, help="Share of the tokens with a label.")
@click.option("--padded/--packed", default=None, help="Whether rows differ in length; by default where several do.")
@click.option("--path", default="gossamer", show_default=True, help="gossamer, or peft for a plain loop over PEFT.")
@click.option("--device", help='"RTX 4090", "this machine", ...: where it is to run.')
@click.option("--layers", type=int, help="Instead of CONFIG_OR_ID: the model's numbers, typed in.")
@click.option("--hidden", type=int, help="Width of a hidden state.")
@click.option("--heads", type=int, help="Query heads.")
@click.option("--kv-heads", type=int, help="Key heads; by default as many.")
@click.option("--head-dim", type=int, help="Width of a head; by default hidden / heads.")
@click.option("--vocab", "vocabulary", type=int, help="Tokens there are.")
@click.option("--intermediate", type=int, help="Width inside the MLP.")
@click.option("--gated/--no-gated", default=True, help="Whether the MLP has a gate, as in Llama; without, as in GPT.")
@click.option("--tied/--untied", default=False, help="Whether the head is the embedding.")
@click.option("--compare", is_flag=True, help="Full fine-tuning, LoRA and QLoRA beside each other.")
@click.option("--html", metavar="FILE", help="Also write one offline page with a picture.")
@json_option
def command(config: str | None, compare: bool, html: str | None, as_json: bool, **options: Any) -> None:
    """Say what a training run takes, from the model's config alone: memory, time, disk, and how it would fit.

    CONFIG_OR_ID may be the YAML file of a run: what it says is planned, and options given here come before it.
    """
    from gossamer import planning
    from gossamer.planning.table import compared

    run = _of_run(config) if config and config.endswith((".yaml", ".yml")) else {}
    config = run.pop("base", config)
    model = _model(config, options)
    method = {
        "name": options.pop("method"),
        "r": options.pop("rank"),
        "target_modules": _targets(options.pop("target")),
    }
    options["checkpointing"] = _SWITCH[options["checkpointing"]]
    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if not given & {"method", "rank", "target"}:
        method = run.pop("method", method)
    options |= {name: value for name, value in run.items() if name in options and name not in given}
    if compare:
        beside = {name: value for name, value in options.items() if name not in ("quant", "path", "checkpointing")}
        plans = planning.compare(
            model, r=method["r"] if isinstance(method, dict) else getattr(method, "r", 16), **beside
        )
        if as_json:
            emit({name: plan.to_dict() for name, plan in plans})
        else:
            click.echo(compared(plans))
        return
    plan = planning.plan(model, method, **options)
    if html:
        plan.html(html)
    if as_json:
        emit(plan.to_dict())
    else:
        click.echo(str(plan))


def _of_run(path: str) -> dict[str, Any]:
    """What a run's config file says of base, method and sizes, under the plan's own names."""
    from gossamer.training import RunConfig

    run = RunConfig.read(path)
    train = run.train
    rows = max(1, train.batch_tokens // train.max_length) if train.batch_tokens else train.batch_size
    batch = min(rows, max(1, train.micro_batch_tokens // train.max_length))  # what goes through the model at once
    said = {"sequence": train.max_length, "batch": batch, "accumulation": train.accumulation * -(-rows // batch)}
    said |= {"quant": run.quant, "optimizer": train.optimizer, "checkpointing": train.checkpointing}
    dtype = {} if run.dtype == "auto" else {"dtype": run.dtype}
    return {"base": run.base, "method": run.method} | said | dtype


def _model(config: str | None, options: dict[str, Any]) -> Any:
    """What was named, or the numbers typed in in its place."""
    numbers = {name: options.pop(name) for name in _NUMBERS}
    gated, tied = options.pop("gated"), options.pop("tied")
    numbers = {name: value for name, value in numbers.items() if value is not None}
    if config is not None:
        if numbers:
            raise click.UsageError("name a model or type its numbers in, not both")
        return config
    if not numbers:
        raise click.UsageError("name a model, or type its numbers in: --layers, --hidden, --heads, --vocab, ...")
    return numbers | {"gated": gated, "tied": tied}


def _targets(text: str) -> str | tuple[str, ...]:
    return text if text == "all-linear" else tuple(part.strip() for part in text.split(","))
