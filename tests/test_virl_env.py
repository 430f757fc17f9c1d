"""Tests of virl_env.py: the rail, the environment, views, the released format, the terminal.

`tiny_folder` writes a hand-made town in the released format: an L of two streets whose rail can be
checked by hand.

    python -m pytest tests/test_virl_env.py
"""

import collections
import doctest
import hashlib
import io
import json
import math
import pickle
import random
import re
import sys

import numpy as np
import pytest
from PIL import Image

import virl_env
from cities import released
from cities.generate import CITIES
from verifier import verify_virl
from virl_env import (COMPASS, CROSSING, NOTHING, PICTURE, RELATIVE, RULES, VOCABULARIES, Atlas,
                      Navigation, RouteProblem, bend, expert_conversation, folder_files,
                      four_views, lay_rail, look_around, open_atlas, relative_word, split_routes,
                      view)

METRE = 1 / 111_320         # degrees of latitude


# ------------------------------------------------------------------------------------------------
# A hand-made town at the equator, where a degree of longitude is as long as one of latitude:
# start (0, 0) -> 50 m north -> 50 m east -> 12 m east -> the end. Panoramas every 10 m.
# ------------------------------------------------------------------------------------------------


def town():
    """(infos, mapping): the two data files of the town as Python objects."""
    def at(x, y):
        return [y * METRE, x * METRE]

    spots = [(0, y) for y in range(0, 51, 10)] + [(x, 50) for x in range(10, 51, 10)] + [(62, 50)]
    blocks = [("Joe's \"Big\" Diner, Inc. is on your left", "2 (north)"),
              ("No landmark nearby", "90 (east)"), ("The destination St. Mark's is on your front",
                                                    "91 (east)")]
    text = "".join(f'\n{{\n"intersection_idx": "{i}",\n"landmarks": "{seen}",\n"distance": "5 m",'
                   f'\n"human_heading": "0",\n"to_next_intersection_heading": "{goes}",\n}}\n'
                   for i, (seen, goes) in enumerate(blocks, 1))
    route = {"start_place": {"relocated_geocode": at(0, 0)}, "dest_place": {"name": "St. Mark's"},
             "route_results": {"geocode_list": [at(0, 50), at(50, 50), at(62, 50)],
                               "landmark_list": [None, None]},
             "init_heading": 0, "milestone_info": text}
    other = json.loads(json.dumps(route)) | {"init_heading": 45}
    return [[route, other], 7], {tuple(at(*spot)): f"pano{i}" for i, spot in enumerate(spots)}


def write_town(folder, infos, mapping, pictures=True):
    """Write the town's files; pictures of 64 x 32 whose red channel is the column."""
    (folder / "street_views").mkdir()
    (folder / "route_infos.json").write_text(infos if isinstance(infos, str) else json.dumps(infos))
    (folder / "gps_pano_mapping.pkl").write_bytes(
        mapping if isinstance(mapping, bytes) else pickle.dumps(mapping))
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[..., 0] = np.arange(64) * 4
    for name in town()[1].values() if pictures else ():
        Image.fromarray(pixels).save(folder / "street_views" / f"{name}.jpg")
        (folder / "street_views" / f"{name}.metadata.json").write_text('{"rotation": 30}')


@pytest.fixture
def tiny_folder(tmp_path):
    write_town(tmp_path, *town())
    return str(tmp_path)


def play(env, seed, route=None, answer=None):
    """Walk to the end with the expert, or with `answer`, a function of env: (all, info, ended)."""
    met = []
    observation, info = env.reset(seed, route)
    over = False
    while not over:
        text = answer(env) if answer else env.expert_answer()
        met.append((observation["text"], observation["image"] and observation["image"].tobytes(),
                    observation["new_conversation"], text))
        observation, reward, terminated, truncated, info = env.step(text)
        over = terminated or truncated
        met[-1] += (reward, info)
    return met, info, terminated


