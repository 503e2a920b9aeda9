"""Returns, advantages, credits and the policy loss against slow sums written from the formulas."""

import itertools
import math
import pathlib
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loss import CREDITS, advantages, policy_loss, returns_to_go

bounded = settings(max_examples=50, derandomize=True, deadline=None)
sizes = {"B": st.integers(1, 6), "T": st.integers(1, 6)}
seeds = st.integers(0, 10**6)
discounts = st.floats(0, 1)
betas = st.floats(0, 20)


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole_numbers(seed, low, high, *shape):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def equal(got, want, tolerance=1e-9):
    want = torch.as_tensor(want, dtype=got.dtype)
    return got.shape == want.shape and torch.allclose(got, want, rtol=tolerance, atol=tolerance)


# The slow versions: plain loops over B games and T rounds, no function of loss.py in them.


def slow_returns(r, gamma):
    B, T = r.shape
    G = torch.zeros_like(r)
    for b, t in itertools.product(range(B), range(T)):
        G[b, t] = sum(gamma ** (k - t) * r[b, k] for k in range(t, T))
    return G


def slow_advantages(G, group, lengths):
    """G less its mean over the other games of the group that have a round t, 0 without any."""
    B, T = G.shape
    A = torch.zeros_like(G)
    for b in range(B):
        for t in range(lengths[b]):
            others = []
            for other in range(B):
                if other != b and group[other] == group[b] and lengths[other] > t:
                    others.append(G[other, t])
            if others:
                A[b, t] = G[b, t] - sum(others) / len(others)
    return A


def slow_alignment(A_own, A_other, gamma, beta):
    B, T = A_own.shape
    c = torch.zeros_like(A_own)
    for b, t in itertools.product(range(B), range(T)):
        products = (gamma ** (t - k) * A_own[b, k] * A_other[b, t] for k in range(t))
        c[b, t] = A_own[b, t] + beta * gamma * sum(products)
    return c


def slow_causal_alignment(A_own, A_other, gamma, beta):
    """The same, but from A_own[k] the share of what comes at t and after is taken away first."""
    B, T = A_own.shape
    c = torch.zeros_like(A_own)
    for b, t in itertools.product(range(B), range(T)):
        alignment = 0
        for k in range(t):
            before_t = A_own[b, k] - gamma ** (t - k) * A_own[b, t]
            alignment += gamma ** (t - k) * before_t * A_other[b, t]
        c[b, t] = A_own[b, t] + beta * gamma * alignment
    return c


def slow_alignment_just_in_time(A_own, A_other, gamma, beta):
    """The published sum, but over k up to t itself, and without the gamma in front."""
    B, T = A_own.shape
    c = torch.zeros_like(A_own)
    for b, t in itertools.product(range(B), range(T)):
        products = (gamma ** (t - k) * A_own[b, k] * A_other[b, t] for k in range(t + 1))
        c[b, t] = A_own[b, t] + beta * sum(products)
    return c


SLOW_CREDITS = {
    "aa": slow_alignment,
    "aa_causal": slow_causal_alignment,
    "jit": slow_alignment_just_in_time,
    "adversary": lambda A_own, A_other, gamma, beta: 0 - A_other,
    "margin": lambda A_own, A_other, gamma, beta: A_own - A_other,
    "naive": lambda A_own, A_other, gamma, beta: A_own,
    "sum": lambda A_own, A_other, gamma, beta: A_own + A_other,
}


# ------------------------------------------------------------------------------------------ returns


def test_a_return_looks_forward_and_discounts_from_its_own_round():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]])
    assert equal(returns_to_go(rewards, 0.5), [[3, 4, 4], [2, 4, 8]])


@bounded
@given(**sizes, seed=seeds, gamma=discounts)
def test_returns_are_the_discounted_sums_of_later_rewards(B, T, seed, gamma):
    rewards = numbers(seed, B, T)
    before = rewards.clone()
    assert equal(returns_to_go(rewards, gamma), slow_returns(rewards, gamma))
    assert torch.equal(rewards, before)


