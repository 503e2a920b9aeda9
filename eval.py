"""Who cooperates, who exploits whom, and how to see it.

    python eval.py --agents runs/a runs/b base cooperate defect tit_for_tat --games 64 --plot crossplay.png
    python eval.py --plot curves.png runs/a runs/b       learning curves; runs that differ only in seed become mean and band
    python eval.py --show runs/a --iteration 0           whole games, to read

All pairs of agents play the same deals in both seats, so differences between agents are not differences of luck.
"""
import functools, itertools, json, os, pathlib, sys
from collections import defaultdict
from importlib import metadata

import numpy as np
from tqdm import tqdm

from games import GAMES, Human, Parser, UserError, meet, number, players, printable, summarize, table
from rollout import find_agent, load

STATES = ("p_c_first", "p_c_cc", "p_c_cd", "p_c_dc", "p_c_dd")
NAMED = {"always cooperate": (1, 1, 1, 1, 1), "always defect": (0, 0, 0, 0, 0), "tit for tat": (1, 1, 0, 1, 0),
         "grim trigger": (1, 1, 0, 0, 0), "win-stay lose-shift": (1, 1, 0, 0, 1), "coin toss": (.5, .5, .5, .5, .5)}
FINGERPRINT = {"trust_split": [f"{name}{after}" for after in ("", "_after_fair", "_after_greedy")
                               for name in ("honesty", "keep_upper", "keep_lower")],
               "split": [f"{name}{after}" for after in ("", "_after_fair", "_after_greedy") for name in ("keep_high", "keep_low")]}
KEPT = ":\nhonesty 0 to 1, and of ten coins or items how many are kept; then the same after the other was last fair, or greedy"

def read(run, name="config.json"):
    """A run's .json file (a dict), or its .jsonl file (a list of dicts). Raises UserError where there is none that can be read."""
    try:
        lines = pathlib.Path(run, name).read_text(encoding="utf-8").splitlines()
        return [{**json.loads(line)} for line in lines] if name.endswith("l") else {**json.loads("".join(lines))}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{os.path.join(run, name)} is missing or damaged ({error}); name the folder of a run") from None

def find_agents(args):
    """{label: agent} for --agents, all adapters on one loaded model, and {label: labels of the runs trained against it}; fills
    in what `args` leaves open from the first run named. Raises UserError for agents that do not fit together."""
    label = {name: os.path.basename(os.path.normpath(name)) for name in args.agents}
    runs = {name: read(name) for name in label if os.path.isfile(os.path.join(name, "config.json"))}
    first = {"game": "trust_split", "model": "tiny", "quant": "none", "rounds": 10, **next(iter(runs.values()), {})}
    for key in ("game", "model", "quant", "rounds"):
        setattr(args, key, getattr(args, key) or first[key])
    args.games = args.games or (1 if "human" in args.agents else 64)
    args.max_message_tokens = first.get("max_message_tokens", (GAMES[args.game].tiny if args.model.startswith("tiny") else GAMES[args.game].real)["max_message_tokens"])
    for name, settings in runs.items():
        for key in ("game", "model"):
            if settings[key] != getattr(args, key):
                raise UserError(f"{name} was trained on {key} {settings[key]}, not on {getattr(args, key)}; evaluate it apart")
    if len(set(label.values())) < len(args.agents):
        raise UserError("two agents have the same name; give each agent once, and runs folders of different names")
    learns = [name for name in args.agents if name not in players(args.game) and name != "human" and not name.startswith("api:")]
    llm = load(args.model, args.quant, args.game) if learns else None
    learned = {label[name]: [label[other] for other in runs if runs[other]["opponent"] and
                             os.path.realpath(runs[other]["opponent"]) == os.path.realpath(name)] for name in learns}
    return {label[name]: find_agent(name, args.game, llm) for name in args.agents}, learned

def points(sides):
    """Points per round of an agent and of the other in each deal [deals, 2], from its [(Match, seat)]."""
    deals = defaultdict(list)
    for m, seat in sides:
        deals[m.deal].append(np.mean([this.points for this in m.played], 0)[[seat, 1 - seat]])
    return np.array([np.mean(seats, 0) for seats in deals.values()])

