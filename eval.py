"""Who cooperates, who exploits whom, and how to see it.

    python eval.py --game trust_split --agents runs/a runs/b base cooperate defect --games 64 --plot crossplay.png
    python eval.py --plot curves.png runs/a runs/b         learning curves; runs that differ only in seed become one band
    python eval.py --show runs/a --iteration 0             whole games, to read
    python eval.py --game ipd --agents human runs/a --games 1 --rounds 5

An agent is a run's folder, an adapter's folder, base (the model untrained), a scripted player (cooperate, defect, tit_for_tat,
grim, random, liar), human, or api:MODEL. All pairs play the same deals, in both seats; the +- are standard errors over deals.
"""
import json
import os
import pathlib
import sys
from collections import defaultdict
from importlib import metadata

import numpy as np
from tqdm import tqdm

from games import GAMES, Match, Parser, UserError, play, players, summarize

STRATEGIES = {"always cooperate": (1, 1, 1, 1, 1), "always defect": (0, 0, 0, 0, 0), "tit for tat": (1, 1, 0, 1, 0),
              "grim trigger": (1, 1, 0, 0, 0), "win-stay lose-shift": (1, 1, 0, 0, 1), "random": (.5, .5, .5, .5, .5)}
STATES = ("first", "cc", "cd", "dc", "dd")


class Arena:
    """Plays pairs of agents on the same deals and remembers the results."""

    def __init__(self, game, names, agents, games, rounds, seed, max_tokens):
        self.game, self.names, self.agents, self.games, self.rounds = game, names, agents, games, rounds
        self.seed, self.max_tokens, self.met = seed, max_tokens, {}

    def meet(self, a, b):
        """(points [games, 2] of `a` and `b` per round and deal, both seats averaged; the (Match, seat of `a`) behind them)."""
        if (b, a) in self.met:
            points, sides = self.met[b, a]
            return points[:, ::-1], [(m, 1 - s) for m, s in sides]
        if (a, b) not in self.met:
            pair = self.agents[a], self.agents[b]
            seats = (0,) if a == b else (0, 1)  # an agent meets itself once per deal
            sides = [(Match(2 * n + s, n, self.rounds, pair[::1 - 2 * s]), s) for n in range(self.games) for s in seats]
            play(self.game, [m for m, _ in sides], [self.seed], self.max_tokens)
            points = np.array([[np.mean([this.points[x] for this in m.played]) for x in (s, 1 - s)] for m, s in sides])
            points = points.reshape(self.games, len(seats), 2).mean(1)
            self.met[a, b] = points.mean(1, keepdims=True).repeat(2, 1) if a == b else points, sides
        return self.met[a, b]


def cell(points):
    """Mean and standard error over deals of points [games]."""
    return float(np.mean(points)), float(np.std(points, ddof=1) / len(points) ** .5) if len(points) > 1 else 0.


def crossplay(arena):
    """Every pair of `arena.names`, with a progress bar: the matrices that are printed and saved."""
    names, out = arena.names, {}
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i:]]
    for a, b in tqdm(pairs, desc="cross-play", leave=False):
        arena.meet(a, b)
    cells = [[cell(arena.meet(a, b)[0][:, 0]) for b in names] for a in names]
    out["matrix"], out["standard_errors"] = ([[c[k] for c in row] for row in cells] for k in (0, 1))
    out["welfare"] = [[summarize(arena.meet(a, b)[1])["welfare"] for b in names] for a in names]
    return out


def robustness(arena, judged, adversaries):
    """For each agent of `judged`: welfare with itself, what a fair player and what the best adversary get from it, and the
    difference in the same deals, `exploitability`, with its standard error. `adversaries` {agent: names of those to try}."""
    out = {}
    for name in judged:
        fair = arena.meet(name, "cooperate")[0][:, 1]
        best = max(adversaries[name], key=lambda other: arena.meet(name, other)[0][:, 1].mean())
        taken = arena.meet(name, best)[0][:, 1]
        gain, error = cell(taken - fair)
        out[name] = {"welfare_with_itself": summarize(arena.meet(name, name)[1])["welfare"], "fair_player_gets": float(fair.mean()),
                     "best_adversary": best, "best_adversary_gets": float(taken.mean()), "exploitability": gain, "standard_error": error}
    return out


