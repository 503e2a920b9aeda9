"""The training runs behind the claims: make what is missing, print the tables. Run by hand:

    python tests/reproduce.py --list                    parts, rows and their commands
    python tests/reproduce.py ipd trust_split           these parts, two runs at a time
    python tests/reproduce.py --model DIR               everything, with the rows of a real model
    python tests/reproduce.py --tables                  train nothing, print what there is

Every row is one command, repeated over seeds and priors; none is left out of a table. Runs lie in
runs/reproduce/. Stopped ones are resumed, finished ones are not made again. One thread each. Parts
`adversaries` and `strangers` need the runs of `ipd` and `trust_split`: name those too, or before.
`strangers` and `words` train nothing: the agents of all seeds meet each other, those of the part
`real` play the game in other words (eval.py)."""

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from eval import read_json, report
from games import STATES
from tiny import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "reproduce"
# A row of a table: flags of aa_minimal.py, and the seeds and priors that they are repeated over.
# kernels: what PyTorch may use of the processor ("": all). In flags, {NAME} is the run of that row
# with the same seed and prior, {model} the folder of a real model.
Row = namedtuple("Row", "name flags seeds priors kernels", defaults=[range(5), (0,), ""])
GOAL = {"ipd": 2.9, "trust_split": 47}  # points; falls are counted from there on
CREDITS = ("naive", "sum", "aa", "aa_causal")
SCRIPTED = "tit_for_tat grim cooperate defect random"
POOL = f"--algo naive --opponent self self self self self {SCRIPTED}"  # half is self-play
REAL = "--game ipd --model {model} --imitate 25 --micro_batch_tokens 2048"
STRANGERS = ("ipd-aa_causal", "ipd-aa", "trust-aa_causal", "trust-aa")  # rows, on prior 0

# The agents of the row real-aa_causal read and say these words in place of the game's.
WORDINGS = {
    "as trained": {},
    "letters swapped": {"A": "B", "B": "A"},
    "other letters": {"A": "J", "B": "F"},
    "rules in other sentences": {
        "You play a game of many rounds with another player.": "You meet someone many times.",
        "In every round both of you choose": "Each time, you and this other player pick",
        "at the same time": "without knowing what the other one does",
        "Collect as many points as you can over the whole game.": "Try to end with many points.",
        "Always answer with one letter,": "Reply with a single letter,",
        "The other chose": "This time the other player picked",
    },
}


def over(names, flags, **more):
    """A row for each of the credits `names`; the first word of `flags` begins the rows' names."""
    name, rest = flags.split(" ", 1)
    return [Row(f"{name}-{a}", f"{rest} --algo {a}", **more) for a in names]


