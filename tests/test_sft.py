"""Tests of sft.py: which tokens are learnt, what they score, and runs that are killed.

The functions check_* hold what must be true of ONE function, which they take as an argument.
test_rl.py calls them again with wrong versions, to see that they would be noticed.

    python -m pytest tests/test_sft.py
"""

import argparse
import copy
import errno
import functools
import itertools
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tqdm import tqdm

import evaluate
import gp_env
import sft

# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing in the code may catch it and go on."""


def at_call(monkeypatch, do, owner, name, call, after=False):
    """do() at the `call`-th call of owner.name, counted from 1: before or after it ran."""
    original, calls = getattr(owner, name), itertools.count(1)

    def watched(*args, **kwargs):
        now = next(calls) == call
        if now and not after:
            do()
        result = original(*args, **kwargs)
        if now and after:
            do()
        return result

    monkeypatch.setattr(owner, name, watched)


def kill_at(monkeypatch, *moment):
    """Kill the run at a moment, see `at_call`."""
    def kill():
        raise Killed

    at_call(monkeypatch, kill, *moment)


def copy_at(monkeypatch, folder, copy, *moment):
    """Copy a run folder at a moment: as a kill would leave it, and the run goes on."""
    at_call(monkeypatch, lambda: shutil.copytree(folder, copy), *moment)


def stop_at(*moment):
    """Stop this process at a moment, for another to kill it."""
    at_call(pytest.MonkeyPatch(), lambda: os.kill(os.getpid(), signal.SIGSTOP), *moment)


def rows_of(path):
    """The rows of a .jsonl file without what may differ between two runs: times."""
    return [{key: value for key, value in json.loads(line).items()
             if not key.startswith("seconds")} for line in path.read_text().splitlines()]


def same(one, other):
    """True if two nested structures of dicts, lists and tensors are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def files_of(folder):
    """{name: bytes} of all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def let_go():
    """Give up all run folders, as the end of a process does."""
    while sft.held:
        sft.held.pop().close()


def shown(monkeypatch, capsys, module, *flags):
    """Run a script's command line. Returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    monkeypatch.setattr(sft, "spoken", [math.inf])      # no line a minute
    capsys.readouterr()
    try:
        code = sft.guarded(module.main)
    except SystemExit as stop:          # argparse ends the program itself
        code = stop.code
    finally:
        let_go()
    return code, *capsys.readouterr()


def command(monkeypatch, capsys, module, *flags):
    """Run a script's command line. Returns (exit code, what it wrote to stderr)."""
    code, _, error = shown(monkeypatch, capsys, module, *flags)
    return code, error


def assert_one_line(code, error, *words):
    """Exit code 2, one line on stderr, and these words in it."""
    assert code == 2, (code, error)
    assert error.count("\n") == 1 and "Traceback" not in error, error
    for word in words:
        assert word in error, error


def talk(*turns):
    """turns: (role, text, learn), ... -> a conversation as gp_env makes them."""
    return [dict(zip(("role", "content", "learn"), turn)) for turn in turns]


REVISION = talk(("user", "Go", False), ("assistant", "ab", False), ("user", "No.", False),
                ("assistant", "cde", True))


def ragged_rows(backbone, count=7):
    """Encoded conversations whose prompts and answers differ in length: 1 to 13 tokens learnt."""
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("abcdefgh+-*/=(),"), size=size))
             for size in rng.permutation(2 * count)]
    return [sft.encode(backbone, talk(("user", texts[2 * i], False),
                                      ("assistant", texts[2 * i + 1], True)))
            for i in range(count)]


@torch.no_grad()
def one_by_one(backbone, rows, temperature=1.0):
    """log p of the masked tokens, by the definition: read all tokens before it, ask for the next.

    Every token costs a forward pass of the whole model over its own prefix: no batch, no padding,
    no shift.
    """
    found = []
    for row in rows:
        for t, wanted in enumerate(row["mask"]):
            if wanted:
                read = torch.tensor([row["ids"][:t]])
                logits = backbone.model(input_ids=read).logits[0, -1]
                found.append(torch.log_softmax(logits / temperature, dim=-1)[row["ids"][t]])
    return torch.stack(found)


def gradients(backbone):
    """All gradients as one vector; clears them."""
    vector = torch.cat([p.grad.flatten() for p in backbone.model.parameters()
                        if p.grad is not None])
    backbone.model.zero_grad(set_to_none=True)
    return vector


def relative_gap(one, other):
    """|one - other| / |other| of two vectors."""
    return ((one - other).norm() / other.norm()).item()


# ------------------------------------------------------------------------------------------------
# 1. Conversation -> ids and mask
# ------------------------------------------------------------------------------------------------


