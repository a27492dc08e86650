//! What is compared.

use retort_core::spec::{Codec, SoftTargets};

use crate::distillkit::DistillKit;

pub struct Setting {
    pub name: String,
    pub how: How,
}

pub enum How {
    Ours(SoftTargets),
    DistillKit(DistillKit),
}

/// Of whole distributions: a student trained on them is one trained online, but for their rounding.
pub const FULL: &str = "full";

pub fn all() -> Vec<Setting> {
    let ours = |name: &str, codec| Setting { name: name.to_owned(), how: How::Ours(SoftTargets::of(codec)) };
    let theirs = |name: &str, how| Setting { name: name.to_owned(), how: How::DistillKit(how) };
    vec![
        ours("threshold-0.05", Codec::Threshold { threshold: 0.05 }),
        ours("threshold-0.025", Codec::Threshold { threshold: 0.025 }),
        ours("threshold-0.005", Codec::Threshold { threshold: 0.005 }),
        ours("head-draws-32-16", Codec::HeadDraws { head: 32, draws: 16 }),
        ours("random-50", Codec::Random { draws: 50 }),
        ours("top-k-50", Codec::TopK { head: 50 }),
        ours("top-k-tail-50", Codec::TopKTail { head: 50 }),
        ours("top-k-16", Codec::TopK { head: 16 }),
        ours(FULL, Codec::Full),
        theirs("distillkit-recommended", DistillKit { k: 128, exact: 16, powers: 4 }),
        theirs("distillkit-budget", DistillKit { k: 50, exact: 1, powers: 1 }),
    ]
}
