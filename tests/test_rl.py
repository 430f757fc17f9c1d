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
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

import evaluate
import gp_env
import rl
import sft
import test_sft
from evaluate import Episode, Turn
from test_evaluate import Rigged, said
from test_sft import (assert_one_line, check_loss_mean, check_mask, check_shift, command, copy_at,
                      files_of, gradients, relative_gap, rows_of, same, shown)

# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------


def settings(**changes):
    """The flags of a small run: one epoch, one minibatch, no warm-up, unless said otherwise."""
    return argparse.Namespace(**vars(rl.flags([])) | {
        "episodes": 6, "max_new_tokens": 6, "epochs": 1, "minibatch": 64, "lr": 1e-3,
        "value_lr": 1e-3, "clip": 0.2, "value_clip": 1.0, "temperature": 0.6,
        "preset": "paper"} | changes)


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


def turn(prompt_ids, answer_ids, reward=0.0, new=False, picture=None):
    """One try, for tests that look at its tokens and reward alone."""
    return Turn(prompt_ids, answer_ids, [0.0] * len(answer_ids), "", reward, "", None, new, picture,
                True)


# ------------------------------------------------------------------------------------------------
# 1. Collect
# ------------------------------------------------------------------------------------------------


def check_conversations(conversations):
    """The example in the docstring of `conversations`, then two episodes of two conversations.

    A list, a tuple and a tensor are one and the same here: plain() makes lists of them.
    """
    p, a, end, m = 1, 2, 3, 4
    shown = {"pixels": torch.ones(2)}
    episode = Episode(None, "", [turn([p, p, p], [a, a, end], new=True), turn([m, m], [a, end])])
    forgetful = Episode(None, "", [turn([p], [a, end], new=True),
                                   turn([p, p], [end], new=True, picture=shown)])
    before = copy.deepcopy([episode, forgetful])
    row, = conversations([episode])
    assert plain(row["ids"]) == [p, p, p, a, a, end, m, m, a, end]
    assert plain(row["mask"]) == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert plain(row["value_at"]) == [2, 7]
    assert plain(row["tries"]) == [[0, 0], [0, 1]] and row["picture"] is None
    rows = conversations([episode, forgetful])
    assert [plain(row["tries"]) for row in rows] == [[[0, 0], [0, 1]], [[1, 0]], [[1, 1]]]
    assert [plain(rows[2][key]) for key in ("ids", "mask", "value_at")] == [
        [p, p, end], [0, 0, 1], [1]]
    assert rows[1]["picture"] is None and same(rows[2]["picture"], shown)
    for one, other in zip((episode, forgetful), before):        # the arguments are as they were
        assert same([vars(t) for t in one.turns], [vars(t) for t in other.turns])


def plain(thing):
    """Lists, tuples and tensors as lists."""
    if isinstance(thing, torch.Tensor):
        return thing.tolist()
    return [plain(x) if isinstance(x, (list, tuple, torch.Tensor)) else x for x in thing]


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
        r, v = torch.tensor(rewards), torch.tensor(values)
        advantages, returns = gae(r, v, terminated, not terminated, how.pop("gamma", 0.9),
                                  how.pop("lam", 0.95), **how)
        assert torch.allclose(returns, advantages + v, atol=1e-6)
        # the arguments are as they were
        assert torch.equal(r, torch.tensor(rewards)) and torch.equal(v, torch.tensor(values))
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
    advantages, returns = rl.gae([-1.0, 5.0], [1.0, 2.0], True, False, 0.9, 0.95)   # two lists
    assert advantages.tolist() == pytest.approx([2.365, 3.0])
    assert returns.tolist() == pytest.approx([3.365, 5.0])


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
    before = copy.deepcopy(rows)
    assert add_advantages(rows, episodes, 0.9, 0.95) in (True, None)
    assert all(same(row[key], old[key]) for row, old in zip(rows, before) for key in old)
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


def test_only_right_answers_count_with_advantage_right(tiny):
    """Wrong answers are pushed away after all, or an answer gets another try's advantage."""
    _, rows, episodes = fresh_batch(tiny, settings(), forget=True)
    assert rl.only_right(rows[::-1], episodes)
    assert not rl.only_right([], episodes)
    found = {t: a.item() for row in rows for t, a in zip(row["tries"], row["advantages"])}
    assert found == {(e, k): float(turn.verdict.correct)
                     for e, episode in enumerate(episodes) for k, turn in enumerate(episode.turns)}
    assert 0 < sum(found.values()) < len(found)