def digest(thing):
    """A short name of everything that is in texts, numbers, lists, dicts and pictures."""
    def plain(part):
        if hasattr(part, "tobytes"):
            return hashlib.sha256(part.tobytes()).hexdigest()
        raise TypeError(part)
    return hashlib.sha256(json.dumps(thing, default=plain).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# Directions
# ------------------------------------------------------------------------------------------------


def check_relative(function):
    """Every pair of headings, against the angle between two arrows in the plane."""
    for old in range(0, 360, 5):
        for new in range(0, 360, 5):
            a, b = math.radians(old), math.radians(new)
            right = math.sin(b - a)             # > 0: the new arrow points to the right of the old
            angle = math.degrees(math.acos(max(-1, min(1, math.cos(b - a)))))
            word = function(old, new)
            assert word.startswith("slightly") == (angle < 45.001), (old, new, word)
            if 0.1 < angle < 179.9:
                assert word.endswith("right") == (right > 0), (old, new, word)


def test_relative_words_wrap_at_360_degrees():
    """Facing 350, a turn to 10 is called "left": the released code's fault comes back."""
    check_relative(relative_word)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):  # mutant: no wrap
        patch.setattr(virl_env, "bend", lambda heading, target: target - heading)
        check_relative(relative_word)
    with pytest.raises(AssertionError):         # the mutant: sides swapped
        check_relative(lambda old, new: relative_word(new, old))


def test_docstring_examples():
    """An example in a docstring no longer shows what the code does."""
    tried = [doctest.testmod(module) for module in (virl_env, released)]
    assert sum(t.attempted for t in tried) >= 8 and sum(t.failed for t in tried) == 0


# ------------------------------------------------------------------------------------------------
# The released format
# ------------------------------------------------------------------------------------------------


def test_the_town_is_read_as_written(tiny_folder):
    """A field of the released format is read from another block, a name is cut, or the rail may
    visit a point twice, or one beside an end."""
    route = open_atlas(tiny_folder).route(0)
    assert route.headings == (2, 90, 91) and route.words == ("north", "east", "east")
    assert route.landmarks == (NOTHING, "Joe's 'Big' Diner, Inc. is on your left", NOTHING,
                               "The destination St. Mark's is on your front")
    assert route.panoramas == ("pano0", "pano5", "pano10", "pano11")
    # no point within 8 m of an end, none twice, none on a leg of 12 m
    assert route.between == (("pano1", "pano2", "pano3", "pano4"),
                             ("pano6", "pano7", "pano8", "pano9"), ())


def test_a_block_without_landmark_has_nothing_to_see(tmp_path):
    """An empty landmark becomes an observation of nothing but a full stop."""
    infos, mapping = town()
    write_town(tmp_path, edit("No landmark nearby", "")(infos), mapping, pictures=False)
    assert open_atlas(str(tmp_path)).route(1).landmarks[2] == NOTHING


def check_rail(function):
    """The rail of the town without drops, step by step."""
    class Never:
        random = staticmethod(lambda n: np.ones(n))     # never below the drop rate

    town_route = released.Route(0, 0, (), ("a", "b", "c"), (10, 20), ("north", "north"),
                                (NOTHING, "X is on your left", "The destination Y"),
                                (("p",), ()))
    rail = function(town_route, 300, Never)
    assert [p.kind for p in rail] == ["first turn", "forward", "later turn", "stop"]
    assert [p.panorama for p in rail] == ["a", "p", "b", "c"]
    assert [p.heading for p in rail] == [300, 10, 10, 20]
    assert [p.step for p in rail] == [0, 1, 2, 3]
    assert [p.observation for p in rail] == [
        NOTHING, NOTHING, "X is on your left" + CROSSING, "The destination Y" + CROSSING]


def test_rail_by_hand():
    """A milestone is announced at the wrong position, or stop() follows the wrong step."""
    check_rail(lay_rail)
    mutants = [lambda r, h, g: lay_rail(r, h, g)[1:],
               lambda r, h, g: lay_rail(r, r.headings[0], g),           # already turned
               lambda r, h, g: [p for p in lay_rail(r, h, g) if p.kind != "forward"]]
    for mutant in mutants:
        with pytest.raises(AssertionError):
            check_rail(mutant)


