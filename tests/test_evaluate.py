"""Tests of evaluate.py: playing in a batch with a cache, counting, intervals, the figure.

The heart of it: the sampler reads a conversation in pieces, with gaps in its cache; the update
reads it in one go. Both must find the same log-probabilities, or PPO learns from noise.

    python -m pytest tests/test_evaluate.py
"""

import copy
import doctest
import gc
import itertools
import json
import math
import random
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.cache_utils import DynamicLayer

import evaluate
import gp_env
import sft
from test_sft import assert_one_line, command

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
            heard = gp_env.expert_answer(self.hand, formula)
        return super().step(heard)

    def _observe(self, text, new):
        if self.forget and not new:
            text = f"{text} {gp_env.prompt(self.hand)}"
        return super()._observe(text, new or self.forget)


def play(backbone, solve_ats=(1, 3, 6, 2, 6), seed=3, temperature=0.6, longest=6, keep_cache=True,
         forget=False):
    """Episodes of rigged games, one for each entry of solve_ats."""
    envs = [Rigged(solve_at, forget) for solve_at in solve_ats]
    return evaluate.play(backbone, envs, range(len(envs)), temperature, longest,
                         torch.Generator().manual_seed(seed), keep_cache)


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
                hidden = sft.trunk(backbone, row, torch.tensor([len(ids)]))
                found, _ = sft.token_logprobs(backbone, hidden, row, torch.tensor([mask]),
                                              temperature)
                worst = max(worst, (found - torch.tensor(seen)).abs().max().item())
                ids, mask, seen = [], [], []
        assert worst < 1e-4, worst


# ------------------------------------------------------------------------------------------------
# 2. Playing
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_cache", [True, False])
@pytest.mark.parametrize("forget", [False, True])
def test_sampler_and_update_agree_on_logprobs(tiny, keep_cache, forget):
    """Catches wrong positions after a gap, columns of a neighbour, an end token that is missing."""
    tiny.end_ids += range(60, 120)      # many ways to end: answers of unequal length
    tiny.banned = [10, 200]
    for temperature in (0.6, 1.0):
        episodes = play(tiny, temperature=temperature, longest=8, keep_cache=keep_cache,
                        forget=forget)
        assert_sampler_agrees(tiny, episodes, temperature)
        answers = [answer for episode in said(episodes) for answer in episode]
        assert len(set(map(len, answers))) > 3, "the answers do not differ: this tests too little"
        assert not {10, 200} & {token for answer in answers for token in answer}


@pytest.mark.parametrize("forget", [False, True])
def test_cache_changes_no_token(tiny, forget):
    """Catches a cache that keeps too much or too little: rows that left, a forgotten past."""
    assert said(play(tiny, forget=forget)) == said(play(tiny, forget=forget, keep_cache=False))


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


def test_text_is_the_tokens_without_markup(tiny):
    """Catches text that is cut, or markup that reaches the verifier."""
    for episode in play(tiny):
        for turn in episode.turns:
            assert turn.text == tiny.tokenizer.decode(turn.answer_ids, skip_special_tokens=True)
            assert "<|" not in turn.text


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


def test_roomy_layer_is_the_stock_layer(monkeypatch):
    """Catches keys lost or overwritten when the room runs out or rows leave the batch."""
    monkeypatch.setattr(evaluate.RoomyLayer, "block", 4)
    roomy, stock = evaluate.RoomyLayer(), DynamicLayer()
    chance, rows = random.Random(0), 6
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        width = chance.choice([1, 1, 1, 2, 5, 11])
        keys, values = torch.randn(2, rows, 2, width, 3, generator=generator)
        for one, other in zip(roomy.update(keys, values), stock.update(keys, values)):
            assert torch.equal(one, other)
        assert roomy.get_seq_length() == stock.get_seq_length()
        if rows > 1 and chance.random() < 0.1:
            stay = sorted(chance.sample(range(rows), rows - 1))
            rows -= 1
            for layer in (roomy, stock):
                layer.batch_select_indices(torch.tensor(stay))
    assert rows < 6 and roomy.get_seq_length() > 100


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
        kind = gp_env.verify_gp(f"formula: {fair}", hand.cards, old).kind
        _, _, terminated, _, info = env.step(gp_env.expert_answer(hand, fair))
        assert info["verdict"].kind == kind and terminated == (kind == "correct")
        judged += 1
    assert judged > 20


