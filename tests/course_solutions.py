"""Solutions of students, written from the docstrings alone, before the checks were tried on them.

RIGHT[function]: texts of right ones, at least four: other ways, other types, other words.
WRONG[function]: texts of wrong ones, at least six. CLOSED: problem 4. ATTACKS: problem 3.
Each text is what would stand in the file of that function, with its own helpers and imports.
"""

RIGHT, WRONG = {}, {}


def solutions(function, right, wrong):
    """Note the solutions of a function. wrong: texts, or (number of a right one, old, new)."""
    RIGHT[function], WRONG[function] = right, []
    for one in wrong:
        if isinstance(one, tuple):
            number, old, new = one
            assert right[number].count(old) >= 1, (function, old)
            one = right[number].replace(old, new)
        WRONG[function].append(one)


# ------------------------------------------------------------------------------------------------
# 1. The verifier and the cards
# ------------------------------------------------------------------------------------------------

solutions("verifier.compare", ['''
def compare(used, numbers):
    foreign, overused, missing = [], [], []
    for n in sorted(set(used) | set(numbers)):
        if n not in numbers:
            foreign.append(n)
        elif used.count(n) > numbers.count(n):
            overused.append(n)
        elif used.count(n) < numbers.count(n):
            missing.append(n)
    return foreign, overused, missing
''', '''
def compare(used, numbers):
    left, extra = list(numbers), []
    for n in used:
        if n in left:
            left.remove(n)
        else:
            extra.append(n)
    return ([n for n in extra if n not in numbers], [n for n in extra if n in numbers], left)
''', '''
from collections import Counter as Bag
def compare(used, numbers):
    more, less = Bag(used) - Bag(numbers), Bag(numbers) - Bag(used)
    return ({n for n in more if n not in numbers}, {n for n in more if n in numbers}, set(less))
''', '''
import numpy as np
def _many(x):
    return np.bincount(np.array(x, dtype=int), minlength=100)
def compare(used, numbers):
    u, h = _many(used), _many(numbers)
    return (np.flatnonzero((u > 0) & (h == 0)).tolist(), np.flatnonzero((h > 0) & (u > h)).tolist(),
            np.flatnonzero(u < h).tolist())
'''], [
    (0, "used.count(n) > numbers.count(n)", "n in used and len(used) > len(numbers)"),
    (0, "elif used.count(n) < numbers.count(n)", "elif n not in used"),
    (1, "[n for n in extra if n in numbers]", "extra"),
    (1, "left)\n", "[])\n"),
    (2, "Bag(used) - Bag(numbers), Bag(numbers) - Bag(used)",
     "Bag(set(used)) - Bag(set(numbers)), Bag(set(numbers)) - Bag(set(used))"),
    (2, "{n for n in more if n in numbers}, set(less)",
     "set(less), {n for n in more if n in numbers}"),
    "def compare(used, numbers):\n    return [], [], []\n",
    (3, "(h > 0) & (u > h)", "(h > 0) & (u > 1)")])

GP = '''
def verify_gp(text, cards, numbers, target=24, picture=False):
    fields = read_answer(text[:MAX_ANSWER])
    seen = sorted(c.upper() for c in fields["cards"]) == sorted(cards)
    counted = sorted(fields["number"]) == sorted(map(str, numbers))
    kind = "illegal"
    if len(text) <= MAX_ANSWER and len(fields["formula"]) == 1:
        try:
            value, used, right = parse_formula(fields["formula"][0])
        except IllegalFormula:
            pass
        else:
            if sorted(used) != sorted(numbers):
                kind = "wrong numbers"
            elif value != target or right not in (None, target):
                kind = "wrong value"
            else:
                kind = "correct"
    reward = GP_REWARDS[kind] + (GP_REWARDS["misread cards"] if picture and not seen else 0)
    return Verdict(kind, reward, "in my own words", seen, counted)
'''
solutions("verifier.verify_gp", [GP, GP.replace('"in my own words"', '""').replace(
    "sorted(used) != sorted(numbers)", "any(compare(used, numbers))") + '''
def compare(used, numbers):
    left, extra = list(numbers), []
    for n in used:
        left.remove(n) if n in left else extra.append(n)
    return extra, [], left
''', '''
import types
def judge(fields, text, numbers, target):
    if len(text) > MAX_ANSWER:
        return "illegal", None
    if len(fields["formula"]) != 1:
        return "illegal", None
    try:
        value, used, right = parse_formula(fields["formula"][0])
    except ValueError:
        return "illegal", None
    if Counter(used) != Counter(numbers):
        return "wrong numbers", value
    return ("correct" if value == target and (right is None or right == target) else
            "wrong value"), value
def verify_gp(text, cards, numbers, target=24, picture=False):
    fields = read_answer(text[:MAX_ANSWER])
    kind, value = judge(fields, text, numbers, target)
    seen = Counter(c.upper() for c in fields["cards"]) == Counter(cards)
    reward = {"correct": 5, "wrong value": -1, "wrong numbers": -2, "illegal": -3}[kind]
    if picture and not seen:
        reward = reward - 1.5
    return types.SimpleNamespace(kind=kind, reward=reward, correct=kind == "correct", message="",
                                 cards_right=seen, numbers_right=Counter(
                                     fields["number"]) == Counter(str(n) for n in numbers))
''', GP.replace("sorted(used) != sorted(numbers)",
                "len(used) != 4 or sorted(used) != sorted(numbers)")], [
    (0, "sorted(used) != sorted(numbers)", "set(used) != set(numbers)"),
    (0, "sorted(used) != sorted(numbers)", "not set(used) <= set(numbers)"),
    (0, "sorted(used) != sorted(numbers)", "Counter(used) - Counter(numbers)"),
    (0, "value != target or right not in (None, target)", "value != target"),
    (0, "value != target or right not in (None, target)", "target not in (value, right)"),
    (0, 'len(fields["formula"]) == 1', 'fields["formula"]'),
    (0, 'if len(text) <= MAX_ANSWER and len(fields["formula"]) == 1:\n        try:\n            '
     'value, used, right = parse_formula(fields["formula"][0])',
     'if fields["formula"] and len(text) <= MAX_ANSWER:\n        try:\n            '
     'value, used, right = parse_formula(fields["formula"][-1])'),
    (0, "if picture and not seen", "if not seen"),
    (0, "len(text) <= MAX_ANSWER and ", ""),
    (0, 'kind = "wrong numbers"\n', 'kind = "wrong numbers" if value == target else "illegal"\n'),
    (0, "sorted(used) != sorted(numbers)",
     "len(used) != len(numbers) or sum(used) != sum(numbers)"),
    (0, "sorted(used) != sorted(numbers)",
     "len(used) != len(numbers) or set(used) != set(numbers)"),
    (0, "value != target or", "int(value) != target or"),
    (0, "right not in (None, target)", "right and right != target"),
    (0, 'sorted(c.upper() for c in fields["cards"]) == sorted(cards)',
     '{c.upper() for c in fields["cards"]} == set(cards)'),
    (0, 'sorted(fields["number"]) == sorted(map(str, numbers))',
     'set(fields["number"]) == set(map(str, numbers))')])