PARTS = {
    "ipd": over(CREDITS, "ipd --game ipd", priors=range(4)),
    "trust_split": over(CREDITS, "trust --game trust_split", priors=range(2)),
    "split": over(CREDITS, "split --game split", priors=range(2)),
    "matrix": over(("naive", "aa", "aa_causal"), "stag_hunt --game stag_hunt", priors=range(2))
    + over(("naive", "aa", "aa_causal"), "chicken --game chicken", priors=range(2)),
    "kernels": over(("aa_causal", "aa"), "ipd-default --game ipd", kernels="default")
    + over(("aa_causal", "aa"), "ipd-avx2 --game ipd", kernels="avx2")
    + over(("sum",), "split-avx2 --game split", kernels="avx2", priors=(1,)),
    "long": over(("aa_causal", "aa"), "ipd-long --game ipd --iterations 120", priors=range(4))
    + over(("aa_causal", "aa"), "trust-long --game trust_split --iterations 108", priors=range(2)),
    "variants": over(("jit",), "ipd --game ipd")
    + over(("jit",), "trust --game trust_split")
    + [
        Row("ipd-batch", "--game ipd --baseline batch"),
        Row("ipd-no-past", "--game ipd --buffer 0"),
        Row("ipd-blind", "--game ipd --model tiny-blind"),
        Row("trust-batch", "--game trust_split --baseline batch"),
        Row("trust-no-past", "--game trust_split --buffer 0"),
        Row("trust-no-talk", "--game trust_split --max_message_tokens 0"),
    ],
    "beta": [Row(f"ipd-beta-{beta}", f"--game ipd --beta {beta}") for beta in (0.5, 1, 4, 8, 32)]
    + [Row("stag_hunt-aa-beta-0.5", "--game stag_hunt --algo aa --beta 0.5")]
    + [Row("trust-aa-beta-1", "--game trust_split --algo aa --beta 1", priors=range(2))],
    "adversaries": [
        Row(f"ipd-{algo}-vs-{victim}", f"--game ipd --algo {algo} --opponent {{ipd-{victim}}}")
        for algo in ("naive", "adversary", "margin")
        for victim in ("aa_causal", "sum")
    ]
    + [
        Row(f"trust-naive-vs-{v}", f"--game trust_split --algo naive --opponent {{trust-{v}}}")
        for v in ("aa_causal", "sum")
    ],
    "pool": [
        Row("ipd-pool", f"--game ipd {POOL}", priors=range(2)),
        Row("trust-pool", f"--game trust_split {POOL} self liar", priors=range(2)),
    ],
    "real": over(("aa_causal", "aa"), f"real {REAL}", seeds=range(1, 4))
    + over(("naive", "sum"), f"real {REAL} --iterations 8", seeds=range(1, 4))
    + [
        Row(
            "real-naive-vs-aa_causal",
            f"{REAL} --algo naive --iterations 8 --opponent {{real-aa_causal}}",
            seeds=range(1, 4),
        )
    ],
}


def folder_of(name, seed, prior):
    return RUNS / f"{name}-s{seed}-p{prior}"


def command(row, seed, prior, model="DIR"):
    """What a user would type for one run of a row, after `python`."""
    names = {
        other.name: folder_of(other.name, seed, prior) for part in PARTS.values() for other in part
    }
    flags = row.flags
    for name, value in (names | {"model": model}).items():
        flags = flags.replace(f"{{{name}}}", str(value))
    if "--model" not in flags:
        flags += " --model tiny"
    prior = f" --prior_seed {prior}" if prior else ""
    return f"aa_minimal.py {flags} --seed {seed}{prior}"


def make(row, seed, prior, model):
    """Make the run, or go on with it; the last line that a failed one printed, else ""."""
    folder = folder_of(row.name, seed, prior)
    if (folder / "summary.json").exists():
        return ""
    words = command(row, seed, prior, model).split() + ["--out", str(folder)]
    if list(folder.glob("checkpoint-*")):
        words = ["aa_minimal.py", "--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if row.kernels:  # a prior of its own, made with these kernels
        env |= {"ATEN_CPU_CAPABILITY": row.kernels, "XDG_CACHE_HOME": str(RUNS / row.kernels)}
    RUNS.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "w", encoding="utf-8") as log:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, stdout=log, stderr=log)
    lines = pathlib.Path(f"{folder}.log").read_text(encoding="utf-8").strip().split("\n")
    return f"{folder.name}: {lines[-1]}" if done.returncode else ""