def test_splits_and_cells_are_played_as_named(tiny):
    """Catches results filed under the wrong name, and a batch size that changes them."""
    found = [evaluate.evaluate(tiny, ["id", "ood"], ["train", "test"], 5, batch=batch,
                               max_new_tokens=3) for batch in (2, 256)]
    assert found[0][0] == found[1][0]
    assert list(found[0][0]) == ["seen/id", "seen/ood", "held-out/id", "held-out/ood"]
    for name, episodes in found[0][1].items():
        assert len(episodes) == 5
        for episode in episodes:
            hand = episode.env.hand
            assert gp_env.split_of(hand.cards) == ("train" if name[0] == "s" else "test")
            assert hand.rule == gp_env.RULES["face" if name.endswith("ood") else "ten"]


# ------------------------------------------------------------------------------------------------
# 3. and 4. Counting
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
                                           info["verdict"], not episode.turns))
        episode.terminated, episode.truncated = ended
    return episode


def test_measure_by_hand():
    """Catches later tries counted as first ones, and errors divided by the number of errors."""
    blunder = "formula: 1+"
    episodes = [finished(["right"]), finished([blunder, "right"]), finished([blunder] * 5),
                finished(['{"cards": [], "number": [], "formula": "99*1"}'] * 5)]
    found = evaluate.measure(episodes)
    assert found == {
        "count": 4, "hits": 2, "success": 0.5, "interval": evaluate.wilson(2, 4),
        "first_try": 0.25, "cards_read": 0.25, "numbers_read": 0.25,
        "errors": {"illegal": 0.5, "wrong numbers": 0.25}, "tries": 13 / 4}


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


# ------------------------------------------------------------------------------------------------
# The figure
# ------------------------------------------------------------------------------------------------


def write_run(folder, kind, seed, values, task="gp-l", tries=(100,), **flags):
    """A finished run with one cell triple at each step. values: {step: rate}."""
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(
        {"kind": kind, "seed": seed, "task": task} | flags))
    rows = [{"step": step, "hands": 100, "flops_spent": 1e12 * (step + 1), "cells": {
        cell: {"success": rate, "numbers_read": rate / 2, "per_step": rate, "per_step_on": rate,
               "turns": rate, "steps": count, "steps_on": count, "turn_tries": count}
        for cell in ("seen/id", "held-out/id", "held-out/ood")}}
        for (step, rate), count in zip(values.items(), itertools.cycle(tries))]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_curve_is_mean_and_range_over_seeds(tmp_path):
    """Catches a mean over the seeds that are done so far, and rates that are not percent."""
    write_run(tmp_path / "a", "rl", 0, {10: 0.3, 0: 0.1, 20: 0.9})      # rows in any order
    write_run(tmp_path / "b", "rl", 1, {0: 0.2, 10: 0.5})               # still running
    write_run(tmp_path / "c" / "deep", "sft", 0, {5: 0.7})
    runs = evaluate.read_runs(tmp_path)
    assert evaluate.curve(runs, "rl", "held-out/ood") == [
        (1e12, pytest.approx(15), pytest.approx(10), pytest.approx(20)),
        (11e12, pytest.approx(40), pytest.approx(30), pytest.approx(50))]
    assert evaluate.curve(runs, "sft", "seen/id", "numbers_read") == [     # from the shared start
        (1e12, pytest.approx(7.5), pytest.approx(5), pytest.approx(10)),
        (6e12, pytest.approx(35), pytest.approx(35), pytest.approx(35))]
    assert evaluate.curve(runs, "sft", "no such cell") == []
    # an arm of SFT with checkpoints before the start: its points stand in the order of compute
    early = [("rl", 0, [dict(runs[0][2][0], flops_spent=4e12)]),
             ("sft", 0, [dict(runs[0][2][0], step=step, flops_spent=step * 1e12)
                         for step in (3, 4, 5)])]
    found = [spent for spent, *_ in evaluate.curve(early, "sft", "seen/id")]
    assert found == [3e12, 4e12, 4e12, 5e12]
    # one that never saw a picture did not pass the shared start
    write_run(tmp_path / "e", "sft", 0, {9: 0.1}, drop_pictures=True)
    assert len(evaluate.curve(evaluate.read_runs(tmp_path), "blind sft", "seen/id")) == 1
    # one measure against another: the steps in their order, wherever that leads, and no band
    for _, _, rows in runs:
        for row in rows:
            row["cells"]["held-out/ood"]["read"] = 1 - row["cells"]["held-out/ood"]["success"]
    assert evaluate.curve(runs, "rl", "held-out/ood", against="read") == [
        pytest.approx((85, 15, 15, 15)), pytest.approx((60, 40, 40, 40))]


