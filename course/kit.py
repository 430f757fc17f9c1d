"""The course kit: hand-outs made of the source, checks that name the mistake, a grader, a hunt.

The solution is the source; nothing is copied, so nothing drifts. Whole public functions are emptied
(problems.py says which), called with examples (runs.py) in processes of their own (bench.py), and
compared as plain numbers.

    python course/kit.py blank OUT [--only rl.gae ...]    instructor: a hand-out for students
    python course/kit.py check [rl.gae | 12 | GAE | rl]   student, in the hand-out: right or wrong?
    python course/kit.py grade FOLDER --seed SECRET --out results.json [--only 12 ...]   autograder
    python course/kit.py attack NAME OUT --seed SECRET    instructor: the verifier of problem 3
    python course/kit.py hunt NAME OUT --seed SECRET      instructor: the repository of problem 18

check takes about 5 s for everything, 1 s for the verifier alone; grade about 10 s of CPU,
10 to 30 s of a clock.
"""

import argparse
import ast
import builtins
import contextlib
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import unicodedata

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

if os.name != "posix" or sys.version_info < (3, 11):
    print("kit.py: this needs Python 3.11 or later, on Linux, macOS or WSL", file=sys.stderr)
    sys.exit(2)

from bench import Bench, forget_arguments, hide, syntax_error  # noqa: E402
from problems import (BY_FILE, FILES, PROBLEMS, code_functions, file_of,  # noqa: E402
                      problem_of, select)
from runs import same  # noqa: E402

BLANKS = HERE / "blank"             # in a hand-out: the files as they were handed out
PUBLIC = HERE / "public.json"       # in a hand-out: examples, outcomes, known mistakes
TEACHERS = ("mutants.py", "examples.py")    # files of course/ that stay with the instructor
FOR_TEACHERS = "## For the instructor"      # the hand-out's README ends before this heading
RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
# Words of a hand-in that may reach for our copy of the solution: people look at them.
LOOK = ("sys.modules", "importlib", "__import__", "runpy", "_getframe", "gc.get", "open(",
        "read_text", *(f"import {file}" for file in (*FILES, "runs", "bench", "kit")),
        *(f"from {file} " for file in FILES))
# Words of tests that look at how a source is spelt, not at what it does.
SPELLING = ("__file__", "inspect", "open(", "hashlib", "__code__", "co_code", "crc32", "read_text",
            "linecache", "getsource", "mkdir", "import dis")


class Refused(Exception):
    """Something that the user can put right, in one line."""


# ------------------------------------------------------------------------------------------------
# 1. Blank: a hand-out from the source
# ------------------------------------------------------------------------------------------------


def tracked_files():
    """Paths of the repository's files, relative to its root, as git lists them."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        raise Refused("this command needs the repository with its git folder")
    return [pathlib.PurePosixPath(name) for name in listed.stdout.split("\0") if name]


def handed_out(path):
    """Does a file belong in a hand-out? Not tests, solutions, pictures, curves, written results."""
    if path.parts[0] in ("tests", ".ci", ".github"):
        return False
    if path.parts[0] == "course":
        return path.name not in TEACHERS
    return (path.parts[0] != "results" or path.suffix == ".py"
            or path.name in ("args.json", "eval.jsonl"))


def copy_files(out, wanted):
    """Copy tracked files for which wanted(path) holds into a new folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out} is there already and not empty")
    for path in filter(wanted, tracked_files()):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, out / path)


def emptied(text, functions, helpers):
    """A file without the bodies of `functions`, {name: what is raised}, and without `helpers`.

    A helper goes with the comment directly above it; a rule of a heading stays.
    """
    lines = text.splitlines()
    for node in reversed(ast.parse(text).body):
        name = getattr(node, "name", None)
        if name in functions:
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            start = first.end_lineno if documented else first.lineno - 1
            lines[start:node.end_lineno] = [
                f"    raise NotImplementedError({json.dumps(functions[name])})"]
        elif name in helpers:
            start = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
            while start and (not lines[start - 1] or lines[start - 1].startswith("# ")
                             and not lines[start - 1].startswith("# ---")):
                start -= 1
            lines[start:node.end_lineno] = []
    return "\n".join(lines) + "\n"


