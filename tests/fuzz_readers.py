"""The readers of outside bytes by name: real small files, how they are damaged, and how they are read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cv2
import fuzz_mutators as damage
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch
import trees
from PIL import Image

from fcn_jax import cli, weights
from fcn_jax.cli import bench as cli_bench
from fcn_jax.cli import parity as cli_parity
from fcn_jax.cli.process import guarded
from fcn_jax.config import Config, DataConfig
from fcn_jax.data import datasets, download, folder, labels, listing, sbd
from fcn_jax.data import prepared as prepare
from fcn_jax.errors import InputError
from fcn_jax.models import create_model, init_variables, model_from_config
from fcn_jax.recipes import RECIPES
from fcn_jax.step import TrainState
from fcn_jax.training import checkpoint
from fcn_jax.training.run import DatasetInfo, RunFolder
from fcn_jax.training.trainer import check_config
from fcn_jax.weights import open_source

warnings.simplefilter("ignore")  # what a library says of a damaged file is no failure

Files = dict[str, bytes]


@dataclass(frozen=True)
class Reader:
    """One kind of input."""

    name: str
    weight: float
    """Its share of the cases: slow ones have less."""
    corpus: Callable[[Path, Path], list[Files]]
    """(a folder to work in, where hostile code would leave its mark) -> whole cases, each some files by name."""
    mutate: Callable[[np.random.Generator, list[Files]], Files]
    read: Callable[[Files, Path], object]
    """(files, a folder to write them to) -> anything, as the command lines read it."""


def _put(files: Files, work: Path) -> Path:
    place = work / "case"
    shutil.rmtree(place, ignore_errors=True)
    for name, data in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    place.mkdir(exist_ok=True)
    return place


def _take(place: Path) -> Files:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def _one(items: list[bytes]) -> list[Files]:
    return [{"file": data} for data in items]


# Images and masks


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _images(work: Path, marker: Path) -> list[Files]:
    picture = Image.fromarray(trees.picture(0, (24, 20)))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True, "exif": exif}), ("BMP", {}), ("GIF", {})]
    kinds += [
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("PPM", {}),
    ]
    deep = cv2.imencode(".png", np.arange(480, dtype=np.uint16).reshape(24, 20) * 100)[1].tobytes()
    return _one(
        [*(_saved(picture, kind, **options) for kind, options in kinds), deep, _saved(picture.convert("RGBA"), "PNG")]
    )


def _masks(work: Path, marker: Path) -> list[Files]:
    grey = Image.fromarray(trees.mask(0, 21, (24, 20)))
    palette = grey.convert("P")
    items = [_saved(grey, "PNG"), _saved(palette, "PNG"), _saved(palette, "GIF"), _saved(palette, "BMP")]
    items += [_saved(grey, "TIFF"), _saved(palette, "TIFF", compression="tiff_lzw"), _saved(grey.convert("1"), "PNG")]
    return _one(
        [*items, _saved(palette, "PNG", bits=2), cv2.imencode(".png", np.full((9, 9), 7, np.uint16))[1].tobytes()]
    )


# .mat


def _mats(work: Path, marker: Path) -> list[Files]:
    from scipy.io import savemat

    tree = trees.sbd(work, {"train": ["2008_001", "2008_002"]})
    savemat(
        work / "plain.mat", {"GTcls": {"Segmentation": trees.mask(3, 21, (24, 20)), "CategoriesPresent": [1.0, 2.0]}}
    )
    savemat(work / "old.mat", {"GTcls": np.eye(4)}, format="4")
    return _one([path.read_bytes() for path in (*sorted(tree.glob("cls/*.mat")), work / "plain.mat", work / "old.mat")])


def _read_mat(files: Files, work: Path) -> object:
    return sbd.read_segmentation(_put(files, work) / "file")


# Weights


def _small(name: str = "fcn32s") -> tuple:
    model = create_model(name, 3, encoder="vgg11", width=0.0625, **({"fc_features": 8} if name == "fcn32s" else {}))
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    return model, jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), shapes)


def _safetensors(work: Path, marker: Path) -> list[Files]:
    model, variables = _small()
    weights.save(work / "ours.safetensors", model, variables, "imagenet")
    tensors = {"features.0.weight": np.ones((4, 3, 3, 3), np.float32), "features.0.bias": np.zeros(4, np.float16)}
    safetensors.numpy.save_file(tensors, work / "small.safetensors", {"preprocessing": "caffe"})
    return [{"w.safetensors": (work / f"{name}.safetensors").read_bytes()} for name in ("ours", "small", "small")]


def _torch_files(work: Path, marker: Path) -> list[Files]:
    state = {"module.features.0.weight": torch.ones(4, 3, 3, 3), "module.features.0.bias": torch.zeros(4).half()}
    wrapped = {"epoch": 3, "model_state_dict": state, "scores": np.float64(0.5), "arrays": np.arange(3)}
    hostile = {"a": torch.zeros(2), "b": damage.write_marker(marker)}
    cases = []
    for i, value in enumerate((state, wrapped, hostile)):
        for zipped in (True, False):
            torch.save(value, work / f"{i}.pth", _use_new_zipfile_serialization=zipped)
            cases.append((work / f"{i}.pth").read_bytes())
    return [{"w.pth": data} for data in (*cases, *damage.harmful(marker))]


def _read_weights(files: Files, work: Path) -> object:
    place = _put(files, work)
    path = place / next(iter(files))
    source = open_source(path)
    info = weights.inspect(path)
    # As `fcn-jax port` does where the file says its network: by shapes, before anything of its size is made.
    if info.fit is not None and len(info.fit.models) == 1:
        model = create_model(info.fit.models[0], info.fit.num_classes or 21, **info.fit.options)
        with contextlib.suppress(InputError):
            weights.load(path, model, jax.eval_shape(lambda: init_variables(model, jax.random.key(0))))
    return [source.read(name).shape for name in source.infos]


# Lists, config.json


def _lists(work: Path, marker: Path) -> list[Files]:
    return _one(
        [b"background\ncat\ndog\n", "\ufeffvoid\ncaf\u00e9 cr\u00e8me\n\nb\n".encode(), b"2007_001\n2007_002 1\n"]
    )


def _read_classes(files: Files, work: Path) -> object:
    return folder.read_classes(_put(files, work) / "file")


def _read_names(files: Files, work: Path) -> object:
    place = _put(files, work)
    names = listing.names_in(place / "file")
    entries = tuple(listing.Entry(name, place / f"{name}.jpg", place / f"{name}.png") for name in names)
    made = listing.Listing("voc", "train", ("a", "b"), ((0, 0, 0),) * 2, entries, listing.read_files, "skip")
    listing.fingerprint(made)
    return made


def _configs(work: Path, marker: Path) -> list[Files]:
    cases = []
    for i, recipe in enumerate(RECIPES.values()):
        run = RunFolder(work / str(i))
        run.start(recipe.config, DatasetInfo("folder", ("a", "b"), ((0, 0, 0), (1, 2, 3))))
        cases.append({"config.json": run.config_file.read_bytes()})
    return cases


def _read_config(files: Files, work: Path) -> object:
    config, dataset = RunFolder(_put(files, work)).read_config()
    check_config(config)
    return model_from_config(config.model, len(dataset.class_names), config.train.remat)


# Archives


def _archives(work: Path, marker: Path) -> list[Files]:
    def pack(mode: str, *members: tarfile.TarInfo, size: int = 0) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode) as tar:
            tar.add(work / "set", "top/set")
            for member in members:
                tar.addfile(member, io.BytesIO(bytes(member.size)))
        return out.getvalue()

    def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, target, size
        return info

    (work / "set").mkdir()
    (work / "set/a.txt").write_text("a")
    outside = [member("../marker"), member(str(marker)), member("../../marker"), member("top/../../../marker")]
    links = [member("top/link", tarfile.SYMTYPE, str(marker.parent)), member("top/link/marker")]
    return _one(
        [pack("w"), pack("w:gz"), pack("w:bz2"), *(pack("w", each) for each in outside), pack("w:gz", *links)]
        + [pack("w:gz", member("top/large", size=2**24)), pack("w", member("top/pipe", tarfile.FIFOTYPE))]
    )


def _read_archive(files: Files, work: Path) -> object:
    place = _put(files, work)
    data = files["file"]
    (place / "in").mkdir()
    (place / "in/a.tar").write_bytes(data)
    made = download.Archive("http://localhost/a.tar", hashlib.md5(data, usedforsecurity=False).hexdigest(), "top/set")
    result = download.fetch(made, place / "in")
    if (place / "marker").exists() or (place / "in/marker").exists():
        raise AssertionError("something was written outside of the folder")
    return result


# Prepared copies


def _copies(work: Path, marker: Path) -> list[Files]:
    trees.folder(work / "data", {"train": 3})
    config = DataConfig(dir=str(work / "data"), cache_dir=str(work / "cache"))
    datasets.load("folder/train", config)
    return [_take(next((work / "cache/folder").iterdir()))]


def _read_copy(files: Files, work: Path) -> object:
    place = _put(files, work)
    summary = prepare.read_summary(place)
    source = prepare.Examples(place)
    return summary, [datasets.decode(source[index]) for index in range(min(len(source), 3))]


# Checkpoints


_LIKE = {"params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}, "batch_stats": {}}


def _checkpoints(work: Path, marker: Path) -> list[Files]:
    saved = checkpoint.Checkpoints(work / "checkpoints")
    for step in (1, 2):
        state = TrainState(
            step=jnp.asarray(step, jnp.int32),
            params={"w": jnp.full((3,), float(step), jnp.float32)},
            batch_stats={},
            opt_state=({"v": jnp.zeros(3, jnp.float32)},),
            key=jax.random.key_data(jax.random.key(step)),
        )
        saved.save(state, {"data": {"step": step}}, 0.5)
    saved.close()
    return [_take(work / "checkpoints")]


def _read_checkpoint(files: Files, work: Path) -> object:
    return checkpoint.load_variables(_put(files, work).absolute(), "last", _LIKE)


# Command lines

_WORDS = (
    "", "-", "--", "---", "None", "True", "0", "1", "-1", "2147483648", "9" * 400, "1e999", "nan", "0.5", "32 32",
    "--help", "shapes", "camvid", "shapes/train", "folder/val", "/nonexistent", "~nobody-of-this-name", "x" * 5000,
    "\u00e9\udcff", "[/b]", "fcn8s", "fcn32s", "fcns_ladder", "vgg11", "vgg16", "batch", "imagenet", "median",
    "best", "a.png", "a.pth", "torch", "jax", "cpu", "{}", "$(true)", "--run", "--out", "--model.name",
    "--data.dir", "=",
)  # fmt: skip
_FLAGS = {
    "train": [
        f"--{room}.{name}" for room in ("model", "data", "loss", "optim", "train") for name in asdict(Config())[room]
    ]
    + ["--run", "--parallel", "--devices", "--init", "--init-from"],
    "eval": ["--run", "--checkpoint", "--split", "--dir", "--batch-size"],
    "predict": ["--run", "--out", "--checkpoint"],
    "summary": ["--image-size", "--num-classes", "--encoder", "--encoder-norm", "--width"],
    "port": ["--out", "--model", "--num-classes", "--encoder", "--width", "--layout", "--preprocessing", "--seed"],
    "export": ["--run", "--out", "--checkpoint", "--layout"],
    "parity": [
        f"--{name.replace('_', '-')}" for name in cli_parity.ParityArguments.__dataclass_fields__ if name != "model"
    ],
    "bench": ["--device", "--against", "--smoke", "--only", "--rounds", "--seconds", "--image-size", "--batch-size"]
    + ["--collectives", "--pipeline", "--data-dir", "--out"],
}
_VALUES = {
    "--data.dir": ("/nonexistent", "x" * 300, "~nobody-of-this-name", "."),
    "--run": ("/nonexistent/run", "x" * 300, ""),
    "--out": ("/proc/none", "x" * 300 + ".pth", "a.pth"),
}
_FIRST = {"train": ("shapes", "camvid", "voc-fcn32s"), "summary": ("fcn32s",), "parity": ("fcn8s",), "port": ("a.pth",)}


def _make_command(rng: np.random.Generator, corpus: list[Files]) -> Files:
    """Make a command line of its own flags, right and wrong values and stray words."""
    command = damage.pick(rng, list(cli.COMMANDS)) if rng.random() < 0.98 else damage.pick(rng, _WORDS)
    flags = _FLAGS.get(command, ["--run"])
    words = [damage.pick(rng, _FIRST[command])] if command in _FIRST and rng.random() < 0.8 else []
    for _ in range(int(rng.integers(0, 4))):
        flag = damage.pick(rng, flags)
        words.append(flag.replace("_", "-") if rng.random() < 0.95 else damage.pick(rng, _WORDS))
        values = _VALUES.get(flag, _WORDS)
        words += [
            damage.pick(rng, values if rng.random() < 0.5 else _WORDS) for _ in range(int(rng.choice([0, 1, 1, 1, 2])))
        ]
    return {"words": "\0".join([command, *words]).encode("utf-8", "surrogateescape")}


def _stop(*arguments: object, **options: object) -> None:
    raise InputError("far enough")


def _train(config: Config, console: object) -> None:
    check_config(config)
    model_from_config(config.model, 21, config.train.remat)
    if config.data.train != "shapes/train":  # reading and drawing pictures is not what is tried here
        datasets.load(config.data.train, config.data)


def _run_command(files: Files, work: Path) -> object:
    """Run a command line up to where it would begin to compute."""
    words = files["words"].decode("utf-8", "surrogateescape").split("\0")
    place = _put({}, work)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(place))
        for module, name, stub in (
            (cli, "train", _train),
            (cli, "keep_compiled", lambda: None),
            (cli_parity, "random_variables", _stop),
            (cli_bench, "_rows", _stop),
            (cli_bench, "_collectives", _stop),
            (cli_bench, "_pipeline", _stop),
            (cli_bench, "_configure", lambda given: None),
        ):
            stack.enter_context(mock.patch.object(module, name, stub))
        error = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            code = guarded(cli._dispatch, words)
        except SystemExit as stop:
            if stop.code:
                raise AssertionError(f"left with {stop.code}") from stop
            return "help"
    said = error.getvalue().strip()
    if code not in (0, 2) or (code == 2) != said.startswith("error: ") or "\n" in said:
        raise AssertionError(f"exit code {code}, and it said {said!r}")
    if code == 2:
        raise InputError(said)
    return code


def _no_files(work: Path, marker: Path) -> list[Files]:
    return [{}]


_JSON = (damage.json_value, damage.json_value, damage.json_value, damage.json_deep)

READERS = {
    reader.name: reader
    for reader in (
        Reader(
            "image", 25, _images, damage.mutator(damage.png_header, damage.jpeg_header),
            lambda files, work: labels.decode_image(files["file"], "file"),
        ),
        Reader(
            "mask", 15, _masks, damage.mutator(damage.png_header),
            lambda files, work: labels.decode_label(files["file"], "file"),
        ),
        Reader("mat", 15, _mats, damage.mutator(damage.mat_inside), _read_mat),
        Reader("torch", 12, _torch_files, damage.mutator(damage.zip_record, damage.pickle_code), _read_weights),
        Reader("safetensors", 10, _safetensors, damage.mutator(*_JSON), _read_weights),
        Reader("classes", 6, _lists, damage.mutator(damage.text_line), _read_classes),
        Reader("names", 6, _lists, damage.mutator(damage.text_line), _read_names),
        Reader("config", 6, _configs, damage.mutator(*_JSON), _read_config),
        Reader("archive", 3, _archives, damage.mutator(), _read_archive),
        Reader("copy", 2, _copies, damage.mutator(*_JSON), _read_copy),
        Reader("checkpoint", 1, _checkpoints, damage.mutator(*_JSON), _read_checkpoint),
        Reader("command", 3, _no_files, _make_command, _run_command),
    )
}  # fmt: skip
