"""Cross-play against pencil and paper; agents by name; people and servers at the table."""

import http.server
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import types

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

import aa_minimal
import eval as evaluation
import tiny
from eval import (
    Api,
    Human,
    bits_that_fit,
    crossplay,
    failed,
    find_agent,
    legal_reply,
    load,
    print_table,
    printable,
    read_json,
    report,
)
from games import COUNTS, Match, Player, Scripted, play, scripted_names
from rollout import Policy

ROOT = pathlib.Path(evaluation.__file__).parent
KEY = "sk-not-to-be-seen"
FOUR = ["cooperate", "defect", "tit_for_tat", "grim"]


def main(*flags):
    """The exit code of the command with these flags, run in this process."""
    try:
        return report("eval", lambda: evaluation.main([str(flag) for flag in flags]))
    except SystemExit as stop:  # argparse has said what is wrong
        return stop.code


def evaluate(tmp_path, *flags):
    """What the command leaves in its file."""
    assert main(*flags, "--out", tmp_path / "out.json") == 0
    return json.loads((tmp_path / "out.json").read_text())


def command(folder, *flags):
    """Exit code, output and error output of the command, run as a user does."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout, done.stderr


def points(results, rows, columns):
    return [[results[a][b]["points"] for b in columns] for a in rows]


@pytest.fixture
def met(monkeypatch):
    """The Sides of the first player, one list per meeting."""
    seen, meet = [], evaluation.meet

    def remember(*args):
        seen.append(meet(*args))
        return seen[-1]

    monkeypatch.setattr(evaluation, "meet", remember)
    return seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that has learned to defect. Tests only read it."""
    folder = tmp_path_factory.mktemp("trained") / "defector"
    flags = "--game ipd --model tiny --algo naive --games 32 --group_size 8 --rounds 4 --lr 0.01"
    flags += f" --iterations 8 --buffer 9 --out {folder}"
    assert report("aa_minimal", lambda: aa_minimal.main(flags.split())) == 0
    return folder


@pytest.fixture(scope="module")
def llm():
    return load("tiny", "none", "ipd")


# ------------------------------------------------------------------------------------- the numbers

# Points per round of the row against the column over ten rounds. Against a defector, tit for tat
# and grim lose the first round (cd), which the defector wins (dc); then both defect (dd).
MATRICES = {
    "ipd": [[3, 0, 3, 3], [5, 1, 1.4, 1.4], [3, 0.9, 3, 3], [3, 0.9, 3, 3]],
    "stag_hunt": [[4, 0, 4, 4], [3, 3, 3, 3], [4, 2.7, 4, 4], [4, 2.7, 4, 4]],
    "chicken": [[3, 1, 3, 3], [4, 0, 0.4, 0.4], [3, 0.1, 3, 3], [3, 0.1, 3, 3]],
}
BEST = {"ipd": 6, "stag_hunt": 8, "chicken": 6}


@pytest.mark.parametrize("game", MATRICES)
def test_matrix_games_between_scripted_players_score_as_on_paper(game):
    agents = {name: Scripted(name) for name in FOUR}
    results = crossplay(game, agents, 2, 10, [0], 0, None)
    want = np.array(MATRICES[game])
    assert np.allclose(points(results, FOUR, FOUR), want)
    for i, a in enumerate(FOUR):
        assert list(results[a]) == [*FOUR, "random"]
        for j, b in enumerate(FOUR):
            means = results[a][b]
            assert means["points_other"] == pytest.approx(want[j][i])
            assert means["welfare"] == pytest.approx((want[i][j] + want[j][i]) / BEST[game])


def test_trust_split_is_the_same_from_both_seats_of_a_deal():
    # The upper hand is worth 10 a coin, the lower one 1, and each deal is played from both seats.
    # Two fair players: 100 and 0. Fair against greedy: 50 and 5, or 0 and 100. Two greedy: 50, 5.
    pair = ["cooperate", "defect"]
    results = crossplay(
        "trust_split", {name: Scripted(name) for name in pair}, 3, 10, [0], 20, None
    )
    assert np.allclose(points(results, pair, pair), [[50, 25], [52.5, 27.5]])
    for a, b, welfare in (("cooperate", "cooperate", 1), ("cooperate", "defect", 0.775)):
        assert results[a][b]["welfare"] == pytest.approx(welfare)


def test_split_mixes_its_two_kinds_of_values_as_they_are_dealt():
    pair = ["cooperate", "defect"]
    results = crossplay("split", {name: Scripted(name) for name in pair}, 4, 5, [0], 0, None)
    # One dear item each, none in common: the fair take their dear item and share the cheap one.
    one = np.array([[100 + 5, 50 + 10 / 3], [50 + 10 + 20 / 3 - 5 + 50, 50 + 5 + 5]])
    # Two dear items each, one in common.
    two = np.array([[100 + 50, 50 + 100 / 3], [50 + 10 + 200 / 3 + 45, 50 + 50 + 5]])
    # The greedy one gets all ten of what is dear to it and not kept by the fair one ...
    one[1][0], two[1][0] = 5 + 100 + 20 / 3, 5 + 100 + 200 / 3
    got = np.array(points(results, pair, pair))
    ones = (150 - got[0][0]) / 45 * 20  # how many of the 20 rounds were dealt with one dear item
    assert ones == pytest.approx(round(ones)) and 0 < ones < 20
    assert np.allclose(got, ones / 20 * one + (1 - ones / 20) * two)


