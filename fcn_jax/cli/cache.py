"""`fcn-jax cache`: list or remove what is cached on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from fcn_jax.config import DataConfig
from fcn_jax.data.prepared import cached, empty


@dataclass(frozen=True)
class CacheArguments:
    """List the prepared copies of data sets and the compiled programs, or remove them."""

    empty: bool = False
    """Remove everything listed; it is prepared or compiled again when needed."""
    cache_dir: str = DataConfig.cache_dir
    """Folder of the cache, as --data.cache-dir in training."""


def main(arguments: Sequence[str]) -> int:
    """List or empty the cache of prepared data sets and compiled programs."""
    given = tyro.cli(CacheArguments, prog="fcn-jax cache", args=list(arguments))
    rows = cached(given.cache_dir)
    table = Table("content", title=given.cache_dir)
    for column in ("images or programs", "MB", "days since its last change"):
        table.add_column(column, justify="right")
    for row in rows:
        days = (time.time() - row.changed) / 86_400
        table.add_row(row.name, f"{row.count:,}", f"{row.size / 1e6:,.1f}", f"{days:,.1f}")
    table.add_section()
    table.add_row("total", "", f"{sum(row.size for row in rows) / 1e6:,.1f}", "")
    Console().print(table)
    if given.empty:
        empty(given.cache_dir)
        print(f"removed {len(rows)} entries")
    return 0
