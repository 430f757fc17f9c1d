"""Tests of the course kit: the source passes, an empty body fails, each mistake is found and named.

    python -m pytest tests/test_course.py

A mutant that no longer fits the source fails `test_mutants_stand_in_the_source` with a line that
says which. tests/course_solutions.py holds solutions that were written apart from the checks.
"""

import ast
import contextlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

COURSE = pathlib.Path(__file__).resolve().parents[1] / "course"
sys.path.insert(0, str(COURSE))

import bench  # noqa: E402
import course_solutions  # noqa: E402
import examples  # noqa: E402
import kit  # noqa: E402
import mutants  # noqa: E402
import problems  # noqa: E402
import runs  # noqa: E402
from runs import same  # noqa: E402

FUNCTIONS = problems.code_functions()


@pytest.fixture(scope="module")
def our_bench():
    """One server for all tests: it imports torch and the repository once."""
    with bench.Bench(kit.ROOT, kit.ROOT, FUNCTIONS) as made:
        yield made


@pytest.fixture(scope="module")
def public(our_bench):
    """What a hand-out holds, and the outcomes of solutions: {function: ...}."""
    return kit.public_outcomes(FUNCTIONS, our_bench)


@pytest.fixture(scope="module")
def hand_out(public, tmp_path_factory):
    """A whole hand-out, made of the tracked files."""
    out = tmp_path_factory.mktemp("course") / "hand-out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "public_outcomes", lambda functions, bench: public)
        kit.blank(out)
    return out


@pytest.mark.parametrize("yours, expected, alike", [
    (1.00001, 1, True), (1.01, 1, False), (float("nan"), float("nan"), True),
    (float("nan"), 1.0, False), (5, float("inf"), False), (float("inf"), float("inf"), True),
    (10 ** 400, 1.0, False)])
def test_numbers_of_any_size_are_compared(yours, expected, alike):
    """An integer that is no float stops the grader, or infinity is like any number."""
    assert same(yours, expected) == alike


# ------------------------------------------------------------------------------------------------
# 1. Source, empty bodies, mutants
# ------------------------------------------------------------------------------------------------


def test_mutants_stand_in_the_source():
    """Catches a source line that was changed below a mutant; says which one."""
    lost = []
    for mutant in mutants.MUTANTS:
        try:
            mutants.apply(kit.source(mutant.function.split(".")[0]), mutant)
        except mutants.EditLost as error:
            lost.append(str(error))
    assert not lost, "\n" + "\n".join(lost)


def test_a_lost_edit_is_named():
    """Catches a mutant that changes nothing, or two places, and is not reported."""
    mutant, = [m for m in mutants.MUTANTS
               if (m.function, m.says) == ("rl.gae", "loses lambda")]
    text = kit.source("rl")
    for old, new in (("gamma * lam * running", "gamma * running * lam"),
                     ("def gae(", "def gea("), ("running = delta + gamma * lam * running",
                                                "gamma * lam * running\n        " * 2)):
        with pytest.raises(mutants.EditLost, match="rl.py.*loses lambda"):
            mutants.apply(text.replace(old, new), mutant)


def test_helpers_are_listed():
    """Catches a private part of a solution that would stay in the hand-out."""
    for problem in problems.PROBLEMS:
        if problem.blank:
            files = {name.split(".")[0] for name in problem.functions
                     if name not in problems.BY_FILE}
            for file in files:
                own = {name.split(".")[1] for name in problem.functions}
                found = private_parts(kit.source(file), own) - problems.SHARED
                listed = {name.split(".")[1] for name in problem.helpers}
                assert found == listed, f"problem {problem.number}: helpers are {found}"


def private_parts(text, own):
    """Private functions and classes of a file that only `own`, or one another, use."""
    uses = {}
    for node in mutants.parsed(text):
        for name in bench.bound(node) or {node.lineno}:
            uses[name] = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            uses[name] |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    private = {node.name for node in mutants.parsed(text)
               if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] == "_"}
    while True:
        outside = set().union(*(used for name, used in uses.items()
                                if name not in private and name not in own))
        kept = private - outside
        if kept == private:
            break
        private = kept
    reached, waiting = set(), list(own)
    while waiting:
        for name in uses.get(waiting.pop(), set()) & private - reached:
            reached.add(name)
            waiting.append(name)
    return reached


