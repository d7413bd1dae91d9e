"""Trains a small Llama on the token files that `prepare_data.py` wrote.

Knows steps, batches and checkpoints; where the text came from it does not know. The order
of the data follows from the seed and the step, so a run that is interrupted goes on as if it
had not been. The learning rate stays level and falls over the last part of the steps, so that
`--steps` may be changed when a run is resumed.

Run:
    python examples/train_language_model.py --work WORK --name language_model --steps 12000
    python examples/train_language_model.py --work WORK --name language_model --resume
"""

import argparse
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prepare_data import CONTEXT, SOURCE_WEIGHTS
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


class Corpus:
    """Documents as token ids, dealt out in an order that follows from seed and epoch."""

    def __init__(self, path: Path) -> None:
        """Read a token file."""
        arrays = np.load(path)
        self.ids = arrays["ids"].astype(np.int64)
        self.parts = arrays["parts"]
        self.starts = arrays["starts"]
        self.sources = arrays["sources"]

    def epoch(self, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and parts of one epoch, sources weighted and documents shuffled."""
        rng = np.random.default_rng((seed, epoch))
        weights = np.array([SOURCE_WEIGHTS[source] for source in self.sources])
        copies = np.floor(weights + rng.random(len(weights))).astype(int)
        order = np.repeat(np.arange(len(weights)), copies)
        rng.shuffle(order)
        spans = [slice(self.starts[i], self.starts[i + 1]) for i in order]
        ids = np.concatenate([self.ids[span] for span in spans])
        parts = np.concatenate([self.parts[span] for span in spans])
        return ids, parts

    def batches(self, rows: int, length: int, seed: int, skip: int) -> Iterator[tuple[int, Any]]:
        """Yield tokens seen so far and batches of ids and parts, for ever.

        Args:
            rows: Rows of a batch.
            length: Tokens of a row.
            seed: Of the order.
            skip: Tokens already seen, which are passed over.
        """
        epoch, seen = 0, 0
        while True:
            ids, parts = self.epoch(epoch, seed)
            size = rows * length
            first = max(0, skip - seen)
            for start in range(first, len(ids) - size, size):
                window = slice(start, start + size + 1)
                yield seen + start + size, (ids[window], parts[window])
            seen += len(ids)
            epoch += 1


def make_model(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return a Llama with random weights, in the shape that was asked for."""
    # On a CPU plain matrix products train a third faster than the fused attention.
    return LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=arguments.num_heads,
            num_key_value_heads=arguments.num_heads,
            intermediate_size=arguments.intermediate_size,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        attn_implementation="eager" if arguments.device == "cpu" else "sdpa",
    )


def make_optimizers(
    model: torch.nn.Module, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks and AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices,
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]


def rate_at(step: int, *, steps: int, warmup: int, decay: float) -> float:
    """Return the share of the learning rate at a step: up, level, and down to a twentieth."""
    left = (steps - step) / max(1.0, decay * steps)
    return min(1.0, (step + 1) / warmup, max(0.05, left))


class Clock:
    """Tells when to cool down and when to stop, by steps or by the clock.

    On a machine that others use too nobody knows how many steps an hour has. `cool_minutes`
    lets the learning rate fall from now on and ends the run when they are over; a signal to
    terminate ends it after the step it is in.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Start the clock."""
        self.arguments = arguments
        self.begun = time.monotonic()
        self.terminated = False
        signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, *_: Any) -> None:
        self.terminated = True

    @property
    def minutes(self) -> float:
        """Minutes since the run was started or resumed."""
        return (time.monotonic() - self.begun) / 60

    def rate(self, step: int) -> float:
        """Return the share of the learning rate at a step."""
        arguments = self.arguments
        if arguments.cool_minutes is not None:
            return max(0.03, 1.0 - self.minutes / arguments.cool_minutes)
        return rate_at(step, steps=arguments.steps, warmup=arguments.warmup, decay=arguments.decay)

    def over(self, step: int) -> bool:
        """Say whether the run ends before this step."""
        cool_minutes = self.arguments.cool_minutes
        if cool_minutes is not None:
            return self.terminated or self.minutes >= cool_minutes
        return self.terminated or step >= self.arguments.steps


