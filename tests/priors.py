"""What the built-in model does before it is trained, in self-play. Run by hand:

    python tests/priors.py trust_split 0 1 2 3          these prior seeds; warms up what is missing

r: how much more often it keeps all of what is worth more to the other, after it last saw greed
rather than fairness. Whether naive learners turn greedy hangs on it: see RESULTS.md."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import load, print_table, report
from games import Match, Side, play, summarize
from rollout import Policy

KEPT = {"trust_split": "keep_lower", "split": "keep_low"}  # 0 to 10 of what the other wants more


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("game", choices=list(KEPT))
    parser.add_argument("prior_seeds", nargs="+", type=int)
    parser.add_argument("--games", type=int, default=256)
    args = parser.parse_args(argv)
    if args.games < 1 or min(args.prior_seeds) < 0:
        parser.error("--games begins at 1, prior seeds at 0")
    rows = []
    for seed in args.prior_seeds:
        player = Policy(load("tiny", "none", args.game, prior_seed=seed), None)
        matches = [Match(n, n, 10, (player, player)) for n in range(args.games)]
        play(args.game, matches, [1], 40, at_once=128)
        means = summarize([Side(match, seat) for match in matches for seat in (0, 1)])
        fair = means[f"{KEPT[args.game]}_after_fair"]
        greedy = means[f"{KEPT[args.game]}_after_greedy"]
        has_seen_both = fair is not None and greedy is not None
        r = (greedy - fair) / 10 if has_seen_both else None
        row = [means["points"], means.get("honesty"), fair, greedy, r]
        rows.append([f"prior {seed}", *row])
    header = ["points", "honesty", "kept after fairness", "after greed", "r"]
    print_table(f"{args.game}, the model without adapter", header, rows)


if __name__ == "__main__":
    sys.exit(report("priors", main))
