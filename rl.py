"""Stage 2, reinforcement learning: multi-turn PPO against a verifier, by hand.

Paper: arXiv 2501.17161, sections 3 and 5, appendix C. The model plays whole episodes (answer,
verifier message, answer, ...): a hand of up to five tries, or a walk of up to two tries at each of
about 15 positions. One TRY is one time step: one answer, one reward, one value, one advantage. An
ACTION, for the ratio, is one token of the answer (the default) or the whole answer (the paper's).

  1. collect: play B episodes with the current policy (evaluate.play)
  2. score: one forward pass over each conversation gives log p of every sampled token and, at the
     last prompt token before each answer, the value V of that state
  3. advantages: GAE over the tries of an episode, also where it lies in several conversations (a
     walk: one for each position); nothing leaks past its end
  4. update: several epochs of minibatches on the clipped policy loss + clipped value loss
  5. log, save, and now and then evaluate on hands and rules that were never trained on

Symbols and shapes (N is another thing in README eq. 6, parameters):
  B episodes   K tries of an episode   N answer tokens   T tokens   H hidden size
  r reward of a try    V value before it    A advantage    R = A + V return (target of V)
  ratio = pi_new(action) / pi_old(action)

What differs from the paper's text or its released code, and why:
  * the ratio is per token by default, the paper's one ratio for a whole answer is --ratio answer
    (one full run of each from seed 0: all four success rates within 2.2 points of each other)
  * the critic reads the trunk's hidden state and sends no gradient into it (--value-trunk does)
  * policy and critic have their gradients clipped apart
  * an episode that runs out of tries ends there; the released code bootstraps its last value from
    the next, unrelated episode
  * log-probabilities are float32 (the released code sums them in bf16: steps of 3-6 % in the ratio)
  * rewards follow the paper's table; the released code adds penalties up
  * one forward pass scores all tries of an episode, instead of one pass for each try

    python rl.py --task gp-l --ood             the main job: 7 minutes on two cores; rule OOD of
                                               held-out hands from 14 to 33 %, ID from 22 to 38 %
    python rl.py --task virl-l --ood           walks; whole routes, other rule: from 46 to 75 %
    python rl.py --task virl-vl --ood          the same in street view: from 42 to 75 %
    python rl.py --task gp-l --inspect         one episode, token by token
    python rl.py --task gp-l --from-backbone   no SFT start: RL has nothing to reward (Fig. 9)
    python rl.py --preset paper --dry-run --random-weights
                                               what the paper's run would cost on this GPU

Read before: evaluate.py. Then: tests/test_rl.py, where every function here is checked by hand.
"""

import argparse
import itertools
import math
import pathlib
import shutil
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import gp_env
import sft
import virl_env
from evaluate import CURVE_CELLS, Reader, evaluate, new_game, play, record_flag, show
from sft import (Metrics, Problem, checkpoints, guarded, load_state, pad, pick_device, read_lines,
                 save_checkpoint, task_parameters, token_logprobs, trunk)


# Defaults of walks, where they differ from those of hands. A walk has about 13 tries, as many as
# four hands, so 64 walks are as much experience as 256 hands. Those 13 tries fill 11 conversations,
# the tries of four hands fill 4: a minibatch of as many tries has 96 conversations instead of 32.
# At twice this learning rate one seed of three fell below its start. 48 walks are evaluated on, as
# in the paper. The SFT start is made with sft.py's own defaults for the task.
WALKS = {"tries": virl_env.TRIES, "updates": 10, "episodes": 64, "minibatch": 96, "lr": 5e-5,
         "eval_hands": 48, "eval_every": 5}
TASK_DEFAULTS = {task: WALKS | {f"sft_{flag}": value for flag, value in own.items()}
                 for task, own in sft.TASK_DEFAULTS.items()}
# --preset paper (appendix C.2 and the launch scripts): 2,048 tries an update, 1,024 an optimiser
# step, here as episodes and conversations. No --warmup, one ratio an answer, one learning rate.
PAPER = {"updates": 20, "episodes": 500, "tries": 5, "minibatch": 250, "temperature": 0.2,
         "max_new_tokens": 512, "lr": 1e-6, "value_lr": 1e-6, "warmup": 0, "epochs": 4, "clip": 0.1,
         "value_clip": 0.1, "value_trunk": True, "ratio": "answer", "eval_hands": 234,
         "sample_batch": 64}
PAPER_WALKS = {"updates": 15, "episodes": 160, "tries": 2, "minibatch": 880, "eval_hands": 48}
PRESETS = {task: PAPER | (PAPER_WALKS if task.startswith("virl") else {})
           | ({"lr": 1e-7, "value_lr": 1e-7} if task == "virl-vl" else {})
           | {key if key in (*sft.LARGE, "micro_batch", "picture_size") else f"sft_{key}": value
              for key, value in own.items()} for task, own in sft.PRESETS.items()}


# ------------------------------------------------------------------------------------------------
# 1. Collect
# ------------------------------------------------------------------------------------------------


def seeded(*numbers):
    """A torch generator from several numbers, e.g. (seed, update): no state to save or restore."""
    mixed = torch.tensor(numbers, dtype=torch.int64)
    weights = torch.tensor([1_000_003 ** i % (2 ** 31) for i in range(len(numbers))])
    return torch.Generator().manual_seed(int((mixed * weights).sum() % 2 ** 31))


