"""Tests of sft.py: which tokens are learnt, what they score, and runs that are killed.

The functions check_* hold what must be true of ONE function, which they take as an argument.
test_rl.py calls them again with wrong versions, to see that they would be noticed.

    python -m pytest tests/test_sft.py
"""

import argparse
import copy
import errno
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch

import gp_env
import sft

# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing in the code may catch it and go on."""


def kill_at(monkeypatch, owner, name, call, after=False):
    """Let owner.name kill the run at its `call`-th call, counted from 1: before or after it ran."""
    original, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and not after:
            raise Killed
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, deadly)


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


def command(monkeypatch, capsys, module, *flags):
    """Run a script's command line. Returns (exit code, what it wrote to stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    capsys.readouterr()
    try:
        code = sft.guarded(module.main)
    except SystemExit as stop:          # argparse ends the program itself
        code = stop.code
    return code, capsys.readouterr().err


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


def as_batch(rows):
    """[(ids, mask)] -> ids (B, T), mask (B, T), lengths (B,)."""
    return (sft.pad([ids for ids, _ in rows]), sft.pad([mask for _, mask in rows]),
            torch.tensor([len(ids) for ids, _ in rows]))


@torch.no_grad()
def one_by_one(backbone, rows, temperature=1.0):
    """log p of the masked tokens, by the definition: read all tokens before it, ask for the next.

    Every token costs a forward pass of the whole model over its own prefix: no batch, no padding,
    no shift.
    """
    found = []
    for ids, mask in rows:
        for t, wanted in enumerate(mask):
            if wanted:
                logits = backbone.model(input_ids=torch.tensor([ids[:t]])).logits[0, -1]
                found.append(torch.log_softmax(logits / temperature, dim=-1)[ids[t]])
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
# 3. Conversation -> ids and mask
# ------------------------------------------------------------------------------------------------


def check_mask(encode, backbone):
    """A worked example, position by position, then the same rule on real training examples."""
    ids, mask = encode(backbone, REVISION)
    expected = [("<|user|>", 0), ("G", 0), ("o", 0), ("<|end|>", 0), ("<|assistant|>", 0),
                ("a", 0), ("b", 0), ("<|end|>", 0),         # a mistake: shown, not taught
                ("<|user|>", 0), ("N", 0), ("o", 0), (".", 0), ("<|end|>", 0),
                ("<|assistant|>", 0),
                ("c", 1), ("d", 1), ("e", 1), ("<|end|>", 1)]
    assert list(zip(backbone.tokenizer.convert_ids_to_tokens(ids), mask)) == expected
    for seed in range(20):
        conversation = gp_env.expert_conversation(np.random.default_rng(seed))
        ids, mask = encode(backbone, conversation)
        learnt = [token for token, wanted in zip(ids, mask) if wanted]
        assert len(ids) == len(mask) and learnt[-1] == backbone.end_ids[0]
        assert backbone.tokenizer.decode(learnt[:-1]) == conversation[1]["content"]


def test_mask_is_exactly_the_answers(tiny):
    """Catches a mask that is off by one, forgets the end token, or teaches the wrong tries."""
    check_mask(sft.encode, tiny)


def test_encoding_is_the_chat_template_itself(tiny):
    """Catches markup lost or doubled where the segments are joined."""
    ids, _ = sft.encode(tiny, REVISION)
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in REVISION]
    assert tiny.tokenizer.decode(ids) == tiny.tokenizer.apply_chat_template(messages,
                                                                            tokenize=False)


def test_tokenizer_reads_back_what_was_written(tiny):
    """Catches phrases that swallow a space, and bytes that no token covers."""
    rng = np.random.default_rng(0)
    texts = [turn["content"] for conversation in gp_env.backbone_conversations(rng, 200)
             for turn in conversation]
    texts += [turn["content"] for _ in range(50) for turn in gp_env.expert_conversation(rng)]
    texts += ["", " ", "  two  spaces ", "\n\r\t\x00\x7f", "é e\u0301 ﬁ ß İ", "שלום \u202e abc",
              "👩‍👩‍👧 🂡 𝟚𝟜", "٢٤ ２４ ²⁴", "[Task] [Tas", '{"cards": ["', "\ufeff\u200b\ufffd"]
    texts += ["".join(chr(c) for c in rng.integers(0x20, 0xD7FF, size=30)) for _ in range(50)]
    for text in texts:
        ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tiny.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_first_turn_is_short(tiny):
    """Catches a prompt written in letters: a phrase that changed and lost its own token."""
    hand = gp_env.deal(np.random.default_rng(0))
    assert len(sft.user_ids(tiny, gp_env.prompt(hand), first=True)) < 60


# ------------------------------------------------------------------------------------------------
# 4. Log-probabilities
# ------------------------------------------------------------------------------------------------


def check_shift(token_logprobs, backbone):
    """The batched, padded, shifted computation must equal one forward pass for each token."""
    rows = ragged_rows(backbone, 4)
    ids, mask, lengths = as_batch(rows)
    for temperature in (1.0, 0.6):
        with torch.no_grad():
            found, entropy = token_logprobs(backbone, sft.trunk(backbone, ids, lengths), ids, mask,
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
    ids, mask, lengths = as_batch(rows)
    found, entropy = sft.token_logprobs(tiny, sft.trunk(tiny, ids, lengths), ids, mask, 0.7)
    log_v = math.log(len(tiny.tokenizer) - 1)
    assert torch.allclose(found, torch.full_like(found, -log_v), rtol=0, atol=1e-6)
    assert torch.allclose(entropy, torch.full_like(entropy, log_v), rtol=0, atol=1e-5)
    assert sft.sft_loss(tiny, rows, 2, backward=False)[0] == pytest.approx(log_v, abs=1e-6)


def test_padding_changes_no_logprob(tiny):
    """Catches padding on the wrong side and attention that looks at it."""
    rows = ragged_rows(tiny)
    ids, mask, lengths = as_batch(rows)
    with torch.no_grad():
        together, _ = sft.token_logprobs(tiny, sft.trunk(tiny, ids, lengths), ids, mask)
        alone = []
        for row in rows:
            ids, mask, lengths = as_batch([row])
            alone.append(sft.token_logprobs(tiny, sft.trunk(tiny, ids, lengths), ids, mask)[0])
    assert (together - torch.cat(alone)).abs().max() < 1e-5


def test_banned_tokens_have_no_probability(tiny):
    """Catches 0 * log 0 = NaN, in the entropy or in its gradient, where a token is banned."""
    ids, mask, lengths = as_batch(ragged_rows(tiny, 3))
    allowed = int(ids[0][mask[0].bool()][0])
    tiny.banned = [token for token in (3, 5, 7, 400) if token not in ids.tolist()[0]]
    hidden = sft.trunk(tiny, ids, lengths)
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
# 5. Loss, gradient, learning rate
# ------------------------------------------------------------------------------------------------


def check_loss_mean(sft_loss, backbone):
    """- sum of all log-probabilities / number of answer tokens, for any micro-batch."""
    rows = ragged_rows(backbone)
    scores = one_by_one(backbone, rows)
    expected = -scores.sum().item() / len(scores)
    for micro_batch in (1, 3, 7):
        loss, fed = sft_loss(backbone, rows, micro_batch, backward=False)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert fed == sum(len(ids) for ids, _ in rows)


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


def test_learning_rate_by_hand():
    """Catches a first step at rate 0, a jump after the warm-up, a cosine that ends elsewhere."""
    rates = [sft.learning_rate(step, 12, 2.0, warmup=4) for step in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)                           # half way down the cosine
    assert rates[6] == pytest.approx(1 + math.cos(math.pi / 4))     # a quarter
    assert rates[12] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in zip(rates[3:], rates[4:]))


def test_cooldown_by_hand():
    """Catches a jump where the cooldown begins, and a rate that is not 0 at the end."""
    rates = [sft.learning_rate(step, 20, 2.0, 2, cooldown=5) for step in range(21)]
    slow = [1 + math.cos(math.pi * (step - 2) / 30) for step in range(21)]     # 1.6 * 20 - 2 = 30
    assert rates[:2] == [1.0, 2.0]
    assert rates[2:16] == pytest.approx(slow[2:16])
    assert rates[16:] == pytest.approx([slow[20 - left] * left / 5 for left in (4, 3, 2, 1, 0)])


# ------------------------------------------------------------------------------------------------
# 7. Checkpoints and killed runs
# ------------------------------------------------------------------------------------------------


def draw(step):
    """Three training conversations, a function of the step alone."""
    rng = np.random.default_rng([9, step])
    return [gp_env.expert_conversation(rng) for _ in range(3)]


def short_run(backbone, folder, **how):
    """Six steps of SFT on a copy of the model, as a new process would do them."""
    return sft.train(copy.deepcopy(backbone), draw, folder, steps=6, lr=1e-3, warmup=2,
                     save_at={2, 4, 6}, micro_batch=2, **how)


def assert_same_run(one, other):
    """Two finished runs: equal metrics, weights and optimizer, to the last bit."""
    assert rows_of(one / "metrics.jsonl") == rows_of(other / "metrics.jsonl")
    for (step, path), (_, path2) in zip(sft.checkpoints(one), sft.checkpoints(other), strict=True):
        assert path.name == path2.name
        assert same(sft.load_state(path), sft.load_state(path2)), step
        assert same(sft.load_backbone(path).model.state_dict(),
                    sft.load_backbone(path2).model.state_dict()), step


KILLS = {"between two checkpoints": (sft, "sft_loss", 4, False),
         "before the first checkpoint": (sft, "sft_loss", 2, False),
         "before the metrics are written": (sft.Metrics, "write", 2, False),
         "after the metrics are written": (sft.Metrics, "write", 2, True),
         "in the middle of a checkpoint": (torch, "save", 2, False),
         "just after a checkpoint": (sft, "save_checkpoint", 2, True)}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_and_resumed_is_bit_for_bit_the_same(tiny, tmp_path, monkeypatch, moment):
    """Catches state that a resume forgets: optimizer, step, data order, token count, metrics."""
    short_run(tiny, tmp_path / "unbroken")
    with monkeypatch.context() as patch:
        kill_at(patch, *KILLS[moment])
        with pytest.raises(Killed):
            short_run(tiny, tmp_path / "killed")
    short_run(tiny, tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")
    assert len(rows_of(tmp_path / "killed" / "metrics.jsonl")) == 3


def test_stopped_early_and_resumed_is_the_same(tiny, tmp_path):
    """Catches a schedule that depends on where the run stops and not on its planned length."""
    short_run(tiny, tmp_path / "unbroken")
    short_run(tiny, tmp_path / "stopped", stop_at=4)
    assert [step for step, _ in sft.checkpoints(tmp_path / "stopped")] == [2, 4]
    short_run(tiny, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "stopped")


def test_leftovers_of_a_killed_save_are_no_checkpoint(tiny, tmp_path):
    """Catches a resume from a folder that was being written when the machine went down."""
    short_run(tiny, tmp_path / "unbroken")
    short_run(tiny, tmp_path / "killed", stop_at=4)
    newest = sft.checkpoints(tmp_path / "killed")[-1][1]
    shutil.copytree(newest, newest.with_name(".step-000006.123.tmp"))
    (newest.with_name(".step-000006.123.tmp") / "state.pt").write_bytes(b"PK\x03\x04half")
    (tmp_path / "killed" / "step-000006").mkdir()           # nor is an empty folder
    (tmp_path / "killed" / "metrics.jsonl").open("a").write('{"step": 6, "lo')
    assert [step for step, _ in sft.checkpoints(tmp_path / "killed")] == [2, 4]
    short_run(tiny, tmp_path / "killed", resume=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")


def test_kill_between_the_two_moves_of_a_save_loses_nothing(tiny, tmp_path):
    """Catches a clean-up that deletes the only copy: old one set aside, new one not in place."""
    whole = tmp_path / "step-000001"
    sft.save_checkpoint(whole, tiny, {"tokens": 1})
    before = files_of(whole)
    whole.rename(tmp_path / ".step-000001.77.old")
    sft.clear_up(tmp_path)
    assert files_of(whole) == before
    # killed one moment later: the new one is in place, the old one is only rubbish
    shutil.copytree(whole, tmp_path / ".step-000001.77.old")
    (tmp_path / ".args.json.77.tmp").write_text("{")
    sft.clear_up(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
def test_failed_save_leaves_the_old_checkpoint(tiny, tmp_path, monkeypatch, error):
    """Catches a checkpoint written in place, which a full disk turns into half of one."""
    folder = tmp_path / "step-000001"
    sft.save_checkpoint(folder, tiny, {"tokens": 1})
    before = files_of(folder)

    def full(value, path):
        path.write_bytes(b"PK\x03\x04")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(type(error)):
            sft.save_checkpoint(folder, tiny, {"tokens": 2})
        with pytest.raises(type(error)):
            sft.save_checkpoint(tmp_path / "step-000002", tiny, {"tokens": 2})
    assert files_of(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    sft.save_checkpoint(folder, tiny, {"tokens": 3})
    assert sft.load_state(folder) == {"tokens": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_disk_that_is_full_is_named(tiny, tmp_path, monkeypatch):
    """Catches the traceback that torch makes of a full disk, and checkpoints lost to it."""
    folder = tmp_path / "step-000001"
    sft.save_checkpoint(folder, tiny, {"tokens": 1})
    before = files_of(folder)

    def full(value, path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(sft.Problem, match="disk full"):
            sft.save_checkpoint(folder, tiny, {"tokens": 2})
    assert files_of(folder) == before and len(list(tmp_path.iterdir())) == 1


def test_checkpoint_is_moved_into_place(tiny, tmp_path, monkeypatch):
    """Catches files copied into the final folder one by one: a kill leaves half of them."""
    written = []

    def noting(value, path):
        written.append(path.parent.stat().st_ino)
        assert not (tmp_path / "step-000001").exists(), "visible before it is complete"

    monkeypatch.setattr(torch, "save", noting)
    sft.save_checkpoint(tmp_path / "step-000001", tiny, {"tokens": 1})
    assert written == [(tmp_path / "step-000001").stat().st_ino]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing"])
def test_damaged_state_is_refused(tmp_path, damage):
    """Catches a damaged file that ends in a traceback, or worse, in a fresh start."""
    path = tmp_path / "state.pt"
    torch.save({"tokens": 1, "weights": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    {"cut": lambda: path.write_bytes(whole[:len(whole) // 2]),
     "empty": lambda: path.write_bytes(b""),
     "text": lambda: path.write_text("not a checkpoint"),
     "missing": path.unlink}[damage]()
    with pytest.raises(sft.Problem, match="state.pt"):
        sft.load_state(tmp_path)


class Touch:
    """A pickle that creates a file when it is read: the classic attack by a shared checkpoint."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_state_that_runs_code_is_refused(tmp_path):
    """Catches torch.load without weights_only: a downloaded checkpoint could run any program."""
    torch.save({"tokens": Touch(tmp_path / "owned")}, tmp_path / "state.pt")
    with pytest.raises(sft.Problem):
        sft.load_state(tmp_path)
    assert not (tmp_path / "owned").exists()


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


