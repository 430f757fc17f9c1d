"""GeneralPoints: four cards, one equation, and a rule for what J, Q and K count.

Paper: arXiv 2501.17161, section 4.1 and appendix A. The knob that the whole project turns:

    rule "ten"   J = Q = K = 10         training, in-distribution (ID)
    rule "face"  J = 11, Q = 12, K = 13  never trained on: the rule OOD test

The prompt always states the rule in force. A model that READS it transfers; a model that has
memorised "face cards are 10" fails, and its `number` field shows that it did.

What happens in an episode (`GeneralPoints`):
  1. deal four cards from one split (train / val / test, or all), solvable under the rule
  2. reset() returns the prompt: task, rule, cards (in words, or as a picture), output format
  3. step(answer) asks verifier.py; a failed try returns its message as the next user turn
  4. it ends with success (terminated) or after `tries` failed answers (truncated)

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
import re
import string
import sys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from verifier import GP_MESSAGES, GP_REWARDS, ILLEGAL_WHY, verify_gp

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = {"black": ("spades", "clubs"), "red": ("hearts", "diamonds")}
SUITS["all"] = SUITS["black"] + SUITS["red"]
RULES = {"ten": (10, 10, 10), "face": (11, 12, 13)}     # what J, Q, K count
TARGET = 24
TRIES = 5                                               # the paper's verify_iter

# ------------------------------------------------------------------------------------------------
# Words. Every fixed piece of these templates is ONE token of the small backbone (see `phrases`), so
# that the first turn costs about 35 tokens and a student's CPU spends its time on the answers.
# ------------------------------------------------------------------------------------------------

# Slots of these templates: {j} {q} {k} what J, Q, K count; {c} {n} {f} the names of the three
# fields (KEYS). A doubled brace comes out as a single one: an answer is a JSON object.
PROMPT = ("[Task] Four cards are dealt. Write one equation that equals the target and uses what "
          "each card counts exactly once, with + - * / and brackets. A counts 1, J counts {j}, "
          "Q counts {q}, K counts {k}. The target is {target}.\n"
          "[Cards] {cards}\n"
          "[Output] {ask}")
KEYS = ("cards", "number", "formula")       # the paper's three fields, in its order
ASK = ('One JSON object: {{"{c}": [the four cards], "{n}": [what they count, with J = {j}, Q = {q},'
       ' K = {k}], "{f}": "the equation, ending in = {target}"}}')
ANSWER = '{{"{c}": ["{cards}"], "{n}": [{numbers}], "{f}": "{formula}={target}"}}'
RETRY = "Not right: {message}. Try again."

# The backbone's corpus: the same game asked in other words ...
OTHER_PROMPTS = (
    PROMPT,
    "Make {target} from these cards: {cards}. Here J is worth {j}, Q is worth {q} and K is worth "
    "{k}; an A is 1. Use all four once. {ask}",
    "Rules: K={k}, Q={q}, J={j}, A=1.\nCards: {cards}\nGoal: {target}\n{ask}",
    "You hold {cards}. Find a way to reach {target} with every card used one time. In this game a "
    "J stands for {j}, a Q for {q}, a K for {k}, an A for 1. {ask}",
)
FOLLOW_UP = "Now make {target}. The equation alone."
IN_PICTURE = "those in the picture"         # stands for the cards where a picture shows them
# ... and answered in other notations: (what the prompt asks for, the answer, separator of cards,
# separator of numbers). The first stands three times, to be drawn three times as often. It looks
# like the accepted one, but its fields are named by OTHER_KEYS, never KEYS: the verifier finds no
# "formula" in ANY of these. That is what makes this backbone play the part of a real one: it knows
# the game, and cannot earn a reward before SFT has shown it the format.
OTHER_KEYS = (("hand", "held", "faces"), ("worth", "value", "points"), ("sum", "result", "line"))
OTHER_NOTATIONS = (
    (ASK, ANSWER, '", "', ", "),
    (ASK, ANSWER, '", "', ", "),
    (ASK, ANSWER, '", "', ", "),
    (ASK + " Begin with the worth.",
     '{{"{n}": [{numbers}], "{c}": ["{cards}"], "{f}": "{formula}={target}"}}', '", "', ", "),
    ("Use tags.", "<hand>{cards}</hand><worth>{numbers}</worth><sum>{formula}={target}</sum>",
     " ", " "),
    ("Use three lines.", "hand: {cards}\nworth: {numbers}\nresult: {formula}={target}", " ", " "),
    ("Say it in words.", "I see {cards}. They are worth {numbers}. So {target}={formula}.",
     ", ", ", "),
    ("Use assignments.", "hand = ({cards}); worth = ({numbers}); eq = {formula}={target};",
     ", ", ", "),
    ("Draw a table.", "| {cards} |\n| {numbers} |\n| {formula}={target} |", " | ", " | "),
    ("Skip the cards.", "worth {numbers} gives {formula}={target}", " ", " "),
    ("List of pairs, J = {j}, Q = {q}, K = {k}.", "{pairs} => {formula}={target}", "; ", ""),
)

# ------------------------------------------------------------------------------------------------
# Cards, rules, splits
# ------------------------------------------------------------------------------------------------


def card_numbers(cards, rule):
    """What the cards count. cards: names as in RANKS; rule: what J, Q, K count, three ints."""
    worth = dict(zip("JQK", rule))
    return [worth[c] if c in worth else 1 if c == "A" else int(c) for c in cards]


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
    raise ValueError(f"no solvable hand found for target {target}: choose another --target")


# ------------------------------------------------------------------------------------------------
# The solver: every formula over four numbers is (order of the numbers, three operations, shape of
# the tree). 24 orders x 64 operations x 5 shapes = 7,680 formulas a hand, evaluated with numpy on
# all 1,820 hands at once. Fractions are pairs of int64 (numerator, denominator), so it is exact.
# ------------------------------------------------------------------------------------------------

ORDERS = np.array(list(itertools.permutations(range(4))))                    # (24, 4)
OPERATIONS = np.array(list(itertools.product(range(4), repeat=3)))           # (64, 3)
SIGNS = "+-*/"
SHAPES = 5


def _tree(shape, leaf, do):
    """Combine four leaves in one of the five ways to bracket them; do[i] is the i-th operation."""
    a, b, c, d = leaf
    if shape == 0:
        return do[2](do[1](do[0](a, b), c), d)      # ((ab)c)d
    if shape == 1:
        return do[2](do[0](a, do[1](b, c)), d)      # (a(bc))d
    if shape == 2:
        return do[1](do[0](a, b), do[2](c, d))      # (ab)(cd)
    if shape == 3:
        return do[0](a, do[2](do[1](b, c), d))      # a((bc)d)
    return do[0](a, do[1](b, do[2](c, d)))          # a(b(cd))


def _fraction_op(which):
    """Operation on arrays of fractions. which: int array of 0..3. 0/0 marks an impossible value."""
    def do(x, y):
        """x, y and the result: (numerators, denominators), two int arrays."""
        (n, d), (m, e) = x, y
        top = np.choose(which, [n * e + m * d, n * e - m * d, n * m, n * e])
        bottom = np.choose(which, [d * e, d * e, d * e, d * m])
        return np.where(bottom == 0, 0, top), bottom
    return do


def _text_op(which):
    """Operation on (text, precedence): writes brackets only where arithmetic needs them."""
    def do(x, y):
        """x, y and the result: (text, 1 for a sum, 2 for a product, 3 for a number)."""
        strength = 1 if which < 2 else 2
        left = f"({x[0]})" if x[1] < strength else x[0]
        # a-(b+c) and a/(b*c) need their brackets, a+(b-c) and a*(b/c) do not
        right = f"({y[0]})" if y[1] < strength or y[1] == strength and which in (1, 3) else y[0]
        return f"{left}{SIGNS[which]}{right}", strength
    return do


def _write(numbers, order, operations, shape):
    """The formula as text, e.g. (8, 3, 8, 3), ... -> "8/(3-8/3)"."""
    leaves = [(str(numbers[i]), 3) for i in order]
    return _tree(shape, leaves, [_text_op(int(o)) for o in operations])[0]


@functools.lru_cache(maxsize=4)
def _solution_table(target):
    """{sorted numbers: array (n, 3) of (order, operations, shape)} for all hands of 1..13."""
    hands = np.array(list(itertools.combinations_with_replacement(range(1, 14), 4)))  # (1820, 4)
    found = {tuple(map(int, h)): [] for h in hands}
    operations = [_fraction_op(OPERATIONS[:, i]) for i in range(3)]
    for o, order in enumerate(ORDERS):
        ordered = hands[:, order]                                            # (1820, 4)
        leaves = [(ordered[:, i, None], np.ones((1, 1), dtype=np.int64)) for i in range(4)]
        for shape in range(SHAPES):
            top, bottom = _tree(shape, leaves, operations)                   # (1820, 64) each
            for h, p in np.argwhere((bottom != 0) & (top == target * bottom)):
                found[tuple(map(int, hands[h]))].append((o, p, shape))
    return found


def solvable(numbers, target=TARGET):
    """True if four numbers of 1..13 can make the target. The table takes seconds, once."""
    return bool(_solution_table(target)[tuple(sorted(numbers))])


@functools.lru_cache(maxsize=8192)
def _solutions(numbers, target):
    found = _solution_table(target)[numbers]
    return tuple(sorted({_write(numbers, ORDERS[o], OPERATIONS[p], s) for o, p, s in found}))


def solutions(numbers, target=TARGET):
    """All formulas (distinct texts, sorted) that make the target from four numbers of 1..13.

    >>> solutions([8, 3, 8, 3])
    ('8/(3-8/3)',)
    """
    return _solutions(tuple(sorted(numbers)), target)


# ------------------------------------------------------------------------------------------------
# Pictures (GP-VL). Pillow ships one font and no suit symbols, so those are drawn as polygons. The
# corner index is large, as on cards for weak eyes: the small backbone gets 128 x 64 pixels for four
# cards. Everything is drawn several times too large and shrunk, since Pillow does not smooth edges.
# ------------------------------------------------------------------------------------------------

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
    letters = _letters(rank, (0, 2, 4)[weight] * high // 50, wide, high)
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
# Prompt, expert answer, environment
# ------------------------------------------------------------------------------------------------


def prompt(hand, template=PROMPT, ask=ASK, keys=KEYS, pictured=False):
    """The first user turn: task with the rule, the cards, the output format with the rule again.

    pictured: the cards are not listed, the turn comes with a picture of them (GP-VL).
    """
    slots = dict(zip("jqk", hand.rule), target=hand.target) | dict(zip("cnf", keys))
    cards = IN_PICTURE if pictured else ", ".join(hand.cards)
    return template.format(cards=cards, ask=ask.format(**slots), **slots)


def answer(hand, numbers, formula, template=ANSWER, card_gap='", "', number_gap=", ", keys=KEYS):
    """An answer in some notation; by default the one the verifier reads, and SFT teaches.

    It has the three fields of the paper, here as strict JSON. numbers: what the answer claims.
    """
    return template.format(
        cards=card_gap.join(hand.cards), numbers=number_gap.join(map(str, numbers)),
        pairs=card_gap.join(f"{c} > {n}" for c, n in zip(hand.cards, numbers)), formula=formula,
        target=hand.target, **dict(zip("cnf", keys)))


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
    "new_conversation", True if everything said before is to be forgotten (only at reset here).

    picture: (width, height) in pixels makes it GP-VL: the cards come as a picture with the first
    turn, and misreading them costs extra. None: GP-L.
    """

    def __init__(self, rule="ten", face=False, suits="all", split="train", target=TARGET,
                 tries=TRIES, scoring_rule=None, picture=None):
        # scoring_rule is the `fake` probe: the prompt states `rule`, the verifier scores by this.
        self.rule, self.face, self.suits, self.split = rule, face, suits, split
        self.target, self.tries, self.scoring_rule = target, tries, scoring_rule
        self.picture = picture
        self.hand, self.image, self.used, self.over = None, None, 0, True

    def reset(self, seed):
        """Deal the hand number `seed` (an int or a list of ints). Returns (observation, info)."""
        rng = np.random.default_rng(seed)
        self.hand = deal(rng, self.rule, self.face, self.suits, self.split, self.target)
        self.used, self.over = 0, False
        if self.picture:
            self.image = draw_hand(self.hand, int(rng.integers(2**31)), self.picture)
        text = prompt(self.hand, pictured=bool(self.picture))
        return self._observe(text, True), {"hand": self.hand}

    def step(self, text):
        """Judge one answer. Returns (observation, reward, terminated, truncated, info).

        terminated: solved. truncated: the tries are used up. Nothing that the agent could still
        earn follows either of them, so GAE ends with value 0 at both (rl.gae).
        Raises RuntimeError if no episode is under way.
        """
        if self.over:
            raise RuntimeError("no episode is under way: call reset() before step()")
        scored = self.hand if self.scoring_rule is None else Hand(
            self.hand.cards, self.hand.suits, RULES[self.scoring_rule], self.target)
        verdict = verify_gp(text, scored.cards, scored.numbers, self.target,
                            picture=bool(self.picture))
        self.used += 1
        terminated = verdict.correct
        truncated = not terminated and self.used >= self.tries
        self.over = terminated or truncated
        reward = verdict.reward + (GP_REWARDS["out of tries"] if truncated else 0.0)
        text = verdict.message if terminated else RETRY.format(message=verdict.message)
        return (self._observe(text, False), reward, terminated, truncated,
                {"verdict": verdict, "hand": self.hand})

    def _observe(self, text, new):
        return {"text": text, "image": self.image if new else None, "new_conversation": new}


