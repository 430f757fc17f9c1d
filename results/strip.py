"""How does each checkpoint of a run read one face card? p of the stated number, and of 10.

The prompt says J = 11, Q = 12, K = 13. A line for each checkpoint, about the first face card of
the hand, JSON in --out. p(11), say, and p(10): the expert's answer, cut behind this number, once
as stated, once with 10 there; p is the product, at temperature 1, over the tokens in which the two
texts differ. Where digits are tokens both share a "1": p is then the second digit's.

    python results/strip.py --run runs/rival "10 A 2 J"                         the jack
    python results/strip.py --run runs/rival "6 Q J A" --steps 100 200 --out strip.jsonl
    python results/strip.py --model runs/rival/step-000570 "10 A 2 J"           one model
"""

import argparse
import json
import math
import os
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # started as a file, Python looks for modules here only

import gp_env  # noqa: E402
import sft  # noqa: E402
from evaluate import Episode, Reader, chosen_checkpoints, sample_answers  # noqa: E402


def read_hand(text):
    """The hand that words such as "10 A 2 J" name, under the new rule. Raises sft.Problem."""
    hand = gp_env.Hand(tuple(text.upper().replace(",", " ").split()), (), gp_env.RULES["face"])
    cards = set(hand.cards)
    if (len(hand.cards) != 4 or cards - set(gp_env.RANKS) or not cards & {"J", "Q", "K"}
            or not gp_env.solvable(hand.numbers)):      # nothing right could be answered
        raise sft.Problem(f"HAND {text}: give four cards that make 24, a J, Q or K among them")
    return hand


def read_number(backbone, hand, before, numbers):
    """p of each of two numbers behind the numbers `before`, in the expert's answer to the hand."""
    told = sft.user_ids(backbone, gp_env.prompt(hand), first=True)
    texts = [gp_env.answer(hand, [*before, last], "").rpartition("]")[0] for last in numbers]
    said = [told + sft.answer_ids(backbone, text)[:-1] for text in texts]
    same = next(i for i, (one, other) in enumerate(zip(*said)) if one != other)
    rows = [{"ids": ids, "mask": [0] * same + [1] * (len(ids) - same), "picture": None}
            for ids in said]
    return [math.exp(-sum(row["mask"]) * sft.sft_loss(backbone, [row], 1, backward=False)[0])
            for row in rows]                            # the loss is a mean over tokens


def greedy_answer(backbone, hand, longest):
    """The model's likeliest answer to the hand, as text."""
    told = sft.user_ids(backbone, gp_env.prompt(hand), first=True)
    talk = Episode(None, "", pending=told)
    (ids, _), = sample_answers(Reader(backbone, 1), [talk], 0.0, longest, None)
    return backbone.tokenizer.decode([i for i in ids if i not in backbone.end_ids])


def main():
    """Show how the checkpoints of a run, or one model, read the hand of the command line."""
    parser = argparse.ArgumentParser(description="How checkpoints read the first face card.")
    sft.common_flags(parser)
    parser.add_argument("hand", metavar="HAND", type=read_hand, help='four cards: "10 A 2 J"')
    parser.add_argument("--run", help="a run folder of sft.py: all its checkpoints")
    parser.add_argument("--steps", type=int, nargs="+",
                        help="with --run, and behind HAND: only these checkpoints")
    args = sft.parse_flags(parser, {}, {})
    if args.task != "gp-l":
        raise sft.Problem(f"{args.run or args.model}: --task {args.task}, and a strip is of gp-l")
    if args.steps and not args.run:
        raise sft.Problem("--steps are checkpoints of a --run")
    models = chosen_checkpoints(args) if args.run else {None: args.model}
    first = next(at for at, card in enumerate(args.hand.cards) if card in ("J", "Q", "K"))
    *before, stated = args.hand.numbers[:first + 1]
    log = open(args.out or os.devnull, "w", buffering=1)                # a line at a time
    print(f"  step  p({stated})  p(10)  greedy answer, or its end")
    for step, path in models.items():
        backbone = sft.open_backbone(args, path)
        p = read_number(backbone, args.hand, before, (stated, 10))
        text = greedy_answer(backbone, args.hand, sft.answer_length(backbone, args))
        row = {"step": step, "stated": stated, "p_stated": p[0], "p_ten": p[1], "text": text}
        log.write(json.dumps(row) + "\n")
        print(f"{step or '-':>6}  {p[0]:5.3f}  {p[1]:5.3f}  {repr(text)[-70:]}")


if __name__ == "__main__":
    sys.exit(sft.guarded(main))