def check_mask(encode, backbone):
    """A worked example, position by position, then the same rule on real training examples."""
    row = encode(backbone, REVISION)
    expected = [("<|user|>", 0), ("G", 0), ("o", 0), ("<|end|>", 0), ("<|assistant|>", 0),
                ("a", 0), ("b", 0), ("<|end|>", 0),         # a mistake: shown, not taught
                ("<|user|>", 0), ("N", 0), ("o", 0), (".", 0), ("<|end|>", 0),
                ("<|assistant|>", 0),
                ("c", 1), ("d", 1), ("e", 1), ("<|end|>", 1)]
    tokens = backbone.tokenizer.convert_ids_to_tokens(row["ids"])
    assert list(zip(tokens, row["mask"])) == expected and row["picture"] is None
    for seed in range(20):
        conversation = gp_env.expert_conversation(np.random.default_rng(seed))
        row = encode(backbone, conversation)
        learnt = [token for token, wanted in zip(row["ids"], row["mask"]) if wanted]
        assert len(row["ids"]) == len(row["mask"]) and learnt[-1] == backbone.end_ids[0]
        assert backbone.tokenizer.decode(learnt[:-1]) == conversation[1]["content"]


def test_mask_is_exactly_the_answers(tiny):
    """Catches a mask that is off by one, forgets the end token, or teaches the wrong tries."""
    check_mask(sft.encode, tiny)


def test_encoding_is_the_chat_template_itself(tiny):
    """Catches markup lost or doubled where the segments are joined."""
    ids = sft.encode(tiny, REVISION)["ids"]
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in REVISION]
    assert tiny.tokenizer.decode(ids) == tiny.tokenizer.apply_chat_template(messages,
                                                                            tokenize=False)


# ------------------------------------------------------------------------------------------------
# 2. Log-probabilities
# ------------------------------------------------------------------------------------------------


def check_shift(token_logprobs, backbone):
    """The batched, padded, shifted computation must equal one forward pass for each token."""
    rows = ragged_rows(backbone, 4)
    ids, mask, _ = sft.batch(backbone, rows)
    for temperature in (1.0, 0.6):
        with torch.no_grad():
            found, entropy = token_logprobs(backbone, sft.trunk(backbone, ids), ids, mask,
                                            temperature)
        assert found.shape == entropy.shape == (int(mask.sum()),)
        assert (found - one_by_one(backbone, rows, temperature)).abs().max() < 1e-5


def test_logprobs_equal_one_forward_pass_for_each_token(tiny):
    """Catches a label shift of one, in either direction, and a temperature that is not applied."""
    check_shift(sft.token_logprobs, tiny)


def test_uniform_model_scores_exactly_log_v(tiny):
    """Catches a softmax over the wrong dimension or over a vocabulary of the wrong size."""
    torch.nn.init.zeros_(tiny.model.get_output_embeddings().weight)
    rows = ragged_rows(tiny, 3)
    ids, mask, _ = sft.batch(tiny, rows)
    found, entropy = sft.token_logprobs(tiny, sft.trunk(tiny, ids), ids, mask, 0.7)
    log_v = math.log(len(tiny.tokenizer) - 1)
    assert torch.allclose(found, torch.full_like(found, -log_v), rtol=0, atol=1e-6)
    assert torch.allclose(entropy, torch.full_like(entropy, log_v), rtol=0, atol=1e-5)
    assert sft.sft_loss(tiny, rows, 2, backward=False)[0] == pytest.approx(log_v, abs=1e-6)


def test_padding_changes_no_logprob(tiny):
    """Catches padding on the wrong side and attention that looks at it."""
    rows = ragged_rows(tiny)
    ids, mask, _ = sft.batch(tiny, rows)
    with torch.no_grad():
        together, _ = sft.token_logprobs(tiny, sft.trunk(tiny, ids), ids, mask)
        alone = []
        for row in rows:
            ids, mask, _ = sft.batch(tiny, [row])
            alone.append(sft.token_logprobs(tiny, sft.trunk(tiny, ids), ids, mask)[0])
    assert (together - torch.cat(alone)).abs().max() < 1e-5


def test_banned_tokens_have_no_probability(tiny):
    """Catches 0 * log 0 = NaN, in the entropy or in its gradient, where a token is banned."""
    ids, mask, _ = sft.batch(tiny, ragged_rows(tiny, 3))
    allowed = int(ids[0][mask[0].bool()][0])
    tiny.banned = [token for token in (3, 5, 7, 400) if token not in ids.tolist()[0]]
    hidden = sft.trunk(tiny, ids)
    found, entropy = sft.token_logprobs(tiny, hidden, ids, mask)
    (entropy.sum() + found[:1].sum()).backward()
    assert torch.isfinite(entropy).all() and torch.isfinite(gradients(tiny)).all()

    at = int(mask[0].argmax()) - 1                  # the position that predicts the first answer
    with torch.no_grad():
        logits = tiny.model.get_output_embeddings()(hidden[0, at])
        logits[tiny.banned] = -torch.inf
        p = torch.softmax(logits, dim=-1)
        assert p[tiny.banned].eq(0).all()
        assert found[0].item() == pytest.approx(p[allowed].log().item(), abs=1e-5)
        assert entropy[0].item() == pytest.approx(-(p[p > 0] * p[p > 0].log()).sum().item(),
                                                  abs=1e-5)
        ids[0, at + 1] = tiny.banned[0]
        assert sft.token_logprobs(tiny, hidden, ids, mask)[0][0] == -torch.inf


