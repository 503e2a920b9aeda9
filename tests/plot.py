"""Pictures of runs: learning curves, and who scores how much against whom.

    python tests/plot.py curves.png runs/ipd-aa-s0 runs/ipd-aa-s1 runs/ipd-naive-s0
    python tests/plot.py --crossplay crossplay.png crossplay.json       what eval.py has written

Runs that differ only in seeds and length become one curve: their mean, in a band from the lowest to
the highest."""

import argparse
import itertools
import json
import os
import pathlib
import re
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from eval import read_json, report
from games import GAMES
from tiny import UserError, user_error


def new_figure(width, height):
    """An empty matplotlib Figure of so many inches. UserError without matplotlib."""
    with user_error("cannot draw", "pip install matplotlib"):
        from matplotlib.figure import Figure
    return Figure((width, height), layout="constrained")


def group_runs(runs):
    """Folders of runs that differ only in seeds and length go together: [[folder, ...], ...].
    And the game that all of them play."""
    groups, games = {}, set()
    for run in runs:
        config = read_json(run, "config.json")
        games.add(config["game"])
        settings = json.dumps(
            config | dict(seed=0, prior_seed=0, out="", iterations=0), sort_keys=True
        )
        groups.setdefault(settings, []).append(run)
    if len(games) > 1:
        raise UserError(f"these runs play {' and '.join(sorted(games))}: draw each game apart")
    return list(groups.values()), games.pop()


def values_of(metrics, key):
    """The numbers called `key` [runs, iterations], as far as the shortest run; NaN for none."""
    shortest = min(len(lines) for lines in metrics)
    curves = [[line.get(key) for line in lines[:shortest]] for lines in metrics]
    return np.array(curves, dtype=float)


def draw_curves(runs):
    """Points, headline indicator and entropy over iterations. -> Figure"""
    groups, game = group_runs(runs)
    figure = new_figure(11, 3.4)
    panels = dict(zip(("points", GAMES[game].headline, "entropy"), figure.subplots(1, 3)))
    styles = itertools.cycle(["-", "--", "-.", ":"])  # so that a line is seen below another
    for folders, style in zip(groups, styles):
        metrics = [read_json(folder, "metrics.jsonl") for folder in folders]
        label = os.path.basename(os.path.abspath(folders[0]))
        if len(folders) > 1:
            name = re.sub(r"-s\d+(-p\d+)?$", "", label)  # the seeds
            label = f"{name}, {len(folders)} runs"
        if len({len(lines) for lines in metrics}) > 1:
            print(f"plot: {label}, of unequal length, up to the shortest", file=sys.stderr)
        for key, panel in panels.items():
            values = values_of(metrics, key)
            x = range(values.shape[1])
            [line] = panel.plot(x, values.mean(0), style, label=label)
            low, high = values.min(0), values.max(0)
            panel.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for key, panel in panels.items():
        panel.set(xlabel="iteration", title=key)
    panels["points"].set_title(f"{game}: points per round")
    lines, labels = panels["points"].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=3, fontsize=8)
    return figure


def draw_crossplay(path):
    """Points per round of the row agent against the column agent, as a heat map. -> Figure"""
    content = read_json(*os.path.split(path))
    with user_error(f"{path} is not a result of eval.py", "name the file it wrote"):
        game, results = content["settings"]["game"], content["results"]
        rows = list(results)
        columns = list(dict.fromkeys(b for a in rows for b in results[a]))
        points = [[results[a].get(b, {}).get("points") for b in columns] for a in rows]
        points = np.array(points, dtype=float)  # NaN where a pair has not played
    figure = new_figure(2.5 + 0.8 * len(columns), 1.6 + 0.5 * len(rows))
    panel = figure.subplots()
    panel.imshow(points, cmap="Greys_r", alpha=0.5, aspect="auto")
    panel.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    panel.set_yticks(range(len(rows)), rows)
    panel.set(xlabel="against", title=f"{game}: points per round of the row")
    for (row, column), value in np.ndenumerate(points):
        if not np.isnan(value):
            panel.text(column, row, f"{value:.2f}", ha="center", va="center")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", help="the file to write, such as curves.png")
    parser.add_argument("sources", nargs="+", metavar="RUN", help="runs, or the file of eval.py")
    parser.add_argument("--crossplay", action="store_true", help="draw the JSON file of eval.py")
    args = parser.parse_args(argv)
    if pathlib.Path(args.picture).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"{args.picture} is to be the picture: name a .png, .pdf or .svg file first")
    if args.crossplay and len(args.sources) > 1:
        parser.error("--crossplay draws one file")
    figure = draw_crossplay(args.sources[0]) if args.crossplay else draw_curves(args.sources)
    with user_error(f"cannot write {args.picture}", "name a .png file in a folder that exists"):
        figure.savefig(args.picture, dpi=110)
    print(f"The picture is {args.picture}")


if __name__ == "__main__":
    sys.exit(report("plot", main))
