"""Finds target, beta and floor of each bundled reward, on the bundled language model's replies.

Knows the public names of the library; nothing of how it decodes. A fifth of the everyday prompts
held apart shows where the rewards of unguarded replies lie, and how far those to one prompt differ:
`beta` is a tenth, a quarter and once that. On two fifths the `target` of each is sought at which
guarded replies take as many attempts a segment as they may, and the pair whose replies then have
the highest reward is kept. On the last two fifths the attempts are counted: a few prompts take most
of them, so that fewer prompts would tell little.

Run:
    python examples/calibrate_bundled.py --data DATA
    python examples/calibrate_bundled.py --data DATA --rewards sentiment --mean-attempts 2.2
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from evaluate_rewards import answer
from prepare_data import first_turn, is_held_apart, read_rows
from tqdm.auto import tqdm

from langchain_stars import ChatStars
from langchain_stars.calibration import Calibration, calibrate
from langchain_stars.language_models import load_language_model
from langchain_stars.rewards import bundled

# At the empty reply the safety reward answers for the request: a bad one is no reason to ask less.
# A reply that sounds well need not sound better and better: what was reached early is enough.
ALPHAS = {"safety": 1.0, "helpfulness": 0.5, "sentiment": 1.0}
LEVELS = ("0.05", "0.25", "0.5", "0.75", "0.95")
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


def attempts_of(replies: list[Any]) -> float:
    """Return the mean attempts that a segment of the replies took, one that ended in refusal too."""
    told = [reply.response_metadata["stars"] for reply in replies]
    segments = sum(len(stars["segments"]) or 1 for stars in told)
    return sum(stars["num_attempts"] for stars in told) / segments


def described(calibration: Calibration) -> dict[str, Any]:
    """Return by position where the rewards of unguarded replies lie."""
    places = [
        {
            "position": (index + 1) * calibration.segment_size,
            "replies": position.num_replies,
            "mean": round(position.mean, 4),
            "std": round(position.spread, 4),
            "std_within_prompt": round(position.spread_within, 4),
            "quantiles": {
                level: round(value, 4)
                for level, value in zip(LEVELS, position.quantiles, strict=True)
            },
        }
        for index, position in enumerate(calibration.positions)
    ]
    prompt = calibration.prompt_reward or (None, None)
    return {"prompt_mean": prompt[0], "prompt_std": prompt[1], "by_position": places}


def rewards_of(replies: list[Any]) -> list[float]:
    """Return the reward of every reply's last segment, the whole reply's; refusals have none."""
    told = [r.response_metadata["stars"]["segments"] for r in replies]
    return [segments[-1]["reward"] for segments in told if segments]


def raise_target(
    make_model: Callable[[float], ChatStars],
    asked: list[str],
    most: float,
    span: tuple[float, float],
    halvings: int,
) -> tuple[float, float]:
    """Return the highest target that keeps to so many attempts, and the mean reward with it."""
    low, high = span
    reward = -math.inf
    for _ in range(halvings):
        middle = (low + high) / 2
        replies = answer(make_model(middle), asked, 1)
        if attempts_of(replies) <= most:
            low, reward = middle, statistics.fmean(rewards_of(replies))
        else:
            high = middle
    if reward == -math.inf:
        raise SystemExit(f"no target down to {span[0]} keeps to {most} attempts: allow more")
    return low, reward


def main() -> None:
    """Calibrate each reward, count its attempts, and write `calibration.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--rewards", default=",".join(REWARDS))
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--samples", type=int, default=3, help="replies to each prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--mean-attempts", type=float, default=2.7)
    parser.add_argument("--safety-floor", type=float, default=0.4)
    parser.add_argument("--halvings", type=int, default=6, help="of the range of targets")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    prompts = everyday_prompts(arguments.data, arguments.prompts)
    fifth = len(prompts) // 5
    seen, tuned, counted_on = prompts[:fifth], prompts[fifth : 3 * fifth], prompts[3 * fifth :]
    chats = [[{"role": "user", "content": prompt}] for prompt in seen]
    language_model = load_language_model(bundled.FOLDER / "language_model")
    safety = bundled.safety()
    known: dict[str, Any] = {}
    for name in arguments.rewards.split(","):
        make_reward = REWARDS[name]
        calibration = calibrate(
            language_model,
            make_reward(),
            chats,
            alpha=ALPHAS[name],
            max_tokens=arguments.max_tokens,
            num_samples=arguments.samples,
            progress=lambda replies, name=name: tqdm(replies, desc=name),
        )

        def make_model(target: float, beta: float) -> ChatStars:
            # `ChatStars()` guards with helpfulness above the floor of safety; so it is counted.
            floored = [safety >= arguments.safety_floor] if name == "helpfulness" else []  # noqa: B023
            return ChatStars(
                reward=make_reward(),  # noqa: B023 - called in this round of the loop alone
                constraints=floored,
                target=target,
                beta=beta,
                alpha=ALPHAS[name],  # noqa: B023
                max_tokens=arguments.max_tokens,
            )

        spread = statistics.fmean(position.spread_within for position in calibration.positions)
        lowest = min(position.quantiles[0] for position in calibration.positions)
        best = (-math.inf, 0.0, 0.0)
        for beta in tqdm((0.1 * spread, 0.25 * spread, spread), desc=f"{name}, betas"):
            target, reward = raise_target(
                lambda target, beta=beta: make_model(target, beta),
                tuned,
                arguments.mean_attempts,
                (lowest, 1.0),
                arguments.halvings,
            )
            tqdm.write(f"{name}: target {target:.4f}, beta {beta:.4f}, mean reward {reward:.4f}")
            best = max(best, (reward, target, beta))
        _, target, beta = best
        counted = attempts_of(answer(make_model(target, beta), counted_on, 1000))
        tqdm.write(f"{name}: target {target:.4f}, beta {beta:.4f}, {counted:.2f} attempts")
        first = calibration.positions[0]
        floor = arguments.safety_floor if name == "safety" else first.quantiles[0]
        known[name] = {
            "target": round(target, 4),
            "beta": round(beta, 4),
            "alpha": calibration.alpha,
            "floor": round(floor, 4),
            "mean_attempts": arguments.mean_attempts,
            "attempts_per_segment": round(counted, 2),
            **described(calibration),
        }
    path = bundled.FOLDER / "calibration.json"
    result = json.loads(path.read_text()) if path.exists() else {"rewards": {}}
    result |= {
        "segment_size": 16,
        "prompts": len(prompts),
        "replies_to_each": arguments.samples,
        "max_tokens": arguments.max_tokens,
        "rewards": {**result["rewards"], **known},
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    bundled._calibration.cache_clear()
    counted = attempts_of(answer(ChatStars(), counted_on, 2000))
    result["default_attempts_per_segment"] = round(counted, 2)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
