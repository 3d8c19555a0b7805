"""Load weights into variables: strict and shape-checked, with a report on every parameter and tensor."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fcn_jax.errors import InputError, unknown
from fcn_jax.models.catalog import MODELS, create_model, describe_model
from fcn_jax.models.fcn import ENCODER_SCOPES, FCN
from fcn_jax.preprocessing import PREPROCESSINGS
from fcn_jax.weights.layouts import LAYOUTS, recognise
from fcn_jax.weights.layouts.layout import Fit, Layout, Network, check_fit, encoder_name, encoder_options, pair_up
from fcn_jax.weights.names import COUNTER, Parameter, conversion, from_torch, list_parameters, widen
from fcn_jax.weights.sources import Source, TensorInfo, Tensors, open_source

_FIRST = ("vgg.conv1_1.weight", "resnet.conv1.weight")  # the first convolutions
_ENCODERS = tuple(f"{scope}." for scope in ENCODER_SCOPES)


@dataclass(frozen=True)
class Info:
    """What a source holds."""

    layout: str | None
    """A key of ``LAYOUTS``, or None if no layout matches the names."""
    variant: str | None
    """The encoder, inferred from names and shapes: ``vgg16``, ``vgg16_bn`` ...; None if that fails."""
    preprocessing: str | None
    """Preprocessing in training, "imagenet" or "caffe"; None: unknown."""
    tensors: dict[str, TensorInfo]
    fit: Fit | None = None
    """The network that the weights belong to; None: only an encoder, or unknown."""
    unwrapped: tuple[str, ...] = ()
    """See ``Tensors``."""
    classes: dict[str, Any] | None = None
    """What ``save`` recorded about the classes: "class_names", "palette", "input_size"; None: nothing."""


@dataclass(frozen=True)
class Report:
    """How every parameter of the network was filled, and how every tensor of the source was used."""

    layout: str
    preprocessing: str | None
    filled: dict[str, str] = field(default_factory=dict)
    """Parameter -> the tensor that it was loaded from, in the layout's order."""
    left: dict[str, str] = field(default_factory=dict)
    """Parameter that keeps its value -> why."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Tensor that is not used -> why."""
    converted: dict[str, str] = field(default_factory=dict)
    """Loaded parameter -> how its array was converted."""
    unwrapped: tuple[str, ...] = ()
    """See ``Tensors``."""


def inspect(source: Source, preprocessing: str | None = None) -> Info:
    """Describe what a source holds, without building a network.

    Args:
        source: see ``open_source``.
        preprocessing: that of the weights if the source does not state it, in place of what is usual for its layout.

    Raises:
        InputError: the source cannot be opened, its metadata is damaged, or it states another preprocessing.
    """
    tensors = open_source(source)
    if preprocessing is not None and preprocessing not in PREPROCESSINGS:
        raise unknown("preprocessing", preprocessing, PREPROCESSINGS)
    name, stated = recognise(tensors.shapes), tensors.metadata.get("preprocessing")
    if stated is not None and stated not in PREPROCESSINGS:
        wrong = f"preprocessing {stated!r}, expected {' or '.join(PREPROCESSINGS)}"
        raise InputError(f"{tensors.origin}: its metadata says {wrong}; write the file again")
    if preprocessing not in (None, stated or preprocessing):
        raise InputError(f"{tensors.origin} states its preprocessing, {stated}; leave out {preprocessing}")
    if name is None:
        return Info(None, None, stated or preprocessing, tensors.infos, unwrapped=tensors.unwrapped)
    layout, shapes = LAYOUTS[name], tensors.shapes
    fit = layout.fit(shapes) if layout.fit else _saved_fit(tensors)
    if (
        fit and tensors.metadata.get("format") == "caffe"
    ):  # a Caffe file has at-once scales as layers, so without these it is the plain network
        fit = replace(fit, models=fit.models[:1])
    classes = _saved_classes(tensors, fit.num_classes if fit else None)
    variant = layout.encoder(shapes) if layout.encoder else fit.encoder if fit else None
    # The file's own statement takes precedence over what is usual for its layout.
    chosen = stated or preprocessing or layout.preprocessing
    return Info(name, variant, chosen, tensors.infos, fit, tensors.unwrapped, classes)


