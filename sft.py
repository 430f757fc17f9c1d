"""Stage 1, supervised fine-tuning: show the model expert answers until it knows the format.

Paper: arXiv 2501.17161, section 5 and appendix C.1. SFT is both the START of RL (a short run) and
its RIVAL (a second, longer run from that start): "SFT memorises" is a statement about the second
run, and it hangs on the learning rate.

  1. turn a conversation into token ids and a loss mask, segment by segment
  2. forward; log-probability of every answer token given all tokens before it
  3. loss = - mean over answer tokens (never over prompt or padding); clip the gradient, AdamW
  4. the loop: draw conversations that an expert has answered, take a step, now and then measure
     how surprised the model is by the other rule, and save
  5. run folders: checkpoints, metrics, going on after a kill
  6. load any Hugging Face chat model, and find its markup
  7. pictures: what they add to the tokens (a text task shows none)
  8. an optimiser for bf16 weights (large models)
  9. the command line

Shapes: B conversations in a batch, T tokens of the longest, N answer tokens in the whole batch,
H hidden size, V vocabulary.

    python sft.py --ood --model START --lr 1e-4 --steps 570    RL's rival; rl.py prints its START
    python sft.py --preset paper                   Llama-3.2-11B-Vision, on a GPU of 141 GB

At first parts 1 to 3 and `train` are enough. Read before: gp_env.py. Read next: evaluate.py.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import string
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

# Before torch loads: its threads are to sleep while they wait. Spinning would be 1/7 faster alone
# and 4 times slower beside another program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if pathlib.Path(sys.argv[0]).name in ("sft.py", "evaluate.py", "rl.py", "strip.py"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C among the imports: no traceback
    print("loading torch", flush=True)          # takes seconds: a first sign of life

import numpy as np
import torch
from tqdm import tqdm

import gp_env
import virl_env

HERE = pathlib.Path(__file__).resolve().parent
ENVIRONMENTS = {"gp": gp_env, "virl": virl_env}
TASKS = [f"{name}-{sense}" for name in ENVIRONMENTS for sense in ("l", "vl")]   # language, vision
DEFAULT_MODEL = {task: HERE / "backbones" / task.split("-")[0] for task in TASKS}
# Where V-IRL trains, and where it meets streets, names and houses that it has never seen.
TRAINING_CITY, *OTHER_CITIES = virl_env.CITIES
OTHER_RULE = {"gp": {"rule": "face", "face": True}, "virl": {"rule": "relative"}}   # rule OOD


class Problem(Exception):
    """Something the user can put right. `guarded` prints it as one line and exits with code 2."""


# -------- 1. Conversation -> token ids and loss mask


@dataclass
class Backbone:
    """A loaded checkpoint and the chat markup around its turns (found by `wrap_backbone`):

        before_first PROMPT before_answer ANSWER <end> before_next MESSAGE before_answer ANSWER ...
    """

    model: torch.nn.Module
    tokenizer: object
    end_ids: list           # tokens that end an answer; the first is the chat template's own
    banned: list            # tokens that the policy must never sample (picture placeholders)
    before_first: str
    before_answer: str
    before_next: str
    processor: object = None        # turns pictures into tensors; None if the model cannot see
    blind: str = "it is a text-only model"      # what the user is told in that case
    before_picture: str = ""        # before_first for a turn with a picture, the image token in it
    checkpointing: bool = False     # recompute activations in the backward pass

    @property
    def device(self):
        """Where the weights are."""
        return next(self.model.parameters()).device


def user_ids(backbone, text, first):
    """Token ids of a user turn with its markup, up to where the answer begins."""
    before = backbone.before_first if first else backbone.before_next
    return backbone.tokenizer(before + text + backbone.before_answer,
                              add_special_tokens=False)["input_ids"]


def answer_ids(backbone, text):
    """Token ids of an assistant turn, closed by the end-of-turn token (it is learnt too)."""
    return backbone.tokenizer(text, add_special_tokens=False)["input_ids"] + backbone.end_ids[:1]


def encode(backbone, conversation):
    """A conversation as one row of training data: {"ids": list, "mask": list, "picture": ...}.

    conversation: turns {"role", "content", "learn"}; the first may have an "image".
    mask: 1 on the tokens that are learnt. picture: tensors (`encode_picture`), None in a text task.

    Segments are tokenised apart and joined, because that is what RL sees: a prompt, then sampled
    ids, then a message. Encoding the whole text at once could merge tokens across the border, and
    the mask would be off by one there.

        turn      user: prompt         assistant: answer      user     assistant
        ids       <user> 4 cards <end> <assistant>  {"cards"...} <end>   ...     {...} <end>
        mask        0    0   0     0        0          1   1 1     1     0 ...    1      1
                                      (all 0 where learn is False: a mistake, shown not taught)
    """
    ids, mask, picture = [], [], None
    for i, turn in enumerate(conversation):
        if turn.get("image") is not None:
            assert i == 0, "a picture belongs to the first turn"
            part, picture = encode_picture(backbone, turn["content"], turn["image"])
        elif turn["role"] == "user":
            part = user_ids(backbone, turn["content"], first=i == 0)
        else:
            part = answer_ids(backbone, turn["content"])
        ids += part
        mask += [int(turn["learn"])] * len(part)
    mask[0] = 0         # no token before it predicts it (backbones/ learns first turns)
    return {"ids": ids, "mask": mask, "picture": picture}


def pad(rows):
    """Lists of different length -> (B, T) int64 tensor, zeros on the right."""
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [0] * (longest - len(row)) for row in rows])


def batch(backbone, rows):
    """Rows of `encode` -> (ids (B, T), mask (B, T), pictures), on the model's device.

    pictures: a list of B, or None: either every row of a batch shows one or none does.
    """
    pictures = [row["picture"] for row in rows if row["picture"] is not None]
    assert len(pictures) in (0, len(rows)), "some rows show a picture and some do not"
    ids, mask = pad([row["ids"] for row in rows]), pad([row["mask"] for row in rows])   # (B, T)
    return ids.to(backbone.device), mask.to(backbone.device), pictures or None


def by_length(rows, size):
    """Cut rows into micro-batches of `size`, neighbours of like length together: little padding."""
    rows = sorted(rows, key=lambda row: len(row["ids"]))
    for i in progress(range(0, len(rows), size), "reading conversation"):
        yield rows[i:i + size]


# -------- 2. Log-probabilities


def trunk(backbone, ids, pictures=None):
    """Hidden states of the whole transformer, before the output layer makes logits of them.

    "Trunk" means this part everywhere: the policy's output layer and the critic stand on it.
    ids (B, T) right-padded, pictures as in `batch` -> hidden (B, T, H).
    Padding stands to the right and attention is causal, so no real token ever looks at it. The
    model is given no mask, and is the faster for it.
    """
    position = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)      # (B, T)
    inputs = {"position_ids": position}
    with precision(backbone):
        if pictures:
            inputs |= picture_inputs(backbone, ids, pictures, position)             # part 7
        return backbone.model.base_model(
            input_ids=ids, use_cache=False, **inputs).last_hidden_state


def precision(backbone):
    """The context of a forward pass: on a GPU float32 weights are multiplied in bf16."""
    on = backbone.device.type == "cuda" and backbone.model.dtype == torch.float32
    return torch.autocast(backbone.device.type, torch.bfloat16, enabled=on)


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
    wanted = mask[:, 1:].bool()         # wanted[:, t]: token t + 1 is scored, by hidden[:, t]
    with precision(backbone):
        logits = backbone.model.get_output_embeddings()(hidden[:, :-1][wanted])     # (N, V)
    # float32 before the softmax: bf16 knows a log p of -5 only in steps of 1/32, and that moves a
    # PPO ratio by 3 %. (The logits themselves are bf16 where the weights are, or autocast is.)
    logits = logits.float() / temperature
    if backbone.banned:
        logits[:, backbone.banned] = -torch.inf
    logprobs = torch.log_softmax(logits, dim=-1)                                    # (N, V)
    entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs.isinf(), 0)).sum(-1)
    return logprobs.gather(1, ids[:, 1:][wanted][:, None])[:, 0], entropy


# -------- 3. Loss, gradients, one step of the optimiser


def sft_loss(backbone, rows, micro_batch, backward=True):
    """Mean negative log-probability over ALL answer tokens of the batch.

    rows: from `encode`. The mean is taken over the whole batch, however it is cut into
    micro-batches: each micro-batch contributes sum / total, so the gradient is the same. (A mean of
    micro-batch means would weigh tokens of short batches more.)
    Returns (loss as a float, number of tokens fed). With backward=True gradients are accumulated.
    """
    learning_mode(backbone, backward)
    total = sum(sum(row["mask"]) for row in rows)         # answer tokens of the whole batch
    loss_sum = fed = 0
    for part in by_length(rows, micro_batch):
        ids, mask, pictures = batch(backbone, part)
        with torch.set_grad_enabled(backward):
            hidden = trunk(backbone, ids, pictures)
            logprobs, _ = token_logprobs(backbone, hidden, ids, mask)
            loss = -logprobs.sum() / total
        if backward:
            loss.backward()
        loss_sum += loss.item()         # each part is its share of the mean already
        fed += sum(len(row["ids"]) for row in part)
    return loss_sum, fed


def learning_mode(backbone, on):
    """Eval mode, even while learning: without dropout PPO's ratios begin at 1. Train mode only
    where activations are recomputed: Hugging Face does that in no other."""
    backbone.model.train(on and backbone.checkpointing)


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps, then a cosine to 0 at `steps`. step counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def adamw(groups, betas, **more):
    """torch's AdamW with the paper's eps and no decay, or AdamW16 (part 8) for bf16 weights."""
    if any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
        return AdamW16(groups, betas)
    return torch.optim.AdamW(groups, betas=betas, eps=1e-7, weight_decay=0.0, **more)


def take_step(optimizer, norms):
    """Take an optimiser step. norms: of its gradients. Raises Problem if one is not finite."""
    if not all(map(torch.isfinite, norms)):
        raise Problem("a gradient is not finite: lower --lr, and give another --out")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# -------- 4. The loop, and what it is given for a task


def train(backbone, draw, folder, stop, rate, save_at, micro_batch=64, resume=False, probe=None,
          size=0, tokens=0):
    """The supervised loop. Returns the path of the last checkpoint.

    draw(step) -> list of conversations and rate(step) -> learning rate are functions of the step
    alone, so that a resumed run sees what an unbroken one would have seen. stop: steps in all.
    save_at: steps after which `step-000123` is written. probe(backbone) -> dict of extra metrics
    of a checkpoint. size, tokens: parameters, tokens seen before this run (README eq. 6).
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in backbone.model.parameters() if p.requires_grad]
    # beta2 as in the paper's SFT scripts; fused: one pass over memory for each tensor
    optimizer = adamw([{"params": parameters, "lr": 0.0}], (0.9, 0.98), fused=True)
    first, path = 0, folder             # step to begin with, last checkpoint
    if resume and checkpoints(folder):
        first, path = checkpoints(folder)[-1]
        tokens = load_state(path, model=backbone, optimizer=optimizer)["tokens"]
    metrics = Metrics(folder, first if resume else None)
    began, losses = time.time(), []
    for step in progress(range(first, stop), "SFT step"):
        optimizer.param_groups[0]["lr"] = rate(step)
        rows = [encode(backbone, conversation) for conversation in draw(step)]
        loss, fed = sft_loss(backbone, rows, micro_batch)
        take_step(optimizer, [torch.nn.utils.clip_grad_norm_(parameters, 1.0)])
        tokens += fed                   # prompt and answer, as the paper counts D
        losses.append(loss)
        if step + 1 in save_at or step + 1 == stop:
            row = {"step": step + 1, "loss": sum(losses) / len(losses), "tokens": tokens,
                   "flops": 6 * size * tokens, "lr": rate(step)}
            row |= probe(backbone) if probe else {}
            row["seconds"] = time.time() - began
            # metrics first: killed between the two, the run goes on from the checkpoint before,
            # and this row is written again
            metrics.write(row)
            path = save_checkpoint(folder / f"step-{step + 1:06d}", backbone,
                                   {"optimizer": optimizer.state_dict(), "tokens": tokens})
            numbers = [f"{name} {value:.4f}" for name, value in row.items()
                       if "loss" in name or "nll" in name or "read" in name]
            tqdm.write("  ".join([f"step {step + 1:5d}", *numbers]))
            losses = []                 # the next row's mean begins anew
    return path


