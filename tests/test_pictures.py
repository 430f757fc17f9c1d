"""Tests of the path of a picture: processor, tokens, trunk, sampler, update, for several classes.

The heart of it: whatever shares a batch, a conversation must be read the same: by the sampler in
pieces and by the update at once, alone or beside rows with other pictures or none.

    python -m pytest tests/test_pictures.py
"""

import contextlib
import copy
import json
import shutil

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
from test_evaluate import Rigged
from test_sft import (Killed, assert_one_line, command, gradients, kill_at, relative_gap, rows_of,
                      same, talk, text_model)

SIZE = (128, 64)

# ------------------------------------------------------------------------------------------------
# Vision-language models of other classes, tiny, with random weights
# ------------------------------------------------------------------------------------------------

TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, initializer_range=0.2)
EYES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            image_size=64, patch_size=16)


def llava(tokenizer):
    """LLaVA with SigLIP eyes: 16 placeholders a picture."""
    from transformers import (LlamaConfig, LlavaConfig, LlavaForConditionalGeneration,
                              LlavaProcessor, SiglipVisionConfig)
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        vision_config=SiglipVisionConfig(**EYES), image_token_index=image,
        vision_feature_select_strategy="full", vision_feature_layer=-1))
    images = SiglipImageProcessorPil(size={"height": 64, "width": 64})
    return model, LlavaProcessor(images, tokenizer, patch_size=16, image_token="<image>",
                                 vision_feature_select_strategy="full",
                                 chat_template=tokenizer.chat_template)


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
    return model, sft.Pictures(images, tokenizer.chat_template)


CLASSES = {"llava": llava, "idefics3": idefics3, "smolvlm": smolvlm, "qwen2_5_vl": qwen2_5_vl}


def build(kind):
    """A Backbone of this class."""
    tokenizer = sft.build_tokenizer(gp_env.phrases())
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


def play(backbone, keep_cache=True, forget=False, temperature=0.6):
    """Six rigged games of different length, every third in words."""
    envs = [Rigged(solve_at, forget, picture=None if i % 3 == 1 else SIZE)
            for i, solve_at in enumerate((1, 3, 6, 2, 6, 4))]
    return evaluate.play(backbone, envs, range(len(envs)), temperature, 5,
                         torch.Generator().manual_seed(3), keep_cache)


def pictured(count=5):
    """Conversations to learn from, every second one in words."""
    rng = np.random.default_rng(0)
    return [gp_env.expert_conversation(rng, picture=SIZE if i % 2 == 0 else None)
            for i in range(count)]


@torch.no_grad()
def log_p(backbone, rows):
    """log p of the answer tokens of encoded rows, all in one batch."""
    ids, mask = (sft.pad([row[i] for row in rows]) for i in (0, 1))
    lengths = torch.tensor([len(row[0]) for row in rows])
    pictures = [row[2] if len(row) > 2 else None for row in rows]
    return sft.token_logprobs(backbone, sft.trunk(backbone, ids, lengths, pictures), ids, mask)[0]


# ------------------------------------------------------------------------------------------------
# One picture, one batch
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("keep_cache, recorded", [(True, False), (True, True), (False, False)])
def test_sampler_and_update_agree_with_pictures(any_class, keep_cache, recorded, forget,
                                                monkeypatch):
    """Catches pictures given to the wrong row, at the wrong read, or lost with the cache.

    recorded: single tokens are read by the step that a GPU would play back.
    """
    monkeypatch.setattr(evaluate.Reader, "recorded_on", ("cpu",) * recorded)
    episodes = play(any_class, keep_cache, forget)
    rows = rl.conversations(episodes)
    assert sum(row["picture"] is None for row in rows) == (8 if forget else 2)
    sampled = torch.tensor([p for e in episodes for turn in e.turns for p in turn.logprobs])
    hidden = any_class.model.config.get_text_config().hidden_size
    head = rl.build_value_head(hidden, 0)
    for micro_batch in (1, 3, 64):                      # alone, and batched in two ways
        rl.score_all(any_class, head, rows, 0.6, micro_batch)
        scored = torch.cat([r["logprobs"] for r in sorted(rows, key=lambda r: r["tries"])])
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


