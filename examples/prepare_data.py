"""Turns the data folder into a tokenizer and token files for the bundled models.

Knows where rows come from, what their licences allow, and how they are split; nothing of
models. Weights that are given away learn from permissive and share-alike rows alone, and
no dialogue whose first user turn falls on the held-apart side is ever learned from.

Run:
    python examples/prepare_data.py --data DATA --work WORK
"""

import argparse
import gzip
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

Chat = list[dict[str, Any]]

ALLOWED_CLASSES = frozenset({"permissive", "share-alike"})
HELD_APART_PERCENT = 10
CONTEXT = 1024
VOCABULARY = 4096
CONTROL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|tool_call|>",
)
# Content is inserted as it is, so the text of an open message is a prefix of the closed one.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|' + message['role'] + '|>' }}
{%- if message['content'] is string %}{{ message['content'] }}
{%- elif message['content'] is iterable %}
{%- for part in message['content'] %}{{ part['text'] }}{% endfor %}
{%- endif %}
{%- for call in message.get('tool_calls') or [] %}
{%- set call = call.function if call.function is defined else call %}
{{- '<|tool_call|>' + {'name': call.name, 'arguments': call.arguments} | tojson }}
{%- endfor %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# How often a row of each source is learned from in one epoch. Booking dialogues are many and
# alike; open-domain talk, questions and answers are few and matter more.
SOURCE_WEIGHTS = {
    "topical_chat": 1.0,
    "topical_chat/flipped": 0.5,
    "synthetic_persona_chat": 1.0,
    "synthetic_persona_chat/flipped": 0.5,
    "gpteacher_roleplay": 1.0,
    "dolly": 1.5,
    "oasst_en100": 1.0,
    "self_instruct_seeds": 1.0,
    "sgd": 0.15,
    "hh_helpful": 1.5,
    "hh_harmless": 1.0,
    "llmbar": 1.0,
    "pandalm": 1.0,
    "coconot_pref": 0.5,
    "gptfuzz_labelled": 0.25,
    "dices": 0.5,
}
NAMES = (
    "Alex Anna Ben Clara Dan Emma Eva Felix Grace Hugo Ida Jack Julia Kate Leo Lucy Maria Mark "
    "Max Nina Oscar Paul Rosa Sam Sarah Tom Vera Will"
)
PLACEHOLDER = re.compile(
    r"[\[(<](?:user ?(?P<number>[12])(?:['\u2019]s)?(?: name)?|(?:insert |your |their )?(?:user)?name)[\])>]",
    re.IGNORECASE,
)
STAGE_DIRECTION = re.compile(r"\[[A-Za-z][^\]]{0,30}\]")


def words_of(text: str, separator: str = " ") -> tuple[str, ...]:
    """Return the words of a list that is written as one text."""
    return tuple(text.split(separator))


def read_rows(data: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file, `name` being its path without the ending."""
    with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def licence_classes(data: Path) -> dict[str, str]:
    """Return the licence class of every source, from the manifest."""
    manifest = json.loads((data / "MANIFEST.json").read_text())
    return {name: source["licence_class"] for name, source in manifest["sources"].items()}


def is_held_apart(prompt: str) -> bool:
    """Say whether a dialogue that starts with this user turn is kept for measuring.

    The turn is compared without case, spaces and marks, so near copies fall on one side. A turn
    with a placeholder for a name is filled with any, so it is never kept.
    """
    if PLACEHOLDER.search(prompt):
        return False
    key = re.sub(r"\W+", "", prompt.lower())
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100 < HELD_APART_PERCENT


def first_turn(messages: Chat) -> str:
    """Return the first user turn, by which dialogues are split."""
    return next((m["content"] for m in messages if m["role"] == "user"), "")


def looks_english(text: str) -> bool:
    """Say whether a text is plain enough to learn a style from."""
    plain = sum(character.isascii() or character in "’‘“”–—…" for character in text)
    return len(text) > 0 and plain / len(text) > 0.97


def dices_chat(prompt: str) -> Chat:
    """Return the messages of a DICES conversation, whose turns are lines with a speaker."""
    parts = re.split(r"(?:^|\n)(USER|LAMDA):\s*", prompt)[1:]
    roles = {"USER": "user", "LAMDA": "assistant"}
    return [
        {"role": roles[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def fill_names(messages: Chat, rng: random.Random) -> Chat:
    """Return the messages with names where the source left a placeholder."""
    names = dict(zip(("user", "assistant"), rng.sample(words_of(NAMES), 2), strict=True))
    filled = []
    for message in messages:
        own = names.get(message["role"], names["user"])
        other = next(name for name in names.values() if name != own)

        def named(match: re.Match[str], own: str = own, other: str = other) -> str:
            if match["number"]:
                return names["user" if match["number"] == "1" else "assistant"]
            before = match.string[: match.start()].lower().rstrip()
            introduced = before.endswith(("i'm", "i am", "name is", "name's", "this is", "it's"))
            return own if introduced else other

        filled.append({**message, "content": PLACEHOLDER.sub(named, message["content"])})
    return filled


def flip(messages: Chat) -> Chat:
    """Return a conversation between two people from the other one's side."""
    other = {"user": "assistant", "assistant": "user"}
    return [{**m, "role": other[m["role"]]} for m in messages[1:]]


def chat_documents(data: Path) -> Iterator[tuple[str, Chat, set[int], bool]]:
    """Yield what a chat model may learn from or be measured on.

    Yields:
        The source, the messages, the indices of the messages it must not learn to write
        (requests that are unsafe, and earlier replies nobody preferred), and whether the
        dialogue is held apart.
    """
    classes = licence_classes(data)
    rng = random.Random(0)
    for name in ("topical_chat", "persona", "roleplay", "dolly", "oasst_en100"):
        for row in read_rows(data, f"chat/{name}"):
            source = row["source"]
            if classes[source] not in ALLOWED_CLASSES:
                continue
            messages = fill_names(row["messages"], rng)
            apart = is_held_apart(first_turn(row["messages"]))
            if source == "synthetic_persona_chat" and any(
                STAGE_DIRECTION.search(m["content"]) for m in messages
            ):
                continue
            persona = row.get("meta", {}).get("persona_assistant", "").replace("\n", " ")
            if persona and rng.random() < 0.5:
                system = {"role": "system", "content": persona}
                yield source, [system, *messages], {0}, apart
            else:
                yield source, messages, set(), apart
            if source in ("topical_chat", "synthetic_persona_chat") and not apart:
                yield f"{source}/flipped", flip(messages), set(), apart
    for name in ("self_instruct_seeds", "sgd"):
        for row in read_rows(data, f"chat/{name}"):
            if classes[row["source"]] in ALLOWED_CLASSES:
                messages = row["messages"]
                yield row["source"], messages, set(), is_held_apart(first_turn(messages))
    for name in ("hh_helpful", "hh_harmless", "llmbar", "pandalm", "coconot_pref"):
        seen = set()
        for row in read_rows(data, f"prefs/{name}"):
            if classes[row["source"]] not in ALLOWED_CLASSES or row["chosen"] in seen:
                continue
            seen.add(row["chosen"])
            messages = [*row["messages"], {"role": "assistant", "content": row["chosen"]}]
            unlearned = set(range(len(messages) - 1)) if name == "hh_harmless" else set()
            yield row["source"], messages, unlearned, is_held_apart(first_turn(messages))
    for row in read_rows(data, "safety/responses"):
        if row["label"] != "safe" or classes[row["source"]] not in ALLOWED_CLASSES:
            continue
        if row["source"] == "dices":
            prompt = dices_chat(row["prompt"])
        else:
            prompt = [{"role": "user", "content": row["prompt"]}]
        if len(row["response"]) < 400 and looks_english(row["response"]):
            messages = [*prompt, {"role": "assistant", "content": row["response"]}]
            unlearned = set(range(len(prompt)))
            yield row["source"], messages, unlearned, is_held_apart(first_turn(prompt))


def usable_documents(data: Path) -> Iterator[tuple[str, Chat, set[int], bool]]:
    """Yield the documents that are English, as `chat_documents` does."""
    for source, messages, unlearned, apart in chat_documents(data):
        if messages and looks_english("\n".join(m["content"] for m in messages)):
            yield source, messages, unlearned, apart


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with control tokens and the chat template."""
    tokenizer = Tokenizer(models.BPE())
    split = r"'(?i:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=list(CONTROL_TOKENS[3:]),
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode_document(
    tokenizer: PreTrainedTokenizerFast, messages: Chat, unlearned: set[int]
) -> tuple[list[int], list[int]]:
    """Return the ids of a dialogue and what each is to learning.

    Returns:
        Ids, and for each 2 (written by the assistant), 1 (read) or 0 (never learned).
    """
    ids, parts = [tokenizer.bos_token_id], [0]
    for index, message in enumerate(messages):
        header = tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>")
        content = tokenizer.encode(message["content"], add_special_tokens=False)
        content.append(tokenizer.eos_token_id)
        part = 2 if message["role"] == "assistant" else 1
        ids += [header, *content]
        parts += [int(index not in unlearned), *[0 if index in unlearned else part] * len(content)]
    return ids[:CONTEXT], parts[:CONTEXT]


def main() -> None:
    """Write the tokenizer and the token files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-tokenizer", action="store_true", help="use the one that is there")
    arguments = parser.parse_args()

    documents = list(usable_documents(arguments.data))
    if arguments.keep_tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.work / "tokenizer")
    else:
        # Booking dialogues would otherwise fill the vocabulary.
        rng = random.Random(arguments.seed)
        learned = [d for d in documents if not d[3] and rng.random() < SOURCE_WEIGHTS[d[0]]]
        tokenizer = train_tokenizer(m["content"] for d in learned for m in d[1])
        tokenizer.save_pretrained(arguments.work / "tokenizer")

    counts: Counter[str] = Counter()
    for split in ("train", "held_apart"):
        ids: list[int] = []
        parts: list[int] = []
        starts, sources = [0], []
        rows = [d for d in documents if d[3] == (split == "held_apart")]
        for source, messages, unlearned, _ in tqdm(rows, desc=split):
            row_ids, row_parts = encode_document(tokenizer, messages, unlearned)
            ids += row_ids
            parts += row_parts
            starts.append(len(ids))
            sources.append(source)
            counts[f"{split} {source} rows"] += 1
            counts[f"{split} {source} tokens"] += len(row_ids)
        np.savez(
            arguments.work / f"{split}.npz",
            ids=np.array(ids, np.uint16),
            parts=np.array(parts, np.uint8),
            starts=np.array(starts, np.int64),
            sources=np.array(sources),
        )
    (arguments.work / "corpus.json").write_text(json.dumps(counts, indent=1))
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