def estimate(values):
    """(mean, standard error of the mean) of one number per deal."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** .5) if len(values) > 1 else 0.

def none_for_nan(values):
    """Nested lists for JSON, which has no nan."""
    return np.where(np.isnan(values), None, values).tolist()

def nearest(profile):
    """The named memory-one strategy with the smallest largest difference to `profile`, five probabilities or None."""
    far = {name: max(abs(p - q) for p, q in zip(profile, named) if p is not None) for name, named in NAMED.items()}
    return f"{min(far, key=far.get)}, within {min(far.values()):.2f}"

def evaluate(args):
    """Cross-play, robustness and fingerprints of --agents: printed, saved as JSON and, with --plot, drawn."""
    agents, learned = find_agents(args)
    names, people = list(agents), [name for name in agents if isinstance(agents[name], Human)]
    adversaries = [name for name in players(args.game) if name != "random"]
    everyone = {**{name: find_agent(name, args.game, None) for name in players(args.game)}, **agents}

    @functools.cache
    def sides(a, b):  # [(Match, seat of a)], every pair played once
        if a > b:
            return [(m, 1 - seat) for m, seat in sides(b, a)]
        return meet(args.game, everyone[a], everyone[b], args.games, args.rounds, [args.seed], args.max_message_tokens)

    pairs = [pair for pair in itertools.combinations_with_replacement(names, 2) if set(pair) - set(people)]
    apart = [(name, other) for name in learned for other in adversaries] + [(name, "random") for name in names if name not in people]
    for pair in tqdm(pairs + apart, desc="playing", leave=False, disable=bool(people) or None):
        sides(*pair)
    played = {pair for a, b in pairs for pair in ((a, b), (b, a))}
    cells = np.array([[estimate(points(sides(a, b))[:, 0]) if (a, b) in played else (np.nan, np.nan) for b in names] for a in names])
    welfare = [[summarize(sides(a, b))["welfare"] if (a, b) in played else None for b in names] for a in names]
    out = {"game": args.game, "agents": names, "games": args.games, "rounds": args.rounds, "seed": args.seed,
           "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
           "matrix": none_for_nan(cells[..., 0]), "standard_errors": none_for_nan(cells[..., 1]), "welfare": welfare,
           "robustness": {}, "fingerprints": {}, "invalid": {name: len(getattr(agents[name], "invalid", ())) for name in names}}
    labels, numbers = [f"{n + 1} {name[-16:]}" for n, name in enumerate(names)], [str(n + 1) for n in range(len(names))]
    rows = [line for n, label in enumerate(labels) for line in (
        [label, *(f"{mean:.1f}" for mean in cells[n, :, 0])], ["", *(f"+-{error:.1f}" for error in cells[n, :, 1])])]
    rows = [[cell if "nan" not in cell else "-" for cell in row] for row in rows]
    table(f"{args.game}: points per round of the row agent against the column agent, +- standard error over {args.games} deals",
          ["", *numbers], rows)
    table("Welfare: the share of the best joint score that the two reach together", ["", *numbers],
          [[label, *row] for label, row in zip(labels, welfare)])
    for name, rivals in learned.items():
        taken = {other: points(sides(name, other))[:, 1] for other in [*adversaries, *rivals]}
        best = max(taken, key=lambda other: taken[other].mean())
        gain, error = estimate(taken[best] - taken["cooperate"])
        out["robustness"][name] = {
            "welfare": summarize(sides(name, name))["welfare"], "fair player gets": float(taken["cooperate"].mean()), "best adversary":
            best[-16:], "gets": float(taken[best].mean()), "exploitability": gain, "+-": error}
    if learned:
        table("Welfare with itself, and what an adversary takes from it beyond what a fair player gets in the same deals",
              ["", *next(iter(out["robustness"].values()))], [[name[-16:], *row.values()] for name, row in out["robustness"].items()])
    profile = {}
    for name in (name for name in names if name not in people):
        seen = summarize(sides(name, "random"))  # a random player leads everyone into every situation
        out["fingerprints"][name] = profile = {key: seen.get(key) for key in FINGERPRINT.get(args.game, STATES)}
        if args.game not in FINGERPRINT:
            profile["nearest to"] = nearest(list(profile.values()))
    short = [key.replace("keep_", "").replace("_after", "").replace("honesty", "honest") for key in profile]
    table("Fingerprints, measured against a random player" + KEPT * (args.game in FINGERPRINT),
          ["", *short], [[name[-16:], *row.values()] for name, row in out["fingerprints"].items()])
    for name in (name for name in names if out["invalid"][name]):
        print(f"\n{name}: {out['invalid'][name]} turns without a legal reply, answered at random")
    pathlib.Path(args.out).write_text(json.dumps(out, indent=1), encoding="utf-8")
    print(f"\nThe numbers are in {args.out}")
    if args.plot:
        plot_matrix(args.plot, out)

def pyplot():
    """matplotlib.pyplot, drawing to files. Raises UserError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    return __import__("matplotlib.pyplot").pyplot

