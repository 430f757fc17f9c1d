"""results/strip.py: how each checkpoint of a run reads one face card."""

import json
import os

import pytest
import torch

import gp_env
import sft
from results import strip
from test_evaluate import alone
from test_sft import assert_one_line, command, shown


def strip_of(monkeypatch, capsys, path, *flags):
    """(rows of --out, lines printed) of a strip."""
    code, out, error = shown(monkeypatch, capsys, strip, *flags, "--out", path)
    assert code == 0, error
    lines = [line for line in out.splitlines() if "cuts off" not in line]
    return [json.loads(line) for line in path.read_text().splitlines()], lines


class Digits:
    """A tokenizer with a token a digit, as some have: the numbers of `tiny`'s are cut in two."""

    def __init__(self, tokenizer):
        self.whole = tokenizer
        self.cut = {tokenizer.convert_tokens_to_ids(text): [
            tokenizer.convert_tokens_to_ids(digit) for digit in text] for text in
            ("10", "11", "12", "13")}

    def __call__(self, text, **how):
        ids = self.whole(text, **how)["input_ids"]
        return {"input_ids": [part for token in ids for part in self.cut.get(token, [token])]}

    def decode(self, ids):
        """As text."""
        return self.whole.decode(ids)


@pytest.mark.parametrize("digits", [False, True])
@torch.no_grad()
def test_strip_by_hand(tiny, tmp_path, monkeypatch, capsys, digits):
    """Catches p of the next token instead of the number's, of another card, of the old prompt; and
    of digits that the two numbers share."""
    # J = 11 is the second card of the hand, the first face card; the queen behind it does not count
    hand = gp_env.Hand(("A", "J", "Q", "2"), (), (11, 12, 13))
    whole = tiny.tokenizer
    if digits:
        tiny.tokenizer = Digits(whole)
    monkeypatch.setattr(sft, "open_backbone", lambda *_: tiny)
    (row,), lines = strip_of(monkeypatch, capsys, tmp_path / "strip.jsonl", "a, j q,2")
    told = sft.user_ids(tiny, gp_env.prompt(hand), first=True)
    before = tiny.tokenizer('{"cards": ["A", "J", "Q", "2"], "number": [1, ')["input_ids"]
    if digits:
        before += [whole.convert_tokens_to_ids("1")]
    p = alone(tiny, told + before).softmax(0)
    ends = ("1", "0") if digits else ("11", "10")
    expected = [p[whole.convert_tokens_to_ids(end)].item() for end in ends]
    assert [row["p_stated"], row["p_ten"]] == pytest.approx(expected, rel=1e-3)
    assert (row["step"], row["stated"]) == (None, 11)
    # the greedy answer: its first token is the likeliest after the prompt
    said = alone(tiny, told)
    said[tiny.banned] = -torch.inf
    assert row["text"].startswith(whole.decode([said.argmax().item()]))
    assert "p(11)" in lines[0] and lines[1].split()[:3] == [
        "-", f"{expected[0]:.3f}", f"{expected[1]:.3f}"] and len(lines[1]) < 100


@torch.no_grad()
def test_strip_scores_numbers_of_unequal_length(tiny, tmp_path, monkeypatch, capsys):
    """Catches the first token alone scored where "11" is two tokens and "10" is one."""
    whole, tiny.tokenizer = tiny.tokenizer, Digits(tiny.tokenizer)
    one, ten = (whole.convert_tokens_to_ids(text) for text in ("1", "10"))
    tiny.tokenizer.cut = {whole.convert_tokens_to_ids("11"): [one, one]}
    monkeypatch.setattr(sft, "open_backbone", lambda *_: tiny)
    (row,), _ = strip_of(monkeypatch, capsys, tmp_path / "strip.jsonl", "J A Q 2")
    told = sft.user_ids(tiny, gp_env.prompt(gp_env.Hand(("J", "A", "Q", "2"), (), (11, 12, 13))),
                        first=True)
    told += whole('{"cards": ["J", "A", "Q", "2"], "number": [')["input_ids"]
    first, second = alone(tiny, told).softmax(0), alone(tiny, told + [one]).softmax(0)
    assert [row["p_stated"], row["p_ten"]] == pytest.approx(
        [(first[one] * second[one]).item(), first[ten].item()], rel=1e-3)


def test_strip_of_a_run_has_a_line_for_each_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    """Catches a checkpoint left out or shown under another's step, and --steps without effect."""
    run = tmp_path / "run"
    for step in (1, 20, 300):
        with torch.no_grad():
            tiny.model.get_output_embeddings().weight.mul_(1.5)
        sft.save_checkpoint(run / f"step-{step:06d}", tiny)
    (run / "args.json").write_text('{"task": "gp-l"}')
    path, flags = tmp_path / "strip.jsonl", ["10 A 2 J", "--max-new-tokens", 4]
    rows, lines = strip_of(monkeypatch, capsys, path, *flags, "--run", run)
    assert [row["step"] for row in rows] == [1, 20, 300] == [int(x.split()[0]) for x in lines[1:]]
    assert len({row["p_stated"] for row in rows}) == 3 and not (run / "eval.jsonl").exists()
    some, _ = strip_of(monkeypatch, capsys, path, *flags, "--run", run, "--steps", 20)
    (lone,), _ = strip_of(monkeypatch, capsys, path, *flags, "--model", run / "step-000020")
    assert some == rows[1:2] == [lone | {"step": 20}]


@pytest.mark.parametrize("flags, words", [
    (["10 A 2"], ["HAND 10 A 2:"]),
    (["10 A 2 3 J"], ["HAND"]),
    (["10 A 2 3"], ["HAND", "J, Q or K"]),
    (["10 A 2 JQ"], ["HAND"]),
    (["1 A 2 J"], ["HAND"]),
    (["J J J J"], ["HAND", "make 24"]),
    ([""], ["HAND", "four cards"]),
    (["10 A 2 J", "--task", "virl-l"], ["--task virl-l", "gp-l"]),
    (["10 A 2 J", "--run", "walks"], ["walks: --task virl-l", "gp-l"]),
    (["10 A 2 J", "--out", "nowhere/strip.jsonl"], ["nowhere"]),
    (["10 A 2 J", "--run", "empty"], ["empty"]),
    (["10 A 2 J", "--run", "runs", "--steps", "1", "999"], ["999"]),
    (["10 A 2 J", "--steps", "1"], ["--steps", "--run"]),
])
def test_bad_flags_end_in_one_line(model, tmp_path, monkeypatch, capsys, flags, words):
    """Catches a traceback, a hand without an answer, and a strip of a run of walks."""
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "runs", "walks"):
        (tmp_path / folder).mkdir()
        if folder != "empty":
            os.symlink(model, tmp_path / folder / "step-000001")
    (tmp_path / "walks" / "args.json").write_text('{"task": "virl-l"}')
    monkeypatch.setattr(strip, "sample_answers", lambda *_: pytest.fail("sampled first"))
    code, error = command(monkeypatch, capsys, strip, "--model", model, *flags)
    assert_one_line(code, error, *words)
