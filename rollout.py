"""Models as players: loading, exact choices, batched play over a kept cache; other players by name; files written whole.
Axes: B rows (conversations), S tokens, P tokens of the common opening, n sampled tokens, U candidate ids, V vocabulary."""
import concurrent.futures, contextlib, dataclasses, functools, hashlib, inspect, json, logging, os, pathlib, warnings
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises on kernels while it is imported
import peft, safetensors.torch, torch, transformers
from torch.utils.checkpoint import checkpoint
from games import Human, Player, Scripted, UserError, players, user_error
from tiny import Framing, build_trie, load as load_tiny

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what peft calls in it

def write(path, data):
    """Replace the file `path` by `data` (bytes): whole or not at all, even where the machine fails meanwhile."""
    with open(f"{path}.new", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)

def read(run, name, *needed):
    """A run's .json or .jsonl file as a list of dicts, one per line. UserError where it, or a key `needed`, is missing."""
    with user_error(f"{os.path.join(run, name)} is missing or damaged", "restore it, or name another folder"):
        data = pathlib.Path(run, name).read_bytes()  # a line ends where bytes say so: texts may hold other line separators
        lines = map(json.loads, data.splitlines() if name.endswith("l") else [data])
        return [{**line, **{key: line[key] for key in needed}} for line in lines]

def write_tensors(path, tensors, info):
    """Replace the safetensors file `path` by `tensors` {name: tensor}, the text `info`, and a checksum of all that."""
    data = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}, {"info": "0" * 64 + info})
    write(path, data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1))

def read_tensors(path):
    """(tensors, info) of a safetensors file, info "" if another program wrote it. UserError where it is missing or damaged."""
    with user_error(f"{path} is missing or damaged", "restore it, or start a new run"):
        data = pathlib.Path(path).read_bytes()
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {"format": "pt"}  # as other programs write it, who know no checksum
        info = metadata.get("info", "")
        if "format" not in metadata and hashlib.sha256(data.replace(info[:64].encode(), b"0" * 64, 1)).hexdigest() != info[:64]:
            raise ValueError("its checksum is wrong")
        return safetensors.torch.load(data), info[64:]

# A conversation of one seat: `ids`; of each sampled token its place there, round, legal ids (None: all but control), log-prob.
Episode = dataclasses.make_dataclass("Episode", [(name, list, dataclasses.field(default_factory=list)) for name in (
    "ids", "at", "round", "legal", "logp")], namespace={"__module__": __name__})  # so that it can be pickled

