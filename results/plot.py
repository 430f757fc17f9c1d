"""Draw learning curves and print the table of gains, from the metrics of finished runs alone.

Paper: arXiv 2501.17161, Fig. 5, 7 and 8: success against training compute, SFT beside RL, ID
beside OOD. A run folder holds args.json (its flags), eval.jsonl (what was measured at its
checkpoints) and metrics.jsonl (what training said on its way). No model is loaded here.

  1. read the runs of a task
  2. make arms of them: runs that differ in nothing but the seed are one arm, and an arm is named by
     the flags that set it apart ("SFT 1e-4")
  3. a curve: mean, lowest and highest of the seeds at each checkpoint
  4. the table: each arm's end, and what it gained over its start, with two measures of chance
  5. the figures: which panels a task has
  6. drawing with Pillow: axes, bands, lines, legend

    python results/plot.py --task gp-l --out figure.png            the runs in results/
    python results/plot.py runs --task virl-l --out figure.png     your own
    python results/plot.py --task gp-vl --only "*" --out all.png   arms of one seed, too
    python results/plot.py --metrics runs/one runs/other --keys reward approx_kl --out both.png
    python results/plot.py runs --shifts --out shifts.png          rule and hands apart, and `fake`
    python results/plot.py runs --tries --out tries.png            RL by its tries in training
    python results/plot.py runs --heals --out heals.png            RL by the SFT steps before it
    python results/plot.py runs --map distance.json --out map.png  what distance.py wrote: OOD by KL
    python results/plot.py --sheet 6 --task gp-vl --out hands.png      hands, or street views

For a figure of your own, call `draw_panels`: it needs points and a title, no runs.
"""

import argparse
import fnmatch
import functools
import json
import math
import os
import pathlib
import re
import sys
from dataclasses import dataclass, field, replace
from decimal import Decimal
from statistics import mean, stdev

from PIL import Image, ImageDraw, ImageFont

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # started as a file, Python looks for modules here only

import gp_env  # noqa: E402
import virl_env  # noqa: E402
from evaluate import cell_environments, gain  # noqa: E402
from sft import TASKS, Problem, guarded, read_lines  # noqa: E402

# The arms of the comparison: {kind of run: (name, colours)}. Several arms of a kind take its
# colours in turn. A blind run of SFT never saw pictures (sft.py --drop-pictures).
ARMS = {"sft": ("SFT", ((52, 104, 192), (20, 150, 150), (120, 80, 190), (110, 170, 235))),
        "blind sft": ("SFT", ((120, 120, 120), (170, 150, 120))),
        "rl": ("RL", ((200, 60, 50), (225, 135, 30), (150, 40, 110)))}


# Flags that came later or are gone, and where every run without them stands.
LATER = {"advantage": "gae", "revise": 0.0, "vary_rule": False,
         "warmup": 16, "entropy_coef": 0.0, "other_routes": None}


# ------------------------------------------------------------------------------------------------
# 1. Runs
# ------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run that was measured."""

    folder: pathlib.Path
    kind: str               # a key of ARMS
    seed: int
    settings: dict          # its flags, without the seed
    rows: list              # of eval.jsonl: step, hands, flops_spent, cells {cell: {measure: rate}}


def read_runs(folders, task):
    """Find the runs of a task below some folders. Returns a list of Run, sorted by folder.

    A folder probe-... is read only where it is named itself: its runs are of one seed.
    Raises Problem if there are none, or one that cannot be read.
    """
    paths = {path.parent for folder in folders
             for path in pathlib.Path(folder).rglob("eval.jsonl")
             if not path.parent.name.startswith("probe-") or path.parent == pathlib.Path(folder)}
    runs = []
    for folder in sorted(paths):
        try:
            args = json.loads((folder / "args.json").read_text())
            rows = read_lines(folder / "eval.jsonl")
            if not rows or args.get("task", task) != task:      # not measured yet, or another game
                continue
            for row in rows:
                check_row(row, task)
            kind = "blind sft" if args.get("drop_pictures") else args["kind"]
            if kind not in ARMS or not isinstance(args["seed"], int):
                raise ValueError("neither a run of sft.py nor of rl.py")
            rows.sort(key=lambda row: row["step"])
            runs.append(Run(folder, kind, args["seed"], settings_of(args), rows))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Problem(f"{folder}: not a run this script can read ({error})") from None
    if not runs:
        raise Problem(f"{' '.join(map(str, folders))}: no eval.jsonl of {task} there; make one "
                      "with rl.py, or with evaluate.py --run")
    return runs


def check_row(row, task):
    """Raise ValueError, TypeError or KeyError unless a row can be drawn (MEASURES: section 4)."""
    if not (0 <= row["flops_spent"] < 1e40 and 0 < row["hands"] < 1e9):
        raise ValueError("compute or hands are no such numbers")
    for measures in row["cells"].values():
        low, high = measures.get("interval", (0, 1))
        if not (0 <= low <= high <= 1 and 1 <= measures.get("count", 1) < 1e9):
            raise ValueError("an interval or a count is none")
        for measure in MEASURES[task]:
            if measure != "message" and not 0 <= measures.get(measure, 0) <= 1:
                raise ValueError("a rate is not between 0 and 1")
            if measures.get(SHARE_OF.get(measure), 1) < 0:
                raise ValueError("a count is below 0")


def settings_of(args):
    """The flags of a run without its seed, also where the path of a model names it.

    >>> settings_of({"seed": 2, "lr": 0.1, "init": "runs/start-s2/step-000060"})["init"]
    'runs/start-s*/step-000060'
    """
    # how a run was watched and kept changes nothing of it; the scripts may differ by a comment
    settings = {key: value for key, value in (LATER | args).items()
                if key not in ("seed", "code", "save_every") and not key.startswith("eval_")}
    for key in ("model", "init"):
        if isinstance(settings.get(key), str):
            # rl.py puts a digest behind the seed of a start, which counts the seed, too
            seed = rf"(?<![A-Za-z0-9])(s|seed){args['seed']}(-[0-9a-f]{{8}})?(?![0-9])"
            settings[key] = re.sub(seed, r"\1*", settings[key])
    return settings


# ------------------------------------------------------------------------------------------------
# 2. Arms
# ------------------------------------------------------------------------------------------------


@dataclass
class Arm:
    """Runs that differ in nothing but the seed."""

    kind: str
    settings: dict
    runs: dict = field(default_factory=dict)        # {seed: Run}
    start: dict = field(default_factory=dict)       # {seed: row}: where it comes from, if known
    label: str = ""
    colour: tuple = (0, 0, 0)
    dashed: bool = False

    @property
    def ends(self):
        """{seed: row of its last checkpoint}."""
        return {seed: run.rows[-1] for seed, run in self.runs.items()}


def differences(one, other):
    """Flags in which two runs differ. One that only one of them knows did not exist for the other.

    >>> differences({"lr": 0.1, "steps": 5}, {"lr": 0.2, "steps": 5, "freeze": None})
    ['lr']
    """
    return sorted(key for key in one.keys() & other.keys() if one[key] != other[key])


