"""The download script against a server on this machine that serves files of the true formats and misbehaves.

Nothing here says that the real hosts answer as this server does; data/download.py says so too.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import threading
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
PET, MAPS = "openneuro-ds003382", "openneuro-ds004513"
LABEL_SHAPE = (11, 13, 12)  # (Z, Y, X), small; the real one is checked in test_brainweb_table
SIDECAR = "sub-{0}/pet/sub-{0}_task-checkerboard_trc-18FFDG_rec-acdyn_run-001_pet.json"
SIDE = 6  # number of the first sidecar
TOP = "/openneuro.org/ds003382/task-checkerboard_trc-18FFDG_rec-acdyn_run-001_pet.json"


def load_script():
    spec = importlib.util.spec_from_file_location("download", ROOT / "data" / "download.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REAL = load_script()  # untouched; the fixture below makes its own copy


def nifti(seed):
    """A gzipped NIfTI of noise, which does not compress: about 10 kB."""
    volume = np.random.default_rng(seed).integers(0, 2**15, (16, 20, 16), dtype=np.int16)
    return gzip.compress(nib.Nifti1Image(volume, np.eye(4)).to_bytes(), mtime=0)


def labels(seed, stray=0, high=0):
    """BrainWeb's format: uint16, class << 4; `stray` voxels have lower bits set, `high` voxels have no known class."""
    volume = np.random.default_rng(seed).integers(0, 12, LABEL_SHAPE).astype("<u2") << 4
    volume.flat[:stray] |= 5
    volume.flat[:high] = 12 << 4
    return gzip.compress(volume.tobytes(), mtime=0)


def sidecar(seed, **more):
    """The sidecar of a dynamic PET of 90 frames: about 2 kB."""
    times = {"FrameTimesStart": [60 * n for n in range(90)], "FrameDuration": [60] * 90}
    return json.dumps({"SeriesNumber": seed, "Units": "Bq/ml"} | times | more, indent=1).encode()


