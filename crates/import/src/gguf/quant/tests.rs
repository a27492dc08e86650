use super::*;

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// Against `tests/make_golden.py`: the reference's values, bit for bit.
#[test]
fn every_kind_equals_the_reference() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../../../tests/golden/quants.json")).unwrap();
    for kind in Kind::ALL {
        let case = &golden[kind.name()];
        let blocks = unhex(case["blocks"].as_str().unwrap());
        let wanted: Vec<u32> = unhex(case["values"].as_str().unwrap())
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| u32::from_le_bytes(*bytes))
            .collect();
        let mut values = Vec::new();
        kind.dequantise(&blocks, &mut values);
        let found: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
        assert_eq!(found.len() as u64, blocks.len() as u64 / kind.block_bytes() * kind.block_values());
        assert_eq!(found, wanted, "{}", kind.name());
    }
}

#[test]
fn numbers_and_names_do_not_collide() {
    for kind in Kind::ALL {
        assert_eq!(Kind::from_number(kind.facts().0), Some(kind));
        assert_eq!(foreign_name(kind.facts().0), None);
    }
    assert_eq!(Kind::from_number(10), None);
    assert_eq!(foreign_name(10), Some("Q2_K"));
}