def test_all_pairs_play_the_same_deals_from_both_seats(met):
    agents = {name: Scripted(name) for name in ("cooperate", "liar")}
    crossplay("trust_split", agents, 3, 2, [0], 20, None)
    assert len(met) == 2 * 6
    hands = {}
    for sides in met:
        places = [(match.deal, seat) for match, seat in sides]
        assert places == [(deal, seat) for deal in range(3) for seat in (0, 1)]
        assert len({match.players[seat] for match, seat in sides}) == 1
        for match, _ in sides:
            # what is shown before anyone has spoken: who begins with which hand
            hands.setdefault(match.deal, set()).add(match.log[0][:2])
    assert all(len(seen) == 1 for seen in hands.values())
    assert len(set.union(*hands.values())) > 1


# -------------------------------------------------------------------------------------- the tables


def test_a_table_has_aligned_columns_two_digits_and_dashes(capsys):
    print_table("Title", ["a", "wide header"], [["first", 1, None], ["x", "text", 2.345]])
    assert capsys.readouterr().out.split("\n") == [
        "",
        "Title",
        "",
        "               a wide header",
        "first       1.00           -",
        "x           text        2.35"
        if f"{2.345:.2f}" == "2.35"
        else "x           text        2.35",
        "",
    ]


def cells(out, title):
    """{first cell: other cells} of the table with that title."""
    lines = out.split(title)[1].split("\n\n")[1].strip("\n").split("\n")
    return {line.split()[0]: line.split()[1:] for line in lines[1:]}


def test_the_tables_show_who_takes_most_and_what_is_done_to_a_random_player(tmp_path, capsys):
    results = evaluate(tmp_path, *FOUR, "--game", "ipd", "--games", 16)["results"]
    out = capsys.readouterr().out
    table = cells(out, "points per round of the row against the column")
    want = [[f"{value:.2f}" for value in row] for row in MATRICES["ipd"]]
    assert [table[name][:4] for name in FOUR] == want
    assert table["grim"][4] == f"{results['grim']['random']['points']:.2f}"

    table = cells(out, "With itself, and what others get from it")
    assert table["cooperate"] == ["1.00", "1.00", "3.00", "5.00", "defect", "5.00"]
    assert table["tit_for_tat"] == ["1.00", "1.00", "3.00", "1.40", "cooperate", "3.00"]
    assert table["defect"][:5] == ["0.33", "0.00", "0.00", "1.00", "defect"]

    table = cells(out, "What it does against a random player")
    want = {
        "p_c_first": ["1.00", "0.00", "1.00", "1.00"],
        "p_c_cc": ["1.00", "-", "1.00", "1.00"],
        "p_c_cd": ["1.00", "-", "0.00", "0.00"],
        "p_c_dc": ["-", "0.00", "1.00", "0.00"],
        "p_c_dd": ["-", "0.00", "0.00", "0.00"],
    }
    assert {name: table[name] for name in want} == want


def test_the_tables_of_trust_split_show_honesty_and_coins(tmp_path, capsys):
    evaluate(tmp_path, "cooperate", "defect", "liar", "--games", 2, "--rounds", 4)
    out = capsys.readouterr().out
    table = cells(out, "With itself")
    assert [table[name][1] for name in ("cooperate", "defect")] == ["1.00", "1.00"]
    assert float(table["liar"][1]) < 0.5
    assert table["cooperate"][2] == "50.00"
    table = cells(out, "against a random player")
    assert table["honesty"][:2] == ["1.00", "1.00"] and float(table["honesty"][2]) < 0.5
    assert table["keep_lower"][1] == table["keep_upper"][1] == "10.00"


# ---------------------------------------------------------------------------------- agents by name


def same_adapter(llm, policy, folder):
    held = peft.get_peft_model_state_dict(llm.model, adapter_name=policy.adapter)
    saved = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return set(held) == set(saved) and all(torch.equal(held[name], saved[name]) for name in saved)


def test_a_run_is_its_newest_checkpoint_and_a_folder_of_an_adapter_is_that_adapter(
    trained, llm, tmp_path
):
    first, newest = trained / "checkpoint-000000", trained / "checkpoint-000008"
    shutil.copytree(newest, tmp_path / "plain")
    (tmp_path / "plain" / "optimizer.pt").unlink()
    found = []
    for name, folder in ((trained, newest), (first, first), (tmp_path / "plain", newest)):
        found.append(find_agent(str(name), "ipd", llm))
        assert isinstance(found[-1], Policy) and same_adapter(llm, found[-1], folder)
    assert not same_adapter(llm, found[0], first)
    assert len({policy.adapter for policy in found}) == 3


