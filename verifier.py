"""The verifier: text in, verdict out. The only source of reward in this project.

Paper: arXiv 2501.17161, section 3 (the verifier VER maps an answer to a reward and a message),
appendix A.3 (the GeneralPoints reward table) and B.3 (that of V-IRL). Nothing here knows a model, a
tensor or a file. First half GeneralPoints, second half V-IRL.

How an answer to a hand of cards is judged (`verify_gp`):
  1. find the fields `cards`, `number`, `formula`: strict JSON first, then the looser forms that
     language models write (single quotes, no quotes, trailing commas, words around the object)
  2. cut the formula into tokens: numbers, + - * / ( ) =
  3. recursive descent over the grammar below gives an exact fraction and the numbers used
  4. compare: are the numbers the hand's, is the value the target
  5. say in one English clause what was wrong: it is the next turn of the conversation

    equation :=  expression [ "=" number ]
    expression := term   { ("+" | "-") term }
    term       := factor { ("*" | "/") factor }
    factor     := number | "(" expression ")"

How an answer on a walk is judged (`verify_virl`):
  1. find the fields `current observation` and `action`, as above
  2. the action is one of forward(), stop(), turn_direction(word), the word legal under the rule
  3. right action: correct. Wrong action: compare what the answer CLAIMS to see with what is there
  4. say which of the two was wrong

An answer is HOSTILE INPUT: the policy is paid for whatever this file believes. So the formula is
parsed and never handed to Python's eval; arithmetic is exact (8/(3-8/3) is 24 here, and 23.999...
in floating point); text length, bracket depth and digits are limited; and whatever an answer holds,
verify_gp and verify_virl return a verdict and raise nothing.

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

# What the verifier says. Kept as templates because the small backbone's tokenizer gives every fixed
# piece of text a token of its own (gp_env.phrases), which keeps conversations short.
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
ILLEGAL_WHY = {
    "character": "only numbers and + - * / ( ) = are allowed",
    "number": "a number or ( should stand here",
    "operator": "an operator should stand here",
    "open": "a bracket is not closed",
    "close": "no bracket is open",
    "digits": "the number is too long",
    "length": "the formula is too long",
    "depth": "too many brackets",
    "zero": "division by zero",
    "end": "the formula should end here",
}

MAX_ANSWER = 2000   # characters of a whole answer that are looked at
MAX_FORMULA = 200   # characters of a formula; the longest honest one has about 25
MAX_DEPTH = 20      # nested brackets; four numbers never need more than 3
MAX_DIGITS = 4      # digits of one number

# Signs that people and models type for the same operation. Other characters are never "repaired".
_SAME_SIGN = str.maketrans("×·∗⋅÷∕⁄−–＋＝", "****///--+=")
_TOKEN = re.compile(r"\s*([0-9]+|[^\s])")
_FIELD = re.compile(r"""["']?\b(cards|number|numbers|formula)\b["']?\s*:""", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z0-9]+")


class IllegalFormula(ValueError):
    """The formula breaks the grammar. `token` is where, `why` a key of ILLEGAL_WHY."""

    def __init__(self, token, why):
        # A token is echoed back to the model inside the next user turn, so it must not carry chat
        # markup such as <|end|>: a token is a number or ONE character, and plain ASCII at that.
        self.token = "".join(c for c in token[:8] if c.isascii() and c.isprintable()) or "?"
        self.why = why
        super().__init__(GP_MESSAGES["illegal"].format(token=self.token, why=ILLEGAL_WHY[why]))


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


def parse_formula(text):
    """Evaluate one side or a whole equation, exactly.

    text: at most MAX_FORMULA characters of `1+2*(3-4)` or `1+2*(3-4)=5`.
    Returns (value, numbers, right): value of the left side as a Fraction, the numbers used on the
    left in order of appearance, and the number right of "=" (None if there is no "=").
    Raises IllegalFormula. Never recurses deeper than MAX_DEPTH.
    """
    text = text.translate(_SAME_SIGN)
    if len(text) > MAX_FORMULA:
        raise IllegalFormula(text[0], "length")
    tokens = [m.group(1) for m in _TOKEN.finditer(text)]
    for token in tokens:
        if not (token in "+-*/()=" or token.isascii() and token.isdigit()):
            raise IllegalFormula(token, "character")
        if len(token) > MAX_DIGITS:
            raise IllegalFormula(token, "digits")
        if len(token) > 1 and token[0] == "0":        # 013: Python and people disagree on those
            raise IllegalFormula(token, "character")
    tokens.append("end")
    numbers = []
    position = 0

    def peek():
        """The next token, left where it is."""
        return tokens[position]

    def take():
        """The next token, and step over it."""
        nonlocal position
        position += 1
        return tokens[position - 1]

    def expression(depth):
        """expression := term { ("+" | "-") term }. Returns its value, exactly."""
        value = term(depth)
        while peek() in ("+", "-"):
            value = value + term(depth) if take() == "+" else value - term(depth)
        return value

    def term(depth):
        """term := factor { ("*" | "/") factor }"""
        value = factor(depth)
        while peek() in ("*", "/"):
            if take() == "*":
                value = value * factor(depth)
            else:
                divisor = factor(depth)
                if divisor == 0:
                    raise IllegalFormula("/", "zero")
                value = value / divisor
        return value

    def factor(depth):
        """factor := number | "(" expression ")". Notes each number that is used."""
        token = take()
        if token.isdigit():
            numbers.append(int(token))
            return Fraction(int(token))
        if token != "(":                              # also refuses a leading minus: -(1-2)*24
            raise IllegalFormula(token, "number")
        if depth == MAX_DEPTH:
            raise IllegalFormula("(", "depth")
        value = expression(depth + 1)
        if take() != ")":
            bad = tokens[position - 1]
            raise IllegalFormula(bad, "operator" if bad.isdigit() or bad == "(" else "open")
        return value

    value = expression(0)
    left, right = list(numbers), None
    if peek() == "=":
        take()
        if not peek().isdigit():
            raise IllegalFormula(peek(), "number")
        right = int(take())
    if peek() != "end":
        why = "end" if right is not None else "close" if peek() == ")" else "operator"
        raise IllegalFormula(peek(), why)
    return value, left, right


def read_answer(text):
    """Find the three fields of an answer.

    Returns a dict with at most the keys "cards" (list of str), "number" (list of str) and
    "formula" (list of str: every formula field found, so that the caller can refuse a second one).
    Linear in len(text); never raises.
    """
    found = {"formula": []}
    try:    # as (key, value) pairs: a dict would hide the first of two "formula" fields
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        pairs = None
    if isinstance(pairs, list) and all(isinstance(p, tuple) for p in pairs):
        for key, value in pairs:
            key = key.lower()                         # the looser reading ignores case, too
            if key == "formula":
                found["formula"].append(value if isinstance(value, str) else "")
            elif key in ("cards", "number", "numbers") and isinstance(value, list):
                found["cards" if key == "cards" else "number"] = [
                    str(v) for v in value if isinstance(v, (str, int))]
        if found["formula"]:
            return found
        found = {"formula": []}         # no formula at the top level: read it loosely
    keys = list(_FIELD.finditer(text))
    for key, following in zip(keys, keys[1:] + [None]):
        body = text[key.end():following.start() if following else len(text)]
        name = key.group(1).lower()
        if name == "formula":
            body = body.lstrip()
            if body[:1] in ("'", '"'):
                body = body[1:].split(body[0], 1)[0]
            found["formula"].append(re.split(r"[\n},]", body, maxsplit=1)[0])
        else:
            inside = body.split("]", 1)[0]
            found["cards" if name == "cards" else "number"] = _WORD.findall(inside)
    return found


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
    cards_right = Counter(c.upper() for c in fields.get("cards", [])) == Counter(cards)
    numbers_right = Counter(fields.get("number", [])) == Counter(str(n) for n in numbers)
    kind, message, value = _judge_formula(fields["formula"], len(text), numbers, target)
    reward = GP_REWARDS[kind]
    if picture and not cards_right:
        reward += GP_REWARDS["misread cards"]
        message = GP_MESSAGES["misread"] if kind == "correct" else (
            GP_MESSAGES["misread"] + "; " + message)
    return Verdict(kind, reward, message, value, cards_right, numbers_right)


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
        return "illegal", str(error), None
    have, use = Counter(numbers), Counter(used)
    wrong = {"foreign": [n for n in use if n not in have],
             "overused": [n for n in use if n in have and use[n] > have[n]],
             "missing": [n for n in have if use[n] < have[n]]}
    parts = [say[name].format(numbers=" and ".join(map(str, sorted(ns)[:4])))
             for name, ns in wrong.items() if ns]
    if parts:
        return "wrong numbers", "; ".join(parts), value
    if value != target:
        return "wrong value", say["wrong value"].format(value=value, target=target), value
    if right is not None and right != target:
        return "wrong value", say["wrong side"].format(target=target), value
    return "correct", say["correct"], value


# ------------------------------------------------------------------------------------------------
# V-IRL
# ------------------------------------------------------------------------------------------------

# The paper's table (appendix B.3). One answer has ONE kind, and the +1 is for the action alone, as
# in the paper: the reward then counts the same thing as its metric, per-step accuracy. What an
# answer claims to see decides only how a wrong action is paid, and is reported for every answer.
VIRL_REWARDS = {
    "correct": 1.0,         # the expert's action at this position
    "wrong action": -1.0,   # another action, the surroundings read right; or no action, or several
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

MAX_ACTION = 60     # characters of an action; the longest honest one has 32

_WALK_FIELD = re.compile(
    r"""["']?\b(current observation|current instruction|action)\b["']?\s*:""", re.IGNORECASE)
_ACTION = re.compile(r"(forward|stop) ?(?:\( ?\))?|turn_direction ?\(([^()]*)\)")
_SIDE = re.compile(
    r" (?:is|are) (?:on|to|at|in) (?:your|the) (front|ahead|right|back|behind|left)\b")
_CROSSING = re.compile(r"\b(?:intersection|crossing|crossroads)\b")
_NOT = re.compile(r"\b(?:no|not|never|without|neither|nor)\b|n't\b")
_OPENING = re.compile(r"^(?:(?:you see|there is|there are|the|destination|a|an)\s+)+")


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


def read_walk(text):
    """Find the fields of an answer on a walk.

    Returns {"action": [...], "current observation": [...], "current instruction": [...]}, each a
    list of every value found, so that the caller can refuse a second one. Linear in len(text);
    never raises.

    >>> read_walk("action: forward() }")["action"]
    ['forward()']
    """
    found = {"action": [], "current observation": [], "current instruction": []}
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        pairs = None
    if isinstance(pairs, list) and all(isinstance(p, tuple) for p in pairs):
        for key, value in pairs:
            if key.lower() in found:
                found[key.lower()].append(value if isinstance(value, str) else "")
        if found["action"]:
            return found
        found = {key: [] for key in found}      # not where it should be: read loosely
    keys = list(_WALK_FIELD.finditer(text))
    for key, following in zip(keys, keys[1:] + [None]):
        body = text[key.end():following.start() if following else len(text)].lstrip()
        if body[:1] in ("'", '"'):      # up to the quote that closes: Joe's Cafe has one inside
            end = re.search(body[0] + r"\s*(?:[,}\n]|$)", body[1:])
            body = body[1:end.start() + 1] if end else body[1:]
        else:
            body = re.split(r"[\n}]", body, maxsplit=1)[0]
        found[key.group(1).lower()].append(body.strip(" \t\r,;"))
    return found


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
    return word and f"turn_direction({word})"


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
        side, rest = _SIDE.search(clause), clause
        if side:
            name = _OPENING.sub("", clause[:side.start()].strip() + " ").strip()
            places[name] = {"ahead": "front", "behind": "back"}.get(side.group(1), side.group(1))
            rest = clause[side.end():]      # a "Crossing Cafe" is no crossing
        crossing |= bool(_CROSSING.search(rest)) and not _NOT.search(rest)
    return crossing, places


def verify_virl(text, action, observation, words):
    """Judge one answer at one position of a walk (paper appendix B.3).

    text: the model's whole answer. action: the expert's action, e.g. "turn_direction(north)".
    observation: what is there, in the words of virl_env.py. words: the legal direction words.
    Returns a WalkVerdict; raises nothing, whatever `text` is.

        expert turn_direction(north), at Mill Bank, at an intersection    kind            reward
        turn_direction(north), whatever it claims to see                  correct         +1
        forward(), sees Mill Bank and the intersection                    wrong action    -1
        forward(), sees no intersection                                   misread         -1.5
        turn_direction(left) where only compass words are legal           as a wrong action
    """
    say = VIRL_MESSAGES
    if len(text) > MAX_ANSWER:
        return _walk_verdict("wrong action", say["too long"])
    fields = read_walk(text)
    claim = " ".join(fields["current observation"])
    (crossing, places), (crossing_there, there) = read_claims(claim), read_claims(observation)
    seen = {"landmarks_right": places == there, "intersection_right": crossing == crossing_there}
    if len(fields["action"]) != 1:  # several guesses in one answer would be tries nobody counts
        key = "two actions" if fields["action"] else "no action"
        return _walk_verdict("wrong action", say[key], **seen)
    named = read_action(fields["action"][0], words)
    if named == action:
        return _walk_verdict("correct", say["correct"], named, **seen)
    wrong = {"false intersection": crossing and not crossing_there,
             "missed intersection": crossing_there and not crossing,
             "false landmark": places.keys() - there.keys(),
             "missed landmark": there.keys() - places.keys(),
             "wrong side": any(places[name] != there[name] for name in places.keys() & there)}
    parts = [say[name] for name, is_so in wrong.items() if is_so]
    kind = "misread" if parts else "wrong action"
    parts.append(say["wrong action" if named else "unknown action"])
    return _walk_verdict(kind, "; ".join(parts), named, **seen)


def _walk_verdict(kind, message, action=None, landmarks_right=False, intersection_right=False):
    return WalkVerdict(kind, VIRL_REWARDS[kind], message, action, landmarks_right,
                       intersection_right)
