"""Models as players: loading, chat framing, exact choices, batched play over a kept cache, and scoring for the update.

Ids in, ids out: what was sampled is stored as ids and never tokenized again. A game's text goes through the chat template's
own strings, learned once at load. A choice is sampled on a trie over the legal replies; what all of them share is written,
not sampled. Every token of a conversation goes through the model once in play, and the opening all rows share once per batch.

Axes: B rows (conversations), S tokens, P tokens of the common opening, N sampled tokens, U candidate ids, V vocabulary.
"""
import contextlib
import functools
import os
import re
from dataclasses import dataclass, field

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer

from games import Scripted, UserError, players

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Framing:
    """The ids that open and close the turns of a chat, learned from the tokenizer's template.

    first   everything before the first user text       reply   closes a user turn and opens the assistant's
    end     the end-of-turn token, part of the action   again   what follows it, up to the next user text
    control ids that no quoted text and no sampled message may contain, `end` included
    Raises UserError where appending turns would not reproduce the template (thinking blocks kept empty are allowed).
    """

    def __init__(self, tokenizer):
        self.tokenizer, added = tokenizer, tokenizer.added_tokens_decoder
        talk = ["Question: 1 or 2?", "A", 'The other says: "Hi."\nHow many?', "10 0 5", "Go on."]
        marks = [f"text{n}mark" for n in range(5)]
        parts = re.split("|".join(marks), self._render(marks))
        refuse = UserError("the chat template of this model cannot be framed turn by turn (its turns are not simply "
                           "appended); choose another instruct model")
        if len(parts) != 6 or parts[1] != parts[3] or parts[2] != parts[4] or not parts[5].startswith(parts[1]):
            raise refuse
        first, history, again, reply = parts[0], parts[1], parts[2], parts[5]
        if self._render(talk) != "".join(a + b for a, b in zip([first, history, again, history, again], talk)) + reply:
            raise refuse
        ids = functools.partial(tokenizer.encode, add_special_tokens=False)
        self.first, self.reply, (self.end, *self.again) = ids(first), ids(reply), ids(again)
        special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self.control = special | set(added).intersection(self.first, self.reply, [self.end], self.again)
        names = [added[i].content if i in added else tokenizer.convert_ids_to_tokens(i) for i in self.control]
        self._inside = re.compile("|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names if len(n) > 1))
        self._cache = {}
        mine = self.user(talk[0], True) + self.encode(talk[1]) + [self.end] + self.user(talk[2])
        mine += self.encode(talk[3]) + [self.end] + self.user(talk[4])
        whole = "".join(a + b for a, b in zip([first, reply, again, reply, again], talk)) + reply
        if self.end not in self.control or mine != ids(whole):
            raise refuse

    def _render(self, texts):
        chat = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        try:  # a fixed date, where a template writes one, keeps runs repeatable
            return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True,
                                                      enable_thinking=False, date_string="1 January 2026")
        except Exception as error:  # templates raise whatever they like
            raise UserError(f"this model has no usable chat template ({str(error).splitlines()[0]}); choose an "
                            "instruct model") from error

    def encode(self, text):
        """Ids of plain text; a control token spelled out in it stays text."""
        if text not in self._cache:
            if len(self._cache) > 50_000:
                self._cache.clear()
            pieces = self._inside.split(text)  # cut inside every control token's name
            ids = self.tokenizer(pieces, add_special_tokens=False).input_ids
            self._cache[text] = [i for piece in ids for i in piece if i not in self.control]
        return self._cache[text]

    def user(self, text, first=False):
        """Ids of a user turn and of the opening of the assistant's turn that answers it."""
        return (self.first if first else self.again) + self.encode(text.strip()) + self.reply


def build_trie(replies):
    """Nested dict {id: subtree} over {ids (tuple): reply}; a leaf is the reply itself. ValueError where one begins another."""
    root = {}
    for ids, reply in replies.items():
        node = root
        for i in ids[:-1]:
            node = node.setdefault(i, {})
        if isinstance(node, str) or ids[-1] in node:
            raise ValueError(f"legal reply {reply!r} and another one begin with the same ids")
        node[ids[-1]] = reply
    return root


@dataclass
class Episode:
    """One seat's conversation. `at`, `round`, `legal`, `logp` describe its sampled tokens: position in `ids`, round,
    legal ids (None: the whole vocabulary less control tokens), log-prob over just those when it was sampled."""
    ids: list = field(default_factory=list)
    at: list = field(default_factory=list)
    round: list = field(default_factory=list)
    legal: list = field(default_factory=list)
    logp: list = field(default_factory=list)


