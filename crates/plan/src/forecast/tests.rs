use proptest::prelude::*;

use super::*;

const LAW: Law = Law { floor: 0.5, scale: 40.0, exponent: 0.4 };

/// Points at equal distances, each off by a normal share of this deviation.
fn curve(law: &Law, count: u64, deviation: f64, seed: u64) -> Vec<Point> {
    let mut random = Counter::new(seed, Purpose::Init, 0, 0);
    // Box and Muller.
    let mut normal = || {
        let (radius, angle) = (1.0 - random.next_f64(), random.next_f64());
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    };
    let tokens = (1..=count).map(|i| i * 5000);
    tokens.map(|tokens| Point { tokens, kl: law.at(tokens as f64) * (deviation * normal()).exp() }).collect()
}

fn near(a: f64, b: f64, share: f64) -> bool {
    (a - b).abs() <= share * b.abs()
}

#[test]
fn a_law_without_noise_is_found_again() {
    for law in [
        LAW,
        Law { floor: 1.0, scale: 300.0, exponent: 0.6 },
        Law { floor: 0.2, scale: 20_000.0, exponent: 1.1 },
        Law { floor: 0.0, scale: 10.0, exponent: 0.25 },
    ] {
        let found = forecast(&curve(&law, 10, 0.0, 1), 7).unwrap();
        assert!(near(found.law.exponent, law.exponent, 0.01), "{law:?}: {found:?}");
        assert!((found.law.floor - law.floor).abs() < 0.01, "{law:?}: {found:?}");
        for prediction in &found.predictions {
            let truth = law.at(prediction.tokens);
            assert!(near(prediction.kl, truth, 1e-3), "{law:?}: {found:?}");
            assert!(near(prediction.low, truth, 0.01) && near(prediction.high, truth, 0.01), "{law:?}: {found:?}");
        }
        assert!(found.scatter < 1e-3);
    }
}

#[test]
fn the_interval_holds_the_truth_about_as_often_as_it_says() {
    const TRIALS: u64 = 60;
    let mut held = [0; 2];
    for seed in 0..TRIALS {
        let found = forecast(&curve(&LAW, 12, 0.02, seed), seed).unwrap();
        for (held, prediction) in held.iter_mut().zip(&found.predictions) {
            assert!(near(prediction.kl, LAW.at(prediction.tokens), 0.5), "{found:?}");
            *held += u64::from((prediction.low..=prediction.high).contains(&LAW.at(prediction.tokens)));
        }
    }
    for held in held {
        let share = held as f64 / TRIALS as f64;
        assert!((CONFIDENCE - 0.2..=CONFIDENCE + 0.15).contains(&share), "{share} of the intervals hold the truth");
    }
}

#[test]
fn the_same_curve_gives_the_same_bits() {
    let points = curve(&LAW, 9, 0.02, 3);
    assert_eq!(forecast(&points, 5), forecast(&points, 5));
    let mut shuffled = points.clone();
    shuffled.reverse();
    assert_eq!(forecast(&points, 5), forecast(&shuffled, 5));
    let (one, other) = (forecast(&points, 5).unwrap(), forecast(&points, 6).unwrap());
    assert_eq!(one.law, other.law);
    assert_ne!(one.predictions[1].low, other.predictions[1].low);
}

#[test]
fn one_wild_point_changes_little() {
    let sound = forecast(&curve(&LAW, 15, 0.005, 2), 1).unwrap();
    let mut points = curve(&LAW, 15, 0.005, 2);
    points[6].kl *= 1.5;
    let wild = forecast(&points, 1).unwrap();
    assert!(near(wild.predictions[0].kl, sound.predictions[0].kl, 0.03), "{sound:?} {wild:?}");
}

