"""Tests of what only large models need: bf16 weights, presets, dry runs, hub folders, memory.

Everything runs on tiny random models of the real classes; what needs a GPU skips itself.

    python -m pytest tests/test_large.py
"""

import argparse
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_map

import benchmark
import evaluate
import gp_env
import rl
import sft
import test_pictures
import virl_env
from backbones import build as make, gp_corpus
from test_evaluate import Rigged
from test_pictures import SIZE, build, pictured, sampled_and_scored, step_on_meta
from test_sft import assert_one_line, command, copy_at, rows_of, same, short_run, text_model

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")

# ------------------------------------------------------------------------------------------------
# The optimiser of bf16 weights
# ------------------------------------------------------------------------------------------------


def generator(seed=0):
    """A torch.Generator."""
    return torch.Generator().manual_seed(seed)


def bits(value):
    """Nested containers, with the 16 bits of each bfloat16 as an integer: not a number is a number
    there, and equal to itself."""
    return tree_map(lambda x: x.view(torch.int16) if isinstance(x, torch.Tensor)
                    and x.dtype == torch.bfloat16 else x, value)


def settings(**changes):
    """The flags of rl.py, changed."""
    return argparse.Namespace(**vars(rl.flags([])) | changes)


def test_halves_give_back_every_bit():
    """Catches a residual that overflows at a tie, or loses the last bit of the master weight."""
    bits = torch.randint(-2 ** 31, 2 ** 31 - 1, (300_000,), dtype=torch.int32,
                         generator=generator())
    values = bits.view(torch.float32)
    values = values[values.abs() < 3e38]
    ties = (torch.arange(2000, dtype=torch.int32) * 65536 + 32768 + 0x3f000000).view(torch.float32)
    for master in (values, ties, -ties, torch.tensor([0.0, -0.0, 1e-40, -1e-40])):
        weight, rest = sft.halve(master)
        assert weight.dtype == torch.bfloat16 and rest.dtype == torch.int16
        assert torch.equal(sft.rejoin(weight, rest).view(torch.int32), master.view(torch.int32))
        error = (weight.double() - master.double()).abs()
        nearest = (master.bfloat16().double() - master.double()).abs()
        assert torch.equal(error, nearest), "the model computes with the nearest bf16"


def test_rounding_by_chance_has_the_right_mean():
    """Catches a rounding that is biased, or that moves what is a bf16 already."""
    value = torch.full((200_000,), 1.0 + 0.3 / 128)             # 0.3 of the way to the next bf16
    rounded = sft.stochastic(value, generator()).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 1 / 128}
    up = (rounded > 1).float().mean().item()
    assert abs(up - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 200_000)
    exact = torch.tensor([1.0, -2.5, 0.0]).repeat(1000)
    assert torch.equal(sft.stochastic(exact, generator()).float(), exact)


def steps_of(optimizer, parameter, count=100, seed=3):
    """Give an optimizer the same noisy gradients, mostly of one sign."""
    noise = generator(seed)
    for _ in range(count):
        gradient = (torch.randn(parameter.shape, generator=noise) * 0.3 + 1).bfloat16()
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def test_a_learning_rate_of_the_paper_moves_bf16_weights():
    """Catches weights that stand still at lr 1e-6, which no loss curve would show for a long time.

    Against torch's AdamW with float32 weights and moments on the same gradients.
    """
    start = (torch.randn(20_000, generator=generator()) * 0.02).bfloat16()
    how = dict(lr=1e-6, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.0)
    exact = torch.nn.Parameter(start.float())
    steps_of(torch.optim.AdamW([exact], **how), exact)
    plain = torch.nn.Parameter(start.clone())
    steps_of(torch.optim.AdamW([plain], **how), plain)
    ours = torch.nn.Parameter(start.clone())
    before = torch.get_rng_state()
    optimizer = sft.adamw([{"params": [ours], "lr": 1e-6}], (0.9, 0.98))
    steps_of(optimizer, ours)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is somebody else's"
    wanted = exact.detach() - start.float()
    moved = sft.rejoin(ours.detach(), bits(optimizer.state[ours]["rest"])) - start.float()
    assert (moved - wanted).square().mean().sqrt() < 0.01 * wanted.square().mean().sqrt()
    stuck = (plain.detach().float() - start.float()).mean() / wanted.mean()
    assert stuck < 0.05, "if plain bf16 moves as well, AdamW16 has no reason to be"
    assert not (ours == start).all(), "the model computes with weights that have moved"


