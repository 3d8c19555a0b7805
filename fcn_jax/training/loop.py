"""The training loop: its order of operations is the documentation.

resume > given weights > scratch; then step, log, validate, save, draw; the best and the last checkpoints stay.
Whatever ends the process, the same command resumes the run from what was saved and comes to the same end.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from rich.console import Console

from fcn_jax.config import Config
from fcn_jax.data.pipeline import EvalBatch, TrainIterator, make_eval_batches, make_train_iterator
from fcn_jax.devices import height_unit
from fcn_jax.errors import InputError, Stopped, first_line
from fcn_jax.evaluation.evaluate import Evaluation, Sample, evaluate, spread
from fcn_jax.evaluation.figures import save_confusion, save_curves, save_panel
from fcn_jax.evaluation.report import score_table
from fcn_jax.metrics import Scores
from fcn_jax.step import TrainState
from fcn_jax.training.checkpoint import Checkpoints, Restored, has_checkpoint, restore_newest
from fcn_jax.training.distributed import (
    Agreement,
    StopRequest,
    StopRequested,
    check_same,
    exit_on_error,
    from_writer,
    gather,
    is_writer,
    share,
    stop_request,
    writer_first,
)
from fcn_jax.training.logging import Events, Logger, profiled, progress_bar
from fcn_jax.training.report import save_examples, write_report
from fcn_jax.training.run import DatasetInfo, RunFolder
from fcn_jax.training.trainer import Trainer, make_trainer

_EXTREMES = 4
"""Images of the report with the lowest and with the highest mean IoU."""


def train(config: Config, console: Console, lengthen: bool = False) -> Scores:
    """Train as the config says, resuming what its run folder holds.

    Args:
        config: the whole run.
        console: where tables and the progress bar go.
        lengthen: the run in the folder may have been started with another length, see ``run.lengthened``.

    Returns:
        The scores of the last validation.

    Raises:
        InputError: the config cannot be run, the folder belongs to another run or is in use, its checkpoints are all
            damaged, something could not be written, or the loss is not finite. What was saved before stays good.
        Stopped: by SIGINT or SIGTERM, with the state saved.
    """
    folder = RunFolder(config.run, writes=is_writer())
    trainer = make_trainer(config, resuming=bool(from_writer(has_checkpoint(folder.checkpoints))))
    config = trainer.config
    dataset = DatasetInfo(trainer.train.dataset, trainer.train.class_names, trainer.train.palette)

    def say(message: str) -> None:
        console.print(message, highlight=False, markup=False)

    with folder.locked(), stop_request(say) as stop, _disk_errors(folder):
        writer_first(lambda: folder.start(config, dataset, lengthen))
        batches = make_train_iterator(trainer.train, config.data, config.train.batch_size, config.train.seed, **share())
        restored, notes = _restore(config, folder, trainer, batches)
        for note in (*trainer.notes, *notes):
            say(f"note: {note}")
        state, step = (restored.state, restored.step) if restored else (trainer.state, 0)
        if restored:
            say(f"resuming {config.run} at step {step}" + (", the last one" if step == trainer.length.steps else ""))
        evaluation: Evaluation | None = None
        with (
            closing(Events(folder.events if folder.writes else None, step)) as events,
            closing(
                Checkpoints(folder.checkpoints, config.train.keep_last, trainer.length.keep_every, folder.writes)
            ) as checkpoints,
            closing(batches),
            exit_on_error(),
            _disk_errors(folder),
        ):
            profile = config.profile if folder.writes else None
            if profile and not step < profile[0] <= trainer.length.steps:
                say(f"note: step {profile[0]} of --profile is not among the steps to come; nothing is traced")

            def traced() -> None:
                folder.upload()
                say(f"trace in {folder.path / 'profile'}: tensorboard --logdir there, with xprof installed")

            stop_wanted = Agreement(trainer.parallel.mesh)
            logger = Logger(folder, events, trainer, config, console, restored.progress if restored else {})

            def progress() -> dict[str, Any]:
                position, devices = json.loads(batches.get_state()), trainer.parallel.mesh.size
                return {"data": position, "devices": devices, **logger.progress()}

            def milestone() -> Evaluation:
                logger.flush(step)
                evaluation = validate(trainer, config, state, stop)
                logger.validation(step, evaluation)
                folder.upload()  # what a later start does not write again has to be there before the checkpoint
                checkpoints.save(state, progress(), evaluation.scores.mean_iu)
                title = f"step {step}, {config.data.val}"
                console.print(score_table(evaluation.scores, dataset.class_names, title))
                _save_figures(folder, evaluation, trainer)
                logger.restart_clock()
                return evaluation

            try:
                if restored and not restored.validated and trainer.length.is_milestone(step):
                    evaluation = milestone()
                elif step == trainer.length.steps:
                    evaluation = validate(trainer, config, state, stop)
                with (
                    progress_bar(console, trainer.length.steps, step, config.train.log_every) as advance,
                    profiled(trainer.parallel.step, folder.profile, profile, traced) as run_step,
                ):
                    while step < trainer.length.steps:
                        if stop_wanted(stop.number is not None):
                            raise StopRequested(stop.number or signal.SIGTERM)  # of another process
                        try:
                            batch = logger.waiting(lambda: next(batches))
                        except InputError:
                            if jax.process_count() == 1:  # otherwise nobody would take part in saving
                                stop.check()  # a worker that still starts ends by the signal that came for all
                                checkpoints.save_interrupted(state, progress())
                            raise
                        # Whatever else travels between host and device in a step is a mistake, and slow.
                        with jax.transfer_guard("disallow"):
                            placed = trainer.parallel.place_batch({key: batch[key] for key in ("image", "label")})
                            state, sums = run_step(step + 1, state, placed)
                        step += 1
                        logger.step(step, sums, batch["name"], advance)
                        if folder.writes and config.train.pictures_every and step % config.train.pictures_every == 0:
                            _save_training_picture(folder, trainer, state, batch, step)
                            logger.restart_clock()
                        if trainer.length.is_milestone(step):
                            evaluation = milestone()
            except StopRequested as request:
                folder.upload()
                checkpoints.save_interrupted(state, progress())
                raise Stopped(
                    f"stopped by {request} at step {step}, which is saved; the same command resumes there",
                    request.number,
                ) from None
            best = checkpoints.best_step()
        assert evaluation is not None  # the last step is a milestone
        _save_figures(folder, evaluation, trainer)
        say(f"best checkpoint: step {best}; figures in {folder.path / folder.figures.name}")
        if folder.writes:
            with _not_failing(config, say):
                save_examples(folder.local / "examples.json", evaluation, trainer.val.palette)
            folder.upload()
            with _not_failing(config, say):
                say(f"report: {write_report([config.run])}")
        return evaluation.scores


@contextmanager
def _not_failing(config: Config, say: Callable[[str], None]) -> Iterator[None]:
    """Turn an error of the report into a note: the run itself has ended well."""
    try:
        yield
    except Exception as error:
        say(f"note: the report is incomplete ({first_line(error)}); fcn-jax report {config.run} writes it again")


def validate(trainer: Trainer, config: Config, state: TrainState, stop: StopRequest | None = None) -> Evaluation:
    """Score the validation split with the current weights.

    Each process scores its share of the images; samples are of its own.

    Raises:
        StopRequested: in between, where ``stop`` says so and no other process is waiting for this one's counts.
    """
    divisor, batch_size = height_unit(trainer.parallel.mesh), config.train.eval_batch_size
    batches = make_eval_batches(trainer.val, config.data, batch_size, divisor=divisor, **share())
    if stop is not None and jax.process_count() == 1:
        batches = _until_stopped(stop, batches)
    own = len(trainer.val) // jax.process_count()  # images of the process that draws them, at least
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    evaluation = evaluate(trainer.predict, variables, batches, trainer.val.num_classes, spread(own), extremes=_EXTREMES)
    counts = gather(np.append(evaluation.confusion, evaluation.images)).sum(axis=0)
    return replace(evaluation, confusion=counts[:-1].reshape(evaluation.confusion.shape), images=int(counts[-1]))


def _until_stopped(stop: StopRequest, batches: Iterable[EvalBatch]) -> Iterator[EvalBatch]:
    for batch in batches:
        stop.check()
        yield batch


def _restore(
    config: Config, folder: RunFolder, trainer: Trainer, batches: TrainIterator
) -> tuple[Restored | None, list[str]]:
    """Read the newest checkpoint, set the data's position, cut the log to both; return what a user should know."""
    restored = restore_newest(folder.checkpoints, trainer.state, folder.writes)
    check_same({"the newest checkpoint": restored and restored.step})
    notes = list(restored.notes) if restored else []
    if restored:
        batches.set_state(json.dumps(restored.progress["data"]).encode())
        before, now = restored.progress["devices"], trainer.parallel.mesh.size
        if before != now:
            notes.append(f"saved with {before} devices, resumed with {now}: sums may differ in the last bits")
    elif sum(row["kind"] == "val" for row in folder.rows()) > 2:
        # Two may come before the first is written; with more, something was saved and is gone.
        raise InputError(
            f"{folder.path} has a log of several validations and no checkpoint in {folder.checkpoints}; "
            "bring one back from a copy, or train anew with another --run"
        )
    elif any(folder.rows()):
        notes.append("nothing was saved yet; starting from the beginning again, log included")
    step, validated = (restored.step, restored.validated) if restored else (0, True)
    damaged_rows = folder.drop_rows_after(step, with_validation=validated)
    if damaged_rows:
        notes.append(f"{damaged_rows} damaged rows of {folder.metrics_file} are left out")
    return restored, notes


@contextmanager
def _disk_errors(folder: RunFolder) -> Iterator[None]:
    """Turn an error of the disk into a line for the user."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or folder.path}: {error.strerror or error}; what was saved before is good: "
            "free some space or repair the disk; the same command resumes there"
        ) from error


def _save_figures(folder: RunFolder, evaluation: Evaluation, trainer: Trainer) -> None:
    if not folder.writes:
        return
    val = trainer.val
    save_curves(folder.figures / "curves.png", folder.rows())
    save_confusion(folder.figures / "confusion.png", evaluation.confusion, val.class_names)
    save_panel(folder.figures / "panel.png", evaluation.samples, val.palette, val.class_names)


def _save_training_picture(folder: RunFolder, trainer: Trainer, state: TrainState, batch: Any, step: int) -> None:
    """Draw labels and predictions of the batch just trained on, as gaussian37's notes do every 20 steps."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    predictions = trainer.predict(variables, batch["image"], batch["label"].shape[1:3])
    samples = list(map(Sample, batch["name"], batch["image"], batch["label"], predictions))[:6]
    save_panel(folder.figures / "train" / f"{step:07d}.png", samples, trainer.train.palette, trainer.train.class_names)
