"""`ChatStars` keeps LangChain's contract and its own."""

import asyncio
import json
import logging
import math
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import FolderMaker
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import (
    ContextOverflowError,
    ModelAPIError,
    ModelInvalidRequestError,
    ModelNotFoundError,
    ModelRateLimitError,
    ModelTimeoutError,
)
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.runnables import ConfigurableField

from langchain_stars import ChatStars
from langchain_stars.acceptance import Calibrated, Constant
from langchain_stars.chat_models import (
    LanguageModelError,
    LanguageModelNotFoundError,
    LanguageModelTimeoutError,
    TooManyRepliesError,
)
from langchain_stars.decoder import GuardExhausted, Segment
from langchain_stars.engine import DeadlineExceededError, EngineError, QueueFullError, engine_for
from langchain_stars.language_models import LocalLanguageModel, load_language_model
from langchain_stars.language_models.base import Chat, Drafting, Request, Sampling
from langchain_stars.rewards import Constraint, Reward, SequenceReward, as_reward, bundled
from langchain_stars.testing import ScriptedLanguageModel, TableReward

Table = dict[str | bytes, float]
WAYS = ("invoke", "stream", "ainvoke", "astream")


def letters(completion: str) -> Table:
    """Up to eight letters, one token each; the reply ends by chance or after the eighth."""
    if len(completion) >= 8:
        return {"": 1.0}
    return {"a": 0.3, "b": 0.3, "é": 0.2, b"\xf0\x9f\x98\x80": 0.1, "": 0.1}


def endless(completion: str) -> Table:
    """Letters for ever."""
    return {"a": 0.5, "b": 0.5}


def says(text: str) -> Callable[[str], Table]:
    """A script of one reply, a character at a time."""

    def script(completion: str) -> Table:
        rest = text[len(completion) :]
        return {rest[:1]: 1.0}

    return script


