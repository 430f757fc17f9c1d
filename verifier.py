"""The verifier: text in, verdict out. The only source of reward in this project.

Paper: arXiv 2501.17161, section 3 (the verifier VER maps an answer to a reward and a message),
appendix A.3 (the GeneralPoints reward table) and B.3 (that of V-IRL). Nothing here knows a model, a
tensor or a file.

How an answer to a hand of cards is judged (`verify_gp`):
  1. find the fields `cards`, `number`, `formula`: strict JSON first, then the looser forms that
     language models write (single quotes, no quotes, trailing commas, words around the object)
  2. parse the formula by the grammar below: an exact fraction and the numbers used
  3. compare: are the numbers the hand's, is the value the target? Say in one English clause what
     was wrong: it is the next turn of the conversation

    equation   := expression [ "=" number ]
    expression := term   { ("+" | "-") term }
    term       := factor { ("*" | "/") factor }
    factor     := number | "(" expression ")"

How an answer on a walk is judged (`verify_virl`), once step 1 has found its fields:
  4. read the action, one of forward(), stop(), turn_direction(word), the word legal under the
     rule, and what the answer CLAIMS to see
  5. right action: correct. Wrong action: the claims decide what it costs and what is said

An answer is HOSTILE INPUT: the policy is paid for whatever this file believes. So the formula is
parsed and never handed to Python's eval; arithmetic is exact (8/(3-8/3) is 24 here, and 23.999...
in floating point); text length, bracket depth and digits are limited; and whatever an answer holds,
verify_gp and verify_virl return a verdict and raise nothing. Give them the text as it was sampled,
special tokens and all: with those left out, `1<|im_start|>0` would read as 10.

    >>> verify_gp('{"cards": ["8","3","8","3"], "number": [8,3,8,3], "formula": "8/(3-8/3)=24"}',
    ...           ["8", "3", "8", "3"], [8, 3, 8, 3]).kind
    'correct'
    >>> verify_virl("action: turn_direction(left)", "turn_direction(right)", "no landmark in sight",
    ...             ["left", "right"]).reward
    -1.0

Read next: gp_env.py, which deals the hand and turns a verdict into a step of an environment.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

MAX_ANSWER = 2000   # characters of a whole answer that are looked at
MAX_FORMULA = 200   # characters of a formula; the longest honest one has about 25
MAX_DEPTH = 20      # nested brackets; four numbers never need more than 3
MAX_DIGITS = 4      # digits of one number
MAX_ACTION = 60     # characters of an action on a walk; the longest honest one has 32

# ------------------------------------------------------------------------------------------------
# 1. The fields of an answer
# ------------------------------------------------------------------------------------------------


class _Pairs(list):
    """A JSON object as its (key, value) pairs: a dict would hide the first of two equal keys.

    A class of its own, to tell an object from a JSON list.
    """


def _read_fields(text, names, needed, cut):
    """(name, value) of every field of an answer, in order. Linear in len(text).

    A text that is one JSON object with the field `needed` is read as such. In any other, what
    stands between a `name:` and the next one is that field, and cut(name, piece) its value.
    """
    try:
        found = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, _Pairs):
        pairs = [(key.lower(), value) for key, value in found]
        if any(key == needed for key, _ in pairs):
            return pairs
    name_and_colon = rf"""["']?\b({'|'.join(names)})\b["']?\s*:"""
    matches = list(re.finditer(name_and_colon, text, re.IGNORECASE))
    ends = [match.start() for match in matches[1:]] + [len(text)]
    fields = []
    for match, end in zip(matches, ends):
        name = match.group(1).lower()
        fields.append((name, cut(name, text[match.end():end])))
    return fields


def _cut_cards(name, piece):
    """The words of a list; or a formula, up to the end of its quotes, line or object."""
    if name != "formula":
        return re.findall("[A-Za-z0-9]+", piece.split("]", 1)[0])
    piece = piece.lstrip()
    if piece[:1] in ("'", '"'):
        piece = piece[1:].split(piece[0], 1)[0]
    return re.split(r"[\n},]", piece, maxsplit=1)[0]


def _cut_walk(_, piece):
    """A text, up to the quote that closes it, or to the end of its line or object."""
    piece = piece.lstrip()
    if piece[:1] in ("'", '"'):     # not every quote closes: Joe's Cafe has one inside
        closing = re.search(piece[0] + r"\s*(?:[,}\n]|$)", piece[1:])
        piece = piece[1:closing.start() + 1] if closing else piece[1:]
    else:
        piece = re.split(r"[\n}]", piece, maxsplit=1)[0]
    return piece.strip(" \t\r,;")


def read_answer(text):
    """The fields of an answer to a hand of cards; never raises.

    Returns {"cards": [...], "number": [...], "formula": [...]}, lists of str: the cards, the
    numbers, and every formula field found, so that the caller can refuse a second one.

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
    """The fields of an answer on a walk, each a list of every value found; never raises.

    >>> read_walk("action: forward() }")
    {'action': ['forward()'], 'current observation': [], 'current instruction': []}
    """
    found = {"action": [], "current observation": [], "current instruction": []}
    for name, value in _read_fields(text, found, "action", _cut_walk):
        if name in found:
            found[name].append(value if isinstance(value, str) else "")
    return found


# ------------------------------------------------------------------------------------------------
# 2. The formula
# ------------------------------------------------------------------------------------------------

# Signs that people and models type for the same operation. Other characters are never "repaired".
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
        # markup such as <|end|>: a token is a number or ONE character, and plain ASCII at that.
        self.token = "".join(c for c in token[:8] if c.isascii() and c.isprintable()) or "?"
        self.why = why
        super().__init__(f"{why} at '{self.token}'")


def _cut(text):
    """The formula as a list of tokens: numbers, + - * / ( ) = and a last "end"."""
    tokens = re.findall(r"[0-9]+|\S", text)
    for token in tokens:
        is_number = token.isascii() and token.isdigit()
        if not is_number and token not in "+-*/()=":
            raise IllegalFormula(token, "character")
        if len(token) > MAX_DIGITS:
            raise IllegalFormula(token, "digits")
        if len(token) > 1 and token[0] == "0":
            raise IllegalFormula(token, "leading zero")
    return tokens + ["end"]


# Recursive descent: one function for each rule of the grammar. Each takes what it reads off the
# front of `tokens`, notes in `numbers` the numbers that it meets, and returns its exact value.
# depth: how many brackets are open.


def _expression(tokens, numbers, depth):
    """expression := term { ("+" | "-") term }"""
    value = _term(tokens, numbers, depth)
    while tokens[0] in ("+", "-"):
        sign = tokens.pop(0)
        other = _term(tokens, numbers, depth)
        value = value + other if sign == "+" else value - other
    return value


def _term(tokens, numbers, depth):
    """term := factor { ("*" | "/") factor }"""
    value = _factor(tokens, numbers, depth)
    while tokens[0] in ("*", "/"):
        sign = tokens.pop(0)
        other = _factor(tokens, numbers, depth)
        if sign == "/" and other == 0:
            raise IllegalFormula("/", "zero")
        value = value * other if sign == "*" else value / other
    return value


def _factor(tokens, numbers, depth):
    """factor := number | "(" expression ")" """
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
    if after.isdigit() or after == "(":             # (8 3): two values side by side
        raise IllegalFormula(after, "operator")
    if after != ")":
        raise IllegalFormula(after, "open")
    return value


def parse_formula(text):
    """Evaluate one side or a whole equation, exactly.

    text: at most MAX_FORMULA characters of `1+2*(3-4)` or `1+2*(3-4)=5`.
    Returns (value, numbers, right): value of the left side as a Fraction, the numbers used on the
    left in order of appearance, and the number right of "=" (None if there is no "=").
    Raises IllegalFormula for all that the grammar does not have, chat models' habits included:
    a times sign in LaTeX, `24=3*8`, a full stop at the end.
    """
    text = text.translate(_SAME_SIGN)
    if len(text) > MAX_FORMULA:
        raise IllegalFormula(text[0], "length")
    tokens, numbers, right = _cut(text), [], None
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


# ------------------------------------------------------------------------------------------------
# 3. The verdict on a hand of cards
# ------------------------------------------------------------------------------------------------

# The paper's table (appendix A.3). The released code adds penalties up (one answer can cost -8);
# here, as in the paper's text, an answer has ONE kind. Two rewards are on top of the kind:
# "out of tries" for the last failed try of an episode, "misread cards" for pictures only.
GP_REWARDS = {
    "correct": 5.0,         # a legal equation that equals the target: the episode ends
    "wrong value": -1.0,    # legal, each card once, but another value
    "wrong numbers": -2.0,  # legal arithmetic on numbers that are not exactly the hand's
    "illegal": -3.0,        # not an equation at all
    "out of tries": -1.0,   # added to the last failed try
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
    """What the verifier found. `kind` is a key of GP_REWARDS, `reward` excludes "out of tries"."""

    kind: str
    reward: float
    message: str                # one clause, without the frame that the environment puts around it
    value: Fraction | None      # what the formula evaluates to; None if illegal
    cards_right: bool           # the `cards` field equals the hand (order is free)
    numbers_right: bool         # the `number` field equals the hand's values under the stated rule

    @property
    def correct(self):
        """True if this answer ends the episode with success."""
        return self.kind == "correct"


def compare(used, numbers):
    """How the numbers of a formula differ from those of the hand: (foreign, overused, missing).

    Three sorted lists without repeats: used but not in the hand; in the hand, but used too often;
    in the hand, but used too seldom.

    >>> compare([8, 8, 8, 24], [8, 3, 8, 3])
    ([24], [8], [3])
    """
    use, have = Counter(used), Counter(numbers)
    foreign = sorted(n for n in use if n not in have)
    overused = sorted(n for n in have if use[n] > have[n])
    missing = sorted(n for n in have if use[n] < have[n])
    return foreign, overused, missing


def _judge_formula(formulas, answer_length, numbers, target):
    """(kind, message, value) of the formula fields found in an answer."""
    say = GP_MESSAGES
    if answer_length > MAX_ANSWER:
        return "illegal", say["too long"], None
    if len(formulas) != 1:      # several guesses in one answer would be tries that nobody counts
        return "illegal", say["two formulas" if formulas else "no formula"], None
    try:
        value, used, right = parse_formula(formulas[0])
    except IllegalFormula as error:
        why = ILLEGAL_WHY[error.why]
        return "illegal", say["illegal"].format(token=error.token, why=why), None
    parts = []
    for name, wrong in zip(("foreign", "overused", "missing"), compare(used, numbers)):
        if wrong:
            parts.append(say[name].format(numbers=" and ".join(map(str, wrong[:4]))))
    if parts:
        return "wrong numbers", "; ".join(parts), value
    if value != target:
        return "wrong value", say["wrong value"].format(value=value, target=target), value
    if right is not None and right != target:
        return "wrong value", say["wrong side"].format(target=target), value
    return "correct", say["correct"], value


def verify_gp(text, cards, numbers, target=24, picture=False):
    """Judge one answer to a GeneralPoints hand (paper appendix A.3).

    text: the model's whole answer. cards: the four card names, e.g. ["A", "10", "K", "3"].
    numbers: what they count under the rule that was stated, e.g. [1, 10, 13, 3].
    picture: the cards had to be read off a picture, so misreading them costs a further -1.5.
    Returns a Verdict; raises nothing, whatever `text` is.

        formula for cards 2 3 J 5, J = 11       kind            reward
        (11-3)*(5-2)=24                         correct         +5
        11+5+3+2=24                             wrong value     -1
        (5-3)*(10+2)=24  (J taken for 10)       wrong numbers   -2
        11++5                                   illegal         -3
    """
    fields = read_answer(text[:MAX_ANSWER])
    cards_right = Counter(c.upper() for c in fields["cards"]) == Counter(cards)
    numbers_right = Counter(fields["number"]) == Counter(str(n) for n in numbers)
    kind, message, value = _judge_formula(fields["formula"], len(text), numbers, target)
    reward = GP_REWARDS[kind]
    if picture and not cards_right:
        # A right formula over a misread hand stays "correct" and ends the episode at 5 - 1.5: the
        # paper's episode ends with the equation, and its -1.5 is paid in addition, not instead.
        reward += GP_REWARDS["misread cards"]
        misread = GP_MESSAGES["misread"]
        message = misread if kind == "correct" else f"{misread}; {message}"
    return Verdict(kind, reward, message, value, cards_right, numbers_right)


# ------------------------------------------------------------------------------------------------
# 4. A walk: the action, and what an answer claims to see
# ------------------------------------------------------------------------------------------------

# "forward", "stop()"; or "turn_direction(slightly left)", whose word is group 2
_ACTION = re.compile(r"(forward|stop) ?(?:\( ?\))?|turn_direction ?\(([^()]*)\)")
# " is on your left" of "Mill Bank is on your left"
_SIDE = re.compile(
    r" (?:is|are) (?:on|to|at|in) (?:your|the) (front|ahead|right|back|behind|left)\b")
# "intersection" of "you are at an intersection", and what makes a clause deny it
_CROSSING = re.compile(r"\b(?:intersection|crossing|crossroads)\b")
_NOT = re.compile(r"\b(?:no|not|never|without|neither|nor)\b|n't\b")
# "you see the" of "you see the Mill Bank"
_OPENING = re.compile(r"^(?:(?:you see|there is|there are|the|destination|a|an)(?:\s+|$))+")


def read_action(text, words):
    """The action that a text names, as the action space writes it, or None.

    words: the direction words that are legal under the rule in force. Capitals, quotes, spaces and
    hyphens are forgiven; anything before or after the one action is not.

    >>> read_action("Turn_Direction('north-west')", ["north", "northwest"])
    'turn_direction(northwest)'
    >>> read_action("turn_direction(left)", ["north", "northwest"]) is None
    True
    """
    if len(text) > MAX_ACTION:
        return None
    match = _ACTION.fullmatch(" ".join(re.sub("[\"'`]", "", text.lower()).split()))
    if match is None:
        return None
    if match.group(1):
        return match.group(1) + "()"
    bare = {re.sub(r"[\s'_-]", "", word): word for word in words}     # 3 o'clock -> 3oclock
    word = bare.get(re.sub(r"[\s_-]", "", match.group(2)))
    return None if word is None else f"turn_direction({word})"


def read_claims(observation):
    """What an observation says is there: (intersection?, {landmark: side}), all in lower case.

    The same reading is applied to the claim and to the truth, so a word-for-word copy of the truth
    is right by construction, whatever strange name a real place has.

    >>> read_claims("Mill Bank is on your left; you are at an intersection")
    (True, {'mill bank': 'left'})
    >>> read_claims("no landmark in sight, and I am not at an intersection.")
    (False, {})
    """
    crossing, places = False, {}
    flat = " ".join(observation[:MAX_ANSWER].lower().split())
    for clause in re.split(r"[;,.]| and | but ", flat):
        side = _SIDE.search(clause)
        if side:
            name = _OPENING.sub("", clause[:side.start()].strip())
            places[name] = {"ahead": "front", "behind": "back"}.get(side.group(1), side.group(1))
            clause = clause[side.end():]    # what is left of it: a "Crossing Cafe" is no crossing
        if _CROSSING.search(clause) and not _NOT.search(clause):
            crossing = True
    return crossing, places


# ------------------------------------------------------------------------------------------------
# 5. The verdict on a walk
# ------------------------------------------------------------------------------------------------

# The paper's table (appendix B.3). One answer has ONE kind, and the +1 is for the action alone, as
# in the paper: the reward then counts the same thing as its metric, per-step accuracy. What an
# answer claims to see decides only how a wrong action is paid, and is reported for every answer.
VIRL_REWARDS = {
    "correct": 1.0,         # the expert's action at this position
    "wrong action": -1.0,   # another action, the surroundings read right
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
    """What the verifier found on a walk. `kind` is a key of VIRL_REWARDS."""

    kind: str
    reward: float               # excludes "out of tries"
    message: str                # one clause, without the frame that the environment puts around it
    action: str | None          # the action as the action space writes it; None if it is not legal
    landmarks_right: bool       # the claimed landmarks and their sides are those that are there
    intersection_right: bool    # an intersection is claimed exactly where there is one

    @property
    def correct(self):
        """True if the answer names the expert's action: the walk goes on to the next position."""
        return self.kind == "correct"


def _misreadings(crossing, places, crossing_there, there):
    """Keys of VIRL_MESSAGES: how the claims of an answer differ from what is there."""
    found = []
    if crossing and not crossing_there:
        found.append("false intersection")
    if crossing_there and not crossing:
        found.append("missed intersection")
    if places.keys() - there.keys():
        found.append("false landmark")
    if there.keys() - places.keys():
        found.append("missed landmark")
    if any(places[name] != there[name] for name in places.keys() & there.keys()):
        found.append("wrong side")
    return found


def verify_virl(text, action, observation, words):
    """Judge one answer at one position of a walk (paper appendix B.3).

    text: the model's whole answer. action: the expert's action, e.g. "turn_direction(north)".
    observation: what is there, in the words of the walk. words: the legal direction words.
    Returns a WalkVerdict; raises nothing, whatever `text` is.

        expert turn_direction(north), at Mill Bank, at an intersection    kind            reward
        turn_direction(north), whatever it claims to see                  correct         +1
        forward(), sees Mill Bank and the intersection                    wrong action    -1
        forward(), sees no intersection                                   misread         -1.5
        turn_direction(left) where only compass words are legal           as a wrong action
        says nothing, or names two actions                                no action       -1
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
        if named == action:
            kind, parts = "correct", ["correct"]
        else:
            parts = _misreadings(crossing, places, crossing_there, there)
            kind = "misread" if parts else "wrong action"
            parts.append("wrong action" if named else "unknown action")
    message = "; ".join(VIRL_MESSAGES[part] for part in parts)
    return WalkVerdict(kind, VIRL_REWARDS[kind], message, named, places == there,
                       crossing == crossing_there)