def measures(folder):
    """{name of a column: number, or None} of one finished run."""
    config = read_json(folder, "config.json")
    lines = read_json(folder, "metrics.jsonl")
    points = [line["points"] for line in lines]
    trained = read_json(folder, "summary.json")["trained"]
    itself, greedy, random = trained["trained"], trained["defect"], trained["random"]
    out = {"last ten": np.mean(points[-10:]), "with itself": itself["points"]}
    if config.get("opponent"):  # whom it met in training
        out["opponent's last ten"] = np.mean([line["points_other"] for line in lines[-10:]])
    out["greedy gets"], out["keeps"] = greedy["points_other"], greedy["points"]
    out["fair gets"] = trained["cooperate"]["points_other"]
    out["most gets"] = max(means["points_other"] for means in trained.values())
    out["honesty"] = itself.get("honesty")
    out["liar: keeps"] = trained.get("liar", {}).get("points")
    for state in ("cc", "cd", "dc", "dd"):
        out[f"after {state}"] = random.get(f"p_c_{state}")
    goal = GOAL.get(config["game"], np.inf)
    reached = next((n for n, value in enumerate(points) if value >= goal), None)
    out["goal at"] = reached
    if reached is not None:  # the lowest mean of five iterations after it
        windows = [np.mean(points[n : n + 5]) for n in range(reached, len(points) - 4)]
        out["lowest five"] = min(windows, default=None)
    seconds = [line["seconds_play"] + line["seconds_update"] for line in lines]
    return out | {"minutes": sum(seconds) / 60}


