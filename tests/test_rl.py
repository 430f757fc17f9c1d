"""Tests of rl.py: masks, advantages, losses, updates, killed runs, and planted mutants.

The functions check_* hold what must be true of ONE function, which they take as an argument. The
tests give them the functions of rl.py. The last section gives them wrong versions, the classic
silent bugs of PPO for language models, and requires that each is rejected: a check that lets a
mutant pass is no check.

    python -m pytest tests/test_rl.py
    python -m pytest tests/test_rl.py -k mutant
"""

import argparse
import copy
import functools
import json
import math
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

import evaluate
import gp_env
import rl
import sft
from evaluate import Episode, Turn
from test_evaluate import Rigged, said
from test_sft import (Killed, assert_one_line, check_loss_mean, check_mask, check_shift, command,
                      files_of, gradients, kill_at, relative_gap, rows_of, same)

# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------


@functools.cache
def default_flags():
    """The flags of rl.py as its own parser fills them in."""
    with mock.patch("rl.run") as run, mock.patch("sys.argv", ["rl.py"]):
        rl.main()
    return vars(run.call_args.args[0])


def settings(**changes):
    """The flags of a small run: one epoch, one minibatch, no warm-up, unless said otherwise."""
    return argparse.Namespace(**default_flags() | {
        "episodes": 6, "max_new_tokens": 6, "epochs": 1, "minibatch": 64, "warmup": 0, "lr": 1e-3,
        "value_lr": 1e-3, "clip": 0.2, "value_clip": 1.0, "temperature": 0.6} | changes)


def wake(head):
    """Give the critic something to say: a new one answers 0 to everything."""
    with torch.no_grad():
        head[4].weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return head


def fresh_batch(backbone, args, solve_ats=(1, 3, 6, 2, 6), **how):
    """Played, scored and judged episodes, ready for an update: (head, rows, episodes)."""
    head = wake(rl.build_value_head(32, 0))
    envs = [Rigged(solve_at, **how) for solve_at in solve_ats]
    episodes = evaluate.play(backbone, envs, range(len(envs)), args.temperature,
                             args.max_new_tokens, torch.Generator().manual_seed(3))
    rows = rl.conversations(episodes)
    rl.score_all(backbone, head, rows, args.temperature, args.micro_batch)
    rl.add_advantages(rows, episodes, args.gamma, args.lam)
    return head, rows, episodes


def totals(rows):
    """(answer tokens, tries) of a list of rows."""
    return sum(sum(row["mask"]) for row in rows), sum(len(row["tries"]) for row in rows)


