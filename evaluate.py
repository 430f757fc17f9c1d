"""Play the game with a model, and measure what it can do.

Paper: arXiv 2501.17161, section 5 (ID, rule OOD) and appendix C.3.

  1. cells: the kinds of games that are measured; their hands never depend on a training seed
  2. play all episodes in one batch; rl.py collects its experience with the same function
  3. the sampler: reads growing conversations with one key-value cache
  4. on a GPU the reading of one token is recorded and played back
  5. count, with intervals
  6. measure a model
  7. print: lines, transcripts
  8. the command line

Three measures of one policy, each on the same hands:
  first answer   right at once
  fresh          right within five answers that know nothing of each other
  conversation   right within five answers, each told by the verifier what was wrong with the last
                 (the paper's measure). conversation - fresh is the VALUE OF THE MESSAGE, and of
                 the own wrong answer that stands before it: below 0, the two hurt

Shapes: B episodes in a batch, W new tokens of the longest, V vocabulary.

    python evaluate.py --ood --show 2 --model runs/rl-gp-l-s0/step-000007    cells, transcripts
    python evaluate.py --ood --run runs/sft-gp-l-s0                          every checkpoint

Read before: sft.py. Read next: rl.py. On a first reading parts 2 and 3 are enough.
"""

import argparse
import inspect
import json
import math
import pathlib
import sys
from collections import Counter
from dataclasses import dataclass, field

import sft                  # before torch: it says how torch's threads are to wait
import torch
from PIL import Image
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer

import gp_env
import virl_env
from sft import (OTHER_CITIES, TRAINING_CITY, Problem, crossing_layers, encode_picture, mrope, pad,
                 pictured, precision, user_ids)

# -------- 1. Cells

EVALUATION_SEED = 20250126      # of the hands that are evaluated on, the same for every model

# The paper's "rule OOD" changes two things, the rule AND the hands, which must hold a face card.
# The first four cells keep them apart. `fake` states the new rule and scores by the old one: only a
# model that ignores its prompt does well (626 of 1,000 such hands are solvable by the old rule).
CELLS = {
    "id": {"rule": "ten", "face": False},
    "ood": {"rule": "face", "face": True},
    "ten-rule face-hands": {"rule": "ten", "face": True},
    "face-rule any-hands": {"rule": "face", "face": False},
    "fake": {"rule": "face", "face": True, "scoring_rule": "ten"},
}
# In pictures, colour is a second shift: training saw black suits only (paper, section 5.2).
PICTURE_CELLS = {
    "id": {"rule": "ten", "face": False, "suits": "black"},
    "ood": {"rule": "face", "face": True, "suits": "black"},
    "visual": {"rule": "ten", "face": False, "suits": "red"},
    "both": {"rule": "face", "face": True, "suits": "red"},
}
# On walks the second shift is the place: other streets and names, in pictures other houses, signs
# and weather, too. No route there is a training route, so there is nothing to split.
WALK_CELLS = {
    "id": {"rule": "absolute"},
    "ood": {"rule": "relative"},
    "visual": {"rule": "absolute", "elsewhere": True, "split": "all"},
    "both": {"rule": "relative", "elsewhere": True, "split": "all"},
    "fake": {"rule": "relative", "scoring_rule": "absolute"},
}
TASK_CELLS = {"gp-l": CELLS, "gp-vl": PICTURE_CELLS, "virl-l": WALK_CELLS, "virl-vl": WALK_CELLS}
CURVE_CELLS = {"gp-l": ["id", "ood"], "gp-vl": list(PICTURE_CELLS),
               "virl-l": ["id", "ood", "visual"], "virl-vl": ["id", "ood", "visual"]}
SPLIT_NAMES = {"train": "seen", "test": "held-out", "val": "validation", "all": "all"}


