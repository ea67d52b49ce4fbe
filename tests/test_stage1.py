"""Stage 1: exact resume, Ctrl-C, checkpoints that are refused, and that it learns."""

import dataclasses
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mfdiff_lite import cohort, loop
from mfdiff_lite.cohort import SliceDataset, make_cohort
from mfdiff_lite.config import load_profile
from mfdiff_lite.loop import CHECKPOINT, update_average
from mfdiff_lite.model import MFdiff, load_model
from mfdiff_lite.stage1 import WEIGHTS, learning_rate, train_stage1

TINY = load_profile(
    "smoke",
    patients=1,
    slab=3,
    steps=6,
    batch=2,
    crop=64,
    validate_every=6,
    checkpoint_every=2,
    fusion_widths="8,8,8",
    denoiser_widths="8,8,8",
)


def weights(folder):
    return load_model(folder / WEIGHTS, "cpu").state_dict()


def run(out, profile=TINY, **kwargs):
    return list(train_stage1(profile, out, device="cpu", workers=1, **kwargs))


@pytest.fixture(scope="module", autouse=True)
def single_precision():
    """The same on every CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "native_bfloat16", lambda device: False)
        yield


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    out = tmp_path_factory.mktemp("uncut")
    return out, run(out)


def test_a_resumed_run_ends_at_the_same_weights_as_an_uncut_one(uncut, tmp_path):
    steps = train_stage1(TINY, tmp_path / "run", device="cpu", workers=1)
    for _ in range(3):
        next(steps)
    # A power cut one step past the checkpoint of step 2: that step is lost and must be repeated alike.
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    steps.close()
    tmp_path = tmp_path / "cut"
    states = run(tmp_path, resume=True)
    assert [s.step for s in states] == [3, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(weights(uncut[0]).values(), weights(tmp_path).values(), strict=True))
    assert states[-1].validation["mean"] == uncut[1][-1].validation["mean"]


def test_the_same_seed_repeats_and_another_does_not(uncut, tmp_path):
    run(tmp_path / "same")
    run(tmp_path / "other", dataclasses.replace(TINY, seed=1))
    same, other = weights(tmp_path / "same"), weights(tmp_path / "other")
    assert all(torch.equal(a, same[k]) for k, a in weights(uncut[0]).items())
    assert any(not torch.equal(a, other[k]) for k, a in weights(uncut[0]).items())


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(uncut, tmp_path, monkeypatch):
    states, before = [], signal.getsignal(signal.SIGINT)
    update = loop.update_average

    def interrupted(*arguments):
        update(*arguments)
        if len(states) == 3:  # in the middle of step 4
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "update_average", interrupted)
        for state in train_stage1(TINY, tmp_path, device="cpu", workers=1):
            states.append(state.step)
    assert states == [1, 2, 3] and (tmp_path / CHECKPOINT).exists()
    again = run(tmp_path, resume=True)
    assert [s.step for s in again] == [5, 6]  # step 4 was finished and saved before the interrupt
    assert [s.loss for s in again] == [s.loss for s in uncut[1][4:]]  # the running means go on as well
    assert all(torch.equal(a, b) for a, b in zip(weights(uncut[0]).values(), weights(tmp_path).values(), strict=True))
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_between_two_steps_is_the_callers_and_loses_nothing(tmp_path):
    """Today's fault: while the generator was suspended, Ctrl-C in the caller's code did nothing until the next step."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what started the tests may ignore it
    try:
        steps = train_stage1(TINY, tmp_path, device="cpu", workers=1)
        next(steps)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)  # ended by the signal
    finally:
        signal.signal(signal.SIGINT, before)
    steps.close()
    assert next(train_stage1(TINY, tmp_path, resume=True, device="cpu", workers=1)).step == 2


