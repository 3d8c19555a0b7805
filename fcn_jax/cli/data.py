"""`fcn-jax data`: check a data set and show statistics and examples."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fcn_jax.cli.process import OutputPath, make_folder
from fcn_jax.config import Config, DataConfig
from fcn_jax.data.datasets import Split, decode, load
from fcn_jax.evaluation.evaluate import Sample, spread
from fcn_jax.evaluation.figures import save_sheet, thumbnail
from fcn_jax.losses import IGNORE
from fcn_jax.training.config_checks import check_config, check_readers

_SMALLEST = 32
"""Images with a side below this have a single row or column at stride 32."""
_ONE_CLASS = 0.5
"""Masks with a single class are suspicious if less than this share of the masks has one."""
_NAMED = 5


@dataclass(frozen=True)
class DataArguments:
    """Check the images and masks of a split, prepare its copy, and show its sizes, classes and some examples."""

    split: tyro.conf.Positional[str]
    """DATASET/SPLIT, as in folder/train."""
    out: OutputPath | None = None
    """Folder for data.json and sheet.png, a contact sheet with masks; by default both are left out."""
    data: Annotated[DataConfig, tyro.conf.arg(name="data")] = field(default_factory=DataConfig)


def main(arguments: Sequence[str]) -> int:
    """Check and show a split; the exit code."""
    given = tyro.cli(DataArguments, prog="fcn-jax data", args=list(arguments))
    if given.out is not None:
        make_folder(given.out)
    check_config(Config(data=given.data))
    check_readers(given.data, given.split)
    split = load(given.split, given.data)
    facts, samples = examine(split)
    _show(given.split, split, facts)
    if given.out is not None:
        (given.out / "data.json").write_text(json.dumps(facts, indent=2) + "\n")
        save_sheet(given.out / "sheet.png", samples, split.palette, split.class_names)
        print(f"statistics in {given.out / 'data.json'}, examples in {given.out / 'sheet.png'}")
    return 0


def examine(split: Split) -> tuple[dict[str, Any], list[Sample]]:
    """Return statistics of a split, as JSON types, and some examples (with the labels in place of predictions)."""
    pixels, images = np.zeros((2, split.num_classes), np.int64)
    sizes: Counter[str] = Counter()
    by_content: defaultdict[bytes, list[str]] = defaultdict(list)
    small, unlabelled, single = [], [], []
    ignored, samples, shown = 0, [], spread(len(split), 24)
    for index in range(len(split)):
        record = split.source[index]
        by_content[hashlib.sha256(record["image"]).digest()].append(record["name"])
        example = decode(record)
        label, name = example["label"], example["name"]
        counts = np.bincount(label.ravel(), minlength=256)
        found = counts[: split.num_classes]
        pixels += found
        images += found > 0
        ignored += int(counts[IGNORE])
        sizes["{1}x{0}".format(*label.shape)] += 1
        if min(label.shape) < _SMALLEST:
            small.append(name)
        if not found.any():
            unlabelled.append(name)
        if np.count_nonzero(found) == 1:
            single.append(name)
        if index in shown:
            samples.append(thumbnail(Sample(name, example["image"], label, label)))
    total = max(1, int(pixels.sum()))
    classes = {
        name: {"images": int(count), "share": float(each / total)}
        for name, count, each in zip(split.class_names, images, pixels, strict=True)
    }
    suspicious = {
        "not readable": list(split.skipped),
        "the same image twice": [", ".join(names) for names in by_content.values() if len(names) > 1],
        f"a side below {_SMALLEST} pixels": small,
        "no labelled pixel": unlabelled,
        "a single class": single if len(single) < _ONE_CLASS * len(split) else [],
        "a class without pixels": [name for name, row in classes.items() if not row["images"]],
    }
    return {
        "images": len(split),
        "sizes": dict(sizes.most_common()),
        "ignored": ignored / (total + ignored),
        "classes": classes,
        "suspicious": {what: names for what, names in suspicious.items() if names},
    }, samples


def _show(spec: str, split: Split, facts: dict[str, Any]) -> None:
    console = Console()
    sizes = list(facts["sizes"].items())
    shown = ", ".join(f"{size} ({count})" for size, count in sizes[:_NAMED])
    more = f" and {len(sizes) - _NAMED} more" if len(sizes) > _NAMED else ""
    console.print(
        f"{spec}: {facts['images']} images, {shown}{more}; ignored pixels {facts['ignored']:.1%}", highlight=False
    )
    table = Table("class", "images", "share of pixels")
    for (name, row), color in zip(facts["classes"].items(), split.palette, strict=True):
        block = "[rgb({},{},{})]\u2588\u2588[/]".format(*color)
        table.add_row(f"{block} {escape(name)}", str(row["images"]), f"{row['share']:.2%}")
    console.print(table)
    for what, names in facts["suspicious"].items():
        listed = "; ".join(names[:_NAMED]) + (f"; and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        console.print(f"suspicious: {what}: {listed}", highlight=False, markup=False)