def test_normalised_by_hand():
    """Catches a mean that is kept, n - 1, a division by zero, an argument that is changed."""
    given = torch.tensor([1.0, 2.0, 6.0])               # mean 3, variance (4 + 1 + 9) / 3
    found = rl.normalised(given)
    assert torch.allclose(found, torch.tensor([-2.0, -1.0, 3.0]) / (14 / 3) ** 0.5)
    assert given.tolist() == [1.0, 2.0, 6.0]
    assert rl.normalised(torch.full((3,), 5.0)).eq(0).all()


def test_episodes_paid_alike_teach_the_policy_nothing(tiny):
    """Catches the critic's rounding, divided by its own spread, that moves the policy."""
    args = settings(minibatch=2, value_trunk=True)
    head, rows, episodes = fresh_batch(tiny, args, solve_ats=(6, 6, 6))
    assert len({v for row in rows for v in row["values"].tolist()}) > 1
    assert rl.add_advantages(rows, episodes, 0.9, 0.95) is False
    assert all(row["advantages"].eq(0).all() for row in rows)
    assert any(row["returns"].ne(0).any() for row in rows)
    optimizer = optimizer_of(tiny, head)
    for parameter in tiny.model.parameters():           # a momentum that would go on by itself
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    before, critic = (copy.deepcopy(part.state_dict()) for part in (tiny.model, head))
    rl.ppo_update(tiny, head, optimizer, rows, args, 0, learn_policy=False)
    assert same(tiny.model.state_dict(), before) and not same(head.state_dict(), critic)
    _, rows, episodes = fresh_batch(tiny, args, solve_ats=(6, 6, 1))
    assert rl.add_advantages(rows, episodes, 0.9, 0.95) is True
    # walks of unlike length, all right: every answer earned the same
    for turn in (turn for episode in episodes for turn in episode.turns):
        turn.reward = 1.0
    assert len({len(episode.turns) for episode in episodes}) == 2
    assert rl.add_advantages(rows, episodes, 0.9, 0.95) is False


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
    for start in (*old, torch.tensor(-150.0)):      # exp(-150) is 0: no ratio of probabilities
        for ratio, advantage, value, slope in CLIPPED:
            new = (start[None] + math.log(ratio)).requires_grad_()
            loss, log_ratio = policy_loss(new, start[None], torch.tensor([advantage]), 0.2)
            loss.backward()
            assert loss.item() == pytest.approx(-value, abs=1e-4), (ratio, advantage)
            assert new.grad.item() == pytest.approx(-slope, abs=1e-4), (ratio, advantage)
            assert log_ratio.item() == pytest.approx(math.log(ratio), abs=2e-5)
            assert not log_ratio.requires_grad
    ratios, advantages, values, _ = (torch.tensor(x) for x in zip(*CLIPPED))
    loss, _ = policy_loss(old + ratios.log(), old, advantages, 0.2)
    assert loss.item() == pytest.approx(-values.sum().item(), abs=1e-4)


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
        assert rl.answer_lengths(row) == [len(episodes[e].turns[k].answer_ids)
                                           for e, k in row["tries"]]


def check_minibatch_loss(minibatch_loss, backbone, ratio="token"):
    """The whole loss, written out over answers of unequal length, and cut in micro-batches."""
    backbone.end_ids = backbone.end_ids + list(range(60, 120))
    args = settings(max_new_tokens=8, ratio=ratio)
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
    expected = policy + 0.5 * critic / tries

    parts, wholes = {}, {}
    for micro_batch in (64, 1, 2):
        backbone.model.zero_grad(set_to_none=True)
        sums = torch.zeros(4)
        for part in sft.by_length(rows, micro_batch):
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