def fingerprint(arena, name):
    """What `name` does against a random player, which leads it into every situation; matrix games: and the named strategy of
    memory one that is nearest (largest difference of a probability, over the situations seen)."""
    seen = summarize(arena.meet(name, "random")[1])
    profile = [seen.get(f"p_c_{state}") for state in STATES]
    if any(p is not None for p in profile):
        far = {s: max(abs(p - q) for p, q in zip(profile, probs) if p is not None) for s, probs in STRATEGIES.items()}
        seen["nearest"] = f"{min(far, key=far.get)} (within {min(far.values()):.2f})"
    return seen


def report(arena, result):
    """Print the result for a terminal of 100 columns."""
    names, matrix = arena.names, result["matrix"]
    width = max(5, min(9, (84 - 3 * len(names)) // max(1, len(names)) + 3))
    print(f"\n{arena.game}: points per round of the row agent against the column agent; {arena.games} deals, both seats;"
          "\nbelow each row the standard errors. The last column is the row's mean.\n")
    print(" " * 16 + "".join(f"{n:>{width}}" for n in range(1, len(names) + 1)) + f"{'mean':>{width}}")
    for n, name in enumerate(names):
        print(f"{n + 1:>2} {name[-13:]:<13}" + "".join(f"{v:{width}.2f}" for v in [*matrix[n], np.mean(matrix[n])]))
        print(" " * 16 + "".join(f"{'+-' + format(v, '.2f'):>{width}}" for v in result["standard_errors"][n]))
    if result["robustness"]:
        print("\nCan it be exploited? What the best adversary gets more from it than a fair player does, in the same deals\n"
              f"\n{'agent':<16}{'welfare with itself':>20}{'a fair player gets':>20}{'best adversary gets':>21}{'exploitability':>16}")
        for name, row in result["robustness"].items():
            print(f"{name[-15:]:<16}{row['welfare_with_itself']:>20.2f}{row['fair_player_gets']:>20.2f}"
                  f"{row['best_adversary_gets']:>13.2f} {row['best_adversary'][-7:]:<7}{row['exploitability']:>9.2f} +-{row['standard_error']:.2f}")
    columns = {"trust_split": ["honesty", "keep_upper", "keep_lower", "keep_lower_after_fair", "keep_lower_after_greedy"],
               "split": ["keep_high", "keep_low", "keep_low_after_fair", "keep_low_after_greedy"]}.get(
                   arena.game, [f"p_c_{state}" for state in STATES] + ["nearest"])
    print("\nFingerprints, against a random player\n\n" + f"{'agent':<14}" + "".join(f"{c.replace('_after', ' after'):>{len(c) + 2}}" for c in columns))
    for name, seen in result["fingerprints"].items():
        say = {c: "-" if seen.get(c) is None else seen[c] if c == "nearest" else f"{seen[c]:.2f}" for c in columns}
        print(f"{name[-13:]:<14}" + "".join(f"{say[c]:>{len(c) + 2}}" for c in columns))
    for name, count in result["invalid"].items():
        print(f"\n{name}: {count} turns without a legal reply, answered at random instead")


def matplotlib():
    """pyplot, drawn to files. Raises UserError where it is not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot
        return matplotlib.pyplot
    except ImportError:
        raise UserError("--plot needs matplotlib; pip install matplotlib") from None


def plot_crossplay(path, result):
    """The matrix as a heat map with its numbers in the cells."""
    plt, names, matrix = matplotlib(), result["agents"], np.array(result["matrix"])
    fig, ax = plt.subplots(figsize=(1.5 + .75 * len(names), 1.2 + .6 * len(names)), layout="constrained")
    image = ax.imshow(matrix, cmap="Greys_r", aspect="auto")
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right")
    ax.set_yticks(range(len(names)), names)
    middle = (matrix.min() + matrix.max()) / 2
    for (i, j), v in np.ndenumerate(matrix):
        ax.text(j, i, f"{v:.3g}", ha="center", va="center", color="black" if v > middle else "white")
    ax.set(xlabel="against", ylabel="agent", title=f"{result['game']}: points per round of the row agent")
    fig.colorbar(image, ax=ax)
    fig.savefig(path, dpi=110)


def plot_curves(path, runs):
    """Points, the game's indicator and entropy over iterations; runs that differ only in seed as mean and range."""
    plt, groups = matplotlib(), defaultdict(list)
    for run in runs:
        settings = read_config(run)
        key = tuple(str(v) for k, v in sorted(settings.items()) if k not in ("seed", "versions", "out", "resume"))
        groups[key].append((settings, read_lines(run, "metrics.jsonl")))
    game = settings["game"]
    columns = ["points", "honesty" if game == "trust_split" else "cooperation", "entropy"]
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    for n, members in enumerate(groups.values()):
        label = " ".join(f"{members[0][0][k]}" for k in ("game", "algo") if len({m[0][0][k] for m in groups.values()}) > 1 or k == "algo")
        length = min(len(lines) for _, lines in members)
        for ax, column in zip(axes, columns):
            values = [[line.get(column, np.nan) for line in lines[:length]] for _, lines in members]
            values = np.array([[np.nan if v is None else v for v in row] for row in values], float)
            ax.plot(values.mean(0), ("-", "--", ":", "-.")[n % 4], color=f"C{n}", label=f"{label} ({len(members)} seeds)" if len(members) > 1 else label)
            ax.fill_between(range(length), values.min(0), values.max(0), color=f"C{n}", alpha=.2, linewidth=0)
            ax.set(xlabel="iteration", title={"points": "points per round", "entropy": "entropy (nats per token)"}.get(column, column))
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=110)


def read_config(run):
    """config.json of a run. Raises UserError where there is none that can be read."""
    try:
        return json.loads(pathlib.Path(run, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is not a run: config.json is missing or damaged ({error})") from None


def read_lines(run, name):
    """A run's .jsonl file as a list of dicts."""
    path = pathlib.Path(run, name)
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error})") from None


def show(run, iteration):
    """Print whole games of a run as a dialogue, in colour on a terminal; control characters are shown, not executed."""
    games = [game for game in read_lines(run, "transcripts.jsonl") if iteration in (None, game["iteration"])]
    if not games:
        raise UserError(f"{run} has no games of iteration {iteration}; it has some of "
                        f"{sorted({game['iteration'] for game in read_lines(run, 'transcripts.jsonl')})}")
    for game in games[-2:] if iteration is None else games:
        print(f"\n=== iteration {game['iteration']}: player 1 is {game['players'][0]}, player 2 is {game['players'][1]} ===")
        points, per_round = iter(game["points"]), len(game["turns"]) // len(game["points"])
        for n, turn in enumerate(game["turns"]):
            indent, colour = " " * 40 * turn["seat"], ("\033[36m", "\033[33m")[turn["seat"]]
            clean = lambda text: "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
            lines = [f"  {line}" for line in clean(turn["text"]).split("\n")] if n > 3 else []
            for line in [*lines, f"player {turn['seat'] + 1}: {clean(turn['reply'])}"]:
                print(indent + (f"{colour}{line}\033[0m" if sys.stdout.isatty() and line is not lines and line[0] == "p" else line))
            if (n + 1) % per_round == 0:
                print("--- points: {:.1f} and {:.1f}".format(*next(points)))


def build(args):
    """The Arena for the agents that the command line names. Raises UserError for agents that do not fit together."""
    runs = {name: read_config(name) for name in args.agents if os.path.isfile(os.path.join(name, "config.json"))}
    for name, settings in runs.items():
        if settings["game"] != args.game:
            raise UserError(f"{name} was trained on {settings['game']}, not on {args.game}")
    models = {(settings["model"], settings["quant"]) for settings in runs.values()} or {(args.model, args.quant)}
    if len(models) > 1:
        raise UserError(f"these runs stand on different models, {' and '.join(sorted(m for m, _ in models))}; evaluate them apart")
    labels = [name.rstrip("/") if name in players(args.game) else os.path.basename(name.rstrip("/")) for name in args.agents]
    if len(set(labels)) < len(labels):
        raise UserError(f"two agents are called {next(n for n in labels if labels.count(n) > 1)}; name each agent once")
    from rollout import find_agent, load
    scripted = set(players(args.game)) | {"human"}
    llm = None
    if any(name not in scripted and not name.startswith("api:") for name in args.agents):
        llm = load(*models.pop(), args.game)
    agents = {label: find_agent(name, args.game, llm) for label, name in zip(labels, args.agents)}
    agents.update({name: find_agent(name, args.game, None) for name in players(args.game) if name not in agents})
    defaults = {**GAMES[args.game].real, **(GAMES[args.game].tiny if llm and llm.name.startswith("tiny") else {})}
    tokens = next(iter(runs.values()))["max_message_tokens"] if runs else defaults["max_message_tokens"]
    arena = Arena(args.game, labels, agents, args.games, args.rounds or defaults["rounds"], args.seed, tokens)
    arena.learned = {label: [other for other, n in zip(labels, args.agents) if n in runs and runs[n]["opponent"] and
                             os.path.realpath(runs[n]["opponent"]) == os.path.realpath(name)] for label, name in zip(labels, args.agents)}
    return arena


def parse(argv):
    """The command line as a namespace. Raises UserError."""
    parser = Parser(description=__doc__.split("\n")[0], epilog="An agent is a run's folder, an adapter's folder, base, human, "
                    "api:MODEL, or a scripted player: cooperate, defect, tit_for_tat, grim, random, liar.")
    add = parser.add_argument
    add("runs", nargs="*", help="runs to draw learning curves of, with --plot")
    add("--game", choices=list(GAMES), help="which game (default: that of the first run named)")
    add("--agents", nargs="+", default=[], help="who plays whom")
    add("--games", type=int, default=64, help="deals per pair, each played in both seats (default: 64)")
    add("--rounds", type=int, help="rounds per game (default: that of the game)")
    add("--seed", type=int, default=0, help="fixes deals and sampling (default: 0)")
    add("--model", default="tiny", help="what base and bare adapters stand on, where no run says it (default: tiny)")
    add("--quant", default="none", choices=["nf4", "none"], help="its weights, 4 bits or not (default: none)")
    add("--out", default="crossplay.json", help="file for the numbers (default: crossplay.json)")
    add("--plot", metavar="FILE.png", help="picture of the cross-play, or of the learning curves of RUNS")
    add("--show", metavar="RUN", help="print whole games of a run")
    add("--iteration", type=int, help="with --show: which iteration (default: the last written down)")
    args = parser.parse_args(argv)
    if not (args.agents or args.show or args.plot and args.runs):
        raise UserError("nothing to do; name --agents, or --show RUN, or --plot FILE.png RUN RUN ... (see --help)")
    if args.games < 1 or (args.rounds or 1) < 1:
        raise UserError("--games and --rounds must be 1 or more")
    if args.agents and not args.game:
        runs = [name for name in args.agents if os.path.isfile(os.path.join(name, "config.json"))]
        if not runs:
            raise UserError("which game? None of the agents is a run; add --game, one of " + ", ".join(GAMES))
        args.game = read_config(runs[0])["game"]
    return args


def evaluate(args):
    """Cross-play, robustness and fingerprints of the agents, printed, saved and, with --plot, drawn."""
    arena = build(args)
    result = {"game": args.game, "agents": arena.names, "games": args.games, "rounds": arena.rounds, "seed": args.seed,
              "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}, **crossplay(arena)}
    interactive = [n for n in arena.names if n == "human" or n.startswith("api:")]
    trained = [n for n in arena.names if n not in players(args.game) and n not in interactive]
    scripted = [n for n in players(args.game) if n != "random"]
    result["robustness"] = robustness(arena, trained, {n: scripted + arena.learned[n] for n in trained})
    result["fingerprints"] = {n: fingerprint(arena, n) for n in arena.names if n not in interactive}
    result["invalid"] = {n: arena.agents[n].invalid for n in interactive if n != "human"}
    report(arena, result)
    pathlib.Path(args.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"\nThe numbers are in {args.out}")
    if args.plot:
        plot_crossplay(args.plot, result)


def main(argv=None):
    try:
        args = parse(argv)
        if args.show:
            show(args.show, args.iteration)
        elif args.agents:
            evaluate(args)
        else:
            plot_curves(args.plot, args.runs)
    except UserError as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
