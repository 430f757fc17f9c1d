"""Tests of the path of a walk (V-IRL): sampler, update, metrics, cells, the three scripts.

What is new against cards: an episode lies in many conversations, one for each position, and time
runs on through all of them; the sampler must forget without keeping what it forgot.

    python -m pytest tests/test_walks.py
"""

import collections
import json
import os
import shutil
import types

import numpy as np
import pytest
import torch

import evaluate
import rl
import sft
import virl_env
from backbones import virl_corpus
from conftest import tiny_backbone, with_eyes
from test_evaluate import said
from test_rl import assert_same_run, judged, settings
from test_sft import assert_one_line, command, copy_at, rows_of, shown
from test_virl_env import town, write_town
from verifier import VIRL_REWARDS, WalkVerdict

SEEN = (128, 64)        # pixels

# ------------------------------------------------------------------------------------------------
# Walks whose end is known, in a town of ten routes
# ------------------------------------------------------------------------------------------------

WRONG = ("no idea", "action: stop(", "action: turn_direction(up)", "action: forward() forward()")


class Guided(virl_env.Navigation):
    """A walk that hears some wrong answers, then the expert's, whatever a random model says.

    At position i of walk number n the first (5 i + 3 n) % 7 answers are wrong, at most one if
    n is even: those walks reach their end, the others miss a position on the way.
    """

    def reset(self, seed, *args, **how):
        self.number = sum(np.atleast_1d(seed))
        return super().reset(seed, *args, **how)

    def step(self, text):
        wrong = (5 * self.at + 3 * self.number) % 7
        wrong = wrong if self.number % 2 else wrong % 2
        heard = WRONG[self.used % len(WRONG)] if self.used < wrong else self.expert_answer()
        return super().step(heard)


@pytest.fixture
def folder(tmp_path):
    """The town of test_virl_env.py with ten routes: seven to train on, one val, two test."""
    (routes, number), mapping = town()
    write_town(tmp_path, [routes * 5, number], mapping)
    return str(tmp_path)


@pytest.fixture
def walker():
    """`tiny` that speaks of walks, and sees."""
    return with_eyes(tiny_backbone(virl_corpus))


def play(backbone, folder, count=5, temperature=0.6, longest=5, **how):
    """Guided walks, numbers 0 to count - 1."""
    envs = [Guided(folder, **how) for _ in range(count)]
    return evaluate.play(backbone, envs, range(count), temperature, longest,
                         torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------------------------
# Sampler and update
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"picture": SEEN}, {"fresh": True},
                                 {"picture": SEEN, "fresh": True}], ids=str)
def test_sampler_and_update_agree_on_walks(walker, folder, how):
    """Catches slots of a row that forgot and are seen again, rows mixed up when one leaves, and
    the picture of the position before."""
    walker.end_ids += range(60, 120)        # many ways to end: answers of unequal length
    episodes = play(walker, folder, **how)
    assert [episode.terminated for episode in episodes] == [True, False, True, False, True]
    rows = rl.conversations(episodes)
    talks = [talk for episode in episodes for talk in evaluate.positions(episode)]
    assert len(rows) == (sum(map(len, talks)) if how.get("fresh") else len(talks))
    assert len(talks) > 3 * len(episodes)
    assert all((row["picture"] is not None) == ("picture" in how) for row in rows)
    head = rl.build_value_head(32, 0)
    sampled = torch.tensor([p for e in episodes for turn in e.turns for p in turn.logprobs])
    for micro_batch in (1, 64):
        rl.score_all(walker, head, rows, 0.6, micro_batch)
        scored = torch.cat([r["logprobs"] for r in sorted(rows, key=lambda r: r["tries"])])
        assert (sampled - scored).abs().max() < 1e-4
    rl.add_advantages(rows, episodes, 0.9, 0.95)
    assert "self-check" in rl.self_check(rows, episodes, walker, "train")


