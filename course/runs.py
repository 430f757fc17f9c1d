"""One function, one example, one outcome.

An example is plain data (what JSON can hold); RUNS[function](f, example) makes the arguments, calls
f and returns plain data again: numbers, lists, words. So a list, a tuple, a tensor and an array of
the same numbers have the same outcome, and outcomes can be kept in a file, sent through a pipe and
compared by one function (`same`). Where a gradient matters it is part of the outcome; so is an
argument that was changed.

Examples never need another function that the hand-out leaves empty: `stand_in` puts something that
serves these examples, and nothing else, in its place.

Read next: bench.py, which gives every function a process of its own.
"""

import contextlib
import copy
import functools
import importlib
import math
import sys
import types
from decimal import Decimal
from fractions import Fraction

from problems import FILES

TOLERANCE = 1e-4


# ------------------------------------------------------------------------------------------------
# 1. Plain data
# ------------------------------------------------------------------------------------------------


def plain(x):
    """Tensors, arrays, tuples and numbers of any library -> lists, numbers, words."""
    if x is None or isinstance(x, (str, bool, int, float)):
        return x
    if isinstance(x, (Fraction, Decimal)):
        return float(x)
    if hasattr(x, "tolist"):            # torch and numpy
        return plain((x.detach() if hasattr(x, "detach") else x).tolist())
    if isinstance(x, (list, tuple)):
        return [plain(item) for item in x]
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    return f"a {type(x).__name__}"


def same(yours, expected):
    """Are two outcomes the same? Numbers within 1e-4, relatively where they are above 1.

    {"at most": x} as an expectation asks for a number that is not above x.
    """
    if isinstance(expected, dict) and set(expected) == {"at most"}:
        return isinstance(yours, (int, float)) and yours <= expected["at most"] + 1e-9
    if isinstance(expected, dict):
        return (isinstance(yours, dict) and yours.keys() == expected.keys()
                and all(same(yours[key], expected[key]) for key in expected))
    if isinstance(expected, list):
        return (isinstance(yours, list) and len(yours) == len(expected)
                and all(map(same, yours, expected)))
    if isinstance(expected, (int, float)) and isinstance(yours, (int, float)):
        if yours == expected or yours != yours and expected != expected:        # both nan
            return True
        # an integer may have hundreds of digits: no float, and no answer
        return (max(abs(yours), abs(expected)) < 1e300
                and abs(yours - expected) <= TOLERANCE * max(1.0, abs(expected)))
    return type(yours) is type(expected) and yours == expected


# ------------------------------------------------------------------------------------------------
# 2. What examples are played with
# ------------------------------------------------------------------------------------------------

BLANK = set()       # functions that are empty in the modules at hand; bench.py fills it in


def module(name):
    """A module of the repository, imported when it is needed: cards need no torch."""
    return importlib.import_module(name)


def stand_in(name, substitute):
    """Put `substitute` in the place of a function that is empty in a hand-out.

    In every file that took it over by its name, too.
    """
    file, function = name.split(".")
    if name in BLANK:
        module(file)
        for user in FILES:
            if hasattr(sys.modules.get(user), function):
                setattr(sys.modules[user], function, substitute)


@functools.cache
def tiny():
    """A Backbone of 2 layers, width 16 and 24 tokens, whose weights are the same on any machine."""
    torch, sft = module("torch"), module("sft")
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            if weight.dim() > 1:
                wave = torch.arange(weight.numel()).reshape(weight.shape)
                weight.copy_(0.7 * torch.sin(1.7 * wave + i))
    return sft.Backbone(model, None, end_ids=[1], banned=[5], before_first="", before_answer="",
                        before_next="")


