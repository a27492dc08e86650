//! Prompt files and specs of the tests.

use std::path::Path;

/// `train + held_out` short prompts, no two alike.
pub fn jsonl(train: usize, held_out: usize) -> String {
    let subjects = ["parcel", "invoice", "password", "router", "booking", "refund", "ladder", "kettle"];
    let verbs = ["find", "return", "change", "repair", "cancel", "explain", "track", "compare"];
    (0..train + held_out)
        .map(|n| {
            let split = if n < train { "train" } else { "held_out" };
            let (verb, subject) = (verbs[n % 8], subjects[(n / 8) % 8]);
            serde_json::json!({
                "id": format!("p{n}"),
                "messages": [{"role": "user", "content": format!("Case {n}: please {verb} the {subject} of order {}", 1000 + 37 * n)}],
                "tags": [subject],
                "split": split,
            })
            .to_string()
                + "\n"
        })
        .collect()
}

/// A spec beside `prompts.jsonl` in `folder`, with the teacher given.
pub fn spec(folder: &Path, teacher: &Path, shape: &Shape) -> std::path::PathBuf {
    std::fs::write(folder.join("prompts.jsonl"), jsonl(shape.train, shape.held_out)).expect("the prompts");
    let text = format!(
        "name: {name}\nseed: 5\n\
         prompts: {{path: prompts.jsonl, shard_rows: {rows}}}\n\
         teacher:\n  model: {teacher}\n  sampling: {{temperature: 1.0, top_p: 1.0, max_new_tokens: {tokens}}}\n\
         student:\n  init: {{prune: {{layers: 2}}}}\n\
         train: {{passes: {passes}, batch_rows: 4, learning_rate: 0.001, checkpoint_steps: 5}}\n\
         gates: {{max_kl: 100}}\n",
        name = shape.name,
        rows = shape.shard_rows,
        teacher = teacher.display(),
        tokens = shape.tokens,
        passes = shape.passes,
    );
    let path = folder.join("job.yaml");
    std::fs::write(&path, text).expect("the spec");
    path
}

/// Sizes of a test's job.
#[derive(Clone, Debug)]
pub struct Shape {
    pub name: &'static str,
    pub train: usize,
    pub held_out: usize,
    pub shard_rows: usize,
    pub tokens: usize,
    pub passes: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Self { name: "tiny", train: 80, held_out: 8, shard_rows: 4, tokens: 48, passes: 2 }
    }
}
