"""Bytes, KL and time of recorded top-K rows: this project's codec against DistillKit's form and three plain ones, interleaved in one run.

    python benchmarks/codec.py [--rows FOLDER/llama2-flat.npz ...] [--k 64 ...] [--length 0 200 ...] [--limit 262144]

Rows come from benchmarks/codec_rows.py, cut into sequences as they came (--length 0) or of one length; without --rows, synthetic Zipf
rows. Every contender encodes and decodes each block of rows in turn; times are CPU seconds of one thread. KL is between the exact row
and the decoded one as K + 1 outcomes (kept ids and tail), scaled to add up to 1; DistillKit's form has no tail and is given the exact one.
Each speed is given as the mean and as that of the fastest block, since other work on the machine slows all of them.
"""

import argparse
import io
import itertools
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from potstill.cache.codec import make_codec
from potstill.cache.records import DrawnTokens, RecordFormat
from potstill.signals import TopKOutcomes

BLOCK = 8192  # rows that a contender handles before the next one's turn
torch.set_num_threads(1)


class Ours:
    def __init__(self, k: int, vocabulary: int):
        self._codec = make_codec(RecordFormat("top_k", vocabulary, k=k))

    def encode(self, parts: list[TopKOutcomes]) -> list[bytes]:
        return [self._codec.encode(part) for part in parts]

    def decode(self, payloads: list[bytes], lengths: list[int]):
        record = self._codec.decode(payloads, lengths)
        return record.ids, record.log_probs, record.log_tail


class DistillKit:
    """Written from the public description: top values as 16-bit floats, the rest as a least-squares curve over the rank, packed ids."""

    def __init__(self, k: int, vocabulary: int, exact: int, terms: list):
        self._k, self._exact, self._bits = k, exact, math.ceil(math.log2(vocabulary))
        ranks = np.linspace(0, 1, k - exact)
        self._curve = np.stack([np.sqrt(ranks) if term == "sqrt" else ranks**term for term in terms], axis=1)
        self._fit = np.linalg.pinv(self._curve).T.astype(np.float32)
        self._curve = self._curve.T.astype(np.float32)

    def encode(self, parts: list[TopKOutcomes]) -> list[bytes]:
        payloads = []
        for part in parts:
            values = part.log_probs.numpy()  # sorted already
            shifts = np.arange(self._bits, dtype=np.uint32)
            bits = (part.ids.numpy().astype(np.uint32)[:, :, None] >> shifts & 1).astype(np.uint8)
            ids = np.packbits(bits.reshape(len(values), -1), axis=1)
            top = values[:, : self._exact].astype(np.float16).view(np.uint8)
            terms = (values[:, self._exact :] @ self._fit).astype(np.float32).view(np.uint8)
            payloads.append(np.concatenate([top, terms, ids], axis=1).tobytes())
        return payloads

    def decode(self, payloads: list[bytes], lengths: list[int]):
        raw = np.frombuffer(b"".join(payloads), np.uint8).reshape(sum(lengths), -1)
        split = 2 * self._exact, 2 * self._exact + 4 * len(self._curve)
        top = np.ascontiguousarray(raw[:, : split[0]]).view(np.float16).astype(np.float32)
        curve = np.ascontiguousarray(raw[:, split[0] : split[1]]).view(np.float32) @ self._curve
        bits = np.unpackbits(raw[:, split[1] :], axis=1, count=self._k * self._bits).reshape(len(raw), self._k, self._bits)
        ids = bits @ (1 << np.arange(self._bits, dtype=np.int64))
        log_probs = torch.from_numpy(np.concatenate([top, curve], axis=1))
        return torch.from_numpy(ids), log_probs, None


