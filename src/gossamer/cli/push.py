"""The verb `gossamer push`."""

import click

from gossamer.cli.shared import json_option, present


@click.command("push")
@click.argument("adapter", metavar="ADAPTER_OR_RUN")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--base", required=True, metavar="B", help="The base model's name, for the card.")
@click.option("--licence", required=True, metavar="L", help="The adapter's licence, apache-2.0 for example.")
@click.option("--data", multiple=True, metavar="D", help="A data set it was trained on; may be given several times.")
@click.option("--public", is_flag=True, help="Make a new repository public; else it is private.")
@click.option("--dry-run", is_flag=True, help="Say what would go where, and use no network.")
@json_option
def command(
    adapter: str,
    repository: str,
    base: str,
    licence: str,
    data: tuple[str, ...],
    public: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish an adapter with a model card on the Hugging Face hub."""
    from pathlib import Path

    from gossamer.adapter import Adapter
    from gossamer.files.card import model_card, report_of, spectrum_picture
    from gossamer.files.hub import PICTURE, push
    from gossamer.training import adapter_of

    folder = adapter_of(adapter)
    value = Adapter.load(folder)
    picture = spectrum_picture(value)
    report = report_of(Path(adapter))
    card = model_card(value, base=base, licence=licence, data=data, report=report, picture=PICTURE if picture else "")
    done = push(folder, repository, card, picture, private=not public, dry_run=dry_run)
    visible = "private" if done["private"] else "public"
    where = f"{'would go to' if dry_run else 'sent to'} {repository} ({visible} if new): {done['url']}".rstrip(": ")
    present(
        done | {"card": card}, as_json, where, *(f"  {name}: {size:,} bytes" for name, size in done["files"].items())
    )
