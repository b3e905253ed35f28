# SPDX-License-Identifier: Apache-2.0
"""Train a small, real Llama on the Python standard library's own source code.

Compression results on random or untrained weights say little about real ones, and real checkpoints are too
big to ship with a package.  This script trains a model of about 7.9 million parameters from scratch on an
ordinary CPU in about an hour, and saves it in BF16 in the usual Hugging Face layout.  It needs only
``torch``, ``transformers`` and ``tokenizers``::

    python examples/train_demo_model.py --out demo_model_bf16 --steps 2000 --compile

* Text: every ``.py`` file of the standard library of the interpreter that runs the script (PSF licence), less
  tests, generated tables and installed packages.  The modules named in ``HELD_OUT`` are seen neither by the
  tokenizer nor by the model; the evaluation runs on them only.
* Tokenizer: byte-level BPE with 4096 entries; ``<|endoftext|>`` separates files and is both BOS and EOS.
* Each epoch cuts the token stream into windows at a new random offset and shuffles the windows.  The order
  depends only on the seed and the step, so a run that was interrupted resumes exactly where it stopped.

The output directory also receives ``training_report.json``.  The held-out numbers in it are those of the saved
BF16 weights, read back from disk; "per token" depends on the tokenizer, bits per byte does not.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
MAX_POSITIONS = 1024

HELD_OUT = (
    "argparse.py",
    "asyncio/queues.py",
    "calendar.py",
    "configparser.py",
    "email/charset.py",
    "fractions.py",
    "heapq.py",
    "http/cookies.py",
    "json/decoder.py",
    "shlex.py",
    "textwrap.py",
)
EXCLUDED_DIRS = frozenset(
    (
        *("site-packages", "dist-packages", "__pycache__"),
        *("test", "tests", "idle_test"),
        *("encodings", "lib2to3", "pydoc_data", "turtledemo"),
    )
)


def load_corpus() -> tuple[dict[str, str], dict[str, str]]:
    """Return the training files and the held-out files, each as {path inside the library: text}."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED_DIRS.intersection(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            (held_out if name.as_posix() in HELD_OUT else train)[name.as_posix()] = text
    missing = set(HELD_OUT) - set(held_out)
    if missing:
        raise SystemExit(f"held-out modules missing from {root}: {sorted(missing)}")
    if set(held_out.values()) & set(train.values()):
        raise SystemExit("a held-out module also occurs, under another name, among the training files")
    return train, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer; token 0 is the end-of-text marker."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, files: dict[str, str]) -> torch.Tensor:
    """Join files into one stream of tokens: marker, file, marker, file, ..., marker."""
    marker = tokenizer.token_to_id(END_OF_TEXT)
    stream: list[int] = [marker]
    for name in sorted(files):
        stream += tokenizer.encode(files[name]).ids
        stream.append(marker)
    return torch.tensor(stream, dtype=torch.long)


class Windows:
    """Shuffled training windows of ``length + 1`` tokens, a pure function of the seed and the window's number."""

    def __init__(self, stream: torch.Tensor, length: int, seed: int) -> None:
        self.stream, self.length, self.seed = stream, length, seed
        self.per_epoch = (len(stream) - 1) // length - 1  # the same count at every offset
        self.epoch = -1
        self.starts: list[int] = []

    def batch(self, step: int, size: int) -> torch.Tensor:
        """Return the windows of one step, a tensor of shape (size, length + 1)."""
        rows = []
        for number in range(step * size, (step + 1) * size):
            epoch, index = divmod(number, self.per_epoch)
            if epoch != self.epoch:
                rng = random.Random(f"{self.seed}/{epoch}")
                offset = rng.randrange(self.length)
                self.starts = [offset + i * self.length for i in range(self.per_epoch)]
                rng.shuffle(self.starts)
                self.epoch = epoch
            rows.append(self.stream[self.starts[index] : self.starts[index] + self.length + 1])
        return torch.stack(rows)


def make_model() -> LlamaForCausalLM:
    """Build the untrained model, in float32."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def loss_sum(model: Callable[..., Any], windows: torch.Tensor) -> torch.Tensor:
    """Return the summed negative log-likelihood (nats) of each window's tokens after its first."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="sum")


