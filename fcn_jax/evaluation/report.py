"""Score table of an evaluation, and the names of its files."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from rich.markup import escape
from rich.table import Table

from fcn_jax.evaluation.evaluate import PLAIN, Views
from fcn_jax.metrics import Scores, mean_of_defined


def score_table(scores: Scores, class_names: Sequence[str], title: str, boundary: np.ndarray | None = None) -> Table:
    """Return a table of the four scores and the IoU of each class, in per cent; "-" if a score is undefined.

    ``boundary`` is the boundary IoU of each class, or None to omit it.
    """
    table = Table(title=escape(title))
    table.add_column("score")
    table.add_column("per cent", justify="right")

    def add(name: str, value: float) -> None:
        table.add_row(name, "-" if math.isnan(value) else f"{100 * value:.2f}")

    def add_each(score: str, values: np.ndarray) -> None:
        table.add_section()
        for name, value in zip(class_names, values, strict=True):
            add(f"{score} {escape(name)}", value)

    add("pixel accuracy", scores.pixel_accuracy)
    add("mean accuracy", scores.mean_accuracy)
    add("mean IoU", scores.mean_iu)
    add("frequency weighted IoU", scores.frequency_weighted_iu)
    add("mean Dice", mean_of_defined(scores.per_class_dice))
    if boundary is not None:
        add("mean boundary IoU", mean_of_defined(boundary))
    add_each("IoU", scores.per_class_iu)
    if boundary is not None:
        add_each("boundary IoU", boundary)
    return table


def evaluation_name(split: str, views: Views, validation_split: str | None) -> str:
    """Return the stem of an evaluation's files: "eval" for the run's validation split and plain views.

    Others are named like "eval_camvid-test" or "eval_camvid-test_flip_scales-0.75-1-1.25". Splits are DATASET/SPLIT.
    """
    if split == validation_split and views == PLAIN:
        return "eval"
    scales = [] if views.scales == PLAIN.scales else ["-".join(["scales", *(f"{scale:g}" for scale in views.scales)])]
    return "_".join(["eval", re.sub(r"[^\w.-]", "-", split), *["flip"] * views.flip, *scales])