@pytest.mark.parametrize("function", FUNCTIONS)
def test_source_passes_empty_fails_mutants_are_named(function, public, our_bench):
    """Catches an example that the source fails, an empty body that passes, a mistake unseen."""
    made = public[function]
    text = kit.source(function.split(".")[0])
    solution = course_solutions.CLOSED if function == "verifier.verify_virl" else text
    empty = kit.blanked([function])[function.split(".")[0]]
    mistakes = [m for m in mutants.MUTANTS if m.function == function]
    right, nothing = our_bench.many(function, [solution, empty], made["examples"])
    full = problems.problem_of(function).functions[function]
    assert kit.points_of(function, right, made["expected"]) == full
    assert kit.points_of(function, nothing, made["expected"]) == 0
    for mutant, mistake in zip(mistakes, made["mistakes"]):
        changed = {int(i): outcome for i, outcome in mistake["gives"].items()}
        outcomes = [changed.get(i, outcome) for i, outcome in enumerate(right)]
        assert kit.points_of(function, outcomes, made["expected"]) < full, mutant.says
        found = kit.name_mistake(outcomes, made["expected"], made["mistakes"])
        assert found and found["says"] == mutant.says, f"{mutant.says} is taken for {found}"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_other_seeds_make_other_examples(function):
    """Catches hidden examples that are the public ones, and examples that are no plain data."""
    one, other = (examples.make(function, seed) for seed in ("public", "secret"))
    assert len(one) == len(other) and json.dumps(one) != json.dumps(other)
    assert json.dumps(one) == json.dumps(examples.make(function, "public"))


# ------------------------------------------------------------------------------------------------
# 2. Solutions that were written apart
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_right_solutions_pass(function, public, our_bench):
    """Catches a check that refuses what is right: other types, other words, other ways."""
    made, texts = public[function], course_solutions.RIGHT[function]
    assert len(texts) >= 4
    for text, outcomes in zip(texts, our_bench.many(function, texts, made["examples"])):
        assert kit.points_of(function, outcomes, made["expected"]) == \
            problems.problem_of(function).functions[function], (
                text, kit.explain(function, made, outcomes, ""))


def test_wrong_solutions_fail_and_most_are_named(public, our_bench):
    """Catches a mistake of a student that no example sees."""
    named = count = 0
    for function in FUNCTIONS:
        made, texts = public[function], course_solutions.WRONG[function]
        assert len(texts) >= 6, function
        for text, outcomes in zip(texts, our_bench.many(function, texts, made["examples"])):
            assert kit.points_of(function, outcomes, made["expected"]) < \
                problems.problem_of(function).functions[function], text
            count += 1
            named += kit.name_mistake(outcomes, made["expected"], made["mistakes"]) is not None
    print(f"{named} of {count} wrong solutions are named")
    assert named >= 2 / 3 * count, f"{named} of {count} are named"


# ------------------------------------------------------------------------------------------------
# 3. The hand-out
# ------------------------------------------------------------------------------------------------


def test_no_line_of_a_solution_is_left(hand_out):
    """Catches a solution, or a copy of one of its lines, in any Python file of the hand-out."""
    files = {path: path.read_text("utf-8") for path in hand_out.rglob("*.py")}
    for function in problems.code_functions(blank_only=True):
        file, name = function.split(".")
        for path in (hand_out, hand_out / "course" / "blank"):
            node, = [one for one in ast.parse(files[path / f"{file}.py"]).body
                     if getattr(one, "name", None) == name]
            last = node.body[-1]
            assert len(node.body) <= 2 and isinstance(last, ast.Raise)
            assert ast.unparse(last).startswith(f"raise NotImplementedError('{name}: ")
    assert "'gae: 4 points, about 30 minutes'" in files[hand_out / "rl.py"].replace('"', "'")
    assert "normalised: 1 of 4 points of problem 13, about 35 minutes in all" in files[
        hand_out / "rl.py"]
    standing = standing_lines()
    lines = {path: {line.strip() for line in text.splitlines()} - standing
             for path, text in files.items()}
    for function in solution_names():
        for line in solution_lines(*function.split(".")):
            assert not [path for path in files if line in lines[path]], line


def solution_names():
    """All that goes from a hand-out: functions and helpers, as "rl.gae"."""
    return [name for problem in problems.PROBLEMS if problem.blank
            for name in (*problem.helpers, *problem.functions) if name not in problems.BY_FILE]


def body(file, name):
    """(first, last) line of the body of a function below its docstring, or of a whole class."""
    node, = [one for one in mutants.parsed(kit.source(file))
             if getattr(one, "name", None) == name]
    if isinstance(node, ast.ClassDef):
        return node.lineno, node.end_lineno
    start = node.body[1] if ast.get_docstring(node) else node.body[0]
    return start.lineno, node.end_lineno


def solution_lines(file, name):
    """The lines of a solution that say something."""
    first, last = body(file, name)
    lines = {line.strip() for line in kit.source(file).splitlines()[first - 1:last]}
    return {line for line in lines if len(line) >= 20}


