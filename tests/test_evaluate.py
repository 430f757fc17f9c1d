"""Tests of evaluate.py: playing in a batch with a cache, counting, intervals, the command line.

The heart of it: the sampler reads a conversation in pieces, beside others; the update reads it in
one go. Both must find the same log-probabilities, or PPO learns from noise.

    python -m pytest tests/test_evaluate.py
"""

import copy
import doctest
import gc
import itertools
import json
import math
import os
import random
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import gp_env
import sft
from test_sft import assert_one_line, command, let_go, shown
from verifier import verify_gp

# ------------------------------------------------------------------------------------------------
# A game whose end is known
# ------------------------------------------------------------------------------------------------

WRONG = ("no idea", "formula: 1+", "formula: 1*1", '"formula": "2+3+4+5+6+7=24"')


class Rigged(gp_env.GeneralPoints):
    """GeneralPoints that hears wrong answers until try `solve_at`, then the right one.

    Whatever a random model says, its episodes then differ in length, reward and messages, as those
    of a trained one do. solve_at: 1 to 5, 6 for never, None for "the hand decides".
    forget: every try starts a new conversation, as in games that show a new picture each time.
    """

    def __init__(self, solve_at=None, forget=False, **how):
        super().__init__(**how)
        self.solve_at, self.forget = solve_at, forget

    def step(self, text):
        solve_at = self.solve_at or 1 + sum(self.hand.numbers) % 6
        heard = WRONG[self.used % len(WRONG)]
        if self.used + 1 == solve_at:
            formula = gp_env.solutions(self.hand.numbers)[0]
            heard = gp_env.answer(self.hand, self.hand.numbers, formula)
        observation, *more = super().step(heard)
        if self.forget:
            observation = {"text": f"{observation['text']} {gp_env.prompt(self.hand)}",
                           "image": self.image, "new_conversation": True}
        return observation, *more


def play(backbone, solve_ats=(1, 3, 6, 2, 6), seed=3, temperature=0.6, longest=6, **how):
    """Episodes of rigged games, one for each entry of solve_ats."""
    envs = [Rigged(solve_at, **how) for solve_at in solve_ats]
    return evaluate.play(backbone, envs, range(len(envs)), temperature, longest,
                         torch.Generator().manual_seed(seed))


def said(episodes):
    """The sampled tokens: episodes x tries x tokens."""
    return [[turn.answer_ids for turn in episode.turns] for episode in episodes]


@torch.no_grad()
def assert_sampler_agrees(backbone, episodes, temperature):
    """Every log-probability that the sampler saw equals the one of a single, unpadded pass."""
    for episode in episodes:
        ids, mask, seen, worst = [], [], [], 0.0
        for turn, following in zip(episode.turns, episode.turns[1:] + [None]):
            ids += turn.prompt_ids + turn.answer_ids
            mask += [0] * len(turn.prompt_ids) + [1] * len(turn.answer_ids)
            seen += turn.logprobs
            if following is None or following.new_conversation:
                row = torch.tensor([ids])
                hidden = sft.trunk(backbone, row)
                found, _ = sft.token_logprobs(backbone, hidden, row, torch.tensor([mask]),
                                              temperature)
                worst = max(worst, (found - torch.tensor(seen)).abs().max().item())
                ids, mask, seen = [], [], []
        assert worst < 1e-4, worst


# ------------------------------------------------------------------------------------------------
# 2. Playing
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"forget": True}, {"fresh": True}])
def test_sampler_and_update_agree_on_logprobs(tiny, how):
    """Catches wrong positions after a gap, slots of a neighbour, an end token that is missing."""
    tiny.end_ids += range(60, 120)      # many ways to end: answers of unequal length
    tiny.banned = [10, 200]
    for temperature in (0.6, 1.0):
        episodes = play(tiny, temperature=temperature, longest=8, **how)
        assert_sampler_agrees(tiny, episodes, temperature)
        answers = [answer for episode in said(episodes) for answer in episode]
        assert len(set(map(len, answers))) > 3, "the answers do not differ: this tests too little"
        assert not {10, 200} & {token for answer in answers for token in answer}