def move_policy(backbone, size=0.05):
    """Change all weights a little, as an optimiser step does: the ratio is no longer 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * parameter.abs().mean() * noise)


def turn(prompt_ids, answer_ids, reward=0.0, new=False):
    """One try, for tests that look at its tokens and reward alone."""
    return Turn(prompt_ids, answer_ids, [0.0] * len(answer_ids), "", reward, "", None, new)


# ------------------------------------------------------------------------------------------------
# 1. Collect
# ------------------------------------------------------------------------------------------------


def check_conversations(conversations):
    """The example in the docstring of `conversations`, then two episodes of two conversations."""
    p, a, end, m = 1, 2, 3, 4
    episode = Episode(None, "", [turn([p, p, p], [a, a, end], new=True), turn([m, m], [a, end])])
    row, = conversations([episode])
    assert row["ids"] == [p, p, p, a, a, end, m, m, a, end]
    assert row["mask"] == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert row["value_at"] == [2, 7]
    assert row["tries"] == [(0, 0), (0, 1)]
    forgetful = Episode(None, "", [turn([p], [a, end], new=True), turn([p, p], [end], new=True)])
    rows = conversations([episode, forgetful])
    assert [row["tries"] for row in rows] == [[(0, 0), (0, 1)], [(1, 0)], [(1, 1)]]
    assert (rows[2]["ids"], rows[2]["mask"], rows[2]["value_at"]) == ([p, p, end], [0, 0, 1], [1])


def test_conversations_by_hand():
    """Catches a mask off by one, a value read inside the answer, episodes joined into one row."""
    check_conversations(rl.conversations)


def check_no_leak(collect, backbone):
    """Training episodes hold training hands only. Three updates deal 72 hands; 30 % would leak."""
    args = settings(episodes=24, tries=1, max_new_tokens=1)
    for update in range(3):
        for episode in collect(backbone, args, update):
            assert gp_env.split_of(episode.env.hand.cards) == "train"
            assert episode.env.hand.rule == gp_env.RULES["ten"]
            assert episode.env.scoring_rule is None


def test_training_deals_no_held_out_hand(tiny):
    """Catches test hands, or the rule of the OOD test, among the games that are learnt from."""
    check_no_leak(rl.collect, tiny)


def test_collect_depends_on_seed_and_update_alone(tiny):
    """Catches games that repeat every update, and games that a resumed run plays differently."""
    args = settings(tries=2)
    first = rl.collect(tiny, args, 4)
    torch.manual_seed(7)
    again = rl.collect(tiny, args, 4)
    assert said(again) == said(first)
    assert [e.prompt for e in again] == [e.prompt for e in first]
    for other in (rl.collect(tiny, args, 5), rl.collect(tiny, settings(tries=2, seed=1), 4)):
        assert said(other) != said(first)
        assert not {e.prompt for e in other} & {e.prompt for e in first}


def test_seeds_do_not_collide():
    """Catches (seed 1, update 0) drawing what (seed 0, update 1) draws."""
    seeds = {rl.seeded(seed, update, use).initial_seed()
             for seed in range(10) for update in range(100) for use in range(4)}
    assert len(seeds) == 10 * 100 * 4


# ------------------------------------------------------------------------------------------------
# 2. Score
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_fresh_rollout_has_ratio_one(tiny, micro_batch, forget):
    """Catches a sampler and an update that disagree: PPO would start from a wrong ratio."""
    tiny.end_ids += list(range(60, 120))
    args = settings(max_new_tokens=8, micro_batch=micro_batch)
    head, rows, episodes = fresh_batch(tiny, args, forget=forget)
    for row in rows:
        sampled = [p for e, k in row["tries"] for p in episodes[e].turns[k].logprobs]
        assert (row["logprobs"] - torch.tensor(sampled)).abs().max() < 1e-4
    _, numbers = rl.minibatch_loss(tiny, head, rows, args, *totals(rows))
    assert numbers["clipfrac"] == 0 and abs(numbers["approx_kl"]) < 1e-8


def test_value_has_not_seen_the_answer(tiny):
    """Catches a V that is read on an answer token: a baseline must not know what was answered."""
    head, rows, _ = fresh_batch(tiny, settings())
    longest = max(rows, key=lambda row: len(row["tries"]))
    for k, end in enumerate(longest["value_at"]):
        other = copy.deepcopy(longest)
        for i in range(end + 1, len(other["ids"])):
            other["ids"][i] = 7
        rl.score_all(tiny, head, [other], 0.6, 1)
        assert torch.allclose(other["values"][:k + 1], longest["values"][:k + 1], atol=1e-5)
        if k + 1 < len(longest["value_at"]):        # but the next try has read it
            assert (other["values"][k + 1] - longest["values"][k + 1]).abs() > 1e-3
        other["ids"][end] = 7                   # and V does depend on the last prompt token
        rl.score_all(tiny, head, [other], 0.6, 1)
        assert (other["values"][k] - longest["values"][k]).abs() > 1e-3


@pytest.mark.parametrize("value_trunk", [False, True])
def test_critic_moves_the_trunk_only_when_asked(tiny, value_trunk):
    """Catches a critic whose long gradient takes the trunk away from the policy, unasked."""
    head, rows, _ = fresh_batch(tiny, settings())
    _, _, values = rl.score(tiny, head, rows, 0.6, value_trunk)
    values.sum().backward()
    moved = [p.grad is not None and p.grad.abs().max().item() > 0
             for p in tiny.model.parameters()]
    assert any(moved) == value_trunk
    assert all(p.grad is not None for p in head.parameters())


def test_new_critic_knows_nothing():
    """Catches a critic whose random first values shake the policy at the first update."""
    hidden = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    head = rl.build_value_head(32, 0)
    assert head(hidden).shape == (3, 5) and head(hidden).eq(0).all()
    for one, other in zip(head.parameters(), rl.build_value_head(32, 0).parameters()):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------
# 3. Advantages
# ------------------------------------------------------------------------------------------------


def by_definition(rewards, values, last, gamma, lam):
    """GAE without recursion: A_k = sum over l of (gamma * lambda)^l * delta_{k+l}."""
    following = values[1:] + [last]
    return [sum((gamma * lam) ** (j - k) * (rewards[j] + gamma * following[j] - values[j])
                for j in range(k, len(rewards))) for k in range(len(rewards))]


def check_gae(gae):
    """Three tries by hand, the docstring's example, both ways to end, 200 random episodes."""
    def run(rewards, values, terminated, **how):
        advantages, returns = gae(torch.tensor(rewards), torch.tensor(values), terminated,
                                  not terminated, how.pop("gamma", 0.9), how.pop("lam", 0.95),
                                  **how)
        assert torch.allclose(returns, advantages + torch.tensor(values), atol=1e-6)
        return advantages.tolist()

    # delta_2 =  5            - 2.0 =  3.0     A_2 =  3.0
    # delta_1 = -2 + 0.9*2.0  - 1.0 = -1.2     A_1 = -1.2 + 0.855 * 3.0   = 1.365
    # delta_0 = -1 + 0.9*1.0  - 0.5 = -0.6     A_0 = -0.6 + 0.855 * 1.365 = 0.567075
    rewards, values = [-1.0, -2.0, 5.0], [0.5, 1.0, 2.0]
    assert run(rewards, values, True) == pytest.approx([0.567075, 1.365, 3.0], abs=1e-5)
    assert run([-1.0, 5.0], [1.0, 2.0], True) == pytest.approx([2.365, 3.0], abs=1e-5)
    # the same numbers, out of tries: nothing follows, so nothing changes ...
    assert run(rewards, values, False) == pytest.approx([0.567075, 1.365, 3.0], abs=1e-5)
    # ... unless the caller says what would have followed: delta_2 = 5 + 0.9*10 - 2 = 12
    assert run(rewards, values, False, after=10.0) == pytest.approx(
        [-0.6 + 0.855 * (-1.2 + 0.855 * 12), -1.2 + 0.855 * 12, 12.0], abs=1e-5)
    # after a success nothing follows, whatever the caller says
    assert run(rewards, values, True, after=10.0) == pytest.approx([0.567075, 1.365, 3.0],
                                                                   abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    for i in range(200):
        count = i % 7 + 1
        rewards, values = (3 * torch.randn(2, count, generator=generator)).tolist()
        gamma, lam, after = torch.rand(3, generator=generator).tolist()
        for terminated in (True, False):
            expected = by_definition(rewards, values, 0.0 if terminated else after, gamma, lam)
            assert run(rewards, values, terminated, after=after, gamma=gamma,
                       lam=lam) == pytest.approx(expected, abs=1e-5)


def test_gae_by_hand_and_by_definition():
    """Catches a missing (1 - done), lambda without gamma, V of the wrong try, returns without V."""
    check_gae(rl.gae)


def judged(*episodes):
    """Episodes as lists of (reward, V) -> (rows, episodes). A last reward of 5 means solved."""
    made = []
    for tries in episodes:
        solved = tries[-1][0] == 5.0
        made.append(Episode(None, "", [turn([1], [2], reward, new=k == 0)
                                       for k, (reward, _) in enumerate(tries)], solved, not solved))
    rows = rl.conversations(made)
    for row, tries in zip(rows, episodes):
        row["values"] = torch.tensor([value for _, value in tries])
    return rows, made


def check_add_advantages(add_advantages):
    """Each episode alone, then normalised over all tries; returns as they are."""
    games = [[(-1.0, 1.0), (5.0, 2.0)],             # 2.365, 3: the example of gae
             [(-3.0, 0.5), (-4.0, -1.0)],           # out of tries: delta -4.4 and -3
             [(5.0, 1.0)]]                          # 4
    rows, episodes = judged(*games)
    add_advantages(rows, episodes, 0.9, 0.95)
    raw = torch.tensor([2.365, 3.0, -4.4 + 0.855 * -3.0, -3.0, 4.0])
    expected = (raw - raw.mean()) / ((raw - raw.mean()) ** 2).mean().sqrt()
    found = torch.cat([row["advantages"] for row in rows])
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.mean().abs() < 1e-6 and abs((found ** 2).mean() - 1) < 1e-5
    values = torch.tensor([value for game in games for _, value in game])
    assert torch.allclose(torch.cat([row["returns"] for row in rows]), raw + values, atol=1e-5)


def test_advantages_of_a_batch_by_hand():
    """Catches episodes that leak into each other, normalised returns, a mean over tokens."""
    check_add_advantages(rl.add_advantages)


def test_advantages_find_their_try_in_any_order(tiny):
    """Catches advantages that are dealt out in the order of rows and not by episode and try."""
    _, rows, episodes = fresh_batch(tiny, settings(), forget=True)
    expected = {t: (a, r) for row in rows
                for t, a, r in zip(row["tries"], row["advantages"], row["returns"])}
    shuffled = rows[::-1]
    rl.add_advantages(shuffled, episodes, 0.9, 0.95)
    for row in shuffled:
        for t, a, r in zip(row["tries"], row["advantages"], row["returns"]):
            assert (a - expected[t][0]).abs() < 1e-6 and r == expected[t][1]


def test_equal_rewards_give_no_infinite_advantage():
    """Catches a division by zero when every try of the batch was worth the same."""
    rows, episodes = judged([(5.0, 1.0)], [(5.0, 1.0)])
    rl.add_advantages(rows, episodes, 0.9, 0.95)
    assert torch.cat([row["advantages"] for row in rows]).eq(0).all()


# ------------------------------------------------------------------------------------------------
# 4. Losses
# ------------------------------------------------------------------------------------------------

# ratio, advantage, min(ratio * A, clamp(ratio, 0.8, 1.2) * A), its slope in log p
CLIPPED = [(1.5, +2.0, +2.4, 0.0),      # good, and already far enough: no further
           (0.5, +2.0, +1.0, +1.0),     # good, but became less likely: come back
           (1.5, -2.0, -3.0, -3.0),     # bad, but became more likely: come back
           (0.5, -2.0, -1.6, 0.0),      # bad, and already far enough: no further
           (1.1, +2.0, +2.2, +2.2),     # inside the range the clip does nothing
           (0.9, -2.0, -1.8, -1.8)]


def check_policy_loss(policy_loss):
    """Both signs of the advantage, on both sides of the clip range: the value and the slope."""
    old = -5.0 - torch.arange(6.0)
    for i, (ratio, advantage, value, slope) in enumerate(CLIPPED):
        new = (old[i:i + 1] + math.log(ratio)).requires_grad_()
        loss, log_ratio = policy_loss(new, old[i:i + 1], torch.tensor([advantage]), 0.2)
        loss.backward()
        assert loss.item() == pytest.approx(-value, abs=1e-5), CLIPPED[i]
        assert new.grad.item() == pytest.approx(-slope, abs=1e-5), CLIPPED[i]
        assert log_ratio.item() == pytest.approx(math.log(ratio), abs=1e-5)
    ratios, advantages, values, _ = (torch.tensor(x) for x in zip(*CLIPPED))
    loss, log_ratio = policy_loss(old + ratios.log(), old, advantages, 0.2)
    assert loss.item() == pytest.approx(-values.sum().item(), abs=1e-4)
    assert not log_ratio.requires_grad


def test_policy_loss_by_hand():
    """Catches min and max swapped, the sign of the loss, a clip on one side only."""
    check_policy_loss(rl.policy_loss)


def check_value_loss(value_loss):
    """Clip 1: the pessimistic one of the two errors."""
    for new, old, returns, loss in ((2.0, 0.0, 3.0, 2.0),       # max(1, (1 - 3)^2) / 2
                                    (2.0, 0.0, -1.0, 4.5),      # max(9, (1 + 1)^2) / 2
                                    (-2.0, 0.0, -3.0, 2.0),
                                    (0.5, 0.0, 1.0, 0.125),     # inside: the plain error
                                    (4.0, 4.0, 4.0, 0.0)):
        found = value_loss(*(torch.tensor([x]) for x in (new, old, returns)), 1.0)
        assert found.item() == pytest.approx(loss)
    column = torch.tensor([[2.0, 0.0, 3.0], [0.5, 0.0, 1.0]]).T
    assert value_loss(*column, 1.0).item() == pytest.approx(2.125)      # a sum, not a mean


def test_value_loss_by_hand():
    """Catches min for max, a clip around the return, a missing 1/2, a hidden mean."""
    check_value_loss(rl.value_loss)


def test_per_answer_by_hand():
    """Catches tokens that are added to a neighbour's answer."""
    found = rl.per_answer(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([2, 1, 2]))
    assert found.tolist() == [3.0, 4.0, 24.0]


def test_answer_lengths_are_read_off_the_mask(tiny):
    """Catches advantages given to the tokens of another try."""
    tiny.end_ids += list(range(60, 120))
    _, rows, episodes = fresh_batch(tiny, settings(max_new_tokens=8))
    for row in rows:
        assert rl._answer_lengths(row) == [len(episodes[e].turns[k].answer_ids)
                                           for e, k in row["tries"]]


def check_minibatch_loss(minibatch_loss, backbone, ratio="token"):
    """The whole loss, written out over answers of unequal length, and cut in micro-batches."""
    backbone.end_ids = backbone.end_ids + list(range(60, 120))
    args = settings(max_new_tokens=8, entropy_coef=0.01, ratio=ratio)
    head, rows, episodes = fresh_batch(backbone, args)
    move_policy(backbone)
    wake(head)[4].bias.data += 0.2
    tokens, tries = totals(rows)

    # by hand, from the definitions: one token, or one answer, after the other
    policy = critic = surprise = 0.0
    for row in rows:
        with torch.no_grad():
            new, entropy, values = rl.score(backbone, head, [row], args.temperature)
        surprise += entropy.sum().item()
        at = 0
        for k, (e, number) in enumerate(row["tries"]):
            count = len(episodes[e].turns[number].answer_ids)
            gap = (new - row["logprobs"])[at:at + count].tolist()
            at += count
            a, old = row["advantages"][k].item(), row["values"][k].item()
            for step in gap if ratio == "token" else [sum(gap)]:
                policy -= min(math.exp(step) * a, min(max(math.exp(step), 0.8), 1.2) * a)
            clipped = old + min(max(values[k].item() - old, -1), 1)
            target = row["returns"][k].item()
            critic += 0.5 * max((values[k].item() - target) ** 2, (clipped - target) ** 2)
    actions = tokens if ratio == "token" else tries
    policy /= actions
    expected = policy + 0.5 * critic / tries - 0.01 * surprise / actions

    parts, wholes = {}, {}
    for micro_batch in (64, 1, 2):
        backbone.model.zero_grad(set_to_none=True)
        sums = torch.zeros(4)
        for part in rl.by_length(rows, micro_batch):
            loss, numbers = minibatch_loss(backbone, head, part, args, tokens, tries)
            loss.backward()
            sums += torch.tensor([loss.item(), numbers["policy_loss"], numbers["value_loss"],
                                  numbers["entropy"]])
        assert sums.tolist() == pytest.approx([expected, policy, critic / tries,
                                               surprise / tokens], rel=1e-4, abs=1e-5)
        parts[micro_batch], wholes[micro_batch] = gradients(backbone), sums
    assert relative_gap(parts[1], parts[64]) < 2e-6 and relative_gap(parts[2], parts[64]) < 2e-6


@pytest.mark.parametrize("ratio", ["token", "answer"])
def test_minibatch_loss_by_definition(tiny, ratio):
    """Catches a mean over padding, a mean of means, advantages on the wrong tokens."""
    check_minibatch_loss(rl.minibatch_loss, tiny, ratio)


def test_token_and_answer_ratio_agree_on_answers_of_one_token(tiny):
    """Catches two formulas where there is one: with a single token they must be the same."""
    args = settings(max_new_tokens=1)
    head, rows, _ = fresh_batch(tiny, args)
    move_policy(tiny)
    found = []
    for ratio in ("token", "answer"):
        loss, numbers = rl.minibatch_loss(tiny, head, rows, settings(ratio=ratio), *totals(rows))
        loss.backward()
        found.append((gradients(tiny), numbers))
    assert relative_gap(found[0][0], found[1][0]) < 1e-6
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def check_returns_are_fixed(minibatch_loss, backbone):
    """When the critic moves, its target must not: the loss is against the returns of collection."""
    args = settings(max_new_tokens=3, value_clip=100.0)
    head, rows, _ = fresh_batch(backbone, args)
    head[4].bias.data += 1.0                    # every V grows by exactly 1
    returns, values = (torch.cat([row[key] for row in rows]) for key in ("returns", "values"))
    _, numbers = minibatch_loss(backbone, head, rows, args, *totals(rows))
    expected = 0.5 * ((values + 1 - returns) ** 2).mean().item()
    assert numbers["value_loss"] == pytest.approx(expected, rel=1e-4)


def test_critic_learns_a_fixed_target(tiny):
    """Catches returns that are computed again with the new critic: a target that runs away."""
    check_returns_are_fixed(rl.minibatch_loss, tiny)


def test_kl_to_the_start_is_zero_at_the_start(tiny):
    """Catches a KL term with the wrong sign or a gradient where there is no distance."""
    args = settings(kl_coef=1.0, value_coef=0.0)
    head, rows, _ = fresh_batch(tiny, args)
    for row in rows:
        row["advantages"] = torch.zeros_like(row["advantages"])
        row["start_logprobs"] = row["logprobs"]
    assert rl.minibatch_loss(tiny, head, rows, args, *totals(rows))[0].abs() < 1e-8
    move_policy(tiny)
    loss, numbers = rl.minibatch_loss(tiny, head, rows, args, *totals(rows))
    # both are the estimator k3, of KL(start, policy) and of KL(old, policy): here the same pair
    with torch.no_grad():
        new = torch.cat([rl.score(tiny, head, [row], 0.6)[0] for row in rows])
    gap = torch.cat([row["start_logprobs"] for row in rows]) - new
    assert loss.item() == pytest.approx((gap.exp() - 1 - gap).mean().item(), rel=1e-4)
    assert loss.item() > 0 and numbers["approx_kl"] > 0


def test_explained_variance_by_hand():
    """Catches 1 - Var(V)/Var(R) and the two arguments swapped."""
    returns = torch.tensor([0.0, 2.0, 4.0])                     # variance 4
    assert rl.explained_variance(returns - 7, returns) == pytest.approx(1)
    assert rl.explained_variance(torch.ones(3), returns) == pytest.approx(0)
    assert rl.explained_variance(torch.tensor([0.0, 1.0, 2.0]), returns) == pytest.approx(0.75)
    assert rl.explained_variance(-returns, returns) == pytest.approx(-3)


# ------------------------------------------------------------------------------------------------
# 4. Updates
# ------------------------------------------------------------------------------------------------


def optimizer_of(backbone, head):
    """The optimizer of a run, for tests of single updates; they set its rates themselves."""
    return torch.optim.AdamW([{"params": list(backbone.model.parameters())},
                              {"params": list(head.parameters())}], weight_decay=0.0)


def check_update_direction(backbone):
    """One update: the answer that was paid becomes likelier, the one that was not less likely."""
    args = settings(epochs=2)
    head, rows, _ = fresh_batch(backbone, args, solve_ats=(1, 6, 1, 6))
    before = [row["logprobs"].sum().item() for row in rows]
    values = [row["values"].mean().item() for row in rows]
    rl.ppo_update(backbone, head, optimizer_of(backbone, head), rows, args, 0)
    after = [dict(row) for row in rows]
    rl.score_all(backbone, head, after, args.temperature, 64)
    change = [row["logprobs"].sum().item() - old for row, old in zip(after, before)]
    assert min(change[0], change[2]) > 0.1 and max(change[1], change[3]) < -0.1, change
    moved = [row["values"].mean().item() - old for row, old in zip(after, values)]
    assert moved[0] > moved[1], "the critic must expect more where more was paid"


def test_update_raises_what_was_paid(tiny):
    """Catches a sign error anywhere between the reward and the weights."""
    check_update_direction(tiny)


@pytest.mark.parametrize("minibatch", [2, 64])
def test_update_does_not_depend_on_the_micro_batch(tiny, minibatch):
    """Catches a memory dial that changes what is learnt."""
    found = []
    for micro_batch in (64, 1):
        backbone = copy.deepcopy(tiny)
        args = settings(micro_batch=micro_batch, minibatch=minibatch, epochs=2, lr=0.1)
        head, rows, _ = fresh_batch(backbone, args)
        # plain gradient descent: Adam would turn rounding of tiny gradients into whole steps
        optimizer = torch.optim.SGD([{"params": list(part.parameters())}
                                     for part in (backbone.model, head)], lr=0.1)
        before = torch.cat([p.detach().flatten() for p in backbone.model.parameters()])
        numbers = rl.ppo_update(backbone, head, optimizer, rows, args, 0)
        after = torch.cat([p.detach().flatten() for p in backbone.model.parameters()])
        found.append((after - before, numbers))
    assert relative_gap(found[1][0], found[0][0]) < 1e-3
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3, abs=1e-5)


