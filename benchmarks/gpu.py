"""A session on a GPU in one command: `make gpu MINUTES=20`. Without a GPU it says so and stops.

    python benchmarks/gpu.py --minutes 8 --only check,speed,simulate       parts, in this order
    python benchmarks/gpu.py --device cpu --tiny                           all parts at tiny size, without a GPU

    check       restoring there equals restoring here, within what bfloat16 rounds
    speed       slices a second by batch size and precision, compiled, training steps, peers; achieved over peak
    simulate    patients a second with all slices of a patient in one sparse product there, against this machine's cores
    train       the largest model that the minutes allow, resumable; weights in half precision, curve, validation
    notebook    07 at profile `gpu` under the same budget
    processes   two processes over `accelerate`, if there are two GPUs

Each part writes PART.json into the folder and is skipped when that exists; `train` goes on where it was cut. At the end
all of it stands in gpu.json, which `--keep` copies to results/gpu.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer

import osem
from bench import Peer
from mfdiff_lite.cohort import make_cohort
from mfdiff_lite.config import Profile, load_profile
from mfdiff_lite.loop import CHECKPOINT
from mfdiff_lite.model import MFdiff, load_model, load_pretrained, save_model
from mfdiff_lite.phantom import virtual_patient
from mfdiff_lite.readers.brainweb import load_anatomy
from mfdiff_lite.revision import code_revision
from mfdiff_lite.scanner import Scanner
from mfdiff_lite.stage1 import WEIGHTS, train_stage1
from results import RESULTS

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("MONAI DiffusionModelUNet", "diffusers UNet2DModel")
# Widths of fusion module and denoiser, largest first; in half precision all stay below 16 MB.
SIZES = {"large": (48, 96, 192), "cpu": (32, 64, 128)}
FEWEST_STEPS = 4000  # of training, for a size to pay
LARGEST_FILE = 16e6  # bytes of the weights


@dataclasses.dataclass(frozen=True)
class Session:
    """Where and how large: device, folder, minutes of training, and tiny sizes for a rehearsal."""

    device: torch.device
    out: Path
    minutes: float
    tiny: bool

    def seconds(self, task: Callable[[], Any], repeats: int = 5) -> float:
        """Median wall seconds of a task, the device's queue emptied before and after."""
        spent = []
        for _ in range(2 if self.tiny else repeats + 1):
            self.wait()
            began = time.perf_counter()
            task()
            self.wait()
            spent.append(time.perf_counter() - began)
        return float(np.median(spent[1:]))

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def autocast(self, kind: str) -> torch.autocast:
        """The precision of a measurement, "float32" or "bfloat16"."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=kind == "bfloat16")


# --- the parts -----------------------------------------------------------------------------------------------------


def check(session: Session) -> dict[str, float]:
    """Largest and root-mean-square difference to the CPU in single precision, in units of the brain's mean."""
    patient = virtual_patient(load_anatomy("ahba-15697"), 123, slices=2 if session.tiny else 12)
    scan = Scanner().scan(patient, 20)
    here = load_pretrained("cpu").restore(scan, 2, precision="float32")
    found = {}
    for precision in ("float32", "auto"):
        there = load_pretrained(str(session.device)).restore(scan, 2, precision=precision)
        wrong = (there.mean - here.mean)[scan.mask] / here.samples.view.scale.value
        found |= {
            f"largest, {precision}": float(abs(wrong).max()),
            f"rms, {precision}": float(np.sqrt((wrong**2).mean())),
        }
    if found["rms, auto"] > 0.01 or found["rms, float32"] > 0.002:
        raise RuntimeError(f"{session.device}: expected what the CPU restores, found a difference of {found}")
    return found


def speed(session: Session) -> dict[str, Any]:
    """Slices a second of restoring and training, and the operations achieved over those of a product of matrices."""
    side, batches = (32, (1, 2)) if session.tiny else (128, (8, 32, 128, 512))
    found: dict[str, Any] = {"matmul_tflops": peaks(session), "restore": {}, "training": {}}
    model = load_pretrained(str(session.device))
    compiled = [] if session.tiny else ["compiled"]
    for name in ("ours", *compiled, *PEERS):
        network = None if name in ("ours", "compiled") else Peer(name).eval().to(session.device)
        if name == "compiled":
            model.fusion.compile(), model.denoiser.compile()  # in place; weights and names stay
        for kind in ("float32", "bfloat16"):
            for batch in batches:
                with contextlib.suppress(torch.cuda.OutOfMemoryError):
                    task = restoring(session, network or model, batch, side, kind)
                    found["restore"][f"{name}, {kind}, batch {batch}"] = batch / session.seconds(task)
    for size in SIZES:
        found["training"][size] = step_seconds(session, sized(session, size))
    return found