def group(runs):
    """Runs -> list of Arm. A run that is there twice, with the same seed, is left out by name."""
    arms = []
    for run in runs:
        home = next((arm for arm in arms if arm.kind == run.kind
                     and not differences(arm.settings, run.settings)), None)
        if home is None:
            home = Arm(run.kind, {})
            arms.append(home)
        if run.seed in home.runs:
            print(f"left out: {run.folder}, the same settings and --seed as "
                  f"{home.runs[run.seed].folder}")
            continue
        home.runs[run.seed] = run
        # A flag that the first run did not know binds those that come after.
        home.settings = run.settings | home.settings
    return arms


def name_arms(arms):
    """Give each arm its label, and its colour. Returns them in the order of the legend."""
    for family in ("SFT", "RL"):
        # RL's rate is no rival of SFT's: flags are compared within a family. Names are given before
        # anything is left out, so that an arm has the same name in every figure.
        alike = [arm for arm in arms if ARMS[arm.kind][0] == family]
        flags = sorted({flag for one in alike for other in alike
                        for flag in differences(one.settings, other.settings)})
        for arm in alike:
            arm.label = label(family, arm, flags)
    arms = sorted(arms, key=lambda arm: (list(ARMS).index(arm.kind), arm.settings.get("lr") or 0,
                                         arm.label))
    for kind, (_, colours) in ARMS.items():
        for number, arm in enumerate([arm for arm in arms if arm.kind == kind]):
            arm.colour = colours[number % len(colours)]
            arm.dashed = kind == "blind sft" or number >= len(colours)
    return arms


ON = ("announce",)          # switches that are on by default; a label names what was turned


def label(family, arm, flags):
    """The name of an arm: its family, and what it says on the flags that set the arms apart.

    >>> label("RL", Arm("rl", {"lr": 3e-4, "tries": 1, "init": None}), ["init", "lr", "tries"])
    'RL 3e-4, tries 1'
    """
    parts = [family]
    if "lr" in flags and arm.settings.get("lr") is not None:
        parts[0] += " " + format(Decimal(str(arm.settings["lr"])), "e")
    if arm.kind == "blind sft":
        parts.append("pictures dropped")
    for flag in flags:
        value, words = arm.settings.get(flag), flag.replace("_", "-")
        if flag in ("lr", "drop_pictures") or value is None or value is (flag in ON):
            continue
        if flag in ("model", "init"):       # a path: its end will do
            words += " " + "/".join(pathlib.Path(value).parts[-2:])
        elif value is False:
            words = f"no-{words}"
        elif value is not True:
            words += f" {value}"
        parts.append(words)
    return ", ".join(parts)


def unlike(taught, learner):
    """How unlike an arm of SFT and one of RL begin, as a key to sort by.

    Another checkpoint weighs most, then the number of other flags that differ.
    """
    elsewhere = learner.settings.get("init") != taught.settings.get("model")
    return elsewhere, len(differences(taught.settings, learner.settings))


def find_starts(arms):
    """Give each arm its start, {seed: row}: the checkpoint that SFT and RL have in common.

    A run of rl.py measures it as its step 0. A run of SFT passed it, or began from it (as --model;
    for RL that is --init): its start is that of the RL arm whose flags are most like its own. A
    blind run did neither.
    """
    # The rows are shared, not copied: `table` tells by them which arms began alike.
    learners = [arm for arm in arms if arm.kind == "rl"]
    for arm in learners:
        arm.start = {seed: run.rows[0] for seed, run in arm.runs.items()
                     if run.rows[0]["step"] == 0}
    for arm in arms:
        if arm.kind == "sft" and learners:
            arm.start = min(learners, key=lambda learner: unlike(arm, learner)).start


def choose(arms, only=None):
    """Which arms are drawn: those whose label fits a pattern of `only`, e.g. "SFT*".

    Without patterns arms of a single seed are left out, by name, where others have more.
    """
    if only:
        chosen = [arm for arm in arms
                  if any(fnmatch.fnmatchcase(arm.label, pattern) for pattern in only)]
        if not chosen:
            raise Problem(f"--only {' '.join(only)}: no such arm; there are "
                          f"{'; '.join(arm.label for arm in arms)}")
        return chosen
    several = [arm for arm in arms if len(arm.runs) > 1]
    for arm in arms:
        if several and arm not in several:
            folder = next(iter(arm.runs.values())).folder
            print(f'left out: {folder}, as it is of one seed; --only "{arm.label}" draws it')
    return several or arms


# ------------------------------------------------------------------------------------------------
# 3. Curves
# ------------------------------------------------------------------------------------------------


def rate(row, cell, measure):
    """A measure in a cell of a row, in 0..1; None where it was not measured.

    "message" is what the verifier's messages are worth: success in conversation minus success in as
    many independent first answers.
    """
    measures = row["cells"].get(cell, {})
    if measure == "message":
        both = "success" in measures and "fresh" in measures
        return measures["success"] - measures["fresh"] if both else None
    return measures.get(measure)


def moments(arm, cell, *measures):
    """The rows of an arm's seeds at each checkpoint: [[row, ...], ...] by compute, mean of seeds.

    Only checkpoints at which as many seeds were measured as at any: a mean over the seeds that are
    done so far would jump. An arm of SFT begins with its start.
    """
    def measured(row):
        """Does the row have all the measures?"""
        return all(rate(row, cell, measure) is not None for measure in measures)

    by_step = {}
    for run in arm.runs.values():
        for row in filter(measured, run.rows):
            by_step.setdefault(row["step"], []).append(row)
    most = max(map(len, by_step.values()), default=0)
    found = [rows for rows in by_step.values() if len(rows) == most]
    begun = [arm.start[seed] for seed in arm.runs if seed in arm.start]
    begun = list(filter(measured, begun))
    if found and begun and arm.kind == "sft":       # rl.py measured it itself, as step 0
        found.append(begun)
    return sorted(found, key=lambda rows: mean(row["flops_spent"] for row in rows))


def curve(arm, cell, measure="success"):
    """Points of a learning curve: [(FLOPs, mean, lowest, highest)], rates in percent."""
    points = []
    for rows in moments(arm, cell, measure):
        rates = [100 * rate(row, cell, measure) for row in rows]
        points.append((mean(row["flops_spent"] for row in rows), mean(rates), min(rates),
                       max(rates)))
    return points


def curve_against(arm, cell, measure, other):
    """One measure against another, in percent: [(mean of other, mean, mean, mean)].

    The points stay in the order of compute, wherever that leads; lowest and highest are the mean,
    as a band would cross itself.
    """
    points = []
    for rows in moments(arm, cell, measure, other):
        x, y = (100 * mean(rate(row, cell, name) for row in rows) for name in (other, measure))
        points.append((x, y, y, y))
    return points


