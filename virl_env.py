"""V-IRL: follow written steps through a city, one action at a time, in words or in street view.

Paper: arXiv 2501.17161, section 4.2 and appendix B. The knob that the whole project turns:

    rule "absolute"  turn_direction(north), ... 8 compass words     training, in-distribution (ID)
    rule "relative"  turn_direction(left), ... 4 words              never trained on: the rule OOD
    another city     other streets, names, houses, signs, light     the visual OOD

Each step names BOTH words ("turn left, to face northwest"), and the prompt lists the legal ones. A
model that READS the list transfers; one that has memorised "copy the compass word" fails.

How it works; the same numbers stand over the parts of this file:
  1. read routes in the format of the paper's released data, and check every one
  2. lay the rail: start, points along the way (each kept with probability 1/2), crossings, end
  3. for street view: crop a panorama to front, right / back, left
  4. write the prompt: steps, legal actions, all that was seen and done, what is seen now
  5. step(answer) asks verifier.py; a wrong action is never carried out, the message comes back;
     a right one moves on along the rail, and a FRESH conversation begins there; the walk ends at
     stop() (terminated) or when a position has used up its `tries` (truncated)
  6. grow cities from seeds, ten of them, and write them in that same format: no download needed,
     and both kinds of data pass through the same lines
  7. draw the street views of those cities
  8. text to train on: expert answers for SFT, a broad corpus for the small backbone

Symbols: north is 0 degrees, east 90. N points of a route after its start, S streets, W x H pixels.
Positions in a generated city are (x, y) in metres, x to the east and y to the north.

    python virl_env.py                            walk in the terminal, verifier messages included
    python virl_env.py --rule relative --city Brim --seed 3
    python virl_env.py --picture runs/look        a map and the street views of the walk as PNG
    python virl_env.py --write runs/alder         the city as files, in the released format
    python virl_env.py --routes nyc_1k_routes     the paper's data, after you have downloaded it

On a first reading take parts 2, 4 and 5. The others supply routes and pictures; nothing about
learning is in them.

Read before: verifier.py, gp_env.py. Read next: sft.py.
"""

import argparse
import colorsys
import functools
import io
import json
import math
import pathlib
import pickle
import re
import string
import sys
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from verifier import VIRL_MESSAGES, VIRL_REWARDS, verify_virl

TRIES = 2               # answers at one position (the paper's verify_iter)
POINTS_BETWEEN = 5      # a leg is cut in five; its points are positions of the rail ...
DROP = 0.5              # ... that are left out with this probability, anew at each reset
NEAR_END = 8.0          # metres; points as near as this to an end of their leg are left out
SHORT_LEG = 5.0         # metres; legs up to this length get no points
REACH = 20.0            # metres from a coordinate to the panorama that may stand for it

# ------------------------------------------------------------------------------------------------
# Words. As in gp_env.py, every fixed piece is ONE token of the small backbone (see `phrases`).
# ------------------------------------------------------------------------------------------------

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
RELATIVE = ("left", "right", "slightly left", "slightly right")
CLOCK = tuple(f"{hour} o'clock" for hour in range(1, 13))
ARROWS = ("↑", "↗", "→", "↘", "↓", "↙", "←", "↖")
VOCABULARIES = {"compass": COMPASS, "relative": RELATIVE, "clock": CLOCK, "arrows": ARROWS}
RULES = {"absolute": "compass", "relative": "relative"}     # legal words of turn_direction(x)

PROMPT = ("[Task] You walk through a city by the steps below. Say what you see now, which step you "
          "are at, and what to do.\n"
          "[Steps]\n{steps}"
          "{view}[Actions] {space}\n"
          "[Walk so far]{walk}\n"
          "[Output] {ask}")
TURN = "{n}. Turn {relative}, to face {compass}.\n"
ON = "{n}. Go on to the next intersection: {landmarks}.\n"
ARRIVE = "{n}. Go on to the end of the walk: {landmarks}.\n"
VIEW = "[View] The picture has four views from where you stand: front, right / back, left.\n"
SPACE = "{go} goes on, {turn} turns to face x, {stop} ends the walk; x is one of: {words}"
MOVES = ("forward()", "turn_direction({x})", "stop()")
PAST = "\nO_{k}: {seen}\nA_{k}: {action}"
NOW = "\nO_{k}: {seen}\nA_{k}:"
NOTHING = "no landmark here"
CROSSING = "; you are at an intersection"
PICTURE = "see the picture"
KEYS = ("current observation", "current instruction", "action")     # the paper's three fields
ASK = ('One JSON object: {{"{o}": "what you see now", "{i}": "the step you are at", '
       '"{a}": "one of the actions"}}')
ANSWER = '{{"{o}": "{seen}", "{i}": "{step}", "{a}": "{action}"}}'
RETRY = "Not right: {message}. Try again."

# The backbone's corpus: the same walks told in other words, with four vocabularies of turns, so
# that "use the words that are listed" is the only habit that pays ...
OTHER_PROMPTS = (
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
OTHER_ONS = (
    (ON, ARRIVE),
    ("{n}. Walk to the next crossing. {landmarks}.\n", "{n}. Walk to the goal. {landmarks}.\n"),
    ("{n}. Straight on until: {landmarks}.\n", "{n}. Straight on, to the goal: {landmarks}.\n"),
)
OTHER_SPACES = (SPACE, "{stop}, or {go}, or {turn} with x from {words}",
                "use {turn} ({words}), {go} and {stop} only")
OTHER_MOVES = (MOVES, MOVES, ("walk()", "face({x})", "end()"), ("go", "turn {x}", "halt"),
               ("ahead", "look {x}", "here"))
OTHER_HISTORIES = ((PAST, NOW), ("\n{k} | {seen} -> {action}", "\n{k} | {seen} ->"),
                   ("\nsaw {seen}, did {action}", "\nsee {seen}"))
# ... answered in other notations: (what the prompt asks for, the answer). NONE is accepted by the
# verifier, whose key is "action". The keys are drawn anew for each field of each conversation.
OTHER_KEYS = (("seen", "view", "around"), ("line", "rule", "part"), ("move", "next", "do"))
OTHER_NOTATIONS = (
    (ASK, ANSWER), (ASK, ANSWER), (ASK, ANSWER),
    (ASK + " Begin with {a}.", '{{"{a}": "{action}", "{o}": "{seen}", "{i}": "{step}"}}'),
    ("Two lines, {o} and {a}.", "{o}: {seen}\n{a}: {action}"),
    ("Tags {o}, {i}, {a}.", "<{o}>{seen}</{o}><{i}>{step}</{i}><{a}>{action}</{a}>"),
    ("Say it in words.", "I see this: {seen}. I am at {step} So I {action}"),
    ("Only {a}.", "{a} = {action}"),
    ("{i}, an arrow, {a}.", "{step} => {action}"),
)


class RouteProblem(ValueError):
    """Data that cannot be used. Its one line of text names the file, and the route where known."""

    def __init__(self, file, what, route=None):
        self.file, self.what = file, what
        where = file if route is None else f"{file}, route {route}"
        super().__init__(" ".join(f"{where}: {what}".split()))


# ------------------------------------------------------------------------------------------------
# Directions
# ------------------------------------------------------------------------------------------------


def compass_word(heading):
    """The nearest of the eight compass words. heading: degrees.

    >>> compass_word(298), compass_word(359)
    ('northwest', 'north')
    """
    return COMPASS[round(heading / 45) % 8]


def bend(heading, target):
    """Degrees to turn from heading to target, right is positive, in [-180, 180).

    >>> bend(350, 10), bend(10, 350)
    (20, -20)
    """
    return (target - heading + 180) % 360 - 180


def relative_word(heading, target, paper_bearings=False):
    """How to turn from one heading to another, in the four words of the relative rule.

    Up to 45 degrees is slight. paper_bearings: the released code's arithmetic, which does not wrap
    at 360 degrees; it names a wrong side for a quarter of all pairs of headings.

    >>> relative_word(350, 10), relative_word(350, 10, paper_bearings=True)
    ('slightly right', 'left')
    """
    degrees = target - heading if paper_bearings else bend(heading, target)
    side = "right" if degrees > 0 else "left"
    return side if abs(degrees) > 45 else "slightly " + side


def all_words(heading, target, paper_bearings=False):
    """{vocabulary: word} for one turn: the two of the paper, and two more for the backbone.

    >>> all_words(350, 80)
    {'compass': 'east', 'relative': 'right', 'clock': "3 o'clock", 'arrows': '→'}
    """
    degrees = bend(heading, target)
    return {"compass": compass_word(target),
            "relative": relative_word(heading, target, paper_bearings),
            "clock": CLOCK[round(degrees / 30) % 12 - 1], "arrows": ARROWS[round(degrees / 45) % 8]}


# ------------------------------------------------------------------------------------------------
# 1. Routes in the released format. `load` is a function from a file's name to its bytes: a folder's
# (`folder_files`) or a generated city's (`city_files`). The rest of the file knows only that.
#
#   route_infos.json              [[route, ...], int]
#   gps_pano_mapping.pkl          {(latitude, longitude): panorama id}
#   street_views/ID.jpg           panorama of 360 x 180 degrees
#   street_views/ID.metadata.json {"rotation": degrees}: the column of heading h is (h + rotation)
#
# Of a route we use: start_place.relocated_geocode, init_heading (0: random at each reset),
# route_results.geocode_list (the N points after the start; the last is the destination), and
# milestone_info, one text with N blocks: block i has the heading from point i to point i+1 and the
# landmarks at point i+1.
# ------------------------------------------------------------------------------------------------

INFOS, MAPPING = "route_infos.json", "gps_pano_mapping.pkl"


@dataclass(frozen=True)
class Route:
    """One checked route. Lists of points have N + 1 entries, the start first."""

    index: int
    init_heading: int       # degrees; 0 means random at each reset
    points: tuple           # (latitude, longitude)
    panoramas: tuple        # panorama id of each point
    headings: tuple         # (N,) degrees from point i to point i + 1
    words: tuple            # (N,) the compass word that the data gives for it
    landmarks: tuple        # what is to be seen at each point; NOTHING at the start
    between: tuple          # (N,) panorama ids of the points that the rail may visit on each leg
    places: tuple           # (name, coordinates) of the landmarks, for the map only


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, tuples, floats and strings. A pickle that names a class or function is refused:
    unpickling would import and CALL it, which is how a data file runs code on your machine."""

    def find_class(self, module, name):
        """Refuse."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")


