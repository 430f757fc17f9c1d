"""Tests of virl_env.py: directions, the released format, rail, views, the generated cities, corpus.

`tiny_folder` writes a hand-made town in the released format: an L of two streets whose rail can be
checked by hand. The generated cities are held against brute force: distances by small steps along
each ray, signs by drawing a panorama with and without them.

    python -m pytest tests/test_virl_env.py
"""

import collections
import doctest
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
from verifier import verify_virl
from virl_env import (CITIES, COMPASS, CROSSING, NOTHING, PICTURE, RELATIVE, RULES, VOCABULARIES,
                      Atlas, Navigation, RouteProblem, backbone_conversations, bend, build_city,
                      city_files, draw_panorama, expert_conversation, folder_files, four_views,
                      lay_rail, open_atlas, relative_word, split_routes, view, write_city)

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
    with pytest.raises(AssertionError):         # the mutant: no wrap
        check_relative(lambda old, new: relative_word(old, new, paper_bearings=True))
    with pytest.raises(AssertionError):         # the mutant: sides swapped
        check_relative(lambda old, new: relative_word(new, old))


def test_paper_bearings_are_wrong_as_often_as_the_paper_s_code():
    """--paper-bearings no longer keeps the released arithmetic (24.8 % of pairs there)."""
    pairs = [(a, b) for a in range(0, 360, 3) for b in range(0, 360, 3)]
    wrong = np.mean([relative_word(a, b) != relative_word(a, b, True) for a, b in pairs])
    assert 0.24 < wrong < 0.26


def test_docstring_examples():
    """An example in a docstring no longer shows what the code does."""
    tried = doctest.testmod(virl_env)
    assert tried.attempted > 8 and tried.failed == 0


# ------------------------------------------------------------------------------------------------
# The released format
# ------------------------------------------------------------------------------------------------


def test_the_town_is_read_as_written(tiny_folder):
    """A field of the released format is read from another block, or a name is cut."""
    route = open_atlas(tiny_folder).route(0)
    assert route.headings == (2, 90, 91) and route.words == ("north", "east", "east")
    assert route.landmarks == (NOTHING, "Joe's 'Big' Diner, Inc. is on your left", NOTHING,
                               "The destination St. Mark's is on your front")
    assert route.panoramas == ("pano0", "pano5", "pano10", "pano11")


def test_points_along_the_way(tiny_folder):
    """Points nearer than 8 m to an end are kept, the same panorama comes twice, or a short leg (12
    m: every point is within 8 m of an end) gets some."""
    route = open_atlas(tiny_folder).route(0)
    assert route.between == (("pano1", "pano2", "pano3", "pano4"),
                             ("pano6", "pano7", "pano8", "pano9"), ())


