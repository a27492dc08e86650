//! Crossing between tensors, the host and our errors.

use retort_core::{Code, Error, Result};
use tch::{Kind, TchError, Tensor};

/// libtorch refused an operation. Its message carries a C++ trace; the first line says it all.
pub(crate) fn torch(error: TchError) -> Error {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or("no message");
    if text.contains("out of memory") || text.contains("can't allocate memory") {
        Error::new(
            Code::DeviceUnavailable,
            format!("out of memory on the device: {first}; use fewer rows a shard or a smaller dtype"),
        )
    } else {
        Error::internal(format!("libtorch: {first}"))
    }
}

/// What went wrong inside the model crate, in the words the rest of the system knows.
pub(crate) fn model(error: impl Into<retort_llama::Error>) -> Error {
    use retort_llama::Error as Llama;
    let error = error.into();
    if error.is_disk_full() {
        return Error::new(Code::DiskFull, error.to_string());
    }
    let code = match error {
        Llama::Torch(error) => return torch(error),
        Llama::Folder(error) => return error,
        Llama::NotFound { .. } => Code::FileNotFound,
        Llama::Io { .. } => Code::FileUnreadable,
        Llama::Malformed { .. } => Code::ModelMalformed,
        Llama::Unsupported { .. } => Code::ModelUnsupported,
        Llama::TooLong(_) => Code::PromptTooLong,
        Llama::Device(_) => Code::DeviceUnavailable,
        _ => Code::Internal,
    };
    Error::new(code, error.to_string())
}

/// A tensor's numbers in row-major order.
pub(crate) fn host_f32(tensor: &Tensor) -> Result<Vec<f32>> {
    let flat = tensor.f_to_kind(Kind::Float).and_then(|t| t.f_flatten(0, -1)).map_err(torch)?;
    Vec::<f32>::try_from(&flat).map_err(torch)
}

/// As [`host_f32`], of an integer tensor.
pub(crate) fn host_i64(tensor: &Tensor) -> Result<Vec<i64>> {
    let flat = tensor.f_to_kind(Kind::Int64).and_then(|t| t.f_flatten(0, -1)).map_err(torch)?;
    Vec::<i64>::try_from(&flat).map_err(torch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_template_is_the_models_fault_and_a_refusal_the_prompts() {
        let folder = tempfile::tempdir().unwrap();
        let message = [retort_llama::ChatMessage::new("user", "hi")];
        let code = |source: &str| {
            let template = retort_llama::ChatTemplate::compile("chat_template.jinja", source, Vec::new(), None);
            let error = model(template.and_then(|template| template.render(&message, true)).unwrap_err());
            (error.code, error.message.starts_with("chat_template.jinja: "))
        };
        assert_eq!(code("{% endif %}"), (Code::ModelMalformed, true));
        assert_eq!(code("{{ nothing.more }}"), (Code::ModelMalformed, true));
        assert_eq!(code("{{ raise_exception('a system turn first') }}"), (Code::PromptMalformed, false));
        let missing = retort_llama::Tokenizer::from_dir(folder.path()).unwrap_err();
        assert_eq!(model(missing).code, Code::FileNotFound);
    }
}
