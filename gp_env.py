"""GeneralPoints: four cards, one equation, and a rule for what J, Q and K count.

Paper: arXiv 2501.17161, section 4.1 and appendix A. The knob that the whole project turns:

    rule "ten"   J = Q = K = 10          training, in-distribution (ID)
    rule "face"  J = 11, Q = 12, K = 13  the rule OOD test: SFT and RL never see it

The prompt always states the rule in force. A model that READS it transfers; a model that has
memorised "face cards are 10" fails, and its `number` field shows that it did. (The small backbone
has met "face" before either stage, as one of 64 rules: J, Q, K anywhere in 10..13. A large
pretrained model has read about card games, too.)

  1. words: the task with the rule, the cards, the format of the answer
  2. deal four cards from one split (train / val / test, or all), solvable under the rule
  3. the solver knows which hands are solvable, and what an expert answers
  4. reset() returns the prompt. step(answer) asks verifier.py; a failed try returns its message as
     the next user turn. The episode ends with success (terminated) or after `tries` failed answers
     (truncated). SFT learns from the expert's conversations
  5. draw the cards (GP-VL)
  6. play in the terminal

Hands are split by the multiset of their numbers UNDER THE TRAINING RULE: to that rule J, Q, K and
10 are one card, so a split by card names would put the same arithmetic on both sides. All 715
multisets of 1..10 are dealt into 70 % train, 10 % val, 20 % test by a fixed seed. The test hands
are never asked for 24 by any stage: backbone, SFT and RL.

    python gp_env.py                        play in the terminal, verifier messages included
    python gp_env.py --rule face --seed 3   the OOD rule
    python gp_env.py --picture hand.png     the cards come as a picture (GP-VL)
    python gp_env.py --solve 8 3 8 3        every solution of a hand (first call: a few seconds)

Read before: verifier.py. Read next: sft.py.
"""

import argparse
import functools
import itertools
import math
import sys
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from verifier import GP_REWARDS, verify_gp

# ------------------------------------------------------------------------------------------------
# 1. Words
# ------------------------------------------------------------------------------------------------

# Slots: {j} {q} {k} what J, Q and K count. A doubled brace is one brace of the text.
PROMPT = ("[Task] Four cards are dealt. Write one equation that equals the target and uses what "
          "each card counts exactly once, with + - * / and brackets. A counts 1, J counts {j}, "
          "Q counts {q}, K counts {k}. The target is {target}.\n"
          "[Cards] {cards}\n"
          "[Output] {ask}")
ASK = ('One JSON object: {{"cards": [the four cards], "number": [what they count, with J = {j}, '
       'Q = {q}, K = {k}], "formula": "the equation, ending in = {target}"}}')
ANSWER = '{{"cards": ["{cards}"], "number": [{numbers}], "formula": "{formula}={target}"}}'
RETRY = "Not right: {message}. Try again."
IN_PICTURE = "those in the picture"         # stands for the cards where a picture shows them

# ------------------------------------------------------------------------------------------------
# 2. Cards, rules, splits
# ------------------------------------------------------------------------------------------------

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = {"black": ("spades", "clubs"), "red": ("hearts", "diamonds")}
SUITS["all"] = SUITS["black"] + SUITS["red"]
RULES = {"ten": (10, 10, 10), "face": (11, 12, 13)}     # what J, Q, K count
TARGET = 24
TRIES = 5                                               # the paper's verify_iter


def card_numbers(cards, rule):
    """What the cards count. cards: names as in RANKS; rule: what J, Q, K count, three ints."""
    worth = dict(zip(RANKS, [*range(1, 11), *rule]))
    return [worth[card] for card in cards]


@functools.lru_cache(maxsize=None)
def _split_table():
    """{multiset of four numbers 1..10: "train" | "val" | "test"}, by a fixed seed."""
    hands = list(itertools.combinations_with_replacement(range(1, 11), 4))
    order = np.random.default_rng(24).permutation(len(hands))
    test, val = len(hands) // 5, len(hands) // 10
    names = ["test"] * test + ["val"] * val + ["train"] * (len(hands) - test - val)
    return {hands[i]: name for i, name in zip(order, names)}


