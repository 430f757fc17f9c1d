"""Cities to walk in, grown from seeds: streets, places, routes and street views.

The paper walks in ten real cities, in street views that nobody may pass on. Ten cities of our own
take their place. Each has a plan, a weather, colours, signs and names of its own, so that walking
in another city is the paper's visual OOD test. A city is handed over as the files of the paper's
released data, one by one and made when asked for (`city_files`), or written into a folder
(`write_city`). So whoever reads them has only one kind of data to read.

How a city is made; the same numbers stand over the parts of this file:
  1. looks: what tells one city from another
  2. corners: points of a bent lattice, shifted at random; streets: the Gabriel graph of the corners
     (join two if no third lies in the circle between them). It is planar, with three-, four- and
     five-way crossings. Streets that meet at less than 42 degrees are left out
  3. places: shops and the like on the house fronts. Four in ten belong to chains: the same name
     stands at many corners. Which of them can be seen from a spot, and at what bearing?
  4. routes: walks over 2 to 8 corners that bend at each and end in sight of a place
  5. street views: every pixel of a panorama is a ray that meets sky, a house front or the ground
  6. the files of the released format
  7. a map for people
  8. the command line

Symbols: positions are (x, y) in metres, x to the east and y to the north; bearings and headings
are 0 to the north and 90 degrees to the east. C corners, S streets, P panoramas, H x W pixels.

    python cities/generate.py Alder runs/alder        the city as files (a minute)
    python virl_env.py --routes runs/alder            walk in it

Read after virl_env.py, if you want to know where its streets come from. Nothing about learning is
in here, and nothing of the other files is used.
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
import shlex
import sys
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# 1. Looks
# ------------------------------------------------------------------------------------------------

BLOCK = 78.0            # metres from corner to corner, about
HALF_STREET = 7.0       # metres from the middle of a street to the house fronts
AROUND = 9.0            # metres of open space around a corner
STOREY = 3.2            # metres
EYE = 2.2               # metres; the camera stands on a car
EVERY = 10.0            # metres between panoramas
SIGHT = 25.0            # metres up to which a place is a landmark

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
SIDES = ("front", "right", "back", "left")      # quarter turns to the right
PLACE_KINDS = ("Bakery", "Bank", "Cafe", "Pharmacy", "School", "Museum", "Hotel", "Cinema",
               "Bookshop", "Station", "Market", "Clinic")
SIGNS = ("plate", "frame", "banner", "oval", "neon")
PLANS = ("grid", "bricks", "rings", "loose")


@dataclass(frozen=True)
class Weather:
    """Colours are red, green, blue, 0 to 255; light multiplies them."""

    sky: tuple              # straight above
    horizon: tuple
    light: tuple            # on houses
    ground: tuple           # light on the ground
    haze: float             # metres after which half of a colour is left
    lit: float              # share of the windows with a lamp behind


WEATHERS = {
    "sunny": Weather((70, 130, 205), (190, 215, 235), (1.0, 1.0, 0.95), (1.0, 1.0, 1.0), 400, 0.0),
    "overcast": Weather((150, 155, 162), (205, 207, 210), (0.8, 0.82, 0.86), (0.8, 0.8, 0.85),
                        220, 0.1),
    "fog": Weather((205, 208, 210), (222, 224, 225), (0.85, 0.87, 0.9), (0.9, 0.9, 0.9), 45, 0.2),
    "dusk": Weather((60, 50, 110), (240, 150, 95), (0.85, 0.62, 0.55), (0.6, 0.5, 0.55), 260, 0.5),
    "night": Weather((10, 12, 34), (44, 46, 78), (0.42, 0.44, 0.58), (0.5, 0.52, 0.64), 170, 0.6),
    "snow": Weather((190, 200, 214), (228, 233, 240), (0.9, 0.94, 1.0), (2.0, 2.05, 2.1),
                    150, 0.15),
    "dust": Weather((200, 160, 105), (228, 196, 146), (1.0, 0.84, 0.62), (1.15, 0.95, 0.7),
                    90, 0.0),
    "rain": Weather((88, 98, 110), (140, 150, 158), (0.62, 0.68, 0.74), (0.5, 0.55, 0.65),
                    110, 0.35),
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


def look_of(name):
    """The Look of a city of CITIES, or of "wild-N", drawn from the number N; None for other names.

    Wild cities are what the small backbone has seen of the world: words of every city, any
    weather and any signs, but not the ten cities themselves.
    """
    match = re.fullmatch(r"wild-(\d{1,6})", str(name))
    if not match:
        return CITIES.get(name)
    number = int(match.group(1))
    rng = np.random.default_rng([9, number])
    house = (float(rng.random()), float(rng.uniform(0.1, 0.7)), float(rng.uniform(0.5, 0.9)))
    plan, sign, weather = (options[rng.integers(len(options))]
                           for options in (PLANS, SIGNS, sorted(WEATHERS)))
    words = " ".join(rng.choice(WORDS, 24, replace=False).tolist())
    return Look(1000 + number, plan, house, sign, weather, words, 300)


# ------------------------------------------------------------------------------------------------
# 2. Corners and streets
# ------------------------------------------------------------------------------------------------


def draw_corners(plan, rng):
    """Where streets will meet, before they are laid: (C, 2) metres. plan: one of PLANS."""
    if plan == "loose":
        corners = []
        for point in rng.uniform(-4.3 * BLOCK, 4.3 * BLOCK, size=(2000, 2)):
            if all(math.dist(point, other) > 0.72 * BLOCK for other in corners):
                corners.append(point)
    elif plan == "rings":
        corners = []
        for ring in range(5):
            count = max(1, 6 * ring)
            for i in range(count):
                angle = 2 * math.pi * i / count
                corners.append((ring * BLOCK * math.sin(angle), ring * BLOCK * math.cos(angle)))
    else:
        column, row = np.meshgrid(np.arange(9.0) - 4, np.arange(8.0) - 3.5)
        column += 0.5 * (row % 2 > 0.9) * (plan == "bricks")
        column, row = column + 0.35 * np.sin(row), row + 0.35 * np.sin(1.3 * column)
        corners = BLOCK * np.stack([column.ravel(), row.ravel()], axis=1)
    corners = np.array(corners)
    corners = corners + rng.normal(0, 0.12 * BLOCK, corners.shape)
    turn = rng.uniform(0, math.pi / 2)
    return corners @ [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]


def lay_streets(corners):
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
        if not any(sharp(a, b, other) for other in near[a]) and \
                not any(sharp(b, a, other) for other in near[b]):
            near[a].append(b)
            near[b].append(a)
    return near


# ------------------------------------------------------------------------------------------------
# 3. Places, and what can be seen from where
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A shop or the like, on a house front."""

    name: str
    kind: int               # index in PLACE_KINDS
    at: np.ndarray          # (2,) metres


