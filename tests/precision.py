"""What 16 and 4 bits change: log-probs of update against play, gradient against 32 bits. By hand:

    python tests/precision.py DIR                the folder of a real model; minutes on a CPU

On a CPU this stands in for a GPU: the model is loaded in bfloat16, with and without NF4. The
gradient is that of sum c log p over four games, with random credits c; the 32-bit model has the
same weights (those of NF4 dequantized), adapter and games."""

import argparse
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import print_table, report
from games import Match, play
from rollout import LLM, Policy, score


def load(folder, dtype, nf4):
    """The LLM with compute in `dtype`, as eval.load makes it on a GPU."""
    how = dict(dtype=dtype, device_map="cuda" if torch.cuda.is_available() else "cpu")
    if nf4:
        bits = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        how["quantization_config"] = transformers.BitsAndBytesConfig(**bits)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return LLM(base, tokenizer, 32, name=folder)


def adapter(llm):
    """{name: weight} of the adapter that learns."""
    return {n: p for n, p in llm.model.named_parameters() if p.requires_grad}


def stir(llm):
    """Give the adapter, which begins as zero, something to say."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in sorted(adapter(llm).items()):
        if "lora_B" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.02)


def gradient(llm, episodes, credit):
    """The gradient of sum c log p as one vector, and the log-ratios of update to play [N]."""
    llm.model.zero_grad()
    ratios = []
    for batch in score(llm, episodes, 2048):
        ratios.append((batch.logp - batch.logp_play).detach().double())
        (credit.to(batch.logp)[batch.episode, batch.round] * batch.logp).sum().backward()
    weights = sorted(adapter(llm).items())
    return torch.cat([p.grad.float().flatten() for _, p in weights]), torch.cat(ratios)


def compare(folder, game, nf4, trained):
    """A row: tokens, the largest ratio, mean |log ratio|, its spread, cosine of the gradients."""
    low = load(folder, torch.bfloat16, nf4)
    if trained:
        stir(low)
    policy = Policy(low)
    play(game, [Match(n, n, 3, (policy, policy)) for n in range(4)], [0], 16)
    episodes = list(policy.episodes.values())
    credit = torch.randn(len(episodes), 3, generator=torch.Generator().manual_seed(5))
    low_gradient, ratios = gradient(low, episodes, credit)
    high = load(folder, torch.float32, nf4)
    for name, weight in adapter(high).items():
        weight.data.copy_(adapter(low)[name].data)
    high_gradient, _ = gradient(high, episodes, credit)
    cosine = torch.nn.functional.cosine_similarity(low_gradient, high_gradient, dim=0)
    row = [len(ratios), ratios.abs().max().exp(), ratios.abs().mean(), ratios.std(), cosine]
    return [str(row[0])] + [f"{value.item():.4f}" for value in row[1:]]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a real model")
    folder, rows = parser.parse_args(argv).folder, []
    for game in ("ipd", "trust_split"):
        for nf4 in (False, True):
            for trained in (False, True):
                label = f"{game}, {'nf4' if nf4 else 'bf16'}, {'stirred' if trained else 'fresh'}"
                rows.append([label, *compare(folder, game, nf4, trained)])
    header = ["tokens", "worst", "mean |log|", "deviation", "cosine"]
    print_table("Update over play in 16 bits, gradient against 32 bits", header, rows)


if __name__ == "__main__":
    sys.exit(report("precision", main))
