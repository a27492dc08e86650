use super::*;

#[test]
fn samples_follow_temperature_and_mass() {
    let logits_v = Tensor::from_slice(&[0.0_f32, 1.0, 2.0, -1.0]);
    let mut greedy = Sampler::new(0.0, 1.0, 5).unwrap();
    assert_eq!(greedy.pick(&logits_v).unwrap(), 2);

    let mut counts = [0; 4];
    let mut sampler = Sampler::new(1.0, 1.0, 5).unwrap();
    for _ in 0..4000 {
        counts[sampler.pick(&logits_v).unwrap() as usize] += 1;
    }
    let masses = Vec::<f32>::try_from(logits_v.softmax(-1, Kind::Float)).unwrap();
    for (count, mass) in counts.iter().zip(masses) {
        // Five standard deviations of a binomial.
        let (expected, deviation) = (4000.0 * mass, (4000.0 * mass * (1.0 - mass)).sqrt());
        assert!((*count as f32 - expected).abs() < 5.0 * deviation, "{counts:?}");
    }

    let mut narrow = Sampler::new(1.0, 0.8, 5).unwrap();
    let chosen: Vec<u32> = (0..200).map(|_| narrow.pick(&logits_v).unwrap()).collect();
    assert!(chosen.iter().all(|id| [1, 2].contains(id)) && chosen.contains(&1));

    let again: Vec<u32> = (0..9).map(|_| Sampler::new(1.0, 1.0, 7).unwrap().pick(&logits_v).unwrap()).collect();
    assert!(again.iter().all(|id| *id == again[0]), "a seed repeats");
}

#[test]
fn senseless_settings_are_refused() {
    for (temperature, top_p) in [(-1.0, 1.0), (f32::NAN, 1.0), (1.0, 0.0), (1.0, 1.5), (1.0, f32::NAN)] {
        assert!(Sampler::new(temperature, top_p, 0).is_err(), "{temperature} {top_p}");
    }
    let broken = Tensor::from_slice(&[f32::NAN, 1.0]);
    assert!(Sampler::new(1.0, 1.0, 0).unwrap().pick(&broken).is_err());
}