def collect(backbone, args, update):
    """Play args.episodes training episodes with the current policy. Returns a list of Episode.

    Hands and samples are a function of (seed, update), so a resumed run plays the same games.
    """
    options = sft.game_options(args)
    if args.dry_run and args.task.startswith("virl"):
        options["go_on"] = True         # noise would end every walk at its first position
    envs = [new_game(args.task, split=args.split, tries=args.tries, **options)
            for _ in range(args.episodes)]
    seeds = [[1, args.seed, update, i] for i in range(args.episodes)]
    device = backbone.device
    generator = torch.Generator(device).manual_seed(seeded(args.seed, update, 1).initial_seed())
    # all at once, unless their keys and values would fill the GPU
    size, episodes = args.sample_batch or args.episodes, []
    for start in range(0, args.episodes, size):
        episodes += play(backbone, envs[start:start + size], seeds[start:start + size],
                         args.temperature, args.max_new_tokens, generator)
    return episodes


def conversations(episodes):
    """Episodes -> rows that one forward pass can score. Returns a list of dicts:

    ids    tokens of one whole conversation (one for each hand, or each position of a walk)
    mask   1 on sampled tokens, 0 on prompts and verifier messages: the policy did not choose those
    value_at  for each try, the position of the last token BEFORE its answer. V is read there: a
           baseline must not know the action that it judges
    tries  for each try, (episode, number of the try), to find its reward and advantage
    picture  what the conversation shows, as tensors (sft.encode_picture), or None

    In a walk a new position begins a new conversation, and the number of the try runs on:

        position of the rail    1             2        3
        tries                   wrong right   right    wrong wrong
        rows                    (e,0) (e,1)   (e,2)    (e,3) (e,4)

    Of one conversation:

        position   0  1  2   3  4  5   6  7   8  9
        token      p  p  p   a  a  .   m  m   a  .       p prompt, a answer, . end, m message
        mask       0  0  0   1  1  1   0  0   1  1       value_at [2, 7], tries [(e, 0), (e, 1)]
    """
    rows = []
    for e, episode in enumerate(episodes):
        for k, turn in enumerate(episode.turns):
            if turn.new_conversation:
                rows.append({"ids": [], "mask": [], "value_at": [], "tries": [],
                             "picture": turn.picture})
            row = rows[-1]
            row["ids"] += turn.prompt_ids
            row["value_at"].append(len(row["ids"]) - 1)
            row["tries"].append((e, k))
            row["ids"] += turn.answer_ids
            row["mask"] += [0] * len(turn.prompt_ids) + [1] * len(turn.answer_ids)
    return rows


# ------------------------------------------------------------------------------------------------
# 2. Score
# ------------------------------------------------------------------------------------------------


def build_value_head(hidden, seed):
    """The critic: a small MLP on the policy's own hidden state, (.., H) -> (..,). V is 0 at first.

    One forward pass serves policy and critic. The critic's gradient ends at the hidden state,
    unless --value-trunk lets it through, as in the paper (see `score`).
    """
    wide, narrow = max(128, hidden // 4), max(64, hidden // 8)
    head = torch.nn.Sequential(torch.nn.Linear(hidden, wide), torch.nn.ReLU(),
                               torch.nn.Linear(wide, narrow), torch.nn.ReLU(),
                               torch.nn.Linear(narrow, 1), torch.nn.Flatten(-2))
    generator = seeded(seed, 2)
    with torch.no_grad():
        for layer in head[:-1]:
            if isinstance(layer, torch.nn.Linear):
                layer.weight.normal_(0, layer.in_features ** -0.5, generator=generator)
                layer.bias.zero_()
        head[4].weight.zero_()
    return head


def score(backbone, head, rows, temperature, value_trunk=False):
    """One forward pass over a list of conversations (see `conversations`).

    value_trunk: let the gradient of V into the trunk, as the paper does. By default the critic only
    READS the policy's hidden state: let in, it made the trunk's gradient 9 times as long (3.5
    against 0.37, mean of 24 updates, rewards in -4..5), so that most of a step served the critic,
    and three success rates of four ended lower, one seed (results/README.md, "Ablations").
    Returns (logprobs (N,), entropy (N,), values (number of tries,)), all float32, in row order.
    """
    device = backbone.device
    ids = pad([r["ids"] for r in rows]).to(device)                           # (rows, T)
    mask = pad([r["mask"] for r in rows]).to(device)
    lengths = torch.tensor([len(r["ids"]) for r in rows], device=device)
    pictures = [r.get("picture") for r in rows]
    hidden = trunk(backbone, ids, lengths, pictures)                         # (rows, T, H)
    logprobs, entropy = token_logprobs(backbone, hidden, ids, mask, temperature)
    # A causal model's hidden state at position t knows tokens 0..t and nothing later. So the states
    # before ALL answers of an episode lie in this one pass, and V of try k cannot peek at answer k.
    at = [(i, end) for i, r in enumerate(rows) for end in r["value_at"]]
    row, end = torch.tensor(at, device=device).T
    state = hidden[row, end].float()                                         # (tries, H)
    return logprobs, entropy, head(state if value_trunk else state.detach())


@torch.no_grad()
def score_all(backbone, head, rows, temperature, micro_batch):
    """`score` without gradients, any number of rows. Adds the OLD "logprobs" and "values" to each.

    The sampler knew the log-probabilities already. But V needs this pass anyway, and it computes
    the old ones just as the update will compute the new ones, so that all ratios begin at 1 but for
    rounding. (Small backbone in bf16 on a CPU: the sampler's are off by 0.003 a token on average,
    these by 0.0001.) The sampler's serve in `self_check`. They are those at --temperature:
    softmax(logits / temperature) is the policy that played.
    """
    for part in by_length(rows, micro_batch):
        logprobs, _, values = score(backbone, head, part, temperature)
        logprobs = logprobs.split([sum(r["mask"]) for r in part])
        values = values.split([len(r["tries"]) for r in part])
        for r, p, v in zip(part, logprobs, values):
            r["logprobs"], r["values"] = p, v


def by_length(rows, size):
    """Cut rows into micro-batches of `size`, neighbours of like length together: little padding."""
    rows = sorted(rows, key=lambda r: len(r["ids"]))
    return [rows[i:i + size] for i in range(0, len(rows), size)]


# ------------------------------------------------------------------------------------------------
# 3. Advantages
# ------------------------------------------------------------------------------------------------


def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0):
    """Generalised advantage estimation over the K tries of ONE episode (Schulman et al. 2016).

        delta_k = r_k + gamma * V_{k+1} - V_k                                     (eq. 1)
        A_k     = delta_k + gamma * lambda * A_{k+1}                              (eq. 2)
        R_k     = A_k + V_k                                                       (eq. 3)

    What stands for V_{k+1} at the end is where implementations go wrong:
      terminated  the game is over, no reward can follow: 0
      truncated   it was cut; the value of what would have come next is `after`. Running out of
                  tries is a rule of this game that the agent cannot play past, so `after` is always
                  0 in this file. Code that cuts episodes where a buffer is full (most PPO for
                  games does) puts V(next state) there.
      Never the value of another episode.

    rewards, values: (K,) float. Returns (advantages, returns), both (K,). Worked example (gamma
    0.9, lambda 0.95), wrong answer then right:

        k   r    V    delta                        A                                 R
        0  -1   1.0  -1 + 0.9*2.0 - 1.0 = -0.2    -0.2 + 0.855*3.0 = 2.365          3.365
        1   5   2.0   5 + 0      - 2.0 =  3.0      3.0                              5.0
    """
    assert rewards.shape == values.shape and rewards.dim() == 1, (rewards.shape, values.shape)
    assert terminated != truncated, "an episode ends in exactly one of the two ways"
    next_value = 0.0 if terminated else after
    advantages = torch.zeros_like(values)
    running = 0.0
    for k in reversed(range(len(rewards))):
        delta = rewards[k] + gamma * next_value - values[k]
        running = delta + gamma * lam * running
        advantages[k] = running
        next_value = values[k]
    return advantages, advantages + values


