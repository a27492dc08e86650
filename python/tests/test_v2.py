"""Version 2: the golden files, every codec against a reader of one entry at a time, and what is refused."""

import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import sample

import retort_data

GOLDEN = pathlib.Path(__file__).parents[2] / "crates/artifact/tests/golden"
VOCABULARY = 300


def golden(name):
    with retort_data.open(GOLDEN / f"soft-targets-v2-{name}.parquet") as shard:
        return shard.format, list(shard)


@pytest.mark.parametrize("name", ["head-draws", "threshold", "top-k-tail"])
def test_the_golden_files_read_as_ever(name):
    _, (first, second) = golden(name)
    assert (first.row_id, first.row, first.finish_reason) == ("refund-1", 12, "stop")
    assert (first.tags, first.token_ids.tolist()) == (["billing", "refund"], [1, 40, 17, 9, 2])
    assert (second.row_id, second.row, second.tags, second.finish_reason) == ("hello", 13, [], "length")
    np.testing.assert_allclose(first.targets.label_logprobs, [-0.5, -0.8984375, -0.001998901], atol=2e-6)
    ids, mass = second.targets.at(0)
    assert ids.tolist() == [63]
    np.testing.assert_allclose(mass, [0.99999], atol=2e-6)
    assert [first.targets.at(p)[0][first.targets.at(p)[1].argmax()] for p in range(3)] == [17, 9, 2]


def test_head_draws_with_temperatures():
    format, (first, _) = golden("head-draws")
    assert (format.codec, format.head, format.draws, format.temperatures) == ("head_draws", 4, 4, (0.5, 2.0))
    targets = first.targets
    assert targets.ids.tolist() == [3, 8, 9, 17, 40, 55, 2, 9, 17, 33, 60, 2, 9, 17]
    assert np.flatnonzero(~targets.is_head).tolist() == [2, 5, 9]
    np.testing.assert_allclose(targets.log_sum_exps, [[-1, 1], [-1.5, 1.5], [-0.004, 0.2]], atol=2e-6)
    sharp, soft = targets.at_temperature(0.5), targets.at_temperature(2)
    np.testing.assert_allclose(sharp.mass[3], 1, atol=2e-6)
    np.testing.assert_allclose(soft.mass[3], np.exp(-0.5 / 2 - 1), rtol=1e-6)
    # Token 55 was drawn three times of four.
    drawn = targets.logprobs[5].astype(float)
    np.testing.assert_allclose(soft.mass[5], 0.0634765625 * 3 / 4 / np.exp(drawn) * np.exp(drawn / 2 - 1), rtol=1e-6)
    np.testing.assert_allclose(soft.label_logprobs[0], -0.5 / 2 - 1)
    assert targets.at_temperature(1) is targets
    with pytest.raises(ValueError, match="for the temperatures 1, 0.5, 2, not 3"):
        targets.at_temperature(3)
    with pytest.raises(ValueError, match="for the temperatures 1, not 0.5"):
        soft.at_temperature(0.5)


def test_threshold():
    format, (first, _) = golden("threshold")
    assert (format.codec, format.threshold, format.tail_logprob) == ("threshold", 0.25, -5)
    assert first.targets.offsets.tolist() == [0, 2, 4, 5]
    assert first.targets.ids.tolist() == [17, 55, 9, 17, 2]
    expected = [0.6074219, 0.3925781, 0.4072054, 0.4062711, 0.9980011]
    np.testing.assert_allclose(first.targets.mass, expected, atol=2e-6)
    assert first.targets.logprobs[1] == -5


def test_top_k_tail_keeps_the_rest_as_a_residual():
    format, (first, _) = golden("top-k-tail")
    assert (format.codec, format.quantiser) == ("top_k_tail", "f32")
    assert first.targets.ids.tolist() == [3, 8, 17, 40, 2, 9, 17, 60, 2, 9, 17]
    np.testing.assert_allclose(first.targets.residual, [0.06347656, 0.04638672, 0.000158787], atol=2e-6)
    whole = first.targets.dense().sum(1) + first.targets.residual
    np.testing.assert_allclose(whole, 1, atol=1e-6)


