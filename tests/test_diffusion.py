"""Schedule, forward process and samplers against closed forms and against `diffusers`."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from mfdiff_lite.diffusion import NoiseSchedule, diffuse, invert_velocity, sample, velocity

SCHEDULE = NoiseSchedule()


def dummy(x, t):
    """A deterministic, non-linear stand-in for a denoiser."""
    return 0.3 * torch.tanh(x) + 0.1 * x + 0.05 * torch.cos(t.float() / 100).reshape(-1, *[1] * (x.ndim - 1))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def optimal_denoiser(sd, mean=0.0):
    """v of the exact posterior mean for x0 ~ N(mean, sd^2)."""

    def denoise(xt, t):
        a = SCHEDULE.alpha_bar(t, xt)
        x0 = mean + a.sqrt() * sd**2 / (a * sd**2 + 1 - a) * (xt - a.sqrt() * mean)
        return (a.sqrt() * xt - x0) / (1 - a).sqrt()

    return denoise


def test_alpha_bar_is_the_cosine_schedule_and_one_at_the_clean_end():
    a = SCHEDULE.alpha_bar(torch.arange(1000), torch.zeros(1000))
    t = (torch.arange(1, 1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2
    closed = torch.cos(t) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert torch.allclose(a[:990].double(), closed[:990], atol=1e-5)
    assert (a[1:] < a[:-1]).all() and a[-1] < 1e-4
    assert SCHEDULE.alpha_bar(torch.tensor([-1]), torch.zeros(1)).item() == 1


def test_forward_process_has_the_stated_mean_and_variance():
    x0, t = torch.full((20_000, 1), 3.0), torch.full((20_000,), 400)
    a = SCHEDULE.alpha_bar(t[:1], x0[:1]).item()
    xt = diffuse(x0, noise(20_000, 1), t, SCHEDULE)
    assert xt.mean().item() == pytest.approx(3 * a**0.5, abs=4 * ((1 - a) / 20_000) ** 0.5)
    assert xt.var().item() == pytest.approx(1 - a, rel=0.05)  # not sqrt(1 - a), the classic slip


@pytest.mark.parametrize("t", [0, 250, 500, 999])
def test_velocity_and_its_inverse_are_exact(t):
    x0, eps, times = noise(2, 1, 4, 4), noise(2, 1, 4, 4, seed=1), torch.full((2,), t)
    xt, v = diffuse(x0, eps, times, SCHEDULE), velocity(x0, eps, times, SCHEDULE)
    back, back_eps = invert_velocity(xt, v, times, SCHEDULE)
    assert torch.allclose(back, x0, atol=1e-5) and torch.allclose(back_eps, eps, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 8, 50])  # divisors of 1000: where diffusers rounds the times as we do
def test_ddim_follows_the_trajectory_of_diffusers(steps):
    theirs = DDIMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(steps)
    x = start = noise(2, 1, 8, 8)
    for t in theirs.timesteps:
        x = theirs.step(dummy(x, t.repeat(2)), t, x, eta=0.0).prev_sample
    assert (sample(dummy, start, SCHEDULE, steps, method="ddim") - x).abs().max() < 1e-5


def test_dpm_solver_follows_the_trajectory_of_diffusers():
    theirs = DPMSolverMultistepScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    theirs.set_timesteps(10)
    x = start = noise(2, 1, 8, 8)
    assert theirs.timesteps.tolist() == SCHEDULE.times(10)[:-1]
    for t in theirs.timesteps:
        x = theirs.step(dummy(x, t.repeat(2)), t, x).prev_sample
    assert (sample(dummy, start, SCHEDULE, 10) - x).abs().max() < 2e-4  # float32 log-SNR at the noisy end


def test_ddpm_variance_of_a_step_is_that_of_diffusers():
    """With fresh noise the two can only agree in law: compare the SD of many samples of a closed-form Gaussian."""
    theirs = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    start, generator = noise(20_000, 1), torch.Generator().manual_seed(1)
    denoise = optimal_denoiser(0.5, mean=1.0)
    ours = sample(denoise, start, SCHEDULE, 1000, method="ddpm", generator=torch.Generator().manual_seed(2))
    x = start
    theirs.set_timesteps(1000)
    for t in theirs.timesteps:
        x = theirs.step(denoise(x, t.repeat(len(x))), t, x, generator=generator).prev_sample
    for result in (ours, x):
        assert result.mean().item() == pytest.approx(1.0, abs=0.02)
        assert result.std().item() == pytest.approx(0.5, rel=0.03)


def exact_factor(sd, steps, start=1.0):
    """What DDIM multiplies the start by for x0 ~ N(0, sd^2): every step is linear there, so the product is the closed
    form."""
    times = [int(t) for t in SCHEDULE.times(steps, start)]
    a = SCHEDULE._alpha_bar.double()[times]
    factor = (1 - a[0]).sqrt() if start < 1 else torch.tensor(1.0)
    for now, following in zip(a[:-1], a[1:], strict=True):
        shrink = now.sqrt() * sd**2 / (now * sd**2 + 1 - now)
        eps = (1 - now.sqrt() * shrink) / (1 - now).sqrt()
        factor = factor * (following.sqrt() * shrink + (1 - following).sqrt() * eps)
    return float(factor)


@pytest.mark.parametrize("steps", [4, 20, 100])
def test_ddim_on_a_gaussian_equals_the_product_of_its_linear_steps(steps):
    got = sample(optimal_denoiser(0.5), torch.ones(1, 1), SCHEDULE, steps, method="ddim").item()
    assert got == pytest.approx(exact_factor(0.5, steps), rel=1e-4)


def test_samplers_converge_to_the_gaussian_at_their_order():
    """The probability-flow ODE carries N(0, 1) into N(0, sd^2): error falls at least as 1/n (DDIM) and faster (2M)."""
    error = {
        (method, n): abs(
            sample(optimal_denoiser(0.5), torch.ones(1, 1, dtype=torch.float64), SCHEDULE, n, method=method).item()
            / 0.5
            - 1
        )
        for method in ("ddim", "dpm++")
        for n in (25, 50, 100)
    }
    for n in (25, 50):
        assert error["ddim", 2 * n] < 0.6 * error["ddim", n]
        assert error["dpm++", n] < 0.5 * error["ddim", n]
    assert error["dpm++", 100] < 1e-3


@pytest.mark.parametrize("method", ["ddim", "dpm++", "ddpm"])
def test_a_perfect_denoiser_of_one_point_returns_that_point_without_noise(method):
    """x0 is a constant: whatever the start and the steps, the answer is that constant; noise at the last step would
    show."""
    point = 0.7

    def denoise(xt, t):
        a = SCHEDULE.alpha_bar(t, xt)
        return (a.sqrt() * xt - point) / (1 - a).sqrt()

    for start, steps in ((1.0, 8), (0.4, 3)):
        got = sample(denoise, noise(3, 1, 2, 2), SCHEDULE, steps, start, method, x0=0.1)
        assert torch.allclose(got, torch.full_like(got, point), atol=1e-4)


def test_warm_start_begins_at_its_time_with_the_guess():
    seen = []

    def spy(xt, t):
        seen.append((int(t[0]), xt.clone()))
        return torch.zeros_like(xt)

    eps, guess = noise(1, 1, 4, 4), torch.full((1, 1, 4, 4), 2.0)
    sample(spy, eps, SCHEDULE, steps=5, start=0.3, x0=guess)
    a = SCHEDULE.alpha_bar(torch.tensor([299]), eps)
    assert [t for t, _ in seen] == [299, 239, 179, 119, 59]
    assert torch.allclose(seen[0][1], a.sqrt() * guess + (1 - a).sqrt() * eps)


def test_ddpm_repeats_with_its_generator():
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample(dummy, noise(1, 1, 4, 4), SCHEDULE, 8, method="ddpm", generator=generator)

    assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4))


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"steps": 0}, "steps"), ({"start": 0.0}, "start"), ({"start": 1.2}, "start"), ({"method": "euler"}, "method")],
)
def test_impossible_settings_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        sample(dummy, noise(1, 1), SCHEDULE, **settings)
