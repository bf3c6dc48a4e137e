"""The verb `gossamer quantize`."""

import click

from gossamer.cli.shared import device_option, dtype_option, json_option, present
from gossamer.pages.sizes import amount


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
    whole = done["model"]
    present(
        done,
        as_json,
        f"{done['output']}: {whole['bits']:.3f} bits a parameter over the whole model, {amount(whole['bytes'])}, "
        f"{done['seconds']:.1f} s",
        f"{whole['packed']:.1%} in {quant}: {done['modules']} weights, {done['bits']:.3f} bits each",
        *(f"{count / whole['parameters']:.1%} in {done['dtype']}: {kind}" for kind, count in whole["dense"].items()),
    )
