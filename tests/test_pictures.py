"""Tests of the path of a picture: processor, tokens, trunk, sampler, update, for several classes.

The heart of it: whatever shares a batch, a conversation must be read the same: by the sampler in
pieces and by the update at once, alone or beside rows that show other pictures, or a new one.

    python -m pytest tests/test_pictures.py
"""

import contextlib
import copy
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evaluate
import gp_env
import rl
import sft
from backbones import build as make, gp_corpus
from test_evaluate import Rigged
from test_sft import (assert_one_line, command, copy_at, gradients, relative_gap, rows_of, same,
                      talk, text_model)

SIZE = (128, 64)

# ------------------------------------------------------------------------------------------------
# Vision-language models of other classes, tiny, with random weights
# ------------------------------------------------------------------------------------------------

EYES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            image_size=64, patch_size=16)
TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, initializer_range=0.2)


def idefics3(tokenizer):
    """Idefics3 (SmolVLM before it had a name): placeholders, and a mask of pixels."""
    from transformers import (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor,
                              LlamaConfig)
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil)
    image, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<|pad|>"))
    model = Idefics3ForConditionalGeneration(Idefics3Config(
        text_config=LlamaConfig(vocab_size=len(tokenizer), pad_token_id=pad, **TEXT),
        vision_config=EYES, image_token_id=image, pad_token_id=pad, scale_factor=2))
    images = Idefics3ImageProcessorPil(do_image_splitting=False, size={"longest_edge": 64},
                                       max_image_size={"longest_edge": 64})
    return model, Idefics3Processor(images, tokenizer, image_seq_len=4,
                                    chat_template=tokenizer.chat_template)


def smolvlm(tokenizer):
    """SmolVLM: Idefics3 under its own name."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    made, processor = idefics3(tokenizer)
    values = {key: value for key, value in made.config.to_dict().items() if key != "model_type"}
    values["vision_config"].pop("model_type")
    model = SmolVLMForConditionalGeneration(SmolVLMConfig(**values))
    return model, processor


def qwen2_5_vl(tokenizer):
    """Qwen2.5-VL: positions in three dimensions, and all patches of a batch in one matrix."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=TEXT | dict(vocab_size=len(tokenizer), rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}),
        vision_config=dict(hidden_size=32, out_hidden_size=32, depth=2, num_heads=2,
                           intermediate_size=64, patch_size=8, spatial_merge_size=2,
                           window_size=32, fullatt_block_indexes=[1]),
        image_token_id=image, video_token_id=image + 3, vision_start_token_id=image + 1,
        vision_end_token_id=image + 2))
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=64 * 64)
    return model, SimpleNamespace(image_processor=images, chat_template=tokenizer.chat_template,
                                  save_pretrained=images.save_pretrained)


CLASSES = {"idefics3": idefics3, "smolvlm": smolvlm, "qwen2_5_vl": qwen2_5_vl}


def build(kind):
    """A Backbone of this class, for a test to change."""
    return copy.deepcopy(built(kind))