# ------------------------------------------------------------------------------------------------
# Training text: expert conversations for SFT, a broad corpus for the small backbone.
# A conversation is a list of {"role", "content", "learn"}; the loss falls on turns with learn=True.
# The first turn of a pictured one has an "image" as well.
# ------------------------------------------------------------------------------------------------


def expert_conversation(rng, picture=None, **how):
    """One optimal single-turn example, as in the paper's SFT data. how: arguments of `deal`.

    picture: None, or the (width, height) of the picture that shows the cards.
    """
    hand = deal(rng, **how)
    ways = solutions(hand.numbers, hand.target)
    formula = ways[rng.integers(len(ways))]
    first = {"role": "user", "content": prompt(hand, pictured=bool(picture)), "learn": False}
    if picture:
        first["image"] = draw_hand(hand, int(rng.integers(2**31)), picture)
    return [first, {"role": "assistant", "content": expert_answer(hand, formula), "learn": True}]


def backbone_conversations(rng, count):
    """`count` conversations of the backbone's corpus: broad, correct, and never in the task's form.

    Hindsight makes data without a solver: draw a rule (J, Q, K anywhere in 10..13), a hand and
    RANDOM formulas over it, and let whatever they evaluate to (1..99) be the targets asked for.
    One training hand in eight, where it can, is asked for 24 instead, with a solution of the solver
    (8 % of first questions ask for 24, 4 % of all). Then, by kind:
      half        follow-ups: the same hand, up to six more targets, the equation alone. They cost a
                  third of a whole answer in tokens, and teach the same arithmetic
      a quarter   revisions: the answer comes after wrong tries and the verifier's messages
                  (learn=False: nobody should learn mistakes)
      a quarter   one question, one answer
    A hand of val or test is never asked for 24.
    """
    made = []
    while len(made) < count:
        n = 2 * (count - len(made)) + 64
        cards = rng.integers(13, size=(n, 4))
        rules = rng.integers(10, 14, size=(n, 3))
        worth = np.concatenate([np.tile(np.arange(1, 11), (n, 1)), rules], axis=1)    # (n, 13)
        numbers = np.take_along_axis(worth, cards, axis=1)                            # (n, 4)
        drawn = [_random_formulas(rng, numbers) for _ in range(16)]
        for i in range(n):
            hand = Hand(tuple(RANKS[c] for c in cards[i]), ("spades",) * 4,
                        tuple(map(int, rules[i])))
            asked = {int(d[4][i]): d for d in drawn if d[3][i] and 1 <= d[4][i] <= 99}
            if split_of(hand.cards) != "train":
                asked.pop(TARGET, None)
            pairs = [(target, _write(numbers[i], ORDERS[d[0][i]], d[1][i], int(d[2][i])))
                     for target, d in asked.items()]        # (target, a formula that makes it)
            if rng.random() < 1 / 8 and split_of(hand.cards) == "train" and \
                    solvable(hand.numbers):
                ways = solutions(hand.numbers)
                pairs.insert(0, (TARGET, ways[rng.integers(len(ways))]))
            if pairs:
                made.append(_backbone_conversation(rng, hand, pairs))
            if len(made) == count:
                break
    return made