def test_blind_sft_is_an_arm_of_its_own(tmp_path):
    """Catches runs that never saw a picture pooled with those that did."""
    write_run(tmp_path / "a", "sft", 0, {10: 0.9})
    write_run(tmp_path / "b", "sft", 0, {10: 0.1})
    args = json.loads((tmp_path / "b" / "args.json").read_text())
    (tmp_path / "b" / "args.json").write_text(json.dumps(args | {"drop_pictures": True}))
    runs = evaluate.read_runs(tmp_path)
    assert [kind for kind, _, _ in runs] == ["sft", "blind sft"] and set(evaluate.ARMS) >= {
        kind for kind, _, _ in runs}
    assert [round(row["cells"]["held-out/ood"]["success"], 1) for _, _, rows in runs
            for row in rows] == [0.9, 0.1]


def test_gain_by_published_example():
    """Catches bounds of the two rates paired the wrong way round: Newcombe (1998), method 10."""
    assert evaluate.gain(56, 70, 48, 80) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    difference, low, high = evaluate.gain(48, 80, 56, 70)
    assert (difference, low, high) == pytest.approx((-0.2, -0.3339, -0.0524), abs=5e-5)
    for hits, before in ((0, 0), (50, 50), (0, 50), (50, 0)):       # no 0 width, nothing beyond 1
        difference, low, high = evaluate.gain(hits, 50, before, 50)
        assert -1 <= low < high <= 1 and low <= difference <= high


def test_table_by_hand(tmp_path):
    """Catches the first row taken for the last, a column under another's name, rates pooled."""
    write_run(tmp_path / "rl0", "rl", 0, {0: 0.1, 10: 0.5, 20: 0.8})
    write_run(tmp_path / "rl1", "rl", 1, {0: 0.2, 10: 0.5, 20: 0.6})
    write_run(tmp_path / "sft0", "sft", 0, {10: 0.9, 20: 0.4})
    head, _, *lines = evaluate.table(evaluate.read_runs(tmp_path)).splitlines()
    assert [cell.strip() for cell in head.split("|")[2:5]] == ["start", "SFT", "RL"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells} | {head.count("|") - 1}) == 1, "a ragged table"
    line = next(row for row in cells if row[0] == "held-out/ood")
    assert line[1:4] == ["15.0 (10.0-20.0)", "40.0 (40.0-40.0)", "70.0 (60.0-80.0)"]
    # a seed is compared with its own start: SFT has no second one
    assert line[4].startswith("+30.0 [") and line[4].endswith("] (+30.0 to +30.0)")
    (_, low, high), (_, other_low, other_high) = (
        evaluate.gain(80, 100, 10, 100), evaluate.gain(60, 100, 20, 100))
    below, above = (100 * math.hypot(*x) / 2
                    for x in ((0.7 - low, 0.4 - other_low), (high - 0.7, other_high - 0.4)))
    assert line[5] == f"+55.0 [{55 - below:+.1f}, {55 + above:+.1f}] (+40.0 to +70.0)"


