use proptest::prelude::*;

use super::*;
use crate::{Bound, Gpu, Model};

fn work(mode: Mode) -> Work {
    Work {
        mode,
        rows: 100_000,
        prompt_tokens: 512,
        new_tokens: 512,
        shard_rows: 1024,
        micro_batch: 4096,
        sequences: None,
        price_per_gpu_hour: None,
    }
}

fn cluster(nodes: u32, gpus: u32) -> Cluster {
    Cluster { nodes, gpus, gpu: Gpu::find("h100-sxm").unwrap() }
}

fn planned(name: &str, format: Format, cluster: &Cluster, work: &Work, assumptions: &Assumptions) -> Plan {
    plan(name, &Model::find(name).unwrap().config().unwrap(), format, cluster, work, assumptions).unwrap()
}

fn large(format: Format, nodes: u32, work: &Work) -> Plan {
    planned("llama-3.1-405b", format, &cluster(nodes, 8), work, &Assumptions::default())
}

fn of(section: &Option<Section>, kind: &str) -> Estimate {
    let layouts = &section.as_ref().unwrap().layouts;
    layouts.iter().find(|estimate| estimate.layout.describe() == kind).unwrap().clone()
}

fn close(left: f64, right: f64, part: f64) {
    assert!((left - right).abs() <= part * right.abs(), "{left} is not within {part} of {right}");
}

/// Written out once more, by hand: 8 layers of the 405B on an H100, 4,096 tokens of rows of 1,024.
#[test]
fn scoring_is_the_products_of_the_slowest_stage_and_the_bubble() {
    let plan = large(Format::Bf16, 2, &work(Mode::Score));
    let matrices = 2.0 * 16_384.0 * 16_384.0 + 2.0 * 16_384.0 * 1_024.0 + 3.0 * 16_384.0 * 53_248.0;
    let attention = 4.0 * 16_384.0 * 512.0;
    let seconds = 8.0 * 4096.0 * (2.0 * matrices + attention) / (0.5 * 989.4e12);
    let shard = (256.0 + 15.0) * seconds;
    let speed = of(&plan.score, "16 processes x 1 GPU").speed.unwrap();
    close(speed.tokens_per_second, 1024.0 * 1024.0 / shard, 1e-6);
    close(speed.busy, 256.0 / 271.0, 1e-9);
    // 97 whole shards and one that counts as whole: the cluster is paid for them.
    close(speed.job.gpu_hours, 98.0 * shard * 16.0 / 3600.0, 1e-6);
    assert_eq!(speed.bound, Bound::Products);
    // The same products, but a process's GPUs one after another, and half of the bubble's stages.
    let in_turn = of(&plan.score, "2 processes x 8 GPUs in turn").speed.unwrap();
    close(in_turn.tokens_per_second, 1024.0 * 1024.0 / (257.0 * 63.0 / 8.0 * seconds), 0.01);
}

/// What the design estimated: 16 stages, 40 sequences a micro-batch, 15 ms a stage.
#[test]
fn a_pipeline_generates_as_fast_as_it_reads_its_weights() {
    let ideal = Assumptions {
        compute_efficiency: 1.0,
        bandwidth_efficiency: 1.0,
        link_efficiency: 1.0,
        memory_utilization: 1.0,
        node_latency: 0.0,
        network_latency: 0.0,
        ..Assumptions::default()
    };
    let short =
        Work { prompt_tokens: 1, new_tokens: 64, shard_rows: 640, sequences: Some(640), ..work(Mode::Generate) };
    let plan = planned("llama-3.1-405b", Format::Bf16, &cluster(2, 8), &short, &ideal);
    let pipeline = of(&plan.generate, "PP 16").speed.unwrap();
    assert_eq!((pipeline.micro_batch, pipeline.bound), (40, Bound::ReadingWeights));
    close(pipeline.decode_tokens_per_second.unwrap(), 2_700.0, 0.05);
    let tensor = of(&plan.generate, "TP 16").speed.unwrap().decode_tokens_per_second.unwrap();
    let mixed = of(&plan.generate, "TP 8 x PP 2").speed.unwrap().decode_tokens_per_second.unwrap();
    // Six times would need products and all-reduces to cost nothing.
    assert!(tensor < 4.0 * pipeline.decode_tokens_per_second.unwrap() && tensor < mixed, "{tensor} {mixed}");
}

#[test]
fn the_405b_fits_on_two_nodes_in_bf16_and_on_one_in_fp8() {
    let two = large(Format::Bf16, 2, &work(Mode::Both));
    let native = two.score.as_ref().unwrap().recommended.as_ref().unwrap();
    assert_eq!(native.layout.describe(), "16 processes x 1 GPU");
    let remote = two.generate.as_ref().unwrap().recommended.as_ref().unwrap();
    assert_eq!(remote.layout.engine, Engine::Remote);
    assert!(two.routes[0].job.seconds < two.routes[1].job.seconds);

    let one = large(Format::Bf16, 1, &work(Mode::Score)).score.unwrap();
    assert!(one.recommended.is_none());
    assert!(one.reason.contains("GiB are usable"), "{}", one.reason);
    assert!(one.reason.contains("`--dtype bf16` with 16 such GPUs on 2 nodes"), "{}", one.reason);
    assert!(one.reason.contains("`--dtype fp8` with 7 such GPUs on 1 node"), "{}", one.reason);
    for format in [Format::Fp8Mlp, Format::Fp8, Format::Int8] {
        assert!(large(format, 1, &work(Mode::Score)).score.unwrap().recommended.is_some());
    }
}