def test_a_shorter_game_padded_with_zeros_has_the_returns_it_has_alone():
    alone, padded = torch.tensor([[3.0, 5.0]]), torch.tensor([[3.0, 5.0, 0.0, 0.0]])
    assert equal(returns_to_go(padded, 0.9)[:, :2], returns_to_go(alone, 0.9))
    assert equal(returns_to_go(padded, 0.9)[:, 2:], [[0, 0]])


# --------------------------------------------------------------------------------------- advantages


def test_an_advantage_is_the_return_less_the_mean_of_the_other_games_and_not_rescaled():
    G, played = torch.tensor([[1.0], [2.0], [6.0]]), torch.ones(3, 1)
    group = torch.tensor([4, 4, 4])
    want = torch.tensor([[1 - 4], [2 - 3.5], [6 - 1.5]])
    assert equal(advantages(G, group, played), want)
    assert equal(advantages(100 * G, group, played), 100 * want)


def test_only_games_of_the_same_group_are_compared_and_a_game_alone_has_no_advantage():
    G, played = torch.tensor([[1.0], [50.0], [3.0], [7.0]]), torch.ones(4, 1)
    assert equal(advantages(G, torch.tensor([0, 9, 0, 2]), played), [[-2], [0], [2], [0]])


def test_a_round_is_compared_only_with_games_that_are_long_enough_to_have_it():
    G = torch.tensor([[4.0, 2.0, 5.0], [1.0, 8.0, 9.0], [3.0, 7.0, 9.0]])
    played = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    want = [[4 - 2, 2 - 8, 0], [1 - 3.5, 8 - 2, 0], [3 - 2.5, 0, 0]]
    assert equal(advantages(G, torch.tensor([1, 1, 1]), played), want)


@bounded
@given(**sizes, seed=seeds, groups=st.integers(1, 3))
def test_advantages_are_the_slow_ones_in_any_groups_of_games_of_any_lengths(B, T, seed, groups):
    G = numbers(seed, B, T)  # not zero past the end of a game: that must not matter
    group, lengths = whole_numbers(seed, 0, groups, B), whole_numbers(seed + 1, 1, T + 1, B)
    played = (torch.arange(T) < lengths[:, None]).double()
    before = G.clone()
    assert equal(advantages(G, group, played), slow_advantages(G, group, lengths))
    assert torch.equal(G, before)


# ------------------------------------------------------------------------------------------ credits


@pytest.mark.parametrize("name", CREDITS)
@bounded
@given(**sizes, seed=seeds, gamma=discounts, beta=betas)
def test_every_credit_is_the_double_sum_of_its_formula(name, B, T, seed, gamma, beta):
    A_own, A_other = numbers(seed, B, T), numbers(seed + 1, B, T)
    before = A_own.clone(), A_other.clone()
    got = CREDITS[name](A_own, A_other, gamma, beta)
    assert equal(got, SLOW_CREDITS[name](A_own, A_other, gamma, beta))
    assert torch.equal(A_own, before[0]) and torch.equal(A_other, before[1])


def test_naive_credit_is_the_own_advantage():
    A_own, A_other = numbers(0, 3, 4), numbers(1, 3, 4)
    assert torch.equal(CREDITS["naive"](A_own, A_other, 0.9, 2.0), A_own)


def test_sum_credit_is_the_same_for_both_seats():
    A_own, A_other = numbers(0, 3, 4), numbers(1, 3, 4)
    assert equal(CREDITS["sum"](A_own, A_other, 0.9, 2.0), A_own + A_other)
    assert equal(CREDITS["sum"](A_other, A_own, 0.9, 2.0), A_own + A_other)


@pytest.mark.parametrize("past, theirs, want", [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)])
def test_aa_rewards_kindness_after_good_rounds_and_severity_after_bad_ones(past, theirs, want):
    # gamma 1/2, beta 4: c[1] = A_own[1] + 4 * 1/2 * (1/2 * A_own[0]) * A_other[1]
    A_own, A_other = torch.tensor([[past, 10.0]]), torch.tensor([[7.0, theirs]])
    assert equal(CREDITS["aa"](A_own, A_other, 0.5, 4.0), [[past, 10 + want]])


