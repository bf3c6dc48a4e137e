"""The verb `gossamer compose`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from gossamer.cli.shared import ListedWeights, WeightType, json_option, present
from gossamer.pages.sizes import amount


@click.command("compose", cls=ListedWeights)
@click.argument("adapters", metavar="A B ...", nargs=-1, required=True)
@click.option(
    "--weights",
    type=WeightType(),
    multiple=True,
    help="A number for each adapter, or 'PATTERN=NUMBER;PATTERN=NUMBER' by module; 1 / n each without it.",
)
@click.option("--learn", metavar="FILE", help="Learn weights for each module from these rows; needs --base.")
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Of learning weights.")
@click.option("--lr", type=float, default=5e-3, show_default=True, help="Of learning weights.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Of learning weights.")
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
@click.option(
    "--base",
    metavar="B",
    help="For --learn, and where a change depends on it: catalog name, id, folder or .gguf.",
)
@click.option("--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@json_option
def command(adapters: tuple[str, ...], output: str, as_json: bool, **given: Any) -> None:
    """Combine adapters into one, and say how far it is from their exact sum."""
    from gossamer.errors import StateError, UsageError
    from gossamer.merging.companions import hand_on, require_one
    from gossamer.training import adapter_of

    if Path(output).exists():
        raise StateError("the output folder exists already", where=output, hint="choose a new folder")
    if given["learn"] and (given["weights"] or not given["base"]):
        raise UsageError("weights are learned on a base, or given", got="--learn", expected="--base, and no --weights")
    folders = [adapter_of(folder) for folder in adapters]
    require_one(folders)
    combined = _combined(folders, given, as_json)
    combined.save(output)
    hand_on(folders, Path(output))
    done = {
        "output": output,
        "method": given["method"],
        "modules": len(combined.tensors),
        "bytes": combined.nbytes,
        "sha256": combined.digest,
        "distance": combined.provenance.get("distance", 0.0),
    }
    learned: list[dict[str, float]] = combined.provenance["weights"] if given["learn"] else []
    spreads = [(folder, [*numbers.values()]) for folder, numbers in zip(adapters, learned, strict=False)]
    distance = "no exact sum to compare with" if done["distance"] is None else f"{done['distance']:.3g}"
    present(
        done,
        as_json,
        f"{output}: {len(adapters)} adapters at {done['modules']} modules, {amount(done['bytes'])}",
        *(f"{name}: weights {min(w):.2f} to {max(w):.2f}, mean {sum(w) / len(w):.2f}" for name, w in spreads),
        f"{given['method']}: distance from the exact sum {distance} (relative, Frobenius norm)",
    )


def _combined(folders: Sequence[Path], given: dict[str, Any], quiet: bool) -> Any:
    from gossamer.adapter import Adapter
    from gossamer.merging import combine, learned_weights
    from gossamer.models import load_base
    from gossamer.progress import Silent, for_terminal
    from gossamer.training import answer_batches, answer_loss

    adapters = [Adapter.load(folder) for folder in folders]
    base, tokenizer = load_base(given["base"], dtype="float32") if given["base"] else (None, None)
    weights = [*given["weights"]] or None
    if given["learn"]:
        assert base is not None
        assert tokenizer is not None
        weights = learned_weights(
            base,
            adapters,
            answer_batches(base, tokenizer, given["learn"], batch_size=given["batch_size"]),
            loss=answer_loss,
            steps=given["steps"],
            lr=given["lr"],
            progress=Silent() if quiet else for_terminal(),
        )
    options = {name: given[name] for name in ("density", "common") if given[name] is not None}
    return combine(adapters, weights, method=given["method"], r=given["rank"], base=base, seed=given["seed"], **options)