def folder_files(folder):
    """The `load` function of a folder: load(name, limit) gives the first `limit` bytes or all.

    It raises RouteProblem for a file that cannot be read.
    """
    def load(name, limit=-1):
        """The bytes of a file of the folder, `limit` at most."""
        try:
            with open(pathlib.Path(folder) / name, "rb") as stream:
                return stream.read(limit)
        except OSError as error:
            raise RouteProblem(f"{folder}/{name}", error.strerror or "cannot be read") from None
    return load


def _load_mapping(load, where):
    """{(latitude, longitude): panorama id} -> coordinates (P, 2) from south to north, and P ids."""
    file = f"{where}/{MAPPING}"
    try:
        mapping = _PlainUnpickler(io.BytesIO(load(MAPPING))).load()
    except RouteProblem:
        raise
    except Exception as error:      # a damaged pickle can raise nearly anything
        raise RouteProblem(file, f"refused: {error}") from None
    if not isinstance(mapping, dict) or not mapping:
        raise RouteProblem(file, "not a dict of coordinates and panorama ids")
    for key, value in mapping.items():
        if not (isinstance(key, tuple) and [type(part) for part in key] == [float, float]
                and all(map(math.isfinite, key)) and isinstance(value, str)):
            raise RouteProblem(file, "a key is not two floats, or its value not a text")
        # The id becomes part of a file's name: it must not lead out of the folder.
        if not re.fullmatch(r"[\w:=-][\w.:=-]{0,99}", value):
            raise RouteProblem(file, f"{value[:60]!r} is not a panorama id")
    keys = sorted(mapping)
    return np.array(keys), [mapping[key] for key in keys]


def metres(a, b):
    """Distance of coordinates (latitude, longitude). a: two floats; b: (..., 2) -> (...).

    The city is flat: one degree of latitude is 111,320 m, of longitude cos(latitude) as much.
    """
    north, east = np.moveaxis(np.asarray(b, dtype=np.float64) - np.asarray(a), -1, 0)
    return 111_320 * np.hypot(north, east * math.cos(math.radians(a[0])))


def parse_milestones(text):
    """The blocks of a route's `milestone_info` as a list of dicts of texts.

    >>> parse_milestones('{\\n"landmarks": "Mill: Bank is on your left",\\n"distance": "9",\\n}\\n')
    [{'landmarks': 'Mill: Bank is on your left', 'distance': '9'}]
    """
    blocks = []
    for part in text.split("}"):
        lines = [line.partition(":") for line in part.split("\n") if ":" in line]
        if lines:
            blocks.append({key.strip(' \t{"'): value.strip(' \t\r",')
                           for key, _, value in lines})
    return blocks


class Atlas:
    """All routes of one place, read and checked.

    load: function from file name to bytes. where: what to call it in messages. pictures: check
    that every panorama a rail can visit is there (text tasks do not need them).
    Raises RouteProblem.
    """

    def __init__(self, load, where, pictures=False):
        self.load, self.where = load, where
        self.coordinates, self.ids = _load_mapping(load, where)
        self._exact = {tuple(c): i for i, c in enumerate(self.coordinates.tolist())}
        try:
            infos = json.loads(load(INFOS))
        except (ValueError, RecursionError) as error:
            if isinstance(error, RouteProblem):
                raise
            raise RouteProblem(f"{where}/{INFOS}", f"not valid JSON ({error})") from None
        if not (isinstance(infos, list) and infos and isinstance(infos[0], list) and infos[0]):
            raise RouteProblem(f"{where}/{INFOS}", "it must be [[route, ...], number]")
        self.routes = [self._read(i, raw) for i, raw in enumerate(infos[0])]
        # each panorama that a rail can visit: a route that does
        self.visited = {name: route.index for route in reversed(self.routes)
                        for name in route.panoramas + sum(route.between, ())}
        self.panorama = functools.lru_cache(maxsize=32)(self._panorama)
        if pictures:        # now, rather than in the middle of a night of training
            for name in self.visited:
                self._street_view(name, 2)

    def __len__(self):
        return len(self.routes)

    def route(self, index):
        """Route number `index`. Raises RouteProblem if there is none."""
        if not 0 <= index < len(self.routes):
            raise RouteProblem(f"{self.where}/{INFOS}",
                               f"out of range, there are routes 0 to {len(self) - 1}", index)
        return self.routes[index]

    def _read(self, index, raw):
        """Check one route of the JSON file and snap it to panoramas. Returns a Route."""
        def problem(what):
            """A RouteProblem that names this route."""
            return RouteProblem(f"{self.where}/{INFOS}", what, index)

        try:
            results = raw["route_results"]
            points = [raw["start_place"]["relocated_geocode"], *results["geocode_list"]]
            points = [(float(latitude), float(longitude)) for latitude, longitude in points]
            text, heading = raw["milestone_info"], int(raw.get("init_heading", 0))
            places = [place for place in [*results.get("landmark_list", []), raw.get("dest_place")]
                      if place and "geocode" in place]
            places = tuple((str(place.get("name")), tuple(map(float, place["geocode"])))
                           for place in places)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            kind = "missing field" if isinstance(error, KeyError) else "wrong type:"
            raise problem(f"{kind} {error}") from None
        known = points + [geocode for _, geocode in places]
        if not all(len(point) == 2 and all(abs(x) <= 360 for x in point) for point in known):
            raise problem("a coordinate is not two finite numbers of degrees")
        if len(points) < 2:
            raise problem("geocode_list is empty")
        blocks = parse_milestones(text) if isinstance(text, str) else []
        if not blocks or not all(block.get("landmarks", "?") for block in blocks):
            raise problem("milestone_info, or the landmarks in it, are empty")
        if any("\ud800" <= letter <= "\udfff" for letter in text):   # half of a pair: not text
            raise problem("milestone_info holds a character that no text can")
        if len(blocks) != len(points) - 1:
            raise problem(f"milestone_info has {len(blocks)} blocks for {len(points) - 1} points")
        headings, words, landmarks = [], [], [NOTHING]
        for block in blocks:
            given = block.get("to_next_intersection_heading", "")
            match = re.fullmatch(r"(-?\d{1,4})(?:\.\d+)? *\((\w+)\)", given)
            if not match:
                raise problem(f"cannot read the heading {given[:40]!r}, expected '298 (northwest)'")
            if match.group(2) not in COMPASS:
                raise problem(f"unknown heading word {match.group(2)[:40]!r}")
            headings.append(int(match.group(1)) % 360)
            words.append(match.group(2))
            seen = " ".join(block.get("landmarks", "no landmark").split()).rstrip(".")
            seen = seen.replace('"', "'").replace("\\", "/")    # so that answers stay JSON
            landmarks.append(NOTHING if seen.lower().startswith("no landmark") else seen)
        spots = [self._nearest(point) for point in points]
        if None in spots:
            point = points[spots.index(None)]
            raise problem(f"no panorama within {REACH:.0f} m of {point} in {MAPPING}")
        points = [tuple(self.coordinates[i].tolist()) for i in spots]
        return Route(index, heading % 360, tuple(points), tuple(self.ids[i] for i in spots),
                     tuple(headings), tuple(words), tuple(landmarks),
                     tuple(map(self._between, points, points[1:])), places)

    def _nearest(self, point):
        """Index of the panorama at a coordinate: the exact key, else the nearest within REACH."""
        if point in self._exact:
            return self._exact[point]
        # only those in a strip of latitudes can be that near, and they stand side by side
        strip = np.array([-REACH, REACH]) / 111_320 + point[0]
        first, last = np.searchsorted(self.coordinates[:, 0], strip)
        away = metres(point, self.coordinates[first:last])
        best = int(away.argmin()) if len(away) else 0
        return int(first) + best if len(away) and away[best] < REACH else None

    def _between(self, start, end):
        """Panorama ids on a leg, before any is dropped: the rail as the released code lays it."""
        found = {}      # a dict keeps order: the same spot twice would be no step forward
        for i in range(1, POINTS_BETWEEN + 1) if metres(start, end) > SHORT_LEG else ():
            share = i / POINTS_BETWEEN
            at = self._nearest(tuple(a + (b - a) * share for a, b in zip(start, end)))
            if at is not None and min(metres(start, self.coordinates[at]),
                                      metres(end, self.coordinates[at])) > NEAR_END:
                found[self.ids[at]] = True
        return tuple(found)

    def _street_view(self, name, limit=-1):
        """(the first `limit` bytes of the picture, or all; rotation) of a panorama."""
        file = f"street_views/{name}.metadata.json"
        try:
            rotation = json.loads(self.load(file))["rotation"]
            if isinstance(rotation, bool) or not abs(rotation) < 1e6:
                raise ValueError
            return self.load(f"street_views/{name}.jpg", limit), float(rotation)
        except RouteProblem as error:
            raise RouteProblem(error.file, error.what, self.visited.get(name)) from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise RouteProblem(f"{self.where}/{file}", "it gives no rotation",
                               self.visited.get(name)) from None

    def _panorama(self, name):
        """(pixels (H, W, 3) uint8, rotation in degrees) of a panorama. Raises RouteProblem.

        `panorama`, made above, is this with a memory of the last 32.
        """
        data, rotation = self._street_view(name)
        try:
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), rotation
        except Exception as error:      # a damaged picture, too, can raise nearly anything
            raise RouteProblem(f"{self.where}/street_views/{name}.jpg", f"not a picture ({error})",
                               self.visited.get(name)) from None


