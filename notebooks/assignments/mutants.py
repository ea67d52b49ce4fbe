"""Wrong solutions that must lose points, and right but unusual ones that must not: what the checks are worth.

    python notebooks/assignments/mutants.py             # a table: which checks each of them fails

Each is the course's own solution with pieces of its exercises replaced. They run in this process, without a kernel and
without the pictures. `lost` names checks that must fail; others may fail with them. Change a check of a private copy,
and run this again.
"""

import contextlib
import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import course


@dataclass(frozen=True)
class Variant:
    """A solution that differs from the course's: `changes` old -> new text; every old text occurs once."""

    assignment: str
    what: str
    changes: dict[str, str]
    lost: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        """For tables and tests."""
        return f"{self.assignment[:2]}: {self.what}"


class Bench:
    """One assignment in this process: the given cells run once, then exercises and checks for each variant."""

    def __init__(self, name: str):
        import matplotlib

        matplotlib.use("Agg")
        self.source = course.solution_copy(course.sources([name])[name])
        code = [cell for cell in self.source.cells if cell.cell_type == "code"]
        self.exercises = [cell for cell in code if course.tagged(cell, "exercise")]
        self.checks = {course.number(cell): cell for cell in code if course.tagged(cell, "check", "hidden")}
        self.given: dict[str, Any] = {"__name__": name}
        for cell in code:
            if not course.tagged(cell, "exercise", "check", "hidden", "look", "picture"):
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(cell.source, self.given)

    def failed(self, changes: dict[str, str], only: Iterable[int] | None = None) -> dict[int, str]:
        """Number -> message of the checks that fail, of all or of `only`. Raises ValueError for a text not there."""
        space = dict(self.given)
        text = "\n".join(cell.source for cell in self.exercises)
        for old, new in changes.items():
            if text.count(old) != 1:
                raise ValueError(
                    f"{self.given['__name__']}: expected {old!r} once in the exercises, found {text.count(old)}"
                )
            text = text.replace(old, new)
        exec(text, space)
        found = {}
        for number in self.checks if only is None else sorted(only):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(self.checks[number].source, space)
            except Exception as error:  # whatever a wrong solution comes to
                found[number] = f"{type(error).__name__}: {error}"
        return found


def _wrong(assignment: str, what: str, lost: set[int], changes: dict[str, str]) -> Variant:
    return Variant(assignment, what, changes, frozenset(lost))


COUNTS, GATE, DDIM, TRAINING, SHIFT, TABLE = "01_counts", "02_gate", "03_ddim", "04_training", "05_shift", "06_table"

