"""Tests of results/plot.py: runs into arms, curves, intervals, tables, figures.

    python -m pytest tests/test_plot.py
"""

import doctest
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import evaluate
import sft
from results import plot
from test_sft import assert_one_line, command, shown


def write_run(folder, kind, seed, values, task="gp-l", counts=(100,), more=None, **flags):
    """A finished run with the same measures in three cells at each step. values: {step: rate}.

    counts: tries behind the rates of walks, checkpoint by checkpoint. more: measures beside these.
    """
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(
        {"kind": kind, "seed": seed, "task": task} | flags))
    rows = [{"step": step, "hands": 100, "flops_spent": 1e12 * (step + 1), "cells": {
        cell: {"success": rate, "numbers_read": rate / 2, "per_step": rate, "per_step_on": rate,
               "turns": rate, "steps": count, "steps_on": count, "turn_tries": count}
        | (more or {}) for cell in ("seen/id", "held-out/id", "held-out/ood")}}
        for (step, rate), count in zip(values.items(), itertools.cycle(counts))]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arms_in(folder, task="gp-l"):
    """All arms below a folder, named, with their starts."""
    arms = plot.name_arms(plot.group(plot.read_runs([folder], task)))
    plot.find_starts(arms)
    return arms


def lines_of(arms, task="gp-l"):
    """The table as ({heading: column number}, {(cell, words): [level, ...]})."""
    head, _, *lines = plot.table(arms, task).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in [head, *lines]]
    assert len({len(row) for row in rows}) == 1, "a ragged table"
    return ({name: i for i, name in enumerate(rows[0])},
            {tuple(row[0].split(", ", 1)): row for row in rows[1:]})


def test_examples_of_the_docstrings():
    """Catches an example that the code has left behind."""
    failed, tried = doctest.testmod(plot)
    assert tried >= 5 and not failed


# ------------------------------------------------------------------------------------------------
# Arms
# ------------------------------------------------------------------------------------------------


def test_rates_are_arms_of_their_own(tmp_path):
    """Catches runs of SFT at several rates pooled, or an arm that does not tell its rate."""
    for seed in (0, 1):
        for lr in (1e-3, 1e-4):
            write_run(tmp_path / f"sft{lr}{seed}", "sft", seed, {10: lr}, lr=lr, steps=630,
                      model=f"/far/start-s{seed}/step-000060")
        write_run(tmp_path / f"rl{seed}", "rl", seed, {0: 0.1, 10: 0.5}, lr=1e-5, tries=5)
    arms = arms_in(tmp_path)
    assert [arm.label for arm in arms] == ["SFT 1e-4", "SFT 1e-3", "RL"]
    assert [sorted(arm.runs) for arm in arms] == [[0, 1]] * 3
    assert len({arm.colour for arm in arms}) == 3
    assert [arm.ends[0]["cells"]["seen/id"]["success"] for arm in arms] == [1e-4, 1e-3, 0.5]


@pytest.mark.parametrize("flags, others, labels", [
    ({"tries": 5}, {"tries": 1}, ["RL, tries 1", "RL, tries 5"]),
    ({"lr": 1e-4, "tries": 5}, {"lr": 3e-4, "tries": 1}, ["RL 1e-4, tries 5", "RL 3e-4, tries 1"]),
    ({"from_backbone": False}, {"from_backbone": True}, ["RL", "RL, from-backbone"]),
    ({"announce": True}, {"announce": False}, ["RL", "RL, no-announce"]),
    ({"init": None}, {"init": "/a/b/s1/step-1"}, ["RL", "RL, init s*/step-1"]),
    ({"init": "/a/s1/x"}, {"init": "/a/s0/x"}, ["RL, init s0/x", "RL, init s1/x"]),
    ({"lr": 0.1, "clip": 0.2}, {"lr": 0.1}, ["RL"]),        # a flag that one does not know
])
def test_labels_say_what_sets_arms_apart(tmp_path, flags, others, labels):
    """Catches two arms under one name, and a name that tells more than the difference."""
    write_run(tmp_path / "a", "rl", 0, {0: 0.1}, **flags)
    write_run(tmp_path / "b", "rl", 1, {0: 0.1}, **others)
    assert sorted(arm.label for arm in arms_in(tmp_path)) == sorted(labels)


def test_blind_sft_is_an_arm_of_its_own(tmp_path):
    """Catches runs that never saw a picture pooled with those that did, or given their start."""
    write_run(tmp_path / "a", "sft", 0, {10: 0.9})
    write_run(tmp_path / "b", "sft", 0, {10: 0.1}, drop_pictures=True)
    write_run(tmp_path / "c", "rl", 0, {0: 0.1, 10: 0.5})
    arms = arms_in(tmp_path)
    assert [arm.label for arm in arms] == ["SFT", "SFT, pictures dropped", "RL"]
    assert [len(plot.curve(arm, "seen/id")) for arm in arms] == [2, 1, 2]
    assert [round(arm.ends[0]["cells"]["held-out/ood"]["success"], 1) for arm in arms] == [
        0.9, 0.1, 0.5]
    assert [arm.dashed for arm in arms] == [False, True, False]