def _random_formulas(rng, numbers):
    """One random formula a hand: (order, operations, shape, value is whole?, value), arrays (n,).

    Numbers (n, 4). Uniform over orders, operations and shapes.
    """
    n = len(numbers)
    order, shape = rng.integers(len(ORDERS), size=n), rng.integers(SHAPES, size=n)
    operations = rng.integers(4, size=(n, 3))
    leaves = [(np.take_along_axis(numbers, ORDERS[order], axis=1)[:, i], np.ones(n, np.int64))
              for i in range(4)]
    do = [_fraction_op(operations[:, i]) for i in range(3)]
    each = [_tree(s, leaves, do) for s in range(SHAPES)]
    top, bottom = np.choose(shape, [e[0] for e in each]), np.choose(shape, [e[1] for e in each])
    safe = np.where(bottom == 0, 1, bottom)
    whole = (bottom != 0) & (top % safe == 0)
    return order, operations, shape, whole, top // safe


def _backbone_conversation(rng, hand, pairs):
    """One conversation about a hand. pairs: (target, formula that makes it), the first is asked."""
    (target, formula), others = pairs[0], pairs[1:]
    hand = Hand(hand.cards, hand.suits, hand.rule, target)
    ask, notation, *gaps = OTHER_NOTATIONS[rng.integers(len(OTHER_NOTATIONS))]
    template = OTHER_PROMPTS[rng.integers(len(OTHER_PROMPTS))]
    keys = [names[rng.integers(len(names))] for names in OTHER_KEYS]
    turns = [{"role": "user", "content": prompt(hand, template, ask, keys), "learn": False}]
    kind = rng.random()
    if kind < 0.25:
        turns += _wrong_tries(rng, hand, [f for _, f in others[:rng.integers(1, 5)]], notation,
                              gaps, keys)
    right = answer(hand, hand.numbers, formula, notation, *gaps, keys)
    turns.append({"role": "assistant", "content": right, "learn": True})
    if kind >= 0.5:
        for target, formula in others[:6]:
            turns += [{"role": "user", "content": FOLLOW_UP.format(target=target), "learn": False},
                      {"role": "assistant", "content": f"{formula}={target}", "learn": True}]
    return turns


