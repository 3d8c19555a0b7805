"""The scripts in examples/ run and print the expected results."""

import re
import runpy
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Run a script as a user does, in float32; return its names."""

    def run(name, *words):
        monkeypatch.setattr("sys.argv", [name, *words])
        with jax.enable_x64(False):
            return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


def numbers(text):
    return [float(number) for number in re.findall(r"\b\d+(?:\.\d+)?(?:e-?\d+)?\b", text)]


@pytest.mark.slow
def test_training_on_arrays_learns(example, capsys):
    example("train_on_arrays", "40")
    held_out = capsys.readouterr().out.splitlines()[-1]
    assert numbers(held_out)[0] > 0.5, held_out  # by chance: a third


def test_power_iteration_finds_an_eigenvector(example, capsys):
    example("hessian")
    parameters, value, residual = numbers(capsys.readouterr().out)
    assert parameters > 10_000 and value > 0 and residual < 0.05


@pytest.mark.slow
def test_the_mean_of_per_example_gradients_is_the_batch_gradient(example, capsys):
    example("per_example_gradients")
    norms, difference = map(numbers, capsys.readouterr().out.splitlines())
    assert len(norms) == 4 and len(set(norms)) == 4 and difference[0] < 1e-4  # float32


def test_a_ported_network_gives_the_same_logits(example, capsys):
    example("port_and_compare")
    assert numbers(capsys.readouterr().out)[-1] < 1e-5  # float32
