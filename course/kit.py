"""The course kit: hand-outs made of the source, checks that name the mistake, a grader, a hunt.

The solution is the source; nothing is copied, so nothing drifts. Whole public functions are emptied
(problems.py says which), called with examples (runs.py) in processes of their own (bench.py), and
compared as plain numbers.

    python course/kit.py blank OUT [--only rl.gae ...]    instructor: a hand-out for students
    python course/kit.py check [rl.gae | 12 | GAE ...]    student, in the hand-out: right or wrong?
    python course/kit.py grade FOLDER --seed SECRET --out results.json     autograder (Gradescope)
    python course/kit.py attack NAME OUT --seed SECRET    instructor: the verifier of problem 3
    python course/kit.py hunt NAME OUT --seed SECRET      instructor: the repository of problem 18

check takes about 5 s for everything, 1 s for the verifier alone; grade about 10 s of CPU.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

if os.name != "posix" or sys.version_info < (3, 11):
    print("kit.py: this needs Python 3.11 or later, on Linux, macOS or WSL", file=sys.stderr)
    sys.exit(2)

from bench import Bench, forget_arguments, hide  # noqa: E402
from problems import (BY_FILE, FILES, PROBLEMS, code_functions, problem_of,  # noqa: E402
                      select)
from runs import same  # noqa: E402

BLANKS = HERE / "blank"             # in a hand-out: the files as they were handed out
PUBLIC = HERE / "public.json"       # in a hand-out: examples, outcomes, known mistakes
TEACHERS = ("mutants.py", "examples.py")    # files of course/ that stay with the instructor
FOR_TEACHERS = "## For the instructor"      # the hand-out's README ends before this heading


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
    functions = [name for wanted in only for name in select_or_refuse(wanted)] or code_functions()
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
    with Bench(ROOT, ROOT, functions) as bench:
        public = public_outcomes(functions, bench)
    (out / "course" / PUBLIC.name).write_text(json.dumps(
        {"blank": [name for name in functions if problem_of(name).blank], "functions": public}))
    points = sum(problem_of(name).functions[name] for name in functions)
    print(f"{out}: {len(functions)} functions, {points} points. Next, in that folder:\n"
          "    python course/kit.py check")


def select_or_refuse(wanted):
    """`select`, or a line that says what could have been meant."""
    found = select(wanted)
    said = wanted.strip().lower()
    if not found and any(said in (str(one.number), one.name.lower()) for one in PROBLEMS):
        raise Refused(f"{wanted} is graded from what you hand in, see course/README.md")
    if not found:
        raise Refused(f"{wanted!r} is no problem: take one of {', '.join(code_functions())}")
    return found


# ------------------------------------------------------------------------------------------------
# 2. Check: compare, and name the mistake
# ------------------------------------------------------------------------------------------------


def bare(outcome):
    """An outcome whose exception, if it is one, has lost its words."""
    if isinstance(outcome, dict) and "raised" in outcome:
        return {"raised": outcome["raised"].split(":")[0]}
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
                  f"    expected   {short(expected[at])}"]
    mistake = name_mistake(outcomes, expected, public["mistakes"]) if outcomes else None
    if mistake:
        lines.append(f"This is what a function gives that {mistake['says']}. "
                     f"Think of this: {mistake['hint']}")
    return points, lines


def check(wanted):
    """Compare the functions of a hand-out with their public examples, and count points."""
    if not PUBLIC.exists():
        raise Refused("this is the repository, where nothing is empty. Make a hand-out first: "
                      "python course/kit.py blank OUT")
    public = json.loads(PUBLIC.read_text("utf-8"))
    known = public["functions"]
    functions = [name for one in wanted for name in select_or_refuse(one)] or list(known)
    functions = [name for name in functions if name in known]
    total = 0
    with Bench(BLANKS, ROOT, functions, public["blank"], quiet=False) as bench:
        for function in functions:
            text = read_hand_in(ROOT, function.split(".")[0] + ".py")
            outcomes, trouble = bench.outcomes(function, text, known[function]["examples"])
            points, lines = explain(function, known[function], outcomes, trouble)
            total += points
            problem = problem_of(function)
            print(f"{problem.number:2d} {problem.name}, {function}: {points} of "
                  f"{problem.functions[function]} points; {lines[0]}")
            for line in lines[1:]:
                print("     " + line)
    full = sum(problem_of(name).functions[name] for name in functions)
    print(f"{total} of {full} points")
    return total == full


# ------------------------------------------------------------------------------------------------
# 3. Grade: hidden examples
# ------------------------------------------------------------------------------------------------


def read_hand_in(folder, name, limit=1_000_000):
    """The text of a file that a student handed in; "" if there is none. Links are not followed."""
    path = folder / name
    if path.is_symlink() or not path.is_file() or path.stat().st_size > limit:
        return ""
    return path.read_text("utf-8", errors="replace")


def read_json(folder, name):
    """What a student's JSON file holds, {} if it holds nothing that can be read."""
    try:
        return json.loads(read_hand_in(folder, name) or "{}")
    except (ValueError, RecursionError):
        return {}


def grade(folder, seed, out, name=None):
    """Judge a hand-in on hidden examples and write Gradescope's results.json.

    The student's functions are run first, all of them; what is right is computed afterwards, so no
    process that runs a student's line holds an expected outcome. name: whose attack and hunt it is.
    """
    import examples
    functions = code_functions()
    made = {function: examples.make(function, seed) for function in functions}
    tests = []
    with Bench(ROOT, ROOT, functions) as bench:
        texts = {function: read_hand_in(folder, function.split(".")[0] + ".py")
                 for function in functions}
        theirs = {function: bench.outcomes(function, texts[function], made[function])
                  for function in functions}
        hunted = grade_hunt(bench, folder, seed, name)
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
        tests.append(grade_attack(bench, folder, seed, name))
    tests += hunted
    write_results(out, tests)


