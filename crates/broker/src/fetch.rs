//! Fetching records.
//!
//! Replaces tansu's service, for three reasons: asked for a topic that is not there, tansu's
//! storage task panics and with it the broker; asked beyond the log's end it answers nothing, for
//! ever, where Kafka says that the offset is out of range; and it holds even a full answer back
//! for half of the waiting time.
//!
//! A request to tansu's storage must never be cancelled once it is sent: its storage task ends
//! when it cannot deliver an answer. Only waiting is cut short here.

use std::time::Duration;

use futures::future::{FutureExt as _, select_all};
use rama::{Context, Service};
use tansu_broker::Error;
use tansu_sans_io::{
    ErrorCode, FetchRequest, FetchResponse, Frame, Header, IsolationLevel,
    fetch_request::{FetchPartition, FetchTopic},
    fetch_response::{FetchableTopicResponse, PartitionData},
    record::deflated,
};
use tansu_storage::{Storage, TopicId, Topition};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{arrivals::Arrivals, server::MAX_FRAME_BYTES};

/// Most record bytes of one answer.
const MAX_BYTES: u32 = 4 << 20;
/// Longest that a fetch may wait for records.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// Answers Fetch, waiting for records when there are too few.
#[derive(Clone, Debug)]
pub(crate) struct Fetch<S> {
    pub(crate) storage: S,
    pub(crate) arrivals: Arrivals,
    pub(crate) shutdown: CancellationToken,
}

impl<S: Storage> Service<(), Frame> for Fetch<S> {
    type Response = Frame;
    type Error = Error;

    async fn serve(&self, _: Context<()>, request: Frame) -> Result<Frame, Error> {
        let correlation_id = request.correlation_id()?;
        let response = self.fetch(FetchRequest::try_from(request.body)?).await?;
        Ok(Frame { size: 0, header: Header::Response { correlation_id }, body: response.into() })
    }
}

impl<S: Storage> Fetch<S> {
    async fn fetch(&self, request: FetchRequest) -> Result<FetchResponse, Error> {
        let wait = Duration::from_millis(u64::try_from(request.max_wait_ms).unwrap_or(0)).min(MAX_WAIT);
        let deadline = Instant::now() + wait;
        let min_bytes = u32::try_from(request.min_bytes).unwrap_or(0).min(MAX_BYTES);
        let max_bytes =
            request.max_bytes.map_or(MAX_BYTES, |bytes| u32::try_from(bytes).unwrap_or(MAX_BYTES).clamp(1, MAX_BYTES));
        let isolation = IsolationLevel::try_from(request.isolation_level.unwrap_or(0))?;
        let topics = request.topics.unwrap_or_default();
        let mut named = Vec::with_capacity(topics.len());
        for topic in topics {
            let known = self.known(&topic).await?;
            named.push((topic, known));
        }
        let mut arrivals: Vec<watch::Receiver<()>> =
            named.iter().filter_map(|(_, known)| known.as_ref().map(|k| self.arrivals.subscribe(&k.name))).collect();
        loop {
            for arrival in &mut arrivals {
                arrival.mark_unchanged();
            }
            let read = self.read(&named, max_bytes, isolation).await?;
            let enough = read.bytes >= min_bytes.max(1) || read.failed || arrivals.is_empty();
            if enough || !self.more_before(deadline, &mut arrivals).await {
                return Ok(FetchResponse::default()
                    .throttle_time_ms(Some(0))
                    .error_code(Some(ErrorCode::None.into()))
                    .session_id(Some(0))
                    .node_endpoints(Some(Vec::new()))
                    .responses(Some(read.topics)));
            }
        }
    }

    /// Whether records arrived before the deadline.
    async fn more_before(&self, deadline: Instant, arrivals: &mut [watch::Receiver<()>]) -> bool {
        let any = select_all(arrivals.iter_mut().map(|arrival| arrival.changed().boxed()));
        tokio::select! {
            _ = any => true,
            () = tokio::time::sleep_until(deadline) => false,
            () = self.shutdown.cancelled() => false,
        }
    }

    /// The topic's name and shape, `None` when it does not exist.
    async fn known(&self, topic: &FetchTopic) -> Result<Option<Known>, Error> {
        let id = match (&topic.topic, topic.topic_id) {
            (Some(name), _) if !name.is_empty() => TopicId::from(name.as_str()),
            (_, Some(id)) => TopicId::from(id),
            _ => return Ok(None),
        };
        let metadata = self.storage.metadata(Some(&[id])).await?;
        Ok(metadata.topics().first().and_then(|found| {
            let exists = found.error_code == i16::from(ErrorCode::None);
            let partitions = found.partitions.as_ref().map_or(0, Vec::len);
            found.name.clone().filter(|_| exists).map(|name| Known { name, id: found.topic_id, partitions })
        }))
    }