@functools.lru_cache(maxsize=64)
def open_atlas(where, pictures=False):
    """The Atlas of a generated city (its name), or of a folder in the released format (its path).

    Raises RouteProblem.
    """
    if look_of(where):
        # nothing can be missing, so that -l and -vl share one
        return open_atlas(where) if pictures else Atlas(city_files(where), where)
    if not pathlib.Path(where).is_dir():
        raise RouteProblem(where, f"neither a folder nor a city ({', '.join(CITIES)}, wild-N)")
    return Atlas(folder_files(where), str(where), pictures)


@functools.lru_cache(maxsize=64)
def split_routes(count, split):
    """Numbers of the routes in a split: 70 % train, 10 % val, 20 % test, by a fixed seed.

    "all" is the paper's setting: no route is held out. What is held out are routes, not streets: a
    test route goes along streets that training knows, in an order that it does not. Streets that
    nobody has seen are those of the other cities. Raises RouteProblem if a split would be empty.
    """
    order = np.random.default_rng(24).permutation(count).tolist()
    test, val = count // 5, count // 10
    found = {"test": order[:test], "val": order[test:test + val], "train": order[test + val:],
             "all": range(count)}[split]
    if not found:
        raise RouteProblem(INFOS, f"{count} routes are too few to hold some out: use 10 or more "
                                  "(virl_env.py: or --split all; evaluate.py: or --splits all)")
    return sorted(found)


# ------------------------------------------------------------------------------------------------
# 2. The rail: the positions that an episode visits
# ------------------------------------------------------------------------------------------------

# The paper's three types of action; turns are split into the first of a walk and the later ones.
KINDS = ("first turn", "later turn", "forward", "stop")


@dataclass(frozen=True)
class Position:
    """A place on the rail, what is to be seen there, and what is to be done."""

    kind: str               # one of KINDS
    panorama: str
    heading: int            # where the walker faces on arrival
    observation: str        # what is there, in words
    step: int               # which of the 2 N written steps is to be followed, from 0
    leg: int                # for turns: which of the N headings is next


def lay_rail(route, heading, rng, drop=DROP):
    """The positions of one walk, from the first turn to stop(). heading: at the start, degrees.

    A route of N = 2 points after the start; points along the way in brackets:

        start    ( p  p )    crossing    ( p )    destination
        turn      forward      turn     forward      stop
        step 0    step 1      step 2    step 3      step 3
    """
    rail = [Position("first turn", route.panoramas[0], heading, route.landmarks[0], 0, 0)]
    for leg, heading in enumerate(route.headings):
        kept = rng.random(len(route.between[leg])) >= drop
        rail += [Position("forward", name, heading, NOTHING, 2 * leg + 1, leg)
                 for name, keep in zip(route.between[leg], kept) if keep]
        last = leg + 1 == len(route.headings)
        # As in the released code the intersection is announced at every point, the last included.
        rail.append(Position("stop" if last else "later turn", route.panoramas[leg + 1], heading,
                             route.landmarks[leg + 1] + CROSSING,
                             2 * leg + (1 if last else 2), leg + 1))
    return rail


def write_steps(route, heading, paper_bearings=False, turn=TURN, on=ON, arrive=ARRIVE):
    """The 2 N written steps of a route, each with its line end, for a walker facing `heading`."""
    steps = []
    for leg, target in enumerate(route.headings):
        words = all_words(heading, target, paper_bearings) | {"compass": route.words[leg]}
        go = arrive if leg + 1 == len(route.headings) else on
        steps.append(turn.format(n=2 * leg + 1, **words))
        steps.append(go.format(n=2 * leg + 2, landmarks=route.landmarks[leg + 1]))
        heading = target
    return steps


def write_space(vocabulary, template=SPACE, moves=MOVES):
    """The sentence that lists the legal actions. vocabulary: a key of VOCABULARIES."""
    return template.format(go=moves[0], turn=moves[1].format(x="x"), stop=moves[2],
                           words=", ".join(VOCABULARIES[vocabulary]))


def right_action(route, position, vocabulary, paper_bearings=False, moves=MOVES):
    """The expert's action. vocabulary: a key of VOCABULARIES; moves: how actions are written."""
    if position.kind == "forward":
        return moves[0]
    if position.kind == "stop":
        return moves[2]
    words = all_words(position.heading, route.headings[position.leg], paper_bearings)
    return moves[1].format(x=(words | {"compass": route.words[position.leg]})[vocabulary])


# ------------------------------------------------------------------------------------------------
# 3. Views
# ------------------------------------------------------------------------------------------------

SIDES = (("front", 0), ("right", 90), ("back", 180), ("left", 270))     # reading order, 2 x 2


@functools.lru_cache(maxsize=16)
def _view_rays(width, height, fov):
    """Direction of each pixel of a view: (bearing to the middle, elevation), (h, w) degrees each.

    The picture plane stands at distance f in front of the eye, f = (width / 2) / tan(fov / 2).
    """
    focal = width / 2 / math.tan(math.radians(fov) / 2)
    x = (np.arange(width) + 0.5 - width / 2)[None, :] / focal
    y = (height / 2 - np.arange(height) - 0.5)[:, None] / focal
    return np.degrees(np.arctan(x)) + 0 * y, np.degrees(np.arctan2(y, np.hypot(1, x)))


def view(pixels, rotation, heading, width, height, fov=90):
    """What a walker sees who faces `heading`: a perspective crop of a panorama.

    pixels (H, W, 3) uint8, 360 x 180 degrees; rotation as in the metadata. width, height: of the
    view, with square pixels; fov: horizontal field of view, degrees.
    Returns (height, width, 3) uint8. Rays are averaged where the panorama is finer than the view.
    """
    finer = max(1, min(4, round(pixels.shape[1] * fov / 360 / width)))
    bearing, elevation = _view_rays(width * finer, height * finer, fov)
    # invariant: the middle of the view is the panorama's column (heading + rotation) / 360 * W
    column = (bearing + heading + rotation) / 360 * pixels.shape[1] - 0.5
    row = np.clip((0.5 - elevation / 180) * pixels.shape[0] - 0.5, 0, pixels.shape[0] - 1)
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    right, down = (column - left)[..., None], (row - top)[..., None]
    below = np.minimum(top + 1, pixels.shape[0] - 1)
    columns = [left % pixels.shape[1], (left + 1) % pixels.shape[1]]        # the panorama is a ring
    upper, lower = ((1 - right) * pixels[r, columns[0]] + right * pixels[r, columns[1]]
                    for r in (top, below))
    fine = (1 - down) * upper + down * lower
    coarse = fine.reshape(height, finer, width, finer, 3).mean(axis=(1, 3))
    return np.round(coarse).astype(np.uint8)


def four_views(pixels, rotation, heading, size):
    """The picture of V-IRL-VL: front, right / back, left. size: (width, height), both even.

    Returns a PIL image. The paper's is about 2400 x 2400; the small backbone sees 128 x 64.
    """
    width, height = size[0] // 2, size[1] // 2
    front, right, back, left = (view(pixels, rotation, heading + turn, width, height)
                                for _, turn in SIDES)
    return Image.fromarray(np.vstack([np.hstack([front, right]), np.hstack([back, left])]))


@functools.lru_cache(maxsize=16384)
def _known_views(atlas, name, heading, size):
    return four_views(*atlas.panorama(name), heading, size)


def look_around(atlas, name, heading, size):
    """`four_views` of a panorama of an Atlas; small ones are kept, walks come by them often."""
    seen = _known_views if size[0] * size[1] <= 2 ** 14 else _known_views.__wrapped__
    return seen(atlas, name, heading, size)


# ------------------------------------------------------------------------------------------------
# 4 and 5. Prompt, expert, environment
# ------------------------------------------------------------------------------------------------


def write_prompt(steps, space, past, position, picture, template=PROMPT, ask=ASK, keys=KEYS,
                 history=(PAST, NOW), announce=True):
    """The first user turn at a position.

    steps: from write_steps. space: the sentence on legal actions. past: [(observation, action)] of
    the positions before; as in the paper it tells what really was there and what the expert did.
    picture: the present is to be seen in a picture, so it is not told; the intersection is, as in
    the paper, unless `announce` is False.
    """
    seen = position.observation
    if picture:
        seen = PICTURE + (CROSSING if announce and seen.endswith(CROSSING) else "")
    walk = [history[0].format(k=k, seen=s, action=a) for k, (s, a) in enumerate(past, 1)]
    walk.append(history[1].format(k=len(past) + 1, seen=seen))
    return template.format(steps="".join(steps), view=VIEW if picture else "", space=space,
                           walk="".join(walk), ask=ask.format(**dict(zip("oia", keys))))