def cell_environments(cell, split, count, task="gp-l", shown=None, fresh=False, tries=None,
                      where=(TRAINING_CITY, OTHER_CITIES)):
    """Environments and seeds of one cell. The hands depend on task, cell, split, place alone.

    shown: how pictures are shown (sft.picture_options), None: as the small backbone sees. fresh: no
    try knows of the others. tries: answers a hand or a position, None for the paper's 5 and 2.
    where: V-IRL's training place, and its other places, which take turns.
    """
    how = {"split": split, "fresh": fresh} | TASK_CELLS[task][cell]
    if tries:
        how["tries"] = tries
    if pictured(task):
        how |= shown or {"picture": gp_env.PICTURE_SIZE}
    seeds = [[EVALUATION_SEED, i] for i in range(count)]
    if not task.startswith("virl"):
        return [new_game(task, **how) for _ in seeds], seeds
    places = where[1] if how.pop("elsewhere", False) else where[:1]
    # One walk gives both counts (measure_walks): up to the first position missed it is the paper's
    # walk, whether or not its rail goes on after that.
    return [new_game(task, where=places[i % len(places)], go_on=True, **how)
            for i in range(count)], seeds


def new_game(task, **how):
    """An environment of a task. how: its arguments."""
    return (virl_env.Navigation if task.startswith("virl") else gp_env.GeneralPoints)(**how)


# -------- 2. Playing in a batch


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
    picture: dict | None        # what a new conversation shows, as tensors (sft.encode_picture)
    ended: bool                 # False: cut off at the longest answer allowed


@dataclass
class Episode:
    """The tries of one environment, oldest first. At the end one of the two flags is True."""

    env: object
    prompt: str
    turns: list = field(default_factory=list)
    terminated: bool = False    # the game is over (a walk may have missed positions: see `solved`)
    truncated: bool = False     # out of tries
    told: list = None           # prompt tokens of the coming Turn, as the update will see them
    pending: list = None        # not in the cache yet: the last answer's last token, then `told`
    picture: dict | None = None     # of the running conversation
    new: bool = True            # the latest user turn opens a conversation

    def hear(self, backbone, observation, blindfold=False):
        """Take in what the environment says, as the next user turn or the first of a new talk."""
        self.new, image = observation["new_conversation"], observation["image"]
        if image is not None:
            image = Image.new("RGB", image.size, (127, 127, 127)) if blindfold else image
            self.told, self.picture = encode_picture(backbone, observation["text"], image)
        else:
            self.told = user_ids(backbone, observation["text"], self.new)
            self.picture = None if self.new else self.picture
        self.pending = list(self.told)
        if not self.new:
            if not self.turns[-1].ended:            # cut off: close the turn for the model
                self.told = backbone.end_ids[:1] + self.told
            # the last token of the answer was sampled and never fed: it goes first
            self.pending = self.turns[-1].answer_ids[-1:] + self.told


def play(backbone, envs, seeds, temperature, max_new_tokens, generator=None, blindfold=False):
    """Play one episode in every environment, all in one batch. Returns a list of Episode.

    temperature 0 takes the likeliest token; otherwise `generator` (a torch.Generator on the model's
    device) draws. blindfold: every picture is grey.
    invariant: (tokens of an episode in the cache) + its `pending` = the running conversation.
    """
    backbone.model.eval()       # train mode with checkpointing samples wrong tokens, silently
    episodes = []
    for env, seed in zip(envs, seeds):
        observation, _ = env.reset(seed)
        episodes.append(Episode(env, observation["text"]))
        episodes[-1].hear(backbone, observation, blindfold)
    playing, reader = list(episodes), Reader(backbone, len(episodes))
    while playing:
        answers = sample_answers(reader, playing, temperature, max_new_tokens, generator)
        for episode, (ids, logprobs) in zip(playing, answers):
            # The verifier reads what was sampled, special tokens included, but for the end.
            ended = ids[-1] in backbone.end_ids
            text = backbone.tokenizer.decode(ids[:-1] if ended else ids)
            observation, reward, terminated, truncated, info = episode.env.step(text)
            episode.turns.append(Turn(
                episode.told, ids, logprobs, text, reward, observation["text"], info["verdict"],
                episode.new, episode.picture if episode.new else None, ended))
            episode.terminated, episode.truncated = terminated, truncated
            if not (terminated or truncated):
                episode.hear(backbone, observation, blindfold)
        # finished episodes leave the batch: what is solved costs nothing more
        stay = [row for row, e in enumerate(playing) if not (e.terminated or e.truncated)]
        if len(stay) < len(playing):
            playing = [playing[row] for row in stay]
            reader.keep(stay)
        reader.forget([row for row, episode in enumerate(playing) if episode.new])
    return episodes


