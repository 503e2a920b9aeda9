"""The games, their wording, the scripted players and the loop that plays them. No tokens, no tensors: text and numbers only."""
import argparse, contextlib, functools, re
from collections import defaultdict, namedtuple
import numpy as np

BEATS = {"rock": "scissors", "paper": "rock", "scissors": "paper"}
HANDS, COUNTS = tuple(BEATS), tuple(str(n) for n in range(11))
TRIPLES = tuple(f"{a} {b} {c}" for a in COUNTS for b in COUNTS for c in COUNTS)
VALUES = [(10, 1, 1), (1, 10, 1), (1, 1, 10)], [(10, 10, 1), (10, 1, 10), (1, 10, 10)]  # equal sums within a list
# A game yields lists of Turns, is sent the replies, and yields a Round once it is scored. `text` is what a seat reads since its
# last reply, `view` the same as data, for scripted players, `choices` all legal replies, None for a message of `max_tokens`.
Turn = namedtuple("Turn", "seat text choices view max_tokens", defaults=[0])
# In the facts, "coop" is True, False, or None where cooperating and defecting look the same, "seen" {indicator: [numbers]}.
Round = namedtuple("Round", "points best facts")  # `points`, `facts` per seat; `best`: highest joint score it allowed

class UserError(Exception):
    """Something the person at the keyboard can put right: printed as one line, exit code 2."""

@contextlib.contextmanager
def user_error(problem, remedy):
    """Make one line of whatever goes wrong inside, a UserError: the problem (in the library's words, too); the remedy."""
    try:
        yield
    except Exception as error:  # libraries raise whatever they like
        raise UserError(f"{problem} ({' '.join(str(error).split())[:200]}); {remedy}") from error

