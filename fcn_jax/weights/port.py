"""Weights from a source to variables: strict, shape-checked, and accounting for every tensor on both sides."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fcn_jax.errors import InputError
from fcn_jax.models.fcn import FCN
from fcn_jax.weights.layouts import Layout, Network, check_fit, encoder_name, pair_up
from fcn_jax.weights.names import COUNTER, Parameter, conversion, from_torch, list_parameters, torch_shape
from fcn_jax.weights.published import LAYOUTS
from fcn_jax.weights.report import Report, describe
from fcn_jax.weights.source import Source, Tensors, open_source

__all__ = ["load", "load_with_report"]

_ENCODER = "vgg."
"""Begins the names of the encoder's parameters."""


def load(
    source: Source,
    model: Network,
    variables: Mapping[str, Any],
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> dict[str, Any]:
    """Return variables filled from a source; the ones given are not changed. See ``load_with_report``."""
    return load_with_report(source, model, variables, allow_missing, allow_unexpected)[0]


def load_with_report(
    source: Source,
    model: Network,
    variables: Mapping[str, Any],
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> tuple[dict[str, Any], Report]:
    """Fill a network's variables from a source and tell what became of everything.

    Args:
        source: a path (.safetensors, .pth, .pt), a key of ``PRETRAINED``, or a dict of arrays; any of ``LAYOUTS``.
        model: the network that the variables belong to.
        variables: {"params": ...[, "batch_stats": ...]}, from ``init_variables``.
        allow_missing: glob patterns of parameters (``score_*``, ``head.fc6.weight``) that may keep their values.
        allow_unexpected: glob patterns of the source's tensors that may go unused. A tensor whose shape does not fit is
            passed over where its parameter may be missing and the tensor itself unexpected.

    Returns:
        New variables in the dtypes of the given ones, and the report.

    Raises:
        InputError: the source cannot be opened, its layout is unknown, it is of another network or encoder, or a tensor
            is missing, unexpected, of the wrong shape, not finite, or differs from its own copy.

    A file that holds an encoder and nothing else leaves all other layers of an FCN at their values.
    """
    tensors = open_source(source)
    info = describe(tensors)
    if info.layout is None:
        sample = ", ".join(list(tensors.infos)[:3])
        raise InputError(f"{tensors.origin}: no known layout has names like {sample}; known: {', '.join(LAYOUTS)}")
    may_miss, may_stay = _patterns(allow_missing), _patterns(allow_unexpected)
    # Under our own names, what the caller allows to differ may come from any network that shares the rest.
    by_name = LAYOUTS[info.layout].modules is None and bool(may_miss or may_stay)
    if info.fit is not None and not by_name:
        check_fit(f"{tensors.origin} ({info.layout})", info.fit, model, partial=bool(may_miss or may_stay))
    else:
        _check_encoder(tensors.origin, info.variant, model)
    # An FCN's own file that says of which network it is has to have all of it.
    may_be_encoder = isinstance(model, FCN) and info.fit is None
    job = _Job(tensors, LAYOUTS[info.layout], may_miss, may_stay, may_be_encoder)
    job.run(model, list_parameters(variables))
    flat = traverse_util.flatten_dict(dict(variables))
    flat.update(job.values)
    report = Report(
        info.layout, info.preprocessing, job.filled, job.left, job.ignored, job.converted, tensors.unwrapped
    )
    return traverse_util.unflatten_dict(flat), report


def _check_encoder(origin: str, variant: str | None, model: Network) -> None:
    wanted = encoder_name(model.encoder, model.encoder_norm)
    if variant is not None and variant != wanted:
        encoder, _, norm = variant.partition("_")
        options = f"encoder={encoder!r}, encoder_norm={'batch' if norm else None!r}"
        raise InputError(f"{origin}: holds {variant}, the model has {wanted}; create the model with {options}")


@dataclass
class _Job:
    """One loading: walks the layout's name map and keeps the books."""

    tensors: Tensors
    layout: Layout
    allow_missing: tuple[str, ...]
    allow_unexpected: tuple[str, ...]
    may_be_encoder: bool
    filled: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    values: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def run(self, model: Network, parameters: list[Parameter]) -> None:
        """Fill ``values`` by path."""
        misfits: list[str] = []
        sought: dict[str, str] = {}
        for parameter, row in pair_up(self.layout, model, parameters):
            theirs = f"{row.theirs}.{parameter.leaf}"
            sought.setdefault(parameter.name, theirs)
            if theirs in self.tensors.infos:
                misfit = self._fill(parameter, theirs, row.if_fits)
                misfits += [misfit] if misfit else []
        if misfits:
            hint = "build the model to match, or name them in both allow_missing and allow_unexpected"
            raise self._error("do not fit", misfits, hint)
        missing = self._leave(parameters, sought)
        unexpected = [name for name in self.tensors.infos if not self._explain(name)]
        if missing:
            renamed = self._renamed(
                [sought[name] for name in missing if name in sought], unexpected, parameters, sought
            )
            listed = [name if sought.get(name, name) == name else f"{name} ({sought[name]})" for name in missing]
            raise self._error("are missing", listed, renamed or "where that is meant, name them in allow_missing")
        if unexpected:
            raise self._error("are unexpected", unexpected, "where that is meant, name them in allow_unexpected")

    def _fill(self, parameter: Parameter, theirs: str, if_fits: bool) -> str | None:
        """Take one tensor; return what is wrong with its shape."""
        name = parameter.name
        if if_fits and parameter.leaf == "bias" and f"{parameter.module}.weight" in self.left:
            self.left[name] = self.ignored[theirs] = "its weight does not fit"
            return None
        raw = self.tensors.read(theirs)
        value = from_torch(parameter, raw)
        if value is None:
            needed = torch_shape(parameter)
            misfit = f"{theirs} is {_times(raw.shape)}, {name} needs {_times(needed)}"
            if raw.size == math.prod(needed):  # the right numbers in another order are no other network's
                misfit += " (transposed?)"
            elif if_fits:
                self.left[name] = self.ignored[theirs] = misfit
                return None
            if _any(name, self.allow_missing) and _any(theirs, self.allow_unexpected):
                self.left[name] = self.ignored[theirs] = misfit
                return None
            return misfit
        value = self._checked(theirs, value, parameter)
        if parameter.path in self.values:
            if not np.array_equal(self.values[parameter.path], value):
                raise InputError(f"{self.tensors.origin}: {theirs} and {self.filled[name]} should be equal and differ")
            self.ignored[theirs] = f"a copy of {self.filled[name]}"
        else:
            self.values[parameter.path], self.filled[name] = jnp.asarray(value), theirs
            self.converted[name] = conversion(parameter, raw.shape)
            if raw.dtype != value.dtype:
                self.converted[name] += f", {raw.dtype} to {value.dtype}"
        return None

    def _checked(self, theirs: str, value: np.ndarray, parameter: Parameter) -> np.ndarray:
        """Return the values in the parameter's dtype; refuse those that no training leaves behind."""
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise InputError(
                f"{self.tensors.origin}: {theirs} holds {value.dtype}, expected floats; use the original file"
            )
        if not np.isfinite(value).all():
            raise InputError(f"{self.tensors.origin}: {theirs} holds NaN or infinity; use another file")
        if parameter.leaf == "running_var" and (value < 0).any():
            raise InputError(f"{self.tensors.origin}: {theirs} holds negative variances; use another file")
        with np.errstate(over="ignore"):  # refused in the next line
            cast = value.astype(parameter.dtype)
        if not np.isfinite(cast).all():
            raise InputError(
                f"{self.tensors.origin}: {theirs} holds {value.dtype} numbers beyond the range of {cast.dtype}; "
                "use another file"
            )
        return cast

    def _leave(self, parameters: list[Parameter], sought: dict[str, str]) -> list[str]:
        """Explain the parameters that were not filled; return those that should have been."""
        missing = []
        encoder_alone = self._is_encoder_alone()
        for name in dict.fromkeys([*sought, *(parameter.name for parameter in parameters)]):
            if name in self.filled or name in self.left:
                continue
            if encoder_alone and not name.startswith(_ENCODER):
                self.left[name] = "the source holds an encoder alone"
            elif name not in sought and self.layout.encoder_only:
                self.left[name] = "the layout has no place for it"
            elif _any(name, self.allow_missing):
                self.left[name] = "missing, allowed"
            else:
                missing.append(name)
        return missing

    def _is_encoder_alone(self) -> bool:
        """Tell whether the source has tensors of the encoder and no others, as after ``vgg16().features``."""
        names = [name for name in self.tensors.infos if not name.endswith(f".{COUNTER}")]
        of_encoder = {theirs for name, theirs in self.filled.items() if name.startswith(_ENCODER)}
        return self.may_be_encoder and bool(names) and of_encoder.issuperset(names)

    def _renamed(
        self, missing: list[str], unexpected: list[str], parameters: list[Parameter], sought: dict[str, str]
    ) -> str | None:
        """Return a hint where every missing tensor has one unexpected that it may have been renamed to."""
        shapes = {sought.get(parameter.name): torch_shape(parameter) for parameter in parameters}
        pairs: dict[str, str] = {}
        for theirs in missing:
            same = (name for name in unexpected if self.tensors.shapes[name] == shapes[theirs])
            found = next((name for name in same if name not in pairs.values()), None)
            if found is not None:
                pairs[theirs] = found
        if not pairs or len(pairs) < len(missing):
            return None
        renamed = ", ".join(f"{new} to {old}" for old, new in list(pairs.items())[:8])
        return f"unexpected tensors have their shapes: rename {renamed}, if they are the same"

    def _explain(self, theirs: str) -> bool:
        """Explain a tensor that was not used; return whether it is accounted for."""
        if theirs in self.ignored or theirs in self.filled.values():
            return True
        if theirs.endswith(f".{COUNTER}"):
            self.ignored[theirs] = "a counter of torch's batch norm, not used"
        elif _any(theirs, self.layout.unused):
            self.ignored[theirs] = "the network has no place for it"
        elif _any(theirs, self.allow_unexpected):
            self.ignored[theirs] = "unexpected, allowed"
        return theirs in self.ignored

    def _error(self, what: str, names: list[str], hint: str) -> InputError:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        listed = ", ".join(names[:8])
        return InputError(f"{self.tensors.origin}: {len(names)} tensor(s) {what}: {listed}{more}; {hint}")


def _patterns(given: Iterable[str]) -> tuple[str, ...]:
    # A single pattern given as a string would otherwise be read letter by letter.
    return (given,) if isinstance(given, str) else tuple(given)


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
