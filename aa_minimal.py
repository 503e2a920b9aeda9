"""Train a language-model agent in a social dilemma by self-play: play, credit, update, log, save.

    python aa_minimal.py --game trust_split                      the built-in model, minutes on a laptop
    python aa_minimal.py --game ipd --algo naive                 plain policy gradient: watch it learn to defect
    python aa_minimal.py --game ipd --model DIR_OR_HUB_ID        QLoRA on any instruct model
    torchrun --nproc-per-node 2 aa_minimal.py --game ipd         the same games, shared out between processes

The method is arXiv 2511.19405: Advantage Alignment with a group-relative baseline (equations in loss.py). One optimizer step
follows every batch of games, so the importance weights are 1 but for rounding. All randomness follows from (seed, iteration):
there is no random state to save, and a game does not depend on what else is in its batch.
"""
import argparse
import hashlib
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from importlib import metadata

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from games import GAMES, Match, Parser, Scripted, UserError, meet, number, play, players, summarize, table
from loss import advantages, credits, policy_loss, returns_to_go, score
from rollout import Policy, find_agent, load, read, read_tensors, write, write_tensors

SNAPSHOT_EVERY, TRANSCRIPTS_EVERY = 10, 10

def parse(argv, saved=None):
    """The settings of a run as a namespace: the flags, over those `saved` (dict), over the defaults of game and model. Raises
    UserError on what cannot be."""
    parser = Parser(description=__doc__.split("\n")[0], epilog="Defaults that are not stated depend on the game "
                    "and on whether the model is the built-in one (see games.py); config.json records them.")
    add, count, weight = parser.add_argument, number(int, 1), number(float, 0)
    add("--game", default="trust_split", choices=list(GAMES), help="which game (default: %(default)s)")
    add("--algo", default="aa", choices=["aa", "naive", "sum"], help="credit: aa Advantage Alignment (default), naive own "
        "return, sum joint return")
    add("--model", default="auto", help="tiny (built in), tiny-blind (its warm-up knew no reciprocity), a folder, or a hub id "
        "(default: Qwen/Qwen2.5-1.5B-Instruct with CUDA, else tiny)")
    add("--quant", default="auto", choices=["auto", "nf4", "none"], help="weights of a real model: 4 bits or not (default: nf4 with CUDA)")
    add("--iterations", type=count, help="optimizer steps, one per batch of games")
    add("--games", type=count, help="games per iteration, B")
    add("--group-size", type=count, help="games that share deals and opponent, and so a baseline, G")
    add("--rounds", type=count, help="rounds per game, T (the most, with --continue-prob)")
    add("--continue-prob", type=number(float, 0, 1), default=1., help="probability that a group's games go on after a round (default: 1)")
    add("--lr", type=number(float, 1e-12), help="learning rate of Adam")
    add("--beta", type=weight, help="weight beta of the alignment term in aa")
    add("--gamma", type=number(float, 0, 1), help="discount gamma per round")
    add("--entropy", type=weight, help="weight of the entropy bonus (nats per sampled token)")
    add("--kl", type=weight, help="weight of the KL to the model without adapter (nats per sampled token); 0: not computed")
    add("--baseline", default="group", choices=["group", "batch"], help="whose mean return is the baseline (default: group)")
    add("--buffer", type=number(int, 0), default=30, help="past snapshots kept as opponents of half of the groups; 0: self-play "
        "only (default: 30)")
    add("--opponent", help="a fixed agent in the other seat of every game: a scripted player, base, human, api:MODEL, or a run's folder")
    add("--max-message-tokens", type=number(int, 0), help="longest message (tokens); 0: no talk")
    add("--lora-rank", type=count, help="rank r of the LoRA adapter; alpha is 2 r")
    add("--micro-batch-tokens", type=count, help="tokens per forward and backward pass (default: what fits); lower it when memory runs out")
    add("--seed", type=number(int, 0), default=0, help="fixes deals, sampling and the initial adapter (default: 0)")
    add("--out", help="folder of the run (default: runs/GAME-ALGO-sSEED, numbered where that exists)")
    add("--save-every", type=count, help="iterations between checkpoints")
    add("--resume", metavar="RUN", help="go on with the run in this folder from its last checkpoint; --iterations may grow")
    args = parser.parse_args(argv, argparse.Namespace(**saved or {}))
    if args.model == "auto":
        args.model = "Qwen/Qwen2.5-1.5B-Instruct" if torch.cuda.is_available() else "tiny"
    built_in = args.model.startswith("tiny") and not os.path.exists(args.model)
    if args.quant == "auto":
        args.quant = "nf4" if torch.cuda.is_available() and not built_in else "none"
    for key, value in {**GAMES[args.game].real, **(GAMES[args.game].tiny if built_in else {})}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if built_in and args.quant == "nf4":
        raise UserError("--quant nf4 is for real models, the built-in one would gain nothing; use --quant none")
    if args.games % args.group_size:
        raise UserError(f"--games {args.games} is not divisible by --group-size {args.group_size}; change one of them")
    if args.baseline == "group" and args.group_size == 1:
        raise UserError("--group-size 1 leaves no other game for the group baseline; use 2 or more, or --baseline batch")
    return args

