"""The verb `gossamer eval`."""

from typing import Any

import click

from gossamer.cli.shared import adapter_options, emit, force_option, json_option, load_with_adapter
from gossamer.pages.tables import aligned


@click.command("eval")
@adapter_options
@click.option(
    "--data", required=True, metavar="FILE", help="Held-out rows, also of a fetched data set: reviews/eval.jsonl."
)
@click.option("--task", metavar="NAME", help="What is measured, a task as in a run's config; sft if not given.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@force_option
@json_option
def command(data: str, task: str | None, batch_size: int, as_json: bool, **loading: Any) -> None:
    """Measure a base, or a base with an adapter, on held-out rows."""
    from gossamer.training import evaluate
    from gossamer.training.config import DataFiles
    from gossamer.training.tasks import DEFAULT, read_figures, task_of

    chosen = task_of(task or DEFAULT)
    rows, _ = DataFiles(train=data).read()  # before gigabytes are loaded
    model, tokenizer, digest, base = load_with_adapter(**loading)
    result = evaluate(model, tokenizer, rows, task=chosen, batch_size=batch_size)
    if as_json:
        emit({"base": base, "adapter_digest": digest, "data": data} | result)
        return
    figures = ((name, value) for name, value in result.items() if isinstance(value, int | float | str))
    click.echo(aligned([(name, f"{one:.4f}" if isinstance(one, float) else str(one)) for name, one in figures]))
    if table := read_figures(result).table:
        names = [label.strip() for label in table.labels]
        click.echo("\nrows: the right label; columns: the predicted one")
        rows = ((name, *map(str, row)) for name, row in zip(names, table.counts, strict=True))
        click.echo(aligned([("", *names), *rows]))