def _saved_classes(tensors: Tensors, count: int | None) -> dict[str, Any] | None:
    """Return what ``save`` recorded about ``count`` classes in a file's metadata, if anything."""
    if "classes" not in tensors.metadata:
        return None
    try:
        saved = json.loads(tensors.metadata["classes"])
        names, palette, size = (saved[key] for key in ("class_names", "palette", "input_size"))
        colours = np.asarray(palette, np.uint8)
        if colours.shape != (len(names), 3) or not all(isinstance(name, str) for name in names):
            raise ValueError("names and colours do not match")
        if count not in (None, len(names)):
            raise ValueError(f"{len(names)} names for {count} classes")
        if size is not None and not (len(size) == 2 and all(type(n) is int and 0 < n <= 2**20 for n in size)):
            raise ValueError(f"not an input size: {size}")
        return {
            "class_names": tuple(names),
            "palette": tuple(map(tuple, colours.tolist())),
            "input_size": None if size is None else tuple(size),
        }
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        wrong = f"its metadata has no valid classes ({error})"
        raise InputError(f"{tensors.origin}: {wrong}; write the file again") from error


def _saved_fit(tensors: Tensors) -> Fit | None:
    """Return the network that ``save`` recorded in a file's metadata, if any."""
    if tensors.metadata.get("layout") != "fcn_jax" or "model" not in tensors.metadata:
        return None
    try:
        saved = json.loads(tensors.metadata["model"])
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in saved["options"].items()}
        known = describe_model(create_model(saved["name"], saved["num_classes"], **options))[1]
        for option in options.keys() - known.keys():  # such as dtype, which files do not record
            raise unknown(f"option of {saved['name']}", option, known)
        return Fit((saved["name"],), saved["num_classes"], options)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        wrong = f"its metadata names a network that this version does not know ({error})"
        raise InputError(f"{tensors.origin}: {wrong}; write the file again") from error


def source_options(info: Info, name: str) -> tuple[dict[str, Any], int | None]:
    """Return the known options of ``create_model`` for a source's network, and its number of classes, if known.

    ``name`` is the network to create; if the source's weights belong to another, there are no options.
    """
    if info.layout == "fcn_jax" and info.fit is None and name in MODELS:  # one of our .pth files
        scores = (info.tensors.get(f"{layer}.weight") for layer in ("score_fr", "head.score", "classifier"))
        count = next((tensor.shape[0] for tensor in scores if tensor and tensor.shape), None)
        aux = {"aux_head": True} if any(tensor.startswith("aux.") for tensor in info.tensors) else {}
        info = replace(info, fit=Fit((name,), count, encoder_options(info.variant) | aux))
    if info.fit is None:
        return encoder_options(info.variant or "vgg16"), None
    if name not in info.fit.models:
        return {}, info.fit.num_classes
    return _sizes(info, name) | info.fit.options, info.fit.num_classes


def _sizes(info: Info, name: str) -> dict[str, Any]:
    """Infer options from the shapes in a published network's file: width, features and the side of fc6's kernel."""
    layout = LAYOUTS[info.layout or "fcn_jax"]
    assert info.fit is not None
    model = create_model(name, info.fit.num_classes or 1, **info.fit.options)
    theirs = dict(layout.modules(model)) if layout.modules else {}

    def length(layer: str, axis: int = 0) -> int | None:
        tensor = info.tensors.get(f"{theirs.get(layer, layer)}.weight")
        return tensor.shape[axis] if tensor and len(tensor.shape) == 4 else None

    first = length("vgg.conv1_1") or length("resnet.conv1")
    sizes: dict[str, Any] = {"fc_features": length("head.fc6"), "head_features": length("head.conv")}
    sizes |= {"fc6_kernel": length("head.fc6", 2), "width": None if first is None else first / 64}
    known = describe_model(model)[1]
    return {option: value for option, value in sizes.items() if value is not None and option in known}


def unknown_layout(tensors: Tensors) -> InputError:
    """Return the error for tensor names that match no layout."""
    sample = ", ".join(list(tensors.infos)[:3])
    return InputError(f"{tensors.origin}: no known layout has names like {sample}; known: {', '.join(LAYOUTS)}")


def only_model(source: str, info: Info) -> str:
    """Return the network that a source's weights belong to. Raises InputError if there are several or none is known."""
    if info.fit is None:
        raise InputError(f"{source} does not determine a network; give --model")
    if len(info.fit.models) > 1:
        raise InputError(f"{source} may belong to {' or '.join(info.fit.models)}; give --model")
    return info.fit.models[0]