def test_second_moment_of_bf16_does_not_stand_still():
    """Catches moments rounded to the nearest: v would stop at a fraction of its target."""
    weight = torch.nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16))
    optimizer = sft.adamw([{"params": [weight], "lr": 0.0}], (0.9, 0.999))
    for _ in range(400):
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
    wanted = 4 * (1 - 0.999 ** 400)
    assert abs(optimizer.state[weight]["second"].float().mean() / wanted - 1) < 0.01


def test_first_step_by_hand_and_in_chunks():
    """Catches chunks that are left out or mixed up, and a missing bias correction."""
    for chunk in (2 ** 24, 3):
        weight = torch.nn.Parameter(torch.arange(8.0).bfloat16().view(2, 4))
        head = torch.nn.Parameter(torch.ones(2))                # float32, as the critic's
        optimizer = sft.AdamW16([{"params": [weight], "lr": 0.01}, {"params": [head], "lr": 0.1}],
                                (0.9, 0.999), chunk=chunk)
        weight.grad = torch.tensor([[1.0, -1, 2, -2], [4, -4, 8, -8]]).bfloat16()
        optimizer.step()                                        # head has no gradient yet
        assert torch.equal(head.detach(), torch.ones(2))
        master = sft.rejoin(weight.detach(), bits(optimizer.state[weight]["rest"]))
        wanted = torch.arange(8.0).view(2, 4) - 0.01 * torch.tensor([1.0, -1, 1, -1])
        assert torch.allclose(master, wanted, rtol=0, atol=1e-6)
        head.grad = torch.tensor([3.0, -3.0])
        optimizer.step()                # its own first step, with its own rate
        assert torch.allclose(head.detach(), torch.tensor([0.9, 1.1]), atol=1e-6)
        assert optimizer.state[head]["first"].dtype == torch.float32


def test_bf16_optimizer_resumes_exactly(tmp_path):
    """Catches a residual that a checkpoint rounds away, and chance that a resume repeats."""
    def fresh():
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 500).bfloat16())
        return weight, sft.adamw([{"params": [weight], "lr": 1e-4}], (0.9, 0.999))

    whole, optimizer = fresh()
    steps_of(optimizer, whole, 3, seed=1)
    steps_of(optimizer, whole, 3, seed=2)
    first, before = fresh()
    steps_of(before, first, 3, seed=1)
    torch.save(before.state_dict(), tmp_path / "state.pt")
    for saved in (torch.load(tmp_path / "state.pt", weights_only=True), before.state_dict()):
        again, after = fresh()
        again.data.copy_(first.data)
        after.load_state_dict(saved)
        steps_of(after, again, 3, seed=2)
        assert torch.equal(whole, again)
        assert same(bits(optimizer.state_dict()["state"]), bits(after.state_dict()["state"]))


