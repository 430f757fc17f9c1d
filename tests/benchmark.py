"""What a run would cost, and how fast the parts are: stopwatches and estimates, no tests.

  1. models of a true size with random weights: no download
  2. --dry-run: one update of a run's true size; memory, speed, minutes of the whole run
  3. by default: one update with a cache against the same update done naively
  4. --sampler: seconds of playing 256 hands and 64 walks, here or against another checkout
  5. --limits: how near the inner loops come to the limits of the machine
  6. --walks: walks a minute of V-IRL's environment
  7. the command line; all other flags are those of rl.py (after --dry-run sft: of sft.py)

    python tests/benchmark.py                                   256 hands, the shipped backbone
    python tests/benchmark.py --dry-run --preset paper --random-weights
    python tests/benchmark.py --dry-run sft --task gp-vl --batch 128
    python tests/benchmark.py --sampler --against ../old        both checkouts by turns
    python tests/benchmark.py --limits --random-weights --model Qwen/Qwen2.5-0.5B-Instruct
    python tests/benchmark.py --walks
"""

import argparse
import copy
import ctypes
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

# The checkout to measure: this one, unless `against` has started this file about another.
CHECKOUT = pathlib.Path(os.environ.get("BENCHMARK_CHECKOUT") or
                        pathlib.Path(__file__).resolve().parents[1])
sys.path.insert(0, str(CHECKOUT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import evaluate  # noqa: E402
import gp_env  # noqa: E402
import rl  # noqa: E402
import sft  # noqa: E402
import virl_env  # noqa: E402

# ------------------------------------------------------------------------------------------------
# 1. Random weights
# ------------------------------------------------------------------------------------------------

# Published sizes; what is not said is the class's default.
KNOWN = {
    "meta-llama/Llama-3.2-11B-Vision-Instruct": {
        "model_type": "mllama", "vision_config": {"image_size": 560}},
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl", "tie_word_embeddings": True,
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
        "text_config": {
            "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "intermediate_size": 11008,
            "tie_word_embeddings": True, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}},
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default",
                                                         "rope_theta": 1e6}},
    "Qwen/Qwen2.5-0.5B-Instruct": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default",
                                                         "rope_theta": 1e6}}}
# Names that the processors of Idefics3 and SmolVLM insist on
IDEFICS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
           *(f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5))]


def random_backbone(name, task, device="cpu", grad_checkpoint=False, dtype="float32"):
    """A model of the class and size of `name`, with random weights and the small tokenizer.

    name: a folder with config.json, that file itself, or a key of KNOWN. Returns a Backbone. Raises
    Problem for another name, or a vocabulary that the tokenizer does not fit into.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from backbones.build import CORPORA, build_tokenizer
    try:
        known = KNOWN.get(str(name))
        config = AutoConfig.for_model(**known) if known else AutoConfig.from_pretrained(name)
    except Exception:               # as many types as in load_backbone
        raise sft.Problem(f"--random-weights: {name} is no config.json, no folder with one, and "
                          f"none of {', '.join(KNOWN)}") from None
    tokenizer, mark = build_tokenizer(CORPORA[task.split("-")[0]].phrases()), "<|image|>"
    if config.model_type in ("idefics3", "smolvlm"):
        mark = IDEFICS[0]
        tokenizer.add_special_tokens({"additional_special_tokens": IDEFICS})
        tokenizer.chat_template = tokenizer.chat_template.replace("<|image|>", mark)
    text, image = config.get_text_config(), tokenizer.convert_tokens_to_ids(mark)
    if text.vocab_size < len(tokenizer):
        raise sft.Problem(f"--random-weights: {name} has a vocabulary of {text.vocab_size}, the "
                          f"small tokenizer needs {len(tokenizer)}; give a --model, e.g. "
                          "Qwen/Qwen2.5-0.5B-Instruct")
    for key in ("image_token_index", "image_token_id"):
        if hasattr(config, key):
            setattr(config, key, image)
    sees = getattr(config, "vision_config", None) is not None
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = true_processor(model, tokenizer) if sees else None
    backbone = sft.wrap_backbone(model, tokenizer, name, processor)
    if grad_checkpoint:
        # (newer releases of transformers renamed the call)
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        backbone.checkpointing = True
    return backbone


def true_processor(model, tokenizer):
    """The picture processor of a model that has none in a file: its class's own defaults.

    Raises Problem for a class that is not known here.
    """
    from transformers import Idefics3Processor
    from transformers.models.idefics3 import image_processing_pil_idefics3 as idefics3
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl

    from backbones.build import build_processor
    config, eyes = model.config, model.config.vision_config
    if config.model_type == "mllama":
        return build_processor(model, tokenizer)
    if config.model_type == "qwen2_5_vl":
        images = qwen2_vl.Qwen2VLImageProcessorPil(
            patch_size=eyes.patch_size, merge_size=eyes.spatial_merge_size,
            temporal_patch_size=eyes.temporal_patch_size)
        return SimpleNamespace(image_processor=images, chat_template=tokenizer.chat_template)
    if config.model_type in ("idefics3", "smolvlm"):
        edge = eyes.image_size
        images = idefics3.Idefics3ImageProcessorPil(
            size={"longest_edge": 4 * edge}, max_image_size={"longest_edge": edge})
        return Idefics3Processor(
            images, tokenizer, chat_template=tokenizer.chat_template,
            image_seq_len=(edge // eyes.patch_size) ** 2 // config.scale_factor ** 2)
    raise sft.Problem(f"--random-weights: pictures of {config.model_type} are not known here")


def open_model(args, random_weights):
    """The Backbone of a run's flags, on the device that a run would take."""
    if not random_weights:
        return sft.open_backbone(args, getattr(args, "init", None))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = random_backbone(args.model, args.task, device, args.grad_checkpoint, args.dtype)
    if sft.pictured(args.task) and backbone.processor is None:
        raise sft.Problem(f"--task {args.task}: {args.model} cannot see: {backbone.blind}")
    return backbone