def check_rail(function):
    """The rail of the town without drops, step by step."""
    class Never:
        random = staticmethod(lambda n: np.ones(n))     # never below the drop rate

    town_route = virl_env.Route(0, 0, (), ("a", "b", "c"), (10, 20), ("north", "north"),
                                (NOTHING, "X is on your left", "The destination Y"),
                                (("p",), ()), ())
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
    ("truncated JSON", lambda infos: json.dumps(infos)[:300], None, ["not valid JSON"]),
    ("not JSON", lambda infos: "hello", None, ["not valid JSON"]),
    ("10,000 brackets", lambda infos: "[" * 10_000, None, ["not valid JSON"]),
    ("a dict on top", lambda infos: {"routes": infos}, None, ["[[route, ...], number]"]),
    ("no routes", lambda infos: [[], 0], None, ["[[route, ...], number]"]),
    ("a route that is a list", lambda infos: [[[1]], 0], None, ["route 0", "wrong type"]),
    ("a field is missing", at_route(lambda r: r.pop("start_place")), None,
     ["route 1", "missing field 'start_place'"]),
    ("coordinates are text", at_route(lambda r: r["route_results"].update(
        geocode_list=["here", "there"])), None, ["route 1", "wrong type"]),
    ("a coordinate is NaN", at_route(lambda r: r["start_place"].update(
        relocated_geocode=[math.nan, 0])), None, ["route 1", "finite"]),
    ("the second one is NaN", at_route(lambda r: r["start_place"].update(
        relocated_geocode=[0, math.nan])), None, ["route 1", "finite"]),
    ("a place is nowhere", at_route(lambda r: r["dest_place"].update(
        geocode=[1e300, 0])), None, ["route 1", "finite"]),
    ("a place has three numbers", at_route(lambda r: r["dest_place"].update(
        geocode=[1, 2, 3])), None, ["route 1", "two"]),
    ("half a character", edit("No landmark nearby", "\ud83d Cafe"), None,
     ["route 1", "character"]),
    ("heading is infinite", at_route(lambda r: r.update(init_heading=math.inf)), None,
     ["route 1", "wrong type"]),
    ("no points", at_route(lambda r: r["route_results"].update(geocode_list=[])), None,
     ["route 1", "geocode_list is empty"]),
    ("empty milestone string", at_route(lambda r: r.update(milestone_info="")), None,
     ["route 1", "milestone_info", "empty"]),
    ("empty landmark string", edit("No landmark nearby", ""), None, ["route 1", "empty"]),
    ("milestones are a list", at_route(lambda r: r.update(milestone_info=[1])), None,
     ["route 1", "milestone_info", "empty"]),
    ("a block too few", edit('"landmarks": "No', '} {"landmarks": "No'), None,
     ["route 1", "4 blocks for 3 points"]),
    ("unknown heading word", edit("(north)", "(nord)"), None,
     ["route 1", "unknown heading word 'nord'"]),
    ("unreadable heading", edit("90 (east)", "east"), None, ["route 1", "cannot read the heading"]),
    ("no panorama near", at_route(lambda r: r["start_place"].update(relocated_geocode=[1.0, 1.0])),
     None, ["route 1", "no panorama within 20 m of (1.0, 1.0)"]),
    ("pickle runs code", None, lambda m: pickle.dumps({**m, (9.0, 9.0): RunsCode()}),
     ["gps_pano_mapping.pkl", "could run code"]),
    ("pickle of numpy floats", None, lambda m: pickle.dumps({(np.float64(1), 2.0): "a"}),
     ["gps_pano_mapping.pkl", "could run code"]),
    ("truncated pickle", None, lambda m: pickle.dumps(m)[:40], ["gps_pano_mapping.pkl", "refused"]),
    ("no pickle", None, lambda m: b"hello", ["gps_pano_mapping.pkl", "refused"]),
    ("pickle of a list", None, lambda m: [1], ["gps_pano_mapping.pkl", "not a dict"]),
    ("whole numbers", None, lambda m: {(1, 2): "a"}, ["gps_pano_mapping.pkl", "two floats"]),
    ("an id that leaves the folder", None, lambda m: {**m, (0.5, 0.5): "../../etc/passwd"},
     ["gps_pano_mapping.pkl", "'../../etc/passwd' is not a panorama id"]),
]


@pytest.mark.parametrize("what, infos, mapping, words", BAD, ids=[case[0] for case in BAD])
def test_bad_data_is_named_in_one_line(what, infos, mapping, words, tmp_path, capsys, monkeypatch):
    """A damaged file ends in a traceback, in silence, or runs code; the terminal exits with 0."""
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
    assert virl_env.main() == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "ran code" not in out + err


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "street_views/pano3.jpg").unlink(), ["pano3.jpg", "No such file"]),
    (lambda f: (f / "street_views/pano3.metadata.json").unlink(), ["pano3.metadata.json"]),
    (lambda f: (f / "street_views/pano3.metadata.json").write_text("{}"), ["gives no rotation"]),
    (lambda f: (f / "street_views/pano3.metadata.json").write_text('{"rotation": NaN}'),
     ["gives no rotation"])])
def test_missing_street_views_are_found_before_training(damage, words, tmp_path):
    """A missing panorama stops training hours later, or the text task asks for pictures."""
    write_town(tmp_path, *town())
    damage(tmp_path)
    Atlas(folder_files(tmp_path), str(tmp_path))        # the text task does not need it
    with pytest.raises(RouteProblem) as caught:
        Atlas(folder_files(tmp_path), str(tmp_path), pictures=True)
    assert "route 0" in str(caught.value) and all(word in str(caught.value) for word in words)


