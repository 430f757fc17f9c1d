"""Play the game with a model and measure what it can do; draw what was measured.

Paper: arXiv 2501.17161, section 5 (ID, rule OOD) and appendix C.3. What is measured here and not in
the paper: hands and routes held out from training beside those seen in it, 1,000 hands a cell
instead of 234, intervals, the two shifts of "rule OOD" apart, the `fake` probe, and walks whose
rail goes on after a miss.

  1. deal the hands (or draw the walks) of a cell; they depend on the cell alone, never on a
     training seed
  2. play all episodes in one batch, keeping the attention cache between tries (`play`: rl.py
     collects its experience with the same function); a picture is looked at once, with the first
     turn; a walk begins a fresh conversation, and drops the old columns, at each position
  3. count. Hands: success within the tries and at the first, cards and numbers read right, error
     kinds. Walks: right actions of all tries, of each kind of action, and whole routes
  4. every rate with its Wilson 95 % interval

Shapes: B episodes in a batch, K turns of an episode, T tokens, V vocabulary.

    python evaluate.py --model runs/sft-gp-l-s0/step-000100 --ood      all cells
    python evaluate.py --model ... --show 4                            transcripts
    python evaluate.py --model ... --task gp-vl --ood                  in pictures
    python evaluate.py --model ... --task virl-l --ood                 walks
    python evaluate.py --model ... --task virl-vl --ood --blindfold    does it need its eyes?
    python evaluate.py --run runs/sft-gp-l-s0 --ood                    every checkpoint of a run
    python evaluate.py --plot results --out results/figure.png         the figure, from metrics

Read before: sft.py. Read next: rl.py.
"""

import argparse
import inspect
import json
import math
import os
import pathlib
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer

import gp_env
import virl_env
from sft import (DEFAULT_MODEL, OTHER_CITIES, TASKS, TRAINING_CITY, Problem, check_flags,
                 check_sight, checkpoints, cross_mask, cross_states, crossing_layers, data_flags,
                 encode_picture, guarded, load_backbone, name_default, parse_flags, pick_device,
                 picture_inputs, picture_options, pictured, places, precision, read_json,
                 read_lines, token_positions, user_ids, write_json)
from verifier import MAX_ANSWER, read_answer

EVALUATION_SEED = 20250126      # of the hands that are evaluated on, the same for every model

# The four cells keep apart what the paper's "rule OOD" mixes: another rule AND hands that must hold
# a face card. `fake` states the new rule and scores by the old one: a model that ignores the
# prompt passes it.
CELLS = {
    "id": dict(rule="ten", face=False),
    "ood": dict(rule="face", face=True),
    "ten-rule face-hands": dict(rule="ten", face=True),
    "face-rule any-hands": dict(rule="face", face=False),
    "fake": dict(rule="face", face=True, scoring_rule="ten"),
}
# In pictures, colour is a second shift: training saw black suits only (paper, section 5.2).
PICTURE_CELLS = {
    "id": dict(rule="ten", face=False, suits="black"),
    "ood": dict(rule="face", face=True, suits="black"),
    "visual": dict(rule="ten", face=False, suits="red"),
    "both": dict(rule="face", face=True, suits="red"),
}
# On walks the second shift is the place: other streets and names, in pictures other houses, signs
# and weather, too; in text the cell is called `visual` all the same. No route there is a training
# route, so there is nothing to split. `fake` states the relative words and pays for the absolute
# ones: the steps name both, so either can be copied.
WALK_CELLS = {
    "id": dict(rule="absolute"),
    "ood": dict(rule="relative"),
    "visual": dict(rule="absolute", elsewhere=True, split="all"),
    "both": dict(rule="relative", elsewhere=True, split="all"),
    "fake": dict(rule="relative", scoring_rule="absolute"),
}
TASK_CELLS = {"gp-l": CELLS, "gp-vl": PICTURE_CELLS, "virl-l": WALK_CELLS, "virl-vl": WALK_CELLS}
# What a run measures again and again, with --ood
CURVE_CELLS = {"gp-l": ["id", "ood"], "gp-vl": list(PICTURE_CELLS),
               "virl-l": ["id", "ood", "visual"], "virl-vl": ["id", "ood", "visual"]}
# Defaults of flags that a task wants otherwise than gp-l. 180 walks are about 3,000 tries, so that
# per-step accuracy is known to +-2 points, and 20 walks in each of nine cities. A prompt on a walk
# is five times as long as a hand's: fewer in a batch.
TASK_DEFAULTS = dict.fromkeys(("virl-l", "virl-vl"), {"hands": 180, "batch": 64})
SPLIT_NAMES = {"train": "seen", "test": "held-out", "val": "validation", "all": "all"}


# ------------------------------------------------------------------------------------------------
# 2. Playing in a batch
# ------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    """One try: what the model was told, what it answered, what that was worth."""

    prompt_ids: list            # tokens of this turn before the answer (not the earlier turns)
    answer_ids: list            # the sampled tokens themselves; never decoded and encoded again
    logprobs: list              # log p of each answer token, as the sampler saw it
    text: str                   # the answer in words
    reward: float
    message: str                # what the environment said back
    verdict: object
    new_conversation: bool      # nothing before this turn is visible to it
    picture: dict | None = None     # what a new conversation shows, as tensors (sft.encode_picture)


@dataclass
class Episode:
    """The tries of one environment, oldest first. At the end one of the two flags is True."""

    env: object
    prompt: str
    turns: list = field(default_factory=list)
    terminated: bool = False    # the game is over. A hand is solved then; a walk whose rail goes on
                                # may have missed positions all the same: ask `solved`
    truncated: bool = False     # out of tries


class RoomyLayer(DynamicLayer):
    """A key-value cache layer that grows in blocks.

    The stock layer concatenates: each new token copies the whole cache, and T tokens cost T^2 / 2
    copies. Here there is room for the next tokens already, and attention gets a view.
    """

    block = 128
    room = None             # two tensors (B, heads, more than T, size); keys and values are views
    # While a Recording stands: (1,), the column that the next token takes; keys and values lag
    # behind until it ends.
    slot = None

    def update(self, key_states, value_states, *args, **kwargs):
        """Append (B, heads, new, size) keys and values; return all so far, (B, heads, T, size)."""
        if self.slot is not None:
            return [kept.index_copy_(2, self.slot, fresh)
                    for kept, fresh in zip(self.room, (key_states, value_states))]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[2]
        if self.room is None or self.room[0].shape[2] < new or \
                self.room[0].shape[0] != key_states.shape[0]:
            shape = list(key_states.shape)
            shape[2] = new + self.block
            room = [key_states.new_empty(shape), value_states.new_empty(shape)]
            for fresh, kept in zip(room, (self.keys, self.values)):
                if old:
                    fresh[:, :, :old] = kept
            self.room = room
        self.room[0][:, :, old:new] = key_states
        self.room[1][:, :, old:new] = value_states
        self.keys, self.values = self.room[0][:, :, :new], self.room[1][:, :, :new]
        return self.keys, self.values

    def batch_select_indices(self, indices):
        """Keep only these rows of the batch."""
        super().batch_select_indices(indices)
        self.room = None

    def select_columns(self, columns):
        """Keep these columns of each row, in this order. columns (B, T)."""
        if self.get_seq_length():
            index = columns[:, None, :, None].expand(-1, self.keys.shape[1], -1,
                                                     self.keys.shape[3])
            self.keys, self.values = self.keys.gather(2, index), self.values.gather(2, index)
            self.room = None