def _wrong_tries(rng, hand, formulas, notation, gaps, keys):
    """Answers that miss the target of the hand, each with the verifier's message."""
    turns = []
    for formula in formulas:
        numbers = list(hand.numbers)
        if rng.random() < 0.3:       # misread one card: a face card by another rule, say
            at = int(rng.integers(4))
            wrong = int(rng.integers(10, 14)) if hand.cards[at] in "JQK" else int(
                rng.integers(1, 11))
            formula = formula.replace(str(numbers[at]), str(wrong), 1)
            numbers[at] = wrong
        if rng.random() < 0.05:      # and sometimes lose a sign
            at = int(rng.integers(len(formula)))
            formula = formula[:at] + formula[at + 1:]
        verdict = verify_gp(f"formula: {formula}", hand.cards, hand.numbers, hand.target)
        if not verdict.correct:
            wrong = answer(hand, numbers, formula, notation, *gaps, keys)
            turns += [{"role": "assistant", "content": wrong, "learn": False},
                      {"role": "user", "content": RETRY.format(message=verdict.message),
                       "learn": False}]
    return turns


_LISTED = re.compile(", ".join(["(10|[2-9AJQK])"] * 4))


def _random_suits(rng, cards):
    """Suits for four ranks, different ones for two of a rank; three cards in four are black."""
    odds = [3 / 8 if suit in SUITS["black"] else 1 / 8 for suit in SUITS["all"]]
    suits = [""] * 4
    for rank in dict.fromkeys(cards):
        places = [i for i in range(4) if cards[i] == rank]
        for i, suit in zip(places, rng.choice(4, len(places), replace=False, p=odds)):
            suits[i] = SUITS["all"][suit]
    return tuple(suits)


