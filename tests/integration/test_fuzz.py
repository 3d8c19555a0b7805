"""Hostile input to every reader: a result or an InputError, in bounded time and memory, and no code out of a file runs.

`make soak` runs fifty times as many cases by tests/fuzzing.py, which also repeats a single one.
"""

import contextlib
import hashlib
import io
import json
import pickle
import struct
import tarfile
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import cv2
import fuzz_mutators
import fuzzing
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from fuzz_readers import READERS, Reader
from hypothesis import HealthCheck, given, settings

from fcn_jax import weights
from fcn_jax.cli import port as cli_port
from fcn_jax.cli.eval import main as eval_command
from fcn_jax.cli.export import main as export_command
from fcn_jax.cli.process import guarded
from fcn_jax.cli.train import main as train_command
from fcn_jax.data import download, folder, labels, sbd
from fcn_jax.errors import InputError, UnreadableError
from fcn_jax.evaluation import figures
from fcn_jax.evaluation.evaluate import Sample
from fcn_jax.training.run import RunFolder, config_from_json, open_run

SEED = 20
# Of each reader; slow ones have less.
CASES = dict.fromkeys(READERS, 200) | {
    "image": 300,
    "archive": 100,
    "torch": 150,
    "copy": 80,
    "command": 120,
    "checkpoint": 50,
}
LITTLE = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def test_at_least_two_thousand_cases_are_run():
    assert sum(CASES.values()) >= 2000 and set(CASES) == set(READERS)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_give_a_result_or_a_named_error(name):
    tally = fuzzing.run_watched(name, SEED, range(CASES[name]))
    assert not tally.failures
    assert sum(tally.outcomes.values()) == CASES[name]
    assert tally.outcomes["refused"]  # else nothing was damaged
    assert tally.outcomes["result"]  # else nothing was read
    assert tally.peak < fuzzing.MEMORY and tally.slowest < fuzzing.SECONDS


def _attempt(name, files):
    with tempfile.TemporaryDirectory() as folder:
        return fuzzing.attempt(READERS[name], files, Path(folder))


@pytest.mark.parametrize("name", ["image", "mask", "mat", "classes", "names"])
def test_any_bytes_give_a_result_or_a_named_error(name):
    starts = (
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8",
        b"BM",
        b"GIF89a",
        b"II*\0",
        b"RIFF",
        b"P6\n",
        b"MATLAB".ljust(126) + b"IM",
    )

    @LITTLE
    @given(st.sampled_from(starts), st.binary(max_size=300))
    def check(start, data):
        _attempt(name, {"file": start + data})

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ROOMS = {"model": "width", "data": "crop_size", "loss": "class_weights", "optim": "lr", "train": "steps"}


@LITTLE
@given(JSON, st.sampled_from([*ROOMS, None]), JSON)
def test_a_config_of_any_values_gives_a_result_or_a_named_error(whole, room, value):
    dataset = {"name": "x", "class_names": ["a", "b"], "palette": [[0, 0, 0], [1, 2, 3]]}
    config = whole if room is None else {room: {ROOMS[room]: value}}
    for content in ({"config": config, "dataset": dataset}, {"config": {}, "dataset": value}, whole):
        _attempt("config", {"config.json": json.dumps(content).encode()})


@LITTLE
@given(st.lists(st.text(max_size=12), max_size=6))
def test_a_class_list_of_any_text_gives_a_result_or_a_named_error(names):
    _attempt("classes", {"file": "\n".join(names).encode("utf-8", "surrogatepass")})


@LITTLE
@given(
    st.sampled_from(["train", "eval", "predict", "summary", "port", "export", "parity", "bench"]),
    st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8), max_size=3),
)
def test_a_command_line_of_any_words_is_one_line_of_error(command, words):
    _attempt("command", {"words": "\0".join([command, *words]).encode()})


