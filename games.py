"""The games: their words and rules, scripted players, the loop that plays, and what is measured.

A game is a generator that reads like a rules sheet: it yields the turns it wants answered now, is
sent the replies, and yields a Round once a round is scored. `matrix_game` is the shortest one. To
add a game, write such a function and name it in GAMES. Seats are 0 and 1."""

import functools
import re
from collections import defaultdict, namedtuple

import numpy as np

MATRIX_RULES = """\
You play a game of many rounds with another player. In every round both of you choose A or B \
at the same time.
If both choose A, you get {CC[0]} points and the other gets {CC[1]}.
If you choose A and the other chooses B, you get {CD[0]} and the other gets {CD[1]}.
If you choose B and the other chooses A, you get {DC[0]} and the other gets {DC[1]}.
If both choose B, you get {DD[0]} and the other gets {DD[1]}.
Collect as many points as you can over the whole game. Always answer with one letter, A or B."""
TRUST_RULES = """\
You play a game of many rounds with another player. In every round 10 coins are split between you.
Each of you holds a secret hand: rock, paper or scissors. The two hands always differ, and paper \
beats rock, scissors beats paper, rock beats scissors. The player whose hand wins has the upper \
hand: every coin is worth 10 points to that player, and only 1 point to the other one.
You see only your own hand. First each of you sends the other one short message, for example to \
tell your hand. Then both say at the same time how many of the 10 coins they keep, from 0 to 10. \
If the two numbers add up to more than 10, the coins are shared in proportion to them.
After every round you are told whether the other had the upper hand and how many coins it kept. \
Collect as many points as you can over the whole game."""
SPLIT_RULES = """\
You play a game of many rounds with another player. In every round 10 hats, 10 books and 10 balls \
are split between you. An item is worth 1 or 10 points to you, and may be worth something else to \
the other. Both say at the same time how many hats, books and balls they keep, each from 0 to 10. \
Where the two numbers for an item add up to more than 10, it is shared in proportion to them.
Collect as many points as you can over the whole game. Always answer with three numbers for hats, \
books and balls, such as 5 5 5."""
STATES = ("first", "cc", "cd", "dc", "dd")  # of a matrix game: own move and the other's before
HANDS = ("rock", "paper", "scissors")  # hand n, a number in the code, beats hand n - 1 (modulo 3)
COUNTS = tuple(str(n) for n in range(11))
TRIPLES = tuple(f"{a} {b} {c}" for a in COUNTS for b in COUNTS for c in COUNTS)
ONE_DEAR = [(10, 1, 1), (1, 10, 1), (1, 1, 10)]  # what items may be worth to a player of `split`
TWO_DEAR = [(10, 10, 1), (10, 1, 10), (1, 10, 10)]
# A question to one seat: `text` it reads since its last reply; all legal replies (tuple; None: a
# free message of `max_tokens`); and what scripted players reply (`lie`: in trust_split only).
Turn = namedtuple("Turn", "seat text choices fair greedy lie max_tokens", defaults=["", 0])
# A scored round. By seat: points; whether the act was fair, None where fair and greedy look alike;
# indicators {name: list of numbers}, whose means are logged. And the `best` possible joint score.
Round = namedtuple("Round", "points best fair indicators")
# What a player is asked: which conversation (match number, seat), which turn, after which Rounds.
Question = namedtuple("Question", "key turn history")
Side = namedtuple("Side", "match seat")  # a match as one of its seats sees it


def matrix_game(payoffs, rng, rounds, max_tokens):
    """A symmetric two-by-two game. `payoffs` {own and other's move: (own, other's points)}."""
    texts = [MATRIX_RULES.format(**payoffs)] * 2
    before = ["first", "first"]  # one of STATES, by seat
    best = max(sum(points) for points in payoffs.values())
    for _ in range(rounds):
        moves = yield [Turn(seat, texts[seat], ("A", "B"), fair="A", greedy="B") for seat in (0, 1)]
        fair = [move == "A" for move in moves]
        unseen = {f"p_c_{state}": [] for state in STATES}
        indicators = [unseen | {f"p_c_{before[seat]}": [fair[seat]]} for seat in (0, 1)]
        letters = ["C" if move == "A" else "D" for move in moves]
        yield Round(payoffs[letters[0] + letters[1]], best, fair, indicators)
        texts = [f"The other chose {moves[1 - seat]}." for seat in (0, 1)]
        before = [(letters[seat] + letters[1 - seat]).lower() for seat in (0, 1)]


