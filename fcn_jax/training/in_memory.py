"""Training from memory, in one go: the short way for a set of some hundred images on one machine.

Network, transforms, loss, optimiser and step are those of ``loop``. There are no checkpoints, so that a run which is
stopped starts anew; in return it needs jax, flax, optax, NumPy and an image decoder alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import numpy as np

from fcn_jax.config import Config
from fcn_jax.data.batches import count_classes
from fcn_jax.data.memory import MemorySplit, eval_batches, train_batches
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import PLAIN, Evaluation, Views, evaluate, make_predictor, spread
from fcn_jax.models import init_variables, model_from_config
from fcn_jax.training.build import build_loss, build_step, check_share, run_length
from fcn_jax.training.check import check_config
from fcn_jax.training.optim import make_optimizer, make_schedule
from fcn_jax.training.parallel import make_mesh, make_parallel, pick_devices
from fcn_jax.training.step import StepSums, new_state

__all__ = ["Row", "Score", "TrainedInMemory", "check_in_memory", "make_score", "train_in_memory"]

Row = dict[str, Any]
"""As a row of metrics.jsonl."""
Score = Callable[[Mapping[str, Any], MemorySplit, Views], Evaluation]
"""(variables, split, views) -> its scores; a program is compiled for each views and image size, once."""


@dataclass(frozen=True)
class TrainedInMemory:
    """What a run leaves behind."""

    variables: Mapping[str, Any]
    rows: tuple[Row, ...]
    steps: int
    seconds: float
    """In steps, data included; without the first, which compiles, and without validations."""
    images_per_second: float | None
    """None where there was one step alone."""


def check_in_memory(config: Config) -> None:
    """Raise InputError where a config is out of range or asks for what is not done here."""
    check_config(config)
    for name in ("init", "init_from", "distributed", "num_processes", "process_id"):
        if getattr(config, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} is not for training from memory, on one machine and from scratch: use train.py")


def make_score(config: Config, num_classes: int) -> Score:
    """Make the function that scores a split as the config says, on all devices; samples are kept of six images."""
    model = model_from_config(config.model, num_classes)
    mesh = make_mesh(pick_devices(config.devices))

    @cache
    def predictor(views: Views) -> Any:
        return make_predictor(model, config.data.preprocessing, mesh, views)

    def score(variables: Mapping[str, Any], split: MemorySplit, views: Views = PLAIN) -> Evaluation:
        data = config.data if views == PLAIN else replace(config.data, eval_multiple=1)
        batches = eval_batches(split, data, config.train.eval_batch_size)
        return evaluate(predictor(views), variables, batches, split.num_classes, spread(len(split)))

    return score


def train_in_memory(
    config: Config,
    train: MemorySplit,
    val: MemorySplit,
    score: Score,
    say: Callable[[str], None],
    keep: Callable[[Sequence[Row]], None] = lambda rows: None,
) -> TrainedInMemory:
    """Train as the config says, from scratch, and validate every ``eval_every`` epochs.

    Args:
        config: the whole run; ``data.workers`` counts threads. What belongs to checkpoints and pictures is not read.
        train: what to train on.
        val: what to validate on, of the same classes.
        score: from ``make_score``.
        say: takes a line for the user.
        keep: takes all rows so far after each validation.

    Raises:
        InputError: the config cannot be run, or a loss is not finite.
    """
    check_in_memory(config)
    devices = pick_devices(config.devices)
    check_share(config, len(devices))
    length = run_length(replace(config, train=replace(config.train, keep_every=None)), len(train))
    model = model_from_config(config.model, train.num_classes, config.train.remat)
    size = config.data.crop_size or config.data.input_size or (64, 64)
    variables = init_variables(model, jax.random.key(config.train.seed), size)
    optimizer = make_optimizer(variables["params"], config.optim, length.steps, config.model.freeze_encoder)
    schedule = jax.jit(make_schedule(config.optim, length.steps))
    labels = (example["label"] for example in train.examples)
    loss = build_loss(config.loss, train.dataset, train.num_classes, lambda: count_classes(labels, train.num_classes))
    parallel = make_parallel(config.parallel, build_step(config, model, optimizer, loss), devices)
    state = parallel.place_state(new_state(variables, optimizer, config.train.seed))

    rows: list[Row] = []
    pending: list[StepSums] = []
    timed, seconds, since = 0, 0.0, 0.0
    start, said = time.perf_counter(), 0
    with closing(train_batches(train, config.data, config.train.batch_size, config.train.seed)) as batches:
        for step in range(1, length.steps + 1):
            batch = next(batches)
            arrays = {"image": batch["image"], "label": batch["label"]}
            state, sums = parallel.step(state, parallel.place_batch(arrays))
            pending.append(sums)
            if step == 1:
                float(schedule(0))  # compiled here as well, outside of what is timed
                jax.block_until_ready(sums)
                since = time.perf_counter()
                say(f"first step after {since - start:.1f} s; {length.steps} in all")
            else:
                timed += 1
            milestone = length.is_milestone(step)
            if step % config.train.log_every and not milestone:
                continue
            rows.append(_row(step, pending, float(schedule(step - 1)), config.train.nonfinite))
            seconds += time.perf_counter() - since
            pending = []
            line = f"step {step}/{length.steps}  loss {rows[-1]['loss']:.4g}"
            line += f"  {_rate(timed, config, seconds):.1f} images/s" if timed else ""
            if milestone:
                scores = score({"params": state.params, "batch_stats": state.batch_stats}, val, PLAIN).scores
                rows.append({"kind": "val", "step": step, "scores": scores.to_json()})
                keep(rows)
                line += f"  val mean IU {scores.mean_iu:.4f}"
            if milestone or step >= said + length.steps / 20:
                say(line)
                said = step
            since = time.perf_counter()
    return TrainedInMemory(
        variables={"params": state.params, "batch_stats": state.batch_stats},
        rows=tuple(rows),
        steps=length.steps,
        seconds=seconds,
        images_per_second=_rate(timed, config, seconds) if timed else None,
    )


def _rate(steps: int, config: Config, seconds: float) -> float:
    return steps * config.train.batch_size / seconds


def _row(step: int, pending: Sequence[StepSums], lr: float, nonfinite: str) -> Row:
    """Average the finite steps since the last row; this waits for them."""
    fetched = jax.device_get(pending)
    losses = [float(sums.loss) for sums in fetched if sums.finite]
    skipped = len(fetched) - len(losses)
    if skipped and (nonfinite == "stop" or not losses):
        raise InputError(
            f"the loss or its gradient is not finite in {skipped} of {len(fetched)} steps up to step {step}; "
            "set a lower --optim.lr or --optim.clip-norm"
        )
    return {"kind": "train", "step": step, "loss": float(np.mean(losses)), "lr": lr, "skipped": skipped}