def test_a_recorded_step_never_asks_the_cpu(any_class, monkeypatch):
    """Catches what a CUDA graph forbids, where there is no GPU: a number read back, a tensor made.

    The step is repeated on the device "meta", where tensors have a shape and no contents: whoever
    looks at a value there fails. And what no operation has made must be the same tensor each time.
    """
    monkeypatch.setattr(evaluate.Reader, "recorded_on", ("cpu",))
    reader = evaluate.Reader(any_class, 2)
    image = gp_env.GeneralPoints(picture=SIZE).reset(0)[0]["image"]
    ids, picture = sft.encode_picture(any_class, "Which cards?", image)
    with torch.no_grad():
        reader.read(torch.tensor([ids, ids]), torch.ones(2, len(ids), dtype=torch.long),
                    [picture, picture])
        logits = reader.read(torch.tensor([[5], [6]]), torch.ones(2, 1, dtype=torch.long))
        recording, meta = reader.recording, torch.device("meta")
        monkeypatch.setattr(evaluate, "precision", lambda backbone: contextlib.nullcontext())
        assert recording and logits.isfinite().any()
        reader.backbone = copy.deepcopy(any_class)
        reader.backbone.model.to(meta)
        for owner, names in ((reader, ["banned"]),
                             (recording, ["ids", "inside", "mask", "slot", "shift"])):
            for name in names:
                setattr(owner, name, getattr(owner, name).to(meta))
        recording.extra = {key: value.to(meta) for key, value in recording.extra.items()}
        for layer in reader.cache.layers:
            if isinstance(layer, evaluate.RoomyLayer) and layer.room is not None:
                layer.room, layer.slot = [kept.to(meta) for kept in layer.room], recording.slot
            elif layer.is_initialized:
                layer.keys, layer.values = layer.keys.to(meta), layer.values.to(meta)
        with Watched() as once:
            assert recording.step().shape == logits.shape
        with Watched() as again:
            recording.step()
        assert set(map(id, again.brought)) <= set(map(id, once.brought))    # the same weights


def test_cache_changes_no_token(any_class):
    """Catches a picture that is seen at the first try only."""
    said = [[[turn.answer_ids for turn in e.turns] for e in play(any_class, keep_cache)]
            for keep_cache in (True, False)]
    assert said[0] == said[1]


def test_blindfolded_nothing_is_told_apart(seeing):
    """Catches a blindfold that leaves a picture, or a text, as it is not meant to."""
    said = {}
    for blindfold in (False, True):
        envs = [Rigged(6, True, picture=SIZE), Rigged(6, True, picture=SIZE), Rigged(2)]
        said[blindfold] = evaluate.play(seeing, envs, [0, 1, 2], 0, 5, blindfold=blindfold)
    shown = [[turn.picture["pixel_values"] for turn in e.turns] for e in said[True][:2]]
    assert all(torch.equal(x, shown[0][0]) for row in shown for x in row)
    seen = [[turn.picture["pixel_values"] for turn in e.turns] for e in said[False][:2]]
    assert not torch.equal(seen[0][0], seen[1][0])
    assert said[True][2].turns[0].picture is None
    assert said[True][2].turns[0].answer_ids == said[False][2].turns[0].answer_ids


def test_picture_is_seen_by_its_row_alone(any_class):
    """Catches a picture without effect, and one that a neighbour in the batch sees as well."""
    rows = [sft.encode(any_class, conversation) for conversation in pictured()]
    counts = [sum(row[1]) for row in rows]
    before = log_p(any_class, rows).split(counts)
    other = sft.encode(any_class, pictured(7)[6])[2]
    assert any_class.processor is not None and len(rows[2]) == 3
    rows[2] = (*rows[2][:2], other)
    after = log_p(any_class, rows).split(counts)
    for i, (one, two) in enumerate(zip(before, after)):
        gap = (one - two).abs().max()
        assert gap > 1e-2 if i == 2 else gap < 1e-5, (i, gap)


