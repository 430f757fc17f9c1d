"""Tests of verifier.py, where every reward of this project comes from.

Three layers:
  1. CASES, a table of worked answers. Read it first: it is also the verifier's manual
  2. a second opinion: `reference_kind` judges a formula by another algorithm (take out the
     innermost bracket, again and again), and 100,000 random and hostile answers compare the two
  3. what holds for every answer: rewards come from the table, messages carry no foreign text
  4. the same three layers for V-IRL: WALKS is the manual of verify_virl

    python -m pytest tests/test_verifier.py
"""

import doctest
import itertools
import json
import random
import re
import time
from collections import Counter
from fractions import Fraction

import pytest

import verifier
from gp_env import Hand, prompt
from verifier import (GP_MESSAGES, GP_REWARDS, ILLEGAL_WHY, VIRL_MESSAGES, VIRL_REWARDS, compare,
                      parse_formula, read_action, read_claims, read_walk, verify_gp, verify_virl)

# ------------------------------------------------------------------------------------------------
# 1. Worked cases. Most play the hand 8 3 8 3, whose only solution needs thirds: 8/(3-8/3).
# ------------------------------------------------------------------------------------------------

EIGHTS = (["8", "3", "8", "3"], [8, 3, 8, 3])
ONE_TO_FOUR = (["A", "2", "3", "4"], [1, 2, 3, 4])
ACE_FIVES = (["5", "A", "5", "5"], [5, 1, 5, 5])
COURT = (["J", "Q", "K", "10"], [11, 12, 13, 10])       # J = 11, Q = 12, K = 13
THREES = (["8", "3", "3", "4"], [8, 3, 3, 4])
HAND = Hand(tuple(EIGHTS[0]), ("spades", "clubs", "hearts", "diamonds"), (10, 10, 10))


def strict(formula, cards=EIGHTS[0], numbers=EIGHTS[1]):
    """The answer that SFT teaches, around any formula."""
    return json.dumps({"cards": cards, "number": numbers, "formula": formula})