def test_update_counts_tokens_and_epochs(tiny):
    """Catches FLOPs that forget epochs, and conversations that an epoch leaves out."""
    args = settings(epochs=3, minibatch=2, micro_batch=1)
    head, rows, _ = fresh_batch(tiny, args)
    numbers = rl.ppo_update(tiny, head, optimizer_of(tiny, head), rows, args, 0)
    assert numbers["tokens_trained"] == 3 * sum(len(row["ids"]) for row in rows)
    assert numbers["skipped"] == 0


def test_learning_rates_by_hand(tiny):
    """Catches a warm-up that begins again with every update, and rates a resume would not find."""
    args = settings(minibatch=2, warmup=8, lr=0.008, value_lr=0.08, updates=4)
    head, rows, _ = fresh_batch(tiny, args)         # 5 rows: 3 optimiser steps an update
    optimizer = optimizer_of(tiny, head)
    for update, share in ((0, 3 / 8),
                          (1, 6 / 8 * (1 + math.sqrt(0.5)) / 2),        # cosine, a quarter done
                          (2, 1 / 2),                                   # warm, and half done
                          (0, 3 / 8)):
        rl.ppo_update(tiny, head, optimizer, rows, args, update)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.008 * share, 0.08 * share])


def test_gradient_that_is_not_finite_is_not_applied(tiny):
    """Catches one NaN that turns the whole policy into NaN, silently."""
    args = settings(epochs=2, minibatch=2)
    head, rows, _ = fresh_batch(tiny, args)
    rows[0]["advantages"] = rows[0]["advantages"] * math.inf
    optimizer = optimizer_of(tiny, head)
    numbers = rl.ppo_update(tiny, head, optimizer, rows, args, 0)
    assert numbers["skipped"] == 2      # in each epoch, the minibatch that holds row 0
    assert all(torch.isfinite(p).all() for p in tiny.model.parameters())
    for row in rows:
        row["returns"] = row["returns"] * math.nan
    before = copy.deepcopy(tiny.model.state_dict())
    assert rl.ppo_update(tiny, head, optimizer, rows, args, 0)["skipped"] == 3     # of 6, then stop
    assert tiny.refused == 3
    assert same(before, tiny.model.state_dict())


