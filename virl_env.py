"""V-IRL: follow written steps through a city, one action at a time, in words or in street view.

Paper: arXiv 2501.17161, section 4.2 and appendix B. The knob that the whole project turns:

    rule "absolute"  turn_direction(north), ... 8 compass words     SFT and RL train on it: ID
    rule "relative"  turn_direction(left), ... 4 words              the rule OOD
    another city     other streets, names, houses, signs, light     the visual OOD

Each step names BOTH words ("turn left, to face northwest"), and the prompt lists the legal ones. A
model that READS the list transfers; one that has memorised "copy the compass word" fails. Neither
SFT nor RL ever sees a relative word as an answer; the small backbone has, in a third of its corpus.

  1. the words of the prompt
  2. the walk: a route, the rail of positions along it (start, points on the way, crossings, end),
     the written steps, the prompt, the expert's action and answer
  3. the environment. step(answer) asks verifier.py. A wrong action is never carried out: the
     message comes back. A right one moves on along the rail, and a FRESH conversation begins there.
     And the expert's conversations, from which SFT learns
  4. street views: a panorama is cropped to front, right / back, left
  5. the routes of a place: a folder in the format of the paper's released data, or a city of
     cities/generate.py, which needs no download; cities/released.py reads both
  6. a walk in the terminal

North is 0 degrees, east 90. A route has N points after its start. For words read parts 1 to 3.

    python virl_env.py                            walk in the terminal, verifier messages included
    python virl_env.py --rule relative --city Brim --seed 3
    python virl_env.py --picture runs/look        a map and the street views of the walk as PNG
    python virl_env.py --routes nyc_1k_routes     the paper's data, after you have downloaded it

Read before: verifier.py, gp_env.py. Read next: sft.py.
"""

import argparse
import functools
import json
import math
import pathlib
import sys
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cities.generate import CITIES, COMPASS, city_files, draw_map, look_of
from cities.released import NOTHING, Atlas, RouteProblem, folder_files
from verifier import VIRL_REWARDS, verify_virl

TRIES = 2               # answers at one position (the paper's verify_iter)
DROP = 0.5              # share of the points along the way left out, anew at each reset

# -------- 1. The words of the prompt

RELATIVE = ("left", "right", "slightly left", "slightly right")
VOCABULARIES = {"compass": COMPASS, "relative": RELATIVE}
RULES = {"absolute": "compass", "relative": "relative"}     # rule: its legal words for x

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
SPACE = ("forward() goes on, turn_direction(x) turns to face x, stop() ends the walk; "
         "x is one of: {words}")
PAST = "\nO_{k}: {seen}\nA_{k}: {action}"
NOW = "\nO_{k}: {seen}\nA_{k}:"
CROSSING = "; you are at an intersection"
PICTURE = "see the picture"
ASK = ('One JSON object: {"current observation": "what you see now", '
       '"current instruction": "the step you are at", "action": "one of the actions"}')
RETRY = "Not right: {message}. Try again."

# -------- 2. The walk

# A Route (cities/released.py) has N + 1 points, the start first, and N legs between them:
#   landmarks   (N + 1,) what is to be seen at each point, in words; panoramas likewise, their ids
#   headings    (N,) degrees of each leg; words (N,) the compass word that the data gives for it
#   between     (N,) ids of the panoramas that the rail may visit on each leg

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
    for leg, faces in enumerate(route.headings):
        kept = rng.random(len(route.between[leg])) >= drop
        rail += [Position("forward", panorama, faces, NOTHING, 2 * leg + 1, leg)
                 for panorama, keep in zip(route.between[leg], kept) if keep]
        # As in the released code the intersection is announced at every point but the start.
        seen = route.landmarks[leg + 1] + CROSSING
        if leg + 1 < len(route.headings):
            kind, step = "later turn", 2 * leg + 2
        else:
            kind, step = "stop", 2 * leg + 1
        rail.append(Position(kind, route.panoramas[leg + 1], faces, seen, step, leg + 1))
    return rail


def bend(heading, target):
    """Degrees to turn from heading to target, right is positive, in [-180, 180).

    >>> bend(350, 10), bend(10, 350)
    (20, -20)
    """
    return (target - heading + 180) % 360 - 180


def relative_word(heading, target):
    """How to turn from one heading to another, in words of the relative rule.

    The released code does not wrap at 360 degrees: a wrong side for a quarter of all headings.

    >>> relative_word(350, 10)
    'slightly right'
    """
    degrees = bend(heading, target)
    side = "right" if degrees > 0 else "left"
    return side if abs(degrees) > 45 else "slightly " + side


