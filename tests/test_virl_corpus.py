"""Tests of backbones/virl_corpus.py: what the small backbone of walks learns from.

    python -m pytest tests/test_virl_corpus.py
"""

import collections
import re

import numpy as np
import pytest
from test_virl_env import digest

from backbones import virl_corpus
from backbones.virl_corpus import VOCABULARIES, all_words, backbone_conversations
from cities.generate import CITIES, PLACE_KINDS, SIGHT, build_city
from verifier import verify_virl
from virl_env import (COMPASS, CROSSING, NOTHING, PICTURE, RULES, SIDES, bend, expert_conversation,
                      lay_rail, open_atlas, right_action, split_routes, write_prompt, write_steps)

SEEN = (128, 64)        # pixels, as the small backbone sees


@pytest.fixture(scope="module")
def corpus():
    return backbone_conversations(np.random.default_rng(0), 1500)


@pytest.mark.parametrize("draw, expected", [
    (lambda: backbone_conversations(np.random.default_rng(0), 100), "d9869d5a61775f69"),
    (lambda: virl_corpus.recall_conversations(np.random.default_rng(1), 20), "80b6cd87166b8941"),
    (lambda: virl_corpus.pictured_conversations(np.random.default_rng(2), 10, SEEN),
     "3bce6fdc5509fb8e"),
    (lambda: [virl_corpus.reading_conversation(rng, "Alder", SEEN)
              for rng in [np.random.default_rng(3)] for _ in range(10)], "1e7d6c2e8d2f3706"),
    (lambda: virl_corpus.eye_lesson(np.random.default_rng(4), 10, SEEN), "299e154a28d4e6cb"),
    (virl_corpus.phrases, "0ca91cf8d008fa09")],
    ids=["words", "recall", "pictured", "reading", "eyes", "phrases"])
def test_the_corpus_is_the_one_that_the_shipped_backbone_learnt(draw, expected):
    """A draw more or less, or a word: the recipe makes other weights than those that are here."""
    assert digest(draw()) == expected


def test_words_of_a_turn_by_hand():
    """A clock or an arrow that points elsewhere, or a vocabulary that has another order."""
    route = open_atlas("wild-0").routes[0]
    for turn, clock, arrow in ((0, "12", "↑"), (90, "3", "→"), (-45, "10", "↖"), (180, "6", "↓")):
        words = all_words(route, route.headings[1] - turn, 1)
        assert (words["clock"].split()[0], words["arrows"]) == (clock, arrow)
        assert words["compass"] == route.words[1]
        assert all(word in VOCABULARIES[name] for name, word in words.items())


@pytest.mark.parametrize("vocabulary", RULES.values())
def test_the_tasks_own_wording_is_among_those_of_the_corpus(vocabulary):
    """A sentence of the task was changed here or there: the tokenizer has no phrase for it."""
    route, (go, turn, stop) = open_atlas("wild-0").routes[0], virl_corpus.MOVES
    assert virl_corpus.tell_steps(route, 77, virl_corpus.TURN, *virl_corpus.ONS[0]) == \
        write_steps(route, 77)
    space = virl_corpus.SPACES[0].format(go=go, turn=turn.format(x="x"), stop=stop,
                                         words=", ".join(VOCABULARIES[vocabulary]))
    for position in lay_rail(route, 77, np.random.default_rng(0)):
        assert f"\n[Actions] {space}\n" in write_prompt([], vocabulary, [], position, False)
        assert virl_corpus.tell_action(route, position, vocabulary) == right_action(
            route, position, vocabulary)


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


def test_the_backbone_corpus_is_varied(corpus):
    """Prompts or notations repeat, or one seed makes two corpora."""
    assert len({talk[0]["content"] for talk in corpus}) > 1450
    assert len({talk[-1]["content"].split(":")[0] for talk in corpus}) > 30
    again = backbone_conversations(np.random.default_rng(0), 30)
    assert again == corpus[:30]


def test_recalled_lines_are_those_of_the_prompt():
    """Lines that were not there, always in one order, or without their numbers."""
    made = virl_corpus.recall_conversations(np.random.default_rng(0), 120, cities=2)
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
    for metres_to, bearing, place in city.in_sight(spot, SIGHT):
        side = next(side for side, turn in SIDES
                    if abs(bend(bearing, heading + turn)) <= 45.01)
        found.setdefault(side, place.kind)      # nearest first
    return {side: found.get(side) for side, _ in SIDES}


def atlas_index(panorama):
    return int(panorama.split("-")[-1])


@pytest.fixture
def glimpses(monkeypatch):
    """What `look_around` was asked for; pictures are the number of the call."""
    asked = []
    monkeypatch.setattr(virl_corpus, "look_around", lambda atlas, name, heading, size:
                        asked.append((atlas, name, heading)) or len(asked) - 1)
    return asked


def test_eyes_are_told_the_truth(glimpses):
    """Places behind the walker, of another panorama or out of sight are called visible."""
    lesson = virl_corpus.eye_lesson(np.random.default_rng(0), 150, SEEN)
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
        rng = np.random.default_rng(seed)
        (ask, answer), words = virl_corpus.reading_conversation(rng, "Alder", SEEN)
        atlas, name, heading = glimpses[-1]
        assert ask["image"] == len(glimpses) - 1 and ask["learn"] is False and answer["learn"]
        true = true_views(atlas, build_city("Alder"), name, heading)
        told = [f"{side} " + (NOTHING if kind is None else PLACE_KINDS[kind])
                for side, kind in true.items()]
        assert answer["content"].removesuffix(CROSSING).split(", ") == told
        assert (words[-1] == CROSSING) == answer["content"].endswith(CROSSING)
        assert [word.strip() for word in words[:-1]] == [t.split(" ", 1)[1] for t in told]
        routes = split_routes(1000, "val")
        assert any(name in atlas.route(i).panoramas + sum(atlas.route(i).between, ())
                   for i in routes)


def test_pictured_corpus_walks_and_names(glimpses):
    """No reading, no walks, prompts that are learnt, or crossings that are always given away."""
    talks = virl_corpus.pictured_conversations(np.random.default_rng(0), 300, SEEN)
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


def test_phrases_cover_the_prompts(corpus):
    """A fixed sentence costs a token a letter."""
    phrases = virl_corpus.phrases()
    assert len(set(phrases)) == len(phrases)
    pieces = re.compile("|".join(map(re.escape, sorted(phrases, key=len, reverse=True))))
    rng = np.random.default_rng(3)
    talks = [expert_conversation(rng, where=name, rule=rule) for name in CITIES for rule in RULES]
    for talk in talks + corpus[:300]:
        for turn in talk:
            rest = pieces.sub("", turn["content"])
            assert not re.search("[a-zA-Z]{2}", rest), rest
