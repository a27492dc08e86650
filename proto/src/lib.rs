//! The `retort.v1` wire format: gRPC services and the records on the bus.
//!
//! Generated at build time from `proto/retort/v1`; depends on nothing of ours.

#![allow(clippy::all, rustdoc::all)]

tonic::include_proto!("retort.v1");

/// Encoded `FileDescriptorSet` of the package, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/retort.v1.bin"));