def test_text_is_read_as_if_there_were_no_eyes(any_class):
    """Catches rows of text that attend to the pictures of others (as transformers lets them)."""
    rows = [sft.encode(any_class, conversation) for conversation in pictured()]
    words = [row for row in rows if len(row) == 2]
    together = log_p(any_class, rows).split([sum(row[1]) for row in rows])
    alone = log_p(any_class, words)
    assert (torch.cat(together[1::2]) - alone).abs().max() < 1e-5
    # and a batch of text alone asks the model for nothing that it was not asked for before
    assert sft.picture_inputs(any_class, sft.pad([words[0][0]]), [None]) == {}


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
        ours = sft.trunk(seeing, batch["input_ids"], torch.tensor([len(ids)]), [picture])
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
    ids, mask, picture = sft.encode(any_class, conversation)
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
    assert loaded.why_blind == "" and loaded.before_picture == any_class.before_picture
    conversation = pictured(1)[0]
    one, two = (sft.encode(backbone, conversation) for backbone in (any_class, loaded))
    assert one[:2] == two[:2] and same(one[2], two[2])
    assert torch.equal(log_p(any_class, [one]), log_p(loaded, [two]))


def test_a_picture_of_the_wrong_shape_is_refused(seeing, tiny):
    """Catches a grey or thread-thin picture that fails deep inside, and a model without eyes."""
    for picture in (Image.new("L", SIZE), Image.new("RGB", (400, 20)), Image.new("RGB", (8, 8)),
                    np.zeros((64, 128, 3))):
        with pytest.raises(sft.Problem, match="RGB"):
            sft.encode_picture(seeing, "Look", picture)
    with pytest.raises(sft.Problem, match="cannot see"):
        sft.encode_picture(tiny, "Look", Image.new("RGB", SIZE))


@pytest.mark.parametrize("template", [
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}",
    "{{ raise_exception('no pictures, please') }}",
    "<|user|>{{ messages[0]['content'][1]['text'] }}<|end|>Look!<|assistant|>"])
def test_a_template_that_takes_no_picture_is_fit_for_words(tiny, template):
    """Catches a text task that fails for a picture nobody shows, and a turn of half its markup."""
    processor = sft.build_processor(tiny.model, tiny.tokenizer)
    processor.chat_template = template
    backbone = sft.wrap_backbone(tiny.model, tiny.tokenizer, processor=processor)
    assert backbone.processor is None and "chat template" in backbone.why_blind
    with pytest.raises(sft.Problem, match="chat template"):
        sft.encode_picture(backbone, "Look", Image.new("RGB", SIZE))


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


def test_what_is_not_there_cannot_be_frozen(tiny):
    """Catches a text-only model "with a frozen vision encoder" in somebody's table."""
    with pytest.raises(sft.Problem, match="--freeze vision"):
        sft.freeze(text_model("llama", tiny.tokenizer), "vision")


# ------------------------------------------------------------------------------------------------
# Teaching the small backbone to see
# ------------------------------------------------------------------------------------------------


def test_learning_to_see_changes_no_text(monkeypatch, tmp_path):
    """Catches text weights that move while the eyes learn: every result in text would be void."""
    shutil.copytree(sft.HERE / "backbones" / "gp", tmp_path / "backbones" / "gp")
    monkeypatch.setattr(sft, "HERE", tmp_path)
    monkeypatch.setattr(sft, "read_right", lambda backbone, name, which: 0.0)
    before = sft.load_backbone(tmp_path / "backbones" / "gp")
    made = sft.build_eyes("gp", tmp_path / "run", 1, 2, 2, batch=3, lr=1e-2, resume=False)
    after = sft.load_backbone(made)
    own, first = sft.picture_parameters(after.model), before.model.state_dict()
    assert after.why_blind == "" and made == tmp_path / "backbones" / "gp"
    for name, value in after.model.state_dict().items():
        assert torch.equal(value, first[name]) == (name not in own), name
    rng = np.random.default_rng(0)
    rows = [sft.encode(after, gp_env.expert_conversation(rng)) for _ in range(4)]
    assert torch.equal(log_p(before, rows), log_p(after, rows))
    # once more on top of it, killed before the second lesson: the same eyes, from the same seed
    shutil.copytree(tmp_path / "run" / "tower", tmp_path / "run2" / "tower")
    monkeypatch.setattr(sft, "pretrain_tower", None)
    sft.build_eyes("gp", tmp_path / "run2", 1, 2, 2, batch=3, lr=1e-2, resume=True)
    assert same(sft.load_backbone(made).model.state_dict(), after.model.state_dict())