class Recording(ScriptedLanguageModel):
    """Keeps what it is asked to encode, and in which lanes and partitions it draws."""

    def __init__(
        self, script: Any = letters, *, refused: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(script, **kwargs)
        self.chats: list[list[dict[str, Any]]] = []
        self.lanes: set[str] = set()
        self.partitions: set[str] = set()
        self._refused = refused

    def encode(self, chat: Chat, *, tools: Any = None) -> list[int]:
        if any(message["role"] in self._refused for message in chat):
            raise ValueError(f"no such role in {chat}")
        self.chats.append([dict(message) for message in chat])
        return super().encode(chat, tools=tools)

    def drafting(self, requests: Sequence[Request]) -> Drafting:
        self.lanes |= {request.prefix.lane for request in requests}
        self.partitions |= {request.prefix.partition for request in requests}
        return super().drafting(requests)


def few_b() -> TableReward:
    return TableReward(lambda text: -float(text.count("b")), name="few b", target=0.0, beta=0.5)


def no_accents() -> Constraint:
    return TableReward(lambda text: float("é" not in text), name="plain") >= 0.5


def guarded(script: Any = letters, **settings: Any) -> ChatStars:
    model = script if isinstance(script, ScriptedLanguageModel) else ScriptedLanguageModel(script)
    defaults: dict[str, Any] = {
        "model": model,
        "reward": few_b(),
        "constraints": [no_accents()],
        "segment_size": 2,
    }
    return ChatStars(**{**defaults, **settings})


def unguarded(script: Any = letters, **settings: Any) -> ChatStars:
    return guarded(script, **{"reward": None, "constraints": [], **settings})


def call(chat_model: Any, way: str, prompt: Any = "hi", **kwargs: Any) -> Any:
    """Return the message that one way of calling gives; a stream's chunks added up."""

    def added(chunks: list[AIMessageChunk]) -> AIMessageChunk:
        total = chunks[0]
        for chunk in chunks[1:]:
            total += chunk
        return total

    async def collected() -> list[AIMessageChunk]:
        return [chunk async for chunk in chat_model.astream(prompt, **kwargs)]

    if way == "invoke":
        return chat_model.invoke(prompt, **kwargs)
    if way == "stream":
        return added(list(chat_model.stream(prompt, **kwargs)))
    if way == "ainvoke":
        return asyncio.run(chat_model.ainvoke(prompt, **kwargs))
    return added(asyncio.run(collected()))


# What comes back


@pytest.mark.parametrize("make", [guarded, unguarded])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_four_ways_of_calling_give_the_same_message(
    make: Callable[..., ChatStars], seed: int
) -> None:
    model = make(seed=seed)
    messages = [call(model, way) for way in WAYS]
    for message in messages[1:]:
        assert message.content == messages[0].content
        assert message.response_metadata == messages[0].response_metadata
        assert message.usage_metadata == messages[0].usage_metadata
    assert messages[0].response_metadata["stars"]["seed"] == seed


def test_replies_differ_by_seed_and_the_reported_seed_gives_the_reply_again() -> None:
    model = guarded()
    replies = [model.invoke("hi") for _ in range(8)]
    assert len({reply.text for reply in replies}) > 1
    for reply in replies[:3]:
        seed = reply.response_metadata["stars"]["seed"]
        assert model.invoke("hi", seed=seed).text == reply.text


def test_the_report_stands_on_the_last_chunk_only() -> None:
    chunks = list(guarded(says("hello"), reward=None, segment_size=1).stream("hi"))
    assert [chunk.text for chunk in chunks] == ["h", "e", "l", "l", "o", ""]
    assert all(not chunk.response_metadata for chunk in chunks[:-1])
    assert all(chunk.usage_metadata is None for chunk in chunks[:-1])
    assert [chunk.chunk_position for chunk in chunks] == [None] * 5 + ["last"]
    metadata = chunks[-1].response_metadata
    assert metadata["model_name"] == "scripted"
    assert metadata["model_provider"] == "langchain-stars"
    assert metadata["finish_reason"] == "stop"


def test_the_report_tells_how_each_segment_was_kept() -> None:
    model = guarded(seed=5, constraints=[])
    message = model.invoke("hi")
    stars = message.response_metadata["stars"]
    assert stars["guarded"] is True
    assert stars["policy"] == model._policy().fingerprint  # type: ignore[union-attr]
    assert stars["prompt_reward"] == [0.0]
    for index, segment in enumerate(stars["segments"]):
        assert segment["index"] == index
        assert segment["outcome"] in ("accepted", "fallback")
        assert segment["attempts"] >= 1
        assert math.isfinite(segment["reward"])
        assert segment["threshold"] == 0.0
        assert segment["bound"] in (None, "few b")
    assert sum(s["num_tokens"] for s in stars["segments"]) == stars["num_emitted_tokens"]
    assert stars["num_drafted_tokens"] >= stars["num_emitted_tokens"] + stars["num_rejected_tokens"]
    assert json.loads(json.dumps(message.response_metadata)) == message.response_metadata


def test_an_unguarded_reply_says_so_and_has_the_same_weights() -> None:
    model = guarded(target=0.0, seed=1)
    free = model.unguarded()
    assert model.guarded
    assert not free.guarded
    assert free.model is model.model
    stars = free.invoke("hi").response_metadata["stars"]
    assert stars["guarded"] is False
    assert stars["policy"] is None
    assert {segment["outcome"] for segment in stars["segments"]} == {"unguarded"}
    assert free.invoke("hi").text == unguarded(model.model, seed=1).invoke("hi").text


def test_an_unguarded_reply_streams_token_by_token_and_a_guarded_one_by_segments() -> None:
    text = "hello you"
    free = [chunk.text for chunk in unguarded(says(text), segment_size=4).stream("hi")]
    kept = [chunk.text for chunk in guarded(says(text), segment_size=4).stream("hi")]
    assert free == [*text, ""]
    assert kept == ["hell", "o yo", "u", ""]


def test_last_chunks_of_several_replies_can_be_added_up() -> None:
    model = guarded()
    total = AIMessageChunk(content="")
    lasts = [list(model.stream("x" * number))[-1] for number in range(1, 6)]
    for last in [*lasts, lasts[0]]:
        total += last
    stars = total.response_metadata["stars"]
    assert len(stars["prompt_reward"]) == 6
    assert len(stars["segments"]) == sum(
        len(last.response_metadata["stars"]["segments"]) for last in lasts
    )
    emitted = [last.usage_metadata["output_tokens"] for last in [*lasts, lasts[0]]]
    assert total.usage_metadata is not None
    assert total.usage_metadata["output_tokens"] == sum(emitted)


def test_usage_counts_the_tokens_of_prompt_and_reply() -> None:
    model = unguarded(says("five!"))
    for way in WAYS:
        usage = call(model, way, "four").usage_metadata
        assert usage == {"input_tokens": 4, "output_tokens": 5, "total_tokens": 9}


def test_a_reply_of_nothing_is_one_chunk() -> None:
    model = guarded(says(""))
    assert [chunk.text for chunk in model.stream("hi")] == [""]
    for way in WAYS:
        message = call(model, way)
        assert message.content == ""
        assert message.response_metadata["finish_reason"] == "stop"
        assert message.usage_metadata["output_tokens"] == 0


def test_reaching_max_tokens_leaves_the_reply_open() -> None:
    message = guarded(endless, max_tokens=5).invoke("hi")
    assert len(message.text) == 5
    assert message.response_metadata["finish_reason"] == "length"


def test_a_refusal_comes_after_what_was_shown_and_says_so() -> None:
    never = TableReward(lambda text: float(len(text) <= 2), name="short") >= 0.5
    model = guarded(
        endless, reward=None, constraints=[never], refusal_message="No.", max_attempts=3
    )
    for way in WAYS:
        message = call(model, way, seed=2)
        assert message.content[2:] == "\n\nNo."
        assert message.response_metadata["finish_reason"] == "refusal"
        assert message.usage_metadata["output_tokens"] == 2


def test_segments_are_told_as_they_are_kept() -> None:
    told: list[tuple[Segment, str]] = []
    model = guarded(on_segment=lambda segment, text: told.append((segment, text)), seed=4)
    for free in (model, model.unguarded()):
        for way in WAYS:
            told.clear()
            message = call(free, way)
            assert "".join(text for _, text in told) == message.content
            stars = message.response_metadata["stars"]
            assert [segment.as_dict() for segment, _ in told] == [
                {key: value for key, value in segment.items() if key != "id"}
                for segment in stars["segments"]
            ]


def test_version_1_content_is_one_block_of_text() -> None:
    model = guarded(says("hello"), output_version="v1")
    for way in WAYS:
        message = call(model, way)
        assert [block["type"] for block in message.content] == ["text"]
        assert message.text == "hello"


# Messages in


THREADS: list[tuple[list[BaseMessage], list[dict[str, Any]]]] = [
    (
        [SystemMessage("one"), SystemMessage("two"), HumanMessage("hi"), HumanMessage("you")],
        [
            {"role": "system", "content": "one\n\ntwo"},
            {"role": "user", "content": "hi\n\nyou"},
        ],
    ),
    (
        [
            HumanMessage("hi"),
            AIMessage("a"),
            AIMessage("b"),
            SystemMessage("late"),
            HumanMessage("c"),
        ],
        [
            {"role": "system", "content": "late"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "a\n\nb"},
            {"role": "user", "content": "c"},
        ],
    ),
    (
        [
            HumanMessage(["see ", {"type": "text", "text": "this"}], name="ann"),
            AIMessage(
                [
                    {"type": "text", "text": "looking"},
                    {"type": "tool_use", "id": "1", "name": "look", "input": {"x": 1}},
                ],
                tool_calls=[{"name": "look", "args": {"x": 1}, "id": "1"}],
            ),
            ToolMessage('{"seen": "é"}', tool_call_id="1", name="look"),
            ToolMessage("broken", tool_call_id="2", status="error"),
        ],
        [
            {"role": "user", "content": "see \nthis", "name": "ann"},
            {
                "role": "assistant",
                "content": "looking",
                "tool_calls": [
                    {
                        "type": "function",
                        "id": "1",
                        "function": {"name": "look", "arguments": {"x": 1}},
                    }
                ],
            },
            {"role": "tool", "content": '{"seen": "é"}', "name": "look", "tool_call_id": "1"},
            {"role": "tool", "content": "broken", "tool_call_id": "2"},
        ],
    ),
    (
        [
            ChatMessage("rules", role="developer"),
            ChatMessage("hi", role="user"),
            AIMessage(
                [
                    {"type": "reasoning", "reasoning": "hm"},
                    {"type": "tool_call", "id": "1", "name": "f", "args": {}},
                ]
            ),
            ToolMessage([{"type": "text", "text": "done"}], tool_call_id="1"),
            HumanMessage(""),
        ],
        [
            {"role": "system", "content": "rules"},
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}
                ],
            },
            {"role": "tool", "content": "done", "tool_call_id": "1"},
            {"role": "user", "content": ""},
        ],
    ),
]


