"""Settings that hold for every test: eight CPU devices, float64 available, quick compilation, warnings are errors."""

import gc
import itertools
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM's optimisations take longer than they save on tiny networks. XLA's own passes stay on.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import jax  # noqa: E402  (the flags are read at import)
import pytest  # noqa: E402
from launch import reference  # noqa: E402, F401  (a fixture)
from small_recipes import easy  # noqa: E402, F401  (a fixture)
from tiny_run import heard, undisturbed  # noqa: E402, F401  (fixtures)

jax.config.update("jax_enable_x64", True)

_COMPILED = "FCN_JAX_TESTS_COMPILED"


def pytest_configure(config):
    """Share compiled programs between all tests and processes of this test run."""
    if not hasattr(config, "workerinput"):
        os.environ[_COMPILED] = tempfile.mkdtemp(prefix="fcn_jax_tests_")
    jax.config.update("jax_compilation_cache_dir", os.environ[_COMPILED])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_unconfigure(config):
    """Remove the compiled programs."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[_COMPILED], ignore_errors=True)


_MAPS = Path("/proc/self/maps")
_TESTS = itertools.count(1)


@pytest.fixture
def fails(capsys):
    """Check that a command gives exit code 2 and one error line that contains the given words."""
    from fcn_jax.cli.process import guarded

    def check(command, arguments, *named):
        capsys.readouterr()
        assert guarded(command, [str(argument) for argument in arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and all(str(word) in line for word in named), line

    return check


@pytest.fixture(autouse=True)
def few_programs():
    """Clear compiled programs now and then: Linux allows a process 65,530 mappings, and each program uses some."""
    yield
    if next(_TESTS) % 10 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()