@pytest.mark.parametrize("theirs, want", [(1, -9), (-1, 9)])
def test_aa_causal_takes_the_later_advantage_out_of_the_past(theirs, want):
    # gamma 1/2, beta 4: c[1] = A_own[1] + 4 * 1/2 * 1/2 * (A_own[0] - 1/2 * A_own[1]) * A_other[1]
    A_own, A_other = torch.tensor([[1.0, 20.0]]), torch.tensor([[7.0, theirs]])
    assert equal(CREDITS["aa_causal"](A_own, A_other, 0.5, 4.0), [[1, 20 + want]])


@bounded
@given(games=st.integers(2, 4), T=st.integers(1, 6), seed=seeds, gamma=discounts, beta=betas)
def test_aa_causal_is_aa_with_every_past_return_cut_off_at_the_present(games, T, seed, gamma, beta):
    # From rewards, two groups: A'[k,t] is the advantage of the rewards of rounds k to t-1 alone.
    group = torch.tensor([0] * games + [5] * games)
    B = len(group)
    r_own, r_other = numbers(seed, B, T), numbers(seed + 1, B, T)
    lengths = [T] * B
    A_own = slow_advantages(slow_returns(r_own, gamma), group, lengths)
    A_other = slow_advantages(slow_returns(r_other, gamma), group, lengths)
    want = A_own.clone()
    for t in range(T):
        for k in range(t):
            cut_off = torch.zeros(B, 1, dtype=torch.float64)
            for b in range(B):
                cut_off[b] = sum(gamma ** (j - k) * r_own[b, j] for j in range(k, t))
            A_cut_off = slow_advantages(cut_off, group, [1] * B)[:, 0]
            want[:, t] += beta * gamma * gamma ** (t - k) * A_cut_off * A_other[:, t]

    played = torch.ones(B, T, dtype=torch.float64)
    fast_own = advantages(returns_to_go(r_own, gamma), group, played)
    fast_other = advantages(returns_to_go(r_other, gamma), group, played)
    assert equal(CREDITS["aa_causal"](fast_own, fast_other, gamma, beta), want)


def test_aa_rewards_a_move_that_ruins_the_game_for_both_and_aa_causal_does_not():
    # Two games, the same until round 1. From then on both players of game 0 get nothing.
    rewards = torch.tensor([[3.0, 0.0, 0.0], [3.0, 3.0, 3.0]])
    A = advantages(returns_to_go(rewards, 1.0), torch.tensor([0, 0]), torch.ones(2, 3))
    assert equal(A, [[-6, -6, -3], [6, 6, 3]])
    ruined = {name: CREDITS[name](A, A, 1.0, 1.0)[0, 1].item() for name in ("aa", "aa_causal")}
    assert ruined == {"aa": -6 + 36, "aa_causal": -6}


@pytest.mark.parametrize("name", ["aa", "aa_causal"])
def test_without_a_past_or_without_beta_an_alignment_credit_is_the_own_advantage(name):
    A_own, A_other = numbers(0, 3, 4), numbers(1, 3, 4)
    assert equal(CREDITS[name](A_own, A_other, 0.9, 2.0)[:, 0], A_own[:, 0])
    assert equal(CREDITS[name](A_own, A_other, 0.9, 0.0), A_own)
    assert not equal(CREDITS[name](A_own, A_other, 0.9, 2.0)[:, 1:], A_own[:, 1:])


@pytest.mark.parametrize("name", CREDITS)
def test_rounds_past_the_end_of_a_game_get_no_credit_and_change_none(name):
    A_own, A_other = numbers(0, 3, 5), numbers(1, 3, 5)
    A_own[:, 3:] = A_other[:, 3:] = 0
    credit = CREDITS[name](A_own, A_other, 0.9, 2.0)
    assert equal(credit[:, :3], CREDITS[name](A_own[:, :3], A_other[:, :3], 0.9, 2.0))
    assert equal(credit[:, 3:], torch.zeros(3, 2))