# Each codec's metadata and, of a position, how many tokens its head has and how many are drawn.
CODECS = {
    "full": (dict(codec="full"), VOCABULARY, 0),
    "top_k": (dict(codec="top_k", head="20"), 20, 0),
    "top_k_tail": (dict(codec="top_k_tail", head="20"), 20, 0),
    "head_draws": (dict(codec="head_draws", head="8", draws="12"), 8, 12),
    "threshold": (dict(codec="threshold", threshold="0.05"), 20, 20),
    "random": (dict(codec="random", draws="30"), 0, 30),
}


def positions(rng, pairs, heads, draws, temperatures, many):
    """Random distributions as a teacher's capture would hand them over; their truth [many, V]."""
    truth = rng.dirichlet(np.full(VOCABULARY, 0.05), many) * 0.999 + 0.001 / VOCABULARY
    found = []
    for p in truth:
        kept = np.argsort(-p)[:heads]
        if pairs["codec"] == "threshold":
            kept = kept[p[kept] >= 0.05]
            if not len(kept):
                kept = np.argsort(-p)[:1]
        rest = p.copy()
        rest[kept] = 0
        mass, drawn = rest.sum(), []
        if draws and mass > 1e-3:
            drawn = rng.choice(VOCABULARY, draws, p=rest / mass)
            if pairs["codec"] == "threshold":
                drawn = np.unique(drawn)
        tail = {int(id): (int((drawn == id).sum()), float(np.log(p[id]))) for id in np.unique(drawn)}
        log_sum_exps = [float(np.log((p ** (1 / t)).sum())) for t in temperatures]
        found.append(dict(
            head={int(id): float(np.log(p[id])) for id in kept}, tail=tail, tail_mass=mass, log_sum_exps=log_sum_exps
        ))
    return found, truth


@pytest.mark.parametrize("quantiser", ["u8", "f32"])
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_reads_as_one_entry_at_a_time(tmp_path, codec, quantiser):
    rng = np.random.default_rng(17)
    pairs, heads, draws = CODECS[codec]
    pairs = dict(pairs, temperatures="0.5,3")
    if quantiser == "f32":
        pairs["quantiser"] = "f32"
    found, truth = positions(rng, pairs, heads, draws, (0.5, 3), 70 * 3)
    # More rows in a row group than are decoded at once, and a table that differs between them.
    rows = [found[at : at + 3] for at in range(0, len(found), 3)]
    rows[1:1] = [[]]
    tables = [rng.permutation(VOCABULARY)[:90].tolist(), rng.permutation(VOCABULARY)[:5].tolist()]
    path = tmp_path / "shard.parquet"
    sample.write(path, rows, VOCABULARY, groups=[67, 4], tables=tables, **pairs)

    expected = sample.read(path)
    with retort_data.open(path) as shard:
        assert (shard.format.codec, shard.format.quantiser) == (codec, quantiser)
        sequences = list(shard)
    assert [sequence.row_id for sequence in sequences] == [f"row-{r}" for r in range(71)]
    at = 0
    for sequence, supports in zip(sequences, expected):
        targets = sequence.targets
        assert len(targets) == len(supports) == len(rows[sequence.row])
        for p, support in enumerate(supports):
            entries = slice(targets.offsets[p], targets.offsets[p + 1])
            mass, logprobs, is_head = zip(*support.values())
            assert targets.ids[entries].tolist() == list(support)
            assert targets.is_head[entries].tolist() == list(is_head)
            np.testing.assert_allclose(targets.mass[entries], mass, rtol=1e-6)
            np.testing.assert_allclose(targets.logprobs[entries], logprobs, atol=1e-5)
            position = rows[sequence.row][p]
            assert targets.residual[p] == (np.float32(position["tail_mass"]) if codec == "top_k_tail" else 0)
            if codec not in ("top_k", "threshold") and (position["tail"] or heads == VOCABULARY):
                np.testing.assert_allclose(targets.mass[entries].sum(), 1, atol=1e-5)
            if codec == "threshold" and position["tail"]:
                tail = targets.mass[entries][~targets.is_head[entries]].sum()
                np.testing.assert_allclose(tail, max(position["tail_mass"], 0.05), rtol=1e-5)
            # And it is what was written, but for rounding to a byte.
            near = targets.is_head[entries] & (truth[at][targets.ids[entries]] > truth[at].max() * np.exp(-8))
            ratio = targets.mass[entries][near] / truth[at][targets.ids[entries][near]]
            assert (np.abs(np.log(ratio)) < (1 / 32 + 1 / 8 if quantiser == "u8" else 1e-3)).all()
            at += 1
        for temperature in (0.5, 3):
            tempered = targets.at_temperature(temperature)
            if codec == "full" and quantiser == "f32" and len(targets):
                of = truth[at - len(targets) : at] ** (1 / temperature)
                np.testing.assert_allclose(tempered.dense(), of / of.sum(1, keepdims=True), rtol=1e-2, atol=1e-6)
            if codec == "top_k_tail":
                np.testing.assert_allclose(tempered.dense().sum(1) + tempered.residual, 1, atol=0.02)
    assert at == len(truth)


