"""Stage 1, supervised fine-tuning: show the model expert answers until it knows the format.

Paper: arXiv 2501.17161, section 5 and appendix C.1. SFT is both the START of RL (a short run) and
its RIVAL (the same run, scaled up): "SFT memorises" is a statement about what happens when this
file is left running.

  1. load any Hugging Face checkpoint: model, tokenizer, chat markup, end and banned tokens
  2. draw conversations (gp_env.py, virl_env.py) that an expert has answered
  3. turn a conversation into token ids and a loss mask, segment by segment; a picture in its
     first turn goes beside them, as tensors
  4. forward; log-probability of every answer token given all tokens before it
  5. loss = - mean over answer tokens (never over prompt or padding)
  6. backward in micro-batches, clip the gradient norm, AdamW with warm-up and cosine decay
  7. save checkpoints densely: the rise, peak and fall of OOD is the result

Shapes: B conversations in a batch, T tokens of the longest, N answer tokens in the whole batch,
H hidden size, V vocabulary.

These steps are the first part of this file, and all that a text task needs. The others stand each
for itself: run folders, pictures, large models, the small backbones (built by the same loop, on
broader text), the command line.

    python sft.py --task gp-l --ood            # the SFT start and beyond
    python sft.py --task gp-vl --ood           # the same with the cards in a picture
    python sft.py --task virl-l --ood          # walks
    python sft.py --build gp                   # rebuild backbones/gp from nothing
    python sft.py --build gp-eyes              # then teach it to see, its text weights frozen
    python sft.py --build virl                 # the same for walks, into backbones/virl, ...
    python sft.py --build virl-eyes            # ... and for street views
    python sft.py --preset paper               # Llama-3.2-11B-Vision on a GPU of 141 GB

Read before: gp_env.py, virl_env.py. Read next: evaluate.py.
"""

import argparse
import ctypes
import errno
import json
import math
import os
import pathlib
import shutil
import string
import sys
import time
import traceback
from dataclasses import dataclass
from logging import getLogger

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Two busy programs on two cores: threads that spin while they wait slow each other several times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import gp_env  # noqa: E402
import virl_env  # noqa: E402

if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    # On a CPU, glibc gives every large tensor fresh pages and hands them back at once; the page
    # faults cost 15 % of a training step here. Keep memory: M_MMAP_MAX = 0, M_TRIM_THRESHOLD = max.
    ctypes.CDLL(None).mallopt(-4, 0)
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)

HERE = pathlib.Path(__file__).resolve().parent
ENVIRONMENTS = {"gp": gp_env, "virl": virl_env}
TASKS = [f"{name}-{sense}" for name in ENVIRONMENTS for sense in ("l", "vl")]   # language, vision
DEFAULT_MODEL = {task: HERE / "backbones" / task.split("-")[0] for task in TASKS}
# Where V-IRL trains, and where it meets streets, names and houses that it has never seen.
TRAINING_CITY, *OTHER_CITIES = virl_env.CITIES
# Defaults of flags that a task wants otherwise than gp-l. The backbone of walks knows the skill and
# lacks the format alone: after 12 steps it has 84 to 89 of 100 actions right on seen routes (the
# paper's start, under the other rule: 81); after 40 (97 of 100) little would be left to gain.
TASK_DEFAULTS = dict.fromkeys(("virl-l", "virl-vl"), {"steps": 800, "start_step": 12})


class Problem(Exception):
    """Something the user can put right. `guarded` prints it as one line and exits with code 2."""


