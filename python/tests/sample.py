"""Writes small shards of version 2 from plain dicts, and reads any shard back one entry at a time."""

import math

import pyarrow as pa
import pyarrow.parquet as pq

SAME = dict(
    schema_version="2", job="j", shard="3", epoch="2", split="train", engine="native", engine_version="0.1.0",
    dtype="f32", teacher_sha256="aa", tokenizer_sha256="bb", chat_template_sha256="cc", capture_temperature="1",
    seed="7", prompt_set_sha256="dd", mode="generate", sampling_json="{}", temperatures="", tail_logprobs="stored",
    work_sha256="ee", quantiser="u8-step-1/16-to-8-1/8-to-16-1/4-nat-below-max",
)  # fmt: skip


def listed(kind):
    return pa.list_(pa.field("element", kind, nullable=False))


TYPES = dict(
    row_id=pa.string(), row=pa.uint64(), tags=listed(pa.string()), token_ids=listed(pa.uint32()),
    target_mask=listed(pa.bool_()), finish_reason=pa.string(), id_table=listed(pa.uint32()),
    head_size=listed(pa.uint32()), head_delta=listed(pa.uint32()), head_q=listed(pa.uint8()),
    head_logprob=listed(pa.float32()), tail_size=listed(pa.uint32()), tail_delta=listed(pa.uint32()),
    tail_count=listed(pa.uint8()), tail_q=listed(pa.uint8()), max_logprob=listed(pa.float32()),
    tail_mass=listed(pa.float32()), label_logprob=listed(pa.float32()), log_sum_exp=listed(pa.float32()),
)  # fmt: skip
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in TYPES.items()])


def below_max(q):
    """Nats that a byte of version 2 says."""
    if q == 0:
        return 0.0
    if q <= 128:
        return (q - 0.5) / 16
    return 8 + (q - 128.5) / 8 if q <= 192 else 16 + (q - 192.5) / 4


def quantise(below):
    """The byte, not 0, whose interval `below` lies in."""
    if below < 8:
        return 1 + int(below * 16)
    return 129 + int((below - 8) * 8) if below < 16 else min(193 + int((below - 16) * 4), 255)


def write(path, rows, vocab_size, groups=None, tables=None, **pairs):
    """A shard of `rows`: lists of positions, each a dict of `head` {id: logprob}, `tail` {id: (count,
    logprob)} and, if wanted, `tail_mass` and `log_sum_exps`. A row has a token before its targets. `groups`
    says how many rows each row group has, `tables` its id table."""
    pairs = SAME | dict(vocab_size=str(vocab_size)) | pairs
    metadata = {f"retort.{key}": value for key, value in pairs.items()}
    groups = groups or [len(rows)]
    tables = tables or [[]] * len(groups)
    done = 0
    with pq.ParquetWriter(path, SCHEMA.with_metadata(metadata)) as writer:
        for count, table in zip(groups, tables):
            columns = {name: [] for name in TYPES}
            for r in range(done, done + count):
                add(columns, r, rows[r], pairs, table, table if r == done else [])
            writer.write_table(pa.table(columns, schema=SCHEMA))
            done += count


def add(columns, r, positions, pairs, table, carried):
    row = {name: [] for name in TYPES} | dict(row_id=f"row-{r}", row=r, finish_reason="stop", id_table=carried)
    row["token_ids"] = [0] * (len(positions) + 1)
    row["target_mask"] = [False] + [True] * len(positions)

    def append(part, entries):
        ranked = sorted((table.index(id) if id in table else len(table) + id, id) for id in entries)
        row[f"{part}_size"].append(len(ranked))
        row[f"{part}_delta"] += [rank - before for (rank, _), (before, _) in zip(ranked, [(0, 0), *ranked])]
        return [id for _, id in ranked]

    for position in positions:
        head, tail = position["head"], position.get("tail", {})
        logprobs = list(head.values()) or [logprob for _, logprob in tail.values()]
        top = min(head, key=lambda id: (-head[id], id), default=None)
        for id in append("head", head):
            if pairs["quantiser"] == "f32":
                row["head_logprob"].append(head[id])
            else:
                row["head_q"].append(0 if id == top else quantise(max(logprobs) - head[id]))
        for id in append("tail", tail):
            if pairs["codec"] in ("head_draws", "random"):
                row["tail_count"].append(tail[id][0])
            if pairs["tail_logprobs"] == "stored":
                row["tail_q"].append(quantise(max(logprobs) - tail[id][1]))
        row["max_logprob"].append(max(logprobs))
        row["tail_mass"].append(position.get("tail_mass", max(0, 1 - sum(map(math.exp, head.values())))))
        row["label_logprob"].append(-1.0)
        row["log_sum_exp"] += position.get("log_sum_exps", [])
    for name, values in columns.items():
        values.append(row[name])