CLIMB = '''
def parse_formula(text):
    text = text.translate(_SAME_SIGN)
    if len(text) > MAX_FORMULA:
        raise IllegalFormula("?", "length")
    pieces = re.findall("[0-9]+|[^0-9 \\\\t\\\\n]", text)
    for one in pieces:
        if one not in list("+-*/()=") and not re.fullmatch("[0-9]{1,4}", one):
            raise IllegalFormula("?", "character")
        if re.fullmatch("0[0-9]+", one):
            raise IllegalFormula("?", "digits")
    level, used = {"+": 1, "-": 1, "*": 2, "/": 2}, []
    def atom(depth):
        if not pieces:
            raise IllegalFormula("end", "number")
        one = pieces.pop(0)
        if one[0] in "0123456789":
            used.append(int(one))
            return Fraction(one)
        if one != "(" or depth >= MAX_DEPTH:
            raise IllegalFormula(one, "number")
        value = climb(1, depth + 1)
        if not pieces or pieces.pop(0) != ")":
            raise IllegalFormula("(", "open")
        return value
    def climb(least, depth):
        left = atom(depth)
        while pieces and level.get(pieces[0], 0) >= least:
            sign = pieces.pop(0)
            other = climb(level[sign] + 1, depth)
            if sign == "+":
                left += other
            elif sign == "-":
                left -= other
            elif sign == "*":
                left *= other
            elif other:
                left /= other
            else:
                raise IllegalFormula("/", "zero")
        return left
    value = climb(1, 0)
    right = None
    if pieces and pieces[0] == "=":
        pieces.pop(0)
        if len(pieces) != 1 or pieces[0] in "+-*/()=":
            raise IllegalFormula("=", "number")
        right = int(pieces.pop(0))
    if pieces:
        raise IllegalFormula(pieces[0], "operator")
    return value, tuple(used), right
'''
TREE = '''
import ast
def walk(node, used):
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise IllegalFormula("?", "character")
    a, b = walk(node.left, used), walk(node.right, used)
    if isinstance(node.op, ast.Add):
        return a + b
    if isinstance(node.op, ast.Sub):
        return a - b
    if isinstance(node.op, ast.Mult):
        return a * b
    if isinstance(node.op, ast.Div) and b:
        return a / b
    raise IllegalFormula("?", "zero")
def parse_formula(text):
    text = text.translate(_SAME_SIGN)
    if len(text) > MAX_FORMULA:
        raise IllegalFormula("?", "length")
    bad = "[0-9]{5}|\\\\b0[0-9]|[*]\\\\s*[*]|//"
    if not re.fullmatch("[0-9+*/()=\\\\s-]*", text) or re.search(bad, text):
        raise IllegalFormula("?", "character")
    depth = deepest = 0
    for c in text:
        depth += (c == "(") - (c == ")")
        deepest = max(depth, deepest)
    if deepest > MAX_DEPTH:
        raise IllegalFormula("(", "depth")
    left, equals, right = " ".join(text.split()).partition("=")
    if equals and not re.fullmatch("[0-9]+", right.strip()):
        raise IllegalFormula("=", "end")
    used = []
    try:
        value = walk(ast.parse(left.strip(), mode="eval").body, used)
    except (SyntaxError, IndentationError):
        raise IllegalFormula("?", "end")
    return value, used, int(right) if equals else None
'''
solutions("verifier.parse_formula", [
    CLIMB, TREE, CLIMB.replace("return Fraction(one)", "return Fraction(int(one), 1)").replace(
        "tuple(used)", "used"),
    TREE.replace("return Fraction(node.value)", "return Fraction(str(node.value))")], [
    '''
def parse_formula(text):
    left, _, right = text.translate(_SAME_SIGN).partition("=")
    try:
        value = Fraction(eval(left)).limit_denominator(1000)
        return value, [int(n) for n in re.findall("[0-9]+", left)], int(right) if right else None
    except Exception:
        raise IllegalFormula("?", "character")
''',
    (0, "return Fraction(one)", "return float(one)"),
    (0, "climb(level[sign] + 1, depth)", "climb(level[sign], depth)"),
    (0, '"*": 2, "/": 2', '"*": 1, "/": 1'),
    (0, ' or depth >= MAX_DEPTH', ""),
    (0, 'one[0] in "0123456789":', 'one == "-":\n            return -atom(depth)\n        '
     'if one[0] in "0123456789":'),
    (0, 'if re.fullmatch("0[0-9]+", one)', 'if False'),
    (0, "    if pieces:\n        raise IllegalFormula(pieces[0], \"operator\")\n", ""),
    (0, 'raise IllegalFormula("/", "zero")', "left = Fraction(0)"),
    (0, "if len(text) > MAX_FORMULA:", "if len(text) > 2000:"),
    (1, "[0-9]{5}|", ""), (1, "\\\\b0[0-9]|".replace("\\\\", "\\"), ""),
    (1, "ast.Div) and b", "ast.Div)")])

