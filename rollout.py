"""Language models at the table: cached batched sampling, and the same log-probs with gradient.

`Policy` plays: it appends turns to conversations of token ids and samples replies in one batch.
`score` reads finished conversations once more, with gradient. Both take a token's log-prob over the
same legal ids, so play and update agree. Axes: B rows (conversations), S tokens of a row, P tokens
of the opening that all rows share, n sampled tokens, V vocabulary."""

import contextlib
import functools
import hashlib
import os
import pathlib
from collections import namedtuple

import peft
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint

from games import Player
from tiny import Framing, UserError, user_error

# A sampled token of an episode: its place, its round, the ids it was sampled from (a tuple,
# None: all that a message may hold), its log-prob over those in nats.
Sample = namedtuple("Sample", "position round legal logp")
# The sampled tokens of a micro-batch, tensors [n]: index of the episode, round, log-prob in play;
# under the weights being trained log-prob, entropy, KL to the model without adapter (or 0).
Scored = namedtuple("Scored", "episode round logp_play logp entropy kl")
# What one seat of one game read and said, a list of ids; and the list of Samples of what it chose.
Episode = namedtuple("Episode", "ids samples")
DONE = ()  # no id may follow


class OpeningCache(transformers.Cache):
    """Keeps keys and values of an opening, {layer: (k, v)}, each [1, heads, P, width].
    Given some, it puts them before every row's and keeps nothing: a layer may be run again."""

    def __init__(self, opening=None):
        super().__init__(layers=[])
        self.opening, self.kept = opening, {}

    def update(self, k, v, layer, *args, **kwargs):
        if not self.opening:
            self.kept[layer] = k, v
            return k, v
        past_k, past_v = (past.expand(len(k), -1, -1, -1) for past in self.opening[layer])
        return torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)


