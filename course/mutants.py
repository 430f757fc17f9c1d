"""Known mistakes: each is the source with a few characters changed.

A mutant serves four times: what it gives on the public examples lets `kit.py check` name a mistake;
tests/test_course.py requires that the examples tell it from the source; some are planted in a
verifier to be attacked (ATTACKS), some in a whole repository to be hunted (HUNTS).

An edit is (where, old, new): `where` is a function, class or constant of the same file, and `old`
stands exactly once in it. When a source line changes, tests/test_course.py says which edit is lost.
`says` finishes the sentence "This is what a function gives that ...".
"""

import ast
import functools
from dataclasses import dataclass

import problems


@dataclass(frozen=True)
class Mutant:
    """One mistake in one function. `tells`, for a hunt: the number that gives it away."""

    function: str           # "rl.gae": what is judged, and whose examples must see it
    says: str               # what such a function does, in words of the problem
    hint: str               # where to look, without the solution
    edits: tuple            # of (where, old, new)
    tells: str = ""


class EditLost(Exception):
    """An edit does not fit the source any more."""


@functools.lru_cache(maxsize=8)
def parsed(text):
    """The top-level statements of a file; the same few files are asked for again and again."""
    return ast.parse(text).body


@functools.lru_cache(maxsize=8)
def spans(text):
    """{name: (start, end)} of the top-level functions, classes and constants of a file."""
    found, starts = {}, [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in parsed(text):
        names = [getattr(node, "name", None)]
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        found |= dict.fromkeys(names, (starts[node.lineno - 1], starts[node.end_lineno]))
    return found


def edited(text, mutant):
    """{where: its new text} of all places that a mutant changes. Raises EditLost, with a line."""
    file, found = mutant.function.split(".")[0], {}
    whose = f"(mutant of {mutant.function}: {mutant.says})"
    for where, old, new in mutant.edits:
        if where not in spans(text):
            raise EditLost(f"{file}.py: there is no {where} at the top level any more {whose}")
        part = found.get(where, text[slice(*spans(text)[where])])
        if part.count(old) != 1:
            raise EditLost(f"{file}.py, {where}: {old!r} stands {part.count(old)} times, not once "
                           f"{whose}")
        found[where] = part.replace(old, new)
    return found


def apply(text, mutant):
    """The text of a file with the mutant's edits. Raises EditLost with a line that says which."""
    changed, places = edited(text, mutant), spans(text)
    for where in sorted(changed, key=places.get, reverse=True):
        start, end = places[where]
        text = text[:start] + changed[where] + text[end:]
    return text


def solution(text, mutant):
    """The parts of a file that are the solution of this problem, as the mutant has them."""
    changed = edited(text, mutant)
    return "\n".join(changed.get(name, text[slice(*spans(text)[name])])
                     for name in problems.own_names(mutant.function))


def lines_of(text, mutant):
    """(first, last) line of each edit of a mutant."""
    found = []
    for where, old, new in mutant.edits:
        start, _ = spans(text)[where]
        first = text.count("\n", 0, text.index(old, start)) + 1
        found.append((first, first + new.count("\n")))
    return found


def of(function, *entries):
    """Mutants of one function: (says, hint, old, new) or (says, hint, [(where, old, new), ...])."""
    found = []
    for says, hint, *edit in entries:
        edits = edit[0] if len(edit) == 1 else [(function.split(".")[1], *edit)]
        found.append(Mutant(function, says, hint, tuple(edits)))
    return found


COUNT = "a hand is a multiset: 8 3 8 3 holds two eights"
AS_BEFORE = "answers with one action are paid as before"
SILENCE = ("verify_virl", "VIRL_REWARDS[kind], message",       # closes the hole of problem 4
           "VIRL_REWARDS[kind] if named else -1.5, message")
MUTANTS = [
    # --- 1
    *of("verifier.compare",
        ("takes a set for a multiset", COUNT, [
            ("compare", "Counter(used), Counter(numbers)",
             "Counter(set(used)), Counter(set(numbers))")]),
        ("does not ask what is missing", "every card has to be used", "use[n] < have[n]",
         "False"),
        ("does not ask whether a number was used too often", COUNT, "use[n] > have[n]", "False"),
        ("calls a number missing only if it was not used at all", COUNT, "use[n] < have[n]",
         "not use[n]"),
        ("counts a foreign number as overused, too", "three lists, and no number in two of them",
         "for n in have if use[n] > have[n]", "for n in use if use[n] > have[n]"),
        ("swaps missing and overused", "used too often, used too seldom",
         "return foreign, overused, missing", "return foreign, missing, overused")),
    *of("verifier.verify_gp",
        ("does not ask for every card", "every card exactly once", [
            ("compare", "use[n] < have[n]", "False")]),
        ("takes a set for a multiset", COUNT, [
            ("compare", "Counter(used), Counter(numbers)",
             "Counter(set(used)), Counter(set(numbers))")]),
        ("allows numbers that are not in the hand", "every card exactly once, and nothing else", [
            ("compare", "sorted(n for n in use if n not in have)", "[]")]),
        ("asks only whether each number is in the hand", "exactly once, every one of them", [
            ("compare", "use[n] < have[n]", "False"), ("compare", "use[n] > have[n]", "False")]),
        ("is content when one side is the target", "both sides", [
            ("_judge_formula", "if value != target", "if target not in (value, right)"),
            ("_judge_formula", "right is not None and right != target", "False")]),
        ("is content when the left side is the target", "what if the right side says otherwise?", [
            ("_judge_formula", "right is not None and right != target", "False")]),
        ("takes a right side of 0 for none", "what does `if right` say of 0?", [
            ("_judge_formula", "right is not None and right != target",
             "right and right != target")]),
        ("rounds the value", "24.5 is not 24", [
            ("_judge_formula", "if value != target", "if int(value) != target")]),
        ("believes the right side of the equation", "who computed the number after the = ?", [
            ("_judge_formula", "if value != target", "if right is None and value != target")]),
        ("judges the last of several formulas", "how many tries is an answer?", [
            ("_judge_formula", "if len(formulas) != 1:", "if not formulas:"),
            ("_judge_formula", "parse_formula(formulas[0])", "parse_formula(formulas[-1])")]),
        ("judges the first of several formulas", "how many tries is an answer?", [
            ("_judge_formula", "if len(formulas) != 1:", "if not formulas:")]),
        ("adds penalties up", "an answer has ONE kind", [
            ("verify_gp", "reward = GP_REWARDS[kind]",
             "reward = GP_REWARDS[kind] - (kind == 'wrong numbers' and value != target)")]),
        ("reads an answer of any length", "MAX_ANSWER", [
            ("_judge_formula", "if answer_length > MAX_ANSWER", "if False")]),
        ("pays for misread cards without a picture, too", "picture=False: the cards were told",
         "if picture and not cards_right", "if not cards_right"),
        ("pays only if the `number` field is right", "the field is reported, not paid for",
         "return Verdict(kind, reward,", "kind = 'wrong numbers' if kind == 'correct' and not "
         "numbers_right else kind\n    return Verdict(kind, GP_REWARDS[kind],")),
    # --- 2
    *of("verifier.parse_formula",
        ("computes in floating point", "8/(3-8/3) is 24, not 23.999...", [
            ("_factor", "return Fraction(int(token))", "return float(token)")]),
        ("reads a-b-c as a-(b-c)", "10-2-3 is 5", [
            ("_expression", "_term(tokens, numbers, depth)\n        value =",
             "(_term(tokens, numbers, depth) if tokens[0] == '+' else "
             "_expression(tokens, numbers, depth))\n        value =")]),
        ("reads a/b/c as a/(b/c)", "100/5/2 is 10", [
            ("_term", "other = _factor(tokens, numbers, depth)",
             "other = (_factor if sign == '*' else _term)(tokens, numbers, depth)")]),
        ("forgets that * goes before +", "2+3*4 is 14", [
            ("_expression", 'while tokens[0] in ("+", "-")', 'while tokens[0] in ("+", "-", "*")'),
            ("_expression", 'value = value + other if sign == "+" else value - other',
             'value = {"+": value + other, "-": value - other, "*": value * other}[sign]'),
            ("_term", 'while tokens[0] in ("*", "/")', 'while tokens[0] in ("/",)')]),
        ("takes a leading minus", "the grammar has no unary minus", [
            ("_factor", 'token = tokens.pop(0)\n', 'token = tokens.pop(0)\n    if token == "-":\n'
             '        return -_factor(tokens, numbers, depth)\n')]),
        ("takes numbers with a leading zero", "013: Python and people disagree on it", [
            ("_tokens", 'len(token) > 1 and token[0] == "0"', "False")]),
        ("takes digits of other scripts", "str.isdigit knows more digits than 0 to 9", [
            ("_tokens", r'r"[0-9]+|\S"', r'r"\d+|\S"'),
            ("_tokens", "token.isascii() and token.isdigit()", "token.isdecimal()")]),
        ("does not mind what follows the formula", "junk after the end is no formula",
         'if rest == "end":', 'if rest != "=":'),
        ("has no limit to its depth", "MAX_DEPTH, and hostile input", [
            ("_factor", "if depth == MAX_DEPTH:", "if False:")]),
        ("has no limit to the length of a text", "MAX_FORMULA", "len(text) > MAX_FORMULA",
         "False"),
        ("has no limit to the digits of a number", "MAX_DIGITS", [
            ("_tokens", "len(token) > MAX_DIGITS", "False")]),
        ("lets ZeroDivisionError out", "division by zero is illegal, and said so", [
            ("_term", 'if sign == "/" and other == 0:', "if False:")]),
        ("calls a division by zero 0", "8/(3-3)*0 has no value", [
            ("_term", 'raise IllegalFormula("/", "zero")', "value, other = value * 0, 1")]),
        ("does not close its brackets", "(1+2 is illegal", [
            ("_factor", 'if after != ")":', 'if after not in (")", "end"):'),
            ("_factor", 'after = tokens.pop(0)',
             'after = tokens.pop(0) if tokens[0] != "end" else "end"')]),
        ("takes 2 3 for one number", "blanks end a number", [
            ("_tokens", "text)\n    for token", 'text.replace(" ", ""))\n    for token')]),
        ("loses the right side", "the third thing that is returned",
         "return value, numbers, right", "return value, numbers, None"),
        ("collects the numbers of the right side, too", "the numbers used on the left",
         "right = int(tokens.pop(0))", "right = int(tokens.pop(0))\n        numbers.append(right)"),
        ("knows no other signs for * / and -", "× ÷ −", "text = text.translate(_SAME_SIGN)",
         "text = str(text)")),
    # --- 4: what is handed out has the hole, and so is a mistake itself
    *of("verifier.verify_virl",
        ("leaves the hole as it was", "what does an answer without an action earn? A guess?", []),
        ("fines answers without an action, but not an action that does not exist",
         "a word that is in no list is no guess either", [
             ("VIRL_REWARDS", '"no action": -1.0', '"no action": -2.0')]),
        ("fines the empty answer alone", "there are other ways to say nothing",
         "VIRL_REWARDS[kind], message", "VIRL_REWARDS[kind] - (not text), message"),
        ("lets silence cost as much as an error, -1", "an honest guess may cost more than that",
         "VIRL_REWARDS[kind], message", "VIRL_REWARDS[kind] if named else -1.0, message"),
        ("lets silence cost little, -0.5", "an honest guess may cost more than that",
         "VIRL_REWARDS[kind], message", "VIRL_REWARDS[kind] if named else -0.5, message"),
        ("pays the right action only where the landmarks were read", AS_BEFORE, [
            SILENCE, ("verify_virl", "if named == action:",
                      "if named == action and places == there:")]),
        ("makes misreading free", AS_BEFORE, [
            SILENCE, ("verify_virl", 'kind = "misread" if parts else "wrong action"',
                      'kind = "wrong action"')]),
        ("calls every wrong action misread", AS_BEFORE, [
            SILENCE, ("verify_virl", 'kind = "misread" if parts else "wrong action"',
                      'kind = "misread"')])),
    # --- 5
    *of("gp_env.split_of",
        ("splits by the order in which cards were dealt", "the same hand, dealt in another order",
         "tuple(sorted(card_numbers(cards, RULES[\"ten\"])))",
         "tuple(card_numbers(cards, RULES[\"ten\"]))"),
        ("splits by what the cards count under the other rule", "what is LEARNT in training?",
         'RULES["ten"]', "(11, 12, 13)"),
        ("splits by the names of cards", "K and 10 are the same number in training", [
            ("split_of", "_split_table()[tuple(sorted(card_numbers(cards, RULES[\"ten\"])))]",
             "list(_split_table().values())[sum(map(ord, ''.join(sorted(cards)))) * 101 % 715]")]),
        ("holds nothing out", "is the hand in the table?",
         "_split_table()[tuple(sorted(card_numbers(cards, RULES[\"ten\"])))]", '"train"')),
    # --- 6
    *of("sft.encode",
        ("does not teach the end of an answer", "a model that never learnt to stop", [
            ("encode", 'mask += [int(turn["learn"])] * len(part)',
             'mask += [int(turn["learn"])] * len(part)\n        if turn["learn"]:\n'
             '            mask[-1] = 0')]),
        ("teaches mistakes as well", "learn: False", 'mask += [int(turn["learn"])] * len(part)',
         'mask += [int(turn["role"] == "assistant")] * len(part)'),
        ("teaches prompts as well", "whose words are they?",
         'mask += [int(turn["learn"])] * len(part)', "mask += [1] * len(part)"),
        ("teaches prompts as well, the very first token included", "whose words are they?", [
            ("encode", 'mask += [int(turn["learn"])] * len(part)', "mask += [1] * len(part)"),
            ("encode", "mask[0] = 0 ", "mask[0] = 1 ")]),
        ("leaves the end token out", "answer_ids closes an answer",
         'part = answer_ids(backbone, turn["content"])',
         'part = answer_ids(backbone, turn["content"])[:-1]'),
        ("loses the picture", "a blind policy", '"picture": picture', '"picture": None'),
        ("has the mask one token late", "mask[i] belongs to ids[i]",
         "mask[0] = 0 ", "mask = [0] + mask[:-1] "),
        ("has the mask one token early", "mask[i] belongs to ids[i]",
         "mask[0] = 0 ", "mask = mask[1:] + [0] "),
        ("opens every user turn as if it were the first", "first=, in user_ids", "first=i == 0",
         "first=True"),
        ("tokenises the whole text at once", "tokens can merge across a border", [
            ("encode", "        ids += part\n", "        ids += part\n    for i in "
             "range(len(ids) - 2, -1, -1):\n        if ids[i] == 62 and ids[i + 1] == 60:\n"
             "            ids[i:i + 2] = [7]\n            del mask[i]\n    for turn, part in []:\n")
        ])),
    # --- 7
    *of("sft.token_logprobs",
        ("scores a token by the state at its own position", "hidden[t] has READ token t",
         "hidden[:, :-1][wanted]", "hidden[:, 1:][wanted]"),
        ("scores the token after each one that is asked for", "which state predicts token t?",
         "wanted = mask[:, 1:].bool()", "wanted = mask[:, :-1].bool()"),
        ("lets no gradient through", "log p is what learns", [
            ("token_logprobs", "[wanted][:, None])[:, 0]", "[wanted][:, None])[:, 0].detach()")]),
        ("scores a token by the state two before it", "which state predicts token t?",
         "hidden[:, :-1][wanted]", "hidden.roll(1, 1)[:, :-1][wanted]"),
        ("forgets the temperature", "softmax(logits / temperature)",
         "logits = logits.float() / temperature", "logits = logits.float()"),
        ("multiplies by the temperature", "softmax(logits / temperature)",
         "logits.float() / temperature", "logits.float() * temperature"),
        ("divides log p by the temperature, after the softmax", "softmax(logits / temperature)", [
            ("token_logprobs", "logits.float() / temperature", "logits.float()"),
            ("token_logprobs", "torch.log_softmax(logits, dim=-1)",
             "torch.log_softmax(logits, dim=-1) / temperature")]),
        ("bans tokens after the softmax", "what is left must add up to 1", [
            ("token_logprobs", "    if backbone.banned:\n        logits[:, backbone.banned] = "
             "-torch.inf\n", ""),
            ("token_logprobs", "torch.log_softmax(logits, dim=-1)",
             "torch.log_softmax(logits, dim=-1).index_fill(1, torch.tensor(backbone.banned).long(),"
             " -torch.inf)")]),
        ("does not ban tokens", "backbone.banned", "if backbone.banned:", "if False:"),
        ("takes the softmax over the tokens of the batch", "over which dimension?",
         "torch.log_softmax(logits, dim=-1)", "torch.log_softmax(logits, dim=0)"),
        ("gives the entropy the wrong sign", "entropy is never negative", "entropy = -(",
         "entropy = (")),
    # --- 8
    *of("sft.sft_loss",
        ("takes the mean of the means of micro-batches", "sum / total, whatever the pieces", [
            ("sft_loss", "loss = -logprobs.sum() / total",
             "loss = -logprobs.mean() / -(-len(rows) // micro_batch)")]),
        ("adds up the means of micro-batches", "sum / total, whatever the pieces",
         "loss = -logprobs.sum() / total", "loss = -logprobs.mean()"),
        ("has the sign of log p, not of a loss", "a loss is minimised",
         "loss = -logprobs.sum() / total", "loss = logprobs.sum() / total"),
        ("divides by all tokens, prompts as well", "whose tokens are counted?",
         'total = sum(sum(row["mask"]) for row in rows)',
         'total = sum(len(row["ids"]) for row in rows)'),
        ("does not show the model its pictures", "what does batch return?",
         "ids, pictures)\n", "ids)\n"),
        ("divides by the number of conversations", "a mean over tokens",
         'total = sum(sum(row["mask"]) for row in rows)', "total = len(rows)"),
        ("leaves the sum a sum", "a mean over tokens",
         'total = sum(sum(row["mask"]) for row in rows)', "total = 1"),
        ("counts padding as tokens fed", "padding is not fed",
         'fed += sum(len(row["ids"]) for row in part)', "fed += ids.numel()"),
        ("forgets the gradient", "backward=True", "if backward:\n            loss.backward()",
         "if False:\n            loss.backward()"),
        ("always goes backward", "backward=False", [
            ("sft_loss", "torch.set_grad_enabled(backward)", "torch.set_grad_enabled(True)"),
            ("sft_loss", "if backward:\n", "if True:\n")]),
        ("learns prompts, too", "mask", "ids, mask, pictures = batch(backbone, part)",
         "ids, mask, pictures = batch(backbone, [r | {\"mask\": [0] + [1] * "
         "(len(r[\"ids\"]) - 1)} for r in part])")),
    # --- 9
    *of("evaluate.draw",
        ("draws at the temperature and reports log p at 1", "which policy played?",
         ", logprobs.gather(1, token)", ", torch.log_softmax(logits, dim=-1).gather(1, token)"),
        ("draws at temperature 1 and reports log p at the temperature", "which policy played?",
         "torch.multinomial(logprobs.exp(), 1, generator=generator)",
         "torch.multinomial(logits.softmax(-1), 1, generator=generator)"),
        ("forgets the temperature", "softmax(logits / temperature)",
         "logits / (temperature or 1.0)", "logits"),
        ("returns p for log p", "log p", ", logprobs.gather(1, token)",
         ", logprobs.exp().gather(1, token)"),
        ("draws with the same dice each time", "a generator goes on from draw to draw",
         "logprobs.exp(), 1, generator=generator", "logprobs.exp(), 1, "
         "generator=torch.Generator().manual_seed(0)"),
        ("draws from the global generator", "results must be the same again", [
            ("draw", ", generator=generator", "")]),
        ("knows no temperature 0", "the likeliest token, always",
         "if temperature > 0", "if True"),
        ("takes the likeliest token", "a policy that explores",
         "torch.multinomial(logprobs.exp(), 1, generator=generator)",
         "logits.argmax(-1, keepdim=True)")),
    # --- 10
    *of("rl.conversations",
        ("reads V on the first token of the answer", "a baseline must not know the action",
         'len(row["ids"]) - 1', 'len(row["ids"])'),
        ("reads V one token too early", "the last token BEFORE the answer",
         'len(row["ids"]) - 1', 'len(row["ids"]) - 2'),
        ("reads V at the end of the answer", "a baseline must not know the action",
         'len(row["ids"]) - 1', 'len(row["ids"]) + len(turn.answer_ids) - 1'),
        ("learns prompts and messages", "which tokens did the policy choose?",
         "[0] * len(turn.prompt_ids)", "[1] * len(turn.prompt_ids)"),
        ("leaves the end token out of the mask", "the policy chose to end",
         "[1] * len(turn.answer_ids)", "[1] * (len(turn.answer_ids) - 1) + [0]"),
        ("has the mask one token late", "mask[i] belongs to ids[i]",
         "[0] * len(turn.prompt_ids) + [1] * len(turn.answer_ids)",
         "[0] * (len(turn.prompt_ids) + 1) + [1] * (len(turn.answer_ids) - 1)"),
        ("makes a row of every try", "the tries of one conversation share a pass",
         "if turn.new_conversation:", "if True:"),
        ("makes a row of every episode", "new_conversation", "if turn.new_conversation:",
         "if k == 0:"),
        ("counts the tries anew in each row", "the number of the try runs on",
         'row["tries"].append((e, k))', 'row["tries"].append((e, len(row["tries"])))'),
        ("loses the picture", "a blind policy", '"picture": turn.picture', '"picture": None')),
    # --- 11
    *of("rl.score",
        ("reads V one token late", "a baseline must not know the action", "hidden[row, before]",
         "hidden[row, before + 1]"),
        ("reads V one token early", "value_at", "hidden[row, before]", "hidden[row, before - 1]"),
        ("reads V at the end of the conversation", "value_at", "hidden[row, before]",
         "hidden[row, [len(rows[i][\"ids\"]) - 1 for i in row]]"),
        ("does not show the model its pictures", "what does batch return?",
         "ids, pictures)  ", "ids)  "),
        ("forgets the temperature", "which policy played?", "ids, mask, temperature)",
         "ids, mask)"),
        ("lets the critic move the trunk unasked", "value_trunk=False",
         "state if value_trunk else state.detach()", "state"),
        ("has value_trunk the wrong way round", "value_trunk=False: no gradient",
         "state if value_trunk else state.detach()", "state.detach() if value_trunk else state"),
        ("never lets the critic move the trunk", "value_trunk=True",
         "state if value_trunk else state.detach()", "state.detach()")),
    # --- 12
    *of("rl.gae",
        ("pays the value after a success, too", "terminated: no reward can follow",
         "0.0 if terminated else after", "after"),
        ("takes the episode's own last value for the next", "what stands for V_{k+1} at the end?",
         "0.0 if terminated else after", "values[-1]"),
        ("pays nothing after a cut", "truncated: `after`", "0.0 if terminated else after", "0.0"),
        ("swaps the two ends", "terminated is not truncated", "0.0 if terminated else after",
         "after if terminated else 0.0"),
        ("loses lambda", "eq. 2", "gamma * lam * running", "gamma * running"),
        ("loses gamma in the sum", "eq. 2", "gamma * lam * running", "lam * running"),
        ("loses gamma in delta", "eq. 1", "gamma * next_value", "next_value"),
        ("does not take V off", "eq. 1", "gamma * next_value - values[k]", "gamma * next_value"),
        ("runs forwards", "A_k needs A_{k+1}", "reversed(range(len(rewards)))",
         "range(len(rewards))"),
        ("returns A for R", "eq. 3", "return advantages, advantages + values",
         "return advantages, advantages"),
        ("returns the discounted sum of rewards for R", "eq. 3: R = A + V", [
            ("gae", "return advantages, advantages + values",
             "following = torch.zeros_like(values)\n    total = 0.0 if terminated else after\n"
             "    for k in reversed(range(len(rewards))):\n        total = rewards[k] + gamma * "
             "total\n        following[k] = total\n    return advantages, following")]),
        ("changes its argument", "rewards and values belong to the caller",
         "return advantages, advantages + values",
         "values += advantages\n    return advantages, values")),
    # --- 13
    *of("rl.normalised",
        ("divides by n - 1", "the standard deviation of all of the batch", "correction=0",
         "correction=1"),
        ("does not centre", "mean 0", "(advantages - advantages.mean())", "advantages"),
        ("does not scale", "standard deviation 1",
         " / (advantages.std(correction=0) + 1e-8)", ""),
        ("divides by zero when all advantages are the same", "1e-8", " + 1e-8", ""),
        ("divides by the variance", "standard deviation 1", "advantages.std(correction=0)",
         "advantages.var(correction=0)"),
        ("changes its argument", "the advantages belong to the caller",
         "(advantages - advantages.mean())", "advantages.sub_(advantages.mean())")),
    *of("rl.add_advantages",
        ("normalises returns, too", "returns are what the critic has to predict",
         "= returns[at]", "= normalised(returns)[at]"),
        ("normalises each row apart", "over all tries of the batch", [
            ("add_advantages", "= advantages[at]", "= normalised(advantages[at])"),
            ("add_advantages", "normalised(advantages) if can_learn", "advantages if can_learn")]),
        ("normalises each episode apart", "over all tries of the batch", [
            ("add_advantages", "advantages.append(a)", "advantages.append(normalised(a))"),
            ("add_advantages", "normalised(advantages) if can_learn", "advantages if can_learn")]),
        ("gives advantages for returns", "R = A + V", "= returns[at]", "= advantages[at]"),
        ("divides by n - 1", "the standard deviation of all of the batch", [
            ("normalised", "correction=0", "correction=1")]),
        ("does not normalise", "mean 0, standard deviation 1",
         "normalised(advantages) if can_learn", "advantages if can_learn"),
        ("says nothing where the policy may learn", "rl.run asks for the answer: None is no True",
         "return can_learn", "return None if can_learn else False"),
        ("forgets lambda", "eq. 2", "episode.truncated, gamma, lam)",
         "episode.truncated, gamma, 1.0)"),
        ("learns where all tries were paid alike", "what would such a batch teach?",
         "(len(paid) > 1 and len(set().union(*paid)) > 1)", "len(paid) > 1"),
        ("deals advantages out in the order of rows", "(episode, number of the try)", [
            ("add_advantages", "    for row in rows:\n        at =",
             "    left = list(order.values())\n    for row in rows:\n        at ="),
            ("add_advantages", "order[t] for t in", "left.pop(0) for t in")]),
        ("learns where all episodes were paid alike", "what would such a batch teach?",
         "len(episodes) == 1 or (len(paid) > 1 and len(set().union(*paid)) > 1)", "True")),
    # --- 14
    *of("rl.policy_loss",
        ("takes max for min", "which of the two is the pessimist?", "torch.min(", "torch.max("),
        ("has the sign of a reward, not of a loss", "a loss is minimised", "return -torch.min",
         "return torch.min"),
        ("takes the mean", "summed", "clipped * advantages).sum()", "clipped * advantages).mean()"),
        ("trusts the clipped ratio alone", "min of two",
         "torch.min(ratio * advantages, clipped * advantages)", "(clipped * advantages)"),
        ("does not clip", "eq. 4", "ratio.clamp(1 - clip, 1 + clip)", "ratio"),
        ("clips above only", "1 - clip", "ratio.clamp(1 - clip, 1 + clip)",
         "ratio.clamp(max=1 + clip)"),
        ("clips the log ratio", "clamp(ratio, 1 - clip, 1 + clip)",
         "ratio.clamp(1 - clip, 1 + clip)", "log_ratio.clamp(-clip, clip).exp()"),
        ("has the ratio upside down", "new over old", "log_ratio = logprobs - old_logprobs",
         "log_ratio = old_logprobs - logprobs"),
        ("detaches the ratio: nothing is learnt", "the slope", "ratio = log_ratio.exp()",
         "ratio = log_ratio.exp().detach().requires_grad_()\n    ratio = ratio + 0 * log_ratio"),
        ("divides exp(new) by exp(old)", "what is exp(-150) in float32?",
         "ratio = log_ratio.exp()", "ratio = logprobs.exp() / old_logprobs.exp()"),
        ("hands the log ratio out with its graph", "without gradient", "log_ratio.detach()",
         "log_ratio")),
    # --- 15
    *of("rl.value_loss",
        ("takes min for max", "which of the two is the pessimist?", "torch.max(", "torch.min("),
        ("loses the half", "eq. 5", "0.5 * torch.max", "torch.max"),
        ("does not clip, or clips around the return", "around V_old",
         "old_values + (values - old_values)", "returns + (values - returns)"),
        ("clips above only", "-clip and clip", ".clamp(-clip, clip)", ".clamp(max=clip)"),
        ("takes the mean", "summed over tries", "(clipped - returns) ** 2).sum()",
         "(clipped - returns) ** 2).mean()"),
        ("trusts the clipped error alone", "max of two",
         "torch.max((values - returns) ** 2, (clipped - returns) ** 2)",
         "((clipped - returns) ** 2)")),
    *of("rl.explained_variance",
        ("takes the mean square for the variance", "a constant error is no variance",
         "(x - x.mean()).square()", "x.square()"),
        ("takes the mean square of the error for its variance", "a constant error is no variance",
         "float(1 - left", "float(1 - (returns - values).square().mean()"),
        ("swaps values and returns", "Var(R)", "(returns - values, returns)",
         "(returns - values, values)"),
        ("forgets the 1 -", "1 for a perfect critic", "float(1 - left", "float(left"),
        ("divides by a variance of 0", "what can be explained where nothing varies?",
         "if total > 1e-8 else None", "")),
    *of("rl.per_answer",
        ("takes the mean of each answer", "a sum",
         "index_add(0, which, token_values)", "index_add(0, which, token_values) / counts"),
        ("cuts the tokens in equal pieces", "counts", [
            ("per_answer", "torch.repeat_interleave(torch.arange(len(counts), "
             "device=token_values.device), counts)",
             "torch.arange(len(token_values)) * len(counts) // len(token_values)")])),
    # --- 16
    *of("evaluate.wilson",
        ("takes z for z squared", "z * z / n", "z * z / count", "z / count"),
        ("gives Wald's interval", "p +- z sqrt(p (1 - p) / n) is another one", [
            ("wilson", "spread = hits / count, z * z / count", "spread = hits / count, 0.0"),]),
        ("centres on p", "the middle is pulled towards a half", "middle = (p + spread / 2) / (1 + "
         "spread)", "middle = p"),
        ("always takes 1.96", "z is an argument", "    p, spread =",
         "    z = 1.96\n    p, spread ="),
        ("takes 1.645, the 90 % interval", "95 %", "    p, spread =",
         "    z = 1.645\n    p, spread ="),
        ("gives Agresti and Coull's interval", "Wilson's is narrower near 0 and 1", [
            ("wilson", "half = z / (1 + spread) * math.sqrt(p * (1 - p) / count + spread / (4 * "
             "count))", "half = z * math.sqrt(middle * (1 - middle) / (count + z * z))")]),
        ("knows nothing of 0 of 0", "no hands, no knowledge: 0 to 1", "if count == 0",
         "if False")),
    *of("evaluate.gain",
        ("adds the widths up", "independent errors add as squares", [
            ("gain", "math.hypot(p - low_p, high_q - q)", "(p - low_p + high_q - q)"),
            ("gain", "math.hypot(high_p - p, q - low_q)", "(high_p - p + q - low_q)")]),
        ("takes the old from the wrong side", "the low end needs the high end of what was before",
         [("gain", "math.hypot(p - low_p, high_q - q)", "math.hypot(p - low_p, q - low_q)"),
          ("gain", "math.hypot(high_p - p, q - low_q)", "math.hypot(high_p - p, high_q - q)")]),
        ("gives old minus new", "is a rise positive?", "return (p - q, p - q -",
         "return (q - p, p - q -")),
    # --- 17: judged by what it finds
    *of("rl.complaints",
        ("compares counts alone", "counts can agree while log p is a token off",
         "if not gap < limit:", "if False:"),
        ("compares log p on average in float32, too", "one wrong row of many", [
            ("complaints", "gap, limit = gaps.max(), 1e-3 / min(1, temperature)", "pass")]),
        ("asks bf16 for the exactness of float32", "bf16 rounds differently in other batches", [
            ("complaints", 'if backbone.device.type == "cpu" and backbone.model.dtype == '
             "torch.float32:", "if True:")]),
        ("trusts what it is told of the split", "look at the hands that were dealt",
         "not all(in_training(e.env) for e in episodes)",
         'any(e.env.split != "train" for e in episodes)'),
        ("complains of held-out hands where nothing is held out", "--split all",
         'if split == "train" and not', "if not"),
        ("never complains", "plant a bug and look", "return found", "return []"),
        ("always complains", "a clean batch is none of its business", "return found",
         "return found + ['something']"),
        ("lets a log p through that is not a number", "NaN is not above any limit",
         "if not gap < limit:", "if gap >= limit:")),
]

# Planted in a verifier, one by name: each pays for something that is wrong.
ATTACKS = [mutant for mutant in MUTANTS if mutant.says in (
    "does not ask for every card", "takes a set for a multiset",
    "allows numbers that are not in the hand", "believes the right side of the equation",
    "judges the last of several formulas", "reads a-b-c as a-(b-c)", "reads a/b/c as a/(b/c)",
    "forgets that * goes before +", "takes a leading minus",
    "takes digits of other scripts", "does not mind what follows the formula")
    and mutant.function in ("verifier.verify_gp", "verifier.parse_formula")]


def silent(function, says, tells):
    """The mutant of a function that `says` this, as a bug for the hunt."""
    found, = (mutant for mutant in MUTANTS if (mutant.function, mutant.says) == (function, says))
    return Mutant(found.function, found.says, found.hint, found.edits, tells)


# Planted in the whole repository, one by name. rl.py's self-check stops none of them. Numbers in
# `tells` were measured by the command of problem 18, at update 1 where none is named.
HUNTS = [
    silent("rl.gae", "runs forwards", "value_loss 11.1 for 16.2, policy_loss -0.18 for -0.06"),
    silent("rl.gae", "loses lambda", "value_loss 18.6 for 16.2, policy_loss -0.050 for -0.060"),
    silent("rl.add_advantages", "normalises returns, too",
           "value_loss 0.5: half the variance of a unit normal; value_grad_norm 0.3 for 12.7"),
    silent("rl.add_advantages", "normalises each row apart",
           "policy_loss 0.10 for -0.06; a hand with one try always has advantage 0"),
    silent("rl.policy_loss", "takes max for min",
           "approx_kl 0.148 for 0.013; success looks better (update 2: 52 for 40 %)"),
    silent("rl.score", "reads V at the end of the conversation",
           "value_grad_norm 10.6 for 12.7, all other numbers alike: V has read the answer"),
    silent("rl.score", "lets the critic move the trunk unasked",
           "grad_norm 1.10 for 1.04, at update 2 1.28 for 0.94 (3.5 for 0.37 over 24 updates)"),
    silent("rl.value_loss", "loses the half", "value_loss 32.4 for 16.2: twice the clean run's"),
    silent("sft.encode", "does not teach the end of an answer",
           "cut 0.19 for 0.00: answers run to --max-new-tokens"),
    silent("gp_env.split_of", "splits by the names of cards",
           "success 34 for 39 %, cut 0.04 for 0.00, before any update: other hands are dealt"),
]
