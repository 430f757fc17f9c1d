"""Tests of gp_env.py: the game, its solver, the splits, the environment, the training text.

The solver is compared with a brute force that shares no line with it, and all training text is read
back from the words that a model sees, not from the objects that the code keeps.

    python -m pytest tests/test_gp_env.py
"""

import doctest
import functools
import io
import itertools
import json
import re
import string
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import gp_env
from gp_env import (PROMPT, RANKS, RULES, GeneralPoints, Hand, answer, card_numbers, deal,
                    expert_conversation, prompt, solutions, solvable, split_of)
from verifier import parse_formula, verify_gp

ROOT = Path(gp_env.__file__).parent
ALL_HANDS = list(itertools.combinations_with_replacement(RANKS, 4))             # 1,820 of 13 names
ALL_NUMBERS = list(itertools.combinations_with_replacement(range(1, 14), 4))    # 1,820 of 1..13
SPADES = ("spades",) * 4

# ------------------------------------------------------------------------------------------------
# The solver
# ------------------------------------------------------------------------------------------------


@functools.cache
def can_make(numbers, target):
    """Brute force, another way than the solver: put two numbers together until one is left."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        x, y = numbers[i], numbers[j]
        results = [x + y, x - y, x * y] + ([x / y] if y else [])
        if any(can_make(tuple(sorted([*rest, result])), target) for result in results):
            return True
    return False


def some_numbers(count, seed):
    """`count` random hands of numbers 1..13, and two that need fractions."""
    drawn = np.random.default_rng(seed).integers(1, 14, size=(count, 4)).tolist()
    return drawn + [[8, 3, 8, 3], [1, 5, 5, 5]]


@pytest.mark.parametrize("target, count", [(24, 30), (0, 20)])
def test_solver_agrees_with_brute_force(target, count):
    """The solver misses a shape of brackets or an order, or lets a division by zero through."""
    agreed = Counter()
    for numbers in some_numbers(count, seed=target):
        expected = can_make(tuple(map(Fraction, numbers)), target)
        assert solvable(numbers, target) == expected, numbers
        assert bool(solutions(numbers, target)) == expected, numbers
        agreed[expected] += 1
    assert agreed[True] > 0 and agreed[False] > 0


@pytest.mark.parametrize("target", [24, 0])
def test_every_solution_makes_the_target_with_each_number_once(target):
    """A bracket is left out where arithmetic needs it: SFT would teach wrong equations.

    Target 0 is for the division by zero: 8/(3/(8-8)) must not count as 8 over infinity.
    """
    checked = 0
    for numbers in some_numbers(30, seed=5):
        for formula in solutions(numbers, target):
            value, used, _ = parse_formula(formula)
            assert value == target and sorted(used) == sorted(numbers), (numbers, formula)
            checked += 1
    assert checked > 100


def test_solutions_are_distinct_and_ignore_the_order_of_the_hand():
    """A formula that is listed twice is twice as likely to be the expert's."""
    for numbers in some_numbers(10, seed=6):
        found = solutions(numbers)
        assert len(set(found)) == len(found)
        assert solutions(numbers[::-1]) == found


def test_known_numbers_of_solvable_hands():
    """The solver errs on a few hands that no sample meets. The counts are well known."""
    assert sum(solvable(numbers) for numbers in ALL_NUMBERS) == 1362
    assert sum(solvable(numbers) for numbers in ALL_NUMBERS if max(numbers) <= 10) == 566


# ------------------------------------------------------------------------------------------------
# Cards, rules, splits
# ------------------------------------------------------------------------------------------------


def test_card_numbers():
    """The OOD rule is the training rule under another name, or an ace is not 1."""
    assert card_numbers(["A", "2", "10", "J"], RULES["ten"]) == [1, 2, 10, 10]
    assert card_numbers(["J", "Q", "K", "9"], RULES["ten"]) == [10, 10, 10, 9]
    assert card_numbers(["J", "Q", "K", "9"], RULES["face"]) == [11, 12, 13, 9]
    assert Hand(("K", "A", "J", "Q"), SPADES, (13, 11, 12)).numbers == [12, 1, 13, 11]