def run_sft(args, folder, stop, backbone):
    """Fine-tune on expert answers under the training rule. Returns the last checkpoint.

    An early `stop` leaves the schedule as it is: RL's START is a checkpoint of the full run.
    """
    freeze(backbone.model, args.freeze)
    options, name = game_options(args), args.task.split("-")[0]
    expert = ENVIRONMENTS[name].expert_conversation
    more = {"revise": args.revise} if args.revise else {}
    more |= {"rule": "varied"} if args.vary_rule else {}

    def draw(step):
        """A batch of conversations. Steps count from 0: START's rival meets START's data again."""
        rng = np.random.default_rng([2, args.seed, step])   # 1: RL, 2: SFT, 3: validation, apart
        made = [expert(rng, split=args.split, **options | more) for _ in range(args.batch)]
        for first, *_ in made if args.drop_pictures else ():
            first.pop("image", None)    # the words that speak of a picture stay
        return made

    def held_out(**shift):
        """64 encoded conversations of the validation split; with --split all, of all hands."""
        rng, split = np.random.default_rng([3]), "val" if args.split == "train" else "all"
        return [encode(backbone, expert(rng, split=split, **options | shift)) for _ in range(64)]

    asked = {"id": held_out()}
    if args.ood:
        asked["ood"] = held_out(**OTHER_RULE[name])

    def probe(backbone):
        """How surprised is the model by right answers it was not trained on?

        Where it climbs faster under the new rule than under the old, the old one is learnt by
        heart: memorisation, seen without playing a single game.
        """
        return {f"{cell}_nll": sft_loss(backbone, rows, args.micro_batch, backward=False)[0]
                for cell, rows in asked.items()}

    warmup = max(1, int((0.03 if args.preset else 0.01) * args.steps))
    # close together at first: the rise and the peak of OOD come early
    save_at = {start_step(args), 20, 40, 80, 150, *range(0, args.steps, args.save_every)}
    return train(
        backbone, draw, folder, stop, lambda step: learning_rate(step, args.steps, args.lr, warmup),
        save_at, args.micro_batch, args.resume, probe,
        size=task_parameters(backbone.model, pictured(args.task)), tokens=tokens_before(args.model))