def test_approx_kl_by_hand(tiny):
    """Catches another estimator than ratio - 1 - log ratio, or one that is not 0 at first."""
    args = settings()
    head, rows, _ = fresh_batch(tiny, args)
    assert abs(rl.minibatch_loss(tiny, head, rows, args, *totals(rows))[1]["approx_kl"]) < 1e-6
    move_policy(tiny)
    found = rl.minibatch_loss(tiny, head, rows, args, *totals(rows))[1]["approx_kl"]
    with torch.no_grad():
        new = torch.cat([rl.score(tiny, head, [row], 0.6)[0] for row in rows])
    gap = new - torch.cat([row["logprobs"] for row in rows])
    assert found == pytest.approx((gap.exp() - 1 - gap).mean().item(), rel=1e-3) and found > 0


def test_explained_variance_by_hand():
    """Catches 1 - Var(V)/Var(R) and the two arguments swapped."""
    returns = torch.tensor([0.0, 2.0, 4.0])                     # variance 4
    assert rl.explained_variance(returns - 7, returns) == pytest.approx(1)
    assert rl.explained_variance(torch.ones(3), returns) == pytest.approx(0)
    assert rl.explained_variance(torch.tensor([0.0, 1.0, 2.0]), returns) == pytest.approx(0.75)
    assert rl.explained_variance(-returns, returns) == pytest.approx(-3)
    assert rl.explained_variance(returns, torch.full((3,), -4.0)) is None


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


def test_learning_rates_by_hand(tiny, monkeypatch):
    """Catches a warm-up that begins again with every update, and rates a resume would not find."""
    monkeypatch.setattr(rl, "WARMUP", 8)
    args = settings(minibatch=2, preset=None, lr=0.008, value_lr=0.08, updates=4)
    head, rows, _ = fresh_batch(tiny, args)         # 5 rows: 3 optimiser steps an update
    optimizer = optimizer_of(tiny, head)
    for update, share in ((0, 3 / 8),
                          (1, 6 / 8 * (1 + math.sqrt(0.5)) / 2),        # cosine, a quarter done
                          (2, 1 / 2),                                   # warm, and half done
                          (0, 3 / 8)):
        rl.ppo_update(tiny, head, optimizer, rows, args, update)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.008 * share, 0.08 * share])


def test_rate_scale_by_hand():
    """Catches a first step at rate 0, and a warm-up that counts updates."""
    assert rl.rate_scale(0, 4, 0, 8) == pytest.approx(1 / 8)
    assert rl.rate_scale(0, 4, 20, 8) == 1 and rl.rate_scale(0, 4, 0, 1) == 1
    assert rl.rate_scale(2, 4, 3, 8) == pytest.approx(1 / 2 * 4 / 8)
    assert rl.rate_scale(4, 4, 99, 8) == pytest.approx(0)


def test_gradient_that_is_not_finite_is_not_applied(tiny):
    """Catches one NaN, of policy or critic, that turns all weights into NaN, silently."""
    args = settings(minibatch=64)
    head, rows, _ = fresh_batch(tiny, args)
    before = copy.deepcopy(tiny.model.state_dict())
    for key, wrong in (("advantages", math.inf), ("returns", math.nan)):
        spoilt = [row | {key: row[key] * wrong} for row in rows]
        with pytest.raises(sft.Problem, match="not finite"):
            rl.ppo_update(tiny, head, optimizer_of(tiny, head), spoilt, args, 0)
        assert same(before, tiny.model.state_dict())


# ------------------------------------------------------------------------------------------------
# 5. The run
# ------------------------------------------------------------------------------------------------


def test_self_check_passes_and_says_what_it_saw(tiny):
    """Catches a self-check that fails on a good batch."""
    _, rows, episodes = fresh_batch(tiny, settings())
    assert rl.complaints(rows, episodes, tiny, "train", 0.6) == []
    rows[0]["logprobs"][0] += 3e-4          # rounding, once in many tokens
    assert rl.complaints(rows, episodes, tiny, "train", 0.6) == []
    told = rl.self_check(rows, episodes, tiny, "train")
    assert f"{totals(rows)[0]} tokens" in told and "no held-out" in told


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
        row["logprobs"] = row["logprobs"] + 3e-3
    assert rl.self_check(rows, episodes, tiny, "train", 0.05)
    with pytest.raises(sft.Problem, match="temperature"):
        rl.self_check(rows, episodes, tiny, "train", 1.0)