class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are UserErrors."""
    def error(self, message):
        raise UserError(message)

def number(kind, low, high=1e15):
    """An argparse type: an int or float from `low` to `high`."""
    def number(text):  # argparse says "invalid number value" after its name
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is out of range; it must be from {low} to {high:g}")
    return number

def matrix_game(points, rng, rounds, max_tokens=0):
    """A symmetric two-by-two game: `points` {my choice and the other's, A to cooperate: (my points, the other's)}."""
    rules = ("You play a game of many rounds with another player. In every round both of you choose A or B at the same time.\n"
             "If both choose A, you get {} points and the other gets {}.\nIf you choose A and the other chooses B, you get {} "
             "and the other gets {}.\nIf you choose B and the other chooses A, you get {} and the other gets {}.\nIf both "
             "choose B, you get {} and the other gets {}.\nAfter every round you are told what the other chose. Your goal is "
             "to collect as many points as you can over the whole game. Always answer with one letter, A or B.\nThe first "
             "round begins. Do you choose A or B?").format(*points["AA"], *points["AB"], *points["BA"], *points["BB"])
    texts, state = (rules, rules), ("first", "first")
    for _ in range(rounds):
        moves = yield [Turn(s, texts[s], ("A", "B"), {"kind": "move"}) for s in (0, 1)]
        mine, fair = points["".join(moves)], [move == "A" for move in moves]
        facts = [{"coop": fair[s], "seen": {f"p_c_{state[s]}": [fair[s]]}} for s in (0, 1)]
        yield Round(mine, max(map(sum, points.values())), facts)
        state = ["".join("c" if move == "A" else "d" for move in pair) for pair in (moves, moves[::-1])]  # own, other's
        texts = [f"The other chose {moves[1 - s]}. You get {mine[s]} points and the other gets {mine[1 - s]}.\nNext round. "
                 "Do you choose A or B?" for s in (0, 1)]

def trust_split(rng, rounds, max_tokens=24):
    """Trust-and-Split (arXiv 2511.19405): private hands, one message each, then both keep 0..10 of ten coins."""
    rules = ("You play a game of many rounds with another player. In every round 10 coins are split between you two.\nEach of "
             "you holds a secret hand: rock, paper or scissors. The two hands always differ. Rock beats scissors, scissors "
             "beats paper, paper beats rock. The player whose hand wins has the upper hand: every coin is worth 10 points to "
             "that player, and only 1 point to the player with the lower hand. So it takes both hands to know what a coin is "
             "worth to each of you.\nYou see only your own hand. First each of you sends the other one short message, for "
             "example to tell your hand. Then both say at the same time how many of the 10 coins they keep, from 0 to 10. If "
             "the two numbers add up to more than 10, the coins are shared in proportion to the numbers.\nAfter every round "
             "you are told whether the other had the upper or the lower hand and how many coins it kept. Your goal is to "
             "collect as many points as you can over the whole game.\nThe first round begins.")
    news, starter = (rules, rules), int(rng.integers(2))
    for t in range(rounds):
        upper, winner = int(rng.integers(2)), HANDS[rng.integers(3)]
        hands, roles, worth = zip(*((winner, "upper", 10) if s == upper else (BEATS[winner], "lower", 1) for s in (0, 1)))
        said, told, heard = ["", ""], [None, None], ""
        for s in ((starter + t) % 2, (starter + t + 1) % 2):
            text = f"{news[s]}\nYour hand is {hands[s]}. {heard}Write your message to the other player, one short sentence."
            [reply] = yield [Turn(s, text, None, {"kind": "message", "hand": hands[s], "claim": told[1 - s]}, max_tokens)]
            said[s] = " ".join(reply.split())[:10 * max_tokens]
            told[s], heard = claim(said[s]), f'The other player says: "{said[s]}"\n'
        ask = [Turn(s, f'The other player said: "{said[1 - s]}"\nYour hand is {hands[s]}. How many coins do you keep? Answer '
               "with a number from 0 to 10.", COUNTS, {"kind": "keep", "hand": hands[s], "claim": told[1 - s]}) for s in (0, 1)]
        kept = [int(n) for n in (yield ask)]
        facts = [{"hand": hands[s], "upper": s == upper, "message": said[s], "claim": told[s], "honest": told[s] == hands[s],
                  "kept": kept[s], "coop": None if s == upper else kept[s] < 5, "seen": {"honesty": [told[s] == hands[s]],
                  "silence": [said[s] == ""], f"keep_{roles[s]}": [kept[s]]}} for s in (0, 1)]
        yield Round([worth[s] * coins for s, coins in enumerate(share(*kept))], 100, facts)
        news = [f"The other had the {roles[1 - s]} hand and kept {kept[1 - s]}.\nNext round." for s in (0, 1)]

def claim(message):
    """The hand that `message` names, None unless it names exactly one."""
    named = set(re.findall(r"\b(rock|paper|scissors)\b", message.lower()))
    return named.pop() if len(named) == 1 else None

def share(p, q):
    """What two players who keep `p` and `q` of ten things get: their wish, or their part in proportion over ten."""
    return (p, q) if p + q <= 10 else (10 * p / (p + q), 10 * q / (p + q))

def split(rng, rounds, max_tokens=0):
    """Open values, no messages: both keep 0..10 of ten hats, ten books and ten balls; each item shared like the coins."""
    rules = ("You play a game of many rounds with another player. In every round 10 hats, 10 books and 10 balls are split "
             "between you two. Every item is worth 1 or 10 points to you, and may be worth something else to the other. Both "
             "say at the same time how many hats, books and balls they keep, each from 0 to 10. Where the two numbers for an "
             "item add up to more than 10, that item is shared in proportion to the numbers.\nAfter every round you are told "
             "what the other kept. Your goal is to collect as many points as you can over the whole game. Always answer with "
             "three numbers for hats, books and balls, such as 5 5 5.\nThe first round begins.")
    news = (rules, rules)
    for _ in range(rounds):
        options = VALUES[rng.integers(2)]
        values = [options[i] for i in rng.permutation(3)[:2]]  # two different vectors: at least one item valued differently
        texts = ["{}\nTo you: hats {}, books {}, balls {}. To the other: hats {}, books {}, balls {}.\nHow many do you keep?"
                 .format(news[s], *values[s], *values[1 - s]) for s in (0, 1)]
        views = [{"kind": "keep", "values": values[s], "other": values[1 - s]} for s in (0, 1)]
        kept = [[int(n) for n in reply.split()] for reply in (yield [Turn(s, texts[s], TRIPLES, views[s]) for s in (0, 1)])]
        points = [sum(v * share(p, q)[s] for v, p, q in zip(values[s], *kept)) for s in (0, 1)]
        low = [[kept[s][i] for i in range(3) if values[s][i] < values[1 - s][i]] for s in (0, 1)]
        facts = [{"kept": kept[s], "values": values[s], "coop": sum(low[s]) < 5 * len(low[s]), "seen": {"keep_low": low[s],
                  "keep_high": [kept[s][i] for i in range(3) if values[s][i] > values[1 - s][i]]}} for s in (0, 1)]
        yield Round(points, 10 * sum(map(max, *values)), facts)
        news = ["The other kept {} hats, {} books and {} balls.\nNext round.".format(*kept[1 - s]) for s in (0, 1)]

Game = namedtuple("Game", "play scale real tiny")  # scale: points per unit of reward; tiny: settings that differ built in
BASE = dict(rounds=10, games=32, group_size=8, lr=2e-5, lora_rank=32, iterations=200, max_message_tokens=40, save_every=5)
TINY = dict(iterations=60, games=128, group_size=16, lr=1e-3, max_message_tokens=4, save_every=1)
MATRIX = {**BASE, "gamma": .9, "beta": .5, "entropy": .01, "kl": 0.}, {**TINY, "beta": 2.}
SPLITS = {**TINY, "iterations": 40, "group_size": 8, "lr": 5e-4, "gamma": .9, "beta": 2., "entropy": .01, "kl": 0.}
TRUST = {**SPLITS, "iterations": 36, "beta": .7}
GAMES = {  # real: as published, but fewer games and a larger learning rate
    "ipd": Game(functools.partial(matrix_game, {"AA": (3, 3), "AB": (0, 5), "BA": (5, 0), "BB": (1, 1)}), 5, *MATRIX),
    "stag_hunt": Game(functools.partial(matrix_game, {"AA": (4, 4), "AB": (0, 3), "BA": (3, 0), "BB": (3, 3)}), 5, *MATRIX),
    "chicken": Game(functools.partial(matrix_game, {"AA": (3, 3), "AB": (1, 4), "BA": (4, 1), "BB": (0, 0)}), 5, *MATRIX),
    "trust_split": Game(trust_split, 100, {**BASE, "gamma": .96, "beta": 2., "entropy": 0., "kl": .001}, TRUST),
    "split": Game(split, 100, {**BASE, "gamma": .9, "beta": 1., "entropy": 0., "kl": .001}, SPLITS)}
STYLES = {"cooperate": ("fair", 0), "defect": ("greedy", 0), "tit_for_tat": ("fair", 1), "grim": ("fair", 10 ** 9),
          "random": ("random", 0), "liar": ("liar", 0)}  # a style, and for how many rounds it pays back greed with greed

def players(game):
    """Names of the scripted players of a game: `liar` needs one with messages."""
    return [name for name in STYLES if name != "liar" or game == "trust_split"]

def answer(view, style, rng):
    """The reply of a player that is, this turn, "fair", "greedy", "random" or a "liar" (greedy, and claims to win)."""
    if view["kind"] == "move":
        return "AB"[rng.integers(2) if style == "random" else style != "fair"]
    if view["kind"] == "message":
        hand = HANDS[rng.integers(3)] if style == "random" else view["hand"]
        if style == "liar":  # what beats the other's hand (BEATS goes round in three), or would if that one beat its own
            hand = BEATS[BEATS[view["claim"]]] if view["claim"] else BEATS[hand]
        return f"My hand is {hand}"
    if "values" in view:
        mine, others = view["values"], view["other"]
    else:  # coins count more for the upper hand; without a believable claim, as if they counted the same for both
        mine, others = [BEATS[view["hand"]] == view["claim"]], [BEATS.get(view["claim"]) == view["hand"]]
    wish = [10 if style != "fair" or a > b else 5 if a == b else 0 for a, b in zip(mine, others)]
    return " ".join(map(str, rng.integers(11, size=len(wish)) if style == "random" else wish))

class Player:
    """A player that answers one turn at a time. `keys` are (game, seat), each with random numbers of its own."""
    def begin(self, seed, keys):
        """Forget all games and prepare for those of `keys`; `seed` is a list of ints."""
        self.rngs = {key: np.random.default_rng([*seed, *key]) for key in keys}
    def reply(self, keys, turns):
        """Replies (list of str) to `turns`; `keys[i]` says whose turn it is."""
        return [self.ask(key, turn) for key, turn in zip(keys, turns)]

class Scripted(Player):
    """A scripted player of any game. `noise` is the probability of a uniformly random reply instead of its own."""
    def __init__(self, name, noise=0.):
        self.name, self.noise = name, noise
    def ask(self, key, turn):
        style, memory = STYLES[self.name]
        wronged, lost = False in turn.view["past"][::-1][:memory], self.noise and self.rngs[key].random() < self.noise
        return answer(turn.view, "random" if lost else "greedy" if wronged else style, self.rngs[key])

class Human(Player):
    """The person at the terminal, asked until the reply is a legal one. EOFError at the end of input (Ctrl-D)."""
    def ask(self, key, turn):
        print(f"\n[game {key[0] + 1}, round {turn.view['round'] + 1}]\n{printable(turn.text)}")
        while (said := input("> ").strip()) not in (turn.choices or [said]):
            print(f"That is not a legal reply; legal are {', '.join(turn.choices[:11])}{', ...' * (len(turn.choices) > 11)}")
        return said

def printable(text):
    """`text` with all control characters but line breaks spelled out, so that a terminal shows and does not obey them."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)

