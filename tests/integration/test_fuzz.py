"""Hostile input to every reader: a result or an InputError, in bounded time and memory, and no code of a file runs.

tests/slow/test_fuzz_sweep.py runs 2,000 cases; tests/fuzzing.py also repeats a single one.
"""

import contextlib
import io
import json
import pickle
import struct
import time

import fuzzing
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from PIL import Image

from fcn_jax import cli
from fcn_jax.cli import port as cli_port
from fcn_jax.data import folder
from fcn_jax.errors import InputError
from fcn_jax.training.config_checks import config_from_json
from fcn_jax.training.run import open_run

LITTLE = settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
DATASET = {"name": "x", "class_names": ["a", "b"], "palette": [[0, 0, 0], [1, 2, 3]]}


@pytest.mark.parametrize("name", fuzzing.READERS)
def test_damaged_files_give_a_result_or_a_named_error(name):
    outcomes, failures = fuzzing.run(name, 2, range(fuzzing.READERS[name].cases))
    assert not failures
    assert outcomes["refused"] and outcomes["result"]  # else nothing was damaged, or nothing was read


@pytest.fixture(scope="module")
def attempt(tmp_path_factory):
    work = tmp_path_factory.mktemp("fuzz")
    return lambda name, files: fuzzing.attempt(fuzzing.READERS[name].read, files, work)


@pytest.mark.parametrize("name", ["image", "mask", "classes", "names"])
def test_any_bytes_give_a_result_or_a_named_error(name, attempt):
    starts = (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"BM", b"GIF89a", b"II*\0", b"RIFF", b"P6\n", b"a\n\xc3\xa9\n")

    @LITTLE
    @given(st.sampled_from(starts), st.binary(max_size=300))
    def check(start, data):
        attempt(name, {"file": start + data})

    check()


def test_a_config_of_any_values_gives_a_result_or_a_named_error(attempt):
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    )
    fields = {"model": "width", "data": "crop_size", "loss": "class_weights", "optim": "lr", "train": "steps"}

    @LITTLE
    @given(values, st.sampled_from([*fields, None]), values)
    def check(whole, section, value):
        config = whole if section is None else {section: {fields[section]: value}}
        for content in ({"config": config, "dataset": DATASET}, {"config": {}, "dataset": value}, whole):
            attempt("run", {"config.json": json.dumps(content).encode()})

    check()


@LITTLE
@given(
    st.sampled_from(list(cli.COMMANDS)),
    st.lists(st.text(st.characters(exclude_characters="-", exclude_categories=["Cs"]), max_size=8), max_size=3),
)
def test_a_command_line_of_any_words_ends_with_exit_code_2(command, words):
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main([command, "--no-such-option", *words])
        except SystemExit as stop:  # raised by the parser
            code = stop.code
    assert code == 2


def test_a_png_chunk_longer_than_its_file_takes_no_memory(attempt):
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    whole, length = buffer.getvalue(), struct.pack(">I", 2**31 - 1)
    at = whole.index(b"IDAT") - 4
    for data in (whole[:at] + length + whole[at + 4 :], whole[:-12] + length + b"tEXt" + whole[-8:]):
        for name in ("image", "mask"):
            assert attempt(name, {"file": data}) == "refused"


def test_a_claimed_network_is_checked_by_shapes_before_it_is_allocated(tmp_path, monkeypatch):
    (case, *_) = fuzzing.READERS["safetensors"].corpus(tmp_path, tmp_path / "marker")
    header = json.loads(case["w.safetensors"][8 : 8 + struct.unpack("<Q", case["w.safetensors"][:8])[0]])
    model = json.loads(header["__metadata__"]["model"])
    model["options"] |= {"width": 60.0, "fc_features": 2**20}
    tensors = safetensors.numpy.load(case["w.safetensors"])
    metadata = header["__metadata__"] | {"model": json.dumps(model)}
    safetensors.numpy.save_file(tensors, tmp_path / "large.safetensors", metadata)
    init = cli_port.init_variables

    def only_shapes(model, key):
        assert isinstance(key, jax.core.Tracer), "the network was allocated at full size"
        return init(model, key)

    monkeypatch.setattr(cli_port, "init_variables", only_shapes)
    with pytest.raises(InputError, match="do not fit"):
        cli_port.main([str(tmp_path / "large.safetensors"), "--out", str(tmp_path / "out.safetensors")])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("optim.lr", "fast"), ("optim.nesterov", 1), ("train.seed", True), ("train.seed", 1.5),
        ("data.crop_size", [1, 2, 3]), ("data.scale", [0.5, None]), ("loss.kind", "hinge"),
        ("loss.class_weights", ["a"]), ("model", []), ("run", {"a": "b" * 99}),
    ],
)  # fmt: skip
def test_a_config_value_of_the_wrong_type_is_named(place, value):
    values = value
    for name in reversed(place.split(".")):
        values = {name: values}
    with pytest.raises(InputError, match=place.rpartition(".")[2]) as caught:
        config_from_json(values)
    assert "\n" not in str(caught.value)


