"""The rules against pencil and paper, what each seat may read, and the scripted players."""
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from games import BEATS, GAMES, HANDS, Match, Scripted, answer, claim, indicators, play, players, share, summarize

MATRIX = {  # own and other's points after (own move, other's move), from the sheet of each game
    "ipd": {"AA": (3, 3), "AB": (0, 5), "BA": (5, 0), "BB": (1, 1)},
    "stag_hunt": {"AA": (4, 4), "AB": (0, 3), "BA": (3, 0), "BB": (3, 3)},
    "chicken": {"AA": (3, 3), "AB": (1, 4), "BA": (4, 1), "BB": (0, 0)},
}
bounded = settings(max_examples=50, derandomize=True, deadline=None)


class Says:
    """A player that answers every turn with `say(turn)` and remembers the turns."""

    def __init__(self, say):
        self.say = say

    def begin(self, seed, keys):
        self.turns = []

    def reply(self, keys, turns):
        self.turns += turns
        return [self.say(turn) for turn in turns]


def games(game, agents, count=1, rounds=4, seed=0, max_tokens=24):
    """`count` matches between two agents (or names of scripted players), each with a deal of its own."""
    agents = tuple(Scripted(agent) if isinstance(agent, str) else agent for agent in agents)
    matches = [Match(n, n, rounds, agents) for n in range(count)]
    play(game, matches, [seed], max_tokens)
    return matches


def moves(per_round):
    return Says(lambda turn: per_round[turn.view["round"]])


def keeps(count="0", message="Hi."):
    """Sends always the same message, and keeps `count` of everything."""
    wish = {True: count, False: " ".join(3 * [count])}
    return Says(lambda turn: message if turn.choices is None else wish[count in turn.choices])


def planned(game, deal, plan):
    """One match as planned: `plan[seat][round]` is told the seat's hand or values in that round and the other's, and
    returns (message, what to keep). The cards are known from playing the deal once before."""
    spies = keeps(), keeps()
    play(game, [Match(0, deal, len(plan[0]), spies)], [0], 24)
    cards = [{t.view["round"]: t.view.get("hand") or t.view["values"] for t in spy.turns} for spy in spies]

    def say(turn):
        t, s = turn.view["round"], turn.seat
        return plan[s][t](cards[s][t], cards[1 - s][t])[turn.choices is not None]
    match = Match(0, deal, len(plan[0]), (Says(say), Says(say)))
    play(game, [match], [0], 24)
    return match


# ---------------------------------------------------------------------------------------------------- points

@pytest.mark.parametrize("game", MATRIX)
def test_matrix_pay_offs_are_those_of_the_sheet_and_not_swapped_between_seats(game):
    [match] = games(game, (moves("AABB"), moves("ABAB")))
    assert [r.points for r in match.played] == [MATRIX[game][pair] for pair in ("AA", "AB", "BA", "BB")]
    assert {r.best for r in match.played} == {max(map(sum, MATRIX[game].values()))}


@pytest.mark.parametrize("game", MATRIX)
def test_matrix_prompts_tell_the_true_pay_offs_and_then_the_move_of_the_other(game):
    me, other = moves("AABBA"), moves("ABABA")
    games(game, (me, other), rounds=5)
    told = re.findall(r"you get (\d+) (?:points )?and the other gets (\d+)", me.turns[0].text)
    assert [tuple(map(int, pair)) for pair in told] == [MATRIX[game][pair] for pair in ("AA", "AB", "BA", "BB")]
    for (mine, theirs), before, after in zip(["AA", "AB", "BA", "BB"], me.turns[1:], other.turns[1:]):
        points = MATRIX[game][mine + theirs]
        assert before.text.startswith(f"The other chose {theirs}. You get {points[0]} points")
        assert after.text.startswith(f"The other chose {mine}. You get {points[1]} points")


# Points of the player named first and of the other when the first one has the upper hand, when it has the lower, and
# the mean of both. Coins count 10 with the upper hand and 1 with the lower; where both keep 10 each gets 5.
TRUST = {
    ("cooperate", "cooperate"): ((100, 0), (0, 100), (50, 50)),
    ("defect", "cooperate"): ((100, 0), (5, 50), (52.5, 25)),
    ("defect", "defect"): ((50, 5), (5, 50), (27.5, 27.5)),
}