def test_damage_in_the_middle_of_a_file_is_named(tmp_path):
    """Catches rows that are dropped for good because one before them cannot be read."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{bro\n{"step": 3}\n')
    with pytest.raises(sft.Problem, match="line 2"):
        sft.Metrics(tmp_path, resume_at=3)
    assert path.read_text().count("\n") == 3
    path.write_text('{"step": 1}\n{bro')
    assert sft.read_lines(path) == [{"step": 1}]


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


# ------------------------------------------------------------------------------------------------
# 1. Other models
# ------------------------------------------------------------------------------------------------


def text_model(kind, tokenizer):
    """A tiny text-only model of a class from the hub, with random weights."""
    import transformers
    config, model = {"llama": ("LlamaConfig", "LlamaForCausalLM"),
                     "qwen2": ("Qwen2Config", "Qwen2ForCausalLM")}[kind]
    end = tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=64, initializer_range=0.2, eos_token_id=end,
            bos_token_id=end, pad_token_id=tokenizer.pad_token_id))
    return made.eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_text_models_load_and_agree_with_themselves(tiny, tmp_path, kind):
    """Catches code that only knows the small backbone's class: heads, positions, key sharing."""
    import evaluate
    from test_evaluate import Rigged, assert_sampler_agrees
    text_model(kind, tiny.tokenizer).save_pretrained(tmp_path / kind)
    tiny.tokenizer.save_pretrained(tmp_path / kind)
    backbone = sft.load_backbone(tmp_path / kind)
    assert backbone.end_ids == tiny.end_ids and backbone.before_answer == tiny.before_answer
    check_shift(sft.token_logprobs, backbone)
    for keep_cache in (True, False):
        envs = [Rigged(solve_at) for solve_at in (1, 3, 6)]
        episodes = evaluate.play(backbone, envs, range(3), 0.6, 6,
                                 torch.Generator().manual_seed(1), keep_cache)
        assert_sampler_agrees(backbone, episodes, 0.6)


