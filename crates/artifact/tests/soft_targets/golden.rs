//! Every version on disk. A file written once must read the same for ever; `python/tests` read the same
//! files. `RETORT_WRITE_GOLDEN=1` writes those of the version that this build writes.

use std::path::PathBuf;

use retort_artifact::soft_targets::{
    Header, Limits, Position, SCHEMA_VERSION, Sequence, Shard, SparseTargets, TailLogprobs, decode, encode,
};
use retort_core::spec::{Codec, Quantiser, SoftTargets};

use crate::sample;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("soft-targets-{name}.parquet"))
}

fn read(name: &str) -> Shard {
    decode(std::fs::read(path(name)).unwrap(), Limits::default()).unwrap()
}

#[test]
fn the_first_file_of_version_1_reads_as_ever() {
    let shard = read("v1");
    let header = Header { schema_version: 1, work_sha256: String::new(), ..sample::header(64, 4, 4) };
    assert_eq!(shard.header, header);
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

/// Version 2: its name and header.
fn second() -> [(&'static str, Header); 3] {
    let of = |soft_targets: SoftTargets, tail_logprobs| Header {
        schema_version: 2,
        soft_targets,
        tail_logprobs,
        ..sample::header(64, 4, 4)
    };
    let tempered =
        SoftTargets { temperatures: vec![0.5, 2.0], ..SoftTargets::of(Codec::HeadDraws { head: 4, draws: 4 }) };
    let floats = SoftTargets { quantiser: Quantiser::F32, ..SoftTargets::of(Codec::TopKTail { head: 4 }) };
    [
        ("v2-head-draws", of(tempered, TailLogprobs::Stored)),
        ("v2-threshold", of(SoftTargets::of(Codec::Threshold { threshold: 0.25 }), TailLogprobs::Mean(0.0))),
        ("v2-top-k-tail", of(floats, TailLogprobs::Mean(0.0))),
    ]
}

#[test]
fn the_first_files_of_version_2_read_as_ever() {
    for (name, header) in second() {
        if std::env::var_os("RETORT_WRITE_GOLDEN").is_some() && SCHEMA_VERSION == 2 {
            std::fs::write(path(name), encode(&header, &written(&header)).unwrap().bytes).unwrap();
        }
        let shard = read(name);
        assert_eq!((shard.header.schema_version, &shard.header.soft_targets), (2, &header.soft_targets));
        let [first, second] = shard.sequences.as_slice() else { panic!("{} rows", shard.sequences.len()) };
        assert_eq!((first.row_id.as_str(), first.row, first.finish_reason.as_str()), ("refund-1", 12, "stop"));
        assert_eq!(first.token_ids, [1, 40, 17, 9, 2]);
        assert_eq!(first.targets.top_ids, [17, 9, 2]);
        assert_eq!(second.targets.top_ids, [63]);
        close(&first.targets.label_logprobs, &[-0.5, -0.898_437_5, -0.001_998_901]);
    }
    let targets = |name: &str| -> SparseTargets { read(name).sequences.swap_remove(0).targets };

    let tempered = targets("v2-head-draws");
    assert_eq!(tempered.ids, [3, 8, 9, 17, 40, 55, 2, 9, 17, 33, 60, 2, 9, 17]);
    close(&tempered.log_sum_exps, &[-1.0, 1.0, -1.5, 1.5, -0.004, 0.2]);
    close(&tempered.at_temperature(0, 0.5).unwrap().masses[3..4], &[1.0]);

    let threshold = targets("v2-threshold");
    assert_eq!(threshold.offsets, [0, 2, 4, 5]);
    assert_eq!(threshold.ids, [17, 55, 9, 17, 2]);
    close(&threshold.masses, &[0.607_421_9, 0.392_578_1, 0.407_205_4, 0.406_271_1, 0.998_001_1]);

    let bucket = targets("v2-top-k-tail");
    assert_eq!(bucket.ids, [3, 8, 17, 40, 2, 9, 17, 60, 2, 9, 17]);
    close(&bucket.residuals, &[0.063_476_56, 0.046_386_72, 0.000_158_787]);
}

/// What the files of version 2 were written from, as far as a codec keeps it.
fn written(header: &Header) -> Vec<Sequence> {
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
                log_sum_exps: vec![-1.0, 1.0],
            },
            Position {
                head: vec![(9, -0.9), (17, -0.9), (2, -2.4), (60, -3.0)],
                tail: vec![(33, 4, -3.5)],
                label_logprob: -0.9,
                log_sum_exps: vec![-1.5, 1.5],
            },
            Position {
                head: vec![(2, -0.002), (9, -6.5), (17, -8.0)],
                tail: vec![],
                label_logprob: -0.002,
                log_sum_exps: vec![-0.004, 0.2],
            },
        ],
    };
    let second = Sequence {
        row_id: "hello".to_owned(),
        row: 13,
        tags: vec![],
        token_ids: vec![5, 63],
        target_mask: vec![false, true],
        finish_reason: "length".to_owned(),
        positions: vec![Position {
            head: vec![(63, -1e-5)],
            tail: vec![],
            label_logprob: -1e-5,
            log_sum_exps: vec![-1e-5, 0.1],
        }],
    };
    let mut sequences = vec![first, second];
    for position in sequences.iter_mut().flat_map(|sequence| &mut sequence.positions) {
        position.log_sum_exps.truncate(header.soft_targets.temperatures.len());
        match header.soft_targets.codec {
            Codec::HeadDraws { .. } => {}
            Codec::Threshold { threshold } => {
                position.head.retain(|&(_, logprob)| f64::from(logprob).exp() >= threshold);
                // One sample of the first position's tail; the others' were not drawn or there is none.
                let one = position.tail.last().map(|&(id, _, logprob)| (id, 1, logprob));
                position.tail = one.into_iter().filter(|_| position.head.len() == 1).collect();
            }
            _ => position.tail.clear(),
        }
    }
    sequences
}