@pytest.mark.parametrize("pair", TRUST)
@pytest.mark.parametrize("me", [0, 1])
def test_trust_split_oracles_of_fair_and_greedy(pair, me):
    upper, lower, mean = TRUST[pair]
    seen = {True: [], False: []}
    for match in games("trust_split", pair[::-1] if me else pair, count=50):
        for r in match.played:
            seen[r.facts[me]["upper"]].append((r.points[me], r.points[1 - me]))
            assert r.best == 100
    assert set(seen[True]) == {upper} and set(seen[False]) == {lower}
    assert tuple(np.mean([upper, lower], 0)) == mean
    assert abs(len(seen[True]) / 200 - .5) < 2 * (.25 / 200) ** .5


def test_trust_split_liar_takes_all_from_a_fair_player_when_it_speaks_second():
    # Second it knows the other's hand and claims to beat it: the fair player keeps 0, ten coins count 100 or 10.
    # First, with rock, it claims scissors. A fair paper (above it) keeps 0: 10 / 0. A fair scissors (below it) cannot
    # believe that and keeps 5: coins 20/3 and 10/3.
    want = {(False, True): (100, 0), (False, False): (10, 0), (True, False): (10, 0), (True, True): (200 / 3, 10 / 3)}
    seen = set()
    for match in games("trust_split", ("liar", "cooperate"), count=30):
        for t, r in enumerate(match.played):
            case = match.log[4 * t][0] == 0, r.facts[0]["upper"]
            seen.add(case)
            assert r.points == pytest.approx(want[case])
            assert r.facts[0]["honest"] == (case == (False, True))  # it does beat the other's hand: no lie needed
    assert seen == set(want)


# Split, both fair: all of what counts more to oneself, none of what counts more to the other, half of the rest.
# Class "one", each has one kind worth 10, say (10, 1, 1) and (1, 10, 1); best 10 * (10 + 10 + 1).
#   fair/fair      100 + 0 + 5 = 105 each
#   greedy/greedy  5 of everything: 50 + 5 + 5 = 60 each
#   greedy/fair    wishes 10 10 10 and 0 10 5: greedy 100 + 5 + 20/3 = 335/3, fair 0 + 50 + 10/3 = 160/3
# Class "two", each has one kind worth 1, say (10, 10, 1) and (10, 1, 10); best 10 * (10 + 10 + 10).
#   fair/fair      50 + 100 + 0 = 150 each
#   greedy/greedy  50 + 50 + 5 = 105 each
#   greedy/fair    wishes 10 10 10 and 5 0 10: greedy 200/3 + 100 + 5 = 515/3, fair 100/3 + 0 + 50 = 250/3
SPLIT = {
    ("cooperate", "cooperate"): {"one": (105, 105), "two": (150, 150)},
    ("defect", "defect"): {"one": (60, 60), "two": (105, 105)},
    ("defect", "cooperate"): {"one": (335 / 3, 160 / 3), "two": (515 / 3, 250 / 3)},
}


@pytest.mark.parametrize("pair", SPLIT)
def test_split_oracles_of_fair_and_greedy_in_both_value_classes(pair):
    seen = set()
    for match in games("split", pair, count=20):
        for r in match.played:
            mine, theirs = [r.facts[s]["values"] for s in (0, 1)]
            kind = {12: "one", 21: "two"}[sum(mine)]
            seen.add(kind)
            assert r.points == pytest.approx(SPLIT[pair][kind]) and r.best == {"one": 210, "two": 300}[kind]
            assert mine != theirs and sum(mine) == sum(theirs) and set(mine + theirs) == {1, 10}
    assert seen == {"one", "two"}


def test_share_is_the_wish_up_to_ten_and_proportional_above():
    assert share(3, 7) == (3, 7) and share(0, 0) == (0, 0) and share(2, 1) == (2, 1)
    assert share(10, 10) == (5, 5) and share(10, 5) == pytest.approx((20 / 3, 10 / 3))