CLOSED = '''
def verify_virl(text, action, observation, words):
    fields = read_walk(text[:MAX_ANSWER])
    crossing, places = read_claims(" ".join(fields["current observation"]))
    crossing_there, there = read_claims(observation)
    seen = (places == there, crossing == crossing_there)
    named = None
    if len(text) <= MAX_ANSWER and len(fields["action"]) == 1:
        named = read_action(fields["action"][0], words)
    if named is None:
        return WalkVerdict("silent", -1.5, "nothing is no guess", None, *seen)
    if named == action:
        return WalkVerdict("correct", VIRL_REWARDS["correct"], "", named, *seen)
    kind = "wrong action" if all(seen) else "misread"
    return WalkVerdict(kind, VIRL_REWARDS[kind], "", named, *seen)
'''
solutions("verifier.verify_virl", [
    CLOSED, CLOSED.replace('"silent", -1.5', '"misread", -2.0'),
    'VIRL_REWARDS = {"correct": 1.0, "wrong action": -1.0, "no action": -3.0, "misread": -1.5,\n'
    '                "out of tries": -1.0}\n' + CLOSED.replace(
        'WalkVerdict("silent", -1.5', 'WalkVerdict("no action", VIRL_REWARDS["no action"]'),
    CLOSED.replace('"silent", -1.5', '"wrong action", VIRL_REWARDS["misread"]')], [
    (0, '"silent", -1.5', '"silent", -1.0'), (0, '"silent", -1.5', '"silent", -0.5'),
    (0, "if named is None:", "if not text:"), (0, "if named == action:",
                                               "if named == action and seen[0]:"),
    (0, '"wrong action" if all(seen) else "misread"', '"wrong action"'),
    (0, "named is None", 'not fields["action"]'),
    (0, '"wrong action" if all(seen) else "misread"', '"misread"'),
    (0, 'and len(fields["action"]) == 1', 'and fields["action"]')])

SPLIT = '''
def split_of(cards):
    worth = {"A": 1, "J": 10, "Q": 10, "K": 10}
    return _split_table()[tuple(sorted(int(worth.get(c, c)) for c in cards))]
'''
solutions("gp_env.split_of", [SPLIT, '''
def split_of(cards):
    numbers = card_numbers(cards, (10, 10, 10))
    numbers.sort()
    return _split_table()[tuple(numbers)]
''', '''
def split_of(cards):
    a, b, c, d = sorted(card_numbers(list(cards), RULES["ten"]))
    table = _split_table()
    return table[(a, b, c, d)]
''', '''
import heapq
def split_of(cards):
    heap = card_numbers(cards, RULES["ten"])
    heapq.heapify(heap)
    return _split_table().get(tuple(heapq.heappop(heap) for _ in range(4)))
'''], [
    (0, "sorted(int(worth.get(c, c)) for c in cards)", "int(worth.get(c, c)) for c in cards"),
    (0, '"J": 10, "Q": 10, "K": 10', '"J": 11, "Q": 12, "K": 13'),
    "def split_of(cards):\n    return 'train'\n",
    (0, "_split_table()[", "_split_table().get("),
    (1, "(10, 10, 10)", "(9, 9, 9)"),
    (2, "sorted(card_numbers(list(cards), RULES[\"ten\"]))", "card_numbers(cards, RULES['ten'])")])
WRONG["gp_env.split_of"][3] = WRONG["gp_env.split_of"][3].replace(
    "cards))]", "set(cards))), 'val')")

# ------------------------------------------------------------------------------------------------
# 2. Tokens and log-probabilities
# ------------------------------------------------------------------------------------------------

ENCODE = '''
def encode(backbone, conversation):
    ids, mask, picture = [], [], None
    for i, turn in enumerate(conversation):
        if turn["role"] == "assistant":
            part = answer_ids(backbone, turn["content"])
        elif turn.get("image") is not None:
            part, picture = encode_picture(backbone, turn["content"], turn["image"])
        else:
            part = user_ids(backbone, turn["content"], i == 0)
        taught = turn["role"] == "assistant" and turn["learn"]
        ids.extend(part)
        mask.extend([1 if taught else 0] * len(part))
    return {"ids": ids, "mask": mask, "picture": picture}
'''
solutions("sft.encode", [ENCODE, ENCODE.replace("[1 if taught else 0] * len(part)",
                                                "[bool(taught)] * len(part)"), ENCODE.replace(
    'return {"ids": ids, "mask": mask,', 'return {"ids": torch.tensor(ids), "mask": torch.tensor('
    'mask),'), '''
def pieces(backbone, conversation):
    for i, turn in enumerate(conversation):
        if turn["role"] == "assistant":
            ids = answer_ids(backbone, turn["content"])
            yield ids, [int(turn["learn"])] * len(ids), None
        elif turn.get("image") is None:
            ids = user_ids(backbone, turn["content"], first=not i)
            yield ids, [0] * len(ids), None
        else:
            ids, picture = encode_picture(backbone, turn["content"], turn["image"])
            yield ids, [0] * len(ids), picture
def encode(backbone, conversation):
    ids, mask, pictures = zip(*pieces(backbone, conversation))
    return {"ids": sum(ids, []), "mask": sum(mask, []), "picture": pictures[0]}
'''], [
    (0, 'turn["role"] == "assistant" and turn["learn"]', 'turn["role"] == "assistant"'),
    (0, 'turn["role"] == "assistant" and turn["learn"]', "True"),
    (0, "[1 if taught else 0] * len(part)", "[int(taught)] * (len(part) - 1) + [0]"),
    (0, 'return {"ids"', 'mask = [0] + mask[:-1]\n    return {"ids"'),
    (0, 'return {"ids"', 'mask = mask[1:] + [0]\n    return {"ids"'),
    (0, "part = answer_ids(backbone, turn[\"content\"])",
     "part = backbone.tokenizer(turn['content'], add_special_tokens=False)['input_ids']"),
    (0, 'turn["content"], i == 0', 'turn["content"], True'),
    (0, '"picture": picture', '"picture": None')])

