"""Download public data for mfdiff_lite: BrainWeb's twenty heads, and in-vivo FDG PET with MR from OpenNeuro.

    python data/download.py --list
    python data/download.py openneuro-ds003382               # 3 subjects, static PET and T1w, 46 MB
    python data/download.py openneuro-ds003382 --dynamic     # and their 60 s frames and sidecars, 2.0 GB more
    python data/download.py brainweb --dry-run

**Not tried against the real hosts**: it was written without internet and tested against a local server that misbehaves.
Addresses and form fields come from public code, sizes and hashes of OpenNeuro's images from its manifests. BrainWeb's
files and the sidecars of the dynamic PET (JSON) have no known checksums and are judged by what is in them.

`pooch` holds the registry, tries again and moves files into place; here is what it lacks. An interrupted file stays as
`.part`, and the same command goes on from there. Size and content are checked too, on arrival and on every later run.
A local file that differs is not replaced unasked.
"""

import gzip
import json
import math
import re
import shutil
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
import requests
import typer
from tqdm import tqdm

DOWNLOADS = Path(__file__).resolve().parent / "downloads"
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of the body
RETRIES = 4  # pooch waits 1, 2, 3, 4 s before them
CHUNK = 2**16
UNKNOWN_SIZE = 10_000_000  # what the disk-space check sets aside for a file whose size its source does not publish

BRAINWEB_FORM = (  # raw_short is the 16-bit file; raw_byte would be half as large
    "?do_download_alias=subject{}_crisp&format_value=raw_short&zip_value=gnuzip&who_name=&who_institution=&who_email="
    "&download_for_real=%5BStart+download%21%5D"
)
BRAINWEB_SUBJECTS = ("04", "05", "06", "18", "20", "38", *map(str, range(41, 55)))
BRAINWEB_BYTES = 362 * 434 * 362 * 2  # uint16 labels after gunzip
BRAINWEB_CLASSES = 12
STRAY_LABELS = 0.001  # share of voxels that may lie outside the classes: other bits are rare, a wrong format is not


class Refused(Exception):
    """What came, or what is there, cannot be used; the text is the sentence for the user."""


class Absent(Refused):
    """The server has no such file."""


class Again(requests.RequestException):
    """The transfer failed, and another attempt may help: pooch makes one after any error of this family."""


class Item(NamedTuple):
    """A file: where it goes below the data set's folder, where it comes from, and what is known of it beforehand."""

    path: str
    address: str  # after the data set's base
    size: int | None = None  # bytes
    hash: str | None = None  # algorithm:digest, as pooch writes it
    dynamic: bool = False  # fetched only when asked for
    inherited: str | None = None  # a sidecar's second address, asked if the first has none (BIDS inheritance)


class Source(NamedTuple):
    """A data set."""

    what: str
    licence: str
    citation: str
    base: str
    items: list[Item]


PATHS = {  # kind of file -> path below the data set's address, subject for {0}
    "t1": "sub-{0}/anat/sub-{0}_run-001_T1w.nii.gz",
    "static": "sub-{0}/pet/sub-{0}_task-checkerboard_trc-18FFDG_rec-acstat_run-001_pet.nii.gz",
    "dynamic": "sub-{0}/pet/sub-{0}_task-checkerboard_trc-18FFDG_rec-acdyn_run-001_pet.nii.gz",
    "brain-t1": "derivatives/energetic-costs/sub-{0}/ses-open/anat/sub-{0}_ses-open_desc-bet_T1w.nii.gz",
    "cmrglc": "derivatives/energetic-costs/sub-{0}/ses-open/pet/"
    "sub-{0}_ses-open_task-rest_space-MNI152NLin6ASym_res-3mm_desc-CMRglc_pet.nii.gz",
}
# Data set, kind, subject, bytes, md5 or sha256 of the images.
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


def pinned(dataset: str) -> list[Item]:
    """The items of one OpenNeuro data set, by accession number."""
    items = []
    for owner, kind, subject, size, digest in map(str.split, PINNED.strip().splitlines()):
        if owner == dataset:
            path, dynamic = PATHS[kind].format(subject), kind == "dynamic"
            if dynamic:  # the sidecar first: without it 0.7 GB are of no use
                sidecar = path.removesuffix(".nii.gz") + ".json"
                shared = Path(sidecar).name.removeprefix(f"sub-{subject}_")
                items.append(Item(sidecar, sidecar, dynamic=True, inherited=shared))
            items.append(Item(path, path, int(size), f"{'md5' if len(digest) == 32 else 'sha256'}:{digest}", dynamic))
    return items


