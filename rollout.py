"""Models as players: loading, exact choices, and batched play over a kept cache; other players by name.

Ids in, ids out: what was sampled is stored as ids and never tokenized again. A choice is sampled on a trie over the legal
replies; what all of them share is written, not sampled. Every token of a conversation goes through the model once.

Axes: B rows (conversations), S tokens, P tokens of the common opening, n sampled tokens, U candidate ids, V vocabulary.
"""
import contextlib, functools, inspect, logging, os, warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises on kernels while it is imported
import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer

import tiny
from games import Human, Player, Scripted, UserError, players
from tiny import Framing, build_trie

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what peft calls in it

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
    """A layer's keys and values [B, heads, columns, width] of a batch in play; the column is the position in the conversation,
    so rows of different length leave no holes. `where`: rows [n], positions [n, S], number of columns of the pass under way."""

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
        rows = slice(None) if len(rows) == self.B else rows  # all rows, which come in order: a view instead of a copy
        return self.keys[rows, :, :columns], self.values[rows, :, :columns]

class LLM:
    """A causal language model, its adapters ("default" is the one that learns), and what play and update ask of it."""

    def __init__(self, base, tokenizer, lora_rank=8, seed=0, name="tiny"):
        self.tokenizer, self.framing, self.base, self.name = tokenizer, Framing(tokenizer), base.eval(), name
        self.device, self.decoder, self.head = base.device, base.get_decoder(), base.get_output_embeddings()
        config = base.config.get_text_config()
        self.layers, self.window, V = config.num_hidden_layers, config.max_position_embeddings, self.head.weight.shape[0]
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            self.window = min(self.window, config.sliding_window)  # shorter conversations never notice the sliding
        self.cache = "cache" if "cache" in inspect.signature(self.decoder.forward).parameters else "past_key_values"  # the old name
        self.allowed = torch.tensor([i < len(tokenizer) and (i not in self.framing.control or i == self.framing.end)
                                     for i in range(V)], device=self.device)  # [V] what a message may consist of
        probe = torch.tensor([self.framing.user("Hello?", True)], device=self.device)
        with torch.no_grad():
            want, got = base(probe).logits[0].float(), self.logits(self.decoder(probe).last_hidden_state[0])
        if not torch.allclose(want, got, atol=1e-3, rtol=1e-2):
            raise UserError("this model scales or caps its logits, which is not supported; choose another model")
        self.slice, self.checkpointing, self.tries = max(16, 2 ** 24 // V), False, {}
        torch.manual_seed(seed)
        self.model = peft.get_peft_model(base, peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, task_type="CAUSAL_LM",
                                                               target_modules="all-linear"))
        config = self.model.peft_config["default"]
        config.base_model_name_or_path, config.target_modules = name, sorted(config.target_modules)  # a set has no fixed order
        for layer in self.decoder.layers:
            layer.forward = functools.partial(self.layer_forward, layer.forward)

    def layer_forward(self, forward, *args, **kwargs):
        """A decoder layer, under gradient checkpointing where `checkpointing` asks for it."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    @contextlib.contextmanager
    def using(self, adapter):
        """Run under the adapter of that name, None for the model without any."""
        if adapter is not None and self.model.active_adapter != adapter:
            self.model.set_adapter(adapter)
        with self.model.disable_adapter() if adapter is None else contextlib.nullcontext():
            yield
        if adapter not in (None, "default"):
            self.model.set_adapter("default")  # the active adapter is the one that requires gradients

    def forward(self, rows, starts, layers):
        """Last hidden states [B, S, width] of rows of ids (padded right) whose first ids stand at the positions `starts`
        (list); `layers` is one cache layer per layer of the model. Gradient as set outside."""
        S = max(map(len, rows))
        ids = torch.tensor([row + [0] * (S - len(row)) for row in rows], device=self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(S, device=self.device)
        mask = torch.arange(max(starts) + S, device=self.device) <= positions[:, :, None]  # a column is a position
        return self.decoder(input_ids=ids, position_ids=positions, attention_mask=mask[:, None], use_cache=True,
                            **{self.cache: Cache(layers=layers)}).last_hidden_state

    def logits(self, hidden, columns=None):
        """hidden [n, width] -> float32 logits [n, V], or [n, U] of the ids `columns` [U] only."""
        weight, bias = self.head.weight, self.head.bias
        if columns is not None:
            weight, bias = weight[columns], None if bias is None else bias[columns]
        return F.linear(hidden, weight, bias).float()

    def candidates(self, legal):
        """What n tokens are drawn from: ids `columns` [U] and mask [n, U] for choices (`legal`: tuples of ids), or None, the
        whole vocabulary, and mask [V] for messages (`legal`: None)."""
        if legal[0] is None:
            return None, self.allowed
        kinds = {ids: n for n, ids in enumerate(dict.fromkeys(legal))}
        columns = sorted(set().union(*kinds))
        table = torch.tensor([[i in kind for i in columns] for kind in kinds])
        return torch.tensor(columns, device=self.device), table[[kinds[ids] for ids in legal]].to(self.device)

    def trie(self, choices):
        """The trie of a tuple of legal replies, each closed by the end-of-turn token."""
        if choices not in self.tries:
            self.tries[choices] = build_trie([((*self.framing.encode(text), self.framing.end), text) for text in choices])
        return self.tries[choices]

    def save_adapter(self, folder, adapter="default"):
        """Write an adapter in PEFT's format, the weights replaced whole."""
        self.model.peft_config[adapter].save_pretrained(folder)
        weights = peft.get_peft_model_state_dict(self.model, adapter_name=adapter, save_embedding_layers=False)
        save_file({k: v.contiguous() for k, v in weights.items()}, os.path.join(folder, "adapter.new"))
        os.replace(os.path.join(folder, "adapter.new"), os.path.join(folder, "adapter_model.safetensors"))

    def load_adapter(self, folder, adapter):
        """Put the adapter saved in `folder` under the name `adapter`. UserError where it is damaged or of another model."""
        try:
            weights = load_file(os.path.join(folder, "adapter_model.safetensors"), device=str(self.device))
            saved = peft.PeftConfig.from_pretrained(folder)
            if saved.base_model_name_or_path != self.name:
                raise UserError(f"the adapter in {folder} was trained on {saved.base_model_name_or_path}, not on {self.name}")
            if adapter not in self.model.peft_config:
                self.model.add_adapter(adapter, saved)
            peft.set_peft_model_state_dict(self.model, weights, adapter_name=adapter)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"the adapter in {folder} is damaged ({' '.join(str(error).split())[:120]})") from error

    def token_budget(self):
        """Tokens per micro-batch that fit: on a GPU by its free memory, on a CPU what its caches like."""
        config = self.base.config.get_text_config()
        per_token = 2 * config.hidden_size * (self.layers + 60) + 4 * config.intermediate_size  # bytes, with checkpointing
        return 4096 if self.device.type == "cpu" else max(1024, int(0.5 * torch.cuda.mem_get_info()[0] / per_token))