class Run:
    """One training run: the model, its optimizer, the opponents, and the folder that all goes to."""

    def __init__(self, args, folder):
        self.args, self.folder, self.iteration, self.warned = args, pathlib.Path(folder), 0, set()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.llm = load(args.model, args.quant, args.game, args.lora_rank, args.seed)
        self.live, self.untrained = Policy(self.llm), Policy(self.llm, None)
        self.opponent = find_agent(args.opponent, args.game, self.llm) if args.opponent else None
        self.weights = {n: p for n, p in sorted(self.llm.model.named_parameters()) if ".default." in n}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=args.lr)
        self.budget = args.micro_batch_tokens or self.llm.token_budget()
        self.slots, self.past = {}, []  # adapters loaded for opponents; snapshot numbers to draw from

    def save(self):
        """Write what --resume needs, whole or not at all: weights, Adam's state, and which files there were, how long; then the adapter."""
        state = {f"{n} {key}": value for n, p in self.weights.items() for key, value in {**self.optimizer.state[p], "weight": p.detach()}.items()}
        files = {name: (self.folder / name).read_bytes() for name in ("config.json", "metrics.jsonl", "transcripts.jsonl")}
        files = {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in files.items()}
        write_tensors(self.folder / "checkpoint.safetensors", state, json.dumps([self.iteration, self.past, files]))
        self.llm.save_adapter(self.folder / "adapter")
        for old in sorted(self.folder.glob("snapshots/*"))[:-len(self.past) or None]:
            shutil.rmtree(old)

    def resume(self):
        """Go back to what `save` wrote last. What the run has written since is cut off. UserError, nothing changed, where a file is damaged."""
        state, info = read_tensors(self.folder / "checkpoint.safetensors")
        iteration, past, files = json.loads(info)
        for name, (size, digest) in files.items():
            path = self.folder / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()[:size]).hexdigest() != digest:
                raise UserError(f"{path} is missing or damaged; restore it, or start a new run")
        for number in past:
            read_tensors(self.folder / "snapshots" / f"{number:06d}" / "adapter_model.safetensors")
        for name, (size, _) in files.items():
            os.truncate(self.folder / name, size)
        for n, p in self.weights.items():
            p.data.copy_(state[f"{n} weight"])
            self.optimizer.state[p] = {key: state[f"{n} {key}"].to(p.device if key != "step" else "cpu") for key in ("step", "exp_avg", "exp_avg_sq")}
        self.iteration, self.past = iteration, past
        for late in (path for path in self.folder.glob("snapshots/*") if int(path.name) >= iteration):
            shutil.rmtree(late)

    def draw(self):
        """The matches of this iteration and who learns: ([Match], [(match, seat, group)])."""
        args, matches, learners = self.args, [], []
        groups = args.games // args.group_size
        for g in range(groups):
            rng = np.random.default_rng([args.seed, self.iteration, 2, g])
            rounds = args.rounds if args.continue_prob == 1 else min(args.rounds, int(rng.geometric(1 - args.continue_prob)))
            other, seat = self.opponent, (g + self.iteration) % 2
            if other is None and self.past and g >= (groups + 1) // 2:
                other = self.snapshot(self.past[rng.integers(len(self.past))])
            agents = (self.live, other or self.live)[::1 if seat == 0 else -1]
            for n in range(g * args.group_size, (g + 1) * args.group_size):
                matches.append(Match(n, g, rounds, agents))
                learners += [(matches[-1], s, g) for s in (0, 1) if agents[s] is self.live]
        return matches, learners

    def snapshot(self, number):
        """The policy of snapshot `number`, in an adapter slot of its own while this iteration lasts."""
        if number not in self.slots:
            slot = f"past{len(self.slots)}"
            self.llm.load_adapter(self.folder / "snapshots" / f"{number:06d}", slot)
            self.slots[number] = Policy(self.llm, slot)
        return self.slots[number]

    def play(self, matches):
        """Play this process's share of `matches`, and fill in what the other processes have played of the rest."""
        play(self.args.game, [m for m in matches if m.deal % self.world == self.rank], [self.args.seed, self.iteration], self.args.max_message_tokens)
        for episodes, records in gather([self.live.episodes, [(m.number, m.played, m.log) for m in matches if m.played]]):
            self.live.episodes.update(episodes)
            for n, played, log in records:
                matches[n].played, matches[n].log = played, log

    def credit(self, learners):
        """c [rows, T] of the learning seats, from points to credit (equations in loss.py), and how many games have no advantage."""
        args = self.args
        lengths = torch.tensor([len(m.played) for m, _, _ in learners])
        mask = (torch.arange(args.rounds) < lengths[:, None]).float()
        own, other = torch.zeros(2, len(learners), args.rounds)
        for b, (m, seat, _) in enumerate(learners):
            rewards = torch.tensor([this.points for this in m.played]).T / GAMES[args.game].scale  # [2, rounds played]
            own[b, :lengths[b]], other[b, :lengths[b]] = rewards[seat], rewards[1 - seat]
        group = torch.tensor([2 * g * (args.baseline == "group") + seat for _, seat, g in learners])
        A_own, A_other = (advantages(returns_to_go(r, args.gamma), group, mask) for r in (own, other))
        return credits(args.algo, A_own, A_other, args.gamma, args.beta)

    def learn(self, learners):
        """One optimizer step on the games of this iteration; returns what to log of it."""
        args = self.args
        episodes = [m.agents[seat].episodes[m.number, seat] for m, seat, _ in learners]
        c = self.credit(learners).to(self.llm.device)
        N, mine = sum(len(e.at) for e in episodes), range(self.rank, len(episodes), self.world)
        while True:
            try:
                sums = self.backward([episodes[b] for b in mine], c[mine], N)
                break
            except torch.OutOfMemoryError:
                self.budget //= 2
                self.warn(f"out of memory; going on with --micro-batch-tokens {self.budget}")
                if self.budget < 64:
                    raise UserError("out of memory even with the smallest micro-batch; lower --rounds or --max-message-tokens") from None
        for p in self.weights.values() if self.world > 1 else ():
            dist.all_reduce(p.grad)
        entropy, kl, ratio, largest = np.array(gather(sums)).T
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.).item()
        if not np.isfinite(norm):
            raise UserError(self.stopped("the gradient is not finite"))
        self.optimizer.step()
        return {"entropy": entropy.sum() / N, "kl": kl.sum() / N if args.kl else None, "grad_norm": norm, "ratio_mean": ratio.sum() / N,
                "ratio_max": largest.max(), "tokens": sum(len(e.ids) for e in episodes), "sampled_tokens": N,
                "zero_credit": 1 - (c != 0).any(1).float().mean().item()}

    def backward(self, episodes, c, N):
        """Gradient of the loss over this process's `episodes`; returns [entropy, kl, ratio (sums over tokens), largest ratio]."""
        args, sums = self.args, [0., 0., 0., 0.]
        for p in self.weights.values():
            p.grad = torch.zeros_like(p)
        for mb in score(self.llm, episodes, self.budget, reference=args.kl > 0):
            loss, ratio = policy_loss(mb.logp, mb.logp_play, c[mb.row, mb.round], mb.entropy, mb.kl, N, args.entropy, args.kl)
            odd = ~torch.isfinite(mb.logp) | ~((ratio - 1).abs() < 3)  # play and update use the same weights, so only rounding may differ
            if odd.any() or not torch.isfinite(loss):
                raise UserError(self.stopped(f"row {mb.row[odd.nonzero()[0]].item() if odd.any() else '?'}: log-prob or loss is not what it can be"))
            loss.backward()
            sums = [a + b.sum().item() for a, b in zip(sums, (mb.entropy, mb.kl, ratio))] + [max(sums[3], ratio.max().item())]
        return sums

    def stopped(self, why):
        return (f"stopped in iteration {self.iteration}: {why}; the checkpoint of {self.folder} is that of an earlier iteration and good; "
                "lower --lr, or look at the games in transcripts.jsonl")

    def warn(self, text):
        if text not in self.warned and self.rank == 0:
            self.warned.add(text)
            tqdm.write(f"aa_minimal: {text}", file=sys.stderr)

    def step(self):
        """One iteration; returns its line for metrics.jsonl."""
        args, start = self.args, time.perf_counter()
        if args.buffer and not self.opponent and self.iteration % SNAPSHOT_EVERY == 0:
            if self.rank == 0:
                self.llm.save_adapter(self.folder / "snapshots" / f"{self.iteration:06d}")
            gather(None)  # nobody reads it before it is there
            self.past = [*self.past, self.iteration][-args.buffer:]
        self.slots = {}
        matches, learners = self.draw()
        self.play(matches)
        played = time.perf_counter()
        line = {"iteration": self.iteration, **self.learn(learners), "seconds_play": played - start,
                "seconds_update": time.perf_counter() - played}
        line.update(summarize([(m, s) for m, s, _ in learners if self.opponent or m.agents[0] is m.agents[1]]))
        if self.opponent:  # points and welfare are those of self-play, which there is none of
            line["points_against"], line["points_opponent"] = line["points"], line["points_other"]
            line["points"] = line["welfare"] = None
        if line["zero_credit"] == 1:
            self.warn("all games of every group ended alike: nothing to learn from (zero_credit in metrics.jsonl counts such games)")
        if line["entropy"] < 1e-4:
            self.warn("the entropy is near zero: the agent explores no more; a larger --entropy keeps it open")
        if self.rank == 0:
            self.log(line, [matches[0], matches[-1]])
        self.iteration += 1
        if self.rank == 0 and (self.iteration % args.save_every == 0 or self.iteration == args.iterations):
            self.save()
        return line

    def log(self, line, shown):
        """Append the metrics of an iteration and, every so often, whole games."""
        append(self.folder / "transcripts.jsonl", [{
            "iteration": self.iteration, "players": ["trained" if x is self.live else "opponent" for x in m.agents],
            "points": [this.points for this in m.played],
            "turns": [{"seat": seat, "text": text, "reply": reply} for seat, text, reply in m.log]} for m in shown]
            if self.iteration % TRANSCRIPTS_EVERY == 0 or self.iteration + 1 == self.args.iterations else [])
        append(self.folder / "metrics.jsonl", [line])

    def table(self):
        """Play the untrained and the trained agent against themselves and the scripted players: {who: {opponent: numbers}}."""
        args, out = self.args, {}
        for who, agent in (("untrained", self.untrained), ("trained", self.live)):
            for name in ["itself", *players(args.game)]:
                sides = meet(args.game, agent, agent if name == "itself" else Scripted(name), max(1, min(64, args.games) // 2),
                             args.rounds, [args.seed, 10 ** 9], args.max_message_tokens)
                out.setdefault(who, {})[name] = summarize(sides)
        return out

def gather(value):
    """What every process of the run passes here: a list, of one where there is one process."""
    out = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(out, value)
    return out

def append(path, lines):
    """Append `lines` to the file `path`, one JSON object each."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

def prepare(args):
    """A new run, in --out, which must not hold one, or in the first free default folder."""
    names = (f"runs/{args.game}-{args.algo}-s{args.seed}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 10 ** 6))))
    folder = gather(args.out or next(name for name in names if not os.path.exists(name)))[0]
    if args.out and os.path.exists(args.out) and (not os.path.isdir(args.out) or os.listdir(args.out)):
        raise UserError(f"--out {args.out} already exists and is not empty; choose another folder, or --resume {args.out}")
    gather(None)  # all have looked before one creates it
    run = Run(args, folder)
    if run.rank == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        config = {**vars(args), "versions": {n: metadata.version(n) for n in ("torch", "transformers", "peft", "tokenizers", "numpy")}}
        write(run.folder / "config.json", json.dumps(config, indent=1).encode())
        for name in ("metrics.jsonl", "transcripts.jsonl"):
            (run.folder / name).touch()
    return run

def resume(argv, folder):
    """The run in `folder`, to go on with. UserError where a flag of `argv` contradicts it, or one of its files is damaged."""
    read_tensors(os.path.join(folder, "checkpoint.safetensors"))
    saved = read(folder)
    args = parse(argv, saved)
    odd = [key for key in saved if getattr(args, key) != saved[key] and key not in ("out", "resume")]
    if args.iterations < saved["iterations"] or set(odd) - {"iterations"}:
        raise UserError(f"--resume {folder}: --{odd[0].replace('_', '-')} {getattr(args, odd[0])} contradicts the run's {saved[odd[0]]}; "
                        "only --iterations may change, and only grow")
    run = Run(args, folder)
    run.resume()
    return run

def train(run):
    """Train to the last iteration, with a progress bar, and print and save the final table. Returns the exit code."""
    args, stop = run.args, []
    for name in (signal.SIGINT, signal.SIGTERM):  # the iteration under way is finished first; a second signal ends it at once
        signal.signal(name, lambda number, _: (stop.append(number), signal.signal(number, signal.SIG_DFL)))
    say = "honesty" if args.game == "trust_split" else "cooperation"
    if run.rank == 0:
        print(f"{args.game}, {args.algo}, model {args.model}, seed {args.seed}: {args.iterations} iterations of {args.games} games -> {run.folder}")
    for _ in (bar := tqdm(range(run.iteration, args.iterations), initial=run.iteration, total=args.iterations, mininterval=0.5, disable=run.rank > 0)):
        line = run.step()
        numbers = {"points": line.get("points_against", line["points"]), say: line[say], "entropy": line["entropy"]}
        bar.set_postfix({name: "-" if value is None else f"{value:.2f}" for name, value in numbers.items()}, refresh=False)
        if any(gather(bool(stop))):
            bar.close()
            if run.rank == 0:
                run.save()
                print(f"\naa_minimal: stopped after iteration {run.iteration - 1}; python aa_minimal.py --resume {run.folder} goes on", file=sys.stderr)
            return 130
    if run.rank > 0:
        return 0
    results = run.table()
    write(run.folder / "summary.json", json.dumps(results, indent=1).encode())
    table(f"Points per round, and {say} (0 to 1), of the agent before and after training",
          ["playing with", "before: agent", "other", say, "after: agent", "other", say],
          [[name, *(results[who][name][key] for who in results for key in ("points", "points_other", say))] for name in results["trained"]])
    print(f"\nEverything is in {run.folder}; whole games are in its transcripts.jsonl")
    return 0

def main(argv=None):
    try:
        args = parse(argv)
        if "RANK" in os.environ:  # set by torchrun
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return train(resume(argv, args.resume) if args.resume else prepare(args))
    except (UserError, OSError) as error:
        print(f"aa_minimal: {error}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