def test_a_batch_changes_no_token_of_a_walk(walker, folder):
    """Catches a cache that forgets too much or too little: alone, a walk has no neighbours."""
    together = play(walker, folder, temperature=0)
    for number, episode in enumerate(together):
        one, = evaluate.play(walker, [Guided(folder)], [number], 0.0, 5)
        assert said([one]) == said([episode]) and one.prompt == episode.prompt


def test_positions_by_hand(walker, folder):
    """Catches positions that are told apart by their conversations: a fresh try begins one, too."""
    for how in ({}, {"fresh": True}):
        for go_on in (False, True):
            for episode in play(walker, folder, longest=1, go_on=go_on, **how):
                talks = evaluate.positions(episode)
                assert sum(talks, []) == episode.turns
                reached = len(episode.env.rail) if go_on else episode.env.at + 1
                assert len(talks) == reached and max(map(len, talks)) <= 2
                for tries in talks:
                    marks = [turn.verdict.correct for turn in tries]
                    assert marks in ([True], [False, True], [False, False])
                    news = [turn.new_conversation for turn in tries]
                    assert news == ([True] * len(tries) if how else [True, False][:len(tries)])
                    if how and len(tries) == 2:
                        assert tries[0].prompt_ids == tries[1].prompt_ids
                missed = [tries for tries in talks if not tries[-1].verdict.correct]
                assert evaluate.solved(episode) == (episode.terminated and not missed)


def test_room_does_not_grow_with_the_walk(walker, folder, monkeypatch):
    """Catches a cache that keeps finished conversations: hours and gigabytes on a long walk."""
    rooms, step = [], evaluate.Reader.step
    monkeypatch.setattr(evaluate.Reader, "step", lambda reader, *args: (
        rooms.append(reader.room), step(reader, *args))[1])
    rows = rl.conversations(play(walker, folder, 8))
    # one conversation that goes on, and beside it the longest first turn and answer
    longest = max(len(row["ids"]) for row in rows)
    assert max(rooms) <= 2 * longest + evaluate.Reader.BLOCK
    assert sum(len(row["ids"]) for row in rows if row["tries"][0][0] == 0) > 1.5 * max(rooms)


def test_advantages_run_through_all_positions_of_a_walk():
    """Catches an episode that ends where a conversation does: V of the next position is left out.

        k   r   V   conversation    delta                    A = delta + 0.855 * (A of the next)
        0   1   2   first           1 + 0.9 * 1 - 2 = -0.1   -0.1 + 0.855 * -2.45315 = -2.19744
        1  -1   1   second         -1 + 0.9 * 0 - 1 = -2     -2   + 0.855 * -0.53    = -2.45315
        2   1   0   second          1 + 0.9 * 4 - 0 =  4.6    4.6 + 0.855 * -6       = -0.53
        3  -2   4   third          -2 + 0       - 4 = -6     -6   (out of tries: nothing follows)
    """
    rewards, values, fresh = [1.0, -1.0, 1.0, -2.0], [2.0, 1.0, 0.0, 4.0], [1, 1, 0, 1]
    _, (episode, other) = judged(list(zip(rewards, values)), [(5.0, 4.0)])
    for turn, new in zip(episode.turns, fresh):
        turn.new_conversation = bool(new)
    rows = rl.conversations([episode, other])
    assert [row["tries"] for row in rows] == [[(0, 0)], [(0, 1), (0, 2)], [(0, 3)], [(1, 0)]]
    for row in rows:
        row["values"] = torch.tensor([[values, [4.0]][e][k] for e, k in row["tries"]])
    rl.add_advantages(rows[::-1], [episode, other], 0.9, 0.95)
    advantages = torch.tensor([-2.19744, -2.45315, -0.53, -6.0, 1.0])
    found = torch.cat([row["returns"] for row in rows]) - torch.tensor([*values, 4.0])
    assert torch.allclose(found, advantages, atol=1e-5)
    assert torch.allclose(torch.cat([row["advantages"] for row in rows]),
                          (advantages - advantages.mean()) / advantages.std(correction=0),
                          atol=1e-5)