def test_points_are_dropped_anew_at_each_reset():
    """The rail is drawn once per route: a model can count steps instead of looking."""
    env = Navigation("Alder", split="all")
    route = max(env.atlas.routes, key=lambda r: len(sum(r.between, ()))).index
    candidates = len(sum(env.atlas.route(route).between, ()))
    lengths, headings = [], set()
    for seed in range(200):
        env.reset(seed, route)
        lengths.append(sum(p.kind == "forward" for p in env.rail))
        headings.add(env.rail[0].heading)
    assert abs(np.mean(lengths) / candidates - 0.5) < 0.03 and len(set(lengths)) > 5
    assert len(headings) > 100      # init_heading 0: random
    full = Navigation("Alder", split="all", drop=0)
    full.reset(0, route)
    assert sum(p.kind == "forward" for p in full.rail) == candidates


def test_a_given_heading_is_kept(tiny_folder):
    """init_heading is ignored, or 0 is taken for north."""
    env = Navigation(tiny_folder, split="all")
    assert {env.reset(s, 1) and env.position.heading for s in range(20)} == {45}
    assert len({env.reset(s, 0) and env.position.heading for s in range(20)}) > 10


# --- data that cannot be used: (what, change the infos, change the mapping, expected words)


def at_route(change):
    """Apply `change` to route 1 of the infos."""
    def apply(infos):
        change(infos[0][1])
        return infos
    return apply


def edit(old, new):
    return at_route(lambda r: r.update(milestone_info=r["milestone_info"].replace(old, new)))


class RunsCode:
    """What a hostile pickle holds: unpickling calls `print`."""

    def __reduce__(self):
        return print, ("the pickle ran code",)


BAD = [
    ("truncated JSON", lambda infos: json.dumps(infos)[:300], None, ["JSONDecodeError"]),
    ("not JSON", lambda infos: "hello", None, ["JSONDecodeError"]),
    ("a dict on top", lambda infos: {"routes": infos}, None, ["ValueError"]),
    ("a route that is a list", lambda infos: [[[1]], 0], None, ["route 0", "TypeError"]),
    ("a field is missing", at_route(lambda r: r.pop("start_place")), None,
     ["route 1", "KeyError('start_place')"]),
    ("coordinates are text", at_route(lambda r: r["route_results"].update(
        geocode_list=["here", "there", "nowhere"])), None, ["route 1", "TypeError"]),
    ("a coordinate is NaN", at_route(lambda r: r["start_place"].update(
        relocated_geocode=[math.nan, 0])), None, ["route 1", "no panorama within 20 m of [nan"]),
    ("the second one is NaN", at_route(lambda r: r["start_place"].update(
        relocated_geocode=[0, math.nan])), None, ["route 1", "no panorama within 20 m of [0, nan"]),
    ("no points", at_route(lambda r: r["route_results"].update(geocode_list=[])), None,
     ["route 1", "3 milestones for 0 points"]),
    ("empty milestone string", at_route(lambda r: r.update(milestone_info="")), None,
     ["route 1", "0 milestones for 3 points"]),
    ("milestones are a list", at_route(lambda r: r.update(milestone_info=[1])), None,
     ["route 1", "AttributeError"]),
    ("a block without a heading", edit('"landmarks": "No', '} {"landmarks": "No'), None,
     ["route 1", "the heading is ''"]),
    ("unknown heading word", edit("(north)", "(nord)"), None,
     ["route 1", "the heading is '2 (nord)', not like"]),
    ("unreadable heading", edit("90 (east)", "east"), None, ["route 1", "the heading is 'east'"]),
    ("no panorama near", at_route(lambda r: r["start_place"].update(relocated_geocode=[1.0, 1.0])),
     None, ["route 1", "no panorama within 20 m of [1.0, 1.0]"]),
    ("pickle runs code", None, lambda m: pickle.dumps({**m, (9.0, 9.0): RunsCode()}),
     ["gps_pano_mapping.pkl", "could run code"]),
    ("pickle of numpy floats", None, lambda m: pickle.dumps({(np.float64(1), 2.0): "a"}),
     ["gps_pano_mapping.pkl", "could run code"]),
    ("truncated pickle", None, lambda m: pickle.dumps(m)[:40], ["gps_pano_mapping.pkl", "Error"]),
    ("no pickle", None, lambda m: b"hello", ["gps_pano_mapping.pkl", "Error"]),
    ("a pickled list", None, lambda m: [1, 2], ["gps_pano_mapping.pkl", "Error"]),
    ("an id that is a number", None, lambda m: {**m, (0.5, 0.5): 7}, ["gps_pano_mapping.pkl"]),
    ("keys of several kinds", None, lambda m: {**m, "a": "b"}, ["gps_pano_mapping.pkl", "Error"]),
    ("a heading without end", at_route(lambda r: r.update(init_heading=math.inf)), None,
     ["route 1", "OverflowError"]),
    ("no coordinate", at_route(lambda r: r["start_place"].update(relocated_geocode=[])), None,
     ["route 1", "IndexError"]),
    ("an id that leaves the folder", None, lambda m: {**m, (0.5, 0.5): "../../etc/passwd"},
     ["gps_pano_mapping.pkl", "'../../etc/passwd' is not a panorama id"]),
    ("a hidden id", None, lambda m: {**m, (0.5, 0.5): ".."},
     ["gps_pano_mapping.pkl", "'..' is not a panorama id"]),
]


