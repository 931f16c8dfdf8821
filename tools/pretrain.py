"""Make the embedded base model: tokenizer, pre-training, evaluation and model card figures.

    python tools/pretrain.py --data ../shared/data --out build/base --minutes 100

Writes a plain Hugging Face checkpoint (GPT-2 architecture, bfloat16 weights) with its tokenizer, and
`training.json` with what the model card states. The schedule follows the wall clock: the rate is constant after warm-up and
falls linearly to zero over the last 30 % of the budget, so a run on any machine ends well. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

END = "<|endoftext|>"
SHARES = {"books": 0.78, "wikitext": 0.13, "tinystories": 0.09}


def detokenise_wikitext(text: str) -> str:
    """WikiText separates punctuation by spaces; put it back as people write it."""
    for old, new in (
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (" @.@ ", "."),
        (" ,", ","),
        (" .", "."),
        (" ;", ";"),
        (" :", ":"),
        (" !", "!"),
        (" ?", "?"),
        ("( ", "("),
        (" )", ")"),
        (" 's", "'s"),
        (" n't", "n't"),
        (" %", "%"),
    ):
        text = text.replace(old, new)
    return text


def documents(root: Path, source: str, split: str) -> Iterator[str]:
    """The texts of one source; `split` is train, valid or test."""
    if source == "wikitext":
        name = "train.part.txt.gz" if split == "train" else f"{split}.txt.gz"
        with gzip.open(root / source / name, "rt", encoding="utf-8") as file:
            text = detokenise_wikitext(file.read())
        yield from (part for part in text.split("\n = ") if part.strip())
        return
    with gzip.open(root / source / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def train_tokenizer(root: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = (document[:200_000] for source in SHARES for document in documents(root, source, "train"))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=512)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> np.ndarray:
    """All texts as one row of token ids, each closed by the end token."""
    end = tokenizer.eos_token_id
    pieces = []
    for text in texts:
        chunks = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
        for encoding in tokenizer.backend_tokenizer.encode_batch(chunks):
            pieces.append(np.array(encoding.ids, dtype=np.uint16))
        pieces.append(np.array([end], dtype=np.uint16))
    return np.concatenate(pieces)


def attention_in_float32(module, query, key, value, mask, **options):  # type: ignore[no-untyped-def]
    """PyTorch's bfloat16 attention backward on CPU is about five times slower than its float32 one."""
    wide = mask.float() if mask is not None and mask.is_floating_point() else mask
    output, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), wide, **options)
    return output.to(query.dtype), weights


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, ids: np.ndarray, length: int, limit_tokens: int) -> float:
    """Token perplexity over consecutive windows."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, min(len(ids) - length - 1, limit_tokens), length * 8):
        rows = [ids[i : i + length] for i in range(start, min(start + length * 8, len(ids) - length), length)]
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        total += F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        count += batch[:, 1:].numel()
    model.train()
    return math.exp(total / count)


def make_optimizers(model: GPT2LMHeadModel, muon: bool) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the blocks (if asked), AdamW for the rest; each with its peak learning rate."""
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    chosen = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    if not muon:
        return [(torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True), 2e-3)]
    return [
        (torch.optim.Muon(blocks, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"), 0.02),
        (torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True), 3e-3),
    ]


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path, facts: dict[str, object]) -> None:
    stored = GPT2LMHeadModel(model.config).bfloat16()
    stored.load_state_dict(model.state_dict())
    stored.config._attn_implementation = "sdpa"
    stored.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that 4.57 does not know; both know this one.
    settings = out / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("build/base"))
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    AttentionInterface.register("sdpa_float32", attention_in_float32)
    AttentionMaskInterface.register("sdpa_float32", sdpa_mask)

    tokenizer = train_tokenizer(arguments.data, 4096)
    corpora = {s: encode(tokenizer, documents(arguments.data, s, "train")) for s in SHARES}
    held_out = {s: encode(tokenizer, documents(arguments.data, s, "valid")) for s in SHARES}
    tests = {s: encode(tokenizer, documents(arguments.data, s, "test")) for s in SHARES}
    print({s: len(c) for s, c in corpora.items()}, flush=True)

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4096,
        n_positions=512,
        n_embd=256,
        n_layer=8,
        n_head=8,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    config._attn_implementation = "sdpa_float32"
    model = GPT2LMHeadModel(config).train()
    optimizers = make_optimizers(model, arguments.muon)
    draw = np.random.default_rng(0)
    names, shares = list(SHARES), list(SHARES.values())
    budget_s, started, step, losses = arguments.minutes * 60, time.time(), 0, []
    saved_s = started
    while (elapsed := time.time() - started) < budget_s:
        # Half-length rows are cheaper; the last quarter trains the full context (same tokens a step).
        halves = 2 if elapsed < 0.75 * budget_s else 1
        length = arguments.length // halves
        rows = []
        for name in draw.choice(names, size=arguments.batch * halves, p=shares):
            corpus = corpora[name]
            start = int(draw.integers(0, len(corpus) - length))
            rows.append(corpus[start : start + length])
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        factor = min(1.0, (step + 1) / 100) * min(1.0, (1 - elapsed / budget_s) / 0.3)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            speed = step * batch.numel() / (time.time() - started)
            print(f"{elapsed:7.0f} s  step {step}  loss {np.mean(losses[-50:]):.3f}  {speed:.0f} tokens/s", flush=True)
        if time.time() - saved_s > 600:
            figures = {s: round(perplexity(model, c, arguments.length, 60_000), 2) for s, c in held_out.items()}
            print("valid perplexity", figures, flush=True)
            save(model, tokenizer, arguments.out, {"steps": step, "valid_perplexity": figures})
            saved_s = time.time()
    facts = {
        "steps": step,
        "tokens": step * arguments.batch * arguments.length,
        "minutes": round((time.time() - started) / 60, 1),
        "threads": arguments.threads,
        "optimizer": "Muon + AdamW" if arguments.muon else "AdamW",
        "final_loss": round(float(np.mean(losses[-100:])), 4),
        "corpus_tokens": {s: len(c) for s, c in corpora.items()},
        "shares": SHARES,
        "valid_perplexity": {s: round(perplexity(model, c, arguments.length, 200_000), 2) for s, c in held_out.items()},
        "test_perplexity": {s: round(perplexity(model, c, arguments.length, 200_000), 2) for s, c in tests.items()},
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    save(model, tokenizer, arguments.out, facts)
    print(json.dumps(facts, indent=2), flush=True)


if __name__ == "__main__":
    main()