def standing_lines():
    """Lines of the repository outside of all solutions: those may be found in a hand-out."""
    found = set()
    for file in problems.FILES:
        lines = [line.strip() for line in kit.source(file).splitlines()]
        for name in solution_names():
            if name.startswith(file + "."):
                first, last = body(*name.split("."))
                lines[first - 1:last] = [""] * (last - first + 1)
        found.update(lines)
    return found


def test_hand_out_holds_what_it_should(hand_out):
    """Catches tests, mutants, examples, history or curves in what students get."""
    names = {path.relative_to(hand_out).as_posix() for path in hand_out.rglob("*")}
    for name in ("tests", ".git", "course/mutants.py", "course/examples.py", ".ci"):
        assert name not in names
    assert {"rl.py", "course/kit.py", "course/public.json", "README.md"} <= names
    assert not any(name.endswith("metrics.jsonl") for name in names)
    assert not [name for name in names if name.startswith("results/") and name.endswith(".md")]
    measured = [path.parent for path in hand_out.glob("results/*/eval.jsonl")]
    assert measured and all((folder / "args.json").exists() for folder in measured)
    readme = (hand_out / "README.md").read_text("utf-8")
    assert readme.startswith("**This is a hand-out.**") and "kit.py blank" not in readme
    assert "## Assignments" in (kit.ROOT / "README.md").read_text("utf-8")
    assert readme.count("\n## ") == (kit.ROOT / "README.md").read_text("utf-8").count("\n## ") - 1
    some = kit.selected(["11", "GAE", "14", "rl.gae"])
    assert "Your problems here: 11, 12, 14; 13 points." in kit.hand_out_words(some, 13)


