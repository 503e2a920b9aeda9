"""The real command, as a user types it, what a run survives, and learning itself on a small budget."""
import argparse
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import aa_minimal
import rollout
from games import Match, Round

ROOT = pathlib.Path(__file__).parent.parent
SMALL = "--game", "ipd", "--games", "8", "--group-size", "4", "--rounds", "3", "--lr", "0.01"


def run(tmp_path, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, str(ROOT / "aa_minimal.py"), *flags], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=500)


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_typing_the_same_command_twice_fails_or_overwrites_or_repeats_differently(tmp_path):
    for _ in range(2):
        done = run(tmp_path, "--game", "ipd", "--iterations", "2", "--games", "8", "--group-size", "4", "--rounds", "3")
        assert done.returncode == 0, done.stderr[-2000:]
        assert "tit_for_tat" in done.stdout
    first, second = tmp_path / "runs/ipd-aa-s0", tmp_path / "runs/ipd-aa-s0-2"
    timeless = [[{k: v for k, v in line.items() if "seconds" not in k} for line in lines(run)] for run in (first, second)]
    assert timeless[0] == timeless[1]
    assert (first / "adapter/adapter_model.safetensors").read_bytes() == (second / "adapter/adapter_model.safetensors").read_bytes()
    wanted = {"iteration", "points", "welfare", "cooperation", "entropy", "kl", "grad_norm", "ratio_mean", "ratio_max", "tokens",
              "seconds_play", "seconds_update", "p_c_first"}
    assert [line["iteration"] for line in lines(first)] == [0, 1] and wanted <= set(lines(first)[0])
    assert all(abs(line["ratio_max"] - 1) < 1e-3 for line in lines(first))
    assert len(lines(first, "transcripts.jsonl")[0]["turns"]) == 6
    assert json.loads((first / "summary.json").read_text())["trained"]["random"]["points"] > 0
    assert json.loads((first / "config.json").read_text())["seed"] == 0 and list((first / "snapshots").iterdir())


def test_an_adapter_cannot_be_loaded_by_peft_alone(tmp_path):
    import peft

    import tiny
    out = tmp_path / "out"
    assert run(tmp_path, "--game", "ipd", "--iterations", "1", "--games", "4", "--group-size", "2", "--rounds", "2",
               "--out", str(out)).returncode == 0
    assert peft.PeftModel.from_pretrained(tiny.load("tiny", "ipd")[0], out / "adapter").peft_config["default"].r == 32


@pytest.mark.parametrize("flags, says", [
    (["--game", "chess"], "chess"), (["--algo", "ppo"], "ppo"), (["--model", "tiny-tim"], "tiny-tim"),
    (["--games", "10", "--group-size", "4"], "divisible"), (["--group-size", "1"], "baseline"), (["--rounds", "0"], "0"),
    (["--gamma", "1.5"], "1.5"), (["--lr", "nan"], "nan"), (["--lr", "x"], "x"), (["--continue-prob", "-1"], "-1"),
    (["--opponent", "nobody"], "nobody"), (["--model", "some/where"], "tiny"), (["--model", "empty"], "empty"),
    (["--quant", "nf4"], "nf4"), (["--out", "taken"], "taken"), (["--banana"], "banana")])
