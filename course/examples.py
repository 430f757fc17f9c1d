"""Examples: what each function is called with. Plain data, made from a generator of chance alone.

The same makers serve the public examples (seed "public") and the hidden ones of a grader (a secret
seed). They stay with the instructor: a maker knows which answers hurt. Two of them ask the
repository itself: what a formula is worth (`verify_gp`), whose split a hand is (`complaints`).

MAKERS[function](rng) returns a list of examples. rng: random.Random.
Read next: mutants.py.
"""

import importlib
import json
import math
import pathlib
import random
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
HONEST = -1.5       # the least that an honest guess on a walk earns
RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")


def make(function, seed):
    """The examples of a function; another seed gives others."""
    return MAKERS[function](random.Random(f"{seed}/{function}"))


def expected(function, examples, outcomes):
    """What is asked of a solution: the source's outcomes, but for two problems.

    Silence pays: an answer with one legal action is paid as it was, any other one no more than the
    least of honest guesses. The self-check: which batch is spoilt is known from how it was made.
    """
    if function == "verifier.verify_virl":
        silent = {"reward": {"at most": HONEST}, "correct": False}
        return [outcome if example["honest"] else silent
                for example, outcome in zip(examples, outcomes)]
    if function == "rl.complaints":
        return [{"complains": example["kind"] in PLANTED} for example in examples]
    return outcomes