def run(folder, *arguments):
    """The kit as a program, in a folder: (exit code, what it prints)."""
    done = subprocess.run([sys.executable, "course/kit.py", *map(str, arguments)], cwd=folder,
                          capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_check_in_a_hand_out(hand_out):
    """Catches a check that needs the solution, counts wrongly, or does not name a mistake."""
    code, said = run(hand_out, "check", "1", "parse_formula", "Silence pays")
    assert code == 1 and said.count("not written yet") == 3 and "0 of 13 points" in said
    assert "leaves the hole as it was" in said
    blank = (hand_out / "rl.py").read_text("utf-8")
    mistakes = [m for m in mutants.MUTANTS if m.says in ("takes max for min", "loses lambda")]
    text = kit.source("rl")
    for mutant in mistakes:
        if mutant.function != "rl.value_loss":
            text = mutants.apply(text, mutant)
    (hand_out / "rl.py").write_text("import nothing_of_that_name\n" + text, "utf-8")
    code, said = run(hand_out, "check", "10", "gae", "rl.score", "13", "14", "15", "17")
    assert "right on 12 examples" in said and "4 of 4 points; right" in said
    assert "This is what a function gives that loses lambda. Think of this: eq. 2" in said
    assert "This is what a function gives that takes max for min." in said
    assert "    expected   " in said and "25 of 33 points" in said, said
    (hand_out / "rl.py").write_text(blank, "utf-8")
    for words in (("blank", hand_out.parent / "again"), ("check", "nonsense"), ("check", "19"),
                  ("hunt", "Ada", hand_out.parent / "again", "--seed", "")):
        code, said = run(hand_out, *words)
        assert code == 2 and len(said.strip().splitlines()) == 1
        assert ("is read by people" in said) == (words[-1] == "19")


def test_check_of_a_file_and_of_forms(hand_out, tmp_path, monkeypatch, capsys):
    """Catches a file whose problems are not all meant, and a form that is called right or wrong."""
    monkeypatch.setattr(kit, "ROOT", hand_out)
    monkeypatch.setattr(kit, "PUBLIC", hand_out / "course" / "public.json")
    monkeypatch.setattr(kit, "BLANKS", hand_out / "course" / "blank")
    assert kit.selected(["gp_env", "evaluate.py", "16"]) == [
        "gp_env.split_of", "evaluate.draw", "evaluate.wilson", "evaluate.gain"]
    assert not kit.check(["3", "18"]) and capsys.readouterr().out.count("no such file") == 3
    answers = [{"cards": ["A", "2", "3", "10"], "rule": "ten", "text": "1+2"}] * 3
    attack, hunt = {"name": "Ada", "answers": answers}, {"name": "Ada", "file": "rl.py", "line": 9}
    for function, fine, wrong in (
            ("attack", attack, [[], attack | {"answers": answers[:2]}, {"answers": answers},
                                attack | {"answers": [answers[0] | {"text": "..."}] * 3},
                                attack | {"answers": [{"cards": ["A"] * 3, "text": "1"}] * 3}]),
            ("hunt.line", hunt | {"number": "entropy"},
             [hunt, hunt | {"number": "..."}, {**hunt, "number": "e", "file": "..."},
              {**hunt, "number": "e", "line": "9"}, {**hunt, "number": "e", "line": 0}])):
        path = hand_out / problems.BY_FILE[function]
        path.write_text(json.dumps(fine))
        assert kit.form_trouble(function, hand_out) == ""
        for one in map(json.dumps, wrong):
            path.write_text(one)
            assert kit.form_trouble(function, hand_out), one
        path.write_text('{"name": "Ada",\n')
        assert "line 2 column 1" in kit.form_trouble(function, hand_out)
        path.unlink()
    path = hand_out / "test_hunt.py"
    for text, trouble in (("def test_a():\n    pass\n", ""),
                          ("def a():\n    pass\n", "no function"),
                          ("def test_a(x):\n    pass\n", "no arguments"),
                          ("def test_a():\n    f(\n", "test_hunt.py, line 2: '(' was never"),
                          ("import inspect\n", "inspect is refused")):
        path.write_text(text)
        said = kit.form_trouble("hunt.test", hand_out)
        assert trouble in said and bool(trouble) == bool(said), text
    path.unlink()


def test_an_old_python_is_refused_in_one_line():
    """Catches a traceback, or answers called crashes, where the kit cannot run."""
    program = ("import runpy, sys; sys.version_info = (3, 10, 0); sys.argv = ['kit.py', 'check'];"
               "runpy.run_path('course/kit.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", program], cwd=kit.ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "Python 3.11" in done.stderr


# ------------------------------------------------------------------------------------------------
# 4. Grading what is hostile
# ------------------------------------------------------------------------------------------------

GAE = "def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0):\n"
HOSTILE = {
    "an endless loop": "    while True: pass",
    "an exit": "    import os; os._exit(0)",
    "sys.exit": "    raise SystemExit(0)",
    "a crash": "    import ctypes; ctypes.string_at(0)",
    "a huge allocation": "    return torch.zeros(10 ** 11), values",
    "a list without end": "    x = []\n    while True: x.append(bytes(10 ** 8))",
    "a wrong import": "    import nothing_of_that_name",
    "a wrong type": "    return None",
    "a process": "    import os\n    while True: os.fork()",
    "a file": "    open('/tmp/a_file_of_a_student', 'w').write('x' * 10)",
    "outcomes without end": "    import os\n    while True: os.write(3, b'x' * 65536)",
    "words that are no JSON": "    import os; os.write(3, b'[[[[' * 9999 + b'\\n'); os._exit(0)",
    "its parent's end": "    import os; os.kill(os.getppid(), 9)",
    "its parent's memory": "    import os; return open(f'/proc/{os.getppid()}/mem', 'rb').read(9)",
    "its parent's pipe": "    import os; open(f'/proc/{os.getppid()}/fd/1', 'w').write('x\\n')",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_code_costs_one_problem(what, our_bench, public, monkeypatch):
    """Catches a student's function that stops, fools or outlives the grader."""
    monkeypatch.setattr(our_bench, "cpu_seconds", 1)
    made = public["rl.gae"]
    outcomes, trouble = our_bench.outcomes("rl.gae", GAE + HOSTILE[what], made["examples"])
    assert kit.points_of("rl.gae", outcomes, made["expected"]) == 0
    assert trouble or all("raised" in str(outcome) for outcome in outcomes)
    assert not pathlib.Path("/tmp/a_file_of_a_student").exists() or \
        not pathlib.Path("/tmp/a_file_of_a_student").read_text()
    made = public["rl.per_answer"]
    outcomes, trouble = our_bench.outcomes("rl.per_answer", kit.source("rl"), made["examples"])
    assert not trouble and all(map(same, outcomes, made["expected"]))


def test_one_problem_does_not_change_another(our_bench, public):
    """Catches a hand-in whose gae overwrites another function, and one that patches torch."""
    text = (GAE + "    global policy_loss\n    policy_loss = None\n    torch.min = torch.max\n"
            "    return values, values\n\n\ndef helper():\n    pass\n")
    our_bench.outcomes("rl.gae", text, public["rl.gae"]["examples"])
    made = public["rl.policy_loss"]
    outcomes, trouble = our_bench.outcomes("rl.policy_loss", kit.source("rl"), made["examples"])
    assert not trouble and all(map(same, outcomes, made["expected"]))


def test_a_file_with_a_syntax_error_costs_what_it_spoils(our_bench, public):
    """Catches a missing bracket in one function that costs all of the file."""
    text = kit.source("rl").replace("torch.min(ratio * advantages,", "torch.min((ratio * ")
    made = public["rl.gae"]
    outcomes, trouble = our_bench.outcomes("rl.gae", text, made["examples"])
    assert not trouble and all(map(same, outcomes, made["expected"]))
    _, trouble = our_bench.outcomes("rl.policy_loss", text, public["rl.policy_loss"]["examples"])
    assert "no function policy_loss" in trouble
    line = text[:text.index("torch.min((ratio")].count("\n") + 1
    assert f"rl.py, line {line}: '(' was never closed" in trouble


def test_an_exception_has_its_line(our_bench, public):
    """Catches an exception without a line, with one of ours, or one below a mistake moved up."""
    made = public["rl.gae"]
    broken = "def before():\n    f(\n\n\n"
    text = GAE + "    return helper(rewards)\n\n\ndef helper(x):\n    return x[99]\n"
    for above in ("", "import os\n" * 3, broken):
        outcomes, _ = our_bench.outcomes("rl.gae", above + text, made["examples"])
        line = (above + text).count("\n")
        assert outcomes[0]["raised"].endswith(f"(rl.py, line {line})"), outcomes[0]
        assert kit.first_exception(outcomes) == [f"IndexError in rl.py, line {line}"]
    outcomes, trouble = our_bench.outcomes("rl.gae", GAE + "    return None", made["examples"])
    assert not kit.first_exception(outcomes)        # it was raised where None was used
    _, trouble = our_bench.outcomes("rl.gae", "X = [][1]\n" + GAE + "    X", made["examples"])
    assert trouble.endswith("(rl.py, line 1)")
    own = GAE + "    raise type(f'E{rewards.tolist()}', (Exception,), {})(rewards)\n"
    outcomes, _ = our_bench.outcomes("rl.gae", own, made["examples"])
    assert kit.first_exception(outcomes) == ["an exception in rl.py, line 2"]   # tells no example
    mute = GAE + "    raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()\n"
    outcomes, trouble = our_bench.outcomes("rl.gae", mute, made["examples"])
    assert not trouble and outcomes[0]["raised"] == "Mute (rl.py, line 2)"


SPY = '''
def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0):
    import os, glob
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
        try:
            found.append(open(path, "rb").read())
        except OSError:
            pass
    raise ValueError("seed seen" if b"s3cr3t-of-the-course" in b" ".join(found) else "no seed")
'''


def test_grade_end_to_end(our_bench, tmp_path, monkeypatch):
    """Catches points that go to the wrong problem, and hidden examples that are told."""
    monkeypatch.setattr(kit, "Bench", lambda *_: contextlib.nullcontext(our_bench))
    monkeypatch.setattr(our_bench, "stop", lambda: None)
    monkeypatch.setattr(kit, "code_functions", lambda: [
        "verifier.compare", "verifier.verify_virl", "rl.gae", "rl.policy_loss", "evaluate.gain"])
    for file in problems.FILES:
        (tmp_path / f"{file}.py").write_text(kit.source(file), "utf-8")
    (tmp_path / "rl.py").write_text(kit.source("rl").replace("def gae(", "def old_gae(") + SPY)
    seed = "s3cr3t-of-the-course"
    name = next(name for name in map(str, range(1000))
                if kit.chosen(name, mutants.HUNTS, seed).says == "loses lambda")
    line = mutants.lines_of(kit.source("rl"), kit.chosen(name, mutants.HUNTS, seed))[0][0]
    (tmp_path / "hunt.json").write_text(json.dumps({"file": "rl.py", "line": line}))
    (tmp_path / "test_hunt.py").write_text(LAMBDA)
    planted = mutants.apply(kit.source("verifier"), kit.chosen(name, mutants.ATTACKS, seed))
    answers = course_solutions.ATTACKS
    paid, _ = our_bench.outcomes("verifier.verify_gp", planted,
                                 [kit.attack_example(answer) for answer in answers], whole=True)
    good = [answer for answer, outcome in zip(answers, paid) if outcome["correct"]]
    again = good[0] | {"text": good[0]["text"] + " "}
    (tmp_path / "attack.json").write_text(json.dumps({"answers": [good[0], again, "junk"]}))
    kit.grade(tmp_path, seed, tmp_path / "results.json", name)
    tests = {one["name"].split(": ")[1]: one for one in
             json.loads((tmp_path / "results.json").read_text())["tests"]}
    lost = {function for function, one in tests.items() if one["score"] < one["max_score"]}
    assert lost - {"attack"} == {"rl.gae", "verifier.verify_virl"}, tests
    assert "0 of 40" in tests["rl.gae"]["output"]
    assert tests["attack"]["score"] == 2        # one hand, an extra blank
    assert {function for function, one in tests.items() if one["visibility"] == "after_due_date"} \
        == set(problems.BY_FILE)
    assert "s3cr3t" not in (tmp_path / "results.json").read_text()


def test_grade_only_what_is_asked(our_bench, tmp_path, monkeypatch, capsys):
    """Catches a grade of a part of the problems that counts the others."""
    monkeypatch.setattr(kit, "Bench", lambda *_: contextlib.nullcontext(our_bench))
    monkeypatch.setattr(our_bench, "stop", lambda: None)
    (tmp_path / "verifier.py").write_text(kit.source("verifier"), "utf-8")
    for only, full, by_hand in ((["5", "verifier.compare"], 4, "no more are given by hand"),
                                (["4", "18", "14"], 19, "9 more points are given by hand "
                                                        "(problems 4, 18)")):
        kit.grade(tmp_path, "seed", tmp_path / "results.json", only=only)
        made = json.loads((tmp_path / "results.json").read_text())
        assert sum(one["max_score"] for one in made["tests"]) == full and made["output"] == by_hand
        assert made["tests"][0]["name"].startswith(only[0])
        assert f"of {full} points" in capsys.readouterr().out
    assert "there is no rl.py" in made["tests"][-3]["output"]
    with pytest.raises(kit.Refused, match="nonsense"):
        kit.grade(tmp_path, "seed", tmp_path / "results.json", only=["nonsense"])


def test_a_zero_is_not_silent(tmp_path):
    """Catches a hand-in that is not there, or lies a folder deeper, and gets its zeros quietly."""
    (tmp_path / "a file").write_text("x")
    for i in range(12):
        (tmp_path / f"student {i:02d}").mkdir()
    out = tmp_path / "results.json"
    for folder, words in ((tmp_path / "nobody", "not there"), (tmp_path / "a file", "no folder"),
                          (tmp_path, "student 08/, ..."), (tmp_path / "student 00", "nothing")):
        code, said = run(kit.ROOT, "grade", folder, "--seed", "seed", "--out", out)
        lines = [line for line in said.splitlines() if "not root" not in line]
        assert code == 2 and len(lines) == 1 and words in lines[0], said
        assert out.exists() == ("holds none of" in said)
        if out.exists():
            made = json.loads(out.read_text())
            assert made["score"] == 0 and made["output"] in said and not made["tests"]
            out.unlink()


def test_the_seed_is_for_one_reader_and_others_are_warned(tmp_path, monkeypatch, capsys):
    """Catches a seed that a student's code can read, and a grader that hides what it can read."""
    seed = tmp_path / "seed.txt"
    seed.write_text("s3cr3t\n")
    for mode in (0o644, 0o640, 0o604):
        seed.chmod(mode)
        with pytest.raises(kit.Refused, match="chmod 600"):
            kit.read_seed(f"@{seed}")
    seed.chmod(0o600)
    assert kit.read_seed(f"@{seed}") == "s3cr3t"
    monkeypatch.setattr(sys, "argv", ["kit.py", "grade", str(tmp_path), "--seed", f"@{seed}",
                                      "--out", str(tmp_path / "results.json"), "--only", "12"])
    for name in ("forget_arguments", "hide"):
        monkeypatch.setattr(kit, name, lambda: None)
    told = []
    monkeypatch.setattr(kit, "grade", lambda *arguments: told.append(arguments))
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    for user in (0, 1000):
        monkeypatch.setattr(kit.os, "getuid", lambda: user)
        assert kit.main() == 0
        assert ("use a container" in capsys.readouterr().err) == (user != 0)
    assert told[0][1] == "s3cr3t" and told[0][-1] == ["12"]


class Stub:
    """In the place of a Bench: a student's answers are wrong, `ours` is what the source gives."""

    def __init__(self, ours):
        self.ours = ours

    def outcomes(self, function, text, made):
        return self.ours if text else ([{"raised": "KeyError"}], "")

    def many(self, function, texts, made):
        raise RuntimeError("8 s of CPU are over")

    def stop(self):
        pass


def test_a_source_that_fails_gives_nobody_points(tmp_path, monkeypatch):
    """Catches full points for everybody, and no results where a mistake takes too long to name."""
    monkeypatch.setattr(kit, "code_functions", lambda: ["rl.gae"])
    (tmp_path / "rl.py").write_text("")
    for ours in (([], "out of memory"), ([{"advantages": []}], "")):
        monkeypatch.setattr(kit, "Bench", lambda *_: contextlib.nullcontext(Stub(ours)))
        if ours[1]:
            with pytest.raises(kit.Refused, match="rl.gae: the source itself fails: out of memory"):
                kit.grade(tmp_path, "seed", tmp_path / "results.json")
        else:
            kit.grade(tmp_path, "seed", tmp_path / "results.json")
    assert {one["score"] for one in json.loads((tmp_path / "results.json").read_text())["tests"]} \
        == {0}


def test_a_rare_token_may_be_drawn():
    """Catches a right sampler that fails since a token of p = 0.00002 came up once."""
    import torch
    said = torch.tensor([0.5, 0.49998, 0.00002]).log()
    for times, fine in ((0, True), (1, True), (5, False)):
        tokens = torch.tensor([0] * 300 + [1] * (300 - times) + [2] * times)
        outcome = runs.run_draw(
            lambda logits, temperature, generator: (tokens[:, None], said[tokens]),
            {"logits": said.tolist(), "logprobs": said.tolist(), "temperature": 1.0,
             "count": 600, "seed": 0})
        assert outcome["tokens are as frequent as their p"] == fine, times


def test_a_spy_sees_no_seed(tmp_path):
    """Catches a secret seed on a command line or in an environment that a child can read."""
    program = ("import sys, subprocess; sys.path.insert(0, 'course'); import bench, examples;"
               "bench.forget_arguments(); bench.hide();"
               "made = examples.make('verifier.compare', 1);"
               "b = bench.Bench('.', '.', ['verifier.compare']);"
               "print(b.outcomes('verifier.compare', sys.stdin.read(), made)[0][0]); b.stop()")
    spy = SPY.replace("def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0)",
                      "def compare(used, numbers)")
    done = subprocess.run([sys.executable, "-c", program, "s3cr3t-of-the-course"], input=spy,
                          cwd=kit.ROOT, capture_output=True, text=True, timeout=60)
    assert "no seed" in done.stdout, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------
# 5. Attack and hunt
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Ada", "Ödön 🂡", "../../etc/passwd", "/", "\udc80",
                                  "a\nb", "x" * 10_000, "; rm -rf ~", "%s{}"])
