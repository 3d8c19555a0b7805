"""Images other than 8-bit RGB: decoding, training, prediction, and RGB weights widened to other channels."""

import io
import json

import cv2
import jax
import numpy as np
import pytest
import tifffile
import trees
from PIL import Image
from small_networks import create, make_network

import fcn_jax
from fcn_jax import weights
from fcn_jax.cli import main
from fcn_jax.cli.train import main as train_command
from fcn_jax.config import DataConfig
from fcn_jax.data import datasets
from fcn_jax.data.io import decode_channels, decode_image, encode_array
from fcn_jax.errors import InputError, UnreadableError
from fcn_jax.preprocessing import Standardize
from fcn_jax.weights.names import widen

RNG = np.random.default_rng(0)


def files(image):
    """Return the image encoded in each file format that supports it."""
    encoded = {"npy": encode_array(image)}
    options = {"contig": image, "separate": np.moveaxis(image, -1, 0)}
    for config, array in options.items() if image.shape[2] > 1 else [(None, image[..., 0])]:
        tifffile.imwrite(file := io.BytesIO(), array, planarconfig=config, photometric="minisblack")
        encoded[f"{config}.tif"] = file.getvalue()
    if image.shape[2] == 1:
        encoded["png"] = cv2.imencode(".png", image)[1].tobytes()
    if image.shape[2] == 4:
        encoded["png"] = cv2.imencode(".png", image[..., [2, 1, 0, 3]])[1].tobytes()
    return encoded


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 4, 5])
def test_every_file_format_decodes_to_its_channels(channels, dtype):
    image = RNG.integers(0, np.iinfo(dtype).max, (7, 9, channels)).astype(dtype)
    for kind, data in files(image).items():
        found = decode_channels(data, kind, channels)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, image, err_msg=kind)
        with pytest.raises(UnreadableError, match=f"{kind}: .*expected uint8 or uint16 .*, {channels + 1}"):
            decode_channels(data, kind, channels + 1)
        with pytest.raises(UnreadableError, match=kind):
            decode_channels(data[: len(data) // 2], kind, channels)


def test_exif_orientation_is_applied_and_tiff_pages_need_channels():
    image, exif = Image.fromarray(trees.picture(0, (20, 30))), Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise shows it upright
    image.save(turned := io.BytesIO(), "JPEG", exif=exif)
    image.save(stored := io.BytesIO(), "JPEG")
    for decode in (decode_image, lambda data, name: decode_channels(data, name, 3)):
        upright = np.rot90(decode(stored.getvalue(), "a.jpg"), -1)
        np.testing.assert_array_equal(decode(turned.getvalue(), "a.jpg"), upright)
    tifffile.imwrite(file := io.BytesIO(), np.zeros((5, 40, 50), np.uint8), photometric="minisblack")
    with pytest.raises(InputError, match="5 pages; .*--data.channels 5"):
        decode_image(file.getvalue(), "a.tif")
    assert decode_channels(file.getvalue(), "a.tif", 5).shape == (40, 50, 5)


def test_float_images_are_rejected():
    data = files(np.zeros((4, 4, 5), np.uint8))["npy"].replace(b"|u1", b"<f4")
    with pytest.raises(InputError, match="a.npy"):
        decode_channels(data, "a.npy", 5)


WIDER = [("fcn32s", 1), ("fcn32s", 2), ("fcn8s", 5), ("fcn_resnet50", 5)]
SLOW_WIDER = [("fcn_resnet50", channels) for channels in (1, 2, 4, 7)] + [("fcn8s", 4), ("fcn8s", 7)]


@pytest.mark.parametrize(
    ("name", "channels"), [*WIDER, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_WIDER)]
)
def test_widened_rgb_weights_give_the_rgb_logits_on_repeated_channels(name, channels):
    model, variables = make_network(name)
    wide = fcn_jax.init_variables(model, jax.random.key(1), (64, 64), channels)
    wide = weights.load(weights.to_torch(model, variables), model, wide)
    image = RNG.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    if channels < 3:  # an RGB image with only so many distinct channels
        image = image[..., np.arange(3) % channels]
    repeated = image[..., np.arange(channels) % 3]
    mean, std = ((5.0, 6.0, 7.0), (50.0, 60.0, 70.0)) if channels > 2 else ((5.0,) * 3, (50.0,) * 3)

    def logits(variables, images, count):
        of_channels = Standardize(*(tuple(values[k % 3] for k in range(count)) for values in (mean, std)))
        return model.apply(variables, fcn_jax.normalize(images, of_channels, model.param_dtype))

    # float64 sums over another number of channels.
    np.testing.assert_allclose(logits(wide, repeated, channels), logits(variables, image, 3), rtol=1e-9, atol=1e-9)


def test_widening_by_hand():
    kernel = np.arange(1.0, 4.0).reshape(1, 3, 1, 1)
    for channels, expected in ((1, [6]), (2, [4, 2]), (4, [0.5, 2, 3, 0.5]), (5, [0.5, 1, 3, 0.5, 1])):
        assert widen(kernel, channels).ravel().tolist() == expected


def test_a_16_bit_data_set_of_five_channels_trains_and_predicts(fails, tmp_path, capsys):
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    for index in range(8):
        h, w = RNG.integers(40, 60, 2)
        label = np.zeros((h, w), np.uint8)
        label[10:30, 10:30] = 1
        image = RNG.integers(1000, 2000, (h, w, 5)) + 20000 * label[..., None].astype(int)
        tifffile.imwrite(
            root / f"images/{index}.tif", image.astype(np.uint16), photometric="minisblack", planarconfig="contig"
        )
        trees.write_mask(root / f"masks/{index}.png", label)
    (root / "classes.txt").write_text("background\nobject\n")
    run, data = tmp_path / "run", f"--data.dir {root} --data.cache-dir {tmp_path}/cache --data.channels 5".split()
    small = (
        "--init None --model.encoder vgg11 --model.width 0.05 --model.fc-features 8 --data.workers 0 --devices 1 "
        "--data.base-size 48 --data.crop-size 32 32 --train.batch-size 4 --train.steps 30 --optim.lr 0.1"
    ).split()
    command = ["own", *data, "--data.val-fraction", "0.25", "--run", str(run), *small]
    assert train_command(command) == 0
    saved = json.loads((run / "config.json").read_text())["config"]["data"]
    train = [tifffile.imread(path) for path in sorted((root / "images").iterdir())]
    split = datasets.load(
        "folder/train", DataConfig(dir=str(root), cache_dir=f"{tmp_path}/cache", channels=5, val_fraction=0.25)
    )
    assert len(split) == 6  # of the eight images
    pixels = np.concatenate([train[int(split.source[index]["name"])].reshape(-1, 5) for index in range(6)])
    np.testing.assert_allclose(saved["mean"], pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(saved["std"], pixels.std(0), rtol=1e-6)
    assert saved["bits"] == 16
    assert train_command(command) == 0  # nothing left to do, with the same statistics
    assert main(["eval", "--run", str(run)]) == 0
    assert main(["data", "folder/all", *data, "--out", str(tmp_path / "facts")]) == 0
    assert main(["predict", str(root / "images"), "--run", str(run), "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "mixed").mkdir()
    for name, pixels in (("a", train[0]), ("b", train[1].astype(np.uint8)), ("c", train[2][..., :4])):
        (tmp_path / f"mixed/{name}.npy").write_bytes(encode_array(pixels))
    assert main(["predict", str(tmp_path / "mixed"), "--run", str(run), "--out", str(tmp_path / "left")]) == 3
    assert (tmp_path / "left/a.png").exists() and "2 of 3 images" in capsys.readouterr().err
    labels = cv2.imread(str(tmp_path / "out/0.png"), cv2.IMREAD_GRAYSCALE)
    assert labels.shape == train[0].shape[:2] and (tmp_path / "out/0_overlay.png").exists()
    model, variables, info = fcn_jax.from_pretrained(run)
    classes = fcn_jax.predict(model, variables, train[0], info)
    assert np.mean(classes[10:30, 10:30] == 1) > 0.8 and np.mean(classes == 1) < 0.6
    for wrong in (train[0][..., :3], train[0].astype(np.uint8)):
        with pytest.raises(InputError, match=r"uint16 \(h, w, 5\)"):
            fcn_jax.predict(model, variables, wrong, info)
    fails(main, ["export", "--run", run, "--out", tmp_path / "a.safetensors"], "5 channels")
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "a.stablehlo"), "--preprocess"]) == 0
    assert "images uint16 (b, h, w, 5)" in capsys.readouterr().out
    fails(train_command, ["shapes", "--data.channels", "5", "--run", tmp_path / "other"], "--data.channels 5")
    tifffile.imwrite(root / "images/0.tif", train[0].astype(np.uint8), photometric="minisblack", planarconfig="contig")
    fails(train_command, [*command, "--run", tmp_path / "mixed"], "one dtype")


def test_a_first_convolution_is_not_narrowed_to_fewer_channels():
    model = create("fcn32s")
    wide = fcn_jax.init_variables(model, jax.random.key(0), (64, 64), 5)
    tensors, rgb = weights.to_torch(model, wide), fcn_jax.init_variables(model, jax.random.key(0))
    with pytest.raises(InputError, match="vgg.conv1_1"):
        weights.load(tensors, model, rgb)
