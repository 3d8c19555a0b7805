"""RUN/report.html: one or several runs in one self-contained file. Drawing libraries are imported when used."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fcn_jax import metrics
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import Evaluation, Sample
from fcn_jax.evaluation.figures import Palette, as_rgb, colour_labels
from fcn_jax.paths import write_whole
from fcn_jax.training.config_checks import flatten
from fcn_jax.training.run import RunFolder

_THUMBNAIL = 400
"""Pixels of a thumbnail's longer side at most."""
_COLOURS = ("#3a7ebf", "#d1605e", "#5aa469", "#9a6fb0", "#c98b2b", "#4f9da6", "#b0637f", "#7f7f7f")
"""Of runs; they can be read on white and on black."""
_GREY = "#808080"
"""Of axes and labels, for the same reason."""
_POINTS = 2000
"""Of a plot at most, of all its runs together; a page has 3 MB at most."""
_CELLS = 2000
"""Of the confusion matrices at most, of all runs together."""
_THROUGHPUT = ("images_per_s", "step_s", "data_wait", "mfu", "goodput")
_PICTURE = re.compile(r"data:image/(jpeg|png);base64,[A-Za-z0-9+/=]*")


@dataclass(frozen=True)
class _Validation:
    step: int
    split: str
    confusion: np.ndarray
    scores: metrics.Scores


@dataclass(frozen=True)
class _Run:
    """What a run's folder holds."""

    name: str
    colour: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    class_names: tuple[str, ...]
    palette: Palette
    train: list[dict[str, Any]]
    val: list[_Validation]
    evaluations: list[dict[str, Any]]
    examples: list[dict[str, Any]]


