"""Stage 2, reinforcement learning: multi-turn PPO against a verifier, by hand.

Paper: arXiv 2501.17161, sections 3 and 5, appendix C. The model plays whole episodes (answer,
verifier message, answer, ...): a hand of up to five tries, or a walk of up to two tries at each of
about 16 positions. One TRY is one time step: one answer, one reward, one value, one advantage. An
ACTION, for the ratio, is one token of the answer (the default) or the whole answer (the paper's).

  1. collect: play B episodes with the current policy (evaluate.play)
  2. score: one forward pass over each conversation gives log p of every sampled token and, at the
     last prompt token before each answer, the value V of that state
  3. advantages: GAE over the tries of an episode, through all its conversations, not past its end
  4. update: several epochs of minibatches on the clipped policy loss + clipped value loss
  5. the loop: 1 to 4 again and again; log, save, now and then evaluate (--ood: the other rule, too)
  6. checks of a fresh batch, and a look at one conversation, token by token
  7. the start, and the command line

Symbols and shapes (eq. 1 to 7: see README, where N is parameters):
  B episodes   K tries of an episode   N answer tokens   T tokens   H hidden size
  V value: the rewards that a critic expects from here on    A advantage: how much better it went
  r reward of a try    R = A + V return (target of V)    ratio = pi_new(action) / pi_old(action)

    python rl.py --task gp-l --ood             the main job: 3 to 7 minutes on two cores
    python rl.py --task gp-l --inspect         one conversation, token by token

Read before: evaluate.py. Then: tests/test_rl.py, where every equation here is checked by hand.
"""

import argparse
import math
import pathlib
import shlex
import shutil
import sys
import time

import sft                  # before torch: it says how torch's threads are to wait
import torch
from tqdm import tqdm

import gp_env
import virl_env
from evaluate import CURVE_CELLS, cut, evaluate, new_game, play, show
from sft import (Problem, batch, by_length, checkpoints, load_state, pictured, save_checkpoint,
                 task_parameters, token_logprobs, trunk)

VALUE_COEF = 0.5            # weight of the value loss, beside the 1/2 in eq. 5 (paper: the same)
MAX_GRAD_NORM = 1.0         # of the policy and of the critic, each
WARMUP = 16                 # optimiser steps over which both rates rise (paper: none)
EVAL_EVERY = 7              # updates between short evaluations

# -------- 1. Collect


def seeded(*numbers):
    """A torch generator from several numbers, e.g. (seed, update): no state to save or restore."""
    mixed = sum(number * (1_000_003 ** i % 2 ** 31) for i, number in enumerate(numbers))
    return torch.Generator().manual_seed(mixed % 2 ** 31)


def collect(backbone, args, update):
    """Play args.episodes training episodes with the current policy. Returns a list of Episode.

    Hands and random draws are a function of (seed, update): a resumed run plays the same games.
    """
    envs = [new_game(args.task, split=args.split, tries=args.tries, **sft.game_options(args))
            for _ in range(args.episodes)]
    seeds = [[1, args.seed, update, i] for i in range(args.episodes)]
    draws = seeded(args.seed, update, 1).initial_seed()
    generator = torch.Generator(backbone.device).manual_seed(draws)
    # all at once, or --sample-batch of them where their keys and values would fill the memory
    size, episodes = args.sample_batch or args.episodes, []
    for start in range(0, args.episodes, size):
        episodes += play(backbone, envs[start:start + size], seeds[start:start + size],
                         args.temperature, args.max_new_tokens, generator)
    return episodes


