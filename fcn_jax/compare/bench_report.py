"""A run of the benchmark as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fcn_jax.compare.bench import OURS, Result
from fcn_jax.compare.collectives import StepCollectives
from fcn_jax.compare.operators import POOL_SUM
from fcn_jax.compare.pipeline import PipelineRate
from fcn_jax.errors import InputError

__all__ = ["collectives_table", "matmul_rate", "pipeline_table", "pool_sum", "save_json", "tables"]


def matmul_rate(results: Sequence[Result]) -> float | None:
    """Return the machine's FLOP/s: of the large matrix product, by whichever framework was faster."""
    rates = [
        result.row.flops / side.median_s
        for result in results
        if result.row.group == "machine" and result.row.flops
        for side in result.sides.values()
        if side.samples_s
    ]
    return max(rates, default=None)


def pool_sum(results: Sequence[Result]) -> tuple[float, float | None] | None:
    """Return the seconds of all pools together, ours and torch's, where every one was timed."""
    pools = [result for result in results if result.row.name.startswith("pool-")]
    ours = [result.ours.median_s for result in pools if result.ours]
    theirs = [result.theirs[1].median_s for result in pools if result.theirs]
    if len(pools) != 5 or len(ours) != 5:
        return None
    return sum(ours), sum(theirs) if len(theirs) == 5 else None


def _number(value: float | None, digits: int = 3) -> str:
    """Write a figure with three digits that mean something."""
    if value is None:
        return ""
    if not math.isfinite(value) or value == 0:
        return str(value)
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _memory(result: Result, name: str) -> str:
    side = result.sides.get(name)
    if side is None:
        return ""
    if side.peak_bytes is not None:
        return _number(side.peak_bytes / 1e6)
    return "" if side.planned_bytes is None else f"{_number(side.planned_bytes / 1e6)} p"


def _table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return made


def tables(results: Sequence[Result], title: str) -> Iterator[Table]:
    """Make the table of times, and that of memory and set-up; a row that is wrong or failed says so."""
    columns = ("", "ours ms", "torch ms", "torch by", "ours/torch", "GFLOP/s", "of matmul", "images/s", "error")
    times, rate, group = _table(title, columns), matmul_rate(results), None
    for result in results:
        if group not in (None, result.row.group):
            times.add_section()
        group = result.row.group
        times.add_row(*_times(result, rate), style=None if result.status == "ok" else "bold red")
    pools = pool_sum(results)
    if pools is not None:
        ours, theirs = pools
        ratio = None if theirs is None else ours / theirs
        times.add_section()
        times.add_row(POOL_SUM, _number(ours * 1e3), _number(theirs and theirs * 1e3), "", _number(ratio), *[""] * 4)
    yield times
    setup = _table(
        "memory, and time to the end of the first call", ("", "ours MB", "torch MB", "ours first s", "torch first s")
    )
    for result in results:
        if result.ours and result.row.group == "networks":
            name, first = (result.theirs[0], result.theirs[1].first_s) if result.theirs else ("", None)
            cells = (_memory(result, OURS), _memory(result, name), _number(result.ours.first_s), _number(first))
            setup.add_row(result.row.name, *cells)
    if setup.row_count:
        yield setup


def _times(result: Result, rate: float | None) -> list[str]:
    row, ours, theirs = result.row, result.ours, result.theirs
    error = "" if result.worst is None else f"{result.worst[1]:.1e} {result.worst[0]}"
    if ours is None:
        return [row.name, result.status.upper(), *[""] * 6, error]
    speed = row.flops / ours.median_s if row.flops else None
    return [
        row.name,
        _number(ours.median_s * 1e3),
        _number(theirs[1].median_s * 1e3) if theirs else "",
        theirs[0] if theirs else "",
        _number(ours.median_s / theirs[1].median_s) if theirs else "",
        _number(speed and speed / 1e9),
        f"{100 * speed / rate:.0f} %" if speed and rate else "",
        _number(row.images and row.images / ours.median_s),
        error,
    ]


def collectives_table(found: Sequence[tuple[str, StepCollectives]]) -> Table:
    """Make the table of what training steps exchange."""
    columns = ("network", "mode", "devices", "operations", "bytes", "gradient", "the rest")
    made = _table("collectives of a training step, bytes on one device", columns, left=2)
    for name, step in found:
        operations = ", ".join(f"{each.count} {each.kind}" for each in step.found) or "none"
        rest = f"{step.bytes - step.gradient_bytes:,}" if step.found else ""
        cells = (str(step.devices), operations, f"{step.bytes:,}", f"{step.gradient_bytes:,}", rest)
        made.add_row(name, step.mode, *cells)
    return made


def pipeline_table(recipe: str, rates: Sequence[PipelineRate]) -> Table:
    """Make the table of an input pipeline's speed."""
    made = _table(f"input pipeline of {recipe}", ("workers", "images/s", "images/s per core"), left=0)
    for rate in rates:
        made.add_row(str(rate.workers), _number(rate.images_per_s), _number(rate.images_per_core_s))
    return made


def _finite(value: Any) -> Any:
    """Replace what JSON has no word for by its name."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a record whole.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(_finite(content), indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}; name a file or folder that can be written to") from error
