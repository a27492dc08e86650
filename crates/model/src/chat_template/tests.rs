use super::*;

fn render(source: &str) -> Result<String> {
    let messages = [ChatMessage::new("user", "hi")];
    ChatTemplate::compile("file", source, vec![("bos_token".into(), "<s>".into())], None)?.render(&messages, true)
}

#[test]
fn special_tokens_and_generation_marks() {
    let source = "{{ bos_token }}{% generation %}{{ messages[0].content }}{% endgeneration %}";
    assert_eq!(render(source).unwrap(), "<s>hi");
    assert_eq!(render("{%- generation -%} a {%- endgeneration -%}").unwrap(), "a");
}

#[test]
fn a_refusal_says_the_templates_own_words() {
    let error = render("{{ raise_exception('no system turn, please') }}").unwrap_err();
    assert_eq!(error.code, Code::PromptMalformed);
    assert_eq!(error.to_string(), "chat template: no system turn, please");
    let within = "{% macro check() %}{{ raise_exception('not so') }}{% endmacro %}{{ check() }}";
    assert_eq!(render(within).unwrap_err().to_string(), "chat template: not so");
}

#[test]
fn faults_are_errors() {
    for source in [
        "{% if %}",
        "{{ messages[0].content.missing() }}",
        "{{ missing.attribute.other }}",
        "{% generation %}",
        "{% for a in b",
        "{{ strftime_now('%Q') }}",
        "{{ messages | tojson(separators=['a']) }}",
        "{% include 'other' %}",
        "{{ 1 // 0 }}",
    ] {
        let error = render(source).map(|text| panic!("{source} gave {text:?}")).unwrap_err();
        assert_eq!(error.code, Code::ModelMalformed, "{error}");
        assert!(error.to_string().starts_with("file: the chat template does not work: "), "{error}");
    }
}

#[test]
fn an_endless_template_ends() {
    let loops = "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}";
    assert!(render(loops).unwrap_err().to_string().contains("fuel"));
}

#[test]
fn the_source_is_found_in_each_place() {
    let dir = tempfile::tempdir().unwrap();
    let find = |config: serde_json::Value| find_source(dir.path(), &config);
    let in_file = |name: &str, text: &str| Some((dir.path().join(name).display().to_string(), text.to_owned()));
    assert_eq!(find(serde_json::Value::Null).unwrap(), None);
    assert_eq!(find(serde_json::json!({ "chat_template": "a" })).unwrap(), in_file("tokenizer_config.json", "a"));
    let named = serde_json::json!({ "chat_template": [
        { "name": "tool_use", "template": "t" }, { "name": "default", "template": "d" }
    ] });
    assert_eq!(find(named).unwrap(), in_file("tokenizer_config.json", "d"));
    for wrong in [serde_json::json!([{ "name": "x", "template": "t" }]), serde_json::json!(3), serde_json::json!([1])] {
        let error = find(serde_json::json!({ "chat_template": wrong })).unwrap_err().to_string();
        assert!(error.contains("one named \"default\""), "{error}");
    }
    std::fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(find(serde_json::json!({ "chat_template": "a" })).unwrap(), in_file("chat_template.jinja", "file"));
}
