"""The verb `gossamer doctor`."""

import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

import click

from gossamer.cli.shared import json_option, present
from gossamer.pages.tables import aligned

FLOORS = {
    "torch": ((2, 10), "older ones can be made to run code by a weights file (CVE-2026-24747)"),
    "transformers": ((5, 3), "older ones run code from a model's config (CVE-2026-4372)"),
    "safetensors": ((0, 8), "older ones can write zeros when a file is saved over itself"),
    "jinja2": ((3, 1, 6), "older ones let a chat template out of its sandbox"),
}
"""The oldest versions without known faults that matter here, and the fault."""


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Say what this machine has, and what is wrong with it. Exit code 4 when something is."""
    found = examined()
    facts = [(name, str(value)) for name, value in found.items() if name not in ("problems", "catalog")]
    facts += [(f"catalog: {name}", folder or "not fetched") for name, folder in found["catalog"].items()]
    problems = [f"problem: {one}" for one in found["problems"]] or ["no problems found"]
    present(found, as_json, aligned(facts), *problems)
    if found["problems"]:
        raise click.exceptions.Exit(4)


def examined() -> dict[str, Any]:
    """The facts, JSON-ready; "problems" lists what should be mended."""
    import torch

    from gossamer.catalog import catalog
    from gossamer.kernels import elementwise
    from gossamer.models import has_bfloat16_units

    problems = [problem for name, (floor, fault) in FLOORS.items() if (problem := _too_old(name, floor, fault))]
    home = catalog.home()
    place = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < 2 << 30:
        problems.append(
            f"only {free / 2**30:.1f} GiB free at {place}; the catalog's model needs 0.5 GiB to be converted"
        )
    if not os.access(place, os.W_OK):
        problems.append(f"{place} cannot be written; GOSSAMER_HOME names another folder")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
        if hasattr(os, "sysconf")
        else None,
        "cuda_devices": devices,
        "kernels": elementwise.described(),
        "cpu_bfloat16": "in hardware" if has_bfloat16_units() else "emulated: float32 is much faster here",
        **{name: importlib.metadata.version(name) for name in FLOORS},
        "home": str(home),
        "disk_free_gib": round(free / 2**30, 1),
        "catalog": {name: str(catalog.cached(name) or "") for name in catalog.CATALOG},
        "problems": problems,
    }


def _too_old(name: str, floor: tuple[int, ...], fault: str) -> str:
    version = importlib.metadata.version(name)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    return "" if numbers >= floor else f"{name} {version} is below {'.'.join(map(str, floor))}: {fault}"