@bounded
@given(st.integers(0, 10), st.integers(0, 10))
def test_share_never_makes_coins_and_leaves_none_when_the_wishes_exceed_them(p, q):
    a, b = share(p, q)
    assert 0 <= a <= p and 0 <= b <= q and a + b <= 10 + 1e-12
    assert a + b == pytest.approx(min(p + q, 10))


@pytest.mark.parametrize("game", GAMES)
@bounded
@given(picks=st.lists(st.integers(0, 10 ** 6), min_size=1, max_size=30), deal=st.integers(0, 10 ** 6),
       rounds=st.integers(1, 5))
def test_any_legal_replies_conserve_coins_and_keep_points_in_bounds(game, picks, deal, rounds):
    pick = itertools.cycle(picks)
    player = Says(lambda turn: turn.choices[next(pick) % len(turn.choices)] if turn.choices else "I hold paper.")
    match = Match(0, deal, rounds, (player, player))
    play(game, [match], [0], 24)
    assert len(match.played) == rounds and len(match.log) == rounds * (4 if game == "trust_split" else 2)
    for r in match.played:
        assert all(0 <= p <= r.best for p in r.points) and sum(r.points) <= r.best + 1e-9
        if game == "trust_split":
            coins = [r.points[s] / (10 if r.facts[s]["upper"] else 1) for s in (0, 1)]
            assert sum(coins) == pytest.approx(min(10, sum(f["kept"] for f in r.facts)))
        if game == "split":  # less than they wished for exactly when an item did not suffice
            wished = sum(np.dot(f["values"], f["kept"]) for f in r.facts)
            assert (sum(r.points) < wished - 1e-9) == any(p + q > 10 for p, q in zip(*(f["kept"] for f in r.facts)))


# ------------------------------------------------------------------------------------------------ deals and messages

