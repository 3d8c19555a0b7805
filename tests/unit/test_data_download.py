import dataclasses
import functools
import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest
import trees

from fcn_jax.config import DataConfig
from fcn_jax.data import datasets, download, sbd, voc
from fcn_jax.download import download as download_file
from fcn_jax.errors import InputError


def _md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def packed(tmp_path):
    """VOC2012 and SBD in tar files with the original names, as archives with file:// URLs."""
    trees.voc(tmp_path / "made", "2012", {"train": ["2007_001"], "val": ["2007_002"]})
    trees.voc(tmp_path / "made/TrainVal", "2011", {"val": ["2007_002", "2007_003"]})
    trees.sbd(tmp_path / "made", {"train": ["2008_001", "2007_003"]})
    archives = {}
    for key, original in download.ARCHIVES.items():
        path = tmp_path / "server" / original.name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
            top = original.content.split("/")[0]
            tar.add(tmp_path / "made" / top, top)
        archives[key] = dataclasses.replace(original, url=path.as_uri(), md5=_md5(path))
    return archives


@pytest.fixture
def served(packed, tmp_path):
    """The archives of `packed` over HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "server"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {k: dataclasses.replace(a, url=f"http://127.0.0.1:{server.server_port}/{a.name}") for k, a in packed.items()}
    server.shutdown()
    server.server_close()


def _config(tmp_path, download=True):
    return DataConfig(dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), download=download)


def test_an_archive_is_downloaded_checked_and_unpacked(served, tmp_path):
    place = download.fetch(served["voc2012"], tmp_path / "data", True)
    assert place == tmp_path / "data/VOCdevkit/VOC2012"
    assert (place / "JPEGImages/2007_001.jpg").is_file()
    assert not [p for p in (tmp_path / "data").iterdir() if "part" in p.name or "unfinished" in p.name]


def test_voc_and_sbd_are_downloaded_into_one_folder_and_loaded(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ARCHIVES", packed)
    for module in (voc, sbd):
        monkeypatch.setattr(module, "ARCHIVES", packed)
    config = _config(tmp_path)
    assert datasets.load("sbd/train", config).source[0]["name"] == "2008_001"
    assert np.array_equal(datasets.decode(datasets.load("voc/train", config).source[0])["label"], trees.mask(1, 21))
    seg11valid = datasets.load("voc/seg11valid", config)
    assert [seg11valid.source[i]["name"] for i in range(len(seg11valid))] == ["2007_002"]
    without = dataclasses.replace(config, download=False)  # the downloaded files are used
    assert len(datasets.load("voc/val", without)) == 1


def test_an_unpacked_data_set_is_not_downloaded_again(packed, tmp_path):
    (tmp_path / "data/benchmark_RELEASE").mkdir(parents=True)
    unreachable = dataclasses.replace(packed["sbd"], url="http://127.0.0.1:9/benchmark.tgz")
    assert download.fetch(unreachable, tmp_path / "data", True) == tmp_path / "data/benchmark_RELEASE"


def test_a_manually_placed_archive_is_used_without_network(packed, tmp_path):
    (tmp_path / "data").mkdir()
    archive = packed["sbd"]
    (tmp_path / "server" / archive.name).rename(tmp_path / "data" / archive.name)
    assert (download.fetch(archive, tmp_path / "data", True) / "dataset/train.txt").is_file()


def test_a_wrong_checksum_is_rejected_and_leaves_no_file(served, tmp_path):
    wrong = dataclasses.replace(served["sbd"], md5="0" * 32)
    with pytest.raises(InputError, match=r"benchmark\.tgz: its md5 is [0-9a-f]{32}, expected 0{32}"):
        download.fetch(wrong, tmp_path / "data", True)
    assert list((tmp_path / "data").iterdir()) == []
    (tmp_path / "data" / wrong.name).write_bytes(b"cut short")
    with pytest.raises(InputError, match=r"data/benchmark\.tgz: its md5 is .*; remove it"):
        download.fetch(wrong, tmp_path / "data", True)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/benchmark.tgz", "http://nowhere.invalid/benchmark.tgz"])
def test_without_network_the_error_says_which_file_to_place_where(packed, tmp_path, url):
    archive = dataclasses.replace(packed["sbd"], url=url)
    with pytest.raises(InputError) as caught:
        download.fetch(archive, tmp_path / "data", True)
    place = tmp_path / "data/benchmark.tgz"
    assert f"fetch benchmark.tgz (md5:{archive.md5}) elsewhere and put it at {place}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_interrupted_download_is_resumed(tmp_path):
    content, asked = bytes(range(256)) * 40, []

    class Cutting(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers["Range"])
            start = int(asked[-1].removeprefix("bytes=").removesuffix("-")) if asked[-1] else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:] if start else content[:5000])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cutting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, target = f"http://127.0.0.1:{server.server_port}/w.bin", tmp_path / "new/w.bin"
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    with pytest.raises(InputError, match="cannot be fetched .*5000 of 10240 bytes|IncompleteRead"):
        download_file(url, target, digest)
    assert not target.exists()
    assert download_file(url, target, digest).read_bytes() == content and asked == [None, "bytes=5000-"]
    assert [path.name for path in target.parent.iterdir()] == ["w.bin"]
    server.shutdown()
    server.server_close()


def test_a_file_missing_on_the_server_is_reported(served, tmp_path):
    archive = dataclasses.replace(served["sbd"], url=served["sbd"].url.replace("benchmark", "other"))
    with pytest.raises(InputError, match=r"other\.tgz cannot be fetched \(.*\); fetch other\.tgz"):
        download.fetch(archive, tmp_path / "data", True)


def test_archive_members_outside_the_folder_are_not_unpacked(tmp_path):
    path = tmp_path / "server.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("../../escaped.txt"))
    archive = download.Archive(path.as_uri(), _md5(path), "content")
    with pytest.raises(InputError, match=r"server\.tar: cannot be unpacked"):
        download.fetch(archive, tmp_path / "data", True)
    assert not list(tmp_path.rglob("escaped.txt"))


def test_a_decompression_bomb_is_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("top/large")
        member.size = 2**24
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    archive = download.Archive("http://localhost/a.tgz", _md5(tmp_path / "a.tgz"), "top")
    with pytest.raises(InputError, match=r"a\.tgz: cannot be unpacked \(it unpacks to more than 50 times its size\)"):
        download.fetch(archive, tmp_path, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]


def test_nothing_is_downloaded_without_the_flag(tmp_path):
    (tmp_path / "data").mkdir()
    for spec, name in (("voc/train", "VOCtrainval_11-May-2012.tar"), ("sbd/train", "benchmark.tgz")):
        with pytest.raises(InputError, match=rf"unpack {name} there or give --data\.download"):
            datasets.load(spec, _config(tmp_path, download=False))
