"""GeneralPoints: four cards, one equation, and a rule for what J, Q and K count.

Paper: arXiv 2501.17161, section 4.1 and appendix A. The knob that the whole project turns:

    rule "ten"   J = Q = K = 10          training, in-distribution (ID)
    rule "face"  J = 11, Q = 12, K = 13  the rule OOD test: SFT and RL never see it

The prompt states the rule. A model that READS it transfers; a model that has memorised "face cards
are 10" fails, and its `number` field shows that it did.

  1. words: the task with the rule, the cards, the format of the answer
  2. deal four cards from one split, solvable under the rule
  3. the solver knows which hands are solvable, and what an expert answers
  4. reset() returns the prompt. step(answer) asks verifier.py; a failed try returns its message as
     the next user turn. And the expert's conversations, from which SFT learns
  5. draw the cards (GP-VL)
  6. play in the terminal

    python gp_env.py [--rule face] [--seed 3]     play in the terminal

Read before: verifier.py. Read next: sft.py.
"""

import argparse
import functools
import itertools
import math
import sys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from verifier import GP_REWARDS, verify_gp

# -------- 1. Words

# A doubled brace is one brace of the text.
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

# -------- 2. Cards, rules, splits

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
    """{four numbers 1..10, sorted: "train" (70 %) | "val" (10 %) | "test"}, by a fixed seed."""
    hands = list(itertools.combinations_with_replacement(range(1, 11), 4))
    order = np.random.default_rng(24).permutation(len(hands))
    names = ["test"] * 143 + ["val"] * 71 + ["train"] * 501
    return {hands[i]: name for i, name in zip(order, names)}


def split_of(cards):
    """Which split a hand belongs to: that of its numbers under the TRAINING rule.

    To it J, Q, K and 10 are one card: a split by names would put the same arithmetic on both sides.

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


def deal(rng, rule="ten", face=False, suits="all", split="train"):
    """Draw a solvable hand: four cards without replacement, redrawn until all conditions hold.

    rng: a numpy Generator. rule: of RULES, or three ints up to 13. face: at least one J, Q or K, as
    in the paper's rule OOD. suits: a key of SUITS. split: "train", "val", "test" or "all" (the
    paper).
    """
    rule = RULES[rule] if isinstance(rule, str) else tuple(rule)
    deck = [(rank, suit) for suit in SUITS[suits] for rank in RANKS]
    while True:
        cards, drawn = zip(*(deck[i] for i in rng.choice(len(deck), 4, replace=False)))
        hand = Hand(cards, drawn, rule)
        wanted = split in ("all", split_of(cards)) and (not face or set(cards) & set("JQK"))
        if wanted and solvable(hand.numbers):
            return hand


# -------- 3. The solver

# A formula over four numbers is (their order, three signs, how the brackets stand): 24 x 64 x 5
# formulas a hand, calculated for all 1,820 hands at once, exactly: fractions are pairs of int64.
ORDERS = np.array(list(itertools.permutations(range(4))))                    # (24, 4)
TRIPLES = np.array(list(itertools.product(range(4), repeat=3)))              # (64, 3)
SIGNS = "+-*/"
SHAPES = 5


def combine(shape, numbers, signs, do):
    """The value, or the text, of four numbers with three signs between them.

    shape: how the brackets stand. do(sign, x, y) joins two parts: `calculate` or `write_part`.
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

    A division by zero gives 0/0, and so does whatever is done with 0/0, even where it divides. So a
    formula is legal if its denominator is not 0.
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
    """{sorted numbers: [(index in ORDERS, index in TRIPLES, shape) of each solution]}, 1..13."""
    hands = list(itertools.combinations_with_replacement(range(1, 14), 4))   # 1,820
    found = {hand: [] for hand in hands}
    one, signs = np.ones((1, 1, 1, 1), dtype=np.int64), np.ogrid[:4, :4, :4]     # one axis a sign
    for which, order in enumerate(ORDERS):
        numbers = [(np.array(hands)[:, i].reshape(-1, 1, 1, 1), one) for i in order]
        for shape in range(SHAPES):
            top, bottom = combine(shape, numbers, signs, calculate)     # (1820, 4, 4, 4) each
            right = ((bottom != 0) & (top == target * bottom)).reshape(len(hands), -1)
            for hand, triple in np.argwhere(right).tolist():
                found[hands[hand]].append((which, triple, shape))
    return found


