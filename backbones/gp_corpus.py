"""What the small backbone of the cards learns before SFT: conversations, pictures, its phrases.

Not in the paper, which starts from a pretrained Llama-3.2-Vision. A model of a megabyte plays that
part here. It has to know the game in general and earn nothing before SFT, so its corpus is the game
of gp_env.py in other words and other notations: NO answer in it is one that the verifier reads.

  1. words: other prompts, other notations
  2. conversations: random formulas, and whatever they make is the target that was asked for
  3. the same conversations with the cards in a picture, and lessons for the eyes
  4. the fixed pieces of all texts, each of which is one token

Read before: gp_env.py. Read next: backbones/build.py, which trains on this.
"""

import re
import string

import numpy as np

from gp_env import (ANSWER, ASK, IN_PICTURE, ORDERS, PROMPT, RANKS, RETRY, RULES, SHAPES, SUITS,
                    TARGET, Hand, calculate, combine, deal, draw_hand, failed_try, solutions,
                    solvable, split_of, write)
from verifier import GP_MESSAGES, ILLEGAL_WHY, verify_gp

# ------------------------------------------------------------------------------------------------
# 1. Words
# ------------------------------------------------------------------------------------------------

KEYS = ("cards", "number", "formula")       # the fields of the task
# What they are called here, never as in the task: so the verifier finds no "formula" in any answer.
OTHER_KEYS = (("hand", "held", "faces"), ("worth", "value", "points"), ("sum", "result", "line"))


def _open_keys(template):
    """A template of the task with slots {c} {n} {f} in place of the names of its three fields."""
    for slot, key in zip("cnf", KEYS):
        template = template.replace(f'"{key}"', f'"{{{slot}}}"')
    return template