def start_step(args):
    """The step of SFT that RL starts from; with --preset the paper's."""
    # walks' backbone lacks only the format: after 40 steps little would be left to gain
    starts = {"gp": 400, "virl": 25} if args.preset else {"gp": 60, "virl": 12}
    return starts[args.task.split("-")[0]]


def game_options(args):
    """What a task asks of its training games, beside the split: arguments of its environment.

    GP-VL trains on black suits, so that red ones are a visual shift (paper, section 5.2); V-IRL on
    the walks of one city.
    """
    if args.task.startswith("virl"):
        return picture_options(args) | {"where": places(args)[0]}
    return picture_options(args) | ({"suits": "black"} if pictured(args.task) else {})


def picture_options(args):
    """How a task shows its pictures: arguments of its environment, none for a task in words."""
    size = tuple(args.picture_size or gp_env.PICTURE_SIZE)
    if args.task == "virl-vl":
        return {"picture": size, "announce": args.announce}
    return {"picture": size} if pictured(args.task) else {}


def places(args):
    """V-IRL: (where training walks, [where the visual OOD is measured])."""
    training, *others = args.routes or [TRAINING_CITY]
    return training, others or OTHER_CITIES


def pictured(task):
    """True for a task in pictures."""
    return task.endswith("-vl")


def task_parameters(model, pictures=False):
    """The paper's N: all parameters for a task in pictures, for text those that text reaches."""
    skip = set() if pictures else picture_parameters(model)
    return sum(p.numel() for name, p in model.named_parameters() if name not in skip)


def freeze(model, what):
    """Keep the eyes ("vision"), or eyes and projector ("adapter"), as they are (paper: Fig. 16)."""
    parts = {"vision": ("vision_model", "visual.blocks", "visual.patch_embed")}
    parts["adapter"] = (*parts["vision"], "multi_modal_projector", "connector", "visual.merger")
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts.get(what, ())):
            parameter.requires_grad_(False)


# -------- 5. Run folders. A kill at any moment loses nothing: files are written aside and moved


def save_checkpoint(folder, backbone, state=None):
    """Write a checkpoint folder aside, then move it in place (an older one goes first). Returns it.

    Hugging Face files plus state.pt: `state`, plain data and tensors, which weights_only can read.
    """
    folder = pathlib.Path(folder)
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)            # what a kill may have left
    aside.mkdir(parents=True)
    try:
        for part in (backbone.model, backbone.tokenizer, backbone.processor):
            if part is not None:
                part.save_pretrained(aside)
        if state is not None:
            torch.save(state, aside / "state.pt")
    except Exception as error:      # torch and safetensors have errors of their own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        full = ", the disk is full" * (shutil.disk_usage(folder.parent).free < 2 ** 26)
        said = f"{folder} cannot be written ({str(error)[:200]})"
        raise Problem(f"{said}{full}; what was saved before is safe: --resume") from None
    shutil.rmtree(folder, ignore_errors=True)           # an older one of that name
    return aside.rename(folder)


