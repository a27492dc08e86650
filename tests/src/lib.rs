//! Drives retort as a user does: the built binaries, a home of its own for each test, the gRPC API.

pub mod prompts;
pub mod published;
pub mod retort;
pub mod teacher;
pub mod ticks;
