"""Make the page on which the shipped model restores in the reader's browser: `make web`.

    runs/web/try.html    the page, opened from disk: no server, no network
    runs/web/*.js        its scripts; the models (ONNX), the cases and the runtime (WebAssembly) as text in them

A browser lets a page from disk read no file beside it but scripts; therefore everything is a script. The network is
exported as it is, nothing of it is written a second time. `onnxruntime-web` comes from npm, once, and is held to its
hash. Two of its builds are there: WebAssembly for every browser, and WebGPU for those with a graphics card and JSPI (as
text 5.5 MB; the build that does without JSPI has 8.8 MB). WebGPU was tried with an adapter in software, with no real
graphics card.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import onnx
import onnxruntime
import torch
import typer
from onnx import numpy_helper
from scipy import ndimage

from mfdiff_lite.anatomy import embedded_anatomy
from mfdiff_lite.config import FWHM_TO_SD, SIDE, TEST_ANATOMIES
from mfdiff_lite.fusion import Fused
from mfdiff_lite.model import START, STEPS, MFdiff, load_model, load_pretrained, paired_noise
from mfdiff_lite.phantom import Randomisation, VirtualPatient, virtual_patient
from mfdiff_lite.scan import Scan
from mfdiff_lite.scanner import Scanner
from mfdiff_lite.view import FIDELITY_SD, SMOOTH_MM, WORKING_VOXEL, ModelView

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGE = "onnxruntime-web@1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
TARBALL = ROOT / "runs" / "npm" / "onnxruntime-web-1.30.0.tgz"
RUNTIMES = {  # the script and the WebAssembly that it starts; that for WebGPU needs a browser with JSPI
    "cpu": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
    "gpu": ("ort.jspi.bundle.min.mjs", "ort-wasm-simd-threaded.jspi.wasm"),
}
DOSES = (4, 20, 50, 100)  # dose-reduction factors; that of the check comes from CHECKED
CHECKED = {"dose": 20, "samples": 4, "seed": 0}  # what the page and the package restore alike
SLICES = 9
MAPS = ("gray_r", "gray", "magma", "viridis", "RdBu_r")
NO_LESIONS = Randomisation(lesions_per_100ml=(0.0, 0.0))
LESIONS = Randomisation(lesion_radius=(4.0, 7.0), lesions_per_100ml=(1.2, 1.6))


@dataclass(frozen=True)
class Case:
    """A virtual patient of the test anatomy to store. Seeds are chosen so that all boxes have one size."""

    title: str
    about: str
    seed: int
    randomisation: Randomisation
    shift: str | None = None


CASES = (
    Case("Normal", "No lesions: paint one.", 718, NO_LESIONS),
    Case("Lesions", "Some show in PET alone, some in MR alone, some in both.", 719, LESIONS),
    Case("Amyloid tracer", "White matter takes up more than grey: an uptake that training never saw.", 704, NO_LESIONS,
         "amyloid"),
)  # fmt: skip


class WebError(Exception):
    """The page cannot be made; `str()` is one sentence that says what to do."""


# --- the network ---------------------------------------------------------------------------------------------------


def exported(model: MFdiff, height: int, width: int) -> dict[str, bytes]:
    """Fusion module and denoiser as ONNX of one size, (1, context, height, width): name -> file. Raises WebError for a
    model without a denoiser."""
    if model.denoiser is None:
        raise WebError("the page shows samples: expected a model with a denoiser, found one without")
    lpet, mr, dose = torch.rand(1, model.context, height, width), torch.randn(1, model.context, height, width), 20.0
    fusion = {"lpet": lpet, "mr": mr, "dose": torch.tensor([dose])}
    with torch.no_grad():
        feature = model.fusion(*fusion.values()).feature
    denoiser = {"xt": mr[:, :1], "time": torch.tensor([0.5]), "lpet": lpet[:, :1], "feature": feature}
    denoiser["dose"] = fusion["dose"]
    return {
        "fusion": _onnx(model.fusion, fusion, list(Fused._fields)),
        "denoiser": _onnx(model.denoiser, denoiser, ["v"]),
    }


def _onnx(module: torch.nn.Module, inputs: dict[str, torch.Tensor], outputs: list[str]) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            dynamo=True,
            verbose=False,
        )
    return in_half_precision(program.model_proto).SerializeToString()


def in_half_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with its weights stored in half precision where that loses nothing, as it does for the shipped
    ones: a cast to single precision when it is loaded gives them back exactly."""
    graph, casts = model.graph, []
    for weight in graph.initializer:
        values = numpy_helper.to_array(weight)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.dtype == np.float32 and values.size > 64 and np.array_equal(half.astype(np.float32), values):
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


