r"""Trains a small causal trunk with heads: is a reply safe, helpful, positive?

Knows labelled text, packed batches and losses; nothing of decoding. A head is asked at every
token of a reply, open and closed, and always for the label of the whole, so that its answer
on a prefix foretells its answer at the end. At the empty reply the safety head judges the
request itself.

What teaches which head:
    safe: labelled replies, toxic and clean comments, pairs of which one is less harmful,
        requests (at the empty reply), and everyday talk.
    helpful: pairs of which one was preferred, and replies that were given to somebody else,
        whose words were shaken or that were broken off; and the language model's own replies
        (`draw_replies.py`) beside those it gave to others.
    positive: two lexicons, read over everyday talk, over made-up sentences and over the language
        model's own replies.

A bag of words learns the same rows quickly and well. Its opinion, of rows it did not learn
from, is mixed into the labels of safety, and it labels pieces cut out of them word by word, so
that the trunk starts from what words alone tell. Half of the labelled texts lack a tenth of their
words each time they are met, and so are not learned by heart.

Run (after `train_language_model.py`):
    python examples/draw_replies.py --data DATA --work WORK --replies 12000
    python examples/train_language_model.py --work WORK --name trunk --steps 1100 --seed 1 \
        --hidden-size 224 --num-layers 5 --num-heads 7 --intermediate-size 600 \
        --rows 16 --length 256 --read-weight 1
    python examples/train_rewards.py --data DATA --work WORK --heads safe helpful \
        --learning-rate 2e-3 --steps 13500
    python examples/train_language_model.py --work WORK --name small --steps 1100 --seed 2 \
        --hidden-size 128 --num-layers 4 --num-heads 4 --intermediate-size 352 \
        --rows 16 --length 256 --read-weight 1
    python examples/train_rewards.py --data DATA --work WORK --name sentiment --trunk small \
        --heads positive --learning-rate 3e-3 --language 0 --steps 9000
What was interrupted goes on with the same command and `--resume`.
"""