def add_advantages(rows, episodes, gamma, lam):
    """Fill in "advantages" and "returns" of every row (one number a try), advantages normalised.

    Normalised over all tries of the batch: mean 0, standard deviation 1. (PPO's usual way is to do
    it in each minibatch, Huang et al. 2022, detail 7; the comment below says why it is not done
    here.) Returns are left alone, they are what the critic has to predict.
    """
    # An episode may lie in several rows (V-IRL forgets after each right action); time runs on
    # through all of them, so tries are put back in order by (episode, number of the try). What
    # follows the last try at a position is V of the next position, read in ANOTHER row: forgetting
    # the words ends a conversation, not the episode.
    values = {t: v for r in rows for t, v in zip(r["tries"], r["values"])}
    result = {}
    for e, episode in enumerate(episodes):
        rewards = torch.tensor([t.reward for t in episode.turns])
        v = torch.stack([values[e, k] for k in range(len(rewards))]).cpu()
        advantages, returns = gae(rewards, v, episode.terminated, episode.truncated, gamma, lam)
        result |= {(e, k): pair for k, pair in enumerate(zip(advantages, returns))}
    # One mean and one spread for the whole batch, not for each minibatch: otherwise the sign of an
    # advantage would depend on which other episodes it happened to be shuffled with.
    every = torch.stack([a for a, _ in result.values()])
    mean, spread = every.mean(), every.std(correction=0) + 1e-8
    for r in rows:
        advantages, returns = (torch.stack(x) for x in zip(*(result[t] for t in r["tries"])))
        r["advantages"] = ((advantages - mean) / spread).to(r["values"].device)
        r["returns"] = returns.to(r["values"].device)


# ------------------------------------------------------------------------------------------------
# 4. Update
# ------------------------------------------------------------------------------------------------


def policy_loss(logprobs, old_logprobs, advantages, clip):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), summed, as a loss to minimise.

        ratio = exp(logprobs - old_logprobs)
        loss  = - sum( min( ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A ) )       (eq. 4)

    min takes the more pessimistic of the two, so that a step is never rewarded for going further
    than `clip`, but is always punished for having gone the wrong way. All (N,), one entry for each
    action: a token, or a whole answer with its summed log-probability.
    Returns (loss, log ratios without gradient).
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.min(ratio * advantages, clipped * advantages).sum(), log_ratio.detach()


def value_loss(values, old_values, returns, clip):
    """The critic's squared error, clipped like the policy: summed over tries (n,).

        V_clipped = V_old + clamp(V - V_old, -clip, clip)
        loss      = 1/2 sum( max( (V - R)^2, (V_clipped - R)^2 ) )                    (eq. 5)

    max is again the pessimistic choice. `returns` were computed with the OLD critic and stay fixed.
    """
    assert values.shape == old_values.shape == returns.shape
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).sum()