# ------------------------------------------------------------------------------------------------
# 4. The table
# ------------------------------------------------------------------------------------------------

# The rows of a task's table: {measure: its name}. What a run did not measure is left out.
HANDS = {"first_try": "first answer", "fresh": "as many fresh answers",
         "success": "in conversation", "message": "value of the message",
         "numbers_read": "numbers read right"}
WALKS = {"per_step": "right actions of all tries", "per_step_on": "the same, the rail goes on",
         "turns": "turns alone, the rail goes on", "first_try": "first answers right",
         "whole_right": "first answers right as a whole", "fresh": "whole routes, fresh answers",
         "success": "whole routes", "message": "whole routes, value of the message"}
SEEN = {"landmarks_read": "landmarks read right, empty places too",
        "landmarks_present": "landmarks read right where there is one",
        "landmarks_empty": "empty places read right"}
MEASURES = {"gp-l": HANDS, "gp-vl": HANDS | {"cards_read": "all four cards read right"},
            "virl-l": WALKS, "virl-vl": WALKS | SEEN}
# What a measure is a share of, where that is not the hands or walks: the count with this name, if
# the cell has it. It differs between checkpoints: a walk that misses later has more tries.
SHARE_OF = {"per_step": "steps", "per_step_on": "steps_on", "turns": "turn_tries",
            "first_try": "positions", "whole_right": "positions", "landmarks_read": "positions",
            "landmarks_present": "positions_present", "landmarks_empty": "positions_empty"}
# Student's t: the mean of n seeds lies within T_95[n] standard errors of the truth, 95 % of the
# time (two-sided, n - 1 degrees of freedom). For more than 10 seeds, 10 is on the safe side.
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def t_interval(values):
    """95 % interval of the mean of independent seeds, (low, high); None for a single seed.

    >>> [round(x, 2) for x in t_interval([1.0, 2.0, 3.0])]      # 2 +- 4.303 * 1 / sqrt(3)
    [-0.48, 4.48]
    """
    if len(values) < 2:
        return None
    half = T_95[min(len(values), 10)] * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def mean_gain(gains):
    """[(difference, low, high)] of independent seeds -> (mean, low, high).

    Each seed counts alike, however many tries its walks had. The half-widths of n independent
    intervals combine to the root of the sum of their squares, over n.

    >>> [round(x, 3) for x in mean_gain([(0.1, 0.06, 0.14), (0.3, 0.27, 0.33)])]
    [0.2, 0.175, 0.225]
    """
    middle = mean(difference for difference, _, _ in gains)
    below = math.hypot(*(difference - low for difference, low, _ in gains)) / len(gains)
    above = math.hypot(*(high - difference for difference, _, high in gains)) / len(gains)
    return middle, middle - below, middle + above


def gained(row, before, cell, measure):
    """(difference, low, high) of a measure between two rows: the 95 % luck of evaluation."""
    if measure == "message":
        # The interval of a difference of gains, by the rule that evaluate.gain applies to rates.
        talk, low, high = gained(row, before, cell, "success")
        alone, alone_low, alone_high = gained(row, before, cell, "fresh")
        return (talk - alone, talk - alone - math.hypot(talk - low, alone_high - alone),
                talk - alone + math.hypot(high - talk, alone - alone_low))
    counted = []                            # hits and count of the row, then of the one before
    for one in (row, before):
        found = one["cells"][cell]
        count = found.get(SHARE_OF.get(measure), found.get("count", one["hands"]))
        counted += [rate(one, cell, measure) * count, count]
    return gain(*counted)


def level_text(rows, cell, measure):
    """A level in words: mean (lowest-highest) of the seeds' rows, in percent; "" for none."""
    rates = [rate(row, cell, measure) for row in rows]
    rates = [100 * one for one in rates if one is not None]
    if not rates:
        return ""
    between = " to " if min(rates) < 0 else "-"
    return f"{mean(rates):.1f} ({min(rates):.1f}{between}{max(rates):.1f})"


def gain_text(arm, cell, measure):
    """A gain in words: mean [luck of evaluation] (luck of training), in percent; "" for none."""
    gains = [gained(row, arm.start[seed], cell, measure) for seed, row in arm.ends.items()
             if seed in arm.start and rate(row, cell, measure) is not None
             and rate(arm.start[seed], cell, measure) is not None]
    if not gains:
        return ""
    text = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in mean_gain(gains)))
    of_seeds = t_interval([100 * difference for difference, _, _ in gains])
    return text + (" ({:+.1f} to {:+.1f})".format(*of_seeds) if of_seeds else " (one seed)")


