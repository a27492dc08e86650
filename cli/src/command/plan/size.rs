//! Sizes with their unit: `80GiB`, `3350GB`, `24e9`.

const UNITS: [(&str, f64); 9] = [
    ("kib", 1024.0),
    ("mib", 1_048_576.0),
    ("gib", 1_073_741_824.0),
    ("tib", 1_099_511_627_776.0),
    ("kb", 1e3),
    ("mb", 1e6),
    ("gb", 1e9),
    ("tb", 1e12),
    ("b", 1.0),
];

/// Bytes; a bare number is bytes too.
pub fn parse(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_lowercase();
    let (number, unit) = UNITS
        .into_iter()
        .find_map(|(unit, bytes)| lower.strip_suffix(unit).map(|number| (number.trim_end(), bytes)))
        .unwrap_or((lower.as_str(), 1.0));
    let bytes = number.parse::<f64>().map_or(f64::NAN, |number| number * unit);
    if (1.0..=1e18).contains(&bytes) {
        Ok(bytes.round() as u64)
    } else {
        Err("write a number and a unit, such as 80GiB or 3350GB".to_owned())
    }
}
