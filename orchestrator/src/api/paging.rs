//! Page tokens: opaque to callers, bound to the list and the filter they came from.

use retort_core::Result;

use super::invalid;

const DEFAULT_SIZE: u32 = 50;
const MAX_SIZE: u32 = 1000;
/// A page ends early when its answer gets this large, bytes.
pub const MAX_PAGE_BYTES: usize = 4 << 20;

/// 0 is 50, more than 1000 is 1000, less than 0 is refused.
pub fn size(page_size: i32) -> Result<u32> {
    match page_size {
        0 => Ok(DEFAULT_SIZE),
        size => u32::try_from(size)
            .map(|size| size.min(MAX_SIZE))
            .map_err(|_| invalid(format!("page_size is {size}; it must be 0 to {MAX_SIZE}"))),
    }
}

/// A token that goes on after `last` in the list called `list` (the collection and its filter).
pub fn token(list: &str, last: &str) -> String {
    format!("{list}\n{last}").bytes().map(|byte| format!("{byte:02x}")).collect()
}

/// What a token of the same list goes on after; `None` for the first page.
pub fn after(list: &str, token: &str) -> Result<Option<String>> {
    if token.is_empty() {
        return Ok(None);
    }
    let last = decode(token).and_then(|text| Some(text.strip_prefix(list)?.strip_prefix('\n')?.to_owned()));
    last.map(Some).ok_or_else(|| {
        invalid(
            "page_token does not belong to this list and filter; take it from next_page_token of the page before"
                .to_owned(),
        )
    })
}

fn decode(token: &str) -> Option<String> {
    if token.len() > 1024 || !token.len().is_multiple_of(2) || !token.is_ascii() {
        return None;
    }
    let bytes = (0..token.len()).step_by(2).map(|at| u8::from_str_radix(&token[at..at + 2], 16).ok());
    String::from_utf8(bytes.collect::<Option<_>>()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_on_in_its_own_list_only() -> Result<()> {
        let token = token("jobs running", "0199");
        assert_eq!(after("jobs running", &token)?, Some("0199".to_owned()));
        for (list, token) in
            [("jobs failed", token.as_str()), ("jobs running", "zz"), ("jobs running", "abc"), ("jobs", "ä")]
        {
            assert!(after(list, token).is_err(), "{list} {token}");
        }
        assert_eq!(after("jobs", "")?, None);
        Ok(())
    }

    #[test]
    fn sizes_are_bounded() -> Result<()> {
        assert_eq!((size(0)?, size(7)?, size(5000)?), (50, 7, 1000));
        assert!(size(-1).is_err());
        Ok(())
    }
}