def test_self_check_finds_a_held_out_hand(tiny):
    """Catches test hands that leak into training."""
    _, rows, episodes = fresh_batch(tiny, settings())
    stranger = gp_env.GeneralPoints(split="test")
    stranger.reset(0)
    episodes[2].env.hand = stranger.hand
    with pytest.raises(sft.Problem, match="held-out"):
        rl.self_check(rows, episodes, tiny, "train")
    rl.score_all(tiny, rl.build_value_head(32, 0), rows, 0.9, 64)
    found = rl.complaints(rows, episodes, tiny, "train", 0.6)
    assert len(found) == 2 and "temperature" in found[0] and "held-out" in found[1]


def test_self_check_claims_only_what_it_checked(tiny):
    """Catches "no held-out hand" in the log of a run that trains on all of them."""
    _, rows, episodes = fresh_batch(tiny, settings(), solve_ats=[1] * 16, split="all")
    assert {gp_env.split_of(episode.env.hand.cards) for episode in episodes} != {"train"}
    assert "no held-out hand" not in rl.self_check(rows, episodes, tiny, "all")


# ------------------------------------------------------------------------------------------------
# 5. and 7. The run
# ------------------------------------------------------------------------------------------------

FLAGS = ["--updates", 3, "--episodes", 4, "--tries", 3, "--max-new-tokens", 3, "--epochs", 2,
         "--minibatch", 2, "--eval-hands", 4, "--lr", 1e-3]


@pytest.fixture
def rigged(model, tmp_path, monkeypatch):
    """A folder to work in, with the tiny model in "model", where games end as Rigged ones do."""
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gp_env, "GeneralPoints", Rigged)
    monkeypatch.setattr(rl, "EVAL_EVERY", 2)
    return tmp_path


def train(monkeypatch, capsys, out, *flags):
    """rl.py on the command line, which must succeed. Returns what it printed."""
    code, printed, error = shown(monkeypatch, capsys, rl, "--model", "model", "--init", "model",
                                 *FLAGS, "--out", out, *flags)
    assert code == 0, error
    return printed


def assert_same_run(one, other):
    """Two finished runs: equal metrics, evaluations, weights and state, to the last bit."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert rows_of(one / name) == rows_of(other / name), name
    assert [step for step, _ in sft.checkpoints(one)] == [2, 3]     # the newest, and one to spare
    (step, path), (step2, path2) = sft.checkpoints(one)[-1], sft.checkpoints(other)[-1]
    assert step == step2 == 3
    assert same(sft.load_state(path), sft.load_state(path2))
    assert (path / "model.safetensors").read_bytes() == (path2 / "model.safetensors").read_bytes()


# One moment for each state of the disk that a kill can find. An evaluation asks twice: seen hands,
# then those held out.
KILLS = {"in the first evaluation": (rl, "evaluate", 1, False),
         "before the first checkpoint": (rl, "save_checkpoint", 1, False),
         "in the update": (rl, "ppo_update", 2, False),
         "in a later evaluation": (rl, "evaluate", 4, False),
         "in the middle of a checkpoint": (torch, "save", 2, False),
         "just after a checkpoint": (rl, "save_checkpoint", 2, True),
         "in the last evaluation": (rl, "evaluate", 6, False)}


def test_killed_and_resumed_is_bit_for_bit_the_same(rigged, monkeypatch, capsys):
    """Catches state that a resume forgets: optimizer, critic, counts, seeds, rows of metrics."""
    with monkeypatch.context() as patch:
        for moment, kill in KILLS.items():
            copy_at(patch, "unbroken", moment, *kill)
        train(patch, capsys, "unbroken")
    whole = rows_of(rigged / "unbroken" / "metrics.jsonl")
    assert [row["step"] for row in whole] == [1, 2, 3]
    assert 0 < sum(row["success"] for row in whole) < 3     # some games are won and some are not
    measured = rows_of(rigged / "unbroken" / "eval.jsonl")
    assert [(row["step"], row["hands"]) for row in measured] == [(0, 4), (2, 1), (3, 4)]
    for moment in KILLS:
        # the start may be spelt in another way
        train(monkeypatch, capsys, moment, "--resume", "--init", f"{rigged}/model/")
        assert_same_run(rigged / "unbroken", rigged / moment)


TWO_RUNS = """
import os, sys
import rl, sft, test_sft
rl.EVAL_EVERY = 2
if os.fork():
    test_sft.stop_at(rl, "evaluate", 4)
    sys.exit(sft.guarded(rl.main))