def test_a_damaged_picture_is_named(tmp_path):
    """PIL's own error comes through, without the name of the file."""
    write_town(tmp_path, *town())
    (tmp_path / "street_views/pano0.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(RouteProblem, match="pano0.jpg, route 0: not a picture"):
        Navigation(Atlas(folder_files(tmp_path), "x"), split="all", picture=(8, 4)).reset(0)


@pytest.mark.parametrize("index", [-1, 2, 10 ** 9])
def test_route_out_of_range(index, tiny_folder):
    """Route -1 is silently the last one, or a number too large ends in a traceback."""
    with pytest.raises(RouteProblem, match=f"route {index}: out of range, there are routes 0 to 1"):
        Navigation(tiny_folder, split="all").reset(0, index)


@pytest.mark.parametrize("name", ["nowhere", "wild-", "Alder2", ""])
def test_unknown_city(name, capsys, monkeypatch):
    """An unknown name is taken for a folder with nothing in it."""
    monkeypatch.setattr(sys, "argv", ["virl_env.py", "--city", name])
    assert virl_env.main() == 2 and capsys.readouterr().err.count("\n") == 1


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
        assert terminated and info["success"] and all(m[4] == 1 for m in met)
        assert all(m[5]["correct"] and m[5]["try"] == 1 for m in met)
        assert all(m[5]["verdict"].landmarks_right and m[5]["verdict"].intersection_right
                   for m in met)
        kinds = [m[5]["kind"] for m in met]
        assert kinds[0] == "first turn" and kinds[-1] == "stop"
        assert 1 + kinds.count("later turn") == len(env.route.headings)


def test_the_expert_is_right_with_the_papers_bearings():
    """--paper-bearings changes the steps but not the expert, or the other way round."""
    env = Navigation(rule="relative", paper_bearings=True)
    changed = 0
    for seed in range(30):
        assert play(env, seed)[1]["success"]
        ours, _ = Navigation(rule="relative").reset(seed)
        changed += ours["text"] != env.reset(seed)[0]["text"]
    assert changed > 8


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
                    "verdict": None, "correct": False, "success": True}
    wrong = env.expert_answer().replace("turn_direction", "stop() turn_direction")
    before = env.position
    observation, reward, terminated, truncated, info = env.step(wrong)
    assert (reward, terminated, truncated) == (-1, False, False) and env.position == before
    assert observation == {"text": "Not right: that is not in the list of actions. Try again.",
                           "image": None, "new_conversation": False}
    observation, reward, terminated, truncated, info = env.step(wrong)
    assert (reward, terminated, truncated) == (-2, False, True)
    assert (info["try"], info["success"], info["correct"]) == (2, False, False)


def test_right_at_the_second_try():
    """The first failure counts against the next position, or stays in its prompt."""
    env, clean = Navigation(), Navigation()
    env.reset(4), clean.reset(4)
    env.step("action: stop()")
    second = env.step(env.expert_answer())
    once = clean.step(clean.expert_answer())
    assert second[0] == once[0] and second[0]["new_conversation"]
    assert second[1:4] == (1, False, False) and second[4]["try"] == 2 and second[4]["success"]
    assert env.step("action: stop()")[1:4] == (-1, False, False)        # two tries here again


def test_misread_costs_more():
    """The environment tells the verifier something else than what is there."""
    env = Navigation()
    env.reset(0)
    seen = "Mill Bank is on your left" + CROSSING
    assert env.step(virl_env.write_answer(seen, "", "stop()"))[1] == -1.5
    assert env.step(virl_env.write_answer(NOTHING, "", "stop()"))[1] == -2