def spread(values):
    """The range of numbers as text, without those that are None."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    digits = 1 if max(values) >= 10 else 2
    if all(isinstance(value, int) for value in values):
        digits = 0
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def table(rows):
    """Print a Markdown table: a line per row and prior, ranges over the seeds."""
    found = []
    for row in rows:
        for prior in row.priors:
            folders = [folder_of(row.name, seed, prior) for seed in row.seeds]
            runs = [measures(f) for f in folders if (f / "summary.json").exists()]
            label = f"`{row.name}`" + (f", prior {prior}" if len(row.priors) > 1 else "")
            found.append((label, f"{len(runs)} of {len(folders)}", runs))
    columns = list(dict.fromkeys(name for _, _, runs in found for run in runs for name in run))
    values = {c: [spread(run.get(c) for run in runs) for _, _, runs in found] for c in columns}
    columns = [column for column in columns if any(values[column])]
    print("| row | runs | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for n, (label, count, _) in enumerate(found):
        print(f"| {label} | {count} | " + " | ".join(values[c][n] for c in columns) + " |")


def cooperation(means):
    """How often it cooperates against `random`, first and after C,C C,D D,C D,D, as text."""
    shares = [means["random"][f"p_c_{state}"] for state in STATES]
    return " ".join("-" if share is None else f"{share:.2f}" for share in shares)


def describe(label, curve, itself, means):
    """A line of Markdown about one agent; means: of its games with the scripted players."""
    greedy, fair = means["defect"], means["cooperate"]["points_other"]
    numbers = f"{itself:.2f} | {greedy['points_other']:.2f}, {greedy['points']:.2f} | {fair:.2f}"
    return f"| {label} | {curve} | {numbers} | {cooperation(means)} |"


def table_of_runs(rows):
    """Print a Markdown table of matrix games: a line per finished run; by seed one of the model
    without adapter."""
    print("| run | points in training: first, lowest, last (iterations) | with itself ", end="")
    print("| greedy gets, keeps | fair gets | cooperates first, after C,C C,D D,C D,D |")
    print("|---" * 6 + "|")
    lines, bare = [], {}
    for row in rows:
        for seed in row.seeds:
            folder = folder_of(row.name, seed, 0)
            if not (folder / "summary.json").exists():
                continue
            summary = read_json(folder, "summary.json")
            means, untrained = summary["trained"], summary["untrained"]
            points = [line["points"] for line in read_json(folder, "metrics.jsonl")]
            curve = f"{points[0]:.2f}, {min(points):.2f}, {points[-1]:.2f} ({len(points)})"
            label = f"`{row.name}`, seed {seed}"
            lines.append(describe(label, curve, means["trained"]["points"], means))
            itself = untrained["untrained"]["points"]
            bare[seed] = describe(f"as it is, seed {seed}", "", itself, untrained)
    print("\n".join([*bare.values(), *lines]))


def evaluate(runs, out, may_play, *flags):
    """The results of eval.py with these runs, or {}; made anew where a run is newer than `out`."""
    if not all((run / "summary.json").exists() for run in runs):
        return {}
    made = out.stat().st_mtime if out.exists() else 0
    if not may_play and not made:
        return {}
    if may_play and made < max((run / "summary.json").stat().st_mtime for run in runs):
        words = ["eval.py", *map(str, runs), "--out", str(out), *flags]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL
        )
    return read_json(RUNS, out.name)["results"]


def reword(seed, wording, may_play):
    """What the real agent of a seed does in other words; a line of Markdown."""
    run = folder_of("real-aa_causal", seed, 0)
    out = RUNS / f"words-{seed}-{wording.replace(' ', '-')}.json"
    words = [word for pair in WORDINGS[wording].items() for word in ("--words", *pair)]
    results = evaluate([run], out, may_play, "--games", "8", *words)
    if not results:
        return f"| seed {seed}, {wording} | is missing | |"
    [means] = results.values()
    points = means[run.name]["points"]
    return f"| seed {seed}, {wording} | {points:.2f} | {cooperation(means)} |"


def introduce(row, may_play):
    """Let the finished runs of a row, one per seed, play each other; a line of Markdown."""
    runs = [folder_of(row, seed, 0) for seed in range(5)]
    results = evaluate(runs, RUNS / f"strangers-{row}.json", may_play, "--games", "32")
    if not results:
        return f"| `{row}` | is missing | |"
    apart = [results[a][b]["points"] for a in results for b in results if a != b]
    same = [results[a][a]["points"] for a in results]
    return f"| `{row}` | {spread(same)} | {spread(apart)} |"


def main(argv=None):
    names = [*PARTS, "strangers", "words"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(names))
    parser.add_argument("--model", help="folder of the real model, SmolLM2-135M-Instruct")
    parser.add_argument("--at_once", type=int, default=2, help="runs at a time")
    parser.add_argument("--list", action="store_true", help="print the commands only")
    parser.add_argument("--tables", action="store_true", help="print the tables only")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(names):
        parser.error(f"no part {min(unknown)}; there are {', '.join(names)}")
    parts = args.parts or [part for part in names if part != "real" or args.model]
    if "real" in parts and not (args.model or args.list or args.tables):
        parser.error("the part real needs --model DIR")
    rows = [row for part in PARTS for row in PARTS[part] if part in parts]
    if args.list:
        for row in rows:
            kernels = f"ATEN_CPU_CAPABILITY={row.kernels} XDG_CACHE_HOME={RUNS / row.kernels} "
            typed = command(row, row.seeds[0], row.priors[-1], args.model or "DIR")
            print(f"{row.name}: {len(row.seeds) * len(row.priors)} runs such as")
            print("    " + (kernels if row.kernels else "") + "OMP_NUM_THREADS=1 python " + typed)
        return
    problems = []
    if not args.tables:
        jobs = [(row, seed, prior) for row in rows for seed in row.seeds for prior in row.priors]
        with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
            done = pool.map(lambda job: make(*job, args.model), jobs)
            problems = [line for line in tqdm(done, total=len(jobs), desc="runs") if line]
    play = not args.tables
    for part in parts:
        print(f"\n## {part}\n")
        if part == "strangers":
            print("| agents of seeds 0 to 4 | points with itself | with another |\n|---|---|---|")
            print("\n".join(introduce(row, play) for row in STRANGERS))
        elif part == "words":
            print("| agent | points with itself | cooperates first, after C,C C,D D,C D,D |")
            print("|---|---|---|")
            for seed in (1, 2, 3):
                print("\n".join(reword(seed, words, play) for words in WORDINGS))
        else:
            table(PARTS[part])
        if part == "real":
            print()
            table_of_runs(PARTS[part])
    if problems:
        raise UserError(f"{len(problems)} runs failed, the first one {problems[0]}")


if __name__ == "__main__":
    sys.exit(report("reproduce", main))
