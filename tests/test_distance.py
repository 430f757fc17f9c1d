"""results/distance.py: KL divergence between a policy and its start, estimated from answers."""

import copy
import importlib.util
import pathlib

import numpy as np
import pytest
import torch

import evaluate
import gp_env
import sft

ROOT = pathlib.Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("distance", ROOT / "results" / "distance.py")
distance = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(distance)


@pytest.fixture
def rows(tiny):
    """Six expert answers of different lengths."""
    rng = np.random.default_rng(0)
    return [sft.encode(tiny, gp_env.expert_conversation(rng)) for _ in range(6)]


def test_the_logprob_of_an_answer_is_the_sum_of_its_tokens(tiny, rows):
    """Prompt tokens are counted, or answers of a batch get each other's tokens."""
    found = distance.answer_logprobs(tiny, rows)
    for row, total in zip(rows, found):
        ids = torch.tensor([row["ids"]])
        with torch.no_grad():
            logprobs = tiny.model(ids).logits[0].float()
        logprobs = logprobs.index_fill(1, torch.tensor(tiny.banned, dtype=torch.long), -torch.inf)
        logprobs = torch.log_softmax(logprobs, -1)
        by_hand = sum(logprobs[t - 1, row["ids"][t]] for t in range(1, len(row["ids"]))
                      if row["mask"][t])
        assert total.item() == pytest.approx(by_hand.item(), abs=1e-3)


def test_divergence_is_zero_from_itself_and_has_the_sign_of_the_better_model(tiny, rows):
    """The two models are swapped: what `one` sampled would look likelier under the other."""
    assert distance.divergence(tiny, tiny, rows) == (0.0, 0.0)
    args = evaluate.flags(["--hands", "8"])
    sampled = distance.first_answers(tiny, "id", args, 12)
    assert len(sampled) == 8 and all(len(row["value_at"]) == 1 for row in sampled)
    other = sft.wrap_backbone(copy.deepcopy(tiny.model), tiny.tokenizer)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(0.5)
    value, error = distance.divergence(tiny, other, sampled)
    assert value > 2 * error > 0