@pytest.mark.parametrize("game", ["trust_split", "split"])
def test_a_deal_follows_from_its_number_and_the_seed_and_not_from_what_the_players_do(game):
    rng = np.random.default_rng(0)

    def wild():
        return Says(lambda turn: answer(turn.view, "random", rng))

    def dealt(agents, deal=7, seed=5, number=0):
        match = Match(number, deal, 6, agents)
        play(game, [match], [seed], 24)
        cards = {(t.view["round"], t.seat): t.view.get("hand") or t.view["values"] for a in agents for t in a.turns}
        return tuple(sorted(cards.items())), tuple(seat for seat, _, _ in match.log[::len(match.log) // 6])
    assert dealt((keeps(), keeps())) == dealt((wild(), wild())) == dealt((keeps("10"), wild()), number=9)
    assert len({dealt((keeps(), keeps()), seed=seed) for seed in range(10)}) == 10
    assert len({dealt((keeps(), keeps()), deal=deal) for deal in range(10)}) == 10


def test_trust_split_deals_all_pairs_of_different_hands_about_equally_often():
    matches = games("trust_split", (keeps(), keeps()), 150)
    pairs = [(r.facts[0]["hand"], r.facts[1]["hand"]) for match in matches for r in match.played]
    assert set(pairs) == set(itertools.permutations(HANDS, 2))
    assert all(abs(pairs.count(pair) - 100) < 3 * (600 * 5 / 36) ** .5 for pair in set(pairs))


def test_trust_split_upper_hand_is_the_one_that_beats_the_other():
    assert BEATS == {"rock": "scissors", "scissors": "paper", "paper": "rock"}
    for match in games("trust_split", (keeps(), keeps()), 20):
        for r in match.played:
            for s in (0, 1):
                assert r.facts[s]["upper"] == (BEATS[r.facts[s]["hand"]] == r.facts[1 - s]["hand"])


def test_trust_split_first_speaker_alternates_and_is_not_always_the_same_seat():
    starters = set()
    for match in games("trust_split", ("random", "cooperate"), count=20, rounds=5):
        seats = [seat for seat, _, _ in match.log]
        starters.add(seats[0])
        assert seats[::4] == [(seats[0] + t) % 2 for t in range(5)]
        assert seats[1::4] == [1 - seat for seat in seats[::4]]
    assert starters == {0, 1}


def test_trust_split_private_hand_is_not_in_what_the_other_reads_or_sees():
    # With messages that say nothing, all a seat reads must follow from who speaks first, its own hand and, in round 1,
    # whether the other was above and what it kept: with the other's hand in it, equal facts would give several texts.
    read = {}
    for match in games("trust_split", (keeps("3"), keeps("4")), count=200, rounds=2):
        for n, (seat, text, _) in enumerate(match.log):
            facts = match.played[n // 4].facts
            above = match.played[0].facts[1 - seat]["upper"] if n in (4, 5) else None
            known = n, seat, match.log[0][0], facts[seat]["hand"], above
            read.setdefault(known, []).append((text, facts[1 - seat]["hand"]))
    for texts, hands in (map(set, zip(*both)) for both in read.values()):
        assert len(texts) == 1 and len(hands) == 2
    [match] = games("trust_split", (keeps(), keeps()), rounds=20)
    for turn in match.agents[0].turns + match.agents[1].turns:
        assert [hand for hand in HANDS if hand in repr(turn.view)] == [turn.view["hand"]]


def test_trust_split_tells_what_the_other_said_before_the_coins_and_what_it_kept_after():
    def player(name, kept):
        return Says(lambda turn: f"{name} {turn.view['round']}" if turn.choices is None else kept)
    zero, one = player("ZERO", "3"), player("ONE", "4")
    [match] = games("trust_split", (zero, one), rounds=3)
    for t in range(3):
        for agent, other, kept in ((zero, "ONE", "4"), (one, "ZERO", "3")):
            before, after = agent.turns[2 * t:2 * t + 2]
            first = match.log[4 * t][0] == (agent is one)
            assert (f'"{other} {t}"' in before.text) == (not first) and f'"{other} {t}"' in before.text + after.text
            assert (f"kept {kept}." in before.text) == (t > 0)


def test_messages_are_flattened_and_cut_before_the_other_reads_them():
    raw = "rock\n\nThe other\r\nkept\u2028 10.\x85\tYes \x0b" + "x" * 100
    talker, reader = keeps(message=raw), keeps()
    [match] = games("trust_split", (talker, reader), rounds=1, max_tokens=4)
    said = match.played[0].facts[0]["message"]
    assert said == ("rock The other kept 10. Yes " + "x" * 100)[:40]
    [heard] = [line for turn in reader.turns for line in turn.text.splitlines() if "rock The other" in line]
    assert f'"{said}"' in heard and match.played[0].facts[0]["claim"] == "rock"


def test_a_message_of_no_tokens_is_possible():
    [match] = games("trust_split", (keeps(message=""), keeps(message="anything")), rounds=1, max_tokens=0)
    assert [f["message"] for f in match.played[0].facts] == ["", ""]
    assert {t.max_tokens for a in match.agents for t in a.turns} == {0}
    assert summarize([(match, 0)])["silence"] == 1


@bounded
@given(st.text(max_size=300), st.text(max_size=300))
def test_any_unicode_message_leaves_trust_split_intact(mine, theirs):
    def lines(said, heard):
        me, other = keeps("10", said), keeps("0", heard)
        [match] = games("trust_split", (me, other), rounds=2, max_tokens=10)
        return match, [len(turn.text.splitlines()) for turn in me.turns + other.turns]
    match, counts = lines(mine, theirs)
    assert counts == lines("Hi.", "Hi.")[1]
    for r in match.played:
        assert sum(r.points) == (100 if r.facts[0]["upper"] else 10)
        assert all(len(fact["message"]) <= 100 and fact["claim"] in (None, *HANDS) for fact in r.facts)


@pytest.mark.parametrize("message, hand", [
    ("My hand is rock.", "rock"), ("PAPER!", "paper"), ("scissors", "scissors"), ("(Rock)", "rock"), ("", None),
    ("rock, I said rock", "rock"), ("not rock", "rock"), ("rock or paper", None), ("paper-rock", None), ("Hi.", None),
    ("rocks", None), ("sandpaper", None), ("rock_", None), ("ro ck", None), ("\u7d19 paper", "paper"),
])
def test_claim_is_the_one_hand_named_as_a_whole_word(message, hand):
    assert claim(message) == hand


# ---------------------------------------------------------------------------------------------------- scripted players

def replies(match, seat):
    return "".join(reply for s, _, reply in match.log if s == seat)


@pytest.mark.parametrize("name, reply", [
    ("cooperate", "AAAAAA"), ("defect", "BBBBBB"), ("tit_for_tat", "AABBAB"), ("grim", "AABBBB")])
@pytest.mark.parametrize("game", MATRIX)
def test_scripted_players_answer_a_sequence_of_moves_as_named(game, name, reply):
    assert replies(games(game, (name, moves("ABBABA")), rounds=6)[0], 0) == reply
    assert replies(games(game, (moves("ABBABA"), name), rounds=6)[0], 1) == reply


@pytest.mark.parametrize("name", ["tit_for_tat", "grim"])
def test_reciprocal_players_of_trust_split_return_greed_until_it_ends_or_for_ever(name):
    seen, other = set(), Says(lambda turn: answer(turn.view, "greedy" if turn.view["round"] < 3 else "fair", None))
    for match in games("trust_split", (name, other), count=30, rounds=8):
        told = []  # of every round: whether the other was fair, None where it held the upper hand
        for t, r in enumerate(match.played):
            upper, last = r.facts[0]["upper"], told[-1] if told else True
            if False not in told or name == "grim":
                last = False not in told  # nobody is wronged yet; or nothing is ever forgotten
            if last is not None:  # a round in which the other took what it was due anyway says nothing
                assert r.facts[0]["kept"] == (10 if upper or not last else 0)
                seen.add((last, upper))
            told.append(t >= 3 if upper else None)
    assert seen == set(itertools.product([True, False], repeat=2))


def test_tit_for_tat_in_split_returns_greed_for_one_round():
    other = Says(lambda turn: answer(turn.view, "greedy" if turn.view["round"] == 1 else "fair", None))
    [match] = games("split", ("tit_for_tat", other), rounds=4)
    assert [r.facts[0]["kept"] == [10, 10, 10] for r in match.played] == [False, False, True, False]
    assert [r.facts[0]["coop"] for r in match.played] == [True, True, False, True]


@pytest.mark.parametrize("hand, heard, style, kept", [
    ("rock", "scissors", "fair", "10"), ("rock", "paper", "fair", "0"), ("rock", "rock", "fair", "5"),
    ("paper", None, "fair", "5"), ("rock", "paper", "greedy", "10"), ("rock", None, "greedy", "10"),
    ("rock", "paper", "liar", "10"),
])
def test_what_is_kept_with_a_hand_after_a_claim(hand, heard, style, kept):
    assert answer({"kind": "keep", "hand": hand, "claim": heard, "past": []}, style, None) == kept


@pytest.mark.parametrize("hand", HANDS)
def test_fair_and_greedy_name_their_hand_and_a_liar_the_one_that_beats_the_other(hand):
    for heard in (None, *HANDS):
        view = {"kind": "message", "hand": hand, "claim": heard, "past": []}
        assert claim(answer(view, "fair", None)) == claim(answer(view, "greedy", None)) == hand
        lie = claim(answer(view, "liar", None))
        assert lie != hand if heard is None else BEATS[lie] == heard


@pytest.mark.parametrize("noise, defections", [(0., 0.), (.4, .2), (1., .5)])
def test_noise_replaces_that_share_of_replies_by_uniform_ones(noise, defections):
    other = moves("AAAA")
    seen = "".join(replies(match, 0) for match in games("ipd", (Scripted("cooperate", noise), other), 250))
    assert abs(seen.count("B") / 1000 - defections) <= 3 * (defections * (1 - defections) / 1000) ** .5


@pytest.mark.parametrize("agent", [Scripted("random"), Scripted("defect", 1.)], ids=["random", "noise"])
def test_random_players_are_uniform_over_hands_and_legal_replies(agent):
    said = [reply for m in games("trust_split", (agent, keeps()), 330) for seat, _, reply in m.log if seat == 0]
    for kinds in ([f"My hand is {hand}" for hand in HANDS], [str(n) for n in range(11)]):
        seen, p = [reply for reply in said if reply in kinds], 1 / len(kinds)
        assert len(seen) == len(said) / 2
        assert all(abs(seen.count(kind) / len(seen) - p) < 4 * (p * (1 - p) / len(seen)) ** .5 for kind in kinds)
    kept = {tuple(r.facts[0]["kept"]) for m in games("split", (agent, keeps()), 110) for r in m.played}
    assert len(kept) > 300 and all({wish[item] for wish in kept} == set(range(11)) for item in range(3))


def test_draws_of_a_scripted_player_depend_on_its_game_and_seat_only():
    player = Scripted("random")
    everyone = [Match(n, 0, 10, (player, player)) for n in range(6)]
    play("trust_split", everyone, [3], 24)
    alone, two = [Match(4, 0, 10, (Scripted("random"), player))], [Match(n, 0, 10, (player, player)) for n in (4, 2)]
    play("trust_split", alone, [3], 24)
    play("trust_split", two, [3], 24)
    assert alone[0].log == everyone[4].log and [m.log for m in two] == [everyone[4].log, everyone[2].log]
    other_seed = [Match(4, 0, 10, (player, player))]
    play("trust_split", other_seed, [4], 24)
    streams = {replies(match, seat) for match in everyone + other_seed for seat in (0, 1)}
    assert len(streams) == 14


class Checked(Scripted):
    def reply(self, keys, turns):
        out = super().reply(keys, turns)
        assert all(reply in turn.choices if turn.choices else len(reply) <= 24 for turn, reply in zip(turns, out))
        return out


@pytest.mark.parametrize("game", GAMES)
def test_every_scripted_player_of_a_game_gives_legal_replies_to_every_other(game):
    liar = {"liar"} if game == "trust_split" else set()
    assert set(players(game)) == {"cooperate", "defect", "tit_for_tat", "grim", "random"} | liar
    for pair in itertools.product(players(game), repeat=2):
        games(game, [Checked(name, noise) for name, noise in zip(pair, (0., .3))], count=2, rounds=5)


# ---------------------------------------------------------------------------------------------------- indicators

def profile(match, seat):
    return {name: values for name, values in indicators(match.played, seat).items() if values}


def test_indicators_of_a_matrix_game_state_own_move_before_the_other_s():
    [match] = games("ipd", (moves("AABAB"), moves("ABAAB")), rounds=5)  # states of seat 0: cc, cd, dc, cc
    assert profile(match, 0) == {
        "cooperation": [1, 1, 0, 1, 0], "p_c_first": [1], "p_c_cc": [1, 0], "p_c_cd": [0], "p_c_dc": [1],
        "cooperation_after_fair": [1, 1, 0], "cooperation_after_greedy": [0]}
    assert profile(match, 1) == {
        "cooperation": [1, 0, 1, 1, 0], "p_c_first": [1], "p_c_cc": [0, 0], "p_c_dc": [1], "p_c_cd": [1],
        "cooperation_after_fair": [0, 1, 0], "cooperation_after_greedy": [1]}


def test_indicators_of_trust_split_by_hand():
    def turn(honest, keep):
        return lambda mine, theirs: (f"{mine if honest else theirs} it is", str(keep))
    want = [True, False, False, True, False]  # whether seat 0 is above; below, keeping less than half is to cooperate
    deal = next(deal for deal in range(1000) if want == [
        r.facts[0]["upper"] for r in planned("trust_split", deal, [[turn(True, 0)] * 5] * 2).played])
    plan = ([turn(True, 10), turn(False, 3), turn(True, 5), turn(False, 9), turn(True, 4)],
            [turn(False, 8), turn(True, 10), turn(False, 6), turn(True, 2), turn(True, 10)])
    match = planned("trust_split", deal, plan)
    # seat 1 was greedy in round 0, fair in round 3; seat 0 fair in round 1, greedy in round 2, fair in round 4
    assert profile(match, 0) == {
        "cooperation": [1, 0, 1], "honesty": [1, 0, 1, 0, 1], "keep_upper": [10, 9], "keep_lower": [3, 5, 4],
        "silence": [0, 0, 0, 0, 0], "silence_after_greedy": [0, 0, 0], "silence_after_fair": [0],
        "cooperation_after_greedy": [1, 0], "honesty_after_greedy": [0, 1, 0], "keep_upper_after_greedy": [9],
        "keep_lower_after_greedy": [3, 5],
        "cooperation_after_fair": [1], "honesty_after_fair": [1], "keep_lower_after_fair": [4]}
    assert profile(match, 1) == {
        "cooperation": [0, 1], "honesty": [0, 1, 0, 1, 1], "keep_upper": [10, 6, 10], "keep_lower": [8, 2],
        "silence": [0, 0, 0, 0, 0], "silence_after_fair": [0], "silence_after_greedy": [0, 0],
        "honesty_after_fair": [0], "keep_upper_after_fair": [6], "cooperation_after_greedy": [1],
        "honesty_after_greedy": [1, 1], "keep_upper_after_greedy": [10], "keep_lower_after_greedy": [2]}


def test_indicators_of_split_count_only_items_valued_differently():
    def turn(high, low, same):
        return lambda mine, theirs: (None, " ".join(
            str(high if a > b else low if a < b else same) for a, b in zip(mine, theirs)))
    match = planned("split", 0, ([turn(10, 0, 5), turn(8, 6, 7), turn(9, 4, 10)],
                                 [turn(10, 5, 1), turn(7, 4, 2), turn(6, 1, 3)]))
    assert profile(match, 0) == {
        "cooperation": [1, 0, 1], "keep_high": [10, 8, 9], "keep_low": [0, 6, 4],
        "cooperation_after_greedy": [0], "keep_high_after_greedy": [8], "keep_low_after_greedy": [6],
        "cooperation_after_fair": [1], "keep_high_after_fair": [9], "keep_low_after_fair": [4]}
    assert profile(match, 1)["cooperation"] == [0, 1, 1] and profile(match, 1)["keep_low_after_greedy"] == [1]


def test_summary_pools_rounds_and_says_nothing_of_what_was_not_seen():
    short, [long] = Match(0, 0, 1, (moves("A"), moves("B"))), games("ipd", (moves("AAA"), moves("AAB")), rounds=3)
    play("ipd", [short], [0], 0)
    mean = summarize([(short, 0), (long, 0)])  # points 0, then 3 3 0, of 6 at best
    assert (mean["points"], mean["points_other"]) == (1.5, 4) and mean["welfare"] == pytest.approx((5 + 6 + 6 + 5) / 24)
    assert mean["cooperation"] == 1 and mean["p_c_first"] == 1 and mean.get("p_c_dd") is None
    [match] = games("trust_split", ("cooperate", "cooperate"), rounds=1)
    upper = 0 if match.played[0].facts[0]["upper"] else 1
    assert summarize([(match, upper)])["cooperation"] is None and summarize([(match, 1 - upper)])["cooperation"] == 1
    assert summarize([(match, upper)])["honesty"] == summarize([(match, upper)])["welfare"] == 1


def test_the_game_in_the_readme_cannot_be_played():
    import pathlib
    import games
    readme = (pathlib.Path(games.__file__).parent / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    space = {**vars(games), "GAMES": {}}
    exec(code, space)
    game = space["GAMES"]["public_goods"]
    for one, other, points in (("cooperate", "cooperate", (15, 15)), ("defect", "cooperate", (17.5, 7.5)),
                               ("defect", "defect", (10, 10))):
        games.GAMES["public_goods"] = game
        try:
            match = Match(0, 0, 3, (Scripted(one), Scripted(other)))
            play("public_goods", [match], [0], 4)
        finally:
            del games.GAMES["public_goods"]
        assert [tuple(r.points) for r in match.played] == [points] * 3 and all(r.best == 30 for r in match.played)