test_sft.stop_at(sft.Metrics, "write", 2, True)
test_sft.short_run(sft.load_backbone("model"), "sft")
"""


def test_sigkill_and_resume_in_processes_of_their_own(model, tmp_path, monkeypatch, capsys):
    """Catches what only a real kill leaves behind, of RL and of SFT: no exception, no clean-up,
    buffers lost, a run folder that is still taken; and two runs that write into one folder."""
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rl, "EVAL_EVERY", 2)
    here = pathlib.Path(__file__).parent
    flags = ["--model", "model", "--init", "model", *map(str, FLAGS), "--out", "killed"]
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_RUNS, *flags, "--threads", "1"], stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"},
        start_new_session=True)
    try:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1]), "RL came to its end"
        late = time.monotonic() + 60
        while len(sft.read_lines("sft/metrics.jsonl")) < 2:
            assert time.monotonic() < late, "SFT does not get on"
            time.sleep(0.01)
        assert_one_line(*command(monkeypatch, capsys, rl, *flags, "--resume"), "in use")
    finally:
        os.killpg(process.pid, signal.SIGKILL)          # nothing in them can catch it
    assert process.wait() == -signal.SIGKILL
    for run, steps in (("killed", [1]), ("sft", [2])):
        assert [step for step, _ in sft.checkpoints(run)] == steps
    train(monkeypatch, capsys, "killed", "--resume")
    train(monkeypatch, capsys, "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    for folder, resume in (("sft", True), ("whole-sft", False)):
        test_sft.short_run(sft.load_backbone(model), folder, resume=resume)
    test_sft.assert_same_run(tmp_path / "whole-sft", tmp_path / "sft")


def test_finished_run_can_be_resumed_again(rigged, monkeypatch, capsys):
    """Catches a resume of a complete run that trains on, or loses its metrics; a --resume where
    nothing is that is refused, though Ctrl-C advises it; and a next command of another task."""
    printed = train(monkeypatch, capsys, "a run", "--updates", 1, "--resume")
    again = evaluate.flags(shlex.split(printed.splitlines()[-1])[2:])
    assert (again.model, again.max_new_tokens) == ("a run/step-000001", 3)
    before = files_of(rigged / "a run" / "step-000001")
    rows = rows_of(rigged / "a run" / "metrics.jsonl")
    train(monkeypatch, capsys, "a run", "--updates", 1, "--resume")
    assert files_of(rigged / "a run" / "step-000001") == before
    assert rows_of(rigged / "a run" / "metrics.jsonl") == rows
    assert_one_line(*command(monkeypatch, capsys, rl, "--model", "model", "--init", "model", *FLAGS,
                             "--out", "a run"), "--resume")
    # a --max-new-tokens that cuts everything off is told in numbers, in every update and cell
    assert rows[0]["cut"] > 0.5 and printed.count("CUT OFF") > 3
    assert all(cell["cut"] > 0.5 for row in rows_of(rigged / "a run" / "eval.jsonl")
               for cell in row["cells"].values())


def test_an_update_with_nothing_to_learn_takes_no_step(rigged, monkeypatch, capsys):
    """Catches a policy that moves though all rewards are alike, and NaN in the metrics, which other
    programs cannot read; --split all, where nothing may be called held out."""
    monkeypatch.setattr(gp_env, "GeneralPoints", lambda **how: Rigged(6, **how))
    printed = train(monkeypatch, capsys, "run", "--updates", 2, "--tries", 1, "--split", "all")
    assert printed.count("nothing to learn") == 2
    row = dict.fromkeys(("success", "per_step", "reward", "approx_kl", "clipfrac",
                         "seconds_collect", "seconds_update"), 0.0)
    row |= {"step": 1, "explained_variance": None}
    assert "CUT OFF 50.0%" in rl.one_line(row | {"cut": 0.5}, can_learn=False)
    for name in ("metrics.jsonl", "eval.jsonl"):
        for line in (rigged / "run" / name).read_text().splitlines():
            assert json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
    assert all(row["explained_variance"] is None and row["approx_kl"] == 0
               for row in rows_of(rigged / "run" / "metrics.jsonl"))
    assert {name for row in rows_of(rigged / "run" / "eval.jsonl") for name in row["cells"]} == {
        "all/id"}
    assert same(sft.load_backbone("run/step-000002").model.state_dict(),
                sft.load_backbone("model").model.state_dict())


def test_damaged_checkpoint_is_refused(rigged, monkeypatch, capsys):
    """Catches a resume that silently starts anew when its state cannot be read, or a traceback."""
    train(monkeypatch, capsys, "run", "--updates", 1)
    path = rigged / "run" / "step-000001" / "state.pt"
    whole, state = path.read_bytes(), sft.load_state(path.parent)
    for damage in (None, [1, 2], {"tokens": 1}, state | {"head": {}},
                   state | {"optimizer": {"state": {}, "param_groups": []}}):
        if damage is None:
            path.write_bytes(whole[:1000])
        else:
            torch.save(damage, path)
        assert_one_line(*command(monkeypatch, capsys, rl, "--model", "model", "--init", "model",
                                 *FLAGS, "--updates", 1, "--out", "run", "--resume"), "state.pt")


QUICK = ["--updates", 1, "--episodes", 2, "--tries", 2, "--max-new-tokens", 2, "--eval-hands", 1]


def test_start_is_made_once_and_counted(rigged, monkeypatch, capsys):
    """Catches a start that is trained again for every run, or used though the model is another,
    FLOPs that forget it, and a start that is no point of the longer run of SFT."""
    monkeypatch.setattr(sft, "start_step", lambda args: 1)
    monkeypatch.setitem(sft.DEFAULT_MODEL, "gp-l", "model")

    def go(*flags):
        code, error = command(monkeypatch, capsys, rl, *QUICK, *flags)
        assert code == 0, error
        return sorted((rigged / "runs").glob("start-gp-l-s0-*/step-000001"))

    start, = go("--out", "one")
    made = start.stat().st_mtime_ns
    tokens = sft.load_state(start)["tokens"]
    first = rows_of(rigged / "one" / "eval.jsonl")[0]
    size = sft.task_parameters(sft.load_backbone(start).model)
    assert tokens > 0 and first["flops"] == first["flops_spent"] == 6 * size * tokens
    assert go("--out", "two", "--lr", 1e-5) == [start] and start.stat().st_mtime_ns == made
    whole = sft.run_sft(sft.flags(["--steps", "1300"]), "sft", 2, sft.load_backbone("model"))
    assert whole.name == "step-000002"
    assert same(sft.load_backbone(start).model.state_dict(),
                sft.load_backbone("sft/step-000001").model.state_dict())
    # another model under the same name needs another start
    with torch.no_grad():
        other = sft.load_backbone("model")
        other.model.get_output_embeddings().weight[0] += 1
    sft.save_checkpoint("model", other)
    assert len(go("--out", "three")) == 2 and start.stat().st_mtime_ns == made
    # two runs that make the same start at once: the one that comes second uses the first one's
    taught = sft.run_sft

    def overtaken(wanted, aside, step, backbone):
        taught(wanted, aside, step, backbone)
        shutil.copytree(aside, str(aside).rpartition("-")[0])

    monkeypatch.setattr(sft, "run_sft", overtaken)
    path = rl.make_start(rl.flags([*map(str, QUICK), "--seed", "1"]))
    assert sft.load_state(path)["tokens"] > 0
    # evaluate.py --model START plays what it was trained on
    assert json.loads((path.parent / "args.json").read_text())["task"] == "gp-l"
    # the folder is there, its step is not: the new one is used where it was made
    shutil.rmtree(path)
    monkeypatch.setattr(sft, "run_sft", taught)
    again = rl.make_start(rl.flags([*map(str, QUICK), "--seed", "1"]))
    assert again != path and sft.load_state(again)["tokens"] > 0


def table_of(printed):
    """The lines of --inspect that show a token."""
    lines = printed.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("pos  token"))
    end = next(i for i, line in enumerate(lines) if line.startswith("try  reward"))
    return lines[at + 1:end]


def tries_of(printed):
    """The lines of --inspect that show a try: [[try, r, V, delta, A, R, normalised A], ...]."""
    lines = printed.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("try  reward"))
    return [[float(word) for word in line.split()] for line in lines[at + 1:]]


def values_of(printed):
    """V before each try that --inspect shows."""
    return [numbers[2] for numbers in tries_of(printed)]


def test_inspect_prints_a_table_and_learns_nothing(rigged, monkeypatch, capsys):
    """Catches an --inspect that claims a run folder, columns that do not belong together, and a
    critic that is a new one though the checkpoint has its own."""
    train(monkeypatch, capsys, "run", "--updates", 1)
    found = {}
    for init in ("model", "run/step-000001"):
        code, printed, error = shown(monkeypatch, capsys, rl, "--model", "model", "--init", init,
                                     *FLAGS, "--inspect", "--out", "none")
        assert code == 0, error
        table = table_of(printed)
        assert [int(line[:3]) for line in table] == list(range(len(table)))
        assert "<|user|>" in table[0] and not (rigged / "none").exists()
        found[init] = values_of(printed)
        assert found[init]
    assert set(found["model"]) == {0.0} != set(found["run/step-000001"])


def test_inspect_shows_what_gae_makes_of_each_try(rigged, monkeypatch, capsys):
    """Catches V of another try, delta or A of the normalised advantages, a last try that looks
    beyond its end; and tries of another episode than the conversation's."""
    train(monkeypatch, capsys, "run", "--updates", 1)
    gamma, lam, episodes, collect = 0.5, 0.25, [], rl.collect
    monkeypatch.setattr(rl, "collect", lambda *args: (
        episodes.extend(collect(*args)), episodes)[1])
    code, printed, error = shown(monkeypatch, capsys, rl, "--model", "model", "--init",
                                 "run/step-000001", *FLAGS, "--inspect", "--gamma", gamma, "--lam",
                                 lam)
    assert code == 0, error
    tries = tries_of(printed)
    assert len(tries) > 2 and [row[0] for row in tries] == list(range(len(tries)))
    said, = (e for e in episodes if [t.reward for t in e.turns] == [row[1] for row in tries])
    assert table_of(printed)[len(said.turns[0].prompt_ids) - 1].endswith("V is read")
    following = tries[1:] + [[0.0] * 7]
    for (_, reward, value, delta, advantage, target, _), after in zip(tries, following):
        assert delta == pytest.approx(reward + gamma * after[2] - value, abs=0.02)
        assert advantage == pytest.approx(delta + gamma * lam * after[4], abs=0.02)
        assert target == pytest.approx(advantage + value, abs=0.02)
    every = torch.tensor([row[4] for row in tries])
    scale, shift = (tries[0][6] - tries[-1][6]) / (tries[0][4] - tries[-1][4]), tries[0][6]
    assert torch.allclose((every - every[0]) * scale + shift,
                          torch.tensor([row[6] for row in tries]), atol=0.05)