def test_a_wrong_input_gives_a_traceback_or_overwrites(tmp_path, flags, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("precious")
    done = run(tmp_path, "--game", "ipd", "--iterations", "1", "--games", "4", "--group-size", "2", *flags)
    error = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 2 and says in error and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert len(done.stderr.strip().replace("\r", "\n").split("\n")) == 1
    assert (tmp_path / "taken" / "config.json").read_text() == "precious" and not (tmp_path / "runs").exists()


def test_naive_learners_do_not_learn_to_defect(tmp_path):
    assert run(tmp_path, "--game", "ipd", "--algo", "naive", "--iterations", "12", "--games", "64", "--rounds", "6",
               "--seed", "3", "--out", "out").returncode == 0
    seen = lines(tmp_path / "out")
    assert seen[0]["cooperation"] > .4 and seen[-1]["cooperation"] < .2


def test_the_joint_return_does_not_teach_cooperation(tmp_path):
    assert run(tmp_path, "--game", "ipd", "--algo", "sum", "--iterations", "12", "--games", "64", "--rounds", "6",
               "--seed", "3", "--out", "out").returncode == 0
    seen = lines(tmp_path / "out")
    assert seen[-1]["cooperation"] > seen[0]["cooperation"] + .1 and seen[-1]["points"] > 2.6


def test_a_fixed_opponent_is_not_in_every_game(tmp_path):
    assert run(tmp_path, "--game", "ipd", "--opponent", "defect", "--iterations", "1", "--games", "8", "--group-size", "4",
               "--rounds", "2", "--out", "out").returncode == 0
    [line] = lines(tmp_path / "out")
    assert line["points"] is None and line["points_opponent"] >= 1


def timeless(folder):
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines(folder)]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same_run(one, other):
    assert timeless(one) == timeless(other)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "summary.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of 13 iterations, so that it holds two snapshots."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert aa_minimal.main([*SMALL, "--iterations", "13", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("first", [3, 10, 12])
def test_a_resumed_run_differs_from_one_that_never_stopped(tmp_path, undisturbed, first):
    assert aa_minimal.main([*SMALL, "--iterations", str(first), "--out", str(tmp_path / "run")]) == 0
    assert aa_minimal.main(["--resume", str(tmp_path / "run"), "--iterations", "13"]) == 0
    same_run(tmp_path / "run", undisturbed)
    assert json.loads((tmp_path / "run/config.json").read_text())["iterations"] == 13


@pytest.mark.parametrize("flags", [["--seed", "1"], ["--iterations", "5"], ["--lr", "1"], ["--game", "chicken"], ["--out", "x"]])
def test_resume_takes_flags_that_contradict_the_run(tmp_path, undisturbed, capsys, flags):
    before = files(undisturbed)
    assert aa_minimal.main(["--resume", str(undisturbed), *flags]) == 2
    assert flags[0] in capsys.readouterr().err and files(undisturbed) == before


DAMAGE = {"half of it": lambda data: data[:len(data) // 2], "nothing": lambda data: b"",
          "a flipped bit": lambda data: data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:],
          "a list": lambda data: b"[1, 2]\n", "a directory": None}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "config.json", "metrics.jsonl", "transcripts.jsonl",
                                  "snapshots/000000/adapter_model.safetensors", "snapshots/000010/adapter_config.json"])
def test_a_damaged_file_is_used_or_ends_in_a_traceback(tmp_path, undisturbed, capsys, name, damage):
    shutil.copytree(undisturbed, tmp_path / "run")
    data = (tmp_path / "run" / name).read_bytes()
    (tmp_path / "run" / name).unlink()
    if damage == "a directory":
        (tmp_path / "run" / name).mkdir()
    else:
        (tmp_path / "run" / name).write_bytes(DAMAGE[damage](data))
    before = files(tmp_path / "run")
    assert aa_minimal.main(["--resume", str(tmp_path / "run"), "--iterations", "14"]) == 2
    [error] = capsys.readouterr().err.strip().split("\n")
    assert (os.path.dirname(name) or name) in error
    assert files(tmp_path / "run") == before


