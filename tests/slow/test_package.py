"""The wheel in an empty environment, outside of any checkout: it trains, evaluates, predicts, exports and reports."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fcn_jax

ROOT = Path(__file__).parents[2]
SMALL = "--data.shapes-count 32 --data.shapes-size 32 32 --model.width 0.0625 --train.steps 4 --train.eval-every 1"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    return sorted(folder.iterdir())


def test_the_files_pass_twine_and_hold_what_belongs_to_them(built):
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, built)], check=True)
    wheel, sdist = sorted(built, key=lambda file: file.suffix == ".gz")
    assert f"-{fcn_jax.__version__}-py3-none-any" in wheel.name and f"-{fcn_jax.__version__}.tar" in sdist.name
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", "fcn_jax"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert inside == set(tracked.stdout.split())
    with tarfile.open(sdist) as archive:
        assert inside <= {name.partition("/")[2] for name in archive.getnames()}


def test_the_wheel_works_outside_of_a_checkout(built, tmp_path):
    wheel = next(file for file in built if file.suffix == ".whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"fcn_jax[onnx] @ {wheel.as_uri()}"], check=True)
    (tmp_path / "work").mkdir()
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}

    def command(line):
        done = subprocess.run(
            [tmp_path / "venv/bin/fcn-jax", *line.split()],
            cwd=tmp_path / "work",
            env=keep,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "report: run/report.html" in command(f"train shapes --run run --data.cache-dir cache {SMALL}")
    assert "mean IoU" in command("eval --run run --split shapes/test")
    (tmp_path / "work/a.png").write_bytes(next((ROOT / "docs/images").glob("*.png")).read_bytes())
    command("predict a.png --run run --out predicted")
    assert (tmp_path / "work/predicted/a.png").exists()
    command("export --run run --out a.onnx --image-size 64 64 --preprocess --argmax")
    command("export --run run --out a.stablehlo")
    command("export --run run --out a.safetensors")
    command("report run")
    assert (tmp_path / "work/run/report.html").stat().st_size > 1e6
    config = (tmp_path / "work/run/config.json").read_text()
    assert '"commit": null' in config
