"""Build the small backbones from nothing: a tokenizer, a tiny Mllama, a broad corpus, and eyes.

Not of the paper: there Llama-3.2-11B-Vision plays this part. What matters is that the small model
knows more than the task asks for, and the task itself weakly: then there is something to forget.
README.md beside this file says what the shipped ones can do and how long they took.

  1. a tokenizer without training, a model of the paper's class, its picture processor
  2. batches: a corpus cut into blocks, a first lesson that only repeats, a learning rate that
     stays high for long
  3. the text backbone: the loop of sft.py on the environment's corpus
  4. the eyes: first the vision tower by itself, without a word; then, with tower and text frozen,
     the layers that look learn to ask it
  5. the command line

Shapes: B pictures in a batch, T tokens, H hidden size, M words asked for.

    python -m backbones.build gp               cards: about an hour on two cores
    python -m backbones.build gp-eyes          then it learns to see: 20 minutes on one
    python -m backbones.build virl             walks: 22 minutes on two cores
    python -m backbones.build virl-eyes        32 minutes on one
    python -m backbones.build gp --steps 20    does it run? (seconds; the result can do nothing)

Each is deterministic from its seed, and resumable. It ends in OUT/backbone; only --install puts it
in the place of the shipped one. Read before: sft.py, and gp_corpus.py or virl_corpus.py.
"""

import argparse
import math
import pathlib
import shlex
import string
import sys

# Before torch: sft says how its threads are to wait.
from sft import (TRAINING_CITY, Problem, checkpoints, encode, guarded, load_backbone, pad,
                 picture_parameters, save_checkpoint, train, trunk, wrap_backbone)
import numpy as np
import torch

from backbones import gp_corpus, virl_corpus
from gp_env import PICTURE_SIZE

HERE = pathlib.Path(__file__).resolve().parent
CORPORA = {"gp": gp_corpus, "virl": virl_corpus}

# How the text backbones are built: optimiser steps in all, those of them that only repeat, those
# that recall lines of the prompt; batch.
BUILDS = {"gp": {"steps": 5000, "repeat": 0, "recall": 0, "batch": 64},
          "virl": {"steps": 2600, "repeat": 600, "recall": 400, "batch": 32}}
# How eyes are built: steps of the two lessons, and on what their reading is watched meanwhile: the
# training look, and another. (A sign is smaller than a card, and takes longer to find.)
EYES = {"gp": {"tower": 1500, "steps": 750, "watch": ("black", "red")},
        "virl": {"tower": 2500, "steps": 750, "watch": (TRAINING_CITY, "wild-99")}}


# ------------------------------------------------------------------------------------------------
# 1. Tokenizer, model, processor
# ------------------------------------------------------------------------------------------------

