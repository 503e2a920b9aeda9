"""The command as a user types it, what a run survives, and learning itself on a small budget."""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter

import peft
import pytest
import safetensors.torch
import torch

import aa_minimal
import tiny
from aa_minimal import (
    PRESETS,
    Run,
    Settings,
    check_update,
    draw_matches,
    parse,
    tabulate,
    write_transcript,
)
from eval import report
from games import GAMES, Game, Match, Round, Scripted, Side, matrix_game
from loss import CREDITS
from rollout import Policy

ROOT = pathlib.Path(aa_minimal.__file__).parent
TINY = ["--game", "ipd", "--model", "tiny"]
SMALL = [*TINY, "--games", "8", "--group_size", "4", "--rounds", "3", "--lr", "0.01"]
LEAST = [*TINY, "--games", "4", "--group_size", "2", "--rounds", "1"]
LENGTH = 13  # iterations of a run that holds two past selves


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the commands below: how sums are split over threads shows in the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(folder, *flags):
    """The command, as a process that can be stopped by Ctrl-C even where tests cannot."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "aa_minimal.py"), *flags],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def command(folder, *flags):
    """Exit code, output and error output of the command."""
    process = start(folder, *flags)
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


def main(*flags):
    """The exit code of the command with these flags, run in this process."""
    try:
        return report("aa_minimal", lambda: aa_minimal.main([str(flag) for flag in flags]))
    except SystemExit as stop:  # argparse has said what is wrong
        return stop.code


def error_lines(err):
    """Lines of the error output, less progress bars."""
    lines = [line.strip() for line in err.replace("\r", "\n").split("\n")]
    return [line for line in lines if line and not re.search(r"\d+%\||it/s", line)]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder):
    """The log without what differs from one run to the next."""
    lines = []
    for line in metrics(folder):
        lines.append({name: v for name, v in line.items() if not name.startswith("seconds_")})
    return lines


def files(folder):
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def checkpoints(folder):
    """The iterations after which there is a checkpoint."""
    return [int(path.name[-6:]) for path in sorted(folder.glob("checkpoint-*"))]


def newest(folder):
    return max(folder.glob("checkpoint-*"))


def adapter_config(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config | {"target_modules": sorted(config["target_modules"])}  # a set, in no order


def same_run(one, other):
    """Bit for bit, but for the time that things took."""
    assert timeless(one) == timeless(other)
    assert checkpoints(one) == checkpoints(other)
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        assert (newest(one) / name).read_bytes() == (newest(other) / name).read_bytes()
    assert adapter_config(newest(one)) == adapter_config(newest(other))
    for name in ("summary.json", *(path.name for path in other.glob("transcript-*"))):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing has happened to. Tests only read it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(*SMALL, "--iterations", LENGTH, "--out", folder) == 0
    return folder


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A copy of that run, to do something to."""
    shutil.copytree(undisturbed, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def hasty(monkeypatch):
    """Built-in models that have hardly learned anything, but are there in a few seconds."""
    lessons = {}
    for name, taught in tiny.LESSONS.items():
        lessons[name] = [taught[-1]._replace(rounds=2, steps=1)]
    monkeypatch.setattr(tiny, "LESSONS", lessons)


# ------------------------------------------------------------------------------- learning itself

LEARN = [
    *TINY,
    "--games",
    "64",
    "--group_size",
    "8",
    "--rounds",
    "6",
    "--seed",
    "3",
    "--lr",
    "0.003",
]


def cooperation(folder, algo, iterations):
    """How often a learner cooperated, by iteration."""
    flags = ["--algo", algo, "--beta", 2, "--gamma", 0.9, "--iterations", iterations]
    assert main(*LEARN, *flags, "--out", folder / algo) == 0
    return [line["cooperation"] for line in metrics(folder / algo)]


@pytest.fixture(scope="module")
def naive(tmp_path_factory):
    return cooperation(tmp_path_factory.mktemp("naive"), "naive", 12)


def test_naive_learners_learn_to_defect(naive):
    assert naive[0] > 0.4 and max(naive[-3:]) < 0.15


def test_learners_of_the_joint_return_learn_to_cooperate(tmp_path):
    seen = cooperation(tmp_path, "sum", 12)
    assert seen[0] < 0.8 and min(seen[-3:]) > 0.9


def test_alignment_ends_in_more_cooperation_than_naive_learning(tmp_path, naive):
    seen = cooperation(tmp_path, "aa_causal", 20)
    assert seen[0] == naive[0]
    assert min(seen[-3:]) > max(naive[-3:]) + 0.4


# ---------------------------------------------------------------------------- the command and flags


def test_the_same_command_typed_twice_gives_two_runs_with_the_same_numbers(tmp_path):
    flags = [*SMALL, "--iterations", "2", "--algo", "naive", "--seed", "5"]
    for _ in range(2):
        code, out, err = command(tmp_path, *flags)
        assert code == 0, err[-2000:]
        assert "tit_for_tat" in out and "runs/ipd-naive-s5" in out
        assert error_lines(err) == []
    first, second = tmp_path / "runs/ipd-naive-s5", tmp_path / "runs/ipd-naive-s5-2"
    assert sorted((tmp_path / "runs").iterdir()) == [first, second]
    same_run(first, second)


def test_a_run_writes_settings_metrics_transcripts_and_a_summary(undisturbed):
    wanted = {"entropy", "kl", "grad_norm", "ratio_max", "sampled_tokens", "zero_credit"}
    wanted |= {"iteration", "points", "points_other", "welfare", "cooperation", "p_c_first"}
    wanted |= {"seconds_play", "seconds_update"}
    for n, line in enumerate(metrics(undisturbed)):
        assert line["iteration"] == n and wanted <= set(line)
        assert line["ratio_max"] == pytest.approx(1, abs=1e-3)
        assert line["grad_norm"] > 0
    assert n == LENGTH - 1
    # One token a round: of the first group both seats learn, of the second one the seat that
    # does not meet a past self.
    assert {line["sampled_tokens"] for line in metrics(undisturbed)} == {3 * (8 + 4)}
    config = json.loads((undisturbed / "config.json").read_text())
    assert (config["game"], config["iterations"], config["lr"]) == ("ipd", LENGTH, 0.01)
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert set(summary) == {"untrained", "trained", "failed"} and not summary["failed"]
    assert set(summary["trained"]) > {"untrained", "trained", "random", "grim"}
    names = [path.name for path in sorted(undisturbed.glob("transcript-*"))]
    assert names == [f"transcript-{n:06d}.txt" for n in (0, 10, LENGTH - 1)]


def test_a_transcript_holds_two_whole_games_with_control_characters_spelled_out(tmp_path):
    live, other = object(), object()
    first, last = Match(0, 0, 2, (live, live)), Match(1, 1, 1, (other, live))
    first.log = [(0, "Choose.", "A"), (1, "Choose.", "B\x1b[2J")]
    first.history = [Round((0, 5), 6, None, None), Round((3, 3), 6, None, None)]
    last.log, last.history = [(0, "Well?", "A")], [Round((1, 1), 6, None, None)]
    write_transcript(
        types.SimpleNamespace(folder=tmp_path), 7, [first, Match(9, 9, 1, None), last], live
    )
    text = (tmp_path / "transcript-000007.txt").read_text()
    assert [line for line in text.split("\n") if line] == [
        "to player 1 (trained): Choose.",
        "PLAYER 1: A",
        "to player 2 (trained): Choose.",
        "PLAYER 2: B\\x1b[2J",
        "points by round: 0.0 5.0, 3.0 3.0",
        "to player 1 (opponent): Well?",
        "PLAYER 1: A",
        "points by round: 1.0 1.0",
    ]


@pytest.mark.parametrize("model", ["tiny", "some/model"])
@pytest.mark.parametrize("game", GAMES)
def test_help_prints_the_defaults_of_the_game_and_model_given(capsys, game, model):
    assert main("--game", game, "--model", model, "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    for name, value in PRESETS.get(game, PRESETS["matrix"])[model == "tiny"].items():
        assert re.search(rf" --{name} .*?\(default: (.*?)\)", said)[1] == str(value), name


def test_help_needs_no_model_and_leaves_nothing_behind(tmp_path):
    code, out, err = command(tmp_path, "--model", "tiny", "--game", "ipd", "--help")
    assert (code, err) == (0, "") and out.startswith("usage: aa_minimal.py")
    assert list(tmp_path.iterdir()) == []


def test_every_game_has_defaults_that_make_sense_for_both_kinds_of_models():
    assert set(PRESETS) - {"matrix"} < set(GAMES)
    fields = Settings.__dataclass_fields__
    for game, model in itertools.product(GAMES, ("tiny", "some/model")):
        preset = PRESETS.get(game, PRESETS["matrix"])[model == "tiny"]
        assert set(preset) <= set(fields)
        settings = parse(["--game", game, "--model", model])
        assert {name: getattr(settings, name) for name in preset} == preset
        given = parse(["--game", game, "--model", model, "--lr", "0.5", "--group-size", "2"])
        assert (given.lr, given.group_size, given.gamma) == (0.5, 2, settings.gamma)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--game", "chess"], "chess"),
        (["--algo", "ppo"], "ppo"),
        (["--baseline", "none"], "none"),
        (["--games", "10", "--group_size", "4"], "no multiple of --group_size 4"),
        (["--rounds", "0"], "--rounds 0"),
        (["--iterations", "0"], "--iterations 0"),
        (["--lora_rank", "0"], "--lora_rank 0"),
        (["--games_at_once", "0"], "--games_at_once 0"),
        (["--micro_batch_tokens", "0"], "--micro_batch_tokens 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--buffer", "-1"], "--buffer -1"),
        (["--gamma", "1.5"], "1.5"),
        (["--continue_prob", "-1"], "-1"),
        (["--lr", "nan"], "nan"),
        (["--gamma", "nan"], "nan"),
        (["--lr", "inf"], "--lr"),
        (["--seed", str(10**20)], "--seed"),
        (["--lr", "x"], "x"),
        (["--games", "many"], "many"),
        (["--banana"], "banana"),
        (["--resume"], "--resume"),
    ],
)
def test_wrong_flags_end_in_argparses_line_and_overwrite_nothing(
    tmp_path, monkeypatch, capsys, flags, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("precious")
    assert main(*LEAST, "--iterations", 1, *flags) == 2
    error = error_lines(capsys.readouterr().err)[-1]
    assert ": error: " in error and says in error
    assert files(tmp_path) == {"taken/config.json": b"precious"}


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--opponent", "nobody"], "nobody"),
        (["--opponent", "cooperate", "liar"], "liar"),
        (["--model", "empty"], "empty"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", "empty"], "empty"),
        (["--out", "file/run"], "file/run"),
    ],
)
def test_what_cannot_be_had_is_named_in_one_line(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("precious")
    assert main(*LEAST, "--iterations", 1, *flags) == 2
    [error] = error_lines(capsys.readouterr().err)
    assert error.startswith("aa_minimal: ") and says in error
    assert files(tmp_path) == {"file": b"precious"}


@pytest.mark.parametrize(
    "flags, says",
    [(["--games", "3", "--group_size", "2"], "error: "), (["--model", "no/model"], "no/model")],
)
def test_a_command_that_cannot_run_ends_with_code_2_and_no_traceback(tmp_path, flags, says):
    code, _, err = command(tmp_path, *LEAST, *flags)
    assert code == 2 and says in error_lines(err)[-1]
    assert "Traceback" not in err and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_is_left_alone_and_the_run_lies_beside_it(tmp_path):
    (tmp_path / "taken").mkdir()
    assert main(*SMALL, "--iterations", 1, "--out", f"{tmp_path}/taken/") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "taken-2"}
    assert not list((tmp_path / "taken").iterdir())


