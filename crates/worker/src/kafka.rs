use async_trait::async_trait;
use retort_bus::{Delivery, Producer, TaskConsumer};
use retort_core::Result;
use retort_proto as proto;

use crate::ports;

#[async_trait]
impl ports::Events for Producer {
    async fn send(&self, event: &proto::WorkerEvent) -> Result<()> {
        self.send_event(event).await
    }
}

#[async_trait]
impl ports::Tasks for TaskConsumer {
    type Delivery = Delivery;

    fn message<'a>(&self, delivery: &'a Delivery) -> &'a proto::TaskMessage {
        &delivery.message
    }

    async fn next(&self) -> Result<Delivery> {
        TaskConsumer::next(self).await
    }

    async fn commit(&self, delivery: &Delivery) -> Result<()> {
        TaskConsumer::commit(self, delivery).await
    }

    async fn close(self) {
        TaskConsumer::close(self).await;
    }
}
