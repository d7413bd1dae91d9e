"""Steers one model towards several objectives at once: rewards are written with.

    python examples/compose_rewards.py

The same question and seed, under guards that ask for different things. What a guard costs are the
attempts; what it brings, the rewards that the last columns show.
"""

from langchain_stars import ChatStars, as_reward, minimum
from langchain_stars.engine import engine_for
from langchain_stars.rewards import Chat, Completion, Reward
from langchain_stars.rewards.bundled import helpfulness, safety, sentiment

QUESTION = "What do you think of the new film?"
SEEDS = range(4)


def brief(completions: list[Chat], **_: object) -> list[float]:
    """Reward short replies: 1 for none at all, 0 for 400 characters."""
    return [1 - len(completion[0]["content"]) / 400 for completion in completions]


def judge(reward: Reward, reply: str) -> float:
    """Return what a reward says of a finished reply to the question."""
    chat = [{"role": "user", "content": QUESTION}]
    [value] = engine_for(safe.scorer.device).judge(
        reward, [chat], completion=Completion(text=reply, finished=True)
    )
    return float("nan") if value is None else value


safe, helpful, positive = safety(), helpfulness(), sentiment()
short = as_reward(brief, version="1", range=(-1e9, 1.0), target=0.8, beta=0.1)

guards = {
    "none": {"reward": None, "constraints": []},
    "positive": {"reward": positive},
    "helpful + 0.5 * positive": {"reward": helpful + 0.5 * positive},
    "minimum(helpful, positive)": {"reward": minimum(helpful, positive)},
    "positive, if safe >= 0.5 and short": {
        "reward": positive,
        "constraints": [safe >= 0.5, short >= 0.5],
    },
}
named = {"safe": safe, "helpful": helpful, "positive": positive, "short": short}

print(f"> {QUESTION}\n")
print(f"{'guard':36}attempts  " + "  ".join(f"{name:>8}" for name in named))
for title, settings in guards.items():
    chat = ChatStars(max_tokens=32, **settings)
    replies = [chat.invoke(QUESTION, seed=seed) for seed in SEEDS]
    attempts = segments = 0
    for reply in replies:
        stars = reply.response_metadata["stars"]
        attempts += stars["num_attempts"]
        segments += len(stars["segments"])
    means = [
        sum(judge(reward, reply.text) for reply in replies) / len(replies)
        for reward in named.values()
    ]
    print(
        f"{title:36}{attempts / max(1, segments):>8.1f}  "
        + "  ".join(f"{mean:>8.2f}" for mean in means)
    )
    print(f"    {replies[0].text.strip()[:90]!r}")