@torch.no_grad()
def sample_answers(reader, playing, temperature, max_new_tokens, generator):
    """Read what is pending of each episode, then sample an answer for each: [(ids, logprobs)].

    The end token is included if it came. The last token is not in the cache yet: see Episode.hear.
    """
    device = reader.length.device
    ids = pad([episode.pending for episode in playing]).to(device)                      # (B, W)
    counts = torch.tensor([len(episode.pending) for episode in playing], device=device)
    logits = reader.read(ids, counts, [episode.picture for episode in playing])
    if logits.isnan().any():
        raise Problem("the model's output is not a number: was a learning rate too high?")
    ends = torch.tensor(reader.backbone.end_ids, device=device)
    going = torch.ones(len(playing), dtype=torch.bool, device=device)   # rows still speaking
    said, scores, spoke = [], [], []                                    # a column (B,) a token
    for _ in sft.progress(range(max_new_tokens), "sampling token"):
        token, logprob = draw(logits, temperature, generator)
        said.append(token)
        scores.append(logprob)
        spoke.append(going)
        going = going & ~torch.isin(token, ends)
        if len(said) == max_new_tokens or not going.any():
            break
        # A row that has ended is computed until all have, with a count of 0: nothing of it is kept.
        logits = reader.read(token[:, None], going.long())
    counts = torch.stack(spoke).sum(0).tolist()
    said, scores = torch.stack(said, 1).tolist(), torch.stack(scores, 1).tolist()
    return [(ids[:n], logprobs[:n]) for ids, logprobs, n in zip(said, scores, counts)]


def draw(logits, temperature, generator=None):
    """Draw a token of each row: logits (B, V) -> (tokens (B,), their log-probabilities (B,)).

    No top-k, no top-p, no penalty: rl.py scores these tokens again, as a plain softmax at this
    temperature, and that has to be the policy that played. At 0 the likeliest token is taken.
    """
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if temperature > 0:
        token = torch.multinomial(logprobs.exp(), 1, generator=generator)               # (B, 1)
    else:
        token = logits.argmax(-1, keepdim=True)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


# -------- 3. The sampler: B conversations that grow at different speeds, one key-value cache


class SlotLayer(DynamicLayer):
    """Keys, values (B, heads, room, size) of a layer. Reader.step sets room, where and used."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Attention calls it: kept[b, :, where[b, w]] = new[b, :, w]. Returns the slots in use."""
        kept = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            old = new[:, :, :0] if old is None else old
            if old.shape[2] < self.room:
                old = torch.nn.functional.pad(old, (0, 0, 0, self.room - old.shape[2]))
            kept.append(old.scatter_(2, self.where[:, None, :, None].expand_as(new), new))
        self.keys, self.values = kept
        self.is_initialized = True
        return [both[:, :, :self.used] for both in kept]

    def get_seq_length(self):
        """0: the model must not count for itself; `Reader` hands positions and mask over whole."""
        return 0


