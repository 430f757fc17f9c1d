"""Tests of the path of a walk (V-IRL): sampler, update, metrics, cells, the three scripts.

What is new against cards: an episode lies in many conversations, one for each position, and time
runs on through all of them; the sampler must forget without keeping what it forgot.

    python -m pytest tests/test_walks.py
"""

import collections
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import rl
import sft
import virl_env
from conftest import tiny_backbone
from test_evaluate import assert_sampler_agrees, said
from test_rl import assert_same_run, judged, settings
from test_sft import Killed, assert_one_line, command, kill_at, rows_of
from test_virl_env import town, write_town
from verifier import VIRL_REWARDS, WalkVerdict

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
    made = tiny_backbone(virl_env)
    return sft.wrap_backbone(made.model, made.tokenizer,
                             processor=sft.build_processor(made.model, made.tokenizer))


def play(backbone, folder, count=5, keep_cache=True, temperature=0.6, longest=5, **how):
    """Guided walks, numbers 0 to count - 1."""
    envs = [Guided(folder, **how) for _ in range(count)]
    return evaluate.play(backbone, envs, range(count), temperature, longest,
                         torch.Generator().manual_seed(3), keep_cache)


# ------------------------------------------------------------------------------------------------
# Sampler and update
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture", [None, (128, 64)])
@pytest.mark.parametrize("keep_cache", [True, False])
def test_sampler_and_update_agree_on_walks(walker, folder, keep_cache, picture):
    """Catches columns moved to the wrong row or out of order when a row forgets, old columns that
    are still seen, and the picture of the position before."""
    walker.end_ids += range(60, 120)        # many ways to end: answers of unequal length
    episodes = play(walker, folder, keep_cache=keep_cache, picture=picture)
    assert [episode.terminated for episode in episodes] == [True, False, True, False, True]
    if picture is None:
        assert_sampler_agrees(walker, episodes, 0.6)
    rows = rl.conversations(episodes)
    assert len(rows) == sum(map(len, map(evaluate.positions, episodes))) > 3 * len(episodes)
    assert all((row["picture"] is None) == (picture is None) for row in rows)
    head = rl.build_value_head(32, 0)
    sampled = torch.tensor([p for e in episodes for turn in e.turns for p in turn.logprobs])
    for micro_batch in (1, 64):
        rl.score_all(walker, head, rows, 0.6, micro_batch)
        scored = torch.cat([r["logprobs"] for r in sorted(rows, key=lambda r: r["tries"])])
        assert (sampled - scored).abs().max() < 1e-4
    rl.add_advantages(rows, episodes, 0.9, 0.95)
    assert "max |log ratio|" in rl.self_check(rows, episodes, walker, "train")


@pytest.mark.parametrize("temperature", [0, 0.6])
def test_cache_changes_no_token_of_a_walk(walker, folder, temperature):
    """Catches a cache that forgets too much or too little."""
    assert said(play(walker, folder, temperature=temperature)) == \
        said(play(walker, folder, temperature=temperature, keep_cache=False))


def test_columns_of_finished_conversations_are_dropped(walker, folder, monkeypatch):
    """Catches a cache that grows with the walk: hours and gigabytes on a long one."""
    widths, read = [], evaluate.Reader.read

    def watched(reader, *args):
        logits = read(reader, *args)
        assert all(layer.get_seq_length() in (0, reader.mask.shape[1])
                   for layer in reader.cache.layers)
        widths.append(reader.mask.shape[1])
        return logits

    monkeypatch.setattr(evaluate.Reader, "read", watched)
    rows = rl.conversations(play(walker, folder, 8))
    # one conversation that goes on, and beside it the longest first turn and answer
    assert max(widths) <= 2 * max(len(row["ids"]) for row in rows)
    assert sum(len(row["ids"]) for row in rows if row["tries"][0][0] == 0) > 2 * max(widths)


