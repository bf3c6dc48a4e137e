"""gossamer quantize"""

from __future__ import annotations

import click

from gossamer.cli.shared import device_option, dtype_option, emit, json_option
from gossamer.progress import amount


@click.command("quantize")
@click.argument("base", metavar="B")
@click.option("--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@click.option("--quant", default="nf4", show_default=True, help="nf4, nf4-single, fp4, fp4-single or int8.")
@dtype_option
@device_option
@json_option
def command(base: str, output: str, quant: str, dtype: str, device: str, as_json: bool) -> None:
    """Write a base with its linear weights in 4 or 8 bits, as a folder that loads here and in transformers."""
    from gossamer.models import quantize_base

    done = quantize_base(base, output, quant=quant, dtype=dtype, device=device)
    if as_json:
        emit(done)
        return
    click.echo(
        f"{done['output']}: {done['modules']} weights of {done['parameters']:,} parameters in {quant}, "
        f"{done['bits']:.3f} bits each, {amount(done['bytes'])}, {done['seconds']:.1f} s"
    )
