"""The verb `gossamer merge`."""

from collections.abc import Iterator
from typing import Any

import click

from gossamer.cli.shared import ListedWeights, base_options, force_option, json_option, present
from gossamer.pages.tables import aligned


@click.command("merge", cls=ListedWeights)
@click.argument("adapters", metavar="ADAPTER_OR_RUN ...", nargs=-1, required=True)
@base_options
@click.option("--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@click.option("--weights", type=float, multiple=True, help="A number for each adapter; 1 each without it.")
@click.option("--undo", is_flag=True, help="Take the adapters out of a merged folder (--base) again.")
@click.option("--requantize", is_flag=True, help="Write in the quantised base's own bits, whatever that loses.")
@click.option(
    "--check",
    type=click.Choice(["auto", "outputs", "samples"]),
    default="auto",
    show_default=True,
    help="Compare outputs with the base and adapters', or only read samples of the weights again.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@force_option
@json_option
def command(adapters: tuple[str, ...], as_json: bool, weights: tuple[float, ...], **options: Any) -> None:
    """Write a plain model folder with adapters folded into the weights.

    A folder of safetensors is merged file by file in the memory of one module; run the same line again to continue
    what was interrupted.
    """
    from gossamer.merging import merge_into_base
    from gossamer.progress import Silent, for_terminal
    from gossamer.training import adapter_of

    done = merge_into_base(
        [adapter_of(adapter) for adapter in adapters],
        options.pop("base"),
        options.pop("output"),
        weights=weights or None,
        progress=Silent() if as_json else for_terminal(),
        **options,
    )
    present(done, as_json, *_lines(done, options["dry_run"]))


def _lines(done: dict[str, Any], dry_run: bool) -> Iterator[str]:
    """What was merged, or would be, and what it lost."""
    yield from (f"note: {note}" for note in done["notes"])
    size = f", {done['bytes'] / 1e9:.2f} GB in {done['files']} files" if done["streamed"] else ""
    if dry_run:
        what = f"{done['modules']} modules would be merged{size}" if done["streamed"] else "would be merged in memory"
        yield f"{done['output']}: {what}"
        return
    yield f"{done['output']}: {done['modules']} modules merged in {done['dtype']}{size}, {done['seconds']:.1f} s"
    if done.get("continued"):
        yield f"{done['continued']} files were there from an interrupted merge"
    if "rounding" in done:
        yield f"rounding to {done['dtype']} takes {done['rounding']:.2%} of the adapters' change"
    if "max_error" in done:
        yield f"outputs differ by at most {done['max_error']:.2g} (largest output {done['max_logit']:.3g})"
    if done["choices"]:
        yield _table(done["choices"])


def _table(choices: dict[str, dict[str, float]]) -> str:
    """What each storage of the merged weights loses."""
    head = ("stored as", "loses of the weights", "over the adapter's change")
    rows = [(name, f"{lost['of_weight']:.2%}", f"{lost['of_change']:.2%}") for name, lost in choices.items()]
    return aligned([head, *rows])
