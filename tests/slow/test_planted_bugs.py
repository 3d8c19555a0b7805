"""Bugs planted one at a time in a copy of the package: a quick test must find each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


DEVICES = "integration/test_devices.py", "pmap-2-1"
# Bug: file of the package, its code, the replacement, and the test (file, -k expression) that must fail.
BUGS = {
    "loss denominator": (
        "step.py", "sums, grads = jax.lax.psum((sums, grads), axis_name)", "grads = jax.lax.psum(grads, axis_name)",
        *DEVICES,
    ),
    "dropout ids": ("step.py", "jax.lax.axis_index(axis_name) * count", "0 * count", *DEVICES),
    "parts of an accumulated batch": (
        "step.py", "jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)",
        "x.reshape(accumulate, -1, *x.shape[1:])", "integration/test_devices.py", "interleaved_examples",
    ),
    "ignored label": ("losses.py", "valid = labels != IGNORE", "valid = labels >= 0", "unit/test_losses.py", ""),
    "class weights": (
        "losses.py", "return np.divide(median, frequency,", "return np.divide(frequency, median,",
        "unit/test_losses.py", "median",
    ),
    "schedule": ("optim.py", "poly_power, steps)", "poly_power, steps - 1)", "unit/test_optim.py", ""),
    "rate of biases": (
        "optim.py", 'config.bias_lr if names[-1] == "bias"', 'config.bias_lr if names[-1] != "bias"',
        "unit/test_optim.py", "",
    ),
    "data position": (
        "training/loop.py", 'batches.set_state(json.dumps(restored.progress["data"]).encode())',
        "batches.set_state(batches.get_state())", "integration/test_reliability.py", "stops_after_the_step",
    ),
    "log truncation": (
        "training/run.py", 'return row["step"] < step or', "return True or",
        "integration/test_checkpoint.py", "rows_after_a_step",
    ),
    "checkpoint checksum": (
        "training/checkpoint.py", "wrong = [name for name in items if checksums",
        "wrong = [name for name in () if checksums", "integration/test_damage.py", "flipped_bit",
    ),
    "device sharding": (
        "devices.py", "np.reshape(x, (local, -1, *x.shape[1:]))",
        "np.reshape(x, (-1, local, *x.shape[1:])).swapaxes(0, 1)", *DEVICES,
    ),
    "running variance": (
        "models/layers.py", "return mean, var, var * (count / max(count - 1, 1))", "return mean, var, var",
        "unit/test_layers.py", "",
    ),
    "statistics of all devices": (
        "models/layers.py", "mean = jax.lax.pmean(mean, self.compute.axis_name)", "mean = mean + 0", *DEVICES,
    ),
    "pooling tie": (
        "models/kernels.py", "first = jnp.where(a == y, 0, jnp.where(b == y, 1, jnp.where(c == y, 2, 3)))",
        "first = jnp.where(c == y, 2, jnp.where(b == y, 1, jnp.where(a == y, 0, 3)))", "unit/test_layers.py", "",
    ),
    "crop offset": (
        "models/fcn.py", "_crop(skip, at_pool3, x.shape[1:3])", "_crop(skip, at_pool3 - 1, x.shape[1:3])",
        "parity/test_models_against_torch.py", "pad100",
    ),
    "layout transpose": (
        "weights/names.py", "value.transpose((2, 3, 0, 1) if parameter.transposed else (2, 3, 1, 0))",
        "value.transpose((2, 3, 0, 1) if parameter.transposed else (3, 2, 1, 0))", "unit/test_weights.py", "",
    ),
    "padding of many sizes": (
        "evaluation/padding.py", "return _cut(call(_cut(args[0], conv_rows, conv_columns)), conv_rows, conv_columns)",
        "return call(_cut(args[0], conv_rows, conv_columns))", "unit/test_padding.py", "",
    ),
    "tile context": (
        "evaluation/predict.py", "return -(-(reach + 4 * 32) // 32) * 32", "return 32", "unit/test_predict.py", "",
    ),
    "process sharding": (
        "data/pipeline.py", "parts[process_index::process_count]", "parts[0::process_count]",
        "unit/test_data_pipeline.py", "",
    ),
    "EXIF orientation": (
        "data/io.py", "_decode(data, cv2.IMREAD_COLOR, name",
        "_decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, name", "unit/test_data_io.py", "",
    ),
    "palette indices": (
        "data/io.py", "label = np.asarray(image)", 'label = np.asarray(image.convert("L"))', "unit/test_data_io.py", "",
    ),
    "exit code": ("cli/process.py", '{error}", 2', '{error}", 1', "integration/test_cli.py", "invalid_training"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name, tmp_path):
    file, right, wrong, test, expression = BUGS[name]
    for folder in ("fcn_jax", "tests", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for other in ("pyproject.toml", "train.py", "eval.py", "README.md"):
        shutil.copy(ROOT / other, tmp_path / other)
    path = tmp_path / "fcn_jax" / file
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{test}", "-k", expression]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-1000:]  # 1: tests failed
    print(next(line for line in done.stdout.splitlines() if line.startswith("FAILED")))