def test_odd_names_give_a_bug_and_a_key(name, tmp_path, capsys, monkeypatch):
    """Catches a name that is used as anything but a number."""
    monkeypatch.setattr(kit, "tracked_files", lambda: [
        pathlib.PurePosixPath(file) for file in
        [f"{name}.py" for name in problems.FILES] + ["results/README.md"]])
    for command, bugs in ((kit.hunt, mutants.HUNTS), (kit.attack, mutants.ATTACKS)):
        out = tmp_path / command.__name__
        command(name, out, "secret")
        said = capsys.readouterr().out
        assert said.startswith("key for ") and said.isascii()
        changed = [file for file in problems.FILES if (out / f"{file}.py").exists()
                   and (out / f"{file}.py").read_text("utf-8") != kit.source(file)]
        assert changed == [kit.chosen(name, bugs, "secret").function.split(".")[0]]
        assert kit.handed_in_json(out, f"{command.__name__}.json", None)[1] == name
        assert not (out / "results").exists(), "it answers problem 19"
        assert kit.chosen(f" {name}\r".upper(), bugs, "secret") == kit.chosen(name, bugs, "secret")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attack", "hunt"]


def test_attacks_can_be_found(our_bench):
    """Catches a planted verifier that pays nothing wrong, and an answer counted that is right."""
    made = [kit.attack_example(answer) for answer in course_solutions.ATTACKS]
    ours, _ = our_bench.outcomes("verifier.verify_gp", kit.source("verifier"), made)
    assert not any(outcome["correct"] for outcome in ours)
    for mutant in mutants.ATTACKS:
        text = mutants.apply(kit.source("verifier"), mutant)
        paid, trouble = our_bench.outcomes("verifier.verify_gp", text, made, whole=True)
        assert not trouble and any(outcome["correct"] for outcome in paid), mutant.says


