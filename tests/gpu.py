"""One iteration of trust_split by its defaults at the size of Qwen2.5-1.5B, on a GPU. By hand:

    python tests/gpu.py DIR                      the folder of a real model: its tokenizer is used
    python tests/gpu.py DIR --quant nf4 --limit 8              in 4 bits, on a card of so many GB

It takes minutes; `--rounds 2` is shorter. GB are 2^30 bytes, and CUDA's own half is not counted.
The weights are random, so nearly every message has its full length: an upper bound. A pass that
samples a token must at least read the weights once; `floor` is the time which that takes at the
speed of a large copy on the same card."""

import argparse
import json
import pathlib
import sys
import tempfile
import time

import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import aa_minimal
from eval import report
from tiny import UserError

SHAPE = dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, vocab_size=151936)
SHAPE |= dict(num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True)
SHAPE |= dict(max_position_embeddings=32768, bos_token_id=None, eos_token_id=None)
GB = 2**30


def build(folder, tokenizer):
    """Write a random model of that size into `folder`."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def copy_speed():
    """Bytes a second that a copy of 2 GB reads and writes, the best of 5."""
    a, seconds = torch.empty(2 * GB, dtype=torch.uint8, device="cuda"), []
    b = torch.empty_like(a)
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        b.copy_(a)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * a.numel() / min(seconds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a real model, for its tokenizer")
    parser.add_argument("--quant", default="none", choices=["none", "nf4"])
    parser.add_argument("--limit", type=float, help="GB of the card that may be used")
    parser.add_argument("--rounds", default="10", help="rounds per game")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("there is no GPU here: run it where there is one")
    peaks, passes = {}, []
    draw, plain_score = aa_minimal.draw_matches, aa_minimal.score
    read = aa_minimal.Policy.read_news

    def draw_matches(*inputs):  # called before play
        passes.clear()
        torch.cuda.reset_peak_memory_stats()
        return draw(*inputs)

    def score(*inputs, **more):  # called when play is over
        peaks["play"] = torch.cuda.max_memory_allocated() / GB
        torch.cuda.reset_peak_memory_stats()
        yield from plain_score(*inputs, **more)
        torch.cuda.synchronize()
        peaks["update"] = torch.cuda.max_memory_allocated() / GB

    def read_news(policy, keys):
        passes.append(len(keys))
        return read(policy, keys)

    with tempfile.TemporaryDirectory() as folder:
        build(f"{folder}/model", args.folder)
        speed = copy_speed()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        if args.limit:
            torch.cuda.set_per_process_memory_fraction(args.limit * GB / total)
        flags = f"--game trust_split --model {folder}/model --quant {args.quant}"
        flags += f" --rounds {args.rounds} --iterations 1 --out {folder}/run"
        run = aa_minimal.Run(aa_minimal.parse(flags.split()))
        loaded = torch.cuda.memory_allocated() / GB
        aa_minimal.draw_matches, aa_minimal.score = draw_matches, score
        aa_minimal.Policy.read_news = read_news
        aa_minimal.train(run)
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        line, n = json.loads(lines[0]), len(passes)
        reserved = torch.cuda.max_memory_reserved() / GB
    weights = sum(p.numel() * p.element_size() for p in run.llm.base.parameters())
    milliseconds = 1000 * line["seconds_play"] / n
    of_pass = f"{milliseconds:.1f} ms each, {sum(passes) / n:.1f} rows"
    allowed = args.limit or total / GB
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.quant}")
    print(f"GB: model and adapter {loaded:.2f}, reserved at most {reserved:.2f} of {allowed:.1f}")
    print(f"GB at most in play {peaks['play']:.2f}, in the update {peaks['update']:.2f}")
    print(f"play {line['seconds_play']:.1f} s, update {line['seconds_update']:.1f} s")
    print(f"{line['sampled_tokens']} sampled tokens of the learner; {n} passes of play, {of_pass}")
    print(f"floor of a pass {1000 * weights / speed:.2f} ms ({speed / 1e9:.0f} GB/s)")
    print(f"ratio_max {line['ratio_max']:.2f}, grad_norm {line['grad_norm']:.3g}")


if __name__ == "__main__":
    sys.exit(report("gpu", main))