def repository_module(name):
    """A module of the repository itself, for what an example must be told of it."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def drawn(rng, count, spread=1.0, digits=3):
    """`count` numbers around 0, short enough to read."""
    return [round(rng.gauss(0, spread), digits) for _ in range(count)]


# ------------------------------------------------------------------------------------------------
# 1. The verifier and the cards
# ------------------------------------------------------------------------------------------------


def hand(rng):
    """(cards, numbers) of four cards; in one hand of three two cards are alike."""
    cards = [rng.choice(RANKS) for _ in range(4)]
    if rng.random() < 0.35:
        cards[3] = cards[rng.randrange(3)]
    court = rng.choice(((10, 10, 10), (11, 12, 13)))
    worth = dict(zip("JQK", court)) | {"A": 1}
    return cards, [worth[card] if card in worth else int(card) for card in cards]


def formula(rng, numbers):
    """A random formula that uses each of the numbers once, in any order."""
    if len(numbers) == 1:
        return str(numbers[0])
    numbers = rng.sample(numbers, len(numbers))
    cut = rng.randrange(1, len(numbers))
    text = formula(rng, numbers[:cut]) + rng.choice("++-**/") + formula(rng, numbers[cut:])
    return f"({text})" if rng.random() < 0.6 else text


def make_compare(rng):
    """Numbers used against numbers dealt, with doubles on both sides."""
    examples = [{"used": [8, 3, 8, 3], "numbers": [8, 3, 8, 3]},
                {"used": [8, 3], "numbers": [8, 3, 8, 3]},
                {"used": [], "numbers": [1, 2, 3, 4]},
                {"used": [1, 2, 3, 4, 4], "numbers": [1, 2, 3, 4]},
                {"used": [5, 5, 5, 5], "numbers": [5, 5, 5, 1]},
                {"used": [11, 2, 2, 30], "numbers": [10, 2, 2, 3]}]
    for _ in range(34):
        _, numbers = hand(rng)
        used = rng.sample(numbers, 4)
        for _ in range(rng.randrange(4)):
            change = rng.choice(("double", "drop", "foreign"))
            if change == "double":
                used.append(rng.choice(numbers))
            elif change == "drop" and used:
                used.pop()
            elif used:
                used[rng.randrange(len(used))] = rng.randrange(1, 30)
        examples.append({"used": used, "numbers": numbers})
    return examples


GP_KINDS = ("right", "right, no right side", "wrong value", "right side lies", "right side wrong",
            "one left out", "one twice", "one foreign", "all four and a foreign one",
            "one for another", "two formulas", "no formula", "illegal", "too long",
            "cards misread", "numbers misread", "all wrong", "loose", "illegal and foreign",
            "right side 0", "no whole number", "same sum", "other double")


def make_verify_gp(rng):
    """69 answers: of each kind three, one of them to a picture."""
    return [gp_answer(rng, GP_KINDS[i % len(GP_KINDS)], i % 3 == 0) for i in range(69)]


def gp_answer(rng, kind, picture):
    """One answer of a kind, to a hand whose target is what the intended formula gives."""
    verifier = repository_module("verifier")
    while True:
        cards, numbers = hand(rng)
        used = list(numbers)
        if kind in ("other double", "cards misread", "numbers misread"):     # 8 8 3 5 for 8 3 3 5
            cards = [*rng.sample(RANKS[:9], 3), ""]
            cards[3] = cards[0]
            numbers = [1 if card == "A" else int(card) for card in cards]
            used = [*numbers[:3], numbers[1]] if kind == "other double" else list(numbers)
        elif kind == "same sum":
            used[0], used[1] = used[0] + 1, used[1] - 1
            if min(used) < 1 or sorted(used) == sorted(numbers):
                continue
        if kind in ("one left out", "all wrong"):
            used.remove(rng.choice(used))
        elif kind == "one twice":
            used.append(rng.choice(used))
        elif kind == "one foreign":
            foreign = rng.choice([n for n in range(1, 20) if n not in numbers])
            used = [*used[1:], foreign]
        elif kind == "all four and a foreign one":
            used.append(rng.choice([n for n in range(1, 20) if n not in numbers]))
        elif kind == "one for another":
            used[rng.randrange(4)] = rng.choice(numbers)
        text = formula(rng, used)
        try:
            value, _, _ = verifier.parse_formula(text)
        except verifier.IllegalFormula:
            continue
        if (value.denominator > 1) == (kind == "no whole number") and 1 <= value <= 99:
            break
    target, said, stated = int(value), list(numbers), list(cards)
    shown = text if kind == "right, no right side" else f"{text}={target}"
    shown = f"{text}=0" if kind == "right side 0" else shown
    if kind in ("wrong value", "right side lies", "all wrong"):
        target += rng.choice((1, 2, 5))
        shown = f"{text}={target}" if kind == "right side lies" else f"{text}={value}"
    elif kind == "right side wrong":
        shown = f"{text}={target + 1}"
    elif kind == "illegal":
        shown = rng.choice((f"{text}+={target}", f"{text})={target}", f"-{text}", f"{text}=", ""))
    elif kind == "illegal and foreign":
        shown = f"{text}+99-"
    if kind == "cards misread":
        stated[3] = stated[1]
    if kind == "all wrong":
        stated[0] = "3" if stated[0] != "3" else "4"
    if kind == "numbers misread":
        said[3] = said[1]
    if kind == "all wrong":
        said[1] += 1
    rng.shuffle(stated)
    fields = [f'"cards": {json.dumps(stated)}', f'"number": {said}', f'"formula": "{shown}"']
    if kind == "two formulas":
        fields.insert(rng.choice((2, 3)), f'"formula": "{formula(rng, numbers)}+1"')
    if kind == "no formula":
        fields.pop()
    answer = "{" + ", ".join(fields) + "}"
    if kind == "loose":
        answer = "I think: " + answer.replace('"', "'") + " is right."
    if kind == "too long":
        answer += " " * 2000
    parsed = {}
    for one in verifier.read_answer(answer)["formula"]:
        try:
            value, used, right = verifier.parse_formula(one)
            parsed[one.strip()] = [str(value), used, right]
        except verifier.IllegalFormula:
            pass
    return {"text": answer, "cards": cards, "numbers": numbers, "target": target,
            "picture": picture, "parsed": parsed}


HOSTILE = (
    "", " ", "24", "(24)", "((24))", "8/(3-8/3)", "8/(3-8/3)=24", "1+2=3", "1+2=4", "1+2=", "=3",
    "1+2=3=3", "3=1+2", "1+2=(3)", "1+2=-3", "10-2-3", "20-(5-3)", "100/5/2", "100/(5/2)", "2*3+4",
    "2+3*4", "2-3+4", "12/4*3", "12/(4*3)", "7-8", "1/3+1/3+1/3", "0", "0*5", "5/0", "8/(3-3)",
    "8/(3-3)*0", "0/(4-4)", "0/7", "-3+5", "+3", "3--2", "3+-2", "3-(-2)", "-(1-2)*24", "2**3",
    "2^3", "7//2", "7%2", "2(3)", "(2)(3)", "2 3", "(2 3)", "1 0+5", "013+1", "00", "0.5*4", "1e3",
    "1_0+2", "0x10", "3!", "sqrt(9)", "abs(3)", "a+1", "٣+1", "３+1", "²+1", "3 × 4", "12÷4",
    "3·4", "5−2", "3x4", "1+2;", "1+2)", "(1+2", "1+2))", "()", "(1+)", "*3", "3*", "1,2", "1.0",
    "True+1", "1 if 1 else 2", "__import__('os').getpid()", "(1).__class__", "9" * 4, "9" * 5,
    "1+" * 60 + "1", "1+" * 120 + "1", "(" * 19 + "1" + ")" * 19, "(" * 20 + "1" + ")" * 20,
    "(" * 21 + "1" + ")" * 21, "(" * 5000, "1" * 5000, "9" * 200, "\t1\n+ 2 ", "1+2 is it",
    "1+2=0", "1+2=03", "1+2=12345", "1+2=٣", "1+2=+3", "1+2=1_0", "1+2.", "{1+2}", "[1+2]",
    "1+2=3.", "24=24", "5*5-1=24", "\x00", "1\x00+2", "<|end|>", "1<2")


def make_parse_formula(rng):
    """Hostile texts, random formulas, and random formulas with one character changed."""
    texts = list(HOSTILE)
    while len(texts) < 130:
        text = formula(rng, [rng.randrange(1, 14) for _ in range(rng.randrange(2, 6))])
        texts.append(text + f"={rng.randrange(30)}" * (rng.random() < 0.3))
    while len(texts) < 155:
        text = list(rng.choice(texts[len(HOSTILE):130]))
        text[rng.randrange(len(text))] = rng.choice(("", "(", ")", "-", "0", "+", "=", " ", "a"))
        texts.append("".join(text))
    return [{"text": text} for text in texts]


COMPASS = ["north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest"]
RELATIVE = ["left", "right", "slightly left", "slightly right"]
PLACES = ("Mill Bank", "Joe's Cafe", "Old Crossing Inn", "Park Hotel")
SILENT = ("", "no idea", "{}", "action:", "forward()", "action: dance()",
          "action: turn_direction(up)", "action: forward() stop()",
          "action: forward(), action: stop()",
          "action: forward()\naction: forward()", "ACT: <right>", "actions are <right>",
          "current observation: <seen>", "action: <right>" + " " * 2000, "action: <right> or so",
          "action: turn_direction()", "action: <illegal>")


def make_verify_virl(rng):
    """Answers at positions of a walk: with one legal action (a guess), and without (silence)."""
    examples = []
    for i in range(72):
        words = list(rng.choice((COMPASS, RELATIVE)))
        right = rng.choice(["forward()", "stop()"] + [f"turn_direction({w})" for w in words] * 2)
        places = rng.sample(PLACES, rng.randrange(3))
        seen = [f"{place} is on your {rng.choice(('left', 'right', 'front'))}" for place in places]
        crossing = rng.random() < 0.5
        told = "; ".join(seen + ["you are at an intersection"] * crossing) or "no landmark in sight"
        illegal = "turn_direction(" + (RELATIVE if words == COMPASS else COMPASS)[0] + ")"
        if i % 2:
            text = SILENT[i // 2 % len(SILENT)]
            if i // 2 >= len(SILENT):       # nothing to misread, and a first guess would be right
                told, right = "no landmark in sight", "forward()" if "forward" in text else right
            for mark, word in (("<right>", right), ("<seen>", told), ("<illegal>", illegal)):
                text = text.replace(mark, word)
            honest = False
        else:
            legal = ["forward()", "stop()"] + [f"turn_direction({word})" for word in words]
            action = right if i % 6 == 0 else rng.choice([one for one in legal if one != right])
            claim = told
            if i % 4 == 0:
                claim = rng.choice(("you are at an intersection", "no landmark in sight",
                                    "Red Tower is on your left", told.replace("left", "right")))
            text = json.dumps({"current observation": claim, "action": action})
            text = f"action: {action}" if i % 14 == 0 else text
            honest = True
        examples.append({"text": text, "action": right, "observation": told, "words": words,
                         "honest": honest})
    place = rng.choice(PLACES)
    for told, claim in (("left", "right"), ("", "left"), ("left", ""), ("", "crossing"),
                        ("crossing", "")):      # a wrong action, and one thing misread
        told, claim = ({"": "no landmark in sight", "crossing": "you are at an intersection"}.get(
            word, f"{place} is on your {word}") for word in (told, claim))
        examples.append({
            "text": json.dumps({"current observation": claim, "action": "forward()"}),
            "action": "stop()", "observation": told, "words": COMPASS, "honest": True})
    return examples


def make_split_of(rng):
    """60 hands; each second one is the one before in another order or with other face cards."""
    examples = []
    for _ in range(30):
        cards = [rng.choice(RANKS) for _ in range(4)]
        swap = {card: rng.choice(("10", "J", "Q", "K")) for card in ("10", "J", "Q", "K")}
        other = [swap.get(card, card) for card in rng.sample(cards, 4)]
        examples += [{"cards": cards}, {"cards": other}]
    return examples


# ------------------------------------------------------------------------------------------------
# 2. Tokens and log-probabilities
# ------------------------------------------------------------------------------------------------


def make_encode(rng):
    """12 talks: one answer, several, mistakes shown and not taught, two with a picture."""
    examples = []
    for i in range(12):
        talk = [{"role": "user", "content": rng.choice(("cards 8 3>", "go>", "4==4>")),
                 "learn": False}]
        if i % 6 == 5:
            talk[0]["image"] = "x" * rng.randrange(1, 9)
        for k in range(i % 3 + 1):
            last = k == i % 3
            said = rng.choice(("<8/(3-8/3)==24>", "<no>", "=1", "<stop()"))
            talk.append({"role": "assistant", "content": said,
                         "learn": last or rng.random() < 0.4})
            if not last:
                talk.append({"role": "user", "content": rng.choice(("wrong=", "again>")),
                             "learn": False})
        if i == 8:
            talk[-1]["learn"] = False
        examples.append({"conversation": talk})
    return examples


def padded_batch(rng, rows, longest):
    """Token ids and masks, padded on the right with 0; two or more answers in a row."""
    ids, mask = [], []
    for i in range(rows):
        length = longest - i * (longest // (2 * rows))
        ids.append([rng.randrange(6, 24) for _ in range(length)] + [0] * (longest - length))
        marks = [0] + [int(rng.random() < 0.5) for _ in range(length - 1)]
        marks[1], marks[length - 1] = 0, 1
        mask.append(marks + [0] * (longest - length))
    return ids, mask


def make_token_logprobs(rng):
    """8 batches, at several temperatures, with and without banned tokens."""
    examples = []
    for i in range(8):
        ids, mask = padded_batch(rng, i % 3 + 1, 7)
        examples.append({
            "hidden": [[drawn(rng, 16) for _ in row] for row in ids], "ids": ids, "mask": mask,
            "temperature": (1.0, 0.6, 2.0, 0.2)[i % 4], "banned": ([], [3], [2, 4])[i % 3]})
    return examples


def ragged(rng, count, shortest, longest):
    """Conversations of unequal length: lists of ids and masks. Some teach one token, some many."""
    ids, mask = [], []
    for _ in range(count):
        length = rng.randrange(shortest, longest)
        start = rng.randrange(2, length)
        ids.append([rng.randrange(6, 24) for _ in range(length)])
        mask.append([0] * start + [1] * (length - start))
    return ids, mask


def make_sft_loss(rng):
    """The same batch cut in micro-batches of 1, 2 and all; another; one without a gradient."""
    examples = []
    for _ in range(2):
        ids, mask = ragged(rng, 5, 4, 14)
        examples += [{"ids": ids, "mask": mask, "micro_batch": size, "backward": True}
                     for size in (1, 2, 64)]
    return examples + [{"ids": ids, "mask": mask, "micro_batch": 2, "backward": False},
                       examples[1] | {"pictures": True}]


def softmax_logs(logits, temperature):
    """log p of each token, in plain Python."""
    scaled = [logit / temperature for logit in logits]
    total = math.log(sum(map(math.exp, scaled)))
    return [x - total for x in scaled]


def make_draw(rng):
    """600 draws each, at five temperatures; temperature 0 takes the likeliest token."""
    examples = []
    for temperature in (1.0, 0.6, 0.3, 2.0, 0.0):
        logits = drawn(rng, 8, 2.5)
        examples.append({"logits": logits, "logprobs": softmax_logs(logits, temperature or 1.0),
                         "temperature": temperature, "count": 20_000 if temperature else 600,
                         "seed": rng.randrange(10 ** 6)})
    return examples


# ------------------------------------------------------------------------------------------------
# 3. Episodes, rows and advantages
# ------------------------------------------------------------------------------------------------


def make_conversations(rng):
    """12 batches: hands (one conversation an episode) and walks (several), some with pictures."""
    examples = []
    for i in range(12):
        episodes = []
        for _ in range(rng.randrange(1, 4)):
            turns = []
            for k in range(rng.randrange(1, 5)):
                new = k == 0 or i % 2 == 1 and rng.random() < 0.6
                turns.append({
                    "prompt_ids": [rng.randrange(10, 90) for _ in range(rng.randrange(1, 5))],
                    "answer_ids": [rng.randrange(10, 90) for _ in range(rng.randrange(4))] + [9],
                    "new_conversation": new,
                    "picture": {"pixels": drawn(rng, 2)} if new and i % 4 == 3 else None})
            episodes.append({"turns": turns})
        examples.append({"episodes": episodes})
    return examples


def make_score(rng):
    """6 passes over rows with one to three tries each."""
    examples = []
    for i in range(6):
        rows = []
        for e in range(3):
            row = {"ids": [], "mask": [], "value_at": [], "tries": [], "picture": None}
            for k in range(rng.randrange(1, 4)):
                prompt, answer = rng.randrange(2, 5), rng.randrange(1, 4)
                row["ids"] += [rng.randrange(6, 24) for _ in range(prompt)]
                row["value_at"].append(len(row["ids"]) - 1)
                row["tries"].append([e, k])
                row["ids"] += [rng.randrange(6, 24) for _ in range(answer)]
                row["mask"] += [0] * prompt + [1] * answer
            rows.append(row)
        for number, row in enumerate(rows):
            row["picture"] = {"pixels": [number]} if i == 4 else None
        examples.append({"rows": rows, "temperature": (0.6, 1.0, 1.5)[i % 3],
                         "value_trunk": i % 2 == 1})
    return examples


def make_gae(rng):
    """40 episodes of one to seven tries, ended in both ways, with and without something after."""
    examples = [{"rewards": [-1.0, 5.0], "values": [1.0, 2.0], "terminated": True, "gamma": 0.9,
                 "lam": 0.95, "after": 0.0}]
    for i in range(39):
        count = i % 7 + 1
        examples.append({
            "rewards": drawn(rng, count, 3), "values": drawn(rng, count, 3),
            "terminated": i % 2 == 0, "gamma": round(rng.uniform(0.5, 1), 2),
            "lam": round(rng.uniform(0.3, 0.97), 2),
            "after": round(rng.gauss(0, 5), 2) if i % 3 else 0.0})
    return examples


def make_normalised(rng):
    """Few and many numbers, equal ones, one alone."""
    examples = [{"advantages": drawn(rng, count, 3)} for count in (2, 3, 5, 8, 13, 40)]
    return examples + [{"advantages": [2.5, 2.5, 2.5]}, {"advantages": [-1.0]}]


def make_add_advantages(rng):
    """10 batches, rows shuffled; an episode lies in one row or in several. lam is 1 or 0.

    In one all tries were paid alike, in one all episodes, in one there is a single episode.
    """
    examples = []
    for i in range(10):
        episodes, rows = [], []
        for e in range(1 if i == 9 else rng.randrange(2, 5)):
            count, solved = rng.randrange(1, 5), rng.random() < 0.5
            paid = [float(rng.choice((-3, -2, -1, 1, 5))) for _ in range(count)]
            if i == 7:
                count, paid = e + 1, [-1.0] * (e + 1)
            elif i == 8:
                count, paid = 2, [-1.0, 5.0]
            elif i == 9:
                count, paid = 3, [-1.0, -1.0, 5.0]
            episodes.append({"terminated": solved, "turns": [{"reward": r} for r in paid]})
            for k in range(count):
                if k == 0 or i % 2 and rng.random() < 0.7:
                    rows.append({"tries": [], "values": []})
                rows[-1]["tries"].append([e, k])
                rows[-1]["values"].append(round(rng.gauss(0, 2), 2))
        rng.shuffle(rows)
        examples.append({"episodes": episodes, "rows": rows, "gamma": (0.9, 0.7)[i % 2],
                         "lam": (1.0, 0.0)[i // 2 % 2]})
    return examples


# ------------------------------------------------------------------------------------------------
# 4. Losses and intervals
# ------------------------------------------------------------------------------------------------


def make_policy_loss(rng):
    """24: both signs on both sides of the clip, alone and together; log p near -150, too."""
    examples = []
    for ratio in (0.5, 0.9, 1.1, 1.5):
        for advantage in (2.0, -2.0):
            old = -round(rng.uniform(1, 8), 2)
            examples.append({"logprobs": [round(old + math.log(ratio), 4)], "old": [old],
                             "advantages": [advantage], "clip": 0.2})
    for i in range(16):
        count = rng.randrange(1, 6)
        old = [-round(rng.uniform(0.1, 6), 3) - 145 * (i % 4 == 3) for _ in range(count)]
        new = [round(x + rng.gauss(0, 0.3), 3) for x in old]
        examples.append({"logprobs": new, "old": old, "advantages": drawn(rng, count, 2),
                         "clip": (0.1, 0.2, 0.3)[i % 3]})
    return examples


def make_value_loss(rng):
    """20: inside and outside the clip range, alone and together."""
    examples = [{"values": [new], "old": [0.0], "returns": [target], "clip": 1.0}
                for new, target in ((2.0, 3.0), (2.0, -1.0), (-2.0, -3.0), (0.5, 1.0))]
    for i in range(16):
        count = rng.randrange(1, 6)
        examples.append({"values": drawn(rng, count, 2), "old": drawn(rng, count, 1),
                         "returns": drawn(rng, count, 3), "clip": (0.2, 1.0)[i % 2]})
    return examples


def make_explained_variance(rng):
    """Good critics, constant ones, harmful ones; and one that is right but for a constant."""
    examples = []
    for spread in (0.1, 0.5, 1.0, 3.0):
        returns = drawn(rng, 12, 2)
        noise = drawn(rng, 12, spread)
        examples += [{"values": [round(r + n, 3) for r, n in zip(returns, noise)],
                      "returns": returns},
                     {"values": [round(r + 2, 3) for r in returns], "returns": returns}]
    returns = [round(r + 4, 3) for r in returns]
    return examples + [{"values": [1.0] * 12, "returns": returns},
                       {"values": returns, "returns": [2.0] * 12},
                       {"values": [-r for r in returns], "returns": returns}]


def make_per_answer(rng):
    """Answers of one to five tokens; none is empty."""
    examples = []
    for i in range(10):
        counts = [rng.randrange(1, 6) for _ in range(i % 4 + 1)]
        examples.append({"tokens": drawn(rng, sum(counts), 2), "counts": counts})
    return examples


def make_wilson(rng):
    """30: the paper's, none of few, all of few, one, none of none, another z."""
    pairs = [(27, 234), (35, 234), (0, 20), (20, 20), (0, 1), (1, 1), (0, 0), (117, 234), (3, 7)]
    pairs += [(rng.randrange(count + 1), count)
              for count in (rng.randrange(2, 600) for _ in range(17))]
    examples = [{"hits": hits, "count": count, "z": []} for hits, count in pairs]
    return examples + [{"hits": hits, "count": count, "z": [z]} for (hits, count), z in
                       zip(pairs[:4], (1.0, 1.645, 2.576, 1.0))]