def conversations(episodes):
    """Episodes -> rows that one forward pass can score. Returns a list of dicts:

    ids    tokens of one whole conversation (one for each hand, or each position of a walk)
    mask   1 on sampled tokens, 0 on prompts and verifier messages: the policy did not choose those
    value_at  for each try, the index of the last token BEFORE its answer. V is read there: a
           baseline must not know the action that it judges
    tries  for each try, (episode, number of the try), to find its reward and advantage
    picture  what the conversation shows, as tensors (sft.encode_picture), or None

    In a walk a new position begins a new conversation, and the number of the try runs on:

        position                1             2        3
        tries                   wrong right   right    wrong wrong
        rows                    (e,0) (e,1)   (e,2)    (e,3) (e,4)

        index      0  1  2   3  4  5   6  7   8  9
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


# -------- 2. Score


def build_value_head(hidden, seed):
    """The critic: an MLP on the policy's own hidden state, (.., H) -> (..,); V is 0 at first."""
    wide, narrow = max(128, hidden // 4), max(64, hidden // 8)
    head = torch.nn.Sequential(torch.nn.Linear(hidden, wide), torch.nn.ReLU(),
                               torch.nn.Linear(wide, narrow), torch.nn.ReLU(),
                               torch.nn.Linear(narrow, 1), torch.nn.Flatten(-2))
    generator = seeded(seed, 2)
    with torch.no_grad():
        for layer in (head[0], head[2], head[4]):
            layer.weight.normal_(0, layer.in_features ** -0.5, generator=generator)
            layer.bias.zero_()
        head[4].weight.zero_()
    return head


def score(backbone, head, rows, temperature, value_trunk=False):
    """One forward pass over a list of conversations (see `conversations`).

    value_trunk: let the gradient of V into the trunk, as the paper does. By default the critic only
    READS the policy's hidden state: let in, it made the trunk's gradient 9 times as long (3.5
    against 0.37, mean of 24 updates, one seed), so that most of a step served the critic.
    Returns (logprobs (N,), entropy (N,), values (number of tries,)), all float32, in row order.
    """
    ids, mask, pictures = batch(backbone, rows)                              # (rows, T) each
    hidden = trunk(backbone, ids, pictures)                                  # (rows, T, H)
    logprobs, entropy = token_logprobs(backbone, hidden, ids, mask, temperature)
    # A causal model's hidden state at position t knows tokens 0..t and nothing later. So the states
    # before ALL answers of a row lie in this one pass, and V of try k cannot peek at answer k.
    at = [(i, before) for i, r in enumerate(rows) for before in r["value_at"]]
    row, before = torch.tensor(at, device=backbone.device).T
    state = hidden[row, before].float()                                      # (tries, H)
    return logprobs, entropy, head(state if value_trunk else state.detach())


@torch.no_grad()
def score_all(backbone, head, rows, temperature, micro_batch):
    """`score` without gradients, any number of rows. Adds the OLD "logprobs" and "values" to each.

    The sampler knew the log-probabilities already. But V needs this pass anyway, and it computes
    the old ones just as the update will compute the new ones: all ratios begin at 1 but for
    rounding. The sampler's serve in `self_check`.
    """
    for part in by_length(rows, micro_batch):
        logprobs, _, values = score(backbone, head, part, temperature)
        logprobs = logprobs.split([sum(r["mask"]) for r in part])
        values = values.split([len(r["tries"]) for r in part])
        for r, p, v in zip(part, logprobs, values):
            r["logprobs"], r["values"] = p, v


# -------- 3. Advantages


def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0):
    """Generalised advantage estimation over the K tries of ONE episode (Schulman et al. 2016).

        delta_k = r_k + gamma * V_{k+1} - V_k                                     (eq. 1)
        A_k     = delta_k + gamma * lambda * A_{k+1}                              (eq. 2)
        R_k     = A_k + V_k                                                       (eq. 3)

    What stands for V_{k+1} at the end is where implementations go wrong:
      terminated  the game is over, no reward can follow: 0
      truncated   it was cut short. By a rule of the game (out of tries: here): 0, too. By a full
                  buffer (not here): `after`, the value of the state that would have come next
      Never the value of another episode.

    rewards, values: (K,) float. Returns (advantages, returns), both (K,). Worked example (gamma
    0.9, lambda 0.95), wrong answer then right:

        k   r    V    delta                        A                                 R
        0  -1   1.0  -1 + 0.9*2.0 - 1.0 = -0.2    -0.2 + 0.855*3.0 = 2.365          3.365
        1   5   2.0   5 + 0      - 2.0 =  3.0      3.0                              5.0
    """
    rewards, values = torch.as_tensor(rewards), torch.as_tensor(values)
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


