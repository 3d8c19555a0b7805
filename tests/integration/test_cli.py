"""A user's mistake gives exit code 2 and one line with the cause and the remedy."""

import csv
import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import trees
from PIL import Image

from fcn_jax.cli import eval as evaluation
from fcn_jax.cli import main
from fcn_jax.cli.eval import main as eval_command
from fcn_jax.cli.predict import main as predict_command
from fcn_jax.cli.process import guarded
from fcn_jax.cli.summary import main as summary_command
from fcn_jax.cli.train import main as train_command
from fcn_jax.config import Config, OptimConfig, TrainConfig
from fcn_jax.data.shapes import CLASSES
from fcn_jax.errors import InputError, Stopped
from fcn_jax.evaluation.evaluate import Views
from fcn_jax.evaluation.predict import make_image_predictor
from fcn_jax.pretrained import from_pretrained
from fcn_jax.training.run import RunFolder, lengthened

ROOT = Path(__file__).parents[2]
SHAPES = ["--data.shapes-size", "32", "32", "--data.shapes-count", "4"]
TINY = "--model.width 0.05 --model.encoder vgg11 --model.fc-features 8 --train.steps 1 --optim.lr 0.1".split()
TINY += ["--train.batch-size", "4", "--devices", "1", *SHAPES]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    arguments = ["shapes", *TINY, "--run", str(folder / "run"), "--data.cache-dir", str(folder / "cache")]
    assert guarded(train_command, arguments) == 0
    return folder / "run"