# --- cases ---------------------------------------------------------------------------------------------------------


def packed(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Arrays (Z, x, y) or of any other shape for `unpacked` of restore.js: their layout, and one text that holds them.
    float32 images become 16-bit numbers, see `in_16_bits`; names that end in "_exact" stay float32."""
    fields, parts, offset = {}, [], 0
    for name, array in arrays.items():
        scale = 1.0
        if array.dtype == np.float32 and not name.endswith("_exact"):
            scale = step(array)
            array = np.round(array / scale).astype(np.uint16)
        kind = {"float32": "Float32Array", "uint16": "Uint16Array", "uint8": "Uint8Array"}[array.dtype.name]
        fields[name] = {"kind": kind, "shape": array.shape, "scale": scale, "offset": offset}
        data = np.ascontiguousarray(array).tobytes()
        parts.append(data + bytes(-len(data) % 4))
        offset += len(parts[-1])
    return {"fields": fields, "data": text_of(b"".join(parts))}


def step(image: np.ndarray) -> float:
    """Of 16-bit numbers that stand for an image of at least 0. A power of two: a part of a rounded image has a smaller
    step at most, and keeps its values."""
    return float(2.0 ** np.ceil(np.log2(max(float(image.max()), 1e-9) / 65535)))


def in_16_bits(image: np.ndarray) -> np.ndarray:
    """An image of at least 0 as the page gets it: what the page and the package restore must be the same numbers.
    Dim air does not become 0, which would mean "cut away" to the package."""
    steps = np.where(image > 0, np.maximum(np.round(image / step(image)), 1), 0)
    return (steps * step(image)).astype(np.float32)


def text_of(data: bytes) -> str:
    """gzip in base64: the only way to have bytes in a script."""
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()


def stored_case(model: MFdiff, case: Case, patient: VirtualPatient, doses: Iterable[int] = DOSES) -> dict[str, Any]:
    """One case for the page, on the box that the package works on: images (Z, x, y) in kBq/mL, a lesion table, the
    blur that stands for the scanner, and what the package makes of the middle slice."""
    scanner = Scanner()
    scans = {dose: _rounded(scanner.scan(patient, dose)) for dose in sorted({CHECKED["dose"], *doses})}
    scan = scans[CHECKED["dose"]]
    view = ModelView(scan, model.context)
    if view.grid.resampled or any(map(any, view.grid.pad)):
        raise WebError(f"{scan.name}: expected a head inside the scanner's 2 mm grid; choose another seed")

    def boxed(volume: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(volume[view.grid.box], -1, 0))

    arrays = {f"lpet{dose}": boxed(one.lpet) for dose, one in scans.items()}
    arrays |= {name: boxed(getattr(scan, name)) for name in ("mr", "spet", "activity")}
    arrays |= {
        "brain": boxed(scan.mask).astype(np.uint8),
        "tissues": boxed(scan.tissues),
        "lesions": boxed(scan.lesions),
    }
    clean = scanner.reconstruct(scanner.expected(patient.activity, patient.attenuation))
    return {
        "title": case.title,
        "about": case.about,
        "name": scan.name,
        "doses": list(scans),
        "lesions": [{"label": one.label, "kind": one.kind, "hot": one.hot} for one in patient.lesion_table],
        "levels": {name: float(patient.truth[name]) for name in ("grey", "white")},
        "blur_fwhm": fitted_blur(patient.activity, clean, patient.mask, scanner.pixel_size),
        "images": packed(arrays),
        "check": reference(model, view, boxed),
    }


def _rounded(scan: Scan) -> Scan:
    images = {name: in_16_bits(getattr(scan, name)) for name in ("lpet", "mr", "spet", "activity")}
    return replace(scan, **images)


def fitted_blur(activity: np.ndarray, clean: np.ndarray, mask: np.ndarray, voxel: float) -> float:
    """FWHM [mm] of the in-plane Gaussian that comes closest to what the scanner makes of an activity without noise."""

    def error(fwhm: float) -> float:
        sd = fwhm * FWHM_TO_SD / voxel
        return float(((ndimage.gaussian_filter(activity, (sd, sd, 0)) - clean)[mask] ** 2).mean())

    return float(min(np.arange(2.0, 12.0, 0.25), key=error))


def reference(model: MFdiff, view: ModelView, boxed: Any) -> dict[str, Any]:
    """What the package makes of the middle slice, and the noise that it began with."""
    z, samples, seed = view.shape[2] // 2, CHECKED["samples"], CHECKED["seed"]
    restored = model.restore(view.scan, samples, seed=seed, precision="float32")
    padded = view.slices(np.array([z]))["lpet"].shape[-2:]
    noise = paired_noise(samples, tuple(padded), [seed, z]).numpy()[::2]  # of each pair the first
    images = {name: boxed(getattr(restored, name))[z] for name in ("mean", "std", "coarse", "gate")}
    arrays = {f"{name}_exact": image.astype(np.float32) for name, image in images.items()}
    return {**CHECKED, "slice": z, "images": packed(arrays | {"noise_exact": noise})}


# --- the runtime ---------------------------------------------------------------------------------------------------


def fetched(tarball: Path = TARBALL) -> Path:
    """`onnxruntime-web` as npm packs it, from disk or else from npm, its hash checked on every use. Raises WebError."""
    if not tarball.is_file():
        tarball.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=tarball.parent) as folder:
            try:
                command = ["npm", "pack", PACKAGE, "--pack-destination", folder, "--silent"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                next(Path(folder).glob("*.tgz")).replace(tarball)
            except (OSError, subprocess.CalledProcessError, StopIteration) as error:
                raise WebError(
                    f"{PACKAGE}: expected npm and a network to fetch it once, found {error}; or put its npm package "
                    f"at {tarball}"
                ) from None
    found = "sha512-" + base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if found != INTEGRITY:
        raise WebError(f"{tarball}: expected {PACKAGE} with {INTEGRITY[:20]}..., found {found[:20]}...; remove it")
    return tarball


def runtimes(tarball: Path) -> dict[str, dict[str, str]]:
    """For "cpu" and "gpu": the script of the worker that runs the network, and the WebAssembly that it starts."""
    found, own = {}, (HERE / "worker.js").read_text(encoding="utf-8")
    with tarfile.open(tarball) as package:
        for kind, names in RUNTIMES.items():
            module, wasm = (package.extractfile(f"package/dist/{name}").read() for name in names)  # type: ignore[union-attr]
            found[kind] = {"worker": as_classic_script(module.decode()) + own, "wasm": text_of(wasm)}
    return found


def as_classic_script(module: str) -> str:
    """A module without imports as a script that defines `ort`: from disk, no browser lets a worker load modules."""

    def named(match: re.Match) -> str:
        pairs = (item.split(" as ") for item in match[1].split(","))
        return "const ort = {" + ", ".join(f"{public}: {own}" for own, public in pairs) + "};\n"

    script, count = re.subn(r"export\{([^}]*)\};?\s*(//#.*)?\s*$", named, module)
    if count != 1:
        raise WebError(f"{PACKAGE}: expected one list of exports at the end of its script, found {count}")
    return script.replace("import.meta.url", "self.location.href")


# --- the folder ----------------------------------------------------------------------------------------------------


def settings(model: MFdiff, padded: tuple[int, int]) -> dict[str, Any]:
    """What restore.js must know of the package."""
    tables = {
        name: np.round(matplotlib.colormaps[name](np.linspace(0, 1, 255))[:, :3] * 255).astype(int).tolist()
        for name in MAPS
    }
    return {
        "steps": STEPS,
        "start": START,
        "context": model.context,
        "padded": padded,
        "voxel": WORKING_VOXEL,
        "smooth_sd": SMOOTH_MM * FWHM_TO_SD / WORKING_VOXEL,
        "fidelity_sd": FIDELITY_SD,
        "fingerprint": model.fingerprint[:12],
        "schedule": model.schedule.length,
        "maps": tables,
    }


def padded_size(cases: list[dict[str, Any]]) -> tuple[int, int]:
    """The size that the network is exported for. Raises WebError for cases with boxes of several sizes."""
    shapes = {tuple(case["images"]["fields"]["mr"]["shape"][1:]) for case in cases}
    if len(shapes) != 1:
        raise WebError(f"expected cases with boxes of one size, found {sorted(shapes)}; choose other seeds")
    height, width = (-(-side // SIDE) * SIDE for side in shapes.pop())
    return height, width


def build(
    model: MFdiff,
    cases: list[dict[str, Any]],
    network: dict[str, bytes],
    runtimes: dict[str, dict[str, str]],
    out: Path,
) -> None:
    """Make the folder and put it in place of an earlier one, all or nothing. Raises WebError."""
    if out.exists() and not (out / "try.html").is_file():
        raise WebError(f"{out} exists and is not an earlier page, which would be replaced: name another --out")
    scripts = {"settings": _script("settings", settings(model, padded_size(cases)))}
    scripts |= {f"case{number}": _script("cases.push", case) for number, case in enumerate(cases)}
    scripts["network"] = _script("models", {name: text_of(data) for name, data in network.items()})
    scripts |= {kind: _script(kind, files) for kind, files in runtimes.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".web_", dir=out.parent) as temporary:
        site = Path(temporary, "site")
        site.mkdir()
        for name, script in scripts.items():
            (site / f"{name}.js").write_text(script, encoding="utf-8")
        tags = "\n".join(f'<script src="case{number}.js"></script>' for number in range(len(cases)))
        page = (HERE / "try.html").read_text(encoding="utf-8").replace("<!-- cases -->", tags)
        (site / "try.html").write_text(page, encoding="utf-8")
        for name in ("restore.js", "try.js"):
            shutil.copy(HERE / name, site / name)
        for name in ("LICENSE", "ThirdPartyNotices.txt"):  # of the same project; the npm package has none
            shutil.copy(Path(onnxruntime.__file__).parent / name, site / f"onnxruntime-{name}")
        if out.exists():
            out.rename(Path(temporary, "earlier"))
        site.rename(out)


def _script(name: str, value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"))
    return f"MFDIFF.{name}({text});\n" if name.endswith("push") else f"MFDIFF.{name} = {text};\n"


def simulated(case: Case, slices: int = SLICES) -> VirtualPatient:
    """The patient of a case: a slab of the test anatomy."""
    anatomy = embedded_anatomy(TEST_ANATOMIES[0])
    return virtual_patient(anatomy, case.seed, case.shift, slices, case.randomisation)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Path = typer.Option(ROOT / "runs" / "web", help="Folder of the page; an earlier page there is replaced."),
    weights: Path = typer.Option(None, help="Weights file; default: the shipped ones."),
) -> None:
    """Make the page on which the model restores in the reader's browser."""
    try:
        ready = runtimes(fetched())
        model, cases = load_model(weights, "cpu") if weights else load_pretrained("cpu"), []
        for case in CASES:
            typer.echo(f"{case.title}: scanning and restoring one patient")
            cases.append(stored_case(model, case, simulated(case)))
        typer.echo("exporting the network")
        build(model, cases, exported(model, *padded_size(cases)), ready, out)
    except (WebError, OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    typer.echo(f"{out / 'try.html'}, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    app()
