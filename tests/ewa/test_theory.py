"""The statements T1 to T10 of the method, derived from Eq. 6: one test each, in float64.

N experts W_i, share rate b, their mean m, D_i = W_i - m, lam = 1 - bN/(N-1).
"""

import copy

import pytest
import torch
from torch import nn

import pointewa.ewa as ewa

N, B, LR = 4, 0.3, 0.1
LAM = 1 - B * N / (N - 1)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def mean_of_others(w):
    return torch.stack([torch.cat([w[:i], w[i + 1 :]]).mean(0) for i in range(len(w))])


def sgd_history(steps, share_rate):
    """Train a one-layer MoE with SGD and Eq. 6.

    Returns the stacked weights W^0 ... W^T, the gradients g^0 ... g^{T-1} (g^t taken at W^t) and A^1 ... A^T, the mean
    of the others after their SGD step and before the averaging.
    """
    moe = ewa.RandomPartitionMoE(nn.Linear(3, 2, bias=False).double(), N)
    weight = moe.experts.weight
    optimizer = torch.optim.SGD(moe.parameters(), lr=LR)
    weights, gradients, others = [weight.detach().clone()], [], []
    optimizer.register_step_post_hook(lambda *_: others.append(mean_of_others(weight.detach())))
    ewa.ExpertAveraging(moe, share_rate).attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        moe(randn(11, 3)).sin().sum().backward()
        gradients.append(weight.grad.clone())
        optimizer.step()
        weights.append(weight.detach().clone())
    return weights, gradients, others


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_t1_averaging_leaves_the_mean_and_so_the_folded_ffn():
    ffn = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)).double()
    model = nn.Sequential(ewa.RandomPartitionMoE(ffn, N))
    x, before = randn(7, 3), ewa.fold(model)
    ewa.ExpertAveraging(model, B).step()
    after = ewa.fold(model)
    torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=0, atol=1e-14)
    torch.testing.assert_close(after(x), before(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("n", "lam"), [(2, 0.4), (4, 0.6), (8, 0.657), (16, 0.68)])
def test_t2_mixing_matrix_is_doubly_stochastic_with_eigenvalues_1_and_lam(n, lam):
    mixing = ewa.average_experts_(torch.eye(n, dtype=torch.float64), B)
    one = torch.ones(n, dtype=torch.float64)
    assert mixing.min() >= 0
    torch.testing.assert_close(mixing.sum(0), one)
    torch.testing.assert_close(mixing.sum(1), one)
    exact_lam = 1 - B * n / (n - 1)
    assert exact_lam == pytest.approx(lam, abs=5e-4)  # the values the method's description quotes
    torch.testing.assert_close(mixing, mixing.T)
    torch.testing.assert_close(torch.linalg.eigvalsh(mixing), torch.cat([exact_lam * one[1:], one[:1]]))

    w = randn(n, 5)
    deviation = w - w.mean(0)
    for step in range(1, 6):
        ewa.average_experts_(w, B)
        torch.testing.assert_close(w - w.mean(0), exact_lam**step * deviation, rtol=0, atol=1e-13)


def test_t3_the_largest_share_rate_averages_fully_and_zero_does_nothing():
    w = randn(N, 3, 5)
    torch.testing.assert_close(ewa.average_experts_(w.clone(), (N - 1) / N), w.mean(0).expand_as(w), rtol=0, atol=1e-15)
    assert torch.equal(ewa.average_experts_(w.clone(), 0.0), w)


def test_t4_equals_decoupled_weight_decay_of_strength_b_over_lr_towards_the_others():
    w = randn(N, 3, 5)
    others = mean_of_others(w)
    expected = w - LR * (B / LR) * (w - others)

    distance = nn.Parameter(w - others)  # torch's own decoupled decay, towards zero: so of the distance to the others
    distance.grad = torch.zeros_like(distance)
    torch.optim.AdamW([distance], lr=LR, weight_decay=B / LR).step()
    torch.testing.assert_close(others + distance.detach(), expected, rtol=0, atol=1e-13)

    torch.testing.assert_close(ewa.average_experts_(w, B), expected, rtol=0, atol=1e-13)


def test_t5_equals_a_unit_gradient_step_on_the_pairwise_quadratic():
    w = randn(N, 3, 5).requires_grad_()
    pairs = sum((w[i] - w[j]).square().sum() for i in range(N) for j in range(i + 1, N))
    (gradient,) = torch.autograd.grad(B / (2 * (N - 1)) * pairs, w)
    expected = (w - gradient).detach()
    torch.testing.assert_close(ewa.average_experts_(w.detach(), B), expected, rtol=0, atol=1e-13)


def test_t6_under_sgd_an_expert_aggregates_the_history_of_the_others():
    steps = 6
    weights, gradients, others = sgd_history(steps, B)
    expected = (1 - B) ** steps * weights[0]
    expected = expected - LR * sum((1 - B) ** (steps - t) * gradients[t] for t in range(steps))
    expected = expected + B * sum((1 - B) ** (steps - t) * others[t - 1] for t in range(1, steps + 1))
    torch.testing.assert_close(weights[steps], expected, rtol=0, atol=1e-12)

    w = torch.zeros(N, dtype=torch.float64)  # the sum of the history's weights: what a history of ones adds to zero
    for _ in range(steps):
        w[1:] = 1
        ewa.average_experts_(w, B)
    assert w[0].item() == pytest.approx(1 - (1 - B) ** steps, abs=1e-14)


def test_t7_under_sgd_the_mean_follows_the_mean_gradient_and_deviations_decay():
    steps = 6
    weights, gradients, _ = sgd_history(steps, B)
    mean_gradients = [g.mean(0) for g in gradients]
    expected_mean = weights[0].mean(0) - LR * sum(mean_gradients)
    torch.testing.assert_close(weights[steps].mean(0), expected_mean, rtol=0, atol=1e-12)

    expected = LAM**steps * (weights[0] - weights[0].mean(0))
    for t in range(steps):
        expected = expected - LR * LAM ** (steps - t) * (gradients[t] - mean_gradients[t])
    torch.testing.assert_close(weights[steps] - weights[steps].mean(0), expected, rtol=0, atol=1e-12)


def test_t8_stationary_spread_under_unit_gradient_noise():
    coordinates = 20_000
    w = torch.zeros(N, coordinates, dtype=torch.float64)
    for _ in range(40):  # lam^80 < 1e-17: stationary
        w -= LR * torch.randn_like(w)
        ewa.average_experts_(w, B)
    spread = (w - w.mean(0)).square().sum(0).mean().item()
    # A coordinate's spread is chi-square with N-1 degrees of freedom: relative error sqrt(2/(N-1)/coordinates) = 0.6 %.
    tolerance = 4 * (2 / (N - 1) / coordinates) ** 0.5
    assert spread == pytest.approx((N - 1) * LR**2 * LAM**2 / (1 - LAM**2), rel=tolerance)


@pytest.mark.parametrize("tokens", [16, 17, 3])  # a multiple of N, not one, fewer than N
def test_t9_equal_experts_compute_the_dense_ffn_and_their_gradients_sum_to_its(tokens):
    dense = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)).double()
    moe = ewa.RandomPartitionMoE(copy.deepcopy(dense), N, init="copy")
    x, target = randn(tokens, 3), randn(tokens, 3)
    outputs = [dense(x), moe(x)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-13)
    for output in outputs:
        (output - target).square().sum().backward()
    stacked = dict(moe.experts.named_parameters())
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(stacked[name].grad.sum(0), parameter.grad, rtol=0, atol=1e-12)

    start = copy.deepcopy(dense.state_dict())
    torch.optim.SGD(moe.parameters(), lr=LR).step()
    for name, parameter in dense.named_parameters():  # so the mean moves at lr/N
        torch.testing.assert_close(stacked[name].mean(0), start[name] - LR / N * parameter.grad, rtol=0, atol=1e-12)


def test_t10_the_fold_gap_is_second_order_in_the_deviations():
    moe = ewa.RandomPartitionMoE(nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 3)).double(), N, init="copy")
    x = randn(50, 3)
    mean = {name: p.detach().clone() for name, p in moe.named_parameters()}
    direction = {name: randn(*p.shape) for name, p in mean.items()}
    gaps = []
    for scale in (0.02, 0.01, 0.005):
        with torch.no_grad():
            for name, p in moe.named_parameters():
                p.copy_(mean[name] + scale * (direction[name] - direction[name].mean(0)))
        gaps += ewa.fold_gap(moe, x).values()
    assert gaps[0] > 1e-6
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.03)
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.03)
