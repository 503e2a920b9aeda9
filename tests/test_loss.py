"""Returns, advantages, credits and the policy loss against slow sums written from the formulas; and the scoring pass
of the update against a plain forward over every whole conversation."""
import math
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st

import tiny
from games import Match, Scripted, play
from loss import advantages, credits, policy_loss, returns_to_go, score
from rollout import LLM, Episode, Policy

bounded = settings(max_examples=50, derandomize=True, deadline=None)
shapes = dict(B=st.integers(1, 6), T=st.integers(1, 6), seed=st.integers(0, 10 ** 6), gamma=st.floats(0, 1))


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, want, tolerance=1e-9):
    return torch.allclose(got, torch.as_tensor(want, dtype=got.dtype), rtol=tolerance, atol=tolerance)


def near(got, want):
    return torch.allclose(got, want, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- credit

def test_return_to_go_looks_forward_and_discounts_from_its_own_round():
    assert close(returns_to_go(torch.tensor([[1., 2., 4.], [0., 0., 8.]]), .5), [[3, 4, 4], [2, 4, 8]])


@bounded
@given(**shapes)
def test_returns_to_go_equal_the_double_sum(B, T, seed, gamma):
    r = numbers(seed, B, T)
    want = [[sum(gamma ** (k - t) * r[b, k] for k in range(t, T)) for t in range(T)] for b in range(B)]
    assert close(returns_to_go(r, gamma), want)


def test_advantage_leaves_its_own_row_out_of_the_baseline_and_divides_by_no_deviation():
    G, every = torch.tensor([[1.], [2.], [6.]]), torch.ones(3, 1)
    assert close(advantages(G, torch.tensor([4, 4, 4]), every), [[1 - 4], [2 - 3.5], [6 - 1.5]])
    assert close(advantages(100 * G, torch.tensor([4, 4, 4]), every), [[-300], [-150], [450]])


def test_advantage_compares_only_within_a_group_and_is_zero_for_a_row_alone():
    G, every = torch.tensor([[1.], [50.], [3.], [7.]]), torch.ones(4, 1)
    assert close(advantages(G, torch.tensor([0, 9, 0, 2]), every), [[-2], [0], [2], [0]])


def test_advantage_skips_rounds_that_a_shorter_game_did_not_play():
    G, mask = torch.tensor([[4., 2., 5.], [1., 8., 9.], [3., 7., 9.]]), torch.tensor([[1., 1, 1], [1, 1, 0], [1, 0, 0]])
    want = [[4 - 2, 2 - 8, 0], [1 - 3.5, 8 - 2, 0], [3 - 2.5, 0, 0]]
    assert close(advantages(G, torch.tensor([1, 1, 1]), mask), want)


@bounded
@given(B=st.integers(1, 6), T=st.integers(1, 6), seed=st.integers(0, 10 ** 6), groups=st.integers(1, 3))
def test_advantages_equal_the_mean_over_the_others_of_the_group_that_played_the_round(B, T, seed, groups):
    rng = torch.Generator().manual_seed(seed)
    G, group = numbers(seed, B, T), torch.randint(groups, (B,), generator=rng)
    lengths = torch.randint(1, T + 1, (B,), generator=rng)
    want = torch.zeros_like(G)
    for b in range(B):
        for t in range(lengths[b]):
            others = [G[o, t] for o in range(B) if o != b and group[o] == group[b] and lengths[o] > t]
            want[b, t] = G[b, t] - sum(others) / len(others) if others else 0
    assert close(advantages(G, group, (torch.arange(T) < lengths[:, None]).double()), want)


@bounded
@given(**shapes, beta=st.floats(0, 20))
def test_credits_equal_the_double_sums_of_their_formulas(B, T, seed, gamma, beta):
    own, other = numbers(seed, B, T), numbers(seed + 1, B, T)
    kept = own.clone(), other.clone()
    want = {"naive": own, "sum": own + other, "aa": [
        [own[b, t] + beta * gamma * sum(gamma ** (t - k) * own[b, k] * other[b, t] for k in range(t)) for t in range(T)]
        for b in range(B)]}
    for algo in want:
        assert close(credits(algo, own, other, gamma, beta), want[algo])
    assert torch.equal(own, kept[0]) and torch.equal(other, kept[1])


@pytest.mark.parametrize("past, theirs, want", [(1., 1., 1), (1., -1., -1), (-1., 1., -1), (-1., -1., 1)])
def test_alignment_rewards_kindness_after_good_rounds_and_severity_after_bad_ones(past, theirs, want):
    # gamma 1/2, beta 4: c[1] = A_own[1] + 4 * 1/2 * 1/2 * A_own[0] * A_other[1]; the first round has no past
    c = credits("aa", torch.tensor([[past, 10.]]), torch.tensor([[7., theirs]]), .5, 4.)
    assert close(c, [[past, 10 + want]])


def test_an_unknown_credit_is_an_error():
    with pytest.raises(ValueError, match="wrong"):
        credits("wrong", torch.zeros(1, 1), torch.zeros(1, 1), 1., 1.)


# ---------------------------------------------------------------------------------------------------- policy loss

def test_policy_loss_of_two_tokens_by_hand():
    logp = torch.tensor([.5, .25]).log()
    entropy, kl = torch.tensor([.7, .9]), torch.tensor([.1, .3])
    loss, ratio = policy_loss(logp, logp, torch.tensor([3., -2.]), entropy, kl, 4, .5, 10.)
    assert loss.item() == pytest.approx((3 * math.log(2) - 2 * math.log(4) - .5 * 1.6 + 10 * .4) / 4)
    assert close(ratio, [1, 1])


def test_descending_the_loss_makes_good_tokens_likelier_spreads_and_stays_near_the_reference():
    logp, entropy, kl = (torch.full((2,), x, requires_grad=True) for x in (-1., 1., 1.))
    policy_loss(logp, logp.detach(), torch.tensor([2., -3.]), entropy, kl, 2, .1, .2)[0].backward()
    for got, want in ((logp.grad, [-1, 1.5]), (entropy.grad, [-.05, -.05]), (kl.grad, [.1, .1])):
        assert close(got, want, 1e-6)


def test_importance_weight_is_cut_at_two_while_the_reported_ratio_is_not():
    logp, played, credit = torch.tensor([.3, .2, .9, .5]).log(), torch.tensor([.2, .4, .1, .5]).log(), [1., 1., 1., -4.]
    logp.requires_grad_()
    loss, ratio = policy_loss(logp, played, torch.tensor(credit), torch.zeros(4), torch.zeros(4), 10, 0., 0.)
    loss.backward()
    assert close(ratio, [1.5, .5, 9, 1], 1e-5) and not ratio.requires_grad
    assert close(logp.grad, [-.15, -.05, -.2, .4], 1e-5)


@bounded
@given(n=st.integers(1, 6), seed=st.integers(0, 10 ** 6))
def test_policy_gradient_takes_the_weight_as_a_constant(n, seed):
    # finite differences of the loss with the weight held at its value: through the weight the slope would be another
    theta, played, credit = numbers(seed, 3, n)
    w = (theta.log_softmax(0) - played).exp().clamp(max=2)

    def terms(theta):  # the log-prob of every token, and the entropy and KL of one distribution over n of them
        logp = theta.log_softmax(0)
        return logp, -(logp.exp() * logp).expand(n), (logp.exp() * (logp + math.log(n))).expand(n)

    def frozen(theta):
        logp, entropy, kl = terms(theta)
        return (-w * credit * logp - .3 * entropy + .2 * kl).sum().item() / 7
    leaf = theta.clone().requires_grad_()
    logp, entropy, kl = terms(leaf)
    policy_loss(logp, played, credit, entropy, kl, 7, .3, .2)[0].backward()
    for i in range(n):
        step = 1e-4 * torch.eye(n, dtype=torch.float64)[i]
        slope = (frozen(theta + step) - frozen(theta - step)) / 2e-4
        assert leaf.grad[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_policy_loss_is_normalised_by_the_whole_batch_and_not_by_the_micro_batch():
    columns = numbers(0, 5, 9)
    whole = policy_loss(*columns, 9, .1, .2)[0]
    assert close(sum(policy_loss(*columns[:, part], 9, .1, .2)[0] for part in (slice(0, 2), slice(2, 9))), whole)


# ---------------------------------------------------------------------------------------------------- the scoring pass

@pytest.fixture(scope="session")
def llm():
    """A small random model with a tokenizer that knows both games, and an adapter that is not zero."""
    matches = [Match(n, n, 10, (Scripted("random"), Scripted("tit_for_tat", .2))) for n in range(20)]
    for game in ("trust_split", "split"):
        play(game, matches, [0], 40)
    tokenizer = tiny.build_tokenizer([text for match in matches for _, *both in match.log for text in both])
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 7, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=.1, tie_word_embeddings=False))
    llm = LLM(base, tokenizer, 4)
    llm.model.add_adapter("other", llm.model.peft_config["default"])
    with torch.no_grad():
        for name, p in llm.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=.1)
    return llm


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def conversations(llm, game, count, rounds, max_tokens):
    """Both seats of `count` games of the model with itself, each game a round shorter than the one before."""
    policy = Policy(llm)
    matches = [Match(n, n, max(1, rounds - n), (policy, policy)) for n in range(count)]
    play(game, matches, [0], max_tokens)
    return list(policy.episodes.values())


