"""The options of all commands in README.md and docs/ exist. Slow tests run those in fences without a language."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from fcn_jax.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCES = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:python (train|eval)\.py|fcn-jax (\w+))\b([^\n]*)")


def commands_of(page):
    """Return (command, arguments) of each line, also of those within a quoted command of another program."""
    for block in (text for kind, text in FENCES.findall(page.read_text()) if kind in ("", "text")):
        for line in block.replace("\\\n", " ").splitlines():
            for script, command, rest in COMMAND.findall(line):
                quotes = [i for i, c in enumerate(rest) if c in "\"'"]
                rest = rest[: quotes[-1]] if len(quotes) % 2 else rest  # the quote was opened before the command
                rest = re.sub(r"\$\w+", "1", rest).rstrip("& ")  # variables of a shell script
                yield script or command, shlex.split(rest, comments=True)


CASES = [
    pytest.param(command, arguments, id=f"{page.stem}-{command}-{i}")
    for page in PAGES
    for i, (command, arguments) in enumerate(commands_of(page))
]


class Parsed(Exception):
    pass


@pytest.mark.parametrize(("command", "arguments"), CASES)
def test_the_options_of_a_documented_command_exist(command, arguments, monkeypatch):
    def parsing_only(real):
        def parse(*given, **options):
            real(*given, **options)
            raise Parsed

        return parse

    for module, name in ((tyro, "cli"), (tyro.extras, "overridable_config_cli")):
        monkeypatch.setattr(module, name, parsing_only(getattr(module, name)))
    assert command in COMMANDS
    if arguments[:1] == ["--resume"]:  # which reads the run's config: any recipe has the same fields
        arguments = ["shapes", *arguments[2:]]
    with pytest.raises(Parsed):
        importlib.import_module(f"fcn_jax.cli.{command}").main(arguments)


def test_every_kind_of_command_is_documented():
    documented = {case.values[0] for case in CASES}
    assert documented == set(COMMANDS) and len(CASES) > 50
