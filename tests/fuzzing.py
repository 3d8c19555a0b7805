"""A fuzzer of all readers of external files: small valid files, mutated by seed, and the calls that read them.

    python tests/fuzzing.py --cases 100000 --seed 0
    python tests/fuzzing.py --reader image --case 17 --seed 0      # one case again, with its traceback

A case is good if the reader returns or raises InputError, within ``SECONDS`` and ``MEMORY``, and has run no code.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch
import trees
from caffe_files import write_caffe
from PIL import Image
from tiny_run import saved_state, saved_variables

from fcn_jax import weights
from fcn_jax.config import DataConfig
from fcn_jax.data import datasets, download, folder, prepared
from fcn_jax.data import io as data_io
from fcn_jax.data import prepared as cache
from fcn_jax.errors import InputError
from fcn_jax.models import create_model, init_variables, model_from_config
from fcn_jax.recipes import RECIPES
from fcn_jax.training import checkpoint
from fcn_jax.training.config_checks import check_config
from fcn_jax.training.run import RunFolder

SECONDS = 20.0
"""Limit for one case, generous for busy machines; the slowest good case takes a second."""
MEMORY = 2 << 30
"""Bytes that one case may allocate."""

Files = dict[str, bytes]
Mutator = Callable[[np.random.Generator, bytes, list[bytes]], bytes]
"""(random numbers, a file, files of its kind) -> the file, damaged."""

# Mutators

_EXTREME = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**24, 2**27, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
_ODD = (
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 1e-308, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "nan",
    "fcn8s", "\0", "\ud800", "../..", "/", "~", "~nobody-of-this-name", "x" * 5000, "$\\frac{", "[/b]", "caf\u00e9", [],
    {}, [[]], [0, 0], [1, 2, 3], [2**31, 2**31], [-5, 32], ["a"], {"a": {}}, [None], "1e999",
)  # fmt: skip
_SIDES = (0, 1, 30_000, 65_500, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
_SIGNS = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"../../etc/passwd", b"x" * 5000, b"\xef\xbb\xbf", b"\r", b"\xe2\x80\xa8", b" ",
)  # fmt: skip
_GLOBALS = (
    b"cos\nsystem\n", b"cbuiltins\nexec\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"cbuiltins\nbytearray\n",
    b"ctorch\nTensor\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nCounter\n",
    b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy._core.multiarray\n_reconstruct\n", b"ctorch\nSize\n",
    b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._utils\n_rebuild_qtensor\n", b"c_codecs\nencode\n",
)  # fmt: skip
_VALUES = (
    b"N", b"I8000000000\n", b"I-1\n", b"I0\n", b"I3\n", b"L9223372036854775807L\n", b"F1e300\n", b"S'u1'\n", b"S'O'\n",
    b"X\x01\x00\x00\x00a", b"(t", b"(l", b"(d", b"(I4\nI4\nt", b"(I1099511627776\nt", b")", b"]", b"}", b"0", b"2",
    b"(", b"\x88", b"C\x04abcd", b"h\x00", b"q\x00", b"Q", b"\x85", b"\x86", b"\x87", b"B\xff\xff\xff\x7f",
    b"T\xff\xff\xff\x7f",
)  # fmt: skip
_CALLS = (b"R", b"b", b"\x81", b"\x85R", b"\x86R", b"\x87R", b"tR", b"s", b"u", b"a", b"e")


def _pick(rng, values):
    return values[int(rng.integers(len(values)))]


def plain(rng, data, others):
    """Flip bits, truncate, delete, repeat, splice, insert noise, or write extreme numbers, mostly into the header."""
    kind, start, length = (int(rng.integers(n)) for n in (7, len(data) + 1, 256))
    out = bytearray(data)
    if kind == 0:
        for _ in range(length % 16 + 1 if out else 0):
            out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del out[start:]
    elif kind == 2:
        del out[start : start + length]
    elif kind == 3:
        out[start:start] = data[start : start + length] * int(rng.integers(1, 8))
    elif kind == 4:
        other = _pick(rng, others)
        out[start:] = other[int(rng.integers(len(other) + 1)) :]
    elif kind == 5:
        out[start:start] = rng.bytes(length % 64 + 1)
    for _ in range(length % 3 + 1 if kind == 6 else 0):
        form = _pick(rng, ("B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
        size = struct.calcsize(form)
        reach = min(len(out), 256) if rng.random() < 0.7 else len(out)
        if reach >= size:
            at = int(rng.integers(reach - size + 1))
            out[at : at + size] = struct.pack(form, _pick(rng, _EXTREME) & (2 ** (8 * size) - 1))
    return bytes(out)


def image_header(rng, data, others):
    """Claim another size, depth or colour type in a PNG, with its checksum right, or another size in a JPEG."""
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    if data[12:16] == b"IHDR" and len(data) >= 33:
        width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", data[16:29])
        size = _pick(rng, (width, *_SIDES)), _pick(rng, (height, *_SIDES))
        depth, colour = _pick(rng, (depth, 1, 2, 4, 8, 16, 0, 3)), _pick(rng, (colour, 0, 2, 3, 4, 6, 7))
        header = b"IHDR" + struct.pack(">IIBBBBB", *size, depth, colour, *rest)
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if data[:2] == b"\xff\xd8" and frame > 0:
        size = struct.pack(">HH", _pick(rng, _SIDES[:5]), _pick(rng, _SIDES[:5]))
        return data[: frame + 5] + size + data[frame + 9 :]
    return plain(rng, data, others)


def json_value(rng, data, others):
    """Put other values into a JSON file or a safetensors header, or nest it deeper than a parser may follow."""
    start = 8 if data[8:9] == b"{" else 0
    length = struct.unpack("<Q", data[:8])[0] if start else len(data)

    def packed(header):
        return struct.pack("<Q", len(header)) + header + data[8 + length :] if start else header

    if rng.random() < 0.2:
        return packed(_pick(rng, (b"[", b'{"a":')) * int(rng.integers(1, 100_000)))
    try:
        tree = json.loads(data[start : start + length])
    except (ValueError, RecursionError):
        return plain(rng, data, others)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if isinstance(tree, dict | list):
        walk(tree)
    for _ in range(int(rng.integers(1, 4)) if places else 0):
        node, key = _pick(rng, places)
        kind = rng.random()
        if kind < 0.8:
            node[key] = _pick(rng, _ODD)
        elif isinstance(node, dict) and key in node:
            node[str(_pick(rng, _ODD))] = node.pop(key) if kind < 0.9 else node[key]
    return packed(json.dumps(tree if rng.random() < 0.97 else _pick(rng, _ODD)).encode())


def pickle_code(rng, data, others):
    """Put imports, values and calls into a pickle, or write one of them alone."""
    made = b"".join(
        _pick(rng, _GLOBALS) + b"".join(_pick(rng, _VALUES) for _ in range(int(rng.integers(4)))) + _pick(rng, _CALLS)
        for _ in range(int(rng.integers(1, 4)))
    )
    if rng.random() < 0.5:
        return b"\x80\x02" + made + b"."
    start = int(rng.integers(2, max(3, len(data))))
    return data[:start] + made + data[start:]


def zip_record(rng, data, others):
    """Write another pickle into a .pth archive, packed or not, or a record that unpacks to far more than its size."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError, zlib.error):
        return pickle_code(rng, data, others)
    kind, name = rng.random(), _pick(rng, sorted(records))
    if kind < 0.2:
        records[name] = bytes(2**28)
    else:
        change = pickle_code if name.endswith("data.pkl") or kind < 0.4 else plain
        records[name] = change(rng, records[name], [records[name]])
        records |= {"../" + name: records[name]} if kind > 0.9 else {}
    out = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if kind < 0.2 or kind > 0.8 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return out.getvalue()