def test_training_walks_no_held_out_route(walker, folder):
    """Catches test routes, the relative rule, or rails that go on, in what is learnt from."""
    args = settings(task="virl-l", routes=[folder], episodes=20, tries=1, max_new_tokens=1)
    for update in range(2):
        episodes = rl.collect(walker, args, update)
        assert all(rl.in_training(episode.env) for episode in episodes)
        assert all(episode.env.vocabulary == "compass" for episode in episodes)
        assert not any(episode.env.go_on for episode in episodes)
    rows = rl.conversations(episodes)
    rl.score_all(walker, rl.build_value_head(32, 0), rows, 0.6, 64)
    assert "no held-out hand or route" in rl.self_check(rows, episodes, walker, "train")
    held_out = virl_env.split_routes(10, "test")[0]
    episodes[3].env.route = episodes[3].env.atlas.route(held_out)
    with pytest.raises(sft.Problem, match="held-out"):
        rl.self_check(rows, episodes, walker, "train")


# ------------------------------------------------------------------------------------------------
# Counting
# ------------------------------------------------------------------------------------------------


def walked(*tries_at, crossings=True):
    """A finished walk. tries_at: (kind of action, "x+") for a wrong try, then a right one."""
    rail, turns = [], []
    for kind, marks in tries_at:
        seen = virl_env.NOTHING if kind == "forward" else "a mill"
        rail.append(types.SimpleNamespace(kind=kind, observation=seen))
        for i, mark in enumerate(marks):
            outcome = "correct" if mark == "+" else "misread"
            verdict = WalkVerdict(outcome, VIRL_REWARDS[outcome], "", None, mark == "+", crossings)
            turns.append(evaluate.Turn([], [], [], "", 0.0, "", verdict, i == 0, None, True))
    env = types.SimpleNamespace(rail=rail, tries=2, go_on=True)
    return evaluate.Episode(env, "", turns, terminated=True)


def test_walks_are_measured_by_hand():
    """Catches tries that count once, tries after a miss in the paper's number, and walks called
    a success because they came to their end."""
    missed = walked(("first turn", "xx"), ("forward", "+"), ("later turn", "x+"), ("stop", "+"))
    found = evaluate.measure_walks([missed])                    # the docstring's example
    assert (found["per_step"], found["steps"], found["success"]) == (0.0, 2, 0.0)
    assert (found["per_step_on"], found["steps_on"]) == (3 / 6, 6)
    late = walked(("first turn", "x+"), ("forward", "+"), ("later turn", "xx"), ("stop", "+"))
    whole = walked(("first turn", "+"), ("forward", "x+"), ("stop", "+"), crossings=False)
    walks = [missed, late, whole]
    found = evaluate.measure_walks(walks)
    assert (found["count"], found["hits"]) == (3, 1)
    assert found["interval"] == pytest.approx(evaluate.wilson(1, 3))        # a walk is a group
    # missed 0 of 2; late 2 of 5, its stop left out; whole 3 of 4
    assert (found["per_step"], found["steps"]) == (5 / 11, 11)
    tries = [(walk, hit) for walk, marks in enumerate(("00", "01100", "1011")) for hit in
             map(int, marks)]
    assert found["kinds"]["every action"] == evaluate.rate(tries)
    assert (found["per_step_on"], found["steps_on"]) == (9 / 16, 16)
    assert (found["turns"], found["turn_tries"]) == (3 / 9, 9)
    counts = {which: {kind: (round(k["rate"] * k["count"]), k["count"])
                      for kind, k in found[which].items()} for which in ("kinds", "kinds_on")}
    assert counts["kinds"] == {"every action": (5, 11), "first turn": (2, 5), "forward": (2, 3),
                               "later turn": (0, 2), "stop": (1, 1)}
    assert counts["kinds_on"] == {"every action": (9, 16), "first turn": (2, 5), "forward": (3, 4),
                                  "later turn": (1, 4), "stop": (3, 3)}
    # 11 positions, 6 of them right at once; eyes are judged at the first answer only, and apart
    # where there is a landmark (8) and where there is none (the 3 forward)
    assert found["first_try"] == 6 / 11 and found["positions"] == 11
    assert (found["landmarks_present"], found["positions_present"]) == (4 / 8, 8)
    assert (found["landmarks_empty"], found["positions_empty"]) == (2 / 3, 3)
    assert found["whole_right"] == 4 / 11       # `whole` misreads every intersection
    assert found["crossings_read"] == 8 / 11 and found["errors"] == {"misread": 5 / 11}
    assert found["cut"] == 0.0