CASES = [
    # what, answer, (cards, numbers), expected kind, a piece of the expected message
    # --- right, in the notations that people and models use
    ("thirds need exact arithmetic", strict("8/(3-8/3)=24"), EIGHTS, "correct", "Correct."),
    ("no right-hand side is fine", strict("8/(3-8/3)"), EIGHTS, "correct", "Correct."),
    ("fifths, in another order", strict("(5-1/5)*5=24"), ACE_FIVES, "correct", "Correct."),
    ("left to right: 8-3-3+4 is 6", strict("(8-3-3+4)*1=6"), THREES, "wrong numbers", "1 not in"),
    ("outer brackets", strict("(8/(3-8/3))=24"), EIGHTS, "correct", "Correct."),
    ("brackets around one number", strict("(8)/((3)-8/3)=24"), EIGHTS, "correct", "Correct."),
    ("spaces and a tab", strict(" 8 / (3 -\t8 / 3) = 24 "), EIGHTS, "correct", "Correct."),
    ("unicode times", strict("1×2×3×4=24"), ONE_TO_FOUR, "correct", "Correct."),
    ("unicode divide and minus", strict("8÷(3−8÷3)=24"), EIGHTS, "correct", "Correct."),
    ("20 brackets deep is allowed", strict("(" * 20 + "1*2" + ")" * 20 + "*3*4=24"),
     ONE_TO_FOUR, "correct", "Correct."),
    # --- the fields, from strict JSON to loose text
    ("unquoted cards", '{"cards": [8, 3, 8, 3], "number": [8, 3, 8, 3], "formula": 8/(3-8/3)=24}',
     EIGHTS, "correct", "Correct."),
    ("single quotes, trailing comma", "{'cards': ['8', '3', '8', '3'], 'number': [8, 3, 8, 3], "
     "'formula': '8/(3-8/3)=24',}", EIGHTS, "correct", "Correct."),
    ("only the formula", "formula: 8/(3-8/3)=24", EIGHTS, "correct", "Correct."),
    ("capitals", "FORMULA: 8/(3-8/3)=24", EIGHTS, "correct", "Correct."),
    ("a capital in strict JSON", '{"Formula": "8/(3-8/3)=24"}', EIGHTS, "correct", "Correct."),
    ("an object in an object", '{"answer": ' + strict("8/(3-8/3)=24") + "}", EIGHTS, "correct",
     "Correct."),
    ("words around the object", "Sure, I take thirds. " + strict("8/(3-8/3)=24") + " Done!",
     EIGHTS, "correct", "Correct."),
    ("a wrong right side on another line of the quotes", '{"formula": "8/(3-8/3)\n=25"}', EIGHTS,
     "wrong value", "24"),
    ("a second guess within the quotes", "{'formula': '8/(3-8/3), or 8+3+8+3'}", EIGHTS, "illegal",
     "','"),
    ("a second line of words", "formula: 8/(3-8/3)=24\nbecause 8/3 is near 3", EIGHTS, "correct",
     "Correct."),
    ("JSON cut off after the formula", '{"cards": ["8"], "formula": "8/(3-8/3)=24', EIGHTS,
     "correct", "Correct."),
    ("JSON cut off inside the right side", '{"formula": "8/(3-8/3)=2', EIGHTS, "wrong value",
     "the right side must be 24"),
    # --- legal, another value
    ("another value", strict("8+3+8+3=24"), EIGHTS, "wrong value", "gives 22, not 24"),
    ("another value, a fraction", strict("8/3+8-3=24"), EIGHTS, "wrong value", "gives 23/3, not"),
    ("another value, negative", strict("3-8-8-3=24"), EIGHTS, "wrong value", "gives -16, not 24"),
    ("right, but the right side lies", strict("8/(3-8/3)=25"), EIGHTS, "wrong value",
     "the right side must be 24"),
    ("wrong, and the right side is honest", strict("8+3+8+3=22"), EIGHTS, "wrong value",
     "gives 22, not 24"),
    # --- legal arithmetic on other numbers
    ("the target itself", strict("24=24"), EIGHTS, "wrong numbers",
     "24 not in the hand; 3 and 8 not used"),
    ("a number left out", strict("8*3=24"), EIGHTS, "wrong numbers", "3 and 8 not used"),
    ("a number too often", strict("8+8+8+3-3=24"), EIGHTS, "wrong numbers", "8 used too often"),
    ("one too often, one left out", strict("8+8+8+3=24"), EIGHTS, "wrong numbers",
     "8 used too often; 3 not used"),
    ("K played by the other rule", strict("10+12+10-11=21"), COURT, "wrong numbers",
     "10 used too often; 13 not used"),
    ("digits of two cards glued", strict("38-8-3=24"), EIGHTS, "wrong numbers", "38 not in the"),
    # --- not an equation
    ("division by zero", strict("8/(3-3)+8=24"), EIGHTS, "illegal", "division by zero"),
    ("zero over zero", strict("(8-8)/(3-3)=24"), EIGHTS, "illegal", "division by zero"),
    ("unary minus", strict("-3+8+8*3=24"), EIGHTS, "illegal", "'-': a number or ("),
    ("unary minus in brackets", strict("8*3+8*(-3)=24"), EIGHTS, "illegal", "'-': a number or ("),
    ("power", strict("8**3-8-3=24"), EIGHTS, "illegal", "'*': a number or ("),
    ("floor division", strict("8//3*8+3=24"), EIGHTS, "illegal", "'/': a number or ("),
    ("times left out", strict("2(3+4)*1=24"), ONE_TO_FOUR, "illegal", "'(': an operator should"),
    ("times left out after a bracket", strict("(1+2)4*3=24"), ONE_TO_FOUR, "illegal",
     "'4': an operator should"),
    ("two numbers side by side", strict("8 3*8-3=24"), EIGHTS, "illegal", "'3': an operator"),
    ("trailing operator", strict("8+3+8+3-=24"), EIGHTS, "illegal", "'=': a number or ("),
    ("trailing operator at the end", strict("8+3+8+3-"), EIGHTS, "illegal", "a number or ( should"),
    ("bracket not closed", strict("8/(3-8/3=24"), EIGHTS, "illegal", "a bracket is not closed"),
    ("two numbers in a bracket", strict("(8 3)*8-3=24"), EIGHTS, "illegal", "'3': an operator"),
    ("bracket never opened", strict("8/3-8/3)=24"), EIGHTS, "illegal", "')': no bracket is open"),
    ("empty brackets", strict("8/(3-8/3)*()=24"), EIGHTS, "illegal", "')': a number or ("),
    ("nothing right of the =", strict("8/(3-8/3)="), EIGHTS, "illegal", "a number or ( should"),
    ("chained equals", strict("8/3=3-8/3=24"), EIGHTS, "illegal", "the formula should end here"),
    ("equation turned round", strict("24=8/(3-8/3)"), EIGHTS, "illegal", "the formula should end"),
    ("a sum right of the =", strict("8/(3-8/3)=20+4"), EIGHTS, "illegal", "the formula should end"),
    ("decimals", strict("8.0/(3-8/3)=24"), EIGHTS, "illegal", "'.': only numbers and"),
    ("leading zero", strict("08/(3-8/3)=24"), EIGHTS, "illegal", "'08': a number has no zero"),
    ("superscript digit", strict("5²-1+5-5=24"), ACE_FIVES, "illegal", "only numbers and"),
    ("full-width digit", strict("８/(3-8/3)=24"), EIGHTS, "illegal", "only numbers and"),
    ("150 digits", strict("9" * 150 + "=24"), EIGHTS, "illegal", "the number is too long"),
    ("5 digits", strict("10000-9976=24"), EIGHTS, "illegal", "'10000': the number is too long"),
    ("300 characters", strict("8+" * 150 + "8=24"), EIGHTS, "illegal", "the formula is too long"),
    ("prose for a formula", strict("I think that thirds are the way to go here, " * 6), EIGHTS,
     "illegal", "'I': the formula is too long"),
    ("a word for a number", strict("eight/(3-8/3)=24"), EIGHTS, "illegal", "'e': only numbers"),
    ("code", strict("__import__('os')"), EIGHTS, "illegal", "'_': only numbers and"),
    ("an empty formula", strict(""), EIGHTS, "illegal", "a number or ( should stand here"),
    ("a formula that is no text", strict(24), EIGHTS, "illegal", "a number or ( should stand"),
    ("21 brackets deep", strict("(" * 21 + "1*2" + ")" * 21 + "*3*4=24"), ONE_TO_FOUR, "illegal",
     "too many brackets"),
    # --- habits of chat models that are not in the grammar: refused, and the message says where
    ("LaTeX", strict("1\\times2\\times3\\times4=24"), ONE_TO_FOUR, "illegal", "'\\': only numbers"),
    ("LaTeX that JSON reads as a tab", '{"formula": "1\\times2*3*4=24"}', ONE_TO_FOUR, "illegal",
     "'i': only numbers"),
    ("a full stop at the end", strict("8/(3-8/3)=24."), EIGHTS, "illegal", "'.': only numbers"),
    ("the formula in prose first", "The formula: 8/(3-8/3)=24. " + strict("8/(3-8/3)=24"), EIGHTS,
     "illegal", "give one formula only"),
    # --- special tokens of a chat, which a careless caller leaves out: this would read 10*2+3+1
    ("a special token in a number", '{"formula": "1<|im_start|>0*2+3+1=24"}', COURT, "illegal",
     "'<': only numbers"),
    ("a special token in a loose formula", "formula: 8/(3-8<|end|>/3)=24", EIGHTS, "illegal",
     "'<': only numbers"),
    ("special tokens around the object", "<|begin|>" + strict("8/(3-8/3)=24") + "<|im_end|></s>",
     EIGHTS, "correct", "Correct."),
    ("a special token on the next line", "formula: 8/(3-8/3)=24\n<|im_end|>", EIGHTS, "correct",
     "Correct."),
    # --- not one formula
    ("empty answer", "", EIGHTS, "illegal", "there is no formula field"),
    ("an equation without its field", "8/(3-8/3)=24", EIGHTS, "illegal", "there is no formula"),
    ("key repeated, strict JSON", '{"formula": "8+3+8+3=24", "formula": "8/(3-8/3)=24"}', EIGHTS,
     "illegal", "give one formula only"),
    ("key repeated, loose", "formula: 8+3+8+3=24\nformula: 8/(3-8/3)=24", EIGHTS, "illegal",
     "give one formula only"),
    ("the same formula twice", "formula: 8/(3-8/3)=24 formula: 8/(3-8/3)=24", EIGHTS, "illegal",
     "give one formula only"),
    ("a list of pairs is no object", '[["formula", "8/(3-8/3)=24"]]', EIGHTS, "illegal",
     "there is no formula field"),
    ("a list of numbers", "[8, 3]", EIGHTS, "illegal", "there is no formula field"),
    ("an echo of the prompt", prompt(HAND), EIGHTS, "illegal", "illegal formula at"),
    ("an echo, then the right answer", prompt(HAND) + strict("8/(3-8/3)=24"), EIGHTS, "illegal",
     "give one formula only"),
    ("10,000 brackets", strict("(" * 10_000 + "24" + ")" * 10_000), EIGHTS, "illegal",
     "the answer is too long"),
    ("right, then 3,000 spaces", strict("8/(3-8/3)=24") + " " * 3000, EIGHTS, "illegal",
     "the answer is too long"),
]