def test_each_seed_counts_alike(tmp_path):
    """Catches a seed that counts less because its walks ended early: it has fewer tries."""
    for seed, (end, tries) in enumerate(((0.9, 1000), (0.1, 10))):
        write_run(tmp_path / str(seed), "rl", seed, {0: 0.5, 10: end}, "virl-l", [500, tries])
    *_, line = [line.split("|") for line in evaluate.table(
        evaluate.read_runs(tmp_path, "virl-l"), "virl-l").splitlines() if "held-out/ood |" in line]
    assert line[4].strip().startswith("+0.0 [") and line[4].strip().endswith("(-40.0 to +40.0)")


def test_other_settings_are_left_out_by_name(tmp_path, capsys):
    """Catches an ablation, or one seed twice, that is pooled with the runs of the comparison."""
    for seed in (0, 1):
        write_run(tmp_path / f"rl{seed}", "rl", seed, {0: 0.1, 10: 0.5}, lr=1e-4,
                  from_backbone=False)
    write_run(tmp_path / "bare", "rl", 0, {0: 0.0, 10: 0.0}, lr=1e-4, from_backbone=True)
    write_run(tmp_path / "twice", "rl", 1, {0: 0.9, 10: 0.9}, lr=1e-4, from_backbone=False)
    runs = evaluate.read_runs(tmp_path)
    assert [seed for _, seed, _ in runs] == [0, 1]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all(line.startswith("left out: ") for line in said)
    assert "bare, for its --from-backbone" in said[0] and "twice, for its --seed" in said[1]


@pytest.mark.parametrize("case", ["only SFT", "only RL", "not measured yet", "fewer cells",
                                  "only blind"])
def test_unfinished_runs_are_drawn_or_named(tmp_path, monkeypatch, capsys, case):
    """Catches a traceback when one looks at runs before all of them are done."""
    if not case.startswith("only"):
        write_run(tmp_path / "rl", "rl", 0, {0: 0.1, 10: 0.5})
        write_run(tmp_path / "sft", "sft", 0, {10: 0.9})
    if case == "only RL":
        write_run(tmp_path / "rl", "rl", 0, {0: 0.1, 10: 0.5})
    elif case.startswith("only"):
        write_run(tmp_path / "sft", "sft", 0, {10: 0.9}, drop_pictures=case == "only blind")
    if case == "not measured yet":              # rl.py opens the file before it plays
        write_run(tmp_path / "new", "rl", 1, {})
    if case == "fewer cells":                   # measured without --ood
        path = tmp_path / "sft" / "eval.jsonl"
        row = json.loads(path.read_text())
        del row["cells"]["held-out/ood"]
        path.write_text(json.dumps(row) + "\n")
    code, error = command(monkeypatch, capsys, evaluate, "--plot", tmp_path, "--out",
                          tmp_path / "figure.png")
    assert code == 0 and (tmp_path / "figure.png").exists() or \
        code == 2 and error.count("\n") == 1, error


def test_figure_is_drawn(tmp_path, monkeypatch, capsys):
    """Catches an empty or cut figure, a curve left out, and files left behind."""
    for seed in (0, 1):
        write_run(tmp_path / f"rl{seed}", "rl", seed, {0: 0.1, 10: 0.5 + seed / 10, 20: 0.8})
        write_run(tmp_path / f"sft{seed}", "sft", seed, {10: 0.4, 20: 0.2})
    out = tmp_path / "drawn" / "figure.png"
    out.parent.mkdir()
    code, error = command(monkeypatch, capsys, evaluate, "--plot", tmp_path, "--out", out)
    assert code == 0, error
    assert [path.name for path in out.parent.iterdir()] == ["figure.png"]
    with Image.open(out) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        assert image.width == 4 * 460 and image.height > 360
        pixels = np.asarray(image).astype(int)
    for x in range(0, 1840, 460):               # each panel shows both curves
        for colour in ((52, 104, 192), (200, 60, 50)):
            near = np.abs(pixels[60:380, x:x + 460] - colour).sum(axis=2) < 30
            assert near.sum() > 200
    before = out.read_bytes()
    command(monkeypatch, capsys, evaluate, "--plot", tmp_path, "--out", out)
    assert out.read_bytes() == before, "the same metrics must give the same file"


