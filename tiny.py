"""What stands before a language model can play: the chat framing, and the built-in model.

`Framing` learns from a tokenizer's chat template what to put around texts; every model uses it.
The built-in model is a Llama of about 2x10^5 weights that is warmed up by imitation of scripted
players, once per game, and then stands where an instruct model would: no download, no GPU."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import secrets
import sys
import tempfile
import warnings
from collections import namedtuple

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from games import Match, Scripted, play

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises on kernels when imported
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft's calls
# Imitation of a population of scripted players: {name: share}, chance of a random reply, rounds of
# the longest game, training steps. With `greed`, seat 0 draws a player anew for every reply, and it
# alone is imitated; each act of seat 1 is greedy with this probability, else fair.
Lesson = namedtuple("Lesson", "shares noise rounds steps greed", defaults=[None])
# What models are taught in turn: the rules; to return like for like; the last makes the prior.
SHORT = Lesson({"cooperate": 1.0}, 0.0, 2, 300)
LONG = Lesson({"cooperate": 1.0}, 0.0, 10, 100)
MUTUAL = Lesson({"tit_for_tat": 0.6, "defect": 0.4}, 0.05, 10, 300)
MATRIX = {"tit_for_tat": 0.35, "cooperate": 0.35, "defect": 0.2, "random": 0.1}
ALIKE = Lesson({"tit_for_tat": 1.0}, 0.03, 10, 250, greed=0.5)
TRUST = {"tit_for_tat": 0.31, "cooperate": 0.59, "defect": 0.02, "liar": 0.08}
SPLIT = {"tit_for_tat": 0.18, "cooperate": 0.57, "defect": 0.25}
IMITATED = {"tit_for_tat": 0.42, "cooperate": 0.33, "defect": 0.2, "random": 0.05}
LESSONS = {  # by model and game (all others as matrix games); an adapter's steps times --imitate
    ("tiny", "matrix"): [MUTUAL, Lesson(MATRIX, 0.05, 10, 350)],
    ("tiny", "trust_split"): [SHORT, LONG, ALIKE, Lesson(TRUST, 0.03, 10, 400, greed=0.25)],
    ("tiny", "split"): [SHORT, LONG, ALIKE, Lesson(SPLIT, 0.03, 10, 400, greed=0.25)],
    ("tiny-blind", "matrix"): [LONG, Lesson({"cooperate": 0.7, "defect": 0.3}, 0.05, 10, 350)],
    ("adapter", "matrix"): [Lesson(IMITATED, 0.05, 10, 1)],
    ("adapter", "trust_split"): [SHORT._replace(steps=5), Lesson(TRUST, 0.03, 10, 1, greed=0.25)],
}
BUILT_IN = ("tiny", "tiny-blind")
TEMPLATE = "{% for m in messages %}<|{{m.role}}|>{{m.content}}<|end|>{% endfor %}"
TEMPLATE += "{{'<|assistant|>' if add_generation_prompt}}"
DATE = "1 January 2026"  # today's would change the prompts of a run that is resumed tomorrow
FIXED_DATE = "{% macro strftime_now(format) %}" + DATE + "{% endmacro %}"


class UserError(Exception):
    """Something the person at the keyboard can put right: printed as one line, exit code 2."""


@contextlib.contextmanager
def user_error(problem, remedy):
    """Make a UserError of what goes wrong inside: the problem, the library's words, the remedy."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise whatever they like
        if isinstance(error.__context__, KeyboardInterrupt):  # it came while they wrote a file
            raise error.__context__ from None
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{problem} ({words}); {remedy}") from error


def translate(text, words):
    """`text` with every key of `words`, where it stands as a word, replaced; longer ones first."""
    keys = [rf"(?<!\w){re.escape(key)}(?!\w)" for key in sorted(words, key=len, reverse=True)]
    return re.sub("|".join(keys) or "(?!)", lambda found: words[found[0]], text)


