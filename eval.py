"""Who cooperates, who exploits whom, and how to see it.

    python eval.py --agents runs/a runs/b base cooperate defect tit_for_tat --games 64 --plot crossplay.png
    python eval.py --plot curves.png runs/a runs/b       learning curves; runs that differ only in seed become mean and band
    python eval.py --show runs/a --iteration 0           whole games, to read"""
import importlib.metadata, importlib.util, json, os, pathlib, sys, textwrap
import numpy as np
from tqdm import tqdm
from games import GAMES, Parser, UserError, meet, number, players, printable, summarize, table
from rollout import find_agent, is_built_in, load, read

STATES = ["p_c_first", "p_c_cc", "p_c_cd", "p_c_dc", "p_c_dd"]  # the order of these profiles:
NAMED = {"always cooperate": (1, 1, 1, 1, 1), "always defect": (0, 0, 0, 0, 0), "tit for tat": (1, 1, 0, 1, 0),
         "grim trigger": (1, 1, 0, 0, 0), "win-stay lose-shift": (1, 1, 0, 0, 1), "coin toss": (.5, .5, .5, .5, .5)}

def find_agents(args):
    """{label: agent} for --agents; fills in what `args` leaves open, from the first run. UserError where they do not fit."""
    names = [os.path.normpath(name).removesuffix(os.sep + "adapter") for name in args.agents]  # a run by its adapter is the run
    kinds = {"game": str, "model": str, "rounds": int, "max_message_tokens": int}
    runs = {name: read(name, "config.json", *kinds)[0] for name in names if os.path.isfile(f"{name}/config.json")}
    first = {"game": "trust_split", "model": "tiny", "quant": "none", **next(iter(runs.values()), {})}
    args.game, args.model, args.quant = (getattr(args, key) or first[key] for key in ("game", "model", "quant"))
    for name, run in runs.items():
        if not all(isinstance(run[key], kind) for key, kind in kinds.items()) or run["game"] not in GAMES:
            raise UserError(f"{name}/config.json is damaged, or of a game that there is not; name the folder of another run")
        if (run["game"], run["model"]) != (args.game, args.model):
            raise UserError(f"{name} is of {run['game']} {run['model']}, not of {args.game} {args.model}; evaluate it apart")
    first = {**GAMES[args.game].real, **(GAMES[args.game].tiny if is_built_in(args.model) else {}), **first}
    args.rounds, args.max_message_tokens = args.rounds or first["rounds"], first["max_message_tokens"]
    args.games = args.games or (1 if "human" in names else 64)
    ready = {*players(args.game), "human", *(name for name in names if name.startswith("api:"))}  # need no model of ours
    labels = [name if name in ready else os.path.basename(name) for name in names]
    if len({*labels}) < len(labels) or {*labels} & ready - {*names}:
        raise UserError("two agents have the same name; give each agent once, and runs folders of different names")
    if names == ["human"]:
        raise UserError("human needs somebody to play with; name another agent")
    llm = load(args.model, args.quant, args.game) if {*names} - ready else None
    return {label: find_agent(name, args.game, llm) for label, name in zip(labels, names)}

def standard_error(values):
    """The standard error of the mean of one number per deal; None for a single deal."""
    return np.std(values, ddof=1) / len(values) ** .5 if len(values) > 1 else None

def nearest(profile):
    """The named memory-one strategy with the smallest largest difference to `profile`, five probabilities or None."""
    far = {name: max(abs(p - q) for p, q in zip(profile, named) if p is not None) for name, named in NAMED.items()}
    return f"{min(far, key=far.get)}, within {min(far.values()):.2f}"