def turn_words(route, heading, leg):
    """{vocabulary: word} of the turn into a leg, for a walker facing `heading`."""
    return {"compass": route.words[leg],
            "relative": relative_word(heading, route.headings[leg])}


def write_steps(route, heading):
    """The 2 N written steps of a route, each with its line end, for a walker facing `heading`."""
    steps = []
    for leg, target in enumerate(route.headings):
        words = turn_words(route, heading, leg)
        go = ON if leg + 1 < len(route.headings) else ARRIVE
        steps.append(TURN.format(n=2 * leg + 1, **words))
        steps.append(go.format(n=2 * leg + 2, landmarks=route.landmarks[leg + 1]))
        heading = target
    return steps


def write_prompt(steps, vocabulary, past, position, picture, announce=True):
    """The first user turn at a position.

    steps: from write_steps. vocabulary: a key of VOCABULARIES. past: [(observation, action)] of the
    positions before: what really was there and what the expert did, as in the paper. picture: the
    present is in a picture and not told, but for the intersection (as in the paper; announce=False:
    nothing).
    """
    space = SPACE.format(words=", ".join(VOCABULARIES[vocabulary]))
    seen = position.observation
    if picture:
        seen = PICTURE + (CROSSING if announce and seen.endswith(CROSSING) else "")
    walk = [PAST.format(k=k, seen=there, action=done) for k, (there, done) in enumerate(past, 1)]
    walk.append(NOW.format(k=len(past) + 1, seen=seen))
    return PROMPT.format(steps="".join(steps), view=VIEW if picture else "", space=space,
                         walk="".join(walk), ask=ASK)


def right_action(route, position, vocabulary):
    """The expert's action. vocabulary: a key of VOCABULARIES."""
    if position.kind == "forward":
        return "forward()"
    if position.kind == "stop":
        return "stop()"
    words = turn_words(route, position.heading, position.leg)
    return f"turn_direction({words[vocabulary]})"


def write_answer(seen, step, action):
    """An answer in the notation that the prompt asks for and the verifier reads.

    >>> write_answer("a mill", "2. Go on.", "stop()")
    '{"current observation": "a mill", "current instruction": "2. Go on.", "action": "stop()"}'
    """
    return json.dumps({"current observation": seen, "current instruction": step, "action": action},
                      ensure_ascii=False)


# -------- 3. The environment


class Navigation:
    """One walk at a time, with the calls of a Gymnasium environment (and without the dependency).

    >>> env = Navigation("Alder")
    >>> observation, info = env.reset(seed=0)
    >>> observation, reward, terminated, truncated, info = env.step(env.expert_answer())
    >>> reward, observation["new_conversation"], info["kind"]
    (1.0, True, 'first turn')

    An observation is a dict: "text", the next user turn; "image", a PIL image or None;
    "new_conversation", True if everything said before is to be forgotten.

    where: a generated city, a folder in the released format, or an Atlas (part 5). rule: a key of
    RULES. split: "train", "val", "test" or "all". picture: (width, height) of the 2 x 2 picture, or
    None for text. announce: see write_prompt; without it fewer walks can be made with closed eyes.
    go_on: after the last failed try at a position the expert's action is taken and the walk goes
    on. False: the walk ends there, as in the paper.
    scoring_rule, fresh: as in gp_env.py. drop: share of the points along the way that are left out.
    Raises RouteProblem for data that cannot be used.
    """

    def __init__(self, where="Alder", rule="absolute", split="train", picture=None, tries=TRIES,
                 go_on=False, scoring_rule=None, drop=DROP, announce=True, fresh=False):
        self.atlas = where if isinstance(where, Atlas) else open_atlas(where, bool(picture))
        self.vocabulary, self.scored = RULES[rule], RULES[scoring_rule or rule]
        self.picture, self.tries, self.go_on = picture, tries, go_on
        self.drop, self.announce, self.fresh = drop, announce, fresh
        self.numbers = split_routes(len(self.atlas), split)

    def reset(self, seed=None, route=None, position=0):
        """Start a walk. Returns (observation, info).

        seed: the number of the walk; None: any. It draws the route (unless `route` gives its
        number), the heading, and the rail. position: start there, with the expert's walk so far in
        the prompt; a float in [0, 1) is a share of the rail.
        """
        rng = np.random.default_rng(seed)
        drawn = self.numbers[rng.integers(len(self.numbers))]
        self.route = self.atlas.route(drawn if route is None else route)
        heading = self.route.init_heading or int(rng.integers(360))     # 0 means: any
        self.rail = lay_rail(self.route, heading, rng, self.drop)
        self.steps = write_steps(self.route, heading)
        self.at, self.used, self.past = 0, 0, []
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
        """The action to take here, under the stated rule or in another vocabulary."""
        return right_action(self.route, self.position, vocabulary or self.vocabulary)

    def expert_answer(self):
        """The whole answer that SFT teaches for this position."""
        return write_answer(self.position.observation, self.steps[self.position.step].strip(),
                            self.expert_action())

    def step(self, text):
        """Judge one answer. Returns (observation, reward, terminated, truncated, info).

        terminated: the walk is over. truncated: the tries here are used up (never with go_on).
        info is about the position that was judged: "route", "position", "kind", "try", "verdict".
        """
        verdict = verify_virl(text, self.expert_action(self.scored), self.position.observation,
                              VOCABULARIES[self.scored])
        reward = verdict.reward
        self.used += 1
        out_of_tries = not verdict.correct and self.used >= self.tries
        if out_of_tries:
            reward += VIRL_REWARDS["out of tries"]
        info = self._info(verdict)
        if verdict.correct or (out_of_tries and self.go_on):
            if self.position.kind == "stop":
                return self._say(verdict.message), reward, True, False, info
            self._move_on()
            return self._arrive(), reward, False, False, info
        if self.fresh:
            observation = self._arrive()
        else:
            observation = self._say(RETRY.format(message=verdict.message))
        return observation, reward, False, out_of_tries, info

    def _move_on(self):
        self.past.append((self.position.observation, self.expert_action()))
        self.at, self.used = self.at + 1, 0

    def _info(self, verdict=None):
        return {"route": self.route.index, "position": self.at, "kind": self.position.kind,
                "try": self.used, "verdict": verdict}

    def _say(self, text):
        return {"text": text, "image": None, "new_conversation": False}

    def _arrive(self):
        text = write_prompt(self.steps, self.vocabulary, self.past, self.position,
                            bool(self.picture), self.announce)
        return {"text": text, "image": self.look(self.position), "new_conversation": True}

    def look(self, position):
        """The picture at a position of the rail, a PIL image; None for text."""
        if self.picture is None:
            return None
        return look_around(self.atlas, position.panorama, position.heading, self.picture)


