"""Imports go one way, and what a bare accelerator image lacks is not imported by the rooms that have to run there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fcn_jax"
# A room imports only rooms above it.
ORDER = [
    "errors", "config", "recipes", "runs", "arguments", "process", "preprocessing", "models", "metrics", "weights",
    "data", "evaluation", "training", "numerics", "benchmarks", "cli_port", "cli_parity", "cli_bench", "cli_sprint",
    "cli",
]  # fmt: skip

BARE_IMAGE_LACKS = "grain tensorflow_datasets orbax tyro tensorflow tensorboardX safetensors scipy cv2 PIL matplotlib"


def _room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fcn_jax":
            if node.module == "fcn_jax":
                yield from (f"fcn_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fcn_jax")


def test_rooms_import_only_rooms_above_them():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = _room("fcn_jax." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        if room == "__init__":
            continue
        for module in _imports(path):
            if ORDER.index(_room(module)) > ORDER.index(room):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("fcn_jax", "grain tensorflow_datasets orbax tyro torch tensorflow"),
        (
            "fcn_jax.models, fcn_jax.metrics, fcn_jax.weights, fcn_jax.data.transforms, fcn_jax.training.losses, "
            "fcn_jax.training.optim, fcn_jax.training.step, fcn_jax.training.parallel",
            "grain tensorflow_datasets orbax tyro torch tensorflow",
        ),
        ("fcn_jax.numerics, fcn_jax.cli", "torch tensorflow"),
        ("fcn_jax.benchmarks, fcn_jax.cli_bench", BARE_IMAGE_LACKS + " torch"),
    ],
)
def test_importing_does_not_pull_in(modules, absent):
    code = f"import sys, {modules}; print([name for name in {absent.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_benchmark_runs_where_only_jax_flax_optax_numpy_rich_and_torch_are():
    blocked = f"import sys; sys.modules.update(dict.fromkeys({BARE_IMAGE_LACKS.split()}))"
    code = f"{blocked}; from fcn_jax.cli_bench import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--smoke", "--device", "cpu", "--only", "pool-4x4*", "inference-fcn8s"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "inference-fcn8s" in done.stdout