def split_of(cards):
    """Which split a hand belongs to: that of its numbers under the TRAINING rule.

    >>> split_of(["A", "J", "5", "Q"]) == split_of(["K", "10", "A", "5"])
    True
    """
    return _split_table()[tuple(sorted(card_numbers(cards, RULES["ten"])))]


@dataclass(frozen=True)
class Hand:
    """Four dealt cards and what is asked of them."""

    cards: tuple            # the ranks of the four cards (members of RANKS), in the order shown
    suits: tuple            # four of SUITS["all"]; only a picture shows them
    rule: tuple             # what J, Q, K count
    target: int = TARGET

    @property
    def numbers(self):
        """What the cards count under the stated rule, in the order of `cards`."""
        return card_numbers(self.cards, self.rule)


def deal(rng, rule="ten", face=False, suits="all", split="train", target=TARGET):
    """Draw a solvable hand: four cards without replacement, redrawn until all conditions hold.

    rng: a numpy Generator, the only source of chance. rule: a key of RULES or three ints.
    face: at least one J, Q or K (the paper's rule OOD evaluation). suits: a key of SUITS.
    split: "train", "val", "test" or "all" (the paper's setting: no hand is held out).
    Raises ValueError if no hand makes the target.
    """
    rule = RULES[rule] if isinstance(rule, str) else tuple(rule)
    deck = [(rank, suit) for suit in SUITS[suits] for rank in RANKS]
    for _ in range(100_000):
        cards, drawn = zip(*(deck[i] for i in rng.choice(len(deck), 4, replace=False)))
        if face and not set(cards) & set("JQK"):
            continue
        if split != "all" and split_of(cards) != split:
            continue
        hand = Hand(cards, drawn, rule, target)
        if solvable(hand.numbers, target):
            return hand
    raise ValueError(f"no solvable hand found for target {target}: choose another target")


# ------------------------------------------------------------------------------------------------
# 3. The solver
# ------------------------------------------------------------------------------------------------

# A formula over four numbers is (their order, three signs, how the brackets stand). That makes
# 24 x 64 x 5 = 7,680 formulas a hand, calculated with numpy for all 1,820 hands at once. Fractions
# are pairs of int64, so it is exact.
ORDERS = np.array(list(itertools.permutations(range(4))))                    # (24, 4)
TRIPLES = np.array(list(itertools.product(range(4), repeat=3)))              # (64, 3)
SIGNS = "+-*/"
SHAPES = 5


def combine(shape, numbers, signs, do):
    """The value, or the text, of a formula with the brackets of one of the five shapes.

    numbers: four, as they stand from left to right. signs: three; the first stands between the
    first two numbers, and so on. do(sign, x, y) joins two parts: `calculate` or `write_part`.
    """
    a, b, c, d = numbers
    first, second, third = signs
    if shape == 0:
        return do(third, do(second, do(first, a, b), c), d)     # ((a b) c) d
    if shape == 1:
        return do(third, do(first, a, do(second, b, c)), d)     # (a (b c)) d
    if shape == 2:
        return do(second, do(first, a, b), do(third, c, d))     # (a b) (c d)
    if shape == 3:
        return do(first, a, do(third, do(second, b, c), d))     # a ((b c) d)
    return do(first, a, do(second, b, do(third, c, d)))         # a (b (c d))


def calculate(sign, x, y):
    """x sign y. sign: array of 0..3 (SIGNS); x, y, result: fractions, (numerators, denominators).

    A division by zero gives 0/0. Whatever is done with 0/0 has denominator 0 again, even where it
    divides, since its numerator is 0. So a formula is legal if its denominator is not 0.
    """
    (n, d), (m, e) = x, y
    top = np.choose(sign, [n * e + m * d, n * e - m * d, n * m, n * e])
    bottom = np.choose(sign, [d * e, d * e, d * e, d * m])
    return np.where(bottom == 0, 0, top), bottom