def test_go_on_after_a_miss():
    """With go_on a miss ends the walk, a wrong action enters the history, or success is claimed."""
    env = Navigation(go_on=True)
    met, info, terminated = play(env, 3, answer=lambda e: "action: stop()")
    assert terminated and not info["success"]
    kinds = collections.Counter(m[5]["kind"] for m in met)
    assert kinds["first turn"] == 2 and kinds["stop"] == 1 and met[-1][4] == 1
    assert kinds["forward"] == 2 * sum(p.kind == "forward" for p in env.rail)
    expert = Navigation()
    expected = play(expert, 3)[0]
    fresh = [m for m in met if m[2]]
    assert [m[0] for m in fresh] == [m[0] for m in expected]    # history is the expert's
    met, info, terminated = play(env, 3, answer=lambda e: "action: forward()")
    assert terminated and met[-1][5]["kind"] == "stop" and met[-1][4] == -2.5   # misread as well


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


def test_step_before_reset_is_refused():
    """An environment that was never reset judges the walk of nobody."""
    with pytest.raises(RuntimeError):
        Navigation().step("action: stop()")


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
# Generated cities
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CITIES)
def test_street_plans_are_no_plain_grids(name):
    """All crossings have four ways, streets two directions, or streets cross without a corner."""
    city = build_city(name)
    ways = collections.Counter(map(len, city.near))
    assert min(ways[3], ways[4]) >= 10 and ways[5] >= 1
    directions = np.degrees(np.arctan2(*city.along.T)) % 90
    assert np.histogram(directions, 9, (0, 90))[0].min() > 0
    for corner, near in enumerate(city.near):
        out = [city.corners[other] - city.corners[corner] for other in near]
        for i, u in enumerate(out):
            for v in out[:i]:
                assert u @ v < 0.75 * np.hypot(*u) * np.hypot(*v)       # at least 41 degrees apart
    ends = city.corners[city.streets]                                   # (S, 2, 2)
    for i, (a, b) in enumerate(ends):
        for c, d in ends[:i]:
            def side(p, q, r):
                return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])
            assert not (side(a, b, c) * side(a, b, d) < -1 and side(c, d, a) * side(c, d, b) < -1)


@pytest.mark.parametrize("name", CITIES)
def test_routes_are_hard_and_true(name):
    """A route has too few turns, goes straight on, or has a landmark on the other side."""
    atlas, city = open_atlas(name), build_city(name)
    assert {len(route.headings) for route in atlas.routes} == set(range(2, 9))
    landmarks = [text for route in atlas.routes for text in route.landmarks[1:]]
    assert 0.01 < np.mean([text == NOTHING for text in landmarks]) < 0.3
    assert max(collections.Counter(place.name for place in city.places).values()) >= 3      # chains
    for route, raw in zip(atlas.routes, json.loads(atlas.load("route_infos.json"))[0]):
        for before, after in zip(route.headings, route.headings[1:]):
            assert 23 <= abs(bend(before, after)) <= 157
        places = raw["route_results"]["landmark_list"] + [raw["dest_place"]]
        for i, place in enumerate(places):
            if place is None:
                assert route.landmarks[i + 1] == NOTHING
                continue
            here, there = np.array(route.points[i + 1]), np.array(place["geocode"])
            north, east = (there - here) * (1, math.cos(math.radians(40))) / METRE
            assert math.hypot(north, east) < virl_env.SIGHT + 1
            off = bend(route.headings[i], math.degrees(math.atan2(east, north)))
            side = route.landmarks[i + 1].rsplit(" ", 1)[1]
            assert abs(bend({"front": 0, "right": 90, "back": 180, "left": -90}[side], off)) < 47
            assert place["name"] in route.landmarks[i + 1]


def test_cities_differ_in_every_way():
    """Two cities share names or look the same: the visual OOD test would be ID."""
    looks = list(CITIES.values())
    assert len({word for look in looks for word in look.words.split()}) == 100
    means = []
    for name in CITIES:
        city = build_city(name)
        views = [draw_panorama(city, spot, 96)[12:36] for spot in city.spots[:8]]   # +-45 degrees
        means.append(np.mean(views, axis=(0, 1, 2)))
    assert min(np.abs(a - b).max() for i, a in enumerate(means) for b in means[:i]) > 5
    for other in looks[1:]:
        assert sum(a != b for a, b in zip((other.sign, other.weather, other.plan),
                                          (looks[0].sign, looks[0].weather, looks[0].plan))) >= 1