def test_float32_weights_keep_the_optimizer_of_torch():
    """Catches a change of the optimiser that the shipped results were made with."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = sft.adamw([{"params": [weight], "lr": 1e-3}], (0.9, 0.98), fused=True)
    assert type(optimizer) is torch.optim.AdamW
    assert {key: optimizer.defaults[key] for key in ("betas", "eps", "weight_decay", "fused")} == {
        "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.0, "fused": True}


# ------------------------------------------------------------------------------------------------
# Positions in three dimensions
# ------------------------------------------------------------------------------------------------


def test_position_shift_by_hand():
    """Catches rows and columns swapped, and text that goes on from the wrong number."""
    backbone = build("qwen2_5_vl")
    mark = backbone.model.config.image_token_id
    shift = sft.position_shift(backbone, [7, mark, mark, mark, mark, 8], torch.tensor([[1, 4, 4]]))
    assert shift.tolist() == [[[0, 0, -1, -2, -3, -2], [0, 0, -1, -1, -2, -2],
                               [0, 0, 0, -2, -2, -2]]]
    other = sft.position_shift(backbone, [7, mark, mark, 8], torch.tensor([[1, 2, 4]]))
    count = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7, 8, 9, 10],
                          [0, 1, 2, 3, 4, 5, 6, 7]])
    table = sft.shift_table([{"shift": shift}, {"shift": shift}, {"shift": other}])
    where = sft.shifted(table, count)
    assert where[0, 0].tolist() == [0, 1, 1, 1, 1, 3, 4, 5]
    assert where[2, 0].tolist() == [0, 1, 2, 1, 2, 3, 4, 5]
    assert where[:, 1].tolist() == [[1, 1, 3, 4, 5, 6, 7, 8], [2, 2, 3, 4, 5, 6, 7, 8],
                                    [1, 2, 3, 4, 5, 6, 7, 8]]
    assert where[0, 2].tolist() == [0, 1, 1, 3, 4, 5, 6, 7]


@torch.no_grad()
def test_qwen_reads_as_its_own_class_does():
    """Catches 3-D positions that sampler and update agree on, and the model was not trained with.

    The reference is the model called as its documentation says: it makes the positions itself.
    """
    backbone = build("qwen2_5_vl")
    for size in ((128, 64), (64, 128), (200, 100)):
        turns = gp_env.expert_conversation(np.random.default_rng(1), picture=SIZE)
        turns[0]["image"] = Image.effect_noise(size, 90).convert("RGB")
        encoded = sft.encode(backbone, turns)
        ids, picture = encoded["ids"], encoded["picture"]
        row = torch.tensor([ids])
        kinds = (row == backbone.model.config.image_token_id).int()
        own = backbone.model(input_ids=row, mm_token_type_ids=kinds, attention_mask=row * 0 + 1,
                             pixel_values=picture["pixel_values"], use_cache=False,
                             image_grid_thw=picture["image_grid_thw"]).logits
        hidden = sft.trunk(backbone, row, [picture])
        ours = backbone.model.get_output_embeddings()(hidden)
        assert (own - ours).abs().max() < 1e-4 * own.abs().max()
        flat = backbone.model(input_ids=row, attention_mask=row * 0 + 1, use_cache=False,
                              pixel_values=picture["pixel_values"],
                              image_grid_thw=picture["image_grid_thw"],
                              position_ids=torch.arange(len(ids))[None]).logits
        assert (own - flat).abs().max() > 1e-2, "a plain count would do: the test shows nothing"


# ------------------------------------------------------------------------------------------------
# Classes in text
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("how", [{}, {"forget": True}, {"fresh": True}])
def test_sampler_and_update_agree_in_text(tiny, kind, how):
    """Catches code that only knows the small backbone's class: positions, heads, shared keys."""
    backbone = sft.wrap_backbone(text_model(kind, tiny.tokenizer), tiny.tokenizer)
    backbone.end_ids += range(60, 120)          # many ways to end: answers of unequal length
    envs = [Rigged(solve_at, **how) for solve_at in (1, 3, 6, 2, 6, 4)]
    episodes = evaluate.play(backbone, envs, range(6), 0.6, 5, generator())
    for micro_batch in (1, 4):
        sampled, scored = sampled_and_scored(backbone, episodes, micro_batch)
        assert (sampled - scored).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_recorded_step_of_text_never_asks_the_cpu(tiny, kind, monkeypatch):
    """Catches the same as its namesake of pictures, for the classes that only read."""
    backbone = sft.wrap_backbone(text_model(kind, tiny.tokenizer), tiny.tokenizer)
    step_on_meta(backbone, sft.user_ids(backbone, "Which cards?", first=True), None, monkeypatch)


# ------------------------------------------------------------------------------------------------
# Folders as the hub has them
# ------------------------------------------------------------------------------------------------