def write_answer(seen, step, action, template=ANSWER, keys=KEYS):
    """An answer in some notation; by default the one the verifier reads, and SFT teaches."""
    return template.format(seen=seen, step=step, action=action, **dict(zip("oia", keys)))


class Navigation:
    """One walk at a time, with the calls of a Gymnasium environment (and without the dependency).

    >>> env = Navigation("Alder")
    >>> observation, info = env.reset(seed=0)
    >>> observation, reward, terminated, truncated, info = env.step(env.expert_answer())
    >>> reward, observation["new_conversation"], info["kind"]
    (1.0, True, 'first turn')

    where: a generated city, a folder in the released format, or an Atlas. rule: a key of RULES.
    split: "train", "val", "test" or "all". picture: (width, height) of the 2 x 2 picture, or None
    for text. go_on: what follows the last failed try at a position. False, as in the paper: the
    walk ends. (Its first position is always a turn: a model that fails at turns is measured on
    nothing else.) True: the expert's action is taken and the walk goes on to its destination.
    scoring_rule: the `fake` probe, as in gp_env.py: the prompt states `rule`, this one is scored.
    announce: with pictures, tell when the walker stands at an intersection, as the paper does; many
    walks can then be made with closed eyes, for all else is written in the steps.
    Raises RouteProblem for data that cannot be used.

    An observation is a dict: "text", the next user turn; "image", a PIL image or None;
    "new_conversation", True if everything said before is to be forgotten.
    """

    def __init__(self, where="Alder", rule="absolute", split="train", picture=None, tries=TRIES,
                 go_on=False, scoring_rule=None, paper_bearings=False, drop=DROP, announce=True):
        self.atlas = where if isinstance(where, Atlas) else open_atlas(where, picture is not None)
        self.vocabulary, self.scored = RULES[rule], RULES[scoring_rule or rule]
        self.picture, self.tries, self.go_on = picture, tries, go_on
        self.paper_bearings, self.drop, self.announce = paper_bearings, drop, announce
        self.numbers = split_routes(len(self.atlas), split)
        self.rail = None

    def reset(self, seed, route=None, position=0):
        """Start walk number `seed` (an int or a list of ints). Returns (observation, info).

        The seed draws the route (unless `route` gives its number), the heading, and the rail.
        position: start there, with the expert's walk so far in the prompt; a float in [0, 1) is a
        share of the rail.
        """
        rng = np.random.default_rng(seed)
        drawn = self.numbers[rng.integers(len(self.numbers))]
        self.route = self.atlas.route(drawn if route is None else route)
        heading = self.route.init_heading or int(rng.integers(360))
        self.rail = lay_rail(self.route, heading, rng, self.drop)
        self.steps = write_steps(self.route, heading, self.paper_bearings)
        self.at, self.used, self.missed, self.past = 0, 0, 0, []
        if isinstance(position, float):
            position = int(position * len(self.rail))
        while self.at < position:
            self._move_on()
        return self._arrive(), self._info()

    @property
    def position(self):
        """Where the walker stands."""
        return self.rail[self.at]

    def expert_action(self, vocabulary=None):
        """The action to take at this position, under the stated rule or in another vocabulary."""
        return right_action(self.route, self.position, vocabulary or self.vocabulary,
                            self.paper_bearings)

    def expert_answer(self):
        """The whole answer that SFT teaches for this position."""
        return write_answer(self.position.observation, self.steps[self.position.step].strip(),
                            self.expert_action())

    def step(self, text):
        """Judge one answer. Returns (observation, reward, terminated, truncated, info).

        terminated: stop() was done right (or, with go_on, the walk is over). truncated: the tries
        at this position are used up; the walk could have gone on, but not for this agent.
        info describes the position that was judged: "kind", "try" (from 1), "correct", "verdict",
        "route", "position" (from 0), "success" (no position was missed up to here, this included).
        """
        if self.rail is None:
            raise RuntimeError("call reset() before step()")
        verdict = verify_virl(text, self.expert_action(self.scored), self.position.observation,
                              VOCABULARIES[self.scored])
        self.used += 1
        info = self._info(verdict)
        failed = not verdict.correct and self.used >= self.tries
        reward = verdict.reward + (VIRL_REWARDS["out of tries"] if failed else 0.0)
        self.missed += failed
        info["success"] = not self.missed
        moves_on = verdict.correct or failed and self.go_on
        terminated = moves_on and self.position.kind == "stop"
        truncated = failed and not self.go_on
        if terminated or truncated or not moves_on:
            text = verdict.message if terminated else RETRY.format(message=verdict.message)
            observation = {"text": text, "image": None, "new_conversation": False}
            return observation, reward, terminated, truncated, info
        self._move_on()
        return self._arrive(), reward, False, False, info

    def _move_on(self):
        self.past.append((self.position.observation, self.expert_action()))
        self.at, self.used = self.at + 1, 0

    def _info(self, verdict=None):
        return {"route": self.route.index, "position": self.at, "kind": self.position.kind,
                "try": self.used, "verdict": verdict, "correct": bool(verdict and verdict.correct),
                "success": not self.missed}

    def look(self, position):
        """The picture at a position of the rail, a PIL image; None for text."""
        return self.picture and look_around(self.atlas, position.panorama, position.heading,
                                            self.picture)

    def _arrive(self):
        text = write_prompt(self.steps, write_space(self.vocabulary), self.past, self.position,
                            bool(self.picture), announce=self.announce)
        return {"text": text, "image": self.look(self.position), "new_conversation": True}


# ------------------------------------------------------------------------------------------------
# 6. Cities of our own. `city_files` is a `load` function like a folder's: the same reading code and
# the same episodes, whether or not the city was ever written to disk.
#
#   a. corners: points of a bent lattice, shifted at random
#   b. streets: the Gabriel graph (join two corners if no third lies in the circle between them):
#      planar, with three-, four- and five-way crossings; without streets that meet at < 42 degrees
#   c. places: named, of a dozen kinds, on the house fronts; four in ten belong to chains: the
#      same name stands at many corners
#   d. routes: walks over 2 to 8 corners that bend at each and end in sight of a place
# ------------------------------------------------------------------------------------------------

BLOCK, HALF_STREET, AROUND, STOREY, EYE = 78.0, 7.0, 9.0, 3.2, 2.2      # metres
EVERY, SIGHT = 10.0, 25.0   # metres between panoramas; metres up to which a place is a landmark
PLACE_KINDS = ("Bakery", "Bank", "Cafe", "Pharmacy", "School", "Museum", "Hotel", "Cinema",
               "Bookshop", "Station", "Market", "Clinic")
SIGNS = ("plate", "frame", "banner", "oval", "neon")
PLANS = ("grid", "bricks", "rings", "loose")
# sky above, sky at the horizon, light on houses, light on the ground, metres to half haze, share of
# windows that are lit
WEATHERS = {
    "sunny": ((70, 130, 205), (190, 215, 235), (1.0, 1.0, 0.95), (1.0, 1.0, 1.0), 400, 0.0),
    "overcast": ((150, 155, 162), (205, 207, 210), (0.8, 0.82, 0.86), (0.8, 0.8, 0.85), 220, 0.1),
    "fog": ((205, 208, 210), (222, 224, 225), (0.85, 0.87, 0.9), (0.9, 0.9, 0.9), 45, 0.2),
    "dusk": ((60, 50, 110), (240, 150, 95), (0.85, 0.62, 0.55), (0.6, 0.5, 0.55), 260, 0.5),
    "night": ((10, 12, 34), (44, 46, 78), (0.42, 0.44, 0.58), (0.5, 0.52, 0.64), 170, 0.6),
    "snow": ((190, 200, 214), (228, 233, 240), (0.9, 0.94, 1.0), (2.0, 2.05, 2.1), 150, 0.15),
    "dust": ((200, 160, 105), (228, 196, 146), (1.0, 0.84, 0.62), (1.15, 0.95, 0.7), 90, 0.0),
    "rain": ((88, 98, 110), (140, 150, 158), (0.62, 0.68, 0.74), (0.5, 0.55, 0.65), 110, 0.35),
}


@dataclass(frozen=True)
class Look:
    """What makes a city look like itself."""

    seed: int
    plan: str               # one of PLANS
    house: tuple            # hue, saturation and brightness of its houses, 0..1
    sign: str               # one of SIGNS
    weather: str            # a key of WEATHERS
    words: str              # first words of the names of its places
    routes: int = 120