class PictureLayer(DynamicLayer):
    """The cache of a layer that attends to a picture: new keys and values replace the old ones."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Keep (B, heads, tiles * patches, size) keys and values, and return them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class Reader:
    """The model reading B growing conversations at different speeds, with one cache.

    Answers differ in length, so the cache has columns that belong to some rows only. The mask of
    each row tells which are its own, and positions are counted over those alone. The update
    (sft.trunk) reads the same conversation without gaps; every token has the same position there:

        columns    0  1  2  3  4  5  6  7  8        its positions
        row 0      .  p  p  a  a  a  m  m  m        - 0 1 2 3 4 5 6 7     p prompt, a answer,
        row 1      p  p  p  a  .  .  .  m  m        0 1 2 3 - - - 4 5     m message, . not its own

    A picture is looked at when its conversation is first read; then it lives in the cache, as
    columns like others (LLaVA, Idefics) or as keys and values of layers of its own (Mllama). Gaps
    are no obstacle to m-RoPE (Qwen2.5-VL): sft.token_positions makes three numbers of the count.
    """

    recorded_on = ("cuda",)     # kinds of device where reading one token is recorded (Recording)

    def __init__(self, backbone, rows):
        self.backbone, self.rows = backbone, rows
        # transformers 5.24 gave this argument of every model another name
        known = inspect.signature(backbone.model.base_model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"
        self.recording = None
        self.banned = torch.tensor(backbone.banned, dtype=torch.long, device=backbone.device)
        self.restart()

    def restart(self):
        """Forget everything."""
        device, self.recording = self.backbone.device, None
        self.cache = Cache(layer_class_to_replicate=RoomyLayer)
        self.mask = torch.zeros(self.rows, 0, dtype=torch.long, device=device)
        self.pictures = [None] * self.rows      # what each row shows
        # Mllama: tiles of `cross_states` (None: no row shows anything); rows whose mark is read
        self.tiles = None
        self.looking = torch.zeros(self.rows, 1, dtype=torch.bool, device=device)

    def forget(self, rows):
        """Make these rows start afresh: none of their earlier columns is visible any more.

        A walk forgets at every position, and columns that nobody sees would pile up. So the visible
        ones of each row move to the right end, in their order, and the rest is cut off:

            columns    0  1  2  3  4  5                  0  1  2
            row 0      p  p  p  .  a  a   forgets   ->   .  .  .
            row 1      .  p  p  a  .  .             ->   p  p  a

        Nothing else changes: a key has its position built in, so it may stand in any column, if its
        mask goes with it and new columns come to the right of it (attention is causal by column).
        The next positions count on from the columns that are visible, as before.
        """
        self.settle()
        self.mask[rows], self.looking[rows] = 0, False
        # Sorted stably by 0 and 1, each row's visible columns are the last ones, in their order. As
        # many columns are kept as the longest row needs: none at all where every row forgets.
        longest = int(self.mask.sum(1).max())
        columns = self.mask.sort(dim=1, stable=True).indices
        columns = columns[:, columns.shape[1] - longest:]                       # (B, longest)
        self.mask = self.mask.gather(1, columns)
        for layer in self.cache.layers:
            if isinstance(layer, RoomyLayer):       # what belongs to a picture has no such columns
                layer.select_columns(columns)

    def keep(self, indices):
        """Go on with only these rows."""
        self.settle()
        self.rows = len(indices)
        self.mask, self.looking = self.mask[indices], self.looking[indices]
        self.pictures = [self.pictures[i] for i in indices.tolist()]
        self.tiles = None if self.tiles is None else self.tiles[indices]
        self.cache.batch_select_indices(indices)

    def _see(self, ids, pictures, before):
        """What the trunk needs beside ids (B, W) when the rows show these pictures from now on.

        Only what is new is looked at: a picture is new if it is another object than before.
        before: number of columns in the cache.
        """
        new = [now is not before for now, before in zip(pictures, self.pictures)]
        self.pictures = pictures
        crossing = crossing_layers(self.backbone.model)
        if not crossing:        # the old ones are columns of the cache
            return picture_inputs(self.backbone, ids, [
                picture if fresh else None for picture, fresh in zip(pictures, new)])
        extra = {}
        if any(new):
            # A layer keeps one tensor of keys for all rows, so all rows are shown again. A row that
            # shows nothing any more must be emptied, too: its old keys would still be attended to.
            self.tiles = None
            self._empty(crossing)
            if any(picture is not None for picture in pictures):
                extra["cross_attention_states"], self.tiles = cross_states(self.backbone, pictures)
        if self.tiles is not None:
            now = cross_mask(self.backbone, ids, self.tiles, self.looking)
            # The model cuts off as many as are in its cache already, so there has to be something.
            extra["cross_attention_mask"] = torch.nn.functional.pad(now, (0, 0, 0, 0, before, 0))
            mark = self.backbone.model.config.image_token_index
            self.looking = self.looking | (ids == mark).any(1, keepdim=True)
        return extra

    def _empty(self, crossing):
        """Put an empty PictureLayer where each of the layers `crossing` has its cache."""
        layers = self.cache.layers
        layers += [RoomyLayer() for _ in range(len(layers), max(crossing) + 1)]
        for i in crossing:
            layers[i] = PictureLayer()

    def read(self, ids, inside, pictures=None):
        """Append columns. ids, inside (B, W), inside 1 on real tokens -> logits (B, V) after the
        last column. W differs between calls; short rows are padded on the LEFT, so that the last
        column is every row's latest token.

        pictures: what each row shows from now on, None in a row of text; without, as before. The
        logits are valid until the next read."""
        pictures = pictures or self.pictures
        # On a GPU: one token a row, read by replaying a Recording. The same numbers, in less time.
        if ids.shape[1] == 1 and self.backbone.device.type in self.recorded_on and all(
                now is before for now, before in zip(pictures, self.pictures)):
            if self.recording is None or self.recording.left == 0:
                self.settle()
                if Recording.possible(self):
                    try:
                        self.recording = Recording(self, ids, inside)
                    except Problem as problem:
                        Reader.recorded_on = ()
                        tqdm.write(str(problem))
            if self.recording:
                return self.recording.play(ids, inside)
        self.settle()
        self.mask = torch.cat([self.mask, inside], dim=1)
        count = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        with precision(self.backbone):
            extra = self._see(ids, pictures, self.mask.shape[1] - ids.shape[1])
        return self.logits(ids, self.mask,
                           token_positions(self.backbone, self.pictures, count), extra)

    def logits(self, ids, mask, where, extra):
        """The forward pass of `read`. mask (B, T), or (B, 1, 1, room) of bool. -> (B, V)"""
        with precision(self.backbone):
            hidden = self.backbone.model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=where, use_cache=True,
                **{self.cache_name: self.cache}, **extra).last_hidden_state[:, -1]
            logits = self.backbone.model.get_output_embeddings()(hidden).float()
        return logits.index_fill_(1, self.banned, -torch.inf)

    def settle(self):
        """End a Recording: what it read becomes columns like the others."""
        if self.recording:
            self.recording.end()
            self.recording = None


@torch.no_grad()
def play(backbone, envs, seeds, temperature, max_new_tokens, generator=None, keep_cache=True,
         progress=None, blindfold=False):
    """Play one episode in every environment, all in one batch. Returns a list of Episode.

    temperature 0 takes the likeliest token; otherwise `generator` (a torch.Generator on the model's
    device) draws. keep_cache=False reads each conversation again at every try: slower, for checks.
    blindfold: every picture is grey.
    """
    backbone.model.eval()       # train mode with checkpointing samples wrong tokens, silently
    device = backbone.device
    # Four lists, one entry for each episode e:
    #   told[e]     tokens of the latest user turn: what the update will see as prompt
    #   pending[e]  tokens that the model has not read yet: told[e], and before it the last token of
    #               the answer, which was sampled but never fed
    #   spoken[e]   everything read so far; only needed where no cache is kept
    #   shown[e]    the picture of the running conversation
    # invariant: (columns of the cache that are row e's) + pending[e] = the whole conversation
    episodes, pending, told, shown = [], [], [], []
    for env, seed in zip(envs, seeds):
        observation, _ = env.reset(seed)
        episodes.append(Episode(env, observation["text"]))
        ids, picture = _user_turn(backbone, observation, blindfold)
        told.append(ids)
        shown.append(picture)
        pending.append(list(ids))
    new = [True] * len(envs)
    playing = list(range(len(envs)))            # episode numbers of the rows of the batch
    spoken = [[] for _ in envs]                 # whole conversation so far, for keep_cache=False
    reader = Reader(backbone, len(envs))
    while playing:
        if not keep_cache:
            reader.rows = len(playing)
            reader.restart()
        block = [pending[e] if keep_cache else spoken[e] + pending[e] for e in playing]
        answers = _answer(backbone, reader, block, [shown[e] for e in playing], temperature,
                          max_new_tokens, generator)
        texts = backbone.tokenizer.batch_decode([ids for ids, _ in answers],
                                                skip_special_tokens=True)
        stay = []                               # rows whose episode goes on
        for row, (e, (ids, logprobs), text) in enumerate(zip(playing, answers, texts)):
            observation, reward, terminated, truncated, info = envs[e].step(text)
            episodes[e].turns.append(Turn(told[e], ids, logprobs, text, reward,
                                          observation["text"], info["verdict"], new[e],
                                          shown[e] if new[e] else None))
            episodes[e].terminated, episodes[e].truncated = terminated, truncated
            if terminated or truncated:
                continue
            stay.append(row)
            # --- the verifier's message is the next user turn (the paper's sequential revision)
            new[e] = observation["new_conversation"]
            told[e], picture = _user_turn(backbone, observation, blindfold)
            if new[e]:
                shown[e] = picture              # until the next new conversation, or None
                spoken[e], pending[e] = [], list(told[e])
                continue
            if ids[-1] not in backbone.end_ids:         # cut off: close the turn for the model
                told[e] = backbone.end_ids[:1] + told[e]
            spoken[e] += pending[e] + ids[:-1]
            # the last sampled token has not been fed yet: it goes first in the next block
            pending[e] = ids[-1:] + told[e]
        # --- finished episodes leave the batch: what is solved costs nothing more
        if len(stay) < len(playing):
            playing = [playing[row] for row in stay]
            if playing and keep_cache:
                reader.keep(torch.tensor(stay, device=device))
        # --- a new conversation forgets; last, so that rows that left hold no columns
        fresh = [row for row, e in enumerate(playing) if new[e]]
        if fresh and keep_cache:
            reader.forget(fresh)
        if progress:
            progress(len(envs) - len(playing))
    reader.settle()     # a Recording and its reader hold each other, and the whole cache
    return episodes


def _user_turn(backbone, observation, blindfold=False):
    """(token ids, picture as tensors or None) of what the environment says."""
    image = observation["image"]
    if image is not None:
        image = Image.new("RGB", image.size, (127, 127, 127)) if blindfold else image
        return encode_picture(backbone, observation["text"], image)
    return user_ids(backbone, observation["text"], observation["new_conversation"]), None


def _answer(backbone, reader, block, pictures, temperature, max_new_tokens, generator):
    """Feed one block of tokens a row, then sample an answer for each.

    pictures: what each row's conversation shows, or None.

    Returns [(ids, logprobs)] with the end token if it came. The last sampled token of a row is not
    in the cache yet.
    """
    device = backbone.device
    width = max(map(len, block))
    fill = backbone.end_ids[0]
    ids = torch.tensor([[fill] * (width - len(b)) + b for b in block], device=device)
    inside = torch.tensor([[0] * (width - len(b)) + [1] * len(b) for b in block], device=device)
    ends = torch.tensor(backbone.end_ids, device=device)
    going = torch.ones(len(block), dtype=torch.bool, device=device)     # rows still speaking
    # A row that has ended is computed until all have: its tokens are thrown away, and its columns
    # are masked (inside = 0), so that it never reads what it said after its end.
    columns, scores, spoke = [], [], []
    for step in range(max_new_tokens):
        logits = reader.read(ids, inside, pictures)                                # (B, V)
        if temperature > 0:
            # No top-k, no top-p, no penalty: rl.py scores these tokens again, as a plain softmax at
            # this temperature, and that has to be the policy that played. The log-probabilities
            # kept here are for rl.self_check, which compares the two.
            logprobs = torch.log_softmax(logits / temperature, dim=-1)
            if step == 0 and logprobs.isnan().any():
                raise Problem("the model's output is not a number: its weights are damaged, a "
                              "learning rate was too high, or --temperature is too near 0")
            token = torch.multinomial(logprobs.exp(), 1, generator=generator)      # (B, 1)
        else:
            logprobs = torch.log_softmax(logits, dim=-1)
            token = logits.argmax(-1, keepdim=True)
        columns.append(token)
        scores.append(logprobs.gather(1, token))
        spoke.append(going[:, None].clone())
        going &= ~torch.isin(token[:, 0], ends)
        if not going.any():
            break
        ids, inside = token, going[:, None].long()
    columns, scores, spoke = (torch.cat(x, dim=1).tolist() for x in (columns, scores, spoke))
    return [([t for t, s in zip(c, k) if s], [p for p, s in zip(q, k) if s])
            for c, q, k in zip(columns, scores, spoke)]


# ------------------------------------------------------------------------------------------------
# On a GPU: the reading of one token, recorded. Never at work on a CPU
# ------------------------------------------------------------------------------------------------


class Recording:
    """The reading of one token a row, recorded on a GPU, then played again and again.

    A step of a large model is many small jobs (kernels), several for each operation of each layer,
    and Python hands them to the GPU one by one: for 32 rows of the 11B model an H200 took 120 ms,
    and was at work for 7.5 of them. A CUDA graph is the list of those jobs; played, they follow
    each other and Python has no part.

    The price: each tensor stays in its place and keeps its shape. So this step writes keys and
    values into the room behind the columns, at a `slot` that it moves on itself, attends to the
    whole room, and has a mask that tells which columns of it count:

        columns    0  1  2  3 | 4  5  6  7     slot 4: the next token goes there
        row 0      1  1  1  1 | 0  0  0  0
        row 1      0  1  1  1 | 0  0  0  0
    """

    streams = {}            # device: where it is recorded; each new one would cost work memory

    @classmethod
    def possible(cls, reader):
        """Is there attention that takes a mask of yes and no, and room behind the columns?"""
        grown = cls.layers(reader)
        return (getattr(reader.backbone.model.config, "_attn_implementation", "") == "sdpa"
                and bool(grown) and grown[0].room[0].shape[2] > reader.mask.shape[1])

    @staticmethod
    def layers(reader):
        """The layers of the cache that grow by a column a token."""
        return [layer for layer in reader.cache.layers
                if isinstance(layer, RoomyLayer) and layer.room is not None]

    def __init__(self, reader, ids, inside):
        device, self.graph = reader.backbone.device, None
        self.reader, self.width = reader, reader.mask.shape[1]
        grown = self.layers(reader)
        self.left = grown[0].room[0].shape[2] - self.width
        # --- what is fed, and what the step keeps up by itself: all of it stays in its place
        self.ids, self.inside = ids.clone(), inside.clone()
        self.mask = torch.nn.functional.pad(reader.mask, (0, self.left))            # (B, room)
        self.slot = torch.tensor([self.width], device=device)
        # behind its first turn a row counts on, from wherever m-RoPE has put it
        count = reader.mask.sum(1, keepdim=True)
        self.shift = token_positions(reader.backbone, reader.pictures, count) - count
        with precision(reader.backbone):
            # the same for any words
            self.extra = reader._see(self.ids, reader.pictures, self.width)
        for layer in grown:
            for kept in layer.room:
                kept[:, :, self.width:] = 0     # never written: a NaN there would spread, masked
            layer.slot = self.slot
        try:
            self._record(device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:           # what a model does on its way may forbid it
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            self.graph = None
            self._rewind()
            self.end()
            raise Problem(f"the reading of one token cannot be recorded here, it goes on step by "
                          f"step, slower ({str(error).splitlines()[0]}). Should memory run short, "
                          "begin with --no-record") from None

    def _record(self, device):
        """Make the graph, and see that it does what the step does. Raises RuntimeError."""
        if device.type != "cuda":               # on a CPU, for tests, the step is just called
            return
        with torch.cuda.device(device):
            if device not in self.streams:
                self.streams[device] = torch.cuda.Stream()
            aside, main = self.streams[device], torch.cuda.current_stream()
            aside.wait_stream(main)
            with torch.cuda.stream(aside):      # once without recording, as CUDA asks for
                expected = self.step()
            main.wait_stream(aside)
            self._rewind()
            try:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=aside):
                    self.logits = self.step()
            finally:
                torch.cuda.set_stream(main)     # a recording that failed would leave the other one
            self.graph.replay()
            open_ids = expected.isfinite()      # all but the banned tokens
            gap = (self.logits - expected)[open_ids].abs().mean().item()
            if not gap < 0.05:
                raise RuntimeError(f"played back it differs by {gap:.2g}")
            self._rewind()

    def _rewind(self):
        """As if no step had been made."""
        self.slot.fill_(self.width)
        self.mask[:, self.width:] = 0

    def step(self):
        """What is recorded. Returns logits (B, V)."""
        self.mask.index_copy_(1, self.slot, self.inside)
        count = (self.mask.sum(1, keepdim=True) - 1).clamp(min=0)
        logits = self.reader.logits(self.ids, self.mask.bool()[:, None, None], count + self.shift,
                                    self.extra)
        self.slot += 1
        return logits

    def play(self, ids, inside):
        """Read ids (B, 1), inside as in Reader.read. Returns logits (B, V)."""
        self.ids.copy_(ids)
        self.inside.copy_(inside)
        if self.graph:
            self.graph.replay()
        else:
            self.logits = self.step()
        self.width, self.left = self.width + 1, self.left - 1
        return self.logits

    def end(self):
        """Leave the reader as if it had read step by step."""
        self.reader.mask = self.mask[:, :self.width]
        for layer in self.layers(self.reader):
            layer.slot = None
            layer.keys, layer.values = (kept[:, :, :self.width] for kept in layer.room)


# ------------------------------------------------------------------------------------------------
# 3. and 4. Counting
# ------------------------------------------------------------------------------------------------


def wilson(hits, count, z=1.96):
    """95 % confidence interval of a rate, both ends in 0..1 (Wilson 1927).

    Unlike p +- z*sqrt(p(1-p)/n), the paper's error bar, it stays inside 0..1 and is honest at 0 %.

    >>> [round(x, 3) for x in wilson(27, 234)]      # the paper's GP-L start, 11.5 %
    [0.081, 0.163]
    """
    if count == 0:
        return 0.0, 1.0
    p, spread = hits / count, z * z / count
    middle = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def cell_environments(cell, split, count, task="gp-l", shown=None,
                      where=(TRAINING_CITY, OTHER_CITIES)):
    """Environments and seeds of one cell. The hands depend on (cell, split, count) alone.

    task: whose cell it is. shown: how its pictures are shown (sft.picture_options), None for as
    small as the small backbone sees. where: V-IRL's training place, and its other places, which
    take turns.
    """
    how = {"split": split} | TASK_CELLS[task][cell]
    if pictured(task):
        how |= shown or {"picture": gp_env.PICTURE_SIZE}
    turns = [{}]
    if task.startswith("virl"):
        turns = [{"where": place} for place in (where[1] if how.pop("elsewhere", 0) else where[:1])]
        # One walk gives both counts (measure_walks): up to the first position missed it is the
        # paper's walk, whether or not its rail goes on after that.
        how["go_on"] = True
    envs = [new_game(task, **how, **turns[i % len(turns)]) for i in range(count)]
    return envs, [[EVALUATION_SEED, i] for i in range(count)]


def new_game(task, **how):
    """An environment of a task. how: its arguments."""
    return (virl_env.Navigation if task.startswith("virl") else gp_env.GeneralPoints)(**how)


def measure(episodes):
    """What a list of finished episodes shows. Returns a dict of counts and rates in 0..1.

    success: correct within the tries (the paper's measure); first_try: at once; cards_read,
    numbers_read: share of first answers whose `cards` / `number` field is right (numbers: under the
    STATED rule); errors: kinds of the wrong first answers; tries: mean number of answers. For
    pictures also single_cards and confusion, see `read_singly`.
    """
    # Reading is judged on the FIRST answer: later ones have seen the verifier's message, which
    # names the numbers that are missing and so gives the rule away.
    first = [episode.turns[0].verdict for episode in episodes]
    count, hits = len(episodes), sum(e.terminated for e in episodes)
    errors = Counter(v.kind for v in first if not v.correct)
    return {"count": count, "hits": hits, "success": hits / count,
            "interval": wilson(hits, count),
            "first_try": sum(v.correct for v in first) / count,
            "cards_read": sum(v.cards_right for v in first) / count,
            "numbers_read": sum(_read_as_stated(e) for e in episodes) / count,
            "errors": {kind: n / count for kind, n in sorted(errors.items())},
            "tries": sum(len(e.turns) for e in episodes) / count
            } | (read_singly(episodes) if episodes[0].env.picture else {})


def read_singly(episodes):
    """How the first answers read single cards: {"single_cards": rate, "confusion": table}.

    Like the verifier it leaves the order free: cards that are on both sides are read right, the
    others are paired as they stand. table: {rank shown: {rank read, "?" for none: times}}.

        shown J 3 K 10, read 3 Q 10 K   ->   3, K and 10 right, and J read as Q
    """
    table = {rank: Counter() for rank in gp_env.RANKS}
    for episode in episodes:
        shown = list(episode.env.hand.cards)
        said = read_answer(episode.turns[0].text[:MAX_ANSWER]).get("cards", [])
        said = [card.upper() if card.upper() in table else "?" for card in said[:4]]
        for card in list(shown):
            if card in said:
                table[card][card] += 1
                shown.remove(card)
                said.remove(card)
        for card, other in zip(shown, said + ["?"] * 4):
            table[card][other] += 1
    right, count = sum(row[card] for card, row in table.items()), 4 * len(episodes)
    return {"single_cards": right / count,
            "confusion": {card: dict(row) for card, row in table.items() if row}}


def _read_as_stated(episode):
    """Did the first answer's `number` field follow the rule in the prompt?"""
    if episode.env.scoring_rule is None:
        return episode.turns[0].verdict.numbers_right
    hand = episode.env.hand     # the fake probe scores by another rule: ask about the stated one
    return gp_env.verify_gp(episode.turns[0].text, hand.cards, hand.numbers).numbers_right


def positions(episode):
    """The tries of an episode, conversation by conversation, as lists of Turn.

    A hand is one conversation, a walk is one at each position of its rail.
    """
    found = []
    for turn in episode.turns:
        if turn.new_conversation:
            found.append([])
        found[-1].append(turn)
    return found


def solved(episode):
    """Did it end well: the hand solved, or every position of the walk right within its tries?"""
    return episode.terminated and all(tries[-1].verdict.correct for tries in positions(episode))


def measure_walks(episodes):
    """What a list of finished walks shows, whose rails go on. Returns counts and rates in 0..1.

    success: every position right within its tries. per_step: right tries of all tries (the paper's
    main measure: the tries at a position are separate samples). A walk of the paper ends at the
    first position missed, and its first position is always a turn: a policy that gets every turn
    wrong has 0 there, whatever else it knows. Hence per_step_on, with the tries after a miss.

        position       first turn   forward   later turn   stop        per_step   per_step_on
        right tries    0 of 2       1 of 1    1 of 2       1 of 1      0 of 2     3 of 6

    kinds, kinds_on: the same for each kind of action, with intervals. turns: both kinds of turn
    together, the rail going on: only there the rules differ. landmarks_read, crossings_read: share
    of positions (their number: positions) whose first answer says what is there. errors: kinds of
    the wrong first answers.
    The tries of a walk are not independent, so intervals of tries are a little narrow.
    """
    paper, on, first = [], [], []       # (kind of action, verdict) of tries; first tries' verdicts
    for episode in episodes:
        missed = False
        # The rail is where the walker stood, conversation by conversation: play() never skips one.
        for place, tries in zip(episode.env.rail, positions(episode)):
            judged = [(place.kind, turn.verdict) for turn in tries]
            on += judged
            # The paper's walk ends WITH the position that is missed: its tries still count.
            paper += [] if missed else judged
            missed |= not tries[-1].verdict.correct
            # Reading is judged before the verifier has said what was misread.
            first.append(tries[0].verdict)
    count, hits = len(episodes), sum(map(solved, episodes))
    errors = Counter(v.kind for v in first if not v.correct)
    found = {"count": count, "hits": hits, "success": hits / count,
             "interval": wilson(hits, count)}
    for suffix, judged in (("", paper), ("_on", on)):
        kinds = {"every action": _rate(verdict for _, verdict in judged)}
        kinds |= {kind: _rate(v for k, v in judged if k == kind) for kind in virl_env.KINDS}
        found |= {f"per_step{suffix}": kinds["every action"]["rate"],
                  f"steps{suffix}": kinds["every action"]["count"], f"kinds{suffix}": kinds}
    turns = _rate(v for k, v in on if k.endswith("turn"))
    return found | {
        "turns": turns["rate"], "turn_tries": turns["count"], "positions": len(first),
        "first_try": sum(v.correct for v in first) / len(first),
        "landmarks_read": sum(v.landmarks_right for v in first) / len(first),
        "crossings_read": sum(v.intersection_right for v in first) / len(first),
        "errors": {kind: n / len(first) for kind, n in sorted(errors.items())},
        "tries": sum(len(e.turns) for e in episodes) / count}


def _rate(verdicts):
    """Share of the verdicts that are right; 0 of 0 is 0, with an interval from 0 to 1."""
    right = [verdict.correct for verdict in verdicts]
    return {"rate": sum(right) / max(1, len(right)), "count": len(right),
            "interval": wilson(sum(right), len(right))}


def measure_places(episodes):
    """{"places": {city or folder: measures}}, where the walks of a cell lie in several."""
    apart = {}
    for episode in episodes:
        apart.setdefault(episode.env.atlas.where, []).append(episode)
    if len(apart) == 1:
        return {}
    return {"places": {where: measure_walks(some) for where, some in apart.items()}}


def cell_splits(cells, splits, task):
    """[(cell, split)] to play. A cell of other cities has one split, which is played once."""
    return list(dict.fromkeys((cell, TASK_CELLS[task][cell].get("split", split))
                              for split in splits for cell in cells))


def evaluate(backbone, cells, splits, count, temperature=0.6, batch=256, max_new_tokens=48,
             quiet=False, task="gp-l", shown=None, where=(TRAINING_CITY, OTHER_CITIES),
             blindfold=False):
    """Play `count` hands or walks of each cell and split.

    Returns ({"held-out/id": measures, ...}, {"held-out/id": episodes, ...}).

    batch: episodes played together. It changes the draws, not what is measured: compare models at
    the same one. task, shown, where: see `cell_environments`. blindfold: see `play`.
    """
    results, kept = {}, {}
    # Hands are a function of the cell, and where the draws begin, too: two checkpoints meet the
    # same hands, and their difference is not the luck of the deal.
    names = cell_splits(cells, splits, task)
    bar = tqdm(total=len(names) * count, desc="evaluate", unit="episode", leave=False,
               disable=quiet or not sys.stderr.isatty(), dynamic_ncols=True)
    for cell, split in names:
        envs, seeds = cell_environments(cell, split, count, task, shown, where)
        episodes = []
        for start in range(0, count, batch):
            generator = torch.Generator(backbone.device).manual_seed(EVALUATION_SEED + start)
            episodes += play(backbone, envs[start:start + batch], seeds[start:start + batch],
                             temperature, max_new_tokens, generator, blindfold=blindfold)
            for turn in (turn for episode in episodes[start:] for turn in episode.turns):
                turn.picture = None     # only an update looks again: gigabytes on a large model
            bar.update(len(episodes) - start)
        name = f"{SPLIT_NAMES[split]}/{cell}"
        results[name] = (measure_walks(episodes) | measure_places(episodes)
                         if task.startswith("virl") else measure(episodes))
        kept[name] = episodes
    bar.close()
    return results, kept


def show(results):
    """One aligned line for each cell."""
    for name, m in results.items():
        low, high = m["interval"]
        line = f"  {name:30s} success {m['success']:6.1%} [{low:.1%}, {high:.1%}]"
        if "per_step" in m:             # walks
            low, high = m["kinds"]["every action"]["interval"]
            first, later = (m["kinds_on"][kind]["rate"] for kind in virl_env.KINDS[:2])
            line += (f"  per step {m['per_step']:6.1%} [{low:.1%}, {high:.1%}]  rail goes on "
                     f"{m['per_step_on']:6.1%}, first turn {first:6.1%}, later turns {later:6.1%}")
        else:
            line += (f"  first try {m['first_try']:6.1%}  "
                     f"numbers read right {m['numbers_read']:6.1%}")
        if "single_cards" in m:         # cards in pictures
            line += f"  cards: all four {m['cards_read']:6.1%}, single {m['single_cards']:6.1%}"
        print(line, flush=True)


def show_confusion(results):
    """Pictures: a table for each cell, a row for each rank shown, in percent of its cards."""
    for name, m in results.items():
        if "confusion" in m:
            print(f"\n# {name}: rank shown (down), rank read (across), %")
            names = [*gp_env.RANKS, "?"]
            print("    " + "".join(f"{rank:>4}" for rank in names))
            for rank, row in m["confusion"].items():
                share = {read: 100 * times / sum(row.values()) for read, times in row.items()}
                print(f"{rank:>4}" + "".join(f"{share[read]:4.0f}" if read in share else "   ."
                                             for read in names))


def show_kinds(results):
    """Walks: a table for each cell, accuracy by kind of action and by city, intervals in %."""
    for name, m in results.items():
        if "kinds" not in m:
            continue
        print(f"\n# {name:26s}{'up to the first miss':31s}the rail goes on")
        lines = {kind: (m["kinds"][kind], m["kinds_on"][kind]) for kind in m["kinds"]}
        lines |= {place: (own["kinds"]["every action"], own["kinds_on"]["every action"])
                  for place, own in m.get("places", {}).items()}
        for line, rates in lines.items():
            print(f"    {line[-22:]:24s}" + "".join(
                "{:6.1%} [{:4.0%}, {:4.0%}] of {:<7d}".format(r["rate"], *r["interval"], r["count"])
                for r in rates))
        print(f"    first answers: landmarks read right {m['landmarks_read']:.1%}, intersection "
              f"{m['crossings_read']:.1%}")


def show_transcripts(episodes, count, pictures="", positions_shown=3):
    """Print conversations, half of them solved and half not, as far as there are any.

    pictures: where the pictures that were shown go, as PICTURES-1.png, PICTURES-2.png, ... On
    walks these are those of the first positions_shown positions; the others are left out.
    """
    # A walk whose rail goes on is terminated whatever was missed: `terminated` would not do here.
    good = [e for e in episodes if solved(e)][:count - count // 2]
    failed = [e for e in episodes if not solved(e)][:count - len(good)]
    number = 0
    for episode in good + failed:
        print("\n" + "=" * 30, "solved" if solved(episode) else "not solved", "=" * 30)
        prompt, talks = episode.prompt, positions(episode)
        for at, tries in enumerate(talks[:positions_shown]):
            if episode.env.picture:
                number += 1
                path = pathlib.Path(f"{pictures}-{number}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                image, seen = _shown(episode.env, at)
                image.save(path)
                print(f"[the picture is in {path}: {seen}]")
            print(prompt)
            for turn in tries:
                # at a new position the environment's words are the next prompt, not a message
                prompt, moved = turn.message, turn is tries[-1] and at + 1 < len(talks)
                print(f"  model     {turn.text}")
                print(f"  verifier  [{turn.reward:+.1f}] "
                      f"{turn.verdict.message if moved else turn.message}")
        if len(talks) > positions_shown:
            print(f"... and {len(talks) - positions_shown} more positions (--show-positions)")


def _shown(env, at):
    """(picture, what is on it) of a hand, or of the position number `at` of a walk."""
    if isinstance(env, virl_env.Navigation):
        return env.look(env.rail[at]), env.rail[at].observation
    return env.image, ", ".join(env.hand.cards)


# ------------------------------------------------------------------------------------------------
# The figure: from the eval.jsonl of finished runs alone
# ------------------------------------------------------------------------------------------------


def read_runs(folder, task="gp-l"):
    """Find runs of a task below a folder: [(kind, seed, rows of eval.jsonl)], kinds as in ARMS.

    Of each kind, runs are comparable that differ in nothing but the seed. The largest such group is
    kept; the others are named, with the flag that sets them apart.
    """
    groups = {}             # kind: list of groups, each a list of (path, args, rows)
    for path in sorted(pathlib.Path(folder).rglob("eval.jsonl")):
        try:
            args = json.loads((path.parent / "args.json").read_text())
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows.sort(key=lambda row: row["step"])
            if not rows or args.get("task", task) != task:      # not measured yet, or another game
                continue
            for row in rows:                        # every number that a figure or table asks for
                if not (0 <= row["flops_spent"] < 1e40 and 0 < row["hands"] < 1e9):
                    raise ValueError("compute or hands are no such numbers")
                for m in row["cells"].values():
                    if not all(0 <= m[measure] <= 1 and m.get(SHARE_OF.get(measure), 1) >= 0
                               for measure in TABLE[task][1]):
                        raise ValueError("a rate is not between 0 and 1")
            kind = "blind " * bool(args.get("drop_pictures")) + args["kind"]
            if kind not in ARMS or not isinstance(args["seed"], int):
                raise ValueError("neither a run of sft.py nor of rl.py")
            alike = groups.setdefault(kind, [])
            home = next((g for g in alike if not _difference(args, g[0][1])
                         and args["seed"] not in [known["seed"] for _, known, _ in g]), None)
            if home is None:
                alike.append(home := [])
            home.append((path.parent, args, rows))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Problem(f"{path.parent}: not a run this script can read ({error})") from None
    if not groups:
        raise Problem(f"{folder}: no eval.jsonl of {task} below it; make one with rl.py, or with "
                      "evaluate.py --run")
    kept = []
    for kind, alike in groups.items():
        most = max(alike, key=len)                  # of equally large ones the first
        kept += [(kind, args["seed"], rows) for _, args, rows in most]
        for path, args, _ in (run for group in alike if group is not most for run in group):
            flag = (_difference(args, most[0][1]) or ["seed"])[0].replace("_", "-")
            print(f"left out: {path}, for its --{flag} (compared with {most[0][0]})")
    return kept


def _difference(args, others):
    """Flags in which two runs differ, the seed and flags that one does not know aside."""
    return sorted(key for key in args.keys() & others.keys() - {"seed"} if args[key] != others[key])


def curve(runs, kind, cell, measure_name="success", against=None):
    """Mean, lowest and highest over seeds at each step: [(FLOPs, mean, low, high)] in percent.

    SFT and RL pass the same checkpoint, which the RL runs measured as their step 0: it is a point
    of both. (A blind arm never was there.) against: another measure that takes the place of FLOPs,
    in percent. The points stay in the order of FLOPs, and low and high are the mean: a band would
    cross itself.
    """
    points, seeds = {}, {}
    for run_kind, _, rows in runs:
        for row in rows:
            start = run_kind == "rl" and row["step"] == 0 and not kind.startswith("blind")
            if (run_kind == kind or start) and cell in row["cells"]:
                at = 0 if start else row["step"]
                m = row["cells"][cell]
                points.setdefault(at, []).append((row["flops_spent"], 100 * m[measure_name],
                                                  100 * m[against] if against else 0))
                if not start:
                    seeds[at] = seeds.get(at, 0) + 1
    most = max(seeds.values(), default=0)           # steps that every seed was measured at
    made = []
    for p in (p for at, p in points.items() if most and seeds.get(at, most) == most):
        spent, rates, others = zip(*p)
        mean = sum(rates) / len(rates)
        made.append((sum(spent) / len(p), mean, min(rates), max(rates), sum(others) / len(p)))
    made.sort()
    return [(x, mean, mean, mean) if against else (spent, mean, low, high)
            for spent, mean, low, high, x in made]


def gain(hits, count, hits_before, count_before, z=1.96):
    """Difference of two rates with its 95 % interval (Newcombe 1998, from two Wilson intervals)."""
    p, q = hits / max(1, count), hits_before / max(1, count_before)
    (low_p, high_p), (low_q, high_q) = wilson(hits, count, z), wilson(hits_before, count_before, z)
    return (p - q, p - q - math.hypot(p - low_p, high_q - q),
            p - q + math.hypot(high_p - p, q - low_q))


# What a table tells: its heading, and {measure: what is added to the name of the cell}
_HANDS = ("success within five tries", {"success": "", "numbers_read": ", numbers read right"})
_WALKS = ("right actions of all tries", {
    "per_step": "", "per_step_on": ", the rail goes on", "turns": ", turns alone, the rail goes on",
    "success": ", whole routes"})
TABLE = {"gp-l": _HANDS,
         "gp-vl": (_HANDS[0], _HANDS[1] | {"cards_read": ", all four cards read right"}),
         "virl-l": _WALKS,
         "virl-vl": (_WALKS[0], _WALKS[1] | {"landmarks_read": ", landmarks read right"})}
# What a measure is a share of, where it is not a share of the hands or walks. It differs between
# checkpoints: a walk that misses later has more tries.
SHARE_OF = {"per_step": "steps", "per_step_on": "steps_on", "turns": "turn_tries",
            "landmarks_read": "positions"}


def table(runs, task="gp-l"):
    """A Markdown table: start, and the end of each arm; mean (lowest-highest) over seeds.

    A gain is the mean over seeds of end minus start, with two measures of chance. The 95 % interval
    is about these trained policies: the luck of hands and of sampling. In brackets stand the lowest
    and the highest seed: the luck of training. (Hands repeat between seeds and share numbers, so
    the interval is a little narrow; start and end meet the same hands, which makes it a little
    wide.)
    """
    ends = {"start": {seed: rows[0] for kind, seed, rows in runs if kind == "rl"}}
    for kind, (label, _) in ARMS.items():
        ends[label] = {seed: rows[-1] for run_kind, seed, rows in runs if run_kind == kind}
    names = [n for n in ends if ends[n]]
    gained = names[1:] if ends["start"] else []
    heading, said = TABLE[task]
    lines = [" | ".join([f"| {heading}", *names] + [f"{n} - start [95 % interval] (seeds)"
                                                    for n in gained]) + " |",
             "|---" * (1 + len(names) + len(gained)) + "|"]
    cells = next(iter((ends["RL"] or ends[names[0]]).values()))["cells"]
    for cell, measure_name in [(c, m) for m in said for c in cells
                               if all(c in r["cells"] for n in names for r in ends[n].values())]:
        line = [cell + said[measure_name]]
        for name in names:
            rates = [100 * row["cells"][cell][measure_name] for row in ends[name].values()]
            line.append(f"{sum(rates) / len(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})")
        for name in gained:
            gains = [gain(*_hits(row, cell, measure_name),
                          *_hits(ends["start"][seed], cell, measure_name))
                     for seed, row in ends[name].items() if seed in ends["start"]]
            line.append("{:+.1f} [{:+.1f}, {:+.1f}] ({:+.1f} to {:+.1f})".format(
                *(100 * x for x in mean_gain(gains))) if gains else "")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _hits(row, cell, measure_name):
    """(hits, count) behind a rate of a row of eval.jsonl."""
    measures = row["cells"][cell]
    count = measures.get(SHARE_OF.get(measure_name), row["hands"])
    return measures[measure_name] * count, count


def mean_gain(gains):
    """[(difference, low, high)] of independent seeds -> (mean, low, high, smallest, largest).

    Each seed counts alike, however many tries its walks had. The half-widths of n independent
    intervals combine to the root of the sum of their squares, over n.

    >>> [round(x, 3) for x in mean_gain([(0.1, 0.06, 0.14), (0.3, 0.27, 0.33)])]
    [0.2, 0.175, 0.225, 0.1, 0.3]
    """
    found, lows, highs = zip(*gains)
    mean = sum(found) / len(found)
    below, above = (math.hypot(*(x - d for x, d in zip(end, found))) / len(found)
                    for end in (lows, highs))
    return mean, mean - below, mean + above, min(found), max(found)


# The arms of the comparison: {kind of run: (name, colour)}. A blind run of SFT never saw pictures
# (sft.py --drop-pictures).
ARMS = {"sft": ("SFT", (52, 104, 192)), "blind sft": ("SFT, pictures dropped", (120, 120, 120)),
        "rl": ("RL", (200, 60, 50))}
# What a figure shows, from left to right: (title, cell, measure). A fourth entry is a measure to
# draw it against, instead of compute: the paper's Fig. 8.
PANELS = {
    "gp-l": (("ID, hands seen in training", "seen/id", "success"),
             ("ID, held-out hands", "held-out/id", "success"),
             ("rule OOD, held-out hands", "held-out/ood", "success"),
             ("rule OOD: numbers read right", "held-out/ood", "numbers_read")),
    "gp-vl": (("ID, held-out hands", "held-out/id", "success"),
              ("rule OOD, held-out hands", "held-out/ood", "success"),
              ("visual OOD, held-out hands", "held-out/visual", "success"),
              ("ID: reading and success", "held-out/id", "success", "cards_read"),
              ("rule OOD: reading and success", "held-out/ood", "success", "cards_read"),
              ("visual OOD: reading and success", "held-out/visual", "success", "cards_read")),
    # per_step of the rule OOD counts up to the first position missed, forward() and all; beside it,
    # turns alone, the rail going on (measure_walks).
    "virl-l": (("ID, held-out routes", "held-out/id", "per_step"),
               ("rule OOD, held-out routes", "held-out/ood", "per_step"),
               ("visual OOD, nine other cities", "all/visual", "per_step"),
               ("ID, whole routes", "held-out/id", "success"),
               ("rule OOD: turns, the rail goes on", "held-out/ood", "turns"),
               ("visual OOD, whole routes", "all/visual", "success")),
}
PANELS["virl-vl"] = (*PANELS["virl-l"][:2],
                     ("visual OOD, nine other cities: landmarks read", "all/visual",
                      "landmarks_read"), *PANELS["virl-l"][3:])


def plot(folder, path, task="gp-l"):
    """Success (on walks, right actions) against training compute: the paper's Fig. 5, 7 and 8."""
    runs = read_runs(folder, task)
    panels = []
    for title, cell, name, *against in PANELS[task]:
        series = [{"label": label, "colour": colour, "dashed": kind.startswith("blind"),
                   "points": curve(runs, kind, cell, name, *against)}
                  for kind, (label, colour) in ARMS.items()]
        series = [one for one in series if one["points"]]
        if series:
            panels.append({"title": title, "x_label": "all four cards read, %, from the start on"
                           if against else "FLOPs spent", "y_label": "%", "series": series})
    seeds = {seed for _, seed, _ in runs}
    game = "V-IRL, right actions of all tries" if task.startswith("virl") else "GeneralPoints"
    draw_panels(panels, path, f"{game}, {'pictures' if pictured(task) else 'text'}: "
                f"mean and range over {len(seeds)} seeds")
    print(table(runs, task))


def draw_panels(panels, path, title=""):
    """Draw learning curves side by side, in the manner of a paper's figure, into one PNG.

    panels: list of dicts, in reading order (three in a row where more than four would get too
        small): {"title", "x_label", "y_label", "series"}; "series" is a list of {"label": str,
        "colour": (r, g, b), "points": [(x, mean, low, high), ...], "dashed": bool}. Points are
        joined in their order; y values are percentages, x any numbers (e.g. FLOPs). No points:
        only the legend names the series. One point: a dot, and a bar from low to high. Series
        with the same label share one legend entry.
    path: where the PNG goes; an older file there is replaced only once the new one is complete.
    title: a heading above all panels; "" leaves its room out.
    """
    # Pillow does not smooth lines, so everything is drawn at twice the final size and shrunk at
    # the end: all numbers here count these small pixels, two to one pixel of the finished PNG.
    panel_width, panel_height = 920, 720
    left, right, above, below = 104, 36, 108, 100  # room around a plot for titles and ticks
    black, grey, pale = (30, 30, 30), (110, 110, 110), (228, 228, 228)

    def fit_font(text, room, size):
        """Return the font of this size, or the first smaller one in which text fits in room."""
        font = ImageFont.load_default(size)
        if font.getlength(text) <= room or size <= 14:
            return font
        return fit_font(text, room, size - 1)

    def write(x, y, text, size, anchor, room=panel_width, colour=black):
        """Draw text, its anchor (as Pillow names them) at x, y."""
        draw.text((x, y), text, colour, fit_font(text, room, size), anchor)

    def dot(x, y, radius, colour):
        """Draw a filled circle."""
        x, y = round(x), round(y)  # whole numbers, or dots would differ in size by rounding
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)

    def curve(pixels, colour, dashed):
        """Draw a line through the pixels, stamped dot by dot: Pillow's own wide lines vary in width
        with their slope, leave notches where two pieces meet, and know no dashes."""
        trail = []
        for (x0, y0), (x1, y1) in zip(pixels, pixels[1:]):
            steps = math.ceil(math.hypot(x1 - x0, y1 - y0))
            trail += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps)
                      for i in range(steps)]
        for i, (x, y) in enumerate(trail):
            if not dashed or i % 28 < 12:
                dot(x, y, 2.5, colour)

    def round_axis(low, high):
        """Return first, last, step: the ticks are i * step for first <= i <= last, 4 to 6 of
        them, from low or less to high or more, and step is 1, 2 or 5 times a power of ten."""
        if math.isclose(low, high, rel_tol=1e-6):  # a single x, or all y zero: nothing to divide
            low, high = min(low, 0), max(high, 0) or 1
        power = math.floor(math.log10(high - low)) - 1  # too fine a step: coarsen from here
        for step in [m * 10.0 ** (power + k) for k in range(3) for m in (1, 2, 5)]:
            # The 1e-9 keeps float error from adding a tick: 0.3 / 0.1 is not quite 3.
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            if last - first <= 5:
                return first, max(last, first + 3), step

    def tick_text(i, step, power=0):
        """Return i * step in units of 10^power, with the decimals that step needs."""
        decimals = max(0, power - math.floor(math.log10(step) + 1e-9))
        return f"{i * step / 10.0 ** power:.{decimals}f}" if i else "0"

    # More than four would be too small beside each other on a page.
    in_row = len(panels) if len(panels) <= 4 else 3
    # The legend is laid out first: the number of its rows decides the height of the picture.
    width = panel_width * max(1, in_row)
    entries = {}  # label -> the longest series that has it, whose look the legend shows
    for series in [series for panel in panels for series in panel["series"]]:
        known = entries.setdefault(series["label"], series)
        entries[series["label"]] = max(known, series, key=lambda s: len(s["points"]))
    rows = [[]]  # each row holds (series, width of its entry: line, text and the gap after it)
    for label, series in entries.items():
        entry_width = 80 + fit_font(label, width - 160, 26).getlength(label) + 48
        if rows[-1] and sum(w for _, w in rows[-1]) + entry_width > width:
            rows.append([])
        rows[-1].append((series, entry_width))
    head = 72 if title else 12
    panels_end = head + panel_height * max(1, math.ceil(len(panels) / max(1, in_row)))
    height = panels_end + 44 * len(rows) + 20
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image, "RGBA")  # on an RGB image this mode blends translucent colours
    write(width / 2, head / 2 + 4, title, 38, "mm", width - 40)

    for number, panel in enumerate(panels):
        x0 = number % in_row * panel_width + left
        x1 = x0 - left + panel_width - right
        top = head + number // in_row * panel_height
        y0, y1 = top + panel_height - below, top + above  # y0 is the bottom: y counts down
        points = [point for series in panel["series"] for point in series["points"]]
        highest = max([0] + [max(mean, high) for _, mean, _, high in points])
        # A little air above the highest value, but a percentage needs no axis beyond 100.
        _, y_last, y_step = round_axis(0, max(highest, min(100, highest * 1.03)))
        xs = [point[0] for point in points] or [0]
        x_first, x_last, x_step = round_axis(min(xs), max(xs))
        x_end = x_last * x_step
        if x_last - x_first > 3 and min(xs) < max(xs) < x_end:
            # Four ticks remain without the last one, so stop at the data and waste no width.
            x_last, x_end = x_last - 1, max(xs)

        def place(x, y):
            """Return the pixel of a value. 20 pixels keep the dots off the ends of the axis,
            and y stops at 0, as a mean minus its error may fall below what the axis shows."""
            share = (x - x_first * x_step) / (x_end - x_first * x_step)
            return (x0 + 20 + share * (x1 - x0 - 40),
                    y0 - max(0, y) / (y_last * y_step) * (y0 - y1))

        for i in range(y_last + 1):
            y = place(x_end, i * y_step)[1]
            draw.line((x0, y, x1, y), pale, 2)
            write(x0 - 14, y, tick_text(i, y_step), 24, "rm", left - 18, grey)
        # Huge or tiny x values share one power of ten, named once, in the axis label.
        power = math.floor(math.log10(max(abs(x_first), abs(x_last)) * x_step) + 1e-9)
        power = power if power >= 4 or power <= -3 else 0
        for i in range(x_first, x_last + 1):
            x = place(i * x_step, 0)[0]
            draw.line((x, y0, x, y0 + 8), black, 2)
            write(x, y0 + 16, tick_text(i, x_step, power), 24, "ma", colour=grey)
        draw.line((x0, y1, x0, y0, x1, y0), black, 2)
        x_label = panel["x_label"] + (f" (x 10^{power})" if power else "")
        write((x0 + x1) / 2, y0 + 70, x_label, 26, "mm", x1 - x0)
        write((x0 + x1) / 2, top + 26, panel["title"], 30, "mm", x1 - x0)
        write(x0 - left + 24, y1 - 34, panel["y_label"], 24, "lm", panel_width - 48)

        # All bands come before all lines, or a later band would tint an earlier line.
        for series in panel["series"]:
            lows = [place(x, low) for x, _, low, _ in series["points"]]
            highs = [place(x, high) for x, _, _, high in series["points"]]
            if len(lows) == 1:  # a band over one x has no width: give it some
                (x, low), (_, high) = lows[0], highs[0]
                lows, highs = [(x - 6, low), (x + 6, low)], [(x - 6, high), (x + 6, high)]
            if lows:
                draw.polygon(lows + highs[::-1], (*series["colour"], 48))
        for series in panel["series"]:
            means = [place(x, mean) for x, mean, _, _ in series["points"]]
            curve(means, series["colour"], series.get("dashed"))
            for x, y in means:
                dot(x, y, 7, series["colour"])

    for number, row in enumerate(rows):
        x = (width - sum(w for _, w in row) + 48) / 2  # the last entry needs no gap after it
        y = panels_end + 44 * number + 22
        for series, entry_width in row:
            if len(series["points"]) != 1:  # a lone point, e.g. the start, is just a dot
                curve([(x, y), (x + 68, y)], series["colour"], series.get("dashed"))
            dot(x + 34, y, 7, series["colour"])
            write(x + 80, y, series["label"], 26, "lm", width - 160)
            x += entry_width

    # Written beside the target and renamed: a reader never sees half a picture.
    temporary = f"{path}.{os.getpid()}.tmp"
    smooth = image.resize((width // 2, height // 2), Image.Resampling.LANCZOS)
    smooth.save(temporary, format="PNG")
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def record_flag(group):
    """--record, for this script and rl.py."""
    group.add_argument("--record", action=argparse.BooleanOptionalAction, default=True,
                       help="on a GPU: record the reading of one token and play it back; "
                       "--no-record reads step by step")


def evaluate_run(args, cells, splits, device):
    """Play every checkpoint of an SFT run; writes eval.jsonl there, goes on where it stopped.

    A step is played again only for cells that its row lacks. Raises Problem for a run of rl.py,
    which measures itself and keeps two checkpoints; for flags of another game than the run's; and
    for cells of a row that would be measured in two ways.
    """
    folder, found = pathlib.Path(args.run), checkpoints(args.run)
    if not found:
        raise Problem(f"--run {args.run}: no checkpoints step-* there")
    said = read_json(folder / "args.json")
    for key in ("task", "routes", "picture_size", "announce"):
        if key in said and said[key] != getattr(args, key):
            raise Problem(f"--run {args.run}: it was trained with --{key.replace('_', '-')} "
                          f"{said[key]}, you ask for {getattr(args, key)}: play the same game")
    path = folder / "eval.jsonl"
    rows = {row["step"]: row for row in read_lines(path) if {"step", "hands", "cells"} <= set(row)}
    trained = {row.get("step"): row for row in read_lines(folder / "metrics.jsonl")}
    if any("approx_kl" in row for row in trained.values()):
        raise Problem(f"--run {args.run}: a run of rl.py, which has measured itself; give one of "
                      "its checkpoints as --model")
    wanted = {f"{SPLIT_NAMES[split]}/{cell}" for cell, split in cell_splits(cells, splits,
                                                                          args.task)}
    absent = sorted(set(args.steps or ()) - {step for step, _ in found})
    if absent:
        raise Problem(f"--steps {absent[0]}: {folder} has no such checkpoint")
    for step, checkpoint in found:
        if args.steps and step not in args.steps:
            continue
        before = rows.get(step, {"hands": args.hands, "cells": {}})
        how = {key: getattr(args, key) for key in ("temperature", "batch", "max_new_tokens")}
        other = [key for key, value in before.get("how", how).items() if value != how[key]]
        if before["hands"] != args.hands or wanted <= set(before["cells"]):
            print(f"step {step}: measured already, {before['hands']} episodes a cell (in {path})")
            continue
        if other:
            raise Problem(f"--run {args.run}: cells of step {step} were measured with --"
                          f"{other[0].replace('_', '-')} {before['how'][other[0]]}: give the same, "
                          f"or move {path} away to begin anew")
        backbone = load_backbone(checkpoint, device, dtype=args.dtype)
        check_sight(backbone, args.task, checkpoint)
        results, _ = evaluate(backbone, cells, splits, args.hands, args.temperature, args.batch,
                              args.max_new_tokens, task=args.task,
                              shown=picture_options(args), where=places(args))
        print(f"step {step}")
        show(results)
        # SFT: the paper's formula is what was spent
        spent = trained.get(step, {}).get("flops", 0)
        rows[step] = {"step": step, "hands": args.hands, "how": how, "flops": spent,
                      "flops_spent": spent, "cells": before["cells"] | results}
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(rows[step]) + "\n" for step in sorted(rows)))
        aside.rename(path)