# ------------------------------------------------------------------------------------------------
# 2. Dry runs
# ------------------------------------------------------------------------------------------------


def stopwatch(device):
    """The time, once the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_rate(device, dtype):
    """FLOP/s of multiplying large square matrices here: what nothing can be faster than."""
    size, repeats = (8192, 10) if device.type == "cuda" else (384, 1)
    # Noise: a GPU that multiplies constants takes less power and runs faster than on real numbers.
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0))
    a, best = a.to(dtype), math.inf
    for _ in range(6):
        began = stopwatch(device)
        for _ in range(repeats):                # one alone would also time the wait for it
            a @ a
        best = min(best, (stopwatch(device) - began) / repeats)
    return 2 * size ** 3 / best


def report_costs(backbone, phases, whole):
    """Print what a dry run has measured.

    phases: {name: (seconds, tokens, FLOPs)}; whole: what the run took in all, in seconds. FLOPs are
    those of the model (2 N a token forward, 4 N backward), without what checkpointing repeats and
    without attention, which is small at these lengths.
    """
    device, dtype, kept = backbone.device, backbone.model.dtype, ""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        kept = f" ({torch.cuda.max_memory_reserved(device) / 1e9:.2f} GB with gaps)"
    else:
        import resource                     # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    rate = matrix_rate(device, torch.bfloat16 if device.type == "cuda" else dtype)
    size = sum(p.numel() for p in backbone.model.parameters())
    print(f"dry run: {size:,} parameters in {dtype} on {device}, peak memory {peak / 1e9:.2f} GB"
          f"{kept}, matrices multiply at {rate / 1e12:.2f} TFLOP/s")
    for name, (seconds, tokens, flops) in phases.items():
        print(f"  {name:9s} {seconds:8.1f} s {tokens / seconds:12,.0f} tokens/s "
              f"{flops / seconds / rate:7.1%} of that rate")
    print(f"  a whole run of these flags: about {whole / 60:,.0f} minutes. Nothing was written",
          flush=True)


def dry_sft(backbone, args):
    """Two optimiser steps of sft.py, the second one timed; print what the run would cost."""
    rng, expert = np.random.default_rng(0), sft.ENVIRONMENTS[args.task.split("-")[0]]
    rows = [sft.encode(backbone, expert.expert_conversation(rng, split=args.split,
                                                            **sft.game_options(args)))
            for _ in range(args.batch)]
    parameters = [p for p in backbone.model.parameters() if p.requires_grad]
    optimizer = sft.adamw([{"params": parameters, "lr": args.lr}], (0.9, 0.98))
    for _ in range(2):              # the first one also makes the optimiser's state
        began = stopwatch(backbone.device)
        _, fed = sft.sft_loss(backbone, rows, args.micro_batch)
        sft.take_step(optimizer, [torch.nn.utils.clip_grad_norm_(parameters, 1.0)])
        seconds = stopwatch(backbone.device) - began
    size = sft.task_parameters(backbone.model, sft.pictured(args.task))
    report_costs(backbone, {"step": (seconds, fed, 6 * size * fed)},
                 seconds * args.steps)


def dry_rl(backbone, args):
    """One update of rl.py; print what it cost, and what the run would."""
    play_cached(backbone, argparse.Namespace(**vars(args) | {"episodes": 1, "max_new_tokens": 2}))
    cost = one_update(backbone, args, play_cached)
    size = sft.task_parameters(backbone.model, sft.pictured(args.task))
    learning, read = cost["score"] + cost["update"], cost["tokens read"]
    fed = cost["tokens trained"]
    # evaluations are sampling: at both ends and between, one seen cell more, each game played twice
    cells = 1 + len(evaluate.CURVE_CELLS[args.task]) if args.ood else 2
    hands = args.eval_hands * (2 + args.updates / rl.EVAL_EVERY / 4) * 2 * cells
    # an example of the SFT start is a conversation of one try
    examples = 0 if args.init else sft.start_step(args) * (128 if args.preset else 64)
    report_costs(
        backbone, {"sampling": (cost["collect"], cost["tokens sampled"], 2 * size * read),
                   "update": (learning, fed, 6 * size * fed + 2 * size * read)},
        args.updates * cost["whole"] + hands * cost["collect"] / args.episodes
        + examples * learning / (args.epochs * cost["tries"]))


# ------------------------------------------------------------------------------------------------
# 3. One update, cached against naive: same model, same hands, same temperature, same number of
# epochs and of optimiser steps. Both sample by chance, so their token counts differ a little.
#   (a) this repository: the attention cache is kept from try to try (evaluate.play), and one row
#       holds all tries of an episode (rl.conversations)
#   (b) batched, but naive: before every try generate() reads the whole conversation from its
#       beginning, padded on the left; then every try is a training row of its own, with all that
#       was said before it
# ------------------------------------------------------------------------------------------------


def games(args):
    """Environments and seeds of the first update. Walks go on to their end, whoever walks: noise,
    or a model without its SFT start, would end each at its first position."""
    options = sft.game_options(args) | ({"go_on": True} if args.task.startswith("virl") else {})
    envs = [evaluate.new_game(args.task, split=args.split, tries=args.tries, **options)
            for _ in range(args.episodes)]
    return envs, [[1, args.seed, 0, i] for i in range(args.episodes)]


def play_cached(backbone, args):
    """(a) Returns (episodes, rows)."""
    generator = torch.Generator(backbone.device).manual_seed(args.seed)
    envs, seeds = games(args)
    size, episodes = args.sample_batch or args.episodes, []
    for start in range(0, args.episodes, size):
        episodes += evaluate.play(backbone, envs[start:start + size], seeds[start:start + size],
                                  args.temperature, args.max_new_tokens, generator)
    return episodes, rl.conversations(episodes)


@torch.no_grad()
def play_naive(backbone, args):
    """(b), cards in text. Returns (episodes, rows), one row for each try."""
    device, end = backbone.device, backbone.end_ids
    envs, seeds = games(args)
    episodes, said, rows = [], [], []
    for env, seed in zip(envs, seeds):
        observation, _ = env.reset(seed)
        episodes.append(evaluate.Episode(env, observation["text"]))
        said.append(sft.user_ids(backbone, observation["text"], first=True))
    playing = list(range(len(envs)))
    while playing:
        width = max(len(said[e]) for e in playing)
        ids = torch.tensor([[end[0]] * (width - len(said[e])) + said[e] for e in playing])
        inside = torch.tensor([[0] * (width - len(said[e])) + [1] * len(said[e])
                               for e in playing])
        with sft.precision(backbone):
            out = backbone.model.generate(
                input_ids=ids.to(device), attention_mask=inside.to(device), do_sample=True,
                temperature=args.temperature, top_k=0, top_p=1.0, eos_token_id=end,
                pad_token_id=end[0], max_new_tokens=args.max_new_tokens)[:, width:].tolist()
        stay = []
        for e, answer in zip(playing, out):
            ends = [i for i, token in enumerate(answer) if token in end]
            answer = answer[:ends[0] + 1] if ends else answer
            k = len(episodes[e].turns)
            rows.append({"ids": said[e] + answer, "mask": [0] * len(said[e]) + [1] * len(answer),
                         "value_at": [len(said[e]) - 1], "tries": [(e, k)], "picture": None})
            text = backbone.tokenizer.decode(answer[:-1] if ends else answer)
            observation, reward, terminated, truncated, info = envs[e].step(text)
            episodes[e].turns.append(evaluate.Turn(
                said[e], answer, [], text, reward, observation["text"], info["verdict"], True,
                None, bool(ends)))
            episodes[e].terminated, episodes[e].truncated = terminated, truncated
            if not (terminated or truncated):
                stay.append(e)
                said[e] = said[e] + answer + ([] if ends else end[:1]) + sft.user_ids(
                    backbone, observation["text"], first=False)
        playing = stay
    return episodes, rows


def one_update(backbone, args, play):
    """Play and learn once; the model learns too. Returns a dict of seconds and counts."""
    model, device = backbone.model, backbone.device
    hidden = model.config.get_text_config().hidden_size
    head = rl.build_value_head(hidden, args.seed).to(device)
    optimizer = sft.adamw(
        [{"params": [p for p in model.parameters() if p.requires_grad], "lr": args.lr},
         {"params": list(head.parameters()), "lr": args.value_lr}], (0.9, 0.999))
    clock = [stopwatch(device)]
    episodes, rows = play(backbone, args)
    clock.append(stopwatch(device))
    rl.score_all(backbone, head, rows, args.temperature, args.micro_batch)
    clock.append(stopwatch(device))
    rl.add_advantages(rows, episodes, args.gamma, args.lam)
    # as many optimiser steps for (b) as for (a), whose rows hold all tries of an episode
    share = argparse.Namespace(**vars(args))
    if play is play_naive:
        share.minibatch = -(-len(rows) * args.minibatch // args.episodes)
    numbers = rl.ppo_update(backbone, head, optimizer, rows, share, 0)
    clock.append(stopwatch(device))
    collect, score, update = (b - a for a, b in zip(clock, clock[1:]))
    return {"collect": collect, "score": score, "update": update, "whole": clock[-1] - clock[0],
            "rows": len(rows), "tries": sum(len(e.turns) for e in episodes),
            "tokens sampled": sum(sum(row["mask"]) for row in rows),
            "tokens read": sum(len(row["ids"]) for row in rows),
            "tokens trained": numbers["tokens_trained"]}


def cached_against_naive(backbone, args):
    """Time both, print a table. Returns {"cached": numbers, "naive": numbers}."""
    if args.task != "gp-l":
        raise sft.Problem("the naive loop plays cards in text only: --task gp-l")
    few = argparse.Namespace(**vars(args) | {"episodes": 2})
    results = {}
    for name, play in (("cached", play_cached), ("naive", play_naive)):
        torch.manual_seed(args.seed)            # generate() draws from torch's global generator
        one_update(copy.deepcopy(backbone), few, play)      # the first calls are slower
        results[name] = one_update(copy.deepcopy(backbone), args, play)
    print(f"{'':16s}{'cached (a)':>14s}{'naive (b)':>14s}{'b / a':>9s}")
    for part, a in results["cached"].items():
        b = results["naive"][part]
        figure = ",.0f" if isinstance(a, int) else ".2f"
        unit = "" if isinstance(a, int) else ", s"
        print(f"{part + unit:16s}{a:14{figure}}{b:14{figure}}{b / a:9.2f}")
    return results


# ------------------------------------------------------------------------------------------------
# 4. The sampler, also that of another checkout
# ------------------------------------------------------------------------------------------------

PLAYED = {"gp-l": ("hands", 256), "virl-l": ("walks", 64)}


def time_sampler(task, model, episodes, longest):
    """Play once with the code of CHECKOUT. Returns {"seconds", "cpu", "tokens"} (sampled).

    cpu: seconds that the processor worked for it, which other programs lengthen less. Nothing here
    may need more than the oldest checkout has: `in_checkout` runs it there, too.
    """
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)                    # as a run of the small backbone sets it
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2 ** 31 - 1)
    backbone = sft.load_backbone(model)
    make = gp_env.GeneralPoints if task == "gp-l" else virl_env.Navigation
    for count in (2, episodes):                 # the first games of a process are slower
        envs, seeds = [make() for _ in range(count)], [[1, 0, 0, i] for i in range(count)]
        began, worked = time.perf_counter(), time.process_time()
        played = evaluate.play(backbone, envs, seeds, 0.6, longest,
                               torch.Generator().manual_seed(0))
        seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    return {"seconds": seconds, "cpu": cpu,
            "tokens": sum(len(turn.answer_ids) for e in played for turn in e.turns)}


def sampler(argv, other=None, rounds=3):
    """Time playing with each task's SFT start; print seconds, and those of another checkout.

    argv: flags of rl.py; with --task or --model it is that task alone. other: the folder of the
    other checkout. The two take turns, each time in a process of its own with one thread, so that
    whatever else the machine does falls on both.
    """
    if other and not (pathlib.Path(other) / "evaluate.py").exists():
        raise sft.Problem(f"--against {other}: no evaluate.py there")
    one_task = any(word.split("=")[0] in ("--task", "--model") for word in argv)
    tasks = [rl.flags(argv).task] if one_task else list(PLAYED)
    for task in tasks:
        if task not in PLAYED:
            raise sft.Problem(f"--sampler: --task {' or '.join(PLAYED)}")
        args, (what, count) = rl.flags([*argv, "--task", task]), PLAYED[task]
        given = args.init or (args.model if "--model" in " ".join(argv) else None)
        model = pathlib.Path(given or rl.make_start(args)).resolve()
        longest = sft.answer_length(sft.load_backbone(model), args)
        times = {"here": [], "there": []}
        for _ in range(rounds):
            for place in times if other else ["here"]:
                folder = other if place == "there" else CHECKOUT
                found = in_checkout(folder, [task, str(model), count, longest])
                times[place].append(found)
                print(f"{count} {what}, {place:5s} {found['seconds']:6.2f} s, of them "
                      f"{found['cpu']:6.2f} at work, {found['tokens']:,} tokens", flush=True)
        for clock in ("seconds", "cpu") if other else ():
            ratios = [b[clock] / a[clock] for a, b in zip(times["here"], times["there"])]
            print(f"{count} {what}, {clock:7s} there / here {sorted(ratios)[rounds // 2]:.2f} "
                  f"(median of {', '.join(f'{ratio:.2f}' for ratio in ratios)})", flush=True)


def in_checkout(folder, words):
    """`time_sampler` of these words in a process of its own, with the code in `folder`."""
    told = {"BENCHMARK_CHECKOUT": str(pathlib.Path(folder).resolve()), "OMP_NUM_THREADS": "1",
            "BENCHMARK_SAMPLER": json.dumps(words), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, __file__], env=os.environ | told, capture_output=True,
                          text=True)
    if done.returncode:
        raise sft.Problem(f"--sampler failed in {folder}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------
# 5. Limits of the machine
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode_seconds(backbone, rows, prompt=128, new=32):
    """Seconds of one decode step of `rows` conversations after a prompt: (whole, GPU at work).

    Whole: the mean of `new` steps by the clock. At work: what the kernels of a step take in all by
    the profiler's account, so that the rest is waiting for Python to start them. None on a CPU.
    """
    ids = torch.full((rows, prompt), backbone.end_ids[0], device=backbone.device)
    one = torch.ones(rows, dtype=torch.long, device=backbone.device)
    reader = evaluate.Reader(backbone, rows)
    reader.read(ids, prompt * one)
    ids = ids[:, :1].contiguous()
    reader.read(ids, one)
    began = stopwatch(backbone.device)
    for _ in range(new):
        reader.read(ids, one)
    whole = (stopwatch(backbone.device) - began) / new
    if backbone.device.type != "cuda":
        return whole, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            reader.read(ids, one)
        torch.cuda.synchronize()
    return whole, sum(event.self_device_time_total for event in profile.key_averages()) / 4e6


def copy_rate(device):
    """Bytes a second that go through memory when a large tensor is copied: read and written."""
    source = torch.ones(2 ** (28 if device.type == "cuda" else 24), device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        began = stopwatch(device)
        target.copy_(source)
        best = min(best, stopwatch(device) - began)
    return 2 * source.numel() * source.element_size() / best


def limits(backbone, args):
    """Print how near decoding comes to the memory's speed, and training to the matrices'.

    --episodes: most rows of a decode step; --micro-batch: conversations at once in training.
    """
    device, model = backbone.device, backbone.model
    size, rate = sft.task_parameters(model), copy_rate(device)
    floor = size * model.dtype.itemsize / rate
    print(f"memory copies at {rate / 1e12:.2f} TB/s (read and written): reading {size:,} weights "
          f"once takes {floor * 1e3:.1f} ms")
    recorded = [(), ("cuda",)] if device.type == "cuda" else [()]
    for rows in (n for n in (1, 32, 64, 128, 256) if n <= args.episodes):
        for kinds in recorded:
            with mock.patch("evaluate.Reader.recorded_on", kinds):
                step, busy = decode_seconds(backbone, rows)
                refused = kinds and not evaluate.Reader.recorded_on
            print(f"decode step of {rows:3d} rows: {step * 1e3:6.1f} ms, {step / floor:.1f} times "
                  "that" + ", recorded" * (len(kinds) and not refused)
                  + (f"; GPU at work for {busy * 1e3:.1f} ms of it" if busy else ""), flush=True)
    rate = matrix_rate(device, torch.bfloat16 if device.type == "cuda" else model.dtype)
    print(f"matrices multiply at {rate / 1e12:.1f} TFLOP/s")
    batch = [{"ids": [backbone.end_ids[0]] * 640, "mask": [0] * 384 + [1] * 256,
              "picture": None}] * (2 * args.micro_batch)
    for _ in range(2):                          # the first pass also pays for memory
        began = stopwatch(device)
        _, fed = sft.sft_loss(backbone, batch, args.micro_batch)
        seconds = stopwatch(device) - began
    print(f"forward and backward, {args.micro_batch} conversations of 640 tokens at once: "
          f"{fed / seconds:,.0f} tokens/s, {6 * size * fed / seconds / rate:.0%} of the rate of "
          "multiplying matrices", flush=True)


# ------------------------------------------------------------------------------------------------
# 6. Walks of the expert
# ------------------------------------------------------------------------------------------------


def time_walks(seconds=5):
    """Resets and whole walks of the expert a minute, each answer verified (text, one thread)."""
    env = virl_env.Navigation()
    env.reset(0)                                # the first one also makes the city
    began, walks, tries = time.time(), 0, 0
    while time.time() - began < seconds:
        env.reset(walks)
        over = False
        while not over:
            *_, terminated, truncated, _ = env.step(env.expert_answer())
            over = terminated or truncated
            tries += 1
        walks += 1
    minutes = (time.time() - began) / 60
    print(f"V-IRL in text: {walks / minutes:,.0f} resets and walks a minute, "
          f"{tries / minutes:,.0f} answers")


# ------------------------------------------------------------------------------------------------
# 7. Command line
# ------------------------------------------------------------------------------------------------


def main():
    """One of the measurements."""
    parser = argparse.ArgumentParser(description="Stopwatches and estimates; all other flags are "
                                     "those of rl.py.", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", nargs="?", const="rl", choices=("rl", "sft"), help="one update "
                      "of this run's size, and what the run would cost; writes nothing")
    what.add_argument("--sampler", action="store_true", help="time the sampler")
    what.add_argument("--limits", action="store_true", help="measure the inner loops")
    what.add_argument("--walks", action="store_true", help="time the environment V-IRL")
    parser.add_argument("--against", metavar="FOLDER", help="with --sampler: another checkout")
    parser.add_argument("--random-weights", action="store_true", help="with --dry-run and --limits:"
                        " --model is a config.json or one of " + ", ".join(KNOWN))
    asked, rest = parser.parse_known_args()
    if asked.random_weights and not (asked.dry_run or asked.limits):
        raise sft.Problem("--random-weights: only with --dry-run or --limits")
    if asked.against and not asked.sampler:
        raise sft.Problem("--against: only with --sampler")
    if asked.walks:
        return time_walks()
    if asked.sampler:
        return sampler(rest, asked.against)
    args = (sft if asked.dry_run == "sft" else rl).flags(rest)
    backbone = open_model(args, asked.random_weights)
    sft.freeze(backbone.model, args.freeze)
    args.max_new_tokens = sft.answer_length(backbone, args, getattr(args, "tries", 1))
    if asked.dry_run:
        return (dry_sft if asked.dry_run == "sft" else dry_rl)(backbone, args)
    if asked.limits:
        return limits(backbone, args)
    print(f"{args.init or args.model} on {backbone.device} with {torch.get_num_threads()} threads: "
          f"{args.episodes} episodes of up to {args.tries} tries, {args.epochs} epochs, "
          f"temperature {args.temperature}", flush=True)
    cached_against_naive(backbone, args)


if __name__ == "__main__":
    if "BENCHMARK_SAMPLER" in os.environ:       # started by `in_checkout`
        print(json.dumps(time_sampler(*json.loads(os.environ["BENCHMARK_SAMPLER"]))))
        sys.exit()
    sys.exit(sft.guarded(main))
