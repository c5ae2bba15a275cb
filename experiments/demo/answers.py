"""Held-out questions of a run, and answers to them by plain Hugging Face `generate`.

What the run saved is judged here without RealFlow's engines: a checkpoint is loaded with
`AutoModelForCausalLM.from_pretrained` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from realflow.data.source import open_source
from realflow.data.text import encode_prompt
from realflow.errors import InputError
from realflow.models.paths import resolve_model
from realflow.planfile import Plan


@dataclass(frozen=True)
class Question:
    """A question that no training step has seen, and its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Checkpoints:
    """Folders of the model before and after training."""

    before: Path
    after: Path


def held_out(plan: Plan) -> list[Question]:
    """The distinct questions of the test split of the plan's data, in a fixed order."""
    spec = dataclasses.replace(plan.graph.data, use="test", shuffle=False)
    source = open_source(spec, seed=plan.graph.seed)
    rows = (source.row(place) for place in range(len(source)))
    return list(dict.fromkeys(Question(row["prompt"], str(row["answer"])) for row in rows))


def checkpoints(run_dir: Path, plan: Plan) -> Checkpoints:
    """The start model and the last checkpoint of the model that the run trained.

    Raises InputError where the run has not saved one.
    """
    (model,) = plan.graph.trained()
    saved = sorted(run_dir.glob(f"checkpoints/step-*/{model}/config.json"))
    if not saved:
        raise InputError(f"{run_dir}/checkpoints: no saved {model}; expected step-NNNNNN/{model}")
    return Checkpoints(resolve_model(plan.graph.models[model].path), saved[-1].parent)


def generate(
    folder: Path,
    questions: Sequence[Question],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 16,
    chat: bool = True,
    seed: int = 0,
    batch: int = 10,
) -> list[list[str]]:
    """`samples` answers to each question, in bfloat16; temperature 0 is greedy.

    The draws of a batch depend on `seed` and the batch's place only, so that two models are given
    the same random numbers.
    """
    disable_progress_bar()  # of loading weights: a quarter of a second
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    how = _how(model, samples, temperature, max_new_tokens)
    answers: list[list[str]] = []
    for start in range(0, len(questions), batch):
        prompts = [encode_prompt(tokenizer, q.prompt, chat) for q in questions[start : start + batch]]
        ids, mask = _left_padded(prompts, how.pad_token_id)
        torch.manual_seed(seed * 1_000_003 + start)
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=mask, generation_config=how)
        texts = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        answers += [texts[row : row + samples] for row in range(0, len(texts), samples)]
    return answers


def _how(model: PreTrainedModel, samples: int, temperature: float, max_new_tokens: int) -> GenerationConfig:
    """Sampling from the whole distribution: transformers would keep only the 50 likeliest tokens."""
    end = model.generation_config.eos_token_id
    pad = end[0] if isinstance(end, list) else end
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_return_sequences=samples,
        eos_token_id=end,
        pad_token_id=pad,
        **(drawn if temperature > 0 else {"do_sample": False}),
    )


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, longest] with padding in front, and their attention mask."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