import argparse
import itertools
import json
import math
import random
import re
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from prepare_data import (
    ALLOWED_CLASSES,
    Chat,
    dices_chat,
    fill_names,
    first_turn,
    is_held_apart,
    licence_classes,
    looks_english,
    read_rows,
    words_of,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from train_language_model import Clock, make_optimizers, save_bundle
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

HEADS = ("safe", "helpful", "positive")
LENGTH = 768
MAX_REPLY = 704
# Most batches have short rows; what is too long for them waits until it fills a batch of long ones.
SHORT_LENGTH = 384
MAX_WAITING = 8
# Most prompts are cut to a few words: what is asked about lies in the replies.
SHORT_PROMPT = 72
LONG_PROMPTS = 0.2
MAX_PAIRS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A reply, or a pair of replies, with what is known about it.

    Attributes:
        source: Name of the source in the data's README.
        prompt: Messages before the reply.
        replies: One reply, or two of which the first was preferred.
        labels: For each head that is taught, the probability that the reply deserves its name.
        pair_head: The head that tells the two replies apart.
        only_prompt: The label is the request's and holds at the empty reply alone.
        held_apart: Kept for measuring.
        word_labels: For a reply of single-spaced words, a head's labels before the first word
            and after each.
    """

    source: str
    prompt: Chat
    replies: tuple[str, ...]
    labels: dict[str, float] = field(default_factory=dict)
    pair_head: str | None = None
    only_prompt: bool = False
    held_apart: bool = False
    word_labels: dict[str, tuple[float, ...]] = field(default_factory=dict)


class Lexicon:
    """The polarity of a text by two lexicons and the main rules of VADER.

    A word's rating is the sum of VADER's (-4 to 4) and of four times its mean polarity (-1 to 1)
    over its senses in Pattern's lexicon of adjectives, which TextBlob has with it.

    Source:
        Hutto and Gilbert, ICWSM 2014: the sum of the words' ratings, turned round after a
        negation, strengthened after an intensifier, squashed into -1 to 1. Capitals,
        exclamation marks and idioms are left out, and the constant under the root is four times
        theirs, as ratings are twice as great. De Smedt and Daelemans, JMLR 2012 (Pattern).
    """

    NEGATIONS = frozenset(
        words_of(
            "not no never none nobody nothing neither nor nowhere without hardly barely "
            "rarely seldom isn't wasn't aren't weren't don't doesn't didn't can't cannot "
            "couldn't won't wouldn't shouldn't hasn't haven't hadn't ain't"
        )
    )
    STRONGER = frozenset(
        words_of(
            "very really so extremely absolutely completely incredibly totally truly deeply "
            "highly especially particularly remarkably such"
        )
    )
    WEAKER = frozenset(
        ["slightly", "somewhat", "partly", "barely", "hardly", "kinda", "sorta", "fairly"]
    )

    def __init__(self, data: Path) -> None:
        """Read the lexicon."""
        self.ratings = {r["token"]: r["mean"] for r in read_rows(data, "sentiment/vader_lexicon")}
        for word, polarity in self.polarities().items():
            self.ratings[word] = self.ratings.get(word, 0.0) + 4.0 * polarity

    @staticmethod
    def polarities() -> dict[str, float]:
        """Return the mean polarity of each word of Pattern's lexicon, where it is not 0."""
        text = resources.files("textblob").joinpath("en", "en-sentiment.xml").read_text("utf-8")
        senses: dict[str, list[float]] = {}
        for word in ElementTree.fromstring(text):
            senses.setdefault(word.attrib["form"], []).append(float(word.attrib["polarity"]))
        means = {form: sum(values) / len(values) for form, values in senses.items()}
        return {form: mean for form, mean in means.items() if mean}

    def words(self, text: str) -> list[str]:
        """Return the words and faces of a text, in small letters."""
        words = re.findall(r"[a-z]+(?:['’-][a-z]+)*|[:;=][-']?[()dp/]", text.lower())
        return [word.replace("’", "'") for word in words]

    def compound(self, text: str) -> float:
        """Return the polarity, from -1 to 1; 0 where no word is rated."""
        words = self.words(text)
        ratings = [self._rating(words, place) for place in range(len(words))]
        if "but" in words:
            turn = len(words) - 1 - words[::-1].index("but")
            ratings = [r * (0.5 if i < turn else 1.5) for i, r in enumerate(ratings)]
        total = sum(ratings)
        return total / math.sqrt(total * total + 60.0)

    def _rating(self, words: Sequence[str], place: int) -> float:
        rating = self.ratings.get(words[place], 0.0)
        if not rating:
            return 0.0
        before = words[max(0, place - 3) : place]
        for distance, word in enumerate(reversed(before)):
            push = 0.293 * (1.0 - 0.05 * distance)
            if word in self.STRONGER:
                rating += math.copysign(push, rating)
            elif word in self.WEAKER:
                rating -= math.copysign(push, rating)
        if any(word in self.NEGATIONS for word in before):
            rating *= -0.74
        return rating

    def probabilities(self, text: str) -> tuple[float, ...]:
        """Return how positive a text is, as a probability, before its first word and after each.

        A quarter of each is the whole text's, so that what a beginning foretells counts too.
        """
        words: list[str] = []
        before = since = 0.0
        turned = False
        compounds = [0.0]
        for group in text.split(" "):
            for word in self.words(group):
                words.append(word)
                if word == "but":
                    before, since, turned = 0.5 * (before + since), 0.0, True
                since += self._rating(words, len(words) - 1) * (1.5 if turned else 1.0)
            total = before + since
            compounds.append(total / math.sqrt(total * total + 60.0))
        return tuple(0.5 + 0.5 * (0.75 * c + 0.25 * compounds[-1]) for c in compounds)


def labelled_examples(data: Path, *, allowed_only: bool = True) -> Iterator[Example]:
    """Yield replies, comments and requests with a safety label, and preferred pairs."""
    classes = licence_classes(data)

    def usable(row: dict[str, Any]) -> bool:
        return not allowed_only or classes[row["source"]] in ALLOWED_CLASSES

    for row in filter(usable, read_rows(data, "safety/responses")):
        if row["source"] == "dices":
            prompt = dices_chat(row["prompt"])
        else:
            prompt = [{"role": "user", "content": row["prompt"]}]
        yield Example(
            source=row["source"],
            prompt=prompt,
            replies=(row["response"],),
            labels={"safe": float(row["label"] == "safe")},
            held_apart=is_held_apart(first_turn(prompt)),
        )
    for row in filter(usable, read_rows(data, "safety/toxicity")):
        yield Example(
            source=row["source"],
            prompt=[],
            replies=(row["text"],),
            labels={"safe": float(row["label"] == "nontoxic")},
            held_apart=is_held_apart(row["text"]),
        )
    for row in filter(usable, read_rows(data, "safety/prompts")):
        yield Example(
            source=row["source"],
            prompt=[{"role": "user", "content": row["prompt"]}],
            replies=("",),
            labels={"safe": float(row["label"] == "safe")},
            only_prompt=True,
            held_apart=is_held_apart(row["prompt"]),
        )
    for name in (*LEARNED_PAIRS, *MEASURED_PAIRS):
        for row in filter(usable, read_rows(data, f"prefs/{name}")):
            yield Example(
                source=name,
                prompt=row["messages"],
                replies=(row["chosen"], row["rejected"]),
                pair_head="safe" if row["task"] == "harmless" else "helpful",
                held_apart=is_held_apart(first_turn(row["messages"])),
            )


LEARNED_REQUESTS = words_of(
    "or_bench harmfulqa coconot deepset_injections strongreject advbench catqa harmbench"
)
LEARNED_PAIRS = words_of("hh_harmless hh_helpful oasst_ranks llmbar pandalm coconot_pref")
MEASURED_PAIRS = words_of("rmb_harmless rmb_helpful webgpt auto_j")


def everyday_dialogues(data: Path) -> Iterator[Chat]:
    """Yield dialogues nobody need be guarded from, on the learning side of the split."""
    rng = random.Random(0)
    for name in ("topical_chat", "persona", "roleplay", "dolly", "oasst_en100", "sgd"):
        for row in read_rows(data, f"chat/{name}"):
            messages = fill_names(row["messages"], rng)
            text = " ".join(m["content"] for m in messages)
            rare = name == "sgd" and rng.random() > 0.05
            if not is_held_apart(first_turn(row["messages"])) and looks_english(text) and not rare:
                yield messages


def drawn_replies(work: Path) -> list[tuple[Chat, str]]:
    """Return threads and the language model's own replies to them."""
    lines = (work / "replies.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["messages"], row["reply"]) for row in rows if row["reply"].strip()]


def drawn_examples(
    drawn: Sequence[tuple[Chat, str]], heads: Sequence[str], lexicon: Lexicon, rng: random.Random
) -> Iterator[Example]:
    """Yield the language model's own replies: beside others, and with the polarity of their words."""
    for prompt, reply in drawn:
        held_apart = zlib.crc32(reply.encode()) % 20 == 0
        if "helpful" in heads and not held_apart:
            other = rng.choice(drawn)[1]
            if other != reply:
                yield Example(
                    source="drawn pair", prompt=prompt, replies=(reply, other), pair_head="helpful"
                )
        if "positive" in heads:
            text = " ".join(reply.split())
            tone = {"positive": lexicon.probabilities(text)}
            yield Example(
                source="drawn",
                prompt=prompt[-1:],
                replies=(text,),
                held_apart=held_apart,
                word_labels=tone,
            )


def everyday_examples(
    everyday: Sequence[Chat], heads: Sequence[str], lexicon: Lexicon, rng: random.Random
) -> Iterator[Example]:
    """Yield everyday replies: apt and inapt ones, and, some joined, the polarity of their words."""
    turns = []
    for messages in everyday:
        places = [i for i, m in enumerate(messages) if i and m["role"] == "assistant"]
        for place in rng.sample(places, min(3, len(places))):
            turns.append((messages[max(0, place - 5) : place], messages[place]["content"]))
    for prompt, reply in turns:
        labels = {"safe": 1.0, "helpful": 1.0}
        yield Example(source="everyday", prompt=prompt, replies=(reply,), labels=labels)
        if "positive" in heads:
            others = [rng.choice(turns)[1] for _ in range(rng.choice((0, 0, 0, 1, 3, 8)))]
            text = " ".join(" ".join([reply, *others]).split())
            tone = {"positive": lexicon.probabilities(text)}
            yield Example(source="tone", prompt=prompt[-1:], replies=(text,), word_labels=tone)
        kind = rng.random()
        if kind < 0.4:
            other = rng.choice(turns)[1]
            # A reply to somebody else is as fluent, but it does not answer.
            pair = (reply, other)
        elif kind < 0.6:
            words = reply.split()
            start = rng.randrange(max(1, len(words) // 2))
            shaken = words[start:]
            rng.shuffle(shaken)
            pair = (reply, " ".join(words[:start] + shaken))
        elif kind < 0.7:
            words = reply.split()
            pair = (reply, " ".join(words[: rng.randrange(1, max(2, len(words)))]))
        else:
            continue
        if pair[0] != pair[1]:
            yield Example(source="inapt", prompt=prompt, replies=pair, pair_head="helpful")


SUBJECTS = words_of(
    "the film;the movie;this story;the acting;the plot;the ending;the music;the "
    "food;the day;the trip;my job;the service;the book;the weather;this place;the "
    "script;the cast;my friend;the party;the game;his performance;her voice;the "
    "direction;the whole thing;it;this one;the hotel;the show;the humor;the dialogue",
    ";",
)
FRAMES = (
    "{S} was {W}",
    "{S} is {W}",
    "I think {S} was {W}",
    "I found {S} {W}",
    "{S} felt {W} and {W}",
    "what a {W} thing {S} was",
    "{S} was {N} {W}",
    "I do {N} think {S} is {W}",
    "{S} was {B} {W}",
    "it was {B} {W}, and {S} was {W}",
    "{S} was {W} but {S} was {W}",
    "there is something {W} about {S}",
    "{W}, {W} and {W}",
    "I {W} {S}",
    "we {W} {S} because it was {W}",
    "{S} made me feel {W}",
    "full of {W} and {W}",
    "a {W} {S} with {W} moments",
    "{S} has {W}",
    "{W}",
)


def lexicon_examples(
    lexicon: Lexicon, everyday: Sequence[Chat], count: int, rng: random.Random
) -> Iterator[Example]:
    """Yield made-up sentences full of rated words, so that every one of them is met."""
    counts = Counter(
        word for chat in everyday for m in chat for word in lexicon.words(m["content"])
    )
    words = [w for w in lexicon.ratings if re.fullmatch(r"[a-z][a-z'-]+", w)]
    # Words that people say are met more often, and every one now and then.
    shares = list(itertools.accumulate(1.0 + counts[word] ** 0.75 for word in words))

    def word() -> str:
        return rng.choices(words, cum_weights=shares)[0]

    plain = words_of("I you we the a it that they and then of in on to with for very one time")
    modest = ("not", "never", "hardly")
    strong = sorted(Lexicon.STRONGER - {"such"}) + sorted(Lexicon.WEAKER)
    earlier = "What do you think?"
    for _ in range(count):
        sentences = []
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 10))):
            if rng.random() < 0.75:
                sentence = rng.choice(FRAMES)
                while "{W}" in sentence:
                    sentence = sentence.replace("{W}", word(), 1)
                while "{S}" in sentence:
                    sentence = sentence.replace("{S}", rng.choice(SUBJECTS), 1)
                sentence = sentence.replace("{N}", rng.choice(modest))
                sentence = sentence.replace("{B}", rng.choice(strong))
            else:
                mixed = rng.choices(plain, k=rng.randrange(2, 8))
                mixed += [word() for _ in range(rng.randrange(1, 4))]
                rng.shuffle(mixed)
                sentence = " ".join(mixed)
            sentences.append(sentence[0].upper() + sentence[1:] + rng.choice((".", ".", "!", "")))
        text = " ".join(sentences)
        tone = {"positive": lexicon.probabilities(text)}
        # What was asked is no part of how the reply sounds.
        prompt = [{"role": "user", "content": earlier}] if rng.random() < 0.4 else []
        yield Example(source="lexicon", prompt=prompt, replies=(text,), word_labels=tone)
        earlier = text


def teaches(example: Example, heads: Sequence[str]) -> bool:
    """Say whether an example teaches one of the heads."""
    taught = {example.pair_head, *example.labels, *example.word_labels}
    return not taught.isdisjoint(heads)


def thinned(example: Example, rng: random.Random) -> Example:
    """Return an example with a tenth of the words left out of the text that its label is about."""
    whole = judged_text(example)
    text = " ".join(word for word in whole.split(" ") if rng.random() > 0.1) or whole
    if example.only_prompt:
        return replace(example, prompt=[*example.prompt[:-1], {"role": "user", "content": text}])
    return replace(example, replies=(text,))


def kind_of(example: Example) -> str:
    """Return which file an example with a safety label is like."""
    if example.only_prompt:
        return "prompts"
    return "responses" if example.prompt else "toxicity"


def judged_text(example: Example) -> str:
    """Return the text that a safety label is about."""
    return example.prompt[-1]["content"] if example.only_prompt else example.replies[0]


class WordTeacher:
    """Bags of words that learned the safety labels, one for each kind of row."""

    def __init__(self, examples: Sequence[Example], folds: int = 5) -> None:
        """Learn from the examples, and judge each by a bag that did not learn from it."""
        self.pipelines: dict[str, Any] = {}
        self.opinions: dict[int, float] = {}
        for kind in ("responses", "toxicity", "prompts"):
            rows = [e for e in examples if "safe" in e.labels and kind_of(e) == kind]
            texts = [judged_text(e) for e in rows]
            labels = [int(e.labels["safe"]) for e in rows]
            # Rows that share a first turn stay in one fold.
            groups = [first_turn(e.prompt) or judged_text(e) for e in rows]
            pipeline = make_pipeline(
                TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
                LogisticRegression(C=10.0, max_iter=400),
            )
            opinions = cross_val_predict(
                pipeline, texts, labels, groups=groups, cv=GroupKFold(folds), method="predict_proba"
            )[:, 1]
            self.opinions |= {id(e): float(p) for e, p in zip(rows, opinions, strict=True)}
            self.pipelines[kind] = pipeline.fit(texts, labels)

    def mixed(self, example: Example, share: float) -> Example:
        """Return the example with the teacher's opinion mixed into its label."""
        opinion = self.opinions.get(id(example))
        if opinion is None:
            return example
        label = (1.0 - share) * example.labels["safe"] + share * opinion
        return replace(example, labels={**example.labels, "safe": label})

    def pieces(
        self, examples: Sequence[Example], count: int, rng: random.Random
    ) -> Iterator[Example]:
        """Yield runs of words out of comments, replies and requests, labelled by the teacher."""
        for kind, share in (("toxicity", 0.5), ("responses", 0.3), ("prompts", 0.2)):
            rows = [e for e in examples if id(e) in self.opinions and kind_of(e) == kind]
            texts = []
            for _ in range(int(share * count)):
                words: list[str] = []
                for example in rng.sample(rows, rng.choice((1, 1, 2))):
                    of_text = judged_text(example).split()
                    length = rng.randint(1, rng.choice((30, 30, 30, 200)))
                    start = rng.randrange(max(1, len(of_text) - length // 2))
                    words += of_text[start : start + length]
                texts.append(" ".join(words))
            if kind == "prompts":
                opinions = self.pipelines[kind].predict_proba(texts)[:, 1].tolist()
                for text, opinion in zip(texts, opinions, strict=True):
                    yield Example(
                        source="pieces",
                        prompt=[{"role": "user", "content": text}],
                        replies=("",),
                        labels={"safe": opinion},
                        only_prompt=True,
                    )
                continue
            # Asked up to every word, the teacher tells which words turned its opinion.
            words_of_texts = [text.split(" ") for text in texts]
            beginnings = [
                " ".join(words[: place + 1])
                for words in words_of_texts
                for place in range(len(words))
            ]
            opinions = iter(self.pipelines[kind].predict_proba(beginnings)[:, 1].tolist())
            for text, words in zip(texts, words_of_texts, strict=True):
                # Before the first word the head answers for the request, which is not asked.
                labels = (math.nan, *(next(opinions) for _ in words))
                yield Example(
                    source="pieces", prompt=[], replies=(text,), word_labels={"safe": labels}
                )


# How often an example of each source is met in one epoch.
EPOCH_WEIGHTS = {
    "davidson": 1.0,
    "gptfuzz_labelled": 3.0,
    **dict.fromkeys(("openai_moderation", "surge_toxicity", "wiki_toxicity"), 2.0),
    "hatecheck": 3.0,
    "dices": 2.0,
    **dict.fromkeys(LEARNED_REQUESTS, 2.0),
    "everyday prompts": 0.6,
    "everyday": 0.1,
    "inapt": 0.3,
    "drawn pair": 0.4,
    **dict.fromkeys(LEARNED_PAIRS, 0.3),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """Token ids with, at every token, what each head is asked and how much it counts."""

    ids: list[int]
    first: int
    targets: list[tuple[int, int, float, float]]

    @property
    def last(self) -> int:
        """Index of the closing token."""
        return len(self.ids) - 1


class Encoder:
    """Turns examples into token ids and questions."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, heads: Sequence[str] = HEADS) -> None:
        """Keep the tokenizer and the names of the heads, in their order."""
        self.tokenizer = tokenizer
        self.heads = tuple(heads)
        self.assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")

    def prompt_ids(self, prompt: Chat, room: int) -> list[int]:
        """Return the prompt with an empty open reply, its oldest part cut to fit."""
        tokenizer = self.tokenizer
        ids: list[int] = []
        for message in prompt:
            ids.append(tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"))
            ids += tokenizer.encode(message["content"], add_special_tokens=False)
            ids.append(tokenizer.eos_token_id)
        return [tokenizer.bos_token_id, *ids[-max(0, room - 2) :][: room - 2], self.assistant]

    def encode(
        self, example: Example, reply: str, labels: dict[str, float], room: int = LENGTH
    ) -> Asked:
        """Return one reply with its questions, its prompt in at most `room` tokens.

        Half of what an example counts is spread over its prefixes, a quarter lies on the
        whole reply left open and a quarter on the closed one.
        """
        if example.word_labels:
            return self._encode_words(example, reply, room)
        content = self.tokenizer.encode(reply, add_special_tokens=False)[:MAX_REPLY]
        if example.only_prompt:
            content, tail = [], []
        else:
            tail = [self.tokenizer.eos_token_id]
        prompt = self.prompt_ids(example.prompt, min(room, LENGTH - len(content) - len(tail)))
        ids = prompt + content + tail
        first = len(prompt) - 1
        targets = []
        for name, label in labels.items():
            if name not in self.heads:
                continue
            head = self.heads.index(name)
            if example.only_prompt:
                targets.append((first, head, label, 1.0))
                continue
            # At the empty reply the safety head answers for the request, which is not asked here.
            start = first + 1 if name == "safe" else first
            last = len(ids) - 1
            spread = 0.5 / max(1, last - start)
            for place in range(start, last):
                targets.append((place, head, label, spread + 0.25 * (place == last - 1)))
            targets.append((last, head, label, 0.25))
        return Asked(ids, first, targets)

    def _encode_words(self, example: Example, reply: str, room: int) -> Asked:
        """Return a reply that is asked before its first word, after each, and closed."""
        words = reply.split(" ")
        pieces = [self.tokenizer.encode(words[0], add_special_tokens=False)]
        pieces += [self.tokenizer.encode(f" {w}", add_special_tokens=False) for w in words[1:]]
        lengths = [0, *itertools.accumulate(len(piece) for piece in pieces)]
        kept = sum(length <= MAX_REPLY for length in lengths)
        content = [token for piece in pieces[: kept - 1] for token in piece]
        prompt = self.prompt_ids(example.prompt, min(room, LENGTH - len(content) - 1))
        ids = [*prompt, *content, self.tokenizer.eos_token_id]
        first = len(prompt) - 1
        places = [*(first + length for length in lengths[:kept]), len(ids) - 1]
        targets = []
        for name, of_words in example.word_labels.items():
            if name not in self.heads:
                continue
            labels = [*of_words[:kept], of_words[kept - 1]]
            asked = [(p, y) for p, y in zip(places, labels, strict=True) if not math.isnan(y)]
            targets += [(p, self.heads.index(name), y, 1.0 / len(asked)) for p, y in asked]
        return Asked(ids, first, targets)


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples packed into rows of one length, each blind to its neighbours."""

    ids: Tensor
    positions: Tensor
    documents: Tensor
    targets: Tensor
    weights: Tensor
    pairs: Tensor
    pair_heads: Tensor
    pair_weights: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__slots__))


@dataclass(slots=True)
class Waiting:
    """Examples that found no room yet, with the room that their prompts have.

    Attributes:
        too_long: For short rows.
        left_over: In the last batch.
    """

    too_long: deque[tuple[Example, int]] = field(default_factory=deque)
    left_over: deque[tuple[Example, int]] = field(default_factory=deque)


def pack(
    examples: Iterator[Example],
    encoder: Encoder,
    shape: tuple[int, int],
    waiting: Waiting,
    rng: random.Random,
) -> Batch:
    """Fill the rows of one batch, first with what waits and then from a stream of examples.

    Stops when examples find no room; those join the ones that wait, so that none is lost.
    """
    rows, length = shape
    ids = torch.zeros((rows, length), dtype=torch.long)
    positions = torch.zeros((rows, length), dtype=torch.long)
    documents = torch.full((rows, length), -1, dtype=torch.long)
    targets = torch.zeros((rows, length, len(encoder.heads)))
    weights = torch.zeros((rows, length, len(encoder.heads)))
    pairs: list[tuple[int, int]] = []
    pair_heads: list[int] = []
    pair_weights: list[float] = []
    used = [0] * rows
    number = 0
    failures = 0
    while failures < 3:
        if waiting.too_long and length == LENGTH:
            example, room = waiting.too_long.popleft()
        elif waiting.left_over:
            example, room = waiting.left_over.popleft()
        else:
            example = next(examples)
            whole = example.only_prompt or rng.random() < LONG_PROMPTS
            room = LENGTH if whole else SHORT_PROMPT
        replies = list(zip(example.replies, (1.0, 0.0), strict=False))
        labelled = {example.pair_head: None} if example.pair_head else {}
        sequences = [
            encoder.encode(
                example, reply, {name: which for name in labelled} or example.labels, room
            )
            for reply, which in replies
        ]
        if max(len(sequence.ids) for sequence in sequences) > length:
            waiting.too_long.append((example, room))
            continue
        free = used.copy()
        places = []
        for sequence in sequences:
            row = next((r for r in range(rows) if free[r] + len(sequence.ids) <= length), None)
            if row is None:
                break
            places.append((row, free[row]))
            free[row] += len(sequence.ids)
        if len(places) < len(sequences) or len(pairs) + 2 > MAX_PAIRS:
            failures += 1
            waiting.left_over.append((example, room))
            continue
        used = free
        # Labels of pairs are weak: most of what they teach is the order.
        scale = 0.3 if example.pair_head else 1.0
        for sequence, (row, start) in zip(sequences, places, strict=True):
            span = slice(start, start + len(sequence.ids))
            ids[row, span] = torch.tensor(sequence.ids)
            positions[row, span] = torch.arange(len(sequence.ids))
            documents[row, span] = number
            number += 1
            for place, head, label, weight in sequence.targets:
                targets[row, start + place, head] = label
                weights[row, start + place, head] = weight * scale
        if example.pair_head:
            flat = [row * length + start for row, start in places]
            head = encoder.heads.index(example.pair_head)
            share = rng.random()
            for weight, ends in (
                (1.0, [s.last for s in sequences]),
                (0.5, [s.first + 1 + int(share * (s.last - s.first - 1)) for s in sequences]),
            ):
                pairs.append((flat[0] + ends[0], flat[1] + ends[1]))
                pair_heads.append(head)
                pair_weights.append(weight)
    missing = MAX_PAIRS - len(pairs)
    return Batch(
        ids,
        positions,
        documents,
        targets,
        weights,
        torch.tensor(pairs + [(0, 0)] * missing).view(MAX_PAIRS, 2),
        torch.tensor(pair_heads + [0] * missing),
        torch.tensor(pair_weights + [0.0] * missing),
    )


def make_loss(model: Any, device: torch.device, language: float, *, compiled: bool) -> Any:
    """Return a function of a batch's tensors that gives the losses of the heads.

    The loss is the cross-entropy of the labels at every token asked, the logistic loss of
    the pairs' order, and a little of the language model's loss, which keeps the trunk general.
    """

    def loss(
        ids: Tensor,
        positions: Tensor,
        documents: Tensor,
        targets: Tensor,
        weights: Tensor,
        pairs: Tensor,
        pair_heads: Tensor,
        pair_weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        length = ids.shape[1]
        causal = torch.ones((length, length), dtype=torch.bool, device=ids.device).tril()
        same = documents[:, :, None] == documents[:, None, :]
        mask = torch.where(same & causal, 0.0, -1e4)[:, None]
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask.to(torch.bfloat16),
                use_cache=False,
            ).last_hidden_state
            scores = model.score(hidden).float()
        labels = functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")
        label_loss = (labels * weights).sum() / weights.sum().clamp(min=1.0)
        flat = scores.flatten(0, 1)
        gap = flat[pairs[:, 0], pair_heads] - flat[pairs[:, 1], pair_heads]
        pair_loss = (functional.softplus(-gap) * pair_weights).sum()
        pair_loss = pair_loss / pair_weights.sum().clamp(min=1.0)
        if not language:
            return label_loss + 0.5 * pair_loss, label_loss, pair_loss
        with torch.autocast(device.type, torch.bfloat16):
            words = functional.linear(hidden[:, :-1], model.model.embed_tokens.weight)
        wanted = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
        next_words = functional.cross_entropy(
            words.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        wanted = wanted.flatten().float()
        language_loss = (next_words * wanted).sum() / wanted.sum()
        return label_loss + 0.5 * pair_loss + language * language_loss, label_loss, pair_loss

    return torch.compile(loss, dynamic=False) if compiled else loss


def stream(
    fixed: list[Example],
    heads: Sequence[str],
    lexicon: Lexicon,
    everyday: list[Chat],
    drawn: Sequence[tuple[Chat, str]],
    teacher: WordTeacher | None,
    seed: int,
) -> Iterator[Example]:
    """Yield examples for ever, sources weighted, everyday and made-up ones drawn anew."""
    prompts = [chat[:1] for chat in everyday if chat[0]["role"] == "user"]
    epoch = 0
    while True:
        rng = random.Random(seed * 1000 + epoch)
        pool = [teacher.mixed(example, 0.7) if teacher else example for example in fixed]
        if teacher:
            pool += teacher.pieces(fixed, 20000, rng)
        pool += [e for e in drawn_examples(drawn, heads, lexicon, rng) if not e.held_apart]
        if "positive" in heads:
            pool += lexicon_examples(lexicon, everyday, 20000, rng)
        pool += everyday_examples(everyday, heads, lexicon, rng)
        chosen = [
            example
            for example in pool
            if teaches(example, heads)
            for _ in range(int(EPOCH_WEIGHTS.get(example.source, 1.0) + rng.random()))
        ]
        rng.shuffle(chosen)
        for example in chosen:
            # Comments stand alone in their source; as replies they follow something.
            if not example.prompt and rng.random() < 0.5:
                example = replace(example, prompt=rng.choice(prompts))
            elif example.only_prompt and rng.random() < 0.25:
                before = [*rng.choice(prompts), {"role": "assistant", "content": "Sure."}]
                example = replace(example, prompt=[*before, *example.prompt])
            if set(example.labels) == {"safe"} and rng.random() < 0.5:
                example = thinned(example, rng)
            yield example
        epoch += 1


@torch.inference_mode()
def score_replies(
    model: Any, encoder: Encoder, items: Sequence[tuple[Chat, str]], rows: int = 16
) -> list[Tensor]:
    """Return for every reply the logits of all heads at each of its prefixes.

    The first entry is the empty reply's, the last one the closed reply's, the one before it
    the whole reply's left open.
    """
    sequences = []
    for prompt, reply in items:
        example = Example(source="", prompt=prompt, replies=(reply,))
        sequences.append(encoder.encode(example, reply, {}))
    order = sorted(range(len(items)), key=lambda i: len(sequences[i].ids))
    results: list[Tensor] = [torch.empty(0)] * len(items)
    device = model.device
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        longest = max(len(sequences[i].ids) for i in chosen)
        ids = torch.zeros((len(chosen), longest), dtype=torch.long)
        for row, i in enumerate(chosen):
            ids[row, : len(sequences[i].ids)] = torch.tensor(sequences[i].ids)
        # Padding stands behind what it could disturb, so a causal model needs no mask.
        hidden = model.model(input_ids=ids.to(device), use_cache=False).last_hidden_state
        scores = model.score(hidden).float().cpu()
        for row, i in enumerate(chosen):
            results[i] = scores[row, sequences[i].first : len(sequences[i].ids)].clone()
    return results


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Return the chance that a positive outranks a negative, ties counting half."""
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[inverse]
    positives = labels.bool()
    n, m = int(positives.sum()), int((~positives).sum())
    return float((ranks[positives].sum() - n * (n + 1) / 2) / (n * m))


def measure(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    toned: Sequence[Example],
    limit: int = 200,
) -> dict[str, float]:
    """Return quick figures: areas under curves, pair accuracies, agreement with the lexicon."""
    model.eval()
    figures: dict[str, float] = {}
    groups: dict[str, list[Example]] = {}
    for example in examples:
        name = example.source if example.pair_head else kind_of(example)
        groups.setdefault(name, []).append(example)
    for name, members in groups.items():
        members = members[:: max(1, len(members) // limit)]
        if members[0].pair_head:
            head = encoder.heads.index(members[0].pair_head)
            items = [(e.prompt, reply) for e in members for reply in e.replies]
            ends = [scores[-1, head] for scores in score_replies(model, encoder, items)]
            wins = [float(a > b) for a, b in zip(ends[::2], ends[1::2], strict=True)]
            figures[f"{name} pairs"] = sum(wins) / len(wins)
        else:
            items = [(e.prompt, e.replies[0]) for e in members]
            scored = score_replies(model, encoder, items)
            place = 0 if name == "prompts" else -1
            head = encoder.heads.index("safe")
            scores = torch.stack([s[place, head] for s in scored])
            labels = torch.tensor([e.labels["safe"] for e in members])
            figures[f"{name} auc"] = area_under_curve(scores, labels)
    kinds: dict[str, list[Example]] = {}
    for example in toned:
        kinds.setdefault(example.source, []).append(example)
    for name, members in kinds.items():
        scored = score_replies(model, encoder, [(e.prompt, e.replies[0]) for e in members])
        head = encoder.heads.index("positive")
        ours = torch.stack([scores[-1, head] for scores in scored])
        wanted = torch.tensor([e.word_labels["positive"][-1] for e in members])
        figures[f"{name} r"] = float(torch.corrcoef(torch.stack([ours.sigmoid(), wanted]))[0, 1])
    model.train()
    return {name: round(value, 4) for name, value in figures.items()}


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--work", type=Path, required=True, help="folder with tokenizer and trunk")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS, help="to teach")
    parser.add_argument("--trunk", default="trunk", help="run whose weights to start from")
    parser.add_argument("--name", default="rewards", help="of the run, a folder in `work`")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--decay", type=float, default=0.5, help="share of the steps that cool")
    parser.add_argument("--cool-minutes", type=float, help="cool down from now on, then stop")
    parser.add_argument("--rows", type=int, default=10, help="of a batch of short rows")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--language", type=float, default=0.1, help="weight of the LM loss")
    parser.add_argument("--average", type=float, default=0.995, help="of the weights, a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=250, help="steps")
    parser.add_argument("--measure-every", type=int, default=250, help="steps")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def start_model(trunk: Path, heads: Sequence[str], device: torch.device) -> Any:
    """Return a classifier with a row of weights for each head on the trunk of a language model."""
    language_model = LlamaForCausalLM.from_pretrained(trunk, dtype=torch.float32)
    config = language_model.config
    config.num_labels = len(heads)
    config.id2label = dict(enumerate(heads))
    config.label2id = {name: index for index, name in enumerate(heads)}
    config.problem_type = "multi_label_classification"
    config.architectures = None
    model = LlamaForSequenceClassification._from_config(
        config, attn_implementation="eager" if device.type == "cpu" else "sdpa"
    )
    model.model.load_state_dict(language_model.model.state_dict())
    torch.nn.init.normal_(model.score.weight, std=0.01)
    return model.to(device)


def main() -> None:
    """Train, measure and save."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    folder = arguments.work / arguments.name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint_path = folder / "checkpoint.pt"

    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.work / "tokenizer")
    encoder = Encoder(tokenizer, arguments.heads)
    lexicon = Lexicon(arguments.data)
    labelled = [e for e in labelled_examples(arguments.data) if teaches(e, arguments.heads)]
    fixed = [e for e in labelled if not e.held_apart]
    apart = [e for e in labelled if e.held_apart]
    everyday = list(everyday_dialogues(arguments.data))
    prompts = [chat[:1] for chat in everyday if chat[0]["role"] == "user"]
    teacher = WordTeacher(fixed) if "safe" in arguments.heads else None
    # Requests of everyday talk are safe ones, or every question would look like a suspect's.
    rng = random.Random(arguments.seed)
    fixed += [
        Example(
            source="everyday prompts",
            prompt=prompt,
            replies=("",),
            labels={"safe": 1.0},
            only_prompt=True,
        )
        for prompt in rng.sample(prompts, 4000)
    ]
    drawn = drawn_replies(arguments.work)
    toned = []
    if "positive" in arguments.heads:
        toned = list(lexicon_examples(lexicon, everyday, 500, random.Random(-1)))
        own = drawn_examples(drawn, ("positive",), lexicon, rng)
        toned += [e for e in own if e.held_apart][:500]

    model = start_model(arguments.work / arguments.trunk / "bundle", arguments.heads, device)
    optimizers = make_optimizers(model, arguments.learning_rate, arguments.weight_decay)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step, seconds = 0, 0.0
    if arguments.resume:
        saved = torch.load(checkpoint_path, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        average, step, seconds = saved["average"], saved["step"], saved["seconds"]
    # A resumed run meets the examples in another order; the weights do not mind.
    examples = stream(
        fixed, arguments.heads, lexicon, everyday, drawn, teacher, arguments.seed + 7 * step
    )
    batch_rng = random.Random(arguments.seed + step)
    waiting = Waiting()
    loss_of = make_loss(model, device, arguments.language, compiled=not arguments.no_compile)
    log = (folder / "log.jsonl").open("a", buffering=1)
    bar = tqdm(total=arguments.steps, initial=step, mininterval=30.0)
    clock = Clock(arguments)
    sums = torch.zeros(3)

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "average": average,
            "step": step,
            "seconds": seconds + 60 * clock.minutes,
        }
        torch.save(state, checkpoint_path.with_suffix(".part"))
        checkpoint_path.with_suffix(".part").replace(checkpoint_path)
        save_bundle(model, average, tokenizer, folder / "bundle")

    model.train()
    while not clock.over(step):
        shape = arguments.rows, SHORT_LENGTH
        if len(waiting.too_long) > MAX_WAITING:
            shape = arguments.rows * SHORT_LENGTH // LENGTH, LENGTH
        batch = pack(examples, encoder, shape, waiting, batch_rng).to(device)
        losses = loss_of(*(getattr(batch, name) for name in Batch.__slots__))
        losses[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = clock.rate(step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        sums += torch.stack([loss.detach().cpu() for loss in losses])
        step += 1
        keep = min(arguments.average, step / (step + 10))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 1.0 - keep)
        bar.update()
        if step % 25 == 0:
            total, of_labels, of_pairs = (sums / 25).tolist()
            sums.zero_()
            entry = {"step": step, "loss": total, "labels": of_labels, "pairs": of_pairs}
            elapsed = seconds + 60 * clock.minutes
            log.write(json.dumps({**entry, "seconds": round(elapsed, 1)}) + "\n")
            bar.set_postfix(labels=f"{of_labels:.3f}", pairs=f"{of_pairs:.3f}")
        if step % arguments.save_every == 0 or clock.over(step):
            save()
        if step % arguments.measure_every == 0 or clock.over(step):
            now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model.load_state_dict(average)
            figures = measure(model, encoder, apart, toned)
            model.load_state_dict(now)
            log.write(json.dumps({"step": step, **figures}) + "\n")
            tqdm.write(f"step {step}: {figures}")
    bar.close()


if __name__ == "__main__":
    main()
