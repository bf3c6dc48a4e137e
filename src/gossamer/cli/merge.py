"""gossamer merge"""

from __future__ import annotations

import click

from gossamer.cli.shared import base_options, emit, force_option, json_option


@click.command("merge")
@click.argument("adapter", metavar="ADAPTER_OR_RUN")
@base_options
@click.option("--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@force_option
@json_option
def command(adapter: str, base: str, dtype: str, device: str, output: str, force_base: bool, as_json: bool) -> None:
    """Write a plain model folder with the adapter folded into the weights."""
    from gossamer.merging import merge_into_base
    from gossamer.training import adapter_of

    done = merge_into_base(adapter_of(adapter), base, output, dtype=dtype, device=device, force_base=force_base)
    if as_json:
        emit(done)
        return
    click.echo(f"{done['output']}: {done['modules']} modules merged in {done['dtype']}, {done['seconds']:.1f} s")
    click.echo(f"outputs differ by at most {done['max_error']:.2g} (largest output {done['max_logit']:.3g})")