def slow_logprobs(backbone, hidden, ids, mask, temperature=1.0):
    """What token_logprobs gives, from one forward pass for each token: slow, but hard to get wrong.

    It reads the tokens again; of `hidden` it asks only that it is what `trunk` gives.
    """
    torch, found = module("torch"), []
    if hidden.requires_grad != torch.is_grad_enabled():
        raise ValueError("log p has to learn through hidden")
    states = backbone.model.base_model(input_ids=ids).last_hidden_state
    for mine, right, marks in zip(hidden, states, mask):
        read = int(marks.nonzero().max()) + 1
        if mine.shape != right.shape or not torch.allclose(mine[:read], right[:read], atol=1e-4):
            raise ValueError("hidden has to be what trunk gives: a state for each of ids")
    vocabulary = backbone.model.get_output_embeddings().weight.shape[0]
    allowed = [v for v in range(vocabulary) if v not in backbone.banned]
    for row, marks in zip(ids, mask):
        for t in marks.nonzero()[:, 0].tolist():
            said = backbone.model(row[None, :t]).logits[0, -1, allowed].float()
            choice = torch.distributions.Categorical(logits=said / temperature)
            found.append((choice.log_prob(torch.tensor(allowed.index(int(row[t])))),
                          choice.entropy()))
    logprobs, entropy = zip(*found)
    return torch.stack(logprobs), torch.stack(entropy)


def gradient_norm(parameters):
    """Length of the gradient of all parameters together; 0 where none was made."""
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))


@contextlib.contextmanager
def watched(file):
    """Pictures that reach `trunk` in a file, in a list: a forward pass without them is blind."""
    kept, shown = module("sft").trunk, []

    def trunk(backbone, ids, pictures=None):
        shown.extend(plain(picture) for picture in pictures or [])
        return kept(backbone, ids)

    module(file).trunk = trunk
    try:
        yield shown
    finally:
        module(file).trunk = kept


def forget_gradients(backbone):
    """No gradient is left from an example before."""
    backbone.model.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------------------
# 3. The verifier and the cards
# ------------------------------------------------------------------------------------------------


def run_compare(f, x):
    """Three sets of numbers, in any order."""
    used, numbers = list(x["used"]), list(x["numbers"])
    foreign, overused, missing = f(used, numbers)
    return {"foreign": sorted(set(foreign)), "overused": sorted(set(overused)),
            "missing": sorted(set(missing)),
            "arguments changed": [used, numbers] != [x["used"], x["numbers"]]}


def run_verify_gp(f, x):
    """Kind, reward and what was read; not the words."""
    def parsed(text):
        """parse_formula for the formulas of this example."""
        verifier = module("verifier")
        value, numbers, right = x["parsed"].get(text.strip()) or (None, None, None)
        if value is None:
            raise verifier.IllegalFormula("?", "character")
        return Fraction(value), list(numbers), right

    stand_in("verifier.parse_formula", parsed)
    verdict = f(x["text"], list(x["cards"]), list(x["numbers"]), x["target"], x["picture"])
    return {"kind": verdict.kind, "reward": plain(verdict.reward),
            "correct": bool(verdict.correct), "cards right": bool(verdict.cards_right),
            "numbers right": bool(verdict.numbers_right)}


def run_parse_formula(f, x):
    """Value, numbers and right side; or "illegal", whatever the words. Floats are no fractions."""
    try:
        value, numbers, right = f(x["text"])
    except module("verifier").IllegalFormula:
        return "illegal"
    if not isinstance(value, (int, Fraction)):
        return f"a {type(value).__name__}, which is not exact"
    return {"value": str(Fraction(value)), "numbers": plain(list(numbers)), "right": plain(right)}


def run_verify_virl(f, x):
    """The reward alone: names of kinds and wording are free."""
    verdict = f(x["text"], x["action"], x["observation"], list(x["words"]))
    return {"reward": plain(verdict.reward), "correct": bool(verdict.correct)}


def run_split_of(f, x):
    """The name of a split."""
    return plain(f(tuple(x["cards"])))


# ------------------------------------------------------------------------------------------------
# 4. Tokens and log-probabilities
# ------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer: one id a letter, but "><" and "==" are one token each, as merges are."""

    def __call__(self, text, add_special_tokens=False, **_):
        ids = [ord(letter) for letter in text.replace("><", "\x07").replace("==", "\x08")]
        return {"input_ids": [0] * add_special_tokens + ids}


