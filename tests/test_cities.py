"""Tests of cities/generate.py: streets, routes, drawing, and the files of a city.

The cities are held against brute force: distances by small steps along each ray, signs by drawing
a panorama with and without them.

    python -m pytest tests/test_cities.py
"""

import ast
import collections
import json
import math
import sys

import numpy as np
import pytest
from test_virl_env import METRE, digest, play

from cities import generate
from cities.generate import (AROUND, CITIES, HALF_STREET, SIGHT, build_city, city_files,
                             draw_panorama, look_of)
from virl_env import NOTHING, RULES, Atlas, Navigation, bend, folder_files, open_atlas, view


def test_cities_know_nothing_of_the_pipeline():
    """A city needs the environment that walks in it: one cannot be read without the other."""
    with open(generate.__file__) as file:
        tree = ast.parse(file.read())
    imported = {(getattr(node, "module", None) or node.names[0].name).split(".")[0]
                for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert imported - set(sys.stdlib_module_names) == {"numpy", "PIL", "tqdm"}


@pytest.mark.parametrize("name, routes, mapping", [
    ("Alder", "25d499bd0d1d093e", "c0f6298111a2faae"),
    ("Calla", "20daa659cab11c20", "c22602980426dc73"),
    ("Dorn", "9d3a5c20bd8d2b77", "77a78ba46543a6d1"),
    ("wild-3", "21085d25a98a8303", "27ddcf4399163b20")])
def test_routes_are_those_of_the_results(name, routes, mapping):
    """A draw more or less: every city is another, and no run of results/ can be repeated."""
    load = city_files(name)
    assert digest(load("route_infos.json").decode()) == routes
    assert digest(load("gps_pano_mapping.pkl").hex()) == mapping


@pytest.mark.parametrize("name, spot, expected", [("Alder", 5, "6899b2d26e32bc50"),
                                                  ("Dorn", 40, "d74f4f3eee67870c"),
                                                  ("Esker", 77, "bad0d8bc0c411686")])
def test_panoramas_are_those_of_the_results(name, spot, expected):
    """A pixel has changed: the shipped eyes have learnt to see in other streets."""
    city = build_city(name)
    assert digest(draw_panorama(city, city.spots[spot])) == expected


@pytest.mark.parametrize("name", CITIES)
def test_street_plans_are_no_plain_grids(name):
    """All crossings have four ways, streets two directions, or streets cross without a corner."""
    city = build_city(name)
    ways = collections.Counter(map(len, city.near))
    assert min(ways[3], ways[4]) >= 10 and ways[5] >= 1
    directions = np.degrees(np.arctan2(*city.along.T)) % 90
    assert np.histogram(directions, 9, (0, 90))[0].min() > 0
    for corner, near in enumerate(city.near):
        out = [city.corners[other] - city.corners[corner] for other in near]
        for i, u in enumerate(out):
            for v in out[:i]:
                assert u @ v < 0.75 * np.hypot(*u) * np.hypot(*v)       # at least 41 degrees apart
    ends = city.corners[city.streets]                                   # (S, 2, 2)
    for i, (a, b) in enumerate(ends):
        for c, d in ends[:i]:
            def side(p, q, r):
                return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])
            assert not (side(a, b, c) * side(a, b, d) < -1 and side(c, d, a) * side(c, d, b) < -1)


@pytest.mark.parametrize("name", CITIES)
def test_routes_are_hard_and_true(name):
    """A route has too few turns, goes straight on, or has a landmark on the other side."""
    atlas, city = open_atlas(name), build_city(name)
    assert {len(route.headings) for route in atlas.routes} == set(range(2, 9))
    landmarks = [text for route in atlas.routes for text in route.landmarks[1:]]
    assert 0.01 < np.mean([text == NOTHING for text in landmarks]) < 0.3
    assert max(collections.Counter(place.name for place in city.places).values()) >= 3      # chains
    for route, raw in zip(atlas.routes, json.loads(atlas.load("route_infos.json"))[0]):
        for before, after in zip(route.headings, route.headings[1:]):
            assert 23 <= abs(bend(before, after)) <= 157
        places = raw["route_results"]["landmark_list"] + [raw["dest_place"]]
        for i, place in enumerate(places):
            if place is None:
                assert route.landmarks[i + 1] == NOTHING
                continue
            here, there = np.array(route.points[i + 1]), np.array(place["geocode"])
            north, east = (there - here) * (1, math.cos(math.radians(40))) / METRE
            assert math.hypot(north, east) < SIGHT + 1
            off = bend(route.headings[i], math.degrees(math.atan2(east, north)))
            side = route.landmarks[i + 1].rsplit(" ", 1)[1]
            assert abs(bend({"front": 0, "right": 90, "back": 180, "left": -90}[side], off)) < 47
            assert place["name"] in route.landmarks[i + 1]


def test_cities_differ_in_every_way():
    """Two cities share names or look the same: the visual OOD test would be ID."""
    looks = list(CITIES.values())
    assert len({word for look in looks for word in look.words.split()}) == 100
    means = []
    for name in CITIES:
        city = build_city(name)
        views = [draw_panorama(city, spot, 96)[12:36] for spot in city.spots[:8]]   # +-45 degrees
        means.append(np.mean(views, axis=(0, 1, 2)))
    assert min(np.abs(a - b).max() for i, a in enumerate(means) for b in means[:i]) > 5
    for other in looks[1:]:
        assert sum(a != b for a, b in zip((other.sign, other.weather, other.plan),
                                          (looks[0].sign, looks[0].weather, looks[0].plan))) >= 1


