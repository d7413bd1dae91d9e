"""Large models: other types, spread over devices, quantised, with adapters; by one constructor.

PEFT, accelerate and torchao are optional; what needs one is skipped where it is not installed.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FolderMaker
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from langchain_stars import ChatStars
from langchain_stars.language_models.base import Candidate, Prefix, Request, Sampling
from langchain_stars.language_models.local import LocalLanguageModel
from langchain_stars.packing import PackedLinear, base_of, can_pack, input_device, is_quantised
from langchain_stars.rewards import SequenceReward
from langchain_stars.rewards.base import Completion, ScoreRequest, Subject
from langchain_stars.rewards.classifiers import SequenceClassifier

# Large enough for its layers to be packed, where they may be.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
TEXT = "The quick brown fox"
CHAT = [{"role": "user", "content": "Could you tell me how to bake?"}]

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="PEFT is not installed"
)
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
# Not ours to change: warnings of the optional packages while they are imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def lm_folder(make_folder: FolderMaker) -> Path:
    return make_folder("llama", **WIDE)


@pytest.fixture
def rm_folder(make_folder: FolderMaker) -> Path:
    return make_folder("llama", num_labels=1, seed=1, **WIDE)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods that move or cast a whole model, as they are called."""
    called: list[str] = []

    def told(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return original(self, *args, **kwargs)

        return method

    for name in ("to", "float", "half", "bfloat16", "cuda", "cpu"):
        monkeypatch.setattr(nn.Module, name, told(name, getattr(nn.Module, name)))
    return called


def draw(
    language_model: LocalLanguageModel, tokenizer: PreTrainedTokenizerFast
) -> list[list[Candidate]]:
    prefix = Prefix(tokenizer.encode(TEXT))
    request = Request(
        prefix=prefix, seed=1, segment=0, first_attempt=1, count=3, size=4, sampling=Sampling()
    )
    return language_model.draw([request])


def score(classifier: SequenceClassifier) -> float:
    request = ScoreRequest(
        subject=Subject(CHAT),
        accepted=Completion(text="", finished=False),
        candidates=(Completion(text="Mix the flour", finished=False),),
    )
    [[raw]] = classifier.score([request])
    return float(raw[0])


def logits(model: Any, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokenizer.encode(TEXT)])).logits[0].float()


def packed_layers(model: nn.Module) -> int:
    return sum(isinstance(layer, PackedLinear) for layer in model.modules())


