"""What playing with a cache and scoring whole conversations saves: a stopwatch, not a test.

One PPO update is done twice in this one process: same model, same hands, same temperature, same
number of epochs and of optimiser steps.

  (a) this repository: the attention cache is kept from try to try (evaluate.play), and one row
      holds all tries of an episode (rl.conversations)
  (b) batched, but naive: before every try generate() reads the whole conversation from its
      beginning, padded on the left; then every try is a training row of its own, with everything
      that was said before it

Both sample by chance, so their token counts differ a little: they are printed too.

With --limits it asks instead how near the machine's limits the two inner loops come: a decode step
against reading all weights once at the memory's speed, a training pass against multiplying
matrices. That is of interest on a GPU with a large model; --random-weights needs no download.

    python tests/benchmark.py                                   256 episodes, the shipped backbone
    python tests/benchmark.py --episodes 32 --threads 1         a quick look
    python tests/benchmark.py --task gp-vl     which share of an update the pictures take
    python tests/benchmark.py --walks          resets and walks a minute of V-IRL
    python tests/benchmark.py --limits --random-weights --model Qwen/Qwen2.5-0.5B-Instruct
"""

import argparse
import copy
import pathlib
import sys
import time
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import evaluate  # noqa: E402
import gp_env  # noqa: E402
import rl  # noqa: E402
import sft  # noqa: E402
import virl_env  # noqa: E402


def run_settings(episodes, task="gp-l"):
    """The flags of rl.py with their defaults, read by its own parser."""
    flags = ["rl.py", "--task", task, "--episodes", str(episodes)]
    with mock.patch("rl.run") as run, mock.patch("sys.argv", flags):
        rl.main()
    return run.call_args.args[0]


def games(args):
    """Environments and seeds of the first update."""
    envs = [gp_env.GeneralPoints(split=args.split, tries=args.tries, **sft.game_options(args))
            for _ in range(args.episodes)]
    return envs, [[1, args.seed, 0, i] for i in range(args.episodes)]


def play_cached(backbone, args):
    """(a) Returns (episodes, rows)."""
    episodes = evaluate.play(backbone, *games(args), args.temperature, args.max_new_tokens,
                             torch.Generator(backbone.device).manual_seed(args.seed))
    return episodes, rl.conversations(episodes)


@torch.no_grad()
def play_naive(backbone, args):
    """(b) Returns (episodes, rows), one row for each try."""
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
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
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
                         "value_at": [len(said[e]) - 1], "tries": [(e, k)]})
            text = backbone.tokenizer.decode(answer, skip_special_tokens=True)
            observation, reward, terminated, truncated, info = envs[e].step(text)
            episodes[e].turns.append(evaluate.Turn(said[e], answer, [], text, reward,
                                                   observation["text"], info["verdict"], True))
            episodes[e].terminated, episodes[e].truncated = terminated, truncated
            if not (terminated or truncated):
                stay.append(e)
                said[e] = said[e] + answer + ([] if ends else end[:1]) + sft.user_ids(
                    backbone, observation["text"], first=False)
        playing = stay
    return episodes, rows