# ------------------------------------------------------------------------------------------------
# 3. Loss, gradient, learning rate
# ------------------------------------------------------------------------------------------------


def check_loss_mean(sft_loss, backbone):
    """- sum of all log-probabilities / number of answer tokens, for any micro-batch."""
    rows = ragged_rows(backbone)
    scores = one_by_one(backbone, rows)
    expected = -scores.sum().item() / len(scores)
    for micro_batch in (1, 3, 7):
        loss, fed = sft_loss(backbone, rows, micro_batch, backward=False)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert fed == sum(len(row["ids"]) for row in rows)


def test_loss_is_the_mean_over_answer_tokens(tiny):
    """Catches a mean over padding or prompts, and a mean of means of unequal micro-batches."""
    check_loss_mean(sft.sft_loss, tiny)


def test_gradient_does_not_depend_on_the_micro_batch(tiny):
    """Catches micro-batches weighted by their number and not by their tokens."""
    rows = ragged_rows(tiny)
    sft.sft_loss(tiny, rows, 7)
    whole = gradients(tiny)
    for micro_batch in (1, 2, 3):
        sft.sft_loss(tiny, rows, micro_batch)
        assert relative_gap(gradients(tiny), whole) < 1e-6


def test_task_parameters_are_those_that_text_reaches(tiny):
    """Catches a wrong N, which would bend every FLOPs axis: eyes counted, or layers forgotten."""
    sft.sft_loss(tiny, ragged_rows(tiny, 2), 2)
    reached = sum(p.numel() for p in tiny.model.parameters() if p.grad is not None)
    assert sft.task_parameters(tiny.model) == reached


