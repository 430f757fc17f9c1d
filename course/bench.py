"""Processes: every function that is judged gets one of its own.

    parent   `Bench`: knows the secret seed, makes examples, compares outcomes
      |      lines of JSON, one job a line
    server   this file as a program: imports the repository once, never runs a student's line
      |      fork, one child a job
    child    limits, another user: puts the student's function into OUR module, calls it
             with each example, writes one line of JSON for each outcome, and is killed

A child is told arguments alone. It never hears the seed or an expected outcome, so there is nothing
to read; its outcomes are compared elsewhere, so it must know what to write. (It does know for
evaluate.draw, whose right outcome is always the same: read that one.) An endless loop, a crash,
os._exit(0), a huge allocation or a wrong import end one child: one function of one problem.

What is put into our module: the function, the other functions of its problem, and whatever of the
student's own they use: helpers, constants, imports. Names that our file has stay ours.

Linux and macOS (resource, fork). Read next: kit.py.
"""

import ast
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pathlib
import pwd
import re
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
import types

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from problems import FILES, code_functions, own_names, problem_of  # noqa: E402

CPU_SECONDS, WALL_SECONDS = 8, 20
EXTRA_MEMORY = 1 << 30          # bytes on top of what the server holds
HELD_BACK = ("honest", "kind")  # what an example knows of its answer: no child is told
MAX_REPLY = 4_000_000           # bytes of all outcomes of one function
NOT_DUMPABLE = 4                # prctl: no process of the same user may look into this one
SUBREAPER = 36                  # prctl: grandchildren that lost their parent become ours


def hide():
    """Forbid other processes of this user to read this one's memory, files and environment."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(NOT_DUMPABLE, 0, 0, 0, 0)


def forget_arguments():
    """Wipe the command line, which everybody may read in /proc/PID/cmdline: it has the seed."""
    if sys.platform == "linux":
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])       # arg_start, arg_end: proc(5), 48 and 49
        ctypes.memset(start, 0, end - start)


# ------------------------------------------------------------------------------------------------
# 1. The child: a student's function in our module
# ------------------------------------------------------------------------------------------------


def statements(text):
    """Top-level statements of a Python file. A piece with a syntax error costs that piece alone."""
    try:
        return ast.parse(text).body
    except SyntaxError:
        found = []
    above = 0
    for piece in re.split(r"^(?=[@\w])", text, flags=re.MULTILINE):
        with contextlib.suppress(SyntaxError):
            found += [ast.increment_lineno(node, above) for node in ast.parse(piece).body]
        above += piece.count("\n")
    return found


def syntax_error(text, file):
    """The first thing that Python cannot read in a text: file, line, its words; "" if nothing."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError) as error:
        return f"{file}, line {getattr(error, 'lineno', '?')}: {getattr(error, 'msg', error)}"
    return ""


def bound(node):
    """Names that a top-level statement gives a meaning to."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    names = {name.id for name in ast.walk(node)
             if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    # TABLE["+"] = add; table.update(...): they belong to what they change
    changed = [part for part in ast.walk(node) if isinstance(part, (ast.Subscript, ast.Attribute))
               and isinstance(part.ctx, ast.Store)]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        changed.append(node.value.func)
    for part in changed:
        while isinstance(part, (ast.Subscript, ast.Attribute)):
            part = part.value
            if isinstance(part, ast.Name):
                names.add(part.id)
    return names | {(alias.asname or alias.name).split(".")[0] for part in ast.walk(node)
                    if isinstance(part, (ast.Import, ast.ImportFrom)) for alias in part.names}


def needed(text, function, ours, allowed):
    """The statements of a file that define `function` and what it uses, in the order of the file.

    ours: names of our module, which stay as they are. allowed: those of them that the file may
    define anew.
    """
    nodes = [(node, bound(node)) for node in statements(text)]
    wanted, seen = [function, *allowed], set()
    while wanted:
        name = wanted.pop()
        if name in seen or name in ours and name not in allowed:
            continue
        seen.add(name)
        for node, names in nodes:
            if name in names:
                wanted += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return [node for node, names in nodes if names & seen]


def put(module, text, function, own, allowed):
    """Give our module the student's `function`, with what it needs. Returns the function.

    own: names of this problem, which must come from the text: ours would complete the student's.
    """
    for name in own:
        vars(module).pop(name, None)
    nodes = needed(text, function, set(vars(module)), allowed)
    if not any(isinstance(node, ast.FunctionDef) and node.name == function for node in nodes):
        mistake = syntax_error(text, f"{module.__name__}.py")
        raise LookupError(f"there is no function {function} that Python can read in the file"
                          + (f"; {mistake}" if mistake else ""))
    # Nothing here calls eval or exec: they would run words. A whole statement that ast could read
    # becomes a function; to call a student's code is what this child, with its limits, is for.
    for node in nodes:
        code = compile(ast.Module([node], []), f"{module.__name__}.py", "exec")
        types.FunctionType(code, vars(module))()
    return getattr(module, function)


def bring(text):
    """Import what a text wants of Python's own library, as long as its folder can be read.

    Where Python lies in root's home, nobody may not read it. Nothing of the student's runs here.
    """
    lines = re.findall(r"^\s*(?:import|from)\s+(.+)", text, flags=re.MULTILINE)
    for name in {part.split()[0].split(".")[0] for line in lines for part in line.split(",")
                 if part.strip()}:
        if name in sys.stdlib_module_names - {"antigravity", "this"}:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def confine(memory, cpu_seconds, quiet, text):
    """No input, no byte to a file, no processes, little time and memory; as root, become nobody.

    The network is not closed: that is for the container.
    """
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null if quiet else 2, 1)
    if quiet:
        os.dup2(null, 2)
    os.setsid()
    limits = {resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_FSIZE: 0,
              resource.RLIMIT_CORE: 0, resource.RLIMIT_NPROC: 0}
    if memory:
        limits[resource.RLIMIT_AS] = memory
    for what, limit in limits.items():
        resource.setrlimit(what, (limit, limit))
    bring(text)
    if os.getuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)


def memory_limit():
    """Bytes of address space for a child: what it inherits and EXTRA_MEMORY. None off Linux."""
    if sys.platform != "linux":
        return None
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize() + EXTRA_MEMORY


def words(error, file):
    """An exception in one short line, with the last line of the student's file on its way."""
    try:
        said = f"{type(error).__name__}: {error}"[:250].replace("\n", " ")
    except BaseException:       # a class of the student's own, whose words fail in their turn
        said = type(error).__name__[:250]
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
             if frame.f_code.co_filename == file]       # our own files have whole paths
    return f"{said} ({file}, line {lines[-1]})" if lines else said


