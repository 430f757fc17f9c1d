"""Tests of backbones/build.py: tokenizer, lessons, eyes, and that nothing shipped is replaced.

    python -m pytest tests/test_build.py
"""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import gp_env
import sft
from backbones import build, gp_corpus, virl_corpus
from test_sft import assert_one_line, command, same

SIZE = gp_env.PICTURE_SIZE

# ------------------------------------------------------------------------------------------------
# 1. Tokenizer
# ------------------------------------------------------------------------------------------------


def test_tokenizer_reads_back_what_was_written(tiny):
    """Catches phrases that swallow a space, and bytes that no token covers."""
    rng = np.random.default_rng(0)
    texts = [turn["content"] for conversation in gp_corpus.backbone_conversations(rng, 200)
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


@pytest.mark.parametrize("name", build.CORPORA)
def test_shipped_tokenizers_are_those_of_the_recipe(name):
    """Catches a phrase that was changed after the weights were made: its token is unknown there."""
    shipped = sft.load_backbone(build.HERE / name).tokenizer
    made = build.build_tokenizer(build.CORPORA[name].phrases())
    assert made.get_vocab() == shipped.get_vocab()
    assert made.chat_template == shipped.chat_template


# ------------------------------------------------------------------------------------------------
# 2. Batches and the learning rate
# ------------------------------------------------------------------------------------------------


def test_blocks_give_each_conversation_once_and_depend_on_the_step_alone():
    """Catches batches that a resumed build would not see again, and rows dropped by the sorting."""
    def corpus(rng, count):
        return [[int(rng.integers(1000))] * int(rng.integers(1, 4)) for _ in range(count)]

    draw, again = (build.in_blocks(corpus, [7, 1], 5) for _ in range(2))
    batches = [draw(step) for step in range(32)]
    assert all(len(batch) == 5 for batch in batches)
    assert [again(step) for step in (20, 3, 31, 4)] == [batches[step] for step in (20, 3, 31, 4)]
    for block in (0, 1):
        drawn = corpus(np.random.default_rng([7, 1, block]), 80)
        assert sorted(sum(batches[16 * block:16 * block + 16], [])) == sorted(drawn)
    # like beside like: few batches hold conversations of different length
    assert sum(len(set(map(len, batch))) > 1 for batch in batches) <= 4


def test_first_lesson_is_to_repeat():
    """Catches a lesson whose answer is not in its question, or that never meets some pieces."""
    pieces = [*virl_corpus.phrases(), *"0aZ"]
    made = build.repeating(pieces)(np.random.default_rng(0), 600)
    said = "".join(question["content"] for question, _ in made)
    assert len(made) == 600 and all(piece in said for piece in pieces)
    for question, answer in made:
        assert question["content"] == answer["content"] and len(question["content"]) >= 6
        assert (question["learn"], answer["learn"]) == (False, True)


def test_lessons_follow_each_other(monkeypatch):
    """Catches a lesson that is skipped, never ends, or does not begin with its first batch."""
    for name in ("recall_conversations", "backbone_conversations"):
        made = getattr(virl_corpus, name)
        monkeypatch.setattr(virl_corpus, name,
                            lambda rng, count, made=made: made(rng, count, cities=1))
    draw, drawn = build.lessons_of(virl_corpus, 0, repeat=4, recall=3, steps=12, batch=2), []
    for step in range(12):
        ask, answer = (draw(step)[0][i]["content"] for i in (0, -1))
        other = "recall" if ask.startswith("1. ") else "corpus"
        drawn.append("repeat" if ask == answer else other)
    assert drawn == ["repeat"] * 4 + ["recall"] * 3 + ["corpus"] * 5


def test_cooldown_by_hand():
    """Catches a jump where the cooldown begins, and a rate that is not 0 at the end."""
    rates = [build.cooldown_rate(step, 20, 2.0, warmup=2) for step in range(21)]
    slow = [1 + math.cos(math.pi * (step - 2) / 30) for step in range(21)]     # 1.6 * 20 - 2 = 30
    assert rates[:2] == [1.0, 2.0]
    assert rates[2:13] == pytest.approx(slow[2:13])
    assert rates[13:] == pytest.approx([slow[20 - left] * left / 8 for left in range(7, -1, -1)])
    for steps in (1, 2, 3):                     # too short for a cooldown
        assert all(0 < build.cooldown_rate(step, steps, 2.0, 1) <= 2 for step in range(steps))


# ------------------------------------------------------------------------------------------------
# 3. The text backbone
# ------------------------------------------------------------------------------------------------


def test_backbone_is_built_from_its_seed(monkeypatch, tmp_path):
    """Catches a recipe that is not deterministic, and an optimiser's state that is shipped."""
    corpus = virl_corpus.backbone_conversations
    monkeypatch.setattr(virl_corpus, "backbone_conversations",
                        lambda rng, count: corpus(rng, count, cities=1))
    folders = [build.build_backbone("virl", tmp_path / name, seed, 2, batch=2)
               for name, seed in (("one", 0), ("two", 0), ("three", 1))]
    first, second, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == second != other
    assert folders[0] == tmp_path / "one" / "backbone"
    assert not (folders[0] / "state.pt").exists()
    made = sft.load_backbone(folders[0])
    assert len(made.tokenizer(" o'clock")["input_ids"]) > 0 and made.processor is None


def files_of(folder):
    """{path below the folder: bytes} of all files."""
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def test_only_install_replaces_the_shipped_backbone(monkeypatch, capsys, tmp_path):
    """Catches a trial of two steps that costs the weights of an hour."""
    for name in ("gp", "virl"):
        shutil.copytree(build.HERE / name, tmp_path / "backbones" / name)
    monkeypatch.setattr(build, "HERE", tmp_path / "backbones")
    monkeypatch.setitem(build.BUILDS, "gp", {"steps": 2, "repeat": 0, "recall": 0, "batch": 2})
    before = files_of(tmp_path / "backbones")
    flags = ["gp", "--steps", 2, "--out", tmp_path / "run"]
    code, error = command(monkeypatch, capsys, build, *flags)
    assert code == 0, error
    assert files_of(tmp_path / "backbones") == before
    assert_one_line(*command(monkeypatch, capsys, build, *flags), "--resume")
    code, error = command(monkeypatch, capsys, build, *flags, "--resume", "--install")
    assert code == 0, error
    after = files_of(tmp_path / "backbones")
    changed = {path.parts[0] for path in after if after[path] != before.get(path)}
    assert changed == {"gp"}
    made = sft.load_backbone(tmp_path / "run" / "backbone").model.state_dict()
    assert same(sft.load_backbone(tmp_path / "backbones" / "gp").model.state_dict(), made)


@pytest.mark.parametrize("flags, words", [
    (["gp", "--steps", "0"], ["--steps"]),
    (["gp-eyes", "--seed", "-1"], ["--seed"]),
    (["virl", "--threads", "-1"], ["--threads"]),
])
def test_bad_flags_end_in_one_line(monkeypatch, capsys, tmp_path, flags, words):
    """Catches an hour of work from numbers that cannot be meant."""
    monkeypatch.chdir(tmp_path)
    assert_one_line(*command(monkeypatch, capsys, build, *flags), *words)
    assert not any(tmp_path.iterdir())


def test_the_shipped_backbone_follows_written_steps():
    """Catches weights that were shipped before they could copy a step's words from the prompt."""
    shipped = sft.load_backbone(build.HERE / "virl")
    rows = []
    for talk in virl_corpus.backbone_conversations(np.random.default_rng(99), 24, cities=2):
        talk[0]["learn"] = False
        rows.append(sft.encode(shipped, talk))
    # 0.02 where the skill is there; 0.4 where names and directions are guessed
    assert sft.sft_loss(shipped, rows, 16, backward=False)[0] < 0.06


# ------------------------------------------------------------------------------------------------
# 4. The eyes
# ------------------------------------------------------------------------------------------------


def log_p(backbone, rows):
    """log p of the learnt tokens of some rows of text."""
    ids = sft.pad([row["ids"] for row in rows])
    mask = sft.pad([row["mask"] for row in rows])
    with torch.no_grad():
        return sft.token_logprobs(backbone, sft.trunk(backbone, ids), ids, mask)[0]


def test_learning_to_see_changes_no_text(monkeypatch, tmp_path):
    """Catches text weights that move while the eyes learn: every result in text would be void."""
    monkeypatch.setattr(build, "read_right", lambda backbone, name, which: 0.0)
    before = sft.load_backbone(build.HERE / "gp")
    made = build.build_eyes("gp", tmp_path / "run", 1, 2, 2, lr=1e-2, batch=3)
    after = sft.load_backbone(made)
    own, first = sft.picture_parameters(after.model), before.model.state_dict()
    assert after.processor is not None and made == tmp_path / "run" / "backbone"
    for name, value in after.model.state_dict().items():
        assert torch.equal(value, first[name]) == (name not in own), name
    rng = np.random.default_rng(0)
    rows = [sft.encode(after, gp_env.expert_conversation(rng)) for _ in range(4)]
    assert torch.equal(log_p(before, rows), log_p(after, rows))
    # once more, killed before the second lesson: the same eyes, from the same seed
    shutil.copytree(tmp_path / "run" / "tower", tmp_path / "run2" / "tower")
    monkeypatch.setattr(build, "pretrain_tower", None)
    again = build.build_eyes("gp", tmp_path / "run2", 1, 2, 2, resume=True, lr=1e-2, batch=3)
    assert same(sft.load_backbone(again).model.state_dict(), after.model.state_dict())


@pytest.mark.parametrize("columns", [True, False])
def test_patches_go_to_the_quarter_they_lie_in(columns):
    """Catches patches that are asked for their neighbour's card or view: a tower of mush."""
    backbone = build.new_eyes(sft.load_backbone(build.HERE / "gp"), 0)
    shades = (0, 80, 160, 240)
    picture, (width, height) = Image.new("RGB", SIZE), SIZE
    for i, shade in enumerate(shades):
        at = (width // 4 * i, 0, width // 4 * (i + 1), height) if columns else (
            width // 2 * (i // 2), height // 2 * (i % 2), width // 2 * (i // 2 + 1),
            height // 2 * (i % 2 + 1))
        picture.paste((shade,) * 3, at)
    seen = backbone.processor.image_processor([[picture]], return_tensors="pt")["pixel_values"]
    tiles = seen[:, 0, :, 0]                                        # (1, 2, 64, 64), one channel
    size = backbone.model.config.vision_config.patch_size
    patches = tiles.unfold(2, size, size).unfold(3, size, size).reshape(1, 2, 64, size * size)
    quarters = build.by_quarter(patches, columns)
    assert quarters.shape == (1, 4, 32, size * size)
    for quarter, shade in zip(quarters[0], shades):
        assert torch.allclose(quarter, torch.tensor(shade / 127.5 - 1), atol=1e-5)


def test_tower_learns_by_itself_and_from_the_seed_alone():
    """Catches a first lesson that touches text weights or draws from the global generator."""
    reader = sft.load_backbone(build.HERE / "gp")
    made, lines = [], []
    for _ in range(2):
        backbone = build.new_eyes(reader, 0)
        before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
        torch.rand(3)
        state = torch.get_rng_state()
        build.pretrain_tower(backbone, "gp", seed=5, steps=3, batch=2, peak=1e-2,
                             report=lines.append)
        assert torch.equal(state, torch.get_rng_state())
        moved = {name for name, value in backbone.model.state_dict().items()
                 if not torch.equal(value, before[name])}
        assert moved and all("vision_model" in name for name in moved)
        made.append(backbone.model.state_dict())
    assert same(*made) and len(lines) == 2 and lines[0] == lines[1]


def test_only_what_sees_learns():
    """Catches parts that are frozen by mistake, or that no gradient of a picture reaches."""
    backbone = build.new_eyes(sft.load_backbone(build.HERE / "gp"), 0)
    rows = [sft.encode(backbone, turns) for turns in gp_corpus.pictured_conversations(
        np.random.default_rng(0), 2, SIZE)]
    sft.sft_loss(backbone, rows, 2)
    own = sft.picture_parameters(backbone.model)
    reached = {name for name, p in backbone.model.named_parameters()
               if p.grad is not None and p.grad.abs().max() > 0}
    late = "model.vision_model.gated_positional_embedding.tile_embedding.weight"
    assert own - reached == {late} and reached < own        # its gate has to open first


@pytest.mark.parametrize("shift, share", [(1, 1.0), (0, 0.0)])
def test_reading_asks_for_the_next_token(seeing, monkeypatch, shift, share):
    """Catches a measure that is one token off: it would call a blind model a reader."""
    size = seeing.model.get_output_embeddings().weight.shape[0] + 8

    def prophet(backbone, ids, pictures):
        return torch.nn.functional.one_hot(ids.roll(-shift, dims=1), size).float()

    monkeypatch.setattr(build, "trunk", prophet)
    monkeypatch.setattr(seeing.model, "get_output_embeddings", torch.nn.Identity)
    assert build.read_right(seeing, "gp", "red", 8) == share


def test_the_shipped_backbone_reads_cards():
    """Catches weights that were shipped without their eyes: GP-VL would be played on noise."""
    shipped = sft.load_backbone(build.HERE / "gp")
    assert shipped.processor is not None
    # 50 hands, 200 cards: three standard deviations of the rates asked for, 97 % and 90 %
    for suits, least in (("black", 0.97), ("red", 0.90)):
        rate = build.read_right(shipped, "gp", suits, 50)
        assert rate > least - 3 * (least * (1 - least) / 200) ** 0.5, f"{suits}: {rate:.1%}"


def test_the_shipped_backbone_reads_street_views():
    """Catches weights that were shipped without their eyes: virl-vl would be walked blind."""
    shipped = sft.load_backbone(build.HERE / "virl")
    assert shipped.processor is not None
    # 24 pictures, over 100 words, three standard deviations below 95 %; "no place" everywhere makes
    # 70
    assert build.read_right(shipped, "virl", sft.TRAINING_CITY, 24) > 0.885