def table(arms, task):
    """A Markdown table: each start and each arm's end, then what each arm gained.

    A level is the mean (lowest-highest) of the seeds. A gain is the mean over seeds of end minus
    start, with two measures of chance. In square brackets, 95 % of the luck of evaluation: of hands
    and of sampling, these policies given. In round ones, 95 % of the luck of training: Student's t
    over the seeds. (Hands repeat between seeds and share numbers, so the first is a little narrow;
    start and end meet the same hands, which makes it a little wide.)
    """
    levels = {}                             # {column: {seed: row}}
    # Arms that began at the same checkpoint share a column of levels.
    for arm in arms:
        if arm.start and not any(known.get(seed) == row for known in levels.values()
                                 for seed, row in arm.start.items()):
            levels[f"start of {arm.label}" if levels else "start"] = arm.start
    levels |= {arm.label: arm.ends for arm in arms}
    learnt = [arm for arm in arms if arm.start.keys() & arm.runs.keys()]
    columns = [*levels, *(f"{arm.label} - start [evaluation] (seeds, t)" for arm in learnt)]
    cells = list(dict.fromkeys(cell for arm in arms for row in arm.ends.values()
                               for cell in row["cells"]))
    lines = ["| " + " | ".join(["%", *columns]) + " |", "|---" * (1 + len(columns)) + "|"]
    for measure, words in MEASURES[task].items():
        for cell in cells:
            line = [level_text(rows.values(), cell, measure) for rows in levels.values()]
            line += [gain_text(arm, cell, measure) for arm in learnt]
            if any(line):                   # some arm has measured it
                lines.append("| " + " | ".join([f"{cell}, {words}", *line]) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# 5. The figures
# ------------------------------------------------------------------------------------------------

# What a figure shows, from left to right: (title, cell, measure). A fourth entry is a measure to
# draw it against, instead of compute: the paper's Fig. 8.
WALK_PANELS = (
    # per_step of the rule OOD counts up to the first position missed, forward() and all; beside it,
    # turns alone, the rail going on (evaluate.measure_walks).
    ("ID, held-out routes", "held-out/id", "per_step"),
    ("rule OOD, held-out routes", "held-out/ood", "per_step"),
    ("visual OOD, nine other cities", "all/visual", "per_step"),
    ("ID, whole routes", "held-out/id", "success"),
    ("rule OOD: turns, the rail goes on", "held-out/ood", "turns"),
    ("visual OOD, whole routes", "all/visual", "success"))
SIGHT_PANELS = (
    ("visual OOD, nine other cities: landmarks read", "all/visual", "landmarks_read"),
    ("visual OOD: landmarks read where there is one", "all/visual", "landmarks_present"))
PANELS = {
    "gp-l": (("ID, held-out: first answer", "held-out/id", "first_try"),
             ("rule OOD, held-out: first answer", "held-out/ood", "first_try"),
             ("rule OOD: in conversation", "held-out/ood", "success"),
             ("rule OOD: numbers read right", "held-out/ood", "numbers_read")),
    "gp-vl": (("ID, held-out hands", "held-out/id", "success"),
              ("rule OOD, held-out hands", "held-out/ood", "success"),
              ("visual OOD, held-out hands", "held-out/visual", "success"),
              ("ID: reading and success", "held-out/id", "success", "cards_read"),
              ("rule OOD: reading and success", "held-out/ood", "success", "cards_read"),
              ("visual OOD: reading and success", "held-out/visual", "success", "cards_read")),
    "virl-l": WALK_PANELS,
    "virl-vl": (*WALK_PANELS[:2], *SIGHT_PANELS, *WALK_PANELS[3:]),
}


def plot(folders, path, task="gp-l", only=None):
    """Success (on walks, right actions) against training compute: the paper's Fig. 5, 7 and 8.

    Prints the table, too. only: see `choose`.
    """
    arms = name_arms(group(read_runs(folders, task)))
    find_starts(arms)
    arms = choose(arms, only)
    panels = []
    # A panel that nobody has measured is left out.
    for title, cell, measure, *others in PANELS[task]:
        x_label, series = "FLOPs spent", []
        for arm in arms:
            points = curve(arm, cell, measure)
            if others:
                x_label = "all four cards read, %, from the start on"
                points = curve_against(arm, cell, measure, *others)
            if points:
                series.append({"label": arm.label, "colour": arm.colour, "dashed": arm.dashed,
                               "points": points})
        if series:
            panels.append({"title": title, "x_label": x_label, "y_label": "%", "series": series})
    game = "V-IRL, right actions of all tries" if task.startswith("virl") else "GeneralPoints"
    sense = "pictures" if task.endswith("-vl") else "text"
    counts = sorted({len(arm.runs) for arm in arms})
    seeds = str(counts[-1]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    draw_panels(panels, path, f"{game}, {sense}: mean and range over {seeds} seeds")
    print(table(arms, task))


def plot_metrics(folders, keys, path):
    """What training said on its way: metrics.jsonl of some runs, a panel for each key."""
    colours = [colour for pair in zip(ARMS["sft"][1], ARMS["rl"][1]) for colour in pair]
    panels = []
    for key in keys:
        series = []
        for number, folder in enumerate(folders):
            # A number that was not finite stands there as null, and is passed over.
            rows = [row for row in read_lines(pathlib.Path(folder) / "metrics.jsonl")
                    if isinstance(row.get(key), (int, float)) and "step" in row]
            if not rows:
                raise Problem(f"{folder}: no {key} in its metrics.jsonl")
            points = [(row["step"], row[key], row[key], row[key]) for row in rows]
            series.append({"label": str(folder), "colour": colours[number % len(colours)],
                           "dashed": number >= len(colours), "points": points})
        panels.append({"title": key, "x_label": "step", "y_label": "", "series": series})
    draw_panels(panels, path)


# The paper's rule OOD shifts two things, the rule and the hands. Apart, on held-out hands: {title
# of a panel: {place on its x axis: cell}}. The last is the probe that pays for not reading it.
SHIFTS = {"any hands": {"old rule": "id", "new rule": "face-rule any-hands"},
          "hands with a face card": {"old rule": "ten-rule face-hands", "new rule": "ood"},
          "fake: new rule stated, old rule scored": {"of all hands": "fake"}}
CEILING = ("of the fake probe's held-out hands 62.4-62.6 % (of 2,000, of 1,000) can be solved at "
           "all under the old rule, which is scored")


def with_cells(runs, cells):
    """The runs with those of their rows that have all the cells. A run without is left out by name.

    Raises Problem if none is left.
    """
    kept = []
    for run in runs:
        rows = [row for row in run.rows
                if all({"success", "interval"} <= row["cells"].get(cell, {}).keys()
                       for cell in cells)]
        if rows:
            kept.append(replace(run, rows=rows))
        else:
            print(f"left out: {run.folder}, as none of its rows has all of {', '.join(cells)}")
    if not kept:
        names = " ".join(f'"{cell.removeprefix("held-out/")}"' for cell in cells)
        raise Problem("no run has the cells; add them: python evaluate.py --run RUN --steps LAST "
                      f"--splits test --cells {names}")
    return kept


@functools.lru_cache
def solvable(count):
    """Which share of the first `count` held-out hands of the `fake` probe its scoring can pay.

    They are few, so it differs: 0.665 of 200, 0.644 of 500, 0.626 of 1,000, 0.624 of 2,000.
    """
    envs, seeds = cell_environments("fake", "test", count)
    hands = [env.reset(seed)[1]["hand"] for env, seed in zip(envs, seeds)]
    return mean(gp_env.solvable(gp_env.card_numbers(hand.cards, gp_env.RULES["ten"]))
                for hand in hands)


def at_end(arm, cell, payable=False):
    """(mean of the seeds' ends, low, high) in percent: 95 % of the luck of evaluation.

    payable: of the hands of the `fake` probe that can be solved at all.
    """
    found = []
    for row in arm.ends.values():
        measures = row["cells"][cell]
        share = solvable(int(min(2000, measures.get("count", row["hands"])))) if payable else 1
        found.append([min(1, rate / share) for rate in (measures["success"],
                                                        *measures["interval"])])
    return tuple(100 * rate for rate in mean_gain(found))


def plot_shifts(folders, path, only=None):
    """The two shifts of the rule OOD apart, and the `fake` probe: runs of gp-l at their ends."""
    cells = [f"held-out/{cell}" for places in SHIFTS.values() for cell in places.values()]
    arms = name_arms(group(with_cells(read_runs(folders, "gp-l"), cells)))
    arms = choose(arms, only)
    panels, columns = [], {}                # columns: {heading: [a level of each arm]}
    for title, places in SHIFTS.items():
        levels = {place: [at_end(arm, f"held-out/{cell}") for arm in arms]
                  for place, cell in places.items()}
        if len(levels) == 1:                # the probe
            levels["of the solvable"] = [at_end(arm, cells[-1], payable=True) for arm in arms]
        panels.append(shift_panel(title, levels, arms, joined=len(places) > 1))
        columns |= {f"{title}, {place}": level for place, level in levels.items()}
    top = max(high for levels in columns.values() for _, _, high in levels)
    draw_panels([panel | {"top": top} for panel in panels], path,
                f"GeneralPoints, text, held-out hands: success within five tries; {CEILING}")
    print("| % [95 %, luck of evaluation] | seeds | " + " | ".join(columns) + " |")
    print("|---" * (2 + len(columns)) + "|")
    for arm, *levels in zip(arms, *columns.values()):
        print(f"| {arm.label} | {len(arm.runs)} | " + " | ".join(
            "{:.1f} [{:.1f}, {:.1f}]".format(*level) for level in levels) + " |")
    print(f"{CEILING}: what stands beside an ID rate is the share of the solvable")


def shift_panel(title, levels, arms, joined):
    """A panel with places on its x axis. levels: {place: [(mean, low, high) of each arm]}.

    joined: a line leads from place to place; where the effects of two shifts add, the lines of an
    arm are parallel in both panels.
    """
    series = []
    for number, arm in enumerate(arms):
        aside = 0.1 * (number - (len(arms) - 1) / 2)    # bars stand side by side
        look = {"label": arm.label, "colour": arm.colour, "dashed": arm.dashed}
        points = [(at + aside, *level[number]) for at, level in enumerate(levels.values(), 1)]
        # An interval is a bar of its own: a band would fill the room between two places.
        series += [look | {"points": [point]} for point in points]
        if joined:
            series.append(look | {"points": [(x, middle, middle, middle)
                                             for x, middle, _, _ in points]})
    return {"title": title, "x_label": "", "y_label": "%", "series": series,
            "places": dict(enumerate(levels, 1))}


# The paper's Fig. 10 (section 5.5): points of rule OOD that RL gains by its tries in training, in
# conversation.
PAPER_TRIES = {1: 0.48, 3: 2.15, 5: 2.99, 10: 5.99}


TWO_CELLS = {"held-out/ood": "rule OOD", "held-out/id": "ID"}
TRIES_MEASURES = ("first_try", "fresh", "success")


def tries_in_training(run):
    """How many answers to a hand a run of rl.py learnt from."""
    return run.settings["tries"]


def steps_of_sft(run):
    """Steps of SFT behind the checkpoint that a run of rl.py began from. Raises Problem."""
    found = re.search(r"step-(\d+)$", run.settings.get("init") or "")
    if not found:
        raise Problem(f"{run.folder} was not given a checkpoint of sft.py as --init")
    return int(found[1])


def runs_by(key, folders, measures):
    """{key(run): {seed: Run}} of those of RL's runs that measured both their ends.

    Raises Problem where two runs claim one place, or none is left.
    """
    found = {}
    for run in read_runs(folders, "gp-l"):
        first, last = run.rows[0], run.rows[-1]
        if run.kind != "rl":
            continue
        if first["step"] or first is last or any(
                rate(row, cell, measure) is None for row in (first, last)
                for cell in TWO_CELLS for measure in measures):
            print(f"left out: {run.folder}, which lacks its start, its end or a measure")
            continue
        other = found.setdefault(key(run), {}).setdefault(run.seed, run)
        if other is not run:
            what = key.__name__.replace("_", " ")
            raise Problem(f"{other.folder}, {run.folder}: the same seed and the same {what}; name "
                          "runs that differ in nothing else")
    if not found:
        raise Problem("no run of rl.py that measured start and end on held-out hands, ID and OOD")
    return dict(sorted(found.items()))


def plot_tries(folders, path):
    """What RL gains over its start by the tries that it had in training: the paper's Fig. 10.

    folders: runs of gp-l that differ in tries, and in episodes so that compute is the same. Points
    are means over seeds, bars reach from the lowest to the highest. Prints the t intervals.
    """
    tries = runs_by(tries_in_training, folders, TRIES_MEASURES)
    panels, lines = [], []
    for cell, title in TWO_CELLS.items():
        series = []
        for number, measure in enumerate(TRIES_MEASURES):
            look = {"label": HANDS[measure], "colour": ARMS["rl"][1][number]}
            middle = []
            for place, (count, runs) in enumerate(tries.items(), 1):
                gains = [100 * (rate(run.rows[-1], cell, measure)
                                - rate(run.rows[0], cell, measure)) for run in runs.values()]
                x, low_high = place + 0.08 * (number - 1), t_interval(gains)
                series.append(look | {"points": [(x, mean(gains), min(gains), max(gains))]})
                middle.append((x, *[mean(gains)] * 3))
                words = " [{:+.1f}, {:+.1f}]".format(*low_high) if low_high else ""
                lines.append(f"| {title}, {HANDS[measure]} | {count} | {mean(gains):+.1f}{words} | "
                             + ", ".join(f"{gain:+.1f}" for gain in gains) + " |")
            series.append(look | {"points": middle})
        if cell == "held-out/ood":
            series.append({"label": "the paper, in conversation", "colour": GREY, "dashed": True,
                           "points": [(place, *[PAPER_TRIES[count]] * 3) for place, count
                                      in enumerate(tries, 1) if count in PAPER_TRIES]})
        panels.append({"title": f"held-out hands, {title}", "x_label": "tries in training",
                       "y_label": "points gained over the start", "series": series,
                       "places": {place: str(count) for place, count in enumerate(tries, 1)}})
    draw_panels(panels, path, "GeneralPoints, text: RL with more tries in training, equal compute")
    print("| gain, points | tries | mean [95 %, t over seeds] | by seed |", "|---|---|---|---|",
          *lines, sep="\n")


HEALS = (("held-out/ood", "first_try"), ("held-out/ood", "success"),
         ("held-out/ood", "numbers_read"), ("held-out/id", "success"))


def plot_heals(folders, path):
    """Checkpoints along one SFT run, and where RL from each ends: the paper's Fig. 19.

    folders: runs of rl.py on gp-l that differ in --init alone, a checkpoint of sft.py. Points are
    means over seeds, bars reach from the lowest to the highest. Prints the same numbers.
    """
    steps = runs_by(steps_of_sft, folders, [measure for _, measure in HEALS])
    panels, lines = [], []
    for cell, measure in HEALS:
        title, series = f"{TWO_CELLS[cell]}: {HANDS[measure]}", []
        for name, kind, row in (("SFT", "sft", 0), ("then RL", "rl", -1)):
            look = {"label": name, "colour": ARMS[kind][1][0]}
            levels = [[100 * rate(run.rows[row], cell, measure) for run in runs.values()]
                      for runs in steps.values()]
            points = [(place, mean(level), min(level), max(level))
                      for place, level in enumerate(levels, 1)]
            series += [look | {"points": [point]} for point in points]
            series.append(look | {"points": [(x, middle, middle, middle)
                                             for x, middle, _, _ in points]})
            cells = [f"{middle:.1f} ({low:.1f}-{high:.1f})" for _, middle, low, high in points]
            lines.append(f"| {title}, {name} | " + " | ".join(cells) + " |")
        panels.append({"title": title, "x_label": "steps of SFT", "y_label": "%", "series": series,
                       "places": {place: str(count) for place, count in enumerate(steps, 1)}})
    draw_panels(panels, path, "GeneralPoints, text, held out: what RL makes of an ever longer SFT")
    print("| % (lowest-highest seed) | " + " | ".join(map(str, steps)) + " |",
          "|---" * (1 + len(steps)) + "|",
          "| seeds | " + " | ".join(str(len(runs)) for runs in steps.values()) + " |",
          *lines, sep="\n")


# Panels of the map: {key of a row of distance.py: what it is}.
MAP = {"id start||policy": "ID prompts: KL(start || policy)",
       "ood start||policy": "rule OOD prompts: KL(start || policy)"}


def read_distances(files):
    """{"folder/step-000123": row} of what distance.py wrote. Raises Problem."""
    found = {}
    for file in files:
        try:
            for row in json.loads(pathlib.Path(file).read_text()):
                if not all(abs(row[key][0]) < 1e9 for key in MAP):       # refuses nan, too
                    raise ValueError("a distance is none")
                found["/".join(pathlib.Path(row["model"]).parts[-2:])] = row
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise Problem(f"{file}: not what distance.py writes ({error})") from None
    return found


def plot_map(folders, files, path):
    """Rule OOD against the distance from the start, where RL's Razor (2509.04259) would look.

    folders: runs of rl.py on gp-l that leave from checkpoints along one SFT run, measured at both
    ends. files: what distance.py wrote of those checkpoints and of the runs' ends. A blue line
    follows SFT, a red one leads from each checkpoint to where RL from there ends. Raises Problem
    where runs of several seeds have distances: they have a start each. Where no start of a run has
    a distance, it is the common one: see `plot_arms`.
    """
    far, every = read_distances(files), read_runs(folders, "gp-l")
    runs = [run for run in every if run.kind == "rl"]
    if not any("/".join(pathlib.Path(run.settings.get("init") or "").parts[-2:]).replace(
               "*", str(run.seed)) in far for run in runs):
        return plot_arms(name_arms(group(every)), far, path)
    places, seeds = [], set()       # places: (steps of SFT, row and distance before and after RL)
    for run in runs:
        first, last = run.rows[0], run.rows[-1]
        names = ("/".join(pathlib.Path(run.settings.get("init") or "").parts[-2:]).replace(
                 "*", str(run.seed)), f"{run.folder.name}/step-{last['step']:06d}")
        if first["step"] or not far.keys() >= set(names):
            print(f"left out: {run.folder}, whose start or end has no distance or was not played")
            continue
        places.append((steps_of_sft(run), first, far[names[0]], last, far[names[1]]))
        seeds.add(run.seed)
    if not places:
        raise Problem("no run whose two ends distance.py has measured, by their folders' names")
    if len(seeds) > 1:
        raise Problem(f"the distances are of runs of {len(seeds)} seeds: a map has one start")
    places.sort(key=lambda place: place[0])
    panels = []
    for key, title in MAP.items():
        lines = [[(distance[key][0], *[100 * rate(row, "held-out/ood", "first_try")] * 3)
                  for row, distance in ((first, before), (last, after))]
                 for _, first, before, last, after in places]
        series = [{"label": "then RL", "colour": ARMS["rl"][1][0], "points": line}
                  for line in lines]
        series.append({"label": "SFT", "colour": ARMS["sft"][1][0],
                       "points": [line[0] for line in lines]})
        panels.append({"title": title, "x_label": "nats an answer", "y_label": "%",
                       "series": series})
    draw_panels(panels, path, f"rule OOD, {HANDS['first_try']}, by the distance from the start")
    names = ["steps of SFT", *MAP.values(), f"rule OOD, {HANDS['first_try']}, %"]
    print("| " + " | ".join(name.replace(" ||", ",") for name in names) + " |",
          "|---" * len(names) + "|", sep="\n")
    for steps, first, before, last, after in places:
        cells = [f"{before[key][0]:.1f}; {after[key][0]:.1f}" for key in MAP]
        levels = [100 * rate(row, "held-out/ood", "first_try") for row in (first, last)]
        print(f"| {steps} | " + " | ".join(cells) + " | {:.1f}; {:.1f} |".format(*levels))


def plot_arms(arms, far, path):
    """The ends of all arms, a dot for each seed: rule OOD against the distance from its start."""
    panels, measure, lines = [], "first_try", {}
    for key, title in MAP.items():
        series = []
        for arm in arms:
            for seed, run in sorted(arm.runs.items()):
                for row in run.rows:
                    distance = far.get(f"{run.folder.name}/step-{row['step']:06d}")
                    if not distance or rate(row, "held-out/ood", measure) is None:
                        continue
                    level = 100 * rate(row, "held-out/ood", measure)
                    series.append({"label": arm.label, "colour": arm.colour,
                                   "points": [(distance[key][0], *[level] * 3)]})
                    lines.setdefault((arm.label, seed, row["step"]), [f"{level:.1f}"]).insert(
                        -1, "{:.1f} +-{:.1f}".format(distance[key][0], 1.96 * distance[key][1]))
        panels.append({"title": title, "x_label": "nats an answer", "y_label": "%",
                       "series": series})
    if not lines:
        raise Problem("no run whose end distance.py has measured, by the folders' names")
    draw_panels(panels, path, f"rule OOD, {HANDS[measure]}, by the distance from the start")
    names = ["arm", "seed", "step", *MAP.values(), f"rule OOD, {HANDS[measure]}, %"]
    print("| " + " | ".join(name.replace(" ||", ",") for name in names) + " |",
          "|---" * len(names) + "|", sep="\n")
    for place, cells in lines.items():
        print("| " + " | ".join([*map(str, place), *cells]) + " |")


# ------------------------------------------------------------------------------------------------
# 6. Drawing
#
# Pillow does not smooth lines, so everything is drawn at twice the final size and shrunk at the
# end: all numbers below count these small pixels, two to one pixel of the finished PNG.
# ------------------------------------------------------------------------------------------------

PANEL_WIDTH, PANEL_HEIGHT = 920, 720
LEFT, RIGHT, ABOVE, BELOW = 104, 36, 108, 100       # room around a plot for titles and ticks
LEGEND_ROW = 44
BLACK, GREY, PALE = (30, 30, 30), (110, 110, 110), (228, 228, 228)


@dataclass
class Axis:
    """Ticks stand at i * step for first <= i <= last; the axis ends at `end`.

    Huge or tiny values share one power of ten, which is named once, in the label; else it is 0.
    """

    first: int
    last: int
    step: float
    end: float
    power: int

    @property
    def begin(self):
        """The value at the near end."""
        return self.first * self.step

    def tick(self, i):
        """Text of tick number i: its value in units of 10^power, with the decimals that it needs.

        >>> Axis(0, 4, 0.5, 2.0, 0).tick(3)
        '1.5'
        """
        decimals = max(0, self.power - math.floor(math.log10(self.step) + 1e-9))
        return f"{i * self.step / 10.0 ** self.power:.{decimals}f}" if i else "0"

    def named(self, text):
        """A label of the axis, with the power of ten if it has one."""
        return f"{text} (x 10^{self.power})" if self.power else text


def round_axis(low, high):
    """An Axis of 4 to 6 ticks, from `low` or less to `high` or more.

    The step is 1, 2 or 5 times a power of ten.
    """
    if math.isclose(low, high, rel_tol=1e-6):   # a single x, or all y zero: nothing to divide
        low, high = min(low, 0), max(high, 0) or 1
    power = math.floor(math.log10(high - low)) - 1          # too fine a step: coarsen from here
    for step in [m * 10.0 ** (power + k) for k in range(3) for m in (1, 2, 5)]:
        # The 1e-9 keeps float error from adding a tick: 0.3 / 0.1 is not quite 3.
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= 5:
            break
    last = max(last, first + 3)
    size = math.floor(math.log10(max(abs(first), abs(last)) * step) + 1e-9)
    return Axis(first, last, step, last * step, size if size >= 4 or size <= -3 else 0)


def axes_of(panel):
    """(x axis, y axis) that hold all points of a panel. The y axis holds 0, too."""
    points = [point for series in panel["series"] for point in series["points"]]
    xs = [point[0] for point in points] or [0]
    x_axis = round_axis(min(xs), max(xs))
    if x_axis.last - x_axis.first > 3 and min(xs) < max(xs) < x_axis.end:
        # Four ticks remain without the last one, so stop at the data and waste no width.
        x_axis.last, x_axis.end = x_axis.last - 1, max(xs)
    if "places" in panel:           # names at 1, 2, ..., and room at both ends
        x_axis = Axis(0, len(panel["places"]) + 1, 1, len(panel["places"]) + 1, 0)
    lowest = min([0] + [min(middle, low) for _, middle, low, _ in points])
    highest = max([panel.get("top", 0)] + [max(middle, high) for _, middle, _, high in points])
    # A little air above the highest value, but a percentage needs no axis beyond 100.
    return x_axis, round_axis(lowest, max(highest, min(100, highest * 1.03)))


@dataclass
class Frame:
    """The rectangle of a plot in pixels, and the axes along it. y counts down: top < bottom."""

    left: float
    right: float
    top: float
    bottom: float
    x_axis: Axis
    y_axis: Axis

    def pixel(self, x, y):
        """The pixel of a value. 20 pixels keep the dots off the ends of the x axis."""
        along = (x - self.x_axis.begin) / (self.x_axis.end - self.x_axis.begin)
        up = (y - self.y_axis.begin) / (self.y_axis.end - self.y_axis.begin)
        return (self.left + 20 + along * (self.right - self.left - 40),
                self.bottom - up * (self.bottom - self.top))


def fit_font(text, room, size):
    """The font of this size, or the first smaller one in which text fits into `room` pixels."""
    while size > 14 and ImageFont.load_default(size).getlength(text) > room:
        size -= 1
    return ImageFont.load_default(size)


def write(draw, x, y, text, size, anchor, room=PANEL_WIDTH, colour=BLACK):
    """Draw text, its anchor (as Pillow names them) at x, y."""
    draw.text((x, y), text, colour, fit_font(text, room, size), anchor)


def dot(draw, x, y, radius, colour):
    """Draw a filled circle."""
    x, y = round(x), round(y)       # whole numbers, or dots would differ in size by rounding
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def stroke(draw, pixels, colour, dashed):
    """Draw a line through the pixels, stamped dot by dot.

    Pillow's own wide lines vary in width with their slope, leave notches where two pieces meet, and
    know no dashes.
    """
    trail = []
    for (x0, y0), (x1, y1) in zip(pixels, pixels[1:]):
        steps = math.ceil(math.hypot(x1 - x0, y1 - y0))
        trail += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps)]
    for i, (x, y) in enumerate(trail):
        if not dashed or i % 28 < 12:
            dot(draw, x, y, 2.5, colour)


