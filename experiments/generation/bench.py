"""Native generation against `model.generate`, and how busy its slots are.

    python experiments/generation/bench.py --threads 2 --rounds 5

Speed: 32 prompts x 64 new tokens, bfloat16, sampling at temperature 1, no end token. Both sides
run in this process in turns (A B A B ...), and each round gives one ratio, so that a machine whose
speed drifts does not decide. Occupancy: 256 prompts with log-normal lengths from 4 to 256 tokens
over 32 slots. Prints a table and stores JSON under `results/`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from realflow.engines.generate import GenerateStats, NativeEngine, Prompt
from realflow.graph.types import Sampling
from realflow.models.causal import CausalModel, load_model
from realflow.models.paths import models_dir

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from record import record  # noqa: E402

PROMPTS, NEW_TOKENS, SLOTS = 32, 64, 32
QUEUE, SHORTEST, LONGEST = 256, 4, 256


def main() -> None:
    """Run both measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = models_dir() / options.model
    model = load_model(path, dtype="bfloat16")
    prompts = chat_prompts(path, PROMPTS)
    strangers = random_prompts([len(tokens) for tokens in prompts])
    result: dict[str, Any] = {
        "threads": options.threads,
        "load_average_before": os.getloadavg(),
        "model": options.model,
        "prompt_tokens": sum(map(len, prompts)),
        "speed": compare(model, path, prompts, options.rounds),
        "speed_nothing_in_common": compare(model, path, strangers, options.rounds),
        "floor": floor(model),
        "occupancy": occupancy(model, strangers),
        "load_average_after": os.getloadavg(),
    }
    show(result)
    target = HERE / "results" / f"threads-{options.threads}.json"
    record(target, result)
    print(f"stored in {target.relative_to(HERE.parent.parent)}")


def chat_prompts(path: Path, count: int) -> list[list[int]]:
    """Token ids of one-digit sums in the model's chat format."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [f"What is {index % 10} + {7 * index % 10}?" for index in range(count)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
    ]


def random_prompts(lengths: Sequence[int]) -> list[list[int]]:
    """Random token ids: nothing of one prompt's prefill serves another."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(100, 40_000, (length,), generator=generator).tolist() for length in lengths]


def native(
    model: CausalModel, prompts: Sequence[Sequence[int]], limits: Sequence[int], slots: int
) -> GenerateStats:
    """Generate one sample for each prompt, of exactly `limits` tokens."""
    engine = NativeEngine(
        model,
        Sampling(max_new_tokens=max(limits)),
        slots=slots,
        max_length=max(map(len, prompts)) + max(limits),
        seed=1,
        eos_ids=(),
        tokenizer=None,
    )
    pairs = enumerate(zip(prompts, limits, strict=True))
    engine.feed(Prompt(i, (i,), tuple(tokens), (limit,)) for i, (tokens, limit) in pairs)
    while engine.busy:
        engine.step()
    return engine.stats


def compare(model: CausalModel, path: Path, prompts: Sequence[Sequence[int]], rounds: int) -> dict[str, Any]:
    """Seconds of both sides in turns; tokens a second and the ratio of each round."""
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    longest = max(map(len, prompts))
    pad = theirs.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(tokens)) + list(tokens) for tokens in prompts])
    mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in prompts])

    def hugging_face() -> None:
        out = theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
        )
        assert out.shape[1] == longest + NEW_TOKENS

    prefilled = []

    def ours() -> None:
        stats = native(model, prompts, [NEW_TOKENS] * len(prompts), SLOTS)
        assert stats.tokens == PROMPTS * NEW_TOKENS
        prefilled.append(stats.prefill_tokens)

    hugging_face(), ours()  # warm-up
    turns = [(timed(hugging_face), timed(ours)) for _ in range(rounds)]
    tokens = PROMPTS * NEW_TOKENS
    return {
        "rounds": [{"generate": a, "native": b} for a, b in turns],
        "generate_tokens_per_second": tokens / statistics.median(a["wall"] for a, _ in turns),
        "native_tokens_per_second": tokens / statistics.median(b["wall"] for _, b in turns),
        "median_ratio": statistics.median(a["wall"] / b["wall"] for a, b in turns),
        "median_cpu_ratio": statistics.median(a["cpu"] / b["cpu"] for a, b in turns),
        "native_prefill_tokens": prefilled[-1],
    }


def floor(model: CausalModel) -> dict[str, float]:
    """Seconds of one decode step if only the weights' products ran, and if only they were read."""
    matrices = [p.detach() for p in model.module.parameters() if p.dim() == 2]
    x = {size: torch.randn(SLOTS, size).to(model.dtype) for size in {m.shape[1] for m in matrices}}

    def products() -> None:
        for matrix in matrices:
            torch.nn.functional.linear(x[matrix.shape[1]], matrix)

    def read() -> None:
        for matrix in matrices:
            matrix.view(torch.int16).view(-1).view(torch.int64).sum()

    with torch.inference_mode():
        return {"products_seconds": best(products), "read_seconds": best(read)}


def occupancy(model: CausalModel, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """256 samples of log-normal length over 32 slots."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(QUEUE, generator=generator).mul(0.9).add(3.7).exp().round().long()
    limits = drawn.clamp(SHORTEST, LONGEST).tolist()
    stats = native(model, [prompts[i % len(prompts)] for i in range(QUEUE)], limits, SLOTS)
    return {
        "lengths": {"min": min(limits), "median": statistics.median(limits), "max": max(limits)},
        "busy_until_queue_empty": stats.queued_busy_slot_steps / stats.queued_slot_steps,
        "busy_over_all": stats.busy_slot_steps / stats.slot_steps,
        "tokens_per_second": stats.tokens / stats.seconds,
        "stats": asdict(stats),
    }


def timed(work: Callable[[], None]) -> dict[str, float]:
    """Seconds of one call by the clock, and of processor time: what other processes take is not in it."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def best(work: Callable[[], None], rounds: int = 7) -> float:
    """The shortest of several calls."""
    return min(timed(work)["wall"] for _ in range(rounds))


def show(result: dict[str, Any]) -> None:
    """The table."""
    slots, floors = result["occupancy"], result["floor"]
    rows = []
    for title, key in (("chat prompts", "speed"), ("nothing in common", "speed_nothing_in_common")):
        speed = result[key]
        rows += [
            (f"{title}: model.generate", f"{speed['generate_tokens_per_second']:.0f} tokens/s"),
            (f"{title}: native", f"{speed['native_tokens_per_second']:.0f} tokens/s"),
            (f"{title}: ratio, median of rounds", f"{speed['median_ratio']:.2f}"),
            (f"{title}: ratio of processor seconds", f"{speed['median_cpu_ratio']:.2f}"),
        ]
    rows += [
        ("floor: products alone", f"{SLOTS / floors['products_seconds']:.0f} tokens/s"),
        ("floor: reading the weights", f"{SLOTS / floors['read_seconds']:.0f} tokens/s"),
        ("slot-steps busy until the queue is empty", f"{slots['busy_until_queue_empty']:.1%}"),
        ("slot-steps busy over all", f"{slots['busy_over_all']:.1%}"),
        ("256 log-normal lengths", f"{slots['tokens_per_second']:.0f} tokens/s"),
    ]
    for name, value in rows:
        print(f"{name:<42}{value:>16}")


if __name__ == "__main__":
    main()