def _png(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = b"IDAT" + zlib.compress(bytes(1000))
    parts = (header, rows, b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts
    )


def test_a_picture_is_refused_by_the_size_in_its_header():
    side = 11586  # the first square of more than 2**27
    for width, height in ((side, side), (2**27 + 1, 1), (2**31 - 1, 2**31 - 1)):
        for decode in (labels.decode_image, labels.decode_label):
            with pytest.raises(
                UnreadableError, match=rf"x\.png: its header says {width} x {height} pixels, and at most"
            ):
                decode(_png(width, height), "x.png")
    jpeg = bytearray(cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    at = jpeg.find(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 30_000, 40_000)
    with pytest.raises(UnreadableError, match="its header says 40000 x 30000 pixels"):
        labels.decode_image(bytes(jpeg), "x.jpg")


def test_a_chunk_that_claims_more_than_the_file_takes_no_memory():
    data = bytearray(_png(8, 8))
    data[33:37] = struct.pack(">I", 2**31 - 1)  # of IDAT
    made = Reader("made", 1, lambda work, marker: [], lambda rng, corpus: {"file": bytes(data)}, _decode)
    tally = fuzzing.run_cases(made, 0, range(2))
    assert tally.outcomes == {"refused": 2} and tally.peak < 2**28


def _decode(files, work):
    for decode in (labels.decode_label, labels.decode_image):
        decode(files["file"], "x.png")


def test_a_picture_in_a_language_that_programs_are_written_in_is_no_picture():
    for decode in (labels.decode_image, labels.decode_label):  # Pillow would hand it to Ghostscript
        with pytest.raises(UnreadableError):
            decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n", "x.eps")


def _mat(content):
    packed = zlib.compress(content)
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\x01IM" + struct.pack("<II", 15, len(packed)) + packed


def _array(shape, kind=6, data=b""):
    sizes = struct.pack(f"<{len(shape)}i", *shape)
    body = struct.pack("<IIII", 6, 8, kind, 0) + struct.pack("<II", 5, len(sizes)) + sizes + bytes(-len(sizes) % 8)
    body += struct.pack("<II", 1, 5) + b"GTcls\0\0\0" + data
    return struct.pack("<II", 14, len(body)) + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(2**28 + 8), "it unpacks to more than 268435456 bytes"),
        (_array((-1, 2)), "an array of shape"),
        (_array((1, 1)), "GTcls is no structure"),
        (_array((2, 2))[:-4], "cut short"),
        (_array((1, 1), 2), "a structure without fields"),
    ],
)
def test_a_mat_file_that_would_grow_or_is_damaged_is_refused(tmp_path, content, message):
    (tmp_path / "a.mat").write_bytes(_mat(content))
    with pytest.raises(UnreadableError, match=rf"a\.mat: not an SBD mask.*{message}"):
        sbd.read_segmentation(tmp_path / "a.mat")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i2", "u4", "f4", "f8", "i8"])
def test_a_mask_of_any_type_is_read_as_scipy_wrote_it(tmp_path, kind, packed):
    from scipy.io import savemat

    label = np.arange(6 * 7).reshape(6, 7).astype(kind)
    boundaries = np.empty((20, 1), object)
    boundaries[:] = [[np.zeros((6, 7), np.uint8)]] * 20
    truth = {"Boundaries": boundaries, "Segmentation": label, "A": "text"}
    savemat(tmp_path / "a.mat", {"other": 1.0, "GTcls": truth}, do_compression=packed)
    read = sbd.read_segmentation(tmp_path / "a.mat")
    assert read.dtype == np.uint8 and np.array_equal(read, label)


@pytest.mark.parametrize(
    "value", [np.array([[300.0]]), np.array([[np.nan]]), np.array([[-1]]), np.array([["a"]]), [[]]]
)
def test_a_mask_of_other_than_class_ids_is_refused_not_wrapped(tmp_path, value):
    from scipy.io import savemat

    savemat(tmp_path / "a.mat", {"GTcls": {"Segmentation": value}})
    with pytest.raises(UnreadableError, match="Segmentation"):
        sbd.read_segmentation(tmp_path / "a.mat")