def peaks(session: Session) -> dict[str, float]:
    """TFLOP/s of a product of square matrices."""
    size, found = (64 if session.tiny else 8192), {}
    for kind in ("float32", "bfloat16"):
        a = torch.randn(size, size, device=session.device).to(getattr(torch, kind))
        found[kind] = 2 * size**3 / session.seconds(lambda a=a: a @ a) / 1e12
    return found


def restoring(session: Session, network: MFdiff | Peer, batch: int, side: int, kind: str) -> Callable[[], Any]:
    """One sample of each slice of a batch in 6 steps, as a task."""
    place = session.device
    noise = torch.randn(batch, 1, side, side, device=place)

    @torch.no_grad()
    def run() -> None:
        with session.autocast(kind):
            if isinstance(network, MFdiff):
                shape = (batch, network.context, side, side)
                lpet, mr = torch.rand(2, *shape, device=place)
                network.restore_slices(lpet, mr, torch.full((batch,), 20.0, device=place), noise)
            else:
                network.restore(noise, noise, noise)

    return run


def sized(session: Session, size: str, **more: Any) -> Profile:
    """The profile of a training run: of the `cpu` profile with the widths of a size."""
    if session.tiny:
        return load_profile("smoke", **more)
    widths = ",".join(map(str, SIZES[size]))
    return load_profile("cpu", fusion_widths=widths, denoiser_widths=widths, batch=16, **more)