def make_loss(model: Any, device: torch.device, *, compiled: bool) -> Any:
    """Return a function of ids, targets and weights that gives the mean loss in nats."""

    def loss(ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        return (losses * weights.flatten()).sum() / weights.sum().clamp(min=1.0)

    return torch.compile(loss) if compiled else loss


@torch.inference_mode()
def bits_per_byte(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    sources: set[str] | None = None,
    limit: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Return what the model pays for the assistant's bytes of dialogues held apart.

    The end-of-turn token is paid for and adds no byte.
    """
    token_bytes = torch.tensor(
        [len(t.encode()) if i >= 8 else 0 for i, t in enumerate(byte_strings(tokenizer))]
    )
    bits = num_bytes = num_tokens = 0.0
    chosen = [i for i, s in enumerate(corpus.sources) if sources is None or s in sources]
    if limit is not None:
        chosen = chosen[:: max(1, len(chosen) // limit)][:limit]
    for index in chosen:
        span = slice(corpus.starts[index], corpus.starts[index + 1])
        ids = torch.tensor(corpus.ids[span])
        wanted = torch.tensor(corpus.parts[span] == 2)[1:]
        logits = model(input_ids=ids[None, :-1].to(device), use_cache=False).logits[0]
        losses = functional.cross_entropy(logits.float().cpu(), ids[1:], reduction="none")
        bits += float(losses[wanted].sum()) / math.log(2)
        num_bytes += int(token_bytes[ids[1:]][wanted].sum())
        num_tokens += int(wanted.sum())
    return {
        "bits_per_byte": bits / num_bytes,
        "bits_per_token": bits / num_tokens,
        "bytes": num_bytes,
        "dialogues": len(chosen),
    }


def byte_strings(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return for every id a string whose characters are as many as the token's bytes."""
    # Byte-level BPE writes each byte as one character; encode() must count each once.
    return ["x" * len(t) for t in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]


def save_bundle(model: Any, weights: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write a folder that `from_pretrained` reads, the weights in bf16."""
    kept = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    model.load_state_dict(kept)
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    # How it was loaded here says nothing of how it is loaded elsewhere.
    for name in ("is_local", "local_files_only"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2))
    if isinstance(copy, LlamaForCausalLM):
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=True,
            temperature=0.8,
            top_p=0.9,
            max_length=CONTEXT,
        ).save_pretrained(folder)


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with the token files")
    parser.add_argument("--name", default="language_model", help="of the run, a folder in `work`")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the steps that cool")
    parser.add_argument("--cool-minutes", type=float, help="cool down from now on, then stop")
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--read-weight", type=float, default=0.4, help="of tokens merely read")
    parser.add_argument("--average", type=float, default=0.998, help="of the weights, a step")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--intermediate-size", type=int, default=688)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=250, help="steps")
    parser.add_argument("--measure-every", type=int, default=500, help="steps")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


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
    train = Corpus(arguments.work / "train.npz")
    held_apart = Corpus(arguments.work / "held_apart.npz")
    model = make_model(arguments, tokenizer).to(device)
    optimizers = make_optimizers(model, arguments.learning_rate, arguments.weight_decay)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step, seen, seconds = 0, 0, 0.0
    if arguments.resume:
        saved = torch.load(checkpoint_path, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        average, step, seen = saved["average"], saved["step"], saved["seen"]
        seconds = saved["seconds"]

    loss_of = make_loss(model, device, compiled=not arguments.no_compile)
    batches = train.batches(arguments.rows, arguments.length, arguments.seed, seen)
    part_weights = torch.tensor([0.0, arguments.read_weight, 1.0])
    log = (folder / "log.jsonl").open("a", buffering=1)
    bar = tqdm(total=arguments.steps, initial=step, mininterval=30.0)
    clock = Clock(arguments)

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "average": average,
            "step": step,
            "seen": seen,
            "seconds": seconds + 60 * clock.minutes,
        }
        torch.save(state, checkpoint_path.with_suffix(".part"))
        checkpoint_path.with_suffix(".part").replace(checkpoint_path)
        save_bundle(model, average, tokenizer, folder / "bundle")

    while not clock.over(step):
        seen, (ids, parts) = next(batches)
        shape = (arguments.rows, arguments.length)
        inputs = torch.from_numpy(ids[:-1]).view(shape).to(device)
        targets = torch.from_numpy(ids[1:]).view(shape).to(device)
        weights = part_weights[torch.from_numpy(parts[1:]).long()].view(shape).to(device)
        share = clock.rate(step)
        loss = loss_of(inputs, targets, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        keep = min(arguments.average, step / (step + 10))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 1.0 - keep)
        bar.update()
        if step % 25 == 0:
            speed = 25 * arguments.rows * arguments.length
            elapsed = seconds + 60 * clock.minutes
            entry = {"step": step, "loss": round(loss.item(), 4), "seen": seen}
            log.write(json.dumps({**entry, "seconds": round(elapsed, 1)}) + "\n")
            bar.set_postfix(loss=f"{entry['loss']:.3f}", tokens=speed)
        if step % arguments.save_every == 0 or clock.over(step):
            save()
        if step % arguments.measure_every == 0 or clock.over(step):
            now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model.load_state_dict(average)
            measured = bits_per_byte(model, tokenizer, held_apart, limit=60, device=device)
            model.load_state_dict(now)
            log.write(json.dumps({"step": step, **measured}) + "\n")
            tqdm.write(f"step {step}: {measured['bits_per_byte']:.3f} bits per byte held apart")
    bar.close()


if __name__ == "__main__":
    main()
