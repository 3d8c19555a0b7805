"""How many images a second a recipe's input pipeline gives, with nobody in its way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fcn_jax.config import Config

__all__ = ["PipelineRate", "pipeline_rates"]


@dataclass(frozen=True)
class PipelineRate:
    """What one number of workers gives."""

    workers: int
    """Processes; 0: threads of this one."""
    batches: int
    images_per_s: float
    images_per_core_s: float | None
    """By the processor time of this process; not known where workers do the work."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def pipeline_rates(config: Config, workers: Sequence[int] = (0, 2), seconds: float = 10.0) -> Iterator[PipelineRate]:
    """Take training batches as fast as they come: decoded, augmented and stacked.

    Args:
        config: its data, batch size and seed.
        workers: numbers of worker processes to try.
        seconds: how long to take batches, after the first ten.

    Raises:
        InputError: the data cannot be read.
    """
    from fcn_jax.data.datasets import load  # grain and tfds, which the other benchmarks do without
    from fcn_jax.data.pipeline import make_train_iterator

    split = load(config.data.train, config.data)
    for count in workers:
        data = replace(config.data, workers=count)
        stream = make_train_iterator(split, data, config.train.batch_size, config.train.seed)
        try:
            for _ in range(10):  # workers start, buffers fill
                next(stream)
            wall, processor, batches = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - wall < seconds:
                next(stream)
                batches += 1
            images = batches * config.train.batch_size
            used = time.process_time() - processor
            per_core = images / used if count == 0 else None
            yield PipelineRate(count, batches, images / (time.perf_counter() - wall), per_core)
        finally:
            stream.close()
