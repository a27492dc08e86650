"""The golden shard that the Rust writer made, read here and by hand."""

import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

import retort_data

GOLDEN = pathlib.Path(__file__).parents[2] / "crates/artifact/tests/golden/soft-targets-v1.parquet"


def by_hand(row, draws):
    """As docs/formats/soft-targets.md says it, one entry at a time."""
    at, positions = 0, []
    for p, size in enumerate(row["support_size"]):
        token, support = 0, {}
        for e in range(at, at + size):
            token = row["support_delta"][e] + (token if e > at else 0)
            q, n = row["logprob_q"][e], row["count"][e]
            below = 0 if q == 0 else (q - 0.5) / 16 if q <= 128 else 8 + (q - 128.5) / 4
            support[token] = (row["max_logprob"][p] - below, n, q)
        top = np.exp(row["max_logprob"][p])
        rest = sum(np.exp(logprob) for logprob, n, q in support.values() if n == 0 and q > 0)
        factor = min(max((1 - row["tail_mass"][p] - top) / rest, np.exp(-1 / 8)), np.exp(1 / 8)) if rest else 1
        positions.append({
            token: row["tail_mass"][p] * n / draws if n else np.exp(logprob) * (factor if q else 1)
            for token, (logprob, n, q) in support.items()
        })
        at += size
    return positions


def test_the_reader_agrees_with_the_format_page():
    rows = pq.read_table(GOLDEN).to_pylist()
    with retort_data.open(GOLDEN) as shard:
        sequences = list(shard)
        assert shard.rows == len(sequences) == len(rows) == 2
        assert (shard.vocab_size, shard.head, shard.draws) == (64, 4, 4)
    for sequence, row in zip(sequences, rows):
        assert (sequence.row_id, sequence.token_ids.tolist()) == (row["row_id"], row["token_ids"])
        expected = by_hand(row, 4)
        assert len(sequence.targets) == len(expected)
        for position, support in enumerate(expected):
            ids, mass = sequence.targets.at(position)
            assert ids.tolist() == list(support)
            np.testing.assert_allclose(mass, list(support.values()), rtol=1e-5)
    first = sequences[0].targets
    assert first.at(0)[0].tolist() == [3, 8, 9, 17, 40, 55]
    np.testing.assert_allclose(first.at(0)[1], [0.046003, 0.133113, 0.015879, 0.606531, 0.150837, 0.047637], atol=1e-6)
    dense = first.dense()
    assert dense.shape == (3, 64)
    np.testing.assert_allclose(dense.sum(1), 1, atol=1e-3)


def test_batches_are_padded_and_point_at_the_logits_before_each_target():
    (batch,) = retort_data.batches([GOLDEN], pad_id=7)
    assert batch["input_ids"][0].tolist() == [1, 40, 17, 9, 2]
    assert batch["labels"][0].tolist() == [-100, -100, 17, 9, 2]
    assert batch["positions"].tolist()[:3] == [[0, 1], [0, 2], [0, 3]]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()
    np.testing.assert_allclose(batch["support_mass"].sum(1), 1, atol=1e-3)
    assert batch["support_ids"].shape == batch["support_mass"].shape == (4, 6)
    halves = list(retort_data.batches([GOLDEN], rows=1))
    assert [half["row_ids"] for half in halves] == [["refund-1"], ["hello"]]


def test_a_damaged_file_is_named(tmp_path):
    data = bytearray(GOLDEN.read_bytes())
    damaged = tmp_path / "damaged.parquet"
    for at in range(4, len(data), 97):
        copy = bytearray(data)
        copy[at] ^= 0x20
        damaged.write_bytes(copy)
        try:
            with retort_data.open(damaged) as shard:
                list(shard)
        except retort_data.ShardError as error:
            assert str(damaged) in str(error)
    data[40] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(retort_data.ShardError, match="damaged"):
        retort_data.open(damaged)
    damaged.write_bytes(b"PAR1 is not enough")
    with pytest.raises(retort_data.ShardError, match="no Parquet file"):
        retort_data.open(damaged)
    with pytest.raises(FileNotFoundError):
        retort_data.open(tmp_path / "nothing.parquet")


def rewritten(tmp_path, change=lambda columns: None, metadata=lambda pairs: None):
    """The golden file with other values, without the hash of its content."""
    table = pq.read_table(GOLDEN)
    pairs = {key: value for key, value in table.schema.metadata.items() if key != b"retort.content_sha256"}
    metadata(pairs)
    columns = table.to_pydict()
    change(columns)
    path = tmp_path / "rewritten.parquet"
    pq.write_table(type(table).from_pydict(columns, schema=table.schema.with_metadata(pairs)), path)
    return path


def replace(name, row, at, value):
    def change(columns):
        columns[name][row][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (replace("support_delta", 0, 1, 0), "row 'refund-1', position 0: its ids do not rise"),
        (replace("support_delta", 0, 5, 40), "position 0: an id lies beyond the vocabulary"),
        (replace("logprob_q", 0, 3, 5), "position 0: it has not one most likely token"),
        (replace("count", 0, 2, 2), "position 0: its tail was not drawn 4 times"),
        (replace("max_logprob", 0, 1, float("nan")), "position 1: a number in it is not finite"),
        (replace("tail_mass", 0, 0, 0.4), "position 0: its masses do not sum to 1"),
        (replace("token_ids", 0, 0, 64), "row 'refund-1': a token lies beyond the vocabulary"),
        (lambda columns: columns["count"][0].pop(), "row 'refund-1': count has 13 values for 14 entries"),
        (lambda columns: columns["support_size"][0].append(0), "support_size has 4 values for 3 targets"),
        (replace("target_mask", 0, 0, True), "its first token is a target"),
    ],
)
def test_rows_that_make_no_sense_are_refused(tmp_path, change, why):
    with retort_data.open(rewritten(tmp_path, change)) as shard, pytest.raises(retort_data.ShardError) as error:
        list(shard)
    assert why in str(error.value)


def test_other_versions_and_other_files_are_refused_by_name(tmp_path):
    newer = rewritten(tmp_path, metadata=lambda pairs: pairs.update({b"retort.schema_version": b"2"}))
    with pytest.raises(retort_data.ShardError, match="schema version 2, this reader knows up to 1"):
        retort_data.open(newer)
    other = rewritten(tmp_path, metadata=dict.clear)
    with pytest.raises(retort_data.ShardError, match="none of retort's"):
        retort_data.open(other)


def test_teachers_do_not_mix(tmp_path):
    stranger = rewritten(tmp_path, metadata=lambda pairs: pairs.update({b"retort.teacher_sha256": b"f00d"}))
    with pytest.raises(ValueError, match="teacher_sha256 f00d"):
        list(retort_data.batches([GOLDEN, stranger]))