def load_state(folder, model=None, **owners):
    """Read state.pt of a checkpoint, and give its parts back to their owners. Returns the dict.

    model: a Backbone that takes the weights; owners: e.g. optimizer=..., saved under that name.
    Raises Problem if the file is damaged, not plain data, or of another run.
    """
    folder = pathlib.Path(folder)
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        assert isinstance(state["tokens"], int), "its count of tokens is no number"
        for name, owner in owners.items():
            owner.load_state_dict(state[name])
        if model is not None:
            saved = load_backbone(folder, dtype=str(model.model.dtype).removeprefix("torch."))
            model.model.load_state_dict(saved.model.state_dict())
        return state
    except torch.OutOfMemoryError:
        raise
    except Exception as error:      # each reader has errors of its own
        raise Problem(f"{folder}: state.pt is damaged or of another run ({type(error).__name__}): "
                      "delete this folder and resume from the checkpoint before") from None


def tokens_before(model):
    """Training tokens that a model has seen already, as a checkpoint of a run tells; else 0."""
    return load_state(model)["tokens"] if (pathlib.Path(model) / "state.pt").exists() else 0


def checkpoints(folder):
    """The complete checkpoints of a run folder, oldest first, as (step, path)."""
    return sorted((int(path.name[5:]), path) for path in pathlib.Path(folder).glob("step-*")
                  if path.name[5:].isdecimal() and (path / "config.json").exists())


def read_lines(path):
    """The rows of a .jsonl file, [] if there is none. A last line cut by a kill is dropped."""
    text = pathlib.Path(path).read_text() if pathlib.Path(path).exists() else ""
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]


class Metrics:
    """A .jsonl file of a run: one object a line, flushed at once.

    On resume, lines after the checkpoint that training goes on from are dropped: they will be
    written again, the same but for keys that begin with "seconds".
    """

    def __init__(self, folder, resume_at=None, name="metrics.jsonl"):
        path = pathlib.Path(folder) / name
        rows = [] if resume_at is None else read_lines(path)
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows
                                 if row["step"] <= resume_at))
        self.file = open(aside.rename(path), "a", buffering=1)     # a line at a time

    def write(self, row):
        """Append one row (a dict with "step"). JSON has no nan or infinity: null."""
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value
               for key, value in row.items()}
        self.file.write(json.dumps(row) + "\n")


# Flags that change no result; with any other changed, --resume would mix two runs.
FREE = ("resume", "out", "threads", "micro_batch", "grad_checkpoint")
held = []           # lock files of the runs of this process
spoken = [time.time()]      # when `progress` wrote its last line


def open_run(folder, args, kind):
    """Create a run folder and write args.json, or check that --resume goes on with the same run."""
    folder = pathlib.Path(folder)
    known = folder / "args.json"
    code = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(HERE.glob("*.py")))).hexdigest()
    settings = {"kind": kind} | {k: v for k, v in vars(args).items() if k not in FREE}
    for key in ("model", "init"):       # the same run, however its folder is spelt
        if settings.get(key) and pathlib.Path(settings[key]).exists():
            settings[key] = os.path.relpath(settings[key], HERE)
    if known.exists() or checkpoints(folder):
        if not args.resume:
            raise Problem(f"{folder} holds a run already: --resume it, or give another --out")
        before, now = json.loads(known.read_text()), code
        code = before.pop("code", code)         # of the beginning: that is what stays on record
        if code != now:
            tqdm.write(f"--resume: the scripts are no longer those that {folder} began with")
        for key, value in before.items():
            if settings.get(key, value) != value:
                flag = "--" + key.replace("_", "-")
                raise Problem(f"--resume: {folder} has {flag} {value}, not {settings[key]}")
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform != "win32":     # one writer at a time; the lock goes with the process
        import fcntl
        held.append(open(folder / ".lock", "w"))
        try:
            fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Problem(f"{folder} is in use by another run: give another --out") from None
    aside = known.with_suffix(".tmp")
    aside.write_text(json.dumps(settings | {"code": code}, indent=1) + "\n")
    aside.rename(known)
    return folder


def progress(steps, what):
    """Go through a range, with a bar on a terminal; a log file at most a line a minute from all."""
    for step in tqdm(steps, what, leave=False, delay=5, disable=None):
        yield step
        if time.time() - spoken[0] > 60 and not sys.stderr.isatty():
            spoken[0] = time.time()
            print(f"{what} {min(step + steps.step, steps.stop)} of {steps.stop}", file=sys.stderr)


# -------- 6. Loading a model, and finding out how to talk to it


def load_backbone(name, device="cpu", grad_checkpoint=False, dtype="float32"):
    """Load a chat model from a folder or, by name, from the hub: a Backbone. Raises Problem."""
    from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText,
                              AutoTokenizer, GenerationConfig)
    from transformers.utils import logging
    logging.set_verbosity_error()
    folder = pathlib.Path(name)
    # a hub name is "owner/model"
    local = folder.is_absolute() or str(name).count("/") != 1 or folder.parent.exists()
    logging.disable_progress_bar() if local else logging.enable_progress_bar()  # of a download
    if local and not (folder / "config.json").exists():
        raise Problem(f"{name}: no config.json there; give a checkpoint or a hub name")
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
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise Problem(f"{name}: cannot load it ({said}). A folder needs config.json, safetensors "
                      "and a tokenizer. Hub: accept the licence, `hf auth login`; without network, "
                      "`hf download NAME --local-dir FOLDER` elsewhere") from None
    # We sample by ourselves; settings for sampling that contradict each other cannot be saved.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    processor, blind = load_processor(name, local, config) if sees else (None, Backbone.blind)
    backbone = wrap_backbone(model.to(device).eval(), tokenizer, name, processor, blind)
    if grad_checkpoint:
        # Activations are computed again in the backward pass: about a third more time, a fraction
        # of the memory, bit-equal gradients. (The call was renamed.)
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        backbone.checkpointing = True
    return backbone


