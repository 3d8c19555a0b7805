"""Loading trained networks: files of every layout, runs, the hub, and the commands that accept them."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import torch
import trees
from caffe_files import write_caffe
from inference_cases import color_blocks
from layout_cases import CASES
from safetensors.numpy import save_file
from small_networks import assert_same, build, make_network
from torch_sources import randomise

import fcn_jax
from fcn_jax import weights
from fcn_jax.cli import eval as cli_eval
from fcn_jax.cli import export as cli_export
from fcn_jax.cli import models as cli_models
from fcn_jax.cli import predict as cli_predict
from fcn_jax.cli import summary as cli_summary
from fcn_jax.cli import train as cli_train
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import make_predictor
from fcn_jax.pretrained import NetworkInfo
from fcn_jax.training.run import RunFolder

ROOT = Path(__file__).parents[2]
QUICK = {"pytorch-fcn 8s", "tramac 8s aux", "boostcamp 32s"}
MARKED = [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
NAMES = ("sky", "road", "tree")
CLASSES = {"class_names": NAMES, "palette": ((1, 2, 3), (4, 5, 6), (7, 8, 9)), "input_size": None}


@pytest.mark.parametrize("case", MARKED)
def test_a_file_of_every_layout_predicts_like_its_torch_module(case, tmp_path):
    make, name, _, size = CASES[case]
    module = randomise(make()).float().eval()
    file = tmp_path / "w.safetensors"
    save_file({key: np.ascontiguousarray(value.numpy()) for key, value in module.state_dict().items()}, file)
    model, variables, info = fcn_jax.from_pretrained(file, model=name, preprocessing="caffe")
    assert model.num_classes == 3 and info.class_names == ("class 0", "class 1", "class 2") and info.notes
    image = color_blocks(*size)
    with torch.no_grad():
        x = torch.from_numpy(np.array(fcn_jax.normalize(image[None], "caffe"))).permute(0, 3, 1, 2)
        theirs = torch.softmax(module(x), 1)[0].permute(1, 2, 0).numpy()
    ours = fcn_jax.predict(model, variables, image, info, probabilities=True)
    assert ours.dtype == np.float32 and ours.shape == (*size, 3)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)  # 1e-5 of logits in the hundreds
    sure = np.sort(theirs, -1)[..., -1] - np.sort(theirs, -1)[..., -2] > 1e-2
    assert np.array_equal(fcn_jax.predict(model, variables, image, info)[sure], theirs.argmax(-1)[sure])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network in our own file format, with its classes."""
    file = tmp_path_factory.mktemp("exported") / "model.safetensors"
    model, variables = build("fcn32s", fc_features=8, fc6_kernel=1)
    weights.save(file, model, variables, "caffe", classes=CLASSES)
    return file, model, variables


def test_our_file_gives_network_classes_and_preprocessing_without_torch(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    file, model, variables = exported
    found, values, info = fcn_jax.from_pretrained(file)
    assert found == model and (info.class_names, info.preprocessing, info.notes) == (NAMES, "caffe", ())
    assert info.palette == CLASSES["palette"]
    assert_same(values, variables)


def test_a_preprocessing_other_than_the_stated_one_is_rejected(exported):
    with pytest.raises(InputError, match="model.safetensors states its preprocessing, caffe; leave out imagenet"):
        fcn_jax.from_pretrained(exported[0], preprocessing="imagenet")
    with pytest.raises(InputError, match="unknown preprocessing 'torch'"):
        fcn_jax.from_pretrained(exported[0], preprocessing="torch")
    assert fcn_jax.from_pretrained(exported[0], preprocessing="caffe")[2].preprocessing == "caffe"


def test_a_caffe_file_of_21_classes_gets_voc_classes_and_needs_no_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    model, variables = build("fcn8s_pad100", 21, encoder="vgg16", fc_features=24)
    file = write_caffe(tmp_path / "fcn8s.caffemodel", weights.to_torch(model, variables, "pytorch-fcn"))
    found, _, info = fcn_jax.from_pretrained(file)
    assert found == model and info.class_names[15] == "person" and "PASCAL VOC" in info.notes[0]


def test_our_torch_file_needs_only_the_model_name(tmp_path):
    model, variables = build("fcn8s", 5, fc_features=6, fc6_kernel=3, encoder_norm="batch")
    weights.save(tmp_path / "own.pth", model, variables, "caffe")
    with pytest.raises(InputError, match="own.pth does not state its network; give --model"):
        fcn_jax.from_pretrained(tmp_path / "own.pth")
    found, values, info = fcn_jax.from_pretrained(tmp_path / "own.pth", model="fcn8s")
    assert found == model and not info.named and not info.preprocessing_known and len(info.notes) == 3
    assert_same(values, variables)
    weights.save(tmp_path / "own.pth", model.clone(skip_scales=(0.05, 0.01)), variables, "caffe")
    *_, info = fcn_jax.from_pretrained(tmp_path / "own.pth", model="fcn8s")
    assert any("skip scales" in note and "defaults of fcn8s are assumed" in note for note in info.notes)


@pytest.mark.parametrize(("name", "options"), [("fcn_resnet50", {}), ("fcn8s_resize", {"encoder": "vgg11"})])
def test_our_torch_file_may_have_an_auxiliary_head(name, options, tmp_path):
    model, variables = build(name, 5, aux_head=True, **options)
    weights.save(tmp_path / "own.pth", model, variables, "caffe")
    found, values, _ = fcn_jax.from_pretrained(tmp_path / "own.pth", model=name)
    assert found == model
    assert_same(values, variables)


def test_assumed_classes_and_preprocessing_are_not_exported_as_known(tmp_path):
    model, variables = build("fcn32s", 21, fc_features=8, fc6_kernel=1)
    weights.save(tmp_path / "a.safetensors", model, variables, None)
    names = [str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "b.safetensors")]
    assert cli_export.main(["--weights", *names]) == 0
    assert len(fcn_jax.from_pretrained(tmp_path / "b.safetensors")[2].notes) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": [0, -5]}, "not an input size"),
        ({"input_size": "64"}, "not an input size"),
        ({"class_names": ["a"], "palette": [[0, 0, 0]]}, "1 names for 3 classes"),
    ],
)
def test_damaged_class_metadata_is_rejected(change, message, tmp_path):
    model, variables = build("fcn32s", fc_features=8, fc6_kernel=1)
    weights.save(tmp_path / "w.safetensors", model, variables, None, classes=CLASSES | change)
    with pytest.raises(InputError, match=f"w.safetensors: its metadata has no valid classes .*{message}"):
        fcn_jax.from_pretrained(tmp_path / "w.safetensors")