def run_test(text, folder):
    """Run the test_* functions of a text on the modules of a folder: {"passed": 1, "failed": ...}.

    They are called without arguments: a test of the hunt needs no fixtures.
    """
    for name in FILES:
        sys.modules.pop(name, None)
    sys.path.insert(0, folder)
    os.chdir(folder)            # "backbones/gp" is found, as at home
    space, passed, failed = {"__name__": "test_hunt"}, 0, []
    try:
        types.FunctionType(compile(text, "test_hunt.py", "exec"), space)()
    except BaseException as error:
        return {"broken": words(error, "test_hunt.py")}
    for name, test in list(space.items()):
        if name.startswith("test_") and callable(test):
            try:
                test()
                passed += 1
            except BaseException as error:
                failed.append(f"{name}: {words(error, 'test_hunt.py')}")
    return {"passed": passed, "failed": failed}


def outcome(function, name, example):
    """What `function`, in the place of the one with this name, gives for an example."""
    import runs
    try:
        return runs.RUNS[name](function, example)
    except BaseException as error:      # SystemExit as well
        return {"raised": words(error, name.split(".")[0] + ".py")}


def child(job, write, memory):
    """Judge one job and write one line of JSON for each example, or one that says why not."""
    os.dup2(write, 3)
    os.closerange(4, 4096)
    confine(memory, job["cpu seconds"], job["quiet"], job.get("test") or job["text"])
    out = os.fdopen(3, "w")

    def say(what):
        out.write(json.dumps(what) + "\n")
        out.flush()

    if "test" in job:
        say(run_test(job["test"], job["folder"]))
        return
    file, name = job["function"].split(".")
    module = importlib.import_module(file)
    if "texts" in job:
        for text in job["texts"]:
            kept = dict(vars(module))
            function = put(module, text, name, job["own"], job["allowed"])
            say([outcome(function, job["function"], example) for example in job["questions"]])
            vars(module).clear()
            vars(module).update(kept)
        return
    try:
        function = put(module, job["text"], name, job["own"], job["allowed"])
    except BaseException as error:      # SystemExit as well: whatever it is, it is reported
        say({"broken": words(error, f"{file}.py")})
        return
    for example in job["examples"]:
        say(outcome(function, job["function"], example))


# ------------------------------------------------------------------------------------------------
# 2. The server
# ------------------------------------------------------------------------------------------------


def listen(pipe):
    """Everything that a child writes until it closes, is too late or too long: (bytes, why)."""
    deadline, reply = time.monotonic() + WALL_SECONDS, b""
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return reply, "late"
        part = os.read(pipe, 1 << 16)
        reply += part
        if not part or len(reply) > MAX_REPLY:
            return reply, "long" if part else "closed"


def sweep():
    """Kill what a child may have left behind."""
    family = pathlib.Path(f"/proc/self/task/{os.getpid()}/children")
    left = family.read_text().split() if family.exists() else []
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while left and os.waitpid(-1, 0):
            pass