class PlayCache(transformers.Cache):
    """Keys and values of B conversations that begin with copies of an opening, {layer: [2, B,
    heads, columns, width]}. Columns are positions; LLM.forward masks all past a row's own."""

    def __init__(self, opening, B):
        super().__init__(layers=[])
        self.stored = {}
        for layer, pair in opening.items():
            self.stored[layer] = torch.stack(pair).repeat(1, B, 1, 1, 1)

    def prepare(self, rows, places, columns):
        """The next pass writes `rows` (ascending) at `places` [n, S] and reads so many columns."""
        self.rows, self.places, self.columns = torch.tensor(rows).to(places.device), places, columns
        are_neighbours = rows[-1] - rows[0] + 1 == len(rows)  # read as a slice, not a copy
        self.row_index = slice(rows[0], rows[-1] + 1) if are_neighbours else self.rows

    def update(self, k, v, layer, *args, **kwargs):
        missing = self.columns - self.stored[layer].shape[3]
        if missing > 0:  # grow by a quarter
            self.stored[layer] = F.pad(self.stored[layer], (0, 0, 0, missing + self.columns // 4))
        stored = self.stored[layer]
        stored[0][self.rows[:, None], :, self.places] = k.transpose(1, 2)
        stored[1][self.rows[:, None], :, self.places] = v.transpose(1, 2)
        return tuple(stored[:, self.row_index, :, : self.columns])


class LLM:
    """A causal language model and its adapters; "default" learns. fingerprint: of the embedding."""

    def __init__(self, base, tokenizer, lora_rank=8, seed=0, name="tiny"):
        self.base, self.tokenizer, self.name = base.eval(), tokenizer, name
        self.framing = Framing(tokenizer)
        self.device, self.config = base.device, base.config.get_text_config()
        self.decoder, self.head = base.get_decoder(), base.get_output_embeddings()
        sliding_window = getattr(self.config, "sliding_window", None)
        self.window = min(self.config.max_position_embeddings, sliding_window or 10**9)
        V = self.head.weight.shape[0]
        self.sayable = torch.arange(V, device=self.device) < len(tokenizer)  # [V], in messages
        for i in self.framing.control - {self.framing.end}:
            self.sayable[i : i + 1] = False
        self.slice = max(16, 2**24 // V)  # rows of logits at a time in the update
        sample = base.get_input_embeddings().weight.detach()[::100].bfloat16().contiguous()
        self.fingerprint = hashlib.sha256(sample.cpu().view(torch.uint8).numpy()).hexdigest()
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, task_type="CAUSAL_LM")
        config.target_modules = "all-linear"
        if self.decoder is not base.base_model:  # a multimodal model
            config.exclude_modules = ".*(vision|visual|audio).*"
        with user_error(f"{name} cannot be played with", "choose another model"):
            self.model = peft.get_peft_model(base, config)
            config.base_model_name_or_path = name
            for layer in self.decoder.layers:
                layer.forward = functools.partial(self.run_layer, layer.forward)
            self.check()

    def run_layer(self, forward, *args, **kwargs):
        """A decoder layer; to save memory, it is run again in the backward pass on a GPU."""
        if self.device.type == "cuda" and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    @torch.no_grad()
    def check(self):
        """ValueError unless a cached pass gives the logits of the model's own forward pass."""
        ids = self.framing.user("Hello?", first=True)
        P = len(ids) // 2
        want = self.base(torch.tensor([ids], device=self.device), use_cache=False).logits[0, P:]
        cache = PlayCache(self.read_opening(ids[:P]), B=2)
        got = self.logits(self.forward([ids[P:]] * 2, [P] * 2, cache, [0, 1]))[0]
        difference = (got - want.float()).abs().max().item()
        if not difference <= 0.05 * (1 + want.abs().max()):  # it may be NaN
            raise ValueError(f"its logits differ by {difference:.2g}")

    @contextlib.contextmanager
    def using(self, adapter):
        """Run under the adapter of that name (it stays active), None for the model without any."""
        if self.model.active_adapter != (adapter or "default"):  # to switch takes a while
            self.model.set_adapter(adapter or "default")  # it alone requires gradients from now on
        with self.model.disable_adapter() if adapter is None else contextlib.nullcontext():
            yield

    def forward(self, rows, starts, cache, cache_rows=None):
        """Last hidden states [B, S, width] of `rows` (lists of ids) that begin at `starts`; in a
        PlayCache they are its `cache_rows`. UserError where a conversation outgrows the window."""
        S = max(len(row) for row in rows)
        columns = max(starts) + S
        if columns > self.window:
            raise UserError(f"a game outgrows the model's {self.window} tokens; lower --rounds")
        ids = torch.tensor([row + [0] * (S - len(row)) for row in rows], device=self.device)
        positions = (torch.tensor(starts)[:, None] + torch.arange(S)).to(self.device)  # [B, S]
        later = torch.arange(columns, device=self.device) > positions[:, :, None]  # [B, S, columns]
        mask = torch.finfo(self.base.dtype).min * later.to(self.base.dtype)
        if cache_rows:
            cache.prepare(cache_rows, positions, columns)
        inputs = dict(input_ids=ids, position_ids=positions, attention_mask=mask[:, None])
        return self.decoder(**inputs, use_cache=True, cache=cache).last_hidden_state

    def read_opening(self, ids):
        """{layer: (keys, values)} of the ids that all rows begin with, for the caches above."""
        cache = OpeningCache()
        if ids:
            self.forward([ids], [0], cache)
        return cache.kept

    def logits(self, hidden):
        """hidden [..., width] -> float32 logits [..., V], as the model itself makes them."""
        config, logits = self.config, self.head(hidden).float()
        logits = logits * (getattr(config, "logit_scale", None) or 1)  # Cohere
        logits = logits / (getattr(config, "logits_scaling", None) or 1)  # Granite
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma
        return cap * torch.tanh(logits / cap) if cap else logits

    def log_probs(self, hidden, legal):
        """hidden [n, width], legal [n] tuples or None -> log-probs [n, V] over the legal ids.
        They are about -1e9 elsewhere, not -inf, so that p log p is 0 there."""
        allowed = self.sayable.repeat(len(legal), 1)
        for n, ids in enumerate(legal):
            if ids is not None:
                allowed[n] = False
                allowed[n, list(ids)] = True
        return self.logits(hidden).masked_fill(~allowed, -1e9).log_softmax(-1)

    def load_adapter(self, folder, adapter):
        """Load the adapter in `folder` and call it `adapter`. UserError where it does not fit."""
        with user_error(f"the adapter in {folder} cannot be used", "restore it, or name another"):
            config = peft.PeftConfig.from_pretrained(folder)
            base = pathlib.Path(folder, "base.txt")  # of the embedding; foreign adapters lack it
            if base.exists() and base.read_text() != self.fingerprint:
                raise ValueError(f"it stands on other weights than those of {self.name}")
            weights = peft.load_peft_weights(folder, device=str(self.device))
            if not config.peft_type or not all(".layers." in name for name in weights):
                raise ValueError("it is no adapter of the decoder's layers alone")
            if adapter not in self.model.peft_config:
                self.model.add_adapter(adapter, config)
            result = peft.set_peft_model_state_dict(self.model, weights, adapter)
            missing = [name for name in result.missing_keys if f".{adapter}." in name]
            if missing or result.unexpected_keys:
                raise ValueError(f"missing or foreign: {[*missing, *result.unexpected_keys][0]}")


class Policy(Player):
    """The model under one adapter (None: without any) as a player; `episodes` {key: Episode}."""

    def __init__(self, llm, adapter="default"):
        self.llm, self.adapter, self.episodes = llm, adapter, {}

    def begin(self, seed, keys):
        super().begin(seed, keys)
        self.episodes.update((key, Episode([], [])) for key in keys)
        self.cache, self.rows, self.cached = None, {}, {}  # by key: row in it, number of ids in it

    @torch.no_grad()
    def reply(self, questions):
        """Sampled replies; all conversations in one batch, until the last reply is finished."""
        starts = {}
        for key, turn, _ in questions:
            ids = self.episodes[key].ids
            ids += self.llm.framing.user(turn.text, first=not ids)
            starts[key] = len(ids)
            self.rows.setdefault(key, len(self.rows))  # by first turns, so that reads are slices
        waiting = sorted(questions, key=lambda question: self.rows[question.key])
        with self.llm.using(self.adapter):
            while True:
                legal = {q.key: self.write_forced(q, starts[q.key]) for q in waiting}
                waiting = [q for q in waiting if legal[q.key] != DONE]
                if not waiting:
                    break
                keys = [q.key for q in waiting]
                logp = self.llm.log_probs(self.read_news(keys), [legal[key] for key in keys])
                drawn = self.draw(logp, keys)
                logp, drawn = logp.gather(1, drawn)[:, 0].tolist(), drawn[:, 0].tolist()
                for n, (key, _, history) in enumerate(waiting):
                    ids, samples = self.episodes[key]
                    samples.append(Sample(len(ids), len(history), legal[key], logp[n]))
                    ids.append(drawn[n])
        return [self.llm.framing.decode(self.episodes[k].ids[n:]) for k, n in starts.items()]

    def write_forced(self, question, start):
        """Append what leaves no choice to the reply that begins at `start`.
        -> the ids that may come next: None for all that a message may hold, DONE at its end."""
        ids, turn, end = self.episodes[question.key].ids, question.turn, self.llm.framing.end
        while True:
            written, legal = tuple(ids[start:]), None
            if turn.choices:
                legal = self.llm.framing.trie(turn.choices).get(written, DONE)
            elif end in written:
                legal = DONE
            elif len(written) == turn.max_tokens:
                legal = (end,)
            if legal is None or len(legal) != 1:
                return legal
            ids.append(legal[0])

    def draw(self, logp, keys):
        """One id per row of logp [n, V], with the random numbers of `keys` [n] -> [n, 1]."""
        u = torch.tensor([[self.rngs[key].random()] for key in keys], dtype=torch.float64)
        cdf = logp.double().exp().cumsum(-1)  # [n, V]
        return torch.searchsorted(cdf, u.to(cdf.device) * cdf[:, -1:], right=True)  # where p > 0

    def read_news(self, keys):
        """Read what is new in the conversations `keys`: hidden states [n, width] at their ends."""
        conversations = [self.episodes[key].ids for key in keys]
        if self.cache is None:  # one conversation is read for all, who keep what they share with it
            self.opening = conversations[0][:-1]
            self.cache = PlayCache(self.llm.read_opening(self.opening), B=len(self.rngs))
        starts, news = [], []
        for key, ids in zip(keys, conversations):
            if key not in self.cached:
                self.cached[key] = len(os.path.commonprefix([ids[:-1], self.opening]))
            starts.append(self.cached[key])
            news.append(ids[self.cached[key] :])
            self.cached[key] = len(ids)
        hidden = self.llm.forward(news, starts, self.cache, [self.rows[key] for key in keys])
        return hidden[range(len(keys)), [len(ids) - 1 for ids in news]]


def score(llm, episodes, budget, reference=False):
    """Yield the sampled tokens of `episodes` as Scored, reading up to `budget` ids at a time.
    reference: whether to read everything once more without adapter, for the KL."""
    order = [b for b, episode in enumerate(episodes) if episode.samples]
    order.sort(key=lambda b: len(episodes[b].ids), reverse=True)  # alike lengths: little padding
    P = len(os.path.commonprefix([episodes[b].ids for b in order]))
    P = min([P, *(episodes[b].samples[0].position - 1 for b in order)])  # keep what predicts them
    while order:
        B = max(1, budget // (len(episodes[order[0]].ids) - P))
        yield score_rows(llm, episodes, order[:B], P, reference)
        order = order[B:]


def score_rows(llm, episodes, indices, P, reference):
    """Scored of the episodes `indices`, read up to their last sample; the P ids they share once."""
    rows = [episodes[b].ids[P : episodes[b].samples[-1].position] for b in indices]
    sampled = [(n, b, *sample) for n, b in enumerate(indices) for sample in episodes[b].samples]
    row, episode, position, round, legal, logp = zip(*sampled)
    column = [p - 1 - P for p in position]  # a token is sampled from what stands before it
    targets = torch.tensor([episodes[b].ids[p] for b, p in zip(episode, position)]).to(llm.device)

    def hidden_under(adapter):
        with llm.using(adapter):
            opening = OpeningCache(llm.read_opening(episodes[indices[0]].ids[:P]))
            return llm.forward(rows, [P] * len(rows), opening)[row, column]  # [n, width]

    hidden = plain = hidden_under("default")
    if reference:
        with torch.no_grad():
            plain = hidden_under(None)
    stats = []
    for start in range(0, len(legal), llm.slice):  # logits are large: made anew when needed
        part = slice(start, start + llm.slice)
        inputs = llm, targets[part], legal[part], reference, hidden[part], plain[part]
        stats.append(checkpoint(token_stats, *inputs, use_reentrant=False))
    played = [torch.tensor(values, device=llm.device) for values in (episode, round, logp)]
    return Scored(*played, *torch.cat(stats, dim=1))


def token_stats(llm, targets, legal, reference, hidden, plain):
    """Log-prob, entropy and KL [3, n] of sampled tokens, over the ids they were sampled from."""
    logp = llm.log_probs(hidden, legal)
    p = logp.exp()
    chosen = logp.gather(1, targets[:, None])[:, 0]
    entropy = -(p * logp).sum(-1)
    kl = torch.zeros_like(entropy)
    if reference:
        kl = (p * (logp - llm.log_probs(plain, legal))).sum(-1)
    return torch.stack([chosen, entropy, kl])
