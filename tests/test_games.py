"""The rules against pencil and paper, what each seat may read, scripted players and the record."""

import itertools
import pathlib
import re
import subprocess
import sys
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import games
from games import (
    GAMES,
    HANDS,
    SCRIPTS,
    Game,
    Match,
    Player,
    Round,
    Scripted,
    Side,
    Turn,
    claim,
    indicators,
    meet,
    play,
    scripted_names,
    share,
    summarize,
)

ROOT = pathlib.Path(games.__file__).parent
MATRIX = {  # own and other's points after (own move, other's move), from the sheet of each game
    "ipd": {"AA": (3, 3), "AB": (0, 5), "BA": (5, 0), "BB": (1, 1)},
    "stag_hunt": {"AA": (4, 4), "AB": (0, 3), "BA": (3, 0), "BB": (3, 3)},
    "chicken": {"AA": (3, 3), "AB": (1, 4), "BA": (4, 1), "BB": (0, 0)},
}
BEATS = {"rock": "scissors", "scissors": "paper", "paper": "rock"}
bounded = settings(max_examples=50, derandomize=True, deadline=None)


class Says(Player):
    """Replies `say(question)`, and remembers every turn and how many questions came at once."""

    def __init__(self, say):
        self.say, self.turns, self.calls = say, [], []

    def reply(self, questions):
        self.calls.append(len(questions))
        self.turns += [question.turn for question in questions]
        return super().reply(questions)

    def answer(self, question):
        return self.say(question)


def moves(per_round):
    """Moves of a matrix game, one letter a round."""
    return Says(lambda question: per_round[len(question.history)])


def keeps(count="0", message="Hi."):
    """Sends always the same message and keeps `count` of everything."""

    def say(question):
        choices = question.turn.choices
        if choices is None:
            return message
        return count if count in choices else f"{count} {count} {count}"

    return Says(say)


def styles(per_round):
    """Is fair or greedy as the scripted players are, round by round: "f" or "g"."""

    def say(question):
        style = per_round[len(question.history)]
        return question.turn.fair if style == "f" else question.turn.greedy

    return Says(say)


def play_games(game, players, count=1, rounds=4, seed=0, max_tokens=24):
    """Matches between two players (or names of scripted ones), each with a deal of its own."""
    players = [Scripted(player) if isinstance(player, str) else player for player in players]
    matches = [Match(n, n, rounds, tuple(players)) for n in range(count)]
    play(game, matches, [seed], max_tokens)
    return matches


def replies(match, seat):
    return [reply for s, _, reply in match.log if s == seat]


def texts(match, seat):
    return [text for s, text, _ in match.log if s == seat]


class TrustRound(NamedTuple):
    """A round of trust_split as its log has it; lists by seat."""

    first: int  # the seat that speaks first
    hands: list
    upper: list  # whether that seat's hand beats the other one
    said: list
    kept: list
    points: tuple


def trust_rounds(match):
    seen = []
    for t in range(match.rounds):
        messages, coins = match.log[4 * t : 4 * t + 2], match.log[4 * t + 2 : 4 * t + 4]
        hands, said, kept = [None, None], [None, None], [None, None]
        for seat, text, reply in messages:
            hands[seat], said[seat] = re.search(r"Your hand is (\w+)\.", text)[1], reply
        for seat, text, reply in coins:
            assert f"Your hand is {hands[seat]}." in text
            kept[seat] = int(reply)
        upper = [BEATS[hands[seat]] == hands[1 - seat] for seat in (0, 1)]
        points = match.history[t].points
        seen.append(TrustRound(messages[0][0], hands, upper, said, kept, points))
    return seen


class SplitRound(NamedTuple):
    """A round of split as its log has it; lists by seat, three numbers each."""

    values: list
    kept: list
    points: tuple


def split_rounds(match):
    seen = []
    for t in range(match.rounds):
        values, kept = [None, None], [None, None]
        for seat, text, reply in match.log[2 * t : 2 * t + 2]:
            told = re.findall(r"(?:hats|books|balls) (\d+)", text[text.rindex("To you") :])
            values[seat] = [int(n) for n in told[:3]]
            kept[seat] = [int(n) for n in reply.split()]
            others = [int(n) for n in told[3:]]
            if seat == 1:
                assert others == values[0]
        seen.append(SplitRound(values, kept, match.history[t].points))
    return seen


def about(count, n, p, deviations=4):
    """Whether `count` successes in `n` trials are within so many standard deviations of n p."""
    return abs(count - n * p) <= deviations * (n * p * (1 - p)) ** 0.5


# ------------------------------------------------------------------------------------------- points


@pytest.mark.parametrize("game", MATRIX)
def test_matrix_games_pay_each_seat_as_their_sheet_says(game):
    [match] = play_games(game, (moves("AABB"), moves("ABAB")))
    assert [round.points for round in match.history] == list(MATRIX[game].values())
    best = max(own + other for own, other in MATRIX[game].values())
    assert [round.best for round in match.history] == [best] * 4


@pytest.mark.parametrize("game", MATRIX)
def test_the_rules_of_matrix_games_state_the_points_to_both_seats(game):
    [match] = play_games(game, (moves("A"), moves("B")), rounds=1)
    stated = r"you get (\d+) (?:points )?and the other gets (\d+)"
    for seat in (0, 1):
        [rules] = texts(match, seat)
        told = [(int(own), int(other)) for own, other in re.findall(stated, rules)]
        assert told == [MATRIX[game][pair] for pair in ("AA", "AB", "BA", "BB")]