def as_ten(cards):
    """The cards with 10 for J, Q and K: what the training rule can tell apart."""
    return tuple(sorted("10" if c in "JQK" else c for c in cards))


def test_split_sizes():
    """A split is empty, or its share of the 715 training hands is not 70, 10 and 20 %."""
    names = [n for n in RANKS if n not in "JQK"]
    sizes = Counter(map(split_of, itertools.combinations_with_replacement(names, 4)))
    assert sizes == {"train": 501, "val": 71, "test": 143}


def leaking_hands(split):
    """Hands of numbers (training rule) that `split`, a function of cards, puts on both sides."""
    sides = {}
    for cards in ALL_HANDS:
        sides.setdefault(as_ten(cards), set()).add(split(cards))
    return [numbers for numbers, where in sides.items() if len(where) > 1]


def test_a_split_by_card_names_would_leak():
    """The tempting split, by names: this one trains on A 3 10 10 and tests on A 3 J K."""
    hands = {cards: i for i, cards in enumerate(ALL_HANDS)}
    order = np.random.default_rng(24).permutation(len(hands))

    def by_names(cards):
        return "test" if order[hands[cards]] < len(hands) // 5 else "train"

    assert len(leaking_hands(by_names)) > 100
    assert leaking_hands(split_of) == []
    assert all(split_of(cards) == split_of(cards[::-1]) for cards in ALL_HANDS)
    trained, tested = ("A", "3", "10", "10"), ("A", "3", "J", "K")
    assert (by_names(trained), by_names(tested)) == ("train", "test")
    assert card_numbers(trained, RULES["ten"]) == card_numbers(tested, RULES["ten"])
    assert split_of(trained) == split_of(tested)


@pytest.mark.parametrize("rule, face, suits, split", [
    ("ten", False, "all", "train"), ("face", True, "all", "test"), ("ten", True, "red", "val"),
    ("face", False, "black", "all"), ((12, 13, 11), True, "black", "train")])
def test_deal_honours_every_condition(rule, face, suits, split):
    """A hand of another split, rule or colour is dealt, or a card twice, or an unsolvable hand."""
    rng = np.random.default_rng(7)
    seen = set()
    for _ in range(100):
        hand = deal(rng, rule=rule, face=face, suits=suits, split=split)
        assert hand.rule == (RULES[rule] if isinstance(rule, str) else rule)
        assert set(hand.suits) <= set(gp_env.SUITS[suits])
        assert len(set(zip(hand.cards, hand.suits))) == 4
        assert not face or set(hand.cards) & {"J", "Q", "K"}
        assert split in ("all", split_of(hand.cards))
        assert hand.target == 24 and solutions(hand.numbers)
        seen.add(hand.cards)
    assert len(seen) > 50
    assert all(set(cards) & {"J", "Q", "K"} for cards in seen) == face     # no court card: allowed
    if split == "all":
        drawn = [deal(rng, rule=rule, suits=suits, split=split) for _ in range(100)]
        assert {split_of(hand.cards) for hand in drawn} == {"train", "val", "test"}


def test_same_seed_same_hand():
    """A hand depends on what was dealt before: evaluations of two models play different hands."""
    first, second = (GeneralPoints(rule="face", face=True, split="test") for _ in range(2))
    for seed in range(5):
        second.reset([1000, seed])                          # another history
    for seed in range(20):
        (seen, info), (again, info_again) = first.reset([5, seed]), second.reset([5, seed])
        assert seen == again and info["hand"] == info_again["hand"]
    assert len({first.reset(seed)[1]["hand"] for seed in range(20)}) > 15


# ------------------------------------------------------------------------------------------------
# Training text. It is read back from the words: a prompt template becomes a regular expression.
# ------------------------------------------------------------------------------------------------


@functools.cache
def template_pattern(template):
    """Regular expression that reads the slots of a prompt template back."""
    slots = {"cards": r"(?P<cards>[AJQK0-9, ]+)", "ask": r".*"}
    pattern, named = "", set()
    for fixed, slot, _, _ in string.Formatter().parse(template):
        pattern += re.escape(fixed)
        if slot is not None:
            number = rf"(?P={slot})" if slot in named else rf"(?P<{slot}>\d+)"
            pattern += slots.get(slot, number)
            named.add(slot)
    return re.compile(pattern, re.DOTALL)