def normalised(advantages):
    """Advantages (n,) of a whole batch -> mean 0, standard deviation 1 (dividing by n).

    Not of each minibatch (PPO's usual way, Huang et al. 2022, detail 7): the sign of an advantage
    would depend on which other episodes it happened to be shuffled with.
    """
    return (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)


def add_advantages(rows, episodes, gamma, lam):
    """Fill in "advantages" (normalised over the batch) and "returns" of every row, one a try.

    Returns True; False, with advantages of 0, where rewards tell nothing: every one of several
    episodes had the same list, or every try the same reward. Normalised, V's errors would be all.
    """
    # An episode may lie in several rows. What follows the last try at a position is V of the next
    # position, read in ANOTHER row: forgetting the words ends a conversation, not the episode.
    value_of = {t: v for r in rows for t, v in zip(r["tries"], r["values"].tolist())}
    order, advantages, returns = {}, [], []
    for e, episode in enumerate(episodes):
        rewards = [turn.reward for turn in episode.turns]
        values = [value_of[e, k] for k in range(len(rewards))]
        a, r = gae(rewards, values, episode.terminated, episode.truncated, gamma, lam)
        order |= {(e, k): len(order) + k for k in range(len(rewards))}
        advantages.append(a)
        returns.append(r)
    paid = {tuple(turn.reward for turn in episode.turns) for episode in episodes}
    advantages, returns = torch.cat(advantages), torch.cat(returns)                # (tries,) each
    can_learn = len(episodes) == 1 or (len(paid) > 1 and len(set().union(*paid)) > 1)
    advantages = normalised(advantages) if can_learn else torch.zeros_like(advantages)
    for row in rows:
        at = [order[t] for t in row["tries"]]
        row["advantages"] = advantages[at].to(row["values"].device)
        row["returns"] = returns[at].to(row["values"].device)
    return can_learn


def only_right(rows, episodes):
    """Make "advantages" 1 for a right answer, 0 for any other. Returns whether any is right.

    RL without negatives, the critic ignored: SFT on its own right answers (arXiv 2509.04259).
    """
    for row in rows:
        right = [float(episodes[e].turns[k].verdict.correct) for e, k in row["tries"]]
        row["advantages"] = torch.tensor(right, device=row["values"].device)
    return any(row["advantages"].any() for row in rows)


# -------- 4. Update


def policy_loss(logprobs, old_logprobs, advantages, clip):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), summed, as a loss to minimise.

        ratio = exp(logprobs - old_logprobs)
        loss  = - sum( min( ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A ) )   (eq. 4's sum)

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
        loss      = 1/2 sum( max( (V - R)^2, (V_clipped - R)^2 ) )              (eq. 5's sum)

    max is again the pessimistic choice. `returns` were computed with the OLD critic and stay fixed.
    """
    assert values.shape == old_values.shape == returns.shape
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).sum()


def per_answer(token_values, counts):
    """Sum tokens into answers: (N,) and the number of tokens of each answer -> (answers,)."""
    which = torch.repeat_interleave(torch.arange(len(counts), device=token_values.device), counts)
    return token_values.new_zeros(len(counts)).index_add(0, which, token_values)


def answer_lengths(row):
    """Tokens of each answer of a conversation: the ones of its mask up to the next answer."""
    starts = [end + 1 for end in row["value_at"]]
    bounds = starts[1:] + [len(row["mask"])]
    return [sum(row["mask"][a:b]) for a, b in zip(starts, bounds)]


def minibatch_loss(backbone, head, micro, args, tokens, tries):
    """Loss of one micro-batch, as its share of a minibatch with `tokens` tokens and `tries` tries.

    Dividing by the totals of the MINIBATCH makes --micro-batch a dial for memory alone.
    Returns (loss, statistics): this part's shares, which add up to those of the minibatch.
    """
    logprobs, entropy, values = score(backbone, head, micro, args.temperature, args.value_trunk)
    old, advantages, returns, old_values = (torch.cat([r[key] for r in micro]) for key in (
        "logprobs", "advantages", "returns", "values"))
    counts = torch.tensor([n for r in micro for n in answer_lengths(r)], device=logprobs.device)
    if args.ratio == "token":
        # Each token is an action of its own, with its answer's advantage. While all ratios are 1
        # this has the gradient of the other way, but for the factor tries / tokens: the log of a
        # product is the sum of the logs. Later they differ, since here each token is clipped alone.
        actions = tokens
        policy, log_ratio = policy_loss(
            logprobs, old, torch.repeat_interleave(advantages, counts), args.clip)
    else:
        # The paper: the answer is one action. One ratio, the product of ~30 token ratios, leaves
        # the clip range after a far smaller step.
        actions = tries
        policy, log_ratio = policy_loss(per_answer(logprobs, counts), per_answer(old, counts),
                                        advantages, args.clip)
    policy = policy / actions       # a mean over actions; the critic's is one over tries
    critic = value_loss(values, old_values, returns, args.value_clip) / tries
    # No entropy bonus: the released code sets 0.01 and leaves it out of its loss, too.
    return policy + VALUE_COEF * critic, {
        "policy_loss": policy.item(), "value_loss": critic.item(),
        "entropy": entropy.sum().item() / tokens,
        "approx_kl": (log_ratio.exp() - 1 - log_ratio).sum().item() / actions,
        "clipfrac": ((log_ratio.exp() - 1).abs() > args.clip).float().sum().item() / actions}


def rate_scale(update, updates, steps_done, warmup):
    """What the learning rates are multiplied with at one optimiser step, in 0..1.

    Warm-up: Adam's first steps move each weight by about lr, however small its gradient; without it
    the first update moved the policy further than any of the next ten. Times a cosine over the
    updates, as in the paper. steps_done: optimiser steps before this one, in all.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * update / updates))
    return cosine * min(1.0, (steps_done + 1) / warmup)