def test_predict_resizes_to_the_input_size_and_back():
    model, variables = make_network("fcn8s", biases=False)
    info = NetworkInfo("x", NAMES, CLASSES["palette"], "imagenet", input_size=(64, 96))
    image = color_blocks(50, 70)
    found = fcn_jax.predict(model, variables, image, info, probabilities=True)
    resized = cv2.resize(image, (96, 64), interpolation=cv2.INTER_LINEAR)[None]
    expected = make_predictor(model, "imagenet", output="probabilities")(variables, resized, (50, 70))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_paths_may_start_with_the_home_folder(exported, monkeypatch):
    monkeypatch.setenv("HOME", str(exported[0].parent))
    assert fcn_jax.from_pretrained(f"~/{exported[0].name}")[0] == fcn_jax.from_pretrained(exported[0])[0]
    run = RunFolder("~/run")
    assert run.metrics_file == exported[0].parent / "run/metrics.jsonl" and run.path == run.local


def test_export_does_not_overwrite_its_source_a_run_or_a_model_card(exported, tmp_path, fails):
    file, hub = str(exported[0]), tmp_path / "hub"
    fails(cli_export.main, ["--weights", file, "--out", file], "is the source and would be overwritten")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"config": {}}')
    command = ["--weights", file, "--format", "hub", "--out"]
    fails(cli_export.main, [*command, tmp_path / "run"], "config.json of something else")
    assert cli_export.main([*command, str(hub)]) == 0
    fails(cli_export.main, [*command, hub], "README.md, which would be overwritten")
    fails(cli_export.main, [*command, tmp_path / "x", "--layout", "pytorch-fcn"], "leave out --layout")
    assert_same(fcn_jax.from_pretrained(hub)[1], exported[2])


def test_incomplete_networks_and_invalid_images_are_rejected(tmp_path, exported):
    file = tmp_path / "encoder.safetensors"
    model, variables = build("fcn32s", encoder="vgg16")
    weights.save(file, model, variables, "imagenet", "torchvision-vgg")
    for source, named in {
        file: "only an encoder", "vgg16-imagenet": "--init vgg16-imagenet", "nothing": "fcn8s-voc", tmp_path: "run",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=named):
            fcn_jax.from_pretrained(source)
    _, _, info = fcn_jax.from_pretrained(exported[0])
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), [[1]]):
        with pytest.raises(InputError, match="uint8 .h, w, 3."):
            fcn_jax.predict(*exported[1:], image, info)


# Runs in a separate process, as huggingface_hub reads its environment when it is imported.
READ = """
import json, sys
import jax, numpy as np
sys.modules["torch"] = None
import fcn_jax
model, variables, info = fcn_jax.from_pretrained("hf://me/fcn@v1")
errors = []
for source in ("hf://me/other@v1", "hf://fcn", "hf://me/fcn/deep"):
    try:
        fcn_jax.from_pretrained(source)
    except fcn_jax.errors.InputError as error:
        errors.append(str(error))
total = float(sum(np.abs(x).sum() for x in jax.tree.leaves(variables)))
print(json.dumps({"names": info.class_names, "sum": total, "errors": errors}))
"""


