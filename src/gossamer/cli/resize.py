"""The verb `gossamer resize`."""

import click

from gossamer.cli.shared import json_option, present
from gossamer.pages.tables import aligned


@click.command("resize")
@click.argument("adapter", metavar="ADAPTER_OR_RUN")
@click.option("--rank", type=int, help="The rank of every module; with --pooled the mean rank.")
@click.option("--energy", type=float, help="Instead: the share of the squared singular values to keep, 0.99 say.")
@click.option("--pooled", is_flag=True, help="Give ranks to the modules that need them, out of one budget.")
@click.option("--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@json_option
def command(adapter: str, rank: int | None, energy: float | None, pooled: bool, output: str, as_json: bool) -> None:
    """Write the nearest adapter of lower rank, and say its error."""
    from pathlib import Path

    from gossamer.adapter import Adapter
    from gossamer.errors import StateError
    from gossamer.merging.companions import hand_on
    from gossamer.training import adapter_of

    if Path(output).exists():
        raise StateError("the output folder exists already", where=output, hint="choose a new folder")
    before = Adapter.load(adapter_of(adapter))
    after = before.resize(rank, energy=energy, pooled=pooled)
    after.save(output)
    hand_on([adapter_of(adapter)], Path(output))
    error, errors = after.provenance["error"], after.provenance["errors"]
    worst = sorted(errors.items(), key=lambda item: -item[1])[:5]
    present(
        {"output": output, "sha256": after.digest, "error": error, "errors": errors},
        as_json,
        f"{output}: {before.num_parameters:,} numbers became {after.num_parameters:,}",
        f"error {error:.3g} of the change (relative, Frobenius norm); the largest of single modules:",
        aligned([(path, f"{error:.3g}") for path, error in worst], indent="  "),
    )