def start(folder, *flags):
    return subprocess.Popen([sys.executable, str(ROOT / "aa_minimal.py"), *flags], cwd=folder, stderr=subprocess.PIPE, text=True,
                            stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_killed_run_is_unreadable_or_loses_more_than_an_iteration(tmp_path, undisturbed):
    chance = random.Random(0)
    for n in range(int(os.environ.get("AA_KILLS", 2))):
        folder, flags = tmp_path / f"run{n}", [*SMALL, "--iterations", "13", "--out", f"run{n}"]
        for _ in range(3):
            process = start(tmp_path, *flags)
            while process.poll() is None and not (folder / "checkpoint.safetensors").exists():
                time.sleep(.01)
            time.sleep(chance.uniform(0, .6))  # an iteration takes a tenth of that, most of it writing
            process.kill()
            process.communicate()
            saved = json.loads(rollout.read_tensors(folder / "checkpoint.safetensors")[1])[1]
            assert saved >= len(lines_that_are_whole(folder)) - 1
            flags = ["--resume", f"run{n}"]
        assert run(tmp_path, "--resume", f"run{n}").returncode == 0
        same_run(folder, undisturbed)


def lines_that_are_whole(folder):
    return (folder / "metrics.jsonl").read_text().split("\n")[:-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_half_an_iteration(tmp_path, number):
    process = start(tmp_path, *SMALL, "--iterations", "500", "--out", "run", "--save-every", "400")
    while not (tmp_path / "run/metrics.jsonl").exists() or len(lines_that_are_whole(tmp_path / "run")) < 2:
        time.sleep(.02)
    process.send_signal(number)
    error = process.communicate()[1].strip().split("\n")[-1]
    assert process.returncode == 130 and "--resume run" in error and "Traceback" not in error
    saved = json.loads(rollout.read_tensors(tmp_path / "run/checkpoint.safetensors")[1])[1]
    assert saved == len(lines(tmp_path / "run")) >= 2  # although --save-every had not come


def test_a_full_disk_harms_the_checkpoint_or_ends_in_a_traceback(tmp_path, undisturbed):
    assert aa_minimal.main([*SMALL, "--iterations", "2", "--out", str(tmp_path / "run")]) == 0
    before = (tmp_path / "run/checkpoint.safetensors").read_bytes()
    full = subprocess.run([sys.executable, str(ROOT / "aa_minimal.py"), "--resume", "run", "--iterations", "13"], cwd=tmp_path,
                          capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000,) * 2))
    error = full.stderr.replace("\r", "\n").strip().split("\n")[-1]
    assert full.returncode == 2 and "--resume" in error and "Traceback" not in full.stderr, full.stderr
    assert (tmp_path / "run/checkpoint.safetensors").read_bytes() == before
    assert aa_minimal.main(["--resume", str(tmp_path / "run"), "--iterations", "13"]) == 0
    same_run(tmp_path / "run", undisturbed)


def test_running_out_of_memory_ends_the_run_or_changes_it(tmp_path, undisturbed, monkeypatch, capsys):
    budgets, score = [], aa_minimal.score

    def short_of_memory(llm, episodes, budget, **kwargs):
        budgets.append(budget)
        for mb in score(llm, episodes, 60, **kwargs):  # several micro-batches, of which the first are learned from
            yield mb
            if budget > 200:
                raise torch.OutOfMemoryError

    monkeypatch.setattr(aa_minimal, "score", short_of_memory)
    assert aa_minimal.main([*SMALL, "--iterations", "2", "--out", str(tmp_path / "run"), "--micro-batch-tokens", "800"]) == 0
    assert budgets == [800, 400, 200, 200] and "--micro-batch-tokens 200" in capsys.readouterr().err
    for line, other in zip(timeless(tmp_path / "run"), timeless(undisturbed)):
        assert line["points"] == other["points"] and line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("wrong", ["loss", "weight"])