def test_inspect_of_a_run_shows_its_last_checkpoint(rigged, monkeypatch, capsys):
    """Catches --resume ignored without a word: V is that of a new critic, 0 everywhere."""
    train(monkeypatch, capsys, "run", "--updates", 1)
    code, printed, error = shown(monkeypatch, capsys, rl, "--model", "model", "--init", "model",
                                 *FLAGS, "--updates", 1, "--inspect", "--resume", "--out", "run")
    if code == 0:
        assert set(values_of(printed)) != {0.0}
    else:
        assert_one_line(code, error, "--resume")


def test_a_model_that_is_too_short_is_refused_before_anything_is_trained(tiny, tmp_path,
                                                                        monkeypatch, capsys):
    """Catches minutes of SFT before it is found that the conversations of RL do not fit."""
    tiny.model.config.get_text_config().max_position_embeddings = 300
    sft.save_checkpoint(tmp_path / "model", tiny)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "train", lambda *_, **__: pytest.fail("trained first"))
    assert_one_line(*command(monkeypatch, capsys, rl, "--model", "model", "--max-new-tokens", 64),
                    "tokens")


@pytest.mark.parametrize("flags, words", [
    (["--init", "nowhere"], ["nowhere"]),
    (["--init", "none", "--model", "nowhere"], ["none"]),
    (["--model", "nowhere", "--init", ""], ["--init"]),
    (["--revise", "0.5"], ["--init", "--revise"]),
    (["--temperature", "0"], ["--temperature"]),
    (["--temperature", "nan"], ["--temperature"]),
    (["--lr", "nan"], ["--lr"]),
    (["--lr", "inf"], ["--lr"]),
    (["--value-lr", "nan"], ["--value-lr"]),
    (["--episodes", "0"], ["--episodes"]),
    (["--updates", "0"], ["--updates"]),
    (["--tries", "0"], ["--tries"]),
    (["--minibatch", "0"], ["--minibatch"]),
    (["--epochs", "0"], ["--epochs"]),
    (["--eval-hands", "0"], ["--eval-hands"]),
    (["--gamma", "-0.1"], ["--gamma"]),
    (["--seed", str(2 ** 63)], ["--seed"]),
    (["--out", "model/config.json"], ["config.json"]),
])
def test_bad_flags_end_in_one_line(rigged, monkeypatch, capsys, flags, words):
    """Catches tracebacks, flags that contradict each other, and values that do nothing."""
    code, error = command(monkeypatch, capsys, rl, "--model", "model", "--init", "model", *QUICK,
                          *flags)
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
        row = sft.encode(backbone, conversation)
        return row | {"mask": moved(row["mask"])}

    def conversations(episodes):
        return [row | {"mask": moved(row["mask"])} for row in rl.conversations(episodes)]

    rejected(check_mask, encode, tiny)
    rejected(check_conversations, conversations)


