"""The pictures of a run: curves, confusion matrix, panels, label maps.

matplotlib is imported by what draws with it, so that label maps need OpenCV alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fcn_jax.evaluation.evaluate import Sample

__all__ = [
    "colour_labels",
    "overlay",
    "save_confusion",
    "save_curves",
    "save_overlay",
    "save_palette_png",
    "save_panel",
    "save_predictions",
]

Palette = Sequence[tuple[int, int, int]]
_VOID = (224, 224, 192)  # the colour of VOC's void border


def _table(palette: Palette) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[255] = _VOID
    return table


def colour_labels(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """Paint labels (h, w) in the palette's RGB colours, 255 in VOC's cream: uint8 (h, w, 3)."""
    return _table(palette)[labels]


def overlay(image: np.ndarray, labels: np.ndarray, palette: Palette, strength: float = 0.5) -> np.ndarray:
    """Blend an RGB image (h, w, 3) with the colours of its labels (h, w)."""
    return cv2.addWeighted(image, 1 - strength, colour_labels(labels, palette), strength, 0)


def save_palette_png(path: Path, labels: np.ndarray, palette: Palette) -> None:
    """Write labels (h, w) as a palette PNG whose indices are the class ids, as VOC's masks are."""
    from PIL import Image

    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(_table(palette).ravel().tolist())
    picture.save(path)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def save_curves(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Draw the loss and the validation scores by step from the rows of metrics.jsonl."""
    rows = list(rows)
    train = [row for row in rows if row["kind"] == "train"]
    val = [row for row in rows if row["kind"] == "val"]
    figure = _figure((10, 3.6))
    left, right = figure.subplots(1, 2)
    left.plot([row["step"] for row in train], [row["loss"] for row in train], linewidth=1)
    left.set(xlabel="step", ylabel="training loss")
    positive = [row["loss"] for row in train if row["loss"] and row["loss"] > 0]
    if positive and max(positive) > 20 * min(positive):
        left.set_yscale("log")
    for name in ("pixel_accuracy", "mean_accuracy", "mean_iu", "frequency_weighted_iu"):
        points = [(row["step"], row["scores"][name]) for row in val if row["scores"][name] is not None]
        right.plot(
            *zip(*points, strict=True) if points else ((), ()), marker="o", markersize=3, label=name.replace("_", " ")
        )
    right.set(xlabel="step", ylabel="validation score", ylim=(0, 1))
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _save(figure, path)


def save_confusion(path: Path, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """Draw a confusion matrix, each row divided by its pixels; rows are truth."""
    n = len(class_names)
    total = confusion.sum(1, keepdims=True)
    share = np.divide(confusion, total, out=np.zeros(confusion.shape), where=total > 0)
    side = max(4.0, 0.45 * n + 2)
    figure = _figure((side, side))
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(n), class_names, rotation=90, fontsize=8, parse_math=False)  # a name may hold any signs
    axes.set_yticks(range(n), class_names, fontsize=8, parse_math=False)
    axes.set(xlabel="predicted", ylabel="truth")
    for i, j in np.ndindex(n, n):
        if share[i, j] >= 0.005:
            colour = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    _save(figure, path)


def save_panel(path: Path, samples: Sequence[Sample], palette: Palette, class_names: Sequence[str]) -> None:
    """Draw image, truth and prediction of each sample below one another, with the classes that occur as a legend."""
    columns = [
        (sample.image, *(colour_labels(labels, palette) for labels in (sample.label, sample.prediction)))
        for sample in samples
    ]
    seen = {int(i) for sample in samples for i in np.unique((sample.label, sample.prediction))}
    _save_grid(path, columns, ("image", "truth", "prediction"), seen, palette, class_names)


def save_predictions(path: Path, samples: Sequence[Sample], palette: Palette, class_names: Sequence[str]) -> None:
    """Draw the predictions alone, in two rows: what can be shown of a set whose images may not be passed on."""
    maps = [colour_labels(sample.prediction, palette) for sample in samples]
    columns = [tuple(maps[i : i + 2]) for i in range(0, len(maps), 2)]
    seen = {int(i) for sample in samples for i in np.unique(sample.prediction)}
    _save_grid(path, columns, ("", ""), seen, palette, class_names)


def _save_grid(
    path: Path,
    columns: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    seen: Iterable[int],
    palette: Palette,
    class_names: Sequence[str],
) -> None:
    """Draw columns of pictures, a title before each row, and a legend of the classes seen."""
    from matplotlib.patches import Patch

    if not columns:
        return
    h, w = columns[0][-1].shape[:2]
    width = max(1.5, 12 / max(3, len(columns)))
    figure = _figure((width * len(columns), len(titles) * width * h / w))
    grid = figure.subplots(len(titles), len(columns), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=(), yticks=())
        axes.spines[:].set_visible(False)
    for axes_of, column in zip(grid.T, columns, strict=True):
        for axes, picture in zip(axes_of, column, strict=False):  # the last column may be short
            # An image that the network saw at another size than its label's fills the same cell.
            axes.imshow(picture, interpolation="nearest", extent=(0, w, h, 0))
    for axes, title in zip(grid[:, 0], titles, strict=True):
        axes.set_ylabel(title, fontsize=9)
    table = _table(palette) / 255
    patches = [
        Patch(facecolor=tuple(table[i]), edgecolor="grey", label=class_names[i] if i < len(class_names) else "void")
        for i in sorted(seen)
    ]
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.02, hspace=0.02)
    legend = figure.legend(
        handles=patches, loc="upper center", ncol=min(12, len(patches)), fontsize=8, bbox_to_anchor=(0.5, -0.01)
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, path)


def save_overlay(
    path: Path, image: np.ndarray, labels: np.ndarray, palette: Palette, class_names: Sequence[str]
) -> None:
    """Write the overlay of an RGB image (h, w, 3) and its labels (h, w)."""
    del class_names
    blended = overlay(image, labels, palette)
    if not cv2.imwrite(str(path), cv2.cvtColor(blended, cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path} could not be written; check the disk")