def test_a_pickle_of_a_few_bytes_cannot_ask_for_memory(tmp_path):
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pth"
        torch.save(
            {"a": torch.zeros(2), "b": fuzz_mutators.Call(bytearray, 2**40)},
            path,
            _use_new_zipfile_serialization=zipped,
        )
        with pytest.raises(InputError, match="holds bytearrays, which may be of any size"):
            weights.inspect(path)


def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**26))
    before = time.perf_counter()
    with pytest.raises(InputError, match="a packed archive, which torch.save does not write"):
        weights.inspect(tmp_path / "a.pth")
    assert time.perf_counter() - before < 5


def test_an_archive_that_would_grow_is_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("top/large")
        member.size = 2**24
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    data = (tmp_path / "a.tgz").read_bytes()
    archive = download.Archive("http://localhost/a.tgz", hashlib.md5(data, usedforsecurity=False).hexdigest(), "top")
    with pytest.raises(InputError, match=r"a\.tgz: cannot be unpacked \(it unpacks to more than 50 times its size\)"):
        download.fetch(archive, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]


def test_a_network_that_a_file_claims_is_compared_by_shapes_before_it_is_made(tmp_path, monkeypatch):
    (case, *_) = READERS["safetensors"].corpus(tmp_path, tmp_path / "marker")
    header = json.loads(case["w.safetensors"][8 : 8 + struct.unpack("<Q", case["w.safetensors"][:8])[0]])
    model = json.loads(header["__metadata__"]["model"])
    model["options"] |= {"width": 60.0, "fc_features": 2**20}
    tensors = safetensors.numpy.load(case["w.safetensors"])
    metadata = header["__metadata__"] | {"model": json.dumps(model)}
    safetensors.numpy.save_file(tensors, tmp_path / "large.safetensors", metadata)
    init = cli_port.init_variables

    def only_shapes(model, key):
        assert isinstance(key, jax.core.Tracer), "made at its full size"
        return init(model, key)

    monkeypatch.setattr(cli_port, "init_variables", only_shapes)
    with pytest.raises(InputError, match="do not fit"):
        cli_port.port(cli_port.PortArguments(str(tmp_path / "large.safetensors"), tmp_path / "out.safetensors"))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("optim.lr", "fast", 'lr is "fast", expected float'),
        ("optim.nesterov", 1, "nesterov is 1, expected bool"),
        ("train.seed", True, "seed is true, expected int"),
        ("train.seed", 1.5, "seed is 1.5, expected int"),
        ("data.crop_size", [1, 2, 3], r"crop_size is \[1, 2, 3\], expected tuple\[int, int\] \| None"),
        ("data.scale", [0.5, None], r"scale is null, expected float"),
        ("loss.kind", "hinge", r"kind is \"hinge\", expected Literal\['softmax', 'sigmoid'\]"),
        ("loss.class_weights", ["a"], r"class_weights is \[\"a\"\], expected"),
        ("model", [], r"model is \[\], expected an object"),
        ("run", {"a": "b" * 99}, r"run is .{57}\.\.\., expected str"),
    ],
)
def test_a_value_of_another_type_in_a_config_is_named(place, value, message):
    values = value
    for name in reversed(place.split(".")):
        values = {name: values}
    with pytest.raises(InputError, match=message):
        config_from_json(values)


def test_values_that_json_writes_otherwise_come_back():
    config = config_from_json({"optim": {"lr": 1}, "loss": {"class_weights": [1, 0.5]}, "data": {"crop_size": [3, 4]}})
    assert (config.optim.lr, config.loss.class_weights, config.data.crop_size) == (1, (1, 0.5), (3, 4))


@pytest.mark.parametrize("palette", [[[0, 0, 0]], [[0, 0, 0], [1, 2, 256]], [[0, 0, 0], [1, 2]]])
def test_a_palette_that_does_not_fit_the_classes_is_named(tmp_path, palette):
    content = {"config": {}, "dataset": {"name": "x", "class_names": ["a", "b"], "palette": palette}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"config\.json: "):
        RunFolder(tmp_path).read_config()