def text_line(rng, data, others):
    """Insert characters into a text file that names and lines should not contain."""
    lines = data.split(b"\n")
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(lines)))
        lines[at] = _pick(rng, (lines[at], b"")) + _pick(rng, _SIGNS) + _pick(rng, (lines[at], b""))
    return b"\n".join(lines * (200 if rng.random() < 0.05 else 1))


# Readers


@dataclass(frozen=True)
class Reader:
    """One kind of input."""

    cases: int
    """Relative number of cases; slow readers have fewer."""
    corpus: Callable[[Path, Path], list[Files]]
    """(a folder to work in, the file that hostile code would write) -> whole cases, each some files by name."""
    mutators: tuple[Mutator, ...]
    """Mutators besides ``plain``."""
    read: Callable[[Path], object]
    """Reads the folder of a case as the commands do."""


def _saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _one(*items: bytes) -> list[Files]:
    return [{"file": data} for data in items]


def _images(work: Path, marker: Path) -> list[Files]:
    picture, exif = Image.fromarray(trees.picture(0, (24, 20))), Image.Exif()
    exif[0x0112] = 6
    saved = [_saved(picture, kind) for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")]
    saved += [_saved(picture, "JPEG", progressive=True, exif=exif), _saved(picture.convert("RGBA"), "PNG")]
    saved += [_saved(picture, "TIFF", compression="tiff_lzw"), _saved(picture, "WEBP", lossless=True)]
    return _one(*saved, cv2.imencode(".png", np.arange(480, dtype=np.uint16).reshape(24, 20) * 100)[1].tobytes())


def _masks(work: Path, marker: Path) -> list[Files]:
    grey = Image.fromarray(trees.mask(0, 21, (24, 20)))
    palette = grey.convert("P")
    saved = [_saved(image, kind) for image in (grey, palette) for kind in ("PNG", "GIF", "BMP", "TIFF")]
    saved += [_saved(palette, "TIFF", compression="tiff_lzw"), _saved(grey.convert("1"), "PNG")]
    saved += [_saved(palette, "PNG", bits=2), cv2.imencode(".png", np.full((9, 9), 7, np.uint16))[1].tobytes()]
    return _one(*saved)


def _model():
    model = create_model("fcn32s", 3, encoder="vgg11", width=0.0625, fc_features=8)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    return model, jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), shapes)