class Packed:
    """Ids in 16 or 32 bits and log-probabilities in fp16, with the tail in float32: safetensors plain, or raw under zstd-3."""

    def __init__(self, k: int, vocabulary: int, compressed: bool):
        self._k = k
        self._ids = np.uint16 if compressed and vocabulary <= 2**16 else np.int32
        self._zstd = pa.Codec("zstd", compression_level=3) if compressed else None

    def encode(self, parts: list[TopKOutcomes]) -> list[bytes]:
        from safetensors.numpy import save

        payloads = []
        for part in parts:
            arrays = part.ids.numpy().astype(self._ids), part.log_probs.numpy().astype(np.float16), part.log_tail.numpy()
            if self._zstd is None:
                payloads.append(save(dict(zip(["ids", "log_probs", "log_tail"], arrays, strict=True))))
            else:
                payloads.append(self._zstd.compress(b"".join(array.tobytes() for array in arrays), asbytes=True))
        return payloads

    def decode(self, payloads: list[bytes], lengths: list[int]):
        from safetensors.numpy import load

        parts = []
        for payload, n in zip(payloads, lengths, strict=True):
            if self._zstd is None:
                loaded = load(payload)
                parts.append(tuple(loaded[name] for name in ["ids", "log_probs", "log_tail"]))
                continue
            k = self._k
            sizes = np.cumsum([n * k * self._ids().itemsize, n * k * 2])
            raw = self._zstd.decompress(payload, decompressed_size=int(sizes[1]) + 4 * n, asbytes=True)
            parts.append((
                np.frombuffer(raw[: sizes[0]], self._ids).reshape(n, k),
                np.frombuffer(raw[sizes[0] : sizes[1]], np.float16).reshape(n, k), np.frombuffer(raw[sizes[1] :], np.float32),
            ))  # fmt: skip
        ids, log_probs, tail = (np.concatenate(column) for column in zip(*parts, strict=True))
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(log_probs.astype(np.float32)), torch.from_numpy(tail.copy())


class Parquet:
    """A file a block with lists of int32 and float32, as `datasets` writes it."""

    def encode(self, parts: list[TopKOutcomes]) -> list[bytes]:
        ids, log_probs = torch.cat([part.ids for part in parts]).int().numpy(), torch.cat([part.log_probs for part in parts]).numpy()
        offsets = np.arange(0, ids.size + 1, ids.shape[1], dtype=np.int32)
        columns = [pa.ListArray.from_arrays(offsets, pa.array(array.reshape(-1))) for array in (ids, log_probs)]
        tail = pa.array(torch.cat([part.log_tail for part in parts]).numpy())
        sink = io.BytesIO()
        pq.write_table(pa.table([*columns, tail], ["ids", "log_probs", "log_tail"]), sink)
        return [sink.getvalue()]

    def decode(self, payloads: list[bytes], lengths: list[int]):
        table = pq.read_table(io.BytesIO(payloads[0]), use_threads=False)
        ids, log_probs = (table[name].combine_chunks().flatten().to_numpy().reshape(sum(lengths), -1) for name in ("ids", "log_probs"))
        tail = torch.from_numpy(table["log_tail"].to_numpy().copy())
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(log_probs.copy()), tail


def contenders(k: int, vocabulary: int) -> dict:
    packed, plain = Packed(k, vocabulary, True), Packed(k, vocabulary, False)
    found = {"ours": Ours(k, vocabulary), "DistillKit, exact_k 1, 3 terms": DistillKit(k, vocabulary, 1, [0, 1, "sqrt"])}
    if k > 24:
        found["DistillKit, exact_k 16, 6 terms"] = DistillKit(k, vocabulary, 16, [0, 1, 2, 3, 4, "sqrt"])
    return found | {"packed ids + fp16, zstd-3": packed, "safetensors, int32 + fp16": plain, "parquet, int32 + float32": Parquet()}


@dataclass
class Tally:
    size: int = 0
    times: list = field(default_factory=list)
    kl: list = field(default_factory=list)

    def line(self, name: str, rows: int, k: int, source: str, length: str) -> dict:
        kl, times = torch.cat(self.kl), np.array(self.times)  # rows, encoding, decoding of each block
        means, best = rows / times[:, 1:].sum(0), (times[:, :1] / times[:, 1:]).max(0)
        return {
            "rows": source, "k": k, "length": length, "contender": name, "bytes a token": round(self.size / rows, 2),
            "mean KL": float(f"{kl.mean():.2e}"), "max KL": float(f"{kl.max():.2e}"),
            "encoded a second": int(means[0]), "decoded a second": int(means[1]), "at best": [int(best[0]), int(best[1])],
        }  # fmt: skip