def test_one_walk_that_goes_on_holds_the_papers_walk(walker, folder):
    """Catches a rail that goes on in another way than up to the miss the paper's does."""
    ends, on = (play(walker, folder, 6, go_on=go_on, longest=1) for go_on in (False, True))
    one, other = evaluate.measure_walks(ends), evaluate.measure_walks(on)
    assert one["kinds"] == other["kinds"] == one["kinds_on"] != other["kinds_on"]
    assert one["success"] == other["success"] == 0.5
    assert other["steps_on"] > other["steps"] == one["steps_on"]


def test_cells_of_walks_are_what_they_say():
    """Catches a visual shift that is none, moves the rule as well, or leaves a city out."""
    for cell, how in evaluate.WALK_CELLS.items():
        envs, seeds = evaluate.cell_environments(cell, "test", 18, "virl-l")
        words = virl_env.RULES["relative" if cell in ("ood", "both", "fake") else "absolute"]
        assert {env.vocabulary for env in envs} == {words}
        assert {env.scored for env in envs} == {"compass" if cell == "fake" else words}
        cities = collections.Counter(env.atlas.where for env in envs)
        if "elsewhere" in how:
            assert cities == dict.fromkeys(sft.OTHER_CITIES, 2) and len(cities) == 9
            assert all(len(env.numbers) == 120 for env in envs)         # all routes there
        else:
            assert cities == {sft.TRAINING_CITY: 18}
            assert envs[0].numbers == virl_env.split_routes(1000, "test")
        assert all(env.go_on and env.tries == 2 for env in envs)
        prompts = [env.reset(seed)[0]["text"] for env, seed in zip(envs, seeds)]
        again, seeds = evaluate.cell_environments(cell, "test", 27, "virl-l")
        assert prompts == [env.reset(seed)[0]["text"] for env, seed in zip(again, seeds)][:18]


# ------------------------------------------------------------------------------------------------
# The three scripts
# ------------------------------------------------------------------------------------------------

FLAGS = ["--task", "virl-l", "--model", "model", "--routes", "town", "town", "--ood"]
SHORT = ["--init", "model", "--updates", 3, "--episodes", 4, "--max-new-tokens", 1, "--epochs", 2,
         "--minibatch", 8, "--eval-hands", 1, "--lr", 1e-3]


@pytest.fixture(scope="module")
def walker_folder(tmp_path_factory):
    """A saved `walker`. Tests only read it."""
    return sft.save_checkpoint(tmp_path_factory.mktemp("saved") / "model",
                               with_eyes(tiny_backbone(virl_corpus)))


@pytest.fixture
def at_work(walker_folder, tmp_path, monkeypatch):
    """A folder to work in: a model in "model", ten routes in "town", walks that are guided."""
    shutil.copytree(walker_folder, tmp_path / "model")
    (tmp_path / "town").mkdir()
    (routes, number), mapping = town()
    write_town(tmp_path / "town", [routes * 5, number], mapping)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(virl_env, "Navigation", Guided)
    monkeypatch.setattr(sft, "start_step", lambda args: 2)
    virl_env.open_atlas.cache_clear()       # "town" is another folder in each test
    return tmp_path


