"""Checkpoints of a run; only this module uses orbax.

``checkpoints/STEP`` is a state that was validated; ``interrupted/STEP`` is one saved when a signal stopped the run.
Orbax writes a checkpoint under another name and renames it when it is complete. It does not detect changed bytes in
arrays; our checksums do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from fcn_jax.errors import InputError, first_line
from fcn_jax.step import TrainState


class Restored(NamedTuple):
    """A state restored from a checkpoint."""

    step: int
    state: TrainState
    progress: dict[str, Any]
    """What the training loop stores beside the state, as JSON types."""
    validated: bool
    notes: tuple[str, ...]
    """Messages for the user about newer checkpoints that were damaged."""


class _Damaged(Exception):
    """A checkpoint cannot be read or is not what was saved; the message is one line."""


def _mean_iu(metrics: dict[str, Any]) -> float:
    return metrics["mean_iu"]


class Checkpoints:
    """Saves a run's states. It keeps the newest few, the best by mean IoU and, permanently, one per fixed interval.

    Each holds three items: ``variables`` (params, batch_stats), ``training`` (optimiser state, step, key) and
    ``progress`` (from the loop, and checksums of the other two), with the mean IoU as its metric. Saving runs in the
    background; ``close`` waits for it.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_steps: int | None = None, writes: bool = True):
        """Open or create the folder, and remove incomplete checkpoints of a killed process.

        With several processes, all take part in saving; the one that ``writes`` creates and removes shared files.
        """
        best = preservation_policy.BestN(get_metric_fn=_mean_iu, n=1)
        policies = [preservation_policy.LatestN(max(1, keep_last)), best]
        if keep_steps is not None:
            policies.append(preservation_policy.EveryNSteps(keep_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=_mean_iu,
            best_mode="max",
            cleanup_tmp_directories=True,
        )
        self._folder, self._writes = folder, writes
        self._keep_last, self._keep_steps = max(1, keep_last), keep_steps
        self._manager = _open(folder, options)

    def save(self, state: TrainState, progress: dict[str, Any], mean_iu: float) -> None:
        """Save a validated state, copied to the host before this returns. An undefined score ranks lowest.

        Raises:
            InputError: this state or the previous one could not be written.
        """
        with _writing(self._folder):
            metrics = {"mean_iu": -1.0 if math.isnan(mean_iu) else mean_iu}
            items = _items(state, {**progress, "metrics": metrics})
            if not self._manager.save(int(state.step), args=items, metrics=metrics):
                raise ValueError(f"step {int(state.step)} is not after {self._manager.latest_step()}")

    def save_interrupted(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Save a state at any step for resuming, and wait for it; does nothing if this step is saved already.

        Raises:
            InputError: it could not be written.
        """
        step = int(state.step)
        folder = _interrupted(self._folder)
        with _writing(folder):
            self._manager.wait_until_finished()
            if self._manager.latest_step() == step or step in _steps(folder):
                return
            options = ocp.CheckpointManagerOptions(max_to_keep=1, cleanup_tmp_directories=True)
            with _open(folder, options) as manager:
                manager.save(step, args=_items(state, progress))
                manager.wait_until_finished()

    def best_step(self) -> int | None:
        """Return the saved step with the best mean IoU, or None."""
        return _best(self._manager)

    def close(self) -> None:
        """Wait until saving is complete, and release the folder.

        Raises:
            InputError: it could not be written.
        """
        try:
            with _writing(self._folder):
                self._manager.wait_until_finished()
                self._remove_superseded()
        finally:
            with suppress(Exception):  # the failed save was reported already
                self._manager.close()

    def _remove_superseded(self) -> None:
        """Remove old checkpoints left by a process that was killed between saving and removing them."""
        steps, interrupted = sorted(self._manager.all_steps()), _interrupted(self._folder)
        kept = {*steps[-self._keep_last :], self.best_step()}
        for step in steps:
            if step not in kept and (self._keep_steps is None or step % self._keep_steps):
                self._manager.delete(step)
        if self._writes and steps and all(step <= steps[-1] for step in _steps(interrupted)):
            _remove(interrupted)


def restore_newest(folder: Path, like: TrainState, writes: bool = True) -> Restored | None:
    """Restore the newest intact state of a run; damaged newer ones are renamed to ``damaged-STEP``.

    Args:
        folder: the run's checkpoints.
        like: a state with the shapes and placement of the result.
        writes: whether this process renames damaged ones; one of several does.

    Returns:
        None if nothing has been saved yet.

    Raises:
        InputError: there are checkpoints, but none can be read and fits the network.
    """
    found = [(step, False, _interrupted(folder)) for step in _steps(_interrupted(folder))]
    found += [(step, True, folder) for step in _steps(folder)]
    damaged: list[tuple[Path, str]] = []
    for step, validated, parent in sorted(found, reverse=True):
        try:
            state, progress = _read(parent / str(step), like)
        except _Damaged as error:
            damaged.append((parent / str(step), str(error)))
            continue
        # An older one with an unreadable score would prevent choosing the best.
        older = [other for other in _steps(folder) if other < step and _metrics(folder / str(other)) is None]
        damaged += [(folder / str(other), "its score cannot be read") for other in older]
        if not writes:
            damaged = []
        notes = tuple(f"{_put_aside(path)}: {error}; resuming from step {step}" for path, error in damaged)
        return Restored(step, state, progress, validated, notes)
    if damaged:
        what = "; ".join(f"{path.name}: {error}" for path, error in damaged)
        raise InputError(
            f"no checkpoint in {folder} can be read ({what}); "
            "restore one from a backup, or train again with another --run"
        )
    return None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep orbax from logging that the folder is opened read-only."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@_without_warnings()
def load_variables(folder: Path, which: str, like: Any) -> tuple[dict[str, Any], int]:
    """Read only a model's variables from a run's checkpoints.

    Args:
        folder: the run's checkpoints.
        which: "best" (by mean IoU), "last", or a step number.
        like: variables of the model, for shapes and placement.

    Returns:
        The variables, and the step.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or it does not fit the model.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; the run has not saved a checkpoint yet")
    options = ocp.CheckpointManagerOptions(best_fn=_mean_iu, read_only=True)
    with _open(folder, options) as manager:
        steps = list(manager.all_steps())
        named = {"best": _best(manager), "last": manager.latest_step(), **{str(step): step for step in steps}}
    step = named.get(which)
    if not steps and _steps(_interrupted(folder)):
        raise InputError(
            f"the run was stopped at step {max(_steps(_interrupted(folder)))}, before its first validation: "
            "run the same command again to continue to one"
        )
    if step is None:
        known = ", ".join(str(step) for step in steps) or "none"
        raise InputError(f"{folder} has no checkpoint {which!r}; choose best, last or one of: {known}")
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        (variables,), _ = _read_items(folder / str(step), {"variables": target})
    except _Damaged as error:
        raise _unfit(folder / str(step), error) from error
    return dict(variables), step


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run can be resumed from a checkpoint."""
    return bool(_steps(folder) or _steps(_interrupted(folder)))


def _interrupted(folder: Path) -> Path:
    return folder.with_name("interrupted")


def _steps(folder: Path) -> list[int]:
    return ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []


def _put_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be saved again."""
    aside = path.with_name(f"damaged-{path.name}")
    _remove(aside)
    return path.rename(aside)


def _remove(folder: Path) -> None:
    with suppress(OSError):
        epath.Path(folder).rmtree()


def _parts(state: TrainState) -> dict[str, Any]:
    """Split a state into the part that evaluation needs and the part that only training needs."""
    return {
        "variables": {"params": state.params, "batch_stats": state.batch_stats},
        "training": {"step": state.step, "opt_state": state.opt_state, "key": state.key},
    }


def _items(state: TrainState, progress: dict[str, Any]) -> ocp.args.Composite:
    parts = _parts(state)
    return ocp.args.Composite(
        **{name: ocp.args.StandardSave(part) for name, part in parts.items()},
        progress=ocp.args.JsonSave({**progress, "checksums": _checksums(parts)}),
    )


def _checksums(parts: dict[str, Any]) -> dict[str, list[int]]:
    """Return one number per array, computed on the device, so that training does not wait for a hash on the host."""
    sums = jax.device_get(_jitted_checksums(parts))
    return {name: [int(each) for each in jax.tree.leaves(part)] for name, part in sums.items()}


@jax.jit
def _jitted_checksums(parts: Any) -> Any:
    return jax.tree.map(_checksum, parts)


def _checksum(x: jax.Array) -> jax.Array:
    """Return the sum of (2 i + 1) w_i modulo 2^32 over the words w_i; odd factors make any changed word show."""
    words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    flat = jax.lax.bitcast_convert_type(x, words).ravel().astype(jnp.uint32)
    return jnp.sum(flat * (2 * jnp.arange(flat.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)


def _read(path: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    parts = _parts(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
    (variables, training), progress = _read_items(path, parts)
    return TrainState(**variables, **training), progress


def _read_items(path: Path, targets: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Read some items of a checkpoint and its progress.

    Raises:
        _Damaged: the checkpoint is damaged or does not match the model.
    """
    _check_shapes(path, targets["variables"])
    items = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            saved = reader.restore(path, ocp.args.Composite(**items, progress=ocp.args.JsonRestore()))
        progress = dict(saved["progress"])
        checksums = progress.pop("checksums")
        wrong = [name for name in items if checksums[name] != _checksums({name: saved[name]})[name]]
        wrong += ["metrics"] if progress.pop("metrics", None) != _metrics(path) else []
    except Exception as error:  # parsers may raise anything on damaged bytes
        raise _Damaged(first_line(error)) from error
    if wrong:
        raise _Damaged(f"{' and '.join(wrong)} differ from what was saved")
    return [saved[name] for name in items], progress


def _metrics(path: Path) -> dict[str, Any] | None:
    """Return the metrics that orbax keeps with a checkpoint; None if there are none or they cannot be read."""
    handler = ocp.CompositeCheckpointHandler(metrics=ocp.JsonCheckpointHandler("metrics"))
    try:
        with ocp.Checkpointer(handler) as reader:
            metrics = reader.restore(path, ocp.args.Composite(metrics=ocp.args.JsonRestore()))["metrics"]
        return metrics if isinstance(_mean_iu(metrics), float) else None
    except Exception:  # as in _read_items
        return None


def _open(folder: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    try:
        return ocp.CheckpointManager(folder, options=options)
    except Exception as error:  # as in _read_items
        raise _unfit(folder, error) from error


def _best(manager: ocp.CheckpointManager) -> int | None:
    try:
        return manager.best_step()
    except Exception as error:  # as in _read_items
        raise _unfit(manager.directory, error) from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(entry.key) for entry in path): leaf.shape for path, leaf in leaves if hasattr(leaf, "shape")}


def _check_shapes(path: Path, wanted: Any) -> None:
    """Compare names and shapes first: orbax fails halfway at a difference, and leaves its readers open."""
    try:
        saved = _shapes(ocp.StandardCheckpointer().metadata(path / "variables").item_metadata.tree)
    except Exception as error:  # as in _read_items
        raise _Damaged(first_line(error)) from error
    own = _shapes(wanted)
    for name in sorted(set(saved) | set(own)):
        if saved.get(name) != own.get(name):
            there, here = (str(shapes.get(name, "missing")) for shapes in (saved, own))
            raise _Damaged(f"{name} is {there} in the checkpoint and {here} in this model")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tensorstore raises ValueError on a full disk
        raise InputError(
            f"a checkpoint could not be saved in {folder} ({first_line(error)}); those saved before are intact: "
            "free some space, and run the same command again to resume from the newest"
        ) from error


def _unfit(path: Any, error: Exception) -> InputError:
    return InputError(
        f"checkpoint {path} is damaged or does not fit this model ({first_line(error)}); "
        "choose another one, and use the run's own config.json"
    )
