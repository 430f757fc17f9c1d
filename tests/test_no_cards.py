"""results/no_cards.py: SFT whose loss leaves out what is seen."""

import importlib.util
import pathlib

import numpy as np

import gp_env
import sft
import virl_env

ROOT = pathlib.Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("no_cards", ROOT / "results" / "no_cards.py")
no_cards = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(no_cards)


def test_the_loss_begins_with_the_second_field():
    """The cards are taught all the same, or more than they are left out."""
    backbone = sft.load_backbone(sft.DEFAULT_MODEL["gp-l"])
    for revise in (0.0, 1.0):
        talk = gp_env.expert_conversation(np.random.default_rng(0), revise=revise)
        whole, row = sft.encode(backbone, talk), no_cards.encode_without_cards(backbone, talk)
        assert row["ids"] == whole["ids"]
        taught = backbone.tokenizer.decode([i for i, m in zip(row["ids"], row["mask"]) if m])
        assert taught.startswith('number": [') and taught.endswith(backbone.tokenizer.decode(
            backbone.end_ids[:1]))
        before = [a - b for a, b in zip(whole["mask"], row["mask"])]
        assert set(before) == {0, 1} and '"cards": ["' in backbone.tokenizer.decode(
            [i for i, m in zip(row["ids"], before) if m])


def test_in_a_walk_it_is_the_observation():
    """The landmark is taught all the same, or the instruction is not."""
    backbone = sft.load_backbone(sft.DEFAULT_MODEL["virl-l"])
    talk = virl_env.expert_conversation(np.random.default_rng(0), where=sft.TRAINING_CITY)
    row = no_cards.encode_without_cards(backbone, talk)
    taught = backbone.tokenizer.decode([i for i, m in zip(row["ids"], row["mask"]) if m])
    assert taught.startswith('current instruction": "') and "observation" not in taught