def per_answer(token_values, counts):
    """Sum tokens into answers: (N,) and the number of tokens of each answer -> (answers,)."""
    which = torch.repeat_interleave(torch.arange(len(counts), device=token_values.device), counts)
    return token_values.new_zeros(len(counts)).index_add(0, which, token_values)


def minibatch_loss(backbone, head, part, args, tokens, tries):
    """Loss of one micro-batch, as its share of a minibatch with `tokens` tokens and `tries` tries.

    Dividing by the totals of the MINIBATCH makes --micro-batch a dial for memory alone.
    Returns (loss, statistics as sums).
    """
    logprobs, entropy, values = score(backbone, head, part, args.temperature,
                                      args.value_trunk)
    join = {key: torch.cat([r[key] for r in part])
            for key in ("logprobs", "advantages", "returns", "values")}
    counts = torch.tensor([n for r in part for n in _answer_lengths(r)], device=logprobs.device)
    if args.ratio == "token":
        # Each token is an action of its own, with its answer's advantage. While all ratios are 1
        # this has the gradient of the other way, but for the factor tries / tokens: the log of a
        # product is the sum of the logs. Later they differ, since here each token is clipped alone.
        actions = tokens
        advantages = torch.repeat_interleave(join["advantages"], counts)
        policy, log_ratio = policy_loss(logprobs, join["logprobs"], advantages, args.clip)
    else:
        # The paper: the answer is one action. One ratio, the product of ~30 token ratios, leaves
        # the clip range after a far smaller step.
        actions = tries
        policy, log_ratio = policy_loss(per_answer(logprobs, counts),
                                        per_answer(join["logprobs"], counts),
                                        join["advantages"], args.clip)
    policy = policy / actions       # a mean over actions, like the terms below but the critic's
    critic = value_loss(values, join["values"], join["returns"], args.value_clip) / tries
    # Minimised: the surrogate enters with a minus already, the entropy bonus is subtracted.
    loss = policy + args.value_coef * critic - args.entropy_coef * entropy.sum() / actions
    if args.kl_coef > 0:
        # A price for moving away from the start. With gap = log p_start - log p, the mean of
        # exp(gap) - 1 - gap over sampled tokens estimates KL(policy || start) and is never negative
        # (k3 in Schulman's note). Its gradient, though, is that of KL(start || policy).
        gap = torch.cat([r["start_logprobs"] for r in part]) - logprobs
        loss = loss + args.kl_coef * (gap.exp() - 1 - gap).sum() / actions
    return loss, {
        "policy_loss": policy.item(), "value_loss": critic.item(),
        "entropy": entropy.sum().item() / tokens,
        "approx_kl": (log_ratio.exp() - 1 - log_ratio).sum().item() / actions,
        "clipfrac": ((log_ratio.exp() - 1).abs() > args.clip).float().sum().item() / actions}


def _answer_lengths(row):
    """Tokens of each answer of a conversation: the runs of ones in its mask."""
    starts = [end + 1 for end in row["value_at"]]
    bounds = starts[1:] + [len(row["mask"])]
    return [sum(row["mask"][a:b]) for a, b in zip(starts, bounds)]


def ppo_update(backbone, head, optimizer, rows, args, update):
    """args.epochs passes over the batch in shuffled minibatches. Returns mean statistics."""
    sft.learning_mode(backbone, True)
    # Optimiser steps of all earlier updates, for the warm-up below; -(-a // b) is a / b rounded up.
    # Exact for hands; the rows of walks vary in number, so there it is an estimate.
    done = update * args.epochs * -(-len(rows) // args.minibatch)
    log, fed, skipped = [], 0, 0
    shuffler, parts = seeded(args.seed, update, 3), []
    for _ in range(args.epochs):
        # Whole conversations are shuffled, not tries: the tries of one share a forward pass. From
        # the second minibatch on the policy is no longer the one that played, which is what the
        # ratio corrects for, and the clip limits how far that is trusted.
        shuffled = [rows[i] for i in torch.randperm(len(rows), generator=shuffler).tolist()]
        parts += [shuffled[start:start + args.minibatch]
                  for start in range(0, len(rows), args.minibatch)]
    for part in parts:
        tokens = sum(sum(r["mask"]) for r in part)
        tries = sum(len(r["tries"]) for r in part)
        total = {}
        for micro in by_length(part, args.micro_batch):
            loss, numbers = minibatch_loss(backbone, head, micro, args, tokens, tries)
            loss.backward()
            fed += sum(len(r["ids"]) for r in micro)
            total = {k: total.get(k, 0.0) + v for k, v in numbers.items()}
        # Clipped apart: under one common norm the critic's long gradient would shorten the
        # policy's, by another factor in each minibatch.
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
                 for group in optimizer.param_groups]
        # Warm-up: Adam's first steps are about lr long, however small the gradient. Without it the
        # very first update moved the policy further (approx_kl 0.13) than any of the next ten.
        # Then a cosine over the updates, as in the paper. At a constant rate an earlier, weaker
        # backbone lost its first gain again (one seed; README, "What does not reproduce").
        scale = 0.5 * (1 + math.cos(math.pi * update / args.updates))
        scale *= min(1.0, (done + len(log) + 1) / max(1, args.warmup))
        for group, peak in zip(optimizer.param_groups, (args.lr, args.value_lr)):
            group["lr"] = peak * scale
        skipped += not sft.take_step(backbone, optimizer, norms)
        log.append(total | {"grad_norm": norms[0].item(), "value_grad_norm": norms[1].item()})
        if backbone.refused >= 3:
            break                       # `run` saves, and stops
    mean = {k: sum(x[k] for x in log) / len(log) for k in log[0]}
    return mean | {"skipped": skipped, "tokens_trained": fed}


