"""What the small backbone of walks has learnt from: directions of all kinds, told and seen.

A large model has read and seen all kinds of directions before anybody trains it for a task. The
small backbone gets the same start from this corpus: walks through cities that the task never
enters, told in other words, with four vocabularies of turns, and answered in other notations.
Whole answers, but never in the notation that the verifier reads. So the backbone can walk, and
earns nothing before SFT has taught it the form.

  1. other words: templates, and the two vocabularies that only this corpus speaks
  2. the corpus in words
  3. a lesson before it: say lines of the prompt again
  4. lessons with pictures: what the eyes learn to see on, and the corpus seen instead of read
  5. phrases: the fixed pieces of all these texts, each ONE token of the backbone's tokenizer

Conversations are lists of turns as in virl_env.expert_conversation. Every function draws from the
generator that it is given, and from nothing else.

    python -m backbones.build virl          makes the backbone anew

Read before: virl_env.py.
"""

import string
from dataclasses import dataclass

import virl_env
from cities.generate import PLACE_KINDS, SIGHT, WORDS, build_city
from verifier import VIRL_MESSAGES, verify_virl
from virl_env import (ARRIVE, CROSSING, NOTHING, NOW, ON, PAST, PICTURE, PROMPT, RETRY, RULES,
                      SIDES, TURN, VIEW, bend, lay_rail, look_around, message, open_atlas,
                      split_routes, turn_words, write_answer)

# ------------------------------------------------------------------------------------------------
# 1. Other words. They are many, so that "use the words that are listed" is the only habit that
# pays. The first of each list is the task's own.
# ------------------------------------------------------------------------------------------------

CLOCK = tuple(f"{hour} o'clock" for hour in range(1, 13))
ARROWS = ("↑", "↗", "→", "↘", "↓", "↙", "←", "↖")
VOCABULARIES = virl_env.VOCABULARIES | {"clock": CLOCK, "arrows": ARROWS}

PROMPTS = (
    PROMPT,
    "Your walk so far:{walk}\nThese steps lead to the goal:\n{steps}{view}"
    "Which one is next, and what do you do? {space}\n{ask}",
    "Guide a walker. Moves: {space}\n{view}Plan:\n{steps}Log:{walk}\nReply: {ask}",
)
OTHER_TURNS = (
    "{n}. Turn {relative} ({clock}, {arrows}), to face {compass}.\n",
    "{n}. Go {arrows} and face {compass}: turn {relative}, at {clock}.\n",
    "{n}. At {clock} turn {relative} {arrows} until you look {compass}.\n",
)
ONS = (     # on the way, and to the end
    (ON, ARRIVE),
    ("{n}. Walk to the next crossing. {landmarks}.\n", "{n}. Walk to the goal. {landmarks}.\n"),
    ("{n}. Straight on until: {landmarks}.\n", "{n}. Straight on, to the goal: {landmarks}.\n"),
)
SPACES = ("{go} goes on, {turn} turns to face x, {stop} ends the walk; x is one of: {words}",
          "{stop}, or {go}, or {turn} with x from {words}",
          "use {turn} ({words}), {go} and {stop} only")
MOVES = ("forward()", "turn_direction({x})", "stop()")
OTHER_MOVES = (MOVES, MOVES, ("walk()", "face({x})", "end()"), ("go", "turn {x}", "halt"),
               ("ahead", "look {x}", "here"))
HISTORIES = ((PAST, NOW), ("\n{k} | {seen} -> {action}", "\n{k} | {seen} ->"),     # past, present
             ("\nsaw {seen}, did {action}", "\nsee {seen}"))

# Notations: (what the prompt asks for, the answer). {o}, {i} and {a} are the names of the three
# fields. They are drawn anew for each conversation from KEYS, and the verifier's "action" is not
# among them: it accepts none of these answers.
KEYS = (("seen", "view", "around"), ("line", "rule", "part"), ("move", "next", "do"))
ASK = ('One JSON object: {{"{o}": "what you see now", "{i}": "the step you are at", '
       '"{a}": "one of the actions"}}')