def test_another_cohort_is_not_resumed(uncut, monkeypatch):
    """Today's fault: a run went on with other data without a word."""
    monkeypatch.setattr(cohort, "DATA_VERSION", cohort.DATA_VERSION + 1)
    monkeypatch.setenv("MFDIFF_CACHE", str(uncut[0].parent / "cache"))
    with pytest.raises(ValueError, match="found one with cohort=v"):
        run(uncut[0], resume=True)


def test_the_card_names_every_revision_that_trained(uncut, tmp_path, monkeypatch):
    steps = train_stage1(TINY, tmp_path, device="cpu", workers=1)
    next(steps)
    steps.close()
    first = uncut[1][-1].model.card["revision"]
    monkeypatch.setattr(loop, "code_revision", lambda: "another")
    assert run(tmp_path, resume=True)[-1].model.card["revision"] == f"{first}, another"


def test_one_process_can_train_with_another_precision_after_it(uncut):
    """Today's fault: accelerate keeps the first run's state, and the second one was refused."""
    assert loop.accelerator_on("cpu", half=False).mixed_precision == "no"
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True, mixed_precision="bf16")
    assert loop.accelerator_on("cpu", half=False).mixed_precision == "no"


def test_bfloat16_where_the_hardware_has_it_and_never_for_small_differences(monkeypatch):
    """Losses of the first steps agree with single precision to its 8 bits; SURE divides differences by a small step."""
    plain = run(None)
    monkeypatch.setattr(loop, "native_bfloat16", lambda device: True)
    halves = run(None)
    for one, other in zip(plain[:2], halves[:2], strict=True):
        assert one.loss != other.loss
        assert one.loss == pytest.approx(other.loss, rel=0.02)
    assert all(p.dtype == torch.float32 for p in halves[-1].model.parameters())
    assert loop.accelerator_on("cpu", half=True).mixed_precision == "bf16"
    assert loop.accelerator_on("cpu", half=False).mixed_precision == "no"


def test_nothing_half_written_is_left(uncut):
    assert sorted(p.name for p in uncut[0].iterdir()) == [CHECKPOINT, "stage1.json", WEIGHTS]


def test_the_card_says_what_made_the_weights(uncut):
    card = load_model(uncut[0] / WEIGHTS, "cpu").card
    assert card["steps"] == 6 and card["seed"] == 0 and card["profile"]["batch"] == 2
    assert card["validation_psnr_db"][-1]["step"] == 6 and card["trained_on"]["slices"] == 3
    assert not set(card["trained_on"]["anatomies"]) & set(card["validated_on"]["anatomies"])


def test_a_run_is_not_overwritten_and_other_settings_are_not_resumed(uncut):
    with pytest.raises(FileExistsError, match="--resume"):
        run(uncut[0])
    with pytest.raises(ValueError, match="batch=2"):
        run(uncut[0], dataclasses.replace(TINY, batch=3), resume=True)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"\x08\0\0\0\0\0\0\0{broken")
    with pytest.raises(ValueError, match="delete it to start again"):
        run(tmp_path, resume=True)


def test_the_gpu_that_was_named_is_the_one_that_trains(monkeypatch):
    def at_the_accelerator(**_):
        raise InterruptedError

    named = []
    monkeypatch.setattr("mfdiff_lite.loop.pick_device", torch.device)
    monkeypatch.setattr("mfdiff_lite.loop.Accelerator", at_the_accelerator)
    monkeypatch.setattr("mfdiff_lite.loop.native_bfloat16", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch.cuda, "set_device", named.append)
    for device in ("cuda:1", "cuda", "cpu"):
        with pytest.raises(InterruptedError):
            next(train_stage1(load_profile("smoke"), device=device))
    assert named == [torch.device("cuda:1")]


def test_a_loss_that_explodes_stops_the_run(monkeypatch):
    monkeypatch.setattr("mfdiff_lite.stage1.learning_rate", lambda profile, step: float("inf"))
    with pytest.raises(FloatingPointError, match="no longer finite at step 2; lower learning_rate"):
        run(None)