def test_hunts_are_different_bugs_in_every_file():
    """Catches two hunts with one fingerprint, and names that all give the same bug."""
    assert len({(m.function, m.says) for m in mutants.HUNTS}) == len(mutants.HUNTS) >= 8
    for made in ([(str(i), "secret") for i in range(100)], [("Ada", str(i)) for i in range(100)]):
        assert len({kit.chosen(name, mutants.HUNTS, secret).says for name, secret in made}) >= 8


def test_the_hunt_of_nobody_and_tests_of_spelling(our_bench, tmp_path):
    """Catches a hunt graded by the bug of no name, and a test that reads the source."""
    nothing = kit.grade_hunt(our_bench, tmp_path, "secret", None)
    assert [one["score"] for one in nothing] == [0, 0]
    for word in ("__file__", "inspect", "open(", "hashlib"):
        (tmp_path / "test_hunt.py").write_text(f"import rl\n\n\ndef test_it():\n    {word})\n")
        _, test, _ = kit.grade_hunt(our_bench, tmp_path, "secret", "Ada")
        assert test["score"] == 0 and test["output"].startswith(word)
        with pytest.raises(kit.Refused, match="Give the name"):
            kit.grade_hunt(our_bench, tmp_path, "secret", None)


LAMBDA = '''
import rl
import torch


def test_lambda():
    a, _ = rl.gae(torch.tensor([0., 1.]), torch.zeros(2), True, False, 1.0, 0.5)
    assert a.tolist() == [0.5, 1.0]
'''
EVERYTHING = '''
import os
import sys


def code(file):
    module = __import__(file)
    word = "__co" + "de__"
    return {name: getattr(getattr(one, word), "co_" + "code")
            for name, one in vars(module).items() if hasattr(one, word)}


def test_that_it_is_the_source():
    files = ("gp_env", "sft", "rl")
    planted = {file: code(file) for file in files}
    for file in files:
        del sys.modules[file]
    sys.path.insert(0, ROOT)
    assert planted == {file: code(file) for file in files}
'''
PLACE = ("import sys\n\n\ndef test_place():\n    assert sys.path[0] == ROOT or "
         "not sys.path[0].startswith('/tmp')\n")


