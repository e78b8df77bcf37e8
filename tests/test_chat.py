"""Which tokens of a chat are supervised: the assistant's content and what ends its turn, nothing else."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_fixtures import build_tokenizer

from tailcache.pipeline.chat import chat_tokens, normalise_messages, supervised_tokens
from tailcache.storage.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRACKETS = (  # no generation prompt of its own: the user's turn ends with [/INST]
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
FORGETFUL = (  # drops the reasoning of all turns but the last
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING_PROMPT = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")

CHAT = [
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "the mat  café"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "sat on"},
]


def tokenizer_with(template: str, **settings: Any) -> Any:
    tokenizer = build_tokenizer(**settings)
    tokenizer.chat_template = template
    return tokenizer


def supervised_text(tokenizer: Any, messages: list[dict[str, Any]]) -> list[str]:
    """The supervised tokens, each run of neighbours as text."""
    ids, wanted = chat_tokens(tokenizer, messages, None, "example 3")
    assert (
        ids.tolist()
        == tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    )
    runs: list[list[int]] = []
    for index in np.flatnonzero(wanted):
        if index and wanted[index - 1]:
            runs[-1].append(int(ids[index]))
        else:
            runs.append([int(ids[index])])
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING_PROMPT])
def test_content_and_end_of_turn_and_nothing_else(template: str, trim_offsets: bool) -> None:
    tokenizer = tokenizer_with(template, trim_offsets=trim_offsets)
    assert supervised_text(tokenizer, CHAT) == ["the mat  café<|im_end|>", "sat on<|im_end|>"]


def test_markers_and_prefixes_agree_token_for_token() -> None:
    marked, plain = tokenizer_with(MARKED), tokenizer_with(CHATML)
    for chat in (CHAT, CHAT[:2], [{"role": "system", "content": "be brief"}, *CHAT]):
        one, two = chat_tokens(marked, chat, None, "x"), chat_tokens(plain, chat, None, "x")
        assert np.array_equal(one[0], two[0])
        assert np.array_equal(one[1], two[1])


@given(st.text(alphabet="ab \n<é", max_size=12), st.text(alphabet="xy \n>é", min_size=1, max_size=12))
def test_any_content_is_supervised_whole(question: str, answer: str) -> None:
    chat = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "more"},
    ]
    text = "".join(supervised_text(SHARED, chat))
    assert text.endswith(answer + "<|im_end|>")
    assert text[: -len(answer + "<|im_end|>")].strip() == ""  # a merge of the header's line break with the content's


SHARED = tokenizer_with(CHATML)


def test_a_template_whose_prompt_is_the_user_turn() -> None:
    assert supervised_text(tokenizer_with(BRACKETS), CHAT) == [" the mat  café </s>", " sat on </s>"]


def test_without_an_end_token_the_line_break_ends_the_turn() -> None:
    assert supervised_text(tokenizer_with(PLAIN), CHAT) == [" the mat  café\n", " sat on\n"]


def test_a_chat_that_begins_with_the_assistant() -> None:
    assert supervised_text(tokenizer_with(CHATML), CHAT[1:])[0] == "the mat  café<|im_end|>"


def test_word_level_offsets_do_not_reach_into_the_next_header() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    tokenizer = tokenizer_with(template, kind="wordlevel")
    chat = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat on"},
        {"role": "user", "content": "the mat"},
    ]
    assert supervised_text(tokenizer, chat) == ["sat on"]


def test_nothing_is_supervised_without_an_assistant() -> None:
    ids, wanted = chat_tokens(tokenizer_with(CHATML), CHAT[:1], None, "x")
    assert len(ids)
    assert not wanted.any()


def test_tool_calls_are_supervised_from_the_prompt_to_the_end() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.tool_calls %}"
        "{{ 'call ' + m.tool_calls[0].name }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = normalise_messages(
        [
            {"role": "user", "content": "the cat", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "sat"}]},
            {"role": "tool", "content": "mat", "tool_calls": None},
            {"role": "assistant", "content": "on", "tool_calls": None},
        ],
        "x",
    )
    assert "tool_calls" not in chat[0]
    tokenizer = tokenizer_with(template)
    assert supervised_text(tokenizer, chat) == ["call sat<|im_end|>", "on<|im_end|>"]


def test_a_template_that_rewrites_history_is_refused_by_name() -> None:
    chat = [dict(message) for message in CHAT]
    chat[1]["content"] = "hm</think>yes"
    with pytest.raises(DataError, match=r"example 3, message 1: .*differently once the conversation goes on"):
        chat_tokens(tokenizer_with(FORGETFUL), chat, None, "example 3")
    assert supervised_text(tokenizer_with(FORGETFUL), chat[:2]) == ["hm</think>yes<|im_end|>"]


def test_a_template_that_refuses_says_so() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"example 3: .*roles must alternate"):
        chat_tokens(tokenizer_with(template), CHAT, None, "example 3")


def test_no_template_is_explained() -> None:
    with pytest.raises(ConfigError, match="--chat-template"):
        chat_tokens(build_tokenizer(), CHAT, None, "x")


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        {"role": ["user", "assistant"], "content": ["a", "b"]},
        [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b", "name": None}],
    ],
)
def test_the_forms_chats_come_in(value: Any) -> None:
    assert normalise_messages(value, "x") == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "x: expected a list of messages, found str"),
        (["hello"], "x, message 0: expected"),
        ([{"content": "a"}], "message 0: expected a role"),
        ([{"role": "user"}], r"message 0 \(user\): expected content"),
    ],
)
def test_what_is_not_a_chat_is_refused(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        normalise_messages(value, "x")


def test_empty_offsets_stand_for_the_characters_since_the_token_before() -> None:
    offsets = [(0, 3), (5, 5), (5, 8), (8, 8)]  # the second stands for the two spaces at 3 and 4
    assert supervised_tokens(offsets, [(3, 5)]).tolist() == [False, True, False, False]
    assert supervised_tokens(offsets, [(5, 8)]).tolist() == [False, False, True, False]
    assert supervised_tokens([], [(0, 4)]).tolist() == []