LINE = ('{{"step": 0, "hands": {hands}, "flops_spent": {flops}, "cells": '
        '{{"held-out/id": {{"success": {rate}, "numbers_read": 0}}}}}}\n')


@pytest.mark.parametrize("name, content", [
    ("eval.jsonl", '{"step": 0, "flo'),
    ("eval.jsonl", '{"step": 0}\n'),
    ("eval.jsonl", '[1, 2]\n'),
    ("eval.jsonl", '{"step": 0, "flops": 1, "cells": {"held-out/id": {}}}\n'),
    ("eval.jsonl", LINE.format(hands=0, flops=1, rate=0.5)),
    ("eval.jsonl", LINE.format(hands='"9"', flops=1, rate=0.5)),
    ("eval.jsonl", LINE.format(hands=9, flops="Infinity", rate=0.5)),
    ("eval.jsonl", LINE.format(hands=9, flops="NaN", rate=0.5)),
    ("eval.jsonl", LINE.format(hands=9, flops=1, rate=2)),
    ("eval.jsonl", LINE.format(hands=9, flops=1, rate='"1"')),
    ("eval.jsonl", "[" * 100_000),
    ("args.json", "{"),
    ("args.json", "[]"),
    ("args.json", "{}"),
    ("args.json", '{"kind": "other", "seed": 1, "task": "gp-l"}'),
    ("args.json", '{"kind": "rl", "seed": [1], "task": "gp-l"}'),
    ("args.json", None),
])
def test_damaged_runs_are_named(tmp_path, monkeypatch, capsys, name, content):
    """Catches a traceback, or a figure without the run, where one line should name the folder."""
    write_run(tmp_path / "whole", "rl", 0, {0: 0.1, 10: 0.2})
    write_run(tmp_path / "broken", "rl", 1, {0: 0.1, 10: 0.2})
    path = tmp_path / "broken" / name
    path.unlink() if content is None else path.write_text(content)
    code, error = command(monkeypatch, capsys, evaluate, "--plot", tmp_path,
                          "--out", tmp_path / "figure.png")
    assert_one_line(code, error, "broken")
    assert not (tmp_path / "figure.png").exists()


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def test_every_checkpoint_of_a_run_is_played_once(tiny, tmp_path, monkeypatch, capsys):
    """Catches checkpoints played twice or not at all after an evaluation that was killed."""
    other = copy.deepcopy(tiny)
    for step, backbone in ((1, tiny), (2, other)):
        sft.save_checkpoint(tmp_path / f"step-{step:06d}", backbone)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "flops": 10}\n{"step": 2, "flops": 20}\n')
    flags = ["--run", tmp_path, "--hands", 2, "--max-new-tokens", 2, "--splits", "test"]
    code, error = command(monkeypatch, capsys, evaluate, *flags)
    assert code == 0, error
    path = tmp_path / "eval.jsonl"
    whole = path.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [(row["step"], row["flops"]) for row in rows] == [(1, 10), (2, 20)]
    assert list(rows[0]["cells"]) == ["held-out/id"]
    command(monkeypatch, capsys, evaluate, *flags)
    assert path.read_text() == whole
    path.write_text(whole[:-30])                # killed while the second line was written
    code, error = command(monkeypatch, capsys, evaluate, *flags)
    assert code == 0, error
    assert path.read_text() == whole


