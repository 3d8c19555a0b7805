"""The command line `fcn-jax bench`.

It needs jax, flax, optax, numpy, rich, tyro and, unless told otherwise, torch, but not the libraries that read data.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jax
import tyro
from rich.console import Console

from fcn_jax.cli.process import OutputPath, make_folder
from fcn_jax.compare import bench, import_torch_adapter
from fcn_jax.compare.bench import Settings, make_settings, pipeline_rates, run_row
from fcn_jax.compare.bench_rows import matmul_row, network_rows, operator_rows
from fcn_jax.compare.report import bench_tables, matmul_rate, pipeline_table, save_json
from fcn_jax.errors import InputError, Stopped, unknown
from fcn_jax.models.kernels import cpu_kernels
from fcn_jax.recipes import RECIPES


@dataclass(frozen=True)
class BenchArguments:
    """Compare speed with PyTorch, after checking that both compute the same."""

    device: Literal["cpu", "gpu"] | None = None
    """By default the one that JAX chooses."""
    against: Literal["torch", "none"] = "torch"
    """none: time only JAX, without checking its results."""
    smoke: bool = False
    """Run everything at tiny sizes, as a test; the times mean nothing."""
    only: tuple[str, ...] = ("*",)
    """Rows to run, by name or pattern, e.g. 'train-*'; the matrix product always runs."""
    rounds: int | None = None
    """Number of samples of each framework."""
    seconds: float | None = None
    """Length of a sample: the mean time of as many calls as fit into it."""
    image_size: int | None = None
    """Height and width of the networks' images."""
    batch_size: int | None = None
    plain_kernels: bool = False
    """Turn off our CPU kernels, to measure what they gain."""
    pipeline: str | None = None
    """Measure the images per second of this recipe's input pipeline instead."""
    data_dir: str | None = None
    """Folder of the recipe's data set, with --pipeline."""
    out: OutputPath | None = None
    """FILE.json, or a folder for bench.json."""


def main(arguments: Sequence[str]) -> int:
    """Measure and print; the exit code is 1 where a row is wrong or did not run.

    Raises:
        InputError: the options do not fit.
        Stopped: by Ctrl-C.
    """
    given = tyro.cli(BenchArguments, prog="fcn-jax bench", args=list(arguments))
    if given.data_dir is not None and given.pipeline is None:
        raise InputError("--data-dir is the data set of --pipeline RECIPE; give that as well")
    of_rows = (given.image_size, given.batch_size, given.rounds)
    if given.pipeline is not None and (any(of_rows) or given.only != ("*",)):
        raise InputError(
            "--pipeline reads images as its recipe does; leave out --image-size, --batch-size, --rounds, --only"
        )
    _configure(given)
    sizes = {"image_size": given.image_size, "batch_size": given.batch_size}
    settings = make_settings(given.device, given.smoke, rounds=given.rounds, sample_seconds=given.seconds, **sizes)
    # The tables need 132 columns, where a pipe or a file has none.
    console = Console(width=None if sys.stdout.isatty() else 132, highlight=False, markup=False)
    record: dict[str, Any] = {"command": ["fcn-jax", "bench", *arguments], "settings": asdict(settings)}
    record |= {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **bench.describe()}
    if settings.kind == "gpu" and not settings.on_gpu:
        console.print("no GPU here: the GPU settings run on the CPU, and the times mean nothing")
    run = _pipeline if given.pipeline is not None else _rows
    try:
        with cpu_kernels(False) if given.plain_kernels else contextlib.nullcontext():
            code = run(given, settings, record, console)
    except KeyboardInterrupt:
        raise Stopped("stopped; finished rows are in --out, if it was given", signal.SIGINT) from None
    if given.out is not None:
        console.print(f"numbers in {given.out}")
    return code


def _save(given: BenchArguments, record: dict[str, Any]) -> None:
    if given.out is not None:
        path = given.out if given.out.suffix == ".json" else given.out / "bench.json"
        make_folder(path.parent)
        save_json(path, record)


def _configure(given: BenchArguments) -> None:
    """Configure JAX before it is initialised: it reads these settings when it first looks for devices."""
    # Two frameworks share the GPU: by default JAX would take three quarters of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = os.environ.get("XLA_FLAGS", "")
    if given.smoke and given.device != "gpu" and "optimization_level" not in flags:
        # Much faster to compile, and the times mean nothing anyway.
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()
    with contextlib.suppress(RuntimeError):
        if given.device == "cpu":
            jax.config.update("jax_platforms", "cpu")


def _wanted(names: Iterable[str], only: Sequence[str]) -> list[str]:
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"--only {pattern}: no row matches; choose from: {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in only)]


def _rows(given: BenchArguments, settings: Settings, record: dict[str, Any], console: Console) -> int:
    rows = {row.name: row for row in (*operator_rows(settings), *network_rows(settings))}
    wanted = [matmul_row(settings), *(rows[name] for name in _wanted(rows, given.only))]
    torch, before, results = None, bench.load(), []
    record["load_before"] = before
    if given.against == "torch":
        torch = import_torch_adapter()
        torch.prepare(settings)
        torch.describe(record)
    if before and before[0] > 0.5 * (bench.cores_allowed() or 1):
        text = "do not trust the times: other programs run on this machine, and slow torch's threads most"
        console.print(f"load average {before[0]:.1f} before the start; {text}", style="bold yellow")
    for row in wanted:
        console.print(f"{row.name} ...", style="dim")
        results.append(run_row(row, settings, torch))
        # Every row starts with the device in the same state.
        jax.clear_caches()
        gc.collect()
        if torch:
            torch.release()
        for note in results[-1].notes:
            console.print(f"{row.name}: {note}")
        record |= {"load_after": bench.load(), "matmul_flops_per_s": matmul_rate(results)}
        # After every row, so that a stopped benchmark keeps its finished rows.
        _save(given, record | {"rows": [result.to_json() for result in results]})
    device, size = jax.devices()[0].device_kind if settings.on_gpu else "CPU", settings.image_size
    title = f"{device}, {settings.dtype}, batch {settings.batch_size}, images {size}x{size}, {settings.encoder}"
    title += f", medians of {settings.rounds}{' (smoke run: the times mean nothing)' * settings.smoke}"
    console.print(*bench_tables(results, title))
    console.print(
        "dropout is off on both sides; GFLOP/s are ours, 2 per multiply-add, a train step counted as 3 forward passes; "
        "p: planned by the compiler, not measured; first: compilation and first call, not in the times"
    )
    bad = [f"{result.row.name} ({result.status})" for result in results if result.status != "ok"]
    if bad:
        console.print(f"not timed: {', '.join(bad)}", style="bold red")
    return 1 if bad else 0


def _pipeline(given: BenchArguments, settings: Settings, record: dict[str, Any], console: Console) -> int:
    if given.pipeline not in RECIPES:
        raise unknown("recipe", given.pipeline, RECIPES)
    recipe = RECIPES[given.pipeline]
    if "--data.dir" in recipe.needs and given.data_dir is None:
        raise InputError(f"recipe {recipe.name} needs the folder of its data set; give --data-dir")
    config = replace(recipe.config, data=replace(recipe.config.data, dir=given.data_dir))
    rates = list(pipeline_rates(config, seconds=given.seconds or (0.2 if settings.smoke else 10.0)))
    console.print(pipeline_table(given.pipeline, rates))
    _save(given, record | {"pipeline": rates})
    return 0
