"""Checkpoints of a run: the only file that knows orbax."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from fcn_jax.errors import InputError
from fcn_jax.training.step import TrainState

__all__ = ["Checkpoints", "has_checkpoint", "load_variables"]


def _mean_iu(metrics: dict[str, Any]) -> float:
    return metrics["mean_iu"]


class Checkpoints:
    """The checkpoints in one folder: the newest few, the best by mean IU, and those at a fixed interval for good.

    Each holds three items: ``variables`` (params, batch_stats), ``training`` (optimiser state, step, key) and
    ``position`` (where the data stand), with the validation scores as its metrics. Saving goes on in the background;
    ``close`` waits for it.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_steps: int | None = None):
        """Open the folder, creating it if need be."""
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
        self._manager = _open(folder, options)

    def save(self, state: TrainState, position: bytes, mean_iu: float) -> None:
        """Save the state at its step, copied to the host before this returns. An undefined score ranks lowest."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        training = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(variables),
                training=ocp.args.StandardSave(training),
                position=ocp.args.JsonSave(json.loads(position)),
            ),
            metrics={"mean_iu": -1.0 if math.isnan(mean_iu) else mean_iu},
        )

    def latest_step(self) -> int | None:
        """Return the newest saved step, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Return the saved step of the best mean IU, or None."""
        return _best(self._manager)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, bytes]:
        """Read a state back, with the shapes and placement of ``like``, and the position of the data.

        Raises:
            InputError: the checkpoint does not fit the model or cannot be read.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        variables = {"params": target.params, "batch_stats": target.batch_stats}
        training = {"step": target.step, "opt_state": target.opt_state, "key": target.key}
        _check_shapes(Path(str(self._manager.directory)) / str(step), variables)
        try:
            saved = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardRestore(variables),
                    training=ocp.args.StandardRestore(training),
                    position=ocp.args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            raise _unfit(self._manager.directory / str(step), error) from error
        return TrainState(**saved["variables"], **saved["training"]), json.dumps(saved["position"]).encode()

    def close(self) -> None:
        """Wait for what is being saved, and let go of the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def load_variables(folder: Path, which: str, like: Any) -> tuple[dict[str, Any], int]:
    """Read only a model's variables from a run's checkpoints.

    Args:
        folder: the run's checkpoints.
        which: "best" (by mean IU), "last", or a step's number.
        like: variables of the model, for shapes and placement.

    Returns:
        The variables, and the step.

    Raises:
        InputError: there is no such checkpoint, or it does not fit the model.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; the run has not saved a checkpoint yet")
    options = ocp.CheckpointManagerOptions(best_fn=_mean_iu, read_only=True)
    with _open(folder, options) as manager:
        steps = list(manager.all_steps())
        named = {"best": _best(manager), "last": manager.latest_step(), **{str(step): step for step in steps}}
        step = named.get(which)
        if step is None:
            known = ", ".join(str(step) for step in steps) or "none"
            raise InputError(f"{folder} has no checkpoint {which!r}; choose best, last or one of: {known}")
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        _check_shapes(folder / str(step), target)
        try:
            saved = manager.restore(step, args=ocp.args.Composite(variables=ocp.args.StandardRestore(target)))
        except (ValueError, KeyError, OSError) as error:
            raise _unfit(folder / str(step), error) from error
    return dict(saved["variables"]), step


def has_checkpoint(folder: Path) -> bool:
    """Tell whether a run's folder holds a checkpoint to resume from."""
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def _open(folder: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    try:
        return ocp.CheckpointManager(folder, options=options)
    except (ValueError, KeyError, OSError) as error:
        raise _unfit(folder, error) from error


def _best(manager: ocp.CheckpointManager) -> int | None:
    try:
        return manager.best_step()
    except (ValueError, KeyError, OSError) as error:
        raise _unfit(manager.directory, error) from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(entry.key) for entry in path): leaf.shape for path, leaf in leaves if hasattr(leaf, "shape")}


def _check_shapes(path: Path, wanted: Any) -> None:
    """Compare names and shapes before anything is read: orbax finds a difference halfway and leaves readers behind."""
    try:
        saved = _shapes(ocp.StandardCheckpointer().metadata(path / "variables").item_metadata.tree)
    except (ValueError, KeyError, OSError, AttributeError) as error:
        raise _unfit(path, error) from error
    own = _shapes(wanted)
    for name in sorted(set(saved) | set(own)):
        if saved.get(name) != own.get(name):
            there, here = (str(shapes.get(name, "missing")) for shapes in (saved, own))
            raise InputError(
                f"checkpoint {path} does not fit this model: {name} is {there} there and {here} here; "
                "use the run's own config.json"
            )


def _unfit(path: Any, error: Exception) -> InputError:
    first = (str(error).strip() or repr(error)).splitlines()[0][:200]
    return InputError(
        f"checkpoint {path} does not fit this model or is damaged ({first}); "
        "remove it to go on from an older one, or use the run's own config.json"
    )
