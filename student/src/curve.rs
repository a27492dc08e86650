//! The held-out curve of a run: how the student did before training and at each checkpoint. It travels with the
//! checkpoints, so that a run that was resumed knows it all.

use retort_artifact::checkpoint::{HeldOut, Manifest};
use retort_proto::CurvePoint;
use serde::Deserialize as _;
use serde_json::{Value, json};

/// Name in a manifest's extra fields.
const CURVE: &str = "curve";
/// Points kept; of more, every second one goes.
const MOST: usize = 256;

/// In order of steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    points: Vec<HeldOut>,
}

impl Curve {
    /// As a checkpoint has it; empty where it says nothing.
    pub fn of(manifest: &Manifest) -> Self {
        let points = manifest.extra.get(CURVE).and_then(|points| Vec::<HeldOut>::deserialize(points).ok());
        let mut curve = Self::default();
        points.unwrap_or_default().into_iter().for_each(|point| curve.push(point));
        curve
    }

    pub fn write(&self, extra: &mut serde_json::Map<String, Value>) {
        extra.insert(CURVE.to_owned(), json!(self.points));
    }

    /// Takes the place of what was known of this step and later ones.
    pub fn push(&mut self, point: HeldOut) {
        self.points.retain(|known| known.step < point.step);
        if self.points.len() >= MOST {
            self.points = self.points.iter().copied().step_by(2).collect();
        }
        self.points.push(point);
    }

    /// Whether no checkpoint before the last point, of as many held-out tokens, was better.
    pub fn ends_at_its_best(&self) -> bool {
        let Some((last, before)) = self.points.split_last() else { return false };
        before.iter().all(|point| point.step == 0 || point.tokens < last.tokens || point.kl >= last.kl)
    }

    pub fn to_proto(&self) -> Vec<CurvePoint> {
        self.points.iter().map(point_to_proto).collect()
    }
}

pub fn point_to_proto(point: &HeldOut) -> CurvePoint {
    let &HeldOut { step, target_tokens, kl, top1_agreement, calibration_error, tokens } = point;
    CurvePoint { step, target_tokens, kl, top1_agreement, calibration_error, tokens }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(step: u32) -> HeldOut {
        HeldOut { step, kl: 1.0 / f64::from(step + 1), tokens: 9, ..HeldOut::default() }
    }

    fn steps(curve: &Curve) -> Vec<u32> {
        curve.points.iter().map(|point| point.step).collect()
    }

    #[test]
    fn it_comes_back_from_a_manifest() {
        let mut curve = Curve::default();
        [0, 20, 40].into_iter().for_each(|step| curve.push(point(step)));
        let mut manifest = Manifest::default();
        assert_eq!(Curve::of(&manifest), Curve::default());
        curve.write(&mut manifest.extra);
        assert_eq!(Curve::of(&manifest), curve);
        manifest.extra.insert(CURVE.to_owned(), json!("none"));
        assert_eq!(Curve::of(&manifest), Curve::default());
    }

    #[test]
    fn what_is_measured_again_replaces() {
        let mut curve = Curve::default();
        [0, 20, 40, 60, 20].into_iter().for_each(|step| curve.push(point(step)));
        assert_eq!(steps(&curve), [0, 20]);
    }

    #[test]
    fn a_long_one_is_thinned_and_keeps_its_ends() {
        let mut curve = Curve::default();
        for step in 0..10_000 {
            curve.push(point(step));
            assert!(curve.points.len() <= MOST);
            assert_eq!((steps(&curve)[0], *steps(&curve).last().unwrap()), (0, step));
        }
        assert!(curve.points.len() > MOST / 2 && curve.points.is_sorted_by_key(|point| point.step));
    }
}