def test_mutant_end_token_not_learnt(tiny):
    """A policy that is never taught to stop."""
    def encode(backbone, conversation):
        row = sft.encode(backbone, conversation)
        return row | {"mask": [int(m and token not in backbone.end_ids)
                               for token, m in zip(row["ids"], row["mask"])]}

    rejected(check_mask, encode, tiny)


def test_mutant_mean_over_padding(tiny):
    """The loss divided by all positions of the padded batch, in SFT and in PPO."""
    def sft_loss(backbone, rows, micro_batch, backward=True):
        loss, fed = sft.sft_loss(backbone, rows, micro_batch, backward)
        answers = sum(sum(row["mask"]) for row in rows)
        return loss * answers / (len(rows) * max(len(row["ids"]) for row in rows)), fed

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


@pytest.mark.parametrize("wrong", ["no clip", "upper side only", "graph kept", "exp over exp"])
def test_mutant_half_a_clip(wrong):
    """A ratio that is not clipped, or only from above; one that keeps its graph; one of
    probabilities, which are 0 for a long answer."""
    def policy_loss(logprobs, old_logprobs, advantages, clip):
        log_ratio = logprobs - old_logprobs
        ratio = log_ratio.exp()
        if wrong == "exp over exp":
            ratio = logprobs.exp() / old_logprobs.exp()
        clipped = {"no clip": ratio, "upper side only": ratio.clamp(max=1 + clip)}.get(
            wrong, ratio.clamp(1 - clip, 1 + clip))
        return (-torch.min(ratio * advantages, clipped * advantages).sum(),
                log_ratio if wrong == "graph kept" else log_ratio.detach())

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