def judge(job, memory):
    """Run one job in a child of its own. Returns {"reply": its text, "end": how it ended}."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            child(job, write, memory)
        finally:
            os._exit(0)
    os.close(write)
    reply, why = listen(read)
    os.close(read)
    deadline = time.monotonic() + (1 if why == "closed" else 0)     # it may close and live on
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    sweep()
    return {"reply": reply.decode("utf-8", "replace"), "end": why}


def serve(base, root, blank, modules):
    """Import once, then answer jobs until the parent goes."""
    sys.dont_write_bytecode = True
    sys.path[:0] = [base, root, str(HERE)]
    import runs
    hide()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    runs.BLANK.update(blank)
    for name in modules:
        importlib.import_module(name)
    if "sft" in modules:
        import torch
        torch.set_num_threads(1)
        with contextlib.suppress(AttributeError, TypeError):
            runs.tiny()
    if "torch" in sys.modules:
        str(sys.modules["torch"].zeros(2))      # printing imports late what "nobody" may not read
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.monitor_interval = 0       # it would be a thread
    memory = memory_limit()
    gc.disable()
    gc.freeze()         # children share these objects; a collection would copy their pages
    for line in sys.stdin:
        answer = judge(json.loads(line), memory)
        print(json.dumps(answer), flush=True)


# ------------------------------------------------------------------------------------------------
# 3. The parent
# ------------------------------------------------------------------------------------------------


class Bench:
    """Judges functions in processes. `base`: the folder of our modules, `root`: the repository.

    blank: functions that are empty in `base`. quiet: a student's prints are not shown.
    """

    def __init__(self, base, root, functions, blank=(), quiet=True):
        files = {function.split(".")[0] for function in functions}
        # cards and the verifier need no torch: do not wait for it; a hunt may need it
        modules = [name for name in FILES
                   if name in files or files & {"sft", "evaluate", "rl", "hunt"}]
        self.command = [str(base), str(root), json.dumps(sorted(blank)), json.dumps(modules)]
        self.quiet, self.cpu_seconds, self.server = quiet, CPU_SECONDS, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        """Start the server. Its environment and command line hold nothing secret."""
        calm = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
                # a child may start no thread: without these no test can load a backbone
                "HF_DEACTIVATE_ASYNC_LOAD": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "bench.py"), *self.command], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | calm)

    def stop(self):
        """End the server, if there is one."""
        if self.server:
            self.server.kill()
            self.server.communicate()
            self.server = None

    def outcomes(self, function, text, examples, whole=False):
        """Outcomes of `function` as it stands in `text`, one for each example.

        Returns (outcomes, trouble): fewer outcomes than examples, and a sentence, if it did not
        come to the end. whole: the solutions of other problems are taken from the text, too.
        """
        own = own_names(function)
        if whole:
            own = [name for one in code_functions() if one.split(".")[0] == function.split(".")[0]
                   for name in own_names(one)]
        told = [{key: value for key, value in example.items() if key not in HELD_BACK}
                for example in examples]
        return self.ask({"function": function, "text": text, "examples": told, "own": own,
                         "allowed": problem_of(function).allowed})

    def many(self, function, texts, examples):
        """Outcomes of one function in many texts of OURS, in one process: a list of lists."""
        job = {"function": function, "texts": texts, "questions": examples, "text": "",
               "own": own_names(function), "allowed": problem_of(function).allowed,
               "examples": [None] * len(texts)}
        outcomes, trouble = self.ask(job)
        if trouble:
            raise RuntimeError(f"{function}: {trouble}")
        return outcomes

    def test(self, text, folder):
        """Run a test file on the modules of a folder. Returns ([{"passed", "failed"}], trouble)."""
        return self.ask({"test": text, "folder": str(folder), "examples": [None]})

    def ask(self, job):
        """Send one job, wait for its outcomes."""
        if self.server is None or self.server.poll() is not None:
            self.start()
        job |= {"quiet": self.quiet, "cpu seconds": self.cpu_seconds}
        try:
            self.server.stdin.write(json.dumps(job) + "\n")
            self.server.stdin.flush()
            answer = json.loads(self.server.stdout.readline())
        except (OSError, ValueError):       # somebody killed the server: the next job has a new one
            self.stop()
            return [], "it ended the process that was to judge it"
        return read_reply(answer, len(job["examples"]))


def read_reply(answer, count):
    """(outcomes, trouble) of what a child wrote. Its text is data, and may be anything."""
    outcomes = []
    for line in answer["reply"].splitlines()[:count]:
        try:
            outcomes.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    broken = outcomes[0].get("broken") if outcomes and isinstance(outcomes[0], dict) else None
    if broken:
        return [], str(broken)[:300]
    if len(outcomes) == count:
        return outcomes, ""
    trouble = {"late": f"it did not end within {WALL_SECONDS} s",
               "long": "its outcomes are too long",
               "closed": f"it ended the process (a crash, an exit, or {CPU_SECONDS} s of CPU are "
                         "over)"}[answer["end"]]
    return outcomes, f"example {len(outcomes) + 1}: {trouble}"


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4]))
