"""Who cooperates, who exploits whom; agents by name.

    python eval.py runs/a runs/b base defect --games 64
    python eval.py human tit_for_tat --game ipd              play yourself

An agent is a run's folder (its newest checkpoint), a folder of a PEFT adapter, `base` (the model
without adapter), a scripted player, `human`, or `api:MODEL` (an OpenAI-compatible server)."""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import sys
import unicodedata

import torch
import transformers
from tqdm import tqdm

import tiny
from games import GAMES, Player, Scripted, meet, scripted_names, summarize
from rollout import LLM, Policy
from tiny import BUILT_IN, UserError, user_error

DEFAULTS = dict(game="trust_split", model="tiny", quant="auto", prior_seed=0, rounds=10)
DEFAULTS |= dict(max_message_tokens=40, games_at_once=32)


def report(program, main):
    """Run `main`; the exit code. What the user can put right ends in one line and code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters
    try:
        main()
        return 0
    except (UserError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        advice = "lower --games_at_once (play) or --micro_batch_tokens (update)"
        print(f"{program}: out of memory; {advice}", file=sys.stderr)
    except (KeyboardInterrupt, EOFError) as error:
        print(f"\n{program}: stopped; {str(error) or 'nothing new was saved'}", file=sys.stderr)
        return 130
    return 2


def read_json(folder, name):
    """The dict of a .json file; those of a .jsonl, less half a line at its end. Or a UserError."""
    path = os.path.join(folder, name)
    with user_error(f"{path} is missing or damaged", "restore it, or name another folder"):
        text = pathlib.Path(path).read_text(encoding="utf-8")
        if name.endswith(".json"):
            return dict(json.loads(text))
        return [dict(json.loads(line)) for line in text.split("\n")[:-1]]


def print_table(title, header, rows):
    """Print aligned columns; numbers with two digits, None as a dash."""
    width = max((len(row[0]) for row in rows), default=0)
    print(f"\n{title}\n\n" + " " * width, *(name.rjust(10) for name in header))
    for first, *cells in rows:
        cells = ["-" if c is None else c if isinstance(c, str) else f"{c:.2f}" for c in cells]
        print(first.ljust(width), *(cell.rjust(max(10, len(n))) for n, cell in zip(header, cells)))


def load(name, quant, game, lora_rank=8, seed=0, prior_seed=0):
    """The LLM `name` with a fresh adapter that `seed` fixes. UserError for what cannot be had.
    quant: "nf4", 4 bits; "none", float32, or bfloat16 on a GPU; "auto", on a GPU what fits."""
    if name in BUILT_IN:
        base, tokenizer = tiny.load_built_in(name, game, prior_seed)
        return LLM(base, tokenizer, lora_rank, seed, os.path.basename(base.name_or_path))
    on_gpu = torch.cuda.is_available()
    has_bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if has_bfloat16 else torch.float32
    print(f"loading {name} in {dtype} (bfloat16 on a GPU: {has_bfloat16}) ...", flush=True)
    how = dict(dtype=dtype, device_map="cuda" if on_gpu else "cpu")
    with user_error(f"cannot load {name}", "give a folder, a hub id in reach, or --model tiny"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        quant = bits_that_fit(name) if quant == "auto" and on_gpu else quant
        if quant == "nf4":
            nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
            how["quantization_config"] = transformers.BitsAndBytesConfig(**nf4)
        base = transformers.AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **how)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False  # in bitsandbytes, it would cost the gradient
    return LLM(base, tokenizer, lora_rank, seed, name)


def bits_that_fit(name):
    """The `quant` "none" where 16 bits take up to a third of the GPU, else "nf4"."""
    config = transformers.AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        size = 2 * transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    return "none" if 3 * size < torch.cuda.get_device_properties(0).total_memory else "nf4"


def find_agent(name, game, llm):
    """The Player called `name`; an adapter is loaded on `llm`. UserError where there is none."""
    if name in scripted_names(game):
        return Scripted(name)
    if name == "human":
        return Human()
    if name.startswith("api:"):
        return Api(name.removeprefix("api:"))
    if name == "base":
        return Policy(llm, None)
    folder = max(pathlib.Path(name).glob("checkpoint-*"), default=pathlib.Path(name))
    if not (folder / "adapter_config.json").is_file():
        known = ", ".join(scripted_names(game))
        raise UserError(f"no agent is called {name}; give a run, base, human, api:MODEL or {known}")
    policy = Policy(llm, f"agent{len(llm.model.peft_config)}")
    llm.load_adapter(folder, policy.adapter)
    return policy


def printable(text):
    """`text` with control characters spelled out: a terminal shows them, and does not obey."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class Human(Player):  # the person at the terminal
    def answer(self, question):
        turn, played = question.turn, len(question.history)
        print(f"\n[game {question.key[0] + 1}, round {played + 1}]\n{printable(turn.text)}")
        while (said := input("> ").strip()) not in (turn.choices or [said]):
            print(f"That is not a legal reply, such as {', '.join(turn.choices[:11])}")
        return said