@pytest.mark.parametrize("name", CREDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fractional_points_are_kept_from_rewards_to_credits(name, dtype):
    # All that is sampled differs by 1/3 or 1/4 of a point: rounded to whole points it is all zero.
    own = torch.tensor([[20 / 3, 0.25], [7.0, 0.0]], dtype=dtype)
    other = torch.tensor([[0.0, 0.25], [1 / 3, 0.0]], dtype=dtype)
    group, played = torch.tensor([0, 0]), torch.ones(2, 2, dtype=dtype)
    A_own = advantages(returns_to_go(own, 0.5), group, played)
    A_other = advantages(returns_to_go(other, 0.5), group, played)
    assert equal(A_own, [[-1 / 3 + 1 / 8, 1 / 4], [1 / 3 - 1 / 8, -1 / 4]], 1e-5)
    assert equal(A_other, [[-1 / 3 + 1 / 8, 1 / 4], [1 / 3 - 1 / 8, -1 / 4]], 1e-5)
    credit = CREDITS[name](A_own, A_other, 0.5, 2.0)
    # 2 * 1/2 * 1/2 * A_own[0] * A_other[1], where aa_causal has -1/3 for A_own[0] = -1/3 + 1/8
    aligned = {"naive": 0, "sum": 1 / 4, "aa": -5 / 192, "aa_causal": -1 / 24}
    # jit: 2 * (1/2 * A_own[0] + A_own[1]) * A_other[1]
    aligned |= {"jit": 7 / 96, "adversary": -1 / 2, "margin": -1 / 4}
    assert credit.dtype == A_own.dtype == dtype
    assert credit[0, 1].item() == pytest.approx(1 / 4 + aligned[name], rel=1e-5, abs=1e-7)


# -------------------------------------------------------------------------------------- policy loss


def test_the_policy_loss_of_two_tokens_is_that_computed_by_hand():
    logp = torch.tensor([0.5, 0.25]).log()
    credit, entropy, kl = torch.tensor([[3.0, -2.0], [0.7, 0.9], [0.1, 0.3]])
    loss, ratio = policy_loss(logp, logp, credit, entropy, kl, 4, 0.5, 10.0)
    want = (3 * math.log(2) - 2 * math.log(4) - 0.5 * (0.7 + 0.9) + 10 * (0.1 + 0.3)) / 4
    assert loss.item() == pytest.approx(want)
    assert equal(ratio, [1, 1])


def test_descending_the_loss_follows_the_credit_raises_entropy_and_lowers_kl():
    logp, entropy, kl = (torch.full((2,), x, requires_grad=True) for x in (-1.0, 1.0, 1.0))
    loss, _ = policy_loss(logp, logp.detach(), torch.tensor([2.0, -3.0]), entropy, kl, 2, 0.1, 0.2)
    loss.backward()
    assert equal(logp.grad, [-1, 1.5], 1e-6)
    assert equal(entropy.grad, [-0.05, -0.05], 1e-6)
    assert equal(kl.grad, [0.1, 0.1], 1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_importance_weights_are_cut_at_two_from_above_only_and_the_ratios_reported_are_not(sign):
    logp = torch.tensor([0.3, 0.1, 0.9, 0.5]).log().requires_grad_()
    logp_play = torch.tensor([0.2, 0.4, 0.1, 0.5]).log()
    credit, zeros = sign * torch.tensor([1.0, 1.0, 1.0, 4.0]), torch.zeros(4)
    loss, ratio = policy_loss(logp, logp_play, credit, zeros, zeros, 10, 0.0, 0.0)
    loss.backward()
    assert equal(ratio, [1.5, 0.25, 9, 1], 1e-5) and not ratio.requires_grad
    assert equal(sign * logp.grad, [-0.15, -0.025, -0.2, -0.4], 1e-5)


@bounded
@given(n=st.integers(1, 6), seed=seeds)
def test_the_policy_gradient_is_the_slope_of_the_loss_with_fixed_importance_weights(n, seed):
    # n tokens, one of each kind, from one distribution over n of them with logits `theta`. Slopes
    # by finite differences, with the weights held at their values.
    theta, logp_play, credit = numbers(seed, 3, n)
    weight = (theta.log_softmax(0) - logp_play).exp().clamp(max=2)

    def terms(theta):
        logp = theta.log_softmax(0)
        entropy = -(logp.exp() * logp).sum()
        kl_to_uniform = (logp.exp() * (logp + math.log(n))).sum()
        return logp, entropy.expand(n), kl_to_uniform.expand(n)

    def slow_loss(theta):
        logp, entropy, kl = terms(theta)
        return ((-weight * credit * logp - 0.3 * entropy + 0.2 * kl).sum() / 7).item()

    leaf = theta.clone().requires_grad_()
    logp, entropy, kl = terms(leaf)
    policy_loss(logp, logp_play, credit, entropy, kl, 7, 0.3, 0.2)[0].backward()
    for i in range(n):
        step = torch.zeros(n, dtype=torch.float64)
        step[i] = 1e-4
        slope = (slow_loss(theta + step) - slow_loss(theta - step)) / 2e-4
        assert leaf.grad[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_loss_and_gradient_do_not_depend_on_how_the_batch_is_cut_into_micro_batches():
    n = 9
    _, logp_play, credit, entropy, kl = numbers(0, 5, n)

    def loss_and_gradient(parts):
        logp = numbers(1, n).requires_grad_()
        columns = logp, logp_play, credit, entropy, kl
        total = 0
        for part in parts:
            loss, _ = policy_loss(*(column[part] for column in columns), n, 0.1, 0.2)
            loss.backward()
            total += loss.detach()
        return total, logp.grad

    whole, gradient = loss_and_gradient([slice(0, n)])
    for parts in ([slice(0, 2), slice(2, n)], [slice(i, i + 1) for i in range(n)]):
        total, grad = loss_and_gradient(parts)
        assert equal(total, whole) and equal(grad, gradient)


def test_on_average_the_naive_gradient_is_that_of_the_expected_score():
    # Two games of two rounds make a group. In a round the act is 1 with probability
    # sigmoid(theta[t]), and the second reward depends on both acts. All 16 outcomes, each with its
    # probability, against the derivative of the expected score: a baseline with a game's own
    # return in it, or a wrong sum over rounds, would give another one.
    rewards = {(0, 0): (1, 0), (0, 1): (1, 4), (1, 0): (-2, 7), (1, 1): (-2, 3)}
    theta = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)

    def logp_of(acts):
        return torch.where(torch.tensor(acts) == 1, theta, -theta).sigmoid().log()

    score = sum(logp_of(acts).sum().exp() * sum(rewards[acts]) for acts in rewards)
    [want] = torch.autograd.grad(score, theta)

    expected = torch.zeros(2, dtype=torch.float64)
    for both in itertools.product(rewards, repeat=2):
        r = torch.tensor([rewards[acts] for acts in both], dtype=torch.float64)
        A = advantages(returns_to_go(r, 1.0), torch.tensor([0, 0]), torch.ones_like(r))
        credit = CREDITS["naive"](A, torch.zeros_like(A), 1.0, 0.0)
        logp = torch.cat([logp_of(acts) for acts in both])
        zeros = torch.zeros(4)
        loss, _ = policy_loss(logp, logp.detach(), credit.flatten(), zeros, zeros, 4, 0.0, 0.0)
        [gradient] = torch.autograd.grad(loss, theta)
        expected += logp.detach().sum().exp() * gradient
    # of four tokens, two belong to each game; the loss is what descends
    assert want.abs().min() > 0.1 and equal(expected, -want * 2 / 4)


def test_the_credit_in_the_readme_can_be_used():
    readme = pathlib.Path(__file__).resolve().parents[1] / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    [code] = [block for block in blocks if "CREDITS[" in block]
    credits = {}
    exec(code, {"CREDITS": credits})
    A_own, A_other = torch.tensor([[1.0, 2.0]]), torch.tensor([[-1.0, 3.0]])
    assert credits["altruist"](A_own, A_other, 0.9, 2.0).tolist() == [[-1.0, 8.0]]