# ------------------------------------------------------------------------------------------------
# 5. The run
# ------------------------------------------------------------------------------------------------


def test_self_check_passes_and_says_what_it_saw(tiny):
    """Catches a self-check that fails on a good batch."""
    _, rows, episodes = fresh_batch(tiny, settings())
    told = rl.self_check(rows, episodes, tiny, "train")
    assert f"{totals(rows)[0]} tokens" in told and "max |log ratio|" in told


@pytest.mark.parametrize("shift", [1, -1])
def test_self_check_finds_a_shifted_mask(tiny, shift):
    """Catches a self-check that only counts tokens."""
    head, rows, episodes = fresh_batch(tiny, settings())
    for row in rows:
        mask = row["mask"]
        row["mask"] = [0] + mask[:-1] if shift == 1 else mask[1:] + [0]
    rl.score_all(tiny, head, rows, 0.6, 64)
    with pytest.raises(sft.Problem, match="self-check"):
        rl.self_check(rows, episodes, tiny, "train")


def test_self_check_finds_another_temperature(tiny):
    """Catches a ratio between two different distributions."""
    head, rows, episodes = fresh_batch(tiny, settings())
    rl.score_all(tiny, head, rows, 0.7, 64)
    with pytest.raises(sft.Problem, match="temperature"):
        rl.self_check(rows, episodes, tiny, "train")