ANSWER = '{{"{o}": "{seen}", "{i}": "{step}", "{a}": "{action}"}}'
NOTATIONS = (
    (ASK, ANSWER), (ASK, ANSWER), (ASK, ANSWER),
    (ASK + " Begin with {a}.", '{{"{a}": "{action}", "{o}": "{seen}", "{i}": "{step}"}}'),
    ("Two lines, {o} and {a}.", "{o}: {seen}\n{a}: {action}"),
    ("Tags {o}, {i}, {a}.", "<{o}>{seen}</{o}><{i}>{step}</{i}><{a}>{action}</{a}>"),
    ("Say it in words.", "I see this: {seen}. I am at {step} So I {action}"),
    ("Only {a}.", "{a} = {action}"),
    ("{i}, an arrow, {a}.", "{step} => {action}"),
)


def pick(rng, options):
    """One of them, each as likely."""
    return options[rng.integers(len(options))]


def all_words(route, heading, leg):
    """{vocabulary: word} of the turn into a leg: the two of the task, and two more.

    A turn of 90 degrees to the right is 3 o'clock, and →.
    """
    degrees = bend(heading, route.headings[leg])
    return turn_words(route, heading, leg) | {"clock": CLOCK[round(degrees / 30) % 12 - 1],
                                              "arrows": ARROWS[round(degrees / 45) % 8]}


def tell_steps(route, heading, turn, on, arrive):
    """virl_env.write_steps in other templates."""
    steps = []
    for leg, target in enumerate(route.headings):
        go = on if leg + 1 < len(route.headings) else arrive
        steps.append(turn.format(n=2 * leg + 1, **all_words(route, heading, leg)))
        steps.append(go.format(n=2 * leg + 2, landmarks=route.landmarks[leg + 1]))
        heading = target
    return steps


def tell_action(route, position, vocabulary, moves=MOVES):
    """virl_env.right_action in other words. moves: how to go on, to turn to {x}, to stop."""
    go, turn, stop = moves
    if position.kind == "forward":
        return go
    if position.kind == "stop":
        return stop
    return turn.format(x=all_words(route, position.heading, position.leg)[vocabulary])


# ------------------------------------------------------------------------------------------------
# 2. The corpus in words
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wording:
    """How one conversation talks."""

    vocabulary: str
    turn: str               # templates of the steps
    on: str
    arrive: str
    moves: tuple            # how to go on, to turn to {x}, to stop
    past: str               # templates of the walk so far
    now: str
    space: str              # the sentence on legal actions
    ask: str                # the notation that is asked for ...
    notation: str           # ... and its template
    keys: dict              # {o}, {i}, {a}: names of the fields

    def answer(self, seen, step, action):
        """An answer in the notation of this conversation."""
        return self.notation.format(seen=seen, step=step.strip(), action=action, **self.keys)

    def prompt(self, template, steps, past, seen, pictured):
        """virl_env.write_prompt in these words. seen: what is told of the present."""
        go, turn, stop = self.moves
        space = self.space.format(go=go, turn=turn.format(x="x"), stop=stop,
                                  words=", ".join(VOCABULARIES[self.vocabulary]))
        walk = [self.past.format(k=k, seen=s, action=a) for k, (s, a) in enumerate(past, 1)]
        walk.append(self.now.format(k=len(past) + 1, seen=seen))
        return template.format(steps="".join(steps), view=VIEW if pictured else "", space=space,
                               walk="".join(walk), ask=self.ask.format(**self.keys))


def draw_wording(rng):
    """A Wording.

    In three of ten cases the steps are worded as in the task. They name the compass word and the
    relative word only, so the legal words must be one of these two vocabularies.
    """
    as_in_task = rng.random() < 0.3
    vocabulary = pick(rng, sorted(RULES.values()) if as_in_task else sorted(VOCABULARIES))
    turn = TURN if as_in_task else pick(rng, OTHER_TURNS)
    (on, arrive), moves, (past, now) = pick(rng, ONS), pick(rng, OTHER_MOVES), pick(rng, HISTORIES)
    space, (ask, notation) = pick(rng, SPACES), pick(rng, NOTATIONS)
    keys = {field: pick(rng, names) for field, names in zip("oia", KEYS)}
    return Wording(vocabulary, turn, on, arrive, moves, past, now, space, ask, notation, keys)


def backbone_conversations(rng, count, cities=8):
    """`count` conversations of the backbone's corpus: broad, correct, and never in the task's form.

    Positions of walks through `cities` wild cities. Vocabulary, wording, moves, notation and keys
    are drawn for each conversation; crossings and ends are as frequent as the long way between. A
    quarter revise: they open with a wrong try (learn=False: nobody should learn mistakes) and the
    verifier's message.

    The prompt is learnt, too, as all text is when a language model is pretrained: the walk
    so far holds ten times as many observations and actions to predict as the answer. One prompt in
    five says "see the picture" though there is none; what is to be seen has to be inferred from the
    steps.
    """
    return [walking_conversation(rng, open_atlas(f"wild-{rng.integers(cities)}"))
            for _ in range(count)]