class Handler(BaseHTTPRequestHandler):
    """Answers with shop.files[path]; the next of shop.tricks[path], if any, answers instead."""

    def do_GET(self):
        shop = self.server.shop
        shop.requests.append((self.path, self.headers.get("Range")))
        tricks, body = shop.tricks.get(self.path), shop.files.get(self.path)
        self.start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        try:
            (tricks.pop(0) if tricks else honest if body is not None else error(404))(self, body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client refused and left

    def log_message(self, *args):
        pass


def reply(status=200, change=lambda body: body, length=True, kind="application/gzip", **more):
    """A trick: all of the file, changed, whatever range was asked for; `length` False announces none."""

    def trick(h, body):
        content = change(body)
        h.send_response(status)
        h.send_header("Content-Type", kind)
        if length:
            h.send_header("Content-Length", str(len(content) if length is True else length))
        for name, value in more.items():
            h.send_header(name.replace("_", "-"), value)
        h.end_headers()
        h.wfile.write(content)

    return trick


def error(status, kind="text/html", **more):
    return reply(status, lambda body: b"<html>no</html>", kind=kind, **more)


def honest(h, body, share=1.0):
    """What was asked for; with share < 1 it promises that, sends a part and hangs up."""
    if h.start >= len(body):
        return error(416)(h, body)
    rest = body[h.start :]
    span = {"Content_Range": f"bytes {h.start}-{len(body) - 1}/{len(body)}"} if h.start else {}
    reply(206 if h.start else 200, lambda _: rest[: int(len(rest) * share)], len(rest), **span)(h, body)


def drop(h, body):
    honest(h, body, 0.5)


def stall(h, body):
    """Send half, then nothing until the client gives up."""
    drop(h, body)
    h.wfile.flush()
    h.server.shop.over.wait(20)


class Shop:
    """The server, the script pointed at it, and what was asked for; `which` is a data set and the item's number."""

    def __init__(self, script, server, folder):
        self.script, self.folder, self.over = script, folder, threading.Event()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        self.files, self.tricks, self.requests = {}, {}, []

    def stock(self, name, make):
        """Replace what a data set holds by small contents at the same addresses."""
        items = self.script.SOURCES[name].items
        for n, item in enumerate(items):
            body = self.files[self.address(name, n)] = sidecar(n) if item.inherited else make(n)
            if item.hash:
                algorithm = item.hash.split(":")[0]
                items[n] = item._replace(size=len(body), hash=f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}")

    def address(self, name=PET, number=0):
        source = self.script.SOURCES[name]
        return re.sub("^https://[^/]+", "", source.base + source.items[number].address)

    def body(self, *which):
        return self.files[self.address(*which)]

    def path(self, name=PET, number=0, end=""):
        path = self.folder / name / (self.script.SOURCES[name].items[number].path + end)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def play(self, *tricks, which=(PET, 0)):
        self.tricks[self.address(*which)] = list(tricks)

    def asked(self, *which):
        """The ranges in the requests for one item, in order."""
        return [asked for path, asked in self.requests if path == self.address(*which)]

    def run(self, *arguments):
        return command(self.script, *arguments, "--dir", self.folder, "--base-url", self.url)

    def tree(self, name=PET):
        """Every file of a data set, with its content."""
        folder = self.folder / name
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def command(script, *arguments):
    app = typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that the script would have waited; and no proxy between it and the server."""
    monkeypatch.setattr("time.sleep", (waited := []).append)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return waited


@pytest.fixture
def shop(tmp_path):
    script = load_script()
    script.RETRIES, script.TIMEOUT, script.CHUNK, script.BRAINWEB_BYTES = 2, (5, 5), 512, 2 * 11 * 13 * 12
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        shop = server.shop = Shop(script, server, tmp_path / "downloads")
        shop.stock(PET, nifti)
        shop.stock(MAPS, lambda n: nifti(100 + n))
        shop.stock("brainweb", lambda n: labels(n, stray=7))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield shop
        shop.over.set()
        server.shutdown()
    thread.join()


def fine(result):
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refused(result, *parts, status=2):
    """One sentence on stderr that says all the parts, and no traceback."""
    assert result.exit_code == status, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("download: ") and lines[0].endswith("."), result.stderr
    for part in parts:
        assert re.search(part, lines[0]), (part, lines[0])


@pytest.mark.parametrize(("name", "option"), [(PET, []), (PET, ["--dynamic"]), (MAPS, []), ("brainweb", [])])
def test_whole_data_set(shop, name, option):
    """Every file, its licence and citation and nothing else; the second run judges it all and asks for nothing."""
    source = shop.script.SOURCES[name]
    wanted = {i.path: shop.body(name, n) for n, i in enumerate(source.items) if option or not i.dynamic}
    result = fine(shop.run(name, *option))
    terms = {"LICENCE.txt": f"{source.licence}\n".encode(), "CITATION.txt": f"{source.citation}\n".encode()}
    assert shop.tree(name) == wanted | terms
    assert len(shop.requests) == len(wanted) and not any(asked for _, asked in shop.requests)
    assert source.licence in result.stdout and source.citation in result.stdout
    assert f"{len(wanted)} files fetched, 0 already there" in result.stdout
    for force in ([], ["--force"]):  # --force is for what is wrong
        assert f"0 files fetched, {len(wanted)} already there" in fine(shop.run(name, *option, *force)).stdout
    assert len(shop.requests) == len(wanted) and shop.tree(name) == wanted | terms


@pytest.mark.parametrize("which", [(PET, 1), ("brainweb", 1), (PET, 6)], ids=["pinned", "labels", "sidecar"])
@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b[:-9] + bytes(9)], ids=["shorter", "changed"])
def test_a_wrong_file_is_refused_and_force_replaces_it(shop, which, spoil):
    option = ["--dynamic"] if which[1] == 6 else []
    fine(shop.run(which[0], *option))
    spoilt = spoil(shop.body(*which))
    shop.path(*which).write_bytes(spoilt)
    shop.requests.clear()
    refused(shop.run(which[0], *option), re.escape(str(shop.path(*which))), "expected .*, found .*; .*--force")
    assert not shop.requests and shop.path(*which).read_bytes() == spoilt
    shop.play(error(403), which=which)
    refused(shop.run(which[0], *option, "--force"), "the answer 403")
    assert shop.path(*which).read_bytes() == spoilt  # until the new one is right
    fine(shop.run(which[0], *option, "--force"))
    assert len(shop.requests) == 2 and shop.path(*which).read_bytes() == shop.body(*which)


def test_list(tmp_path):
    assert "Not tried against the real hosts" in REAL.__doc__
    told = fine(command(REAL, "--list", "--dir", tmp_path)).stdout
    lines = [line for line in told.splitlines() if not line.startswith(" ")]
    assert {line.split(":")[0]: line.rsplit("; ")[-1] for line in lines} == {
        "brainweb": "20 files, sizes not published.",
        PET: "6 files, 46 MB.",
        MAPS: "10 files, 14 MB.",
        f"{PET} --dynamic": "12 files, 2,067 MB.",
    }
    assert not list(tmp_path.iterdir())
    for name, source in REAL.SOURCES.items():
        assert source.licence in told and "https://" in source.licence and "doi:10." in source.citation
        assert source.licence.startswith("CC0") or name == "brainweb"


@pytest.mark.parametrize(("option", "count"), [([], 6), (["--dynamic"], 12)])
def test_dry_run_asks_nothing_and_writes_nothing(tmp_path, option, count):
    """With the true addresses: the guard of the suite would see a connection."""
    told = fine(command(REAL, PET, *option, "--dry-run", "--dir", tmp_path)).stdout
    items = [item for item in REAL.SOURCES[PET].items if option or not item.dynamic]
    urls = [REAL.SOURCES[PET].base + a for i in items for a in (i.address, i.inherited) if a]
    assert re.findall("https://s3[^ ]*", told) == urls and f"{count} files to fetch" in told and count == len(items)
    assert all(f"to {tmp_path / PET / item.path}\n" in told for item in items) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [([], f"brainweb, {PET}, {MAPS}, .*--list"), (["brainwep"], "brainwep"), (["brainweb", "--dynamic"], PET)],
)
def test_arguments_that_will_not_do(shop, arguments, sentence):
    refused(shop.run(*arguments), "expected .*, found .*; ", sentence)
    assert not shop.requests and not shop.folder.exists()


def test_resume_in_a_later_run(shop):
    """And within one: every attempt brings half of what is left."""
    shop.play(drop, drop, drop)
    refused(shop.run(PET), re.escape(shop.address()), "3 failed attempts, the last: .*; .*same command again")
    kept = shop.path(end=".part").read_bytes()
    assert len(shop.body()) * 0.75 < len(kept) < len(shop.body()) and shop.body().startswith(kept)
    assert not shop.path().exists()
    fine(shop.run(PET))
    first, second, third, last = shop.asked()
    assert first is None and int(second[6:-1]) < int(third[6:-1]) < len(kept) and last == f"bytes={len(kept)}-"
    assert shop.path().read_bytes() == shop.body() and not shop.path(end=".part").exists()


@pytest.mark.parametrize(
    ("start", "trick", "ranges"),
    [
        (lambda body: body, honest, []),  # complete: only renamed
        (lambda body: body[:700], honest, ["bytes=700-"]),
        (lambda body: body[:700], error(503), ["bytes=700-", "bytes=700-"]),
        (lambda body: body[:700], reply(), ["bytes=700-"]),  # all of it again
        (lambda body: body[:700], error(416), ["bytes=700-", None]),
        (lambda body: body[:700], reply(206), ["bytes=700-", None]),
        (
            lambda body: body[:700],
            reply(206, lambda body: body[1:], Content_Range="bytes 1-9/10"),
            ["bytes=700-", None],
        ),
        (lambda body: bytes(99_999), honest, ["bytes=99999-", None]),
    ],
)
@pytest.mark.parametrize("name", [PET, "brainweb"])
def test_nothing_is_put_together_from_what_does_not_fit(shop, name, start, trick, ranges):
    shop.path(name, end=".part").write_bytes(start(shop.body(name)))
    shop.play(trick, which=(name, 0))
    fine(shop.run(name))
    assert shop.asked(name) == ranges
    assert shop.path(name).read_bytes() == shop.body(name) and not shop.path(name, end=".part").exists()


def test_only_a_wrong_end_deletes_what_an_earlier_run_got(shop):
    """A start and an end of two files fit in length, not in hash; and then the next run is whole."""
    shop.path(end=".part").write_bytes(wrong := bytes(700))
    shop.play(error(403))
    refused(shop.run(PET), "the answer 403")
    assert shop.path(end=".part").read_bytes() == wrong
    refused(shop.run(PET), "expected md5 [0-9a-f]{32}, found [0-9a-f]{32}; .*deleted")
    assert not shop.path(end=".part").exists() and not shop.path().exists()
    fine(shop.run(PET))


def instead(body, length=True):
    return reply(change=lambda _: body, length=length)


NO_GZIP = "expected a whole gzip file, found a broken one"
NO_TIMES = "expected JSON with FrameTimesStart and FrameDuration, seconds for every frame, found"
NOT_THE_FILE = {
    PET: [
        (error(404), r"expected sub-02_run-001_T1w.nii.gz of [\d,]+ bytes, found the answer 404 Not Found"),
        (error(403), "found the answer 403 Forbidden"),
        (error(200), "found an HTML page; .*login page.*browser"),
        (error(302, Location="/login"), "found an HTML page"),
        (error(200, kind="application/octet-stream"), "found 15 bytes announced"),
        (reply(change=lambda body: body + b"x"), r"expected .* of [\d,]+ bytes, found [\d,]+ bytes announced"),
        (reply(change=lambda body: body + bytes(10**6), length=False), r"expected [\d,]+ bytes, found \d\d,\d{3}; "),
        (reply(change=lambda body: body[:-9] + bytes(9)), "expected md5 [0-9a-f]{32}, found [0-9a-f]{32}; "),
    ],
    "brainweb": [
        (error(200), "expected subject04_crisp.raws.gz, found an HTML page"),
        (instead(b"<!DOCTYPE html><html>sorry</html>"), NO_GZIP),
        (instead(labels(0)[:-20], length=False), NO_GZIP),
        (instead(labels(0)[:60] + bytes(9) + labels(0)[69:]), NO_GZIP),
        (instead(gzip.compress(bytes(3430))), "expected 3,432 bytes after gunzip, found 3,430"),
        (instead(gzip.compress(bytes(10_000))), "expected 3,432 bytes after gunzip, found more"),
        (instead(b"\x1f\x8b" + bytes(10_000), length=False), NO_GZIP),
        (instead(labels(0, high=2)), r"expected classes 0 to 11 \(value >> 4\), found 2 voxels with others"),
        (instead(gzip.compress(bytes(np.full(LABEL_SHAPE, 3 << 4, ">u2")))), "expected classes 0 to 11"),
    ],
    "sidecar": [
        (error(410), "found the answer 410 Gone"),
        (instead(b"<!DOCTYPE html><html>sorry</html>"), f"{NO_TIMES}.*JSONDecodeError"),
        (instead(sidecar(1)[:-300], length=False), rf"{NO_TIMES}.*JSONDecodeError.*line \d+ column \d+"),
        (instead(sidecar(1).replace(b"Bq/ml", b"\xb5Ci")), f"{NO_TIMES}.*utf-8"),
        (instead(b'{"a":' + b"[" * 10**5), f"{NO_TIMES}.*(RecursionError|JSONDecodeError)"),
        (instead(b"[60, 60]"), f"{NO_TIMES}.*TypeError"),
        (instead(sidecar(1).replace(b"FrameDuration", b"Duration")), f"{NO_TIMES}.*KeyError: 'FrameDuration'"),
        (instead(sidecar(1, FrameDuration=60)), f"{NO_TIMES}.*'int' object is not iterable"),
        (instead(sidecar(1, FrameDuration=["60\n"] * 90)), f"{NO_TIMES}.*must be real number, not str"),
        (instead(sidecar(1, FrameTimesStart=[], FrameDuration=[])), f"{NO_TIMES} 0 and 0 numbers"),
        (instead(sidecar(1, FrameDuration=[60] * 89)), f"{NO_TIMES} 90 and 89 numbers"),
        (instead(sidecar(1, FrameDuration=[float("nan")] * 90)), f"{NO_TIMES} 90 and 0 numbers"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "trick", "sentence"), [(kind, *row) for kind, rows in NOT_THE_FILE.items() for row in rows]
)
def test_refused_at_once(shop, kind, trick, sentence):
    """One request, the file that it was for, nothing left; and without a sidecar no frames of 0.7 GB are fetched."""
    name, number = (PET, SIDE) if kind == "sidecar" else (kind, 0)
    shop.tricks["/login"] = [error(200)]
    shop.play(trick, which=(name, number))
    options = ["--dynamic"] if kind == "sidecar" else []
    refused(shop.run(name, *options), re.escape(shop.address(name, number)) + f": .*{sentence}")
    assert shop.asked(name, number) == [None] and shop.requests[number:][0][0] == shop.address(name, number)
    assert len(shop.tree(name)) == 2 + number  # the terms and what came before


@pytest.mark.parametrize(
    ("trick", "why"),
    [
        (error(500), "the answer 500 Internal Server Error"),
        (error(429), "the answer 429 Too Many Requests"),
        (reply(change=lambda body: body[:5000], length=False), r"a connection that ended after [\d,]+ bytes"),
        (stall, "ConnectionError"),
    ],
)
def test_another_attempt_helps_until_there_were_enough(shop, waits, trick, why):
    shop.script.TIMEOUT = (5, 0.2 if trick is stall else 5)
    shop.play(trick, trick)
    fine(shop.run(PET))
    assert len(shop.asked()) == 3 and waits == [1, 2] and shop.path().read_bytes() == shop.body()
    shop.path().unlink()
    shop.play(*[trick] * 3)
    refused(shop.run(PET), f"expected the whole file, found 3 failed attempts, the last: {why}; check the connection")


def test_nobody_listens(shop):
    with socket.create_server(("127.0.0.1", 0)) as server:
        shop.url = f"http://127.0.0.1:{server.getsockname()[1]}"
    refused(shop.run(PET), "3 failed attempts, the last: ConnectionError")


STRAY = labels(0, stray=1000, high=1)  # other bits, and a rare label outside the classes


@pytest.mark.parametrize(
    ("name", "trick"),
    [
        (PET, error(302, Location="/elsewhere")),
        (PET, reply(Content_Encoding="gzip")),  # a .gz labelled so stays packed
        ("brainweb", reply(Content_Encoding="gzip")),
        ("brainweb", reply(change=lambda body: STRAY)),
    ],
)
def test_unusual_but_let_through(shop, name, trick):
    shop.files["/elsewhere"] = shop.body(name)
    shop.play(trick, which=(name, 0))
    fine(shop.run(name))
    assert shop.path(name).read_bytes() in (shop.body(name), STRAY) and len(shop.asked(name)) == 1


def test_a_sidecar_at_the_top_gets_the_name_of_its_pet(shop):
    """BIDS inheritance: one for everybody, without the subject in its name; no start is taken from elsewhere."""
    shop.files = {path: body for path, body in shop.files.items() if not path.endswith("json")} | {TOP: sidecar(77)}
    shop.path(PET, SIDE, end=".part").write_bytes(sidecar(5)[:700])
    shop.tricks[TOP] = [error(503), drop]
    assert "trying the top" in fine(shop.run(PET, "--dynamic")).stdout
    assert [r for r in shop.requests if "json" in r[0]][:2] == [(shop.address(PET, SIDE), None), (TOP, None)]
    held = {path: body for path, body in shop.tree().items() if "json" in path}
    assert held == {SIDECAR.format(subject): sidecar(77) for subject in ("02", "05", "06")}


def test_a_sidecar_in_neither_place(shop):
    del shop.files[shop.address(PET, SIDE)]
    refused(shop.run(PET, "--dynamic"), f"{TOP}: expected .*, found the answer 404")
    assert [path for path, _ in shop.requests[SIDE:]] == [shop.address(PET, SIDE), TOP]
    shop.path(PET, SIDE).write_bytes(sidecar(5))  # one from elsewhere will do
    fine(shop.run(PET, "--dynamic"))
    assert shop.path(PET, SIDE).read_bytes() == sidecar(5)


def test_what_was_fetched_is_what_the_reader_needs(shop, tmp_path):
    """A made-up data set, with one sidecar beside its PET and one at the top: the means of its frames come out."""
    case = test_frames.Case(tmp_path / "origin", test_frames.poisson_frames())
    kinds = {"T1w.nii.gz": case.mr.read_bytes(), "acdyn_run-001_pet.nii.gz": case.pet.read_bytes()}
    paths = [item.path for item in REAL.SOURCES[PET].items]
    shop.stock(PET, lambda n: next((kinds[end] for end in kinds if paths[n].endswith(end)), nifti(n)))
    for path in [path for path in shop.files if path.endswith(".json")]:
        del shop.files[path]
    shop.files |= dict.fromkeys((shop.address(PET, SIDE), TOP), case.sidecar.read_bytes())
    fine(shop.run(PET, "--dynamic"))
    for subject in ("02", "05", "06"):
        names = [f"{n}.nii.gz".replace("sub-02", f"sub-{subject}") for n in (test_frames.PET_NAME, test_frames.MR_NAME)]
        scan = mf.short_frame_scan(*(shop.folder / PET / name for name in names), frames=range(4, 12), low=2)
        np.testing.assert_allclose(scan.spet, case.mean(*range(4, 12)), rtol=1e-6)
        np.testing.assert_allclose(scan.lpet, case.mean(7, 8), rtol=1e-6)
        assert (scan.unit, scan.dose_reduction) == ("Bq/ml", 4)


@pytest.mark.parametrize(("name", "needed"), [(PET, None), ("brainweb", 20 * 10_000_000)])
def test_no_disk_space(shop, monkeypatch, name, needed):
    """What an earlier run got counts; and if nothing is missing, no room is needed."""
    needed = needed or sum(i.size for i in shop.script.SOURCES[name].items if not i.dynamic)
    shop.path(name, end=".part").write_bytes(shop.body(name)[:500])
    usage = namedtuple("usage", "free")
    for free, outcome in ((needed - 501, refused), (needed - 500, fine), (0, fine)):
        monkeypatch.setattr(shop.script.shutil, "disk_usage", lambda path, free=free: usage(free))
        outcome(shop.run(name), *(["free disk space, found .*--dir"] if outcome is refused else []))
        assert bool(shop.requests) == (outcome is fine)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_disk_fills_up_on_the_way(shop):
    shop.path(end=".part").symlink_to("/dev/full")
    refused(shop.run(PET), "No space left on device", "make room")
    assert len(shop.requests) == 1 and not shop.path().exists()


@pytest.mark.parametrize("function", ["pathlib.Path.mkdir", "pathlib.Path.write_text", "tempfile.NamedTemporaryFile"])
def test_a_folder_that_cannot_be_written(shop, monkeypatch, function):
    """Faked, because root writes everywhere; pooch itself uses the last."""

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(shop.folder / "x"))

    monkeypatch.setattr(function, forbidden)
    refused(shop.run(PET), re.escape(f"{shop.folder}/x: cannot be read or written (Permission denied); "), "--dir")
    assert not shop.requests


def test_ctrl_c_keeps_the_part_and_the_next_call_resumes(shop, monkeypatch):
    class Bar(shop.script.tqdm):
        def update(self, n=1):
            self.n += n
            if self.n > 2000:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shop.script, "tqdm", Bar)
        refused(shop.run(PET), "interrupted", "same command", status=130)
    size = shop.path(end=".part").stat().st_size
    assert 2000 < size < len(shop.body()) and not shop.path().exists()
    assert set(shop.tree()) == {"LICENCE.txt", "CITATION.txt", f"{shop.script.SOURCES[PET].items[0].path}.part"}
    fine(shop.run(PET))
    assert shop.asked() == [None, f"bytes={size}-"] and shop.path().read_bytes() == shop.body()


def test_openneuro_tables():
    pet, maps = (REAL.SOURCES[name].items for name in (PET, MAPS))
    assert all(item.address == item.path for item in pet + maps) and len({i.path for i in pet + maps}) == 22
    hashes = {item.hash for item in pet + maps if item.size}
    assert len(hashes) == len(REAL.PINNED.strip().splitlines()) == 19
    assert all(re.fullmatch("md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", h) for h in hashes)
    sidecars = [SIDECAR.format(subject) for subject in ("02", "05", "06")]
    assert [i.path for i in pet if i.dynamic] == [p for s in sidecars for p in (s, s.replace(".json", ".nii.gz"))]
    assert {i.path: REAL.SOURCES[PET].base + i.inherited for i in pet if i.inherited} == dict.fromkeys(
        sidecars, f"https://s3.amazonaws.com{TOP}"
    )


def test_brainweb_table():
    source = REAL.SOURCES["brainweb"]
    asked = [parse_qs(urlsplit(source.base + item.address).query) for item in source.items]
    names = [f"subject{s}_crisp" for s in ("04", "05", "06", "18", "20", "38", *range(41, 55))]
    assert [q["do_download_alias"] for q in asked] == [[name] for name in names]
    assert [item.path for item in source.items] == [f"{name}.raws.gz" for name in names]
    form = {"format_value": ["raw_short"], "zip_value": ["gnuzip"], "download_for_real": ["[Start download!]"]}
    assert all(form.items() <= query.items() for query in asked)
    assert REAL.BRAINWEB_BYTES == 113_746_192 == 362 * 434 * 362 * 2


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="not a git checkout")
def test_default_folder_is_ignored_by_git():
    assert REAL.DOWNLOADS == ROOT / "data" / "downloads"
    subprocess.run(["git", "check-ignore", "-q", REAL.DOWNLOADS / PET / "x.nii.gz"], cwd=ROOT, check=True)


def test_the_guard_of_the_suite_sees_this_script(tmp_path):
    """Without --base-url the script would leave the machine; the guard stops it, so no other test here does."""
    assert isinstance(command(REAL, PET, "--dir", tmp_path).exception, no_network.NetworkRefused)
    assert len(no_network.attempts) == 1 and "s3.amazonaws.com" in no_network.attempts[0]
    no_network.attempts.clear()  # this one was wanted