def make_gain(rng):
    """20: up, down, from nothing, to everything, unequal numbers of hands."""
    examples = [{"new": [35, 234], "old": [27, 234]}, {"new": [0, 20], "old": [20, 20]},
                {"new": [5, 5], "old": [0, 50]}, {"new": [10, 100], "old": [10, 100]}]
    for _ in range(16):
        counts = [rng.randrange(5, 500) for _ in range(2)]
        new, old = ([rng.randrange(count + 1), count] for count in counts)
        examples.append({"new": new, "old": old})
    return examples + [examples[0] | {"z": [1.0]}, examples[4] | {"z": [2.576]}]


PLANTED = ("mask one late", "messages learnt", "end tokens not learnt", "other temperature",
           "log p of the next token", "one row at wrong positions", "a held-out hand",
           "log p is not a number")
CLEAN = ("clean", "clean bf16", "clean, all hands")


def make_complaints(rng):
    """Batches with one planted bug each, and three clean ones. Hidden: which is which."""
    kinds = [*PLANTED, *CLEAN]
    examples = [batch(rng, kind) for kind in kinds]
    rng.shuffle(examples)
    return examples


def batch(rng, kind):
    """Episodes as the sampler told them, and rows as the update sees them, with one bug."""
    split_of, temperature = repository_module("gp_env").split_of, 0.6
    splits, episodes, rows = {}, [], []
    for e in range(6):
        held_out = kind in ("a held-out hand", "clean, all hands") and e == 4
        split = None
        while split != (("val" if kind in PLANTED else "test") if held_out else "train"):
            cards = [rng.choice(RANKS) for _ in range(4)]
            split = split_of(cards)
        splits["".join(sorted(cards))] = split
        turns, row = [], {"ids": [], "mask": [], "value_at": [], "tries": [], "logprobs": []}
        for k in range(rng.randrange(1, 4)):
            prompt = [rng.randrange(10, 90) for _ in range(rng.randrange(3, 6))]
            answer = [rng.randrange(10, 90) for _ in range(rng.randrange(3, 6))] + [9]
            said = [-round(abs(rng.gauss(0, 1.5)) + 0.01, 4) for _ in answer]
            turns.append({"prompt_ids": prompt, "answer_ids": answer, "logprobs": said,
                          "new_conversation": k == 0})
            row["value_at"].append(len(row["ids"]) + len(prompt) - 1)
            row["tries"].append([e, k])
            row["ids"] += prompt + answer
            row["mask"] += [0] * len(prompt) + [1] * len(answer)
            row["logprobs"] += said
        episodes.append({"cards": cards, "turns": turns, "terminated": True})
        rows.append(row)
    for number, row in enumerate(rows):
        spoil(rng, kind, number, row)
    rng.shuffle(rows)
    return {"episodes": episodes, "rows": rows, "splits": splits, "temperature": temperature,
            "split": "all" if kind == "clean, all hands" else "train",
            "dtype": "bfloat16" if kind in ("clean bf16", "other temperature") else "float32",
            "kind": kind}


