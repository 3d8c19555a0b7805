"""Import order of the packages, and no heavy imports where they are not needed."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fcn_jax"
# A package or top-level module imports only those before it.
ORDER = [
    *(
        "errors",
        "paths",
        "chips",
        "download",
        "config",
        "recipes",
        "preprocessing",
        "models",
        "losses",
        "metrics",
        "optim",
        "step",
        "devices",
        "weights",
    ),
    *("data", "evaluation", "training", "pretrained", "export", "compare", "cli"),
]
HEAVY = "grain tensorflow_datasets orbax matplotlib cv2 torch tensorflow"


def name_of(path):
    return ".".join(["fcn_jax", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path):
    """Return the fcn_jax modules that a file imports, including imports inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fcn_jax":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found


def test_packages_import_only_earlier_packages():
    pairs = {(name, other) for name in MODULES for other in imports(MODULES[name])}
    pairs = {tuple(module.split(".")[1] for module in pair) for pair in pairs if "fcn_jax" not in pair}
    assert not [pair for pair in pairs if ORDER.index(pair[0]) < ORDER.index(pair[1])]


def test_there_are_no_circular_imports():
    graph = {name: imports(path) - {name} for name, path in MODULES.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the modules


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("fcn_jax, fcn_jax.models, fcn_jax.devices, fcn_jax.training.run", f"{HEAVY} tyro"),
        ("fcn_jax.weights", f"{HEAVY} tyro safetensors"),
        ("fcn_jax.cli.summary, fcn_jax.cli.port, fcn_jax.cli.export", HEAVY),
        ("fcn_jax.compare, fcn_jax.cli.bench, fcn_jax.cli.parity", HEAVY),
        ("fcn_jax.cli.train, fcn_jax.cli.eval", "torch tensorflow"),
    ],
)
def test_importing_a_module_loads_no_heavy_dependency(modules, absent):
    code = f"import sys, {modules}; print([name for name in {absent.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_filelock_is_not_needed_to_import_the_library_and_the_benchmark():
    code = "import sys; sys.modules['filelock'] = None; import fcn_jax, fcn_jax.training.run, fcn_jax.cli.bench"
    subprocess.run([sys.executable, "-c", code], check=True)  # JAX imports it where it is installed