# The released template of SmolVLM loses the words of a turn that is a plain string.
LISTED = ("{% for m in messages %}<|{{ m['role'] }}|>{% for c in m['content'] %}"
          "{% if c['type'] == 'image' %}<image>{% elif c['type'] == 'text' %}{{ c['text'] }}"
          "{% endif %}{% endfor %}<|end|>{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def hub_folder(kind, folder, template=LISTED):
    """A tiny model saved as its release is: the processor's class asks for torchvision."""
    backbone = build(kind)
    backbone.tokenizer.chat_template = None
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    name = {"smolvlm": "SmolVLM", "qwen2_5_vl": "Qwen2_5_VL"}[kind]
    images = backbone.processor.image_processor.to_dict() | {
        "processor_class": f"{name}Processor",
        "image_processor_type": {"smolvlm": "SmolVLMImageProcessor",
                                 "qwen2_5_vl": "Qwen2VLImageProcessor"}[kind]}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    more = {"image_seq_len": 4} if kind == "smolvlm" else {}
    (folder / "processor_config.json").write_text(json.dumps(
        more | {"processor_class": f"{name}Processor"}))
    (folder / "chat_template.jinja").write_text(template)
    return backbone


@pytest.mark.parametrize("kind", ["smolvlm", "qwen2_5_vl"])
def test_released_folders_load_without_torchvision(kind, tmp_path):
    """Catches a model that is blind because its processor could also do videos."""
    known = hub_folder(kind, tmp_path)
    loaded = sft.load_backbone(tmp_path)
    assert loaded.processor is not None and loaded.before_picture == "<|user|><image>"
    assert (loaded.before_first, loaded.before_next) == (known.before_first, known.before_next)
    for conversation in pictured(2):
        one, two = (sft.encode(backbone, conversation) for backbone in (known, loaded))
        assert same(one, two)
    sft.save_checkpoint(tmp_path / "again", loaded)         # as a run saves it, and resumes
    assert sft.load_backbone(tmp_path / "again").before_picture == "<|user|><image>"


def test_every_listed_end_token_ends_an_answer(tiny, tmp_path):
    """Catches a model that goes on talking: releases list several ends in generation_config."""
    tiny.model.generation_config.eos_token_id = [65, tiny.end_ids[0], 66]
    tiny.model.generation_config.update(do_sample=True, top_p=0.5, top_k=3, temperature=0.1,
                                        repetition_penalty=2.0)     # no sampler here reads these
    sft.save_checkpoint(tmp_path, tiny)
    loaded = sft.load_backbone(tmp_path)
    assert loaded.end_ids == [tiny.end_ids[0], 65, 66]
    one = evaluate.play(loaded, [Rigged(6) for _ in range(8)], range(8), 0.6, 6, generator())
    assert {i for e in one for t in e.turns for i in t.answer_ids[:-1]}.isdisjoint(loaded.end_ids)
    tiny.end_ids = loaded.end_ids
    two = evaluate.play(tiny, [Rigged(6) for _ in range(8)], range(8), 0.6, 6, generator())
    assert [t.answer_ids for e in one for t in e.turns] == [
        t.answer_ids for e in two for t in e.turns]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json",
                                  "processor_config.json"])
def test_code_in_a_model_folder_is_not_run(tmp_path, file, monkeypatch):
    """Catches a downloaded folder that runs its own module, or asks whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    hub_folder("smolvlm", tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    key = {"c": "AutoConfig", "t": "AutoTokenizer", "p": "AutoProcessor"}[file[0]]
    value = "evil.Evil" if file[0] != "t" else ["evil.Evil", "evil.Evil"]
    known = json.loads((tmp_path / file).read_text()) | {"auto_map": {key: value}}
    if file[0] == "c":
        known["model_type"] = "evil"
    (tmp_path / file).write_text(json.dumps(known))
    if file == "config.json":
        with pytest.raises(sft.Problem, match="cannot load"):
            sft.load_backbone(tmp_path)
    else:                           # the library has a class of its own: that one is used
        assert sft.load_backbone(tmp_path).processor is not None
    assert not (tmp_path / "touched").exists()


def test_pickled_weights_are_refused(tiny, tmp_path):
    """Catches weights that are unpickled because the safe file is missing."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(tiny.model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(sft.Problem, match="cannot load"):
        sft.load_backbone(tmp_path / "model")


@pytest.mark.parametrize("said, words", [
    ("You are trying to access a gated repo.\nMake sure", ["licence", "hf auth login"]),
    ("nobody/none is not a local folder and is not a valid model identifier", ["hf auth login"]),
    ("We couldn't connect to the hub", ["hf download"]),
    ("", ["cannot load it (OSError)"])])
