"""Tests of backbones/gp_corpus.py: what the small backbone of the cards learns before SFT.

All text is read back from the words that a model sees, not from the objects that the code keeps.

    python -m pytest tests/test_gp_corpus.py
"""

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest

import gp_env
from backbones import gp_corpus
from backbones.gp_corpus import OTHER_PROMPTS, backbone_conversations
from gp_env import (IN_PICTURE, PICTURE_SIZE, RULES, Hand, card_numbers,
                    expert_conversation, prompt, split_of)
from test_gp_env import read_prompt
from verifier import parse_formula, verify_gp

SPADES = ("spades",) * 4

# The shipped backbones were trained on these very texts, and the results on these experts.
DIGESTS = {
    "backbone":
        "f25cc5f10d794a8788c0c3aa0dacb97dc245f110da8a4bfcb949b0f0fc87ab54",
    "pictured":
        "87bf34cdac2cbcb74dd56e60e04aa08830d12916642de1ff12e9d3f756dbdaba",
    "reading":
        "6f316cadbd6fb7d82a669bff9061c73ed2a53db9dade2062fc7f5ee4aaa7c3be",
    "eyes":
        "91b70173726010b46ff666b05ace552bc18f918a24cc78ec526a55b159220fc4",
    "phrases":
        "e977022fec0ad30cfb1363ea334d17ad7ad083b7c2cd05cfe45e9456ce51cbb2",
    "experts":
        "4cf74579b28d41ebc2473d6eabf8a8f0f80e772b6cdff00755ffee15648f5dc3",
    "pictured experts":
        "0f7d318d696482136fb488dd1374957d479e8172940e7680af44807d89d8dbcc",
}


def test_training_texts_are_those_of_the_shipped_backbones(monkeypatch):
    """A random draw more or less: neither the backbones nor the results can be made again.

    A picture counts as what it is drawn from: its pixels may differ between versions of Pillow.
    """
    for module in (gp_env, gp_corpus):
        monkeypatch.setattr(module, "draw_hand", lambda hand, seed, size: [hand.cards, hand.suits,
                                                                           seed, size])
    rng, size = np.random.default_rng, PICTURE_SIZE
    four, five = rng(4), rng(5)
    how = dict(picture=size, rule="face", face=True, suits="black")
    made = {
        "backbone": backbone_conversations(rng(0), 200),
        "pictured": gp_corpus.pictured_conversations(rng(1), 20, size),
        "reading": [gp_corpus.reading_conversation(rng([2, i]), ["black", "red"][i % 2], size)
                    for i in range(20)],
        "eyes": gp_corpus.eye_lesson(rng(3), 20, size),
        "phrases": gp_corpus.phrases(),
        "experts": [expert_conversation(four) for _ in range(200)],
        "pictured experts": [expert_conversation(five, **how) for _ in range(200)],
    }
    for name, value in made.items():
        text = json.dumps(value, sort_keys=True)
        assert hashlib.sha256(text.encode()).hexdigest() == DIGESTS[name], name


def read_equation(text):
    """(formula, stated result) of the one equation in an answer, whichever way round it is."""
    equations = re.findall(r"([0-9+*/()-]+)=([0-9+*/()-]+)", text)
    assert len(equations) == 1, text
    left, right = equations[0]
    return (right, int(left)) if left.isdigit() else (left, int(right))


@pytest.fixture(scope="module")
def corpus():
    """3,000 conversations of the backbone's corpus."""
    return backbone_conversations(np.random.default_rng(8), 3000)


def questions(turns):
    """[(cards, rule, target, answer)] of a conversation; a follow-up asks for another target."""
    cards, rule, target = read_prompt(turns[0]["content"], OTHER_PROMPTS)
    asked = []
    for question, answer in zip(turns[::2], turns[1::2]):
        follow_up = re.fullmatch(r"Now make (\d+)\. The equation alone\.", question["content"])
        target = int(follow_up.group(1)) if follow_up else target
        asked.append((cards, rule, target, answer))
    return asked


def test_test_hands_never_ask_for_24_in_the_backbone_corpus(corpus):
    """Test hands leak into pretraining, where nobody looks for them."""
    every = [(cards, target) for turns in corpus for cards, _, target, _ in questions(turns)]
    hands = [cards for cards, target in every if target == 24]
    assert {split_of(cards) for cards in hands} == {"train"}
    # and 24 is asked often enough for this to mean something, and is not all there is
    assert len(hands) > 300 and len({target for _, target in every}) > 90


def test_no_answer_of_the_backbone_corpus_earns_a_reward(corpus):
    """Pretraining gives away the answer format, and SFT looks useless: RL learns without it."""
    answers = 0
    for turns in corpus:
        for cards, rule, target, answer in questions(turns):
            numbers = card_numbers(cards, rule)
            verdict = verify_gp(answer["content"], cards, numbers, target)
            assert not verdict.correct, answer["content"]
            answers += 1
            if answer["learn"]:     # the formula is right, the verifier refuses the notation
                formula, _ = read_equation(answer["content"])
                hand = Hand(tuple(cards), SPADES, rule, target)
                said = gp_env.answer(hand, hand.numbers, formula)
                assert verify_gp(said, cards, numbers, target).correct
    assert answers > len(corpus)


def test_learned_answers_of_the_backbone_corpus_are_true(corpus):
    """The corpus teaches wrong arithmetic, another rule than the stated one, or a wrong try."""
    for turns in corpus:
        for cards, rule, target, answer in questions(turns):
            worth = dict(zip("JQK", rule)) | {"A": 1}
            numbers = sorted(worth[c] if c in worth else int(c) for c in cards)
            formula, stated = read_equation(answer["content"])
            if answer["learn"]:
                value, used, _ = parse_formula(formula)
                assert value == target == stated and sorted(used) == numbers, turns
            else:
                assert not verify_gp(f"formula: {formula}", cards, numbers, target).correct