# <|user|>, words, <|end|>, <|assistant|>, words, <|end|>, ...; a picture is one token in its turn.
CHAT = ("{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<|image|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
        "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


def build_tokenizer(phrases):
    """A tokenizer without training: 256 bytes, and one token for each fixed piece of the prompts.

    Any text can be written (unknown words cost a token a letter), and it reads back exactly.
    Returns a PreTrainedTokenizerFast. `<|image|>` comes last: Mllama wants its id to be the size of
    the output vocabulary.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens([AddedToken(p, normalized=False) for p in phrases])
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>"]
    raw.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>",
                                        eos_token="<|end|>")
    tokenizer.chat_template = CHAT
    return tokenizer


def build_model(tokenizer, seed, width=128, layers=7, crossing=(2, 5), heads=4, inner=384):
    """A Mllama (the paper's model class) of about 2 million parameters with random weights.

    Layers in `crossing` look at a picture and are skipped in text, so GP-L runs on layers - 2.
    """
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    size = len(tokenizer) - 1                       # all but <|image|>, which is never predicted
    token = tokenizer.convert_tokens_to_ids
    ids = dict(bos_token_id=None, eos_token_id=token("<|end|>"), pad_token_id=token("<|pad|>"))
    text = dict(vocab_size=size, hidden_size=width, num_hidden_layers=layers,
                cross_attention_layers=list(crossing), num_attention_heads=heads,
                num_key_value_heads=heads, intermediate_size=inner, max_position_embeddings=2048,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                bos_token_id=0, eos_token_id=ids["eos_token_id"], pad_token_id=ids["pad_token_id"])
    # Two square tiles of 64 x 64 side by side hold a picture of four cards, 128 x 64.
    vision = dict(hidden_size=96, num_hidden_layers=3, num_global_layers=1, attention_heads=4,
                  intermediate_size=256, image_size=64, patch_size=8, max_num_tiles=2,
                  intermediate_layers_indices=[1], vision_output_dim=192,
                  supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]])
    with torch.random.fork_rng(devices=[]):         # the one place where torch insists on its
        torch.manual_seed(seed)                     # global generator: borrow it and give it back
        model = MllamaForConditionalGeneration(MllamaConfig(
            vision_config=vision, text_config=text, image_token_index=size))
    with torch.no_grad():
        # Hugging Face starts these gates at tanh(0) = 0: right for grafting eyes onto a finished
        # 8B model, but from scratch no gradient would ever reach the vision tower.
        for name, value in model.named_parameters():
            if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
                value.fill_(1.0)
    model.generation_config.eos_token_id = ids["eos_token_id"]
    model.generation_config.pad_token_id = ids["pad_token_id"]
    return model


def build_processor(model, tokenizer):
    """The picture processor of the small Mllama: scaled to fit its square tiles, colours -1..1."""
    from transformers import MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    vision = model.config.vision_config
    images = MllamaImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size},
        max_image_tiles=vision.max_num_tiles, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return MllamaProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


# ------------------------------------------------------------------------------------------------
# 2. Batches and the learning rate
# ------------------------------------------------------------------------------------------------


def in_blocks(corpus, seeds, batch):
    """draw(step) of `train` for corpus(rng, count): batches of conversations of like length.

    16 batches are drawn at once and sorted by turns, so that a batch has little padding.
    """
    chunk, drawn = 16, {}

    def draw(step):
        """One batch; the others of its block are kept until the next block begins."""
        block = step // chunk
        if block not in drawn:
            drawn.clear()
            rng = np.random.default_rng([*seeds, block])
            rows = corpus(rng, chunk * batch)
            rows.sort(key=len)
            drawn[block] = [rows[i * batch:(i + 1) * batch] for i in rng.permutation(chunk)]
        return drawn[block][step % chunk]

    return draw


def repeating(pieces):
    """A corpus for `in_blocks` in which the answer says again what was said: random pieces of text.

    Copying from the prompt is most of what a walk asks for, and a small transformer finds it late
    and rather suddenly (Olsson et al. 2022, induction heads). Repetition gets it there in a few
    minutes: the mean loss is 4.9 in steps 131-260, 1.0 in steps 391-520, 0.4 in steps 651-780.
    """
    def corpus(rng, count):
        """`count` conversations of 6 to 32 pieces."""
        said = ["".join(pieces[i] for i in rng.integers(len(pieces), size=rng.integers(6, 33)))
                for _ in range(count)]
        return [[{"role": "user", "content": text, "learn": False},
                 {"role": "assistant", "content": text, "learn": True}] for text in said]
    return corpus


def cooldown_rate(step, steps, peak, warmup):
    """The learning rate of a build. step counts from 0; the rate is 0 at `steps`.

    Linear warm-up, then a cosine that aims at 1.6 * steps, while a line over the last 40 % of the
    steps takes it to 0: more time at a high rate than a plain cosine has, which a model made from
    nothing needs.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    cooldown = max(1, int(0.4 * steps))
    rate = peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, 1.6 * steps - warmup)))
    return rate * min(1.0, (steps - step) / cooldown)


# ------------------------------------------------------------------------------------------------
# 3. The text backbone
# ------------------------------------------------------------------------------------------------


