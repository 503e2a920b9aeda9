"""The mathematics: returns, advantages, credits and the policy loss. Read this file first.

Pure functions of tensors, in the symbols of arXiv 2511.19405. A batch of games goes through

    rewards r --returns_to_go--> G --advantages--> A --CREDITS[name]--> c --policy_loss--> loss

Axes: B games (rows), T rounds, n sampled tokens. Rows of shorter games are padded with zeros."""

import torch


def returns_to_go(rewards, gamma):
    """G[b,t] = sum_{k>=t} gamma^(k-t) r[b,k].  rewards [B, T], 0 past a game's end -> [B, T]."""
    returns = rewards.clone()
    for t in reversed(range(returns.shape[1] - 1)):
        returns[:, t] += gamma * returns[:, t + 1]
    return returns


def advantages(returns, group, played):
    """A[b,t] = G[b,t] - mean of G[b',t] over the other games b' of the group: leave one out.
    No critic, no standard deviation. A baseline with the game's own return would bias the gradient.
    returns [B, T]; group [B], int, the same for games that share a baseline; played [B, T], 1 where
    game b has a round t, else 0 -> [B, T], 0 where no other game of the group has a round t."""
    same_group = (group[:, None] == group[None, :]).to(returns.dtype)  # [B, B]
    same_group.fill_diagonal_(0)
    others = same_group @ played  # [B, T]: how many other games of the group have a round t
    baseline = same_group @ (returns * played) / others.clamp(min=1)
    return (returns - baseline) * played * (others > 0)


def discounted_past(A, gamma):
    """past[b,t] = sum_{k<t} gamma^(t-k) A[b,k], zero in the first round.  A [B, T] -> [B, T]."""
    past = torch.zeros_like(A)
    for t in range(1, A.shape[1]):
        past[:, t] = gamma * (past[:, t - 1] + A[:, t - 1])
    return past


# The credits c [B, T] of one seat: what every token that it sampled in a round is multiplied with.
def naive(A_own, A_other, gamma, beta):
    """c = A_own: each for itself (plain policy gradient)."""
    return A_own


def joint(A_own, A_other, gamma, beta):
    """c = A_own + A_other: everyone maximises the sum of both scores."""
    return A_own + A_other


def advantage_alignment(A_own, A_other, gamma, beta):
    """c[t] = A_own[t] + beta gamma sum_{k<t} gamma^(t-k) A_own[k] A_other[t], as published.
    The second term rewards what helps the other after rounds that were good for oneself, and what
    harms it after bad ones: reciprocity. (The gamma in front is in the authors' code only.)"""
    return A_own + beta * gamma * discounted_past(A_own, gamma) * A_other


def causal_alignment(A_own, A_other, gamma, beta):
    """c[t] = A_own[t] + beta gamma (past[t] - S[t] A_own[t]) A_other[t]: the past ends at round t.
    In the published product, A_own[k] of a past round k is a whole return-to-go, so it also holds
    what the act at t does to oneself *later*. A false move that ruins the game for both makes
    A_own[k] and A_other[t] negative, and their product rewards it. Split that return at round t:
        G[k] = (sum_{k<=j<t} gamma^(j-k) r[j])  +  gamma^(t-k) G[t]
    Baselines are linear in returns, so A_own[k] - gamma^(t-k) A_own[t] is the advantage of the
    first part alone (in groups of equally long games). With S[t] = sum_{k<t} gamma^(2(t-k)):
        sum_{k<t} gamma^(t-k) (A_own[k] - gamma^(t-k) A_own[t]) = past[t] - S[t] A_own[t]"""
    S = discounted_past(torch.ones_like(A_own), gamma**2)
    before_t = discounted_past(A_own, gamma) - S * A_own
    return A_own + beta * gamma * before_t * A_other


def alignment_just_in_time(A_own, A_other, gamma, beta):
    """c[t] = A_own[t] + beta sum_{k<=t} gamma^(t-k) A_own[k] A_other[t]: first submission."""
    return A_own + beta * (discounted_past(A_own, gamma) + A_own) * A_other


def adversary(A_own, A_other, gamma, beta):
    """c = -A_other: to harm the other, at whatever cost to oneself."""
    return -A_other


def margin(A_own, A_other, gamma, beta):
    """c = A_own - A_other: to get more than the other."""
    return A_own - A_other


CREDITS = {"aa_causal": causal_alignment, "aa": advantage_alignment, "jit": alignment_just_in_time}
CREDITS |= {"naive": naive, "sum": joint, "adversary": adversary, "margin": margin}


def policy_loss(logp, logp_play, credit, entropy, kl, total, entropy_coef, kl_coef, cut=2.0):
    """-sum w c log p / N - entropy_coef H + kl_coef KL, over a micro-batch of n sampled tokens.
    logp, entropy, kl [n], in nats, under the weights being trained; logp_play [n] in play; credit
    [n] of its round; total: N, sampled tokens of the *whole* batch, so that micro-batches add up.
    w = min(p / p_play, cut), detached: a truncated importance weight. -> (loss, p / p_play [n])"""
    ratio = (logp.detach() - logp_play).exp()
    per_token = -ratio.clamp(max=cut) * credit * logp - entropy_coef * entropy + kl_coef * kl
    return per_token.sum() / total, ratio