def test_self_check_knows_that_a_low_temperature_magnifies(tiny):
    """Catches a run that is stopped for rounding: logits over 0.05 are off by 20 times as much."""
    head, rows, episodes = fresh_batch(tiny, settings(temperature=0.05))
    rl.score_all(tiny, head, rows, 0.05, 64)
    for row in rows:
        row["logprobs"] = row["logprobs"] + 3e-4
    assert rl.self_check(rows, episodes, tiny, "train", 0.05)
    with pytest.raises(sft.Problem, match="temperature"):
        rl.self_check(rows, episodes, tiny, "train", 1.0)


def test_a_run_on_all_hands_holds_none_out(rigged, monkeypatch, capsys):
    """Catches hands that were trained on and are reported as held out."""
    code, error = command(monkeypatch, capsys, rl, "--model", "model", *SHORT, "--from-backbone",
                          "--split", "all", "--out", "all")
    assert code == 0, error
    assert {name for row in rows_of(rigged / "all" / "eval.jsonl") for name in row["cells"]} == {
        "all/id"}


def test_self_check_finds_a_held_out_hand(tiny):
    """Catches test hands that leak into training."""
    _, rows, episodes = fresh_batch(tiny, settings())
    stranger = gp_env.GeneralPoints(split="test")
    stranger.reset(0)
    episodes[2].env.hand = stranger.hand
    with pytest.raises(sft.Problem, match="held-out"):
        rl.self_check(rows, episodes, tiny, "train")


def test_self_check_claims_only_what_it_checked(tiny):
    """Catches "no held-out hand" in the log of a run that trains on all of them."""
    _, rows, episodes = fresh_batch(tiny, settings(), solve_ats=[1] * 16, split="all")
    assert {gp_env.split_of(episode.env.hand.cards) for episode in episodes} != {"train"}
    assert "no held-out hand" not in rl.self_check(rows, episodes, tiny, "all")


FLAGS = ["--from-backbone", "--updates", 3, "--episodes", 4, "--max-new-tokens", 4, "--epochs", 2,
         "--minibatch", 2, "--eval-hands", 4, "--eval-every", 2, "--kl-coef", 0.05, "--lr", 1e-3]