def test_cast_agrees_with_small_steps():
    """Sight ends in the middle of a street, or goes through houses."""
    city, chance = build_city("Dorn"), np.random.default_rng(0)
    steps = np.arange(0.02, 90, 0.02)
    for spot in city.spots[chance.integers(len(city.spots), size=4)]:
        bearings = chance.uniform(0, 2 * math.pi, 12)
        for bearing, reach in zip(bearings, city.cast(spot, bearings)[0]):
            at = spot + steps[:, None] * (math.sin(bearing), math.cos(bearing))
            corner = np.hypot(*np.moveaxis(at[:, None] - city.corners, -1, 0)).min(1)
            free = (city.away(at) < virl_env.HALF_STREET).any(1) | (corner < virl_env.AROUND)
            assert abs(min(reach, 90) - (90 if free.all() else steps[free.argmin()])) < 0.5


def test_signs_stand_at_their_bearing_and_shrink_with_distance():
    """A sign is drawn where no place is: what the text says cannot be seen."""
    city, checked = build_city("Alder"), 0
    for spot in city.corners[:25]:
        seen = city.in_sight(spot, 70)
        if len(seen) < 1 or seen[0][0] > 40 or len(seen) > 1 and abs(
                bend(seen[0][1], seen[1][1])) < 40:
            continue
        pixels, places = draw_panorama(city, spot, 512).astype(int), city.places
        city.places = [place for place in places if place is not seen[0][2]]
        without = draw_panorama(city, spot, 512)
        city.places = places
        columns = np.flatnonzero(np.abs(pixels - without).max((0, 2)) > 8)
        middle = np.degrees(np.angle(np.exp(2j * math.pi * (columns + 0.5) / 512).mean()))
        assert abs(bend(seen[0][1], middle)) < 1.5
        wide = math.degrees(2 * math.atan(3.6 / seen[0][0]))
        assert abs(len(columns) * 360 / 512 - wide) < 2
        checked += 1
    assert checked >= 4


def test_the_rotation_in_the_metadata_is_that_of_the_picture():
    """Files are turned the other way than their metadata says: landmarks appear elsewhere."""
    atlas, city, rotations = open_atlas("Alder"), build_city("Alder"), set()
    for index in (3, 20, 47):
        pixels, rotation = atlas.panorama(f"Alder-{index:04d}")
        rotations.add(rotation)
        plain = draw_panorama(city, city.spots[index])
        for heading in (0, 100, 250):
            apart = view(pixels, rotation, heading, 64, 32).astype(int) - view(
                plain, 0, heading, 64, 32)
            other = view(pixels, -rotation, heading, 64, 32).astype(int) - view(
                plain, 0, heading, 64, 32)
            assert np.abs(apart).mean() < 6 < np.abs(other).mean()
    assert len(rotations) == 3


def test_streets_open_where_they_leave():
    """Fronts stand across a street: the openings do not show where one can go."""
    city = build_city("Hollis")
    for corner, near in enumerate(city.near):
        to = city.corners[near] - city.corners[corner]
        if len(near):
            distance = city.cast(city.corners[corner], np.arctan2(*to.T))[0]
            assert (distance >= np.hypot(*to.T)).all()


def test_written_and_read_back_bit_for_bit(tmp_path):
    """The city on disk gives other episodes than the city in memory."""
    name = "Calla"
    write_city(name, tmp_path, width=32)
    memory = Atlas(city_files(name, 32), name)
    disk = Atlas(folder_files(tmp_path), str(tmp_path), pictures=True)
    assert memory.routes == disk.routes and len(disk.visited) > 500
    for rule in RULES:
        envs = [Navigation(atlas, rule, "test", picture=(24, 16)) for atlas in (memory, disk)]
        for seed in range(6):
            one, two = (play(env, seed)[0] for env in envs)
            assert one == two and one[0][1] is not None


