"""The folder of a run: config.json and its checks on resume, metrics.jsonl, locking, object stores."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from fcn_jax.config import Config
from fcn_jax.errors import InputError, first_line
from fcn_jax.models import init_variables, model_from_config
from fcn_jax.models.fcn import FCN
from fcn_jax.paths import absolute, is_remote, state_of, to_path, upload, write_whole
from fcn_jax.training.config_checks import check_config, config_from_json, convert, flatten

# Fields that do not affect results, which may change when a run is resumed.
_FREE_FIELDS = frozenset(
    "run profile data.dir data.cache_dir data.download data.workers devices distributed num_processes process_id "
    "parallel mesh train.log_every train.keep_last train.nonfinite train.pictures_every".split()
)
_LENGTH_FIELDS = frozenset({"train.steps", "train.epochs", "optim.step_every"})

_SHOWN_AFTER = 60
"""Seconds until a file that one machine wrote is visible on another; NFS caches its absence for up to 60."""
_OWNER = "owner"
"""On an object store, the file that names the process training the run."""
_IMPORTED = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a trained model needs to know about its data set."""

    name: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]


def environment(*packages: str) -> dict[str, Any]:
    """Return package versions (None for a missing package) and, if it is known, the project's commit."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "commit": _commit()}


def _commit() -> str | None:
    def git(*command: str) -> str:
        folder = Path(__file__).resolve().parent
        options: Any = {"cwd": folder, "capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(["git", *command], **options).stdout.strip()

    try:
        # An installed package may lie in an environment within another project's repository.
        own = git("rev-parse", "--show-prefix") == "fcn_jax/training/"
        return git("describe", "--always", "--dirty") if own else None
    except (OSError, subprocess.SubprocessError):
        return None


def seconds_since_start() -> float:
    """Return the seconds since this process started or, without /proc, since this module was imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # proc(5): starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.perf_counter() - _IMPORTED


def _check_palette(dataset: DatasetInfo, where: str) -> None:
    if len(dataset.palette) != len(dataset.class_names) or not all(
        0 <= c < 256 for rgb in dataset.palette for c in rgb
    ):
        raise InputError(f"{where}: expected three bytes of colour for each class; restore the file or train again")