@pytest.mark.parametrize("what, infos, mapping, words", BAD, ids=[case[0] for case in BAD])
def test_bad_data_is_named_in_one_line(what, infos, mapping, words, tmp_path, capsys, monkeypatch):
    """A damaged file is not named, runs code, or ends the walk in the terminal in a traceback."""
    good = town()
    write_town(tmp_path, infos(good[0]) if infos else good[0],
               mapping(good[1]) if mapping else good[1], pictures=False)
    with pytest.raises(RouteProblem) as caught:
        Atlas(folder_files(tmp_path), str(tmp_path))
    text = str(caught.value)
    assert "\n" not in text and str(tmp_path) in text and len(text) < 500
    for word in words + ([] if mapping else ["route_infos.json"]):
        assert word in text, text
    monkeypatch.setattr(sys, "argv", ["virl_env.py", "--routes", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        virl_env.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and text in err and "ran code" not in out + err


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "street_views/pano3.jpg").unlink(), ["pano3.jpg", "No such file"]),
    (lambda f: (f / "street_views/pano3.metadata.json").unlink(), ["pano3.metadata.json"]),
    (lambda f: (f / "street_views/pano3.metadata.json").write_text("{}"), ["no rotation"]),
    (lambda f: (f / "street_views/pano3.metadata.json").write_text("{"), ["no rotation"])])
def test_missing_street_views_are_found_before_training(damage, words, tmp_path):
    """A missing panorama stops training hours later, or the text task asks for pictures."""
    write_town(tmp_path, *town())
    damage(tmp_path)
    Atlas(folder_files(tmp_path), str(tmp_path))        # the text task does not need it
    with pytest.raises(RouteProblem) as caught:
        Atlas(folder_files(tmp_path), str(tmp_path), pictures=True)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", ["nowhere", "wild-", "Alder2"])
def test_unknown_city(name):
    """An unknown name is taken for a folder with nothing in it."""
    with pytest.raises(RouteProblem, match="neither a folder nor a city"):
        open_atlas(name)


# ------------------------------------------------------------------------------------------------
# Environment
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("split", ["train", "val", "test", "all"])
@pytest.mark.parametrize("where", ["town", *CITIES])
def test_the_expert_is_always_right(where, split, rule, tiny_folder):
    """Instruction, action space and expert disagree somewhere: RL could never reach 100 %."""
    if where == "town" and split in ("val", "test"):
        with pytest.raises(RouteProblem):       # two routes cannot be split
            split_routes(2, split)
        return
    env = Navigation(tiny_folder if where == "town" else where, rule, split)
    for seed in range(6):
        met, info, terminated = play(env, seed)
        assert terminated and all(m[4] == 1 for m in met)
        assert all(m[5]["verdict"].correct and m[5]["try"] == 1 for m in met)
        assert all(m[5]["verdict"].landmarks_right and m[5]["verdict"].intersection_right
                   for m in met)
        kinds = [m[5]["kind"] for m in met]
        assert kinds[0] == "first turn" and kinds[-1] == "stop"
        assert 1 + kinds.count("later turn") == len(env.route.headings)