def write_report(runs: Sequence[str | Path], out: Path | None = None) -> Path:
    """Write the report of runs, and return where: ``out``, or report.html in the folder of the only run.

    Raises:
        InputError: a folder holds no run or no validation, or the report cannot be written.
    """
    from bokeh.embed import components
    from bokeh.resources import INLINE
    from jinja2 import Environment, PackageLoader

    folders = [RunFolder(run) for run in runs]
    read = [_read(folder, _COLOURS[index % len(_COLOURS)]) for index, folder in enumerate(folders)]
    plots = {
        "loss": _curves(read, "training loss", [_points(run.train, "loss") for run in read]),
        "scores": _curves(
            read, "validation mean IoU", [[(row.step, row.scores.mean_iu) for row in run.val] for run in read]
        ),
        "throughput": _curves(read, "images per second", [_points(run.train, "images_per_s") for run in read]),
    }
    matrices = {f"confusion{index}": _confusion(run, _CELLS // len(read)) for index, run in enumerate(read)}
    script, figures = components({**plots, **matrices})
    template = Environment(loader=PackageLoader("fcn_jax.training", ""), autoescape=True).get_template("report.html")
    text = template.render(
        runs=[_facts(run) for run in read],
        differences=_differences(read),
        classes=_classes(read),
        plots=[figures[name] for name in plots],
        matrices=[figures[name] for name in matrices],
        script=script,
        library=INLINE.js_raw[0],
    )
    target = out or folders[0].path / "report.html"
    try:
        write_whole(target, text)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}; give another --out") from error
    return target


def save_examples(file: Path, evaluation: Evaluation, palette: Palette) -> None:
    """Write thumbnails of the images that an evaluation ranked: a JSON list, the lowest mean IoU first."""
    write_whole(file, json.dumps([_example(sample, palette) for sample in evaluation.ranked]))


def _example(sample: Sample, palette: Palette) -> dict[str, Any]:
    import cv2

    h, w = sample.label.shape
    scale = min(1.0, _THUMBNAIL / max(h, w))
    size = max(1, round(w * scale)), max(1, round(h * scale))

    def uri(picture: np.ndarray, interpolation: int, suffix: str, *options: int) -> str:
        small = cv2.cvtColor(cv2.resize(picture, size, interpolation=interpolation), cv2.COLOR_RGB2BGR)
        data = base64.b64encode(cv2.imencode(suffix, small, options)[1].tobytes()).decode()
        return f"data:image/{suffix[1:]};base64,{data}"

    # Label maps have few colours and sharp edges, which PNG keeps in less space.
    maps = {"truth": sample.label, "prediction": sample.prediction}
    return {
        "name": sample.name,
        "mean_iu": sample.mean_iu,
        "image": uri(as_rgb(sample.image), cv2.INTER_AREA, ".jpeg", cv2.IMWRITE_JPEG_QUALITY, 80),
        **{name: uri(colour_labels(labels, palette), cv2.INTER_NEAREST, ".png") for name, labels in maps.items()},
    }


def _read(folder: RunFolder, colour: str) -> _Run:
    config, dataset = folder.read_config()
    rows = list(folder.rows())
    val = [made for row in rows if row["kind"] == "val" and (made := _validation(row, len(dataset.class_names)))]
    if not val:
        raise InputError(f"{folder.path} has no validation yet; resume the run until its first one")
    evaluations = []
    for file in sorted(folder.path.glob("eval*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(file.read_text())
            scores = {name: _number(saved["scores"][name]) for name in ("mean_iu", "pixel_accuracy")}
            evaluations.append({**{key: saved[key] for key in ("split", "views", "step", "images")}, "scores": scores})
    examples: list[dict[str, Any]] = []
    with suppress(OSError, ValueError, KeyError, TypeError):  # a run that has not ended, or of an older version
        examples = [_checked(example) for example in json.loads((folder.path / "examples.json").read_text())]
    environment = json.loads(folder.config_file.read_text()).get("environment")
    names = dataset.class_names
    return _Run(
        str(folder.path),
        colour,
        flatten(json.loads(json.dumps(asdict(config)))),
        environment if isinstance(environment, dict) else {},
        tuple(f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)),
        dataset.palette,
        [row for row in rows if row["kind"] == "train"],
        val,
        evaluations,
        examples,
    )


def _number(value: Any) -> float | None:
    """Return a number of a file, which may be damaged; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _validation(row: dict[str, Any], num_classes: int) -> _Validation | None:
    """Return a row of the log; None for a damaged one."""
    with suppress(KeyError, TypeError, ValueError):
        confusion = np.array(row["confusion"])
        if confusion.shape == (num_classes, num_classes) and confusion.dtype.kind == "i":
            return _Validation(row["step"], str(row["split"]), confusion, metrics.scores(confusion))
    return None


def _checked(example: dict[str, Any]) -> dict[str, Any]:
    """Return an example if its pictures are pictures. Raises ValueError, KeyError or TypeError otherwise."""
    for name in ("image", "truth", "prediction"):
        if not _PICTURE.fullmatch(example[name]):
            raise ValueError(name)
    return {**example, "name": str(example["name"]), "mean_iu": _number(example["mean_iu"])}


def _points(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], value) for row in rows if (value := _number(row.get(name))) is not None]


def _curves(runs: Sequence[_Run], title: str, curves: Sequence[Sequence[tuple[int, float]]]) -> Any:
    from bokeh.models import HoverTool
    from bokeh.plotting import figure

    options: dict[str, Any] = {"height": 280, "sizing_mode": "stretch_width", "tools": "pan,box_zoom,reset,save"}
    plot = figure(title=title, x_axis_label="step", **options)
    lines: list[Any] = []
    for run, points in zip(runs, curves, strict=True):
        every = 1 + len(points) * len(runs) // _POINTS
        shown = np.array(points, float).reshape(-1, 2)[::-every][::-1]  # the last one is among them
        columns = {"step": shown[:, 0], "value": shown[:, 1], "run": [run.name] * len(shown)}
        lines.append(plot.line("step", "value", source=columns, color=run.colour, line_width=2))
        if len(shown) < 50:
            plot.scatter("step", "value", source=columns, color=run.colour, size=5)
    tooltips = [("run", "@run"), ("step", "@step"), (title, "@value{0.0000}")]
    plot.add_tools(HoverTool(renderers=lines, tooltips=tooltips, mode="vline", line_policy="nearest"))
    return _readable(plot)


def _confusion(run: _Run, cells: int) -> Any:
    from bokeh.models import FactorRange
    from bokeh.plotting import figure
    from bokeh.transform import linear_cmap

    confusion, names = run.val[-1].confusion, run.class_names
    total = confusion.sum(1, keepdims=True)
    share = np.divide(confusion, total, out=np.zeros(confusion.shape), where=total > 0)
    smallest = max(0.001, np.sort(share, axis=None)[-cells:][0])
    truth, predicted = np.nonzero(share >= smallest)
    plot = figure(
        x_range=FactorRange(factors=[*names]),
        y_range=FactorRange(factors=[*names[::-1]]),
        height=min(900, 160 + 24 * len(names)), sizing_mode="stretch_width",
        x_axis_label="predicted", y_axis_label="truth", tools="save", toolbar_location=None,
        tooltips=[("truth", "@truth"), ("predicted", "@predicted"), ("of the class", "@share{0.0%}"), ("pixels", "@n")],
    )  # fmt: skip
    columns = {
        "truth": [names[i] for i in truth],
        "predicted": [names[i] for i in predicted],
        "share": share[truth, predicted],
        "n": confusion[truth, predicted],
    }
    fill = linear_cmap("share", "Blues256", 1, 0)
    plot.rect("predicted", "truth", 1, 1, source=columns, fill_color=fill, line_color=None)
    plot.xaxis.major_label_orientation = math.pi / 3
    return _readable(plot)


def _readable(plot: Any) -> Any:
    """Return a plot in colours for a light and a dark page."""
    plot.background_fill_alpha = plot.border_fill_alpha = 0
    plot.outline_line_color = plot.title.text_color = _GREY
    plot.axis.axis_line_color = plot.axis.major_tick_line_color = plot.axis.minor_tick_line_color = _GREY
    plot.axis.axis_label_text_color = plot.axis.major_label_text_color = _GREY
    plot.grid.grid_line_alpha = 0.15
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    return plot


def _facts(run: _Run) -> dict[str, Any]:
    """Return what the template shows of a run."""
    last, best = run.val[-1], max(run.val, key=lambda row: np.nan_to_num(row.scores.mean_iu, nan=-1))
    found = {name: [value for _, value in _points(run.train, name)] for name in _THROUGHPUT}
    throughput = {
        name: float(np.median(values) if name in ("images_per_s", "step_s") else values[-1])
        for name, values in found.items()
        if values
    }
    half = len(run.examples) // 2
    return {
        "name": run.name,
        "colour": run.colour,
        "model": f"{run.settings['model.name']} on {run.settings['data.train']}",
        "settings": run.settings,
        "environment": run.environment,
        "last": last,
        "best": best,
        "evaluations": run.evaluations,
        "throughput": throughput,
        "examples": {"lowest": run.examples[:half], "highest": run.examples[half:]},
    }


def _differences(runs: Sequence[_Run]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ, their folder aside."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "run")
    columns = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


def _classes(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """Return a row for each class of any run: its share of the pixels and each run's IoU and accuracy."""
    rows: dict[str, dict[str, Any]] = {}
    for index, run in enumerate(runs):
        confusion, scores = run.val[-1].confusion, run.val[-1].scores
        pixels = confusion.sum(1)
        accuracy = np.divide(confusion.diagonal(), pixels, out=np.full(len(pixels), np.nan), where=pixels > 0)
        for i, name in enumerate(run.class_names):
            colour = "#" + bytes(run.palette[i]).hex()
            row = rows.setdefault(name, {"name": name, "colour": colour, "runs": [None] * len(runs)})
            row["runs"][index] = {
                "iu": float(scores.per_class_iu[i]),
                "accuracy": float(accuracy[i]),
                "share": pixels[i] / max(1, pixels.sum()),
            }
    return [*rows.values()]