def test_a_measured_step_gets_the_cells_that_it_lacks(tiny, tmp_path, monkeypatch, capsys):
    """Catches an assignment that measures nothing, since another cell was measured before."""
    sft.save_checkpoint(tmp_path / "step-000001", tiny)
    flags = ["--run", tmp_path, "--max-new-tokens", 2, "--splits", "test", "--hands"]
    for more in ((2,), (2, "--cells", "fake"), (3, "--cells", "ood")):
        code, error = command(monkeypatch, capsys, evaluate, *flags, *more)
        assert code == 0, error
    row, = map(json.loads, (tmp_path / "eval.jsonl").read_text().splitlines())
    assert list(row["cells"]) == ["held-out/id", "held-out/fake"] and row["hands"] == 2


@pytest.mark.parametrize("name, text", [
    ("eval.jsonl", "[1]\n"), ("eval.jsonl", '{"step": 1}\n'), ("eval.jsonl", "\xff"),
    ("metrics.jsonl", "7\n"), ("metrics.jsonl", '{"step": 1}\n'), ("metrics.jsonl", "\xff"),
    ("args.json", "[]"), ("args.json", "\xff"),
    ("step-\N{SUPERSCRIPT TWO}/config.json", "{}")])
def test_rubbish_in_a_run_folder_costs_nothing(tiny, tmp_path, monkeypatch, capsys, name, text):
    """Catches a traceback on a file that was cut, or that another program has left there."""
    sft.save_checkpoint(tmp_path / "step-000001", tiny)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    code, error = command(monkeypatch, capsys, evaluate, "--run", tmp_path, "--hands", 2,
                          "--max-new-tokens", 2, "--splits", "test")
    assert code == 0, error
    row, = map(json.loads, (tmp_path / "eval.jsonl").read_text().splitlines())
    assert list(row["cells"]) == ["held-out/id"]


def test_output_that_is_no_number_ends_in_one_line(tiny, tmp_path, monkeypatch, capsys):
    """Catches a traceback from the sampler where a learning rate has wrecked the weights."""
    with torch.no_grad():
        tiny.model.get_output_embeddings().weight[3] = torch.nan
    sft.save_checkpoint(tmp_path / "wreck", tiny)
    flags = ["--hands", 2, "--max-new-tokens", 2]
    assert_one_line(*command(monkeypatch, capsys, evaluate, "--model", tmp_path / "wreck", *flags),
                    "evaluate.py: ", "not a number")


@pytest.mark.parametrize("args, more, words", [
    ({"task": "gp-vl"}, [], ["--task", "gp-vl"]),
    ({"picture_size": "640x320"}, [], ["--picture-size", "640x320"]),
    ({}, ["--temperature", 1], ["--temperature", "0.6"]),
    ({}, ["--batch", 1], ["--batch"]),
])
def test_a_run_is_measured_in_one_way(tiny, tmp_path, monkeypatch, capsys, args, more, words):
    """Catches cells of another game, or of another temperature, written into the rows of a run."""
    sft.save_checkpoint(tmp_path / "step-000001", tiny)
    flags = ["--run", tmp_path, "--max-new-tokens", 2, "--splits", "test", "--hands", 2]
    command(monkeypatch, capsys, evaluate, *flags)
    before = (tmp_path / "eval.jsonl").read_text()
    (tmp_path / "args.json").write_text(json.dumps(args))
    assert_one_line(*command(monkeypatch, capsys, evaluate, *flags, "--cells", "ood", *more),
                    "evaluate.py: ", *words)
    assert (tmp_path / "eval.jsonl").read_text() == before


def test_a_run_of_rl_is_not_measured_as_one_of_sft(tiny, tmp_path, monkeypatch, capsys):
    """Catches the figure's compute counted twice, by the formula of the other stage."""
    sft.save_checkpoint(tmp_path / "step-000001", tiny)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "flops": 10, "approx_kl": 0.1}\n')
    assert_one_line(*command(monkeypatch, capsys, evaluate, "--run", tmp_path), "rl.py", "--model")