# ------------------------------------------------------------------------------ going on with a run


@pytest.mark.parametrize("first", [3, 10, 12])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, undisturbed, first):
    assert main(*SMALL, "--iterations", first, "--out", tmp_path / "run") == 0
    assert main("--resume", tmp_path / "run", "--iterations", LENGTH) == 0
    (
        tmp_path / "run" / f"transcript-{first - 1:06d}.txt"
    ).unlink()  # the last one of the first part
    same_run(tmp_path / "run", undisturbed)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["iterations"] == LENGTH


def test_other_seeds_play_other_games(tmp_path, undisturbed):
    assert main(*SMALL, "--iterations", 2, "--seed", 1, "--out", tmp_path / "run") == 0
    for line, other in zip(timeless(tmp_path / "run"), timeless(undisturbed)):
        assert line != other


def test_a_run_that_is_done_can_be_resumed_and_stays_as_it_is(copied, undisturbed):
    assert main("--resume", copied) == 0
    same_run(copied, undisturbed)


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "1"],
        ["--lr", "1"],
        ["--game", "chicken"],
        ["--algo", "naive"],
        ["--iterations", "5"],
        ["--opponent", "defect"],
        ["--out", "elsewhere"],
        ["--snapshot_every", "2"],
    ],
)
def test_resume_refuses_flags_that_contradict_the_run(copied, capsys, flags):
    before = files(copied)
    assert main("--resume", copied, *flags) == 2
    error = error_lines(capsys.readouterr().err)[-1]
    assert flags[0] in error and str(copied) in error
    assert files(copied) == before