def draw_axes(draw, frame, panel):
    """The grid, the ticks and the three labels of a panel: y above its axis, x below, a title."""
    x_axis, y_axis = frame.x_axis, frame.y_axis
    for i in range(y_axis.first, y_axis.last + 1):
        _, y = frame.pixel(x_axis.end, i * y_axis.step)
        draw.line((frame.left, y, frame.right, y), PALE, 2)
        write(draw, frame.left - 14, y, y_axis.tick(i), 24, "rm", LEFT - 18, GREY)
    for i in range(x_axis.first, x_axis.last + 1):
        x, _ = frame.pixel(i * x_axis.step, 0)
        name = panel["places"].get(i, "") if "places" in panel else x_axis.tick(i)
        draw.line((x, frame.bottom, x, frame.bottom + 8 * bool(name)), BLACK, 2)
        write(draw, x, frame.bottom + 16, name, 24, "ma", colour=GREY)
    draw.line((frame.left, frame.top, frame.left, frame.bottom, frame.right, frame.bottom), BLACK,
              2)
    middle, width = (frame.left + frame.right) / 2, frame.right - frame.left
    write(draw, middle, frame.bottom + 70, x_axis.named(panel["x_label"]), 26, "mm", width)
    write(draw, middle, frame.top - ABOVE + 26, panel["title"], 30, "mm", width)
    write(draw, frame.left - LEFT + 24, frame.top - 34, y_axis.named(panel["y_label"]), 24, "lm",
          PANEL_WIDTH - 48)