def explained_variance(values, returns):
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant, below 0 if harmful."""
    left, all_of_it = ((x - x.mean()).square().mean() for x in (returns - values, returns))
    return float(1 - left / (all_of_it + 1e-8))


# ------------------------------------------------------------------------------------------------
# 5. The run
# ------------------------------------------------------------------------------------------------


# For `estimate`: cost of evaluating, sampling and training on a hand (a walk), in units of training
# on one single-try conversation. Set by whole runs: idle, 8 minutes foretold for virl-l, 8.6 taken.
COSTS = {"gp": (4.3, 3.7, 3.9), "virl": (5.0, 5.0, 9.5)}


def self_check(rows, episodes, backbone, split, temperature=0.6):
    """Invariants of a fresh batch, before anything was learnt from it. Raises Problem.

    They cost nothing and catch the classic silent bugs of this kind of code.
    """
    sampled = [p for e in episodes for t in e.turns for p in t.logprobs]
    scored = torch.cat([r["logprobs"] for r in sorted(rows, key=lambda r: r["tries"])]).cpu()
    if len(sampled) != len(scored):
        raise Problem(f"self-check: {len(sampled)} tokens were sampled, {len(scored)} are masked: "
                      "the loss mask is off")
    gaps = (torch.tensor(sampled) - scored).abs()
    # bf16 rounds differently in batches of other shapes, and a low temperature magnifies that. A
    # few tokens may differ much then; all of them on average only if something is wrong.
    exact = backbone.device.type == "cpu" and backbone.model.dtype == torch.float32
    gap, limit = (gaps.max().item(), 1e-4 / min(1, temperature)) if exact else (
        gaps.mean().item(), 0.05 / temperature)
    if not gap < limit:
        raise Problem(f"self-check: sampler and update disagree on log p by {gap:.2g}: wrong "
                      "temperature, positions, padding side or shift")
    whole = [t.answer_ids[-1] in backbone.end_ids for e in episodes for t in e.turns]
    held_out = split == "train"                         # --split all holds nothing out
    if held_out and not all(in_training(e.env) for e in episodes):
        raise Problem("self-check: a held-out hand or route is among those of training")
    return (f"self-check: {'max' if exact else 'mean'} |log ratio| {gap:.1e} before any step, "
            f"{len(scored)} tokens sampled and masked, "
            f"{sum(whole) / len(whole):.1%} of answers ended"
            + ", no held-out hand or route" * held_out)


def in_training(env):
    """Does the hand or route of an episode belong to the training split?

    Asked of what was dealt, not of the `split` that the game was told to deal from: a leak in the
    dealing is just what this must find.
    """
    if isinstance(env, virl_env.Navigation):
        return env.route.index in virl_env.split_routes(len(env.atlas), "train")
    return gp_env.split_of(env.hand.cards) == "train"


def inspect(rows, episodes, backbone):
    """Print one conversation as a table: what was said, what counts, what PPO will do about it."""
    row = max(rows, key=lambda r: len(r["tries"]))
    episode = episodes[row["tries"][0][0]]
    print("pos  token                     mask   log p   value  reward  advantage  return")
    answer = iter(row["logprobs"].tolist())
    judged = {end: k for k, end in enumerate(row["value_at"])}
    for i, (token, m) in enumerate(zip(row["ids"], row["mask"])):
        text = repr(backbone.tokenizer.decode([token]))
        line = f"{i:3d}  {text if len(text) < 25 else text[:21] + '...':25s} {m:3d}"
        line += f"  {next(answer):7.3f}" if m else ""
        if i in judged:
            k = judged[i]                   # number of the try in this row, not in the episode
            reward = episode.turns[row["tries"][k][1]].reward
            line += (f"           {row['values'][k]:6.2f}  {reward:+6.1f}  "
                     f"{row['advantages'][k]:9.2f}  {row['returns'][k]:6.2f}")
        print(line)


def make_start(args, backbone):
    """The SFT start: made once, kept in runs/, found again by the next run. Returns its path."""
    wanted = argparse.Namespace(
        task=args.task, model=args.model, split=args.split, seed=args.seed, ood=args.ood,
        device=args.device, threads=args.threads, grad_checkpoint=args.grad_checkpoint,
        micro_batch=args.micro_batch, steps=args.sft_steps, start_step=args.sft_start_step,
        batch=args.sft_batch, lr=args.sft_lr, save_every=args.sft_save_every, resume=False,
        picture_size=args.picture_size, freeze=args.freeze, drop_pictures=False,
        routes=args.routes, other_routes=args.other_routes, dtype=args.dtype, preset=args.preset,
        announce=args.announce)
    key = {k: v for k, v in vars(wanted).items() if v is not None and k in (
        "task", "model", "split", "seed", "steps", "start_step", "batch", "lr", "picture_size",
        "routes", "dtype", "freeze", "preset", "announce")}
    for number in itertools.count(1):
        folder = pathlib.Path("runs") / (f"start-{args.task}-s{args.seed}"
                                         + f"-{number}" * (number > 1))
        path = folder / f"step-{args.sft_start_step:06d}"
        made = read_lines(folder / "made.jsonl")    # written last: without it, a kill came first
        if made == [key] and (path / "state.pt").exists():
            print(f"SFT start: {path} (made by an earlier run)")
            return path
        # what was made with other flags may be in use; what has an args.json is not a start
        if made in ([], [key]) and not (folder / "args.json").exists():
            break
    print(f"SFT start: none given, so {args.sft_start_step} steps of SFT first, into {path}")
    shutil.rmtree(folder, ignore_errors=True)
    path = sft.run_sft(wanted, folder, stop_at=args.sft_start_step, backbone=backbone)
    Metrics(folder, name="made.jsonl").write(key)
    return path


def main():
    """The command line of stage 2."""
    parser = argparse.ArgumentParser(description="Multi-turn PPO against a verifier.")
    sft.common_flags(parser)
    group = parser.add_argument_group("where to start")
    group.add_argument("--init", help="checkpoint to start from (default: make the SFT start)")
    group.add_argument("--from-backbone", action="store_true",
                       help="start from --model itself, without SFT (paper: Fig. 9, it fails)")
    sft.sft_flags(parser, "sft-")
    group = parser.add_argument_group("PPO")
    for name, kind, default, text in (
            ("updates", int, 24, "PPO updates (paper: 20; V-IRL: 15)"),
            ("episodes", int, 256, "episodes an update (paper: about 500, as 2,048 tries)"),
            ("tries", int, gp_env.TRIES, "answers a hand, or a position, in training; evaluations "
             "keep 5 and 2 (paper: 5; V-IRL: 2)"),
            ("temperature", float, 0.6, "of sampling and of the ratio (paper: 0.2)"),
            ("max-new-tokens", int, 48, "longest answer in tokens (paper: 512); the small backbone "
             "spells real names out: with --routes take 200"),
            ("lr", float, 1e-4, "peak learning rate of the policy (paper: 1e-6 at 11B)"),
            ("warmup", int, 16, "optimiser steps over which both learning rates rise"),
            ("value-lr", float, 3e-3, "learning rate of the value head (paper: the same as --lr)"),
            ("epochs", int, 2, "passes over the batch an update (paper: 4)"),
            ("minibatch", int, 32, "conversations an optimiser step (paper: 1,024 tries)"),
            ("micro-batch", int, 16, "conversations in memory at once; does not change the result"),
            ("sample-batch", int, 0, "episodes played at once; 0 = all: speed and memory"),
            ("clip", float, 0.2, "clip range of the ratio (paper: 0.1)"),
            ("value-clip", float, 1.0, "clip range of the value, in units of reward (paper: 0.1)"),
            ("value-coef", float, 0.5, "weight of the value loss (paper: 0.5)"),
            ("entropy-coef", float, 0.0, "weight of the entropy bonus (paper: 0.01, unused)"),
            ("kl-coef", float, 0.0, "weight of a KL term to the start (paper: none)"),
            ("gamma", float, 0.9, "discount for each try (paper: 0.9)"),
            ("lam", float, 0.95, "lambda of GAE (paper: 0.95)"),
            ("max-grad-norm", float, 1.0, "gradient clipping")):
        group.add_argument(f"--{name}", type=kind, default=default,
                           help=f"{text}; {sft.name_default(TASK_DEFAULTS, name)}")
    record_flag(group)
    group.add_argument("--value-trunk", action=argparse.BooleanOptionalAction, default=False,
                       help="let the critic's gradient into the trunk (paper: yes)")
    group.add_argument("--ratio", choices=("token", "answer"), default="token",
                       help="one ratio for each token, or the paper's one for a whole answer")
    group = parser.add_argument_group("measuring")
    group.add_argument("--eval-hands", type=int, default=500, help="hands or walks a cell at both "
                       f"ends; {sft.name_default(TASK_DEFAULTS, 'eval-hands')}")
    group.add_argument("--eval-every", type=int, default=8,
                       help="updates between short evaluations; "
                       + sft.name_default(TASK_DEFAULTS, "eval-every"))
    group.add_argument("--eval-temperature", type=float, default=0.6,
                       help="of sampling in evaluations; 0 takes the likeliest token")
    group.add_argument("--eval-split", choices=("test", "val"), default="test",
                       help="what is held out: test for reporting, val while tuning")
    group.add_argument("--inspect", action="store_true",
                       help="print one hand, or one position of a walk, token by token, learn "
                       "nothing, and stop")
    args = sft.parse_flags(parser, TASK_DEFAULTS, PRESETS)
    sft.check_flags(args, at_least_one=(
        "updates", "episodes", "tries", "minibatch", "micro_batch", "epochs", "eval_every",
        "eval_hands", "max_new_tokens", "sft_steps", "sft_start_step", "sft_batch",
        "sft_save_every"))
    args.model = args.model or str(sft.DEFAULT_MODEL[args.task])
    Reader.recorded_on = ("cuda",) * args.record
    if args.temperature <= 0:
        raise Problem("--temperature must be above 0: PPO needs a policy that explores")
    if max(args.gamma, args.lam) > 1:
        raise Problem("--gamma and --lam must not be above 1: returns would grow without limit")
    if args.sft_start_step > args.sft_steps:
        raise Problem("--sft-start-step must not be above --sft-steps")
    if args.init and args.from_backbone:
        raise Problem("--init and --from-backbone exclude each other")
    run(args)


def compute(task, size, counts, passes=2):
    """FLOPs so far: by the paper's formula (README eq. 6) and really spent (eq. 7).

    size: parameters N. counts: tokens that went through SFT before this run ("init"), through PPO's
    forward and backward passes ("trained"), and that the sampler read ("sampled"). The paper
    charges 2 N * 6 * D_RL for sampling (V-IRL: 5.1), as if every new token read the whole
    conversation again; with a cache the sampler reads each token once, and the scoring pass once
    more (passes = 2; the reference of --kl-coef makes it 3).
    """
    again = 5.1 if task.startswith("virl") else 6
    training = 6 * size * (counts["init"] + counts["trained"])
    return {"flops": training + 2 * size * again * counts["trained"],
            "flops_spent": training + 2 * size * passes * counts["sampled"]}


def estimate(backbone, args, cells):
    """Minutes that the run will take on this machine, from timing one small training pass.

    The unit is the time for one conversation of one try, forward and backward. The three factors
    were measured in whole runs with the small backbones; for other models they are a guess.
    """
    rng, name = np.random.default_rng(0), args.task.split("-")[0]
    expert, (evaluating, sampling, training) = sft.ENVIRONMENTS[name], COSTS[name]
    count = 32 if backbone.device.type == "cpu" else min(32, args.micro_batch)
    rows = [sft.encode(backbone, expert.expert_conversation(rng, split=args.split,
                                                            **sft.game_options(args)))
            for _ in range(count)]
    unit = math.inf
    for _ in range(4):          # the first pass also pays for memory; any may meet a busy moment
        began = time.time()
        sft.sft_loss(backbone, rows, count)
        unit = min(unit, (time.time() - began) / count)
    backbone.model.zero_grad(set_to_none=True)
    hands = args.eval_hands * (2 + args.updates / args.eval_every / 4) * 2 * len(cells)
    start = 0 if args.init or args.from_backbone else args.sft_start_step * args.sft_batch
    episodes = args.updates * args.episodes
    return unit * (start + evaluating * hands + (sampling + training * args.epochs) * episodes) / 60


def run(args):
    """Start, evaluate, update, evaluate."""
    began = time.time()
    device = pick_device(args.device)
    cells = CURVE_CELLS[args.task] if args.ood else ["id"]
    look_only = args.inspect or args.dry_run            # no run folder (a start may be made)
    backbone = sft.open_backbone(args, args.init)
    sft.check_sight(backbone, args.task, args.init or args.model)
    sft.freeze(backbone.model, args.freeze)
    minutes = 0 if look_only else estimate(backbone, args, cells)
    folder = None if look_only else sft.open_run(
        args.out or f"runs/rl-{args.task}-s{args.seed}", args, "rl")
    print(f"PPO on {args.task}, seed {args.seed}: {args.updates} updates of {args.episodes} "
          f"episodes on {device} with {torch.get_num_threads()} threads" + (
              "" if look_only else f", into {folder}\nabout {minutes:.0f} minutes on this machine"),
          flush=True)
    saved = checkpoints(folder) if folder and args.resume else []
    if args.from_backbone or args.dry_run:
        start = args.model
    elif args.init or (saved and args.kl_coef == 0):
        start = args.init or saved[-1][1]               # a resumed run needs its start no more
    else:
        start = make_start(args, backbone)

    # --- the policy, its critic, and the optimiser of both
    if not args.dry_run:
        backbone = None             # two large models would not fit beside each other
        backbone = sft.open_backbone(args, saved[-1][1] if saved else start)
        sft.freeze(backbone.model, args.freeze)
    model = backbone.model
    head = build_value_head(model.config.get_text_config().hidden_size, args.seed).to(device)
    optimizer = sft.adamw(
        [{"params": [p for p in model.parameters() if p.requires_grad], "lr": args.lr},
         {"params": list(head.parameters()), "lr": args.value_lr}], (0.9, 0.999))
    first, counts = 0, {"init": 0, "trained": 0, "sampled": 0}
    if saved:
        (first, path), state = saved[-1], load_state(saved[-1][1], ("optimizer", "head", "counts"))
        sft.restore(path, [(optimizer, state["optimizer"]), (head, state["head"])])
        known = state["counts"] if isinstance(state["counts"], dict) else {}
        counts = {key: sft.whole_number(known.get(key), path) for key in counts}
    elif (pathlib.Path(start) / "state.pt").exists():
        counts["init"] = sft.whole_number(load_state(start).get("tokens", 0), start)
    reference, passes = (sft.open_backbone(args, start), 3) if args.kl_coef > 0 else (None, 2)
    size = task_parameters(model, pictures=sft.pictured(args.task))
    if not look_only:
        resume_at = first if saved else None
        metrics, measured = Metrics(folder, resume_at), Metrics(folder, resume_at, "eval.jsonl")

    def measure(step, hands):
        """Evaluate on seen and held-out hands, print, and write eval.jsonl."""
        at = time.time()
        splits = ["all"] if args.split == "all" else ["train", args.eval_split]
        results, _ = evaluate(backbone, cells, splits, hands,
                              args.eval_temperature, args.sample_batch or 256,
                              args.max_new_tokens, task=args.task,
                              shown=sft.picture_options(args), where=sft.places(args))
        measured.write({"step": step, "hands": hands} | compute(args.task, size, counts, passes)
                       | {"cells": results})
        tqdm.write(f"after update {step}, {hands} episodes a cell ({time.time() - at:.0f} s):")
        show(results)

    if not saved and not look_only:
        measure(0, args.eval_hands)
    if args.dry_run:        # the first game of a process also solves all hands: not on the clock
        collect(backbone, argparse.Namespace(**vars(args) | {"episodes": 1, "max_new_tokens": 2}),
                0)
    bar = tqdm(range(first, args.updates), initial=first, total=args.updates, desc="ppo",
               unit="update", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    for update in bar:
        # --- 1. collect
        clock = [time.time()]
        episodes = collect(backbone, args, update)
        clock.append(time.time())
        # --- 2. score
        rows = conversations(episodes)
        score_all(backbone, head, rows, args.temperature, args.micro_batch)
        if reference:
            copies = [dict(r) for r in rows]
            score_all(reference, head, copies, args.temperature, args.micro_batch)
            for r, c in zip(rows, copies):
                r["start_logprobs"] = c["logprobs"]
        # --- 3. advantages
        add_advantages(rows, episodes, args.gamma, args.lam)
        if update == first:
            tqdm.write(self_check(rows, episodes, backbone, args.split,
                                  args.temperature))
        if args.inspect:
            return inspect(rows, episodes, backbone)
        # --- 4. update
        numbers = ppo_update(backbone, head, optimizer, rows, args, update)
        clock.append(time.time())
        if args.dry_run:
            return dry_report(backbone, args, rows, numbers, clock, cells)
        # --- 5. log, evaluate, save
        counts["trained"] += numbers["tokens_trained"]
        counts["sampled"] += sum(len(r["ids"]) for r in rows)
        row = {"step": update + 1} | summary(rows, episodes) | numbers
        row |= compute(args.task, size, counts, passes) | {
            "seconds_collect": clock[1] - clock[0], "seconds_update": clock[2] - clock[1]}
        metrics.write(row)
        steps = f"  per step {row['per_step']:6.1%}" if "per_step" in row else ""
        tqdm.write(f"update {update + 1:3d}  success {row['success']:6.1%}{steps}  reward "
                   f"{row['reward']:6.2f}  kl {row['approx_kl']:.4f}  clip {row['clipfrac']:5.1%}  "
                   f"ev {row['explained_variance']:5.2f}  entropy {row['entropy']:.3f}  "
                   f"{row['seconds_collect']:.0f}+{row['seconds_update']:.0f} s")
        last = update + 1 == args.updates
        if last or (update + 1) % args.eval_every == 0:
            measure(update + 1, args.eval_hands if last else max(1, args.eval_hands // 4))
        # The checkpoint comes last: killed at any moment before, the run goes on from the one of
        # the update before, drops what was written since, and writes the same again.
        save_checkpoint(folder / f"step-{update + 1:06d}", backbone,
                        {"optimizer": optimizer.state_dict(), "head": head.state_dict(),
                         "counts": counts})
        sft.check_refused(backbone, folder / f"step-{update + 1:06d}")
        for _, path in checkpoints(folder)[:-2]:
            shutil.rmtree(path)     # the newest is enough to go on from; one more, should it break
    print(f"done in {(time.time() - began) / 60:.1f} minutes. The policy is in "
          f"{folder}/step-{args.updates:06d}. Next:\n"
          f"    python evaluate.py --model {folder}/step-{args.updates:06d} --show 4"
          + sft.flags_again(args))


def dry_report(backbone, args, rows, numbers, clock, cells):
    """Print what the one update of a --dry-run cost, and what the run will."""
    sampling, learning = clock[1] - clock[0], clock[2] - clock[1]
    size = task_parameters(backbone.model, pictures=sft.pictured(args.task))
    read, fed = sum(len(r["ids"]) for r in rows), numbers["tokens_trained"]
    hands = args.eval_hands * (2 + args.updates / args.eval_every / 4) * 2 * len(cells)
    start = 0 if args.init or args.from_backbone else args.sft_start_step * args.sft_batch
    tries = args.epochs * sum(len(r["tries"]) for r in rows)
    # an evaluation is sampling; an example of the SFT start is a conversation of one try
    sft.report_costs(backbone, {
        "sampling": (sampling, sum(sum(r["mask"]) for r in rows), 2 * size * read),
        "update": (learning, fed, 6 * size * fed + 2 * size * read)},
        args.updates * (sampling + learning) + hands * sampling / args.episodes
        + start * learning / tries)


def summary(rows, episodes):
    """What the training episodes of an update looked like."""
    values, returns = (torch.cat([r[key] for r in rows]) for key in ("values", "returns"))
    count, every = len(episodes), [t.verdict for e in episodes for t in e.turns]
    walks = isinstance(episodes[0].env, virl_env.Navigation)
    # A hand is one right answer or none; of a walk's answers a share is right.
    steps = {"per_step": sum(v.correct for v in every) / len(every)} if walks else {}
    return steps | {"success": sum(e.terminated for e in episodes) / count,
            "first_try": sum(e.turns[0].verdict.correct for e in episodes) / count,
            "reward": sum(t.reward for e in episodes for t in e.turns) / count,
            "tries": sum(len(e.turns) for e in episodes) / count,
            "explained_variance": explained_variance(values, returns)}


if __name__ == "__main__":
    sys.exit(guarded(main))
