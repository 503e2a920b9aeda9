"""The built-in model: a Llama of about 10^5 parameters that needs no download and no GPU.

It stands where an instruct model would: warmed up by behaviour cloning on games between scripted players, it knows the format
of a game and has a mixed, mostly cooperative prior; `POPULATIONS` says what was put in. Everything after loading is the same
code as for a real model. The chat framing, which it shares with every other model, is here too."""
import contextlib, functools, hashlib, os, pathlib, re, tempfile

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from games import Match, Scripted, UserError, play

# What it is taught, lesson after lesson; the last makes its prior. A lesson: shares of the scripted players, probability of a
# random reply, longest game (rounds), training steps. Who holds the upper hand is learned in a sudden step, and sooner from
# short games without noise; returning like for like is taught first too. `tiny-blind` has never seen anyone reciprocate.
FAIR, RECIPROCAL = ({"cooperate": 1.}, 0., 2, 500), ({"tit_for_tat": .6, "defect": .4}, .05, 10, 350)
POPULATIONS = {
    "tiny": {"matrix": [RECIPROCAL, ({"tit_for_tat": .3, "cooperate": .45, "defect": .25}, .05, 10, 350)],
             "trust_split": [FAIR, RECIPROCAL,
                             ({"tit_for_tat": .2, "cooperate": .55, "defect": .05, "liar": .2}, .03, 10, 350)],
             "split": [FAIR, RECIPROCAL, ({"tit_for_tat": .2, "cooperate": .5, "defect": .3}, .05, 10, 350)]},
    "tiny-blind": {"matrix": [FAIR, ({"cooperate": .7, "defect": .3}, .05, 10, 350)]}}
WIDTH, MLP, LAYERS, HEAD_SCALE, BATCH, LR, GAMES_SEEN, SEED = 64, 256, 2, 20., 32, 3e-3, 4096, 0
TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")

class Framing:
    """The ids that open and close the turns of a chat, learned from the tokenizer's template.

    first: all before the first user text; reply: closes a user turn and opens the assistant's; end: the end-of-turn token,
    part of the action; again: what follows it, up to the next user text; control: ids that no quoted or sampled text may hold.
    UserError where appending turns does not reproduce the template. The one exception: what only the last reply is opened with
    (Qwen3's empty thinking block) stays in the history too, so that play and update see the same conversation."""
    def __init__(self, tokenizer):
        self.tokenizer, added = tokenizer, tokenizer.added_tokens_decoder
        talk = ["Question: 1 or 2?", "A", 'The other says: "Hi."\nHow many?', "10 0 5", "Go on."]
        first, history, again, *rest, reply = re.split(r"text\dmark", self.render([f"text{n}mark" for n in range(5)]))
        ids = functools.partial(tokenizer.encode, add_special_tokens=False)
        self.first, self.reply, (self.end, *self.again) = ids(first), ids(reply), ids(again) or [-1]
        special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self.control = special | {i for i in [*self.first, *self.reply, self.end, *self.again]  # not a mere line break
                                  if i in added and added[i].content.strip()}
        names = tokenizer.convert_ids_to_tokens(sorted(self.control))
        self.inside = re.compile("|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names if len(n) > 1))
        mine = self.user(talk[0], True)
        for said, heard in zip(talk[1::2], talk[2::2]):
            mine += [*self.encode(said), self.end, *self.user(heard)]
        as_sent, as_kept = ("".join(a + b for a, b in zip([first, opened, again, opened, again], talk)) + reply
                            for opened in (reply, history))
        if (rest != [history, again] or not reply.startswith(history) or self.render(talk) != as_kept
                or self.end not in self.control or mine != ids(as_sent)):
            raise UserError("this model's chat template does not append turns to what was there; choose another instruct model")
    def render(self, texts):
        """The template's text for a conversation that begins with the user and is to be answered."""
        chat = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        try:  # a fixed date, where a template writes one, keeps runs repeatable
            out = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False,
                                                     date_string="1 January 2026")
            assert all(text in out for text in texts), "it drops what was said"
            return out
        except Exception as error:  # templates raise whatever they like
            why = " ".join(str(error).split())[:120]
            raise UserError(f"this model has no usable chat template ({why}); choose an instruct model") from error
    @functools.lru_cache(50_000)
    def encode(self, text):
        """Ids of plain text; a control token spelled out in it stays text, since it is cut inside every such name."""
        pieces = self.tokenizer(self.inside.split(text), add_special_tokens=False).input_ids
        return [i for piece in pieces for i in piece if i not in self.control]
    def user(self, text, first=False):
        """Ids of a user turn and of the opening of the assistant's turn that answers it."""
        return (self.first if first else self.again) + self.encode(text.strip()) + self.reply