class City:
    """Streets and places of a generated city."""

    def __init__(self, look):
        rng = np.random.default_rng([6, look.seed])
        self.look, self.corners = look, draw_corners(look.plan, rng)
        self.near = lay_streets(self.corners)
        self.streets = np.array([(a, b) for a, bs in enumerate(self.near) for b in bs if a < b])
        self.start = self.corners[self.streets[:, 0]]                   # (S, 2)
        along = self.corners[self.streets[:, 1]] - self.start
        self.length = np.hypot(*along.T)                                # (S,)
        self.along = along / self.length[:, None]                       # (S, 2) unit vectors
        self.across = self.along[:, ::-1] * (1, -1)                     # to the right of `along`
        self.spots = np.concatenate([self.corners] + [                  # (P, 2) corners come first
            self.between(a, b)[1:-1] for a, b in self.streets])
        self.places = self._open_places(rng)

    def _open_places(self, rng):
        """Places along both sides of each street, 28 to 190 metres apart. A list of Place."""
        words, places = self.look.words.split(), []
        chains = {word: int(rng.integers(len(PLACE_KINDS))) for word in words}
        for street, length in enumerate(self.length):
            for side in (-1, 1):
                at = AROUND + 2 + rng.uniform(0, 70)
                while at < length - AROUND - 2:
                    word = words[rng.integers(len(words))]
                    kind = int(rng.integers(len(PLACE_KINDS)))
                    if rng.random() < 0.4:
                        kind = chains[word]
                    front = side * (HALF_STREET - 0.3) * self.across[street]
                    places.append(Place(f"{word} {PLACE_KINDS[kind]}", kind,
                                        self.start[street] + at * self.along[street] + front))
                    at += rng.uniform(28, 190)
        return places

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
        corner, and front (W,) metres along it (see `_along_front`).
        """
        ray = np.stack([np.sin(bearings), np.cos(bearings)])            # (2, W)
        streets = np.flatnonzero(self.away(spot) < 160)
        corners = np.unique(self.streets[streets])
        intervals = self._cross_bands(spot, ray, streets), self._cross_discs(spot, ray, corners)
        enter, leave = (np.concatenate(ends) for ends in zip(*intervals))
        enter[~(enter < leave)] = np.inf    # never inside (and not a number: inside on a border)
        distance, owner = np.full(len(bearings), 0.5), np.zeros(len(bearings), dtype=int)
        column = np.arange(len(bearings))
        for rank in np.argsort(enter, axis=0):                          # nearest first; (W,) each
            further = (enter[rank, column] <= distance + 0.01) & (leave[rank, column] > distance)
            distance = np.where(further, leave[rank, column], distance)
            owner = np.where(further, rank, owner)
        owner = np.concatenate([streets, len(self.streets) + corners])[owner]
        return distance, owner, self._along_front(spot + (ray * distance).T, owner)

    def _cross_bands(self, spot, ray, streets):
        """Metres after which rays (2, W) enter and leave the bands of n streets, (n, W) each.

        After t metres a ray is at a + t da along the street and b + t db beside its middle. It is
        inside while 0 <= a + t da <= length and |b + t db| <= HALF_STREET.
        """
        offset = spot - self.start[streets]
        a = (offset * self.along[streets]).sum(1)[:, None]
        b = (offset * self.across[streets]).sum(1)[:, None]
        da, db = self.along[streets] @ ray, self.across[streets] @ ray          # (n, W)
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.stack([-a / da, (self.length[streets, None] - a) / da])
            sides = np.stack([(-HALF_STREET - b) / db, (HALF_STREET - b) / db])
        return np.maximum(ends.min(0), sides.min(0)), np.minimum(ends.max(0), sides.max(0))

    def _cross_discs(self, spot, ray, corners):
        """Metres after which rays (2, W) enter and leave the discs of n corners, (n, W) each.

        |spot + t ray - corner|^2 = AROUND^2 has the roots t = middle -+ half.
        """
        to = self.corners[corners] - spot
        middle = to @ ray
        half = AROUND ** 2 - (to ** 2).sum(1)[:, None] + middle ** 2
        half = np.where(half > 0, np.sqrt(np.maximum(half, 0)), -np.inf)
        return middle - half, middle + half

    def _along_front(self, hit, owner):
        """Metres along the front that was hit at (W, 2). Houses are counted along it: front // 9.

        On a street: 500 + metres from its start on the right side, -(500 + metres) on the left. The
        500 keeps the two sides apart: no house stands on both. Around a corner: 900 + metres along
        the arc from the north; the 900 keeps the sum positive to the west, too.
        """
        street = np.minimum(owner, len(self.streets) - 1)
        from_start = hit - self.start[street]
        along = (from_start * self.along[street]).sum(1) + 500
        side = np.sign((from_start * self.across[street]).sum(1))
        to_corner = hit - self.corners[np.maximum(owner - len(self.streets), 0)]
        around = np.arctan2(*to_corner.T) * AROUND + 900
        return np.where(owner < len(self.streets), along * side, around)

    def in_sight(self, spot, reach):
        """[(metres, bearing in degrees, place)] of the places that can be seen, nearest first."""
        offset = np.array([place.at for place in self.places]) - spot
        metres = np.hypot(*offset.T)
        near = np.flatnonzero(metres < reach)
        bearings = np.arctan2(*offset[near].T)
        clear = self.cast(spot, bearings)[0] > metres[near] - 1.5
        return sorted(((float(metres[i]), float(np.degrees(bearing)) % 360, self.places[i])
                       for i, bearing in zip(near[clear], bearings[clear])),
                      key=lambda seen: seen[0])


@functools.lru_cache(maxsize=32)
def build_city(name):
    """The City of a name that `look_of` knows, deterministic. Raises ValueError for others."""
    look = look_of(name)
    if look is None:
        raise ValueError(f"{name}: not a generated city ({', '.join(CITIES)}, wild-N)")
    return City(look)


# ------------------------------------------------------------------------------------------------
# 4. Routes
# ------------------------------------------------------------------------------------------------


def heading_between(a, b):
    """Whole degrees from point a to point b."""
    return round(math.degrees(math.atan2(b[0] - a[0], b[1] - a[1]))) % 360


def geocode(point):
    """[latitude, longitude] of a point in metres. All cities lie at sea, at 40 degrees north."""
    return [round(40 + float(point[1]) / 111_320, 7),
            round(-30 + float(point[0]) / (111_320 * math.cos(math.radians(40))), 7)]


def draw_walk(city, rng):
    """Corners of a walk, or None: walk[0] lies behind the start, walk[1:] are the N points."""
    def bends(behind, here, there):
        """Is this a real turn, and no turn-about? Corners."""
        behind, here, there = city.corners[behind], city.corners[here], city.corners[there]
        right = (heading_between(here, there) - heading_between(behind, here)) % 360
        return 24 <= min(right, 360 - right) <= 156

    length, walk = int(rng.integers(2, 9)), [int(rng.integers(len(city.near)))]
    while len(walk) <= length:
        onward = [b for b in city.near[walk[-1]] if b not in walk and len(city.near[b]) > 2]
        if len(walk) > 1:
            onward = [b for b in onward if bends(walk[-2], walk[-1], b)]
        if not onward:
            return None
        walk.append(onward[rng.integers(len(onward))])
    return tuple(walk)


def draw_routes(city):
    """The routes of a city as the released JSON has them: [[route, ...], their number]."""
    rng = np.random.default_rng([7, city.look.seed])
    sights = [city.in_sight(corner, SIGHT) for corner in city.corners]
    made = {}
    while len(made) < city.look.routes:
        walk = draw_walk(city, rng)
        if walk is None or walk in made or not sights[walk[-1]] or len(city.between(*walk[:2])) < 3:
            continue
        first = city.between(*walk[:2])     # the start lies on this street, short of the corner
        start = first[rng.integers(1, max(2, int(0.7 * len(first))))]
        made[walk] = write_route(city, start, walk[1:], sights)
    return [list(made.values()), len(made)]


def write_route(city, start, corners, sights):
    """One route of the released JSON.

    start (2,) metres; corners: the N that follow; sights: of each corner what `in_sight` says.
    The landmark of a corner is the nearest place in sight.
    """
    points = [start] + [city.corners[corner] for corner in corners]
    places, blocks, faces = [], "", 0
    for i, corner in enumerate(corners):
        goes, text, landmark = heading_between(points[i], points[i + 1]), "No landmark nearby", None
        if sights[corner]:
            _, bearing, place = sights[corner][0]
            side = SIDES[round((bearing - goes) / 90) % 4]
            last = "The destination " if corner == corners[-1] else ""
            text = f"{last}{place.name} is on your {side}"
            landmark = {"name": place.name, "geocode": geocode(place.at),
                        "place_types": [PLACE_KINDS[place.kind].lower()]}
        places.append(landmark)
        blocks += (f'\n{{\n"intersection_idx": "{i + 1}",\n"landmarks": "{text}",\n'
                   f'"distance": "{math.dist(points[i], points[i + 1]):.0f} meters",\n'
                   f'"human_heading": "{faces}",\n"to_next_intersection_heading": '
                   f'"{goes} ({COMPASS[round(goes / 45) % 8]})",\n}}\n')
        faces = goes
    return {"start_place": {"name": "start", "relocated_geocode": geocode(start)},
            "dest_place": places[-1] | {"relocated_geocode": geocode(points[-1])},
            "route_results": {"geocode_list": [geocode(point) for point in points[1:]],
                              "landmark_list": places[:-1], "n_landmarks": len(places) - 1},
            "init_heading": 0, "milestone_info": blocks}


# ------------------------------------------------------------------------------------------------
# 5. Street views. All H x W rays of a panorama are worked out at once. Above the roof a ray is sky;
# between street and roof it meets a house front at the distance that `cast` gives; below that it
# meets the ground.
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rays:
    """The rays of a panorama. A column is a bearing, a row is an elevation."""

    bearings: np.ndarray    # (W,) radians, column 0 to the north
    slope: np.ndarray       # (H, 1) tangent of the elevation = metres gained per metre
    distance: np.ndarray    # (W,) metres to the house front
    owner: np.ndarray       # (W,) whose front that is
    front: np.ndarray       # (W,) metres along that front
    level: np.ndarray       # (H, W) metres above the street at which a ray meets the front


def draw_panorama(city, spot, width=512):
    """The panorama at a point (2,) of a City, column 0 to the north.

    Returns (width / 2, width, 3) uint8. About 50 ms at width 512.
    """
    weather, height = WEATHERS[city.look.weather], width // 2
    bearings = (np.arange(width) + 0.5) * 2 * math.pi / width
    slope = np.tan((0.5 - (np.arange(height) + 0.5) / height) * math.pi)[:, None]
    distance, owner, front = city.cast(spot, bearings)
    rays = Rays(bearings, slope, distance, owner, front, EYE + slope * distance)

    up = np.clip(slope / 1.2, 0, 1)[..., None]
    horizon = np.array(weather.horizon)
    image = horizon * (1 - up) + np.array(weather.sky) * up + np.zeros((height, width, 1))
    wall, roof = paint_houses(city.look, weather, rays)
    image = np.where(((rays.level >= 0) & (rays.level <= roof))[..., None], wall, image)
    rows, columns = np.nonzero(rays.level < 0)
    image[rows, columns] = paint_ground(city, weather, spot, rays, rows, columns)

    # haze: clear = 1/2 ** (depth / haze); what is not clear has the colour of the horizon
    depth = np.where(rays.level < 0, EYE / np.maximum(-slope, 1e-6), distance)
    clear = 0.5 ** (np.minimum(depth, distance) / weather.haze)
    clear = np.where(rays.level > roof, 1, clear)[..., None]
    image = image * clear + horizon * (1 - clear)
    for metres, bearing, place in reversed(city.in_sight(spot, 70)):        # far ones first
        hang_sign(image, city.look, weather, metres, bearing, place)
    return np.clip(image, 0, 255).astype(np.uint8)


def scatter(*numbers):
    """A number in [0, 1) from integer arrays: the same house looks the same from everywhere."""
    value = np.zeros((), dtype=np.uint32)
    for number in numbers:
        value = (value ^ np.asarray(number).astype(np.int64).astype(np.uint32)) * np.uint32(
            2654435761)
        value = value ^ (value >> np.uint32(15))
    return (value & np.uint32(0xFFFF)) / 65536.0


def paint_houses(look, weather, rays):
    """Colours of the fronts, (H, W, 3) as if they had no end above, and their roofs (W,) metres.

    Houses are 9 m wide, with a colour and 2 to 5 storeys of their own, darker away from the sun.
    """
    house = np.floor(rays.front / 9)
    roof = STOREY * (2 + np.floor(4 * scatter(rays.owner, house, look.seed)))
    hue, saturation, brightness = look.house
    paint = np.array([colorsys.hsv_to_rgb((hue + h) % 1, saturation, min(1, brightness * b))
                      for h, b in zip(0.07 * scatter(rays.owner, house, 1) - 0.035,
                                      0.8 + 0.35 * scatter(rays.owner, house, 2))])     # (W, 3)
    wall = 255 * paint * (0.86 + 0.14 * np.cos(rays.bearings - 2))[:, None]

    storey, inside = np.divmod(rays.level / STOREY, 1)      # which storey, and how high in it
    pane, beside = np.divmod(rays.front / 2.25, 1)          # which window of the row, and where
    window = (np.abs(beside - 0.5) < 0.24) & (np.abs(inside - 0.52) < 0.25) & (storey >= 1)
    glow = window & (scatter(rays.owner[None], pane[None], storey) < weather.lit)
    shop = (storey < 1) & (np.abs(beside - 0.5) < 0.4) & (inside < 0.78)
    edge = (np.abs(rays.front / 9 - house - 0.5) > 0.485) | (rays.level > roof - 0.35) | (
        (storey == 1) & (inside < 0.08))
    wall = np.where(window[..., None], (64, 76, 92), wall)
    wall = np.where(shop[..., None], (52, 58, 66), wall)
    wall = np.where(edge[..., None], wall * 0.6, wall) * weather.light
    return np.where(glow[..., None], (255, 214, 130), wall), roof


def paint_ground(city, weather, spot, rays, rows, columns):
    """Colours (M, 3) of the M pixels that see the ground.

    A road with a broken middle line and zebra crossings runs between lighter pavements. A ray that
    falls by `slope` a metre from EYE metres up meets the ground after EYE / -slope metres.
    """
    reach = -EYE / rays.slope[rows, 0]                                                  # (M,)
    towards = np.stack([np.sin(rays.bearings), np.cos(rays.bearings)], 1)[columns]
    point = spot + reach[:, None] * towards
    close, streets = reach < 45, np.flatnonzero(city.away(spot) < 60)
    offset = point[close, None] - city.start[streets]                                   # (m, n, 2)
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
    return np.minimum(grey[:, None] * weather.ground, 250)


def hang_sign(image, look, weather, metres, bearing, place):
    """Draw into image (H, W, 3) the board of a place, facing the walker at a bearing in degrees.

    A length of `size` metres takes the angle atan(size / distance).
    """
    height, width, _ = image.shape
    sign = draw_sign(place.name, place.kind, look.sign)
    wide = 4.8 if look.sign == "banner" else 7.2            # metres
    tall, apart = wide * sign.shape[0] / sign.shape[1], max(metres, 3)
    half = math.degrees(math.atan2(wide / 2, apart))
    left, right = (round((bearing + side * half) / 360 * width) for side in (-1, 1))
    top, bottom = (round((0.5 - math.atan2(z - EYE, apart) / math.pi) * height)
                   for z in (3 + tall, 3))
    size = (max(1, right - left), max(1, bottom - top))
    board = np.asarray(Image.fromarray(sign).resize(size, Image.Resampling.BOX), np.float64)
    area = np.ix_(np.arange(top, top + size[1]), np.arange(left, left + size[0]) % width)
    glare = 1.0 if look.sign == "neon" else np.maximum(weather.light, 0.7)
    clear, alpha = 0.5 ** (metres / weather.haze), board[..., 3:] / 255
    colour = board[..., :3] * glare * clear + np.array(weather.horizon) * (1 - clear)
    image[area] = image[area] * (1 - alpha) + alpha * colour


@functools.lru_cache(maxsize=512)
def draw_sign(name, kind, style):
    """The sign of a place, (h, w, 4) uint8. Its colour tells the kind, its shape the city."""
    hue, saturation, brightness = kind / 12, 0.9 - 0.35 * (kind % 2), 0.85 - 0.25 * (kind % 3 == 2)
    colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, brightness))
    white, paper, black = (255, 255, 255), (246, 244, 236), (16, 16, 22)
    plate, ink = {"frame": (paper, colour), "neon": (black, colour)}.get(style, (colour, white))
    width, height = (128, 128) if style == "banner" else (192, 76)
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    shape = draw.ellipse if style == "oval" else draw.rectangle
    shape((0, 0, width - 1, height - 1), fill=plate, outline=ink,
          width=10 if style in ("frame", "neon") else 3)
    for line, word in enumerate(name.split()[:2]):
        font = ImageFont.load_default(min(34, 1.6 * width / (len(word) + 1)))
        draw.text((width / 2, height * (0.31 + 0.38 * line)), word, ink, font, anchor="mm")
    return np.asarray(image)


# ------------------------------------------------------------------------------------------------
# 6. The files of the released format
# ------------------------------------------------------------------------------------------------


def city_files(name, width=512):
    """The files of a generated city, made when asked for. width: of the panoramas, pixels.

    Returns a function load(file, limit=-1): the bytes of a file by its name, as they would stand in
    the city's folder. (Of a real folder one may ask for the first `limit` bytes only. Here every
    file is made whole.) Raises ValueError for an unknown city.
    """
    city, made = build_city(name), {}

    def load(file, limit=-1):
        """The bytes of one file."""
        if file not in made:
            made[file] = make_file(city, name, file, width)
        return made[file]
    return load


def make_file(city, name, file, width):
    """The bytes of one file of the released format; panorama i is called NAME-i."""
    if file == "route_infos.json":
        return json.dumps(draw_routes(city)).encode()
    if file == "gps_pano_mapping.pkl":
        mapping = {tuple(geocode(spot)): f"{name}-{i:04d}" for i, spot in enumerate(city.spots)}
        return pickle.dumps(mapping, protocol=4)
    panorama, _, kind = file.removeprefix("street_views/").partition(".")
    rotation = zlib.crc32(panorama.encode()) % 360      # cameras are not mounted to the north
    if kind == "metadata.json":
        return json.dumps({"rotation": rotation}).encode()
    pixels = draw_panorama(city, city.spots[int(panorama.rsplit("-", 1)[1])], width)
    stream = io.BytesIO()
    Image.fromarray(np.roll(pixels, round(rotation / 360 * width), axis=1)).save(
        stream, "JPEG", quality=88)
    return stream.getvalue()


def write_city(name, folder, width=512):
    """Write a generated city into a folder, in the released format, street views included.

    width: of the panoramas, pixels. Raises ValueError for an unknown city, and OSError.
    """
    load, folder = city_files(name, width), pathlib.Path(folder)
    files = ["route_infos.json", "gps_pano_mapping.pkl"]
    for i in range(len(build_city(name).spots)):
        files += [f"street_views/{name}-{i:04d}{end}" for end in (".jpg", ".metadata.json")]
    (folder / "street_views").mkdir(parents=True, exist_ok=True)
    for file in tqdm(files, unit="file", disable=None):
        (folder / file).write_bytes(load(file))


# ------------------------------------------------------------------------------------------------
# 7. A map for people
# ------------------------------------------------------------------------------------------------


def draw_map(panoramas, points, places, size=900):
    """The surroundings of a route from above, north up, for any city: an image of size x size.

    Coordinates are (latitude, longitude). panoramas (P, 2): where there are some is a street, in
    grey. points: of the walk, in red from its green start. places: (name, coordinates) of its
    landmarks, in blue.
    """
    points = np.array(points)
    scale = np.array([1, math.cos(math.radians(points[0, 0]))]) * 111_320
    middle = (points.min(0) + points.max(0)) / 2
    reach = max(np.ptp(points, axis=0) * scale) / 2 + 90            # metres from middle to border
    image = Image.new("RGB", (size, size), (233, 228, 216))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)

    def pixel(coordinate):
        """(x, y) of a coordinate."""
        north, east = (np.asarray(coordinate) - middle) * scale / reach
        return float(size / 2 * (1 + east)), float(size / 2 * (1 - north))

    def dot(coordinate, radius, colour):
        """Draw a circle."""
        x, y = pixel(coordinate)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    for coordinate in panoramas:
        dot(coordinate, max(3, 7 * size / 2 / reach), (190, 190, 196))
    draw.line([pixel(point) for point in points], fill=(205, 40, 40), width=4)
    for i, point in enumerate(points):
        dot(point, 9, (205, 40, 40) if i else (20, 130, 60))
        draw.text(pixel(point), str(i) if i else "S", (255, 255, 255), font, anchor="mm")
    for name, coordinate in places:
        dot(coordinate, 4, (40, 70, 190))
        x, y = pixel(coordinate)
        draw.text((x + 7, y), name, (20, 40, 130), font, anchor="lm")
    return image


# ------------------------------------------------------------------------------------------------
# 8. Command line
# ------------------------------------------------------------------------------------------------


def main():
    """Write a city. Returns the exit code: 0 fine, 2 bad name or folder."""
    parser = argparse.ArgumentParser(description="Write a generated city in the released format.")
    parser.add_argument("city", help=f"{', '.join(CITIES)} or wild-N")
    parser.add_argument("folder", help="where to write it")
    parser.add_argument("--width", type=int, default=512,
                        help="of the panoramas, pixels (default 512)")
    args = parser.parse_args()
    try:
        write_city(args.city, args.folder, args.width)
    except (ValueError, OSError) as problem:
        print(f"generate.py: {problem}", file=sys.stderr)
        return 2
    print(f"Now try: python virl_env.py --routes {shlex.quote(str(args.folder))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