@pytest.fixture(scope="session", params=["ipd", "trust_split", "split"])
def episodes(request, llm):
    return conversations(llm, request.param, 4, 3, 6)


def weights(llm, adapter="default"):
    return {name: p for name, p in llm.model.named_parameters() if f".{adapter}." in name}


def gradients(llm):
    grads = {name: p.grad for name, p in weights(llm).items()}
    llm.model.zero_grad()
    return grads


def tokens(episodes):
    return [(e, k) for e in episodes for k in range(len(e.at))]


MIX = numbers(5, 3, 1000)  # the gradients compared are of log-probs, entropies and KLs each times its own number


def objective(columns):
    return (columns * MIX[:, :columns.shape[1]]).sum()


def plain(llm, episodes, adapter="default"):
    """Log-prob, entropy and KL [3, N] of all sampled tokens: a forward over each conversation, then whole logits."""
    framing, out = llm.framing, []
    message = [i for i in range(len(llm.tokenizer)) if i == framing.end or i not in framing.control]
    llm.model.set_adapter(adapter)
    for e in (e for e in episodes if e.at):
        logits = llm.model(torch.tensor([e.ids])).logits[0]
        with torch.no_grad(), llm.model.disable_adapter():
            base = llm.model(torch.tensor([e.ids])).logits[0]
        for at, legal in zip(e.at, e.legal):
            legal = message if legal is None else list(legal)
            p, q = (x[at - 1][legal].softmax(0) for x in (logits, base))
            out.append(torch.stack([p[legal.index(e.ids[at])].log(), -(p * p.log()).sum(), (p * (p / q).log()).sum()]))
    return torch.stack(out, 1)