def pictured_hands(rng, count, picture):
    """What the eyes learn to see on: `count` training hands, any rank as likely: [(Hand, image)].

    picture: (width, height) in pixels. Suits as in `pictured_conversations`.
    """
    made = []
    while len(made) < count:
        cards = tuple(RANKS[i] for i in rng.integers(13, size=4))
        if split_of(cards) == "train":
            hand = Hand(cards, _random_suits(rng, cards), RULES["ten"])
            made.append((hand, draw_hand(hand, int(rng.integers(2**31)), picture)))
    return made


# What the eyes are asked of each quarter of a picture, four columns: (question, number of answers,
# weight of its loss).
EYE_QUESTIONS, EYE_COLUMNS = (("rank", 13, 1.0), ("suit", 4, 0.3)), True


def eye_lesson(rng, count, picture):
    """`pictured_hands` as questions: [(image, (rank, suit) of each of the four quarters)]."""
    return [(image, [(RANKS.index(card), SUITS["all"].index(suit))
                     for card, suit in zip(hand.cards, hand.suits)])
            for hand, image in pictured_hands(rng, count, picture)]


def pictured_conversations(rng, count, picture):
    """The backbone's corpus, seen instead of read: `count` conversations with a picture each.

    The list of cards in the prompt gives way to a picture of them, (width, height) pixels. Three
    cards in four are black: red ones are known as well, but less well, so that training on black
    ones alone has something to lift and something to lose. Hands of val and test are never shown,
    whatever the target: reading them measures more than a memory of hands.
    """
    made = []
    while len(made) < count:
        for turns in backbone_conversations(rng, count - len(made)):
            before, *cards, after = _LISTED.split(turns[0]["content"])
            assert len(cards) == 4, f"not one list of cards in: {turns[0]['content']}"
            if split_of(cards) == "train":
                hand = Hand(tuple(cards), _random_suits(rng, cards), RULES["ten"])
                turns[0] |= {"content": before + IN_PICTURE + after,
                             "image": draw_hand(hand, int(rng.integers(2**31)), picture)}
                made.append(turns)
    return made