@pytest.mark.parametrize("columns", [True, False])
def test_patches_go_to_the_quarter_they_lie_in(columns):
    """Catches patches that are asked for their neighbour's card or view: a tower of mush."""
    backbone = sft.new_eyes(sft.load_backbone(sft.DEFAULT_MODEL["gp-l"]), 0)
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
    quarters = sft.by_quarter(patches, columns)
    assert quarters.shape == (1, 4, 32, size * size)
    for quarter, shade in zip(quarters[0], shades):
        assert torch.allclose(quarter, torch.tensor(shade / 127.5 - 1), atol=1e-5)


def test_tower_learns_by_itself_and_from_the_seed_alone():
    """Catches a first lesson that touches text weights or draws from the global generator."""
    reader = sft.load_backbone(sft.DEFAULT_MODEL["gp-l"])
    made, lines = [], []
    for _ in range(2):
        backbone = sft.new_eyes(reader, 0)
        before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
        torch.rand(3)
        state = torch.get_rng_state()
        sft.pretrain_tower(backbone, "gp", seed=5, steps=3, batch=2, peak=1e-2, report=lines.append)
        assert torch.equal(state, torch.get_rng_state())
        moved = {name for name, value in backbone.model.state_dict().items()
                 if not torch.equal(value, before[name])}
        assert moved and all("vision_model" in name for name in moved)
        made.append(backbone.model.state_dict())
    assert same(*made) and len(lines) == 2 and lines[0] == lines[1]


def test_only_what_sees_learns():
    """Catches parts that are frozen by mistake, or that no gradient of a picture reaches."""
    backbone = sft.new_eyes(sft.load_backbone(sft.DEFAULT_MODEL["gp-l"]), 0)
    rows = [sft.encode(backbone, turns) for turns in gp_env.pictured_conversations(
        np.random.default_rng(0), 2, SIZE)]
    sft.sft_loss(backbone, rows, 2)
    own = sft.picture_parameters(backbone.model)
    reached = {name for name, p in backbone.model.named_parameters()
               if p.grad is not None and p.grad.abs().max() > 0}
    late = "model.vision_model.gated_positional_embedding.tile_embedding.weight"
    assert own - reached == {late} and reached < own        # its gate has to open first
    assert sft.task_parameters(backbone.model, pictures=True) == sum(
        p.numel() for p in backbone.model.parameters()) > sft.task_parameters(backbone.model)


@pytest.mark.parametrize("shift, share", [(1, 1.0), (0, 0.0)])
def test_reading_asks_for_the_next_token(seeing, monkeypatch, shift, share):
    """Catches a measure that is one token off: it would call a blind model a reader."""
    size = seeing.model.get_output_embeddings().weight.shape[0] + 8

    def prophet(backbone, ids, lengths, pictures):
        return torch.nn.functional.one_hot(ids.roll(-shift, dims=1), size).float()

    monkeypatch.setattr(sft, "trunk", prophet)
    monkeypatch.setattr(seeing.model, "get_output_embeddings", torch.nn.Identity)
    assert sft.read_right(seeing, "gp", "red", 8) == share


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


BLIND = {"text-only": "text-only", "never trained": "never trained", "damaged": "does not load",
         "bare tokenizer": "bare tokenizer"}


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


def test_the_shipped_backbone_reads_cards():
    """Catches weights that were shipped without their eyes: GP-VL would be played on noise."""
    shipped = sft.load_backbone(sft.DEFAULT_MODEL["gp-vl"])
    assert shipped.why_blind == ""
    # 100 hands, 400 cards: three standard deviations of the rates asked for, 97 % and 90 %
    for suits, least in (("black", 0.97), ("red", 0.90)):
        rate = sft.read_right(shipped, "gp", suits, 100)
        assert rate > least - 3 * (least * (1 - least) / 400) ** 0.5, f"{suits}: {rate:.1%}"