def legal_reply(text, choices):
    """The one of `choices` that `text` names as a word, else ""; if there are none, all it says."""
    thought = r"^.*</(think\w*|thought)>|<(think|thought).*"  # perhaps without begin or end
    text = re.sub(thought, "", text, flags=re.DOTALL).strip()
    if not choices:
        return text
    names = {choice.lower(): choice for choice in choices}
    text = unicodedata.normalize("NFKC", text).replace(",", " ")  # makes full-width letters plain
    for part in (text.split("\n")[0], text):
        words = [re.sub(r"^[^\w\u2212-]+|\W+$", "", word) for word in part.split()]  # not a minus
        words = [str(int(w)) if w.isdecimal() and len(w) < 9 else w for w in words if w]
        bare = " ".join(words).lower()
        if bare in names:  # perhaps with reasons below
            return names[bare]
    if words[:1] == ["A"] and words.count("A") == 1:  # may be an article
        return ""
    named = [word for word in words if word in " ".join(choices).split()]
    if " " not in choices[0]:
        named = list(dict.fromkeys(named))  # the same one may be named twice
    said = " ".join(named)
    return said if said in choices else ""


class Api(Player):
    """A chat model behind an OpenAI-compatible server; `failed` of its `turns` were useless."""

    def __init__(self, model):
        with user_error(f"api:{model} cannot be asked", "pip install openai, set OPENAI_API_KEY"):
            import openai

            self.at_once = max(1, int(os.environ.get("API_AT_ONCE", 4)))  # requests
            self.spare_tokens = int(os.environ.get("API_SPARE_TOKENS", 16))  # to reason with
            self.client = openai.OpenAI(timeout=float(os.environ.get("API_TIMEOUT", 120)))
        self.name, self.model, self.limit = f"api:{model}", model, "max_tokens"
        self.turns, self.failed, self.trouble = 0, 0, ""  # `trouble`: why a turn failed last

    def begin(self, seed, keys):
        super().begin(seed, keys)
        self.chats = {key: [] for key in keys}

    def reply(self, questions):
        """Replies to `questions`; UserError where none of them got a legal one."""
        with concurrent.futures.ThreadPoolExecutor(self.at_once) as pool:
            replies = list(pool.map(self.answer, questions))  # an error cancels what is not begun
        missing = replies.count("")
        if missing == len(replies):
            problem = f"gave no legal reply in {missing} turns ({self.trouble})"
            raise UserError(f"{self.name} {problem}; choose another model or server")
        self.turns, self.failed = self.turns + len(replies), self.failed + missing
        self.trouble = self.trouble if self.failed else ""  # not of what a second try put right
        for n, (key, turn, _) in enumerate(questions):
            if replies[n] == "" and turn.choices:
                replies[n] = str(self.rngs[key].choice(turn.choices))
            self.chats[key].append(dict(role="assistant", content=replies[n] or "..."))  # not empty
        return replies

    def answer(self, question):
        """A legal reply, or "" after three tries."""
        chat, turn = self.chats[question.key], question.turn
        chat.append({"role": "user", "content": turn.text})
        correction = []
        for _ in range(3):
            text = self.ask(chat + correction, (turn.max_tokens or 8) + self.spare_tokens)
            if reply := legal_reply(text, turn.choices):
                return reply
            if text:
                self.trouble = f"{text[:80]!r} is no legal reply"
                example = turn.choices[0] if turn.choices else "a short sentence"
                wrong = f"That is not one legal reply. Say nothing else than one, such as {example}"
                correction = [{"role": "assistant", "content": text[:200]}]
                correction.append({"role": "user", "content": wrong})
        return ""

    def ask(self, chat, tokens):
        """What the server says, or "". UserError where it is no use to go on."""
        request = {"model": self.model, "messages": chat, self.limit: tokens}
        try:
            content = self.client.chat.completions.create(**request).choices[0].message.content
            if not content:
                self.trouble = "an empty reply"
            return (content or "").encode(errors="replace").decode()
        except Exception as error:  # what a server sends may be anything
            words = " ".join(str(error).replace(self.client.api_key, "KEY").split())[:200]
            self.trouble = printable(words)
            kinds = {getattr(error, "status_code", type(error).__name__), getattr(error, "code", 0)}
            if kinds & {401, 402, 403, 404, "insufficient_quota", "APIConnectionError"}:
                problem = f"{self.name} is refused or out of reach ({self.trouble})"
                raise UserError(f"{problem}; check OPENAI_BASE_URL, key and name") from None
            if "max_completion_tokens" in words:  # what newer servers call it
                self.limit = "max_completion_tokens"
        return ""


def failed(agents):
    """{name of an API model of `agents` {name: Player}: how many of its turns failed, and why}."""
    apis = {name: player for name, player in agents.items() if isinstance(player, Api)}
    return {n: f"{a.failed} of {a.turns} turns failed {a.trouble}".strip() for n, a in apis.items()}


