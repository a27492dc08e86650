use std::fmt::Write as _;

use super::*;

fn message(role: Role, content: &str) -> Message {
    Message { role, content: content.to_owned() }
}

fn row(id: &str, text: &str, split: Option<Split>) -> Row {
    Row {
        id: id.to_owned(),
        messages: vec![message(Role::User, text)],
        tags: vec![],
        split,
        completion: None,
        pieces: vec![],
        weight: 1.0,
    }
}

fn line_error(line: &str) -> (Code, String) {
    let error = parse_line("prompts.jsonl", 17, line).unwrap_err();
    let message = error.message.strip_prefix("prompts.jsonl line 17: ").expect("the place comes first").to_owned();
    (error.code, message)
}

fn file_error(text: &[u8]) -> (Code, String) {
    let error = parse("prompts.jsonl", text).unwrap_err();
    (error.code, error.message)
}

#[test]
fn a_full_row_is_read() {
    let line = r#"{"id":"a","messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi\n"},
        {"role":"assistant","content":"Hello"},{"role":"user","content":"Bye"}],"tags":["x","y"],"split":"held_out","completion":"Bye!"}"#;
    let row = parse_line("p", 1, line).unwrap();
    assert_eq!(row.messages.len(), 4);
    assert_eq!(row.messages[1], message(Role::User, "Hi\n"));
    assert_eq!((row.id.as_str(), row.split), ("a", Some(Split::HeldOut)));
    assert_eq!((row.tags, row.completion), (vec!["x".to_owned(), "y".to_owned()], Some("Bye!".to_owned())));
    let bare =
        parse_line("p", 3, r#"{"messages":[{"role":"user","content":"Hi"}],"tags":null,"completion":null}"#).unwrap();
    assert_eq!((bare.id.as_str(), bare.split, bare.completion), ("row-3", None, None));
}