def draw_band(draw, frame, series):
    """The range from low to high, in a pale shade of the series' colour."""
    lows = [frame.pixel(x, low) for x, _, low, _ in series["points"]]
    highs = [frame.pixel(x, high) for x, _, _, high in series["points"]]
    if len(lows) == 1:              # a band over one x has no width: give it some
        (x, low), (_, high) = lows[0], highs[0]
        lows, highs = [(x - 6, low), (x + 6, low)], [(x - 6, high), (x + 6, high)]
    if lows:
        draw.polygon(lows + highs[::-1], (*series["colour"], 48))


def draw_line(draw, frame, series):
    """The line of the means, with a dot at each."""
    means = [frame.pixel(x, middle) for x, middle, _, _ in series["points"]]
    stroke(draw, means, series["colour"], series.get("dashed"))
    for x, y in means:
        dot(draw, x, y, 7, series["colour"])


def lay_legend(panels, width):
    """The rows of the legend: [[(series, width of its entry: line, text and gap), ...], ...]."""
    entries = {}                    # label -> the longest series that has it, whose look it shows
    for series in [series for panel in panels for series in panel["series"]]:
        known = entries.setdefault(series["label"], series)
        if len(series["points"]) > len(known["points"]):
            entries[series["label"]] = series
    rows = [[]]
    for name, series in entries.items():
        entry = 80 + fit_font(name, width - 160, 26).getlength(name) + 48
        if rows[-1] and sum(taken for _, taken in rows[-1]) + entry > width:
            rows.append([])
        rows[-1].append((series, entry))
    return rows