def test_cast_agrees_with_small_steps():
    """Sight ends in the middle of a street, or goes through houses."""
    city, chance = build_city("Dorn"), np.random.default_rng(0)
    steps = np.arange(0.1, 90, 0.1)
    for spot in city.spots[chance.integers(len(city.spots), size=4)]:
        bearings = chance.uniform(0, 2 * math.pi, 12)
        for bearing, reach in zip(bearings, city.cast(spot, bearings)[0]):
            at = spot + steps[:, None] * (math.sin(bearing), math.cos(bearing))
            corner = np.hypot(*np.moveaxis(at[:, None] - city.corners, -1, 0)).min(1)
            free = (city.away(at) < HALF_STREET).any(1) | (corner < AROUND)
            assert abs(min(reach, 90) - (90 if free.all() else steps[free.argmin()])) < 0.5


def test_signs_stand_at_their_bearing_and_shrink_with_distance():
    """A sign is drawn where no place is: what the text says cannot be seen."""
    city, checked = build_city("Alder"), 0
    for spot in city.corners[:9]:
        seen = city.in_sight(spot, 70)
        if len(seen) < 1 or seen[0][0] > 40 or len(seen) > 1 and abs(
                bend(seen[0][1], seen[1][1])) < 40:
            continue
        pixels, places = draw_panorama(city, spot, 512).astype(int), city.places
        city.places = [place for place in places if place is not seen[0][2]]
        without = draw_panorama(city, spot, 512)
        city.places = places
        columns = np.flatnonzero(np.abs(pixels - without).max((0, 2)) > 8)
        middle = np.degrees(np.angle(np.exp(2j * math.pi * (columns + 0.5) / 512).mean()))
        assert abs(bend(seen[0][1], middle)) < 1.5
        wide = math.degrees(2 * math.atan(3.6 / seen[0][0]))
        assert abs(len(columns) * 360 / 512 - wide) < 2
        checked += 1
    assert checked == 7


def test_the_rotation_in_the_metadata_is_that_of_the_picture():
    """Files are turned the other way than their metadata says: landmarks appear elsewhere."""
    atlas, city, rotations = open_atlas("Alder"), build_city("Alder"), set()
    for index in (3, 20, 47):
        pixels, rotation = atlas.panorama(f"Alder-{index:04d}")
        rotations.add(rotation)
        plain = draw_panorama(city, city.spots[index])
        for heading in (0, 100, 250):
            apart = view(pixels, rotation, heading, 64, 32).astype(int) - view(
                plain, 0, heading, 64, 32)
            other = view(pixels, -rotation, heading, 64, 32).astype(int) - view(
                plain, 0, heading, 64, 32)
            assert np.abs(apart).mean() < 6 < np.abs(other).mean()
    assert len(rotations) == 3


def test_streets_open_where_they_leave():
    """Fronts stand across a street: the openings do not show where one can go."""
    city = build_city("Hollis")
    for corner, near in enumerate(city.near):
        to = city.corners[near] - city.corners[corner]
        if len(near):
            distance = city.cast(city.corners[corner], np.arctan2(*to.T))[0]
            assert (distance >= np.hypot(*to.T)).all()


def test_written_and_read_back_bit_for_bit(tmp_path, capsys, monkeypatch):
    """The city on disk gives other episodes than the city in memory."""
    name = "Calla"
    # a panorama to tell its spot by is enough, and drawn at once
    monkeypatch.setattr(generate, "draw_panorama", lambda city, spot, width: np.random.default_rng(
        int(1000 * abs(spot).sum())).integers(256, size=(width // 2, width, 3), dtype=np.uint8))
    monkeypatch.setattr(sys, "argv", ["generate.py", name, str(tmp_path), "--width", "32"])
    assert generate.main() == 0 and f"--routes {tmp_path}" in capsys.readouterr().out
    memory = Atlas(city_files(name, 32), name)
    disk = Atlas(folder_files(tmp_path), str(tmp_path), pictures=True)
    assert memory.routes == disk.routes and len(disk.visited) > 500
    for rule in RULES:
        envs = [Navigation(atlas, rule, "test", picture=(24, 16)) for atlas in (memory, disk)]
        for seed in range(6):
            one, two = (play(env, seed)[0] for env in envs)
            assert one == two and one[0][1] is not None


def test_wild_cities_are_none_of_the_ten():
    """The backbone has walked in a test city: the visual OOD is none."""
    for number in range(4):
        look = look_of(f"wild-{number}")
        assert look == look_of(f"wild-{number}") != look_of(f"wild-{number + 1}")
        assert look.seed not in {other.seed for other in CITIES.values()}
        assert set(look.words.split()) <= set(generate.WORDS) and len(look.words.split()) == 24


@pytest.mark.parametrize("name", ["wild-", "Alder2"])
def test_unknown_city(name, tmp_path, capsys, monkeypatch):
    """A misspelt name grows a city of its own, or ends in a traceback."""
    monkeypatch.setattr(sys, "argv", ["generate.py", name, str(tmp_path / "new")])
    assert generate.main() == 2 and not (tmp_path / "new").exists()
    assert capsys.readouterr().err.count("\n") == 1