def _safetensors(work: Path, marker: Path) -> list[Files]:
    weights.save(work / "ours.safetensors", *_model(), "imagenet")
    tensors = {"features.0.weight": np.ones((4, 3, 3, 3), np.float32), "features.0.bias": np.zeros(4, np.float16)}
    safetensors.numpy.save_file(tensors, work / "small.safetensors", {"preprocessing": "caffe"})
    return [{"w.safetensors": (work / f"{name}.safetensors").read_bytes()} for name in ("ours", "small", "small")]


def _caffe_files(work: Path, marker: Path) -> list[Files]:
    arrays = {"conv1_1.weight": np.ones((4, 3, 3, 3), np.float32), "conv1_1.bias": np.zeros(4, np.float32)}
    files = [write_caffe(work / f"{legacy}.caffemodel", arrays, legacy) for legacy in (False, True)]
    return [{"w.caffemodel": file.read_bytes()} for file in files]


class Call:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _torch_files(work: Path, marker: Path) -> list[Files]:
    state = {"module.features.0.weight": torch.ones(4, 3, 3, 3), "module.features.0.bias": torch.zeros(4).half()}
    wrapped = {"epoch": 3, "model_state_dict": state, "scores": np.float64(0.5), "arrays": np.arange(3)}
    write = Call(exec, f"open({str(marker)!r}, 'w').close()")
    cases = [pickle.dumps(value) for value in ([np.zeros(2), write], Call(bytearray, 2**33))]
    cases += [pickle.dumps({"a": write}, protocol) for protocol in (0, 1, 2, 4)]
    for value in (state, wrapped, {"a": torch.zeros(2), "b": write}):
        for zipped in (True, False):
            torch.save(value, work / "a.pth", _use_new_zipfile_serialization=zipped)
            cases.append((work / "a.pth").read_bytes())
    return [{"w.pth": data} for data in cases]


def _read_weights(place: Path) -> None:
    (path,) = place.iterdir()
    weights.inspect(path)
    with contextlib.suppress(InputError):  # most belong to other networks
        weights.load(path, *_model())


def _lists(work: Path, marker: Path) -> list[Files]:
    accents = "\ufeffvoid\ncaf\u00e9 cr\u00e8me\n\nb\n".encode()
    return _one(b"background\ncat\ndog\n", accents, b"2007_001\n2007_002 1\n")


