"""How far has a policy moved from its start? KL divergence both ways, in nats an answer.

RL's Razor (arXiv 2509.04259) says that forgetting follows KL(start || policy) on the new task, and
that RL forgets less because it moves less. Each way is an average over answers that the FIRST of
the two policies samples, at temperature 1 and to its own first answers only:

    KL(p || q) = E over answers y ~ p of  log p(y) - log q(y),   summed over the tokens of y

  policy || start   large where the policy says what the start would not have said
  start || policy   large where the policy has given up what the start would have said

    python results/distance.py --start runs/start-gp-l-s0-1234abcd/step-000060 --task gp-l \\
        --models runs/rl-gp-l-s0/step-000012 runs/sft-gp-l-s0/step-000630 --out distance.json

Hands are of the validation split; `id` states the training rule, `ood` the other.
"""

import argparse
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # started as a file, Python looks for modules here only

import sft  # noqa: E402

import torch  # noqa: E402

from evaluate import EVALUATION_SEED, cell_environments, play  # noqa: E402
from rl import conversations  # noqa: E402


@torch.no_grad()
def answer_logprobs(backbone, rows):
    """log p of each row's answers under a model, at temperature 1: (rows,) float32."""
    sums = []
    for part in (rows[i:i + 16] for i in range(0, len(rows), 16)):
        ids, mask, pictures = sft.batch(backbone, part)
        hidden = sft.trunk(backbone, ids, pictures)
        logprobs, _ = sft.token_logprobs(backbone, hidden, ids, mask)
        counts = [sum(row["mask"]) for row in part]
        sums += [tokens.sum() for tokens in logprobs.split(counts)]
    return torch.stack(sums)


def first_answers(backbone, cell, args, longest):
    """Rows (rl.conversations) of one answer to each of `--hands` validation hands, sampled at 1."""
    envs, seeds = cell_environments(cell, "val", args.hands, args.task, tries=1,
                                    shown=sft.picture_options(args), where=sft.places(args))
    generator = torch.Generator(backbone.device).manual_seed(EVALUATION_SEED)
    # a walk goes on after a miss: its first position is enough, and is the same for all policies
    rows = conversations(play(backbone, envs, seeds, 1.0, longest, generator))
    return [row for row in rows if row["tries"][0][1] == 0]


def divergence(one, other, rows):
    """KL(one || other) from answers that `one` sampled: (mean, its standard error), nats."""
    gaps = answer_logprobs(one, rows) - answer_logprobs(other, rows)
    return gaps.mean().item(), (gaps.std() / len(gaps) ** 0.5).item()


def main():
    """Measure the models that the command line names against one start."""
    parser = argparse.ArgumentParser(description="KL between policies and their start, both ways.")
    sft.common_flags(parser)
    parser.add_argument("--start", required=True, help="the checkpoint that all arms left from")
    parser.add_argument("--models", nargs="+", required=True, help="checkpoints to measure")
    parser.add_argument("--hands", type=int, default=256, help="answers a cell (default 256)")
    args = sft.parse_flags(parser, {}, {})
    if args.out:
        open(args.out, "a").close()         # a path that fails, fails now
    start, found = sft.open_backbone(args, args.start), []
    longest = sft.answer_length(start, args)
    asked = {cell: first_answers(start, cell, args, longest)
             for cell in ("id", "ood")}
    for name in args.models:
        policy, row = sft.open_backbone(args, name), {"model": str(name), "hands": args.hands}
        for cell, rows in asked.items():
            own = first_answers(policy, cell, args, longest)
            row |= {f"{cell} policy||start": divergence(policy, start, own),
                    f"{cell} start||policy": divergence(start, policy, rows)}
        found.append(row)
        if args.out:                        # before a pipe can close
            pathlib.Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
        print(name, *(f"{key} {value[0]:.2f} +-{1.96 * value[1]:.2f}"
                      for key, value in row.items() if "||" in key), sep="   ", flush=True)


if __name__ == "__main__":
    sys.exit(sft.guarded(main))
