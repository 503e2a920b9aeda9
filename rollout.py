"""Models as players: loading, exact choices, and batched play over a kept cache; other players by name.

Ids in, ids out: what was sampled is stored as ids and never tokenized again. A choice is sampled on a trie over the legal
replies; what all of them share is written, not sampled. Every token of a conversation goes through the model once.
Axes: B rows (conversations), S tokens, P tokens of the common opening, n sampled tokens, U candidate ids, V vocabulary."""
import collections, concurrent.futures, contextlib, functools, inspect, itertools, logging, os, warnings
from dataclasses import dataclass, field

import numpy as np
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises on kernels while it is imported
import peft, safetensors.torch, torch, transformers
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from games import Human, Player, Scripted, UserError, players
from tiny import Framing, build_trie, load as load_tiny

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

class PlayCache(Cache):
    """Keys and values [2, B, heads, columns, width] per layer of a batch in play. A column is a position in a conversation, so
    rows of different length leave no holes. Before a pass, `rows` [n] says whose it is, and `seen` again, as a slice where they
    lie together: a view of the cache is then enough. LLM.forward sets `positions` [n, S] and the number of `columns`."""
    def __init__(self, B):
        super().__init__(layers=[])
        self.B, self.kept = B, {}
    def update(self, k, v, layer, *args, **kwargs):
        kv = self.kept.get(layer, k.new_zeros(2, self.B, k.shape[1], 0, k.shape[3]))
        if kv.shape[3] < self.columns:
            kv = self.kept[layer] = F.pad(kv, (0, 0, 0, 2 * self.columns - kv.shape[3]))
        for kept, new in zip(kv, (k, v)):
            kept[self.rows[:, None], :, self.positions] = new.transpose(1, 2)
        return kv[:, self.seen, :, :self.columns]