def test_numbers_that_went_wrong_are_learned_from(tmp_path, monkeypatch, capsys, wrong):
    assert aa_minimal.main([*SMALL, "--iterations", "2", "--out", str(tmp_path / "run")]) == 0
    before, policy_loss = files(tmp_path / "run"), aa_minimal.policy_loss

    def broken(logp, *args):
        loss, ratio = policy_loss(logp, *args)
        return (loss * float("nan"), ratio) if wrong == "loss" else (loss, torch.where(torch.arange(len(ratio)) == 1, 9., ratio))

    monkeypatch.setattr(aa_minimal, "policy_loss", broken)
    assert aa_minimal.main(["--resume", str(tmp_path / "run"), "--iterations", "3"]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert "iteration 2" in error and str(tmp_path / "run") in error and "rows" in error
    assert wrong == "loss" or "rows []" not in error
    assert files(tmp_path / "run") == before


def test_games_that_teach_nothing_stop_the_run_or_pass_in_silence(tmp_path, monkeypatch, capsys):
    aa_minimal.warn.cache_clear()
    monkeypatch.setattr(aa_minimal, "credits", lambda algo, own, *args: torch.zeros_like(own))
    assert aa_minimal.main([*SMALL, "--iterations", "3", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count("ended alike") == 1
    assert [line["zero_credit"] for line in lines(tmp_path / "run")] == [1, 1, 1]


@pytest.mark.parametrize("baseline", ["group", "batch"])
def test_credits_of_games_with_fractional_points_differ_from_the_slow_sums(baseline):
    """The first game has whole points only, later ones do not, and one is shorter."""
    args = argparse.Namespace(game="split", algo="aa", baseline=baseline, gamma=.9, beta=.7)
    points = [[(50, 60), (10, 100)], [(66.6, 33.3), (6.7, 20)], [(100, 10), (20.5, 70.25)], [(3.3, 4.4)]]
    matches = [Match(n, n // 2, len(game), None) for n, game in enumerate(points)]
    for m, game in zip(matches, points):
        m.played = [Round(pair, 200, None) for pair in game]
    learners = [(m, seat) for m in matches for seat in (0, 1)]

    def advantage(m, seat, t, whose):
        def G(n):  # each seat has a baseline of its own
            who = seat if whose == "own" else 1 - seat
            return sum(.9 ** (k - t) * points[n][k][who] / 100 for k in range(t, len(points[n])))

        others = [G(n) for n, game in enumerate(points)
                  if n != m.number and t < len(game) and (baseline == "batch" or n // 2 == m.deal)]
        return G(m.number) - sum(others) / len(others) if others else 0.

    c = aa_minimal.Run.credit(argparse.Namespace(args=args), learners)
    for row, (m, seat) in zip(c.tolist(), learners):
        for t in range(m.rounds):
            past = sum(.9 ** (t - k) * advantage(m, seat, k, "own") for k in range(t))
            want = advantage(m, seat, t, "own") + .7 * .9 * past * advantage(m, seat, t, "other")
            assert row[t] == pytest.approx(want, abs=1e-5)


def torchrun(tmp_path, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen([*command, str(ROOT / "aa_minimal.py"), *flags], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_learn_otherwise_than_one(tmp_path):
    flags = [*SMALL, "--iterations", "3", "--micro-batch-tokens", "300"]
    assert aa_minimal.main([*flags, "--out", str(tmp_path / "one")]) == 0
    both = torchrun(tmp_path, *flags, "--out", "two")
    said, _ = both.communicate(timeout=500)
    assert both.returncode == 0, said[-2000:]
    assert said.count("before: agent") == 1, "only one process should print the table"
    for one, two in zip(timeless(tmp_path / "one"), timeless(tmp_path / "two"), strict=True):
        assert [*one] == [*two] and all(
            value == two[key] or value == pytest.approx(two[key], rel=1e-3, abs=1e-5) for key, value in one.items()), (one, two)
    one, two = (rollout.read_tensors(tmp_path / name / "adapter/adapter_model.safetensors")[0] for name in ("one", "two"))
    assert all((one[name] - two[name]).abs().mean() < 1e-4 for name in one)  # Adam makes steps of gradients that are but noise


@pytest.mark.skipif(not os.path.exists(f"/proc/self/task/{os.getpid()}/children"), reason="needs Linux to find the process")
@pytest.mark.parametrize("killed", ["0", "1", "torchrun"])
def test_a_dead_process_leaves_the_others_waiting_or_the_run_unreadable(tmp_path, killed):
    """Rank 0 or 1 is killed, or torchrun is told to end: then both finish their iteration, and save."""
    both = torchrun(tmp_path, *SMALL, "--iterations", "10000", "--save-every", "5", "--out", "run")
    log = tmp_path / "run/metrics.jsonl"
    try:
        end = time.monotonic() + 300
        while not log.exists() or log.read_text().count("\n") < 6:
            assert both.poll() is None, both.communicate()[0][-2000:]
            assert time.monotonic() < end
            time.sleep(.1)
        if killed == "torchrun":
            both.terminate()
        else:
            children = pathlib.Path(f"/proc/{both.pid}/task/{both.pid}/children").read_text().split()
            [pid] = [int(pid) for pid in children
                     if f"\0RANK={killed}\0" in pathlib.Path(f"/proc/{pid}/environ").read_text()]
            os.kill(pid, signal.SIGKILL)
        both.communicate(timeout=25)  # after 30 seconds torchrun would kill those that wait
        assert both.returncode not in (0, None)
    finally:
        both.terminate()
    done = log.read_text().count("\n")
    run = aa_minimal.resumed_run(["--resume", str(tmp_path / "run")], str(tmp_path / "run"))
    assert run.iteration == done if killed == "torchrun" else done - 5 <= run.iteration <= done
    assert run.step()["iteration"] == run.iteration - 1


def test_groups_that_cannot_be_shared_out_are_not_refused(monkeypatch):
    monkeypatch.setattr(aa_minimal, "WORLD", 2)
    for flags, word in ((["--games", "12", "--group-size", "4"], "divisible by 8,"), (["--baseline", "batch"], "torchrun")):
        with pytest.raises(aa_minimal.UserError, match=word):
            aa_minimal.parse(["--game", "ipd", *flags])