def _read_names(place: Path) -> None:
    names = data_io.names_in(place / "file")
    entries = tuple(data_io.Entry(name, place / f"{name}.jpg", place / f"{name}.png") for name in names)
    classes = ("a", "b"), ((0, 0, 0),) * 2
    cache.fingerprint(data_io.Listing("voc", "train", *classes, entries, data_io.read_files, "skip"))


def _runs(work: Path, marker: Path) -> list[Files]:
    dataset = {"name": "folder", "class_names": ["a", "b"], "palette": [[0, 0, 0], [1, 2, 3]]}
    rows = [{"kind": "train", "step": 1, "loss": 0.5}, {"kind": "val", "step": 2, "mean_iu": 0.1}]
    log = "".join(json.dumps(row) + "\n" for row in rows).encode()
    contents = [{"config": asdict(recipe.config), "dataset": dataset, "environment": {}} for recipe in RECIPES.values()]
    return [{"config.json": json.dumps(content).encode(), "metrics.jsonl": log} for content in contents]


def _read_run(place: Path) -> None:
    run = RunFolder(place)
    list(run.rows())
    run.drop_rows_after(1)
    config, dataset = run.read_config()
    check_config(config)
    model_from_config(config.model, len(dataset.class_names), config.train.remat)


def _archives(work: Path, marker: Path) -> list[Files]:
    def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, target, size
        return info

    def pack(mode: str, *members: tarfile.TarInfo) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode) as tar:
            for each in (member("top/set", tarfile.DIRTYPE), member("top/set/a.txt", size=1), *members):
                tar.addfile(each, io.BytesIO(bytes(each.size)))
        return out.getvalue()

    outside = [member(name) for name in ("../marker", str(marker), "../../marker", "top/../../../marker")]
    links = [member("top/link", tarfile.SYMTYPE, str(marker.parent)), member("top/link/marker")]
    others = [pack("w:gz", member("top/large", size=2**24)), pack("w", member("top/pipe", tarfile.FIFOTYPE))]
    return _one(*map(pack, ("w", "w:gz", "w:bz2")), *(pack("w", each) for each in outside), pack("w", *links), *others)


def _read_archive(place: Path) -> None:
    md5 = hashlib.md5((place / "file").read_bytes(), usedforsecurity=False).hexdigest()
    download.fetch(download.Archive("http://localhost/file", md5, "top/set"), place, True)


def _copies(work: Path, marker: Path) -> list[Files]:
    trees.folder(work / "data", {"train": 3})
    datasets.load("folder/train", DataConfig(dir=str(work / "data"), cache_dir=str(work / "cache")))
    return [_take(next((work / "cache/folder").iterdir()))]


def _take(place: Path) -> Files:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def _read_copy(place: Path) -> None:
    cache.read_summary(place)
    source = prepared.Examples(place)
    for index in range(min(len(source), 3)):
        datasets.decode(source[index])


def _checkpoints(work: Path, marker: Path) -> list[Files]:
    saved = checkpoint.Checkpoints(work / "checkpoints")
    saved.save(saved_state(1), {"data": {"step": 1}}, 0.5)
    saved.close()
    return [_take(work / "checkpoints")]


def _read_checkpoint(place: Path) -> None:
    checkpoint.load_variables(place.absolute(), "last", saved_variables())


READERS = {
    "image": Reader(25, _images, (image_header,), lambda at: data_io.decode_image((at / "file").read_bytes(), "file")),
    "mask": Reader(15, _masks, (image_header,), lambda at: data_io.decode_label((at / "file").read_bytes(), "file")),
    "torch": Reader(15, _torch_files, (zip_record, pickle_code), _read_weights),
    "safetensors": Reader(15, _safetensors, (json_value,), _read_weights),
    "caffe": Reader(15, _caffe_files, (), _read_weights),
    "classes": Reader(12, _lists, (text_line,), lambda at: folder.read_classes(at / "file")),
    "names": Reader(12, _lists, (text_line,), _read_names),
    "run": Reader(25, _runs, (json_value,), _read_run),
    "archive": Reader(15, _archives, (), _read_archive),
    "copy": Reader(12, _copies, (json_value,), _read_copy),
    "checkpoint": Reader(10, _checkpoints, (json_value,), _read_checkpoint),
}