def draw_legend(draw, rows, top, width):
    """The rows of `lay_legend`, each in the middle of the width."""
    for number, row in enumerate(rows):
        x = (width - sum(entry for _, entry in row) + 48) / 2   # the last one needs no gap
        y = top + LEGEND_ROW * number + LEGEND_ROW / 2
        for series, entry in row:
            if len(series["points"]) != 1:      # a lone point, e.g. the start, is just a dot
                stroke(draw, [(x, y), (x + 68, y)], series["colour"], series.get("dashed"))
            dot(draw, x + 34, y, 7, series["colour"])
            write(draw, x + 80, y, series["label"], 26, "lm", width - 160)
            x += entry


def draw_panels(panels, path, title=""):
    """Draw learning curves side by side, in the manner of a paper's figure, into one PNG.

    panels: list of dicts, in reading order (three in a row where more than four would get too
        small): {"title", "x_label", "y_label", "series"}; "series" is a list of {"label": str,
        "colour": (r, g, b), "points": [(x, mean, low, high), ...], "dashed": bool}. Points are
        joined in their order. No points: only the legend names the series. One point: a dot, and a
        bar from low to high. Series with the same label share one legend entry. A panel may have
        "places", {1: name, 2: name, ...}, on its x axis, and "top", which its y axis reaches.
    path: where the PNG goes; an older file there is replaced only once the new one is complete.
    title: a heading above all panels; "" leaves its room out.
    """
    in_row = max(1, len(panels) if len(panels) <= 4 else 3)
    # The legend is laid out first: the number of its rows decides the height of the picture.
    width = PANEL_WIDTH * in_row
    legend = lay_legend(panels, width)
    head = 72 if title else 12
    panels_end = head + PANEL_HEIGHT * max(1, math.ceil(len(panels) / in_row))
    image = Image.new("RGB", (width, panels_end + LEGEND_ROW * len(legend) + 20), "white")
    draw = ImageDraw.Draw(image, "RGBA")    # on an RGB image this mode blends translucent colours
    write(draw, width / 2, head / 2 + 4, title, 38, "mm", width - 40)
    for number, panel in enumerate(panels):
        x = number % in_row * PANEL_WIDTH
        y = head + number // in_row * PANEL_HEIGHT
        frame = Frame(x + LEFT, x + PANEL_WIDTH - RIGHT, y + ABOVE, y + PANEL_HEIGHT - BELOW,
                      *axes_of(panel))
        draw_axes(draw, frame, panel)
        for series in panel["series"]:      # all bands first, or one would tint an earlier line
            draw_band(draw, frame, series)
        for series in panel["series"]:
            draw_line(draw, frame, series)
    draw_legend(draw, legend, panels_end, width)
    save(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS), path)


