"""Settings that hold for every test: eight CPU devices, float64 available, quick compilation, warnings are errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM's optimisations take longer than the tiny networks of the tests save; XLA's own passes stay on.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import jax  # noqa: E402  (the flags are read at import)

jax.config.update("jax_enable_x64", True)