def read_prompt(text, templates=(PROMPT,)):
    """(cards, rule, target) that a first user turn states in words."""
    patterns = map(template_pattern, templates)
    found = [match for match in (pattern.fullmatch(text) for pattern in patterns) if match]
    assert len(found) == 1, text
    slots = found[0].groupdict()
    cards = slots["cards"].split(", ")
    assert len(cards) == 4 and set(cards) <= set(RANKS)
    return cards, tuple(int(slots[name]) for name in "jqk"), int(slots["target"])


@pytest.mark.parametrize("rule", ["ten", "face"])
def test_expert_answers_are_strict_json_and_right(rule):
    """SFT teaches an answer that the verifier would not pay, or a field that is not true.

    Or hands of val and test leak into SFT: held-out accuracy then measures memory.
    """
    rng = np.random.default_rng(11)
    for _ in range(700):
        question, answer = expert_conversation(rng, rule=rule, face=rule == "face")
        assert (question["role"], question["learn"]) == ("user", False)
        assert (answer["role"], answer["learn"]) == ("assistant", True)
        cards, stated, target = read_prompt(question["content"])
        assert (split_of(cards), stated, target) == ("train", RULES[rule], 24)
        fields = json.loads(answer["content"])
        assert list(fields) == ["cards", "number", "formula"]
        numbers = card_numbers(cards, stated)
        assert (fields["cards"], fields["number"]) == (cards, numbers)
        assert fields["formula"].endswith(f"={target}")
        verdict = verify_gp(answer["content"], cards, numbers, target, picture=True)
        assert (verdict.kind, verdict.reward) == ("correct", 5.0)
        assert verdict.cards_right and verdict.numbers_right


