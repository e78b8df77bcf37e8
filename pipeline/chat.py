"""From a chat to tokens, and which of them are the assistant's own words.

The conversation is rendered by the chat template and tokenised once, whole, exactly as a model will see it.
Supervised is what the assistant has to produce: the content of its turns and the token that ends each turn;
never the role header, which whoever runs the model supplies. Where these parts lie is worked out in
characters and carried over to tokens through the tokenizer's offsets:

- a template with ``{% generation %}`` markers says it itself;
- for any other, a turn begins where the template's generation prompt ends and ends where the rendering of the
  conversation so far ends. Both must be prefixes of the full text. Some templates change earlier turns as the
  conversation goes on (they drop the reasoning, for one); then there is no true answer and it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.errors import ConfigError, DataError

__all__ = ["chat_tokens", "has_generation_markers", "normalise_messages", "supervised_tokens"]

Span = tuple[int, int]
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
STAND_IN = "Zq7tailcacheStandInq7Z"
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}


def chat_tokens(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: list[Any] | None, where: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Tokenise a conversation and say which tokens are supervised.

    Args:
      tokenizer: a fast transformers tokenizer with a chat template.
      messages: role, content and whatever else the template reads.
      tools: JSON schemas of the tools on offer, for templates that show them.
      where: the example, for messages.

    Returns:
      ids [n] int64; wanted [n] bool: the token is to be predicted (no shift has been made).

    Raises:
      DataError: the template refuses the conversation, or does not tell where the assistant's words are.
    """
    if has_generation_markers(tokenizer, tools):
        text, spans = _marked_spans(tokenizer, messages, tools, where)
    else:
        text = _render(tokenizer, messages, tools, where)
        assistants = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        spans = [_turn_span(tokenizer, messages, tools, index, text, where) for index in assistants]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64).reshape(-1)
    return ids, supervised_tokens(encoded["offset_mapping"], spans)


def has_generation_markers(tokenizer: Any, tools: list[Any] | None = None) -> bool:
    """Whether the chat template itself marks what the assistant generates.

    Raises:
      ConfigError: the tokenizer has no chat template, or no character offsets.
    """
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            "the tokenizer has no chat template, which chats need; give one with --chat-template FILE, or "
            f"use the tokenizer of an instruction-tuned model ({error})"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError("chats need a fast tokenizer (one with a tokenizer.json); this one has no offsets")
    return bool(MARKER.search(template))


def normalise_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A chat as a list of {role, content, ...}, from the forms data sets have it in.

    Columns of one type give every message every key; keys that are null are taken out again, since templates
    ask whether a key is there. {from, value} messages get today's names.

    Raises:
      DataError: not a list of messages, or one without a role or content.
    """
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a list of messages, found {type(value).__name__}")
    messages = []
    for index, raw in enumerate(value):
        if not isinstance(raw, dict):
            raise DataError(f"{where}, message {index}: expected {{role, content}}, found {type(raw).__name__}")
        message = _without_nulls(raw)
        if "role" not in message and "from" in message:
            role = str(message.pop("from"))
            message = {
                "role": SHAREGPT_ROLES.get(role, role),
                "content": message.pop("value", None),
                **message,
            }
        if not isinstance(message.get("role"), str):
            raise DataError(f"{where}, message {index}: expected a role, found the keys {sorted(raw)}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise DataError(f"{where}, message {index} ({message['role']}): expected content, found none")
        messages.append(message)
    return messages


def supervised_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens hold at least one character of the spans.

    Args:
      offsets: (first, end) characters of each token, in order.
      spans: (first, end) characters that are supervised.

    Returns:
      [n] bool. A token whose offsets are empty, as byte-level tokenizers give for runs of spaces, stands for
      the characters since the token before it.
    """
    if len(offsets) == 0:
        return np.zeros(0, dtype=np.bool_)
    first, end = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    before = np.concatenate([[0], np.maximum.accumulate(end)[:-1]])
    first = np.where(first == end, np.minimum(before, first), first)
    wanted = np.zeros(len(end), dtype=np.bool_)
    for span_first, span_end in spans:
        wanted |= (first < span_end) & (end > span_first)
    return wanted


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None,
    where: str,
    *,
    prompt: bool = False,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt)
        )
    except Exception as error:  # templates raise what they like: unknown roles, wrong alternation, undefined keys
        raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error


def _marked_spans(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: list[Any] | None, where: str
) -> tuple[str, list[Span]]:
    """The text and the spans of a template that marks them.

    Not through ``return_assistant_tokens_mask``: its way from characters to tokens gives up at the first span
    that begins with a space a byte-level tokenizer trims off its offsets.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(tools=tools)
    render: Any = render_jinja_template
    try:
        texts, spans = render(
            conversations=[list(messages)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:
        raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error
    return str(texts[0]), [(int(first), int(end)) for first, end in spans[0]]


def _turn_span(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None,
    index: int,
    text: str,
    where: str,
) -> Span:
    """The characters of one assistant turn: its content and what ends the turn.

    Args:
      tokenizer: with a chat template without markers.
      messages: the conversation.
      tools: as in `chat_tokens`.
      index: which message.
      text: the whole conversation, rendered.
      where: the example, for messages.
    """
    place = f"{where}, message {index}"
    so_far = _render(tokenizer, messages[: index + 1], tools, place)
    if not text.startswith(so_far):
        raise DataError(
            f"{place}: the chat template renders this assistant turn differently once the conversation goes "
            f"on ({_divergence(text, so_far)}), so what is supervised cannot be told; use a template with "
            "{% generation %} markers (--chat-template), or end the conversations at this turn"
        )
    header, closing = _around_content(tokenizer, messages, tools, index, place)
    first = _turn_start(tokenizer, messages, tools, index, text, header, place)
    turn = so_far[first:]
    if closing is None or not turn.endswith(closing):
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        ends_in_token = any(turn.rstrip().endswith(token) for token in added)
    else:
        ends_in_token = bool(closing.strip())
    return first, first + len(turn.rstrip() if ends_in_token else turn)


def _turn_start(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None,
    index: int,
    text: str,
    header: str | None,
    place: str,
) -> int:
    """Where the assistant's own words begin: after the generation prompt, or where content is put."""
    if index > 0:
        prompted = _render(tokenizer, messages[:index], tools, place, prompt=True)
        if text.startswith(prompted) and prompted != _render(tokenizer, messages[:index], tools, place):
            return len(prompted)
    if header is None or not text.startswith(header):
        raise DataError(
            f"{place}: the chat template's generation prompt is not how this turn begins, so the role header "
            "cannot be told from the content; use a template with {% generation %} markers (--chat-template)"
        )
    return len(header)


def _around_content(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: list[Any] | None, index: int, place: str
) -> tuple[str | None, str | None]:
    """What the template writes before and after a turn's content: found by putting a known word there."""
    if not isinstance(messages[index].get("content"), str):
        return None, None
    stand_in = {**messages[index], "content": STAND_IN}
    rendered = _render(tokenizer, [*messages[:index], stand_in], tools, place)
    header, found, closing = rendered.partition(STAND_IN)
    return (header, closing) if found and STAND_IN not in closing else (None, None)


def _divergence(text: str, other: str) -> str:
    at = next((index for index, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1]), len(text))
    return f"{other[at : at + 30]!r} becomes {text[at : at + 30]!r}"