@pytest.mark.parametrize("what, answer, hand, kind, _", CASES, ids=[case[0] for case in CASES])
def test_kind_of_a_case(what, answer, hand, kind, _):
    """A case of the table is paid otherwise than the table says."""
    verdict = verify_gp(answer, *hand)
    assert (verdict.kind, verdict.reward) == (kind, GP_REWARDS[kind])


@pytest.mark.parametrize("what, answer, hand, _, piece", CASES, ids=[case[0] for case in CASES])
def test_words_of_a_case(what, answer, hand, _, piece):
    """The message names another token, or another reason, than the one that is true."""
    assert piece in verify_gp(answer, *hand).message


def test_the_table_shows_every_message():
    """A message is never produced, or was added without a worked case."""
    said = " | ".join(verify_gp(answer, *hand).message for _, answer, hand, _, _ in CASES)
    for clause in ILLEGAL_WHY.values():
        assert clause in said, clause
    for name, template in GP_MESSAGES.items():
        fixed = max(re.split(r"\{\w+\}", template), key=len)
        assert name == "misread" or fixed in said, name


@pytest.mark.parametrize("answer", [
    strict("8/(3-8/3)=24"),
    strict("8/(3-8/3)=24", cards=[3, 3, 8, 8], numbers=["8", "8", "3", "3"]),
    "{'cards': ['8', '3', '8', '3',], 'number': [8, 3, 8, 3,], 'formula': '8/(3-8/3)=24',}",
    "{cards: [8, 3, 8, 3], number: [8, 3, 8, 3], formula: 8/(3-8/3)=24}",
    "formula: 8/(3-8/3)=24\ncards: 8 3 8 3\nnumbers: 8 3 8 3",
])
def test_fields_are_read_in_every_notation(answer):
    """A loose notation loses the cards or the numbers, or their order matters."""
    verdict = verify_gp(answer, *EIGHTS)
    assert verdict.kind == "correct" and verdict.cards_right and verdict.numbers_right


def test_wrong_fields_are_reported_but_not_paid_for():
    """`numbers_right` is True for the memorised rule: the OOD diagnosis would see nothing."""
    face_as_ten = strict("10+12+13-11=24", ["J", "Q", "K", "10"], [10, 10, 10, 10])
    verdict = verify_gp(face_as_ten, *COURT)
    assert (verdict.kind, verdict.cards_right, verdict.numbers_right) == ("correct", True, False)
    other_card = strict("10+12+13-11=24", ["J", "Q", "Q", "10"], [11, 12, 13, 10])
    verdict = verify_gp(other_card, *COURT)
    assert (verdict.kind, verdict.cards_right, verdict.numbers_right) == ("correct", False, True)


@pytest.mark.parametrize("formula, kind", [
    ("8/(3-8/3)=24", "correct"), ("8+3+8+3=24", "wrong value"), ("8*3=24", "wrong numbers"),
    ("8**3", "illegal")])