def test_wrong_tries_come_before_the_experts_answer():
    """A wrong try is learned, is right, or illegal; its message is of another hand or another try.

    The verifier is asked again, with the cards and the rule that the prompt states.
    """
    rng, seen, wrong_numbers = np.random.default_rng(12), Counter(), 0
    for _ in range(200):
        turns = expert_conversation(rng, revise=0.75, rule="face", split="all")
        text = turns[0]["content"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert [turn["learn"] for turn in turns] == [False] * (len(turns) - 1) + [True]
        seen[len(turns) // 2 - 1] += 1
        right = json.loads(turns[-1]["content"])
        hand = Hand(tuple(right["cards"]), SPADES, RULES["face"])
        assert text == prompt(hand)
        for wrong, message in zip(turns[1:-1:2], turns[2:-1:2]):
            verdict = verify_gp(wrong["content"], hand.cards, hand.numbers)
            assert verdict.kind in ("wrong value", "wrong numbers")
            assert message["content"] == f"Not right: {verdict.message}. Try again."
            assert list(json.loads(wrong["content"])) == ["cards", "number", "formula"]
            wrong_numbers += not verdict.numbers_right
    assert set(seen) == {0, 1, 2, 3, 4} and 30 < seen[0] < 70       # a quarter, 3 deviations wide
    assert 0.15 < wrong_numbers / sum(count * tries for tries, count in seen.items()) < 0.35


def test_no_wrong_try_shows_the_numbers_of_the_test_rule():
    """SFT on second turns would see 11, 12, 13 called wrong and unlearn the rule of the test."""
    rng, numbers = np.random.default_rng(14), set()
    for _ in range(200):
        for turn in expert_conversation(rng, revise=1.0)[1::2]:
            numbers |= set(json.loads(turn["content"])["number"])
    assert numbers == set(range(1, 11))


def test_varied_rules_are_all_but_the_test_rule():
    """The control of varied rules sees the rule that it is tested on, or one rule only."""
    rng, rules = np.random.default_rng(13), set()
    for _ in range(400):
        question, answer = expert_conversation(rng, rule="varied")
        cards, rule, _ = read_prompt(question["content"])
        assert verify_gp(answer["content"], cards, card_numbers(cards, rule)).correct
        rules.add(rule)
    every = set(itertools.product(range(10, 14), repeat=3))
    assert RULES["face"] not in rules and rules < every and len(rules) > 50


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------

SIZES = [(128, 64), (300, 64), (130, 400), (511, 257), (1200, 1200)]


def pixels(picture):
    """(cloth, red ink, black ink): three (height, width) arrays of truth."""
    red, green, blue = np.asarray(picture).astype(int).transpose(2, 0, 1)
    return (green > red + 20, (red > 150) & (green < 90) & (blue < 100),
            (red < 60) & (green < 60) & (blue < 60))


@pytest.mark.parametrize("suit, ink", [("spades", "black"), ("clubs", "black"),
                                       ("hearts", "red"), ("diamonds", "red")])
def test_ink_is_that_of_the_suit(suit, ink):
    """A red suit in black ink: the visual shift would change nothing, or the labels would lie."""
    for i, rank in enumerate(RANKS):
        hand = Hand((rank,) * 4, (suit,) * 4, RULES["ten"])
        _, red, black = pixels(gp_env.draw_hand(hand, i))
        right, wrong = (red, black) if ink == "red" else (black, red)
        for quarter in np.split(right, 4, axis=1):
            assert quarter.sum() > 30, (rank, suit)
        assert wrong.sum() == 0, (rank, suit)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_four_whole_cards_apart(size):
    """A card runs over the edge or under its neighbour, or a size is rounded to another."""
    for seed in range(2 if size[0] > 1000 else 25):
        hand = deal(np.random.default_rng(seed), suits="all")
        picture = gp_env.draw_hand(hand, seed, size)
        assert picture.size == size and picture.mode == "RGB"
        cloth, *_ = pixels(picture)
        assert cloth[[0, -1]].all() and cloth[:, [0, -1]].all(), "a card touches the edge"
        borders = [round(size[0] * i / 4) for i in (1, 2, 3)]
        assert all(cloth[:, x - 1:x + 1].all(axis=0).any() for x in borders), "cards touch"
        for quarter in np.array_split(~cloth, 4, axis=1):
            wide, high = quarter.any(axis=0).sum(), quarter.any(axis=1).sum()
            assert 1.2 < high / wide < 1.8 and wide > 20, "not one whole card"


def test_a_picture_is_a_function_of_hand_seed_and_size():
    """A global random state or a kept card slips in: a resumed run sees other pictures."""
    hand = deal(np.random.default_rng(0), suits="red")
    first = gp_env.draw_hand(hand, 5)
    np.random.seed(1)
    gp_env.draw_hand(deal(np.random.default_rng(1)), 5, (200, 90))
    assert first.tobytes() == gp_env.draw_hand(hand, 5).tobytes()
    assert first.tobytes() != gp_env.draw_hand(hand, 6).tobytes()
    # rule and target are words of the prompt, not of the picture
    other = Hand(hand.cards, hand.suits, RULES["face"], 30)
    assert first.tobytes() == gp_env.draw_hand(other, 5).tobytes()


def test_cards_differ_more_than_their_poses_hide():
    """Two ranks look alike at the smallest size: nothing could read them."""
    seen = {}
    for rank in RANKS:
        for suit in gp_env.SUITS["all"]:
            picture = gp_env.draw_hand(Hand((rank,) * 4, (suit,) * 4, RULES["ten"]), 0)
            seen[rank, suit] = np.asarray(picture.convert("L")).astype(int)
    for one, other in itertools.combinations(seen, 2):
        different = np.abs(seen[one] - seen[other]) > 40
        assert all(part.sum() > 8 for part in np.split(different, 4, axis=1)), (one, other)


def test_pictured_game_shows_and_does_not_tell():
    """The prompt still lists the cards, another hand is shown, or the deal depends on pictures."""
    for seed in range(10):
        how = dict(rule="face", face=True, suits="red", split="test")
        told, _ = GeneralPoints(**how).reset(seed)
        env = GeneralPoints(**how, picture=(160, 80))
        shown, info = env.reset(seed)
        hand = info["hand"]
        assert told["text"] == prompt(hand) and told["image"] is None
        assert shown["text"] == told["text"].replace(", ".join(hand.cards), gp_env.IN_PICTURE)
        assert ", ".join(hand.cards) not in shown["text"]
        assert shown["image"].size == (160, 80)
        _, red, black = pixels(shown["image"])
        assert red.any() and not black.any(), "these are not the suits that were dealt"
        observation, *_ = env.step("no idea")
        assert observation["image"] is None and observation["new_conversation"] is False


def test_misread_cards_cost_extra_in_pictures_only():
    """Recognition is not rewarded in GP-VL, or punished in GP-L, where nothing is to be read."""
    for picture, cost in ((None, 0.0), ((128, 64), 1.5)):
        env = GeneralPoints(picture=picture)
        hand = env.reset(0)[1]["hand"]
        wrong = tuple("2" if card != "2" else "3" for card in hand.cards)
        text = gp_env.answer(Hand(wrong, SPADES, hand.rule), hand.numbers,
                             solutions(hand.numbers)[0])
        observation, reward, *_ = env.step(text)
        assert reward == 5.0 - cost
        assert ("read wrongly" in observation["text"]) == bool(picture)


def test_pictured_experts_are_the_same_experts():
    """Drawing a picture moves the random numbers that choose hand and formula."""
    for seed in range(10):
        how = dict(suits="black", split="all")
        plain = expert_conversation(np.random.default_rng(seed), **how)
        shown = expert_conversation(np.random.default_rng(seed), picture=(128, 64), **how)
        assert shown[1] == plain[1] and "image" not in plain[0]
        assert set(shown[0]) == {"role", "content", "learn", "image"}
        _, red, black = pixels(shown[0]["image"])
        assert not red.any() and black.any()


# ------------------------------------------------------------------------------------------------
# The environment
# ------------------------------------------------------------------------------------------------


def right_answer(hand):
    """An answer that earns +5."""
    return answer(hand, hand.numbers, solutions(hand.numbers, hand.target)[0])


def test_reset_returns_observation_and_info():
    """A key that the agent needs is missing, or the prompt is of another hand than the score."""
    observation, info = GeneralPoints(rule="face", face=True).reset(3)
    assert set(observation) == {"text", "image", "new_conversation"}
    assert observation["new_conversation"] is True and observation["image"] is None
    assert observation["text"] == prompt(info["hand"])
    assert read_prompt(observation["text"]) == (list(info["hand"].cards), (11, 12, 13), 24)


def test_a_right_answer_terminates():
    """Success is reported as truncation: GAE would bootstrap a value after the end."""
    env = GeneralPoints()
    _, info = env.reset(0)
    result = env.step(right_answer(info["hand"]))
    assert len(result) == 5
    observation, reward, terminated, truncated, info = result
    assert (reward, terminated, truncated) == (5.0, True, False)
    assert (observation["text"], observation["new_conversation"]) == ("Correct.", False)
    assert info["verdict"].correct and info["hand"] is env.hand


@pytest.mark.parametrize("tries", [1, 2, 5])
def test_failures_truncate_and_the_last_one_costs_once(tries):
    """The -1 for running out of tries is paid at every try, never, or one try too late."""
    env = GeneralPoints(tries=tries)
    for seed in range(2):                                   # the second episode starts afresh
        env.reset(seed)
        steps = [env.step("no idea")[1:4] for _ in range(tries)]
        assert steps == [(-3.0, False, False)] * (tries - 1) + [(-4.0, False, True)]
    _, info = env.reset(2)                                  # success on the last try: no truncation
    for _ in range(tries - 1):
        env.step("no idea")
    assert env.step(right_answer(info["hand"]))[1:4] == (5.0, True, False)


def test_a_failed_try_returns_the_message_of_the_verifier():
    """The next turn does not say what was wrong, so revising is guessing."""
    env = GeneralPoints()
    _, info = env.reset(2)
    numbers = "+".join(map(str, info["hand"].numbers))
    observation, reward, *_, info = env.step(f"formula: {numbers}={sum(info['hand'].numbers)}")
    assert sum(info["hand"].numbers) != 24 and reward == -1.0
    assert observation["text"] == (f"Not right: the formula gives {sum(info['hand'].numbers)}, "
                                   "not 24. Try again.")
    assert observation["new_conversation"] is False
    assert prompt(info["hand"]) not in observation["text"]


def test_the_fake_probe_pays_the_old_rule():
    """The probe scores by the stated rule, so memorising and reading cannot be told apart."""
    env = GeneralPoints(rule="face", face=True, split="test", scoring_rule="ten")
    probed = 0
    for seed in range(60):
        observation, info = env.reset(seed)
        cards, face_numbers = info["hand"].cards, info["hand"].numbers
        old_numbers = card_numbers(cards, RULES["ten"])
        assert read_prompt(observation["text"])[1] == (11, 12, 13)
        if not solvable(old_numbers):
            continue
        # a face card never counts 10 under the stated rule, so no formula is right under both
        obeys, memorised = solutions(face_numbers)[0], solutions(old_numbers)[0]
        assert env.step(f"formula: {obeys}=24")[1:3] == (-2.0, False)
        assert env.step(f"formula: {memorised}=24")[1:3] == (5.0, True)
        probed += 1
    assert probed > 20


def test_fresh_tries_leave_no_trace():
    """A second answer has seen the first one, or the tries, rewards and ends are others."""
    for picture in (None, (128, 64)):
        usual, env = GeneralPoints(picture=picture), GeneralPoints(picture=picture, fresh=True)
        first, info = env.reset(4)
        usual.reset(4)
        assert first["new_conversation"] and (first["image"] is None) == (picture is None)
        for _ in range(3):
            observation, *rest, _ = env.step("no idea")
            assert observation == first and rest == list(usual.step("no idea")[1:4])
        observation, *rest, _ = env.step(right_answer(info["hand"]))
        assert rest == [5.0, True, False] and observation["text"] == "Correct."


def test_reset_without_a_seed_deals_another_hand_each_time():
    """One hand again and again."""
    env = GeneralPoints()
    assert len({env.reset()[1]["hand"] for _ in range(5)}) > 3


def test_docstring_examples():
    """An example in a docstring no longer shows what the code does."""
    tried = doctest.testmod(gp_env)
    assert tried.attempted > 0 and tried.failed == 0


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def run_game(monkeypatch, capsys, *flags, typed=""):
    """The game with these flags and `typed` on its standard input. Returns what it prints."""
    monkeypatch.setattr(sys, "argv", ["gp_env.py", *flags])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    gp_env.main()
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def test_game_can_be_won_and_ends_there(monkeypatch, capsys):
    """The terminal game shows one hand and scores another, or goes on after success."""
    hand = GeneralPoints(rule="face", face=True, split="all").reset(3)[1]["hand"]
    formula = solutions(hand.numbers)[0]
    said = run_game(monkeypatch, capsys, "--rule", "face", "--seed", "3",
                    typed=f"1+1\n{formula}=24\n{formula}=24\n")
    assert prompt(hand) in said
    rewards = re.findall(r"\[([-+]\d\.\d)\]", said)
    assert rewards == ["-2.0", "+5.0"] and "One solution" not in said


def test_giving_up_shows_a_solution(monkeypatch, capsys):
    """The end of the input raises EOFError."""
    hand = GeneralPoints(split="all").reset(0)[1]["hand"]
    assert f"One solution: {solutions(hand.numbers)[0]}" in run_game(monkeypatch, capsys)


@pytest.mark.parametrize("flags", [["--rule", "jack"], ["--no-such-flag"]], ids=" ".join)
def test_bad_flags_are_explained(flags, monkeypatch, capsys):
    """A mistyped flag is taken for another, or ends in a traceback."""
    with pytest.raises(SystemExit) as stopped:
        run_game(monkeypatch, capsys, *flags)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and "error: " in said.err


def test_bad_flags_of_the_program_are_explained():
    """A file that does nothing as a program, or needs more than its folder to run."""
    game = subprocess.run([sys.executable, "gp_env.py", "--seed", "x"], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)
    assert game.returncode == 2 and game.stdout == ""
    assert "error: " in game.stderr and "Traceback" not in game.stderr
