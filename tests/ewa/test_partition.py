"""Random uniform partition, dispatch and combine."""

import pytest
import torch

from pointewa.ewa.partition import combine, dispatch, partition_by_expert, random_partition


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def expert_of_token(num_tokens, num_experts):
    _, slot_of_token = random_partition(num_tokens, num_experts, "cpu")
    return slot_of_token // -(-num_tokens // num_experts)


@pytest.mark.parametrize(("tokens", "num_experts"), [(12, 4), (13, 4), (15, 4), (3, 4), (1, 2), (1000, 7)])
def test_every_token_has_one_slot_and_group_sizes_differ_by_at_most_one(tokens, num_experts):
    token_of_slot, slot_of_token = random_partition(tokens, num_experts, "cpu")
    sizes = torch.bincount(expert_of_token(tokens, num_experts), minlength=num_experts)
    assert sizes.sum() == tokens
    assert sizes.max() - sizes.min() <= 1
    assert len(token_of_slot) == num_experts * sizes.max()
    assert slot_of_token.unique().numel() == tokens
    assert torch.equal(token_of_slot[slot_of_token], torch.arange(tokens))


@pytest.mark.parametrize(("samples", "tokens", "num_experts"), [(4, 9, 4), (3, 8, 4), (5, 33, 4), (6, 2, 5), (2, 7, 3)])
def test_partition_by_sample_is_even_within_each_sample_and_over_all(samples, tokens, num_experts):
    token_of_slot, slot_of_token = random_partition(samples * tokens, num_experts, "cpu", samples)
    assert torch.equal(token_of_slot[slot_of_token], torch.arange(samples * tokens))
    expert = (slot_of_token // -(-samples * tokens // num_experts)).view(samples, tokens)
    for part in (*expert, expert.flatten()):
        counts = torch.bincount(part, minlength=num_experts)
        assert counts.max() - counts.min() <= 1


def test_partition_by_sample_is_uniform():
    torch.manual_seed(0)
    draws = torch.stack([random_partition(10, 4, "cpu", 2)[1] // 3 for _ in range(4000)])  # (4000, 10) experts
    for token in range(10):
        share = torch.bincount(draws[:, token], minlength=4) / 4000
        expected = torch.tensor([2, 1, 1, 1] if token < 5 else [1, 2, 1, 1]) / 5  # the fifth card's expert gets two
        assert (share - expected).abs().max() < 0.03


def test_partition_is_uniform():
    tokens, num_experts, draws = 7, 3, 6000
    experts = torch.stack([expert_of_token(tokens, num_experts) for _ in range(draws)])  # (draws, T)
    sizes = torch.tensor([3, 2, 2])
    frequency = torch.stack([(experts == expert).double().mean(0) for expert in range(num_experts)], dim=1)  # (T, N)
    probability = (sizes / tokens).double().expand_as(frequency)
    sigma = (probability * (1 - probability) / draws).sqrt()
    assert ((frequency - probability).abs() < 4.5 * sigma).all()  # 21 frequencies: false alarm 1e-4, and the seed fixed

    # Neighbours are together as often as any two: a rotation of contiguous blocks would pass the check above.
    together = (experts[:, :, None] == experts[:, None, :]).double().mean(0)[torch.triu(torch.ones(7, 7), 1) == 1]
    chance = (sizes * (sizes - 1)).sum().item() / (tokens * (tokens - 1))
    assert (together - chance).abs().max() < 4.5 * (chance * (1 - chance) / draws) ** 0.5


def test_a_router_s_partition_keeps_the_order_of_the_tokens_of_each_expert():
    token_of_slot, slot_of_token = partition_by_expert(torch.tensor([2, 0, 2, 2, 0]), num_experts=4, size=3)
    assert token_of_slot.tolist() == [1, 4, 0, 0, 0, 0, 0, 2, 3, 0, 0, 0]  # expert 1 and 3 have idle slots only
    assert slot_of_token.tolist() == [6, 0, 7, 8, 1]


@pytest.mark.parametrize(("tokens", "num_experts"), [(12, 4), (13, 4), (3, 4)])
def test_dispatch_and_combine_are_inverse_and_idle_slots_have_no_gradient(tokens, num_experts):
    partition = random_partition(tokens, num_experts, "cpu")
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    slots = dispatch(x, *partition)
    assert torch.equal(slots, x[partition[0]])
    assert torch.equal(combine(slots, *partition), x)
    assert torch.autograd.gradcheck(lambda x: combine(dispatch(x, *partition).sin(), *partition), x)
    upstream = torch.randn(tokens, 3, dtype=torch.float64)
    slots = slots.detach().requires_grad_()
    combine(slots, *partition).backward(upstream)
    idle = torch.ones(len(slots), dtype=torch.bool)
    idle[partition[1]] = False
    assert torch.equal(slots.grad[partition[1]], upstream)
    assert not slots.grad[idle].any()