def test_arms_of_one_seed_are_left_out_by_name(tmp_path, capsys):
    """Catches an ablation drawn beside the comparison unasked, or dropped without a word."""
    for seed in (0, 1):
        write_run(tmp_path / f"rl{seed}", "rl", seed, {0: 0.1, 10: 0.5}, from_backbone=False)
    write_run(tmp_path / "bare", "rl", 0, {0: 0.0, 10: 0.0}, from_backbone=True)
    write_run(tmp_path / "twice", "rl", 1, {0: 0.9, 10: 0.9}, from_backbone=False)
    arms = arms_in(tmp_path)
    assert "twice, the same settings and --seed as" in capsys.readouterr().out
    assert [arm.label for arm in plot.choose(arms)] == ["RL"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and 'bare, as it is of one seed; --only "RL, from-b' in said
    assert [arm.label for arm in plot.choose(arms, ["RL, *"])] == ["RL, from-backbone"]
    assert len(plot.choose(arms, ["*"])) == 2 and not capsys.readouterr().out
    with pytest.raises(sft.Problem, match="RL, from-backbone"):
        plot.choose(arms, ["rl"])
    assert plot.choose(arms[1:]) == arms[1:]            # there are none of more


def test_each_arm_of_sft_is_compared_with_its_own_start(tmp_path):
    """Catches gains over another setting's start: another checkpoint, or announced walks."""
    write_run(tmp_path / "rl", "rl", 0, {0: 0.1, 9: 0.5}, init=None, announce=True)
    write_run(tmp_path / "no", "rl", 0, {0: 0.2, 9: 0.5}, init=None, announce=False)
    write_run(tmp_path / "on", "rl", 0, {0: 0.3, 9: 0.5}, init="runs/s0/step-1", announce=True)
    for name, flags in (("a", {"model": "backbones/gp", "announce": True}),
                        ("b", {"model": "backbones/gp", "announce": False}),
                        ("c", {"model": "runs/s0/step-1", "announce": True})):
        write_run(tmp_path / name, "sft", 0, {9: 0.4}, **flags)
    found = {(arm.settings["model"], arm.settings["announce"]):
             arm.start[0]["cells"]["seen/id"]["success"]
             for arm in arms_in(tmp_path) if arm.kind == "sft"}
    assert found == {("backbones/gp", True): 0.1, ("backbones/gp", False): 0.2,
                     ("runs/s*/step-1", True): 0.3}
    head, _ = lines_of(arms_in(tmp_path))
    assert sum(name.startswith("start") for name in head) == 3


def test_starts_of_one_recipe_make_one_arm(tmp_path):
    """Catches arms that fall apart by the digest in the name of each seed's start; and a run that
    cannot be drawn while its next line is being written."""
    for seed, digest in ((0, "f4db837b"), (1, "276899ce")):
        write_run(tmp_path / str(seed), "sft", seed, {9: 0.4},
                  model=f"runs/start-gp-l-s{seed}-{digest}/step-000060")
    (tmp_path / "1" / "eval.jsonl").open("a").write('{"step": 10, "ha')
    arm, = arms_in(tmp_path)
    assert sorted(arm.runs) == [0, 1]


def test_arms_that_differ_have_names_that_differ(tmp_path):
    """Catches one arm's level printed as another's."""
    for tries, episodes in ((1, 560), (5, 256), (5, 128)):
        write_run(tmp_path / f"{tries}-{episodes}", "rl", 0, {0: 0.1, 9: 0.4}, tries=tries,
                  episodes=episodes)
    assert len({arm.label for arm in arms_in(tmp_path)}) == 3


# ------------------------------------------------------------------------------------------------
# Curves
# ------------------------------------------------------------------------------------------------


def test_curve_is_mean_and_range_over_seeds(tmp_path):
    """Catches a mean over the seeds that are done so far, and rates that are not percent."""
    write_run(tmp_path / "a", "rl", 0, {10: 0.3, 0: 0.1, 20: 0.9})      # rows in any order
    write_run(tmp_path / "b", "rl", 1, {0: 0.2, 10: 0.5})               # still running
    write_run(tmp_path / "c" / "deep", "sft", 0, {5: 0.7})
    learnt, taught = arms_in(tmp_path)[::-1]
    assert plot.curve(learnt, "held-out/ood") == [
        (1e12, pytest.approx(15), pytest.approx(10), pytest.approx(20)),
        (11e12, pytest.approx(40), pytest.approx(30), pytest.approx(50))]
    assert plot.curve(taught, "seen/id", "numbers_read") == [       # from its own seed's start
        (1e12, pytest.approx(5), pytest.approx(5), pytest.approx(5)),
        (6e12, pytest.approx(35), pytest.approx(35), pytest.approx(35))]
    assert plot.curve(taught, "no such cell") == [] == plot.curve(taught, "seen/id", "nothing")
    # checkpoints before the start: the points stand in the order of compute
    write_run(tmp_path / "more" / "rl", "rl", 0, {0: 0.1})
    write_run(tmp_path / "more" / "sft", "sft", 0, {3: 0.3, 4: 0.4, 5: 0.5})
    early, late = arms_in(tmp_path / "more")
    late.runs[0].rows[0]["flops_spent"] = 4.5e12
    assert [spent for spent, *_ in plot.curve(early, "seen/id")] == [4e12, 4.5e12, 5e12, 6e12]


def test_one_measure_against_another_keeps_the_order_of_compute(tmp_path):
    """Catches points sorted along x, which would tell another story, and a band crossing itself."""
    write_run(tmp_path / "a", "rl", 0, {0: 0.1, 10: 0.3})
    write_run(tmp_path / "b", "rl", 1, {0: 0.2, 10: 0.5})
    arm, = arms_in(tmp_path)
    for run in arm.runs.values():
        for row in run.rows:
            row["cells"]["held-out/ood"]["read"] = 1 - row["cells"]["held-out/ood"]["success"]
    assert plot.curve_against(arm, "held-out/ood", "success", "read") == [
        pytest.approx((85, 15, 15, 15)), pytest.approx((60, 40, 40, 40))]


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


def test_table_by_hand(tmp_path):
    """Catches the first row taken for the last, a column under another's name, rates pooled."""
    write_run(tmp_path / "rl0", "rl", 0, {0: 0.1, 10: 0.5, 20: 0.8})
    write_run(tmp_path / "rl1", "rl", 1, {0: 0.2, 10: 0.5, 20: 0.6})
    write_run(tmp_path / "sft0", "sft", 0, {10: 0.9, 20: 0.4})
    head, lines = lines_of(arms_in(tmp_path))
    assert list(head)[1:4] == ["start", "SFT", "RL"]
    line = lines["held-out/ood", "in conversation"]
    assert line[1:4] == ["15.0 (10.0-20.0)", "40.0 (40.0-40.0)", "70.0 (60.0-80.0)"]
    # a seed is compared with its own start: SFT has no second one
    assert line[4].startswith("+30.0 [") and line[4].endswith("] (one seed)")
    (_, low, high), (_, other_low, other_high) = (
        evaluate.gain(80, 100, 10, 100), evaluate.gain(60, 100, 20, 100))
    below, above = (100 * math.hypot(*x) / 2
                    for x in ((0.7 - low, 0.4 - other_low), (high - 0.7, other_high - 0.4)))
    # two seeds, 70 and 40: t = 12.706, standard error 15
    assert line[5] == (f"+55.0 [{55 - below:+.1f}, {55 + above:+.1f}] "
                       f"({55 - 12.706 * 15:+.1f} to {55 + 12.706 * 15:+.1f})")
    assert set(lines) == {(cell, words) for cell in ("seen/id", "held-out/id", "held-out/ood")
                          for words in ("in conversation", "numbers read right")}


def test_t_interval_by_hand():
    """Catches a deviation over n instead of n - 1, and quantiles of one side only."""
    assert plot.t_interval([5.0]) is None
    assert plot.t_interval([1.0, 3.0]) == pytest.approx((2 - 12.706, 2 + 12.706))
    # 5 seeds: deviation sqrt(10 / 4), standard error sqrt(2.5 / 5)
    half = 2.776 * 0.5 ** 0.5
    assert plot.t_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - half, 3 + half))
    low, high = plot.t_interval([0.0, 1.0] * 6)         # beyond the table: never narrower
    assert low < 0.5 - 2.201 * (12 * 0.25 / 11 / 12) ** 0.5
    # each quantile leaves 2.5 % above it: t density of n - 1 degrees of freedom, in small steps
    for count, bound in plot.T_95.items():
        free = count - 1
        scale = math.gamma(count / 2) / math.gamma(free / 2) / math.sqrt(free * math.pi)
        x = np.linspace(0, bound, 200_001)
        inside = np.trapezoid(scale * (1 + x * x / free) ** (-count / 2), x)
        assert inside == pytest.approx(0.475, abs=1e-4), count