@pytest.fixture
def hub(exported, tmp_path):
    """A hub on the loopback with one exported repository; yields its folder, the requests and the environment."""
    folder = tmp_path / "hub"
    assert cli_export.main(["--weights", str(exported[0]), "--format", "hub", "--out", str(folder)]) == 0
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(send=False)

        def do_GET(self):
            self.answer(send=True)

        def answer(self, send):
            asked.append(self.path)
            found = self.path == "/me/fcn/resolve/v1/model.safetensors"
            self.send_response(200 if found else 404)
            content = (folder / "model.safetensors").read_bytes() if found else b""
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"abc"')
            if not found:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if send:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
    }
    yield folder, asked, environment
    server.shutdown()
    server.server_close()


def test_an_exported_hub_folder_loads_through_the_hub(hub, exported):
    folder, asked, environment = hub
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == "fcn32s" and config["class_names"] == list(NAMES)
    assert "sky, road, tree" in (folder / "README.md").read_text()
    done = subprocess.run([sys.executable, "-c", READ], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["names"] == list(NAMES) and asked
    # Sums in float32.
    assert found["sum"] == pytest.approx(float(sum(np.abs(x).sum() for x in jax.tree.leaves(exported[2]))), rel=1e-5)
    assert [line.partition(":")[0] for line in found["errors"]] == ["hf", "hf", "hf"] and "hf://me/other" in done.stdout
    asked.clear()
    training = "shapes --init-from hf://me/fcn@v1 --model.name fcn32s --model.encoder vgg11 --model.encoder-norm None "
    training += "--model.width 0.0625 --model.fc-features 8 --model.fc6-kernel 1 --data.preprocessing caffe "
    training += "--train.steps 1 --train.batch-size 2 --data.shapes-count 4 --devices 1 --data.workers 0"
    paths = ["--run", str(folder.parent / "run"), "--data.cache-dir", str(folder.parent / "cache")]
    command = [sys.executable, "train.py", *training.split(), *paths]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and asked and "from hf://me/fcn@v1" in " ".join(done.stdout.split()), done


def test_commands_accept_weights(exported, tmp_path, capsys, fails):
    file = str(exported[0])
    cv2.imwrite(str(tmp_path / "photo.png"), color_blocks(70, 90))
    assert cli_predict.main([str(tmp_path / "photo.png"), "--weights", file, "--out", str(tmp_path / "out")]) == 0
    assert cv2.imread(str(tmp_path / "out/photo.png")).shape == (70, 90, 3)
    trees.folder(tmp_path / "data", {"train": 1, "val": 2}, classes=NAMES)
    command = ["--weights", file, "--dir", str(tmp_path / "data"), "--split", "folder/val"]
    assert cli_eval.main([*command, "--out", str(tmp_path / "scores")]) == 0
    assert json.loads((tmp_path / "scores/eval_folder-val.json").read_text())["images"] == 2
    assert cli_summary.main(["--weights", file]) == 0 and "fcn32s, vgg11" in capsys.readouterr().out
    assert cli_models.main([]) == 0 and "fcn8s-voc-caffe" in capsys.readouterr().out
    fails(cli_eval.main, ["--weights", file], "--split")
    fails(cli_predict.main, ["a.png", "--out", tmp_path], "--run", "--weights")
    trees.folder(tmp_path / "other", {"train": 1, "val": 1}, classes=("sky", "sea", "tree"))
    fails(cli_eval.main, [*command[:3], tmp_path / "other", *command[4:]], "'sea' here", "'road' in the network")


@pytest.mark.slow
def test_the_fine_tuning_command_in_the_docs_transfers_all_but_score_layers(tmp_path, capsys):
    text = (Path(__file__).parents[2] / "docs/pretrained.md").read_text()
    command = re.search(r"^python train.py (camvid --init-from .*?)\n```", text, re.DOTALL | re.MULTILINE)[1]
    model, variables = build("fcn8s_pad100", 21, encoder="vgg16")
    file = write_caffe(tmp_path / "fcn8s.caffemodel", weights.to_torch(model, variables, "pytorch-fcn"))
    trees.camvid(tmp_path / "CAMVID", {"train": 4, "val": 2}, suffix=".jpg")
    words = (
        command.replace("\\\n", " ").replace("fcn8s-voc-caffe", str(file)).replace("CAMVID", str(tmp_path / "CAMVID"))
    )
    small = (
        "--model.width 0.0625 --train.steps 2 --train.batch-size 2 --data.crop-size 16 16 --data.workers 0 --devices 1"
    )
    paths = ["--data.cache-dir", str(tmp_path / "cache"), "--run", str(tmp_path / "run")]
    assert cli_train.main([*words.split(), *small.split(), *paths]) == 0
    assert "new: score_fr, score_pool3, score_pool4" in " ".join(capsys.readouterr().out.split())
    _, trained, info = fcn_jax.from_pretrained(tmp_path / "run", checkpoint="last")
    assert info.class_names[0] == "sky" and info.preprocessing == "caffe"
    for name, leaves in trained["params"]["vgg"].items():
        same = np.array_equal(leaves["kernel"], variables["params"]["vgg"][name]["kernel"])
        assert same == (name[4] in "12")