def kl_by_row(exact: TopKOutcomes, ids, log_probs, log_tail) -> torch.Tensor:
    ours, theirs = exact.ids.argsort(1), ids.argsort(1)
    assert torch.equal(exact.ids.gather(1, ours), ids.gather(1, theirs)), "another set of ids came back"
    log_tail = exact.log_tail if log_tail is None else log_tail
    p = torch.cat([exact.log_probs.gather(1, ours), exact.log_tail[:, None]], 1).double()
    q = torch.cat([log_probs.gather(1, theirs), log_tail[:, None]], 1).double()
    terms = p.exp() * (p - q.log_softmax(1))
    return torch.where(p.isneginf(), 0.0, terms).sum(1)


def measure(record: TopKOutcomes, vocabulary: int, lengths: list[int], source: str, length: str, only_ours: bool) -> list[dict]:
    k = record.ids.shape[1]
    tallies = {name: (contender, Tally()) for name, contender in contenders(k, vocabulary).items() if name == "ours" or not only_ours}
    start, at = 0, 0
    while at < len(lengths):
        stop, block = at, 0
        while stop < len(lengths) and (block == 0 or block + lengths[stop] <= BLOCK):
            block, stop = block + lengths[stop], stop + 1
        ends = np.cumsum([start, *lengths[at:stop]]).tolist()
        parts = [record.rows(slice(a, b)) for a, b in itertools.pairwise(ends)]
        whole = record.rows(slice(start, ends[-1]))
        for contender, tally in tallies.values():
            began = time.process_time()
            payloads = contender.encode(parts)
            middle = time.process_time()
            decoded = contender.decode(payloads, lengths[at:stop])
            tally.times.append((len(whole), middle - began, time.process_time() - middle))
            tally.size += sum(map(len, payloads))
            tally.kl.append(kl_by_row(whole, *decoded))
        start, at = ends[-1], stop
    return [tally.line(name, start, k, source, length) for name, (_, tally) in tallies.items()]


def draws(record: TopKOutcomes, targets: np.ndarray, n: int) -> DrawnTokens:
    """n draws a row from the kept ids, and where the tail is hit from the tokens of the text: the tail's own ids are not recorded."""
    generator = torch.Generator().manual_seed(0)
    places = torch.multinomial(torch.cat([record.log_probs, record.log_tail[:, None]], 1).exp(), n, replacement=True, generator=generator)
    texts = torch.from_numpy(targets).long()[torch.randint(0, len(targets), places.shape, generator=generator)]
    drawn = torch.cat([record.ids, texts[:, :1]], 1).gather(1, places)
    drawn = torch.where(places == record.ids.shape[1], texts, drawn).sort(1).values
    first = torch.cat([torch.ones(len(drawn), 1, dtype=torch.bool), drawn.diff(dim=1) != 0], 1)
    slots = first.cumsum(1) - 1
    counts = torch.zeros_like(drawn).scatter_add(1, slots, torch.ones_like(drawn))
    ids = torch.zeros_like(drawn).scatter(1, slots, drawn)
    width = int(slots.max()) + 1
    return DrawnTokens(ids[:, :width], counts[:, :width], (counts[:, :width] > 0) / torch.tensor(float(n)))