    async fn read(
        &self,
        topics: &[(FetchTopic, Option<Known>)],
        max_bytes: u32,
        isolation: IsolationLevel,
    ) -> Result<Read, Error> {
        let mut read = Read { topics: Vec::with_capacity(topics.len()), bytes: 0, failed: false };
        for (topic, known) in topics {
            let mut partitions = Vec::new();
            for wanted in topic.partitions.iter().flatten() {
                let data = match known {
                    None if topic.topic.as_ref().is_some_and(|name| !name.is_empty()) => {
                        failed(wanted.partition, ErrorCode::UnknownTopicOrPartition)
                    }
                    None => failed(wanted.partition, ErrorCode::UnknownTopicId),
                    Some(known) => {
                        let budget = max_bytes.saturating_sub(read.bytes);
                        self.partition(known, wanted, (budget, max_bytes), isolation).await?
                    }
                };
                read.failed |= data.error_code != i16::from(ErrorCode::None);
                read.bytes = read.bytes.saturating_add(data.records.as_ref().map_or(0, |frame| size(&frame.batches)));
                partitions.push(data);
            }
            read.topics.push(
                FetchableTopicResponse::default()
                    .topic(topic.topic.clone())
                    .topic_id(known.as_ref().and_then(|known| known.id).or(topic.topic_id).or(Some([0; 16])))
                    .partitions(Some(partitions)),
            );
        }
        Ok(read)
    }

    async fn partition(
        &self,
        known: &Known,
        wanted: &FetchPartition,
        (budget, max_bytes): (u32, u32),
        isolation: IsolationLevel,
    ) -> Result<PartitionData, Error> {
        let index = wanted.partition;
        if usize::try_from(index).map_or(true, |index| index >= known.partitions) {
            return Ok(failed(index, ErrorCode::UnknownTopicOrPartition));
        }
        let topition = Topition::new(known.name.as_str(), index);
        let stage = self.storage.offset_stage(&topition).await?;
        let offset = wanted.fetch_offset;
        if offset < stage.log_start() || offset > stage.high_watermark() {
            return Ok(data(index, ErrorCode::OffsetOutOfRange)
                .high_watermark(stage.high_watermark())
                .last_stable_offset(Some(stage.last_stable()))
                .log_start_offset(Some(stage.log_start())));
        }
        let limit = u32::try_from(wanted.partition_max_bytes).unwrap_or(0).min(budget);
        let mut batches = Vec::new();
        if offset < stage.high_watermark() && limit > 0 {
            batches = self.storage.fetch(&topition, offset, 1, limit, isolation).await?;
            batches.retain(|batch| batch.record_count > 0);
            if batches.is_empty() && budget == max_bytes {
                // A record over the client's limit still comes, alone or in small company.
                batches = self.storage.fetch(&topition, offset, 1, MAX_FRAME_BYTES + 1, isolation).await?;
                batches.retain(|batch| batch.record_count > 0);
            }
        }
        Ok(data(index, ErrorCode::None)
            .high_watermark(stage.high_watermark())
            .last_stable_offset(Some(stage.last_stable()))
            .log_start_offset(Some(stage.log_start()))
            .records((!batches.is_empty()).then_some(deflated::Frame { batches })))
    }
}

/// A topic that exists.
struct Known {
    name: String,
    id: Option<[u8; 16]>,
    partitions: usize,
}

struct Read {
    topics: Vec<FetchableTopicResponse>,
    /// Of records.
    bytes: u32,
    /// A partition answers with an error, which the client should see at once.
    failed: bool,
}

fn size(batches: &[deflated::Batch]) -> u32 {
    let bytes: usize = batches.iter().map(|batch| batch.record_data.len()).sum();
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

fn failed(partition: i32, error: ErrorCode) -> PartitionData {
    data(partition, error).high_watermark(-1).last_stable_offset(Some(-1)).log_start_offset(Some(-1))
}

fn data(partition: i32, error: ErrorCode) -> PartitionData {
    PartitionData::default()
        .partition_index(partition)
        .error_code(error.into())
        .diverging_epoch(None)
        .current_leader(None)
        .snapshot_id(None)
        .aborted_transactions(Some(Vec::new()))
        .preferred_read_replica(Some(-1))
        .records(None)
}
