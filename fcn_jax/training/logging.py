"""Logging of a run: rows of metrics.jsonl, TensorBoard events, profiler traces, the progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fcn_jax.config import Config
from fcn_jax.evaluation.evaluate import Evaluation
from fcn_jax.step import StepSums
from fcn_jax.training.distributed import AgreedError
from fcn_jax.training.run import RunFolder, seconds_since_start
from fcn_jax.training.trainer import Trainer

T = TypeVar("T")

_MOST_SKIPPED = 20
"""Consecutive skipped steps after which a run stops: non-finite parameters never recover."""
_NAMES = 32
"""Number of a batch's images that an error names."""


TIMES = ("step_s", "data_wait", "mfu", "goodput")
"""Fields of a row: seconds per step; the share of them spent waiting for data; model FLOPs utilisation; the share of
the time since the command's start that was spent in steps and not waiting for data."""
_UPLOAD_EVERY = 60
"""Seconds between uploads of the log to an object store, in addition to those before each checkpoint."""


class Events:
    """TensorBoard events. Write errors are ignored, since metrics.jsonl has the same values.

    tensorboardX's own ``SummaryWriter`` writes in a thread, and blocks forever once a full disk has ended it.
    """

    def __init__(self, folder: Path | None, step: int):
        """Start a file in the folder for a run that starts or resumes at ``step``; it supersedes events of later steps.

        Without a folder nothing is written.
        """
        self._writer: Any = None
        if folder is None:
            return
        # imports torch if it is installed, which is slow
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        self._event, self._scalar = event_pb2.Event, scalar
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        if step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(wall_time=time.time(), step=step, session_log=start))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write a number under a name."""
        if self._writer is not None:
            self._write(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))

    def _write(self, event: Any) -> None:
        with suppress(OSError):
            self._writer.write_event(event)

    def flush(self) -> None:
        """Flush the file to disk."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