def measure_draws(record: TopKOutcomes, targets: np.ndarray, vocabulary: int, lengths: list[int], source: str, length: str) -> dict:
    codec = make_codec(RecordFormat("sampled", vocabulary, num_samples=50))
    record = record.rows(slice(0, min(len(record), 4 * BLOCK)))
    drawn, ends = draws(record, targets, 50), [0]
    for n in lengths:
        if ends[-1] + n > len(record):
            break
        ends.append(ends[-1] + n)
    parts = [drawn.rows(slice(a, b)) for a, b in itertools.pairwise(ends)]
    began = time.process_time()
    payloads = [codec.encode(part) for part in parts]
    middle = time.process_time()
    decoded = codec.decode(payloads, lengths[: len(parts)])
    taken = time.process_time() - middle
    assert torch.equal(decoded.counts.sum(1), drawn.counts[: ends[-1]].sum(1))
    return {
        "rows": source, "length": length, "contender": "ours, 50 draws", "bytes a token": round(sum(map(len, payloads)) / ends[-1], 2),
        "distinct ids": round(float((drawn.counts > 0).sum(1).double().mean()), 1), "encoded a second": int(ends[-1] / (middle - began)),
        "decoded a second": int(ends[-1] / taken),
    }  # fmt: skip


def load(path: Path, k: int, limit: int, vocabulary: int | None) -> tuple[TopKOutcomes, np.ndarray, int, list[int]]:
    """The record, the text's tokens, the vocabulary, the sequences' lengths. `vocabulary`: each id moves to a place in a larger one."""
    arrays = np.load(path)
    log_probs, tail = torch.from_numpy(arrays["log_probs"][:limit]), torch.from_numpy(arrays["log_tail"][:limit])
    log_tail = torch.cat([log_probs[:, k:], tail[:, None]], 1).double().logsumexp(1).float()
    lengths = arrays["lengths"]
    lengths = lengths[np.cumsum(lengths) <= limit].tolist()
    ids, text = arrays["ids"][:limit, :k].astype(np.int64), arrays["targets"][:limit].astype(np.int64)
    own = int(arrays["vocabulary"])
    if vocabulary:
        places = np.random.default_rng(0).choice(vocabulary, own, replace=False)
        ids, text, own = places[ids], places[text], vocabulary
    targets = torch.from_numpy(arrays["target_log_probs"][:limit])
    return TopKOutcomes(torch.from_numpy(ids), log_probs[:, :k].contiguous(), log_tail, targets), text, own, lengths


def synthetic(k: int, n: int = 2048) -> tuple[TopKOutcomes, np.ndarray, int, list[int]]:
    vocabulary, generator = 32_000, torch.Generator().manual_seed(0)
    frequency = -torch.arange(1, vocabulary + 1).float().log()[torch.randperm(vocabulary, generator=generator)]
    log_probs = (frequency + 1.5 * torch.randn(n, vocabulary, generator=generator)).log_softmax(1)
    kept, ids = log_probs.topk(k, dim=1)
    record = TopKOutcomes(ids, kept, log_probs.scatter(1, ids, -torch.inf).logsumexp(1), log_probs[:, 0].clone())
    return record, np.arange(vocabulary), vocabulary, [256] * (n // 256)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, nargs="*", default=[])
    parser.add_argument("--k", type=int, nargs="+", default=[64])
    parser.add_argument("--length", type=int, nargs="+", default=[0], help="rows a sequence; 0: as they came")
    parser.add_argument("--limit", type=int, default=262_144)
    parser.add_argument("--vocabulary", type=int, default=None, help="move each id to a place of its own in a larger vocabulary")
    parser.add_argument("--only-ours", action="store_true")
    options = parser.parse_args()
    for path in options.rows or [None]:
        for k in options.k:
            record, text, vocabulary, natural = load(path, k, options.limit, options.vocabulary) if path else synthetic(k)
            for length in options.length:
                lengths = [length] * (len(record) // length) if length else natural
                source, name = f"{path.stem if path else 'synthetic'}, vocabulary {vocabulary}", str(length or "natural")
                for line in measure(record, vocabulary, lengths, source, name, options.only_ours):
                    print(json.dumps(line), flush=True)
                if k == options.k[0]:
                    print(json.dumps(measure_draws(record, text, vocabulary, lengths, source, name)), flush=True)


if __name__ == "__main__":
    main()