# Wrong solutions: what they do, the checks that must fail, old -> new.
MUTANTS = [
    _wrong(COUNTS, "draws from NumPy's global generator", {1}, {"rng.binomial": "np.random.binomial"}),
    _wrong(COUNTS, "ignores rng for one of its own", {1}, {"rng.binomial": "np.random.default_rng(0).binomial"}),
    _wrong(
        COUNTS,
        "the same coins whenever it is asked",
        {1},
        {"rng.binomial": "__import__('copy').deepcopy(rng).binomial"},
    ),
    _wrong(
        COUNTS,
        "divides and rounds",
        {1, 2, 3},
        {"rng.binomial(counts, 1 / dose_reduction)": "np.rint(counts / dose_reduction)"},
    ),
    _wrong(
        COUNTS,
        "noise on noise",
        {1, 2},
        {"rng.binomial(counts, 1 / dose_reduction)": "rng.poisson(counts / dose_reduction)"},
    ),
    _wrong(
        COUNTS,
        "one coin for all counts of a bin",
        {2},
        {"rng.binomial(counts, 1 / dose_reduction)": "counts * (rng.random(counts.shape) < 1 / dose_reduction)"},
    ),
    _wrong(
        COUNTS,
        "relative noise without the root",
        {4},
        {"np.sqrt(dose_reduction / mean_counts)": "dose_reduction / mean_counts"},
    ),
    _wrong(COUNTS, "largest dose reduction ignores the limit", {4}, {"limit**2 * mean_counts": "0.01 * mean_counts"}),
    _wrong(
        COUNTS,
        "correlates images, not their noise",
        {5},
        {
            "(standard_counts - mean).ravel(), (low_counts - mean / dose_reduction)": "standard_counts.ravel(), low_counts"
        },
    ),
    _wrong(
        COUNTS,
        "the known answer as a constant",
        {5},
        {
            "np.corrcoef((standard_counts - mean).ravel(), (low_counts - mean / dose_reduction).ravel())[0, 1]": "dose_reduction**-0.5"
        },
    ),
    _wrong(
        COUNTS,
        "scale: mean with all the air",
        {6, 7},
        {"lpet[smooth > 0.35 * np.percentile(smooth, 98)].mean()": "lpet.mean()"},
    ),
    _wrong(COUNTS, "scale: width of the filter in pixels", {6}, {"sd = 8 / pixel_size": "sd = 2"}),
    _wrong(
        COUNTS,
        "scale: head found without smoothing",
        {6},
        {"smooth = ndimage.gaussian_filter(lpet, (sd, sd, 0))": "smooth = lpet"},
    ),
    _wrong(
        GATE,
        "normalises over the batch too",
        {1, 2},
        {"x.mean((2, 3), keepdim=True)": "x.mean((0, 2, 3), keepdim=True)"},
    ),
    _wrong(GATE, "normalisation ignores eps", {2}, {"keepdim=True) + eps).sqrt()": "keepdim=True) + 1e-5).sqrt()"}),
    _wrong(
        GATE,
        "similarity ignores the radius",
        {4},
        {"2 * radius + 1, stride=1, padding=radius": "5, stride=1, padding=2"},
    ),
    _wrong(GATE, "similarity of the first channel only", {4}, {"product.sum(1, keepdim=True)": "product[:, :1]"}),
    _wrong(GATE, "similarity without its sign", {3}, {"return pooled(p * m) /": "return pooled(p * m).abs() /"}),
    _wrong(GATE, "similarity replaced by zeros", {9}, {"local_similarity(pn, mn)": "torch.zeros_like(p[:, :1])"}),
    _wrong(
        GATE,
        "gate sees neither PET nor similarity",
        {9},
        {"[pn, r, local_similarity(pn, mn)]": "[r, r, r.mean(1, keepdim=True)]"},
    ),
    _wrong(GATE, "gate sees the PET as it is", {9}, {"[pn, r, local": "[p, r, local"}),
    _wrong(GATE, "refine with a bias", {6}, {"channels, 1, bias=False": "channels, 1"}),
    _wrong(
        GATE,
        "refine with a bias, off only for a batch of empty MRs",
        {6},
        {"channels, 1, bias=False": "channels, 1", "r = self.refine(mn)": "r = self.refine(mn) * bool(m.any())"},
    ),
    _wrong(
        GATE,
        "the first head's MR for the whole batch",
        {8},
        {"instance_norm(p), instance_norm(m)": "instance_norm(p), instance_norm(m[:1].expand_as(m))"},
    ),
    _wrong(
        GATE,
        "one gate for all channels",
        {9},
        {
            "2 * channels + 1, channels, 3": "2 * channels + 1, 1, 3",
            "return p + g * r, g, r": "return p + g * r, g.expand_as(p), r",
        },
    ),
    _wrong(
        GATE,
        "the gate is a constant",
        {7, 9},
        {"torch.sigmoid(self.gate(torch.cat([pn, r, local_similarity(pn, mn)], dim=1)))": "torch.full_like(p, 0.27)"},
    ),
    _wrong(GATE, "the MR branch learns nothing", {9}, {"r = self.refine(mn)": "r = self.refine(mn).detach()"}),
    _wrong(GATE, "MR not normalised", {8}, {"r = self.refine(mn)": "r = self.refine(m)"}),
    _wrong(
        DDIM,
        "shares in place of their roots",
        {2},
        {"alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise": "alpha_bar * x0 + (1 - alpha_bar) * noise"},
    ),
    _wrong(
        DDIM,
        "v the wrong way round",
        {3},
        {
            "alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0": "(1 - alpha_bar).sqrt() * x0 - alpha_bar.sqrt() * noise"
        },
    ),
    _wrong(
        DDIM,
        "inverts as if v were the noise",
        {4, 5, 6, 7, 9},
        {"a * xt - b * v, b * xt + a * v": "(xt - b * v) / a, b * xt + a * v"},
    ),
    _wrong(
        DDIM,
        "fresh noise in a step",
        {5, 6},
        {"diffuse(x0, noise, next_alpha_bar)": "diffuse(x0, torch.randn_like(xt), next_alpha_bar)"},
    ),
    _wrong(
        DDIM,
        "a step ignores where it should go",
        {5, 6},
        {"diffuse(x0, noise, next_alpha_bar)": "diffuse(x0, noise, alpha_bar + (1 - alpha_bar) / 2)"},
    ),
    _wrong(DDIM, "the sampler ignores its noise", {9}, {"    xt = noise\n": "    xt = torch.ones_like(noise)\n"}),
    _wrong(DDIM, "denoiser asked at the next level", {9}, {"denoise(xt, now)": "denoise(xt, following)"}),
    _wrong(
        DDIM,
        "the sampler jumps to the end",
        {7, 9},
        {"zip(alpha_bars[:-1], alpha_bars[1:], strict=True)": "[(alpha_bars[0], alpha_bars[-1])]"},
    ),
    _wrong(
        DDIM, "denoiser ignores the SD of the prior", {8, 9}, {"a * sd**2 / (alpha_bar * sd**2 + 1 - alpha_bar)": "a"}
    ),
    _wrong(
        DDIM,
        "denoiser always says the mean",
        {8, 9},
        {"mean + a * sd**2 / (alpha_bar * sd**2 + 1 - alpha_bar) * (xt - a * mean)": "mean + 0 * xt"},
    ),
    _wrong(
        TRAINING,
        "coarse loss takes the weights as they are",
        {1},
        {"(weight / weight.mean() * residual**2)": "(weight * residual**2)"},
    ),
    _wrong(
        TRAINING,
        "coarse loss ignores the weights",
        {2},
        {"return (weight / weight.mean() * residual**2).mean()": "return (residual**2).mean()"},
    ),
    _wrong(TRAINING, "coarse loss of the first head only", {3}, {"residual**2).mean()\n": "residual**2)[0].mean()\n"}),
    _wrong(
        TRAINING,
        "coarse loss ignores the dose",
        {3},
        {"(spet - coarse) / residual_sd(dose)": "(spet - coarse) / residual_sd(torch.full_like(dose, 20.0))"},
    ),
    _wrong(
        TRAINING,
        "diffusion pulls at the coarse estimate",
        {5},
        {'residual_sd(batch["dose"])).detach()': 'residual_sd(batch["dose"]))'},
    ),
    _wrong(
        TRAINING,
        "diffusion cannot teach the feature",
        {5},
        {'batch["lpet"], fused.feature, batch["dose"])\n': 'batch["lpet"], fused.feature.detach(), batch["dose"])\n'},
    ),
    _wrong(TRAINING, "the denoiser is told a constant time", {4}, {"t / model.schedule.length": "0 * t + 0.5"}),
    _wrong(TRAINING, "the diffusion is never trained", {6}, {"(coarse + rest).backward()": "coarse.backward()"}),
    _wrong(TRAINING, "only the diffusion is trained", {6}, {"(coarse + rest).backward()": "rest.backward()"}),
    _wrong(
        TRAINING,
        "the diffusion counts a tenth",
        {6},
        {"(coarse + rest).backward()": "(coarse + 0.1 * rest).backward()"},
    ),
    _wrong(TRAINING, "climbs", {6}, {"(coarse + rest).backward()": "(-coarse - rest).backward()"}),
    _wrong(TRAINING, "climbs the diffusion loss", {6}, {"(coarse + rest).backward()": "(coarse - rest).backward()"}),
    _wrong(
        TRAINING, "no limit on the gradient", {6}, {"    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n": ""}
    ),
    _wrong(TRAINING, "old gradients stay", {6}, {"    optimizer.zero_grad()\n": ""}),
    _wrong(
        TRAINING, "always the same four heads", {7}, {"rng.choice(len(heads), batch, replace=False)": "range(batch)"}
    ),
    _wrong(
        TRAINING,
        "the same noise in every step",
        {7},
        {
            "    losses = []\n    for": "    losses, frozen = [], np.random.default_rng(seed).integers(2**31)\n    for",
            "rng.standard_normal(tuple": "np.random.default_rng(frozen).standard_normal(tuple",
        },
    ),
    _wrong(
        TRAINING,
        "one noise image for all heads of a step",
        {7},
        {
            "losses.append(train_step(model, optimizer, chosen, t, noise))": "losses.append(train_step(model, optimizer, chosen, t, noise[:1].expand_as(noise)))"
        },
    ),
    _wrong(TRAINING, "one time for all", {7}, {"rng.integers(0, model.schedule.length, batch)": "np.full(batch, 500)"}),
    _wrong(
        TRAINING,
        "low noise only",
        {7},
        {"rng.integers(0, model.schedule.length, batch)": "rng.integers(0, 300, batch)"},
    ),
    _wrong(TRAINING, "learning rate ignored", {7}, {"lr=lr": "lr=4e-3"}),
    _wrong(TRAINING, "seed ignored", {7}, {"default_rng(seed)": "default_rng(0)"}),
    _wrong(TRAINING, "nothing is seeded", {7}, {"default_rng(seed)": "default_rng()"}),
    _wrong(
        TRAINING,
        "the optimizer knows the fusion only",
        {7},
        {"AdamW(model.parameters()": "AdamW(model.fusion.parameters()"},
    ),
    _wrong(
        TRAINING,
        "the optimizer knows the denoiser only",
        {7},
        {"AdamW(model.parameters()": "AdamW(model.denoiser.parameters()"},
    ),
    _wrong(SHIFT, "thins twice", {2}, {"sinogram.split(seed)": "(sinogram.thin(2, seed), sinogram.thin(2, seed + 1))"}),
    _wrong(SHIFT, "halves ignore the seed", {1}, {"sinogram.split(seed)": "sinogram.split(0)"}),
    _wrong(SHIFT, "the whole for a half", {2}, {"scanner.reconstruct(second)": "scanner.reconstruct(sinogram)"}),
    _wrong(
        SHIFT,
        "each half compared with itself",
        {4, 5, 6},
        {"(restore(a) - b)": "(restore(a) - a)", "(restore(b) - a)": "(restore(b) - b)"},
    ),
    _wrong(
        SHIFT,
        "one direction only",
        {3},
        {
            "np.mean((restore(a) - b)[brain] ** 2) + np.mean((restore(b) - a)[brain] ** 2)": "2 * np.mean((restore(a) - b)[brain] ** 2)"
        },
    ),
    _wrong(
        SHIFT,
        "the loss ignores the brain",
        {3},
        {
            "np.mean((restore(a) - b)[brain] ** 2) + np.mean((restore(b) - a)[brain] ** 2)": "np.mean((restore(a) - b) ** 2) + np.mean((restore(b) - a) ** 2)"
        },
    ),
    _wrong(SHIFT, "chooses the worst width", {5, 6}, {"return min(widths": "return max(widths"}),
    _wrong(
        SHIFT,
        "a constant width",
        {6},
        {"return min(widths, key=lambda fwhm: split_loss(lambda image: blur(image, fwhm), a, b, brain))": "return 8.0"},
    ),
    _wrong(SHIFT, "SURE without its price", {7, 8}, {" + 2 / e * n * change)[brain]": ")[brain]"}),
    _wrong(SHIFT, "half the price", {7}, {"+ 2 / e * n": "+ 1 / e * n"}),
    _wrong(SHIFT, "the step is forgotten", {7, 8}, {"+ 2 / e * n": "+ 2 * n"}),
    _wrong(
        SHIFT, "the price of the image, not of its change", {7}, {"restore(y + e * n) - restore(y)": "restore(e * n)"}
    ),
    _wrong(SHIFT, "SURE ignores the brain", {7}, {"n * change)[brain]": "n * change)"}),
    _wrong(
        SHIFT,
        "audits lesion 2 whatever is asked",
        {9},
        {"lesions, label, brain) for one": "lesions, 2, brain) for one"},
    ),
    _wrong(
        SHIFT,
        "audits another PET than the one given",
        {9},
        {"restore(lpet, one), lesions": "restore(activity, one), lesions"},
    ),
    _wrong(
        SHIFT, "the audit loses its sign", {9}, {"return with_lesion - without": "return abs(with_lesion - without)"}
    ),
    _wrong(SHIFT, "a dark ghost passes", {10}, {"if abs(leak) <=": "if leak <="}),
    _wrong(SHIFT, "the limit is ignored", {10}, {"if abs(leak) <= leak_limit": "if True"}),
    _wrong(
        TABLE,
        "peak of the tested image",
        {1, 2},
        {
            'np.percentile(reference[chosen], 99.9) if peak_of == "reference" else image[chosen].max()': "image[chosen].max()"
        },
    ),
    _wrong(TABLE, "air counts", {1}, {'mask if where == "mask" else np.ones_like(mask)': "np.ones_like(mask)"}),
    _wrong(TABLE, "the way of averaging is ignored", {2, 3}, {'if average == "MSE":': "if False:"}),
    _wrong(
        TABLE,
        "the first subject only",
        {1, 2},
        {"for image, reference, mask in subjects:": "for image, reference, mask in subjects[:1]:"},
    ),
    _wrong(
        TABLE,
        "always calls a table honest",
        {4},
        {"return min(ways, key=lambda way: abs(table_value(subjects, *way) - claimed))": "return ways[0]"},
    ),
    _wrong(TABLE, "the way that is farthest off", {4, 5}, {"return min(ways": "return max(ways"}),
    _wrong(
        TABLE,
        "compares names, not anatomies",
        {6},
        {
            'known = {name.rpartition("-")[0] for name in training_names}': "known = set(training_names)",
            'if name.rpartition("-")[0] not in known': "if name not in known",
        },
    ),
    _wrong(
        TABLE,
        "cuts an anatomy at its first dash",
        {6},
        {
            'known = {name.rpartition("-")[0] for name in training_names}': 'known = {name.partition("-")[0] for name in training_names}',
            'if name.rpartition("-")[0] not in known': 'if name.partition("-")[0] not in known',
        },
    ),
    _wrong(
        TABLE, "the opponent is tuned on the test patients", {7}, {"tune(gaussian, validation,": "tune(gaussian, test,"}
    ),
    _wrong(TABLE, "the opponent is not tuned", {7}, {'tune(gaussian, validation, fwhm=widths)["fwhm"]': "widths[0]"}),
    _wrong(
        TABLE,
        "slices as patients",
        {8},
        {"np.array([scores[patients == one].mean() for one in np.unique(patients)])": "scores"},
    ),
    _wrong(TABLE, "normal in place of Student", {8}, {"stats.t.ppf(0.975, len(means) - 1)": "1.96"}),
    _wrong(TABLE, "SD divided by n", {8}, {"ddof=1": "ddof=0"}),
    _wrong(
        TABLE,
        "each column without its own failures",
        {9},
        {"float(gains[both].mean())": "float(np.nanmean(ours) - np.nanmean(theirs))"},
    ),
    _wrong(TABLE, "failures are not counted", {9}, {"int((~both).sum())": "0"}),
    _wrong(
        TABLE,
        "theirs minus ours",
        {9},
        {"np.asarray(ours, float) - np.asarray(theirs, float)": "np.asarray(theirs, float) - np.asarray(ours, float)"},
    ),
]