def test_a_long_class_list_is_read_in_linear_time(tmp_path):
    (tmp_path / "classes.txt").write_text("".join(f"{i}\n" for i in range(100_000)))
    with fuzzing.time_limit(10), pytest.raises(InputError, match="lists 100000 classes"):
        folder.read_classes(tmp_path / "classes.txt")


def test_class_names_of_any_signs_are_drawn(tmp_path):
    names = ["$\\frac{$", "a_b^c", "[/b]"]
    figures.save_confusion(tmp_path / "a.png", np.eye(3), names)
    sample = Sample("", np.zeros((8, 8, 3), np.uint8), *[np.arange(64).reshape(8, 8) % 3] * 2)
    figures.save_panel(tmp_path / "b.png", [sample], ((0, 0, 0),) * 3, names)
    assert (tmp_path / "a.png").is_file() and (tmp_path / "b.png").is_file()


def test_a_path_that_the_system_refuses_is_one_line(capsys, tmp_path):
    long = "x" * 300
    for command, arguments in (
        (train_command, ["camvid", "--data.dir", long]),
        (train_command, ["camvid", "--data.dir", "~nobody-of-this-name"]),
        (train_command, ["shapes", "--data.cache-dir", long, "--run", str(tmp_path / "run")]),
        (eval_command, ["--run", long]),
        (export_command, ["--run", str(tmp_path), "--out", f"{long}.pth"]),
    ):
        assert guarded(command, arguments) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error


def test_a_file_that_cannot_be_written_is_one_line_whoever_writes_it(capsys):
    assert guarded(lambda arguments: len(Path("/proc/none/a.png").write_text("")), []) == 2
    assert (
        capsys.readouterr().err == "error: /proc/none/a.png: No such file or directory; check the path and the disk\n"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"crop_size": [2**61, 2**61]}}, "--data.crop-size <= 1048576"),
        ({"data": {"crop_size": [-1, 3]}}, "--data.crop-size >= 1"),
        ({"train": {"seed": 10**400}}, "--train.seed"),
        ({"model": {"fc6_kernel": 2**20}}, "fc6_kernel in 1 ... 64"),
        ({"model": {"width": 1e300}}, "0 < width <= 64"),
    ],
)
def test_a_run_of_impossible_sizes_is_refused_before_any_is_computed(tmp_path, values, message):
    dataset = {"name": "x", "class_names": ["a", "b"], "palette": [[0, 0, 0], [1, 2, 3]]}
    (tmp_path / "config.json").write_text(json.dumps({"config": values, "dataset": dataset}))
    with fuzzing.time_limit(20), pytest.raises(InputError, match=message):
        open_run(tmp_path)


def _reader(read):
    return Reader("made", 1, lambda work, marker: [{"file": b"abc"}], fuzz_mutators.mutator(), read)


def test_the_watch_itself_tells_a_traceback_a_hang_memory_and_code(tmp_path, monkeypatch):
    def hang(files, work):
        with contextlib.suppress(Exception):  # as a reader that takes all errors for damage
            time.sleep(60)

    def grow(files, work):
        assert len(np.ones(2**28 + 2**20)) > 0  # 2 GiB and a little

    def run_code(files, work):
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(fuzz_mutators.write_marker(work / "marker")))

    for read, message in (
        (lambda files, work: 1 // 0, "ZeroDivisionError"),
        (hang, "Hang: longer than 5 s"),
        (grow, "took 20"),
        (run_code, "code out of the file was run"),
        (lambda files, work: (_ for _ in ()).throw(InputError("a\nb")), "an error of several lines"),
    ):
        # a busy machine may take a while to touch 2 GiB
        monkeypatch.setattr(fuzzing, "SECONDS", 5.0 if read is hang else 60.0)
        ((case, failure),) = fuzzing.run_cases(_reader(read), 0, [7]).failures
        assert case == 7 and message in failure