def test_misread_cards_cost_extra_on_pictures_only(formula, kind):
    """The picture penalty is missing, is paid in text games, or hides the kind of the answer."""
    misread = strict(formula, cards=["8", "3", "8", "5"])
    in_text = verify_gp(misread, *EIGHTS)
    assert (in_text.kind, in_text.reward) == (kind, GP_REWARDS[kind])
    assert GP_MESSAGES["misread"] not in in_text.message
    in_picture = verify_gp(misread, *EIGHTS, picture=True)
    assert (in_picture.kind, in_picture.reward) == (kind, GP_REWARDS[kind] - 1.5)
    assert in_picture.message.startswith(GP_MESSAGES["misread"])
    well_read = verify_gp(strict(formula), *EIGHTS, picture=True)
    assert (well_read.kind, well_read.reward) == (kind, GP_REWARDS[kind])


def test_another_target():
    """The target 24 is written into the verifier, so another --target cannot be played."""
    assert verify_gp(strict("8+3+8+3=22"), *EIGHTS, target=22).kind == "correct"
    assert verify_gp(strict("8+3+8+3=24"), *EIGHTS, target=22).kind == "wrong value"
    assert verify_gp(strict("8/(3-8/3)=24"), *EIGHTS, target=22).kind == "wrong value"


def test_parse_formula_returns_value_numbers_and_right_side():
    """The number right of the = is counted as a used card, or the order of numbers is lost."""
    assert parse_formula("8/(3-8/3)=24") == (Fraction(24), [8, 3, 8, 3], 24)
    assert parse_formula("1+2*(3-4)") == (Fraction(-1), [1, 2, 3, 4], None)
    assert parse_formula("1/3") == (Fraction(1, 3), [1, 3], None)


def test_compare():
    """A number used too often counts as foreign, repeats are listed, or an argument is changed."""
    used, hand = [13, 9, 9, 8, 8, 8], [8, 3, 8, 3, 1]
    assert compare(used, hand) == ([9, 13], [8], [1, 3])
    assert (used, hand) == ([13, 9, 9, 8, 8, 8], [8, 3, 8, 3, 1])
    assert compare([3, 8], [8, 3]) == ([], [], []) and compare([], [2, 2]) == ([], [], [2])


def test_docstring_examples():
    """An example in a docstring no longer shows what the code does."""
    tried = doctest.testmod(verifier)
    assert tried.attempted > 0 and tried.failed == 0


# ------------------------------------------------------------------------------------------------
# 2. A second opinion, by another algorithm, on 100,000 answers
# ------------------------------------------------------------------------------------------------

PLAIN_SIGN = {"×": "*", "·": "*", "∗": "*", "⋅": "*", "÷": "/", "∕": "/", "⁄": "/",
              "−": "-", "–": "-", "＋": "+", "＝": "="}
NUMBER = re.compile(r"0|[1-9][0-9]{0,3}", re.ASCII)
CHAIN = re.compile(r"<\d+>(?:[-+*/]<\d+>)*", re.ASCII)      # <0>*<2>-<1>: no brackets left
INNERMOST = re.compile(r"\(([^()]*)\)")


def chain_value(chain, values):
    """Value of a formula without brackets, where <k> stands for values[k]. None if illegal."""
    if not CHAIN.fullmatch(chain):
        return None
    total = Fraction(0)
    for sign, product in re.findall(r"([-+]?)([^-+]+)", chain):
        value = Fraction(1)
        for operation, k in re.findall(r"([*/]?)<(\d+)>", product):
            if operation == "/" and values[int(k)] == 0:
                return None
            value = value / values[int(k)] if operation == "/" else value * values[int(k)]
        total += -value if sign == "-" else value
    return total


def reference_value(text):
    """(value, numbers, right side) of an equation, or None if it is illegal. Never recurses.

        8/(3-8/3)=24  ->  <0>/(<1>-<2>/<3>)  ->  <0>/<4>  ->  24, with <4> = 3-8/3 = 1/3
    """
    for sign, plain in PLAIN_SIGN.items():
        text = text.replace(sign, plain)
    # `8 3` is two numbers, so look for it before the spaces go
    if len(text) > verifier.MAX_FORMULA or re.search(r"[0-9]\s+[0-9]", text):
        return None
    left, equals, right = "".join(text.split()).partition("=")
    words = re.findall("[0-9]+", left)
    if equals and not NUMBER.fullmatch(right) or not all(map(NUMBER.fullmatch, words)):
        return None
    depths = itertools.accumulate({"(": 1, ")": -1}.get(c, 0) for c in left)
    if max(depths, default=0) > verifier.MAX_DEPTH or "<" in left:
        return None
    values = [Fraction(int(w)) for w in words]
    index = itertools.count()
    chain = re.sub("[0-9]+", lambda match: f"<{next(index)}>", left)
    while bracket := INNERMOST.search(chain):
        value = chain_value(bracket.group(1), values)
        if value is None:
            return None
        chain = f"{chain[:bracket.start()]}<{len(values)}>{chain[bracket.end():]}"
        values.append(value)
    value = chain_value(chain, values)
    return None if value is None else (value, list(map(int, words)), int(right) if equals else None)


def reference_kind(formula, numbers, target=24):
    """The kind of a formula, by reference_value."""
    found = reference_value(formula)
    if found is None:
        return "illegal"
    value, used, right = found
    if sorted(used) != sorted(numbers):
        return "wrong numbers"
    return "correct" if value == target and right in (None, target) else "wrong value"


