"""How the configs of decoder families are read: which keys, what they mean where they are left out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from realflow.errors import InputError, Problem

_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_attention_heads": ("n_head", "num_heads"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_key_value_heads": ("n_head_kv", "num_kv_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "dtype": ("torch_dtype",),
}
_LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}
_DTYPES = ("bfloat16", "float16", "float32", "float64")
_MLA = "kv_lora_rank"


class ConfigReader:
    """A config under reading. What is wrong is collected (a harmless value stands for it meanwhile) and
    raised by `finish`."""

    def __init__(self, values: Mapping[str, Any], file: str = "") -> None:
        self._values, self._file = values, file
        self._problems: dict[str, Problem] = {}

    @property
    def is_fine(self) -> bool:
        """Whether nothing wrong has been found so far."""
        return not self._problems

    def finish(self) -> None:
        """Raises InputError where anything was wrong."""
        if self._problems:
            raise InputError(self._problems.values())

    def refuse(self, key: str, message: str) -> None:
        """Note what is wrong with a key."""
        self._problems.setdefault(key, Problem(message, where=key, file=self._file))

    def get(self, key: str) -> Any:
        """The value of a key or of one of its other names; None where it is missing."""
        names = (key, *_OTHER_NAMES.get(key, ()))
        return next((self._values[name] for name in names if self._values.get(name) is not None), None)

    def has(self, key: str) -> bool:
        """Whether a key is there, be it null."""
        return key in self._values

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; without a default the key must be there."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            self.refuse(key, "is missing; expected a whole number")
        elif isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.refuse(key, f"found {value!r}; expected a whole number of at least {least}")
        else:
            return value
        return max(1, least)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(key, f"found {value!r}; expected true or false")
            return default
        return value

    def listed(self, key: str) -> Sequence[Any] | None:
        """A list, or None where the key is missing."""
        value = self.get(key)
        if value is not None and not isinstance(value, list | tuple):
            self.refuse(key, f"found {value!r}; expected a list")
            return None
        return value

    def said(self, rule: bool | tuple[str, bool]) -> bool:
        """A fact of the family, or of one of its keys with a default."""
        return rule if isinstance(rule, bool) else self.flag(*rule)

    def dtype(self) -> str:
        """Of the stored weights; float32 where it is not said, as in torch."""
        value = self.get("dtype")
        if value is None:
            return "float32"
        if value not in _DTYPES:
            self.refuse("dtype", f"found {value!r}; expected one of {', '.join(_DTYPES)}")
        return str(value)


Slides = Callable[[ConfigReader, int], bool]
"""Whether a layer slides, of a model that has a window."""


def _late(config: ConfigReader, index: int) -> bool:
    return config.flag("use_sliding_window", False) and index >= config.whole("max_window_layers", 28, 0)


def _early(config: ConfigReader, index: int) -> bool:
    inside = index < config.whole("max_window_layers", 28, 0)
    return config.flag("use_sliding_window", False) and inside and index % 2 == 0


def _pattern(config: ConfigReader, index: int) -> bool:
    return (index + 1) % config.whole("sliding_window_pattern", 6) != 0


@dataclass(frozen=True)
class Family:
    """How a family's config is read. `slides` says which layers have the window, where `layer_types` (of
    which `typed` families know) does not; None: none has. `window` is what a missing key means."""

    name: str
    tied: bool = False
    gated: bool = True
    qkv_bias: bool | tuple[str, bool] = False
    out_bias: bool | tuple[str, bool] = False
    mlp_bias: bool | tuple[str, bool] = False
    head_norms: bool = False
    layer_norms: int = 2
    norm: Literal["rms", "layer"] = "rms"
    head_dim: int | None = None
    slides: Slides | None = None
    typed: bool = True
    window: int = 0
    sparse: bool = False
    shared_gate: bool = False

    def layer(self, config: ConfigReader, index: int) -> dict[str, Any]:
        """The fields of layer `index` (see `planner.decoder.Layer`)."""
        found: dict[str, Any] = {"window": self._window(config, index)}
        if not (self.sparse and self._is_sparse(config, index)):
            return found | {"intermediate": config.whole("intermediate_size")}
        experts = config.whole("num_experts")
        active = config.whole("num_experts_per_tok")
        if active > experts:
            config.refuse("num_experts_per_tok", f"found {active}, but there are {experts} experts")
        dense = config.get("moe_intermediate_size") is None
        columns = config.whole("intermediate_size" if dense else "moe_intermediate_size")
        shared = config.whole("shared_expert_intermediate_size", None if self.shared_gate else 0, 0)
        return found | {
            "experts": experts,
            "active": active,
            "expert_columns": columns,
            "shared_columns": shared or config.whole("n_shared_experts", 0, 0) * columns,
            "shared_gate": self.shared_gate and shared > 0,
        }

    def _window(self, config: ConfigReader, index: int) -> int | None:
        absent = 0 if config.has("sliding_window") else self.window
        window = config.whole("sliding_window", absent, 0)
        types = config.listed("layer_types") if self.typed else None
        if types is None:
            slides = self.slides is not None and self.slides(config, index)
        elif index >= len(types):
            config.refuse("layer_types", f"lists {len(types)} layers; expected one for each layer")
            slides = False
        elif types[index] not in _LAYER_TYPES:
            config.refuse(
                "layer_types",
                f"layer {index} is {types[index]!r}; costs are known of full and sliding attention only",
            )
            slides = False
        else:
            slides = _LAYER_TYPES[types[index]]
        if slides and types is not None and not window:
            config.refuse("sliding_window", "is missing, but layer_types has layers that slide")
        return window or None if slides else None

    @staticmethod
    def _is_sparse(config: ConfigReader, index: int) -> bool:
        dense = config.listed("mlp_only_layers") or ()
        step = config.whole("decoder_sparse_step", 1)
        first = config.whole("first_k_dense_replace", 0, 0)
        return index not in dense and (index + 1) % step == 0 and index >= first


def _always(config: ConfigReader, index: int) -> bool:
    return True


def _if_used(config: ConfigReader, index: int) -> bool:
    return config.flag("use_sliding_window", False)


def _every_other(config: ConfigReader, index: int) -> bool:
    return index % 2 == 0


_ATTENTION_BIAS = ("attention_bias", False)
_LLAMA = Family("llama", qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, mlp_bias=("mlp_bias", False),
                typed=False)  # fmt: skip
_QWEN3 = Family("qwen3", qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, head_norms=True, slides=_late)
_GEMMA = Family("gemma", tied=True, qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, head_dim=256,
                typed=False)  # fmt: skip
_USE_BIAS = ("use_bias", True)

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        _LLAMA,
        replace(_LLAMA, name="granite"),
        Family("mistral", slides=_always, typed=False, window=4096),
        Family("mixtral", slides=_always, typed=False, sparse=True),
        Family("phi3", slides=_always, typed=False),
        Family("qwen2", qkv_bias=True, slides=_late, window=4096),
        Family("qwen2_moe", qkv_bias=("qkv_bias", True), slides=_early, window=4096, sparse=True,
               shared_gate=True),
        replace(_QWEN3, head_dim=128, window=4096),
        replace(_QWEN3, name="qwen3_moe", slides=_if_used, typed=False, window=4096, sparse=True),
        _GEMMA,
        replace(_GEMMA, name="gemma2", layer_norms=4, slides=_every_other, typed=True, window=4096),
        replace(_GEMMA, name="gemma3_text", layer_norms=4, head_norms=True, slides=_pattern, typed=True,
                window=4096),
        Family("starcoder2", tied=True, gated=False, qkv_bias=_USE_BIAS, out_bias=_USE_BIAS,
               mlp_bias=_USE_BIAS, norm="layer", slides=_always, typed=False),
    )
}  # fmt: skip


def family_of(config: ConfigReader, assumed: list[str]) -> Family:
    """The family of a config. One that is not known is read as Llama-like, which `assumed` is told."""
    if config.get(_MLA) is not None:
        config.refuse(
            _MLA,
            "this is multi-head latent attention (DeepSeek's), whose costs are not known here; expected "
            "attention with query, key and value heads",
        )
    name = config.get("model_type")
    if not isinstance(name, str):
        config.refuse("model_type", f"found {name!r}; expected a name, such as llama")
        return _LLAMA
    if name in FAMILIES:
        return FAMILIES[name]
    sparse = config.get("num_experts") is not None
    assumed.append(
        f"{name} is not known: taken for Llama-like layers (gated MLP, rotary positions, RMS norms"
        f"{', experts in each layer that its config does not except' if sparse else ''})"
    )
    slides = _if_used if config.has("use_sliding_window") else _always
    return replace(_LLAMA, name=name, typed=True, slides=slides, sparse=sparse)