@pytest.mark.parametrize("game", MATRIX)
def test_matrix_games_reveal_the_move_of_the_other_and_nothing_else(game):
    [match] = play_games(game, (moves("AABBA"), moves("ABABA")), rounds=5)
    assert texts(match, 0)[1:] == [f"The other chose {move}." for move in "ABAB"]
    assert texts(match, 1)[1:] == [f"The other chose {move}." for move in "AABB"]


# Points of the player named first and of the other one when the first has the upper hand, when it
# has the lower one, and the mean of both. Coins are worth 10 with the upper hand and 1 with the
# lower; where both keep 10 each gets 5.
TRUST = {
    ("cooperate", "cooperate"): ((100, 0), (0, 100), (50, 50)),
    ("defect", "cooperate"): ((100, 0), (5, 50), (52.5, 25)),
    ("defect", "defect"): ((50, 5), (5, 50), (27.5, 27.5)),
}


@pytest.mark.parametrize("pair", TRUST, ids="-".join)
@pytest.mark.parametrize("me", [0, 1])
def test_trust_split_pays_fair_and_greedy_players_as_worked_out_by_hand(pair, me):
    with_upper, with_lower, mean = TRUST[pair]
    seen = {True: [], False: []}
    for match in play_games("trust_split", pair if me == 0 else pair[::-1], count=50):
        assert [round.best for round in match.history] == [100] * 4
        for round in trust_rounds(match):
            seen[round.upper[me]].append((round.points[me], round.points[1 - me]))
    assert set(seen[True]) == {with_upper} and set(seen[False]) == {with_lower}
    assert tuple(np.mean([with_upper, with_lower], axis=0)) == mean
    assert about(len(seen[True]), n=200, p=1 / 2, deviations=2)


def test_a_liar_takes_all_from_a_fair_player_when_it_speaks_second():
    # Second it knows the other's hand and claims to beat it: the fair player keeps 0, and ten coins
    # are worth 100 or 10. First, say with rock, it claims scissors. A fair paper (which beats rock)
    # has no use against scissors and keeps 0: 10 to 0. A fair scissors (which rock beats) cannot
    # believe that, since hands differ, and keeps 5: 20/3 and 10/3 coins.
    want = {  # (whether the liar speaks first, whether it has the upper hand)
        (False, True): (100, 0),
        (False, False): (10, 0),
        (True, False): (10, 0),
        (True, True): (200 / 3, 10 / 3),
    }
    seen = set()
    for match in play_games("trust_split", ("liar", "cooperate"), count=30):
        honesty = indicators(match.history, 0)["honesty"]
        for round, honest in zip(trust_rounds(match), honesty):
            case = (round.first == 0, round.upper[0])
            seen.add(case)
            assert round.points == pytest.approx(want[case])
            assert honest == (case == (False, True))  # it does beat the other: no lie is needed
    assert seen == set(want)


# Split. Fair: all of what is worth more to oneself, none of what is worth more to the other, half
# of the rest.
# One dear item each, say (10, 1, 1) and (1, 10, 1); best 10 * (10 + 10 + 1).
#   fair, fair      100 + 0 + 5 = 105 each
#   greedy, greedy  5 of everything: 50 + 5 + 5 = 60 each
#   greedy, fair    keep 10 10 10 and 0 10 5: greedy 100 + 5 + 20/3, fair 0 + 50 + 10/3
# Two dear items each, say (10, 10, 1) and (10, 1, 10); best 10 * (10 + 10 + 10).
#   fair, fair      50 + 100 + 0 = 150 each
#   greedy, greedy  50 + 50 + 5 = 105 each
#   greedy, fair    keep 10 10 10 and 5 0 10: greedy 200/3 + 100 + 5, fair 100/3 + 0 + 50
SPLIT = {
    ("cooperate", "cooperate"): {"one": (105, 105), "two": (150, 150)},
    ("defect", "defect"): {"one": (60, 60), "two": (105, 105)},
    ("defect", "cooperate"): {"one": (335 / 3, 160 / 3), "two": (515 / 3, 250 / 3)},
}
BEST = {"one": 210, "two": 300}


@pytest.mark.parametrize("pair", SPLIT, ids="-".join)
@pytest.mark.parametrize("me", [0, 1])
def test_split_pays_fair_and_greedy_players_as_worked_out_by_hand(pair, me):
    seen = []
    for match in play_games("split", pair if me == 0 else pair[::-1], count=20):
        for round, record in zip(split_rounds(match), match.history):
            dear = {12: "one", 21: "two"}[sum(round.values[0])]
            seen.append(dear)
            assert (round.points[me], round.points[1 - me]) == pytest.approx(SPLIT[pair][dear])
            assert record.best == BEST[dear]
    assert about(seen.count("one"), n=80, p=1 / 2, deviations=2)


def test_what_is_kept_is_got_up_to_ten_together_and_shared_in_proportion_above():
    assert share(3, 7) == (3, 7) and share(0, 0) == (0, 0) and share(2, 1) == (2, 1)
    assert share(10, 10) == (5, 5) and share(10, 5) == pytest.approx((20 / 3, 10 / 3))


@bounded
@given(st.integers(0, 10), st.integers(0, 10))
def test_sharing_makes_no_coins_and_leaves_none_where_more_than_all_are_wanted(p, q):
    a, b = share(p, q)
    assert 0 <= a <= p and 0 <= b <= q
    assert a + b == pytest.approx(min(p + q, 10))


def slow_share(own, other):
    """What `own` of the coins or items are worth when the other keeps `other`, as a fraction."""
    return own * min(Fraction(1), Fraction(10, max(own + other, 1)))


