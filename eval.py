"""Who cooperates, who exploits whom, and how to see it.

    python eval.py --agents runs/a runs/b base cooperate defect tit_for_tat --games 64 --plot crossplay.png
    python eval.py --plot curves.png runs/a runs/b       learning curves; runs that differ only in seed become mean and band
    python eval.py --show runs/a --iteration 0           whole games, to read
All pairs of agents play the same deals in both seats, so differences between agents are not differences of luck."""
import importlib.util, json, os, pathlib, sys, textwrap
from collections import defaultdict
from importlib import metadata

import numpy as np
from tqdm import tqdm

from games import GAMES, Parser, UserError, meet, number, players, printable, summarize, table
from rollout import find_agent, load

STATES = ["p_c_first", "p_c_cc", "p_c_cd", "p_c_dc", "p_c_dd"]  # the order of these profiles:
NAMED = {"always cooperate": (1, 1, 1, 1, 1), "always defect": (0, 0, 0, 0, 0), "tit for tat": (1, 1, 0, 1, 0),
         "grim trigger": (1, 1, 0, 0, 0), "win-stay lose-shift": (1, 1, 0, 0, 1), "coin toss": (.5, .5, .5, .5, .5)}
KEPT = {game: [name + after for after in ("", "_after_fair", "_after_greedy") for name in names] for game, names in {
    "trust_split": ("honesty", "keep_upper", "keep_lower"), "split": ("keep_high", "keep_low")}.items()}

def read(run, name, *needed):
    """A run's .json or .jsonl file as a list of dicts, one per line. UserError where it, or a key `needed`, is missing."""
    try:
        text = pathlib.Path(run, name).read_text(encoding="utf-8")
        lines = map(json.loads, text.splitlines() if name.endswith("l") else [text])
        return [{**line, **{key: line[key] for key in needed}} for line in lines]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{os.path.join(run, name)} is missing or damaged ({error}); name the folder of a run") from None

def find_agents(args):
    """{label: agent} for --agents, all adapters on one loaded model; fills in what `args` leaves open from the first run named.
    Raises UserError for agents that do not fit together."""
    names = [os.path.normpath(name).removesuffix(os.sep + "adapter") for name in args.agents]  # a run by its adapter is the run
    runs = {name: read(name, "config.json", "game", "model")[0] for name in names if os.path.isfile(f"{name}/config.json")}
    first = {"game": "trust_split", "model": "tiny", "quant": "none", **next(iter(runs.values()), {})}
    args.game, args.model, args.quant = (getattr(args, key) or first[key] for key in ("game", "model", "quant"))
    first = {**GAMES[args.game].real, **(GAMES[args.game].tiny if args.model.startswith("tiny") else {}), **first}
    args.rounds, args.max_message_tokens = args.rounds or first["rounds"], first["max_message_tokens"]
    args.games = args.games or (1 if "human" in names else 64)
    for name, run in runs.items():
        if (run["game"], run["model"]) != (args.game, args.model):
            raise UserError(f"{name} is of {run['game']} {run['model']}, not of {args.game} {args.model}; evaluate it apart")
    built_in = [*players(args.game), "human"]
    labels = [name if name.startswith("api:") else os.path.basename(name) for name in names]
    if len({*labels, *built_in}) < len(labels) + len({*built_in} - {*names}):
        raise UserError("two agents have the same name; give each agent once, and runs folders of different names")
    if names == ["human"]:
        raise UserError("human needs somebody to play with; name another agent")
    learned = [name for name in names if name not in built_in and not name.startswith("api:")]
    llm = load(args.model, args.quant, args.game) if learned else None
    return {label: find_agent(name, args.game, llm) for label, name in zip(labels, names)}

def points(sides):
    """Points per round of an agent and of the other in each deal [deals, 2], from [(Match, seat)] as `meet` returns them."""
    games = [np.mean([(this.points[seat], this.points[1 - seat]) for this in m.played], 0) for m, seat in sides]
    return np.reshape(games, (-1, 2, 2)).mean(1)  # over both seats of a deal

def standard_error(values):
    """The standard error of the mean of one number per deal; None for a single deal."""
    return np.std(values, ddof=1) / len(values) ** .5 if len(values) > 1 else None

def nearest(profile):
    """The named memory-one strategy with the smallest largest difference to `profile`, five probabilities or None."""
    far = {name: max(abs(p - q) for p, q in zip(profile, named) if p is not None) for name, named in NAMED.items()}
    return f"{min(far, key=far.get)}, within {min(far.values()):.2f}"