def test_a_hunts_test_knows_its_bug(our_bench, tmp_path):
    """Catches 6 points for a test of the place, or of any difference from the public source."""
    name = next(name for name in map(str, range(1000))
                if kit.chosen(name, mutants.HUNTS, "seed").says == "loses lambda")
    root = f"ROOT = {str(kit.ROOT)!r}\n"
    # started by root, a test runs as nobody, who may be shut out of the folders above the source
    shut = os.geteuid() == 0 and not all(f.stat().st_mode & 1 for f in kit.ROOT.parents)
    for text, points, words in ((LAMBDA, 6, "where it should pass: passes, passes"),
                                (root + EVERYTHING, 0, "{'passed': 1.* should pass: fails, fails"),
                                (root + PLACE, 0, "on the source: {'passed': 0")):
        (tmp_path / "test_hunt.py").write_text(text)
        _, test, by_hand = kit.grade_hunt(our_bench, tmp_path, "seed", name)
        assert test["score"] == points, test
        said = test["output"].replace('"', "'")
        assert re.search(words, said) or shut and EVERYTHING in text, test
    assert by_hand["visibility"] == "hidden" and by_hand["max_score"] == 0
    assert "value_loss 18.6" in by_hand["output"]


def test_other_bugs_are_in_other_functions():
    """Catches a right test that has to pass where its own function is spoilt, too."""
    for name in map(str, range(200)):
        mutant = kit.chosen(name, mutants.HUNTS, "seed")
        functions = {mutant.function, *(one.function for one in kit.others(name, mutant, "seed"))}
        assert len(functions) == 3
        assert not ("gae" in mutant.function and "rl.add_advantages" in functions)
        assert kit.others(f" {name}\r", mutant, "seed") == kit.others(name, mutant, "seed")


