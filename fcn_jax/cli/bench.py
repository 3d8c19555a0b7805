"""The command line `fcn-jax bench`; `python -m fcn_jax.cli.bench` is the same where less is installed.

It needs jax, flax, optax, numpy and rich, and torch unless told otherwise; not tyro, nor what reads data.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from fcn_jax.arguments import Parser
from fcn_jax.cli.process import guarded
from fcn_jax.compare.bench import Result, release, run_row
from fcn_jax.compare.bench_report import collectives_table, matmul_rate, pipeline_table, save_json, tables
from fcn_jax.compare.collectives import step_collectives
from fcn_jax.compare.machine import cores_allowed, describe, load
from fcn_jax.compare.networks import network_rows
from fcn_jax.compare.operators import matmul_row, operator_rows
from fcn_jax.compare.pipeline import pipeline_rates
from fcn_jax.compare.rows import Row
from fcn_jax.compare.settings import NETWORKS, NUM_CLASSES, Settings, make_settings
from fcn_jax.errors import InputError, Stopped, unknown
from fcn_jax.models import create_model
from fcn_jax.models.kernels import plain_kernels
from fcn_jax.recipes import RECIPES

__all__ = ["bench", "main"]

_DEVICE_COUNTS = (1, 2, 4, 8)
_WIDTH = 132
"""Columns of what goes into a file or a pipe."""


def _parser() -> Parser:
    parser = Parser("fcn-jax bench", description="Measure speed against PyTorch, after checking that both agree.")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="by default what JAX computes on")
    parser.add_argument("--against", choices=("torch", "none"), default="torch", help="none: only ours, unchecked")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: runs everything, measures nothing")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="rows by name, e.g. 'train-*'; the matmul rate always"
    )
    parser.add_argument("--rounds", type=int, help="samples of each side")
    parser.add_argument("--seconds", type=float, help="a sample is the mean of as many calls as fill this time")
    parser.add_argument("--image-size", type=int, metavar="N", help="height and width of the networks' images")
    parser.add_argument("--batch-size", type=int, metavar="N")
    parser.add_argument(
        "--plain-kernels", action="store_true", help="on the CPU: leave out its own kernels, to see what they give"
    )
    parser.add_argument("--collectives", action="store_true", help="count what devices exchange in a training step")
    parser.add_argument("--pipeline", metavar="RECIPE", help="how many images a second a recipe's input pipeline gives")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the recipe's data set, with --pipeline")
    parser.add_argument("--out", type=Path, metavar="FILE_OR_DIR", help="FILE.json, or a folder for bench.json")
    return parser


def bench(arguments: Sequence[str]) -> int:
    """Measure and print; the exit code, 1 where a row is wrong or did not run.

    Raises:
        InputError: the options do not fit.
        Stopped: by Ctrl-C.
    """
    given = _parser().parse_args(list(arguments))
    _configure(given)
    sizes = {"image_size": given.image_size, "batch_size": given.batch_size}
    sizes |= {"rounds": given.rounds, "sample_seconds": given.seconds}
    settings = make_settings(given.device, given.smoke, against_torch=given.against == "torch", **sizes)
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    if settings.kind == "gpu" and not settings.on_gpu:
        console.print("no GPU here: the GPU's way is taken on the CPU, its times mean nothing")
    out = None if given.out is None else given.out if given.out.suffix == ".json" else given.out / "bench.json"
    record: dict[str, Any] = {"command": ["fcn-jax", "bench", *arguments], "settings": asdict(settings)}
    record["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if given.pipeline is not None:
        return _pipeline(given.pipeline, given.data_dir, settings, record, out, console)
    run = _collectives if given.collectives else _rows
    try:
        with plain_kernels() if given.plain_kernels else contextlib.nullcontext():
            return run(settings, given.only, record, out, console)
    except KeyboardInterrupt:
        raise Stopped("stopped; the rows that were done are in --out, where it was given", signal.SIGINT) from None


def _configure(given: argparse.Namespace) -> None:
    """Set JAX up, where it does not run already: it reads all of this when it first looks for devices."""
    # Two frameworks share the GPU: by default JAX would take three quarters of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = os.environ.get("XLA_FLAGS", "")
    if given.smoke and given.device != "gpu" and "optimization_level" not in flags:
        # Quicker to compile by far, and the times mean nothing anyway.
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()
    with contextlib.suppress(RuntimeError):
        if given.device == "cpu":
            jax.config.update("jax_platforms", "cpu")
        if given.collectives:
            jax.config.update("jax_num_cpu_devices", max(_DEVICE_COUNTS))


def _wanted(names: Sequence[str], only: Sequence[str] | None) -> list[str]:
    if only is None:
        return list(names)
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"--only {pattern}: no row has such a name; choose from: {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in only)]


def _all_rows(settings: Settings) -> Iterator[Row]:
    yield from operator_rows(settings)
    yield from network_rows(settings)


def _rows(
    settings: Settings, only: Sequence[str] | None, record: dict[str, Any], out: Path | None, console: Console
) -> int:
    rows = {row.name: row for row in _all_rows(settings)}
    wanted = _wanted(list(rows), only)
    if settings.against_torch:
        _need_torch()
        from fcn_jax.compare import bench_torch as torch_side

        torch_side.prepare(settings)
    before = load()
    record |= describe(settings.against_torch) | {"load_before": before}
    if before and before[0] > 0.5 * (cores_allowed() or 1):
        console.print(
            f"load average {before[0]:.1f} before the start: something else computes here. Do not trust the times; "
            "torch's threads, which wait for each other, suffer most",
            style="bold yellow",
            highlight=False,
        )
    results: list[Result] = []
    for row in [matmul_row(settings), *(rows[name] for name in wanted)]:
        console.print(f"{row.name} ...", style="dim", highlight=False)
        results.append(run_row(row, settings))
        release(settings.against_torch)
        for note in results[-1].notes:
            console.print(f"{row.name}: {note}", highlight=False, markup=False)
        if out is not None:  # after every row, so that a run that is stopped keeps what it has
            rate = matmul_rate(results)
            rows_so_far = [result.to_json() for result in results]
            save_json(out, {**record, "load_after": load(), "matmul_flops_per_s": rate, "rows": rows_so_far})
    for each in tables(results, _title(settings)):
        console.print(each)
    console.print(
        "dropout is off on both sides; GFLOP/s are ours, 2 per multiply-add, a train step counted as 3 forward passes; "
        "p: planned by the compiler, not measured; first: compilation and first call, not in the times",
        highlight=False,
    )
    if out is not None:
        console.print(f"all samples in {out}", highlight=False)
    bad = [f"{result.row.name} ({result.status})" for result in results if result.status != "ok"]
    if bad:
        console.print(f"not timed: {', '.join(bad)}", style="bold red", highlight=False)
    return 1 if bad else 0


def _title(settings: Settings) -> str:
    size = settings.image_size
    where = jax.devices()[0].device_kind if settings.on_gpu else "CPU"
    title = f"{where}, {settings.dtype}, batch {settings.batch_size}, images {size}x{size}, {settings.encoder}"
    rounds = f"medians of {settings.rounds}"
    return f"{title}, {rounds}" + (" (smoke run: the times mean nothing)" if settings.smoke else "")


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError("comparing with PyTorch needs torch; install it, or give --against none") from error


def _collectives(
    settings: Settings, only: Sequence[str] | None, record: dict[str, Any], out: Path | None, console: Console
) -> int:
    counts = [count for count in _DEVICE_COUNTS if count <= len(jax.devices())]
    found = []
    for name in _wanted(NETWORKS, only):
        model = create_model(
            name, NUM_CLASSES, encoder=settings.encoder, width=settings.width, dtype=settings.jax_dtype
        )
        for mode in ("pmap", "mesh"):
            for count in counts:
                console.print(f"{name} {mode} on {count} ...", style="dim", highlight=False)
                size, batch = (settings.image_size, settings.image_size), settings.batch_size * count
                found.append((name, step_collectives(model, mode, jax.devices()[:count], size, batch)))
    console.print(collectives_table(found))
    if out is not None:
        steps = [{"network": name, **step.to_json()} for name, step in found]
        save_json(out, {**record, **describe(against_torch=False), "collectives": steps})
        console.print(f"numbers in {out}", highlight=False)
    return 0


def _pipeline(
    recipe: str, data_dir: str | None, settings: Settings, record: dict[str, Any], out: Path | None, console: Console
) -> int:
    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES)
    config = RECIPES[recipe].config
    config = replace(config, data=replace(config.data, dir=data_dir))
    rates = list(pipeline_rates(config, seconds=0.2 if settings.smoke else 10.0))
    console.print(pipeline_table(recipe, rates))
    if out is not None:
        save_json(out, {**record, **describe(against_torch=False), "pipeline": [rate.to_json() for rate in rates]})
        console.print(f"numbers in {out}", highlight=False)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake becomes one line on stderr and exit code 2."""
    return guarded(bench, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