def evaluate(model: LlamaForCausalLM, stream: torch.Tensor, text_bytes: int, length: int) -> dict[str, float]:
    """Score a stream in windows that overlap by one token, so that every token but the first counts once."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, length):
            total += loss_sum(model, stream[None, start : start + length + 1]).item()
    loss = total / (len(stream) - 1)
    return {
        "loss_nats_per_token": loss,
        "perplexity_per_token": math.exp(loss),
        "bits_per_byte": total / math.log(2) / text_bytes,
    }


def make_optimizer(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only, not on the norm vectors."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < args.warmup:
        return float(args.lr * (step + 1) / args.warmup)
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return float(args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))))


def train(
    args: argparse.Namespace, train_stream: torch.Tensor, eval_stream: torch.Tensor, eval_bytes: int
) -> tuple[LlamaForCausalLM, float]:
    """Train, or resume from the checkpoint, and return the float32 model and the seconds it took."""
    model = make_model()
    optimizer = make_optimizer(model, args.lr)
    network: Callable[..., Any] = torch.compile(model) if args.compile else model
    windows = Windows(train_stream, args.seq_len, args.seed)
    first, before = 0, 0.0
    checkpoint = args.checkpoint_dir / "state.pt" if args.checkpoint_dir else None
    if checkpoint and checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, before = state["step"], state["seconds"]
        print(f"resumed at step {first}", flush=True)
    begin = time.perf_counter() - before
    for step in range(first, args.steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        batch = windows.batch(step, args.batch_size)
        loss = loss_sum(network, batch) / batch[:, 1:].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        seconds = time.perf_counter() - begin
        if done % 10 == 0 or done == args.steps:
            rate = (done - first) * args.batch_size * args.seq_len / (seconds - before)
            print(f"step {done}/{args.steps} loss {loss.item():.4f} {rate:.0f} tokens/s {seconds:.0f} s", flush=True)
        if done % args.checkpoint_every == 0 or done == args.steps:
            result = evaluate(model, eval_stream, eval_bytes, args.seq_len)
            print(f"step {done} held-out: {json.dumps(result)}", flush=True)
            if checkpoint:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                torch.save(state | {"step": done, "seconds": seconds}, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
    return model, time.perf_counter() - begin


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the BF16 model and the tokenizer in the Hugging Face layout."""
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    model.to(torch.bfloat16).save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    path = out / "tokenizer_config.json"  # name the class in the way that every release of transformers reads
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a small Llama on the Python standard library's source.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per step")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="warm-up steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's choice)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (faster; needs a C++ compiler)")
    parser.add_argument("--checkpoint-dir", type=Path, help="keep a resumable checkpoint here")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between evaluations and checkpoints")
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and the model, save them and report on the saved model."""
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train_files, held_out_files = load_corpus()
    tokenizer = train_tokenizer(list(train_files.values()))
    train_stream, eval_stream = encode(tokenizer, train_files), encode(tokenizer, held_out_files)
    train_bytes, eval_bytes = (sum(len(t.encode()) for t in files.values()) for files in (train_files, held_out_files))
    print(f"training: {len(train_files)} files, {train_bytes} bytes, {len(train_stream)} tokens", flush=True)
    print(f"held out: {len(held_out_files)} files, {eval_bytes} bytes, {len(eval_stream)} tokens", flush=True)

    model, seconds = train(args, train_stream, eval_stream, eval_bytes)
    save(model, tokenizer, args.out)
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)  # the BF16 values, float32 arithmetic
    tokens_trained = args.steps * args.batch_size * args.seq_len
    report = {
        "held_out": evaluate(saved, eval_stream, eval_bytes, args.seq_len),
        "held_out_modules": list(HELD_OUT),
        "held_out_bytes": eval_bytes,
        "held_out_tokens": len(eval_stream) - 1,
        "parameters": sum(p.numel() for p in saved.parameters()),
        "weights_dtype": "bfloat16",
        "training_files": len(train_files),
        "training_bytes": train_bytes,
        "training_stream_tokens": len(train_stream),
        "tokens_trained": tokens_trained,
        "epochs": round(tokens_trained / len(train_stream), 3),
        "seconds": round(seconds, 1),
        "settings": {k: getattr(args, k) for k in ("steps", "batch_size", "seq_len", "lr", "warmup", "seed")},
        "threads": torch.get_num_threads(),
        "compiled": args.compile,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (args.out / "training_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