def write_part(sign, x, y):
    """x sign y as text, with brackets only where arithmetic needs them.

    x, y, result: (text, how tightly it holds together: 1 a sum, 2 a product, 3 a number).
    """
    strength = 1 if SIGNS[sign] in "+-" else 2
    (left, left_strength), (right, right_strength) = x, y
    if left_strength < strength:
        left = f"({left})"
    # a-(b+c) and a/(b*c) need their brackets, a+(b-c) and a*(b/c) do not
    if right_strength < strength or right_strength == strength and SIGNS[sign] in "-/":
        right = f"({right})"
    return left + SIGNS[sign] + right, strength


def write(numbers, signs, shape):
    """The formula as text.

    >>> write([8, 3, 8, 3], signs=[3, 1, 3], shape=4)
    '8/(3-8/3)'
    """
    text, _ = combine(shape, [(str(number), 3) for number in numbers], signs, write_part)
    return text


@functools.lru_cache(maxsize=4)
def _solution_table(target):
    """{sorted numbers: [(order, triple, shape), ...]} of all hands of 1..13."""
    hands = list(itertools.combinations_with_replacement(range(1, 14), 4))   # 1,820
    found = {hand: [] for hand in hands}
    one = np.ones((1, 1), dtype=np.int64)
    for which, order in enumerate(ORDERS):
        numbers = [(np.array(hands)[:, i, None], one) for i in order]        # (1820, 1) each
        for shape in range(SHAPES):
            top, bottom = combine(shape, numbers, TRIPLES.T, calculate)      # (1820, 64) each
            right = (bottom != 0) & (top == target * bottom)
            for hand, triple in np.argwhere(right).tolist():
                found[hands[hand]].append((which, triple, shape))
    return found


def solvable(numbers, target=TARGET):
    """True if four numbers of 1..13 can make the target. The table takes seconds, once."""
    return bool(_solution_table(target)[tuple(sorted(numbers))])


@functools.lru_cache(maxsize=8192)
def _solutions(numbers, target):
    found = _solution_table(target)[numbers]
    return tuple(sorted({write([numbers[i] for i in ORDERS[order]], TRIPLES[triple], shape)
                         for order, triple, shape in found}))


def solutions(numbers, target=TARGET):
    """All formulas (distinct texts, sorted) that make the target from four numbers of 1..13.

    >>> solutions([8, 3, 8, 3])
    ('8/(3-8/3)',)
    """
    return _solutions(tuple(sorted(numbers)), target)


# ------------------------------------------------------------------------------------------------
# 4. The environment, and the expert's conversations for SFT
# ------------------------------------------------------------------------------------------------


def prompt(hand, pictured=False):
    """The first user turn: task with the rule, the cards, the output format with the rule again.

    pictured: the cards are not listed, the turn comes with a picture of them (GP-VL).
    """
    slots = dict(zip("jqk", hand.rule), target=hand.target)
    cards = IN_PICTURE if pictured else ", ".join(hand.cards)
    return PROMPT.format(cards=cards, ask=ASK.format(**slots), **slots)


def answer(hand, numbers, formula):
    """An answer with the paper's three fields. numbers: what it claims that the cards count."""
    return ANSWER.format(cards='", "'.join(hand.cards), numbers=", ".join(map(str, numbers)),
                         formula=formula, target=hand.target)


def expert_answer(hand, formula):
    """What SFT teaches for a hand and one of its solutions."""
    return answer(hand, hand.numbers, formula)


