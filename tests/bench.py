"""How far play and update are above their floor, in ratios that hold on any machine. Run by hand:

    python tests/bench.py --model tiny --json out.json               minutes on a laptop
    python tests/bench.py --model DIR --game trust_split --vocab     a real model, in 16 or 32 bits
                                        (on a CPU add --repeats 1 --no-growth --no-generate)

The floor: every token of a conversation goes through the model once to play it, and once forward
and backward to learn from it. What is compared runs in turns (A B A B ...), so that a busy machine
slows both alike; medians are compared.

play / forward     self-play of a batch / one forward pass over its finished conversations, both
                   seats, in one batch padded on the right: the decoder with its adapter, without
                   head and without cache
generate / play    the usual way / self-play. Usual: in every turn the whole conversations are
                   encoded anew by the chat template, answered by model.generate in one batch padded
                   on the left, and decoded
update / plain     score, policy_loss, backward / forward and backward with logits, log-softmax and
                   entropy of every position over the whole vocabulary. Both have the same budget of
                   tokens per micro-batch, but score counts a shared opening only once; both are
                   without KL, and both run the layers again in the backward pass on a GPU
peak memory        what an update adds at its peak. On CUDA it is torch's counter; on a CPU the rise
                   of the resident memory in a fresh process (Linux only; some 5 MB of it are noise)
                   in which every tensor of a megabyte goes back to the system when it is freed, or
                   the peak would be what the C library keeps: up to twice as much
share of the peak  flops per second over those of a large matrix product in the same dtype. They are
                   2 (play) or 6 (update) per conversation token, without padding, and weight of the
                   decoder layers (no embedding, head, adapter). It flatters: an opening is read
                   once for all rows, and frozen weights need 4, not 6
growth             seconds and memory when games, rounds or message lengths double twice
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import re
import sys
import time
from collections import defaultdict
from statistics import median

import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import tiny
from aa_minimal import Settings
from eval import load, print_table, report
from games import GAMES, Match, play
from loss import policy_loss
from rollout import LLM, Episode, Policy, Sample, score

V, TALKS, VOCAB_BUDGET = 152_064, 8, 2048  # of --vocab: vocabulary, conversations, micro-batch


class Recorder(Policy):
    """A policy that notes in `calls` all questions it is asked together, with their replies and the
    most tokens sampled for one of them."""

    calls = ()

    def reply(self, questions):
        episodes = [self.episodes[question.key] for question in questions]
        before = [len(episode.samples) for episode in episodes]
        replies = super().reply(questions)
        n = max(len(episode.samples) - n for episode, n in zip(episodes, before))
        self.calls += ((questions, replies, n),)
        return replies


def build(model, game):
    """The LLM to measure, unquantized; "vocab" is a random one with a very large head."""
    if model != "vocab":
        with contextlib.redirect_stdout(sys.stderr):  # only results are printed
            return load(model, "none", game, Settings.lora_rank)
    size = dict(vocab_size=V, hidden_size=256, intermediate_size=1024)
    size |= dict(num_hidden_layers=2, num_attention_heads=4)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
    if torch.cuda.is_available():
        base = base.to("cuda", torch.bfloat16)
    tokenizer = tiny.build_tokenizer([""])  # the built-in model's, single bytes only
    return LLM(base, tokenizer, Settings.lora_rank)


def invent(llm):
    """Episodes for "vocab" of 1024 tokens: half is opening, then come 5 rounds of a message (24
    tokens) and a choice of 11."""
    rng, sayable = np.random.default_rng(0), llm.sayable.nonzero()[:, 0].tolist()
    choices = tuple(sayable[:11])
    opening, episodes = rng.choice(sayable, 509).tolist(), []
    for _ in range(TALKS):
        ids, samples = opening.copy(), []
        for round in range(5):
            for legal, n in ((None, 24), (choices, 1)):
                ids += rng.choice(sayable, 39).tolist()  # read between two replies
                samples += [Sample(len(ids) + k, round, legal, 0.0) for k in range(n)]
                ids += rng.choice(legal or sayable, n).tolist()
        episodes.append(Episode(ids, samples))
    return episodes


def self_play(agent, game, games, rounds, max_tokens):
    """The episodes of both seats of games of `agent` with itself: the same ones every time."""
    matches = [Match(n, n, rounds, (agent, agent)) for n in range(games)]
    play(game, matches, [0], max_tokens)
    return list(agent.episodes.values())


def pad(llm, episodes):
    """ids [B, S], padded on the right, where causal attention needs no mask."""
    rows = [torch.tensor(episode.ids) for episode in episodes]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(llm.device)


@torch.no_grad()
def forward(llm, episodes):
    """The plain forward pass over finished conversations: last hidden states [B, S, width]."""
    return llm.decoder(input_ids=pad(llm, episodes), use_cache=False).last_hidden_state


@torch.no_grad()
def check(llm, episodes):
    """The largest difference between log-probs of play and those of the model's own forward pass
    over each conversation, asserted to be small."""
    differences = []
    for ids, samples in episodes:
        logits = llm.base(torch.tensor([ids], device=llm.device), use_cache=False).logits[0]
        for position, _, legal, logp in samples:
            among = llm.sayable.nonzero()[:, 0].tolist() if legal is None else list(legal)
            want = logits[position - 1, among].float().log_softmax(-1)[among.index(ids[position])]
            differences.append(want.item() - logp)
    worst = torch.tensor(differences).abs().max().item()  # NaN if one is
    limit = 1e-3 if logits.dtype == torch.float32 else 0.25  # bfloat16 keeps 8 bits
    assert worst < limit, f"log-probs of play and of a forward pass differ by {worst:.2g}"
    return worst


def generate(llm, calls):
    """What the replies in `calls` cost the usual way. So that the games are the same, conversations
    go on with the recorded reply, and a batch generates as many tokens as play sampled for its
    longest message, or as its longest choice has."""
    tokenizer, chats = llm.tokenizer, defaultdict(list)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    template = dict(add_generation_prompt=True, enable_thinking=False)
    template |= dict(padding=True, return_tensors="pt", return_dict=True)
    for questions, replies, n in calls:
        for key, turn, _ in questions:
            chats[key].append({"role": "user", "content": turn.text.strip()})
        choices = questions[0].turn.choices
        if choices:
            n = max(len(written) for written in llm.framing.trie(choices))
        batch = [chats[question.key] for question in questions]
        inputs = tokenizer.apply_chat_template(batch, **template).to(llm.device)
        how = dict(do_sample=True, top_k=0, min_new_tokens=n, max_new_tokens=n)
        how = transformers.GenerationConfig(**how, pad_token_id=tokenizer.pad_token_id)
        ids = llm.base.generate(**inputs, generation_config=how)
        tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for question, reply in zip(questions, replies):
            chats[question.key].append({"role": "assistant", "content": reply})


def update(llm, episodes, budget):
    """The gradient of a batch as `aa_minimal.train` takes it, with all credits 1."""
    llm.model.zero_grad()
    N = sum(len(episode.samples) for episode in episodes)
    for batch in score(llm, episodes, budget):
        of_tokens = batch.logp, batch.logp_play, 1.0, batch.entropy, batch.kl
        loss, _ = policy_loss(*of_tokens, N, Settings.entropy, 0.0)
        loss.backward()


def plain_update(llm, episodes, budget):
    """The same without any care: whole rows, and log-probs and entropy of every position over the
    whole vocabulary."""
    llm.model.zero_grad()
    N = sum(len(episode.samples) for episode in episodes)
    order = sorted(episodes, key=lambda episode: len(episode.ids), reverse=True)
    while order:
        B = max(1, budget // len(order[0].ids))
        batch, order = order[:B], order[B:]
        ids = pad(llm, batch)  # [B, S]
        logits = llm.base(input_ids=ids, use_cache=False).logits
        logp = logits.float().log_softmax(-1)  # [B, S, V]
        entropy = -(logp.exp() * logp).sum(-1)  # [B, S]
        places = [(b, sample) for b, episode in enumerate(batch) for sample in episode.samples]
        row = torch.tensor([b for b, _ in places], device=llm.device)
        at = torch.tensor([sample.position for _, sample in places], device=llm.device)
        logp_play = torch.tensor([sample.logp for _, sample in places], device=llm.device)
        of_tokens = logp[row, at - 1, ids[row, at]], logp_play, 1.0, entropy[row, at - 1], 0.0
        loss, _ = policy_loss(*of_tokens, N, Settings.entropy, 0.0)
        loss.backward()
        del logits, logp, entropy, of_tokens, loss  # before the next ones are made


def clock(repeats, *functions):
    """Seconds of each of `functions`, called in turns `repeats` times: [[seconds, ...], ...]."""

    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or the clock is read before the work is done
        return time.perf_counter()

    out = [[] for _ in functions]
    for seconds, function in list(zip(out, functions)) * repeats:
        start = now()
        function()
        seconds.append(now() - start)
    return out


def peak(llm, source, step, episodes, budget):
    """MB that `step`, an update, adds at its peak; `llm` was built from `source`."""
    if torch.cuda.is_available():
        llm.model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(llm, episodes, budget)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not os.path.exists("/proc/self/clear_refs"):
        return float("nan")  # not Linux
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1048576"  # read by glibc when a process starts
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(risen, source, step, episodes, budget).result()


def risen(source, step, episodes, budget):
    """MB by which `step` raises the memory of this process, a fresh one, at its peak."""

    def high_water():  # not ru_maxrss, which begins at what the parent process has held
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

    llm = build(*source)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = high_water()
    step(llm, episodes, budget)
    return high_water() - before


def compare(name, unit, first, second):
    """A row of the comparison: two lists of measurements, the ratio of their medians, the lowest
    and the highest ratio of single ones."""
    single = [a / b for a, b in zip(first, second)]
    row = dict(name=name, unit=unit, first=first, second=second)
    row["ratio"] = median(first) / median(second)
    return row | dict(lowest=min(single), highest=max(single))


def compare_updates(label, llm, source, episodes, budget, repeats):
    """The rows for seconds and peak memory of the update over the plain one."""
    steps, inputs = (update, plain_update), (episodes, budget)
    memory = [[peak(llm, source, step, *inputs)] for step in steps]  # before this process grows
    seconds = clock(repeats, *(functools.partial(step, llm, *inputs) for step in steps))
    name = f"update / plain{label}"
    return [compare(name, "s", *seconds), compare(f"peak memory{label}", "MB", *memory)]


def growth(llm, args, budget):
    """Play and update while one of games, rounds and message lengths doubles twice; the games begin
    at a quarter of --games."""
    start = dict(games=max(1, args.games // 4), rounds=args.rounds, tokens=args.max_message_tokens)
    series = ["games", "rounds"] + ["tokens"] * (args.game == "trust_split")
    rows = []
    for what in series:
        llm.sayable[llm.framing.end] = what != "tokens"  # there every message has full length
        for times in (1, 2, 4):
            size = start | {what: start[what] * times}
            playing = functools.partial(self_play, Policy(llm), args.game, *size.values())
            episodes = playing()
            updating = functools.partial(update, llm, episodes, budget)
            played, updated = clock(max(1, args.repeats // 2), playing, updating)
            row = dict(series=what, **size, seen=sum(len(episode.ids) for episode in episodes))
            row |= {"play s": median(played), "update s": median(updated)}
            row["update MB"] = peak(llm, (args.model, args.game), update, episodes, budget)
            rows.append(row)
    llm.sayable[llm.framing.end] = True
    return rows


def measure(args):
    """Everything measured, as a dict."""
    source, budget = (args.model, args.game), Settings.micro_batch_tokens
    size = args.game, args.games, args.rounds, args.max_message_tokens
    llm = build(*source)
    recorder, agent = Recorder(llm), Policy(llm)
    episodes = self_play(recorder, *size)
    tokens = sum(len(episode.ids) for episode in episodes)
    out = dict(vars(args), torch=torch.__version__, micro_batch_tokens=budget, tokens=tokens)
    out["device"] = f"CPU, threads: {torch.get_num_threads()}"
    if torch.cuda.is_available():
        out["device"] = torch.cuda.get_device_name()
    out["sampled"] = sum(len(episode.samples) for episode in episodes)
    out["logp_difference"] = check(llm, episodes)

    ways = [functools.partial(self_play, agent, *size), functools.partial(forward, llm, episodes)]
    if args.generate:
        ways.append(functools.partial(generate, llm, recorder.calls))
    seconds = clock(args.repeats, *ways)
    played, read = seconds[:2]
    rows = [compare("play / forward", "s", played, read)]
    if args.generate:
        rows.append(compare("generate / play", "s", seconds[2], played))
    of_updates = compare_updates("", llm, source, episodes, budget, args.repeats)
    rows += of_updates

    n = 8192 if llm.device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=llm.device, dtype=llm.head.weight.dtype)
    best = 2 * n**3 / min(clock(5, lambda: a @ b)[0])  # flops per second
    names = llm.decoder.layers.named_parameters()
    weights = sum(p.numel() for name, p in names if ".lora_" not in name)
    work = dict(play=(2, played), forward=(2, read))
    work |= dict(update=(6, of_updates[0]["first"]), plain=(6, of_updates[0]["second"]))
    share = {}
    for name, (flops, seconds) in work.items():
        share[name] = flops * weights * tokens / median(seconds) / best

    grown = growth(llm, args, budget) if args.growth else []
    if args.vocab:
        llm = build("vocab", args.game)
        inputs = ("vocab", args.game), invent(llm), VOCAB_BUDGET, min(3, args.repeats)
        rows += compare_updates(", 152k", llm, *inputs)
    return out | dict(rows=rows, weights=weights, matmul_flops=best, share=share, growth=grown)


def show(out):
    """Print what `measure` returned."""

    def short(value, unit=""):
        return (f"{value:.0f}" if value >= 100 else f"{value:.3g}") + unit

    print(
        "{model}, {game}, {games} games of {rounds} rounds: {tokens} tokens, ".format(**out), end=""
    )
    print("{sampled} of them sampled. {device}.".format(**out))
    difference = f"{out['logp_difference']:.1g}"
    print(f"Log-probs of play and of a plain forward pass differ by {difference} at most.")

    rows = []
    for row in out["rows"]:
        medians = [short(median(row[key]), " " + row["unit"]) for key in ("first", "second")]
        rows.append([row["name"], *medians, row["ratio"], row["lowest"], row["highest"]])
    title = f"Medians of {out['repeats']} repeats, lowest and highest ratio in one of them"
    if out["vocab"]:
        title += (
            f"\n(152k: a vocabulary of {V}, {TALKS} conversations of 1024 tokens, half opening,"
        )
        title += " random weights, 2 layers)"
    print_table(title, ["first", "second", "ratio", "lowest", "highest"], rows)

    shares = ", ".join(f"{name} {share:.1%}" for name, share in out["share"].items())
    print(f"\nShare of the peak of matrix products, {out['matmul_flops']:.3g} flops/s: {shares}")

    first, rows, measured = {}, [], ("seen", "play s", "update s", "update MB")
    for row in out["growth"]:
        start = first.setdefault(row["series"], row)
        cells = [f"{short(row[key])} ({row[key] / start[key]:.1f}x)" for key in measured]
        rows.append([f"{row[row['series']]} {row['series']}", *(cell.rjust(13) for cell in cells)])
    if rows:
        title = "Growth from {games} games of {rounds} rounds, messages of {tokens} tokens; seen: "
        title = title.format(**out["growth"][0]) + "tokens of all conversations"
        print_table(title, [name.rjust(13) for name in measured], rows)


def count(text):
    """The whole number from 1 up that `text` spells, for argparse."""
    if (n := int(text)) < 1:
        raise ValueError
    return n


def parse(argv):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, tiny-blind, a folder, or a hub id")
    add("--game", default="ipd", choices=list(GAMES), help="which game")
    add("--games", type=count, default=16, help="games in the batch")
    add("--rounds", type=count, help="rounds per game (default: 5 in trust_split, else 10)")
    add("--max-message-tokens", type=count, default=24, help="longest message")
    add("--repeats", type=count, default=5, help="of which the median is given")
    add("--json", metavar="FILE", help="write all of it, single measurements too, to this file")
    add("--no-growth", dest="growth", action="store_false", help="leave growth out")
    about_generate = "leave the usual way out: it takes longer than all others together"
    add("--no-generate", dest="generate", action="store_false", help=about_generate)
    about_vocab = f"also measure the update at a vocabulary of {V}, on a small random model: takes "
    add("--vocab", action="store_true", help=about_vocab + "about 8 GB, and minutes on a CPU")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (5 if args.game == "trust_split" else 10)
    return args


def main(argv=None):
    args = parse(argv)
    with open(args.json or os.devnull, "w", encoding="utf-8") as file:  # a bad path fails now
        out = measure(args)
        show(out)
        json.dump(out, file, indent=1)


if __name__ == "__main__":
    sys.exit(report("bench", main))
