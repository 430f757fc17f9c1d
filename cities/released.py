"""Routes in the format of the paper's released data, read and checked.

Whoever walks (virl_env.py) sees an `Atlas`: all routes of one place. It is read by the same lines
whether the place is a folder with downloaded files or a city of generate.py that was never written
to disk: both are a function from a file's name to its bytes.

    route_infos.json              [[route, ...], int]
    gps_pano_mapping.pkl          {(latitude, longitude): panorama id}
    street_views/ID.jpg           panorama of 360 x 180 degrees
    street_views/ID.metadata.json {"rotation": degrees}: the column of heading h is (h + rotation)

Of a route we use: start_place.relocated_geocode, init_heading (0: random at each reset),
route_results.geocode_list (the N points after the start; the last is the destination), and
milestone_info, one text with N blocks: block i has the heading from point i to point i+1 and the
landmarks at point i+1.

Files are hostile: nothing is unpickled that names a class, and no id leads out of the folder.
"""

import functools
import io
import json
import math
import pathlib
import pickle
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cities.generate import COMPASS

NOTHING = "no landmark here"
INFOS, MAPPING = "route_infos.json", "gps_pano_mapping.pkl"
POINTS_BETWEEN = 5      # a leg is cut in five; where a panorama is near, the rail may visit it
NEAR_END = 8.0          # metres; points as near as this to an end of their leg are left out
SHORT_LEG = 5.0         # metres; legs up to this length get no points
REACH = 20.0            # metres from a coordinate to the panorama that may stand for it


@dataclass(frozen=True)
class Route:
    """One route. Lists of points have N + 1 entries, the start first; legs lie between points."""

    index: int
    init_heading: int       # degrees; 0 means random at each reset
    points: tuple           # (latitude, longitude)
    panoramas: tuple        # panorama id of each point
    headings: tuple         # (N,) degrees from point i to point i + 1
    words: tuple            # (N,) the compass word that the data gives for it
    landmarks: tuple        # what is to be seen at each point; NOTHING at the start
    between: tuple          # (N,) panorama ids of the points that the rail may visit on each leg


