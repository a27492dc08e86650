"""Version 1: the golden shard that the Rust writer made, read here and one entry at a time."""

import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import sample

import retort_data

GOLDEN = pathlib.Path(__file__).parents[2] / "crates/artifact/tests/golden/soft-targets-v1.parquet"


def test_the_reader_agrees_with_the_format_page():
    rows, expected = pq.read_table(GOLDEN).to_pylist(), sample.read(GOLDEN)
    with retort_data.open(GOLDEN) as shard:
        sequences = list(shard)
        assert shard.rows == len(sequences) == len(rows) == 2
        assert (shard.format.vocab_size, shard.format.head, shard.format.draws) == (64, 4, 4)
    for sequence, row, supports in zip(sequences, rows, expected):
        assert (sequence.row_id, sequence.token_ids.tolist()) == (row["row_id"], row["token_ids"])
        targets = sequence.targets
        assert len(targets) == len(supports)
        for p, support in enumerate(supports):
            entries = slice(targets.offsets[p], targets.offsets[p + 1])
            mass, logprobs, is_head = zip(*support.values())
            assert targets.ids[entries].tolist() == list(support)
            assert targets.is_head[entries].tolist() == list(is_head)
            np.testing.assert_allclose(targets.mass[entries], mass, rtol=1e-5)
            np.testing.assert_allclose(targets.logprobs[entries], logprobs, atol=1e-5)
    first = sequences[0].targets
    assert first.at(0)[0].tolist() == [3, 8, 9, 17, 40, 55]
    np.testing.assert_allclose(first.at(0)[1], [0.046003, 0.133113, 0.015879, 0.606531, 0.150837, 0.047637], atol=1e-6)
    np.testing.assert_allclose(first.logprobs[:6], [-3.0790545, -2.0165545, -5.53125, -0.5, -1.8915545, -5.03125], atol=2e-6)
    assert (first.residual == 0).all() and first.log_sum_exps.shape == (3, 0)
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
        (replace("support_delta", 0, 1, 0), "row 'refund-1', position 0: token 3 is in its support twice"),
        (replace("support_delta", 0, 5, 40), "position 0: token 80 is outside the vocabulary of 64"),
        (replace("logprob_q", 0, 3, 5), "position 0: 0 of its tokens are marked as the most likely, not one"),
        (replace("count", 0, 2, 2), "position 0: its tail has 5 draws and mass 0.0635"),
        (replace("max_logprob", 0, 1, float("nan")), "position 1: its largest log-probability is nan"),
        (replace("tail_mass", 0, 0, 0.4), "position 0: its masses sum to 1.2"),
        (replace("token_ids", 0, 0, 64), "row 'refund-1': a token lies outside the vocabulary of 64"),
        (lambda columns: columns["count"][0].pop(), "row 'refund-1': count has 13 values, not 14"),
        (lambda columns: columns["support_size"][0].append(0), "support_size has 4 values, not 3"),
        (replace("target_mask", 0, 0, True), "its first token is a target"),
    ],
)
def test_rows_that_make_no_sense_are_refused(tmp_path, change, why):
    with retort_data.open(rewritten(tmp_path, change)) as shard, pytest.raises(retort_data.ShardError) as error:
        list(shard)
    assert why in str(error.value)


def test_other_versions_and_other_files_are_refused_by_name(tmp_path):
    newer = rewritten(tmp_path, metadata=lambda pairs: pairs.update({b"retort.schema_version": b"3"}))
    with pytest.raises(retort_data.ShardError, match="schema version '3', this reader knows up to 2"):
        retort_data.open(newer)
    other = rewritten(tmp_path, metadata=dict.clear)
    with pytest.raises(retort_data.ShardError, match="none of retort's"):
        retort_data.open(other)


def test_teachers_do_not_mix(tmp_path):
    stranger = rewritten(tmp_path, metadata=lambda pairs: pairs.update({b"retort.teacher_sha256": b"f00d"}))
    with pytest.raises(ValueError, match="teacher_sha256 f00d"):
        list(retort_data.batches([GOLDEN, stranger]))
