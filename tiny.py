"""The built-in model, which needs no download and no GPU; and the chat framing, which it shares with every other model.
A Llama of about 2x10^5 parameters, warmed up by imitation of scripted players, stands where an instruct model would."""
import contextlib, functools, hashlib, os, pathlib, re, tempfile
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, __version__ as transformers_version
from games import Match, Scripted, UserError, play, user_error

# What it is taught, lesson after lesson; the last makes its prior. A lesson: shares of the scripted players, probability of a
# random reply, longest game (rounds), training steps. Who holds the upper hand is learned in a sudden step, and sooner from
# short games without noise; returning like for like is taught first too. `tiny-blind` has never seen anyone reciprocate.
FAIR, MUTUAL = ({"cooperate": 1.}, 0., 2, 500), ({"tit_for_tat": .6, "defect": .4}, .05, 10, 350)
POPULATIONS = {
    "tiny": {"matrix": [MUTUAL, ({"tit_for_tat": .35, "cooperate": .35, "defect": .2, "random": .1}, .05, 10, 350)],
             "trust_split": [FAIR, MUTUAL, ({"tit_for_tat": .2, "cooperate": .55, "defect": .04, "liar": .21}, .03, 10, 350)],
             "split": [FAIR, MUTUAL, ({"tit_for_tat": .15, "cooperate": .55, "defect": .3}, .05, 10, 350)]},
    "tiny-blind": {"matrix": [FAIR, ({"cooperate": .7, "defect": .3}, .05, 10, 350)]}}
WIDTH, MLP, LAYERS, HEAD_SCALE, BATCH, LR, GAMES_SEEN, SEED = 64, 256, 2, 20., 32, 3e-3, 4096, 0
TEMPLATE = "{% for m in messages %}<|{{m.role}}|>{{m.content}}<|end|>{% endfor %}{{'<|assistant|>' if add_generation_prompt}}"

class Framing:
    """The ids that open and close the turns of a chat, learned from the tokenizer's template. UserError where appending turns
    does not reproduce it. The one exception: what only the last reply is opened with (Qwen3's empty thinking block) stays in
    the history too, so that play and update see the same conversation.
    first: all before the first user text; reply: closes a user turn and opens the assistant's; end: the end-of-turn token,
    part of the action; again: what follows it, up to the next user text; control: ids no quoted or sampled text may hold."""
    def __init__(self, tokenizer):
        self.tokenizer, ids = tokenizer, functools.partial(tokenizer.encode, add_special_tokens=False)
        first, history, again, *_, reply = re.split(r"text\dmark", self.render([f"text{n}mark" for n in range(5)]))
        self.first, self.reply, (self.end, *self.again) = ids(first), ids(reply), ids(again) or [-1]
        frame, special = {*self.first, *self.reply, self.end, *self.again}, set(tokenizer.all_special_ids)
        self.control = special | {i for i, token in tokenizer.added_tokens_decoder.items()
                                  if token.special or i in frame and token.content.strip()}  # not a mere line break
        names = tokenizer.convert_ids_to_tokens(sorted(self.control))
        self.inside = re.compile("|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names if len(n) > 1))
        talk = ["Question: 1 or 2?", "A", 'The other says: "Hi."\nHow many?', "10 0 5", "Go on."]
        sent, kept = ("".join(map("".join, zip([first, lead, again, lead, again], talk))) + reply for lead in (reply, history))
        mine = [i for i, _ in self.dialogue(talk)]
        if not reply.startswith(history) or self.render(talk) != kept or self.end not in self.control or mine != ids(sent):
            raise UserError("this model's chat template does not append turns to what was there; choose another instruct model")
    def render(self, texts):
        """The template's text for a conversation that begins with the user and is to be answered."""
        chat = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        with user_error("this model has no usable chat template", "choose an instruct model"):  # a fixed date: repeatable runs
            out = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False,
                                                     date_string="1 January 2026")
            assert all(text in out for text in texts), "it drops what was said"
        return out
    @functools.lru_cache(5_000)
    def encode(self, text):
        """Ids of plain text; a control token spelled out in it stays text, since it is cut inside every such name."""
        pieces = self.tokenizer(self.inside.split(text), add_special_tokens=False).input_ids
        return [i for piece in pieces for i in piece if i not in self.control]
    def user(self, text, first=False):
        """Ids of a user turn and of the opening of the assistant's turn that answers it."""
        return (self.first if first else self.again) + self.encode(text.strip()) + self.reply
    def dialogue(self, texts):
        """[(id, 1 if the assistant says it, else 0), ...] of a conversation that begins with the user."""
        turns = [[*self.encode(text), self.end] if n % 2 else self.user(text, n == 0) for n, text in enumerate(texts)]
        return [(i, n % 2) for n, turn in enumerate(turns) for i in turn]

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
    """`count` games of 1 to `longest` rounds of a scripted population: a list of [text read, reply, ...], one per seat."""
    rng = np.random.default_rng(SEED)
    pairs = rng.choice([Scripted(player, noise) for player in shares], size=(count, 2), p=list(shares.values()))
    matches = [Match(n, n, int(rng.integers(1, longest + 1)), pair) for n, pair in enumerate(pairs)]
    play(game, matches, [SEED], 40)
    return [[text for seat, *both in match.log if seat == s for text in both] for match in matches for s in (0, 1)]