def test_a_batch_in_parts_gives_the_losses_and_the_gradient_of_the_whole(monkeypatch):
    """Gradient accumulation: also where the parts weigh differently, as lesions do. Not the weights are compared: of a
    gradient that is nothing but rounding AdamW makes a whole step. So small steps, and the first gradient."""
    gradients, step = [], torch.optim.AdamW.step

    def watched(self, *arguments, **keywords):
        held = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients.append(torch.cat(held))
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    profile = dataclasses.replace(TINY, batch=4, steps=3, validate_every=3, learning_rate=3e-4, warmup=1)
    whole, parts = (run(None, dataclasses.replace(profile, accumulate=n)) for n in (1, 4))
    for one, other in zip(whole, parts, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5), one.step
    of_whole, of_parts = gradients[0], gradients[3]
    assert (of_parts - of_whole).norm() < 1e-5 * of_whole.norm()
    with pytest.raises(ValueError, match="multiple of processes x accumulate, found 4 for 1 x 3"):
        run(None, dataclasses.replace(profile, accumulate=3))


def test_the_average_is_an_exponential_one():
    one, two = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = 0.9 * one.weight.detach() + 0.1 * two.weight.detach()
    update_average(one, two, 0.9)
    assert torch.allclose(one.weight, expected)


def test_learning_rate_warms_up_and_falls_to_two_per_cent():
    p = load_profile("cpu", steps=1000, warmup=100, learning_rate=1.0)
    assert learning_rate(p, 0) == pytest.approx(0.01) and learning_rate(p, 99) == pytest.approx(1)
    assert learning_rate(p, 550) == pytest.approx(0.51) and learning_rate(p, 1000) == pytest.approx(0.02)
    assert np.all(np.diff([learning_rate(p, s) for s in range(100, 1000)]) < 0)


def test_it_learns():
    """A few steps on one patient bring the loss of a fixed batch well below the start, a Gaussian filter."""
    profile = dataclasses.replace(TINY, steps=40, batch=4, learning_rate=3e-3, warmup=5, ema=0.8, validate_every=40)
    batch = SliceDataset(make_cohort(profile, "train", workers=1), profile, augment=False).batch(0)
    t, noise = (
        torch.tensor([100, 300, 500, 700]),
        torch.randn(batch["spet"].shape, generator=torch.Generator().manual_seed(0)),
    )
    trained = run(None, profile)[-1].model
    with torch.no_grad():
        before, after = (m(batch, t, noise) for m in (MFdiff.from_profile(profile), trained))
    assert after["coarse"] < 0.9 * before["coarse"] and after["diffusion"] < 0.92 * before["diffusion"]


def test_training_starts_from_given_weights_and_says_so(uncut):
    parent = load_model(uncut[0] / WEIGHTS, "cpu")
    still = dataclasses.replace(TINY, learning_rate=1e-12, steps=1, ema=0.0)
    state = run(None, still, start=parent)[-1]
    for key, value in state.model.state_dict().items():
        assert torch.allclose(value, parent.state_dict()[key], atol=1e-6), key
    wider = dataclasses.replace(TINY, fusion_widths=(16, 8, 8))
    with pytest.raises(ValueError, match="weights to start from: expected .*16.*found"):
        run(None, wider, start=parent)


def test_the_card_names_the_weights_it_started_from(uncut, tmp_path):
    parent = load_model(uncut[0] / WEIGHTS, "cpu")
    run(tmp_path, dataclasses.replace(TINY, steps=1), start=parent)
    started = load_model(tmp_path / WEIGHTS, "cpu").card["started_from"]
    with pytest.raises(ValueError, match="found one with started_from="):
        run(tmp_path, dataclasses.replace(TINY, steps=1), resume=True)
    assert started["fingerprint"] == parent.fingerprint and started["card"]["steps"] == TINY.steps