def only(path, position, vocab_size=10, **pairs):
    """The targets of a shard of one position."""
    sample.write(path, [[position]], vocab_size, **pairs)
    with retort_data.open(path) as shard:
        (sequence,) = shard
    return sequence.targets


def test_a_sample_of_a_tail_lighter_than_the_threshold_weighs_the_threshold(tmp_path):
    position = dict(head={1: np.log(0.97)}, tail={5: (1, np.log(0.03))})
    targets = only(tmp_path / "shard.parquet", position, codec="threshold", threshold="0.1")
    np.testing.assert_allclose(targets.mass, [0.97, 0.1], rtol=1e-5)


@pytest.mark.parametrize("quantiser", [{}, dict(quantiser="f32")])
def test_no_factor_lifts_another_token_to_the_first_place(tmp_path, quantiser):
    position = dict(head={1: np.log(0.45), 2: np.log(0.45)}, tail_mass=0.09)
    targets = only(tmp_path / "shard.parquet", position, codec="top_k_tail", head="2", **quantiser)
    np.testing.assert_allclose(targets.mass, 0.455, rtol=2e-6)
    assert targets.mass[0] > targets.mass[1]


def test_the_factor_stays_within_what_rounding_can_explain(tmp_path):
    # 0.06 is wanted of a rest of 0.05, which can have been up to exp(1/8) more; all share what is left.
    position = dict(head={1: np.log(0.9), 2: np.log(0.05)}, tail_mass=0.04)
    targets = only(tmp_path / "shard.parquet", position, codec="top_k_tail", head="2", quantiser="f32")
    rest = 0.05 * np.exp(1 / 8)
    np.testing.assert_allclose(targets.mass, np.array([0.9, rest]) * 0.96 / (0.9 + rest), rtol=1e-6)


def test_a_table_amid_a_row_group_is_refused_wherever_it_stands(tmp_path):
    path = tmp_path / "shard.parquet"
    sample.write(path, [[]] * 200, 10, codec="full", groups=[150, 50], tables=[[3], [4]])
    whole = pq.read_table(path)
    for row in (1, 64, 199):
        columns = whole.to_pydict()
        columns["id_table"][row] = [5]
        changed = type(whole).from_pydict(columns, schema=whole.schema)
        with pq.ParquetWriter(path, whole.schema) as writer:
            writer.write_table(changed[:150])
            writer.write_table(changed[150:])
        with retort_data.open(path) as shard, pytest.raises(retort_data.ShardError, match=f"row 'row-{row}': it has an id"):
            list(shard)


def test_batches_carry_the_residual_and_take_a_temperature(tmp_path):
    (bucket,) = retort_data.batches([GOLDEN / "soft-targets-v2-top-k-tail.parquet"])
    assert bucket["residual_mass"].dtype == np.float32
    np.testing.assert_allclose(bucket["support_mass"].sum(1) + bucket["residual_mass"], 1, atol=1e-6)
    assert bucket["residual_mass"].shape == (4,) and (bucket["residual_mass"] > 0).all()

    path = GOLDEN / "soft-targets-v2-head-draws.parquet"
    (plain,), (soft,) = retort_data.batches([path]), retort_data.batches([path], temperature=2)
    assert (plain["residual_mass"] == 0).all()
    np.testing.assert_allclose(soft["support_mass"][0, 3], np.exp(-0.5 / 2 - 1), rtol=1e-6)
    with pytest.raises(ValueError, match="has no soft targets at temperature 3"):
        next(retort_data.batches([path], temperature=3))