def plot_matrix(path, out):
    """The cross-play matrix as a heat map with its numbers in the cells."""
    plt, names, matrix = pyplot(), out["agents"], np.array(out["matrix"])
    fig, ax = plt.subplots(figsize=(2 + .7 * len(names), 1.5 + .5 * len(names)), layout="constrained")
    ax.imshow(matrix, cmap="Greys_r", aspect="auto")
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="against", title=f"{out['game']}: points per round of the row agent")
    for (i, j), value in np.ndenumerate(matrix):
        ax.text(j, i, f"{value:.3g}", ha="center", va="center", color="k" if 2 * value > matrix.min() + matrix.max() else "w")
    fig.savefig(path, dpi=110)

def plot_curves(path, runs):
    """Points, the game's indicator and entropy over iterations; runs that differ only in seed as mean and range."""
    plt, groups = pyplot(), defaultdict(list)
    for run in runs:
        settings = {key: str(value) for key, value in read(run).items() if key not in ("seed", "out", "versions")}
        groups[tuple(settings.items())].append(read(run, "metrics.jsonl"))
    differ = [key for key in settings if len({dict(group).get(key) for group in groups}) > 1] or ["algo"]
    columns = ["points", "honesty" if settings["game"] == "trust_split" else "cooperation", "entropy"]
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for n, (group, members) in enumerate(groups.items()):
        label = ", ".join(f"{key} {dict(group)[key]}" for key in differ) + f" ({len(members)} seeds)" * (len(members) > 1)
        for ax, column in zip(axes, columns):
            values = np.array([line[:min(map(len, members))] for line in ([np.nan if line[column] is None else line[column]
                               for line in member] for member in members)])
            ax.plot(values.mean(0), ("-", "--", ":", "-.")[n % 4], color=f"C{n}", label=label)
            ax.fill_between(range(values.shape[1]), values.min(0), values.max(0), color=f"C{n}", alpha=.2, linewidth=0)
            ax.set(xlabel="iteration", title={"points": "points per round", "entropy": "entropy, nats per token"}.get(column, column))
    axes[0].legend(fontsize=8)
    fig.savefig(path, dpi=110)

def show(run, iteration):
    """Print whole games of a run as a dialogue, in colour on a terminal; control characters are shown, not executed."""
    games = read(run, "transcripts.jsonl")
    there = sorted({game["iteration"] for game in games})
    if iteration is not None and iteration not in there:
        raise UserError(f"{run} has no games of iteration {iteration}; it has those of {', '.join(map(str, there))}")
    for game in (game for game in games if game["iteration"] == (there[-1] if iteration is None else iteration)):
        print("\n=== iteration {}: player 1 is {}, player 2 is {} ===".format(game["iteration"], *game["players"]))
        scores, per_round = iter(game["points"]), len(game["turns"]) // len(game["points"])
        for n, turn in enumerate(game["turns"], 1):
            text, reply = printable(turn["text"]), printable(turn["reply"])
            said = f"player {turn['seat'] + 1}: {reply}"
            said = f"\033[3{3 + 3 * turn['seat']}m{said}\033[0m" if sys.stdout.isatty() else said
            print("\n".join(" " * 40 * turn["seat"] + line for line in [*("  " + line for line in text.split("\n")), said]))
            if n % per_round == 0:
                print("--- points: {:.1f} and {:.1f}".format(*next(scores)))

def parse(argv):
    """The command line as a namespace. Raises UserError."""
    parser = Parser(description=__doc__.split("\n")[0], epilog="An agent is a run's or an adapter's folder, base (the model without "
                    "adapter), human, api:MODEL, or a scripted player: cooperate, defect, tit_for_tat, grim, random, liar.")
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
    if not (args.agents or args.show or args.plot and args.runs):
        raise UserError("nothing to do; name --agents, or --show RUN, or --plot FILE.png RUN RUN ... (see --help)")
    return args

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
    except (EOFError, KeyboardInterrupt):
        print("\neval: left before the end; nothing was saved", file=sys.stderr)
    return 0

if __name__ == "__main__":
    sys.exit(main())