def test_a_policy_of_the_other_rule_fails_at_the_first_turn():
    """The relative rule accepts compass words: the OOD test would test nothing."""
    def absolute(env):
        action = virl_env.right_action(env.route, env.position, "compass")
        return virl_env.write_answer(env.position.observation, "", action)

    env = Navigation(rule="relative", split="test")
    for seed in range(10):
        met, info, terminated = play(env, seed, answer=absolute)
        assert not terminated and [m[5]["kind"] for m in met] == ["first turn"] * 2


def test_two_tries_then_truncated():
    """The last failure is not charged, a wrong action is carried out, or a third try is given."""
    env = Navigation()
    first, info = env.reset(4)
    assert info == {"route": env.route.index, "position": 0, "kind": "first turn", "try": 0,
                    "verdict": None}
    wrong = env.expert_answer().replace("turn_direction", "stop() turn_direction")
    before = env.position
    observation, reward, terminated, truncated, info = env.step(wrong)
    assert (reward, terminated, truncated) == (-1, False, False) and env.position == before
    assert observation == {"text": "Not right: that is not in the list of actions. Try again.",
                           "image": None, "new_conversation": False}
    observation, reward, terminated, truncated, info = env.step(wrong)
    assert (reward, terminated, truncated) == (-2, False, True)
    assert info["try"] == 2 and not info["verdict"].correct


def test_right_at_the_second_try():
    """The first failure counts against the next position, or stays in its prompt."""
    env, clean = Navigation(), Navigation()
    env.reset(4), clean.reset(4)
    env.step("action: stop()")
    second = env.step(env.expert_answer())
    once = clean.step(clean.expert_answer())
    assert second[0] == once[0] and second[0]["new_conversation"]
    assert second[1:4] == (1, False, False) and second[4]["try"] == 2
    assert env.step("action: stop()")[1:4] == (-1, False, False)        # two tries here again


def test_misread_costs_more():
    """The environment tells the verifier something else than what is there."""
    env = Navigation()
    env.reset(0)
    seen = "Mill Bank is on your left" + CROSSING
    assert env.step(virl_env.write_answer(seen, "", "stop()"))[1] == -1.5
    assert env.step(virl_env.write_answer(NOTHING, "", "stop()"))[1] == -2


def test_go_on_after_a_miss():
    """With go_on a miss ends the walk, or a wrong action enters the history."""
    env = Navigation(go_on=True)
    met, info, terminated = play(env, 3, answer=lambda e: "action: stop()")
    assert terminated
    kinds = collections.Counter(m[5]["kind"] for m in met)
    assert kinds["first turn"] == 2 and kinds["stop"] == 1 and met[-1][4] == 1
    assert kinds["forward"] == 2 * sum(p.kind == "forward" for p in env.rail)
    expert = Navigation()
    expected = play(expert, 3)[0]
    fresh = [m for m in met if m[2]]
    assert [m[0] for m in fresh] == [m[0] for m in expected]    # history is the expert's
    met, info, terminated = play(env, 3, answer=lambda e: "action: forward()")
    assert terminated and met[-1][5]["kind"] == "stop" and met[-1][4] == -2.5   # misread as well


@pytest.mark.parametrize("how", [{}, {"go_on": True}, {"picture": (16, 8)}])
def test_fresh_tries_leave_no_trace(how, tiny_folder):
    """The message or the wrong answer is kept, the picture is lost, or the rewards change."""
    told = Navigation(tiny_folder, split="all", tries=3, **how)
    fresh = Navigation(tiny_folder, split="all", tries=3, fresh=True, **how)
    rng, failures = np.random.default_rng(0), 0
    for seed in range(12):
        first, _ = fresh.reset(seed)
        assert told.reset(seed)[0] == first
        over = False
        while not over:
            answer = fresh.expert_answer() if rng.random() < 0.6 else "action: turn_direction(up)"
            place = fresh.at
            after, *outcome = fresh.step(answer)
            message, *expected = told.step(answer)
            assert outcome == expected
            over = outcome[1] or outcome[2]
            if fresh.at > place:
                assert after == message
                first = after
            elif not outcome[1]:
                assert after == first and after["new_conversation"]
                assert message["text"].startswith("Not right") and not message["new_conversation"]
                failures += 1
    assert failures > 5