def run_encode(f, x):
    """ids, mask and what became of a picture."""
    sft = module("sft")
    backbone = sft.Backbone(None, Letters(), end_ids=[1, 2], banned=[], before_first="<s><u>",
                            before_answer="<a>", before_next="<u>")
    sft.encode_picture = lambda backbone, text, image: (
        [3, 3, *Letters()(text + "<a>")["input_ids"]], {"pixels": [len(image)]})
    talk = copy.deepcopy(x["conversation"])
    row = f(backbone, talk)
    return {"ids": plain(row["ids"]), "mask": plain(row["mask"]), "picture": plain(row["picture"]),
            "arguments changed": talk != x["conversation"]}


def run_token_logprobs(f, x):
    """log p, entropy, and where the gradient of log p arrives."""
    torch, backbone = module("torch"), copy.copy(tiny())
    backbone.banned = x["banned"]
    hidden = torch.tensor(x["hidden"], requires_grad=True)
    ids, mask = torch.tensor(x["ids"]), torch.tensor(x["mask"])
    logprobs, entropy = f(backbone, hidden, ids, mask, x["temperature"])
    (logprobs.sum() + entropy.sum()).backward()
    return {"logprobs": plain(logprobs), "entropy": plain(entropy),
            "gradient of each position": plain(hidden.grad.norm(dim=-1)),
            "arguments changed": [ids.tolist(), mask.tolist()] != [x["ids"], x["mask"]]}


def run_sft_loss(f, x):
    """Loss, tokens fed, and the gradient that is left in the weights."""
    stand_in("sft.token_logprobs", slow_logprobs)
    backbone = tiny()
    forget_gradients(backbone)
    rows = [{"ids": list(ids), "mask": list(mask),
             "picture": {"pixels": [i]} if x.get("pictures") else None}
            for i, (ids, mask) in enumerate(zip(x["ids"], x["mask"]))]
    with watched("sft") as shown:
        loss, fed = f(backbone, rows, x["micro_batch"], x["backward"])
    return {"loss": plain(loss), "tokens fed": plain(fed),
            "pictures seen": sorted(shown, key=str),
            "gradient": gradient_norm(backbone.model.parameters()),
            "arguments changed": [row["ids"] for row in rows] != x["ids"]}


def run_draw(f, x):
    """Are tokens as frequent as they should be, is what is said of them true, who rolled the dice?

    All rows have the same logits, so that tokens can be counted; the example knows log p of each.
    """
    torch, count = module("torch"), x["count"]
    logits, right = torch.tensor([x["logits"]] * count), torch.tensor(x["logprobs"])
    before = torch.get_rng_state()
    generators = [torch.Generator().manual_seed(x["seed"]) for _ in range(2)]
    (token, said), (again, _) = (f(logits, x["temperature"], one) for one in generators)
    more, _ = f(logits, x["temperature"], generators[0])
    sure = torch.eye(len(right)) * 99       # row i: token i, and no other
    own, _ = f(sure, x["temperature"], generators[0])
    token = torch.as_tensor(token).reshape(count)
    said = torch.as_tensor(said).reshape(count)
    share, expected = token.bincount(minlength=len(right)) / count, right.exp()
    error, rare = (said - right[token]).abs().max(), 2      # drawn twice, no token is a surprise
    if x["temperature"] == 0:           # the likeliest token always; its log p is anybody's
        expected, error, rare = torch.eye(len(right))[right.argmax()], 0.0, 0
    surprise = (share - expected).abs() - rare / count
    surprise /= (expected * (1 - expected) / count + 1e-9).sqrt()
    return {"largest error of the log p that is returned": plain(error),
            "tokens are as frequent as their p": bool((surprise < 5).all()),
            "each row follows its own logits":
                plain(torch.as_tensor(own).reshape(-1)) == list(range(len(right))),
            "the same generator draws the same": plain(token) == plain(again.reshape(count)),
            "the generator goes on": (plain(token) != plain(more.reshape(count))
                                      or x["temperature"] == 0),
            "the global generator is left alone": torch.equal(before, torch.get_rng_state())}


# ------------------------------------------------------------------------------------------------
# 5. Episodes, rows and advantages
# ------------------------------------------------------------------------------------------------