def reference_formulas(text):
    """All formula fields of an answer, found by cutting the text apart at the word `formula`."""
    try:
        found = json.loads(text, object_pairs_hook=lambda pairs: {"pairs": pairs})
        fields = [value if isinstance(value, str) else ""
                  for key, value in (found["pairs"] if isinstance(found, dict) else [])
                  if key.lower() == "formula"]
        if fields:
            return fields
    except (ValueError, RecursionError):
        pass
    formulas = []
    pieces = re.split("(?i:formula)", text)                # what follows each `formula`
    for before, after in zip(pieces, pieces[1:]):
        after = after[1:] if after[:1] in ("'", '"') else after
        is_word = before[-1:].isalnum() or before[-1:] == "_"
        if is_word or not after.lstrip().startswith(":"):
            continue
        body = after.lstrip()[1:].lstrip()
        body = re.split(r"""["']?\b(?:cards|numbers?)\b["']?\s*:""", body, flags=re.I)[0]
        if body[:1] in ("'", '"'):
            formulas.append(body[1:].partition(body[0])[0])
        else:
            formulas.append(re.split(r"[\n,}]", body)[0])
    return formulas


# Right formulas to spoil; the same hands are used for everything random.
RIGHT = [
    (*EIGHTS, "8/(3-8/3)"), (*ACE_FIVES, "(5-1/5)*5"), (*ONE_TO_FOUR, "(1+3)*(2+4)"),
    (*COURT, "10+12-(11-13)"), (["4", "7", "8", "8"], [4, 7, 8, 8], "(4-(8-7))*8"),
    (["2", "3", "Q", "10"], [2, 3, 12, 10], "(10+2)*3-12"),
    (["3", "3", "7", "7"], [3, 3, 7, 7], "(3+3/7)*7"),
    (["A", "3", "4", "6"], [1, 3, 4, 6], "6/(1-3/4)"),
    (["J", "Q", "4", "4"], [10, 10, 4, 4], "(10*10-4)/4"),
    # without brackets: left to right, products first
    (["8", "4", "4", "3"], [8, 4, 4, 3], "8+4+4*3"),
    (["Q", "8", "2", "2"], [12, 8, 2, 2], "12*8/2/2"),
    (["K", "K", "A", "A"], [13, 13, 1, 1], "13-1-1+13"),
]
HOSTILE = [
    "**", "//", "()", ")(", "((", "))", "--", "+-", "==", "=24=24", "e9", "0x18", "1_0", "24",
    "024", ".0", "0", "1",
    # signs and digits of other alphabets, controls, quotes, markup, length
    "²", "½", "８", "٣", "Ⅷ", "×", "÷", "−", "·", "＝", "√", "!", "%", "^", "&",
    "\x00", "\x1b[2J", "\n", "\r", "\t", " ", "\xa0", "\u202e", "\u200b", "\ud800", "\U0001f0a1",
    "'", '"', "\\", "{", "}", "[", "]", ",", ":", ";", "formula:", '"formula": "', "cards:",
    "eval", "__import__('os')", "lambda: 24", "None", "NaN", "1e308", "<|end|>", "<|user|>",
    "9" * 30, "(" * 30, ")" * 30, "1+" * 120, "8/(3-8/3)=24"]
SOUP = list("0123456789+-*/()=") + ["10", "12", "13", "24", "=24", " ", "×", "÷", "−"]


def spoil(chance, text, edits):
    """`text` after some random edits. chance: a random.Random, the only source of chance."""
    for _ in range(edits):
        at = chance.randrange(len(text) + 1)
        other = chance.randrange(len(text) + 1)
        edit = chance.randrange(6)
        if edit == 0:                                       # put something hostile in
            text = text[:at] + chance.choice(HOSTILE) + text[at:]
        elif edit == 1:                                     # lose one character
            text = text[:at] + text[at + 1:]
        elif edit == 2:                                     # write one character twice
            text = text[:at] + text[max(at - 1, 0):]
        elif edit == 3:                                     # another sign or digit in its place
            text = text[:at] + chance.choice(SOUP) + text[at + 1:]
        elif edit == 4:                                     # move a piece to the end
            first, last = sorted((at, other))
            text = text[:first] + text[last:] + text[first:last]
        else:                                               # the same in other signs, spaced out
            text = text.replace("*", " ×").replace("-", "− ").replace("/", "÷")
    return text


def random_formula(chance, right):
    """A formula, from untouched to soup."""
    formula = right + chance.choice(["", "=24", " = 24", "=24", "=25"])
    if chance.random() < 0.2:
        formula = "".join(chance.choice(SOUP) for _ in range(chance.randrange(14)))
    if chance.random() < 0.2:
        depth = chance.randrange(30)
        formula = "(" * depth + right + ")" * depth + "=24"
    return spoil(chance, formula, chance.choice([0, 0, 1, 1, 2, 4]))


def wrap(chance, formula):
    """An answer with exactly this formula, strict or (if no sign of it forbids that) loose."""
    loose = [f'{{"cards": [8, 3], "number": [8, 3], "formula": {formula},}}',
             f"{{'cards': ['8', '3',], 'formula': '{formula}',}}",
             f"formula: {formula}", f"I think so.\nformula: {formula}\nAm I right?"]
    if re.search("""["'{},:\n]""", formula) or chance.random() < 0.4:
        return json.dumps({"cards": ["8", "3"], "formula": formula},
                          ensure_ascii=chance.random() < 0.5)
    return chance.choice(loose)


