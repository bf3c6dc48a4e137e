"""The verb `gossamer pull`."""

import click

from gossamer.cli.shared import json_option, present


@click.command("pull")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--revision", metavar="R", help="A branch, tag or commit; the newest when left out.")
@click.option("--output", required=True, metavar="DIR", help="A folder that does not exist yet.")
@json_option
def command(repository: str, revision: str | None, output: str, as_json: bool) -> None:
    """Fetch an adapter from the Hugging Face hub and check it."""
    from gossamer.files.hub import pull

    adapter = pull(repository, output, revision)
    done = {"output": output, "sha256": adapter.digest, "parameters": adapter.num_parameters}
    present(done, as_json, f"{output}: {adapter!r}")
