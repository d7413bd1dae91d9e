"""Finds target, beta and floor of each bundled reward, on the bundled language model's replies.

Knows the public names of the library; nothing of how it decodes. A third of the everyday prompts
held apart shows where the rewards lie: the target is what one reply in twenty reaches. Most
replies are far below it and much alike, so a hard threshold would either let all of them pass or
none. On the second third the softness is sought at which guarded replies take as many attempts
a segment as they may; on the last these are counted.

Run:
    python examples/calibrate_bundled.py --data DATA
"""

import argparse
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from prepare_data import first_turn, is_held_apart, read_rows
from tqdm.auto import tqdm

from langchain_stars import ChatStars
from langchain_stars.calibration import Calibration, calibrate
from langchain_stars.language_models import load_language_model
from langchain_stars.rewards import bundled

HORIZON = 128
REWARDS = {
    "safety": bundled.safety,
    "helpfulness": bundled.helpfulness,
    "sentiment": bundled.sentiment,
}


def everyday_prompts(data: Path, count: int) -> list[str]:
    """Return first turns of everyday dialogues held apart, from each source in turn."""
    by_source = []
    for name in ("topical_chat", "dolly", "oasst_en100", "persona", "roleplay"):
        prompts = {first_turn(row["messages"]) for row in read_rows(data, f"chat/{name}")}
        usable = sorted(p for p in prompts if is_held_apart(p) and len(p) < 300)
        random.Random(0).shuffle(usable)
        by_source.append(usable)
    mixed = [source.pop() for _ in range(count) for source in by_source if source]
    return mixed[:count]


def attempts_of(replies: list[Any]) -> list[int]:
    """Return the attempts that each segment of the replies took."""
    return [s["attempts"] for r in replies for s in r.response_metadata["stars"]["segments"]]


def described(calibration: Calibration) -> dict[str, Any]:
    """Return by position where the rewards of unguarded replies lie."""
    levels = ("0.05", "0.25", "0.5", "0.75", "0.95")
    places = [
        {
            "position": (index + 1) * calibration.segment_size,
            "replies": position.num_replies,
            "mean": round(position.mean, 4),
            "std": round(position.spread, 4),
            "std_within_prompt": round(position.spread_within, 4),
            "quantiles": {
                level: round(value, 4)
                for level, value in zip(levels, position.quantiles, strict=True)
            },
        }
        for index, position in enumerate(calibration.positions)
    ]
    prompt = calibration.prompt_reward or (None, None)
    return {"prompt_mean": prompt[0], "prompt_std": prompt[1], "by_position": places}


def main() -> None:
    """Calibrate each reward, count its attempts, and write `calibration.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--prompts", type=int, default=120, help="a third for each purpose")
    parser.add_argument("--samples", type=int, default=4, help="replies to each prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--mean-attempts", type=float, default=1.8)
    parser.add_argument("--safety-floor", type=float, default=0.4)
    parser.add_argument("--halvings", type=int, default=6, help="of the range of beta")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    prompts = everyday_prompts(arguments.data, arguments.prompts)
    seen, tuned, counted_on = prompts[::3], prompts[1::3], prompts[2::3]
    chats = [[{"role": "user", "content": prompt}] for prompt in seen]
    language_model = load_language_model(bundled.FOLDER / "language_model")
    safety = bundled.safety()
    known: dict[str, Any] = {}
    for name, make_reward in REWARDS.items():
        calibration = calibrate(
            language_model,
            make_reward(),
            chats,
            max_tokens=arguments.max_tokens,
            horizon=HORIZON,
            num_samples=arguments.samples,
            progress=lambda replies, name=name: tqdm(replies, desc=name),
        )
        target = statistics.fmean(position.quantiles[-1] for position in calibration.positions)

        # `ChatStars()` guards with helpfulness above the floor of safety; so it is counted.
        floored = [safety >= arguments.safety_floor] if name == "helpfulness" else []

        def count(beta: float, asked: list[str], seed: int) -> float:
            model = ChatStars(
                reward=make_reward(),  # noqa: B023 - called in this round of the loop alone
                constraints=floored,  # noqa: B023
                target=target,  # noqa: B023
                beta=beta,
                max_tokens=arguments.max_tokens,
                horizon=HORIZON,
                seed=seed,
            )
            return statistics.fmean(attempts_of(model.batch(asked)))

        low, high = math.log(0.005), math.log(1.0)
        for _ in tqdm(range(arguments.halvings), desc=f"{name}, beta"):
            middle = (low + high) / 2
            enough = count(math.exp(middle), tuned, 1) <= arguments.mean_attempts
            low, high = (low, middle) if enough else (middle, high)
        beta = math.exp(high)
        counted = count(beta, counted_on, 2)
        tqdm.write(f"{name}: target {target:.4f}, beta {beta:.4f}, {counted:.2f} attempts")
        first = calibration.positions[0]
        floor = arguments.safety_floor if name == "safety" else first.quantiles[0]
        known[name] = {
            "target": round(target, 4),
            "beta": round(beta, 4),
            "alpha": calibration.alpha,
            "floor": round(floor, 4),
            "attempts_per_segment": round(counted, 2),
            **described(calibration),
        }
    result = {
        "segment_size": 16,
        "prompts": len(prompts),
        "replies_to_each": arguments.samples,
        "max_tokens": arguments.max_tokens,
        "rewards": known,
    }
    (bundled.FOLDER / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")
    model = ChatStars(max_tokens=arguments.max_tokens, seed=3)
    counted = statistics.fmean(attempts_of(model.batch(prompts)))
    result["default_attempts_per_segment"] = round(counted, 2)
    (bundled.FOLDER / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