class Match:
    """A game to play, and its record. `deal` (int) fixes the cards, `number` (int, unique in a batch) the players' draws."""
    def __init__(self, number, deal, rounds, agents):
        self.number, self.deal, self.rounds, self.agents = number, deal, rounds, agents
        self.played, self.log = [], []  # Rounds; (seat, text read, reply)

def play(game, matches, seed, max_tokens):
    """Play `matches` of `game` at once, in place; agents are like Player, `seed` is ints. ValueError for impossible points."""
    for agent in dict.fromkeys(agent for m in matches for agent in m.agents):
        agent.begin([*seed, 1], [(m.number, s) for m in matches for s in (0, 1) if m.agents[s] is agent])
    rules = {m: GAMES[game].play(np.random.default_rng([*seed, 0, m.deal]), m.rounds, max_tokens) for m in matches}
    waiting = {m: next(rules[m]) for m in matches}
    while waiting := {m: turns for m, turns in waiting.items() if turns}:  # the matches that are not over
        asked, replies = defaultdict(dict), {}  # {agent: {key: turn}}, {key: reply}
        for m, turns in waiting.items():
            for turn in turns:
                turn.view.update(round=len(m.played), past=[this.facts[1 - turn.seat]["coop"] for this in m.played])
                asked[m.agents[turn.seat]][m.number, turn.seat] = turn
        for agent, turns in asked.items():
            replies.update(zip(turns, agent.reply(list(turns), list(turns.values()))))
        for m, turns in waiting.items():
            m.log += [(turn.seat, turn.text, replies[m.number, turn.seat]) for turn in turns]
            waiting[m] = rules[m].send([reply for _, _, reply in m.log[-len(turns):]])
            while isinstance(this := waiting[m], Round):
                if not (min(this.points) >= 0 and sum(this.points) <= this.best * (1 + 1e-9)):
                    raise ValueError(f"{game}: points {this.points} of a round are not within 0 and {this.best} together")
                m.played.append(this)
                waiting[m] = next(rules[m], None)

