use super::size::parse;

#[test]
fn sizes_need_a_number_and_take_both_kinds_of_unit() {
    assert_eq!(parse("80GiB"), Ok(80 << 30));
    assert_eq!(parse(" 3350 gb "), Ok(3_350_000_000_000));
    assert_eq!(parse("1.5TB"), Ok(1_500_000_000_000));
    assert_eq!(parse("24e9"), Ok(24_000_000_000));
    for wrong in ["", "GiB", "80 GB/s", "-1GB", "nanGB", "infGB", "0", "1e30TB"] {
        assert!(parse(wrong).is_err(), "{wrong:?}");
    }
}