def test_capped_logits_are_read_right_or_refused(tiny):
    """Catches models that bend their logits after the last matrix: log p would not be theirs."""
    from transformers import Gemma2Config, Gemma2ForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(Gemma2Config(
            vocab_size=len(tiny.tokenizer), hidden_size=32, num_hidden_layers=2, head_dim=16,
            num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
            initializer_range=0.2, final_logit_softcapping=3.0)).eval()
    try:
        backbone = sft.wrap_backbone(model, tiny.tokenizer)
    except sft.Problem:
        return
    check_shift(sft.token_logprobs, backbone)


def test_layers_with_a_window_are_refused(tiny):
    """Catches a window counted in columns of the cache, which have gaps, and not in tokens."""
    from transformers import Gemma2Config, Gemma2ForCausalLM
    model = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=len(tiny.tokenizer), hidden_size=32, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
        final_logit_softcapping=None, sliding_window=8))
    with pytest.raises(sft.Problem, match="windows"):
        sft.wrap_backbone(model, tiny.tokenizer)


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
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_model_that_cannot_chat_is_refused(tiny, case):
    """Catches base models and odd templates that would train on broken markup, or on none."""
    tiny.tokenizer.chat_template = BAD_TEMPLATES[case]
    with pytest.raises(sft.Problem, match="chat template"):
        sft.wrap_backbone(tiny.model, tiny.tokenizer)