@pytest.mark.parametrize("size", ["12", "x", "128x", "64x64", "99999x64", "-128x64", "1e3x99"])
def test_bad_picture_sizes_end_in_one_line(monkeypatch, capsys, size):
    """Catches a size that no picture can have, found after minutes of training."""
    for script in (sft, evaluate, rl):
        assert_one_line(*command(monkeypatch, capsys, script, f"--picture-size={size}"),
                        "--picture-size", "128x64")


def test_cells_of_pictures_are_what_they_say():
    """Catches a visual shift that is none, or that moves the rule as well."""
    ink = {"id": "black", "ood": "black", "visual": "red", "both": "red"}
    assert set(ink) == set(evaluate.PICTURE_CELLS)
    for cell, colour in ink.items():
        envs, seeds = evaluate.cell_environments(cell, "test", 12, "gp-vl", {"picture": SIZE})
        hands = [env.reset(seed)[1]["hand"] for env, seed in zip(envs, seeds)]
        assert {suit for hand in hands for suit in hand.suits} == set(gp_env.SUITS[colour])
        rule = "face" if cell in ("ood", "both") else "ten"
        assert {hand.rule for hand in hands} == {gp_env.RULES[rule]}
        assert all(env.image.size == SIZE for env in envs)


def test_single_cards_by_hand():
    """Catches cards compared by position, read twice, or beyond the fourth."""
    def heard(cards, text):
        env = gp_env.GeneralPoints(picture=SIZE)
        env.reset(0)
        env.hand = gp_env.Hand(cards, ("spades",) * 4, (10, 10, 10))
        verdict = env.step(text)[4]["verdict"]
        return evaluate.Episode(env, "", [evaluate.Turn([], [], [], text, 0.0, "", verdict, True)])

    episodes = [heard(("J", "3", "K", "10"), 'cards: ["3", "Q", "10", "k"]'),
                heard(("2", "2", "A", "5"), "cards: [2, 5, 5, 5, A, 2], number: [1]"),
                heard(("7", "8", "9", "A"), "no idea"),
                heard(("7", "8", "9", "A"), "cards: [7, 8, 9, A]")]
    found = evaluate.read_singly(episodes)
    assert found["single_cards"] == (3 + 2 + 0 + 4) / 16
    assert found["confusion"] == {
        "A": {"5": 1, "?": 1, "A": 1}, "2": {"2": 1, "5": 1}, "3": {"3": 1}, "5": {"5": 1},
        "7": {"?": 1, "7": 1}, "8": {"?": 1, "8": 1}, "9": {"?": 1, "9": 1}, "10": {"10": 1},
        "J": {"Q": 1}, "K": {"K": 1}}
    measured = evaluate.measure(episodes)
    assert measured["cards_read"] == 1 / 4 and measured["single_cards"] == 9 / 16


FLAGS = ["--task", "gp-vl", "--model", "model", "--ood", "--picture-size", "130x70"]


@pytest.fixture
def at_work(seeing, tmp_path, monkeypatch):
    """A folder to work in, with a model that sees in "model"."""
    sft.save_checkpoint(tmp_path / "model", seeing)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gp_env, "GeneralPoints", Rigged)
    return tmp_path