def ppo_update(backbone, head, optimizer, rows, args, update, learn_policy=True):
    """args.epochs passes over the batch -> mean statistics. Without learn_policy V alone moves."""
    sft.learning_mode(backbone, True)
    # Optimiser steps of all earlier updates; an estimate on walks, whose rows vary in number.
    done = update * args.epochs * math.ceil(len(rows) / args.minibatch)
    log, fed, parts = [], 0, []
    shuffler = seeded(args.seed, update, 3)
    for _ in range(args.epochs):
        # Whole conversations are shuffled, not tries: the tries of one share a forward pass. From
        # the second minibatch on the policy is no longer the one that played, which is what the
        # ratio corrects for, and the clip limits how far that is trusted.
        shuffled = [rows[i] for i in torch.randperm(len(rows), generator=shuffler).tolist()]
        parts += [shuffled[start:start + args.minibatch]
                  for start in range(0, len(rows), args.minibatch)]
    for part in parts:
        tokens, tries = sum(sum(r["mask"]) for r in part), sum(len(r["tries"]) for r in part)
        total = {}
        for micro in by_length(part, args.micro_batch):
            loss, numbers = minibatch_loss(backbone, head, micro, args, tokens, tries)
            loss.backward()
            fed += sum(len(r["ids"]) for r in micro)
            total = {k: total.get(k, 0.0) + v for k, v in numbers.items()}
        policy_weights, critic_weights = (group["params"] for group in optimizer.param_groups)
        # Clipped apart: under one common norm the critic's long gradient would shorten the
        # policy's, by another factor in each minibatch.
        norms = [torch.nn.utils.clip_grad_norm_(group, MAX_GRAD_NORM)
                 for group in (policy_weights, critic_weights)]
        for parameter in policy_weights if not learn_policy else ():
            parameter.grad = None           # Adam would go on by its momentum
        scale = rate_scale(update, args.updates, done + len(log), 1 if args.preset else WARMUP)
        for group, peak in zip(optimizer.param_groups, (args.lr, args.value_lr)):
            group["lr"] = peak * scale
        sft.take_step(optimizer, norms)
        log.append(total | {"grad_norm": norms[0].item(), "value_grad_norm": norms[1].item()})
    mean = {k: sum(x[k] for x in log) / len(log) for k in log[0]}
    return mean | {"tokens_trained": fed}


# -------- 5. The loop


