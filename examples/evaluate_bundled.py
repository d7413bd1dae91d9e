"""Measures the bundled models on rows held apart, beside models that only count words.

Knows figures and how sure they are; nothing of training. Every figure of a reward stands
beside a bag of words trained on the same labelled rows, and the language model beside an interpolated
trigram model. Rows under other licences are measured too, and never learned from.

Run:
    python examples/evaluate_bundled.py --data DATA --work WORK --bundle FOLDER --output FILE
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prepare_data import read_rows
from scipy.sparse import hstack, vstack
from scipy.stats import pearsonr, spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm
from train_language_model import Corpus, bits_per_byte
from train_rewards import (
    ALLOWED_CLASSES,
    LEARNED_PAIRS,
    Encoder,
    Example,
    Lexicon,
    drawn_examples,
    drawn_replies,
    everyday_dialogues,
    everyday_examples,
    labelled_examples,
    lexicon_examples,
    licence_classes,
    score_replies,
)
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

RESAMPLES = 2000
LIMIT = 600
DIALOGUES = 60


class Classifiers:
    """The bundled classifiers, asked by the names of their heads."""

    def __init__(self, bundle: Path, names: Sequence[str] = ("rewards", "sentiment")) -> None:
        """Load them."""
        self.heads: dict[str, tuple[Any, Encoder]] = {}
        for name in names:
            model = LlamaForSequenceClassification.from_pretrained(
                bundle / name, dtype=torch.float32
            ).eval()
            labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
            encoder = Encoder(AutoTokenizer.from_pretrained(bundle / name), labels)
            self.heads |= dict.fromkeys(labels, (model, encoder))

    def scores(self, head: str, items: Sequence[tuple[Any, str]]) -> list[torch.Tensor]:
        """Return for every reply the logit of a head at each of its prefixes.

        The first is the empty reply's, the last the closed one's.
        """
        model, encoder = self.heads[head]
        place = encoder.heads.index(head)
        return [scores[:, place] for scores in score_replies(model, encoder, items)]


def thinned(rows: Sequence[Any], limit: int) -> list[Any]:
    """Return at most so many rows, spread over all."""
    return list(rows[:: max(1, -(-len(rows) // limit))])


class Trigram:
    """A trigram model of token ids, interpolated with absolute discounting.

    Source:
        Kneser and Ney 1995, interpolated as in Chen and Goodman 1999, one discount.
    """

    def __init__(self, ids: np.ndarray, vocabulary: int, discount: float = 0.8) -> None:
        """Count the tokens of a text."""
        self.size, self.discount = vocabulary, discount
        ids = ids.astype(np.int64)
        three = (ids[:-2] * vocabulary + ids[1:-1]) * vocabulary + ids[2:]
        self.three = np.unique(three, return_counts=True)
        # Lower orders count in how many contexts a token was met, not how often.
        two = self.three[0] % (vocabulary * vocabulary)
        self.two = np.unique(two, return_counts=True)
        one = self.two[0] % vocabulary
        self.one = np.bincount(one, minlength=vocabulary) + 0.1
        self.three_context = self._contexts(self.three)
        self.two_context = self._contexts(self.two)

    def _contexts(self, table: Any) -> Any:
        keys, counts = table
        contexts, start = np.unique(keys // self.size, return_index=True)
        totals = np.add.reduceat(counts, start)
        kinds = np.diff(np.append(start, len(keys)))
        return contexts, totals, kinds

    def _look_up(self, keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        place = np.clip(np.searchsorted(keys, wanted), 0, len(keys) - 1)
        return np.where(keys[place] == wanted, values[place], 0)

    def _level(self, table: Any, contexts: Any, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        count = self._look_up(*table, keys)
        total = self._look_up(contexts[0], contexts[1], keys // self.size)
        kinds = self._look_up(contexts[0], contexts[2], keys // self.size)
        safe = np.maximum(total, 1)
        p = np.maximum(count - self.discount, 0) / safe + self.discount * kinds / safe * lower
        return np.where(total > 0, p, lower)

    def bits(self, ids: np.ndarray) -> np.ndarray:
        """Return what each token costs after the first two."""
        ids = ids.astype(np.int64)
        one = self.one[ids[2:]] / self.one.sum()
        two = ids[1:-1] * self.size + ids[2:]
        p = self._level(self.two, self.two_context, two, one)
        p = self._level(self.three, self.three_context, ids[:-2] * self.size**2 + two, p)
        return -np.log2(p)


def measure_language(bundle: Path, work: Path) -> dict[str, Any]:
    """Return bits per byte of the assistant's turns, by source and in all."""
    tokenizer = AutoTokenizer.from_pretrained(bundle / "language_model")
    model = LlamaForCausalLM.from_pretrained(bundle / "language_model", dtype=torch.float32)
    model.eval()
    train, apart = Corpus(work / "train.npz"), Corpus(work / "held_apart.npz")
    trigram = Trigram(train.ids, len(tokenizer))
    sizes = np.array([len(t) for t in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    sizes[:8] = 0
    figures: dict[str, Any] = {}
    sums: dict[str, np.ndarray] = {}
    for source in tqdm(sorted(set(apart.sources)), desc="bits per byte"):
        ours = bits_per_byte(model, tokenizer, apart, {source}, DIALOGUES)
        chosen = [i for i, s in enumerate(apart.sources) if s == source]
        bits = num_bytes = 0.0
        for i in chosen[:: max(1, len(chosen) // DIALOGUES)][:DIALOGUES]:
            span = slice(apart.starts[i], apart.starts[i + 1])
            ids, said = apart.ids[span], apart.parts[span] == 2
            costs = trigram.bits(ids)
            bits += float(costs[said[2:]].sum())
            num_bytes += int(sizes[ids[2:]][said[2:]].sum())
        sums[source] = np.array(
            [ours["bits_per_byte"] * ours["bytes"], ours["bytes"], bits, num_bytes]
            + [ours["dialogues"]]
        )
    sums["all"] = sum(of_source for name, of_source in sums.items() if name != "sgd")
    for source, (our_bits, our_bytes, their_bits, their_bytes, dialogues) in sums.items():
        figures[source] = {
            "model": round(float(our_bits / our_bytes), 4),
            "trigram": round(float(their_bits / their_bytes), 4),
            "dialogues": int(dialogues),
            "bytes": int(our_bytes),
        }
    figures["note"] = "`all` leaves out sgd, whose booking dialogues are many and alike"
    return figures


def text_of(prompt: Any) -> str:
    """Return a prompt's words, each marked as the prompt's."""
    return " ".join(m["content"] for m in prompt)


class WordBag:
    """A bag of words and word pairs, of the reply and, apart from it, of its last request."""

    def __init__(self, *, with_prompt: bool) -> None:
        """Say whether the prompt's words are counted too."""
        self.with_prompt = with_prompt
        options = {"ngram_range": (1, 2), "min_df": 2, "sublinear_tf": True}
        self.replies = TfidfVectorizer(**options)
        self.prompts = TfidfVectorizer(**options)

    def fit(self, items: Sequence[tuple[Any, str]]) -> "WordBag":
        """Learn the words."""
        self.replies.fit([reply for _, reply in items])
        if self.with_prompt:
            self.prompts.fit([text_of(prompt[-1:]) for prompt, _ in items])
        return self

    def __call__(self, items: Sequence[tuple[Any, str]]) -> Any:
        """Return features."""
        replies = self.replies.transform([reply for _, reply in items])
        if not self.with_prompt:
            return replies
        prompts = self.prompts.transform([text_of(prompt[-1:]) for prompt, _ in items])
        return hstack([replies, prompts]).tocsr()


def fit_labels(examples: Sequence[Example], *, with_prompt: bool) -> Callable[[Any], np.ndarray]:
    """Return a bag of words that says how safe a reply is."""
    items = [(e.prompt, e.replies[0]) for e in examples]
    labels = [e.labels["safe"] for e in examples]
    bag = WordBag(with_prompt=with_prompt).fit(items)
    model = LogisticRegression(C=10.0, max_iter=400).fit(bag(items), labels)
    return lambda items: model.decision_function(bag(items))


def fit_pairs(examples: Sequence[Example], strength: float) -> Callable[[Any], np.ndarray]:
    """Return a bag of words that says how good a reply is, learned from pairs."""
    chosen = [(e.prompt, e.replies[0]) for e in examples]
    rejected = [(e.prompt, e.replies[1]) for e in examples]
    bag = WordBag(with_prompt=False).fit([*chosen, *rejected])
    gaps = bag(chosen) - bag(rejected)
    features = vstack([gaps, -gaps])
    labels = [1] * len(chosen) + [0] * len(chosen)
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=400)
    model.fit(features, labels)
    return lambda items: model.decision_function(bag(items))


def interval(values: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Return the bootstrap interval, at 95 %, of a mean."""
    draws = rng.integers(0, len(values), (RESAMPLES, len(values)))
    return [round(float(v), 4) for v in np.quantile(values[draws].mean(1), (0.025, 0.975))]


def compare_areas(
    labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    """Return both areas under the curve and the paired interval of their difference."""
    gaps = []
    for _ in range(500):
        draw = rng.integers(0, len(labels), len(labels))
        if 0 < labels[draw].sum() < len(draw):
            gaps.append(
                roc_auc_score(labels[draw], ours[draw]) - roc_auc_score(labels[draw], theirs[draw])
            )
    return {
        "rows": len(labels),
        "share_safe": round(float(labels.mean()), 3),
        "auc": round(float(roc_auc_score(labels, ours)), 4),
        "auc_bag_of_words": round(float(roc_auc_score(labels, theirs)), 4),
        "auc_gain_interval": [round(float(v), 4) for v in np.quantile(gaps, (0.025, 0.975))],
        "accuracy": round(float(((ours > 0) == labels).mean()), 4),
        "accuracy_bag_of_words": round(float(((theirs > 0) == labels).mean()), 4),
    }


def measure_safety(
    classifiers: Classifiers, examples: Sequence[Example], classes: dict[str, str]
) -> dict[str, Any]:
    """Return how well replies, comments and requests are told apart."""
    rng = np.random.default_rng(0)
    figures: dict[str, Any] = {}
    kinds: dict[str, Callable[[Example], bool]] = {
        "responses": lambda e: not e.only_prompt and bool(e.prompt),
        "toxicity": lambda e: not e.only_prompt and not e.prompt,
        "prompts": lambda e: e.only_prompt,
    }
    for kind, belongs in kinds.items():
        rows = [e for e in examples if not e.pair_head and belongs(e)]
        allowed = [e for e in rows if classes[e.source] in ALLOWED_CLASSES]
        if kind == "prompts":
            # The bag of words reads the request, as the head does.
            rows_as_replies = {id(e): ([], e.prompt[-1]["content"]) for e in rows}
        learned = [e for e in allowed if not e.held_apart]
        if kind == "prompts":
            learned = [
                Example(
                    source=e.source, prompt=[], replies=(e.prompt[-1]["content"],), labels=e.labels
                )
                for e in learned
            ]
        rivals = {"reply": fit_labels(learned, with_prompt=False)}
        if kind == "responses":
            rivals["reply and prompt"] = fit_labels(learned, with_prompt=True)
        groups = {"held apart": [e for e in allowed if e.held_apart]}
        for source in sorted({e.source for e in rows}):
            of_source = [e for e in rows if e.source == source]
            if classes[source] in ALLOWED_CLASSES:
                groups[f"held apart, {source}"] = [e for e in of_source if e.held_apart]
            else:
                groups[f"not learned from, {source}"] = thinned(of_source, LIMIT)
        place = 0 if kind == "prompts" else -1
        for name, members in groups.items():
            labels = np.array([e.labels["safe"] for e in members])
            if len(members) < 30 or len(set(labels)) < 2:
                continue
            items = [(e.prompt, e.replies[0]) for e in members]
            ours = np.array([float(s[place]) for s in classifiers.scores("safe", items)])
            words = [rows_as_replies[id(e)] for e in members] if kind == "prompts" else items
            best = max(
                (rival(words) for rival in rivals.values()),
                key=lambda scores: roc_auc_score(labels, scores),
            )
            figures[f"{kind}: {name}"] = compare_areas(labels.astype(bool), ours, best, rng)
            if kind == "prompts":
                unsafe = labels == 0
                figures[f"{kind}: {name}"] |= {
                    "unsafe_called_unsafe": round(float((ours[unsafe] < 0).mean()), 4),
                    "safe_called_unsafe": round(float((ours[~unsafe] < 0).mean()), 4),
                }
    return figures


def measure_pairs(classifiers: Classifiers, examples: Sequence[Example]) -> dict[str, Any]:
    """Return how often the preferred reply of a pair is ranked first."""
    rng = np.random.default_rng(0)
    figures: dict[str, Any] = {}
    pairs = [e for e in examples if e.pair_head]
    learnable = set(LEARNED_PAIRS)
    for head_name in ("safe", "helpful"):
        of_head = [e for e in pairs if e.pair_head == head_name]
        learned = [e for e in of_head if e.source in learnable and not e.held_apart]
        # Its one knob is chosen on a tenth of what it learns from.
        cut = len(learned) // 10
        shuffled = random.Random(0).sample(learned, len(learned))
        strengths = {}
        for strength in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
            rival = fit_pairs(shuffled[cut:], strength)
            first = rival([(e.prompt, e.replies[0]) for e in shuffled[:cut]])
            second = rival([(e.prompt, e.replies[1]) for e in shuffled[:cut]])
            strengths[strength] = float((first > second).mean())
        strength = max(strengths, key=strengths.__getitem__)
        rival = fit_pairs(learned, strength)
        pooled: list[tuple[np.ndarray, np.ndarray]] = []
        for source in sorted({e.source for e in of_head}):
            members = [e for e in of_head if e.source == source]
            if source in learnable:
                members = [e for e in members if e.held_apart]
            else:
                members = thinned(members, LIMIT)
            items = [(e.prompt, reply) for e in members for reply in e.replies]
            ends = np.array([float(s[-1]) for s in classifiers.scores(head_name, items)])
            ours = (ends[::2] > ends[1::2]).astype(float)
            scores = rival(items)
            theirs = (scores[::2] > scores[1::2]) + 0.5 * (scores[::2] == scores[1::2])
            longer = np.array([len(e.replies[0]) > len(e.replies[1]) for e in members])
            figures[f"{head_name}: {source}"] = {
                "pairs": len(members),
                "learned_from": source in learnable,
                "accuracy": round(float(ours.mean()), 4),
                "accuracy_bag_of_words": round(float(theirs.mean()), 4),
                "accuracy_of_the_longer": round(float(longer.mean()), 4),
                "gain_interval": interval(ours - theirs, rng),
            }
            if source in learnable:
                pooled.append((ours, theirs))
        ours, theirs = (np.concatenate(parts) for parts in zip(*pooled, strict=True))
        figures[f"{head_name}: pooled, held apart"] = {
            "pairs": len(ours),
            "accuracy": round(float(ours.mean()), 4),
            "accuracy_bag_of_words": round(float(theirs.mean()), 4),
            "gain_interval": interval(ours - theirs, rng),
        }
    return figures


def measure_sentiment(
    classifiers: Classifiers, data: Path, work: Path, lexicon: Lexicon
) -> dict[str, Any]:
    """Return how often the polarity agrees with people's on films, of which none was learned."""
    rng = random.Random(0)
    everyday = list(everyday_dialogues(data))
    learned = everyday_examples(everyday, ("positive",), lexicon, rng)
    taught = [e for e in learned if e.source == "tone"]
    taught += drawn_examples(drawn_replies(work), ("positive",), lexicon, rng)
    taught += lexicon_examples(lexicon, everyday, 15000, rng)
    items = [(e.prompt, e.replies[0]) for e in taught]
    bag = WordBag(with_prompt=False).fit(items)
    rival = Ridge(alpha=1.0).fit(bag(items), [e.word_labels["positive"][-1] - 0.5 for e in taught])
    figures = {}
    boot = np.random.default_rng(0)
    for name, limit in (("sentences", 5000), ("imdb", 1000)):
        rows = list(read_rows(data, f"sentiment/{name}"))
        rows = thinned(rows, limit)
        labels = np.array([row["label"] == "pos" for row in rows])
        texts = [([], row["text"]) for row in rows]
        ours = np.array([float(s[-1]) for s in classifiers.scores("positive", texts)])
        theirs = rival.predict(bag(texts))
        words = np.array([lexicon.compound(row["text"]) for row in rows])
        right, right_bag = (ours > 0) == labels, (theirs > 0) == labels
        figures[name] = {
            "rows": len(rows),
            "accuracy": round(float(right.mean()), 4),
            "accuracy_bag_of_words": round(float(right_bag.mean()), 4),
            "accuracy_of_the_lexicon": round(
                float(((words > 0) == labels)[words != 0].sum() + 0.5 * (words == 0).sum())
                / len(rows),
                4,
            ),
            "auc": round(float(roc_auc_score(labels, ours)), 4),
            "auc_bag_of_words": round(float(roc_auc_score(labels, theirs)), 4),
            "auc_of_the_lexicon": round(float(roc_auc_score(labels, words)), 4),
            "gain_interval": interval(right.astype(float) - right_bag, boot),
        }
    return figures


def measure_foresight(
    classifiers: Classifiers, examples: Sequence[Example], segment: int = 16
) -> dict[str, Any]:
    """Return how the score of a prefix goes with the score of the whole, by position."""
    replies = {
        "safe": [e for e in examples if e.held_apart and not e.pair_head and not e.only_prompt],
        "helpful": [e for e in examples if e.held_apart and e.pair_head == "helpful"],
    }
    replies["positive"] = replies["helpful"]
    figures: dict[str, Any] = {}
    for name, members in replies.items():
        scored = classifiers.scores(name, [(e.prompt, e.replies[0]) for e in members[:1200]])
        columns = {}
        for place in range(segment, 129, segment):
            long = [s for s in scored if len(s) > place + 2]
            if len(long) < 30:
                break
            early = [float(s[place]) for s in long]
            final = [float(s[-1]) for s in long]
            columns[str(place)] = {
                "replies": len(long),
                "pearson": round(float(pearsonr(early, final)[0]), 3),
                "spearman": round(float(spearmanr(early, final)[0]), 3),
            }
        figures[name] = columns
    return figures


def main() -> None:
    """Measure everything and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--work", type=Path, required=True, help="folder with the token files")
    parser.add_argument("--bundle", type=Path, required=True, help="folder of the models")
    parser.add_argument("--output", type=Path, required=True, help="where the figures go (JSON)")
    parser.add_argument("--only", default="language,safety,pairs,sentiment,foresight")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    begun = time.monotonic()

    classifiers = Classifiers(arguments.bundle)
    examples = list(labelled_examples(arguments.data, allowed_only=False))
    figures: dict[str, Any] = {}
    if arguments.output.exists():
        figures = json.loads(arguments.output.read_text())
    classes = licence_classes(arguments.data)
    parts: dict[str, Callable[[], Any]] = {
        "language": lambda: measure_language(arguments.bundle, arguments.work),
        "safety": lambda: measure_safety(classifiers, examples, classes),
        "pairs": lambda: measure_pairs(classifiers, examples),
        "sentiment": lambda: measure_sentiment(
            classifiers, arguments.data, arguments.work, Lexicon(arguments.data)
        ),
        "foresight": lambda: measure_foresight(classifiers, examples),
    }
    for name in arguments.only.split(","):
        figures[name] = parts[name]()
        arguments.output.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))
    print(f"{math.ceil(time.monotonic() - begun)} seconds")


if __name__ == "__main__":
    main()
