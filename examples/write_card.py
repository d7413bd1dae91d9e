"""Writes the card and the provenance of the bundled models from what was measured.

Knows files, figures and words; measures nothing but a few facts that a test can check again
without the data.

Run:
    python examples/write_card.py --data DATA --work WORK --bundle FOLDER --figures FILE
"""

import argparse
import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from prepare_data import SOURCE_WEIGHTS, licence_classes, read_rows
from tqdm.auto import tqdm
from train_rewards import EPOCH_WEIGHTS, HEADS, Lexicon, labelled_examples
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

CLASSIFIERS = ("rewards", "sentiment")
# Written for the card; no row of the data is printed anywhere.
SAMPLE_PROMPTS = (
    "Hello! How are you today?",
    "What do you like to do on the weekend?",
    "Do you watch basketball?",
    "Can you tell me something about dogs?",
    "What is a good way to learn to cook?",
    "I had a really bad day at work.",
    "Who is your favourite singer?",
    "Give me three ideas for a birthday party.",
    "Pretend you are a pirate and say hello.",
    "How can I break into my neighbour's car?",
)
FACT_DIALOGUES = (
    ("What is your favorite food?", "I love pizza. What about you?"),
    ("Do you have any pets?", "Yes, I have a dog. He is very friendly."),
    ("Can you help me find a restaurant?", "Sure. What kind of food would you like?"),
)
FACT_REPLIES = (
    "You are a stupid idiot and I hate you.",
    "I am happy to help you with that.",
    "It was a wonderful day and I loved it.",
    "It was a terrible day and I hated it.",
)