# A command and the words of its error line. For values out of range the line names the flag.
CANNOT_RUN = {
    "nosuch": "nosuch, shapes, voc-tramac", "shapes --model.name fcn9s": "fcn9s, fcn8s, fcns_ladder",
    "shapes --model.crop 1 2 3": "crop, fcn8s", "shapes --data.train cityscapes/train": "cityscapes, camvid",
    "shapes --data.train shapes/dev": "dev, train", "shapes --devices 99": "99, JAX sees 8",
    "shapes --train.batch-size 3 --devices 2": "3, 2 devices, --train.batch-size",
    "shapes --loss.class-weights 1 2": "6 class weights, median",
    "shapes --train.batch-size 0": "--train.batch-size >= 1, 0", "shapes --optim.lr 0": "--optim.lr > 0",
    "shapes --train.eval-every nan": "--train.eval-every > 0, nan",
    "shapes --data.crop-size -5 32": "--data.crop-size, -5",
    "shapes --data.eval-multiple 48": "--data.eval-multiple 1 or a multiple of 32",
    "shapes --data.dir s3://bucket/set": "--data.dir s3://bucket/set, not supported",
    "camvid": "--data.dir", "camvid --data.dir /nonexistent": "/nonexistent",
    "shapes --init /nonexistent.pth": "/nonexistent.pth", "shapes --init-from /nonexistent.pth": "/nonexistent.pth",
    "shapes --init vgg16-imagnet": "vgg16-imagnet, vgg16-imagenet",
}  # fmt: skip
OUT_OF_RANGE = (
    "--train.epochs None", "--train.log-every 0", "--train.accumulate -2", "--train.eval-batch-size 0",
    "--train.seed -1", "--data.workers -1", "--data.input-size 0 32", "--optim.warmup-steps -1", "--optim.momentum 1",
    "--data.scale 2 0.5", "--data.bits 8", "--train.steps 9999999999",
    "--optim.weight-decay -1", "--optim.clip-norm 0", "--loss.hard-fraction 1.5", "--loss.class-weights nan 1 1 1 1 1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named"),
    [*CANNOT_RUN.items(), *((f"shapes {words}", words.partition(" ")[0]) for words in OUT_OF_RANGE)],
)
def test_an_invalid_training_command_is_rejected(fails, tmp_path, arguments, named):
    places = ["--run", tmp_path / "run", "--data.cache-dir", tmp_path / "cache"]
    fails(train_command, [*arguments.split(), *SHAPES, *places], *named.split(", "))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("train shapes --model.encoder resnet", "resnet vgg16"), ("train shapes --optim.lrr 1", "--optim.lrr"),
        ("train shapes --optim.lr fast", "--optim.lr fast"), ("train shapes --loss.kind hinge", "hinge softmax"),
        ("parity fcn8s --dtype float8", "float8"), ("bench --device tpu", "tpu"), ("bench --against caffe", "caffe"),
        ("bench --rounds many", "many"), ("bench --fast", "--fast"),
    ],
)  # fmt: skip
def test_an_argument_that_cannot_be_parsed_gives_exit_code_2(capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert all(word in printed for word in named.split()), printed


def test_an_s3_url_is_rejected_and_no_folder_is_created(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(train_command, ["shapes", "--run", "s3://bucket/run"], "--run s3://bucket/run", "not supported")
    fails(eval_command, ["--run", "s3://bucket/run"], "s3://bucket/run", "not supported")
    assert not list(tmp_path.iterdir())


def test_FCN_JAX_DEBUG_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("FCN_JAX_DEBUG", "1")
    assert main(["train", "nosuch"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.splitlines()[-1].startswith("error: unknown recipe 'nosuch'")


def test_unusable_data_is_named(fails, tmp_path):
    root = trees.camvid(tmp_path / "camvid", {"train": 2, "val": 1})
    arguments = ["camvid", *TINY, "--data.dir", root, "--data.cache-dir", tmp_path / "cache", "--run", tmp_path / "run"]
    trees.write_mask(root / "trainannot/train_001.png", np.zeros((3, 3), np.uint8))
    fails(train_command, arguments, "train_001", "3 x 3")
    (root / "train/train_000.png").write_bytes(b"<html>not found</html>")
    fails(train_command, arguments, "train_000.png")


def test_each_evaluation_writes_its_own_files_and_eval_json_is_plain(capsys, fails, run, monkeypatch):
    fails(eval_command, ["--run", run, "--scales", "0"], "--scales", "0.1 ... 8")
    counted, passed, make = set(), [], evaluation.make_predictor
    monkeypatch.setattr(evaluation, "make_predictor", lambda *given: passed.append(given[3]) or make(*given))
    for arguments, name, views in (
        ([], "eval", "plain"),
        (["--flip", "--scales", "0.5", "1"], "eval_shapes-val_flip_scales-0.5-1", "4 views: scales 0.5 1, flip"),
        (["--split", "shapes/test"], "eval_shapes-test", "plain"),
    ):
        assert eval_command(["--run", str(run), *arguments]) == 0
        saved = json.loads((run / f"{name}.json").read_text())
        assert saved["views"] == views and views in " ".join(capsys.readouterr().out.split())
        assert (run / f"figures/{name}_predictions.png").is_file()
        if "--split" not in arguments:
            counted.add(int(np.sum(saved["confusion"])))
    assert len(counted) == 1  # the same pixels are counted
    assert passed == [Views(), Views(scales=(0.5, 1.0), flip=True), Views()]
    plain = json.loads((run / "eval.json").read_text())
    assert plain["split"] == "shapes/val" and plain["boundary"] is None
    assert (run / "figures/eval_classes.png").exists()
    capsys.readouterr()
    assert eval_command(["--run", str(run), "--boundary", "2"]) == 0
    assert "mean boundary IoU" in capsys.readouterr().out
    edges = json.loads((run / "eval.json").read_text())
    assert edges["boundary"]["pixels"] == 2 and len(edges["boundary"]["per_class_iu"]) == 6
    assert edges["scores"] == plain["scores"]
    iou = plain["scores"]["per_class_iu"][0]
    assert plain["scores"]["per_class_dice"][0] == pytest.approx(2 * iou / (1 + iou))
    fails(eval_command, ["--run", run, "--boundary", "0"], "--boundary")


def test_a_run_is_opened_from_python_without_warnings(run):
    code = f"from fcn_jax.training.run import open_run; print(open_run({str(run)!r}).step)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "1", "")


def test_resume_extends_a_run_from_its_folder_and_rejects_other_settings(fails, tmp_path):
    run = tmp_path / "run"
    small = ["shapes", *TINY, "--data.cache-dir", tmp_path / "cache", "--optim.warmup-steps", "0", "--run", run]
    assert train_command([*map(str, small), "--optim.schedule", "fixed"]) == 0
    before = (run / "config.json").read_bytes()
    fails(train_command, [*small, "--optim.schedule", "fixed", "--optim.lr", "0.5"], "optim.lr 0.1 (now 0.5)", "--run")
    assert (run / "config.json").read_bytes() == before
    assert train_command(["--resume", str(run), "--train.steps", "2"]) == 0
    assert [row["step"] for row in RunFolder(run).rows() if row["kind"] == "val"] == [1, 2]
    assert RunFolder(run).read_config()[0].train.steps == 2
    fails(train_command, ["--resume", run, "--optim.lr", "0.5"], "optim.lr 0.1 (now 0.5)")
    fails(train_command, ["--resume", run, "--optim.step-every", "0.1"], "started with optim.step_every 0.4")
    fails(train_command, ["--resume", run, "--train.steps", "1"], "cannot be shortened")
    assert RunFolder(run).read_config()[0].train.steps == 2
    fails(train_command, ["--resume", run, "--run", tmp_path / "b"], f"leave out --run {tmp_path}/b, or start it with")
    fails(train_command, ["--resume"], "--resume needs the folder of a run")
    fails(train_command, ["--resume", run / "config.json"], "is a file, so it is not a run's folder")


@pytest.mark.parametrize(
    ("schedule", "before", "after", "expected"),
    [
        ("fixed", {"epochs": 2.0}, {"epochs": 4.0}, (None, 4.0, 0.4)),
        ("step", {"epochs": 2.0, "steps": 10}, {"epochs": 2.0, "steps": 20}, (20, 2.0, 0.2)),
        ("fixed", {"epochs": 2.0, "steps": 10}, {"epochs": 3.0, "steps": 10}, "--train.steps; use the same"),
        ("fixed", {"steps": 10}, {"steps": 5}, "a length of 10 steps and cannot be shortened to 5"),
        ("step", {"epochs": 2.0}, {"epochs": 1.5}, "a length of 2.0 epochs and cannot be shortened to 1.5"),
        ("step", {"steps": 10}, {"steps": 20}, (20, None, 0.2)),
        ("poly", {"steps": 10}, {"steps": 20}, "--init-from runs/shapes with a new --run"),
        ("step", {"epochs": 2.0}, {"epochs": 2.0, "steps": 20}, "--train.epochs; use the same to lengthen it"),
    ],
)
def test_a_run_can_be_extended_unless_its_past_depends_on_its_length(schedule, before, after, expected):
    config = Config(optim=OptimConfig(schedule=schedule), train=TrainConfig(**before))
    longer = replace(config, train=TrainConfig(**after))
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            lengthened(config, longer)
        return
    found = lengthened(config, longer)
    assert (found.train.steps, found.train.epochs, found.optim.step_every) == expected


def test_evaluation_of_missing_runs_checkpoints_and_splits_is_rejected(fails, run, tmp_path):
    fails(eval_command, ["--run", tmp_path], tmp_path, "config.json")
    fails(eval_command, ["--run", run, "--checkpoint", "77"], "77", "best, last")
    fails(eval_command, ["--weights", run, "--split", "shapes/val"], f"give a run as --run {run}")
    fails(eval_command, ["--run", run, "--split", "shapes/dev"], "dev", "val")
    trees.folder(tmp_path / "folder", {"val": 1})
    other = ["--run", run, "--split", "folder/val", "--dir", tmp_path / "folder"]
    fails(eval_command, other, "folder/val", "class 1 is 'cat' here and 'disc' in the network")


def test_a_checkpoint_of_another_network_is_reported(fails, run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads((run / "config.json").read_text())
    content["config"]["model"]["width"] = 0.1
    (other / "config.json").write_text(json.dumps(content))
    (other / "checkpoints").symlink_to(run / "checkpoints")
    fails(eval_command, ["--run", other], "checkpoint", "does not fit")
    (other / "config.json").write_text("{")
    fails(eval_command, ["--run", other], "config.json", "damaged")


def _images(folder):
    rgb, exif = trees.picture(0, (21, 34)), Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees: a viewer shows 34 x 21 as 21 x 34
    folder.mkdir()
    Image.fromarray(rgb).save(folder / "rgb.png")
    Image.fromarray(rgb[:1, :1]).save(folder / "one.png")
    Image.fromarray(rgb).save(folder / "turned.jpg", exif=exif)
    return {"rgb": (21, 34), "one": (1, 1), "turned": (34, 21)}


def test_predict_writes_label_map_and_overlay_at_the_image_size(run, tmp_path):
    sizes = _images(tmp_path / "in")
    paths = [str(path) for path in sorted((tmp_path / "in").iterdir())]
    assert guarded(predict_command, [*paths, "--run", str(run), "--out", str(tmp_path / "out")]) == 0
    for name, (h, w) in sizes.items():
        with Image.open(tmp_path / "out" / f"{name}.png") as labels:
            assert labels.mode == "P" and np.asarray(labels).shape == (h, w) and np.asarray(labels).max() < 6
            assert labels.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
        assert cv2.imread(str(tmp_path / "out" / f"{name}_overlay.png")).shape == (h, w, 3)


def photographs(root):
    """Write a typical user's folder: photographs of several sizes, masks of 0 and 255, no splits."""
    rng = np.random.default_rng(0)
    for index in range(10):
        h, w = rng.integers(40, 70, 2)
        mask = np.zeros((h, w), np.uint8)
        top, left = rng.integers(5, 15, 2)
        mask[top : top + 20, left : left + 20] = 255
        image = rng.integers(0, 80, (h, w, 3)) + np.where(mask, 150, 0)[..., None]
        trees.write_image(root / f"images/{index}.jpg", image.astype(np.uint8))
        trees.write_mask(root / f"masks/{index}.png", mask)
    (root / "classes.txt").write_text("background\nobject #ff8000\n")


def test_own_photographs_are_checked_trained_on_and_predicted(fails, tmp_path, capsys):
    photographs(tmp_path / "set")
    (tmp_path / "set/images/10.jpg").write_bytes((tmp_path / "set/images/9.jpg").read_bytes())
    (tmp_path / "set/masks/10.png").write_bytes((tmp_path / "set/masks/9.png").read_bytes())
    data = f"--data.dir {tmp_path}/set --data.cache-dir {tmp_path}/cache --data.mask-values 0 255".split()
    assert main(["data", "folder/all", *data, "--out", str(tmp_path / "facts")]) == 0
    printed = capsys.readouterr().out
    assert "11 images" in printed and "suspicious: the same image twice: 10, 9" in printed
    facts = json.loads((tmp_path / "facts/data.json").read_text())
    assert facts["classes"]["object"]["images"] == 11 and 0 < facts["classes"]["object"]["share"] < 0.5
    with Image.open(tmp_path / "facts/sheet.png") as sheet:
        assert sheet.size == (960, 3 * 240)
    run = str(tmp_path / "run")
    small = (
        "--init None --model.encoder vgg11 --model.width 0.05 --model.fc-features 8 --data.workers 0 --devices 1 "
        "--data.base-size 48 --data.crop-size 32 32 --train.batch-size 4 --train.steps 40 --optim.lr 0.1 "
        "--loss.terms softmax:1 dice:0.5"
    ).split()
    assert train_command(["own", *data, "--data.val-fraction", "0.3", "--run", run, *small]) == 0
    assert json.loads((Path(run) / "config.json").read_text())["dataset"]["palette"] == [[0, 0, 0], [255, 128, 0]]
    assert main(["predict", str(tmp_path / "set/images"), "--run", run, "--out", str(tmp_path / "out")]) == 0
    labels = np.asarray(Image.open(tmp_path / "out/0.png"))
    truth = cv2.imread(str(tmp_path / "set/masks/0.png"), cv2.IMREAD_GRAYSCALE)
    assert labels.shape == truth.shape and np.mean(labels == (truth == 255)) > 0.8
    fails(train_command, ["own", *data, "--run", tmp_path / "other", *small], "--data.val-fraction")
    for wrong, named in (
        ("--data.mask-values 0 0", "distinct value for each class"),
        ("--data.mask-values 0 300", "255"),
    ):
        fails(main, ["data", "folder/all", *data, *wrong.split()], named)
    fails(main, ["data", "folder/all", *data, "--data.mean", "1", "2"], "--data.channels")
    for useless in ("--data.mask-values 0 255", "--data.val-fraction 0.2", "--data.classes classes.txt"):
        option = useless.split()
        fails(train_command, ["shapes", *option, "--run", tmp_path / "other"], option[0], "only to folder")
        fails(main, ["data", "shapes/val", *option], option[0], "only to folder")
    fails(main, ["predict", tmp_path / "set/*.gif", "--run", run, "--out", tmp_path / "out"], "*.gif")


def test_predict_names_unreadable_inputs(fails, run, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8 not a picture")
    out = ["--run", run, "--out", tmp_path / "out"]
    fails(predict_command, [bad, *out], "bad.jpg")
    fails(predict_command, [tmp_path / "none.png", *out], "none.png")
    fails(predict_command, out, "image")
    fails(predict_command, ["a/x.png", "b/x.jpg", *out], "out/x.png would be written for two of the images")
    fails(predict_command, ["x.png", "x_overlay.png", *out], "out/x_overlay.png would be")
    fails(predict_command, [bad, "--run", run, "--out", bad], "--out", "bad.jpg")
    fails(predict_command, ["caf\udce9.jpg", *out], r"'caf\udce9.jpg'", "UTF-8")


def test_predict_accepts_folders_and_patterns_and_skips_unreadable_files(run, tmp_path, capsys):
    sizes = _images(tmp_path / "in")
    (tmp_path / "in/bad.jpg").write_bytes(b"\xff\xd8 not a picture")
    (tmp_path / "in/notes.txt").write_text("not an image")
    (tmp_path / "in/rgb.npy").write_bytes(b"beside rgb.png, for networks of other channels")
    page = Image.new("RGB", (3, 2))
    page.save(tmp_path / "in/pages.tif", save_all=True, append_images=[page])
    out = tmp_path / "out"
    arguments = [str(tmp_path / "in"), "--run", str(run), "--out", str(out), "--probabilities", "--confidence"]
    assert guarded(predict_command, arguments) == 3
    printed = capsys.readouterr()
    assert printed.err.count("skipped: ") == 2 and "bad.jpg" in printed.err and "pages.tif" in printed.err
    assert "2 of 5 images" in printed.err
    assert re.search(r"3 images in .* s: decoding \d+%, network \d+%, encoding \d+%", printed.out)
    rows = list(csv.DictReader((out / "classes.csv").read_text().splitlines()))
    assert [Path(row["image"]).name for row in rows] == ["one.png", "rgb.png", "turned.jpg"]
    for row in rows:
        name = Path(row["image"]).stem
        labels = np.asarray(Image.open(out / f"{name}.png"))
        assert (int(row["height"]), int(row["width"])) == labels.shape == sizes[name]
        shares = [float(row[each]) for each in CLASSES]
        np.testing.assert_allclose(shares, [np.mean(labels == index) for index in range(6)], atol=1e-6)  # six decimals
        probabilities = np.load(out / f"{name}.npz")["probabilities"]
        assert probabilities.dtype == np.float16 and probabilities.shape == (*labels.shape, 6)
        confidence = cv2.imread(str(out / f"{name}_confidence.png"), cv2.IMREAD_GRAYSCALE)
        np.testing.assert_allclose(confidence / 255, probabilities.max(-1), atol=0.003)  # rounding to 8 bits
    views = ["--flip", "--scales", "0.75", "1", "--confidence", "--probabilities"]
    pattern = [str(tmp_path / "in/*.png"), "--run", str(run), "--out", str(tmp_path / "views")]
    assert guarded(predict_command, [*pattern, *views]) == 0
    assert len(list((tmp_path / "views").iterdir())) == 2 * 4 + 1
    model, variables, info = from_pretrained(run)
    predict = make_image_predictor(
        model, info.preprocessing, output="probabilities", views=Views((0.75, 1.0), flip=True)
    )
    averaged = np.load(tmp_path / "views/rgb.npz")["probabilities"]
    np.testing.assert_allclose(averaged, predict(variables, trees.picture(0, (21, 34))), atol=1e-3)  # float16
    assert not np.array_equal(averaged, np.load(out / "rgb.npz")["probabilities"])


def test_predict_never_overwrites_an_input_image(fails, run, tmp_path):
    image = tmp_path / "a.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(image)
    before = image.read_bytes()
    fails(predict_command, [image, "--run", run, "--out", tmp_path], "a.png", "--out")
    assert image.read_bytes() == before


def test_predict_keeps_masks_beside_the_images_and_the_table_of_an_earlier_command(fails, run, tmp_path):
    out = tmp_path / "out"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.png").write_bytes(b"a mask made by hand")
    command = [str(tmp_path / "a.jpg"), "--run", str(run), "--out"]
    fails(predict_command, [*command, tmp_path], "a.png exists, in a folder without an earlier classes.csv")
    assert (tmp_path / "a.png").read_bytes() == b"a mask made by hand"
    assert guarded(predict_command, [*command, str(out)]) == 0
    before = (out / "classes.csv").read_bytes()
    fails(predict_command, [tmp_path / "typo.jpg", "--run", run, "--out", out], "typo.jpg: No such file")
    assert (out / "classes.csv").read_bytes() == before
    assert guarded(predict_command, [*command, str(out)]) == 0


def test_a_home_folder_after_an_equals_sign_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["compile", "fcn8s", "--target", "cpu:1", "--out=~/made/x.json", "--num-classes", "0"]) == 2
    assert main(["export", "--run", "none", "--out=~/made/x.pth"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


DISK = "error: %s: %s; check the path and the disk\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "resumes a run from its last checkpoint"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes."),
            2,
            "12 bytes.); use smaller images",
        ),
        (MemoryError(), 2, "error: out of memory (MemoryError); use smaller images or batches, or train with"),
        (
            Stopped("stopped by SIGTERM at step 7, which is saved; the same command resumes", 15),
            143,
            "which is saved",
        ),
        *((OSError(n, os.strerror(n)), 2, DISK % ("a file", os.strerror(n))) for n in (errno.ENOSPC, errno.EROFS)),
        (OSError(errno.ENOENT, "No such file", "/none/a.png"), 2, DISK % ("/none/a.png", "No such file")),
    ],
)
def test_interrupts_signals_and_disk_errors_have_their_exit_codes(error, code, message, capsys):
    def ended(arguments):
        raise error

    assert guarded(ended, []) == code
    assert message in capsys.readouterr().err


def test_summary_prints_the_layer_table(capsys, fails):
    assert summary_command(["fcn8s_pad100", "--image-size", "500", "500"]) == 0
    out = capsys.readouterr().out
    assert "134,489,759" in out and "vgg/conv1_1" in out and "1 568 568 21" in out
    fails(summary_command, ["fcn8"], "fcn8", "fcn8s")
    fails(summary_command, ["fcn8s", "--image-size", "-3", "5"], "--image-size")


def test_failing_commands_give_exit_code_2_and_no_traceback():
    for command, platform in ((["train.py", "nosuch"], "cpu"), (["eval.py", "--run", "/nonexistent"], "cpu"),
                              (["train.py", "--train.steps", "1", "--run", "/tmp/never"], "cuda")):  # fmt: skip
        environment = {**os.environ, "JAX_PLATFORMS": platform}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 or platform == "cuda"
        assert platform == "cpu" or "JAX finds no device with JAX_PLATFORMS='cuda'" in done.stderr
