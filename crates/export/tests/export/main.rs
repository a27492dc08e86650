//! Exports of small models, seen from outside: what the importer reads back, and what is refused.

#![allow(clippy::unwrap_used)] // helpers of tests unwrap as tests do

mod models;
mod refusals;
mod round_trip;
