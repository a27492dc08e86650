"""The golden exports that the Rust writers made of the golden shard, read with numpy and pyarrow alone."""

import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

import retort_data

GOLDEN = pathlib.Path(__file__).parents[2] / "crates/artifact/tests/golden"


@pytest.fixture
def sequences():
    with retort_data.open(GOLDEN / "soft-targets-v1.parquet") as shard:
        return list(shard)


def test_the_npz_holds_what_the_shard_says(sequences):
    with np.load(GOLDEN / "export.npz", allow_pickle=False) as npz:
        arrays = dict(npz)
    assert {name: (array.dtype.str, array.shape) for name, array in arrays.items()} == {
        "row_ids": ("<U8", (2,)),
        "rows": ("<u8", (2,)),
        "row_offsets": ("<i8", (3,)),
        "position_offsets": ("<i8", (3,)),
        "token_ids": ("<i8", (7,)),
        "target_mask": ("|b1", (7,)),
        "top_ids": ("<i8", (4,)),
        "label_logprobs": ("<f4", (4,)),
        "residuals": ("<f4", (4,)),
        "masses": ("<f4", (4, 64)),
    }
    assert arrays["row_ids"].tolist() == [sequence.row_id for sequence in sequences]
    assert arrays["rows"].tolist() == [12, 13]
    assert arrays["top_ids"].tolist() == [17, 9, 2, 63]
    np.testing.assert_allclose(arrays["label_logprobs"], [-0.5, -0.9, -0.002, -1e-5])
    assert not arrays["residuals"].any()
    for r, sequence in enumerate(sequences):
        tokens = slice(*arrays["row_offsets"][r : r + 2])
        positions = slice(*arrays["position_offsets"][r : r + 2])
        assert arrays["token_ids"][tokens].tolist() == sequence.token_ids.tolist()
        assert arrays["target_mask"][tokens].tolist() == sequence.target_mask.tolist()
        np.testing.assert_allclose(arrays["masses"][positions], sequence.targets.dense(), rtol=1e-6)


def test_the_top_k_lists_stand_at_the_token_before_their_target(sequences):
    file = pq.ParquetFile(GOLDEN / "export-top-k.parquet")
    metadata = file.metadata.metadata
    assert (metadata[b"retort.export"], metadata[b"retort.k"], metadata[b"retort.vocab_size"]) == (b"top-k", b"3", b"64")
    first, second = file.read().to_pylist()
    assert list(first) == ["row_id", "row", "tags", "input_ids", "labels", "top_indices", "top_values"]
    assert (first["row_id"], first["row"], first["tags"]) == ("refund-1", 12, ["billing", "refund"])
    assert first["input_ids"] == [1, 40, 17, 9, 2]
    assert first["labels"] == [-100, -100, 17, 9, 2]
    assert first["top_indices"] == [[], [17, 40, 8], [9, 17, 2], [2, 9, 17], []]
    assert (second["labels"], second["top_indices"]) == ([-100, 63], [[63], []])
    targets = sequences[0].targets
    for p in range(3):
        # In the head the log-probability is the logarithm of the mass; 9 and 55, drawn, are left out.
        mass = dict(zip(*(array.tolist() for array in targets.at(p))))
        expected = [np.log(mass[token]) for token in first["top_indices"][p + 1]]
        np.testing.assert_allclose(first["top_values"][p + 1], expected, atol=1e-5)
