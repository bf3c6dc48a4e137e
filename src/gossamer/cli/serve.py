"""gossamer serve"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from gossamer.cli.shared import base_options
from gossamer.errors import UnsupportedError, UsageError


@click.command("serve")
@base_options
@click.option("--adapters", metavar="DIR", type=click.Path(path_type=Path), help="A folder of adapter folders.")
@click.option("--hub", metavar="OWNER/NAME", multiple=True, help="Ids of the hub that may be fetched: owner/*, ...")
@click.option("--name", help="What clients call the base; by default the last part of --base.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Others than this machine's own need --keys.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--keys", metavar="FILE", type=click.Path(path_type=Path), help="JSON: who may use what.")
@click.option("--engine", type=click.Choice(["embedded", "vllm"]), default="embedded", show_default=True)
@click.option("--rows", type=click.IntRange(1, 1024), default=32, show_default=True, help="Sequences at a time.")
@click.option("--tokens", type=click.IntRange(1), default=512, show_default=True, help="Tokens a step.")
@click.option("--waiting", type=click.IntRange(0), default=1024, show_default=True, help="Sequences that may wait.")
@click.option("--memory", type=click.IntRange(1), default=1024, show_default=True, help="MiB of adapters in memory.")
@click.option("--prepack/--no-prepack", default=None, help="Copy the weights as this CPU reads them best, or not.")
@click.option("--embeddings", metavar="B", help="A second base that answers /v1/embeddings.")
@click.option("--embedding-adapters", metavar="DIR", type=click.Path(path_type=Path), help="Adapters of that base.")
@click.option("--drain", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds to finish in.")
@click.option("--timeout", type=click.FloatRange(1), default=600.0, show_default=True, help="Seconds a request.")
@click.option("--log-json", is_flag=True, help="Log JSON lines.")
@click.option("--dry-run", is_flag=True, help="With --engine vllm: check the adapters and print the command only.")
def command(**options: Any) -> None:
    """Serve a base and its adapters to OpenAI's clients."""
    name = options["name"] or Path(options["base"]).name
    if ":" in name:
        raise UsageError("a name without a colon", where="--name", got=name)
    if options["engine"] == "vllm":
        if options["hub"]:
            raise UsageError("--hub goes with --engine embedded")
        _vllm(name, options)
        return
    if options["dry_run"]:
        raise UsageError("--dry-run goes with --engine vllm")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        hint = 'pip install "gossamer[serve]"'
        raise UnsupportedError("serving needs packages that are not there", got=str(error), hint=hint) from None
    _log(options["log_json"])
    _serve(name, options)


def _serve(name: str, options: dict[str, Any]) -> None:
    from gossamer.serving.api.app import create_app
    from gossamer.serving.api.keys import Keyring
    from gossamer.serving.api.limits import Bounds
    from gossamer.serving.api.server import check_host, serve
    from gossamer.serving.api.vectors import Vectors
    from gossamer.serving.embedding import Embedder
    from gossamer.serving.engine import Engine
    from gossamer.serving.hub import Hub
    from gossamer.serving.scheduler import Limits

    check_host(options["host"], bool(options["keys"]))
    keyring = Keyring.read(options["keys"]) if options["keys"] else Keyring()
    hub = Hub(options["hub"]) if options["hub"] else None
    limits = Limits(rows=options["rows"], tokens=options["tokens"], waiting=options["waiting"])
    loading = {field: options[field] for field in ("quant", "dtype", "device")}
    loading["prepack"], folder = options["prepack"], options["adapters"]

    def engine() -> Engine:
        made = Engine(options["base"], folder, limits=limits, memory=options["memory"] * 2**20, **loading)
        click.echo(f"base      {name}")
        if made.decoder.copied:
            click.echo(f"weights   prepacked for this CPU: {made.decoder.copied / 1e6:,.0f} MB beside the base")
        click.echo(f"adapters  {len(made.store.names()):,}" + (f" in {folder}" if folder else ""))
        click.echo(f"keys      {len(keyring.entries) or 'none: this machine only'}")
        click.echo(f"listening http://{options['host']}:{options['port']}")
        return made

    vectors = None
    if options["embeddings"]:
        base, found = options["embeddings"], options["embedding_adapters"]
        vectors = Vectors(
            Path(base).name, lambda: Embedder(base, found, dtype=loading["dtype"], device=loading["device"])
        )
    elif options["embedding_adapters"]:
        raise UsageError("--embedding-adapters goes with --embeddings")
    bounds = Bounds(answering=options["timeout"])
    app = create_app(engine, name=name, keyring=keyring, folder=folder, bounds=bounds, vectors=vectors, hub=hub)
    serve(app, options["host"], options["port"], options["drain"])
    click.echo("stopped")


def _vllm(name: str, options: dict[str, Any]) -> None:
    from gossamer.serving import vllm

    vllm.serve(options["base"], options["adapters"], options["host"], options["port"], options["dry_run"], name=name)


class _Lines(logging.Formatter):
    """A JSON mapping a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        return json.dumps(fields, ensure_ascii=False)


def _log(as_json: bool) -> None:
    """Log what the server does to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("gossamer.serving")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
