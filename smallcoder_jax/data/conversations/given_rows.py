"""Converts a row of a data set to a conversation, for the columns and formats that such data sets have.

Everything in a row is used, or the row is rejected with the name of what is not supported: silently omitting a turn, an
image or a mark would make it another conversation. Texts are not changed, because code needs its indentation and its
last newline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smallcoder_jax.base.files import MAX_DEPTH, check_depth, parse_json
from smallcoder_jax.data.sources.cells import text_of, without_gaps
from smallcoder_jax.tokenizers.chat import Conversation, content_text
from smallcoder_jax.tokenizers.chat_wire import from_wire

# Alternative names of columns. The first that is not empty in a row is used.
ASKED = ("instruction", "question", "prompt", "query", "problem")
MORE = ("input", "context")
ANSWERED = ("output", "answer", "completion", "response", "solution")
SYSTEM = ("system", "system_prompt")
TALKS = ("messages", "conversations", "conversation")
# A row with a value in one of these columns is rejected, because they are not supported.
UNUSED = ("image", "images", "video", "videos", "audio", "audios", "functions", "function_call")
ASKING = (*ASKED, *MORE, *SYSTEM, *TALKS, "history", "tools")
WANTED = (*ASKING, *ANSWERED, *UNUSED)
EXPECTED = (
    f"one of {', '.join(TALKS[:2])}, whose items have role and content or from and value; or one of "
    f"{', '.join(ASKED)}, perhaps {', '.join((*MORE, 'history'))}, with one of {', '.join(ANSWERED)}; perhaps "
    f"{SYSTEM[0]} and tools"
)
# Keys of a message that describe its origin, not its content.
_ABOUT = frozenset({"id", "index", "timestamp", "created_at", "date", "model", "lang", "language", "hash"})
_ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "bot": "assistant", "model": "assistant", "developer": "system", "observation": "tool",
    "function_response": "tool", "tool_response": "tool", "function": "tool",
}  # fmt: skip
_CALLS = "function_call"  # a role in ShareGPT's format; the value is a call or a list of calls


def conversation_of(row: Mapping[str, Any]) -> tuple[Conversation, int]:
    """The conversation of a row, in which the assistant has a turn that is not the first; and the number of its calls
    that have `parameters` or nothing in place of `arguments`.

    Raises ValueError or UserError that says what is missing, unknown, or not a text.
    """
    row = without_gaps(row)
    refuse_unused(row)
    turns = talk_of(row)
    if _first(row, TALKS) is None:
        turns += answer_turns(_first(row, ANSWERED))
    conversation = from_wire({"messages": turns, "tools": tools_of(row)})
    roles = [message.role for message in conversation.messages]
    if "assistant" not in roles:
        raise ValueError("no turn of the assistant")
    if roles[0] == "assistant":
        raise ValueError("it begins with a turn of the assistant")
    if any(m.role == "assistant" and not m.content.strip() and not m.tool_calls for m in conversation.messages):
        raise ValueError("an empty answer")
    calls = [call.get("function", call) for turn in turns for call in turn.get("tool_calls", ())]
    return conversation, sum("arguments" not in call for call in calls)


def talk_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row without its answer column: system, history and question, or the messages of its list.
    Raises ValueError where there are none."""
    listed = _first(row, TALKS)
    asked = _first(row, ASKED)
    if isinstance(asked, list) and listed is None:  # prompt and completion are lists of messages
        listed, asked = asked, None
    if listed is not None:
        turns = turns_of(listed)
    else:
        question = "\n\n".join(text for text in (text_of(asked), text_of(_first(row, MORE))) if text.strip())
        if not question:
            raise ValueError("no question" if any(name in row for name in (*ASKED, *MORE)) else "no column of a talk")
        turns = [*_history(row.get("history")), {"role": "user", "content": question}]
    system = text_of(_first(row, SYSTEM))
    if not system.strip():
        return turns
    if turns and turns[0].get("role") == "system":
        if turns[0].get("content") != system:
            raise ValueError("a system turn and another text in the column system; expected one of them")
        return turns
    return [{"role": "system", "content": system}, *turns]


def answer_turns(answer: Any) -> list[dict[str, Any]]:
    """The messages of an answer: a text, a message or a list of messages. Raises ValueError for an empty text."""
    if isinstance(answer, dict):
        return turns_of([answer])
    if isinstance(answer, list):
        return turns_of(answer)
    text = text_of(answer)
    if not text.strip():
        raise ValueError("no answer")
    return [{"role": "assistant", "content": text}]


def tools_of(row: Mapping[str, Any]) -> list[Any]:
    """The available functions of a row, whose column holds a list or its JSON."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools) if tools.strip() else None
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise ValueError(f"tools is a {type(tools).__name__}; expected a list of functions, or its JSON")
    check_depth(tools, MAX_DEPTH // 2)  # stored records nest them deeper than the row, and have to be readable
    return tools


def refuse_unused(row: Mapping[str, Any]) -> None:
    """Raises ValueError for a row with a value in a column that is not supported."""
    if found := [name for name in UNUSED if row.get(name) not in (None, "", [], {})]:
        raise ValueError(f"the column {found[0]} cannot be used")


def turns_of(listed: Any) -> list[dict[str, Any]]:
    """Messages in the format of OpenAI's API, from a list, or its JSON, of messages with `role` and `content` or with
    `from` and `value`."""
    if isinstance(listed, str):
        listed = parse_json(listed)
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not all(isinstance(i, Mapping) for i in listed):
        raise ValueError(f"the messages are {listed!r:.80}; expected a list of objects")
    return [_turn({key: item for key, item in turn.items() if item is not None}) for turn in listed]


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    if "from" in turn and "role" not in turn:
        turn = {{"from": "role", "value": "content"}.get(key, key): item for key, item in turn.items()}
    role = turn.get("role")
    if isinstance(role, str):
        role = turn["role"] = _ROLES.get(role, role)
    turn = {key: item for key, item in turn.items() if key not in _ABOUT}
    for key in ("weight", "train"):  # marks of turns to train on, which all are
        if turn.get(key) in (1, True):
            turn.pop(key)
    if "content" in turn:  # unified, because the turns of two answers are compared
        turn["content"] = content_text(turn["content"], "content")
    if role == _CALLS:
        called = parse_json(text_of(turn.pop("content", None)))
        turn |= {"role": "assistant", "tool_calls": called if isinstance(called, list) else [called]}
    if "function_call" in turn:  # the API's earlier key, for a single call
        turn["tool_calls"] = [turn.pop("function_call")]
    return turn


def _history(history: Any) -> list[dict[str, Any]]:
    if not isinstance(history, Sequence | None) or isinstance(history, str):
        raise ValueError(f"history is {history!r:.80}; expected pairs of a question and an answer")
    turns = []
    for pair in history or ():
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"history holds {pair!r:.80}; expected pairs of a question and an answer")
        turns += [
            {"role": role, "content": text_of(text)} for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return turns


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first column that is not empty; None where all are empty."""
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)