def test_results_are_written_and_transcripts_shown(tiny, tmp_path, monkeypatch, capsys):
    """Catches transcripts without the verifier's words, and results that are not valid JSON."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", str(tmp_path / "model"), "--ood",
                                     "--hands", "2", "--max-new-tokens", "2", "--show", "1",
                                     "--out", str(tmp_path / "results.json")])
    assert sft.guarded(evaluate.main) == 0
    shown = capsys.readouterr().out
    assert "[Cards]" in shown and "verifier  [-3.0] Not right: there is no formula" in shown
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 2 * len(evaluate.CELLS)


@pytest.mark.parametrize("flags, words", [
    (["--model", "nowhere"], ["nowhere"]),
    (["--hands", "0"], ["--hands"]),
    (["--batch", "0"], ["--batch"]),
    (["--max-new-tokens", "0"], ["--max-new-tokens"]),
    (["--temperature", "-1"], ["--temperature"]),
    (["--temperature", "nan"], ["--temperature"]),
    (["--show", "-1"], ["--show"]),
    (["--threads", "-1"], ["--threads"]),
    (["--device", "abacus"], ["abacus"]),
    (["--run", "empty"], ["empty", "checkpoints"]),
    (["--run", ""], ["--run", "empty"]),
    (["--run", "runs", "--steps", "1", "999"], ["--steps 999"]),
    (["--steps", "3"], ["--steps", "--run"]),
    (["--plot", "empty"], ["empty", "eval.jsonl"]),
    (["--plot", "nowhere"], ["nowhere"]),
    (["--out", "nowhere/results.json"], ["nowhere"]),
    (["--out", "empty"], ["empty", "folder"]),
])
def test_bad_flags_end_in_one_line(tiny, tmp_path, monkeypatch, capsys, flags, words):
    """Catches a traceback, or minutes of play whose results then cannot be written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    sft.save_checkpoint(tmp_path / "model", tiny)
    sft.save_checkpoint(tmp_path / "runs" / "step-000001", tiny)
    if flags[0] == "--out":
        monkeypatch.setattr(evaluate, "play", lambda *_, **__: pytest.fail("played first"))
    basis = ["--model", "model", "--hands", 2]
    code, error = command(monkeypatch, capsys, evaluate, *basis, *flags)
    assert_one_line(code, error, "evaluate.py: ", *words)


def recorded_or_not(tiny, monkeypatch, new_tokens, rows=4):
    """The episodes that the sampler plays with and without a Recording, same draws."""
    played = []
    for kinds in ((), ("cpu", "cuda")):
        monkeypatch.setattr(evaluate.Reader, "recorded_on", kinds)
        envs = [Rigged(1 + i % 4, forget=i % 2 == 1) for i in range(rows)]
        played.append(evaluate.play(tiny, envs, range(rows), 0.6, new_tokens,
                                    torch.Generator(tiny.device).manual_seed(0)))
    return played


@pytest.mark.parametrize("room", [1, 3, 128])
def test_recorded_steps_read_the_same(tiny, monkeypatch, room):
    """Catches a recorded step that runs out of room, or leaves the reader with other columns."""
    monkeypatch.setattr(evaluate.RoomyLayer, "block", room)
    made, record = [], evaluate.Recording.__init__
    monkeypatch.setattr(evaluate.Recording, "__init__",
                        lambda self, *args: (made.append(1), record(self, *args))[1])
    plain, recorded = ([[(t.answer_ids, t.logprobs) for t in e.turns] for e in episodes]
                       for episodes in recorded_or_not(tiny, monkeypatch, 8))
    assert made and sum(map(len, plain)) > 6
    for one, two in zip(sum(plain, []), sum(recorded, [])):
        assert one[0] == two[0]
        assert torch.tensor(one[1]).sub(torch.tensor(two[1])).abs().max() < 1e-4


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(),
                               reason="no GPU is visible to torch here")


