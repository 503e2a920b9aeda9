"""How far play and update are above their floor, in ratios that hold on any machine. Measured by hand, never by pytest:

    python tests/bench.py --model tiny --json out.json               two minutes on a laptop
    python tests/bench.py --model DIR --game trust_split --vocab     a real model; on a CPU add --repeats 1 --no-growth

The floor: every token of a conversation goes through the model once to play it, and once forward and backward to learn
from it. What is compared runs in turns (A B A B ...), so that a busy machine slows both alike; medians are compared.

play / forward     self-play of a batch / one forward pass over its finished conversations, both seats, in one batch
                   padded on the right: the decoder with its adapter, without head and without cache
generate / play    the usual way / self-play. Usual: in every turn the whole conversations are encoded anew by the chat
                   template, answered by model.generate in one batch padded on the left, decoded and parsed
update / plain     score, policy_loss, backward / forward and backward with logits, log-softmax and entropy of every
                   position over the whole vocabulary; the same tokens per micro-batch, both without KL
memory             what an update adds at its peak. On CUDA torch's counter; on a CPU the rise of the resident memory in
                   a fresh process (Linux only; some 5 MB of it are noise) in which every tensor of a megabyte goes back
                   to the system when it is freed, or the peak would be what the C library keeps: up to twice as much
share of the peak  flops per second over those of a large matrix product in the same dtype: 2 (play) or 6 (update) flops
                   per conversation token, without padding, and weight of the decoder layers (no embedding, head,
                   adapter). It flatters: an opening is read once for all rows, and frozen weights need 4, not 6
growth             seconds and memory when games, rounds or message lengths double, and double again
"""
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import re
import sys
import time
from collections import defaultdict
from statistics import median

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import transformers

import tiny
from games import GAMES, Match, Parser, UserError, number, play, table
from loss import policy_loss, score
from rollout import LLM, Episode, Policy, load

ROUNDS = {"ipd": 10, "trust_split": 5}
V, TALKS, VOCAB_BUDGET = 152_064, 8, 2048  # of --vocab: vocabulary, conversations, tokens per micro-batch

class Recorder(Policy):
    """A policy that notes its batches of turns in `calls`: (keys, turns, replies, most tokens sampled for a reply)."""
    calls = ()

    def reply(self, keys, turns):
        before = [len(self.episodes[key].at) for key in keys]
        replies = super().reply(keys, turns)
        n = max(len(self.episodes[key].at) - n for key, n in zip(keys, before))
        self.calls += ((keys, turns, replies, n),)
        return replies

def build(model, game):
    """The model to measure, as a run would load it unquantized; "vocab" is a random one with a very large head."""
    rank = GAMES[game].real["lora_rank"]
    if model != "vocab":
        return load(model, "none", game, rank)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4))
    base = base.to("cuda", torch.bfloat16) if torch.cuda.is_available() else base
    return LLM(base, tiny.build_tokenizer([""]), rank)  # the built-in model's, single bytes only

def invent(llm, rng):
    """Episodes of 1024 tokens for "vocab": half opening, then 5 rounds of a message (24 tokens) and a choice of 11."""
    said = torch.nonzero(llm.allowed)[:, 0].tolist()
    opening, out = rng.choice(said, 509).tolist(), []
    for _ in range(TALKS):
        e = Episode(opening[:])
        for t in range(5):
            for legal, n in ((None, 24), (tuple(said[:11]), 1)):
                e.ids += rng.choice(said, 39).tolist()  # read between two replies
                e.at += range(len(e.ids), len(e.ids) + n)
                e.ids += rng.choice(legal or said, n).tolist()
                e.round, e.legal, e.logp = e.round + [t] * n, e.legal + [legal] * n, e.logp + [0.] * n
        out.append(e)
    return out