CITIES = {      # the first is the training city, the others are the visual OOD test
    "Alder": Look(1, "grid", (0.06, 0.45, 0.72), "plate", "sunny",
                  "Heron Maple Copper Lantern Harbor Willow Falcon Juniper Granite Orchard", 1000),
    "Brim": Look(2, "bricks", (0.12, 0.55, 0.85), "oval", "dust",
                 "Saffron Camel Oasis Jasmine Palm Minaret Cumin Lotus Sandal Peacock"),
    "Calla": Look(3, "rings", (0.58, 0.18, 0.80), "frame", "snow",
                  "Fjord Birch Reindeer Amber Polar Aurora Spruce Walrus Glacier Icicle"),
    "Dorn": Look(4, "loose", (0.02, 0.60, 0.50), "banner", "rain",
                 "Thistle Raven Anchor Crown Foxglove Castle Abbey Badger Bishop Clover"),
    "Esker": Look(5, "grid", (0.33, 0.30, 0.60), "neon", "night",
                  "Dragon Jade Bamboo Silk Crane Pearl Tiger Ginger Phoenix Lychee"),
    "Fenn": Look(6, "bricks", (0.09, 0.10, 0.90), "frame", "fog",
                 "Gondola Fresco Olive Basil Duomo Lira Viola Marble Cypress Corso"),
    "Gale": Look(7, "rings", (0.92, 0.40, 0.78), "banner", "dusk",
                 "Tango Pampas Gaucho Malbec Condor Andes Bolero Cactus Puma Sierra"),
    "Hollis": Look(8, "loose", (0.50, 0.60, 0.80), "oval", "sunny",
                   "Koala Reef Wattle Banksia Possum Lagoon Surf Opal Boomer Coral"),
    "Istra": Look(9, "grid", (0.78, 0.45, 0.88), "plate", "overcast",
                  "Cable Redwood Prairie Gold Sunset Dolphin Vista Mesa Canyon Pacific"),
    "Juno": Look(10, "bricks", (0.20, 0.70, 0.85), "neon", "dust",
                 "Baobab Drum Cocoa Kola Savanna Zebra Marula Cassava Ebony Acacia"),
}
WORDS = tuple(word for look in CITIES.values() for word in look.words.split())


@functools.lru_cache(maxsize=None)
def look_of(name):
    """The Look of a city of CITIES, or of "wild-N", drawn from the number N; None for other names.

    Wild cities are what the small backbone has seen of the world: words of every city, any
    weather and any signs, but not the ten cities themselves.
    """
    match = re.fullmatch(r"wild-(\d{1,6})", str(name))
    if not match:
        return CITIES.get(name)
    rng = np.random.default_rng([9, int(match.group(1))])
    house = (float(rng.random()), float(rng.uniform(0.1, 0.7)), float(rng.uniform(0.5, 0.9)))
    plan, sign, weather = (options[rng.integers(len(options))]
                           for options in (PLANS, SIGNS, sorted(WEATHERS)))
    words = " ".join(rng.choice(WORDS, 24, replace=False).tolist())
    return Look(1000 + int(match.group(1)), plan, house, sign, weather, words, 300)


def _corners(plan, rng):
    """Where streets will meet, before they are laid: (C, 2) metres."""
    if plan == "loose":
        chosen = []
        for point in rng.uniform(-4.3 * BLOCK, 4.3 * BLOCK, size=(2000, 2)):
            if all(math.dist(point, other) > 0.72 * BLOCK for other in chosen):
                chosen.append(point)
        corners = np.array(chosen)
    elif plan == "rings":
        corners = np.array([(ring * BLOCK * math.sin(2 * math.pi * i / n),
                             ring * BLOCK * math.cos(2 * math.pi * i / n))
                            for ring in range(5) for n in [max(1, 6 * ring)] for i in range(n)])
    else:
        column, row = np.meshgrid(np.arange(9.0) - 4, np.arange(8.0) - 3.5)
        column += 0.5 * (row % 2 > 0.9) * (plan == "bricks")
        column, row = column + 0.35 * np.sin(row), row + 0.35 * np.sin(1.3 * column)
        corners = BLOCK * np.stack([column.ravel(), row.ravel()], axis=1)
    corners = corners + rng.normal(0, 0.12 * BLOCK, corners.shape)
    turn = rng.uniform(0, math.pi / 2)
    return corners @ [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]


def _streets(corners):
    """The Gabriel graph without its sharp angles. corners (C, 2) -> neighbours, a list of lists."""
    square = ((corners[:, None] - corners[None]) ** 2).sum(-1)          # (C, C)
    # c lies in the circle over the diameter ab  <=>  |ac|^2 + |bc|^2 < |ab|^2. The 1.35 makes the
    # circle a little larger: four corners of a square keep their sides and lose both diagonals.
    third = square[:, None, :] + square[None, :, :]                     # (a, b, c)
    ends = np.arange(len(corners))
    third[ends, :, ends] = third[:, ends, ends] = np.inf                # c is neither a nor b
    clear = (third >= 1.35 * square[:, :, None]).all(-1) & (square < (1.7 * BLOCK) ** 2)
    near = [[] for _ in corners]

    def sharp(here, there, other):
        """Would streets from `here` to the two others meet at less than 42 degrees?"""
        u, v = corners[there] - corners[here], corners[other] - corners[here]
        return u @ v > math.cos(math.radians(42)) * np.hypot(*u) * np.hypot(*v)

    pairs = [(int(a), int(b)) for a, b in np.argwhere(clear) if a < b]
    for a, b in sorted(pairs, key=lambda pair: square[pair]):           # short streets first
        if not any(sharp(here, there, other) for here, there in ((a, b), (b, a))
                   for other in near[here]):
            near[a].append(b)
            near[b].append(a)
    return near


@dataclass(frozen=True)
class Place:
    """A shop or the like, on a house front."""

    name: str
    kind: int               # index in PLACE_KINDS
    at: np.ndarray          # (2,) metres


class City:
    """Streets and places of a generated city: C corners, S streets, P panoramas; metres."""

    def __init__(self, look):
        rng = np.random.default_rng([6, look.seed])
        self.look, self.corners = look, _corners(look.plan, rng)
        self.near = _streets(self.corners)
        self.streets = np.array([(a, b) for a, bs in enumerate(self.near) for b in bs if a < b])
        self.start = self.corners[self.streets[:, 0]]                   # (S, 2)
        along = self.corners[self.streets[:, 1]] - self.start
        self.length = np.hypot(*along.T)                                # (S,)
        self.along = along / self.length[:, None]                       # (S, 2) unit vectors
        self.across = self.along[:, ::-1] * (1, -1)                     # to the right of `along`
        self.spots = np.concatenate([self.corners] + [                  # (P, 2) corners come first
            self.between(a, b)[1:-1] for a, b in self.streets])
        words, self.places = look.words.split(), []
        kinds = {word: int(rng.integers(len(PLACE_KINDS))) for word in words}
        for street, length in enumerate(self.length):
            for side in (-1, 1):
                at = AROUND + 2 + rng.uniform(0, 70)
                while at < length - AROUND - 2:
                    word = words[rng.integers(len(words))]
                    kind = int(rng.integers(len(PLACE_KINDS)))
                    if rng.random() < 0.4:      # a branch of this word's chain
                        kind = kinds[word]
                    self.places.append(Place(
                        f"{word} {PLACE_KINDS[kind]}", kind, self.start[street] + at *
                        self.along[street] + side * (HALF_STREET - 0.3) * self.across[street]))
                    at += rng.uniform(28, 190)

    def between(self, a, b):
        """Panoramas from corner a to corner b, both included, (n, 2) metres."""
        a, b = self.corners[a], self.corners[b]
        steps = max(1, round(math.dist(a, b) / EVERY))
        return a + (b - a) * np.linspace(0, 1, steps + 1)[:, None]

    def away(self, points):
        """Metres from points (..., 2) to the middle line of each street, (..., S)."""
        offset = points[..., None, :] - self.start
        along = np.clip((offset * self.along).sum(-1), 0, self.length)
        return np.hypot(*np.moveaxis(offset - along[..., None] * self.along, -1, 0))

    def cast(self, spot, bearings):
        """How far one can see along each bearing before a house front is in the way.

        spot (2,) metres, bearings (W,) radians. Open space is the union of the streets (bands of
        HALF_STREET to both sides) and of a disc AROUND each corner. A ray meets every band and disc
        in one interval; from the spot, go on as long as the next begins before the last ends:

            band 1   |-------------|
            disc               |-------|
            band 2                        |-------|      a front stands at the end of the disc

        Returns distance (W,) metres and what was hit there: owner (W,) int, a street or S + a
        corner, and front (W,) metres along it, negative on the left side of a street.
        """
        ray = np.stack([np.sin(bearings), np.cos(bearings)])            # (2, W)
        near = np.flatnonzero(self.away(spot) < 160)
        # bands: after t metres the ray is a + t da along the street and b + t db beside its middle;
        # it is inside while 0 <= a + t da <= length and |b + t db| <= HALF_STREET
        offset = spot - self.start[near]
        a, b = ((offset * to[near]).sum(1)[:, None] for to in (self.along, self.across))
        da, db = self.along[near] @ ray, self.across[near] @ ray        # (S, W)
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.stack([-a / da, (self.length[near, None] - a) / da])
            sides = np.stack([(-HALF_STREET - b) / db, (HALF_STREET - b) / db])
        # discs: |spot + t ray - corner|^2 = AROUND^2 has the roots t = middle -+ half
        discs = np.unique(self.streets[near])
        to = self.corners[discs] - spot                                 # (C, 2)
        middle = to @ ray                                               # (C, W)
        half = AROUND ** 2 - (to ** 2).sum(1)[:, None] + middle ** 2
        half = np.where(half > 0, np.sqrt(np.maximum(half, 0)), -np.inf)
        enter = np.concatenate([np.maximum(ends.min(0), sides.min(0)), middle - half])
        leave = np.concatenate([np.minimum(ends.max(0), sides.max(0)), middle + half])
        enter[~(enter < leave)] = np.inf    # never inside (and not a number: inside on a border)
        distance, owner = np.full(len(bearings), 0.5), np.zeros(len(bearings), dtype=int)
        column = np.arange(len(bearings))
        for rank in np.argsort(enter, axis=0):                          # nearest first; (W,) each
            further = (enter[rank, column] <= distance + 0.01) & (leave[rank, column] > distance)
            distance = np.where(further, leave[rank, column], distance)
            owner = np.where(further, rank, owner)
        owner = np.concatenate([near, len(self.streets) + discs])[owner]
        hit = spot + (ray * distance).T                                 # (W, 2)
        street = np.minimum(owner, len(self.streets) - 1)
        from_start = hit - self.start[street]
        along = (from_start * self.along[street]).sum(1) + 500
        side = np.sign((from_start * self.across[street]).sum(1))
        to_corner = hit - self.corners[np.maximum(owner - len(self.streets), 0)]
        around = np.arctan2(*to_corner.T) * AROUND + 900
        return distance, owner, np.where(owner < len(self.streets), along * side, around)

    def in_sight(self, spot, reach):
        """[(metres, bearing in degrees, place)] of the places that can be seen, nearest first."""
        offset = np.array([place.at for place in self.places]) - spot
        metres_to = np.hypot(*offset.T)
        near = np.flatnonzero(metres_to < reach)
        bearings = np.arctan2(*offset[near].T)
        clear = self.cast(spot, bearings)[0] > metres_to[near] - 1.5
        return sorted(((float(metres_to[i]), float(np.degrees(bearing)) % 360, self.places[i])
                       for i, bearing in zip(near[clear], bearings[clear])),
                      key=lambda seen: seen[0])