@pytest.mark.parametrize("flag", ["--resum", "--res"])
def test_a_shortened_resume_does_not_go_around_the_settings_of_the_run(copied, flag):
    before = files(copied)
    assert main(*SMALL, "--seed", 1, "--iterations", LENGTH + 1, flag, copied) == 2
    assert files(copied) == before


def test_resume_takes_more_iterations_and_what_only_changes_memory(copied, undisturbed):
    changed = {"iterations": LENGTH + 1, "micro_batch_tokens": 500, "games_at_once": 3}
    flags = [(f"--{name}", value) for name, value in changed.items()]
    assert main("--resume", copied, *itertools.chain(*flags)) == 0
    config = json.loads((copied / "config.json").read_text())
    assert config == json.loads((undisturbed / "config.json").read_text()) | changed
    assert timeless(copied)[:LENGTH] == timeless(undisturbed)
    assert len(metrics(copied)) == LENGTH + 1


@pytest.mark.parametrize("tail", ["", '{"iteration": 15, "poi', "\0\0\0"])
def test_a_log_is_cut_back_to_the_checkpoint_that_a_run_goes_on_from(copied, undisturbed, tail):
    with open(copied / "metrics.jsonl", "a") as log:
        log.write(f'{{"iteration": {LENGTH}, "points": 99}}\n{{"iteration": {LENGTH + 1}}}\n{tail}')
    assert main("--resume", copied, "--iterations", LENGTH + 1) == 0
    seen = timeless(copied)
    assert [line["iteration"] for line in seen] == list(range(LENGTH + 1))
    assert seen[:LENGTH] == timeless(undisturbed) and seen[LENGTH]["points"] <= 5


def test_a_run_resumes_from_files_with_the_line_ends_of_windows(copied, undisturbed):
    for name in ("config.json", "metrics.jsonl"):
        text = (copied / name).read_bytes()
        (copied / name).write_bytes(text.replace(b"\n", b"\r\n"))
    assert main("--resume", copied, "--iterations", LENGTH + 1) == 0
    assert timeless(copied)[:LENGTH] == timeless(undisturbed)


def test_a_run_that_is_under_way_is_not_resumed_beside_it(copied, capsys):
    run = Run(parse(["--resume", str(copied), "--iterations", str(LENGTH + 1)]))
    before = files(copied)
    assert main("--resume", copied, "--iterations", LENGTH + 1) == 2
    assert f"{copied} is in use" in error_lines(capsys.readouterr().err)[-1]
    assert files(copied) == before
    del run
    assert main("--resume", copied, "--iterations", LENGTH + 1) == 0


def test_a_run_of_a_game_that_games_lacks_is_not_resumed(copied, capsys):
    text = (copied / "config.json").read_text()
    (copied / "config.json").write_text(text.replace('"game": "ipd"', '"game": "public_goods"'))
    before = files(copied)
    assert main("--resume", copied, "--iterations", LENGTH + 1) == 2
    assert f"{copied}/config.json does not fit" in error_lines(capsys.readouterr().err)[-1]
    assert files(copied) == before