#[test]
fn the_fewest_gpus_are_the_fewest() {
    let mode = work(Mode::Score);
    let smallest = large(Format::Fp8Mlp, 1, &mode).score.unwrap().fits_from;
    for smallest in smallest.into_iter().filter(|smallest| smallest.nodes == Some(1)) {
        let gpus = smallest.gpus.unwrap();
        let fits = |gpus| {
            let cluster = cluster(1, gpus);
            let plan = planned("llama-3.1-405b", smallest.format, &cluster, &mode, &Assumptions::default());
            plan.score.unwrap().recommended.is_some()
        };
        assert!(fits(gpus) && !fits(gpus - 1), "{smallest:?}");
    }
}

#[test]
fn too_many_sequences_are_told_how_many_fit() {
    let asked = |sequences| {
        let work = Work { sequences: Some(sequences), shard_rows: 4096, ..work(Mode::Generate) };
        large(Format::Bf16, 2, &work).generate.unwrap()
    };
    let reason = asked(4096).reason;
    let (_, rest) = reason.split_once("ways out: `--sequences ").unwrap();
    let most = rest.split_once('`').unwrap().0.parse().unwrap();
    assert!(asked(most).recommended.is_some(), "{reason}");
}

#[test]
fn one_byte_weights_help_a_remote_engine_and_not_the_native_ones_generating() {
    let speed = |format, engine, tensor| {
        let layouts = large(format, 2, &work(Mode::Generate)).generate.unwrap().layouts;
        let kind = |it: &&Estimate| (it.layout.engine, it.layout.tensor, it.layout.in_turn) == (engine, tensor, 1);
        layouts.iter().find(kind).unwrap().speed.as_ref().unwrap().decode_tokens_per_second.unwrap()
    };
    assert!(speed(Format::Fp8, Engine::Remote, 8) > 1.3 * speed(Format::Bf16, Engine::Remote, 8));
    assert!(speed(Format::Fp8, Engine::Native, 1) < speed(Format::Bf16, Engine::Native, 1));
}

#[test]
fn a_measured_rate_takes_the_place_of_peak_and_efficiency() {
    let measured = Assumptions { measured_flops: Some(300e12), ..Assumptions::default() };
    let half = planned("llama-3-8b", Format::Bf16, &cluster(1, 1), &work(Mode::Score), &Assumptions::default());
    let other = planned("llama-3-8b", Format::Bf16, &cluster(1, 1), &work(Mode::Score), &measured);
    let speed = |plan: &Plan| of(&plan.score, "1 process x 1 GPU").speed.unwrap().tokens_per_second;
    close(speed(&other) / speed(&half), 300.0 / (0.5 * 989.4), 0.02);
}

#[test]
fn what_is_out_of_bounds_is_refused_by_name() {
    let config = Model::find("llama-2-7b").unwrap().config().unwrap();
    let refused = |cluster: &Cluster, work: &Work, assumptions: &Assumptions| {
        let error = plan("it", &config, Format::Bf16, cluster, work, assumptions).unwrap_err();
        assert_eq!(error.code, Code::SpecInvalid);
        error.message
    };
    let (good, usual) = (work(Mode::Both), Assumptions::default());
    assert_eq!(refused(&cluster(0, 8), &good, &usual), "--nodes is 0; it must be 1 to 1024");
    assert_eq!(refused(&cluster(1, 0), &good, &usual), "--gpus is 0; it must be 1 to 72");
    assert_eq!(refused(&cluster(1 << 30, 8), &good, &usual), "--nodes is 1073741824; it must be 1 to 1024");
    let mut tiny = cluster(1, 1);
    tiny.gpu.memory_bytes = 80;
    assert!(refused(&tiny, &good, &usual).starts_with("--gpu-memory (bytes) is 80;"));
    tiny = cluster(1, 1);
    tiny.gpu.bf16_flops = f64::NAN;
    assert!(refused(&tiny, &good, &usual).starts_with("--tflops (operations a second) is NaN;"));
    let long = Work { prompt_tokens: 4000, ..good.clone() };
    assert_eq!(
        refused(&cluster(1, 1), &long, &usual),
        "a row has 4000 prompt and 512 new tokens, but the context of it is 4096; shorten one of them"
    );
    assert!(refused(&cluster(1, 1), &Work { rows: 0, ..good.clone() }, &usual).starts_with("--rows is 0;"));
    assert!(refused(&cluster(1, 1), &Work { price_per_gpu_hour: Some(-1.0), ..good.clone() }, &usual).contains("-1"));
    let eager = Assumptions { compute_efficiency: 1.5, ..usual };
    assert!(refused(&cluster(1, 1), &good, &eager).starts_with("--efficiency is 1.5;"));
}