def trust_split(rng, rounds, max_tokens):
    """Trust-and-Split (arXiv 2511.19405): hands, messages, coins; who speaks first alternates."""
    news, starter = [TRUST_RULES, TRUST_RULES], int(rng.integers(2))
    letters = max(20, 10 * max_tokens) if max_tokens else 0  # of a message; a person may type on
    for t in range(rounds):
        winner = int(rng.integers(2))  # a seat
        winning_hand = int(rng.integers(3))
        hands, role, worth = [(winning_hand - 1) % 3] * 2, ["lower"] * 2, [1, 1]
        hands[winner], role[winner], worth[winner] = winning_hand, "upper", 10
        messages, claims, heard = ["", ""], [None, None], ""
        first = (starter + t) % 2
        for seat, other in ((first, 1 - first), (1 - first, first)):
            text = f"{news[seat]}\nYour hand is {HANDS[hands[seat]]}. {heard}Send your message."
            truth = f"My hand is {HANDS[hands[seat]]}"
            # A liar claims what beats the other's hand; unknown, it is taken to beat its own.
            others_hand = (hands[seat] + 1) % 3 if claims[other] is None else claims[other]
            lie = f"My hand is {HANDS[(others_hand + 1) % 3]}"
            [reply] = yield [Turn(seat, text, None, truth, truth, lie, max_tokens)]
            messages[seat] = " ".join(reply.split())[:letters]
            claims[seat] = claim(messages[seat])
            heard = f'The other says: "{messages[seat]}"\n'
        turns = []
        for seat, other in ((0, 1), (1, 0)):
            own = f"Your hand is {HANDS[hands[seat]]}."
            text = f'The other said: "{messages[other]}"\n{own} How many coins do you keep?'
            fair = "5"  # where the claim does not tell to whom the coins are worth more
            if claims[other] is not None and claims[other] != hands[seat]:
                fair = "10" if hands[seat] == (claims[other] + 1) % 3 else "0"
            turns.append(Turn(seat, text, COUNTS, fair, greedy="10"))
        kept = [int(reply) for reply in (yield turns)]
        points = [coins * value for coins, value in zip(share(*kept), worth)]
        # To keep ten with the upper hand is both fair and greedy.
        fair = [None if seat == winner else kept[seat] <= 5 for seat in (0, 1)]
        indicators = [{"keep_upper": [], "keep_lower": []} for _ in (0, 1)]
        for seat, other in ((0, 1), (1, 0)):
            indicators[seat][f"keep_{role[seat]}"] = [kept[seat]]
            indicators[seat]["honesty"] = [claims[seat] == hands[seat]]
            news[seat] = f"The other had the {role[other]} hand and kept {kept[other]}."
        yield Round(points, 100, fair, indicators)


def claim(message):
    """The hand (0 to 2) that `message` names; None unless it names exactly one."""
    words = re.findall(r"\w+", message.lower())
    named = [n for n, hand in enumerate(HANDS) if hand in words]
    return named[0] if len(named) == 1 else None


def share(p, q):
    """What two players who keep `p` and `q` of ten get: over ten together, in proportion."""
    total = max(10, p + q)
    return 10 * p / total, 10 * q / total


