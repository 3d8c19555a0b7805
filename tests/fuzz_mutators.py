"""Ways to damage a file: (rng, bytes, other files of the kind) -> bytes."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib

import numpy as np

EXTREME = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**24, 2**27, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
ODD = (
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 1e-308, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "nan",
    "fcn8s", "\0", "\ud800", "../..", "/", "~", "~nobody-of-this-name", "x" * 5000, "$\\frac{", "[/b]", "caf\u00e9", [],
    {}, [[]], [0, 0], [1, 2, 3], [2**31, 2**31], [-5, 32], ["a"], {"a": {}}, [None], "1e999",
)  # fmt: skip


def pick(rng, values):
    return values[int(rng.integers(len(values)))]


def flip(rng, data, others):
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 17)) if out else 0):
        out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def cut(rng, data, others):
    return data[: int(rng.integers(len(data) + 1))]


def drop(rng, data, others):
    start = int(rng.integers(len(data) + 1))
    return data[:start] + data[start + int(rng.integers(1, 65)) :]


def repeat(rng, data, others):
    start, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 257))
    return data[:start] + data[start : start + length] * int(rng.integers(2, 9)) + data[start + length :]


def splice(rng, data, others):
    other = pick(rng, others)
    return data[: int(rng.integers(len(data) + 1))] + other[int(rng.integers(len(other) + 1)) :]


def noise(rng, data, others):
    start = int(rng.integers(len(data) + 1))
    return data[:start] + rng.bytes(int(rng.integers(1, 65))) + data[start:]


def overwrite(rng, data, others):
    """Put an extreme number over a field, more often than not in the header."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        form = pick(rng, ("B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
        size = struct.calcsize(form)
        reach = min(len(out), 256) if rng.random() < 0.7 else len(out)
        if reach >= size:
            start = int(rng.integers(reach - size + 1))
            out[start : start + size] = struct.pack(form, pick(rng, EXTREME) & (2 ** (8 * size) - 1))
    return bytes(out)


PLAIN = (flip, cut, drop, repeat, splice, noise, overwrite)


def png_header(rng, data, others):
    """Claim another size, depth or colour type in a PNG, with its checksum right."""
    if data[12:16] != b"IHDR" or len(data) < 33:
        return overwrite(rng, data, others)
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", data[16:29])
    sizes = (1, 30_000, 65_500, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
    width = pick(rng, (width, *sizes))
    height = pick(rng, (height, *sizes))
    depth, colour = pick(rng, (depth, 1, 2, 4, 8, 16, 0, 3)), pick(rng, (colour, 0, 2, 3, 4, 6, 7))
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colour, *rest)
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def jpeg_header(rng, data, others):
    """Claim another size in a JPEG."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    if at < 0:
        return overwrite(rng, data, others)
    size = struct.pack(">HH", pick(rng, (1, 30_000, 65_500, 65_535, 0)), pick(rng, (1, 30_000, 65_500, 65_535, 0)))
    return data[: at + 5] + size + data[at + 9 :]


def mat_inside(rng, data, others):
    """Damage what is packed inside of a .mat file and pack it again."""
    if len(data) < 137 or data[128] != 15:
        return overwrite(rng, data, others)
    try:
        content = zlib.decompress(data[136:])
    except zlib.error:
        return flip(rng, data, others)
    packed = zlib.compress(pick(rng, PLAIN)(rng, content, [content]))
    return data[:128] + struct.pack("<II", 15, len(packed)) + packed


def json_value(rng, data, others):
    """Put another value somewhere in a JSON file; a safetensors header is one too."""
    start = 8 if data[8:9] == b"{" else 0
    length = struct.unpack("<Q", data[:8])[0] if start else len(data)
    try:
        tree = json.loads(data[start : start + length])
    except (ValueError, RecursionError):
        return pick(rng, PLAIN)(rng, data, others)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if isinstance(tree, dict | list):
        walk(tree)
    for _ in range(int(rng.integers(1, 4)) if places else 0):
        node, key = pick(rng, places)
        kind = rng.random()
        if kind < 0.8:
            node[key] = pick(rng, ODD)
        elif isinstance(node, dict) and key in node:
            node[str(pick(rng, ODD))] = node.pop(key) if kind < 0.9 else node[key]
    header = json.dumps(tree if rng.random() < 0.97 else pick(rng, ODD)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :] if start else header


def json_deep(rng, data, others):
    """Nest brackets deeper than a parser may follow."""
    text = pick(rng, (b"[", b'{"a":')) * int(rng.integers(1, 100_000))
    return struct.pack("<Q", len(text)) + text if data[8:9] == b"{" else text


def zip_record(rng, data, others):
    """Write another pickle into a .pth archive, packed or not, or a record that unpacks to far more than it is."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError, zlib.error):
        return flip(rng, data, others)
    name = pick(rng, sorted(records))
    kind = rng.random()
    if kind < 0.2:
        records[name] = bytes(2**28)
    elif kind < 0.7:
        name = next((name for name in records if name.endswith("data.pkl")), name)
        records[name] = pickle_code(rng, records[name], [records[name]])
    else:
        records[name] = pick(rng, PLAIN)(rng, records[name], [records[name]])
    if len(records[name]) < 2**20 and rng.random() < 0.2:
        records["../" + name] = records[name]
    out = io.BytesIO()
    packed = zipfile.ZIP_DEFLATED if kind < 0.2 or rng.random() < 0.2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", packed) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return out.getvalue()


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_marker(path):
    """Build what writes a file when it is unpickled."""
    return Call(exec, f"open({str(path)!r}, 'w').close()")


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


def pickle_code(rng, data, others):
    """Put imports, values and calls into a pickle, or write one of them alone."""
    made = b"".join(
        pick(rng, _GLOBALS) + b"".join(pick(rng, _VALUES) for _ in range(int(rng.integers(4)))) + pick(rng, _CALLS)
        for _ in range(int(rng.integers(1, 4)))
    )
    if rng.random() < 0.5:
        return b"\x80\x02" + made + b"."
    start = int(rng.integers(2, max(3, len(data))))
    return data[:start] + made + data[start:]


def harmful(marker):
    """List pickles that would write the marker, in the protocols and disguises that there are."""
    call = write_marker(marker)
    return [
        *(pickle.dumps({"a": call}, protocol) for protocol in (0, 1, 2, 4)),
        pickle.dumps([np.zeros(2), call]),
        pickle.dumps(Call(bytearray, 2**33)),
    ]


def text_line(rng, data, others):
    """Put signs into a text file that names and lines do not have."""
    lines = data.split(b"\n")
    signs = (
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"../../etc/passwd",
        b"x" * 5000,
        b"\xef\xbb\xbf",
        b"\r",
        b"\xe2\x80\xa8",
        b" ",
    )
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(lines)))
        lines[at] = pick(rng, (lines[at], b"")) + pick(rng, signs) + pick(rng, (lines[at], b""))
    return b"\n".join(lines * (200 if rng.random() < 0.05 else 1))


def mutator(*special):
    """Return what damages one file of a case, once or more, by the plain ways and those given.

    Now and then a file is left out, or left as it is.
    """

    def mutate(rng, corpus):
        files = dict(pick(rng, corpus))
        name = pick(rng, sorted(files))
        others = [case[name] for case in corpus if name in case]
        for _ in range(int(rng.integers(0, 4)) if rng.random() < 0.5 else 1):
            ways = special if special and rng.random() < 0.5 else PLAIN
            files[name] = pick(rng, ways)(rng, files[name], others)
        if len(files) > 1 and rng.random() < 0.1:
            del files[name]
        return files

    return mutate