def reading_conversation(rng, suits, picture):
    """To measure how a backbone reads: (conversation about a pictured hand of val, its cards).

    suits: a key of SUITS. Asked and answered in a notation of the corpus: "hand: A 10 K 3" first.
    """
    hand = deal(rng, suits=suits, split="val")
    ask, template, *gaps = next(n for n in OTHER_NOTATIONS if n[1].startswith("hand: {cards}"))
    text = answer(hand, hand.numbers, solutions(hand.numbers)[0], template, *gaps)
    return [{"role": "user", "content": prompt(hand, ask=ask, pictured=True), "learn": False,
             "image": draw_hand(hand, int(rng.integers(2**31)), picture)},
            {"role": "assistant", "content": text, "learn": True}], hand.cards


def phrases():
    """The fixed pieces of all texts above, for the small backbone's tokenizer, sorted."""
    templates = [PROMPT, ASK, ANSWER, RETRY, FOLLOW_UP, IN_PICTURE, *OTHER_PROMPTS,
                 *GP_MESSAGES.values(),
                 *ILLEGAL_WHY.values(), *KEYS, *sum(OTHER_KEYS, ()), " > ", " and "]
    for notation in OTHER_NOTATIONS:
        templates += notation       # what is asked, the answer, and both separators
    pieces = set()
    for template in templates:
        piece = ""
        for literal, slot, *_ in string.Formatter().parse(template):
            piece += literal            # "{{" ends a literal too, but not a piece
            if slot is not None:
                pieces.add(piece)
                piece = ""
        pieces.add(piece)
    return sorted(p for p in pieces if len(p) > 1) + [str(n) for n in range(10, 100)]


# ------------------------------------------------------------------------------------------------
# Play in the terminal
# ------------------------------------------------------------------------------------------------


def main():
    """A game for a person, or every solution of a hand."""
    parser = argparse.ArgumentParser(description="Play GeneralPoints, or solve a hand.")
    parser.add_argument("--rule", choices=RULES, default="ten", help="what J, Q and K count")
    parser.add_argument("--seed", type=int, default=0, help="which hand (default 0)")
    parser.add_argument("--target", type=int, default=TARGET, help="number to reach (paper: 24)")
    parser.add_argument("--solve", type=int, nargs=4, metavar="N",
                        help="print all solutions of four numbers 1..13 and stop")
    parser.add_argument("--picture", metavar="FILE",
                        help="show the cards as a picture, in this PNG file, instead of in words")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed must be 0 or more")
    if not 1 <= args.target <= 9999:        # the verifier reads numbers of up to four digits
        parser.error("--target must be from 1 to 9999")
    if args.solve:
        if not all(1 <= n <= 13 for n in args.solve):
            parser.error("--solve takes numbers from 1 to 13")
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
        except (EOFError, KeyboardInterrupt, UnicodeError, RuntimeError):   # the last: no stdin
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