class Policy:
    """The model under one adapter (None: without any) as a player. `episodes` {(game, seat): Episode} is what it did."""

    def __init__(self, llm, adapter="default"):
        self.llm, self.adapter = llm, adapter

    def begin(self, seed, keys):
        """See Player; a row's draws follow from `seed` and its key, so a game does not depend on what else is in the batch."""
        self.row, self.rows = {key: b for b, key in enumerate(keys)}, [Episode() for _ in keys]
        self.episodes = dict(zip(keys, self.rows))
        self.rngs = [np.random.default_rng([*seed, *key]) for key in keys]
        self.cached, self.lead, self.where = [0] * len(keys), None, []
        self.layers = [SlotLayer(self.where, len(keys)) for _ in range(self.llm.layers)]

    @torch.no_grad()
    def reply(self, keys, turns):
        """Sampled replies (list of str) of the rows `keys` to `turns`, all rows in one batch until the last has finished."""
        going, said = {}, {}  # {row: (trie or None, where its reply starts, turn)}
        for b, turn in sorted(zip((self.row[key] for key in keys), turns), key=lambda pair: pair[0]):
            self.rows[b].ids += self.llm.framing.user(turn.text, first=not self.rows[b].ids)
            going[b] = self.llm.trie(turn.choices) if turn.choices else None, len(self.rows[b].ids), turn
        with self.llm.using(self.adapter):
            while going:
                for b, (node, start, turn) in list(going.items()):
                    node, said[b] = self._settle(self.rows[b].ids, node, start, turn.max_tokens)
                    going[b] = node, start, turn
                    if said[b] is not None:
                        del going[b]
                if going:
                    self._sample(going)
        return [said[self.row[key]] for key in keys]

    def _settle(self, ids, node, start, max_tokens):
        """Append to `ids` what is not sampled; returns where in the trie that leads, and the reply if it is complete."""
        while isinstance(node, dict) and len(node) == 1:  # only one way on
            ids.extend(node)
            [node] = node.values()
        if node is not None:
            return node, node if isinstance(node, str) else None
        if len(ids) == start or ids[-1] != self.llm.framing.end:
            if len(ids) - start < max_tokens:
                return None, None
            ids.append(self.llm.framing.end)  # cut: the end of turn was not its choice
        return None, self.llm.tokenizer.decode(ids[start:-1])

    def _sample(self, going):
        """Sample one token for every row of `going`, and follow it down its trie."""
        legal = [tuple(node) if node else None for node, _, _ in going.values()]
        columns, mask = self.llm.candidates(legal)
        logp = F.log_softmax(self.llm.logits(self._feed(list(going)), columns).masked_fill(~mask, -torch.inf), -1)
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)
        u = torch.tensor([[self.rngs[b].random(dtype=np.float32)] for b in going], dtype=torch.float64)
        pick = torch.searchsorted(cdf, u.to(cdf.device) * cdf[:, -1:], right=True)  # strictly above u: never a column of mass 0
        ids = (pick if columns is None else columns[pick])[:, 0].tolist()
        for (b, (node, start, turn)), i, lp, ok in zip(going.items(), ids, logp.gather(1, pick)[:, 0].tolist(), legal):
            row, going[b] = self.rows[b], (node and node[i], start, turn)
            for column, value in ((row.at, len(row.ids)), (row.ids, i), (row.legal, ok), (row.logp, lp), (row.round, turn.view["round"])):
                column.append(value)

    def _feed(self, rows):
        """Put what the rows (ascending) have not yet been fed through the model -> hidden state [n, width] at each row's end."""
        ids, fresh = [row.ids for row in self.rows], [b for b in rows if not self.cached[b]]
        if fresh and self.lead is None:  # one row reads what all have in common, the others copy it
            self.lead = fresh[0]
            if P := min(len(os.path.commonprefix([ids[b] for b in fresh])), min(len(ids[b]) for b in fresh) - 1):
                self._through([self.lead], P)
        for b in fresh:
            self.cached[b] = min(len(os.path.commonprefix([ids[b], ids[self.lead][:self.cached[self.lead]]])), len(ids[b]) - 1)
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

