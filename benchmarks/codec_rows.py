"""Rows of a real language model for benchmarks/codec.py: a small one is trained for a few CPU minutes on a folder of public texts.

    python benchmarks/codec_rows.py --data FOLDER --out FOLDER [--tokenizer llama2] [--steps 500] [--rows 262144]

A row holds the 128 most probable ids, their log-probabilities, the log of the mass outside them and the target's log-probability, at
temperature 1 ("flat") and with the logits scaled so that the mean mass of the top 64 is 0.97 ("sharp"). It knows nothing of the codec.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch

KEPT, CONTEXT, WIDTH, SHARP_MASS = 128, 256, 128, 0.97


def texts(data: Path) -> list[str]:
    """Instructions with their answers, solved arithmetic problems and paragraphs of an encyclopedia: lengths of 30 to 500 tokens."""
    found = []
    for name, keys in {
        "instruct/alpaca_52k.train.jsonl.gz": ["instruction", "input", "output"], "reasoning/gsm8k_train.jsonl.gz": ["question", "answer"],
        "instruct/gpteacher_roleplay.jsonl.gz": ["instruction", "input", "response"], "text/tinystories.train2085.jsonl.gz": ["text"],
    }.items():
        with gzip.open(data / name, "rt", encoding="utf-8") as lines:
            found += ["\n".join(str(row[key]) for key in keys if row.get(key)) for row in map(json.loads, lines)]
    for name in ["text/wiki_demo.txt.gz", "text/wikitext2_valid.txt.gz"]:
        with gzip.open(data / name, "rt", encoding="utf-8") as file:
            found += [line for line in file.read().split("\n") if len(line) > 200]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order]


def sequences(data: Path, tokenizer: str, wanted: int) -> tuple[list[list[int]], int]:
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(data / "tokenizers" / tokenizer)
    found, total = [], 0
    for text in texts(data):
        found.append([tok.bos_token_id or 0, *tok(text[:8000], add_special_tokens=False).input_ids])
        total += len(found[-1])
        if total >= wanted:
            break
    vocabulary = 151_936 if tokenizer == "qwen2" else len(tok)  # Qwen2's head is wider than its tokenizer
    return found, vocabulary


def used_ids(found: list[list[int]]) -> np.ndarray:
    """The ids that occur at all. The model's head has these alone, which makes its training several times cheaper."""
    return np.unique(np.concatenate([np.array(tokens) for tokens in found]))


def trained(batches: torch.Tensor, vocabulary: int, steps: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
        tokens = batches[torch.randint(0, len(batches), (8,))]
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def record(model, held_out: list[list[int]], scale: float, wanted: int) -> dict[str, np.ndarray]:
    parts, lengths, total = [], [], 0
    for tokens in held_out:
        tokens = torch.tensor(tokens[: 2 * CONTEXT + 1])
        rows = []
        for start in range(0, len(tokens) - 1, CONTEXT):
            window = tokens[start : start + CONTEXT + 1]
            logits = model(input_ids=window[None, :-1]).logits[0].float() * scale
            log_norm = logits.logsumexp(1)
            values, ids = logits.topk(KEPT, dim=1)
            rest = logits.scatter(1, ids, -torch.inf).logsumexp(1) - log_norm
            target = logits.gather(1, window[1:, None])[:, 0] - log_norm
            rows.append((ids.int(), values - log_norm[:, None], rest, target, window[1:].int()))
        parts += rows
        lengths.append(sum(len(row[0]) for row in rows))
        total += lengths[-1]
        if total >= wanted:
            break
    names = ["ids", "log_probs", "log_tail", "target_log_probs", "targets"]
    arrays = {name: torch.cat([part[i] for part in parts]).numpy()[:wanted] for i, name in enumerate(names)}
    lengths[-1] -= max(total - wanted, 0)
    return arrays | {"lengths": np.array(lengths)}


def sharpness(model, held_out: list[list[int]]) -> float:
    """The scale of the logits at which the top 64 have SHARP_MASS of the mass in the mean, by bisection on a few sequences."""
    with torch.no_grad():
        some = torch.cat([model(input_ids=torch.tensor([tokens[:CONTEXT]])).logits[0] for tokens in held_out[:20]]).float()
    low, high = 1.0, 8.0
    for _ in range(12):
        middle = (low + high) / 2
        mass = (some * middle).log_softmax(1).topk(64, dim=1).values.exp().sum(1).mean()
        low, high = (middle, high) if mass < SHARP_MASS else (low, middle)
    return high


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", default="llama2")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--tokens", type=int, default=3_000_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, vocabulary = sequences(options.data, options.tokenizer, options.tokens)
    split, total = 0, 0
    while total < options.rows * 1.1 and split < len(found) // 2:  # held out: the first sequences
        total, split = total + len(found[split]) - 1, split + 1
    used = used_ids(found)
    found = [np.searchsorted(used, tokens).tolist() for tokens in found]
    stream = torch.tensor([token for tokens in found[split:] for token in tokens])
    print(f"{len(stream)} tokens to train on, {len(used)} of {vocabulary} ids in use", flush=True)
    model = trained(stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT), len(used), options.steps)
    held_out = [tokens for tokens in found[:split] if len(tokens) > 8]
    options.out.mkdir(parents=True, exist_ok=True)
    for name, scale in {"flat": 1.0, "sharp": sharpness(model, held_out)}.items():
        arrays = record(model, held_out, scale, options.rows)
        arrays |= {name: used[arrays[name]].astype(np.int32) for name in ["ids", "targets"]}
        np.savez(options.out / f"{options.tokenizer}-{name}.npz", vocabulary=vocabulary, scale=scale, **arrays)
        mass = np.exp(arrays["log_probs"][:, :64], dtype=np.float64).sum(1).mean()
        print(f"{name}: scale {scale:.2f}, {len(arrays['ids'])} rows, mean mass of the top 64 {mass:.3f}", flush=True)


if __name__ == "__main__":
    main()
