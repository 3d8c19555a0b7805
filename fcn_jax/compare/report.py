"""Comparisons and benchmarks as tables, JSON and a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fcn_jax.compare.bench import Result, SideResult
from fcn_jax.compare.parity import PARTS, Report, Row, first_over
from fcn_jax.paths import write_whole


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def _number(value: float | None) -> str:
    """Format a number with three significant digits; large ones have no decimals."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return table


def _arrays(title: str, rows: Sequence[Row], report: Report, ulp: bool = False, mark: bool = False) -> Table:
    """Make the table of some arrays, without empty columns."""
    off = [f"{report.ours} vs float64", f"{report.theirs} vs float64"]
    columns = {
        "shape": [" ".join(map(str, row.shape)) for row in rows],
        "error": [_error(row.error) + ("*" if row.of_global else "") for row in rows],
        "max abs": [_error(row.max_abs) for row in rows],
        "ULP median": [f"{row.ulp_median:.3g}" if ulp else "" for row in rows],
        "ULP max": [f"{row.ulp_max:.3g}" if ulp else "" for row in rows],
        off[0]: [_error(row.ours_off) for row in rows],
        off[1]: [_error(row.theirs_off) for row in rows],
        f"{report.theirs} memory formats": [_error(row.noise) for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    table = _table(title, "", *columns)
    over = first_over(list(rows), report.threshold) if mark else None
    for row, *cells in zip(rows, *columns.values(), strict=True):
        first = row.name + (f"  <- first over {report.threshold:g}" if row.name == over else "")
        table.add_row(first, *cells, style="bold red" if row.name == over else None)
    return table


def parity_tables(report: Report) -> Iterator[Table]:
    """Make one table for each part of a report."""
    for mode, rows in report.layers.items():
        yield _arrays(f"layers, {mode} mode: {report.ours} against {report.theirs}", rows, report, True, True)
    if report.predictions:
        table = _table("predictions", "mode", "pixel agreement", "KL mean", "KL max")
        for mode, each in report.predictions.items():
            table.add_row(mode, f"{each.agreement:.4%}", _error(each.kl_mean), _error(each.kl_max))
        yield table
    if report.loss is not None:
        yield _arrays("loss", [report.loss], report, True)
    if report.gradients:
        starred = any(row.of_global for row in report.gradients)
        note = " (* |x - y| over the norm of the whole gradient: a batch norm cancels this bias)" if starred else ""
        yield _arrays(f"gradients{note}", report.gradients, report)
    if report.statistics:
        yield _arrays("running statistics", report.statistics, report)
    if report.steps:
        columns = (f"loss {report.ours}", f"loss {report.theirs}", "loss error", "parameter error")
        table = _table("SGD", "step", *columns, "moved since step 1")
        for step in report.steps:
            errors = map(_error, (step.loss_error, step.error, step.moved))
            table.add_row(str(step.step), f"{step.ours:.9g}", f"{step.theirs:.9g}", *errors)
        yield table


def summary_table(reports: Sequence[Report]) -> Table:
    """Make the table of the largest errors, one row for each report."""
    table = _table("largest errors (name)", "pair", *PARTS)
    for report in reports:
        worst = [report.worst(part) for part in PARTS]
        cells = ["" if each is None else f"{_error(each[1])}\n{each[0]}" for each in worst]
        table.add_row(f"{report.ours} | {report.theirs}", *cells)
    return table


def save_figure(path: Path, reports: Sequence[Report]) -> None:
    """Plot the errors by depth (training mode) and by step of SGD; the logarithmic axis omits errors of 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.5), layout="constrained")
    depth, step = figure.subplots(1, 2)

    def plot(axes: Any, label: str, errors: Iterable[float | None]) -> None:
        values = [error or math.nan for error in errors]
        axes.plot(range(1, len(values) + 1), values, ".-", label=label)

    for report in reports:
        label = f"{report.ours} | {report.theirs}"
        rows = report.layers.get("train") or next(iter(report.layers.values()))
        depth.set_xticks(range(1, len(rows) + 1), [row.name for row in rows], rotation=90, fontsize=7)
        plot(depth, label, [row.error for row in rows])
        if rows[0].ours_off is not None:
            plot(depth, f"{report.ours} vs float64", [row.ours_off for row in rows])
            plot(depth, f"{report.theirs} vs float64", [row.theirs_off for row in rows])
        plot(step, f"{label}: parameters", [row.error for row in report.steps])
        plot(step, f"{label}: loss", [row.loss_error for row in report.steps])
    depth.axhline(reports[0].threshold, color="grey", linewidth=0.8, linestyle=":")
    depth.set(title="error by depth", xlabel="layer", ylabel="|x - y| / |y|", yscale="log")
    step.set(title="error by step of SGD", xlabel="step", yscale="log")
    for axes in (depth, step):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def matmul_rate(results: Sequence[Result]) -> float | None:
    """Return the machine's FLOP/s in the large matrix product, with the faster framework."""
    sides = [(r.row.flops or 0, side) for r in results if r.row.group == "machine" for side in r.sides.values()]
    return max((flops / side.median_s for flops, side in sides if side.samples_s), default=None)


def pool_sum(results: Sequence[Result]) -> tuple[float, float | None] | None:
    """Return the total seconds of all poolings, ours and torch's, if every one was timed."""
    pools = [result for result in results if result.row.name.startswith("pool-")]
    ours = [result.ours.median_s for result in pools if result.ours]
    theirs = [result.theirs[1].median_s for result in pools if result.theirs]
    return (sum(ours), sum(theirs) if len(theirs) == 5 else None) if len(ours) == 5 else None


def _memory(side: SideResult | None) -> str:
    if side and side.peak_bytes is not None:
        return _number(side.peak_bytes / 1e6)
    return f"{_number(side.planned_bytes / 1e6)} p" if side and side.planned_bytes is not None else ""


def _times(ours: float, theirs: float | None, by: str) -> list[str]:
    return [_number(ours * 1e3), _number(theirs and theirs * 1e3), by, _number(theirs and ours / theirs)]


def bench_tables(results: Sequence[Result], title: str) -> Iterator[Table]:
    """Make the tables of times and of memory and set-up; wrong and failed rows are marked."""
    columns = ("ours ms", "torch ms", "variant", "ours/torch", "GFLOP/s", "of matmul", "images/s", "error")
    times, rate, group = _table(title, "", *columns), matmul_rate(results), results[0].row.group
    first_call = ("ours MB", "torch MB", "ours first s", "torch first s")
    setup = _table("memory, and time to the end of the first call", "", *first_call)
    for result in results:
        if group != result.row.group:
            times.add_section()
        row, ours, group = result.row, result.ours, result.row.group
        error = "" if result.worst is None else f"{_error(result.worst[1])} {result.worst[0]}"
        if ours is None:
            times.add_row(row.name, result.status.upper(), *[""] * 6, error, style="bold red")
            continue
        by, theirs = result.theirs or ("", None)
        speed = row.flops / ours.median_s if row.flops else None
        share = f"{100 * speed / rate:.0f} %" if speed and rate else ""
        rates = (_number(speed and speed / 1e9), share, _number(row.images and row.images / ours.median_s))
        times.add_row(row.name, *_times(ours.median_s, theirs.median_s if theirs else None, by), *rates, error)
        if group == "networks":
            first = (_number(ours.first_s), _number(theirs.first_s if theirs else None))
            setup.add_row(row.name, _memory(ours), _memory(theirs), *first)
    if pools := pool_sum(results):
        times.add_section()
        times.add_row("pool-sum", *_times(*pools, ""), *[""] * 4)
    yield times
    if setup.row_count:
        yield setup


def pipeline_table(recipe: str, rates: Sequence[Mapping[str, Any]]) -> Table:
    """Make the table of an input pipeline's speed; see ``bench.pipeline_rates``."""
    table = _table(f"input pipeline of {recipe}", "workers", "images/s", "images/s per core", left=0)
    for rate in rates:
        table.add_row(str(rate["workers"]), _number(rate["images_per_s"]), _number(rate["images_per_core_s"]))
    return table


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record atomically; NaN and infinities become strings."""
    write_whole(path, json.dumps(json.loads(json.dumps(content), parse_constant=str), indent=2) + "\n")
