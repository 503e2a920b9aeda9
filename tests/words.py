"""A strategy, or a letter? eval.py once more, with a game in words that no agent was trained with:

    python tests/words.py swapped runs/ipd-aa_causal-s0 tit_for_tat       all that eval.py takes
    python tests/words.py renamed runs/trust_split-aa_causal-s0

swapped: A and B, and two of the hands, change places. renamed: new letters, new hands.
paraphrased: the rules in other sentences. Scripted players play the same as ever. An agent of the
built-in model knows no other words (its tokens are whole phrases): this is for real models."""

import argparse
import functools
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval
from games import GAMES, Round

WORDINGS = {  # what is read: what is read instead
    "swapped": {"A": "B", "B": "A", "rock": "paper", "paper": "rock"},
    "renamed": {"A": "J", "B": "F", "rock": "fire", "paper": "water", "scissors": "wood"},
    "paraphrased": {
        "You play a game of many rounds with another player.": "You meet someone many times.",
        "In every round both of you choose": "Each time, you and this other player pick",
        "at the same time": "without knowing what the other one does",
        "Collect as many points as you can over the whole game.": "Try to end with many points.",
        "Always answer with one letter,": "Reply with a single letter,",
        "The other chose": "This time the other player picked",
        "How many coins do you keep?": "What number of coins goes to you?",
        "Your hand is": "You hold",
        "Send your message.": "What do you tell the other?",
    },
}


def translate(text, words):
    """`text` with every key of `words`, where it stands as a word, replaced by its value."""
    keys = "|".join(rf"(?<!\w){re.escape(key)}(?!\w)" for key in words)
    return re.sub(keys, lambda found: words[found[0]], text)


def reworded(rules, words, rng, rounds, max_tokens):
    """The game `rules` for players that read and write other words; points are as ever."""
    back = {new: old for old, new in words.items()}
    game = rules(rng, rounds, max_tokens)
    step = next(game)
    while True:
        if isinstance(step, Round):
            yield step
            step = next(game, None)
            if step is None:
                return
            continue
        turns = []
        for turn in step:
            choices = turn.choices and tuple(translate(choice, words) for choice in turn.choices)
            texts = {name: getattr(turn, name) for name in ("text", "fair", "greedy", "lie")}
            texts = {name: translate(text, words) for name, text in texts.items()}
            turns.append(turn._replace(choices=choices, **texts))
        replies = yield turns
        step = game.send([translate(reply, back) for reply in replies])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wording", choices=list(WORDINGS))
    args, rest = parser.parse_known_args(argv)
    for name, game in list(GAMES.items()):
        GAMES[name] = game._replace(
            rules=functools.partial(reworded, game.rules, WORDINGS[args.wording])
        )
    eval.main(rest)


if __name__ == "__main__":
    sys.exit(eval.report("words", main))