class GeneralPoints:
    """One game at a time, with the calls of a Gymnasium environment (and without the dependency).

    >>> env = GeneralPoints()
    >>> observation, info = env.reset(seed=0)
    >>> observation, reward, terminated, truncated, info = env.step("no idea")
    >>> reward, terminated, truncated
    (-3.0, False, False)

    An observation is a dict: "text", the next user turn; "image", a picture or None;
    "new_conversation", True if everything said before is to be forgotten.

    rule, face, suits, split, target: which hands, see `deal`. tries: answers to a hand.
    picture: (width, height) in pixels makes it GP-VL: the cards come as a picture with the first
    turn, and misreading them costs extra. None: GP-L.
    fresh: a failed try leaves no trace. Instead of a message the first prompt of the hand follows,
    as a new conversation: tries that cannot revise, to measure what revising is worth.
    scoring_rule: a key of RULES makes it the `fake` probe: the prompt states `rule`, the verifier
    scores by this one. Who has memorised the old rule and does not read is paid, who reads is not.
    """

    def __init__(self, rule="ten", face=False, suits="all", split="train", target=TARGET,
                 tries=TRIES, scoring_rule=None, picture=None, fresh=False):
        self.rule, self.face, self.suits, self.split = rule, face, suits, split
        self.target, self.tries, self.scoring_rule = target, tries, scoring_rule
        self.picture, self.fresh = picture, fresh
        self.rng = np.random.default_rng()
        self.hand, self.image, self.used, self.over = None, None, 0, True

    def reset(self, seed=None):
        """Deal the hand number `seed` (an int or a list of ints). Returns (observation, info).

        Without a seed the environment's own generator goes on from where it is.
        """
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.hand = deal(self.rng, self.rule, self.face, self.suits, self.split, self.target)
        self.used, self.over = 0, False
        if self.picture:
            self.image = draw_hand(self.hand, int(self.rng.integers(2**31)), self.picture)
        text = prompt(self.hand, pictured=bool(self.picture))
        return self._observe(text, True), {"hand": self.hand}

    def step(self, text):
        """Judge one answer. Returns (observation, reward, terminated, truncated, info).

        terminated: solved. truncated: the tries are used up. Nothing that the agent could still
        earn follows either of them: the value of what comes next is 0 at both.
        Raises RuntimeError if no episode is under way.
        """
        if self.over:
            raise RuntimeError("no episode is under way: call reset() before step()")
        scored = self.hand
        if self.scoring_rule is not None:
            scored = replace(self.hand, rule=RULES[self.scoring_rule])
        verdict = verify_gp(text, scored.cards, scored.numbers, self.target,
                            picture=bool(self.picture))
        self.used += 1
        terminated = verdict.correct
        truncated = not terminated and self.used >= self.tries
        self.over = terminated or truncated
        reward = verdict.reward + (GP_REWARDS["out of tries"] if truncated else 0.0)
        if terminated:
            text = verdict.message
        elif self.fresh:
            text = prompt(self.hand, pictured=bool(self.picture))
        else:
            text = RETRY.format(message=verdict.message)
        return (self._observe(text, self.fresh and not terminated), reward, terminated, truncated,
                {"verdict": verdict, "hand": self.hand})

    def _observe(self, text, new):
        return {"text": text, "image": self.image if new else None, "new_conversation": new}


def misread_one(rng, hand):
    """One card taken for another, a face card by another rule, say: (its place, a number)."""
    at = int(rng.integers(4))
    if hand.cards[at] in "JQK":
        return at, int(rng.integers(10, 14))
    return at, int(rng.integers(1, 11))


def failed_try(text, verdict):
    """Two turns of a conversation: a wrong answer, from which nobody should learn; the message."""
    return [{"role": "assistant", "content": text, "learn": False},
            {"role": "user", "content": RETRY.format(message=verdict.message), "learn": False}]


def _wrong_tries(rng, hand, pictured):
    """One to four wrong answers and their messages: legal random formulas that miss the target.

    Three in ten are over a misread card: a wrong number in a text, a wrong card in a picture.
    """
    count, turns = int(rng.integers(1, 5)), []
    while len(turns) < 2 * count:
        seen, numbers = hand, hand.numbers
        if rng.random() < 0.3:
            at, number = misread_one(rng, hand)
            if pictured:
                cards = [*hand.cards]
                cards[at] = RANKS[number - 1]       # 1 to 13 are A to K
                seen = replace(hand, cards=tuple(cards))
                numbers = seen.numbers
            else:
                numbers[at] = number
        formula = write(rng.permutation(numbers), rng.integers(4, size=3), rng.integers(SHAPES))
        text = answer(seen, numbers, formula)
        verdict = verify_gp(text, hand.cards, hand.numbers, hand.target, picture=pictured)
        if verdict.kind in ("wrong value", "wrong numbers"):
            turns += failed_try(text, verdict)
    return turns