def test_a_step_that_is_not_finite_is_not_taken(tiny):
    """Catches one NaN that turns all weights into NaN, silently, and gradients that stay."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones(2)
    for norm in (math.nan, math.inf):
        with pytest.raises(sft.Problem, match="not finite"):
            sft.take_step(optimizer, [torch.tensor(1.0), torch.tensor(norm)])
        assert parameter.tolist() == [1.0] * 2
    sft.take_step(optimizer, [torch.tensor(1.0)] * 2)
    assert parameter.tolist() == [0.0] * 2 and parameter.grad is None


def test_learning_rate_by_hand():
    """Catches a first step at rate 0, a jump after the warm-up, a cosine that ends elsewhere."""
    rates = [sft.learning_rate(step, 12, 2.0, warmup=4) for step in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)                           # half way down the cosine
    assert rates[6] == pytest.approx(1 + math.cos(math.pi / 4))     # a quarter
    assert rates[12] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in zip(rates[3:], rates[4:]))


# ------------------------------------------------------------------------------------------------
# 5. Checkpoints and killed runs
# ------------------------------------------------------------------------------------------------


def draw(step):
    """Three training conversations, a function of the step alone."""
    rng = np.random.default_rng([9, step])
    return [gp_env.expert_conversation(rng) for _ in range(3)]


def short_run(backbone, folder, stop_at=6, **how):
    """Six steps of SFT on a copy of the model, as a new process would do them."""
    return sft.train(copy.deepcopy(backbone), draw, folder, stop_at,
                     lambda step: sft.learning_rate(step, 6, 1e-3, 2), {2, 4}, micro_batch=2, **how)


def assert_same_run(one, other):
    """Two finished runs: equal metrics, weights and optimizer, to the last bit."""
    assert rows_of(one / "metrics.jsonl") == rows_of(other / "metrics.jsonl")
    for (step, path), (_, path2) in zip(sft.checkpoints(one), sft.checkpoints(other), strict=True):
        assert path.name == path2.name
        assert same(sft.load_state(path), sft.load_state(path2)), step
        one_file, other_file = (at / "model.safetensors" for at in (path, path2))
        assert one_file.read_bytes() == other_file.read_bytes(), step


KILLS = {"between two checkpoints": (sft, "sft_loss", 4, False),
         "before the first checkpoint": (sft, "sft_loss", 2, False),
         "after the metrics are written": (sft.Metrics, "write", 2, True),
         "in the middle of a checkpoint": (torch, "save", 2, False),
         "just after a checkpoint": (sft, "save_checkpoint", 2, True)}


def test_killed_and_resumed_is_bit_for_bit_the_same(tiny, tmp_path, monkeypatch):
    """Catches state that a resume forgets: optimizer, step, data order, token count, metrics."""
    with monkeypatch.context() as patch:
        for moment, kill in KILLS.items():
            copy_at(patch, tmp_path / "unbroken", tmp_path / moment, *kill)
        short_run(tiny, tmp_path / "unbroken")
    for moment in KILLS:
        short_run(tiny, tmp_path / moment, resume=True)
        assert_same_run(tmp_path / "unbroken", tmp_path / moment)
        assert [row["step"] for row in rows_of(tmp_path / moment / "metrics.jsonl")] == [2, 4, 6]


def test_stopped_early_and_resumed_is_the_same(tiny, tmp_path):
    """Catches a schedule that depends on where the run stops, and leftovers of a save that was
    under way when the machine went down."""
    short_run(tiny, tmp_path / "unbroken")
    short_run(tiny, tmp_path / "stopped", stop_at=4)
    newest = sft.checkpoints(tmp_path / "stopped")[-1][1]
    shutil.copytree(newest, newest.with_name(".step-000006.tmp"))
    (newest.with_name(".step-000006.tmp") / "state.pt").write_bytes(b"PK\x03\x04half")
    (tmp_path / "stopped" / "step-000006").mkdir()          # nor is an empty folder a checkpoint
    (tmp_path / "stopped" / "metrics.jsonl").open("a").write('{"step": 6, "lo')
    assert [step for step, _ in sft.checkpoints(tmp_path / "stopped")] == [2, 4]
    short_run(tiny, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "stopped")


@pytest.mark.parametrize("error, word", [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64"), "--resume"),
    (Killed(), "")])
def test_failed_save_leaves_the_old_checkpoint(tiny, tmp_path, monkeypatch, error, word):
    """Catches a checkpoint written in place, which a full disk turns into half of one."""
    folder = tmp_path / "step-000001"
    sft.save_checkpoint(folder, tiny, {"tokens": 1})
    before = files_of(folder)

    def full(value, path):
        path.write_bytes(b"PK\x03\x04")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        for name in (folder, tmp_path / "step-000002"):
            with pytest.raises((sft.Problem, Killed), match=word or None):
                sft.save_checkpoint(name, tiny, {"tokens": 2})
    assert files_of(folder) == before
    assert sft.checkpoints(tmp_path) == [(1, folder)]
    for name in (folder, tmp_path / "step-000002"):
        sft.save_checkpoint(name, tiny, {"tokens": 3})
    assert sft.load_state(folder) == {"tokens": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_the_disk_is_blamed_only_when_it_is_full(tiny, tmp_path, monkeypatch):
    """Catches "is the disk full?" for a model that cannot be written, and the reason cut away."""
    def broken(*_, **__):
        raise ValueError("weights of two layers share memory")

    monkeypatch.setattr(tiny.model, "save_pretrained", broken)
    with pytest.raises(sft.Problem, match="share memory") as found:
        sft.save_checkpoint(tmp_path / "step-000001", tiny)
    assert "disk is full" not in str(found.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=1000))
    with pytest.raises(sft.Problem, match="disk is full"):
        sft.save_checkpoint(tmp_path / "step-000001", tiny)


def test_checkpoint_is_moved_into_place(tiny, tmp_path, monkeypatch):
    """Catches files copied into the final folder one by one: a kill leaves half of them."""
    written = []

    def noting(value, path):
        written.append(path.parent.stat().st_ino)
        assert not (tmp_path / "step-000001").exists(), "visible before it is complete"

    monkeypatch.setattr(torch, "save", noting)
    sft.save_checkpoint(tmp_path / "step-000001", tiny, {"tokens": 1})
    assert written == [(tmp_path / "step-000001").stat().st_ino]


class Touch:
    """A pickle that creates a file when it is read: the classic attack by a shared checkpoint."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing", "code", "list", "count"])
