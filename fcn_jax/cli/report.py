"""`fcn-jax report`: one HTML file about one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fcn_jax.cli.process import check_file
from fcn_jax.errors import InputError
from fcn_jax.paths import to_path
from fcn_jax.training.report import write_report


@dataclass(frozen=True)
class ReportArguments:
    """Write one HTML file about one run, or about several side by side."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs, on a disk or at gs://BUCKET/..."""
    out: Path | None = None
    """The file; by default report.html in the folder of the only run."""


def main(arguments: Sequence[str]) -> int:
    """Write the report; the exit code."""
    given = tyro.cli(ReportArguments, prog="fcn-jax report", args=list(arguments))
    if not given.runs:
        raise InputError("expected the folder of a run, as in fcn-jax report runs/demo")
    if given.out is None and len(given.runs) > 1:
        raise InputError("the report of several runs needs a place of its own; give --out FILE.html")
    out = to_path(given.out, "--out") if given.out is not None else None
    if out is not None:
        if out.suffix != ".html":
            raise InputError(f"--out {out}: expected a name that ends in .html")
        check_file(out, "--out")
    print(f"report: {write_report(given.runs, out)}")
    return 0
