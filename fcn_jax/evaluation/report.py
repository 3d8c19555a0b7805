"""Scores as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from fcn_jax.evaluation.evaluate import Views
from fcn_jax.metrics import Scores

__all__ = ["evaluation_name", "score_table"]


def score_table(scores: Scores, class_names: Sequence[str], title: str) -> Table:
    """Make a table of the four scores and each class's IoU, per cent with two decimals; nan where undefined."""
    table = Table(title=escape(title))
    table.add_column("score")
    table.add_column("per cent", justify="right")
    table.add_row("pixel accuracy", f"{100 * scores.pixel_accuracy:.2f}")
    table.add_row("mean accuracy", f"{100 * scores.mean_accuracy:.2f}")
    table.add_row("mean IoU", f"{100 * scores.mean_iu:.2f}")
    table.add_row("frequency weighted IoU", f"{100 * scores.frequency_weighted_iu:.2f}")
    table.add_section()
    for name, iu in zip(class_names, scores.per_class_iu, strict=True):
        table.add_row(f"IoU {escape(name)}", f"{100 * iu:.2f}")
    return table


def evaluation_name(split: str, views: Views, validation_split: str) -> str:
    """Name the files of an evaluation: "eval" for the plain one of the validation split, else by split and views."""
    parts = ["eval"] if split == validation_split else ["eval", split.replace("/", "-")]
    if views.flip:
        parts.append("flip")
    if views.scales != (1.0,):
        parts.append("-".join(["scales", *(f"{scale:g}" for scale in views.scales)]))
    return "_".join(parts)