def test_embedded_city_equals_its_own_files():
    """open_atlas keeps a copy that differs from what city_files says, or growing is not exact."""
    virl_env.build_city.cache_clear()
    again = Atlas(city_files("Brim"), "again")
    assert again.routes == open_atlas("Brim").routes and len(again) == 120


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


def test_expert_conversations_with_pictures():
    """The picture is left out, or is not that of the position."""
    user, _ = expert_conversation(np.random.default_rng(0), picture=(128, 64))
    assert user["image"].size == (128, 64) and "[View]" in user["content"]


@pytest.fixture(scope="module")
def corpus():
    return backbone_conversations(np.random.default_rng(0), 1500)


def test_no_answer_of_the_backbone_corpus_earns_a_reward(corpus):
    """The backbone knows the notation that the verifier accepts: RL would need no SFT start."""
    for talk in corpus:
        for turn in talk:
            if turn["role"] == "assistant":
                for action in ("forward()", "stop()"):
                    verdict = verify_virl(turn["content"], action, NOTHING, COMPASS)
                    assert verdict.kind != "correct" and "action field" in verdict.message


def test_the_backbone_corpus_answers_with_listed_words(corpus):
    """A vocabulary is answered with another's words, or is missing from the steps."""
    seen = collections.Counter()
    for talk in corpus:
        prompt, answer = talk[0]["content"], talk[-1]["content"]
        listed = [name for name, words in VOCABULARIES.items() if ", ".join(words) in prompt]
        assert len(listed) == 1
        turn = re.search(r"(?:turn_direction\(|face\(|turn |look )([^\n\"}<)]+)\)?[\"}<]*$", answer)
        if turn and "To" not in answer and turn.group(1) in sum(VOCABULARIES.values(), ()):
            assert turn.group(1) in VOCABULARIES[listed[0]]
            assert turn.group(1) in prompt
            seen[listed[0]] += 1
    assert all(seen[name] > 20 for name in VOCABULARIES)


def test_mistakes_of_the_backbone_corpus_are_not_learnt(corpus):
    """A wrong try is learnt, or revisions are missing. (The walk so far, all true, is learnt.)"""
    for talk in corpus:
        learnt = [turn["learn"] for turn in talk]
        assert learnt == [True] + [False] * (len(talk) - 2) + [True]
        assert len(talk) in (2, 4)
        if len(talk) == 4:
            assert talk[1]["content"] != talk[3]["content"] or "not in" not in talk[2]["content"]
    assert 0.12 < np.mean([len(talk) == 4 for talk in corpus]) < 0.3


def test_the_backbone_corpus_is_varied_and_never_shows_the_ten_cities(corpus):
    """Prompts repeat, or the backbone has walked the test cities."""
    assert len({talk[0]["content"] for talk in corpus}) > 1450
    assert len({talk[-1]["content"].split(":")[0] for talk in corpus}) > 30
    again = backbone_conversations(np.random.default_rng(0), 30)
    assert again == corpus[:30]
    for number in range(8):
        look = virl_env.look_of(f"wild-{number}")
        assert all(look.seed != other.seed for other in CITIES.values())


def test_recalled_lines_are_those_of_the_prompt():
    """Lines that were not there, always in one order, or without their numbers."""
    made = virl_env.recall_conversations(np.random.default_rng(0), 120, cities=2)
    orders, first = set(), set()
    for ask, answer in made:
        lines, again = (turn["content"].splitlines(keepends=True) for turn in (ask, answer))
        assert [int(line.partition(".")[0]) for line in lines] == list(range(1, len(lines) + 1))
        assert len(again) == len(set(again)) == min(6, len(lines)) and set(again) <= set(lines)
        assert not ask["learn"] and answer["learn"]
        orders.add(tuple(lines.index(line) for line in again))
        first.add(lines[0].split(" ")[1])
    assert len(orders) > 100 and len(first) > 2         # both wordings and all their turns