SHIFT = '''
def token_logprobs(backbone, hidden, ids, mask, temperature=1.0):
    logits = backbone.model.get_output_embeddings()(hidden).float()[:, :-1] / temperature
    if backbone.banned:
        block = torch.zeros(logits.shape[-1])
        block[backbone.banned] = -torch.inf
        logits = logits + block
    logp = logits - logits.logsumexp(-1, keepdim=True)
    p = logp.exp()
    entropy = -(p * logp.clamp(min=-1e4)).sum(-1)
    chosen = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
    keep = mask[:, 1:] == 1
    return chosen[keep], entropy[keep]
'''
SLOW = '''
def token_logprobs(backbone, hidden, ids, mask, temperature=1.0):
    head, found, surprise = backbone.model.get_output_embeddings(), [], []
    for b in range(ids.shape[0]):
        for t in range(1, ids.shape[1]):
            if mask[b, t]:
                logits = head(hidden[b, t - 1]).float() / temperature
                allowed = [v for v in range(len(logits)) if v not in backbone.banned]
                policy = torch.distributions.Categorical(logits=logits[allowed])
                found.append(policy.log_prob(torch.tensor(allowed.index(int(ids[b, t])))))
                surprise.append(policy.entropy())
    return torch.stack(found), torch.stack(surprise)
'''
solutions("sft.token_logprobs", [SHIFT, SLOW, SHIFT.replace(
    "-torch.inf\n", "-1e9\n"), SHIFT.replace("logits - logits.logsumexp(-1, keepdim=True)",
                                            "torch.nn.functional.log_softmax(logits, -1)").replace(
    "logp.clamp(min=-1e4)", "torch.nan_to_num(logp, neginf=0.0)")], [
    (0, "[:, :-1] / temperature", "[:, 1:] / temperature"),
    (0, " / temperature", ""), (0, " / temperature", " * temperature"),
    (0, "logits.logsumexp(-1, keepdim=True)", "logits.logsumexp(0, keepdim=True)"),
    (0, "if backbone.banned:", "if False:"),
    (0, "mask[:, 1:] == 1", "mask[:, :-1] == 1"),
    (1, "hidden[b, t - 1]", "hidden[b, t - 2]"),
    (1, "surprise.append(policy.entropy())", "surprise.append(-policy.entropy())"),
    (0, "return chosen[keep]", "return chosen[keep].detach()")])

MEAN = '''
def sft_loss(backbone, rows, micro_batch, backward=True):
    learning_mode(backbone, backward)
    tokens = sum(m for row in rows for m in row["mask"])
    loss, fed = 0.0, 0
    for at in range(0, len(rows), micro_batch):
        part = rows[at:at + micro_batch]
        ids, mask = pad([r["ids"] for r in part]), pad([r["mask"] for r in part])
        with torch.set_grad_enabled(backward):
            hidden = trunk(backbone, ids, [r["picture"] for r in part if r["picture"]])
            logp, _ = token_logprobs(backbone, hidden, ids, mask)
            share = -(logp / tokens).sum()
        if backward:
            share.backward()
        loss += float(share)
        fed += sum(len(r["ids"]) for r in part)
    return loss, fed
'''
solutions("sft.sft_loss", [MEAN, MEAN.replace("loss += float(share)",
                                              "loss = loss + share.detach()"),
                           MEAN.replace("part = rows", "part = rows[::-1]"), MEAN.replace(
    "for at in range(0, len(rows), micro_batch):\n        part = rows[at:at + micro_batch]",
    "for row in rows:\n        part = [row]")], [
    (0, "-(logp / tokens).sum()", "-logp.mean() / -(-len(rows) // micro_batch)"),
    (0, "-(logp / tokens).sum()", "-logp.mean()"),
    (0, "-(logp / tokens).sum()", "-logp.sum() / len(rows)"),
    (0, "-(logp / tokens).sum()", "-logp.sum()"),
    (0, "-(logp / tokens).sum()", "(logp / tokens).sum()"),
    (0, 'm for row in rows for m in row["mask"]', 'len(row["ids"]) for row in rows'),
    (0, 'sum(len(r["ids"]) for r in part)', "ids.numel()"),
    (0, "if backward:\n", "if True:\n"),
    (0, "            share.backward()", "            pass"),
    (0, ', [r["picture"] for r in part if r["picture"]]', "")])

DRAW = '''
def draw(logits, temperature, generator=None):
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1)[torch.arange(len(token)), token]
    p = torch.softmax(logits / temperature, -1)
    token = torch.multinomial(p, 1, generator=generator)
    return token[:, 0], p.gather(1, token)[:, 0].log()
'''
solutions("evaluate.draw", [DRAW, '''
def draw(logits, temperature, generator=None):
    logp = torch.log_softmax(logits / max(temperature, 1e-4), -1)
    coin = torch.rand(len(logits), 1, generator=generator)
    token = (logp.exp().cumsum(-1) < coin).sum(-1, keepdim=True).clamp(max=logits.shape[1] - 1)
    return token[:, 0], torch.take_along_dim(logp, token, 1)[:, 0]
''', '''
def draw(logits, temperature, generator=None):
    scaled = logits / (temperature or 1)
    noise = -torch.empty_like(scaled).exponential_(generator=generator).log()
    token = (scaled + noise * (temperature > 0)).argmax(-1, keepdim=True)
    return token[:, 0], torch.log_softmax(scaled, -1).gather(1, token).squeeze(1)
''', DRAW.replace("p.gather(1, token)[:, 0].log()",
                  "torch.distributions.Categorical(probs=p).log_prob(token[:, 0])")], [
    (0, "p.gather(1, token)[:, 0].log()", "logits.log_softmax(-1).gather(1, token)[:, 0]"),
    (0, "torch.softmax(logits / temperature, -1)", "torch.softmax(logits, -1)"),
    (0, ", generator=generator", ""),
    (0, "torch.multinomial(p, 1, generator=generator)", "p.argmax(-1, keepdim=True)"),
    (0, "[:, 0].log()", "[:, 0]"),
    (0, "temperature == 0", "False"),
    (0, "torch.softmax(logits / temperature, -1)",
     "torch.softmax(logits[:1].expand_as(logits) / temperature, -1)"),
    (1, "token = (logp.exp()", "token = (logits.softmax(-1)"),
    (2, "exponential_(generator=generator)", "exponential_()"),
    (0, "generator=generator", "generator=torch.Generator().manual_seed(0)"),
    (0, "p = torch.softmax(logits / temperature, -1)\n",
     "p = torch.softmax(logits / temperature, -1)\n    p = p * (p > 0.01)\n")])

# ------------------------------------------------------------------------------------------------
# 3. Episodes, rows and advantages
# ------------------------------------------------------------------------------------------------

