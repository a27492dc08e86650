//! The edge between the domain's types and `retort.v1`: one module a direction, and one mapping
//! of errors to gRPC.

mod from_proto;
mod status;
mod to_proto;

pub use from_proto::{job_spec_from_proto, job_state_from_proto, soft_targets_from_proto, split_from_proto};
pub use status::{from_status, to_status};
pub use to_proto::{
    duration_to_proto, error_to_proto, job_spec_to_proto, job_state_to_proto, soft_targets_to_proto, split_to_proto,
    task_kind_to_proto, timestamp_to_proto,
};