# Running


class Hang(BaseException):
    """A case took too long. Not an Exception, so that no reader treats it as damage of its file."""


@contextlib.contextmanager
def time_limit(seconds: float):
    """Raise Hang in code that runs longer."""

    def expired(number, frame):
        raise Hang(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _resident(name: str) -> int:
    """Return VmRSS or VmHWM, the memory of this process now or at its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if name in line)


def mutate(reader: Reader, corpus: list[Files], name: str, seed: int, case: int) -> Files:
    """Return the files of a case, one of them damaged, missing or unchanged, as determined by name, seed and case."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), case])
    files = dict(_pick(rng, corpus))
    one = _pick(rng, sorted(files))
    others = [whole[one] for whole in corpus if one in whole]
    for _ in range(int(rng.integers(0, 4)) if rng.random() < 0.5 else 1):
        ways = reader.mutators if reader.mutators and rng.random() < 0.5 else (plain,)
        files[one] = _pick(rng, ways)(rng, files[one], others)
    if len(files) > 1 and rng.random() < 0.1:
        del files[one]
    return files


def attempt(read: Callable[[Path], object], files: Files, work: Path) -> str:
    """Read a case in the folder ``work``; return "result" or "refused", or raise what no reader should raise."""
    place, marker = work / "case", work / "marker"
    shutil.rmtree(place, ignore_errors=True)
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak to the current size
    before, outcome = _resident("VmRSS"), "result"
    try:
        with warnings.catch_warnings(), time_limit(SECONDS):
            warnings.simplefilter("ignore")  # of libraries about damaged files
            read(place)
    except InputError as error:
        if "\n" in str(error).strip():
            raise AssertionError(f"an error of several lines: {error}") from error
        outcome = "refused"
    if marker.exists():
        marker.unlink()
        raise AssertionError("code from the file was run, or something was written outside of the folder")
    if (took := _resident("VmHWM") - before) > MEMORY:
        raise AssertionError(f"took {took >> 20} MiB")
    return outcome


def run(name: str, seed: int, cases: range) -> tuple[collections.Counter[str], list[str]]:
    """Run the numbered cases of a reader; return the count of each outcome, and the failures."""
    outcomes, failures = collections.Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="fcn_jax_fuzz_") as temporary:
        work, reader = Path(temporary), READERS[name]
        (work / "corpus").mkdir()
        corpus = reader.corpus(work / "corpus", work / "marker")
        for case in cases:
            files = mutate(reader, corpus, name, seed, case)
            try:
                outcomes[attempt(reader.read, files, work)] += 1
            except (Exception, Hang, SystemExit) as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                failures.append(f"--reader {name} --case {case} --seed {seed}: {error!r:.300} ({where})")
                if len(cases) == 1:
                    traceback.print_exc()
    return outcomes, failures


def main() -> int:
    """Run many cases in separate processes, or one case in this process."""
    parser = argparse.ArgumentParser(description="Feed mutated files to every reader.")
    parser.add_argument("--cases", type=int, default=2000, help="over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, help="only this reader")
    parser.add_argument("--case", type=int, help="only this case, with its traceback")
    given = parser.parse_args()
    if given.case is not None:
        print(*run(given.reader, given.seed, range(given.case, given.case + 1)))
        return 0
    readers = {name: reader for name, reader in READERS.items() if given.reader in (name, None)}
    total, failed = sum(reader.cases for reader in readers.values()), 0
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        counts = {name: -(-given.cases * reader.cases // total) for name, reader in readers.items()}
        jobs = [(name, range(count)[at : at + 2500]) for name, count in counts.items() for at in range(0, count, 2500)]
        for name, cases, future in [(*job, pool.submit(run, job[0], given.seed, job[1])) for job in jobs]:
            outcomes, failures = future.result()
            failed += len(failures)
            print(name, f"{cases.start}..{cases.stop - 1}", dict(outcomes), *failures[:20], sep="\n  ", flush=True)
    print(f"{sum(counts.values())} cases, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