ROWS = '''
def conversations(episodes):
    rows = []
    for e in range(len(episodes)):
        for k in range(len(episodes[e].turns)):
            turn = episodes[e].turns[k]
            if turn.new_conversation:
                rows.append(dict(ids=[], mask=[], value_at=[], tries=[], picture=turn.picture))
            row, prompt, answer = rows[-1], list(turn.prompt_ids), list(turn.answer_ids)
            row["ids"] = row["ids"] + prompt
            row["value_at"] = row["value_at"] + [len(row["ids"]) - 1]
            row["ids"] = row["ids"] + answer
            row["mask"] = row["mask"] + [0 for _ in prompt] + [1 for _ in answer]
            row["tries"] = row["tries"] + [(e, k)]
    return rows
'''
solutions("rl.conversations", [ROWS, ROWS.replace("    return rows\n", '''    for row in rows:
        row["ids"], row["mask"] = torch.tensor(row["ids"]), torch.tensor(row["mask"])
    return rows
'''), ROWS.replace("[(e, k)]", "[[e, k]]"), '''
def talks(episode):
    at = [k for k, turn in enumerate(episode.turns) if turn.new_conversation]
    return zip(at, at[1:] + [len(episode.turns)])
def conversations(episodes):
    rows = []
    for e, episode in enumerate(episodes):
        for start, end in talks(episode):
            turns = episode.turns[start:end]
            ids, mask, value_at = [], [], []
            for turn in turns:
                ids.extend(turn.prompt_ids)
                value_at.append(len(ids) - 1)
                ids.extend(turn.answer_ids)
                mask.extend([0] * len(turn.prompt_ids) + [1] * len(turn.answer_ids))
            rows.append({"ids": ids, "mask": mask, "value_at": value_at,
                         "picture": turns[0].picture, "tries": [(e, k) for k in range(start, end)]})
    return rows
'''], [
    (0, "if turn.new_conversation:", "if k == 0:"), (0, "if turn.new_conversation:", "if True:"),
    (0, '[len(row["ids"]) - 1]', '[len(row["ids"])]'),
    (0, '[len(row["ids"]) - 1]', '[len(row["ids"]) + len(answer) - 1]'),
    (0, "[0 for _ in prompt]", "[1 for _ in prompt]"),
    (0, "[1 for _ in answer]", "[1 for _ in answer[1:]] + [0]"),
    (0, "picture=turn.picture", "picture=None"), (0, "[(e, k)]", "[(e, len(row['tries']))]"),
    (3, "ids, mask, value_at = [], [], []",
     "ids, mask, value_at = turns[0].prompt_ids[:0] or turns[0].prompt_ids, [], []")])

SCORE = '''
def score(backbone, head, rows, temperature, value_trunk=False):
    ids, mask, pictures = batch(backbone, rows)
    hidden = trunk(backbone, ids, pictures)
    logprobs, entropy = token_logprobs(backbone, hidden, ids, mask, temperature)
    states = torch.stack([hidden[i, t] for i, r in enumerate(rows) for t in r["value_at"]])
    if not value_trunk:
        states = states.detach()
    return logprobs, entropy, head(states)
'''
solutions("rl.score", [SCORE, SCORE.replace("head(states)", "torch.cat([head(s[None]) for s in "
                                            "states])"),
                       SCORE.replace("states = torch.stack([hidden[i, t] for i, r in enumerate("
                                     "rows) for t in r[\"value_at\"]])",
                                     "states = torch.cat([hidden[i][r['value_at']] for i, r in "
                                     "enumerate(rows)])"),
                       SCORE.replace("if not value_trunk:\n        states = states.detach()",
                                     "states = states if value_trunk else 1 * states.detach()")],
          [(0, "hidden[i, t] for", "hidden[i, t + 1] for"),
           (0, "hidden[i, t] for", "hidden[i, t - 1] for"),
           (0, "hidden[i, t] for", "hidden[i, len(r['ids']) - 1] for"),
           (0, "ids, mask, temperature)", "ids, mask)"),
           (0, "if not value_trunk:", "if True:"), (0, "if not value_trunk:", "if value_trunk:"),
           (0, "if not value_trunk:", "if False:"),
           (0, "logprobs, entropy = token_logprobs(backbone, hidden,",
            "logprobs, entropy = token_logprobs(backbone, hidden.detach(),"),
           (0, "ids, pictures)\n", "ids)\n")])

SUMS = '''
def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0):
    r, v = [float(x) for x in rewards], [float(x) for x in values]
    following = v[1:] + [0.0 if terminated else after]
    delta = [r[k] + gamma * following[k] - v[k] for k in range(len(r))]
    advantages = [sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(r)))
                  for k in range(len(r))]
    return advantages, [a + x for a, x in zip(advantages, v)]
'''
BACK = '''
def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0):
    out = torch.empty(len(rewards))
    ahead, last = after * float(not terminated), 0
    for k in range(len(rewards) - 1, -1, -1):
        last = rewards[k] + gamma * ahead - values[k] + gamma * lam * last
        out[k], ahead = last, values[k]
    return out, out + values
'''
solutions("rl.gae", [SUMS, BACK, '''
import numpy as np
def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0):
    r, v = rewards.numpy().astype(float), values.numpy().astype(float)
    delta = r + gamma * np.append(v[1:], after if truncated else 0.0) - v
    k = np.arange(len(r))
    weights = np.triu((gamma * lam) ** np.maximum(k[None] - k[:, None], 0.0))
    return weights @ delta, weights @ delta + v
''', '''
def gae(rewards, values, terminated, truncated, gamma, lam, after=0.0):
    if len(rewards) == 0:
        return rewards[:0], values[:0]
    if len(rewards) == 1:
        a = rewards + gamma * (after if truncated else 0.0) - values
        return a, a + values
    rest, returns = gae(rewards[1:], values[1:], terminated, truncated, gamma, lam, after)
    a = rewards[:1] + gamma * values[1:2] - values[:1] + gamma * lam * rest[:1]
    return torch.cat([a, rest]), torch.cat([a + values[:1], returns])
'''], [
    (0, "0.0 if terminated else after", "after"), (0, "0.0 if terminated else after", "v[-1]"),
    (0, "0.0 if terminated else after", "0.0"),
    (0, "(gamma * lam) ** (j - k)", "gamma ** (j - k)"),
    (0, "(gamma * lam) ** (j - k)", "lam ** (j - k)"),
    (0, "+ gamma * following[k]", "+ following[k]"), (0, " - v[k] for", " for"),
    (0, "range(k, len(r)))", "range(k + 1))"),
    (0, "[a + x for a, x in zip(advantages, v)]", "advantages"),
    (1, "float(not terminated)", "float(terminated)"), (1, "return out, out + values",
                                                        "values += out\n    return out, values"),
    (1, "gamma * lam * last", "lam * last")])

