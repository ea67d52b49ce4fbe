"""Download public data for mfdiff_lite: BrainWeb's twenty heads, and in-vivo FDG PET with MR from OpenNeuro.

    python data/download.py --list
    python data/download.py openneuro-ds003382               # 3 subjects, static PET and T1w, 46 MB
    python data/download.py openneuro-ds003382 --dynamic     # and their 60 s frames and sidecars, 2.0 GB more
    python data/download.py brainweb --dry-run

**Not tried against the real hosts**: it was written without internet and tested against a local server that serves
files of the true formats and misbehaves. Addresses and form fields come from public code, sizes and hashes of
OpenNeuro's images from its manifests. BrainWeb publishes no checksums: its files are judged by what they unpack to.
The sidecars of the dynamic PET (JSON) are unknown beforehand too: they must give start and duration of every frame.

An interrupted file stays beside its place as `.part`; the same command goes on from there by HTTP range. It gets its
name only after all checks, which every later run repeats. `pooch` does the transfer and the hashes; its `fetch` is not
used because it cannot resume and overwrites a local file that differs without asking.

Labels of BrainWeb: (Z, Y, X) = (362, 434, 362) little-endian uint16, 0.5 mm; class = value >> 4, 0 to 11 (background,
CSF, grey, white, fat, muscle, skin, skull, vessels, around fat, dura, marrow); "occasionally other bits" are set.
"""

import gzip
import json
import re
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pooch
import typer
from tqdm import tqdm

DOWNLOADS = Path(__file__).resolve().parent / "downloads"
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of the body
BACKOFF = (1, 2, 4, 8)  # seconds before each further attempt
CHUNK = 2**16
SIDECAR_BYTES = 1_000_000  # at most; public copies have 6 kB
UNKNOWN_SIZE = 10_000_000  # what the disk-space check sets aside for a file whose size its source does not publish

BRAINWEB_URL = (  # raw_short is the 16-bit file; raw_byte would be half as large
    "https://brainweb.bic.mni.mcgill.ca/cgi/brainweb1?do_download_alias=subject{}_crisp&format_value=raw_short"
    "&zip_value=gnuzip&who_name=&who_institution=&who_email=&download_for_real=%5BStart+download%21%5D"
)
BRAINWEB_SUBJECTS = ("04", "05", "06", "18", "20", "38", *map(str, range(41, 55)))
BRAINWEB_BYTES = 362 * 434 * 362 * 2
BRAINWEB_CLASSES = 12
STRAY_LABELS = 0.001  # share of voxels that may lie outside the classes: other bits are rare, a wrong format is not


class Refused(Exception):
    """What came, or what is there, cannot be used; the text is the sentence for the user."""


class Absent(Refused):
    """The server has no such file."""


class Again(OSError):
    """The transfer failed in a way that another attempt may mend, like any other OSError of it."""


@dataclass(frozen=True)
class Item:
    """A file: where it goes below the data set's folder, where it comes from, and what is known of it beforehand."""

    path: str
    url: str
    size: int | None = None  # bytes
    digest: str | None = None  # md5 or sha256
    unpacked: int | None = None  # bytes of uint16 labels after gunzip
    dynamic: bool = False  # fetched only when asked for
    inherited: str | None = None  # of a PET's sidecar: the address that holds it if `url` has none (BIDS inheritance)


@dataclass(frozen=True)
class Source:
    """A data set."""

    what: str
    licence: str
    citation: str
    items: tuple[Item, ...]