def expert_conversation(rng, picture=None, revise=0.0, **how):
    """A hand and the expert's answer, as in the paper's SFT data (appendix A).

    Returns a list of turns {"role", "content", "learn"}: the loss falls on turns with learn=True.
    picture: None, or the (width, height) of the picture that shows the cards; the first turn then
    has it as "image". revise: how likely wrong tries and their messages come before the right
    answer (the paper's Fig. 15). how: arguments of `deal`; rule="varied" draws J, Q, K from 10..13
    anew each time, but never the test rule (the control of arXiv 2510.00237).
    """
    if how.get("rule") == "varied":
        how["rule"] = RULES["face"]
        while how["rule"] == RULES["face"]:
            how["rule"] = tuple(rng.integers(10, 14, size=3).tolist())
    hand = deal(rng, **how)
    ways = solutions(hand.numbers, hand.target)
    formula = ways[rng.integers(len(ways))]
    turns = [{"role": "user", "content": prompt(hand, pictured=bool(picture)), "learn": False}]
    if picture:
        turns[0]["image"] = draw_hand(hand, int(rng.integers(2**31)), picture)
    if revise and rng.random() < revise:
        turns += _wrong_tries(rng, hand, bool(picture))
    return turns + [{"role": "assistant", "content": expert_answer(hand, formula), "learn": True}]


# ------------------------------------------------------------------------------------------------
# 5. Pictures (GP-VL)
# ------------------------------------------------------------------------------------------------

# Pillow ships one font and no suit symbols, so those are drawn as polygons. The corner index is
# large, as on cards for weak eyes: the small backbone gets 128 x 64 pixels for four cards.
# Everything is drawn several times too large and shrunk, since Pillow does not smooth edges.
PICTURE_SIZE = (128, 64)                    # the least that can be read; the paper: 1200 x 1200
INK = {"black": (20, 20, 28), "red": (206, 24, 36)}
COLOUR = {suit: colour for colour in INK for suit in SUITS[colour]}
CARD_SHAPE = 14 / 9                         # height of a card over its width
WEIGHTS = 3                                 # font weights
TILT = 5                                    # degrees that a card may lie askew, either way
# Where the pips of 2 to 10 lie: x (-1 left, 0 middle, 1 right column) and y (-1 top, 1 bottom).
_SIDES = [(x, y) for x in (-1, 1) for y in (-1, 1)]
_LONG = [(x, y) for x in (-1, 1) for y in (-1, -1 / 3, 1 / 3, 1)]
PIPS = {"2": [(0, -1), (0, 1)], "3": [(0, -1), (0, 0), (0, 1)], "4": _SIDES,
        "5": _SIDES + [(0, 0)], "6": _SIDES + [(-1, 0), (1, 0)],
        "7": _SIDES + [(-1, 0), (1, 0), (0, -0.5)],
        "8": _SIDES + [(-1, 0), (1, 0), (0, -0.5), (0, 0.5)],
        "9": _LONG + [(0, 0)], "10": _LONG + [(0, -2 / 3), (0, 2 / 3)]}


def _disc(x, y, radius):
    """A circle as a polygon."""
    turns = [2 * math.pi * i / 32 for i in range(32)]
    return [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in turns]


# Each symbol: polygons in a square of -1..1 with y pointing down.
_HEART = [_disc(-0.47, -0.42, 0.5), _disc(0.47, -0.42, 0.5),
          [(-0.9, -0.18), (0, 1), (0.9, -0.18), (0, -0.6)]]
