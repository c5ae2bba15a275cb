"""What is planned and run: models of 10M to 135M parameters, PPO and GRPO, and plans of 1 to 4 ranks."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODELS = Path("runs/estimates/models")
"""Where the small models are made; random weights, the same each time."""

CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"

SIZES: Mapping[str, Mapping[str, int]] = {
    "10m": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 8, "num_key_value_heads": 4},
    "40m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 13,
            "num_attention_heads": 8, "num_key_value_heads": 4},
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """One plan: the devices, the layout of each call (`*`: of all others), and amounts."""

    devices: int
    layouts: Mapping[str, str]
    micro_batch_tokens: int = 4096
    slots: int | None = None


@dataclass(frozen=True)
class Pair:
    """A model and a workload: a graph with its params, the steps that are run, and the plans."""

    model: str
    graph: str
    params: Mapping[str, Any]
    steps: int
    plans: Mapping[str, Setup] = field(default_factory=dict)


def _everything(layout: str, devices: int, **amounts: Any) -> Setup:
    return Setup(devices, {"*": layout}, **amounts)


_GRPO: Mapping[str, Setup] = {
    "d1": _everything("d1", 1),
    "d1-few": _everything("d1", 1, micro_batch_tokens=1024, slots=16),
    "d2": _everything("d2", 2),
    "t2": _everything("t2", 2),
    "p2": _everything("p2", 2),
    "p2-zero-bubble": Setup(2, {"*": "p2", "train": "p2:zero_bubble"}, micro_batch_tokens=1024),
    "train-p2": Setup(2, {"*": "d2", "train": "p2"}),
    "rollout-t2": Setup(2, {"*": "d2", "rollout": "t2"}),
    "apart": Setup(2, {"*": "d1@1", "rollout": "d1@0"}),
    "d4": _everything("d4", 4),
    "d2t2": _everything("d2t2", 4),
}
_PPO: Mapping[str, Setup] = {
    "d1": _everything("d1", 1),
    "d2": _everything("d2", 2),
    "d2-few": _everything("d2", 2, micro_batch_tokens=1024, slots=16),
    "t2": _everything("t2", 2),
    "p2": _everything("p2", 2),
    "critic-apart": Setup(
        2, {"*": "d1@0", "ref": "d1@1", "reward": "d1@1", "values": "d1@1", "train_critic": "d1@1"}
    ),
    "half": Setup(2, {"*": "d2", "train": "d1@0", "train_critic": "d1@1"}),
    "train-t2": Setup(2, {"*": "d2", "train": "t2", "train_critic": "t2:recompute"}),
    "d2p2": _everything("d2p2", 4),
}

PAIRS: Mapping[str, Pair] = {
    "10m-grpo": Pair("10m", "grpo", {"prompts": 8, "samples": 8, "max_new_tokens": 64}, 6, _GRPO),
    "40m-ppo": Pair("40m", "ppo", {"prompts": 16, "max_new_tokens": 48}, 5, _PPO),
    "135m-grpo": Pair("135m", "grpo", {"prompts": 8, "samples": 8, "max_new_tokens": 16}, 5, _GRPO),
}


def overrides(pair: Pair, other: Sequence[str] = ()) -> list[str]:
    """The params of a pair's graph, `other` (key=value) before its own; its models made if they are not
    there."""
    params: dict[str, Any] = {**pair.params, "steps": pair.steps}
    params |= dict(text.split("=", 1) for text in other)
    params["model"] = model_path(pair.model)
    if pair.graph == "ppo":
        params["reward_model"] = make_model(pair.model, reward=True)
    return [f"{name}={value}" for name, value in params.items()]


def model_path(name: str) -> str:
    """What graphs and commands call a model; it is made if it is not there."""
    return "smollm2-135m-instruct" if name == "135m" else str(make_model(name))


def make_model(name: str, *, reward: bool = False) -> Path:
    """The folder of a random Llama of this size, with a tokenizer of single characters."""
    folder = (MODELS / (f"{name}-reward" if reward else name)).resolve()
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    tokenizer = _tokenizer()
    config = LlamaConfig(
        **SIZES[name],
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=SPECIALS.index("<|im_end|>"),
        num_labels=1,
    )
    torch.manual_seed(1)
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """One token for each character."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spelt = {" ": "\u0120", "\n": "\u010a"}  # as byte-level vocabularies spell the two
    names = [*SPECIALS, *(spelt.get(character, character) for character in CHARACTERS)]
    plain = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[], unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
    )
