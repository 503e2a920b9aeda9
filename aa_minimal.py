"""Train a language-model agent in a social dilemma by self-play: play, credit, update, log, save.

    python aa_minimal.py --game ipd --model tiny              the built-in model, minutes on a CPU
    python aa_minimal.py --game ipd --model DIR_OR_HUB_ID     QLoRA on an instruct model

`train` is the algorithm, its equations are in loss.py: no critic, one step per batch of games."""

import dataclasses
import functools
import json
import pathlib
import shutil
import sys
import time

import filelock
import numpy as np
import torch
from tqdm import tqdm
from transformers import HfArgumentParser

from eval import crossplay, failed, find_agent, load, print_crossplay, printable, read_json, report
from games import GAMES, Match, Side, play, summarize
from loss import CREDITS, advantages, policy_loss, returns_to_go
from rollout import Policy, score
from tiny import BUILT_IN, LESSONS, UserError, imitate, user_error

DEFAULT_MODEL = "Qwen/Qwen2.5-1.5B-Instruct" if torch.cuda.is_available() else "tiny"
TINY = dict(games=128, games_at_once=128, iterations=60, group_size=16, lr=1e-3, beta=2.0)
TINY_TRUST = TINY | dict(games=96, iterations=54, lr=7e-4, beta=3.0, entropy=3e-3, snapshot_every=5)
TINY_TRUST |= dict(lr_half=50, max_message_tokens=3)
TINY_SPLIT = TINY_TRUST | dict(iterations=42, lr=6e-4, lr_half=0, beta=5.0, entropy=0.0, kl=0.01)
PRESETS = {  # defaults in place of those of Settings: (of real models, of the built-in one)
    "matrix": ({}, TINY | dict(buffer=30, entropy=0.01)),  # and other games; binds naive and sum
    "trust_split": (dict(gamma=0.96, beta=2.0, entropy=0.0, kl=0.001), TINY_TRUST),
    "split": (dict(beta=1.0, entropy=0.0, kl=0.001), TINY_SPLIT),
}
IMITATING = dict(iterations=26, rounds=5, group_size=32, buffer=0, lr=1e-4, beta=6.0, entropy=0.02)
MAY_CHANGE = ("iterations", "model", "micro_batch_tokens", "games_at_once")  # when a run goes on
MAY_BE_0 = ("lr_half", "buffer", "max_message_tokens", "imitate", "seed", "prior_seed")