def test_names_without_a_folder_are_scripts_people_servers_and_the_model_itself(llm, monkeypatch):
    for game in ("ipd", "trust_split"):
        for name in scripted_names(game):
            assert vars(find_agent(name, game, llm)) == vars(Scripted(name))
    assert find_agent("base", "ipd", llm).adapter is None
    assert isinstance(find_agent("human", "ipd", llm), Human)
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert find_agent("api:some/model:1", "ipd", llm).model == "some/model:1"


@pytest.mark.parametrize("name", ["nobody", "liar", "", "api", "Base", "/"])
def test_an_unknown_name_is_refused_with_those_that_are_known(llm, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tiny.UserError, match="base, human, api:MODEL or cooperate, defect") as told:
        find_agent(name, "ipd", llm)
    assert f"called {name};" in str(told.value)


def test_a_server_without_a_key_is_refused_in_one_line(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(tiny.UserError, match="OPENAI_API_KEY"):
        find_agent("api:m", "ipd", None)


def test_an_adapter_of_another_model_is_refused(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-000008" / "base.txt"
    path.write_text("0123456789abcdef")
    assert main(tmp_path / "run", "--out", tmp_path / "out.json") == 2
    error = capsys.readouterr().err.strip()
    assert "stands on other weights than those of tiny-ipd-" in error and "\n" not in error
    assert not (tmp_path / "out.json").exists()


def test_what_an_evaluation_leaves_open_is_that_of_the_first_run(trained, tmp_path):
    out = evaluate(tmp_path, trained, trained / "checkpoint-000000", "base", "--games", 8)
    settings, results = out["settings"], out["results"]
    run = json.loads((trained / "config.json").read_text())
    for name in ("game", "model", "rounds", "prior_seed", "games_at_once", "max_message_tokens"):
        assert settings[name] == run[name]
    assert (settings["games"], settings["seed"]) == (8, 0)
    first = "defector/checkpoint-000000"  # checkpoints of several runs have the same name
    assert list(results) == ["defector", first, "base"]
    for means in results.values():
        assert list(means) == [*results, *scripted_names("ipd")]
    # It has learned to defect; the first checkpoint has learned nothing, and plays as the model.
    assert results["defector"]["defector"]["cooperation"] < 0.1
    assert results["base"]["base"]["cooperation"] > 0.4
    assert results["base"]["base"] == results[first][first]
    assert results["defector"]["cooperate"]["points"] > 4.5
    mine, theirs = results["defector"]["base"], results["base"]["defector"]
    assert mine["points"] > theirs["points"] + 1
    flags = ["--games", 1, "--rounds", 2, "--games_at_once", 1, "--max_message_tokens", 0]
    given = evaluate(tmp_path, trained, *flags)["settings"]
    assert (given["rounds"], given["games_at_once"], given["max_message_tokens"]) == (2, 1, 0)


def test_an_evaluation_repeats_itself_and_does_not_depend_on_how_many_play_at_once(
    trained, tmp_path
):
    flags = ["base", trained, "--games", 3, "--rounds", 3]
    first = evaluate(tmp_path, *flags)["results"]
    assert evaluate(tmp_path, *flags)["results"] == first
    assert evaluate(tmp_path, *flags, "--games_at_once", 2)["results"] == first
    assert evaluate(tmp_path, *flags, "--seed", 1)["results"] != first


def test_in_other_words_an_agent_bound_to_a_letter_does_the_opposite(trained, tmp_path):
    flags = [trained, "--games", 8, "--words", "A", "B", "--words", "B", "A"]
    [results] = evaluate(tmp_path, *flags)["results"].values()
    assert results["cooperate"]["cooperation"] > 0.9  # it says B, as ever; the game hears A


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "agents"),
        (["grim", "--words", "A"], "--words"),
        (["grim", "--games", "0"], "--games"),
        (["grim", "--rounds", "0"], "--rounds"),
        (["grim", "--games_at_once", "0"], "--games_at_once"),
        (["grim", "--max_message_tokens", "-1"], "tokens at 0"),
        (["grim", "--seed", "-1"], "--seed"),
        (["grim", "--game", "chess"], "chess"),
        (["grim", "--game", "ipd", "--out", "no/where.json"], "no/where.json"),
        (["grim", "--game", "ipd", "--out", "split"], "--out split must be a file"),
        (["grim", "--banana"], "banana"),
        (["ipd", "split"], "split plays split, not ipd"),
        (["split", "--game", "ipd"], "split plays split, not ipd"),
    ],
)
def test_wrong_flags_end_in_argparses_line(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    for game in ("ipd", "split"):
        (tmp_path / game).mkdir()
        (tmp_path / game / "config.json").write_text(json.dumps({"game": game, "model": "tiny"}))
    assert main(*flags) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert ": error: " in error and says in error
    assert not (tmp_path / "crossplay.json").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["grim", "grim"], "grim"),
        (["TRAINED", "copy/defector"], "defector"),
        (["TRAINED", "TRAINED/"], "defector"),
        (["nobody", "--game", "ipd"], "nobody"),
        (["liar", "--game", "ipd"], "liar"),
    ],
)
def test_what_cannot_be_evaluated_is_named_in_one_line(
    trained, tmp_path, monkeypatch, capsys, flags, says
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "copy" / "defector")
    assert main(*(flag.replace("TRAINED", str(trained)) for flag in flags)) == 2
    lines = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")
    error = lines[-1]
    assert error.startswith("eval: ") and says in error
    assert not (tmp_path / "crossplay.json").exists()