def test_walks_killed_and_resumed_are_bit_for_bit_the_same(at_work, monkeypatch, capsys):
    """Catches walks that depend on what was walked before, and a resume that draws others."""
    def go(patch, out, *flags):
        code, error = command(patch, capsys, rl, *FLAGS, *SHORT, "--out", out, *flags)
        assert code == 0, error

    with monkeypatch.context() as patch:
        copy_at(patch, "whole", "killed", rl, "ppo_update", 2)
        go(patch, "whole")
    go(monkeypatch, "killed", "--resume")
    assert_same_run(at_work / "whole", at_work / "killed")
    rows = rows_of(at_work / "whole" / "metrics.jsonl")
    assert all(0 < row["per_step"] < 1 and row["tries"] > 3 for row in rows)
    cells = rows_of(at_work / "whole" / "eval.jsonl")[-1]["cells"]
    assert list(cells) == ["seen/id", "held-out/id", "held-out/ood", "all/visual"]
    for cell in cells.values():
        assert cell["message"] == cell["success"] - cell["fresh"] and "fresh_interval" in cell


@pytest.mark.parametrize("task", ["virl-l", "virl-vl"])
def test_every_script_walks(at_work, monkeypatch, capsys, task):
    """Catches a task that is a choice of --task and wired nowhere, and transcripts in which the
    next prompt is passed off as the verifier's words."""
    flags = ["--task", task, *FLAGS[2:]]
    if task == "virl-vl":       # in words: the next test
        code, error = command(monkeypatch, capsys, sft, *flags[:-1], "--steps", 2, "--batch", 3,
                              "--out", "run")
        assert code == 0, error
        assert {"loss", "id_nll"} <= set(rows_of(at_work / "run" / "metrics.jsonl")[-1])
    else:
        (at_work / "run").mkdir()
        (at_work / "run" / "args.json").write_text('{"task": "virl-l", "routes": ["town"]}')
        os.symlink(at_work / "model", at_work / "run" / "step-000002")
    cells = ["id", "ood", "visual", "both", "fake"] if task == "virl-l" else ["id", "both"]
    code, out, error = shown(
        monkeypatch, capsys, evaluate, *flags[:2], "--model", "run/step-000002", *flags[4:-1],
        *(["--ood"] if task == "virl-l" else ["--cells", *cells]), "--splits", "test", "--hands", 2,
        "--show", 1, "--max-new-tokens", 4, "--out", "found.json")
    assert code == 0, error
    assert "first turn" in out and "rail goes on" in out
    assert "] Not right: there is no action field" in out and "] Correct." in out
    places = ["all" if cell in ("visual", "both") else "held-out" for cell in cells]
    assert list(json.loads((at_work / "found.json").read_text())) == [
        f"{place}/{cell}" for place, cell in zip(places, cells)]
    code, error = command(monkeypatch, capsys, evaluate, *flags[:2], *flags[4:], "--run", "run",
                          "--steps", 2, "--splits", "test", "--hands", 1, "--max-new-tokens", 2)
    assert code == 0, error
    assert list(rows_of(at_work / "run" / "eval.jsonl")[0]["cells"]) == [
        "held-out/id", "held-out/ood", "all/visual"]
    code, out, error = shown(monkeypatch, capsys, rl, *flags, *SHORT, "--inspect")
    assert code == 0 and "pos  token" in out, error