SOURCES = {
    "brainweb": Source(
        "20 normal heads, 12 classes, 0.5 mm",
        "Free for research with citation; the terms in force are at https://brainweb.bic.mni.mcgill.ca/about.html",
        "Aubert-Broche B, Griffin M, Pike GB, Evans AC, Collins DL. IEEE Trans Med Imaging 25:1410-1416 (2006), "
        "doi:10.1109/TMI.2006.883453",
        "https://brainweb.bic.mni.mcgill.ca/cgi/brainweb1",
        [Item(f"subject{s}_crisp.raws.gz", BRAINWEB_FORM.format(s)) for s in BRAINWEB_SUBJECTS],
    ),
    "openneuro-ds003382": Source(
        "in-vivo FDG PET (static; with --dynamic 60 s frames and their sidecars too) and T1w of 3 people",
        "CC0 1.0, see https://openneuro.org/datasets/ds003382",
        "OpenNeuro ds003382; Jamadar SD et al. Scientific Data 8 (2021), doi:10.1038/s41597-021-01042-2",
        "https://s3.amazonaws.com/openneuro.org/ds003382/",
        pinned("ds003382"),
    ),
    "openneuro-ds004513": Source(
        "in-vivo glucose metabolism (CMRglc, MNI space, 3 mm) and brain T1 (native space) of 5 people",
        "CC0 1.0, see https://openneuro.org/datasets/ds004513",
        "OpenNeuro ds004513; Castrillon G et al. Science Advances 9 (2023), doi:10.1126/sciadv.adi7632",
        "https://s3.amazonaws.com/openneuro.org/ds004513/",
        pinned("ds004513"),
    ),
}