def walking_conversation(rng, atlas, picture=None, routes=None):
    """One conversation of the corpus, at a position of a walk.

    picture: (width, height) in pixels, or None for text. routes: only the first so many.
    """
    route, heading = pick(rng, atlas.routes[:routes]), int(rng.integers(360))
    rail = lay_rail(route, heading, rng)
    at = int(rng.integers(len(rail)))
    if rng.random() < 0.5:
        at = pick(rng, [i for i, position in enumerate(rail) if position.kind != "forward"])
    here, wording = rail[at], draw_wording(rng)
    steps = tell_steps(route, heading, wording.turn, wording.on, wording.arrive)
    did = [tell_action(route, position, wording.vocabulary, wording.moves) for position in rail]
    past = [(position.observation, action) for position, action in zip(rail[:at], did)]

    image, seen = None, here.observation
    if picture is not None:
        image = look_around(atlas, here.panorama, here.heading, picture)
    pictured = picture is not None or rng.random() < 0.2
    # Half of the pictures have to tell by themselves whether this is an intersection.
    announced = picture is None or rng.random() < 0.5
    if pictured:
        seen = PICTURE + (CROSSING if announced and seen.endswith(CROSSING) else "")
    prompt = wording.prompt(pick(rng, PROMPTS), steps, past, seen, pictured)
    talk = [message("user", prompt, learn=image is None, image=image)]
    if rng.random() < 0.25:
        talk += wrong_try(rng, route, rail, here, wording, steps[here.step])
    answer = wording.answer(here.observation, steps[here.step], did[at])
    return talk + [message("assistant", answer, learn=True)]


def wrong_try(rng, route, rail, here, wording, step):
    """A wrong answer at a position and the verifier's message, or nothing if it was right.

    The action is drawn; sometimes the observation is what is seen elsewhere. The verifier judges
    the same answer in the task's notation.
    """
    seen = pick(rng, rail).observation if rng.random() < 0.3 else here.observation
    which, words = int(rng.integers(3)), VOCABULARIES[wording.vocabulary]
    word = pick(rng, words)
    verdict = verify_virl(write_answer(seen, "", MOVES[which].format(x=word)),
                          tell_action(route, here, wording.vocabulary), here.observation, words)
    if verdict.correct:
        return []
    answer = wording.answer(seen, step, wording.moves[which].format(x=word))
    return [message("assistant", answer),
            message("user", RETRY.format(message=verdict.message))]


# ------------------------------------------------------------------------------------------------
# 3. A lesson before the corpus
# ------------------------------------------------------------------------------------------------


def recall_conversations(rng, count, cities=8):
    """The steps of a walk, and up to six of them again, in any order: `count` conversations.

    Which line has this number, and what does it say? The whole task leans on that skill. Apart it
    is learnt in 300 batches of 32; inside the corpus not in 900.
    """
    made = []
    for _ in range(count):
        routes = open_atlas(f"wild-{rng.integers(cities)}").routes
        on, arrive = pick(rng, ONS)
        turn = pick(rng, (TURN, *OTHER_TURNS))
        steps = tell_steps(pick(rng, routes), int(rng.integers(360)), turn, on, arrive)
        again = [steps[i] for i in rng.permutation(len(steps))[:6]]
        made.append([message("user", "".join(steps)),
                     message("assistant", "".join(again), learn=True)])
    return made


# ------------------------------------------------------------------------------------------------
# 4. Lessons with pictures
# ------------------------------------------------------------------------------------------------

# What the eyes are asked of each view: (question, number of answers, weight of its loss). The
# nearest place in sight, its kind or none; is this an intersection?
EYE_QUESTIONS = (("place", len(PLACE_KINDS) + 1, 1.0), ("intersection", 2, 0.5))
EYE_COLUMNS = False     # a picture is four views, not four columns as with cards
# A panorama takes 0.1 s to draw, and few from many cities show more than many from few.
EYE_CITIES = 24         # wild cities that eyes learn on
EYE_ROUTES = 15         # routes of each