def made_turn(turn):
    """A try as the functions of rl.py read it, from its data."""
    blank = {"prompt_ids": [0], "answer_ids": [0], "logprobs": [0.0], "text": "", "reward": 0.0,
             "message": "", "verdict": None, "new_conversation": False, "picture": None}
    return types.SimpleNamespace(**blank | copy.deepcopy(turn))


def made_episode(episode, env=None):
    """An episode from its data: {"turns": [...], "terminated": ...}."""
    ended = episode.get("terminated", True)
    return types.SimpleNamespace(env=env, prompt="", terminated=ended, truncated=not ended,
                                 turns=[made_turn(turn) for turn in episode["turns"]])


def run_conversations(f, x):
    """The rows, in the order of their first tries, and whether the episodes stayed as they were."""
    episodes = [made_episode(episode) for episode in x["episodes"]]
    rows = f(episodes)
    keys = ("ids", "mask", "value_at", "tries", "picture")
    found = sorted(({key: plain(row[key]) for key in keys} for row in rows),
                   key=lambda row: row["tries"])
    untouched = [made_episode(episode) for episode in x["episodes"]]
    return {"rows": found, "arguments changed": episodes != untouched}


def run_score(f, x):
    """What one pass says, and how far the gradient of V reaches."""
    torch, backbone = module("torch"), tiny()
    stand_in("sft.token_logprobs", slow_logprobs)
    forget_gradients(backbone)
    line = torch.nn.Linear(16, 1)
    with torch.no_grad():
        line.weight.copy_(torch.sin(torch.arange(16.0))[None])
        line.bias.fill_(0.3)
    head = torch.nn.Sequential(line, torch.nn.Flatten(-2))
    rows = copy.deepcopy(x["rows"])
    with watched("rl") as shown:
        logprobs, entropy, values = f(backbone, head, rows, x["temperature"], x["value_trunk"])
    outcome = {"logprobs": plain(logprobs), "entropy": plain(entropy), "values": plain(values),
               "pictures seen": shown}
    values.sum().backward(retain_graph=True)
    outcome["gradient of V in the trunk"] = gradient_norm(backbone.model.parameters())
    outcome["gradient of V in its head"] = gradient_norm(head.parameters())
    logprobs.sum().backward()
    outcome["gradient of both in the trunk"] = gradient_norm(backbone.model.parameters())
    return outcome


def run_gae(f, x):
    """Advantages and returns."""
    torch = module("torch")
    rewards, values = torch.tensor(x["rewards"]), torch.tensor(x["values"])
    advantages, returns = f(rewards, values, x["terminated"], not x["terminated"], x["gamma"],
                            x["lam"], x["after"])
    return {"advantages": plain(advantages), "returns": plain(returns),
            "arguments changed": not (same(plain(rewards), x["rewards"])
                                      and same(plain(values), x["values"]))}


def plain_returns(rewards, values, terminated, truncated, gamma, lam, after=0.0):
    """In the place of an empty gae, for lam 1 (A is the discounted sum minus V) and 0 alone."""
    torch = module("torch")
    assert lam in (0, 1), "this stand-in knows lam 0 and 1 only: pass on what you were given"
    if lam == 0:
        values = torch.as_tensor(values)
        sums = torch.as_tensor(rewards) + gamma * torch.cat([values[1:], torch.zeros(1)])
        return sums - values, sums
    sums = torch.tensor([float(sum(gamma ** i * reward for i, reward in enumerate(rewards[k:])))
                         for k in range(len(rewards))])
    return sums - torch.as_tensor(values), sums


def run_normalised(f, x):
    """The same numbers, even."""
    advantages = module("torch").tensor(x["advantages"])
    result = f(advantages)
    return {"normalised": plain(result),
            "arguments changed": not same(plain(advantages), x["advantages"])}