def test_the_fake_probe_pays_the_old_rule():
    """The probe scores by the stated rule: a policy that ignores its prompt is not found out."""
    env = Navigation(rule="relative", scoring_rule="absolute")
    for seed in range(5):
        observation, _ = env.reset(seed)
        assert ", ".join(RELATIVE) in observation["text"]
        assert env.step(env.expert_answer())[1] == -1       # reads the rule
        old = virl_env.right_action(env.route, env.position, "compass")
        assert env.step(f"action: {old}")[1] == 1           # recites the old one
        assert f"A_1: {env.past[0][1]}" in env._arrive()["text"]
        assert env.past[0][1].split("(")[1][:-1] in RELATIVE


def test_prompt_tells_all_that_is_needed_and_nothing_else():
    """The word of a rule is missing from the steps, or the list names words of the other rule."""
    for rule, words in (("absolute", COMPASS), ("relative", RELATIVE)):
        env = Navigation(rule=rule)
        env.reset(5)
        for _ in range(3):
            env.step(env.expert_answer())
        text = env._arrive()["text"]
        listed = re.search("one of: (.*)\n", text).group(1)
        assert listed == ", ".join(words)
        assert len(re.findall("Turn .*, to face ", text)) == len(env.route.headings)
        for k, (seen, action) in enumerate(env.past, 1):
            assert f"\nO_{k}: {seen}\nA_{k}: {action}\n" in text
        assert f"\nO_4: {env.position.observation}\nA_4:\n" in text


def test_picture_prompt_hides_what_is_to_be_seen(tiny_folder):
    """The street-view task prints the current landmark: nothing has to be seen."""
    env = Navigation(tiny_folder, split="all", picture=(16, 8))
    observation, _ = env.reset(0)
    while env.position.kind != "later turn":
        assert CROSSING not in observation["text"].split("Walk so far")[1]
        observation, *_ = env.step(env.expert_answer())
    present = observation["text"].split("\nO_")[-1]
    assert "Diner" not in present and "see the picture" + CROSSING in present
    assert "front, right / back, left" in observation["text"]
    assert observation["image"].size == (16, 8)
    following, *_ = env.step(env.expert_answer())
    assert "Diner" in following["text"].split("Walk so far")[1]     # the past is told


def test_reset_depends_on_its_seed_only():
    """A global generator leaks in: walks differ between runs, or disturb the model's sampling."""
    random.seed(1), np.random.seed(1)
    state, state_numpy = random.getstate(), np.random.get_state()[1].copy()
    env = Navigation()
    one = [play(env, [7, seed])[0] for seed in range(3)]
    two = [play(Navigation(), [7, seed])[0] for seed in range(3)]
    assert [[m[:4] for m in met] for met in one] == [[m[:4] for m in met] for met in two]
    assert random.getstate() == state and (np.random.get_state()[1] == state_numpy).all()
    assert one[0][0][0] != one[1][0][0]
    assert len({env.reset()[0]["text"] for _ in range(5)}) > 1      # no seed: a new walk each time
    assert random.getstate() == state