def random_answer(chance, right):
    """A whole answer that goes wrong outside the formula: cut, joined, spoilt, or noise."""
    formula = random_formula(chance, right)
    answer = wrap(chance, formula)
    way = chance.randrange(6)
    if way == 0:
        return answer[:chance.randrange(len(answer) + 1)]
    if way == 1:
        return answer + chance.choice(["", " ", "\n", prompt(HAND)]) + wrap(chance, right)
    if way == 2:
        return prompt(HAND)[-chance.randrange(1, 300):] + answer
    if way == 3:
        noise = chance.randbytes(chance.randrange(60))
        return noise.decode(chance.choice(["latin-1", "utf-16-le", "utf-8"]), "replace") + right
    if way == 4:
        opening = chance.choice(["[", "{", "(", '{"formula":', '[{"a":'])
        return opening * chance.randrange(1500) + answer
    return spoil(chance, answer, chance.randrange(1, 6))


def test_reference_knows_the_right_formulas():
    """The second opinion is wrong itself, so that agreeing with it means nothing."""
    for _, numbers, formula in RIGHT:
        assert reference_kind(formula, numbers) == "correct"
        assert reference_kind(formula + "=24", numbers) == "correct"
        assert reference_kind(formula + "=23", numbers) == "wrong value"
        assert reference_kind(formula + "+1", numbers) == "wrong numbers"
        assert reference_kind(formula + ")", numbers) == "illegal"
    assert reference_value("8-3-3+4*(2-6/4)=5") == (4, [8, 3, 3, 4, 2, 6, 4], 5)


def test_60000_formulas_get_the_kind_of_the_reference():
    """Precedence, left-to-right order, a bracket or a limit is handled wrongly in some corner."""
    chance = random.Random(1)
    kinds = Counter()
    for _ in range(60_000):
        cards, numbers, right = chance.choice(RIGHT)
        formula = random_formula(chance, right)
        answer = wrap(chance, formula)
        expected = reference_kind(formula, numbers)
        if len(answer) > verifier.MAX_ANSWER:
            expected = "illegal"
        assert verify_gp(answer, cards, numbers).kind == expected, (answer, numbers)
        kinds[expected] += 1
    # the answers were worth the work: no kind is rare
    assert min(kinds[k] for k in ("correct", "wrong value", "wrong numbers", "illegal")) > 2000


def test_40000_hostile_answers_never_raise_and_are_never_paid_for_nothing():
    """Some text makes the verifier raise (training dies), or is paid +5 without a right formula.

    Or penalties add up, as in the released code, where one answer can cost -8; or a message repeats
    control characters of the answer, or grows with it, in the next turn.
    """
    chance = random.Random(2)
    paid = 0
    for _ in range(40_000):
        cards, numbers, right = chance.choice(RIGHT)
        answer = random_answer(chance, right)
        verdict = verify_gp(answer, cards, numbers)
        assert verdict.kind in ("correct", "wrong value", "wrong numbers", "illegal")
        assert verdict.reward == GP_REWARDS[verdict.kind]
        message = verdict.message
        assert message.isascii() and message.isprintable() and 0 < len(message) < 120
        if verdict.correct:
            formulas = reference_formulas(answer)
            assert [reference_kind(f, numbers) for f in formulas] == ["correct"], (answer, numbers)
            paid += 1
    assert paid > 500


# ------------------------------------------------------------------------------------------------
# 3. Rewards and messages
# ------------------------------------------------------------------------------------------------


def test_a_misread_picture_costs_the_same_whatever_the_kind():
    """The extra of GP-VL is paid for some kinds only, or changes the kind."""
    chance = random.Random(3)
    for _ in range(3000):
        cards, numbers, right = chance.choice(RIGHT)
        answer = random_answer(chance, right)
        seen = verify_gp(answer, cards, numbers, picture=True)
        assert seen.kind == verify_gp(answer, cards, numbers).kind
        extra = 0 if seen.cards_right else GP_REWARDS["misread cards"]
        assert seen.reward == GP_REWARDS[seen.kind] + extra


def test_reward_table_is_the_papers():
    """A reward was changed without saying so."""
    assert GP_REWARDS == {"correct": 5, "wrong value": -1, "wrong numbers": -2, "illegal": -3,
                          "out of tries": -1, "misread cards": -1.5}


@pytest.mark.parametrize("markup", ["<|end|>", "<|user|>", "<|image|>", "</s>", "[INST]"])
def test_messages_carry_no_chat_markup(markup):
    """An answer ends its own turn: markup in it comes back inside the next user turn."""
    for text in (markup, markup + "8/(3-8/3)=24", "8/(3-8/3)=24" + markup, markup * 20,
                 markup + "1+" * 120, markup + "1" * 240, markup + " " * 240):
        for answer in (strict(text), f"formula: {text}", strict("8*3", cards=[text]), text):
            assert markup not in verify_gp(answer, *EIGHTS, picture=True).message


# ------------------------------------------------------------------------------------------------
# 4. V-IRL. Most cases stand at Mill Bank, where the expert turns north under the absolute rule.
# ------------------------------------------------------------------------------------------------

COMPASS = ["north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest"]
RELATIVE = ["left", "right", "slightly left", "slightly right"]
AT_BANK = "Mill Bank is on your left; you are at an intersection"
BARE = "no landmark here; you are at an intersection"
ROAD = "no landmark here"
END = "The destination Joe's Cafe is on your right; you are at an intersection"
NORTH = ("turn_direction(north)", AT_BANK, COMPASS)
SLIGHT = ("turn_direction(slightly left)", AT_BANK, RELATIVE)
ON = ("forward()", ROAD, COMPASS)
STOP = ("stop()", END, COMPASS)
CROSS = ("turn_direction(east)", BARE, COMPASS)


def says(seen, action):
    """The answer that SFT teaches, around any observation and action."""
    return json.dumps({"current observation": seen, "current instruction": "3. Turn left.",
                       "action": action})


