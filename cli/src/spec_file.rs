//! A spec file as the orchestrator wants it: parsed, valid, its paths absolute.

use std::path::{Path, PathBuf};

use retort_core::{
    Code, Error, Result,
    spec::{Init, JobSpec, parse_yaml},
};

/// Longest spec read, bytes; the parser refuses earlier, with the limit in its message.
const MAX_BYTES: u64 = 2 << 20;

/// Reads a YAML spec; paths in it are relative to its own folder, `~/` is the user's, and a model may
/// be the name of a folder in `$RETORT_MODELS`.
pub fn read(path: &Path) -> Result<JobSpec> {
    use std::io::Read as _;
    let io = |error| Error::io(path, error);
    let mut text = Vec::new();
    std::fs::File::open(path).map_err(io)?.take(MAX_BYTES).read_to_end(&mut text).map_err(io)?;
    let text = String::from_utf8(text).map_err(|error| {
        Error::new(
            Code::SpecMalformed,
            format!("{}: byte {} is not UTF-8", path.display(), error.utf8_error().valid_up_to()),
        )
    })?;
    let mut spec = parse_yaml(&path.display().to_string(), &text)?;
    let folder = std::path::absolute(path).map_err(io)?.parent().map(Path::to_owned).unwrap_or_default();
    for field in models(&mut spec) {
        if let Some(known) = imported(field) {
            *field = known;
        }
    }
    for field in paths(&mut spec) {
        *field = absolute(&folder, field);
    }
    Ok(spec)
}

/// Errors: a file or folder that the spec names is not on this machine. For jobs that will run on
/// it, so that nothing is started in vain.
pub fn check_files(spec: &JobSpec) -> Result<()> {
    let mut spec = spec.clone();
    for field in paths(&mut spec) {
        let local = match url::Url::parse(field) {
            Ok(url) if url.scheme() == "file" => url.to_file_path().ok(),
            Ok(_) => None,
            Err(_) => Some(PathBuf::from(field.as_str())),
        };
        if let Some(path) = local {
            std::fs::metadata(&path).map_err(|error| Error::io(&path, error))?;
        }
    }
    Ok(())
}

fn paths(spec: &mut JobSpec) -> Vec<&mut String> {
    let mut paths = vec![&mut spec.prompts.path, &mut spec.teacher.model];
    if let Init::Checkpoint { model } = &mut spec.student.init {
        paths.push(model);
    }
    paths
}

fn models(spec: &mut JobSpec) -> Vec<&mut String> {
    let mut models = vec![&mut spec.teacher.model];
    if let Init::Checkpoint { model } = &mut spec.student.init {
        models.push(model);
    }
    models
}

/// The folder of this name in `$RETORT_MODELS`, when there is one.
pub(crate) fn imported(name: &str) -> Option<String> {
    if name.contains('/') || name.starts_with('.') {
        return None;
    }
    let folder = PathBuf::from(std::env::var_os("RETORT_MODELS")?).join(name);
    folder.join("config.json").exists().then(|| folder.display().to_string())
}

fn absolute(folder: &Path, path: &str) -> String {
    if path.contains("://") {
        return path.to_owned();
    }
    let path = match (path.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => folder.join(path),
    };
    // Keeps links as they are and needs no file to exist.
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                clean.pop();
            }
            std::path::Component::CurDir => {}
            part => clean.push(part),
        }
    }
    clean.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: &str = "name: support\nprompts: { path: ../prompts.jsonl }\nteacher: { model: file:///models/big }\n\
                        student: { init: { checkpoint: { model: ./small } } }\n";

    #[test]
    fn paths_are_relative_to_the_specs_folder() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("jobs/job.yaml");
        std::fs::create_dir(folder.path().join("jobs")).unwrap();
        std::fs::write(&at, SPEC).unwrap();
        let spec = read(&at).unwrap();
        assert_eq!(spec.prompts.path, folder.path().join("prompts.jsonl").display().to_string());
        assert_eq!(spec.teacher.model, "file:///models/big");
        assert_eq!(
            spec.student.init,
            Init::Checkpoint { model: folder.path().join("jobs/small").display().to_string() }
        );
        let error = check_files(&spec).unwrap_err();
        assert_eq!(error.code, Code::FileNotFound);
        assert!(error.message.contains("prompts.jsonl"), "{}", error.message);
    }

    #[test]
    fn a_file_that_is_not_there_or_not_text_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = read(&folder.path().join("no.yaml")).unwrap_err();
        assert_eq!((missing.code, missing.message.contains("no.yaml")), (Code::FileNotFound, true));
        let binary = folder.path().join("binary.yaml");
        std::fs::write(&binary, b"name: \xff").unwrap();
        let error = read(&binary).unwrap_err();
        assert_eq!(error.code, Code::SpecMalformed);
        assert!(error.message.contains("byte 6"), "{}", error.message);
    }
}
