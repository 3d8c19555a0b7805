"""The figures of a run: curves, confusion matrix, panels, label maps. Drawing libraries are imported on first use."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcn_jax.evaluation.evaluate import Sample

Palette = Sequence[tuple[int, int, int]]
_VOID = (224, 224, 192)  # the colour of VOC's void border


def _table(palette: Palette) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[255] = _VOID
    return table


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Return an image of any channels and bits as uint8 (h, w, 3): the first three rescaled, or the first as grey.

    8-bit RGB is returned unchanged.
    """
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return image
    shown = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    low, high = np.percentile(shown, (1, 99))
    return np.rint((shown - low) * (255 / max(high - low, 1))).clip(0, 255).astype(np.uint8)


def colour_labels(labels: np.ndarray, palette: Palette) -> np.ndarray:
    """Return labels (h, w) in the palette's RGB colours, with 255 in VOC's cream: uint8 (h, w, 3)."""
    return np.take(_table(palette), labels, axis=0)


def overlay(
    image: np.ndarray, labels: np.ndarray, palette: Palette, class_names: Sequence[str], name: str = ""
) -> np.ndarray:
    """Blend an image (h, w, c) equally with the colours of its labels, except for "background".

    Its name is written at the bottom, and a colour legend of its classes at the top.
    """
    import cv2
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    image = np.ascontiguousarray(as_rgb(image))
    background = [i for i, class_name in enumerate(class_names) if class_name == "background"]
    blended = cv2.addWeighted(image, 0.5, colour_labels(labels, palette), 0.5, 0)
    cv2.copyTo(image, np.isin(labels, background).astype(np.uint8), blended)
    picture = Image.fromarray(blended)
    draw, (h, w) = ImageDraw.Draw(picture), labels.shape
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", max(10, h // 32))
    line, side = sum(font.getmetrics()) + 2, font.size
    shown = [int(i) for i in np.unique(labels) if i < len(class_names) and i not in background]
    for row, index in enumerate(shown[: max(0, h // (2 * line))]):  # at most half of the height
        text, y = _printable(class_names[index]), row * line
        draw.rectangle((0, y, min(w, side + 9 + draw.textlength(text, font)), y + line - 1), (0, 0, 0))
        draw.rectangle((3, y + 3, side, y + side), tuple(palette[index]))
        draw.text((side + 6, y), text, (255, 255, 255), font)
    if name:
        name = _printable(name)
        left = min(3, w - 3 - draw.textlength(name, font))  # the end of a long name is more informative
        _, top, right, _ = draw.textbbox((left, h - 3), name, font, anchor="lb")
        draw.rectangle((left - 3, top - 3, right + 3, h), (0, 0, 0))
        draw.text((left, h - 3), name, (255, 255, 255), font, anchor="lb")
    return np.asarray(picture)


def save_class_scores(path: Path, class_names: Sequence[str], scores: Mapping[str, np.ndarray]) -> None:
    """Draw a grouped bar chart of ``scores``: score names to fractions of each class, (num_classes,)."""
    figure = _figure((7, 1 + 0.35 * len(class_names)))
    axes = figure.subplots()
    rows, height = np.arange(len(class_names)), 0.8 / len(scores)
    for index, (name, values) in enumerate(scores.items()):
        axes.barh(rows + (index + 0.5) * height - 0.4, np.nan_to_num(values), height, label=name)
    axes.set_yticks(rows, class_names, parse_math=False)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(scores))
    _save(figure, path)


def thumbnail(sample: Sample, side: int = 240) -> Sample:
    """Return a sample resized so that its longer side has ``side`` pixels."""
    import cv2

    factor = side / max(sample.label.shape)
    size = tuple(max(1, round(length * factor)) for length in reversed(sample.label.shape))
    image = cv2.resize(as_rgb(sample.image), size, interpolation=cv2.INTER_AREA)
    label = cv2.resize(sample.label, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return Sample(sample.name, image, label, label)


def save_sheet(path: Path, samples: Sequence[Sample], palette: Palette, class_names: Sequence[str]) -> None:
    """Write a contact sheet: thumbnails with label overlays, four per row."""
    from PIL import Image

    columns, side = 4, max(max(sample.label.shape) for sample in samples)
    pictures = [overlay(each.image, each.label, palette, class_names, each.name) for each in samples]
    height = max(len(picture) for picture in pictures)
    sheet = np.full((height * -(-len(pictures) // columns), side * columns, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = height * (index // columns), side * (index % columns)
        sheet[top : top + len(picture), left : left + picture.shape[1]] = picture
    Image.fromarray(sheet).save(path)


def save_palette_png(path: Path, labels: np.ndarray, palette: Palette) -> None:
    """Write labels (h, w) as a palette PNG whose indices are the class ids, like VOC's masks."""
    from PIL import Image

    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(_table(palette).ravel().tolist())
    picture.save(path)


def _printable(name: str) -> str:
    """Return a name with unprintable characters replaced, so that it fits on one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names may contain characters that matplotlib's font lacks
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
        right.plot(*np.reshape(points, (-1, 2)).T, marker="o", markersize=3, label=name.replace("_", " "))
    right.set(xlabel="step", ylabel="validation score", ylim=(0, 1))
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _save(figure, path)


def save_confusion(path: Path, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """Draw a confusion matrix, normalised by row; rows are the ground truth."""
    n = len(class_names)
    total = confusion.sum(1, keepdims=True)
    share = np.divide(confusion, total, out=np.zeros(confusion.shape), where=total > 0)
    side = max(4.0, 0.45 * n + 2)
    figure = _figure((side, side))
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(n), class_names, rotation=90, fontsize=8, parse_math=False)  # a name may contain $
    axes.set_yticks(range(n), class_names, fontsize=8, parse_math=False)
    axes.set(xlabel="predicted", ylabel="truth")
    for i, j in np.ndindex(n, n):
        if share[i, j] >= 0.005:
            colour = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    _save(figure, path)


def save_panel(path: Path, samples: Sequence[Sample], palette: Palette, class_names: Sequence[str]) -> None:
    """Draw a column for each sample with its name, image, ground truth and prediction, and a legend of classes."""
    if not samples:
        return
    seen = {int(i) for sample in samples for labels in (sample.label, sample.prediction) for i in np.unique(labels)}
    figure, grid = _grid([sample.label.shape for sample in samples], ("image", "truth", "prediction"))
    for column, sample in zip(grid.T, samples, strict=True):
        _title(column[0], sample.name)
        h, w = sample.label.shape
        maps = (colour_labels(labels, palette) for labels in (sample.label, sample.prediction))
        for axes, picture in zip(column, (as_rgb(sample.image), *maps), strict=True):
            # The image may have been resized for the network, unlike its label.
            axes.imshow(picture, interpolation="nearest", extent=(0, w, h, 0))
    _legend(figure, seen, palette, class_names)
    _save(figure, path)


def save_predictions(path: Path, samples: Sequence[Sample], palette: Palette, class_names: Sequence[str]) -> None:
    """Draw only the predictions, in two rows, for data sets whose images must not be published."""
    if not samples:
        return
    seen = {int(i) for sample in samples for i in np.unique(sample.prediction)}
    shapes = [sample.prediction.shape for sample in samples]
    widest = [max(shapes[i : i + 2], key=lambda shape: shape[1] / shape[0]) for i in range(0, len(shapes), 2)]
    figure, grid = _grid(widest, ("", ""), gap=0.25)
    for axes, sample in zip(grid.T.flat, samples, strict=False):  # the last column may be short
        _title(axes, sample.name)
        axes.imshow(colour_labels(sample.prediction, palette), interpolation="nearest")
    _legend(figure, seen, palette, class_names)
    _save(figure, path)


def _grid(shapes: Sequence[tuple[int, ...]], rows: Sequence[str], gap: float = 0.03) -> tuple[Any, np.ndarray]:
    """Make a figure with a column for each shape (h, w) and titled rows, ``gap`` inches apart."""
    ratios = [min(4.0, max(0.25, w / h)) for h, w in shapes]
    height = min(4.0, 12 / max(3.0, sum(ratios)))
    figure = _figure((height * sum(ratios), len(rows) * height))
    grid = figure.subplots(len(rows), len(ratios), squeeze=False, width_ratios=ratios)
    for axes in grid.flat:
        axes.set(xticks=(), yticks=())
        axes.spines[:].set_visible(False)
    for axes, title in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(title, fontsize=9)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.02, hspace=gap / height)
    return figure, grid


def _title(axes: Any, name: str) -> None:
    """Write a name above an image; cut off its start if it is wider than the image."""
    fits = max(4, int(axes.get_window_extent().width / 6.5))
    name = _printable(name if len(name) <= fits else "..." + name[3 - fits :])
    axes.set_title(name, fontsize=8, parse_math=False)


def _legend(figure: Any, seen: Iterable[int], palette: Palette, class_names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    table = _table(palette) / 255
    names = {**dict.fromkeys(seen, "void"), **dict(enumerate(class_names))}
    patches = [Patch(facecolor=tuple(table[i]), edgecolor="grey", label=names[i]) for i in sorted(seen)]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.01)}
    legend = figure.legend(handles=patches, ncol=min(12, len(patches)), fontsize=8, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)
