"""Run folders with a log, scores and example images, without training."""

import dataclasses
import json

import numpy as np

from fcn_jax.config import Config, OptimConfig
from fcn_jax.evaluation.evaluate import evaluate
from fcn_jax.metrics import scores
from fcn_jax.training.report import save_examples
from fcn_jax.training.run import DatasetInfo, RunFolder

CLASSES = DatasetInfo("<script>set", ("background", "<b>disc", "star"), ((0, 0, 0), (200, 0, 0), (0, 0, 200)))
CONFUSION = np.array([[900, 50, 50], [30, 270, 0], [0, 40, 60]])


def make_batch(count=12):
    """Images of which image i is wrong in i of its 12 rows."""
    label = np.zeros((count, 12, 16), np.uint8)
    label[:, :, 8:] = 1
    return {
        "image": np.random.default_rng(0).integers(0, 256, (count, 12, 16, 3), np.uint8),
        "label": label,
        "name": [f"image{i}" for i in range(count)],
        "valid": np.ones(count, bool),
    }


def predict_with_errors(variables, images, size):
    predictions = make_batch()["label"]
    for i, prediction in enumerate(predictions):
        prediction[:i] = 1 - prediction[:i]
    return predictions


def evaluate_examples(**options):
    return evaluate(predict_with_errors, {}, [make_batch()], 3, **options)


def make_run(path, lr=0.1, examples=True, classes=CLASSES, confusion=CONFUSION, train_rows=10):
    folder = RunFolder(path)
    with folder.locked():
        folder.start(dataclasses.replace(Config(run=str(path)), optim=OptimConfig(lr=lr)), classes)
    rows = [
        {"kind": "train", "step": 10 * i, "loss": lr / (10 * i), "images_per_s": 20.0 + 10 * i, "step_s": 0.5}
        for i in range(1, train_rows + 1)
    ]
    folder.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (50, 100):
        row = {"kind": "val", "step": step, "split": "shapes/val", "scores": scores(confusion * step).to_json()}
        folder.append({**row, "confusion": (confusion * step).tolist()})
    if examples:
        save_examples(folder.path / "examples.json", evaluate_examples(extremes=2), CLASSES.palette)
    return folder.path