@functools.lru_cache(maxsize=32)
def build_city(name):
    """The City of a name that `look_of` knows, deterministic. Raises RouteProblem for others."""
    if look_of(name) is None:
        raise RouteProblem(name, f"not a generated city ({', '.join(CITIES)}, wild-N)")
    return City(look_of(name))


def _heading(a, b):
    """Whole degrees from point a to point b."""
    return round(math.degrees(math.atan2(b[0] - a[0], b[1] - a[1]))) % 360


def _geocode(point):
    """[latitude, longitude] of a point in metres. All cities lie at sea, at 40 degrees north."""
    return [round(40 + float(point[1]) / 111_320, 7),
            round(-30 + float(point[0]) / (111_320 * math.cos(math.radians(40))), 7)]


def _draw_walk(city, rng):
    """Corners of a walk, or None: walk[0] lies behind the start, walk[1:] are the N points."""
    length, walk = int(rng.integers(2, 9)), [int(rng.integers(len(city.near)))]
    while len(walk) <= length:
        onward = [b for b in city.near[walk[-1]] if b not in walk and len(city.near[b]) > 2]
        if len(walk) > 1:           # every corner is a real turn, and none a turn-about
            behind, here = city.corners[walk[-2]], city.corners[walk[-1]]
            onward = [b for b in onward if 24 <= abs(bend(
                _heading(behind, here), _heading(here, city.corners[b]))) <= 156]
        if not onward:
            return None
        walk.append(onward[rng.integers(len(onward))])
    return tuple(walk)


def _routes(city):
    """The routes of a generated city as the released JSON has them."""
    rng = np.random.default_rng([7, city.look.seed])
    sights = [city.in_sight(corner, SIGHT) for corner in city.corners]
    made = {}
    while len(made) < city.look.routes:
        walk = _draw_walk(city, rng)
        if walk is None or walk in made or not sights[walk[-1]] or len(city.between(*walk[:2])) < 3:
            continue
        first = city.between(*walk[:2])     # the start lies on this street, short of the corner
        start = first[rng.integers(1, max(2, int(0.7 * len(first))))]
        points = [start] + [city.corners[corner] for corner in walk[1:]]
        places, blocks, faces = [], "", 0
        for i, corner in enumerate(walk[1:]):
            goes, text, place = _heading(points[i], points[i + 1]), "No landmark nearby", None
            if sights[corner]:      # the nearest place
                _, bearing, place = sights[corner][0]
                side = SIDES[round(bend(goes, bearing) / 90) % 4][0]
                last = "The destination " if corner == walk[-1] else ""
                text = f"{last}{place.name} is on your {side}"
                place = {"name": place.name, "geocode": _geocode(place.at),
                         "place_types": [PLACE_KINDS[place.kind].lower()]}
            places.append(place)
            blocks += (f'\n{{\n"intersection_idx": "{i + 1}",\n"landmarks": "{text}",\n'
                       f'"distance": "{math.dist(points[i], points[i + 1]):.0f} meters",\n'
                       f'"human_heading": "{faces}",\n'
                       f'"to_next_intersection_heading": "{goes} ({compass_word(goes)})",\n}}\n')
            faces = goes
        made[walk] = {
            "start_place": {"name": "start", "relocated_geocode": _geocode(start)},
            "dest_place": places[-1] | {"relocated_geocode": _geocode(points[-1])},
            "route_results": {"geocode_list": [_geocode(point) for point in points[1:]],
                              "landmark_list": places[:-1], "n_landmarks": len(places) - 1},
            "init_heading": 0, "milestone_info": blocks}
    return [list(made.values()), len(made)]


# ------------------------------------------------------------------------------------------------
# 7. Drawing. Every pixel of a panorama is a ray. Above the roof it is sky; between street and roof
# it meets a house front at the distance that `cast` gives; below that it meets the ground. All
# W x H rays are worked out at once.
# ------------------------------------------------------------------------------------------------


def _hash(*numbers):
    """A number in [0, 1) from integer arrays: the same house looks the same from everywhere."""
    value = np.zeros((), dtype=np.uint32)
    for number in numbers:
        value = (value ^ np.asarray(number).astype(np.int64).astype(np.uint32)) * np.uint32(
            2654435761)
        value = value ^ (value >> np.uint32(15))
    return (value & np.uint32(0xFFFF)) / 65536.0


@functools.lru_cache(maxsize=512)
def _sign(name, kind, style):
    """The sign of a place, (h, w, 4) uint8. Its colour tells the kind, its shape the city."""
    colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(kind / 12, 0.9 - 0.35 * (kind % 2),
                                                             0.85 - 0.25 * (kind % 3 == 2)))
    width, height = (128, 128) if style == "banner" else (192, 76)
    plate, ink = {"frame": ((246, 244, 236), colour), "neon": ((16, 16, 22), colour)}.get(
        style, (colour, (255, 255, 255)))
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    shape = draw.ellipse if style == "oval" else draw.rectangle
    shape((0, 0, width - 1, height - 1), fill=plate, outline=ink,
          width=10 if style in ("frame", "neon") else 3)
    for line, word in enumerate(name.split()[:2]):
        font = ImageFont.load_default(min(34, 1.6 * width / (len(word) + 1)))
        draw.text((width / 2, height * (0.31 + 0.38 * line)), word, ink, font, anchor="mm")
    return np.asarray(image)