def test_what_the_hub_refuses_is_said_in_one_line(monkeypatch, capsys, tmp_path, said, words):
    """Catches a page of traceback where a licence has to be accepted, or a cable plugged in."""
    monkeypatch.chdir(tmp_path)
    for script in (sft, evaluate, rl):
        with mock.patch("transformers.AutoConfig.from_pretrained", side_effect=OSError(said)):
            assert_one_line(*command(monkeypatch, capsys, script, "--model", "some/model"),
                            "some/model", *words)
    assert not list(tmp_path.iterdir())


def test_presets_are_the_paper_and_flags_win():
    """Catches a preset that no flag can change, or that another task's numbers slip into."""
    for task, rate, supervised, updates, tries, start in (
            ("gp-l", 1e-6, 1e-6, 20, 5, 400), ("gp-vl", 1e-6, 5e-7, 20, 5, 400),
            ("virl-l", 1e-6, 1e-6, 15, 2, 25), ("virl-vl", 1e-7, 5e-7, 15, 2, 25)):
        for script in (sft, rl):
            args = script.flags(["--preset", "paper", "--task", task])
            assert args.model == "meta-llama/Llama-3.2-11B-Vision-Instruct"
            assert args.dtype == "bfloat16" and args.grad_checkpoint
            assert args.picture_size == ([1200, 1200] if task.endswith("vl") else None)
            assert sft.start_step(args) == start
            if script is sft:
                assert (args.lr, args.batch) == (supervised, 128)
                continue
            assert (args.lr, args.updates, args.tries) == (rate, updates, tries)
            assert (args.clip, args.epochs, args.gamma, args.lam, args.temperature) == (
                0.1, 4, 0.9, 0.95, 0.2)
            assert args.ratio == "answer" and args.value_trunk and args.max_new_tokens == 512
    args = rl.flags(["--task", "gp-l", "--preset", "paper", "--model", "some/other", "--clip",
                     "0.3", "--dtype", "float32", "--no-grad-checkpoint", "--no-value-trunk"])
    assert (args.model, args.clip, args.dtype) == ("some/other", 0.3, "float32")
    assert not args.grad_checkpoint and not args.value_trunk and args.lr == 1e-6


# ------------------------------------------------------------------------------------------------
# Dry runs
# ------------------------------------------------------------------------------------------------


def tiny_configs(kind, folder, size=900):
    """Write a tiny config.json of this class; size: of its vocabulary, 900 for any tokenizer."""
    tokenizer = make.build_tokenizer(gp_corpus.phrases())
    if kind in test_pictures.CLASSES:
        config = build(kind).model.config
    elif kind == "mllama":
        config = make.build_model(tokenizer, 0, width=32, layers=4, crossing=(1,), heads=2,
                                  inner=64).config
    else:
        config = text_model(kind, tokenizer).config
    config.get_text_config().vocab_size = size
    config.save_pretrained(folder)


def dry_run(monkeypatch, capsys, *flags):
    """tests/benchmark.py --dry-run of these flags. Returns what it said."""
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--dry-run", *map(str, flags)])
    code = sft.guarded(benchmark.main)
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


@pytest.mark.parametrize("kind", ["mllama", *test_pictures.CLASSES, "llama", "qwen2"])
def test_dry_run_of_every_class(kind, tmp_path, monkeypatch, capsys):
    """Catches a class that a student would find broken after the download, and files left over."""
    torch.set_num_threads(1)
    tiny_configs(kind, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "matrix_rate", lambda device, dtype: 1e12)      # slow in bf16
    words = kind in ("llama", "qwen2")
    for stage, more in (("rl", ["--episodes", 2, "--max-new-tokens", 3, "--minibatch", 2]),
                        ("sft", ["--batch", 2])):
        name = "model/config.json" if stage == "sft" else "model"
        told = dry_run(monkeypatch, capsys, stage, "--task", "gp-l" if words else "gp-vl",
                       "--model", name, "--random-weights", "--dtype", "bfloat16",
                       "--grad-checkpoint", *more)
        for word in ("peak memory", "TFLOP/s", "tokens/s", "whole run", "bfloat16"):
            assert word in told, told
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # and in float32 the sampler and the update agree
    backbone = benchmark.random_backbone(tmp_path / "model", "gp-l")
    envs = [Rigged(solve_at, picture=None if words else SIZE) for solve_at in (1, 2, 6)]
    episodes = evaluate.play(backbone, envs, range(3), 0.6, 5, generator())
    sampled, scored = sampled_and_scored(backbone, episodes, 2)
    assert (sampled - scored).abs().max() < 1e-4


