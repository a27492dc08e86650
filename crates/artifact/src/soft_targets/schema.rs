//! Columns of version 1 and how each is laid down in Parquet.

use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema, SchemaRef};
use parquet::{
    basic::{Compression, Encoding, ZstdLevel},
    file::properties::{EnabledStatistics, WriterProperties},
    schema::types::ColumnPath,
};
use retort_core::{Error, Result};

/// Metadata key of the hash over the pages and the header, the epoch left out.
pub(super) const CONTENT_KEY: &str = "retort.content_sha256";

const CREATED_BY: &str = "retort version 1 (build soft-targets)";
const ZSTD_LEVEL: i32 = 9;

/// A column's name, its type and the encoding that was smallest for it.
pub(super) struct Spec {
    pub(super) name: &'static str,
    pub(super) data_type: fn() -> DataType,
    pub(super) encoding: Encoding,
}

pub(super) const ROW_ID: usize = 0;
pub(super) const ROW: usize = 1;
pub(super) const TAGS: usize = 2;
pub(super) const TOKEN_IDS: usize = 3;
pub(super) const TARGET_MASK: usize = 4;
pub(super) const FINISH_REASON: usize = 5;
pub(super) const SUPPORT_SIZE: usize = 6;
pub(super) const SUPPORT_DELTA: usize = 7;
pub(super) const COUNT: usize = 8;
pub(super) const LOGPROB_Q: usize = 9;
pub(super) const MAX_LOGPROB: usize = 10;
pub(super) const TAIL_MASS: usize = 11;
pub(super) const LABEL_LOGPROB: usize = 12;

/// In file order; the constants above index it.
pub(super) const COLUMNS: [Spec; 13] = [
    Spec { name: "row_id", data_type: || DataType::Utf8, encoding: Encoding::PLAIN },
    Spec { name: "row", data_type: || DataType::UInt64, encoding: Encoding::DELTA_BINARY_PACKED },
    Spec { name: "tags", data_type: || list(DataType::Utf8), encoding: Encoding::PLAIN },
    Spec { name: "token_ids", data_type: || list(DataType::UInt32), encoding: Encoding::BYTE_STREAM_SPLIT },
    Spec { name: "target_mask", data_type: || list(DataType::Boolean), encoding: Encoding::RLE },
    Spec { name: "finish_reason", data_type: || DataType::Utf8, encoding: Encoding::PLAIN },
    Spec { name: "support_size", data_type: || list(DataType::UInt16), encoding: Encoding::BYTE_STREAM_SPLIT },
    Spec { name: "support_delta", data_type: || list(DataType::UInt32), encoding: Encoding::BYTE_STREAM_SPLIT },
    Spec { name: "count", data_type: || list(DataType::UInt8), encoding: Encoding::BYTE_STREAM_SPLIT },
    Spec { name: "logprob_q", data_type: || list(DataType::UInt8), encoding: Encoding::BYTE_STREAM_SPLIT },
    Spec { name: "max_logprob", data_type: || list(DataType::Float32), encoding: Encoding::BYTE_STREAM_SPLIT },
    Spec { name: "tail_mass", data_type: || list(DataType::Float32), encoding: Encoding::BYTE_STREAM_SPLIT },
    Spec { name: "label_logprob", data_type: || list(DataType::Float32), encoding: Encoding::BYTE_STREAM_SPLIT },
];

pub(super) fn schema() -> SchemaRef {
    Arc::new(Schema::new(
        COLUMNS.iter().map(|column| Field::new(column.name, (column.data_type)(), false)).collect::<Vec<_>>(),
    ))
}

/// The one element field of every list, named as the Parquet format wants it.
pub(super) fn element(data_type: DataType) -> Arc<Field> {
    Arc::new(Field::new("element", data_type, false))
}

fn list(data_type: DataType) -> DataType {
    DataType::List(element(data_type))
}

/// Path of the column's values: lists hold theirs two levels down.
fn path(column: &Spec) -> ColumnPath {
    let mut parts = vec![column.name.to_owned()];
    if matches!((column.data_type)(), DataType::List(_)) {
        parts.extend(["list".to_owned(), "element".to_owned()]);
    }
    ColumnPath::new(parts)
}

/// No statistics, no indexes, no dictionaries, a fixed writer name: the same rows give the same
/// bytes, and a reader has few kinds of page to be careful with.
pub(super) fn writer_properties() -> Result<WriterProperties> {
    let level = ZstdLevel::try_new(ZSTD_LEVEL).map_err(|error| Error::internal(format!("zstd level: {error}")))?;
    let mut properties = WriterProperties::builder()
        .set_created_by(CREATED_BY.to_owned())
        .set_compression(Compression::ZSTD(level))
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true)
        .set_max_row_group_row_count(Some(usize::MAX));
    for column in &COLUMNS {
        properties = properties.set_column_encoding(path(column), column.encoding);
    }
    Ok(properties.build())
}