@pytest.fixture
def rigged(tiny, tmp_path, monkeypatch):
    """A folder to work in, with the tiny model in "model", where games end as Rigged ones do."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gp_env, "GeneralPoints", Rigged)
    return tmp_path


def train(monkeypatch, capsys, out, *flags):
    """rl.py on the command line, which must succeed."""
    code, error = command(monkeypatch, capsys, rl, "--model", "model", *FLAGS, "--out", out,
                          *flags)
    assert code == 0, error


def assert_same_run(one, other):
    """Two finished runs: equal metrics, evaluations, weights and state, to the last bit."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert rows_of(one / name) == rows_of(other / name), name
    assert [step for step, _ in sft.checkpoints(one)] == [2, 3]     # the newest, and one to spare
    (step, path), (step2, path2) = sft.checkpoints(one)[-1], sft.checkpoints(other)[-1]
    assert step == step2 == 3
    assert same(sft.load_state(path), sft.load_state(path2))
    assert same(sft.load_backbone(path).model.state_dict(),
                sft.load_backbone(path2).model.state_dict())


KILLS = {"in the first evaluation": (rl, "evaluate", 1, False),
         "before the first checkpoint": (rl, "save_checkpoint", 1, False),
         "while collecting": (rl, "collect", 2, False),
         "in the update": (rl, "ppo_update", 2, False),
         "before the metrics are written": (sft.Metrics, "write", 3, False),
         "after the metrics are written": (sft.Metrics, "write", 3, True),
         "in a later evaluation": (rl, "evaluate", 2, False),
         "after a later evaluation": (rl, "evaluate", 2, True),
         "in the middle of a checkpoint": (torch, "save", 2, False),
         "just after a checkpoint": (rl, "save_checkpoint", 2, True),
         "in the last evaluation": (rl, "evaluate", 3, False)}


def test_killed_and_resumed_is_bit_for_bit_the_same(rigged, monkeypatch, capsys):
    """Catches state that a resume forgets: optimizer, critic, counts, seeds, rows of metrics."""
    train(monkeypatch, capsys, "unbroken")
    whole = rows_of(rigged / "unbroken" / "metrics.jsonl")
    assert [row["step"] for row in whole] == [1, 2, 3]
    assert 0 < sum(row["success"] for row in whole) < 3     # some games are won and some are not
    measured = rows_of(rigged / "unbroken" / "eval.jsonl")
    assert [(row["step"], row["hands"]) for row in measured] == [(0, 4), (2, 1), (3, 4)]
    for number, moment in enumerate(KILLS):
        out = rigged / f"killed{number}"
        with monkeypatch.context() as patch:
            kill_at(patch, *KILLS[moment])
            with pytest.raises(Killed):
                train(patch, capsys, out)
        train(monkeypatch, capsys, out, "--resume")
        assert_same_run(rigged / "unbroken", out)
        shutil.rmtree(out)