def load(
    source: Source,
    model: Network,
    variables: Mapping[str, Any],
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> dict[str, Any]:
    """Return variables loaded from a source; the given ones are not modified. See ``load_with_report``."""
    return load_with_report(source, model, variables, allow_missing, allow_unexpected)[0]


def load_with_report(
    source: Source,
    model: Network,
    variables: Mapping[str, Any],
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> tuple[dict[str, Any], Report]:
    """Load a network's variables from a source, and report on every parameter and tensor.

    If a source holds only an encoder, all other layers of an FCN keep their values.

    Args:
        source: see ``open_source``; in any of ``LAYOUTS``.
        model: the network that the variables belong to.
        variables: {"params": ...[, "batch_stats": ...]}, from ``init_variables``.
        allow_missing: glob patterns of parameters (``score_*``, ``head.fc6.weight``) that may keep their values.
        allow_unexpected: glob patterns of the source's tensors that may go unused. A tensor of the wrong shape is
            skipped if both patterns allow it.

    Returns:
        New variables in the dtypes of the given ones, and the report.

    Raises:
        InputError: the source cannot be opened, its layout is unknown, it does not match the model, or a tensor is
            missing, unexpected, of the wrong shape, not finite, or differs from its own copy.
    """
    tensors = open_source(source)
    info = inspect(tensors)
    if info.layout is None:
        raise unknown_layout(tensors)
    # A single pattern given as a string would otherwise be iterated by character.
    may_miss, may_stay = ([p] if isinstance(p, str) else list(p) for p in (allow_missing, allow_unexpected))
    _check_network(tensors.origin, info, model, partial=bool(may_miss or may_stay))
    report = Report(info.layout, info.preprocessing, unwrapped=tensors.unwrapped)
    loading = _Loading(tensors, LAYOUTS[info.layout], model, may_miss, may_stay, info.fit is not None, report)
    loading.fill(list_parameters(variables))
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(dict(variables)) | loading.values), report


def _check_network(origin: str, info: Info, model: Network, partial: bool) -> None:
    # With our own names, the allowed differences may come from any network that shares the rest.
    if info.fit is not None and not (partial and info.layout == "fcn_jax"):
        return check_fit(f"{origin} ({info.layout})", info.fit, model, partial)
    wanted = encoder_name(model.encoder, model.encoder_norm)
    if info.variant not in (None, wanted):
        options = ", ".join(f"{key}={value!r}" for key, value in encoder_options(info.variant).items())
        raise InputError(f"{origin}: holds {info.variant}, the model has {wanted}; create the model with {options}")


@dataclass
class _Loading:
    """Loads tensors by the layout's names, and records everything in ``report``."""

    tensors: Tensors
    layout: Layout
    model: Network
    may_miss: list[str]
    may_stay: list[str]
    is_network: bool
    """Whether the source is known to be a whole network, of which nothing may be missing."""
    report: Report
    values: dict[tuple[str, ...], Any] = field(default_factory=dict)
    sought: dict[str, str] = field(default_factory=dict)
    """Parameter -> the first tensor that may fill it."""

    def fill(self, parameters: list[Parameter]) -> None:
        """Fill ``values``; raise InputError if a tensor does not fit, is missing or is unexpected."""
        pairs = [(p, f"{theirs}.{p.leaf}") for p, theirs in pair_up(self.layout, self.model, parameters)]
        for parameter, theirs in pairs:
            self.sought.setdefault(parameter.name, theirs)
        found = [(parameter, theirs) for parameter, theirs in pairs if theirs in self.tensors.infos]
        misfits = [misfit for parameter, theirs in found if (misfit := self._take(parameter, theirs))]
        if misfits:
            hint = "build the model to match, or name them in both allow_missing and allow_unexpected"
            raise self._error("do not fit", misfits, hint)
        missing = self._explain_parameters({p.name: p for p in [*(p for p, _ in pairs), *parameters]})
        unexpected = self._explain_tensors()
        if missing:
            names = [(p.name, self.sought.get(p.name, p.name)) for p in missing]
            listed = [name if name == theirs else f"{name} ({theirs})" for name, theirs in names]
            hint = self._renaming(missing, unexpected) or "if that is intended, name them in allow_missing"
            raise self._error("are missing", listed, hint)
        if unexpected:
            raise self._error("are unexpected", unexpected, "if that is intended, name them in allow_unexpected")

    def _take(self, parameter: Parameter, theirs: str) -> str | None:
        """Load one tensor; return what is wrong with its shape, or None."""
        name, report = parameter.name, self.report
        # fc6 and fc7 of an FCN may differ in size from the classifier's.
        optional = self.layout.encoder_only and isinstance(self.model, FCN) and name.startswith("head.")
        if optional and parameter.leaf == "bias" and f"{parameter.module}.weight" in report.left:
            report.left[name] = report.ignored[theirs] = "its weight does not fit"
            return None
        raw = self.tensors.read(theirs)
        widened = ""
        if name in _FIRST and raw.ndim == 4 and raw.shape[1] == 3 and parameter.torch_shape[1] != 3:
            raw = widen(raw, parameter.torch_shape[1])
            widened = f", widened from 3 to {parameter.torch_shape[1]} channels"
        value = from_torch(parameter, raw)
        if value is None:
            misfit = f"{theirs} is {_times(raw.shape)}, {name} needs {_times(parameter.torch_shape)}"
            if raw.size == np.prod(parameter.shape):
                misfit, optional = f"{misfit} (transposed?)", False
            if not optional and not (_any(name, self.may_miss) and _any(theirs, self.may_stay)):
                return misfit
            report.left[name] = report.ignored[theirs] = misfit
            return None
        value = self._cast(theirs, value, parameter)
        if parameter.path not in self.values:
            self.values[parameter.path], report.filled[name] = jnp.asarray(value), theirs
            cast = "" if raw.dtype == value.dtype else f", {raw.dtype} to {value.dtype}"
            report.converted[name] = conversion(parameter, raw.shape) + cast + widened
        elif np.array_equal(self.values[parameter.path], value):
            report.ignored[theirs] = f"a copy of {report.filled[name]}"
        else:
            raise InputError(f"{self.tensors.origin}: {theirs} and {report.filled[name]} should be equal but differ")
        return None

    def _cast(self, theirs: str, value: np.ndarray, parameter: Parameter) -> np.ndarray:
        """Cast to the parameter's dtype; reject non-floats, NaN, infinities and negative variances."""
        if not jnp.issubdtype(value.dtype, jnp.floating):
            wrong = f"{value.dtype}, expected floats; use the original file"
        elif not np.isfinite(value).all():
            wrong = "NaN or infinity; use another file"
        elif parameter.leaf == "running_var" and (value < 0).any():
            wrong = "negative variances; use another file"
        else:
            with np.errstate(over="ignore"):  # reported below
                cast = value.astype(parameter.dtype)
            if np.isfinite(cast).all():
                return cast
            wrong = f"{value.dtype} numbers beyond the range of {cast.dtype}; use another file"
        raise InputError(f"{self.tensors.origin}: {theirs} holds {wrong}")

    def _explain_parameters(self, parameters: dict[str, Parameter]) -> list[Parameter]:
        """Record why parameters were not filled; return those that should have been."""
        report, missing = self.report, []
        # Whether the source is only an encoder, e.g. the state dict of `vgg16().features`.
        names = {name for name in self.tensors.infos if not name.endswith(f".{COUNTER}")}
        of_encoder = {theirs for name, theirs in report.filled.items() if name.startswith(_ENCODERS)}
        encoder_alone = isinstance(self.model, FCN) and not self.is_network and names <= of_encoder
        for name, parameter in parameters.items():
            if name in report.filled or name in report.left:
                continue
            if encoder_alone and not name.startswith(_ENCODERS):
                report.left[name] = "the source holds only an encoder"
            elif name not in self.sought and self.layout.encoder_only:
                report.left[name] = "the layout has no name for it"
            elif _any(name, self.may_miss):
                report.left[name] = "missing, allowed"
            else:
                missing.append(parameter)
        return missing

    def _explain_tensors(self) -> list[str]:
        """Record why tensors were not used; return those that should have been."""
        report, unexpected = self.report, []
        used = set(report.filled.values())
        for theirs in self.tensors.infos:
            if theirs in used or theirs in report.ignored:
                continue
            if theirs.endswith(f".{COUNTER}"):
                report.ignored[theirs] = "a counter of torch's batch norm, not used"
            elif theirs in self.layout.constants:
                report.ignored[theirs] = "an option of the model"
                expected, found = self.layout.constants[theirs](self.model), self.tensors.read(theirs).ravel()
                if not np.allclose(found, expected, rtol=1e-6, atol=0):
                    wrong = f"{theirs} is {found[0]:g}, the model has {expected:g}"
                    raise InputError(f"{self.tensors.origin}: {wrong}; create it with these skip_scales")
            elif _any(theirs, self.layout.unused):
                report.ignored[theirs] = "the network has no layer for it"
            elif _any(theirs, self.may_stay):
                report.ignored[theirs] = "unexpected, allowed"
            else:
                unexpected.append(theirs)
        return unexpected

    def _renaming(self, missing: list[Parameter], unexpected: list[str]) -> str | None:
        """Return a hint if every missing tensor may have been renamed to an unexpected one of its shape."""
        renamed: dict[str, str] = {}
        for parameter in missing:
            same = (n for n in unexpected if n not in renamed and self.tensors.shapes[n] == parameter.torch_shape)
            if parameter.name not in self.sought or (found := next(same, None)) is None:
                return None
            renamed[found] = self.sought[parameter.name]
        listed = ", ".join(f"{new} to {old}" for new, old in list(renamed.items())[:8])
        return f"unexpected tensors have their shapes: rename {listed}, if they are the same"

    def _error(self, what: str, names: list[str], hint: str) -> InputError:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return InputError(f"{self.tensors.origin}: {len(names)} tensor(s) {what}: {', '.join(names[:8])}{more}; {hint}")


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