def scored(llm, episodes, budget=4096, backward=False, **options):
    """The same from `score`, in the order of `tokens`; with `backward`, also the gradient of the objective."""
    numbered, count = [], 0
    for e in episodes:  # score hands logp through untouched: here it tells the tokens apart
        numbered.append(replace(e, logp=[float(count + k) for k in range(len(e.at))]))
        count += len(e.at)
    out, where = torch.full((3, count), torch.nan), [None] * count
    for mb in score(llm, numbered, budget, **options):
        n, columns = mb.logp_play.long(), torch.stack([mb.logp, mb.entropy, mb.kl])
        assert out[:, n].isnan().all()
        out[:, n] = columns.detach()
        for i, row, t in zip(n.tolist(), mb.row.tolist(), mb.round.tolist()):
            where[i] = row, t
        if backward:
            (columns * MIX[:, n]).sum().backward()
    assert where == [(row, t) for row, e in enumerate(episodes) for t in e.round]
    return out


def same_gradients(got, want, tolerance=1e-4):
    size = max(g.norm() for g in want.values())
    assert size > 0 and got.keys() == want.keys() and all(g.norm() > 0 for g in got.values())
    worst = max((got[name] - want[name]).norm() / (want[name].norm() + .01 * size) for name in want)
    assert worst < tolerance, worst


@pytest.fixture(scope="session")
def truth(llm, episodes):
    columns = plain(llm, episodes)
    llm.model.zero_grad()
    objective(columns).backward()
    return columns.detach(), gradients(llm)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("budget, size", [(1, 5), (300, 10 ** 6), (10 ** 6, 16)])