def test_sigkill_and_resume_in_a_process_of_its_own(tiny, tmp_path):
    """Catches what only a real kill leaves behind: no exception, no clean-up, buffers lost."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    line = [sys.executable, str(pathlib.Path(rl.__file__)), "--model", "model", "--threads", "1",
            *map(str, FLAGS), "--out"]

    def go(out, *flags, kill_after=None):
        process = subprocess.Popen([*line, out, *flags], cwd=tmp_path, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        while kill_after and not (tmp_path / out / kill_after).exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        if kill_after:
            process.kill()                      # SIGKILL: nothing in the process can catch it
        error = process.communicate()[1]
        assert process.returncode == (-signal.SIGKILL if kill_after else 0), error

    go("unbroken")
    go("killed", kill_after="step-000001")
    assert len(rows_of(tmp_path / "killed" / "metrics.jsonl")) < 3
    go("killed", "--resume")
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")


def test_kl_is_measured_from_the_start(rigged, monkeypatch, capsys):
    """Catches a KL term that holds the policy at its last update and not at the start."""
    caught, update = {}, rl.ppo_update

    def noting(backbone, head, optimizer, rows, args, number):
        caught[number] = copy.deepcopy(rows)
        return update(backbone, head, optimizer, rows, args, number)

    monkeypatch.setattr(rl, "ppo_update", noting)
    train(monkeypatch, capsys, "run", "--updates", 2)
    for number, rows in caught.items():
        gap = max((row["start_logprobs"] - row["logprobs"]).abs().max() for row in rows)
        assert gap < 1e-4 if number == 0 else gap > 1e-3
        again = [dict(row) for row in rows]
        rl.score_all(sft.load_backbone("model"), rl.build_value_head(32, 0), again, 0.6, 64)
        for row, check in zip(rows, again):
            assert (row["start_logprobs"] - check["logprobs"]).abs().max() < 1e-5


def test_finished_run_can_be_resumed_again(rigged, monkeypatch, capsys):
    """Catches a resume of a complete run that trains on, or loses its metrics."""
    train(monkeypatch, capsys, "run", "--updates", 1)
    before = files_of(rigged / "run" / "step-000001")
    rows = rows_of(rigged / "run" / "metrics.jsonl")
    train(monkeypatch, capsys, "run", "--updates", 1, "--resume")
    assert files_of(rigged / "run" / "step-000001") == before
    assert rows_of(rigged / "run" / "metrics.jsonl") == rows


def test_every_json_line_of_a_run_is_strict(rigged, monkeypatch, capsys):
    """Catches NaN in the metrics, which other programs cannot read: one episode of one try."""
    train(monkeypatch, capsys, "run", "--updates", 1, "--episodes", 1, "--tries", 1)

    def refuse(constant):
        raise AssertionError(constant)

    for name in ("metrics.jsonl", "eval.jsonl"):
        for line in (rigged / "run" / name).read_text().splitlines():
            json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("damage", ["cut", "another list", "another dict", "another head",
                                    "another optimizer", "no counts", "odd counts"])
def test_damaged_checkpoint_is_refused(rigged, monkeypatch, capsys, damage):
    """Catches a resume that silently starts anew when its state cannot be read, or a traceback."""
    train(monkeypatch, capsys, "run", "--updates", 1)
    path = rigged / "run" / "step-000001" / "state.pt"
    {"cut": lambda: path.write_bytes(path.read_bytes()[:1000]),
     "another list": lambda: torch.save([1, 2], path),
     "another dict": lambda: torch.save({"tokens": 1}, path),
     "another head": lambda: torch.save(sft.load_state(path.parent) | {"head": {}}, path),
     "another optimizer": lambda: torch.save(
         sft.load_state(path.parent) | {"optimizer": {"state": {}, "param_groups": []}}, path),
     "no counts": lambda: torch.save(sft.load_state(path.parent) | {"counts": 3}, path),
     "odd counts": lambda: torch.save(
         sft.load_state(path.parent) | {"counts": {"init": "1"}}, path)}[damage]()
    code, error = command(monkeypatch, capsys, rl, "--model", "model", *FLAGS, "--updates", 1,
                          "--out", "run", "--resume")
    assert_one_line(code, error, "state.pt")


SHORT = ["--sft-steps", 4, "--sft-start-step", 2, "--sft-batch", 2, "--updates", 1,
         "--episodes", 2, "--tries", 2, "--max-new-tokens", 2, "--eval-hands", 1]


def test_start_is_made_once_and_counted(rigged, monkeypatch, capsys):
    """Catches a start that is trained again for every run, and FLOPs that forget it."""
    def go(*flags):
        code, error = command(monkeypatch, capsys, rl, "--model", "model", *SHORT, *flags)
        assert code == 0, error

    go("--out", "one")
    start = rigged / "runs" / "start-gp-l-s0" / "step-000002"
    made = start.stat().st_mtime_ns
    tokens = sft.load_state(start)["tokens"]
    first = rows_of(rigged / "one" / "eval.jsonl")[0]
    size = sft.task_parameters(sft.load_backbone(start).model)
    assert tokens > 0 and first["flops"] == 6 * size * tokens
    go("--out", "two")
    assert start.stat().st_mtime_ns == made
    go("--out", "three", "--sft-lr", 1e-5)          # another start is wanted, this one is kept
    other = start.parent.with_name("start-gp-l-s0-2")
    assert start.stat().st_mtime_ns == made and (other / start.name).exists()
    # killed between the start's last checkpoint and its note of how it was made
    for wreck in ("", "{"):
        (other / "made.jsonl").write_text(wreck)
        made = (other / start.name).stat().st_mtime_ns
        go("--out", f"four{wreck}", "--sft-lr", 1e-5)
        assert (other / start.name).stat().st_mtime_ns != made
    assert len(list((rigged / "runs").iterdir())) == 2
    # a run that goes on needs its start no more
    shutil.rmtree(rigged / "runs")
    go("--out", "two", "--resume")
    assert not (rigged / "runs").exists()


def test_inspect_prints_a_table_and_learns_nothing(rigged, monkeypatch, capsys):
    """Catches an --inspect that claims a run folder, and columns that do not belong together."""
    monkeypatch.setattr("sys.argv", ["rl.py", "--model", "model", *map(str, FLAGS), "--inspect",
                                     "--out", "run"])
    assert sft.guarded(rl.main) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("pos  token"))
    table = [line for line in lines[at + 1:] if line[:3].strip().isdigit()]
    assert [int(line[:3]) for line in table] == list(range(len(table)))
    assert "<|user|>" in table[0] and "+" not in table[0]
    assert not (rigged / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--init", "model", "--from-backbone"], ["--init", "--from-backbone"]),
    (["--init", "nowhere"], ["nowhere"]),
    (["--model", "nowhere", "--from-backbone"], ["nowhere"]),
    (["--temperature", "0"], ["--temperature"]),
    (["--temperature", "nan"], ["--temperature"]),
    (["--lr", "nan", "--from-backbone"], ["--lr"]),
    (["--lr", "inf", "--from-backbone"], ["--lr"]),
    (["--value-lr", "nan", "--from-backbone"], ["--value-lr"]),
    (["--episodes", "0"], ["--episodes"]),
    (["--updates", "0", "--from-backbone"], ["--updates"]),
    (["--tries", "0"], ["--tries"]),
    (["--minibatch", "0"], ["--minibatch"]),
    (["--epochs", "0"], ["--epochs"]),
    (["--max-new-tokens", "0"], ["--max-new-tokens"]),
    (["--eval-hands", "0", "--from-backbone"], ["--eval-hands"]),
    (["--eval-every", "0"], ["--eval-every"]),
    (["--gamma", "-0.1"], ["--gamma"]),
    (["--gamma", "1.5", "--from-backbone"], ["--gamma"]),
    (["--lam", "1.5", "--from-backbone"], ["--lam"]),
    (["--sft-batch", "0"], ["--sft-batch"]),
    (["--sft-start-step", "0"], ["--sft-start-step"]),
    (["--sft-start-step", "9"], ["--sft-start-step"]),      # SHORT plans 4 steps
    (["--sft-save-every", "0"], ["--sft-save-every"]),
    (["--resume"], ["--resume"]),
    (["--device", "abacus"], ["abacus"]),
    (["--seed", str(2 ** 63), "--from-backbone"], ["--seed"]),
    (["--out", "model/config.json", "--from-backbone"], ["config.json"]),
])
def test_bad_flags_end_in_one_line(rigged, monkeypatch, capsys, flags, words):
    """Catches tracebacks, flags that contradict each other, and values that do nothing."""
    basis = [] if "--model" in flags else ["--model", "model"]
    code, error = command(monkeypatch, capsys, rl, *basis, *SHORT, *flags)
    assert_one_line(code, error, "rl.py: ", *words)


# ------------------------------------------------------------------------------------------------
# Planted mutants: wrong versions, each with the check that must reject it
# ------------------------------------------------------------------------------------------------


def rejected(check, *arguments):
    """The check must fail, and for its own reason: an assertion or the run's self-check."""
    with pytest.raises((AssertionError, sft.Problem)):
        check(*arguments)


@pytest.mark.parametrize("shift", [1, -1])
def test_mutant_mask_off_by_one(tiny, shift):
    """Both maskings, SFT's and RL's, shifted to either side."""
    def moved(mask):
        return [0] + mask[:-1] if shift == 1 else mask[1:] + [0]

    def encode(backbone, conversation):
        ids, mask = sft.encode(backbone, conversation)
        return ids, moved(mask)

    def conversations(episodes):
        return [row | {"mask": moved(row["mask"])} for row in rl.conversations(episodes)]

    rejected(check_mask, encode, tiny)
    rejected(check_conversations, conversations)


