"""Train a language-model agent in a social dilemma by self-play: play, credit, update, log, save.

    python aa_minimal.py --game trust_split                      the built-in model, minutes on a laptop
    python aa_minimal.py --game ipd --algo naive                 plain policy gradient: watch it learn to defect
    python aa_minimal.py --game ipd --model DIR_OR_HUB_ID        QLoRA on any instruct model

The method is arXiv 2511.19405: Advantage Alignment with a group-relative baseline (equations in loss.py). One optimizer step
follows every batch of games. All randomness follows from (seed, iteration); a game does not depend on the rest of its batch."""
import json, os, pathlib, shutil, sys, time
from importlib import metadata

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from games import GAMES, Match, Parser, Scripted, UserError, meet, number, play, players, summarize, table
from loss import advantages, credits, policy_loss, returns_to_go, score
from rollout import Policy, find_agent, load

SNAPSHOT_EVERY, TRANSCRIPTS_EVERY = 10, 10

def parse(argv):
    """The settings of a run as a namespace, defaults filled in by game and model. Raises UserError on what cannot be."""
    parser = Parser(description=__doc__.split("\n")[0], epilog="Defaults not stated depend on game and model; see config.json.")
    add, count, weight = parser.add_argument, number(int, 1), number(float, 0)
    add("--game", default="trust_split", choices=list(GAMES), help="which game (default: %(default)s)")
    add("--algo", default="aa", choices=["aa", "naive", "sum"], help="credit: Advantage Alignment (default), own, joint return")
    add("--model", default="auto", help="tiny (built in), tiny-blind (never saw reciprocity), a folder, or a hub id (default: "
        "Qwen/Qwen2.5-1.5B-Instruct with CUDA, else tiny)")
    add("--quant", default="auto", choices=["auto", "nf4", "none"], help="a real model in 4 bits or not (default: nf4 if CUDA)")
    add("--iterations", type=count, help="optimizer steps, one per batch of games")
    add("--games", type=count, help="games per iteration, B")
    add("--group-size", type=count, help="games that share deals and opponent, and so a baseline, G")
    add("--rounds", type=count, help="rounds per game, T (the most, with --continue-prob)")
    add("--continue-prob", type=number(float, 0, 1), default=1., help="probability of one more round (default: 1)")
    add("--lr", type=number(float, 1e-12), help="learning rate of Adam")
    add("--beta", type=weight, help="weight beta of the alignment term in aa")
    add("--gamma", type=number(float, 0, 1), help="discount gamma per round")
    add("--entropy", type=weight, help="weight of the entropy bonus (nats per sampled token)")
    add("--kl", type=weight, help="weight of the KL to the model without adapter (nats per sampled token); 0: no KL")
    add("--baseline", default="group", choices=["group", "batch"], help="whose mean return is the baseline (default: group)")
    add("--buffer", type=number(int, 0), default=30, help="past snapshots that half the groups meet; 0: none (default: 30)")
    add("--opponent", help="a fixed agent in the other seat of every game: scripted player, base, api:MODEL or a run's folder")
    add("--max-message-tokens", type=number(int, 0), help="longest message (tokens); 0: no talk")
    add("--lora-rank", type=count, help="rank r of the LoRA adapter; alpha is 2 r")
    add("--micro-batch-tokens", type=count, help="tokens per forward and backward pass; fewer need less memory")
    add("--seed", type=number(int, 0), default=0, help="fixes deals, sampling and the initial adapter (default: 0)")
    add("--out", help="folder of the run (default: runs/GAME-ALGO-sSEED, numbered where that exists)")
    add("--save-every", type=count, help="iterations between checkpoints")
    args = parser.parse_args(argv)
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
        self.args, self.folder, self.iteration = args, pathlib.Path(folder), 0
        self.llm = load(args.model, args.quant, args.game, args.lora_rank, args.seed)
        self.live, self.untrained = Policy(self.llm), Policy(self.llm, None)
        self.opponent = find_agent(args.opponent, args.game, self.llm) if args.opponent else None
        self.weights = {n: p for n, p in sorted(self.llm.model.named_parameters()) if ".default." in n}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=args.lr)
        self.budget = args.micro_batch_tokens or self.llm.token_budget()
        self.slots, self.past = {}, []  # adapters loaded for opponents; snapshot numbers to draw from
        self.folder.mkdir(parents=True, exist_ok=True)
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "tokenizers", "numpy")}
        (self.folder / "config.json").write_text(json.dumps({**vars(args), "versions": versions}, indent=1))
    def draw(self):
        """The matches of this iteration and who learns: ([Match], [(match, seat, group)])."""
        args, matches, learners, groups = self.args, [], [], self.args.games // self.args.group_size
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
            self.slots[number] = Policy(self.llm, f"past{len(self.slots)}")
            self.llm.load_adapter(self.folder / "snapshots" / f"{number:06d}", self.slots[number].adapter)
        return self.slots[number]
    def credit(self, learners):
        """c [rows, T] of the learning seats, from points to credit (equations in loss.py)."""
        points = [torch.tensor([(r.points[s], r.points[1 - s]) for r in m.played]) for m, s, _ in learners]
        rewards = pad_sequence(points, batch_first=True) / GAMES[self.args.game].scale  # [rows, T, own and other]
        mask = pad_sequence([torch.ones(len(row)) for row in points], batch_first=True)
        group = torch.tensor([2 * g * (self.args.baseline == "group") + seat for _, seat, g in learners])
        A_own, A_other = (advantages(returns_to_go(r, self.args.gamma), group, mask) for r in rewards.unbind(-1))
        return credits(self.args.algo, A_own, A_other, self.args.gamma, self.args.beta)
    def learn(self, learners):
        """One optimizer step on the games of this iteration; returns what to log of it."""
        args, logged = self.args, []
        episodes = [m.agents[seat].episodes[m.number, seat] for m, seat, _ in learners]
        c = self.credit(learners).to(self.llm.device)
        N = sum(len(e.at) for e in episodes)
        self.optimizer.zero_grad()
        for mb in score(self.llm, episodes, self.budget, reference=args.kl > 0):
            loss, ratio = policy_loss(mb.logp, mb.logp_play, c[mb.row, mb.round], mb.entropy, mb.kl, N, args.entropy, args.kl)
            loss.backward()
            logged.append(torch.stack([mb.entropy, mb.kl, ratio]).detach())
        entropy, kl, ratio = torch.cat(logged, 1).double().cpu()
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.).item()
        if not np.isfinite([norm, ratio.sum()]).all():
            raise UserError(f"iteration {self.iteration}: not finite; {self.folder} has the last good adapter; lower --lr")
        self.optimizer.step()
        return {"entropy": entropy.mean().item(), "kl": kl.mean().item() if args.kl else None, "grad_norm": norm,
                "ratio_mean": ratio.mean().item(), "ratio_max": ratio.max().item(),
                "tokens": sum(len(e.ids) for e in episodes), "sampled_tokens": N}
    def step(self):
        """One iteration; returns its line for metrics.jsonl."""
        args, start = self.args, time.perf_counter()
        if args.buffer and not self.opponent and self.iteration % SNAPSHOT_EVERY == 0:
            self.llm.save_adapter(self.folder / "snapshots" / f"{self.iteration:06d}")
            self.past = [*self.past, self.iteration][-args.buffer:]
        self.slots = {}
        matches, learners = self.draw()
        play(args.game, matches, [args.seed, self.iteration], args.max_message_tokens)
        played = time.perf_counter()
        line = {"iteration": self.iteration, **self.learn(learners), "seconds_play": played - start,
                "seconds_update": time.perf_counter() - played}
        line.update(summarize([(m, s) for m, s, _ in learners if self.opponent or m.agents[0] is m.agents[1]]))
        if self.opponent:  # points and welfare are those of self-play, which there is none of
            line["points_against"], line["points_opponent"] = line["points"], line["points_other"]
            line["points"] = line["welfare"] = None
        if self.iteration % TRANSCRIPTS_EVERY == 0 or self.iteration + 1 == args.iterations:
            for m in (matches[0], matches[-1]):
                append(self.folder / "transcripts.jsonl", {
                    "iteration": self.iteration, "players": ["trained" if x is self.live else "opponent" for x in m.agents],
                    "points": [this.points for this in m.played],
                    "turns": [{"seat": seat, "text": text, "reply": reply} for seat, text, reply in m.log]})
        append(self.folder / "metrics.jsonl", line)
        self.iteration += 1
        if self.iteration % args.save_every == 0 or self.iteration == args.iterations:
            self.llm.save_adapter(self.folder / "adapter")
            for old in sorted(self.folder.glob("snapshots/*"))[:-len(self.past) or None]:
                shutil.rmtree(old)
        return line
    def table(self):
        """Play the untrained and the trained agent against themselves and the scripted players: {who: {opponent: numbers}}."""
        args, out = self.args, {"untrained": {}, "trained": {}}
        for agent, results in zip((self.untrained, self.live), out.values()):
            for name, other in {"itself": agent, **{name: Scripted(name) for name in players(args.game)}}.items():
                results[name] = summarize(meet(args.game, agent, other, max(1, min(64, args.games) // 2), args.rounds,
                                               [args.seed, 10 ** 9], args.max_message_tokens))
        return out

def append(path, line):
    """Append `line` (a dict) as JSON to the file `path`."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")

def new_folder(args):
    """The folder of a new run: --out, which must not hold one, or the first free default name."""
    if args.out and os.path.exists(args.out) and (not os.path.isdir(args.out) or os.listdir(args.out)):
        raise UserError(f"--out {args.out} already exists and is not empty; choose another folder")
    name = f"runs/{args.game}-{args.algo}-s{args.seed}"
    return args.out or next(name + end for end in ("", *(f"-{n}" for n in range(2, 10 ** 6))) if not os.path.exists(name + end))

def train(args):
    """Train as `args` say, with a progress bar, and print and save the final table."""
    run, say = Run(args, new_folder(args)), "honesty" if args.game == "trust_split" else "cooperation"
    print(f"{args.game}, {args.algo}, model {args.model}, seed {args.seed} -> {run.folder}")
    for _ in (bar := tqdm(range(args.iterations), mininterval=0.5)):
        line = run.step()
        numbers = {"points": line.get("points_against", line["points"]), say: line[say], "entropy": line["entropy"]}
        bar.set_postfix({name: "-" if value is None else f"{value:.2f}" for name, value in numbers.items()}, refresh=False)
    results = run.table()
    (run.folder / "summary.json").write_text(json.dumps(results, indent=1))
    columns = [(who, key) for who in results for key in ("points", "points_other", say)]
    table(f"Points per round, and {say} (0 to 1), of the agent before and after training",
          ["playing with", "before: agent", "other", say, "after: agent", "other", say],
          [[name, *(results[who][name][key] for who, key in columns)] for name in results["trained"]])
    print(f"\nEverything is in {run.folder}; whole games are in its transcripts.jsonl")

def main(argv=None):
    try:
        train(parse(argv))
    except (UserError, OSError) as error:
        print(f"aa_minimal: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\naa_minimal: stopped; the folder of the run holds the adapter saved last", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