PATHS = {  # kind of file -> path below the data set's address, subject for {0}
    "t1": "sub-{0}/anat/sub-{0}_run-001_T1w.nii.gz",
    "static": "sub-{0}/pet/sub-{0}_task-checkerboard_trc-18FFDG_rec-acstat_run-001_pet.nii.gz",
    "dynamic": "sub-{0}/pet/sub-{0}_task-checkerboard_trc-18FFDG_rec-acdyn_run-001_pet.nii.gz",
    "brain-t1": "derivatives/energetic-costs/sub-{0}/ses-open/anat/sub-{0}_ses-open_desc-bet_T1w.nii.gz",
    "cmrglc": "derivatives/energetic-costs/sub-{0}/ses-open/pet/"
    "sub-{0}_ses-open_task-rest_space-MNI152NLin6ASym_res-3mm_desc-CMRglc_pet.nii.gz",
}
# Data set, kind, subject, bytes, md5 or sha256: exactly the images that this script fetches.
PINNED = """
ds003382 t1 02 12533080 b8f673e9b79700db6952bfcaf7e012b6
ds003382 t1 05 12250504 763113c27a24e25d58ccc375b0c102f1
ds003382 t1 06 11656924 f36bd5a37fa62a74bbd3d14aaea4a7de
ds003382 static 02 3083381 74fc4e3a84b88bfee7cfb1e47400e17c
ds003382 static 05 3050665 b558bb9880c30840da1acbc6a11cccc9
ds003382 static 06 2948632 3ee995adf7bc34b7d59c128570413466
ds003382 dynamic 02 665909299 5c50e6dd80f59cd7f2713508d1925966
ds003382 dynamic 05 679730613 9eccd7a4aa2c04152e0591c6dbef138a
ds003382 dynamic 06 675805362 f42c0ca6aa89d4185e2d96a71699d428
ds004513 brain-t1 s029 2156172 59d0e33107d9efccf6b8411c53dddc89bb449878d8fa1f349ecae60af3372ce0
ds004513 brain-t1 s030 2427164 64b5fa9e9aedcd1c71d161e0b6f37a10d381f200a6f45c12a0cb2a841ce3ebf1
ds004513 brain-t1 s031 2417897 467c2203a48fe2eabe9f38f36492479389078e5928ecabe0007831797cfbda8b
ds004513 brain-t1 s032 2419095 b357bba3281f6b7237dbe8eade40f84da70920e5eed29f342e94be48457331c0
ds004513 brain-t1 s033 2450066 85ab866aa8c4fb030b111be04e4cbf763b080c396bf6dac27913a0ed4a1e7417
ds004513 cmrglc s029 391526 17a37c0932cd98f6915221f339ca6a45b10077bf6c299b951600ce39e78dad54
ds004513 cmrglc s030 390404 1afd891c51196da03126403de8c827571cac8370677a429f77451e6dad0182ee
ds004513 cmrglc s031 377902 368e1477a2db3e27bed048cd0a4a736ac48425f04a77e4da70655145eb9717ab
ds004513 cmrglc s032 397862 1ffcfc4327b87ebc341fc398cce257fda89df771a304bd0698a48f9206475a69
ds004513 cmrglc s033 392944 8bef1114578d8eb1efdaf56f0871a1ab3de9d513aa966778aa291d41ee2358d9
"""


def pinned(dataset: str) -> tuple[Item, ...]:
    """The items of one OpenNeuro data set, by accession number."""
    items = []
    for owner, kind, subject, size, digest in map(str.split, PINNED.strip().splitlines()):
        if owner == dataset:
            path = PATHS[kind].format(subject)
            top = f"https://s3.amazonaws.com/openneuro.org/{dataset}/"
            if kind == "dynamic":  # the sidecar first: without it 0.7 GB are of no use
                sidecar = path.removesuffix(".nii.gz") + ".json"
                shared = top + Path(sidecar).name.removeprefix(f"sub-{subject}_")
                items.append(Item(sidecar, top + sidecar, dynamic=True, inherited=shared))
            items.append(Item(path, top + path, int(size), digest, dynamic=kind == "dynamic"))
    return tuple(items)


SOURCES = {
    "brainweb": Source(
        "20 normal heads, 12 classes, 0.5 mm",
        "Free for research with citation; the terms in force are at https://brainweb.bic.mni.mcgill.ca/about.html",
        "Aubert-Broche B, Griffin M, Pike GB, Evans AC, Collins DL. IEEE Trans Med Imaging 25:1410-1416 (2006), "
        "doi:10.1109/TMI.2006.883453",
        tuple(
            Item(f"subject{s}_crisp.raws.gz", BRAINWEB_URL.format(s), unpacked=BRAINWEB_BYTES)
            for s in BRAINWEB_SUBJECTS
        ),
    ),
    "openneuro-ds003382": Source(
        "in-vivo FDG PET (static; with --dynamic 60 s frames and their sidecars too) and T1w of 3 people",
        "CC0 1.0, see https://openneuro.org/datasets/ds003382",
        "OpenNeuro ds003382; Jamadar SD et al. Scientific Data 8 (2021), doi:10.1038/s41597-021-01042-2",
        pinned("ds003382"),
    ),
    "openneuro-ds004513": Source(
        "in-vivo glucose metabolism (CMRglc, MNI space, 3 mm) and brain T1 (native space) of 5 people",
        "CC0 1.0, see https://openneuro.org/datasets/ds004513",
        "OpenNeuro ds004513; Castrillon G et al. Science Advances 9 (2023), doi:10.1126/sciadv.adi7632",
        pinned("ds004513"),
    ),
}