def guarded(main):
    """Run a script's main(): a Problem, a full disk or Ctrl-C end in one clear line, no traceback.

    Returns the exit code: 0 fine, 2 a problem, 130 stopped by the user.
    """
    name = pathlib.Path(sys.argv[0]).name
    again = "run it again" if name == "evaluate.py" else "go on with --resume"
    try:
        main()
        return 0
    except (Problem, virl_env.RouteProblem) as problem:
        print(f"{name}: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        what = (f"the disk is full: free some space; nothing saved before is lost, {again}"
                if error.errno == errno.ENOSPC else
                f"{error}; nothing saved before is lost: see to that path, or give another")
        print(f"{name}: {what}", file=sys.stderr)
        return 2
    except MemoryError:
        print(f"{name}: out of memory: ask for less at once (episodes, hands, batch); nothing "
              f"saved before is lost, {again}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        sampling = "play" in {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        turn = ("lower --batch (episodes at once)" if name == "evaluate.py" else
                "lower --sample-batch (episodes at once)" if sampling else
                "lower --micro-batch or add --grad-checkpoint (the result stays the same); or "
                "begin anew, in another --out, with --dtype bfloat16 or --freeze vision")
        print(f"{name}: out of GPU memory: {turn}; what was saved is not lost, {again}",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; {again}", file=sys.stderr)
        return 130


# ------------------------------------------------------------------------------------------------
# 1. The backbone: a model and everything one must know to talk to it
# ------------------------------------------------------------------------------------------------


@dataclass
class Backbone:
    """A loaded checkpoint. All ids are those of its tokenizer."""

    model: torch.nn.Module
    tokenizer: object
    end_ids: list           # tokens that end an answer; the first is the chat template's own
    banned: list            # tokens that the policy must never sample (picture placeholders)
    before_first: str       # chat markup: before_first + PROMPT + before_answer + ANSWER <end>
    before_answer: str      #   + before_next + MESSAGE + before_answer + ANSWER <end> ...
    before_next: str
    checkpointing: bool = False     # recompute activations in the backward pass
    processor: object = None        # turns pictures into tensors; None if the model cannot see
    why_blind: str = "it is a text-only model"      # what the user is told in that case
    before_picture: str = ""        # before_first for a turn with a picture, the image token in it
    refused: int = 0                # optimiser steps in a row whose gradient was not finite

    @property
    def device(self):
        """Where the weights are."""
        return next(self.model.parameters()).device


def pick_device(name):
    """"auto" is a GPU if there is one. Raises Problem if the named device is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise Problem("--device cuda: no GPU is visible to torch here; use --device cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda") or str(device).startswith("cpu:"):
            raise RuntimeError
        return device
    except RuntimeError:
        raise Problem(f"--device {name}: unknown device; use auto, cpu or cuda") from None


def load_backbone(name, device="cpu", grad_checkpoint=False, dtype="float32"):
    """Load a text or vision-language chat model from a folder or, by name, from the hub.

    dtype of the weights: float32, or bfloat16 with half the memory (see AdamW16 and `precision`).
    Returns a Backbone. Raises Problem for a missing folder, a damaged file, a model that the hub
    does not hand out, or one that cannot chat.
    """
    from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText,
                              AutoTokenizer)
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    getLogger("huggingface_hub").setLevel("ERROR")
    folder = pathlib.Path(name)
    # A hub name is "owner/model"; anything else that is not here would be asked for in vain.
    local = folder.is_absolute() or str(name).count("/") != 1 or folder.parent.exists()
    if local and not (folder / "config.json").exists():
        if folder.resolve() in DEFAULT_MODEL.values():
            raise Problem(f"there is no small backbone in {name} yet: build it with python sft.py "
                          f"--build {folder.name}, or give a --model")
        raise Problem(f"--model {name}: no config.json there; give a checkpoint folder or a name "
                      "on the hub")
    try:        # a folder from elsewhere runs no code here: neither its modules nor a pickle
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        sees = getattr(config, "vision_config", None) is not None
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model, found = kind.from_pretrained(
            name, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True,
            output_loading_info=True)
        if found["missing_keys"]:       # transformers would go on with random numbers
            raise ValueError(f"{len(found['missing_keys'])} of its tensors are missing")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:      # the loaders raise a dozen types for one thing: cannot load
        raise Problem(f"--model {name}: {why_not(error, local)}") from None
    processor, why_blind = load_processor(name, local, config) if sees else (None, "")
    backbone = wrap_backbone(model.to(device).eval(), tokenizer, name, processor)
    backbone.why_blind = why_blind or backbone.why_blind
    return checkpointed(backbone) if grad_checkpoint else backbone


def why_not(error, local):
    """What a failed load needs, in one line. local: a folder was asked for, not the hub."""
    said = str(error).strip() or type(error).__name__
    if not local and "gated" in said:
        return ("its owner asks for consent first: log in on its page on the hub, accept the "
                "licence, then run `hf auth login` here")
    if not local and "valid model identifier" in said:
        return "the hub knows no model of that name, or hides it from you: `hf auth login` first"
    if not local and "connect" in said:
        return ("it is not on this machine and the hub cannot be reached: download it where there "
                "is a network (`hf download NAME --local-dir FOLDER`) and give that folder")
    return (f"cannot load it ({said.splitlines()[0][:200]}). Give a folder with config.json, "
            "model.safetensors and a tokenizer, or a hub name you have access to")


def wrap_backbone(model, tokenizer, name="model", processor=None):
    """Find the chat markup, the end tokens and the banned tokens of a model. Returns a Backbone."""
    template = getattr(tokenizer, "chat_template", None) or getattr(
        processor, "chat_template", None)       # some vision-language models keep it there only
    if not template:
        raise Problem(f"--model {name}: its tokenizer has no chat template; use an instruct model")
    tokenizer.chat_template = template
    # Real chat templates are programs. Rather than imitate each, render one conversation with
    # marker words and cut it at the markers.
    dated = {"date_string": "26 Jul 2024"}      # Llama 3 prints today's date otherwise
    marks = ("UUU", "AAA", "FFF")
    trouble = "drops or repeats turns; unsupported"
    for in_parts in (False, True):  # SmolVLM's and LLaVA's lose a turn that is not a list of parts
        talk = [{"role": role, "content": [{"type": "text", "text": word}] if in_parts else word}
                for role, word in zip(("user", "assistant", "user"), marks)]
        try:
            whole, once = (tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **dated)
                for turns in (talk, talk[:1]))
        except Exception as error:      # a template is a program of somebody else's
            trouble = f"fails ({error})"
            continue
        if [whole.count(w) for w in marks] == [1, 1, 1] and once.count("UUU") == 1:
            break
    else:
        raise Problem(f"--model {name}: its chat template {trouble}")
    before_first, before_answer = once.split("UUU")
    before_picture, why_blind = "", "" if processor is not None else Backbone.why_blind
    if processor is not None:
        shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "UUU"}]}]
        try:
            whole_shown = tokenizer.apply_chat_template(
                shown, chat_template=processor.chat_template or template, tokenize=False,
                add_generation_prompt=True, **dated)
            before_picture, after_shown = whole_shown.split("UUU")
            if after_shown != before_answer:
                raise ValueError("it changes more than the start of a turn")
        except Exception as error:      # in words it may still do well
            processor, why_blind = None, f"its chat template does not take a picture ({error})"
    after_answer = whole.split("AAA")[1].split("FFF")[0]
    end_id = (tokenizer(after_answer, add_special_tokens=False)["input_ids"] or [None])[0]
    end_text = "" if end_id is None else tokenizer.convert_ids_to_tokens(end_id)
    if not end_text or not after_answer.startswith(end_text):
        raise Problem(f"--model {name}: its chat template has no end-of-turn token; unsupported")
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, (list, tuple)) else [listed, tokenizer.eos_token_id]
    # A sampled picture placeholder makes the next forward pass ask for a picture that is not there.
    config = model.config
    banned = {getattr(config, key, None) for key in
              ("image_token_index", "image_token_id", "video_token_id", "vision_start_token_id",
               "vision_end_token_id")}
    text = config.get_text_config()
    if getattr(text, "final_logit_softcapping", None):
        raise Problem(f"--model {name}: it bends its logits (soft-capping); not supported")
    # The sampler's columns have gaps; a window counted in columns would not be one of tokens.
    if set(getattr(text, "layer_types", None) or []) - {"full_attention"}:
        raise Problem(f"--model {name}: some of its layers do not attend to all that was said "
                      "(sliding windows, or no attention); not supported")
    # (Its length would not do: some list tokens, for padding say, that no text turns into.)
    used = tokenizer(whole + string.printable, add_special_tokens=False)["input_ids"]
    if max(used) >= model.get_input_embeddings().weight.shape[0]:
        raise Problem(f"--model {name}: its tokenizer knows more tokens than the model has: they "
                      "do not belong together")
    rows = model.get_output_embeddings().weight.shape[0]
    return Backbone(model, tokenizer,
                    end_ids=list(dict.fromkeys([end_id] + [i for i in listed if type(i) is int])),
                    banned=sorted(i for i in banned if type(i) is int and i < rows),
                    before_first=before_first, before_answer=before_answer,
                    before_next=after_answer[len(end_text):], processor=processor,
                    why_blind=why_blind, before_picture=before_picture)


def checkpointed(backbone):
    """Switch gradient checkpointing on; `learning_mode` says when it is at work."""
    # Recompute each layer's activations in the backward pass instead of keeping them: about a
    # third more time, a fraction of the memory, and bit-equal gradients. (Newer releases of
    # transformers renamed the call.)
    model = backbone.model
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    backbone.checkpointing = True
    return backbone


def precision(backbone):
    """The context of a forward pass: float32 weights are multiplied in bf16 on a GPU.

    On a CPU they stay float32. Weights that are bf16 already need no autocast: the model's own code
    takes its norms and softmax to float32. Log-probabilities and the critic are float32 throughout.
    """
    on = backbone.device.type == "cuda" and backbone.model.dtype == torch.float32
    return torch.autocast(backbone.device.type, torch.bfloat16, enabled=on)


def task_parameters(model, pictures=False):
    """The paper's N: all parameters for a task in pictures, for text those that text reaches."""
    skip = set() if pictures else picture_parameters(model)
    return sum(p.numel() for name, p in model.named_parameters() if name not in skip)


def freeze(model, what):
    """Keep a part as it is, as the paper's ablation of SFT in pictures does (Fig. 16).

    what: "vision" for the eyes; "adapter" for the eyes and the projector behind them; None or
    "none" for nothing. Layers that look at a picture (Mllama) belong to the language model here.
    Raises Problem if the model has no such part.
    """
    eyes = ("vision_model", "vision_tower", "visual.blocks", "visual.patch_embed")
    parts = {"vision": eyes,
             "adapter": (*eyes, "multi_modal_projector", "connector", "visual.merger")}
    parts = parts.get(what, ())
    frozen = [p for name, p in model.named_parameters() if any(part in name for part in parts)]
    if parts and not frozen:
        raise Problem(f"--freeze {what}: this model has no such part")
    for parameter in frozen:
        parameter.requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# 3. Conversation -> token ids and loss mask
# ------------------------------------------------------------------------------------------------


def user_ids(backbone, text, first):
    """Token ids of a user turn with its markup, up to where the answer begins."""
    before = backbone.before_first if first else backbone.before_next
    return backbone.tokenizer(before + text + backbone.before_answer,
                              add_special_tokens=False)["input_ids"]


def answer_ids(backbone, text):
    """Token ids of an assistant turn, closed by the end-of-turn token (it is learnt too)."""
    return backbone.tokenizer(text, add_special_tokens=False)["input_ids"] + backbone.end_ids[:1]


def encode(backbone, conversation):
    """Token ids and loss mask of a conversation, both lists of the same length.

    One that opens with a picture has a third entry, the picture as tensors (`encode_picture`).

    Segments are tokenised apart and joined, because that is what RL sees: a prompt, then sampled
    ids, then a message. Encoding the whole text at once could merge tokens across the border, and
    the mask would be off by one there.

        turn      user: prompt         assistant: answer      user     assistant
        ids       <u> 4 cards <e> <a>  {"cards"...}  <end>    <u> ...  {...}  <end>
        mask       0   0   0   0   0      1   1   1    1       0 ...     1      1
                                      (all 0 where learn is False: a mistake, shown not taught)
    """
    ids, mask, pictures = [], [], []
    for i, turn in enumerate(conversation):
        if turn.get("image") is not None:
            assert i == 0, "a picture belongs to the first turn"
            part, picture = encode_picture(backbone, turn["content"], turn["image"])
            pictures.append(picture)
        elif turn["role"] == "user":
            part = user_ids(backbone, turn["content"], first=i == 0)
        else:
            part = answer_ids(backbone, turn["content"])
        ids += part
        mask += [int(turn["learn"])] * len(part)
    mask[0] = 0                     # nothing comes before it: it cannot be predicted
    return ids, mask, *pictures


def pad(rows, fill=0):
    """Lists of different length -> (B, T) int64 tensor, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [fill] * (longest - len(row)) for row in rows])


# ------------------------------------------------------------------------------------------------
# 4. Log-probabilities
# ------------------------------------------------------------------------------------------------


def trunk(backbone, ids, lengths, pictures=None):
    """Hidden states of the whole transformer, before the output layer makes logits of them.

    "Trunk" means this part everywhere: the policy's output layer and the critic stand on it.
    ids (B, T) right-padded, lengths (B,) -> hidden (B, T, H).
    pictures: None, or for each row what `encode_picture` made of its picture, None where the row
    is text.
    Padding stands to the right and attention is causal, so no real token ever looks at it.
    """
    count = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    inside = count < lengths[:, None]
    # a plain count is what every model takes by itself
    where = ({"position_ids": token_positions(backbone, pictures, count)}
             if mrope(backbone.model) else {})
    with precision(backbone):
        return backbone.model.base_model(
            input_ids=ids, attention_mask=inside.long(), use_cache=False, **where,
            **picture_inputs(backbone, ids, pictures or [])).last_hidden_state


def token_logprobs(backbone, hidden, ids, mask, temperature=1.0):
    """log p of every masked token given all tokens before it.

    hidden (B, T, H), ids (B, T), mask (B, T) with 1 on the tokens to score (never at position 0).
    Returns (logprobs, entropy), both (N,) float32, row by row in reading order.

    THE SHIFT: hidden[:, t] has read tokens 0..t and predicts token t+1. The first answer token is
    predicted at the last prompt position, and nothing is predicted after the last token:

        position      0    1    2    3    4
        token         u    q    a1   a2   <end>
        mask          0    0    1    1    1
        scored by          h1   h2   h3          log p(ids[t]) comes from hidden[t - 1]

    The vocabulary projection runs on the N answer positions only: on a real model (V = 128k) the
    logits of the prompt alone would be gigabytes.
    """
    assert hidden.shape[:2] == ids.shape == mask.shape, (hidden.shape, ids.shape, mask.shape)
    assert not mask[:, 0].any(), "nothing comes before position 0: it cannot be scored"
    wanted = mask[:, 1:].bool()
    with precision(backbone):
        logits = backbone.model.get_output_embeddings()(hidden[:, :-1][wanted])     # (N, V)
    # float32 before the softmax: a log p in bf16 is rounded to 1/32 or worse, and that alone moves
    # a PPO ratio by 3 %. (The logits themselves are bf16 where the weights are, or autocast is.)
    logits = logits.float() / temperature
    if backbone.banned:
        logits[:, backbone.banned] = -torch.inf
    logprobs = torch.log_softmax(logits, dim=-1)                                    # (N, V)
    entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs.isinf(), 0)).sum(-1)
    return logprobs.gather(1, ids[:, 1:][wanted][:, None])[:, 0], entropy


# ------------------------------------------------------------------------------------------------
# 5. and 6. Loss, gradients, one step of the optimiser
# ------------------------------------------------------------------------------------------------


def sft_loss(backbone, rows, micro_batch, backward=True):
    """Mean negative log-probability over ALL answer tokens of the batch.

    rows: list of (ids, mask) or (ids, mask, picture). The mean is taken over the whole batch,
    however it is cut into micro-batches: each micro-batch contributes sum / total, so the gradient
    is the same. (A mean of micro-batch means would weigh tokens of short batches more.)
    Returns (loss as a float, number of tokens fed). With backward=True gradients are accumulated.
    """
    learning_mode(backbone, backward)
    total = sum(sum(row[1]) for row in rows)
    rows = sorted(rows, key=lambda row: len(row[0]))    # neighbours of like length: little padding
    loss_sum = fed = 0
    for start in range(0, len(rows), micro_batch):
        part = rows[start:start + micro_batch]
        ids = pad([r[0] for r in part]).to(backbone.device)
        mask = pad([r[1] for r in part]).to(backbone.device)
        lengths = torch.tensor([len(r[0]) for r in part], device=backbone.device)
        pictures = [r[2] if len(r) > 2 else None for r in part]
        with torch.set_grad_enabled(backward):
            hidden = trunk(backbone, ids, lengths, pictures)
            logprobs, _ = token_logprobs(backbone, hidden, ids, mask)
            loss = -logprobs.sum() / total
        if backward:
            loss.backward()
        loss_sum += loss.item()
        fed += int(lengths.sum())
    return loss_sum, fed


def learning_mode(backbone, on):
    """Switch gradient checkpointing on for a backward pass, if it was asked for.

    Hugging Face ties it to train mode; sampling in train mode with checkpointing gives wrong
    tokens, silently. So: train mode for backward passes of checkpointed models, else eval mode.
    """
    backbone.model.train(on and backbone.checkpointing)


def learning_rate(step, steps, peak, warmup, cooldown=0):
    """Linear warm-up over `warmup` steps, then a cosine to 0 at `steps`. step counts from 0.

    With a cooldown the cosine aims at 1.6 * steps, and a line over the last `cooldown` steps takes
    it to 0 at `steps`: more time at a high rate, for building a model from nothing.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    end = 1.6 * steps if cooldown else steps
    rate = peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, end - warmup)))
    return rate * min(1.0, (steps - step) / cooldown) if cooldown else rate