def wrap_backbone(model, tokenizer, name="model", processor=None, blind=Backbone.blind):
    """Find the markup, the end tokens and the banned tokens of a model. Returns a Backbone."""
    # some vision-language models keep it with the processor only
    template = tokenizer.chat_template or getattr(processor, "chat_template", None)
    if not template:
        raise Problem(f"{name}: its tokenizer has no chat template; use an instruct model")
    if "strftime_now" in template and "macro strftime_now" not in template:     # one date for all
        template = ("{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}" + template)
    tokenizer.chat_template = template
    before_first, before_answer, after_answer = markup(tokenizer, name)
    after_answer = after_answer.lstrip()
    end_id, *_ = tokenizer(after_answer or "?", add_special_tokens=False)["input_ids"]
    end_text = tokenizer.convert_ids_to_tokens(end_id)
    if not after_answer.startswith(end_text):
        raise Problem(f"{name}: its chat template has no end-of-turn token; unsupported")
    before_picture = ""
    if processor is not None:
        before_picture, blind = picture_markup(tokenizer, processor, before_answer)
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed, tokenizer.eos_token_id]
    rows = model.get_output_embeddings().weight.shape[0]
    # A sampled picture placeholder makes the next forward pass ask for a picture that is not there.
    marks = ("image_token_index", "image_token_id", "video_token_id", "vision_start_token_id",
             "vision_end_token_id")
    placeholders = {getattr(model.config, key, None) for key in marks}
    backbone = Backbone(
        model, tokenizer, before_first=before_first, before_answer=before_answer,
        end_ids=list(dict.fromkeys([end_id] + [i for i in listed if type(i) is int])),
        banned=sorted(i for i in placeholders if type(i) is int and i < rows),
        before_next=after_answer[len(end_text):], blind=blind,
        processor=processor if before_picture else None, before_picture=before_picture)
    check_model(backbone, name)
    return backbone


def markup(tokenizer, name):
    """The pieces of a chat template: (before the first prompt, before an answer, after an answer).

    Templates are programs: a conversation of marker words is rendered and cut at the markers.
    """
    for in_parts in (False, True):  # SmolVLM's loses a turn that is not a list of parts
        talk = [{"role": role, "content": [{"type": "text", "text": word}] if in_parts else word}
                for role, word in (("user", "UUU"), ("assistant", "AAA"), ("user", "FFF"))]
        try:
            whole, once = (tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
                for turns in (talk, talk[:1]))
            before_first, before_answer = once.split("UUU")
            _, between, after_answer, _ = re.split("UUU|AAA|FFF", whole)
        except Exception as error:      # a turn is lost or repeated, or the program itself fails
            trouble = f"cannot be cut into turns ({error})"
            continue
        if before_answer.rstrip() == between.rstrip():
            return before_first, before_answer, after_answer
        trouble = "does not open an answer as it opens those of the past"
    raise Problem(f"{name}: its chat template {trouble}; unsupported")


@torch.no_grad()
def check_model(backbone, name):
    """Does output layer(trunk) give the model's own logits, neither scaled nor bent?"""
    model, text = backbone.model, backbone.model.config.get_text_config()
    said = backbone.before_first + string.printable + backbone.before_answer
    ids = backbone.tokenizer(said, add_special_tokens=False)["input_ids"]
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        raise Problem(f"{name}: its tokenizer is of another model: it knows more tokens")
    # A layer that forgets what is far away, or keeps it in another form, needs another sampler.
    if set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}:
        raise Problem(f"{name}: some of its layers forget what was said; unsupported")
    ids = torch.tensor([ids[:64]], device=backbone.device)
    hidden = trunk(backbone, ids)                                             # (1, T, H)
    with precision(backbone):
        ours = model.get_output_embeddings()(hidden).float()
        theirs = model(input_ids=ids, use_cache=False).logits.float()
    gap = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
    if not gap < 0.02:
        raise Problem(f"{name}: it scales or bends its logits (off by {gap:.0%}); unsupported")


def answer_length(backbone, args, tries=1):
    """The longest answer to allow, in tokens: a quarter more than the longest of an expert's 64.

    A limit that cuts right answers off would look like a gap under the rule with longer ones. Hands
    of all splits are asked: of a held-out one nothing but a length is used, alike for all models.
    --max-new-tokens overrules it. Raises Problem if a conversation does not fit into the model.
    """
    name, rng = args.task.split("-")[0], np.random.default_rng(0)
    options = game_options(args) | {"split": "all"}
    rows = [encode(backbone, ENVIRONMENTS[name].expert_conversation(rng, **options | rule))
            for _ in range(32) for rule in ({}, OTHER_RULE[name])]
    longest = max(sum(row["mask"]) for row in rows)        # its end token included
    length = args.max_new_tokens or 8 * math.ceil(longest * 1.25 / 8)
    if length < longest:
        tqdm.write(f"--max-new-tokens {length} cuts off right answers of up to {longest} tokens")
    limit = backbone.model.config.get_text_config().max_position_embeddings
    # a message is shorter than an answer
    needed = max(len(row["ids"]) for row in rows) + 2 * tries * length
    if needed > limit:
        raise Problem(f"{needed} tokens needed, {limit} fit: lower --tries or --max-new-tokens")
    return length


# -------- 7. Pictures. A language model sees in one of two ways:
#   placeholders (Idefics3,         the picture takes k places of the sequence; what the eyes saw
#   SmolVLM, Qwen2.5-VL)            stands there instead of embeddings, attended to as text is
#   crossing (Mllama, the paper's)  one mark in the sequence; a few layers of their own attend from
#                                   every token after it to the picture. Text skips these layers


def crossing_layers(model):
    """Numbers of the layers that attend to a picture (Mllama); [] where pictures are tokens."""
    return list(getattr(model.config.get_text_config(), "cross_attention_layers", None) or [])


def mrope(config):
    """True for positions in three dimensions (time, height, width), as in Qwen2.5-VL."""
    return "mrope_section" in (getattr(config.get_text_config(), "rope_parameters", None) or {})


def picture_parameters(model):
    """Names of the parameters that only pictures reach: eyes, projector, layers that look."""
    parts = ["vision", "multi_modal", "visual", "connector"]
    parts += [f"language_model.layers.{i}." for i in crossing_layers(model)]
    return {name for name, _ in model.named_parameters() if any(part in name for part in parts)}