def _json(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


class RunFolder:
    """The files of one run.

    An object store does not support appending. There, logs and figures are written to ``local``, a temporary folder,
    and uploaded as whole files.
    """

    def __init__(self, path: str | Path, writes: bool = True):
        """Set the paths, without touching the folder. Later it is changed only if this process ``writes``."""
        self.path, self.writes = to_path(path, "--run"), writes
        self.local = self.path
        if is_remote(path):
            self.local = Path(tempfile.mkdtemp(prefix="fcn_jax-"))
            weakref.finalize(self, shutil.rmtree, self.local, ignore_errors=True)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.local / "metrics.jsonl"
        self.checkpoints = absolute(self.path / "checkpoints")
        self.events = self.local / "events"
        self.figures = self.local / "figures"
        self.profile = self.local / "profile"
        self._owner: str | None = None
        self._uploaded: dict[Path, str] = {}
        self._upload_time = time.monotonic()

    def start(self, config: Config, dataset: DatasetInfo, lengthen: bool = False) -> None:
        """Write config.json, or check that the existing one describes the same run.

        A resumed run may have moved or use other devices: those fields are updated, while the versions and commit of
        the first start stay. With ``lengthen`` its length may differ, see ``lengthened``.

        Raises:
            InputError: the folder belongs to a run with other settings or classes, or cannot be written.
        """
        if not self.writes:
            self._wait_until_started()
            return
        now = _json(config)
        devices = {"devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
        content = {"config": now, "dataset": dataclasses.asdict(dataset), "environment": environment() | devices}
        if self.config_file.exists():
            before, before_dataset = self.read_config()
            self._check_same(flatten(_json(before)), flatten(now), lengthen)
            if before_dataset != dataset:
                raise InputError(
                    f"{self.path} was started on {before_dataset.name} with other classes; "
                    "restore its class list, or give another --run"
                )
            if before == config:
                return
            content["environment"] = json.loads(self.config_file.read_text())["environment"]
        try:
            self.figures.mkdir(parents=True, exist_ok=True)
            write_whole(self.config_file, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: OSError) -> InputError:
        return InputError(f"cannot write to {self.path}: {error.strerror or first_line(error)}; give another --run")

    def _wait_until_started(self) -> None:
        """Wait for config.json from the process that writes; a network disk may show it late."""
        until = time.monotonic() + _SHOWN_AFTER
        while not self.config_file.exists():
            if time.monotonic() > until:
                raise InputError(f"{self.path} is not visible to every process; give a --run on a shared disk")
            time.sleep(0.1)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other training processes; the lock is released however the process ends.

        An object store has no such locks. There the newest process owns the run, and an older one stops at its next
        ``upload``, which comes before each save.

        Raises:
            InputError: another process holds the lock, or the folder cannot be written.
        """
        if not self.writes:
            yield
            return
        if is_remote(self.path):
            self._owner = f"{platform.node()} {os.getpid()} {time.time_ns()}"
            try:
                (self.path / _OWNER).write_text(self._owner)
            except OSError as error:
                raise self._not_writable(error) from error
            yield
            return
        import filelock  # imported here, as the benchmark runs without it

        lock = filelock.FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise InputError(
                f"{self.path} is being trained by another process; wait until it ends, stop it, or give another --run"
            ) from None
        except OSError as error:
            raise self._not_writable(error) from error
        except NotImplementedError:  # a disk without file locks: train without one
            pass
        try:
            yield
        finally:
            lock.release()

    def upload(self, every: float = 0) -> None:
        """Upload changed logs and figures to the object store; does nothing for a local folder.

        Args:
            every: do nothing within this many seconds of the last upload.

        Raises:
            InputError: another process has taken over the run, or the store cannot be written to.
        """
        if not self.writes or not is_remote(self.path) or time.monotonic() - self._upload_time < every:
            return
        try:
            owner = (self.path / _OWNER).read_text() if self._owner else None
            if owner != self._owner:
                raise InputError(f"{self.path} was taken over by another process ({owner}); this one stops")
            for file in (path for path in self.local.rglob("*") if path.is_file()):
                if (state := state_of(file)) != self._uploaded.get(file):
                    upload(file, self.path / file.relative_to(self.local))
                    self._uploaded[file] = state
        except OSError as error:
            raise self._not_writable(error) from error
        self._upload_time = time.monotonic()

    def _check_same(self, old: dict[str, Any], new: dict[str, Any], lengthen: bool) -> None:
        free = _FREE_FIELDS | (_LENGTH_FIELDS if lengthen else frozenset())
        changed = [name for name in new if name not in free and old.get(name) != new[name]]
        if changed:
            what = ", ".join(f"{name} {old.get(name)} (now {new[name]})" for name in changed[:4])
            raise InputError(
                f"{self.path} was started with {what}; give another --run, or resume it with the same settings"
            )

    def read_config(self) -> tuple[Config, DatasetInfo]:
        """Read back what ``start`` wrote.

        Raises:
            InputError: this is not a run's folder, or its config.json is damaged.
        """
        try:
            content = json.loads(self.config_file.read_text())
            dataset = convert(content["dataset"], DatasetInfo, str(self.config_file))
            _check_palette(dataset, str(self.config_file))
            return config_from_json(content["config"], str(self.config_file)), dataset
        except (FileNotFoundError, NotADirectoryError):
            what = "is a file" if self.path.is_file() else "has no config.json"
            raise InputError(
                f"{self.path} {what}, so it is not a run's folder; give the folder that training wrote"
            ) from None
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{self.config_file} is damaged ({first_line(error)}); restore it or train again"
            ) from error

    def append(self, row: dict[str, Any]) -> None:
        """Add a row to metrics.jsonl."""
        if not self.writes:
            return
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of metrics.jsonl, without truncated or damaged ones."""
        for line in self._lines():
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row:
                    yield row

    def _lines(self) -> list[str]:
        stored = self.path / self.metrics_file.name
        if is_remote(stored) and not self.metrics_file.exists() and stored.exists():
            self.metrics_file.write_bytes(stored.read_bytes())
        return self.metrics_file.read_text(errors="replace").splitlines() if self.metrics_file.exists() else []

    def drop_rows_after(self, step: int, with_validation: bool = True) -> int:
        """Remove the rows after ``step``, which a run resumed there writes again.

        Args:
            step: the restored step.
            with_validation: whether that step was validated before it was saved; if not, its validation row is removed.

        Returns:
            The number of unreadable lines before the last one, which are removed as well.
        """

        def stays(row: dict[str, Any]) -> bool:
            return row["step"] < step or row["step"] == step and (with_validation or row["kind"] != "val")

        rows, lines = list(self.rows()), self._lines()
        kept = [row for row in rows if stays(row)]
        if self.writes and lines:
            write_whole(self.metrics_file, "".join(json.dumps(row) + "\n" for row in kept))
        torn = bool(lines) and (not rows or json.dumps(rows[-1]) != lines[-1])
        return len(lines) - len(rows) - torn


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """The network of a run at one of its checkpoints."""

    config: Config
    dataset: DatasetInfo
    model: FCN
    variables: dict[str, Any]
    step: int


def open_run(run: str | Path, checkpoint: str = "best") -> TrainedRun:
    """Load a run's network at a checkpoint: "best" by mean IoU, "last", or a step number.

    Raises:
        InputError: not a run, no such checkpoint, or a damaged one.
    """
    from fcn_jax.training.checkpoint import load_variables  # imports orbax

    folder = RunFolder(run)
    config, dataset = folder.read_config()
    check_config(config)
    model = model_from_config(config.model, len(dataset.class_names), config.train.remat)
    shapes = jax.eval_shape(
        lambda key: init_variables(model, key, (64, 64), config.data.channels or 3), jax.random.key(0)
    )
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {"params": shapes["params"], "batch_stats": shapes.get("batch_stats", {})}
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
    variables, step = load_variables(folder.checkpoints, checkpoint, like)
    return TrainedRun(config, dataset, model, variables, step)


def lengthened(before: Config, config: Config) -> Config:
    """Return the config for continuing a run beyond its original length.

    Args:
        before: the run's config so far.
        config: the same with other ``train.steps`` or ``train.epochs``.

    Raises:
        InputError: the schedule is "poly", whose past learning rates depend on the length, the unit differs, the run
            would be shorter, or ``optim.step_every`` is another.
    """
    new, old = config.train, before.train
    if config.optim.step_every != before.optim.step_every:
        raise InputError(
            f"{config.run} was started with optim.step_every {before.optim.step_every}; leave out --optim.step-every, "
            "which cannot change within a run"
        )
    if (new.steps, new.epochs) == (old.steps, old.epochs):
        return config
    if config.optim.schedule == "poly":
        raise InputError(
            f"{config.run}: a run with --optim.schedule poly cannot be lengthened, as its learning rate ends at zero; "
            f"start another from it: --init-from {config.run} with a new --run"
        )
    unit, other = ("epochs", "steps") if old.steps is None else ("steps", "epochs")
    if getattr(new, other) != getattr(old, other):
        raise InputError(f"{config.run}: its length was given by --train.{unit}; use the same to lengthen it")
    length, least = getattr(new, unit), getattr(old, unit)
    if length is None or length < least:
        raise InputError(f"{config.run} has a length of {least} {unit} and cannot be shortened to {length}; give more")
    if config.optim.schedule == "fixed":
        return config
    # Keep the steps at which the learning rate drops (of epochs: to within rounding to whole steps).
    step_every = config.optim.step_every * least / length
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, step_every=step_every))