def read(path):
    """Rows of positions, each {id: (mass, logprob, is_head)} by rising id, as the format says them."""
    file = pq.ParquetFile(path)
    pairs = {key.decode()[7:]: value.decode() for key, value in file.metadata.metadata.items()}
    support_of = first_version if pairs["schema_version"] == "1" else second_version
    rows = []
    for group in range(file.num_row_groups):
        columns = file.read_row_group(group).to_pylist()
        for row in columns:
            supports = support_of(row, pairs, columns[0].get("id_table"))
            rows.append([dict(sorted(support.items())) for support in supports])
    return rows


def first_version(row, pairs, _):
    at = 0
    for p, size in enumerate(row["support_size"]):
        token, entries = 0, []
        for e in range(at, at + size):
            token += row["support_delta"][e]
            q, n = row["logprob_q"][e], row["count"][e]
            below = 0 if q == 0 else (q - 0.5) / 16 if q <= 128 else 8 + (q - 128.5) / 4
            entries.append((token, row["max_logprob"][p] - below, n, q))
        top = math.exp(row["max_logprob"][p])
        rest = sum(math.exp(logprob) for _, logprob, n, q in entries if n == 0 and q > 0)
        factor = min(max((1 - row["tail_mass"][p] - top) / rest, math.exp(-1 / 8)), math.exp(1 / 8)) if rest else 1
        support = {}
        for token, logprob, n, q in entries:
            mass = row["tail_mass"][p] * n / int(pairs["draws"]) if n else math.exp(logprob) * (factor if q else 1)
            support[token] = (mass, logprob if n else math.log(mass), n == 0)
        yield support
        at += size


def second_version(row, pairs, table):
    head_at = tail_at = 0

    def tokens(deltas):
        rank = 0
        for delta in deltas:
            rank += delta
            yield table[rank] if rank < len(table) else rank - len(table)

    for p, (heads, tails) in enumerate(zip(row["head_size"], row["tail_size"])):
        head, tail = slice(head_at, head_at + heads), slice(tail_at, tail_at + tails)
        head_at, tail_at = head.stop, tail.stop
        top, tail_mass, support = row["max_logprob"][p], row["tail_mass"][p], {}
        logprobs = row["head_logprob"][head] or [top - below_max(q) for q in row["head_q"][head]]
        entries = dict(zip(tokens(row["head_delta"][head]), logprobs))
        if entries:
            # Of equals the smallest id; a byte of 1 already lies below a byte of 0.
            best = min(entries, key=lambda id: (-entries[id], id))
            best_mass = math.exp(entries[best])
            others = [math.exp(logprob) for id, logprob in entries.items() if id != best]
            scale = 1
            if others:
                scale = (1 - tail_mass - best_mass) / sum(others)
                scale = min(scale, math.exp(1 / 8), (1 - 1e-6) * best_mass / max(others))
                scale = max(scale, math.exp(-1 / 8))
            every = (1 - tail_mass) / (best_mass + scale * sum(others))
            for id, logprob in entries.items():
                mass = math.exp(logprob) * every * (1 if id == best else scale)
                support[id] = (mass, math.log(mass), True)
        counts = row["tail_count"][tail] or [1] * tails
        weight = max(tail_mass, float(pairs["threshold"])) if pairs["codec"] == "threshold" else tail_mass
        for e, id in enumerate(tokens(row["tail_delta"][tail])):
            stored = pairs["tail_logprobs"] == "stored"
            logprob = top - below_max(row["tail_q"][tail][e]) if stored else float(pairs["tail_logprobs"])
            support[id] = (weight * counts[e] / sum(counts), logprob, False)
        yield support