ANY_ASK, ANY_ANSWER = _open_keys(ASK), _open_keys(ANSWER)
OTHER_PROMPTS = (
    PROMPT,
    "Make {target} from these cards: {cards}. Here J is worth {j}, Q is worth {q} and K is worth "
    "{k}; an A is 1. Use all four once. {ask}",
    "Rules: K={k}, Q={q}, J={j}, A=1.\nCards: {cards}\nGoal: {target}\n{ask}",
    "You hold {cards}. Find a way to reach {target} with every card used one time. In this game a "
    "J stands for {j}, a Q for {q}, a K for {k}, an A for 1. {ask}",
)
FOLLOW_UP = "Now make {target}. The equation alone."
# (what the prompt asks for, the answer, separator of cards, separator of numbers). The first three
# are one and the same, to be drawn three times as often: it looks like the task's notation.
OTHER_NOTATIONS = (
    (ANY_ASK, ANY_ANSWER, '", "', ", "),
    (ANY_ASK, ANY_ANSWER, '", "', ", "),
    (ANY_ASK, ANY_ANSWER, '", "', ", "),
    (ANY_ASK + " Begin with the worth.",
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


def write_prompt(hand, template, ask, keys=KEYS, pictured=False):
    """The first user turn in the words of a template. keys: the names of the three fields."""
    slots = dict(zip("jqk", hand.rule), target=hand.target) | dict(zip("cnf", keys))
    cards = IN_PICTURE if pictured else ", ".join(hand.cards)
    return template.format(cards=cards, ask=ask.format(**slots), **slots)


def write_answer(hand, numbers, formula, notation, keys=KEYS):
    """An answer in one of OTHER_NOTATIONS. numbers: what it claims that the cards count."""
    _, template, card_gap, number_gap = notation
    return template.format(
        cards=card_gap.join(hand.cards), numbers=number_gap.join(map(str, numbers)),
        pairs=card_gap.join(f"{c} > {n}" for c, n in zip(hand.cards, numbers)), formula=formula,
        target=hand.target, **dict(zip("cnf", keys)))


# ------------------------------------------------------------------------------------------------
# 2. Conversations
# ------------------------------------------------------------------------------------------------


def backbone_conversations(rng, count):
    """`count` conversations of the backbone's corpus: broad, correct, and never in the task's form.

    Hindsight makes data without a solver: draw a rule (J, Q, K anywhere in 10..13), a hand and
    RANDOM formulas over it, and let whatever they evaluate to (1..99) be the targets asked for.
    One training hand in eight, where it can, is asked for 24 instead, with a solution of the solver
    (8 % of first questions ask for 24, 4 % of all). A hand of val or test is never asked for 24.
    """
    made = []
    while len(made) < count:
        n = 2 * (count - len(made)) + 64
        cards = rng.integers(13, size=(n, 4))
        rules = rng.integers(10, 14, size=(n, 3))
        worth = np.concatenate([np.tile(np.arange(1, 11), (n, 1)), rules], axis=1)    # (n, 13)
        numbers = np.take_along_axis(worth, cards, axis=1)                            # (n, 4)
        drawn = [RandomFormulas(rng, numbers) for _ in range(16)]
        for i in range(n):
            hand = Hand(tuple(RANKS[c] for c in cards[i]), ("spades",) * 4,
                        tuple(map(int, rules[i])))
            training = split_of(hand.cards) == "train"
            makes = {int(formulas.values[i]): formulas for formulas in drawn if formulas.whole[i]}
            pairs = [(target, formulas.text(i)) for target, formulas in makes.items()
                     if 1 <= target <= 99 and (training or target != TARGET)]
            if rng.random() < 1 / 8 and training and solvable(hand.numbers):
                ways = solutions(hand.numbers)
                pairs.insert(0, (TARGET, ways[rng.integers(len(ways))]))
            if pairs:
                made.append(_conversation(rng, hand, pairs))
            if len(made) == count:
                break
    return made


class RandomFormulas:
    """One random formula for each of n hands: uniform over orders, signs and shapes.

    numbers: (n, 4). whole (n,): is its value an integer? values (n,): that integer.
    """

    def __init__(self, rng, numbers):
        n = len(numbers)
        order, self.shapes = rng.integers(len(ORDERS), size=n), rng.integers(SHAPES, size=n)
        self.signs = rng.integers(4, size=(n, 3))
        self.numbers = np.take_along_axis(numbers, ORDERS[order], axis=1)
        fractions = [(column, np.ones(n, np.int64)) for column in self.numbers.T]
        each = [combine(shape, fractions, self.signs.T, calculate) for shape in range(SHAPES)]
        top = np.choose(self.shapes, [top for top, _ in each])
        bottom = np.choose(self.shapes, [bottom for _, bottom in each])
        divisor = np.where(bottom == 0, 1, bottom)
        self.whole, self.values = (bottom != 0) & (top % divisor == 0), top // divisor

    def text(self, i):
        """The formula of hand i."""
        return write(self.numbers[i], self.signs[i], self.shapes[i])


def _conversation(rng, hand, pairs):
    """One conversation about a hand. pairs: (target, formula that makes it), the first is asked.

      half        follow-ups: the same hand, up to six more targets, the equation alone. They cost a
                  third of a whole answer in tokens, and teach the same arithmetic
      a quarter   revisions: the answer comes after wrong tries and the verifier's messages
      a quarter   one question, one answer
    """
    (target, formula), others = pairs[0], pairs[1:]
    hand = Hand(hand.cards, hand.suits, hand.rule, target)
    notation = OTHER_NOTATIONS[rng.integers(len(OTHER_NOTATIONS))]
    template = OTHER_PROMPTS[rng.integers(len(OTHER_PROMPTS))]
    keys = [names[rng.integers(len(names))] for names in OTHER_KEYS]
    ask, *_ = notation
    turns = [{"role": "user", "content": write_prompt(hand, template, ask, keys), "learn": False}]
    kind = rng.random()
    if kind < 0.25:
        for _, wrong in others[:rng.integers(1, 5)]:
            turns += _wrong_try(rng, hand, wrong, notation, keys)
    right = write_answer(hand, hand.numbers, formula, notation, keys)
    turns.append({"role": "assistant", "content": right, "learn": True})
    if kind >= 0.5:
        for target, formula in others[:6]:
            turns += [{"role": "user", "content": FOLLOW_UP.format(target=target), "learn": False},
                      {"role": "assistant", "content": f"{formula}={target}", "learn": True}]
    return turns


def _wrong_try(rng, hand, formula, notation, keys):
    """An answer that misses the target of the hand, and the verifier's message."""
    numbers = hand.numbers
    if rng.random() < 0.3:
        at = int(rng.integers(4))               # a card, and what it is read as
        number = int(rng.integers(10, 14) if hand.cards[at] in "JQK" else rng.integers(1, 11))
        formula = formula.replace(str(numbers[at]), str(number), 1)
        numbers[at] = number
    if rng.random() < 0.05:      # and sometimes a sign is lost
        at = int(rng.integers(len(formula)))
        formula = formula[:at] + formula[at + 1:]
    verdict = verify_gp(f"formula: {formula}", hand.cards, hand.numbers, hand.target)
    if verdict.correct:          # the misread number was the right one after all
        return []
    return failed_try(write_answer(hand, numbers, formula, notation, keys), verdict)


# ------------------------------------------------------------------------------------------------
# 3. Pictures
# ------------------------------------------------------------------------------------------------

# What the eyes are asked of each quarter of a picture: (question, number of answers, weight of its
# loss). The quarters are columns of the picture: one card each.
EYE_QUESTIONS = (("rank", 13, 1.0), ("suit", 4, 0.3))
EYE_COLUMNS = True

_LISTED = re.compile(", ".join(["(10|[2-9AJQK])"] * 4))     # "A, 10, K, 3" in a prompt


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
    notation = next(n for n in OTHER_NOTATIONS if n[1].startswith("hand: {cards}"))
    ask, *_ = notation
    text = write_answer(hand, hand.numbers, solutions(hand.numbers)[0], notation)
    return [{"role": "user", "content": write_prompt(hand, PROMPT, ask, pictured=True),
             "learn": False, "image": draw_hand(hand, int(rng.integers(2**31)), picture)},
            {"role": "assistant", "content": text, "learn": True}], hand.cards


# ------------------------------------------------------------------------------------------------
# 4. Phrases
# ------------------------------------------------------------------------------------------------


def phrases():
    """The fixed pieces of all texts of the cards, for the small backbone's tokenizer, sorted.

    Each is ONE token, so that a first turn costs about 35 tokens and a student's CPU spends its
    time on the answers. The published weights are tied to this list: it may not change. A message
    that came later ("leading zero") is read all the same, and costs more tokens.
    """
    why = [text for name, text in ILLEGAL_WHY.items() if name != "leading zero"]
    templates = [PROMPT, ANY_ASK, ANY_ANSWER, RETRY, FOLLOW_UP, IN_PICTURE, *OTHER_PROMPTS,
                 *GP_MESSAGES.values(), *why, *KEYS, *sum(OTHER_KEYS, ()), " > ", " and "]
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