#[test]
fn no_law_of_a_fine_grid_fits_better() {
    let points = curve(&LAW, 8, 0.03, 4);
    let last = points[7].tokens as f64;
    let reach: Vec<f64> = points.iter().map(|point| (point.tokens as f64 / last).ln()).collect();
    let logs: Vec<f64> = points.iter().map(|point| point.kl.ln()).collect();
    let cost = |curve: &fit::Curve| {
        let residual =
            |(reach, log): (&f64, &f64)| log - (curve.floor + curve.excess * (-curve.exponent * reach).exp()).ln();
        reach.iter().zip(&logs).map(residual).map(fit::huber).sum::<f64>()
    };
    let found = cost(&fit::fit(&reach, &logs));
    for exponent in (1..60).map(|i| f64::from(i) * 0.05) {
        for floor in (0..80).map(|i| f64::from(i) * 0.015) {
            for excess in (1..80).map(|i| f64::from(i) * 0.015) {
                let other = cost(&fit::Curve { floor, excess, exponent });
                assert!(found <= other + 1e-7, "{found} > {other} of {floor} {excess} {exponent}");
            }
        }
    }
}

fn of(kls: &[f64]) -> Result<Forecast, Unfit> {
    let points: Vec<Point> = (1..).zip(kls).map(|(i, &kl)| Point { tokens: i * 1000, kl }).collect();
    forecast(&points, 1)
}

#[test]
fn a_curve_that_bears_none_is_told_so() {
    assert_eq!(of(&[]), Err(Unfit::TooFew { points: 0 }));
    assert_eq!(of(&[4.0, 3.0, 2.5, 2.25]), Err(Unfit::TooFew { points: 4 }));
    assert_eq!(of(&[1.0; 8]), Err(Unfit::NoFall));
    assert_eq!(of(&[1.0, 1.1, 1.2, 1.3, 1.4, 1.5]), Err(Unfit::NoFall));
    assert_eq!(of(&[1.0, 1.1, 0.9, 1.1, 0.9, 1.0, 1.05]), Err(Unfit::NoFall));
    let slow: Vec<f64> = (1..8).map(|i| 5.0 * f64::from(i).powf(-0.01)).collect();
    assert_eq!(of(&slow), Err(Unfit::TooSlow));
    // All at once, and then nothing.
    assert_eq!(of(&[9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]), Err(Unfit::TooFast));
    // The point before training, another without a number, and one that was measured twice.
    let mut points = curve(&LAW, 4, 0.0, 1);
    let odd = [(0, 9.0), (25_000, f64::NAN), (30_000, 0.0), (35_000, -1.0), (40_000, f64::INFINITY), (5000, 2.0)];
    points.extend(odd.map(|(tokens, kl)| Point { tokens, kl }));
    assert_eq!(forecast(&points, 1), Err(Unfit::TooFew { points: 4 }));
    // It falls again, and never below where it began.
    let diverged = [(0, 8.0), (10, 2000.0), (20, 900.0), (30, 500.0), (40, 400.0), (50, 350.0), (60, 330.0)];
    assert_eq!(forecast(&diverged.map(|(tokens, kl)| Point { tokens, kl }), 1), Err(Unfit::Worse));
}

#[test]
fn a_reason_says_the_way_out() {
    let text = Unfit::TooFew { points: 3 }.to_string();
    assert_eq!(
        text,
        "the held-out curve has 3 of the 5 points that a fit needs; a smaller train.checkpoint_steps gives more"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn nothing_makes_it_panic_and_what_it_says_is_in_order(
        points in prop::collection::vec(
            (
                prop_oneof![0u64..20, 0u64..1_000_000, Just(u64::MAX)],
                prop_oneof![0.01f64..10.0, any::<f64>(), Just(1.0), Just(0.0), Just(f64::NAN), Just(1e300)],
            ),
            0..14,
        ),
        seed in any::<u64>(),
    ) {
        let points: Vec<Point> = points.into_iter().map(|(tokens, kl)| Point { tokens, kl }).collect();
        if let Ok(found) = forecast(&points, seed) {
            prop_assert!(found.points >= LEAST_POINTS && found.law.floor >= 0.0 && found.law.exponent > 0.0);
            for p in &found.predictions {
                prop_assert!(p.kl.is_finite() && p.high.is_finite() && 0.0 <= p.low && p.low <= p.kl && p.kl <= p.high);
            }
            prop_assert!(found.predictions[1].kl <= found.predictions[0].kl);
        }
    }
}

#[test]
fn a_very_long_curve_is_thinned() {
    let found = forecast(&curve(&LAW, 100_000, 0.0, 1), 1).unwrap();
    assert_eq!(found.points, MOST_POINTS);
    assert!(near(found.law.exponent, LAW.exponent, 0.02));
    assert_eq!(found.predictions[0].tokens, 1e9);
}