# Types


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16, torch.float16])
def test_short_types_are_named_or_given_for_both_kinds_of_model(
    dtype: Any, lm_folder: Path, rm_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    language_model = LocalLanguageModel(lm_folder, dtype=dtype, device="cpu")
    assert all(draw(language_model, tokenizer)[0])
    model = language_model._loaded().network.model
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert packed_layers(model) == 0
    classifier = SequenceClassifier(rm_folder, dtype=dtype, device=torch.device("cpu"))
    plain = SequenceClassifier(rm_folder, device="cpu")
    assert score(classifier) == pytest.approx(score(plain), abs=0.1)
    assert classifier._loaded is not None
    assert classifier._loaded.model.dtype == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_chat_model_takes_a_type_and_its_unguarded_twin_shares_the_weights(
    dtype: Any, lm_folder: Path, rm_folder: Path
) -> None:
    chat = ChatStars(
        model=str(lm_folder),
        reward=SequenceReward(rm_folder, target=-100.0, beta=0.0, dtype=dtype, device="cpu"),
        dtype=dtype,
        device="cpu" if isinstance(dtype, str) else torch.device("cpu"),
        max_tokens=8,
        segment_size=4,
        seed=1,
    )
    assert chat.invoke("Hello").content
    assert chat.unguarded().invoke("Hello").content
    language_model = chat._language_model()
    assert language_model is chat.unguarded()._language_model()
    assert isinstance(language_model, LocalLanguageModel)
    assert language_model._loaded().network.dtype == torch.bfloat16
    assert (chat.dtype, chat.device) == ("bfloat16", "cpu")


# Spread over devices


@needs_accelerate
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_changes_nothing_where_there_is_one_device(
    device_map: Any,
    lm_folder: Path,
    rm_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    moves: list[str],
) -> None:
    if torch.cuda.is_available() and device_map == "auto":
        pytest.skip("there is another device")
    mapped = LocalLanguageModel(lm_folder, device_map=device_map)
    drawn = draw(mapped, tokenizer)
    score_of_mapped = score(SequenceClassifier(rm_folder, device_map=device_map))
    assert not moves
    assert drawn == draw(LocalLanguageModel(lm_folder, device="cpu"), tokenizer)
    plain = score(SequenceClassifier(rm_folder, device="cpu"))
    assert score_of_mapped == pytest.approx(plain, abs=1e-4)


@needs_accelerate
@pytest.mark.parametrize("embeddings", ["cpu", "disk"])
def test_layers_that_are_elsewhere_are_brought_when_they_are_used(
    embeddings: str,
    lm_folder: Path,
    rm_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    moves: list[str],
) -> None:
    """Part of the weights stays on the disk, as those of a model too large for its device do."""
    spread = {
        "model.embed_tokens": embeddings,
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }
    language_model = LocalLanguageModel(
        lm_folder,
        device_map={**spread, "lm_head": "disk"},
        offload_folder=str(tmp_path / "language_model"),
    )
    drawn = draw(language_model, tokenizer)
    network = language_model._loaded().network
    assert language_model.drafts == "ragged"
    assert network.device == torch.device("cpu")
    assert not can_pack(network.model)
    assert packed_layers(network.model) == 0
    assert any(parameter.is_meta for parameter in network.model.parameters())
    assert "to" not in moves
    plain = LocalLanguageModel(lm_folder, device="cpu", pack_weights=False)
    assert drawn == draw(plain, tokenizer)

    del moves[:]
    loaded = AutoModelForCausalLM.from_pretrained(
        lm_folder,
        device_map={**spread, "lm_head": "cpu"},
        offload_folder=str(tmp_path / "loaded"),
    )
    given = LocalLanguageModel(loaded, tokenizer=tokenizer)
    assert given.device == "cpu"
    assert draw(given, tokenizer) == drawn
    assert given._loaded().network.model is loaded  # its hooks would not survive a copy
    assert given.fingerprint

    classifier = SequenceClassifier(rm_folder, device_map={**spread, "score": "cpu"})
    value = score(classifier)
    assert classifier._loaded is not None
    assert classifier._loaded.keeps
    assert value == pytest.approx(score(SequenceClassifier(rm_folder, device="cpu")), abs=1e-4)


def test_tokens_go_where_a_hook_brings_the_embeddings() -> None:
    """As in a model whose first layers wait in the memory of the CPU for a GPU."""

    class Hook:
        execution_device: Any = "cpu"

    class Several:
        hooks = (object(), Hook())

    class Model(nn.Module):
        def __init__(self, hook: Any) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(4, 4, device="meta")
            self.embeddings._hf_hook = hook

        def get_input_embeddings(self) -> nn.Module:
            return self.embeddings

    assert input_device(Model(Hook())) == torch.device("cpu")
    assert input_device(Model(Several())) == torch.device("cpu")
    assert input_device(Model(None)) == torch.device("meta")


# Quantised


@pytest.mark.parametrize("mark", ["hf_quantizer", "quantization_method"])
def test_quantised_weights_are_neither_moved_nor_cast_nor_packed(
    mark: str,
    lm_folder: Path,
    rm_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    moves: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What transformers marks so, whichever way its weights are quantised."""
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        original = auto.from_pretrained

        def marked(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            loaded = original(*args, **kwargs)
            setattr(loaded[0] if isinstance(loaded, tuple) else loaded, mark, "some")
            return loaded

        monkeypatch.setattr(auto, "from_pretrained", marked)
    language_model = LocalLanguageModel(lm_folder, device="cpu")
    assert draw(language_model, tokenizer)
    model = language_model._loaded().network.model
    classifier = SequenceClassifier(rm_folder, device="cpu")
    score(classifier)
    assert classifier._loaded is not None
    for loaded in (model, classifier._loaded.model):
        assert is_quantised(loaded)
        assert not can_pack(loaded)
        assert packed_layers(loaded) == 0
    assert not moves


@needs_accelerate
@pytest.mark.parametrize("said_by", ["checkpoint", "caller"])
def test_quantised_weights_are_loaded_to_the_device_asked_for(
    said_by: str,
    lm_folder: Path,
    rm_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They cannot be moved afterwards, and some kinds would choose a device of their own."""
    seen: dict[str, dict[str, Any]] = {}

    class Stop(Exception):
        pass

    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):

        def refuse(*args: Any, name: str = auto.__name__, **kwargs: Any) -> Any:
            seen[name] = kwargs
            raise Stop

        monkeypatch.setattr(auto, "from_pretrained", refuse)
    settings = {"quantization_config": object()} if said_by == "caller" else {}
    language_model = LocalLanguageModel(lm_folder, device="cpu", **settings)
    classifier = SequenceClassifier(rm_folder, device="cpu", **settings)
    if said_by == "checkpoint":
        language_model._config.quantization_config = {"quant_method": "gptq", "bits": 4}
        classifier._source.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    for load in (language_model.load, classifier.load):
        with pytest.raises(Stop):
            load()
    assert len(seen) == 2
    for arguments in seen.values():
        assert arguments["device_map"] == {"": "cpu"}
        # What the checkpoint says of its quantisation is transformers' to read.
        assert ("quantization_config" in arguments) == (said_by == "caller")


@needs_torchao
def test_a_chat_model_is_quantised_when_it_is_loaded(lm_folder: Path, rm_folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    chat = ChatStars(
        model=str(lm_folder),
        reward=SequenceReward(
            rm_folder, target=-100.0, beta=0.0, device="cpu", quantization_config=config
        ),
        device="cpu",
        model_kwargs={"quantization_config": config},
        max_tokens=8,
        seed=1,
    )
    assert chat.invoke("Hello").content == chat.unguarded().invoke("Hello").content
    language_model = chat._language_model()
    assert isinstance(language_model, LocalLanguageModel)
    assert is_quantised(language_model._loaded().network.model)


@needs_torchao
@pytest.mark.parametrize("way", ["loading", "saved", "given"])
def test_weights_of_eight_bits_draft_and_judge_as_transformers_has_them(
    way: str,
    lm_folder: Path,
    rm_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    def config() -> Any:
        return TorchAoConfig(Int8WeightOnlyConfig(version=2))

    def quantised(auto: Any, folder: Path) -> Any:
        return auto.from_pretrained(folder, dtype=torch.float32, quantization_config=config())

    plain = quantised(AutoModelForCausalLM, lm_folder).eval()
    judge = quantised(AutoModelForSequenceClassification, rm_folder).eval()
    folders = {"lm": lm_folder, "rm": rm_folder}
    settings: dict[str, Any] = {"quantization_config": config()}
    if way == "saved":
        settings = {}
        for name, model in (("lm", plain), ("rm", judge)):
            folders[name] = tmp_path / name
            model.save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
    if way == "given":
        language_model = LocalLanguageModel(plain, tokenizer=tokenizer)
    else:
        language_model = LocalLanguageModel(folders["lm"], device="cpu", **settings)
    assert all(draw(language_model, tokenizer)[0])
    assert language_model.drafts == "ragged"
    assert language_model.fingerprint
    model = language_model._loaded().network.model
    assert is_quantised(model)
    assert packed_layers(model) == 0
    torch.testing.assert_close(
        logits(model, tokenizer), logits(plain, tokenizer), atol=1e-3, rtol=1e-4
    )
    exact = AutoModelForCausalLM.from_pretrained(lm_folder)
    assert (logits(model, tokenizer) - logits(exact, tokenizer)).abs().max() > 1e-2
    if way == "given":
        return
    classifier = SequenceClassifier(folders["rm"], device="cpu", **settings)
    value = score(classifier)
    assert classifier._loaded is not None
    assert is_quantised(classifier._loaded.model)
    assert packed_layers(classifier._loaded.model) == 0
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    ids = [*ids, *tokenizer.encode("Mix the flour")]
    with torch.inference_mode():
        assert value == pytest.approx(float(judge(torch.tensor([ids])).logits[0, 0]), abs=1e-3)


# Adapters


@pytest.fixture
def adapted(lm_folder: Path, tmp_path: Path) -> tuple[Any, Path]:
    """A language model with an adapter, and the folder of the adapter alone."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(lm_folder),
        peft.LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj", "down_proj"],
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        ),
    ).eval()
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    return model, folder


@needs_peft
@pytest.mark.parametrize("way", ["folder", "wrapped", "loaded"])
def test_a_language_model_drafts_with_its_adapter(
    way: str,
    adapted: tuple[Any, Path],
    lm_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model, folder = adapted
    wanted = logits(model, tokenizer)
    if way == "folder":
        language_model = LocalLanguageModel(folder, device="cpu")
    elif way == "wrapped":
        language_model = LocalLanguageModel(model, tokenizer=tokenizer)
    else:
        plain = AutoModelForCausalLM.from_pretrained(lm_folder)
        plain.load_adapter(str(folder))
        language_model = LocalLanguageModel(plain, tokenizer=tokenizer)
    drawn = draw(language_model, tokenizer)
    assert language_model.drafts == "ragged"
    network = language_model._loaded().network
    torch.testing.assert_close(logits(network.model, tokenizer), wanted, atol=1e-3, rtol=1e-4)
    assert packed_layers(network.model) > 0  # of what lies below the adapters, too
    base = LocalLanguageModel(lm_folder, device="cpu")
    assert drawn != draw(base, tokenizer)
    assert language_model.fingerprint != base.fingerprint
    assert language_model.context_length == base.context_length


@needs_peft
def test_a_chat_model_names_an_adapter_as_it_names_a_model(
    adapted: tuple[Any, Path], rm_folder: Path
) -> None:
    _, folder = adapted
    chat = ChatStars(
        model=str(folder),
        reward=SequenceReward(rm_folder, target=-100.0, beta=0.0, device="cpu"),
        device="cpu",
        max_tokens=8,
        segment_size=4,
        seed=1,
    )
    assert chat.unguarded().invoke("Hello").content == chat.invoke("Hello").content
    assert chat._language_model() is chat.unguarded()._language_model()


@needs_peft
def test_the_base_of_an_adapter_is_part_of_what_it_is(
    adapted: tuple[Any, Path], make_folder: FolderMaker
) -> None:
    _, folder = adapted
    fingerprint = LocalLanguageModel(folder, device="cpu").fingerprint
    settings = folder / "adapter_config.json"
    other = make_folder("llama", seed=5, **WIDE)
    settings.write_text(settings.read_text().replace(base_of(str(folder)), str(other)))
    assert base_of(str(folder)) == str(other)
    assert LocalLanguageModel(folder, device="cpu").fingerprint != fingerprint


@needs_peft
@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_a_reward_is_judged_by_the_head_that_its_adapter_brings(
    num_labels: int,
    own_tokenizer: bool,
    lm_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    """As reward models are trained: the base has no head, and says nothing of labels."""
    import peft

    torch.manual_seed(0)
    trained = AutoModelForSequenceClassification.from_pretrained(lm_folder, num_labels=num_labels)
    model = peft.get_peft_model(
        trained,
        peft.LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj"],
            modules_to_save=["score"],
            task_type="SEQ_CLS",
            init_lora_weights=False,
        ),
    ).eval()
    model.save_pretrained(tmp_path)
    if own_tokenizer:
        tokenizer.save_pretrained(tmp_path)
    classifier = SequenceClassifier(tmp_path, device="cpu")
    request = ScoreRequest(
        subject=Subject(CHAT),
        accepted=Completion(text="", finished=False),
        candidates=(Completion(text="Mix the flour", finished=False),),
    )
    assert len(classifier.labels) == num_labels
    [[raw]] = classifier.score([request])
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    ids = [*ids, *tokenizer.encode("Mix the flour")]
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0].tolist()
    assert list(raw) == pytest.approx(wanted, abs=1e-3)
    assert classifier._loaded is not None
    assert classifier._loaded.keeps
    assert classifier.identity["base"]


@needs_peft
def test_an_adapter_without_a_head_is_no_reward(lm_folder: Path, tmp_path: Path) -> None:
    """Its head would be random numbers."""
    import peft

    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(lm_folder),
        peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no classifier.*score\.weight"):
        SequenceClassifier(tmp_path, device="cpu").load()


@needs_peft
def test_a_learned_prompt_is_refused_for_nothing_inside_the_model_knows_it(
    lm_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    import peft

    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(lm_folder),
        peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    )
    with pytest.raises(ValueError, match="learned prompt"):
        LocalLanguageModel(model, tokenizer=tokenizer)


def test_an_adapter_says_what_it_needs_where_it_is_not_installed(
    tmp_path: Path, lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_stars.packing.is_peft_available", lambda: False)
    assert base_of(str(lm_folder)) == str(lm_folder)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ImportError, match="pip install"):
        base_of(str(tmp_path))
