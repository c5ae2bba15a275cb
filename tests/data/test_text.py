"""Text to tokens: prompts with and without a chat template, and pairs for supervised training."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHARACTERS, EOS, tiny_tokenizer

from realflow.data.text import encode_pair, encode_prompt
from realflow.errors import InputError

MESSAGES = [{"role": "user", "content": "2+2="}]
SHOWN = "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n"
words = st.text(CHARACTERS, min_size=1, max_size=20)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def bare(tokenizer):
    found = tiny_tokenizer()
    found.chat_template = None
    return found


def test_chat_ends_where_the_assistant_begins(tokenizer):
    assert tokenizer.decode(encode_prompt(tokenizer, "2+2=", True)) == SHOWN
    assert encode_prompt(tokenizer, MESSAGES, True) == encode_prompt(tokenizer, "2+2=", True)


def test_plain_text(tokenizer, bare):
    assert tokenizer.decode(encode_prompt(tokenizer, "2+2=", False)) == "2+2="
    assert encode_prompt(bare, "2+2=", True) == encode_prompt(tokenizer, "2+2=", False)


@settings(deadline=None)
@given(words, words, st.booleans())
def test_pair_is_the_prompt_then_the_completion_then_the_end(prompt, completion, chat):
    tokenizer = tiny_tokenizer()
    tokens, mask = encode_pair(tokenizer, prompt, completion, chat)
    before = encode_prompt(tokenizer, prompt, chat)
    assert tokens[: len(before)] == before and not any(mask[: len(before)])
    assert all(mask[len(before) :]) and len(mask) == len(tokens)
    assert tokenizer.decode(tokens[len(before) :]) == completion + EOS


def test_completion_may_be_one_message(tokenizer):
    message = [{"role": "assistant", "content": "4"}]
    assert encode_pair(tokenizer, MESSAGES, message, True) == encode_pair(tokenizer, "2+2=", "4", True)


def test_max_length_cuts_the_end(tokenizer):
    tokens, mask = encode_pair(tokenizer, "12", "345", False)
    assert mask == [False, False, True, True, True, True]
    assert encode_pair(tokenizer, "12", "345", False, 4) == (tokens[:4], mask[:4])
    assert encode_pair(tokenizer, "12", "345", False, 99) == (tokens, mask)
    with pytest.raises(InputError, match="prompt of 2 tokens leaves nothing"):
        encode_pair(tokenizer, "12", "345", False, 2)


@pytest.mark.parametrize(
    ("prompt", "chat", "message"),
    [
        (7, True, "found int 7"),
        (None, True, "found NoneType"),
        ([], True, "found list"),
        (["hello"], True, "found list"),
        (MESSAGES, False, "chat: false"),
        ("", False, "has no tokens"),
    ],
)
def test_wrong_prompts(tokenizer, prompt, chat, message):
    with pytest.raises(InputError, match=message):
        encode_prompt(tokenizer, prompt, chat)


def test_messages_without_a_template(bare):
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt(bare, MESSAGES, True)


def test_a_template_that_refuses(bare):
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        encode_prompt(bare, MESSAGES, True)


def test_completion_of_a_wrong_type(tokenizer):
    with pytest.raises(InputError, match="completion: found int"):
        encode_pair(tokenizer, "1", 4, True)


SYSTEM = "<|im_start|>system\nbe brief<|im_end|>\n"
USE = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
TURNS = [
    {"role": "assistant", "content": "add(2,2)"},
    {"role": "tool", "content": "4"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes, 4"},
]


def shown(tokenizer, tokens, mask):
    """The text, with what the mask marks in brackets of its own kind."""
    parts, marked = [], False
    for token, own in zip(tokens, mask, strict=True):
        if own != marked:
            parts.append("«" if own else "»")
            marked = own
        parts.append(tokenizer.decode([token]))
    return "".join(parts) + ("»" if marked else "")


def test_system_is_put_before_the_prompt(tokenizer, bare):
    assert tokenizer.decode(encode_prompt(tokenizer, "2+2=", True, "be brief")) == SYSTEM + SHOWN
    own = [{"role": "system", "content": "be long"}, *MESSAGES]
    assert encode_prompt(tokenizer, own, True, "be brief") == encode_prompt(tokenizer, own, True)
    tokens, _ = encode_pair(tokenizer, "2+2=", "4", True, system="be brief")
    assert tokenizer.decode(tokens) == SYSTEM + SHOWN + "4" + EOS
    with pytest.raises(InputError, match="a system message needs a chat template, but the tokenizer has no"):
        encode_prompt(bare, "2+2=", True, "be brief")
    with pytest.raises(
        InputError, match="a system message needs a chat template, but the call says chat: false"
    ):
        encode_prompt(tokenizer, "2+2=", False, "be brief")


def test_of_several_messages_the_assistants_own_are_marked(tokenizer):
    tokens, mask = encode_pair(tokenizer, "2+2=", TURNS, True)
    assert shown(tokenizer, tokens, mask) == (
        f"{SHOWN}«add(2,2)<|im_end|>»\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n"
        "<|im_start|>assistant\n«yes, 4<|im_end|>»"
    )
    whole = tokenizer.apply_chat_template([*MESSAGES, *TURNS], tokenize=False)
    assert tokenizer.decode(tokens) + "\n" == whole, "what the template writes of the whole"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["assistant", "user", "tool"]), words), max_size=5), words)
def test_completions_of_messages_are_what_the_template_writes(turns, first):
    tokenizer = tiny_tokenizer()
    completion = [
        {"role": "assistant", "content": first},
        *({"role": role, "content": text} for role, text in turns),
        {"role": "assistant", "content": "end"},
    ]
    tokens, mask = encode_pair(tokenizer, MESSAGES, completion, True)
    whole = tokenizer.apply_chat_template([*MESSAGES, *completion], tokenize=False)
    assert tokenizer.decode(tokens) + "\n" == whole
    own = "".join(m["content"] + EOS for m in completion if m["role"] == "assistant")
    assert tokenizer.decode([token for token, marked in zip(tokens, mask, strict=True) if marked]) == own


def test_calls_of_tools_are_written_by_the_template(bare):
    bare.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% for call in m.get('tool_calls') or [] %}[{{ call['function']['name'] }}]{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokens, mask = encode_pair(bare, "2+2=", [USE], True)
    assert shown(bare, tokens, mask).endswith("«[add]<|im_end|>»")
    tokens, mask = encode_pair(bare, "2+2=", [USE, TURNS[1], TURNS[3]], True)
    assert shown(bare, tokens, mask).count("«") == 2


def test_a_template_that_writes_earlier_turns_otherwise_is_refused(bare):
    bare.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last or m['role'] != 'assistant' else '...' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encode_pair(bare, "2+2=", TURNS[:1], True)
    with pytest.raises(InputError, match="writes those before it otherwise"):
        encode_pair(bare, "2+2=", TURNS, True)


def test_completions_that_are_refused(tokenizer, bare):
    for completion in ([{"role": "user", "content": "4"}], TURNS[1:], [], [{"role": "assistant"}]):
        with pytest.raises(InputError, match="of which the first is the assistant's"):
            encode_pair(tokenizer, "2+2=", completion, True)
    for other, chat in ((bare, True), (tokenizer, False)):
        with pytest.raises(InputError, match="several messages need a chat template"):
            encode_pair(other, "2+2=", TURNS, chat)


def test_too_long_pairs_are_an_error_where_they_may_not_be_cut(tokenizer):
    assert len(encode_pair(tokenizer, "12", "345", False, 6, cut=False)[0]) == 6
    with pytest.raises(InputError, match="have 6 tokens, more than max_length 5"):
        encode_pair(tokenizer, "12", "345", False, 5, cut=False)
    long = [{"role": "assistant", "content": "1"}, {"role": "user", "content": "2"}, TURNS[3]]
    tokens, mask = encode_pair(tokenizer, "12", long, True)
    cut = encode_pair(tokenizer, "12", long, True, len(tokens) - 9)
    assert cut == (tokens[:-9], mask[:-9])