def test_backbone_corpus_turns_and_rules(corpus):
    """Turns do not alternate, nobody ever revises, or the corpus knows one rule only."""
    revised = followed = 0
    for turns in corpus:
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert not any(turn["learn"] for turn in turns[::2]) and turns[-1]["learn"]
        for before, turn in zip(turns[1::2], turns[2::2]):
            if not before["learn"]:
                assert re.fullmatch(r"Not right: .+\. Try again\.", turn["content"])
        revised += not turns[1]["learn"]
        followed += turns[1]["learn"] and len(turns) > 2
    assert 0.2 < revised / len(corpus) < 0.3                # a quarter, 6 standard deviations wide
    assert 0.4 < followed / len(corpus) < 0.55
    rules = [read_prompt(turns[0]["content"], OTHER_PROMPTS)[1] for turns in corpus]
    for court_card in zip(*rules):
        assert set(court_card) == {10, 11, 12, 13}


def test_phrases_are_distinct_and_cover_the_prompt():
    """A phrase gets two tokens, or a template was added whose words cost a token a letter."""
    pieces = gp_corpus.phrases()
    assert len(set(pieces)) == len(pieces)
    hand = Hand(("A", "2", "3", "4"), SPADES, RULES["ten"])
    longest_first = sorted(pieces, key=len, reverse=True)
    rest = re.sub("|".join(map(re.escape, longest_first)), "", prompt(hand))
    assert rest == "A234"                                   # only the cards are left


def test_pictured_corpus_is_the_corpus_with_the_list_drawn(monkeypatch):
    """Pictures of other cards than the answer names, the list left in, or a card dealt twice."""
    drawn = []
    monkeypatch.setattr(gp_corpus, "draw_hand", lambda hand, seed, size: drawn.append(hand) or seed)
    rng = np.random.default_rng(3)
    shown = gp_corpus.pictured_conversations(rng, 400, (128, 64))
    plain = {}                                          # the conversations it began with, by answer
    for turns in backbone_conversations(np.random.default_rng(3), 400):
        plain[turns[1]["content"], turns[-1]["content"]] = turns
    found = 0
    for after, hand in zip(shown, drawn, strict=True):
        text = after[0]["content"]
        assert text.count(IN_PICTURE) == 1
        listed = text.replace(IN_PICTURE, ", ".join(hand.cards))
        assert read_prompt(listed, OTHER_PROMPTS)[0] == list(hand.cards)
        before = plain.get((after[1]["content"], after[-1]["content"]))
        found += before is not None
        assert before is None or (before[0]["content"], before[1:]) == (listed, after[1:])
        assert len(set(zip(hand.cards, hand.suits))) == 4, "the same card twice"
        assert split_of(hand.cards) == "train"
    assert len(shown) == 400 and found > 200
    suits = Counter(suit for hand in drawn for suit in hand.suits)
    assert set(suits) == set(gp_env.SUITS["all"])
    black = sum(suits[suit] for suit in gp_env.SUITS["black"]) / sum(suits.values())
    assert 0.68 < black < 0.82                              # three in four, 6 deviations wide
    assert len({turns[0]["image"] for turns in shown}) > 390


def test_eyes_learn_on_training_hands_of_both_colours(monkeypatch):
    """Held-out hands in the first lesson, a rank or suit missing, a picture of other cards."""
    monkeypatch.setattr(gp_corpus, "draw_hand", lambda hand, seed, size: (hand, seed, size))
    made = gp_corpus.pictured_hands(np.random.default_rng(3), 400, (128, 64))
    assert made == gp_corpus.pictured_hands(np.random.default_rng(3), 400, (128, 64))
    assert len(made) == 400 and len({image[1] for _, image in made}) > 390
    asked = gp_corpus.eye_lesson(np.random.default_rng(3), 400, (128, 64))
    for (hand, image), (same, answers) in zip(made, asked, strict=True):
        assert same == image and [(gp_env.RANKS[rank], gp_env.SUITS["all"][suit])
                                  for rank, suit in answers] == list(zip(hand.cards, hand.suits))
        assert image[0] is hand and split_of(hand.cards) == "train"
        assert len(set(zip(hand.cards, hand.suits))) == 4, "the same card twice"
    assert {rank for hand, _ in made for rank in hand.cards} == set(gp_env.RANKS)
    suits = Counter(suit for hand, _ in made for suit in hand.suits)
    assert set(suits) == set(gp_env.SUITS["all"])
    assert 0.68 < sum(suits[suit] for suit in gp_env.SUITS["black"]) / 1600 < 0.82


@pytest.mark.parametrize("suits", ["black", "red"])
def test_reading_is_asked_on_validation_hands_only(monkeypatch, suits):
    """Reading is measured on hands of training, or of test, which nobody may tune on."""
    drawn, draw = [], gp_corpus.draw_hand
    monkeypatch.setattr(gp_corpus, "draw_hand",
                        lambda hand, *how: drawn.append(hand) or draw(hand, *how))
    for seed in range(20):
        drawn.clear()
        rng = np.random.default_rng(seed)
        (question, answer), cards = gp_corpus.reading_conversation(rng, suits, (128, 64))
        hand, = drawn
        assert hand.cards == cards
        assert split_of(hand.cards) == "val" and set(hand.suits) <= set(gp_env.SUITS[suits])
        assert answer["content"].startswith(f"hand: {' '.join(hand.cards)}\n")
        assert IN_PICTURE in question["content"] and question["image"].size == (128, 64)
        verdict = verify_gp(answer["content"], hand.cards, hand.numbers)
        assert not verdict.correct, "the backbone must not know the task's notation"
