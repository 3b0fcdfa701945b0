"""The mixture head against naive computations in float64: distances, divergences, the losses and their order, draws."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rdpm_cli.generator import mixture
from rdpm_cli.generator.mixture import Mixture, MixtureHead

B, L, K, H, R, WIDTH = 2, 5, 7, 6, 3, 8


def tensors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_mixture(components: int = K, spread: float = 1.0, rows: int = B) -> Mixture:
    return Mixture(
        logits_BLK=tensors(rows, L, components, seed=1),
        low_BLKr=spread * tensors(rows, L, components, R, seed=2),
        shift_BLH=tensors(rows, L, H, seed=3),
        scale_BL=tensors(rows, L, seed=4).exp(),
        means_KH=tensors(components, H, seed=5),
        basis_Hr=tensors(H, R, seed=6),
    )


def means_of(mix: Mixture) -> Tensor:
    """mu_c in float64, (B, L, K, H), which the package never holds."""
    low = mix.low_BLKr.double() @ mix.basis_Hr.double().T
    return mix.shift_BLH.double().unsqueeze(2) + mix.means_KH.double() + low


def naive_kl(mix: Mixture, w: Tensor, sp: Tensor) -> Tensor:
    """KL of two isotropic Gaussians, a component at a time, float64."""
    q = Normal(w.double()[:, :, None], sp.double()[:, :, None, None])
    return kl_divergence(q, Normal(means_of(mix), mix.scale_BL.double()[:, :, None, None])).sum(-1)


W, SP = tensors(B, L, H, seed=7), 0.3 + tensors(B, L, seed=8).abs()


def test_divergences_are_those_of_gaussians_and_not_negative() -> None:
    mix = some_mixture()
    naive = (W.double().unsqueeze(2) - means_of(mix)).pow(2).sum(-1)
    torch.testing.assert_close(mixture.squared_distances(mix, W).double(), naive, rtol=1e-4, atol=1e-4)
    kl = mixture.divergences(mix, W, SP)
    torch.testing.assert_close(kl.double(), naive_kl(mix, W, SP), rtol=1e-4, atol=1e-3)
    assert float(kl.min()) >= 0
    exact = Mixture(mix.logits_BLK, 0 * mix.low_BLKr, W, SP, 0 * mix.means_KH, mix.basis_Hr)
    assert float(mixture.divergences(exact, W, SP).abs().max()) < 1e-5  # q itself


@pytest.mark.parametrize("components", [1, 16, 1024])
def test_the_nll_is_a_float64_logsumexp_at_any_number_of_components(components: int) -> None:
    """Also where the scales are tiny and distances huge: nothing overflows."""
    mix = some_mixture(components, spread=3.0)
    mix.scale_BL = mix.scale_BL * 0.01
    log_pi, kl = mix.logits_BLK.log_softmax(-1), mixture.divergences(mix, W, SP * 0.01)
    naive = -(mix.logits_BLK.double().log_softmax(-1) - naive_kl(mix, W, SP * 0.01)).logsumexp(-1)
    nll = mixture.exact_nll(log_pi, kl)
    torch.testing.assert_close(nll.double(), naive, rtol=1e-3, atol=1e-2)
    for loss in (nll, mixture.split_loss(log_pi, kl, True), mixture.clam_loss(log_pi, kl)):
        assert loss.isfinite().all()


def test_the_losses_are_ordered_bounds() -> None:
    mix = some_mixture()
    log_pi, kl = mix.logits_BLK.log_softmax(-1), mixture.divergences(mix, W, SP)
    nll, split = mixture.exact_nll(log_pi, kl), mixture.split_loss(log_pi, kl, True)
    assert bool((nll <= split + 1e-5).all())
    entropy = torch.special.entr((-kl).softmax(-1)).sum(-1)
    torch.testing.assert_close(mixture.clam_loss(log_pi, kl), split + entropy, rtol=1e-5, atol=1e-4)
    even = torch.full_like(log_pi, -math.log(K))
    torch.testing.assert_close(mixture.exact_nll(even, kl), mixture.split_loss(even, kl, True), rtol=1e-5, atol=1e-4)


def test_detaching_the_responsibilities_changes_the_gradient_only() -> None:
    kl = tensors(B, L, K, seed=9).abs().requires_grad_()
    losses = [mixture.split_loss(tensors(B, L, K, seed=10).log_softmax(-1), kl, d).sum() for d in (True, False)]
    gradients = [torch.autograd.grad(loss, kl)[0] for loss in losses]
    torch.testing.assert_close(*losses)
    assert not torch.equal(gradients[0], gradients[1])


def test_the_baseline_is_one_gaussian() -> None:
    wide = Normal(torch.zeros(B, L, H).double(), (1 + SP.double().pow(2)).sqrt().unsqueeze(-1))
    naive = kl_divergence(Normal(W.double(), SP.double().unsqueeze(-1)), wide).sum(-1)
    torch.testing.assert_close(mixture.gaussian_nll(W, SP).double(), naive, rtol=1e-5, atol=1e-5)


def test_a_fresh_head_is_uniform_and_its_loss_is_known() -> None:
    """log K + a closed form of the shared means only; its basis is orthonormal."""
    head = MixtureHead(WIDTH, H, K, R)
    mix = head(tensors(B, L, WIDTH), SP / 2)
    log_pi, kl = mix.logits_BLK.log_softmax(-1), mixture.divergences(mix, W, SP)
    torch.testing.assert_close(log_pi, torch.full_like(log_pi, -math.log(K)))
    torch.testing.assert_close(head.basis.T @ head.basis, torch.eye(R), rtol=0, atol=1e-5)
    s, sp = torch.maximum(torch.ones_like(SP), SP / 2).unsqueeze(-1), SP.unsqueeze(-1)
    distances = (W.unsqueeze(2) - head.means).pow(2).sum(-1)
    closed = H * ((s / sp).log() - 0.5 + sp**2 / (2 * s**2)) + distances / (2 * s**2)
    torch.testing.assert_close(kl, closed, rtol=1e-4, atol=1e-4)
    expected = math.log(K) - (-closed).logsumexp(-1)
    torch.testing.assert_close(mixture.split_loss(log_pi, kl, True), expected, rtol=1e-4, atol=1e-4)


def test_the_head_is_fp32_under_autocast_and_keeps_its_floor() -> None:
    head = MixtureHead(WIDTH, H, K, R)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        head.out.bias[-1] = -100.0
        mix = head(tensors(B, L, WIDTH).bfloat16(), SP / 2)
    assert mix.logits_BLK.dtype == mix.shift_BLH.dtype == torch.float32
    torch.testing.assert_close(mix.scale_BL, torch.maximum(torch.full_like(SP, math.exp(-6)), SP / 2))


def test_guided_means_are_guided_and_the_scale_is_the_conditional_one() -> None:
    pair = some_mixture(rows=2 * B)
    both, weights = pair.guided(1.5, means=True), pair.guided(1.5, means=False)
    cond, uncond = means_of(pair).chunk(2)
    torch.testing.assert_close(means_of(both), 2.5 * cond - 1.5 * uncond, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(means_of(weights), cond)
    torch.testing.assert_close(both.logits_BLK, 2.5 * pair.logits_BLK[:B] - 1.5 * pair.logits_BLK[B:])
    assert torch.equal(both.logits_BLK, weights.logits_BLK)
    assert torch.equal(both.scale_BL, pair.scale_BL[:B])


@pytest.mark.parametrize(("p", "kept"), [(1e-9, [0]), (0.5, [0]), (0.51, [0, 2]), (0.85, [0, 1, 2]), (1, [0, 1, 2, 3])])
def test_the_nucleus_is_the_smallest_set_with_the_mass(p: float, kept: list[int]) -> None:
    probabilities = torch.tensor([0.5, 0.1, 0.3, 0.1])  # the earlier one of equals
    expected = torch.zeros(4).index_copy(0, torch.tensor(kept), probabilities[kept])
    torch.testing.assert_close(mixture.nucleus(probabilities.log(), p), expected)


def test_components_are_drawn_by_their_probabilities() -> None:
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.1])  # not normalised
    uniform = (torch.arange(8000) + 0.5) / 8000
    shares = torch.bincount(mixture.draw(probabilities.expand(8000, 4), uniform), minlength=4) / 8000
    torch.testing.assert_close(shares, probabilities / 0.8, rtol=0, atol=1e-3)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert mixture.draw(torch.tensor([0.0, 0.4, 0.6]).expand(2, 3), ends).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_drawn_vector_is_the_mean_of_its_component_and_scaled_noise(temperature: float) -> None:
    mix, eps = some_mixture(), tensors(B, L, H, seed=11)
    component = torch.arange(B * L).view(B, L) % K
    mean = means_of(mix).take_along_dim(component[..., None, None], 2).squeeze(2)
    expected = mean + temperature * mix.scale_BL.double().unsqueeze(-1) * eps
    vector = mixture.vector_of(mix, component, eps, temperature).double()
    torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-4)


def test_the_density_is_that_of_the_mixture() -> None:
    mix = some_mixture()
    normal = Normal(means_of(mix), mix.scale_BL.double()[:, :, None, None])
    each = normal.log_prob(W.double().unsqueeze(2)).sum(-1) + H / 2 * math.log(2 * math.pi)
    naive = (mix.logits_BLK.double().log_softmax(-1) + each).logsumexp(-1)
    torch.testing.assert_close(mixture.log_density(mix, W).double(), naive, rtol=1e-4, atol=1e-3)