def evaluate(args):
    """Cross-play, robustness and fingerprints of --agents on the same deals: printed, saved as JSON and, with --plot, drawn."""
    agents = find_agents(args)
    everyone = {name: find_agent(name, args.game, None) for name in players(args.game)} | agents
    pairs = {tuple(sorted((a, b))) for a in agents for b in everyone if "human" not in (a, b) or a != b and b in agents}
    seen, deals = {}, {}  # {(a, b): means of what a did against b}, {(a, b): points per round of a in each deal [deals]}
    for a, b in tqdm(sorted(pairs), desc="playing", leave=False, disable="human" in agents or None):
        sides = meet(args.game, everyone[a], everyone[b], args.games, args.rounds, [args.seed], args.max_message_tokens)
        for pair, side in ((b, a), [(m, 1 - seat) for m, seat in sides]), ((a, b), sides):
            deals[pair] = np.array([summarize(both)["points"] for both in zip(side[::2], side[1::2])])  # both seats of a deal
            seen[pair] = {**summarize(side), "error": standard_error(deals[pair])}
    columns = {"matrix": "points", "welfare": "welfare", "standard_errors": "error"}  # of a person against itself: None
    grids = {name: [[seen.get((a, b), {}).get(key) for b in agents] for a in agents] for name, key in columns.items()}
    robust, prints = {}, {}  # prints: against a random player, who leads everyone into every situation
    for name in (name for name in agents if name != "human"):
        best = max((foe for foe in everyone if foe not in ("random", "human")), key=lambda foe: deals[foe, name].mean())
        fair, most = deals["cooperate", name], deals[best, name]
        robust[name] = {"welfare": seen[name, name]["welfare"], "fair player gets": fair.mean(), "best adversary": best[-16:],
                        "gets": most.mean(), "exploitability": (most - fair).mean(), "+-": standard_error(most - fair)}
        prints[name] = {key: value for key, value in seen[name, "random"].items() if key.startswith(("p_c", "honesty", "keep"))}
    label = {name: f"{n} {name[-16:]}" for n, name in enumerate(agents, 1)}
    header = ["", *(text.split()[0] for text in label.values())]
    table(f"{args.game}: points per round of the row agent against the column agent, welfare (the share of the\n"
          f"best joint score that the two reach), +- standard error of the points over {args.games} deals", header,
          [[head, *cells] for name, *three in zip(label.values(), *grids.values())
           for head, cells in zip((name, "  welfare", "  +-"), three)])
    table("Welfare with itself, and what an adversary takes beyond what a fair player gets in the same deals",
          ["", *robust[name]], [[label[name], *row.values()] for name, row in robust.items()])
    table("Fingerprints, measured against a random player (honesty: 0 to 1, kept: of ten)", header,
          [[key, *(prints.get(name, {}).get(key) for name in agents)] for key in sorted(set().union(*prints.values()))])
    for name in prints if "p_c_first" in prints[name] else ():
        prints[name]["nearest to"] = nearest([prints[name].get(state) for state in STATES])
        print(f"{label[name]} is nearest to {prints[name]['nearest to']}")
    invalid = {name: len(getattr(agent, "invalid", ())) for name, agent in agents.items()}
    for name in filter(invalid.get, invalid):
        print(f"\n{label[name]}: {invalid[name]} turns without a legal reply, answered at random")
    out = {**vars(args), "agents": list(agents), **grids, "robustness": robust, "fingerprints": prints, "invalid": invalid,
           "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}}
    pathlib.Path(args.out).write_text(json.dumps(out, indent=1), encoding="utf-8")
    print(f"\nThe numbers are in {args.out}")
    if args.plot:
        plot_matrix(args.plot, args.game, list(agents), np.array(grids["matrix"], dtype=float))

def plot_matrix(path, game, names, matrix):
    """The cross-play matrix [agents, agents] as a heat map with its numbers in the cells, a dash for nan."""
    from matplotlib.figure import Figure
    ax = Figure((2 + .7 * len(names), 1.5 + .5 * len(names)), layout="constrained").subplots()
    ax.imshow(matrix, cmap="Greys_r", alpha=.5, aspect="auto")
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right")
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel="against", ylabel="points per round of", title=game)
    for (i, j), value in np.ndenumerate(matrix):
        ax.text(j, i, f"{value:.3g}".replace("nan", "-"), ha="center", va="center")
    ax.figure.savefig(path, dpi=110)

def plot_curves(args):
    """Points, the game's indicator and entropy over iterations; runs that differ only in seed as mean and range."""
    from matplotlib.figure import Figure
    fig, groups = Figure((11, 3.4), layout="constrained"), {}  # {settings as JSON: {run: metrics}}
    for run in args.runs:
        config = {**read(run, "config.json", "game")[0], "seed": 0, "out": None, "versions": None}
        metrics = read(run, "metrics.jsonl", "points", "cooperation", "entropy")
        if not all(isinstance(value, float | int | None) for line in metrics for value in line.values()):
            raise UserError(f"{run}/metrics.jsonl is damaged: not all that it holds are numbers; name the folder of a run")
        groups.setdefault(json.dumps(config), {})[run] = metrics
    own = "honesty" if config["game"] == "trust_split" else "cooperation"
    for ax, key, title in zip(fig.subplots(1, 3), ("points", own, "entropy"), ("points per round", own, "entropy, nats/token")):
        for n, members in enumerate(groups.values()):
            curves = [[line.get(f"{key}_against", line.get(key)) for line in metrics] for metrics in members.values()]
            values = np.array([*zip(*curves)], dtype=float).reshape(-1, len(members))  # [iterations, seeds], nan for None
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
    iteration = max(there, default=None) if args.iteration is None else args.iteration
    if iteration not in there:
        raise UserError(f"{args.show} has no games of iteration {iteration}, but of {', '.join(map(str, there)) or 'none'}")
    for game in (game for game in games if game["iteration"] == iteration):
        print("\n=== iteration {}: player 1 is {}, player 2 is {} ===".format(iteration, *game["players"]))
        for points, turns in zip(game["points"], np.array_split(game["turns"], len(game["points"]))):
            for turn in turns:
                texts = [*printable(turn["text"]).split("\n"), f"player {turn['seat'] + 1}: {printable(turn['reply'])}"]
                *heard, said = (textwrap.indent(textwrap.fill(text, 60), " " * 40 * turn["seat"]) for text in texts)
                print(*heard, f"\033[3{3 + 3 * turn['seat']}m{said}\033[0m" if sys.stdout.isatty() else said, sep="\n")
            print("--- points: {:.1f} and {:.1f}".format(*points))

def parse(argv):
    """The command line as a namespace. Raises UserError."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="*", help="runs to draw the learning curves of, with --plot")
    add("--agents", nargs="+", default=[], help=f"runs, adapters, base, human, api:MODEL, {', '.join(players('trust_split'))}")
    add("--game", choices=list(GAMES), help="which game (default: that of the first run, else trust_split)")
    add("--games", type=number(int, 1), help="deals per pair, each played in both seats (default: 64, or 1 with human)")
    add("--rounds", type=number(int, 1), help="rounds per game (default: that of the first run, else 10)")
    add("--model", help="base itself, and what bare adapters stand on (default: that of the first run, else tiny)")
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