def stopwatch(device):
    """The time, once the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def one_update(backbone, args, play):
    """Play and learn once, on a copy of the model. Returns a dict of seconds and counts."""
    backbone = copy.deepcopy(backbone)
    model, device = backbone.model, backbone.device
    hidden = model.config.get_text_config().hidden_size
    head = rl.build_value_head(hidden, args.seed).to(device)
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr": args.lr},
                                   {"params": list(head.parameters()), "lr": args.value_lr}],
                                  eps=1e-7, weight_decay=0.0)
    clock = [stopwatch(device)]
    episodes, rows = play(backbone, args)
    clock.append(stopwatch(device))
    rl.score_all(backbone, head, rows, args.temperature, args.micro_batch)
    clock.append(stopwatch(device))
    rl.add_advantages(rows, episodes, args.gamma, args.lam)
    # as many optimiser steps for (b) as for (a), whose rows hold all tries of an episode
    share = argparse.Namespace(**vars(args))
    share.minibatch = -(-len(rows) * args.minibatch // args.episodes)
    numbers = rl.ppo_update(backbone, head, optimizer, rows, share, 0)
    clock.append(stopwatch(device))
    collect, score, update = (b - a for a, b in zip(clock, clock[1:]))
    return {"collect": collect, "score": score, "update": update, "whole": clock[-1] - clock[0],
            "rows": len(rows), "tries": sum(len(e.turns) for e in episodes),
            "tokens sampled": sum(sum(r["mask"]) for r in rows),
            "tokens trained": numbers["tokens_trained"]}


def picture_path(backbone, args):
    """Seconds spent on the pictures of one update: draw, preprocess, look, learn to look.

    Each is done alone and as often as in an update: every hand is drawn and preprocessed once, goes
    through eyes and projector in the sampler and in the scoring pass, and with its gradient once an
    epoch. (What the text layers spend on attending to it is not in here.)
    """
    envs, seeds = games(args)
    clock = [stopwatch(backbone.device)]
    seen = [env.reset(seed)[0] for env, seed in zip(envs, seeds)]
    clock.append(stopwatch(backbone.device))
    pictures = [sft.encode_picture(backbone, one["text"], one["image"])[1] for one in seen]
    clock.append(stopwatch(backbone.device))
    parts = [pictures[i:i + args.micro_batch] for i in range(0, len(pictures), args.micro_batch)]
    with torch.no_grad():
        for part in 2 * parts:
            sft.cross_states(backbone, part)
    clock.append(stopwatch(backbone.device))
    for part in args.epochs * parts:
        sft.cross_states(backbone, part)[0].sum().backward()
    clock.append(stopwatch(backbone.device))
    backbone.model.zero_grad(set_to_none=True)
    return dict(zip(("draw", "preprocess", "look", "learn to look"),
                    (b - a for a, b in zip(clock, clock[1:]))))


def time_pictures(backbone, args):
    """Print which share of an update is spent on pictures. Returns {part: seconds}."""
    sft.check_sight(backbone, args.task, "this model")
    if not sft.crossing_layers(backbone.model):
        raise sft.Problem("--task gp-vl: only eyes apart from the text (Mllama) can be timed apart")
    for _ in range(2):                          # the first calls of a process are slower
        spent = picture_path(backbone, args)
    whole = one_update(backbone, args, play_cached)["whole"]
    for part, seconds in spent.items():
        print(f"{part:16s}{seconds:10.2f} s{seconds / whole:9.1%}")
    print(f"{'all of these':16s}{sum(spent.values()):10.2f} s{sum(spent.values()) / whole:9.1%}\n"
          f"{'whole update':16s}{whole:10.2f} s")
    return spent | {"whole": whole}


@torch.no_grad()
def decode_seconds(backbone, rows, prompt=128, new=32):
    """Seconds of one decode step of `rows` conversations after a prompt: (whole, GPU at work).

    Whole: the mean of `new` steps by the clock. At work: what the kernels of a step take in all by
    the profiler's account, so that the rest is waiting for Python to start them. None on a CPU.
    """
    ids = torch.full((rows, prompt), backbone.end_ids[0], device=backbone.device)
    reader = evaluate.Reader(backbone, rows)
    reader.read(ids, torch.ones_like(ids))
    ids = ids[:, :1]
    reader.read(ids, torch.ones_like(ids))
    began = stopwatch(backbone.device)
    for _ in range(new):
        reader.read(ids, torch.ones_like(ids))
    whole = (stopwatch(backbone.device) - began) / new
    if backbone.device.type != "cuda":
        return whole, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(4):
            reader.read(ids, torch.ones_like(ids))
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


def limits(backbone, micro_batches, most_rows=256):
    """Print how near decoding comes to the memory's speed, and training to the matrices'.

    micro_batches: conversations at once in the training pass, each tried. most_rows: of decoding.
    """
    device, model = backbone.device, backbone.model
    size, rate = sft.task_parameters(model), copy_rate(device)
    floor = size * model.dtype.itemsize / rate
    print(f"memory copies at {rate / 1e12:.2f} TB/s (read and written): reading {size:,} weights "
          f"once takes {floor * 1e3:.1f} ms")
    recorded = [(), ("cuda",)] if device.type == "cuda" else [()]
    for rows in (n for n in (1, 32, 64, 128, 256) if n <= most_rows):
        for kinds in recorded:
            with mock.patch("evaluate.Reader.recorded_on", kinds):
                step, busy = decode_seconds(backbone, rows)
            print(f"decode step of {rows:3d} rows: {step * 1e3:6.1f} ms, {step / floor:.1f} times "
                  "that" + ", recorded" * len(kinds)
                  + (f"; GPU at work for {busy * 1e3:.1f} ms of it" if busy else ""), flush=True)
    rate = sft.matrix_rate(device, torch.bfloat16 if device.type == "cuda" else model.dtype)
    print(f"matrices multiply at {rate / 1e12:.1f} TFLOP/s")
    for micro_batch in micro_batches:
        batch = [([backbone.end_ids[0]] * 640, [0] * 384 + [1] * 256)] * (2 * micro_batch)
        for _ in range(2):                      # the first pass also pays for memory
            began = stopwatch(device)
            _, fed = sft.sft_loss(backbone, batch, micro_batch)
            seconds = stopwatch(device) - began
        print(f"forward and backward, {micro_batch} conversations of 640 tokens at once: "
              f"{fed / seconds:,.0f} tokens/s, {6 * size * fed / seconds / rate:.0%} of the rate "
              "of multiplying matrices", flush=True)


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


def main():
    """Time both, print a table."""
    parser = argparse.ArgumentParser(description="Time one PPO update, cached against naive.")
    parser.add_argument("--task", choices=("gp-l", "gp-vl"), default="gp-l",
                        help="gp-l: cached against naive; gp-vl: the share of the pictures")
    parser.add_argument("--episodes", type=int, default=256, help="default 256, as in rl.py")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = all cores")
    parser.add_argument("--model", help="checkpoint (default: the shipped backbone, or a random "
                        "model of its size if there is none)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--out", help="JSON file for the numbers")
    parser.add_argument("--limits", action="store_true", help="measure the inner loops instead")
    parser.add_argument("--walks", action="store_true", help="time the environment V-IRL instead")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--random-weights", action="store_true", help="with --limits")
    parser.add_argument("--grad-checkpoint", action="store_true", help="with --limits")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[4],
                        help="with --limits: conversations at once, one or several to try")
    parser.add_argument("--rows", type=int, default=256, help="with --limits: most rows to decode")
    asked = parser.parse_args()
    if min(asked.episodes, asked.rows, *asked.micro_batch) < 1 or asked.threads < 0:
        raise sft.Problem("--episodes, --rows and --micro-batch must be at least 1, --threads at "
                          "least 0")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    if asked.walks:
        return time_walks()
    device = sft.pick_device(asked.device)
    name = asked.model or str(sft.DEFAULT_MODEL["gp-l"])
    if asked.limits:
        make = sft.random_backbone if asked.random_weights else sft.load_backbone
        how = {"task": "gp-l"} if asked.random_weights else {}
        return limits(make(name, device=device, dtype=asked.dtype,
                           grad_checkpoint=asked.grad_checkpoint, **how),
                      asked.micro_batch, asked.rows)
    if asked.model or pathlib.Path(name).exists():
        backbone = sft.load_backbone(name, device)
    else:
        name = "a random model of the backbone's size"
        tokenizer = sft.build_tokenizer(gp_env.phrases())
        model = sft.build_model(tokenizer, 0).to(device).eval()
        backbone = sft.wrap_backbone(model, tokenizer)
    args = run_settings(asked.episodes, asked.task)
    print(f"{name} on {device} with {torch.get_num_threads()} threads: {args.episodes} episodes of "
          f"up to {args.tries} tries, {args.epochs} epochs, temperature {args.temperature}")
    about = {"model": name, "device": str(device), "threads": torch.get_num_threads(),
             "episodes": args.episodes, "epochs": args.epochs}
    if asked.task == "gp-vl":
        spent = time_pictures(backbone, args)
        if asked.out:
            sft.write_json(asked.out, about | spent)
        return
    for play in (play_cached, play_naive):      # the first calls of a process are slower
        one_update(backbone, run_settings(2), play)
    results = {"cached": one_update(backbone, args, play_cached)}
    torch.manual_seed(args.seed)                # generate() draws from torch's global generator
    results["naive"] = one_update(backbone, args, play_naive)
    print(f"{'':16s}{'cached (a)':>14s}{'naive (b)':>14s}{'b / a':>9s}")
    for part, a in results["cached"].items():
        b = results["naive"][part]
        figure = ",.0f" if isinstance(a, int) else ".2f"
        unit = "" if isinstance(a, int) else ", s"
        print(f"{part + unit:16s}{a:14{figure}}{b:14{figure}}{b / a:9.2f}")
    if asked.out:
        sft.write_json(asked.out, about | results)


if __name__ == "__main__":
    sys.exit(sft.guarded(main))
