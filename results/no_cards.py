"""SFT whose loss leaves out what is SEEN: does it read the cards because it is told them?

The paper's Fig. 8 has recognition FALL as SFT goes on. Here it rises, and each example spells the
cards (a walk: the landmark) out, so that SFT learns them from its labels; RL has a reward of -1.5
for a misread one. This is sft.py with one function changed: the answer is read whole, and learnt
from its second field on.

    python results/no_cards.py --task gp-vl --ood --model START --lr 1e-4 --steps 328 \\
        --out runs/no-cards
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import sft  # noqa: E402

encode = sft.encode


def encode_without_cards(backbone, conversation):
    """`sft.encode` with mask 0 on an answer's first field: `cards`, or `current observation`.

        answer   {"cards": ["6", "Q", "J", "A"], "number": [6, 10, 10, 1], "formula": ...} <end>
        mask     0000000000000000000000000000000000000001111111111111111111111111111111111 1
    """
    row = encode(backbone, conversation)
    said = ""           # the answer up to here; the name of its second field begins there
    for i, learnt in enumerate(row["mask"]):
        if learnt:
            said += backbone.tokenizer.decode(row["ids"][i])
            if '"number' in said or '"current instruction' in said:
                break
        row["mask"][i] = 0
    return row


if __name__ == "__main__":
    sft.encode = encode_without_cards
    sys.exit(sft.guarded(sft.main))