# ------------------------------------------------------------------------------------------------
# The run of a task
# ------------------------------------------------------------------------------------------------


def run_settings(model, **changes):
    """The flags of sft.py for a run of a second."""
    return argparse.Namespace(**{
        "task": "gp-l", "model": str(model), "split": "train", "seed": 0, "ood": False,
        "device": "cpu", "threads": 0, "grad_checkpoint": False, "micro_batch": 64, "steps": 4,
        "start_step": 2, "batch": 4, "lr": 1e-3, "save_every": 4, "resume": False, "freeze": None,
        "drop_pictures": False, "dtype": "float32", "preset": None}
        | changes)


def test_start_of_rl_is_a_point_of_the_longer_run(tiny, tmp_path):
    """Catches a comparison of RL and SFT that do not come from the same start."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    args = run_settings(tmp_path / "model")
    start = sft.run_sft(args, tmp_path / "start", stop_at=2)
    sft.run_sft(args, tmp_path / "whole")
    assert start.name == "step-000002"
    assert same(sft.load_backbone(start).model.state_dict(),
                sft.load_backbone(tmp_path / "whole" / start.name).model.state_dict())


def test_training_sees_no_held_out_hand(tiny, tmp_path, monkeypatch):
    """Catches test hands that leak into SFT, and a data order that ignores seed or step."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    caught = {}

    def instead(backbone, draw, *args, **kwargs):
        caught["draw"] = draw

    monkeypatch.setattr(sft, "train", instead)
    seen = {}
    for seed in (0, 1):
        sft.run_sft(run_settings(tmp_path / "model", seed=seed, batch=50), tmp_path / "run")
        for step in (0, 1):
            texts = [talk[0]["content"] for talk in caught["draw"](step)]
            assert texts == [talk[0]["content"] for talk in caught["draw"](step)]
            seen[seed, step] = texts
            for text in texts:
                cards = text.split("[Cards] ")[1].split("\n")[0].split(", ")
                assert gp_env.split_of(cards) == "train"
                assert "J = 10, Q = 10, K = 10" in text
    assert len(set(map(tuple, seen.values()))) == 4


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--model", "nowhere"], ["nowhere"]),
    (["--batch", "0"], ["--batch"]),
    (["--micro-batch", "0"], ["--micro-batch"]),
    (["--save-every", "0"], ["--save-every"]),
    (["--steps", "0"], ["--steps"]),
    (["--lr", "-1"], ["--lr"]),
    (["--lr", "nan"], ["--lr"]),
    (["--seed", "-1"], ["--seed"]),
    (["--device", "abacus"], ["--device", "abacus"]),
    (["--device", "meta"], ["--device", "meta"]),           # known to torch, of no use here
    (["--device", "cuda"], ["--device", "GPU"]),
    (["--resume"], ["--resume"]),
    (["--out", "model/config.json"], ["config.json"]),
    (["--out", ""], ["--out", "empty"]),
    (["--out", "orphan"], ["orphan", "args.json"]),
    (["--device", "cpu:5"], ["--device", "cpu:5"]),
    (["--threads", "100000"], ["--threads", "cores"]),
    (["--steps", "2", "--stop-step", "6"], ["--stop-step"]),
    (["--picture-size", "640x320"], ["--picture-size", "gp-l"]),
    (["--build", "gp", "--dry-run"], ["--build", "--dry-run"]),
])
def test_bad_flags_end_in_one_line(tiny, tmp_path, monkeypatch, capsys, flags, words):
    """Catches a traceback, a silent default, and an exit code 0 after nothing was done."""
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here: --device cuda is fine")
    sft.save_checkpoint(tmp_path / "model", tiny)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orphan").mkdir()
    (tmp_path / "orphan" / "metrics.jsonl").write_text("")
    basis = [] if "--model" in flags else ["--model", "model"]
    code, error = command(monkeypatch, capsys, sft, *basis, *flags)
    assert_one_line(code, error, "sft.py: ", *words)