WALKS = [
    # what, answer, (right action, what is there, legal words), expected kind, piece of the message
    # --- the right action, in the notations that people and models use
    ("right", says(AT_BANK, "turn_direction(north)"), NORTH, "correct", "Correct."),
    ("right, forward", says(ROAD, "forward()"), ON, "correct", "Correct."),
    ("right, stop", says(END, "stop()"), STOP, "correct", "Correct."),
    ("right, relative", says(AT_BANK, "turn_direction(slightly left)"), SLIGHT, "correct",
     "Correct."),
    ("right, whatever it claims to see", says(ROAD, "turn_direction(north)"), NORTH, "correct",
     "Correct."),
    ("the action alone", "action: turn_direction(north)", NORTH, "correct", "Correct."),
    ("capitals, quotes, spaces", 'Action: "Turn_Direction( \'NORTH\' )"', NORTH, "correct",
     "Correct."),
    ("a hyphen and an underscore", says(AT_BANK, "turn_direction(slightly-left)"), SLIGHT,
     "correct", "Correct."),
    ("north-west is northwest", says(BARE, "turn_direction(north-west)"),
     ("turn_direction(northwest)", BARE, COMPASS), "correct", "Correct."),
    ("brackets left out", "action: forward", ON, "correct", "Correct."),
    ("single quotes, trailing comma", "{'current observation': 'Joe's Cafe is on your right', "
     "'action': 'stop()',}", STOP, "correct", "Correct."),
    ("words around the object", "Sure. " + says(ROAD, "forward()") + " Done.", ON, "correct",
     "Correct."),
    # --- a wrong action, the surroundings read right
    ("wrong direction", says(AT_BANK, "turn_direction(south)"), NORTH, "wrong action",
     "that is not the action to take here"),
    ("forward past the corner", says(AT_BANK, "forward()"), NORTH, "wrong action", "not the act"),
    ("read right in other words", says("You see the Mill Bank is on the left, at an intersection",
                                       "forward()"), NORTH, "wrong action", "not the action"),
    ("read right, in two sentences", says(
        "I am at an intersection. Mill Bank is to your left", "forward()"), NORTH, "wrong action",
     "not the action"),
    ("turns on the open road", says(ROAD, "turn_direction(north)"), ON, "wrong action", "not the"),
    ("denies an intersection", says("no landmark here, not at an intersection", "stop()"), ON,
     "wrong action", "not the action"),
    ("relative word under the absolute rule", says(AT_BANK, "turn_direction(left)"), NORTH,
     "wrong action", "not in the list of actions"),
    ("compass word under the relative rule", says(AT_BANK, "turn_direction(north)"), SLIGHT,
     "wrong action", "not in the list of actions"),
    ("left is not slightly left", says(AT_BANK, "turn_direction(left)"), SLIGHT, "wrong action",
     "that is not the action to take here"),
    # --- a wrong action, and something was misread
    ("intersection overlooked", says("Mill Bank is on your left", "forward()"), NORTH, "misread",
     "you are at an intersection; that is not"),
    ("intersection invented", says("no landmark here; you are at an intersection", "stop()"), ON,
     "misread", "you are not at an intersection"),
    ("landmark overlooked", says(BARE, "forward()"), NORTH, "misread", "you missed a landmark"),
    ("landmark invented", says(AT_BANK, "forward()"), CROSS, "misread",
     "a landmark that you name is not here"),
    ("another landmark", says(AT_BANK.replace("Bank", "Cafe"), "forward()"), NORTH, "misread",
     "is not here; you missed a landmark"),
    ("landmark on the other side", says(AT_BANK.replace("left", "right"), "forward()"), NORTH,
     "misread", "a landmark is on another side"),
    ("misread, and an action of another rule", says(ROAD, "turn_direction(left)"), NORTH, "misread",
     "you are at an intersection; you missed a landmark; that is not in the list"),
    ("nothing said of what is there", "action: forward()", NORTH, "misread", "you missed a landm"),
    # --- not one action
    ("empty answer", "", NORTH, "no action", "there is no action field"),
    ("an action without its field", "turn_direction(north)", NORTH, "no action", "no action fi"),
    ("another key", '{"move": "turn_direction(north)"}', NORTH, "no action", "no action field"),
    ("key repeated, strict JSON", '{"action": "forward()", "action": "turn_direction(north)"}',
     NORTH, "no action", "give one action only"),
    ("key repeated, loose", "action: forward()\naction: turn_direction(north)", NORTH,
     "no action", "give one action only"),
    ("two actions in one field", says(AT_BANK, "forward() turn_direction(north)"), NORTH,
     "wrong action", "not in the list"),
    ("two actions, quoted apart", "{'action': 'forward()', or 'stop()'}", NORTH, "misread",
     "not in the list"),
    ("two directions", says(AT_BANK, "turn_direction(north, south)"), NORTH, "wrong action",
     "not in the list"),
    ("all directions glued", says(AT_BANK, "turn_direction(northsouth)"), NORTH, "wrong action",
     "not in the list"),
    ("a word after it", says(AT_BANK, "turn_direction(north) please"), NORTH, "wrong action",
     "not in the list"),
    ("no text but a list", '{"current observation": "' + AT_BANK + '", "action": ["forward()"]}',
     NORTH, "wrong action", "not in the list"),
    ("code", says(AT_BANK, "__import__('os').system('ls')"), NORTH, "wrong action", "not in the l"),
    ("right, then 3,000 spaces", says(AT_BANK, "turn_direction(north)") + " " * 3000, NORTH,
     "no action", "the answer is too long"),
]


