"""The training loop: its order of operations is the documentation.

resume > given weights > scratch; then step, log, validate, save, draw; the best and the last checkpoints stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fcn_jax.config import Config
from fcn_jax.data.datasets import Split
from fcn_jax.data.pipeline import make_eval_batches, make_train_iterator
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import Evaluation, Sample, evaluate, spread
from fcn_jax.evaluation.figures import save_confusion, save_curves, save_panel
from fcn_jax.metrics import Scores
from fcn_jax.runs import DatasetInfo, RunFolder, seconds_since_start
from fcn_jax.training.checkpoint import Checkpoints, has_checkpoint
from fcn_jax.training.setup import Trainer, make_trainer
from fcn_jax.training.step import StepSums, TrainState

__all__ = ["score_table", "train", "validate"]


def score_table(scores: Scores, class_names: tuple[str, ...], title: str) -> Table:
    """Lay the four scores and each class's IU out as a table, to the last digit; a class that is nowhere has nan."""
    table = Table(title=title)
    table.add_column("score")
    table.add_column("value", justify="right")
    for name in ("pixel_accuracy", "mean_accuracy", "mean_iu", "frequency_weighted_iu"):
        table.add_row(name.replace("_", " "), repr(getattr(scores, name)))
    table.add_section()
    for name, iu in zip(class_names, scores.per_class_iu, strict=True):
        table.add_row(f"IU {name}", repr(float(iu)))
    return table