def expert_conversation(rng, **how):
    """One expert example: a random position of a random walk, as turns like those of gp_env.py.

    how: as in Navigation.
    """
    env = Navigation(**how)
    observation, _ = env.reset(int(rng.integers(2 ** 62)), position=float(rng.random()))
    return [message("user", observation["text"], image=observation["image"]),
            message("assistant", env.expert_answer(), learn=True)]


def message(role, content, learn=False, image=None):
    """One turn of a conversation."""
    made = {"role": role, "content": content, "learn": learn}
    if image is not None:
        made["image"] = image
    return made


# -------- 4. Street views

SIDES = (("front", 0), ("right", 90), ("back", 180), ("left", 270))     # reading order, 2 x 2


def view(pixels, rotation, heading, width, height, fov=90):
    """What a walker sees who faces `heading`: a perspective crop of a panorama.

    pixels (H, W, 3) uint8, 360 x 180 degrees; rotation as in the metadata; fov: horizontal field of
    view, degrees. Returns (height, width, 3) uint8. Where the panorama is finer than the view, a
    pixel is the mean of finer x finer rays.
    """
    finer = max(1, min(4, round(pixels.shape[1] * fov / 360 / width)))
    wide, high = width * finer, height * finer
    # the picture plane stands at distance f in front of the eye, f = (wide / 2) / tan(fov / 2);
    # each ray has a bearing to the middle and an elevation, degrees
    focal = wide / 2 / math.tan(math.radians(fov) / 2)
    x = (np.arange(wide) + 0.5 - wide / 2)[None, :] / focal
    y = (high / 2 - np.arange(high) - 0.5)[:, None] / focal
    bearing, elevation = np.degrees(np.arctan(x)) + 0 * y, np.degrees(np.arctan2(y, np.hypot(1, x)))
    # invariant: the middle of the view is the panorama's column (heading + rotation) / 360 * W
    column = (bearing + heading + rotation) / 360 * pixels.shape[1] - 0.5
    row = np.clip((0.5 - elevation / 180) * pixels.shape[0] - 0.5, 0, pixels.shape[0] - 1)
    # each ray falls between four pixels: it takes the mean of them, weighted by nearness
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    right, down = (column - left)[..., None], (row - top)[..., None]
    below = np.minimum(top + 1, pixels.shape[0] - 1)
    here, next_to = left % pixels.shape[1], (left + 1) % pixels.shape[1]    # a panorama is a ring
    upper = (1 - right) * pixels[top, here] + right * pixels[top, next_to]
    lower = (1 - right) * pixels[below, here] + right * pixels[below, next_to]
    fine = (1 - down) * upper + down * lower
    coarse = fine.reshape(height, finer, width, finer, 3).mean(axis=(1, 3))
    return np.round(coarse).astype(np.uint8)