@pytest.mark.parametrize(("thread", "chat"), THREADS)
def test_threads_reach_the_template_as_it_wants_them(
    thread: list[BaseMessage], chat: list[dict[str, Any]]
) -> None:
    model = Recording()
    unguarded(model).invoke(thread)
    assert model.chats == [chat]


def test_rewards_read_the_same_thread_as_the_template() -> None:
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(prompts)
        return [0.0] * len(completions)

    model = Recording()
    guarded(model, reward=reward, target=0.0).invoke([SystemMessage("s"), HumanMessage("u")])
    assert seen
    assert all(prompt == model.chats[0] for prompt in seen)


def test_a_last_message_of_the_assistant_is_continued_and_an_empty_one_is_dropped() -> None:
    model = Recording()
    unguarded(model).invoke([HumanMessage("hi"), AIMessage("well, ")])
    unguarded(model).invoke([HumanMessage("hi"), AIMessage("")])
    assert model.chats[0][-1] == {"role": "assistant", "content": "well, "}
    assert model.chats[1][-1] == {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "thread",
    [
        [
            HumanMessage(
                [
                    {"type": "text", "text": "secret"},
                    {"type": "image", "base64": "c2VjcmV0", "mime_type": "a/b"},
                ]
            )
        ],
        [HumanMessage([{"type": "image_url", "image_url": {"url": "secret"}}])],
        [HumanMessage([{"secret": "secret"}])],
        [ChatMessage("secret", role="narrator")],
        [
            HumanMessage("secret"),
            AIMessage("secret", tool_calls=[{"name": "f", "args": {}, "id": "1"}]),
        ],
        [],
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_read_is_refused_without_repeating_it(
    thread: list[BaseMessage], way: str
) -> None:
    with pytest.raises(ValueError, match="message") as caught:
        call(unguarded(), way, thread)
    assert "secret" not in str(caught.value)


def test_a_template_that_refuses_roles_is_given_turns_of_user_and_assistant() -> None:
    model = Recording(refused=("system", "tool"))
    unguarded(model).invoke(
        [
            SystemMessage("be brief"),
            HumanMessage("hi"),
            AIMessage("", tool_calls=[{"name": "f", "args": {"x": "é"}, "id": "1"}]),
            ToolMessage("done", tool_call_id="1"),
            HumanMessage("and?"),
        ]
    )
    assert model.chats == [
        [
            {"role": "user", "content": "be brief\n\nhi"},
            {"role": "assistant", "content": '{"name": "f", "arguments": {"x": "\\u00e9"}}'},
            {"role": "user", "content": "done\n\nand?"},
        ]
    ]


def test_a_template_that_refuses_everything_is_named_and_the_thread_is_not() -> None:
    model = unguarded(Recording(refused=("system", "user")))
    with pytest.raises(ModelInvalidRequestError, match="user") as caught:
        model.invoke("secret")
    assert "secret" not in repr(caught.value)
    assert caught.value.__context__ is None


def test_tokens_are_counted_as_the_model_reads_them(language_model_folder: Path) -> None:
    named = ChatStars(model=str(language_model_folder), reward=None, constraints=[])
    model = load_language_model(str(language_model_folder))
    thread = [SystemMessage("be brief"), HumanMessage("what is a star?")]
    expected = len(
        model.encode(
            [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "what is a star?"},
            ]
        )
    )
    assert named.get_num_tokens_from_messages(thread) == expected
    assert named.invoke(thread, max_tokens=2).usage_metadata["input_tokens"] == expected  # type: ignore[index]
    assert model.decode(named.get_token_ids("a <|end|> star")) == "a <|end|> star"
    assert named.get_num_tokens("a star") == len(named.get_token_ids("a star")) > 0
    assert named.get_num_tokens_from_messages([]) == 0
    kept = trim_messages(
        [HumanMessage("x" * 200), AIMessage("y"), HumanMessage("what is a star?")],
        max_tokens=expected + 12,
        token_counter=named,
    )
    assert [message.text for message in kept] == ["y", "what is a star?"]


# Stop strings


@pytest.mark.parametrize("make", [guarded, unguarded])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("segment_size", [1, 3, 16])
def test_a_stop_string_ends_the_reply_and_no_part_of_it_is_shown(
    make: Callable[..., ChatStars], way: str, segment_size: int
) -> None:
    model = make(says("one, two. STOP three"), segment_size=segment_size)
    message = call(model, way, stop=[". STOP"])
    assert message.content == "one, two"
    assert message.response_metadata["finish_reason"] == "stop"
    assert call(model, way).content == "one, two. STOP three"


@pytest.mark.parametrize("way", WAYS)
def test_stop_strings_of_a_call_replace_those_of_the_chat_model(way: str) -> None:
    model = unguarded(says("abcdef"), stop_sequences="c")
    assert model.stop == ["c"]
    assert call(model, way).content == "ab"
    assert call(model, way, stop=["e"]).content == "abcd"
    assert call(model, way, stop_sequences=["d"]).content == "abc"
    assert call(model, way, stop=[]).content == "abcdef"


# Settings


def test_settings_of_a_call_reach_the_decoder() -> None:
    model = unguarded(lambda text: {"a": 0.6, "b": 0.3, "c": 0.1}, max_tokens=40, seed=0)
    plain = model.invoke("hi").text
    assert set(plain) == {"a", "b", "c"}
    for way in WAYS:
        assert call(model, way).content == plain
        assert call(model, way, temperature=0).content == "a" * 40
        assert call(model, way, top_k=1).content == "a" * 40
        assert set(call(model, way, top_p=0.7).content) == {"a", "b"}
        assert set(call(model, way, min_p=0.4).content) == {"a", "b"}
        assert len(call(model, way, max_tokens=3).content) == 3
        assert call(model, way, seed=1).content != plain
        assert call(model, way, repetition_penalty=9.0).content != plain
    assert model.bind(temperature=0).invoke("hi").text == "a" * 40
    with pytest.raises(ValueError, match="temperature"):
        model.invoke("hi", temperature=-1)
    with pytest.raises(ValueError, match="max_tokens"):
        model.invoke("hi", max_tokens=0)


def test_prompts_are_shared_only_under_a_name_that_is_given() -> None:
    model = Recording(says("x"))
    guarded(model).invoke("hi")
    assert model.partitions == {""}
    guarded(model, partition="ann").invoke("hi")
    guarded(model, partition="ann").invoke("hi", partition="bob")
    assert model.partitions == {"", "ann", "bob"}


def test_a_call_may_name_another_model() -> None:
    other = ScriptedLanguageModel(says("other"), name="other")
    model = guarded(says("own"))
    for way in WAYS:
        message = call(model, way, model=other)
        assert message.content == "other"
        assert message.response_metadata["model_name"] == "other"
        assert message.response_metadata["stars"]["guarded"]
    assert model.invoke("hi").text == "own"


def test_code_of_another_model_does_not_run_because_that_of_the_first_may(
    language_model_folder: Path,
) -> None:
    model = ChatStars(
        model="some/model", reward=None, constraints=[], trust_remote_code=True, revision="main"
    )
    changed = model._for_call(None, {"model": str(language_model_folder)})
    assert not changed.trust_remote_code
    assert changed.revision is None
    with pytest.raises(TypeError, match="trust_remote_code"):
        model.invoke("hi", trust_remote_code=True)


TIGHTER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"target": 0.5}, {"target": -0.5}),
    ({"beta": 0.1}, {"beta": 0.9}),
    ({"alpha": 0.9}, {"alpha": 0.1}),
    ({"horizon": 8}, {"horizon": 99}),
    ({"max_attempts": 30}, {"max_attempts": 1}),
    ({"holdback": 2}, {"holdback": 0}),
    ({"max_takebacks": 3}, {"max_takebacks": 0}),
    ({"reward_timeout": 1.0}, {"reward_timeout": 99.0}),
    ({"on_exhausted": "refuse"}, {"on_exhausted": "fallback"}),
    ({"on_exhausted": "raise"}, {"on_exhausted": "fallback"}),
    ({"segment_size": 2}, {"segment_size": 64}),
    ({"constraints": [few_b() >= -9]}, {"constraints": []}),
    ({"num_candidates": 1}, {"reward": None}),
    ({"refusal_message": "No."}, {"reward": few_b()}),
    ({"max_tokens": 4}, {"schedule": Constant(-9.0)}),
]