def indicators(rounds, seat):
    """{name: list of numbers}, what `seat` did in one game; again _after_fair and _after_greedy, by the other's last choice."""
    out, last = defaultdict(list), None
    for this in rounds:
        me, other = this.facts[seat], this.facts[1 - seat]["coop"]
        for name, values in {"cooperation": [] if me["coop"] is None else [me["coop"]], **me["seen"]}.items():
            out[name] += values
            if last is not None and not name.startswith("p_c"):  # p_c_XY says so itself
                out[f"{name}_after_{'fair' if last else 'greedy'}"] += values
        last = last if other is None else other
    return out

def meet(game, a, b, deals, rounds, seed, max_tokens):
    """Games of the agents `a` and `b` in both seats of each of `deals` deals: [(Match, seat of a)], deal by deal."""
    sides = [(Match(2 * deal + seat, deal, rounds, (a, b)[::1 - 2 * seat]), seat) for deal in range(deals) for seat in (0, 1)]
    for batch in [[side] for side in sides] if Human in (type(a), type(b)) else [sides]:  # people play one game after the other
        play(game, [m for m, _ in batch], seed, max_tokens)
    return sides

def summarize(sides):
    """Means over [(Match, seat)]: points per round of both, welfare (share of the best joint score) and indicators, or None."""
    seen = defaultdict(list)
    for m, seat in sides:
        own, other, shares = zip(*((r.points[seat], r.points[1 - seat], sum(r.points) / r.best) for r in m.played))
        for name, values in {"points": own, "points_other": other, "welfare": shares, **indicators(m.played, seat)}.items():
            seen[name] += values
    return {name: float(np.mean(values)) if values else None for name, values in seen.items()}

def table(title, header, rows):
    """Print an aligned table; numbers with two digits, None as a dash."""
    text = [header, *([c if isinstance(c, str) else "-" if c is None else f"{c:.2f}" for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*text)]
    print(f"\n{title}\n")
    for first, *others in text:
        print(first.ljust(widths[0]), *map(str.rjust, others, widths[1:]), sep="  ")