@pytest.mark.parametrize("flags", [["--micro_batch_tokens", 1], ["--games_at_once", 3]])
def test_what_only_changes_memory_does_not_change_the_numbers(tmp_path, undisturbed, flags):
    assert main(*SMALL, *flags, "--iterations", 3, "--out", tmp_path / "run") == 0
    for line, other in zip(timeless(tmp_path / "run"), timeless(undisturbed)):
        assert list(line) == list(other)
        for name, value in other.items():
            close = value if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)
            assert line[name] == close, name


DAMAGE = {
    "halved": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "other text": lambda data: b"precious\n",
    "a list": lambda data: b"[1, 2]\n",
    "an empty object": lambda data: b"{}\n",
    "zeros": lambda data: bytes(len(data)),
}
RUN_FILES = ["config.json", "metrics.jsonl"]
CHECKPOINT_FILES = ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt"]


@pytest.mark.parametrize("damage", [*DAMAGE, "missing", "a folder"])
@pytest.mark.parametrize("name", [*RUN_FILES, *CHECKPOINT_FILES])
def test_a_damaged_run_is_refused_in_one_line_and_left_as_it_is(copied, capsys, name, damage):
    path = copied / name if name in RUN_FILES else newest(copied) / name
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(DAMAGE[damage](data))
    before = files(copied)
    assert main("--resume", copied, "--iterations", LENGTH + 1) == 2
    error = error_lines(capsys.readouterr().err)[-1]
    assert str(path if name in RUN_FILES else newest(copied)) in error
    assert files(copied) == before


def test_a_damaged_past_self_is_named_and_the_run_goes_on_once_it_is_restored(
    copied, undisturbed, capsys
):
    for iteration in (0, 10):
        path = copied / f"checkpoint-{iteration:06d}" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    assert main("--resume", copied, "--iterations", LENGTH + 1) == 2
    assert "checkpoint-0000" in error_lines(capsys.readouterr().err)[-1]
    for iteration in (0, 10):
        name = f"checkpoint-{iteration:06d}/adapter_model.safetensors"
        shutil.copy(undisturbed / name, copied / name)
    assert main("--resume", copied, "--iterations", LENGTH + 1) == 0
    assert timeless(copied)[:LENGTH] == timeless(undisturbed)


def test_a_run_that_is_killed_loses_nothing_but_the_iteration_in_flight(tmp_path, undisturbed):
    chance = random.Random(0)
    for n in range(int(os.environ.get("AA_KILLS", 2))):
        folder = tmp_path / f"run{n}"
        flags = [*SMALL, "--iterations", str(LENGTH), "--out", folder.name]
        for _ in range(3):
            process = start(tmp_path, *flags)
            assert folder.name in process.stdout.readline()  # from here on it plays
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
            process.communicate()
            whole_lines = (folder / "metrics.jsonl").read_text().count("\n")
            assert max(checkpoints(folder)) >= whole_lines - 1
            flags = ["--resume", folder.name]
        assert main("--resume", folder) == 0
        same_run(folder, undisturbed)
        left_over = {path.name for path in folder.iterdir()} - {
            p.name for p in undisturbed.iterdir()
        }
        assert left_over == set()


def test_ctrl_c_names_the_command_that_goes_on(tmp_path):
    process = start(tmp_path, *SMALL, "--iterations", "500", "--out", "run")
    assert "run" in process.stdout.readline()
    while process.poll() is None and len(checkpoints(tmp_path / "run")) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, error_lines(err)
    error = error_lines(err)[-1]
    found = re.search(r"python aa_minimal.py (--resume run) goes on", error)
    assert found, error
    done = max(checkpoints(tmp_path / "run"))
    assert done >= 1
    settings = json.loads((tmp_path / "run" / "config.json").read_text()) | {"iterations": done + 1}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    with contextlib.chdir(tmp_path):
        assert main(*found[1].split()) == 0
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == list(range(done + 1))