@pytest.mark.parametrize("game", GAMES)
@bounded
@given(
    picks=st.lists(st.integers(0, 10**6), min_size=1, max_size=30),
    deal=st.integers(0, 10**6),
    rounds=st.integers(1, 5),
)
def test_any_legal_replies_are_scored_by_the_rules_and_within_bounds(game, picks, deal, rounds):
    pick = itertools.cycle(picks)

    def say(question):
        choices = question.turn.choices
        return choices[next(pick) % len(choices)] if choices else "I hold paper."

    match = Match(0, deal, rounds, (Says(say), Says(say)))
    play(game, [match], [0], 24)
    assert len(match.history) == rounds
    assert len(match.log) == rounds * (4 if game == "trust_split" else 2)
    for round in match.history:
        assert min(round.points) >= 0 and sum(round.points) <= round.best + 1e-9
    if game == "trust_split":
        for round in trust_rounds(match):
            for s in (0, 1):
                worth = 10 if round.upper[s] else 1
                want = worth * slow_share(round.kept[s], round.kept[1 - s])
                assert round.points[s] == pytest.approx(float(want))
    if game == "split":
        for round in split_rounds(match):
            for s in (0, 1):
                items = zip(round.values[s], round.kept[s], round.kept[1 - s])
                want = sum(value * slow_share(own, other) for value, own, other in items)
                assert round.points[s] == pytest.approx(float(want))


def play_points(monkeypatch, points, best):
    """Play one round of a game whose rules give `points`."""

    def rules(rng, rounds, max_tokens):
        yield [Turn(seat, "Choose.", ("A", "B"), fair="A", greedy="B") for seat in (0, 1)]
        yield Round(points, best, [True, True], [{}, {}])

    monkeypatch.setitem(GAMES, "made_up", Game(rules, scale=1))
    [match] = play_games("made_up", ("cooperate", "defect"), rounds=1)
    return match


@pytest.mark.parametrize("points", [(0, 0), (6, 0), (2.5, 3.5 + 1e-12), (-1, 3)], ids=str)
def test_points_are_recorded_as_the_rules_give_them(monkeypatch, points):
    match = play_points(monkeypatch, points, best=6)
    assert [round.points for round in match.history] == [points]
    means = summarize([Side(match, 1)])
    assert (means["points"], means["points_other"]) == points[::-1]
    assert means["welfare"] == pytest.approx(sum(points) / 6)


# ---------------------------------------------------------------------------------------- the deals


def cards(match):
    """All that the deal decides in a match, round by round."""
    if match.players[0].turns[0].choices is None:
        return [(round.first, *round.hands) for round in trust_rounds(match)]
    return [tuple(sum(round.values, [])) for round in split_rounds(match)]


@pytest.mark.parametrize("game", ["trust_split", "split"])
def test_a_deal_follows_from_its_number_and_the_seed_and_not_from_the_players(game):
    rng = np.random.default_rng(0)

    def wild():
        return Says(lambda question: str(rng.choice(question.turn.choices or ["rock", "paper"])))

    def dealt(players, deal=7, seed=5, number=0, rounds=6, max_tokens=24):
        match = Match(number, deal, rounds, players)
        play(game, [match], [seed], max_tokens)
        return cards(match)

    once = dealt((keeps(), keeps()))
    assert dealt((keeps(), keeps())) == once
    assert dealt((wild(), wild())) == once
    assert dealt((keeps("10"), wild()), number=9, max_tokens=3) == once
    assert dealt((keeps(), keeps()), rounds=9)[:6] == once
    for varied in ("seed", "deal"):
        others = [dealt((keeps(), keeps()), **{varied: n}) for n in range(10)]
        assert all(a != b for a, b in itertools.combinations(others, 2))


def test_trust_split_deals_every_pair_of_different_hands_equally_often():
    matches = play_games("trust_split", (keeps(), keeps()), count=150)
    pairs = [tuple(round.hands) for match in matches for round in trust_rounds(match)]
    assert set(pairs) == set(itertools.permutations(HANDS, 2))
    assert all(about(pairs.count(pair), n=600, p=1 / 6, deviations=3) for pair in set(pairs))


def test_split_deals_every_pair_of_different_values_with_equal_sums_equally_often():
    one_dear, two_dear = (
        ((1, 1, 10), (1, 10, 1), (10, 1, 1)),
        ((1, 10, 10), (10, 1, 10), (10, 10, 1)),
    )
    possible = [*itertools.permutations(one_dear, 2), *itertools.permutations(two_dear, 2)]
    matches = play_games("split", (keeps(), keeps()), count=150)
    pairs = []
    for match in matches:
        for round in split_rounds(match):
            pairs.append((tuple(round.values[0]), tuple(round.values[1])))
    assert set(pairs) == set(possible)
    assert all(about(pairs.count(pair), n=600, p=1 / 12, deviations=3) for pair in possible)


# ------------------------------------------------------------------------------ what the seats read


def test_the_rules_of_trust_split_say_which_hand_wins_and_what_coins_are_worth():
    [match] = play_games("trust_split", (keeps(), keeps()), rounds=1)
    for seat in (0, 1):
        rules = " ".join(texts(match, seat)[0].split()).lower()
        for winner, loser in BEATS.items():
            assert re.search(rf"{winner} beats? {loser}", rules)
        assert "10 points" in rules and "1 point " in rules


@pytest.mark.parametrize("game", GAMES)
def test_the_rules_are_read_once_at_the_start(game):
    count = "A" if game in MATRIX else "0"
    [match] = play_games(game, (keeps(count), keeps(count)))
    for seat in (0, 1):
        told = ["You play a game" in text for text in texts(match, seat)]
        assert told == [True] + [False] * (len(told) - 1)