def lessons_of(corpus, seed, repeat, recall, steps, batch):
    """draw(step) of `train`: the lessons of a build, one after the other.

    corpus: a module of CORPORA. repeat, recall: steps of the two lessons before its conversations.
    """
    lessons = [(steps, corpus.backbone_conversations, 1)]
    if recall:
        lessons.insert(0, (recall, corpus.recall_conversations, 8))
    if repeat:
        lessons.insert(0, (repeat, repeating([*corpus.phrases(), *string.printable]), 7))
    drawn = [(count, in_blocks(made, [seed, number], batch)) for count, made, number in lessons]

    def draw(step):
        """The batch of a step, from the lesson that it falls into."""
        for count, lesson in drawn:
            if step < count:
                return lesson(step)
            step -= count

    return draw


def build_backbone(name, folder, seed, steps, resume=False, repeat=0, recall=0, batch=64,
                   lr=2e-3):
    """Pretrain a small backbone on its environment's broad corpus, deterministic from the seed.

    name: a key of CORPORA. Each has a vocabulary of its own: a fixed piece of a prompt is one token
    only where the tokenizer has met it, and on a laptop short prompts decide what can be done.
    Returns the folder of the finished backbone, FOLDER/backbone.
    """
    folder, corpus = pathlib.Path(folder), CORPORA[name]
    tokenizer = build_tokenizer(corpus.phrases())
    backbone = wrap_backbone(build_model(tokenizer, seed).eval(), tokenizer)
    last = train(backbone, lessons_of(corpus, seed, repeat, recall, steps, batch), folder, steps,
                 rate=lambda step: cooldown_rate(step, steps, lr, warmup=200),
                 save_at=set(range(0, steps, max(1, steps // 20))), micro_batch=16, resume=resume)
    save_checkpoint(folder / "backbone", load_backbone(last))   # without the optimiser's state
    return folder / "backbone"


# ------------------------------------------------------------------------------------------------
# 4. The eyes
# ------------------------------------------------------------------------------------------------


def new_eyes(reader, seed):
    """The small backbone with untrained eyes: every weight that text reaches is `reader`'s.

    Those weights are frozen: as Llama 3.2 Vision is Llama 3.1 on text, so this backbone will answer
    prompts without a picture as before, to the last bit. Returns a Backbone.
    """
    tokenizer = reader.tokenizer
    model = build_model(tokenizer, seed)
    own = picture_parameters(model)
    model.load_state_dict({name: value for name, value in reader.model.state_dict().items()
                           if name not in own}, strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in own)
            if name.endswith("tile_positional_embedding.gate"):
                # Closed at first, and then the two tiles of a picture look alike: which half a
                # card lies in could not be told.
                parameter.fill_(1.0)
            elif "positional_embedding.embedding" in name:
                parameter.mul_(10)      # from 0.02 to about the size of an embedded patch
    return wrap_backbone(model.eval(), tokenizer, processor=build_processor(model, tokenizer))


def by_quarter(states, columns):
    """Patches of two tiles side by side -> those of each quarter of the picture.

    states (B, 2, side * side, H), a tile row by row -> (B, 4, side * side / 2, H). columns: four
    columns, as cards lie; else 2 x 2, as views do: upper left, lower left, upper right, lower right
    (each tile holds two quarters, one beside or one above the other).
    """
    count, tiles, patches, size = states.shape
    side = math.isqrt(patches)
    if columns:
        states = states.reshape(count, tiles, side, 2, side // 2, size).transpose(2, 3)
    return states.reshape(count, 2 * tiles, patches // 2, size)


def pretrain_tower(backbone, name, seed, steps, batch=32, peak=3e-3, report=print):
    """First lesson of the eyes, without a word: every patch names what its quarter shows.

    Taught through the language model alone, new eyes stay on a plateau for hundreds of steps: they
    put out noise, the language layers learn to ignore it, and what is ignored gets no gradient that
    tells it to see better. That is why real vision-language models graft a tower that can see
    already (Llama 3.2's learnt from captions).
    Here a linear head answers the corpus's EYE_QUESTIONS (rank and suit of a card; kind of place in
    a view) off each patch of the quarter in question. Most of those patches show cloth, plain card
    or sky: to answer, they must ask their neighbours, and afterwards any of them can be asked. The
    head is thrown away.

    name: a key of CORPORA. steps: of `batch` pictures. report(line) is told how it goes.
    """
    corpus, tower = CORPORA[name], backbone.model.base_model.vision_model
    questions = corpus.EYE_QUESTIONS                        # (what is asked, answers, weight) each
    answers = [count for _, count, _ in questions]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = torch.nn.Linear(tower.config.vision_output_dim, sum(answers))
    parameters = [*tower.parameters(), *head.to(backbone.device).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), eps=1e-7,
                                  weight_decay=0.0, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cooldown_rate(step, steps, peak, warmup=100)
        lesson = corpus.eye_lesson(np.random.default_rng([seed, 6, step]), batch, PICTURE_SIZE)
        patches = by_quarter(look(backbone, [image for image, _ in lesson]), corpus.EYE_COLUMNS)
        truth = torch.tensor([answer for _, answer in lesson])          # (B, 4, questions)
        truth = truth.to(backbone.device)[:, :, None].expand(-1, -1, patches.shape[2], -1)
        loss, said = 0, []
        for k, logits in enumerate(head(patches).split(answers, dim=-1)):
            asked, _, weight = questions[k]
            loss = loss + weight * torch.nn.functional.cross_entropy(
                logits.flatten(0, 2), truth[..., k].flatten())
            right = (logits.argmax(-1) == truth[..., k]).float().mean().item()
            said.append(f"{asked} {right:.1%}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            report(f"tower {step + 1:6d}/{steps}  loss {loss.item():.4f}  patches that know "
                   f"their quarter: {', '.join(said)}")


def look(backbone, images):
    """What the tower makes of pictures: (B, 2 tiles, 64 patches, H)."""
    seen = backbone.processor.image_processor([[image] for image in images], return_tensors="pt")
    seen = {key: seen[key].to(backbone.device)
            for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    # of the one picture of each row; a tile's first state is not of a patch
    return backbone.model.base_model.vision_model(**seen).last_hidden_state[:, 0, :, 1:]


@torch.no_grad()
def read_right(backbone, name, which, count=64):
    """Share of what held-out pictures show that is read right, in 0..1.

    name: a key of CORPORA. which: a key of gp_env.SUITS, and single cards are counted; or a city,
    and what stands in each of the four views. Teacher-forced: each word's token, given the picture
    and the words before it. Only for the small backbone, where each is one token.
    """
    token = backbone.tokenizer.convert_tokens_to_ids
    rows, asked = [], []
    for i in range(count):
        conversation, words = CORPORA[name].reading_conversation(
            np.random.default_rng([4, i]), which, PICTURE_SIZE)
        row = encode(backbone, conversation)
        at = row["mask"].index(1) - 1
        for word in words:
            at = row["ids"].index(token(word), at + 1)
            asked.append((i, at))
        rows.append(row)
    ids = pad([row["ids"] for row in rows]).to(backbone.device)
    hidden = trunk(backbone, ids, [row["picture"] for row in rows])                 # (B, T, H)
    number, place = torch.tensor(asked, device=backbone.device).T                   # (M,) each
    guess = backbone.model.get_output_embeddings()(hidden[number, place - 1]).argmax(-1)
    return (guess == ids[number, place]).float().mean().item()


def build_eyes(name, folder, seed, tower_steps, steps, resume=False, lr=3e-3, batch=32):
    """Teach backbones/NAME to see, in two lessons; deterministic from the seed.

    First the tower alone (`pretrain_tower`, steps of a quarter of the work); then, with tower and
    text frozen, the projector and the layers that look learn to ask it, on the corpus's
    pictured_conversations. Returns the folder of the finished backbone, FOLDER/backbone. Raises
    Problem if backbones/NAME was replaced meanwhile.
    """
    folder = pathlib.Path(folder)
    reader = load_backbone(HERE / name)
    backbone = new_eyes(reader, seed)
    tower = backbone.model.base_model.vision_model
    if resume and (folder / "tower").is_dir():
        learnt = load_backbone(folder / "tower").model.base_model.vision_model
        tower.load_state_dict(learnt.state_dict())
    else:
        pretrain_tower(backbone, name, seed, tower_steps)
        save_checkpoint(folder / "tower", backbone)
    for parameter in tower.parameters():
        parameter.requires_grad_(False)

    def corpus(rng, count):
        """The second lesson: conversations that open with a picture."""
        return CORPORA[name].pictured_conversations(rng, count, PICTURE_SIZE)

    def probe(backbone):
        """Share of what validation pictures show that is read right."""
        return {f"read_{which}": read_right(backbone, name, which)
                for which in EYES[name]["watch"]}

    last = train(backbone, in_blocks(corpus, [seed, 5], batch), folder, steps,
                 rate=lambda step: cooldown_rate(step, steps, lr, warmup=100),
                 save_at=set(range(0, steps, max(1, steps // 20))), micro_batch=16, resume=resume,
                 probe=probe)
    made, before = load_backbone(last), reader.model.state_dict()
    hidden = picture_parameters(made.model)
    if not all(torch.equal(value, before[key]) for key, value in made.model.state_dict().items()
               if key not in hidden):
        raise Problem(f"the text weights are not those of backbones/{name} any more: it was "
                      "replaced while this ran, or before --resume; start over")
    save_checkpoint(folder / "backbone", made)
    return folder / "backbone"


# ------------------------------------------------------------------------------------------------
# 5. Command line
# ------------------------------------------------------------------------------------------------


def install(made, name):
    """Put a finished backbone in the place of the shipped one, in one move."""
    save_checkpoint(HERE / name, load_backbone(made))


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m backbones.build", description="Build a small "
                                     "backbone, or teach it to see.")
    parser.add_argument("what", choices=(*BUILDS, *(f"{name}-eyes" for name in EYES)),
                        help="gp: cards, virl: walks; with -eyes: teach backbones/gp or "
                        "backbones/virl to see")
    parser.add_argument("--steps", type=int, help="optimiser steps (default gp 5000, virl 2600; "
                        "eyes 750, and the tower's steps shrink with them)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default 0)")
    parser.add_argument("--out", help="run folder (default runs/build-WHAT); the backbone ends in "
                        "OUT/backbone")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--install", action="store_true", help="at the end, replace the shipped "
                        "backbones/NAME by what was built; without it nothing there changes")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = all cores")
    args = parser.parse_args()
    folder = args.out or f"runs/build-{args.what}"
    for flag in ("steps", "seed", "threads"):
        value = getattr(args, flag)
        if value is not None and value < (1 if flag == "steps" else 0):
            raise Problem(f"--{flag} {value}: too small")
    started = checkpoints(folder) or (pathlib.Path(folder) / "tower").exists()
    if started and not args.resume:
        raise Problem(f"{folder} holds a build already: add --resume to go on with it, or give "
                      "another --out")
    if args.threads:
        torch.set_num_threads(args.threads)
    name, _, eyes = args.what.partition("-")
    if eyes:
        steps = args.steps or EYES[name]["steps"]
        tower_steps = max(1, EYES[name]["tower"] * steps // EYES[name]["steps"])
        made = build_eyes(name, folder, args.seed, tower_steps, steps, args.resume)
    else:
        recipe = BUILDS[name]
        steps = args.steps or recipe["steps"]
        made = build_backbone(name, folder, args.seed, steps, args.resume, recipe["repeat"],
                              recipe["recall"], recipe["batch"])
    print(f"built {made}")
    if args.install:
        install(made, name)
        print(f"installed as backbones/{name}")
    else:
        print(f"To put it in the place of backbones/{name}:\n    python -m backbones.build "
              f"{args.what} --seed {args.seed} --steps {steps} --out {shlex.quote(str(folder))} "
              "--resume --install")


if __name__ == "__main__":
    sys.exit(guarded(main))