@pytest.mark.parametrize(("tighter", "looser"), TIGHTER)
@pytest.mark.parametrize("way", WAYS)
def test_a_call_may_tighten_the_guard_and_never_loosen_it(
    tighter: dict[str, Any], looser: dict[str, Any], way: str
) -> None:
    model = guarded(holdback=1, on_exhausted="best", horizon=16, max_tokens=32, seed=1)
    call(model, way, **tighter)
    [name] = looser
    with pytest.raises(ValueError, match=f"`{name}`"):
        call(model, way, **looser)


def test_constraints_of_a_call_are_added_to_those_of_the_chat_model() -> None:
    own = TableReward(lambda text: -float(text.count("b")), name="own")
    model = guarded(endless, reward=None, constraints=[own >= -3], max_tokens=30, seed=0)
    assert model.invoke("hi").text.count("b") <= 3
    no_a = TableReward(lambda text: -float(text.count("a")), name="no a") >= 0
    message = model.invoke("hi", constraints=[no_a])
    kept, _, refusal = message.text.partition("\n\n")
    assert kept == "bb"
    assert refusal
    assert message.response_metadata["finish_reason"] == "refusal"
    assert "b" not in model.invoke("hi", constraints=[own >= 0]).text
    with pytest.raises(ValueError, match="constraints"):
        model.invoke("hi", constraints=[own >= -4])


def test_a_longer_reply_does_not_lower_the_threshold() -> None:
    model = guarded(max_tokens=16, reward=TableReward(lambda _: -4.0, target=0.0), constraints=[])
    short, long = model._policy(), model._for_call(None, {"max_tokens": 100})._policy()
    assert short is not None
    assert long is not None
    for num_tokens in range(1, 32):
        lower = short.acceptance.schedule.threshold(num_tokens, -4.0)  # type: ignore[union-attr]
        upper = long.acceptance.schedule.threshold(num_tokens, -4.0)  # type: ignore[union-attr]
        assert upper >= lower


def test_a_guard_can_be_put_on_for_a_call() -> None:
    model = unguarded(endless, max_tokens=20, seed=0)
    assert "b" in model.invoke("hi").text
    message = model.invoke("hi", constraints=[few_b() >= 0], on_exhausted="refuse")
    assert "b" not in message.text
    assert message.response_metadata["stars"]["guarded"]


@pytest.mark.parametrize("way", WAYS)
def test_settings_that_nobody_knows_are_refused_for_a_call(way: str) -> None:
    with pytest.raises(TypeError, match="tarket"):
        call(guarded(), way, tarket=9.0)
    with pytest.raises(NotImplementedError, match="tools"):
        call(guarded(), way, tools=[{"name": "f"}])
    assert call(guarded(), way, temperature=None, tools=[], anything=None).content is not None


def test_settings_that_nobody_knows_are_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match="`temprature`"):
        guarded(temprature=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded(api_key="key", max_retries=2, streaming=True, stop_sequences=["x"], timeout=60)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"timeout": 0.0}, "timeout"),
        ({"max_queue": -1}, "max_queue"),
        ({"segment_size": 0}, "segment_size"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"num_candidates": 0}, "num_candidates"),
        ({"num_candidates": "many"}, "num_candidates"),
        ({"on_exhausted": "shrug"}, "on_exhausted"),
        ({"holdback": -1}, "holdback"),
        ({"max_takebacks": -1}, "max_takebacks"),
        ({"reward_timeout": 0.0}, "reward_timeout"),
        ({"alpha": 1.5}, "alpha"),
        ({"beta": -1.0}, "beta"),
        ({"target": math.nan}, "target"),
        ({"horizon": 0}, "horizon"),
        ({"schedule": Constant(0.0), "target": 1.0}, "target"),
        ({"schedule": 0.5}, "schedule"),
        ({"reward": None, "target": 1.0}, "target"),
        ({"device": "cpu"}, "device"),
        ({"model": ""}, "model"),
        ({"model": object()}, "LocalLanguageModel"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        guarded(**settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"reward": 0.5}, "reward"),
        ({"reward": no_accents()}, "reward"),
        ({"constraints": [few_b()]}, "floor"),
        ({"constraints": [0.5]}, "constraint"),
        ({"constraints": 0.5}, "constraints"),
    ],
)
def test_what_is_no_reward_is_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        guarded(**settings)


def test_an_objective_without_a_target_says_how_to_get_one() -> None:
    def brief(completions: list[Any], **_: Any) -> list[float]:
        return [-float(len(completion[0]["content"])) for completion in completions]

    with pytest.raises(ValueError, match=r"`target`.*calibrate"):
        guarded(reward=brief)
    assert guarded(reward=brief, target=-10.0).invoke("hi").text is not None
    assert guarded(reward=brief, schedule=Calibrated(thresholds=(-9.0,), segment_size=4))