def test_config_values_are_converted_from_their_json_types():
    config = config_from_json({"optim": {"lr": 1}, "loss": {"class_weights": [1, 0.5]}, "data": {"crop_size": [3, 4]}})
    assert (config.optim.lr, config.loss.class_weights, config.data.crop_size) == (1, (1, 0.5), (3, 4))


BAD_PALETTES = ([[0, 0, 0]], [[0, 0, 0], [1, 2, 256]], [[0, 0, 0], [1, 2]])


@pytest.mark.parametrize(
    ("content", "message"),
    [({"dataset": DATASET | {"palette": colours}}, r"config\.json: ") for colours in BAD_PALETTES]
    + [
        ({"config": {"data": {"crop_size": [2**61, 2**61]}}}, "--data.crop-size <= 1048576"),
        ({"config": {"data": {"crop_size": [-1, 3]}}}, "--data.crop-size >= 1"),
        ({"config": {"train": {"seed": 10**400}}}, "--train.seed"),
        ({"config": {"model": {"fc6_kernel": 2**20}}}, "fc6_kernel in 1 ... 64"),
        ({"config": {"model": {"width": 1e300}}}, "0 < width <= 64"),
    ],
)
def test_a_run_with_an_impossible_palette_or_size_is_rejected(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "dataset": DATASET} | content))
    with fuzzing.time_limit(20), pytest.raises(InputError, match=message):
        open_run(tmp_path)


def test_a_long_class_list_is_read_in_linear_time(tmp_path):
    (tmp_path / "classes.txt").write_text("".join(f"{i}\n" for i in range(100_000)))
    with fuzzing.time_limit(10), pytest.raises(InputError, match="lists 100000 classes"):
        folder.read_classes(tmp_path / "classes.txt")


def test_unusable_paths_give_one_line(fails, tmp_path):
    long = "x" * 300
    for command in (
        f"train camvid --data.dir {long}", "train camvid --data.dir ~nobody-of-this-name", f"eval --run {long}",
        f"train shapes --data.cache-dir {long} --run {tmp_path}/run", f"export --run {tmp_path} --out {long}.pth",
    ):  # fmt: skip
        fails(cli.main, command.split())


def test_the_fuzzer_detects_tracebacks_hangs_memory_and_executed_code(tmp_path, monkeypatch):
    def hang(place):
        with contextlib.suppress(Exception):  # like a reader that treats all errors as damage
            time.sleep(60)

    def run_code(place):
        with contextlib.suppress(Exception):
            write = fuzzing.Call(exec, f"open({str(place.parent / 'marker')!r}, 'w').close()")
            pickle.loads(pickle.dumps(write))

    def several_lines(place):
        raise InputError("a\nb")

    for read, error, message in (
        (lambda place: 1 // 0, ZeroDivisionError, "by zero"),
        (hang, fuzzing.Hang, "longer than 2 s"),
        (lambda place: np.ones(2**25), AssertionError, "took 2"),  # 256 MiB
        (run_code, AssertionError, "code from the file was run"),
        (several_lines, AssertionError, "an error of several lines"),
    ):
        monkeypatch.setattr(fuzzing, "SECONDS", 2.0 if read is hang else 60.0)
        monkeypatch.setattr(fuzzing, "MEMORY", 2**27)
        with pytest.raises(error, match=message):
            fuzzing.attempt(read, {"file": b"abc"}, tmp_path)