def test_sft_of_walks_killed_and_resumed_is_the_same(at_work, monkeypatch, capsys):
    """Catches a resume that draws other positions, and held-out routes in what SFT is taught."""
    asked, start = [], Guided.__init__
    monkeypatch.setattr(Guided, "__init__", lambda env, *args, **how: asked.append(how) or
                        start(env, *args, **how))
    flags = [*FLAGS[:6], "--steps", 2, "--save-every", 1, "--batch", 4, "--out"]
    with monkeypatch.context() as patch:
        copy_at(patch, "whole", "killed", sft, "sft_loss", 3)   # a step, its probe, the second step
        code, error = command(patch, capsys, sft, *flags, "whole")
    assert code == 0, error
    training = [how for how in asked if how["split"] == "train"][-8:]
    assert all(how.get("rule", "absolute") == "absolute" and how["where"] == "town"
               for how in training)
    # "all": for the length of an answer alone
    assert {how["split"] for how in asked} == {"train", "val", "all"}
    code, error = command(monkeypatch, capsys, sft, *flags, "killed", "--resume")
    assert code == 0, error
    rows = rows_of(at_work / "whole" / "metrics.jsonl")
    assert rows == rows_of(at_work / "killed" / "metrics.jsonl") and len(rows) == 2
    assert (at_work / "whole" / "step-000002" / "model.safetensors").read_bytes() == (
        at_work / "killed" / "step-000002" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("script", [sft, evaluate, rl])
@pytest.mark.parametrize("flags, words", [
    (["--task", "gp-l", "--routes", "town"], ["--routes", "gp-l"]),
    (["--routes", "nowhere"], ["nowhere"]),
    (["--routes", "town", "nowhere"], ["nowhere"]),
    (["--routes", "broken"], ["broken/route_infos.json", "JSON"]),
    (["--task", "virl-vl", "--routes", "blind"], ["blind/street_views"]),
    (["--routes", "small"], ["too few", "--splits all"]),
    (["--no-announce"], ["--no-announce"]),
    (["--model", "nowhere"], ["nowhere"]),
])
def test_bad_flags_and_routes_end_in_one_line(at_work, monkeypatch, capsys, script, flags, words):
    """Catches a traceback, or data that is found damaged after an hour of training."""
    infos, mapping = town()
    for name, text in (("broken", "[[{"), ("blind", infos), ("small", infos)):
        (at_work / name).mkdir()
        write_town(at_work / name, text, mapping, pictures=False)
    basis = [] if "--model" in flags else ["--model", "model"]
    code, error = command(monkeypatch, capsys, script, "--task", "virl-l", *basis, *flags)
    assert_one_line(code, error, f"{script.__name__}.py: ", *words)


def test_a_start_is_known_by_its_routes(at_work):
    """Catches "made by an earlier run" after the routes of a folder were replaced."""
    flags = FLAGS[:6]
    found = sft.content_digest(sft.flags(flags))
    assert sft.content_digest(sft.flags(flags)) == found
    path = at_work / "town" / "route_infos.json"
    path.write_text(path.read_text().replace("Diner", "Mill"))
    assert sft.content_digest(sft.flags(flags)) != found


def test_defaults_are_those_of_the_task():
    """Catches five tries at each position, and a flag that was given but overruled."""
    for flags, tries, episodes in (([], 5, 256), (["--task", "virl-l"], 2, 64),
                                   (["--task", "virl-vl", "--tries", "3"], 3, 64)):
        found = rl.flags(flags)
        assert (found.tries, found.episodes) == (tries, episodes)


def test_prompts_of_the_corpus_are_learnt_but_for_their_first_token(tiny):
    """Catches a first token that is scored (nothing predicts it), and prompts that are left out."""
    row = sft.encode(tiny, virl_corpus.backbone_conversations(
        np.random.default_rng(0), 1, cities=1)[0])
    mask, first = row["mask"], len(sft.user_ids(tiny, "", True)) - 1
    assert mask[0] == 0 and mask[1:first + 1] == [1] * first and len(row["ids"]) == len(mask)
    assert sum(mask) > len(mask) // 2


def test_no_announce_reaches_training_and_measuring():
    """Catches eyes that are trained to find an intersection and measured where it is told."""
    for flags, told in (([], True), (["--no-announce"], False)):
        args = rl.flags(["--task", "virl-vl", *flags])
        envs, _ = evaluate.cell_environments("visual", "test", 1, "virl-vl",
                                             sft.picture_options(args))
        for env in [evaluate.new_game("virl-vl", **sft.game_options(args)), *envs]:
            assert env.announce is told and env.picture == SEEN