def test_value_of_the_message_by_hand(tmp_path):
    """Catches a difference the wrong way round, and intervals that are added up."""
    for seed in (0, 1):
        write_run(tmp_path / f"rl{seed}", "rl", seed, {0: 0.3, 10: 0.7},
                  more={"fresh": 0.4, "first_try": 0.2})
    arm, = arms_in(tmp_path)
    for run in arm.runs.values():
        run.rows[0]["cells"]["seen/id"]["fresh"] = 0.05
    _, lines = lines_of([arm])
    line = lines["seen/id", "value of the message"]         # 0.3 - 0.05, then 0.7 - 0.4
    assert line[1:3] == ["25.0 (25.0-25.0)", "30.0 (30.0-30.0)"]
    assert line[3].startswith("+5.0 [") and line[3].endswith("(+5.0 to +5.0)")
    line = lines["held-out/id", "value of the message"]
    assert line[1] == "-10.0 (-10.0 to -10.0)"
    talk, alone = evaluate.gain(70, 100, 30, 100), evaluate.gain(40, 100, 5, 100)
    assert plot.gained(arm.ends[0], arm.start[0], "seen/id", "message") == pytest.approx((
        0.05, 0.05 - math.hypot(0.4 - talk[1], alone[2] - 0.35),
        0.05 + math.hypot(talk[2] - 0.4, 0.35 - alone[1])))
    assert {words for _, words in lines} == {
        "first answer", "as many fresh answers", "in conversation", "value of the message",
        "numbers read right"}


