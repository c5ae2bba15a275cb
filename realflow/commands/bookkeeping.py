"""What a run costs beside its models: two runs of a model that takes no time, and their traces.

dispatch  from the end of a call to the begin of the next one that waited for it
step      from the end of a step's last call to the begin of the next step's first one, less a dispatch
sample    by how much a step is longer for each further sample, in all calls together
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from realflow import api
from realflow.observe.trace import COMPUTE, Span, read_spans, split_name

STEPS = 8
_FEW, _MANY = (1, 2), (4, 8)
"""Prompts, and samples of each."""
_WARM = 2
_CHAIN = ("rollout", "ref", "credit", "train")
_SPECIAL = ("<pad>", "<end>")
Step = Mapping[str, Span]
_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"


def measure_bookkeeping(folder: Path) -> dict[str, float]:
    """Seconds of `dispatch`, `step` and `sample` on this machine."""
    model = _tiny_model(folder / "tiny")
    few = by_step(_run(folder / "few", model, *_FEW))
    many = by_step(_run(folder / "many", model, *_MANY))
    return summary(few, many, _MANY[0] * _MANY[1] - _FEW[0] * _FEW[1])


def summary(few: Sequence[Step], many: Sequence[Step], samples: int) -> dict[str, float]:
    """The three numbers, from the steps of a run with few samples and of one with `samples` more."""
    dispatch = _dispatch(few)
    return {
        "dispatch": dispatch,
        "step": max(0.0, _between_steps(few) - dispatch),
        "sample": max(0.0, (_period(many) - _period(few)) / samples),
    }


def _run(run_dir: Path, model: Path, prompts: int, samples: int) -> tuple[Span, ...]:
    """The spans of a run."""
    graph = api.load_graph(
        "grpo",
        [
            *(f"model={model}", "dtype=float32", "minibatches=1", "max_new_tokens=2", f"steps={STEPS}"),
            *(f"prompts={prompts}", f"samples={samples}"),
        ],
    )
    api.run(api.plan(graph, devices=1, layouts="d1"), run_dir=run_dir, quiet=True)
    return read_spans(run_dir / "trace.json")


def by_step(spans: Iterable[Span]) -> list[Step]:
    """The calls of each step: call -> its span from its first to its last part. The first steps, which
    warm up, are left out."""
    found: dict[int, dict[str, Span]] = {}
    for span in spans:
        call, step = split_name(span.name)
        if step is not None and call in _CHAIN and span.kind == COMPUTE:
            known = found.setdefault(step, {}).get(call)
            start = min(span.start, known.start) if known else span.start
            end = max(span.end, known.end) if known else span.end
            found[step][call] = Span(span.rank, call, start, end)
    return [found[step] for step in sorted(found)[_WARM:]]


def _dispatch(steps: Sequence[Step]) -> float:
    gaps = [step[after].start - step[before].end for step in steps for before, after in pairwise(_CHAIN[1:])]
    return max(0.0, statistics.median(gaps))


def _between_steps(steps: Sequence[Step]) -> float:
    return statistics.median(other["rollout"].start - one["train"].end for one, other in pairwise(steps))


def _period(steps: Sequence[Step]) -> float:
    return statistics.median(other["rollout"].start - one["rollout"].start for one, other in pairwise(steps))


def _tiny_model(folder: Path) -> Path:
    """A random model whose passes take next to nothing, with a tokenizer of bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_SPECIAL[0], eos_token=_SPECIAL[1])
    fast.chat_template = _TEMPLATE
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "vocab_size": len(names),
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    from realflow.profiling.models import write_random

    write_random(folder, config, "float32")
    fast.save_pretrained(folder)
    return folder