@pytest.mark.parametrize("flags", [["--task", "chess"], ["--steps", "many"], ["--no-such-flag"]])
def test_unknown_flags_exit_with_2(monkeypatch, capsys, flags):
    """Catches abbreviations and typos that would be taken for something else."""
    code, error = command(monkeypatch, capsys, sft, *flags)
    assert code == 2 and "error:" in error and "Traceback" not in error


def test_run_folders_are_not_mixed_up(tiny, tmp_path, monkeypatch, capsys):
    """Catches a run that overwrites another, or goes on with other settings than before."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "model", "--steps", 2, "--start-step", 1, "--batch", 2, "--out", "run"]
    code, error = command(monkeypatch, capsys, sft, *flags)
    assert code == 0, error
    before = files_of(tmp_path / "run" / "step-000002")
    assert_one_line(*command(monkeypatch, capsys, sft, *flags), "--resume", "run")
    assert_one_line(*command(monkeypatch, capsys, sft, *flags, "--resume", "--seed", 1), "--seed")
    assert_one_line(*command(monkeypatch, capsys, sft, *flags[:2], *flags[4:], "--resume"),
                    "--steps")
    # what the out-of-memory line advises must be possible
    code, error = command(monkeypatch, capsys, sft, *flags, "--resume", "--micro-batch", 1)
    assert code == 0, error
    assert files_of(tmp_path / "run" / "step-000002") == before
    (tmp_path / "run" / "args.json").write_text('{"kind": "sft"')
    assert_one_line(*command(monkeypatch, capsys, sft, *flags, "--resume"), "args.json")


def test_a_typo_does_not_use_up_the_run_folder(tiny, tmp_path, monkeypatch, capsys):
    """Catches a folder claimed before the model was found: the corrected command is refused."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    monkeypatch.chdir(tmp_path)
    flags = ["--steps", "1", "--batch", "2", "--out", "run"]
    assert_one_line(*command(monkeypatch, capsys, sft, "--model", "modle", *flags), "modle")
    code, error = command(monkeypatch, capsys, sft, "--model", "model", *flags)
    assert code == 0, error


@pytest.mark.parametrize("error, code, word", [
    (sft.Problem("two\n  lines"), 2, "two lines"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "disk is full"),
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