class LLM:
    """A causal language model, its adapters ("default" is the one that learns), and what play and update ask of it."""
    def __init__(self, base, tokenizer, lora_rank=8, seed=0, name="tiny"):
        self.tokenizer, self.framing, self.base, self.name = tokenizer, Framing(tokenizer), base.eval(), name
        self.device, self.decoder, self.head = base.device, base.get_decoder(), base.get_output_embeddings()
        self.config = base.config.get_text_config()  # conversations shorter than a sliding window never notice it
        self.window = min(filter(None, (self.config.max_position_embeddings, getattr(self.config, "sliding_window", None))))
        self.cache = "cache" if "cache" in inspect.signature(self.decoder.forward).parameters else "past_key_values"
        self.allowed = torch.tensor([i < len(tokenizer) and (i not in self.framing.control or i == self.framing.end)
                                     for i in range(len(self.head.weight))], device=self.device)  # [V] in messages
        probe = torch.tensor([self.framing.user("Hello?", True)], device=self.device)
        with torch.no_grad():
            want, got = base(probe).logits, self.head(self.decoder(probe).last_hidden_state)
        if not torch.allclose(want.float(), got.float(), atol=1e-3, rtol=1e-2):
            raise UserError("this model scales or caps its logits, which is not supported; choose another model")
        self.slice, self.checkpointing = max(16, 2 ** 24 // len(self.allowed)), self.device.type == "cuda"
        self.trie = functools.cache(lambda choices: build_trie(  # of a tuple of legal replies, each closed by the end of turn
            [((*self.framing.encode(text), self.framing.end), text) for text in choices]))
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, task_type="CAUSAL_LM", target_modules="all-linear")
        self.model = peft.get_peft_model(base, config)
        config.base_model_name_or_path, config.target_modules = name, sorted(config.target_modules)  # a set has no fixed order
        for layer in self.decoder.layers:
            layer.forward = functools.partial(self.layer_forward, layer.forward)
    def layer_forward(self, forward, *args, **kwargs):
        """A decoder layer, under gradient checkpointing where `checkpointing` asks for it."""
        if self.checkpointing and torch.is_grad_enabled():
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        return forward(*args, **kwargs)
    @contextlib.contextmanager
    def using(self, adapter):
        """Run under the adapter of that name, None for the model without any."""
        if self.model.active_adapter != (adapter or "default"):
            self.model.set_adapter(adapter or "default")
        with self.model.disable_adapter() if adapter is None else contextlib.nullcontext():
            yield
        if adapter not in (None, "default"):
            self.model.set_adapter("default")  # the active adapter is the one that requires gradients
    def forward(self, rows, starts, cache):
        """Last hidden states [B, S, width] of rows of ids, padded right, whose first ids stand at `starts` (list).
        Gradient as set outside. UserError where a conversation outgrows the model."""
        S = max(map(len, rows))
        cache.columns = max(starts) + S
        if cache.columns > self.window:
            raise UserError(f"a conversation outgrows the model's {self.window} tokens; lower --rounds or --max-message-tokens")
        ids = torch.tensor([row + [0] * (S - len(row)) for row in rows], device=self.device)
        cache.positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(S, device=self.device)
        mask = torch.arange(cache.columns, device=self.device) <= cache.positions[:, :, None]  # a column is a position
        return self.decoder(input_ids=ids, position_ids=cache.positions, attention_mask=mask[:, None], use_cache=True,
                            **{self.cache: cache}).last_hidden_state
    def log_probs(self, hidden, legal):
        """hidden [n, width] -> float32 log-probs [n, U] over each row's `legal` ids (as in an Episode; all choices or all
        messages), -inf elsewhere; the ids [U] of the columns, the only rows of the head computed; and a mask of the legal."""
        weight, bias = self.head.weight, self.head.bias
        if legal[0] is None:
            columns, mask = torch.arange(len(weight), device=self.device), self.allowed[None]
        else:
            kinds = {ids: n for n, ids in enumerate(dict.fromkeys(legal))}
            columns = sorted(set().union(*kinds))
            mask = torch.tensor([[i in ids for i in columns] for ids in kinds])[[kinds[ids] for ids in legal]].to(self.device)
            columns = torch.tensor(columns, device=self.device)
            weight, bias = weight[columns], bias if bias is None else bias[columns]
        return F.log_softmax(F.linear(hidden, weight, bias).float().masked_fill(~mask, -torch.inf), -1), columns, mask
    def save_adapter(self, folder, adapter="default"):
        """Write an adapter in PEFT's format, the weights replaced whole."""
        self.model.peft_config[adapter].save_pretrained(folder)
        weights = peft.get_peft_model_state_dict(self.model, adapter_name=adapter, save_embedding_layers=False)
        safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, os.path.join(folder, "adapter.new"))
        os.replace(os.path.join(folder, "adapter.new"), os.path.join(folder, "adapter_model.safetensors"))
    def load_adapter(self, folder, adapter):
        """Put the adapter saved in `folder` under the name `adapter`. UserError where it is damaged or of another model."""
        try:
            other = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
            if other != self.name:
                raise UserError(f"the adapter in {folder} was trained on {other}, not on {self.name}")
            self.model.load_adapter(folder, adapter, torch_device=str(self.device))
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            raise UserError(f"the adapter in {folder} is damaged ({' '.join(str(error).split())[:120]})") from error
    def token_budget(self):
        """Tokens per micro-batch that fit: on a GPU by free memory, checkpointing assumed, on a CPU what its caches like."""
        per_token = 2 * self.config.hidden_size * (self.config.num_hidden_layers + 60) + 4 * self.config.intermediate_size
        return 4096 if self.device.type == "cpu" else max(1024, torch.cuda.mem_get_info()[0] // 2 // per_token)

class Policy(Player):
    """The model under one adapter (None: without any) as a player. `episodes` {(game, seat): Episode} is what it did."""
    def __init__(self, llm, adapter="default"):
        self.llm, self.adapter = llm, adapter
    def begin(self, seed, keys):
        super().begin(seed, keys)
        self.episodes, self.cached = {key: Episode() for key in keys}, dict.fromkeys(keys, 0)
        self.cache = PlayCache(len(keys))  # its rows in the order of first turns: who speaks together lies together
        self.row = collections.defaultdict(itertools.count().__next__)  # {key: number of its row}
    @torch.no_grad()
    def reply(self, keys, turns):
        """Sampled replies (list of str) to `turns`, all conversations in one batch until the last has finished."""
        talks = {key: self._say(self.episodes[key], turn) for key, turn in zip(keys, turns)}
        steps = {key: next(talks[key]) for key in sorted(keys, key=lambda key: self.row[key])}  # at its legal ids, or its reply
        with self.llm.using(self.adapter):
            while going := {key: step for key, step in steps.items() if not isinstance(step, str)}:
                steps |= {key: talks[key].send(token) for key, token in self._sample(going).items()}
        return [steps[key] for key in keys]
    def _say(self, e, turn):
        """Write `turn` and a reply to it into the episode `e`: a generator that yields the legal ids of a token to be sampled
        (None: a message's), is sent (id, log-prob), and at last yields the reply."""
        e.ids += self.llm.framing.user(turn.text, first=not e.ids)
        start, end, i, node = len(e.ids), self.llm.framing.end, None, self.llm.trie(turn.choices) if turn.choices else None
        while i != end:
            if node and len(node) == 1:
                [i] = node  # the only way on
            elif not node and len(e.ids) - start == turn.max_tokens:
                i = end  # cut: this was not its choice
            else:
                i, logp = yield (legal := tuple(node) if node else None)
                for column, value in zip((e.at, e.round, e.legal, e.logp), (len(e.ids), turn.view["round"], legal, logp)):
                    column.append(value)
            e.ids.append(i)
            node = node and node[i]
        yield node or self.llm.tokenizer.decode(e.ids[start:-1])
    def _sample(self, legal):
        """A token for every conversation of `legal` {key: legal ids}: {key: (id, log-prob)}."""
        logp, columns, _ = self.llm.log_probs(self._feed(list(legal)), list(legal.values()))
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)
        u = torch.tensor([[self.rngs[key].random(dtype=np.float32)] for key in legal], dtype=torch.float64)
        pick = torch.searchsorted(cdf, u.to(cdf.device) * cdf[:, -1:], right=True)  # strictly above u: never a column of mass 0
        return dict(zip(legal, zip(columns[pick[:, 0]].tolist(), logp.gather(1, pick)[:, 0].tolist())))
    def _feed(self, keys, stop=None):
        """Put the ids of the conversations (in the order of rows) up to `stop`, but for those in the cache, through the model:
        hidden state [n, width] of each one's last. The first row reads its opening alone, the others copy what they share."""
        lead = next(iter(self.row))
        if not self.cached[lead] and stop is None:
            self._feed([lead], -1)
        for key in (key for key in keys if not self.cached[key]):
            ids, known = self.episodes[key].ids, self.episodes[lead].ids[:self.cached[lead]]
            self.cached[key] = P = min(len(os.path.commonprefix([ids, known])), len(ids) - 1)
            for kv in self.cache.kept.values():
                kv[:, self.row[key], :, :P] = kv[:, 0, :, :P]
        new, starts = [self.episodes[key].ids[self.cached[key]:stop] for key in keys], [self.cached[key] for key in keys]
        rows = [self.row[key] for key in keys]
        self.cache.rows = torch.tensor(rows, device=self.llm.device)
        self.cache.seen = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] < len(rows) else self.cache.rows
        hidden = self.llm.forward(new, starts, self.cache)
        self.cached.update((key, start + len(ids)) for key, start, ids in zip(keys, starts, new))
        return hidden[range(len(keys)), [len(ids) - 1 for ids in new]]

