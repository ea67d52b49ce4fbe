"""The download script against a server on this machine that serves files of the true formats and misbehaves.

Nothing here says that the real hosts answer as this server does; data/download.py says so too.
"""

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import nibabel as nib
import no_network
import numpy as np
import pytest
import test_frames
import typer
from typer.testing import CliRunner

import mfdiff_lite as mf

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "download.py"
PET = "openneuro-ds003382"
LABEL_SHAPE = (11, 13, 12)  # (Z, Y, X), small; the real one is checked in test_tables


def load_script():
    spec = importlib.util.spec_from_file_location("download", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REAL = load_script()  # untouched; the fixture below makes its own copy


# ---- files of the true formats -------------------------------------------------------------------------------------


@functools.cache
def nifti(seed):
    """A gzipped NIfTI of noise, which does not compress: about 10 kB."""
    volume = np.random.default_rng(seed).integers(0, 2**15, (16, 20, 16), dtype=np.int16)
    return gzip.compress(nib.Nifti1Image(volume, np.eye(4)).to_bytes(), mtime=0)


@functools.cache
def labels(seed, stray=0, high=0):
    """BrainWeb's format: uint16, class << 4; `stray` voxels have lower bits set, `high` voxels have no known class."""
    rng = np.random.default_rng(seed)
    volume = rng.integers(0, 12, LABEL_SHAPE).astype("<u2") << 4
    volume.flat[:stray] |= 5
    volume.flat[:high] = 12 << 4
    return gzip.compress(volume.tobytes(), mtime=0)


@functools.cache
def sidecar(seed, frames=90):
    """The sidecar of a dynamic PET: about 2 kB."""
    times = {"FrameTimesStart": [60 * n for n in range(frames)], "FrameDuration": [60] * frames}
    return json.dumps({"SeriesNumber": seed, "Units": "Bq/ml"} | times, indent=1).encode()


# ---- a server that misbehaves on request ---------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Answers with shop.files[path]; the next of shop.tricks[path], if any, answers instead."""

    def do_GET(self):
        shop = self.server.shop
        self.range = self.headers.get("Range")
        shop.requests.append((self.path, self.range))
        tricks = shop.tricks.get(self.path)
        trick = tricks.pop(0) if tricks else whole
        try:
            trick(self, shop.files.get(self.path))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client refused and left

    def head(self, status, length=None, kind="application/gzip", **more):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *args):
        pass


def whole(h, body):
    """The honest answer: 404, 416, a range, or everything."""
    if body is None:
        return answer(404)(h, body)
    start = int(re.fullmatch(r"bytes=(\d+)-", h.range)[1]) if h.range else 0
    if start >= len(body):
        return h.head(416, 0, Content_Range=f"bytes */{len(body)}")
    span = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if h.range else {}
    h.head(206 if h.range else 200, len(body) - start, **span)
    h.wfile.write(body[start:])


def answer(status, text=b"<html>no</html>", kind="text/html", **more):
    """A trick: this status and text, whatever the file."""

    def trick(h, body):
        h.head(status, len(text), kind, **more)
        h.wfile.write(text)

    return trick