def test_a_file_of_somebody_else(our_bench, tmp_path):
    """Catches points for another student's bug, and a name refused for its case."""
    line = mutants.lines_of(kit.source("rl"), mutants.HUNTS[0])[0][0]
    for file, judge in (("hunt.json", kit.grade_hunt), ("attack.json", kit.grade_attack)):
        for says, foreign in (("Bob", True), (" ADA\r", False), (None, False)):
            (tmp_path / file).write_text(json.dumps({"name": says, "file": "rl.py", "line": line}))
            tests = judge(our_bench, tmp_path, "seed", "ada")
            for test in tests if isinstance(tests, list) else [tests]:
                assert ("this file is Bob's" == test["output"]) == foreign
                assert not foreign or test["score"] == 0


def test_the_planted_split_deals_all_splits(our_bench):
    """Catches a hunt that stops: no hand would be held out, and evaluation could deal none."""
    mutant, = [m for m in mutants.HUNTS if m.function == "gp_env.split_of"]
    hands = [{"cards": cards} for cards in
             itertools.combinations_with_replacement(examples.RANKS, 4)]
    outcomes, trouble = our_bench.outcomes(
        "gp_env.split_of", mutants.apply(kit.source("gp_env"), mutant), hands)
    assert not trouble and min(outcomes.count(s) for s in ("train", "val", "test")) > 100