def crossplay(game, agents, deals, rounds, seed, max_tokens, at_once):
    """Play `agents` {name: Player} with each other and the scripted: {agent: {other: means}}."""
    everyone = agents | {name: Scripted(name) for name in scripted_names(game)}
    results = {a: {} for a in agents}
    for a in tqdm(agents, desc="playing", leave=False, disable="human" in agents):
        for b in everyone:
            if b == "human" or (a == "human" and b not in agents):
                continue  # nobody wants to play all those games
            sides = meet(game, agents[a], everyone[b], deals, rounds, seed, max_tokens, at_once)
            results[a][b] = summarize(sides)
    return results


def print_crossplay(game, results, players):
    """Print the results of `crossplay`, and how often an API model of `players` failed."""
    agents, headline = list(results), GAMES[game].headline
    others = list(dict.fromkeys(b for a in agents for b in results[a]))
    rows = [[a, *(results[a].get(b, {}).get("points") for b in others)] for a in agents]
    print_table(f"{game}: points per round of the row against the column", others, rows)
    rows = []
    for a in agents:
        taken = {b: means["points_other"] for b, means in results[a].items()}
        most, itself = max(taken, key=taken.get, default=None), results[a].get(a, {})
        own = [itself.get("welfare"), itself.get(headline)]
        rows.append([a, *own, taken.get("cooperate"), taken.get("defect"), most, taken.get(most)])
    header = ["welfare", headline, "fair gets", "greedy gets", "gets most", "how much"]
    print_table("With itself, and what others get from it", header, rows)
    seen = {a: results[a].get("random", {}) for a in agents}
    keys = [key for key in max(seen.values(), key=len) if "_after_" not in key]
    rows = [[key, *(seen[a].get(key) for a in agents)] for key in keys]
    print_table("What it does against a random player", agents, rows)
    for name, turns in failed(players).items():
        print(f"\n{name}: {turns}")


def parse(argv):
    """The command line as a namespace; what it leaves open is filled in from the first run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, of_run = parser.add_argument, "(default: that of the first run)"
    add("agents", nargs="+", help="who plays whom: runs, adapters, base, human, api:MODEL, ...")
    add("--game", choices=list(GAMES), help=f"which game {of_run}")
    add("--model", help=f"what `base` and adapters stand on {of_run}")
    add("--rounds", type=int, help=f"rounds per game {of_run}")
    add("--games", type=int, help="deals per pair, in both seats each (default: 64, with human 1)")
    add("--max_message_tokens", type=int, help=f"longest message {of_run}")
    add("--games_at_once", type=int, help="games played at a time; fewer need less memory")
    add("--seed", type=int, default=0, help="fixes deals and sampling")
    other_words = "--model reads and says NEW in place of OLD, a word or sentence; may be repeated"
    add("--words", nargs=2, action="append", default=[], metavar=("OLD", "NEW"), help=other_words)
    add("--out", default="crossplay.json", help="file for the numbers")
    args = parser.parse_args(argv)
    runs = [name for name in args.agents if os.path.isfile(os.path.join(name, "config.json"))]
    configs = [read_json(run, "config.json") for run in runs]
    args.games = (1 if "human" in args.agents else 64) if args.games is None else args.games
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**{**DEFAULTS, **(configs[0] if configs else {}), **given})
    for run, config in zip(runs, configs):
        if config.get("game") != args.game or args.game not in GAMES:
            parser.error(f"{run} plays {config.get('game')}, not {args.game}, or games.py lacks it")
    n = min(args.rounds, args.games, args.games_at_once, args.seed + 1, args.max_message_tokens + 1)
    if n < 1:
        parser.error("--rounds, --games, --games_at_once begin at 1, --seed and tokens at 0")
    if os.path.isdir(args.out) or not os.path.isdir(os.path.dirname(args.out) or "."):
        parser.error(f"--out {args.out} must be a file in a folder that is there")
    return args


def main(argv=None):
    args = parse(argv)
    agents, llm = {}, None
    for name in args.agents:
        is_ours = name == "base" or (os.path.isdir(name) and name not in scripted_names(args.game))
        if is_ours and llm is None:
            llm = load(args.model, args.quant, args.game, prior_seed=args.prior_seed)
            llm.framing.words = dict(args.words)
        label = re.sub(r".*[/\\](?!checkpoint-)", "", os.path.normpath(name)) if is_ours else name
        if label in agents or (is_ours and label in scripted_names(args.game)):
            raise UserError(f"two agents are called {label}: name each once")
        agents[label] = find_agent(name, args.game, llm)
    at_once = 1 if "human" in agents else args.games_at_once
    size = args.games, args.rounds, [args.seed], args.max_message_tokens, at_once
    results = crossplay(args.game, agents, *size)
    print_crossplay(args.game, results, agents)
    text = json.dumps({"settings": vars(args), "results": results}, indent=1)
    pathlib.Path(args.out).write_text(text, encoding="utf-8")
    print(f"\nThe numbers are in {args.out}")


if __name__ == "__main__":
    sys.exit(report("eval", main))
