//! Which requests the broker answers, and who answers them.
//!
//! Only what retort's clients and the usual command line tools send. Absent on purpose:
//! transactions and idempotent producers (their state dies with the data folder and then fails
//! producers for good), deleting topics and records, changing configurations, users and ACLs.
//! Several of those reach unfinished code in tansu, and a panic there stops the storage.

use std::sync::Arc;

use rama::{Context, Layer as _, Service, layer::MapErrLayer, layer::MapStateLayer};
use tansu_broker::{Error, Result, service};
use tansu_sans_io::{
    ApiKey as _, CreateTopicsRequest, CreateTopicsResponse, ErrorCode, FetchRequest, Frame, Header, ProduceRequest,
    create_topics_request::CreatableTopic, create_topics_response::CreatableTopicResult,
};
use tansu_service::{BytesFrameLayer, BytesFrameService, FrameRequestLayer, FrameRouteService};
use tansu_storage::{CreateTopicsService, ProduceService, Storage, TopicId};
use tokio_util::sync::CancellationToken;

use crate::{arrivals::Arrivals, coordinator::Groups, fetch::Fetch};

/// Most partitions of a topic; each costs a row and a query a fetch.
const MAX_PARTITIONS: i32 = 256;
const MAX_TOPIC_NAME: usize = 249;

/// Takes one request frame (its length included) and answers one.
pub(crate) type Requests = BytesFrameService<FrameRouteService<(), Error>>;

pub(crate) fn requests<S: Storage>(
    storage: S,
    groups: Groups<S>,
    arrivals: Arrivals,
    shutdown: CancellationToken,
) -> Result<Requests> {
    let builder = FrameRouteService::<(), Error>::builder();
    let builder = service::storage::metadata(builder, storage.clone())?;
    let builder = service::storage::find_coordinator(builder, storage.clone())?;
    let builder = service::storage::list_offsets(builder, storage.clone())?;
    let builder = service::storage::describe_cluster(builder, storage.clone())?;
    let builder = service::coordinator::services(builder, groups)?;
    let produce = (
        MapErrLayer::new(Error::from),
        MapStateLayer::new({
            let storage = storage.clone();
            move |()| storage
        }),
        FrameRequestLayer::<ProduceRequest>::new(),
    )
        .into_layer(ProduceService);
    let route = builder
        .with_route(ProduceRequest::KEY, Announcing { inner: Arc::new(produce), arrivals: arrivals.clone() }.boxed())?
        .with_route(CreateTopicsRequest::KEY, CreateTopics { storage: storage.clone() }.boxed())?
        .with_route(FetchRequest::KEY, Fetch { storage, arrivals, shutdown }.boxed())?
        .build()?;
    Ok(BytesFrameLayer::default().into_layer(route))
}

/// Wakes waiting fetches once records are stored.
struct Announcing<P> {
    inner: Arc<P>,
    arrivals: Arrivals,
}

impl<P> Service<(), Frame> for Announcing<P>
where
    P: Service<(), Frame, Response = Frame, Error = Error>,
{
    type Response = Frame;
    type Error = Error;

    async fn serve(&self, context: Context<()>, request: Frame) -> Result<Frame> {
        let topics: Vec<String> = match &request.body {
            tansu_sans_io::Body::ProduceRequest(produce) => {
                produce.topic_data.iter().flatten().map(|topic| topic.name.clone()).collect()
            }
            _ => Vec::new(),
        };
        let response = self.inner.serve(context, request).await;
        for topic in topics {
            self.arrivals.announce(&topic);
        }
        response
    }
}

/// Creates topics. What tansu would take minutes for, or complain about in the log, is answered here.
struct CreateTopics<S> {
    storage: S,
}

impl<S: Storage> Service<(), Frame> for CreateTopics<S> {
    type Response = Frame;
    type Error = Error;

    async fn serve(&self, _: Context<()>, request: Frame) -> Result<Frame> {
        let correlation_id = request.correlation_id()?;
        let request = CreateTopicsRequest::try_from(request.body)?;
        let (mut wanted, mut results) = (Vec::new(), Vec::new());
        for topic in request.topics.unwrap_or_default() {
            match self.refuse(&topic).await? {
                Some(error) => results.push(refused(&topic, error)),
                None => wanted.push(topic),
            }
        }
        if !wanted.is_empty() {
            let storage = self.storage.clone();
            let service = MapStateLayer::new(move |()| storage).into_layer(CreateTopicsService);
            let request = CreateTopicsRequest::default()
                .topics(Some(wanted))
                .timeout_ms(request.timeout_ms)
                .validate_only(request.validate_only);
            results.extend(service.serve(Context::default(), request).await?.topics.unwrap_or_default());
        }
        let body = CreateTopicsResponse::default().throttle_time_ms(Some(0)).topics(Some(results)).into();
        Ok(Frame { size: 0, header: Header::Response { correlation_id }, body })
    }
}

impl<S: Storage> CreateTopics<S> {
    async fn refuse(&self, topic: &CreatableTopic) -> Result<Option<ErrorCode>> {
        let name = &topic.name;
        let valid_name = (1..=MAX_TOPIC_NAME).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
            && name != "."
            && name != "..";
        if !valid_name {
            return Ok(Some(ErrorCode::InvalidTopicException));
        }
        if topic.num_partitions != -1 && !(1..=MAX_PARTITIONS).contains(&topic.num_partitions) {
            return Ok(Some(ErrorCode::InvalidPartitions));
        }
        let metadata = self.storage.metadata(Some(&[TopicId::from(name.as_str())])).await?;
        let exists = metadata.topics().iter().any(|topic| topic.error_code == i16::from(ErrorCode::None));
        Ok(exists.then_some(ErrorCode::TopicAlreadyExists))
    }
}

fn refused(topic: &CreatableTopic, error: ErrorCode) -> CreatableTopicResult {
    CreatableTopicResult::default()
        .name(topic.name.clone())
        .topic_id(Some([0; 16]))
        .error_code(error.into())
        .error_message(Some(error.to_string()))
        .topic_config_error_code(None)
        .num_partitions(Some(topic.num_partitions))
        .replication_factor(Some(topic.replication_factor))
        .configs(Some(Vec::new()))
}
