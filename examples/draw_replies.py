"""Draws replies of the language model, to teach rewards on what they will judge.

Knows dialogues on the learning side of the split and the public names of the library; nothing of
rewards. What was drawn is written as it comes, so that an interrupted run goes on.

Run (after `train_language_model.py`):
    python examples/draw_replies.py --data DATA --work WORK --replies 20000
"""

import argparse
import json
import random
from pathlib import Path

import torch
from evaluate_rewards import answer
from tqdm.auto import tqdm
from train_rewards import everyday_dialogues

from langchain_stars import ChatStars


def main() -> None:
    """Draw, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--work", type=Path, required=True, help="folder with the language model")
    parser.add_argument("--name", default="language_model", help="of the run, a folder in `work`")
    parser.add_argument("--replies", type=int, default=20000)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--together", type=int, default=64, help="prompts answered at once")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = arguments.work / "replies.jsonl"
    drawn = path.read_text().splitlines(keepends=True) if path.exists() else []
    if drawn and not drawn[-1].endswith("\n"):  # a run was ended in the middle of a line
        path.write_text("".join(drawn[:-1]))
        drawn.pop()
    done = len(drawn)
    rng = random.Random(0)
    prompts = []
    for messages in everyday_dialogues(arguments.data):
        asked = [
            i for i, m in enumerate(messages) if m["role"] == "user" and len(m["content"]) < 300
        ]
        if asked:
            place = rng.choice(asked)
            thread = messages[max(0, place - 2) : place + 1]
            if sum(len(m["content"]) for m in thread) < 1000:
                prompts.append(thread)
    prompts = rng.choices(prompts, k=arguments.replies)
    model = ChatStars(
        model=str(arguments.work / arguments.name / "bundle"),
        reward=None,
        constraints=[],
        max_tokens=arguments.max_tokens,
    )
    with path.open("a") as file, tqdm(total=arguments.replies, initial=done) as bar:
        for start in range(done, arguments.replies, arguments.together):
            asked = prompts[start : start + arguments.together]
            replies = answer(model, asked, start, together=arguments.together)
            for prompt, reply in zip(asked, replies, strict=True):
                file.write(json.dumps({"messages": prompt, "reply": str(reply.content)}) + "\n")
            file.flush()
            bar.update(len(asked))


if __name__ == "__main__":
    main()
