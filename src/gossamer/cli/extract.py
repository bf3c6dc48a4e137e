"""The verb `gossamer extract`."""

import click

from gossamer.cli.shared import json_option, present
from gossamer.pages.sizes import amount


@click.command("extract")
@click.argument("base")
@click.argument("tuned", metavar="TUNED_OR_ADAPTER")
@click.option("--rank", "-r", type=int, help="The rank at every module.")
@click.option("--energy", type=float, help="Instead: the share of the squared singular values to keep at each.")
@click.option("--whole", is_flag=True, help="Keep tuned norms and embeddings as they are (modules_to_save).")
@click.option("--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@json_option
def command(
    base: str, tuned: str, rank: int | None, energy: float | None, whole: bool, output: str, as_json: bool
) -> None:
    """Turn a full fine-tune (or an adapter of another method) into a LoRA adapter, and say what is missing."""
    from pathlib import Path

    from gossamer.adapter import Adapter
    from gossamer.errors import StateError
    from gossamer.merging import as_lora, extract
    from gossamer.merging.companions import Companions, hand_on
    from gossamer.models import load_base
    from gossamer.models.locate import locate
    from gossamer.progress import Silent, for_terminal
    from gossamer.training import adapter_of

    if Path(output).exists():
        raise StateError("the output folder exists already", where=output, hint="choose a new folder")
    shown = Silent() if as_json else for_terminal()
    if any((Path(tuned) / name).exists() for name in ("adapter_config.json", "adapter")):
        value = Adapter.load(adapter_of(tuned))
        found = as_lora(load_base(base, dtype="float32")[0], value, r=rank, energy=energy)
        found.save(output)
        hand_on([adapter_of(tuned)], Path(output))
    else:
        own = Companions.of(locate(base), [locate(tuned)])
        found = extract(base, tuned, r=rank, energy=energy, whole=whole, watched=shown)
        found.save(output)
        own.write(Path(output))
    facts = found.provenance
    done = {"output": output, "modules": len(found.tensors), "bytes": found.nbytes, "sha256": found.digest}
    done |= {name: facts[name] for name in ("error", "errors", "left")}
    worst = max(facts["errors"], key=lambda path: facts["errors"][path])
    named = ", ".join(facts["left"][:3]) + (" ..." if len(facts["left"]) > 3 else "")
    present(
        done,
        as_json,
        f"{output}: {done['modules']} modules, {amount(done['bytes'])}",
        f"misses {facts['error']:.2%} of the change; most at {worst}, {facts['errors'][worst]:.2%}",
        f"changed, but not in it: {len(facts['left'])} parameters ({named})" if facts["left"] else "",
    )