class Reader:
    """Reads B growing conversations with one cache.

    A token's slot is its position in its row's conversation, and it sees the slots up to its own.
    What right padding wrote lies beyond `length`, where nobody looks, and is overwritten:

        slots      0  1  2  3  4  5  6  7        length
        row 0      p  p  p  a  a  m  m  a        8          p prompt, a answer, m message
        row 1      p  p  a  a  -  -  -  -        4          - what padding wrote, or nothing
    """

    BLOCK = 64                  # slots are added in blocks: growing copies the whole cache
    recorded_on = ("cuda",)     # kinds of device where reading one token is recorded (part 4)

    def __init__(self, backbone, rows):
        self.backbone, model = backbone, backbone.model
        self.layers = [DynamicLayer() if i in crossing_layers(model) else SlotLayer()
                       for i in range(model.config.get_text_config().num_hidden_layers)]
        known = inspect.signature(model.base_model.forward).parameters  # renamed in 5.24
        self.cache = {"cache" if "cache" in known else "past_key_values": Cache(layers=self.layers)}
        self.banned = torch.tensor(backbone.banned, dtype=torch.long, device=backbone.device)
        self.length = torch.zeros(rows, dtype=torch.long, device=backbone.device)   # tokens read
        self.room = self.used = 0                           # slots; those that are looked at
        self.recording = None                               # part 4
        self.pictures = [None] * rows                       # what rows show; see `look`
        self.tiles = self.shifts = None                     # Mllama; m-RoPE

    def read(self, ids, counts, pictures=None):
        """Append tokens: ids (B, W) padded on the right, counts (B,) real tokens of each row.

        pictures: what each row shows from now on. Returns logits (B, V) after each row's last real
        token (of no use where counts is 0), valid until the next read.
        """
        self.used = int(self.length.max()) + ids.shape[1]
        if self.used > self.room:
            self.room, self.recording = self.BLOCK * math.ceil(self.used / self.BLOCK), None
        seen = self.look(pictures) if pictures else {}
        if ids.shape[1] == 1 and not seen and ids.device.type in self.recorded_on:
            self.used = self.room       # a recording has one shape
            return read_recorded(self, ids, counts)
        return self.step(ids, counts, seen)

    def step(self, ids, counts, seen):
        """The forward pass of `read`. seen: what `look` returned."""
        where = position = self.length[:, None] + torch.arange(ids.shape[1], device=ids.device)
        mask = torch.arange(self.used, device=ids.device) <= where[..., None]       # (B, W, used)
        for layer in self.layers:
            layer.where, layer.room, layer.used = where, self.room, self.used
        if self.shifts is not None:
            position = sft.shifted(self.shifts, where)
        if self.tiles is not None:          # the picture's mark stands in a row's first turn
            seen["cross_attention_mask"] = sft.cross_mask(
                self.backbone, ids, self.tiles, passed=self.length[:, None] > 0)
        with precision(self.backbone):
            hidden = self.backbone.model.base_model(
                input_ids=ids, attention_mask=mask[:, None], position_ids=position, use_cache=True,
                **self.cache, **seen).last_hidden_state                             # (B, W, H)
            rows, last = torch.arange(len(ids), device=ids.device), (counts - 1).clamp(min=0)
            logits = self.backbone.model.get_output_embeddings()(hidden[rows, last]).float()
        self.length += counts
        return logits.index_fill_(1, self.banned, -torch.inf)

    def look(self, pictures):
        """What the trunk needs beside the tokens where rows show new pictures."""
        new = [p for p, old in zip(pictures, self.pictures) if p is not None and p is not old]
        self.pictures, crossing = pictures, crossing_layers(self.backbone.model)
        if not new:
            return {}
        if mrope(self.backbone.model.config):
            self.shifts = sft.shift_table(pictures).to(self.length.device)
        if not crossing:            # the placeholders of the old ones are tokens in the cache
            return sft.join_pictures(self.backbone, new)
        for i in crossing:          # a layer keeps one tensor for all rows: all are shown again
            self.layers[i].is_initialized = False
        with precision(self.backbone):
            states, self.tiles = sft.cross_states(self.backbone, pictures)
        self.recording = None
        return {"cross_attention_states": states}

    def forget(self, rows):
        """Make these rows start afresh. What lies beyond `length` is never seen."""
        self.length[rows] = 0

    def keep(self, rows):
        """Go on with only these rows."""
        self.length, self.recording = self.length[rows], None
        self.pictures = [self.pictures[row] for row in rows]
        self.tiles = None if self.tiles is None else self.tiles[rows]
        self.shifts = None if self.shifts is None else self.shifts[:, rows]
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]


# -------- 4. On a GPU: the reading of one token, recorded. Never at work on a CPU


class Recording:
    """`Reader.step` for one token a row, recorded on a GPU, then played again and again.

    Python hands a GPU its small jobs (kernels) one by one: for 32 rows of the 11B model an H200
    took 120 ms a token, and was at work for 7.5 of them. A CUDA graph is the list of those jobs,
    played without Python. Its tensors must stay in their places: a recording ends when the cache
    grows, when rows leave, and when a new picture is seen.
    """

    def __init__(self, reader, ids, counts):
        self.ids, self.counts, before = ids.clone(), counts.clone(), reader.length.clone()
        aside, main = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(main)
        with torch.cuda.stream(aside):      # once without recording, as CUDA asks for
            reader.step(self.ids, self.counts, {})
            reader.length.copy_(before)     # what it wrote is written again, the same
        main.wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = reader.step(self.ids, self.counts, {})

    def play(self, ids, counts):
        """`Reader.step` by the recording."""
        self.ids.copy_(ids)
        self.counts.copy_(counts)
        self.graph.replay()
        return self.logits