def split(rng, rounds, max_tokens):
    """Open values and no messages: both keep 0..10 of ten hats, ten books and ten balls."""
    news = [SPLIT_RULES, SPLIT_RULES]
    for _ in range(rounds):
        options = [ONE_DEAR, TWO_DEAR][rng.integers(2)]
        values = [options[i] for i in rng.permutation(3)[:2]]  # one per seat, never the same
        turns = []
        for seat in (0, 1):
            own, other = values[seat], values[1 - seat]
            text = f"{news[seat]}\nTo you: hats {own[0]}, books {own[1]}, balls {own[2]}. "
            text += f"To the other: hats {other[0]}, books {other[1]}, balls {other[2]}."
            fair = " ".join("10" if a > b else "5" if a == b else "0" for a, b in zip(own, other))
            turns.append(Turn(seat, text, TRIPLES, fair, greedy="10 10 10"))
        kept = [[int(n) for n in reply.split()] for reply in (yield turns)]
        points, fair, indicators = [0, 0], [], []
        for seat in (0, 1):
            own, other = values[seat], values[1 - seat]
            points[seat] = sum(own[i] * share(kept[0][i], kept[1][i])[seat] for i in range(3))
            low = [kept[seat][i] for i in range(3) if own[i] < other[i]]
            high = [kept[seat][i] for i in range(3) if own[i] > other[i]]
            fair.append(sum(low) < 5 * len(low))
            indicators.append({"keep_low": low, "keep_high": high})
            news[seat] = "The other kept {} hats, {} books and {} balls.".format(*kept[1 - seat])
        yield Round(points, sum(10 * max(pair) for pair in zip(*values)), fair, indicators)


# rules(rng, rounds, max_tokens); points per unit of reward; which indicator the tables show first.
Game = namedtuple("Game", "rules scale headline", defaults=["cooperation"])
IPD = {"CC": (3, 3), "CD": (0, 5), "DC": (5, 0), "DD": (1, 1)}
STAG_HUNT = {"CC": (4, 4), "CD": (0, 3), "DC": (3, 0), "DD": (3, 3)}
CHICKEN = {"CC": (3, 3), "CD": (1, 4), "DC": (4, 1), "DD": (0, 0)}
GAMES = {
    "ipd": Game(functools.partial(matrix_game, IPD), scale=5),
    "stag_hunt": Game(functools.partial(matrix_game, STAG_HUNT), scale=5),
    "chicken": Game(functools.partial(matrix_game, CHICKEN), scale=5),
    "trust_split": Game(trust_split, scale=100, headline="honesty"),
    "split": Game(split, scale=100),
}


class Player:
    """Anything that can sit at a game. Every conversation has random numbers of its own."""

    cache = None  # what a language model keeps of the games under way

    def begin(self, seed, keys):
        """Get ready for the conversations of these keys; `seed` is a list of ints."""
        self.rngs = {key: np.random.default_rng([*seed, *key]) for key in keys}

    def reply(self, questions):
        """Replies (list of str) to `questions`, at most one per conversation."""
        return [self.answer(question) for question in questions]


SCRIPTS = {  # (how they act, n): greedy instead, if any of the other's last n acts was greedy
    "cooperate": ("fair", 0),
    "defect": ("greedy", 0),
    "tit_for_tat": ("fair", 1),
    "grim": ("fair", 1000),
    "random": ("random", 0),
    "liar": ("liar", 0),  # claims the winning hand, and is greedy
}


class Scripted(Player):
    """A scripted player of any game; a reply is random instead with probability `noise`.
    `name` may be {name: share}: one of these is drawn for every reply."""

    def __init__(self, name, noise=0.0):
        self.shares, self.noise = {name: 1.0} if isinstance(name, str) else name, noise

    def answer(self, question):
        turn, rng, names = question.turn, self.rngs[question.key], list(self.shares)
        name = names[0] if len(names) == 1 else rng.choice(names, p=list(self.shares.values()))
        style, memory = SCRIPTS[name]
        seen = [act for r in question.history if (act := r.fair[1 - turn.seat]) is not None]
        if memory and False in seen[-memory:]:
            style = "greedy"
        if self.noise > 0 and rng.random() < self.noise:
            style = "random"
        if style == "random":
            return str(rng.choice(turn.choices or [turn.fair, turn.lie]))
        return {"fair": turn.fair, "greedy": turn.greedy, "liar": turn.lie or turn.greedy}[style]


