"""Speed, side by side with PyTorch; torch is imported when a row against it is opened, not before."""

from fcn_jax.benchmarks.collectives import Collective, count_collectives, step_collectives
from fcn_jax.benchmarks.rows import Pair, Row, Runner
from fcn_jax.benchmarks.run import Result, run_row
from fcn_jax.benchmarks.settings import Settings, make_settings

__all__ = [
    "Collective",
    "Pair",
    "Result",
    "Row",
    "Runner",
    "Settings",
    "count_collectives",
    "make_settings",
    "run_row",
    "step_collectives",
]
