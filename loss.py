"""Returns, advantages, the three credits, the policy loss: pure functions of tensors; and the scoring pass of the update.
Axes: B games (rows), T rounds, n sampled tokens. Shorter rows are padded with zeros. Symbols follow arXiv 2511.19405."""
import collections, contextlib, functools, os
import torch, transformers
from torch.utils.checkpoint import checkpoint

def returns_to_go(rewards, gamma):
    """G[b,t] = sum over k >= t of gamma^(k-t) r[b,k].  rewards [B, T] (zero past a row's end) -> [B, T]."""
    G = rewards.clone()
    for t in reversed(range(G.shape[1] - 1)):
        G[:, t] += gamma * G[:, t + 1]
    return G

def advantages(G, group, mask):
    """A[b,t] = G[b,t] - mean of G[b',t] over the other rows b' of the group: leave one out, no standard deviation.
    G [B, T] returns-to-go, group [B] int (rows with the same number share a baseline), mask [B, T] 1 where round t was
    played -> [B, T]; zero where not played, and where no other row of the group played round t."""
    same = (group[:, None] == group).to(G.dtype)
    same.fill_diagonal_(0)  # the others only: a row's own return in its baseline would bias the gradient
    others = same @ mask
    return (G - same @ (G * mask) / others.clamp(min=1)) * mask * (others > 0)

def credits(algo, A_own, A_other, gamma, beta):
    """What every sampled token of round t is multiplied with. A_own, A_other [B, T] -> c [B, T].
    naive  c = A_own                    each for itself
    sum    c = A_own + A_other          cooperative baseline: everyone maximises the joint score
    aa     c[t] = A_own[t] + beta gamma sum over k < t of gamma^(t-k) A_own[k] A_other[t]      (Advantage Alignment)
    Its second term favours what helps the other after rounds good for oneself: reciprocity. ValueError for another name."""
    past = torch.zeros_like(A_own)  # sum over k < t of gamma^(t-k) A_own[k]: what returns to go are, with time reversed
    past[:, 1:] = gamma * returns_to_go(A_own.flip(1), gamma).flip(1)[:, :-1]
    c = {"naive": A_own, "sum": A_own + A_other, "aa": A_own + beta * gamma * past * A_other}
    if algo not in c:
        raise ValueError(f"no credit is called {algo!r}")
    return c[algo]

def policy_loss(logp, logp_play, credit, entropy, kl, total, entropy_coef, kl_coef, cut=2.):
    """-sum w c log p / N - entropy_coef H + kl_coef KL, over one micro-batch of n tokens.
    logp, entropy, kl [n] under the weights being trained, logp_play and credit [n] from the rollout. `total` is N, the
    sampled tokens of the whole batch, so that summing over micro-batches gives the same gradient however they are cut.
    w = min(p / p_play, cut), detached, is the truncated importance weight. Returns (scalar loss, ratios p / p_play [n])."""
    ratio = (logp.detach() - logp_play).exp()
    per_token = -ratio.clamp(max=cut) * credit * logp - entropy_coef * entropy + kl_coef * kl
    return per_token.sum() / total, ratio

class OpeningCache(transformers.Cache):
    """Keeps the keys and values [1, heads, P, width] of the common opening, {layer: (k, v)}; given those, puts them before
    every row's. Then it keeps nothing, so gradient checkpointing may run a layer twice."""
    def __init__(self, opening=()):
        super().__init__(layers=[])
        self.opening, self.kept = opening, {}
    def update(self, k, v, layer, *args, **kwargs):
        if layer in self.opening:
            return [torch.cat([old.expand(len(new), -1, -1, -1), new], 2) for old, new in zip(self.opening[layer], (k, v))]
        self.kept[layer] = k, v
        return k, v

def token_stats(llm, hidden, reference, target, legal):
    """Log-prob of the `target` ids (list), entropy, and KL to the model that gave `reference` (hidden states, or () for 0),
    all on the set each token was sampled from: hidden [n, width] -> [3, n], in nats. `legal` as in LLM.log_probs."""
    logp, columns = llm.log_probs(hidden, legal)
    target = torch.searchsorted(columns, torch.tensor(target, device=hidden.device))
    p, chosen = logp.exp(), logp.gather(1, target[:, None])[:, 0]
    kl = (p * (logp - llm.log_probs(reference, legal)[0])).sum(-1) if len(reference) else torch.zeros_like(chosen)
    return torch.stack([chosen, -(p * logp).sum(-1), kl])

MicroBatch = collections.namedtuple("MicroBatch", "row round logp_play logp entropy kl")  # each [n]; row: which episode

def score(llm, episodes, budget, reference=False, adapter="default"):
    """Yield all sampled tokens of `episodes` in MicroBatches of at most `budget` tokens (less the opening), longest first.
    The opening that all rows share is one row of every micro-batch, with its gradient: its keys and values are expanded to all
    rows, so a long prompt costs little. `reference` asks for the KL to the model without adapter."""
    order = sorted((b for b, e in enumerate(episodes) if e.at), key=lambda b: -len(episodes[b].ids))
    P = min([len(os.path.commonprefix([episodes[b].ids for b in order])), *(episodes[b].at[0] - 1 for b in order)])
    while order:
        n = max(1, budget // (len(episodes[order[0]].ids) - P))
        batch, order = order[:n], order[n:]
        rows = [episodes[b].ids[P:episodes[b].at[-1]] for b in batch]  # what follows the last sampled token is not needed
        tokens = [(r, at - 1 - P, episodes[b].ids[at], legal, b, t, logp) for r, b in enumerate(batch) for at, t, legal, logp in
                  zip(episodes[b].at, episodes[b].round, episodes[b].legal, episodes[b].logp)]
        r, before, target, legal, *played = zip(*sorted(tokens, key=lambda token: token[3] is None))  # choices, then messages
        def read(name):  # hidden states before the sampled tokens
            with llm.using(name), torch.no_grad() if name is None else contextlib.nullcontext():
                opening = OpeningCache()
                if P:
                    llm.forward([episodes[batch[0]].ids[:P]], [0], opening)
                return llm.forward(rows, [P] * len(rows), OpeningCache(opening.kept))[r, before]
        ref = read(None) if reference else ()
        hidden, choices = read(adapter), sum(ids is not None for ids in legal)
        slices = [slice(0, choices)] + [slice(k, k + llm.slice) for k in range(choices, len(legal), llm.slice)]
        stats = [checkpoint(functools.partial(token_stats, llm, hidden[s], ref[s], target[s], legal[s]), use_reentrant=False)
                 for s in slices if legal[s]]  # partial, since checkpoint takes its arguments apart, every tuple in `legal`
        yield MicroBatch(*(torch.tensor(column, device=hidden.device) for column in played), *torch.cat(stats, 1))