def scripted_names(game):
    """Names of the scripted players of a game: only trust_split has a use for `liar`."""
    return [name for name in SCRIPTS if name != "liar" or game == "trust_split"]


class Match:
    """A game between two players, and its record."""

    def __init__(self, number, deal, rounds, players):
        self.number = number  # unique in a batch; fixes what the players draw
        self.deal, self.rounds, self.players = deal, rounds, players  # `deal` fixes the cards
        self.history, self.log = [], []  # Rounds; (seat, text read, reply)


def play(game, matches, seed, max_tokens, at_once=None):
    """Play `matches` in place, `at_once` at a time. `seed`, ints, fixes all that is random."""
    if at_once and len(matches) > at_once:
        for start in range(0, len(matches), at_once):
            play(game, matches[start : start + at_once], seed, max_tokens)
        return
    keys, rules, turns = defaultdict(list), {}, {}  # by player; by match; by match
    for match in matches:
        for seat in (0, 1):
            keys[match.players[seat]].append((match.number, seat))
        rng = np.random.default_rng([*seed, 0, match.deal])
        rules[match] = GAMES[game].rules(rng, match.rounds, max_tokens)
        turns[match] = next(rules[match])
    for player in keys:
        player.begin([*seed, 1], keys[player])
    while turns:
        questions, replies = defaultdict(list), {}  # by player; by key
        for match in turns:
            for turn in turns[match]:
                question = Question((match.number, turn.seat), turn, match.history)
                questions[match.players[turn.seat]].append(question)
        for player, asked in questions.items():
            replies |= zip([question.key for question in asked], player.reply(asked))
        for match, asked in turns.items():
            said = [replies[match.number, turn.seat] for turn in asked]
            assert all(reply in turn.choices for turn, reply in zip(asked, said) if turn.choices)
            match.log += [(turn.seat, turn.text, reply) for turn, reply in zip(asked, said)]
            step = rules[match].send(said)
            while isinstance(step, Round):  # scored, not asked
                match.history.append(step)
                step = next(rules[match], [])
            turns[match] = step
        turns = {match: asked for match, asked in turns.items() if asked}
    for player in keys:
        player.cache = None  # it is large


def meet(game, a, b, deals, rounds, seed, max_tokens, at_once=None):
    """Games of players `a` and `b`, in both seats of each deal: the Sides of a, deal by deal."""
    matches = [Match(n, n // 2, rounds, ((a, b), (b, a))[n % 2]) for n in range(2 * deals)]
    play(game, matches, seed, max_tokens, at_once)
    return [Side(match, match.number % 2) for match in matches]


def indicators(history, seat):
    """{name: list of numbers} of what `seat` did in one game. Each but p_c_* stands again as
    name_after_fair and name_after_greedy, by what the other was last seen to be."""
    lists, others_act = defaultdict(list), None
    for round in history:
        own_act = round.fair[seat]
        seen = {"cooperation": [] if own_act is None else [own_act], **round.indicators[seat]}
        for name, values in seen.items():
            lists[name] += values
            if not name.startswith("p_c_"):
                lists[f"{name}_after_fair"] += values if others_act is True else []
                lists[f"{name}_after_greedy"] += values if others_act is False else []
        if round.fair[1 - seat] is not None:
            others_act = round.fair[1 - seat]
    return lists


def summarize(sides):
    """{name: mean over the rounds of `sides`, None where nothing of that name occurred}.
    points, points_other: per round. welfare: share of the best joint score. And `indicators`."""
    lists = defaultdict(list)
    for match, seat in sides:
        for round in match.history:
            lists["points"].append(round.points[seat])
            lists["points_other"].append(round.points[1 - seat])
            lists["welfare"].append(sum(round.points) / round.best)
        for name, values in indicators(match.history, seat).items():
            lists[name] += values
    return {name: float(np.mean(values)) if values else None for name, values in lists.items()}