@pytest.mark.parametrize("wrong", ["blind", "the episode grows"])
def test_mutant_conversations_that_share_or_drop(wrong):
    """A policy that is scored without its picture; rows that are the lists of the episode."""
    def conversations(episodes):
        if wrong == "blind":
            return [row | {"picture": None} for row in rl.conversations(episodes)]
        rows = rl.conversations(episodes)
        for episode in episodes:
            for turn in episode.turns:
                turn.prompt_ids += turn.answer_ids
        return rows

    rejected(check_conversations, conversations)


def test_mutant_arguments_that_change():
    """What follows is added to the last reward, in place."""
    def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0):
        if truncated:
            rewards[-1] += gamma * after
        return rl.gae(rewards, values, terminated, truncated, gamma, lam)

    rejected(check_gae, gae)


def test_compute_by_hand(monkeypatch):
    """Eq. 6 or 7 with a wrong factor, or walks charged as cards are."""
    counts = {"init": 10, "trained": 20, "sampled": 5}
    monkeypatch.setattr(rl, "task_parameters", lambda model, pictures: 6)           # N
    for task, again in (("gp-l", 6), ("virl-l", 5.1)):
        policy = types.SimpleNamespace(args=argparse.Namespace(task=task), counts=counts,
                                       backbone=types.SimpleNamespace(model=None))
        found = rl.Policy.compute(policy)
        assert found["flops"] == 6 * 6 * 30 + 2 * 6 * again * 20
        assert found["flops_spent"] == 6 * 6 * 30 + 2 * 6 * 2 * 5