def test_a_measure_that_some_arms_lack_leaves_a_gap(tmp_path):
    """Catches new measures that hide for one old run, and a traceback."""
    write_run(tmp_path / "old", "sft", 0, {10: 0.7})
    write_run(tmp_path / "new", "rl", 0, {0: 0.1, 10: 0.7}, more={"fresh": 0.4})
    head, lines = lines_of(arms_in(tmp_path))
    line = lines["seen/id", "as many fresh answers"]
    assert line[head["SFT"]] == "" and line[head["RL"]] == "40.0 (40.0-40.0)"
    assert line[-2] == "" and line[-1].startswith("+0.0")


def test_each_seed_counts_alike(tmp_path):
    """Catches a seed that counts less because its walks ended early: it has fewer tries."""
    for seed, (end, tries) in enumerate(((0.9, 1000), (0.1, 10))):
        write_run(tmp_path / str(seed), "rl", seed, {0: 0.5, 10: end}, "virl-l", [500, tries])
    arms = arms_in(tmp_path, "virl-l")
    _, lines = lines_of(arms, "virl-l")
    line = lines["held-out/ood", "right actions of all tries"]
    assert line[3].startswith("+0.0 [") and line[2] == "50.0 (10.0-90.0)"
    # the interval of a seed is that of its tries
    assert plot.gained(arms[0].ends[1], arms[0].start[1], "seen/id", "per_step") == evaluate.gain(
        1, 10, 250, 500)


def test_landmarks_count_where_there_are_some(tmp_path):
    """Catches the interval of all positions for the few that have a landmark."""
    more = {"landmarks_present": 0.2, "landmarks_empty": 0.9, "positions_present": 25,
            "positions_empty": 75, "positions": 100, "whole_right": 0.3}
    write_run(tmp_path / "rl", "rl", 0, {0: 0.5, 10: 0.6}, "virl-vl", more=more)
    arm, = arms_in(tmp_path, "virl-vl")
    _, lines = lines_of([arm], "virl-vl")
    assert lines["seen/id", "landmarks read right where there is one"][2] == "20.0 (20.0-20.0)"
    assert lines["seen/id", "first answers right as a whole"][2] == "30.0 (30.0-30.0)"
    for measure, hits, count in (("landmarks_present", 5, 25), ("landmarks_empty", 67.5, 75)):
        assert plot.gained(arm.ends[0], arm.start[0], "seen/id", measure) == pytest.approx(
            evaluate.gain(hits, count, hits, count))


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["only SFT", "only RL", "not measured yet", "fewer cells",
                                  "only blind"])
def test_unfinished_runs_are_drawn_or_named(tmp_path, monkeypatch, capsys, case):
    """Catches a traceback when one looks at runs before all of them are done."""
    if not case.startswith("only"):
        write_run(tmp_path / "rl", "rl", 0, {0: 0.1, 10: 0.5})
        write_run(tmp_path / "sft", "sft", 0, {10: 0.9})
    if case == "only RL":
        write_run(tmp_path / "rl", "rl", 0, {0: 0.1, 10: 0.5})
    elif case.startswith("only"):
        write_run(tmp_path / "sft", "sft", 0, {10: 0.9}, drop_pictures=case == "only blind")
    if case == "not measured yet":              # rl.py opens the file before it plays
        write_run(tmp_path / "new", "rl", 1, {})
    if case == "fewer cells":                   # measured without --ood
        path = tmp_path / "sft" / "eval.jsonl"
        row = json.loads(path.read_text())
        del row["cells"]["held-out/ood"]
        path.write_text(json.dumps(row) + "\n")
    code, error = command(monkeypatch, capsys, plot, tmp_path, "--out", tmp_path / "figure.png")
    assert code == 0 and (tmp_path / "figure.png").exists(), error


def test_figure_is_drawn(tmp_path, monkeypatch, capsys):
    """Catches an empty or cut figure, a curve left out, and files left behind."""
    for seed in (0, 1):
        write_run(tmp_path / f"rl{seed}", "rl", seed, {0: 0.1, 10: 0.5 + seed / 10, 20: 0.8},
                  more={"first_try": 0.1 + seed / 10})
        write_run(tmp_path / f"sft{seed}", "sft", seed, {10: 0.4, 20: 0.2},
                  more={"first_try": 0.4 + seed / 10})
    out = tmp_path / "drawn" / "figure.png"
    out.parent.mkdir()
    code, error = command(monkeypatch, capsys, plot, tmp_path, "--out", out)
    assert code == 0, error
    assert [path.name for path in out.parent.iterdir()] == ["figure.png"]
    with Image.open(out) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        assert image.width == 4 * 460 and image.height > 360
        pixels = np.asarray(image).astype(int)
    for x in range(0, 1840, 460):               # each panel shows both curves
        for colour in ((52, 104, 192), (200, 60, 50)):
            near = np.abs(pixels[60:380, x:x + 460] - colour).sum(axis=2) < 30
            assert near.sum() > 200
    before = out.read_bytes()
    command(monkeypatch, capsys, plot, tmp_path, "--out", out)
    assert out.read_bytes() == before, "the same metrics must give the same file"


@pytest.mark.parametrize("task", sft.TASKS)
def test_the_kept_runs_are_drawn(tmp_path, monkeypatch, capsys, task):
    """Catches a format of eval.jsonl that can no longer be read."""
    arms = plot.choose(arms_in(plot.HERE, task))
    assert {"SFT", "RL"} <= {arm.label.split(",")[0].split(" ")[0] for arm in arms}
    drawn = []
    monkeypatch.setattr(plot, "draw_panels", lambda panels, *_: drawn.extend(panels))
    code, error = command(monkeypatch, capsys, plot, "--task", task, "--out", tmp_path / "a.png")
    assert code == 0, error
    assert len(drawn) >= 4 and all(len(panel["series"]) >= 2 for panel in drawn)


