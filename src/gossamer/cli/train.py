"""The verb `gossamer train`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from gossamer.cli.shared import emit, json_option, wants_colour, warn
from gossamer.pages.sizes import amount
from gossamer.pages.tables import aligned

if TYPE_CHECKING:
    from gossamer.training.runs import Rehearsal


@click.command("train", context_settings={"ignore_unknown_options": True})
@click.argument("config", metavar="CONFIG.yaml")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[--KEY VALUE]...")
@click.option("--sweep", metavar="SWEEP.yaml", help="Try each combination of its lists: `method.r: [4, 8]` a line.")
@click.option("--fleet", metavar="DIR", help="Train one adapter for each data set in this folder.")
@click.option("--no-packing", is_flag=True, help="Pad the rows of a batch instead of packing them: the same maths.")
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint in the output folder.")
@click.option("--dry-run", is_flag=True, help="Show what would happen; train and write nothing.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    config: str,
    overrides: tuple[str, ...],
    sweep: str | None,
    fleet: str | None,
    no_packing: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train an adapter as a config file says. Every key is also a flag: --train.lr 2e-4 --method.r 16.

    With --sweep or --fleet, train many on one base, each in its own folder under the config's output.
    """
    from gossamer.errors import UsageError
    from gossamer.progress import Silent, for_terminal
    from gossamer.training import RunConfig, runs
    from gossamer.training.many import sweep as several

    overrides = (*overrides, "--train.packing", "false") if no_packing else overrides
    progress = Silent() if as_json else for_terminal()
    if sweep and fleet:
        raise UsageError("a sweep and a fleet are two things", got="--sweep and --fleet", hint="leave one of them out")
    if sweep or fleet:
        plan = (
            several.read_sweep(config, sweep, overrides) if sweep else several.read_fleet(config, str(fleet), overrides)
        )
        if dry_run:
            result: dict[str, Any] = {"kind": plan.kind, "runs": several.rehearse_plan(plan, progress)}
        else:
            result = several.run_plan(plan, resume=resume, progress=progress)
        emit(result) if as_json else show_several(plan.output, result)
        context.exit(several.exit_code(result))
    settings = RunConfig.read(config, overrides)
    if dry_run:
        rehearsal = runs.rehearse(settings)
        emit(rehearsal.to_dict()) if as_json else show_rehearsal(rehearsal)
        return
    done = runs.run(settings, resume=resume, progress=progress)
    emit(done.report) if as_json else show_report(str(done.output), done.report)


def show_several(output: str, result: dict[str, Any]) -> None:
    """One line a run, what failed, and where the page is; of a rehearsal, what would be trained."""
    from gossamer.training.many.report import as_rows

    click.echo(aligned(as_rows(result)))
    for run in result["runs"]:
        if "error" in run:
            warn(f"{run['name']} failed: {run['error']['code']}: {run['error']['what']}")
    if result.get("best"):
        click.echo(f"best by {result['metric']}: {result['best']}")
    if "seconds" in result:
        click.echo(f"{result['seconds']:.0f} s\n{output}/{result['kind']}.html")


def show_rehearsal(rehearsal: Rehearsal) -> None:
    """The dry run for people: the config, the modules, the rows, and one row with its supervised text marked."""
    click.echo(rehearsal.config.to_yaml())
    click.echo(f"{rehearsal.injection}\n")
    click.echo("\n".join(rehearsal.data))
    click.echo(f"{rehearsal.steps:,} steps; {rehearsal.lr}; {rehearsal.memory}\n")
    colour = wants_colour(sys.stdout)
    click.echo(f"the first row; supervised text is {'green' if colour else 'between [[ and ]]'}:")
    for text, supervised in rehearsal.preview:
        marked = click.style(text, fg="green", bold=True) if colour else f"[[{text}]]"
        click.echo(marked if supervised else text, nl=False)
    click.echo()


def show_report(output: str, report: dict[str, Any]) -> None:
    """Before and after, in a few lines."""
    from gossamer.training.tasks import read_figures

    rows = [("", "before", "after")]
    before, after = report["eval_before"] or {}, report["eval_after"] or {}
    rows += [(name, f"{before[name]:.4f}", f"{value:.4f}") for name, value in read_figures(after).named().items()]
    share = report["trainable_params"] / report["total_params"]
    if after:
        click.echo(aligned(rows))
    click.echo(f"{report['trainable_params']:,} trainable parameters ({share:.2%}), {amount(report['adapter_bytes'])}")
    click.echo(f"{report['seconds']:.0f} s, {report['tokens_per_second']:.0f} tokens/s")
    click.echo(f"{output}/report.html")