def run(args):
    """The whole of PPO: start, then collect, score, advantages, update, again and again."""
    began = time.time()
    policy = Policy(args)
    if policy.first == 0:
        policy.measure(0, args.eval_hands)
    for update in sft.progress(range(policy.first, args.updates), "PPO update"):
        clock = [time.time()]
        episodes = collect(policy.backbone, args, update)                                   # 1
        clock.append(time.time())
        rows = conversations(episodes)
        score_all(policy.backbone, policy.head, rows, args.temperature, args.micro_batch)   # 2
        can_learn = add_advantages(rows, episodes, args.gamma, args.lam)                    # 3
        if args.advantage == "right":
            can_learn = only_right(rows, episodes)
        if update == policy.first:
            tqdm.write(self_check(rows, episodes, policy.backbone, args.split, args.temperature))
        numbers = ppo_update(policy.backbone, policy.head, policy.optimizer, rows, args,    # 4
                             update, can_learn)
        clock.append(time.time())
        policy.counts["trained"] += numbers["tokens_trained"]                               # 5
        policy.counts["sampled"] += sum(len(row["ids"]) for row in rows)
        row = {"step": update + 1} | summary(rows, episodes) | numbers | policy.compute()
        row |= {"seconds_collect": clock[1] - clock[0], "seconds_update": clock[2] - clock[1]}
        policy.metrics.write(row)
        tqdm.write(one_line(row, can_learn))
        last = update + 1 == args.updates
        if last or (update + 1) % EVAL_EVERY == 0:
            policy.measure(update + 1, args.eval_hands if last else max(1, args.eval_hands // 4))
        # The checkpoint comes last: killed at any moment before, the run goes on from the one of
        # the update before, drops what was written since, and writes the same again.
        policy.save(update + 1)
    print(f"done in {(time.time() - began) / 60:.1f} minutes. Next:\n    python evaluate.py --ood "
          f"--show 2 --model {shlex.quote(f'{policy.folder}/step-{args.updates:06d}')}")


class Policy:
    """What learns, and what a run keeps: model, critic, optimiser, counts of tokens, run folder."""

    def __init__(self, args):
        self.args, self.first = args, 0
        print(f"PPO on {args.task}, seed {args.seed}: {args.updates} updates of {args.episodes} "
              f"episodes, {torch.get_num_threads()} threads")
        start = args.init or make_start(args)
        self.backbone = sft.open_backbone(args, start)
        model = self.backbone.model
        sft.freeze(model, args.freeze)
        args.max_new_tokens = sft.answer_length(self.backbone, args, args.tries)
        hidden = model.config.get_text_config().hidden_size
        self.head = build_value_head(hidden, args.seed).to(self.backbone.device)
        self.optimizer = sft.adamw(
            [{"params": [p for p in model.parameters() if p.requires_grad], "lr": args.lr},
             {"params": list(self.head.parameters()), "lr": args.value_lr}], (0.9, 0.999))
        # through SFT before this run; through PPO's training passes; read by the sampler
        self.counts = {"init": sft.tokens_before(start), "trained": 0, "sampled": 0}
        if args.inspect:
            if (pathlib.Path(start) / "state.pt").exists():
                self.head.load_state_dict(load_state(start).get("head", self.head.state_dict()))
            return
        self.folder = sft.open_run(args.out or f"runs/rl-{args.task}-s{args.seed}", args, "rl")
        saved = checkpoints(self.folder) if args.resume else []
        if saved:
            self.first, path = saved[-1]
            state = load_state(path, model=self.backbone, optimizer=self.optimizer, head=self.head)
            self.counts = state["counts"]
        self.metrics = sft.Metrics(self.folder, self.first if saved else None)
        self.measured = sft.Metrics(self.folder, self.first if saved else None, "eval.jsonl")

    def compute(self):
        """FLOPs so far: by the paper's formula (README eq. 6) and really spent (eq. 7).

        The paper charges 2 N * 6 * D_RL for sampling (V-IRL: 5.1), as if every new token read the
        whole conversation again; a cached sampler reads each token once, and scoring once more.
        """
        size = task_parameters(self.backbone.model, pictured(self.args.task))           # N
        counts, again = self.counts, 5.1 if self.args.task.startswith("virl") else 6
        training = 6 * size * (counts["init"] + counts["trained"])
        return {"flops": training + 2 * size * again * counts["trained"],
                "flops_spent": training + 2 * size * 2 * counts["sampled"]}

    def measure(self, step, hands):
        """Play at temperature 0.6, with the paper's tries, whatever the flags say; log it."""
        args = self.args
        tqdm.write(f"after update {step}, {hands} episodes a cell:")
        cells = CURVE_CELLS[args.task] if args.ood else ["id"]
        # seen hands under the training rule alone: beside held-out ones they show memorising
        games = {"all": cells} if args.split == "all" else {"train": ["id"], args.eval_split: cells}
        results = {}
        for split, cells in games.items():
            results |= evaluate(
                self.backbone, cells, [split], hands, args.max_new_tokens, args.task,
                batch=args.sample_batch or 256, shown=sft.picture_options(args),
                where=sft.places(args))[0]
        self.measured.write({"step": step, "hands": hands} | self.compute() | {"cells": results})
        show(results)

    def save(self, step):
        """Write a checkpoint and keep two: the newest, and one more should it be damaged."""
        save_checkpoint(self.folder / f"step-{step:06d}", self.backbone, {
            "optimizer": self.optimizer.state_dict(), "head": self.head.state_dict(),
            "counts": self.counts, "tokens": self.counts["init"] + self.counts["trained"]})
        for _, path in checkpoints(self.folder)[:-2]:
            shutil.rmtree(path)


def explained_variance(values, returns):
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant. None where Var(R) = 0."""
    left, total = ((x - x.mean()).square().mean() for x in (returns - values, returns))
    return float(1 - left / total) if total > 1e-8 else None


def summary(rows, episodes):
    """What the training episodes of an update looked like."""
    values, returns = (torch.cat([r[key] for r in rows]) for key in ("values", "returns"))
    count, every = len(episodes), [t.verdict for e in episodes for t in e.turns]
    return {"success": sum(e.terminated for e in episodes) / count,
            "per_step": sum(v.correct for v in every) / len(every),
            "first_try": sum(e.turns[0].verdict.correct for e in episodes) / count,
            "reward": sum(t.reward for e in episodes for t in e.turns) / count,
            "tries": sum(len(e.turns) for e in episodes) / count, "cut": cut(episodes),
            "explained_variance": explained_variance(values, returns)}


def one_line(row, can_learn):
    """An aligned line of the metrics of an update."""
    line = (f"update {row['step']:3d}  success {row['success']:6.1%}  per step "
            f"{row['per_step']:6.1%}  reward {row['reward']:6.2f}")
    if not can_learn:
        line += "  nothing to learn from: the critic alone moves"
    explained = math.nan if row["explained_variance"] is None else row["explained_variance"]
    line += (f"  kl {row['approx_kl']:.4f}  clip {row['clipfrac']:5.1%}  ev {explained:5.2f}  "
             f"{row['seconds_collect']:.0f}+{row['seconds_update']:.0f} s")
    return line + (f"  CUT OFF {row['cut']:.1%} of answers" if row["cut"] > 0.02 else "")


# -------- 6. Checks, and a look at one conversation


def complaints(rows, episodes, backbone, split, temperature=0.6):
    """What is wrong with a fresh batch, before anything was learnt from it: a list of sentences."""
    sampled = torch.tensor([p for e in episodes for t in e.turns for p in t.logprobs])
    scored = torch.cat([r["logprobs"] for r in sorted(rows, key=lambda r: r["tries"])]).cpu()
    if len(sampled) != len(scored):
        return [f"{len(sampled)} tokens were sampled, {len(scored)} masked: the loss mask is off"]
    found, gaps = [], (sampled - scored).abs()
    # bf16 rounds differently in batches of other shapes, and a low temperature magnifies that: a
    # few tokens may differ much, but not their mean. Float32: at most 1.7e-4 in 30,000 tokens.
    gap, limit = gaps.mean(), 0.05 / temperature
    if backbone.device.type == "cpu" and backbone.model.dtype == torch.float32:
        gap, limit = gaps.max(), 1e-3 / min(1, temperature)
    if not gap < limit:
        found.append(f"sampler and update disagree on log p by {gap:.2g}: wrong temperature, "
                     "positions, padding side or shift")
    # The hands themselves are asked, not the flags: those would hide a leak in the dealing.
    if split == "train" and not all(in_training(e.env) for e in episodes):
        found.append("a held-out hand or route is among those of training")
    return found


def self_check(rows, episodes, backbone, split, temperature=0.6):
    """Raise Problem with the first of the `complaints`; else return a line that says what holds."""
    found = complaints(rows, episodes, backbone, split, temperature)
    if found:
        raise Problem(f"self-check: {found[0]}")
    return (f"self-check: sampler and update agree on log p of {sum(sum(r['mask']) for r in rows)} "
            "tokens" + ", no held-out hand or route" * (split == "train"))


def in_training(env):
    """Does the hand or route of an episode belong to the training split?"""
    if isinstance(env, virl_env.Navigation):
        return env.route.index in virl_env.split_routes(len(env.atlas), "train")
    return gp_env.split_of(env.hand.cards) == "train"


def inspect(args):
    """Print one conversation token by token, then its episode's tries: what PPO does about it."""
    policy = Policy(args)
    backbone, episodes = policy.backbone, collect(policy.backbone, args, 0)
    rows = conversations(episodes)
    score_all(backbone, policy.head, rows, args.temperature, args.micro_batch)
    add_advantages(rows, episodes, args.gamma, args.lam)
    if args.advantage == "right":
        only_right(rows, episodes)
    print(self_check(rows, episodes, backbone, args.split, args.temperature))
    row = max(rows, key=lambda r: len(r["tries"]))
    print("pos  token                     mask   log p")
    answer = iter(row["logprobs"].tolist())
    for i, (token, m) in enumerate(zip(row["ids"], row["mask"])):
        line = f"{i:3d}  {repr(backbone.tokenizer.decode([token]))[:25]:25s} {m:3d}"
        print(line + (f"  {next(answer):7.3f}" if m else "  V is read" * (i in row["value_at"])))
    e = row["tries"][0][0]
    values, returns, normal = (torch.cat([r[key] for r in rows if r["tries"][0][0] == e]).cpu()
                               for key in ("values", "returns", "advantages"))
    advantages = returns - values                                               # eq. 3
    deltas = advantages - args.gamma * args.lam * torch.cat([advantages[1:], torch.zeros(1)])
    print("try  reward       V   delta       A       R  A as the update uses it")
    for k, turn in enumerate(episodes[e].turns):
        numbers = turn.reward, values[k], deltas[k], advantages[k], returns[k], normal[k]
        print(f"{k:3d}" + "".join(f"  {number:6.2f}" for number in numbers))


# -------- 7. The start, and the command line


def make_start(args):
    """The SFT start, kept in runs/ under a digest of all that decides it. Returns its path."""
    wanted = sft.flags(["--task", args.task] + ["--preset", args.preset] * bool(args.preset))
    for name in ("seed", "model", "split", "routes", "picture_size", "announce", "dtype",
                 "freeze", "ood", "grad_checkpoint", "revise"):
        setattr(wanted, name, getattr(args, name))
    step, digest = sft.start_step(wanted), sft.content_digest(wanted)
    folder = pathlib.Path("runs") / f"start-{args.task}-s{args.seed}-{digest}"
    path = folder / f"step-{step:06d}"
    print(f"SFT start, {step} steps, made once: {path}")
    if not (path / "state.pt").exists():
        backbone = sft.open_backbone(wanted)
        sft.answer_length(backbone, args, args.tries)       # before the work, not after it
        aside = sft.open_run(folder.with_name(f"{folder.name}-{time.time_ns()}"), wanted, "sft")
        sft.run_sft(wanted, aside, step, backbone)
        if not folder.exists():                             # others may have made it, too
            aside.rename(folder)
    return path if (path / "state.pt").exists() else aside / path.name


# A walk (over at its first miss) has about 13 tries in 11 conversations, a hand 3.3 in one: so 64
# walks are as many tries as 256 hands. At twice this rate one seed of three fell below its start.
WALKS = {"tries": virl_env.TRIES, "updates": 10, "episodes": 64, "minibatch": 96, "lr": 5e-5,
         "eval_hands": 48}
DEFAULTS = {"gp-vl": {"updates": 12, "lr": 1e-4}, "virl-l": WALKS, "virl-vl": WALKS}
# --preset paper (appendix C.2, launch scripts): 2,048 tries an update, 1,024 an optimiser step
PAPER = {"updates": 20, "episodes": 500, "tries": 5, "minibatch": 250, "temperature": 0.2,
         "max_new_tokens": 512, "lr": 1e-6, "value_lr": 1e-6, "epochs": 4, "clip": 0.1,
         "value_clip": 0.1, "value_trunk": True, "ratio": "answer", "eval_hands": 234,
         "sample_batch": 64, "micro_batch": 4} | sft.LARGE
PRESETS = {task: dict(PAPER) for task in sft.TASKS}
PRESETS["gp-vl"] |= {"micro_batch": 2, "picture_size": [1200, 1200]}
for walks in ("virl-l", "virl-vl"):
    PRESETS[walks] |= {"updates": 15, "episodes": 160, "tries": 2, "minibatch": 880,
                       "eval_hands": 48}
PRESETS["virl-vl"] |= {"lr": 1e-7, "value_lr": 1e-7, "micro_batch": 2, "picture_size": [1200, 1200]}


def flags(argv=None):
    """The command line of stage 2 as a Namespace; argv: a list of words, None for the shell's."""
    parser = argparse.ArgumentParser(description="Multi-turn PPO against a verifier.")
    sft.common_flags(parser)
    sft.training_flags(parser)
    add = parser.add_argument_group("PPO").add_argument
    add("--init", help="checkpoint to start from (default: make the SFT start)")
    for name, kind, default, text in (
            ("updates", int, 7, "PPO updates (paper: 20; V-IRL: 15)"),
            ("episodes", int, 256, "episodes an update (paper: about 500, as 2,048 tries)"),
            ("tries", int, gp_env.TRIES, "answers a hand, or a position (paper: 5; V-IRL: 2)"),
            ("temperature", float, 0.6, "of sampling and of the ratio (paper: 0.2)"),
            ("lr", float, 3e-4, "peak learning rate of the policy (paper: 1e-6 at 11B)"),
            ("value-lr", float, 3e-3, "learning rate of the value head (paper: the same as --lr)"),
            ("epochs", int, 2, "passes over the batch an update (paper: 4)"),
            ("minibatch", int, 32, "conversations an optimiser step (paper: 1,024 tries)"),
            ("micro-batch", int, 8, "conversations in memory at once; does not change the result"),
            ("sample-batch", int, 0, "episodes played at once, 0 = all: memory; changes the draws"),
            ("clip", float, 0.2, "clip range of the ratio (paper: 0.1)"),
            ("value-clip", float, 1.0, "clip range of the value, in units of reward (paper: 0.1)"),
            ("gamma", float, 0.9, "discount for each try (paper: 0.9)"),
            ("lam", float, 0.95, "lambda of GAE (paper: 0.95)"),
            ("eval-hands", int, 200, "hands or walks a cell at both ends; between, a quarter")):
        key = name.replace("-", "_")
        others = [f", {task} {its[key]}" for task, its in DEFAULTS.items() if key in its]
        add(f"--{name}", type=kind, default=default, help=f"{text}; {default}{''.join(others)}")
    add("--value-trunk", action=argparse.BooleanOptionalAction, default=False,
        help="let the critic's gradient into the trunk (paper: yes)")
    add("--ratio", choices=("token", "answer"), default="token", help="paper: answer")
    add("--advantage", choices=("gae", "right"), default="gae", help="right: right answers alone")
    add("--eval-split", choices=("test", "val"), default="test", help="val while tuning")
    add("--inspect", action="store_true", help="print one conversation, token by token, and stop")
    args = sft.parse_flags(parser, DEFAULTS, PRESETS, argv)
    if args.inspect and args.resume:
        raise Problem("--inspect looks at one checkpoint: give it as --init, without --resume")
    if args.init and args.revise:
        raise Problem("--init is the start itself: --revise would make another")
    if args.temperature <= 0:
        raise Problem("--temperature must be above 0: PPO needs a policy that explores")
    return args


def main():
    """Stage 2."""
    args = flags()
    inspect(args) if args.inspect else run(args)


if __name__ == "__main__":
    sys.exit(sft.guarded(main))