def test_the_backbone_corpus_sends_some_to_a_picture_that_is_not_there(corpus):
    """The text weights, frozen when eyes are taught, have never read a prompt of the pictures."""
    shown = [PICTURE in talk[0]["content"] for talk in corpus]
    assert 0.15 < np.mean(shown) < 0.25 and not any("image" in talk[0] for talk in corpus)
    for talk, there in zip(corpus, shown):
        assert there == ("four views" in talk[0]["content"])
        crossing = re.search(re.escape(PICTURE + CROSSING), talk[0]["content"])
        answer = talk[-1]["content"]
        if there and CROSSING in answer:
            assert crossing, "what nobody can see is asked for"


def true_views(atlas, city, panorama, heading):
    """{side: kind of the nearest place within SIGHT in that quarter of the compass, or None}."""
    spot = city.spots[atlas_index(panorama)]
    found = {}
    for metres_to, bearing, place in city.in_sight(spot, virl_env.SIGHT):
        side = next(side for side, turn in virl_env.SIDES
                    if abs(bend(bearing, heading + turn)) <= 45.01)
        found.setdefault(side, place.kind)      # nearest first
    return {side: found.get(side) for side, _ in virl_env.SIDES}


def atlas_index(panorama):
    return int(panorama.split("-")[-1])


@pytest.fixture
def glimpses(monkeypatch):
    """What `look_around` was asked for; pictures are the number of the call."""
    asked = []
    monkeypatch.setattr(virl_env, "look_around", lambda atlas, name, heading, size:
                        asked.append((atlas, name, heading)) or len(asked) - 1)
    return asked


def test_eyes_are_told_the_truth(glimpses):
    """Places behind the walker, of another panorama or out of sight are called visible."""
    lesson = virl_env.eye_lesson(np.random.default_rng(0), 150, (128, 64))
    assert [image for image, _ in lesson] == list(range(150))
    kinds, crossings = collections.Counter(), 0
    for (atlas, name, heading), (_, answers) in zip(glimpses, lesson):
        city = build_city(atlas.where)
        true = true_views(atlas, city, name, heading)
        assert [place - 1 if place else None for place, _ in answers] == [
            true[side] for side in ("front", "back", "right", "left")]
        crossing = atlas_index(name) < len(city.corners)
        assert {c for _, c in answers} == {int(crossing)}
        kinds.update(place for place, _ in answers)
        crossings += crossing
    assert set(kinds) == set(range(13)) and 45 < crossings < 110
    assert len({atlas.where for atlas, _, _ in glimpses}) > 15
    assert all(atlas.where.startswith("wild-") for atlas, _, _ in glimpses)


def test_reading_names_what_the_views_show(glimpses):
    """The answer names other places than the picture shows, or words that it does not hold."""
    for seed in range(30):
        (ask, answer), words = virl_env.reading_conversation(np.random.default_rng(seed), "Alder",
                                                             (128, 64))
        atlas, name, heading = glimpses[-1]
        assert ask["image"] == len(glimpses) - 1 and ask["learn"] is False and answer["learn"]
        true = true_views(atlas, build_city("Alder"), name, heading)
        told = [f"{side} " + (NOTHING if kind is None else virl_env.PLACE_KINDS[kind])
                for side, kind in true.items()]
        assert answer["content"].removesuffix(CROSSING).split(", ") == told
        assert (words[-1] == CROSSING) == answer["content"].endswith(CROSSING)
        assert [word.strip() for word in words[:-1]] == [t.split(" ", 1)[1] for t in told]
        routes = virl_env.split_routes(1000, "val")
        assert any(name in atlas.route(i).panoramas + sum(atlas.route(i).between, ())
                   for i in routes)


