"""Prints what steering with each bundled reward gains, judged by scorers it was not steered by.

The same prompts are answered twice, guarded and unguarded, by the same weights with the same
limit of tokens. Judges count words, and learned from rows the reward never saw:

    positive: film reviews (sentiment/imdb), on the beginnings of reviews;
    safe: questions and answers with a safety label (safe_rlhf_mini), on requests;
    helpful: preferred replies (rmb_helpful, webgpt, auto_j) and whose of two replies answers
        (alpaca, dailydialog), on first turns held apart. It sees what request and reply have in
        common, too.

The first is asked 200 prompts; the others, whose rewards move less, `--more` times as many.

Knows the public names of the library and nothing of how it decodes.

Run:
    python examples/evaluate_rewards.py --data DATA
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from langchain_core.runnables import RunnableLambda
from prepare_data import first_turn, is_held_apart, read_rows
from scipy.sparse import csr_matrix, hstack, vstack
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from langchain_stars import ChatStars
from langchain_stars.rewards import bundled

RESAMPLES = 5000
Judge = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""Takes prompts and replies, and returns what each reply is worth; 0 divides good from bad."""


def label_judge(texts: Sequence[str], labels: Sequence[bool]) -> Judge:
    """Return a bag of words that gives the log-odds of a label."""
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=400).fit(words.fit_transform(texts), labels)
    return lambda _, replies: model.decision_function(words.transform(replies))


