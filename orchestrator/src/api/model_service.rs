use retort_core::{Code, Error, Result};
use retort_proto::{self as proto, model_service_server::ModelService};
use tonic::{Request, Response, Status};

use super::{invalid, paging, refuse};
use crate::{context::Context, database::models, to_proto::model_to_proto};

pub struct Models {
    context: Context,
}

impl Models {
    pub fn new(context: Context) -> Self {
        Self { context }
    }

    async fn list(&self, request: proto::ListModelsRequest) -> Result<proto::ListModelsResponse> {
        let size = paging::size(request.page_size)?;
        let after = paging::after("models", &request.page_token)?;
        let after = after.as_deref().map(parse_name).transpose()?;
        let after = after.as_ref().map(|(name, version)| (*name, version.unwrap_or(0)));
        let mut found = models::list(&mut *self.context.database.read().await?, after, size + 1).await?;
        let more = found.len() > size as usize;
        found.truncate(size as usize);
        let next_page_token = match found.last() {
            Some(last) if more => paging::token("models", &last.resource_name()),
            _ => String::new(),
        };
        Ok(proto::ListModelsResponse { models: found.iter().map(model_to_proto).collect(), next_page_token })
    }

    async fn get(&self, name: &str) -> Result<proto::Model> {
        let (model, version) = parse_name(name)?;
        let found = models::find(&mut *self.context.database.read().await?, model, version).await?;
        found.as_ref().map(model_to_proto).ok_or_else(|| {
            let shown: String = name.chars().take(200).collect();
            Error::new(Code::ModelNotFound, format!("there is no {shown}; `retort model list` shows those there are"))
        })
    }
}

#[tonic::async_trait]
impl ModelService for Models {
    async fn list_models(
        &self,
        request: Request<proto::ListModelsRequest>,
    ) -> Result<Response<proto::ListModelsResponse>, Status> {
        self.list(request.into_inner()).await.map(Response::new).map_err(refuse)
    }

    async fn get_model(&self, request: Request<proto::GetModelRequest>) -> Result<Response<proto::Model>, Status> {
        self.get(&request.into_inner().name).await.map(Response::new).map_err(refuse)
    }
}

/// `models/{model}`, or `models/{model}/versions/{version}`.
fn parse_name(name: &str) -> Result<(&str, Option<u32>)> {
    let parts: Vec<&str> = name.split('/').collect();
    let parsed = match parts.as_slice() {
        ["models", model] if !model.is_empty() => Some((*model, None)),
        ["models", model, "versions", version] if !model.is_empty() => {
            version.parse().ok().map(|version| (*model, Some(version)))
        }
        _ => None,
    };
    parsed.ok_or_else(|| {
        let shown: String = name.chars().take(80).collect();
        invalid(format!("{shown:?} is no model: write models/NAME, or models/NAME/versions/NUMBER"))
    })
}
