//! `docs/errors.md` explains every code, and no code that does not exist.

use retort_core::Code;

#[test]
fn every_code_is_explained_once() {
    let page = include_str!("../../../docs/errors.md");
    let explained: Vec<&str> =
        page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`')).map(|(code, _)| code).collect();
    for code in Code::ALL {
        let times = explained.iter().filter(|text| **text == code.as_str()).count();
        assert_eq!(times, 1, "docs/errors.md must explain `{code}` once");
    }
    for text in explained {
        assert!(Code::parse(text).is_some(), "docs/errors.md explains `{text}`, which is no code");
    }
}