class AptnessJudge:
    """A bag of words that also sees what a reply has in common with its request.

    Beside the words of the reply it knows the share of the request's words that come back, by
    how rare they are; the cosine of request and reply by latent semantic analysis; the reply's
    length and how many of its words differ; and whether its last sentence ends.
    """

    def __init__(self, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]):
        """Learn which of two replies to a prompt is the better one."""
        self.words = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
        self.words.fit([*chosen, *rejected])
        self.topics = TfidfVectorizer(min_df=2, sublinear_tf=True, stop_words="english")
        both = [f"{prompt} {reply}" for prompt, reply in zip(prompts, chosen, strict=True)]
        self.latent = TruncatedSVD(100, random_state=0).fit(self.topics.fit_transform(both))
        self.rarity = dict(zip(self.topics.get_feature_names_out(), self.topics.idf_, strict=True))
        marks = self.marks(prompts, chosen), self.marks(prompts, rejected)
        self.scale = (marks[0] - marks[1]).std(0)
        gaps = self.features(prompts, chosen) - self.features(prompts, rejected)
        self.model = LogisticRegression(C=1.0, fit_intercept=False, max_iter=1000)
        self.model.fit(vstack([gaps, -gaps]), [1] * len(chosen) + [0] * len(chosen))

    def marks(self, prompts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """Return the five numbers of each reply."""
        rows = []
        for prompt, reply in zip(prompts, replies, strict=True):
            asked = set(re.findall(r"[a-z']+", prompt.lower()))
            said = re.findall(r"[a-z']+", reply.lower())
            whole = sum(self.rarity.get(word, 8.0) for word in asked) or 1.0
            common = sum(self.rarity.get(word, 8.0) for word in asked & set(said))
            different = len(set(said)) / max(1, len(said))
            ends = reply.strip()[-1:] in (".", "!", "?", '"')
            rows.append([common / whole, np.log1p(len(said)), different, float(ends)])
        one, other = (
            self.latent.transform(self.topics.transform(texts)) for texts in (prompts, replies)
        )
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosines = (one * other).sum(1) / np.maximum(lengths, 1e-9)
        return np.column_stack([np.array(rows), cosines])

    def features(self, prompts: Sequence[str], replies: Sequence[str]) -> csr_matrix:
        """Return words and marks."""
        marks = csr_matrix(self.marks(prompts, replies) / self.scale)
        return hstack([self.words.transform(replies), marks]).tocsr()

    def __call__(self, prompts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """Return what each reply is worth; only differences mean anything."""
        return self.model.decision_function(self.features(prompts, replies))


def positive_task(data: Path, count: int) -> tuple[list[str], Judge]:
    """Return beginnings of reviews, and a judge that did not read those reviews."""
    rows = list(read_rows(data, "sentiment/prompts"))
    chosen = random.Random(0).sample(rows, count)
    asked = {row["from_review"] for row in chosen}
    reviews = [r for r in read_rows(data, "sentiment/imdb") if r["id"] not in asked]
    judge = label_judge([r["text"] for r in reviews], [r["label"] == "pos" for r in reviews])
    return [row["prompt"] for row in chosen], judge


def safe_task(data: Path, count: int) -> tuple[list[str], Judge]:
    """Return requests, unsafe and safe, and a judge of answers to others."""
    rows = [r for r in read_rows(data, "safety/prompts") if is_held_apart(r["prompt"])]
    rows = [r for r in rows if len(r["prompt"]) < 300]
    answers = [r for r in read_rows(data, "safety/responses") if r["source"] == "safe_rlhf_mini"]
    judge = label_judge([r["response"] for r in answers], [r["label"] == "safe" for r in answers])
    return [row["prompt"] for row in random.Random(0).sample(rows, min(count, len(rows)))], judge


def whose_answers(data: Path, name: str, count: int) -> list[tuple[str, str, str]]:
    """Return requests with the reply that each got and the reply that another one got."""
    rng = random.Random(0)
    turns = []
    for row in rng.sample(list(read_rows(data, f"chat/{name}")), count):
        messages = row["messages"]
        place = rng.choice([i for i, m in enumerate(messages) if i and m["role"] == "assistant"])
        turns.append((messages[place - 1]["content"], messages[place]["content"][:300]))
    pairs = [(prompt, reply, rng.choice(turns)[1]) for prompt, reply in turns]
    return [pair for pair in pairs if pair[1] != pair[2]]


def helpful_task(data: Path, count: int) -> tuple[list[str], Judge]:
    """Return first turns held apart, and a judge of rows that nothing learned from."""
    prompts = {
        first_turn(row["messages"])
        for name in ("dolly", "oasst_en100", "topical_chat", "roleplay")
        for row in read_rows(data, f"chat/{name}")
    }
    prompts |= {first_turn(row["messages"]) for row in read_rows(data, "prefs/hh_helpful")}
    apart = sorted(p for p in prompts if is_held_apart(p) and len(p) < 300)
    pairs = [
        (row["messages"][-1]["content"], row["chosen"], row["rejected"])
        for name in ("rmb_helpful", "webgpt", "auto_j")
        for row in read_rows(data, f"prefs/{name}")
    ]
    pairs += whose_answers(data, "alpaca", 3000) + whose_answers(data, "dailydialog", 2900)
    judge = AptnessJudge(*zip(*pairs, strict=True))
    return random.Random(0).sample(apart, min(count, len(apart))), judge


TASKS = {
    "positive": (bundled.sentiment, positive_task),
    "safe": (bundled.safety, safe_task),
    "helpful": (bundled.helpfulness, helpful_task),
}


def interval(values: np.ndarray) -> list[float]:
    """Return the bootstrap interval, at 95 %, of a mean."""
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    return [round(float(v), 4) for v in np.quantile(values[draws].mean(1), (0.025, 0.975))]


def answer(
    model: Any, prompts: Sequence[Any], seed: int, *, together: int = 64, title: str | None = None
) -> list[Any]:
    """Return a reply to every prompt, each with a seed of its own.

    With one seed for all, all would be drafted and accepted with the same random numbers, and
    a hundred replies would tell hardly more than a few.
    """
    ask = RunnableLambda(lambda asked: model.invoke(asked[0], seed=asked[1]))
    pairs = [(prompt, seed + number) for number, prompt in enumerate(prompts)]
    replies = []
    for start in tqdm(range(0, len(pairs), together), desc=title, disable=title is None):
        some = pairs[start : start + together]
        replies += ask.batch(some, config={"max_concurrency": together})
    return replies


def steer(name: str, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a reward gains over unguarded decoding."""
    make_reward, make_task = TASKS[name]
    count = arguments.prompts if name == "positive" else round(arguments.more * arguments.prompts)
    prompts, judge = make_task(data, count)
    guarded_model = ChatStars(
        reward=make_reward(),
        target=arguments.target,
        beta=arguments.beta,
        max_tokens=arguments.max_tokens,
    )
    guarded, unguarded = (
        answer(model, prompts, arguments.seed, together=arguments.together, title=f"{name}, {how}")
        for how, model in (("guarded", guarded_model), ("unguarded", guarded_model.unguarded()))
    )
    ours = judge(prompts, [str(reply.content) for reply in guarded])
    theirs = judge(prompts, [str(reply.content) for reply in unguarded])
    shares = (ours > 0).astype(float), (theirs > 0).astype(float)
    segments = [s for reply in guarded for s in reply.response_metadata["stars"]["segments"]]

    def tokens(replies: Sequence[Any]) -> float:
        return float(np.mean([reply.usage_metadata["output_tokens"] for reply in replies]))

    return {
        "prompts": len(prompts),
        "unguarded": round(float(shares[1].mean()), 4),
        "guarded": round(float(shares[0].mean()), 4),
        "gain": round(float((shares[0] - shares[1]).mean()), 4),
        "gain_interval": interval(shares[0] - shares[1]),
        "score_gain": round(float((ours - theirs).mean()), 4),
        "score_gain_interval": interval(ours - theirs),
        "attempts_per_segment": round(float(np.mean([s["attempts"] for s in segments])), 2),
        "fallbacks": sum(s["outcome"] == "fallback" for s in segments),
        "segments": len(segments),
        "tokens": round(tokens(guarded), 1),
        "tokens_unguarded": round(tokens(unguarded), 1),
    }


def main() -> None:
    """Steer with each reward and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--more", type=float, default=3.0, help="prompts of safe and helpful")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--together", type=int, default=32, help="prompts answered at once")
    parser.add_argument("--rewards", default="positive,safe,helpful")
    parser.add_argument("--target", type=float, help="instead of the one that ships")
    parser.add_argument("--beta", type=float, help="instead of the one that ships")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figures", type=Path, help="JSON to add the table to, as `steering`")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {}
    for name in arguments.rewards.split(","):
        strictness = [
            f"{setting} {value}"
            for setting, value in (("target", arguments.target), ("beta", arguments.beta))
            if value is not None
        ]
        results[", ".join([name, *strictness])] = steer(name, arguments.data, arguments)
    header = ("reward", "prompts", "unguarded", "guarded", "gain", "95 %")
    header += ("score gain", "95 %", "attempts", "tokens")
    print("{:28} {:>7} {:>9} {:>8} {:>7} {:>18} {:>10} {:>18} {:>8} {:>13}".format(*header))
    for name, row in results.items():
        low, high = row["gain_interval"]
        score_low, score_high = row["score_gain_interval"]
        print(
            f"{name:28} {row['prompts']:7} {row['unguarded']:9.3f} {row['guarded']:8.3f} "
            f"{row['gain']:7.3f} {low:8.3f} to {high:6.3f} {row['score_gain']:10.3f} "
            f"{score_low:8.3f} to {score_high:6.3f} {row['attempts_per_segment']:8.2f} "
            f"{row['tokens']:5.1f} / {row['tokens_unguarded']:5.1f}"
        )
    if arguments.figures:
        figures = {}
        if arguments.figures.exists():
            figures = json.loads(arguments.figures.read_text())
        figures["steering"] = {**figures.get("steering", {}), **results}
        arguments.figures.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