@contextlib.contextmanager
def largest_file(size):
    """No file can grow over `size` bytes: what is written beyond is refused, as by a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("fails", ["metrics.jsonl", *CHECKPOINT_FILES[::2]])
def test_a_full_disk_ends_a_run_in_one_line_and_it_can_go_on_later(
    tmp_path, undisturbed, capsys, fails
):
    folder = tmp_path / "run"
    assert main(*SMALL, "--iterations", 2, "--out", folder) == 0
    path = folder / fails if fails == "metrics.jsonl" else newest(folder) / fails
    capsys.readouterr()
    with largest_file(path.stat().st_size - 100):
        assert main("--resume", folder, "--iterations", LENGTH) == 2
    [error] = error_lines(capsys.readouterr().err)
    assert error.startswith("aa_minimal: ")
    assert max(checkpoints(folder)) == 2
    assert main("--resume", folder, "--iterations", LENGTH) == 0
    (folder / "transcript-000001.txt").unlink()  # the last one of the first part
    same_run(folder, undisturbed)


# ------------------------------------------------------------------------- checkpoints and adapters


@pytest.mark.parametrize(
    "iterations, buffer, kept",
    [
        (3, 30, [0, 3]),
        (23, 30, [0, 10, 20, 23]),
        (23, 2, [10, 20, 23]),
        (20, 1, [20]),
        (11, 0, [11]),
    ],
)
def test_checkpoints_are_those_of_past_selves_and_the_newest(tmp_path, iterations, buffer, kept):
    flags = ["--iterations", iterations, "--buffer", buffer]
    assert main(*LEAST, *flags, "--out", tmp_path / "run") == 0
    assert checkpoints(tmp_path / "run") == kept
    optimizers = [path.parent.name for path in (tmp_path / "run").rglob("optimizer.pt")]
    assert optimizers == [f"checkpoint-{iterations:06d}"]
    assert not list((tmp_path / "run").glob("unfinished*"))


def test_peft_alone_loads_the_adapter_of_a_run(undisturbed):
    base = tiny.load_built_in("tiny", "ipd")[0]
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = base(ids).logits
        alone = peft.PeftModel.from_pretrained(base, newest(undisturbed)).eval()(ids).logits
        run = Run(parse(["--resume", str(undisturbed)]))
        ours = run.llm.model(ids).logits
    assert torch.allclose(alone, ours, atol=1e-4)
    assert (alone - plain).abs().max() > 0.1


@pytest.fixture
def of_another_prior(tmp_path, hasty, monkeypatch):
    """A run whose adapter stands on another built-in model."""
    flags = ["--prior_seed", 1, "--iterations", 1, "--out", tmp_path / "other"]
    assert main(*LEAST, *flags) == 0
    monkeypatch.undo()
    return tmp_path / "other"


@pytest.mark.parametrize("other, more", [("tiny-blind", 1), ("a folder", 1), ("a folder", 0)])
def test_a_run_goes_on_with_the_same_weights_in_another_place_only(copied, capsys, other, more):
    base, tokenizer = tiny.load_built_in("tiny", "ipd", 0)
    base.save_pretrained(copied.parent / "moved")
    tokenizer.save_pretrained(copied.parent / "moved")
    place = copied.parent / "moved" if other == "a folder" else other
    before = files(copied)
    code = main("--resume", copied, "--model", place, "--iterations", LENGTH + more)
    if other == "a folder":
        assert code == 0 and len(metrics(copied)) == LENGTH + more
        assert json.loads((copied / "config.json").read_text())["model"] == str(place)
    else:
        error = error_lines(capsys.readouterr().err)[-1]
        assert code == 2 and "other weights" in error and str(copied) in error
        assert files(copied) == before


def test_an_adapter_of_another_model_is_refused(of_another_prior, copied, capsys):
    capsys.readouterr()
    flags = ["--out", copied.parent / "new", "--opponent", of_another_prior]
    assert main(*LEAST, *flags) == 2
    [error] = error_lines(capsys.readouterr().err)
    assert str(of_another_prior) in error and "stands on" in error
    assert not (copied.parent / "new").exists()

    for name in (*CHECKPOINT_FILES[:2], "base.txt"):
        shutil.copy(newest(of_another_prior) / name, newest(copied) / name)
    before = files(copied)
    assert main("--resume", copied, "--iterations", LENGTH + 1) == 2
    [error] = error_lines(capsys.readouterr().err)
    assert str(newest(copied)) in error and "stands on" in error
    assert files(copied) == before


@pytest.mark.parametrize("game", ["trust_split", "split"])
def test_games_of_words_and_numbers_are_played_and_learned_from(tmp_path, hasty, game):
    flags = ["--iterations", 2, "--kl", 0.1, "--max_message_tokens", 6]
    assert main(*LEAST, *flags, "--game", game, "--out", tmp_path / "run") == 0
    first, second = metrics(tmp_path / "run")
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-6
    assert first["entropy"] > 0 and first["grad_norm"] > 0
    assert first["ratio_max"] == pytest.approx(1, abs=1e-2)
    assert GAMES[game].headline in first


# ------------------------------------------------------------------------ opponents, rounds, groups


def drawn(iteration=0, opponents=None, past=(), **settings):
    """(matches, live): those of an iteration of a run that has these past selves. opponents: {name:
    Player} as given by --opponent, "self" in it stands for the learner."""
    adapters = []
    llm = types.SimpleNamespace(load_adapter=lambda *what: adapters.append(what))
    made = parse(["--game", "ipd", "--model", "tiny"])
    vars(made).update(settings, opponent=list(opponents) if opponents else None)
    players = {name: player for name, player in (opponents or {}).items() if name != "self"}
    run = types.SimpleNamespace(settings=made, iteration=iteration, opponents=players)
    run.llm, run.past_selves, run.folder = llm, lambda: list(past), pathlib.Path("run")
    live = Policy(llm)
    matches = draw_matches(run, live)
    folders = {name: int(folder.name.removeprefix("checkpoint-")) for folder, name in adapters}
    assert len(folders) == len(adapters)  # each under a name of its own, and once
    return matches, live, folders


@pytest.mark.parametrize("iteration", [0, 1])
def test_games_of_a_group_share_deal_opponent_seats_and_rounds(iteration):
    settings = dict(games=120, group_size=6, continue_prob=0.7)
    matches, live, _ = drawn(iteration, past=[0, 10, 20], **settings)
    assert [match.number for match in matches] == list(range(120))
    assert [match.deal for match in matches] == [n // 6 for n in range(120)]
    for g in range(20):
        group = matches[6 * g : 6 * g + 6]
        assert len({(match.players, match.rounds) for match in group}) == 1
        assert live in group[0].players
        other = group[0].players[1] if (g + iteration) % 2 == 0 else group[0].players[0]
        assert (other is live) == (g < 10)


def test_past_selves_are_drawn_from_all_that_are_kept():
    matches, live, folders = drawn(past=[10, 20, 30], games=120, group_size=2)
    met = Counter()
    for match in matches:
        for player in match.players:
            if player is not live:
                met[folders[player.adapter]] += 1
    assert set(met) == {10, 20, 30} and sum(met.values()) == 60 and min(met.values()) >= 8


def test_without_past_selves_the_learner_meets_itself():
    matches, live, folders = drawn(games=8, group_size=2)
    assert {match.players for match in matches} == {(live, live)} and not folders


@pytest.mark.parametrize(
    "iteration, every, buffer, want",
    [
        (0, 10, 30, [0]),
        (9, 10, 30, [0]),
        (10, 10, 30, [0, 10]),
        (10, 5, 30, [0, 5, 10]),
        (35, 10, 2, [20, 30]),
        (35, 5, 2, [30, 35]),
        (35, 10, 0, []),
        (40, 10, 1, [40]),
    ],
)
def test_past_selves_are_the_newest_that_were_kept(iteration, every, buffer, want):
    settings = types.SimpleNamespace(buffer=buffer, snapshot_every=every)
    assert Run.past_selves(types.SimpleNamespace(iteration=iteration, settings=settings)) == want


def test_opponents_are_drawn_by_group_and_take_the_place_of_past_selves():
    pool = {"cooperate": Scripted("cooperate"), "defect": Scripted("defect")}
    matches, live, folders = drawn(opponents=pool, past=[0, 10], games=80, group_size=2)
    assert not folders
    met = Counter()
    for one, two in zip(matches[::2], matches[1::2]):
        assert one.players == two.players and one.players.count(live) == 1
        seat = one.players.index(live)
        assert seat == one.deal % 2
        met[one.players[1 - seat]] += 1
    assert set(met) == set(pool.values()) and min(met.values()) >= 8


def test_self_among_the_opponents_is_self_play():
    pool = {"self": None, "defect": Scripted("defect")}
    matches, live, _ = drawn(opponents=pool, past=[0, 10], games=80, group_size=2)
    met = Counter(match.players.count(live) for match in matches)
    assert set(met) == {1, 2} and min(met.values()) >= 16
    others = {player for match in matches for player in match.players} - {live}
    assert others == {pool["defect"]}


def test_another_iteration_or_seed_draws_other_opponents_and_rounds():
    draw = functools.partial(drawn, past=[0, 10, 20], games=80, group_size=2, continue_prob=0.8)

    def what(iteration, seed):
        matches, _, folders = draw(iteration, seed=seed)
        return [match.rounds for match in matches], list(folders.values())

    assert what(2, 0) == what(2, 0)
    assert what(2, 0)[0] != what(4, 0)[0] != what(4, 1)[0]


def test_rounds_end_with_the_probability_asked_for():
    matches, _, _ = drawn(games=4000, group_size=2, rounds=4, continue_prob=0.75)
    count = Counter(match.rounds for match in matches[::2])
    assert set(count) == {1, 2, 3, 4}
    for rounds, want in ((1, 1 / 4), (2, 3 / 16), (3, 9 / 64), (4, 27 / 64)):
        assert count[rounds] / 2000 == pytest.approx(want, abs=0.05)
    for probability, rounds in ((0.0, 1), (1.0, 4)):
        matches, _, _ = drawn(games=8, group_size=2, rounds=4, continue_prob=probability)
        assert {match.rounds for match in matches} == {rounds}


def test_a_run_learns_from_games_of_unequal_length(tmp_path):
    flags = ["--games", 32, "--rounds", 6, "--continue_prob", 0.5, "--iterations", 2]
    assert main(*SMALL, *flags, "--out", tmp_path / "run") == 0
    for line in metrics(tmp_path / "run"):
        assert 32 < line["sampled_tokens"] < 6 * 48 and line["grad_norm"] > 0


def test_a_run_learns_against_scripted_players_in_the_other_seat(tmp_path):
    flags = ["--opponent", "cooperate", "defect", "--iterations", 2, "--out", tmp_path / "run"]
    assert main(*SMALL, *flags) == 0
    for line in metrics(tmp_path / "run"):
        assert line["sampled_tokens"] == 8 * 3  # one seat of every game
    flags = ["--opponent", "defect", "--iterations", 1, "--out", tmp_path / "defect"]
    assert main(*SMALL, *flags) == 0
    [line] = metrics(tmp_path / "defect")
    assert line["points"] <= 1 <= line["points_other"]
    assert line["points"] == pytest.approx(1 - line["cooperation"])


def test_half_a_pool_may_be_self_play(tmp_path):
    flags = ["--opponent", "self", "defect", "--games", 32, "--iterations", 2]
    assert main(*SMALL, *flags, "--out", tmp_path / "run") == 0
    for line in metrics(tmp_path / "run"):
        sides = line["sampled_tokens"] / 3
        assert 32 < sides < 64  # both seats of some games, one of the others


def test_an_opponent_that_is_a_run_plays_but_does_not_learn(tmp_path, undisturbed):
    flags = ["--opponent", undisturbed, "--iterations", 2, "--out", tmp_path / "run"]
    run = Run(parse([str(flag) for flag in (*SMALL, *flags)]))
    aa_minimal.train(run)
    [opponent] = run.opponents.values()
    held = peft.get_peft_model_state_dict(run.llm.model, adapter_name=opponent.adapter)
    saved = safetensors.torch.load_file(newest(undisturbed) / "adapter_model.safetensors")
    assert set(held) == set(saved) and all(torch.equal(held[name], saved[name]) for name in saved)
    assert opponent.episodes and metrics(tmp_path / "run")[0]["sampled_tokens"] == 8 * 3
    learned = safetensors.torch.load_file(newest(tmp_path / "run") / "adapter_model.safetensors")
    assert any((learned[name] - saved[name]).abs().max() > 1e-3 for name in saved)


def test_the_learning_rate_halves_as_often_as_asked_also_across_a_resume(tmp_path, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def noted(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    flags = ["--lr", 0.008, "--lr_half", 2, "--out", tmp_path / "run"]
    assert main(*LEAST, "--iterations", 3, *flags) == 0
    assert main("--resume", tmp_path / "run", "--iterations", 5) == 0
    assert rates == pytest.approx([0.008, 0.008 / 2**0.5, 0.004, 0.004 / 2**0.5, 0.002])
    rates.clear()
    assert main(*LEAST, "--iterations", 3, "--lr", 0.008, "--out", tmp_path / "other") == 0
    assert rates == [0.008] * 3  # by default it stays


def test_a_baseline_of_the_whole_batch_needs_no_groups(tmp_path):
    flags = ["--baseline", "batch", "--group_size", 1, "--iterations", 2, "--out", tmp_path / "run"]
    assert main(*SMALL, *flags) == 0
    for line in metrics(tmp_path / "run"):
        assert line["zero_credit"] < 1 and line["grad_norm"] > 0


# ----------------------------------------------------------------------------------- credit, update


def played(number, deal, *points):
    """A match of which only the points are known, a pair per round."""
    match = Match(number, deal, len(points), None)
    match.history = [Round(pair, 10, None, None) for pair in points]
    return match


@pytest.mark.parametrize(
    "baseline, groups", [("group", [6, 7, 6, 11]), ("batch", [0, 1, 0, 1])], ids=["group", "batch"]
)
def test_tables_of_rewards_are_those_written_by_hand(baseline, groups):
    one, two, three = (
        played(0, 3, (1, 2), (4, 6)),
        played(1, 3, (5, 0)),
        played(2, 5, (7, 8), (9, 1)),
    )
    sides = [Side(one, 0), Side(one, 1), Side(two, 0), Side(three, 1)]
    own, other, was_played, group = tabulate(sides, 2, baseline)
    assert own.tolist() == [[0.5, 2], [1, 3], [2.5, 0], [4, 0.5]]
    assert other.tolist() == [[1, 3], [0.5, 2], [0, 0], [3.5, 4.5]]
    assert was_played.tolist() == [[1, 1], [1, 1], [1, 0], [1, 1]]
    same = [[a == b for b in groups] for a in groups]
    assert (group[:, None] == group[None, :]).tolist() == same


def test_an_update_may_be_off_by_rounding():
    check_update(torch.tensor([1.0, 1.01, 0.97]), 3.0)
    check_update(torch.tensor([0.75, 1.3] * 50), 0.0)


@pytest.mark.parametrize(
    "ratio, grad_norm",
    [
        ([1.0, 1.0], float("nan")),
        ([1.0, 1.0], float("inf")),
        ([1.0, float("nan")], 1.0),
        ([1.0, 0.0], 1.0),
        ([1.5, 1.5], 1.0),
        ([0.6, 0.6], 1.0),
        ([1.6, 0.6], 1.0),
    ],
)
def test_an_update_that_went_wrong_stops_the_run(ratio, grad_norm):
    with pytest.raises(tiny.UserError, match="--lr"):
        check_update(torch.tensor(ratio), grad_norm)


@pytest.mark.parametrize("odd", [4.5, 0.2])
def test_a_single_token_that_is_far_off_is_warned_of_once(capsys, odd):
    aa_minimal.warn.cache_clear()
    ratio = torch.tensor([1.0] * 50 + [3.9])
    check_update(ratio, 1.0)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        check_update(torch.tensor([1.0] * 50 + [odd]), 1.0)
    assert capsys.readouterr().err.count("4 times") == 1


def test_nothing_is_learned_from_numbers_that_went_wrong(copied, monkeypatch, capsys):
    before, policy_loss = files(copied), aa_minimal.policy_loss

    def broken(*args, **more):
        loss, ratio = policy_loss(*args, **more)
        return loss * float("nan"), ratio

    monkeypatch.setattr(aa_minimal, "policy_loss", broken)
    assert main("--resume", copied, "--iterations", LENGTH + 1) == 2
    assert "went wrong" in error_lines(capsys.readouterr().err)[-1]
    assert files(copied) == before


def test_games_that_teach_nothing_are_warned_of_once(tmp_path, monkeypatch, capsys):
    aa_minimal.warn.cache_clear()
    alike = functools.partial(matrix_game, dict.fromkeys(("CC", "CD", "DC", "DD"), (1, 1)))
    monkeypatch.setitem(GAMES, "ipd", Game(alike, scale=5))  # 0.2, which no sum has exactly
    flags = ["--games", 16, "--group_size", 8, "--iterations", 3, "--out", tmp_path / "run"]
    assert main(*LEAST, *flags) == 0
    assert capsys.readouterr().err.count("ended alike") == 1
    assert [line["zero_credit"] for line in metrics(tmp_path / "run")] == [1, 1, 1]


def test_a_gradient_of_zero_is_warned_of(tmp_path, monkeypatch, capsys):
    aa_minimal.warn.cache_clear()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(0.0))
    assert main(*LEAST, "--iterations", 1, "--out", tmp_path / "run") == 0
    assert "nothing to learn from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--games", 4, "--group_size", 4], True),
        (["--games", 4, "--group_size", 2], False),
        (["--games", 4, "--group_size", 4, "--buffer", 0], False),
        (["--games", 4, "--group_size", 4, "--opponent", "defect"], False),
    ],
)
def test_one_group_that_meets_no_past_selves_is_told_of(tmp_path, capsys, flags, told):
    aa_minimal.warn.cache_clear()
    assert main(*LEAST, *flags, "--iterations", 1, "--out", tmp_path / "run") == 0
    assert ("past selves are not met" in capsys.readouterr().err) == told


def test_running_out_of_memory_names_what_to_lower(tmp_path, monkeypatch, capsys):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(aa_minimal, "score", out_of_memory)
    assert main(*LEAST, "--iterations", 1, "--out", tmp_path / "run") == 2
    [error] = error_lines(capsys.readouterr().err)
    assert "--games_at_once" in error and "--micro_batch_tokens" in error


# --------------------------------------------------------------------------------------- imitation


def said_by_a_defector(run):
    """Log-prob per token that a run's agent gives to the replies of a defector who is paid back."""
    lesson = tiny.Lesson({"tit_for_tat": 0.5, "defect": 0.5}, 0.0, 3, 0)
    chats = [chat for chat in tiny.conversations(lesson, "ipd", 40, 7) if chat[1::2] == list("BBB")]
    pairs = run.llm.framing.dialogue(chats[0])
    ids, replies = torch.tensor(pairs).T
    with torch.no_grad(), run.llm.using("default"):
        hidden = run.llm.decoder(ids[None]).last_hidden_state[0, :-1]
        logp = run.llm.logits(hidden).log_softmax(-1)
    return logp.gather(1, ids[1:, None])[replies[1:] == 1].mean().item()