# Right, but not as most would write it: every point is due.
UNUSUAL = [
    Variant(
        COUNTS,
        "one coin per count, in a loop",
        {
            "return rng.binomial(counts, 1 / dose_reduction)": "kept = [(rng.random(int(n)) < 1 / dose_reduction).sum() for n in counts.ravel()]\n"
            "    return np.array(kept).reshape(counts.shape)"
        },
    ),
    Variant(
        COUNTS,
        "every bin in units of its own SD before correlating",
        {
            "np.corrcoef((standard_counts - mean).ravel(), (low_counts - mean / dose_reduction).ravel())[0, 1]": "np.corrcoef(((standard_counts - mean) / np.sqrt(mean)).ravel(), "
            "((low_counts - mean / dose_reduction) / np.sqrt(mean / dose_reduction)).ravel())[0, 1]"
        },
    ),
    Variant(
        COUNTS,
        "head by Otsu's threshold",
        {
            "smooth > 0.35 * np.percentile(smooth, 98)": "smooth > __import__('skimage.filters').filters.threshold_otsu(smooth)"
        },
    ),
    Variant(
        GATE,
        "similarity by a convolution of ones",
        {
            "return F.avg_pool2d(summed, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)": "return F.conv2d(summed, torch.ones(1, 1, 2 * radius + 1, 2 * radius + 1), padding=radius)"
        },
    ),
    Variant(
        GATE,
        "similarity by unfolding",
        {
            "    return pooled(p * m) / (pooled(p * p) * pooled(m * m) + eps).sqrt()": "    k, (b, _, h, w) = 2 * radius + 1, p.shape\n"
            "    one, other = (F.unfold(x, k, padding=radius) for x in (p, m))\n"
            "    return F.cosine_similarity(one, other, dim=1, eps=eps).reshape(b, 1, h, w)"
        },
    ),
    Variant(
        GATE, "channels in another order", {"[pn, r, local_similarity(pn, mn)]": "[local_similarity(pn, mn), r, pn]"}
    ),
    Variant(
        GATE,
        "refine in two layers without bias",
        {
            "nn.Conv2d(channels, channels, 1, bias=False)": "nn.Sequential(nn.Conv2d(channels, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, channels, 1, bias=False))"
        },
    ),
    Variant(
        DDIM,
        "a step as a rotation",
        {
            "    x0, noise = invert(xt, v, alpha_bar)\n    return diffuse(x0, noise, next_alpha_bar)": "    turn = torch.arccos(alpha_bar.sqrt()) - torch.arccos(next_alpha_bar.sqrt())\n"
            "    return torch.cos(turn) * xt - torch.sin(turn) * v"
        },
    ),
    Variant(
        DDIM,
        "the sampler calls itself",
        {
            "    xt = noise\n    for now, following in zip(alpha_bars[:-1], alpha_bars[1:], strict=True):\n"
            "        xt = ddim_step(xt, denoise(xt, now), now, following)\n    return xt": "    if len(alpha_bars) == 1:\n        return noise\n"
            "    xt = ddim_step(noise, denoise(noise, alpha_bars[0]), alpha_bars[0], alpha_bars[1])\n"
            "    return sample(denoise, xt, alpha_bars[1:])"
        },
    ),
    Variant(
        DDIM,
        "the last step returns its x0",
        {
            "        xt = ddim_step(xt, denoise(xt, now), now, following)\n    return xt": "        v = denoise(xt, now)\n        x0, _ = invert(xt, v, now)\n        xt = ddim_step(xt, v, now, following)\n    return x0"
        },
    ),
    Variant(
        DDIM,
        "E[v | xt] by regression",
        {
            "    x0 = mean + a * sd**2 / (alpha_bar * sd**2 + 1 - alpha_bar) * (xt - a * mean)\n"
            "    return (a * xt - x0) / (1 - alpha_bar).sqrt()": "    b, spread = (1 - alpha_bar).sqrt(), alpha_bar * sd**2 + 1 - alpha_bar\n"
            "    return -b * mean + a * b * (1 - sd**2) / spread * (xt - a * mean)"
        },
    ),
    Variant(
        DDIM,
        "v from x_t and x0",
        {
            "    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0\n": "    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()\n"
            "    return torch.where(b > 0, (a * diffuse(x0, noise, alpha_bar) - x0) / b.clamp(min=1e-6), noise)\n"
        },
    ),
    Variant(
        TRAINING,
        "heads in shuffled rounds, two backward passes, torch's generator",
        {
            "        chosen = collate([heads[i] for i in rng.choice(len(heads), batch, replace=False)])\n": "        queue = queue if len(queue) >= batch else torch.randperm(len(heads), generator=draws).tolist()\n"
            "        chosen, queue = collate([heads[i] for i in queue[:batch]]), queue[batch:]\n",
            "    rng = np.random.default_rng(seed)\n": "    draws, queue = torch.Generator().manual_seed(seed), []\n",
            "torch.from_numpy(rng.integers(0, model.schedule.length, batch))": "torch.randint(model.schedule.length, (batch,), generator=draws)",
            'torch.from_numpy(rng.standard_normal(tuple(chosen["spet"].shape), dtype=np.float32))': 'torch.randn(chosen["spet"].shape, generator=draws)',
            "(coarse + rest).backward()": "coarse.backward(retain_graph=True)\n    rest.backward()",
        },
    ),
    Variant(
        SHIFT,
        "deals the counts by hand",
        {
            "    first, second = sinogram.split(seed)": "    import dataclasses\n"
            "    kept = np.random.default_rng(seed).binomial(sinogram.counts.astype(int), 0.5).astype(np.float32)\n"
            "    pair = (kept, sinogram.counts - kept)\n"
            "    first, second = (dataclasses.replace(sinogram.thin(2, 0), counts=half) for half in pair)"
        },
    ),
    Variant(
        SHIFT,
        "a weighted sum over a sum of weights",
        {
            "np.mean((restore(a) - b)[brain] ** 2) + np.mean((restore(b) - a)[brain] ** 2)": "np.sum(brain * ((restore(a) - b) ** 2 + (restore(b) - a) ** 2)) / brain.sum()"
        },
    ),
    Variant(
        SHIFT,
        "widths by a list of losses",
        {
            "return min(widths, key=lambda fwhm: split_loss(lambda image: blur(image, fwhm), a, b, brain))": "return widths[int(np.argmin([split_loss(lambda x, w=w: blur(x, w), a, b, brain) for w in widths]))]"
        },
    ),
    Variant(
        SHIFT,
        "one half against the other, and back, for the width",
        {
            "split_loss(lambda image: blur(image, fwhm), a, b, brain))": "((blur(a, fwhm) - b)[brain] ** 2).sum() + ((blur(b, fwhm) - a)[brain] ** 2).sum())"
        },
    ),
    Variant(
        SHIFT,
        "the two terms of SURE apart, the change from both sides",
        {
            "restore(y + e * n) - restore(y)": "(restore(y + e * n) - restore(y - e * n)) / 2",
            "float(np.mean(((restore(y) - y) ** 2 + 2 / e * n * change)[brain]))": "((restore(y) - y)[brain] ** 2).mean() + 2 * (n * change)[brain].mean() / e",
        },
    ),
    Variant(
        SHIFT,
        "candidates sorted by loss",
        {"    return min(kept, key=kept.get)": "    return sorted(kept, key=lambda name: kept[name])[0]"},
    ),
    Variant(
        TABLE,
        "PSNR as a difference of logarithms",
        {
            "float(np.mean(10 * np.log10(peaks / errors)))": "float(10 * (np.log10(peaks).mean() - np.log10(errors).mean()))"
        },
    ),
    Variant(
        TABLE,
        "nested loops over the ways",
        {
            "    return min(ways, key=lambda way: abs(table_value(subjects, *way) - claimed))": "    best = None\n    for way in ways:\n        off = abs(table_value(subjects, *way) - claimed)\n"
            "        best = (off, way) if best is None or off < best[0] else best\n    return best[1]"
        },
    ),
    Variant(
        TABLE,
        "the interval by SciPy",
        {
            "    return means.mean(), means.mean() - half, means.mean() + half": "    return (means.mean(), *stats.t.interval(0.95, len(means) - 1, means.mean(), stats.sem(means)))"
        },
    ),
]


def measure() -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """Name of each mutant, and of each unusual solution -> numbers of the checks that it fails, all checks run."""
    benches: dict[str, Bench] = {}
    found = []
    for variants in (MUTANTS, UNUSUAL):
        failed = {}
        for one in variants:
            if one.assignment not in benches:
                benches[one.assignment] = Bench(one.assignment)
            failed[one.name] = set(benches[one.assignment].failed(one.changes))
        found.append(failed)
    return found[0], found[1]


if __name__ == "__main__":
    wrong, right = measure()
    for name, failed in wrong.items():
        print(f"{'caught  ' if failed else 'SURVIVES'}  {name}: {', '.join(map(str, sorted(failed))) or 'full marks'}")
    for name, failed in right.items():
        print(f"{'LOSES   ' if failed else 'full    '}  {name}: {', '.join(map(str, sorted(failed))) or 'full marks'}")
    sys.exit(any(right.values()) or not all(wrong.values()))