class SlotLayer(DynamicLayer):
    """One layer's keys and values [B, heads, columns, width] of a batch in play. The column is the position in the conversation,
    so rows of different length leave no holes. `where` holds the rows [n], positions [n, S] and number of columns of the pass under way."""

    def __init__(self, where, B):
        super().__init__()
        self.where, self.B = where, B

    def update(self, k, v, *args, **kwargs):
        (rows, positions, columns), room = self.where, 0 if self.keys is None else self.keys.shape[2]
        if room < columns:
            grown = k.new_zeros(2, self.B, k.shape[1], 2 * columns, k.shape[3])
            if room:
                grown[0, :, :, :room], grown[1, :, :, :room] = self.keys, self.values
            self.keys, self.values = grown
        self.keys[rows[:, None], :, positions] = k.transpose(1, 2)
        self.values[rows[:, None], :, positions] = v.transpose(1, 2)
        if len(rows) == self.B:  # all rows, which come in order: a view instead of a copy
            return self.keys[:, :, :columns], self.values[:, :, :columns]
        return self.keys[rows, :, :columns], self.values[rows, :, :columns]


class OpeningLayer(DynamicLayer):
    """Records the keys and values of the common opening, or, given them, puts them before those of every row. It keeps no
    state of the rows, so gradient checkpointing may run a layer twice."""

    def __init__(self, keys=None, values=None):
        super().__init__()
        self.opening = None if keys is None else (keys, values)

    def update(self, k, v, *args, **kwargs):
        if self.opening is None:
            self.keys, self.values = k, v
            return k, v
        return tuple(torch.cat([old.expand(len(new), -1, -1, -1), new], 2) for old, new in zip(self.opening, (k, v)))