def save(image, path):
    """Write a PNG beside the target, then rename it: a reader never sees half a picture."""
    temporary = f"{path}.{os.getpid()}.tmp"
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


def draw_sheet(task, count, path):
    """A sheet of `count` pictures, two in a row: hands (gp-vl) or street views (virl-vl).

    Rows of hands are black, red, mixed, in turn. Views (front, right / back, left) are of the first
    crossing on a walk, in the training city and the nine others in turn.
    """
    pictures = []
    for seed in range(count):
        if task == "gp-vl":
            suits = ("black", "red", "all")[seed // 2 % 3]
            env = gp_env.GeneralPoints(face=True, suits=suits, split="all", picture=(400, 200))
            pictures.append(env.reset(seed)[0]["image"])
        else:
            city = list(virl_env.CITIES)[seed % len(virl_env.CITIES)]
            sharp = virl_env.Atlas(virl_env.city_files(city, 2048), city)
            env = virl_env.Navigation(sharp, split="all", picture=(400, 400))
            env.reset(seed)
            pictures.append(env.look(next(at for at in env.rail if at.kind == "later turn")))
    wide, high = (side + 10 for side in pictures[0].size)
    sheet = Image.new("RGB", (2 * wide + 10, math.ceil(count / 2) * high + 10), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (10 + number % 2 * wide, 10 + number // 2 * high))
    save(sheet, path)


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw runs and print their table of gains.")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="draw the runs below these "
                        "(default: results)")
    parser.add_argument("--task", choices=TASKS, default="gp-l", help="default gp-l")
    parser.add_argument("--only", nargs="+", metavar="ARM", help='draw these arms, by name or '
                        'pattern ("SFT*"); default: all, but those of one seed only where there '
                        "are none of more")
    parser.add_argument("--metrics", nargs="+", metavar="RUN", help="draw the metrics.jsonl of "
                        "these run folders instead")
    parser.add_argument("--keys", nargs="+", default=["reward", "approx_kl"], metavar="KEY",
                        help="with --metrics: what to draw (default reward approx_kl)")
    parser.add_argument("--shifts", action="store_true", help="gp-l: draw the rule's shift, the "
                        "hands' shift and the fake probe instead, from the ends of the runs")
    parser.add_argument("--tries", action="store_true", help="gp-l: draw RL's gains by the tries "
                        "in training instead (Fig. 10); name runs that differ in nothing else")
    parser.add_argument("--heals", action="store_true", help="gp-l: draw RL's ends by the steps of "
                        "SFT before it instead (Fig. 19); name runs that differ in --init alone")
    parser.add_argument("--map", nargs="+", metavar="JSON", help="gp-l: draw rule OOD against the "
                        "distance from the start instead; files of distance.py")
    parser.add_argument("--sheet", type=int, default=0, metavar="N", help="draw N hands (--task "
                        "gp-vl) or street views (virl-vl) instead")
    parser.add_argument("--out", default="figure.png", help="PNG file (default figure.png)")
    args = parser.parse_args()
    out = pathlib.Path(args.out).absolute()
    if out.is_dir() or not out.parent.is_dir():
        raise Problem(f"--out {args.out}: give a file in a folder that is there")
    ends = args.shifts or args.tries or args.heals or args.map
    if ends and args.task != "gp-l" or args.sheet and not args.task.endswith("-vl"):
        raise Problem("--shifts, --tries, --heals, --map are for gp-l alone, --sheet for --task "
                      "gp-vl or virl-vl")
    if not 0 <= args.sheet <= 1000:
        raise Problem(f"--sheet {args.sheet}: give a number up to 1000")
    if args.sheet:
        draw_sheet(args.task, args.sheet, out)
    elif args.tries:
        plot_tries(args.folders or [HERE], out)
    elif args.map:
        plot_map(args.folders or [HERE], args.map, out)
    elif args.heals:
        plot_heals(args.folders or [HERE], out)
    elif args.shifts:
        plot_shifts(args.folders or [HERE], out, args.only)
    elif args.metrics:
        plot_metrics(args.metrics, args.keys, out)
    else:
        plot(args.folders or [HERE], out, args.task, args.only)
    print(f"drew {args.out}")


if __name__ == "__main__":
    sys.exit(guarded(main))