def adamw(groups, betas, **more):
    """The optimiser: torch's AdamW, or AdamW16 where weights are bfloat16.

    groups: list of {"params": [...], "lr": ...}. eps as in the paper's scripts, no weight decay.
    """
    if any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
        return AdamW16(groups, betas)
    return torch.optim.AdamW(groups, betas=betas, eps=1e-7, weight_decay=0.0, **more)


def take_step(backbone, optimizer, norms):
    """Take an optimiser step and drop the gradients, if all their norms are finite.

    A step that is not finite is reported and not applied. After three in a row something is wrong
    with more than one batch: see `check_refused`. Returns whether the step was taken.
    """
    fine = all(map(torch.isfinite, norms))
    if fine:
        optimizer.step()
        backbone.refused = 0
    else:
        backbone.refused += 1
        tqdm.write("a gradient is not finite: this step is not taken")
    optimizer.zero_grad(set_to_none=True)
    return fine


def check_refused(backbone, path):
    """Stop after three refused steps in a row; the caller has saved `path`. Raises Problem."""
    if backbone.refused >= 3:
        raise Problem(f"three gradients in a row were not finite. The weights from before them "
                      f"are in {path}: go on from there, or from an earlier checkpoint, with a "
                      "lower --lr (rl.py --init, sft.py --model)")


# ------------------------------------------------------------------------------------------------
# 2.-7. The loop, and what it is given for a task
# ------------------------------------------------------------------------------------------------


