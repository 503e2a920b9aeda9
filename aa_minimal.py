"""Train a language-model agent in a social dilemma by self-play: play, credit, update, log, save.

    python aa_minimal.py --game trust_split                      the built-in model, minutes on a laptop
    python aa_minimal.py --game ipd --algo naive                 plain policy gradient: watch it learn to defect
    python aa_minimal.py --game ipd --model DIR_OR_HUB_ID        QLoRA on any instruct model
    python aa_minimal.py --resume runs/ipd-aa-s0                 go on where a run stopped
    torchrun --nproc-per-node 2 aa_minimal.py --game ipd         the groups of games shared out among processes"""
import argparse, atexit, functools, hashlib, importlib.metadata, json, os, pathlib, shutil, signal, sys, time
import numpy as np
import torch
from tqdm import tqdm
from games import GAMES, Match, Parser, Scripted, UserError, meet, number, play, players, summarize, table
from loss import advantages, credits, policy_loss, returns_to_go, score
from rollout import Policy, find_agent, is_built_in, load, read, read_tensors, write, write_tensors

SNAPSHOT_EVERY, TRANSCRIPTS_EVERY, LOGS = 10, 10, ("metrics.jsonl", "transcripts.jsonl")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # which process of how many, by torchrun
warn = functools.cache(lambda text: tqdm.write(f"aa_minimal: {text}", file=sys.stderr))  # says everything once

def parse(argv, saved={}):
    """The settings of a run as a namespace; defaults are those `saved`, or fit game and model. UserError for bad ones."""
    parser = Parser(description=__doc__.split("\n")[0], epilog="Defaults not stated depend on game and model; see config.json.")
    add, count, weight = parser.add_argument, number(int, 1), number(float, 0)
    add("--game", default="trust_split", choices=list(GAMES), help="which game (default: %(default)s)")
    add("--algo", default="aa", choices=["aa", "naive", "sum"], help="credit: Advantage Alignment (default), own, joint return")
    add("--model", default="auto", help="tiny, tiny-blind, folder, hub id (default: tiny; if CUDA Qwen/Qwen2.5-1.5B-Instruct)")
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
    add("--resume", metavar="RUN", help="go on with the run in this folder; --iterations may grow, nothing else may change")
    args = parser.parse_args(argv, argparse.Namespace(**saved))
    if args.resume and not saved:
        return args  # the settings are those of the run
    if args.model == "auto":
        args.model = "Qwen/Qwen2.5-1.5B-Instruct" if torch.cuda.is_available() else "tiny"
    built_in = is_built_in(args.model)
    if args.quant == "auto":
        args.quant = "nf4" if torch.cuda.is_available() and not built_in else "none"
    for key, value in {**GAMES[args.game].real, **(GAMES[args.game].tiny if built_in else {})}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if built_in and args.quant == "nf4":
        raise UserError("--quant nf4 is for real models, the built-in one would gain nothing; use --quant none")
    if args.games % (args.group_size * WORLD):
        raise UserError(f"--games {args.games} is not divisible by {args.group_size * WORLD}, group size x processes; fix one")
    if WORLD > 1 and args.baseline == "batch":
        raise UserError("--baseline batch needs all games in one process; use --baseline group, or start without torchrun")
    if args.baseline == "group" and args.group_size == 1:
        raise UserError("--group-size 1 leaves no other game for the group baseline; use 2 or more, or --baseline batch")
    return args