class PlayCache(transformers.Cache):
    """Keys and values [2, B, heads, columns, width] per layer; a column is a position in a conversation. Before a pass, `rows`
    says which to write (in the first all), `seen` which to read; LLM.forward sets `positions` [n, S] and how many `columns`."""
    def __init__(self):
        super().__init__(layers=[])
        self.kept = {}
    def update(self, k, v, layer, *args, **kwargs):
        kv = self.kept.get(layer, k.new_zeros(2, len(self.rows), k.shape[1], 0, k.shape[3]))
        if kv.shape[3] < self.columns:
            kv = self.kept[layer] = torch.nn.functional.pad(kv, (0, 0, 0, 2 * self.columns - kv.shape[3]))
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
        want, got = base(probe).logits, self.head(self.decoder(probe).last_hidden_state)
        if not torch.allclose(want.float(), got.float(), atol=1e-3, rtol=1e-2):
            raise UserError("this model scales or caps its logits, which is not supported; choose another model")
        self.slice, self.checkpointing = max(16, 2 ** 24 // len(self.allowed)), self.device.type == "cuda"
        self.trie = functools.cache(lambda choices: build_trie(  # of a tuple of legal replies, each closed by the end of turn
            [((*self.framing.encode(text), self.framing.end), text) for text in choices]))
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, task_type="CAUSAL_LM", target_modules="all-linear")
        self.model = peft.get_peft_model(base, config)
        config.base_model_name_or_path = name
        for layer in self.decoder.layers:
            layer.forward = functools.partial(self.layer_forward, layer.forward)
    def layer_forward(self, forward, *args, **kwargs):
        """A decoder layer, under gradient checkpointing where `checkpointing` asks for it."""
        again = self.checkpointing and torch.is_grad_enabled()
        return checkpoint(forward, *args, use_reentrant=False, **kwargs) if again else forward(*args, **kwargs)
    @contextlib.contextmanager
    def using(self, adapter):
        """Run under the adapter of that name, None for the model without any."""
        self.model.set_adapter(adapter or "default")
        with self.model.disable_adapter() if adapter is None else contextlib.nullcontext():
            yield
        self.model.set_adapter("default")  # the active adapter is the one that requires gradients
    def forward(self, rows, starts, cache):
        """Last hidden states [B, S, width] of rows of ids (lists) that begin at `starts`. UserError past the model's window."""
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
        messages), elsewhere about -1e9, so p log p is 0; and the ids [U] of the columns, the only rows of the head computed."""
        weight, bias = self.head.weight, self.head.bias
        if legal[0] is None:
            columns, mask = torch.arange(len(weight), device=self.device), self.allowed
        else:
            columns = torch.tensor(sorted(set().union(*legal)), device=self.device)
            kinds = {ids: torch.isin(columns, torch.tensor(ids, device=self.device)) for ids in set(legal)}
            mask = torch.stack([kinds[ids] for ids in legal])
            weight, bias = weight[columns], bias if bias is None else bias[columns]
        return torch.nn.functional.linear(hidden, weight, bias).float().masked_fill(~mask, -1e9).log_softmax(-1), columns
    def save_adapter(self, folder):
        """Write the adapter that learns in PEFT's format, each file whole or not at all."""
        os.makedirs(folder, exist_ok=True)
        config = json.dumps(self.model.peft_config["default"].to_dict(), indent=1, sort_keys=True, default=sorted)  # of sets
        write(os.path.join(folder, "adapter_config.json"), config.encode())
        weights = peft.get_peft_model_state_dict(self.model, adapter_name="default", save_embedding_layers=False)
        write_tensors(os.path.join(folder, "adapter_model.safetensors"), weights, config)
    def load_adapter(self, folder, adapter):
        """The Policy of the adapter in `folder`, now called `adapter`. UserError where that is damaged or of another model."""
        _, saved = read_tensors(os.path.join(folder, "adapter_model.safetensors"))
        [config] = read(folder, "adapter_config.json", "base_model_name_or_path")
        with user_error(f"the adapter in {folder} cannot be used", "restore it, or name another one"):
            if saved and json.loads(saved) != config:
                raise ValueError("its adapter_config.json is not the one that was saved with the weights")
            if config["base_model_name_or_path"] != self.name:
                raise ValueError(f"it was trained on {config['base_model_name_or_path']}, not on {self.name}")
            self.model.load_adapter(folder, adapter, torch_device=str(self.device))
        return Policy(self, adapter)
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
        self.episodes, self.cache, self.cached = {key: Episode() for key in keys}, PlayCache(), {}  # {key: ids in the cache}
        self.row = {}  # {key: its row}, by first turns: who speaks together lies together
    @torch.no_grad()
    def reply(self, keys, turns):
        """Sampled replies (list of str) to `turns`, all conversations in one batch until the last has finished."""
        talks = {key: self._say(self.episodes[key], turn) for key, turn in zip(keys, turns)}  # give legal ids, or the reply
        steps = {key: next(talks[key]) for key in sorted(keys, key=lambda key: self.row.setdefault(key, len(self.row)))}
        with self.llm.using(self.adapter):
            while legal := {key: step for key, step in steps.items() if not isinstance(step, str)}:
                logp, columns = self.llm.log_probs(self._feed(list(legal)), list(legal.values()))
                cdf = logp.exp().cumsum(-1, dtype=torch.float64)
                u = torch.tensor([[self.rngs[key].random(dtype="float32")] for key in legal], dtype=torch.float64)
                pick = torch.searchsorted(cdf, u.to(cdf.device) * cdf[:, -1:], right=True)  # > u: no column of mass 0
                for key, i, value in zip(legal, columns[pick[:, 0]].tolist(), logp.gather(1, pick)[:, 0].tolist()):
                    steps[key] = talks[key].send((i, value))
        return [steps[key] for key in keys]
    def _say(self, e, turn):
        """Write `turn` and a reply into `e`. Yields legal ids (None: all), is sent (id, log-prob); lastly yields the reply."""
        e.ids += self.llm.framing.user(turn.text, first=not e.ids)
        start, end, i, node = len(e.ids), self.llm.framing.end, None, self.llm.trie(turn.choices) if turn.choices else None
        while i != end:
            legal = tuple(node) if node else (end,) if len(e.ids) - start == turn.max_tokens else None
            if legal and len(legal) == 1:
                [i] = legal  # the only way on, or the message is cut: this was not its choice
            else:
                i, logp = yield legal
                for column, value in zip((e.at, e.round, e.legal, e.logp), (len(e.ids), turn.view["round"], legal, logp)):
                    column.append(value)
            e.ids.append(i)
            node = node and node[i]
        yield node or self.llm.tokenizer.decode(e.ids[start:-1])
    def _feed(self, keys):
        """Read what is new in the conversations (in the order of rows): the hidden states [n, width] of their last ids."""
        talks, rows = [self.episodes[key].ids for key in keys], [self.row[key] for key in keys]
        if not self.cached:  # the conversations begin alike: the first one's opening is read once, into every row
            self.opening, self.cache.seen = talks[0][:-1], slice(1)
            self.cache.rows = torch.arange(len(self.episodes), device=self.llm.device)
            self.llm.forward([self.opening], [0], self.cache)
        starts = [self.cached.get(key) or len(os.path.commonprefix([ids[:-1], self.opening])) for key, ids in zip(keys, talks)]
        new = [ids[start:] for ids, start in zip(talks, starts)]
        self.cache.rows = torch.tensor(rows, device=self.llm.device)
        self.cache.seen = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] < len(rows) else self.cache.rows  # slice: a view
        self.cached.update((key, len(ids)) for key, ids in zip(keys, talks))
        return self.llm.forward(new, starts, self.cache)[range(len(keys)), [len(ids) - 1 for ids in new]]