class Framing:
    """What a chat template puts around texts, so that turns can be appended to a conversation:

        first TEXT opener [prefix] REPLY end again TEXT opener [prefix] REPLY end ...

    prefix: what past replies have besides. end: id of the end-of-turn token, part of the action.
    control: ids of added tokens, which no quoted or sampled text may hold. What only the last reply
    is opened with (Qwen3's empty thought) stays. UserError where the template does otherwise."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.words = {}  # {a game's words: the model's}; set it before play, turns are cached
        added = tokenizer.added_tokens_decoder.items()
        self.control = {i for i, token in added if token.content.strip()}  # line breaks are text
        with user_error("this model has no usable chat template", "choose another instruct model"):
            self.hide_control_tokens()
            self.learn_frames()
        self.user = functools.lru_cache(5000)(self.user)  # most turns are said again and again
        self.trie = functools.lru_cache(100)(self.trie)

    def hide_control_tokens(self):
        """Make a twin of the tokenizer that knows the control tokens by secret names only.
        It reads frame and text together, and a control token spelled out in a text stays text."""
        names = sorted(self.tokenizer.convert_ids_to_tokens(self.control), key=len, reverse=True)
        self.secrets = {name: secrets.token_hex(8) for name in names}
        quoted = {json.dumps(n, ensure_ascii=False): f'"{s}"' for n, s in self.secrets.items()}
        state = self.tokenizer.backend_tokenizer.to_str()
        state = re.sub(r'"(?:[^"\\]|\\.)*"', lambda found: quoted.get(found[0], found[0]), state)
        self.twin = Tokenizer.from_str(state)
        self.any_control = re.compile("|".join(map(re.escape, self.secrets)) or "(?!)")

    def encode(self, *parts):
        """Ids of `parts` as one string; in turn a frame of the template and a text."""
        parts = list(parts)
        for n in range(0, len(parts), 2):
            parts[n] = self.any_control.sub(lambda found: self.secrets[found[0]], parts[n])
        return self.twin.encode("".join(parts), add_special_tokens=False).ids

    def render(self, chat):
        """The template's string for texts that begin with the user and are to be answered."""
        chat = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(chat)]
        settings = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
        settings |= dict(chat_template=FIXED_DATE + self.tokenizer.get_chat_template())
        return self.tokenizer.apply_chat_template(chat, date_string=DATE, **settings)

    def learn_frames(self):
        """Find the frames, what stands between the marks of a rendered chat; and try them."""
        parts = re.split(r"text\dmark", self.render([f"text{n}mark" for n in range(5)]))
        if len(parts) != 6 or parts[1:3] != parts[3:5]:
            raise ValueError("it does not frame all turns alike")
        self.first, past_opener, between, _, _, self.opener = parts
        if re.search(r"<(think|thought)\w*>(?!.*</)", self.opener, re.DOTALL):
            raise ValueError("it leaves a thought open before every reply: it always thinks")
        if not (self.opener.startswith(past_opener) or past_opener.startswith(self.opener)):
            raise ValueError(f"it opens a reply with {self.opener!r}, past ones {past_opener!r}")
        self.prefix = past_opener[len(self.opener) :]
        end = self.any_control.match(between)
        if end is None:
            raise ValueError(f"it puts {between[:20]!r}, no end-of-turn token, after a reply")
        self.end_name, self.again = end[0], between[end.end() :]
        self.end = self.tokenizer.convert_tokens_to_ids(self.end_name)
        if not self.any_control.search(self.again + self.opener.replace(self.end_name, "")):
            print("warning: messages can forge this model's roles (plain words)", file=sys.stderr)
        chat = ["Question: 1 or 2?", "A", 'The other said: "Hi."\nHow many?', "10 0 5", "Go on."]
        history = self.render(chat).removesuffix(self.opener)
        rendered = history.replace(past_opener, self.opener + self.prefix) + self.opener
        want = self.tokenizer(rendered, add_special_tokens=False).input_ids
        got = [i for i, _ in self.dialogue(chat)]
        if got != want:
            at = len(os.path.commonprefix([got, want]))
            theirs, ours = (self.tokenizer.decode(ids[at : at + 5]) for ids in (want, got))
            raise ValueError(f"it gives {theirs!r} where appending turns gives {ours!r}")

    def user(self, text, first=False):
        """Ids of a user turn and of the opener of its reply; it is first, or follows an end."""
        text = translate(text.strip(), self.words)
        if first:
            return self.encode(self.first, text, self.opener)
        return self.encode(self.end_name + self.again, text, self.opener)[1:]

    def reply(self, text):
        """Ids of a reply and its end of turn, as they follow the opener."""
        text = translate(text, self.words)
        before = self.encode(self.first, "Hello.", self.opener)
        ids = self.encode(self.first, "Hello.", self.opener + self.prefix, text, self.end_name)
        return ids[len(before) :]

    def dialogue(self, chat):
        """[(id, whether the assistant says it)] of a chat that begins with the user."""
        pairs = []
        for n, text in enumerate(chat):
            ids = self.reply(text) if n % 2 else self.user(text, first=n == 0)
            pairs += [(i, n % 2 == 1) for i in ids]
        return pairs

    def decode(self, ids):
        """The text of the ids of a reply, closed by its end of turn."""
        text = self.tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False).strip()
        return translate(text, {new: old for old, new in self.words.items()})

    def trie(self, choices):
        """{ids written so far: sorted ids that may come next} over the legal replies `choices`."""
        following = {}
        for text in choices:
            ids = self.reply(text)
            if self.decode(ids) != text:
                raise UserError(f"the reply {text!r} would come back as {self.decode(ids)!r}")
            for n in range(len(ids)):
                following.setdefault(tuple(ids[:n]), set()).add(ids[n])
        return {written: tuple(sorted(ids)) for written, ids in following.items()}