def test_settings_of_acceptance_are_the_rewards_own_where_not_given() -> None:
    own = guarded()._policy()
    assert own is not None
    assert own.acceptance.beta == 0.5
    assert own.acceptance.schedule.target == 0.0  # type: ignore[union-attr]
    assert own.acceptance.schedule.horizon == 128  # type: ignore[union-attr]
    given = guarded(target=1.0, beta=0.1, max_tokens=20)._policy()
    assert given is not None
    assert given.acceptance.beta == 0.1
    assert given.acceptance.schedule.target == 1.0  # type: ignore[union-attr]
    assert given.acceptance.schedule.horizon == 20  # type: ignore[union-attr]
    unknown = guarded(reward=TableReward(lambda _: 0.0), target=0.0)._policy()
    assert unknown is not None
    assert unknown.acceptance.beta == 0.0


def test_thresholds_start_where_the_caller_says_or_else_the_reward() -> None:
    def brief(completions: list[Any], **_: Any) -> list[float]:
        return [-float(len(completion[0]["content"])) for completion in completions]

    for own, given, expected in ((None, None, 0.5), (1.0, None, 1.0), (1.0, 0.2, 0.2)):
        policy = guarded(reward=as_reward(brief, target=-5.0, alpha=own), alpha=given)._policy()
        assert policy is not None
        assert policy.acceptance.schedule.alpha == expected  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="alpha"):
        guarded(reward=as_reward(brief, target=-5.0, alpha=1.0)).invoke("hi", alpha=0.5)


def test_a_ceiling_bounds_the_candidates_drafted_at_once() -> None:
    widest = 0

    class Counting(ScriptedLanguageModel):
        def drafting(self, requests: Sequence[Request]) -> Drafting:
            nonlocal widest
            widest = max(widest, *(request.count for request in requests))
            return super().drafting(requests)

    never = TableReward(lambda text: -1.0, name="never") >= 0
    for ceiling in (1, 3):
        widest = 0
        guarded(Counting(endless), constraints=[never], num_candidates=ceiling).invoke("hi")
        assert widest == ceiling


def test_a_checkpoint_is_sampled_as_it_says_where_nobody_says_otherwise(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_folder("llama"), folder)
    for said, expected in (
        ({}, Sampling()),
        ({"temperature": 0.8, "top_p": 0.95}, Sampling(temperature=0.8, top_p=0.95)),
    ):
        (folder / "generation_config.json").write_text(json.dumps(said))
        model = LocalLanguageModel(folder)
        chat_model = ChatStars(model=model, reward=None, constraints=[])
        settings = {"streamed": False}
        _, order = chat_model._order([HumanMessage("hi")], None, {}, **settings)
        assert order.sampling == expected
        _, order = chat_model._order([HumanMessage("hi")], None, {"top_p": 1.0}, **settings)
        assert order.sampling == replace(expected, top_p=1.0)


# The guard that is assumed


@pytest.fixture
def bundled_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards that are named like the bundled ones and need no weights."""

    class Safe(TableReward):
        floor = 0.25

    helpful = TableReward(lambda _: 0.5, name="helpfulness", target=0.4)
    safe = Safe(lambda _: 0.5, name="safety")
    monkeypatch.setattr(bundled, "helpfulness", lambda: helpful)
    monkeypatch.setattr(bundled, "safety", lambda: safe)


@pytest.mark.usefixtures("bundled_rewards")
@pytest.mark.parametrize(
    ("settings", "reward", "constraints"),
    [
        ({}, "helpfulness", ["safety >= 0.25"]),
        ({"reward": few_b()}, "few b", []),
        ({"constraints": [no_accents()]}, None, ["plain >= 0.5"]),
        ({"constraints": no_accents()}, None, ["plain >= 0.5"]),
        ({"reward": None}, None, ["safety >= 0.25"]),
        ({"constraints": []}, "helpfulness", []),
        ({"reward": None, "constraints": []}, None, []),
        ({"reward": few_b(), "constraints": None}, "few b", []),
        ({"reward": None, "constraints": None}, None, ["safety >= 0.25"]),
    ],
)
def test_the_bundled_rewards_judge_where_none_is_named(
    settings: dict[str, Any], reward: str | None, constraints: list[str]
) -> None:
    model = ChatStars(model=ScriptedLanguageModel(letters), **settings)
    assert (model.reward.name if model.reward else None) == reward
    assert [constraint.name for constraint in model.constraints] == constraints
    again = model._copy({})
    assert (again.reward, again.constraints) == (model.reward, model.constraints)
    assert not model.unguarded().guarded


# Identity


class Handler(BaseCallbackHandler):
    """Counts calls of the language model, and the tokens told of."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.events: list[Any] = []
        self.params: list[Any] = []

    def on_chat_model_start(self, serialized: Any, messages: Any, **kwargs: Any) -> None:
        self.params.append(kwargs["invocation_params"])

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.tokens.append(token)

    def on_stream_event(self, event: Any, **kwargs: Any) -> None:
        self.events.append(event)


def differing() -> Iterator[dict[str, Any]]:
    """Settings that each decide replies, one at a time."""
    yield from (
        {"reward": None},
        {"reward": TableReward(lambda text: 0.0, name="few b", target=0.0, beta=0.5)},
        {"constraints": []},
        {"constraints": [TableReward(lambda text: 1.0, name="plain") >= 0.5]},
        {"target": -1.0},
        {"alpha": 0.4},
        {"beta": 0.4},
        {"horizon": 7},
        {"schedule": Constant(0.0)},
        {"segment_size": 3},
        {"max_attempts": 19},
        {"on_exhausted": "best"},
        {"holdback": 1},
        {"holdback": 1, "max_takebacks": 1},
        {"refusal_message": "No."},
        {"reward_timeout": 3.0},
        {"temperature": 0.9},
        {"top_p": 0.9},
        {"top_k": 9},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"max_tokens": 100},
        {"stop": ["x"]},
        {"seed": 8},
        {"partition": "x"},
        {"model": ScriptedLanguageModel(letters)},
    )


def test_replies_of_two_settings_are_never_taken_for_each_other_from_the_cache() -> None:
    cache = InMemoryCache()
    reward, constraint = few_b(), no_accents()
    base = {
        "reward": reward,
        "constraints": [constraint],
        "cache": cache,
        "seed": 7,
    }
    model = ScriptedLanguageModel(letters)
    others = [guarded(**{"model": model, **base, **change}) for change in differing()]
    for number, each in enumerate([guarded(model, **base), *others], 1):
        each.invoke("hi")
        assert len(cache._cache) == number
    same = guarded(model, **base)
    steps = model.num_steps
    cached = same.invoke("hi")
    assert model.num_steps == steps
    assert cached.response_metadata["stars"]["policy"] == same._policy().fingerprint  # type: ignore[union-attr]