@pytest.mark.parametrize("count", [5, 18, 120, 1000])
def test_splits_are_disjoint_and_complete(count):
    """A test route is trained on, or the split changes from run to run."""
    if count == 5:
        with pytest.raises(RouteProblem, match="--split all"):
            split_routes(count, "val")
        return
    parts = [set(split_routes(count, split)) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == count
    assert abs(len(parts[0]) / count - 0.7) < 0.08 and list(split_routes(count, "all")) == list(
        range(count))


def test_split_routes_are_the_ones_played():
    """`split` is ignored: evaluation on held-out routes measures seen ones."""
    for split in ("train", "val", "test"):
        env = Navigation(split=split)
        assert {env.reset(s)[1]["route"] for s in range(100)} <= set(split_routes(1000, split))


# ------------------------------------------------------------------------------------------------
# Views
# ------------------------------------------------------------------------------------------------


def compass_panorama(rotation, width=720):
    """Each column says in two channels which heading it shows; one colour above, one below."""
    heading = (np.arange(width) + 0.5) / width * 360 - rotation
    pixels = np.zeros((width // 2, width, 3), np.uint8)
    pixels[..., 0] = np.round(127 + 120 * np.sin(np.radians(heading)))
    pixels[..., 1] = np.round(127 + 120 * np.cos(np.radians(heading)))
    pixels[: width // 4, :, 2] = 200
    return pixels


def shown(pixel):
    """The heading that a pixel of compass_panorama stands for."""
    return math.degrees(math.atan2(float(pixel[0]) - 127, float(pixel[1]) - 127))


def check_view(function):
    """Middle, borders and quarter points of views in several directions."""
    for rotation in (0, 123):
        pixels = compass_panorama(rotation)
        for heading in (0, 77, 350):
            crop = function(pixels, rotation, heading, 90, 90)
            for column, expected in ((0, -44.7), (22, -26.6), (45, 0.3), (67, 26.6), (89, 44.7)):
                for row in (20, 70):
                    assert abs(bend(heading + expected, shown(crop[row, column]))) < 1.6
            assert (crop[:44, :, 2] > 190).all() and (crop[46:, :, 2] < 10).all()


def test_view_looks_where_it_should_with_90_degrees():
    """The crop is rotated, mirrored, upside down, or stretched (columns instead of angles)."""
    check_view(view)
    mutants = [lambda p, r, h, *s: view(p, -r, h, *s), lambda p, r, h, *s: view(p, r, h + 180, *s),
               lambda p, r, h, *s: view(p, r, h, *s)[:, ::-1],
               lambda p, r, h, *s: view(p, r, h, *s, fov=70),
               lambda p, r, h, *s: view(p, r, h, *s)[::-1],
               lambda p, r, h, w, t: np.roll(p, -round((h + r) * 2) + 360, 1)[90:270, 270:450][
                   ::2, ::2]]        # a piece cut out of the panorama: no perspective
    for mutant in mutants:
        with pytest.raises(AssertionError):
            check_view(mutant)


def test_four_views_stand_as_the_prompt_says():
    """Front, right / back, left: the released code shows other directions than its prompt says."""
    picture = np.asarray(four_views(compass_panorama(40), 40, 30, (128, 64)))
    assert picture.shape == (64, 128, 3)
    for (row, column), turn in (((16, 32), 0), ((16, 96), 90), ((48, 32), 180), ((48, 96), 270)):
        assert abs(bend(30 + turn, shown(picture[row - 3, column]))) < 2
    assert (picture[:32, :64] == view(compass_panorama(40), 40, 30, 64, 32)).all()


# ------------------------------------------------------------------------------------------------
# Training text
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_expert_conversations_are_right_and_in_the_split(rule):
    """SFT learns a wrong answer, the prompt, a held-out route, or only starts of walks."""
    rng = np.random.default_rng(0)
    known = {text.split("[Actions]")[0].split("\n2. ")[1] for text in (
        Navigation(rule=rule).reset(0, route)[0]["text"] for route in split_routes(1000, "train"))}
    kinds = collections.Counter()
    for _ in range(200):
        user, assistant = expert_conversation(rng, rule=rule)
        assert (user["learn"], assistant["learn"]) == (False, True) and "image" not in user
        assert user["content"].split("[Actions]")[0].split("\n2. ")[1] in known
        answer = json.loads(assistant["content"])
        assert list(answer) == ["current observation", "current instruction", "action"]
        assert f"{answer['current observation']}\nA_" in user["content"]
        assert answer["current instruction"] + "\n" in user["content"]
        kinds[answer["action"].split("(")[0]] += 1
        words = VOCABULARIES[RULES[rule]]
        assert verify_virl(assistant["content"], answer["action"], answer["current observation"],
                           words).correct
    assert min(kinds[k] for k in ("forward", "turn_direction", "stop")) > 5


def test_expert_conversations_and_walks_are_those_of_the_results():
    """A draw more or less, or a word: no run of results/ can be repeated."""
    rng = np.random.default_rng(5)
    assert digest([expert_conversation(rng) for _ in range(100)]) == "15029401d52c47ab"
    rng = np.random.default_rng(7)
    talks = [expert_conversation(rng, picture=(128, 64)) for _ in range(10)]
    assert digest(talks) == "ade406e8e9c03157" and talks[0][0]["image"].size == (128, 64)
    for rule, expected in (("absolute", "885e9eb86c4726bb"), ("relative", "b2b681b479ee264d")):
        env = Navigation("Alder", rule)
        walks = [[(text, answer) for text, _, _, answer, *_ in play(env, seed)[0]]
                 for seed in range(20)]
        assert digest(walks) == expected


def test_an_intersection_can_be_kept_quiet():
    """--no-announce tells all the same, or changes what is there."""
    for seed in range(5):
        loud, quiet = (Navigation("Brim", picture=(16, 16), split="all", announce=announce)
                       for announce in (True, False))
        texts = [env.reset(seed, position=2)[0]["text"] for env in (loud, quiet)]
        assert texts[1] == texts[0].replace(PICTURE + CROSSING, PICTURE)
        assert loud.expert_answer() == quiet.expert_answer()
        assert [env.position for env in (loud, quiet)] == [loud.rail[2]] * 2
    words = Navigation("Brim", split="all", announce=False)     # in words nothing is hidden
    words.reset(0)
    place = next(i for i, p in enumerate(words.rail) if p.kind == "later turn")
    assert CROSSING in words.reset(0, position=place)[0]["text"].rsplit("[Walk so far]", 1)[1]


def test_views_that_are_kept_are_the_views():
    """A kept picture of another heading or panorama is shown, or large ones fill the memory."""
    atlas = open_atlas("Brim")
    names = sorted(atlas.visited)[:2]
    for _ in range(2):
        for name in names:
            for heading in (0, 90):
                for size in ((32, 16), (256, 128)):
                    shown = look_around(atlas, name, heading, size)
                    true = four_views(*atlas.panorama(name), heading, size)
                    assert shown.tobytes() == true.tobytes()
    for size, kept in (((32, 16), True), ((256, 128), False)):
        first, again = (look_around(atlas, names[0], 0, size) for _ in range(2))
        assert (first is again) is kept


# ------------------------------------------------------------------------------------------------
# Terminal
# ------------------------------------------------------------------------------------------------


def run(monkeypatch, capsys, flags, answers):
    """Run `python virl_env.py flags` with typed answers. Returns what it printed."""
    monkeypatch.setattr(sys, "argv", ["virl_env.py", *flags])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(answers)))
    virl_env.main()
    return capsys.readouterr().out


def test_a_person_can_walk_to_the_end(monkeypatch, capsys):
    """The terminal game cannot be won."""
    env = Navigation("Brim", "relative", "all")
    env.reset(3)
    actions = []
    for position in env.rail:
        actions.append(virl_env.right_action(env.route, position, "relative"))
    out = run(monkeypatch, capsys, ["--city", "Brim", "--rule", "relative", "--seed", "3"], actions)
    assert out.rstrip().endswith("[+1.0] Correct.")
    assert out.count("[+1.0]") == len(actions)


def test_a_person_learns_from_mistakes(monkeypatch, capsys):
    """Verifier messages are not shown, or giving up hangs."""
    out = run(monkeypatch, capsys, [], ["stop()", "forward()"])
    assert out.count("Not right: that is not the action") == 2 and "[-2.0]" in out
    assert "The action here is turn_direction(" in run(monkeypatch, capsys, [], [])


def test_pictures_of_a_walk(monkeypatch, capsys, tmp_path, tiny_folder):
    """--picture writes nothing, or fails on released data (which knows no street plan)."""
    sizes = []
    monkeypatch.setattr(virl_env, "look_around", lambda atlas, panorama, heading, size:
                        sizes.append(size) or look_around(atlas, panorama, heading, (64, 32)))
    run(monkeypatch, capsys, ["--routes", tiny_folder, "--picture", str(tmp_path / "look")], [])
    files = {path.name for path in (tmp_path / "look").iterdir()}
    assert "map.png" in files and "view-01-first-turn.png" in files
    assert Image.open(tmp_path / "look" / "map.png").size == (900, 900)
    assert set(sizes) == {(1200, 1200)} and len(sizes) == len(files) - 1


@pytest.mark.parametrize("flags", [["--rule", "north"], ["--city", "nowhere"]])
def test_bad_flags_are_explained(flags, monkeypatch, capsys):
    """A bad flag ends in a traceback."""
    monkeypatch.setattr(sys, "argv", ["virl_env.py", *flags])
    with pytest.raises(SystemExit) as stop:
        virl_env.main()
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err