def test_damaged_state_is_refused(tmp_path, damage):
    """Catches a damaged file that ends in a traceback or a fresh start, and torch.load without
    weights_only: a downloaded checkpoint could run any program."""
    path = tmp_path / "state.pt"
    torch.save({"tokens": 1, "weights": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    {"cut": lambda: path.write_bytes(whole[:len(whole) // 2]),
     "empty": lambda: path.write_bytes(b""),
     "text": lambda: path.write_text("not a checkpoint"),
     "missing": path.unlink,
     "code": lambda: torch.save({"tokens": Touch(tmp_path / "owned")}, path),
     "list": lambda: torch.save([1, 2], path),
     "count": lambda: torch.save({"tokens": "1"}, path)}[damage]()
    with pytest.raises(sft.Problem, match="state.pt"):
        sft.load_state(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    """Catches half a row that a kill has left, taken for damage."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": {}')
    assert sft.read_lines(path) == [{"step": 1}] and sft.read_lines(tmp_path / "none") == []


def test_a_log_file_hears_of_the_work_once_a_minute(monkeypatch, capsys):
    """Catches minutes without a word where no terminal is, and a line for each small part."""
    now = [0]
    monkeypatch.setattr(sft, "time", argparse.Namespace(time=lambda: now[0]))
    monkeypatch.setattr(sft, "spoken", [0])
    for _ in sft.progress(range(2, 5), "PPO update"):
        for _ in sft.by_length([{"ids": []}] * 3, 2):       # two micro-batches of 25 s
            now[0] += 25
    for _ in sft.progress(range(2, 4), "SFT step"):
        now[0] += 61
    assert capsys.readouterr().err.splitlines() == [
        "reading conversation 2 of 3", "reading conversation 3 of 3",       # after 75 and 150 s
        "SFT step 3 of 4", "SFT step 4 of 4"]


# ------------------------------------------------------------------------------------------------
# 6. Other models
# ------------------------------------------------------------------------------------------------


def test_small_models_alone_keep_the_pages_they_have_used(monkeypatch):
    """Catches an allocator that never gives memory back to a large model: twice what it needs."""
    said = []
    libc = argparse.Namespace(mallopt=lambda *setting: said.append(setting))
    monkeypatch.setattr(sft, "ctypes", argparse.Namespace(CDLL=lambda _: libc))
    monkeypatch.setattr(sft, "load_backbone", lambda *_: argparse.Namespace(model=None))
    for size in (5e7, 5e7 - 1):
        assert said == []
        monkeypatch.setattr(sft, "task_parameters", lambda _, size=size: size)
        sft.open_backbone(sft.flags([]))
    assert said == [(-4, 0), (-1, 2 ** 31 - 1)] * (sys.platform == "linux")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_model_folder_is_refused(tiny, tmp_path, name):
    """Catches a half-copied checkpoint that ends in a traceback of the loader."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(sft.Problem, match="cannot load"):
        sft.load_backbone(tmp_path / "model")


def test_missing_weights_are_not_made_up(tiny, tmp_path):
    """Catches random numbers, without a word, in place of tensors that the file lacks."""
    from safetensors.torch import load_file, save_file
    sft.save_checkpoint(tmp_path / "model", tiny)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "layers.2" in name))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(sft.Problem, match="missing"):
        sft.load_backbone(tmp_path / "model")


def test_a_tokenizer_of_another_model_is_refused(tiny, tmp_path):
    """Catches "index out of range" in the middle of a run."""
    tiny.model.resize_token_embeddings(160)
    sft.save_checkpoint(tmp_path / "model", tiny)
    with pytest.raises(sft.Problem, match="tokenizer"):
        sft.load_backbone(tmp_path / "model")


@pytest.mark.parametrize("name", ["nowhere", "/no/such/place", "a/b/c", "."])
def test_missing_model_folder_is_refused(tmp_path, monkeypatch, name):
    """Catches a typo in a path that is looked for on the hub, with a long wait for the network."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sft.Problem, match="config.json"):
        sft.load_backbone(name)


def test_saved_and_loaded_model_is_the_same(tiny, tmp_path):
    """Catches weights that change their type or a markup that changes on the way to the disk."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    loaded = sft.load_backbone(tmp_path / "model")
    assert same(loaded.model.state_dict(), tiny.model.state_dict())
    assert not loaded.model.training
    for name in ("end_ids", "banned", "before_first", "before_answer", "before_next"):
        assert getattr(loaded, name) == getattr(tiny, name)


def test_sampling_settings_of_a_model_are_not_kept(tiny, tmp_path):
    """Catches settings that contradict each other: they load, and cannot be saved after hours."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(
        {"do_sample": False, "temperature": 0.9, "eos_token_id": [tiny.end_ids[0], 7]}))
    loaded = sft.load_backbone(tmp_path / "model")
    sft.save_checkpoint(tmp_path / "again", loaded)
    assert sft.load_backbone(tmp_path / "again").end_ids == [tiny.end_ids[0], 7]


def text_model(kind, tokenizer, **changes):
    """A tiny text-only model of a class from the hub, random weights. changes: of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM
    end = tokenizer.eos_token_id
    config = AutoConfig.for_model(kind, **dict(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=64, initializer_range=0.2,
        eos_token_id=end, bos_token_id=end, pad_token_id=tokenizer.pad_token_id) | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_text_models_load_and_agree_with_themselves(tiny, tmp_path, kind):
    """Catches code that only knows the small backbone's class: heads, positions, key sharing."""
    import evaluate
    from test_evaluate import Rigged, assert_sampler_agrees
    text_model(kind, tiny.tokenizer).save_pretrained(tmp_path / kind)
    tiny.tokenizer.save_pretrained(tmp_path / kind)
    backbone = sft.load_backbone(tmp_path / kind)
    assert backbone.end_ids == tiny.end_ids and backbone.before_answer == tiny.before_answer
    check_shift(sft.token_logprobs, backbone)
    envs = [Rigged(solve_at, forget=solve_at == 3) for solve_at in (1, 3, 6)]
    episodes = evaluate.play(backbone, envs, range(3), 0.6, 6, torch.Generator().manual_seed(1))
    assert_sampler_agrees(backbone, episodes, 0.6)


@pytest.mark.parametrize("kind, changes", [
    ("granite", {"logits_scaling": 8.0}), ("gemma2", {"final_logit_softcapping": 3.0}),
    ("cohere", {"logit_scale": 0.25}), ("gemma2", {"layer_types": ["chunked_attention"] * 2,
                                                   "final_logit_softcapping": None})])
def test_models_that_would_be_read_wrong_are_refused(tiny, kind, changes):
    """Catches models that bend their logits behind the last matrix: temperature 0.6 would act as
    0.075, and sampler and update would agree on it."""
    with pytest.raises(sft.Problem, match="logits|layers"):
        sft.wrap_backbone(text_model(kind, tiny.tokenizer, **changes), tiny.tokenizer)


def test_logits_that_are_not_scaled_are_fine(tiny):
    """Catches a class that is refused by its name."""
    check_shift(sft.token_logprobs, sft.wrap_backbone(
        text_model("granite", tiny.tokenizer, logits_scaling=1.0), tiny.tokenizer))


def test_a_model_that_is_too_short_is_refused(tiny):
    """Catches a conversation that outgrows the model."""
    args, key = sft.flags([]), "max_position_embeddings"
    needed = 60 + 5 * (16 + 16)         # tokens of a prompt; answer and message, five times
    for size, tries in ((128, 1), (needed, 5)):
        backbone = sft.wrap_backbone(text_model("llama", tiny.tokenizer, **{key: size}),
                                     tiny.tokenizer)
        with pytest.raises(sft.Problem, match="tokens"):
            sft.answer_length(backbone, args, tries)
    backbone = sft.wrap_backbone(text_model("llama", tiny.tokenizer, **{key: 4096}), tiny.tokenizer)
    assert sft.answer_length(backbone, args, 5) > 30


def test_answers_are_as_long_as_the_tokenizer_makes_them(tiny, capsys):
    """Catches a fixed length that cuts right answers off: more under one rule than another."""
    class Spelling:
        """A tokenizer that needs a token for each letter."""

        def __init__(self, plain):
            self.plain = plain
            self.spell = functools.cache(lambda letter: plain(letter, add_special_tokens=False)[
                "input_ids"])

        def __call__(self, text, **_):
            return {"input_ids": [i for letter in text for i in self.spell(letter)]}

        def __getattr__(self, name):
            return getattr(self.plain, name)

    found = {}
    for name, tokenizer in (("phrases", tiny.tokenizer), ("letters", Spelling(tiny.tokenizer))):
        tiny.tokenizer, args = tokenizer, sft.flags([])
        found[name] = sft.answer_length(tiny, args)
        for rule in ("ten", "face"):
            rng = np.random.default_rng(5)
            longest = max(sum(sft.encode(tiny, gp_env.expert_conversation(rng, rule=rule))["mask"])
                          for _ in range(40))
            assert longest < found[name] < 2 * longest
    assert found["letters"] > found["phrases"] + 20 and capsys.readouterr().out == ""
    assert sft.answer_length(tiny, sft.flags(["--max-new-tokens", "9"])) == 9
    assert "--max-new-tokens 9 cuts off" in capsys.readouterr().out


def test_gradient_checkpointing_recomputes_and_changes_nothing(tiny, tmp_path):
    """Catches a flag without effect (it needs train mode), and one that changes the gradient."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    rows, found = ragged_rows(tiny), []
    for wanted in (False, True):
        backbone = sft.load_backbone(tmp_path / "model", grad_checkpoint=wanted)
        calls = []
        backbone.model.base_model.language_model.layers[0].self_attn.register_forward_hook(
            lambda *_: calls.append(1))
        loss, _ = sft.sft_loss(backbone, rows, 3)
        found.append((loss, gradients(backbone), len(calls)))
    (loss, plain, calls), (loss2, recomputed, calls2) = found
    assert calls2 == 2 * calls
    assert loss == loss2 and torch.equal(plain, recomputed)


TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
BAD_TEMPLATES = {
    "none at all": None,
    "no end of turn": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "an end of turn that is no token":
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} over\n{% endfor %}",
    "only the last turn": "<|user|>{{ messages[-1]['content'] }}<|end|><|assistant|>",
    "every turn twice":
        "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}<|end|>{% endfor %}",
    "one that refuses": "{{ raise_exception('roles must alternate') }}",
    "one that is no template": "{% for m in messages %}",
    "one that does not open the answer": TURNS,
    "one that opens it in another way": TURNS + "{% if add_generation_prompt %}<|assistant|>"
                                                "Think.{% endif %}",
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_model_that_cannot_chat_is_refused(tiny, case):
    """Catches base models and odd templates that would train on broken markup, or on none."""
    tiny.tokenizer.chat_template = BAD_TEMPLATES[case]
    with pytest.raises(sft.Problem, match="chat template"):
        sft.wrap_backbone(tiny.model, tiny.tokenizer)


def test_a_space_before_the_end_of_a_turn_is_markup(tiny):
    """Catches Llama 2's template, refused for a false reason."""
    tiny.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>[INST] {{ m['content'] }} "
        "[/INST]{% else %} {{ m['content'] }} <|end|>{% endif %}{% endfor %}")
    found = sft.wrap_backbone(tiny.model, tiny.tokenizer)
    assert (found.before_first, found.before_answer) == ("<|user|>[INST] ", " [/INST]")
    assert (found.end_ids[0], found.before_next) == (tiny.end_ids[0], "<|user|>[INST] ")


def test_a_clock_in_a_template_stands_still(tiny, tmp_path):
    """Catches a prompt that changes overnight: a resumed run would be another run."""
    tiny.tokenizer.chat_template = "<|user|>{{ strftime_now('%d %B %Y %H:%M') }}" + TURNS + OPENING
    found = sft.wrap_backbone(tiny.model, tiny.tokenizer)
    assert found.before_first == "<|user|>26 Jul 2024<|user|>"
    sft.save_checkpoint(tmp_path / "model", found)
    assert sft.load_backbone(tmp_path / "model").before_first == found.before_first


# ------------------------------------------------------------------------------------------------
# The run of a task
# ------------------------------------------------------------------------------------------------


def test_training_sees_no_held_out_hand(tiny, tmp_path, monkeypatch):
    """Catches test hands that leak into SFT, and a data order that ignores seed or step."""
    caught, seen = {}, {}
    monkeypatch.setattr(sft, "train", lambda backbone, draw, *_, **__: caught.update(draw=draw))
    for seed in (0, 1):
        sft.run_sft(sft.flags(["--seed", str(seed), "--batch", "50"]), tmp_path, 2, tiny)
        for step in (0, 1):
            texts = [talk[0]["content"] for talk in caught["draw"](step)]
            assert texts == [talk[0]["content"] for talk in caught["draw"](step)]
            seen[seed, step] = texts
            for text in texts:
                cards = text.split("[Cards] ")[1].split("\n")[0].split(", ")
                assert gp_env.split_of(cards) == "train"
                assert "J = 10, Q = 10, K = 10" in text
    assert len(set(map(tuple, seen.values()))) == 4


def test_a_start_is_known_by_its_content(model, tmp_path, monkeypatch):
    """Catches "made by an earlier run" for other weights, other flags or another prompt."""
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / ".cache").mkdir()             # as a download from the hub leaves it
    here, flags = sft.HERE, ["--model", str(tmp_path / "model")]
    found = sft.content_digest(sft.flags(flags))
    for alike in (["--out", "elsewhere"], ["--threads", "1"], ["--ood"], ["--micro-batch", "2"],
                  ["--model", f"{tmp_path}/model/"]):
        assert sft.content_digest(sft.flags(flags + alike)) == found, alike
    for other in (["--lr", "0.01"], ["--seed", "1"], ["--split", "all"], ["--dtype", "bfloat16"]):
        assert sft.content_digest(sft.flags(flags + other)) != found, other
    assert len({sft.content_digest(sft.flags(["--model", name])) for name in ("a/b", "a/c")}) == 2
    (tmp_path / "code" / "cities").mkdir(parents=True)
    for path in (here / "cities").glob("*.*"):
        shutil.copy(path, tmp_path / "code" / "cities")
    for name in ("verifier", "gp_env", "virl_env", "sft"):
        shutil.copy(here / f"{name}.py", tmp_path / "code")
    monkeypatch.setattr(sft, "HERE", tmp_path / "code")
    assert sft.content_digest(sft.flags(flags)) == found
    (tmp_path / "code" / "gp_env.py").open("a").write("# another prompt\n")
    assert sft.content_digest(sft.flags(flags)) != found
    monkeypatch.setattr(sft, "HERE", here)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert sft.content_digest(sft.flags(flags)) != found


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def test_a_script_speaks_before_torch_is_loaded():
    """Catches a start of some seconds without a word."""
    said = subprocess.run([sys.executable, sft.HERE / "sft.py", "--help"], capture_output=True,
                          text=True, check=True).stdout
    assert said.startswith("loading torch\nusage: sft.py")


def test_ctrl_c_while_torch_loads_leaves_no_traceback():
    """Catches forty lines of imports for a student who has changed his mind."""
    process = subprocess.Popen([sys.executable, sft.HERE / "sft.py", "--help"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "loading torch\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == -signal.SIGINT


@pytest.mark.parametrize("flags, words", [
    (["--model", "nowhere"], ["nowhere"]),
    (["--batch", "0"], ["--batch"]),
    (["--micro-batch", "0"], ["--micro-batch"]),
    (["--save-every", "0"], ["--save-every"]),
    (["--steps", "0"], ["--steps"]),
    (["--lr", "-1"], ["--lr"]),
    (["--lr", "nan"], ["--lr"]),
    (["--seed", "-1"], ["--seed"]),
    (["--out", "file"], ["file"]),
    (["--out", ""], ["--out", "empty"]),
    (["--out", "orphan"], ["orphan"]),
    (["--picture-size", "640", "320"], ["--picture-size", "gp-l"]),
])
def test_bad_flags_end_in_one_line(model, tmp_path, monkeypatch, capsys, flags, words):
    """Catches a traceback, a silent default, and an exit code 0 after nothing was done."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orphan" / "step-000001").mkdir(parents=True)
    (tmp_path / "orphan" / "step-000001" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    basis = [] if "--model" in flags else ["--model", model]
    code, error = command(monkeypatch, capsys, sft, *basis, *flags)
    assert_one_line(code, error, "sft.py: ", *words)


@pytest.mark.parametrize("flags", [["--task", "chess"], ["--steps", "many"], ["--no-such-flag"]])
def test_unknown_flags_exit_with_2(monkeypatch, capsys, flags):
    """Catches abbreviations and typos that would be taken for something else."""
    code, error = command(monkeypatch, capsys, sft, *flags)
    assert code == 2 and "error:" in error and "Traceback" not in error


def test_run_folders_are_not_mixed_up(model, tmp_path, monkeypatch, capsys):
    """Catches a run that overwrites another, or goes on with other settings than before; a folder
    claimed by a typo; a --resume that is advised and refused; a next command that breaks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "start_step", lambda args: 2)
    shutil.copytree(model, "a model")
    flags = ["--model", "a model", "--steps", 2, "--batch", 2, "--max-new-tokens", 40, "--dtype",
             "bfloat16", "--out", "my run"]

    def go(*more):
        return command(monkeypatch, capsys, sft, *flags, *more)

    assert_one_line(*go("--model", "modle"), "modle")
    # stopped in its first seconds, in the folder or before there is one: --resume begins
    with monkeypatch.context() as patch:
        kill_at(patch, sft, "sft_loss", 1)
        with pytest.raises(Killed):
            go()
    code, out, error = shown(monkeypatch, capsys, sft, *flags, "--resume")
    assert code == 0, error
    python, script, *words = shlex.split(out.splitlines()[-1])
    again = evaluate.flags(words)
    assert (python, script, again.run) == ("python", "evaluate.py", "my run")
    assert (again.dtype, again.max_new_tokens) == ("bfloat16", 40)
    assert [row["step"] for row in rows_of(tmp_path / "my run" / "metrics.jsonl")] == [2]
    before = files_of(tmp_path / "my run" / "step-000002")
    assert_one_line(*go(), "--resume", "my run")
    assert_one_line(*go("--resume", "--seed", 1), "--seed")
    assert_one_line(*go("--resume", "--steps", 3), "--steps")
    assert_one_line(*go("--resume", "--model", model), "--model")
    # what the out-of-memory line advises must be possible, and a path may be spelt in two ways
    code, error = go("--resume", "--micro-batch", 1, "--model", f"{tmp_path}/a model/")
    assert code == 0, error
    assert files_of(tmp_path / "my run" / "step-000002") == before
    # an edit in between makes another experiment of it: said, not forbidden
    known = tmp_path / "my run" / "args.json"
    assert "no longer" not in shown(monkeypatch, capsys, sft, *flags, "--resume")[1]
    known.write_text(known.read_text().replace('"code": "', '"code": "0'))
    assert "no longer those that my run began with" in shown(
        monkeypatch, capsys, sft, *flags, "--resume")[1]


@pytest.mark.parametrize("error, code, word", [
    (sft.Problem("two\n  lines"), 2, "two lines"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left"),
    (PermissionError(errno.EACCES, "Permission denied", "runs"), 2, "Permission denied: 'runs'"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--micro-batch"),
    (MemoryError(), 2, "out of memory"),
    (KeyboardInterrupt(), 130, "--resume"),
])
def test_what_goes_wrong_is_said_in_one_line(monkeypatch, capsys, error, code, word):
    """Catches a traceback of forty lines for a full disk or a Ctrl-C."""
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["somewhere/sft.py"])
    assert sft.guarded(main) == code
    written = capsys.readouterr().err
    assert written.strip().startswith("sft.py: ") and written.strip().count("\n") == 0
    assert word in written


def test_programming_errors_are_not_hidden():
    """Catches a guard that swallows bugs: those must show their traceback."""
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError):
        sft.guarded(main)


def test_a_terminal_that_knows_only_ascii_and_one_that_has_seen_enough(monkeypatch):
    """Catches results that are lost because a model said what the terminal cannot print, lines that
    a log file does not hold before the run has ended, and advice about the disk for `| head`."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def main():
        tqdm.write("24 \N{PLAYING CARD ACE OF SPADES}")
        assert os.read(reading, 100) == b"24 ?\n"

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", open(writing, "w", encoding="ascii"))
        assert sft.guarded(main) == 0
        os.close(reading)
        assert sft.guarded(lambda: print("nobody reads this")) == 0
        sys.stdout.close()
