"""The built-in model: a Llama of about 10^5 parameters that needs no download and no GPU.

It stands where an instruct model would: warmed up by behaviour cloning on games between scripted players, it knows the format
of a game and has a mixed, mostly cooperative prior. What was put in before any reinforcement learning is `POPULATIONS` below.
Everything after loading is the same code as for a real model. Cached in the user's cache directory under a key made of all
that shapes it; delete the folder to warm up again. Run `python tiny.py trust_split` to see how it plays.
"""
import hashlib
import os
import pathlib
import sys
import tempfile

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from games import GAMES, Match, Scripted, UserError, play
from rollout import Framing

# Shares of the scripted players and the probability of a random reply. `tiny` has reciprocity in its prior, as an instruct
# model has; `tiny-blind` has never seen anyone answer like with like.
POPULATIONS = {
    "tiny": {"matrix": ({"tit_for_tat": .3, "cooperate": .45, "defect": .25}, .1),
             "split": ({"tit_for_tat": .4, "cooperate": .4, "defect": .2}, .15)},
    "tiny-blind": {"matrix": ({"cooperate": .7, "defect": .3}, .1), "split": ({"cooperate": .75, "defect": .25}, .15)},
}
WIDTH, MLP, LAYERS, HEAD_SCALE, STEPS, BATCH, LR, GAMES_SEEN, SEED = 64, 256, 2, 20., 700, 16, 3e-3, 4096, 0
TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def conversations(name, game, count):
    """`count` scripted games as conversations: a list of [(text read, reply), ...], one per seat."""
    shares, noise = POPULATIONS[name]["split" if "split" in game else "matrix"]
    population = {player: Scripted(player, noise) for player in shares}
    rng = np.random.default_rng(SEED)
    pairs = rng.choice(list(population), size=(count, 2), p=list(shares.values()))
    matches = [Match(n, n, int(rng.integers(1, 11)), tuple(population[player] for player in pair)) for n, pair in enumerate(pairs)]
    play(game, matches, [SEED], 40)
    return [[(text, reply) for seat, text, reply in match.log if seat == s] for match in matches for s in (0, 1)]


def build_tokenizer(texts):
    """Byte-level BPE without word splitting, so that the fixed phrases of the prompts become single tokens; only hands and the
    numbers of a reply stay tokens of their own, as they are what a player chooses."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"(?<![a-z,] )(?<!\d)\d+|rock|paper|scissors"), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=20, show_progress=False, max_token_length=2000,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"]))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>",
                                                chat_template=TEMPLATE)


def warm_up(tokenizer, talks, steps=STEPS):
    """A fresh Llama trained to give the scripted replies of `talks`: cross-entropy on the reply tokens, end of turn included."""
    framing, rows = Framing(tokenizer), []
    for talk in talks:
        ids, mine = [], []
        for text, reply in talk:
            ids += framing.user(text, first=not ids)
            said = [*framing.encode(reply), framing.end]
            mine += range(len(ids), len(ids) + len(said))
            ids += said
        rows.append((ids, mine))
    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=8192, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=framing.end, pad_token_id=framing.end))
    with torch.no_grad():  # adapters leave the head alone, and a flat head would cap every probability they can reach
        model.lm_head.weight *= HEAD_SCALE
    rng = np.random.default_rng(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="warming up the built-in model (once)", leave=False)
    for _ in bar:
        batch = [rows[b] for b in rng.integers(len(rows), size=BATCH)]
        S = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [framing.end] * (S - len(ids)) for ids, _ in batch])
        at = torch.tensor([(b, n) for b, (_, mine) in enumerate(batch) for n in mine])
        hidden = model.model(ids).last_hidden_state[at[:, 0], at[:, 1] - 1]
        loss = F.cross_entropy(model.lm_head(hidden), ids[at[:, 0], at[:, 1]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def load(name, game):
    """(model, tokenizer) of the population `name` warmed up on `game`, from the cache or made now. UserError for a bad name."""
    if name not in POPULATIONS:
        raise UserError(f"no built-in model is called {name!r}; there are {', '.join(POPULATIONS)}")
    sample = repr((conversations(name, game, 64), POPULATIONS[name], torch.__version__, transformers.__version__))
    key = hashlib.sha256(sample.encode() + pathlib.Path(__file__).read_bytes()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "aa_minimal"
    folder = cache / f"{name}-{game}-{key}"
    if not folder.exists():
        talks = conversations(name, game, GAMES_SEEN)
        tokenizer = build_tokenizer([text for talk in talks[:512] for turn in talk for text in turn])
        model = warm_up(tokenizer, talks)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            os.chmod(fresh, 0o755)
            try:
                os.rename(fresh, folder)  # whole or not at all; another run may have been faster
            except OSError:
                pass
            os.makedirs(fresh, exist_ok=True)
    return (transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa"),
            transformers.PreTrainedTokenizerFast.from_pretrained(folder))
