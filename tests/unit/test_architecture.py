"""Imports go one way, and packages import nothing heavy that they do not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fcn_jax"
# A package imports only those before it.
ORDER = [
    "errors", "config", "recipes", "preprocessing", "models", "losses", "metrics", "optim", "step", "weights", "data",
    "evaluation", "training", "arguments", "compare", "cli",
]  # fmt: skip


def _package(module):
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


def test_packages_import_only_those_before_them():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        package = _package("fcn_jax." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        if package == "__init__":
            continue
        for module in _imports(path):
            if ORDER.index(_package(module)) > ORDER.index(package):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("fcn_jax", "grain tensorflow_datasets orbax tyro torch tensorflow"),
        (
            "fcn_jax.models, fcn_jax.metrics, fcn_jax.weights, fcn_jax.data.transforms, fcn_jax.losses, "
            "fcn_jax.optim, fcn_jax.step, fcn_jax.training.devices",
            "grain tensorflow_datasets orbax tyro torch tensorflow",
        ),
        ("fcn_jax.weights", "torch safetensors"),
        ("fcn_jax.compare, fcn_jax.cli", "torch tensorflow"),
    ],
)
def test_importing_does_not_pull_in(modules, absent):
    code = f"import sys, {modules}; print([name for name in {absent.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