def test_dry_run_of_a_walk_is_a_whole_walk(tmp_path, monkeypatch, capsys):
    """Catches an estimate from walks that noise ends at once: a tenth of their true length."""
    tiny_configs("llama", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    rows, conversations = [], rl.conversations
    monkeypatch.setattr(rl, "conversations", lambda e: rows.extend(conversations(e)) or rows)
    dry_run(monkeypatch, capsys, "--task", "virl-l", "--model", "model", "--random-weights",
            "--episodes", 2, "--max-new-tokens", 2)
    assert len(rows) > 8 and all(len(row["tries"]) == virl_env.TRIES for row in rows)


def test_known_sizes_are_the_published_ones():
    """Catches a configuration from memory with a layer too few. Nothing is allocated."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    wanted = {"meta-llama/Llama-3.2-11B-Vision-Instruct": 10_670_220_835,
              "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
              "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
              "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768}
    assert set(wanted) == set(benchmark.KNOWN)
    for name, count in wanted.items():
        config = AutoConfig.for_model(**benchmark.KNOWN[name])
        sees = getattr(config, "vision_config", None) is not None
        with torch.device("meta"):
            model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(
                config, dtype=torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("flags, words", [
    (["--random-weights"], ["--random-weights", "--dry-run"]),
    (["--random-weights", "--dry-run", "--model", "some/model"], ["some/model", "Llama-3.2-11B"]),
    (["--random-weights", "--dry-run", "sft", "--model", "small"], ["vocabulary", "300"]),
    (["--sampler", "--against", "nowhere", "--model", "small"], ["nowhere"]),
    (["--dry-run", "--task", "gp-vl", "--model", "small", "--random-weights"], ["vocabulary"])])
def test_bad_dry_runs_end_in_one_line(monkeypatch, capsys, tmp_path, flags, words):
    """Catches a measurement of noise, and a traceback about an index out of range."""
    monkeypatch.chdir(tmp_path)
    tiny_configs("llama", tmp_path / "small", size=300)
    assert_one_line(*command(monkeypatch, capsys, benchmark, *flags), *words)


def test_cached_update_against_the_naive_loop(tiny, capsys):
    """Catches a stopwatch of two different updates: other hands, or other answers scored."""
    args = settings(episodes=3, max_new_tokens=4, updates=1)
    found = benchmark.cached_against_naive(tiny, args)
    assert "b / a" in capsys.readouterr().out
    assert found["cached"]["tries"] == found["naive"]["tries"] == found["naive"]["rows"] == 15
    assert found["naive"]["tokens read"] > 2 * found["cached"]["tokens read"]


# ------------------------------------------------------------------------------------------------
# Runs in bf16, out of memory, gradients that are not finite
# ------------------------------------------------------------------------------------------------

FLAGS = ["--model", "model", "--dtype", "bfloat16", "--init", "model", "--updates", 2,
         "--episodes", 4, "--max-new-tokens", 4, "--minibatch", 2, "--eval-hands", 2,
         "--sample-batch", 3]


def test_bf16_run_resumed_is_the_same(tiny, tmp_path, monkeypatch, capsys):
    """Catches residuals or moments that a checkpoint rounds, and a resume in float32."""
    sft.save_checkpoint(tmp_path / "model", tiny)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gp_env, "GeneralPoints", Rigged)
    with monkeypatch.context() as patch:
        copy_at(patch, "whole", "killed", rl, "collect", 2)
        code, error = command(patch, capsys, rl, *FLAGS, "--out", "whole")
    assert code == 0, error
    code, error = command(monkeypatch, capsys, rl, *FLAGS, "--out", "killed", "--resume")
    assert code == 0, error
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert rows_of(tmp_path / "whole" / name) == rows_of(tmp_path / "killed" / name)
    one, two = (tmp_path / run / "step-000002" for run in ("whole", "killed"))
    assert same(bits(sft.load_state(one)), bits(sft.load_state(two)))
    loaded = sft.load_backbone(one, dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    assert same(loaded.model.state_dict(), sft.load_backbone(two, dtype="bfloat16")
                .model.state_dict())
    assert_one_line(*command(monkeypatch, capsys, rl, *FLAGS, "--out", "whole", "--resume",
                             "--dtype", "float32"), "--dtype")


def test_bf16_sft_resumed_is_the_same(tiny, tmp_path):
    """Catches the same in SFT, which loads its weights into the model that is there already."""
    tiny.model.to(torch.bfloat16)
    whole = short_run(tiny, tmp_path / "whole")
    short_run(tiny, tmp_path / "run", stop_at=2)
    again = short_run(tiny, tmp_path / "run", resume=True)
    assert same(bits(sft.load_state(whole)), bits(sft.load_state(again)))
    one, two = (sft.load_backbone(path, dtype="bfloat16") for path in (whole, again))
    assert same(one.model.state_dict(), two.model.state_dict())


def test_critic_of_a_bf16_model_is_float32(tiny):
    """Catches values and log-probabilities that are rounded to three digits."""
    tiny.model.to(torch.bfloat16)
    head = rl.build_value_head(32, 0)
    envs = [Rigged(solve_at) for solve_at in (1, 3)]
    rows = rl.conversations(evaluate.play(tiny, envs, range(2), 0.6, 4, generator()))
    found = rl.score(tiny, head, rows, 0.6)
    assert {x.dtype for x in found} == {torch.float32}


def test_games_in_batches_are_all_played(tiny, monkeypatch):
    """Catches episodes lost between two batches of the sampler, or dealt twice."""
    monkeypatch.setattr(gp_env, "GeneralPoints", Rigged)
    whole, parts = (rl.collect(tiny, settings(sample_batch=size, episodes=5, max_new_tokens=5), 0)
                    for size in (0, 2))
    assert [e.prompt for e in whole] == [e.prompt for e in parts]
    assert all(e.terminated != e.truncated for e in parts)


@pytest.mark.parametrize("script", ["rl.py", "sft.py", "evaluate.py"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_names_the_flags_to_turn(monkeypatch, capsys, script, error):
    """Catches a page of traceback where one flag would help."""
    def full():
        raise error

    monkeypatch.setattr("sys.argv", [script])
    assert_one_line(sft.guarded(full), capsys.readouterr().err, script, "memory", "--micro-batch",
                    "--sample-batch", "--grad-checkpoint",
                    "again" if script == "evaluate.py" else "--resume")


# ------------------------------------------------------------------------------------------------
# On a GPU
# ------------------------------------------------------------------------------------------------


@NEEDS_GPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["mllama", *test_pictures.CLASSES])
def test_sampler_and_update_agree_on_a_gpu(kind, dtype, tmp_path, request):
    """Catches tensors left on the CPU, and a mixture of types that only a GPU's kernels refuse."""
    sft.save_checkpoint(tmp_path, request.getfixturevalue("seeing") if kind == "mllama"
                        else build(kind))
    backbone = sft.load_backbone(tmp_path, "cuda", dtype=dtype)
    envs = [Rigged(solve_at, picture=SIZE) for solve_at in (1, 3, 6)]
    episodes = evaluate.play(backbone, envs, range(3), 0.6, 5,
                             torch.Generator("cuda").manual_seed(0))
    assert evaluate.Reader.recorded_on, "the reading of one token was not recorded"
    sampled, scored = sampled_and_scored(backbone, episodes, 2)
    assert (sampled - scored).abs().max() < 0.5
    rows, head = rl.conversations(episodes), rl.build_value_head(32, 0).to("cuda")
    rl.score_all(backbone, head, rows, 0.6, 2)
    rl.add_advantages(rows, episodes, 0.9, 0.95)
    optimizer = sft.adamw([{"params": list(backbone.model.parameters()), "lr": 1e-5},
                           {"params": list(head.parameters()), "lr": 1e-5}], (0.9, 0.999))
    args = settings(minibatch=2, micro_batch=1)
    rl.ppo_update(backbone, head, optimizer, rows, args, 0)