def main():
    """The command line of the measuring stage."""
    parser = argparse.ArgumentParser(description="Play with a model, measure it, draw figures.")
    group = parser.add_argument_group("what to measure")
    group.add_argument("--task", choices=TASKS, default="gp-l", help="default gp-l")
    group.add_argument("--model", help="checkpoint folder or hub name (default: the backbone)")
    group.add_argument("--run", help="a run folder of sft.py: play all its checkpoints")
    group.add_argument("--steps", type=int, nargs="+", help="with --run: only these checkpoints")
    group.add_argument("--plot", metavar="FOLDER", help="draw the runs below this folder, and stop")
    group.add_argument("--ood", action=argparse.BooleanOptionalAction, default=False,
                       help="all cells: rule OOD, the two shifts apart, the fake probe; gp-vl, "
                       "V-IRL: rule OOD, visual OOD, both (V-IRL: and the fake probe); with --run "
                       "those that are drawn")
    every = list(CELLS | PICTURE_CELLS | WALK_CELLS)
    group.add_argument("--cells", nargs="+", choices=every, metavar="CELL",
                       help="measure just these: " + "; ".join(
                           f"{task}: {', '.join(cells)}" for task, cells in TASK_CELLS.items()))
    group.add_argument("--splits", nargs="+", choices=SPLIT_NAMES, default=["train", "test"],
                       help="hands or routes: train (seen), test (held out), val, all")
    data_flags(group)
    group.add_argument("--blindfold", action="store_true", help="-vl, with --model: grey in place "
                       "of every picture; what is still right needed no eyes")
    group = parser.add_argument_group("how")
    group.add_argument("--hands", type=int, default=1000, help="hands or walks a cell (paper: 234; "
                       f"V-IRL: 48); {name_default(TASK_DEFAULTS, 'hands')}")
    group.add_argument("--temperature", type=float, default=0.6,
                       help="of sampling; 0 takes the likeliest token (default 0.6, as the "
                       "paper's backbone is shipped)")
    group.add_argument("--batch", type=int, default=256, help="episodes at once: speed and memory; "
                       + name_default(TASK_DEFAULTS, "batch"))
    group.add_argument("--max-new-tokens", type=int, default=48, help="longest answer (default 48; "
                       "the small backbone spells real names out: with --routes take 200)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda")
    group.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = all cores")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                       help="of the weights (default float32)")
    record_flag(group)
    group.add_argument("--show", type=int, default=0, metavar="N",
                       help="print N transcripts a cell, half of them solved; pictures go to "
                       "runs/shown")
    group.add_argument("--show-positions", type=int, default=3, metavar="N",
                       help="V-IRL: of each transcript, the first N positions (default 3)")
    group.add_argument("--out", help="JSON file for the results, or PNG file for --plot")
    args = parse_flags(parser, TASK_DEFAULTS)
    if args.out and not pathlib.Path(args.out).absolute().parent.is_dir():
        raise Problem(f"--out {args.out}: there is no such folder; make it first")
    if args.out and pathlib.Path(args.out).is_dir():
        raise Problem(f"--out {args.out}: that is a folder; give a file name")
    if args.plot:
        out = args.out or "figure.png"
        plot(args.plot, out, args.task)
        print(f"drew {out}")
        return
    check_flags(args, at_least_one=("hands", "batch", "max_new_tokens", "show_positions"))
    cells = args.cells or (list(TASK_CELLS[args.task]) if args.ood else ["id"])
    foreign = [cell for cell in cells if cell not in TASK_CELLS[args.task]]
    if foreign:
        raise Problem(f"--cells {foreign[0]}: not a cell of {args.task}; it has "
                      f"{', '.join(TASK_CELLS[args.task])}")
    if args.steps and not args.run:
        raise Problem("--steps says which checkpoints of a --run to play; give one")
    if args.blindfold and (args.run or not pictured(args.task)):
        raise Problem("--blindfold: a probe of one --model, for --task gp-vl or virl-vl")
    device = pick_device(args.device)
    Reader.recorded_on = ("cuda",) * args.record
    if args.run:
        evaluate_run(args, args.cells or (CURVE_CELLS[args.task] if args.ood else ["id"]),
                     args.splits, device)
        return
    name = args.model or str(DEFAULT_MODEL[args.task])
    backbone = load_backbone(name, device, dtype=args.dtype)
    check_sight(backbone, args.task, name)
    began = time.time()
    print(f"{name} on {args.task}: {args.hands} episodes a cell, temperature {args.temperature:g}"
          + ", blindfolded" * args.blindfold)
    results, episodes = evaluate(backbone, cells, args.splits, args.hands, args.temperature,
                                 args.batch, args.max_new_tokens, task=args.task,
                                 shown=picture_options(args), where=places(args),
                                 blindfold=args.blindfold)
    show(results)
    for cell, m in results.items():
        kinds = ", ".join(f"{kind} {rate:.1%}" for kind, rate in m["errors"].items())
        print(f"  {cell:30s} first answers that were wrong: {kinds or 'none'}")
    show_confusion(results)
    show_kinds(results)
    print(f"{time.time() - began:.0f} s")
    if args.show:
        for name in episodes:
            print("\n#", name)
            show_transcripts(episodes[name], args.show, f"runs/shown/{name.replace('/', '-')}",
                             args.show_positions)
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    sys.exit(guarded(main))
