"""Puts `ChatStars` where a chain has its chat model: one line changes, and the reply is guarded.

Run it as it stands, with the models that come with the package:

    python examples/chain.py

or with a model and rewards that you trust:

    python examples/chain.py --model Qwen/Qwen3-0.6B --constraint "safety >= 0.8"
"""

import argparse

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from langchain_stars import ChatStars

parser = argparse.ArgumentParser(description="A chain whose chat model is guarded.")
parser.add_argument("--model", default="bundled", help="hub id or folder")
parser.add_argument("--constraint", action="append", help='as in "safety >= 0.8"')
parser.add_argument("--question", default="What do you like to do at the weekend?")
parser.add_argument("--seed", type=int, default=1)
arguments = parser.parse_args()

guard = {"constraints": arguments.constraint} if arguments.constraint else {}
chat = ChatStars(model=arguments.model, max_tokens=48, seed=arguments.seed, **guard)

prompt = ChatPromptTemplate.from_messages([("user", "{question}")])
chain = prompt | chat | StrOutputParser()

# The chain streams what is kept, as it is kept.
for text in chain.stream({"question": arguments.question}):
    print(text, end="", flush=True)
print()

# What became of the reply stands on the message, before the parser.
message = (prompt | chat).invoke({"question": arguments.question})
stars = message.response_metadata["stars"]
print(f"\n{stars['num_attempts']} attempts for {len(stars['segments'])} segments")
for segment in stars["segments"]:
    print(
        f"  segment {segment['index'] + 1}: {segment['outcome']} at attempt {segment['attempts']}, "
        f"{segment['num_tokens']} tokens"
    )