def solvable(numbers, target=TARGET):
    """True if four numbers of 1..13 can make the target. The first call takes seconds."""
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


# -------- 4. The environment, and the expert's conversations for SFT


def prompt(hand, pictured=False):
    """The first user turn. pictured: it does not list the cards, a picture shows them (GP-VL)."""
    slots = dict(zip("jqk", hand.rule), target=hand.target)
    cards = IN_PICTURE if pictured else ", ".join(hand.cards)
    return PROMPT.format(cards=cards, ask=ASK.format(**slots), **slots)


def answer(hand, numbers, formula):
    """An answer with the paper's three fields. numbers: what it claims that the cards count."""
    return ANSWER.format(cards='", "'.join(hand.cards), numbers=", ".join(map(str, numbers)),
                         formula=formula, target=hand.target)


class GeneralPoints:
    """One game at a time, with the calls of a Gymnasium environment (and without the dependency).

    >>> env = GeneralPoints()
    >>> observation, info = env.reset(seed=0)
    >>> env.step("no idea")[1:4]                            # reward, terminated, truncated
    (-3.0, False, False)

    An observation is a dict: "text", the next user turn; "image", a picture or None;
    "new_conversation", True if everything said before is to be forgotten.

    rule, face, suits, split: as in `deal`. tries: answers to a hand.
    scoring_rule: the `fake` probe: the prompt states `rule`, but this one is scored. Who has
    memorised it is paid, who reads is not.
    picture: (width, height) in pixels: the cards come as a picture with the first turn (GP-VL).
    fresh: after a failed try the first prompt comes again, as a new conversation, not the message.
    """

    def __init__(self, rule="ten", face=False, suits="all", split="train", tries=TRIES,
                 scoring_rule=None, picture=None, fresh=False):
        self.rule, self.face, self.suits, self.split = rule, face, suits, split
        self.tries, self.scoring_rule, self.fresh = tries, scoring_rule, fresh
        self.picture, self.image = picture, None

    def reset(self, seed=None):
        """Deal the hand of `seed`, an int or ints (None: any). Returns (observation, info)."""
        rng, self.used = np.random.default_rng(seed), 0
        self.hand = deal(rng, self.rule, self.face, self.suits, self.split)
        if self.picture:
            self.image = draw_hand(self.hand, int(rng.integers(2**31)), self.picture)
        self.prompt = prompt(self.hand, pictured=bool(self.picture))
        return self._observe(self.prompt, True), {"hand": self.hand}

    def step(self, text):
        """Judge one answer. Returns (observation, reward, terminated, truncated, info).

        terminated: solved. truncated: the tries are used up. What comes next has value 0 at both.
        """
        numbers = self.hand.numbers
        if self.scoring_rule is not None:
            numbers = card_numbers(self.hand.cards, RULES[self.scoring_rule])
        verdict = verify_gp(text, self.hand.cards, numbers, picture=bool(self.picture))
        self.used += 1
        terminated = verdict.correct
        truncated = not terminated and self.used >= self.tries
        reward = verdict.reward + (GP_REWARDS["out of tries"] if truncated else 0.0)
        if terminated:
            text = verdict.message
        elif self.fresh:
            text = self.prompt
        else:
            text = RETRY.format(message=verdict.message)
        observation = self._observe(text, self.fresh and not terminated)
        return observation, reward, terminated, truncated, {"verdict": verdict, "hand": self.hand}

    def _observe(self, text, new):
        return {"text": text, "image": self.image if new else None, "new_conversation": new}