def draw_panorama(city, spot, width=512):
    """The panorama at a point (2,) of a City, column 0 to the north.

    Returns (width / 2, width, 3) uint8. About 50 ms at width 512.
    """
    above, horizon, light, ground, haze, lit = WEATHERS[city.look.weather]
    horizon, height = np.array(horizon), width // 2
    # a column is a bearing, a row is an elevation; slope = tan(elevation) = height gained / metre
    bearings = (np.arange(width) + 0.5) * 2 * math.pi / width                          # (W,)
    slope = np.tan((0.5 - (np.arange(height) + 0.5) / height) * math.pi)[:, None]      # (H, 1)
    distance, owner, front = city.cast(spot, bearings)
    level = EYE + slope * distance              # (H, W): where the ray meets the front, metres high

    up = np.clip(slope / 1.2, 0, 1)[..., None]
    image = horizon * (1 - up) + np.array(above) * up + np.zeros((height, width, 1))

    # houses are 9 m wide, with a colour and 2 to 5 storeys of their own, darker away from the sun
    house = np.floor(front / 9)
    roof = STOREY * (2 + np.floor(4 * _hash(owner, house, city.look.seed)))
    hue, saturation, brightness = city.look.house
    paint = np.array([colorsys.hsv_to_rgb((hue + h) % 1, saturation, min(1, brightness * b))
                      for h, b in zip(0.07 * _hash(owner, house, 1) - 0.035,
                                      0.8 + 0.35 * _hash(owner, house, 2))])           # (W, 3)
    wall = np.broadcast_to(255 * paint * (0.86 + 0.14 * np.cos(bearings - 2))[:, None], image.shape)
    storey, inside = np.divmod(level / STOREY, 1)
    pane, beside = np.divmod(front / 2.25, 1)
    window = (np.abs(beside - 0.5) < 0.24) & (np.abs(inside - 0.52) < 0.25) & (storey >= 1)
    glow = window & (_hash(owner[None], pane[None], storey) < lit)
    wall = np.where(window[..., None], (64, 76, 92), wall)
    shop = (storey < 1) & (np.abs(beside - 0.5) < 0.4) & (inside < 0.78)
    wall = np.where(shop[..., None], (52, 58, 66), wall)
    edge = (np.abs(front / 9 - house - 0.5) > 0.485) | (level > roof - 0.35) | (
        (storey == 1) & (inside < 0.08))
    wall = np.where(edge[..., None], wall * 0.6, wall) * light
    wall = np.where(glow[..., None], (255, 214, 130), wall)
    image = np.where(((level >= 0) & (level <= roof))[..., None], wall, image)

    # the ground: a road with a broken middle line and zebra crossings between lighter pavements.
    # A ray that falls by `slope` a metre from EYE metres up meets it after EYE / -slope metres.
    rows, columns = np.nonzero(level < 0)
    reach = -EYE / slope[rows, 0]                                                      # (M,)
    point = spot + reach[:, None] * np.stack([np.sin(bearings), np.cos(bearings)], 1)[columns]
    close, streets = reach < 45, np.flatnonzero(city.away(spot) < 60)
    offset = point[close, None] - city.start[streets]                                  # (M, S, 2)
    along = (offset * city.along[streets]).sum(-1)
    across = np.abs((offset * city.across[streets]).sum(-1))
    end = np.minimum(along, city.length[streets] - along)       # to the nearer end of the street
    road = (end > 0) & (across < 4.6)
    corners = city.corners[np.unique(city.streets[streets])]
    square = np.hypot(*np.moveaxis(point[close, None] - corners, -1, 0)) < 6.5
    zebra = road & (end > 8) & (end < 11) & (across % 1.3 < 0.7)
    middle = road & (end > 12.5) & (across < 0.14) & (along % 6 < 3)
    grey = np.full(len(rows), 92.0)
    grey[close] = np.where(road.any(1) | square.any(1), 84, 170)
    grey[close] = np.where((zebra | middle).any(1), 225, grey[close])
    image[rows, columns] = np.minimum(grey[:, None] * ground, 250)

    # haze: clear = 1/2 ** (depth / haze); what is not clear has the colour of the horizon
    depth = np.where(level < 0, EYE / np.maximum(-slope, 1e-6), distance)
    clear = np.where(level > roof, 1, 0.5 ** (np.minimum(depth, distance) / haze))[..., None]
    image = image * clear + horizon * (1 - clear)

    # signs: boards that face the walker, far ones first; angle = atan(size / distance)
    for metres_to, bearing, place in reversed(city.in_sight(spot, 70)):
        sign = _sign(place.name, place.kind, city.look.sign)
        wide, clear = 4.8 if sign.shape[0] == sign.shape[1] else 7.2, 0.5 ** (metres_to / haze)
        tall, apart = wide * sign.shape[0] / sign.shape[1], max(metres_to, 3)
        half = math.degrees(math.atan2(wide / 2, apart))
        left, right = (round((bearing + side * half) / 360 * width) for side in (-1, 1))
        top, bottom = (round((0.5 - math.atan2(z - EYE, apart) / math.pi) * height)
                       for z in (3 + tall, 3))
        size = (max(1, right - left), max(1, bottom - top))
        board = np.asarray(Image.fromarray(sign).resize(size, Image.Resampling.BOX), np.float64)
        area = np.ix_(np.arange(top, top + size[1]), np.arange(left, left + size[0]) % width)
        glare = 1.0 if city.look.sign == "neon" else np.maximum(light, 0.7)
        alpha = board[..., 3:] / 255
        image[area] = image[area] * (1 - alpha) + alpha * (
            board[..., :3] * glare * clear + horizon * (1 - clear))
    return np.clip(image, 0, 255).astype(np.uint8)


def city_files(name, width=512):
    """The `load` function of a generated city: what its folder would hold, made when asked for.

    width: of the panoramas, pixels.
    """
    city = build_city(name)
    index = {f"{name}-{i:04d}": i for i in range(len(city.spots))}

    @functools.lru_cache(maxsize=2048)
    def make(file):
        """The bytes of one file of the released format."""
        if file == INFOS:
            return json.dumps(_routes(city)).encode()
        if file == MAPPING:
            return pickle.dumps({tuple(_geocode(city.spots[i])): ident
                                 for ident, i in index.items()}, protocol=4)
        ident, _, kind = file.removeprefix("street_views/").partition(".")
        rotation = zlib.crc32(ident.encode()) % 360     # cameras are not mounted to the north
        if kind != "jpg":
            return json.dumps({"rotation": rotation}).encode()
        pixels = draw_panorama(city, city.spots[index[ident]], width)
        stream = io.BytesIO()
        Image.fromarray(np.roll(pixels, round(rotation / 360 * width), axis=1)).save(
            stream, "JPEG", quality=88)
        return stream.getvalue()

    return lambda file, limit=-1: make(file)


def write_city(name, folder, width=512, progress=None):
    """Write a generated city as files in the released format, pictures included: a minute."""
    load, folder = city_files(name, width), pathlib.Path(folder)
    files = [INFOS, MAPPING] + [f"street_views/{ident}{end}" for ident in Atlas(load, name).visited
                                for end in (".jpg", ".metadata.json")]
    (folder / "street_views").mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(files):
        (folder / file).write_bytes(load(file))
        if progress:
            progress(i + 1, len(files))


# ------------------------------------------------------------------------------------------------
# 8. Training text: expert conversations for SFT, a broad corpus for the small backbone.
# A conversation is a list of {"role", "content", "learn"}; the loss falls on turns with learn=True.
# With pictures the first turn also has "image".
# ------------------------------------------------------------------------------------------------


def expert_conversation(rng, **how):
    """One expert example: a random position of a random walk. how: arguments of Navigation.

    Conversations begin afresh at each position, so an example is one turn, as in the paper's data.
    """
    env = Navigation(**how)
    observation, _ = env.reset(int(rng.integers(2 ** 62)), position=float(rng.random()))
    return [_turn("user", observation["text"], image=observation["image"]),
            _turn("assistant", env.expert_answer(), learn=True)]


def _turn(role, content, learn=False, image=None):
    turn = {"role": role, "content": content, "learn": learn}
    return turn if image is None else turn | {"image": image}


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
    return [_backbone_conversation(rng, open_atlas(f"wild-{rng.integers(cities)}"), None)
            for _ in range(count)]


def recall_conversations(rng, count, cities=8):
    """A lesson before the corpus: the steps of a walk, and up to six of them again, in any order.

    Which line has this number, and what does it say? The whole task leans on that skill. Apart it
    is learnt in 300 batches of 32; inside the corpus not in 900.
    """
    made = []
    for _ in range(count):
        routes = open_atlas(f"wild-{rng.integers(cities)}").routes
        on, arrive = OTHER_ONS[rng.integers(len(OTHER_ONS))]
        turn = (TURN, *OTHER_TURNS)[rng.integers(1 + len(OTHER_TURNS))]
        steps = write_steps(routes[rng.integers(len(routes))], int(rng.integers(360)), turn=turn,
                            on=on, arrive=arrive)
        again = [steps[i] for i in rng.permutation(len(steps))[:6]]
        made.append([_turn("user", "".join(steps)),
                     _turn("assistant", "".join(again), learn=True)])
    return made


def _backbone_conversation(rng, atlas, picture, routes=None):
    def pick(options):
        """One of them, each as likely."""
        return options[rng.integers(len(options))]

    route, heading = pick(atlas.routes[:routes]), int(rng.integers(360))
    rail = lay_rail(route, heading, rng)
    at = int(rng.integers(len(rail)))
    if rng.random() < 0.5:
        at = pick([i for i, position in enumerate(rail) if position.kind != "forward"])
    here = rail[at]
    # In three of ten the steps are worded as in the task. They name the compass word and the
    # relative word only, so the legal words must be one of these two vocabularies.
    both = rng.random() < 0.3
    vocabulary = pick(sorted(RULES.values()) if both else sorted(VOCABULARIES))
    words, turn = VOCABULARIES[vocabulary], TURN if both else pick(OTHER_TURNS)
    (on, arrive), moves, history = pick(OTHER_ONS), pick(OTHER_MOVES), pick(OTHER_HISTORIES)
    space = write_space(vocabulary, pick(OTHER_SPACES), moves)
    (ask, notation), keys = pick(OTHER_NOTATIONS), [pick(names) for names in OTHER_KEYS]
    steps = write_steps(route, heading, turn=turn, on=on, arrive=arrive)
    past = [(position.observation, right_action(route, position, vocabulary, moves=moves))
            for position in rail[:at]]

    def say(seen, action):
        """An answer in the notation of this conversation."""
        return write_answer(seen, steps[here.step].strip(), action, notation, keys)

    image = picture and look_around(atlas, here.panorama, here.heading, picture)
    shown = picture is not None or rng.random() < 0.2
    # Half of the pictures have to tell by themselves whether this is an intersection.
    announce = picture is None or rng.random() < 0.5
    prompt = write_prompt(steps, space, past, here, shown, pick(OTHER_PROMPTS), ask, keys, history,
                          announce)
    talk = [_turn("user", prompt, learn=image is None, image=image)]
    if rng.random() < 0.25:     # a wrong try: another action, sometimes what is seen elsewhere
        seen = pick(rail).observation if rng.random() < 0.3 else here.observation
        which, word = int(rng.integers(3)), pick(words)
        verdict = verify_virl(write_answer(seen, "", MOVES[which].format(x=word)),
                              right_action(route, here, vocabulary), here.observation, words)
        if not verdict.correct:
            talk += [_turn("assistant", say(seen, moves[which].format(x=word))),
                     _turn("user", RETRY.format(message=verdict.message))]
    action = right_action(route, here, vocabulary, moves=moves)
    return talk + [_turn("assistant", say(here.observation, action), learn=True)]


# What the eyes are asked of each view (sft.pretrain_tower): (question, number of answers, weight of
# its loss). The nearest place in sight, its kind or none; is this an intersection?
EYE_QUESTIONS, EYE_COLUMNS = (("place", len(PLACE_KINDS) + 1, 1.0), ("intersection", 2, 0.5)), False
EYE_CITIES, EYE_ROUTES = 24, 15     # wild cities that eyes learn on, and routes of each: a panorama
                                    # takes 0.1 s to draw, and few from many cities show more