@pytest.mark.parametrize(
    "text", ['{"game": "ipd",', "", "precious", "[1, 2]", "null", "{}", '{"game": "chess"}']
)
def test_damaged_settings_of_a_run_are_named_in_one_line(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    assert main(tmp_path, "--out", tmp_path / "out.json") == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert str(tmp_path) in error
    assert not (tmp_path / "out.json").exists()


def test_lines_of_a_file_are_read_up_to_the_last_whole_one(tmp_path):
    (tmp_path / "some.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": 3')
    assert read_json(tmp_path, "some.jsonl") == [{"a": 1}, {"a": 2}]
    (tmp_path / "some.jsonl").write_text('{"a": 1}\n{"a": 2\n{"a": 3}\n')
    with pytest.raises(tiny.UserError, match="some.jsonl"):
        read_json(tmp_path, "some.jsonl")


# ---------------------------------------------------------------------------- the command, its end


@pytest.mark.parametrize(
    "error, code, says",
    [
        (tiny.UserError("no such thing"), 2, ["no such thing"]),
        (FileNotFoundError(2, "No such file", "gone.json"), 2, ["gone.json"]),
        (torch.OutOfMemoryError("CUDA"), 2, ["--games_at_once", "--micro_batch_tokens"]),
        (KeyboardInterrupt(), 130, ["nothing new was saved"]),
        (KeyboardInterrupt("--resume runs/a goes on"), 130, ["stopped", "--resume runs/a goes on"]),
        (EOFError("end of input"), 130, ["stopped"]),
    ],
)
def test_what_stops_a_program_is_told_in_one_line(capsys, error, code, says):
    def stop():
        raise error

    assert report("program", stop) == code
    out, err = capsys.readouterr()
    assert out == "" and err.strip().startswith("program: ") and err.strip().count("\n") == 0
    assert all(words in err for words in says)


def test_an_end_without_trouble_has_code_0_and_a_fault_of_the_program_is_not_hidden(capsys):
    assert report("program", lambda: None) == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        report("program", lambda: 1 / 0)


def test_the_command_prints_tables_and_writes_numbers(tmp_path):
    flags = ["cooperate", "defect", "--game", "ipd", "--games", "2", "--out", "numbers.json"]
    code, out, err = command(tmp_path, *flags)
    assert code == 0 and "Traceback" not in err
    assert "5.00" in out and "numbers.json" in out
    written = json.loads((tmp_path / "numbers.json").read_text())
    pair = ["cooperate", "defect"]
    assert np.allclose(points(written["results"], pair, pair), [[3, 0], [5, 1]])
    assert written["settings"]["agents"] == pair and written["settings"]["game"] == "ipd"
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_an_agent_that_is_not_there_is_refused_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load", None)
    assert main("no/such/run", "base") == 2
    assert "no agent is called no/such/run" in capsys.readouterr().err


def test_the_command_ends_with_code_2_and_no_traceback(trained, tmp_path):
    code, out, err = command(tmp_path, str(trained), "no/such/run")
    assert code == 2 and "Traceback" not in err and list(tmp_path.iterdir()) == []
    assert err.strip().split("\n")[-1].startswith("eval: no agent is called no/such/run")


# ------------------------------------------------------------------------------------------ people


def test_a_person_is_asked_again_after_an_illegal_reply(monkeypatch, capsys):
    said = iter(["x", "", "A", "ab", " B "])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    match = Match(3, 0, 2, (Human(), Scripted("cooperate")))
    play("ipd", [match], [0], 0)
    assert list(said) == []
    assert [tuple(round.points) for round in match.history] == [(3, 3), (5, 0)]
    out = capsys.readouterr().out
    assert out.count("not a legal reply, such as A, B") == 3
    assert "[game 4, round 1]" in out and "[game 4, round 2]\nThe other chose A." in out


class Says(Player):
    """Sends always the same message, and keeps nothing."""

    def __init__(self, message):
        self.message = message

    def answer(self, question):
        return "0" if question.turn.choices else self.message


def test_a_person_sees_control_characters_spelled_out(monkeypatch, capsys):
    evil = "\x1b[2J\x1b]0;title\x07 \x9b31m \u202edrow"
    monkeypatch.setattr("builtins.input", lambda prompt: "10")
    for seats in ((Human(), Says(evil)), (Says(evil), Human())):
        play("trust_split", [Match(0, 0, 2, seats)], [0], 40)
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert out.count("\\x1b[2J\\x1b]0;title\\x07 \\x9b31m \\u202edrow") >= 4


def test_letters_that_a_terminal_lacks_are_spelled_out(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    assert report("eval", lambda: print("a snowman: \u2603", flush=True)) == 0
    assert written.getvalue().strip() == b"a snowman: \\u2603"


def test_text_is_printable_as_it_is_or_spelled_out():
    assert printable("Grüß Gott,\n猫 🙂 \\x1b") == "Grüß Gott,\n猫 🙂 \\x1b"
    assert printable("a\tb\rc\x00\x7f\u200b\ud800") == "a\\tb\\rc\\x00\\x7f\\u200b\\ud800"


def test_a_person_can_play_a_scripted_player(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda prompt: "B")
    flags = ["human", "tit_for_tat", "--game", "ipd", "--games", 1, "--rounds", 2]
    results = evaluate(tmp_path, *flags)["results"]
    assert results["human"]["tit_for_tat"]["points"] == 3  # 5, then 1
    assert set(results["human"]) == {"tit_for_tat"}  # and no games with everyone else
    assert "tit_for_tat" in results["tit_for_tat"]
    assert "3.00" in capsys.readouterr().out


@pytest.mark.parametrize("end", [EOFError("EOF when reading a line"), KeyboardInterrupt()])
def test_leaving_a_game_saves_nothing(tmp_path, monkeypatch, capsys, end):
    def leave(prompt):
        raise end

    monkeypatch.setattr("builtins.input", leave)
    assert main("human", "grim", "--game", "ipd", "--out", tmp_path / "out.json") == 130
    error = capsys.readouterr().err.strip()
    assert error.startswith("eval: stopped; ") and "\n" not in error
    assert not (tmp_path / "out.json").exists()


# ----------------------------------------------------------------------------------------- servers


def completion(content):
    """The body in which a server sends a reply."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    body = {"id": "0", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return json.dumps(body)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(sent)
        if self.server.answer is None:
            self.server.over.wait(30)
            return
        answer = self.server.answer
        status, body = answer() if callable(answer) else answer
        body = (body(sent) if callable(body) else body).encode()
        kind = "text/html" if body.startswith(b"<") else "application/json"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine. answer: (status, body) of all its replies, or a function that
    returns it each time, None: it says nothing;
    asked: what it was sent; patience: seconds until the client gives up."""
    openai = pytest.importorskip("openai")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.asked, server.answer, server.over, server.patience = [], None, threading.Event(), 20
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client = openai.OpenAI

    def hurried(**settings):
        return client(**settings | {"max_retries": 0, "timeout": server.patience})

    monkeypatch.setattr(openai, "OpenAI", hurried)
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


# Games of one round: two with itself, two with each of five scripted players.
ASK = ["api:m", "--game", "ipd", "--games", "1", "--rounds", "1"]
TURNS = 2 * 2 + 5 * 2


def test_a_server_that_answers_well_is_taken_at_its_word(tmp_path, server, capsys):
    server.answer = 200, completion(" B\n")
    results = evaluate(tmp_path, *ASK)["results"]
    assert points(results, ["api:m"], ["api:m", "cooperate", "defect"]) == [[1, 5, 1]]
    assert f"api:m: 0 of {TURNS} turns failed" in capsys.readouterr().out
    assert len(server.asked) == TURNS
    for sent in server.asked:
        assert (sent["model"], sent["max_tokens"]) == ("m", 8 + 16)
        assert [message["role"] for message in sent["messages"]] == ["user"]


def test_a_server_reads_the_conversation_of_its_game_and_seat(server):
    server.answer = 200, lambda sent: completion("AB"[len(sent["messages"]) // 2 % 2])
    match = Match(0, 0, 3, (Api("m"), Scripted("tit_for_tat")))
    play("ipd", [match], [0], 0)
    assert [tuple(round.points) for round in match.history] == [(3, 3), (5, 0), (0, 5)]
    last = [message["content"] for message in server.asked[-1]["messages"]]
    assert last[1:] == ["A", "The other chose A.", "B", "The other chose A."]
    assert [message["role"] for message in server.asked[-1]["messages"]] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]


def test_conversations_with_a_server_are_kept_apart(server):
    def cooperate_as_the_other(sent):
        return completion("B" if sent["messages"][-1]["content"] == "The other chose B." else "A")

    server.answer = 200, cooperate_as_the_other
    player = Api("m")
    pairs = [(player, player), (player, Scripted("defect")), (Scripted("grim"), player)]
    matches = [Match(n, n, 3, pair) for n, pair in enumerate(pairs)]
    play("ipd", matches, [0], 0)
    got = [[tuple(round.points) for round in match.history] for match in matches]
    assert got == [[(3, 3)] * 3, [(0, 5), (1, 1), (1, 1)], [(3, 3)] * 3]
    assert player.failed == 0


def test_a_message_of_a_server_is_as_long_as_asked_for_and_can_be_written_to_a_file(server):
    server.answer = 200, completion("rock \ud83d, or 5")
    player = Api("m")
    match = Match(0, 0, 1, (player, Scripted("cooperate")))
    play("trust_split", [match], [0], 24)
    assert [reply for seat, _, reply in match.log if seat == 0] == ["rock ?, or 5", "5"]
    assert all(text.encode() for turn in match.log for text in turn[1:])
    assert [sent["max_tokens"] for sent in server.asked] == [24 + 16, 8 + 16]
    assert player.failed == 0


USELESS = [
    (200, completion("A or B")),
    (200, completion("")),
    (200, completion("C")),
    (200, completion("<think> Is A better?")),
    (200, completion(None)),
    (200, completion(7)),
    (500, '{"error": "broken"}'),
    (429, "{}"),
    (400, '{"error": {"message": "no"}}'),
    (200, '{"choices": [{"mess'),
    (200, "<html><body>Sign in</body></html>"),
    (200, 'data: {"choices": [{"delta": {"content": "A"}}]}'),
    (200, '{"choices": []}'),
    (200, '{"choices": {}}'),
    (200, '{"choices": "A"}'),
    (200, '{"choices": [{"message": null}]}'),
    (200, "{}"),
    (200, "[]"),
    (200, "null"),
    (200, ""),
]


@pytest.mark.parametrize("status, body", USELESS)
def test_a_server_without_any_legal_reply_ends_in_one_line(tmp_path, server, capsys, status, body):
    server.answer = status, body
    assert main(*ASK, "--out", tmp_path / "out.json") == 2
    shown = capsys.readouterr()
    error = shown.err.replace("\r", "\n").strip().split("\n")[-1]
    assert error.startswith("eval: api:m gave no legal reply in 4 turns (")
    assert KEY not in shown.out + shown.err and "Traceback" not in shown.err
    assert len(server.asked) == 3 * 4  # the two games with itself
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("status, body", USELESS)
def test_some_useless_replies_are_asked_for_thrice_then_replaced_and_counted(
    tmp_path, server, capsys, monkeypatch, status, body
):
    monkeypatch.setenv("API_AT_ONCE", "1")  # every second turn fails, the others succeed at once
    useless, fine = (status, body), (200, completion("A"))
    server.answer = lambda: useless if len(server.asked) % 4 else fine
    results = evaluate(tmp_path, *ASK)["results"]
    assert 0 <= results["api:m"]["cooperate"]["points"] <= 5
    shown = capsys.readouterr()
    assert f"api:m: {TURNS // 2} of {TURNS} turns failed" in shown.out
    assert KEY not in shown.out + shown.err
    assert len(server.asked) == (3 + 1) * TURNS // 2


def test_an_illegal_reply_is_told_so_and_the_correction_is_not_kept(server):
    said = iter(["both", "B", "A"])
    server.answer = lambda: (200, completion(next(said)))
    player = Api("m")
    match = Match(0, 0, 2, (player, Scripted("cooperate")))
    play("ipd", [match], [0], 0)
    assert [tuple(round.points) for round in match.history] == [(5, 0), (3, 3)]
    asked = [[message["content"] for message in sent["messages"]] for sent in server.asked]
    assert failed({"m": player}) == {"m": "0 of 2 turns failed"}
    rules = asked[0][0]
    assert asked[1][:2] == [rules, "both"] and "not one legal reply" in asked[1][2]
    assert asked[2] == [rules, "B", "The other chose A."]


def test_what_stands_in_for_a_useless_reply_is_legal_and_fixed_by_the_seed(server, monkeypatch):
    monkeypatch.setenv("API_AT_ONCE", "0")  # taken as 1
    useless, fine = (200, completion("I keep them all")), (200, completion("5"))
    server.answer = lambda: useless if len(server.asked) % 4 else fine
    logs = []
    for seed in (0, 0, 1):
        server.asked.clear()
        player = Api("m")
        opponents = [Scripted("cooperate"), Scripted("defect")]
        matches = [Match(n, n, 6, (player, opponent)) for n, opponent in enumerate(opponents)]
        play("trust_split", matches, [seed], 24)
        logs.append([reply for match in matches for seat, _, reply in match.log if seat == 0])
        assert 0 < player.failed < player.turns == 2 * 2 * 6
        assert all(0 <= int(reply) <= 10 for reply in logs[-1][1::2])
    assert logs[0] == logs[1] != logs[2]


def test_silence_is_counted_and_no_empty_message_is_ever_sent_back(server):
    def silent_with_a_rock(sent):
        *_, question = [m["content"] for m in sent["messages"] if "Your hand is" in m["content"]]
        return completion("" if "is rock. " in question and "How many" not in question else "5")

    server.answer = 200, silent_with_a_rock
    player = Api("m")
    matches = [Match(n, n, 2, (player, Scripted("cooperate"))) for n in range(8)]
    play("trust_split", matches, [0], 24)
    silences = [reply for match in matches for seat, _, reply in match.log if reply == ""]
    assert player.failed == len(silences) > 0
    assert all(message["content"] for sent in server.asked for message in sent["messages"])


def test_a_server_that_says_nothing_is_given_up(server):
    server.patience = 0.1
    player = Api("m")
    with pytest.raises(tiny.UserError, match="no legal reply in 1 turns .Request timed out"):
        play("ipd", [Match(0, 0, 2, (player, Scripted("cooperate")))], [0], 0)


def test_a_server_that_is_gone_ends_a_run_at_once(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    player = Api("m")
    with pytest.raises(tiny.UserError, match="out of reach"):
        play("ipd", [Match(0, 0, 2, (player, Scripted("cooperate")))], [0], 0)


def test_a_quota_that_is_used_up_ends_a_run_at_once(server):
    error = {"message": "You exceeded your quota", "code": "insufficient_quota"}
    server.answer = 429, json.dumps({"error": error})
    with pytest.raises(tiny.UserError, match="You exceeded your quota"):
        play("ipd", [Match(0, 0, 2, (Api("m"), Scripted("cooperate")))], [0], 0)
    assert len(server.asked) == 1


def test_newer_servers_get_the_limit_under_its_newer_name(server):
    def modern(sent):
        return completion("A") if "max_completion_tokens" in sent else "{}"

    problem = "Unsupported parameter: use 'max_completion_tokens' instead of 'max_tokens'"
    refused = 400, json.dumps({"error": {"message": problem}})
    server.answer = lambda: refused if len(server.asked) == 1 else (200, modern)
    match = Match(0, 0, 3, (Api("m"), Scripted("cooperate")))
    play("ipd", [match], [0], 0)
    assert [sent.get("max_completion_tokens") for sent in server.asked] == [None, 24, 24, 24]
    assert [round.points[0] for round in match.history] == [3, 3, 3]


def test_requests_at_a_time_and_tokens_to_reason_with_are_settings(server, monkeypatch):
    monkeypatch.setenv("API_AT_ONCE", "2")
    monkeypatch.setenv("API_SPARE_TOKENS", "500")
    under_way, most, lock = [0], [0], threading.Lock()

    def slow(sent):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.05)
        with lock:
            under_way[0] -= 1
        return completion("<think>B?</think>\nA")

    server.answer = 200, slow
    player = Api("m")
    matches = [Match(n, n, 1, (player, Scripted("cooperate"))) for n in range(8)]
    play("ipd", matches, [0], 0)
    assert most == [2] and {sent["max_tokens"] for sent in server.asked} == {508}
    assert all(match.history[0].points == (3, 3) for match in matches)


AB, COINS, SPLITS = ("A", "B"), COUNTS, ("10 0 5", "0 0 0", "5 5 5")


@pytest.mark.parametrize(
    "text, choices, said",
    [
        ("A", AB, "A"),
        ("a", AB, "A"),
        (" b.\n", AB, "B"),
        ("I choose A.", AB, "A"),
        ("**A**", AB, "A"),
        ('"A"', AB, "A"),
        ("`A`", AB, "A"),
        ("(B)", AB, "B"),
        ("My answer: B!", AB, "B"),
        ("A\nBecause B would be answered with B.", AB, "A"),
        ("Ａ", AB, "A"),
        ("<think>A or B? B is greedy.</think>A", AB, "A"),
        ("<thinking>A or B?</thinking>\n\nB", AB, "B"),
        ("A, A and again A", AB, "A"),
        ("I take a risk: B", AB, "B"),
        ("Answer:\nB", AB, "B"),
        ("Let me see: B pays 5.</think>\nA", AB, "A"),
        ("I choose A.\nThat is kind.", AB, "A"),
        ("A difficult decision.", AB, ""),
        ("A tit-for-tat player is likely, so B.", AB, ""),
        ("A-B", AB, ""),
        ("\u201cA\u201d", AB, "A"),
        ("share", ("share", "steal"), "share"),
        ("Bid 1", ("pass", "bid 1"), "bid 1"),
        ("A or B", AB, ""),
        ("Not A but B", AB, ""),
        ("<think>A or B? Hmm", AB, ""),
        ("C", AB, ""),
        ("AB", AB, ""),
        ("", AB, ""),
        ("5", COINS, "5"),
        ("5 coins", COINS, "5"),
        ("05", COINS, "5"),
        ("５", COINS, "5"),
        ("٥", COINS, "5"),
        ("I keep 10.", COINS, "10"),
        ("**7**", COINS, "7"),
        ("I keep 10 of the 10 coins", COINS, "10"),
        ("5 of the 10 coins", COINS, ""),
        ("5/10", COINS, ""),
        ("5.5", COINS, ""),
        ("-5", COINS, ""),
        ("**Answer:**\n\n5", COINS, "5"),
        ("\u22125", COINS, ""),
        ("5\u00bd", COINS, ""),
        ("I keep 3-5 coins.", COINS, ""),
        ("9" * 5000, COINS, ""),
        ("11", COINS, ""),
        ("five", COINS, ""),
        ("10 0 5", SPLITS, "10 0 5"),
        ("10, 0, 5", SPLITS, "10 0 5"),
        ("Hats 10, books 0, balls 5.", SPLITS, "10 0 5"),
        ("**5 5 5**", SPLITS, "5 5 5"),
        ("5 5 5\nI had thought of 10 0 5.", SPLITS, "5 5 5"),
        ("Here you go:\n5 5 5", SPLITS, "5 5 5"),
        ("10 0", SPLITS, ""),
        ("10 0 5 0", SPLITS, ""),
        ("My hand is rock.", None, "My hand is rock."),
        ("<think>Shall I lie?</think> My hand is rock.", None, "My hand is rock."),
        ("<think> Okay, so", None, ""),
    ],
)
def test_a_reply_is_legal_where_it_names_one_choice_and_no_other(text, choices, said):
    assert legal_reply(text, choices) == said


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_refusal_ends_in_one_line_that_does_not_show_the_key(tmp_path, server, capsys, status):
    server.answer = status, json.dumps({"error": {"message": f"Incorrect API key: {KEY}"}})
    assert main(*ASK, "--out", tmp_path / "out.json") == 2
    shown = capsys.readouterr()
    error = shown.err.replace("\r", "\n").strip().split("\n")[-1]
    assert error.startswith("eval: api:m is refused") and str(status) in error
    assert KEY not in shown.out + shown.err and "Traceback" not in shown.err
    assert not (tmp_path / "out.json").exists()


@pytest.fixture
def hasty(monkeypatch):
    """A built-in model that has hardly learned anything, but is there in a few seconds."""
    short = [tiny.LESSONS["tiny", "matrix"][-1]._replace(rounds=2, steps=1)]
    monkeypatch.setitem(tiny.LESSONS, ("tiny", "matrix"), short)


def test_training_counts_the_turns_of_a_server_that_failed_wherever_it_reports(
    tmp_path, server, capsys, hasty, monkeypatch
):
    monkeypatch.setenv("API_AT_ONCE", "1")
    server.answer = lambda: (200, completion("both" if len(server.asked) % 4 else "A"))
    flags = "--game ipd --model tiny --games 4 --group_size 2 --rounds 1 --iterations 2"
    argv = [*flags.split(), "--opponent", "api:m", "--out", str(tmp_path / "run")]
    assert report("aa_minimal", lambda: aa_minimal.main(argv)) == 0
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    seen = [json.loads(line)["api:m"] for line in text.splitlines()]
    assert seen == [f"{n} of {2 * n} turns failed 'both' is no legal reply" for n in (2, 4)]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["failed"] == {"api:m": seen[-1]}
    shown = capsys.readouterr()
    assert "api:m=4 of 8 turns failed" in shown.err and f"api:m: {seen[-1]}" in shown.out


def test_a_run_is_not_called_as_a_scripted_player(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained, tmp_path / "grim")
    monkeypatch.chdir(tmp_path)
    assert main("./grim") == 2
    assert "two agents are called grim" in capsys.readouterr().err


def test_what_a_server_writes_in_an_error_is_spelled_out_and_without_the_key(server):
    server.answer = 400, json.dumps({"error": {"message": "x" * 140 + f"\x1b[2J{KEY}"}})
    with pytest.raises(tiny.UserError) as told:
        play("ipd", [Match(0, 0, 1, (Api("m"), Scripted("cooperate")))], [0], 0)
    assert "\x1b" not in str(told.value) and KEY[:8] not in str(told.value)


@pytest.mark.parametrize("gigabytes, quant", [(7.9, "nf4"), (24, "none")])
def test_a_gpu_holds_16_bits_where_they_take_up_to_a_third_of_it(
    tmp_path, monkeypatch, gigabytes, quant
):
    """Sizes as of Qwen2.5-1.5B: 1.54e9 weights, the embedding is the head, too."""
    config = transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config.save_pretrained(tmp_path)
    card = types.SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: card)
    assert bits_that_fit(tmp_path) == quant


@pytest.mark.parametrize("supported", [True, False])
def test_a_card_without_bfloat16_gets_float32_weights_and_is_named(supported, monkeypatch, capsys):
    asked = {}

    def from_pretrained(name, **how):
        asked.update(how)
        raise OSError("no weights here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation: supported or including_emulation,
    )  # emulated on a T4, where it is slow
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(tiny.UserError, match="no weights here"):
        load("some-model", "none", "ipd")
    dtype = torch.bfloat16 if supported else torch.float32
    assert asked["dtype"] == dtype and asked["device_map"] == "cuda"
    assert f"in {dtype} (bfloat16 on a GPU: {supported})" in capsys.readouterr().out
