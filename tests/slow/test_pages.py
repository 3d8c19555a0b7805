"""The commands and the Python of the pages that need nothing but this package, made small; and the site itself."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "train": "--data.cache-dir cache --model.width 0.0625 --train.steps 4 --devices 1",
    "shapes": "--data.shapes-count 32 --data.shapes-size 32 32 --train.eval-every 1",
    "own": "--init None --model.fc-features 8 --model.encoder vgg11 --data.base-size None --data.crop-size 32 32",
}


def blocks(page, kind=""):
    found = re.findall(r"^```(\S*)\n(.*?)^```$", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language == kind]


def run(line, placeholders=()):
    for name, value in placeholders:
        line = line.replace(name, value)
    words = shlex.split(line, comments=True)
    command, *arguments = words[1:] if words[0] == "fcn-jax" else [words[1].removesuffix(".py"), *words[2:]]
    if command == "train":
        arguments += f"{SMALL['train']} {SMALL[arguments[0]]}".split()
    assert import_module(f"fcn_jax.cli.{command}").main(arguments) == 0, line


def run_python(page):
    for text in blocks(page, "python"):
        exec(compile(text, f"docs/{page}.md", "exec"), {})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("photograph.jpg", np.random.default_rng(0).integers(0, 256, (97, 131, 3), np.uint8))
    return tmp_path


@pytest.mark.filterwarnings("default")  # of jax2onnx and what it imports
def test_start_and_export_work_as_they_stand(here, capsys):
    for line in "".join(blocks("start") + blocks("export")).splitlines():
        if ".onnx" not in line or find_spec("jax2onnx"):
            run(line)
    run_python("start")
    assert capsys.readouterr().out.endswith("('background', 'disc', 'square', 'triangle', 'star', 'ring') (97, 131)\n")
    assert {"photograph.png", "photograph_overlay.png"} <= {file.name for file in (here / "predictions").iterdir()}
    assert (here / "demo.stablehlo").exists() and (here / "runs/demo/report.html").exists()


def test_own_data_works_as_it_stands(here):
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (here / f"DIR/{folder}").mkdir(parents=True)
    for i in range(10):
        mask = np.zeros((40 + i, 50), np.uint8)
        mask[10:30, 10 : 30 + i] = 255
        image = rng.integers(0, 60, (*mask.shape, 3), np.uint8) + (mask // 2)[..., None]
        cv2.imwrite(str(here / f"DIR/images/{i}.jpg"), image)
        cv2.imwrite(str(here / f"DIR/masks/{i}.png"), mask)
    (here / "DIR/classes.txt").write_text(blocks("own-data", "text")[1])
    for line in "".join(blocks("own-data")).splitlines():
        run(line, [("PHOTOGRAPHS", "DIR/images")])
    run_python("own-data")
    assert (here / "runs/facts/sheet.png").exists() and len([*(here / "predictions").glob("*_overlay.png")]) == 10


def test_comparing_numerics_works_as_it_stands(here, capsys):
    pytest.importorskip("torch")
    for line in "".join(blocks("comparing-numerics")).splitlines():
        run(line, [("--width 0.25", "--width 0.0625 --image-size 32 32")])
    assert "float64" in capsys.readouterr().out


def test_the_site_is_built_without_warnings(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", "-b", "html", ".", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "docs/reference.html").read_text()
    for name in ("fcn_jax.models.create_model", "fcn_jax.weights.load", "fcn_jax.step.make_train_step"):
        assert f'id="{name}"' in reference, name