def flag(default, help, **more):
    """A field of Settings and, by HfArgumentParser, a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass
class Settings:
    """What a run depends on. The tables above hold other defaults: see `parse`."""

    game: str = flag("trust_split", "which game", choices=list(GAMES))
    algo: str = flag("aa_causal", "credit, see loss.py", choices=list(CREDITS))
    model: str = flag(DEFAULT_MODEL, "tiny, tiny-blind, a folder, or a hub id")
    quant: str = flag("auto", "weights of a real model", choices=["auto", "none", "nf4"])
    iterations: int = flag(200, "optimizer steps, one per batch of games")
    games: int = flag(32, "games per iteration")
    group_size: int = flag(8, "games that share a deal, an opponent and so a baseline")
    rounds: int = flag(10, "rounds per game; the most, with --continue_prob")
    continue_prob: float = flag(1.0, "probability of one more round, drawn per group")
    max_message_tokens: int = flag(40, "longest message; 0: no talk")
    imitate: int = flag(0, "steps of imitation first (of the last lesson, see tiny.LESSONS)")
    lr: float = flag(2e-5, "learning rate of Adam")
    lr_half: int = flag(0, "iterations in which it falls to its half, smoothly; 0: never")
    gamma: float = flag(0.9, "discount per round")
    beta: float = flag(0.5, "weight of the alignment term")
    entropy: float = flag(0.01, "weight of the entropy bonus")
    kl: float = flag(0.0, "weight of the KL to the model without adapter")
    baseline: str = flag("group", "games that share a baseline", choices=["group", "batch"])
    snapshot_every: int = flag(10, "iterations between the past selves that are kept")
    buffer: int = flag(30, "newest past selves that half of the groups meet; 0: none")
    opponent: list[str] = flag(None, "agents in the other seat (or self), drawn per group")
    lora_rank: int = flag(32, "rank of the adapter; its alpha is twice that")
    micro_batch_tokens: int = flag(4096, "tokens per pass of the update; fewer need less memory")
    games_at_once: int = flag(16, "games played at a time; fewer need less memory")
    seed: int = flag(0, "fixes deals, sampling and the first adapter")
    prior_seed: int = flag(0, "which built-in model of that name")
    out: str = flag("", "folder (default: runs/GAME-ALGO-sSEED); -2 is added if it is taken")
    resume: str = flag("", "folder of a run to go on with", metavar="RUN")


def parse(argv):
    """Settings: a flag counts, else IMITATING, PRESETS, what `naive` and `sum` have, Settings."""
    usage = "aa_minimal.py [--game GAME] [--algo ALGO] [--model MODEL] [more flags: --help]"
    how = dict(usage=usage, allow_abbrev=False)
    known, _ = HfArgumentParser(Settings, add_help=False, **how).parse_known_args(argv)
    real, built_in = PRESETS.get(known.game, PRESETS["matrix"])
    defaults = built_in if known.model in BUILT_IN else real | (IMITATING if known.imitate else {})
    if known.algo in ("naive", "sum"):  # as published, where no table says otherwise
        defaults = dict(buffer=0, entropy=0.0) | defaults
    if known.resume:
        defaults = read_json(known.resume, "config.json")
        if {*defaults} != {*Settings.__dataclass_fields__} or defaults["game"] not in GAMES:
            raise UserError(f"{known.resume}/config.json does not fit: restore it, or start anew")
    parser = HfArgumentParser(Settings, description=__doc__.split("\n")[0], **how)
    parser.set_defaults(**defaults)
    settings = Settings(**vars(parser.parse_args(argv)))
    for name, value in vars(settings).items():
        low = 1 if isinstance(value, int) and name not in MAY_BE_0 else 0
        high = 1 if name in ("gamma", "continue_prob", "lr") else 2**63 - 1  # of an int64
        if isinstance(value, int | float) and not low <= value <= high:
            parser.error(f"--{name} {value} must be from {low} to {high}")
    if settings.games % settings.group_size:
        parser.error(f"--games {settings.games}: no multiple of --group_size {settings.group_size}")
    if known.resume:
        for name, value in defaults.items():
            new = getattr(settings, name, value)
            may_change = name in MAY_CHANGE and not (name == "iterations" and new < value)
            if new != value and not may_change and name != "resume":
                parser.error(f"--{name} {new} does not go with {known.resume}, which has {value}")
    return settings


class Run:
    """A run under way. Seed and iteration fix what is random. UserError for what is damaged."""

    def __init__(self, settings):
        self.settings, self.iteration = settings, 0
        how = dict(lora_rank=settings.lora_rank, seed=settings.seed, prior_seed=settings.prior_seed)
        self.llm = load(settings.model, settings.quant, settings.game, **how)
        self.weights = [p for p in self.llm.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.weights, lr=settings.lr, betas=(0.9, 0.95))
        names = set(settings.opponent or []) - {"self"}
        self.opponents = {n: find_agent(n, settings.game, self.llm) for n in sorted(names)}
        if settings.resume:
            self.restore()
            return
        if settings.imitate:
            lessons = LESSONS.get(("adapter", settings.game), LESSONS["adapter", "matrix"])
            n, most = settings.imitate, settings.rounds  # games no longer than those to come
            lessons = [x._replace(steps=n * x.steps, rounds=min(x.rounds, most)) for x in lessons]
            parts = self.llm.decoder, self.llm.logits, self.weights, self.llm.framing, settings.game
            imitate(*parts, lessons, games=1024, lr=6e-4, batch=8, seed=settings.seed)
        out = pathlib.Path(settings.out or f"runs/{settings.game}-{settings.algo}-s{settings.seed}")
        self.folder, n = out, 1
        while self.folder.exists():
            n += 1
            self.folder = pathlib.Path(f"{out}-{n}")
        self.folder.mkdir(parents=True)  # an error if another run was faster
        self.hold()
        write_whole(self.folder / "metrics.jsonl")
        self.save()

    def hold(self):  # the folder, as long as this process lives
        with user_error(f"{self.folder} is in use", "wait for that run, or start another one"):
            self.lock = filelock.FileLock(self.folder / "lock").acquire(timeout=0)

    def save(self):
        """Write a checkpoint beside the others, then rename it: what bears the name is whole."""
        write_whole(self.folder / "config.json", {**vars(self.settings), "resume": ""})
        unfinished, older = self.folder / "unfinished", list(self.folder.glob("checkpoint-*"))
        shutil.rmtree(unfinished, ignore_errors=True)
        with user_error(f"cannot write {unfinished}", "make room, then --resume"):
            which = dict(selected_adapters=["default"], save_embedding_layers=False)
            self.llm.model.save_pretrained(unfinished, **which)
            (unfinished / "base.txt").write_text(self.llm.fingerprint)
            torch.save(self.optimizer.state_dict(), unfinished / "optimizer.pt")
        unfinished.rename(self.folder / f"checkpoint-{self.iteration:06d}")
        for folder in older:
            (folder / "optimizer.pt").unlink(missing_ok=True)
            if int(folder.name[-6:]) not in self.past_selves():
                shutil.rmtree(folder)

    def restore(self):
        """Go on from the newest checkpoint; what the logs hold of later iterations is cut off."""
        self.folder = pathlib.Path(self.settings.resume)
        self.hold()
        newest = max(self.folder.glob("checkpoint-*"), default=None)
        if newest is None:
            raise UserError(f"{self.folder} holds no checkpoint: start a new run")
        self.llm.load_adapter(newest, "default")
        log = self.folder / "metrics.jsonl"
        with user_error(f"{newest} or {log} is damaged", "restore it, or start a new run"):
            self.iteration = int(newest.name[-6:])
            self.optimizer.load_state_dict(torch.load(newest / "optimizer.pt", weights_only=True))
            read = read_json(self.folder, log.name)
            lines = [line for line in read if line["iteration"] < self.iteration]
            if len(lines) != self.iteration:
                raise ValueError("lines are missing")
        write_whole(log, *lines)

    def past_selves(self):
        """Iterations whose checkpoints are kept to play against: the newest `buffer`."""
        taken = list(range(0, self.iteration + 1, self.settings.snapshot_every))
        return taken[-self.settings.buffer :] if self.settings.buffer else []


def write_whole(path, *lines):
    """Replace the file `path` by dicts, one a line: at once, or not at all."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.with_name("unfinished.json").write_text(text, encoding="utf-8")
    path.with_name("unfinished.json").replace(path)


