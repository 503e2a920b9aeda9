"""The scripts that are run by hand: priors, tables of runs, pictures."""

import argparse
import json

import bench
import numpy as np
import plot
import priors
import pytest
import reproduce

import aa_minimal
from eval import report
from games import Scripted


@pytest.mark.parametrize("game", ["trust_split", "split"])
def test_reciprocity_of_a_mix_of_scripts_is_its_share_of_tit_for_tat(game, monkeypatch, capsys):
    mixed = Scripted({"tit_for_tat": 0.4, "cooperate": 0.5, "defect": 0.1})
    monkeypatch.setattr(priors, "load", lambda *args, **kwargs: None)
    monkeypatch.setattr(priors, "Policy", lambda llm, adapter: mixed)
    priors.main([game, "7", "--games", "300"])
    name, seed, *numbers = capsys.readouterr().out.strip().split("\n")[-1].split()
    kept_fair, kept_greedy, r = map(float, numbers[-3:])
    assert (name, seed) == ("prior", "7")
    assert kept_fair == pytest.approx(1, abs=0.4) and kept_greedy == pytest.approx(5, abs=0.8)
    assert r == pytest.approx(0.4, abs=0.08)


# ---------------------------------------------------------------------------------------- the rows


def test_rows_have_names_of_their_own_and_commands_that_the_program_takes():
    rows = [row for part in reproduce.PARTS.values() for row in part]
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        for seed, prior in ((row.seeds[0], row.priors[0]), (row.seeds[-1], row.priors[-1])):
            typed = reproduce.command(row, seed, prior).split()
            assert typed.pop(0) == "aa_minimal.py" and "{" not in " ".join(typed)
            settings = aa_minimal.parse(typed)
            assert (settings.seed, settings.prior_seed) == (seed, prior)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with two finished runs of `ipd-naive` and one under way."""
    monkeypatch.setattr(reproduce, "RUNS", tmp_path)
    for seed, points in ((0, [1.0] * 12), (1, [2.95, 1.0] + [3.0] * 10), (2, [2.0])):
        folder = reproduce.folder_of("ipd-naive", seed, 0)
        folder.mkdir(parents=True)
        seconds = {"seconds_play": 6, "seconds_update": 0}
        lines = [{"points": p, "points_other": 4 - p, **seconds} for p in points]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
        opponent = ["defect"] if seed == 1 else None
        (folder / "config.json").write_text(json.dumps({"game": "ipd", "opponent": opponent}))
        names = ("trained", "defect", "cooperate", "random")
        met = {name: {"points": points[-1], "points_other": 1.4, "p_c_cd": 0.25} for name in names}
        met["random"] |= {"points_other": 2.5, "p_c_first": 1.0, "p_c_cc": 0.5}
        met["random"] |= {"p_c_dc": None, "p_c_dd": 0.0}
        if seed < 2:
            summary = {"trained": met, "untrained": met | {"untrained": {"points": 2.2}}}
            (folder / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_measures_of_a_run_are_those_on_paper(runs):
    first, second = (reproduce.measures(reproduce.folder_of("ipd-naive", s, 0)) for s in (0, 1))
    assert first["last ten"] == 1 and first["goal at"] is None and first["minutes"] == 1.2
    assert second["last ten"] == 3 and second["goal at"] == 0
    assert second["opponent's last ten"] == 1 and "opponent's last ten" not in first
    assert second["lowest five"] == pytest.approx((2.95 + 1 + 9) / 5)
    assert second["after cd"] == 0.25 and second["greedy gets"] == 1.4
    assert second["most gets"] == 2.5  # by the random player


def test_a_table_counts_the_runs_that_are_missing(runs, capsys):
    reproduce.table([reproduce.Row("ipd-naive", "", range(5))])
    header, _, line = capsys.readouterr().out.strip().split("\n")
    cells = dict(zip(header.split(" | "), line.split(" | ")))
    assert cells["runs"] == "2 of 5" and cells["last ten"] == "1.00 to 3.00"
    assert cells["greedy gets"] == "1.40"


def test_a_table_of_runs_has_a_line_for_each_and_for_the_model_without_adapter(runs, capsys):
    reproduce.table_of_runs([reproduce.Row("ipd-naive", "")])
    _, _, *lines = capsys.readouterr().out.strip().split("\n")
    acts = "1.00 0.50 0.25 - 0.00 |"  # against `random`
    assert lines == [
        f"| as it is, seed 0 |  | 2.20 | 1.40, 1.00 | 1.40 | {acts}",
        f"| as it is, seed 1 |  | 2.20 | 1.40, 3.00 | 1.40 | {acts}",
        f"| `ipd-naive`, seed 0 | 1.00, 1.00, 1.00 (12) | 1.00 | 1.40, 1.00 | 1.40 | {acts}",
        f"| `ipd-naive`, seed 1 | 2.95, 1.00, 3.00 (12) | 3.00 | 1.40, 3.00 | 1.40 | {acts}",
    ]


def test_finished_runs_are_not_made_again_and_a_failed_one_is_named(runs, monkeypatch):
    called = []

    def fails(words, cwd, env, stdout, stderr):
        called.append(words[1:])
        stdout.write("something\naa_minimal: no luck\n")
        return argparse.Namespace(returncode=2)

    monkeypatch.setattr(reproduce.subprocess, "run", fails)
    row = reproduce.Row("ipd-naive", "--game ipd --algo naive")
    assert reproduce.make(row, 0, 0, None) == "" and not called
    assert reproduce.make(row, 3, 0, None) == "ipd-naive-s3-p0: aa_minimal: no luck"
    assert called[0][:5] == ["aa_minimal.py", "--game", "ipd", "--algo", "naive"]
    folder = reproduce.folder_of("ipd-naive", 4, 0)
    (folder / "checkpoint-000003").mkdir(parents=True)
    reproduce.make(row, 4, 0, None)
    assert called[1] == ["aa_minimal.py", "--resume", str(folder)]


def test_an_agent_is_tried_in_other_words_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RUNS", tmp_path)
    assert reproduce.reword(1, "letters swapped", True).endswith("| is missing | |")
    size = ["--iterations", "1", "--games", "4", "--group_size", "2", "--rounds", "3"]
    out = ["--out", str(reproduce.folder_of("real-aa_causal", 1, 0))]
    aa_minimal.main(["--game", "ipd", "--model", "tiny", *size, *out])
    assert "is missing" in reproduce.reword(1, "letters swapped", False)  # tables only
    line = reproduce.reword(1, "letters swapped", True)
    _, agent, points, shares, _ = line.split("|")
    assert agent.strip() == "seed 1, letters swapped" and 0 <= float(points) <= 5
    assert len(shares.split()) == 5
    written = json.loads((tmp_path / "words-1-letters-swapped.json").read_text())
    assert written["settings"]["words"] == [["A", "B"], ["B", "A"]]
    monkeypatch.setattr(reproduce.subprocess, "run", None)  # it is not played again
    assert reproduce.reword(1, "letters swapped", True) == line


def test_parts_that_are_not_there_are_refused(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["nothing"])
    assert "no part nothing" in capsys.readouterr().err
    assert report("reproduce", lambda: reproduce.main(["ipd", "--list"])) == 0
    said = capsys.readouterr().out
    assert "python aa_minimal.py --game ipd --algo naive --model tiny --seed 0" in said


def test_a_spread_has_two_digits_or_one():
    assert reproduce.spread([1.0, None, 2.346]) == "1.00 to 2.35"
    assert reproduce.spread([48.26, 50]) == "48.3 to 50.0"
    assert reproduce.spread([None]) == "" and reproduce.spread([9, 12]) == "9 to 12"


# ------------------------------------------------------------------------------------ the pictures


@pytest.fixture
def curves(tmp_path):
    """Two runs that differ in seed and length, and one of another credit."""
    folders = []
    for name, algo, seed, points in (
        ("ipd-aa-s0-p0", "aa", 0, [1.0, 2.0, 3.0]),
        ("ipd-aa-s1-p0", "aa", 1, [2.0, 4.0]),
        ("ipd-naive-s0", "naive", 0, [1.0]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        config = {"game": "ipd", "algo": algo, "seed": seed, "iterations": len(points)}
        (folder / "config.json").write_text(json.dumps(config | {"prior_seed": 0, "out": name}))
        lines = [{"points": p, "cooperation": None, "entropy": 0.5} for p in points]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(str(folder))
    return folders


def test_runs_that_differ_in_seed_and_length_are_one_curve(curves):
    groups, game = plot.group_runs(curves)
    assert game == "ipd" and groups == [curves[:2], curves[2:]]
    metrics = [plot.read_json(folder, "metrics.jsonl") for folder in curves[:2]]
    assert plot.values_of(metrics, "points").tolist() == [[1, 2], [2, 4]]  # of the shortest
    assert np.isnan(plot.values_of(metrics, "cooperation")).all()


def test_a_picture_shows_means_in_bands_and_is_written(curves, tmp_path):
    pytest.importorskip("matplotlib")
    panel = plot.draw_curves(curves).axes[0]
    assert panel.lines[0].get_ydata().tolist() == [1.5, 3]
    assert [line.get_label() for line in panel.lines] == ["ipd-aa, 2 runs", "ipd-naive-s0"]
    picture = tmp_path / "curves.png"
    assert report("plot", lambda: plot.main([str(picture), *curves])) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_picture_whose_name_was_forgotten_is_refused_and_nothing_is_written(curves, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        plot.main(curves)
    assert stop.value.code == 2 and sorted(tmp_path.rglob("*")) == before


# -------------------------------------------------------------------------------- speed and memory


@pytest.mark.parametrize("flags", [[], ["--no-generate", "--no-growth"]])
def test_the_bench_measures_all_that_was_asked_for(flags, tmp_path, monkeypatch, capsys):
    if not flags:  # a process each: once is enough
        monkeypatch.setattr(bench, "peak", lambda *args: 1.0)
    file = tmp_path / "out.json"
    size = ["--game", "ipd", "--games", "2", "--rounds", "2", "--repeats", "1"]
    bench.main([*size, "--json", str(file), *flags])
    out = json.loads(file.read_text())
    names = [row["name"] for row in out["rows"]]
    usual = [] if flags else ["generate / play"]
    assert names == ["play / forward", *usual, "update / plain", "peak memory"]
    for row in out["rows"][:-1]:  # the peak may be nothing, for so small a batch
        assert (
            row["ratio"] == pytest.approx(row["first"][0] / row["second"][0]) and row["ratio"] > 0
        )
    assert out["sampled"] == 8 and out["logp_difference"] < 1e-4  # 2 games of 2 rounds, 2 seats
    assert [row["series"] for row in out["growth"]] == (
        [] if flags else ["games"] * 3 + ["rounds"] * 3
    )
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