class Logger:
    """Averages the loss over the steps between rows, and writes rows and events, without waiting for a step."""

    def __init__(
        self,
        folder: RunFolder,
        events: Events,
        trainer: Trainer,
        config: Config,
        console: Console,
        progress: Mapping[str, Any],
    ):
        """Continue from the ``progress`` of an interrupted run; it is empty for a new one."""
        self._folder, self._events, self._trainer, self._config = folder, events, trainer, config
        self._console = console
        self._fetched = list(progress.get("unlogged", ()))
        self._pending: list[tuple[int, StepSums, Sequence[str]]] = []
        self._in_a_row = progress.get("skipped_in_a_row", 0)
        self._timed = 0
        self._waited = 0.0
        self._in_steps = 0.0
        self._last: StepSums | None = None
        self._since: float | None = None

    def waiting(self, take: Callable[[], Any]) -> Any:
        """Call ``take`` for a batch, and count its time as waiting for data."""
        before = time.perf_counter()
        batch = take()
        self._waited += time.perf_counter() - before
        return batch

    def step(self, step: int, sums: StepSums, names: Sequence[str], advance: Callable[..., None]) -> None:
        """Record a step on the images with these names, and write a row if one is due.

        Raises:
            InputError: a step since the last row was not finite, and the run has to stop.
        """
        if self._since is None:
            # The first step of this process includes compilation; timing starts after it.
            jax.block_until_ready(sums)
            self.restart_clock()
            first = seconds_since_start()
            self._events.add_scalar("time/first_step_s", first, step)
            self._console.print(f"first step {first:.1f} s after the start of the command", highlight=False)
        else:
            self._timed += 1
            # One step runs while the next batch is loaded. With more steps queued, a late batch would hide behind them,
            # and the time spent waiting for it would mean nothing.
            jax.block_until_ready(self._last)
        self._last = sums
        self._pending.append((step, sums, names))
        if step % self._config.train.log_every == 0:
            row = self.flush(step)
            advance(step, row)
        else:
            advance(step, None)

    def restart_clock(self) -> None:
        """Restart the timing of steps, to exclude time that was not training."""
        self._since, self._timed, self._waited = time.perf_counter(), 0, 0.0

    def progress(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON: the steps since the last row, and the skipped steps before it."""
        return {"unlogged": self._unlogged(), "skipped_in_a_row": self._in_a_row}

    def _unlogged(self) -> list[dict[str, Any]]:
        """Return the steps since the last row: step, loss, grad_norm, finite, names."""
        for step, sums, names in self._pending:
            loss, norm, finite = jax.device_get((sums.loss, sums.grad_norm, sums.finite))
            values = {"loss": float(loss), "grad_norm": float(norm), "finite": bool(finite)}
            self._fetched.append({"step": step, **values, "names": list(names)})
        self._pending = []
        return self._fetched

    def flush(self, step: int) -> dict[str, Any] | None:
        """Write a row with the means over the finite steps since the last row.

        Raises:
            InputError: a step was not finite and the run has to stop, or 20 consecutive steps were not.
        """
        steps = self._unlogged()
        if not steps:
            return None
        finite = [each for each in steps if each["finite"]]
        for each in steps:
            self._in_a_row = 0 if each["finite"] else self._in_a_row + 1
            if self._in_a_row and (self._config.train.nonfinite == "stop" or self._in_a_row == _MOST_SKIPPED):
                raise self._diverged(each)
        assert self._since is not None
        images, elapsed = self._timed * self._config.train.batch_size, time.perf_counter() - self._since
        row: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "epoch": step / self._trainer.length.epoch,
            "loss": float(np.mean([each["loss"] for each in finite])) if finite else None,
            "grad_norm": float(np.mean([each["grad_norm"] for each in finite])) if finite else None,
            "lr": self._lr(step),
            "skipped": len(steps) - len(finite),
            "images_per_s": images / elapsed if images else None,
            **self._times(elapsed),
        }
        self._fetched = []
        self.restart_clock()
        self._folder.append(row)
        for name in ("loss", "grad_norm", "lr", "skipped", "images_per_s", *TIMES):
            if row[name] is not None:
                self._events.add_scalar(f"train/{name}", row[name], step)
        self._folder.upload(every=_UPLOAD_EVERY)
        return row

    def _times(self, elapsed: float) -> dict[str, float | None]:
        """Return ``TIMES`` for the steps of the last ``elapsed`` seconds."""
        if not self._timed:
            return dict.fromkeys(TIMES)
        self._in_steps += elapsed - self._waited
        step_s, least = elapsed / self._timed, self._trainer.least_step_s
        mfu = None if least is None else least / step_s
        goodput = self._in_steps / seconds_since_start()
        return {"step_s": step_s, "data_wait": self._waited / elapsed, "mfu": mfu, "goodput": goodput}

    def _lr(self, step: int) -> float:
        return float(np.asarray(self._trainer.schedule(step - 1)))

    def _diverged(self, step: dict[str, Any]) -> AgreedError:
        names = ", ".join(step["names"][:_NAMES]) + (", ..." if len(step["names"]) > _NAMES else "")
        return AgreedError(
            f"step {step['step']}: loss {step['loss']:g} with a gradient of norm {step['grad_norm']:g}, at learning "
            f"rate {self._lr(step['step']):g}, on {names}; the update was discarded, and earlier "
            f"checkpoints in {self._folder.path} are good: continue with --train.nonfinite skip, or try a lower "
            "--optim.lr, --optim.clip-norm or --optim.warmup-steps with another --run"
        )

    def validation(self, step: int, evaluation: Evaluation) -> None:
        """Write the row and events of a validation."""
        scores = evaluation.scores.to_json()
        row = {"kind": "val", "step": step, "epoch": step / self._trainer.length.epoch, "split": self._config.data.val}
        self._folder.append({**row, "scores": scores, "confusion": evaluation.confusion.tolist()})
        for name, value in scores.items():
            if isinstance(value, float):
                self._events.add_scalar(f"val/{name}", value, step)
        for name, iu in zip(self._trainer.val.class_names, scores["per_class_iu"], strict=True):
            if iu is not None:
                self._events.add_scalar(f"val_iu/{name}", iu, step)
        self._events.flush()


@contextmanager
def profiled(
    step: Callable[..., T], folder: Path, steps: tuple[int, int] | None, done: Callable[[], None]
) -> Iterator[Callable[..., T]]:
    """Trace some steps for TensorBoard's profiler; yields ``step`` with the step number as an extra first argument.

    Args:
        step: runs one step.
        folder: folder of the trace.
        steps: first and last step to trace; None: no trace.
        done: called once the trace is written.
    """
    first, last = steps or (0, 0)
    tracing = False

    def stop() -> None:
        nonlocal tracing
        if tracing:
            jax.profiler.stop_trace()
            tracing = False
            done()

    def run(number: int, *arguments: Any) -> T:
        nonlocal tracing
        if number == first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python calls would fill up the trace
            jax.profiler.start_trace(folder, profiler_options=options)
            tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = step(*arguments)
        if number == last:
            jax.block_until_ready(result)
            stop()
        return result

    try:
        yield run
    finally:
        stop()


@contextmanager
def progress_bar(console: Console, total: int, done: int, every: int) -> Iterator[Callable[..., None]]:
    """Draw a progress bar; yields the function that advances it: (step, the row just written or None).

    Args:
        console: where to draw.
        total: number of steps of the run.
        done: number of steps already done.
        every: number of steps between rows.
    """
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[speed]} images/s  {task.fields[times]}  left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        task = progress.add_task("train", total=total, completed=done, loss="-", speed="-", times="")

        def advance(step: int, row: dict[str, Any] | None) -> None:
            fields: dict[str, Any] = {}
            if row is not None:
                speed = row["images_per_s"]
                loss = "-" if row["loss"] is None else f"{row['loss']:.4g}"
                fields = {"loss": loss, "speed": "-" if speed is None else f"{speed:.1f}"}
                shares = {"data": "data_wait", "MFU": "mfu", "goodput": "goodput"}
                shown = [f"{label} {row[name]:.0%}" for label, name in shares.items() if row[name] is not None]
                fields["times"] = "  ".join(shown)
            progress.update(task, completed=step, **fields)
            # without a terminal, print about twenty progress lines instead
            if fields and not console.is_terminal and step * 20 // total > (step - every) * 20 // total:
                progress_line = f"loss {fields['loss']}  {fields['speed']} images/s  {fields['times']}"
                console.print(f"step {step}/{total}  {progress_line}", highlight=False)

        yield advance