def evaluate(args):
    """Cross-play, robustness and fingerprints of --agents: printed, saved as JSON and, with --plot, drawn."""
    agents = find_agents(args)
    everyone = {**{name: find_agent(name, args.game, None) for name in players(args.game)}, **agents}
    pairs = {tuple(sorted((a, b))) for a in agents for b in everyone if "human" not in (a, b) or a != b and b in agents}
    sides = {}  # {(a, b): [(Match, seat of a)]}, every pair played once
    for a, b in tqdm(sorted(pairs), desc="playing", leave=False, disable="human" in agents or None):
        seen = meet(args.game, everyone[a], everyone[b], args.games, args.rounds, [args.seed], args.max_message_tokens)
        sides[b, a], sides[a, b] = [(m, 1 - seat) for m, seat in seen], seen
    measures = {"matrix": lambda seen: points(seen)[:, 0].mean(), "welfare": lambda seen: summarize(seen)["welfare"],
                "standard_errors": lambda seen: standard_error(points(seen)[:, 0])}
    grids = {key: [[measure(sides[a, b]) if (a, b) in sides else None for b in agents] for a in agents]
             for key, measure in measures.items()}  # [agents, agents], None for a person against itself
    robust, prints = {}, {}
    for name in (name for name in agents if name != "human"):
        taken = {other: points(sides[name, other])[:, 1] for other in everyone if other not in ("random", "human")}
        best = max(taken, key=lambda other: taken[other].mean())
        gain = taken[best] - taken["cooperate"]
        robust[name] = {"welfare": summarize(sides[name, name])["welfare"], "fair player gets": taken["cooperate"].mean(),
                        "best adversary": best[-16:], "gets": taken[best].mean(), "exploitability": gain.mean(),
                        "+-": standard_error(gain)}
        seen = summarize(sides[name, "random"])  # a random player leads everyone into every situation
        prints[name] = {key: seen.get(key) for key in KEPT.get(args.game, STATES)}
    label = {name: f"{n} {name[-16:]}" for n, name in enumerate(agents, 1)}
    header = ["", *(text.split()[0] for text in label.values())]
    table(f"{args.game}: points per round of the row agent against the column agent, welfare (the share of the\n"
          f"best joint score that the two reach), +- standard error of the points over {args.games} deals", header,
          [[head, *cells] for name, *three in zip(label.values(), *grids.values())
           for head, cells in zip((name, "  welfare", "  +-"), three)])
    table("Welfare with itself, and what an adversary takes beyond what a fair player gets in the same deals",
          ["", *next(iter(robust.values()))], [[label[name], *row.values()] for name, row in robust.items()])
    table("Fingerprints, measured against a random player (honesty: 0 to 1, kept: of ten)", header,
          [[key, *(prints.get(name, {}).get(key) for name in agents)] for key in KEPT.get(args.game, STATES)])
    for name in prints if args.game not in KEPT else ():
        prints[name]["nearest to"] = nearest(list(prints[name].values()))
        print(f"{label[name]} is nearest to {prints[name]['nearest to']}")
    invalid = {name: len(getattr(agent, "invalid", ())) for name, agent in agents.items()}
    for name in filter(invalid.get, invalid):
        print(f"\n{label[name]}: {invalid[name]} turns without a legal reply, answered at random")
    out = {"game": args.game, "agents": list(agents), "games": args.games, "rounds": args.rounds, "seed": args.seed,
           "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}, **grids,
           "robustness": robust, "fingerprints": prints, "invalid": invalid}
    pathlib.Path(args.out).write_text(json.dumps(out, indent=1), encoding="utf-8")
    print(f"\nThe numbers are in {args.out}")
    if args.plot:
        plot_matrix(args.plot, args.game, list(agents), np.array(grids["matrix"], dtype=float))

def plot_matrix(path, game, names, matrix):
    """The cross-play matrix [agents, agents] as a heat map with its numbers in the cells, a dash for nan."""
    from matplotlib.figure import Figure
    fig = Figure((2 + .7 * len(names), 1.5 + .5 * len(names)), layout="constrained")
    ax, middle = fig.subplots(), (np.nanmin(matrix) + np.nanmax(matrix)) / 2
    ax.imshow(matrix, cmap="Greys_r", aspect="auto")
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right")
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel="against", title=f"{game}: points per round of the row agent")
    for (i, j), value in np.ndenumerate(matrix):
        ax.text(j, i, f"{value:.3g}".replace("nan", "-"), ha="center", va="center", color="w" if value <= middle else "k")
    fig.savefig(path, dpi=110)