_FOOT = [(0, 0), (0.4, 1), (-0.4, 1)]
SYMBOLS = {
    "hearts": _HEART,
    "diamonds": [[(0, -1), (0.78, 0), (0, 1), (-0.78, 0)]],
    "spades": [[(x, -0.88 * y - 0.1) for x, y in part] for part in _HEART] + [_FOOT],
    "clubs": [_disc(0, -0.5, 0.46), _disc(-0.5, 0.16, 0.46), _disc(0.5, 0.16, 0.46),
              _disc(0, -0.05, 0.25), _FOOT],
    # Headgear tells the court cards apart: a feathered cap, a round diadem, a spiked crown.
    "J": [[(-0.9, 0.9), (-0.9, 0.2), (0.9, 0.2), (0.9, 0.9)],
          [(-0.2, 0.2), (0.5, -1), (0.9, -0.7), (0.4, 0.2)]],
    "Q": [[(-0.9, 0.9), (-0.9, 0.3), (0.9, 0.3), (0.9, 0.9)],
          _disc(-0.65, -0.15, 0.32), _disc(0, -0.45, 0.36), _disc(0.65, -0.15, 0.32)],
    "K": [[(-0.9, 0.9), (-0.9, -0.9), (-0.45, 0), (0, -1), (0.45, 0), (0.9, -0.9), (0.9, 0.9)]],
}


def _stamp(draw, symbol, x, y, radius, ink):
    """Draw one of SYMBOLS, centred, with this half-width in pixels."""
    for part in SYMBOLS[symbol]:
        draw.polygon([(x + radius * px, y + radius * py) for px, py in part], fill=ink)


def _letters(text, weight, width, height):
    """A mask ("L" image) of ink: the text, `height` pixels high, squeezed if wider than `width`."""
    font = ImageFont.load_default(2 * height)
    box = font.getbbox(text, stroke_width=weight)
    mask = Image.new("L", (box[2] - box[0], box[3] - box[1]))
    ImageDraw.Draw(mask).text((-box[0], -box[1]), text, 255, font, stroke_width=weight)
    natural = round(mask.width * height / mask.height)
    return mask.resize((min(width, natural), height), Image.Resampling.LANCZOS)