def validate(trainer: Trainer, config: Config, state: TrainState) -> Evaluation:
    """Score the validation split with the current weights."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    batches = make_eval_batches(trainer.val, config.data, config.train.eval_batch_size)
    return evaluate(trainer.predict, variables, batches, trainer.val.num_classes, spread(len(trainer.val)))


def train(config: Config, console: Console) -> Scores:
    """Train as the config says, resuming what its run folder holds.

    Args:
        config: the whole run.
        console: where tables and the progress bar go.

    Returns:
        The scores of the last validation.

    Raises:
        InputError: the config cannot be run, or the folder belongs to another run.
    """
    from tensorboardX import SummaryWriter  # imports torch where that is installed, which only training should pay for

    folder = RunFolder(config.run)
    trainer = make_trainer(config, resuming=has_checkpoint(folder.checkpoints))
    info = DatasetInfo(trainer.train.dataset, trainer.train.class_names, trainer.train.palette)
    folder.start(config, info)
    for note in trainer.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    checkpoints = Checkpoints(folder.checkpoints, config.train.keep_last, trainer.length.keep_every)
    batches = make_train_iterator(trainer.train, config.data, config.train.batch_size, config.train.seed)
    state, step = trainer.state, 0
    saved = checkpoints.latest_step()
    if saved is not None:
        state, position = checkpoints.restore(saved, state)
        batches.set_state(position)
        step = saved
        console.print(f"resuming {config.run} at step {step}", highlight=False)
    folder.drop_rows_after(step)
    events = SummaryWriter(str(folder.events), purge_step=step or None)
    logger = _Logger(folder, events, trainer, config, console)
    evaluation = validate(trainer, config, state) if step == trainer.length.steps else None
    try:
        with _progress(console, trainer.length.steps, step, config.train.log_every) as advance:
            while step < trainer.length.steps:
                batch = logger.waiting(lambda: next(batches))
                # Whatever else travels between host and device in a step is a mistake, and slow.
                with jax.transfer_guard("disallow"):
                    state, sums = trainer.parallel.step(state, trainer.parallel.place_batch(batch))
                step += 1
                logger.step(step, sums, advance)
                if config.train.pictures_every and step % config.train.pictures_every == 0:
                    _save_training_picture(folder, trainer, state, batch, step)
                    logger.restart_clock()
                if trainer.length.is_milestone(step):
                    logger.flush(step)
                    evaluation = validate(trainer, config, state)
                    logger.validation(step, evaluation)
                    checkpoints.save(state, batches.get_state(), evaluation.scores.mean_iu)
                    console.print(score_table(evaluation.scores, info.class_names, f"step {step}, {config.data.val}"))
                    _save_figures(folder, evaluation, trainer.val)
                    logger.restart_clock()
    finally:
        checkpoints.close()
        batches.close()
        events.close()
    assert evaluation is not None  # the last step is a milestone
    _save_figures(folder, evaluation, trainer.val)
    console.print(f"best checkpoint: step {checkpoints.best_step()}; figures in {folder.figures}", highlight=False)
    return evaluation.scores


class _Logger:
    """Averages the loss between two rows without waiting for a step, and writes rows and events."""

    def __init__(self, folder: RunFolder, events: Any, trainer: Trainer, config: Config, console: Console):
        self._folder, self._events, self._trainer, self._config = folder, events, trainer, config
        self._console = console
        self._pending: list[StepSums] = []
        self._timed = 0
        self._waited = 0.0
        self._last: StepSums | None = None
        self._since: float | None = None

    def waiting(self, take: Callable[[], Any]) -> Any:
        """Take a batch and count the time that it took."""
        before = time.perf_counter()
        batch = take()
        self._waited += time.perf_counter() - before
        return batch

    def step(self, step: int, sums: StepSums, advance: Callable[..., None]) -> None:
        if self._since is None:
            # The first step of this process compiled; what follows is timed from its end.
            jax.block_until_ready(sums)
            self.restart_clock()
            first = seconds_since_start()
            self._events.add_scalar("time/first_step_s", first, step)
            self._console.print(f"first step {first:.1f} s after the start of the command", highlight=False)
        else:
            self._timed += 1
            # One step runs while the next batch is taken. With more steps ahead, a batch that comes late would hide
            # behind them, and the time waited for it would say nothing.
            jax.block_until_ready(self._last)
        self._last = sums
        self._pending.append(sums)
        if step % self._config.train.log_every == 0:
            row = self.flush(step)
            advance(step, row)
        else:
            advance(step, None)

    def restart_clock(self) -> None:
        """Leave out of the speed what was not training."""
        self._since, self._timed, self._waited = time.perf_counter(), 0, 0.0

    def flush(self, step: int) -> dict[str, Any] | None:
        """Write the mean of the losses since the last row."""
        if not self._pending:
            return None
        fetched = jax.device_get(self._pending)
        assert self._since is not None
        images, elapsed = self._timed * self._config.train.batch_size, time.perf_counter() - self._since
        speed = images / elapsed if images else None
        loss = float(np.mean([sums.loss for sums in fetched]))
        if not np.isfinite(loss):
            raise InputError(
                f"the loss is {loss} by step {step}; what was saved before stays in {self._folder.path}: "
                "try a lower --optim.lr, --optim.clip-norm or --optim.warmup-steps with another --run"
            )
        row = {
            "kind": "train",
            "step": step,
            "epoch": step / self._trainer.length.epoch,
            "loss": loss,
            "grad_norm": float(np.mean([sums.grad_norm for sums in fetched])),
            "lr": float(np.asarray(self._trainer.schedule(step - 1))),
            "images_per_s": speed,
            "data_wait": self._waited / elapsed if images else None,
        }
        self._pending = []
        self.restart_clock()
        self._folder.append(row)
        for name in ("loss", "grad_norm", "lr", "images_per_s", "data_wait"):
            if row[name] is not None:
                self._events.add_scalar(f"train/{name}", row[name], step)
        return row

    def validation(self, step: int, evaluation: Evaluation) -> None:
        scores = evaluation.scores.to_json()
        row = {"kind": "val", "step": step, "epoch": step / self._trainer.length.epoch, "split": self._config.data.val}
        self._folder.append({**row, "scores": scores, "confusion": evaluation.confusion.tolist()})
        for name, value in scores.items():
            if name != "per_class_iu" and value is not None:
                self._events.add_scalar(f"val/{name}", value, step)
        for name, iu in zip(self._trainer.val.class_names, scores["per_class_iu"], strict=True):
            if iu is not None:
                self._events.add_scalar(f"val_iu/{name}", iu, step)


@contextmanager
def _progress(console: Console, total: int, done: int, every: int) -> Iterator[Callable[..., None]]:
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[speed]} images/s  data {task.fields[wait]}  left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        task = progress.add_task("train", total=total, completed=done, loss="-", speed="-", wait="-")

        def advance(step: int, row: dict[str, Any] | None) -> None:
            fields: dict[str, Any] = {}
            if row is not None:
                speed = row["images_per_s"]
                fields = {"loss": f"{row['loss']:.4g}", "speed": "-" if speed is None else f"{speed:.1f}"}
                fields["wait"] = "-" if speed is None else f"{row['data_wait']:.0%}"
            progress.update(task, completed=step, **fields)
            # where no bar can be drawn, twenty lines say how far it is
            if fields and not console.is_terminal and step * 20 // total > (step - every) * 20 // total:
                console.print(
                    f"step {step}/{total}  loss {fields['loss']}  {fields['speed']} images/s  "
                    f"{fields['wait']} of it waiting for data",
                    highlight=False,
                )

        yield advance


def _save_figures(folder: RunFolder, evaluation: Evaluation, val: Split) -> None:
    save_curves(folder.figures / "curves.png", folder.rows())
    save_confusion(folder.figures / "confusion.png", evaluation.confusion, val.class_names)
    save_panel(folder.figures / "panel.png", evaluation.samples, val.palette, val.class_names)


def _save_training_picture(folder: RunFolder, trainer: Trainer, state: TrainState, batch: Any, step: int) -> None:
    """Draw labels and predictions of the batch just trained on, as seed 000 does every 20 steps."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    predictions = trainer.predict(variables, batch["image"], batch["label"].shape[1:3])
    rows = zip(batch["image"], batch["label"], predictions, strict=True)
    samples = [Sample("", *row) for row in list(rows)[:6]]
    save_panel(folder.figures / "train" / f"{step:07d}.png", samples, trainer.train.palette, trainer.train.class_names)