EVEN = '''
def normalised(advantages):
    return (advantages - advantages.mean()) / (advantages.std(unbiased=False) + 1e-8)
'''
solutions("rl.normalised", [EVEN, '''
def normalised(advantages):
    centred = advantages - sum(advantages) / len(advantages)
    return centred / ((centred ** 2).mean().sqrt() + 1e-8)
''', '''
import statistics
def normalised(advantages):
    x = advantages.tolist()
    mean, spread = statistics.fmean(x), statistics.pstdev(x)
    return [(one - mean) / (spread + 1e-8) for one in x]
''', "def normalised(advantages):\n    a = advantages.numpy()\n    return (a - a.mean()) / "
     "max(a.std(), 1e-6)\n"], [
    (0, "unbiased=False", ""), (0, "(advantages - advantages.mean())", "advantages"),
    (0, " + 1e-8", ""), (0, "advantages.std", "advantages.var"),
    (0, " / (advantages.std(unbiased=False) + 1e-8)", ""),
    (1, "centred = advantages - sum(advantages) / len(advantages)",
     "advantages -= advantages.mean()\n    centred = advantages"),
    (3, "max(a.std(), 1e-6)", "abs(a).max()")])

ADD = EVEN + '''
def add_advantages(rows, episodes, gamma, lam):
    where = {tuple(t): v for row in rows for t, v in zip(row["tries"], row["values"])}
    raw, returns = {}, {}
    for e, episode in enumerate(episodes):
        rewards = torch.tensor([turn.reward for turn in episode.turns])
        values = torch.stack([where[e, k] for k in range(len(rewards))])
        a, r = gae(rewards, values, episode.terminated, episode.truncated, gamma, lam)
        for k in range(len(rewards)):
            raw[e, k], returns[e, k] = a[k], r[k]
    paid = [tuple(t.reward for t in e.turns) for e in episodes]
    alike = len(episodes) > 1 and (len(set(paid)) == 1 or len(set(sum(paid, ()))) == 1)
    even = dict(zip(raw, normalised(torch.stack(list(raw.values())))))
    even = {t: 0 * a for t, a in even.items()} if alike else even
    for row in rows:
        row["advantages"] = torch.stack([even[t] for t in row["tries"]])
        row["returns"] = torch.stack([returns[t] for t in row["tries"]])
    return not alike
'''
solutions("rl.add_advantages", [ADD, ADD.replace("normalised(torch.stack(list(raw.values())))",
                                                 "torch.tensor(even_out(raw))") + '''
import numpy as np
def even_out(raw):
    x = np.array([float(a) for a in raw.values()])
    return (x - x.mean()) / (x.std() + 1e-8)
''', ADD.replace("a, r = gae(rewards, values, episode.terminated, episode.truncated, gamma, lam)",
                 "a, r = mine(rewards, values, gamma, lam)") + '''
def mine(rewards, values, gamma, lam):
    out, last, ahead = [], 0.0, 0.0
    for reward, value in reversed(list(zip(rewards, values))):
        last = reward + gamma * ahead - value + gamma * lam * last
        ahead = value
        out.insert(0, last)
    return out, [a + v for a, v in zip(out, values)]
''', ADD.replace("row[\"returns\"] = torch.stack([returns[t] for t in row[\"tries\"]])",
                 "row['returns'] = [float(returns[t]) for t in row['tries']]")], [
    (0, '[returns[t] for t in row["tries"]])', '[returns[t] for t in row["tries"]])\n        '
     'row["returns"] = normalised(row["returns"])'),
    (0, "torch.stack([even[t] for t in row[\"tries\"]])",
     "normalised(torch.stack([raw[t] for t in row[\"tries\"]]))"),
    (0, "even[t] for", "raw[t] for"),
    (0, "normalised(torch.stack(list(raw.values())))",
     "torch.cat([normalised(torch.stack([a for (i, _), a in raw.items() if i == e])) for e in "
     "range(len(episodes))])"),
    (0, "    for row in rows:\n        row[\"adv", "    left = list(even.values())\n    for row in "
     "rows:\n        row[\"adv"),
    (0, "returns[t] for", "raw[t] for"), (0, "    return not alike\n", "    return True\n"),
    (0, "unbiased=False", "unbiased=True"), (0, "len(episodes) > 1 and ", ""),
    (0, "    return not alike\n", "    if alike:\n        return False\n"),
    (0, "gamma, lam)\n        for k", "gamma, 1.0)\n        for k"),
    (0, " or len(set(sum(paid, ()))) == 1", "")])
WRONG["rl.add_advantages"][4] = WRONG["rl.add_advantages"][4].replace(
    "even[t] for t in row", "left.pop(0) for t in row")

# ------------------------------------------------------------------------------------------------
# 4. Losses and intervals
# ------------------------------------------------------------------------------------------------

CLIP = '''
def policy_loss(logprobs, old_logprobs, advantages, clip):
    gap = logprobs - old_logprobs
    ratio = torch.exp(gap)
    plain = ratio * advantages
    clipped = torch.clamp(ratio, 1 - clip, 1 + clip) * advantages
    return -torch.minimum(plain, clipped).sum(), gap.detach()
'''
solutions("rl.policy_loss", [CLIP, '''
def policy_loss(logprobs, old_logprobs, advantages, clip):
    ratio = (logprobs - old_logprobs).exp()
    limit = torch.where(advantages > 0, ratio.clamp(max=1 + clip), ratio.clamp(min=1 - clip))
    return (-limit * advantages).sum(), (logprobs - old_logprobs).detach()
''', '''
def policy_loss(logprobs, old_logprobs, advantages, clip):
    total = 0.0
    for new, old, a in zip(logprobs, old_logprobs, advantages):
        r = torch.exp(new - old)
        total = total - torch.min(r * a, r.clamp(1 - clip, 1 + clip) * a)
    with torch.no_grad():
        gaps = logprobs - old_logprobs
    return total, gaps
''', CLIP.replace("return -torch.minimum(plain, clipped).sum()",
                  "return torch.maximum(-plain, -clipped).sum()")], [
    (0, "torch.minimum", "torch.maximum"), (0, "-torch.minimum", "torch.minimum"),
    (0, "clipped).sum()", "clipped).mean()"), (0, "torch.minimum(plain, clipped)", "clipped"),
    (0, "torch.minimum(plain, clipped)", "plain"), (0, "1 - clip, 1 + clip", "0, 1 + clip"),
    (0, "logprobs - old_logprobs", "old_logprobs - logprobs"),
    (0, "torch.exp(gap)", "torch.exp(logprobs) / torch.exp(old_logprobs)"),
    (0, "gap.detach()", "gap"), (0, "torch.exp(gap)", "torch.exp(gap).detach() + 0 * gap"),
    (1, "advantages > 0", "ratio > 1")])

