"""A comparison as tables, JSON and a figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fcn_jax.compare.compare import PARTS, Report, Row, first_over
from fcn_jax.errors import InputError

__all__ = ["save_figure", "save_json", "summary_table", "tables"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _rows(title: str, rows: Sequence[Row], report: Report, *, ulp: bool, mark: bool = False) -> Table:
    """Make the table of some arrays; columns that no row fills are left out."""
    off, noise = any(r.ours_off is not None for r in rows), any(r.noise is not None for r in rows)
    columns = ["", "shape", "error", "max abs"] + (["ULP median", "ULP max"] if ulp else [])
    columns += [f"{report.ours} off float64", f"{report.theirs} off float64"] if off else []
    columns += [f"{report.theirs}'s two formats"] if noise else []
    table = _table(title, *columns)
    over = first_over(list(rows), report.threshold) if mark else None
    for row in rows:
        cells = [row.name, " ".join(map(str, row.shape)), _number(row.error) + ("*" if row.of_global else "")]
        cells += [_number(row.max_abs)] + ([f"{row.ulp_median:.3g}", f"{row.ulp_max:.3g}"] if ulp else [])
        cells += [_number(row.ours_off), _number(row.theirs_off)] if off else []
        cells += [_number(row.noise)] if noise else []
        if row.name == over:
            cells[0] += f"  <- first over {report.threshold:g}"
        table.add_row(*cells, style="bold red" if row.name == over else None)
    return table


def tables(report: Report) -> Iterable[Table]:
    """Make one table for each part of a report."""
    for mode, rows in report.layers.items():
        yield _rows(f"layers, {mode} mode: {report.ours} against {report.theirs}", rows, report, ulp=True, mark=True)
    if report.loss is not None:
        yield _rows("loss", [report.loss], report, ulp=True)
    if report.gradients:
        starred = any(row.of_global for row in report.gradients)
        note = " (* |x - y| over the norm of the whole gradient: a batch norm cancels this bias)" if starred else ""
        yield _rows(f"gradients{note}", report.gradients, report, ulp=False)
    if report.statistics:
        yield _rows("running statistics", report.statistics, report, ulp=False)
    if report.steps:
        columns = ("loss error", "parameters' error", "moved since step 1")
        table = _table("SGD", "step", f"loss {report.ours}", f"loss {report.theirs}", *columns)
        for step in report.steps:
            errors = map(_number, (step.loss_error, step.error, step.moved))
            table.add_row(str(step.step), f"{step.ours:.9g}", f"{step.theirs:.9g}", *errors)
        yield table


def summary_table(reports: Sequence[Report]) -> Table:
    """Make the table of the largest errors, one row for each report."""
    table = _table("largest errors (name)", "pair", *PARTS)
    for report in reports:
        cells = []
        for part in PARTS:
            worst = report.worst(part)
            cells.append("" if worst is None else f"{_number(worst[1])}\n{worst[0]}")
        table.add_row(f"{report.ours} | {report.theirs}", *cells)
    return table


def _writable(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be made: {error.strerror or error}") from error
    return path


def save_json(path: Path, reports: Sequence[Report], about: dict[str, Any]) -> None:
    """Write {**about, "reports": [...]}, see ``Report.to_json``.

    Raises:
        InputError: the folder cannot be made.
    """
    content = {**about, "reports": [report.to_json() for report in reports]}
    _writable(path).write_text(json.dumps(content, indent=2) + "\n")


def save_figure(path: Path, reports: Sequence[Report]) -> None:
    """Draw the errors by depth (training mode) and by step of SGD; an error of 0 is not on the logarithmic axis.

    Raises:
        InputError: the folder cannot be made.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.5), layout="constrained")
    depth, step = figure.subplots(1, 2)
    for report in reports:
        label = f"{report.ours} | {report.theirs}"
        rows = report.layers.get("train") or next(iter(report.layers.values()))
        lines = {label: [row.error for row in rows]}
        if len(reports) == 1 and rows[0].ours_off is not None:
            lines[f"{report.ours} off float64"] = [row.ours_off or 0.0 for row in rows]
            lines[f"{report.theirs} off float64"] = [row.theirs_off or 0.0 for row in rows]
        for name, errors in lines.items():
            depth.plot([e or float("nan") for e in errors], ".-", label=name)
        if len(reports) == 1:
            depth.set_xticks(range(len(rows)), [row.name for row in rows], rotation=90, fontsize=7)
        numbers = [s.step for s in report.steps]
        step.plot(numbers, [s.error or float("nan") for s in report.steps], ".-", label=f"{label}: parameters")
        if len(reports) == 1:
            step.plot(numbers, [s.loss_error or float("nan") for s in report.steps], ".--", label=f"{label}: loss")
    depth.axhline(reports[0].threshold, color="grey", linewidth=0.8, linestyle=":")
    depth.set(title="error by depth", xlabel="layer", ylabel="|x - y| / |y|", yscale="log")
    step.set(title="error by step of SGD", xlabel="step", yscale="log")
    for axes in (depth, step):
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=7)
    figure.savefig(_writable(path), dpi=110)
