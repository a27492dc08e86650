//! Promoted models as the object store tells of them, for when no orchestrator is up.

use retort_artifact::{Store, paths};
use retort_core::{Result, wire::timestamp_to_proto};
use retort_proto as proto;
use serde::Deserialize;

/// Largest pointer read, bytes.
const MAX_POINTER_BYTES: u64 = 64 << 10;

/// What is told of a version's pointer. Its existence makes the version exist, so one that says
/// less, or nothing that can be read, still counts.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Pointer {
    /// Its id alone.
    job: String,
    folder: String,
    promote_ms: Option<i64>,
    quality: Option<Quality>,
}

/// Numbers that are not finite are written as null.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Quality {
    kl: Option<f64>,
    top1_agreement: Option<f64>,
    student_perplexity: Option<f64>,
    teacher_perplexity: Option<f64>,
    tokens: u64,
    calibration_error: Option<f64>,
    teacher_calibration_error: Option<f64>,
}

/// Every promoted model, at most `limit`: by name, the newest version of each first, as the
/// orchestrator lists them.
pub async fn list(store: &Store, limit: usize) -> Result<Vec<proto::Model>> {
    let mut versions: Vec<(String, u32, String)> =
        store.list(&paths::models_prefix()).await?.into_iter().filter_map(|entry| version(entry.key)).collect();
    versions.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
    versions.truncate(limit);
    let mut models = Vec::new();
    for (name, version, key) in versions {
        let pointer = store.get(&key, MAX_POINTER_BYTES).await?;
        models.push(model(&name, version, serde_json::from_slice(&pointer).unwrap_or_default()));
    }
    Ok(models)
}

/// Name and version of a pointer's key; `None` for every other key.
fn version(key: String) -> Option<(String, u32, String)> {
    let name = key.split('/').nth(1)?.to_owned();
    let version = key.rsplit('/').next()?.strip_suffix(".json")?.parse().ok()?;
    (key == paths::model_version(&name, version)).then_some((name, version, key))
}

fn model(name: &str, version: u32, pointer: Pointer) -> proto::Model {
    let number = |number: Option<f64>| number.unwrap_or(f64::NAN);
    proto::Model {
        name: format!("models/{name}/versions/{version}"),
        job: if pointer.job.is_empty() { String::new() } else { format!("jobs/{}", pointer.job) },
        create_time: pointer.promote_ms.map(timestamp_to_proto),
        key: if pointer.folder.is_empty() { paths::model_folder(name, version) } else { pointer.folder },
        quality: pointer.quality.map(|quality| proto::Quality {
            kl: number(quality.kl),
            top1_agreement: number(quality.top1_agreement),
            student_perplexity: number(quality.student_perplexity),
            teacher_perplexity: number(quality.teacher_perplexity),
            tokens: quality.tokens,
            calibration_error: quality.calibration_error,
            teacher_calibration_error: quality.teacher_calibration_error,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lists_pointers_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().display().to_string()).unwrap();
        let pointer = r#"{"name":"b","version":2,"job":"0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4","folder":"models/b/000002/",
            "teacher":"/t","promote_ms":1800000000000,"quality":{"kl":0.5,"top1_agreement":0.75,
            "student_perplexity":null,"teacher_perplexity":3.5,"tokens":7}}"#;
        for (key, text) in [
            ("models/b/versions/000002.json", pointer),
            ("models/b/versions/000010.json", "no JSON"),
            ("models/a/versions/000001.json", "{}"),
            ("models/a/000001/config.json", "{}"),
            ("models/a/versions/1.json", "{}"),
            ("jobs/j/report.json", "{}"),
        ] {
            store.put_new(key, text.as_bytes().to_vec().into()).await.unwrap();
        }
        let models = list(&store, 10).await.unwrap();
        let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
        assert_eq!(names, ["models/a/versions/1", "models/b/versions/10", "models/b/versions/2"]);
        assert_eq!((models[1].quality, models[1].key.as_str()), (None, "models/b/000010/"));
        let told = &models[2];
        assert_eq!(told.job, "jobs/0198c1d2e3f4a5b6c7d8e9f0a1b2c3d4");
        assert_eq!(told.create_time.map(|time| time.seconds), Some(1_800_000_000));
        let quality = told.quality.unwrap();
        assert_eq!((quality.kl, quality.teacher_perplexity, quality.tokens), (0.5, 3.5, 7));
        assert!(quality.student_perplexity.is_nan());
        assert_eq!(list(&store, 1).await.unwrap().len(), 1);
    }
}