def train(backbone, draw, folder, steps, lr, warmup, save_at, micro_batch=64, resume=False,
          probe=None, report=None, stop_at=None, cooldown=0, pictures=False):
    """The supervised loop.

    draw(step) -> list of conversations, a function of the step alone, so that a resumed run sees
    what an unbroken one would have seen. lr: the peak; it decays to 0 at `steps`, also when the
    run ends earlier, at `stop_at`. save_at: steps after which `step-000123` is written.
    probe(backbone) -> dict of extra metrics for each checkpoint; report(row) shows its metrics.
    pictures: FLOPs are counted for the whole model, not for its text part.
    Returns the path of the last checkpoint.
    """
    stop_at = stop_at or steps
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = backbone.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    # beta2 as in the paper's SFT scripts; fused: one pass over memory for each tensor
    optimizer = adamw([{"params": parameters, "lr": lr}], (0.9, 0.98), fused=True)
    first, tokens = 0, 0
    if resume and checkpoints(folder):
        first, path = checkpoints(folder)[-1]
        state = load_state(path, ("optimizer", "tokens"))
        restored = load_backbone(path, dtype=str(model.dtype).removeprefix("torch."))
        restore(path, [(model, restored.model.state_dict()), (optimizer, state["optimizer"])])
        tokens = whole_number(state["tokens"], path)
    metrics = Metrics(folder, resume_at=first if resume else None)
    count = task_parameters(model, pictures)

    def save(step):
        """Write step-000123. Returns its folder."""
        save_checkpoint(folder / f"step-{step:06d}", backbone,
                        {"optimizer": optimizer.state_dict(), "tokens": tokens})
        return folder / f"step-{step:06d}"

    began, losses = time.time(), []
    bar = tqdm(range(first, stop_at), initial=first, total=stop_at, desc="sft", unit="step",
               leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup, cooldown)
        # --- 2. draw, 3. encode
        rows = [encode(backbone, conversation) for conversation in draw(step)]
        # --- 4. forward, 5. loss, 6. backward: `sft_loss` adds up the gradients of micro-batches
        try:
            loss, fed = sft_loss(backbone, rows, micro_batch)
        except torch.OutOfMemoryError:
            if step > first:                # no step was half taken: the weights are sound
                save(step)
            raise
        take_step(backbone, optimizer, [torch.nn.utils.clip_grad_norm_(parameters, 1.0)])
        tokens += fed
        losses.append(loss)
        # --- 7. measure and save
        if step + 1 in save_at or step + 1 == stop_at or backbone.refused >= 3:
            row = {"step": step + 1, "loss": sum(losses) / len(losses), "tokens": tokens,
                   "flops": 6 * count * tokens, "lr": optimizer.param_groups[0]["lr"]}
            row |= probe(backbone) if probe else {}
            row["seconds"] = time.time() - began
            # metrics first: killed between the two, the run goes on from the checkpoint before,
            # and this row is written again
            metrics.write(row)
            check_refused(backbone, save(step + 1))
            losses = []
            if report:
                report(row)
        elif bar.disable and (step + 1) % max(1, stop_at // 10) == 0:
            left = (time.time() - began) / (step + 1 - first) * (stop_at - step - 1)
            print(f"  step {step + 1}/{stop_at}  loss {loss:.3f}  {left / 60:.1f} min left",
                  flush=True)
        bar.set_postfix(loss=f"{loss:.3f}")
    last = folder / f"step-{stop_at:06d}"       # resumed beyond `stop_at`: the newest
    return last if last.exists() else checkpoints(folder)[-1][1]


def run_sft(args, folder, stop_at=None, report=None, backbone=None):
    """Fine-tune on expert answers under the training rule. Returns the last checkpoint.

    backbone: the loaded model; None loads args.model.

    The data and the learning-rate schedule depend on (seed, steps, batch, lr) alone, so the START
    of RL (stop_at = args.start_step) is to the last bit a point of the longer SFT run it is later
    compared with.
    """
    backbone = backbone or open_backbone(args)
    freeze(backbone.model, args.freeze)
    options, name = game_options(args), args.task.split("-")[0]
    expert = ENVIRONMENTS[name].expert_conversation

    def draw(step):
        """The batch of a step: expert conversations of the training split."""
        rng = np.random.default_rng([2, args.seed, step])
        made = [expert(rng, split=args.split, **options) for _ in range(args.batch)]
        if args.drop_pictures:
            for first, *_ in made:
                first.pop("image", None)
        return made

    def held_out(*shifts):
        """256 encoded conversations of the validation split; several shifts take turns."""
        rng = np.random.default_rng([3])
        how = {"split": "val"} | options
        return [encode(backbone, expert(rng, **how | shifts[i % len(shifts)])) for i in range(256)]

    asked = {"id": held_out({})}
    if args.ood:        # what differs from training: the rule; then what meets the eye
        asked["ood"] = held_out({"gp": {"rule": "face", "face": True},
                                 "virl": {"rule": "relative"}}[name])
    if args.ood and args.task == "gp-vl":
        asked["visual"] = held_out({"suits": "red"})
    elif args.ood and name == "virl":
        asked["visual"] = held_out(*({"where": place, "split": "all"} for place in places(args)[1]))

    def probe(backbone):
        """How surprised is the model by right answers it was not trained on?

        Under the new rule this climbs while the training loss falls: memorisation, seen without
        playing a single game.
        """
        return {f"{name}_nll": sft_loss(backbone, rows, args.micro_batch, backward=False)[0]
                for name, rows in asked.items()}

    warm, every = 0.03 if args.preset == "paper" else 0.01, args.save_every
    save_at = set(range(every, args.steps + 1, every)) | {args.start_step}
    save_at |= {s for s in (20, 40, 80, 150) if s < args.steps and every > 20}
    return train(backbone, draw, folder, args.steps, args.lr, warmup=max(1, int(warm * args.steps)),
                 save_at=save_at, micro_batch=args.micro_batch, resume=args.resume, probe=probe,
                 report=report, stop_at=stop_at, pictures=pictured(args.task))


def game_options(args):
    """What a task asks of its training games, beside the split: arguments of its environment.

    GP-VL trains on black suits, so that red ones are a visual shift (paper, section 5.2); V-IRL on
    the walks of one city.
    """
    options = {}
    if args.task.startswith("virl"):
        options["where"] = places(args)[0]
    elif args.task == "gp-vl":
        options["suits"] = "black"
    return options | picture_options(args)


def picture_options(args):
    """How a task shows its pictures: arguments of its environment, none for a task in words."""
    if not pictured(args.task):
        return {}
    return {"picture": picture_size(args.picture_size)} | (
        {} if args.announce else {"announce": False})


def picture_size(text):
    """"640x320" -> (640, 320), pixels; None -> gp_env.PICTURE_SIZE. Raises Problem."""
    if text is None:
        return gp_env.PICTURE_SIZE
    width, _, height = text.lower().partition("x")
    least = gp_env.PICTURE_SIZE
    if not (width.isdecimal() and height.isdecimal() and least[0] <= int(width) <= 4096
            and least[1] <= int(height) <= 4096):
        raise Problem(f"--picture-size {text}: give WIDTHxHEIGHT in pixels, from {least[0]}x"
                      f"{least[1]} to 4096x4096")
    return int(width), int(height)


def places(args):
    """V-IRL: (where training walks, [where the visual OOD is measured]).

    Each is what virl_env.open_atlas takes: a generated city's name, or a folder of routes.
    """
    return args.routes or TRAINING_CITY, [args.other_routes] if args.other_routes else OTHER_CITIES


def check_routes(args):
    """Read all routes of V-IRL before any work is done. Raises Problem, or RouteProblem.

    A missing panorama would otherwise be found when the first walk comes by, perhaps after hours.
    Routes are needed in each split that will be measured: evaluate.py has a flag for them, the
    others measure on what they hold out.
    """
    splits = getattr(args, "splits", ("val", "test"))
    for flag, folder, needed in (("--routes", args.routes, splits),
                                 ("--other-routes", args.other_routes, ["all"])):
        if folder and not args.task.startswith("virl"):
            raise Problem(f"{flag}: {args.task} has no routes; add --task virl-l or virl-vl")
        for split in needed if folder else ():
            virl_env.split_routes(len(virl_env.open_atlas(folder, pictured(args.task))), split)


def pictured(task):
    """True for a task in pictures."""
    return task.endswith("-vl")


def check_sight(backbone, task, name):
    """Refuse to show pictures to a model that cannot see. Raises Problem."""
    if pictured(task) and backbone.processor is None:
        raise Problem(f"--task {task}: {name} cannot see: {backbone.why_blind}")


# ------------------------------------------------------------------------------------------------
# Run folders: checkpoints are written aside and moved into place: a kill never leaves half of one
# ------------------------------------------------------------------------------------------------


def save_checkpoint(folder, backbone, state=None):
    """Write a checkpoint folder in one atomic move: Hugging Face files plus state.pt.

    state: a dict of tensors, numbers, strings and containers of those (what weights_only can read).
    """
    folder = pathlib.Path(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        backbone.model.save_pretrained(aside)
        backbone.tokenizer.save_pretrained(aside)
        if backbone.processor is not None:
            backbone.processor.save_pretrained(aside)
        if state is not None:
            torch.save(state, aside / "state.pt")
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.rename(old)
            aside.rename(folder)
            shutil.rmtree(old)
        else:
            aside.rename(folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) or not isinstance(error, Exception):
            raise
        # torch and safetensors have errors of their own for a disk that is full
        said = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise Problem(f"{folder} cannot be written ({said}): is the disk full? Nothing saved "
                      "before is lost") from None


def clear_up(folder):
    """After a kill: finish or undo what save_checkpoint had begun in this folder."""
    for aside in pathlib.Path(folder).glob(".*.*.tmp"):
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()      # half written
    for old in pathlib.Path(folder).glob(".*.*.old"):
        whole = old.with_name(old.name[1:].rsplit(".", 2)[0])
        if whole.exists():
            shutil.rmtree(old)                          # the new one is in place
        else:
            old.rename(whole)                           # killed between the two moves


def whole_number(value, path):
    """`value`, a count of tokens that a checkpoint told. Raises Problem if it is none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Problem(f"{path}: state.pt counts {str(value)[:40]!r} tokens: not from this project, "
                      "or damaged; go on from another checkpoint")
    return value


def load_state(folder, keys=()):
    """Read state.pt of a checkpoint, a dict with at least these keys.

    Raises Problem if it is missing, damaged, not plain data, or the state of something else.
    """
    try:
        state = torch.load(pathlib.Path(folder) / "state.pt", map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or set(keys) - set(state):
            raise ValueError("other contents")
        return state
    except FileNotFoundError:
        raise Problem(f"{folder}: no state.pt there: not a checkpoint to resume from") from None
    except Exception as error:
        raise Problem(f"{folder}: state.pt is damaged ({type(error).__name__}); delete this "
                      "checkpoint folder and resume from the one before") from None


def restore(path, pairs):
    """Give saved states back to their owners. pairs: (owner, what its state_dict() was).

    Raises Problem if one does not fit: the checkpoint in `path` is of another run, or damaged.
    """
    try:
        for owner, saved in pairs:
            owner.load_state_dict(saved)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:          # each owner has errors of its own
        raise Problem(f"{path}: state.pt does not fit this run ({type(error).__name__}); delete "
                      "this checkpoint folder and resume from the one before") from None


def checkpoints(folder):
    """The complete checkpoints of a run folder, oldest first, as (step, path)."""
    found = [(int(p.name.rsplit("-", 1)[1]), p) for p in pathlib.Path(folder).glob("step-*")
             if p.name.rsplit("-", 1)[1].isdecimal() and (p / "config.json").exists()]
    return sorted(found)


def write_json(path, value):
    """Write a small JSON file atomically."""
    aside = pathlib.Path(path).with_name(f".{pathlib.Path(path).name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    aside.rename(path)


def read_json(path):
    """The dict in a JSON file; {} if there is none, or none that can be read."""
    try:
        value = json.loads(pathlib.Path(path).read_text())
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def read_lines(path):
    """The rows (dicts) of a .jsonl file, [] if there is none; a damaged last line is dropped.

    Raises Problem for one further up: what stands behind it would be lost.
    """
    rows = []
    if pathlib.Path(path).exists():
        lines = pathlib.Path(path).read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError
                rows.append(row)
            except (ValueError, RecursionError):
                if number < len(lines):         # the last one may have been cut by a kill
                    raise Problem(f"{path}, line {number}: damaged; mend it, or move the file "
                                  "away") from None
    return rows


class Metrics:
    """A .jsonl file of a run: one object a line, flushed at once.

    On resume, lines written after the checkpoint that training goes on from are dropped: they will
    be written again, the same. Keys that begin with "seconds" are the only ones that may differ.
    """

    def __init__(self, folder, resume_at=None, name="metrics.jsonl"):
        self.path = pathlib.Path(folder) / name
        kept = [] if resume_at is None else [
            row for row in read_lines(self.path)
            if isinstance(row.get("step"), int) and row["step"] <= resume_at]
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        aside.rename(self.path)
        self.file = open(self.path, "a", buffering=1)

    def write(self, row):
        """Append one row (a dict with "step"). JSON has no nan or infinity: null."""
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value
               for key, value in row.items()}
        self.file.write(json.dumps(row) + "\n")


def open_run(folder, args, kind):
    """Create a run folder and write args.json, or check that --resume goes on with the same run."""
    folder = pathlib.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise Problem(f"--out {folder}: that is a file, not a folder")
    free = ("resume", "out", "threads", "device", "stop_step", "micro_batch", "grad_checkpoint",
            "dry_run", "random_weights", "record", "sample_batch")
    # ... these change no result (the last one the draws, not what they are drawn from); with any
    # other flag changed, --resume would mix two runs
    settings = {"kind": kind} | {k: v for k, v in vars(args).items() if k not in free}
    if HERE in pathlib.Path(args.model).parents:        # the same run, wherever the project lies
        settings["model"] = str(pathlib.Path(args.model).relative_to(HERE))
    known = folder / "args.json"
    if known.exists():
        if not args.resume:
            raise Problem(f"{folder} holds a run already: add --resume to go on with it, or give "
                          "another --out")
        before = read_json(known)
        if not before:
            raise Problem(f"{known} is damaged: give another --out")
        # a key that is not there is a flag that did not exist then
        changed = sorted(k for k in settings if (k in before or k == "kind")
                         and before.get(k) != settings[k])
        if changed:
            raise Problem(f"--resume: {folder} was started with another --"
                          f"{changed[0].replace('_', '-')} ({before.get(changed[0])}, now "
                          f"{settings[changed[0]]})")
    elif checkpoints(folder) or (folder / "metrics.jsonl").exists():
        raise Problem(f"{folder} holds a run without its args.json: give another --out")
    elif args.resume and folder.exists() is False:
        raise Problem(f"--resume: there is no run in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    clear_up(folder)
    write_json(known, settings)
    return folder


# ------------------------------------------------------------------------------------------------
# Pictures. Nothing from here to the next heading is called in a text task.
#
# A language model sees in one of two ways, and these functions keep them apart:
#   placeholders (LLaVA, Idefics3,  the picture takes k places of the sequence; what the eyes saw
#   SmolVLM, Qwen2.5-VL)            stands there instead of embeddings, attended to as text is
#   crossing (Mllama, the paper's)  one mark in the sequence; a few layers of their own attend from
#                                   every token after the mark to the picture, behind gates. Text
#                                   without a picture skips these layers
# Either way the tensors of a picture travel with their row, and rows of a batch may differ.
# ------------------------------------------------------------------------------------------------


def crossing_layers(model):
    """Numbers of the layers that attend to a picture (Mllama); [] where pictures are tokens."""
    return list(getattr(model.config.get_text_config(), "cross_attention_layers", None) or [])


def mrope(model):
    """True for positions in three dimensions (time, height, width), as in Qwen2.5-VL."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return "mrope_section" in rope


def picture_parameters(model):
    """Names of the parameters that only pictures reach: eyes, projector, layers that look."""
    parts = ["vision", "multi_modal", "visual", "connector"]
    parts += [f"language_model.layers.{i}." for i in crossing_layers(model)]
    return {name for name, _ in model.named_parameters() if any(part in name for part in parts)}


@dataclass
class Pictures:
    """A processor that does nothing but pictures: Qwen2.5-VL's own wants torchvision for videos."""

    image_processor: object
    chat_template: str

    def save_pretrained(self, folder):
        """Write preprocessor_config.json; the tokenizer saves the template."""
        self.image_processor.save_pretrained(folder)


def load_processor(name, local, config):
    """What turns pictures into tensors for a vision-language model: (processor, "").

    Or (None, why there is none): a text task does not mind. local: name is a folder.
    """
    from transformers import AutoImageProcessor, AutoProcessor, Idefics3Processor, ProcessorMixin
    files = ("processor_config.json", "preprocessor_config.json")
    if local and not any((pathlib.Path(name) / file).exists() for file in files):
        return None, ("it has eyes, but was never trained to see (no processor_config.json); "
                      "python sft.py --build gp-eyes (or virl-eyes) teaches the small backbone")
    try:
        if config.model_type in ("qwen2_vl", "qwen2_5_vl"):
            return Pictures(AutoImageProcessor.from_pretrained(name, backend="pil",
                                                               trust_remote_code=False),
                            ProcessorMixin.get_processor_dict(name)[0].get("chat_template")), ""
        # SmolVLM's processor asks for torchvision, too; Idefics3's is the same without videos
        kind = Idefics3Processor if config.model_type == "smolvlm" else AutoProcessor
        processor = kind.from_pretrained(name, trust_remote_code=False)
    except Exception as error:      # as many types as in load_backbone
        return None, f"its picture processor does not load ({str(error).strip()[:200]})"
    if not hasattr(processor, "image_processor"):
        # The Auto class does this silently when it does not know the class that is asked for
        return None, "its picture processor came back as a bare tokenizer"
    return processor, ""


def encode_picture(backbone, text, image):
    """A first user turn that shows a picture -> (token ids, the picture as a dict of tensors).

    image: a PIL picture. Its place in the ids is one mark (Mllama: layers of its own look at the
    picture) or a run of placeholders that the trunk replaces by what the eyes saw (LLaVA, Idefics).
    Raises Problem if the model cannot see, or cannot see this.
    """
    if backbone.processor is None:
        raise Problem(f"the model cannot see: {backbone.why_blind}")
    size = getattr(image, "size", (0, 0))
    if getattr(image, "mode", "") != "RGB" or min(size) < 16 or max(size) > 16 * min(size):
        raise Problem(f"a picture must be RGB, 16 pixels or more a side and not 16 times as long "
                      f"as wide; this one is {getattr(image, 'mode', type(image))}, {size}")
    text = backbone.before_picture + text + backbone.before_answer
    if crossing_layers(backbone.model):
        ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
        seen = backbone.processor.image_processor([[image]], return_tensors="pt")
    elif mrope(backbone.model):
        mark = backbone.model.config.image_token_id
        ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
        seen = backbone.processor.image_processor([[image]], return_tensors="pt")
        patches = int(seen["image_grid_thw"].prod())
        at = ids.index(mark)
        ids[at:at + 1] = [mark] * (patches // backbone.processor.image_processor.merge_size ** 2)
        seen["shift"] = position_shift(backbone, ids, seen["image_grid_thw"])
    else:
        seen = backbone.processor(text=[text], images=[[image]], return_tensors="pt",
                                  add_special_tokens=False)
        ids = seen["input_ids"][0].tolist()
    # what is left is about the picture; its mask over the tokens has to grow with the
    # conversation, so it is made where the tokens are (cross_mask)
    apart = ("input_ids", "attention_mask", "token_type_ids", "num_tiles")
    return ids, {key: value for key, value in seen.items() if key not in apart}


def position_shift(backbone, ids, grid):
    """m-RoPE: by how much the positions of a first turn with a picture differ from a count.

    The patches of a picture share one time and count rows and columns, so that the text behind it
    goes on from a smaller number than its place in the sequence. ids: tokens of the turn; grid
    (1, 3): patches in time, height, width. Returns (1, 3, T) int64: add it to 0..T-1. Whatever
    follows is text and is shifted as the last token is.

        token     u  #  #  #  #  :         # four patches, 2 x 2
        count     0  1  2  3  4  5
        time      0  1  1  1  1  3         shift  0  0 -1 -2 -3 -2
        height    0  1  1  2  2  3                0  0 -1 -1 -2 -2
        width     0  1  2  1  2  3                0  0  0 -2 -2 -2
    """
    ids = torch.tensor([ids])
    kinds = (ids == backbone.model.config.image_token_id).int()
    where, _ = backbone.model.base_model.get_rope_index(ids, kinds, image_grid_thw=grid)
    return (where - torch.arange(ids.shape[1])).transpose(0, 1)


def token_positions(backbone, pictures, count):
    """Where each token of a batch stands: (B, T), for m-RoPE (3, B, T).

    pictures: for each row `encode_picture`'s tensors or None. count (B, T): tokens of the row
    before it.
    """
    if not mrope(backbone.model):
        return count
    shifts = [torch.zeros(3, 1, dtype=torch.long) if picture is None else picture["shift"][0]
              for picture in pictures or [None] * len(count)]
    longest = max(shift.shape[1] for shift in shifts)
    table = torch.stack([torch.cat([shift, shift[:, -1:].expand(-1, longest - shift.shape[1])], 1)
                         for shift in shifts], 1).to(count.device)              # (3, B, longest)
    at = count.clamp(max=longest - 1).expand(3, -1, -1)
    return count + table.gather(2, at)


def picture_inputs(backbone, ids, pictures):
    """What the trunk needs beside the tokens when some rows of a batch show a picture.

    ids (B, T). pictures: for each row the dict of tensors from `encode_picture`, or None in a row
    of text.
    Returns keyword arguments, none without a picture: text is read as if there were no eyes.
    """
    if all(picture is None for picture in pictures):
        return {}
    if not crossing_layers(backbone.model):
        # the placeholders take what was seen one by one, row after row
        return join_pictures(backbone, pictures)
    states, tiles = cross_states(backbone, pictures)
    return {"cross_attention_states": states,
            "cross_attention_mask": cross_mask(backbone, ids, tiles)}


def join_pictures(backbone, pictures):
    """The tensors of all pictures of a batch, joined. pictures: see `picture_inputs`."""
    shown = [picture for picture in pictures if picture is not None]
    try:
        # rows without a picture take no place here: the ids say whose picture comes next
        joined = {key: torch.cat([picture[key] for picture in shown]).to(backbone.device)
                  for key in shown[0] if key != "shift"}
        return {key: value.to(backbone.model.dtype) if value.is_floating_point() else value
                for key, value in joined.items()}
    except RuntimeError:
        raise Problem("the pictures of a batch differ in shape for this model: draw all in one "
                      "--picture-size") from None


def cross_states(backbone, pictures):
    """Mllama: what the eyes saw, for the layers that attend to it, and which tiles are in use.

    Returns (states (B, tiles * patches, H), tiles (B, tiles)), both 0 in rows of text. Left alone,
    transformers mixes up a batch with and without pictures: where a token may look at nothing it
    drops the mask, and the token attends to everything. With states of 0, keys and values are 0,
    and attention adds 0: a row of text is read as if alone.
    """
    base = backbone.model.base_model
    seen = join_pictures(backbone, pictures)
    states = base.multi_modal_projector(base.vision_model(**seen).last_hidden_state).flatten(1, 3)
    rows = torch.tensor([i for i, p in enumerate(pictures) if p is not None],
                        device=backbone.device)
    return [part.new_zeros(len(pictures), *part.shape[1:]).index_copy(0, rows, part)
            for part in (states, seen["aspect_ratio_mask"].flatten(1))]


def cross_mask(backbone, ids, tiles, looking=False):
    """Mllama: (B, T, 1, tiles), 1 where a token sees a tile: from its row's picture mark on.

    tiles (B, tiles) of `cross_states`. looking (B, 1): the mark came before these ids (B, T).
    """
    passed = (ids == backbone.model.config.image_token_index).cumsum(1) > 0            # (B, T)
    return ((passed | looking)[:, :, None] * tiles[:, None, :])[:, :, None, :]


# ------------------------------------------------------------------------------------------------
# Large models: an optimiser for bf16 weights; what a run would cost, before it is paid for
# ------------------------------------------------------------------------------------------------


def halve(master):
    """float32 -> (bfloat16, int16) of the same shape; `rejoin` gives back every bit.

    A bfloat16 is the upper half of a float32. Rounded to the nearest one (halves away from zero),
    what is left over is a number of -32768..32767: exactly what 16 bits can hold.
    """
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) & -0x10000
    return upper.view(torch.float32).bfloat16(), (bits - upper).to(torch.int16)


def rejoin(weight, rest):
    """(bfloat16, int16) -> the float32 that `halve` was given."""
    return (weight.float().view(torch.int32) + rest).view(torch.float32)


def stochastic(value, generator):
    """float32 -> bfloat16, rounded up or down by chance, so that the mean is the float32 value."""
    bits = value.view(torch.int32)
    noise = torch.randint(0, 0x10000, bits.shape, generator=generator, device=bits.device,
                          dtype=torch.int32)
    return ((bits + noise) & -0x10000).view(torch.float32).bfloat16()


class AdamW16:
    """AdamW without weight decay (Loshchilov and Hutter 2019) in 10 bytes a parameter, not 16.

    Why plain bf16 stands still: it has 8 bits of mantissa. The neighbours of a weight of 0.02 are
    1.2e-4 away, a step of Adam is about lr = 1e-6, and 0.02 + 1e-6 rounds back to 0.02. (Weights of
    standard deviation 0.02: after 100 equal steps they have moved by 2 % of what was asked.) The
    usual cure, float32 copies of weights and moments, needs 16 bytes a parameter: 171 GB at 11B.

                    bytes
        weight      2       bf16, what the model computes with
        gradient    2       bf16. A sum of 64 micro-batches is off by 1 % of its length, of 250
                            by 2 %, at random: little beside the noise of a batch
        rest        2       int16: weight and rest together are the float32 weight (`halve`)
        moments     2 + 2   bf16, rounded by chance. To the nearest they would stand still, too: at
                            beta2 = 0.999 the second one changes by 1/1000 of itself a step, and its
                            neighbours are 1/256 to 1/128 away

    107 GB at 11B; weights that no gradient reaches (text: the eyes) cost 2 bytes. The critic is
    float32 and keeps float32 moments. Used like an optimiser of torch. The generator of the random
    rounding is seeded with the number of the step, so there is no state of it to save.
    """

    def __init__(self, groups, betas, eps=1e-7, chunk=2 ** 24):
        self.param_groups, self.betas, self.eps = groups, betas, eps
        self.chunk = chunk      # weights at a time: float32 copies take 1 GB, not 400
        self.parameters = [p for group in groups for p in group["params"]]
        self.state, self.steps = [None] * len(self.parameters), 0

    @torch.no_grad()
    def step(self):
        """One step of every parameter that has a gradient."""
        self.steps += 1
        generator = torch.Generator(self.parameters[0].device).manual_seed(self.steps)
        rates = [group["lr"] for group in self.param_groups for _ in group["params"]]
        for i, (parameter, rate) in enumerate(zip(self.parameters, rates)):
            if parameter.grad is None:
                continue
            if self.state[i] is None:
                first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
                self.state[i] = {"step": 0, "first": first, "second": second,
                                 "rest": first.to(torch.int16)}
            state = self.state[i]
            state["step"] += 1
            whole = [parameter.grad.reshape(-1)] + [
                x.view(-1) for x in (parameter, state["first"], state["second"], state["rest"])]
            for parts in zip(*(x.split(self.chunk) for x in whole)):
                self._move(*parts, rate, state["step"], generator)

    def _move(self, gradient, weight, first, second, rest, rate, step, generator):
        """Change one chunk in place."""
        beta1, beta2 = self.betas
        half = weight.dtype == torch.bfloat16
        m = first.float() * beta1 + gradient.float() * (1 - beta1)
        v = second.float() * beta2 + gradient.float().square() * (1 - beta2)
        way = (m / (1 - beta1 ** step)) / ((v / (1 - beta2 ** step)).sqrt() + self.eps)
        moved = (rejoin(weight, rest) if half else weight) - rate * way
        if half:
            moved, new_rest = halve(moved)
            rest.copy_(new_rest)
        weight.copy_(moved)
        first.copy_(stochastic(m, generator) if half else m)
        second.copy_(stochastic(v, generator) if half else v)

    def zero_grad(self, set_to_none=True):
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self):
        """All that `load_state_dict` needs; plain data."""
        return {"steps": self.steps, "state": self.state}

    def load_state_dict(self, saved):
        """Go on from a `state_dict`, wherever its tensors lie."""
        self.steps = saved["steps"]
        self.state = [state and {key: torch.as_tensor(value).to(parameter.device)
                                 if key != "step" else value for key, value in state.items()}
                      for state, parameter in zip(saved["state"], self.parameters)]


# Published sizes; what is not said is the class's default.
KNOWN = {
    "meta-llama/Llama-3.2-11B-Vision-Instruct": {
        "model_type": "mllama", "vision_config": {"image_size": 560}},
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl", "tie_word_embeddings": True,
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
        "text_config": {
            "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "intermediate_size": 11008,
            "tie_word_embeddings": True, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}},
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default",
                                                         "rope_theta": 1e6}},
    "Qwen/Qwen2.5-0.5B-Instruct": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default",
                                                         "rope_theta": 1e6}}}