# ---- checks --------------------------------------------------------------------------------------------------------


def label_fault(path: Path, expected: int) -> str | None:
    """What is wrong with gzipped BrainWeb labels that should unpack to `expected` bytes, or None."""
    count = stray = 0
    try:
        with gzip.open(path) as stream:
            while count <= expected and (chunk := stream.read(CHUNK)):
                count += len(chunk)
                labels = np.frombuffer(chunk[: len(chunk) // 2 * 2], "<u2") >> 4
                stray += np.count_nonzero(labels >= BRAINWEB_CLASSES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return f"expected a whole gzip file, found a broken one ({str(error).rstrip('.')})"
    if count != expected:
        return f"expected {expected:,} bytes after gunzip, found {'more' if count > expected else f'{count:,}'}"
    if stray > STRAY_LABELS * expected / 2:
        return f"expected classes 0 to {BRAINWEB_CLASSES - 1} (value >> 4), found {stray:,} voxels with others"
    return None


def sidecar_fault(path: Path) -> str | None:
    """What is wrong with the sidecar of a dynamic PET, or None."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"expected whole JSON, found something else ({error})"
    if not isinstance(content, dict):
        return f"expected a JSON object, found {repr(content)[:40]}"
    counts = []
    for key in ("FrameTimesStart", "FrameDuration"):
        value = content.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(v, (int, float)) for v in value):
            found = repr(value)[:40] if key in content else "no such entry"
            return f"expected {key} with a number of seconds for every frame, found {found}"
        counts.append(len(value))
    if counts[0] != counts[1]:
        return f"expected FrameTimesStart and FrameDuration of one length, found {counts[0]} and {counts[1]} numbers"
    return None


def fault(item: Item, path: Path) -> str | None:
    """What is wrong with the file at `path`, as "expected ..., found ...", or None: size, then hash, then content."""
    size = path.stat().st_size
    if item.size and size != item.size:
        return f"expected {item.size:,} bytes, found {size:,}"
    if item.digest:
        algorithm = "md5" if len(item.digest) == 32 else "sha256"
        if (found := pooch.file_hash(str(path), alg=algorithm)) != item.digest:
            return f"expected {algorithm} {item.digest}, found {found}"
    if item.inherited:
        return sidecar_fault(path)
    return label_fault(path, item.unpacked) if item.unpacked else None


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def missing(items: list[Item], folder: Path, force: bool) -> list[Item]:
    """The items that `folder` does not hold; a file that is there but wrong is missing only with `force`."""
    found = []
    for item in items:
        path = folder / item.path
        if path.exists():
            if not (wrong := fault(item, path)):
                continue
            if not force:
                raise Refused(f"{path}: {wrong}; move it away, or add --force to replace it by a fresh download.")
        found.append(item)
    return found


def check_space(items: list[Item], folder: Path) -> None:
    """Refuse if the disk of `folder` has less room than what is still to come of `items`."""
    parts = [part_of(folder / item.path) for item in items]
    there = [part.stat().st_size if part.exists() else 0 for part in parts]
    needed = sum(max((i.size or UNKNOWN_SIZE) - n, 0) for i, n in zip(items, there, strict=True))
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free < needed:
        raise Refused(
            f"{folder}: expected {needed / 1e6:,.1f} MB of free disk space, found {free / 1e6:,.1f} MB; make room, or "
            "choose another disk with --dir."
        )


# ---- transfer ------------------------------------------------------------------------------------------------------


class Incoming:
    """The end of a .part file as pooch's downloader sees it; judges the answer before its body arrives."""

    def __init__(self, item: Item, stream, bar: tqdm, url: str):
        self.item, self.stream, self.bar, self.url = item, stream, bar, url
        self.have, self.total = stream.tell(), item.size  # bytes so far and in the end, None if unknown
        self.kind, self.start = ("a file with a JSON object", b"{") if item.inherited else ("a gzip file", b"\x1f")

    def refuse(self, expected: str, found: str, error: type[Refused] = Refused):
        raise error(
            f"{self.url}: expected {expected}, found {found}; the source may have changed, or a login page or proxy "
            "stands in between: look at this address in a browser."
        )

    def restart(self) -> None:
        self.stream.seek(0)
        self.stream.truncate()
        self.have = 0

    def look(self, response, **_) -> None:
        """A response hook of requests: raise Refused or Again unless the body begins the file or continues it."""
        status, headers = response.status_code, response.headers
        if response.is_redirect:
            return
        if status == 416 and self.have:
            self.restart()
            raise Again("the server has nothing after the bytes of an earlier download")
        if status in (408, 429) or status >= 500:
            raise Again(f"the server answered {status} {response.reason}")
        if status not in (200, 206):
            wanted = f"the sidecar {self.item.path}" if self.item.inherited else "the file"
            self.refuse(wanted, f"the answer {status} {response.reason}", Absent if status == 404 else Refused)
        if "html" in headers.get("Content-Type", "").lower():
            self.refuse(self.kind, "an HTML page")
        start, total = 0, headers.get("Content-Length", "")
        if status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            start, total = (int(span[1]), span[2]) if span else (-1, "")
        if start != self.have:
            self.restart()  # status 200: the server sends all of it again
            if status == 206:
                raise Again("the server sent another range than asked for")
        self.total = int(total) if total.isdecimal() else self.item.size
        if self.item.size and self.total != self.item.size:
            self.refuse(f"{self.item.size:,} bytes", f"{self.total:,} announced")
        self.bar.total, self.bar.n = self.total, self.have
        response.raw.headers.pop("Content-Encoding", None)  # else a .gz labelled so would be unpacked on the way

    def write(self, chunk: bytes) -> None:
        if not self.have and not chunk.lstrip().startswith(self.start):
            self.refuse(self.kind, f"one that starts with {chunk[:15]!r}")
        self.have += len(chunk)
        limit = self.item.size or self.item.unpacked or SIDECAR_BYTES
        if self.have > limit:
            self.restart()
            self.refuse(f"at most {limit:,} bytes", "more")
        try:
            self.bar.update(len(chunk))
            while chunk:  # the file has no buffer, so that a full disk is noticed here and not on closing
                chunk = chunk[self.stream.write(chunk) :]
        except OSError as error:  # the disk's, not the network's: no use in trying again
            raise Refused(f"{self.stream.name}: cannot be written ({error.strerror}); make room, run again.") from None

    def flush(self) -> None:
        """pooch calls it after every write; there is no buffer."""


def receive(item: Item, stream, url: str, bar: tqdm) -> None:
    """One attempt to complete the .part behind `stream`; raise an OSError if it ends early."""
    incoming = Incoming(item, stream, bar, url)
    if incoming.have and not fault(item, Path(stream.name)):
        return  # an earlier run stopped just before the renaming
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={incoming.have}-"} if incoming.have else {})
    hooks = {"response": incoming.look}
    pooch.HTTPDownloader(chunk_size=CHUNK, headers=headers, hooks=hooks, timeout=TIMEOUT)(url, incoming, None)
    if not incoming.have or incoming.have < (incoming.total or 0):
        raise Again(f"the connection ended after {incoming.have:,} bytes")


def attempts(item: Item, part: Path, url: str) -> None:
    """Try with back-off until all has arrived in `part`."""
    with part.open("ab", buffering=0) as stream, tqdm(desc=part.stem, unit="B", unit_scale=True, disable=None) as bar:
        for wait in (*BACKOFF, None):
            try:
                return receive(item, stream, url, bar)
            except OSError as error:
                why = str(error) if isinstance(error, Again) else type(error).__name__
            if wait is not None:
                typer.echo(f"{part.stem}: {why}; trying again in {wait} s.")
                time.sleep(wait)
    raise Refused(
        f"{url}: expected the whole file, found {len(BACKOFF) + 1} failed attempts, the last: {why}; check the "
        "connection and run the same command again, which goes on from what has arrived."
    )


def fetch(item: Item, path: Path, base_url: str | None) -> None:
    """Download one item to `path`: a .part, checks, renaming."""

    def at(url: str) -> str:
        return re.sub(r"^https://[^/]+", base_url.rstrip("/"), url) if base_url else url

    url = at(item.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        try:
            attempts(item, part, url)
        except Absent:
            if not item.inherited:
                raise
            part.unlink()
            typer.echo(f"{url}: no sidecar beside the PET; trying the top of the data set.")
            url = at(item.inherited)
            part = part_of(path.with_name(Path(url).name))  # of its own: nothing is put together from two files
            attempts(item, part, url)
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()
    if wrong := fault(item, part):
        part.unlink()
        raise Refused(
            f"{url}: {wrong}; what arrived was deleted: run the command again, and if that ends alike do not use the "
            "file, for the source has changed."
        )
    part.replace(path)


# ---- the command ---------------------------------------------------------------------------------------------------


def describe(name: str, dynamic: bool) -> str:
    source = SOURCES[name]
    sizes = [item.size for item in source.items if dynamic or not item.dynamic]
    known = [size for size in sizes if size]  # not those of the sidecars, a few kB
    volume = f"{sum(known) / 1e6:,.0f} MB" if known else "sizes not published"
    option = " --dynamic" if dynamic else ""
    return f"{name}{option}: {source.what}; {len(sizes)} files, {volume}.\n  Licence: {source.licence}"


def download(name: str, folder: Path, dynamic: bool, dry_run: bool, force: bool, base_url: str | None) -> None:
    """Bring one data set into `folder`, or say what would be done."""
    source = SOURCES[name]
    items = [item for item in source.items if dynamic or not item.dynamic]
    typer.echo(f"{describe(name, dynamic)}\n  Please cite: {source.citation}")
    wanted = missing(items, folder, force)
    check_space(wanted, folder)
    if dry_run:
        for item in wanted:
            other = f"\n         or {item.inherited}" if item.inherited else ""
            typer.echo(f"would fetch {item.url}{other}\n         to {folder / item.path}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "LICENCE.txt").write_text(source.licence + "\n", encoding="utf-8")
        (folder / "CITATION.txt").write_text(source.citation + "\n", encoding="utf-8")
        for item in wanted:
            fetch(item, folder / item.path, base_url)
    verb = "to fetch" if dry_run else "fetched"
    typer.echo(f"{folder}: {len(wanted)} files {verb}, {len(items) - len(wanted)} already there and right.")


def main(
    dataset: Annotated[str | None, typer.Argument(help=f"One of: {', '.join(SOURCES)}.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Say what there is; fetch nothing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be fetched; write nothing.")] = False,
    directory: Annotated[
        Path, typer.Option("--dir", envvar="MFDIFF_DATA", help="Each data set gets a folder of its own in it.")
    ] = DOWNLOADS,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="openneuro-ds003382: 60 s frames and sidecars too, 2.0 GB.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace local files that are not as expected.")] = False,
    base_url: Annotated[str | None, typer.Option(hidden=True, help="Stands for every host, for the tests.")] = None,
) -> None:
    """Download a public data set with its licence and citation; run again to resume. Tried on a local server only."""
    folder = directory.resolve() / (dataset or "")
    try:
        if list_:
            typer.echo("\n".join([*(describe(name, False) for name in SOURCES), describe("openneuro-ds003382", True)]))
        elif dataset not in SOURCES:
            raise Refused(f"expected one of {', '.join(SOURCES)}, found {dataset or 'no name'}; see --list and --help.")
        elif dynamic and not any(item.dynamic for item in SOURCES[dataset].items):
            raise Refused(f"--dynamic: expected openneuro-ds003382, found {dataset}, without frames; leave it out.")
        else:
            download(dataset, folder, dynamic, dry_run, force, base_url)
        return
    except Refused as error:
        status, sentence = 2, str(error)
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        status, sentence = 2, f"{where}: cannot be read or written ({why}); choose another folder with --dir."
    except KeyboardInterrupt:
        status = 130
        sentence = f"interrupted; {folder} keeps what has arrived, and the same command goes on from there."
    typer.echo(f"download: {sentence}", err=True)
    raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