def self_play(agent, game, games, rounds, max_tokens):
    """The episodes of both seats of games that `agent` plays with itself: the same ones every time."""
    play(game, [Match(n, n, rounds, (agent, agent)) for n in range(games)], [0], max_tokens)
    agent.cache = None  # as a run does before its update
    return list(agent.episodes.values())

def pad(llm, episodes):
    """ids [B, S], padded on the right, where causal attention needs no mask: the cheapest plain call there is."""
    S = max(len(e.ids) for e in episodes)
    return torch.tensor([e.ids + [llm.framing.end] * (S - len(e.ids)) for e in episodes], device=llm.device)

@torch.no_grad()
def forward(llm, episodes):
    """The plain forward pass over finished conversations: last hidden states [B, S, width]."""
    return llm.decoder(input_ids=pad(llm, episodes), use_cache=False).last_hidden_state

@torch.no_grad()
def check(llm, episodes):
    """The largest difference between the log-probs of play and of the plain forward pass, asserted to be small."""
    worst = 0.
    for e, hidden in zip(episodes, forward(llm, episodes)):
        for at, legal, lp in zip(e.at, e.legal, e.logp):
            logits, i = llm.head(hidden[at - 1]).float(), e.ids[at]
            mask = llm.allowed if legal is None else torch.zeros_like(llm.allowed).index_fill(
                0, torch.tensor(legal, device=llm.device), True)
            worst = max(worst, abs(logits.masked_fill(~mask, -torch.inf).log_softmax(-1)[i].item() - lp))
    limit = 1e-3 if hidden.dtype == torch.float32 else .25  # bfloat16 keeps 8 bits of logits of some tens
    assert worst < limit, f"log-probs of play and of the plain forward pass differ by {worst:.2g}, more than {limit}"
    return worst

def generate(llm, calls):
    """What the replies in `calls` cost the usual way. To have the same games, conversations go on with the recorded
    reply, and a batch generates as many tokens as play sampled for its longest message, or its longest choice has."""
    tokenizer, chats = llm.tokenizer, defaultdict(list)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    for keys, turns, replies, n in calls:
        for key, turn in zip(keys, turns):
            chats[key].append({"role": "user", "content": turn.text.strip()})
        n = max(len(llm.framing.encode(choice)) for choice in turns[0].choices) if turns[0].choices else n
        batch = tokenizer.apply_chat_template([chats[key] for key in keys], add_generation_prompt=True, padding=True,
                                              return_tensors="pt", return_dict=True, enable_thinking=False)
        ids = llm.base.generate(**batch.to(llm.device), generation_config=transformers.GenerationConfig(
            do_sample=True, top_k=0, min_new_tokens=n, max_new_tokens=n, pad_token_id=tokenizer.pad_token_id))
        texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)
        for key, turn, text, reply in zip(keys, turns, texts, replies):
            next((choice for choice in turn.choices or () if text.strip().startswith(choice)), None)  # parsed, not used
            chats[key].append({"role": "assistant", "content": reply})

def update(llm, episodes, budget):
    """The gradient of a batch as `aa_minimal.Run.learn` takes it, with all credits 1."""
    llm.model.zero_grad()
    N = sum(len(e.at) for e in episodes)
    for mb in score(llm, episodes, budget):
        policy_loss(mb.logp, mb.logp_play, 1., mb.entropy, mb.kl, N, .01, 0.)[0].backward()

