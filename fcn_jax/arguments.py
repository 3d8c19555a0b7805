"""Command lines where only the standard library is at hand: one line for a mistake, and a config's fields as flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from fcn_jax.config import Config
from fcn_jax.errors import InputError
from fcn_jax.training.run import config_from_json

__all__ = ["Parser", "override"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is an InputError."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint."""
        raise InputError(f"{message}; --help lists what there is")


def _parsed(text: str) -> Any:
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    for parse in (json.loads, float):  # 3 as an int, 3. and .3 as floats
        try:
            return parse(text)
        except ValueError:
            continue
    return text


def _split(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag with the values that follow it; ``--flag=value`` is taken apart."""
    flag, values = None, []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            if flag is not None:
                yield flag, values
            flag, values = name, [value] if equals else []
        elif flag is None:
            raise InputError(f"unknown argument {argument!r}; fields of the recipe are set as in --optim.lr 0.1")
        else:
            values.append(argument)
    if flag is not None:
        yield flag, values


def override(config: Config, arguments: Sequence[str]) -> Config:
    """Set fields of a config as ``train.py`` does: ``["--optim.lr", "0.1", "--optim.nesterov", "--devices=2"]``.

    Raises:
        InputError: no such field, or a value of another type.
    """
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    for flag, texts in _split(arguments):
        *rooms, name = flag.removeprefix("--").replace("-", "_").split(".")
        room = values
        for part in rooms:
            room = room.get(part) if isinstance(room, dict) else None
        room = room if isinstance(room, dict) else {}
        if isinstance(room.get(name), bool) and not texts:
            texts = ["True"]
        elif name.startswith("no_") and isinstance(room.get(name[3:]), bool) and not texts:
            name, texts = name[3:], ["False"]
        if name not in room or isinstance(room[name], dict):
            raise InputError(f"unknown argument {flag!r}; fields of the recipe are set as in --optim.lr 0.1")
        if not texts:
            raise InputError(f"{flag} needs a value")
        parsed = [_parsed(text) for text in texts]
        # One value may be a name that looks like a number, or all of a tuple.
        candidates = [parsed[0], texts[0], parsed] if len(texts) == 1 else [parsed]
        complaints = []
        for room[name] in candidates:
            try:
                config = config_from_json(values)
                break
            except InputError as error:
                complaints.append(str(error).partition(": ")[2].partition(";")[0])
        else:
            raise InputError(f"{flag}: {complaints[0]}")
    return config