class Api(Player):
    """A chat model behind an OpenAI-compatible endpoint (OPENAI_BASE_URL, OPENAI_API_KEY), asked with plain chat messages.
    `invalid` lists the (game, seat) of every turn that got no legal reply and was answered at random, or with silence."""
    def __init__(self, model):
        with user_error(f"api:{model} cannot be asked", "pip install openai, and set OPENAI_API_KEY"):
            import openai
            self.client = openai.OpenAI(max_retries=3, timeout=30)  # which backs off before it tries again
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
                said = answer.choices[0].message.content.encode(errors="replace").decode().strip()  # no lone surrogate
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

def is_built_in(name):
    """Whether the model `name` is a built-in one: tiny..., unless there is a folder of that name."""
    return name.startswith("tiny") and not os.path.exists(name)

def load(name, quant, game, lora_rank=8, seed=0):
    """The model `name` ("tiny...", a folder, or a hub id) with a fresh adapter "default" of that rank, drawn from `seed`.
    quant "nf4": 4-bit weights; "none": float32 on the CPU, bfloat16 on the GPU. Raises UserError for what cannot be had."""
    if is_built_in(name):
        return LLM(*load_tiny(name, game), lora_rank, seed, f"{name} {game}")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                           bnb_4bit_compute_dtype=dtype) if quant == "nf4" else None
    with user_error(f"cannot load the model {name}", "give a folder, a hub id that is cached or in reach, or --model tiny"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        base = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device, quantization_config=bits,
                                                                 attn_implementation="sdpa", use_safetensors=True)
    return LLM(base, tokenizer, lora_rank, seed, name)

def find_agent(name, game, llm):
    """The agent called `name`, or the adapter in the folder `name`, loaded on `llm`. UserError where there is none."""
    known = {"human": Human(), "base": Policy(llm, None), **{player: Scripted(player) for player in players(game)}}
    if name in known:
        return known[name]
    if name.startswith("api:"):
        return Api(name[4:])
    folder = os.path.join(name, "adapter") if os.path.isdir(os.path.join(name, "adapter")) else name
    if not os.path.isfile(os.path.join(folder, "adapter_model.safetensors")):
        raise UserError(f"no agent is called {name}; give a run's folder, base, human, api:MODEL or {', '.join(players(game))}")
    return llm.load_adapter(folder, f"agent{len(llm.model.peft_config)}")