def source(file):
    """The text of one of the repository's modules."""
    return (ROOT / f"{file}.py").read_text("utf-8")


def points_and_minutes(problem, function):
    """What a function is worth, and how long its problem takes."""
    points = problem.functions[function]
    if points == problem.points:
        return f"{points} points, about {problem.minutes} minutes"
    return (f"{points} of {problem.points} points of problem {problem.number}, "
            f"about {problem.minutes} minutes in all")


def blanked(functions):
    """{file: its text without these functions}."""
    texts = {}
    for file in dict.fromkeys(name.split(".")[0] for name in functions):
        mine = [name for name in functions if name.split(".")[0] == file]
        raised, helpers = {}, set()
        for name in mine:
            problem, short_name = problem_of(name), name.split(".")[1]
            raised[short_name] = f"{short_name}: {points_and_minutes(problem, name)}"
            helpers.update(helper.split(".")[1] for helper in problem.helpers)
        texts[file] = emptied(source(file), raised, helpers)
    return texts


def known_mistakes(bench, function, made, expected):
    """What each known mistake gives for the examples, where it is not what is expected."""
    import mutants
    known = [mutant for mutant in mutants.MUTANTS if mutant.function == function]
    text = source(function.split(".")[0])
    # where the function was blank, the rest of the file is ours anyway
    made_by = mutants.solution if problem_of(function).blank else mutants.apply
    texts = [made_by(text, mutant) for mutant in known]
    given = bench.many(function, texts, made)
    return [{"says": mutant.says, "hint": mutant.hint, "gives": {
        i: outcome for i, outcome in enumerate(gives) if not same(outcome, expected[i])}}
        for mutant, gives in zip(known, given)]


def public_outcomes(functions, bench):
    """Examples of each function, what is expected, and what each known mistake gives instead."""
    import examples
    found = {}
    for function in functions:
        text = source(function.split(".")[0])
        made = examples.make(function, "public")
        outcomes, trouble = bench.outcomes(function, text, made)
        if trouble:
            raise Refused(f"{function}: the source itself fails: {trouble}")
        wanted = examples.expected(function, made, outcomes)
        mistakes = known_mistakes(bench, function, made, wanted)
        found[function] = {"examples": made, "expected": wanted, "mistakes": mistakes}
    return found


def blank(out, only=()):
    """Make a hand-out in the folder `out`. only: functions or problems, all if empty."""
    functions = selected(only) or code_functions()
    for name in BY_FILE.keys() & functions:
        raise Refused(f"problem {problem_of(name).number} has nothing to be left blank")
    copy_files(out, handed_out)
    texts = blanked([name for name in functions if problem_of(name).blank])
    folder = out / "course" / "blank"
    folder.mkdir(parents=True)
    for file in FILES:
        text = texts.get(file, source(file))
        (out / f"{file}.py").write_text(text, "utf-8")
        (folder / f"{file}.py").write_text(text, "utf-8")
    readme = out / "course" / "README.md"
    if readme.exists():
        readme.write_text(readme.read_text("utf-8").split(FOR_TEACHERS)[0], "utf-8")
    readme, points = out / "README.md", sum(problem_of(name).functions[name] for name in functions)
    if readme.exists():
        readme.write_text(hand_out_words(functions if only else (), points)
                          + without_section(readme.read_text("utf-8"), "Assignments"), "utf-8")
    with Bench(ROOT, ROOT, functions) as bench:
        public = public_outcomes(functions, bench)
    (out / "course" / PUBLIC.name).write_text(json.dumps(
        {"blank": [name for name in functions if problem_of(name).blank], "functions": public}))
    print(f"{out}: {len(functions)} functions, {points} points. Next, in that folder:\n"
          "    python course/kit.py check")


def hand_out_words(functions, points):
    """What stands on top of a hand-out's README. functions: those of --only, none for all."""
    numbers = sorted({problem_of(name).number for name in functions})
    until = "they are written" if numbers else "problems 1 to 17 are done"
    mine = (f"Your problems here: {', '.join(map(str, numbers))}; {points} points.\n\n"
            if numbers else "")
    return ("**This is a hand-out.** Start with [course/README.md](course/README.md). Functions "
            "that you write are empty: training\ncommands stop with `NotImplementedError` until "
            f"{until}. Tests and written results are not here.\nCheck yourself with "
            f"`python course/kit.py check`.\n\n{mine}")