def step_seconds(session: Session, profile: Profile) -> float:
    """Seconds of a training step, bfloat16 on a GPU."""
    model = MFdiff.from_profile(profile).to(session.device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    shape = (profile.batch, profile.context, profile.crop, profile.crop)
    lpet, mr = torch.rand(2, *shape, device=session.device)
    dose = torch.full((profile.batch,), 20.0, device=session.device)
    batch = {"lpet": lpet, "mr": mr, "spet": lpet[:, :1], "weight": torch.ones_like(lpet[:, :1]), "dose": dose}
    t = torch.randint(0, 1000, (profile.batch,), device=session.device)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with session.autocast("bfloat16" if session.device.type == "cuda" else "float32"):
            loss = sum(model(batch, t, torch.randn_like(lpet[:, :1])).values())
        loss.backward()
        optimizer.step()

    return session.seconds(run)


@contextlib.contextmanager
def reconstructed_there(session: Session) -> Iterator[None]:
    """Every reconstruction of a simulation runs on the device."""
    with mock.patch.object(Scanner, "reconstruct", lambda self, counts: osem.reconstruct(self, counts, session.device)):
        yield


def simulate(session: Session) -> dict[str, float]:
    """Patients a second, one process with the device and all cores without, caches of their own; and the difference of
    an image."""
    patient = virtual_patient(load_anatomy("icbm152"), 5, slices=2)
    counts = Scanner().acquire(patient.activity, patient.attenuation, 5)
    here, there = Scanner().reconstruct(counts), osem.reconstruct(Scanner(), counts, session.device)
    found = {"relative difference": float(abs(there - here).max() / here.max())}
    if found["relative difference"] > 1e-3:
        raise RuntimeError(f"{session.device}: expected the image of the CPU, found a difference of {found}")
    patients = 1 if session.tiny else 32
    for name, workers in {"device, one process": 1, f"{os.cpu_count()} processes": None}.items():
        where = reconstructed_there(session) if workers else contextlib.nullcontext()
        cache = session.out / "timed-cache"
        with where, mock.patch.dict(os.environ, MFDIFF_CACHE=str(cache)):
            began = time.monotonic()
            make_cohort(
                load_profile("cpu", patients=patients, **({"slab": 5} if session.tiny else {})), "train", workers
            )
            found[f"patients a second, {name}"] = patients / (time.monotonic() - began)
        shutil.rmtree(cache)
    return found


def train(session: Session) -> dict[str, Any]:
    """The largest of `SIZES` that gets FEWEST_STEPS in the minutes, or the smallest; the cohort is made there."""
    plan = session.out / "plan.json"
    if not plan.exists():  # measured once: a run that is cut goes on with the same settings
        spent = {size: step_seconds(session, sized(session, size)) for size in SIZES}
        steps = {size: int(60 * session.minutes / second) for size, second in spent.items()}
        size = next((one for one in SIZES if steps[one] >= FEWEST_STEPS), list(SIZES)[-1])
        plan.write_text(json.dumps({"size": size, "steps": 2 if session.tiny else steps[size]}))
    chosen = json.loads(plan.read_text())
    often = max(1, chosen["steps"] // 10)
    profile = sized(session, chosen["size"], steps=chosen["steps"], validate_every=often, checkpoint_every=often)
    folder = session.out / "train"
    with reconstructed_there(session):
        for part in ("train", "validation"):
            make_cohort(profile, part, 1)
        for state in train_stage1(profile, folder, (folder / CHECKPOINT).exists(), str(session.device)):
            if state.validation:
                print(f"step {state.step} of {state.steps}: {json.dumps(state.validation)}", flush=True)
    trained = load_model(folder / WEIGHTS, "cpu")
    written = save_model(trained, session.out / "stage1-gpu.safetensors", trained.card, half=True)
    if written.stat().st_size > LARGEST_FILE:
        raise RuntimeError(
            f"{written}: expected at most {LARGEST_FILE / 1e6:g} MB, found {written.stat().st_size / 1e6:.1f}"
        )
    return chosen | {
        "parameters": trained.n_parameters,
        "minutes": trained.card["training_minutes"],
        "file_mb": written.stat().st_size / 1e6,
        "curve": trained.card["validation_psnr_db"],
    }


def notebook(session: Session) -> dict[str, float]:
    """07 from front to back; its executed copy and page land in the folder."""
    profile = "smoke" if session.tiny else "gpu"
    hours = session.minutes / 60
    settings = [] if session.tiny else ["-p", f"max_hours={hours}", "-p", "overrides={'patients': 64, 'steps': 1000}"]
    command = [
        sys.executable,
        "notebooks/run.py",
        "--profile",
        profile,
        "--out",
        str(session.out.resolve() / "notebook"),
    ]
    began = time.monotonic()
    subprocess.run([*command, *settings, "07_full_gpu_training"], cwd=ROOT, check=True)
    return {"minutes": (time.monotonic() - began) / 60}


def processes(session: Session) -> dict[str, Any]:
    """A short training over two processes; the loss must be finite and one of them writes the weights."""
    if session.device.type == "cuda" and torch.cuda.device_count() < 2:
        return {"left out": f"{torch.cuda.device_count()} GPU; two are needed"}
    folder = session.out / "two-processes"
    where = ["--cpu"] if session.device.type == "cpu" else []
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", *where, "-m", "mfdiff_lite", "train"]
    device = ["--device", session.device.type, "--profile", "smoke", "--out", str(folder), "steps=4", "batch=2"]
    began = time.monotonic()
    subprocess.run([*launch, *device], cwd=ROOT, check=True)
    return {"seconds": time.monotonic() - began, "parameters": load_model(folder / WEIGHTS, "cpu").n_parameters}


PARTS = {
    "check": check,
    "speed": speed,
    "simulate": simulate,
    "train": train,
    "notebook": notebook,
    "processes": processes,
}


def about(session: Session) -> dict[str, Any]:
    """What it ran on."""
    cuda = session.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(session.device) if cuda else platform.machine(),
        "memory_gb": torch.cuda.get_device_properties(session.device).total_memory / 1e9 if cuda else None,
        "torch": torch.__version__,
        "revision": code_revision(),
        "date": time.strftime("%Y-%m-%d"),
    }


def run(session: Session, only: list[str]) -> dict[str, Any]:
    """Each part that has no result yet; a part that fails is said and the next one begins."""
    session.out.mkdir(parents=True, exist_ok=True)
    for name in only:
        kept = session.out / f"{name}.json"
        if kept.exists():
            continue
        print(f"{name} ...", flush=True)
        began = time.monotonic()
        try:
            found = PARTS[name](session)
        except Exception as error:
            print(
                f"{name}: failed after {time.monotonic() - began:.0f} s ({type(error).__name__}: {error})", flush=True
            )
            continue
        kept.write_text(json.dumps(found | {"seconds_of_part": round(time.monotonic() - began, 1)}, indent=1) + "\n")
    done = {name: json.loads(path.read_text()) for name in PARTS if (path := session.out / f"{name}.json").exists()}
    everything = about(session) | {"parts": done, "missing": [name for name in only if name not in done]}
    (session.out / "gpu.json").write_text(json.dumps(everything, indent=1) + "\n")
    print(json.dumps(everything, indent=1))
    return everything


def main(
    minutes: Annotated[float, typer.Option(help="of training, and the most that notebook 07 may take")] = 20,
    out: Annotated[Path, typer.Option(help="folder for everything")] = Path("runs/gpu"),
    only: Annotated[str, typer.Option(help="parts, joined by commas")] = ",".join(PARTS),
    device: Annotated[str, typer.Option(help="cuda, or cpu with --tiny for a rehearsal")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny sizes")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="copy gpu.json to results/")] = False,
) -> None:
    """Run a session on a GPU."""
    unknown = [name for name in only.split(",") if name not in PARTS]
    if unknown:
        raise typer.BadParameter(f"--only: expected {', '.join(PARTS)}, found {unknown[0]}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "No GPU that PyTorch can use was found: nothing was run. A rehearsal on this machine: --device cpu --tiny"
        )
        return
    session = Session(torch.device(device), out, minutes, tiny)
    everything = run(session, only.split(","))
    if keep:
        shutil.copy(out / "gpu.json", RESULTS / "gpu.json")
    if everything["missing"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
