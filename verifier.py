"""The verifier: text in, verdict out. The only source of reward in this project.

Paper: arXiv 2501.17161, section 3; the reward tables are those of appendices A.3 and B.3.

  1. find the fields of an answer: strict JSON first, then the looser forms that language models
     write (single quotes, no quotes, trailing commas, words around the object)
  2. a hand of cards: parse the formula into an exact fraction and the numbers used
  3. the verdict on it, with an English clause on what was wrong, which the model is told
  4. a walk: the action, and what the answer CLAIMS to see, which decides what a wrong action costs

An answer is HOSTILE INPUT: the policy (the model that plays) is paid for whatever this file
believes. So the formula is parsed and never handed to Python's eval; arithmetic is exact (8/(3-8/3)
is 24, not 23.999...); lengths and depths are limited; whatever an answer holds, verify_gp and
verify_virl raise nothing. Decode it WITH its special tokens, or `1<|im_start|>0` reads as 10.

    >>> verify_gp('{"cards": ["8","3","8","3"], "number": [8,3,8,3], "formula": "8/(3-8/3)=24"}',
    ...           ["8", "3", "8", "3"], [8, 3, 8, 3]).kind
    'correct'

Read next: gp_env.py, which deals the hand and turns a verdict into a step of an environment.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

MAX_ANSWER = 2000   # characters of a whole answer that are looked at
MAX_FORMULA = 200   # characters of a formula; the longest honest one has about 25
MAX_DEPTH = 20      # nested brackets; four numbers never need more than 2
MAX_DIGITS = 4      # digits of one number

# -------- 1. The fields of an answer


def _read_fields(text, names, needed, cut):
    """(name, value) of every field of an answer, in order. Linear in len(text).

    A text that is one JSON object with the field `needed` is read as such. In any other, what
    stands between a `name:` and the next one is that field, and cut(name, piece) its value.
    """
    try:    # an object as a tuple of pairs: a dict would hide the first of two equal keys
        found = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, tuple):
        pairs = [(key.lower(), value) for key, value in found]
        if any(key == needed for key, _ in pairs):
            return pairs
    name_and_colon = rf"""["']?\b({'|'.join(names)})\b["']?\s*:"""
    _, *parts = re.split(name_and_colon, text, flags=re.IGNORECASE)    # name, piece, name, piece
    found_names = [name.lower() for name in parts[::2]]
    return [(name, cut(name, piece)) for name, piece in zip(found_names, parts[1::2])]


def _cut_cards(name, piece):
    """The words of a list; a formula: to its closing quote; unquoted, to a comma, } or line end."""
    if name != "formula":
        return re.findall("[A-Za-z0-9]+", piece.split("]", 1)[0])
    piece = piece.lstrip()
    if piece[:1] in ("'", '"'):     # a comma stays in: "8*3=24, or 6*4" is illegal
        return piece[1:].split(piece[0], 1)[0]
    return re.split(r"[\n},]", piece, maxsplit=1)[0]


def _cut_walk(_, piece):
    """A text, up to the quote that closes it, or to the end of its line or object."""
    piece, end = piece.lstrip(), r"[\n}]"
    if piece[:1] in ("'", '"'):     # not every quote closes: Joe's Cafe has one inside
        piece, end = piece[1:], piece[0] + r"\s*(?:,?\s*(?:[}\n]|$)|,\s*['\"])"
    return re.split(end, piece, maxsplit=1)[0].strip(" \t\r,;")


def read_answer(text):
    """The cards, the numbers and EVERY formula of an answer, as lists of str; never raises.

    >>> read_answer("cards: A 2, number: 1 2, formula: 1+2=3")
    {'cards': ['A', '2'], 'number': ['1', '2'], 'formula': ['1+2=3']}
    """
    found = {"cards": [], "number": [], "formula": []}
    for name, value in _read_fields(text, [*found, "numbers"], "formula", _cut_cards):
        name = "number" if name == "numbers" else name
        if name == "formula":
            found[name].append(value if isinstance(value, str) else "")
        elif name in found and isinstance(value, list):
            found[name] = [str(item) for item in value if isinstance(item, (str, int))]
    return found


def read_walk(text):
    """The fields of an answer on a walk, each a list of EVERY value found; never raises."""
    found = {"action": [], "current observation": [], "current instruction": []}
    for name, value in _read_fields(text, found, "action", _cut_walk):
        if name in found:
            found[name].append(value if isinstance(value, str) else "")
    return found


# -------- 2. The formula

_SAME_SIGN = str.maketrans("×·∗⋅÷∕⁄−–＋＝", "****///--+=")
ILLEGAL_WHY = {
    "character": "only numbers and + - * / ( ) = are allowed",
    "number": "a number or ( should stand here",
    "operator": "an operator should stand here",
    "open": "a bracket is not closed",
    "close": "no bracket is open",
    "digits": "the number is too long",
    "leading zero": "a number has no zero in front",
    "length": "the formula is too long",
    "depth": "too many brackets",
    "zero": "division by zero",
    "end": "the formula should end here",
}


class IllegalFormula(ValueError):
    """The formula breaks the grammar. `token` is where, `why` a key of ILLEGAL_WHY."""

    def __init__(self, token, why):
        # A token is echoed back to the model inside the next user turn, so it must not carry chat
        # markup such as <|end|>: a token is a number, ONE character or `end`, all plain ASCII.
        self.token = "".join(c for c in token[:8] if c.isascii() and c.isprintable()) or "?"
        self.why = why
        super().__init__(f"{why} at '{self.token}'")


def _tokens(text):
    """The tokens of a formula: numbers, + - * / ( ) = and a last "end"."""
    tokens = re.findall(r"[0-9]+|\S", text)
    for token in tokens:
        if token not in "+-*/()=" and not (token.isascii() and token.isdigit()):
            raise IllegalFormula(token, "character")
        if len(token) > MAX_DIGITS:
            raise IllegalFormula(token, "digits")
        if len(token) > 1 and token[0] == "0":
            raise IllegalFormula(token, "leading zero")
    return tokens + ["end"]


# The grammar, and one function for each of its rules (recursive descent):
#
#     equation   := expression [ "=" number ]         parse_formula
#     expression := term   { ("+" | "-") term }
#     term       := factor { ("*" | "/") factor }
#     factor     := number | "(" expression ")"
#
# Each takes what it reads off the front of `tokens`, notes in `numbers` the numbers that it meets,
# and returns its exact value. depth: how many brackets are open.


def _expression(tokens, numbers, depth):
    value = _term(tokens, numbers, depth)
    while tokens[0] in ("+", "-"):
        sign = tokens.pop(0)
        other = _term(tokens, numbers, depth)
        value = value + other if sign == "+" else value - other
    return value


def _term(tokens, numbers, depth):
    value = _factor(tokens, numbers, depth)
    while tokens[0] in ("*", "/"):
        sign = tokens.pop(0)
        other = _factor(tokens, numbers, depth)
        if sign == "/" and other == 0:
            raise IllegalFormula("/", "zero")
        value = value * other if sign == "*" else value / other
    return value


def _factor(tokens, numbers, depth):
    token = tokens.pop(0)
    if token.isdigit():
        numbers.append(int(token))
        return Fraction(int(token))
    if token != "(":                                # also refuses a leading minus: -(1-2)*24
        raise IllegalFormula(token, "number")
    if depth == MAX_DEPTH:
        raise IllegalFormula("(", "depth")
    value = _expression(tokens, numbers, depth + 1)
    after = tokens.pop(0)
    if after != ")":
        raise IllegalFormula(after, "open" if after in ("end", "=") else "operator")
    return value


def parse_formula(text):
    """Evaluate one side, `1+2*(3-4)`, or a whole equation, `1+2*(3-4)=5`, exactly.

    Returns (value, numbers, right): value of the left side as a Fraction, the numbers used on the
    left in order of appearance, and the number right of "=" (None if there is no "=").
    Raises IllegalFormula for all that the grammar does not have: LaTeX, `24=3*8`, a full stop.
    """
    text = text.translate(_SAME_SIGN)
    if len(text) > MAX_FORMULA:
        raise IllegalFormula(text[0], "length")
    tokens, numbers, right = _tokens(text), [], None
    value = _expression(tokens, numbers, 0)
    if tokens[0] == "=":
        tokens.pop(0)
        if not tokens[0].isdigit():
            raise IllegalFormula(tokens[0], "number")
        right = int(tokens.pop(0))
    rest = tokens[0]
    if rest == "end":
        return value, numbers, right
    if right is not None:
        raise IllegalFormula(rest, "end")
    raise IllegalFormula(rest, "close" if rest == ")" else "operator")


# -------- 3. The verdict on a hand of cards

# The paper's table (appendix A.3). The released code adds penalties up (one answer can cost -8);
# here, as in the paper's text, an answer has ONE kind, and the last two are added to its reward.
GP_REWARDS = {
    "correct": 5.0,         # a legal formula that equals the target: the episode ends
    "wrong value": -1.0,    # legal, each card once, but another value or right side
    "wrong numbers": -2.0,  # legal, but not on exactly the hand's numbers: J was taken for 10
    "illegal": -3.0,        # no formula, several, one outside the grammar, too long
    "out of tries": -1.0,   # added to the last failed try of an episode
    "misread cards": -1.5,  # added when the cards were read wrongly off the picture (GP-VL)
}
GP_MESSAGES = {
    "correct": "Correct.",
    "wrong value": "the formula gives {value}, not {target}",
    "wrong side": "the right side must be {target}",
    "illegal": "illegal formula at '{token}': {why}",
    "no formula": "there is no formula field",
    "two formulas": "give one formula only",
    "too long": "the answer is too long",
    "foreign": "{numbers} not in the hand",
    "overused": "{numbers} used too often",
    "missing": "{numbers} not used",
    "misread": "the cards were read wrongly",
}


@dataclass(frozen=True)
class Verdict:
    """What the verifier found in an answer to a hand."""

    kind: str                   # one of the first four keys of GP_REWARDS
    reward: float               # without "out of tries"
    message: str                # one clause or more
    cards_right: bool           # `cards` is the hand, in any order
    numbers_right: bool         # `number` is what the hand counts (rule that scores), any order

    @property
    def correct(self):
        """Is its kind "correct"? In pictures perhaps over misread cards (5 - 1.5)."""
        return self.kind == "correct"


def compare(used, numbers):
    """The numbers of a formula that are not in the hand, and those of the hand that are used too
    often and too seldom: three sorted lists without repeats.

    >>> compare([8, 8, 8, 24], [8, 3, 8, 3])
    ([24], [8], [3])
    """
    use, have = Counter(used), Counter(numbers)
    foreign = sorted(n for n in use if n not in have)
    overused = sorted(n for n in have if use[n] > have[n])
    missing = sorted(n for n in have if use[n] < have[n])
    return foreign, overused, missing


def _judge_formula(formulas, answer_length, numbers, target):
    """(kind, message) of the formula fields found in an answer."""
    say = GP_MESSAGES
    if answer_length > MAX_ANSWER:
        return "illegal", say["too long"]
    if len(formulas) != 1:      # several guesses in one answer would be tries that nobody counts
        return "illegal", say["two formulas" if formulas else "no formula"]
    try:
        value, used, right = parse_formula(formulas[0])
    except IllegalFormula as error:
        why = ILLEGAL_WHY[error.why]
        return "illegal", say["illegal"].format(token=error.token, why=why)
    parts = []
    for name, wrong in zip(("foreign", "overused", "missing"), compare(used, numbers)):
        if wrong:
            parts.append(say[name].format(numbers=" and ".join(map(str, wrong[:4]))))
    if parts:
        return "wrong numbers", "; ".join(parts)
    if value != target:
        return "wrong value", say["wrong value"].format(value=value, target=target)
    if right is not None and right != target:
        return "wrong value", say["wrong side"].format(target=target)
    return "correct", say["correct"]


def verify_gp(text, cards, numbers, target=24, picture=False):
    """Judge one answer to a GeneralPoints hand (paper appendix A.3).

    text: the whole answer. cards: four card names, e.g. ["2", "3", "J", "5"]. numbers: what they
    count under the rule that scores, e.g. [2, 3, 11, 5]. picture: the cards had to be read off a
    picture, so misreading them costs a further -1.5. Returns a Verdict and raises nothing.
    """
    fields = read_answer(text[:MAX_ANSWER])
    cards_right = Counter(c.upper() for c in fields["cards"]) == Counter(cards)
    numbers_right = Counter(fields["number"]) == Counter(str(n) for n in numbers)
    kind, message = _judge_formula(fields["formula"], len(text), numbers, target)
    reward = GP_REWARDS[kind]
    if picture and not cards_right:
        # a right formula over a misread hand stays "correct" and ends the episode, at 5 - 1.5
        reward += GP_REWARDS["misread cards"]
        misread = GP_MESSAGES["misread"]
        message = misread if kind == "correct" else f"{misread}; {message}"
    return Verdict(kind, reward, message, cards_right, numbers_right)


# -------- 4. The verdict on a walk: the action, and what an answer claims to see

_FORGIVEN = re.compile(r"""[-_"'`\s]""")
_SIDE = re.compile(r" (?:is|are) (?:on|to|at|in) (?:your|the) (front|right|back|left)\b")
_CROSSING = re.compile(r"\b(?:intersection|crossing|crossroads)\b")
_NOT = re.compile(r"\b(?:no|not|never|without|neither|nor)\b|n't\b")
_OPENING = re.compile(r"^(?:(?:you see|there is|there are|the|destination|a|an)(?:\s+|$))+")


def read_action(text, words):
    """The action that a text names, as the action space writes it, or None.

    words: the legal ones. Forgiven: capitals, quotes, spaces, - and _; forward, stop without ().

    >>> read_action("Turn_Direction('north-west')", ["north", "northwest"])
    'turn_direction(northwest)'
    """
    actions = ["forward()", "stop()", *(f"turn_direction({word})" for word in words)]
    bare = {"forward": "forward()", "stop": "stop()"}
    bare |= {_FORGIVEN.sub("", action): action for action in actions}
    return bare.get(_FORGIVEN.sub("", text.lower()))


def read_claims(observation):
    """What an observation says is there: (intersection?, {landmark: side}), all in lower case.

    Claim and truth are both read by it, so a copy of the truth is right, whatever the names are.

    >>> read_claims("You see the Mill Bank is on your left; I am not at an intersection")
    (False, {'mill bank': 'left'})
    """
    crossing, places = False, {}
    flat = " ".join(observation[:MAX_ANSWER].lower().split())
    for clause in re.split(r"[;,.]| and | but ", flat):
        side = _SIDE.search(clause)
        if side:
            name = _OPENING.sub("", clause[:side.start()].strip())
            places[name] = side.group(1)
            clause = clause[side.end():]    # a "Crossing Cafe" is no crossing
        if _CROSSING.search(clause) and not _NOT.search(clause):
            crossing = True
    return crossing, places


# The paper's table (appendix B.3). The +1 is for the action alone, as is its per-step accuracy.
VIRL_REWARDS = {
    "correct": 1.0,         # the expert's action at this position
    "wrong action": -1.0,   # another one, or none that is legal; the surroundings read right
    "no action": -1.0,      # no action field, or several, or an answer too long to read
    "misread": -1.5,        # another action, and a landmark or the intersection was read wrongly
    "out of tries": -1.0,   # added to the last failed try at a position
}
VIRL_MESSAGES = {
    "correct": "Correct.",
    "wrong action": "that is not the action to take here",
    "unknown action": "that is not in the list of actions",
    "no action": "there is no action field",
    "two actions": "give one action only",
    "too long": "the answer is too long",
    "false intersection": "you are not at an intersection",
    "missed intersection": "you are at an intersection",
    "false landmark": "a landmark that you name is not here",
    "missed landmark": "you missed a landmark",
    "wrong side": "a landmark is on another side",
}


@dataclass(frozen=True)
class WalkVerdict:
    """What the verifier found in an answer on a walk."""

    kind: str                   # a key of VIRL_REWARDS
    reward: float               # without "out of tries"
    message: str                # one or more clauses
    action: str | None          # as the action space writes it; None if it is not legal
    landmarks_right: bool       # those claimed, with their sides, are those that are there
    intersection_right: bool    # claimed exactly where there is one
    correct = Verdict.correct


def _misreadings(crossing, places, crossing_there, there):
    """Keys of VIRL_MESSAGES: how the claims of an answer differ from what is there."""
    differs = {
        "false intersection": crossing and not crossing_there,
        "missed intersection": crossing_there and not crossing,
        "false landmark": places.keys() - there.keys(),
        "missed landmark": there.keys() - places.keys(),
        "wrong side": any(places[name] != there[name] for name in places.keys() & there.keys()),
    }
    return [key for key, found in differs.items() if found]


def verify_virl(text, action, observation, words):
    """Judge one answer at one position of a walk (paper appendix B.3).

    text: the whole answer. action: the expert's, e.g. "turn_direction(north)". observation: what
    is there. words: the legal direction words. Returns a WalkVerdict and raises nothing.
    """
    fields = read_walk(text[:MAX_ANSWER])
    crossing, places = read_claims(" ".join(fields["current observation"]))
    crossing_there, there = read_claims(observation)
    named, kind = None, "no action"
    if len(text) > MAX_ANSWER:
        parts = ["too long"]
    elif len(fields["action"]) != 1:    # several guesses in one answer would be uncounted tries
        parts = ["two actions" if fields["action"] else "no action"]
    else:
        named = read_action(fields["action"][0], words)
        parts = _misreadings(crossing, places, crossing_there, there)
        kind = "misread" if parts else "wrong action"
        parts.append("wrong action" if named else "unknown action")
    if named == action:
        kind, parts = "correct", ["correct"]
    message = "; ".join(VIRL_MESSAGES[part] for part in parts)
    return WalkVerdict(kind, VIRL_REWARDS[kind], message, named, places == there,
                       crossing == crossing_there)