def spoil(rng, kind, number, row):
    """Plant the bug of this kind in a row; a clean one gets the noise of rounding."""
    said = row["logprobs"]
    if kind == "mask one late":
        row["mask"] = [0] + row["mask"][:-1]
        del said[0]
    elif kind == "messages learnt":
        extra = row["mask"].index(1)
        row["mask"] = [0] * extra + [1] * (len(row["mask"]) - extra)
        row["logprobs"] = said + [-1.5] * (sum(row["mask"]) - len(said))
    elif kind == "end tokens not learnt":
        taught = [token for token, m in zip(row["ids"], row["mask"]) if m]
        row["logprobs"] = [p for p, token in zip(said, taught) if token != 9]
        row["mask"] = [m * (t != 9) for t, m in zip(row["ids"], row["mask"])]
    elif kind == "other temperature":
        row["logprobs"] = [round(0.6 * p - 0.2, 4) for p in said]
    elif kind == "log p of the next token":
        row["logprobs"] = said[1:] + said[:1]
    elif kind == "one row at wrong positions" and number == 2:
        row["logprobs"] = [round(p + rng.gauss(0, 0.05), 4) for p in said]
    elif kind == "log p is not a number" and number == 3:
        said[1] = math.nan
    elif kind == "clean bf16":
        row["logprobs"] = [round(p + rng.gauss(0, 0.01), 4) for p in said]
        row["logprobs"][0] += 0.3
    else:
        row["logprobs"] = [p + rng.gauss(0, 1e-6) for p in said]


MAKERS = {"verifier.compare": make_compare, "verifier.verify_gp": make_verify_gp,
          "verifier.parse_formula": make_parse_formula, "verifier.verify_virl": make_verify_virl,
          "gp_env.split_of": make_split_of, "sft.encode": make_encode,
          "sft.token_logprobs": make_token_logprobs, "sft.sft_loss": make_sft_loss,
          "evaluate.draw": make_draw, "rl.conversations": make_conversations,
          "rl.score": make_score, "rl.gae": make_gae, "rl.normalised": make_normalised,
          "rl.add_advantages": make_add_advantages, "rl.policy_loss": make_policy_loss,
          "rl.value_loss": make_value_loss, "rl.explained_variance": make_explained_variance,
          "rl.per_answer": make_per_answer, "evaluate.wilson": make_wilson,
          "evaluate.gain": make_gain, "rl.complaints": make_complaints}