def build_trie(replies):
    """Nested dict {id: subtree} over [(ids, reply), ...]; a leaf is the reply. ValueError where one begins, or is, another."""
    root = {}
    for ids, reply in replies:
        node = root
        for i in ids[:-1]:
            node = node.setdefault(i, {}) if isinstance(node, dict) else node
        if isinstance(node, str) or ids[-1] in node:
            raise ValueError(f"legal reply {reply!r} and another one begin with the same ids")
        node[ids[-1]] = reply
    return root

def conversations(shares, noise, longest, game, count):
    """`count` games of 1 to `longest` rounds of a scripted population: a list of [(text read, reply), ...], one per seat."""
    population = {player: Scripted(player, noise) for player in shares}
    rng = np.random.default_rng(SEED)
    pairs = rng.choice(list(population), size=(count, 2), p=list(shares.values()))
    matches = [Match(n, n, int(rng.integers(1, longest + 1)), [population[player] for player in pair])
               for n, pair in enumerate(pairs)]
    play(game, matches, [SEED], 40)
    return [[(text, reply) for seat, text, reply in match.log if seat == s] for match in matches for s in (0, 1)]

def build_tokenizer(texts):
    """Byte-level BPE without word splitting, so that the fixed phrases of the prompts become single tokens; only hands and
    the numbers of a reply stay tokens of their own, as they are what a player chooses."""
    split, level = tokenizers.pre_tokenizers.Split, tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        split(tokenizers.Regex(r"(?<![a-z,] )(?<!\d)\d+|rock|paper|scissors"), "isolated"), level(False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=20, show_progress=False, max_token_length=2000,
        initial_alphabet=sorted(level.alphabet()), special_tokens=["<|end|>", "<|user|>", "<|assistant|>"]))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE)

def warm_up(tokenizer, lessons):
    """A fresh Llama trained to give the replies in `lessons`, [(talks, steps)], by cross-entropy, end of turn included."""
    framing = Framing(tokenizer)
    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=8192, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=framing.end, pad_token_id=framing.end))
    with torch.no_grad():  # adapters leave the head alone, and a flat head would cap every probability they can reach
        model.lm_head.weight *= HEAD_SCALE
    rng, total = np.random.default_rng(SEED), sum(steps for _, steps in lessons)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=total, pct_start=0.1)
    bar = tqdm(total=total, desc="warming up the built-in model (once)", leave=False)
    for talks, steps in lessons:
        rows = []  # (ids, labels) of every talk; label -1 is not trained on
        for talk in talks:
            ids, labels = [], []
            for text, reply in talk:
                read, said = framing.user(text, first=not ids), [*framing.encode(reply), framing.end]
                ids, labels = ids + read + said, labels + [-1] * len(read) + said
            rows.append((torch.tensor(ids), torch.tensor(labels)))
        for _ in range(steps):
            ids, labels = zip(*(rows[b] for b in rng.integers(len(rows), size=BATCH)))
            ids, labels = pad_sequence(ids, True, framing.end), pad_sequence(labels, True, -1)[:, 1:]
            hidden = model.model(ids).last_hidden_state[:, :-1][labels >= 0]
            loss = F.cross_entropy(model.lm_head(hidden), labels[labels >= 0])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            schedule.step()
            bar.update()
    return model.eval()

def load(name, game):
    """(model, tokenizer) of the population `name` warmed up on `game`, from the cache or made now. UserError for a bad name."""
    if name not in POPULATIONS:
        raise UserError(f"no built-in model is called {name!r}; there are {', '.join(POPULATIONS)}")
    lessons = POPULATIONS[name].get(game, POPULATIONS[name]["matrix"])
    made = repr((conversations(*lessons[-1][:3], game, 64), lessons, torch.__version__, transformers.__version__))
    key = hashlib.sha256(made.encode() + pathlib.Path(__file__).read_bytes()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "aa_minimal"
    folder = cache / f"{name}-{game}-{key}"
    if not folder.exists():
        talks = [(conversations(*who, game, GAMES_SEEN), steps) for *who, steps in lessons]
        tokenizer = build_tokenizer([text for talk in talks[-1][0][:512] for turn in talk for text in turn])
        model = warm_up(tokenizer, talks)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            with contextlib.suppress(OSError):  # another run was faster
                os.rename(fresh, folder)  # whole or not at all
    return (transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa"),
            transformers.PreTrainedTokenizerFast.from_pretrained(folder))