def conversations(lesson, game, count, seed):
    """`count` games of a scripted population: [chat of one seat: [text read, reply, ...]]."""
    rng, matches = np.random.default_rng(seed), []
    scripts = [Scripted(name, lesson.noise) for name in lesson.shares]
    for n in range(count):
        pair = tuple(rng.choice(scripts, size=2, p=list(lesson.shares.values())))
        if lesson.greed:
            others = {"cooperate": 1 - lesson.greed, "defect": lesson.greed}
            pair = Scripted(lesson.shares, lesson.noise), Scripted(others)
        matches.append(Match(n, n, int(rng.integers(1, lesson.rounds + 1)), pair))
    play(game, matches, [seed], max_tokens=40)
    chats = []
    for match in matches:
        for seat in (0,) if lesson.greed else (0, 1):
            chats.append([text for who, *pair in match.log if who == seat for text in pair])
    return chats


def build_tokenizer(texts):
    """Byte-level BPE without word splitting: the fixed phrases of the prompts become single tokens.
    Only hands and the numbers of a reply stay tokens of their own: they are what players choose."""
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"(?<![a-z,] )(?<!\d)\d+|rock|paper|scissors"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    bpe.decoder = decoders.ByteLevel()
    alphabet, special = sorted(as_bytes.alphabet()), ["<|end|>", "<|user|>", "<|assistant|>"]
    size = dict(vocab_size=100_000, min_frequency=20, max_token_length=2000, show_progress=False)
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special, **size)
    bpe.train_from_iterator(texts, trainer)
    names = dict(eos_token="<|end|>", chat_template=TEMPLATE)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def imitate(decoder, head, parameters, framing, game, lessons, games, lr, batch, seed):
    """Train `parameters` of decoder and head by cross-entropy on replies, ends of turn included.
    lessons: taught in turn, each on so many games of `game`. batch: chats per step."""
    rng, parameters = np.random.default_rng(seed), list(parameters)
    total = sum(lesson.steps for lesson in lessons)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, max(11, total), pct_start=0.1)
    for lesson in lessons:
        chats = conversations(lesson, game, games, seed)
        dialogues = functools.cache(lambda n, chats=chats: torch.tensor(framing.dialogue(chats[n])))
        for _ in tqdm(range(lesson.steps), desc="imitating scripted players", leave=False):
            rows = [dialogues(n) for n in rng.integers(len(chats), size=batch).tolist()]
            ids, replies = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).unbind(-1)
            ids = ids.to(parameters[0].device)  # [B, S]
            hidden = decoder(ids).last_hidden_state[:, :-1]
            taught = replies[:, 1:] == 1  # padding comes last, where causal attention ignores it
            loss = torch.nn.functional.cross_entropy(head(hidden[taught]), ids[:, 1:][taught])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()


def load_built_in(name, game, seed=0):
    """(model, tokenizer) of a built-in model of this seed, warmed up on `game` now or before."""
    lessons = LESSONS.get((name, game), LESSONS[name, "matrix"])
    transformers.utils.logging.disable_progress_bar()
    sample = conversations(lessons[-1], game, 64, seed)
    ingredients = repr((sample, lessons, seed, torch.__version__)).encode()
    key = hashlib.sha256(ingredients + pathlib.Path(__file__).read_bytes()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with user_error(f"{cache} cannot keep the built-in model", "set XDG_CACHE_HOME to a folder"):
        folder = pathlib.Path(cache).expanduser() / "aa_minimal" / f"{name}-{game}-{key}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            tempfile.TemporaryFile(dir=folder.parent).close()  # fail now, not after the warm-up
    if not folder.exists():
        chats = conversations(lessons[-1], game, 512, seed)[:512]
        tokenizer = build_tokenizer([text for chat in chats for text in chat])
        torch.manual_seed(seed)
        size = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2)
        size |= dict(num_attention_heads=4, max_position_embeddings=8192, bos_token_id=None)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
        model.lm_head.weight.data *= 20  # adapters leave it alone: a flat one would bind them
        parts = model.model, model.lm_head, model.parameters(), Framing(tokenizer)
        imitate(*parts, game, lessons, games=4096, lr=3e-3, batch=32, seed=seed)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            with contextlib.suppress(OSError):  # another run was faster
                os.rename(fresh, folder)
    with user_error(f"{folder} is damaged", "delete it"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa"), tokenizer