def test_metrics_of_two_runs_are_drawn(tmp_path, monkeypatch, capsys):
    """Catches rewards below 0 cut off, a step that has no number, and a key that nobody wrote."""
    for name, shift in (("a", -3), ("b", -2)):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "reward": shift + step / 2, "approx_kl": 1e-4 * step}
                for step in range(1, 6)] + [{"step": 6, "reward": None, "approx_kl": 1e-4}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.chdir(tmp_path)
    flags = ["--metrics", "a", "b", "--out", "both.png", "--keys", "reward"]
    drawn, draw_panels = [], plot.draw_panels

    def spy(panels, *others):
        drawn.extend(panels)
        draw_panels(panels, *others)

    monkeypatch.setattr(plot, "draw_panels", spy)
    code, error = command(monkeypatch, capsys, plot, *flags, "approx_kl")
    assert code == 0 and Image.open("both.png").width == 2 * 460, error
    reward, kl = drawn
    assert [series["label"] for series in reward["series"]] == ["a", "b"]
    assert reward["series"][0]["points"][0] == (1, -2.5, -2.5, -2.5)
    assert [len(series["points"]) for series in reward["series"] + kl["series"]] == [5, 5, 6, 6]
    _, y_axis = plot.axes_of(reward)
    assert y_axis.begin <= -2.5 and y_axis.end >= 0.5
    assert_one_line(*command(monkeypatch, capsys, plot, *flags, "wealth"), "a", "wealth")


def test_a_probe_is_read_only_where_it_is_named(tmp_path):
    """A run of one seed gives the arms of the main figure longer names, or a line of their own."""
    for name in ("rl-s0", "probe-rl-s0"):
        write_run(tmp_path / name, "rl", 0, {0: 0.1, 20: 0.2})
    found = plot.read_runs([tmp_path], "gp-l")
    assert [run.folder.name for run in found] == ["rl-s0"]
    found = plot.read_runs([tmp_path / "probe-rl-s0"], "gp-l")
    assert [run.folder.name for run in found] == ["probe-rl-s0"]


def shifted_run(folder, kind, seed, rates, lacking=(), count=200, **flags):
    """A run whose last row has the five cells of the two shifts; intervals are 0.1 to each side."""
    write_run(folder, kind, seed, {10: 0.5, 20: 0.5}, **flags)
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    cells = ("id", "face-rule any-hands", "ten-rule face-hands", "ood", "fake")
    for cell, rate in zip(cells, rates):
        if cell not in lacking:
            rows[-1]["cells"][f"held-out/{cell}"] = {
                "success": rate, "interval": [max(0, rate - 0.1), rate + 0.1], "count": count}
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_two_shifts_and_the_probe_are_drawn(tmp_path, monkeypatch, capsys):
    """Catches a cell in another's place, a step that lacks cells, intervals that do not shrink with
    more seeds, and a probe whose ceiling is not told."""
    shifted_run(tmp_path / "sft", "sft", 0, (0.2, 0.1, 0.3, 0.0, 0.133))
    for seed, shift in ((0, 0.0), (1, 0.1)):
        rates = [rate + shift for rate in (0.4, 0.35, 0.45, 0.3, 0)]
        shifted_run(tmp_path / f"rl{seed}", "rl", seed, rates)
    shifted_run(tmp_path / "poor", "rl", 2, (0.4,) * 5, lacking=["fake"])
    drawn, draw_panels = [], plot.draw_panels

    def spy(panels, path, title):
        drawn.extend([panels, title])
        draw_panels(panels, path, title)

    monkeypatch.setattr(plot, "draw_panels", spy)
    out = tmp_path / "shifts.png"
    code, printed, error = shown(monkeypatch, capsys, plot, tmp_path, "--shifts", "--only", "*",
                                 "--out", out)
    assert code == 0, error
    assert f"left out: {tmp_path / 'poor'}," in printed
    (any_hands, face_hands, fake), title = drawn
    assert "62.4-62.6 %" in title and "62.4-62.6 %" in printed.splitlines()[-2]
    assert [panel["places"] for panel in (any_hands, face_hands, fake)] == [
        {1: "old rule", 2: "new rule"}] * 2 + [{1: "of all hands", 2: "of the solvable"}]
    half = 100 * math.hypot(0.1, 0.1) / 2               # of a mean of two seeds
    for panel, sft_levels, rl_levels in ((any_hands, (20, 10), (45, 40)),
                                         (face_hands, (30, 0), (50, 35))):
        points = [series["points"] for series in panel["series"]]
        bars = [point for (point,) in (found for found in points if len(found) == 1)]
        lines = [[middle for _, middle, _, _ in found] for found in points if len(found) == 2]
        assert lines == [pytest.approx(sft_levels), pytest.approx(rl_levels)]
        for bar, level, width in zip(bars, (*sft_levels, *rl_levels), (10, 10, half, half)):
            assert bar[1:] == pytest.approx((level, max(0, level - width), level + width))
        assert len({x for x, *_ in bars}) == 4          # bars do not hide each other
    # 133 of the first 200 hands of the probe can be paid at all
    levels = [series["points"][0][1] for series in fake["series"]]
    assert levels == pytest.approx([13.3, 13.3 / 0.665, 5, 5 / 0.665])
    assert "| SFT | 1 | 20.0 [10.0, 30.0] | 10.0 [0.0, 20.0] | 30.0 [20.0, 40.0]" in printed
    y_axes = [plot.axes_of(panel)[1] for panel in drawn[0]]
    assert y_axes[0] == y_axes[1] == y_axes[2]
    with Image.open(out) as image:
        assert image.width == 3 * 460


def test_gains_by_tries_in_training_by_hand(tmp_path, monkeypatch, capsys):
    """Catches a gain over another seed's start, an SFT run among RL's, seeds not told apart."""
    for tries, ends in ((1, (0.3, 0.5)), (5, (0.4, 0.4))):
        for seed, (start, end) in enumerate(zip((0.1, 0.2), ends)):
            write_run(tmp_path / f"rl{tries}{seed}", "rl", seed, {0: start, 20: end}, tries=tries,
                      more={"first_try": end / 2, "fresh": end})
    write_run(tmp_path / "sft", "sft", 0, {0: 0.1, 20: 0.9}, tries=1)
    code, printed, _ = shown(monkeypatch, capsys, plot, tmp_path, "--tries", "--out",
                             tmp_path / "tries.png")
    assert code == 0 and Image.open(tmp_path / "tries.png").width > 800
    assert "| rule OOD, in conversation | 1 | +25.0 [-38.5, +88.5] | +20.0, +30.0 |" in printed
    assert "| ID, in conversation | 5 | +25.0 [-38.5, +88.5] | +30.0, +20.0 |" in printed
    assert "| ID, first answer | 1 | +0.0 [+0.0, +0.0] | +0.0, +0.0 |" in printed
    write_run(tmp_path / "no fresh", "rl", 0, {0: 0.1, 20: 0.9}, tries=3)
    assert "left out: " in shown(monkeypatch, capsys, plot, tmp_path, "--tries", "--out",
                                 tmp_path / "tries.png")[1]
    write_run(tmp_path / "twice", "rl", 0, {0: 0.1, 20: 0.9}, tries=1, lr=3.0,
              more={"first_try": 0.5, "fresh": 0.5})
    assert_one_line(*command(monkeypatch, capsys, plot, tmp_path, "--tries"), "twice")
    assert_one_line(*command(monkeypatch, capsys, plot, tmp_path / "sft", "--tries"), "no run of")


def test_rl_by_the_steps_of_sft_before_it_by_hand(tmp_path, monkeypatch, capsys):
    """Catches steps in the order of their names, ends taken for starts, a start that is none."""
    for steps, end in ((20, 0.3), (100, 0.5)):
        for seed in range(2):
            write_run(tmp_path / f"from{steps}-{seed}", "rl", seed, {0: 0.1, 7: end + seed / 10},
                      init=f"runs/hot-s{seed}/step-{steps:06d}",
                      more={"first_try": end / 2, "numbers_read": 1 - end})
    out = tmp_path / "heals.png"
    code, printed, _ = shown(monkeypatch, capsys, plot, tmp_path, "--heals", "--out", out)
    assert code == 0 and Image.open(out).width > 800
    assert "| % (lowest-highest seed) | 20 | 100 |" in printed and "| seeds | 2 | 2 |" in printed
    assert "| rule OOD: in conversation, SFT | 10.0 (10.0-10.0) | 10.0 (10.0-10.0) |" in printed
    assert "| ID: in conversation, then RL | 35.0 (30.0-40.0) | 55.0 (50.0-60.0) |" in printed
    assert "| rule OOD: numbers read right, then RL | 70.0 (70.0-70.0) | 50.0 " in printed
    write_run(tmp_path / "from the backbone", "rl", 0, {0: 0.1, 7: 0.9}, init="backbones/gp",
              more={"first_try": 0.1, "numbers_read": 1.0})
    assert_one_line(*command(monkeypatch, capsys, plot, tmp_path, "--heals"), "from the backbone")


def test_a_map_by_hand(tmp_path, monkeypatch, capsys):
    """Catches the end of one run at the distance of another."""
    for steps, (start, end) in {60: (0.2, 0.3), 400: (0.0, 0.1)}.items():
        write_run(tmp_path / f"from{steps}-s0", "rl", 0, {0: 0.5, 7: 0.5},
                  init=f"runs/hot-s0/step-{steps:06d}", more={"first_try": start})
        rows = [json.loads(line) for line in
                (tmp_path / f"from{steps}-s0" / "eval.jsonl").read_text().splitlines()]
        rows[-1]["cells"]["held-out/ood"]["first_try"] = end
        (tmp_path / f"from{steps}-s0" / "eval.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows))
    far = [{"model": f"somewhere/{model}", "id start||policy": [one, 0.1],
            "ood start||policy": [other, 0.1]}
           for model, one, other in (
               ("hot-s0/step-000060", 0, 0), ("hot-s0/step-000400", 4, 14),
               ("from60-s0/step-000007", 1, 2), ("from400-s0/step-000007", 3, 9))]
    (tmp_path / "far.json").write_text(json.dumps(far))
    out = tmp_path / "map.png"
    code, printed, _ = shown(monkeypatch, capsys, plot, tmp_path, "--map", tmp_path / "far.json",
                             "--out", out)
    assert code == 0 and Image.open(out).width > 800
    assert "| 60 | 0.0; 1.0 | 0.0; 2.0 | 20.0; 30.0 |" in printed
    assert "| 400 | 4.0; 3.0 | 14.0; 9.0 | 0.0; 10.0 |" in printed
    write_run(tmp_path / "from60-s1", "rl", 1, {0: 0.5, 7: 0.5}, init="runs/hot-s1/step-000060",
              more={"first_try": 0.5})
    both = far + [{**far[0], "model": model} for model in ("hot-s1/step-000060",
                                                           "from60-s1/step-000007")]
    (tmp_path / "far.json").write_text(json.dumps(both))
    assert_one_line(*command(monkeypatch, capsys, plot, tmp_path, "--map", tmp_path / "far.json"),
                    "2 seeds")
    (tmp_path / "far.json").write_text(json.dumps(far[:1]))
    assert_one_line(*command(monkeypatch, capsys, plot, tmp_path, "--map", tmp_path / "far.json"),
                    "distance.py has measured")
    (tmp_path / "far.json").write_text('[{"model": 1}]')
    assert_one_line(*command(monkeypatch, capsys, plot, tmp_path, "--map", tmp_path / "far.json"),
                    "not what distance.py writes")


def test_a_map_of_arms_by_hand(tmp_path, monkeypatch, capsys):
    """Catches a seed at the distance of another, and arms that were not measured."""
    far = []
    for seed, level in ((0, 0.2), (1, 0.3)):
        for kind, flags in (("rl", {"init": f"runs/start-s{seed}/step-000060"}),
                            ("sft", {"model": f"runs/start-s{seed}/step-000060"})):
            write_run(tmp_path / f"{kind}-s{seed}", kind, seed, {7: 0.5},
                      more={"first_try": level + 0.1 * (kind == "sft")}, **flags)
            far.append({"model": f"somewhere/{kind}-s{seed}/step-000007",
                        "id start||policy": [1 + seed, 0.0], "ood start||policy": [3 + seed, 0.5]})
    (tmp_path / "far.json").write_text(json.dumps(far[:3]))
    code, printed, _ = shown(monkeypatch, capsys, plot, tmp_path, "--map", tmp_path / "far.json",
                             "--out", tmp_path / "map.png")
    assert code == 0 and Image.open(tmp_path / "map.png").width > 800
    rows = [line for line in printed.splitlines() if line.startswith(("| SFT", "| RL"))]
    assert rows == ["| SFT | 0 | 7 | 1.0 +-0.0 | 3.0 +-1.0 | 30.0 |",
                    "| RL | 0 | 7 | 1.0 +-0.0 | 3.0 +-1.0 | 20.0 |",
                    "| RL | 1 | 7 | 2.0 +-0.0 | 4.0 +-1.0 | 30.0 |"]


def test_a_sheet_of_hands_has_rows_of_suits(tmp_path, monkeypatch, capsys):
    """Catches one picture many times, pictures that overlap, and red among the black."""
    out = tmp_path / "sheet.png"
    code, error = command(monkeypatch, capsys, plot, "--sheet", 5, "--task", "gp-vl", "--out", out)
    assert code == 0, error
    with Image.open(out) as image:
        assert image.size == (830, 640)
        pixels = np.asarray(image).astype(int)
    hands = [pixels[y:y + 200, x:x + 400] for y in (10, 220, 430) for x in (10, 420)]
    red = [int(((hand[..., 0] > 180) & (hand[..., 1] < 60)).sum()) for hand in hands]
    assert red[0] == red[1] == 0 < min(red[2:4])
    assert (hands[5] == 255).all() and (pixels[:, 410:420] == 255).all()
    assert len({hand.tobytes() for hand in hands}) == 6


def test_a_sheet_of_views_goes_round_the_cities(tmp_path, monkeypatch, capsys):
    """Catches one city twice, and a view of the first turn, in the middle of a block."""
    class Walk:
        """In place of a walk: its view is grey, darker from city to city, white at other places."""

        def __init__(self, city, **how):
            self.shade, self.rail = 20 * list(plot.virl_env.CITIES).index(city), []

        def reset(self, seed):
            """Lay a rail."""
            self.rail = [SimpleNamespace(kind=kind) for kind in ("first turn", "later turn")]

        def look(self, position):
            """A picture."""
            shade = self.shade if position.kind == "later turn" else 255
            return Image.new("RGB", (400, 400), (shade,) * 3)

    monkeypatch.setattr(plot.virl_env, "city_files", lambda city, width: None)
    monkeypatch.setattr(plot.virl_env, "Atlas", lambda files, city: city)
    monkeypatch.setattr(plot.virl_env, "Navigation", Walk)
    out = tmp_path / "sheet.png"
    code, error = command(monkeypatch, capsys, plot, "--sheet", 11, "--task", "virl-vl", "--out",
                          out)
    assert code == 0, error
    with Image.open(out) as image:
        assert image.size == (830, 6 * 410 + 10)
        seen = [image.getpixel((200 + i % 2 * 410, 200 + i // 2 * 410))[0] for i in range(12)]
    assert seen == [*range(0, 200, 20), 0, 255]


@pytest.mark.parametrize("low, high", [(0, 0), (5, 5), (0, 0.3), (0, 99.7), (-4.2, 1.3),
                                       (1e-5, 9e-5), (1.9e12, 2.1e13), (-7, -2), (0, 1e-12)])
def test_axes_hold_what_they_show(low, high):
    """Catches values off the axis, one tick where four are due, and two ticks of one name."""
    axis = plot.round_axis(low, high)
    assert axis.begin <= low and axis.end >= high and 3 <= axis.last - axis.first <= 5
    names = [axis.tick(i) for i in range(axis.first, axis.last + 1)]
    assert len(set(names)) == len(names) and max(map(len, names)) <= 6
    for i, name in zip(range(axis.first, axis.last + 1), names):
        assert float(name) * 10.0 ** axis.power == pytest.approx(i * axis.step)


LINE = ('{{"step": 0, "hands": {hands}, "flops_spent": {flops}, "cells": '
        '{{"held-out/id": {{"success": {rate}, "numbers_read": 0}}}}}}\n')


@pytest.mark.parametrize("name, content", [
    ("eval.jsonl", '{"step": 0}\n'),
    ("eval.jsonl", '[1, 2]\n'),
    ("eval.jsonl", '{"step": 0, "flops": 1, "cells": {"held-out/id": {}}}\n'),
    ("eval.jsonl", LINE.format(hands=0, flops=1, rate=0.5)),
    ("eval.jsonl", LINE.format(hands='"9"', flops=1, rate=0.5)),
    ("eval.jsonl", LINE.format(hands=9, flops="Infinity", rate=0.5)),
    ("eval.jsonl", LINE.format(hands=9, flops="NaN", rate=0.5)),
    ("eval.jsonl", LINE.format(hands=9, flops=1, rate=2)),
    ("eval.jsonl", LINE.format(hands=9, flops=1, rate='"1"')),
    ("eval.jsonl", LINE.format(hands=9, flops=1, rate='0.5, "interval": [0.6, 0.4]')),
    ("eval.jsonl", LINE.format(hands=9, flops=1, rate='0.5, "interval": "ab"')),
    ("eval.jsonl", LINE.format(hands=9, flops=1, rate='0.5, "count": "9"')),
    ("eval.jsonl", "[" * 100_000 + "\n"),
    ("args.json", "{"),
    ("args.json", "[]"),
    ("args.json", "{}"),
    ("args.json", '{"kind": "other", "seed": 1, "task": "gp-l"}'),
    ("args.json", '{"kind": "rl", "seed": [1], "task": "gp-l"}'),
    ("args.json", None),
])
def test_damaged_runs_are_named(tmp_path, monkeypatch, capsys, name, content):
    """Catches a traceback, or a figure without the run, where one line should name the folder."""
    write_run(tmp_path / "whole", "rl", 0, {0: 0.1, 10: 0.2})
    write_run(tmp_path / "broken", "rl", 1, {0: 0.1, 10: 0.2})
    path = tmp_path / "broken" / name
    path.unlink() if content is None else path.write_text(content)
    code, error = command(monkeypatch, capsys, plot, tmp_path, "--out", tmp_path / "figure.png")
    assert_one_line(code, error, "broken")
    assert not (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("flags, words", [
    (["empty"], ["empty", "eval.jsonl"]),
    (["nowhere"], ["nowhere"]),
    (["runs", "--task", "gp-vl"], ["runs", "gp-vl"]),
    (["runs", "--only", "SFT*"], ["--only", "RL"]),
    (["runs", "--out", "nowhere/figure.png"], ["nowhere"]),
    (["runs", "--out", "empty"], ["empty", "--out"]),
    (["--metrics", "nowhere"], ["nowhere", "metrics.jsonl"]),
    (["runs", "--shifts"], ["evaluate.py --run", '"face-rule any-hands"']),
    (["runs", "--shifts", "--task", "virl-l"], ["--shifts", "gp-l"]),
    (["--sheet", "4"], ["--sheet", "gp-vl"]),
    (["--sheet", "-1", "--task", "gp-vl"], ["--sheet"]),
])
def test_bad_flags_end_in_one_line(tmp_path, monkeypatch, capsys, flags, words):
    """Catches a traceback, and an empty figure."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "runs" / "rl", "rl", 0, {0: 0.1, 10: 0.2})
    assert_one_line(*command(monkeypatch, capsys, plot, *flags), *words)
    assert not (tmp_path / "figure.png").exists()


def test_a_run_from_before_a_flag_stood_at_its_default():
    """Catches SFT on its own right answers and RL from before `--advantage` taken for one arm."""
    flags = {"old": {}, "same": {"advantage": "gae", "revise": 0.0}, "new": {"advantage": "right"}}
    old, same, new = (plot.Run(plot.pathlib.Path(name), "rl", 0, plot.settings_of(
        {"kind": "rl", "seed": 0, "lr": 1e-4} | more), [{"step": 1}])
        for name, more in flags.items())
    assert [list(arm.runs) for arm in plot.group([old, new])] == [[0], [0]]
    assert len(plot.group([old, same])) == 1