class LLM:
    """A causal language model with its adapters, and the two passes over it: `feed` in play, `score` in the update."""

    def __init__(self, base, tokenizer, lora_rank=0, seed=0):
        self.tokenizer, self.framing, self.base = tokenizer, Framing(tokenizer), base.eval()
        self.device, self.decoder, self.head = base.device, base.get_decoder(), base.get_output_embeddings()
        config = base.config.get_text_config()
        self.layers, self.window = config.num_hidden_layers, config.max_position_embeddings
        if "sliding_attention" in (getattr(config, "layer_types", None) or ["full_attention"]):
            self.window = min(self.window, config.sliding_window)  # shorter conversations never notice the sliding
        V = self.head.weight.shape[0]
        self.allowed = torch.ones(V, dtype=torch.bool)  # what a message may consist of
        self.allowed[[i for i in self.framing.control if i != self.framing.end]] = False
        self.allowed[len(tokenizer):] = False  # rows of the head that pad the vocabulary
        self.allowed = self.allowed.to(self.device)
        probe = torch.tensor([self.framing.user("Hello?", True)], device=self.device)
        with torch.no_grad():
            want, got = base(probe).logits[0].float(), self.logits(self.decoder(probe).last_hidden_state[0])
        if not torch.allclose(want, got, atol=1e-3, rtol=1e-2):
            raise UserError("this model changes its logits after the output layer (soft-capping or scaling), which is not "
                            "supported; choose another model")
        self.slice, self.checkpointing, self.tries = max(16, 2 ** 24 // V), False, {}
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=lora_rank or 8, lora_alpha=2 * (lora_rank or 8), target_modules="all-linear",
                               task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(base, lora)
        for layer in self.decoder.layers:
            layer.forward = functools.partial(self._layer, layer.forward)

    def _layer(self, forward, *args, **kwargs):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    @contextlib.contextmanager
    def using(self, adapter):
        """Run under the adapter of that name, None for the model without any."""
        if adapter is None:
            with self.model.disable_adapter():
                yield
        else:
            if self.model.active_adapter != adapter:
                self.model.set_adapter(adapter)
            yield

    def logits(self, hidden, columns=None):
        """hidden [n, width] -> float32 logits [n, V], or [n, U] of the ids `columns` [U] only."""
        weight, bias = self.head.weight, self.head.bias
        if columns is not None:
            weight, bias = weight[columns], None if bias is None else bias[columns]
        return F.linear(hidden, weight, bias).float()

    def candidates(self, legal):
        """What n tokens of one kind are drawn from: ids `columns` [U] and mask [n, U] for choices (`legal` holds tuples of
        ids), or None, the whole vocabulary, and mask [V] for messages (`legal` holds None)."""
        if legal[0] is None:
            return None, self.allowed
        kinds = list(dict.fromkeys(legal))
        columns = sorted(set().union(*kinds))
        table = torch.tensor([[i in kind for i in columns] for kind in kinds])
        return torch.tensor(columns, device=self.device), table[[kinds.index(ids) for ids in legal]].to(self.device)

    def trie(self, choices):
        """The trie of a tuple of legal replies, each closed by the end-of-turn token."""
        if choices not in self.tries:
            self.tries[choices] = build_trie({(*self.framing.encode(text), self.framing.end): text for text in choices})
        return self.tries[choices]

    def forward(self, rows, starts, layers):
        """Last hidden states [B, S, width] of rows of ids (padded right) whose first ids stand at the positions `starts`
        (list); `layers` is one cache layer per layer of the model. Gradient as set outside."""
        S = max(map(len, rows))
        ids = torch.tensor([row + [0] * (S - len(row)) for row in rows], device=self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(S, device=self.device)
        mask = torch.arange(max(starts) + S, device=self.device) <= positions[:, :, None]  # a column is a position
        return self.decoder(input_ids=ids, position_ids=positions, attention_mask=mask[:, None],
                            past_key_values=Cache(layers=layers), use_cache=True).last_hidden_state

    def read(self, ids):
        """(keys, values) of every layer [1, heads, P, width] for the opening `ids` [P], which may be empty."""
        layers = [OpeningLayer() for _ in range(self.layers)]
        if ids:
            self.forward([ids], [0], layers)
        return [(layer.keys, layer.values) for layer in layers if ids]

    def follow(self, rows, P, opening):
        """Hidden states [B, S, width] of rows of ids after an opening of P tokens read before."""
        return self.forward(rows, [P] * len(rows), [OpeningLayer(*kv) for kv in opening or [()] * self.layers])

    def save_adapter(self, folder, adapter="default"):
        """Write an adapter in PEFT's format, the weights replaced whole."""
        os.makedirs(folder, exist_ok=True)
        weights = peft.get_peft_model_state_dict(self.model, adapter_name=adapter, save_embedding_layers=False)
        save_file({k: v.contiguous() for k, v in weights.items()}, os.path.join(folder, "new"))
        os.replace(os.path.join(folder, "new"), os.path.join(folder, "adapter_model.safetensors"))
        if not os.path.exists(os.path.join(folder, "adapter_config.json")):
            self.model.peft_config[adapter].save_pretrained(folder)

    def set_weights(self, adapter, folder):
        """Overwrite an adapter with the weights saved in `folder`."""
        weights = load_file(os.path.join(folder, "adapter_model.safetensors"), device=str(self.device))
        peft.set_peft_model_state_dict(self.model, weights, adapter_name=adapter)

    def token_budget(self):
        """Tokens per micro-batch that fit: on a GPU by its free memory, else what keeps the caches of a CPU busy."""
        if self.device.type != "cuda":
            return 8192
        config = self.base.config.get_text_config()
        per_token = 2 * config.hidden_size * (self.layers + 60) + 4 * config.intermediate_size  # bytes, with checkpointing
        return max(1024, int(0.5 * torch.cuda.mem_get_info()[0] / per_token))


class Policy:
    """The model under one adapter (None: without any) as a player. `episodes` {(game, seat): Episode} is what it did."""

    def __init__(self, llm, adapter="default"):
        self.llm, self.adapter = llm, adapter

    def begin(self, seed, keys):
        """Forget all games and prepare for those of `keys`; `seed` (list of ints) and the key fix each row's draws, so that
        a game does not depend on what else is in the batch."""
        self.row = {key: b for b, key in enumerate(keys)}
        self.rows = [Episode() for _ in keys]
        self.episodes = dict(zip(keys, self.rows))
        self.rngs = [np.random.default_rng([*seed, *key]) for key in keys]
        self.cached, self.lead, self.where = [0] * len(keys), None, []
        self.layers = [SlotLayer(self.where, len(keys)) for _ in range(self.llm.layers)]

    @torch.no_grad()
    def reply(self, keys, turns):
        """Sampled replies (list of str) of the rows `keys` to `turns`, all rows in one batch until the last has finished."""
        llm, active, said = self.llm, [], {}
        for key, turn in zip(keys, turns):
            row = self.rows[self.row[key]]
            row.ids += llm.framing.user(turn.text, first=not row.ids)
            active.append((self.row[key], llm.trie(turn.choices) if turn.choices else None, len(row.ids), turn))
        active.sort(key=lambda item: item[0])
        with llm.using(self.adapter):
            while active:
                going = []
                for b, node, start, turn in active:
                    ids = self.rows[b].ids
                    while isinstance(node, dict) and len(node) == 1:  # only one way on: written, not sampled
                        ids.extend(node)
                        [node] = node.values()
                    if node is None and ids[-1] != llm.framing.end and len(ids) - start >= turn.max_tokens:
                        ids.append(llm.framing.end)  # cut: the end of turn was not its choice
                    if isinstance(node, str):
                        said[b] = node
                    elif node is None and ids[-1] == llm.framing.end and len(ids) > start:
                        said[b] = llm.tokenizer.decode(ids[start:-1])
                    else:
                        going.append((b, node, start, turn))
                active = going and self._sample(going)
        return [said[self.row[key]] for key in keys]

    def _sample(self, active):
        """One sampled token for every row of `active` [(row, trie or None, start, turn)]; returns it with the tries advanced."""
        legal = [tuple(node) if node else None for _, node, _, _ in active]
        columns, mask = self.llm.candidates(legal)
        logp = F.log_softmax(self.llm.logits(self._feed([b for b, *_ in active]), columns).masked_fill(~mask, -torch.inf), -1)
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)
        u = torch.tensor([[self.rngs[b].random(dtype=np.float32)] for b, *_ in active], dtype=torch.float64)
        pick = torch.searchsorted(cdf, u.to(cdf.device) * cdf[:, -1:], right=True)  # strictly above u: never a column of mass 0
        ids = (pick if columns is None else columns[pick])[:, 0].tolist()
        out = []
        for (b, node, start, turn), i, lp, ok in zip(active, ids, logp.gather(1, pick)[:, 0].tolist(), legal):
            row = self.rows[b]
            row.at.append(len(row.ids))
            row.ids.append(i)
            row.legal.append(ok)
            row.logp.append(lp)
            row.round.append(turn.view["round"])
            out.append((b, node and node[i], start, turn))
        return out

    def _feed(self, rows):
        """Put what the rows (ascending) have not yet been fed through the model -> hidden state [n, width] at each row's end."""
        fresh = [b for b in rows if not self.cached[b]]
        if fresh and self.lead is None:  # one row reads what all have in common, the others copy it
            self.lead = fresh[0]
            P = min(len(os.path.commonprefix([self.rows[b].ids for b in fresh])), min(len(self.rows[b].ids) for b in fresh) - 1)
            if P:
                self._through([self.lead], P)
        for b in fresh:
            seen = self.rows[self.lead].ids[:self.cached[self.lead]]
            self.cached[b] = min(len(os.path.commonprefix([self.rows[b].ids, seen])), len(self.rows[b].ids) - 1)
        P = max((self.cached[b] for b in fresh), default=0)
        for layer in self.layers if P else ():
            layer.keys[fresh, :, :P], layer.values[fresh, :, :P] = layer.keys[self.lead, :, :P], layer.values[self.lead, :, :P]
        return self._through(rows)

    def _through(self, rows, stop=None):
        """Feed the ids up to `stop` of the rows (ascending) that are not yet in the cache -> hidden state [n, width] of each last."""
        new, starts = [self.rows[b].ids[self.cached[b]:stop] for b in rows], [self.cached[b] for b in rows]
        columns = max(starts) + max(map(len, new))
        if columns > self.llm.window:
            raise UserError(f"a conversation of {columns} tokens is longer than this model's {self.llm.window}; use fewer "
                            "--rounds or a smaller --max-message-tokens")
        at = torch.tensor(starts)[:, None] + torch.arange(max(map(len, new)))
        self.where[:] = torch.tensor(rows, device=self.llm.device), at.to(self.llm.device), columns
        hidden = self.llm.forward(new, starts, self.layers)
        for b, ids in zip(rows, new):
            self.cached[b] += len(ids)
        return hidden[torch.arange(len(rows)), torch.tensor([len(ids) - 1 for ids in new])]


def load(name, quant, game, lora_rank=8, seed=0):
    """The model `name` ("tiny...", a folder, or a hub id) with a fresh adapter "default" of that rank, drawn from `seed`.
    quant "nf4": 4-bit weights; "none": float32 on the CPU, bfloat16 on the GPU. Raises UserError for what cannot be had."""
    if name.startswith("tiny"):
        import tiny  # here, since it builds on this file
        base, tokenizer = tiny.load(name, game)
        return LLM(base, tokenizer, lora_rank, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "config.json")):
        raise UserError(f"{name} is a folder without a model (no config.json); give a Hugging Face model folder, a hub id or tiny")
    options = {"dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
    if quant == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=options["dtype"])
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            name, attn_implementation="sdpa", device_map={"": device}, use_safetensors=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"cannot load model {name!r} ({' '.join(str(error).split())[:200]}); give a Hugging Face model folder, "
                        "a hub id that is cached or reachable, or --model tiny, which needs no download") from error
    llm = LLM(base, tokenizer, lora_rank, seed)
    llm.checkpointing = device.type == "cuda"
    return llm


def find_agent(name, game, llm):
    """The agent called `name`: a scripted player of `game`, "base" (the model without adapter), or the folder of a run or adapter."""
    if name in players(game):
        return Scripted(name)
    if name == "base":
        return Policy(llm, None)
    folder = os.path.join(name, "adapter") if os.path.isdir(os.path.join(name, "adapter")) else name
    if not os.path.exists(os.path.join(folder, "adapter_model.safetensors")):
        raise UserError(f"no agent is called {name!r}; give a run's folder, base, or one of {', '.join(players(game))}")
    llm.model.load_adapter(folder, adapter_name=name.replace(".", "_"))
    return Policy(llm, name.replace(".", "_"))