def test_forgetting_by_hand(walker):
    """Catches visible columns that are cut off, or lose their order: the docstring's example."""
    reader = evaluate.Reader(walker, 2)
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0]])
    layer = evaluate.RoomyLayer()
    numbers = torch.arange(12.0).reshape(2, 1, 6, 1)        # row 0: 0 to 5, row 1: 6 to 11
    layer.update(numbers, -numbers)
    reader.mask, reader.cache.layers = mask, [layer, evaluate.PictureLayer()]
    reader.forget([0])
    assert reader.mask.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert layer.keys[1].flatten().tolist() == [7, 8, 9]
    assert layer.values[1].flatten().tolist() == [-7, -8, -9]
    keys, _ = layer.update(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1))
    assert keys[1].flatten().tolist() == [7, 8, 9, 1]
    reader.mask = torch.cat([reader.mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    reader.forget([0, 1])
    assert reader.mask.shape == (2, 0) and layer.get_seq_length() == 0


def test_advantages_run_through_all_positions_of_a_walk():
    """Catches an episode that ends where a conversation does: V of the next position is left out.

        k   r   V   conversation    delta                    A = delta + 0.855 * (A of the next)
        0   1   2   first           1 + 0.9 * 1 - 2 = -0.1   -0.1 + 0.855 * -2.45315 = -2.19744
        1  -1   1   second         -1 + 0.9 * 0 - 1 = -2     -2   + 0.855 * -0.53    = -2.45315
        2   1   0   second          1 + 0.9 * 4 - 0 =  4.6    4.6 + 0.855 * -6       = -0.53
        3  -2   4   third          -2 + 0       - 4 = -6     -6   (out of tries: nothing follows)
    """
    rewards, values, fresh = [1.0, -1.0, 1.0, -2.0], [2.0, 1.0, 0.0, 4.0], [1, 1, 0, 1]
    _, (episode,) = judged(list(zip(rewards, values)))
    for turn, new in zip(episode.turns, fresh):
        turn.new_conversation = bool(new)
    rows = rl.conversations([episode])
    assert [row["tries"] for row in rows] == [[(0, 0)], [(0, 1), (0, 2)], [(0, 3)]]
    for row in rows:
        row["values"] = torch.tensor([values[k] for _, k in row["tries"]])
    rl.add_advantages(rows[::-1], [episode], 0.9, 0.95)
    advantages = torch.tensor([-2.19744, -2.45315, -0.53, -6.0])
    found = torch.cat([row["returns"] for row in rows]) - torch.tensor(values)
    assert torch.allclose(found, advantages, atol=1e-5)
    assert torch.allclose(torch.cat([row["advantages"] for row in rows]),
                          (advantages - advantages.mean()) / advantages.std(correction=0))


def test_training_walks_no_held_out_route(walker, folder):
    """Catches test routes, the relative rule, or rails that go on, in what is learnt from."""
    args = settings(task="virl-l", routes=folder, episodes=20, tries=1, max_new_tokens=1)
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
        rail.append(types.SimpleNamespace(kind=kind))
        for i, mark in enumerate(marks):
            outcome = "correct" if mark == "+" else "misread"
            verdict = WalkVerdict(outcome, VIRL_REWARDS[outcome], "", None, mark == "+", crossings)
            turns.append(evaluate.Turn([], [], [], "", 0.0, "", verdict, i == 0))
    env = types.SimpleNamespace(rail=rail, atlas=types.SimpleNamespace(where="Alder"))
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
    found = evaluate.measure_walks([missed, late, whole])
    assert (found["count"], found["hits"], found["interval"]) == (3, 1, evaluate.wilson(1, 3))
    # missed 0 of 2; late 2 of 5, its stop left out; whole 3 of 4
    assert (found["per_step"], found["steps"]) == (5 / 11, 11)
    assert found["kinds"]["every action"] == {"rate": 5 / 11, "count": 11,
                                              "interval": evaluate.wilson(5, 11)}
    assert (found["per_step_on"], found["steps_on"]) == (9 / 16, 16)
    assert (found["turns"], found["turn_tries"]) == (3 / 9, 9)
    counts = {which: {kind: (round(k["rate"] * k["count"]), k["count"])
                      for kind, k in found[which].items()} for which in ("kinds", "kinds_on")}
    assert counts["kinds"] == {"every action": (5, 11), "first turn": (2, 5), "forward": (2, 3),
                               "later turn": (0, 2), "stop": (1, 1)}
    assert counts["kinds_on"] == {"every action": (9, 16), "first turn": (2, 5), "forward": (3, 4),
                                  "later turn": (1, 4), "stop": (3, 3)}
    assert found["kinds"]["later turn"]["interval"] == evaluate.wilson(0, 2)
    # 11 positions, 6 of them right at once; eyes are judged at the first answer only
    assert found["first_try"] == found["landmarks_read"] == 6 / 11
    assert found["crossings_read"] == 8 / 11 and found["errors"] == {"misread": 5 / 11}


def test_cities_are_measured_apart(capsys):
    """Catches walks counted for another city, and a city that the table leaves out."""
    walks = [walked(("first turn", "+"), ("stop", "+")), walked(("first turn", "xx")),
             walked(("first turn", "x+"), ("stop", "+"))]
    assert evaluate.measure_places(walks) == {}                 # one city: nothing to set apart
    walks[1].env.atlas.where = "Brim"
    found = evaluate.measure_places(walks)["places"]
    assert list(found) == ["Alder", "Brim"]
    assert [(m["success"], m["per_step"], m["steps"]) for m in found.values()] == [
        (1.0, 4 / 5, 5), (0.0, 0.0, 2)]
    evaluate.show_kinds({"all/visual": evaluate.measure_walks(walks) | {"places": found}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Brim", "0.0%", "[", "0%,", "66%]", "of", "2", "0.0%", "[", "0%,", "66%]", "of",
            "2"] in lines


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

FLAGS = ["--task", "virl-l", "--model", "model", "--routes", "town", "--other-routes", "town",
         "--ood"]
SHORT = ["--from-backbone", "--updates", 3, "--episodes", 4, "--max-new-tokens", 4, "--epochs", 2,
         "--minibatch", 8, "--eval-hands", 2, "--eval-every", 2, "--kl-coef", 0.05, "--lr", 1e-3]


@pytest.fixture
def at_work(walker, tmp_path, monkeypatch):
    """A folder to work in: a model in "model", ten routes in "town", walks that are guided."""
    sft.save_checkpoint(tmp_path / "model", walker)
    (tmp_path / "town").mkdir()
    (routes, number), mapping = town()
    write_town(tmp_path / "town", [routes * 5, number], mapping)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(virl_env, "Navigation", Guided)
    virl_env.open_atlas.cache_clear()       # "town" is another folder in each test
    return tmp_path


def test_walks_killed_and_resumed_are_bit_for_bit_the_same(at_work, monkeypatch, capsys):
    """Catches walks that depend on what was walked before, and a resume that draws others."""
    def go(patch, out, *flags):
        code, error = command(patch, capsys, rl, *FLAGS, *SHORT, "--out", out, *flags)
        assert code == 0, error

    go(monkeypatch, "whole")
    for number, kill in enumerate(((rl, "collect", 2), (rl, "save_checkpoint", 2, True))):
        with monkeypatch.context() as patch:
            kill_at(patch, *kill)
            with pytest.raises(Killed):
                go(patch, f"killed{number}")
        go(monkeypatch, f"killed{number}", "--resume")
        assert_same_run(at_work / "whole", at_work / f"killed{number}")
    rows = rows_of(at_work / "whole" / "metrics.jsonl")
    assert all(0 < row["per_step"] < 1 and row["tries"] > 3 for row in rows)
    cells = rows_of(at_work / "whole" / "eval.jsonl")[-1]["cells"]
    assert list(cells) == ["seen/id", "seen/ood", "all/visual", "held-out/id", "held-out/ood"]
    evaluate.plot(at_work, at_work / "figure.png", "virl-l")
    assert Image.open(at_work / "figure.png").width > 1000
    lines = capsys.readouterr().out.splitlines()
    assert any("held-out/ood, the rail goes on" in line for line in lines)


@pytest.mark.parametrize("task", ["virl-l", "virl-vl"])
def test_every_script_walks(at_work, monkeypatch, capsys, task):
    """Catches a task that is a choice of --task and wired nowhere, and transcripts in which the
    next prompt is passed off as the verifier's words."""
    flags = ["--task", task, *FLAGS[2:]]
    code, error = command(monkeypatch, capsys, sft, *flags, "--steps", 2, "--start-step", 1,
                          "--batch", 3, "--out", "run")
    assert code == 0, error
    row = rows_of(at_work / "run" / "metrics.jsonl")[-1]
    assert {"id_nll", "ood_nll", "visual_nll"} <= set(row)
    monkeypatch.setattr("sys.argv", [
        "evaluate.py", *flags[:2], "--model", "run/step-000002", *flags[4:], "--splits", "test",
        "--hands", "3", "--show", "1", "--show-positions", "2", "--max-new-tokens", "4", "--out",
        "found.json"])
    assert sft.guarded(evaluate.main) == 0
    shown = capsys.readouterr().out
    assert "more positions" in shown and "first turn" in shown and "rail goes on" in shown
    assert "] Not right: there is no action field" in shown and "] Correct." in shown
    found = json.loads((at_work / "found.json").read_text())
    assert list(found) == ["held-out/id", "held-out/ood", "all/visual", "all/both",
                           "held-out/fake"]
    pictures = sorted(path.name for path in (at_work / "runs" / "shown").glob("held-out-id-*"))
    assert pictures == ["held-out-id-1.png", "held-out-id-2.png"][:2 * (task == "virl-vl")]
    code, error = command(monkeypatch, capsys, evaluate, *flags[:2], *flags[4:], "--run", "run",
                          "--splits", "test", "--hands", 2, "--max-new-tokens", 2)
    assert code == 0, error
    assert list(rows_of(at_work / "run" / "eval.jsonl")[0]["cells"]) == [
        "held-out/id", "held-out/ood", "all/visual"]
    monkeypatch.setattr("sys.argv", ["rl.py", *flags, *map(str, SHORT), "--inspect"])
    assert sft.guarded(rl.main) == 0
    assert "pos  token" in capsys.readouterr().out


def test_sft_shows_training_routes_under_the_training_rule(at_work, monkeypatch):
    """Catches held-out routes in SFT, and a data order that ignores seed or step."""
    asked = []
    monkeypatch.setattr(Guided, "__init__", lambda env, *args, **how: asked.append(how) or
                        virl_env_init(env, *args, **how))
    caught = {}
    monkeypatch.setattr(sft, "train", lambda backbone, draw, *_, **__: caught.update(draw=draw))
    args = settings(task="virl-l", model="model", routes="town", device="cpu", steps=4,
                    start_step=2, batch=4, save_every=4, resume=False, freeze=None,
                    drop_pictures=False)
    sft.run_sft(args, at_work / "run")
    assert {how["split"] for how in asked} == {"val"}
    asked.clear()
    first = [talk[0]["content"] for talk in caught["draw"](0)]
    assert asked == [{"split": "train", "where": "town"}] * 4
    assert first == [talk[0]["content"] for talk in caught["draw"](0)]
    assert first != [talk[0]["content"] for talk in caught["draw"](1)]


virl_env_init = virl_env.Navigation.__init__


@pytest.mark.parametrize("script", [sft, evaluate, rl])
@pytest.mark.parametrize("flags, words", [
    (["--task", "gp-l", "--routes", "town"], ["--routes", "gp-l"]),
    (["--routes", "nowhere"], ["nowhere"]),
    (["--other-routes", "nowhere"], ["nowhere"]),
    (["--routes", "broken"], ["broken/route_infos.json", "JSON"]),
    (["--task", "virl-vl", "--routes", "blind"], ["blind/street_views", "route 0"]),
    (["--routes", "small"], ["too few", "--splits all"]),
    (["--no-announce"], ["--no-announce", "--task virl-vl"]),
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


@pytest.mark.parametrize("script", [sft, evaluate, rl])
def test_missing_backbone_says_how_to_build_it(monkeypatch, capsys, script, tmp_path):
    """Catches "no config.json" where a student should read which command comes first."""
    monkeypatch.setitem(sft.DEFAULT_MODEL, "virl-l", tmp_path / "backbones" / "virl")
    assert_one_line(*command(monkeypatch, capsys, script, "--task", "virl-l"), "--build virl")


def test_defaults_are_those_of_the_task(monkeypatch):
    """Catches five tries at each position, and a flag that was given but overruled."""
    found = {}
    monkeypatch.setattr(rl, "run", lambda args: found.update(vars(args)))
    for flags, tries, episodes in (([], 5, 256), (["--task", "virl-l"], 2, 64),
                                   (["--task", "virl-vl", "--tries", "3"], 3, 64)):
        monkeypatch.setattr("sys.argv", ["rl.py", *flags])
        rl.main()
        assert (found["tries"], found["episodes"]) == (tries, episodes)
        assert found["sft_start_step"] == (12 if flags else 60)


def test_backbone_of_walks_is_built_from_its_seed(monkeypatch, tmp_path):
    """Catches a recipe that is not deterministic, or that writes over the backbone of cards."""
    monkeypatch.setattr(sft, "HERE", tmp_path)
    corpus = virl_env.backbone_conversations
    monkeypatch.setattr(virl_env, "backbone_conversations",
                        lambda rng, count: corpus(rng, count, cities=1))
    first, second = ((sft.build_backbone("virl", tmp_path / name, 0, 2, 2, 1e-3, False) /
                      "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second and [p.name for p in (tmp_path / "backbones").iterdir()] == ["virl"]
    made = sft.load_backbone(tmp_path / "backbones" / "virl")
    assert len(made.tokenizer(" o'clock")["input_ids"]) > 0 and made.processor is None


def test_first_lesson_of_walks_is_to_repeat():
    """Catches a lesson whose answer is not in its question, or that never meets some pieces."""
    pieces = [*virl_env.phrases(), *"0aZ"]
    made = sft.repeating(pieces)(np.random.default_rng(0), 600)
    said = "".join(question["content"] for question, _ in made)
    assert len(made) == 600 and all(piece in said for piece in pieces)
    for question, answer in made:
        assert question["content"] == answer["content"] and len(question["content"]) >= 6
        assert (question["learn"], answer["learn"]) == (False, True)


def test_prompts_of_the_corpus_are_learnt_but_for_their_first_token(tiny):
    """Catches a first token that is scored (nothing predicts it), and prompts that are left out."""
    ids, mask = sft.encode(tiny, virl_env.backbone_conversations(
        np.random.default_rng(0), 1, cities=1)[0])
    first = len(sft.user_ids(tiny, "", True)) - 1
    assert mask[0] == 0 and mask[1:first + 1] == [1] * first and len(ids) == len(mask)
    assert sum(mask) > len(mask) // 2


def test_lessons_follow_each_other(monkeypatch, tmp_path):
    """Catches a lesson that is skipped, never ends, or does not begin with its first batch."""
    class Enough(Exception):
        """The data are all this asks for."""

    drawn = {}

    def train(backbone, draw, *others, **more):
        for step in range(12):
            ask, answer = (draw(step)[0][i]["content"] for i in (0, -1))
            drawn[step] = ("repeat" if ask == answer else
                           "recall" if ask.startswith("1. ") else "corpus")
        raise Enough

    monkeypatch.setattr(sft, "train", train)
    for name in ("recall_conversations", "backbone_conversations"):
        made = getattr(virl_env, name)
        monkeypatch.setattr(virl_env, name,
                            lambda rng, count, made=made: made(rng, count, cities=1))
    with pytest.raises(Enough):
        sft.build_backbone("virl", tmp_path, 0, 12, 1e-3, False, repeat=4, recall=3, batch=2)
    assert list(drawn.values()) == ["repeat"] * 4 + ["recall"] * 3 + ["corpus"] * 5


def test_the_shipped_backbone_follows_written_steps():
    """Catches weights that were shipped before they could copy a step's words from the prompt."""
    shipped = sft.load_backbone(sft.DEFAULT_MODEL["virl-l"])
    rows = []
    for talk in virl_env.backbone_conversations(np.random.default_rng(99), 48):
        talk[0]["learn"] = False
        rows.append(sft.encode(shipped, talk))
    # 0.02 where the skill is there; 0.4 where names and directions are guessed
    assert sft.sft_loss(shipped, rows, 16, backward=False)[0] < 0.06


def test_the_shipped_backbone_reads_street_views():
    """Catches weights that were shipped without their eyes: virl-vl would be walked blind."""
    shipped = sft.load_backbone(sft.DEFAULT_MODEL["virl-vl"])
    assert shipped.why_blind == ""
    # 40 views, 200 words, three standard deviations below 95 %; "no place" everywhere makes 70
    assert sft.read_right(shipped, "virl", sft.TRAINING_CITY, 40) > 0.9


def test_no_announce_reaches_training_and_measuring(monkeypatch):
    """Catches eyes that are trained to find an intersection and measured where it is told."""
    found = {}
    monkeypatch.setattr(rl, "run", lambda args: found.update(args=args))
    for flags, told in (([], True), (["--no-announce"], False)):
        monkeypatch.setattr("sys.argv", ["rl.py", "--task", "virl-vl", *flags])
        rl.main()
        how = sft.game_options(found["args"])
        shown = sft.picture_options(found["args"])
        envs, _ = evaluate.cell_environments("visual", "test", 3, "virl-vl", shown)
        for env in [evaluate.new_game("virl-vl", **how), *envs]:
            assert env.announce is told and env.picture == (128, 64)
        assert ("--no-announce" in sft.flags_again(found["args"])) is not told