def test_a_recording_dies_with_its_game(tiny, monkeypatch):
    """Catches a cache, gigabytes on a large model, that stays in memory during the update."""
    monkeypatch.setattr(evaluate.Reader, "recorded_on", ("cpu",))
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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_what_cannot_be_recorded_is_read_step_by_step(tiny, monkeypatch, capsys, device):
    """Catches a run that dies, or the same logits at every step, where CUDA does not record."""
    tiny.model.to(device)
    games = [[Rigged(2), Rigged(6)] for _ in range(2)]
    plain, found = [], []
    monkeypatch.setattr(evaluate.Reader, "recorded_on", ())
    plain = evaluate.play(tiny, games[0], range(2), 0.6, 6, torch.Generator(device).manual_seed(0))
    monkeypatch.setattr(evaluate.Reader, "recorded_on", (device,))
    logits, record = evaluate.Reader.logits, evaluate.Recording._record
    if device == "cuda":
        monkeypatch.setattr(evaluate.Reader, "logits", lambda self, *args: (
            logits(self, *args) + self.mask.sum().item() * 0))  # waits: forbidden in a recording
    else:
        def fail(self, device):
            record(self, device)
            self.step()
            raise RuntimeError("operation not permitted when stream is capturing")
        monkeypatch.setattr(evaluate.Recording, "_record", fail)
    found = evaluate.play(tiny, games[1], range(2), 0.6, 6, torch.Generator(device).manual_seed(0))
    assert said(found) == said(plain) and evaluate.Reader.recorded_on == ()
    assert capsys.readouterr().out.count("--no-record") == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_recording_feeds_what_it_is_given(tiny, monkeypatch, device):
    """Catches a recording that plays with old inputs, or writes to memory that moved."""
    tiny.model.to(device)
    monkeypatch.setattr(evaluate.RoomyLayer, "block", 5)
    draw, heard = torch.Generator().manual_seed(0), {}
    reads = [(torch.randint(0, 100, (3, width), generator=draw).to(device),
              (torch.rand(3, width, generator=draw) < 0.8).long().to(device))
             for width in [4] + [1] * 13 + [3] + [1] * 4]
    reads[0][1][:, -1] = 1              # no row begins with nothing
    for kinds in ((), (device,)):
        monkeypatch.setattr(evaluate.Reader, "recorded_on", kinds)
        reader = evaluate.Reader(tiny, 3)
        with torch.no_grad():
            heard[kinds] = torch.stack([reader.read(*part).clone() for part in reads])
    gap = (heard[()] - heard[device,])[heard[()].isfinite()].abs()
    assert gap.max() < 1e-4 if device == "cpu" else gap.mean() < 0.05


@NEEDS_GPU
def test_sampler_and_update_agree_on_a_gpu(tiny):
    """Catches a mask or position error that only the GPU's attention kernels show."""
    tiny.model.cuda()
    envs = [Rigged(solve_at) for solve_at in (1, 3, 6)]
    episodes = evaluate.play(tiny, envs, range(3), 0.6, 8,
                             torch.Generator("cuda").manual_seed(0))
    for episode in episodes:
        ids = [t for turn in episode.turns for t in turn.prompt_ids + turn.answer_ids]
        mask = [m for turn in episode.turns
                for m in [0] * len(turn.prompt_ids) + [1] * len(turn.answer_ids)]
        row = torch.tensor([ids], device="cuda")
        with torch.no_grad():
            hidden = sft.trunk(tiny, row, torch.tensor([len(ids)], device="cuda"))
            found, _ = sft.token_logprobs(tiny, hidden, row, torch.tensor([mask], device="cuda"),
                                          0.6)
        seen = torch.tensor([p for turn in episode.turns for p in turn.logprobs])
        # bf16 matrices: a log-probability of about 6 is known to 1 part in 2^8
        assert (found.cpu() - seen).abs().mean() < 0.05