@functools.lru_cache(maxsize=52 * WEIGHTS)
def _card_face(rank, suit, weight, width):
    """One card, upright, `width` pixels wide, as an RGBA image with clear corners.

    Kept, since there are only 52 * WEIGHTS of them in a size; what differs between two pictures of
    a card is how it lies (`draw_hand`).
    """
    height, ink = round(width * CARD_SHAPE), INK[COLOUR[suit]]
    face = Image.new("RGBA", (width, height), (255, 255, 255, 0))
    draw = ImageDraw.Draw(face)
    edge = max(1, width // 40)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), width // 9, (252, 251, 246),
                           (150, 150, 146), edge)
    # the index: rank, and the suit below it
    high, wide = round(0.32 * height), round(0.42 * width)
    letters = _letters(rank, 2 * weight * high // 50, wide, high)
    middle = 0.27 * width
    face.paste(ink, (round(middle - letters.width / 2), round(0.08 * height)), letters)
    _stamp(draw, suit, middle, 0.57 * height, 0.16 * width, ink)
    # the field to the right of it: pips, or headgear over a large symbol in a frame
    centre, middle = 0.72 * width, 0.5 * height
    if rank in PIPS:
        for x, y in PIPS[rank]:
            _stamp(draw, suit, centre + 0.13 * width * x, middle + 0.36 * height * y,
                   0.09 * width, ink)
    elif rank == "A":
        _stamp(draw, suit, centre, middle, 0.19 * width, ink)
    else:
        draw.rectangle((centre - 0.2 * width, 0.08 * height, centre + 0.2 * width, 0.92 * height),
                       (246, 226, 160), ink, edge)
        _stamp(draw, rank, centre, 0.3 * height, 0.14 * width, ink)
        _stamp(draw, suit, centre, 0.66 * height, 0.15 * width, ink)
    return face


def draw_hand(hand, seed, size=PICTURE_SIZE):
    """The picture of a hand: four cards in a row on green cloth, an RGB image.

    hand: a Hand. seed: chance of this picture: how each card lies (place, tilt of up to TILT
    degrees, size of 90 to 100 %), the font's weight, the shade of the cloth. size: (width, height)
    in pixels, at least PICTURE_SIZE, or ValueError. A pure function of these three. (The released
    code lays all cards out alike: a table of 52 pictures and four places would then "read" them.)

    Each card keeps within its quarter of the width: none is cut off, none hides another.
    """
    if size[0] < PICTURE_SIZE[0] or size[1] < PICTURE_SIZE[1]:
        raise ValueError(f"a picture needs {PICTURE_SIZE[0]} x {PICTURE_SIZE[1]} pixels or more, "
                         f"not {size[0]} x {size[1]}")
    rng = np.random.default_rng(seed)
    times = 3 if size[0] < 512 else 2                   # drawn so much too large
    cell, height = times * size[0] / 4, times * size[1]
    weight, shade = int(rng.integers(WEIGHTS)), rng.uniform(0.85, 1.15)
    cloth = tuple(round(shade * c) for c in (36, 110, 72))
    canvas = Image.new("RGB", (times * size[0], times * size[1]), cloth)
    wide = round(min(0.84 * cell, 0.84 * height / CARD_SHAPE))
    for i, (rank, suit) in enumerate(zip(hand.cards, hand.suits)):
        face = _card_face(rank, suit, weight, wide)
        angle, scale = math.radians(rng.uniform(-TILT, TILT)), rng.uniform(0.9, 1.0)
        # the box around the tilted card, and how far its centre may be from that of its cell
        cos, sin = math.cos(angle), math.sin(angle)
        box = (scale * (face.width * cos + face.height * abs(sin)),
               scale * (face.height * cos + face.width * abs(sin)))
        x = cell * (i + 0.5) + (cell / 2 - box[0] / 2 - times) * rng.uniform(-1, 1)
        y = height / 2 + (height / 2 - box[1] / 2 - times) * rng.uniform(-1, 1)
        # Pillow asks for the way back: from a pixel of the result to one of the upright card,
        #     source = R(-angle) (target - centre of target) / scale + centre of source
        left, top = math.floor(x - box[0] / 2), math.floor(y - box[1] / 2)
        room = (math.ceil(box[0]) + 2, math.ceil(box[1]) + 2)
        a, b = cos / scale, sin / scale
        dx, dy = x - left, y - top
        lying = face.transform(room, Image.Transform.AFFINE, (
            a, b, face.width / 2 - a * dx - b * dy, -b, a, face.height / 2 + b * dx - a * dy),
            Image.Resampling.BILINEAR, fillcolor=(255, 255, 255, 0))
        canvas.paste(lying, (left, top), lying)
    return canvas.reduce(times)


# ------------------------------------------------------------------------------------------------
# 6. Play in the terminal
# ------------------------------------------------------------------------------------------------


def main():
    """A game for a person, or every solution of a hand."""
    parser = argparse.ArgumentParser(description="Play GeneralPoints, or solve a hand.")
    parser.add_argument("--rule", choices=RULES, default="ten", help="what J, Q and K count")
    parser.add_argument("--seed", type=int, default=0, help="which hand (default 0)")
    parser.add_argument("--target", type=int, default=TARGET, help="number to reach (paper: 24)")
    parser.add_argument("--solve", type=int, nargs=4, metavar="N", choices=range(1, 14),
                        help="print all solutions of four numbers 1..13 and stop")
    parser.add_argument("--picture", metavar="FILE",
                        help="show the cards as a picture, in this PNG file, instead of in words")
    args = parser.parse_args()
    if not 1 <= args.target <= 9999:        # the verifier reads numbers of up to four digits
        parser.error("--target must be from 1 to 9999")
    if args.solve:
        found = solutions(args.solve, args.target)
        print("\n".join(found) if found else "no solution")
        return
    env = GeneralPoints(rule=args.rule, face=args.rule == "face", split="all", target=args.target,
                        picture=(640, 320) if args.picture else None)
    try:
        observation, _ = env.reset(args.seed)
        if args.picture:
            observation["image"].save(args.picture, format="PNG")
            print(f"The picture is in {args.picture}.")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(observation["text"] + "\n(You may also type the formula alone; an empty line gives up.)")
    terminated = truncated = False
    while not (terminated or truncated):
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            break
        if "formula" not in text.lower():
            text = f"formula: {text}"
        observation, reward, terminated, truncated, _ = env.step(text)
        print(f"[{reward:+.1f}] {observation['text']}")
    if not terminated:
        print("One solution:", solutions(env.hand.numbers, args.target)[0])


if __name__ == "__main__":
    sys.exit(main())