class Api(Player):
    """A chat model behind an OpenAI-compatible endpoint (OPENAI_BASE_URL, OPENAI_API_KEY), asked with plain chat messages.
    `invalid` lists the (game, seat) of every turn that got no legal reply and was answered at random, or with silence."""
    def __init__(self, model):
        try:
            import openai
            self.client = openai.OpenAI(max_retries=3, timeout=30)  # which backs off before it tries again
        except Exception as error:  # no package, or no key
            raise UserError(f"an api: agent needs pip install openai, and OPENAI_API_KEY to be set ({error})") from None
        self.model, self.invalid, self.openai = model, [], openai
    def begin(self, seed, keys):
        super().begin(seed, keys)
        self.chats = {key: [] for key in keys}
    def reply(self, keys, turns):
        """Replies (list of str) to `turns`, asked for at the same time. UserError where the server refuses key or model."""
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            return list(pool.map(self.ask, keys, turns))
    def ask(self, key, turn):
        chat = [*self.chats[key], {"role": "user", "content": turn.text}]
        try:
            for _ in range(3):
                answer = self.client.chat.completions.create(model=self.model, messages=chat, max_tokens=turn.max_tokens or 8)
                said = answer.choices[0].message.content.strip()
                if said in (turn.choices or [said]):
                    break
            else:
                raise ValueError("no legal reply")
        except (self.openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:  # or it is nonsense
            if getattr(error, "status_code", None) in (401, 403, 404):
                raise UserError(f"api:{self.model} is refused (status {error.status_code}); check name and key") from None
            self.invalid.append(key)
            said = turn.choices[self.rngs[key].integers(len(turn.choices))] if turn.choices else ""
        self.chats[key] = [*chat, {"role": "assistant", "content": said}]
        return said

def load(name, quant, game, lora_rank=8, seed=0):
    """The model `name` ("tiny...", a folder, or a hub id) with a fresh adapter "default" of that rank, drawn from `seed`.
    quant "nf4": 4-bit weights; "none": float32 on the CPU, bfloat16 on the GPU. Raises UserError for what cannot be had."""
    if name.startswith("tiny") and not os.path.exists(name):
        return LLM(*load_tiny(name, game), lora_rank, seed, f"{name} {game}")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                           bnb_4bit_compute_dtype=dtype) if quant == "nf4" else None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        base = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device, quantization_config=bits,
                                                                 attn_implementation="sdpa", use_safetensors=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"cannot load the model {name} ({' '.join(str(error).split())[:160]}); give a Hugging Face folder, "
                        "a hub id that is cached or in reach, or --model tiny, which needs no download") from error
    return LLM(base, tokenizer, lora_rank, seed, name)

def find_agent(name, game, llm):
    """The agent called `name`: a scripted player of `game`, human, api:MODEL, base (the model without adapter), or the folder
    of a run or an adapter, to be loaded on `llm`. Raises UserError where there is none of that name."""
    if name in players(game):
        return Scripted(name)
    if name.startswith("api:"):
        return Api(name[4:])
    if name in ("human", "base"):
        return Human() if name == "human" else Policy(llm, None)
    folder = os.path.join(name, "adapter") if os.path.isdir(os.path.join(name, "adapter")) else name
    if not os.path.isfile(os.path.join(folder, "adapter_model.safetensors")):
        raise UserError(f"no agent is called {name}; give a run's folder, base, human, api:MODEL or {', '.join(players(game))}")
    adapter = f"agent{len(llm.model.peft_config)}"
    llm.load_adapter(folder, adapter)
    return Policy(llm, adapter)
