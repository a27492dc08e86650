//! What the rows of a prompt set say of their target tokens' weights in training.

use std::{path::PathBuf, sync::Arc};

use retort_artifact::prompts::Row;
use retort_core::{Code, Error, Result, spec::TeacherMode};
use retort_llama::Tokenizer;

use crate::{example::Example, failure::llama, init::Teacher};

/// Weights by line of the prompt set.
pub struct RowWeights {
    prompts: Arc<Vec<Row>>,
    /// Pieces are of given completions: where the teacher writes, they mean nothing.
    mode: TeacherMode,
    teacher: PathBuf,
    /// Read for the first row that has pieces.
    tokenizer: Option<Arc<Tokenizer>>,
}

impl RowWeights {
    pub fn new(prompts: Arc<Vec<Row>>, mode: TeacherMode, teacher: &Teacher) -> Self {
        Self { prompts, mode, teacher: teacher.folder.clone(), tokenizer: None }
    }

    /// The row of this line, whose target tokens weigh as much as its prompt set says.
    pub async fn weigh(&mut self, line: u64, example: Example) -> Result<Example> {
        let prompts = Arc::clone(&self.prompts);
        let line = usize::try_from(line).unwrap_or(usize::MAX);
        let Some(row) = prompts.get(line) else { return Ok(example) };
        if row.pieces.is_empty() || self.mode == TeacherMode::Generate {
            let weights = vec![row.weight; example.targets.len()];
            return Ok(example.weighing(&weights));
        }
        let tokenizer = match &self.tokenizer {
            Some(tokenizer) => Arc::clone(tokenizer),
            None => Arc::clone(self.tokenizer.insert(Arc::new(open(self.teacher.clone()).await?))),
        };
        // Reads the row's tokens back, of which there may be a hundred thousand.
        let weigh = move || {
            let weights = of_pieces(&tokenizer, &prompts[line], &example);
            weights.map(|weights| example.weighing(&weights))
        };
        let weighed = tokio::task::spawn_blocking(weigh).await;
        weighed.map_err(|error| Error::internal(format!("weighing a row's tokens failed: {error}")))?
    }
}

async fn open(teacher: PathBuf) -> Result<Tokenizer> {
    let opened = tokio::task::spawn_blocking(move || Tokenizer::from_dir(&teacher)).await;
    opened.map_err(|error| Error::internal(format!("reading the teacher's tokenizer failed: {error}")))?.map_err(llama)
}

/// Weight of each target token: that of the piece in which it begins.
fn of_pieces(tokenizer: &Tokenizer, row: &Row, example: &Example) -> Result<Vec<f64>> {
    let ids: Vec<u32> = (0..example.targets.len()).map(|p| example.label(p)).collect();
    let completion = row.completion.as_deref().unwrap_or_default();
    let starts = tokenizer.starts_in(&ids, completion).map_err(llama)?.ok_or_else(|| {
        let message = format!(
            "row {:?}: its target tokens do not spell its \"completion\", so that its pieces cannot be told apart; give it \
             as one text",
            row.id
        );
        Error::new(Code::PromptMalformed, message)
    })?;
    Ok(starts.into_iter().map(|start| row.weight_at(start)).collect())
}

#[cfg(test)]
mod tests {
    use retort_artifact::{prompts, soft_targets::SparseTargets};

    use super::*;
    use crate::{example::tests::example, init::tests::tiny_teacher};

    /// Of these token ids, the first two of them the prompt's; a token of id 3 reads `w3`.
    fn row(ids: &[u32]) -> Example {
        Example { token_ids: ids.to_vec(), ..example(1, 2, ids.len() - 2, 4, 40) }
    }

    fn weights(completion: &str, mode: TeacherMode) -> (tempfile::TempDir, RowWeights) {
        let folder = tempfile::tempdir().unwrap();
        let teacher = tiny_teacher(folder.path(), 1, 40);
        let line = format!(r#"{{"messages":[{{"role":"user","content":"x"}}],"weight":2,"completion":{completion}}}"#);
        let rows = prompts::parse("p", line.as_bytes()).unwrap();
        let weights = RowWeights::new(Arc::new(rows), mode, &teacher);
        (folder, weights)
    }

    const PIECES: &str = r#"[{"text":"w3 w4","weight":0},{"text":" w5","weight":2.5},{"text":" w6 w7"}]"#;

    #[tokio::test]
    async fn a_token_weighs_what_the_piece_weighs_that_it_begins_in() {
        let (_folder, mut weights) = weights(PIECES, TeacherMode::Score);
        // The end token has the last piece's.
        let weighed = weights.weigh(0, row(&[8, 9, 3, 4, 5, 6, 7, 1])).await.unwrap();
        assert_eq!((&weighed.targets[..], &weighed.weights[..]), (&[4, 5, 6, 7][..], &[5.0, 2.0, 2.0, 2.0][..]));
        weighed.check(40).unwrap();
        // A second row finds the tokenizer read.
        assert_eq!(weights.weigh(0, row(&[9, 3, 4, 5, 6, 7])).await.unwrap_err().code, Code::PromptMalformed);
        assert_eq!(weights.weigh(0, row(&[8, 9, 3, 4, 5, 6, 7])).await.unwrap().weights, [5.0, 2.0, 2.0]);
    }

    #[tokio::test]
    async fn pieces_mean_nothing_where_the_teacher_writes_and_where_all_weigh_one() {
        let own = row(&[8, 9, 30, 31, 1]);
        let (_folder, mut generated) = weights(PIECES, TeacherMode::Generate);
        assert_eq!(generated.weigh(0, own.clone()).await.unwrap(), own.clone().weighing(&[2.0; 3]));
        let (_folder, mut plain) = weights(r#"[{"text":"w3"},{"text":" w4","weight":1}]"#, TeacherMode::Score);
        assert_eq!(plain.weigh(0, own.clone()).await.unwrap(), own.clone().weighing(&[2.0; 3]));
        let (_folder, mut masked) = weights(r#"[{"text":"w30 w31","weight":0}]"#, TeacherMode::Score);
        let none = masked.weigh(0, own).await.unwrap();
        assert_eq!((none.targets.len(), none.support), (0, SparseTargets { offsets: vec![0], ..Default::default() }));
    }
}