def four_views(pixels, rotation, heading, size):
    """The picture of V-IRL-VL, a PIL image: front, right / back, left. size: (width, height)."""
    width, height = size[0] // 2, size[1] // 2
    front, right, back, left = (view(pixels, rotation, heading + turn, width, height)
                                for _, turn in SIDES)
    return Image.fromarray(np.vstack([np.hstack([front, right]), np.hstack([back, left])]))


@functools.lru_cache(maxsize=16384)     # walks come by again and again; 24 KB each at 128 x 64
def _known_views(atlas, panorama, heading, size):
    return four_views(*atlas.panorama(panorama), heading, size)


def look_around(atlas, panorama, heading, size):
    """`four_views` of a panorama of an Atlas, given by its id. Small ones are kept in memory."""
    if size[0] * size[1] <= 2 ** 14:
        return _known_views(atlas, panorama, heading, size)
    return four_views(*atlas.panorama(panorama), heading, size)


# -------- 5. The routes of a place, and their split


@functools.lru_cache(maxsize=64)
def open_atlas(where, pictures=False):
    """The Atlas of a generated city (its name) or of a folder in the released format (its path)."""
    if look_of(where):
        return Atlas(city_files(where), where)
    if not pathlib.Path(where).is_dir():
        raise RouteProblem(f"{where}: neither a folder nor a city ({', '.join(CITIES)}, wild-N)")
    return Atlas(folder_files(where), str(where), pictures)


@functools.lru_cache(maxsize=64)
def split_routes(count, split):
    """Numbers of the routes in a split: 70 % train, 10 % val, 20 % test, by a fixed seed.

    Held out are routes, not streets: a test route goes along streets that training knows, in an
    order that it does not. Raises RouteProblem if a split would be empty.
    """
    order = np.random.default_rng(24).permutation(count).tolist()
    test, val = count // 5, count // 10
    found = {"test": order[:test], "val": order[test:test + val], "train": order[test + val:],
             "all": range(count)}[split]
    if not found:
        raise RouteProblem(f"{count} routes are too few to hold some out: use 10 or more, "
                           "or --split all (evaluate.py: --splits all)")
    return sorted(found)


# -------- 6. A walk in the terminal


def save_pictures(env, folder):
    """Write the map of env's route and the four views of each position as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    signs = list(zip(env.route.landmarks, env.route.points))[1:]
    draw_map(env.atlas.coordinates, env.route.points, signs).save(folder / "map.png")
    for i, position in enumerate(env.rail, 1):
        picture = look_around(env.atlas, position.panorama, position.heading, (1200, 1200))
        picture.save(folder / f"view-{i:02d}-{position.kind.replace(' ', '-')}.png")


def main():
    """A walk for a person."""
    parser = argparse.ArgumentParser(description="Walk a route of V-IRL in the terminal.")
    parser.add_argument("--city", default="Alder", metavar="NAME",
                        help=f"a generated city: {', '.join(CITIES)} or wild-N (default Alder)")
    parser.add_argument("--routes", metavar="FOLDER", help="routes in the paper's released format")
    parser.add_argument("--rule", choices=RULES, default="absolute", help="words of turn_direction")
    parser.add_argument("--seed", type=int, default=0, help="which walk (default 0)")
    parser.add_argument("--picture", metavar="FOLDER", help="write a map and street views (PNG)")
    args = parser.parse_args()
    where = args.routes or args.city
    try:
        if args.picture and look_of(where):     # people get sharper pictures than models
            where = Atlas(city_files(where, 2048), where)
        env = Navigation(where, args.rule, "all")
    except RouteProblem as problem:
        parser.error(str(problem))
    observation, _ = env.reset(abs(args.seed))
    if args.picture:
        save_pictures(env, pathlib.Path(args.picture))
    print(observation["text"] + "\n(Type the action, or a whole answer; an empty line gives up.)")
    terminated = truncated = False
    while not (terminated or truncated):
        text = sys.stdin.readline().strip()
        if not text:
            print("The action here is", env.expert_action())
            return
        if "action" not in text.lower():        # trust a person's eyes
            text = f"current observation: {env.position.observation}\naction: {text}"
        observation, reward, terminated, truncated, _ = env.step(text)
        said = observation["text"]
        if observation["new_conversation"]:     # not the whole prompt again
            said = f"{env.past[-1][1]}. Now: {env.position.observation}"
        print(f"[{reward:+.1f}] {said}")


if __name__ == "__main__":
    main()