def random_backbone(name, task, device="cpu", grad_checkpoint=False, dtype="float32"):
    """A model of the class and size of `name`, with random weights and the small tokenizer.

    name: a folder with config.json, that file itself, or a key of KNOWN. Returns a Backbone. Raises
    Problem for another name, or a vocabulary that the tokenizer does not fit into.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    try:
        known = KNOWN.get(str(name))
        config = AutoConfig.for_model(**known) if known else AutoConfig.from_pretrained(name)
    except Exception:               # as many types as in load_backbone
        raise Problem(f"--random-weights: {name} is no config.json, no folder with one, and none "
                      f"of {', '.join(KNOWN)}") from None
    tokenizer = build_tokenizer(ENVIRONMENTS[task.split("-")[0]].phrases())
    mark = "<|image|>"
    if config.model_type in ("idefics3", "smolvlm"):        # names that their processor insists on
        mark = "<image>"
        tokenizer.add_special_tokens({"additional_special_tokens": [
            mark, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
            *(f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5))]})
        tokenizer.chat_template = tokenizer.chat_template.replace("<|image|>", mark)
    text, image = config.get_text_config(), tokenizer.convert_tokens_to_ids(mark)
    if text.vocab_size < len(tokenizer):
        raise Problem(f"--random-weights: {name} has a vocabulary of {text.vocab_size}, the small "
                      f"tokenizer needs {len(tokenizer)}; give a --model, e.g. "
                      "Qwen/Qwen2.5-0.5B-Instruct")
    for key in ("image_token_index", "image_token_id"):
        if hasattr(config, key):
            setattr(config, key, image)
    sees = getattr(config, "vision_config", None) is not None
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = true_processor(model, tokenizer, mark) if sees else None
    backbone = wrap_backbone(model, tokenizer, name, processor)
    return checkpointed(backbone) if grad_checkpoint else backbone


def true_processor(model, tokenizer, mark):
    """The picture processor of a model that has none in a file: its class's own defaults.

    mark: the token that stands for a picture. Raises Problem for a class that is not known here.
    """
    import transformers
    from transformers.models.idefics3 import image_processing_pil_idefics3 as idefics3
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl
    from transformers.models.siglip import image_processing_pil_siglip as siglip
    config, eyes = model.config, model.config.vision_config
    if config.model_type == "mllama":
        return build_processor(model, tokenizer)
    if mrope(model):
        return Pictures(qwen2_vl.Qwen2VLImageProcessorPil(
            patch_size=eyes.patch_size, merge_size=eyes.spatial_merge_size,
            temporal_patch_size=eyes.temporal_patch_size), tokenizer.chat_template)
    edge = eyes.image_size
    if config.model_type in ("idefics3", "smolvlm"):
        images = idefics3.Idefics3ImageProcessorPil(
            size={"longest_edge": 4 * edge}, max_image_size={"longest_edge": edge})
        return transformers.Idefics3Processor(
            images, tokenizer, chat_template=tokenizer.chat_template,
            image_seq_len=(edge // eyes.patch_size) ** 2 // config.scale_factor ** 2)
    if config.model_type == "llava":
        images = siglip.SiglipImageProcessorPil(size={"height": edge, "width": edge})
        return transformers.LlavaProcessor(
            images, tokenizer, patch_size=eyes.patch_size, image_token=mark,
            chat_template=tokenizer.chat_template,
            num_additional_image_tokens=int("clip" in eyes.model_type),     # CLIP's extra token
            vision_feature_select_strategy=config.vision_feature_select_strategy)
    raise Problem(f"--random-weights: pictures of {config.model_type} are not known here")


def open_backbone(args, name=None):
    """Load the model of a run, args.model or `name`, as its flags say. Returns a Backbone."""
    name, device = name or args.model, pick_device(args.device)
    if getattr(args, "random_weights", False):
        return random_backbone(name, args.task, device, args.grad_checkpoint, args.dtype)
    return load_backbone(name, device, args.grad_checkpoint, args.dtype)


def matrix_rate(device, dtype):
    """FLOP/s of multiplying large square matrices here: what nothing can be faster than."""
    size, repeats = (8192, 10) if device.type == "cuda" else (768, 1)
    # Noise: a GPU that multiplies constants takes less power and runs faster than on real numbers.
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0))
    a, best = a.to(dtype), math.inf
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(repeats):                # one alone would also time the wait for it
            product = a @ a
        product[0, 0].item()                    # reading one number waits for the GPU
        best = min(best, (time.perf_counter() - began) / repeats)
    return 2 * size ** 3 / best


def report_costs(backbone, phases, whole):
    """Print what a --dry-run has measured.

    phases: {name: (seconds, tokens, FLOPs)}; whole: what the run took in all, in seconds. FLOPs are
    those of the model (2 N a token forward, 4 N backward), without what checkpointing repeats and
    without attention, which is small at these lengths.
    """
    device, dtype, kept = backbone.device, backbone.model.dtype, ""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        kept = f" ({torch.cuda.max_memory_reserved(device) / 1e9:.2f} GB with gaps)"
    else:
        import resource                     # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    rate = matrix_rate(device, torch.bfloat16 if device.type == "cuda" else dtype)
    size = sum(p.numel() for p in backbone.model.parameters())
    print(f"dry run: {size:,} parameters in {dtype} on {device}, peak memory {peak / 1e9:.2f} GB"
          f"{kept}, matrices multiply at {rate / 1e12:.2f} TFLOP/s")
    for name, (seconds, tokens, flops) in phases.items():
        print(f"  {name:9s} {seconds:8.1f} s {tokens / seconds:12,.0f} tokens/s "
              f"{flops / seconds / rate:7.1%} of that rate")
    print(f"  a whole run of these flags: about {whole / 60:,.0f} minutes. Nothing was written",
          flush=True)


def dry_run(backbone, args):
    """Two optimiser steps of a run, the second one timed; print what the run would cost."""
    rng, expert = np.random.default_rng(0), ENVIRONMENTS[args.task.split("-")[0]]
    rows = [encode(backbone, expert.expert_conversation(rng, split=args.split,
                                                        **game_options(args)))
            for _ in range(args.batch)]
    parameters = [p for p in backbone.model.parameters() if p.requires_grad]
    optimizer = adamw([{"params": parameters, "lr": args.lr}], (0.9, 0.98))
    for _ in range(2):              # the first one also makes the optimiser's state
        began = time.time()
        _, fed = sft_loss(backbone, rows, args.micro_batch)
        take_step(backbone, optimizer, [torch.nn.utils.clip_grad_norm_(parameters, 1.0)])
        if backbone.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.time() - began
    size = task_parameters(backbone.model, pictured(args.task))
    report_costs(backbone, {"step": (seconds, fed, 6 * size * fed)},
                 seconds * (args.stop_step or args.steps))


# ------------------------------------------------------------------------------------------------
# The small backbones: a tokenizer of bytes and phrases, a tiny Mllama, a broad corpus
# ------------------------------------------------------------------------------------------------

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


# How the small backbones are built: optimiser steps in all, those of them that only repeat, those
# that recall lines of the prompt; batch.
BUILDS = {"gp": {"steps": 5000, "repeat": 0, "recall": 0, "batch": 64},
          "virl": {"steps": 2600, "repeat": 600, "recall": 400, "batch": 32}}


def build_backbone(name, folder, seed, steps, lr, resume, repeat=0, recall=0, batch=64):
    """Pretrain a small backbone on its environment's broad corpus, deterministic from the seed.

    name: a key of ENVIRONMENTS. Each has a vocabulary of its own: a fixed piece of a prompt is one
    token only where the tokenizer has met it, and on a laptop short prompts decide what can be
    done. repeat, recall: steps of two lessons before the corpus (`repeating`, and the environment's
    recall_conversations). Returns the folder of the backbone, backbones/NAME.
    """
    environment = ENVIRONMENTS[name]
    tokenizer = build_tokenizer(environment.phrases())
    backbone = wrap_backbone(build_model(tokenizer, seed).eval(), tokenizer)
    lessons = [(repeat, repeating([*environment.phrases(), *string.printable]), 7),
               (recall, getattr(environment, "recall_conversations", None), 8),
               (steps, environment.backbone_conversations, 1)]
    lessons = [(count, in_blocks(corpus, [seed, number], batch))
               for count, corpus, number in lessons]

    def draw(step):
        """The batch of a step, from the lesson that it falls into."""
        for count, lesson in lessons:
            if step < count:
                return lesson(step)
            step -= count

    save_at = set(range(0, steps, max(1, steps // 20)))
    began = time.time()

    def report(row):
        """One line a checkpoint."""
        print(f"step {row['step']:6d}/{steps}  loss {row['loss']:.4f}  "
              f"{row['tokens'] / 1e6:.1f} M tokens  {(time.time() - began) / 60:.1f} min",
              flush=True)

    last = train(backbone, draw, folder, steps, lr, warmup=200, save_at=save_at,
                 micro_batch=16, resume=resume, report=report, cooldown=int(0.4 * steps))
    clear_up(HERE / "backbones")
    bare = HERE / "backbones" / name        # ships without the optimizer's state
    save_checkpoint(bare, load_backbone(last))
    return bare


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


@torch.no_grad()
def read_right(backbone, name, which, count=64):
    """Share of what held-out pictures show that is read right, in 0..1.

    name: a key of ENVIRONMENTS. which: a key of gp_env.SUITS, and single cards are counted; or a
    city, and what stands in each of the four views. Teacher-forced: each word's token, given the
    picture and the words before it. Only for the small backbone, where each is one token.
    """
    token = backbone.tokenizer.convert_tokens_to_ids
    rows, asked = [], []
    for i in range(count):
        conversation, words = ENVIRONMENTS[name].reading_conversation(
            np.random.default_rng([4, i]), which, gp_env.PICTURE_SIZE)
        ids, mask, picture = encode(backbone, conversation)
        at = mask.index(1) - 1
        for word in words:
            at = ids.index(token(word), at + 1)
            asked.append((i, at))
        rows.append((ids, picture))
    ids = pad([row[0] for row in rows]).to(backbone.device)
    lengths = torch.tensor([len(row[0]) for row in rows], device=backbone.device)
    hidden = trunk(backbone, ids, lengths, [row[1] for row in rows])                # (B, T, H)
    row, at = torch.tensor(asked, device=backbone.device).T                         # (M,) each
    guess = backbone.model.get_output_embeddings()(hidden[row, at - 1]).argmax(-1)
    return (guess == ids[row, at]).float().mean().item()


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


def pretrain_tower(backbone, name, seed, steps, batch=32, peak=3e-3, report=None):
    """First lesson of the eyes, without a word: every patch names what its quarter shows.

    Taught through the language model alone, new eyes stay on a plateau for hundreds of steps: they
    put out noise, the language layers learn to ignore it, and what is ignored gets no gradient that
    tells it to see better. That is why real vision-language models graft a tower that can see
    already (Llama 3.2's learnt from captions).
    Here a linear head answers the environment's EYE_QUESTIONS (rank and suit of a card; kind of
    place in a view) off each patch of the quarter in question. Most of those patches show cloth,
    plain card or sky: to answer, they must ask their neighbours, and afterwards any of them can be
    asked. The head is thrown away.

    name: a key of ENVIRONMENTS. steps: of `batch` pictures. report(line) is told how it goes.
    """
    tower, images = backbone.model.base_model.vision_model, backbone.processor.image_processor
    questions = ENVIRONMENTS[name].EYE_QUESTIONS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = torch.nn.Linear(tower.config.vision_output_dim, sum(n for _, n, _ in questions))
    parameters = [*tower.parameters(), *head.to(backbone.device).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), eps=1e-7,
                                  weight_decay=0.0, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup=100, cooldown=int(0.4 * steps))
        lesson = ENVIRONMENTS[name].eye_lesson(np.random.default_rng([seed, 6, step]), batch,
                                               gp_env.PICTURE_SIZE)
        seen = images([[image] for image, _ in lesson], return_tensors="pt")
        seen = {key: seen[key].to(backbone.device)
                for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        # a tile's first state is not of a patch
        patches = by_quarter(tower(**seen).last_hidden_state[:, 0, :, 1:],
                             ENVIRONMENTS[name].EYE_COLUMNS)            # (B, 4, 32, 192)
        truth = torch.tensor([answers for _, answers in lesson])        # (B, 4, questions)
        truth = truth.to(backbone.device)[:, :, None].expand(-1, -1, patches.shape[2], -1)
        loss, said = 0, []
        for k, logits in enumerate(head(patches).split([n for _, n, _ in questions], dim=-1)):
            loss = loss + questions[k][2] * torch.nn.functional.cross_entropy(
                logits.flatten(0, 2), truth[..., k].flatten())
            right = (logits.argmax(-1) == truth[..., k]).float().mean().item()
            said.append(f"{questions[k][0]} {right:.1%}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if report and ((step + 1) % 100 == 0 or step + 1 == steps):
            report(f"tower {step + 1:6d}/{steps}  loss {loss.item():.4f}  patches that know "
                   f"their quarter: {', '.join(said)}")


# How the eyes of a backbone are built: steps of the two lessons, and on what their reading is
# watched meanwhile: the training look, and another. (A sign is smaller than a card, and takes
# longer to find.)
EYES = {"gp": {"tower": 1500, "steps": 750, "watch": ("black", "red")},
        "virl": {"tower": 2500, "steps": 750, "watch": (TRAINING_CITY, "wild-99")}}


def build_eyes(name, folder, seed, tower_steps, steps, batch, lr, resume):
    """Teach backbones/NAME to see, in two lessons; deterministic from the seed.

    First the tower alone (`pretrain_tower`, steps of a quarter of the work); then, with tower and
    text frozen, the projector and the layers that look learn to ask it, on the environment's
    pictured_conversations. Returns the folder of the backbone, which is replaced at the end.
    """
    bare, folder = HERE / "backbones" / name, pathlib.Path(folder)
    reader = load_backbone(bare)
    backbone = new_eyes(reader, seed)
    tower = backbone.model.base_model.vision_model
    if resume and (folder / "tower").is_dir():
        learnt = load_backbone(folder / "tower").model.base_model.vision_model
        tower.load_state_dict(learnt.state_dict())
    else:
        pretrain_tower(backbone, name, seed, tower_steps,
                       report=lambda line: print(line, flush=True))
        save_checkpoint(folder / "tower", backbone)
    for parameter in tower.parameters():
        parameter.requires_grad_(False)

    def corpus(rng, count):
        """The second lesson: conversations that open with a picture."""
        return ENVIRONMENTS[name].pictured_conversations(rng, count, gp_env.PICTURE_SIZE)

    def probe(backbone):
        """Share of what validation pictures show that is read right."""
        return {f"read_{which}": read_right(backbone, name, which)
                for which in EYES[name]["watch"]}

    def report(row):
        """One line a checkpoint."""
        seen = ", ".join(f"{which} {row[f'read_{which}']:.1%}" for which in EYES[name]["watch"])
        print(f"step {row['step']:6d}/{steps}  loss {row['loss']:.4f}  read right: {seen}  "
              f"{row['seconds'] / 60:.1f} min", flush=True)

    save_at = set(range(0, steps, max(1, steps // 20)))
    last = train(backbone, in_blocks(corpus, [seed, 5], batch), folder, steps, lr, warmup=100,
                 save_at=save_at, micro_batch=16, resume=resume, probe=probe, report=report,
                 cooldown=int(0.4 * steps), pictures=True)
    made, before = load_backbone(last), reader.model.state_dict()
    hidden = picture_parameters(made.model)
    if not all(torch.equal(value, before[key]) for key, value in made.model.state_dict().items()
               if key not in hidden):
        raise Problem(f"the text weights are not those of backbones/{name} any more: it was "
                      "replaced while this ran, or before --resume; start over")
    clear_up(HERE / "backbones")
    save_checkpoint(bare, made)
    return bare


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

# --preset paper: the flags of the paper's runs (appendix C, and its scripts) on one GPU: what eight
# processed at once, one accumulates. Steps are 800,000 examples; for walks, and the starts of the
# tasks in pictures, the paper says none: a guess.
LARGE = {"model": "meta-llama/Llama-3.2-11B-Vision-Instruct", "dtype": "bfloat16",
         "grad_checkpoint": True}
PRESETS = {
    task: LARGE | {"batch": 128}
    | ({"steps": 6250, "start_step": 400, "save_every": 400} if task.startswith("gp") else
       {"steps": 400, "start_step": 25, "save_every": 25})
    | ({"lr": 5e-7, "micro_batch": 2, "picture_size": "1200x1200"} if task.endswith("vl") else
       {"lr": 1e-6, "micro_batch": 4}) for task in TASKS}


def common_flags(parser):
    """The flags that sft.py and rl.py share."""
    group = parser.add_argument_group("what to run")
    group.add_argument("--task", choices=TASKS, default="gp-l", help="default gp-l")
    group.add_argument("--ood", action=argparse.BooleanOptionalAction, default=False,
                       help="also measure under the rule (gp-vl: and the colour; V-IRL: and in "
                       "the cities) that was not trained on")
    group.add_argument("--model", help="folder or hub name of a chat model (default: the small "
                       "backbone in backbones/; paper: Llama-3.2-11B-Vision-Instruct)")
    group.add_argument("--split", choices=("train", "all"), default="train",
                       help="hands or routes to train on; all = the paper's setting, nothing "
                       "held out")
    data_flags(group)
    group = parser.add_argument_group("the run")
    group.add_argument("--seed", type=int, default=0, help="data order and sampling (default 0)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda (default auto)")
    group.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = all cores")
    group.add_argument("--out", help="run folder (default runs/...)")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    group = parser.add_argument_group("large models")
    group.add_argument("--preset", choices=("paper",), help="the paper's model and settings for "
                       "the task; flags that are given win")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                       help="of the weights; bfloat16: 10 bytes a parameter in all instead of 16")
    group.add_argument("--grad-checkpoint", action=argparse.BooleanOptionalAction, default=False,
                       help="recompute activations: less memory, more time, the same result")
    group.add_argument("--freeze", choices=("none", "vision", "adapter"), help="what keeps its "
                       "weights: the eyes, or the eyes and the projector (paper: Fig. 16)")
    group.add_argument("--dry-run", action="store_true", help="one update; print its memory and "
                       "speed and what the whole run will take; write nothing")
    group.add_argument("--random-weights", action="store_true", help="with --dry-run: build the "
                       "model from its configuration, nothing is downloaded")


def data_flags(group):
    """The flags that only pictures, or only walks, need."""
    group.add_argument("--picture-size", metavar="WxH", help="-vl: pixels of a picture (default "
                       "128x64, what the small backbone sees; paper: 1200x1200)")
    group.add_argument("--announce", action=argparse.BooleanOptionalAction, default=True,
                       help="virl-vl: tell when the walker stands at an intersection, as the paper "
                       "does; --no-announce leaves that to the eyes")
    group.add_argument("--routes", metavar="FOLDER", help="V-IRL: walk routes in the paper's "
                       f"released format (default: the generated city {TRAINING_CITY})")
    group.add_argument("--other-routes", metavar="FOLDER", help="V-IRL: routes of the visual OOD, "
                       "in the same format (default: nine other generated cities)")


def parse_flags(parser, by_task, presets=None):
    """Parse the command line. by_task: {task: {flag: default}}, where a task has its own.

    presets: the same for --preset.
    """
    # Twice: which defaults hold is known once --task is read. A flag that is given beats them all.
    first = parser.parse_known_args()[0]
    parser.set_defaults(**by_task.get(first.task, {}))
    if getattr(first, "preset", None):
        parser.set_defaults(**presets[first.task])
    args = parser.parse_args()
    for name, value in vars(args).items():
        if value == "":                 # from a shell variable that is not set
            raise Problem(f"--{name.replace('_', '-')} is empty")
    return args


def name_default(by_task, flag):
    """How --help tells the default of a flag: "default 5; V-IRL: 2".

    It reads the table that parse_flags obeys, so help and behaviour cannot drift apart.
    """
    own = by_task["virl-l"].get(flag.replace("-", "_"))
    return "default %(default)g" + (f"; V-IRL: {own:g}" if own is not None else "")


def sft_flags(parser, prefix=""):
    """The flags of the supervised stage; rl.py repeats them, with a prefix, for its start."""
    group = parser.add_argument_group("supervised fine-tuning" + (" of the start" * bool(prefix)))
    for name, kind, default, text in (
            ("steps", int, 1300, "optimiser steps of the whole run; sets the cosine's end"),
            ("start-step", int, 60, "the checkpoint that RL starts from (paper: 400; V-IRL: 25)"),
            ("batch", int, 64, "examples a step (paper: 128)"),
            ("lr", float, 1e-3, "peak learning rate (paper: 1e-6 at 11B)"),
            ("save-every", int, 100, "steps between checkpoints")):
        group.add_argument(f"--{prefix}{name}", type=kind, default=default,
                           help=f"{text}; {name_default(TASK_DEFAULTS, name)}")


def check_flags(args, at_least_one=()):
    """Refuse numbers that cannot be meant, and set the number of threads. Raises Problem."""
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, (int, float)) and not 0 <= value < 2**31:     # refuses nan, too
            raise Problem(f"{flag} {value}: must be a number of 0 or more, below 2**31")
        if name in at_least_one and value is not None and value < 1:
            raise Problem(f"{flag} {value}: must be at least 1")
    if getattr(args, "random_weights", False) and not args.dry_run:
        raise Problem("--random-weights goes with --dry-run: there is nothing to learn from noise")
    picture_size(args.picture_size)
    if args.picture_size and not pictured(args.task):
        raise Problem(f"--picture-size: {args.task} has no pictures; add --task gp-vl or virl-vl")
    if not args.announce and args.task != "virl-vl":
        raise Problem(f"--no-announce: {args.task} shows no streets; add --task virl-vl")
    check_routes(args)
    if args.threads > 4 * (os.cpu_count() or 1):
        raise Problem(f"--threads {args.threads}: this machine has {os.cpu_count()} cores")
    if args.threads:
        torch.set_num_threads(args.threads)


def flags_again(args):
    """What the next command has to repeat to be about the same task."""
    again = {"--task": args.task if args.task != "gp-l" else None, "--routes": args.routes,
             "--other-routes": args.other_routes, "--picture-size": args.picture_size}
    return "".join(f" {flag} {value}" for flag, value in again.items() if value) + (
        "" if args.announce else " --no-announce")


def main():
    """The command line of stage 1."""
    parser = argparse.ArgumentParser(description="Supervised fine-tuning on expert answers.")
    common_flags(parser)
    sft_flags(parser)
    parser.add_argument("--micro-batch", type=int, default=64,
                        help="examples in memory at once; does not change the result")
    parser.add_argument("--drop-pictures", action="store_true", help="-vl: train on words alone, "
                        "as the collator of the paper's released code seems to do by mistake")
    parser.add_argument("--stop-step", type=int, help="end here, on the schedule of --steps; "
                        "--resume with a later one, or without, goes on")
    parser.add_argument("--build", choices=(*ENVIRONMENTS, *(f"{name}-eyes" for name in EYES)),
                        help="pretrain the small backbone from nothing into backbones/gp or "
                        "backbones/virl, or teach it to see, and stop")
    parser.add_argument("--build-steps", type=int, help="steps of --build (default 5000; virl: "
                        "2600; eyes: 750, after those of the tower)")
    args = parse_flags(parser, TASK_DEFAULTS, PRESETS)
    check_flags(args, at_least_one=("micro_batch", "batch", "save_every", "steps", "stop_step",
                                    "build_steps"))
    args.model = args.model or str(DEFAULT_MODEL[args.task])
    if max(args.stop_step or 0, args.start_step if args.stop_step else 0) > args.steps:
        raise Problem("--stop-step must not be above --steps, where the learning rate is 0")
    if args.build:
        folder = args.out or f"runs/build-{args.build}"
        if args.dry_run:
            raise Problem("--build knows no --dry-run: it would replace the backbone")
        if checkpoints(folder) and not args.resume:
            raise Problem(f"{folder} holds a build already: add --resume to go on with it, or give "
                          "another --out")
        name, _, eyes = args.build.partition("-")
        if eyes:
            made = build_eyes(name, folder, args.seed, EYES[name]["tower"],
                              args.build_steps or EYES[name]["steps"], batch=32, lr=3e-3,
                              resume=args.resume)
        else:
            how = dict(BUILDS[name])
            how["steps"] = args.build_steps or how["steps"]
            made = build_backbone(name, folder, args.seed, lr=2e-3, resume=args.resume, **how)
        print(f"built {made}")
        return
    backbone = open_backbone(args)
    check_sight(backbone, args.task, args.model)
    freeze(backbone.model, args.freeze)                 # before the run folder is claimed
    if args.drop_pictures and not pictured(args.task):
        raise Problem(f"--drop-pictures: {args.task} has none; add --task gp-vl or virl-vl")
    if args.dry_run:
        dry_run(backbone, args)
        return
    folder = open_run(args.out or f"runs/sft-{args.task}-s{args.seed}", args, "sft")
    print(f"SFT of {args.model} on {args.task}, seed {args.seed}, {args.steps} steps of "
          f"{args.batch} examples, into {folder}")

    def report(row):
        """One line a checkpoint: the training loss beside what `probe` found."""
        ood = f"  under the other rule {row['ood_nll']:.4f}" if args.ood else ""
        seen = "red suits" if args.task == "gp-vl" else "other cities"
        ood += f"  {seen} {row['visual_nll']:.4f}" if "visual_nll" in row else ""
        tqdm.write(f"step {row['step']:5d}  train loss {row['loss']:.4f}  held-out "
                   f"{row['id_nll']:.4f}{ood}  {row['seconds'] / 60:.1f} min")

    run_sft(args, folder, stop_at=args.stop_step, report=report, backbone=backbone)
    print(f"done. Next, play every checkpoint:\n    python evaluate.py --run {folder}"
          + (" --ood" if args.ood else "") + flags_again(args))


if __name__ == "__main__":
    sys.exit(guarded(main))