def test_splits_mix_only_where_it_is_said(tmp_path):
    row = [{"head": {1: np.log(0.75), 2: np.log(0.25)}, "tail": {}}]
    paths = [tmp_path / "1.parquet", tmp_path / "2.parquet"]
    for path, split in zip(paths, ("train", "held_out")):
        sample.write(path, [row], 64, codec="top_k", head="2", split=split)
    with pytest.raises(ValueError, match="is of the split held_out, .*1.parquet of train: say which with split="):
        list(retort_data.batches(paths))
    for split, expected in (("train", 1), ("held_out", 1), ("all", 2)):
        (batch,) = retort_data.batches(paths, split=split)
        assert len(batch["row_ids"]) == expected
    with pytest.raises(ValueError, match="it must be train, held_out or all"):
        list(retort_data.batches(paths, split="test"))


def test_both_versions_of_one_teacher_mix():
    paths = [GOLDEN / f"soft-targets-{name}.parquet" for name in ("v1", "v2-threshold", "v2-top-k-tail")]
    (batch,) = retort_data.batches(paths)
    assert batch["row_ids"] == ["refund-1", "hello"] * 3
    assert batch["support_ids"].shape == (12, 6)


@pytest.mark.parametrize("name", ["head-draws", "threshold", "top-k-tail"])
def test_damage_is_told_from_the_hash_of_pages_and_header(tmp_path, name):
    data = (GOLDEN / f"soft-targets-v2-{name}.parquet").read_bytes()
    damaged = tmp_path / "damaged.parquet"
    for at in range(4, len(data), 61):
        damaged.write_bytes(data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :])
        for check_content in (True, False):
            try:
                with retort_data.open(damaged, check_content) as shard:
                    list(shard)
            except retort_data.ShardError as error:
                assert str(damaged) in str(error)
    # In a page, in a key of every version and in one of version 2, and where only the epoch differs.
    for before, after, refused in (
        (data[40:44], bytes([data[40] ^ 1]) + data[41:44], True),
        (b"generate", b"generatf", True),
        (b"e" * 64, b"f" + b"e" * 63, True),
        (b"retort.epoch\x18\x012", b"retort.epoch\x18\x013", False),
    ):
        assert before in data
        damaged.write_bytes(data.replace(before, after, 1))
        if refused:
            with pytest.raises(retort_data.ShardError, match="damaged"):
                retort_data.open(damaged)
        else:
            with retort_data.open(damaged) as shard:
                assert shard.header["retort.epoch"] == "3"


def rewritten(tmp_path, name, change=lambda columns: None, **pairs):
    """A golden file with other values, without the hash of its content."""
    table = pq.read_table(GOLDEN / f"soft-targets-v2-{name}.parquet")
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"retort.content_sha256"}
    metadata |= {f"retort.{key}".encode(): value.encode() for key, value in pairs.items()}
    columns = table.to_pydict()
    change(columns)
    path = tmp_path / "rewritten.parquet"
    pq.write_table(type(table).from_pydict(columns, schema=table.schema.with_metadata(metadata)), path)
    return path


def replace(name, row, at, value):
    def change(columns):
        columns[name][row][at] = value

    return change


def table(row, ids):
    return lambda columns: columns["id_table"].__setitem__(row, ids)