def run_add_advantages(f, x):
    """"advantages" and "returns" of every row; was it said that nothing can be learnt?"""
    torch = module("torch")
    stand_in("rl.gae", plain_returns)
    episodes = [made_episode(episode) for episode in x["episodes"]]
    rows = [{"tries": [tuple(one) for one in row["tries"]], "values": torch.tensor(row["values"])}
            for row in x["rows"]]
    learns = f(rows, episodes, x["gamma"], x["lam"])
    keys = ("advantages", "returns", "values")
    return {"rows": [{key: plain(row[key]) for key in keys} for row in rows],
            "nothing can be learnt": not learns}


# ------------------------------------------------------------------------------------------------
# 6. Losses and intervals
# ------------------------------------------------------------------------------------------------


def run_policy_loss(f, x):
    """Value and slope of the loss; the log ratios must not keep the graph alive."""
    torch = module("torch")
    new, old = torch.tensor(x["logprobs"], requires_grad=True), torch.tensor(x["old"])
    loss, log_ratio = f(new, old, torch.tensor(x["advantages"]), x["clip"])
    loss.backward()
    return {"loss": plain(loss), "slope": plain(new.grad), "log ratio": plain(log_ratio),
            "the log ratio keeps its graph": bool(log_ratio.requires_grad)}


def run_value_loss(f, x):
    """Value and slope of the loss."""
    torch = module("torch")
    values = torch.tensor(x["values"], requires_grad=True)
    loss = f(values, torch.tensor(x["old"]), torch.tensor(x["returns"]), x["clip"])
    loss.backward()
    return {"loss": plain(loss), "slope": plain(values.grad)}


def run_explained_variance(f, x):
    """One number."""
    torch = module("torch")
    return {"explained variance": plain(f(torch.tensor(x["values"]), torch.tensor(x["returns"])))}


def run_per_answer(f, x):
    """One sum an answer."""
    torch = module("torch")
    return {"sums": plain(f(torch.tensor(x["tokens"]), torch.tensor(x["counts"])))}


def run_wilson(f, x):
    """Both ends."""
    return plain(f(x["hits"], x["count"], *x["z"]))


def run_gain(f, x):
    """The difference and both ends."""
    return plain(f(*x["new"], *x["old"], *x.get("z", [])))


def run_complaints(f, x):
    """Does it complain? What it says is not read."""
    torch, gp_env = module("torch"), module("gp_env")
    stand_in("gp_env.split_of", lambda cards: x["splits"]["".join(sorted(cards))])
    episodes = []
    for episode in x["episodes"]:
        env = gp_env.GeneralPoints(split=x["split"])
        env.hand = gp_env.Hand(tuple(episode["cards"]), ("spades",) * 4, (10, 10, 10))
        episodes.append(made_episode(episode, env))
    rows = [{"ids": list(row["ids"]), "mask": list(row["mask"]), "value_at": list(row["value_at"]),
             "tries": [tuple(one) for one in row["tries"]], "picture": None,
             "logprobs": torch.tensor(row["logprobs"]), "values": torch.zeros(len(row["tries"]))}
            for row in x["rows"]]
    model = types.SimpleNamespace(dtype=getattr(torch, x["dtype"]))
    backbone = types.SimpleNamespace(device=torch.device("cpu"), model=model, end_ids=[9])
    return {"complains": len(list(f(rows, episodes, backbone, x["split"], x["temperature"]))) > 0}


RUNS = {"verifier.compare": run_compare, "verifier.verify_gp": run_verify_gp,
        "verifier.parse_formula": run_parse_formula, "verifier.verify_virl": run_verify_virl,
        "gp_env.split_of": run_split_of, "sft.encode": run_encode,
        "sft.token_logprobs": run_token_logprobs, "sft.sft_loss": run_sft_loss,
        "evaluate.draw": run_draw, "rl.conversations": run_conversations, "rl.score": run_score,
        "rl.gae": run_gae, "rl.normalised": run_normalised,
        "rl.add_advantages": run_add_advantages, "rl.policy_loss": run_policy_loss,
        "rl.value_loss": run_value_loss, "rl.explained_variance": run_explained_variance,
        "rl.per_answer": run_per_answer, "evaluate.wilson": run_wilson, "evaluate.gain": run_gain,
        "rl.complaints": run_complaints}