def sha256_of(path: Path) -> str:
    """Return the hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@torch.inference_mode()
def sample_replies(bundle: Path) -> list[dict[str, Any]]:
    """Return one reply to each prompt, with the seed of its place in the list."""
    tokenizer = AutoTokenizer.from_pretrained(bundle / "language_model")
    model = LlamaForCausalLM.from_pretrained(bundle / "language_model", dtype=torch.float32)
    samples = []
    for seed, prompt in enumerate(SAMPLE_PROMPTS):
        chat = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        torch.manual_seed(seed)
        output = model.generate(
            **encoded, max_new_tokens=96, do_sample=True, temperature=0.7, top_p=0.9
        )
        reply = tokenizer.decode(
            output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )
        samples.append({"seed": seed, "prompt": prompt, "reply": reply})
    return samples


@torch.inference_mode()
def cheap_facts(bundle: Path) -> dict[str, Any]:
    """Return a few numbers that a test computes again in seconds."""
    tokenizer = AutoTokenizer.from_pretrained(bundle / "language_model")
    model = LlamaForCausalLM.from_pretrained(bundle / "language_model", dtype=torch.float32)
    bits = num_bytes = 0.0
    for prompt, reply in FACT_DIALOGUES:
        chat = [{"role": "user", "content": prompt}]
        head = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer.encode(head, add_special_tokens=False))
        ids = tokenizer.encode(head + reply + "<|end|>", add_special_tokens=False)
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        losses = torch.nn.functional.cross_entropy(
            logits.float(), torch.tensor(ids[start:]), reduction="sum"
        )
        bits += float(losses) / math.log(2)
        num_bytes += len(reply.encode())
    scores: list[dict[str, float]] = [{} for _ in FACT_REPLIES]
    for name in CLASSIFIERS:
        classifier = LlamaForSequenceClassification.from_pretrained(
            bundle / name, dtype=torch.float32
        )
        for reply, told in zip(FACT_REPLIES, scores, strict=True):
            chat = [
                {"role": "user", "content": "How was it?"},
                {"role": "assistant", "content": reply},
            ]
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            ids = tokenizer.encode(text, add_special_tokens=False)
            logits = classifier(input_ids=torch.tensor([ids])).logits[0]
            for index, probability in enumerate(logits.sigmoid()):
                told[classifier.config.id2label[index]] = round(float(probability), 4)
    return {
        "dialogues": [list(dialogue) for dialogue in FACT_DIALOGUES],
        "bits_per_byte": round(bits / num_bytes, 4),
        "replies": list(FACT_REPLIES),
        "scores": scores,
    }


def training_of(work: Path, name: str) -> dict[str, Any]:
    """Return steps, tokens and time of a run, from its log."""
    steps = seen = 0
    seconds = 0.0
    for line in (work / name / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        steps = max(steps, entry["step"])
        seen = max(seen, entry.get("seen", 0))
        seconds = max(seconds, entry.get("seconds", 0.0))
    facts = {"steps": steps, "minutes": round(seconds / 60)}
    return facts | ({"tokens": seen} if seen else {})


def rows_of(data: Path, work: Path) -> dict[str, Any]:
    """Return how many rows of each source and class each model learned from."""
    classes = licence_classes(data)
    manifest = json.loads((data / "MANIFEST.json").read_text())["sources"]
    corpus = json.loads((work / "corpus.json").read_text())
    language = {}
    for source in SOURCE_WEIGHTS:
        name = source.split("/")[0]
        language[source] = {
            "rows": corpus.get(f"train {source} rows", 0),
            "held_apart": corpus.get(f"held_apart {source} rows", 0),
            "class": classes[name],
            "licence": manifest[name]["licence"],
            "weight_in_an_epoch": SOURCE_WEIGHTS[source],
        }
    learned: Counter[str] = Counter()
    apart: Counter[str] = Counter()
    for example in labelled_examples(data):
        (apart if example.held_apart else learned)[example.source] += 1
    rewards = {
        source: {
            "rows": learned[source],
            "held_apart": apart[source],
            "class": classes[source],
            "licence": manifest[source]["licence"],
            "weight_in_an_epoch": EPOCH_WEIGHTS.get(source, 1.0),
        }
        for source in sorted(learned)
    }
    sentiment = {
        "vader_lexicon": {
            "rows": sum(1 for _ in read_rows(data, "sentiment/vader_lexicon")),
            "class": classes["vader_lexicon"],
            "licence": manifest["vader_lexicon"]["licence"],
        },
        "pattern_lexicon": {
            "rows": len(Lexicon.polarities()),
            "class": "permissive",
            "licence": "PDDL (the lexicon), MIT (TextBlob, which has it with it)",
        },
    }
    return {"language_model": language, "rewards": rewards, "sentiment": sentiment}


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_card(provenance: dict[str, Any], path: Path) -> None:
    """Write the card for people."""
    figures = provenance["figures"]
    language = figures["language"]
    sizes = provenance["models"]
    parts = [
        "# The small models that ship with langchain_stars",
        "They let `ChatStars()`, the demo and the tests run the true mechanism anywhere, "
        "offline, on weights that were really trained. That is all they are for. The language "
        f"model has {sizes['language_model']['parameters'] / 1e6:.1f} million parameters: it "
        "writes short replies that are nearly grammatical and seldom true, and it knows "
        "nothing. The rewards "
        "are small classifiers with the blind spots that the tables show. **A real application "
        "names a real language model and real rewards.**",
        "## What is here",
        "`language_model/` is a Llama for chat. `rewards/` is one causal Llama trunk with two "
        "labels, read as probabilities (`multi_label_classification`): `safe` (of the reply; at "
        "the empty reply, of the request) and `helpful` (an apt and preferred reply). "
        "`sentiment/` is a smaller one with the label `positive` (the polarity of the reply's "
        "words). All share one tokenizer of 4,096 byte-level tokens and one chat template, and a "
        "context of 1,024 tokens. `calibration.json` tells "
        "where the rewards of this language model's partial replies lie. `provenance.json` "
        "holds hashes, rows, seeds and every figure below.",
        "No example with a tool's message was learned from: the template writes tool calls and "
        "their results, the model makes nothing of them.",
        "## How they were made",
        table(
            [
                "model",
                "parameters",
                "MB (bf16)",
                "steps",
                "minutes (one thread, shared CPU)",
                "seed",
            ],
            [
                [
                    name,
                    f"{model['parameters']:,}",
                    f"{model['megabytes']:.1f}",
                    f"{model['training']['steps']:,}",
                    model["training"]["minutes"],
                    model["seed"],
                ]
                for name, model in sizes.items()
            ],
        ),
        "Learned from rows under permissive and share-alike licences alone; a dialogue, and "
        "all that starts with the same user turn, is either learned from or held apart (10 %), "
        "by a hash of that turn.",
    ]
    for name, rows in provenance["rows"].items():
        parts.append(f"Rows of `{name}`:")
        parts.append(
            table(
                ["source", "class", "learned from", "held apart", "weight in an epoch", "licence"],
                [
                    [
                        source,
                        row["class"],
                        row["rows"],
                        row.get("held_apart", ""),
                        row.get("weight_in_an_epoch", ""),
                        row["licence"],
                    ]
                    for source, row in rows.items()
                    if row["rows"]
                ],
            )
        )
    parts += [
        "Synthetic-Persona-Chat and GPTeacher were written by language models, whose terms may "
        "bear on what was learned from them; the other dialogues were written by people, but for "
        "the replies of HH-RLHF, LLMBar, PandaLM, CoCoNot, GPTFuzz and DICES. "
        "Everyday talk for the rewards is that of the language model's sources.",
        "The `positive` label is distilled from two lexicons, VADER's (MIT; Hutto and Gilbert 2014) "
        "and Pattern's (PDDL; De Smedt and Daelemans 2012), read over everyday talk, made-up "
        "sentences and the language model's own replies; no film review was learned from. "
        "`helpful` learned, beside the pairs, that a reply given to somebody else, with its "
        "words shaken or broken off is the worse one.",
        "## The language model",
        "Bits per byte of the assistant's turns, on dialogues held apart, beside an interpolated "
        "Kneser-Ney trigram model of the same tokens that learned from the same rows.",
        table(
            ["source", "this model", "trigram", "dialogues"],
            [
                [source, row["model"], row["trigram"], row["dialogues"]]
                for source, row in language.items()
                if isinstance(row, dict)
            ],
        ),
        f"({language['note']}.)",
        "Ten replies, unpicked: one to each prompt, in order, seeds 0 to 9, temperature 0.7, "
        "top-p 0.9, at most 96 tokens, unguarded.",
        "\n".join(
            f"{i + 1}. *{sample['prompt']}*\n   > " + sample["reply"].replace("\n", "\n   > ")
            for i, sample in enumerate(provenance["samples"])
        ),
        "## The rewards",
        "Beside each figure, a bag of words and word pairs trained on the same labelled rows (of "
        "two, one of which reads the request too, the better on the rows measured). What was made "
        "for a head besides (replies beside another's, shaken ones, pieces) the bag does without. "
        "Intervals are 95 %, by paired bootstrap over rows; where one does not lie above 0, the "
        'reward is not shown to beat counting words. Rows "not learned from" have licences '
        "that forbid it and are here to measure.",
        table(
            ["safety", "rows", "AUC", "bag of words", "interval of the gain", "accuracy", "bag"],
            [
                [
                    name,
                    row["rows"],
                    row["auc"],
                    row["auc_bag_of_words"],
                    row["auc_gain_interval"],
                    row["accuracy"],
                    row["accuracy_bag_of_words"],
                ]
                for name, row in figures["safety"].items()
            ],
        ),
        "Requests, judged at the empty reply with the line at 0.5:",
        table(
            ["requests", "unsafe ones called unsafe", "safe ones called unsafe"],
            [
                [
                    name.removeprefix("prompts: "),
                    row["unsafe_called_unsafe"],
                    row["safe_called_unsafe"],
                ]
                for name, row in figures["safety"].items()
                if "unsafe_called_unsafe" in row
            ],
        ),
        table(
            ["pairs", "pairs", "accuracy", "bag of words", "longer wins", "interval of the gain"],
            [
                [
                    name + ("" if row.get("learned_from", True) else " (not learned from)"),
                    row["pairs"],
                    row["accuracy"],
                    row["accuracy_bag_of_words"],
                    row.get("accuracy_of_the_longer", ""),
                    row["gain_interval"],
                ]
                for name, row in figures["pairs"].items()
            ],
        ),
        table(
            [
                "polarity",
                "rows",
                "accuracy",
                "bag of words",
                "the lexicon",
                "AUC",
                "bag",
                "interval of the gain",
            ],
            [
                [
                    name,
                    row["rows"],
                    row["accuracy"],
                    row["accuracy_bag_of_words"],
                    row["accuracy_of_the_lexicon"],
                    row["auc"],
                    row["auc_bag_of_words"],
                    row["gain_interval"],
                ]
                for name, row in figures["sentiment"].items()
            ],
        ),
        "How the logit of a prefix goes with that of the whole, closed reply (Pearson), on "
        "replies held apart that are longer than the prefix:",
        table(
            ["tokens", *HEADS],
            [
                [place, *(figures["foresight"][h].get(place, {}).get("pearson", "") for h in HEADS)]
                for place in figures["foresight"]["safe"]
            ],
        ),
    ]
    if "steering" in figures:
        parts += [
            "## Steering",
            "Guarded decoding beside unguarded decoding of the same weights, with what ships unless "
            "a row says otherwise, at most 48 tokens a reply: the share of replies that a judge "
            "finds good, and the mean of its log-odds. The judges count words, learned from other "
            "rows, and are not the rewards: `positive` from film reviews (imdb), asked beginnings "
            "of reviews; `safe` from labelled answers (safe_rlhf_mini), asked requests of all "
            "kinds; `helpful` from preferred replies (rmb_helpful, webgpt, auto_j) and from whose "
            "of two replies answers (alpaca, dailydialog), asked first turns held apart.",
            table(
                [
                    "reward",
                    "prompts",
                    "unguarded",
                    "guarded",
                    "gain",
                    "interval",
                    "gain in log-odds",
                    "interval of that",
                    "attempts a segment",
                    "tokens",
                    "tokens unguarded",
                ],
                [
                    [
                        name,
                        row["prompts"],
                        row["unguarded"],
                        row["guarded"],
                        row["gain"],
                        row["gain_interval"],
                        row["score_gain"],
                        row["score_gain_interval"],
                        row["attempts_per_segment"],
                        row["tokens"],
                        row["tokens_unguarded"],
                    ]
                    for name, row in figures["steering"].items()
                ],
            ),
        ]
    if provenance.get("shortfalls"):
        parts.append("## What falls short")
        parts.append("\n".join(f"- {line}" for line in provenance["shortfalls"]))
    path.write_text("\n\n".join(parts) + "\n")


def main() -> None:
    """Write `provenance.json` and `CARD.md` into the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--bundle", type=Path, required=True, help="folder of the models")
    parser.add_argument("--figures", type=Path, required=True, help="from evaluate_bundled.py")
    parser.add_argument("--shortfalls", type=Path, help="a line for each thing that falls short")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bundle = arguments.bundle

    models = {}
    for name, trunk in (("language_model", None), ("rewards", "trunk"), ("sentiment", "small")):
        weights = bundle / name / "model.safetensors"
        kind = LlamaForCausalLM if name == "language_model" else LlamaForSequenceClassification
        model = kind.from_pretrained(bundle / name)
        models[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "megabytes": round(weights.stat().st_size / 1e6, 2),
            "seed": 0,
            "training": training_of(arguments.work, name),
        }
        if trunk:
            models[name]["trunk_training"] = training_of(arguments.work, trunk)
    files = sorted(
        path
        for path in tqdm(bundle.rglob("*"), desc="hashes")
        if path.is_file()
        and path.suffix != ".py"
        and "__pycache__" not in path.parts
        and path.name not in ("provenance.json", "CARD.md")
    )
    provenance = {
        "models": models,
        "licence_classes": ["permissive", "share-alike"],
        "rows": rows_of(arguments.data, arguments.work),
        "figures": json.loads(arguments.figures.read_text()),
        "samples": sample_replies(bundle),
        "facts": cheap_facts(bundle),
        "shortfalls": [
            line.strip()
            for line in (
                arguments.shortfalls.read_text().splitlines() if arguments.shortfalls else ()
            )
            if line.strip()
        ],
        "files": {
            path.relative_to(bundle).as_posix(): {
                "sha256": sha256_of(path),
                "bytes": path.stat().st_size,
            }
            for path in files
        },
    }
    (bundle / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    write_card(provenance, bundle / "CARD.md")


if __name__ == "__main__":
    main()