FIRST = "row 'refund-1', position 0: "


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("head-draws", table(0, [9, 64]), "its id table has token 64, outside the vocabulary of 64"),
        ("head-draws", table(0, [9, 17, 9]), "its id table has token 9 twice"),
        ("head-draws", table(1, [9]), "row 'hello': it has an id table, but is not the first of its row group"),
        ("head-draws", replace("head_delta", 0, 3, 56), FIRST + "rank 66 is outside the vocabulary of 64"),
        ("head-draws", replace("head_delta", 0, 1, 0), FIRST + "token 17 is in its support twice"),
        ("head-draws", replace("tail_delta", 0, 0, 1), FIRST + "token 17 is in its support twice"),
        ("head-draws", replace("head_q", 0, 0, 5), FIRST + "0 of its tokens are marked as the most likely, not one"),
        ("head-draws", replace("head_q", 0, 5, 0), "position 1: 2 of its tokens are marked as the most likely, not one"),
        ("head-draws", replace("tail_count", 0, 0, 0), FIRST + "a tail entry was drawn 0 times"),
        ("head-draws", replace("tail_count", 0, 0, 2), FIRST + "its tail has 5 draws and mass 0.0634766, which head_draws"),
        ("head-draws", replace("tail_mass", 0, 2, 0.5), "position 2: its head's masses sum to 0.999"),
        ("head-draws", replace("tail_mass", 0, 2, -0.01), "position 2: its tail has mass -0.01"),
        ("head-draws", replace("tail_mass", 0, 2, 1.5), "position 2: its tail has mass 1.5"),
        ("head-draws", replace("tail_mass", 1, 0, 0.002), "row 'hello', position 0: its tail has 0 draws"),
        ("head-draws", replace("max_logprob", 1, 0, float("nan")), "row 'hello', position 0: its largest log-probability is nan"),
        ("head-draws", replace("max_logprob", 0, 1, -5.0), "position 1: its largest log-probability is -5 with a vocabulary"),
        ("head-draws", replace("label_logprob", 0, 1, 0.1), "position 1: its label's log-probability is 0.1"),
        ("head-draws", replace("log_sum_exp", 0, 3, float("inf")), "position 1: its log-sum-exps are [-1.5, inf]"),
        ("head-draws", replace("log_sum_exp", 0, 2, -4.3), "position 1: its log-sum-exps are [-4.3"),
        ("head-draws", replace("log_sum_exp", 0, 2, 0.1), "position 1: its log-sum-exps are [0.1"),
        ("head-draws", replace("log_sum_exp", 0, 5, 2.2), "position 2: its log-sum-exps are [-0.004"),
        ("head-draws", replace("log_sum_exp", 0, 5, float("nan")), "position 2: its log-sum-exps are [-0.004"),
        ("head-draws", lambda columns: columns["log_sum_exp"][0].pop(), "row 'refund-1': log_sum_exp has 5 values, not 6"),
        ("head-draws", lambda columns: columns["tail_q"][0].pop(), "row 'refund-1': tail_q has 2 values, not 3"),
        ("head-draws", lambda columns: columns["tail_count"][0].clear(), "row 'refund-1': tail_count has 0 values, not 3"),
        ("head-draws", replace("head_logprob", 1, slice(0, 0), [-1.0]), "row 'hello': head_logprob has 1 values, not 0"),
        ("head-draws", replace("head_size", 0, 2, 4_000_000_000), "row 'refund-1': head_delta has 11 values, not 4000000008"),
        ("head-draws", replace("target_mask", 0, 0, True), "row 'refund-1': its first token is a target"),
        ("head-draws", replace("token_ids", 1, 0, 64), "row 'hello': a token lies outside the vocabulary of 64"),
        ("head-draws", lambda columns: columns["target_mask"][1].pop(), "row 'hello': target_mask has 1 values, not 2"),
        ("threshold", replace("tail_mass", 0, 1, 0.3), "position 1: its head's masses sum to"),
        ("top-k-tail", replace("head_logprob", 0, 1, 0.01), FIRST + "token 3 has log-probability 0.01"),
        ("top-k-tail", replace("head_logprob", 0, 1, float("-inf")), FIRST + "token 3 has log-probability -inf"),
        ("top-k-tail", replace("head_logprob", 1, 0, -800.0), "row 'hello', position 0: its likeliest token has log-pro"),
        ("top-k-tail", replace("max_logprob", 0, 0, -0.6), FIRST + "its likeliest token has log-probability -0.5, its"),
    ],
)  # fmt: skip
def test_rows_that_make_no_sense_are_refused(tmp_path, name, change, why):
    path = rewritten(tmp_path, name, change)
    with retort_data.open(path) as shard, pytest.raises(retort_data.ShardError) as error:
        list(shard)
    assert str(error.value).startswith(f"{path}: ") and why in str(error.value)


