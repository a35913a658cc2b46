"""``potstill plan``: what a run will cost, before it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potstill.cli.options import AllowCode, OverridesArgument, RecipeArgument, Verbose, set_up_logging

if TYPE_CHECKING:
    from potstill.runs.filling import CachePlan
    from potstill.runs.forecast import Forecast
    from potstill.training.profile import Profile


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Also train some steps: where their time goes, and a trace here.")
    ] = None,
    steps: Annotated[int, typer.Option(min=10, help="How many steps --profile trains.")] = 30,
    allow_code: AllowCode = False,
    verbose: Verbose = False,
) -> None:
    """Measure on a few batches what a run will cost: memory, time against the student alone, and what is faster."""
    set_up_logging(quiet=True, verbose=verbose)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # before torch, whose profiler talks to standard error
    from potstill.recipe.load import load_recipe
    from potstill.runs.caching import cached_teachers
    from potstill.runs.filling import forecast
    from potstill.runs.forecast import Trial
    from potstill.runs.plan import Plan

    meant = Plan(load_recipe(recipe, overrides or [], allow_code=allow_code), allow_code=allow_code)
    trial = Trial(meant)
    found = trial.forecast()
    _print(found)
    if found.can_be_cached:
        for name in cached_teachers(meant):
            print_cache(forecast(meant, name))
    if profile is not None:
        _print_profile(trial.profile(steps=steps, trace=profile))


def print_cache(plan: CachePlan) -> None:
    """Print what filling a teacher's cache would take."""
    import shutil

    from potstill.runs.cache import Cache

    cache = Cache()
    place = next(path for path in (plan.folder, *plan.folder.parents) if path.exists())
    views = f" × {plan.views} views" if plan.views > 1 else ""
    typer.echo(
        f"cache of {plan.teacher}: {plan.samples:,} samples{views} × {plan.bytes_per_sample:,.0f} bytes = "
        f"{plan.bytes / 2**20:,.1f} MiB, about {plan.seconds:,.0f} s of the teacher's time in one process"
    )
    typer.echo(
        f"  in {plan.folder}: {shutil.disk_usage(place).free / 2**20:,.0f} MiB free, the cache's limit is "
        f"{cache.limit / 2**20:,.0f} MiB"
    )
    if plan.bytes > cache.limit:
        typer.echo("  that is over the limit: set POTSTILL_CACHE_LIMIT, or say `cache: {precision: fp16, top_k: 64}`")


def _print(found: Forecast) -> None:
    from potstill.runs.forecast import FLOOR

    typer.echo(f"on {found.device}, {_threads()}, in {found.precision}")
    floor = found.step_ms[FLOOR]
    for name, step in found.step_ms.items():
        typer.echo(f"step, {name:<22} {step:9.2f} ms  {step / floor:5.2f} times the student alone")
    using = "" if len(found.step_ms) == 1 else " (teacher cached)" if found.cached else " (teacher live)"
    typer.echo(f"training of the student{using}: {found.steps:,} steps, about {_time(found.seconds)}")
    total = sum(found.memory.values())
    parts = ", ".join(f"{name} {value / 2**20:,.1f}" for name, value in found.memory.items())
    typer.echo(f"memory at the largest batch: {total / 2**20:,.1f} MiB beside Python and its libraries ({parts})")
    better = {name: factor for name, factor in found.faster.items() if factor > 1.03}
    for name, factor in sorted(better.items(), key=lambda item: -item[1]):
        typer.echo(f"faster: {name:<36} {factor:5.2f} times")
    for name, factor in found.faster.items():
        if name not in better:
            typer.echo(f"no faster: {name:<33} {factor:5.2f} times")


def _print_profile(found: Profile) -> None:
    typer.echo(f"profile: {found.steps} steps of {found.step_ms:.2f} ms")
    for name, value in sorted(found.sections.items(), key=lambda item: -item[1]):
        typer.echo(f"  {name:<10} {value:9.3f} ms  {100 * value / found.step_ms:5.1f} %")
    typer.echo(f"  trace: {found.trace} (open it in https://ui.perfetto.dev)")


def _threads() -> str:
    import torch

    count: Any = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