#[test]
fn each_malformed_line_has_its_message() {
    let cases = [
        (r#"{"messages": [}"#, "not JSON at column 15: expected value"),
        (r#"{"messages": ["#, "not JSON at column 14: EOF while parsing a list"),
        (r#"[]"#, r#"it must be a JSON object, like {"messages": [...]}"#),
        (
            r#"{"mesages": []}"#,
            r#"unknown key "mesages", did you mean "messages"?; known are id, messages, tags, split, completion, weight"#,
        ),
        (r#"{"messages": [], "messages": []}"#, r#"the key "messages" is there twice"#),
        (r#"{"messages": [{"role": "user", "content": "a", "content": "b"}]}"#, r#"the key "content" is there twice"#),
        (
            r#"{"messages": [{"role": "user", "content": "a\u0000b"}]}"#,
            "messages[0].content has the character U+0000 in it; remove it",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "completion": "\u0000b"}"#,
            r#""completion" has the character U+0000 in it; remove it"#,
        ),
        (r#"{"zzz": 1}"#, r#"unknown key "zzz"; known are id, messages, tags, split, completion, weight"#),
        (r#"{"id": "a"}"#, r#""messages" is missing"#),
        (r#"{"messages": "hi"}"#, r#""messages" must be a list, it is a string"#),
        (r#"{"messages": ["hi"]}"#, r#"messages[0] must be an object with "role" and "content""#),
        (
            r#"{"messages": [{"rolle": "user"}]}"#,
            r#"unknown key "messages[0].rolle", did you mean "role"?; known are role, content, weight"#,
        ),
        (r#"{"messages": [{"content": "x"}]}"#, "messages[0].role is missing"),
        (r#"{"messages": [{"role": 1, "content": "x"}]}"#, "messages[0].role must be a string, it is a number"),
        (
            r#"{"messages": [{"role": "usr", "content": "x"}]}"#,
            r#"messages[0].role is "usr", did you mean "user"?; use system, user or assistant"#,
        ),
        (
            r#"{"messages": [{"role": "tool", "content": "x"}]}"#,
            r#"messages[0].role is "tool"; use system, user or assistant"#,
        ),
        (r#"{"messages": [{"role": "user"}]}"#, "messages[0].content is missing"),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "text"}]}]}"#,
            "messages[0].content must be a string, it is a list",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}"#,
            "messages[1] is a system turn; only the first message may be one",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
            r#""messages" must end with a user turn"#,
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "weight": -1}"#,
            r#""weight" is -1; it must lie between 0 and 1000"#,
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "weight": "2"}"#,
            r#""weight" must be a number, it is a string"#,
        ),
        (r#"{"messages": [{"role": "user", "content": "a"}], "id": 7}"#, r#""id" must be a string, it is a number"#),
        (r#"{"messages": [{"role": "user", "content": "a"}], "id": " "}"#, r#""id" is empty"#),
        (r#"{"messages": [{"role": "user", "content": "a"}], "id": "a\nb"}"#, r#""id" has a control character in it"#),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "tags": "x"}"#,
            r#""tags" must be a list of strings, it is a string"#,
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "tags": ["x", 2]}"#,
            "tags[1] must be a string, it is a number",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "split": "held-out"}"#,
            r#""split" is "held-out", did you mean "held_out"?; use train or held_out"#,
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "split": "test"}"#,
            r#""split" is "test"; use train or held_out"#,
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "split": true}"#,
            r#""split" must be a string, it is a boolean"#,
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "completion": {}}"#,
            r#""completion" must be a string or a list of pieces, it is an object"#,
        ),
    ];
    for (line, expected) in cases {
        assert_eq!(line_error(line), (Code::PromptMalformed, expected.to_owned()), "{line}");
    }
    let empty = [
        (r#"{"messages": []}"#, r#""messages" is empty"#),
        (r#"{"messages": [{"role": "user", "content": " \n"}]}"#, "messages[0].content is empty"),
        (r#"{"messages": [{"role": "user", "content": "\u200b\ufeff \u2060"}]}"#, "messages[0].content is empty"),
        (r#"{"messages": [{"role": "user", "content": "\u0000\u0007"}]}"#, "messages[0].content is empty"),
        (
            r#"{"messages": [{"role": "user", "content": "a"}], "completion": ""}"#,
            r#""completion" is empty; leave it out or fill it"#,
        ),
    ];
    for (line, expected) in empty {
        assert_eq!(line_error(line), (Code::PromptEmpty, expected.to_owned()), "{line}");
    }
}

#[test]
fn long_lines_long_names_and_deep_nesting_are_refused() {
    let line = format!(r#"{{"messages": [{{"role": "user", "content": "{}"}}]}}"#, "x".repeat(MAX_LINE_BYTES));
    let expected = format!("it takes {} bytes, at most 1048576 fit in one line", line.len());
    assert_eq!(line_error(&line), (Code::PromptMalformed, expected.clone()));
    assert_eq!(file_error(format!("\n{line}\n").as_bytes()).1, format!("prompts.jsonl line 2: {expected}"));
    let long = format!(r#"{{"messages": [{{"role": "user", "content": "a"}}], "id": "{}"}}"#, "x".repeat(300));
    assert_eq!(line_error(&long).1, "\"id\" takes 300 bytes, at most 256");
    let (code, message) = line_error(&"[".repeat(100_000));
    assert_eq!((code, message.as_str()), (Code::PromptMalformed, "not JSON at column 128: recursion limit exceeded"));
    let (_, message) = line_error(&format!(r#"{{"{}": 1}}"#, "k".repeat(5000)));
    assert!(message.len() < 200, "{message}");
}

#[test]
fn a_file_may_have_a_mark_crlf_and_blank_lines() {
    let text = "\u{feff}\r\n{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}\r\n   \r\n\n{\"messages\":[{\"role\":\"user\",\"content\":\"b\"}]}";
    let rows = parse("p", text.as_bytes()).unwrap();
    let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    assert_eq!(ids, ["row-2", "row-5"]);
}

#[test]
fn each_malformed_file_has_its_message() {
    let good = r#"{"id":"a","messages":[{"role":"user","content":"x"}]}"#;
    let empty = (Code::PromptEmpty, "prompts.jsonl: there is no row in it".to_owned());
    assert_eq!(file_error(b""), empty);
    assert_eq!(file_error(b" \n\r\n"), empty);
    let (code, message) = file_error(b"\xff\xfe{\x00");
    assert_eq!((code, message.as_str()), (Code::PromptMalformed, "prompts.jsonl: it is UTF-16; save it as UTF-8"));
    let (code, message) = file_error(&[good.as_bytes(), b"\n{\"id\": \"\xe9\"}"].concat());
    assert_eq!(code, Code::PromptMalformed);
    assert_eq!(message, "prompts.jsonl line 2: byte 9 is not UTF-8; save the file as UTF-8");
    let (code, message) = file_error(format!("{good}\n\n{good}").as_bytes());
    assert_eq!(code, Code::PromptMalformed);
    assert_eq!(message, "prompts.jsonl line 3: the id \"a\" is line 1's already; ids must differ");
    // A default id that a row has taken for itself.
    let taken = "{\"id\":\"row-2\",\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}\n{\"messages\":[{\"role\":\"user\",\"content\":\"y\"}]}";
    assert_eq!(
        file_error(taken.as_bytes()).1,
        "prompts.jsonl line 2: the id \"row-2\" is line 1's already; ids must differ"
    );
}

#[test]
fn one_prompt_in_both_splits_is_refused() {
    let line = |id: &str, text: &str, split: &str| {
        format!(
            "{{\"id\":\"{id}\",\"messages\":[{{\"role\":\"user\",\"content\":\"{text}\"}}],\"split\":\"{split}\"}}\n"
        )
    };
    let text = line("a", "x", "train") + &line("b", "y", "train") + &line("c", "x", "held_out");
    let (code, message) = file_error(text.as_bytes());
    assert_eq!(code, Code::PromptSetLeaks);
    assert_eq!(
        message,
        "prompts.jsonl line 3: the same prompt is in line 1 with split train, here with held_out; a held-out \
         prompt must not be trained on"
    );
    parse("p", (line("a", "x", "train") + &line("b", "x", "train")).as_bytes()).unwrap();
}

#[test]
fn a_missing_completion_is_named_in_score_mode() {
    let text = b"\n{\"messages\":...}\n  \n{\"messages\":...}";
    let mut rows = vec![row("a", "x", None), row("b", "y", None)];
    rows[0].completion = Some("z".to_owned());
    let error = require_completions("prompts.jsonl", text, &rows).unwrap_err();
    assert_eq!(
        error.message,
        "prompts.jsonl line 4: there is no \"completion\", which the teacher is to score; add one to every row, or set \
         teacher.mode to generate"
    );
    rows[1].completion = Some("z".to_owned());
    require_completions("prompts.jsonl", text, &rows).unwrap();
}

#[test]
fn the_canonical_form_reads_back_with_training_rows_first() {
    let mut rows = vec![
        row("a", "held \u{1F600} \"quoted\"\n", Some(Split::HeldOut)),
        row("b", "trained", Some(Split::Train)),
        row("c", "unsaid", None),
    ];
    rows[0].tags = vec!["t".to_owned()];
    rows[1].completion = Some("done".to_owned());
    rows[1].messages.insert(0, message(Role::System, "s"));
    let text = to_jsonl(&rows);
    let read = parse("p", &text).unwrap();
    rows[2].split = Some(Split::Train);
    rows.rotate_left(1);
    assert_eq!(read, rows);
    assert_eq!(to_jsonl(&read), text, "canonical");
    assert_eq!(
        String::from_utf8(text).unwrap().lines().next().unwrap(),
        r#"{"id":"b","messages":[{"role":"system","content":"s"},{"role":"user","content":"trained"}],"tags":[],"split":"train","completion":"done"}"#
    );
}

#[test]
fn a_file_is_read_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("my prompts.jsonl");
    assert_eq!(read(&path).unwrap_err().code, Code::FileNotFound);
    std::fs::write(&path, "{}").unwrap();
    assert_eq!(read(&path).unwrap_err().message, format!("{} line 1: \"messages\" is missing", path.display()));
    assert_eq!(read(folder.path()).unwrap_err().code, Code::FileUnreadable);
}

fn distinct(n: usize) -> Vec<Row> {
    (0..n).map(|i| row(&format!("r{i}"), &format!("question number {i} about topic {}", i * 7), None)).collect()
}

fn held_out(rows: &[Row]) -> Vec<&str> {
    rows.iter().filter(|row| row.split == Some(Split::HeldOut)).map(|row| row.id.as_str()).collect()
}

#[test]
fn splits_are_assigned_by_the_seed() {
    let assigned = |n, fraction, seed| {
        let mut rows = distinct(n);
        assign_splits(&mut rows, fraction, seed);
        assert!(rows.iter().all(|row| row.split.is_some()));
        rows
    };
    assert_eq!(held_out(&assigned(100, 0.1, 1)).len(), 10);
    assert_eq!(held_out(&assigned(100, 0.1, 1)), held_out(&assigned(100, 0.1, 1)));
    assert_ne!(held_out(&assigned(100, 0.1, 1)), held_out(&assigned(100, 0.1, 2)));
    // At least one of each.
    assert_eq!(held_out(&assigned(5, 0.001, 1)).len(), 1);
    assert_eq!(held_out(&assigned(2, 0.9, 1)).len(), 1);
    assert_eq!(held_out(&assigned(1, 0.5, 1)).len(), 0);
    assert_eq!(held_out(&assigned(0, 0.5, 1)).len(), 0);
}

#[test]
fn a_file_that_says_its_splits_is_believed() {
    let mut rows = distinct(20);
    rows[3].split = Some(Split::HeldOut);
    assign_splits(&mut rows, 0.5, 1);
    assert_eq!(held_out(&rows), ["r3"]);
    assert!(rows.iter().all(|row| row.split.is_some()));
}

const LONG: &str = "the parcel was left at the wrong door last monday and nobody in the house has seen it since then";

#[test]
fn overlaps_are_runs_of_thirteen_words_or_whole_prompts() {
    let train = Some(Split::Train);
    let mut rows = vec![
        row("t1", &format!("Hello, {LONG}"), train),
        row("t2", "How do I reset my password?", train),
        row("t3", "something else entirely", train),
        row("h1", &format!("{} Please help!", LONG.to_uppercase()), Some(Split::HeldOut)),
        row("h2", "how do I reset my password", Some(Split::HeldOut)),
        row("h3", "how do I reset my password today", Some(Split::HeldOut)),
        row("h4", "the parcel was left at the wrong door last monday and nobody", Some(Split::HeldOut)),
    ];
    let found = overlaps(&rows);
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!((found[0].held_out_id.as_str(), found[0].train_id.as_str(), found[0].shared), ("h1", "t1", 8));
    assert_eq!(found[0].words, "the parcel was left at the wrong door last monday and nobody in");
    assert_eq!((found[1].held_out_id.as_str(), found[1].train_id.as_str()), ("h2", "t2"));
    assert_eq!(found[1].words, "how do i reset my password");
    let error = check_splits("prompts.jsonl", &rows).unwrap_err();
    assert_eq!(error.code, Code::PromptSetLeaks);
    assert_eq!(
        error.message,
        "prompts.jsonl: held-out row \"h1\" shares \"the parcel was left at the wrong door last monday and nobody in\" \
         with training row \"t1\", and one more held-out row overlaps; put such rows in one split, or leave \"split\" \
         out everywhere"
    );
    rows.retain(|row| row.id != "h1" && row.id != "h2");
    check_splits("p", &rows).unwrap();
    // A system prompt that all share is no leak.
    for row in &mut rows {
        row.messages.insert(0, message(Role::System, LONG));
    }
    assert_eq!(overlaps(&rows), []);
}

#[test]
fn a_template_that_many_rows_share_is_no_leak() {
    let rows: Vec<Row> = (0..12)
        .map(|i| {
            row(
                &format!("r{i}"),
                &format!("{LONG} and then number {i}"),
                Some(if i < 2 { Split::HeldOut } else { Split::Train }),
            )
        })
        .collect();
    assert_eq!(overlaps(&rows), []);
    assert_eq!(overlaps(&rows[..10]).len(), 2, "ten rows are not many");
}

#[test]
fn assigned_splits_never_leak() {
    for seed in 0..40 {
        // Families of near-duplicates, a template, and rows of their own.
        let mut rows = distinct(30);
        for family in 0..6 {
            for i in 0..3 {
                rows.push(row(
                    &format!("f{family}-{i}"),
                    &format!("case {family} {} no {i}", LONG.replace("the", &format!("the{family}"))),
                    None,
                ));
            }
        }
        for i in 0..15 {
            rows.push(row(&format!("t{i}"), &format!("{LONG} in town {i}"), None));
            rows.push(row(&format!("same{i}"), "exactly the same", None));
        }
        assign_splits(&mut rows, 0.2, seed);
        check_splits("p", &rows).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let count = held_out(&rows).len();
        assert!((10..=16).contains(&count), "seed {seed}: {count}");
    }
    let mut rows = vec![row("a", "same words", None), row("b", "Same words!", None)];
    assign_splits(&mut rows, 0.5, 1);
    let error = check_splits("prompts.jsonl", &rows).unwrap_err();
    assert_eq!(error.code, Code::PromptSetTooSmall);
    assert_eq!(
        error.message,
        "prompts.jsonl: 2 rows to train on and 0 held out; each side needs at least one row that does not repeat the other's: \
         add prompts, or say \"split\": \"held_out\" in some rows and \"train\" in others"
    );
}

#[test]
fn random_bytes_never_panic() {
    use retort_core::random::{Counter, Purpose};
    let mut text = String::new();
    for i in 0..3 {
        writeln!(
            text,
            r#"{{"id":"a{i}","messages":[{{"role":"user","content":"x{i}"}}],"tags":["t"],"split":"train"}}"#
        )
        .unwrap();
    }
    let mut rng = Counter::new(3, Purpose::Sample, 0, 0);
    for _ in 0..20_000 {
        let mut bytes = text.clone().into_bytes();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] = rng.next_u64() as u8;
        }
        if let Err(error) = parse("p", &bytes) {
            assert!(matches!(error.code, Code::PromptMalformed | Code::PromptEmpty | Code::PromptSetLeaks), "{error}");
        }
    }
}

#[test]
fn a_weight_is_kept_and_one_is_not_written() {
    let text = br#"{"id":"a","messages":[{"role":"user","content":"x"}],"weight":2.5}
{"id":"b","messages":[{"role":"user","content":"y"}],"weight":1}
{"id":"c","messages":[{"role":"user","content":"z"}],"weight":0}"#;
    let rows = parse("p", text).unwrap();
    assert_eq!(rows.iter().map(|row| row.weight).collect::<Vec<_>>(), [2.5, 1.0, 0.0]);
    let stored = to_jsonl(&rows);
    let lines: Vec<bool> = String::from_utf8(stored.clone()).unwrap().lines().map(|l| l.contains("weight")).collect();
    assert_eq!(lines, [true, false, true]);
    let again = parse("p", &stored).unwrap();
    assert_eq!(again.iter().map(|row| row.weight).collect::<Vec<_>>(), [2.5, 1.0, 0.0]);
}

const IN_PIECES: &str = r#"{"id":"a","messages":[{"role":"user","content":"x"}],"tags":[],"split":"train","completion":[{"text":"Look: ","weight":0.0},{"text":"h\u00e9","weight":2.5},{"text":"!"}]}"#;

#[test]
fn a_completion_may_come_in_weighted_pieces() {
    let row = parse_line("p", 1, IN_PIECES).unwrap();
    assert_eq!(row.completion.as_deref(), Some("Look: h\u{e9}!"));
    assert_eq!(row.pieces.iter().map(|piece| piece.bytes).collect::<Vec<_>>(), [6, 3, 1]);
    let at = |row: &Row| [0, 5, 6, 8, 9, 10, 99].map(|byte| row.weight_at(byte));
    assert_eq!(at(&row), [0.0, 0.0, 2.5, 2.5, 1.0, 1.0, 1.0], "what is behind has the last one's");
    assert_eq!(at(&Row { weight: 2.0, ..row.clone() }), [0.0, 0.0, 5.0, 5.0, 2.0, 2.0, 2.0]);
    assert_eq!(
        String::from_utf8(to_jsonl(std::slice::from_ref(&row))).unwrap(),
        IN_PIECES.replace("\\u00e9", "\u{e9}") + "\n"
    );
    // Of weights that say nothing nothing is kept: the set is named as if they had not been given.
    let plain = |completion: &str| {
        let line = format!(r#"{{"messages":[{{"role":"user","content":"x"}}],"completion":{completion}}}"#);
        to_jsonl(&[parse_line("p", 1, &line).unwrap()])
    };
    assert_eq!(plain(r#"[{"text":"Lo"},{"text":"ok","weight":1}]"#), plain(r#""Look""#));
}

#[test]
fn each_malformed_piece_has_its_message() {
    let cases = [
        ("7", "\"completion\" must be a string or a list of pieces, it is a number"),
        ("[7]", "completion[0] must be an object with \"text\" and \"weight\""),
        (
            r#"[{"text":"a"},{"txt":"b"}]"#,
            r#"unknown key "completion[1].txt", did you mean "text"?; known are text, weight"#,
        ),
        (r#"[{"weight":0}]"#, "completion[0].text is missing"),
        (r#"[{"text":null}]"#, "completion[0].text must be a string, it is null"),
        (r#"[{"text":"a"},{"text":""}]"#, "completion[1].text is empty; leave the piece out"),
        (r#"[{"text":"a","weight":-1}]"#, "completion[0].weight is -1; it must lie between 0 and 1000"),
        (r#"[{"text":"a","weight":"1"}]"#, "completion[0].weight must be a number, it is a string"),
        (r#"[]"#, "\"completion\" is empty; leave it out or fill it"),
        (r#"[{"text":" "},{"text":"\n","weight":0}]"#, "\"completion\" is empty; leave it out or fill it"),
        (r#"[{"text":"a\u0000","weight":0}]"#, "\"completion\" has the character U+0000 in it; remove it"),
    ];
    for (completion, expected) in cases {
        let line = format!(r#"{{"messages":[{{"role":"user","content":"x"}}],"completion":{completion}}}"#);
        assert_eq!(line_error(&line).1, expected, "{completion}");
    }
}

#[test]
fn an_earlier_turn_may_say_that_it_is_not_trained_on() {
    let line = |role: &str, weight: &str| {
        format!(
            r#"{{"messages":[{{"role":"user","content":"a"}},{{"role":"{role}","content":"b","weight":{weight}}},{{"role":"user","content":"c"}}]}}"#
        )
    };
    assert_eq!(parse_line("p", 1, &line("assistant", "0")).unwrap().messages[1], message(Role::Assistant, "b"));
    assert_eq!(
        line_error(&line("assistant", "1")).1,
        "messages[1].weight is 1, but turns before the completion are not trained on; give this one as the \"completion\" of a \
         row of its own, or 0"
    );
    assert_eq!(line_error(&line("user", "0")).1, "messages[1].weight: only an assistant turn may have one");
    assert_eq!(line_error(&line("assistant", "\"no\"")).1, "messages[1].weight must be a number, it is a string");
}