@functools.cache
def built(kind):
    """The Backbone that `build` copies."""
    tokenizer = make.build_tokenizer(gp_corpus.phrases())
    tokenizer.add_special_tokens({"additional_special_tokens": [
        "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|image|>", "<image>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = CLASSES[kind](tokenizer)
    return sft.wrap_backbone(model.eval(), tokenizer, kind, processor)


@pytest.fixture(params=["mllama", *CLASSES])
def any_class(request):
    """A Backbone that sees, of each class in turn."""
    torch.set_num_threads(1)
    if request.param == "mllama":
        return request.getfixturevalue("seeing")
    return build(request.param)


# ------------------------------------------------------------------------------------------------
# Helpers
# ------------------------------------------------------------------------------------------------


class Wandering(Rigged):
    """A rigged game that shows a new hand after every second try, as walks show a new view: after
    each turn some rows of a batch open a conversation with a new picture, and some go on with
    theirs. late: which of the two comes first."""

    def __init__(self, solve_at, late):
        super().__init__(solve_at, picture=SIZE)
        self.late = late

    def step(self, text):
        observation, reward, terminated, truncated, info = super().step(text)
        if self.used % 2 == self.late and not (terminated or truncated):
            used = self.used
            observation, _ = self.reset([used, *self.hand.numbers])
            self.used = used
        return observation, reward, terminated, truncated, info


LENGTHS = (1, 3, 6, 2, 6, 4)        # tries of six rigged games; 6: never solved
GAMES = {
    "messages": lambda: [Rigged(n, picture=SIZE) for n in LENGTHS],
    "forgetting": lambda: [Rigged(n, True, picture=SIZE) for n in LENGTHS],
    "fresh": lambda: [Rigged(n, picture=SIZE, fresh=True) for n in LENGTHS],
    "some rows see a new picture": lambda: [Wandering(n, i % 2) for i, n in enumerate(LENGTHS)],
    "words": lambda: [Rigged(n) for n in LENGTHS],
}


def play(backbone, games="messages", temperature=0.6):
    """Six rigged games of different length."""
    envs = GAMES[games]()
    return evaluate.play(backbone, envs, range(len(envs)), temperature, 5,
                         torch.Generator().manual_seed(3))


def pictured(count=5):
    """Conversations to learn from, each with a picture."""
    rng = np.random.default_rng(0)
    return [gp_env.expert_conversation(rng, picture=SIZE) for _ in range(count)]


@torch.no_grad()
def log_p(backbone, rows):
    """log p of the answer tokens of encoded rows, all in one batch."""
    ids, mask, pictures = sft.batch(backbone, rows)
    return sft.token_logprobs(backbone, sft.trunk(backbone, ids, pictures), ids, mask)[0]


def sampled_and_scored(backbone, episodes, micro_batch):
    """log p of every sampled token: as the sampler saw it, and as the update does."""
    rows = rl.conversations(episodes)
    head = rl.build_value_head(backbone.model.config.get_text_config().hidden_size, 0)
    rl.score_all(backbone, head.to(backbone.device), rows, 0.6, micro_batch)
    scored = torch.cat([r["logprobs"] for r in sorted(rows, key=lambda r: r["tries"])]).cpu()
    return torch.tensor([p for e in episodes for t in e.turns for p in t.logprobs]), scored


# ------------------------------------------------------------------------------------------------
# One picture, one batch
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("games", GAMES)
def test_sampler_and_update_agree(any_class, games):
    """Catches pictures given to the wrong row, at the wrong read, or lost with the cache."""
    any_class.end_ids += range(60, 120)         # many ways to end: answers of unequal length
    episodes = play(any_class, games)
    assert len({len(t.answer_ids) for e in episodes for t in e.turns}) > 2
    shown = [sum(t.picture is not None for t in e.turns) for e in episodes]
    assert shown == {"messages": [1] * 6, "words": [0] * 6, "forgetting": [1, 3, 5, 2, 5, 4],
                     "fresh": [1, 3, 5, 2, 5, 4],
                     "some rows see a new picture": [1, 2, 3, 2, 3, 3]}[games]
    for micro_batch in (1, 4):                          # alone, and batched
        sampled, scored = sampled_and_scored(any_class, episodes, micro_batch)
        assert (sampled - scored).abs().max() < 1e-4


class Watched(TorchDispatchMode):
    """Collects the tensors that operations take and no operation has made: weights, or what Python
    brings along, such as the list in x[:, [1, 2]]. Refuses those of another device than meta."""

    def __init__(self):
        super().__init__()
        self.made, self.brought = [], []            # kept, so that no id is given away again

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        known = set(map(id, self.made))
        result = operation(*args, **(kwargs or {}))
        taken, given = ([x for x in tree_leaves(part) if isinstance(x, torch.Tensor)]
                        for part in ((args, kwargs), result))
        assert all(x.device.type == "meta" for x in taken + given), operation
        self.made += given
        self.brought += [x for x in taken if id(x) not in known]
        return result


def step_on_meta(backbone, ids, picture, monkeypatch):
    """Read a turn in two rows, then do the step of one token twice on the device "meta".

    Tensors have a shape and no contents there: whoever looks at a value fails, as he does where a
    CUDA graph is recorded. And what no operation has made must be the same tensor each time.
    """
    reader = evaluate.Reader(backbone, 2)
    one, counts = torch.tensor([[5], [6]]), torch.ones(2, dtype=torch.long)
    with torch.no_grad():
        reader.read(torch.tensor([ids, ids]), len(ids) * counts, [picture, picture])
        logits = reader.read(one, counts)
        assert logits.isfinite().any()
        # All that lies on a GPU there, on another device here. Pictures stay on the CPU, as
        # encode_picture makes them.
        monkeypatch.setattr(evaluate, "precision", lambda backbone: contextlib.nullcontext())
        reader.backbone = copy.deepcopy(backbone)
        reader.backbone.model.to("meta")
        for owner in (reader, *reader.layers):
            for name, value in vars(owner).items():
                if isinstance(value, torch.Tensor):
                    setattr(owner, name, value.to("meta"))
        one, counts = one.to("meta"), counts.to("meta")
        with Watched() as once:
            assert reader.step(one, counts, {}).shape == logits.shape
        with Watched() as again:
            reader.step(one, counts, {})
        assert set(map(id, again.brought)) <= set(map(id, once.brought))    # the same weights


@pytest.mark.parametrize("in_words", [False, True])
def test_a_recorded_step_never_asks_the_cpu(any_class, in_words, monkeypatch):
    """Catches what a CUDA graph forbids, on a machine without one: a number read back, a tensor
    made."""
    image = gp_env.GeneralPoints(picture=SIZE).reset(0)[0]["image"]
    ids, picture = sft.encode_picture(any_class, "Which cards?", image)
    if in_words:
        ids, picture = sft.user_ids(any_class, "Which cards?", first=True), None
    step_on_meta(any_class, ids, picture, monkeypatch)


def test_blindfolded_nothing_is_told_apart(seeing):
    """Catches a blindfold that leaves a picture as it is."""
    said = {}
    for blindfold in (False, True):
        envs = [Rigged(6, True, picture=SIZE), Rigged(6, True, picture=SIZE)]
        said[blindfold] = evaluate.play(seeing, envs, [0, 1], 0, 5, blindfold=blindfold)
    shown, seen = ([[t.picture["pixel_values"] for t in e.turns] for e in said[blindfold]]
                   for blindfold in (True, False))
    assert all(torch.equal(x, shown[0][0]) for row in shown for x in row)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_picture_is_seen_by_its_row_alone(any_class):
    """Catches a picture without effect, and one that a neighbour in the batch sees as well."""
    rows = [sft.encode(any_class, conversation) for conversation in pictured()]
    counts = [sum(row["mask"]) for row in rows]
    before = log_p(any_class, rows).split(counts)
    other = sft.encode(any_class, pictured(7)[6])["picture"]
    assert any_class.processor is not None and rows[2]["picture"] is not None
    rows[2] = rows[2] | {"picture": other}
    after = log_p(any_class, rows).split(counts)
    for i, (one, two) in enumerate(zip(before, after)):
        gap = (one - two).abs().max()
        assert gap > 1e-2 if i == 2 else gap < 1e-5, (i, gap)


def test_words_and_pictures_do_not_share_a_batch(any_class):
    """Catches a batch of text that is given pictures, and a mixed one read wrong without a word."""
    words = sft.encode(any_class, talk(("user", "Go", False), ("assistant", "abc", True)))
    assert words["picture"] is None and sft.batch(any_class, [words])[2] is None
    with pytest.raises(AssertionError):
        sft.batch(any_class, [words, sft.encode(any_class, pictured(1)[0])])


def test_mllama_is_called_as_its_own_processor_would(seeing):
    """Catches a cross-attention mask or a mark at another place than transformers has them."""
    seeing.processor.bos_token = "<|user|>"             # it insists on one; this is in the text
    image = gp_env.GeneralPoints(picture=SIZE).reset(0)[0]["image"]
    ids, picture = sft.encode_picture(seeing, "Which cards?", image)
    batch = seeing.processor(text="<|user|><|image|>Which cards?<|end|><|assistant|>",
                             images=[[image]], return_tensors="pt", add_special_tokens=False)
    assert batch["input_ids"].tolist() == [ids]
    with torch.no_grad():
        theirs = seeing.model.base_model(**batch).last_hidden_state
        ours = sft.trunk(seeing, batch["input_ids"], [picture])
    assert (theirs - ours).abs().max() < 1e-5


def test_gradient_reaches_the_eyes_and_ignores_the_micro_batch(any_class):
    """Catches eyes that cannot learn, and pictures mixed up when rows are sorted by length."""
    rows = [sft.encode(any_class, conversation) for conversation in pictured()]
    found = []
    for micro_batch in (5, 2):
        loss, _ = sft.sft_loss(any_class, rows, micro_batch)
        eyes = [p.grad for name, p in any_class.model.named_parameters()
                if "vision" in name or "visual" in name]
        assert sum(g is not None and bool(g.abs().max() > 0) for g in eyes) > len(eyes) // 2
        found.append((loss, gradients(any_class)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert relative_gap(found[1][1], found[0][1]) < 1e-4


def test_gradient_checkpointing_changes_no_picture(any_class, tmp_path):
    """Catches eyes that are run twice with different results, or without their gradient."""
    sft.save_checkpoint(tmp_path / "model", any_class)
    found = []
    for wanted in (False, True):
        backbone = sft.load_backbone(tmp_path / "model", grad_checkpoint=wanted)
        sft.sft_loss(backbone, [sft.encode(backbone, talk) for talk in pictured(3)], 3)
        found.append(gradients(backbone))
    assert torch.equal(*found)


def test_mask_of_a_pictured_conversation_is_the_answer(any_class):
    """Catches placeholders of the picture that are learnt, and a mask shifted by them."""
    conversation = pictured(1)[0]
    row = sft.encode(any_class, conversation)
    ids, mask, picture = row["ids"], row["mask"], row["picture"]
    learnt = [token for token, wanted in zip(ids, mask) if wanted]
    assert any_class.tokenizer.decode(learnt[:-1]) == conversation[1]["content"]
    assert learnt[-1] == any_class.end_ids[0] and len(ids) == len(mask)
    plain = any_class.tokenizer.decode(ids)
    assert plain.count("<|user|>") == plain.count("<|assistant|>") == 1
    assert gp_env.IN_PICTURE in plain and picture["pixel_values"].dtype == torch.float32


# ------------------------------------------------------------------------------------------------
# Checkpoints, and what cannot be seen
# ------------------------------------------------------------------------------------------------


def test_saved_and_loaded_model_still_sees(any_class, tmp_path):
    """Catches a processor that is not saved: the run's checkpoints would be blind."""
    sft.save_checkpoint(tmp_path / "model", any_class)
    loaded = sft.load_backbone(tmp_path / "model")
    assert loaded.processor is not None and loaded.before_picture == any_class.before_picture
    conversation = pictured(1)[0]
    one, two = (sft.encode(backbone, conversation) for backbone in (any_class, loaded))
    assert same(one, two)
    assert torch.equal(log_p(any_class, [one]), log_p(loaded, [two]))


@pytest.mark.parametrize("template", [
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}",
    "{{ raise_exception('no pictures, please') }}",
    "<|user|>{{ messages[0]['content'][1]['text'] }}<|end|>Look!<|assistant|>"])
def test_a_template_that_takes_no_picture_is_fit_for_words(tiny, template):
    """Catches a text task that fails for a picture nobody shows, and a turn of half its markup."""
    processor = make.build_processor(tiny.model, tiny.tokenizer)
    processor.chat_template = template
    backbone = sft.wrap_backbone(tiny.model, tiny.tokenizer, processor=processor)
    assert backbone.processor is None and "chat template" in backbone.blind


def test_a_second_picture_is_refused(seeing):
    """Catches a picture in a later turn, which would be dropped without a word."""
    turns = pictured(1)[0]
    with pytest.raises(AssertionError, match="first turn"):
        sft.encode(seeing, talk(("user", "Go", False)) + turns)


@pytest.mark.parametrize("what, parts", [
    (None, ()), ("none", ()), ("vision", ("vision_", "visual.blocks", "visual.patch_embed")),
    ("adapter", ("vision_", "visual.", "multi_modal_projector", "connector"))])
def test_frozen_parts_get_no_gradient(any_class, what, parts):
    """Catches an ablation that freezes nothing, or more than it says."""
    sft.freeze(any_class.model, what)
    sft.sft_loss(any_class, [sft.encode(any_class, turns) for turns in pictured(3)], 3)
    named = dict(any_class.model.named_parameters())
    frozen = {name for name in named if any(part in name for part in parts)}
    assert {name for name, p in named.items() if not p.requires_grad} == frozen
    assert bool(frozen) == bool(parts) and all(named[name].grad is None for name in frozen)
    assert sum(p.grad is not None for p in named.values()) > 10


# ------------------------------------------------------------------------------------------------
# The task gp-vl
# ------------------------------------------------------------------------------------------------


def blind_model(case, backbone, folder):
    """Save a model that is not fit for a -vl task."""
    if case == "text-only":
        text_model("llama", backbone.tokenizer).save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)
        return
    sft.save_checkpoint(folder, backbone)
    path = folder / "processor_config.json"
    if case == "never trained":
        path.unlink()
    elif case == "bare tokenizer":
        path.write_text(path.read_text().replace("MllamaProcessor", "HomeMadeProcessor"))
    elif case == "damaged":
        path.write_text(path.read_text()[:100])


BLIND = {"text-only": "text-only", "never trained": "never trained", "damaged": "processor",
         "bare tokenizer": "processor"}


@pytest.mark.parametrize("case", BLIND)
def test_models_that_cannot_see_are_refused(seeing, tmp_path, monkeypatch, capsys, case):
    """Catches a -vl task played blind: a processor that came back as less, or none at all."""
    blind_model(case, seeing, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for script in (sft, evaluate, rl):
        flags = ["--task", "gp-vl", "--model", "model"]
        assert_one_line(*command(monkeypatch, capsys, script, *flags),
                        f"{script.__name__}.py: ", "gp-vl", "cannot see", BLIND[case])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # words are another matter
    words = talk(("user", "Go", False), ("assistant", "abc", True))
    assert len(log_p(sft.load_backbone(tmp_path / "model"), [sft.encode(seeing, words)])) == 4


@pytest.mark.parametrize("size", [(64, 64), (99999, 64), (0, 0)])
def test_bad_picture_sizes_end_in_one_line(monkeypatch, capsys, size):
    """Catches a size that no picture can have, found after minutes of training."""
    for script in (sft, evaluate, rl):
        assert_one_line(*command(monkeypatch, capsys, script, "--picture-size", *size),
                        "--picture-size", "128 64")


def test_cells_of_pictures_are_what_they_say():
    """Catches a visual shift that is none, or that moves the rule as well."""
    ink = {"id": "black", "ood": "black", "visual": "red", "both": "red"}
    assert set(ink) == set(evaluate.TASK_CELLS["gp-vl"])
    for cell, colour in ink.items():
        env = gp_env.GeneralPoints(split="test", picture=SIZE, **evaluate.TASK_CELLS["gp-vl"][cell])
        hands = [env.reset(i)[1]["hand"] for i in range(12)]
        assert {suit for hand in hands for suit in hand.suits} == set(gp_env.SUITS[colour])
        rule = "face" if cell in ("ood", "both") else "ten"
        assert {hand.rule for hand in hands} == {gp_env.RULES[rule]}


FLAGS = ["--task", "gp-vl", "--model", "model", "--ood", "--picture-size", 130, 70]


@pytest.fixture
def at_work(seeing, tmp_path, monkeypatch):
    """A folder to work in, with a model that sees in "model"."""
    sft.save_checkpoint(tmp_path / "model", seeing)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gp_env, "GeneralPoints", Rigged)
    return tmp_path


def test_sft_and_evaluation_of_pictures_run(at_work, monkeypatch, capsys):
    """Catches a task that is a choice of --task and wired nowhere."""
    asked, loss = [], sft.sft_loss
    monkeypatch.setattr(gp_env, "draw_hand", lambda hand, seed, size: asked.append((
        hand.suits, size)) or Image.new("RGB", size))
    monkeypatch.setattr(sft, "sft_loss", lambda backbone, rows, *more, **how: loss(
        backbone, rows[:4], *more, **how))
    code, error = command(monkeypatch, capsys, sft, *FLAGS, "--steps", 2, "--batch", 3,
                          "--out", "run")
    assert code == 0, error
    assert {size for _, size in asked} == {(130, 70)}
    black = set(gp_env.SUITS["black"])
    assert all(set(suits) <= black for suits, _ in asked[-6:]), "training saw red"
    row = rows_of(at_work / "run" / "metrics.jsonl")[-1]
    assert {"id_nll", "ood_nll"} <= set(row)
    code, error = command(monkeypatch, capsys, evaluate, *FLAGS[:2], "--model",
                          "run/step-000002", "--ood", "--splits", "test", "--hands", 3, "--show",
                          2, "--out", "found.json", "--max-new-tokens", 4)
    assert code == 0, error
    found = json.loads((at_work / "found.json").read_text())
    assert list(found) == [f"held-out/{cell}" for cell in ("id", "ood", "visual", "both")]
    assert all("cards_read" in m for m in found.values())


def test_dropped_pictures_are_dropped_in_training_alone(at_work, monkeypatch, capsys):
    """Catches a blind arm that sees, or that is measured blind; and a flag that does nothing."""
    shown, loss = {True: [], False: []}, sft.sft_loss

    def watched(backbone, rows, micro_batch, backward=True):
        shown[backward] += [row["picture"] is not None for row in rows]
        return loss(backbone, rows[:2], micro_batch, backward)

    monkeypatch.setattr(sft, "sft_loss", watched)
    flags = ["--steps", 2, "--batch", 3, "--drop-pictures"]
    code, error = command(monkeypatch, capsys, sft, *FLAGS, *flags, "--out", "blind")
    assert code == 0, error
    assert len(shown[True]) == 6 and not any(shown[True]) and all(shown[False])
    code, error = command(monkeypatch, capsys, sft, "--model", "model", *flags, "--out", "text")
    assert_one_line(code, error, "--drop-pictures", "gp-l")


def test_rl_of_pictures_killed_and_resumed_is_the_same(at_work, monkeypatch, capsys):
    """Catches pictures that depend on what was drawn before, and a checkpoint that went blind."""
    flags = [*FLAGS, "--init", "model", "--updates", 2, "--episodes", 4, "--max-new-tokens", 2,
             "--minibatch", 2, "--eval-hands", 2]
    with monkeypatch.context() as patch:
        copy_at(patch, "whole", "killed", rl, "collect", 2)
        code, error = command(patch, capsys, rl, *flags, "--out", "whole")
    assert code == 0, error
    code, error = command(monkeypatch, capsys, rl, *flags, "--out", "killed", "--resume")
    assert code == 0, error
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert rows_of(at_work / "whole" / name) == rows_of(at_work / "killed" / name)
    cells = rows_of(at_work / "whole" / "eval.jsonl")[-1]["cells"]
    assert [name for name in cells if "held-out" in name] == [
        f"held-out/{cell}" for cell in ("id", "ood", "visual", "both")]
    assert sft.load_backbone(at_work / "killed" / "step-000002").processor is not None
