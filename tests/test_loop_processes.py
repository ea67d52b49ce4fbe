"""Several processes train as one does: the same loss curve for the same global batch, and only the first one writes."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import distributed

from mfdiff_lite import loop, stage1
from mfdiff_lite.config import load_profile
from mfdiff_lite.model import load_model

SETTINGS = {
    "patients": 1,
    "slab": 3,
    "steps": 5,
    "batch": 4,
    "crop": 64,
    "learning_rate": 3e-3,  # large, so that a difference in a gradient would soon be one in the loss
    "warmup": 1,
    "validate_every": 5,
    "checkpoint_every": 2,
    "fusion_widths": "8,8,8",
    "denoiser_widths": "8,8,8",
}
ROUNDING = 2.0**-24  # relative, of one float32 operation

# What each process runs: the command, with a folder of its own to write into, and its losses written down.
DRIVER = """
import json, os, sys
from mfdiff_lite import loop, stage1
from mfdiff_lite.__main__ import app

loop.native_bfloat16 = lambda device: False  # single precision, the same on every CPU

folder, rank, losses, real = sys.argv[1], os.environ["RANK"], [], stage1.train_stage1

def recorded(*args, **kwargs):
    for state in real(*args, **kwargs):
        losses.append(state.loss)
        yield state

stage1.train_stage1 = recorded
status = app(["train", "--out", f"{folder}/rank-{rank}", "--profile", "smoke", "--device", "cpu", *sys.argv[2:]],
             standalone_mode=False)
with open(f"{folder}/losses-{rank}.json", "w") as out:
    json.dump(losses, out)
sys.exit(status or 0)
"""


def each_step(running):
    """Running means, as training shows them (over all of these few steps), -> the loss of every step, (steps, 2)."""
    means = np.array([[mean["coarse"], mean["diffusion"]] for mean in running])
    n = np.arange(1, len(means) + 1)[:, None]
    return np.diff(n * means, axis=0, prepend=0)


def loopback():
    """Settings that keep gloo on this machine, where the interface has a name that we know."""
    names = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    return {"GLOO_SOCKET_IFNAME": names.pop()} if names else {}


def launch(processes, folder, settings):
    """`accelerate launch` of the driver on the CPU: exit status and stderr. --multi_gpu is its word for "several
    processes on this machine"; what they compute on is decided by the --device of the command."""
    (folder / "driver.py").write_text(DRIVER, encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(folder / "driver.py"), str(folder), *(f"{key}={value}" for key, value in settings.items())]
    env = os.environ | {"HF_HOME": str(folder / "hf")} | loopback()  # no accelerate configuration of the user's
    started = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        errors = started.communicate(timeout=200)[1]
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # the launcher and its processes
        pytest.fail(f"two processes did not end: {started.communicate()[1][-2000:]}", pytrace=False)
    return started.returncode, errors


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    """Skip where processes of this machine cannot talk to each other."""
    if os.name != "posix" or not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo: several processes cannot train together here")
    store = (tmp_path_factory.mktemp("gloo") / "store").as_uri()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in loopback().items():
            patch.setenv(name, value)
        try:
            distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        except RuntimeError as error:
            pytest.skip(f"gloo finds no way on this machine: {error}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process: its folder and losses, and the losses with the slices of every batch in reverse order."""
    out, profile = tmp_path_factory.mktemp("one"), load_profile("smoke", **SETTINGS)

    def losses(folder):
        return each_step([state.loss for state in stage1.train_stage1(profile, folder, device="cpu", workers=1)])

    batch_of = stage1.Supervised.batch

    def reverse(*args):
        return {key: value.flip(0) for key, value in batch_of(*args).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "native_bfloat16", lambda device: False)
        plain = losses(out)
        patch.setattr(stage1.Supervised, "batch", reverse)
        return out, plain, losses(None)


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one_and_only_the_first_writes(gloo, one, tmp_path):
    out, alone, reversed_order = one
    status, errors = launch(2, tmp_path, SETTINGS)
    assert status == 0, errors[-2000:]
    first, second = (each_step(json.loads((tmp_path / f"losses-{rank}.json").read_text())) for rank in (0, 1))
    assert np.array_equal(first, second), "both processes must show the loss of the whole batch"

    # Two processes add up the same numbers in another order. So does one process that takes the slices of a batch in
    # reverse: how far that moves a curve of these few steps is what rounding does, training's own amplification
    # included. A maximum over few numbers may be lucky, hence the factor, and the few roundings of the loss itself.
    rounding = np.abs(reversed_order / alone - 1).max()
    tolerance = 10 * max(rounding, 16 * ROUNDING)
    assert tolerance < 1e-3, "the control has left the range of rounding"
    assert np.abs(first / alone - 1).max() < tolerance

    assert sorted(p.name for p in (tmp_path / "rank-0").iterdir()) == sorted(p.name for p in out.iterdir())
    assert not (tmp_path / "rank-1").exists()
    cards = [load_model(folder / stage1.WEIGHTS, "cpu").card for folder in (out, tmp_path / "rank-0")]
    scores = [[card["validation_psnr_db"][-1][key] for key in ("lpet", "coarse", "mean")] for card in cards]
    assert scores[0] == pytest.approx(scores[1], abs=0.01)  # dB


def test_the_loss_of_shares_is_that_of_the_batch():
    """Why the curves agree: shares weighted as in training average to the loss of the whole batch."""
    from mfdiff_lite.model import MFdiff

    profile = load_profile("smoke", **SETTINGS)
    torch.manual_seed(0)
    shape = (4, 1, 64, 64)
    batch = {key: torch.rand(4, 3, 64, 64) for key in ("lpet", "mr")}
    batch |= {"spet": torch.rand(shape), "weight": 0.2 + 8 * (torch.rand(shape) > torch.rand(4, 1, 1, 1))}
    batch["dose"] = torch.tensor([5.0, 10.0, 20.0, 80.0])
    model, t, noise = MFdiff.from_profile(profile), torch.tensor([10, 300, 500, 900]), torch.randn(shape)

    def loss(share):
        part = batch["weight"][share].mean() / batch["weight"].mean()
        with torch.no_grad():
            found = model({key: value[share] for key, value in batch.items()}, t[share], noise[share])
        return torch.stack([part * found["coarse"], part * found["diffusion"]]).double()

    whole = loss(slice(None))
    for processes in (2, 4):
        shares = torch.stack([loss(slice(rank, None, processes)) for rank in range(processes)]).mean(0)
        assert torch.allclose(shares, whole, rtol=64 * ROUNDING, atol=0)


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    real = loop.Accelerator
    monkeypatch.setattr(real, "num_processes", property(lambda self: 3))
    with pytest.raises(ValueError, match="batch: expected a multiple .* found 4 for 3 x 1; choose another batch"):
        next(stage1.train_stage1(load_profile("smoke", **SETTINGS), None, device="cpu", workers=1))