def read_recorded(reader, ids, counts):
    """`Reader.step` for one token a row: recorded the first time, played back after that."""
    try:
        reader.recording = reader.recording or Recording(reader, ids, counts)
        return reader.recording.play(ids, counts)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:       # what a model does on its way may forbid it
        Reader.recorded_on = ()
        tqdm.write(f"one token cannot be recorded, go on step by step: {str(error)[:60]!r}")
    return reader.step(ids, counts, {})


# -------- 5. Counting


def wilson(hits, count, z=1.96):
    """95 % confidence interval of a rate, both ends in 0..1 (Wilson 1927).

    Unlike p +- z*sqrt(p(1-p)/n), the paper's error bar, it stays inside 0..1. Of no data: (0, 1).

    >>> [round(x, 3) for x in wilson(27, 234)]      # the paper's GP-L start, 11.5 %
    [0.081, 0.163]
    """
    if count == 0:
        return 0.0, 1.0
    p, spread = hits / count, z * z / count
    middle = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def gain(hits, count, hits_before, count_before, z=1.96):
    """(difference, low, high) of two rates, 95 % (Newcombe 1998, from two Wilson intervals)."""
    p, q = hits / max(1, count), hits_before / max(1, count_before)
    (low_p, high_p), (low_q, high_q) = wilson(hits, count, z), wilson(hits_before, count_before, z)
    return (p - q, p - q - math.hypot(p - low_p, high_q - q),
            p - q + math.hypot(high_p - p, q - low_q))


def rate(outcomes):
    """A rate with an interval that knows of groups: {"rate", "count", "interval"}.

    outcomes: [(group, 0 or 1)]. 1,000 held-out ID hands are 96 multisets of numbers, and
    hands of one multiset succeed or fail together; so do the tries of one walk. Wilson's interval
    is given an effective count: as many independent outcomes as would scatter like these groups.
    """
    groups = {}
    for group, hit in outcomes:
        groups.setdefault(group, []).append(hit)
    count = sum(map(len, groups.values()))
    p = sum(map(sum, groups.values())) / max(1, count)
    variance = sum(((sum(hits) - p * len(hits)) / count) ** 2 for hits in groups.values())
    effective = min(count, p * (1 - p) / variance) if variance > 0 else len(groups)
    return {"rate": p, "count": count, "interval": wilson(p * effective, effective)}


def measure(episodes):
    """What a list of finished hands shows. Returns a dict of counts and rates in 0..1.

    success: correct within the tries (the paper's measure). Shares of first answers: first_try
    (right), cards_read, numbers_read (that field right; numbers: by the STATED rule), errors
    (wrong, by kind). tries: mean number of answers. cut: share of answers that were cut off.
    """
    # Reading is judged on the FIRST answer: later ones have seen the verifier's message, which
    # names the numbers that are missing and so gives the rule away.
    first = [episode.turns[0].verdict for episode in episodes]
    stated = [gp_env.verify_gp(e.turns[0].text, e.env.hand.cards, e.env.hand.numbers)
              for e in episodes]                            # `fake` was scored by another rule
    outcomes = [(tuple(sorted(e.env.hand.numbers)), e.terminated) for e in episodes]
    return both_games(episodes, first, outcomes) | {
        "cards_read": mean(v.cards_right for v in first),
        "numbers_read": mean(v.numbers_right for v in stated)}


def both_games(episodes, first, outcomes):
    """What hands and walks share. first: verdicts of first answers. outcomes: (group, solved) of
    each episode."""
    won, kinds = rate(outcomes), Counter(v.kind for v in first if not v.correct)
    return {"count": len(episodes), "hits": sum(hit for _, hit in outcomes),
            "success": won["rate"], "interval": won["interval"],
            "first_try": mean(v.correct for v in first),
            "errors": {kind: n / len(first) for kind, n in sorted(kinds.items())},
            "tries": mean(len(e.turns) for e in episodes), "cut": cut(episodes)}