def test_heads_and_tails_that_a_codec_cannot_have_are_refused(tmp_path):
    path = tmp_path / "shard.parquet"
    pair, rest = {1: np.log(0.5), 2: np.log(0.3)}, {5: (1, np.log(0.2))}
    for pairs, position, why in (
        (dict(codec="top_k", head="1"), dict(head=pair), "its head has 2 entries, the codec top_k has 1 to 1"),
        (dict(codec="top_k", head="2"), dict(head=pair, tail=rest), "its tail has 1 draws and mass 0.2"),
        (dict(codec="random", draws="1"), dict(head=pair, tail=rest), "its head has 2 entries, the codec random has"),
        (dict(codec="random", draws="2"), dict(head={}, tail=rest), "its tail has 1 draws and mass 1,"),
        (dict(codec="threshold", threshold="0.1"), dict(head=pair), "its tail has 0 draws and mass 0.2"),
    ):
        sound = [] if pairs["codec"] == "random" else [dict(head={7: 0.0}, tail_mass=0)]
        sample.write(path, [[], [*sound, position]], 10, **pairs)
        with retort_data.open(path) as shard, pytest.raises(retort_data.ShardError) as error:
            list(shard)
        assert f"row 'row-1', position {len(sound)}: {why}" in str(error.value)


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        (dict(schema_version="3"), "schema version '3', this reader knows up to 2: upgrade retort-data"),
        (dict(schema_version="9" * 5000), f"schema version '{'9' * 80}', this reader knows up to 2"),
        (dict(schema_version="2\nerror: x"), r"retort.schema_version is '2\nerror: x': it must be a whole number"),
        (dict(schema_version="+2"), "retort.schema_version is '+2': it must be a whole number"),
        (dict(vocab_size="+64"), "retort.vocab_size is '+64': it must be a whole number"),
        (dict(schema_version="0"), "retort.schema_version is '0'"),
        (dict(codec="nucleus"), "retort.codec is 'nucleus': not one of full, top_k"),
        (dict(codec="threshold"), "its metadata lacks retort.threshold"),
        (dict(quantiser="u4"), "retort.quantiser is 'u4': not known in version 2"),
        (dict(capture_temperature="0.7"), "retort.capture_temperature is '0.7': only 1 is stored"),
        (dict(head="0"), "retort.head is '0': it must be a whole number from 1 to 1024"),
        (dict(draws="256"), "retort.draws is '256'"),
        (dict(vocab_size="many"), "retort.vocab_size is 'many'"),
        (dict(temperatures="2,0.5"), "retort.temperatures is '2,0.5': at most 8, rising"),
        (dict(temperatures="0.5,1"), "without 1"),
        (dict(temperatures="warm"), "retort.temperatures is 'warm': it holds no number"),
        (dict(tail_logprobs="-3"), "temperatures other than 1 need the tail's log-probabilities"),
        (dict(tail_logprobs="0.5", temperatures=""), "retort.tail_logprobs is '0.5'"),
        (dict(split="test"), "retort.split is 'test'"),
        # What Python's own numbers would take.
        (dict(temperatures="5_0e-2"), "retort.temperatures is '5_0e-2': it holds no number"),
        (dict(temperatures="0.5, 2"), "retort.temperatures is '0.5, 2': it holds no number"),
        (dict(temperatures="0.5,nan"), "retort.temperatures is '0.5,nan': it holds no number"),
        (dict(capture_temperature="1_0e-1"), "retort.capture_temperature is '1_0e-1': it holds no number"),
        (dict(capture_temperature="1\n"), "retort.capture_temperature is '1\\n': it holds no number"),
        (dict(capture_temperature="\u0661"), "retort.capture_temperature is '\u0661': it holds no number"),
        (dict(tail_logprobs="-inf", temperatures=""), "retort.tail_logprobs is '-inf': it holds no number"),
        (dict(tail_logprobs="-1e39", temperatures=""), "retort.tail_logprobs is '-1e39': a mean log-probability is finite"),
        (dict(draws="1_0"), "retort.draws is '1_0'"),
        (dict(vocab_size="\u0666\u0664"), "retort.vocab_size is '\u0666\u0664'"),
        (dict(shard="1 "), "retort.shard is '1 '"),
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path, pairs, why):
    with pytest.raises(retort_data.ShardError) as error:
        retort_data.open(rewritten(tmp_path, "head-draws", **pairs))
    assert why in str(error.value)


def test_numbers_are_read_in_every_way_of_writing_them(tmp_path):
    with retort_data.open(rewritten(tmp_path, "head-draws", temperatures="+.5,,2.e0", capture_temperature="10E-1")) as shard:
        assert shard.format.temperatures == (0.5, 2.0)


def test_columns_of_another_version_are_refused(tmp_path):
    path = tmp_path / "columns.parquet"
    whole = pq.read_table(GOLDEN / "soft-targets-v2-head-draws.parquet")
    bare = {key: value for key, value in whole.schema.metadata.items() if key != b"retort.content_sha256"}
    for changed, why in (
        (whole.drop_columns(["tail_q"]), "it has no column tail_q"),
        (whole.append_column("extra", whole["row"]), "it has a column extra, which version 2 has not"),
        (whole.set_column(1, "row", whole["token_ids"]), "column row holds lists of uint32, not uint64"),
    ):
        pq.write_table(changed.replace_schema_metadata(bare), path)
        with pytest.raises(retort_data.ShardError, match=why):
            retort_data.open(path)
