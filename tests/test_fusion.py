"""What the fusion module and the denoiser promise by construction."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from mfdiff_lite.denoiser import ConditionalUNet
from mfdiff_lite.fusion import (
    HALO,
    REACH,
    SPREADS,
    WINDOW,
    GatedFusion,
    MultiModalityFusion,
    local_correlation,
    smooth,
    texture,
)
from mfdiff_lite.layers import Embedding, dose_scalar
from mfdiff_lite.model import fit_loss


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fusion():
    torch.manual_seed(0)
    module = MultiModalityFusion((8, 16, 32)).eval()
    torch.nn.init.normal_(module.head.weight, std=0.05)  # trained or not, the promises must hold
    return module


def test_smooth_is_a_gaussian_that_keeps_activity():
    x = torch.zeros(1, 3, 64, 64)
    x[0, 1, 32, 32] = 1
    got = smooth(x)[0, 0].numpy()
    assert got[:, 32] / got[:, 32].max() == pytest.approx(
        ndimage.gaussian_filter1d(np.eye(64)[32], 1.5)[:] / ndimage.gaussian_filter1d(np.eye(64)[32], 1.5).max(),
        abs=0.01,
    )
    assert smooth(torch.full((1, 3, 32, 32), 2.5)).numpy() == pytest.approx(2.5, rel=1e-5)


def test_local_correlation_knows_its_extremes_and_ignores_contrast():
    p = F.instance_norm(randn(2, 8, 16, 16))
    assert local_correlation(p, p).numpy() == pytest.approx(1, abs=1e-3)
    assert local_correlation(p, -p).numpy() == pytest.approx(-1, abs=1e-3)
    m = randn(2, 8, 16, 16, seed=1)
    inverted_gain = F.instance_norm(3 * m + 7)
    assert torch.allclose(local_correlation(p, F.instance_norm(m)), local_correlation(p, inverted_gain), atol=1e-4)
    assert local_correlation(p, F.instance_norm(m)).abs().mean() < 0.35


def test_local_sums_are_those_of_the_whole_neighbourhood():
    p, m = randn(2, 8, 16, 24), randn(2, 8, 16, 24, seed=1)
    heads = [x.reshape(2, 4, 2, 16, 24).sum(2) for x in (p * m, p * p, m * m)]
    box = torch.ones(4, 1, 5, 5)
    inside = F.conv2d(torch.ones(1, 1, 16, 24), box[:1], padding=2)
    pm, pp, mm = (F.conv2d(x, box, padding=2, groups=4) / inside for x in heads)
    assert torch.allclose(local_correlation(p, m), pm / (pp * mm + 1e-6).sqrt(), atol=1e-5)


def test_the_smoothed_lpet_keeps_its_precision_under_autocast():
    x = 10 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        under = smooth(x)
    assert under.dtype == torch.float32 and torch.equal(under, smooth(x))


def test_attention_sees_its_block_and_a_halo_round_it():
    torch.manual_seed(0)
    fuse, p, m = GatedFusion(8), randn(1, 8, 16, 16), randn(1, 8, 16, 16, seed=1)
    changed, at = m.clone(), 2 * WINDOW
    changed[:, :, at, at] += 1  # the first pixel of a block: the blocks before it see it in their halo
    difference = (fuse.attend(p, m) - fuse.attend(p, changed)).abs().sum(1)[0]
    sees = slice(at - WINDOW, at + WINDOW)
    assert (difference[sees, sees] > 0).all()
    difference[sees, sees] = 0
    assert difference.max() == 0


def test_every_pixel_sees_the_halo_to_all_sides():
    torch.manual_seed(0)
    fuse, p, m = GatedFusion(8), randn(1, 8, 16, 16), randn(1, 8, 16, 16, seed=1)
    before = fuse.attend(p, m)
    for x, y in ((7, 8), (8, 7), (8, 8), (11, 11)):
        for dx, dy in ((HALO, 0), (-HALO, 0), (0, HALO), (0, -HALO)):
            changed = m.clone()
            changed[:, :, x + dx, y + dy] += 1
            assert (fuse.attend(p, changed) - before)[0, :, x, y].abs().max() > 0


def test_attention_starts_as_a_gaussian_round_the_pixel():
    """With keys of nothing only the place decides, and each head has its own SD."""
    fuse = GatedFusion(8)
    torch.nn.init.zeros_(fuse.key_value.weight)
    weights = fuse.attention(randn(1, 8, 12, 12), randn(1, 8, 12, 12, seed=1))[0, :, 4, 5]  # at (HALO, HALO + 1)
    for head, spread in enumerate(SPREADS):
        x, y = np.arange(REACH) - HALO, np.arange(REACH) - HALO - 1
        gaussian = np.exp(-(x[:, None] ** 2 + y**2) / (2 * spread**2))
        np.testing.assert_allclose(weights[head].detach(), gaussian / gaussian.sum(), atol=1e-6)


def test_attention_weights_average_the_values():
    """With a value projection of the identity and constant MR features, whatever the query, the answer is that
    constant."""
    fuse = GatedFusion(8)
    with torch.no_grad():
        fuse.key_value.weight[8:, :, 0, 0] = torch.eye(8)
    constant = torch.arange(8.0).reshape(1, 8, 1, 1).expand(1, 8, 12, 12)
    inner = (..., slice(4, 8), slice(4, 8))  # blocks at the border also see the nothing beyond it
    assert torch.allclose(fuse.attend(randn(1, 8, 12, 12), constant)[inner], constant[inner], atol=1e-5)


def test_the_pictured_attention_is_the_one_that_is_used():
    """Weights sum to 1, and the weighted sum of the window's values is what `attend` returns."""
    torch.manual_seed(0)
    fuse, p, m = GatedFusion(8), 3 * randn(1, 8, 8, 12), 3 * randn(1, 8, 8, 12, seed=1)
    weights = fuse.attention(p, m)
    assert torch.allclose(weights.sum((-2, -1)), torch.ones(1, 4, 8, 12), atol=1e-5)
    v = F.pad(fuse.key_value(m)[:, 8:], (HALO,) * 4).reshape(1, 4, 2, 8 + 2 * HALO, 12 + 2 * HALO)
    x, y = 5, 9  # a pixel; its block and the halo, in coordinates of the padded map
    rows, columns = slice(4, 8 + 2 * HALO), slice(8, 12 + 2 * HALO)
    expected = torch.einsum("bnkl,bnckl->bnc", weights[:, :, x, y], v[..., rows, columns])
    assert torch.allclose(fuse.attend(p, m)[0, :, x, y], expected.flatten(), atol=1e-5)


