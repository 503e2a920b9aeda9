"""The real command, as a user types it, and learning itself on a small budget."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


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