class Api(Player):
    """A chat model behind an OpenAI-compatible endpoint (OPENAI_BASE_URL, OPENAI_API_KEY), asked with plain chat messages.
    `invalid` lists the (game, seat) of every turn that got no legal reply and was answered at random, or with silence."""

    def __init__(self, model):
        try:
            import openai
        except ImportError:
            raise UserError("an api: agent needs the openai package; pip install openai") from None
        if not os.environ.get("OPENAI_API_KEY"):
            raise UserError("an api: agent needs a key; set OPENAI_API_KEY (and OPENAI_BASE_URL for another server)")
        self.model, self.invalid, self.client = model, [], openai.OpenAI(max_retries=3, timeout=30)  # it backs off before it retries
        self.refusals = openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError
        self.failures = openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError  # the last four: the reply is nonsense

    def begin(self, seed, keys):
        super().begin(seed, keys)
        self.chats = {key: [] for key in keys}

    def reply(self, keys, turns):
        """Replies (list of str) to `turns`, asked for at the same time. UserError where the server refuses key or model."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self.ask, keys, turns))

    def ask(self, key, turn):
        chat, legal = self.chats[key], False
        chat.append({"role": "user", "content": turn.text})
        for _ in range(3):
            try:
                answer = self.client.chat.completions.create(model=self.model, messages=chat, max_tokens=turn.max_tokens or 8)
                said = answer.choices[0].message.content.strip()
                legal = turn.choices is None or said in turn.choices
            except self.refusals as error:
                raise UserError(f"the server refuses api:{self.model} (status {error.status_code}); check the name and the key") from None
            except self.failures:
                break
            if legal:
                break
        if not legal:
            self.invalid.append(key)
            said = turn.choices[self.rngs[key].integers(len(turn.choices))] if turn.choices else ""
        chat.append({"role": "assistant", "content": said})
        return said

def load(name, quant, game, lora_rank=8, seed=0):
    """The model `name` ("tiny...", a folder, or a hub id) with a fresh adapter "default" of that rank, drawn from `seed`.
    quant "nf4": 4-bit weights; "none": float32 on the CPU, bfloat16 on the GPU. Raises UserError for what cannot be had."""
    if name.startswith("tiny") and not os.path.exists(name):
        return LLM(*tiny.load(name, game), lora_rank, seed, f"{name} {game}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {"dtype": torch.bfloat16 if device.type == "cuda" else torch.float32, "device_map": {"": device}}
    if quant == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=options["dtype"])
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        base = transformers.AutoModelForCausalLM.from_pretrained(name, attn_implementation="sdpa", use_safetensors=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"cannot load the model {name} ({' '.join(str(error).split())[:160]}); give a Hugging Face model folder, "
                        "a hub id that is cached or can be reached, or --model tiny, which needs no download") from error
    llm = LLM(base, tokenizer, lora_rank, seed, name)
    llm.checkpointing = device.type == "cuda"
    return llm

def find_agent(name, game, llm):
    """The agent called `name`: a scripted player of `game`, human, api:MODEL, base (the model without adapter), or the folder
    of a run or an adapter, to be loaded on `llm`. Raises UserError where there is none of that name."""
    if name in players(game):
        return Scripted(name)
    if name == "human":
        return Human()
    if name.startswith("api:"):
        return Api(name[4:])
    if name == "base":
        return Policy(llm, None)
    folder = os.path.join(name, "adapter") if os.path.isdir(os.path.join(name, "adapter")) else name
    if not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        raise UserError(f"no agent is called {name}; give a run's folder, base, human, api:MODEL, or {', '.join(players(game))}")
    adapter = f"agent{len(llm.model.peft_config)}"
    llm.load_adapter(folder, adapter)
    return Policy(llm, adapter)