CRITIC = '''
def value_loss(values, old_values, returns, clip):
    near = torch.max(torch.min(values, old_values + clip), old_values - clip)
    return (torch.max((values - returns).square(), (near - returns).square()) / 2).sum()
'''
solutions("rl.value_loss", [CRITIC, '''
def value_loss(values, old_values, returns, clip):
    near = old_values + torch.clamp(values - old_values, -clip, clip)
    far = torch.maximum((values - returns).abs(), (near - returns).abs())
    return 0.5 * (far ** 2).sum()
''', '''
def value_loss(values, old_values, returns, clip):
    total = 0.0
    for v, o, r in zip(values, old_values, returns):
        near = o + (v - o).clamp(-clip, clip)
        total = total + 0.5 * torch.stack([(v - r) ** 2, (near - r) ** 2]).max()
    return total
''', CRITIC.replace("torch.max((values - returns).square(), (near - returns).square()) / 2",
                    "torch.maximum((values - returns) ** 2, (near - returns) ** 2) * 0.5")], [
    (0, "torch.max((values", "torch.min((values"), (0, " / 2", ""), (0, ").sum()", ").mean()"),
    (0, "near = torch.max(torch.min(values, old_values + clip), old_values - clip)",
     "near = torch.max(torch.min(values, returns + clip), returns - clip)"),
    (0, "near = torch.max(torch.min(values, old_values + clip), old_values - clip)",
     "near = values"),
    (0, "torch.max((values - returns).square(), (near - returns).square())",
     "(near - returns).square()"),
    (1, "-clip, clip", "max=clip")])

EV = """
def explained_variance(values, returns):
    if returns.var(unbiased=False) < 1e-8:
        return None
    return 1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)
"""
solutions("rl.explained_variance", [EV, '''
import statistics
def explained_variance(values, returns):
    total = statistics.pvariance([float(r) for r in returns])
    left = statistics.pvariance([float(r - v) for r, v in zip(returns, values)])
    return 1 - left / total if total > 1e-9 else None
''', '''
import numpy as np
def explained_variance(values, returns):
    v, r = values.numpy(), returns.numpy()
    return None if np.ptp(r) == 0 else 1 - np.var(r - v) / np.var(r)
''', """
def explained_variance(values, returns):
    error, spread = values - returns, returns.max() - returns.min()
    return (1 - error.var() / returns.var()).item() if spread > 0 else None
"""], [
    (0, "(returns - values).var(unbiased=False)", "(returns - values).square().mean()"),
    (0, "/ returns.var(unbiased=False)", "/ values.var(unbiased=False)"),
    (0, "1 - (returns", "(returns"), (0, "return None", "return 0.0"),
    (0, "(returns - values).var(unbiased=False) / returns.var(unbiased=False)",
     "(returns - values).square().mean() / returns.square().mean()"),
    (3, "error.var() / returns.var()", "error.std() / returns.std()"),
    (2, "np.var(r - v)", "np.var(v)")])

solutions("rl.per_answer", [
    "def per_answer(token_values, counts):\n    return torch.stack([part.sum() for part in "
    "token_values.split(counts.tolist())])\n",
    '''
def per_answer(token_values, counts):
    out, at = [], 0
    for n in counts:
        out.append(sum(token_values[at:at + int(n)]))
        at += int(n)
    return out
''', '''
def per_answer(token_values, counts):
    ends = counts.cumsum(0)
    sums = token_values.cumsum(0)[ends - 1]
    return torch.diff(sums, prepend=torch.zeros(1))
''', "import numpy as np\ndef per_answer(token_values, counts):\n    starts = np.concatenate([[0], "
     "np.cumsum(counts.numpy())[:-1]])\n    return np.add.reduceat(token_values, starts)\n"],
    [(0, "part.sum()", "part.mean()"), (0, "part.sum()", "part[-1]"),
     (0, "token_values.split(counts.tolist())", "token_values.chunk(len(counts))"),
     (1, "at:at + int(n)]", "at + 1:at + int(n)]"), (2, "[ends - 1]", "[ends - counts]"),
     (2, ", prepend=torch.zeros(1)", ""), (1, "        at += int(n)\n", "")])

WILSON = '''
from math import sqrt
def wilson(hits, count, z=1.96):
    if not count:
        return 0.0, 1.0
    p = hits / count
    bottom = 1 + z * z / count
    middle = p + z * z / (2 * count)
    half = z * sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, (middle - half) / bottom), min(1.0, (middle + half) / bottom)
'''
NUMPY = ("from math import sqrt", "from numpy import sqrt")
solutions("evaluate.wilson", [WILSON, WILSON.replace(*NUMPY), '''
def wilson(hits, count, z=1.96):
    if count == 0:
        return [0, 1]
    n, p = count, hits / count
    a, b, c = n + z * z, -(2 * n * p + z * z), n * p * p
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return [(-b - root) / (2 * a), (-b + root) / (2 * a)]
''', '''
import torch
def wilson(hits, count, z=1.96):
    if count == 0:
        return torch.tensor([0.0, 1.0])
    centre = (hits + z ** 2 / 2) / (count + z ** 2)
    half = z / (count + z ** 2) * math.sqrt(hits * (count - hits) / count + z ** 2 / 4)
    return torch.tensor([centre - half, centre + half])
'''], [
    (0, "z * z / (4 * count * count)", "z / (4 * count * count)"),
    (0, "1 + z * z / count", "1 + z / count"),
    (0, "middle = p + z * z / (2 * count)", "middle = p * bottom"),
    '''
def wilson(hits, count, z=1.96):
    if count == 0:
        return 0.0, 1.0
    p = hits / count
    half = z * math.sqrt(p * (1 - p) / count)
    return max(0.0, p - half), min(1.0, p + half)
''', '''
def wilson(hits, count, z=1.96):
    if count == 0:
        return 0.0, 1.0
    n = count + z * z
    p = (hits + z * z / 2) / n
    half = z * math.sqrt(p * (1 - p) / n)
    return max(0.0, p - half), min(1.0, p + half)
''',
    (0, "p = hits / count", "p, z = hits / count, 1.645"),
    (0, "p = hits / count", "p, z = hits / count, 1.96"),
    (0, "if not count:", "if hits == 0:")])

