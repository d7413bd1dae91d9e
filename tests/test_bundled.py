"""The bundled models are what their card says, and fit together."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import langchain_stars

BUNDLED = Path(langchain_stars.__file__).parent / "bundled"
MAX_MEGABYTES = {"language_model": 16, "rewards": 8, "sentiment": 8}
CLASSIFIERS = {"rewards": {0: "safe", 1: "helpful"}, "sentiment": {0: "positive"}}
# The card's figures come from fp32 on one machine; other kernels differ in the last digits.
TOLERANCE = 0.01


@pytest.fixture(scope="module")
def provenance() -> dict[str, Any]:
    return json.loads((BUNDLED / "provenance.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED / "language_model")


@pytest.fixture(scope="module")
def language_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(
        BUNDLED / "language_model", dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def classifiers() -> dict[str, Any]:
    return {
        name: AutoModelForSequenceClassification.from_pretrained(
            BUNDLED / name, dtype=torch.float32
        ).eval()
        for name in CLASSIFIERS
    }


def test_every_file_has_the_hash_in_the_provenance(provenance: dict[str, Any]) -> None:
    found = {
        path.relative_to(BUNDLED).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in BUNDLED.rglob("*")
        if path.is_file()
        and path.suffix not in (".py", ".pyc")
        and path.name not in ("provenance.json", "CARD.md")
    }
    assert found == {name: file["sha256"] for name, file in provenance["files"].items()}
    assert len(found) >= 10


@pytest.mark.parametrize("name", ["language_model", "rewards", "sentiment"])
def test_weights_are_small_bf16_and_counted(name: str, provenance: dict[str, Any]) -> None:
    assert (BUNDLED / name / "model.safetensors").stat().st_size <= MAX_MEGABYTES[name] * 10**6
    kind = AutoModelForCausalLM if name == "language_model" else AutoModelForSequenceClassification
    model = kind.from_pretrained(BUNDLED / name)
    assert model.dtype == torch.bfloat16
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == provenance["models"][name]["parameters"]


def test_only_rows_that_may_be_given_on_were_learned_from(provenance: dict[str, Any]) -> None:
    rows = [row for of_model in provenance["rows"].values() for row in of_model.values()]
    assert {row["class"] for row in rows} == {"permissive", "share-alike"}


def test_language_model_and_rewards_share_one_tokenizer() -> None:
    for file in ("tokenizer.json", "chat_template.jinja"):
        ours = (BUNDLED / "language_model" / file).read_bytes()
        for name in CLASSIFIERS:
            assert ours == (BUNDLED / name / file).read_bytes()


def test_rewards_are_ordinary_classifiers_with_named_labels(classifiers: dict[str, Any]) -> None:
    for name, labels in CLASSIFIERS.items():
        config = classifiers[name].config
        assert config.id2label == labels
        assert config.problem_type == "multi_label_classification"
        assert config.pad_token_id is not None


def test_tokenizer_gives_back_any_text(tokenizer: Any) -> None:
    text = "  Hi,\n\n it's 2026 \u2014 na\u00efve \U0001f600\t<|end|> \x07 "
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("reply", ["", " ", "Yes", "  Yes,\n\nI do. ", "\n"])
def test_an_open_reply_is_the_beginning_of_the_closed_one(tokenizer: Any, reply: str) -> None:
    prompt = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hi\n"}]
    begun = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    chat = [*prompt, {"role": "assistant", "content": reply}]
    closed = tokenizer.apply_chat_template(chat, tokenize=False)
    assert closed == begun + reply + tokenizer.eos_token
    if reply:
        opened = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        assert opened == begun + reply


def test_template_writes_tool_calls_and_results(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert '<|tool_call|>{"name": "add", "arguments": {"a": 1}}<|end|><|tool|>3<|end|>' in text


@torch.inference_mode()
def test_language_model_pays_what_the_provenance_says(
    provenance: dict[str, Any], tokenizer: Any, language_model: Any
) -> None:
    facts = provenance["facts"]
    bits = num_bytes = 0.0
    for prompt, reply in facts["dialogues"]:
        chat = [{"role": "user", "content": prompt}]
        head = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer.encode(head, add_special_tokens=False))
        ids = tokenizer.encode(head + reply + tokenizer.eos_token, add_special_tokens=False)
        logits = language_model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(ids[start:]), reduction="sum"
        )
        bits += losses.item() / math.log(2)
        num_bytes += len(reply.encode())
    assert bits / num_bytes == pytest.approx(facts["bits_per_byte"], abs=TOLERANCE)
    assert bits / num_bytes < 2.0


@torch.inference_mode()
def test_rewards_say_what_the_provenance_says(
    provenance: dict[str, Any], tokenizer: Any, classifiers: dict[str, Any]
) -> None:
    scores: list[dict[str, float]] = []
    for reply in provenance["facts"]["replies"]:
        chat = [
            {"role": "user", "content": "How was it?"},
            {"role": "assistant", "content": reply},
        ]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        scores.append({})
        for name, labels in CLASSIFIERS.items():
            logits = classifiers[name](input_ids=torch.tensor([ids])).logits[0]
            scores[-1] |= {labels[i]: float(p) for i, p in enumerate(logits.sigmoid())}
    for score, told in zip(scores, provenance["facts"]["scores"], strict=True):
        assert score == pytest.approx(told, abs=TOLERANCE)
    insult, offer, wonderful, terrible = scores
    assert insult["safe"] < 0.5 < offer["safe"]
    assert terrible["positive"] < 0.5 < wonderful["positive"]
    assert insult["positive"] < 0.5 < offer["positive"]


@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_models_answer_alike_with_and_without_a_cache(
    name: str, tokenizer: Any, classifiers: dict[str, Any]
) -> None:
    rewards = classifiers[name]
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi you"}]
    ids = torch.tensor([tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False))])
    with torch.inference_mode():
        whole = rewards(input_ids=ids).logits
        begun = rewards(input_ids=ids[:, :-2], use_cache=True)
        ended = rewards(input_ids=ids[:, -2:], past_key_values=begun.past_key_values)
    assert torch.allclose(whole, ended.logits, atol=1e-4)


def test_calibration_asks_for_few_attempts_a_segment() -> None:
    calibration = json.loads((BUNDLED / "calibration.json").read_text())
    assert 1.3 <= calibration["default_attempts_per_segment"] <= 3.0
    assert set(calibration["rewards"]) == {"safety", "helpfulness", "sentiment"}
    for reward in calibration["rewards"].values():
        assert 1.3 <= reward["attempts_per_segment"] <= 3.0
        assert reward["beta"] > 0.0
        assert 0.0 <= reward["target"] <= 1.0
        assert 0.0 <= reward["floor"] <= 1.0
        positions = [place["position"] for place in reward["by_position"]]
        assert positions == sorted(positions)
        for place in reward["by_position"]:
            assert list(place["quantiles"].values()) == sorted(place["quantiles"].values())


def test_card_repeats_the_figures_of_the_provenance(provenance: dict[str, Any]) -> None:
    card = (BUNDLED / "CARD.md").read_text()
    language = provenance["figures"]["language"]["all"]
    assert f"| all | {language['model']} | {language['trigram']} |" in card
    for name, row in provenance["figures"]["safety"].items():
        assert f"| {name} | {row['rows']} | {row['auc']} | {row['auc_bag_of_words']} |" in card
    for sample in provenance["samples"]:
        assert sample["reply"].split("\n")[0] in card
