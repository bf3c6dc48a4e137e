"""gossamer compose"""

from __future__ import annotations

from typing import Any

import click

from gossamer.cli.shared import emit, json_option


class _ListedWeights(click.Command):
    """Takes `--weights 0.7 0.3`: every number after the option is one of its values."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        listing = False
        for word in args:
            listing = word == "--weights" or (listing and _is_number(word))
            if word != "--weights":
                spread.append(f"--weights={word}" if listing else word)
        return super().parse_args(ctx, spread)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


@click.command("compose", cls=_ListedWeights)
@click.argument("adapters", metavar="A B ...", nargs=-1, required=True)
@click.option("--weights", type=float, multiple=True, help="A number for each adapter; 1 / n each without it.")
@click.option(
    "--method",
    default="exact",
    show_default=True,
    help="exact, svd, linear, ties, dare, dare_ties, magnitude_prune, knots, iso_c or iso_cts.",
)
@click.option("--rank", type=int, help="Keep the nearest of this rank; without it the adapters' ranks add.")
@click.option("--density", type=float, help="Share of entries kept by ties, dare, dare_ties, magnitude_prune, knots.")
@click.option("--common", type=float, help="Share of directions that iso_cts takes from the sum.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what dare and dare_ties draw.")
@click.option("--base", metavar="B", help="The base, for DoRA, VeRA and IA3; catalog name, id, folder or .gguf file.")
@click.option("--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@json_option
def command(
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    method: str,
    rank: int | None,
    density: float | None,
    common: float | None,
    seed: int,
    base: str | None,
    output: str,
    as_json: bool,
) -> None:
    """Combine adapters into one, and say how far it is from their exact sum."""
    from pathlib import Path

    from gossamer.adapter import Adapter
    from gossamer.errors import StateError
    from gossamer.merging import combine
    from gossamer.models import load_base
    from gossamer.training import adapter_of

    if Path(output).exists():
        raise StateError("the output folder exists already", where=output, hint="choose a new folder")
    given: dict[str, Any] = {"density": density, "common": common}
    combined = combine(
        [Adapter.load(adapter_of(folder)) for folder in adapters],
        weights or None,
        method=method,
        r=rank,
        base=load_base(base, dtype="float32")[0] if base else None,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    combined.save(output)
    done = {
        "output": output,
        "method": method,
        "modules": len(combined.tensors),
        "bytes": combined.nbytes,
        "sha256": combined.digest,
        "distance": combined.provenance.get("distance", 0.0),
    }
    if as_json:
        emit(done)
        return
    click.echo(f"{output}: {len(adapters)} adapters at {done['modules']} modules, {done['bytes'] / 1e6:.1f} MB")
    distance = "no exact sum to compare with" if done["distance"] is None else f"{done['distance']:.3g}"
    click.echo(f"{method}: distance from the exact sum {distance} (relative, Frobenius norm)")