def build_tokenizer(texts):
    """Byte-level BPE without word splitting, so that the fixed phrases of the prompts become single tokens; only hands and
    the numbers of a reply stay tokens of their own, as they are what a player chooses."""
    split = pre_tokenizers.Split(Regex(r"(?<![a-z,] )(?<!\d)\d+|rock|paper|scissors"), "isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=20, show_progress=False, max_token_length=2000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=["<|end|>", "<|user|>", "<|assistant|>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE)

def warm_up(tokenizer, course):
    """A fresh Llama trained by cross-entropy on the replies, end of turn included, of what each step of `course` draws from."""
    framing, rng = Framing(tokenizer), np.random.default_rng(SEED)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=8192, bos_token_id=None, eos_token_id=framing.end, pad_token_id=framing.end))
    model.lm_head.weight.data *= HEAD_SCALE  # adapters leave the head alone; a flat one would cap every probability they reach
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=len(course), pct_start=0.1)
    for talks in tqdm(course, desc="warming up the built-in model (once)", leave=False):
        batch = [torch.tensor(framing.dialogue(talks[b])) for b in rng.integers(len(talks), size=BATCH)]
        ids, trained = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).unbind(-1)  # [B, S]
        hidden, trained = model.model(ids).last_hidden_state[:, :-1], trained[:, 1:] == 1
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[trained]), ids[:, 1:][trained])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        schedule.step()
    return model.eval()

def load(name, game):
    """(model, tokenizer) of the population `name` warmed up on `game`, from the cache or made now. UserError for a bad name."""
    if name not in POPULATIONS:
        raise UserError(f"no built-in model is called {name!r}; there are {', '.join(POPULATIONS)}")
    lessons = POPULATIONS[name].get(game, POPULATIONS[name]["matrix"])
    made = repr((conversations(*lessons[-1][:3], game, 64), lessons, torch.__version__, transformers_version))
    key = hashlib.sha256(made.encode() + pathlib.Path(__file__).read_bytes()).hexdigest()[:16]
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "aa_minimal" / f"{name}-{game}-{key}"
    if not folder.exists():
        course = [talks for *who, steps in lessons for talks in [conversations(*who, game, GAMES_SEEN)] * steps]
        tokenizer = build_tokenizer([text for talk in course[-1][:512] for text in talk])
        model = warm_up(tokenizer, course)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            with contextlib.suppress(OSError):  # another run was faster
                os.rename(fresh, folder)  # whole or not at all
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa"), PreTrainedTokenizerFast.from_pretrained(folder)