fn any_plan() -> impl Strategy<Value = (Config, Format, Cluster, Work)> {
    let model = (0..Model::ALL.len(), 0..Format::ALL.len());
    let machines = (1_u32..5, 1_u32..10, 6_u64..200);
    let rows = (1_u64..5_000, 1_u64..1_500, 1_u64..1_500, 1_u64..2_000);
    (model, machines, rows, prop::option::of(1_u64..3_000), 1_u64..10_000).prop_map(
        |(
            (model, format),
            (nodes, gpus, gib),
            (rows, prompt_tokens, new_tokens, shard_rows),
            sequences,
            micro_batch,
        )| {
            let mut cluster = cluster(nodes, gpus);
            cluster.gpu.memory_bytes = gib << 30;
            let work = Work {
                mode: Mode::Both,
                rows,
                prompt_tokens,
                new_tokens,
                shard_rows,
                micro_batch,
                sequences,
                price_per_gpu_hour: Some(2.0),
            };
            (Model::ALL[model].config().unwrap(), Format::ALL[format], cluster, work)
        },
    )
}

fn sections(plan: &Plan) -> [&Section; 2] {
    [plan.score.as_ref().unwrap(), plan.generate.as_ref().unwrap()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn more_hardware_never_makes_it_not_fit((config, format, cluster, work) in any_plan()) {
        let fits = |cluster: &Cluster| {
            let plan = plan("it", &config, format, cluster, &work, &Assumptions::default()).unwrap();
            sections(&plan).map(|section| section.recommended.is_some())
        };
        let before = fits(&cluster);
        let mut larger = cluster.clone();
        larger.gpu.memory_bytes += 1 << 30;
        let more = [
            Cluster { nodes: cluster.nodes + 1, ..cluster.clone() },
            Cluster { gpus: cluster.gpus + 1, ..cluster.clone() },
            larger,
        ];
        for after in more.iter().map(fits) {
            prop_assert!(before.iter().zip(after).all(|(before, after)| after || !before), "{before:?} {after:?}");
        }
    }

    #[test]
    fn stages_are_the_whole_and_what_fits_is_within_the_memory((config, format, cluster, work) in any_plan()) {
        let plan = plan("it", &config, format, &cluster, &work, &Assumptions::default()).unwrap();
        let usable = cluster.gpu.memory_bytes as f64 * 0.9;
        let weights = Weights::new(&config, format);
        for estimate in sections(&plan).into_iter().flat_map(|section| &section.layouts) {
            let layout = &estimate.layout;
            prop_assert!(layout.copies * layout.group_gpus() <= cluster.nodes * cluster.gpus);
            let layers: Vec<_> = estimate.stages.iter().flat_map(|stage| stage.layers.clone()).collect();
            prop_assert_eq!(layers, (0..config.num_hidden_layers as usize).collect::<Vec<_>>());
            let twice = if layout.stages > 1 && weights.tied { weights.head } else { 0 };
            let parameters: u64 = estimate.stages.iter().map(|stage| stage.parameters).sum();
            prop_assert_eq!(parameters, config.parameters() + twice);
            let bytes: u64 = estimate.stages.iter().map(|stage| stage.weight_bytes).sum::<u64>() * u64::from(layout.tensor);
            prop_assert!(bytes >= weights.bytes() + 2 * twice);
            prop_assert!(layout.tensor > 1 || bytes == weights.bytes() + 2 * twice);
            let within = estimate.stages.iter().all(|stage| stage.bytes() as f64 <= usable);
            prop_assert_eq!(within, estimate.too_small.is_none());
            prop_assert_eq!(within, estimate.speed.is_some());
        }
    }

    #[test]
    fn no_speed_is_above_the_roof_and_every_figure_is_one((config, format, cluster, work) in any_plan()) {
        let plan = plan("it", &config, format, &cluster, &work, &Assumptions::default()).unwrap();
        // Products of the layers alone, every GPU always at work, fp8 wherever it could be.
        let flops = 2.0 * (config.parameters() as f64 - 2.0 * Weights::new(&config, format).head as f64);
        let gpus = cluster.total_gpus() as f64;
        let roof = 0.5 * cluster.gpu.fp8_flops.unwrap() * gpus / flops.max(1.0);
        for estimate in sections(&plan).into_iter().flat_map(|section| &section.layouts) {
            let Some(speed) = &estimate.speed else { continue };
            prop_assert!(speed.tokens_per_second > 0.0 && speed.tokens_per_second < roof, "{speed:?}");
            prop_assert!(speed.busy > 0.0 && speed.busy <= 1.0);
            prop_assert_eq!(speed.job.cost, Some(2.0 * speed.job.gpu_hours));
            prop_assert!(speed.job.gpu_hours.is_finite() && speed.job.gpu_hours > 0.0);
            if let Some(decode) = speed.decode_tokens_per_second {
                prop_assert!(decode >= speed.tokens_per_second);
            }
        }
    }
}