def test_settings_of_a_call_are_part_of_the_key_of_the_cache() -> None:
    cache = InMemoryCache()
    model = guarded(cache=cache, seed=7, constraints=[])
    calls: list[dict[str, Any]] = [
        {},
        {"temperature": 0.5},
        {"max_tokens": 3},
        {"stop": ["x"]},
        {"seed": 8},
        {"target": 1.0},
        {"constraints": [TableReward(lambda text: 1.0, name="same") >= 0.5]},
        {"constraints": [TableReward(lambda text: float(not text), name="same") >= 0.5]},
        {"model": ScriptedLanguageModel(letters)},
    ]
    for number, settings in enumerate(calls, 1):
        model.invoke("hi", **settings)
        assert len(cache._cache) == number
    for settings in ({"seed": 7}, {"temperature": None}, {"stop": []}):
        model.invoke("hi", **settings)
    assert len(cache._cache) == len(calls)


def test_what_a_function_without_a_version_judged_is_never_taken_from_a_cache() -> None:
    def brief(completions: list[Any], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    cache = InMemoryCache()
    for expected, version in ((2, None), (3, "1")):
        model = guarded(reward=as_reward(brief, version=version), target=0.0, cache=cache, seed=1)
        policies = {model.invoke("hi").response_metadata["stars"]["policy"] for _ in range(2)}
        assert len(cache._cache) == expected
        assert len(policies) == 1


def test_identity_is_plain_and_cheap(language_model_folder: Path) -> None:
    model = guarded(model=language_model_folder, constraints=[])
    params = model._identifying_params
    assert json.loads(json.dumps(params)) == params
    assert params == model._identifying_params
    other = guarded(model=language_model_folder, constraints=[], dtype="float64")
    assert other._identifying_params["fingerprint"] != params["fingerprint"]
    assert model._llm_type == "langchain-stars"


def test_tracing_names_the_model_of_the_call() -> None:
    model = guarded(temperature=0.5, max_tokens=9, stop=["x"])
    params = model._get_ls_params()
    assert params == {
        "ls_provider": "langchain-stars",
        "ls_model_name": "scripted",
        "ls_model_type": "chat",
        "ls_temperature": 0.5,
        "ls_max_tokens": 9,
        "ls_stop": ["x"],
    }
    called = model._get_ls_params(stop=["y"], model="some/model", temperature=0.0, max_tokens=3)
    assert called["ls_model_name"] == "some/model"
    assert called["ls_temperature"] == 0.0
    assert called["ls_max_tokens"] == 3
    assert called["ls_stop"] == ["y"]
    assert model.metadata is not None
    assert "langchain-stars" in model.metadata["lc_versions"]


def test_rewards_and_weights_are_in_no_written_form() -> None:
    model = guarded()
    for written in (repr(model), str(model._serialized), str(model.model_dump())):
        assert "TableReward" not in written
        assert "ScriptedLanguageModel" not in written
    assert model.model_dump()["model"] == "scripted"


def test_the_profile_tells_what_the_model_can_read(language_model_folder: Path) -> None:
    scripted = unguarded(ScriptedLanguageModel(letters, context_length=77))
    assert scripted.profile is not None
    assert scripted.profile["max_input_tokens"] == 77
    assert scripted.profile["image_inputs"] is False
    named = ChatStars(model=language_model_folder, reward=None, constraints=[])
    assert named.profile is not None
    assert named.profile["max_input_tokens"] == 512


def test_configurable_settings_keep_the_guard() -> None:
    model = guarded(lambda text: {"a": 0.7, "b": 0.3}, max_tokens=6, seed=1)
    configurable = model.configurable_fields(temperature=ConfigurableField(id="temperature"))
    message = configurable.invoke("hi", {"configurable": {"temperature": 0.0}})
    assert message.text == "a" * 6
    stars = message.response_metadata["stars"]
    assert stars["policy"] == model._policy().fingerprint  # type: ignore[union-attr]
    assert list(configurable.with_config(configurable={"temperature": 0.0}).stream("hi"))[0].text


# Callbacks


def test_callbacks_hear_every_chunk_once() -> None:
    model = guarded(says("hello"))
    handler = Handler()
    chunks = list(model.stream("hi", {"callbacks": [handler]}))
    assert handler.tokens == [chunk.content for chunk in chunks]
    handler = Handler()
    streaming = model._copy({"streaming": True})
    message = streaming.invoke("hi", {"callbacks": [handler]})
    assert "".join(handler.tokens) == message.content == "hello"
    assert message.response_metadata["stars"]["guarded"]
    handler = Handler()
    model.invoke("hi", {"callbacks": [handler]})
    assert handler.tokens == []


@pytest.mark.filterwarnings(
    "ignore:.*in beta:langchain_core._api.beta_decorator.LangChainBetaWarning"
)
async def test_version_3_events_carry_the_reply_and_its_report() -> None:
    model = guarded(says("hello"))
    stream = model.stream_events("hi", version="v3")
    assert str(stream.text) == "hello"
    assert stream.output.response_metadata["stars"]["guarded"]
    assert stream.output.usage_metadata["output_tokens"] == 5
    astream = await model.astream_events("hi", version="v3")
    message = await astream.output
    assert message.text == "hello"
    assert message.response_metadata["finish_reason"] == "stop"


# Batches


def test_a_batch_keeps_its_order_shares_rounds_and_lets_single_calls_by() -> None:
    def echo(completion: str, prompt: str) -> Table:
        return {prompt[len(completion) : len(completion) + 1]: 1.0}

    prompts = [f"prompt {number:02d}" for number in range(40)]
    for run in (
        lambda model: model.batch(prompts),
        lambda model: asyncio.run(model.abatch(prompts)),
        lambda model: [reply for _, reply in sorted(model.batch_as_completed(prompts), key=_place)],
        lambda model: [
            reply for _, reply in sorted(asyncio.run(_acompleted(model, prompts)), key=_place)
        ],
    ):
        model = Recording(echo, step_seconds=0.002)
        statistics = engine_for("cpu").statistics
        rounds, row_rounds = statistics.num_rounds, statistics.num_row_rounds
        replies = run(guarded(model))
        assert [reply.text for reply in replies] == prompts
        assert model.lanes == {"batch"}
        rounds, row_rounds = statistics.num_rounds - rounds, statistics.num_row_rounds - row_rounds
        assert row_rounds / rounds > 8
        assert guarded(model).invoke("hi").text == "hi"
        assert model.lanes == {"batch", "interactive"}


def _place(reply: tuple[int, Any]) -> int:
    return reply[0]


async def _acompleted(model: ChatStars, prompts: list[str]) -> list[tuple[int, Any]]:
    return [reply async for reply in model.abatch_as_completed(prompts)]


def test_threads_generated_together_are_a_batch_and_one_alone_is_not() -> None:
    for many, lane in ((1, "interactive"), (3, "batch")):
        model = Recording(says("x"))
        guarded(model).generate([[HumanMessage("hi")]] * many)
        asyncio.run(guarded(model).agenerate([[HumanMessage("hi")]] * many))
        guarded(model).batch(["hi"] * many)
        assert model.lanes == {lane}


def test_a_batch_honours_its_configuration_and_returns_its_exceptions() -> None:
    model = unguarded(ScriptedLanguageModel(says("x"), context_length=20))
    handlers = [Handler(), Handler(), Handler()]
    configs = [{"callbacks": [handler]} for handler in handlers]
    replies = model.batch(["a", "b" * 50, "c"], configs, return_exceptions=True)  # type: ignore[arg-type]
    assert [type(reply).__name__ for reply in replies] == [
        "AIMessage",
        "ContextOverflowError",
        "AIMessage",
    ]
    assert [len(handler.params) for handler in handlers] == [1, 1, 1]
    assert "max_concurrency" not in configs[0]
    with pytest.raises(ContextOverflowError):
        model.batch(["a", "b" * 50])
    assert model.batch([]) == []
    assert len(model.batch(["a"] * 3, {"max_concurrency": 1})) == 3


def test_a_fixed_seed_is_the_seed_of_every_reply_of_a_batch() -> None:
    replies = guarded(seed=3).batch(["hi"] * 5)
    assert len({reply.text for reply in replies}) == 1
    assert {reply.response_metadata["stars"]["seed"] for reply in replies} == {3}
    free = guarded().batch(["hi"] * 5)
    assert len({reply.response_metadata["stars"]["seed"] for reply in free}) == 5


def test_a_batch_never_fills_its_own_queue() -> None:
    model = unguarded(ScriptedLanguageModel(says("x"), max_rows=2), max_queue=1)
    assert [reply.text for reply in model.batch(["hi"] * 20)] == ["x"] * 20
    assert len(asyncio.run(model.abatch(["hi"] * 20))) == 20


# Leaving early


def idle(model: ScriptedLanguageModel) -> bool:
    """Whether the device does nothing for the model any more, soon."""
    for _ in range(100):
        steps = model.num_steps
        time.sleep(0.05)
        if model.num_steps == steps:
            return True
    return False


@pytest.mark.parametrize("make", [guarded, unguarded])
def test_who_stops_reading_frees_the_device(make: Callable[..., ChatStars]) -> None:
    model = ScriptedLanguageModel(endless, step_seconds=0.005)
    chat_model = make(model, max_tokens=100_000)
    stream = chat_model.stream("hi")
    next(stream)
    stream.close()
    assert idle(model)
    abandoned = chat_model.stream("hi")
    next(abandoned)
    del abandoned
    assert idle(model)

    async def leave() -> None:
        async for _ in chat_model.astream("hi"):
            break
        stream = chat_model.astream("hi")
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    assert idle(model)


@pytest.mark.parametrize("way", ["ainvoke", "astream"])
def test_a_cancelled_task_frees_the_device(way: str) -> None:
    model = ScriptedLanguageModel(endless, step_seconds=0.005)
    chat_model = guarded(model, max_tokens=100_000)

    async def run() -> None:
        if way == "ainvoke":
            await chat_model.ainvoke("hi")
        async for _ in chat_model.astream("hi"):
            pass

    async def cancel() -> None:
        task = asyncio.create_task(run())
        while not model.num_steps:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await run()

    asyncio.run(cancel())
    assert model.num_steps
    assert idle(model)


@pytest.mark.parametrize("way", WAYS)
def test_a_reply_that_takes_too_long_ends_with_the_error_of_langchain(way: str) -> None:
    model = ScriptedLanguageModel(endless, step_seconds=0.005)
    chat_model = guarded(model, max_tokens=100_000)
    with pytest.raises(LanguageModelTimeoutError, match="timeout") as caught:
        call(chat_model, way, timeout=0.2)
    for family in (ModelTimeoutError, TimeoutError, DeadlineExceededError):
        assert isinstance(caught.value, family)
    assert caught.value.is_retryable
    assert caught.value.__context__ is None
    assert idle(model)


def test_several_event_loops_and_threads_get_what_they_get_alone() -> None:
    model = guarded()
    expected = [model.invoke("hi", seed=seed).text for seed in range(12)]
    replies: dict[int, str] = {}

    def ask(seed: int) -> None:
        way = WAYS[seed % len(WAYS)]
        replies[seed] = call(model, way, seed=seed).content

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [replies[seed] for seed in range(12)] == expected


def test_a_hundred_concurrent_calls_on_two_guards_keep_to_their_own() -> None:
    def script(completion: str, prompt: str) -> Table:
        if len(completion) >= 12:
            return {"": 1.0}
        return {f"<{prompt}>": 0.4, "#": 0.3, "@": 0.3}

    model = ScriptedLanguageModel(script)
    guards = [
        guarded(model, reward=None, constraints=[TableReward(reject) >= 0.5])
        for reject in (lambda text: float("#" not in text), lambda text: float("@" not in text))
    ]
    expected = [
        guards[number % 2].invoke(f"canary{number}", seed=number).text for number in range(100)
    ]

    async def ask() -> list[AIMessage]:
        return await asyncio.gather(
            *(guards[number % 2].ainvoke(f"canary{number}", seed=number) for number in range(100))
        )

    replies = [reply.text for reply in asyncio.run(ask())]
    assert replies == expected
    for number, reply in enumerate(replies):
        assert "#@"[number % 2] not in reply
        assert reply.count("canary") == reply.count(f"<canary{number}>")


# Errors


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_that_leaves_no_room_is_refused_and_one_that_does_is_clipped(way: str) -> None:
    model = unguarded(ScriptedLanguageModel(endless, context_length=10))
    with pytest.raises(ContextOverflowError, match="10 tokens") as caught:
        call(model, way, "x" * 10)
    assert "xx" not in str(caught.value)
    message = call(model, way, "x" * 9)
    assert len(message.content) == 1
    assert message.response_metadata["finish_reason"] == "length"


def test_a_full_queue_may_be_asked_again() -> None:
    model = ScriptedLanguageModel(endless, step_seconds=0.005, max_rows=1)
    chat_model = unguarded(model, max_tokens=100_000, max_queue=0)
    stream = chat_model.stream("hi")
    next(stream)
    for way in WAYS:
        with pytest.raises(TooManyRepliesError, match="max_queue") as caught:
            call(chat_model, way)
        assert isinstance(caught.value, ModelRateLimitError | QueueFullError)
        assert caught.value.is_retryable
    stream.close()
    assert idle(model)
    assert len(chat_model.invoke("hi", max_tokens=3).text) == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_language_model_that_fails_is_told_by_type_only(way: str) -> None:
    def broken(completion: str) -> Table:
        raise OSError("secret")

    with pytest.raises(LanguageModelError, match="OSError") as caught:
        call(guarded(broken), way)
    assert isinstance(caught.value, ModelAPIError)
    assert isinstance(caught.value, EngineError)
    assert "secret" not in repr(caught.value)
    assert caught.value.__context__ is None
    assert call(guarded(says("on")), way).content == "on"


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_is_not_there_is_named(way: str, tmp_path: Path) -> None:
    for name in (str(tmp_path / "nothing"), str(tmp_path)):
        with pytest.raises(LanguageModelNotFoundError, match="model") as caught:
            call(ChatStars(model=name, reward=None, constraints=[]), way)
        assert isinstance(caught.value, ModelNotFoundError)


@pytest.mark.parametrize("way", WAYS)
def test_an_exhausted_guard_raises_where_that_is_asked(way: str) -> None:
    never = TableReward(lambda text: -1.0, name="never") >= 0
    model = guarded(endless, constraints=[never], on_exhausted="raise", max_attempts=3)
    with pytest.raises(GuardExhausted) as caught:
        call(model, way)
    assert caught.value.num_attempts == 3
    assert caught.value.bounds == {"never >= 0": 3}
    assert caught.value.__context__ is None


def test_errors_of_a_listener_reach_the_caller_and_free_the_device() -> None:
    def listen(segment: Segment, text: str) -> None:
        raise RuntimeError("no")

    model = ScriptedLanguageModel(endless, step_seconds=0.005)
    for way in WAYS:
        with pytest.raises(RuntimeError, match="no"):
            call(guarded(model, on_segment=listen, max_tokens=100_000), way)
        assert idle(model)


# Weights


def test_ten_chat_models_load_their_weights_once(
    make_folder: FolderMaker, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder("llama", seed=77)
    with caplog.at_level(logging.INFO, logger="langchain_stars"):
        models = [ChatStars(model=folder, reward=few_b(), seed=1, max_tokens=4) for _ in range(10)]
        assert not [record for record in caplog.records if "loaded" in record.getMessage()]
        replies = {model.invoke("hi").text for model in models}
        replies |= {reply.text for reply in models[0].batch(["hi"] * 4)}
    assert len(replies) == 1
    assert len([record for record in caplog.records if "loaded" in record.getMessage()]) == 1


def test_construction_takes_no_time_worth_mentioning(language_model_folder: Path) -> None:
    reward: Reward = few_b()
    ChatStars(model=language_model_folder, reward=reward)
    began = time.perf_counter()
    for _ in range(20):
        ChatStars(model=language_model_folder, reward=reward)
    assert (time.perf_counter() - began) / 20 < 0.05


@pytest.mark.parametrize("guard", [True, False])
def test_the_four_ways_agree_on_real_weights(language_model_folder: Path, guard: bool) -> None:
    model = ChatStars(
        model=language_model_folder,
        reward=TableReward(lambda text: -float(len(text)), target=-20.0, beta=5.0)
        if guard
        else None,
        constraints=[],
        max_tokens=24,
        segment_size=5,
        seed=11,
    )
    messages = [call(model, way, "Could you tell me?") for way in WAYS]
    for message in messages[1:]:
        assert message.content == messages[0].content
        assert message.response_metadata == messages[0].response_metadata
        assert message.usage_metadata == messages[0].usage_metadata


def test_concurrent_calls_on_real_weights_give_what_they_give_alone(
    language_model_folder: Path, reward_folder: Path
) -> None:
    """A hundred calls on two policies, in fp32, on KV caches of the model and of the reward."""
    reward = SequenceReward(str(reward_folder), device="cpu")

    def guard(floor: float) -> ChatStars:
        return ChatStars(
            model=str(language_model_folder),
            device="cpu",
            dtype="float32",
            reward=None,
            constraints=[reward >= floor],
            max_tokens=12,
            segment_size=4,
            max_attempts=6,
            temperature=1.0,
        )

    seen = [
        segment["reward"]
        for seed in range(10)
        for segment in ChatStars(
            model=str(language_model_folder),
            device="cpu",
            dtype="float32",
            reward=reward,
            target=-1e9,
            max_tokens=12,
            segment_size=4,
            temperature=1.0,
        )
        .invoke("canary", seed=seed)
        .response_metadata["stars"]["segments"]
    ]
    low, high = sorted(seen)[len(seen) // 4], sorted(seen)[len(seen) // 2]
    guards = [guard(low), guard(high)]

    def one(number: int) -> tuple[ChatStars, str, int]:
        return guards[number % 2], f"canary {number}, tell me", number

    alone = [model.invoke(prompt, seed=seed) for model, prompt, seed in map(one, range(100))]

    async def together() -> list[Any]:
        return await asyncio.gather(
            *(model.ainvoke(prompt, seed=seed) for model, prompt, seed in map(one, range(100)))
        )

    replies = asyncio.run(together())
    assert [reply.content for reply in replies] == [reply.content for reply in alone]
    for of_guard in (alone[::2], alone[1::2]):
        assert any(r.response_metadata["stars"]["num_rejected_tokens"] for r in of_guard)


def test_weights_can_be_freed_between_calls_and_in_the_middle_of_one(
    language_model_folder: Path, reward_folder: Path
) -> None:
    model = ChatStars(
        model=str(language_model_folder),
        device="cpu",
        dtype="float32",
        reward=SequenceReward(str(reward_folder), device="cpu"),
        target=-1e9,
        max_tokens=24,
        segment_size=4,
        seed=3,
    )
    expected = model.invoke("Hello").content
    model.unload()
    assert model.invoke("Hello").content == expected
    text = ""
    for place, chunk in enumerate(model.stream("Hello")):
        text += str(chunk.content)
        if place == 1:
            model.unload()
    assert text == expected