def draw_matches(run, live):
    """The matches of this iteration. A group's games share deal, opponent and seats.
    `live` plays itself; in half of the groups a past self; or what --opponent names."""
    settings, matches, loaded = run.settings, [], {}
    groups = settings.games // settings.group_size
    if groups == 1 and run.past_selves() and not settings.opponent:
        warn("one group of games is all self-play: past selves are not met")
    for g in range(groups):
        rng = np.random.default_rng([settings.seed, run.iteration, 2, g])
        rounds, opponent = settings.rounds, live
        if settings.continue_prob < 1:
            rounds = min(rounds, int(rng.geometric(1 - settings.continue_prob)))
        if settings.opponent:
            name = settings.opponent[rng.integers(len(settings.opponent))]
            opponent = run.opponents.get(name, live)  # live: self
        elif run.past_selves() and g >= (groups + 1) // 2:
            taken = int(rng.choice(run.past_selves()))
            if taken not in loaded:
                loaded[taken] = Policy(run.llm, f"past{len(loaded)}")
                run.llm.load_adapter(run.folder / f"checkpoint-{taken:06d}", loaded[taken].adapter)
            opponent = loaded[taken]
        players = (live, opponent) if (g + run.iteration) % 2 == 0 else (opponent, live)
        for n in range(settings.group_size):
            matches.append(Match(g * settings.group_size + n, g, rounds, players))  # deal g
    return matches


def tabulate(sides, scale, baseline):
    """Own and the other's rewards, 1 where a round was played, each [B, T] of B sides; group [B].
    Sides of one group share a baseline: those of the same seat and, for "group", the same deal."""
    T = max(len(match.history) for match, _ in sides)
    own, other, played = torch.zeros(3, len(sides), T)
    group = torch.zeros(len(sides), dtype=torch.long)
    for b, (match, seat) in enumerate(sides):
        group[b] = seat if baseline == "batch" else 2 * match.deal + seat
        for t, round in enumerate(match.history):
            own[b, t], other[b, t] = round.points[seat] / scale, round.points[1 - seat] / scale
            played[b, t] = 1
    return own, other, played, group