def test_without_mr_nothing_of_the_mr_path_is_left():
    """An empty MR: gate and similarity say nothing, and no weight of the MR path changes the result."""
    torch.manual_seed(0)
    fusion, lpet, mr = MultiModalityFusion((8, 16), context=3), randn(2, 3, 32, 32), randn(2, 3, 32, 32, seed=1)
    mr[1] = 0
    dose = torch.tensor([20.0, 20.0])
    with torch.no_grad():
        fusion.head.weight.normal_()
        before = fusion(lpet, mr, dose)
        for part in (fusion.mr_encoder, *(f.key_value for f in fusion.fuse), *(f.refine for f in fusion.fuse)):
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter))
        after = fusion(lpet, mr, dose)
    assert torch.equal(before.coarse[1], after.coarse[1]) and torch.equal(before.feature[1], after.feature[1])
    assert not torch.allclose(before.coarse[0], after.coarse[0], atol=1e-3)
    assert after.similarity[1].abs().max() == 0 and after.gate[1].max() == 0 < after.gate[0].min()


def test_texture_of_white_noise_is_known_in_closed_form():
    """Variance that a mean over 3, 7, 15 pixels leaves of white noise: 1/9, 1/49, 1/225, all inside the next one."""
    white = 1 + 0.3 * randn(4, 5, 128, 128)
    left = torch.tensor([1, 1 / 9, 1 / 49, 1 / 225])
    expected = torch.log(0.09 * (left[:-1] - left[1:]) + 1e-4) / 4 + 1
    found = texture(white)
    torch.testing.assert_close(found[:, :3].mean(0), expected, atol=0.02, rtol=0)
    assert found[:, 3].abs().max() < 0.02
    neighbours = 1 + 0.3 * (randn(4, 6, 128, 128)[:, 1:] + randn(4, 6, 128, 128)[:, :-1]) / 2**0.5
    torch.testing.assert_close(texture(neighbours)[:, 3], torch.full((4,), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(texture(white[:, :1].expand(-1, 5, -1, -1))[:, 3], torch.ones(4))
    torch.testing.assert_close(texture(white[:, :1])[:, 3], torch.zeros(4))  # nothing to compare
    assert texture(torch.zeros(1, 5, 32, 32)).isfinite().all()


def test_fit_weighs_the_whole_mr_branch(fusion):
    """At 0 it is restoring without MR, whatever the gate says; and the gate that is shown is what gets in."""
    lpet, mr, dose = randn(2, 3, 32, 32), randn(2, 3, 32, 32, seed=1), torch.tensor([20.0, 20.0])
    with torch.no_grad():
        trusted, none = fusion(lpet, mr, dose), fusion(lpet, torch.zeros_like(mr), dose)
        fusion.fits.net[-1].bias.fill_(-1e4)
        refused = fusion(lpet, mr, dose)
    assert ((trusted.fit > 0.5) & (trusted.fit < 1)).all() and not none.fit.any() and not refused.fit.any()
    assert not torch.allclose(trusted.coarse, none.coarse, atol=1e-4)
    torch.testing.assert_close(refused.coarse, none.coarse)
    assert not refused.gate.any()


def test_the_loss_of_fit_is_the_entropy_where_the_truth_is_known():
    fit, truth = torch.tensor([0.9, 0.2, 0.5, 1.0]), torch.tensor([1.0, 0.0, -1.0, 1.0])
    expected = -(np.log(0.9) + np.log(0.8) + np.log(1 - 1e-4)) / 4
    assert fit_loss(fit, truth).item() == pytest.approx(expected, rel=1e-5)
    assert fit_loss(fit.bfloat16(), truth).isfinite()


def test_a_closed_gate_returns_the_pet_features_exactly():
    fuse, p, m = GatedFusion(8), randn(1, 8, 8, 8), randn(1, 8, 8, 8, seed=1)
    with torch.no_grad():
        fuse.gate.weight.zero_()
        fuse.gate.bias.fill_(-1e4)
    fused, gate, _ = fuse(p, m)
    assert torch.equal(fused, p) and gate.max() == 0


def test_at_the_start_the_mr_comes_through_as_strong_as_it_is_and_the_gate_is_half_open():
    """Weaker values or a gate nearly closed, and 500 steps of training learn nothing from the MR."""
    torch.manual_seed(4)
    fuse, (p, m) = GatedFusion(64), torch.randn(2, 4, 64, 16, 16)
    with torch.no_grad():
        values, gate = fuse.key_value(m)[:, 64:], fuse(p, m)[1]
        refined = fuse.refine(values)
    assert values.std().item() == pytest.approx(1, rel=0.1) and refined.std().item() == pytest.approx(1, rel=0.15)
    assert gate.mean().item() == pytest.approx(0.5, abs=0.02)


def test_gate_and_similarity_stay_in_range(fusion):
    fused = fusion(5 * randn(2, 3, 32, 64), 5 * randn(2, 3, 32, 64, seed=1), torch.tensor([4.0, 100.0]))
    assert 0 <= fused.gate.min() and fused.gate.max() <= 1
    assert -1.001 <= fused.similarity.min() and fused.similarity.max() <= 1.001


def test_an_untrained_module_starts_as_the_gaussian_filter():
    module = MultiModalityFusion((8, 16, 32))
    lpet = randn(1, 3, 32, 32).abs()
    assert torch.equal(module(lpet, randn(1, 3, 32, 32), torch.tensor([20.0])).coarse, smooth(lpet))


def test_mr_gain_does_not_matter_to_the_fusion_but_its_structure_does(fusion):
    lpet, mr, dose = randn(1, 3, 32, 32).abs(), randn(1, 3, 32, 32, seed=1), torch.tensor([20.0])
    base = fusion(lpet, mr, dose).coarse
    assert (fusion(lpet, mr.flip(-1), dose).coarse - base).abs().max() > 1e-4
    assert (
        fusion(lpet, mr, torch.tensor([80.0])).coarse - base
    ).abs().max() == 0  # FiLM starts at zero: learned, not given


def test_slices_of_a_batch_do_not_see_each_other(fusion):
    lpet, mr, dose = randn(3, 3, 32, 32).abs(), randn(3, 3, 32, 32, seed=1), torch.tensor([4.0, 20.0, 100.0])
    together = fusion(lpet, mr, dose)
    alone = fusion(lpet[1:2], mr[1:2], dose[1:2])
    assert torch.allclose(together.coarse[1:2], alone.coarse, atol=1e-5)
    assert torch.allclose(together.feature[1:2], alone.feature, atol=1e-5)


def test_the_denoiser_has_no_road_for_raw_mr_and_uses_each_of_its_conditions():
    torch.manual_seed(0)
    net = ConditionalUNet((8, 16, 32), feature=8)
    torch.nn.init.normal_(net.head.weight, std=0.1)
    for module in net.modules():
        if hasattr(module, "film"):
            torch.nn.init.normal_(module.film.weight, std=0.1)
    given = {
        "xt": randn(1, 1, 32, 32),
        "time": torch.tensor([0.4]),
        "lpet": randn(1, 1, 32, 32, seed=1),
        "feature": randn(1, 8, 16, 16, seed=2),
        "dose_reduction": torch.tensor([20.0]),
    }
    base = net(**given)
    for name, value in given.items():
        assert (net(**{**given, name: value * 1.5}) - base).abs().max() > 1e-5, name
    assert "mr" not in given


def test_dose_scalar_and_embedding_tell_doses_apart():
    doses = torch.tensor([4.0, 20.0, 100.0])
    assert dose_scalar(doses).numpy() == pytest.approx([-1, 0, 1], abs=1e-6)
    torch.manual_seed(0)
    codes = Embedding(1, 16)(dose_scalar(doses))
    assert torch.cdist(codes, codes)[~torch.eye(3, dtype=bool)].min() > 0.05
