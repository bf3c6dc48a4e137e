"""gossamer merge"""

from __future__ import annotations

import click

from gossamer.cli.shared import base_options, columns, emit, force_option, json_option


@click.command("merge")
@click.argument("adapter", metavar="ADAPTER_OR_RUN")
@base_options
@click.option("--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@click.option("--requantize", is_flag=True, help="Write in the quantised base's own bits, whatever that loses.")
@force_option
@json_option
def command(
    adapter: str,
    base: str,
    quant: str | None,
    dtype: str,
    device: str,
    output: str,
    requantize: bool,
    force_base: bool,
    as_json: bool,
) -> None:
    """Write a plain model folder with the adapter folded into the weights."""
    from gossamer.merging import merge_into_base
    from gossamer.training import adapter_of

    done = merge_into_base(
        adapter_of(adapter),
        base,
        output,
        dtype=dtype,
        device=device,
        quant=quant,
        requantize=requantize,
        force_base=force_base,
    )
    if as_json:
        emit(done)
        return
    click.echo(f"{done['output']}: {done['modules']} modules merged in {done['dtype']}, {done['seconds']:.1f} s")
    click.echo(f"outputs differ by at most {done['max_error']:.2g} (largest output {done['max_logit']:.3g})")
    if done["choices"]:
        click.echo(_table(done["choices"]))


def _table(choices: dict[str, dict[str, float]]) -> str:
    """What each storage of the merged weights loses."""
    head = ("stored as", "loses of the weights", "over the adapter's change")
    rows = [(name, f"{lost['of_weight']:.2%}", f"{lost['of_change']:.2%}") for name, lost in choices.items()]
    return columns([head, *rows])