def failed_try(text, verdict):
    """Two turns of a conversation: a wrong answer, from which nobody should learn; the message."""
    return [{"role": "assistant", "content": text, "learn": False},
            {"role": "user", "content": RETRY.format(message=verdict.message), "learn": False}]


def _wrong_tries(rng, hand):
    """One to four random formulas with a wrong value or wrong numbers, about three in ten with a
    false number, and what the verifier says to each."""
    count, turns = int(rng.integers(1, 5)), []
    while len(turns) < 2 * count:
        numbers = hand.numbers
        if rng.random() < 0.3:      # 1..10: "11 not in the hand" would teach against the test rule
            numbers[rng.integers(4)] = int(rng.integers(1, 11))
        formula = write(rng.permutation(numbers), rng.integers(4, size=3), rng.integers(SHAPES))
        text = answer(hand, numbers, formula)
        verdict = verify_gp(text, hand.cards, hand.numbers, hand.target)
        if verdict.kind in ("wrong value", "wrong numbers"):
            turns += failed_try(text, verdict)
    return turns


def expert_conversation(rng, picture=None, revise=0.0, **how):
    """A hand and the expert's answer, as in the paper's SFT data (appendix A).

    Returns a list of turns {"role", "content", "learn"}: the loss falls on turns with learn=True.
    picture: the first turn shows the cards as its "image", (width, height) pixels. revise: how
    likely wrong tries come first (the paper's Fig. 15; in words). how: as in `deal`; rule="varied"
    draws J, Q, K from 10..13, but never the test rule (arXiv 2510.00237).
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
        turns += _wrong_tries(rng, hand)
    right = answer(hand, hand.numbers, formula)
    return turns + [{"role": "assistant", "content": right, "learn": True}]


# -------- 5. Pictures (GP-VL)

# Pillow has no suit symbols: polygons; no smooth edges: all is drawn larger, then shrunk.
PICTURE_SIZE = (128, 64)                    # the least that can be read; the paper: 1200 x 1200
INK = dict.fromkeys(SUITS["black"], (20, 20, 28)) | dict.fromkeys(SUITS["red"], (206, 24, 36))
CARD_SHAPE = 14 / 9                         # height of a card over its width
WEIGHTS = 3                                 # font weights
# Where the pips lie: x (-1 left, 0 middle, 1 right column) and y (-1 top, 1 bottom).
_SIDES = [(x, y) for x in (-1, 1) for y in (-1, 1)]
_LONG = [(x, y) for x in (-1, 1) for y in (-1, -1 / 3, 1 / 3, 1)]
PIPS = {"A": [(0, 0)], "2": [(0, -1), (0, 1)], "3": [(0, -1), (0, 0), (0, 1)],
        "4": _SIDES, "5": _SIDES + [(0, 0)], "6": _SIDES + [(-1, 0), (1, 0)],
        "7": _SIDES + [(-1, 0), (1, 0), (0, -0.5)],
        "8": _SIDES + [(-1, 0), (1, 0), (0, -0.5), (0, 0.5)],
        "9": _LONG + [(0, 0)], "10": _LONG + [(0, -2 / 3), (0, 2 / 3)]}


def _disc(x, y, radius):
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


@functools.lru_cache(maxsize=52 * WEIGHTS)
def _card_face(rank, suit, weight, width):
    """One card, upright, `width` pixels wide, as an RGBA image with clear corners."""
    height, ink = round(width * CARD_SHAPE), INK[suit]
    face = Image.new("RGBA", (width, height), (255, 255, 255, 0))
    draw = ImageDraw.Draw(face)
    edge = max(1, width // 40)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), width // 9, (252, 251, 246),
                           (150, 150, 146), edge)
    # the index: rank, squeezed if it is wide, and the suit below it
    high, stroke = round(0.32 * height), 2 * weight * round(0.32 * height) // 50
    font = ImageFont.load_default(2 * high)
    left, top, right, bottom = font.getbbox(rank, stroke_width=stroke)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), rank, 255, font, stroke_width=stroke)
    wide = min(round(0.42 * width), round(mask.width * high / mask.height))
    mask = mask.resize((wide, high), Image.Resampling.LANCZOS)
    middle = 0.27 * width
    face.paste(ink, (round(middle - wide / 2), round(0.08 * height)), mask)
    _stamp(draw, suit, middle, 0.57 * height, 0.16 * width, ink)
    centre, middle = 0.72 * width, 0.5 * height
    radius = (0.19 if rank == "A" else 0.09) * width
    for x, y in PIPS.get(rank, ()):
        _stamp(draw, suit, centre + 0.13 * width * x, middle + 0.36 * height * y, radius, ink)
    if rank in "JQK":
        draw.rectangle((centre - 0.2 * width, 0.08 * height, centre + 0.2 * width, 0.92 * height),
                       (246, 226, 160), ink, edge)
        _stamp(draw, rank, centre, 0.3 * height, 0.14 * width, ink)
        _stamp(draw, suit, centre, 0.66 * height, 0.15 * width, ink)
    return face


def draw_hand(hand, seed, size=PICTURE_SIZE):
    """The picture of a hand: four cards in a row on green cloth, an RGB image of `size` pixels.

    seed: how each card lies in its quarter of the width, the font's weight, the shade of the cloth.
    (The released code lays all cards alike: a table of 52 pictures would "read" them.)
    """
    rng = np.random.default_rng(seed)
    times = 3 if size[0] < 512 else 2                   # drawn so much too large
    cell, height = times * size[0] / 4, times * size[1]
    weight, shade = int(rng.integers(WEIGHTS)), rng.uniform(0.85, 1.15)
    cloth = tuple(round(shade * colour) for colour in (36, 110, 72))
    canvas = Image.new("RGB", (times * size[0], times * size[1]), cloth)
    wide = round(min(0.84 * cell, 0.84 * height / CARD_SHAPE))
    for i, (rank, suit) in enumerate(zip(hand.cards, hand.suits)):
        face = _card_face(rank, suit, weight, wide)
        angle, scale = math.radians(rng.uniform(-5, 5)), rng.uniform(0.9, 1.0)
        cos, sin = math.cos(angle), math.sin(angle)     # a tilted card needs a larger box
        box = (scale * (face.width * cos + face.height * abs(sin)),
               scale * (face.height * cos + face.width * abs(sin)))
        x = cell * (i + 0.5) + (cell / 2 - box[0] / 2 - times) * rng.uniform(-1, 1)
        y = height / 2 + (height / 2 - box[1] / 2 - times) * rng.uniform(-1, 1)
        # Pillow asks for the way back, from a pixel of the result to one of the upright card:
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


# -------- 6. Play in the terminal


def main():
    """A game for a person."""
    parser = argparse.ArgumentParser(description="Play GeneralPoints.")
    parser.add_argument("--rule", choices=RULES, default="ten", help="what J, Q and K count")
    parser.add_argument("--seed", type=int, default=0, help="which hand (default 0)")
    args = parser.parse_args()
    env = GeneralPoints(args.rule, face=args.rule == "face", split="all")
    observation, _ = env.reset(abs(args.seed))
    print(observation["text"] + "\n(You may also type the formula alone; an empty line gives up.)")
    terminated = truncated = False
    while not (terminated or truncated):
        line = sys.stdin.readline().strip()
        if not line:
            break
        text = line if "formula" in line.lower() else f"formula: {line}"
        observation, reward, terminated, truncated, _ = env.step(text)
        print(f"[{reward:+.1f}] {observation['text']}")
    if not terminated:
        print("One solution:", solutions(env.hand.numbers)[0])


if __name__ == "__main__":
    main()