def test_mutant_end_token_not_learnt(tiny):
    """A policy that is never taught to stop."""
    def encode(backbone, conversation):
        ids, mask = sft.encode(backbone, conversation)
        return ids, [int(m and token not in backbone.end_ids) for token, m in zip(ids, mask)]

    rejected(check_mask, encode, tiny)


def test_mutant_mean_over_padding(tiny):
    """The loss divided by all positions of the padded batch, in SFT and in PPO."""
    def sft_loss(backbone, rows, micro_batch, backward=True):
        loss, fed = sft.sft_loss(backbone, rows, micro_batch, backward)
        answers, longest = sum(sum(mask) for _, mask in rows), max(len(ids) for ids, _ in rows)
        return loss * answers / (len(rows) * longest), fed

    def minibatch_loss(backbone, head, part, args, tokens, tries):
        padded = len(part) * max(len(row["ids"]) for row in part)
        return rl.minibatch_loss(backbone, head, part, args, padded, tries)

    rejected(check_loss_mean, sft_loss, tiny)
    rejected(check_minibatch_loss, minibatch_loss, tiny)


def test_mutant_mean_of_micro_batches(tiny):
    """Each micro-batch divided by its own tokens: right for one, wrong for two."""
    def minibatch_loss(backbone, head, part, args, tokens, tries):
        return rl.minibatch_loss(backbone, head, part, args, *totals(part))

    rejected(check_minibatch_loss, minibatch_loss, tiny)


@pytest.mark.parametrize("wrong", ["own position", "two ahead"])
def test_mutant_label_shift(tiny, monkeypatch, wrong):
    """Token t scored from hidden[t], which has read it, or from hidden[t - 2]."""
    original = sft.token_logprobs

    def token_logprobs(backbone, hidden, ids, mask, temperature=1.0):
        hidden = hidden.roll(-1 if wrong == "own position" else 1, dims=1)
        return original(backbone, hidden, ids, mask, temperature)

    rejected(check_shift, token_logprobs, tiny)
    monkeypatch.setattr(rl, "token_logprobs", token_logprobs)
    _, rows, episodes = fresh_batch(tiny, settings())
    rejected(rl.self_check, rows, episodes, tiny, "train")


def test_mutant_bootstrap_across_a_truncated_episode():
    """Out of tries, and the value of the next, unrelated episode stands for what would follow."""
    def add_advantages(rows, episodes, gamma, lam):
        rewards = torch.tensor([t.reward for e in episodes for t in e.turns])
        values = torch.cat([row["values"] for row in rows])
        solved = [e.terminated and k == len(e.turns) - 1
                  for e in episodes for k in range(len(e.turns))]
        advantages, running = torch.zeros_like(values), 0.0
        for i in reversed(range(len(rewards))):
            more = 0.0 if solved[i] or i + 1 == len(rewards) else 1.0
            following = values[i + 1] if more else 0.0
            running = rewards[i] + gamma * following - values[i] + gamma * lam * more * running
            advantages[i] = running
        spread = advantages.std(correction=0) + 1e-8
        for row, a, r in zip(rows, *(x.split([len(e.turns) for e in episodes])
                                     for x in (advantages, advantages + values))):
            row["advantages"], row["returns"] = (a - advantages.mean()) / spread, r

    def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0):
        return rl.gae(rewards, values, terminated, truncated, gamma, lam, float(values[-1]))

    rejected(check_add_advantages, add_advantages)
    rejected(check_gae, gae)


def test_mutant_missing_one_minus_done():
    """After a success the critic's idea of what follows is added: there is nothing."""
    def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0):
        return rl.gae(rewards, values, False, True, gamma, lam, after)

    rejected(check_gae, gae)


def test_mutant_lambda_of_the_wrong_try():
    """gamma * lambda applied once too often, or V of the same try instead of the next."""
    def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0):
        return rl.gae(rewards, values, terminated, truncated, gamma, gamma * lam, after)

    rejected(check_gae, gae)


def test_mutant_min_and_max_swapped():
    """The optimistic surrogate, which pays for going further than the clip; and its critic."""
    def policy_loss(logprobs, old_logprobs, advantages, clip):
        log_ratio = logprobs - old_logprobs
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - clip, 1 + clip)
        return -torch.max(ratio * advantages, clipped * advantages).sum(), log_ratio.detach()

    def value_loss(values, old_values, returns, clip):
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        return 0.5 * torch.min((values - returns) ** 2, (clipped - returns) ** 2).sum()

    rejected(check_policy_loss, policy_loss)
    rejected(check_value_loss, value_loss)


@pytest.mark.parametrize("wrong", ["no clip", "upper side only"])
def test_mutant_half_a_clip(wrong):
    """A ratio that is not clipped, or only from above."""
    def policy_loss(logprobs, old_logprobs, advantages, clip):
        log_ratio = logprobs - old_logprobs
        ratio = log_ratio.exp()
        clipped = ratio if wrong == "no clip" else ratio.clamp(max=1 + clip)
        return -torch.min(ratio * advantages, clipped * advantages).sum(), log_ratio.detach()

    rejected(check_policy_loss, policy_loss)


def test_mutant_advantage_sign(tiny, monkeypatch):
    """The policy learns what was punished: seen in the loss, and in the weights."""
    original = rl.policy_loss

    def policy_loss(logprobs, old_logprobs, advantages, clip):
        return original(logprobs, old_logprobs, -advantages, clip)

    rejected(check_policy_loss, policy_loss)
    monkeypatch.setattr(rl, "policy_loss", policy_loss)
    rejected(check_update_direction, tiny)


def test_mutant_new_critic_returns(tiny):
    """R = A + V with the V of now: the critic chases itself and its error never shrinks."""
    def minibatch_loss(backbone, head, part, args, tokens, tries):
        with torch.no_grad():
            values = rl.score(backbone, head, part, args.temperature)[2]
        values = values.split([len(row["tries"]) for row in part])
        part = [row | {"returns": row["returns"] - row["values"] + new}
                for row, new in zip(part, values)]
        return rl.minibatch_loss(backbone, head, part, args, tokens, tries)

    rejected(check_returns_are_fixed, minibatch_loss, tiny)


@pytest.mark.parametrize("split", ["all", "test"])
def test_mutant_test_hands_leak(tiny, split):
    """Training episodes dealt from another split than the flags say."""
    def collect(backbone, args, update):
        return rl.collect(backbone, argparse.Namespace(**vars(args) | {"split": split}), update)

    rejected(check_no_leak, collect, tiny)