def test_the_first_speaker_of_trust_split_alternates_and_either_seat_may_start():
    starters = set()
    for match in play_games("trust_split", ("random", "cooperate"), count=20, rounds=5):
        seats = [seat for seat, _, _ in match.log]
        starters.add(seats[0])
        assert seats[::4] == [(seats[0] + t) % 2 for t in range(5)]
        assert seats[1::4] == [1 - seat for seat in seats[::4]]
    assert starters == {0, 1}


def test_a_hand_is_not_to_be_told_from_anything_the_other_seat_reads():
    # With messages that say nothing, all that a seat reads follows from who speaks first, its own
    # hand and, in round 1, whether the other was above and what it kept. With the other's hand in
    # it, equal facts would give several texts.
    read = {}
    players = keeps("3"), keeps("4")
    for match in play_games("trust_split", players, count=200, rounds=2):
        rounds = trust_rounds(match)
        for n, (seat, text, _) in enumerate(match.log):
            others_upper = rounds[0].upper[1 - seat] if n in (4, 5) else None
            hands = rounds[n // 4].hands
            known = (n, seat, rounds[0].first, hands[seat], others_upper)
            read.setdefault(known, []).append((text, hands[1 - seat]))
    for pairs in read.values():
        assert len({text for text, _ in pairs}) == 1
        assert len({hand for _, hand in pairs}) == 2


def test_trust_split_tells_the_message_before_the_coins_and_the_coins_after_the_round():
    def speaker(name, coins):
        def say(question):
            return coins if question.turn.choices else f"{name} {len(question.history)}"

        return Says(say)

    [match] = play_games("trust_split", (speaker("zero", "3"), speaker("one", "4")), rounds=4)
    rounds = trust_rounds(match)
    for seat, name, coins in ((0, "one", 4), (1, "zero", 3)):
        for t, round in enumerate(rounds):
            to_message, to_coins = texts(match, seat)[2 * t : 2 * t + 2]
            message = f'"{name} {t}"'
            assert (message in to_message) == (round.first != seat)
            assert message in to_coins
            assert ("The other had" in to_message) == (t > 0)
            if t > 0:
                hand = "upper" if rounds[t - 1].upper[1 - seat] else "lower"
                assert f"The other had the {hand} hand and kept {coins}." in to_message


def test_split_tells_what_the_other_kept_after_the_round():
    def player(kept):
        return Says(lambda question: kept[len(question.history)])

    kept = (["1 2 3", "4 5 6", "0 0 0"], ["7 8 9", "10 0 1", "0 0 0"])
    [match] = play_games("split", (player(kept[0]), player(kept[1])), rounds=3)
    for seat in (0, 1):
        for t in (1, 2):
            hats, books, balls = kept[1 - seat][t - 1].split()
            news = f"The other kept {hats} hats, {books} books and {balls} balls.\nTo you: hats "
            assert texts(match, seat)[t].startswith(news)


def test_messages_are_put_on_one_line_and_cut_before_the_other_reads_them():
    raw = "rock\n\nThe other\r\nkept\u2028 10.\x85\tYes \x0b" + "x" * 100
    reader = keeps()
    play_games("trust_split", (keeps(message=raw), reader), rounds=1, max_tokens=4)
    said = ("rock The other kept 10. Yes " + "x" * 100)[:40]
    lines = [line for turn in reader.turns for line in turn.text.splitlines()]
    heard = [line for line in lines if "rock The other" in line]
    assert len(heard) in (1, 2) and all(line.endswith(f'"{said}"') for line in heard)


def test_only_what_the_other_reads_of_a_message_is_a_claim():
    for filling, honest in (("x" * 35, True), ("x" * 36, False)):

        def say(question, filling=filling):
            own = re.findall(r"Your hand is (\w+)", question.turn.text)[-1]
            return "0" if question.turn.choices else f"{filling} {own}"

        for match in play_games("trust_split", (Says(say), keeps()), count=20, max_tokens=4):
            for round, record in zip(trust_rounds(match), match.history):
                if round.hands[0] == "rock":  # 35 + 1 + 4 letters: just short enough
                    assert record.indicators[0]["honesty"] == [honest]


def test_scripted_players_can_name_their_hand_however_short_messages_are():
    for match in play_games("trust_split", (Scripted("cooperate"),) * 2, max_tokens=1):
        assert summarize([Side(match, 0)])["honesty"] == 1
        assert all(sorted(round.points) == [0, 100] for round in match.history)


def test_a_message_of_no_tokens_is_empty_and_not_honest():
    players = keeps(message=""), keeps(message="anything")
    [match] = play_games("trust_split", players, rounds=2, max_tokens=0)
    for seat in (0, 1):
        assert summarize([Side(match, seat)])["honesty"] == 0
        assert {turn.max_tokens for turn in players[seat].turns} == {0}
        assert all('The other said: ""\n' in text for text in texts(match, seat)[1::2])


def test_a_free_message_may_have_as_many_tokens_as_the_setting_says():
    players = keeps(), keeps()
    play_games("trust_split", players, max_tokens=17)
    turns = players[0].turns + players[1].turns
    assert {turn.max_tokens for turn in turns if turn.choices is None} == {17}


@bounded
@given(st.text(max_size=300), st.text(max_size=300))
def test_no_message_whatever_its_characters_changes_the_lines_or_the_points_of_a_game(a, b):
    def lines(message, others_message):
        players = keeps("10", message), keeps("0", others_message)
        [match] = play_games("trust_split", players, rounds=2, max_tokens=10)
        return match, [len(text.splitlines()) for _, text, _ in match.log]

    match, counts = lines(a, b)
    plain, plain_counts = lines("Hi.", "Hi.")
    assert counts == plain_counts
    assert [r.points for r in match.history] == [r.points for r in plain.history]
    assert all(set(r.points) in ({100, 0}, {10, 0}) for r in match.history)


@pytest.mark.parametrize(
    "message, hand",
    [
        ("My hand is rock.", "rock"),
        ("PAPER!", "paper"),
        ("scissors", "scissors"),
        ("(Rock)", "rock"),
        ("rock, I said rock", "rock"),
        ("not rock", "rock"),
        ("\u7d19 paper", "paper"),
        ("", None),
        ("Hi.", None),
        ("rock or paper", None),
        ("paper-rock", None),
        ("rocks", None),
        ("sandpaper", None),
        ("rock_", None),
        ("ro ck", None),
    ],
)
def test_a_message_claims_the_one_hand_that_it_names_as_a_whole_word(message, hand):
    assert claim(message) == (None if hand is None else HANDS.index(hand))


# --------------------------------------------------------------------------------- scripted players


@pytest.mark.parametrize(
    "name, reply",
    [
        ("cooperate", "AAAAAA"),
        ("defect", "BBBBBB"),
        ("tit_for_tat", "AABBAB"),
        ("grim", "AABBBB"),
    ],
)
@pytest.mark.parametrize("game", MATRIX)
def test_scripted_players_answer_a_sequence_of_moves_as_their_names_say(game, name, reply):
    for seat in (0, 1):
        players = [moves("ABBABA"), moves("ABBABA")]
        players[seat] = name
        [match] = play_games(game, players, rounds=6)
        assert "".join(replies(match, seat)) == reply


@pytest.mark.parametrize("name", ["tit_for_tat", "grim"])
def test_reciprocal_players_of_trust_split_answer_greed_with_greed(name):
    seen = set()
    for match in play_games("trust_split", (name, styles("gggfffff")), count=30, rounds=8):
        others_act = []  # fair or not; None with the upper hand: to keep all is its due then
        for t, round in enumerate(trust_rounds(match)):
            telling = [act for act in others_act if act is not None]
            greedy = False in (telling if name == "grim" else telling[-1:])
            assert round.kept[0] == (10 if greedy or round.upper[0] else 0)
            seen.add((greedy, round.upper[0]))
            others_act.append(t >= 3 if round.upper[0] else None)
    assert seen == set(itertools.product([True, False], repeat=2))


@pytest.mark.parametrize("name, greedy", [("tit_for_tat", "nnynn"), ("grim", "nnyyy")])
def test_reciprocal_players_of_split_answer_greed_for_one_round_or_for_ever(name, greedy):
    [match] = play_games("split", (name, styles("fgfff")), rounds=5)
    all_kept = [reply == "10 10 10" for reply in replies(match, 0)]
    assert all_kept == [letter == "y" for letter in greedy]
    assert indicators(match.history, 0)["cooperation"] == [letter == "n" for letter in greedy]


def talk(seed, first_says, second_says):
    """One round of trust_split up to the coins: both hands by seat, both message turns in the order
    they are asked, and the two turns that ask for coins, by seat."""
    rules = GAMES["trust_split"].rules(np.random.default_rng(seed), 1, 10)
    [first] = next(rules)
    [second] = rules.send([first_says])
    coins = rules.send([second_says])
    hands = {turn.seat: turn.fair.removeprefix("My hand is ") for turn in (first, second)}
    return hands, first, second, coins


@pytest.mark.parametrize("heard", [*HANDS, None])
def test_a_fair_player_keeps_all_coins_none_or_half_as_the_claim_it_heard_tells(heard):
    message = "Hello." if heard is None else f"I hold {heard}!"
    seen = set()
    for seed in range(30):
        hands, _, _, coins = talk(seed, message, message)
        for turn in coins:
            own = hands[turn.seat]
            if heard is None or own == heard:  # hands differ: its own is not believed
                want = "5"
            else:
                want = "10" if BEATS[own] == heard else "0"
            assert turn.fair == want
            seen.add(own)
    assert seen == set(HANDS)


def test_a_liar_claims_the_hand_that_beats_the_others_or_that_would_if_it_had_lost():
    seen = set()
    for seed, heard in itertools.product(range(30), HANDS):
        hands, first, second, _ = talk(seed, f"My hand is {heard}", "")
        assert BEATS[second.lie.removeprefix("My hand is ")] == heard
        [winner] = [other for other in HANDS if BEATS[other] == hands[first.seat]]
        assert BEATS[first.lie.removeprefix("My hand is ")] == winner
        seen.add(hands[first.seat])
    assert seen == set(HANDS)


@pytest.mark.parametrize("max_tokens", [0, 24])
@pytest.mark.parametrize("other", ["cooperate", "liar", "random"])
def test_a_fair_player_is_never_taken_for_a_greedy_one(other, max_tokens):
    matches = play_games("trust_split", ("cooperate", other), count=40, max_tokens=max_tokens)
    acts = [round.fair[0] for match in matches for round in match.history]
    assert set(acts) == {True, None}


@pytest.mark.parametrize("name", ["cooperate", "defect", "tit_for_tat", "grim"])
def test_all_but_the_liar_and_the_random_player_tell_their_hand(name):
    for match in play_games("trust_split", (name, "random"), count=20):
        for round in trust_rounds(match):
            assert claim(round.said[0]) == HANDS.index(round.hands[0])


@pytest.mark.parametrize("noise, defections", [(0.0, 0.0), (0.4, 0.2), (1.0, 0.5)])
def test_noise_replaces_that_share_of_the_replies_by_random_ones(noise, defections):
    matches = play_games("ipd", (Scripted("cooperate", noise), moves("AAAA")), count=250)
    said = "".join("".join(replies(match, 0)) for match in matches)
    assert len(said) == 1000 and about(said.count("B"), n=1000, p=defections, deviations=3)


def test_a_player_of_several_scripts_draws_one_anew_for_every_reply():
    player = Scripted({"cooperate": 0.5, "tit_for_tat": 0.3, "defect": 0.2})
    matches = play_games("ipd", (player, moves("ABAB")), count=250)
    said = [replies(match, 0) for match in matches]
    for t, defections in enumerate((0.2, 0.2, 0.5, 0.2)):  # the other defects in rounds 1 and 3
        assert about(sum(r[t] == "B" for r in said), n=250, p=defections, deviations=3.5)
    both = sum(r[0] == r[1] == "B" for r in said)  # no matter what it was before
    assert about(both, n=250, p=0.04, deviations=3.5)


@pytest.mark.parametrize(
    "player", [Scripted("random"), Scripted("defect", noise=1.0)], ids=["random", "noise"]
)
def test_random_replies_are_uniform_over_the_legal_ones_and_random_messages_lie_half_the_time(
    player,
):
    rounds = []
    for match in play_games("trust_split", (player, keeps()), count=330):
        rounds += trust_rounds(match)
    for coins in range(11):
        assert about(sum(round.kept[0] == coins for round in rounds), len(rounds), 1 / 11)
    claimed = [claim(round.said[0]) for round in rounds]
    assert set(claimed) == {0, 1, 2}
    honest = sum(HANDS[n] == round.hands[0] for n, round in zip(claimed, rounds))
    assert about(honest, len(rounds), 1 / 2)

    kept = []
    for match in play_games("split", (player, keeps()), count=110):
        kept += [tuple(round.kept[0]) for round in split_rounds(match)]
    assert len(set(kept)) > 300
    for item in range(3):
        assert about(sum(numbers[item] > 5 for numbers in kept), len(kept), 5 / 11)
        assert {numbers[item] for numbers in kept} == set(range(11))


def test_what_a_scripted_player_draws_depends_on_its_match_its_seat_and_the_seed_only():
    player = Scripted("random")

    def played(numbers, seed, players=(player, player)):
        matches = [Match(n, 0, 10, players) for n in numbers]
        play("trust_split", matches, [seed], 24)
        return {match.number: match for match in matches}

    everyone = played(range(6), seed=3)
    assert played([4], seed=3)[4].log == everyone[4].log
    assert played([4], seed=3, players=(Scripted("random"), player))[4].log == everyone[4].log
    two = played([4, 2], seed=3)
    assert two[4].log == everyone[4].log and two[2].log == everyone[2].log
    elsewhere = played([4], seed=4)
    streams = set()
    for match in [*everyone.values(), *elsewhere.values()]:
        streams |= {tuple(replies(match, seat)[1::2]) for seat in (0, 1)}
    assert len(streams) == 14


class Checked(Scripted):
    """A scripted player that must not give an illegal reply."""

    def answer(self, question):
        reply, choices = super().answer(question), question.turn.choices
        assert type(reply) is str
        assert claim(reply) is not None if choices is None else reply in choices
        return reply


@pytest.mark.parametrize("game", GAMES)
def test_every_scripted_player_gives_legal_replies_to_every_other(game):
    for one, other in itertools.product(scripted_names(game), repeat=2):
        matches = play_games(game, (Checked(one), Checked(other, noise=0.3)), count=2, rounds=5)
        assert all(len(match.history) == 5 for match in matches)


def test_all_scripted_players_can_play_any_game_but_the_liar_needs_messages():
    assert set(SCRIPTS) == {"cooperate", "defect", "tit_for_tat", "grim", "random", "liar"}
    for game in GAMES:
        useless = set() if game == "trust_split" else {"liar"}
        assert set(scripted_names(game)) == set(SCRIPTS) - useless


# -------------------------------------------------------------------------------------- play, meet


@pytest.mark.parametrize("game", GAMES)
def test_a_game_does_not_depend_on_how_many_are_played_at_once(game):
    def played(at_once):
        players = Scripted("tit_for_tat", noise=0.5), Scripted("random")
        matches = [Match(n, n // 2, 1 + n % 3, players) for n in range(7)]
        play(game, matches, [1, 2], 24, at_once)
        return [(match.log, match.history) for match in matches]

    together = played(None)
    assert [len(history) for _, history in together] == [1, 2, 3, 1, 2, 3, 1]
    for at_once in (1, 2, 3, 7, 50):
        assert played(at_once) == together


def test_a_player_gets_the_questions_of_all_games_together_up_to_the_number_played_at_once():
    for at_once, want in ((None, [5] * 3), (2, [2] * 6 + [1] * 3), (5, [5] * 3), (9, [5] * 3)):
        player, matches = moves("AAA"), []
        for n in range(5):
            matches.append(Match(n, n, 3, (player, moves("AAA"))))
        play("ipd", matches, [0], 0, at_once)
        assert player.calls == want


def test_games_of_a_batch_end_each_after_its_own_number_of_rounds():
    player = moves("ABAB")
    players = player, moves("BBBB")
    matches = [Match(n, n, rounds, players) for n, rounds in enumerate((3, 1, 4))]
    play("ipd", matches, [0], 0)
    assert ["".join(replies(match, 0)) for match in matches] == ["ABA", "A", "ABAB"]
    assert player.calls == [3, 2, 2, 1]


@pytest.mark.parametrize(
    "at_once, batches",
    [
        (None, [[(3, 0), (3, 1), (5, 1), (8, 0)]]),
        (2, [[(3, 0), (3, 1), (5, 1)], [(8, 0)]]),
    ],
)
def test_a_player_begins_with_its_conversations_replies_to_these_and_lets_go(at_once, batches):
    events = []

    class Told(Player):
        def begin(self, seed, keys):
            events.append(("begin", seed, sorted(keys), self.cache))
            self.cache = "large"

        def reply(self, questions):
            events.append(("reply", sorted(question.key for question in questions)))
            return ["A"] * len(questions)

    told, other = Told(), moves("A")
    matches = [Match(3, 0, 1, (told, told)), Match(5, 0, 1, (other, told))]
    matches.append(Match(8, 0, 1, (told, other)))
    play("ipd", matches, [6], 0, at_once)
    want = []
    for keys in batches:
        want += [("begin", [6, 1], keys, None), ("reply", keys)]
    assert events == want and told.cache is None


def test_replies_reach_the_game_and_the_seat_that_was_asked():
    def say(question):
        number, seat = question.key
        assert seat == question.turn.seat
        return f"{number} {seat} {len(question.history)}"

    player = Says(say)
    matches = [Match(n, 0, 2, (player, player)) for n in range(3)]
    play("split", matches, [0], 0)
    for n, match in enumerate(matches):
        assert replies(match, 0) == [f"{n} 0 0", f"{n} 0 1"]
        assert replies(match, 1) == [f"{n} 1 0", f"{n} 1 1"]


@pytest.mark.parametrize("at_once", [None, 1, 3])
def test_two_players_meet_in_both_seats_of_every_deal(at_once):
    a, b = keeps("1"), keeps("2")
    sides = meet("trust_split", a, b, 4, 3, [5], 24, at_once)
    assert [side.seat for side in sides] == [0, 1] * 4
    assert len({side.match.number for side in sides}) == 8
    dealt = []
    for match, seat in sides:
        assert match.players[seat] is a and match.players[1 - seat] is b
        assert replies(match, seat)[1::2] == ["1"] * 3
        assert replies(match, 1 - seat)[1::2] == ["2"] * 3
        dealt.append(cards(match))
    assert dealt[::2] == dealt[1::2]
    assert all(one != other for one, other in itertools.combinations(dealt[::2], 2))


# --------------------------------------------------------------------------- indicators and summary


def profile(match, seat):
    """The indicators of which anything was seen."""
    return {name: values for name, values in indicators(match.history, seat).items() if values}


def test_indicators_of_a_matrix_game_condition_on_the_own_move_then_the_others():
    [match] = play_games("ipd", (moves("AABAB"), moves("ABAAB")), rounds=5)
    # before rounds 1 to 4 seat 0 is in the states cc, cd, dc, cc
    assert profile(match, 0) == {
        "cooperation": [1, 1, 0, 1, 0],
        "p_c_first": [1],
        "p_c_cc": [1, 0],
        "p_c_cd": [0],
        "p_c_dc": [1],
        "cooperation_after_fair": [1, 1, 0],
        "cooperation_after_greedy": [0],
    }
    assert profile(match, 1) == {
        "cooperation": [1, 0, 1, 1, 0],
        "p_c_first": [1],
        "p_c_cc": [0, 0],
        "p_c_dc": [1],
        "p_c_cd": [1],
        "cooperation_after_fair": [0, 1, 0],
        "cooperation_after_greedy": [1],
    }


def test_indicators_of_trust_split_are_those_counted_by_hand():
    def player(plan):
        """Tells its hand (True) or another one, and keeps so many coins: one pair a round."""

        def say(question):
            honest, coins = plan[len(question.history)]
            if question.turn.choices is not None:
                return str(coins)
            own = HANDS.index(re.search(r"Your hand is (\w+)\.", question.turn.text)[1])
            return f"{HANDS[own if honest else own - 1]} it is"

        return Says(say)

    plans = (
        [(True, 10), (False, 3), (True, 6), (False, 9), (True, 5)],
        [(False, 8), (True, 10), (False, 6), (True, 2), (True, 10)],
    )
    upper = [True, False, False, True, False]  # of seat 0; below, up to half is cooperation
    for deal in range(1000):
        match = Match(0, deal, 5, (player(plans[0]), player(plans[1])))
        play("trust_split", [match], [0], 24)
        if [round.upper[0] for round in trust_rounds(match)] == upper:
            break
    # Seat 1 was seen greedy in round 0 and fair in round 3; seat 0 fair in round 1, greedy in round
    # 2 and fair in round 4. With the upper hand nobody is seen to be either, and what was seen
    # before stands.
    assert profile(match, 0) == {
        "cooperation": [1, 0, 1],
        "cooperation_after_greedy": [1, 0],
        "cooperation_after_fair": [1],
        "honesty": [1, 0, 1, 0, 1],
        "honesty_after_greedy": [0, 1, 0],
        "honesty_after_fair": [1],
        "keep_upper": [10, 9],
        "keep_upper_after_greedy": [9],
        "keep_lower": [3, 6, 5],
        "keep_lower_after_greedy": [3, 6],
        "keep_lower_after_fair": [5],
    }
    assert profile(match, 1) == {
        "cooperation": [0, 1],
        "cooperation_after_greedy": [1],
        "honesty": [0, 1, 0, 1, 1],
        "honesty_after_fair": [0],
        "honesty_after_greedy": [1, 1],
        "keep_upper": [10, 6, 10],
        "keep_upper_after_fair": [6],
        "keep_upper_after_greedy": [10],
        "keep_lower": [8, 2],
        "keep_lower_after_greedy": [2],
    }


def test_indicators_of_split_count_only_what_is_worth_more_to_one_of_the_two():
    def player(plan):
        """Keeps so much of what is worth more to it, to the other, and the same to both."""

        def say(question):
            high, low, same = plan[len(question.history)]
            told = [int(n) for n in re.findall(r"(?:hats|books|balls) (\d+)", question.turn.text)]
            kept = []
            for own, other in zip(told[-6:-3], told[-3:]):
                kept.append(high if own > other else low if own < other else same)
            return " ".join(str(n) for n in kept)

        return Says(say)

    players = (
        player([(10, 0, 5), (8, 6, 7), (9, 4, 10)]),
        player([(10, 5, 1), (7, 4, 2), (6, 1, 3)]),
    )
    [match] = play_games("split", players, rounds=3)
    assert profile(match, 0) == {
        "cooperation": [1, 0, 1],
        "cooperation_after_greedy": [0],
        "cooperation_after_fair": [1],
        "keep_high": [10, 8, 9],
        "keep_high_after_greedy": [8],
        "keep_high_after_fair": [9],
        "keep_low": [0, 6, 4],
        "keep_low_after_greedy": [6],
        "keep_low_after_fair": [4],
    }
    assert profile(match, 1) == {
        "cooperation": [0, 1, 1],
        "cooperation_after_fair": [1],
        "cooperation_after_greedy": [1],
        "keep_high": [10, 7, 6],
        "keep_high_after_fair": [7],
        "keep_high_after_greedy": [6],
        "keep_low": [5, 4, 1],
        "keep_low_after_fair": [4],
        "keep_low_after_greedy": [1],
    }


def test_a_summary_is_the_mean_over_all_rounds_and_none_of_what_did_not_occur():
    short = Match(0, 0, 1, (moves("A"), moves("B")))
    long = Match(1, 0, 3, (moves("AAA"), moves("AAB")))
    play("ipd", [short, long], [0], 0)
    mean = summarize([Side(short, 0), Side(long, 0)])  # points 0, then 3 3 0, of 6 at best
    assert (mean["points"], mean["points_other"]) == (1.5, 4)
    assert mean["welfare"] == pytest.approx((5 + 6 + 6 + 5) / 24)
    assert mean["cooperation"] == 1 and mean["p_c_first"] == 1
    assert mean["p_c_dd"] is None and mean["cooperation_after_greedy"] is None
    mean = summarize([Side(short, 1), Side(long, 1)])
    assert (mean["points"], mean["points_other"]) == (4, 1.5)
    assert mean["cooperation"] == 0.5 and mean["cooperation_after_fair"] == 0.5


def test_cooperation_in_trust_split_is_seen_only_with_the_lower_hand():
    [match] = play_games("trust_split", ("cooperate", "cooperate"), rounds=1)
    upper = trust_rounds(match)[0].upper.index(True)
    with_upper, with_lower = summarize([Side(match, upper)]), summarize([Side(match, 1 - upper)])
    assert with_upper["cooperation"] is None and with_lower["cooperation"] == 1
    assert (with_upper["keep_upper"], with_upper["keep_lower"]) == (10, None)
    assert (with_lower["keep_upper"], with_lower["keep_lower"]) == (None, 0)
    for mean in (with_upper, with_lower):
        assert mean["honesty"] == mean["welfare"] == 1


CONDITIONED = {  # indicators that are also measured after the other was fair, and after greedy
    **dict.fromkeys(MATRIX, ["cooperation"]),
    "trust_split": ["cooperation", "honesty", "keep_upper", "keep_lower"],
    "split": ["cooperation", "keep_high", "keep_low"],
}


@pytest.mark.parametrize("game", GAMES)
def test_every_summary_of_a_game_has_the_same_names_whatever_occurred(game):
    want = {"points", "points_other", "welfare"}
    if game in MATRIX:
        want |= {"p_c_first", "p_c_cc", "p_c_cd", "p_c_dc", "p_c_dd"}
    for name in CONDITIONED[game]:
        want |= {name, f"{name}_after_fair", f"{name}_after_greedy"}
    assert GAMES[game].headline in want
    for pair in itertools.product(scripted_names(game), repeat=2):
        for rounds in (1, 3):
            [match] = play_games(game, pair, rounds=rounds)
            assert set(summarize([Side(match, 0)])) == set(summarize([Side(match, 1)])) == want


def test_a_reply_that_a_game_does_not_allow_is_an_error(monkeypatch):
    def careless(rng, rounds, max_tokens):  # its fair reply is none of the choices
        yield [Turn(seat, "In?", ("in", "out"), fair="In", greedy="out") for seat in (0, 1)]
        yield Round((1, 1), 2, (True, True), ({}, {}))

    monkeypatch.setitem(GAMES, "careless", Game(careless, scale=1))
    play_games("careless", ("defect", "defect"))
    with pytest.raises(AssertionError):
        play_games("careless", ("defect", "cooperate"))


# ---------------------------------------------------------------------------- the files themselves


def test_the_game_in_the_readme_can_be_played(monkeypatch):
    monkeypatch.setattr(games, "GAMES", dict(GAMES))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [code] = [block for block in blocks if "GAMES[" in block]
    exec(code, dict(vars(games)))
    # ten coins each: what is not kept grows by half and is shared equally
    for pair, points in (
        (("cooperate", "cooperate"), (15, 15)),
        (("defect", "cooperate"), (17.5, 7.5)),
        (("defect", "defect"), (10, 10)),
    ):
        [match] = play_games("public_goods", pair, rounds=3)
        assert [tuple(round.points) for round in match.history] == [points] * 3
        assert [round.best for round in match.history] == [30] * 3


@pytest.mark.parametrize("command", ["format --check", "check --output-format concise"])
def test_all_python_files_are_laid_out_and_clean_by_ruff(command):
    files = [str(path) for path in [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("tests/*.py"))]]
    ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache"]
    done = subprocess.run([*ruff, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