def without_section(text, heading):
    """A text in Markdown without one section of the second level."""
    return re.sub(rf"^## {heading}\n.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)


def selected(wanted):
    """All functions that numbers and names mean, each once. Refuses a word that means nothing."""
    found = {}
    for one in wanted:
        names = select(one)
        if not names and one.strip().lower() in {
                said for p in PROBLEMS for said in (str(p.number), p.name.lower())}:
            raise Refused(f"{one} is read by people, see course/README.md")
        if not names:
            raise Refused(f"{one!r} is no problem: take one of {', '.join(code_functions())}")
        found |= dict.fromkeys(names)
    return list(found)


# ------------------------------------------------------------------------------------------------
# 2. Check: compare, and name the mistake
# ------------------------------------------------------------------------------------------------


def bare(outcome):
    """An outcome whose exception, if it is one, has lost its words."""
    if isinstance(outcome, dict) and "raised" in outcome:
        return {"raised": str(outcome["raised"]).split(":")[0]}
    return outcome


def name_mistake(outcomes, expected, mistakes):
    """The known mistake whose outcomes these are, or None.

    Counted over the examples on which either is wrong: at least nine of ten alike, and no other
    mistake closer.
    """
    wrong = {i for i, (outcome, wanted) in enumerate(zip(outcomes, expected))
             if not same(outcome, wanted)}
    best, closeness = None, 0.9
    for mistake in mistakes:
        gives = {int(i): outcome for i, outcome in mistake["gives"].items()}
        either = {i for i in wrong | gives.keys() if i < len(outcomes)}
        alike = [same(bare(outcomes[i]), bare(gives[i])) for i in either if i in gives]
        share = sum(alike) / max(1, len(either))
        if share > closeness or share == closeness == 1 and best is None:
            best, closeness = mistake, share
    return best


def points_of(function, outcomes, expected):
    """Points for these outcomes: all or nothing, but for the self-check.

    There, one for each spoilt batch that is found, minus two for each clean one that is refused.
    """
    full = problem_of(function).functions[function]
    if len(outcomes) < len(expected):
        return 0
    if function == "rl.complaints":
        found = sum(wanted["complains"] and same(outcome, wanted)
                    for outcome, wanted in zip(outcomes, expected))
        refused = sum(not wanted["complains"] and not same(outcome, wanted)
                      for outcome, wanted in zip(outcomes, expected))
        return max(0, min(full, found) - 2 * refused)
    return full * all(map(same, outcomes, expected))


def first_difference(outcomes, expected):
    """The number of the first example that differs, or None."""
    for i, (outcome, wanted) in enumerate(zip(outcomes, expected)):
        if not same(outcome, wanted):
            return i
    return None


def first_part(yours, expected, at="here"):
    """The first place inside two outcomes where they differ: (where, yours, expected)."""
    keys = ()
    if isinstance(expected, (dict, list)) and type(yours) is type(expected):
        keys = expected if isinstance(expected, dict) else range(min(len(yours), len(expected)))
    for key in keys:
        if isinstance(expected, list) or key in yours:
            if not same(yours[key], expected[key]):
                return first_part(yours[key], expected[key], f"{at}[{key!r}]")
    return at, short(yours, 100), short(expected, 100)


def short(value, width=400):
    """A value in one line that fits a screen. NaN and the like as Python writes them."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= width else f"{text[:width]} ... ({len(text)} characters)"


def explain(function, public, outcomes, trouble):
    """(points, lines) about one function on the public examples."""
    expected = public["expected"]
    points, full = (points_of(function, outcomes, expected),
                    problem_of(function).functions[function])
    if points == full:
        return points, [f"right on {len(expected)} examples"]
    at = first_difference(outcomes, expected)
    if at is not None and str(bare(outcomes[at])) == "{'raised': 'NotImplementedError'}":
        return 0, ["not written yet"]
    lines = [trouble] if trouble else []
    if at is not None:
        wrong = sum(not same(*pair) for pair in zip(outcomes, expected))
        lines += [f"{wrong} of {len(expected)} examples differ. Example {at + 1}:",
                  f"    arguments  {short(public['examples'][at])}",
                  f"    yours      {short(outcomes[at])}",
                  f"    expected   {short(expected[at])}",
                  "    first at   {}: yours {}, expected {}".format(
                      *first_part(outcomes[at], expected[at])),
                  f"    in full    course/public.json, functions, {function}, number {at}"]
    mistake = name_mistake(outcomes, expected, public["mistakes"]) if outcomes else None
    if mistake:
        lines.append(f"This is what a function gives that {mistake['says']}. "
                     f"Think of this: {mistake['hint']}")
    return points, lines


def form_trouble(function, folder):
    """What is wrong with the form of attack.json, hunt.json or test_hunt.py, "" if nothing."""
    text = read_hand_in(folder, file_of(function))
    if not text:
        return "there is no such file"
    if function == "hunt.test":
        return spelling(text) or test_trouble(text)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"it cannot be read: {error}"
    if not isinstance(found, dict):
        return "it is no {...}"
    if not isinstance(found.get("name"), str):
        return '"name" is missing'
    if function == "attack":
        answers = found.get("answers")
        if not isinstance(answers, list) or len(answers) != 3:
            return '"answers" has to be a list of three'
        for i, one in enumerate(answers, 1):
            if not attack_example(one):
                return f"answer {i} has to have four cards of {' '.join(RANKS)}, rule and text"
            if one["text"] == "...":
                return f"the text of answer {i} is still to be written"
        return ""
    if found.get("file") not in [f"{file}.py" for file in FILES]:
        return f'"file" has to be one of {", ".join(f"{file}.py" for file in FILES)}'
    if type(found.get("line")) is not int or found["line"] < 1:
        return '"line" has to be a number, 1 or more'
    if not isinstance(found.get("number"), str) or found["number"] in ("", "..."):
        return '"number" has to say, in words, which number gave it away'
    return ""


def spelling(test):
    """Why a test is refused that looks at how a source is spelt, "" if it does not."""
    return next((f"{word} is refused: test what the code does" for word in SPELLING
                 if word in test), "")


def test_trouble(text):
    """What keeps a test_hunt.py from being run, "" if nothing."""
    if mistake := syntax_error(text, "test_hunt.py"):
        return mistake
    tests = [node for node in ast.parse(text).body
             if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    if any(ast.unparse(node.args) for node in tests):
        return "its test_* functions take no arguments"
    return "" if tests else "it has no function test_*"


def check(wanted):
    """Compare the functions of a hand-out with their public examples, and count points."""
    if not PUBLIC.exists():
        raise Refused("this is the repository, where nothing is empty. Make a hand-out first: "
                      "python course/kit.py blank OUT")
    public = json.loads(PUBLIC.read_text("utf-8"))
    known = public["functions"]
    meant = selected(wanted) or list(known)
    functions = [name for name in meant if name in known]
    total, formless = 0, False
    for function in [name for name in meant if name not in known and name not in BY_FILE]:
        print(f"{function}: not among the problems of this hand-out")
    for function in [name for name in meant if name in BY_FILE]:
        trouble = form_trouble(function, ROOT)
        formless |= bool(trouble)
        problem = problem_of(function)
        print(f"{problem.number:2d} {problem.name}, {file_of(function)}: "
              f"{trouble or 'the form is right; what it says is graded when it is handed in'}")
    with Bench(BLANKS, ROOT, functions, public["blank"], quiet=False) as bench:
        for function in functions:
            text = read_hand_in(ROOT, file_of(function))
            outcomes, trouble = bench.outcomes(function, text, known[function]["examples"])
            points, lines = explain(function, known[function], outcomes, trouble)
            total += points
            problem = problem_of(function)
            print(f"{problem.number:2d} {problem.name}, {function}: {points} of "
                  f"{problem.functions[function]} points; {lines[0]}")
            for line in lines[1:]:
                print("     " + line)
    full = sum(problem_of(name).functions[name] for name in functions)
    if functions or not wanted:
        print(f"{total} of {full} points")
    return total == full and not formless


# ------------------------------------------------------------------------------------------------
# 3. Grade: hidden examples
# ------------------------------------------------------------------------------------------------


def read_hand_in(folder, name, limit=1_000_000):
    """The text of a file that a student handed in; "" if there is none. Links are not followed."""
    path = folder / name
    if path.is_symlink() or not path.is_file() or path.stat().st_size > limit:
        return ""
    return path.read_text("utf-8-sig", errors="replace")


def read_json(folder, name):
    """What a student's JSON file holds, {} if it holds nothing that can be read."""
    try:
        return json.loads(read_hand_in(folder, name) or "{}")
    except (ValueError, RecursionError):
        return {}


def refuse_what_is_no_hand_in(folder, names, out):
    """Stop, with a line, where a folder holds none of these files: a zero should not be silent."""
    if not folder.is_dir():
        raise Refused(f"{folder}: {'this is no folder' if folder.exists() else 'not there'}")
    if not any((folder / name).is_file() for name in names):
        found = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
        said = (f"nothing was graded: {folder} holds none of {', '.join(names)}. It holds "
                + (", ".join(found[:10]) or "nothing") + ", ..." * (len(found) > 10))
        put_in_place(out, {"score": 0, "output": said, "tests": []})
        raise Refused(said)


def grade(folder, seed, out, name=None, only=()):
    """Judge a hand-in on hidden examples and write Gradescope's results.json.

    The student's functions are run first, all of them; what is right is computed afterwards, so no
    process that runs a student's line holds an expected outcome. name: whose attack and hunt it is.
    only: functions or problems, all if empty.
    """
    import examples
    wanted = selected(only) or [*code_functions(), *BY_FILE]
    functions = [function for function in wanted if function not in BY_FILE]
    refuse_what_is_no_hand_in(folder, list(dict.fromkeys(map(file_of, wanted))), out)
    made = {function: examples.make(function, seed) for function in functions}
    tests = []
    with Bench(ROOT, ROOT, wanted) as bench:
        texts = {function: read_hand_in(folder, file_of(function)) for function in functions}
        theirs = {function: bench.outcomes(function, text, made[function]) if text
                  else ([], f"there is no {file_of(function)}, or it is empty")
                  for function, text in texts.items()}
        hunted = (grade_hunt(bench, folder, seed, name)
                  if {"hunt.line", "hunt.test"} & set(wanted) else [])
        bench.stop()        # the right outcomes come from a server that saw no student's job
        for function in functions:
            text = source(function.split(".")[0])
            outcomes, trouble = theirs[function]
            reference, why = bench.outcomes(function, text, made[function])
            if why:
                raise Refused(f"{function}: the source itself fails: {why}")
            expected = examples.expected(function, made[function], reference)
            mistakes, points = [], points_of(function, outcomes, expected)
            if points < problem_of(function).functions[function] and outcomes:
                with contextlib.suppress(RuntimeError):     # out of time: then it has no name
                    mistakes = known_mistakes(bench, function, made[function], expected)
            tests.append(result(function, points, hidden_words(outcomes, trouble, expected,
                                                               mistakes)))
        if "attack" in wanted:
            tests.append(grade_attack(bench, folder, seed, name))
    tests += hunted
    files = {f"{one.split('.')[0]}.py" for one in functions}
    odd = [f"{file}: {word}" for file in sorted(files) for word in LOOK
           if read_hand_in(folder, file).count(word) > source(file[:-3]).count(word)]
    if odd:
        tests.append({"name": "read by hand: does it call our solution?", "score": 0,
                      "max_score": 0, "visibility": "hidden", "output": ", ".join(odd)})
    write_results(out, tests, [problem_of(one) for one in wanted] if only else PROBLEMS)


def hidden_words(outcomes, trouble, expected, mistakes):
    """What a student is told of the hidden examples: how many, and the name of a mistake."""
    right = sum(map(same, outcomes, expected))
    if outcomes and str(bare(outcomes[0])) == "{'raised': 'NotImplementedError'}":
        return "not written"
    said = [trouble] if trouble else []
    said.append(f"{right} of {len(expected)} hidden examples are right")
    said += first_exception(outcomes)
    mistake = name_mistake(outcomes, expected, mistakes)
    if mistake:
        said.append(f"this is what a function gives that {mistake['says']}")
    return "; ".join(said)


def first_exception(outcomes):
    """Kind and line of the first exception of a student's function, in a list; no word of it.

    Its words, or a class of the student's own, could tell hidden examples.
    """
    for outcome in outcomes:
        said = str(outcome.get("raised")) if isinstance(outcome, dict) else ""
        at = re.search(r" \((\w+\.py), line ([0-9]{1,6})\)$", said)
        if at:
            kind = said.split(":")[0]
            kind = kind if isinstance(getattr(builtins, kind, None), type) else "an exception"
            return [f"{kind} in {at[1]}, line {at[2]}"]
    return []


def result(function, points, output):
    """One entry of Gradescope's list of tests."""
    problem = problem_of(function)
    return {"name": f"{problem.number} {problem.name}: {function}", "score": points,
            "max_score": problem.functions[function], "output": output,
            # seen at once, the line of the hunt would be found by trial
            "visibility": "after_due_date" if function in BY_FILE else "visible"}


def put_in_place(out, results):
    """Write results.json at once, or not at all."""
    new = out.with_name(out.name + ".new")
    new.write_text(json.dumps(results, indent=1), "utf-8")
    os.replace(new, out)


def write_results(out, tests, graded):
    """Write what the kit gave, and say what is left to people. graded: the problems."""
    left = {problem.number: problem.points - sum(problem.functions.values()) for problem in graded}
    numbers = ", ".join(str(number) for number in left if left[number])
    said = (f"{sum(left.values())} more points are given by hand (problems {numbers})" if numbers
            else "no more are given by hand")
    put_in_place(out, {"output": said, "tests": tests})
    print(f"{sum(one['score'] for one in tests)} of {sum(one['max_score'] for one in tests)} "
          f"points, {said}")


# ------------------------------------------------------------------------------------------------
# 4. Attack and hunt: one planted bug, by name
# ------------------------------------------------------------------------------------------------


def plain_name(name):
    """A name without what lists, forms, folders change: case, spaces around it, how ö is made."""
    return unicodedata.normalize("NFC", name).strip().lower()


def chosen(name, bugs, secret):
    """The bug that belongs to a name, whatever the name is; only who has the secret can tell."""
    if not name:
        raise Refused("whose attack or hunt is it? Give the name (grade: --name)")
    name = f"{secret}/{plain_name(name)}"
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return bugs[int.from_bytes(digest[:8], "big") % len(bugs)]


def attack(name, out, secret):
    """Write the planted verifier of a student into a new folder, and print the key."""
    import mutants
    mutant = chosen(name, mutants.ATTACKS, secret)
    copy_files(out, lambda path: False)
    out.mkdir(parents=True, exist_ok=True)
    (out / "verifier.py").write_text(mutants.apply(source("verifier"), mutant), "utf-8")
    (out / "attack.json").write_text(json.dumps({"name": name, "answers": [
        {"cards": ["A", "2", "3", "4"], "rule": "ten", "text": "..."}] * 3}, indent=1), "utf-8")
    print(f"key for {ascii(name)}: verifier.py {mutant.says} ({mutant.function})")


def attack_example(answer):
    """An answer that was handed in as an example of verify_gp, None if it has not the form."""
    if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
        return None
    cards, rule = answer.get("cards"), answer.get("rule", "ten")
    if not isinstance(cards, list) or len(cards) != 4 or any(card not in RANKS for card in cards):
        return None
    court = (11, 12, 13) if rule == "face" else (10, 10, 10)
    worth = dict(zip("JQK", court)) | {"A": 1}
    numbers = [worth[card] if card in worth else int(card) for card in cards]
    return {"text": answer["text"][:5000], "cards": cards, "numbers": numbers, "target": 24,
            "picture": False, "parsed": {}}


def handed_in_json(folder, file, name):
    """(what a student's JSON object holds, whose it is, a line if it says that it is another's).

    Whose: `name`, else what it says itself.
    """
    found = read_json(folder, file)
    found = found if isinstance(found, dict) else {}
    says = str(found.get("name") or "")
    if name and says and plain_name(says) != plain_name(name):
        return found, name, f"this file is {says[:100]}'s"
    return found, name or says, ""


def grade_attack(bench, folder, secret, name):
    """Two points for each of three answers that the planted verifier pays and ours does not."""
    import mutants
    handed_in, name, foreign = handed_in_json(folder, "attack.json", name)
    if foreign:
        return result("attack", 0, foreign)
    answers = handed_in.get("answers", [])
    made = [attack_example(one) for one in (answers if isinstance(answers, list) else [])[:3]]
    made = [one for one in made if one]
    if not made:
        return result("attack", 0, "attack.json holds no answer that can be read")
    planted = mutants.apply(source("verifier"), chosen(name, mutants.ATTACKS, secret))
    (paid, _), (ours, _) = (bench.outcomes("verifier.verify_gp", text, made, whole=True)
                            for text in (planted, source("verifier")))
    good = len({tuple(sorted(one["cards"])) for one, a, b in zip(made, paid, ours)
                if a.get("correct") is True and b.get("correct") is False})
    both = sum(b.get("correct") is True for b in ours)
    return result("attack", 2 * good, f"{good} hands are paid there and wrong, {both} right")


def hunt(name, out, secret):
    """Write the repository with one silent bug into a new folder, and print the key."""
    import mutants
    mutant = chosen(name, mutants.HUNTS, secret)
    file = mutant.function.split(".")[0]
    text = source(file)
    planted, line = mutants.apply(text, mutant), mutants.lines_of(text, mutant)[0][0]
    copy_files(out, lambda path: path.parts[0] not in ("tests", "course", ".ci", ".github")
               and not (path.parts[0] == "results" and path.suffix == ".md"))   # answers 19
    (out / f"{file}.py").write_text(planted, "utf-8")
    (out / "hunt.json").write_text(json.dumps(
        {"name": name, "file": "...", "line": 0, "number": "..."}), "utf-8")
    for path in out.rglob("*"):
        os.utime(path, (10 ** 9, 10 ** 9))      # the newest file would be the one to look at
    print(f"key for {ascii(name)}: {file}.py, line {line}: {mutant.function} {mutant.says}\n"
          f"what tells: {mutant.tells}")


def grade_hunt(bench, folder, secret, name):
    """The line, the test, and for the instructor what was said of the number, beside the key."""
    import mutants
    handed_in, name, foreign = handed_in_json(folder, "hunt.json", name)
    test = read_hand_in(folder, "test_hunt.py")
    if not handed_in and not test or foreign:
        return [result(one, 0, foreign or "nothing was handed in")
                for one in ("hunt.line", "hunt.test")]
    mutant = chosen(name, mutants.HUNTS, secret)
    file = mutant.function.split(".")[0]
    said = handed_in.get("line")
    hit = (handed_in.get("file") == f"{file}.py" and isinstance(said, int)
           and any(first - 2 <= said <= last + 2
                   for first, last in mutants.lines_of(source(file), mutant)))
    at = ", ".join(f"{file}.py {first}" for first, _ in mutants.lines_of(source(file), mutant))
    by_hand = {"name": "18 The hunt: the number, 8 points by hand", "score": 0, "max_score": 0,
               "visibility": "hidden",
               "output": f"handed in: {short(handed_in, 2000)}\n"
                         f"key: {at}, {mutant.says}; what tells: {mutant.tells}"}
    return [result("hunt.line", 6 * hit, "this is the line" if hit else "another line, or none"),
            grade_test(bench, test, [mutant, *others(name, mutant, secret)]), by_hand]


def others(name, mutant, secret):
    """Two bugs in other functions. A test that knows its own bug has nothing to say of them.

    add_advantages calls gae, so that a right test of one may find a bug in the other.
    """
    import mutants
    near = {mutant.function}
    if near & {"rl.gae", "rl.add_advantages"}:
        near = {"rl.gae", "rl.add_advantages"}
    found = []
    for number in (1, 2):
        bugs = [one for one in mutants.HUNTS if one.function not in near]
        found.append(chosen(f"{number}/{plain_name(name)}", bugs, secret))
        near = near | {found[-1].function}
    return found


def grade_test(bench, test, bugs):
    """A test has to pass on the source, fail with the first of the bugs, pass with the others."""
    if not test or spelling(test):
        return result("hunt.test", 0, spelling(test) or "there is no test_hunt.py")
    found = {}
    order = [None, *bugs]
    secrets.SystemRandom().shuffle(order)       # a test that counts its runs knows nothing
    for bug in order:
        with tempfile.TemporaryDirectory() as folder:
            lay_out(pathlib.Path(folder), bug)
            outcomes, trouble = bench.test(test, folder)
        if trouble:
            return result("hunt.test", 0, trouble)
        found[bug] = outcomes[0] if isinstance(outcomes[0], dict) else {}
    found = [found[bug] for bug in (None, *bugs)]
    clean = [type(one.get("passed")) is int and one["passed"] > 0 and not one.get("failed")
             for one in found]      # a test may write what it likes
    fine = bool(found[1].get("failed")) and clean[0] and all(clean[2:])
    said = ", ".join("passes" if one else "fails" for one in clean[2:])
    return result("hunt.test", 6 * fine, (
        f"on the source: {short(found[0], 200)}; on the planted one: {short(found[1], 200)}; "
        f"with bugs in two other functions, where it should pass: {said}"))


def lay_out(folder, bug):
    """The repository in a folder whose name, sizes and links tell nothing. bug: None for none."""
    import mutants
    folder.chmod(0o755)
    for path in ROOT.iterdir():
        if path.suffix != ".py" and path.name not in (".git", "__pycache__"):
            (folder / path.name).symlink_to(path)
    for file in FILES:
        text = source(file)
        if bug and bug.function.split(".")[0] == file:
            text = mutants.apply(text, bug)
        (folder / f"{file}.py").write_text(f"{text}#{'#' * secrets.randbelow(1000)}\n", "utf-8")


# ------------------------------------------------------------------------------------------------
# 5. The command line
# ------------------------------------------------------------------------------------------------


def read_seed(said):
    """The secret that a command names: itself, or @FILE, which nobody else may read."""
    seed = said
    if said.startswith("@"):
        path = pathlib.Path(said[1:])
        if path.stat().st_mode & 0o077:
            raise Refused(f"{path}: others can read the seed; chmod 600 {path}")
        seed = path.read_text("utf-8").strip()
    if not seed:
        raise Refused("--seed is empty")
    return seed


def main():
    """Read the command, do it, and say in one line what was wrong with it."""
    parser = argparse.ArgumentParser(description="The course kit.")
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("blank", help="make a hand-out for students")
    made.add_argument("out", type=pathlib.Path)
    made.add_argument("--only", nargs="+", default=[], help="functions, numbers or names")
    made = commands.add_parser("check", help="compare with the public examples")
    made.add_argument("functions", nargs="*", help="rl.gae, gae, 12, GAE or rl; all code if none")
    made = commands.add_parser("grade", help="judge a hand-in on hidden examples")
    made.add_argument("folder", type=pathlib.Path)
    made.add_argument("--seed", required=True, help="a secret, or @FILE that holds it")
    made.add_argument("--out", type=pathlib.Path, default="results.json")
    made.add_argument("--name", help="whose attack and hunt it is (default: what the files say)")
    made.add_argument("--only", nargs="+", default=[], help="functions, numbers or names")
    for command, text in (("attack", "the planted verifier of a student"),
                          ("hunt", "the planted repository of a student")):
        made = commands.add_parser(command, help=text)
        made.add_argument("name")
        made.add_argument("out", type=pathlib.Path)
        made.add_argument("--seed", required=True, help="a secret, or @FILE that holds it")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")    # any answer, on any terminal
    try:
        if args.command == "blank":
            blank(args.out, args.only)
        elif args.command == "check":
            return 0 if check(args.functions) else 1
        elif args.command == "grade":
            seed = read_seed(args.seed)
            if not args.out.parent.is_dir():
                raise Refused(f"--out {args.out}: there is no such folder")
            if os.getuid() != 0:
                print("kit.py: you are not root, so a student's code can read your files: use a "
                      "container", file=sys.stderr)
            forget_arguments()
            hide()
            grade(args.folder, seed, args.out, args.name, args.only)
        else:
            command = attack if args.command == "attack" else hunt
            command(args.name, args.out, read_seed(args.seed))
    except ModuleNotFoundError as missing:
        if missing.name not in ("examples", "mutants"):
            raise
        print("kit.py: this command is the instructor's; the hand-out has no solutions",
              file=sys.stderr)
        return 2
    except (Refused, OSError, UnicodeError) as problem:
        print(f"kit.py: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