def hidden_words(outcomes, trouble, expected, mistakes):
    """What a student is told of the hidden examples: how many, and the name of a mistake."""
    right = sum(map(same, outcomes, expected))
    if outcomes and str(bare(outcomes[0])) == "{'raised': 'NotImplementedError'}":
        return "not written"
    said = [trouble] if trouble else []
    said.append(f"{right} of {len(expected)} hidden examples are right")
    mistake = name_mistake(outcomes, expected, mistakes)
    if mistake:
        said.append(f"this is what a function gives that {mistake['says']}")
    return "; ".join(said)


def result(function, points, output):
    """One entry of Gradescope's list of tests."""
    problem = problem_of(function)
    return {"name": f"{problem.number} {problem.name}: {function}", "score": points,
            "max_score": problem.functions[function], "output": output,
            # seen at once, the line of the hunt would be found by trial
            "visibility": "after_due_date" if function in BY_FILE else "visible"}


def write_results(out, tests):
    """Write results.json at once, or not at all."""
    by_hand = sum(problem.points for problem in PROBLEMS) - sum(one["max_score"] for one in tests)
    said = (f"{by_hand} more points are given by hand: words of problems 4 and 17, the number of "
            "the hunt, problems 19 and 20")
    new = out.with_name(out.name + ".new")
    new.write_text(json.dumps({"output": said, "tests": tests}, indent=1), "utf-8")
    os.replace(new, out)
    print(f"{sum(one['score'] for one in tests)} of {sum(one['max_score'] for one in tests)} "
          f"points, {said}")


# ------------------------------------------------------------------------------------------------
# 4. Attack and hunt: one planted bug, by name
# ------------------------------------------------------------------------------------------------


def chosen(name, bugs, secret):
    """The bug that belongs to a name, whatever the name is; only who has the secret can tell.

    Case and spaces at the ends do not count: names come from lists, forms and mail programs.
    """
    if not name:
        raise Refused("whose attack or hunt is it? Give the name (grade: --name)")
    name = f"{secret}/{name.strip().lower()}"
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
    from examples import RANKS
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
    """(what a student's JSON object holds, whose it is: `name`, else what it says itself)."""
    found = read_json(folder, file)
    found = found if isinstance(found, dict) else {}
    return found, name or str(found.get("name", ""))


def grade_attack(bench, folder, secret, name):
    """Two points for each of three answers that the planted verifier pays and ours does not."""
    import mutants
    handed_in, name = handed_in_json(folder, "attack.json", name)
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
    print(f"key for {ascii(name)}: {file}.py, line {line}: {mutant.function} {mutant.says}\n"
          f"what tells: {mutant.tells}")


def grade_hunt(bench, folder, secret, name):
    """The line, and a test that fails on the planted repository and passes on the source."""
    import mutants
    handed_in, name = handed_in_json(folder, "hunt.json", name)
    test = read_hand_in(folder, "test_hunt.py")
    if not handed_in and not test:
        return [result(one, 0, "nothing was handed in") for one in ("hunt.line", "hunt.test")]
    mutant = chosen(name, mutants.HUNTS, secret)
    file = mutant.function.split(".")[0]
    said = handed_in.get("line")
    hit = (handed_in.get("file") == f"{file}.py" and isinstance(said, int)
           and any(first - 2 <= said <= last + 2
                   for first, last in mutants.lines_of(source(file), mutant)))
    lines = result("hunt.line", 6 * hit, "this is the line" if hit else "another line, or none")
    if not test:
        return [lines, result("hunt.test", 0, "there is no test_hunt.py")]
    for word in ("__file__", "inspect", "open(", "hashlib"):
        if word in test:
            return [lines, result("hunt.test", 0, f"{word} is refused: test what the code does")]
    with tempfile.TemporaryDirectory() as made:
        planted = pathlib.Path(made)
        planted.chmod(0o755)
        for path in ROOT.iterdir():
            if path.name not in (f"{file}.py", ".git"):
                (planted / path.name).symlink_to(path)
        (planted / f"{file}.py").write_text(mutants.apply(source(file), mutant), "utf-8")
        runs = [bench.test(test, place) for place in (ROOT, planted)]
    (right, trouble), (wrong, more_trouble) = runs
    fine = (not trouble and not more_trouble and right[0].get("passed", 0) > 0
            and not right[0].get("failed") and bool(wrong[0].get("failed")))
    return [lines, result("hunt.test", 6 * fine, (
        trouble or more_trouble or f"on the source: {short(right[0], 200)}; "
        f"on the planted one: {short(wrong[0], 200)}"))]


# ------------------------------------------------------------------------------------------------
# 5. The command line
# ------------------------------------------------------------------------------------------------


def read_seed(said):
    """The secret that a command names: itself, or @FILE."""
    seed = pathlib.Path(said[1:]).read_text("utf-8").strip() if said.startswith("@") else said
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
    made.add_argument("functions", nargs="*", help="rl.gae, gae, 12 or GAE; all if none is named")
    made = commands.add_parser("grade", help="judge a hand-in on hidden examples")
    made.add_argument("folder", type=pathlib.Path)
    made.add_argument("--seed", required=True, help="a secret, or @FILE that holds it")
    made.add_argument("--out", type=pathlib.Path, default="results.json")
    made.add_argument("--name", help="whose attack and hunt it is (default: what the files say)")
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
            forget_arguments()
            hide()
            grade(args.folder, seed, args.out, args.name)
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
