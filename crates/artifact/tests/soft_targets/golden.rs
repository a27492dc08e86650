//! Version 1 on disk. A file written once must read the same for ever; `python/tests/test_golden.py`
//! reads it with pyarrow alone.

use std::path::PathBuf;

use retort_artifact::soft_targets::{Header, Limits, Position, Sequence, decode, encode};

use crate::sample;

#[test]
fn the_first_file_of_version_1_reads_as_ever() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/soft-targets-v1.parquet");
    if std::env::var_os("RETORT_WRITE_GOLDEN").is_some() {
        let (header, sequences) = written();
        std::fs::write(&path, encode(&header, &sequences).unwrap().bytes).unwrap();
    }
    let shard = decode(std::fs::read(path).unwrap().into(), Limits::default()).unwrap();
    assert_eq!(shard.header, written().0);
    let [first, second] = shard.sequences.as_slice() else { panic!("{} rows", shard.sequences.len()) };

    assert_eq!((first.row_id.as_str(), first.row, first.finish_reason.as_str()), ("refund-1", 12, "stop"));
    assert_eq!(first.tags, ["billing", "refund"]);
    assert_eq!(first.token_ids, [1, 40, 17, 9, 2]);
    assert_eq!(first.target_mask, [false, false, true, true, true]);
    let targets = &first.targets;
    assert_eq!(targets.offsets, [0, 6, 11, 14]);
    assert_eq!(targets.ids, [3, 8, 9, 17, 40, 55, 2, 9, 17, 33, 60, 2, 9, 17]);
    assert_eq!(targets.top_ids, [17, 9, 2]);
    assert_eq!(targets.label_logprobs, [-0.5, -0.9, -0.002]);
    let masses = [
        [0.046_003, 0.133_113, 0.015_879, 0.606_531, 0.150_837, 0.047_637].as_slice(),
        &[0.090_404, 0.406_570, 0.405_161, 0.046_356, 0.051_510],
        &[0.998_002, 0.001_503, 0.000_335],
    ];
    close(&targets.masses, &masses.concat());
    let logprobs = [
        [-3.079_054_5, -2.016_554_5, -5.531_25, -0.5, -1.891_554_5, -5.031_25].as_slice(),
        &[-2.403_472, -0.9, -0.903_472, -3.493_75, -2.965_972],
        &[-0.002, -6.5, -8.0],
    ];
    close(&targets.logprobs, &logprobs.concat());
    assert_eq!((second.row_id.as_str(), second.row, second.tags.len()), ("hello", 13, 0));
    assert_eq!(second.targets.top_ids, [63]);
    close(&second.targets.masses, &[0.999_990]);
}

fn close(found: &[f32], expected: &[f32]) {
    let close = found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2e-6);
    assert!(close, "{found:?}, not {expected:?}");
}

/// What the file was written from.
fn written() -> (Header, Vec<Sequence>) {
    let header = Header { schema_version: 1, ..sample::header(64, 4, 4) };
    let first = Sequence {
        row_id: "refund-1".to_owned(),
        row: 12,
        tags: vec!["billing".to_owned(), "refund".to_owned()],
        token_ids: vec![1, 40, 17, 9, 2],
        target_mask: vec![false, false, true, true, true],
        finish_reason: "stop".to_owned(),
        positions: vec![
            Position {
                head: vec![(17, -0.5), (40, -1.9), (8, -2.0), (3, -3.1)],
                tail: vec![(9, 1, -5.5), (55, 3, -5.0)],
                label_logprob: -0.5,
            },
            Position {
                head: vec![(9, -0.9), (17, -0.9), (2, -2.4), (60, -3.0)],
                tail: vec![(33, 4, -3.5)],
                label_logprob: -0.9,
            },
            Position { head: vec![(2, -0.002), (9, -6.5), (17, -8.0)], tail: vec![], label_logprob: -0.002 },
        ],
    };
    let second = Sequence {
        row_id: "hello".to_owned(),
        row: 13,
        tags: vec![],
        token_ids: vec![5, 63],
        target_mask: vec![false, true],
        finish_reason: "length".to_owned(),
        positions: vec![Position { head: vec![(63, -1e-5)], tail: vec![], label_logprob: -1e-5 }],
    };
    (header, vec![first, second])
}