def train(run):
    """Play, credit, update, log and save, up to the last iteration."""
    settings, llm, total = run.settings, run.llm, run.settings.iterations
    for iteration in (bar := tqdm(range(run.iteration, total), initial=run.iteration, total=total)):
        # Play. `live` is the agent that learns; it has one seat of every match, or both.
        start, live = time.perf_counter(), Policy(llm)
        matches = draw_matches(run, live)
        limits = settings.max_message_tokens, settings.games_at_once
        play(settings.game, matches, [settings.seed, iteration], *limits)
        sides = [Side(matches[number], seat) for number, seat in live.episodes]  # B of them
        played_at = time.perf_counter()

        # Credit: from points to what the tokens of every round are multiplied with, all [B, T].
        own, other, played, group = tabulate(sides, GAMES[settings.game].scale, settings.baseline)
        A_own = advantages(returns_to_go(own, settings.gamma), group, played)
        A_other = advantages(returns_to_go(other, settings.gamma), group, played)
        credit = CREDITS[settings.algo](A_own, A_other, settings.gamma, settings.beta)
        credit = credit.to(llm.device)

        # Update: one step of Adam for the whole batch; the gradients of micro-batches add up.
        episodes = list(live.episodes.values())
        N = sum(len(episode.samples) for episode in episodes)
        run.optimizer.zero_grad()
        stats = []
        for batch in score(llm, episodes, settings.micro_batch_tokens, reference=settings.kl > 0):
            c, H, KL = credit[batch.episode, batch.round], batch.entropy, batch.kl
            coefs = dict(entropy_coef=settings.entropy, kl_coef=settings.kl)
            loss, ratio = policy_loss(batch.logp, batch.logp_play, c, H, KL, total=N, **coefs)
            loss.backward()
            stats.append(torch.stack([H, KL, ratio]).detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(run.weights, 1.0).item()
        entropy, kl, ratio = torch.cat(stats, dim=1).double()  # [N] each
        check_update(ratio, grad_norm)
        if settings.lr_half:
            run.optimizer.param_groups[0]["lr"] = settings.lr / 2 ** (iteration / settings.lr_half)
        run.optimizer.step()
        run.iteration += 1
        # Log and save.
        line = {"iteration": iteration, "entropy": entropy.mean().item(), "kl": kl.mean().item()}
        line |= {"grad_norm": grad_norm, "ratio_max": ratio.max().item(), "sampled_tokens": N}
        line["zero_credit"] = (credit.abs() < 1e-5).all(dim=1).double().mean().item()  # rounding
        line |= dict(seconds_play=played_at - start, seconds_update=time.perf_counter() - played_at)
        self_play = [side for side in sides if len({*side.match.players}) == 1]
        failures = failed(run.opponents)
        line |= summarize(sides if settings.opponent else self_play) | failures
        with open(run.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if iteration % 10 == 0 or run.iteration == total:
            write_transcript(run, iteration, matches, live)
        run.save()
        if line["zero_credit"] == 1 or line["entropy"] < 1e-6 or grad_norm < 1e-7:
            warn("nothing to learn from: groups of one game, or all ended alike, or no exploration")
        bar.set_postfix(failures, points=line["points"], entropy=line["entropy"], refresh=False)


def check_update(ratio, grad_norm):
    """UserError where an update went wrong. ratio [N]: probabilities in it over those in play."""
    apart = ratio.log().abs().mean().item()
    if not (np.isfinite(grad_norm) and apart < 0.3):
        problem = f"gradient norm {grad_norm:.3g}, log-probs off by {apart:.3g} on average"
        raise UserError(f"the update went wrong ({problem}); start anew with a lower --lr")
    if ratio.log().abs().max() > np.log(4):  # up to 1.8 is usual in 16 or 4 bits
        warn("a token's probability in the update was over 4 times off")


@functools.cache
def warn(text):  # once
    tqdm.write(f"warning: {text}", file=sys.stderr)


def write_transcript(run, iteration, matches, live):
    """Write the first and the last match of this iteration, as text to read."""
    lines = []
    for match in (matches[0], matches[-1]):
        who = ["trained" if player is live else "opponent" for player in match.players]
        for seat, text, reply in match.log:
            lines.append(f"to player {seat + 1} ({who[seat]}): {printable(text)}")
            lines.append(f"PLAYER {seat + 1}: {printable(reply)}\n")
        points = ["{:.1f} {:.1f}".format(*round.points) for round in match.history]
        lines.append(f"points by round: {', '.join(points)}\n\n")
    (run.folder / f"transcript-{iteration:06d}.txt").write_text("\n".join(lines), encoding="utf-8")


def main(argv=None):
    run = Run(parse(argv))
    settings = run.settings
    print(f"{settings.game}, {settings.algo}, {settings.model}, seed {settings.seed}: {run.folder}")
    agents = {"untrained": Policy(run.llm, None), "trained": Policy(run.llm)}
    deals, seed = max(1, min(128, settings.games) // 2), [settings.seed, 10**9]
    limits = settings.max_message_tokens, settings.games_at_once
    try:
        train(run)
        results = crossplay(settings.game, agents, deals, settings.rounds, seed, *limits)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"python aa_minimal.py --resume {run.folder} goes on") from None
    write_whole(run.folder / "config.json", {**vars(settings), "resume": ""})  # a new --model
    write_whole(run.folder / "summary.json", results | {"failed": failed(run.opponents)})
    print_crossplay(settings.game, results, run.opponents)
    print(f"\nEverything is in {run.folder}; transcript-*.txt there are whole games")


if __name__ == "__main__":
    sys.exit(report("aa_minimal", main))