def test_sft_and_evaluation_of_pictures_run(at_work, monkeypatch, capsys):
    """Catches a task that is a choice of --task and wired nowhere."""
    asked = []
    draw = gp_env.draw_hand
    monkeypatch.setattr(gp_env, "draw_hand", lambda hand, seed, size: asked.append((
        hand.suits, size)) or draw(hand, seed, size))
    code, error = command(monkeypatch, capsys, sft, *FLAGS, "--steps", 2, "--start-step", 1,
                          "--batch", 3, "--out", "run")
    assert code == 0, error
    assert {size for _, size in asked} == {(130, 70)}
    black, red = set(gp_env.SUITS["black"]), set(gp_env.SUITS["red"])
    assert all(set(suits) <= black for suits, _ in asked[-6:]), "training saw red"
    assert sum(set(suits) <= red for suits, _ in asked) == 256, "the visual probe"
    row = rows_of(at_work / "run" / "metrics.jsonl")[-1]
    assert {"id_nll", "ood_nll", "visual_nll"} <= set(row)
    code, error = command(monkeypatch, capsys, evaluate, *FLAGS[:2], "--model",
                          "run/step-000002", "--ood", "--splits", "test", "--hands", 3, "--show",
                          2, "--out", "found.json", "--max-new-tokens", 4)
    assert code == 0, error
    found = json.loads((at_work / "found.json").read_text())
    assert list(found) == [f"held-out/{cell}" for cell in ("id", "ood", "visual", "both")]
    assert all({"cards_read", "single_cards", "confusion"} <= set(m) for m in found.values())
    for cell in found:
        shown = at_work / "runs" / "shown" / f"{cell.replace('/', '-')}-1.png"
        assert Image.open(shown).size == SIZE


def test_dropped_pictures_are_dropped_in_training_alone(at_work, monkeypatch, capsys):
    """Catches a blind arm that sees, or that is measured blind; and a flag that does nothing."""
    shown, loss = {True: [], False: []}, sft.sft_loss

    def watched(backbone, rows, micro_batch, backward=True):
        shown[backward] += [len(row) == 3 for row in rows]
        return loss(backbone, rows[:2], micro_batch, backward)

    monkeypatch.setattr(sft, "sft_loss", watched)
    flags = ["--steps", 2, "--start-step", 1, "--batch", 3, "--drop-pictures"]
    code, error = command(monkeypatch, capsys, sft, *FLAGS, *flags, "--out", "blind")
    assert code == 0, error
    assert len(shown[True]) == 6 and not any(shown[True]) and all(shown[False])
    code, error = command(monkeypatch, capsys, sft, "--model", "model", *flags, "--out", "text")
    assert_one_line(code, error, "--drop-pictures", "gp-l")


def test_rl_of_pictures_killed_and_resumed_is_the_same(at_work, monkeypatch, capsys):
    """Catches pictures that depend on what was drawn before, and a checkpoint that went blind."""
    flags = [*FLAGS, "--from-backbone", "--updates", 2, "--episodes", 4, "--max-new-tokens", 4,
             "--minibatch", 2, "--eval-hands", 2, "--eval-every", 1]
    code, error = command(monkeypatch, capsys, rl, *flags, "--out", "whole")
    assert code == 0, error
    with monkeypatch.context() as patch:
        kill_at(patch, rl, "collect", 2)
        with pytest.raises(Killed):
            command(monkeypatch, capsys, rl, *flags, "--out", "killed")
    code, error = command(monkeypatch, capsys, rl, *flags, "--out", "killed", "--resume")
    assert code == 0, error
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert rows_of(at_work / "whole" / name) == rows_of(at_work / "killed" / name)
    cells = rows_of(at_work / "whole" / "eval.jsonl")[-1]["cells"]
    assert [name for name in cells if "held-out" in name] == [
        f"held-out/{cell}" for cell in ("id", "ood", "visual", "both")]
    assert sft.load_backbone(at_work / "killed" / "step-000002").why_blind == ""
    # the figures of pictures hold no run of text, and the other way round
    for name in ("whole", "killed"):
        assert len(evaluate.read_runs(at_work / name, "gp-vl")) == 1
    with pytest.raises(sft.Problem, match="gp-l"):
        evaluate.read_runs(at_work, "gp-l")
    evaluate.plot(at_work, at_work / "figure.png", "gp-vl")
    assert Image.open(at_work / "figure.png").width > 1000


def test_words_are_measured_as_before(tiny):
    """Catches numbers about cards in the metrics of gp-l, where nothing is to be read."""
    results, _ = evaluate.evaluate(tiny, ["id"], ["test"], 2, max_new_tokens=2, quiet=True)
    assert not {"single_cards", "confusion"} & set(results["held-out/id"])