class RouteProblem(ValueError):
    """Data that cannot be used. Its one line of text names the file, and the route where known."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, tuples, floats and strings. A pickle that names a class or function is refused:
    unpickling would import and CALL it, which is how a data file runs code on your machine."""

    def find_class(self, module, name):
        """Refuse."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")


def folder_files(folder):
    """The `load` function of a folder: load(name, limit) gives the first `limit` bytes or all."""
    def load(name, limit=-1):
        """The bytes of a file. Raises RouteProblem."""
        try:
            with open(pathlib.Path(folder) / name, "rb") as stream:
                return stream.read(limit)
        except OSError as error:
            raise RouteProblem(f"{folder}/{name}: {error.strerror}") from None
    return load


def metres(a, b):
    """Distance of coordinates (latitude, longitude). a: two floats; b: (..., 2) -> (...).

    One degree of latitude is 111,320 m, of longitude cos(latitude) as much.
    """
    apart = np.asarray(b, dtype=np.float64) - np.asarray(a)
    return 111_320 * np.hypot(apart[..., 0], apart[..., 1] * math.cos(math.radians(a[0])))


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
    """All routes of one place.

    load: function from a file's name to its bytes, a folder's (`folder_files`) or a generated
    city's (`city_files`). where: what to call it in messages. pictures: check that every panorama
    is there that a rail can visit, before a night of training. Raises RouteProblem.
    """

    def __init__(self, load, where, pictures=False):
        self.load, self.where = load, where
        self.coordinates, self.ids = self._read_mapping()
        # many routes pass by one corner and go along one street
        self._nearest, self._between = map(functools.cache, (self._nearest, self._between))
        infos, self.routes = load(INFOS), []
        try:
            routes, _ = json.loads(infos)
            for raw in routes:
                self.routes.append(self._read_route(raw))
        except Exception as error:      # what is not as the format says can raise nearly anything
            raise RouteProblem(f"{where}/{INFOS}, route {len(self)}: {error!r}") from None
        self.visited = {panorama for route in self.routes
                        for panorama in route.panoramas + sum(route.between, ())}
        if pictures:
            for panorama in sorted(self.visited):
                self._street_view(panorama, 2)

    def __len__(self):
        return len(self.routes)

    def route(self, index):
        """Route number `index`."""
        return self.routes[index]

    def panorama(self, panorama):
        """(pixels (H, W, 3) uint8, rotation in degrees) of a panorama id. Raises RouteProblem."""
        data, rotation = self._street_view(panorama)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), rotation

    def _street_view(self, panorama, limit=-1):
        """(the first `limit` bytes of the picture, or all; rotation) of a panorama."""
        file = f"street_views/{panorama}.metadata.json"
        data = self.load(file)
        try:
            rotation = float(json.loads(data)["rotation"])
        except Exception:
            raise RouteProblem(f"{self.where}/{file}: no rotation, in degrees") from None
        return self.load(f"street_views/{panorama}.jpg", limit), rotation

    def _read_mapping(self):
        """Coordinates (P, 2) of all panoramas, from south to north, and their P ids."""
        file, data = f"{self.where}/{MAPPING}", self.load(MAPPING)
        try:
            mapping = _PlainUnpickler(io.BytesIO(data)).load()
            keys = sorted(mapping)
            coordinates = np.array(keys, float).reshape(-1, 2)
            for panorama in mapping.values():
                # The id becomes part of a file's name: it must not lead out of the folder.
                if not re.fullmatch(r"[\w:=-][\w.:=-]{0,99}", panorama):
                    raise ValueError(f"{panorama[:60]!r} is not a panorama id")
        except Exception as error:      # a damaged pickle can raise nearly anything
            raise RouteProblem(f"{file}: {error!r}") from None
        return coordinates, [mapping[key] for key in keys]

    def _read_route(self, raw):
        """The next route of the JSON file, snapped to panoramas."""
        points = [raw["start_place"]["relocated_geocode"], *raw["route_results"]["geocode_list"]]
        headings, words, landmarks = [], [], [NOTHING]
        for block in parse_milestones(raw["milestone_info"]):
            given = block.get("to_next_intersection_heading", "")
            match = re.fullmatch(r"(-?\d+)(?:\.\d+)? *\((\w+)\)", given)
            if not match or match.group(2) not in COMPASS:
                raise ValueError(f"the heading is {given[:40]!r}, not like '298 (northwest)'")
            headings.append(int(match.group(1)) % 360)
            words.append(match.group(2))
            seen = " ".join(block.get("landmarks", "").split()).rstrip(".")
            seen = seen.replace('"', "'").replace("\\", "/")    # JSON answers need no escapes
            nothing = not seen or seen.lower().startswith("no landmark")
            landmarks.append(NOTHING if nothing else seen)
        if len(headings) != len(points) - 1 or not headings:
            raise ValueError(f"{len(headings)} milestones for {len(points) - 1} points")
        spots = [self._nearest(tuple(point)) for point in points]
        if None in spots:
            raise ValueError(f"no panorama within {REACH:.0f} m of {points[spots.index(None)]}")
        points = [tuple(self.coordinates[i].tolist()) for i in spots]
        return Route(len(self.routes), int(raw.get("init_heading", 0)) % 360, tuple(points),
                     tuple(self.ids[i] for i in spots), tuple(headings), tuple(words),
                     tuple(landmarks), tuple(map(self._between, points, points[1:])))

    def _nearest(self, point):
        """Index of the panorama that is nearest to a coordinate, None if none is within REACH."""
        # only those in a strip of latitudes can be that near, and they stand side by side
        strip = np.array([-REACH, REACH]) / 111_320 + point[0]
        first, last = np.searchsorted(self.coordinates[:, 0], strip)
        if first == last:
            return None
        away = metres(point, self.coordinates[first:last])
        best = int(away.argmin())
        return int(first) + best if away[best] < REACH else None

    def _between(self, start, end):
        """Panorama ids on a leg, before any is dropped: the rail as the released code lays it."""
        if metres(start, end) <= SHORT_LEG:
            return ()
        found = []
        for i in range(1, POINTS_BETWEEN + 1):
            share = i / POINTS_BETWEEN
            at = self._nearest(tuple(a + (b - a) * share for a, b in zip(start, end)))
            if at is None or self.ids[at] in found:     # the same spot twice would be no step
                continue
            spot = self.coordinates[at]
            if min(metres(start, spot), metres(end, spot)) > NEAR_END:
                found.append(self.ids[at])
        return tuple(found)