def drop(h, body):
    """Promise everything, send half and hang up."""
    start = int(h.range[6:-1]) if h.range else 0
    span = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if h.range else {}
    h.head(206 if h.range else 200, len(body) - start, **span)
    h.wfile.write(body[start : start + (len(body) - start) // 2])


def stall(h, body):
    """Send half, then nothing until the test is over."""
    h.head(200, len(body))
    h.wfile.write(body[: len(body) // 2])
    h.wfile.flush()
    h.server.shop.over.wait(20)


def ignore_range(h, body):
    h.head(200, len(body))
    h.wfile.write(body)


def without_length(h, body):
    h.head(200)
    h.wfile.write(body)


def half_without_length(h, body):
    h.head(200)
    h.wfile.write(body[: len(body) // 2])


def too_much(h, body):
    h.head(200)
    h.wfile.write(body + b"more")


def other_length(h, body):
    h.head(200, len(body) + 1)
    h.wfile.write(body + b"x")


def other_content(h, body):
    h.head(200, len(body))
    h.wfile.write(body[:-9] + bytes(9))


def other_range(h, body):
    h.head(206, len(body) - 1, Content_Range=f"bytes 1-{len(body) - 1}/{len(body)}")
    h.wfile.write(body[1:])


def range_without_header(h, body):
    h.head(206, len(body))
    h.wfile.write(body)


def labelled_as_encoded(h, body):
    """A .gz that the server calls a content encoding, which a client may undo on the way."""
    h.head(200, len(body), Content_Encoding="gzip")
    h.wfile.write(body)


class Shop:
    """The server, the script pointed at it, and what was asked for."""

    def __init__(self, script, server, folder):
        self.script, self.server, self.folder = script, server, folder
        self.files, self.tricks, self.requests = {}, {}, []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"

    def stock(self, name, make):
        """Replace the items of a data set by the same paths and addresses with small contents."""
        items = []
        for number, item in enumerate(self.script.SOURCES[name].items):
            body = sidecar(number) if item.inherited else make(number)
            self.files[self.address(item)] = body
            if item.unpacked:
                items.append(dataclasses.replace(item, unpacked=2 * int(np.prod(LABEL_SHAPE))))
            elif item.inherited:
                items.append(item)
            else:
                algorithm = hashlib.md5 if len(item.digest) == 32 else hashlib.sha256
                items.append(dataclasses.replace(item, size=len(body), digest=algorithm(body).hexdigest()))
        self.script.SOURCES[name] = dataclasses.replace(self.script.SOURCES[name], items=tuple(items))

    def address(self, item):
        return self.address_of(item.url)

    def address_of(self, url):
        parts = urlsplit(url)
        return parts.path + ("?" + parts.query if parts.query else "")

    def item(self, name=PET, number=0):
        return self.script.SOURCES[name].items[number]

    def body(self, name=PET, number=0):
        return self.files[self.address(self.item(name, number))]

    def path(self, name=PET, number=0):
        return self.folder / name / self.item(name, number).path

    def part(self, name=PET, number=0):
        path = self.path(name, number)
        return path.with_name(path.name + ".part")

    def play(self, *tricks, name=PET, number=0):
        self.tricks[self.address(self.item(name, number))] = list(tricks)

    def ranges(self, name=PET, number=0):
        """The Range headers of the requests for one item, in order."""
        return [asked for path, asked in self.requests if path == self.address(self.item(name, number))]

    def run(self, *arguments):
        return command(self.script, *arguments, "--dir", self.folder, "--base-url", self.url)


def command(script, *arguments):
    app = typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def shop(tmp_path):
    script = load_script()
    script.BACKOFF, script.TIMEOUT, script.CHUNK = (0, 0), (5, 5), 512
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.shop = Shop(script, server, tmp_path / "downloads")
    server.shop.stock(PET, nifti)
    server.shop.stock("openneuro-ds004513", lambda n: nifti(100 + n))
    server.shop.stock("brainweb", lambda n: labels(n, stray=7))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.shop
    server.shop.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def tree(folder):
    """Every file below, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fine(result):
    assert result.exit_code == 0, (result.output, result.exception)
    assert not result.stderr
    return result


def refused(result, *parts, status=2):
    """One sentence on stderr that says all the parts, and no traceback."""
    assert result.exit_code == status, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("download: ") and lines[0].endswith("."), result.stderr
    for part in parts:
        assert re.search(part, lines[0]), (part, lines[0])
    return lines[0]


# ---- what should happen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(REAL.SOURCES))
def test_whole_data_set(shop, name):
    source = shop.script.SOURCES[name]
    result = fine(shop.run(name))
    wanted = {i.path: shop.files[shop.address(i)] for i in source.items if not i.dynamic}
    terms = {"LICENCE.txt": source.licence + "\n", "CITATION.txt": source.citation + "\n"}
    assert tree(shop.folder / name) == wanted | {k: v.encode() for k, v in terms.items()}
    assert len(shop.requests) == len(wanted) and not any(asked for _, asked in shop.requests)
    assert source.licence in result.stdout and source.citation in result.stdout
    assert f"{len(wanted)} files fetched, 0 already there" in result.stdout


def test_dynamic_adds_the_frames(shop):
    fine(shop.run(PET))
    shop.requests.clear()
    fine(shop.run(PET, "--dynamic"))
    assert len(shop.requests) == 6 and all("rec-acdyn" in path for path, _ in shop.requests)
    held, items = tree(shop.folder / PET), shop.script.SOURCES[PET].items
    assert {i.path: shop.files[shop.address(i)] for i in items}.items() <= held.items()
    frames = [path for path in held if path.endswith("rec-acdyn_run-001_pet.nii.gz")]
    assert len(frames) == 3 and all(path.replace(".nii.gz", ".json") in held for path in frames)


def test_dynamic_of_another_data_set(shop):
    refused(shop.run("brainweb", "--dynamic"), "--dynamic", PET)
    assert not shop.requests


def test_a_good_file_is_checked_and_not_fetched_again(shop):
    fine(shop.run(PET))
    shop.requests.clear()
    before = tree(shop.folder)
    result = fine(shop.run(PET))
    assert "0 files fetched, 6 already there" in result.stdout
    assert not shop.requests and tree(shop.folder) == before
    fine(shop.run(PET, "--force"))  # --force is for what is wrong
    assert not shop.requests


@pytest.mark.parametrize("name", [PET, "brainweb"])
@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b[:-9] + bytes(9)], ids=["shorter", "changed"])
def test_a_wrong_file_is_refused_and_force_replaces_it(shop, name, spoil):
    fine(shop.run(name))
    spoilt = spoil(shop.body(name, 1))
    shop.path(name, 1).write_bytes(spoilt)
    shop.requests.clear()
    refused(shop.run(name), re.escape(str(shop.path(name, 1))), "expected .*, found .*; .*--force")
    assert not shop.requests and shop.path(name, 1).read_bytes() == spoilt
    fine(shop.run(name, "--force"))
    assert len(shop.requests) == 1 and shop.path(name, 1).read_bytes() == shop.body(name, 1)


def test_the_old_file_stays_until_the_new_one_is_right(shop):
    shop.path().parent.mkdir(parents=True)
    shop.path().write_bytes(b"old")
    shop.play(other_content)
    refused(shop.run(PET, "--force"), "md5")
    assert shop.path().read_bytes() == b"old"


@pytest.mark.parametrize(
    "arguments",
    [["--list"], [PET, "--dry-run"], [PET, "--dynamic", "--dry-run"], ["brainweb", "--dry-run"], [PET, "--list"]],
)
def test_list_and_dry_run_ask_nothing_and_write_nothing(shop, tmp_path, arguments):
    result = fine(shop.run(*arguments))
    assert not shop.requests and not list(tmp_path.iterdir())
    if "--dry-run" in arguments:
        items = [i for i in shop.script.SOURCES[arguments[0]].items if "--dynamic" in arguments or not i.dynamic]
        assert all(i.url in result.stdout and str(shop.folder / arguments[0] / i.path) in result.stdout for i in items)
        assert all(i.inherited in result.stdout for i in items if i.inherited)
        assert f"{len(items)} files to fetch" in result.stdout
    else:
        assert all(name in result.stdout for name in shop.script.SOURCES)


@pytest.mark.parametrize("arguments", [[], ["brainwep"]])
def test_unknown_name(shop, arguments):
    refused(shop.run(*arguments), "brainweb, openneuro-ds003382, openneuro-ds004513", "--list")


# ---- resuming ------------------------------------------------------------------------------------------------------


def test_resume_after_a_drop(shop):
    shop.play(drop)
    result = fine(shop.run(PET))
    first, second = shop.ranges()
    assert first is None
    start = int(re.fullmatch(r"bytes=(\d+)-", second)[1])
    assert len(shop.body()) // 2 - shop.script.CHUNK < start <= len(shop.body()) // 2
    assert shop.path().read_bytes() == shop.body()
    assert "trying again" in result.stdout


def test_resume_in_a_later_run(shop):
    shop.play(drop, drop, drop)  # as many as there are attempts
    refused(shop.run(PET), "3 failed attempts", "same command again")
    kept = shop.part().read_bytes()
    assert 0 < len(kept) < len(shop.body()) and shop.body().startswith(kept) and not shop.path().exists()
    fine(shop.run(PET))
    assert shop.ranges()[-1] == f"bytes={len(kept)}-"
    assert shop.path().read_bytes() == shop.body() and not shop.part().exists()


@pytest.mark.parametrize(
    ("trick", "ranges"),
    [(ignore_range, 1), (other_range, 2), (range_without_header, 2), (answer(416), 2)],
    ids=["200", "other-206", "bare-206", "416"],
)
def test_a_server_that_does_not_resume(shop, trick, ranges):
    """Whatever it sends for a range, nothing is put together from parts that do not fit."""
    shop.part().parent.mkdir(parents=True)
    shop.part().write_bytes(shop.body()[:700])
    shop.play(trick)
    fine(shop.run(PET))
    assert shop.ranges() == ["bytes=700-", None][:ranges]
    assert shop.path().read_bytes() == shop.body()


def test_a_complete_part_is_only_renamed(shop):
    for name in (PET, "brainweb"):
        shop.part(name).parent.mkdir(parents=True)
        shop.part(name).write_bytes(shop.body(name))
        fine(shop.run(name))
        assert shop.ranges(name) == [] and shop.path(name).read_bytes() == shop.body(name)


@pytest.mark.parametrize("more", [b"", b"longer"])
def test_a_part_of_something_else_and_not_shorter(shop, more):
    """The server answers 416 by itself; the second attempt starts anew."""
    shop.part().parent.mkdir(parents=True)
    shop.part().write_bytes(bytes(len(shop.body())) + more)
    fine(shop.run(PET))
    assert shop.ranges()[-1] is None and shop.path().read_bytes() == shop.body()


def test_a_part_of_an_older_file(shop):
    """Old start and new end fit in length, not in hash: refused, thrown away, and the next run is whole."""
    shop.part().parent.mkdir(parents=True)
    shop.part().write_bytes(b"\x1f\x8b" + bytes(500))
    refused(shop.run(PET), "expected md5 [0-9a-f]{32}, found [0-9a-f]{32}", "deleted")
    assert not shop.part().exists() and not shop.path().exists()
    fine(shop.run(PET))


# ---- answers that are not the file ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trick", "sentence"),
    [
        (answer(404), "expected the file, found the answer 404 Not Found"),
        (answer(403), "found the answer 403 Forbidden"),
        (answer(200), "expected a gzip file, found an HTML page"),
        (answer(200, kind="application/octet-stream"), r"expected [\d,]+ bytes, found 15 announced"),
        (other_length, r"expected [\d,]+ bytes, found [\d,]+ announced"),
        (too_much, r"expected at most [\d,]+ bytes, found more"),
        (other_content, "expected md5 [0-9a-f]{32}, found [0-9a-f]{32}"),
    ],
    ids=["404", "403", "html", "html-in-disguise", "wrong-length", "too-much", "wrong-hash"],
)
def test_refused_at_once(shop, trick, sentence):
    shop.play(trick)
    refused(shop.run(PET), sentence, re.escape(shop.item().path))
    assert len(shop.requests) == 1
    assert not shop.path().exists() and not shop.part().exists()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"<!DOCTYPE html><html>sorry</html>", "expected a gzip file, found one that starts with b'<!DOCTYPE html>'"),
        (labels(0)[:-20], "expected a whole gzip file, found a broken one"),
        (labels(0)[:60] + bytes(9) + labels(0)[69:], "expected a whole gzip file, found a broken one"),
        (gzip.compress(bytes(2 * int(np.prod(LABEL_SHAPE)) - 2)), r"expected 3,432 bytes after gunzip, found 3,430"),
        (gzip.compress(bytes(10_000)), r"expected 3,432 bytes after gunzip, found more"),
        (labels(0, high=2), r"expected classes 0 to 11 \(value >> 4\), found 2 voxels with others"),
        (gzip.compress(bytes(np.full(LABEL_SHAPE, 3 << 4, ">u2"))), "expected classes 0 to 11"),
    ],
    ids=["html", "truncated", "damaged", "too-small", "too-large", "classes", "byte-order"],
)
def test_brainweb_is_judged_by_what_it_unpacks_to(shop, body, sentence):
    """Its host publishes neither lengths nor hashes."""
    shop.files[shop.address(shop.item("brainweb"))] = body
    for trick in (whole, without_length):
        shop.play(trick, name="brainweb")
        refused(shop.run("brainweb"), sentence, "subject04_crisp")
        assert not shop.path("brainweb").exists() and not shop.part("brainweb").exists()


def test_other_bits_and_a_rare_stray_label_are_let_through(shop):
    shop.files[shop.address(shop.item("brainweb"))] = labels(0, stray=1000, high=1)
    fine(shop.run("brainweb"))


@pytest.mark.parametrize(
    "trick",
    [answer(500), answer(503), answer(429), half_without_length, drop, stall],
    ids=["500", "503", "429", "half", "drop", "time-out"],
)
def test_another_attempt_helps(shop, trick):
    shop.script.TIMEOUT = (5, 0.5 if trick is stall else 5)
    shop.play(trick)
    started = time.monotonic()
    fine(shop.run(PET))
    assert time.monotonic() - started < 10  # the server would stall for 20 s
    assert len(shop.ranges()) == 2 and shop.path().read_bytes() == shop.body()


@pytest.mark.parametrize(
    ("trick", "why"), [(answer(500), "500 Internal Server Error"), (stall, "Error|Timeout"), (drop, "Error|ended")]
)
def test_attempts_come_to_an_end(shop, trick, why):
    shop.script.TIMEOUT = (5, 0.2 if trick is stall else 5)
    shop.play(*[trick] * 9)
    refused(shop.run(PET), "3 failed attempts", why)
    assert len(shop.requests) == 3


def test_back_off_grows(shop, monkeypatch):
    waited = []
    monkeypatch.setattr(shop.script, "BACKOFF", REAL.BACKOFF)
    monkeypatch.setattr(shop.script.time, "sleep", waited.append)
    shop.play(*[answer(502)] * 4)
    fine(shop.run(PET))
    assert waited == list(REAL.BACKOFF) == [1, 2, 4, 8]


def test_nobody_listens(shop):
    with socket.create_server(("127.0.0.1", 0)) as server:
        shop.url = f"http://127.0.0.1:{server.getsockname()[1]}"
    refused(shop.run(PET), "3 failed attempts, the last: ConnectionError")
    assert not shop.part().exists()


def test_a_gz_labelled_as_content_encoding_stays_packed(shop):
    shop.play(labelled_as_encoded)
    shop.play(labelled_as_encoded, name="brainweb")
    fine(shop.run(PET))
    fine(shop.run("brainweb"))
    assert shop.path().read_bytes() == shop.body()


def test_redirects(shop):
    shop.files["/elsewhere"] = shop.body()
    shop.play(answer(302, Location="/elsewhere"))
    shop.play(answer(302, Location="/login"), number=1)
    shop.tricks["/login"] = [answer(200)]
    refused(shop.run(PET), "an HTML page")
    assert shop.path().read_bytes() == shop.body() and not shop.path(number=1).exists()


# ---- the sidecars of the dynamic PET -------------------------------------------------------------------------------


class Sidecar:
    """The first sidecar: its addresses beside the PET and at the top, its place, and runs that want it."""

    def __init__(self, shop):
        self.shop = shop
        items = shop.script.SOURCES[PET].items
        self.number = next(n for n, item in enumerate(items) if item.inherited)
        self.item = items[self.number]
        self.beside, self.top = shop.address(self.item), shop.address_of(self.item.inherited)
        self.path, self.part = shop.path(number=self.number), shop.part(number=self.number)
        self.top_part = self.path.with_name(Path(self.top).name + ".part")
        self.body = shop.files[self.beside]

    def run(self, *arguments):
        return self.shop.run(PET, "--dynamic", *arguments)

    def asked(self):
        """Which of the two addresses was asked for what range, in order."""
        return [(path, asked) for path, asked in self.shop.requests if path in (self.beside, self.top)]

    def move_to_the_top(self):
        self.shop.files[self.top] = self.shop.files.pop(self.beside)

    def refused(self, *parts, status=2):
        """One sentence; nothing stays, and no frames of 0.7 GB were fetched for a sidecar that will not do."""
        line = refused(self.run(), *parts, status=status)
        assert not self.path.exists() and not self.part.exists() and not self.top_part.exists()
        assert not any("acdyn" in path and path.endswith(".nii.gz") for path, _ in self.shop.requests)
        return line


@pytest.fixture
def side(shop):
    fine(shop.run(PET))
    shop.requests.clear()
    return Sidecar(shop)


def test_a_sidecar_beside_its_pet_is_taken_from_there(side):
    side.shop.files[side.top] = sidecar(77)
    fine(side.run())
    assert side.asked() == [(side.beside, None)] and side.path.read_bytes() == side.body


def test_a_sidecar_at_the_top_gets_the_name_of_its_pet(side):
    """BIDS inheritance: one for everybody, at the top of the data set, without the subject in its name."""
    for item in side.shop.script.SOURCES[PET].items:
        if item.inherited:
            del side.shop.files[side.shop.address(item)]
    side.shop.files["/openneuro.org/ds003382/task-checkerboard_trc-18FFDG_rec-acdyn_run-001_pet.json"] = sidecar(77)
    result = fine(side.run())
    assert "trying the top" in result.stdout
    assert side.asked()[:2] == [(side.beside, None), (side.top, None)]
    held = tree(side.shop.folder / PET)
    assert {path for path in held if path.endswith(".json")} == {
        f"sub-{s}/pet/sub-{s}_task-checkerboard_trc-18FFDG_rec-acdyn_run-001_pet.json" for s in ("02", "05", "06")
    }
    assert all(body == sidecar(77) for path, body in held.items() if path.endswith(".json"))
    assert not any(path.endswith(".part") for path in held)
    side.shop.requests.clear()
    fine(side.run())
    assert not side.shop.requests


def test_a_sidecar_in_neither_place(side):
    del side.shop.files[side.beside]
    side.refused(re.escape(side.top), re.escape(f"expected the sidecar {side.item.path}, found the answer 404"))
    assert side.asked() == [(side.beside, None), (side.top, None)]
    side.path.write_bytes(sidecar(5))  # one from elsewhere will do
    fine(side.run())
    assert side.path.read_bytes() == sidecar(5)


@pytest.mark.parametrize("status", [403, 410])
def test_only_404_leads_to_the_top(side, status):
    side.shop.files[side.top] = sidecar(77)
    side.shop.tricks[side.beside] = [answer(status)]
    side.refused(re.escape(side.beside), f"the answer {status}")
    assert side.asked() == [(side.beside, None)]


@pytest.mark.parametrize("at_the_top", [False, True], ids=["beside", "top"])
@pytest.mark.parametrize("trick", [answer(503), drop, stall], ids=["503", "drop", "time-out"])
def test_a_sidecar_is_tried_again(side, trick, at_the_top):
    if at_the_top:
        side.move_to_the_top()
    side.shop.script.TIMEOUT = (5, 0.5 if trick is stall else 5)
    address = side.top if at_the_top else side.beside
    side.shop.tricks[address] = [trick]
    fine(side.run())
    assert [path for path, _ in side.asked()] == [side.beside] * at_the_top + [address] * 2
    assert (side.asked()[-1][1] is None) == (trick not in (drop, stall))
    assert side.path.read_bytes() == side.body


@pytest.mark.parametrize("at_the_top", [False, True], ids=["beside", "top"])
def test_a_sidecar_is_resumed_in_a_later_run(side, at_the_top):
    if at_the_top:
        side.move_to_the_top()
    address, part = (side.top, side.top_part) if at_the_top else (side.beside, side.part)
    side.shop.tricks[address] = [drop] * 3
    refused(side.run(), re.escape(address), "3 failed attempts", "same command again")
    kept = part.read_bytes()
    assert 0 < len(kept) < len(side.body) and side.body.startswith(kept) and not side.path.exists()
    fine(side.run())
    assert side.asked()[-1] == (address, f"bytes={len(kept)}-")
    assert side.path.read_bytes() == side.body and not part.exists()


def test_nothing_is_put_together_from_the_two_places(side):
    """A start of the one and the end of the other would be JSON that no check tells from a right one."""
    other = sidecar(7)
    assert len(other) == len(side.body) > 700 and other[:700] != side.body[:700]
    side.move_to_the_top()
    side.part.write_bytes(other[:700])
    fine(side.run())
    assert side.asked() == [(side.beside, "bytes=700-"), (side.top, None)]
    assert side.path.read_bytes() == side.body and not side.part.exists() and not side.top_part.exists()


def test_a_complete_part_of_a_sidecar_is_only_renamed(side):
    side.part.write_bytes(side.body)
    fine(side.run())
    assert not side.asked() and side.path.read_bytes() == side.body and not side.part.exists()


def without(key):
    return json.dumps({k: v for k, v in json.loads(sidecar(1)).items() if k != key}).encode()


def with_(**more):
    return json.dumps(json.loads(sidecar(1)) | more).encode()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"<!DOCTYPE html><html>sorry</html>", "a JSON object, found one that starts with b'<!DOCTYPE html>'"),
        (b"[60, 60]", r"a JSON object, found one that starts with b'\[60, 60\]'"),
        (sidecar(1)[:-300], r"expected whole JSON, found something else \(.*line \d+ column \d+"),
        (sidecar(1) + b"}", "expected whole JSON, found something else"),
        (sidecar(1).replace(b"Bq/ml", b"\xb5Ci"), "expected whole JSON, found something else .*utf-8"),
        (b'{"a":' + b"[" * 10**5, "expected whole JSON, found something else"),
        (b"{}", "expected FrameTimesStart with a number of seconds for every frame, found no such entry"),
        (without("FrameTimesStart"), "expected FrameTimesStart .*, found no such entry"),
        (without("FrameDuration"), "expected FrameDuration .*, found no such entry"),
        (with_(FrameDuration=60), "expected FrameDuration .*, found 60;"),
        (with_(FrameDuration=None), "expected FrameDuration .*, found None;"),
        (with_(FrameTimesStart=[], FrameDuration=[]), r"expected FrameTimesStart .*, found \[\]"),
        (with_(FrameDuration=["60\n"] * 90), r"expected FrameDuration .*, found \['60"),
        (with_(FrameDuration=[60] * 89), "of one length, found 90 and 89 numbers"),
        (b'{"a": "' + b"x" * 10**6 + b'"}', "expected at most 1,000,000 bytes, found more"),
    ],
    ids="html array truncated more latin deep empty starts durations number null lists text lengths large".split(),
)
@pytest.mark.parametrize("at_the_top", [False, True], ids=["beside", "top"])
def test_a_sidecar_that_will_not_do(side, body, sentence, at_the_top):
    address = side.top if at_the_top else side.beside
    del side.shop.files[side.beside]
    for trick in (whole, without_length):
        side.shop.files[address] = body
        side.shop.tricks[address] = [trick]
        side.refused(re.escape(address) + ": expected", sentence, "; ")
        assert len([path for path, _ in side.asked() if path == address]) == 1
        side.shop.requests.clear()
    side.shop.files[address] = side.body
    fine(side.run())
    assert side.path.read_bytes() == side.body


@pytest.mark.parametrize(
    ("trick", "sentence"),
    [
        (answer(200), "expected a file with a JSON object, found an HTML page"),
        (half_without_length, "expected whole JSON, found something else .*what arrived was deleted"),
    ],
    ids=["html", "truncated"],
)
def test_an_answer_that_is_not_the_sidecar(side, trick, sentence):
    side.shop.tricks[side.beside] = [trick]
    side.refused(re.escape(side.beside), sentence)
    fine(side.run())


def test_a_wrong_sidecar_on_the_disk_is_refused_and_force_replaces_it(side):
    fine(side.run())
    side.path.write_bytes(without("FrameDuration"))
    side.shop.requests.clear()
    refused(side.run(), re.escape(str(side.path)), "expected FrameDuration .*, found no such entry; .*--force")
    assert not side.shop.requests
    fine(side.run("--force"))
    assert side.shop.requests == [(side.beside, None)] and side.path.read_bytes() == side.body


@pytest.mark.parametrize("at_the_top", [False, True], ids=["beside", "top"])
def test_what_was_fetched_is_what_the_reader_needs(shop, tmp_path, at_the_top):
    """A made-up data set, served, fetched with --dynamic and read: the means of its frames come out."""
    case = test_frames.Case(tmp_path / "origin", test_frames.poisson_frames())
    kinds = {"T1w.nii.gz": case.mr.read_bytes(), "acdyn_run-001_pet.nii.gz": case.pet.read_bytes()}
    paths = [item.path for item in REAL.SOURCES[PET].items]
    shop.stock(PET, lambda n: next((kinds[end] for end in kinds if paths[n].endswith(end)), nifti(n)))
    for item in shop.script.SOURCES[PET].items:
        if item.inherited:
            del shop.files[shop.address(item)]
            shop.files[shop.address_of(item.inherited if at_the_top else item.url)] = case.sidecar.read_bytes()
    fine(shop.run(PET, "--dynamic"))
    for subject in ("02", "05", "06"):
        pet, mr = (
            shop.folder / PET / f"{name}.nii.gz".replace("sub-02", f"sub-{subject}")
            for name in (test_frames.PET_NAME, test_frames.MR_NAME)
        )
        scan = mf.short_frame_scan(pet, mr, frames=range(4, 12), low=2)
        np.testing.assert_allclose(scan.spet, case.mean(*range(4, 12)), rtol=1e-6)
        np.testing.assert_allclose(scan.lpet, case.mean(7, 8), rtol=1e-6)
        np.testing.assert_array_equal(scan.mr, case.scan().mr)
        assert (scan.unit, scan.dose_reduction) == ("Bq/ml", 4)


# ---- the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "needed"), [(PET, None), ("brainweb", 20 * 10_000_000)])
def test_no_disk_space(shop, monkeypatch, tmp_path, name, needed):
    needed = needed or sum(i.size for i in shop.script.SOURCES[name].items if not i.dynamic)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shop.script.shutil, "disk_usage", lambda path: usage(10**12, 10**12, needed - 1))
    refused(shop.run(name), "free disk space", "--dir")
    assert not shop.requests and not list(tmp_path.iterdir())
    monkeypatch.setattr(shop.script.shutil, "disk_usage", lambda path: usage(10**12, 10**12, needed))
    fine(shop.run(name))
    monkeypatch.setattr(shop.script.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 0))
    fine(shop.run(name))  # nothing is missing, so no room is needed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_disk_fills_up_on_the_way(shop):
    shop.part().parent.mkdir(parents=True)
    shop.part().symlink_to("/dev/full")
    refused(shop.run(PET), "cannot be written", "make room")
    assert len(shop.requests) == 1


def test_folder_that_cannot_be_made(shop, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    shop.folder = tmp_path / "file" / "below"
    refused(shop.run(PET), "cannot be read or written", "--dir")

    def forbidden(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    shop.folder = tmp_path / "other"
    monkeypatch.setattr(Path, "mkdir", forbidden)
    refused(shop.run(PET), re.escape(f"{tmp_path}/other/{PET}"), "Permission denied", "--dir")
    assert not shop.requests


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder(shop):
    shop.folder.mkdir()
    shop.folder.chmod(0o500)
    refused(shop.run(PET), "cannot be read or written", "--dir")
    shop.folder.chmod(0o700)
    assert not shop.requests


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_part_and_the_next_call_resumes(shop, monkeypatch):
    write = shop.script.Incoming.write

    def interrupted(self, chunk):
        write(self, chunk)
        if self.have > 2000:
            raise KeyboardInterrupt

    monkeypatch.setattr(shop.script.Incoming, "write", interrupted)
    refused(shop.run(PET), "interrupted", "same command", status=130)
    size = shop.part().stat().st_size
    assert 2000 < size < len(shop.body())
    monkeypatch.setattr(shop.script.Incoming, "write", write)
    fine(shop.run(PET))
    assert shop.ranges() == [None, f"bytes={size}-"] and shop.path().read_bytes() == shop.body()


@pytest.mark.skipif(os.name == "nt", reason="signals are different on Windows")
def test_ctrl_c_in_a_process_of_its_own(shop):
    """The script as users start it, with the true table: the server promises the true length and stops half-way."""
    size = REAL.SOURCES[PET].items[0].size

    def half(h, body):
        h.head(200, size)
        h.wfile.write(b"\x1f\x8b" + bytes(300_000))
        h.wfile.flush()
        shop.over.wait(20)

    shop.play(half)
    # A test run in the background may have SIGINT ignored, and children inherit that.
    start = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv = sys.argv[1:];"
    )
    arguments = [SCRIPT, PET, "--dir", shop.folder, "--base-url", shop.url]
    process = subprocess.Popen(
        [sys.executable, "-c", start + "runpy.run_path(sys.argv[0], run_name='__main__')", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (shop.part().exists() and shop.part().stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, stderr
    assert len(stderr.splitlines()) == 1 and "interrupted" in stderr and "same command" in stderr
    assert 0 < shop.part().stat().st_size <= 300_002


# ---- the tables ----------------------------------------------------------------------------------------------------


def test_tables():
    """What is pinned agrees with itself and with what the help says."""
    items = [item for source in REAL.SOURCES.values() for item in source.items]
    assert len({(i.url, i.path) for i in items}) == len({i.url for i in items}) == len({i.path for i in items})
    for item in items:
        assert not Path(item.path).is_absolute() and ".." not in Path(item.path).parts
        assert item.url.startswith("https://")
        if item.unpacked:
            assert item.size is None and item.digest is None
        elif item.inherited:
            assert item.size is None and item.digest is None and item.dynamic
            assert item.url.endswith(item.path) and item.inherited.startswith(item.url.removesuffix(item.path))
        else:
            assert item.size > 0 and re.fullmatch("[0-9a-f]{32}|[0-9a-f]{64}", item.digest)
            assert item.url.endswith(item.path)
    digests = [i.digest for i in items if i.digest]
    assert len(set(digests)) == len(digests) == len(REAL.PINNED.strip().splitlines()) == 19


def test_openneuro_tables():
    pet, maps = (REAL.SOURCES[name].items for name in (PET, "openneuro-ds004513"))
    default, dynamic = [i for i in pet if not i.dynamic], [i for i in pet if i.dynamic]
    assert round(sum(i.size for i in default) / 1e6) == 46
    assert round(sum(i.size or 0 for i in dynamic) / 1e9, 1) == 2.0
    assert {i.inherited for i in pet} == {
        None,
        "https://s3.amazonaws.com/openneuro.org/ds003382/task-checkerboard_trc-18FFDG_rec-acdyn_run-001_pet.json",
    }
    for number in ("02", "05", "06"):
        assert [Path(i.path).name.split("_")[-1] for i in default if f"sub-{number}/" in i.path] == [
            "T1w.nii.gz",
            "pet.nii.gz",
        ]
        name = f"sub-{number}/pet/sub-{number}_task-checkerboard_trc-18FFDG_rec-acdyn_run-001_pet"
        assert [i.path for i in dynamic if f"sub-{number}/" in i.path] == [f"{name}.json", f"{name}.nii.gz"]
    assert all(i.url.startswith("https://s3.amazonaws.com/openneuro.org/ds003382/sub-") for i in pet)
    subjects = {re.search("sub-s0(..)/", i.path)[1] for i in maps}
    assert len(subjects) == 5 and len(maps) == 10 and sum("CMRglc" in i.path for i in maps) == 5
    assert all(len(i.digest) == 32 for i in pet if not i.inherited) and all(len(i.digest) == 64 for i in maps)


def test_brainweb_table():
    items = REAL.SOURCES["brainweb"].items
    asked = [parse_qs(urlsplit(i.url).query, strict_parsing=False) for i in items]
    subjects = ["04", "05", "06", "18", "20", "38", *(str(n) for n in range(41, 55))]
    assert [q["do_download_alias"] for q in asked] == [[f"subject{s}_crisp"] for s in subjects]
    assert all(q["format_value"] == ["raw_short"] and q["zip_value"] == ["gnuzip"] for q in asked)
    assert all(q["download_for_real"] == ["[Start download!]"] for q in asked)
    assert {i.unpacked for i in items} == {113_746_192} == {362 * 434 * 362 * 2}


def test_list_says_how_much():
    lines = fine(command(REAL, "--list")).stdout.splitlines()
    told = {line.split(":")[0]: line.rsplit("; ")[-1] for line in lines if not line.startswith(" ")}
    assert told == {
        "brainweb": "20 files, sizes not published.",
        PET: "6 files, 46 MB.",
        "openneuro-ds004513": "10 files, 14 MB.",
        f"{PET} --dynamic": "12 files, 2,067 MB.",
    }


def test_terms():
    for source in REAL.SOURCES.values():
        assert "https://" in source.licence and "doi:10." in source.citation
    assert all(REAL.SOURCES[name].licence.startswith("CC0") for name in REAL.SOURCES if name.startswith("openneuro"))
    assert "Not tried against the real hosts" in REAL.__doc__


def test_default_folder_is_ignored_by_git():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "check-ignore", "-q", REAL.DOWNLOADS / PET / "x.nii.gz"], cwd=ROOT)
    assert done.returncode == 0 and REAL.DOWNLOADS == ROOT / "data" / "downloads"


# ---- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "host"), [(PET, "s3.amazonaws.com"), ("brainweb", "brainweb.bic.mni.mcgill.ca")], ids=[PET, "brainweb"]
)
def test_the_guard_of_the_suite_sees_this_script(tmp_path, name, host):
    """Without --base-url the script would leave the machine; the guard stops it, so no other test here does."""
    result = command(REAL, name, "--dir", tmp_path)
    assert isinstance(result.exception, no_network.NetworkRefused)
    assert len(no_network.attempts) == 1 and host in no_network.attempts[0]
    no_network.attempts.clear()  # this one was wanted


def test_importing_and_dry_run_open_no_connection(tmp_path):
    """In a process of its own, watched by the interpreter's audit events rather than by the guard."""
    code = (
        "import json, runpy, sys\n"
        "ways = {'socket.connect', 'socket.sendto', 'socket.getaddrinfo', 'socket.gethostbyname'}\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(event) if event in ways else None)\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(json.dumps([end.code, seen]))\n"
    )
    arguments = [SCRIPT, PET, "--dry-run", "--dir", tmp_path / "new"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]
    assert not (tmp_path / "new").exists()
