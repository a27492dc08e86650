//! The orchestrator's gRPC API, with errors as retort's own.

use std::time::Duration;

use retort_core::{Code, Error, Result, wire::from_status};
use retort_proto::{self as proto, job_service_client::JobServiceClient, model_service_client::ModelServiceClient};
use tonic::{
    Request, Status, Streaming,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

/// Largest answer taken, bytes: a page of jobs with their reports.
const MAX_ANSWER: usize = 64 << 20;
/// A call other than a watch; creating a job may read a model's files.
const CALL_TIMEOUT: Duration = Duration::from_secs(300);

#[derive(Clone, Debug)]
pub struct Client {
    address: String,
    jobs: JobServiceClient<Channel>,
    models: ModelServiceClient<Channel>,
}

impl Client {
    /// Errors: the address is no URL; nothing answers there.
    pub async fn connect(address: &str) -> Result<Self> {
        let address = normal_address(address);
        let endpoint = Endpoint::from_shared(address.clone()).map_err(|error| {
            Error::new(Code::RequestInvalid, format!("{address:?} is no address: {error}; give http://HOST:PORT"))
        })?;
        let channel = endpoint
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(15))
            .keep_alive_while_idle(true)
            .connect()
            .await
            .map_err(|error| unreachable_at(&address, &cause(&error)))?;
        Ok(Self {
            address,
            jobs: JobServiceClient::new(channel.clone()).max_decoding_message_size(MAX_ANSWER),
            models: ModelServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER),
        })
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub async fn create_job(
        &mut self,
        spec: proto::JobSpec,
        request_id: &str,
        validate_only: bool,
    ) -> Result<proto::Job> {
        let request = proto::CreateJobRequest { spec: Some(spec), request_id: request_id.to_owned(), validate_only };
        let answer = self.jobs.create_job(call(request)).await.map_err(|status| self.explain(&status))?;
        answer.into_inner().job.ok_or_else(|| Error::internal("the orchestrator answered without a job"))
    }

    pub async fn get_job(&mut self, name: &str) -> Result<proto::Job> {
        let request = proto::GetJobRequest { name: name.to_owned() };
        self.jobs.get_job(call(request)).await.map(tonic::Response::into_inner).map_err(|status| self.explain(&status))
    }

    /// Newest first, at most `limit`.
    pub async fn list_jobs(&mut self, state: Option<proto::JobState>, limit: usize) -> Result<Vec<proto::Job>> {
        let mut jobs = Vec::new();
        let mut page_token = String::new();
        while jobs.len() < limit {
            let request = proto::ListJobsRequest {
                page_size: (limit - jobs.len()).min(200) as i32,
                page_token,
                state: state.unwrap_or_default() as i32,
            };
            let page = self.jobs.list_jobs(call(request)).await.map_err(|status| self.explain(&status))?.into_inner();
            jobs.extend(page.jobs);
            if page.next_page_token.is_empty() {
                break;
            }
            page_token = page.next_page_token;
        }
        jobs.truncate(limit);
        Ok(jobs)
    }

    pub async fn watch_job(&mut self, name: &str, after_sequence: u64) -> Result<Streaming<proto::JobEvent>> {
        let request = proto::WatchJobRequest { name: name.to_owned(), after_sequence };
        self.jobs.watch_job(request).await.map(tonic::Response::into_inner).map_err(|status| self.explain(&status))
    }

    pub async fn cancel_job(&mut self, name: &str) -> Result<proto::Job> {
        let request = proto::CancelJobRequest { name: name.to_owned() };
        self.jobs
            .cancel_job(call(request))
            .await
            .map(tonic::Response::into_inner)
            .map_err(|status| self.explain(&status))
    }

    pub async fn delete_job(&mut self, name: &str) -> Result<()> {
        let request = proto::DeleteJobRequest { name: name.to_owned() };
        self.jobs.delete_job(call(request)).await.map(|_| ()).map_err(|status| self.explain(&status))
    }

    pub async fn list_models(&mut self, limit: usize) -> Result<Vec<proto::Model>> {
        let mut models = Vec::new();
        let mut page_token = String::new();
        while models.len() < limit {
            let request = proto::ListModelsRequest { page_size: (limit - models.len()).min(1000) as i32, page_token };
            let page =
                self.models.list_models(call(request)).await.map_err(|status| self.explain(&status))?.into_inner();
            models.extend(page.models);
            if page.next_page_token.is_empty() {
                break;
            }
            page_token = page.next_page_token;
        }
        models.truncate(limit);
        Ok(models)
    }

    /// Our own error when the status carries one; a broken connection names the address.
    pub fn explain(&self, status: &Status) -> Error {
        let foreign = status.get_details_error_info().is_none();
        let error = from_status(status);
        // hyper reports a connection cut in mid-answer as INTERNAL, with the cause attached.
        let cut = foreign && std::error::Error::source(status).is_some();
        if error.code == Code::OrchestratorUnavailable || cut {
            unreachable_at(&self.address, status.message())
        } else {
            error
        }
    }
}

/// Whether two addresses reach the same orchestrator, as far as their text says.
pub fn same_address(a: &str, b: &str) -> bool {
    normal_address(a).trim_end_matches('/') == normal_address(b).trim_end_matches('/')
}

/// `host:port` is taken for `http://host:port`.
fn normal_address(address: &str) -> String {
    if address.contains("://") { address.to_owned() } else { format!("http://{address}") }
}

fn call<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

fn unreachable_at(address: &str, why: &str) -> Error {
    Error::new(
        Code::OrchestratorUnavailable,
        format!(
            "no orchestrator answers at {address} ({why}); start one with `retort up`, or name another with --address"
        ),
    )
}

/// The innermost cause: `Connection refused (os error 111)` rather than `transport error`.
fn cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_unreachable_orchestrator_is_named_with_the_way_out() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = Client::connect(&closed.to_string()).await.unwrap_err();
        assert_eq!(error.code, Code::OrchestratorUnavailable);
        assert!(error.message.contains(&format!("http://{closed}")), "{}", error.message);
        assert!(error.message.contains("retort up"), "{}", error.message);
        assert_eq!(Client::connect("http://").await.unwrap_err().code, Code::RequestInvalid);
    }

    #[test]
    fn addresses_are_compared_by_what_they_reach() {
        assert!(same_address("127.0.0.1:7474", "http://127.0.0.1:7474/"));
        assert!(!same_address("127.0.0.1:7474", "http://127.0.0.1:7475"));
    }
}