def test_score_equals_a_plain_forward_in_values_and_in_adapter_gradients(
        llm, episodes, truth, budget, size, checkpointing, monkeypatch):
    monkeypatch.setattr(llm, "checkpointing", checkpointing)
    monkeypatch.setattr(llm, "slice", size)
    passes = []
    hook = llm.decoder.layers[0].mlp.register_forward_pre_hook(
        lambda _, args: passes.append((*args[0].shape[:2], torch.is_grad_enabled())))
    got = scored(llm, episodes, budget, backward=True, reference=True)
    hook.remove()
    assert near(got, truth[0])
    same_gradients(gradients(llm), truth[1])
    assert all(B == 1 or B * S <= budget for B, S, _ in passes)
    with_grad = sum(grad for *_, grad in passes)
    if budget != 300:  # every micro-batch once, its opening once, and with checkpointing once more on the way back
        once = 2 * (len(episodes) if budget == 1 else 1)
        assert with_grad == once * (1 + checkpointing) and len(passes) - with_grad == once


def test_gradient_of_a_whole_update_does_not_depend_on_how_it_is_cut_into_micro_batches(llm, episodes):
    N, grads, batches = len(tokens(episodes)), [], []
    credit = numbers(1, len(episodes), 3).float()
    for budget in (10 ** 6, 1, 200):
        batches.append(0)
        for mb in score(llm, episodes, budget, reference=True):
            loss, _ = policy_loss(mb.logp, mb.logp_play, credit[mb.row, mb.round], mb.entropy, mb.kl, N, .1, .1)
            loss.backward()
            batches[-1] += 1
        grads.append(gradients(llm))
    assert batches[:2] == [1, len(episodes)] and batches[2] in range(2, len(episodes))
    for other in grads[1:]:
        same_gradients(other, grads[0], 1e-5)


def test_log_probs_of_the_update_are_those_of_play(llm, episodes):
    played = torch.tensor([e.logp[k] for e, k in tokens(episodes)])
    with torch.no_grad():
        assert near(scored(llm, episodes)[0], played)


def test_forced_tokens_are_not_scored(llm):
    for e in conversations(llm, "ipd", 2, 5, 0):  # of a reply only the letter is a choice: one token a round
        letters = llm.framing.encode("A") + llm.framing.encode("B")
        assert len(letters) == 2 and e.round == list(range(len(e.at))) and {e.ids[at] for at in e.at} <= set(letters)
        assert {e.ids[at + 1] for at in e.at} == {llm.framing.end}
        with torch.no_grad():
            entropy = scored(llm, [e])[1]
        assert entropy.shape == (len(e.at),) and 0 < entropy.min() and entropy.max() < math.log(2) + 1e-6


def test_odd_batches_no_common_opening_no_sampled_token_one_row_many_legal_sets(llm):
    a, b, c = conversations(llm, "trust_split", 2, 2, 4)[:3]
    other = replace(b, ids=[llm.framing.end] + b.ids[1:])
    assert a.ids[0] != other.ids[0]
    idle, longer = Episode(ids=[1, 2, 3]), replace(a, ids=a.ids + [5] * 9)
    sets = replace(b, legal=[tuple(range(n % 4, e, 1 + n % 3)) + (e,) for n, e in enumerate(b.ids[at] for at in b.at)])
    for some in ([a, other], [Episode(), a, idle, b, c], [a], [a, a], [longer, c], [sets, a, c]):
        want = plain(llm, some)
        objective(want).backward()
        slow = gradients(llm)
        assert near(scored(llm, some, 150, backward=True, reference=True), want.detach())
        same_gradients(gradients(llm), slow)
    assert list(score(llm, [Episode(), Episode(ids=[1])], 100)) == []


def test_score_runs_under_the_adapter_asked_for(llm, episodes):
    with torch.no_grad():
        default, other = (plain(llm, episodes, name) for name in ("default", "other"))
        assert not close(default[0], other[0], 1e-2)
        for name, want in (("other", other), ("default", default)):
            assert near(scored(llm, episodes, reference=True, adapter=name), want)


def test_kl_is_zero_without_change_and_positive_after_it(llm, episodes):
    with torch.no_grad():
        assert (scored(llm, episodes)[2] == 0).all()
        assert (scored(llm, episodes, reference=True)[2] > 0).all()
        kept = {name: p.clone() for name, p in weights(llm).items()}
        for name, p in weights(llm).items():
            p *= "lora_B" not in name
        untouched = scored(llm, episodes, reference=True)
        for name, p in weights(llm).items():
            p.copy_(kept[name])
    assert untouched[2].abs().max() < 1e-6 and untouched[1].min() > 0
