"""The commands of docs/porting.md, with a narrower network, and the Python of two other pages, as they stand."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import torch
import torch_sources as sources
import trees

from fcn_jax import weights
from fcn_jax.cli.export import main as export_command
from fcn_jax.cli.parity import main as parity_command
from fcn_jax.cli.port import main as port_command
from fcn_jax.cli.train import main as train_command
from fcn_jax.training.run import open_run

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/porting.md").read_text()
W = 0.0625
VOC = {"train": ["2007_000001", "2007_000002"], "val": ["2007_000101"]}
# What makes each command small; nothing of what it does changes.
SMALL = {"port": f"--width {W}", "export": "", "parity": f"--width {W} --steps 0 --image-size 32 32"}
SMALL["train"] = f"--model.width {W} --train.steps 2 --devices 1 --data.cache-dir cache"
COMMANDS = {"train": train_command, "port": port_command, "export": export_command, "parity": parity_command}


def run(line):
    words = shlex.split(line)
    assert words[:2] == ["python", "train.py"] or words[0] == "fcn-jax", line
    name = "train" if words[0] == "python" else words[1]
    return COMMANDS[name]([*words[2:], *SMALL[name].split()])


def test_every_command_of_the_guide_works_and_the_last_weights_are_the_trained_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = sources.randomise(sources.TorchvisionVGG("vgg16", False, W, 10)).float()
    torch.save(module.state_dict(), "vgg16.pth")
    trees.sbd(tmp_path / "VOC", {"train": VOC["train"], "val": []})
    trees.voc(tmp_path / "VOC", "2011", {"val": VOC["val"], "train": []})
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if not kind for line in block.splitlines()]
    assert len(lines) == 7
    for line in lines:
        assert run(line) == 0, line
    out = " ".join(capsys.readouterr().out.split())
    assert "new: score_pool4, upscore16, upscore2; unused: upscore32" in out
    assert "new: score_pool3, upscore8, upscore_pool4; unused: upscore16" in out

    trained = open_run("runs/voc-paper-8s")
    again = weights.load("again/weights.safetensors", trained.model, jax.tree.map(np.zeros_like, trained.variables))
    jax.tree.map(np.testing.assert_array_equal, again["params"], trained.variables["params"])
    assert weights.inspect("again/weights.safetensors").preprocessing == "imagenet"
    # The encoder came all the way from torchvision's file; the paper's rates hardly move it in six steps.
    first = np.asarray(trained.variables["params"]["vgg"]["conv1_1"]["kernel"]).transpose(3, 2, 0, 1)
    np.testing.assert_allclose(first, module.features[0].weight.detach(), atol=1e-3)
    assert np.asarray(trained.variables["params"]["score_pool3"]["bias"]).any()
    # and pytorch-fcn's own class takes the exported file
    sources.PytorchFCN(8, 21, W).load_state_dict(torch.load("fcn8s.pth"), strict=True)

    (example,) = [block for kind, block in blocks if kind == "python"]
    exec(compile(example, "docs/porting.md", "exec"), {})


def test_the_python_of_the_readme_runs_as_it_stands(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert re.search(r"mean IoU 0\.\d{4}, pixel accuracy 0\.\d{4}\nloss \d\.\d{4}", capsys.readouterr().out)


def test_the_python_of_the_page_on_networks_gives_the_shape_that_it_states():
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/networks.md").read_text(), re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(block, "docs/networks.md", "exec"), names)
    assert f"# {names['logits'].shape}" in block