def label_fault(path: Path) -> str | None:
    """What is wrong with gzipped BrainWeb labels (little-endian uint16, class = value >> 4), or None."""
    try:
        with gzip.open(path) as stream:
            content = stream.read(BRAINWEB_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return f"expected a whole gzip file, found a broken one ({str(error).rstrip('.')})"
    if (count := len(content)) != BRAINWEB_BYTES:
        found = "more" if count > BRAINWEB_BYTES else f"{count:,}"
        return f"expected {BRAINWEB_BYTES:,} bytes after gunzip, found {found}"
    stray = np.count_nonzero(np.frombuffer(content, "<u2") >= BRAINWEB_CLASSES << 4)
    if stray > STRAY_LABELS * BRAINWEB_BYTES / 2:
        return f"expected classes 0 to {BRAINWEB_CLASSES - 1} (value >> 4), found {stray:,} voxels with others"
    return None


def sidecar_fault(path: Path) -> str | None:
    """What is wrong with the sidecar of a dynamic PET, or None."""
    expected = "expected JSON with FrameTimesStart and FrameDuration, seconds for every frame"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        starts, durations = (sum(map(math.isfinite, content[k])) for k in ("FrameTimesStart", "FrameDuration"))
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        return f"{expected}, found something else ({type(error).__name__}: {error})"
    return None if starts == durations > 0 else f"{expected}, found {starts} and {durations} numbers"


def fault(item: Item, path: Path) -> str | None:
    """What is wrong with the file at `path`, as "expected ..., found ...", or None: size, then hash, then content."""
    if not item.hash:
        return sidecar_fault(path) if item.inherited else label_fault(path)
    if (size := path.stat().st_size) != item.size:
        return f"expected {item.size:,} bytes, found {size:,}"
    algorithm, digest = item.hash.split(":")
    found = pooch.file_hash(str(path), alg=algorithm)
    return f"expected {algorithm} {digest}, found {found}" if found != digest else None


def size_of(path: Path) -> int:
    """Bytes that are there, 0 without a file."""
    return path.stat().st_size if path.exists() else 0


def missing(items: list[Item], folder: Path, force: bool) -> list[Item]:
    """The items to fetch: a file that is there but wrong only with `force`, and only if the disk has room for all."""
    wanted = []
    for item in items:
        path = folder / item.path
        if path.exists() and not (wrong := fault(item, path)):
            continue
        if path.exists() and not force:
            raise Refused(f"{path}: {wrong}; move it away, or add --force to replace it by a fresh download.")
        wanted.append(item)
    needed = sum(max((i.size or UNKNOWN_SIZE) - size_of(folder / f"{i.path}.part"), 0) for i in wanted)
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free < needed:
        need, have = f"{needed / 1e6:,.1f} MB of free disk space", f"{free / 1e6:,.1f} MB"
        raise Refused(f"{folder}: expected {need}, found {have}; make room, or choose another disk with --dir.")
    return wanted


def judge(answer: requests.Response, item: Item, url: str, part: Path) -> int:
    """At which byte of the file this answer begins, 0 or the end of `part`; raise if it is not that or not the file."""
    status, headers, have = answer.status_code, answer.headers, size_of(part)
    if status == 416 or (status == 206 and not headers.get("Content-Range", "").startswith(f"bytes {have}-")):
        part.unlink(missing_ok=True)
        raise Again("not the range that was asked for")
    if status in (408, 429) or status >= 500:
        raise Again(f"the answer {status} {answer.reason}")
    start = have if status == 206 else 0
    announced = start + int(headers.get("Content-Length", 0))
    if status not in (200, 206):
        found = f"the answer {status} {answer.reason}"
    elif "html" in headers.get("Content-Type", "").lower():
        found = "an HTML page"
    elif item.size and announced not in (start, item.size):
        found = f"{announced:,} bytes announced"
    else:
        return start
    raise (Absent if status == 404 else Refused)(
        f"{url}: expected {Path(item.path).name}{f' of {item.size:,} bytes' if item.size else ''}, found {found}; the "
        "source may have changed, or a login page or proxy stands in between: look at this address in a browser."
    )


def receive(item: Item, url: str, part: Path) -> None:
    """Make one attempt to complete `part`; raise an error of requests if another one may help."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if (have := size_of(part)) else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        start = judge(answer, item, url, part)
        total = item.size or start + int(answer.headers.get("Content-Length", 0))
        answer.raw.headers.pop("Content-Encoding", None)  # else a .gz labelled so would be unpacked on the way
        bar = tqdm(desc=part.stem, total=total or None, initial=start, unit="B", unit_scale=True, disable=None)
        with bar, part.open("ab" if start else "wb") as stream:
            for chunk in answer.iter_content(CHUNK):
                bar.update(stream.write(chunk))
                if stream.tell() > (total or BRAINWEB_BYTES):
                    break  # no file is longer; what it is instead must not fill the disk
    if size_of(part) < total:
        raise Again(f"a connection that ended after {size_of(part):,} bytes")


def resume(item: Item, url: str, output_file: str, registry: pooch.Pooch) -> None:
    """A downloader for pooch that goes on from a .part; what it puts at `output_file` is whole and right."""
    part = registry.abspath / f"{item.path}.part"
    if item.inherited:
        part.unlink(missing_ok=True)  # a few kB, and nothing may be put together from two addresses
    if not part.exists() or fault(item, part):  # else an earlier run stopped just before the renaming
        try:
            receive(item, url, part)
        except Absent:
            if not item.inherited:
                raise
            typer.echo(f"{url}: no sidecar beside the PET; trying the top of the data set.")
            receive(item, url := registry.base_url + item.inherited, part)
    if wrong := fault(item, part):  # before pooch sees it, which would fetch 0.7 GB again after a wrong hash
        part.unlink()
        again = "run the command again, and if that ends alike do not use the file, for the source has changed"
        raise Refused(f"{url}: {wrong}; what arrived was deleted: {again}.")
    part.replace(output_file)


def fetch(items: list[Item], folder: Path, base: str) -> None:
    """Download `items` into `folder`, or raise Refused at the first that does not come."""
    # A name of its own for what is new: without a hash pooch takes any old file for right, and the old file is to stay.
    new = {f"{item.path}.new": item for item in items}
    hashes, urls = {n: item.hash for n, item in new.items()}, {n: base + item.address for n, item in new.items()}
    registry = pooch.Pooch(folder, base, hashes, urls, retry_if_failed=RETRIES)
    for name, item in new.items():
        try:
            Path(registry.fetch(name, downloader=partial(resume, item))).replace(folder / item.path)
        except (requests.RequestException, ValueError) as error:
            why = error if isinstance(error, Again) else type(error).__name__
            found = f"found {RETRIES + 1} failed attempts, the last: {why}"
            again = "check the connection and run the same command again, which goes on from what has arrived"
            raise Refused(f"{urls[name]}: expected the whole file, {found}; {again}.") from None


def chosen(name: str, dynamic: bool) -> list[Item]:
    """The items of a data set, the dynamic ones on request."""
    return [item for item in SOURCES[name].items if dynamic or not item.dynamic]


def describe(name: str, dynamic: bool = False) -> str:
    """What a data set is, how much it is, and its licence."""
    items, source = chosen(name, dynamic), SOURCES[name]
    total = sum(item.size or 0 for item in items)  # without the sidecars, a few kB
    volume = f"{total / 1e6:,.0f} MB" if total else "sizes not published"
    option = " --dynamic" if dynamic else ""
    return f"{name}{option}: {source.what}; {len(items)} files, {volume}.\n  Licence: {source.licence}"


def download(name: str, folder: Path, dynamic: bool, dry_run: bool, force: bool, base_url: str | None) -> None:
    """Bring one data set into `folder`, or say what would be done."""
    source, items = SOURCES[name], chosen(name, dynamic)
    typer.echo(f"{describe(name, dynamic)}\n  Please cite: {source.citation}")
    wanted = missing(items, folder, force)
    if dry_run:
        for item in wanted:
            urls = " or ".join(source.base + a for a in (item.address, item.inherited) if a)
            typer.echo(f"would fetch {urls} to {folder / item.path}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "LICENCE.txt").write_text(source.licence + "\n", encoding="utf-8")
        (folder / "CITATION.txt").write_text(source.citation + "\n", encoding="utf-8")
        fetch(wanted, folder, re.sub("^https://[^/]+", base_url, source.base) if base_url else source.base)
    verb = "to fetch" if dry_run else "fetched"
    typer.echo(f"{folder}: {len(wanted)} files {verb}, {len(items) - len(wanted)} already there and right.")


def main(
    dataset: str | None = typer.Argument(None, help=f"One of: {', '.join(SOURCES)}."),
    list_: bool = typer.Option(False, "--list", help="Say what there is; fetch nothing."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would be fetched; write nothing."),
    directory: Path = typer.Option(DOWNLOADS, "--dir", envvar="MFDIFF_DATA", help="Each data set has a folder in it."),
    dynamic: bool = typer.Option(False, "--dynamic", help="openneuro-ds003382: 60 s frames and sidecars too, 2.0 GB."),
    force: bool = typer.Option(False, "--force", help="Replace local files that are not as expected."),
    base_url: str | None = typer.Option(None, hidden=True, help="Stands for every host, for the tests."),
) -> None:
    """Download a public data set with its licence and citation; run again to resume. Tried on a local server only."""
    folder, status = directory.resolve() / (dataset or ""), 2
    try:
        if list_:
            return typer.echo("\n".join([*map(describe, SOURCES), describe("openneuro-ds003382", dynamic=True)]))
        if dataset not in SOURCES:
            raise Refused(f"expected one of {', '.join(SOURCES)}, found {dataset or 'no name'}; see --list and --help.")
        if dynamic and chosen(dataset, True) == chosen(dataset, False):
            raise Refused(f"--dynamic: expected openneuro-ds003382, found {dataset}, without frames; leave it out.")
        return download(dataset, folder, dynamic, dry_run, force, base_url)
    except Refused as error:
        sentence = str(error)
    except OSError as error:
        cause = error.__cause__ or error  # pooch wraps what the system says in a longer text
        where, why = cause.filename or folder, cause.strerror or cause
        sentence = f"{where}: cannot be read or written ({why}); make room, or choose another folder with --dir."
    except KeyboardInterrupt:
        sentence = f"interrupted; {folder} keeps what has arrived, and the same command goes on from there."
        status = 130
    typer.echo(f"download: {sentence}", err=True)
    raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