def test_a_batch_that_takes_minutes_is_heard_of(tiny, monkeypatch, capsys):
    """Catches a log file without a word until a batch of a large model has been played."""
    clock = itertools.count(61, 61)          # a minute passes whenever somebody asks
    monkeypatch.setattr(sft, "time", SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr(sft, "spoken", [0])
    play(tiny, (1,), temperature=0, longest=3)
    assert capsys.readouterr().err == "sampling token 1 of 3\nsampling token 2 of 3\n"


def test_batch_changes_no_greedy_token(tiny):
    """Catches episodes that see each other, and padding that shifts positions."""
    solve_ats = (1, 3, 6, 2, 6)
    together = play(tiny, solve_ats, temperature=0)
    for i, solve_at in enumerate(solve_ats):
        alone = evaluate.play(tiny, [Rigged(solve_at)], [i], 0.0, 6)
        assert said(alone) == said(together[i:i + 1])
        assert alone[0].prompt == together[i].prompt


def test_episodes_end_as_their_games_do(tiny):
    """Catches answers given to the wrong game when finished ones leave the batch."""
    solve_ats = (1, 3, 6, 2, 6)
    for i, (solve_at, episode) in enumerate(zip(solve_ats, play(tiny, solve_ats))):
        assert len(episode.turns) == min(solve_at, gp_env.TRIES)
        assert (episode.terminated, episode.truncated) == (solve_at < 6, solve_at == 6)
        assert [turn.new_conversation for turn in episode.turns][:2] == [True, False][:solve_at]
        replay = Rigged(solve_at)
        assert replay.reset(i)[0]["text"] == episode.prompt
        for turn in episode.turns:
            observation, reward, *_ = replay.step(turn.text)
            assert (turn.message, turn.reward) == (observation["text"], reward)


def test_conversation_is_closed_for_the_model(tiny):
    """Catches a cut answer that runs into the next message, and one that is closed twice."""
    tiny.end_ids += range(60, 120)
    kinds = set()
    for episode in play(tiny, longest=5):
        for before, turn in zip(episode.turns, episode.turns[1:]):
            ended = before.answer_ids[-1] in tiny.end_ids
            kinds.add(ended)
            told = sft.user_ids(tiny, before.message, first=False)
            assert turn.prompt_ids == ([] if ended else tiny.end_ids[:1]) + told
            assert not set(before.answer_ids[:-1]) & set(tiny.end_ids)
            assert len(before.answer_ids) <= 5 and (ended or len(before.answer_ids) == 5)
    assert kinds == {True, False}, "the seed must give both kinds"


def test_the_verifier_reads_what_was_sampled(tiny):
    """Catches special tokens that vanish before they are judged, and an end that is judged."""
    tiny.end_ids += range(60, 120)
    heard, step = [], Rigged.step
    envs = [Rigged(6) for _ in range(4)]
    for env in envs:
        env.step = lambda text, env=env: (heard.append(text), step(env, text))[1]
    episodes = evaluate.play(tiny, envs, range(4), 2.0, 6, torch.Generator().manual_seed(0))
    turns = [turn for episode in episodes for turn in episode.turns]
    assert sorted(heard) == sorted(turn.text for turn in turns)
    for turn in turns:
        assert turn.ended == (turn.answer_ids[-1] in tiny.end_ids)
        kept = turn.answer_ids[:-1] if turn.ended else turn.answer_ids
        assert turn.text == tiny.tokenizer.decode(kept, skip_special_tokens=False)
    assert evaluate.cut(episodes) == 1 - sum(turn.ended for turn in turns) / len(turns)


def test_a_special_token_inside_a_formula_is_not_paid(tiny, monkeypatch):
    """Catches five tokens that nobody sees between the digits of a right answer."""
    env = gp_env.GeneralPoints()
    hand = env.reset(0)[1]["hand"]
    right = gp_env.answer(hand, hand.numbers, gp_env.solutions(hand.numbers)[0])
    at = right.index("formula") + 11
    for text, paid in ((right, True), (right[:at] + "<|user|>" * 5 + right[at:], False)):
        said = sft.answer_ids(tiny, text)
        monkeypatch.setattr(evaluate, "sample_answers",
                            lambda *_, said=said: [(said, [0.0] * len(said))])
        episode, = evaluate.play(tiny, [gp_env.GeneralPoints(tries=1)], [0], 0.6, 99)
        assert episode.terminated == paid and episode.turns[0].text == text


def test_a_fresh_try_knows_of_no_other(tiny):
    """Catches a message, or an answer, of the try before in what a fresh try is shown."""
    for episode in play(tiny, (3, 6), fresh=True):
        first = episode.turns[0]
        for turn in episode.turns:
            assert turn.prompt_ids == first.prompt_ids and turn.new_conversation
        for turn in episode.turns[:-1]:
            assert turn.message == episode.prompt
    chatty = play(tiny, (3, 6))
    assert not any(turn.new_conversation for episode in chatty for turn in episode.turns[1:])


def test_sampling_follows_generator_and_temperature(tiny):
    """Catches draws from torch's global generator, and a temperature that is not applied."""
    first = said(play(tiny, seed=1))
    torch.manual_seed(99)
    assert said(play(tiny, seed=1)) == first != said(play(tiny, seed=2))
    greedy = play(tiny, temperature=0)
    # near 0 the likeliest token takes all, unless two logits lie within 1e-5 of each other
    assert said(play(tiny, temperature=1e-6)) == said(greedy)
    for episode in greedy:
        assert min(p for turn in episode.turns for p in turn.logprobs) > -np.log(455)


def test_sampled_tokens_have_the_stated_probability(tiny):
    """Catches a sampler that draws from one distribution and reports the log p of another."""
    # every game is dealt the same hand, so that all 600 answers follow ONE prompt
    episodes = evaluate.play(tiny, [Rigged(1) for _ in range(600)], [0] * 600, 0.5, 1,
                             torch.Generator().manual_seed(0))
    drawn = [turn.answer_ids[0] for episode in episodes for turn in episode.turns]
    share = {token: drawn.count(token) / len(drawn) for token in set(drawn)}
    stated = {turn.answer_ids[0]: np.exp(turn.logprobs[0])
              for episode in episodes for turn in episode.turns}
    token = max(stated, key=stated.get)
    spread = (stated[token] * (1 - stated[token]) / len(drawn)) ** 0.5
    assert abs(share[token] - stated[token]) < 4 * spread


def test_sampling_leaves_a_checkpointed_model_in_eval_mode(tiny):
    """Catches sampling in train mode: with gradient checkpointing the cache is lost silently."""
    expected = said(play(tiny))
    tiny.model.gradient_checkpointing_enable()
    tiny.model.train()
    assert said(play(tiny)) == expected
    assert not tiny.model.training


# ------------------------------------------------------------------------------------------------
# 3. The sampler
# ------------------------------------------------------------------------------------------------


def test_slots_by_hand():
    """Catches keys in a neighbour's slot, padding that stays, and growth that loses what was there.

    Two rows, one head, one number a key: row 0 reads 1 2 3 and row 1 reads 4, padded with 8 and 9.
    """
    def numbers(*rows):
        return torch.tensor(rows, dtype=torch.float)[:, None, :, None]      # (B, 1, W, 1)

    layer = evaluate.SlotLayer()
    layer.where, layer.room, layer.used = torch.tensor([[0, 1, 2], [0, 1, 2]]), 4, 4
    keys, values = layer.update(numbers([1, 2, 3], [4, 8, 9]), -numbers([1, 2, 3], [4, 8, 9]))
    assert keys[:, 0, :, 0].tolist() == [[1, 2, 3, 0], [4, 8, 9, 0]]
    assert torch.equal(values, -keys) and layer.get_seq_length() == 0
    layer.where, layer.room, layer.used = torch.tensor([[3, 4], [1, 2]]), 8, 6   # row 1 has 1
    keys, values = layer.update(numbers([5, 6], [5, 7]), -numbers([5, 6], [5, 7]))
    assert keys[:, 0, :, 0].tolist() == [[1, 2, 3, 5, 6, 0], [4, 5, 7, 0, 0, 0]]
    assert torch.equal(values, -keys)


@torch.no_grad()
def alone(backbone, ids):
    """Logits after a conversation, by the model's own class."""
    return backbone.model(input_ids=torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("block", [1, 5, 64])
@torch.no_grad()
def test_reader_by_hand(tiny, monkeypatch, block):
    """Catches padding that is seen, a row of count 0 that moves, a row that forgets and remembers,
    rows that are mixed up when one leaves; blocks of 1 let the cache grow at every read."""
    monkeypatch.setattr(evaluate.Reader, "BLOCK", block)
    reader = evaluate.Reader(tiny, 3)
    told = [[], [], []]                 # what each row has been told so far

    def read(*rows):
        longest = max(1, *map(len, rows))
        ids = torch.tensor([row + [99] * (longest - len(row)) for row in rows])
        logits = reader.read(ids, torch.tensor([len(row) for row in rows]))
        for number, row in enumerate(rows):
            told[number] += row
            if row:
                gap = (logits[number] - alone(tiny, told[number])).abs().max()
                assert gap < 1e-3, (number, gap)
        assert reader.length.tolist() == list(map(len, told))

    read([1, 2, 3, 4, 5], [6], [7, 8])
    read([9], [], [10])                 # the second row has ended its answer
    read([], [11, 12], [])
    reader.forget([2])
    told[2] = []
    read([13], [14], [15, 16, 17, 18])
    reader.keep([0, 2])
    del told[1]
    read([19], [20])
    reader.forget([])
    reader.forget([0, 1])
    told[:] = [], []
    read([21, 22], [23])
    reader.keep([1])
    del told[0]
    for token in range(24, 34):
        read([token])


@torch.no_grad()
def test_room_follows_the_longest_conversation(tiny, monkeypatch):
    """Catches a cache that grows with all that was ever said: gigabytes on a long walk."""
    monkeypatch.setattr(evaluate.Reader, "BLOCK", 8)
    reader, ids = evaluate.Reader(tiny, 2), torch.ones(2, 6, dtype=torch.long)
    for _ in range(20):
        reader.read(ids, torch.tensor([6, 6]))
        reader.forget([0, 1])
    assert reader.room == 8


def test_a_cache_dies_with_its_game(tiny, monkeypatch):
    """Catches a cache, gigabytes on a large model, that stays in memory during the update."""
    kept, start = [], evaluate.Reader.__init__
    monkeypatch.setattr(evaluate.Reader, "__init__", lambda self, *args: (
        kept.append(weakref.ref(self)), start(self, *args))[1])
    gc.collect()
    gc.disable()
    try:
        evaluate.play(tiny, [Rigged(2), Rigged(6)], range(2), 0.6, 6, torch.Generator())
        assert [reader() for reader in kept] == [None]
    finally:
        gc.enable()


def test_draw_by_hand():
    """Catches a temperature that is not applied, or that bends the log p of the likeliest token."""
    logits = torch.tensor([[0.0, math.log(3.0)]]).repeat(4000, 1)
    token, logprob = evaluate.draw(logits, 0.5, torch.Generator().manual_seed(0))
    stated = torch.tensor([1 / 10, 9 / 10])         # 1 : 3 at temperature 1 is 1 : 9 at 1/2
    assert torch.allclose(logprob, stated.log()[token], atol=1e-6)
    assert abs((token == 1).float().mean() - 0.9) < 4 * (0.09 / 4000) ** 0.5
    token, logprob = evaluate.draw(logits, 0.0)
    assert token.eq(1).all() and torch.allclose(logprob.exp(), torch.tensor(0.75))


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(),
                               reason="no GPU is visible to torch here")


@NEEDS_GPU
def test_recorded_steps_read_the_same(tiny, monkeypatch):
    """Catches a recording that plays with old inputs, or writes to memory that moved."""
    tiny.model.cuda()
    monkeypatch.setattr(evaluate.Reader, "BLOCK", 5)
    generator, heard = torch.Generator().manual_seed(0), []
    reads = [(torch.randint(0, 100, (3, width), generator=generator).cuda(),
              (torch.rand(3, width, generator=generator) < 0.8).long().sum(1).cuda())
             for width in [4] + [1] * 13 + [3] + [1] * 4]
    for kinds in ((), ("cuda",)):
        monkeypatch.setattr(evaluate.Reader, "recorded_on", kinds)
        reader = evaluate.Reader(tiny, 3)
        with torch.no_grad():
            heard.append([reader.read(*part).clone() for part in reads])
    for one, two, (_, counts) in zip(*heard, reads):
        gap = (one - two)[counts > 0]
        assert gap[gap.isfinite()].abs().mean() < 0.05


@NEEDS_GPU
def test_what_cannot_be_recorded_is_read_step_by_step(tiny, monkeypatch, capsys):
    """Catches a run that dies, or the same logits at every step, where CUDA does not record."""
    tiny.model.cuda()

    def play_once():
        return said(evaluate.play(tiny, [Rigged(2), Rigged(6)], range(2), 0.6, 6,
                                  torch.Generator("cuda").manual_seed(0)))

    monkeypatch.setattr(evaluate.Reader, "recorded_on", ())
    plain, step = play_once(), evaluate.Reader.step
    monkeypatch.setattr(evaluate.Reader, "step", lambda self, *args: (
        self.length.sum().item(), step(self, *args))[1])        # waits: forbidden in a recording
    monkeypatch.setattr(evaluate.Reader, "recorded_on", ("cuda",))
    assert play_once() == plain and evaluate.Reader.recorded_on == ()
    assert capsys.readouterr().out.count("cannot be recorded") == 1


@NEEDS_GPU
def test_sampler_and_update_agree_on_a_gpu(tiny):
    """Catches a mask or position error that only the GPU's attention kernels show."""
    tiny.model.cuda()
    episodes = evaluate.play(tiny, [Rigged(solve_at) for solve_at in (1, 3, 6)], range(3), 0.6, 8,
                             torch.Generator("cuda").manual_seed(0))
    for episode in episodes:
        ids = [t for turn in episode.turns for t in turn.prompt_ids + turn.answer_ids]
        mask = [m for turn in episode.turns
                for m in [0] * len(turn.prompt_ids) + [1] * len(turn.answer_ids)]
        row = torch.tensor([ids], device="cuda")
        with torch.no_grad():
            hidden = sft.trunk(tiny, row)
            found, _ = sft.token_logprobs(tiny, hidden, row, torch.tensor([mask], device="cuda"),
                                          0.6)
        seen = torch.tensor([p for turn in episode.turns for p in turn.logprobs])
        # bf16 matrices: a log-probability of about 6 is known to 1 part in 2^8
        assert (found.cpu() - seen).abs().mean() < 0.05


# ------------------------------------------------------------------------------------------------
# 1. The hands of a cell
# ------------------------------------------------------------------------------------------------


def hands(cell, split, count):
    """The hands dealt in a cell."""
    envs, seeds = evaluate.cell_environments(cell, split, count)
    return [env.reset(seed)[1]["hand"] for env, seed in zip(envs, seeds)]


def test_hands_depend_on_the_cell_alone():
    """Catches an evaluation that changes with the training seed, the call, or global chance."""
    for cell in evaluate.CELLS:
        first = hands(cell, "test", 20)
        np.random.seed(1)
        random.seed(1)
        torch.manual_seed(1)
        assert hands(cell, "test", 30)[:20] == first
        assert len(set(first)) > 10


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_cells_hold_only_hands_of_their_split(split):
    """Catches test hands among the hands seen, or the other way round, under either rule."""
    for cell, how in evaluate.CELLS.items():
        for hand in hands(cell, split, 60):
            assert gp_env.split_of(hand.cards) == split
            assert hand.rule == gp_env.RULES[how["rule"]]
            assert not how["face"] or set(hand.cards) & set("JQK")
            assert gp_env.solvable(hand.numbers)


def test_fake_cell_states_the_new_rule_and_pays_the_old():
    """Catches a probe that pays for reading the prompt: a model that ignores it must pass."""
    envs, seeds = evaluate.cell_environments("fake", "test", 40)
    judged = 0
    for env, seed in zip(envs, seeds):
        observation, info = env.reset(seed)
        assert "J counts 11, Q counts 12, K counts 13" in observation["text"]
        hand = info["hand"]
        old = gp_env.card_numbers(hand.cards, gp_env.RULES["ten"])
        if not gp_env.solvable(old):
            continue
        _, reward, terminated, _, info = env.step(
            gp_env.answer(hand, old, gp_env.solutions(old)[0]))
        assert terminated and reward == 5.0 and info["verdict"].numbers_right
        env.reset(seed)
        fair = gp_env.solutions(hand.numbers)[0]
        kind = verify_gp(f"formula: {fair}", hand.cards, old).kind
        _, _, terminated, _, info = env.step(gp_env.answer(hand, hand.numbers, fair))
        assert info["verdict"].kind == kind and terminated == (kind == "correct")
        judged += 1
    assert judged > 20


def test_splits_and_cells_are_played_as_named(tiny):
    """Catches results filed under the wrong name, and a batch size that changes them."""
    # at temperature 0: chance is drawn anew for each batch
    found = [evaluate.evaluate(tiny, ["id", "ood"], ["train", "test"], 5, 3, temperature=0,
                               batch=batch) for batch in (2, 256)]
    assert found[0][0] == found[1][0]
    assert list(found[0][0]) == ["seen/id", "seen/ood", "held-out/id", "held-out/ood"]
    for name, episodes in found[0][1].items():
        assert len(episodes) == 5
        for episode in episodes:
            hand = episode.env.hand
            assert gp_env.split_of(hand.cards) == ("train" if name[0] == "s" else "test")
            assert hand.rule == gp_env.RULES["face" if name.endswith("ood") else "ten"]


# ------------------------------------------------------------------------------------------------
# 5. Counting
# ------------------------------------------------------------------------------------------------


def test_wilson_by_hand():
    """Catches the plain error bar, which is 0 wide at 0 % and leaves 0..1 near the ends."""
    assert doctest.testmod(evaluate).failed == 0
    # 5 of 10: middle 1/2, half width z/(1+z2/n) * sqrt(1/40 + z2/400), z2 = 3.8416
    half = 1.96 / 1.38416 * (0.025 + 3.8416 / 400) ** 0.5
    assert evaluate.wilson(5, 10) == pytest.approx((0.5 - half, 0.5 + half))
    # 0 of n: from 0 to z2 / (n + z2), and the mirror image of n of n
    assert evaluate.wilson(0, 50) == pytest.approx((0, 3.8416 / 53.8416), abs=1e-12)
    assert evaluate.wilson(50, 50) == pytest.approx((50 / 53.8416, 1), abs=1e-12)
    assert evaluate.wilson(0, 0) == (0.0, 1.0)
    for n in (1, 7, 1000):
        for hits in range(0, n + 1, max(1, n // 10)):
            low, high = evaluate.wilson(hits, n)
            assert 0 <= low <= hits / n <= high <= 1 and low < high
            assert evaluate.wilson(n - hits, n) == pytest.approx((1 - high, 1 - low))


def test_rate_by_hand():
    """Catches 1,000 hands that are 96 multisets, counted as 1,000 independent ones."""
    single = [(i, hit) for i, hit in enumerate([1, 0, 0, 1, 0, 0, 0])]
    found = evaluate.rate(single)
    assert (found["rate"], found["count"]) == (2 / 7, 7)
    assert found["interval"] == pytest.approx(evaluate.wilson(2, 7))
    # two groups that succeed and fail as one: two independent outcomes, however many there are
    for size in (1, 2, 50):
        found = evaluate.rate([("a", 1)] * size + [("b", 0)] * size)
        assert (found["rate"], found["count"]) == (0.5, 2 * size)
        assert found["interval"] == pytest.approx(evaluate.wilson(1, 2))
    # all alike: the spread within a group is not known, so a group counts once
    found = evaluate.rate([("a", 1)] * 9 + [("b", 1)] * 9)
    assert (found["rate"], found["interval"]) == (1.0, evaluate.wilson(2, 2))
    # groups that are mixed better than chance do not count for more than there is
    low, high = evaluate.rate([(i // 2, i % 2) for i in range(8)])["interval"]
    assert low <= evaluate.wilson(4, 8)[0] and high >= evaluate.wilson(4, 8)[1]
    assert evaluate.rate([]) == {"rate": 0.0, "count": 0, "interval": (0.0, 1.0)}
    assert evaluate.rate(iter(single))["interval"] == pytest.approx(
        evaluate.rate(single[::-1])["interval"])


def finished(answers, cell="id", seed=0):
    """An Episode of these answers: "right", "old" (J = Q = K = 10, whatever is stated) or text."""
    envs, _ = evaluate.cell_environments(cell, "test", 1)
    observation, info = envs[0].reset(seed)
    hand = info["hand"]
    episode = evaluate.Episode(envs[0], observation["text"])
    for text in answers:
        numbers = {"right": hand.numbers,
                   "old": gp_env.card_numbers(hand.cards, gp_env.RULES["ten"])}.get(text)
        if numbers:
            text = gp_env.answer(hand, numbers, gp_env.solutions(numbers)[0])
        observation, reward, *ended, info = envs[0].step(text)
        episode.turns.append(evaluate.Turn([], [], [], text, reward, observation["text"],
                                           info["verdict"], not episode.turns, None, True))
        episode.terminated, episode.truncated = ended
    return episode


def test_measure_by_hand():
    """Catches later tries counted as first ones, and errors divided by the number of errors."""
    blunder = "formula: 1+"
    episodes = [finished(["right"]), finished([blunder, "right"]), finished([blunder] * 5),
                finished(['{"cards": [], "number": [], "formula": "99*1"}'] * 5)]
    found = evaluate.measure(episodes)
    # all four are the same hand: one group, whose outcome is not known better than by one hand
    assert found == {
        "count": 4, "hits": 2, "success": 0.5, "interval": evaluate.rate(
            [(0, 1), (0, 1), (0, 0), (0, 0)])["interval"],
        "first_try": 0.25, "cards_read": 0.25, "numbers_read": 0.25,
        "errors": {"illegal": 0.5, "wrong numbers": 0.25}, "tries": 13 / 4, "cut": 0.0}
    apart = [finished(["right"], seed=1), finished([blunder] * 5, seed=2)]
    apart[1].turns[0].ended = False
    found = evaluate.measure(apart)
    assert found["interval"] == pytest.approx(evaluate.wilson(1, 2))
    assert found["cut"] == pytest.approx(1 / 6)


def test_numbers_read_asks_about_the_stated_rule():
    """Catches a `fake` cell that calls the old numbers "read right": nothing of the kind was."""
    hand = finished(["x"], "fake").env.hand
    assert hand.numbers != gp_env.card_numbers(hand.cards, gp_env.RULES["ten"])
    seed = next(s for s in range(50) if gp_env.solvable(gp_env.card_numbers(
        finished(["x"], "fake", s).env.hand.cards, gp_env.RULES["ten"])))
    habit = evaluate.measure([finished(["old"], "fake", seed)])
    assert (habit["success"], habit["numbers_read"]) == (1.0, 0.0)
    reader = evaluate.measure([finished(["right"], "ood", seed)])
    assert (reader["success"], reader["numbers_read"]) == (1.0, 1.0)


def test_gain_by_published_example():
    """Catches bounds of the two rates paired the wrong way round: Newcombe (1998), method 10."""
    assert evaluate.gain(56, 70, 48, 80) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    difference, low, high = evaluate.gain(48, 80, 56, 70)
    assert (difference, low, high) == pytest.approx((-0.2, -0.3339, -0.0524), abs=5e-5)
    for hits, before in ((0, 0), (50, 50), (0, 50), (50, 0)):       # no 0 width, nothing beyond 1
        difference, low, high = evaluate.gain(hits, 50, before, 50)
        assert -1 <= low < high <= 1 and low <= difference <= high


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------

QUICK = ["--splits", "test", "--hands", 2, "--max-new-tokens", 2]


def test_the_value_of_a_message_is_conversation_minus_fresh(tiny, monkeypatch):
    """Catches fresh tries that are not, two plays on other hands, and first answers of one only."""
    seen = []

    def instead(backbone, games, *_):
        envs, seeds = games
        seen.append(([env.fresh for env in envs], seeds))
        return [finished(["right"] if envs[0].fresh == (i == 0) else ["formula: 1+", "right"])
                for i in range(4)]

    monkeypatch.setattr(evaluate, "play_cell", instead)
    found, _ = evaluate.evaluate(tiny, ["id"], ["test"], 4, 3)
    (plain, seeds), (fresh, again) = seen
    assert not any(plain) and all(fresh) and seeds == again
    found = found["held-out/id"]
    assert (found["success"], found["fresh"], found["message"]) == (1.0, 1.0, 0.0)
    assert found["first_try"] == (3 / 4 + 1 / 4) / 2
    assert len(seen) == 2
    single = evaluate.evaluate(tiny, ["id"], ["test"], 4, 3, tries=1)[0]["held-out/id"]
    assert len(seen) == 3 and single["message"] == 0        # one try: the second play is the first


def test_every_checkpoint_of_a_run_is_played_once(tiny, tmp_path, monkeypatch, capsys):
    """Catches checkpoints played twice or not at all after an evaluation that was killed."""
    other = copy.deepcopy(tiny)
    for step, backbone in ((1, tiny), (2, other)):
        sft.save_checkpoint(tmp_path / f"step-{step:06d}", backbone)
    (tmp_path / "args.json").write_text('{"task": "gp-l"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "flops": 10}\n{"step": 2, "flops": 20}\n')
    code, error = command(monkeypatch, capsys, evaluate, "--run", tmp_path, *QUICK)
    assert code == 0, error
    path = tmp_path / "eval.jsonl"
    whole = path.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [(row["step"], row["flops"]) for row in rows] == [(1, 10), (2, 20)]
    assert list(rows[0]["cells"]) == ["held-out/id"] and rows[0]["hands"] == 2
    assert 0 < rows[0]["cells"]["held-out/id"]["cut"] <= 1
    command(monkeypatch, capsys, evaluate, "--run", tmp_path, *QUICK)
    assert path.read_text() == whole
    path.write_text(whole[:-30])                # killed while the second line was written
    code, error = command(monkeypatch, capsys, evaluate, "--run", tmp_path, *QUICK)
    assert code == 0, error
    assert path.read_text() == whole
    # where nothing was held out, no cell may be called so
    (tmp_path / "args.json").write_text('{"split": "all"}')
    assert evaluate.flags(["--run", str(tmp_path)]).splits == ["all"]


@pytest.mark.parametrize("args, more, words", [
    ({}, [], []),
    ({}, ["--temperature", 1], ["temperature", "0.6"]),
    ({}, ["--batch", 1], ["batch"]),
    ({}, ["--hands", 3], ["hands"]),
    ({}, ["--dtype", "bfloat16"], ["float32"]),
    ({}, ["--max-new-tokens", 3], ["max_new_tokens"]),
])
def test_a_run_is_measured_in_one_way(model, tmp_path, monkeypatch, capsys, args, more, words):
    """Catches cells of another game, temperature or dtype in the row of a run; and, where nothing
    is wrong, a cell that is not measured since another one was."""
    os.symlink(model, tmp_path / "step-000001")
    (tmp_path / "args.json").write_text("{}")
    flags = ["--run", tmp_path, *QUICK]
    code, error = command(monkeypatch, capsys, evaluate, *flags)
    assert code == 0, error
    before = (tmp_path / "eval.jsonl").read_text()
    (tmp_path / "args.json").write_text(json.dumps(args))
    code, error = command(monkeypatch, capsys, evaluate, *flags, "--cells", "fake", *more)
    if words:
        assert_one_line(code, error, "evaluate.py: ", *words)
        assert (tmp_path / "eval.jsonl").read_text() == before
    else:
        row, = map(json.loads, (tmp_path / "eval.jsonl").read_text().splitlines())
        assert list(row["cells"]) == ["held-out/id", "held-out/fake"]
        del row["how"]                          # as rl.py writes its rows
        (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n")
        code, error = command(monkeypatch, capsys, evaluate, *flags)
        assert_one_line(code, error, "evaluate.py: ", "rl.py")


@pytest.mark.parametrize("name, text", [
    ("eval.jsonl", '{"step": 1, "cel'), ("metrics.jsonl", '{"step": 1}\n'),
    ("step-\N{SUPERSCRIPT TWO}/config.json", "{}")])
def test_rubbish_in_a_run_folder_costs_nothing(model, tmp_path, monkeypatch, capsys, name, text):
    """Catches a traceback on a file that was cut, or that another program has left there."""
    os.symlink(model, tmp_path / "step-000001")
    (tmp_path / "args.json").write_text("{}")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    code, error = command(monkeypatch, capsys, evaluate, "--run", tmp_path, *QUICK)
    assert code == 0, error
    row, = map(json.loads, (tmp_path / "eval.jsonl").read_text().splitlines())
    assert list(row["cells"]) == ["held-out/id"]


def test_output_that_is_no_number_ends_in_one_line(tiny, tmp_path, monkeypatch, capsys):
    """Catches a traceback from the sampler where a learning rate has wrecked the weights."""
    with torch.no_grad():
        tiny.model.get_output_embeddings().weight[3] = torch.nan
    sft.save_checkpoint(tmp_path / "wreck", tiny)
    assert_one_line(*command(monkeypatch, capsys, evaluate, "--model", tmp_path / "wreck", *QUICK),
                    "evaluate.py: ")


def test_results_are_written_and_transcripts_shown(model, tmp_path, monkeypatch, capsys):
    """Catches transcripts without the verifier's words, and results that are not valid JSON."""
    code, out, error = shown(monkeypatch, capsys, evaluate, "--model", model, "--ood", "--hands", 2,
                             "--max-new-tokens", 2, "--show", 1, "--out", tmp_path / "found.json")
    assert code == 0, error
    assert "[Cards]" in out and "verifier  [-3.0] Not right: there is no formula" in out
    assert "CUT OFF" in out
    results = json.loads((tmp_path / "found.json").read_text())
    assert len(results) == 2 * len(evaluate.CELLS)


def test_results_are_written_before_anything_is_printed(model, tmp_path, monkeypatch):
    """Catches minutes of measuring that are lost to `| head`, or to a name of the old results."""
    reading, writing = os.pipe()
    os.close(reading)                           # nobody listens from the beginning
    (tmp_path / "found.json").write_text("x" * 100_000)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(model), *map(str, QUICK),
                                      "--show", "2", "--out", str(tmp_path / "found.json")])
    show = evaluate.show
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "show", lambda *found: (
            patch.setattr(sys, "stdout", open(os.dup(writing), "w", 1, "utf8")), show(*found)))
        assert sft.guarded(evaluate.main) == 0
    assert list(json.loads((tmp_path / "found.json").read_text())) == ["held-out/id"]
    let_go()


@pytest.mark.parametrize("flags, words", [
    (["--model", "nowhere"], ["nowhere"]),
    (["--run", "runs", "--show", "2"], ["--show", "--model"]),
    (["--run", "runs", "--out", "x.json"], ["--out"]),
    (["--hands", "0"], ["--hands"]),
    (["--batch", "0"], ["--batch"]),
    (["--temperature", "-1"], ["--temperature"]),
    (["--temperature", "nan"], ["--temperature"]),
    (["--show", "-1"], ["--show"]),
    (["--threads", "-1"], ["--threads"]),
    (["--cells", "visual"], ["visual", "gp-l"]),
    (["--blindfold"], ["--blindfold"]),
    (["--run", "empty"], ["empty"]),
    (["--run", ""], ["--run", "empty"]),
    (["--run", "runs", "--steps", "1", "999"], ["--run"]),
    (["--out", "nowhere/results.json"], ["nowhere"]),
    (["--out", "empty"], ["empty"]),
])
def test_bad_flags_end_in_one_line(model, tmp_path, monkeypatch, capsys, flags, words):
    """Catches a traceback, or minutes of play whose results then cannot be written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs").mkdir()
    os.symlink(model, tmp_path / "runs" / "step-000001")
    monkeypatch.setattr(evaluate, "play", lambda *_, **__: pytest.fail("played first"))
    code, error = command(monkeypatch, capsys, evaluate, "--model", model, "--hands", 2, *flags)
    assert_one_line(code, error, "evaluate.py: ", *words)


def test_all_tries_must_fit_into_the_model(tiny, tmp_path, monkeypatch, capsys):
    """Catches a conversation of five tries that outgrows the model at the third."""
    tiny.model.config.get_text_config().max_position_embeddings = 300
    sft.save_checkpoint(tmp_path / "model", tiny)
    monkeypatch.setattr(evaluate, "play", lambda *_, **__: pytest.fail("played first"))
    code, error = command(monkeypatch, capsys, evaluate, "--model", tmp_path / "model", "--hands",
                          2, "--max-new-tokens", 64)
    assert_one_line(code, error, "tokens")
