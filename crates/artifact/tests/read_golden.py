#!/usr/bin/env python3
"""Reads the golden shard with pyarrow alone: nothing of retort is needed to use what it wrote.

usage: read_golden.py [FILE]
"""
import math, pathlib, sys
import pyarrow.parquet as pq

path = sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent / "golden/soft-targets-v1.parquet"
meta = {k.decode(): v.decode() for k, v in pq.read_metadata(path).metadata.items()}
draws = int(meta["retort.draws"])
table = []  # (row id, target token, its log-probability, {token: (mass, log-probability, is head)})
for row in pq.read_table(path).to_pylist():
    targets = [token for token, wanted in zip(row["token_ids"], row["target_mask"]) if wanted]
    at = 0
    for p, (label, size) in enumerate(zip(targets, row["support_size"])):
        token, support = 0, {}
        for e in range(at, at + size):
            token = row["support_delta"][e] + (token if e > at else 0)
            q, n = row["logprob_q"][e], row["count"][e]
            below = 0 if q == 0 else (q - 0.5) / 16 if q <= 128 else 8 + (q - 128.5) / 4
            logprob = row["max_logprob"][p] - below
            support[token] = (row["tail_mass"][p] * n / draws if n else math.exp(logprob), logprob, n == 0)
        top = math.exp(row["max_logprob"][p])
        rest = sum(mass for mass, _, head in support.values() if head) - top
        scale = (1 - row["tail_mass"][p] - top) / rest if rest else 1
        scale = min(max(scale, math.exp(-1 / 8)), math.exp(1 / 8))
        for token, (mass, logprob, head) in support.items():
            if head and logprob != row["max_logprob"][p]:
                support[token] = (mass * scale, logprob, head)
        table.append((row["row_id"], label, row["label_logprob"][p], support))
        at += size

if __name__ == "__main__":
    for row_id, label, logprob, support in table:
        print(f"{row_id}: token {label}, log-probability {logprob:.3f}")
        for token, (mass, logprob, head) in support.items():
            print(f"  {token:5} {'head' if head else 'tail'} mass {mass:.6f} log-probability {logprob:.4f}")
    assert meta["retort.schema_version"] == "1"
    for _, _, _, support in table:
        assert abs(sum(mass for mass, _, _ in support.values()) - 1) < 1e-3
        assert list(support) == sorted(support)
    if len(sys.argv) < 2:
        assert [label for _, label, _, _ in table] == [17, 9, 2, 63]
        first = table[0][3]
        assert list(first) == [3, 8, 9, 17, 40, 55]
        assert abs(first[17][0] - math.exp(-0.5)) < 1e-6 and abs(first[9][0] * 3 - first[55][0]) < 1e-6
        assert abs(first[40][1] - -1.9) <= 1 / 32
        print("the golden file reads as it should")