def load_processor(name, local, config):
    """What turns pictures into tensors: (processor, ""), or (None, why there is none)."""
    from transformers import AutoImageProcessor, AutoProcessor, Idefics3Processor, ProcessorMixin
    files = ("processor_config.json", "preprocessor_config.json")
    if local and not any((pathlib.Path(name) / file).exists() for file in files):
        return None, "it has eyes, but was never trained to see (no processor_config.json)"
    try:
        if mrope(config):       # Qwen2.5-VL's own processor wants torchvision, for videos
            images = AutoImageProcessor.from_pretrained(name, backend="pil")
            template = ProcessorMixin.get_processor_dict(name)[0].get("chat_template")
            return SimpleNamespace(image_processor=images, chat_template=template,
                                   save_pretrained=images.save_pretrained), ""
        # SmolVLM's asks for it, too; Idefics3's is the same without videos
        kind = Idefics3Processor if config.model_type == "smolvlm" else AutoProcessor
        processor = kind.from_pretrained(name, trust_remote_code=False)
        processor.image_processor       # a class that the Auto class does not know lacks it
        return processor, ""
    except Exception as error:      # as many types as in load_backbone
        return None, f"its picture processor does not load ({str(error).strip()[:200]})"


def picture_markup(tokenizer, processor, before_answer):
    """(markup before a first turn with a picture, "") or ("", why the model cannot see one)."""
    shown = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "UUU"}]}]
    try:
        whole = tokenizer.apply_chat_template(
            shown, chat_template=processor.chat_template or tokenizer.chat_template,
            tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
        before, after = whole.split("UUU")
        if after != before_answer:
            raise ValueError("it changes more than the start of a turn")
        return before, ""
    except Exception as error:      # in words it may still do well
        return "", f"its chat template does not take a picture ({error})"


def encode_picture(backbone, text, image):
    """A first user turn that shows a PIL picture -> (token ids, the picture as tensors)."""
    text = backbone.before_picture + text + backbone.before_answer
    if crossing_layers(backbone.model) or mrope(backbone.model.config):
        ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
        seen = backbone.processor.image_processor([[image]], return_tensors="pt")
    else:
        seen = backbone.processor(text=[text], images=[[image]], return_tensors="pt",
                                  add_special_tokens=False)
        ids = seen["input_ids"][0].tolist()
    if mrope(backbone.model.config):
        grid, mark = seen["image_grid_thw"], backbone.model.config.image_token_id
        at, merged = ids.index(mark), backbone.processor.image_processor.merge_size ** 2
        ids[at:at + 1] = [mark] * (int(grid.prod()) // merged)
        seen["shift"] = position_shift(backbone, ids, grid)         # (1, 3, T)
    # its mask over the tokens grows with the conversation, so it is made later (cross_mask)
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
    where, _ = backbone.model.base_model.get_rope_index(ids, kinds, image_grid_thw=grid) # (3, 1, T)
    return (where - torch.arange(ids.shape[1])).transpose(0, 1)


def shift_table(pictures):
    """`position_shift` of each row as one table (3, B, t); the last one holds for what follows."""
    shifts = [picture["shift"][0] for picture in pictures]                          # (3, t) each
    longest = max(shift.shape[1] for shift in shifts)
    return torch.stack([torch.cat([shift, shift[:, -1:].expand(-1, longest - shift.shape[1])], 1)
                        for shift in shifts], 1)


def shifted(table, position):
    """Positions (B, T) that count tokens -> m-RoPE's (3, B, T). table: see `shift_table`."""
    at = position.clamp(max=table.shape[2] - 1).expand(3, -1, -1)
    return position + table.gather(2, at)


def picture_inputs(backbone, ids, pictures, position):
    """What B pictures add to the model's arguments. ids, position (B, T)."""
    if crossing_layers(backbone.model):
        states, tiles = cross_states(backbone, pictures)            # (B, P, H), (B, tiles)
        return {"cross_attention_states": states,
                "cross_attention_mask": cross_mask(backbone, ids, tiles)}
    # the placeholders take what was seen one by one, row after row
    joined = join_pictures(backbone, pictures)
    if mrope(backbone.model.config):
        joined["position_ids"] = shifted(shift_table(pictures).to(ids.device), position)
    return joined


def join_pictures(backbone, pictures):
    """The tensors of all pictures of a batch, joined, in the dtype of the weights."""
    joined = {key: torch.cat([picture[key] for picture in pictures]).to(backbone.device)
              for key in pictures[0] if key != "shift"}
    return {key: value.to(backbone.model.dtype) if value.is_floating_point() else value
            for key, value in joined.items()}


def cross_states(backbone, pictures):
    """Mllama: what the eyes saw (B, tiles * patches, H), and which tiles are in use (B, tiles)."""
    base, seen = backbone.model.base_model, join_pictures(backbone, pictures)
    states = base.multi_modal_projector(base.vision_model(**seen).last_hidden_state)
    return states.flatten(1, 3), seen["aspect_ratio_mask"].flatten(1)


def cross_mask(backbone, ids, tiles, passed=False):
    """Mllama: (B, T, 1, tiles), 1 where a token of ids (B, T) sees a tile: from the mark on.

    passed (B, 1): the mark came before these ids.
    """
    after = (ids == backbone.model.config.image_token_index).cumsum(1) > 0              # (B, T)
    return ((after | passed)[:, :, None] * tiles[:, None, :])[:, :, None, :]


# -------- 8. An optimiser for bf16 weights


def halve(master):
    """float32 -> its upper half, a bfloat16, and what rounding left over, an int16."""
    bits = master.view(torch.int32)             # the same 32 bits, read as an integer
    upper = (bits + 0x8000) & -0x10000          # add half a unit, then clear the lower 16 bits
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


class AdamW16(torch.optim.Optimizer):
    """AdamW without weight decay (Loshchilov and Hutter 2019) in 10 bytes a parameter, not 16.

    Why plain bf16 stands still: it has 8 bits of mantissa. The neighbours of a weight of 0.02 are
    1.2e-4 away, a step of Adam is about lr = 1e-6, and 0.02 + 1e-6 rounds back to 0.02. The usual
    cure, float32 copies of weights and moments, needs 171 GB at 11B; this needs 107:

                    bytes
        weight      2       bf16, what the model computes with
        gradient    2       bf16
        rest        2       weight and rest together are the float32 weight (`halve`)
        moments     2 + 2   bf16, rounded by chance: to the nearest they would stand still, too
    """

    def __init__(self, groups, betas, eps=1e-7, chunk=2 ** 24):
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.chunk = chunk      # weights at a time: float32 copies take 1 GB, not 400

    @torch.no_grad()
    def step(self):
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                for name in ("first", "second", "rest"):
                    state.setdefault(name, torch.zeros_like(parameter))
                state["step"] = state.get("step", 0) + 1
                # seeded by the step: there is no state of it to save
                generator = torch.Generator(parameter.device)
                generator.manual_seed(1_000_003 * i + state["step"])
                flat = [x.view(-1).split(self.chunk) for x in (
                    parameter.grad.contiguous(), parameter, state["first"], state["second"],
                    state["rest"])]
                for chunk in zip(*flat):
                    self.move(*chunk, group, state["step"], generator)

    def move(self, gradient, weight, first, second, rest, group, step, generator):
        """Change one chunk in place."""
        beta1, beta2 = group["betas"]
        half = weight.dtype == torch.bfloat16
        m = first.float() * beta1 + gradient.float() * (1 - beta1)              # E[g]
        v = second.float() * beta2 + gradient.float().square() * (1 - beta2)    # E[g^2]
        way = (m / (1 - beta1 ** step)) / ((v / (1 - beta2 ** step)).sqrt() + group["eps"])
        # `rest` is int16 under the name of bf16: torch would cast other state that it loads
        moved = (rejoin(weight, rest.view(torch.int16)) if half else weight) - group["lr"] * way
        if half:
            moved, new_rest = halve(moved)
            rest.view(torch.int16).copy_(new_rest)
        weight.copy_(moved)
        first.copy_(stochastic(m, generator) if half else m)
        second.copy_(stochastic(v, generator) if half else v)


# -------- 9. Command line

# --preset paper: appendix C and its scripts, on one GPU: what eight processed at once, one
# accumulates. Steps are 800,000 examples; for walks the paper says none: a guess.
LARGE = {"model": "meta-llama/Llama-3.2-11B-Vision-Instruct", "dtype": "bfloat16",
         "grad_checkpoint": True}
PAPER = LARGE | {"batch": 128, "steps": 6250, "save_every": 400, "lr": 1e-6, "micro_batch": 4}
WALKS = {"steps": 400, "save_every": 25}
SEEN = {"lr": 5e-7, "micro_batch": 2, "picture_size": [1200, 1200]}
PRESETS = {"gp-l": PAPER, "gp-vl": PAPER | SEEN, "virl-l": PAPER | WALKS,
           "virl-vl": PAPER | WALKS | SEEN}


def guarded(main):
    """Run a script's main(): what the user can put right ends in one clear line, exit code 2."""
    name = pathlib.Path(sys.argv[0]).name
    signal.signal(signal.SIGINT, signal.default_int_handler)    # from here on caught below
    for stream in (sys.stdout, sys.stderr):     # print any words that a model says, line by line
        getattr(stream, "reconfigure", dict)(errors="replace", line_buffering=True)
    try:
        main()
        return 0
    except BrokenPipeError:                     # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Problem, virl_env.RouteProblem) as problem:
        said = " ".join(str(problem).split())
    except OSError as error:            # "No space left on device", among others
        said = f"{error}; nothing saved before is lost"
    except (MemoryError, torch.OutOfMemoryError):
        said = ("out of memory, try again: train with a lower --micro-batch or --grad-checkpoint, "
                "and --resume; sample with a lower --batch, or --sample-batch and another --out")
    except KeyboardInterrupt:
        more = "; --resume goes on" * (name in ("sft.py", "rl.py"))
        print(f"\n{name}: stopped{more}", file=sys.stderr)
        return 130
    print(f"{name}: {said}", file=sys.stderr)
    return 2


def common_flags(parser):
    """The flags that sft.py, evaluate.py and rl.py share."""
    yes_or_no = argparse.BooleanOptionalAction
    add = parser.add_argument_group("what to run").add_argument
    add("--task", choices=TASKS, default="gp-l", help="default gp-l")
    add("--ood", action=yes_or_no, default=False, help="also measure what was not trained on")
    add("--model", help="folder or hub name of a chat model (default: the small backbone)")
    add("--picture-size", type=int, nargs=2, metavar=("W", "H"),
        help="-vl: pixels (default 128 64; paper: 1200 1200)")
    add("--announce", action=yes_or_no, default=True, help="virl-vl: tell intersections in words")
    add("--routes", nargs="+", metavar="FOLDER",
        help="V-IRL: routes in the paper's released format, and those of the visual OOD")
    add("--threads", type=int, default=0, help="CPU threads; 0 = all cores")
    add("--out", help="run folder (default runs/...); evaluate.py: JSON file for the results")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add("--max-new-tokens", type=int, default=0, help="longest answer; 0: see sft.answer_length")


def training_flags(parser):
    """The flags that the two training stages share."""
    add = parser.add_argument_group("training").add_argument
    add("--seed", type=int, default=0, help="data order and sampling (default 0)")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--split", choices=("train", "all"), default="train", help="all: nothing is held out")
    add("--preset", choices=("paper",), help="the paper's model and settings; given flags win")
    add("--grad-checkpoint", action=argparse.BooleanOptionalAction, default=False,
        help="recompute activations: less memory, more time, the same result")
    add("--freeze", choices=("none", "vision", "adapter"), help="keeps its weights (Fig. 16)")
    add("--revise", type=float, default=0.0, help="gp-l: share of SFT examples with wrong tries")


def parse_flags(parser, task_defaults, presets, argv=None):
    """A command line, checked. task_defaults, presets: {task: {flag: value}}. Raises Problem."""
    first = parser.parse_known_args(argv)[0]        # --task and --preset decide the defaults
    # evaluate.py: a checkpoint plays what it was trained on, unless told otherwise
    run = pathlib.Path(getattr(first, "run", None) or pathlib.Path(first.model or "").parent)
    if not presets and (run / "args.json").exists():
        trained = json.loads((run / "args.json").read_text())
        trained["splits"] = ["all"] if trained.get("split") == "all" else ["train", "test"]
        same = ("task", "routes", "picture_size", "announce", "dtype", "max_new_tokens", "splits")
        parser.set_defaults(**{key: trained[key] for key in same if key in trained})
        first = parser.parse_known_args(argv)[0]
    parser.set_defaults(**task_defaults.get(first.task, {}))
    if getattr(first, "preset", None):
        parser.set_defaults(**presets[first.task])
    args = parser.parse_args(argv)      # now with the defaults of the task
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        if value == "":                 # from a shell variable that is not set
            raise Problem(f"{flag} is empty")
        least = int(type(value) is int and parser.get_default(name) != 0)
        if isinstance(value, (int, float)) and not least <= value < 2 ** 31:   # refuses nan, too
            raise Problem(f"{flag} {value}: must be a number from {least} to 2**31")
    if not all(least <= side <= 4096
               for least, side in zip(gp_env.PICTURE_SIZE, args.picture_size or ())):
        raise Problem("--picture-size: give width and height, from 128 64 to 4096 4096")
    fits = {"--picture-size": pictured(args.task) or not args.picture_size,
            "--no-announce": args.task == "virl-vl" or args.announce,
            "--blindfold": pictured(args.task) or not getattr(args, "blindfold", False),
            "--revise": args.task == "gp-l" or not getattr(args, "revise", 0),
            "--vary-rule": args.task.startswith("gp") or not getattr(args, "vary_rule", False),
            "--drop-pictures": pictured(args.task) or not getattr(args, "drop_pictures", False),
            "--routes": args.task.startswith("virl") or not args.routes}
    for flag in (flag for flag, fine in fits.items() if not fine):
        raise Problem(f"{flag} is for another task than {args.task}: see --task")
    # now, not when a missing panorama comes by, after hours
    for folder in args.routes or ():
        virl_env.open_atlas(folder, pictured(args.task))
    args.model = args.model or str(DEFAULT_MODEL[args.task])
    if args.threads:
        torch.set_num_threads(min(args.threads, os.cpu_count() or 1))   # more would only wait
    return args


def open_backbone(args, name=None):
    """Load the model of a run, args.model or `name`, as its flags say. Returns a Backbone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load_backbone(name or args.model, device,
                             getattr(args, "grad_checkpoint", False), args.dtype)
    if pictured(args.task) and backbone.processor is None:
        raise Problem(f"--task {args.task}: {name or args.model} cannot see: {backbone.blind}")
    if sys.platform == "linux" and task_parameters(backbone.model) < 5e7:
        # glibc hands the pages of large tensors back at once; the page faults cost a small model
        # 15 % of a training step. Let it keep them: M_MMAP_MAX 0, M_TRIM_THRESHOLD 2 GB.
        for option, value in ((-4, 0), (-1, 2 ** 31 - 1)):
            getattr(ctypes.CDLL(None), "mallopt", min)(option, value)
    return backbone


def content_digest(args):
    """Eight hex digits of all that decides a run: its flags, the model's files, this code."""
    files = [HERE / f"{name}.py" for name in ("verifier", "gp_env", "virl_env", "sft")]
    for folder in (HERE / "cities", args.model, *(args.routes or ())):
        files += sorted(filter(pathlib.Path.is_file, pathlib.Path(folder).glob("*.*")))
    settings = {k: str(v) for k, v in vars(args).items() if k not in (*FREE, "ood", "model")}
    seen = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in files:
        seen.update(file.read_bytes())
    seen.update(b"" if os.path.isdir(args.model) else args.model.encode())      # a hub name
    return seen.hexdigest()[:8]         # 32 bits: enough for the starts of one folder


def flags(argv=None):
    """The command line of stage 1 as a Namespace; argv: a list of words, None for the shell's."""
    parser = argparse.ArgumentParser(description="Supervised fine-tuning on expert answers.")
    common_flags(parser)
    training_flags(parser)
    add = parser.add_argument_group("supervised fine-tuning").add_argument
    add("--steps", type=int, default=1300, help="optimiser steps (default 1300; V-IRL: 800)")
    add("--batch", type=int, default=64, help="examples a step (default 64; paper: 128)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3; paper: 1e-6)")
    add("--save-every", type=int, default=100, help="steps between checkpoints (default 100)")
    add("--micro-batch", type=int, default=64, help="examples in memory at once; the same result")
    add("--vary-rule", action="store_true", help="gp: train with J, Q, K anywhere in 10..13")
    add("--drop-pictures", action="store_true", help="-vl: a fault of the released collator")
    return parse_flags(parser, dict.fromkeys(("virl-l", "virl-vl"), {"steps": 800}), PRESETS, argv)


def main():
    """Stage 1."""
    args = flags()
    print(f"SFT of {args.model} on {args.task}, seed {args.seed}, {args.steps} steps of "
          f"{args.batch} examples")
    backbone = open_backbone(args)
    # says so if right answers would be cut off
    answer_length(backbone, args, gp_env.TRIES if args.revise else 1)
    folder = open_run(args.out or f"runs/sft-{args.task}-s{args.seed}", args, "sft")
    run_sft(args, folder, args.steps, backbone)
    print(f"done. Next, play every checkpoint:\n    python evaluate.py --run "
          f"{shlex.quote(str(folder))} --ood")


if __name__ == "__main__":
    sys.exit(guarded(main))
