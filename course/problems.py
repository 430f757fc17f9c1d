"""The course as data: twenty problems, their points, minutes and what is graded of each.

A code problem consists of whole public functions of the repository. Their bodies go when a hand-out
is made (`kit.py blank`), their signatures and docstrings stay. The functions of one problem belong
together: when one of them is judged, the others come from the same hand-in.

    number   name              functions and points
    12       GAE               rl.gae 4
    16       Two numbers       evaluate.wilson 3, evaluate.gain 2

Read next: runs.py, which calls one function with one example.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One problem. `points` is all of it; `functions` holds what the kit itself can give."""

    number: int
    name: str
    points: int
    minutes: int
    goal: str
    functions: dict         # {"rl.gae": 4}, in the order in which they are best written
    helpers: tuple = ()     # private parts of the solution, which go from a hand-out altogether
    blank: bool = True      # False: the function is handed out as it is, to be changed
    allowed: tuple = ()     # other names of the file that a hand-in may replace


PROBLEMS = [
    Problem(1, "Exactly once", 4, 30, "a reward that cannot be talked into paying",
            {"verifier.compare": 2, "verifier.verify_gp": 2},
            helpers=("verifier._judge_formula",)),
    Problem(2, "Parse, never evaluate", 6, 60, "recursive descent, hostile input, exact fractions",
            {"verifier.parse_formula": 6},
            helpers=("verifier._tokens", "verifier._expression", "verifier._term",
                     "verifier._factor")),
    Problem(3, "Attack", 6, 30, "specification gaming", {"attack": 6}),
    Problem(4, "Silence pays", 4, 30, "reward design, thresholds", {"verifier.verify_virl": 3},
            blank=False, allowed=("VIRL_REWARDS", "VIRL_MESSAGES", "WalkVerdict", "read_walk",
                                  "read_action", "read_claims", "_misreadings")),
    Problem(5, "No leak", 2, 20, "splits by what is learnt, not by name",
            {"gp_env.split_of": 2}),
    Problem(6, "The mask", 3, 25, "what is taught", {"sft.encode": 3}),
    Problem(7, "The shift", 5, 45, "hidden[t] predicts t + 1; temperature; banned tokens",
            {"sft.token_logprobs": 5}),
    Problem(8, "Mean of what", 4, 35, "a mean over tokens, whatever the micro-batches",
            {"sft.sft_loss": 4}),
    Problem(9, "Draw", 2, 15, "the policy that plays is the policy that is scored",
            {"evaluate.draw": 2}),
    Problem(10, "Rows", 4, 35, "which tokens did the policy choose; where is V read",
            {"rl.conversations": 4}),
    Problem(11, "V before the answer", 5, 45, "a baseline must not know the action",
            {"rl.score": 5}),
    Problem(12, "GAE", 4, 30, "terminated is not truncated", {"rl.gae": 4}),
    Problem(13, "Normalise", 4, 35, "advantages yes, returns no; over what",
            {"rl.normalised": 1, "rl.add_advantages": 3}),
    Problem(14, "The clip", 4, 25, "pessimism, for both signs", {"rl.policy_loss": 4}),
    Problem(15, "The critic", 4, 35, "a clip around V_old; what explained variance says",
            {"rl.value_loss": 2, "rl.explained_variance": 1, "rl.per_answer": 1}),
    Problem(16, "Two numbers of 234", 5, 45, "intervals; is 27 -> 35 a result?",
            {"evaluate.wilson": 3, "evaluate.gain": 2}),
    Problem(17, "Write the self-check", 10, 60, "invariants that find silent bugs",
            {"rl.complaints": 8}),
    Problem(18, "The hunt", 20, 90, "reading metrics before reading code",
            {"hunt.line": 6, "hunt.test": 6}),
    Problem(19, "Read the paper's table", 25, 90, "two shifts in one; the fake probe; compute", {}),
    Problem(20, "Experiments", 30, 120, "one change, one figure, one interval", {}),
]

FILES = ("verifier", "gp_env", "virl_env", "sft", "evaluate", "rl")
SHARED = {"_split_table"}       # private, used by one solution alone, and handed out all the same
# Graded from files of their own, not by calling one function.
BY_FILE = {"attack": "attack.json", "hunt.line": "hunt.json", "hunt.test": "test_hunt.py"}


def problem_of(function):
    """The problem that a function such as "rl.gae" belongs to."""
    return next(problem for problem in PROBLEMS if function in problem.functions)


def code_functions(blank_only=False):
    """Names of all functions that are judged by examples, in the order of the problems."""
    return [function for problem in PROBLEMS for function in problem.functions
            if function not in BY_FILE and (problem.blank or not blank_only)]


def own_names(function):
    """The solution of this problem by name: functions and helpers in the file of this function."""
    problem, file = problem_of(function), function.split(".")[0]
    return [name.split(".")[1] for name in (*problem.functions, *problem.helpers)
            if name.split(".")[0] == file]


def select(wanted):
    """Functions named by "rl.gae", "gae", a problem's number, its name or a file; [] if none is.

    >>> select("12"), select("GAE"), select("gae"), select("gp_env.py"), select("3")
    (['rl.gae'], ['rl.gae'], ['rl.gae'], ['gp_env.split_of'], ['attack'])
    """
    wanted = wanted.strip().lower().removesuffix(".py")
    for problem in PROBLEMS:
        if wanted in (str(problem.number), problem.name.lower()):
            return list(problem.functions)
    return [name for problem in PROBLEMS for name in problem.functions
            if wanted in (name, *name.split("."))]


def file_of(function):
    """The file of a hand-in in which a function, or what is graded in its place, is found."""
    return BY_FILE.get(function) or function.split(".")[0] + ".py"