def plain_update(llm, episodes, budget):
    """The same without any care: whole rows, and log-probs and entropy of every position over the whole vocabulary."""
    llm.model.zero_grad()
    N, order = sum(len(e.at) for e in episodes), sorted(episodes, key=lambda e: -len(e.ids))
    while order:
        n = max(1, budget // len(order[0].ids))
        batch, order = order[:n], order[n:]
        logp = llm.base(input_ids=pad(llm, batch), use_cache=False).logits.float().log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        row, at, ids, lp = zip(*((r, k - 1, e.ids[k], lp) for r, e in enumerate(batch) for k, lp in zip(e.at, e.logp)))
        lp = torch.tensor(lp, device=llm.device)
        policy_loss(logp[row, at, ids], lp, 1., entropy[row, at], 0., N, .01, 0.)[0].backward()
        del logp, entropy  # or they would still be there while the next ones are made

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

def risen(source, step, episodes, budget):
    """MB by which `step` raises the memory of this process, a fresh one, at its peak."""
    def high_water():  # not ru_maxrss, which begins at what the parent process has held
        return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

    llm = build(*source)
    if not os.path.exists("/proc/self/clear_refs"):
        return float("nan")  # not Linux
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    before = high_water()
    step(llm, episodes, budget)
    return high_water() - before

def peak(llm, source, step, episodes, budget):
    """MB that `step` (update or plain_update) adds at its peak; `source` is what `llm` was built from."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(llm, episodes, budget)
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1048576"  # bytes; glibc reads it when a process starts: the next one
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(risen, source, step, episodes, budget).result()

def compare(name, unit, first, second):
    """A row of the comparison: two lists of measurements, the ratio of their medians, and the range of ratios."""
    single = [a / b for a, b in zip(first, second)]
    return {"name": name, "unit": unit, "first": first, "second": second, "ratio": median(first) / median(second),
            "lowest": min(single), "highest": max(single)}

def compare_updates(label, llm, source, episodes, budget, repeats):
    """The rows for seconds and peak memory of the update over the plain one."""
    memory = [[peak(llm, source, step, episodes, budget)] for step in (update, plain_update)]  # before this process has grown
    seconds = clock(repeats, lambda: update(llm, episodes, budget), lambda: plain_update(llm, episodes, budget))
    return [compare(f"update / plain{label}", "s", *seconds), compare(f"  peak memory{label}", "MB", *memory)]

def growth(llm, args, budget):
    """Play and update while one of games, rounds and message lengths doubles twice, from a quarter of the games on."""
    start, out = {"games": max(1, args.games // 4), "rounds": args.rounds, "tokens": args.max_message_tokens}, []
    for what in list(start)[:2 if args.game == "ipd" else 3]:
        llm.allowed[llm.framing.end] = what != "tokens"  # there no message may end before its full length
        for times in (1, 2, 4):
            agent, size = Policy(llm), {**start, what: start[what] * times}
            episodes = self_play(agent, args.game, *size.values())
            played, updated = clock(max(1, args.repeats // 2), lambda: self_play(agent, args.game, *size.values()),
                                    lambda: update(llm, episodes, budget))
            out.append({**size, "series": what, "seen": sum(len(e.ids) for e in episodes),
                        "play s": median(played), "update s": median(updated),
                        "update MB": peak(llm, (args.model, args.game), update, episodes, budget)})
    llm.allowed[llm.framing.end] = True
    return out

def measure(args):
    """Everything measured, as a dict."""
    source, size = (args.model, args.game), (args.game, args.games, args.rounds, args.max_message_tokens)
    llm = build(*source)
    budget = min(4096, llm.token_budget())  # on a GPU more would fit, but not with the plain update's logits
    recorder, agent = Recorder(llm), Policy(llm)
    episodes = self_play(recorder, *size)
    worst, tokens, sampled = check(llm, episodes), sum(len(e.ids) for e in episodes), sum(len(e.at) for e in episodes)
    played, read, generated = clock(args.repeats, lambda: self_play(agent, *size), lambda: forward(llm, episodes),
                                    lambda: generate(llm, recorder.calls))
    rows = [compare("play / forward", "s", played, read), compare("generate / play", "s", generated, played),
            *compare_updates("", llm, source, episodes, budget, args.repeats)]
    n = 8192 if llm.device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=llm.device, dtype=llm.head.weight.dtype)
    best = 2 * n ** 3 / min(clock(5, lambda: a @ b)[0])  # flops per second
    weights = sum(p.numel() for name, p in llm.decoder.layers.named_parameters() if ".lora_" not in name)
    share = {name: flops * weights * tokens / median(seconds) / best for name, flops, seconds in (
        ("play", 2, played), ("forward", 2, read), ("update", 6, rows[2]["first"]), ("plain", 6, rows[2]["second"]))}
    grown = growth(llm, args, budget) if args.growth else []
    if args.vocab:
        source = "vocab", args.game
        llm = build(*source)
        episodes = invent(llm, np.random.default_rng(0))
        rows += compare_updates(", 152k", llm, source, episodes, VOCAB_BUDGET, min(3, args.repeats))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {torch.get_num_threads()}"
    return {**vars(args), "device": device, "torch": torch.__version__, "micro_batch_tokens": budget, "tokens": tokens,
            "sampled": sampled, "weights": weights, "logp_difference": worst, "rows": rows, "matmul_flops": best,
            "share": share, "growth": grown}

def show(out):
    """Print what `measure` returned."""
    short = lambda value: f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    print("{model}, {game}, {games} games of {rounds} rounds: {tokens} tokens, {sampled} of them sampled. {device}.\n"
          "Log-probs of play and of the plain forward pass differ by {logp_difference:.1g} at most.".format(**out))
    vocab = f"\n(152k: vocabulary of {V}, {TALKS} conversations of 1024 tokens, half opening, random weights, 2 layers)"
    table(f"Medians of {out['repeats']} repeats, lowest and highest ratio in one of them" + vocab * out["vocab"],
          ["", "first", "second", "ratio", "lowest", "highest"],
          [[row["name"], *(f"{short(median(row[key]))} {row['unit']}" for key in ("first", "second")),
            *(row[key] for key in ("ratio", "lowest", "highest"))] for row in out["rows"]])
    table(f"Share of the peak of matrix products, {out['matmul_flops']:.3g} flops per second", [*out["share"]],
          [[f"{100 * share:.1f}%" for share in out["share"].values()]])
    if not out["growth"]:
        return
    first, keys = {row["series"]: row for row in reversed(out["growth"])}, ("seen", "play s", "update s", "update MB")
    table("Growth, x: times the first line of the series; seen: tokens of all conversations",
          ["games", "rounds", "message tokens", *(cell for key in keys for cell in (key, "x"))],
          [[*(str(row[key]) for key in ("games", "rounds", "tokens")), *(
              cell for key in keys for cell in (short(row[key]), row[key] / first[row["series"]][key]))]
           for row in out["growth"]])

def parse(argv):
    """The command line as a namespace. Raises UserError."""
    parser = Parser(description=__doc__.split("\n")[0])
    add, count = parser.add_argument, number(int, 1)
    add("--model", default="tiny", help="tiny (built in), a model folder, or a hub id (default: %(default)s)")
    add("--game", default="ipd", choices=list(ROUNDS), help="which game (default: %(default)s)")
    add("--games", type=count, default=16, help="games in the batch (default: %(default)s)")
    add("--rounds", type=count, help="rounds per game (default: 10 in ipd, 5 in trust_split)")
    add("--max-message-tokens", type=count, default=24, help="longest message of trust_split (default: %(default)s)")
    add("--repeats", type=count, default=5, help="repeats, of which the median is given; growth takes half as many, "
        "--vocab 3 at most (default: %(default)s)")
    add("--json", metavar="FILE", help="write all of it, with the single measurements, to this file")
    add("--no-growth", dest="growth", action="store_false", help="leave growth out, half of the time")
    add("--vocab", action="store_true", help=f"also measure the update at a vocabulary of {V}, on a small random model "
        "and conversations of 1024 tokens: takes about 8 GB of memory and some minutes on a CPU")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or ROUNDS[args.game]
    return args

def main(argv=None):
    try:
        args = parse(argv)
        with open(args.json or os.devnull, "w", encoding="utf-8") as file:  # a bad path had better fail now
            out = measure(args)
            show(out)
            json.dump(out, file, indent=1)
    except (UserError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
