"""Where weights lie: one name for each device, and on a CPU laid out as it reads them fastest.

Knows folders, devices, layers, adapters and quantised weights; nothing of tokens or rewards. A
product of a few rows with a large matrix takes the time of reading the matrix. The plain kernels
take up to three times that when there are 2 to 16 rows, which is what drafting and judging several
candidates at once consists of; the packed ones of oneDNN do not.
"""

import copy
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.import_utils import is_accelerate_available, is_peft_available
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)
from transformers.utils.peft_utils import find_adapter_config_file

_DIGESTED = (".json", ".jinja", ".model", ".txt", ".py", ".safetensors")
_WHOLE_FILE = 1 << 28
_WHOLE_TENSOR = 1 << 20
_SAMPLE = 1 << 12
_LEAST_WEIGHTS = 1 << 17
_ROWS = 8

ALLOCATING = threading.RLock()
"""Held while a CUDA graph is recorded or cached memory is given back: torch cannot do both at once,
nor record two graphs, not even on different devices."""


def device_name(device: "str | torch.device | None" = None) -> str:
    """Return the one name of a device, so that what runs on the same device is known to.

    A CPU has no index and a GPU of CUDA always has one: `"cpu"` for `"cpu:0"`, and `"cuda:0"` for
    `"cuda"` where that is the current one.

    Args:
        device: As torch names it; None takes the best there is.

    Raises:
        ValueError: Torch knows no such device.
    """
    if device is None:
        if torch.cuda.is_available():
            device = "cuda"
        else:
            device = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` must name a device of torch, got {device}") from error
    if named.type in ("cpu", "mps"):
        return named.type
    if named.type == "cuda" and named.index is None and torch.cuda.is_available():
        # Before CUDA is begun the first one is current; to ask would begin it, and end forking.
        current = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
        return f"cuda:{current}"
    return str(named)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return what the host has made on a device, without waiting for what the device does."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def free_cached(device: str) -> None:
    """Give back what torch has cached of a GPU's memory; do nothing elsewhere."""
    if device.startswith("cuda"):
        with ALLOCATING:
            torch.cuda.empty_cache()


def base_of(name: str, *, revision: str | None = None) -> str:
    """Return the name of the model that an adapter of PEFT was made for; a model's own name.

    Args:
        name: Folder or hub id.
        revision: Branch, tag or commit on the hub.

    Raises:
        ImportError: It is an adapter, and PEFT is not installed.
    """
    if (Path(name) / "config.json").is_file():
        return name
    try:
        found = find_adapter_config_file(name, revision=revision)
    except OSError:  # whoever reads it says what is wrong with it
        return name
    if found is None:
        return name
    if not is_peft_available():
        raise ImportError(f'{name} is an adapter: pip install "langchain-stars[peft]"')
    return str(json.loads(Path(found).read_text())["base_model_name_or_path"])


def without_wrapper(model: Any) -> Any:
    """Return the model of transformers inside one of PEFT, whose layers hold the adapters.

    Raises:
        ValueError: The adapter is a learned prompt, which the model inside knows nothing of.
    """
    adapters = getattr(model, "peft_config", None)
    if not adapters or not hasattr(model, "get_base_model"):
        return model
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        raise ValueError("`model` must have adapters inside its layers, got a learned prompt")
    return model.get_base_model()


@contextmanager
def quietly() -> Iterator[None]:
    """Show no progress bar while weights are read; that of a download is shown, and wanted."""
    shown, of_downloads = is_progress_bar_enabled(), not are_progress_bars_disabled()
    disable_progress_bar()
    if of_downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()
        if not of_downloads:
            disable_progress_bars()


def digest_of(folder: Path) -> str:
    """Return a digest of a checkpoint: files whole, of very large weights each tensor's samples."""
    sha = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in _DIGESTED:
            continue
        size = path.stat().st_size
        sha.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors" and size > _WHOLE_FILE:
                for begin, count in _samples(file, size):
                    file.seek(begin)
                    sha.update(file.read(count))
            else:
                while part := file.read(1 << 20):
                    sha.update(part)
    return sha.hexdigest()[:16]


def _samples(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Yield place and length of what tells a file of tensors from others, in bytes.

    That is its header, small tensors (such as a head, which alone differs where a trunk was
    frozen) and, of large ones, 16 pieces from the first to the last byte.
    """
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(min(length, size)))
    yield 0, 8 + length
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in tensor["data_offsets"])
        if end - begin <= _WHOLE_TENSOR:
            yield begin, end - begin
        else:
            for place in range(16):
                yield begin + (end - begin - _SAMPLE) * place // 15, _SAMPLE


def input_device(model: Any) -> torch.device:
    """Return where a model takes token ids: where its embeddings are, or are brought when used."""
    embeddings = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    if device.type != "meta":
        return device
    hook = getattr(embeddings, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        where = getattr(each, "execution_device", None)
        if where is not None:
            return torch.device(where)
    return device


def is_quantised(model: Any) -> bool:
    """Whether a model, or one of that configuration, must be neither moved nor cast nor packed."""
    return any(
        getattr(model, attribute, None) is not None
        for attribute in ("hf_quantizer", "quantization_method", "quantization_config")
    )


def placed(device: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load quantised weights to a device.

    They cannot be moved later, and some kinds would go to a device of their own choice.
    """
    return {"device_map": {"": device}} if is_accelerate_available() else {}


def read_later(values: Tensor) -> Callable[[], Any]:
    """Begin to bring values of a device to the host; return what waits for them, as a list."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(values.device))

    def read() -> Any:
        arrived.synchronize()
        return host.tolist()

    return read


class PackedLinear(nn.Module):
    """A linear layer with packed weights, for inference on a CPU in float32.

    Args:
        weight: As `nn.Linear` holds it, [outputs, inputs]; it is copied.
        bias: Of the layer, [outputs].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        self._multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default

    @property
    def weight(self) -> Tensor:
        """The weights as they were, unpacked anew each time."""
        dense: Tensor = self._packed.to_dense()
        return dense

    def forward(self, states: Tensor) -> Tensor:
        """Return the products, [..., outputs]."""
        return self._multiply(states, self._packed, self.bias, "none", [], "")


def can_pack(model: nn.Module) -> bool:
    """Whether a model runs on the CPU in plain float32, without hooks, where packing is had."""
    return (
        torch._C._has_mkldnn
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and getattr(model, "hf_device_map", None) is None
        and not is_quantised(model)
        and all(
            parameter.device.type == "cpu" and parameter.dtype == torch.float32
            for parameter in model.parameters()
        )
    )


@torch.inference_mode()
def pack(model: nn.Module) -> int:
    """Replace a model's large linear layers by packed ones; return how many.

    Layer by layer, so that no more than one is held twice. Weights that a layer shares with
    another, such as an embedding, stay beside their packed copy.
    """
    count = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            packed = _packed(layer)
            if packed is not None:
                setattr(parent, name, packed)
                count += 1
    return count


def _packed(layer: nn.Module) -> PackedLinear | None:
    """Return a packed layer; None for what is none of ours, or too small to gain."""
    weight: Any = getattr(layer, "weight", None)
    bias: Any = getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or weight.numel() < _LEAST_WEIGHTS:
        return None
    if type(layer) is nn.Linear:
        return PackedLinear(weight, bias)
    if type(layer) is Conv1D:  # GPT-2's, which holds its weight the other way round
        return PackedLinear(weight.T.contiguous(), bias)
    return None


def share_weights(model: nn.Module) -> nn.Module:
    """Return a model of the same weights, whose layers can be replaced without touching `model`.

    Where `model` is moved or cast later, this one keeps what it has: recorded steps read it there.
    """
    shared: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) is nn.Parameter:
            shared[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False)
        else:  # of a kind of its own, such as quantised weights
            shared[id(tensor)] = tensor
    return copy.deepcopy(model, shared)