class Run:
    """One training run: model, optimizer, opponents, and the folder all goes to. Seed and iteration fix all that is random."""
    def __init__(self, args, folder, iteration=0, past=()):  # past: numbers of the snapshots to draw opponents from
        self.args, self.folder, self.iteration, self.past = args, pathlib.Path(folder), iteration, past
        if WORLD > 1 and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        self.llm = load(args.model, args.quant, args.game, args.lora_rank, args.seed)
        if WORLD > 1:  # after load: in a process group, transformers would save the built-in model in the first process only
            torch.distributed.init_process_group()
            atexit.register(torch.distributed.destroy_process_group)
        self.live = Policy(self.llm)
        self.opponent = find_agent(args.opponent, args.game, self.llm) if args.opponent else None
        self.weights = {n: p for n, p in sorted(self.llm.decoder.named_parameters()) if ".default." in n}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=args.lr)
        self.budget = args.micro_batch_tokens or self.llm.token_budget()
    def save(self):
        """Write the adapter and what --resume goes on from: weights, Adam's state, settings, lengths of the logs."""
        if RANK > 0:
            return
        state = {f"{name} {key}": value.cpu() for name, p in self.weights.items()
                 for key, value in {"weight": p.detach(), **self.optimizer.state[p]}.items()}
        logs = {log: (len(raw), hashlib.sha256(raw).hexdigest()) for log in LOGS for raw in [(self.folder / log).read_bytes()]}
        write(self.folder / "config.json", json.dumps(vars(self.args), indent=1).encode())
        info = json.dumps([vars(self.args), self.iteration, self.past, logs])
        write_tensors(self.folder / "checkpoint.safetensors", state, info)
        self.llm.save_adapter(self.folder / "adapter")
        for old in self.folder.glob("snapshots/*"):
            if int(old.name) not in self.past:
                shutil.rmtree(old)
    def draw(self):
        """This process's matches of this iteration and who learns: ([Match], [(match, seat)]). A group has one deal."""
        args, matches, groups, loaded = self.args, [], self.args.games // self.args.group_size, {}
        for g in range(RANK, groups, WORLD):
            rng = np.random.default_rng([args.seed, self.iteration, 2, g])
            rounds = args.rounds if args.continue_prob == 1 else min(args.rounds, int(rng.geometric(1 - args.continue_prob)))
            other, seat = self.opponent or self.live, (g + self.iteration) % 2
            if self.past and g >= (groups + 1) // 2:
                taken = self.past[rng.integers(len(self.past))]
                other = loaded[taken] = loaded.get(taken) or self.snapshot(taken, len(loaded))
            agents = (self.live, other)[::1 if seat == 0 else -1]
            matches += [Match(g * args.group_size + n, g, rounds, agents) for n in range(args.group_size)]
        return matches, [(m, s) for m in matches for s in (0, 1) if m.agents[s] is self.live]
    def snapshot(self, taken, slot):
        """The policy of the snapshot taken at iteration `taken`, loaded as the adapter past`slot`. UserError if damaged."""
        return self.llm.load_adapter(self.folder / "snapshots" / f"{taken:06d}", f"past{slot}")
    def credit(self, learners):
        """c [rows, T] of the learning seats, from points to credit (equations in loss.py)."""
        args, scale = self.args, GAMES[self.args.game].scale
        rounds = [torch.tensor([(r.points[s], r.points[1 - s], 1.) for r in m.played]) for m, s in learners]  # 1.: was played
        *points, mask = torch.nn.utils.rnn.pad_sequence(rounds, batch_first=True).unbind(-1)  # own, other's, mask: [rows, T]
        group = torch.tensor([2 * m.deal * (args.baseline == "group") + seat for m, seat in learners])
        A_own, A_other = (advantages(returns_to_go(r / scale, args.gamma), group, mask) for r in points)
        return credits(args.algo, A_own, A_other, args.gamma, args.beta)
    def learn(self, learners):
        """One optimizer step on the games of this iteration; returns what to log of it."""
        args, stats = self.args, []
        episodes = [m.agents[seat].episodes[m.number, seat] for m, seat in learners]
        c = self.credit(learners).to(self.llm.device)
        N, tokens = (sum(gather(sum(len(getattr(e, name)) for e in episodes))) for name in ("at", "ids"))
        while not stats:
            self.optimizer.zero_grad()
            try:
                stats = [self.backward(mb, c, N) for mb in score(self.llm, episodes, self.budget, reference=args.kl > 0)]
            except torch.OutOfMemoryError:
                self.budget //= 2
                if self.budget < 64:
                    raise UserError("out of memory with the smallest micro-batch; lower --rounds or --games") from None
                warn(f"out of memory, going on with --micro-batch-tokens {self.budget}")
        for p in self.weights.values() if WORLD > 1 else ():
            torch.distributed.all_reduce(p.grad)  # adds them up: every process has divided by the N of all
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.).item()
        rows, entropy, kl, ratio = torch.cat(gather(torch.cat(stats, 1)), 1).double()
        odd = ~((ratio > .25) & (ratio < 4))  # play and update have the same weights
        if odd.any() or not np.isfinite(norm):
            raise UserError(f"iteration {self.iteration}, rows {rows[odd].unique().int().tolist()}: log-probs or the gradient, "
                            f"norm {norm:.3g}, went wrong; {self.folder} holds the last good checkpoint; lower --lr")
        self.optimizer.step()
        return {"entropy": entropy.mean().item(), "kl": kl.mean().item() if args.kl else None, "grad_norm": norm,
                "ratio_mean": ratio.mean().item(), "ratio_max": ratio.max().item(), "sampled_tokens": N,
                "tokens": tokens, "zero_credit": torch.cat(gather((c == 0).all(1).cpu())).float().mean().item()}
    def backward(self, mb, c, N):
        """Add a micro-batch's gradient; row, entropy, KL and ratio of its sampled tokens [4, n]."""
        loss, ratio = policy_loss(mb.logp, mb.logp_play, c[mb.row, mb.round], mb.entropy, mb.kl, N,
                                  self.args.entropy, self.args.kl)
        loss.backward()
        return torch.stack([mb.row, mb.entropy, mb.kl, ratio]).detach().cpu()
    def step(self):
        """One iteration; returns its line for metrics.jsonl."""
        args, start = self.args, time.perf_counter()
        if args.buffer and not self.opponent and self.iteration % SNAPSHOT_EVERY == 0:
            if RANK == 0:
                self.llm.save_adapter(self.folder / "snapshots" / f"{self.iteration:06d}")
            gather(None)  # nobody reads it before it is there
            self.past = [*self.past, self.iteration][-args.buffer:]
        matches, learners = self.draw()
        play(args.game, matches, [args.seed, self.iteration], args.max_message_tokens)
        for agent in {agent for m in matches for agent in m.agents}:
            agent.cache = None  # of keys and values: the update needs its memory
        played = time.perf_counter()
        sides = [(argparse.Namespace(played=m.played), s) for m, s in learners if self.opponent or m.agents[0] is m.agents[1]]
        line = {"iteration": self.iteration, **self.learn(learners), "seconds_play": played - start,
                "seconds_update": time.perf_counter() - played, **summarize(sum(gather(sides), []))}
        if self.opponent:  # points and welfare are those of self-play, which there is none of
            line["points_against"], line["points_opponent"] = line["points"], line["points_other"]
            line["points"] = line["welfare"] = None
        for text, odd in {"all games of every group ended alike, nothing can be learned from them": line["zero_credit"] == 1,
                          "the entropy is near zero, nothing is explored any more": line["entropy"] < 1e-6,
                          "every message is empty": line.get("silence") == 1 and args.max_message_tokens > 0}.items():
            if odd:
                warn(f"{text}; going on")
        last = self.iteration + 1 == args.iterations
        for m in (matches[0], matches[-1]) if RANK == 0 and (last or self.iteration % TRANSCRIPTS_EVERY == 0) else ():
            append(self.folder / "transcripts.jsonl", {
                "iteration": self.iteration, "players": ["trained" if x is self.live else "opponent" for x in m.agents],
                "points": [this.points for this in m.played],
                "turns": [{"seat": seat, "text": text, "reply": reply} for seat, text, reply in m.log]})
        if RANK == 0:
            append(self.folder / "metrics.jsonl", line)
        self.iteration += 1
        if last or self.iteration % args.save_every == 0:
            self.save()
        return line
    def table(self):
        """Play the untrained and the trained agent against themselves and the scripted players: {who: {opponent: numbers}}."""
        args, others = self.args, {"itself": None, **{name: Scripted(name) for name in players(self.args.game)}}
        rest = max(1, min(128, args.games) // 2), args.rounds, [args.seed, 10 ** 9], args.max_message_tokens
        return {who: {name: summarize(meet(args.game, agent, other or agent, *rest)) for name, other in others.items()}
                for who, agent in {"untrained": Policy(self.llm, None), "trained": self.live}.items()}

def gather(value):
    """[value of the first process, of the second, ...]; [value] without torchrun. Values are pickled: no agents in them."""
    values = [value] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(values, value)
    return values

def append(path, line):
    """Append `line` (a dict) as JSON to the file `path`, on the disk before this returns."""
    with open(path, "a", encoding="utf-8") as file:
        print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
        os.fsync(file.fileno())

def new_run(args):
    """A run in --out, which must not hold one, or in the first free folder of the default name."""
    if args.out and os.path.exists(args.out) and (not os.path.isdir(args.out) or os.listdir(args.out)):
        raise UserError(f"--out {args.out} already exists and is not empty; choose another folder, or --resume {args.out}")
    name = f"runs/{args.game}-{args.algo}-s{args.seed}"
    free = (name + end for end in ("", *(f"-{n}" for n in range(2, 10 ** 6))) if not os.path.exists(name + end))
    args.versions = {lib: importlib.metadata.version(lib) for lib in ("torch", "transformers", "peft", "tokenizers", "numpy")}
    run = Run(args, args.out or next(free))
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in LOGS:
        (run.folder / name).touch()
    run.save()
    return run

def resumed_run(argv, folder):
    """The run in `folder` as `Run.save` left it; later logs are cut off. UserError for a contradicting flag or damaged file."""
    state, info = read_tensors(os.path.join(folder, "checkpoint.safetensors"))
    saved, iteration, past, logs = json.loads(info)
    args = parse(argv, saved)
    args.resume = None
    odd = [key for key in saved if getattr(args, key) != saved[key] and (key != "iterations" or args.iterations < saved[key])]
    if odd:
        raise UserError(f"--{odd[0].replace('_', '-')} contradicts the run in {folder}; only --iterations may grow")
    damaged = [name for name, (size, digest) in logs.items()
               if hashlib.sha256(pathlib.Path(folder, name).read_bytes()[:size]).hexdigest() != digest]
    if damaged or {**read(folder, "config.json")[0], "iterations": 0} != {**saved, "iterations": 0}:
        raise UserError(f"{os.path.join(folder, *damaged[:1] or ['config.json'])} is damaged; restore it, or start a new run")
    run = Run(args, folder, iteration, past)
    for taken in past:  # all into one slot: only to see that they are whole
        run.snapshot(taken, 0)
    for name, (size, _) in logs.items():
        os.truncate(run.folder / name, size)
    for name, p in run.weights.items():
        p.data.copy_(state[f"{name} weight"])
        run.optimizer.state[p] = {key: state[f"{name} {key}"].to("cpu" if key == "step" else p.device)
                                  for key in ("step", "exp_avg", "exp_avg_sq") if iteration}  # none before Adam's first step
    return run

def train(run):
    """Train to the last iteration, print and save the final table. KeyboardInterrupt where a signal ends it, all saved."""
    args, say, stop = run.args, "honesty" if run.args.game == "trust_split" else "cooperation", []
    def halt(*_):  # finish the iteration under way; a second Ctrl-C ends it at once
        stop.append(signal.signal(signal.SIGINT, signal.SIG_DFL))
    signal.signal(signal.SIGINT, halt)
    signal.signal(signal.SIGTERM, halt)
    if RANK == 0:
        print(f"{args.game}, {args.algo}, model {args.model}, seed {args.seed} -> {run.folder}")
    bar = tqdm(range(run.iteration, args.iterations), initial=run.iteration, total=args.iterations, disable=RANK > 0)
    for _ in bar:
        line = run.step()
        numbers = {"points": line.get("points_against", line["points"]), say: line[say], "entropy": line["entropy"]}
        bar.set_postfix({name: "-" if value is None else f"{value:.2f}" for name, value in numbers.items()}, refresh=False)
        if any(gather(len(stop))):  # a signal to one of them
            bar.close()
            run.save()
            raise KeyboardInterrupt(f"python aa_minimal.py --resume {run.folder} goes on after iteration {line['iteration']}")
    if RANK > 0:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    results = run.table()
    write(run.folder / "summary.json", json.dumps(results, indent=1).encode())
    columns = [(who, key) for who in results for key in ("points", "points_other", say)]
    table(f"Points per round, and {say} (0 to 1), of the agent before and after training",
          ["playing with", "before: agent", "other", say, "after: agent", "other", say],
          [[name, *(results[who][name][key] for who, key in columns)] for name in results["trained"]])
    print(f"\nEverything is in {run.folder}; whole games are in its transcripts.jsonl")

def main(argv=None):
    try:
        args = parse(argv)
        train(resumed_run(argv, args.resume) if args.resume else new_run(args))
    except (UserError, OSError) as error:
        print(f"aa_minimal: {error}" + "; put that right, then --resume the run" * isinstance(error, OSError), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\naa_minimal: stopped; {error or 'nothing was saved in this iteration'}", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