@pytest.mark.parametrize("what, answer, place, kind, _", WALKS, ids=[w[0] for w in WALKS])
def test_kind_of_a_walk(what, answer, place, kind, _):
    """A case of the table is paid otherwise than the table says."""
    verdict = verify_virl(answer, *place)
    assert (verdict.kind, verdict.reward) == (kind, VIRL_REWARDS[kind])


@pytest.mark.parametrize("what, answer, place, _, piece", WALKS, ids=[w[0] for w in WALKS])
def test_words_of_a_walk(what, answer, place, _, piece):
    """The message names another mistake than the one that was made."""
    assert piece in verify_virl(answer, *place).message


def test_walk_table_is_the_papers_and_every_message_is_shown():
    """A reward was changed without saying so, or a message has no worked case."""
    assert VIRL_REWARDS == {"correct": 1, "wrong action": -1, "no action": -1, "misread": -1.5,
                            "out of tries": -1}
    said = " | ".join(verify_virl(answer, *place).message for _, answer, place, _, _ in WALKS)
    for message in VIRL_MESSAGES.values():
        assert message in said, message


def test_walk_flags_tell_what_was_read():
    """Recognition cannot be measured: the flags follow the action, or each other."""
    flags = {}
    for seen in (AT_BANK, AT_BANK.replace("left", "right"), BARE, AT_BANK.split(";")[0], ROAD):
        for action in ("turn_direction(north)", "forward()", "nonsense"):
            verdict = verify_virl(says(seen, action), *NORTH)
            flags.setdefault(seen, set()).add((verdict.landmarks_right,
                                               verdict.intersection_right))
    assert list(flags.values()) == [{(True, True)}, {(False, True)}, {(False, True)},
                                    {(True, False)}, {(False, False)}]


@pytest.mark.parametrize("name", [
    "Prince St. & Co", "Salt and Pepper", "The Crossing", "No Name Cafe", "Joe's", "7,5 Bar; Grill",
    "Is on your left", "Café Été", "A\tB", "intersection", "x" * 300])
@pytest.mark.parametrize("side", ["front", "right", "back", "left"])
def test_a_copy_of_the_truth_is_never_misread(name, side):
    """A real place has a name that the reading of claims trips over: copying it would cost -1.5."""
    for there in (f"{name} is on your {side}", f"The destination {name} is on your {side}"):
        there += "; you are at an intersection"
        assert verify_virl(says(there, "forward()"), "stop()", there, COMPASS).kind == (
            "wrong action")


def test_read_action_accepts_the_action_space_and_nothing_else():
    """Two spellings lead to different actions, or a near miss is read as a legal one."""
    for words in (COMPASS, RELATIVE, ["3 o'clock", "12 o'clock"], ["↑", "↗"]):
        for word in words:
            assert read_action(f"turn_direction({word})", words) == f"turn_direction({word})"
    for text in ("forward(1)", "stop(now)", "forwards()", "turn_direction()", "turn_direction",
                 "turn_direction((north))", "turn_direction(nort)", "north", "", "forward()()"):
        assert read_action(text, COMPASS) is None, text


def random_walk_answer(chance):
    """Fragments of answers, prompts and garbage, in random order."""
    parts = ['{"', "action", '": "', "turn_direction(", "north", ")", "forward()", "stop()", '"}',
             "current observation", ": ", AT_BANK, ROAD, "; ", "\n", "'", '"', " is on your ",
             "left", "intersection", "not ", "<|end|>", "\x00", "é", "{", "}", "[", "\\", " " * 50]
    start = chance.choice(["", "", "action: forward()", "{'action': 'stop()'",
                           '{"action": "forward()",'])
    return start + "".join(chance.choice(parts) for _ in range(chance.randint(0, 12)))


def test_40000_hostile_walks_never_raise_and_are_paid_for_one_right_action_only():
    """Some text makes the verifier raise, costs more than the table, or is paid for a wrong one."""
    chance, paid = random.Random(5), 0
    for _ in range(40_000):
        answer = random_walk_answer(chance)
        place = chance.choice([NORTH, ON, STOP, SLIGHT])
        verdict = verify_virl(answer, *place)
        assert verdict.reward == VIRL_REWARDS[verdict.kind] and verdict.kind != "out of tries"
        assert verdict.message in " ".join(VIRL_MESSAGES.values()) or ";" in verdict.message
        assert "<|" not in verdict.message and len(verdict.message) < 200
        if verdict.correct:
            bare = re.sub(r"[^a-z]", "", place[0])
            assert bare in re.sub(r"[^a-z]", "", answer.lower()) and len(
                read_walk(answer)["action"]) == 1
            paid += 1
    assert paid > 50


@pytest.mark.parametrize("answer", [
    '{"Action": "forward()"}', '{"ACTION": "forward()", "Current Observation": "x"}',
    '{"answer": {"action": "forward()"}}', 'Action: forward()', '[{"action": "forward()"}]'])
def test_an_action_is_found_wherever_it_stands(answer):
    """A capital, or an object around the object, costs a right answer its reward."""
    assert read_walk(answer)["action"] == ["forward()"]


def test_hostile_walks_cost_no_time():
    """A regular expression backtracks: one answer of 2,000 characters stops training."""
    began = time.perf_counter()
    for part in ("action:", '"', "'", " is on your", "you see ", "the ", "not ", "; ", "action: '",
                 " is on your left", "turn_direction("):
        verify_virl((part * 2000)[:verifier.MAX_ANSWER], *NORTH)
        read_claims(part * 2000)
    assert time.perf_counter() - began < 2