def plot_curves(args):
    """Points, the game's indicator and entropy over iterations; runs that differ only in seed as mean and range."""
    from matplotlib.figure import Figure
    groups, fig = defaultdict(dict), Figure((11, 3.4), layout="constrained")  # {settings as JSON: {run: metrics}}
    for run in args.runs:
        settings = {**read(run, "config.json", "game")[0], "seed": 0, "out": None, "versions": None}
        groups[json.dumps(settings)][run] = read(run, "metrics.jsonl", "points", "cooperation", "entropy")
    indicator = "honesty" if settings["game"] == "trust_split" else "cooperation"
    titles = {"points": "points per round", indicator: indicator, "entropy": "entropy, nats per token"}
    for ax, (column, title) in zip(fig.subplots(1, 3), titles.items()):
        for n, members in enumerate(groups.values()):
            lines = zip(*([line.get(f"{column}_against", line.get(column)) for line in member] for member in members.values()))
            values = np.array(list(lines), dtype=float).reshape(-1, len(members))  # [iterations, seeds], nan for None
            label = os.path.basename(os.path.normpath(min(members))) + f" ({len(members)} seeds)" * (len(members) > 1)
            ax.plot(values.mean(1), ("-", "--", ":", "-.")[n % 4], color=f"C{n}", label=label)
            ax.fill_between(range(len(values)), values.min(1), values.max(1), color=f"C{n}", alpha=.2, linewidth=0)
        ax.set(xlabel="iteration", title=title)
    fig.axes[0].legend(fontsize=8)
    fig.savefig(args.plot, dpi=110)

def show(args):
    """Print whole games of a run as a dialogue, in colour on a terminal; control characters are shown, not executed."""
    games = read(args.show, "transcripts.jsonl", "iteration", "players", "points", "turns")
    there = sorted({game["iteration"] for game in games})
    iteration = there[-1] if args.iteration is None and there else args.iteration
    if iteration not in there:
        raise UserError(f"{args.show} has no games of iteration {iteration}, but of {', '.join(map(str, there)) or 'none'}")
    for game in (game for game in games if game["iteration"] == iteration):
        print("\n=== iteration {}: player 1 is {}, player 2 is {} ===".format(iteration, *game["players"]))
        per_round = len(game["turns"]) // len(game["points"])
        for n, turn in enumerate(game["turns"], 1):
            texts = [*printable(turn["text"]).split("\n"), f"player {turn['seat'] + 1}: {printable(turn['reply'])}"]
            *heard, said = (textwrap.indent(textwrap.fill(text, 60), " " * 40 * turn["seat"]) for text in texts)
            print(*heard, f"\033[3{3 + 3 * turn['seat']}m{said}\033[0m" if sys.stdout.isatty() else said, sep="\n")
            if n % per_round == 0:
                print("--- points: {:.1f} and {:.1f}".format(*game["points"][n // per_round - 1]))

def parse(argv):
    """The command line as a namespace. Raises UserError."""
    parser = Parser(description=__doc__.split("\n")[0], epilog="An agent is a run's or an adapter's folder, base (the model "
                    "without adapter), human, api:MODEL, or scripted: cooperate, defect, tit_for_tat, grim, random, liar.")
    add = parser.add_argument
    add("runs", nargs="*", help="runs to draw the learning curves of, with --plot")
    add("--agents", nargs="+", default=[], help="who plays whom")
    add("--game", choices=list(GAMES), help="which game (default: that of the first run, else trust_split)")
    add("--games", type=number(int, 1), help="deals per pair, each played in both seats (default: 64, or 1 with human)")
    add("--rounds", type=number(int, 1), help="rounds per game (default: that of the first run, else 10)")
    add("--model", help="what base and bare adapters stand on (default: that of the first run, else tiny)")
    add("--quant", choices=["nf4", "none"], help="its weights, 4 bits or not (default: that of the first run, else none)")
    add("--seed", type=number(int, 0), default=0, help="fixes deals and sampling (default: 0)")
    add("--out", default="crossplay.json", help="file for the numbers (default: crossplay.json)")
    add("--plot", metavar="FILE.png", help="picture of the cross-play, or of the learning curves of RUNS")
    add("--show", metavar="RUN", help="print whole games of a run")
    add("--iteration", type=number(int, 0), help="with --show: which iteration (default: the last written down)")
    args = parser.parse_args(argv)
    idle = args.runs and not args.plot or args.games and not args.agents or args.iteration is not None and not args.show
    if idle or bool(args.agents) + bool(args.show) + bool(args.runs) != 1:
        raise UserError("do one of --agents A B ... [--games N], --show RUN [--iteration N], --plot FILE RUN ... (see --help)")
    if args.plot and not (importlib.util.find_spec("matplotlib") and args.plot.endswith((".png", ".pdf", ".svg"))):
        raise UserError("--plot needs matplotlib (pip install matplotlib) and a name in .png, .pdf or .svg")
    return args

def main(argv=None):
    try:
        args = parse(argv)
        (evaluate if args.agents else show if args.show else plot_curves)(args)
    except (UserError, OSError) as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2
    except (EOFError, KeyboardInterrupt):
        print("\neval: left before the end; nothing was saved", file=sys.stderr)
    return 0

if __name__ == "__main__":
    sys.exit(main())