def test_imitation_teaches_the_adapter_before_the_first_iteration_and_once(tmp_path, monkeypatch):
    defectors = tiny.Lesson({"defect": 1.0}, 0.05, 3, 1)
    monkeypatch.setitem(aa_minimal.LESSONS, ("adapter", "matrix"), [defectors])
    flags = [*TINY, "--rounds", "3", "--games", "4", "--group_size", "2"]
    plain = Run(parse([*flags, "--out", str(tmp_path / "plain")]))
    taught = Run(parse([*flags, "--imitate", "40", "--out", str(tmp_path / "taught")]))
    said, folder = said_by_a_defector(taught), taught.folder
    assert said > said_by_a_defector(plain) + 0.05
    first = taught.folder / "checkpoint-000000" / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(first)
    assert max(value.abs().max() for name, value in weights.items() if "lora_B" in name) > 0
    del taught  # and its lock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aa_minimal, "imitate", None)  # when a run goes on it is not called
        again = Run(parse(["--resume", str(folder)]))
    assert said_by_a_defector(again) == pytest.approx(said)


def test_an_adapter_is_taught_all_its_lessons_on_games_no_longer_than_its_run(
    tmp_path, monkeypatch
):
    rules, last = aa_minimal.LESSONS["adapter", "trust_split"]
    assert (rules.shares, rules.noise, rules.steps) == ({"cooperate": 1.0}, 0, 5 * last.steps)
    assert {"tit_for_tat", "defect", "liar"} < last.shares.keys() and last.greed
    monkeypatch.setitem(aa_minimal.LESSONS, ("adapter", "matrix"), [rules, last])
    seen = {}

    def record(*args, **more):
        seen.update(game=args[4], lessons=args[5])

    monkeypatch.setattr(aa_minimal, "imitate", record)
    flags = [*TINY, "--imitate", "7", "--rounds", "3"]
    Run(parse([*flags, "--out", str(tmp_path / "run")]))
    want = [rules._replace(steps=35, rounds=2), last._replace(steps=7, rounds=3)]
    assert (rules.rounds, last.rounds) == (2, 10)
    assert seen == {"game": "ipd", "lessons": want}
    assert aa_minimal.LESSONS["adapter", "matrix"] == [rules, last]


