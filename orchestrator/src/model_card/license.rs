//! The teacher's license, as the card in its own folder says it.

use std::path::Path;

use tokio::io::AsyncReadExt as _;

use crate::admission::local_path;

/// Of a card that is read, bytes.
const MAX_BYTES: u64 = 64 << 10;

/// `None` where there is no card, or none that says it plainly.
pub(super) async fn of_folder(teacher: &str) -> Option<String> {
    let path = local_path("teacher.model", teacher).ok()?.join("README.md");
    in_card(&read(&path).await?)
}

async fn read(path: &Path) -> Option<String> {
    let file = tokio::fs::File::open(path).await.ok()?;
    if !file.metadata().await.ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).await.ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// `license:` of the front matter, where it is a plain identifier.
fn in_card(card: &str) -> Option<String> {
    let mut lines = card.lines();
    if lines.next()?.trim_end() != "---" {
        return None;
    }
    let value = lines.take_while(|line| line.trim_end() != "---").find_map(|line| line.strip_prefix("license:"))?;
    let value = value.trim().trim_matches(['"', '\'']);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
    ((1..=64).contains(&value.len()) && value.chars().all(plain)).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_stands_in_the_teachers_folder() {
        let folder = tempfile::tempdir().unwrap();
        let teacher = folder.path().display().to_string();
        assert_eq!(of_folder(&teacher).await, None);
        std::fs::write(folder.path().join("README.md"), "---\nlicense: mit\n---\n").unwrap();
        assert_eq!(of_folder(&teacher).await.as_deref(), Some("mit"));
        assert_eq!(of_folder(&format!("file://{teacher}")).await.as_deref(), Some("mit"));
        assert_eq!(of_folder("relative").await, None);
    }

    #[test]
    fn only_a_plain_identifier_counts() {
        let card = |line: &str| in_card(&format!("---\nlanguage: en\n{line}\n---\nlicense: mit\n"));
        assert_eq!(card("license: apache-2.0").as_deref(), Some("apache-2.0"));
        assert_eq!(card("license: \"llama3.1\"").as_deref(), Some("llama3.1"));
        for line in
            ["license:", "license: [mit]", "license: a b", "license: \"x\\n\"", "  license: mit", "licence: mit"]
        {
            assert_eq!(card(line), None, "{line}");
        }
        assert_eq!(in_card("license: mit\n"), None);
    }
}
