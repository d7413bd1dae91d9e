"""A guarded chat to deploy: `cd graphs && langgraph dev`.

Adds nothing to the package but choices, which the environment makes. Importing it loads nothing,
and neither does making the graph: models are loaded at the first turn.

Callers write the thread, its system message too, and so all of it is judged. A thread stays
guarded once a message of it was sensitive, and once it has grown too long to be judged.

Environment:
    STARS_MODEL: Hub id or folder of the language model; the bundled one if not set.
    STARS_DEVICE: As in `cpu` or `cuda`; the best there is if not set.
    STARS_DTYPE: As in `bfloat16`; the checkpoint's if not set.
    STARS_REWARD: Objective, as in `helpfulness + 0.5 * sentiment`.
    STARS_CONSTRAINTS: What must hold always, as in `safety >= 0.8; org/toxicity <= 0.1`. The bundled
        rewards judge where neither of the two is set.
    STARS_TARGET: Reward asked of a whole reply, where the objective does not say.
    STARS_MAX_TOKENS: Most tokens of a reply.
    STARS_TIMEOUT: Seconds that a reply may take.
    STARS_ROUTER_FLOOR: Safety of a thread below which a turn is guarded.
    STARS_STICKY_TURNS: Turns that stay guarded after a guarded one.
"""

import asyncio
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from langgraph.graph import MessagesState
from langgraph.graph.state import CompiledStateGraph

from langchain_stars import ChatStars, create_guarded_chat
from langchain_stars.guarded_chat import ChatState
from langchain_stars.routing import safety_router

Graph: TypeAlias = CompiledStateGraph[ChatState, None, MessagesState, ChatState]

_SETTINGS: dict[str, Callable[[str], Any]] = {
    "model": str,
    "device": str,
    "dtype": str,
    "reward": str,
    "constraints": lambda text: [each.strip() for each in text.split(";") if each.strip()],
    "target": float,
    "max_tokens": int,
    "timeout": float,
}


async def make_graph() -> Graph:
    """Return the graph that the environment asks for, compiled without a checkpointer.

    The server calls it for every run, on its event loop: what reads files is done in a thread,
    and only once.

    Raises:
        ValueError: A variable cannot be understood.
    """
    return await asyncio.to_thread(_make_graph, *sorted(_environment().items()))


def _environment() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if name.startswith("STARS_")}


@functools.lru_cache(maxsize=1)
def _make_graph(*environment: tuple[str, str]) -> Graph:
    values = dict(environment)
    settings = {name: _read(values, name, kind) for name, kind in _SETTINGS.items()}
    guarded = ChatStars(**{name: value for name, value in settings.items() if value is not None})
    sticky_turns = _read(values, "sticky_turns", int)
    graph = create_guarded_chat(
        guarded=guarded,
        fast=guarded.unguarded(),
        router=safety_router(floor=_read(values, "router_floor", float), trusts_system=False),
        **({} if sticky_turns is None else {"sticky_turns": sticky_turns}),
    )
    return graph.compile(name="guarded_chat")


def _read(environment: Mapping[str, str], name: str, kind: Callable[[str], Any]) -> Any:
    """Return what a variable of the environment holds; None where it is not set."""
    variable = f"STARS_{name.upper()}"
    text = environment.get(variable, "").strip()
    if not text:
        return None
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"`{variable}` cannot be understood, got {text!r}") from None