def glimpse(rng, where, numbers, picture):
    """A picture from a walk, and the truth about it.

    where: a generated city. numbers: of its routes. Three pictures in ten turn to any heading, as
    a walker does at the start. Returns (image, {side: kind of place or None}, at a crossing).
    """
    atlas, city = open_atlas(where), build_city(where)
    route = atlas.routes[pick(rng, numbers)]
    rail = lay_rail(route, int(rng.integers(360)), rng)
    here = pick(rng, rail)
    if rng.random() < 0.3:
        here = pick(rng, [position for position in rail if position.kind != "forward"])
    heading = int(rng.integers(360)) if rng.random() < 0.3 else here.heading
    spot = int(here.panorama.rsplit("-", 1)[1])
    kinds = {side: None for side, _ in SIDES}
    for _, bearing, place in reversed(city.in_sight(city.spots[spot], SIGHT)):
        side, _ = SIDES[round(bend(heading, bearing) / 90) % 4]
        kinds[side] = place.kind        # the nearest comes last, and stays
    crossing = spot < len(city.corners) and len(city.near[spot]) > 2
    return look_around(atlas, here.panorama, heading, picture), kinds, crossing


def eye_lesson(rng, count, picture):
    """What the eyes learn to see on: [(image, (place, crossing) of each of the four views)].

    The views as two tiles hold them: front, back, right, left. 0 is no place, 1 the first kind.
    """
    made = []
    for _ in range(count):
        image, kinds, crossing = glimpse(rng, f"wild-{rng.integers(EYE_CITIES)}",
                                         range(EYE_ROUTES), picture)
        made.append((image, [(0 if kinds[side] is None else kinds[side] + 1, int(crossing))
                             for side in ("front", "back", "right", "left")]))
    return made


def name_views(image, kinds, crossing):
    """A conversation about what the four views show, and the words of its answer that tell."""
    words = [NOTHING if kind is None else f" {PLACE_KINDS[kind]}" for kind in kinds.values()]
    said = ", ".join(f"{side} {word.strip()}" for side, word in zip(kinds, words))
    if crossing:
        said += CROSSING
    words.append(CROSSING if crossing else "<|end|>")
    return [message("user", f"{VIEW}Name them.", image=image),
            message("assistant", said, learn=True)], words


def pictured_conversations(rng, count, picture):
    """The backbone's corpus, seen instead of read: `count` conversations with a picture each.

    A third name what the four views show; the others walk, as in `backbone_conversations`.
    """
    made = []
    for _ in range(count):
        where = f"wild-{rng.integers(EYE_CITIES)}"
        if rng.random() < 1 / 3:
            talk, _ = name_views(*glimpse(rng, where, range(EYE_ROUTES), picture))
        else:
            talk = walking_conversation(rng, open_atlas(where), picture, EYE_ROUTES)
        made.append(talk)
    return made


def reading_conversation(rng, where, picture):
    """To measure how a backbone sees: (conversation about the views on a walk of val, its words).

    where: a generated city. The words: for each view a kind of place or NOTHING, then CROSSING or
    the end.
    """
    return name_views(*glimpse(rng, where, split_routes(len(open_atlas(where)), "val"), picture))


# ------------------------------------------------------------------------------------------------
# 5. Phrases
# ------------------------------------------------------------------------------------------------


def phrases():
    """The fixed pieces of all texts above, for the small backbone's tokenizer, sorted.

    Of a template, what stands between its slots. Numbers of two digits come last.
    """
    templates = [VIEW, NOTHING, CROSSING, PICTURE, RETRY, TURN, *PROMPTS, *OTHER_TURNS, *SPACES,
                 "current observation", "current instruction", "action", *VIRL_MESSAGES.values(),
                 "The destination ", " is on your ", "; ", ", ", *WORDS,
                 *(f" {kind}" for kind in PLACE_KINDS), *(side for side, _ in SIDES)]
    for group in (*ONS, *OTHER_MOVES, *HISTORIES, *KEYS, *NOTATIONS, *VOCABULARIES.values()):
        templates += group
    pieces = set()
    for template in templates:
        piece = ""
        for literal, slot, *_ in string.Formatter().parse(template):
            piece += literal
            if slot is not None:
                pieces.add(piece)
                piece = ""
        pieces.add(piece)
    return sorted(p for p in pieces if len(p) > 1 or p in ARROWS) + [str(n) for n in range(10, 50)]
