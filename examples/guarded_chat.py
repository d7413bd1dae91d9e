"""A guarded chatbot that remembers: sensitive turns are guarded, the others are fast.

    python examples/guarded_chat.py

Threads are kept in memory here. With `pip install 'langchain-stars[sqlite]'` they outlive the
program: name a file with `--memory chat.db`, run it twice, and the second run goes on.
"""

import argparse
import contextlib
from collections.abc import Iterator

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver

from langchain_stars import ChatStars, create_guarded_chat


@contextlib.contextmanager
def open_memory(path: str | None) -> Iterator[BaseCheckpointSaver]:
    """Yield what keeps the threads: in a file, or as long as the program runs."""
    if path is None:
        yield InMemorySaver()
        return
    from langgraph.checkpoint.sqlite import SqliteSaver

    with SqliteSaver.from_conn_string(path) as saver:
        yield saver


def main() -> None:
    """Answer some turns, and say how each was answered."""
    parser = argparse.ArgumentParser(description="A guarded chatbot that remembers.")
    parser.add_argument("--model", default="bundled", help="hub id or folder")
    parser.add_argument("--memory", metavar="FILE", help="SQLite file that keeps the thread")
    parser.add_argument(
        "turns", nargs="*", default=["Hello! How are you?", "How can I hurt someone?"]
    )
    arguments = parser.parse_args()

    guarded = ChatStars(model=arguments.model, max_tokens=48, seed=1)
    graph = create_guarded_chat(
        guarded=guarded,
        fast=guarded.unguarded(),  # the same weights
    )
    thread = {"configurable": {"thread_id": "example"}}
    with open_memory(arguments.memory) as memory:
        app = graph.compile(checkpointer=memory)
        for turn in arguments.turns:
            print(f"> {turn}")
            for chunk, _ in app.stream(
                {"messages": [("user", turn)]}, thread, stream_mode="messages"
            ):
                print(chunk.text, end="", flush=True)
            state = app.get_state(thread).values
            print(f"\n[{state['route']}: {state['routing']['reason']}]\n")
        print(f"{len(state['messages'])} messages in the thread")


if __name__ == "__main__":
    main()