def test_naive_and_joint_learners_have_no_past_selves_and_no_bonus_unless_a_table_asks_for_them():
    """Their settings differ from those of the other credits in nothing else."""
    real, split = ["--game", "ipd", "--model", "some/model"], ["--game", "split", "--model", "tiny"]
    for algo in CREDITS:
        published = dict(buffer=0, entropy=0.0) if algo in ("naive", "sum") else {}
        for flags in (real, split, TINY):
            more = {"algo": algo} | (published if flags != TINY else {})
            assert vars(parse([*flags, "--algo", algo])) == vars(parse(flags)) | more
            assert parse([*flags, "--algo", algo, "--buffer", "5"]).buffer == 5
    imitating = parse([*real, "--imitate", "25", "--algo", "naive"])
    assert imitating.entropy == aa_minimal.IMITATING["entropy"]
    talking = parse(["--game", "trust_split", "--model", "tiny", "--algo", "naive"])
    assert (talking.entropy, talking.buffer) == (0.003, 0)


def test_real_models_that_imitate_have_settings_of_their_own():
    real, imitating = ["--game", "ipd", "--model", "some/model"], aa_minimal.IMITATING
    settings = vars(parse([*real, "--imitate", "30"]))
    assert settings["imitate"] == 30
    assert {name: settings[name] for name in imitating} == imitating
    assert parse([*real, "--imitate", "30", "--beta", "1"]).beta == 1
    for others in ([*real, "--imitate", "0"], [*TINY, "--imitate", "30"], real):
        assert parse(others).beta not in (imitating["beta"], None)
    longer = vars(parse(["--game", "trust_split", "--model", "some/model", "--imitate", "9"]))
    assert longer["gamma"] == 0.96 and longer["rounds"] == imitating["rounds"]