def _glimpse(rng, where, numbers, picture):
    """A picture from a walk, and the truth about it.

    where: a generated city. numbers: of its routes. Three pictures in ten turn to any heading, as
    a walker does at the start. Returns (image, {side: kind of place or None}, at a crossing).
    """
    atlas, city = open_atlas(where), build_city(where)
    route = atlas.routes[numbers[rng.integers(len(numbers))]]
    rail = lay_rail(route, int(rng.integers(360)), rng)
    here = rail[rng.integers(len(rail))]
    if rng.random() < 0.3:
        here = [place for place in rail if place.kind != "forward"][rng.integers(
            len(route.headings) + 1)]
    heading = int(rng.integers(360)) if rng.random() < 0.3 else here.heading
    spot = int(here.panorama.rsplit("-", 1)[1])
    kinds = dict.fromkeys(side for side, _ in SIDES)
    for _, bearing, place in reversed(city.in_sight(city.spots[spot], SIGHT)):
        kinds[SIDES[round(bend(heading, bearing) / 90) % 4][0]] = place.kind
    crossing = spot < len(city.corners) and len(city.near[spot]) > 2
    return look_around(atlas, here.panorama, heading, picture), kinds, crossing


def eye_lesson(rng, count, picture):
    """What the eyes learn to see on: [(image, (place, crossing) of each of the four views)].

    The views as two tiles hold them: front, back, right, left. 0 is no place, 1 the first kind.
    """
    made = []
    for _ in range(count):
        image, kinds, crossing = _glimpse(rng, f"wild-{rng.integers(EYE_CITIES)}",
                                          range(EYE_ROUTES), picture)
        made.append((image, [(0 if kinds[side] is None else kinds[side] + 1, int(crossing))
                             for side in ("front", "back", "right", "left")]))
    return made


def _name_views(image, kinds, crossing):
    """A conversation about what the four views show, and the words of its answer that tell."""
    words = [NOTHING if kind is None else f" {PLACE_KINDS[kind]}" for kind in kinds.values()]
    said = ", ".join(f"{side} {word.strip()}" for side, word in zip(kinds, words))
    said += CROSSING * crossing
    return [_turn("user", f"{VIEW}Name them.", image=image),
            _turn("assistant", said, learn=True)], [*words, CROSSING if crossing else "<|end|>"]


def pictured_conversations(rng, count, picture):
    """The backbone's corpus, seen instead of read: `count` conversations with a picture each.

    A third name what the four views show; the others walk, as in `backbone_conversations`.
    """
    made = []
    for _ in range(count):
        where = f"wild-{rng.integers(EYE_CITIES)}"
        if rng.random() < 1 / 3:
            made.append(_name_views(*_glimpse(rng, where, range(EYE_ROUTES), picture))[0])
        else:
            made.append(_backbone_conversation(rng, open_atlas(where), picture, EYE_ROUTES))
    return made


def reading_conversation(rng, where, picture):
    """To measure how a backbone sees: (conversation about the views on a walk of val, its words).

    where: a generated city. The words: for each view a kind of place or NOTHING, then CROSSING or
    the end.
    """
    return _name_views(*_glimpse(rng, where, split_routes(len(open_atlas(where)), "val"), picture))


def phrases():
    """The fixed pieces of all texts above, for the small backbone's tokenizer, sorted."""
    templates = [PROMPT, TURN, ON, ARRIVE, VIEW, SPACE, *MOVES, PAST, NOW, NOTHING, CROSSING,
                 PICTURE, *KEYS, ASK, ANSWER, RETRY, *OTHER_PROMPTS, *OTHER_TURNS, *OTHER_SPACES,
                 "The destination ", " is on your ", "; ", ", ", *VIRL_MESSAGES.values(), *WORDS,
                 *(f" {kind}" for kind in PLACE_KINDS), *(side for side, _ in SIDES)]
    for group in (*OTHER_ONS, *OTHER_MOVES, *OTHER_HISTORIES, *OTHER_KEYS, *OTHER_NOTATIONS,
                  *VOCABULARIES.values()):
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


# ------------------------------------------------------------------------------------------------
# Walk in the terminal
# ------------------------------------------------------------------------------------------------


def draw_map(atlas, route, size=900):
    """The surroundings of a route from above, north up: grey where panoramas stand (the streets),
    the walk in red from its green start, landmarks in blue. Returns a PIL image."""
    points = np.array(route.points)
    scale = np.array([1, math.cos(math.radians(points[0, 0]))]) * 111_320
    middle = (points.min(0) + points.max(0)) / 2
    reach = max(np.ptp(points, axis=0) * scale) / 2 + 90            # metres from middle to border
    image = Image.new("RGB", (size, size), (233, 228, 216))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)

    def dot(coordinate, radius, colour, label="", aside=0):
        """Draw a circle, its label in it or `aside` pixels beside it. Returns its pixel (x, y)."""
        north, east = (np.asarray(coordinate) - middle) * scale / reach
        x, y = float(size / 2 * (1 + east)), float(size / 2 * (1 - north))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        draw.text((x + aside, y), label, (20, 40, 130) if aside else (255, 255, 255), font,
                  anchor="lm" if aside else "mm")
        return x, y

    for coordinate in atlas.coordinates:
        dot(coordinate, max(3, 7 * size / 2 / reach), (190, 190, 196))
    draw.line([dot(point, 2, (205, 40, 40)) for point in points], fill=(205, 40, 40), width=4)
    for i, point in enumerate(points):
        dot(point, 9, (205, 40, 40) if i else (20, 130, 60), str(i) if i else "S")
    for name, coordinate in route.places:
        dot(coordinate, 4, (40, 70, 190), name, aside=7)
    return image


def save_pictures(env, folder):
    """Write the map of env's route and the four views of each position as PNG files."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw_map(env.atlas, env.route).save(folder / "map.png")
    for i, position in enumerate(env.rail, 1):
        pixels, rotation = env.atlas.panorama(position.panorama)
        four_views(pixels, rotation, position.heading, (1200, 1200)).save(
            folder / f"view-{i:02d}-{position.kind.replace(' ', '-')}.png")
    Image.fromarray(pixels).save(folder / "panorama-of-the-end.png")
    print(f"{folder}: map.png and {len(env.rail)} views of route {env.route.index}")


def walk(env, seed, route):
    """Play one walk with a person."""
    observation, _ = env.reset(seed, route)
    print(observation["text"] + "\n(Type the action, or a whole answer; an empty line gives up.)")
    terminated = truncated = False
    while not (terminated or truncated):
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt, UnicodeError, RuntimeError):   # the last: no stdin
            text = ""
        if not text:
            print("The action here is", env.expert_action())
            return
        if "action" not in text.lower():        # trust a person's eyes
            text = f"current observation: {env.position.observation}\naction: {text}"
        observation, reward, terminated, truncated, _ = env.step(text)
        said = observation["text"]
        if observation["new_conversation"]:     # not the whole prompt again
            said = f"{env.past[-1][1]}. Now: {env.position.observation}"
        print(f"[{reward:+.1f}] {said}" + " (out of tries)" * truncated)


def main():
    """A walk for a person. Returns the exit code: 0 fine, 2 bad data."""
    parser = argparse.ArgumentParser(description="Walk a route of V-IRL in the terminal.")
    data = parser.add_argument_group("data")
    data.add_argument("--city", default="Alder", metavar="NAME",
                      help=f"a generated city: {', '.join(CITIES)} or wild-N (default Alder)")
    data.add_argument("--routes", metavar="FOLDER", help="routes in the paper's released format")
    data.add_argument("--split", choices=("train", "val", "test", "all"), default="all",
                      help="which routes to draw from (default all, as in the paper)")
    data.add_argument("--route", type=int, metavar="N", help="this route instead of a drawn one")
    data.add_argument("--seed", type=int, default=0, help="which walk (default 0)")
    rules = parser.add_argument_group("rules")
    rules.add_argument("--rule", choices=RULES, default="absolute", help="words of turn_direction")
    rules.add_argument("--tries", type=int, default=TRIES, help="answers a position (paper: 2)")
    rules.add_argument("--paper-bearings", action=argparse.BooleanOptionalAction, default=False,
                       help="the released code's relative words, which do not wrap at 360 degrees")
    files = parser.add_argument_group("files")
    files.add_argument("--picture", metavar="FOLDER", help="write a map and the street views (PNG)")
    files.add_argument("--write", metavar="FOLDER", help="write the city in the released format")
    args = parser.parse_args()
    if args.seed < 0 or args.tries < 1:
        parser.error("--seed must be 0 or more, --tries 1 or more")
    if args.write and args.routes:
        parser.error("--write writes a generated city: give --city, not --routes")
    where = args.routes or args.city
    try:
        if args.write:
            write_city(where, args.write, progress=lambda done, of: print(
                f"\r{done} of {of} files", end="" if done < of else "\n", file=sys.stderr))
            print(f"Now try: python virl_env.py --routes {args.write}")
            return 0
        # people get sharper pictures than models
        sharp = args.picture and look_of(where)
        env = Navigation(Atlas(city_files(where, 2048), where) if sharp else where, args.rule,
                         args.split, tries=args.tries, paper_bearings=args.paper_bearings)
        if args.picture:
            env.reset(args.seed, args.route)
            save_pictures(env, args.picture)
        walk(env, args.seed, args.route)
        return 0
    except (RouteProblem, OSError) as problem:
        print(f"virl_env.py: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nvirl_env.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
