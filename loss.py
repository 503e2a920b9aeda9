"""Returns, advantages, the three credits and the policy loss: pure functions of tensors; and the scoring pass of the update.

Axes: B games (rows), T rounds, N sampled tokens. Rows of different length are padded with zeros and a mask. Symbols follow
arXiv 2511.19405 (Advantage Alignment with a group-relative baseline); each formula stands in its function's docstring.
"""
import functools, os
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer

def returns_to_go(rewards, gamma):
    """G[b,t] = sum over k >= t of gamma^(k-t) r[b,k].  rewards [B, T] (zero past a row's end) -> [B, T]."""
    G, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + gamma * running
        G[:, t] = running
    return G

def advantages(G, group, mask):
    """A[b,t] = G[b,t] - mean of G[b',t] over the other rows b' of the group: leave one out, no standard deviation.

    G [B, T] returns-to-go, group [B] int (rows with the same number share a baseline), mask [B, T] 1 where round t was
    played -> [B, T]; zero where not played, and where no other row of the group played round t.
    """
    same = (group[:, None] == group[None, :]).to(G.dtype)
    same.fill_diagonal_(0)  # the others only: a row's own return in its baseline would bias the gradient
    others = same @ mask
    return (G - same @ (G * mask) / others.clamp(min=1)) * mask * (others > 0)

def credits(algo, A_own, A_other, gamma, beta):
    """What every sampled token of round t is multiplied with. A_own, A_other [B, T] -> c [B, T].

    naive  c = A_own                    each for itself
    sum    c = A_own + A_other          cooperative baseline: everyone maximises the joint score
    aa     c[t] = A_own[t] + beta gamma sum over k < t of gamma^(t-k) A_own[k] A_other[t]      (Advantage Alignment)

    The second term of aa favours what is good for the other after rounds that went well for oneself: reciprocity. ValueError for another name.
    """
    if algo == "naive":
        return A_own
    if algo == "sum":
        return A_own + A_other
    if algo != "aa":
        raise ValueError(f"no credit is called {algo!r}")
    c, past = A_own.clone(), torch.zeros_like(A_own[:, 0])
    for t in range(A_own.shape[1]):
        c[:, t] += beta * gamma * past * A_other[:, t]
        past = gamma * (past + A_own[:, t])  # sum over k <= t of gamma^(t+1-k) A_own[k]
    return c

def policy_loss(logp, logp_play, credit, entropy, kl, total, entropy_coef, kl_coef, cut=2.):
    """-sum w c log p / N - entropy_coef H + kl_coef KL, over one micro-batch of n tokens.

    logp, entropy, kl [n] under the weights being trained, logp_play and credit [n] from the rollout. `total` is N, the
    sampled tokens of the whole batch, so that summing over micro-batches gives the same gradient however they are cut.
    w = min(p / p_play, cut), detached, is the truncated importance weight. Returns (scalar loss, ratios p / p_play [n]).
    """
    ratio = (logp.detach() - logp_play).exp()
    per_token = -ratio.clamp(max=cut) * credit * logp - entropy_coef * entropy + kl_coef * kl
    return per_token.sum() / total, ratio

class OpeningLayer(DynamicLayer):
    """A layer's keys and values [1, heads, P, width] of the common opening: records them, or, given them, puts them before
    those of every row. It keeps nothing of the rows, so gradient checkpointing may run a layer twice."""

    def __init__(self, opening=None):
        super().__init__()
        self.opening = opening

    def update(self, k, v, *args, **kwargs):
        if self.opening is None:
            self.keys, self.values = k, v
            return k, v
        return tuple(torch.cat([old.expand(len(new), -1, -1, -1), new], 2) for old, new in zip(self.opening, (k, v)))

def token_stats(llm, hidden, reference, target, legal):
    """Log-prob of the `target` ids (list), entropy, and KL to the model that gave `reference` (hidden states, or None for 0),
    all on the set each token was sampled from: hidden [n, width] -> three times [n], in nats. `legal` as in an Episode."""
    columns, mask = llm.candidates(legal)
    logp = F.log_softmax(llm.logits(hidden, columns).masked_fill(~mask, -torch.inf), -1)
    target = torch.tensor(target, device=hidden.device)
    if columns is not None:
        target = torch.searchsorted(columns, target)
    p, finite = logp.exp(), logp.masked_fill(~mask, 0.)
    kl = torch.zeros_like(finite[:, 0])
    if reference is not None:
        log_q = F.log_softmax(llm.logits(reference, columns).masked_fill(~mask, -torch.inf), -1).masked_fill(~mask, 0.)
        kl = (p * (finite - log_q)).sum(-1)
    return logp.gather(1, target[:, None])[:, 0], -(p * finite).sum(-1), kl

MicroBatch = namedtuple("MicroBatch", "row round logp_play logp entropy kl")  # each [n]; row: the index of the episode

def score(llm, episodes, budget, reference=False, adapter="default"):
    """Yield all sampled tokens of `episodes` in MicroBatches of at most `budget` tokens (padding counted), longest first.

    The opening that all rows share is one row of every micro-batch, with its gradient: its keys and values are expanded to all
    rows, so a long prompt costs little. `reference` asks for the KL to the model without adapter.
    """
    order = sorted((b for b in range(len(episodes)) if episodes[b].at), key=lambda b: -len(episodes[b].ids))
    if not order:
        return
    P = min(len(os.path.commonprefix([episodes[b].ids for b in order])), min(episodes[b].at[0] for b in order) - 1)
    while order:
        n = max(1, budget // max(1, len(episodes[order[0]].ids) - P))
        batch, order = order[:n], order[n:]
        rows = [episodes[b].ids[P:episodes[b].at[-1]] for b in batch]  # what follows the last sampled token is not needed
        tokens = [(r, episodes[b], k) for r, b in enumerate(batch) for k in range(len(episodes[b].at))]
        tokens.sort(key=lambda token: token[1].legal[token[2]] is None)  # choices first, then messages
        pick = torch.tensor([r for r, _, _ in tokens]), torch.tensor([e.at[k] - 1 - P for _, e, k in tokens])
        target, legal = [e.ids[e.at[k]] for _, e, k in tokens], [e.legal[k] for _, e, k in tokens]

        def read(name):  # hidden states before the sampled tokens
            with llm.using(name):
                opening = [OpeningLayer() for _ in range(llm.layers)]
                if P:
                    llm.forward([episodes[batch[0]].ids[:P]], [0], opening)
                layers = [OpeningLayer((layer.keys, layer.values) if P else None) for layer in opening]
                return llm.forward(rows, [P] * len(rows), layers)[pick]

        with torch.no_grad():
            ref = read(None) if reference else None
        hidden = read(adapter)
        choices = sum(ids is not None for ids in legal)
        slices = [slice(0, choices)] + [slice(k, k + llm.slice) for k in range(choices, len(tokens), llm.slice)]
        stats = [checkpoint(functools.partial(token_stats, llm, hidden[s], None if ref is None else ref[s], target[s], legal[s]),
                            use_reentrant=False) for s in slices if legal[s]]
        as_tensor = functools.partial(torch.tensor, device=hidden.device)
        yield MicroBatch(as_tensor([batch[r] for r, _, _ in tokens]), as_tensor([e.round[k] for _, e, k in tokens]),
                         as_tensor([e.logp[k] for _, e, k in tokens]), *(torch.cat(column) for column in zip(*stats)))