def mean(values):
    """The mean of some numbers or truths; 0 of none."""
    values = list(values)
    return sum(values) / max(1, len(values))


def cut(episodes):
    """Share of answers that were cut off before their end: they make a gap of their own."""
    return mean(not turn.ended for episode in episodes for turn in episode.turns)


def positions(episode):
    """The tries of an episode, position by position, as lists of Turn. A hand is one position.

    On a walk a right answer, or the last try, moves the walker on to the next.
    """
    found = [[]]
    for turn in episode.turns:
        found[-1].append(turn)
        if turn.verdict.correct or len(found[-1]) == episode.env.tries:
            found.append([])
    return [tries for tries in found if tries]


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

    kinds, kinds_on: the same for each kind of action; turns: both kinds of turn together, the rail
    going on: only there the rules differ. Of first answers: landmarks_present, landmarks_empty
    (right where there is one, where there is none), crossings_read, whole_right (and the action).
    """
    paper, on = [], []                      # (walk, kind of action, verdict) of tries
    first, present, empty = [], [], []      # verdicts of first tries; whether landmarks were right
    for walk, episode in enumerate(episodes):
        missed = False
        for place, tries in zip(episode.env.rail, positions(episode)):
            judged = [(walk, place.kind, turn.verdict) for turn in tries]
            on += judged
            # The paper's walk ends WITH the position that is missed: its tries still count.
            paper += [] if missed else judged
            missed |= not tries[-1].verdict.correct
            # Reading is judged before the verifier has said what was misread.
            first.append(tries[0].verdict)
            nothing = place.observation.startswith(virl_env.NOTHING)
            (empty if nothing else present).append(tries[0].verdict.landmarks_right)
    kinds, kinds_on = ({kind: rate((walk, v.correct) for walk, k, v in judged
                                   if kind in (k, "every action"))
                        for kind in ("every action", *virl_env.KINDS)} for judged in (paper, on))
    every, every_on = kinds["every action"], kinds_on["every action"]
    turns = rate((walk, v.correct) for walk, k, v in on if k.endswith("turn"))
    found = {
        "per_step": every["rate"], "steps": every["count"], "kinds": kinds,
        "per_step_on": every_on["rate"], "steps_on": every_on["count"], "kinds_on": kinds_on,
        "turns": turns["rate"], "turn_tries": turns["count"],
        "positions": len(first), "crossings_read": mean(v.intersection_right for v in first),
        "landmarks_present": mean(present), "positions_present": len(present),
        "landmarks_empty": mean(empty), "positions_empty": len(empty),
        "whole_right": mean(v.correct and v.landmarks_right and v.intersection_right
                            for v in first)}
    return found | both_games(episodes, first, [(i, solved(e)) for i, e in enumerate(episodes)])


# -------- 6. Measuring a model


def cell_splits(cells, splits, task):
    """[(cell, split)] to play. A cell of other cities has one split, which is played once."""
    return list(dict.fromkeys((cell, TASK_CELLS[task][cell].get("split", split))
                              for split in splits for cell in cells))


def evaluate(backbone, cells, splits, count, max_new_tokens, task="gp-l", temperature=0.6,
             batch=256, blindfold=False, **how):
    """Play `count` hands or walks of each cell and split, twice (with one try: once).

    The second time tries know nothing of each other: "fresh", "fresh_interval" and "message" =
    success - fresh. batch: episodes played together. It changes the draws: compare models at the
    same one. how: see `cell_environments`.
    Returns ({"held-out/id": measures, ...}, {"held-out/id": episodes in conversation, ...}).
    """
    judge = measure_walks if task.startswith("virl") else measure
    settings = temperature, max_new_tokens, batch, blindfold
    results, kept = {}, {}
    for cell, split in cell_splits(cells, splits, task):
        name = f"{SPLIT_NAMES[split]}/{cell}"
        # a single try has no others to know of: the second play would be the first once more
        plays = [play_cell(backbone, cell_environments(
            cell, split, count, task, fresh=fresh, **how), *settings)
            for fresh in ((False, True) if how.get("tries") != 1 else (False,))]
        kept[name] = plays[0]
        found, alone = judge(plays[0]), judge(plays[-1])
        results[name] = found | {
            "fresh": alone["success"], "fresh_interval": alone["interval"],
            "message": found["success"] - alone["success"],
            # cards: the same draws in both plays, and one mean; walks: later positions differ
            "first_try": (found["first_try"] + alone["first_try"]) / 2}
    return results, kept


def play_cell(backbone, games, temperature, max_new_tokens, batch, blindfold):
    """Play the (environments, seeds) of a cell; the draws of every checkpoint begin alike."""
    episodes, (envs, seeds) = [], games
    for start in sft.progress(range(0, len(envs), batch), "playing episode"):
        generator = torch.Generator(backbone.device).manual_seed(EVALUATION_SEED + start)
        episodes += play(backbone, envs[start:start + batch], seeds[start:start + batch],
                         temperature, max_new_tokens, generator, blindfold)
        for episode in episodes[start:]:
            for turn in episode.turns:
                turn.picture = None     # only an update looks again: gigabytes on a large model
    return episodes


def chosen_checkpoints(args):
    """{step: folder} of the checkpoints of --run, of --steps if given. Raises Problem."""
    found = {step: path for step, path in sft.checkpoints(args.run)
             if not args.steps or step in args.steps}
    missing = sorted(set(args.steps or ()) - set(found))
    if missing or not found:
        raise Problem(f"--run {args.run}: no checkpoint {missing or 'at all'} there")
    return found


def evaluate_run(args, cells):
    """Play every checkpoint of an SFT run; writes eval.jsonl there, goes on where it stopped.

    Only cells that a row lacks are played. Raises Problem if it was measured in another way.
    """
    folder, found = pathlib.Path(args.run), chosen_checkpoints(args)
    how = {key: getattr(args, key) for key in (
        "hands", "tries", "temperature", "batch", "dtype", "max_new_tokens", "blindfold",
        "picture_size", "announce", "routes")}
    path = folder / "eval.jsonl"
    rows = {row["step"]: row for row in sft.read_lines(path)}
    trained = {row["step"]: row for row in sft.read_lines(folder / "metrics.jsonl")}
    for step, checkpoint in found.items():
        flops = trained.get(step, {}).get("flops", 0)
        spent = trained.get(step, {}).get("flops_spent", flops)     # SFT: all that is charged
        row = rows.setdefault(step, {"step": step, "hands": args.hands, "how": how, "flops": flops,
                                     "flops_spent": spent, "cells": {}})
        if row.get("how") != how:
            raise Problem(f"{path}: measured with {row.get('how', 'the flags of rl.py')}: give the "
                          "same flags, or move it")
        lacking = dict.fromkeys(cell for cell, split in cell_splits(cells, args.splits, args.task)
                                if f"{SPLIT_NAMES[split]}/{cell}" not in row["cells"])
        if not lacking:
            continue
        print(f"step {step}")
        row["cells"] |= measure_model(args, sft.open_backbone(args, checkpoint), lacking)[0]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(rows[step]) + "\n" for step in sorted(rows)))
        aside.rename(path)
        show(row["cells"])


def measure_model(args, backbone, cells):
    """`evaluate` as the flags say."""
    tries = args.tries or (virl_env if args.task.startswith("virl") else gp_env).TRIES
    return evaluate(
        backbone, cells, args.splits, args.hands, sft.answer_length(backbone, args, tries),
        args.task, args.temperature, args.batch, args.blindfold, tries=tries,
        shown=sft.picture_options(args), where=sft.places(args))


# -------- 7. Printing


def show(results):
    """One aligned line for each cell."""
    for name, m in results.items():
        low, high = m["interval"]
        line = f"  {name:29s}first answer {m['first_try']:6.1%}  fresh {m['fresh']:6.1%}"
        line += f"  conversation {m['success']:6.1%} [{low:.0%}, {high:.0%}]"
        if "per_step" in m:             # walks
            line += f"  per step {m['per_step']:6.1%}, on {m['per_step_on']:6.1%}"
        else:
            line += f"  read: cards {m['cards_read']:6.1%}, numbers {m['numbers_read']:6.1%}"
        line += f"  CUT OFF {m['cut']:.1%} of answers" if m["cut"] > 0.05 else ""
        tqdm.write(line)


def show_more(results):
    """For each cell: kinds of errors; walks: kinds of action, and what was read."""
    for name, m in results.items():
        kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in m["errors"].items())
        print(f"\n# {name}: first answers that were wrong: {kinds or 'none'}")
        if "kinds" in m:
            print("    right tries where the rail goes on:", ", ".join(
                f"{kind} {r['rate']:.1%} of {r['count']}" for kind, r in m["kinds_on"].items()))
            print(f"    read right: landmarks {m['landmarks_present']:.1%}, where there is none "
                  f"{m['landmarks_empty']:.1%}, intersection {m['crossings_read']:.1%}; and the "
                  f"action {m['whole_right']:.1%}")


def show_transcripts(episodes, count):
    """Print conversations, half of them solved; of a walk the first three positions."""
    good = [episode for episode in episodes if solved(episode)][:count - count // 2]
    failed = [episode for episode in episodes if not solved(episode)][:count - len(good)]
    for episode in good + failed:
        print("\n" + "=" * 30, "solved" if solved(episode) else "not solved", "=" * 30)
        prompt, talks = episode.prompt, positions(episode)
        for at, tries in enumerate(talks[:3], 1):
            print(prompt)
            for turn in tries:
                # at a new position the environment's words are the next prompt, no message
                prompt, moved = turn.message, turn is tries[-1] and at < len(talks)
                said = turn.verdict.message if moved else turn.message
                print(f"  model     {turn.text}\n  verifier  [{turn.reward:+.1f}] {said}")


# -------- 8. Command line


def flags(argv=None):
    """The command line as a Namespace; argv: a list of words, None for the shell's."""
    parser = argparse.ArgumentParser(description="Play with a model and measure it.")
    sft.common_flags(parser)
    add = parser.add_argument_group("measuring").add_argument
    add("--run", help="a run folder of sft.py: play all its checkpoints")
    add("--steps", type=int, nargs="+", help="with --run: only these checkpoints")
    add("--cells", nargs="+", metavar="CELL", help="measure just these (a wrong one lists all)")
    add("--splits", nargs="+", choices=SPLIT_NAMES, default=["train", "test"], help="of the hands")
    add("--hands", type=int, default=1000, help="episodes a cell (1000; V-IRL 180; paper 234, 48)")
    add("--tries", type=int, help="answers a hand or a position (paper: 5; V-IRL: 2)")
    add("--temperature", type=float, default=0.6, help="of sampling (default 0.6, as Llama ships)")
    add("--batch", type=int, default=256, help="episodes at once (default 256; V-IRL: 64)")
    add("--blindfold", action="store_true", help="-vl: grey in place of every picture")
    add("--show", type=int, default=0, metavar="N", help="print N transcripts a cell")
    walks = {"hands": 180, "batch": 64}
    args = sft.parse_flags(parser, dict.fromkeys(("virl-l", "virl-vl"), walks), {}, argv)
    for cell in args.cells or ():
        if cell not in TASK_CELLS[args.task]:
            raise Problem(f"--cells {cell}: {args.task} has {', '.join(TASK_CELLS[args.task])}")
    if args.run and (args.out or args.show):
        raise Problem("--run writes eval.jsonl there: no --out; --show goes with --model")
    if args.steps and not args.run:
        raise Problem("--steps are checkpoints of a --run")
    return args


def main():
    """Measure one model, or the checkpoints of a run."""
    args = flags()
    every = (CURVE_CELLS if args.run else TASK_CELLS)[args.task]
    cells = args.cells or (list(every) if args.ood else ["id"])
    if args.run:
        return evaluate_run(args, cells)
    if args.out:
        open(args.out, "a").close()         # a path that fails, fails now
    print(f"{args.model} on {args.task}: {args.hands} episodes a cell")
    results, episodes = measure_model(args, sft.open_backbone(args), cells)
    if args.out:                            # before anything long is printed
        pathlib.Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    show_more(results)
    for name in episodes if args.show else ():
        print("\n#", name)
        show_transcripts(episodes[name], args.show)


if __name__ == "__main__":
    sys.exit(sft.guarded(main))