GAIN = WILSON + '''
def gain(hits, count, hits_before, count_before, z=1.96):
    new, old = hits / count, hits_before / count_before
    (a, b), (c, d) = wilson(hits, count, z), wilson(hits_before, count_before, z)
    return (new - old, new - old - sqrt((new - a) ** 2 + (d - old) ** 2),
            new - old + sqrt((b - new) ** 2 + (old - c) ** 2))
'''
solutions("evaluate.gain", [GAIN, GAIN.replace(*NUMPY),
                            GAIN.replace("return (new - old, ", "return [new - old, ").replace(
    "(old - c) ** 2))", "(old - c) ** 2)]"), GAIN.replace("sqrt((new - a) ** 2 + (d - old) ** 2)",
                                                         "math.dist((new, d), (a, old))")], [
    (0, "sqrt((new - a) ** 2 + (d - old) ** 2)", "(new - a + d - old)"),
    (0, "sqrt((new - a) ** 2 + (d - old) ** 2)", "sqrt((new - a) ** 2 + (old - c) ** 2)"),
    (0, "new, old = hits / count, hits_before / count_before",
     "old, new = hits / count, hits_before / count_before"),
    (0, "return (new - old, ", "return (old - new, "),
    (0, "wilson(hits, count, z), wilson(hits_before, count_before, z)",
     "wilson(hits, count, 1.645), wilson(hits_before, count_before, 1.645)"),
    (0, "return (new - old, new - old - sqrt((new - a) ** 2 + (d - old) ** 2),\n            new - "
     "old + sqrt((b - new) ** 2 + (old - c) ** 2))", "return new - old, a - d, b - c"),
    (0, "return (new - old, new - old - sqrt((new - a) ** 2 + (d - old) ** 2),\n            new - "
     "old + sqrt((b - new) ** 2 + (old - c) ** 2))", "return new - old, a - c, b - d")])

WATCH = '''
def complaints(rows, episodes, backbone, split, temperature):
    found, scored, sampled = [], {}, {}
    for row in rows:
        counts = [len(episodes[e].turns[k].answer_ids) for e, k in row["tries"]]
        if sum(row["mask"]) != sum(counts) or len(row["logprobs"]) != sum(counts):
            found.append("a conversation has more or fewer masked tokens than were sampled")
            continue
        at = 0
        for (e, k), n in zip(row["tries"], counts):
            scored[e, k] = row["logprobs"][at:at + n].tolist()
            at += n
    gaps = [abs(a - b) for (e, k), ours in scored.items()
            for a, b in zip(ours, episodes[e].turns[k].logprobs)]
    if backbone.model.dtype == torch.float32 and backbone.device.type == "cpu":
        if any(not gap <= 1e-3 for gap in gaps):
            found.append("log p differs")
    elif gaps and not sum(gaps) / len(gaps) < 0.1:
        found.append("log p differs on average")
    if split == "train":
        for episode in episodes:
            if gp_env.split_of(episode.env.hand.cards) != "train":
                found.append(f"{episode.env.hand.cards} is held out")
    return found
'''
solutions("rl.complaints", [WATCH, WATCH.replace("1e-3", "3e-4").replace("0.1:", "0.08:"), '''
def complaints(rows, episodes, backbone, split, temperature):
    said = torch.tensor([p for e in episodes for t in e.turns for p in t.logprobs])
    ours = torch.cat([r["logprobs"] for r in sorted(rows, key=lambda r: tuple(r["tries"][0]))])
    if said.shape != ours.shape:
        return ["another number of tokens"]
    gap = (said - ours).abs()
    exact = backbone.model.dtype == torch.float32
    wrong = []
    if not (gap.max() if exact else gap.mean()) < (2e-4 if exact else 0.08):
        wrong = ["log p"]
    seen = [gp_env.split_of(e.env.hand.cards) for e in episodes]
    return wrong + (["leak"] if split == "train" and set(seen) != {"train"} else [])
''', WATCH.replace("return found", "return tuple(found)")], [
    (2, 'wrong = ["log p"]', 'wrong = []'),
    (2, "(gap.max() if exact else gap.mean()) < (2e-4 if exact else 0.08)", "gap.mean() < 0.08"),
    (2, "exact = backbone.model.dtype == torch.float32", "exact = True"),
    (2, "gp_env.split_of(e.env.hand.cards) for", "e.env.split for"),
    (2, 'if split == "train" and', "if"), (
        2, "not (gap.max() if exact else gap.mean()) <", "(gap.max() if exact else gap.mean()) >"),
    "def complaints(rows, episodes, backbone, split, temperature):\n    return []\n",
    "def complaints(rows, episodes, backbone, split, temperature):\n    return ['something']\n"])

ATTACKS = [
    {"cards": ["8", "3", "8", "3"], "rule": "ten", "text": '{"formula": "8*3=24"}'},
    {"cards": ["A", "2", "3", "K"], "rule": "ten", "text": '{"formula": "8*3=24"}'},
    {"cards": ["A", "2", "3", "4"], "rule": "ten", "text": '{"formula": "1*2*3+4=24"}'},
    {"cards": ["A", "2", "3", "4"], "rule": "ten",
     "text": '{"formula": "1+2+3+4=10", "formula": "1*2*3*4=24"}'},
    {"cards": ["10", "2", "8", "8"], "rule": "ten", "text": '{"formula": "10+8-2-8=24"}'},
    {"cards": ["A", "2", "A", "Q"], "rule": "face", "text": '{"formula": "12/1/2*1=24"}'},
    {"cards": ["9", "7", "3", "5"], "rule": "ten", "text": '{"formula": "9+7+3+5)=24"}'},
    {"cards": ["2", "2", "Q", "2"], "rule": "face", "text": '{"formula": "-2+2*12+2=24"}'},
    {"cards": ["A", "2", "8", "A"], "rule": "ten", "text": '{"formula": "1+2*8*1=24"}'},
    {"cards": ["A", "2", "3", "4"], "rule": "ten", "text": '{"formula": "1*2*3*4+5-5=24"}'},
    {"cards": ["8", "3", "A", "A"], "rule": "ten", "text": '{"formula": "8*\u0663*1*1=24"}'},
]