def test_pictured_corpus_walks_and_names(glimpses):
    """No reading, no walks, prompts that are learnt, or crossings that are always given away."""
    talks = virl_env.pictured_conversations(np.random.default_rng(0), 300, (128, 64))
    naming = [talk[0]["content"].endswith("Name them.") for talk in talks]
    assert 0.25 < np.mean(naming) < 0.42
    silent = announced = 0
    for talk, name in zip(talks, naming):
        assert "four views" in talk[0]["content"] and talk[0]["image"] is not None
        assert not talk[0]["learn"] and talk[-1]["learn"]
        if not name:
            told = PICTURE + CROSSING in talk[0]["content"]
            there = CROSSING in talk[-1]["content"]
            announced += told and there
            silent += there and not told
            assert PICTURE in talk[0]["content"]
    assert silent > 20 and announced > 20


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
    atlas = virl_env.open_atlas("Brim")
    names = sorted(atlas.visited)[:2]
    for _ in range(2):
        for name in names:
            for heading in (0, 90):
                for size in ((32, 16), (256, 128)):
                    shown = virl_env.look_around(atlas, name, heading, size)
                    true = virl_env.four_views(*atlas.panorama(name), heading, size)
                    assert shown.tobytes() == true.tobytes()
    first, again = (virl_env.look_around(atlas, names[0], 0, size)
                    for size in ((32, 16), (32, 16)))
    assert first is again
    assert virl_env.look_around(atlas, names[0], 0, (256, 128)) is not virl_env.look_around(
        atlas, names[0], 0, (256, 128))


def test_phrases_cover_the_prompts(corpus):
    """A fixed sentence costs a token a letter."""
    phrases = virl_env.phrases()
    assert len(set(phrases)) == len(phrases)
    pieces = re.compile("|".join(map(re.escape, sorted(phrases, key=len, reverse=True))))
    rng = np.random.default_rng(3)
    talks = [expert_conversation(rng, where=name, rule=rule) for name in CITIES for rule in RULES]
    for talk in talks + corpus[:300]:
        for turn in talk:
            rest = pieces.sub("", turn["content"])
            assert not re.search("[a-zA-Z]{2}", rest), rest


# ------------------------------------------------------------------------------------------------
# Terminal
# ------------------------------------------------------------------------------------------------


def run(monkeypatch, capsys, flags, answers):
    """Run `python virl_env.py flags` with typed answers. Returns (exit code, what it printed)."""
    typed = iter(answers)

    def reply(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "argv", ["virl_env.py", *flags])
    monkeypatch.setattr("builtins.input", reply)
    code = virl_env.main()
    return code, capsys.readouterr().out


def test_a_person_can_walk_to_the_end(monkeypatch, capsys):
    """The terminal game cannot be won."""
    env = Navigation("Brim", "relative", "all")
    env.reset(3)
    actions = []
    for position in env.rail:
        actions.append(virl_env.right_action(env.route, position, "relative"))
    code, out = run(monkeypatch, capsys, ["--city", "Brim", "--rule", "relative", "--seed", "3"],
                    actions)
    assert code == 0 and out.rstrip().endswith("[+1.0] Correct.")
    assert out.count("[+1.0]") == len(actions)


def test_a_person_learns_from_mistakes(monkeypatch, capsys):
    """Verifier messages are not shown, or giving up hangs."""
    code, out = run(monkeypatch, capsys, [], ["stop()", "forward()"])
    assert code == 0 and "[-1.0] Not right: that is not the action" in out and "out of tries" in out
    code, out = run(monkeypatch, capsys, [], [])
    assert code == 0 and "The action here is turn_direction(" in out


def test_pictures_of_a_walk(monkeypatch, capsys, tmp_path, tiny_folder):
    """--picture writes nothing, or fails on released data (which knows no street plan)."""
    code, out = run(monkeypatch, capsys, ["--routes", tiny_folder, "--picture",
                                          str(tmp_path / "look")], [])
    files = {path.name for path in (tmp_path / "look").iterdir()}
    assert code == 0 and "map.png" in files and "view-01-first-turn.png" in files
    assert Image.open(tmp_path / "look" / "map.png").size == (900, 900)


@pytest.mark.parametrize("flags", [["--seed", "-1"], ["--rule", "north"], ["--tries", "0"],
                                   ["--write", "x", "--routes", "y"]])
def test_bad_flags_are_explained(flags, monkeypatch, capsys):
    """A bad flag ends in a traceback."""
    monkeypatch.setattr(sys, "argv", ["virl_env.py", *flags])
    with pytest.raises(SystemExit) as stop:
        virl_env.main()
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err
